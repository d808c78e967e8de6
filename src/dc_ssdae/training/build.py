"""From a configuration to the model and the objective; a user's own classes are imported by the names given there."""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.classes import import_class
from dc_ssdae.components import COMPONENTS, resolve_part
from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.errors import InputError, shown
from dc_ssdae.losses.total import BUILT_IN, Objective, WeightedTerm
from dc_ssdae.model_folder import model_folder, read_config
from dc_ssdae.parameter_groups import parameter_groups, select_groups
from dc_ssdae.training.config import LossConfig, ModelConfig, RunConfig
from dc_ssdae.training.distillation import DistillationStep
from dc_ssdae.training.run import WEIGHTS_FILE
from dc_ssdae.training.step import TrainingStep
from dc_ssdae.weights import check_same_tensors, read_safetensors


def own_classes(config: ModelConfig) -> list[type]:
    """Import the classes of the model that are not this package's.

    Raises:
        InputError: one cannot be imported.
    """
    found = []
    for part in COMPONENTS:
        class_path = (getattr(config, part) or {}).get("class_path")
        if class_path is not None and "." in class_path:
            found.append(import_class(class_path))
    return found


def resolved(config: RunConfig) -> RunConfig:
    """Spell out every setting of the model's parts, so that a run keeps its meaning when a default changes.

    Raises:
        InputError: a class or a setting is unknown or does not fit.
    """
    classes = own_classes(config.model)
    parts = {part: resolve_part(part, getattr(config.model, part), classes) for part in COMPONENTS}
    plain = json.loads(json.dumps(parts))  # lists for tuples, as YAML gives them back
    return replace(config, model=replace(config.model, **plain))


def build_model(config: ModelConfig) -> DCSSDAE:
    """Build the autoencoder with fresh weights, from PyTorch's default generator.

    Raises:
        InputError: a class or a setting does not fit.
    """
    return DCSSDAE(
        latent_channels=config.latent_channels,
        downsample_factor=config.downsample_factor,
        encoder=config.encoder,
        decoder=config.decoder,
        dynamics=config.dynamics,
        classes=own_classes(config),
    )


def build_objective(losses: Mapping[str, LossConfig], model: DCSSDAE) -> Objective:
    """Build the objective from the terms whose weight is not 0.

    Args:
        losses: by name.
        model: a term whose class has `for_model` is built by for_model(model, **init_args).

    Raises:
        InputError: a class cannot be imported, a setting does not fit, or a backbone's weights are not to be had.
    """
    terms = {}
    for name, loss in losses.items():
        if loss.weight:
            kind = _term_class(name, loss)
            terms[name] = WeightedTerm(loss.weight, _build_term(name, kind, loss.init_args, model))
    return Objective(terms)


def build_step(config: RunConfig, teacher: Path | None = None) -> TrainingStep:
    """Build what a run trains, with fresh weights, on the CPU.

    Args:
        config: of the run.
        teacher: the folder of a distillation's teacher, in place of what the configuration names.

    Raises:
        InputError: as `build_model` and `build_objective`; no group has a name that is to train; or the teacher is not
            there.
    """
    training = config.training
    model = build_model(config.model)
    if training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    _check_second_derivatives(model, config)
    objective = build_objective(config.losses, model)
    if config.distillation is None:
        step = TrainingStep(model, objective, training.precision, training.channels_last)
    else:
        source = Path(config.distillation.teacher) if teacher is None else teacher
        step = DistillationStep(
            model,
            objective,
            load_teacher(source, own_classes(config.model)),
            config.distillation.steps,
            config.distillation.step_size,
            training.precision,
            training.channels_last,
        )
    chosen = config.trained_groups()
    if chosen is not None:
        step.freeze_all_but(trained_tensors(step, chosen))
    return step


def trained_tensors(step: TrainingStep, selectors: Sequence[str]) -> set[str]:
    """Find what trains where only some groups do.

    Args:
        step: with the model and the objective.
        selectors: names of groups as `dc_ssdae.parameter_groups.select_groups` takes them; losses.NAME is what a loss
            term has learnt.

    Returns:
        Names of tensors of the step's state dict.

    Raises:
        InputError: a selector matches nothing.
    """
    groups = {group: [f"model.{name}" for name in names] for group, names in parameter_groups(step.model).items()}
    for term, module in step.objective.terms.items():
        if names := [f"objective.terms.{term}.{name}" for name in module.state_dict()]:
            groups[f"losses.{term}"] = names
    try:
        chosen = select_groups(groups, selectors)
    except InputError as error:
        raise InputError(f"training.train: {error}") from None
    return {name for group in chosen for name in groups[group]}


def place_step(step: TrainingStep, config: RunConfig, device: torch.device, sharded: bool = False) -> None:
    """Make it ready to train: on a device, in the memory order and compiled as the configuration says.

    Args:
        step: with the model and the objective.
        config: of the run.
        device: to train on.
        sharded: whether the parameters are then sharded over processes, which takes contiguous ones alone; the images
            are in channels-last order all the same.
    """
    step.to(device)
    channels_last = config.training.channels_last
    if device.type == "cuda" if channels_last is None else channels_last:
        step.memory_format = torch.channels_last
        if not sharded:
            step.to(memory_format=torch.channels_last)
    if config.training.compile:
        step.compile_networks()
    step.train()


def decoder_groups(config: ModelConfig) -> list[str]:
    """Names of the decoder's parameter groups.

    Raises:
        InputError: as `build_model`.
    """
    with init_empty_weights():
        model = build_model(config)
    return [name for name in parameter_groups(model) if name.partition(".")[0] == "decoder"]


def check_components(
    config: RunConfig, starts: bool = True, teacher: Path | None = None, sharded: bool = False
) -> None:
    """Find mistakes in the model's and the losses' settings before anything heavy is built.

    Args:
        config: of the run.
        starts: False for a run that goes on, which needs the weights it started from no longer.
        teacher: where a run keeps its copy of a distillation's teacher; None for one that is yet to be copied.
        sharded: whether the parameters are sharded over processes.

    Raises:
        InputError: as `build_model` and `build_objective`.
    """
    with init_empty_weights():  # not on the meta device, where a user's constructor could read no number
        model = build_model(config.model)
    if config.training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    _check_second_derivatives(model, config, sharded)
    if config.distillation is not None:
        _check_teacher(model, config, teacher)
    source = config.training.init_from
    if source is not None and starts:
        _check_source("training.init_from", source, model)
    if config.training.train is not None:
        # Groups of loss terms are known when those are built, with their backbones.
        own = [name for name in config.training.train if name.partition(".")[0] != "losses"]
        if own:
            try:
                select_groups(parameter_groups(model), own)
            except InputError as error:
                raise InputError(f"training.train: {error}") from None
    if config.training.wandb and find_spec("wandb") is None:
        raise InputError("training.wandb is true, but Weights & Biases is not installed: pip install wandb")
    for name, loss in config.losses.items():
        if loss.weight:
            _check_term(name, _term_class(name, loss), loss.init_args)


def fetch_backbones(losses: Mapping[str, LossConfig]) -> None:
    """Find the weights of the backbones of loss terms, or download them.

    Raises:
        InputError: they are not to be had; says which file is wanted and where to put it.
    """
    for name, loss in losses.items():
        if has_backbone(name, loss):
            kind: Any = _term_class(name, loss)
            try:
                with _naming(name):
                    kind.fetch(**loss.init_args)
            except InputError:
                raise
            except (TypeError, ValueError, AttributeError) as error:
                raise InputError(f"losses.{name}: {kind.__name__} cannot take its init_args: {error}") from error


def has_backbone(name: str, loss: LossConfig) -> bool:
    """Whether a term counts and looks at images through a frozen network with weights of its own.

    Raises:
        InputError: its class cannot be imported.
    """
    return bool(loss.weight) and hasattr(_term_class(name, loss), "fetch")


def load_teacher(folder: Path, classes: Sequence[type]) -> DCSSDAE:
    """Load a distillation's teacher, which may be a run.

    Raises:
        InputError: it is not there, or damaged.
    """
    try:
        return DCSSDAE.from_pretrained(model_folder(folder), classes=classes)
    except (InputError, OSError) as error:
        raise InputError(f"distillation.teacher {folder}: {error}") from None


def _check_source(name: str, source: str, model: DCSSDAE) -> None:
    """Compare the weights' headers with the model."""
    try:
        given = read_safetensors(model_folder(source) / WEIGHTS_FILE)
    except InputError as error:
        raise InputError(f"{name} {source}: {error}") from None
    check_same_tensors(f"{name} {source}", model.state_dict(), given)


def _check_second_derivatives(model: DCSSDAE, config: RunConfig, sharded: bool = False) -> None:
    """Refuse what an explicit energy, whose training differentiates a gradient, cannot be combined with."""
    if getattr(model.dynamics, "explicit_energy", None) is None:
        return
    wanted = "the dynamics trains with an explicit_energy, which takes second derivatives"
    if config.training.compile:
        raise InputError(f"{wanted}; torch.compile has none: set training.compile false")
    if sharded:
        raise InputError(f"{wanted}; they were never tried with FSDP, and are refused: run without sharding")


def _check_teacher(model: DCSSDAE, config: RunConfig, kept: Path | None) -> None:
    assert config.distillation is not None
    teacher = config.distillation.teacher if kept is None else str(kept)
    steps = config.distillation.steps
    if config.training.init_from is not None:
        raise InputError("training.init_from is not for a distillation: its student starts as the teacher")
    if steps > 1 and not isinstance(model.dynamics, EquilibriumMatching | FlowMatching):
        raise InputError(
            f"distillation.steps is {steps}; {type(model.dynamics).__name__} has no decode of several steps"
        )
    descends = steps > 1 and isinstance(model.dynamics, EquilibriumMatching)
    if config.distillation.step_size is not None and not descends:
        raise InputError("distillation.step_size is for several steps of equilibrium matching; leave it out here")
    chosen = config.training.train
    if chosen is None or any(name.partition(".")[0] not in ("decoder", "losses") for name in chosen):
        raise InputError(
            f"training.train is {shown(chosen)}; a distillation trains the decoder alone, from the teacher's latent: "
            "name groups of the decoder"
        )
    _check_source("distillation.teacher", teacher, model)
    config_there = read_config(model_folder(teacher))
    for part in COMPONENTS:
        theirs = resolve_part(part, config_there.get(part), own_classes(config.model))
        if json.loads(json.dumps(theirs)) != json.loads(json.dumps(model.config[part])):
            raise InputError(f"distillation.teacher {teacher} has another {part} than section model; take the same")


def _term_class(name: str, loss: LossConfig) -> type[nn.Module]:
    return BUILT_IN[name] if loss.class_path is None else import_class(loss.class_path)


def _check_term(name: str, kind: type, settings: Mapping[str, Any]) -> None:
    if not issubclass(kind, nn.Module):
        raise InputError(f"losses.{name}.class_path names {kind.__name__}, which is no torch.nn.Module")
    if kind.__init__ is nn.Module.__init__ and settings:  # its signature takes anything, and then refuses
        raise InputError(f"losses.{name}: {kind.__name__} takes no init_args; {sorted(settings)[0]} is given")
    signature = inspect.signature(kind.__init__)
    try:
        # What for_model adds stands in the constructor's signature and not among the settings.
        (signature.bind_partial if hasattr(kind, "for_model") else signature.bind)(None, **settings)
    except TypeError as error:
        raise InputError(f"losses.{name}: {kind.__name__} does not take these init_args: {error}") from None


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the term's name before the message of an error."""
    try:
        yield
    except InputError as error:
        message = str(error)
        raise InputError(message if f"losses.{name}" in message else f"losses.{name}: {message}") from None


def _build_term(name: str, kind: type, settings: Mapping[str, Any], model: DCSSDAE) -> nn.Module:
    _check_term(name, kind, settings)
    try:
        with _naming(name):
            return kind.for_model(model, **settings) if hasattr(kind, "for_model") else kind(**settings)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"losses.{name}: {kind.__name__} cannot be built with its init_args: {error}") from error
