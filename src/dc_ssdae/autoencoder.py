"""DCSSDAE: joins an encoder, a decoder and a dynamics; encode, decode, save, load."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from dc_ssdae.classes import check_classes
from dc_ssdae.components import COMPONENTS, resolve_part
from dc_ssdae.decoding import (
    DESCENTS,
    INTEGRATORS,
    ONE_STEP,
    DecoderOutput,
    Divergence,
    as_start,
    check_finite,
    plan_decoding,
    starting_noise,
)
from dc_ssdae.dynamics import Dynamics, EquilibriumMatching
from dc_ssdae.dynamics.corruption import field_of, predict
from dc_ssdae.dynamics.energy import as_normal, at_least_float32
from dc_ssdae.errors import InputError, check_names
from dc_ssdae.latent import DiagonalGaussian, Generators
from dc_ssdae.networks import UViTDecoder
from dc_ssdae.networks.blocks import check_image, check_latent_shape
from dc_ssdae.presets import load_preset
from dc_ssdae.pretrained import PretrainedModel
from dc_ssdae.provenance import Provenance
from dc_ssdae.samplers import SamplerResult, Schedule
from dc_ssdae.samplers.descent import mark_varying_batch
from dc_ssdae.samplers.result import check_share, is_finite, root_mean_square
from dc_ssdae.settings import check_value
from dc_ssdae.tiling import DEFAULT_OVERLAP, blend_tiles, check_tiling

__all__ = ["COMPONENTS", "DCSSDAE", "EncoderOutput"]

OF_ENCODERS = ("KLResidualBlock", "SpatialSelfAttention", "ResBlock", "EfficientViTBlock", "SpaceToChannelDownsample")
OF_DECODERS = ("ConditionedResidualBlock", "UpLevel", "TransformerBlock")
"""Blocks whose outputs join their inputs, which must be on one device."""

FAR_OUTSIDE = 2.0
"""What `encode` warns of larger values than; resampling and noise leave [-1, 1] by less."""


@dataclass
class EncoderOutput(BaseOutput):
    """What `DCSSDAE.encode` gives: the Gaussian over the latent.

    diffusers' pipelines ask for it under three names. `latents` and `latent` are its mode, (B, c, h, w).
    """

    latent_dist: DiagonalGaussian

    @property
    def latents(self) -> Tensor:
        """The mode of the Gaussian, as autoencoders without one call their latents."""
        return self.latent_dist.mode()

    latent = latents  # as `AutoencoderDC` calls them


class DCSSDAE(PretrainedModel):
    """An autoencoder whose decoder is a one-step diffusion model.

    Each of `encoder`, `decoder` and `dynamics` is a mapping with `class_path`, one of the names in `COMPONENTS` or
    a class of your own as module.Class, and `init_args`, the settings of that class. What is left out takes its
    default; the defaults stand in `config` and are saved, so that changing one later does not change a saved model.
    A setting that is None there follows from the `size` or `architecture` beside it.

    A class of your own must be imported, or be among `classes`; no name in a config ever imports anything. Its
    constructor takes `latent_channels` and `downsample_factor`, a decoder's also `time_conditioning` (a dynamics'
    none of them), and settings that JSON can hold. An encoder's forward gives a `DiagonalGaussian`; a decoder is
    called with x, z and time; a dynamics has what `dc_ssdae.dynamics.Dynamics` lists.

    `encode` and `decode` speak of latents as they are. What a latent diffusion model is to be trained on is the
    normalised latent, (z - latents_mean) / latents_std channel by channel or, with two numbers for all channels,
    (z - shift_factor) · scaling_factor; undo it before `decode`. Where only scaling_factor is used, as in some of
    diffusers' pipelines, the mean stays. `dc-ssdae stats` measures these settings and writes them into config.json.

    Args:
        latent_channels: c; handed to encoder and decoder.
        downsample_factor: f, a power of two from 8 on; handed to encoder and decoder.
        encoder: DCEncoder by default.
        decoder: UViTDecoder by default; conditioned on time where the dynamics asks for it.
        dynamics: EquilibriumMatching by default.
        classes: classes of your own that `class_path` may name, by module.Class or, if they have moved to another
            module, by their bare name. Not part of the config.
        scaling_factor: one over the standard deviation of all values of the latents; 1.0 where not measured.
        shift_factor: their mean; 0.0 where not measured.
        latents_mean: the mean of each of the c channels; None where not measured.
        latents_std: the standard deviation of each channel, 0.0 for one that never changes.
        provenance: what is known of the model's training and evaluations, as `dc_ssdae.provenance.Provenance`
            lists it; the card that is saved with the model tells it. None where nothing is known.

    Raises:
        InputError: a class or setting is unknown or does not fit the others; names it and what would be right.
    """

    decoder: UViTDecoder
    _supports_gradient_checkpointing = True
    _range_checked = False
    _no_split_modules = (*OF_ENCODERS, *OF_DECODERS)

    @register_to_config
    def __init__(
        self,
        latent_channels: int,
        downsample_factor: int,
        encoder: Mapping[str, Any] | None = None,
        decoder: Mapping[str, Any] | None = None,
        dynamics: Mapping[str, Any] | None = None,
        classes: Iterable[type] = (),
        *,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.use_tiling = self.use_slicing = False
        self.spatial_compression_ratio = downsample_factor  # as some pipelines call it
        check_value("latent_channels", latent_channels, int, {"at_least": 1})
        settings: dict[str, Any] = {
            "scaling_factor": check_value("scaling_factor", scaling_factor, float, {"above": 0.0}),
            "shift_factor": check_value("shift_factor", shift_factor, float, {}),
            "latents_mean": check_value("latents_mean", latents_mean, list[float] | None, {}),
            "latents_std": check_value("latents_std", latents_std, list[float] | None, {"at_least": 0.0}),
            "provenance": None if provenance is None else Provenance.from_mapping(provenance).to_mapping(),
        }
        if any(numbers is not None and len(numbers) != latent_channels for numbers in (latents_mean, latents_std)):
            raise InputError(f"latents_mean and latents_std need as many numbers as latent_channels, {latent_channels}")
        classes = check_classes(classes)
        parts = {"encoder": encoder, "decoder": decoder, "dynamics": dynamics}
        resolved = {part: resolve_part(part, given, classes) for part, given in parts.items()}
        # diffusers would drop on reload what it lists as left at its default; the resolved settings are to stay.
        registered = {key: value for key, value in self._internal_dict.items() if key != "_use_default_values"}
        settings |= {part: found.config for part, found in resolved.items()}
        self._internal_dict = FrozenDict({**registered, **settings})

        sizes = {"latent_channels": latent_channels, "downsample_factor": downsample_factor}
        self.dynamics: Dynamics = resolved["dynamics"].build()
        for name in ("conditions_on_time", "noise_level"):
            if not hasattr(self.dynamics, name):
                raise InputError(f"dynamics class {settings['dynamics']['class_path']!r} has no attribute {name}")
        self.encoder = resolved["encoder"].build(**sizes)
        self.decoder = resolved["decoder"].build(**sizes, time_conditioning=self.dynamics.conditions_on_time)
        for_images = isinstance(self.decoder, UViTDecoder) and (self.decoder.patch > 1 or self.decoder.block_shortcut)
        if for_images and getattr(self.dynamics, "prediction", "image") == "field":
            # A field carries the noise of all pixels, and a shortcut begins as an image.
            warnings.warn("a decoder with patches or a shortcut wants prediction 'image' of the dynamics", stacklevel=1)
        self._tile = check_tiling(None, DEFAULT_OVERLAP, downsample_factor)

    @classmethod
    def from_preset(cls, name: str, classes: Iterable[type] = (), **settings: Any) -> "DCSSDAE":
        """Build a preset with fresh random weights, in eval mode.

        Args:
            name: one of `dc_ssdae.presets.list_presets()`.
            classes: as the constructor's.
            settings: what to change: the constructor's settings by name; of a part, a mapping of that class's
                settings, for example `encoder={"norm": "none"}`. One with `class_path` replaces the part.

        Raises:
            InputError: the preset or a setting is unknown.
        """
        config = dict(load_preset(name)["model"])
        for key, value in settings.items():
            if key in COMPONENTS and isinstance(value, Mapping) and "class_path" not in value:
                part = config.get(key) or {}
                value = {**part, "init_args": {**(part.get("init_args") or {}), **value}}
            config[key] = value
        check_names(f"setting of {cls.__name__}", config, cls._config_names())
        return cls(**config, classes=classes).eval()

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """What the encoder gives for images x (B, 3, H, W) of the model's dtype; `encode` without the wrapping.

        Raises:
            InputError: a user's encoder gives something else than a Gaussian over (B, c, H/f, W/f).
        """
        posterior, config = self.encoder(x), self.config
        expected = (len(x), config.latent_channels, *(side // config.downsample_factor for side in x.shape[2:]))
        if not isinstance(posterior, DiagonalGaussian) or tuple(posterior.mean.shape) != expected:
            raise InputError(f"encoder {config.encoder['class_path']} must give a DiagonalGaussian of shape {expected}")
        return posterior

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[DiagonalGaussian]:
        """Encode images to the Gaussian over their latents.

        Args:
            x: (B, 3, H, W) in [-1, 1], H and W multiples of f; cast to the model's dtype.
            return_dict: give an output with `latent_dist`; False gives a tuple of it.

        Raises:
            InputError: the shape does not fit, or the images are no floating-point numbers; or an encoder of your
                own gives something else.

        Warns:
            UserWarning: images have values far outside [-1, 1]. Once per model; on a GPU only the first batch is
                looked at, and a compiled call looks at none.
        """
        check_image(_floats("images in [-1, 1]", x), self.config.downsample_factor)
        self._check_range(x)
        x = x.to(self.dtype)
        if self.use_slicing or self.use_tiling:
            posterior = DiagonalGaussian(*self._moments(x).split(self.config.latent_channels, dim=1))
        else:
            posterior = self.posterior(x)
        return EncoderOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _check_range(self, x: Tensor) -> None:
        """Warn once of images far outside [-1, 1]; on other devices than the CPU, which must wait, look once."""
        if torch.compiler.is_compiling() or self._range_checked or x.is_meta:
            return
        largest = float(x.detach().abs().max())
        self._range_checked = largest > FAR_OUTSIDE or x.device.type != "cpu"
        if largest > FAR_OUTSIDE:
            # The line warned of is past encode and diffusers' hook.
            warnings.warn(f"encode takes images in [-1, 1]; these have values up to ±{largest:.4g}", stacklevel=4)

    def _moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance (B, 2c, h, w), or mean alone: image by image, tile by tile, where that is on."""
        if self.use_slicing and len(x) > 1:
            return torch.cat([self._moments(image) for image in x.split(1)])
        factor = self.config.downsample_factor
        if self.use_tiling and max(x.shape[2:]) > self._tile[0] * factor:
            return blend_tiles(self._moments, [(x, factor)], *self._tile).to(x.dtype)
        return torch.cat(self.posterior(x).moments, dim=1)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: Generators = None,
        num_steps: int | None = None,
        step_size: Schedule | None = None,
        noise: Tensor | None = None,
        *,
        sampler: str | None = None,
        momentum: Schedule | None = None,
        tolerance: float | None = None,
        draft: Tensor | None = None,
        start: float | None = None,
        return_trajectory: bool = False,
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents to images, in one step or several.

        One step is the dynamics' clean estimate from pure noise. Several steps of equilibrium matching descend its
        field; flow matching integrates its velocity. torch.compile takes it as one graph for all sizes, unless there is
        a `tolerance`; a compiled decode does not look for NaN, nor warn of a divergence.

        Args:
            z: (B, c, h, w), cast to the model's dtype.
            return_dict: give an output with `sample` and what the sampler tells; False gives a tuple of the sample,
                and computes nothing else.
            generator: where the noise comes from: one generator, from which the images draw in order, or one per
                image. By default every image draws the same noise, of one fixed seed, so that a decode is
                reproducible and does not depend on the batch (but for float rounding).
            num_steps: steps, each an evaluation of the decoder (two with midpoint), at least 1; with `tolerance`, the
                most per image. 1 by default, 4 where a sampler of several steps is chosen, and 16 with `tolerance`.
            step_size: η of a descent: one for all steps, a sequence with one per step, or a function of the step's
                index. By default they follow from the decay (`EquilibriumMatching.step_sizes`).
            noise: (B, 3, h·f, w·f) to start from, in place of `generator`.
            sampler: "one_step"; for equilibrium matching "gradient_descent", "nesterov", or "nesterov_eqm", the
                variant of its authors' code; for flow matching "euler" or "midpoint". By default one_step where
                num_steps is 1.
            momentum: μ in [0, 1) of nesterov, as step_size one or several; 0.3 by default, from the first step on that
                does not come from pure noise.
            tolerance: of a descent: an image stops when the root mean square of its field falls below tolerance · λ,
                and costs nothing from then on.
            draft: (B, 3, h·f, w·f) images in [-1, 1], to start from in place of pure noise.
            start: γ in [0, 1], the share of `draft` in the start; the rest is noise.
            return_trajectory: give `trajectory` too, all states from the start to the sample.

        Returns:
            Images (B, 3, h·f, w·f) in the model's dtype, about [-1, 1], not clamped; see `DecoderOutput`.

        Raises:
            InputError: a shape or a setting does not fit, or z, on the CPU, holds NaN.

        Warns:
            Divergence: a descent gave up images; `sample` has the best state of each, `diverged` tells which. On a GPU
                only with a `tolerance`, so that nothing waits for it; look at `diverged` there.
        """
        if (draft is None) != (start is None):
            raise InputError("draft and start go together: start is the share of draft in what is decoded from")
        share = 0.0 if start is None else check_share("start", start)
        sampler, settings = plan_decoding(self.dynamics, sampler, num_steps, step_size, momentum, tolerance, share)
        z = self._check_latents(z)
        shape = (z.shape[0], 3, *(side * self.config.downsample_factor for side in z.shape[2:]))
        x = starting_noise(z, shape, generator, noise)
        pure_noise = self.dynamics.noise_level  # 1.0 minus it is the data's level
        level = torch.full((x.shape[0],), pure_noise + share * (1.0 - 2.0 * pure_noise), device=x.device)
        if draft is not None:
            x = self.dynamics.corrupt(as_start("draft", draft, z, shape), x, level).x_level
        if sampler == ONE_STEP:
            time = level if self.dynamics.conditions_on_time else None
            prediction = self._predict(x, z, time)
            sample = self.dynamics.clean_estimate(x, prediction, level)
            if not return_dict:
                return (sample.to(z.dtype),)
            rms = root_mean_square(field_of(self.dynamics, x, prediction, time))
            states = torch.stack([x, sample]) if return_trajectory else None
            result = SamplerResult(sample, torch.ones_like(level, dtype=torch.int64), rms, ~is_finite(sample), states)
        elif sampler in INTEGRATORS:
            settings |= {"return_trajectory": return_trajectory}
            result = INTEGRATORS[sampler](lambda x, time: self._field(x, z, time), x, **settings)
        else:
            bucket = tolerance is not None and any(map(_is_compiled, self.decoder.modules()))
            settings |= {"condition": z, "bucket": bucket, "return_trajectory": return_trajectory}
            result = DESCENTS[sampler](lambda x, z: self._field(x, z, None, bucket), x, **settings)
            # A GPU is waited for only where the sampler has waited for it anyway.
            looks = tolerance is not None or z.device.type == "cpu"
            if looks and not torch.compiler.is_compiling() and bool(result.diverged.any()):
                told = f"{int(result.diverged.sum())} of {len(z)} images diverged: try a smaller step_size"
                warnings.warn(told, Divergence, stacklevel=3)  # past diffusers' hook
        sample = result.sample.to(z.dtype)
        return DecoderOutput(sample, *result[1:]) if return_dict else (sample,)

    def field(self, x: Tensor, z: Tensor, time: Tensor | float | None = None) -> Tensor:
        """What samplers descend, or integrate: it follows from the decoder's answer, or its explicit energy.

        Args:
            x: (B, 3, H, W). Cast to the model's dtype for the decoder alone: in half precision the noise to be
                cancelled would lose the image's low bits.
            z: (B, c, h, w), cast to the model's dtype.
            time: in [0, 1], for dynamics that condition on it: (B,), or one for all images.

        Returns:
            (B, 3, H, W) in x's dtype, or float32 where that is half precision.

        Raises:
            InputError: a shape does not fit, or the dynamics wants a time, or none.
        """
        if time is not None:
            time = torch.as_tensor(time, dtype=torch.float32, device=x.device)
            time = time.expand(len(x)) if time.ndim == 0 else time
        return self._field(_floats("images", x), _floats("latents", z).to(self.dtype), time)

    def _field(self, x: Tensor, z: Tensor, time: Tensor | None, varying_batch: bool = False) -> Tensor:
        return field_of(self.dynamics, x, self._predict(x, z, time, varying_batch), time)

    def _predict(self, x: Tensor, z: Tensor, time: Tensor | None = None, varying_batch: bool = False) -> Tensor:
        """What the dynamics' methods take, of at least float32: image by image, tile by tile, where that is on."""
        if self.use_slicing and len(x) > 1:
            times = [None] * len(x) if time is None else time.split(1)
            return torch.cat([self._predict(*image) for image in zip(x.split(1), z.split(1), times, strict=True)])
        if self.use_tiling and max(z.shape[2:]) > self._tile[0]:
            factor = self.config.downsample_factor
            compute = partial(self._predict, time=time, varying_batch=varying_batch)
            return blend_tiles(compute, [(x, factor), (z, 1)], *self._tile, scale=factor)

        def inputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            x = as_normal(x.to(z.dtype))
            if varying_batch:
                mark_varying_batch(x)
            return x, as_normal(z), None if time is None else as_normal(time)

        prediction = predict(self.dynamics, lambda x: at_least_float32(self.decoder(*inputs(x))), x)
        return prediction.to(torch.promote_types(x.dtype, torch.float32))

    def energy(self, x: Tensor, z: Tensor) -> Tensor:
        """The explicit energy of images given latents, which a decode lowers (Wang and Du 2025, Equilibrium Matching).

        Args:
            x: (B, 3, H, W).
            z: (B, c, h, w), cast to the model's dtype.

        Returns:
            (B,), of at least float32.

        Raises:
            InputError: the model has no explicit energy, or a shape does not fit.
        """
        if not isinstance(self.dynamics, EquilibriumMatching):
            raise InputError(f"{type(self.dynamics).__name__} has no energy; EquilibriumMatching may have one")
        z = self._check_latents(z)
        x = as_normal(x)
        return self.dynamics.energy(x, self.decoder(x.to(z.dtype), as_normal(z)))

    def _check_latents(self, z: Tensor) -> Tensor:
        """Refuse what is no batch of finite latents, and cast it to the model's dtype."""
        z = _floats("latents", z).to(self.dtype)
        check_latent_shape(z, self.config.latent_channels)
        check_finite("z", z)
        return z

    def forward(
        self, sample: Tensor, sample_posterior: bool = False, return_dict: bool = True, generator: Generators = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Reconstruct images: decode, in one step from the default noise, their encoding.

        Args:
            sample: (B, 3, H, W) images in [-1, 1], as `encode` takes them.
            sample_posterior: draw the latents from the encoder's Gaussian; else they are its mode.
            return_dict: as `decode`'s.
            generator: of the latents' noise, as `DiagonalGaussian.sample` takes it.

        Raises:
            InputError: as `encode` does.
        """
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def enable_tiling(self, tile_size: int | None = None, overlap: float = DEFAULT_OVERLAP) -> None:
        """Encode and decode images that are larger than a tile in overlapping tiles, blended; memory follows the tile.

        The noise of a decode is drawn once, for the whole image; each step of a sampler blends the field, so that all
        tiles go on from one state. What the networks know of the whole image, as the statistics of group norms, is of
        the tile then: the result is close to that without tiles, not equal to it.

        Args:
            tile_size: side in pixels, a multiple of f and at least 2 f; None is 512, or 4 f where that is more.
            overlap: share of a tile's side that neighbours have in common, from 0 to 0.75; at least one latent.

        Raises:
            InputError: one of them is out of range.
        """
        self._tile = check_tiling(tile_size, overlap, self.config.downsample_factor)
        self.use_tiling = True

    # diffusers' mixin of these names comes with all of its models, whose import takes longer than a decode.
    def disable_tiling(self) -> None:
        """Encode and decode images whole, whatever their size."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Encode and decode batches image by image, so that memory follows one image."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode the images of a batch together."""
        self.use_slicing = False


# diffusers writes a class's module into a pipeline's model_index.json and imports nothing more to find it there.
DCSSDAE.__module__ = "dc_ssdae"


def _floats(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise InputError(f"{name} must be a floating-point tensor, not {getattr(value, 'dtype', type(value).__name__)}")
    return value


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has been called on it, in place or around it."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
