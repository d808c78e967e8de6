"""From a configuration to the model and the objective; a user's own classes are imported by the names given there."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from dc_ssdae.autoencoder import DCSSDAE, model_folder
from dc_ssdae.classes import import_class
from dc_ssdae.components import COMPONENTS, resolve_part
from dc_ssdae.errors import InputError
from dc_ssdae.losses.total import BUILT_IN, Objective, WeightedTerm
from dc_ssdae.training.config import LossConfig, ModelConfig, RunConfig
from dc_ssdae.training.ema import check_same_tensors
from dc_ssdae.training.run import WEIGHTS_FILE
from dc_ssdae.training.step import TrainingStep
from dc_ssdae.weights import tensor_shapes


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


def build_objective(losses: Mapping[str, LossConfig]) -> Objective:
    """Build the objective from the terms whose weight is not 0.

    Raises:
        InputError: a class cannot be imported, or a setting does not fit.
    """
    terms = {}
    for name, loss in losses.items():
        if loss.weight:
            kind = _term_class(name, loss)
            terms[name] = WeightedTerm(loss.weight, _build_term(name, kind, loss.init_args))
    return Objective(terms)


def build_step(config: RunConfig) -> TrainingStep:
    """Build what a run trains, with fresh weights, on the CPU.

    Raises:
        InputError: as `build_model` and `build_objective`.
    """
    training = config.training
    model = build_model(config.model)
    if training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return TrainingStep(model, build_objective(config.losses), training.precision, training.channels_last)


def place_step(step: TrainingStep, config: RunConfig, device: torch.device) -> None:
    """Make it ready to train: on a device, in the memory order and compiled as the configuration says."""
    step.to(device)
    if config.training.channels_last:
        step.to(memory_format=torch.channels_last)
    if config.training.compile:
        step.model.encoder.compile()
        step.model.decoder.compile()
    step.train()


def check_components(config: RunConfig, starts: bool = True) -> None:
    """Find mistakes in the model's and the losses' settings before anything heavy is built.

    Args:
        config: of the run.
        starts: False for a run that goes on, which needs the weights it started from no longer.

    Raises:
        InputError: as `build_model` and `build_objective`.
    """
    with init_empty_weights():  # not on the meta device, where a user's constructor could read no number
        model = build_model(config.model)
    if config.training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    source = config.training.init_from
    if source is not None and starts:
        try:
            shapes = tensor_shapes(model_folder(source) / WEIGHTS_FILE)
        except InputError as error:
            raise InputError(f"training.init_from {source}: {error}") from None
        given = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        check_same_tensors(f"training.init_from {source}", model.state_dict(), given)
    if config.training.wandb and find_spec("wandb") is None:
        raise InputError("training.wandb is true, but Weights & Biases is not installed: pip install wandb")
    for name, loss in config.losses.items():
        if loss.weight:
            _check_term(name, _term_class(name, loss), loss.init_args)


def _term_class(name: str, loss: LossConfig) -> type[nn.Module]:
    return BUILT_IN[name] if loss.class_path is None else import_class(loss.class_path)


def _check_term(name: str, kind: type, settings: Mapping[str, Any]) -> None:
    if not issubclass(kind, nn.Module):
        raise InputError(f"losses.{name}.class_path names {kind.__name__}, which is no torch.nn.Module")
    if kind.__init__ is nn.Module.__init__ and settings:  # its signature takes anything, and then refuses
        raise InputError(f"losses.{name}: {kind.__name__} takes no init_args; {sorted(settings)[0]} is given")
    try:
        inspect.signature(kind.__init__).bind(None, **settings)
    except TypeError as error:
        raise InputError(f"losses.{name}: {kind.__name__} does not take these init_args: {error}") from None


def _build_term(name: str, kind: type, settings: Mapping[str, Any]) -> nn.Module:
    _check_term(name, kind, settings)
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"losses.{name}: {kind.__name__} cannot be built with its init_args: {error}") from error
