"""Settings of a probe. Reading and checking them needs no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from dc_ssdae.errors import InputError, check_names
from dc_ssdae.settings import check_settings, setting
from dc_ssdae.training.config import TrainingConfig

Levels = Literal["uniform", "logit_normal"]
Size = Literal["nano", "tiny", "S", "B"]

DYNAMICS: Mapping[str, Mapping[str, Any]] = {
    "flow_matching": {"class_path": "FlowMatching"},
    "equilibrium_matching": {
        "class_path": "EquilibriumMatching",
        "init_args": {"decay": "truncated", "gradient_scale": 4.0},
    },
}
"""By name; equilibrium matching with the decay and λ of its authors (Wang & Du 2025)."""

LEARNING_RATES: Mapping[str, float] = {"nano": 2e-3, "tiny": 2e-3, "S": 1e-4, "B": 1e-4}
"""Of AdamW by the network's size: for short runs of the small ones; S and B have that of Peebles & Xie 2023."""

EMA_DECAYS: Mapping[str, float] = {"nano": 0.99, "tiny": 0.99, "S": 0.999, "B": 0.999}
"""Of the averaged weights by the network's size."""

MOST_TOKENS = 1024
"""Above so many tokens per latent the patch grows, where none is asked for."""


@dataclass(frozen=True)
class LatentsConfig:
    """Which latents to train on.

    Args:
        train: folder of latents, as dc-ssdae latents writes it.
        validation: folder of the latents that the loss is measured on; null holds out every tenth one of `train`, at
            most 1,000.
        workers: number of processes that read latents; null chooses it by the number of cores.
    """

    train: str = setting(may_change=True)
    validation: str | None = setting(None, may_change=True)
    workers: int | None = setting(None, at_least=0, may_change=True)

    def __post_init__(self) -> None:
        check_settings(self, "data.")


@dataclass(frozen=True)
class NetworkConfig:
    """Which diffusion transformer to train (Peebles & Xie 2023, "Scalable diffusion models with transformers").

    Args:
        size: nano (4 blocks of 128 channels), tiny (6 of 192), S (12 of 384) or B (12 of 768).
        patch: each square of patch × patch latent positions is one token; null, before the latents are known, will be
            as much as makes at most `MOST_TOKENS`.
        class_dropout: fraction of the training latents that are shown without their class, which classifier-free
            guidance needs.
        levels: how training draws the share of noise: uniform; or logit_normal, the sigmoid of a standard normal.
        dynamics: class_path (FlowMatching or EquilibriumMatching) and init_args.
    """

    size: Size = "nano"
    patch: int | None = setting(None, at_least=1)
    class_dropout: float = setting(0.1, at_least=0.0, below=1.0)
    levels: Levels = "uniform"
    dynamics: dict[str, Any] = field(default_factory=lambda: dict(DYNAMICS["flow_matching"]))

    def __post_init__(self) -> None:
        check_settings(self, "network.")


def probe_training(size: str = "nano", **settings: Any) -> TrainingConfig:
    """How a probe trains where nothing else is said: for ten minutes, with AdamW, a cosine decay and an average."""
    defaults: dict[str, Any] = {
        "steps": None,
        "minutes": 10.0 if settings.get("steps") is None else None,
        "batch_size": 32,
        "optimizer": "adamw",
        "lr": LEARNING_RATES[size],
        "weight_decay": 0.0,
        "gradient_clip": 1.0,
        "ema_decay": EMA_DECAYS[size],
        "ema_start": 0,
        "precision": "float32",
        "checkpoint_every": 500,
        "evaluate_every": 500,
        "sample_images": 0,
        "latent_statistics": 0,
    }
    return TrainingConfig(**defaults | settings)


@dataclass(frozen=True)
class ProbeConfig:
    """Everything that decides a probe's training.

    Args:
        data: which latents.
        network: which diffusion transformer.
        training: the loop, as of an autoencoder.
    """

    data: LatentsConfig
    network: NetworkConfig = field(default_factory=NetworkConfig)
    training: TrainingConfig = field(default_factory=probe_training)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "ProbeConfig":
        """Build from plain data, as `to_mapping` gives it.

        Raises:
            InputError: a section or setting is unknown or wrong; one line that names it.
        """
        check_names("section of the configuration", settings, SECTIONS, "")
        if settings.get("data") is None:
            raise InputError("the configuration has no section data", "data")
        for name, section in settings.items():
            check_names(f"setting of {name}", section or {}, [entry.name for entry in fields(SECTIONS[name])])
        return cls(**{name: SECTIONS[name](**section) for name, section in settings.items() if section})

    def to_mapping(self) -> dict[str, Any]:
        """Plain data that `from_mapping` takes back, every default spelt out."""
        plain = asdict(self)
        plain["training"]["betas"] = list(self.training.betas)
        return plain

    def fixed_settings(self) -> dict[str, Any]:
        """The settings that a run keeps when it goes on, by their dotted names."""
        return {
            f"{section}.{entry.name}": self.to_mapping()[section][entry.name]
            for section, kind in SECTIONS.items()
            for entry in fields(kind)
            if not entry.metadata.get("may_change") and entry.name not in ("output", "init_from")
        }


SECTIONS: Mapping[str, type] = {"data": LatentsConfig, "network": NetworkConfig, "training": TrainingConfig}
"""The sections of a configuration."""
