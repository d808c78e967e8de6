"""Distillation: one step learns to land where a frozen teacher lands in several."""

import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.dynamics import Corruption
from dc_ssdae.files import written_beside
from dc_ssdae.latent import DiagonalGaussian
from dc_ssdae.losses import Objective
from dc_ssdae.training.config import DistillationConfig
from dc_ssdae.training.step import TrainingStep, augmented, decode_or_nan


class DistillationStep(TrainingStep):
    """The step of a student: its target is what the teacher makes of the same noise and latent.

    The dynamics regresses from pure noise alone, with the teacher's K-step sample in the image's place; so do the terms
    that compare with `record.x`.

    Args:
        model: the student.
        objective: as `TrainingStep`'s.
        teacher: a model of the same architecture. It is no submodule: it neither trains nor gets into checkpoints.
        how: the teacher's number of steps, and their size.
        precision: as `TrainingStep`'s, also of the teacher's networks.
    """

    teacher: DCSSDAE

    def __init__(
        self, model: DCSSDAE, objective: Objective, teacher: DCSSDAE, how: DistillationConfig, precision: str
    ) -> None:
        super().__init__(model, objective, precision)
        # Not registered: it neither trains nor gets into checkpoints.
        object.__setattr__(self, "teacher", teacher.requires_grad_(False).eval())
        self._decode = partial(decode_or_nan, teacher, num_steps=how.steps, step_size=how.step_size)
        self.cache: TeacherCache | None = None

    def corrupt_and_encode(
        self,
        x: Tensor,
        noise: Tensor,
        level: Tensor,
        latent_noise: Tensor,
        augmentation: Tensor | None,
        draw: Tensor | None,
    ) -> tuple[Corruption, DiagonalGaussian, Tensor]:
        """Take the latent and the target from the teacher; `level` is not used.

        Args:
            x: (B, 3, S, S).
            noise: (B, 3, S, S), where both start from.
            level: (B,).
            latent_noise: (B, c, S/f, S/f): makes the latent, the teacher's, that both get.
            augmentation: (B, c, S/f, S/f), added to that latent; None adds nothing.
            draw: int64 (B,), by which the teacher's results are kept; needed where there is a cache.
        """
        dynamics = self.model.dynamics
        with torch.no_grad(), self._autocast(x):
            posterior = self.teacher.posterior(x)
            z = augmented(posterior.sample(noise=latent_noise), augmentation)
            teach = partial(self._decode, z, noise=noise)
            if self.cache is None or draw is None:
                target = teach()
            else:
                target = self.cache.get(draw, teach).to(noise.device).contiguous(memory_format=self.memory_format)
        return dynamics.corrupt(target, noise, torch.full_like(level, dynamics.noise_level)), posterior, z

    def compile_networks(self) -> None:
        """Compile the student's networks, the teacher's, and the objective's backbones."""
        super().compile_networks()
        self.teacher.encoder.compile()
        self.teacher.decoder.compile()

    def _apply(self, fn: Any, recurse: bool = True) -> "TrainingStep":
        # Of devices and memory order the teacher is part all the same.
        super()._apply(fn, recurse)
        nn.Module._apply(self.teacher, fn, recurse)
        return self


class TeacherCache:
    """The teacher's results on disk, a file an image, each written by one rename.

    Args:
        folder: made with the first file.
        count: of different draws; image n of the run is the same as image n + count.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count
        self._full = False

    def get(self, draw: Tensor, teach: Callable[[], Tensor]) -> Tensor:
        """Give the results of draws (B,), which `teach` makes and are kept where they are not there."""
        if (images := self.read(draw)) is None:
            images = teach()
            self.write(draw, images)
        return images

    def read(self, draw: Tensor) -> Tensor | None:
        """Give the results (B, 3, S, S), float32, of draws (B,); None where one is missing or damaged."""
        images = []
        try:
            for number in (draw % self.count).tolist():
                entry = load_file(self.folder / f"{number:08d}.safetensors")
                if entry["crc32"].item() != _crc32(entry["image"], number):
                    return None
                images.append(entry["image"])
        except (OSError, SafetensorError, KeyError, RuntimeError):
            return None
        return torch.stack(images)

    def write(self, draw: Tensor, images: Tensor) -> None:
        """Keep results; where the disk is full, say so once, and keep no more."""
        if self._full:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for number, image in zip((draw % self.count).tolist(), images.cpu().contiguous(), strict=True):
                file = self.folder / f"{number:08d}.safetensors"
                with written_beside(file, file.with_suffix(".partial")) as beside:
                    save_file({"image": image, "crc32": torch.tensor(_crc32(image, number))}, beside)
        except (OSError, SafetensorError) as error:
            self._full = True
            tqdm.write(f"{self.folder} cannot be written ({error}); no more results are kept", file=sys.stderr)


def _crc32(image: Tensor, number: int) -> int:
    """A checksum that also tells another draw's image, and one of another shape or dtype."""
    kind = f"{number} {image.dtype} {tuple(image.shape)}"
    return zlib.crc32(image.view(torch.uint8).numpy().tobytes(), zlib.crc32(kind.encode()))
