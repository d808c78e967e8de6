"""`dc-ssdae export`: programs of a saved model, and what is refused before it is loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dc_ssdae import DCSSDAE


def test_programs_of_a_saved_model(run: Callable, model_dir: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "made" / "programs"
    outcome = run("export", "--model", model_dir, "--out", out, "--format", "onnx", "--size", 16, 24)
    assert outcome.code == 0
    assert not outcome.err
    encoder, decoder, ranges, files = outcome.out
    assert encoder.startswith(
        "encoder.onnx: x (batch, 3, 16, 24) -> mean (batch, 4, 2, 3), logvar (batch, 4, 2, 3); largest difference "
    )
    assert decoder.startswith("decoder.onnx: z (batch, 4, 2, 3), noise (batch, 3, 16, 24) -> image (batch, 3, 16, 24)")
    assert ranges == "batch from 1 on"
    assert files.startswith("decoder.onnx, encoder.onnx, export.json, noise.safetensors: ")
    assert [path.name for path in out.parent.iterdir()] == ["programs"]
    session = onnxruntime.InferenceSession(out / "encoder.onnx")
    assert session.get_modelmeta().custom_metadata_map["downsample_factor"] == "8"
    model = DCSSDAE.from_pretrained(model_dir)
    x, noise = torch.rand(3, 3, 16, 24), torch.randn(3, 3, 16, 24)
    with torch.no_grad():
        expected = model.encode(x).latent_dist.mean
        image = model.decode(expected, noise=noise).sample
    mean, _ = session.run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(mean), expected, atol=1e-4)
    session = onnxruntime.InferenceSession(out / "decoder.onnx")
    (decoded,) = session.run(None, {"z": expected.numpy(), "noise": noise.numpy()})
    assert torch.allclose(torch.from_numpy(decoded), image, atol=1e-4)


def test_bad_input_is_one_line_and_writes_nothing(run: Callable, model_dir: Path, tmp_path: Path) -> None:
    def message(*words: object, out: Path = tmp_path / "out", model: object = model_dir) -> str:
        outcome = run("export", "--model", model, "--out", out, *words)
        assert outcome.code == 2
        assert not outcome.out
        (line,) = outcome.err
        return line.removeprefix("dc-ssdae export: ")

    assert "invalid choice: 'tf'" in message("--format", "tf")
    assert "one number for both, not 3 numbers" in message("--size", 8, 8, 8)
    assert "'0' is not a whole number from 1 on" in message("--size", 0)
    assert message("--size", 12) == "height is 12 pixels; it must be a multiple of f = 8, from 8 on"
    assert "with --size the noise is of that size" in message("--size", 8, "--noise_size", 16)
    assert "from float32 on the CPU" in message("--format", "onnx", "--dtype", "bfloat16")
    assert "not an empty folder" in message(out=model_dir, model="missing")
    assert "no such folder" in message(model="missing")
    assert not list(tmp_path.iterdir())
