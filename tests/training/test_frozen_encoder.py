"""Training a decoder on an encoder that stays: what it starts from, what it costs, what is known of its latent."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batch, resume, run_config, start
from torch import Tensor

from dc_ssdae.model_folder import NOT_MEASURED, read_config, write_latent_statistics
from dc_ssdae.training.build import build_model, build_step
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.run import RunFolder, recover_run

PUBLISHED = {"scaling_factor": 0.41407, "shift_factor": 0.0, "latents_mean": None, "latents_std": None}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A saved model that knows what a published one tells of its latent."""
    torch.manual_seed(11)
    path = tmp_path / "source"
    build_model(run_config().model).save_pretrained(path)
    (path / "config.json").write_text(json.dumps({**read_config(path), **PUBLISHED}))
    return path


def frozen(images: Path | None, **given: Any) -> RunConfig:
    return run_config(images, losses={"kl": 0.0}, **{"train": ["decoder"], "latent_statistics": 4, **given})


def statistics(path: Path) -> dict[str, Any]:
    config = read_config(path / "model")
    return {name: config[name] for name in NOT_MEASURED}


def test_the_published_statistics_stay(images: Path, source: Path, tmp_path: Path) -> None:
    expected = {name: read_config(source)[name] for name in NOT_MEASURED}
    start(frozen(images, steps=2, init_from=str(source)), tmp_path / "run")
    assert statistics(tmp_path / "run") == expected
    resume(frozen(images, steps=4, init_from=str(tmp_path / "taken away")), tmp_path / "run")
    assert statistics(tmp_path / "run") == expected
    # As after a kill between the checkpoint and the model's publication.
    (tmp_path / "run" / "model" / "diffusion_pytorch_model.safetensors").unlink()
    recover_run(RunFolder(tmp_path / "run"))
    assert statistics(tmp_path / "run") == expected


def test_statistics_that_nobody_knew_are_measured_once(images: Path, source: Path, tmp_path: Path) -> None:
    write_latent_statistics(source, None)
    start(frozen(images, steps=2, init_from=str(source)), tmp_path / "run")
    found = statistics(tmp_path / "run")
    assert found["latents_mean"] is not None
    resume(frozen(images, steps=4), tmp_path / "run")
    assert statistics(tmp_path / "run") == found


@pytest.mark.parametrize("train", [["decoder"], ["encoder", "decoder"]])
def test_latents_that_stay_are_normalised_as_in_evaluation(train: list[str]) -> None:
    """A batch's own statistics would be noise: they cost half a dB on TAESD3's encoder (docs/results.md)."""
    step = build_step(frozen(None, train=train)).train()
    decoder = step.model.decoder
    seen: list[tuple[Any, Tensor]] = []
    hook = decoder.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    for number in range(3):
        step(*batch(number, 2))
    hook.remove()
    inputs, output = seen[-1]
    with torch.no_grad():
        evaluated = decoder.eval()(*inputs)
    assert torch.allclose(output, evaluated, atol=1e-5) == (train == ["decoder"])
