"""`dc-ssdae info`: the list of presets, and the profile of a preset or a saved model."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli_samples import save_model

from dc_ssdae import DCSSDAE
from dc_ssdae.classes import import_class, importing_from
from dc_ssdae.presets import list_presets, load_preset

DTYPES = ("float32", "bfloat16")

OWN_ENCODERS = """
from torch import nn


class NamingEncoder(nn.Module):
    def __init__(self, latent_channels: int, downsample_factor: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, downsample_factor, downsample_factor)
        self.out = nn.Conv2d(8, 2 * latent_channels, 1)

    def parameter_groups(self):
        return {"trunk": ["patch"], "latent_head": ["out"]}

    def forward(self, x):
        raise NotImplementedError


class SilentEncoder(NamingEncoder):
    parameter_groups = None


class ForgetfulEncoder(NamingEncoder):
    def parameter_groups(self):
        return {"trunk": ["patch"]}
"""


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A saved model with each class of `naming_encoders.py` in the current folder, which is not imported any more."""
    (tmp_path / "naming_encoders.py").write_text(OWN_ENCODERS)
    monkeypatch.chdir(tmp_path)
    with importing_from(tmp_path):
        names = ("NamingEncoder", "SilentEncoder", "ForgetfulEncoder")
        kinds = [import_class(f"naming_encoders.{name}") for name in names]
    for kind in kinds:
        part = {"class_path": f"naming_encoders.{kind.__name__}"}
        DCSSDAE.from_preset("demo", encoder=part, classes=kinds).save_pretrained(tmp_path / kind.__name__)
    del sys.modules["naming_encoders"]
    yield tmp_path
    sys.modules.pop("naming_encoders", None)


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
    rows = [line.split() for line in outcome.out]
    for part, count in expected.items():
        assert ["parameters,", part, f"{count:,}"] in rows
    assert ["latent", *(f"{c}x{size // f}x{size // f}" for size in (256, 512))] in rows
    assert ["compression", "ratio", "3", "f²/c", f"{3 * f * f / c:g}"] in rows


def test_text_and_json_say_the_same(run: Callable) -> None:
    profile = json.loads("\n".join(run("info", "demo", "--json").out))
    rows = [line.split() for line in run("info", "demo").out]
    small, large = profile["sizes"]["256"], profile["sizes"]["512"]
    assert [small["latent_shape"], large["latent_shape"]] == [[4, 32, 32], [4, 64, 64]]
    assert profile["compression_ratio"] == 48
    for label, key in (("encode,", "encode_flops"), ("decode step,", "decode_step_flops")):
        assert [*label.split(), "GFLOPs", *(f"{size[key] / 1e9:,.2f}" for size in (small, large))] in rows
    for part, count in profile["parameters"].items():
        assert ["parameters,", part, f"{count:,}"] in rows


def test_saved_model_is_described_as_its_preset(run: Callable, model_dir: Path) -> None:
    saved = json.loads("\n".join(run("info", model_dir, "--json").out))
    preset = json.loads("\n".join(run("info", "demo", "--json").out))
    assert saved.pop("weights") == ["diffusion_pytorch_model.safetensors"]
    assert preset.pop("weights") == []
    for profile in (saved, preset):
        del profile["name"], profile["description"]
    assert saved == preset
    assert run("info", model_dir).out[-1] == "weights   diffusion_pytorch_model.safetensors: fit the config"


def test_where_a_model_comes_from_is_told(run: Callable, model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    metrics = {"psnr": {"value": 25.125, "low": 25.0, "high": 25.25}, "lpips": {"value": 0.5, "note": "random"}}
    evaluation = {"protocol": "dcae", "data": "photos", "images": 9, "metrics": metrics}
    provenance = {"preset": "demo", "changes": ["training.lr"], "steps": 30, "evaluations": [evaluation]}
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "provenance": provenance}))
    outcome = run("info", copy)
    assert outcome.code == 0
    assert max(map(len, outcome.out)) <= 80
    assert "origin    preset demo, with training.lr changed; training 30 steps" in outcome.out
    text = " ".join(" ".join(outcome.out).split())
    assert "measured protocol dcae, 9 images of photos, decoded in one step; PSNR, dB 25.125 (25 to 25.25); " in text
    assert "LPIPS 0.5 *; * lpips: random" in text
    assert json.loads("\n".join(run("info", copy, "--json").out))["provenance"] == provenance
    assert not any(line.startswith(("origin", "measured")) for line in run("info", model_dir).out)
    (copy / "config.json").write_text(json.dumps({**config, "provenance": {"data": "\x1b[31m"}}))
    outcome = run("info", copy)
    assert outcome.code == 2
    (line,) = outcome.err
    assert "provenance.data is '\\x1b[31m'; it must be a line" in line


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
def test_a_device_adds_times(
    kind: str, dtype: str, run: Callable, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dc_ssdae.cli.info.SIZES", (32, 64))  # bfloat16 takes minutes where a CPU has no kernels for it
    name = "demo" if kind == "preset" else model_dir
    outcome = run("info", name, "--device", "cpu", "--dtype", dtype)
    assert outcome.code == 0
    assert not outcome.err
    assert max(map(len, outcome.out)) <= 80
    assert sum(line.startswith("One 32 px image on cpu, median of 3: encode ") for line in outcome.out) == 1


def test_a_device_that_is_not_there_is_refused(run: Callable) -> None:
    outcome = run("info", "demo", "--device", "cuda:99")
    assert outcome.code == 2
    assert len(outcome.err) == 1
    assert "no device 'cuda:99'" in outcome.err[0]


class TestGroups:
    @pytest.mark.parametrize("columns", ["20", "80", "400"])
    def test_one_line_a_group_whatever_the_width(
        self, columns: str, run: Callable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", columns)
        outcome = run("info", "dc_f32c32_eqm", "--groups")
        assert outcome.code == 0
        assert not outcome.err
        assert outcome.out == [
            "encoder.input              1792",
            "encoder.stages.1        6197120",
            "encoder.stages.2       47791232",
            "encoder.stages.3       20060416",
            "encoder.stages.4       77869312",
            "encoder.stages.5       75509760",
            "encoder.latent_head      589888",
            "decoder.latent_inputs     64736",
            "decoder.image_inputs      37824",
            "decoder.down.0           201536",
            "decoder.down.1           414976",
            "decoder.down.2          1110080",
            "decoder.down.3           964480",
            "decoder.middle          3519648",
            "decoder.up.3            2584960",
            "decoder.up.2            2474240",
            "decoder.up.1             996032",
            "decoder.head             433731",
        ]

    @pytest.mark.parametrize("name", ["vq_f8c4_fm", "demo"])
    def test_json_says_the_same_and_adds_up(self, name: str, run: Callable) -> None:
        sizes = json.loads("\n".join(run("info", name, "--groups", "--json").out))
        assert [(group, str(size)) for group, size in sizes.items()] == [
            tuple(line.split()) for line in run("info", name, "--groups").out
        ]
        profile = json.loads("\n".join(run("info", name, "--json").out))["parameters"]
        assert sum(sizes.values()) == profile["total"]
        for part in ("encoder", "decoder"):
            assert sum(size for group, size in sizes.items() if group.startswith(part)) == profile[part]

    def test_saved_model_and_run(self, run: Callable, model_dir: Path, tmp_path: Path) -> None:
        shutil.copytree(model_dir, tmp_path / "run" / "model")
        (tmp_path / "run" / "config.yaml").write_text("model:\n  latent_channels: 4\n")
        expected = run("info", "demo", "--groups").out
        for folder in (model_dir, tmp_path / "run"):
            outcome = run("info", folder, "--groups")
            assert (outcome.code, outcome.out, outcome.err) == (0, expected, [])

    def test_users_classes(self, run: Callable, own_models: Path) -> None:
        """Their forward would raise: nothing is computed."""
        assert "is not imported" in run("info", own_models / "NamingEncoder", "--groups").err[0]
        patch, out = 3 * 8 * 8 * 8 + 8, 8 * 8 + 8
        words = ("--groups", "--json", "--import", "naming_encoders")
        named, silent = (
            json.loads("\n".join(run("info", own_models / name, *words).out))
            for name in ("NamingEncoder", "SilentEncoder")
        )
        assert list(named.items())[:2] == [("encoder.trunk", patch), ("encoder.latent_head", out)]
        assert next(iter(silent.items())) == ("encoder", patch + out)

    def test_broken_declaration_is_one_line(self, run: Callable, own_models: Path) -> None:
        outcome = run("info", own_models / "ForgetfulEncoder", "--groups", "--import", "naming_encoders")
        assert (outcome.code, outcome.out) == (2, [])
        assert outcome.err == [
            "dc-ssdae info: parameter_groups of encoder naming_encoders.ForgetfulEncoder: "
            "tensor 'out.weight' is in no group"
        ]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ((), "--groups needs a model: a preset's name, or the folder of a saved model or a training run"),
            (("--json",), "--groups needs a model: "),
            (("demo", "--device", "cpu"), "--groups counts parameters, which no device or dtype changes: leave "),
            (("demo", "--dtype", "bfloat16"), "--groups counts parameters, which no device or dtype changes: leave "),
            (("demmo",), "unknown preset or folder 'demmo' (did you mean 'demo'?); accepted: "),
        ],
    )
    def test_what_has_no_groups_is_one_line(self, words: tuple[str, ...], message: str, run: Callable) -> None:
        outcome = run("info", *words, "--groups")
        assert (outcome.code, outcome.out, len(outcome.err)) == (2, [], 1)
        assert outcome.err[0].startswith(f"dc-ssdae info: {message}")
