"""One step's computation as a module, which is what a process group wraps."""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import to_model_range
from dc_ssdae.dynamics import Corruption
from dc_ssdae.dynamics.corruption import predict
from dc_ssdae.errors import InputError
from dc_ssdae.latent import DiagonalGaussian
from dc_ssdae.losses import Losses, Objective, StepOutputs
from dc_ssdae.networks.norms import GlobalBatchNorm2d
from dc_ssdae.randomness import noise_generator
from dc_ssdae.samplers.result import is_finite


class TrainingStep(nn.Module):
    """Encode, corrupt, predict and add up the objective.

    Args:
        model: the autoencoder.
        objective: its terms may hold parameters, which train too.
        precision: "float32", or "bfloat16" or "float16" for autocast around the networks; losses stay float32.

    Attributes:
        memory_format: memory order of the images; `build.place_step` chooses it.
        loss_terms: names of the objective's terms.
        held_back: names of the parameters that `freeze_all_but` keeps from training.
    """

    def __init__(self, model: DCSSDAE, objective: Objective, precision: str = "float32") -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.loss_terms = list(objective.terms)
        self._dtype = getattr(torch, precision)
        self.memory_format = torch.contiguous_format
        self._frozen: list[nn.Module] = []
        self.held_back: set[str] = set()
        self._decode_with_features: Callable[..., tuple[Tensor, Tensor]] | None = None
        if objective.wants_decoder_features:
            self._decode_with_features = getattr(model.decoder, "forward_with_features", None)
            if self._decode_with_features is None:
                raise InputError(f"{type(model.decoder).__name__} has no forward_with_features, which a loss reads")

    def forward(
        self,
        pixels: Tensor,
        noise: Tensor,
        level: Tensor,
        latent_noise: Tensor,
        augmentation: Tensor | None = None,
        draw: Tensor | None = None,
    ) -> Losses:
        """Compute the losses of a batch; gradients flow to encoder, decoder and objective.

        Args:
            pixels: uint8 (B, 3, S, S).
            noise: (B, 3, S, S), standard normal.
            level: (B,), of the dynamics.
            latent_noise: (B, c, S/f, S/f), standard normal.
            augmentation: (B, c, S/f, S/f), added to the latents; None adds nothing.
            draw: int64 (B,), numbers the run's images; of no use here.
        """
        x, noise = self._images(pixels), noise.contiguous(memory_format=self.memory_format)
        record, posterior, z = self.corrupt_and_encode(x, noise, level, latent_noise, augmentation, draw)
        dynamics = self.model.dynamics
        time = record.level if dynamics.conditions_on_time else None
        features: Tensor | None = None

        def network(x_level: Tensor) -> Tensor:
            nonlocal features
            if self._decode_with_features is None:
                return self.model.decoder(x_level, z, time)
            prediction, features = self._decode_with_features(x_level, z, time, self.objective.decoder_layer)
            return prediction

        with self._autocast(x):
            prediction = predict(dynamics, network, record.x_level)
        return self.objective(StepOutputs(dynamics, record, prediction, posterior, features))

    def corrupt_and_encode(
        self,
        x: Tensor,
        noise: Tensor,
        level: Tensor,
        latent_noise: Tensor,
        augmentation: Tensor | None,
        draw: Tensor | None,
    ) -> tuple[Corruption, DiagonalGaussian, Tensor]:
        """Make what the decoder gets and is compared with: the record, the posterior, and latents drawn from it."""
        record = self.model.dynamics.corrupt(x, noise, level)
        with self._autocast(x):
            posterior = self.model.posterior(x).bounded()
            return record, posterior, augmented(posterior.sample(noise=latent_noise), augmentation)

    def _images(self, pixels: Tensor) -> Tensor:
        return to_model_range(pixels).contiguous(memory_format=self.memory_format)

    @property
    def keeps_latent(self) -> bool:
        """Whether nothing of the encoder trains, so that the latent stays as it is."""
        return not trains(self.model.encoder)

    def freeze_all_but(self, trained: Set[str]) -> None:
        """Leave everything else as it is: no gradients, and batch statistics and dropout as in evaluation.

        Args:
            trained: names of tensors of the state dict, of the model and the objective.
        """
        for name, parameter in self.named_parameters():
            # What its author has frozen stays so.
            if parameter.requires_grad and name not in trained:
                parameter.requires_grad_(False)
                self.held_back.add(name)
        self._frozen = list(_untouched(self, "", trained))

    def train(self, mode: bool = True) -> "TrainingStep":
        """As PyTorch's, but what is frozen stays in evaluation mode, where batch norm uses its statistics.

        So does a decoder's norm of latents that do not change, which goes on collecting them.
        """
        super().train(mode)
        for module in self._frozen:
            module.eval()
        for module in self.model.decoder.modules():
            if isinstance(module, GlobalBatchNorm2d):
                module.inputs_stay = self.keeps_latent
        return self

    def compile_networks(self) -> None:
        """Compile encoder, decoder and the objective's backbones."""
        self.model.encoder.compile()
        self.model.decoder.compile()
        if self._decode_with_features is not None:
            self._decode_with_features = torch.compile(self._decode_with_features)
        self.objective.compile_backbones()

    def posterior(self, pixels: Tensor) -> DiagonalGaussian:
        """Encode images: uint8 (B, 3, S, S) to the Gaussian over their latents, in float32."""
        x = self._images(pixels)
        with torch.no_grad(), self._autocast(x):
            posterior = self.model.encode(x).latent_dist
        return DiagonalGaussian(*(part.float() for part in posterior.moments))

    def reconstruct(self, pixels: Tensor) -> Tensor:
        """Encode images and decode the mode of their latents in one step.

        Args:
            pixels: uint8 (B, 3, S, S).

        Returns:
            float32 (B, 3, S, S), about [-1, 1].
        """
        x = self._images(pixels)
        with torch.no_grad(), self._autocast(x):
            latent = self.model.encode(x).latent_dist.mode()
            return decode_or_nan(self.model, latent.float())

    def _autocast(self, x: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self._dtype == torch.float32 else torch.autocast(x.device.type, self._dtype)


def draw_noise(
    model: DCSSDAE,
    image_size: int,
    seed: int,
    batch_size: int,
    draw: Sequence[int],
    device: torch.device | str,
    strength: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Draw what a training step adds to its images and latents, on its device.

    All of it depends on the seed, the step and the image's place in the global batch alone: not on how the batch is
    split, nor on what was drawn before. Other kinds of device draw other numbers.

    Args:
        model: its dynamics draws the levels.
        image_size: side S of the images in pixels.
        seed: of the run.
        batch_size: of the global batch.
        draw: numbers of the B images, step · batch_size + place.
        device: to draw on.
        strength: τ, see `training.latent_noise`.

    Returns:
        Noise (B, 3, S, S), levels (B,), and the noise (B, c, S/f, S/f) with which latents are drawn, all but the levels
        standard normal; and what is added to the latents then, σ · noise with σ uniform in [0, τ] (Zheng et al. 2025,
        "Diffusion transformers with representation autoencoders", their noise augmentation), None where τ is 0.
    """
    side = image_size // model.config.downsample_factor
    latent_shape = (model.config.latent_channels, side, side)
    noise, level, latent_noise, augmentation = [], [], [], []
    for number in draw:
        generator = noise_generator(seed, *divmod(number, batch_size), device)
        level.append(model.dynamics.sample_level(1, generator=generator, device=device))
        noise.append(torch.randn(3, image_size, image_size, generator=generator, device=device))
        latent_noise.append(torch.randn(latent_shape, generator=generator, device=device))
        if strength:  # after all else, which is the same with and without it
            sigma = strength * torch.rand((), generator=generator, device=device)
            augmentation.append(sigma * torch.randn(latent_shape, generator=generator, device=device))
    added = torch.stack(augmentation) if augmentation else None
    return torch.stack(noise), torch.cat(level), torch.stack(latent_noise), added


def augmented(z: Tensor, augmentation: Tensor | None) -> Tensor:
    """Latents with what `draw_noise` adds to them, in their own dtype."""
    return z if augmentation is None else z + augmentation.to(z.dtype)


def trains(module: nn.Module) -> bool:
    """Whether any parameter of a module trains."""
    return any(parameter.requires_grad for parameter in module.parameters())


def decode_or_nan(model: DCSSDAE, z: Tensor, **settings: Any) -> Tensor:
    """Decode latents (B, c, h, w) to float32 images; one whose latent is not finite becomes NaN.

    `DCSSDAE.decode` refuses such latents. Here they are a step to be thrown away, or a measure that is not finite.
    """
    usable = is_finite(z).view(-1, 1, 1, 1)
    images = model.decode(torch.where(usable, z, 0.0), **settings).sample.float()
    return torch.where(usable, images, torch.nan)


def _untouched(module: nn.Module, prefix: str, trained: Set[str]) -> Iterator[nn.Module]:
    """The largest modules that hold tensors none of which trains."""
    names = [f"{prefix}{name}" for name in module.state_dict()]
    if names and trained.isdisjoint(names):
        yield module
        return
    for name, child in module.named_children():
        yield from _untouched(child, f"{prefix}{name}.", trained)
