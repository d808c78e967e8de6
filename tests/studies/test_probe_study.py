"""The probe puts latents that were spoilt on purpose behind clean ones: it measures something."""

import json
from pathlib import Path

import probe
import pytest
import torch

from dc_ssdae.cli.main import main


@pytest.mark.usefixtures("without_gradients")
def test_latents_are_spoilt_by_the_image_alone() -> None:
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    clean = probe.Spoilt().model.encode(x).latent_dist.mode()
    noisy, shuffled = (kind().encode(x) for kind in (probe.Noisy, probe.Shuffled))
    torch.testing.assert_close(probe.Noisy().encode(x[1:]), noisy[1:])
    std = torch.tensor(probe.Noisy().model.config.latents_std)
    assert ((noisy - clean) / std.view(-1, 1, 1)).std() == pytest.approx(1.0, abs=0.15)
    for latent, original in zip(shuffled, clean, strict=True):
        assert torch.equal(latent.flatten(1).sum(dim=1).sort()[0], original.flatten(1).sum(dim=1).sort()[0])
        assert not torch.equal(latent, original)


@pytest.mark.slow
def test_spoilt_latents_come_out_worse(
    data_dir: Path, squeezenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About a minute of training for each; the study has three seeds and more steps."""
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(squeezenet))
    monkeypatch.chdir(Path(probe.__file__).parent)  # where python:probe.Noisy is found
    words = ["--data", str(data_dir), "--size", "64", "--steps", "250", "--workers", "0", "--device", "cpu"]
    found = {}
    for name, model in probe.studies(tmp_path)["spoilt"].items():
        folder = tmp_path / name
        assert main(["probe", *model, *words, "--samples", "300", "--out", str(folder)]) == 0
        found[name] = json.loads((folder / "probe.json").read_text())
    losses = {name: report["loss"]["value"] for name, report in found.items()}
    distances = {
        name: next(line["value"]["value"] for line in report["distances"] if line["images"] == "samples")
        for name, report in found.items()
    }
    for name in ("noise", "shuffled channels"):
        assert losses["clean"] < losses[name]
        assert distances["clean"] < distances[name]
