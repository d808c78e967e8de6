"""`dc-ssdae export`: programs of a saved model, and what is refused before it is loaded."""

from pathlib import Path

import pytest
import torch
from cli_samples import Refusal, Run

from dc_ssdae import DCSSDAE


def test_programs_of_a_saved_model(run: Run, model_dir: Path, tmp_path: Path) -> None:
    """The other format, ONNX, is tested in tests/interop/test_export.py."""
    out = tmp_path / "made" / "programs"
    outcome = run("export", "--model", model_dir, "--out", out, "--size", 16, 24)
    assert (outcome.code, outcome.err) == (0, [])
    encoder, decoder, files = outcome.out
    assert encoder.startswith("encoder.pt2: ")
    assert decoder.startswith("decoder.pt2: ")
    assert files.startswith("decoder.pt2, encoder.pt2, export.json, noise.safetensors -> ")
    assert [path.name for path in out.parent.iterdir()] == ["programs"]
    model = DCSSDAE.from_pretrained(model_dir)
    x, noise = torch.rand(3, 3, 16, 24), torch.randn(3, 3, 16, 24)
    with torch.no_grad():
        mean, _ = torch.export.load(out / "encoder.pt2").module()(x)
        image = torch.export.load(out / "decoder.pt2").module()(mean, noise)
        assert torch.allclose(mean, model.encode(x).latent_dist.mean, atol=1e-4)
        assert torch.allclose(image, model.decode(mean, noise=noise).sample, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--size 8 8 8", "--size"),
        ("--size 12", "12"),
        ("--size 8 --noise_size 16", "--noise_size"),
        ("--format onnx --dtype bfloat16", "--dtype"),
    ],
)
def test_options_that_do_not_fit_write_nothing(
    refusal: Refusal, model_dir: Path, tmp_path: Path, words: str, named: str
) -> None:
    assert named in refusal("export", "--model", model_dir, "--out", tmp_path / "out", *words.split())
    assert not list(tmp_path.iterdir())
