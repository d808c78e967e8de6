"""What a run's model says of its own origin, in config.json and in its card: preset, data, steps, evaluations."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dc_ssdae.errors import as_json
from dc_ssdae.model_folder import may_be_on_the_hub, read_config
from dc_ssdae.presets import list_presets, load_preset
from dc_ssdae.provenance import PARTS, Provenance, name_of_path, short_name
from dc_ssdae.training.build import published_encoder, resolved, timm_settings
from dc_ssdae.training.config import DataConfig, RunConfig

INHERITED = ("source", "license", "untrained")
"""What stays true of a model that starts from another one's weights."""

NO_CHANGES = ("data.dataset", "data.validation", "training.seed")
"""Settings that every run has its own of."""


def inherited(config: RunConfig, source: Path | None) -> dict[str, Any]:
    """What a new run's model knows of its origin before the first step.

    Args:
        config: of the run.
        source: folder of the model whose weights it starts from; None for random ones.

    Raises:
        InputError: the source has a provenance that cannot be used.
    """
    if source is None:
        paths = {part: (getattr(config.model, part) or {}).get("class_path") or "" for part in PARTS}
        untrained = [part for part in PARTS if "." not in paths[part]]  # a user's may bring its own weights
        network = published_encoder(config)
        return {"untrained": untrained} if network is None else {"untrained": ["decoder"], "source": f"timm {network}"}
    # Weights are enough to start from.
    theirs = read_config(source).get("provenance") if (source / "config.json").exists() else None
    known = Provenance.from_mapping(theirs or {}).to_mapping()
    return {name: known[name] for name in INHERITED if name in known}


def origin(
    config: RunConfig, before: Mapping[str, Any] | None, images: int, random_backbones: Sequence[str]
) -> dict[str, Any]:
    """What a run's model says of its training, but for steps and evaluations.

    Args:
        config: of the run.
        before: the provenance in RUN/model: as `inherited` or this function gave it.
        images: of the training data.
        random_backbones: names of loss terms.

    Raises:
        InputError: `before` cannot be used.
    """
    training, distillation = config.training, config.distillation
    known = Provenance.from_mapping(before or {}).to_mapping()
    trained = set(PARTS if training.train is None else [name.partition(".")[0] for name in training.train])
    if timm_settings(config.model) is not None:
        trained.discard("encoder")  # but for a projection
    return Provenance(
        preset=None if training.preset is None else short_name(training.preset),
        changes=changed_settings(config),
        data=data_name(config.data),
        images=images,
        image_size=config.data.image_size,
        batch_size=training.batch_size,
        initialised_from=None if training.init_from is None else name_of_path(training.init_from),
        teacher=None if distillation is None else name_of_path(distillation.teacher),
        source=known.get("source"),
        untrained=[part for part in known.get("untrained", ()) if part not in trained],
        random_backbones=list(random_backbones),
        license=known.get("license"),
        version=version("dc-ssdae"),
    ).to_mapping()


def changed_settings(config: RunConfig) -> list[str]:
    """Names of the settings in which a run differs from its preset, as section.name; none where there is no preset."""
    preset = config.training.preset
    if preset not in list_presets():
        return []
    configs = (config, RunConfig.from_mapping(load_preset(preset)))
    # As JSON has them, with lists for tuples, so that settings from YAML compare equal with defaults.
    ours, theirs = (as_json("the settings", resolved(one).fixed_settings()) for one in configs)
    return [name for name in {**theirs, **ours} if name not in NO_CHANGES and ours.get(name) != theirs.get(name)]


def data_name(data: DataConfig, validation: bool = False) -> str | None:
    """Name the training images, or the validation images, without telling where they lie."""
    if validation and data.validation is not None:
        return _source_name(data.validation)
    name = _source_name(data.dataset or data.root)
    return f"{name}/validation" if validation and name else name


def _source_name(source: str | Mapping[str, Any] | None) -> str | None:
    if source is None or isinstance(source, str):
        return source and name_of_path(source)
    kind, settings = source["class_path"], source.get("init_args") or {}
    place = settings.get("path") or settings.get("root") or settings.get("urls")
    first = place[0] if isinstance(place, list) else place
    if "." in kind or not isinstance(first, str):
        return short_name(kind.rpartition(".")[2])
    return short_name(first) if kind == "HubDataset" and may_be_on_the_hub(first) else name_of_path(first)
