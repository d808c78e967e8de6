"""`dc-ssdae export`: programs of a saved model, and what is refused before it is loaded."""

from pathlib import Path

import torch
from cli_samples import Run

from dc_ssdae import DCSSDAE


def test_programs_of_a_saved_model(run: Run, model_dir: Path) -> None:
    """The other format, ONNX, is tested in tests/interop/test_export.py."""
    out = Path("made/programs")
    outcome = run("export", "--model", model_dir, "--out", out, "--size", 16, 24)
    assert (outcome.code, outcome.err) == (0, [])
    encoder, decoder, _, files = outcome.out
    assert encoder.startswith("encoder.pt2: x (batch, 3, 16, 24) -> mean (batch, 4, 2, 3), logvar (batch, 4, 2, 3); ")
    assert decoder.startswith("decoder.pt2: z (batch, 4, 2, 3), noise (batch, 3, 16, 24) -> image (batch, 3, 16, 24)")
    assert files.startswith("decoder.pt2, encoder.pt2, export.json, noise.safetensors: ")
    model = DCSSDAE.from_pretrained(model_dir)
    x, noise = torch.rand(3, 3, 16, 24), torch.randn(3, 3, 16, 24)
    with torch.no_grad():
        mean, _ = torch.export.load(out / "encoder.pt2").module()(x)
        image = torch.export.load(out / "decoder.pt2").module()(mean, noise)
        assert torch.allclose(mean, model.encode(x).latent_dist.mean, atol=1e-4)
        assert torch.allclose(image, model.decode(mean, noise=noise).sample, atol=1e-4)
