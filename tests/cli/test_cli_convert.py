"""`dc-ssdae convert`: other people's checkpoints become models of this package."""

import json
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from cli_samples import WEIGHTS, Refusal, Run, save_photos
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from dc_ssdae import DCSSDAE
from dc_ssdae.interop.original import original_model_names


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of the demo preset's architecture, but with a wider window, under the original's names."""
    model = DCSSDAE.from_preset("demo", decoder={"window_radius": 5}).half()
    names = original_model_names(model)
    tensors = {names[ours]: tensor for ours, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "original.safetensors")
    return tmp_path / "original.safetensors"


def test_a_checkpoint_of_the_original(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    outcome = run("convert", "original", checkpoint, "--preset", "demo", "--out", out)
    assert (outcome.code, outcome.err) == (0, [])
    converted = DCSSDAE.from_pretrained(out)
    _, decoder, whole = outcome.out
    assert '"window_radius": 5' in decoder
    assert whole == f"{checkpoint}: {sum(p.numel() for p in converted.parameters()):,} parameters -> {out}"
    assert converted.config.decoder["init_args"]["window_radius"] == 5
    theirs = load_file(checkpoint)
    for ours, name in original_model_names(converted).items():
        found = converted.state_dict()[ours]
        assert torch.equal(found, theirs[name].to(found.dtype)), name
    assert converted.dtype == torch.float32


def test_what_does_not_fit_is_one_line_and_writes_nothing(refusal: Refusal, checkpoint: Path, tmp_path: Path) -> None:
    refuse = partial(refusal, "convert", "original", "--out", tmp_path / "out", "--preset")
    assert "did you mean 'demo'" in refuse("dmo", checkpoint)
    assert "absent.safetensors" in refuse("demo", tmp_path / "absent.safetensors")
    assert "encoder.conv_in.weight" in refuse("vq_f8c4_fm", checkpoint)
    assert not (tmp_path / "out").exists()
    assert str(tmp_path) in refusal("convert", "original", checkpoint, "--preset", "demo", "--out", tmp_path)


# --- published encoders of diffusers ---


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A small AutoencoderKL with statistics of its latent, saved."""
    AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=4 * ("DownEncoderBlock2D",),
        up_block_types=4 * ("UpDecoderBlock2D",),
        norm_num_groups=4,
        scaling_factor=0.5,
        force_upcast=False,
        shift_factor=0.25,
        latents_mean=(0.1, 0.2, 0.3, 0.4),
        latents_std=(1.0, 2.0, 3.0, 4.0),
    ).save_pretrained(tmp_path / "published")
    return tmp_path / "published"


def test_a_decoder_is_trained_on_a_published_encoder(
    run: Run, refusal: Refusal, published: Path, tmp_path: Path
) -> None:
    """From the published model to a reconstruction, by the commands that the command itself names."""
    out, trained = tmp_path / "a model", tmp_path / "run"
    outcome = run("convert", "diffusers", published, "--out", out, "--decoder-size", "XS")
    assert (outcome.code, outcome.err) == (0, [])
    tensors = load_file(published / WEIGHTS).items()
    count = sum(tensor.numel() for name, tensor in tensors if name.startswith(("encoder.", "quant_conv.")))
    first, second, told = outcome.out
    assert first == f"{published}: f8c4 KLEncoder, {count:,} parameters -> {out}"
    assert second == "as published: scaling_factor 0.5, shift_factor 0.25"
    photos = save_photos(tmp_path / "photos", "0", "1")
    words = shlex.split(told.partition("dc-ssdae ")[2].replace("PHOTOS", str(photos)))
    assert words[:5] == ["train", "--config", f"{out}/frozen_encoder.yaml", "--training.init_from", str(out)]

    quick = ("--training.steps", 1, "--training.batch_size", 2, "--data.image_size", 32, "--data.workers", 0)
    exact = ("--training.precision", "float32", "--training.output", trained)
    outcome = run(*words, *quick, *exact, "--losses.lpips", 0, "--losses.repa", 0)
    assert outcome.code == 0, outcome.err
    before, after = load_file(out / WEIGHTS), load_file(trained / "model" / WEIGHTS)
    changed = {name.partition(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"decoder"}
    statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    statistics |= {"scaling_factor": 0.5, "shift_factor": 0.25}
    for folder in (out, trained / "model"):
        assert statistics.items() <= json.loads((folder / "config.json").read_text()).items()
    assert run("reconstruct", photos / "0.png", "--model", trained, "--out", tmp_path / "seen").code == 0
    assert Image.open(tmp_path / "seen" / "0.png").size == (52, 40)

    words = ["convert", "diffusers", str(published), "--decoder", str(trained), "--out", str(tmp_path / "joined")]
    outcome = run(*words)
    assert outcome.code == 0, outcome.err
    joined = load_file(tmp_path / "joined" / WEIGHTS)
    assert all(torch.equal(tensor, after[name]) for name, tensor in joined.items())
    assert "--decoder-size" in refusal(*words, "--decoder-size", "S", "--overwrite")


def test_a_published_encoder_in_half_precision(run: Run, published: Path, tmp_path: Path) -> None:
    config = published / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": True}))
    words = ("convert", "diffusers", published, "--decoder-size", "XS", "--dynamics", "FlowMatching", "--seed", 7)
    for dtype in ("float32", "bfloat16"):
        outcome = run(*words, "--out", tmp_path / dtype, "--dtype", dtype)
        assert "unsafe in float16" in outcome.out[2]
    whole, half = (load_file(tmp_path / dtype / WEIGHTS) for dtype in ("float32", "bfloat16"))
    assert whole.keys() == half.keys()
    assert any("time_embedding" in name for name in whole)
    for name, tensor in half.items():
        assert torch.equal(tensor, whole[name].to(tensor.dtype)), name
        assert tensor.dtype == torch.bfloat16 or not tensor.is_floating_point()


def test_what_is_no_published_encoder_is_one_line_and_writes_nothing(
    refusal: Refusal, published: Path, tmp_path: Path
) -> None:
    refuse = partial(refusal, "convert", "diffusers", "--out", tmp_path / "out")
    assert str(tmp_path / "absent") in refuse(tmp_path / "absent")
    assert "did you mean 'XL'" in refuse(published, "--decoder-size", "XXL")
    assert "'Flow'" in refuse(published, "--dynamics", "Flow")
    assert not (tmp_path / "out").exists()
