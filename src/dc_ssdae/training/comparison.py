"""What a distillation has come to: teacher and student side by side on the same images, latents and noise."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import to_model_range, to_pillow, to_uint8, write_png
from dc_ssdae.data.loader import ValidationImages
from dc_ssdae.data.sources import open_sources
from dc_ssdae.errors import InputError
from dc_ssdae.evaluation.metrics import mse, psnr, ssim
from dc_ssdae.files import write_whole
from dc_ssdae.training.build import load_teacher, own_classes
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.logging import finite_or_none
from dc_ssdae.training.run import RunFolder

BATCH = 8

REPORT_FILE = "distillation.json"
PICTURE_FILE = "distillation.png"
PREVIEWED = 16
"""Images that show, before a distillation, what the teacher's steps are worth."""

PICTURED = 6
"""Images in the picture."""

SMALLEST_TILE = 128
"""Smaller images are shown larger, by a whole number."""

LABEL_SIZE = 16


class Decoding(NamedTuple):
    """One way to decode: means over the images.

    psnr (dB), ssim and mse (of the full range, squared) are against the originals; `to_target` is the mean squared
    difference from the teacher's K steps in [-1, 1], before any rounding.
    """

    name: str
    steps: int
    psnr: float
    ssim: float
    mse: float
    to_target: float


def compare_distilled(config: RunConfig, path: Path) -> str:
    """Compare a run's student with its teacher, write RUN/distillation.json and .png, and give a table to print.

    Args:
        config: of the run, with its distillation.
        path: of the run.

    Raises:
        InputError: a model or the images cannot be read.
    """
    assert config.distillation is not None
    run, data = RunFolder(path), config.data
    classes = own_classes(config.model)
    teacher = load_teacher(run.teacher, classes).to(_device())
    student = DCSSDAE.from_pretrained(run.model, classes=classes).to(_device())
    images, kind = _images(config, data.validation_images)
    steps, step_size = config.distillation.steps, config.distillation.step_size
    decodings, count = compare(teacher, student, images, steps, step_size, path / PICTURE_FILE)
    random = [name for name, term in config.losses.items() if term.weight and term.init_args.get("weights") == "random"]
    report = {
        "images": count,
        "split": kind,
        "image_size": data.image_size,
        "teacher_steps": steps,
        "step_size": step_size,
        "random_backbones": random,
        "decodings": [{key: finite_or_none(v) for key, v in entry._asdict().items()} for entry in decodings],
    }
    write_whole(path / REPORT_FILE, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    lines = [_table(decodings), f"Means over {count} {kind} images of {data.image_size} px, cut from the centre."]
    if random:
        names = ", ".join(f"losses.{name}" for name in random)
        lines.append(f"{names} had random weights in the backbone: the student's numbers mean nothing.")
    return "\n".join([*lines, f"{path / REPORT_FILE}, {path / PICTURE_FILE}"])


def preview_teacher(config: RunConfig) -> str:
    """Say, before a student is trained, what the teacher's steps are worth on a few images.

    Args:
        config: of the run, with its distillation.

    Raises:
        InputError: the teacher or the images cannot be read.
    """
    assert config.distillation is not None
    steps, step_size = config.distillation.steps, config.distillation.step_size
    teacher = load_teacher(Path(config.distillation.teacher), own_classes(config.model)).to(_device())
    images, kind = _images(config, min(PREVIEWED, config.data.validation_images))
    (one, several, _), count = compare(teacher, teacher, images, steps, step_size)
    found = f"the teacher on {count} {kind} images: 1 step {one.psnr:.2f} dB, {steps} steps {several.psnr:.2f} dB PSNR"
    if several.psnr < one.psnr:
        return f"{found}; these steps make it worse: perhaps fewer --steps, or another --distillation.step_size"
    return found


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _images(config: RunConfig, limit: int) -> tuple[ValidationImages, str]:
    """Validation images, or training images where there are none; and which."""
    data = config.data
    sources = open_sources(data.root, data.dataset, data.validation, data.cache)
    source, kind = (sources.train, "training") if sources.validation is None else (sources.validation, "validation")
    return ValidationImages(source, data.image_size, limit, workers_option="data.workers"), kind


@torch.inference_mode()
def compare(
    teacher: DCSSDAE,
    student: DCSSDAE,
    images: ValidationImages,
    steps: int,
    step_size: float | None,
    picture: Path | None = None,
) -> tuple[list[Decoding], int]:
    """Measure the teacher's one step, its K steps and the student's one step.

    Every image starts from the noise that `DCSSDAE.decode` takes by default; the latent is the mode.

    Args:
        teacher: in eval mode.
        student: in eval mode, on the same device.
        images: to measure.
        steps: K.
        step_size: of the teacher's K steps.
        picture: where to write a PNG of some; a row each for the originals and the three.

    Returns:
        The three, and the number of images.

    Raises:
        InputError: no image can be read.
    """
    names = ("teacher, 1 step", f"teacher, {steps} step{'s' * (steps > 1)}", "student, 1 step")
    rows: list[list[list[float]]] = [[], [], []]
    columns: list[list[Tensor]] = []
    for start in range(0, len(images), BATCH):
        read = [images[place] for place in range(start, min(start + BATCH, len(images)))]
        originals = [image.pixels for image in read if image.broken is None]
        if not originals:
            continue
        x = to_model_range(torch.stack(originals)).to(teacher.device)
        z = teacher.encode(x).latent_dist.mode()
        target = teacher.decode(z, num_steps=steps, step_size=step_size if steps > 1 else None).sample.float()
        decoded = (teacher.decode(z).sample.float(), target, student.decode(z).sample.float())
        for row, outputs in zip(rows, decoded, strict=True):
            distances = (outputs - target).square().flatten(1).mean(dim=1).tolist()
            for original, output, distance in zip(originals, outputs.cpu(), distances, strict=True):
                pixels = to_uint8(output.nan_to_num())
                row.append([psnr(original, pixels), ssim(original, pixels), mse(original, pixels), distance])
        for place in range(min(len(originals), PICTURED - len(columns))):
            outputs = [to_uint8(part[place].cpu().nan_to_num()) for part in decoded]
            columns.append([originals[place], *outputs])
    if not rows[0]:
        raise InputError("no image can be read: there is nothing to compare")
    if picture is not None:
        write_png(_labelled(columns, ("original", *names)), picture)
    means = [torch.tensor(row, dtype=torch.float64).mean(dim=0).tolist() for row in rows]
    counts = (1, steps, 1)
    return [Decoding(name, n, *mean) for name, n, mean in zip(names, counts, means, strict=True)], len(rows[0])


def _labelled(columns: Sequence[Sequence[Tensor]], names: Sequence[str]) -> Tensor:
    """Put images (3, S, S) together: a column for each sequence, and the rows' names at their left."""
    zoom = max(1, SMALLEST_TILE // columns[0][0].shape[-1])
    grid = torch.cat([torch.cat(list(column), dim=1) for column in columns], dim=2)
    grid = grid.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
    tile = grid.shape[1] // len(names)
    font = ImageFont.load_default(size=LABEL_SIZE)
    margin = int(max(font.getlength(name) for name in names)) + 2 * LABEL_SIZE
    page = Image.new("RGB", (margin + grid.shape[2], grid.shape[1]), "white")
    page.paste(to_pillow(grid), (margin, 0))
    draw = ImageDraw.Draw(page)
    for place, name in enumerate(names):
        draw.text((LABEL_SIZE, int((place + 0.5) * tile)), name, fill="black", font=font, anchor="lm")
    return torch.from_numpy(np.array(page)).permute(2, 0, 1)


def _table(decodings: list[Decoding]) -> str:
    header = ("", "PSNR, dB", "SSIM", "MSE", "MSE to the teacher's result")
    rows = [(d.name, f"{d.psnr:.2f}", f"{d.ssim:.4f}", f"{d.mse:.6f}", f"{d.to_target:.6f}") for d in decodings]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (header, *rows)
    )
