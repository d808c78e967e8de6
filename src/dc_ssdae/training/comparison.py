"""What a distillation has come to: teacher and student side by side on the same images, latents and noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import make_grid

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import to_model_range, to_pillow, to_uint8
from dc_ssdae.data.loader import ValidationImages
from dc_ssdae.data.sources import open_sources
from dc_ssdae.errors import InputError
from dc_ssdae.files import write_json, written_beside
from dc_ssdae.training.build import load_teacher, own_classes
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.measurements import measure
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

LABEL_SIZE, LABEL_WIDTH = 16, 192
"""Of the rows' names in the picture, in pixels."""


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
    run, size = RunFolder(path), config.data.image_size
    classes = own_classes(config.model)
    teacher = load_teacher(run.teacher, classes).to(_device())
    student = DCSSDAE.from_pretrained(run.model, classes=classes).to(_device())
    images, kind = _images(config, config.data.validation_images)
    steps, step_size = config.distillation.steps, config.distillation.step_size
    decodings, count = compare(teacher, student, images, steps, step_size, path / PICTURE_FILE)
    random = [name for name, term in config.losses.items() if term.weight and term.init_args.get("weights") == "random"]
    report = {
        "images": count,
        "split": kind,
        "image_size": size,
        "teacher_steps": steps,
        "step_size": step_size,
        "random_backbones": random,
        "decodings": [decoding._asdict() for decoding in decodings],
    }
    write_json(path / REPORT_FILE, report)
    header = ("", "PSNR, dB", "SSIM", "MSE", "MSE to the teacher's result")
    lines = ["{:<20}{:>10}{:>10}{:>12}{:>30}".format(*header)]
    lines += ["{:<20}{:>10.2f}{:>10.4f}{:>12.6f}{:>30.6f}".format(name, *values) for name, _, *values in decodings]
    lines.append(f"Means over {count} {kind} images of {size} px, cut from the centre.")
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
    measured: list[list[list[float]]] = []  # by image, by decoding
    pictured: list[list[Tensor]] = []
    for start in range(0, len(images), BATCH):
        read = [images[place] for place in range(start, min(start + BATCH, len(images)))]
        originals = [image.pixels for image in read if image.broken is None]
        if not originals:
            continue
        x = to_model_range(torch.stack(originals)).to(teacher.device)
        z = teacher.encode(x).latent_dist.mode()
        target = teacher.decode(z, num_steps=steps, step_size=step_size).sample.float()
        decoded = torch.stack([teacher.decode(z).sample.float(), target, student.decode(z).sample.float()], dim=1)
        distances = (decoded - target[:, None]).square().flatten(2).mean(dim=2).tolist()
        for original, outputs, to_target in zip(originals, decoded.cpu(), distances, strict=True):
            rows = zip(outputs, to_target, strict=True)
            measured.append([[*measure(original, output), distance] for output, distance in rows])
            pictured.append([original, *to_uint8(outputs.nan_to_num())])
        del pictured[PICTURED:]
    if not measured:
        raise InputError("no image can be read: there is nothing to compare")
    if picture is not None:
        _draw(pictured, ("original", *names), picture)
    means = torch.tensor(measured, dtype=torch.float64).mean(dim=0).tolist()
    counts = (1, steps, 1)
    return [Decoding(name, n, *mean) for name, n, mean in zip(names, counts, means, strict=True)], len(measured)


def _draw(columns: Sequence[Sequence[Tensor]], names: Sequence[str], file: Path) -> None:
    """Write a PNG of images (3, S, S): a column for each sequence, and the rows' names at their left."""
    rows = [image for row in zip(*columns, strict=True) for image in row]
    grid = to_pillow(make_grid(rows, nrow=len(columns), padding=0))
    zoom = max(1, SMALLEST_TILE // rows[0].shape[-1])
    page = Image.new("RGB", (LABEL_WIDTH + zoom * grid.width, zoom * grid.height), "white")
    page.paste(grid.resize((zoom * grid.width, zoom * grid.height), Image.Resampling.NEAREST), (LABEL_WIDTH, 0))
    draw = ImageDraw.Draw(page)
    for place, name in enumerate(names):
        middle = (place + 0.5) * page.height / len(names)
        draw.text((LABEL_SIZE, middle), name, fill="black", font_size=LABEL_SIZE, anchor="lm")
    with written_beside(file) as beside:
        page.save(beside, "PNG")
