"""Runs whose objective looks through frozen backbones: what is saved, said, resumed, and refused before training."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from terms import Hooked
from tiny import make_images, run_config, yaml_of

from dc_ssdae import DCSSDAE
from dc_ssdae.errors import InputError
from dc_ssdae.latent import LatentStatistics
from dc_ssdae.model_folder import write_latent_statistics
from dc_ssdae.training.build import build_step, place_step
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.logging import read_lines
from dc_ssdae.training.start import resume_run, start_run

LOSSES: dict[str, Any] = {
    "lpips": {"weight": 0.5, "init_args": {"net": "squeeze", "weights": "random"}},
    "repa": {"weight": 0.25, "init_args": {"backbone": "test_vit", "weights": "random"}},
}
"""Small networks in the places of VGG-16 and DINOv2."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    make_images(root / "train", 6)
    make_images(root / "validation", 2, seed=1)
    return root


def train(config: RunConfig, path: Path) -> Path:
    start_run(config, yaml_of(config), path, cpu=True)
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    last = path / "checkpoints" / "last"
    return {
        f"{file}/{name}": tensor
        for file in ("model", "ema", "optimizer")
        for name, tensor in load_file(last / f"{file}.safetensors").items()
    }


def test_the_head_is_saved_and_the_backbones_are_not(images: Path, tmp_path: Path) -> None:
    path = train(run_config(images, losses=LOSSES, steps=2), tmp_path / "run")
    saved = tensors(path)
    of_objective = {name for name in saved if name.startswith("model/objective.")}
    assert of_objective == {
        f"model/objective.terms.repa.head.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    published = load_file(path / "model" / "diffusion_pytorch_model.safetensors")
    assert published.keys() == DCSSDAE.from_pretrained(path / "model").state_dict().keys()
    # Backbones included it would be millions of values.
    assert sum(tensor.numel() for name, tensor in saved.items() if name.startswith("model/")) < 100_000


def test_random_weights_are_said_wherever_their_numbers_are(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = train(run_config(images, losses=LOSSES, steps=2, evaluate_every=1), tmp_path / "run")
    assert "losses.lpips, losses.repa: random weights in the backbone" in capsys.readouterr().err
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        for line in read_lines(path / file):
            assert line["random_backbones"] == ["lpips", "repa"]
    plain = train(run_config(images, steps=2, evaluate_every=1), tmp_path / "plain")
    assert "random" not in (plain / "metrics.jsonl").read_text() + (plain / "evaluations.jsonl").read_text()


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free_radam"])
def test_a_stopped_run_ends_with_the_same_bits(images: Path, tmp_path: Path, optimizer: str) -> None:
    losses = {**LOSSES, "hooked": {"weight": 0.1, "class_path": "terms.Hooked"}}
    config = run_config(images, losses=losses, steps=5, optimizer=optimizer)
    whole = train(config, tmp_path / "whole")

    def stop(call: int, value: torch.Tensor) -> torch.Tensor:
        if call == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return value

    Hooked.hook = stop
    try:
        part = train(config, tmp_path / "part")
    finally:
        Hooked.hook = None
    assert len(read_lines(part / "metrics.jsonl")) == 3
    resume_run(config, None, part, cpu=True)
    first, second = tensors(whole), tensors(part)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_every_parameter_that_trains_gets_a_gradient(images: Path) -> None:
    step = build_step(run_config(images, losses=LOSSES)).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in step.parameters():  # what begins at zero would hide what comes before it
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    noise, latent_noise = torch.randn(2, 3, 32, 32, generator=generator), torch.randn(2, 4, 4, 4, generator=generator)
    losses = step(pixels, noise, torch.rand(2, generator=generator), latent_noise)
    assert losses.terms.keys() == {"dynamics", "lpips", "repa", "kl"}
    losses.total.backward()
    for name, parameter in step.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_the_networks_of_a_step_move_together(images: Path) -> None:
    config = run_config(images, losses=LOSSES, channels_last=True)
    step = build_step(config)
    place_step(step, config, torch.device("cpu"))
    trunk = step.objective.terms["lpips"].backbone.network.trunk
    assert not any(module.training for module in trunk.modules())
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    wide = [p for p in trunk.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert wide
    assert all(parameter.is_contiguous(memory_format=torch.channels_last) for parameter in wide)


@pytest.mark.parametrize("term", ["lpips", "repa"])
def test_missing_weights_end_it_before_anything_is_written(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    (tmp_path / "weights").mkdir()
    settings = {name: value for name, value in LOSSES[term]["init_args"].items() if name != "weights"}
    settings["weights"] = str(tmp_path / "weights")
    config = run_config(images, losses={term: {"weight": 1.0, "init_args": settings}})
    with pytest.raises(InputError) as error:
        train(config, tmp_path / "run")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"losses.{term}.init_args.weights is "), "not that they do not fit"
    assert {"lpips": "squeezenet1_1-", "repa": "test_vit."}[term] in message
    assert not (tmp_path / "run").exists()


def test_a_config_with_unknown_settings_of_a_term_is_refused(images: Path, tmp_path: Path) -> None:
    for term in ("lpips", "repa"):
        with pytest.raises(InputError, match=rf"losses.{term}: .* does not take these init_args: .*'weight'"):
            train(run_config(images, losses={term: {"init_args": {"weight": "random"}}}), tmp_path / "run")


@pytest.mark.parametrize(
    ("term", "settings"),
    [("lpips", {"weights": 5}), ("lpips", {"net": ["vgg"]}), ("repa", {"layer": "abc"}), ("repa", {"backbone": 5})],
)
def test_settings_of_a_wrong_type_are_refused_in_one_line(
    images: Path, tmp_path: Path, term: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(InputError) as error:
        train(run_config(images, losses={term: {"weight": 1.0, "init_args": settings}}), tmp_path / "run")
    assert f"losses.{term}" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_decoder_without_features_is_refused_in_one_line(images: Path, tmp_path: Path) -> None:
    model = {"decoder": {"class_path": "terms.PlainDecoder", "init_args": {}}}
    with pytest.raises(InputError, match=r"PlainDecoder has no forward_with_features; leave .*--losses.repa 0"):
        train(run_config(images, model=model, losses={"repa": LOSSES["repa"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_term_of_a_users_own_reads_features_too(images: Path, tmp_path: Path) -> None:
    own = {"own": {"weight": 1.0, "class_path": "terms.FeatureNorm"}}
    path = train(run_config(images, losses=own, steps=1), tmp_path / "run")
    (line,) = read_lines(path / "metrics.jsonl")
    assert line["loss/own"] > 0


def test_the_latents_statistics_are_in_the_models_config_at_the_end(images: Path, tmp_path: Path) -> None:
    config = run_config(images, steps=4, latent_statistics=4)
    path = train(config, tmp_path / "run")
    settings = json.loads((path / "model" / "config.json").read_text())
    assert len(settings["latents_mean"]) == len(settings["latents_std"]) == 4
    state = json.loads((path / "checkpoints" / "last" / "state.json").read_text())
    assert state["latent_statistics"] == {
        "mean": settings["latents_mean"],
        "std": settings["latents_std"],
        "count": 4,
    }
    # What the command has measured since stays, when the finished run is looked at again.
    write_latent_statistics(path / "model", LatentStatistics([1.0] * 4, [2.0] * 4, 9))
    assert resume_run(config, None, path, cpu=True) is None
    assert json.loads((path / "model" / "config.json").read_text())["latents_mean"] == [1.0] * 4
    # A longer budget changes the weights: what was measured goes, and comes back at the new end.
    resume_run(config.with_training(steps=8, checkpoint_every=2), None, path, cpu=True)
    again = json.loads((path / "model" / "config.json").read_text())
    assert again["latents_mean"] != settings["latents_mean"]
    none = train(run_config(images, steps=2, latent_statistics=0), tmp_path / "none")
    assert json.loads((none / "model" / "config.json").read_text())["latents_mean"] is None
