"""Teacher and student side by side: the figures by hand, the picture, broken images, the report's file."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import SIZE, make_images, run_config
from torch import Tensor

from dc_ssdae import DCSSDAE
from dc_ssdae.data.images import read_image
from dc_ssdae.data.loader import ValidationImages
from dc_ssdae.errors import InputError
from dc_ssdae.training.build import build_model
from dc_ssdae.training.comparison import PICTURED, SMALLEST_TILE, Decoding, compare, compare_distilled
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


FLOW = {"class_path": "FlowMatching"}


@pytest.fixture(scope="module")
def teacher() -> DCSSDAE:
    return random_model(1)


@pytest.fixture(scope="module")
def student() -> DCSSDAE:
    return random_model(2)


def levels(output: Tensor) -> Tensor:
    """Pixels of an output in [-1, 1], as numbers from 0 to 255."""
    return ((output.clamp(-1.0, 1.0) + 1.0) * 127.5).round().double()


@pytest.mark.parametrize(("steps", "step_size"), [(3, None), (4, 0.3), (1, None)])
def test_the_figures_by_hand(teacher: DCSSDAE, student: DCSSDAE, steps: int, step_size: float | None) -> None:
    squares = Squares(11)  # more than one batch
    found, count = compare(teacher, student, squares.validation(), steps, step_size)
    assert count == 11
    plural = "s" if steps > 1 else ""
    assert [row.name for row in found] == ["teacher, 1 step", f"teacher, {steps} step{plural}", "student, 1 step"]
    assert [row.steps for row in found] == [1, steps, 1]

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
        assert row.psnr == pytest.approx(psnr, abs=1e-3)
        assert row.mse == pytest.approx(mse, rel=1e-3)
        assert row.to_target == pytest.approx(to_target, rel=1e-3, abs=1e-9)
        assert -1.0 < row.ssim < 1.0
    assert found[1].to_target == 0.0
    assert found[2].to_target > 1e-4
    if steps > 1:
        assert found[0].to_target > 1e-4


def test_flow_matching_compares_too() -> None:
    found, count = compare(random_model(1, FLOW), random_model(2, FLOW), Squares(2).validation(), 4, None)
    assert count == 2
    assert found[1].to_target == 0.0
    assert min(found[0].to_target, found[2].to_target) > 1e-5


def test_a_student_that_is_its_teacher(teacher: DCSSDAE) -> None:
    one, several, same = compare(teacher, teacher, Squares(3).validation(), 3, None)[0]
    assert same == one._replace(name="student, 1 step")
    assert several.to_target == 0.0


def test_the_picture(teacher: DCSSDAE, student: DCSSDAE, tmp_path: Path) -> None:
    squares = Squares(PICTURED + 3, broken=(1,))
    compare(teacher, student, squares.validation(), 3, None, tmp_path / "picture.png")
    page = read_image(tmp_path / "picture.png").pixels
    margin = page.shape[2] - PICTURED * SIZE * ZOOM
    assert page.shape[1] == 4 * SIZE * ZOOM
    for label in page[:, :, :margin].chunk(4, dim=1):
        assert int(label.min()) < 100, "a row has no name"
        assert float((label == 255).float().mean()) > 0.8
    assert (page[:, :, 0] == 255).all(), "a name is cut off"
    assert (page[:, :, margin - 2] == 255).all(), "a name runs into the images"
    enlarged = page[:, :, margin:]
    pixels = enlarged[:, ::ZOOM, ::ZOOM]
    again = pixels.repeat_interleave(ZOOM, dim=1).repeat_interleave(ZOOM, dim=2)
    assert torch.equal(enlarged, again)
    shown = [image for place, image in enumerate(squares.images) if place != 1][:PICTURED]
    with torch.no_grad():
        for column, original in enumerate(shown):
            z = teacher.encoder(original[None].float() / 127.5 - 1.0).mean
            steps = ((teacher, 1), (teacher, 3), (student, 1))
            outputs = [levels(model.decode(z, num_steps=count).sample[0]) for model, count in steps]
            for row, expected in enumerate((original.double(), *outputs)):
                cell = pixels[:, row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
                assert (cell.double() - expected).abs().max() <= 1.0, (row, column)
            assert torch.equal(pixels[:, :SIZE, column * SIZE : (column + 1) * SIZE], original)


def test_the_picture_of_two(teacher: DCSSDAE, student: DCSSDAE, tmp_path: Path) -> None:
    compare(teacher, student, Squares(2).validation(), 2, None, tmp_path / "picture.png")
    _, height, width = read_image(tmp_path / "picture.png").pixels.shape
    assert height == 4 * SIZE * ZOOM
    assert 2 * SIZE * ZOOM < width < 4 * SIZE * ZOOM


def test_broken_images_are_left_out(teacher: DCSSDAE, student: DCSSDAE) -> None:
    broken = (*range(8), 9)  # a whole batch, and one of the next
    squares = Squares(12, broken)
    found, count = compare(teacher, student, squares.validation(), 2, None)
    assert count == 3
    whole = Squares(3)
    whole.images = [squares.images[place] for place in (8, 10, 11)]
    for row, expected in zip(found, compare(teacher, student, whole.validation(), 2, None)[0], strict=True):
        assert row[:2] == expected[:2]
        assert row[2:] == pytest.approx(expected[2:], rel=1e-5)


def test_where_no_image_can_be_read(teacher: DCSSDAE, student: DCSSDAE, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image can be read"):
        compare(teacher, student, Squares(2, (0, 1)).validation(), 2, None, tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


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


def no_constant(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


def test_what_is_written_and_said(photos: Path, teacher: DCSSDAE, student: DCSSDAE, tmp_path: Path) -> None:
    path = tmp_path / "run"
    config = run_of(path, photos, teacher, student)
    said = compare_distilled(config, path).splitlines()
    report = json.loads((path / "distillation.json").read_text(), parse_constant=no_constant)
    decodings = [Decoding(**entry) for entry in report.pop("decodings")]
    assert report == {
        "images": 3,
        "split": "validation",
        "image_size": SIZE,
        "teacher_steps": 3,
        "step_size": None,
        "random_backbones": [],
    }
    assert [decoding.name for decoding in decodings] == ["teacher, 1 step", "teacher, 3 steps", "student, 1 step"]
    assert len(said) == 6
    for line, decoding in zip(said[1:4], decodings, strict=True):
        assert line.startswith(decoding.name)
        numbers = [float(word) for word in line.removeprefix(decoding.name).split()]
        expected = [decoding.psnr, decoding.ssim, decoding.mse, decoding.to_target]
        assert numbers == pytest.approx(expected, abs=0.006)
    assert len({len(line) for line in said[:4]}) == 1, "the columns are not aligned"
    assert "3 validation images of 32 px" in said[4]
    assert said[5] == f"{path / 'distillation.json'}, {path / 'distillation.png'}"
    with Image.open(path / "distillation.png") as picture:
        assert picture.height == 4 * SIZE * ZOOM

    first = (path / "distillation.json").read_bytes()
    compare_distilled(config, path)
    assert (path / "distillation.json").read_bytes() == first


def test_without_validation_images_it_takes_training_images_and_says_so(
    photos: Path, teacher: DCSSDAE, student: DCSSDAE, tmp_path: Path
) -> None:
    config = run_of(tmp_path / "run", photos / "train", teacher, student)
    assert "4 training images" in compare_distilled(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "distillation.json").read_text())["split"] == "training"


def test_random_backbones_are_noted(photos: Path, teacher: DCSSDAE, student: DCSSDAE, tmp_path: Path) -> None:
    config = run_of(
        tmp_path / "run",
        photos,
        teacher,
        student,
        lpips={"weight": 0.5, "init_args": {"weights": "random"}},
        repa={"weight": 0.0, "init_args": {"weights": "random"}},
    )
    said = compare_distilled(config, tmp_path / "run")
    assert "losses.lpips had random weights" in said
    assert "losses.repa" not in said
    assert json.loads((tmp_path / "run" / "distillation.json").read_text())["random_backbones"] == ["lpips"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_still_json(
    photos: Path, teacher: DCSSDAE, tmp_path: Path, value: float
) -> None:
    broken = random_model(3)
    with torch.no_grad():
        broken.decoder.conv_out.bias.fill_(value)
    config = run_of(tmp_path / "run", photos, teacher, broken)
    said = compare_distilled(config, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "distillation.json").read_text(), parse_constant=no_constant)
    assert report["decodings"][2]["to_target"] is None
    assert report["decodings"][0]["to_target"] > 0.0
    assert str(value) in said


def test_a_damaged_teacher_is_one_line(photos: Path, teacher: DCSSDAE, student: DCSSDAE, tmp_path: Path) -> None:
    config = run_of(tmp_path / "run", photos, teacher, student)
    file = tmp_path / "run" / "teacher" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(InputError, match="teacher") as caught:
        compare_distilled(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
