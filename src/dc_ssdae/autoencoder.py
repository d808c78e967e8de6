"""DCSSDAE: joins an encoder, a decoder and a dynamics; encode, decode, save, load."""

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from accelerate.utils import OffloadedWeightsLoader
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dc_ssdae.components import (
    COMPONENTS,
    DEFAULT_CLASSES,
    HANDED_OVER,
    build_part,
    check_classes,
    check_names,
    check_posterior,
    find_class,
    resolve_part,
)
from dc_ssdae.decoding import (
    DESCENTS,
    DecoderOutput,
    Divergence,
    check_latent,
    noised_draft,
    plan_decoding,
    run_plan,
    start_noise,
)
from dc_ssdae.dynamics import Dynamics, EquilibriumMatching
from dc_ssdae.dynamics.energy import apply_network, as_normal
from dc_ssdae.errors import InputError, check_at_least, check_type
from dc_ssdae.hub import fetch_model
from dc_ssdae.latent import DiagonalGaussian, LatentStatistics
from dc_ssdae.model_card import create_repository, upload_model, write_model_card
from dc_ssdae.model_folder import WEIGHTS, check_channels, may_be_on_the_hub, read_config, weight_variants
from dc_ssdae.networks import UViTDecoder
from dc_ssdae.networks.blocks import check_image
from dc_ssdae.presets import load_preset
from dc_ssdae.provenance import check_provenance
from dc_ssdae.samplers import Schedule
from dc_ssdae.samplers.descent import mark_varying_batch
from dc_ssdae.samplers.result import check_share
from dc_ssdae.tiling import DEFAULT_OVERLAP, blend_tiles, check_tiling
from dc_ssdae.weights import PICKLE_SUFFIXES, check_tensors, converting_command, pickle_refused, shard_files

__all__ = [
    "COMPONENTS",
    "DCSSDAE",
    "DEFAULT_CLASSES",
    "EncoderOutput",
    "build_without_weights",
]

FOLLOWING_SETTINGS = (
    "block_out_channels",
    "encoder_block_out_channels",
    "spatial_compression_ratio",
    "in_channels",
    "out_channels",
    "force_upcast",
)
"""What `DCSSDAE.config` tells besides the model's own settings, because pipelines and training scripts ask for it."""

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""What `from_pretrained` takes for a model on the hub."""

LOADING_ARGUMENTS = (
    *HUB_ARGUMENTS,
    "device_map",
    "disable_mmap",
    "dtype",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "subfolder",
    "torch_dtype",
    "use_flashpack",
    "use_safetensors",
    "variant",
)
"""What `from_pretrained` passes on to diffusers, which would drop an unknown argument without a word."""


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

    @property
    def latent(self) -> Tensor:
        """The same under the name that `AutoencoderDC` gives it."""
        return self.latent_dist.mode()


class DCSSDAE(ModelMixin, AutoencoderMixin, ConfigMixin):
    """An autoencoder whose decoder is a one-step diffusion model (SPEC section 1).

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
        provenance: what is known of the model's training and evaluations, as `dc_ssdae.provenance.check_provenance`
            takes it; the card that is saved with the model tells it. None where nothing is known.

    Raises:
        InputError: a class or setting is unknown or does not fit the others; names it and what would be right.
    """

    _internal_dict: FrozenDict
    encoder: nn.Module
    decoder: UViTDecoder
    _supports_gradient_checkpointing = True
    # Blocks whose outputs join their inputs, which must be on one device.
    _no_split_modules = (
        "KLResidualBlock",
        "SpatialSelfAttention",
        "ResBlock",
        "EfficientViTBlock",
        "SpaceToChannelDownsample",
        "ConditionedResidualBlock",
        "UpLevel",
        "TransformerBlock",
    )
    ignore_for_config: ClassVar[list[str]] = ["classes"]

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
        self.use_tiling = False
        self.use_slicing = False
        check_type("latent_channels", latent_channels, int)
        check_type("downsample_factor", downsample_factor, int)
        check_at_least(1, latent_channels=latent_channels)
        normalisation = _check_normalisation(latent_channels, scaling_factor, shift_factor, latents_mean, latents_std)
        classes = check_classes(classes)
        parts = {"encoder": encoder, "decoder": decoder, "dynamics": dynamics}
        resolved = {part: resolve_part(part, given, classes) for part, given in parts.items()}
        # diffusers would drop on reload what it lists as left at its default; the resolved settings are to stay.
        registered = {key: value for key, value in self._internal_dict.items() if key != "_use_default_values"}
        self._internal_dict = FrozenDict(
            {**registered, **resolved, **normalisation, "provenance": check_provenance(provenance)}
        )

        self.dynamics: Dynamics = build_part("dynamics", resolved["dynamics"], {}, classes)
        following = {
            "latent_channels": latent_channels,
            "downsample_factor": downsample_factor,
            "time_conditioning": self.dynamics.conditions_on_time,
        }
        for part in ("encoder", "decoder"):
            handed_over = {name: following[name] for name in HANDED_OVER[part]}
            setattr(self, part, build_part(part, resolved[part], handed_over, classes))
        self._tile = check_tiling(None, DEFAULT_OVERLAP, downsample_factor)

    @property
    def config(self) -> FrozenDict:
        """The settings, and what diffusers' pipelines look for besides, which follows from them and is not saved."""
        return FrozenDict({**self._internal_dict, **self._following_settings()})

    def _following_settings(self) -> dict[str, Any]:
        channels, factor = self._internal_dict["latent_channels"], self._internal_dict["downsample_factor"]
        stages = factor.bit_length()  # pipelines take 2^(stages - 1) for f
        widths = getattr(self.encoder, "widths", None)
        if not (isinstance(widths, list | tuple) and len(widths) == stages):
            widths = [channels] * stages
        return dict(zip(FOLLOWING_SETTINGS, (list(widths), list(widths), factor, 3, 3, False), strict=True))

    @property
    def spatial_compression_ratio(self) -> int:
        """The factor f, under the name that some pipelines look for."""
        return self._internal_dict["downsample_factor"]

    def __getattr__(self, name: str) -> Any:
        # diffusers' own version answers with the config's entry of that name, which would hide encoder and decoder.
        return nn.Module.__getattr__(self, name)

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
            if key in COMPONENTS:
                if not isinstance(value, Mapping):
                    raise InputError(f"{key} is {value!r}; it must be a mapping of that part's settings")
                part = dict(config.get(key) or {})
                merged = {**part, "init_args": {**(part.get("init_args") or {}), **value}}
                config[key] = value if "class_path" in value else merged
            else:
                config[key] = value
        check_names(f"setting of {cls.__name__}", config, cls._config_names())
        return cls(**config, classes=classes).eval()

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """What the encoder gives for images x (B, 3, H, W) of the model's dtype; `encode` without the wrapping.

        Raises:
            InputError: a user's encoder gives something else than a Gaussian over (B, c, H/f, W/f).
        """
        config = self.config
        return check_posterior(
            self.encoder(x), config.encoder["class_path"], x, config.latent_channels, config.downsample_factor
        )

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[DiagonalGaussian]:
        """Encode images to the Gaussian over their latents.

        Args:
            x: (B, 3, H, W) in [-1, 1], H and W multiples of f; cast to the model's dtype.
            return_dict: give an output with `latent_dist`; False gives a tuple of it.

        Raises:
            InputError: the shape does not fit, or the images are no floating-point numbers; or an encoder of your
                own gives something else.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"images are a tensor of floating-point numbers in [-1, 1], not {given}; scale them first")
        check_image(x, self.config.downsample_factor)
        x = x.to(self.dtype)
        if self.use_slicing and len(x) > 1:
            posterior = DiagonalGaussian.join([self._posterior_in_tiles(image) for image in x.split(1)])
        else:
            posterior = self._posterior_in_tiles(x)
        return EncoderOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _posterior_in_tiles(self, x: Tensor) -> DiagonalGaussian:
        """As `posterior`, but tile by tile where tiling is on and the images are larger than a tile."""
        factor = self.config.downsample_factor
        if not self.use_tiling or max(x.shape[2:]) <= self._tile[0] * factor:
            return self.posterior(x)
        height, width = (side // factor for side in x.shape[2:])
        has_variance = False

        def compute(rows: slice, columns: slice) -> Tensor:
            nonlocal has_variance
            posterior = self.posterior(x[:, :, _times(rows, factor), _times(columns, factor)])
            has_variance = posterior.logvar is not None
            return posterior.mean if posterior.logvar is None else torch.cat([posterior.mean, posterior.logvar], dim=1)

        moments = blend_tiles(compute, height, width, *self._tile).to(x.dtype)
        return DiagonalGaussian.from_moments(moments) if has_variance else DiagonalGaussian(moments)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
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
        field; flow matching integrates its velocity by Euler's method.

        Args:
            z: (B, c, h, w), cast to the model's dtype.
            return_dict: give an output with `sample` and what the sampler tells; False gives a tuple of the sample.
            generator: where the noise comes from: one generator, from which the images draw in order, or one per
                image. By default every image draws the same noise, of one fixed seed, so that a decode is
                reproducible and does not depend on the batch (but for float rounding).
            num_steps: evaluations of the decoder, at least 1; with `tolerance`, the most that an image gets. 1 by
                default, 4 where a sampler of several steps is chosen, and 16 with `tolerance`.
            step_size: η of a descent: one for all steps, a sequence with one for each, or a function of the step's
                index. By default they follow from the decay (`EquilibriumMatching.step_sizes`).
            noise: (B, 3, h·f, w·f) to start from, in place of `generator`.
            sampler: "one_step"; for equilibrium matching "gradient_descent", "nesterov", or "nesterov_eqm", the
                variant of its authors' code; for flow matching "euler". By default one_step where num_steps is 1.
            momentum: μ in [0, 1) of nesterov, as step_size one or several; 0.3 by default, from the first step on that
                does not come from pure noise.
            tolerance: of a descent: an image is done when the root mean square of its field falls below tolerance · λ,
                and costs nothing from then on.
            draft: (B, 3, h·f, w·f) images in [-1, 1], to start from in place of pure noise.
            start: γ in [0, 1], the share of `draft` in the start; the rest is noise.
            return_trajectory: give `trajectory` too, all states from the start to the sample.

        Returns:
            Images (B, 3, h·f, w·f) in the model's dtype, about [-1, 1], not clamped; see `DecoderOutput`.

        Raises:
            InputError: a shape or a setting does not fit, or z holds NaN.

        Warns:
            Divergence: a descent gave up images; `sample` has the best state of each, `diverged` tells which.
        """
        if (draft is None) != (start is None):
            raise InputError("draft and start go together: start is the share of draft in what is decoded from")
        begin = 0.0 if start is None else check_share("start", start)
        plan = plan_decoding(self.dynamics, sampler, num_steps, step_size, momentum, tolerance, begin)
        z = z.to(self.dtype)
        check_latent(z, self.config.latent_channels)
        factor = self.config.downsample_factor
        x = start_noise(z, (z.shape[0], 3, z.shape[2] * factor, z.shape[3] * factor), generator, noise)
        if draft is not None:
            x = noised_draft(self.dynamics, draft, x, begin)
        bucket = plan.tolerance is not None and any(map(_is_compiled, self.decoder.modules()))
        result = run_plan(
            plan, self.dynamics, partial(self._field, varying_batch=bucket), x, z, begin, bucket, return_trajectory
        )
        if plan.sampler in DESCENTS and not torch.compiler.is_compiling() and bool(result.diverged.any()):
            lost = int(result.diverged.sum())
            warnings.warn(
                f"{lost} of {len(z)} images diverged and fell back to their best state; try a smaller step_size",
                Divergence,
                stacklevel=3,  # past diffusers' hook
            )
        sample = result.sample.to(self.dtype)
        return DecoderOutput(sample, *result[1:]) if return_dict else (sample,)

    def field(self, x: Tensor, z: Tensor, time: Tensor | None = None) -> Tensor:
        """What samplers descend, or integrate: the decoder's answer, or the gradient of its explicit energy.

        Args:
            x: (B, 3, H, W). Cast to z's dtype for the decoder alone: in half precision the noise to be cancelled would
                lose the image's low bits.
            z: (B, c, h, w) of the model's dtype.
            time: (B,) in [0, 1] for dynamics that condition on it.

        Returns:
            (B, 3, H, W) float32.
        """
        return self._field(x, z, time)

    def _field(self, x: Tensor, z: Tensor, time: Tensor | None = None, varying_batch: bool = False) -> Tensor:
        """As `field`, image by image and tile by tile where slicing and tiling are on."""
        if self.use_slicing and len(x) > 1:
            times = [None] * len(x) if time is None else time.split(1)
            return torch.cat([self._field(*image) for image in zip(x.split(1), z.split(1), times, strict=True)])
        if not self.use_tiling or max(z.shape[2:]) <= self._tile[0]:
            return self._whole_field(x, z, time, varying_batch)
        factor = self.config.downsample_factor

        def compute(rows: slice, columns: slice) -> Tensor:
            x_tile = x[:, :, _times(rows, factor), _times(columns, factor)]
            return self._whole_field(x_tile, z[:, :, rows, columns], time, varying_batch)

        height, width = z.shape[2:]
        return blend_tiles(compute, height, width, *self._tile, scale=factor)

    def _whole_field(self, x: Tensor, z: Tensor, time: Tensor | None, varying_batch: bool) -> Tensor:
        def network(y: Tensor) -> Tensor:
            y = as_normal(y.to(z.dtype))
            if varying_batch:
                mark_varying_batch(y)
            at = None if time is None else as_normal(time)
            return self.decoder(y, as_normal(z), at).float()

        return apply_network(self.dynamics, network, x).float()

    def energy(self, x: Tensor, z: Tensor) -> Tensor:
        """The explicit energy of images given latents (SPEC section 2, "Explicit energy"), which a decode lowers.

        Args:
            x: (B, 3, H, W).
            z: (B, c, h, w), cast to the model's dtype.

        Returns:
            (B,) float32.

        Raises:
            InputError: the model has no explicit energy, or a shape does not fit.
        """
        if not isinstance(self.dynamics, EquilibriumMatching):
            raise InputError(f"{type(self.dynamics).__name__} has no energy; EquilibriumMatching may have one")
        z = z.to(self.dtype)
        check_latent(z, self.config.latent_channels)
        x = as_normal(x)
        return self.dynamics.energy(x, self.decoder(x.to(self.dtype), as_normal(z)))

    def forward(self, x: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Reconstruct images: decode, in one step, the mode of their encoding."""
        (posterior,) = self.encode(x, return_dict=False)
        return self.decode(posterior.mode(), return_dict=return_dict)

    def set_latent_statistics(self, statistics: LatentStatistics) -> None:
        """Put the latents' statistics into the config, to be saved with it.

        Raises:
            InputError: they are of another number of channels.
        """
        check_channels(statistics, self.config.latent_channels, "this model")
        self._internal_dict = FrozenDict({**self._internal_dict, **statistics.settings()})

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

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Compute the activations of encoder and decoder again in the backward pass instead of keeping them.

        Args:
            gradient_checkpointing_func: called with a block and its inputs in place of the block; None is
                `torch.utils.checkpoint.checkpoint`, not re-entrant.

        Raises:
            InputError: neither encoder nor decoder has an attribute `gradient_checkpointing` to be switched.
        """
        if not any(hasattr(module, "gradient_checkpointing") for module in self.modules()):
            names = " nor ".join(f"{part} {self.config[part]['class_path']}" for part in ("encoder", "decoder"))
            raise InputError(f"neither {names} supports gradient checkpointing; leave it out")
        # Not diffusers' own default, a local function, with which a model cannot be pickled.
        default = partial(checkpoint, use_reentrant=False)
        super().enable_gradient_checkpointing(gradient_checkpointing_func or default)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save config.json and the weights as safetensors, as diffusers does, readable for whom config.json is.

        A card, README.md, tells what the model is; one that is not ours stays as it is.

        Args:
            save_directory: a folder, made if need be.
            variant: of the weight files, such as "fp16".
            max_shard_size: of a weight file, in bytes or such as "5GB".
            safe_serialization: True; there is no other format.
            kwargs: diffusers' other saving arguments; with `push_to_hub`, those of that method, `repo_id` being the
                folder's name by default.

        Raises:
            InputError: another format than safetensors is asked for; or the repository cannot be called so.
        """
        # Named parameters, because a pipeline that is saved hands on only what it finds in the signature.
        if not safe_serialization or kwargs.get("use_flashpack"):
            raise InputError("models are saved as safetensors only: leave safe_serialization and use_flashpack out")
        folder = Path(save_directory)
        is_main, push = kwargs.get("is_main_process", True), kwargs.pop("push_to_hub", False)
        private, repo_id = kwargs.pop("private", None), kwargs.pop("repo_id", None)
        upload = {name: kwargs.pop(name) for name in ("commit_message", "token", "create_pr") if name in kwargs}
        if push and is_main:  # before the time that saving takes
            repo_id = create_repository(repo_id or folder.resolve().name, private, upload.get("token"))
        suffix = f".{variant}" if variant else ""
        # diffusers takes an earlier save's shards away and leaves their index, which would be read in their place.
        Path(folder, f"{WEIGHTS}.safetensors.index{suffix}.json").unlink(missing_ok=True)
        with self._not_wrapped():
            super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size, **kwargs)
        if not is_main:
            return
        # safetensors writes files that only their owner may read, whatever the umask: useless to a team's folder.
        mode = Path(folder, "config.json").stat().st_mode
        for file in folder.glob(f"{WEIGHTS}*.safetensors"):
            file.chmod(mode)
        if push:
            upload_model(folder, repo_id, **upload)
        else:
            write_model_card(folder)

    @contextlib.contextmanager
    def _not_wrapped(self) -> Iterator[None]:
        """Take parts out of what torch.compile has put around them, whose tensors have other names.

        Raises:
            InputError: something inside of a part is wrapped.
        """
        wrapped = {name: part for name, part in self.named_children() if hasattr(part, "_orig_mod")}
        try:
            for name, part in wrapped.items():
                setattr(self, name, part._orig_mod)
            for name, module in self.named_modules():
                if hasattr(module, "_orig_mod"):
                    raise InputError(
                        f"{name} is wrapped by torch.compile, and cannot be saved: use its method compile()"
                    )
            yield
        finally:
            for name, part in wrapped.items():
                setattr(self, name, part)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> Any:
        """Upload the model to the hub, with a card; a card there that is not ours stays.

        Args:
            repo_id: of the repository, OWNER/NAME or, under your own name, NAME; made if it is not there.
            commit_message: of the commit.
            private: whether a new repository is private; None is its owner's default.
            token: of the hub; None is the one that is logged in with.
            create_pr: propose the files, and leave the repository as it is.
            safe_serialization: True; there is no other format.
            variant: of the weight files, such as "fp16".
            subfolder: where in the repository; without a card there.

        Returns:
            As `huggingface_hub.upload_folder`.

        Raises:
            InputError: the repository cannot be called so; or another format is asked for.
        """
        if not safe_serialization:
            raise InputError("models are saved as safetensors only: leave safe_serialization out")
        repo_id = create_repository(repo_id, private, token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            return upload_model(Path(folder), repo_id, commit_message, token, create_pr, subfolder)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, classes: Iterable[type] = (), **kwargs: Any
    ) -> "DCSSDAE":
        """Load a saved model, in eval mode; strict where diffusers is lenient.

        Args:
            pretrained_model_name_or_path: a folder written by `save_pretrained`, or a hub id.
            classes: as the constructor's; for classes of your own that are not imported, or have moved.
            kwargs: diffusers' loading arguments, such as `torch_dtype`, `subfolder`, `revision`, `variant`.

        Raises:
            InputError: an unknown argument; a config that is not this class's or has an unknown setting; a tensor
                that is missing, left over, truncated, or of another shape. The message names it.
        """
        check_names("argument of from_pretrained", kwargs, ("classes", *LOADING_ARGUMENTS))
        classes = check_classes(classes)
        if kwargs.get("use_safetensors") is False or kwargs.get("use_flashpack"):
            raise InputError("only safetensors are loaded: leave use_safetensors and use_flashpack out")
        name = str(pretrained_model_name_or_path)
        subfolder, variant = kwargs.pop("subfolder", None), kwargs.get("variant")
        hub = {argument: kwargs.pop(argument, None) for argument in HUB_ARGUMENTS}
        if name and Path(name).is_dir():
            folder = Path(name, subfolder or "")
            cls._check_folder(folder, variant, classes)
        elif may_be_on_the_hub(name):
            folder = fetch_model(name, subfolder, variant, **hub)
            if not weight_variants(folder):
                pickled, converted = Path(f"{WEIGHTS}.bin"), Path(f"{WEIGHTS}.safetensors")
                raise InputError(
                    f"{name} has no safetensors of this variant on the hub; a pickle, which could run code, is never "
                    f"loaded: convert one that you have downloaded: {converting_command(pickled, converted)}"
                )
            try:
                cls._check_folder(folder, variant, classes)
            except InputError as error:
                # A path in the cache says little; the repository's name does.
                raise InputError(str(error).replace(str(folder), name)) from None
        else:
            raise InputError(f"{name!r}: no such folder, nor the id of a model on the hub")
        model, info = super().from_pretrained(
            str(folder), **{**kwargs, "classes": classes, "use_safetensors": True, "output_loading_info": True}
        )
        problems = [f"{kind.replace('_', ' ')}: {items}" for kind, items in info.items() if items]
        if problems:
            raise InputError(f"{name} does not fit its config.json; {'; '.join(problems)}")
        # diffusers would save and upload the path of a folder on this machine.
        known = {key: value for key, value in model._internal_dict.items() if key != "_name_or_path"}
        model._internal_dict = FrozenDict(known if Path(name).is_dir() else {**known, "_name_or_path": name})
        if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
            _restore_buffers(model, kwargs["offload_folder"])
        return model

    @classmethod
    def _check_folder(cls, folder: Path, variant: str | None, classes: Iterable[type]) -> None:
        """Check config and weights by their headers, before diffusers loads what it can and warns of the rest."""
        config = read_config(folder)
        if "quantization_config" in config:
            raise InputError(f"{folder}: its weights are quantised; take those in float32, float16 or bfloat16")
        model = build_without_weights(config, classes, cls)
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        suffix = f".{variant}" if variant else ""
        index = folder / f"{WEIGHTS}.safetensors.index{suffix}.json"
        if index.is_file():
            check_tensors(shard_files(index), expected)
            return
        single = folder / f"{WEIGHTS}{suffix}.safetensors"
        pickles = [file for file in sorted(folder.glob("*")) if file.suffix in PICKLE_SUFFIXES]
        if pickles and not single.is_file():
            weights = [file for file in pickles if file.stem == single.stem] or pickles
            raise pickle_refused(weights[0], single)
        if not single.is_file():
            others = [repr(other) for other in weight_variants(folder) if other != variant]
            there = f"there is the variant {' and '.join(others)}" if others else "there are no safetensors"
            raise InputError(f"{single}: no such file; {there}")
        check_tensors([single], expected)

    @classmethod
    def _config_names(cls) -> list[str]:
        names = [name for kind in (cls, DCSSDAE) for name in inspect.signature(kind.__init__).parameters]
        return [name for name in dict.fromkeys(names) if name not in ("self", *cls.ignore_for_config)]

    def register_to_config(self, **kwargs: Any) -> None:
        """Change settings in the config, to be saved with it, as diffusers does.

        Raises:
            InputError: one of them follows from others.
        """
        for name in kwargs:
            if name in FOLLOWING_SETTINGS:
                raise InputError(f"{name} cannot be set: it follows from the other settings as {self.config[name]!r}")
        super().register_to_config(**kwargs)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **kwargs: Any) -> Any:
        """Build a model with fresh random weights from what `config` gives, or `load_config`.

        Args:
            config: the settings. What follows from others may be among them.
            kwargs: settings that go before those in `config`, `classes` as the constructor's, and diffusers' own
                arguments.

        Raises:
            InputError: a setting is unknown, missing or does not fit.
        """
        given = {name: config[name] for name in FOLLOWING_SETTINGS if name in config}
        built = super().from_config({name: config[name] for name in config if name not in given}, **kwargs)
        model = built[0] if isinstance(built, tuple) else built
        for name, value in given.items():
            if not (kwargs.keys() & set(cls._config_names())) and value != model.config[name]:
                raise InputError(f"{name} is {value!r}; it follows from the other settings as {model.config[name]!r}")
        return built

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Refuse what diffusers would drop with a warning: another class's config, or an unknown setting.

        `from_config` calls it with its arguments; among them `classes`, as the constructor's.
        """
        classes = check_classes(kwargs.pop("classes", ()))
        class_name = config_dict.get("_class_name", "DCSSDAE")
        if class_name not in [kind.__name__ for kind in cls.__mro__ if issubclass(kind, DCSSDAE)]:
            raise InputError(f"config.json is of a {class_name!r}, not of a {cls.__name__!r}")
        settings = [name for name in config_dict if not name.startswith("_")]
        check_names("setting in config.json", settings, cls._config_names())
        check_names(f"setting of {cls.__name__}", kwargs, cls._config_names())
        for name in ("latent_channels", "downsample_factor"):
            if name not in config_dict and name not in kwargs:
                raise InputError(f"config.json lacks {name}")
        for part in COMPONENTS:
            given = config_dict.get(part)
            if isinstance(given, Mapping) and part not in kwargs and "class_path" in given:
                find_class(part, given["class_path"], classes, source="config.json")
        init, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        return {**init, "classes": classes}, unused, hidden


# diffusers writes a class's module into a pipeline's model_index.json and imports nothing more to find it there.
DCSSDAE.__module__ = "dc_ssdae"


def build_without_weights(
    config: Mapping[str, Any], classes: Iterable[type] = (), kind: type[DCSSDAE] = DCSSDAE
) -> DCSSDAE:
    """Build a model on the meta device, for its shapes and costs.

    Args:
        config: as `read_config` gives it.
        classes: as the constructor's.
        kind: the class to build.

    Raises:
        InputError: the config does not fit.
    """
    named = [given.get("class_path") for part in COMPONENTS if isinstance(given := config.get(part), Mapping)]
    # A user's constructor could read no number off a meta tensor; without it, each tensor is made and dropped at once.
    # A stranger's file that asks for terabytes names no class of the user's.
    has_own = any(isinstance(path, str) and "." in path for path in named)
    try:
        with init_empty_weights() if has_own else torch.device("meta"):
            model = kind.from_config(dict(config), classes=classes)
    except RuntimeError as error:  # more numbers than PyTorch can count
        raise InputError(f"a model of these settings cannot be built: {str(error).splitlines()[0]}") from error
    # Not model.to, with which diffusers warns of modules to be kept in float32, of which there are none.
    return nn.Module.to(model, "meta")


def _restore_buffers(model: nn.Module, folder: str | Path) -> None:
    """Read what diffusers puts on the disk with the weights and never reads back: the statistics of batch norm."""
    stored = OffloadedWeightsLoader(save_folder=str(folder))
    for name, buffer in model.named_buffers():
        if name in stored:
            buffer.copy_(stored[name])


def _check_normalisation(
    channels: int, scaling_factor: float, shift_factor: float, mean: list[float] | None, std: list[float] | None
) -> dict[str, Any]:
    """Check the settings that normalise latents, and list them with every number a float."""
    scaling_factor = _finite("scaling_factor", scaling_factor)
    if scaling_factor <= 0:
        raise InputError(f"scaling_factor is {scaling_factor}; it must be above 0")
    checked: dict[str, list[float] | None] = {}
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        if values is None:
            checked[name] = None
            continue
        check_type(name, values, list)
        if len(values) != channels:
            raise InputError(f"{name} has {len(values)} numbers; with latent_channels {channels} it needs {channels}")
        checked[name] = [_finite(f"{name}[{place}]", value) for place, value in enumerate(values)]
    for place, value in enumerate(checked["latents_std"] or ()):
        if value < 0:
            raise InputError(f"latents_std[{place}] is {value}; a standard deviation is at least 0")
    return {"scaling_factor": scaling_factor, "shift_factor": _finite("shift_factor", shift_factor), **checked}


def _finite(name: str, value: Any) -> float:
    check_type(name, value, float)
    try:
        number = float(value)
    except OverflowError:  # of a whole number with hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{name} is {number}; it must be finite")
    return number


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has been called on it, in place or around it."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def _times(span: slice, factor: int) -> slice:
    return slice(span.start * factor, span.stop * factor)
