"""`dc-ssdae eval`: what it writes and prints of a model, what its options change, and what it refuses."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from cli_samples import WEIGHTS, Refusal, Run, Words, save_photos

from dc_ssdae.evaluation import evaluate as evaluate_module
from dc_ssdae.losses import backbones

pytestmark = pytest.mark.usefixtures("workplace")

FILES = ("report.html", "report.md", "report.json", "images.csv")
GOOD = ("0.png", "1.png", "2.png", "3.png", "4.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images, and a file that is none."""
    folder = save_photos(tmp_path_factory.mktemp("photos"), "0", "1", "2", "3", "4")
    (folder / "3b.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def words(photos: Path) -> Words:
    return ("--data", photos, "--size", 32, "--workers", 0, "--device", "cpu", "--metrics", "psnr")


def report_of(name: str, parse_float: Callable[[str], Any] = float) -> Any:
    return json.loads(Path(name, "report.json").read_text(encoding="utf-8"), parse_float=parse_float)


def text_of(name: str) -> str:
    return Path(name, "report.md").read_text(encoding="utf-8")


def lines_of(name: str) -> list[dict[str, str]]:
    with Path(name, "images.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_it_writes_four_files_and_prints_the_figures(run: Run, model_dir: Path, words: Words, photos: Path) -> None:
    Path("evaluation").mkdir()
    Path("evaluation/notes.txt").write_text("kept")
    more = ("--metrics", "psnr, ssim", "--workers", 1, "--batch", 2, "--show", 2)
    outcome = run("eval", "--model", f"mine={model_dir}", *words, *more)
    assert outcome.code == 0
    (line,) = outcome.err
    assert line.startswith(f"dc-ssdae eval: left out: cannot read image '{photos}/3b.png'")
    assert sorted(os.listdir("evaluation")) == sorted((*FILES, "notes.txt"))
    assert outcome.out[-1] == f"-> {', '.join(f'evaluation/{name}' for name in FILES)}"
    assert "\n".join(outcome.out[:-1]).strip() == text_of("evaluation").strip()

    report = report_of("evaluation")
    assert (report["model"], report["images"], list(report["broken"])) == ("mine", 5, [f"{photos}/3b.png"])
    assert report["latent_shape"] == [4, 4, 4]
    assert report["others"]["evaluations"]["value"] == 1
    assert report["protocol"] | {"name": "dcae", "size": 32, "data": photos.name} == report["protocol"]
    metrics = report["metrics"]
    assert {name for name, cell in metrics.items() if cell["value"] is not None} == {"psnr", "ssim"}
    assert metrics["lpips"]["reason"] == "not asked for"
    assert metrics["psnr"]["low"] < metrics["psnr"]["value"] < metrics["psnr"]["high"]
    assert f"| PSNR (more is better) | {metrics['psnr']['value']:.2f} dB |" in text_of("evaluation")

    lines = lines_of("evaluation")
    assert [line["name"] for line in lines if line["broken"]] == ["3b.png"]
    values = {line["name"]: float(line["psnr"]) for line in lines if line["psnr"]}
    assert tuple(values) == GOOD
    assert sum(values.values()) / 5 == pytest.approx(metrics["psnr"]["value"])
    assert Path("evaluation/report.html").read_text(encoding="utf-8").count("<h3>") == 4


@pytest.mark.usefixtures("full_disk")
def test_figures_are_printed_though_they_cannot_be_written(run: Run, words: Words) -> None:
    outcome = run("eval", "--model", "bicubic:4", *words)
    assert outcome.code == 2
    assert any(line.startswith("| PSNR (more is better) | ") for line in outcome.out)
    assert "report.html" in outcome.err[-1]


def test_names_of_all_kinds_are_kept(run: Run, words: Words, tmp_path: Path) -> None:
    names = ["<b>&amp;", "🦆 | $x", "a,b;\"c'", os.fsdecode(b"\xe9\xff")]
    try:
        save_photos(tmp_path / "names", *names)
    except (OSError, UnicodeError):
        pytest.skip("the file system refuses such names")
    assert run("eval", "--model", "<i>=bicubic:4", *words, "--data", "names", "--size", 48).code == 0
    as_utf8 = [f"{name}.png".encode("utf-8", "backslashreplace").decode() for name in sorted(names)]
    assert [line["name"] for line in lines_of("evaluation")] == as_utf8
    page = Path("evaluation/report.html").read_text(encoding="utf-8")
    for escaped in ("<h3>&lt;b&gt;&amp;amp;.png</h3>", "<h3>\\udce9\\udcff.png</h3>", "Evaluation of &lt;i&gt;"):
        assert escaped in page
    assert any("4 of 4 images were smaller than 48 px" in line for line in report_of("evaluation")["caveats"])


def test_a_codec_on_some_validation_images_under_another_protocol(run: Run, words: Words, tmp_path: Path) -> None:
    save_photos(tmp_path / "data", "train/0", "validation/1", "validation/2", "validation/3")
    given = ("--data", "data", "--protocol", "original", "--limit", 2, "--steps", 3, "--workers", 0, "--device", "cpu")
    assert run("eval", "--model", "jpeg:40", *given, "--lpips", "vgg").code == 0
    report = report_of("evaluation")
    protocol = {"name": "original, LPIPS of vgg", "size": 128, "latent": "mean", "data": "data/validation"}
    assert protocol.items() <= report["protocol"].items()
    assert [line["name"] for line in lines_of("evaluation")] == ["1.png", "2.png"]
    assert report["others"]["bits_per_pixel"]["value"] > 0
    assert report["protocol"]["decoding"] == {}, "codecs take no steps"
    reason = report["metrics"]["lpips"]["reason"]
    assert reason.startswith("weights ")
    assert f"| LPIPS (less is better) | – ({reason}) |" in text_of("evaluation")


def test_our_models_decode_as_they_are_told(run: Run, model_dir: Path, words: Words) -> None:
    decoding = ("--sampler", "nesterov", "--steps", 2, "--step_size", "0.1,0.05", "--momentum", 0.2)
    sampled = ("--protocol", "lightningdit", "--seed")
    psnr = {}
    for name, more in {
        "plain": (),
        "steps": (*decoding, "--dtype", "bfloat16"),
        "seed": (*sampled, 1),
        "again": (*sampled, 1),
        "other": (*sampled, 2),
    }.items():
        assert run("eval", "--model", model_dir, *words, "--limit", 2, "--out", name, *more).code == 0
        psnr[name] = report_of(name)["metrics"]["psnr"]["value"]
    assert psnr.pop("again") == psnr["seed"]
    assert len(set(psnr.values())) == 4
    steps = report_of("steps")
    assert steps["others"]["evaluations"]["value"] == 2
    told = {"sampler": "nesterov", "num_steps": 2, "step_size": [0.1, 0.05], "momentum": 0.2}
    assert steps["protocol"]["decoding"] == told
    assert "bfloat16" in text_of("steps")


class TestAddToModel:
    @pytest.fixture
    def copied(self, model_dir: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(model_dir, tmp_path / "copied"))

    def test_the_figures_get_into_the_model(self, run: Run, copied: Path, words: Words) -> None:
        given = ("eval", "--model", copied, *words, "--add-to-model")
        outcome = run(*given, "--limit", 2, "--out", "first")
        assert outcome.code == 0
        assert outcome.out[-1] == f"-> {copied / 'config.json'}, {copied / 'README.md'}"
        more = ("--limit", 2, "--steps", 2, "--metrics", "psnr,lpips", "--random_backbones", "--out", "second")
        assert run(*given, *more).code == 0
        assert run(*given, "--out", "third").code == 0
        in_steps, in_one = json.loads((copied / "config.json").read_text())["provenance"]["evaluations"]
        assert in_steps["decoding"] == {"num_steps": 2}
        assert "note" not in in_steps["metrics"]["psnr"]
        note = in_steps["metrics"]["lpips"]["note"]
        assert "random weights" in note
        assert f"- LPIPS: {note}." in text_of("second").splitlines()
        assert (in_one["decoding"], in_one["images"]) == ({}, 5), "the later figures replace those of the same kind"
        found = report_of("third")["metrics"]["psnr"]
        assert in_one["metrics"] == {"psnr": {key: found[key] for key in ("value", "low", "high")}}
        interval = f"{found['value']:.5g} ({found['low']:.5g} to {found['high']:.5g})"
        assert f"| `psnr` | {interval} |" in (copied / "README.md").read_text()
        assert f"psnr {interval}" in " ".join(" ".join(run("info", copied).out).split())

    def test_weights_that_changed_meanwhile_get_no_figures(
        self, run: Run, copied: Path, words: Words, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measure = evaluate_module.evaluate

        def measured(*given: Any) -> Any:
            shutil.copy(copied / WEIGHTS, copied / "new")
            os.replace(copied / "new", copied / WEIGHTS)
            return measure(*given)

        monkeypatch.setattr(evaluate_module, "evaluate", measured)
        before = (copied / "config.json").read_bytes()
        outcome = run("eval", "--model", copied, *words, "--add-to-model")
        assert outcome.code == 2
        assert str(copied) in outcome.err[-1]
        assert (copied / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("--protocol dcea", "did you mean 'dcae'"),
        ("--metrics psnr,lpisp", "did you mean 'lpips'"),
        ("--sampler nestorov", "did you mean 'nesterov'"),
        ("--sampler one_step --steps 2", "'num_steps'"),
        ("--size 20", "20"),
        ("--data no/such/folder", "'no/such/folder'"),
        ("--data broken", "'broken/a.png'"),
        ("--import no_such_module", "no_such_module"),
        ("--model jpeg:0", "jpeg:75"),
        ("--model ./absent", "'./absent'"),
        ("--model jpeg:75 --add-to-model", "--add-to-model"),
        ("--model owner/name --add-to-model", "--add-to-model"),
        ("--model python:peers.nan --batch 2", "NaN or infinity in 2 of"),
        ("--model python:peers.greedy --batch 2", "out of memory with --batch 2"),
        ("--metrics lpips --size 16 --random_backbones", "at least 31 pixels"),
        ("--metrics psnr,lpips --download", "https://"),
    ],
)
def test_what_is_wrong_is_one_line_and_writes_nothing(
    refusal: Refusal,
    model_dir: Path,
    words: Words,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: str,
    named: str,
) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise URLError("the network\nis unreachable")

    monkeypatch.setattr(backbones, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no picture")
    assert named in refusal("eval", "--model", model_dir, *words, *more.split())
    assert not (tmp_path / "evaluation").exists()


# --- two processes ---


Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def launch() -> Launch:
    """Run `dc-ssdae eval` in two processes with one thread each, so that they compute as this one does."""

    def start(*words: object) -> "subprocess.CompletedProcess[str]":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dc_ssdae", "eval"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, *launcher, *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)

    return start


@pytest.mark.slow
def test_two_processes_report_what_one_does(run: Run, launch: Launch, model_dir: Path, words: Words) -> None:
    given = ("--model", model_dir, *words, "--batch", 1, "--metrics", "psnr,ssim", "--protocol", "lightningdit")
    alone = run("eval", *given, "--out", "one")
    assert alone.code == 0
    done = launch(*given, "--out", "two")
    assert done.returncode == 0, done.stderr
    # Each line once, though a launcher has things of its own to say.
    assert done.stdout.splitlines() == [line.replace("one/", "two/") for line in alone.out]
    assert [line for line in done.stderr.splitlines() if line.startswith("dc-ssdae eval: ")] == alone.err
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir("two")) == sorted(FILES)
    one = report_of("one", lambda text: pytest.approx(float(text), rel=1e-6, abs=1e-6))
    two = report_of("two")
    assert one.pop("command") != two.pop("command")
    assert two == one
    for mine, theirs in zip(lines_of("one"), lines_of("two"), strict=True):
        assert (mine["name"], mine["broken"]) == (theirs["name"], theirs["broken"])
        assert float(mine["psnr"] or 0.0) == pytest.approx(float(theirs["psnr"] or 0.0), abs=1e-6)


def test_two_processes_refuse_together_in_one_line(launch: Launch, words: Words) -> None:
    done = launch("--model", "python:peers.nan", *words, "--batch", 1)
    assert (done.returncode != 0, done.stdout) == (True, "")
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("dc-ssdae eval: ")]
    assert "NaN or infinity in 1 of" in told
    assert told.endswith("0.png first")
    assert not Path("evaluation").exists()
