"""`dc-ssdae compare`: what it writes and prints of several models, one of which may fail, and what it refuses."""

import gc
import html
import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from cli_samples import random_pixels
from PIL import Image
from tiny_models import tiny

from dc_ssdae.evaluation.estimates import METRICS
from dc_ssdae.losses import backbones

FILES = ("index.html", "table.md", "table.json", "pareto.png")
QUICK = ("--size", 32, "--workers", 0, "--device", "cpu", "--rounds", 1, "--metrics", "psnr")
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

def bug(x):
    return 1 // 0

class Blocks:
    def encode(self, x):
        return F.avg_pool2d(x, 8)

    def decode(self, z):
        return F.interpolate(z, scale_factor=8)
"""


pytestmark = pytest.mark.filterwarnings("ignore:Glyph .* missing from font")  # as there is no duck in DejaVu Sans


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """These images are too small for more than one thread to be of use, and libraries too large to be collected."""
    for name in ("dc_ssdae.evaluation.arena_report", "matplotlib.figure", "scipy.stats", "torchmetrics.image.fid"):
        importlib.import_module(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
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
    return folder


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder, with candidates in a module, on a machine without weights."""
    (tmp_path / "compare_peers.py").write_text(PEERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(backbones.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def table_of(folder: Path) -> Any:
    return json.loads((folder / "table.json").read_text(encoding="utf-8"))


def rows_of(folder: Path) -> dict[str, Any]:
    return {row["model"]: row for row in table_of(folder)["rows"]}


def page_of(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def one_line(outcome: Any) -> str:
    assert outcome.code == 2
    assert outcome.out == []
    assert len(outcome.err) == 1, outcome.err
    assert outcome.err[0].startswith("dc-ssdae compare: ")
    return outcome.err[0].removeprefix("dc-ssdae compare: ")


class TestComparison:
    def test_it_writes_four_files_and_prints_the_table(
        self, run: Any, model_dir: Path, photos: Path, tmp_path: Path
    ) -> None:
        models = (model_dir, "mine=python:compare_peers.Blocks", "python:compare_peers.blurred", "jpeg:50", "bicubic:4")
        labels = ["small", "mine", "blurred", "jpeg:50", "bicubic:4"]
        words = ("--size", 32, "--workers", 1, "--device", "cpu", "--metrics", "psnr,ssim", "--batch", 2, "--rounds", 2)
        outcome = run("compare", *models, "--data", photos, *words, "--show", 3, "--out", "out")
        assert outcome.code == 0
        assert outcome.err == []
        out = tmp_path / "out"
        assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
        assert outcome.out[-1] == f"-> {', '.join(f'out/{name}' for name in FILES)}"
        printed = (out / "table.md").read_text(encoding="utf-8")
        assert "\n".join(outcome.out[:-1]).strip() == printed.strip()
        firsts = [line.split(" | ")[0].removeprefix("| ").split(" (")[0] for line in printed.splitlines()[2:7]]
        assert firsts == labels

        rows = rows_of(out)
        assert list(rows) == labels
        for label, row in rows.items():
            assert "failed" not in row
            assert row["psnr"]["low"] < row["psnr"]["value"] < row["psnr"]["high"]
            assert row["decode"]["value"] > 0
            assert (row["encode"]["value"] is None) == (label == "blurred")
        assert rows["small"]["latent_shape"]["value"] == [4, 4, 4]
        assert rows["small"]["tokens"]["value"] == 16
        assert rows["mine"]["compression"]["value"] == 64
        assert rows["jpeg:50"]["bits_per_pixel"]["value"] > 0
        assert rows["small"]["evaluations"]["value"] == 1
        table = table_of(out)
        assert table["protocol"]["images"] == COUNT
        assert table["protocol"]["data"] == photos.name
        assert (table["speed"]["batch"], table["speed"]["rounds"]) == (2, 2)

        page = page_of(out)
        assert "5 of 5 autoencoders reconstructed the same 5 images of 32×32 px." in page
        assert re.findall(r"<h3>(.*?)</h3>", page) == ["0.png", "1.png", "3.png"]
        for label in labels:
            assert page.count(f"<b>{label}</b>") == 3
        with Image.open(out / "pareto.png") as picture:
            assert picture.width > 800

    def test_figures_are_those_of_eval(self, run: Any, model_dir: Path, photos: Path, tmp_path: Path) -> None:
        words = ("--data", photos, "--size", 32, "--workers", 0, "--device", "cpu", "--metrics", "psnr,ssim")
        assert run("compare", "jpeg:20", model_dir, *words, "--rounds", 1, "--out", "out").code == 0
        assert run("eval", "--model", model_dir, *words, "--out", "one").code == 0
        row = rows_of(tmp_path / "out")["small"]
        metrics = json.loads((tmp_path / "one/report.json").read_text(encoding="utf-8"))["metrics"]
        for name in METRICS:
            metrics[name].pop("unit")
            assert row[name] == pytest.approx(metrics[name])

    def test_random_weights_are_told_everywhere(self, run: Any, photos: Path, tmp_path: Path) -> None:
        words = ("--data", photos, *QUICK, "--limit", 2, "--out", "out")
        assert run("compare", "mine=preset:demo", "bicubic:4", *words).code == 0
        rows = rows_of(tmp_path / "out")
        assert rows["mine"]["remarks"] == ["random weights"]
        sentence = "mine has random weights: cost and shape can be compared, quality means nothing."
        assert sentence in table_of(tmp_path / "out")["caveats"]
        assert f"- {sentence}" in (tmp_path / "out/table.md").read_text(encoding="utf-8").splitlines()
        page = page_of(tmp_path / "out")
        assert f"<li>{sentence}</li>" in page
        assert page.count("dB, random weights</figcaption>") == 2

    def test_images_that_cannot_be_read_are_reported_and_left_out(self, run: Any, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        for path in photos.iterdir():
            (tmp_path / "data" / path.name).symlink_to(path)
        (tmp_path / "data/3b.png").write_bytes(b"no picture")
        outcome = run("compare", "jpeg:50", "bicubic:4", "--data", "data", *QUICK, "--out", "out")
        assert outcome.code == 0
        assert table_of(tmp_path / "out")["protocol"]["images"] == COUNT
        assert len(outcome.err) == 1
        assert outcome.err[0].startswith("dc-ssdae compare: left out: cannot read image 'data/3b.png'")

    def test_names_of_all_kinds_are_kept(self, run: Any, photos: Path, tmp_path: Path) -> None:
        labels = ["<b>&amp;", "a|b", "🦆", "$x^{", "_mine", '"']
        models = [f"{label}=jpeg:{10 * place + 10}" for place, label in enumerate(labels)]
        words = ("--data", photos, *QUICK, "--limit", 2, "--show", 1, "--out", "out")
        outcome = run("compare", *models, *words)
        assert outcome.code == 0
        assert list(rows_of(tmp_path / "out")) == labels
        page = page_of(tmp_path / "out")
        for label in ("&lt;b&gt;&amp;amp;", "a|b", "🦆", "$x^{", "_mine", "&#34;"):
            assert f"<b>{label}</b>" in page
        assert "| a\\|b (codec" in (tmp_path / "out/table.md").read_text(encoding="utf-8")

    def test_names_that_cannot_be_decoded_are_escaped(self, run: Any, photos: Path, tmp_path: Path) -> None:
        try:
            (tmp_path / "data").mkdir()
            (tmp_path / "data" / os.fsdecode(b"\xff.png")).symlink_to(photos / "0.png")
        except (OSError, UnicodeError):
            pytest.skip("the file system refuses names that are not UTF-8")
        label = os.fsdecode(b"model\xe9")
        words = ("--data", "data", *QUICK, "--out", "out")
        assert run("compare", f"{label}=bicubic:4", "jpeg:50", *words).code == 0
        assert list(rows_of(tmp_path / "out")) == [label, "jpeg:50"]
        assert "<b>model\\udce9</b>" in page_of(tmp_path / "out")
        assert "<h3>\\udcff.png</h3>" in page_of(tmp_path / "out")


class TestOptions:
    @pytest.mark.parametrize(
        ("protocol", "size"), [("dcae", 256), ("lightningdit", 256), ("rae", 256), ("original", 128)]
    )
    def test_a_protocol_has_its_own_size(
        self, run: Any, photos: Path, tmp_path: Path, protocol: str, size: int
    ) -> None:
        words = (*QUICK[2:], "--protocol", protocol, "--limit", 2, "--show", 1, "--out", "out")
        assert run("compare", "bicubic:8", "--data", photos, *words).code == 0
        found = table_of(tmp_path / "out")["protocol"]
        assert (found["name"], found["size"], found["images"]) == (protocol, size, 2)
        latent = rows_of(tmp_path / "out")["bicubic:8"]["latent_shape"]["value"]
        assert latent == [3, size // 8, size // 8]

    def test_only_the_metrics_that_are_asked_for_are_taken(self, run: Any, photos: Path, tmp_path: Path) -> None:
        words = (*QUICK[:-1], "ssim", "--out", "out")
        assert run("compare", "bicubic:8", "--data", photos, *words).code == 0
        row = rows_of(tmp_path / "out")["bicubic:8"]
        for name in METRICS:
            assert (row[name]["value"] is not None) == (name == "ssim")
            assert row[name].get("reason") == (None if name == "ssim" else "not asked for")
        assert "PSNR (dB)" not in (tmp_path / "out/table.md").read_text(encoding="utf-8").splitlines()[0]

    @pytest.mark.parametrize(
        ("words", "evaluations"),
        [([], 1), (["--steps", "3"], 3), (["--sampler", "gradient_descent", "--steps", "2", "--step_size", "0.1"], 2)],
    )
    def test_our_models_decode_as_they_are_told(
        self, run: Any, model_dir: Path, photos: Path, tmp_path: Path, words: list[str], evaluations: int
    ) -> None:
        given = ("--data", photos, *QUICK, "--limit", 2, "--out", "out")
        assert run("compare", model_dir, "jpeg:50", *given, *words).code == 0
        rows = rows_of(tmp_path / "out")
        assert rows["small"]["evaluations"]["value"] == evaluations
        assert rows["jpeg:50"]["evaluations"]["value"] is None

    def test_random_backbones_are_noted(self, run: Any, photos: Path, tmp_path: Path) -> None:
        words = ("--metrics", "lpips", "--random_backbones", "--limit", 3, "--out", "out")
        outcome = run("compare", "bicubic:8", "bicubic:2", "--data", photos, *QUICK[:-2], *words)
        assert outcome.code == 0
        rows = rows_of(tmp_path / "out")
        assert rows["bicubic:8"]["lpips"]["value"] > rows["bicubic:2"]["lpips"]["value"] > 0
        note = "LPIPS: its network has random weights: comparable only within this report."
        assert f"- {note}" in outcome.out
        assert f"<li>{note}</li>" in page_of(tmp_path / "out")
        assert table_of(tmp_path / "out")["protocol"]["weights"] == {"lpips": "random weights"}

    def test_two_folders_of_the_same_name_are_told_apart_by_their_paths(
        self, run: Any, model_dir: Path, photos: Path, tmp_path: Path
    ) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "vae").symlink_to(model_dir)
        words = ("--data", photos, *QUICK, "--limit", 2, "--out", "out")
        outcome = run("compare", "a/vae", "b/vae", *words)
        assert outcome.code == 0
        assert list(rows_of(tmp_path / "out")) == ["a/vae", "b/vae"]


class TestFailures:
    @pytest.mark.parametrize(
        ("name", "start"),
        [
            ("nan", "gives NaN or infinity in 2 of"),
            ("half", "gives images of shape 2×3×16×16 for 2×3×32×32"),
            ("greedy", "out of memory with batches of 2"),
            ("bug", "ZeroDivisionError: "),
        ],
    )
    def test_one_that_fails_is_in_its_row_and_the_others_finish(
        self, run: Any, photos: Path, tmp_path: Path, name: str, start: str
    ) -> None:
        models = ("jpeg:50", f"bad=python:compare_peers.{name}", "bicubic:4")
        outcome = run("compare", *models, "--data", photos, *QUICK, "--batch", 2, "--out", "out")
        assert outcome.code == 2
        rows = rows_of(tmp_path / "out")
        assert list(rows) == ["jpeg:50", "bad", "bicubic:4"]
        reason = rows["bad"]["failed"]
        assert reason.startswith(start)
        assert outcome.err == [f"dc-ssdae compare: bad failed: {reason}"]
        assert rows["bad"]["psnr"] == {"value": None, "low": None, "high": None, "reason": "failed"}
        assert rows["jpeg:50"]["psnr"]["value"] > 10
        assert rows["bicubic:4"]["decode"]["value"] > 0
        assert any(line.startswith("| bad") and f"| failed: {reason} |" in line for line in outcome.out)
        assert outcome.out[-1].startswith("-> out/index.html, ")
        page = page_of(tmp_path / "out")
        assert "2 of 3 autoencoders reconstructed the same 5 images of 32×32 px; bad failed." in page
        assert f"failed: {reason}" in html.unescape(page)

        alone = run("compare", "jpeg:50", "bicubic:4", "--data", photos, *QUICK, "--batch", 2, "--out", "alone")
        assert alone.code == 0
        for label, row in rows_of(tmp_path / "alone").items():
            assert row["psnr"] == rows[label]["psnr"]

    def test_where_all_fail_nothing_is_written(self, run: Any, photos: Path, tmp_path: Path) -> None:
        models = ("python:compare_peers.nan", "python:compare_peers.half")
        outcome = run("compare", *models, "--data", photos, *QUICK, "--out", "out")
        assert outcome.code == 2
        assert outcome.out == []
        assert [line.split(": ")[1] for line in outcome.err] == [
            "nan failed",
            "half failed",
            "every model failed; nothing is written",
        ]
        assert not (tmp_path / "out").exists()

    def test_debug_shows_where_it_failed(self, run: Any, photos: Path) -> None:
        models = ("python:compare_peers.bug", "bicubic:4")
        outcome = run("compare", *models, "--data", photos, *QUICK, "--debug", "--out", "out")
        assert outcome.code == 2
        assert outcome.err[0] == "Traceback (most recent call last):"
        assert any("compare_peers.py" in line for line in outcome.err)
        assert outcome.err[-1].startswith("dc-ssdae compare: bug failed: ZeroDivisionError: ")

    def test_images_too_small_for_a_metric_are_no_models_fault(self, run: Any, photos: Path, tmp_path: Path) -> None:
        words = ("--data", photos, "--size", 16, *QUICK[2:-2], "--metrics", "psnr,lpips", "--random_backbones")
        outcome = run("compare", "bicubic:4", "jpeg:50", *words, "--out", "out")
        assert one_line(outcome) == "LPIPS of alex needs images of at least 31 pixels; give a larger --size"
        assert not (tmp_path / "out").exists()


def unreachable(*_: Any, **__: Any) -> Any:
    raise URLError("the network\nis unreachable")


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "named"),
        [
            (["--protocol", "dcea"], "unknown protocol 'dcea' (did you mean 'dcae'?)"),
            (["--metrics", "psnr,lpisp"], "unknown metric 'lpisp' (did you mean 'lpips'?)"),
            (["--sampler", "nestorov"], "'nestorov' (did you mean 'nesterov'?)"),
            (["--sampler", "one_step", "--steps", "2"], "one_step"),
            (["--momentum", "x"], "argument --momentum: 'x' is not a number"),
            (["--size", "0"], "argument --size: '0' is not a whole number from 1 on"),
            (["--rounds", "0"], "argument --rounds: '0' is not a whole number from 1 on"),
            (["--show", "0"], "argument --show: '0' is not a whole number from 1 on"),
            (["--data", "no/such/folder"], "there is no folder 'no/such/folder'"),
            (["--import", "no_such_module"], "no_such_module"),
            (["--device", "gpu"], "unknown device 'gpu'"),
            (["--roundz", "1"], "unknown option '--roundz' (did you mean '--rounds'?)"),
            (["--out", "file"], "--out file is a file, not a folder"),
            (["--out", ""], "argument --out: the name is empty"),
        ],
    )
    def test_what_is_wrong_is_one_line_and_writes_nothing(
        self, run: Any, model_dir: Path, photos: Path, tmp_path: Path, words: list[str], named: str
    ) -> None:
        (tmp_path / "file").write_text("kept")
        before = sorted(tmp_path.iterdir())
        outcome = run("compare", "jpeg:50", model_dir, "--data", photos, *QUICK, "--out", tmp_path / "out", *words)
        assert named in one_line(outcome)
        assert sorted(path for path in tmp_path.iterdir() if path.name != "__pycache__") == before
        assert (tmp_path / "file").read_text() == "kept"

    @pytest.mark.parametrize(
        ("models", "named"),
        [
            (["jpeg:0"], "the quality is a whole number from 1 to 100, as in jpeg:75"),
            (["bicubic:4", "bicubic:less"], "the factor is a number from 1 on, as in bicubic:8"),
            (["preset:dmeo"], "unknown preset 'dmeo' (did you mean 'demo'?)"),
            (["jpeg:50", "mine=python:no_such_module_here.f"], "mine: "),
            (["jpeg:50", "mine=python:compare_peers.blured"], "'blured' (did you mean 'blurred'?)"),
            (["mine=zip:3"], "'mine=zip:3' names no model; it is the folder"),
            (["./no/such/folder"], "there is no folder './no/such/folder'"),
            (["jpeg:50", "mine=empty"], "mine: "),
            (["jpeg:50", "diffusers:wrong"], "wrong"),
            ([""], "argument MODEL: the name is empty"),
            (["jpeg:50", "jpeg:50"], "two models are called 'jpeg:50'; name them apart with LABEL=…"),
            (["a=jpeg:50", "a=bicubic:4"], "two models are called 'a'; name them apart with LABEL=…"),
            (["blurred=jpeg:50", "python:compare_peers.blurred"], "two models are called 'blurred'"),
        ],
    )
    def test_what_names_no_model_or_two_alike(
        self, run: Any, photos: Path, tmp_path: Path, models: list[str], named: str
    ) -> None:
        """One that cannot be opened is told before the hours that the others take."""
        (tmp_path / "empty").mkdir()
        (tmp_path / "wrong").mkdir()
        config = {"_class_name": "AutoencoderKL", "block_out_channels": 3}
        (tmp_path / "wrong/config.json").write_text(json.dumps(config))
        assert named in one_line(run("compare", *models, "--data", photos, *QUICK, "--out", "out"))
        assert not (tmp_path / "out").exists()

    def test_a_folder_without_images(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "nothing").mkdir()
        line = one_line(run("compare", "bicubic:4", "--data", "nothing", *QUICK, "--out", "out"))
        assert line.startswith("there are no images in 'nothing'")

    def test_a_folder_of_images_that_cannot_be_read(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "broken").mkdir()
        for name in ("a.png", "b.jpg"):
            (tmp_path / "broken" / name).write_bytes(b"no picture")
        line = one_line(run("compare", "bicubic:4", "jpeg:50", "--data", "broken", *QUICK, "--out", "out"))
        assert line.startswith("none of 2 images can be read; the first: cannot read image 'broken/a.png'")
        assert not (tmp_path / "out").exists()

    def test_a_download_without_a_network(
        self, run: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backbones, "urlopen", unreachable)
        monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
        words = (*QUICK[:-1], "psnr,lpips", "--download", "--out", "out")
        line = one_line(run("compare", "bicubic:4", "--data", photos, *words))
        assert line.startswith("LPIPS needs alexnet-owt-7be5be79.pth, which could not be downloaded from https://")
        assert not (tmp_path / "out").exists()

    def test_several_processes_are_refused(
        self, run: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        line = one_line(run("compare", "bicubic:4", "--data", photos, *QUICK, "--out", "out"))
        assert line == "compare runs in one process, so that speeds can be compared; eval takes several"
        assert not (tmp_path / "out").exists()
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert run("compare", "bicubic:4", "--data", photos, *QUICK, "--limit", 1, "--out", "out").code == 0

    def test_required_options_are_named(self, run: Any) -> None:
        assert one_line(run("compare")) == "the following arguments are required: MODEL, --out, --data"


def test_help_names_what_can_be_asked_for(run: Any) -> None:
    """That it is quick, without importing torch, is in test_cli_main.py."""
    outcome = run("compare", "--help")
    assert outcome.code == 0
    text = " ".join(" ".join(outcome.out).split())
    for word in ("MODEL", "--rounds", "lightningdit", "--random_backbones", "jpeg:QUALITY", "LABEL=MODEL", "--steps"):
        assert word in text
