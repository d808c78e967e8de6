"""`dc-ssdae info`: the list of presets, and the profile of a preset or a saved model."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from cli_samples import WEIGHTS, Refusal, Run, save_model

from dc_ssdae import DCSSDAE
from dc_ssdae.parameter_groups import group_sizes
from dc_ssdae.presets import list_presets, load_preset


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_without_an_argument_it_lists_every_preset(run: Run) -> None:
    outcome = run("info")
    assert (outcome.code, outcome.err) == (0, [])
    assert max(map(len, outcome.out)) <= 80
    assert [line.split()[0] for line in outcome.out if not line.startswith(" ")] == ["preset", *list_presets()]
    listed = run("info", "--json").json()
    assert [entry["name"] for entry in listed] == list_presets()
    for entry in listed:
        assert entry["description"] == load_preset(entry["name"])["description"]
    assert next(entry for entry in listed if entry["name"] == "vq_f8c4_fm")["latent_channels"] == 4


@pytest.mark.parametrize("name", ["demo", "fast_f32c32"])
def test_text_and_json_say_the_same(name: str, run: Run) -> None:
    with torch.device("meta"):
        model = DCSSDAE.from_preset(name)
    f, c = model.config.downsample_factor, model.config.latent_channels
    outcome = run("info", name)
    assert (outcome.code, outcome.err) == (0, [])
    assert max(map(len, outcome.out)) <= 80
    rows = [line.split() for line in outcome.out]
    profile = run("info", name, "--json").json()
    for part, module in (("encoder", model.encoder), ("decoder", model.decoder), ("total", model)):
        count = sum(tensor.numel() for tensor in module.parameters())
        assert profile["parameters"][part] == count
        assert ["parameters,", part, f"{count:,}"] in rows
    assert ["latent", *(f"{c}x{size // f}x{size // f}" for size in (256, 512))] in rows
    assert ["compression", "ratio", "3", "f²/c", f"{3 * f * f / c:g}"] in rows
    assert profile["compression_ratio"] == 3 * f * f / c
    for label, key in (("encode,", "encode_flops"), ("decode step,", "decode_step_flops")):
        flops = [f"{profile['sizes'][size][key] / 1e9:,.2f}" for size in ("256", "512")]
        assert [*label.split(), "GFLOPs", *flops] in rows


def test_a_saved_model_and_a_run_are_described_as_their_preset(run: Run, model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "config.yaml").write_text("model:\n  latent_channels: 4\n")
    preset = run("info", "demo", "--json").json()
    for folder in (model_dir, tmp_path):
        saved = run("info", folder, "--json").json()
        assert saved["name"] == str(folder)
        assert saved["weights"] == [WEIGHTS]
        assert saved == {**preset, **{key: saved[key] for key in ("name", "description", "weights")}}
        assert run("info", folder, "--groups") == run("info", "demo", "--groups")
    assert run("info", model_dir).out[-1] == f"weights   {WEIGHTS}: fit the config"


def test_where_a_model_comes_from_is_told(run: Run, refusal: Refusal, model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    metrics = {"lpips": {"value": 0.5, "note": "random"}}
    evaluation = {"protocol": "dcae", "data": "photos", "images": 9, "metrics": metrics}
    provenance = {"preset": "demo", "changes": ["training.lr"], "steps": 30, "evaluations": [evaluation]}
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "provenance": provenance}))
    outcome = run("info", copy)
    assert outcome.code == 0
    assert max(map(len, outcome.out)) <= 80
    text = " ".join(" ".join(outcome.out).split())
    assert "origin preset demo; settings changed in it training.lr; steps 30" in text
    assert "measured protocol dcae; data photos; images 9; lpips 0.5 *; * lpips: random" in text
    assert run("info", copy, "--json").json()["provenance"] == provenance
    (copy / "config.json").write_text(json.dumps({**config, "provenance": {"data": "\x1b[31m"}}))
    assert "provenance.data is '\\x1b[31m'" in refusal("info", copy)


def test_a_size_that_is_no_multiple_of_f_is_told(run: Run, tmp_path: Path) -> None:
    outcome = run("info", save_model(tmp_path / "model", downsample_factor=512))
    assert any(line.startswith("256 px is not a multiple of f = 512") for line in outcome.out)
    assert ["latent", "-", "4x1x1"] in [line.split() for line in outcome.out]


def test_what_is_no_whole_model_is_one_line(refusal: Refusal, model_dir: Path, tmp_path: Path) -> None:
    assert "did you mean 'dc_f32c32_eqm'" in refusal("info", "dc_f32c32_eqn")
    assert "PRESET|DIR" in refusal("info", "")
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    weights, config = copy / WEIGHTS, copy / "config.json"
    assert f"{config} is a file" in refusal("info", config)
    assert "config.json is missing" in refusal("info", tmp_path)
    os.truncate(weights, weights.stat().st_size - 10)
    assert "is truncated" in refusal("info", copy)
    weights.unlink()
    assert f"{copy} holds no weights" in refusal("info", copy)
    settings = json.loads(config.read_text())
    settings["latent_chanels"] = settings.pop("latent_channels")
    config.write_text(json.dumps(settings))
    assert "did you mean 'latent_channels'" in refusal("info", copy)


def test_the_dtype_halves_the_memory_and_a_device_adds_times(
    run: Run, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dc_ssdae.cli.info.SIZES", (32, 64))  # bfloat16 takes minutes where a CPU has no kernels for it
    wide = run("info", model_dir, "--json").json()
    narrow = run("info", model_dir, "--json", "--dtype", "bfloat16", "--device", "cpu").json()
    assert wide["seconds"] is None
    assert narrow["seconds"]["encode"] > 0
    # All but the batch norm's counter halves.
    assert narrow["weights_mebibytes"] == pytest.approx(wide["weights_mebibytes"] / 2, rel=1e-4)
    assert wide["weights_mebibytes"] > 4 * wide["parameters"]["total"] / 2**20
    timed = run("info", "demo", "--device", "cpu")
    assert sum(line.startswith("One 32 px image on cpu, median of 3: encode ") for line in timed.out) == 1


class TestGroups:
    def test_one_line_per_group_whatever_the_width(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "20")
        sizes = group_sizes(DCSSDAE.from_preset("demo"))
        outcome = run("info", "demo", "--groups")
        assert [tuple(line.split()) for line in outcome.out] == [(group, str(size)) for group, size in sizes.items()]
        assert run("info", "demo", "--groups", "--json").json() == sizes

    @pytest.mark.parametrize("words", ["", "demo --device cpu", "demo --dtype bfloat16"])
    def test_options_that_do_not_fit_are_one_line(self, words: str, refusal: Refusal) -> None:
        assert "--groups" in refusal("info", *words.split(), "--groups")
