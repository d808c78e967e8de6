"""The README.md of a saved model: what it is, how it was trained, what it measures, how to load it; and its upload.

All that it says is read from the folder. What may be a stranger's text stands in code spans, where Markdown and HTML
mean nothing, and in YAML that a library writes.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from jinja2 import Environment

from dc_ssdae.errors import InputError
from dc_ssdae.files import write_whole
from dc_ssdae.model_folder import NOT_MEASURED, WEIGHTS, read_config, update_config, weight_variants
from dc_ssdae.provenance import (
    IN_TRAINING,
    PARTS,
    SPLITS,
    TITLES,
    check_evaluation,
    check_provenance,
    evaluation_title,
    is_untrained,
    metric_text,
    short_name,
    training_lines,
    with_evaluation,
)
from dc_ssdae.weights import tensor_shapes

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_suffix(".md.jinja")

MARKER = (
    "<!-- dc-ssdae writes this file, and writes it anew with the model. Delete this line to keep your own edits. -->"
)
"""The line by which a card of ours is told from a user's own file."""

PLACEHOLDER = "PATH/TO/THIS/FOLDER"
"""What is loaded, where the model is in no repository: a path of this machine would be of no use to others."""

BATCH_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Last parts of the names of tensors that are no parameters."""

WORKS: Mapping[str, tuple[str, str]] = {
    "DCEncoder": ("Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models", "2410.10733"),
    "KLEncoder": ("High-Resolution Image Synthesis with Latent Diffusion Models", "2112.10752"),
    "UViTDecoder": ("SSDD: Single-Step Diffusion Decoder for Efficient Image Tokenization", "2510.04961"),
    "EquilibriumMatching": (
        "Equilibrium Matching: Generative Modeling with Implicit Energy-Based Models",
        "2510.02300",
    ),
    "FlowMatching": ("Flow Matching for Generative Modeling", "2210.02747"),
}
"""Where a part comes from: title, and number on arXiv."""

CITATION = """@misc{dc_ssdae,
  title  = {DC-SSDAE: Deep-Compression Single-Step Diffusion Autoencoder},
  author = {{The DC-SSDAE authors}}
}"""


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
    before = _text_of(path)
    if before is not None and not is_ours(before):
        return False
    card = render_model_card(read_config(folder), *_weights_in(folder), repo_id)
    if card != before:
        write_whole(path, card.encode("utf-8"))
    return True


def is_ours(card: str) -> bool:
    """Whether this package wrote a card, and nobody has claimed it since."""
    return MARKER in card.splitlines()


def note_provenance(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Put what is known of a model's origin into its config.json, and write its card anew.

    Args:
        folder: of a saved model.
        provenance: as the constructor of `DCSSDAE` takes it.

    Raises:
        InputError: it does not fit; or the folder holds no model.
        OSError: a file cannot be written; the old one stays.
    """
    update_config(folder, {"provenance": check_provenance(provenance)})
    write_model_card(folder)


def note_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Add measured figures to a saved model's config.json and card, in place of earlier ones of the same kind.

    Args:
        folder: of a saved model.
        evaluation: as `check_evaluation` takes it.

    Raises:
        InputError: as `note_provenance`.
        OSError: as `note_provenance`.
    """
    before = check_provenance(read_config(folder).get("provenance"))
    note_provenance(folder, with_evaluation(before, check_evaluation("the evaluation", evaluation)))


def upload_model(
    folder: Path,
    repo_id: str,
    commit_message: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> Any:
    """Upload a saved model's folder to the hub, with a card that tells how to load it from there.

    A card in the repository that is not ours stays. A model in a subfolder is part of something, and gets no card.

    Args:
        folder: of the model; its card, if it is ours, is written anew.
        repo_id: of a repository that is there.
        commit_message: of the commit.
        token: of the hub; None is the one that is logged in with.
        create_pr: propose the files, and leave the repository as it is.
        subfolder: where in the repository.

    Returns:
        As `huggingface_hub.upload_folder`.
    """
    if subfolder is None:
        write_model_card(folder, repo_id)
    without_card = subfolder is not None or _has_card_of_its_own(repo_id, token)
    return huggingface_hub.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        path_in_repo=subfolder,
        commit_message=commit_message or "Upload DCSSDAE",
        token=token,
        create_pr=create_pr,
        ignore_patterns=[CARD_FILE] if without_card else None,
    )


def create_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Make a repository on the hub, if it is not there; gives its whole id.

    Raises:
        InputError: it cannot be called so.
    """
    try:
        return huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    except HFValidationError as error:
        raise InputError(f"no repository can be called {repo_id!r}: {' '.join(str(error).split())}") from None


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
        InputError: the config is not a model's.
    """
    _check(config)
    provenance = check_provenance(config.get("provenance")) or {}
    factor, channels = config["downsample_factor"], config["latent_channels"]
    classes = {part: _class_of(config, part) or "" for part in (*PARTS, "dynamics")}
    counts = {part: f"{parameters[part]:,} parameters" if part in parameters else "" for part in classes}
    told = {part: ", ".join(filter(None, [name and as_code(name), counts[part]])) for part, name in classes.items()}
    latent = {name: config.get(name, unknown) for name, unknown in NOT_MEASURED.items()}
    evaluations = sorted(provenance.get("evaluations", ()), key=lambda entry: entry["protocol"] == IN_TRAINING)
    environment = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)  # Markdown, with code spans
    environment.filters |= {"code": as_code, "json": json.dumps, "capital": lambda text: text[0].upper() + text[1:]}
    card = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=_metadata(config, provenance),
        marker=MARKER,
        kind=f"f{factor}c{channels}",
        provenance=provenance,
        untrained_all=is_untrained(provenance),
        factor=factor,
        channels=channels,
        size=256 if factor <= 256 else factor,
        architecture=[(part, text) for part, text in told.items() if text],
        training=training_lines(provenance, as_code),
        evaluations=[_figures(evaluation) for evaluation in evaluations],
        own_classes=[name for name in classes.values() if "." in name],
        source=repo_id or PLACEHOLDER,
        variant=variant,
        latent=latent,
        is_measured=latent != NOT_MEASURED,
        citation=CITATION,
        works=[WORKS[name] for name in classes.values() if name in WORKS],
    )
    return re.sub(r"\n{3,}", "\n\n", card).strip() + "\n"


def as_code(text: str) -> str:
    """Put one line of text into a code span, where nothing in it means anything."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if text[:1] in ("`", " ") or text[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _check(config: Mapping[str, Any]) -> None:
    """Refuse a config of which not all can be said that a card says."""
    for name in ("latent_channels", "downsample_factor"):
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**31:
            raise InputError(f"config.json is not of a model of this package: {name} is no whole number from 1 on")
    for name in ("scaling_factor", "shift_factor"):
        value = config.get(name, NOT_MEASURED[name])
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"config.json is not of a model of this package: {name} is no finite number")


def _class_of(config: Mapping[str, Any], part: str) -> str | None:
    """The class of a part, in one short line."""
    given = config.get(part)
    path = given.get("class_path") if isinstance(given, Mapping) else None
    return short_name(path) if isinstance(path, str) else None


def _metadata(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    data = provenance.get("data", "")
    is_on_the_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", data, re.ASCII) and data.rpartition("/")[2] not in SPLITS
    results = _results(provenance)
    kind = f"f{config['downsample_factor']}c{config['latent_channels']}"
    metadata = ModelCardData(
        library_name="diffusers",
        tags=["dc-ssdae", "autoencoder", "image-tokenizer", kind],
        license=provenance.get("license"),
        datasets=[data] if is_on_the_hub else None,
        model_name=f"DC-SSDAE {kind}" if results else None,
        eval_results=results or None,
    )
    return metadata.to_yaml()


def _results(provenance: Mapping[str, Any]) -> list[EvalResult]:
    """What the hub lists beside other models' figures: nothing that may not be compared."""
    if provenance.get("untrained"):
        return []
    return [
        EvalResult(
            task_type="image-reconstruction",
            dataset_type=re.sub(r"[^\w.-]+", "-", evaluation["data"], flags=re.ASCII).strip("-") or "images",
            dataset_name=evaluation["data"],
            metric_type=name,
            metric_name=f"{TITLES.get(name, name)} ({evaluation_title(evaluation)})",
            metric_value=metric["value"],
        )
        for evaluation in provenance.get("evaluations", ())
        for name, metric in evaluation["metrics"].items()
        if evaluation["protocol"] != IN_TRAINING and "note" not in metric
    ]


def _figures(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says of an evaluation."""
    metrics = evaluation["metrics"]
    titles = {
        name: (TITLES.get(name) or as_code(name)) + (" †" if "note" in metric else "")
        for name, metric in metrics.items()
    }
    return {
        "title": evaluation_title(evaluation, as_code),
        "has_intervals": any("low" in metric for metric in metrics.values()),
        "rows": [(titles[name], metric_text(metric)) for name, metric in metrics.items()],
        "notes": [(titles[name], as_code(metric["note"])) for name, metric in metrics.items() if "note" in metric],
        "in_training": evaluation["protocol"] == IN_TRAINING,
    }


def _weights_in(folder: Path) -> tuple[dict[str, int], str | None]:
    """Numbers of the parts' parameters, and the variant of the weight files where there are none without one."""
    files = sorted(folder.glob(f"{WEIGHTS}*.safetensors"))
    if not files:
        return {}, None
    shapes = {name: shape for file in files for name, shape in tensor_shapes(file).items()}
    counts = {
        part: sum(
            math.prod(shape)
            for name, shape in shapes.items()
            if name.partition(".")[0] == part and name.rpartition(".")[2] not in BATCH_STATISTICS
        )
        for part in PARTS
    }
    return counts, weight_variants(folder)[0]


def _text_of(path: Path) -> str | None:
    """What a file holds; None where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        return ""


def _has_card_of_its_own(repo_id: str, token: str | None) -> bool:
    """Whether a repository's card is somebody's own."""
    # Asked first, because a download without a network looks like one without a card.
    if not huggingface_hub.file_exists(repo_id, CARD_FILE, token=token):
        return False
    card = _text_of(Path(huggingface_hub.hf_hub_download(repo_id, CARD_FILE, token=token)))
    return card is not None and not is_ours(card)
