"""`dc-ssdae eval`: what it writes and prints of a model, what its options change, and what it refuses."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_samples import WEIGHTS, Run, Words, save_photos

from dc_ssdae.evaluation import evaluate as evaluate_module

pytestmark = pytest.mark.usefixtures("workplace")

FILES = ["images.csv", "report.html", "report.json", "report.md"]


def report_of(name: str) -> Any:
    return json.loads(Path(name, "report.json").read_text(encoding="utf-8"))


def text_of(name: str) -> str:
    return Path(name, "report.md").read_text(encoding="utf-8")


def lines_of(name: str) -> list[dict[str, str]]:
    with Path(name, "images.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_it_writes_four_files_and_prints_them(run: Run, model_dir: Path, measuring: Words, five_photos: Path) -> None:
    Path("evaluation").mkdir()
    Path("evaluation/notes.txt").write_text("kept")
    more = ("--metrics", "psnr, ssim", "--workers", 1, "--batch", 2, "--show", 2)
    outcome = run("eval", "--model", f"mine={model_dir}", *measuring, *more)
    assert outcome.code == 0
    (line,) = outcome.err
    assert line.startswith(f"dc-ssdae eval: left out: cannot read image '{five_photos}/3b.png'")
    assert sorted(os.listdir("evaluation")) == sorted((*FILES, "notes.txt"))
    assert outcome.out[-1].startswith("-> evaluation/report.html, ")
    assert "\n".join(outcome.out[:-1]).strip() == text_of("evaluation").strip()

    report = report_of("evaluation")
    assert (report["model"], report["images"], list(report["broken"])) == ("mine", 5, [f"{five_photos}/3b.png"])
    assert report["protocol"] | {"name": "dcae", "size": 32, "data": five_photos.name} == report["protocol"]
    metrics = report["metrics"]
    assert {name for name, cell in metrics.items() if cell["value"] is not None} == {"psnr", "ssim"}

    lines = lines_of("evaluation")
    assert [line["name"] for line in lines if line["broken"]] == ["3b.png"]
    values = [float(line["psnr"]) for line in lines if line["psnr"]]
    assert sum(values) / 5 == pytest.approx(metrics["psnr"]["value"])
    assert Path("evaluation/report.html").read_text(encoding="utf-8").count("<h3>") == 4


@pytest.mark.usefixtures("full_disk")
def test_figures_are_printed_though_they_cannot_be_written(run: Run, measuring: Words) -> None:
    outcome = run("eval", "--model", "bicubic:4", *measuring)
    assert outcome.code == 2
    assert any(line.startswith("| PSNR (dB) | ") for line in outcome.out)
    assert "report.html" in outcome.err[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_names_of_all_kinds_are_kept(run: Run, measuring: Words) -> None:
    names = ["<b>&amp;", "🦆 | $x", "a,b;\"c'", os.fsdecode(b"\xe9\xff")]
    save_photos(Path("names"), *names)
    assert run("eval", "--model", "<i>=bicubic:4", *measuring, "--data", "names", "--size", 48).code == 0
    as_utf8 = [f"{name}.png".encode("utf-8", "backslashreplace").decode() for name in sorted(names)]
    assert [line["name"] for line in lines_of("evaluation")] == as_utf8
    page = Path("evaluation/report.html").read_text(encoding="utf-8")
    for escaped in ("<h3>&lt;b&gt;&amp;amp;.png</h3>", "<h3>\\udce9\\udcff.png</h3>", "Evaluation of &lt;i&gt;"):
        assert escaped in page


def test_a_codec_on_some_validation_images_under_another_protocol(run: Run) -> None:
    save_photos(Path("data"), "train/0", "validation/1", "validation/2", "validation/3")
    given = ("--data", "data", "--protocol", "original", "--limit", 2, "--steps", 3, "--workers", 0, "--device", "cpu")
    assert run("eval", "--model", "jpeg:40", *given, "--lpips", "vgg").code == 0
    report = report_of("evaluation")
    protocol = {"name": "original, LPIPS of vgg", "size": 128, "latent": "mean", "data": "data/validation"}
    assert protocol.items() <= report["protocol"].items()
    assert [line["name"] for line in lines_of("evaluation")] == ["1.png", "2.png"]
    assert report["protocol"]["decoding"] == {}, "codecs take no steps"
    assert "is not on this machine" in report["metrics"]["lpips"]["reason"]


def test_our_models_decode_as_they_are_told(run: Run, model_dir: Path, measuring: Words) -> None:
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
        assert run("eval", "--model", model_dir, *measuring, "--limit", 2, "--out", name, *more).code == 0
        psnr[name] = report_of(name)["metrics"]["psnr"]["value"]
    assert psnr.pop("again") == psnr["seed"]
    assert len(set(psnr.values())) == 4
    told = {"sampler": "nesterov", "num_steps": 2, "step_size": [0.1, 0.05], "momentum": 0.2}
    assert report_of("steps")["protocol"]["decoding"] == told
    assert "bfloat16" in text_of("steps")


def test_the_figures_get_into_the_model(
    run: Run, model_dir: Path, measuring: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(model_dir, "copied"))
    given = ("eval", "--model", copied, *measuring, "--add-to-model")
    outcome = run(*given, "--limit", 2, "--out", "first")
    assert (outcome.code, outcome.out[-1]) == (0, "-> copied/config.json, copied/README.md")
    more = ("--limit", 2, "--steps", 2, "--metrics", "psnr,lpips", "--random_backbones", "--out", "second")
    assert run(*given, *more).code == 0
    assert run(*given, "--out", "third").code == 0
    before = (copied / "config.json").read_bytes()
    in_steps, in_one = json.loads(before)["provenance"]["evaluations"]
    assert in_steps["decoding"] == {"num_steps": 2}
    assert "random weights" in in_steps["metrics"]["lpips"]["note"]
    assert (in_one["decoding"], in_one["images"]) == ({}, 5), "the later figures replace those of the same kind"
    found = report_of("third")["metrics"]["psnr"]
    assert in_one["metrics"] == {"psnr": {key: found[key] for key in ("value", "low", "high")}}
    interval = f"{found['value']:.5g} ({found['low']:.5g} to {found['high']:.5g})"
    assert f"| `psnr` | {interval} |" in (copied / "README.md").read_text()

    measure = evaluate_module.evaluate

    def measured(*given: Any) -> Any:
        shutil.copy(copied / WEIGHTS, "new")
        os.replace("new", copied / WEIGHTS)
        return measure(*given)

    monkeypatch.setattr(evaluate_module, "evaluate", measured)
    outcome = run(*given, "--limit", 3, "--out", "fourth")
    assert outcome.code == 2
    assert "the weights in copied have changed" in outcome.err[-1]
    assert (copied / "config.json").read_bytes() == before


# --- two processes ---


def launch(*words: object) -> "subprocess.CompletedProcess[str]":
    """Run `dc-ssdae eval` in two processes with one thread each, so that they compute as this one does."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dc_ssdae", "eval"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)


@pytest.mark.slow
def test_two_processes_report_what_one_does(run: Run, model_dir: Path, measuring: Words) -> None:
    given = ("--model", model_dir, *measuring, "--batch", 1, "--metrics", "psnr,ssim", "--protocol", "lightningdit")
    alone = run("eval", *given, "--out", "one")
    done = launch(*given, "--out", "two")
    assert (alone.code, done.returncode) == (0, 0), done.stderr
    # Each line once, though a launcher has things of its own to say.
    assert done.stdout.splitlines() == [line.replace("one/", "two/") for line in alone.out]
    assert [line for line in done.stderr.splitlines() if line.startswith("dc-ssdae eval: ")] == alone.err
    assert sorted(os.listdir("two")) == FILES
    assert [line["name"] for line in lines_of("two")] == [line["name"] for line in lines_of("one")]


def test_two_processes_refuse_together_in_one_line(measuring: Words) -> None:
    done = launch("--model", "python:peers.nan", *measuring, "--batch", 1)
    assert (done.returncode != 0, done.stdout) == (True, "")
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("dc-ssdae eval: ")]
    assert "NaN or infinity for 0.png" in told
    assert not Path("evaluation").exists()
