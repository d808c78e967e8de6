"""Runs whose objective looks through frozen backbones: what is saved, said, resumed, and refused before training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import last, resume, run_config, start

from dc_ssdae import DCSSDAE
from dc_ssdae.errors import InputError
from dc_ssdae.latent import LatentStatistics
from dc_ssdae.model_folder import write_latent_statistics
from dc_ssdae.training.build import build_step
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.logging import read_lines

LOSSES: dict[str, Any] = {
    "lpips": {"weight": 0.5, "init_args": {"net": "squeeze", "weights": "random"}},
    "repa": {"weight": 0.25, "init_args": {"backbone": "test_vit", "weights": "random"}},
}
"""Small networks in the places of VGG-16 and DINOv2."""


def train(config: RunConfig, path: Path) -> Path:
    start(config, path)
    return path


def test_the_head_is_saved_backbones_are_not_and_random_weights_are_said(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = train(run_config(images, losses=LOSSES, steps=2, evaluate_every=1), tmp_path / "run")
    saved = last(path).tensors["model"]
    assert {name for name in saved if name.startswith("objective.")} == {
        f"objective.terms.repa.head.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    # Backbones included it would be millions of values.
    assert sum(tensor.numel() for tensor in saved.values()) < 100_000
    published = load_file(path / "model" / "diffusion_pytorch_model.safetensors")
    assert published.keys() == DCSSDAE.from_pretrained(path / "model").state_dict().keys()
    assert "losses.lpips, losses.repa: random weights in the backbone" in capsys.readouterr().err
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        for line in read_lines(path / file):
            assert line["random_backbones"] == ["lpips", "repa"]
    plain = train(run_config(images, steps=2, evaluate_every=1), tmp_path / "plain")
    assert "random" not in (plain / "metrics.jsonl").read_text() + (plain / "evaluations.jsonl").read_text()


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


@pytest.mark.parametrize("term", ["lpips", "repa"])
def test_missing_weights_end_it_before_anything_is_written(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    (tmp_path / "weights").mkdir()
    settings = {**LOSSES[term]["init_args"], "weights": str(tmp_path / "weights")}
    message = refused(run_config(images, losses={term: {"weight": 1.0, "init_args": settings}}), tmp_path)
    assert message.startswith(f"losses.{term}.init_args.weights is "), "not that they do not fit"
    assert {"lpips": "squeezenet1_1-", "repa": "test_vit."}[term] in message


@pytest.mark.parametrize(
    ("term", "settings"),
    [
        ("lpips", {"weight": "random"}),
        ("repa", {"backbone": 5}),
        ("repa", {"layer": 99}),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    images: Path, tmp_path: Path, term: str, settings: dict[str, Any]
) -> None:
    settings = {**LOSSES[term]["init_args"], **settings}
    refused(run_config(images, losses={term: {"weight": 1.0, "init_args": settings}}), tmp_path)


def test_a_decoder_without_features_is_refused(images: Path, tmp_path: Path) -> None:
    model = {"decoder": {"class_path": "terms.PlainDecoder", "init_args": {}}}
    message = refused(run_config(images, model=model, losses={"repa": LOSSES["repa"]}), tmp_path)
    assert "PlainDecoder" in message
    assert "--losses.repa 0" in message


def refused(config: RunConfig, folder: Path) -> str:
    """The one line that ends a run, of which nothing is left."""
    with pytest.raises(InputError) as error:
        train(config, folder / "run")
    assert "\n" not in str(error.value)
    assert not (folder / "run").exists()
    return str(error.value)


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
    assert resume(config, path) is None
    assert json.loads((path / "model" / "config.json").read_text())["latents_mean"] == [1.0] * 4
    # A longer budget changes the weights: what was measured goes, and comes back at the new end.
    resume(config.with_training(steps=8, checkpoint_every=2), path)
    again = json.loads((path / "model" / "config.json").read_text())
    assert again["latents_mean"] != settings["latents_mean"]
    none = train(run_config(images, steps=2, latent_statistics=0), tmp_path / "none")
    assert json.loads((none / "model" / "config.json").read_text())["latents_mean"] is None
