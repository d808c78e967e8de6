"""Teacher and student side by side: the figures by hand, the picture, broken images, the report's file."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZE, make_images, run_config
from torch import Tensor

from dc_ssdae import DCSSDAE
from dc_ssdae.data.images import read_image
from dc_ssdae.data.loader import ValidationImages
from dc_ssdae.errors import InputError
from dc_ssdae.training.build import build_model
from dc_ssdae.training.comparison import LABEL_WIDTH, PICTURED, SMALLEST_TILE, compare, compare_distilled
from dc_ssdae.training.config import DistillationConfig, RunConfig

ZOOM = SMALLEST_TILE // SIZE


class Squares:
    """A data set of random squares in memory, of which some cannot be read."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(count)
        self.images = [
            torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8) for _ in range(count)
        ]
        self._broken = broken

    def __len__(self) -> int:
        return len(self.images)

    @property
    def blocks(self) -> list[int]:
        return [len(self)]

    def name(self, index: int) -> str:
        return f"square {index}"

    def read(self, index: int) -> Tensor:
        if index in self._broken:
            raise InputError(f"square {index} is broken")
        return self.images[index]

    def validation(self) -> ValidationImages:
        return ValidationImages(self, SIZE, 100)


def random_model(seed: int, dynamics: dict[str, Any] | None = None) -> DCSSDAE:
    """A tiny model of which nothing is zero."""
    torch.manual_seed(seed)
    model = build_model(run_config(model={"dynamics": dynamics}).model)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def teacher() -> DCSSDAE:
    return random_model(1)


@pytest.fixture(scope="module")
def student() -> DCSSDAE:
    return random_model(2)


def levels(output: Tensor) -> Tensor:
    """Pixels of an output in [-1, 1], as numbers from 0 to 255."""
    return ((output.clamp(-1.0, 1.0) + 1.0) * 127.5).round().double()


FLOW = {"class_path": "FlowMatching"}


@pytest.mark.parametrize(
    ("dynamics", "steps", "step_size"), [(None, 3, None), (None, 4, 0.3), (None, 1, None), (FLOW, 4, None)]
)
def test_the_figures_by_hand(dynamics: dict[str, Any] | None, steps: int, step_size: float | None) -> None:
    teacher, student = random_model(1, dynamics), random_model(2, dynamics)
    squares = Squares(11)  # more than one batch
    found, count = compare(teacher, student, squares.validation(), steps, step_size)
    assert count == 11
    plural = "s" if steps > 1 else ""
    assert [row["name"] for row in found] == ["teacher, 1 step", f"teacher, {steps} step{plural}", "student, 1 step"]
    assert [row["steps"] for row in found] == [1, steps, 1]

    several = {"num_steps": steps, "step_size": step_size if steps > 1 else None}
    expected: list[list[list[float]]] = [[], [], []]
    with torch.no_grad():
        for original in squares.images:
            x = original[None].float() / 127.5 - 1.0
            z = teacher.encoder(x).mean
            target = teacher.decode(z, **several).sample
            for row, output in zip(expected, (teacher.decode(z).sample, target, student.decode(z).sample), strict=True):
                error = float((levels(output[0]) - original).div(255.0).square().mean())
                row.append([-10.0 * math.log10(error), error, float((output - target).square().mean())])
    for row, values in zip(found, expected, strict=True):
        psnr, mse, to_target = torch.tensor(values, dtype=torch.float64).mean(dim=0).tolist()
        assert row["psnr"] == pytest.approx(psnr, abs=1e-3)
        assert row["mse"] == pytest.approx(mse, rel=1e-3)
        assert row["to_target"] == pytest.approx(to_target, rel=1e-3, abs=1e-9)
        assert -1.0 < row["ssim"] < 1.0
    assert found[1]["to_target"] == 0.0
    assert found[2]["to_target"] > 1e-4
    if steps > 1:
        assert found[0]["to_target"] > 1e-4


def test_the_picture(teacher: DCSSDAE, student: DCSSDAE, tmp_path: Path) -> None:
    squares = Squares(PICTURED + 3, broken=(1,))
    compare(teacher, student, squares.validation(), 3, None, tmp_path / "picture.png")
    page = read_image(tmp_path / "picture.png").pixels
    assert page.shape == (3, 4 * SIZE * ZOOM, LABEL_WIDTH + PICTURED * SIZE * ZOOM)
    for label in page[:, :, :LABEL_WIDTH].chunk(4, dim=1):
        assert int(label.min()) < 100, "a row has no name"
    assert (page[:, :, [0, LABEL_WIDTH - 2]] == 255).all(), "a name is cut off"
    pixels = page[:, ::ZOOM, LABEL_WIDTH::ZOOM]
    shown = [image for place, image in enumerate(squares.images) if place != 1][:PICTURED]
    with torch.no_grad():
        for column, original in enumerate(shown):
            z = teacher.encoder(original[None].float() / 127.5 - 1.0).mean
            steps = ((teacher, 1), (teacher, 3), (student, 1))
            outputs = [levels(model.decode(z, num_steps=count).sample[0]) for model, count in steps]
            for row, expected in enumerate((original.double(), *outputs)):
                cell = pixels[:, row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
                assert (cell.double() - expected).abs().max() <= 1.0, (row, column)


def test_broken_images_are_left_out(teacher: DCSSDAE, student: DCSSDAE) -> None:
    squares = Squares(12, broken=(*range(8), 9))  # a whole batch, and one of the next
    found, count = compare(teacher, student, squares.validation(), 2, None)
    assert count == 3
    whole = Squares(3)
    whole.images = [squares.images[place] for place in (8, 10, 11)]
    for row, expected in zip(found, compare(teacher, student, whole.validation(), 2, None)[0], strict=True):
        assert list(row.values())[2:] == pytest.approx(list(expected.values())[2:], rel=1e-5)
    with pytest.raises(InputError, match="no image can be read"):
        compare(teacher, student, Squares(2, (0, 1)).validation(), 2, None)


# --- of a run ---


def run_of(path: Path, root: Path, teacher: DCSSDAE, student: DCSSDAE, **losses: Any) -> RunConfig:
    """The folder of a distillation that has ended, as far as it is read."""
    teacher.save_pretrained(path / "teacher")
    student.save_pretrained(path / "model")
    config = run_config(root, losses={"kl": 0.0, **losses}, train=["decoder"])
    return replace(config, distillation=DistillationConfig("taken/away", 3))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    make_images(root / "train", 4)
    make_images(root / "validation", 3, seed=1)
    return root


def test_what_is_written(photos: Path, teacher: DCSSDAE, student: DCSSDAE, tmp_path: Path) -> None:
    path, random = tmp_path / "run", {"init_args": {"weights": "random"}}
    config = run_of(path, photos, teacher, student, lpips={"weight": 0.5, **random}, repa={"weight": 0.0, **random})
    report = compare_distilled(config, path)
    written = (path / "distillation.json").read_bytes()
    assert json.loads(written) == report
    names = [decoding["name"] for decoding in report.pop("decodings")]
    assert names == ["teacher, 1 step", "teacher, 3 steps", "student, 1 step"]
    assert report == {
        "images": 3,
        "split": "validation",
        "image_size": SIZE,
        "teacher_steps": 3,
        "step_size": None,
        "random_backbones": ["lpips"],
    }
    assert (path / "distillation.png").is_file()
    compare_distilled(config, path)
    assert (path / "distillation.json").read_bytes() == written


def test_without_validation_images_it_takes_training_images_and_says_so(
    photos: Path, teacher: DCSSDAE, student: DCSSDAE, tmp_path: Path
) -> None:
    config = run_of(tmp_path / "run", photos / "train", teacher, student)
    report = compare_distilled(config, tmp_path / "run")
    assert (report["images"], report["split"]) == (4, "training")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_still_json(
    photos: Path, teacher: DCSSDAE, tmp_path: Path, value: float
) -> None:
    broken = random_model(3)
    with torch.no_grad():
        broken.decoder.conv_out.bias.fill_(value)
    config = run_of(tmp_path / "run", photos, teacher, broken)
    compare_distilled(config, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "distillation.json").read_text(), parse_constant=pytest.fail)
    one, _, student = report["decodings"]
    assert [student[name] for name in ("psnr", "ssim", "mse", "to_target")] == [None] * 4
    assert one["to_target"] > 0.0


def test_a_damaged_teacher_is_told(photos: Path, teacher: DCSSDAE, student: DCSSDAE, tmp_path: Path) -> None:
    config = run_of(tmp_path / "run", photos, teacher, student)
    file = tmp_path / "run" / "teacher" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(InputError, match="teacher"):
        compare_distilled(config, tmp_path / "run")
