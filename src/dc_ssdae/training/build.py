"""From a configuration to the model and the objective; a user's own classes are imported by the names given there."""

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.classes import import_class
from dc_ssdae.components import COMPONENTS, resolve_part
from dc_ssdae.errors import InputError, prefixed, wrong_value
from dc_ssdae.losses.backbones import RANDOM, download_weights, weights_on_this_machine
from dc_ssdae.losses.repa import build_transformer, transformer_file
from dc_ssdae.losses.total import BUILT_IN, Objective, WeightedTerm
from dc_ssdae.model_folder import model_folder, read_config
from dc_ssdae.networks import TimmEncoder
from dc_ssdae.parameter_groups import parameter_groups, select_groups
from dc_ssdae.presets import DEFAULT_CLASSES
from dc_ssdae.training.checkpoint import Checkpoint
from dc_ssdae.training.config import LossConfig, ModelConfig, RunConfig, keeps_latent
from dc_ssdae.training.distillation import DistillationStep, TeacherCache
from dc_ssdae.training.recipe import RECIPE_FILE
from dc_ssdae.training.run import WEIGHTS_FILE, RunFolder
from dc_ssdae.training.step import TrainingStep, trains
from dc_ssdae.weights import check_same_tensors, read_safetensors


def own_classes(config: ModelConfig) -> list[type]:
    """Import the classes of the model that are not this package's.

    Raises:
        InputError: one cannot be imported.
    """
    paths = [(getattr(config, part) or {}).get("class_path") or "" for part in COMPONENTS]
    return [import_class(path) for path in paths if "." in path]


def resolved(config: RunConfig) -> RunConfig:
    """Spell out every setting of the model's parts, so that a run keeps its meaning when a default changes.

    Raises:
        InputError: a class or a setting is unknown or does not fit.
    """
    classes = own_classes(config.model)
    parts: Any = {part: resolve_part(part, getattr(config.model, part), classes).config for part in COMPONENTS}
    return replace(config, model=replace(config.model, **parts))


def build_model(config: ModelConfig) -> DCSSDAE:
    """Build the autoencoder with fresh weights, from PyTorch's default generator.

    Raises:
        InputError: a class or a setting does not fit.
    """
    return DCSSDAE(**asdict(config), classes=own_classes(config))


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
            with _term_class(name, loss) as kind:
                build = partial(kind.for_model, model) if hasattr(kind, "for_model") else kind
                terms[name] = WeightedTerm(loss.weight, build(**loss.init_args))
    return Objective(terms)


def build_step(config: RunConfig, teacher: Path | None = None) -> TrainingStep:
    """Build what a run trains, with fresh weights, on the CPU.

    Args:
        config: of the run.
        teacher: the folder of a distillation's teacher, in place of the one that the configuration names.

    Raises:
        InputError: as `build_model` and `build_objective`; no group has a name that is to train; or the teacher is not
            there.
    """
    model = build_model(config.model)
    if config.training.gradient_checkpointing:
        if not any(hasattr(module, "gradient_checkpointing") for module in model.modules()):
            raise InputError("training.gradient_checkpointing: neither encoder nor decoder supports it; make it false")
        model.enable_gradient_checkpointing()
    objective = build_objective(config.losses, model)
    if config.distillation is None:
        step = TrainingStep(model, objective, config.training.precision)
    else:
        loaded = load_teacher(teacher or Path(config.distillation.teacher), own_classes(config.model))
        step = DistillationStep(model, objective, loaded, config.distillation, config.training.precision)
    if config.training.train is not None:
        left_out = [f"losses.{name}" for name, loss in config.losses.items() if not loss.weight]
        groups = {group: [f"model.{name}" for name in names] for group, names in parameter_groups(model).items()}
        for term, module in objective.terms.items():
            if names := list(module.state_dict(prefix=f"objective.terms.{term}.")):
                groups[f"losses.{term}"] = names
        with prefixed("training.train"):
            trained = select_groups(groups, [name for name in config.training.train if name not in left_out])
        step.freeze_all_but({name for group in trained for name in groups[group]})
    return step


def load_step(config: RunConfig, run: RunFolder, checkpoint: Checkpoint | None) -> TrainingStep:
    """Build what a run trains, with the weights that it begins or goes on with.

    Args:
        config: of the run.
        run: its folder, with the copy of a distillation's teacher.
        checkpoint: to go on from; None begins.

    Raises:
        InputError: as `build_step`; the weights are of another architecture; or a loss term's own parameters are random
            and would stay so.
    """
    torch.manual_seed(config.training.seed)
    distillation, training = config.distillation, config.training
    step = build_step(config, run.teacher if run.teacher.is_dir() else None)
    if isinstance(step, DistillationStep) and distillation is not None and distillation.cache_steps is not None:
        step.cache = TeacherCache(run.path / "teacher_cache", distillation.cache_steps * training.batch_size)
    if checkpoint is not None:
        weights = checkpoint.tensors["model"]
        check_same_tensors(f"{run.checkpoints.last()}/model.safetensors", step.state_dict(), weights)
        step.load_state_dict(dict(weights))
        return step
    if (network := published_encoder(config)) is not None:
        load_published_encoder(step.model.encoder, network)
    source = training.init_from if distillation is None else str(run.teacher)
    loaded = set() if source is None else load_initial_weights(step, source)
    if new := sorted(name.split(".")[2] for name in step.held_back - loaded if name.startswith("objective.")):
        raise InputError(f"losses.{new[0]} has parameters that are new and would not train: add it to training.train")
    return step


def load_initial_weights(step: TrainingStep, source: str) -> set[str]:
    """Start from a saved model's or a run's averaged weights, and from what the run's loss terms have learnt.

    A term that the run did not have, or had in another form, starts anew; standard error says so.

    Args:
        step: takes the weights.
        source: the folder of a model, of a run, or of a recipe, which stands for the last phase that has ended.

    Returns:
        Names of the objective's tensors that were taken over.

    Raises:
        InputError: there are no weights, or the model's are of another architecture.
    """
    step.model.load_state_dict(_read_source("training.init_from", source, step.model))
    is_recipe = Path(source, RECIPE_FILE).is_file()  # whose RUN/model is a link into a phase
    last = RunFolder(model_folder(source).resolve().parent if is_recipe else Path(source)).checkpoints.last()
    before = {} if last is None else read_safetensors(last / "model.safetensors")
    loaded: set[str] = set()
    for name, term in step.objective.terms.items():
        prefix = f"objective.terms.{name}."
        given = {key: tensor for key, tensor in before.items() if key.startswith(prefix)}
        if before and (expected := term.state_dict(prefix=prefix)):
            try:
                check_same_tensors(source, expected, given)
                step.load_state_dict(given, strict=False)
                loaded |= given.keys()
            except InputError as error:
                print(f"losses.{name} starts anew: {error}", file=sys.stderr)
    return loaded


def place_step(step: TrainingStep, config: RunConfig, device: torch.device, sharded: bool = False) -> None:
    """Make a step ready to train: on a device, in the memory order and compiled as the configuration says.

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
    """List the decoder's parameter groups.

    Raises:
        InputError: as `build_model`.
    """
    with init_empty_weights():
        model = build_model(config)
    return [name for name in parameter_groups(model) if name.partition(".")[0] == "decoder"]


def check_components(
    config: RunConfig, starts: bool = True, teacher: Path | None = None, processes: int = 1, sharded: bool = False
) -> DCSSDAE:
    """Find mistakes in the model's and the losses' settings before anything heavy is built.

    Args:
        config: of the run.
        starts: False for a run that goes on, which no longer needs the weights it started from.
        teacher: where a run keeps its copy of a distillation's teacher; None where it is yet to be copied.
        processes: number of processes that train together.
        sharded: whether the parameters are sharded over them.

    Returns:
        The model, without weights.

    Raises:
        InputError: as `build_model` and `build_objective`; or the run would train, or keep, nothing but random weights.
    """
    training, distillation = config.training, config.distillation
    training.check_processes(processes)
    with init_empty_weights():  # not on the meta device, where a user's constructor could read no number
        model = build_model(config.model)
    if getattr(model.dynamics, "explicit_energy", None) is not None and (training.compile or sharded):
        raise InputError("an explicit_energy takes second derivatives: set training.compile false, and use no FSDP")
    if distillation is not None:
        _check_teacher(model, config, distillation.teacher if teacher is None else str(teacher))
    elif starts and training.init_from is not None:
        _read_source("training.init_from", training.init_from, model)
    # Groups of loss terms are known when those are built, with their backbones.
    groups, parameters = parameter_groups(model), dict(model.named_parameters())
    for selector in training.train or ():
        if selector.partition(".")[0] != "losses":
            with prefixed("training.train"):
                names = [name for group in select_groups(groups, [selector]) for name in groups[group]]
            if not any(parameters[name].requires_grad for name in names if name in parameters):
                raise InputError(f"training.train names {selector}, of which nothing can train: its class freezes it")
    if training.wandb and find_spec("wandb") is None:
        raise InputError("training.wandb is true, but Weights & Biases is not installed: pip install wandb")
    for name, loss in config.losses.items():
        if loss.weight:
            with _term_class(name, loss) as kind:
                # What for_model adds stands in the constructor's signature and not among the settings.
                inspect.signature(kind).bind_partial(**loss.init_args)
    encoder = (config.model.encoder or {}).get("class_path", DEFAULT_CLASSES["encoder"])
    has_source = training.init_from is not None or distillation is not None
    # A class of the user's may bring its own weights, and one of ours may freeze those that are published.
    is_random = encoder in COMPONENTS["encoder"] and trains(model.encoder)
    if starts and keeps_latent(training.train) and not has_source and is_random:
        raise InputError(
            "training.train leaves the encoder out, whose weights are random: train it, or set training.init_from"
        )
    return model


def fetch_weights(config: RunConfig, starts: bool) -> None:
    """Find the weights of the backbones of loss terms and, for a run that starts, the encoder's, or download them.

    Raises:
        InputError: they are not to be had; says which file is wanted and where to put it.
    """
    for name, loss in config.losses.items():
        with _term_class(name, loss) as kind:
            if loss.weight and hasattr(kind, "fetch"):
                kind.fetch(**loss.init_args)
    if starts and (network := published_encoder(config)) is not None:
        _encoder_file(network)


def timm_settings(config: ModelConfig) -> dict[str, Any] | None:
    """The settings of a model's `TimmEncoder`; None where it has another encoder.

    Raises:
        InputError: a setting of the encoder is unknown or of the wrong type.
    """
    is_there = (config.encoder or {}).get("class_path") == TimmEncoder.__name__
    return resolve_part("encoder", config.encoder).arguments if is_there else None


def published_encoder(config: RunConfig) -> str | None:
    """timm's name of the network whose published weights a new run's encoder has; None where they come from elsewhere.

    Raises:
        InputError: as `timm_settings`.
    """
    settings = timm_settings(config.model)
    has_source = config.training.init_from is not None or config.distillation is not None
    return None if has_source or settings is None or settings["weights"] == RANDOM else settings["name"]


def load_published_encoder(encoder: TimmEncoder, network: str) -> None:
    """Give an encoder the published weights of its transformer, of which it may lack the last layers.

    Args:
        encoder: takes them.
        network: timm's name.

    Raises:
        InputError: the weights are not to be had, or the file is damaged or another network's.
    """
    transformer = encoder.tokens.transformer
    published = build_transformer(network, _encoder_file(network)).state_dict()
    transformer.load_state_dict({name: published[name] for name in transformer.state_dict()})


def _encoder_file(network: str) -> Path:
    file, setting = transformer_file(network), "model.encoder.init_args.weights"
    otherwise = f"start from a model that has it: --training.init_from DIR, or from random weights: --{setting} random"
    return weights_on_this_machine(file) or download_weights(file, "model.encoder", otherwise)


def load_teacher(folder: Path, classes: Sequence[type]) -> DCSSDAE:
    """Load a distillation's teacher, which may be a run.

    Raises:
        InputError: it is not there, or damaged.
    """
    with prefixed(f"distillation.teacher {folder}"):
        return DCSSDAE.from_pretrained(model_folder(folder), classes=classes)


def _read_source(name: str, source: str, model: DCSSDAE) -> dict[str, Tensor]:
    """Read the weights that a setting names, which must be the model's."""
    with prefixed(f"{name} {source}"):
        given = read_safetensors(model_folder(source) / WEIGHTS_FILE)
    check_same_tensors(f"{name} {source}", model.state_dict(), given)
    return given


def _check_teacher(model: DCSSDAE, config: RunConfig, teacher: str) -> None:
    if config.training.init_from is not None:
        raise InputError("training.init_from is not for a distillation: its student starts as the teacher")
    chosen = config.training.train
    if chosen is None or any(name.partition(".")[0] not in ("decoder", "losses") for name in chosen):
        raise wrong_value("training.train", chosen, "groups of the decoder: a distillation trains the decoder alone")
    _read_source("distillation.teacher", teacher, model)
    theirs = DCSSDAE.without_weights(read_config(model_folder(teacher)), own_classes(config.model)).config
    if other := [part for part in COMPONENTS if theirs[part] != model.config[part]]:
        raise InputError(f"distillation.teacher {teacher} has another {other[0]} than section model; take the same")


@contextmanager
def _term_class(name: str, loss: LossConfig) -> Iterator[Any]:
    """Give a term's class, and let what it has against its settings be an error that names the term."""
    kind: Any = BUILT_IN[name] if loss.class_path is None else import_class(loss.class_path)
    if not issubclass(kind, nn.Module):
        raise InputError(f"losses.{name}.class_path names {kind.__name__}, which is no torch.nn.Module")
    try:
        yield kind
    except InputError as error:
        message = str(error)
        raise InputError(message if f"losses.{name}" in message else f"losses.{name}: {message}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"losses.{name}: {kind.__name__} does not take these init_args: {error}") from error
