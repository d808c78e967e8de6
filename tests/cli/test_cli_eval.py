"""`dc-ssdae eval`: what it writes and prints of a model, what its options change, and what it refuses."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from cli_samples import random_pixels
from PIL import Image
from tiny_models import tiny

from dc_ssdae.evaluation import metric_networks
from dc_ssdae.evaluation.estimates import METRICS
from dc_ssdae.losses import backbones

FILES = ("report.html", "report.md", "report.json", "images.csv")
QUICK = ("--size", 32, "--workers", 0, "--device", "cpu", "--metrics", "psnr")
COUNT = 5

PEERS = """
import torch
from torch.nn import functional as F

def blurred(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1)

def nan(x):
    return x / 0 * 0

def half(x):
    return x[..., ::2, ::2]

def greedy(x):
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

constant = 3
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These images are too small for more to be of use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model (f8, c4) that is smaller than the demo preset, saved."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "small"
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(COUNT):
        Image.fromarray(random_pixels(40, 52, seed=index)).save(folder / f"{index}.png")
    (folder / "3b.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder, with candidates in a module, on a machine without weights."""
    (tmp_path / "eval_peers.py").write_text(PEERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(backbones.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def report_of(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def values_of(folder: Path) -> dict[str, Any]:
    """Of the metrics that were taken."""
    found = report_of(folder)["metrics"]
    return {name: cell["value"] for name, cell in found.items() if cell["value"] is not None}


def lines_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "images.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


class TestReport:
    def test_it_writes_four_files_and_prints_the_figures(
        self, run: Any, model_dir: Path, photos: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        words = ("--model", model_dir, "--data", photos, "--size", 32, "--workers", 1, "--device", "cpu")
        outcome = run("eval", *words, "--metrics", "psnr,ssim", "--batch", 2, "--show", 2, "--out", out)
        assert outcome.code == 0
        assert len(outcome.err) == 1
        assert outcome.err[0].startswith(f"dc-ssdae eval: left out: cannot read image '{photos}/3b.png'")
        assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
        assert outcome.out[-1] == f"-> {', '.join(str(out / name) for name in FILES)}"
        printed = (out / "report.md").read_text(encoding="utf-8")
        assert "\n".join(outcome.out[:-1]).strip() == printed.strip()
        assert f"# {model_dir.name}" in printed

        report = report_of(out)
        assert report["model"] == model_dir.name
        assert report["images"] == COUNT
        assert list(report["broken"]) == [f"{photos}/3b.png"]
        assert report["latent_shape"] == [4, 4, 4]
        assert set(values_of(out)) == {"psnr", "ssim"}
        assert report["metrics"]["psnr"]["low"] < report["metrics"]["psnr"]["value"] < report["metrics"]["psnr"]["high"]
        assert report["others"]["evaluations"]["value"] == 1
        assert report["protocol"] | {"name": "dcae", "size": 32, "data": photos.name} == report["protocol"]
        assert f"| PSNR (more is better) | {report['metrics']['psnr']['value']:.2f} dB |" in printed

        lines = lines_of(out)
        assert [line["name"] for line in lines] == ["0.png", "1.png", "2.png", "3.png", "3b.png", "4.png"]
        assert [bool(line["broken"]) for line in lines] == [False, False, False, False, True, False]
        values = [float(line["psnr"]) for line in lines if line["psnr"]]
        assert len(values) == COUNT
        assert sum(values) / COUNT == pytest.approx(report["metrics"]["psnr"]["value"])

        page = (out / "report.html").read_text(encoding="utf-8")
        assert f"Evaluation of {model_dir.name}" in page
        worst = sorted((line for line in lines if line["psnr"]), key=lambda line: float(line["psnr"]))
        shown = re.findall(r"<h3>(.*?)</h3>", page)
        assert shown == [line["name"] for line in (*worst[:2], *worst[::-1][:2])]

    def test_figures_are_printed_though_they_cannot_be_written(
        self, run: Any, photos: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(source: object, target: object) -> None:
            raise OSError(28, "No space left on device", str(target))

        monkeypatch.setattr(os, "replace", fail)
        outcome = run("eval", "--model", "bicubic:4", "--data", photos, *QUICK)
        assert outcome.code == 2
        assert any(line.startswith("| PSNR (more is better) | ") for line in outcome.out)
        assert "report.html" in outcome.err[-1]

    def test_images_that_were_enlarged_are_told(self, run: Any, photos: Path, tmp_path: Path) -> None:
        outcome = run("eval", "--model", "bicubic:4", "--data", photos, *QUICK, "--size", 48)
        assert any(line.startswith(f"- {COUNT} of {COUNT} images were smaller than 48 px") for line in outcome.out)
        assert any("smaller than 48 px" in line for line in report_of(tmp_path / "evaluation")["caveats"])

    def test_it_is_written_to_the_folder_evaluation_by_default(self, run: Any, photos: Path, tmp_path: Path) -> None:
        outcome = run("eval", "--model", "mine=bicubic:4", "--data", photos, *QUICK)
        assert outcome.code == 0
        assert sorted(path.name for path in (tmp_path / "evaluation").iterdir()) == sorted(FILES)
        assert report_of(tmp_path / "evaluation")["model"] == "mine"

    def test_a_metric_without_weights_says_so(self, run: Any, photos: Path, tmp_path: Path) -> None:
        words = [word if word != "psnr" else "psnr,lpips" for word in QUICK]
        assert run("eval", "--model", "bicubic:4", "--data", photos, *words, "--out", "out").code == 0
        reason = report_of(tmp_path / "out")["metrics"]["lpips"]["reason"]
        assert reason.startswith("weights alexnet-owt-7be5be79.pth are not on this machine")
        assert f"| LPIPS (less is better) | – ({reason}) |" in (tmp_path / "out/report.md").read_text(encoding="utf-8")

    @pytest.mark.parametrize("model", ["jpeg:40", "python:eval_peers.blurred", "preset:demo"])
    def test_any_autoencoder_can_be_measured(self, run: Any, photos: Path, tmp_path: Path, model: str) -> None:
        assert run("eval", "--model", model, "--data", photos, *QUICK, "--limit", 2, "--out", "out").code == 0
        report = report_of(tmp_path / "out")
        assert report["metrics"]["psnr"]["value"] > 3
        assert ("random weights" in report["remarks"]) == (model == "preset:demo")
        assert any("random weights" in line for line in report["caveats"]) == (model == "preset:demo")
        assert ("bits_per_pixel" in report["others"]) == (model == "jpeg:40")

    def test_names_of_all_kinds_are_kept(self, run: Any, tmp_path: Path) -> None:
        folder = tmp_path / "names"
        folder.mkdir()
        names = ["<b>&amp;.png", "🦆 | $x.png", "a,b;\"c'.png", os.fsdecode(b"\xe9\xff.png")]
        for index, name in enumerate(names):
            try:
                Image.fromarray(random_pixels(32, 32, seed=index)).save(folder / name)
            except (OSError, UnicodeError):
                pytest.skip(f"the file system refuses the name {name!r}")
        outcome = run("eval", "--model", "<i>=bicubic:4", "--data", folder, *QUICK, "--out", "out")
        assert outcome.code == 0
        as_utf8 = [name.encode("utf-8", "backslashreplace").decode() for name in sorted(names)]
        assert [line["name"] for line in lines_of(tmp_path / "out")] == as_utf8
        page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
        assert "<h3>&lt;b&gt;&amp;amp;.png</h3>" in page
        assert "<h3>\\udce9\\udcff.png</h3>" in page
        assert "Evaluation of &lt;i&gt;" in page

    def test_a_data_set_with_validation_images_is_measured_on_those(
        self, run: Any, photos: Path, tmp_path: Path
    ) -> None:
        for split, indices in (("train", (0, 1, 2)), ("validation", (3, 4))):
            (tmp_path / "data" / split).mkdir(parents=True)
            for index in indices:
                (tmp_path / "data" / split / f"{index}.png").symlink_to(photos / f"{index}.png")
        outcome = run("eval", "--model", "bicubic:4", "--data", "data", *QUICK, "--out", "out")
        assert outcome.code == 0
        assert [line["name"] for line in lines_of(tmp_path / "out")] == ["3.png", "4.png"]
        assert report_of(tmp_path / "out")["protocol"]["data"] == "data/validation"


class TestAddToModel:
    @pytest.fixture
    def copied(self, model_dir: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(model_dir, tmp_path / "copied"))

    def test_the_figures_get_into_the_model(self, run: Any, copied: Path, photos: Path, tmp_path: Path) -> None:
        words = ("--model", copied, "--data", photos, *QUICK, "--add-to-model")
        outcome = run("eval", *words, "--limit", 2, "--out", "first")
        assert outcome.code == 0
        assert outcome.out[-1] == f"-> {copied / 'config.json'}, {copied / 'README.md'}"
        assert run("eval", *words, "--limit", 2, "--steps", 2, "--dtype", "bfloat16", "--out", "second").code == 0
        assert run("eval", *words, "--out", "third").code == 0
        config = json.loads((copied / "config.json").read_text())
        in_steps, in_one = config["provenance"]["evaluations"]
        assert in_steps["decoding"] == {"num_steps": 2}
        assert in_steps["dtype"] == "bfloat16"
        assert in_one["decoding"] == {}
        assert in_one["images"] == COUNT, "the later figures replace those of the same kind"
        found = report_of(tmp_path / "third")["metrics"]["psnr"]
        assert in_one["metrics"] == {"psnr": {key: found[key] for key in ("value", "low", "high")}}
        told = {key: in_one[key] for key in ("protocol", "data", "image_size")}
        assert told == {"protocol": "dcae", "data": photos.name, "image_size": 32}
        card = (copied / "README.md").read_text()
        assert f"| PSNR, dB | {found['value']:.5g} ({found['low']:.5g} to {found['high']:.5g}) |" in card
        text = "\n".join(run("info", copied).out)
        assert f"PSNR, dB {found['value']:.5g} ({found['low']:.5g} to" in " ".join(text.split())

    def test_what_random_networks_measure_is_marked(
        self, run: Any, copied: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(metric_networks, "load_metrics", noted(metric_networks.load_metrics))
        words = ("--data", photos, *QUICK[:-2], "--metrics", "psnr,ssim", "--out", "out", "--add-to-model")
        assert run("eval", "--model", copied, *words).code == 0
        (entry,) = json.loads((copied / "config.json").read_text())["provenance"]["evaluations"]
        assert "note" not in entry["metrics"]["psnr"]
        assert entry["metrics"]["ssim"]["note"] == "its network has random weights"
        card = (copied / "README.md").read_text()
        assert "- **SSIM †**: `its network has random weights`" in card
        assert "SSIM (protocol" not in card, "not listed beside other models' figures"
        assert "PSNR, dB (protocol" in card
        assert "* ssim: its network has random weights" in " ".join(" ".join(run("info", copied).out).split())

    @pytest.mark.parametrize("model", ["jpeg:75", "preset:demo", "owner/name"])
    def test_only_a_saved_model_can_take_them(self, run: Any, photos: Path, tmp_path: Path, model: str) -> None:
        outcome = run("eval", "--model", model, "--data", photos, *QUICK, "--out", "out", "--add-to-model")
        assert outcome.code == 2
        (line,) = outcome.err
        assert "leave --add-to-model out" in line
        assert not (tmp_path / "out").exists()

    def test_weights_that_changed_meanwhile_get_no_figures(
        self, run: Any, copied: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from dc_ssdae.evaluation import evaluate as module

        weights, measure = copied / "diffusion_pytorch_model.safetensors", module.evaluate

        def measured(*given: Any) -> Any:
            shutil.copy(weights, copied / "new")
            os.replace(copied / "new", weights)
            return measure(*given)

        monkeypatch.setattr(module, "evaluate", measured)
        before = (copied / "config.json").read_bytes()
        outcome = run("eval", "--model", copied, "--data", photos, *QUICK, "--out", "out", "--add-to-model")
        assert outcome.code == 2
        assert "have changed while they were measured: nothing is added to them" in outcome.err[-1]
        assert (copied / "config.json").read_bytes() == before


def noted(load: Callable[..., Any]) -> Callable[..., Any]:
    """Load metrics, and mark SSIM as those are marked whose networks have random weights."""

    def load_noted(*given: Any, **settings: Any) -> Any:
        suite = load(*given, **settings)
        suite.notes["ssim"] = "its network has random weights"
        return suite

    return load_noted


class TestOptions:
    @pytest.mark.parametrize(
        ("protocol", "size", "latent"),
        [("dcae", 256, "mean"), ("lightningdit", 256, "sample"), ("rae", 256, "mean"), ("original", 128, "mean")],
    )
    def test_a_protocol_has_its_own_size(
        self, run: Any, photos: Path, tmp_path: Path, protocol: str, size: int, latent: str
    ) -> None:
        words = (*QUICK[2:], "--limit", 2, "--show", 1, "--out", "out")
        outcome = run("eval", "--model", "bicubic:8", "--data", photos, "--protocol", protocol, *words)
        assert outcome.code == 0
        found = report_of(tmp_path / "out")["protocol"]
        assert (found["name"], found["size"], found["latent"]) == (protocol, size, latent)
        assert any(f"{size}×{size} px" in line for line in outcome.out)
        assert any(line.startswith(f"- Protocol {protocol}. Data: 2 of the 6 images") for line in outcome.out)

    def test_protocols_measure_differently(self, run: Any, photos: Path, tmp_path: Path) -> None:
        words = ("--size", 36, "--workers", 0, "--device", "cpu", "--metrics", "psnr,ssim")
        found = set()
        for protocol in ("dcae", "lightningdit", "rae", "original"):
            given = ("--model", "python:eval_peers.blurred", "--protocol", protocol, "--out", protocol)
            assert run("eval", *given, "--data", photos, *words).code == 0
            found.add(tuple(values_of(tmp_path / protocol).values()))
        assert len(found) == 4

    def test_a_limit_takes_images_evenly_spread(self, run: Any, photos: Path, tmp_path: Path) -> None:
        outcome = run("eval", "--model", "bicubic:4", "--data", photos, *QUICK, "--limit", 3, "--out", "out")
        assert outcome.code == 0
        assert outcome.err == ["dc-ssdae eval: left out: " + line["broken"] for line in lines_of(tmp_path / "out")[2:]]
        assert [line["name"] for line in lines_of(tmp_path / "out")] == ["0.png", "2.png", "3b.png"]
        assert report_of(tmp_path / "out")["images"] == 2

    def test_the_batch_changes_no_figure(self, run: Any, model_dir: Path, photos: Path, tmp_path: Path) -> None:
        for batch in (1, 4):
            words = ("--batch", batch, "--out", f"out{batch}")
            assert run("eval", "--model", model_dir, "--data", photos, *QUICK, *words).code == 0
        for one, other in zip(lines_of(tmp_path / "out1"), lines_of(tmp_path / "out4"), strict=True):
            assert one["broken"] == other["broken"]
            if one["psnr"]:
                assert float(one["psnr"]) == pytest.approx(float(other["psnr"]), abs=1e-3)

    @pytest.mark.parametrize("names", ["psnr", "ssim", "ssim, psnr"])
    def test_only_the_metrics_that_are_asked_for_are_taken(
        self, run: Any, photos: Path, tmp_path: Path, names: str
    ) -> None:
        words = [*QUICK[:-1], names]
        assert run("eval", "--model", "bicubic:4", "--data", photos, *words, "--out", "out").code == 0
        asked = [name.strip() for name in names.split(",")]
        found = report_of(tmp_path / "out")["metrics"]
        assert list(found) == list(METRICS)
        for name, cell in found.items():
            assert (cell["value"] is not None) == (name in asked)
            assert cell.get("reason") == (None if name in asked else "not asked for")

    @pytest.mark.parametrize(
        ("words", "decoding"),
        [
            (["--steps", "3"], {"num_steps": 3}),
            (["--num_steps", "2"], {"num_steps": 2}),
            (
                ["--sampler", "nesterov", "--steps", "2", "--step_size", "0.1,0.05", "--momentum", "0.2"],
                {"sampler": "nesterov", "num_steps": 2, "step_size": [0.1, 0.05], "momentum": 0.2},
            ),
        ],
    )
    def test_our_models_decode_as_they_are_told(
        self,
        run: Any,
        model_dir: Path,
        photos: Path,
        tmp_path: Path,
        words: list[str],
        decoding: Mapping[str, Any],
    ) -> None:
        given = ("--model", model_dir, "--data", photos, *QUICK, "--limit", 2)
        assert run("eval", *given, "--out", "plain").code == 0
        assert run("eval", *given, *words, "--out", "out").code == 0
        report = report_of(tmp_path / "out")
        assert report["others"]["evaluations"]["value"] == decoding["num_steps"]
        assert report["protocol"]["decoding"] == decoding
        assert values_of(tmp_path / "out") != values_of(tmp_path / "plain")

    def test_how_ours_decode_is_not_said_of_others(self, run: Any, photos: Path, tmp_path: Path) -> None:
        words = ("--model", "jpeg:50", "--steps", 3, "--data", photos, *QUICK, "--out", "out")
        assert run("eval", *words).code == 0
        assert "decoded with" not in (tmp_path / "out/report.md").read_text(encoding="utf-8")
        assert report_of(tmp_path / "out")["protocol"]["decoding"] == {}

    def test_random_backbones_are_noted(self, run: Any, photos: Path, tmp_path: Path) -> None:
        words = ("--metrics", "lpips", "--random_backbones", "--limit", 3, "--out", "out")
        outcome = run("eval", "--model", "bicubic:4", "--data", photos, *QUICK[:-2], *words)
        assert outcome.code == 0
        report = report_of(tmp_path / "out")
        assert report["metrics"]["lpips"]["value"] > 0
        note = report["metrics"]["lpips"]["note"]
        assert note == "its network has random weights: comparable only within this report"
        assert report["protocol"]["weights"] == {"lpips": "random weights"}
        assert f"- LPIPS: {note}." in outcome.out
        assert f"<li>LPIPS: {note}.</li>" in (tmp_path / "out/report.html").read_text(encoding="utf-8")

    def test_the_network_of_lpips_is_the_users(
        self, run: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its weights are those in the folder that DC_SSDAE_WEIGHTS names."""
        (tmp_path / "weights").mkdir()
        trunk = torchvision.models.squeezenet1_1()
        torch.save(trunk.state_dict(), tmp_path / "weights/squeezenet1_1-b8a52dc0.pth")
        monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(tmp_path / "weights"))
        words = ("--metrics", "lpips", "--lpips", "squeeze", "--limit", 2, "--out", "out")
        assert run("eval", "--model", "bicubic:4", "--data", photos, *QUICK[:-2], *words).code == 0
        report = report_of(tmp_path / "out")
        assert report["protocol"]["lpips"] == "squeeze"
        assert report["protocol"]["name"] == "dcae, LPIPS of squeeze"
        assert "squeezenet1_1-b8a52dc0.pth" in report["protocol"]["weights"]["lpips"]
        assert "LPIPS: SqueezeNet 1.1" in (tmp_path / "out/report.md").read_text(encoding="utf-8")
        outcome = run("eval", "--model", "bicubic:4", "--data", photos, "--lpips", "resnet", "--out", "other")
        assert outcome.code == 2
        assert "unknown network of LPIPS 'resnet'" in outcome.err[0]

    def test_the_seed_is_that_of_sampled_latents(self, run: Any, model_dir: Path, photos: Path, tmp_path: Path) -> None:
        words = ("--model", model_dir, "--data", photos, *QUICK, "--protocol", "lightningdit", "--limit", 2)
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            assert run("eval", *words, "--seed", seed, "--out", name).code == 0
        first, again, other = (values_of(tmp_path / name)["psnr"] for name in "abc")
        assert first == again
        assert first != other

    def test_lower_precision_is_that_of_the_model(
        self, run: Any, model_dir: Path, photos: Path, tmp_path: Path
    ) -> None:
        words = ("--model", model_dir, "--data", photos, *QUICK, "--limit", 2, "--dtype", "bfloat16", "--out", "out")
        assert run("eval", *words).code == 0
        assert "Model computed in bfloat16." in (tmp_path / "out/report.md").read_text(encoding="utf-8")


def unreachable(*_: Any, **__: Any) -> Any:
    raise URLError("the network\nis unreachable")


class TestRefusals:
    def one_line(self, outcome: Any) -> str:
        assert outcome.code == 2
        assert outcome.out == []
        assert len(outcome.err) == 1, outcome.err
        assert outcome.err[0].startswith("dc-ssdae eval: ")
        return outcome.err[0].removeprefix("dc-ssdae eval: ")

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            (["--protocol", "dcea"], "unknown protocol 'dcea' (did you mean 'dcae'?)"),
            (["--metrics", "psnr,lpisp"], "unknown metric 'lpisp' (did you mean 'lpips'?)"),
            (["--metrics", ""], "unknown metric ''"),
            (["--sampler", "nestorov"], "'nestorov' (did you mean 'nesterov'?)"),
            (["--sampler", "one_step", "--steps", "2"], "one_step"),
            (["--step_size", "x"], "argument --step_size: 'x' is not a number"),
            (["--size", "0"], "argument --size: '0' is not a whole number from 1 on"),
            (["--size", "20"], "20"),
            (["--limit", "0"], "argument --limit: '0' is not a whole number from 1 on"),
            (["--batch", "0"], "argument --batch: '0' is not a whole number from 1 on"),
            (["--show", "0"], "argument --show: '0' is not a whole number from 1 on"),
            (["--seed", "-1"], "argument --seed: '-1' is not a whole number from 0"),
            (["--data", "no/such/folder"], "there is no folder 'no/such/folder'"),
            (["--data", ""], "argument --data: the name is empty"),
            (["--import", "no_such_module"], "no_such_module"),
            (["--device", "gpu"], "unknown device 'gpu'"),
            (["--protocl", "dcae"], "unknown option '--protocl' (did you mean '--protocol'?)"),
            (["--out", "file"], "--out file is a file, not a folder"),
            (["--out", ""], "argument --out: the name is empty"),
        ],
    )
    def test_what_is_wrong_is_one_line_and_writes_nothing(
        self, run: Any, model_dir: Path, photos: Path, tmp_path: Path, words: list[str], named: str
    ) -> None:
        (tmp_path / "file").write_text("kept")
        before = sorted(tmp_path.iterdir())
        outcome = run("eval", "--model", model_dir, "--data", photos, *QUICK, "--out", tmp_path / "out", *words)
        assert named in self.one_line(outcome)
        assert sorted(path for path in tmp_path.iterdir() if path.name != "__pycache__") == before
        assert (tmp_path / "file").read_text() == "kept"

    @pytest.mark.parametrize(
        ("model", "named"),
        [
            ("jpeg:0", "the quality is a whole number from 1 to 100, as in jpeg:75"),
            ("webp:best", "the quality is a whole number from 1 to 100, as in webp:75"),
            ("bicubic:0.5", "the factor is a number from 1 on, as in bicubic:8"),
            ("preset:dmeo", "unknown preset 'dmeo' (did you mean 'demo'?)"),
            ("python:nodots", "write python:MODULE.NAME"),
            ("python:no_such_module_here.f", "no_such_module_here"),
            ("python:eval_peers.blured", "'blured' (did you mean 'blurred'?)"),
            ("python:eval_peers.constant", "is neither a function from images to images nor an object"),
            ("zip:3", "'zip:3' names no model; it is the folder"),
            ("jpeg:", "'jpeg:' names no model"),
            ("./no/such/folder", "there is no folder './no/such/folder'"),
            ("empty", "config.json"),
            ("diffusers:empty", "there is no config.json, neither there nor in vae/"),
            (" ", "argument --model: the name is empty"),
        ],
    )
    def test_what_names_no_model(self, run: Any, photos: Path, tmp_path: Path, model: str, named: str) -> None:
        (tmp_path / "empty").mkdir()
        assert named in self.one_line(run("eval", "--model", model, "--data", photos, *QUICK, "--out", "out"))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("model", "named"),
        [
            ("python:eval_peers.nan", "gives NaN or infinity in 2 of"),
            ("python:eval_peers.half", "gives images of shape 2×3×16×16 for 2×3×32×32"),
            ("python:eval_peers.greedy", "out of memory with --batch 2; try a smaller one, or --dtype bfloat16"),
        ],
    )
    def test_a_model_that_fails(self, run: Any, photos: Path, tmp_path: Path, model: str, named: str) -> None:
        outcome = run("eval", "--model", model, "--data", photos, *QUICK, "--batch", 2, "--out", "out")
        assert self.one_line(outcome).startswith(named)
        assert not (tmp_path / "out").exists()

    def test_other_files_in_the_folder_are_left_alone(self, run: Any, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/notes.txt").write_text("kept")
        assert run("eval", "--model", "bicubic:4", "--data", photos, *QUICK, "--out", "out").code == 0
        assert (tmp_path / "out/notes.txt").read_text() == "kept"
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted((*FILES, "notes.txt"))

    def test_a_folder_without_images(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "nothing").mkdir()
        line = self.one_line(run("eval", "--model", "bicubic:4", "--data", "nothing", *QUICK))
        assert line.startswith("there are no images in 'nothing'")

    def test_a_folder_of_images_that_cannot_be_read(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "broken").mkdir()
        for name in ("a.png", "b.jpg"):
            (tmp_path / "broken" / name).write_bytes(b"no picture")
        line = self.one_line(run("eval", "--model", "bicubic:4", "--data", "broken", *QUICK))
        assert line.startswith("none of 2 images can be read; the first: cannot read image 'broken/a.png'")
        assert not (tmp_path / "evaluation").exists()

    def test_a_download_without_a_network(
        self, run: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backbones, "urlopen", unreachable)
        monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
        words = (*QUICK[:-1], "psnr,lpips", "--download", "--out", "out")
        line = self.one_line(run("eval", "--model", "bicubic:4", "--data", photos, *words))
        assert line.startswith("LPIPS needs alexnet-owt-7be5be79.pth, which could not be downloaded from https://")
        assert "the network" in line
        assert "leave --download out" in line
        assert not (tmp_path / "out").exists()

    def test_required_options_are_named(self, run: Any) -> None:
        assert self.one_line(run("eval")) == "the following arguments are required: --data"


def test_help_names_what_can_be_asked_for(run: Any) -> None:
    """That it is quick, without importing torch, is in test_cli_main.py."""
    outcome = run("eval", "--help")
    assert outcome.code == 0
    text = " ".join(" ".join(outcome.out).split())
    for word in ("--model", "--protocol", "lightningdit", "--random_backbones", "jpeg:QUALITY", "--steps", "torchrun"):
        assert word in text


# --- two processes ---


Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run `dc-ssdae eval` in two processes with one thread each, so that they compute as this one does."""

    def start(*words: object) -> "subprocess.CompletedProcess[str]":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dc_ssdae", "eval"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        return subprocess.run(
            [sys.executable, *launcher, *map(str, words)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            timeout=300,
        )

    return start


def assert_close(found: Any, expected: Any, where: str = "") -> None:
    """To 1e-6."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, f"{where}/{place}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6), where
    else:
        assert found == expected, where


@pytest.mark.slow
def test_two_processes_report_what_one_does(
    run: Any, launch: Launch, model_dir: Path, photos: Path, tmp_path: Path
) -> None:
    words = ("--model", model_dir, "--data", photos, "--size", 32, "--workers", 0, "--device", "cpu", "--batch", 1)
    given = (*words, "--metrics", "psnr,ssim", "--protocol", "lightningdit")
    alone = run("eval", *given, "--out", "one")
    assert alone.code == 0
    done = launch(*given, "--out", "two")
    assert done.returncode == 0, done.stderr
    # Each line once, though a launcher has things of its own to say.
    assert done.stdout.splitlines() == [line.replace("one/", "two/") for line in alone.out]
    assert [line for line in done.stderr.splitlines() if line.startswith("dc-ssdae eval: ")] == alone.err
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(FILES)
    one, two = report_of(tmp_path / "one"), report_of(tmp_path / "two")
    assert one.pop("command") != two.pop("command")
    assert_close(two, one)
    for mine, theirs in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        assert (mine["name"], mine["broken"]) == (theirs["name"], theirs["broken"])
        if mine["psnr"]:
            assert float(mine["psnr"]) == pytest.approx(float(theirs["psnr"]), abs=1e-6)


def test_two_processes_refuse_together_in_one_line(launch: Launch, photos: Path, tmp_path: Path) -> None:
    words = ("--data", photos, *QUICK, "--batch", 1, "--out", "out")
    done = launch("--model", "python:eval_peers.nan", *words)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("dc-ssdae eval: ")]
    assert len(told) == 1
    assert told[0].startswith("dc-ssdae eval: gives NaN or infinity in 1 of")
    assert told[0].endswith("0.png first")
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()
