"""The result of a distillation: teacher and student compared on the same images, latents and noise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import to_model_range, to_uint8, write_png
from dc_ssdae.data.loader import ValidationImages, validation_loader
from dc_ssdae.data.sources import open_sources
from dc_ssdae.errors import InputError, counted
from dc_ssdae.evaluation.report.page import Photo, Table, psnr_panel, render_page
from dc_ssdae.figures import cells
from dc_ssdae.files import write_json, write_whole
from dc_ssdae.timing import describe_machine, machine_line
from dc_ssdae.training.build import load_teacher, own_classes
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.measurements import MEASURES, measure
from dc_ssdae.training.run import RunFolder

BATCH = 8

REPORT_FILE = "distillation.json"
PICTURE_FILE = "distillation.png"
PAGE_FILE = "distillation.html"
PICTURED = 6
"""Number of images in the picture."""


def open_images(config: RunConfig, most: int) -> tuple[ValidationImages, str]:
    """Open the images to compare on: the run's validation images, or training images where there are none.

    Args:
        config: of the run.
        most: largest number of images.

    Returns:
        The images, and their split, "validation" or "training".

    Raises:
        InputError: the images cannot be read.
    """
    data = config.data
    sources = open_sources(data.root, data.dataset, data.validation, data.cache)
    source, count = sources.validation or sources.train, min(most, data.validation_images)
    images = ValidationImages(source, data.image_size, count, workers_option="data.workers")
    return images, "validation" if sources.validation else "training"


def compare_distilled(config: RunConfig, path: Path) -> dict[str, Any]:
    """Compare a run's student with its teacher, and write RUN/distillation.json, .png and .html.

    Args:
        config: of the run, with its distillation; the images are those of `open_images`.
        path: of the run.

    Returns:
        What distillation.json holds: numbers of images and steps, split, losses whose backbone had random weights, and
        "decodings" of `compare`.

    Raises:
        InputError: a model or the images cannot be read.
    """
    run, classes, distillation = RunFolder(path), own_classes(config.model), config.distillation
    assert distillation is not None
    teacher, student = load_teacher(run.teacher, classes), DCSSDAE.from_pretrained(run.model, classes=classes)
    images, split = open_images(config, config.data.validation_images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps, step_size = distillation.steps, distillation.step_size
    decodings, measured, pictured = compare(teacher.to(device), student.to(device), images, steps, step_size)
    terms = {name: term.init_args for name, term in config.losses.items() if term.weight}
    report = {
        "images": measured,
        "split": split,
        "image_size": config.data.image_size,
        "teacher_steps": steps,
        "step_size": step_size,
        "random_backbones": [name for name, settings in terms.items() if settings.get("weights") == "random"],
        "decodings": decodings,
    }
    write_json(path / REPORT_FILE, report)
    tiles = torch.stack(pictured, dim=1).flatten(0, 1)
    write_png(make_grid(tiles, nrow=len(pictured), padding=0), path / PICTURE_FILE)
    write_whole(path / PAGE_FILE, _page(report, pictured))
    return report


def _page(report: Mapping[str, Any], pictured: Sequence[Tensor]) -> bytes:
    names, photos = [decoding["name"] for decoding in report["decodings"]], []
    for place, (original, *outputs) in enumerate(pictured, 1):
        panels = [psnr_panel(name, original, output) for name, output in zip(names, outputs, strict=True)]
        photos.append(Photo(f"image {place}", original, panels))
    table, machine = Table([cells(decoding) for decoding in report["decodings"]]), machine_line(describe_machine())
    return render_page("distillation.html", report=report, figures=table, pictures=photos, footer=machine)


@torch.inference_mode()
def compare(
    teacher: DCSSDAE,
    student: DCSSDAE,
    images: ValidationImages,
    steps: int,
    step_size: float | None,
) -> tuple[list[dict[str, Any]], int, list[Tensor]]:
    """Measure the teacher's one step, its K steps and the student's one step.

    Every image starts from the noise that `DCSSDAE.decode` takes by default; the latent is the mode.

    Args:
        teacher: in eval mode.
        student: in eval mode, on the same device.
        images: to measure.
        steps: K.
        step_size: of the teacher's K steps.

    Returns:
        For each of the three its name, its number of steps, and means over the images: psnr (dB), ssim and mse (of the
        full range, squared) against the originals, and to_target, the mean squared difference from the teacher's K
        steps in [-1, 1], before any rounding. The number of images. And of some images the original and the three,
        uint8 (4, 3, S, S).

    Raises:
        InputError: no image can be read.
    """
    who = [("teacher", 1), ("teacher", steps), ("student", 1)]
    measured: list[list[list[float]]] = []  # by image, by decoding
    pictured: list[Tensor] = []  # of each image the original and the decodings, (4, 3, S, S)
    for batch in validation_loader(images, range(len(images)), BATCH, workers=0):
        originals = [image.pixels for image in batch if image.broken is None]
        if not originals:
            continue
        x = to_model_range(torch.stack(originals)).to(teacher.device)
        z = teacher.encode(x).latent_dist.mode()
        target = teacher.decode(z, num_steps=steps, step_size=step_size).sample.float()
        decoded = torch.stack([teacher.decode(z).sample.float(), target, student.decode(z).sample.float()], dim=1)
        distances = (decoded - target[:, None]).square().flatten(2).mean(dim=2).tolist()
        for original, outputs, to_target in zip(originals, decoded.cpu(), distances, strict=True):
            pairs = zip(outputs, to_target, strict=True)
            measured.append([[*measure(original, output), distance] for output, distance in pairs])
            pictured.append(torch.stack([original, *to_uint8(outputs.nan_to_num())]))
        del pictured[PICTURED:]
    if not measured:
        raise InputError("no image can be read: there is nothing to compare")
    decodings = []
    for (model, count), mean in zip(who, torch.tensor(measured, dtype=torch.float64).mean(dim=0).tolist(), strict=True):
        measures = zip((*MEASURES, "to_target"), mean, strict=True)
        decodings.append({"name": f"{model}, {counted(count, 'step')}", "steps": count, **dict(measures)})
    return decodings, len(measured), pictured
