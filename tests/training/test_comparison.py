"""Teacher and student side by side: the figures by hand, the picture, broken images, the report's file."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from states import random_model
from tiny import SIZE, make_images, run_config

from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.data.loader import ValidationImages
from dc_ssdae.errors import InputError
from dc_ssdae.training.comparison import compare, compare_distilled
from dc_ssdae.training.config import DistillationConfig


def folder_of(path: Path) -> ValidationImages:
    return ValidationImages(ImageFolder(str(path)), SIZE, 100)


FLOW = {"class_path": "FlowMatching"}
TWO_STEPS = DistillationConfig("teacher", 2)


@pytest.mark.parametrize(("dynamics", "steps", "step_size"), [(None, 4, 0.3), (None, 1, None), (FLOW, 4, None)])
def test_the_figures_by_hand(tmp_path: Path, dynamics: Any, steps: int, step_size: float | None) -> None:
    teacher, student = random_model(1, dynamics), random_model(2, dynamics)
    images = folder_of(make_images(tmp_path, 11))  # more than one batch
    found, count, _ = compare(teacher, student, images, DistillationConfig("teacher", steps, step_size))
    assert count == 11
    assert [row["steps"] for row in found] == [1, steps, 1]

    several = {"num_steps": steps, "step_size": step_size if steps > 1 else None}
    expected: list[list[list[float]]] = [[], [], []]
    with torch.no_grad():
        for original in (images[place].pixels for place in range(11)):
            x = original[None].float() / 127.5 - 1.0
            z = teacher.encoder(x).mean
            target = teacher.decode(z, **several).sample
            for row, output in zip(expected, (teacher.decode(z).sample, target, student.decode(z).sample), strict=True):
                levels = ((output[0].clamp(-1.0, 1.0) + 1.0) * 127.5).round().double()
                error = float((levels - original).div(255.0).square().mean())
                row.append([-10.0 * math.log10(error), error, float((output - target).square().mean())])
    for row, values in zip(found, expected, strict=True):
        psnr, mse, to_target = torch.tensor(values, dtype=torch.float64).mean(dim=0).tolist()
        assert row["psnr"] == pytest.approx(psnr, abs=1e-3)
        assert row["mse"] == pytest.approx(mse, rel=1e-3)
        assert row["to_target"] == pytest.approx(to_target, rel=1e-3, abs=1e-9)
    assert found[1]["to_target"] == 0.0
    assert found[2]["to_target"] > 1e-4


def test_broken_images_are_left_out(tmp_path: Path) -> None:
    teacher, student = random_model(1), random_model(2)
    make_images(tmp_path / "some", 12)
    shutil.copytree(tmp_path / "some", tmp_path / "whole")
    for place in (*range(8), 9):  # a whole batch, and one of the next
        (tmp_path / "some" / f"image{place:04d}.png").write_bytes(b"")
        (tmp_path / "whole" / f"image{place:04d}.png").unlink()
    found, count, _ = compare(teacher, student, folder_of(tmp_path / "some"), TWO_STEPS)
    assert count == 3
    for row, expected in zip(
        found, compare(teacher, student, folder_of(tmp_path / "whole"), TWO_STEPS)[0], strict=True
    ):
        assert list(row.values())[2:] == pytest.approx(list(expected.values())[2:], rel=1e-5)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "image.png").write_bytes(b"")
    with pytest.raises(InputError, match="none of 1 image can be read"):
        compare(teacher, student, folder_of(tmp_path / "none"), TWO_STEPS)


def test_numbers_that_are_not_finite_are_still_json(images: Path, tmp_path: Path) -> None:
    broken = random_model(3)
    torch.nn.init.constant_(broken.decoder.conv_out.bias, math.nan)
    random_model(1).save_pretrained(tmp_path / "teacher")
    broken.save_pretrained(tmp_path / "model")
    config = run_config(images, losses={"kl": 0.0}, train=["decoder"])
    compare_distilled(replace(config, distillation=DistillationConfig("taken/away", 3)), tmp_path)
    report = json.loads((tmp_path / "distillation.json").read_text(), parse_constant=pytest.fail)
    one, _, student = report["decodings"]
    assert [student[name] for name in ("psnr", "ssim", "mse", "to_target")] == [None] * 4
    assert one["to_target"] > 0.0
