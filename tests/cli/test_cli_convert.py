"""`dc-ssdae convert`: other people's checkpoints become models of this package."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_samples import WEIGHTS, Refusal, Run, save_photos
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import edit_config

from dc_ssdae import DCSSDAE
from dc_ssdae.interop.original import original_names


def test_a_checkpoint_of_the_original(run: Run, refusal: Refusal) -> None:
    """A checkpoint of the demo preset's architecture, but with a wider window, under the original's names."""
    model = DCSSDAE.from_preset("demo", decoder={"window_radius": 5}).half()
    names = original_names(model)
    theirs = {names[ours]: tensor for ours, tensor in model.state_dict().items()}
    save_file(theirs, "original.safetensors")
    words = ("convert", "original", "original.safetensors", "--out", "out", "--preset")
    assert "decoder.conv_in.weight has shape" in refusal(*words, "vq_f8c4_fm")
    assert not Path("out").exists()

    Path("out").mkdir()
    outcome = run(*words, "demo")
    assert (outcome.code, outcome.err) == (0, [])
    converted = DCSSDAE.from_pretrained("out")
    _, decoder, whole = outcome.out
    assert '"window_radius": 5' in decoder
    assert whole == f"original.safetensors: {sum(p.numel() for p in converted.parameters()):,} parameters -> out"
    for ours, found in converted.state_dict().items():
        assert torch.equal(found, theirs[names[ours]].to(found.dtype)), ours
    assert converted.dtype == torch.float32


# --- published encoders of diffusers ---

STATISTICS: dict[str, Any] = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
STATISTICS |= {"scaling_factor": 0.5, "shift_factor": 0.25}


@pytest.fixture
def published() -> Path:
    """A small AutoencoderKL with statistics of its latent, saved."""
    AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=4 * ("DownEncoderBlock2D",),
        up_block_types=4 * ("UpDecoderBlock2D",),
        norm_num_groups=4,
        force_upcast=False,
        **STATISTICS,
    ).save_pretrained("published")
    return Path("published")


def test_a_decoder_is_trained_on_a_published_encoder(run: Run, refusal: Refusal, published: Path) -> None:
    """From the published model to a reconstruction, by the commands that the command itself names."""
    outcome = run("convert", "diffusers", published, "--out", "a model", "--decoder-size", "XS")
    assert (outcome.code, outcome.err) == (0, [])
    tensors = load_file(published / WEIGHTS).items()
    count = sum(tensor.numel() for name, tensor in tensors if name.startswith(("encoder.", "quant_conv.")))
    first, second, told = outcome.out
    assert first == f"published: f8c4 KLEncoder, {count:,} parameters -> a model"
    assert second.startswith(
        "as published: scaling_factor 0.5, shift_factor 0.25, latents_mean and latents_std of each"
    )
    save_photos(Path("photos"), "0", "1")
    words = shlex.split(told.partition("dc-ssdae ")[2].replace("PHOTOS", "photos"))
    assert words[:5] == ["train", "--config", "a model/frozen_encoder.yaml", "--training.init_from", "a model"]

    quick = ("--training.steps", 1, "--training.batch_size", 2, "--data.image_size", 32, "--data.workers", 0)
    exact = ("--training.precision", "float32", "--training.output", "run")
    outcome = run(*words, *quick, *exact, "--losses.lpips", 0, "--losses.repa", 0)
    assert outcome.code == 0, outcome.err
    before, after = load_file(Path("a model", WEIGHTS)), load_file(Path("run/model", WEIGHTS))
    changed = {name.partition(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"decoder"}
    for folder in ("a model", "run/model"):
        assert STATISTICS.items() <= json.loads(Path(folder, "config.json").read_text()).items()
    assert run("reconstruct", "photos/0.png", "--model", "run", "--out", "seen").code == 0
    assert Image.open("seen/0.png").size == (52, 40)

    words = ["convert", "diffusers", "published", "--decoder", "run", "--out", "joined"]
    outcome = run(*words)
    assert outcome.code == 0, outcome.err
    joined = load_file(Path("joined", WEIGHTS))
    assert all(torch.equal(tensor, after[name]) for name, tensor in joined.items())
    assert "--decoder-size" in refusal(*words, "--decoder-size", "S", "--overwrite")


def test_a_published_encoder_in_half_precision(run: Run, refusal: Refusal, published: Path) -> None:
    edit_config(published, force_upcast=True)
    words = ("convert", "diffusers", "published", "--decoder-size", "XS", "--dynamics", "FlowMatching", "--seed", 7)
    for dtype in ("float32", "bfloat16"):
        out = run(*words, "--out", dtype, "--dtype", dtype, "--wrap").out
        assert out[0].startswith("published: f8c4 DiffusersEncoder, ")
        assert "unsafe in float16" in out[2]
    whole, half = (load_file(Path(dtype, WEIGHTS)) for dtype in ("float32", "bfloat16"))
    assert whole.keys() == half.keys()
    assert any("time_embedding" in name for name in whole)
    for name, tensor in half.items():
        assert torch.equal(tensor, whole[name].to(tensor.dtype)), name
        assert tensor.dtype == torch.bfloat16 or not tensor.is_floating_point()
    for more, named in (("--decoder-size XXL", "did you mean 'XL'"), ("--dynamics Flow", "'Flow'")):
        assert named in refusal(*words, "--out", "out", *more.split())
    assert not Path("out").exists()
