"""Settings of a run: sections model, data, training, losses, distillation. Reading and checking them needs no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from dc_ssdae.errors import InputError
from dc_ssdae.training.config_checks import (
    check_range,
    checked_component,
    fitted,
    mistake,
    plain,
    shown,
    unknown,
)

Precision = Literal["float32", "bfloat16", "float16"]
OptimizerName = Literal["schedule_free_radam", "adamw"]
Direction = Literal["max", "min"]

PRECISION_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

BUILT_IN_LOSSES: Mapping[str, float] = {"dynamics": 1.0, "lpips": 0.5, "repa": 0.25, "kl": 1e-6}
"""Terms that need no class_path, and their default weights (SPEC section 2, "Total loss")."""

LARGEST_SEED = 2**32 - 1
"""PyTorch's CPU generator reads no more than 32 bits of a seed."""

LARGEST_SIZE = 2**16
"""Of an image's side and of the latent's channels: what is larger is a slip of the finger."""

METRICS: Mapping[str, Direction] = {"psnr": "max", "ssim": "max", "mse": "min"}
"""What an evaluation measures, and which way is better."""


MAY_CHANGE: Mapping[str, tuple[str, ...]] = {
    "training": (
        "steps",
        "minutes",
        "accumulation_steps",
        "compile",
        "gradient_checkpointing",
        "checkpoint_every",
        "keep_every",
        "evaluate_every",
        "sample_images",
        "latent_statistics",
        "max_skipped_steps",
        "processes",
        "preset",
        "wandb",
        "wandb_project",
    ),
    "data": ("root", "cache", "workers", "max_broken_share", "validation_images"),
}
"""What a run may be told anew when it goes on. The rest would make it another run."""


def keeps_latent(train: Sequence[str] | None) -> bool:
    """Whether groups that train, as `TrainingConfig.train` names them, leave the encoder out."""
    return train is not None and all(name.partition(".")[0] != "encoder" for name in train)


@dataclass(frozen=True)
class ModelConfig:
    """Which autoencoder. A class is named by class_path, its settings by init_args.

    Args:
        latent_channels: c, channels of the latent.
        downsample_factor: f, a power of two from 8 on.
        encoder: class_path (DCEncoder, KLEncoder, or your own as module.Class) and init_args.
        decoder: class_path (UViTDecoder, or your own) and init_args.
        dynamics: class_path (EquilibriumMatching, FlowMatching, or your own) and init_args.
    """

    latent_channels: int
    downsample_factor: int
    encoder: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None
    dynamics: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _fit_fields("model", self)
        _check_range("model", self, "latent_channels", at_least=1, at_most=LARGEST_SIZE)
        factor = self.downsample_factor
        if factor < 8 or factor & (factor - 1):
            raise InputError(f"model.downsample_factor is {factor}; it must be a power of two from 8 on")
        for name in ("encoder", "decoder", "dynamics"):
            component = checked_component(f"model.{name}", getattr(self, name), needs_class=False)
            object.__setattr__(self, name, component)


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are cut.

    Args:
        root: a folder of images or of tar shards, or a pattern of shards such as
            https://host/train-{000..127}.tar. It may hold train/ and validation/ (or val/).
        dataset: in place of root, a data set by class_path (ImageFolder, Shards, HubDataset, or your own
            as module.Class) and init_args.
        validation: where the validation images are, if not in root: a folder or pattern, or class_path and init_args.
        validation_images: how many of them an evaluation uses, at most.
        image_size: side of the training crops in pixels, a multiple of the model's f.
        aug_scale: largest random enlargement; the shorter side becomes image_size times a number from 1 to this,
            and the crop is cut from that.
        flip: mirror half of the crops left to right.
        workers: processes that read images, for each training process; null chooses by the number of cores.
        max_broken_share: the run ends when more than this share of the data set turns out unreadable.
        cache: folder for shards that come from a URL; null is ~/.cache/dc_ssdae/shards.
    """

    root: str | None = None
    dataset: dict[str, Any] | None = None
    validation: str | dict[str, Any] | None = None
    validation_images: int = 1000
    image_size: int = 256
    aug_scale: float = 2.0
    flip: bool = True
    workers: int | None = None
    max_broken_share: float = 0.1
    cache: str | None = None

    def __post_init__(self) -> None:
        _fit_fields("data", self)
        _check_filled("data", self, "root", "validation", "cache")
        if self.root is not None and self.dataset is not None:
            raise InputError("data.root and data.dataset are both given; one of them names the images, set one to null")
        object.__setattr__(self, "dataset", checked_component("data.dataset", self.dataset, needs_class=True))
        if isinstance(self.validation, Mapping):
            component = checked_component("data.validation", self.validation, needs_class=True)
            object.__setattr__(self, "validation", component)
        _check_range("data", self, "validation_images", at_least=1)
        _check_range("data", self, "image_size", at_least=8, at_most=LARGEST_SIZE)
        _check_range("data", self, "aug_scale", at_least=1.0)
        _check_range("data", self, "workers", at_least=0)
        _check_range("data", self, "max_broken_share", at_least=0.0, at_most=1.0)


@dataclass(frozen=True)
class TrainingConfig:
    """The loop.

    Args:
        steps: optimiser steps; null where minutes alone decide.
        minutes: end after this much training time; null for no limit. The budget that ends first counts, and a run
            that the clock ends cannot be repeated bit by bit.
        batch_size: images a step, over all processes and accumulation_steps.
        accumulation_steps: parts into which each process cuts its share of the batch, to save memory.
        optimizer: schedule_free_radam (no schedule), or adamw with warm-up and a cosine to 0.
        lr: learning rate; adamw's peak.
        betas: decay rates of the gradient's first and second moment.
        weight_decay: of the optimiser.
        warmup: share of the budget in which adamw's learning rate rises.
        gradient_clip: largest norm of the whole gradient; null does not clip.
        ema_decay: of the averaged weights, per step.
        ema_start: step from which on the weights are averaged; before it the average is a copy.
        precision: float32, or autocast of the networks to bfloat16 or float16; weights and losses stay float32.
        compile: compile encoder and decoder with torch.compile.
        channels_last: keep images and convolutions in channels-last memory order. null does so on a GPU alone: on a
            CPU the gradients of convolutions take up to four times as long in it.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        seed: of weights, data order, crops, levels and noise.
        output: the run's folder, which must not exist yet; null is runs/NAME of the configuration.
        init_from: a model or run whose weights to start from; of a run, also what its loss terms have learnt.
        train: names of the parameter groups that train, such as [encoder.latent_head, decoder]; encoder.stages.-1 is
            the last stage, losses.NAME what a loss term has learnt. The others keep every bit, batch statistics
            included. null trains everything; dc-ssdae info PRESET --groups lists the names. losses.NAME of a term
            that is left out by its weight 0 is passed over.
        checkpoint_every: steps between checkpoints.
        keep_every: steps between checkpoints that are kept for good, a multiple of checkpoint_every; null keeps
            only the last and the best.
        evaluate_every: steps between evaluations on validation images, with the averaged weights.
        best_metric: what makes a checkpoint the best, psnr, ssim or mse; NAME:max or NAME:min gives the direction.
        sample_images: validation images whose reconstructions are logged at an evaluation.
        latent_statistics: training images, at most, over which the latent's mean and standard deviation are measured
            at the end, for the model's config; 0 measures nothing. Those of an encoder that does not train stay
            as they are known.
        max_skipped_steps: the run stops after this many non-finite steps in a row.
        processes: how many processes the run must have; null takes what the launcher started.
        preset: which preset this configuration began as, for the model's card; --config PRESET fills it in.
        wandb: also log to Weights & Biases, which must be installed.
        wandb_project: the project there.
    """

    steps: int | None = 300_000
    minutes: float | None = None
    batch_size: int = 192
    accumulation_steps: int = 1
    optimizer: OptimizerName = "schedule_free_radam"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-3
    warmup: float = 0.05
    gradient_clip: float | None = 0.1
    ema_decay: float = 0.999
    ema_start: int = 50_000
    precision: Precision = "bfloat16"
    compile: bool = False
    channels_last: bool | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    output: str | None = None
    init_from: str | None = None
    train: list[str] | None = None
    checkpoint_every: int = 1000
    keep_every: int | None = None
    evaluate_every: int = 5000
    best_metric: str = "psnr"
    sample_images: int = 8
    latent_statistics: int = 10_000
    max_skipped_steps: int = 10
    processes: int | None = None
    preset: str | None = None
    wandb: bool = False
    wandb_project: str = "dc-ssdae"

    def __post_init__(self) -> None:
        if isinstance(self.precision, str):
            precision = PRECISION_ALIASES.get(self.precision, self.precision)
            if precision not in get_args(Precision):
                raise unknown("training.precision", precision, (*get_args(Precision), *PRECISION_ALIASES))
            object.__setattr__(self, "precision", precision)
        _fit_fields("training", self)
        if self.steps is None and self.minutes is None:
            raise InputError("training.steps and training.minutes are both null; one of them must end the run")
        _check_range("training", self, "steps", "batch_size", "accumulation_steps", "processes", at_least=1)
        _check_range("training", self, "checkpoint_every", "keep_every", "evaluate_every", at_least=1)
        _check_range("training", self, "max_skipped_steps", at_least=1)
        _check_range("training", self, "minutes", "lr", "gradient_clip", above=0.0)
        _check_range("training", self, "weight_decay", at_least=0.0)
        _check_range("training", self, "warmup", "ema_decay", at_least=0.0, below=1.0)
        _check_range("training", self, "ema_start", "sample_images", "latent_statistics", at_least=0)
        _check_range("training", self, "seed", at_least=0, at_most=LARGEST_SEED)
        for beta in self.betas:
            if not 0.0 <= beta < 1.0:
                raise InputError(f"training.betas is {list(self.betas)}; both must be from 0 to below 1")
        if self.optimizer == "schedule_free_radam" and self.betas[0] == 0.0:
            raise InputError("training.betas is [0.0, …]; schedule_free_radam needs a first beta above 0")
        if self.batch_size % self.accumulation_steps:
            raise InputError(
                f"training.batch_size is {self.batch_size}; it must be a multiple of "
                f"training.accumulation_steps, {self.accumulation_steps}"
            )
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise InputError(
                f"training.keep_every is {self.keep_every}; it must be a multiple of "
                f"training.checkpoint_every, {self.checkpoint_every}"
            )
        _check_filled("training", self, "output", "init_from", "preset", "wandb_project")
        if self.train is not None and not self.train:
            raise InputError("training.train is []; name the groups that train, or null for all of them")
        _ = self.best

    @property
    def best(self) -> tuple[str, Direction]:
        """Name and direction of the best metric."""
        name, colon, direction = self.best_metric.partition(":")
        if name not in METRICS:
            raise unknown("training.best_metric", name, METRICS)
        if colon and direction not in ("max", "min"):
            raise unknown(f"direction of training.best_metric {name}", direction, ("max", "min"))
        return name, direction if colon else METRICS[name]  # type: ignore[return-value]

    @property
    def keeps_latent(self) -> bool:
        """Whether no group of the encoder trains, so that the latent and its statistics stay as they are."""
        return keeps_latent(self.train)

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
        weight: factor of the term; 0 leaves it out.
        class_path: module.Class of your own term; null for a built-in one.
        init_args: its settings.
    """

    weight: float = 1.0
    class_path: str | None = None
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DistillationConfig:
    """Learning to land in one step where a teacher lands in several (SPEC section 2, "Distillation").

    Args:
        teacher: the model or run to learn from, of the same model; the run keeps a copy of it.
        steps: the teacher's, K.
        step_size: of the teacher's descent, as of DCSSDAE.decode; null is decode's own default.
        cache_steps: draw crops and noise for this many steps only, again and again, and keep the teacher's results of
            them on disk; null draws anew at every step and keeps nothing.
    """

    teacher: str
    steps: int = 8
    step_size: float | None = None
    cache_steps: int | None = None

    def __post_init__(self) -> None:
        _fit_fields("distillation", self)
        _check_filled("distillation", self, "teacher")
        _check_range("distillation", self, "steps", "cache_steps", at_least=1)
        _check_range("distillation", self, "step_size", above=0.0)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run.

    Args:
        model: which autoencoder.
        data: which images.
        training: the loop.
        losses: terms of the objective by name, each with weight and, where it takes any, class_path and init_args.
        distillation: whom to learn from; None learns from the images.
    """

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    losses: dict[str, LossConfig] = field(default_factory=dict)
    distillation: DistillationConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.losses, Mapping):
            raise mistake(f"section losses is {shown(self.losses)}; it must be a mapping from names to weights")
        terms = {**BUILT_IN_LOSSES, **self.losses}
        object.__setattr__(self, "losses", {name: _loss(name, given) for name, given in terms.items()})
        if not any(loss.weight for loss in self.losses.values()):
            raise InputError("losses: every weight is 0, there is nothing to train")
        size, factor = self.data.image_size, self.model.downsample_factor
        parts = self.training.batch_size // self.training.accumulation_steps
        if size == factor and parts < 2:
            raise InputError(
                f"data.image_size is {size}, which is model.downsample_factor, and one image is trained on at a time: "
                "the batch norm on the latent needs two values a channel; take a larger image_size or batch_size"
            )
        if size % factor:
            raise InputError(f"data.image_size is {size}; it must be a multiple of model.downsample_factor, {factor}")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "RunConfig":
        """Build from plain data, as YAML gives it.

        Args:
            settings: sections model, data, training, losses and distillation; `description` is passed over.

        Raises:
            InputError: a section or setting is unknown, of the wrong type or out of range; one line that names it.
        """
        if not isinstance(settings, Mapping):
            raise mistake(f"a configuration is a mapping of sections, not {shown(settings)}")
        for name in settings:
            if name not in (*SECTIONS, "losses", "description"):
                raise unknown("section of the configuration", name, (*SECTIONS, "losses", "description"))
        if settings.get("model") is None:
            raise InputError("the configuration has no section model; start from a preset with --config PRESET")
        built: dict[str, Any] = {
            name: _build(name, section, settings[name])
            for name, section in SECTIONS.items()
            if settings.get(name) is not None
        }
        losses = settings.get("losses")
        return cls(**built, losses={} if losses is None else losses)

    def to_mapping(self) -> dict[str, Any]:
        """Plain data that `from_mapping` takes back, every default spelt out."""
        plain = asdict(self)
        plain["training"]["betas"] = list(self.training.betas)
        if self.distillation is None:
            del plain["distillation"]
        return plain

    def fixed_settings(self) -> dict[str, Any]:
        """The settings that a run keeps when it goes on, by their dotted names."""
        return {
            f"{section}.{name}": value
            for section, settings in self.to_mapping().items()
            for name, value in settings.items()
            if name not in MAY_CHANGE.get(section, ()) and name not in ("output", "init_from", "teacher")
        }

    def trained_groups(self) -> list[str] | None:
        """What training.train names, without the losses.NAME of terms that are left out by their weight 0."""
        left_out = [f"losses.{name}" for name, loss in self.losses.items() if not loss.weight]
        chosen = self.training.train
        return None if chosen is None else [name for name in chosen if name not in left_out]

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


def _build(section: str, kind: type, settings: Any) -> Any:
    if not isinstance(settings, Mapping):
        raise mistake(f"section {section} is {shown(settings)}; it must be a mapping of settings")
    names = [entry.name for entry in fields(kind)]
    for name in settings:
        if name not in names:
            raise unknown(f"setting of {section}", name, names)
    for entry in fields(kind):
        required = entry.default is MISSING and entry.default_factory is MISSING
        if required and settings.get(entry.name) is None:
            hint = "; start from a preset, or set it" if section == "model" else ""
            raise InputError(f"{section}.{entry.name} is not given{hint}")
    return kind(**settings)


def _loss(name: Any, given: Any) -> LossConfig:
    """Make a term of a weight, of a mapping, or of a `LossConfig`, which is checked all the same."""
    if not isinstance(name, str) or not name.isidentifier():
        raise mistake(f"a loss term is called {shown(name)}; use letters, digits and underscores")
    path = f"losses.{name}"
    settings = asdict(given) if isinstance(given, LossConfig) else given
    if isinstance(given, int | float) and not isinstance(given, bool):
        settings = {"weight": given}
    if not isinstance(settings, Mapping):
        raise mistake(f"{path} is {shown(given)}; it must be a weight, or a mapping with weight, class_path, init_args")
    accepted = [entry.name for entry in fields(LossConfig)]
    for key in settings:
        if key not in accepted:
            raise unknown(f"setting of {path}", key, accepted)
    if settings.get("class_path") is None and name not in BUILT_IN_LOSSES:
        error = unknown("loss term", name, BUILT_IN_LOSSES)
        raise mistake(f"{error}, or one of your own with {path}.class_path as module.Class")
    component = {key: value for key, value in settings.items() if key != "weight"}
    component = checked_component(path, component, needs_class=False) or {}
    weight = fitted(f"{path}.weight", settings.get("weight", BUILT_IN_LOSSES.get(name, 1.0)), float)
    check_range(f"{path}.weight", weight, at_least=0.0)
    init_args = plain(f"{path}.init_args", component.get("init_args", {}))
    return LossConfig(weight, component.get("class_path"), init_args)


def _fit_fields(section: str, config: Any) -> None:
    """Check each field of a section against its type; what only resembles it, as 1 a float, is replaced."""
    hints = get_type_hints(type(config))
    for entry in fields(config):
        value = fitted(f"{section}.{entry.name}", getattr(config, entry.name), hints[entry.name])
        object.__setattr__(config, entry.name, value)


def _check_range(section: str, config: Any, *names: str, **limits: float) -> None:
    for name in names:
        check_range(f"{section}.{name}", getattr(config, name), **limits)


def _check_filled(section: str, config: Any, *names: str) -> None:
    """Refuse text without a word: a script's unset variable would stand for the current folder."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str) and not value.strip():
            raise InputError(f"{section}.{name} is empty; give it a name, or leave it out")
