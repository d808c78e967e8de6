"""Settings of a run: sections model, data, training, losses, distillation. Reading and checking them needs no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from dc_ssdae.errors import InputError, check_names, shown, unknown_name, wrong_value
from dc_ssdae.presets import DEFAULT_CLASSES
from dc_ssdae.settings import LARGEST_SEED, check_settings, is_required, setting

PRECISION_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

BUILT_IN_LOSSES: Mapping[str, float] = {"dynamics": 1.0, "lpips": 0.5, "repa": 0.25, "kl": 1e-6}
"""Loss terms that need no class_path, and their default weights."""

LARGEST_SIZE = 2**16
"""Largest side of an image in pixels, and largest number of latent channels."""

METRICS: Mapping[str, float] = {"psnr": 1.0, "ssim": 1.0, "mse": -1.0}
"""What an evaluation within a run measures; 1 where more is better, else -1."""


def keeps_latent(train: Sequence[str] | None) -> bool:
    """Whether the groups of `TrainingConfig.train` leave the encoder out, so that the latent stays as it is."""
    return train is not None and all(name.partition(".")[0] != "encoder" for name in train)


@dataclass(frozen=True)
class ModelConfig:
    """Which autoencoder. A class is named by class_path, its settings by init_args.

    One setting of a part is set by --model.encoder.init_args.norm none.

    Args:
        latent_channels: c, channels of the latent.
        downsample_factor: f, a power of two of at least 8.
        encoder: class_path (DCEncoder, KLEncoder, DiffusersEncoder, TimmEncoder, or your own as module.Class) and
            init_args.
        decoder: class_path (UViTDecoder, or your own) and init_args.
        dynamics: class_path (EquilibriumMatching, FlowMatching, or your own) and init_args.
    """

    latent_channels: int = setting(at_least=1, at_most=LARGEST_SIZE)
    downsample_factor: int = setting()
    encoder: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None
    dynamics: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_settings(self, "model.")
        factor = self.downsample_factor
        if factor < 8 or factor & (factor - 1):
            raise wrong_value("model.downsample_factor", factor, "a power of two from 8 on")
        for name in ("encoder", "decoder", "dynamics"):
            object.__setattr__(self, name, check_component(f"model.{name}", getattr(self, name)))


@dataclass(frozen=True)
class DataConfig:
    """Which images to train on, and how they are cropped.

    One setting of a data set is set by --data.dataset.init_args.path PATH.

    Args:
        root: a folder of images or of tar shards, which may have subfolders train/ and validation/ (or val/); or a
            pattern of shards such as https://host/train-{000..127}.tar.
        dataset: a data set instead of root, by class_path (ImageFolder, Shards, HubDataset, or your own as
            module.Class) and init_args.
        validation: validation images, if they are not in root: a folder or pattern, or class_path and init_args.
        validation_images: largest number of validation images per evaluation.
        image_size: side of the training crops in pixels, a multiple of the model's downsampling factor f.
        aug_scale: largest random enlargement; before the crop, the shorter side is resized to image_size times a random
            number from 1 to this.
        flip: mirror half of the crops left to right.
        workers: number of processes that read images, per training process; null chooses it by the number of cores.
        max_broken_share: stop the run if more than this share of the data set cannot be read.
        cache: folder that caches shards downloaded from a URL; null is ~/.cache/dc_ssdae/shards.
    """

    root: str | None = setting(None, may_change=True)
    dataset: dict[str, Any] | None = None
    validation: str | dict[str, Any] | None = None
    validation_images: int = setting(1000, at_least=1, may_change=True)
    image_size: int = setting(256, at_least=8, at_most=LARGEST_SIZE)
    aug_scale: float = setting(2.0, at_least=1.0)
    flip: bool = True
    workers: int | None = setting(None, at_least=0, may_change=True)
    max_broken_share: float = setting(0.1, at_least=0.0, at_most=1.0, may_change=True)
    cache: str | None = setting(None, may_change=True)

    def __post_init__(self) -> None:
        check_settings(self, "data.")
        if self.root is not None and self.dataset is not None:
            raise InputError("data.root and data.dataset are both given; set one to null", "data.root")
        for name in ("dataset", "validation"):
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, check_component(f"data.{name}", value, needs_class=True))


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Args:
        steps: number of optimiser steps; null trains until training.minutes are used up.
        minutes: training time in minutes; null sets no limit. Training ends when steps or minutes are used up,
            whichever comes first; a run that ends by minutes cannot be repeated bit by bit.
        batch_size: images per step, over all processes and accumulation_steps.
        accumulation_steps: number of parts in which each process computes its share of a batch, to save memory.
        optimizer: schedule_free_radam, with a constant learning rate; or adamw, with warm-up and cosine decay to 0.
        lr: learning rate; for adamw, its peak.
        betas: decay rates of the first and second moment of the gradient.
        weight_decay: weight decay of the optimiser.
        warmup: share of the training over which adamw's learning rate rises.
        gradient_clip: largest norm of the gradient, above which it is scaled down; null does not clip.
        ema_decay: decay of the averaged weights per step.
        ema_start: step at which averaging starts; until then the average is a copy of the weights.
        precision: float32, or autocast of the networks to bfloat16 or float16; weights and losses stay float32.
        compile: compile encoder and decoder with torch.compile.
        channels_last: keep images and convolutions in channels-last memory order. null does so only on a GPU: on a
            CPU the gradients of convolutions then take up to four times as long.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        seed: seed of weights, data order, crops, levels and noise.
        output: folder of the run, which must not exist yet; null is runs/NAME, by the name of the configuration.
        init_from: model or run whose weights to start from; from a run, what its loss terms have learnt is taken too.
        train: names of the parameter groups to train, such as [encoder.latent_head, decoder]; null trains everything.
            dc-ssdae info PRESET --groups lists the names; encoder.stages.-1 is the last stage, and losses.NAME the
            parameters of a loss term, ignored if its weight is 0. Everything else stays unchanged to the bit,
            batch statistics included.
        checkpoint_every: number of steps between checkpoints.
        keep_every: number of steps between checkpoints that are kept for good, a multiple of checkpoint_every; null
            keeps only the last and the best.
        evaluate_every: number of steps between evaluations of the averaged weights on validation images.
        best_metric: metric that decides which checkpoint is best.
        sample_images: number of validation images whose reconstructions are logged at each evaluation.
        latent_noise: strength τ of the noise that training adds to the latents, in the latent's own units: standard
            normal noise times σ, which is uniform between 0 and τ for each image. It makes the decoder tolerant of the
            latents that a diffusion model samples; 0 adds none.
        latent_statistics: largest number of training images on which the mean and standard deviation of the latent are
            measured at the end, for the model's config.json; 0 measures nothing. If the encoder does not train, its
            known statistics are kept.
        max_skipped_steps: number of consecutive non-finite steps after which the run stops.
        processes: number of processes that the run must have; null accepts any.
        preset: preset that this configuration started from, for the model card; --config PRESET fills it in.
        wandb: also log to Weights & Biases, which must be installed.
        wandb_project: name of the Weights & Biases project.
    """

    steps: int | None = setting(300_000, at_least=1, may_change=True)
    minutes: float | None = setting(None, above=0.0, may_change=True)
    batch_size: int = setting(192, at_least=1)
    accumulation_steps: int = setting(1, at_least=1, may_change=True)
    optimizer: Literal["schedule_free_radam", "adamw"] = "schedule_free_radam"
    lr: float = setting(3e-4, above=0.0)
    betas: tuple[float, float] = setting((0.9, 0.999), above=0.0, below=1.0)
    weight_decay: float = setting(1e-3, at_least=0.0)
    warmup: float = setting(0.05, at_least=0.0, below=1.0)
    gradient_clip: float | None = setting(0.1, above=0.0)
    ema_decay: float = setting(0.999, at_least=0.0, below=1.0)
    ema_start: int = setting(50_000, at_least=0)
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    compile: bool = setting(False, may_change=True)
    channels_last: bool | None = None
    gradient_checkpointing: bool = setting(False, may_change=True)
    seed: int = setting(0, at_least=0, at_most=LARGEST_SEED)
    output: str | None = None
    init_from: str | None = None
    train: list[str] | None = None
    checkpoint_every: int = setting(1000, at_least=1, may_change=True)
    keep_every: int | None = setting(None, at_least=1, may_change=True)
    evaluate_every: int = setting(5000, at_least=1, may_change=True)
    best_metric: Literal["psnr", "ssim", "mse"] = "psnr"
    sample_images: int = setting(8, at_least=0, may_change=True)
    latent_noise: float = setting(0.0, at_least=0.0)
    latent_statistics: int = setting(10_000, at_least=0, may_change=True)
    max_skipped_steps: int = setting(10, at_least=1, may_change=True)
    processes: int | None = setting(None, at_least=1, may_change=True)
    preset: str | None = setting(None, may_change=True)
    wandb: bool = setting(False, may_change=True)
    wandb_project: str = setting("dc-ssdae", may_change=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", PRECISION_ALIASES.get(str(self.precision), self.precision))
        check_settings(self, "training.")
        if self.steps is None and self.minutes is None:
            raise InputError("training.steps and training.minutes are null; one must end the run", "training.steps")
        for name, unit in (("batch_size", "accumulation_steps"), ("keep_every", "checkpoint_every")):
            value, part = getattr(self, name), getattr(self, unit)
            if value is not None and value % part:
                raise wrong_value(f"training.{name}", value, f"a multiple of training.{unit}, {part}")

    def check_processes(self, processes: int) -> None:
        """Refuse a batch that so many processes cannot share evenly.

        Raises:
            InputError: says what would be right.
        """
        parts = processes * self.accumulation_steps
        if self.batch_size % parts:
            wanted = f"for {processes} processes and training.accumulation_steps a multiple of {parts}"
            raise wrong_value("training.batch_size", self.batch_size, wanted)

    def progress(self, steps: float, seconds: float) -> float:
        """The share of the budget that is spent: of the steps or of the time, whichever is nearer its end."""
        shares = [steps / self.steps] if self.steps is not None else []
        shares += [seconds / (60.0 * self.minutes)] if self.minutes is not None else []
        return max(shares)

    def learning_rate(self, progress: float) -> float:
        """The rate at a share `progress` in [0, 1] of the budget: adamw warms up and decays by a cosine."""
        if self.optimizer != "adamw":
            return self.lr
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        decayed = (progress - self.warmup) / (1.0 - self.warmup)
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * min(decayed, 1.0)))


@dataclass(frozen=True)
class LossConfig:
    """One term of the objective.

    Args:
        weight: factor of the term; 0 removes it.
        class_path: module.Class of your own term; null for a built-in one.
        init_args: its settings.
    """

    weight: float = setting(1.0, at_least=0.0)
    class_path: str | None = None
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DistillationConfig:
    """Training to decode in one step what a teacher decodes in several; dc-ssdae distill fills this section in.

    Args:
        teacher: model or run to learn from, with the same architecture; the new run keeps a copy of it.
        steps: number of steps of the teacher, K.
        step_size: step size of the teacher's descent, as in DCSSDAE.decode; null is the default of decoding.
        cache_steps: repeat the crops and noise of this many first steps, and keep the teacher's results for them
            on disk; null draws new ones at every step and keeps nothing.
    """

    teacher: str
    steps: int = setting(8, at_least=1)
    step_size: float | None = setting(None, above=0.0)
    cache_steps: int | None = setting(None, at_least=1)

    def __post_init__(self) -> None:
        check_settings(self, "distillation.")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run.

    Args:
        model: which autoencoder.
        data: which images.
        training: the loop.
        losses: loss terms by name, each a weight, or a mapping with weight, class_path and init_args.
        distillation: teacher to learn from; None learns from the images.
    """

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    losses: dict[str, LossConfig] = field(default_factory=dict)
    distillation: DistillationConfig | None = None

    def __post_init__(self) -> None:
        terms = {**BUILT_IN_LOSSES, **self.losses}
        object.__setattr__(self, "losses", {name: _loss(name, given) for name, given in terms.items()})
        if not any(loss.weight for loss in self.losses.values()):
            raise InputError("losses: every weight is 0, there is nothing to train", "losses")
        size, factor = self.data.image_size, self.model.downsample_factor
        # The latent's batch norm needs two values per channel.
        if size == factor and self.training.batch_size // self.training.accumulation_steps < 2:
            raise wrong_value("data.image_size", size, f"above model.downsample_factor, {factor}, for single images")
        if size % factor:
            raise wrong_value("data.image_size", size, f"a multiple of model.downsample_factor, {factor}")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "RunConfig":
        """Build from plain data, as YAML gives it.

        Args:
            settings: sections model, data, training, losses and distillation; `description` is passed over.

        Raises:
            InputError: a section or setting is unknown, of the wrong type or out of range; one line that names it.
        """
        check_names("section of the configuration", settings, (*SECTIONS, "losses", "description"), "")
        for name in (*SECTIONS, "losses"):
            if not isinstance(settings.get(name), Mapping | None):
                raise InputError(f"section {name} is {shown(settings[name])}; it must be a mapping of settings", name)
        if settings.get("model") is None:
            raise InputError("the configuration has no section model; start from a preset: --config PRESET", "model")
        built: dict[str, Any] = {}
        for name, kind in SECTIONS.items():
            if (section := settings.get(name)) is not None:
                check_names(f"setting of {name}", section, [entry.name for entry in fields(kind)], f"{name}.")
                for entry in fields(kind):
                    if is_required(entry) and section.get(entry.name) is None:
                        raise InputError(f"{name}.{entry.name} is not given", f"{name}.{entry.name}")
                built[name] = kind(**section)
        return cls(**built, losses=settings.get("losses") or {})

    def to_mapping(self) -> dict[str, Any]:
        """Plain data that `from_mapping` takes back, every default spelt out."""
        plain = asdict(self)
        plain["training"]["betas"] = list(self.training.betas)
        if self.distillation is None:
            del plain["distillation"]
        return plain

    def fixed_settings(self, with_paths: bool = False) -> dict[str, Any]:
        """The settings that a run keeps when it goes on, by their dotted names.

        Args:
            with_paths: also those that name folders. They may have been moved, but no flag may change them.
        """
        return {
            f"{section}.{name}": value
            for section, settings in self.to_mapping().items()
            for name, value in settings.items()
            if name not in MAY_CHANGE.get(section, ()) and (with_paths or name not in PATHS)
        }

    def with_training(self, **settings: Any) -> "RunConfig":
        """The same with some settings of section training changed."""
        return replace(self, training=replace(self.training, **settings))


SECTIONS: Mapping[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "distillation": DistillationConfig,
}
"""The sections whose settings are fixed; section losses is free in its names."""

MAY_CHANGE: Mapping[str, tuple[str, ...]] = {
    section: tuple(entry.name for entry in fields(kind) if entry.metadata.get("may_change"))
    for section, kind in SECTIONS.items()
}
"""What may be set anew when a run goes on. The rest would make it another run."""

PATHS = ("output", "init_from", "teacher")
"""Settings that name the folder of a run or of a model."""


def check_changes(before: Mapping[str, Any], after: Mapping[str, Any], path: Path, advice: str | None = None) -> None:
    """Refuse changed settings that would make it another run.

    Args:
        before: settings of the run by their dotted names, as `RunConfig.fixed_settings` gives them. A setting that one
            side alone has is another version's, and passed over; a loss term is not.
        after: the settings with which it is to go on.
        path: of the run's folder.
        advice: what to do instead; None names training.init_from.

    Raises:
        InputError: names the first setting that differs.
    """
    for name in {**before, **after}:
        old, new, is_term = before.get(name), after.get(name), name.startswith("losses.")
        is_new_term = is_term and name not in before and after[name]["weight"]
        if is_new_term or (old != new and name in before and (is_term or name in after)):
            advice = advice or f"a new run can start from its weights: --training.init_from {path}"
            raise InputError(f"{name} is {shown(old)} in {path} and cannot become {shown(new)}; {advice}")


def lay_over(below: Mapping[str, Any], above: Mapping[str, Any], drops: bool = True, path: str = "") -> dict[str, Any]:
    """Merge two mappings, the one above winning; where `drops`, another class_path drops the init_args below it.

    A number among the losses is the weight of a term, whose other settings stay as they are below.
    """
    merged = dict(below)
    if drops and "class_path" in above:
        default = DEFAULT_CLASSES.get(path.rpartition(".")[2])
        if (above["class_path"] or default) != (below.get("class_path") or default):
            merged.pop("init_args", None)
    for key, value in above.items():
        under = merged.get(key)
        if path.endswith(".losses") and "init_args" not in path:
            under, value = ({"weight": term} if type(term) in (int, float) else term for term in (under, value))
        if isinstance(value, Mapping) and isinstance(under, Mapping):
            value = lay_over(under, value, drops, f"{path}.{key}")
        merged[key] = value
    return merged


def _loss(name: Any, given: Any) -> LossConfig:
    """Make a term of a weight, of a mapping, or of a `LossConfig`, which is checked all the same."""
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"a loss term is called {shown(name)}; use letters, digits and underscores", "losses")
    path = f"losses.{name}"
    settings = {"weight": given} if isinstance(given, int | float) else given
    settings = asdict(given) if isinstance(given, LossConfig) else settings
    if not isinstance(settings, Mapping):
        raise wrong_value(path, given, "a weight, or a mapping with weight, class_path and init_args")
    component = check_component(path, settings, others=("weight",)) or {}
    if "class_path" not in component and name not in BUILT_IN_LOSSES:
        raise unknown_name("loss term without a class_path", name, BUILT_IN_LOSSES, path)
    loss = LossConfig(**{"weight": BUILT_IN_LOSSES.get(name, 1.0), **component})
    check_settings(loss, f"{path}.")
    return loss


def check_component(
    path: str, given: Mapping[str, Any] | None, needs_class: bool = False, others: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Check the form of {class_path, init_args}; whether there is such a class is asked where it is needed.

    Args:
        path: name of the setting, such as model.encoder.
        given: the mapping; None leaves everything to defaults.
        needs_class: whether class_path must be given.
        others: further keys that the mapping may have.

    Returns:
        The same without what is null; None where nothing remains.

    Raises:
        InputError: it has another form.
    """
    component = {key: value for key, value in (given or {}).items() if value is not None}
    check_names(f"key of {path}", component, ("class_path", "init_args", *others), f"{path}.")
    name, settings = component.get("class_path"), component.get("init_args", {})
    if name is None and needs_class:
        raise InputError(f"{path} has no class_path; name the class as module.Class", path)
    if name is not None and not (isinstance(name, str) and all(part.isidentifier() for part in name.split("."))):
        raise wrong_value(f"{path}.class_path", name, "a class name, your own as module.Class")
    if not (isinstance(settings, Mapping) and all(isinstance(key, str) for key in settings)):
        raise wrong_value(f"{path}.init_args", settings, "a mapping from the settings' names")
    return component or None
