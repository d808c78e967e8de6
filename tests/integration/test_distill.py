"""Distillation end to end: one step comes to land where several did."""

from pathlib import Path

import torch
from tiny import make_images, metrics
from training_runs import train, write_config

from dc_ssdae import DCSSDAE
from dc_ssdae.data.images import read_image

K = 6


def test_one_step_comes_closer_to_several(tmp_path: Path) -> None:
    make_images(tmp_path / "train", 24)
    make_images(tmp_path / "validation", 8, seed=1)
    log, teacher, student = tmp_path / "log", tmp_path / "teacher", tmp_path / "student"
    settings = {"optimizer": "adamw", "lr": 3.0e-3, "gradient_clip": 1.0, "ema_start": 0}
    rarely = {"checkpoint_every": 1000, "evaluate_every": 1000, "sample_images": 0, "latent_statistics": 0}
    config = write_config(tmp_path / "config.yaml", tmp_path, steps=100, **settings, **rarely)
    # Until one step and several clearly differ.
    assert train(["--config", str(config), "--training.output", str(teacher)], log) == 0, log.read_text()
    words = ["--teacher", str(teacher), "--steps", str(K), "--training.output", str(student)]
    words += ["--training.steps", "70", "--training.lr", "2e-3"]
    assert train(words, log, command="distill") == 0, log.read_text()

    models = [DCSSDAE.from_pretrained(path / "model") for path in (teacher, student)]
    crops = [read_image(file).pixels[:, :32, :32] for file in sorted((tmp_path / "validation").iterdir())]
    x = torch.stack(crops).float() / 127.5 - 1.0
    with torch.no_grad():
        z = models[0].encode(x).latent_dist.sample()
        noise = torch.randn(x.shape)
        target = models[0].decode(z, num_steps=K, noise=noise).sample
        before, after = ((model.decode(z, noise=noise).sample - target).square().mean() for model in models)
    assert before > 0.01, "the teacher's one step and its several do not differ: there is nothing to learn"
    assert after < 0.5 * before
    losses = [line["loss/dynamics"] for line in metrics(student)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
