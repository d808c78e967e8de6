"""The README.md of a saved model: what it is, how it was trained, what it measures, how to load it; and its upload.

All that it says is read from the folder. What may be a stranger's text stands in code spans, where Markdown and HTML
mean nothing, and in YAML that a library writes.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dc_ssdae.model_folder import NOT_MEASURED, read_config, update_config, weight_files, write_changed
from dc_ssdae.provenance import IN_TRAINING, SPLITS, Evaluation, Provenance
from dc_ssdae.weights import read_safetensors

CARD_FILE = "README.md"

MARKER = (
    "<!-- dc-ssdae writes this file, and writes it anew with the model. Delete this line to keep your own edits. -->"
)
"""The line by which a card of ours is told from a user's own file."""


def write_model_card(folder: Path, repo_id: str | None = None) -> bool:
    """Write a model folder's README.md, whole or not at all, unless one that is not ours is there.

    Args:
        folder: of a saved model.
        repo_id: of the repository to load it from, on the hub.

    Returns:
        Whether the card there is ours.

    Raises:
        InputError: config.json or the weights are damaged.
        OSError: it cannot be written; the old one stays.
    """
    path = folder / CARD_FILE
    if path.exists() and not is_ours(path):
        return False
    variant, files = next(iter(weight_files(folder).items()), (None, []))
    parameters: Counter[str] = Counter()
    for name, tensor in read_safetensors(*files).items():
        if name.rpartition(".")[2] not in ("running_mean", "running_var", "num_batches_tracked"):
            parameters[name.partition(".")[0]] += tensor.numel()
    write_changed(path, render_model_card(read_config(folder), parameters, variant, repo_id))
    return True


def is_ours(path: str | Path) -> bool:
    """Whether this package wrote the card in a file, and nobody has claimed it since."""
    return MARKER in Path(path).read_text(encoding="utf-8", errors="replace").splitlines()


def note_provenance(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Put what is known of a model's origin into its config.json, and write its card anew.

    Args:
        folder: of a saved model.
        provenance: as the constructor of `DCSSDAE` takes it.

    Raises:
        InputError: it does not fit; or the folder holds no model.
        OSError: a file cannot be written; the old one stays.
    """
    update_config(folder, {"provenance": Provenance.from_mapping(provenance).to_mapping()})
    write_model_card(folder)


def note_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Add measured figures to a saved model's config.json and card, in place of earlier ones of the same kind.

    Args:
        folder: of a saved model.
        evaluation: as `Evaluation.from_mapping` takes it.

    Raises:
        InputError: as `note_provenance`.
        OSError: as `note_provenance`.
    """
    before = Provenance.from_mapping(read_config(folder).get("provenance") or {})
    measured = Evaluation.from_mapping(evaluation, "the evaluation")
    note_provenance(folder, before.with_evaluation(measured).to_mapping())


def upload_model(folder: Path, repo_id: str, token: str | None = None, **settings: Any) -> Any:
    """Upload a saved model's folder to the hub, with a card that tells how to load it from there.

    A card in the repository that is not ours stays. A model in a subfolder is part of something, and gets no card.

    Args:
        folder: of the model; its card, if it is ours, is written anew.
        repo_id: of the repository, which is made if it is not there.
        token: of the hub; None is the one that is logged in with.
        settings: private, commit_message, create_pr and subfolder, as `PretrainedModel.push_to_hub`'s.

    Returns:
        As `huggingface_hub.upload_folder`.
    """
    private, subfolder = settings.pop("private", None), settings.pop("subfolder", None)
    repo_id = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if subfolder is None:
        write_model_card(folder, repo_id)
    # Asked first, because a download without a network looks like one without a card.
    there = subfolder is None and huggingface_hub.file_exists(repo_id, CARD_FILE, token=token)
    stays = there and not is_ours(huggingface_hub.hf_hub_download(repo_id, CARD_FILE, token=token))
    settings |= {"ignore_patterns": [CARD_FILE] if stays or subfolder is not None else None, "token": token}
    return huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder, path_in_repo=subfolder, **settings)


def render_model_card(
    config: Mapping[str, Any], parameters: Mapping[str, int], variant: str | None, repo_id: str | None = None
) -> str:
    """Write a model's card.

    Args:
        config: as config.json has it.
        parameters: how many each part has; empty where there are no weights yet.
        variant: of the weight files, where there are none without one.
        repo_id: as `write_model_card`'s.

    Raises:
        InputError: the provenance is damaged.
    """
    provenance = Provenance.from_mapping(config.get("provenance") or {})
    config = {**NOT_MEASURED, **config}
    card = ModelCard.from_template(
        _metadata(config, provenance),
        template_path=str(Path(__file__).with_suffix(".md.jinja")),
        marker=MARKER,
        config=config,
        classes={part: config[part]["class_path"] for part in ("encoder", "decoder", "dynamics")},
        parameters=parameters,
        provenance=provenance,
        source=repo_id or "PATH/TO/THIS/FOLDER",  # a path of this machine would be of no use to others
        variant=variant,
        is_measured=any(config[name] != unknown for name, unknown in NOT_MEASURED.items()),
        as_code=as_code,
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).strip() + "\n"


def as_code(text: str) -> str:
    """Put text into a code span in one line, where nothing in it means anything."""
    text = " ".join(text.split())
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest else f"`{text}`"


def _metadata(config: Mapping[str, Any], provenance: Provenance) -> ModelCardData:
    """The card's front matter; the hub lists its results beside other models' figures, if they may be compared."""
    data = provenance.data or ""
    is_on_the_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", data, re.ASCII) and data.rpartition("/")[2] not in SPLITS
    kind = f"f{config['downsample_factor']}c{config['latent_channels']}"
    results = []
    for evaluation in provenance.evaluations or ():
        dataset = re.sub(r"[^\w.-]+", "-", evaluation.data, flags=re.ASCII).strip("-") or "images"
        told = ", ".join(map(" ".join, evaluation.facts()))
        for name, metric in evaluation.metrics.items():
            if evaluation.protocol != IN_TRAINING and metric.note is None and not provenance.untrained:
                figure = (dataset, evaluation.data, name, metric.value)
                results.append(EvalResult("image-reconstruction", *figure, metric_name=f"{name} ({told})"))
    return ModelCardData(
        library_name="diffusers",
        tags=["dc-ssdae", "autoencoder", "image-tokenizer", kind],
        license=provenance.license,
        datasets=[data] if is_on_the_hub else None,
        model_name=f"DC-SSDAE {kind}" if results else None,
        eval_results=results or None,
    )
