"""`dc-ssdae convert`: other people's checkpoints become models of this package."""

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli_samples import random_pixels
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from dc_ssdae import DCSSDAE
from dc_ssdae.interop.original import original_model_names


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not outlive the test: whole checkpoints are hundreds of megabytes."""
    yield tmp_path
    for entry in tmp_path.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def under_original_names(model: DCSSDAE) -> dict[str, torch.Tensor]:
    names = original_model_names(model)
    return {names[ours]: tensor for ours, tensor in model.state_dict().items()}


def test_checkpoint_of_the_reports_baseline(run: Callable, scratch: Path) -> None:
    model = DCSSDAE.from_preset("vq_f8c4_fm", decoder={"window_radius": 7}).half()
    save_file(under_original_names(model), scratch / "original.safetensors")
    words = ("convert", "original", scratch / "original.safetensors", "--preset", "vq_f8c4_fm")
    outcome = run(*words, "--out", scratch / "converted")
    assert outcome.code == 0
    assert not outcome.err
    assert outcome.out == [
        "decoder window_radius: 7, as the checkpoint shows (preset: 8)",
        f"{scratch}/original.safetensors: {34163664 + 14091979:,} parameters -> {scratch}/converted",
    ]
    converted = DCSSDAE.from_pretrained(scratch / "converted")
    assert converted.config.decoder["init_args"]["window_radius"] == 7
    assert converted.dtype == torch.float32
    state = converted.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of the demo preset's architecture under the original's names."""
    path = tmp_path / "original.safetensors"
    save_file(under_original_names(DCSSDAE.from_preset("demo")), path)
    return path


def test_nothing_overridden_says_nothing_of_it(run: Callable, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    outcome = run("convert", "original", checkpoint, "--preset", "demo", "--out", tmp_path / "out")
    assert outcome.code == 0
    assert len(outcome.out) == 1
    assert run("info", tmp_path / "out").code == 0


def test_folder_with_something_in_it_is_refused(run: Callable, checkpoint: Path, tmp_path: Path) -> None:
    for out in (tmp_path, checkpoint):
        before = sorted(path.name for path in tmp_path.iterdir())
        outcome = run("convert", "original", checkpoint, "--preset", "demo", "--out", out)
        assert outcome.code == 2
        assert str(out) in outcome.err[0]
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_does_not_fit_is_one_line_and_writes_nothing(run: Callable, checkpoint: Path, tmp_path: Path) -> None:
    def message(path: Path, preset: str) -> str:
        outcome = run("convert", "original", path, "--preset", preset, "--out", tmp_path / "out")
        assert outcome.code == 2
        assert not outcome.out
        assert not (tmp_path / "out").exists()
        (line,) = outcome.err
        return line

    assert "unknown preset 'dmo' (did you mean 'demo'?)" in message(checkpoint, "dmo")
    assert "no such file" in message(tmp_path / "absent.safetensors", "demo")
    assert "pickle" in message(tmp_path / "x.ckpt", "demo")
    assert "encoder.conv_in.weight" in message(checkpoint, "vq_f8c4_fm")
    names = under_original_names(DCSSDAE.from_preset("demo"))
    moved = names.pop("encoder.project_in.conv.conv.bias")
    save_file({**names, "encoder.project_inn.conv.conv.bias": moved}, checkpoint)
    line = message(checkpoint, "demo")
    assert "missing: encoder.project_in.conv.conv.bias" in line
    assert "left over: encoder.project_inn.conv.conv.bias" in line


# --- published encoders of diffusers ---

WEIGHTS = "diffusion_pytorch_model.safetensors"


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


def test_a_decoder_is_trained_on_a_published_encoder(run: Callable, published: Path, tmp_path: Path) -> None:
    """From the published model to a reconstruction, by the commands that the command itself names."""
    out = tmp_path / "a model"
    outcome = run("convert", "diffusers", published, "--out", out, "--decoder-size", "XS")
    assert outcome.code == 0
    assert outcome.err == []
    tensors = load_file(published / WEIGHTS).items()
    count = sum(tensor.numel() for name, tensor in tensors if name.startswith(("encoder.", "quant_conv.")))
    assert outcome.out[:2] == [
        f"{published}: f8c4 KLEncoder, {count:,} parameters -> {out}",
        "as published: scaling_factor 0.5, shift_factor 0.25",
    ]
    told = outcome.out[2].removeprefix("the decoder is untrained: train it with dc-ssdae ")
    words = shlex.split(told.replace("PHOTOS", str(tmp_path / "photos")))
    assert words[:5] == ["train", "--config", f"{out}/frozen_encoder.yaml", "--training.init_from", str(out)]

    (tmp_path / "photos").mkdir()
    for index in range(4):
        Image.fromarray(random_pixels(40, 40)).save(tmp_path / "photos" / f"{index}.png")
    quick = ["--training.steps", 2, "--training.batch_size", 2, "--data.image_size", 32, "--data.workers", 0]
    exact = ["--training.precision", "float32", "--training.output", tmp_path / "run"]
    outcome = run(*words, *quick, *exact, "--losses.lpips", 0, "--losses.repa", 0)
    assert outcome.code == 0, outcome.err
    before, after = load_file(out / WEIGHTS), load_file(tmp_path / "run" / "model" / WEIGHTS)
    changed = {name.partition(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"decoder"}
    configs = [DCSSDAE.from_pretrained(folder).config for folder in (out, tmp_path / "run" / "model")]
    for name, value in (
        ("scaling_factor", 0.5),
        ("shift_factor", 0.25),
        ("latents_mean", [0.1, 0.2, 0.3, 0.4]),
        ("latents_std", [1.0, 2.0, 3.0, 4.0]),
    ):
        assert [config[name] for config in configs] == [value, value]
    outcome = run("reconstruct", tmp_path / "photos" / "0.png", "--model", tmp_path / "run", "--out", tmp_path / "seen")
    assert outcome.code == 0
    assert Image.open(tmp_path / "seen" / "0.png").size == (40, 40)

    words = ("convert", "diffusers", published, "--decoder", tmp_path / "run", "--out", tmp_path / "joined")
    outcome = run(*words)
    assert outcome.code == 0, outcome.err
    assert outcome.out[-1] == f"the decoder is that of {tmp_path / 'run'}"
    joined = load_file(tmp_path / "joined" / WEIGHTS)
    assert all(torch.equal(tensor, after[name]) for name, tensor in joined.items())
    outcome = run(*words, "--decoder-size", "S", "--overwrite")
    assert outcome.err == ["dc-ssdae convert: --decoder-size is of a new decoder: leave it or --decoder out"]


def test_a_published_encoder_in_half_precision(run: Callable, published: Path, tmp_path: Path) -> None:
    words = ("convert", "diffusers", published, "--decoder-size", "XS", "--dynamics", "FlowMatching", "--seed", 7)
    for dtype in ("float32", "bfloat16"):
        assert run(*words, "--out", tmp_path / dtype, "--dtype", dtype).code == 0
    whole, half = (load_file(tmp_path / dtype / WEIGHTS) for dtype in ("float32", "bfloat16"))
    assert whole.keys() == half.keys()
    assert any("time_embedding" in name for name in whole)
    for name, tensor in half.items():
        assert torch.equal(tensor, whole[name].to(tensor.dtype)), name
        assert tensor.dtype == torch.bfloat16 or not tensor.is_floating_point()


def test_what_is_no_published_encoder_is_one_line_and_writes_nothing(
    run: Callable, published: Path, tmp_path: Path
) -> None:
    def message(*words: object) -> str:
        outcome = run("convert", "diffusers", *words, "--out", tmp_path / "out")
        assert outcome.code == 2
        assert not outcome.out
        assert not (tmp_path / "out").exists()
        (line,) = outcome.err
        return line

    assert "no such folder, nor the id of a model on the hub" in message(tmp_path / "absent")
    assert "the name is empty" in message("")
    assert "there is no config.json, in unet/" in message(published, "--subfolder", "unet")
    assert "unknown size of UViTDecoder 'XXL' (did you mean 'XL'?)" in message(published, "--decoder-size", "XXL")
    assert "unknown class of dynamics 'Flow'" in message(published, "--dynamics", "Flow")
    assert "'-1' is not a whole number" in message(published, "--seed", "-1")
    (published / WEIGHTS).rename(published / "diffusion_pytorch_model.bin")
    assert "diffusion_pytorch_model.bin is a pickle file, which could run code" in message(published)


def test_a_published_encoder_that_is_unsafe_in_float16_is_said_to_be(
    run: Callable, published: Path, tmp_path: Path
) -> None:
    path = published / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "force_upcast": True}))
    outcome = run("convert", "diffusers", published, "--out", tmp_path / "out", "--decoder-size", "XS")
    assert outcome.code == 0
    assert outcome.out[2].startswith("its authors mark it as unsafe in float16 ")
    assert outcome.out[2].endswith(": encode in bfloat16 or float32")
    assert outcome.out[3].startswith("the decoder is untrained")
