"""The result of a distillation: teacher and student compared on the same images, latents and noise."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import write_png
from dc_ssdae.data.loader import ValidationImages
from dc_ssdae.data.sources import open_sources
from dc_ssdae.errors import counted
from dc_ssdae.evaluation.candidates import PythonCandidate
from dc_ssdae.evaluation.evaluate import EvaluationSettings, Reconstructed, evaluate, reconstruct_places
from dc_ssdae.evaluation.metric_networks import load_metrics
from dc_ssdae.evaluation.protocol import TRAINING
from dc_ssdae.evaluation.report.page import Photo, Table, psnr_panel, render_page
from dc_ssdae.figures import cells
from dc_ssdae.files import write_json, write_whole
from dc_ssdae.timing import describe_machine, machine_line
from dc_ssdae.training.build import load_teacher, own_classes
from dc_ssdae.training.config import METRICS, DistillationConfig, RunConfig
from dc_ssdae.training.measurements import PIXEL_METRICS, means
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
    models = teacher.to(device), student.to(device)
    decodings, measured, shown = compare(*models, images, distillation, PICTURED)
    report = {
        "images": measured,
        "split": split,
        "image_size": config.data.image_size,
        "teacher_steps": distillation.steps,
        "step_size": distillation.step_size,
        "random_backbones": (student.config.provenance or {}).get("random_backbones", []),
        "decodings": decodings,
    }
    write_json(path / REPORT_FILE, report)
    rows = [[image.original for image in shown[0]], *([image.output for image in row] for row in shown)]
    tiles = torch.stack([tile for row in rows for tile in row])
    write_png(make_grid(tiles, nrow=len(rows[0]), padding=0), path / PICTURE_FILE)
    write_whole(path / PAGE_FILE, _page(report, shown))
    return report


def _page(report: Mapping[str, Any], shown: Sequence[Sequence[Reconstructed]]) -> bytes:
    names, photos = [decoding["name"] for decoding in report["decodings"]], []
    for images in zip(*shown, strict=True):
        panels = [psnr_panel(name, image.original, image.output) for name, image in zip(names, images, strict=True)]
        photos.append(Photo(images[0].name, images[0].original, panels))
    table, machine = Table([cells(decoding) for decoding in report["decodings"]]), machine_line(describe_machine())
    return render_page("distillation.html", report=report, figures=table, pictures=photos, footer=machine)


@torch.no_grad()
def compare(
    teacher: DCSSDAE, student: DCSSDAE, images: ValidationImages, how: DistillationConfig, show: int = 0
) -> tuple[list[dict[str, Any]], int, list[list[Reconstructed]]]:
    """Measure the teacher's one step, its K steps and the student's one step.

    Every image starts from the noise that `DCSSDAE.decode` takes by default; the latent is the mode.

    Args:
        teacher: in eval mode.
        student: in eval mode, on the same device.
        images: to measure.
        how: the teacher's number of steps, K, and their size.
        show: how many of the images to give back.

    Returns:
        For each of the three its name, its number of steps, and means over the images: psnr (dB), ssim and mse (of the
        full range, squared) against the originals, and to_target, the mean squared difference from the teacher's K
        steps in [-1, 1], before any rounding. The number of images. For each of the three, `show` images before and
        after.

    Raises:
        InputError: no image can be read.
    """
    protocol, device = replace(TRAINING, unrounded=("to_target",)), teacher.device
    settings = EvaluationSettings(protocol, images.image_size, BATCH, in_training=True)
    suite = load_metrics(protocol, device, PIXEL_METRICS)
    several: dict[str, Any] = {"num_steps": how.steps, "step_size": how.step_size}

    def to_target(x: Tensor, output: Tensor) -> Tensor:
        target = teacher.decode(teacher.encode(x).latent_dist.mode(), **several).sample.float()
        return (output - target).square().flatten(1).mean(dim=1)

    suite.images["to_target"] = to_target
    decodings: list[dict[str, Any]] = []
    shown: list[list[Reconstructed]] = []
    for name, model, decoding in (("teacher", teacher, {}), ("teacher", teacher, several), ("student", student, {})):
        # All of them decode the teacher's latents.
        pair = SimpleNamespace(encode=teacher.encode, decode=partial(model.decode, **decoding))
        candidate, count = PythonCandidate(pair, name), decoding.get("num_steps", 1)
        found = evaluate(candidate, images, suite, settings, device)
        measures = means(found, (*METRICS, "to_target"))
        decodings.append({"name": f"{name}, {counted(count, 'step')}", "steps": count, **measures})
        places = [place for place in range(len(images)) if place not in found.broken_places]
        shown.append(reconstruct_places(candidate, images, places[:show], settings, device))
    return decodings, found.images, shown
