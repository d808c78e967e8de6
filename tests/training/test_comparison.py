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
from dc_ssdae.data.loader import ValidationImages
from dc_ssdae.errors import InputError
from dc_ssdae.training.build import build_model
from dc_ssdae.training.comparison import compare, compare_distilled
from dc_ssdae.training.config import DistillationConfig, RunConfig


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


@pytest.mark.parametrize(("dynamics", "steps", "step_size"), [(None, 4, 0.3), (None, 1, None), (FLOW, 4, None)])
def test_the_figures_by_hand(dynamics: dict[str, Any] | None, steps: int, step_size: float | None) -> None:
    teacher, student = random_model(1, dynamics), random_model(2, dynamics)
    squares = Squares(11)  # more than one batch
    found, count = compare(teacher, student, squares.validation(), steps, step_size, None)
    assert count == 11
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


def test_broken_images_are_left_out(teacher: DCSSDAE, student: DCSSDAE) -> None:
    squares = Squares(12, broken=(*range(8), 9))  # a whole batch, and one of the next
    found, count = compare(teacher, student, squares.validation(), 2, None, None)
    assert count == 3
    whole = Squares(3)
    whole.images = [squares.images[place] for place in (8, 10, 11)]
    for row, expected in zip(found, compare(teacher, student, whole.validation(), 2, None, None)[0], strict=True):
        assert list(row.values())[2:] == pytest.approx(list(expected.values())[2:], rel=1e-5)
    with pytest.raises(InputError, match="no image can be read"):
        compare(teacher, student, Squares(2, (0, 1)).validation(), 2, None, None)


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


def test_numbers_that_are_not_finite_are_still_json(photos: Path, teacher: DCSSDAE, tmp_path: Path) -> None:
    broken = random_model(3)
    with torch.no_grad():
        broken.decoder.conv_out.bias.fill_(math.nan)
    config = run_of(tmp_path / "run", photos, teacher, broken)
    compare_distilled(config, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "distillation.json").read_text(), parse_constant=pytest.fail)
    one, _, student = report["decodings"]
    assert [student[name] for name in ("psnr", "ssim", "mse", "to_target")] == [None] * 4
    assert one["to_target"] > 0.0
