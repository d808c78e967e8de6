"""DCSSDAE: joins an encoder, a decoder and a dynamics; encode, decode, save, load."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from dc_ssdae.dynamics import Dynamics, EquilibriumMatching, FlowMatching
from dc_ssdae.errors import InputError, check_at_least, check_type, unknown_name
from dc_ssdae.latent import DiagonalGaussian, draw_noise
from dc_ssdae.networks import DCEncoder, KLEncoder, UViTDecoder
from dc_ssdae.presets import load_preset
from dc_ssdae.samplers import euler, gradient_descent
from dc_ssdae.samplers.result import check_num_steps
from dc_ssdae.weights import check_tensors, shard_files

COMPONENTS: Mapping[str, Mapping[str, type]] = {
    "encoder": {"DCEncoder": DCEncoder, "KLEncoder": KLEncoder},
    "decoder": {"UViTDecoder": UViTDecoder},
    "dynamics": {"EquilibriumMatching": EquilibriumMatching, "FlowMatching": FlowMatching},
}
"""The classes that a config may name. A name is looked up here and nowhere else: a config never imports code."""

DEFAULT_CLASSES = {"encoder": "DCEncoder", "decoder": "UViTDecoder", "dynamics": "EquilibriumMatching"}

DEFAULT_NOISE_SEED = 0

WEIGHTS = "diffusion_pytorch_model"
"""Stem of the names that diffusers gives weight files."""

LOADING_ARGUMENTS = (
    "cache_dir",
    "device_map",
    "dtype",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "max_memory",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "torch_dtype",
    "use_safetensors",
    "variant",
)
"""What `from_pretrained` passes on to diffusers, which would drop an unknown argument without a word."""


@dataclass
class EncoderOutput(BaseOutput):
    """What `DCSSDAE.encode` gives: the Gaussian over the latent."""

    latent_dist: DiagonalGaussian


class DCSSDAE(ModelMixin, ConfigMixin):
    """An autoencoder whose decoder is a one-step diffusion model (SPEC section 1).

    Each of `encoder`, `decoder` and `dynamics` is a mapping with `class_path`, one of the names in `COMPONENTS`, and
    `init_args`, the settings of that class. What is left out takes its default; the defaults stand in `config` and
    are saved, so that changing one later does not change a saved model. A setting that is None there follows from
    the `size` or `architecture` beside it.

    Args:
        latent_channels: c; handed to encoder and decoder.
        downsample_factor: f, a power of two from 8 on; handed to encoder and decoder.
        encoder: DCEncoder by default.
        decoder: UViTDecoder by default; conditioned on time where the dynamics asks for it.
        dynamics: EquilibriumMatching by default.

    Raises:
        InputError: a class or setting is unknown or does not fit the others; names it and what would be right.
    """

    _internal_dict: FrozenDict
    _GIVEN: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "encoder": ("latent_channels", "downsample_factor"),
        "decoder": ("latent_channels", "downsample_factor", "time_conditioning"),
        "dynamics": (),
    }

    @register_to_config
    def __init__(
        self,
        latent_channels: int,
        downsample_factor: int,
        encoder: Mapping[str, Any] | None = None,
        decoder: Mapping[str, Any] | None = None,
        dynamics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_type("latent_channels", latent_channels, int)
        check_type("downsample_factor", downsample_factor, int)
        check_at_least(1, latent_channels=latent_channels)
        parts = {"encoder": encoder, "decoder": decoder, "dynamics": dynamics}
        resolved = {part: _resolve(part, given, self._GIVEN[part]) for part, given in parts.items()}
        # diffusers would drop on reload what it lists as left at its default; the resolved settings are to stay.
        registered = {key: value for key, value in self._internal_dict.items() if key != "_use_default_values"}
        self._internal_dict = FrozenDict({**registered, **resolved})

        shape = {"latent_channels": latent_channels, "downsample_factor": downsample_factor}
        self.dynamics: Dynamics = _build("dynamics", resolved["dynamics"], {})
        self.encoder: nn.Module = _build("encoder", resolved["encoder"], shape)
        self.decoder: UViTDecoder = _build(
            "decoder", resolved["decoder"], {**shape, "time_conditioning": self.dynamics.conditions_on_time}
        )

    def __getattr__(self, name: str) -> Any:
        # diffusers' own version answers with the config's entry of that name, which would hide encoder and decoder.
        return nn.Module.__getattr__(self, name)

    @classmethod
    def from_preset(cls, name: str, **settings: Any) -> "DCSSDAE":
        """Build a preset with fresh random weights, in eval mode.

        Args:
            name: one of `dc_ssdae.presets.list_presets()`.
            settings: what to change: `latent_channels`, `downsample_factor`, or, by part, a mapping of that
                class's settings, for example `encoder={"norm": "none"}`.

        Raises:
            InputError: the preset or a setting is unknown.
        """
        config = dict(load_preset(name)["model"])
        for key, value in settings.items():
            if key in COMPONENTS:
                if not isinstance(value, Mapping):
                    raise InputError(f"{key} is {value!r}; it must be a mapping of that part's settings")
                part = dict(config.get(key) or {})
                config[key] = {**part, "init_args": {**(part.get("init_args") or {}), **value}}
            else:
                config[key] = value
        _check_names("setting of DCSSDAE", config, _config_names())
        return cls(**config).eval()

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[DiagonalGaussian]:
        """Encode images to the Gaussian over their latents.

        Args:
            x: (B, 3, H, W) in [-1, 1], H and W multiples of f; cast to the model's dtype.
            return_dict: give an output with `latent_dist`; False gives a tuple of it.

        Raises:
            InputError: the shape does not fit, or the images are no floating-point numbers.
        """
        if not x.is_floating_point():
            raise InputError(f"images are floating-point numbers in [-1, 1], not {x.dtype}; scale them first")
        posterior = self.encoder(x.to(self.dtype))
        return EncoderOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_steps: int = 1,
        step_size: float | None = None,
        noise: Tensor | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents to images, in one step or several.

        One step is the dynamics' clean estimate from pure noise. More steps of equilibrium matching go on from there
        and descend the field; flow matching integrates the velocity by Euler's method.

        Args:
            z: (B, c, h, w), cast to the model's dtype.
            return_dict: give an output with `sample`; False gives a tuple of it.
            generator: where the noise comes from: one generator, from which the images draw in order, or one per
                image. By default every image draws the same noise, of one fixed seed, so that a decode is
                reproducible and does not depend on the batch (but for float rounding).
            num_steps: evaluations of the decoder, at least 1.
            step_size: η, for several steps of equilibrium matching: descend with it from the noise on. By default
                the first step is the clean estimate and the others have 1/L, L the field's slope near the data.
            noise: (B, 3, h·f, w·f) to start from, in place of `generator`.

        Returns:
            Images (B, 3, h·f, w·f) in the model's dtype, about [-1, 1], not clamped.

        Raises:
            InputError: a shape or a setting does not fit.
        """
        check_num_steps(num_steps)
        z = z.to(self.dtype)
        start = self._start_noise(z, generator, noise)
        dynamics = self.dynamics
        descends = num_steps > 1 and isinstance(dynamics, EquilibriumMatching)
        if step_size is not None:
            if not descends:
                raise InputError("step_size is for several steps of equilibrium matching; leave it out here")
            sample = gradient_descent(lambda x: self._predict(x, z), start, num_steps, step_size).sample
        elif num_steps > 1 and not descends:
            sample = euler(lambda x, time: self._predict(x, z, time), start, num_steps).sample
        else:
            level = torch.full((z.shape[0],), dynamics.noise_level, device=z.device)
            time = level if dynamics.conditions_on_time else None
            sample = dynamics.clean_estimate(start, self._predict(start, z, time), level)
            if isinstance(dynamics, EquilibriumMatching) and num_steps > 1:
                eta = 1.0 / dynamics.stiffness
                sample = gradient_descent(lambda x: self._predict(x, z), sample, num_steps - 1, eta).sample
        sample = sample.to(self.dtype)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, x: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Reconstruct images: decode, in one step, the mode of their encoding."""
        (posterior,) = self.encode(x, return_dict=False)
        return self.decode(posterior.mode(), return_dict=return_dict)

    def _predict(self, x: Tensor, z: Tensor, time: Tensor | None = None) -> Tensor:
        # The iterate stays in float32: in half precision the noise to be cancelled would lose the image's low bits.
        return self.decoder(x.to(z.dtype), z, time).float()

    def _start_noise(
        self,
        z: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        noise: Tensor | None,
    ) -> Tensor:
        factor = self.config.downsample_factor
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels or 0 in z.shape:
            raise InputError(f"a latent batch has shape (B, {self.config.latent_channels}, h, w), not {tuple(z.shape)}")
        shape = (z.shape[0], 3, z.shape[2] * factor, z.shape[3] * factor)
        if noise is not None:
            if generator is not None:
                raise InputError("give noise or generator, not both")
            if tuple(noise.shape) != shape:
                raise InputError(f"noise has shape {tuple(noise.shape)}; this latent needs {shape}")
            return noise.to(device=z.device, dtype=torch.float32)
        if generator is None:
            fixed = torch.Generator().manual_seed(DEFAULT_NOISE_SEED)
            return draw_noise((1, *shape[1:]), fixed, z.device).expand(shape)
        return draw_noise(shape, generator, z.device)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save config.json and the weights as safetensors, as diffusers does, readable for whom config.json is.

        Args:
            save_directory: a folder, made if need be.
            kwargs: diffusers' saving arguments, such as `variant` and `max_shard_size`.
        """
        variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
        # diffusers takes an earlier save's shards away and leaves their index, which would be read in their place.
        Path(save_directory, f"{WEIGHTS}.safetensors.index{variant}.json").unlink(missing_ok=True)
        super().save_pretrained(save_directory, **kwargs)
        # safetensors writes files that only their owner may read, whatever the umask: useless to a team's folder.
        mode = Path(save_directory, "config.json").stat().st_mode
        for file in Path(save_directory).glob(f"{WEIGHTS}*.safetensors"):
            file.chmod(mode)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "DCSSDAE":
        """Load a saved model, in eval mode; strict where diffusers is lenient.

        Args:
            pretrained_model_name_or_path: a folder written by `save_pretrained`, or a hub id.
            kwargs: diffusers' loading arguments, such as `torch_dtype`, `subfolder`, `revision`, `variant`.

        Raises:
            InputError: an unknown argument; a config that is not this class's or has an unknown setting; a tensor
                that is missing, left over, truncated, or of another shape. The message names it.
        """
        _check_names("argument of from_pretrained", kwargs, LOADING_ARGUMENTS)
        if kwargs.get("use_safetensors") is False:
            raise InputError("use_safetensors=False would unpickle; convert the weights to safetensors")
        name = str(pretrained_model_name_or_path)
        if name and Path(name).is_dir():
            cls._check_folder(Path(name, kwargs.get("subfolder") or ""), kwargs.get("variant"))
        elif not _may_be_on_the_hub(name):
            raise InputError(f"{name!r}: no such folder, nor the id of a model on the hub")
        model, info = super().from_pretrained(
            str(pretrained_model_name_or_path),
            **{**kwargs, "use_safetensors": True, "output_loading_info": True},
        )
        problems = [f"{kind.replace('_', ' ')}: {items}" for kind, items in info.items() if items]
        if problems:
            raise InputError(f"{name} does not fit its config.json; {'; '.join(problems)}")
        return model

    @classmethod
    def _check_folder(cls, folder: Path, variant: str | None) -> None:
        """Check config and weights by their headers, before diffusers loads what it can and warns of the rest."""
        config = read_config(folder)
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in cls.from_config(config).state_dict().items()}
        suffix = f".{variant}" if variant else ""
        index = folder / f"{WEIGHTS}.safetensors.index{suffix}.json"
        if index.is_file():
            check_tensors(shard_files(index), expected)
        else:
            check_tensors([folder / f"{WEIGHTS}{suffix}.safetensors"], expected)

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Refuse what diffusers would drop with a warning: another class's config, or an unknown setting."""
        class_name = config_dict.get("_class_name", "DCSSDAE")
        if class_name != "DCSSDAE":
            raise InputError(f"config.json is of a {class_name!r}, not of a 'DCSSDAE'")
        settings = [name for name in config_dict if not name.startswith("_")]
        _check_names("setting in config.json", settings, _config_names())
        _check_names("setting of DCSSDAE", kwargs, _config_names())
        for name in ("latent_channels", "downsample_factor"):
            if name not in config_dict and name not in kwargs:
                raise InputError(f"config.json lacks {name}")
        return super().extract_init_dict(config_dict, **kwargs)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model folder's config.json.

    Raises:
        InputError: it is missing or no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no model: config.json is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object")
    return config


def _resolve(part: str, given: Mapping[str, Any] | None, handed_over: Sequence[str]) -> dict[str, Any]:
    """Fill a part's settings up with its class's defaults."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise InputError(f"{part} is {given!r}; it must be a mapping with class_path and init_args")
    _check_names(f"key of {part}", given, ("class_path", "init_args"))
    class_name = given.get("class_path", DEFAULT_CLASSES[part])
    if not isinstance(class_name, str) or class_name not in COMPONENTS[part]:
        raise unknown_name(f"class of {part}", class_name, COMPONENTS[part])
    settings = {} if given.get("init_args") is None else given["init_args"]
    if not isinstance(settings, Mapping):
        raise InputError(f"init_args of {part} is {settings!r}; it must be a mapping")
    signature = inspect.signature(COMPONENTS[part][class_name])
    defaults = {name: p.default for name, p in signature.parameters.items() if name not in handed_over}
    for name in settings:
        if name in handed_over:
            raise InputError(f"{name} is not a setting of {part}: it follows from the model's other settings")
    _check_names(f"setting of {class_name}", settings, defaults)
    hints = get_type_hints(COMPONENTS[part][class_name].__init__)  # type: ignore[misc]
    for name, value in settings.items():
        check_type(f"{name} of {class_name}", value, hints[name])
    return {"class_path": class_name, "init_args": {**defaults, **settings}}


def _build(part: str, resolved: Mapping[str, Any], handed_over: Mapping[str, Any]) -> Any:
    component = COMPONENTS[part][resolved["class_path"]]
    try:
        return component(**resolved["init_args"], **handed_over)
    except TypeError as error:
        raise InputError(f"{resolved['class_path']}: a setting is of the wrong type: {error}") from error


def _config_names() -> list[str]:
    return [name for name in inspect.signature(DCSSDAE.__init__).parameters if name != "self"]


def _check_names(kind: str, given: Any, accepted: Any) -> None:
    for name in given:
        if name not in accepted:
            raise unknown_name(kind, name, accepted)


def _may_be_on_the_hub(name: str) -> bool:
    """Tell a hub id, OWNER/MODEL, from a misspelt path, which should not wait for the network."""
    owner, slash, model = name.partition("/")
    is_id = bool(slash and model) and "/" not in model and owner not in ("", ".", "..", "~")
    return is_id and not Path(owner).exists() and not Path(name).exists()
