"""Runs whose objective looks through frozen backbones: what is saved, said, resumed, and refused before training."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tiny import last, resume, run_config, start

from dc_ssdae import DCSSDAE
from dc_ssdae.latent import LatentStatistics
from dc_ssdae.model_folder import read_config, write_latent_statistics
from dc_ssdae.training.logging import read_lines

LOSSES: dict[str, Any] = {
    "lpips": {"weight": 0.5, "init_args": {"net": "squeeze", "weights": "random"}},
    "repa": {"weight": 0.25, "init_args": {"backbone": "test_vit", "layer": 0, "weights": "random"}},
}
"""Small networks in the places of VGG-16 and DINOv2."""


def test_the_head_is_saved_backbones_are_not_and_random_weights_are_noted(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    own = {"own": {"weight": 1.0, "class_path": "terms.FeatureNorm"}}  # reads the decoder's features, as REPA does
    start(run_config(images, losses={**LOSSES, **own}, steps=2, evaluate_every=1), path)
    saved = last(path).tensors["model"]
    assert {name for name in saved if name.startswith("objective.")} == {
        f"objective.terms.repa.head.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    published = load_file(path / "model" / "diffusion_pytorch_model.safetensors")
    assert published.keys() == DCSSDAE.from_pretrained(path / "model").state_dict().keys()
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        for line in read_lines(path / file):
            assert line["random_backbones"] == ["lpips", "repa"]
    assert all(line["loss/own"] > 0 for line in read_lines(path / "metrics.jsonl"))


def test_the_latents_statistics_are_in_the_models_config_at_the_end(images: Path, tmp_path: Path) -> None:
    config, path = run_config(images, steps=2, latent_statistics=4), tmp_path / "run"
    start(config, path)
    settings = read_config(path / "model")
    assert len(settings["latents_mean"]) == len(settings["latents_std"]) == 4
    measured = {"mean": settings["latents_mean"], "std": settings["latents_std"], "count": 4}
    assert last(path).state["latent_statistics"] == measured
    # What the command has measured since stays, when the finished run is looked at again.
    write_latent_statistics(path / "model", LatentStatistics([1.0] * 4, [2.0] * 4, 9))
    assert resume(config, path) is None
    assert read_config(path / "model")["latents_mean"] == [1.0] * 4
    # A longer budget changes the weights: what was measured goes, and comes back at the new end.
    resume(config.with_training(steps=4), path)
    assert read_config(path / "model")["latents_mean"] not in (settings["latents_mean"], [1.0] * 4, None)
