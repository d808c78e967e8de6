"""`dc-ssdae info`: the list of presets, and the profile of a preset or a saved model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_samples import save_model

from dc_ssdae import DCSSDAE
from dc_ssdae.presets import list_presets, load_preset

DTYPES = ("float32", "bfloat16")


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_without_an_argument_lists_every_preset(run: Callable) -> None:
    outcome = run("info")
    assert outcome.code == 0
    assert not outcome.err
    assert max(map(len, outcome.out)) <= 80
    assert [line.split()[0] for line in outcome.out if not line.startswith(" ")] == ["preset", *list_presets()]
    listed = {entry["name"]: entry for entry in json.loads("\n".join(run("info", "--json").out))}
    for name in list_presets():
        with torch.device("meta"):
            config = DCSSDAE.from_preset(name).config
        assert listed[name] == {
            "name": name,
            "downsample_factor": config.downsample_factor,
            "latent_channels": config.latent_channels,
            "description": load_preset(name)["description"],
        }


@pytest.mark.parametrize("name", list_presets())
def test_profile_of_every_preset(name: str, run: Callable) -> None:
    with torch.device("meta"):
        model = DCSSDAE.from_preset(name)
    counts = {"encoder": model.encoder, "decoder": model.decoder, "total": model}
    expected = {part: sum(tensor.numel() for tensor in module.parameters()) for part, module in counts.items()}
    f, c = model.config.downsample_factor, model.config.latent_channels

    outcome = run("info", name)
    assert outcome.code == 0
    assert not outcome.err
    assert max(map(len, outcome.out)) <= 80
    text = "\n".join(outcome.out)
    for part, count in expected.items():
        assert f"  {part:8}  {count:>15,}\n" in text
    rows = [line.split() for line in outcome.out]
    assert ["latent", *(f"{c}x{size // f}x{size // f}" for size in (256, 512))] in rows
    assert ["compression", "ratio", f"{3 * f * f / c:g}"] in [row[:3] for row in rows]
    assert "2 FLOPs a multiply-add" in text


def test_text_and_json_say_the_same(run: Callable) -> None:
    profile = json.loads("\n".join(run("info", "demo", "--json").out))
    rows = [line.split() for line in run("info", "demo").out]
    small, large = profile["sizes"]["256"], profile["sizes"]["512"]
    assert [small["latent_shape"], large["latent_shape"]] == [[4, 32, 32], [4, 64, 64]]
    assert profile["compression_ratio"] == 48
    for label, key in (("encode,", "encode_flops"), ("decode step,", "decode_step_flops")):
        assert [*label.split(), "GFLOPs", *(f"{size[key] / 1e9:,.2f}" for size in (small, large))] in rows
    for part, count in profile["parameters"].items():
        assert [part, f"{count:,}"] in rows


def test_saved_model_is_described_as_its_preset(run: Callable, model_dir: Path) -> None:
    saved = json.loads("\n".join(run("info", model_dir, "--json").out))
    preset = json.loads("\n".join(run("info", "demo", "--json").out))
    assert saved.pop("weights") == ["diffusion_pytorch_model.safetensors"]
    assert preset.pop("weights") == []
    for profile in (saved, preset):
        del profile["name"], profile["description"]
    assert saved == preset
    assert run("info", model_dir).out[-1] == "weights   diffusion_pytorch_model.safetensors: fit the config"


def test_size_that_is_no_multiple_of_f_is_told(run: Callable, tmp_path: Path) -> None:
    outcome = run("info", save_model(tmp_path / "model", downsample_factor=512))
    assert outcome.code == 0
    assert "256 px is not a multiple of f = 512: such an image is padded first." in outcome.out
    assert ["latent", "-", "4x1x1"] in [line.split() for line in outcome.out]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dc_f32c32_eqn", "unknown preset or folder 'dc_f32c32_eqn' (did you mean 'dc_f32c32_eqm'?); accepted: dc_f"),
        ("xyz", "unknown preset or folder 'xyz'; accepted: "),
        ("", "argument PRESET|DIR: the name is empty"),
    ],
)
def test_misspelt_preset_gets_a_suggestion(name: str, message: str, run: Callable) -> None:
    outcome = run("info", name)
    assert outcome.code == 2
    assert not outcome.out
    assert len(outcome.err) == 1
    assert outcome.err[0].startswith(f"dc-ssdae info: {message}")


def test_folders_without_a_whole_model_are_one_line(run: Callable, model_dir: Path, tmp_path: Path) -> None:
    def message(path: Path) -> str:
        outcome = run("info", path)
        assert outcome.code == 2
        assert not outcome.out
        (line,) = outcome.err
        return line

    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    weights, config = copy / "diffusion_pytorch_model.safetensors", copy / "config.json"
    assert "is a file; info takes a preset's name or a saved model's folder" in message(config)
    assert message(tmp_path).endswith("holds no model: config.json is missing")
    os.truncate(weights, weights.stat().st_size - 10)
    assert "is truncated: tensor '" in message(copy)
    weights.unlink()
    assert message(copy).endswith("holds no weights: there is no safetensors file")
    settings = json.loads(config.read_text())
    settings["latent_chanels"] = settings.pop("latent_channels")
    config.write_text(json.dumps(settings))
    assert "'latent_chanels' (did you mean 'latent_channels'?)" in message(copy)


def test_weights_memory_follows_the_dtype(run: Callable, model_dir: Path) -> None:
    wide, narrow = (json.loads("\n".join(run("info", model_dir, "--json", "--dtype", d).out)) for d in DTYPES)
    assert wide["seconds"] is None
    # All but the batch norm's counter halves.
    assert narrow["weights_mebibytes"] == pytest.approx(wide["weights_mebibytes"] / 2, rel=1e-4)
    assert wide["weights_mebibytes"] > 4 * wide["parameters"]["total"] / 2**20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["preset", "folder"])
def test_a_device_adds_times(kind: str, dtype: str, run: Callable, model_dir: Path) -> None:
    name = "demo" if kind == "preset" else model_dir
    outcome = run("info", name, "--device", "cpu", "--dtype", dtype)
    assert outcome.code == 0
    assert not outcome.err
    assert max(map(len, outcome.out)) <= 80
    assert sum(line.startswith("One 256 px image on cpu, median of 3: encode ") for line in outcome.out) == 1


def test_a_device_that_is_not_there_is_refused(run: Callable) -> None:
    outcome = run("info", "demo", "--device", "cuda:99")
    assert outcome.code == 2
    assert len(outcome.err) == 1
    assert "no device 'cuda:99'" in outcome.err[0]
