"""The entry point: help without torch, suggestions, and how errors, bugs and interruptions end."""

import importlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import entry_points, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from cli_samples import Run

from dc_ssdae.cli import main as main_module
from dc_ssdae.cli.common import for_each_file, say
from dc_ssdae.cli.main import COMMANDS, main
from dc_ssdae.cli.parser import Options
from dc_ssdae.errors import InputError
from dc_ssdae.settings import documentation


def test_help_listing_and_configurations_import_nothing_heavy() -> None:
    helped = [[*name.split(), "--help"] for name in ("", "bench", *COMMANDS)]
    configured = ["bench", "train", "--config", "demo", "--training.lr", "1e-4", "--print_config"]
    program = f"""
import sys
from dc_ssdae.cli.main import main
for words in {[["--version"], ["info"], configured, *helped]!r}:
    code = main(words)
    print("imported:", code, *[name for name in ("torch", "diffusers", "numpy", "PIL") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    told = [line for line in done.stdout.splitlines() if line.startswith("imported:")]
    assert told == ["imported: 0"] * (5 + len(COMMANDS))


def test_help_lists_every_command_and_describes_its_options(run: Run) -> None:
    outcome = run("--help")
    assert max(map(len, outcome.out)) <= 80
    for name, told in COMMANDS.items():
        assert any(line.split() == [*name.split(), *told.split()] for line in outcome.out)
        first, _, second = name.partition(" ")
        module = importlib.import_module(f"dc_ssdae.cli.{first}")
        options = getattr(module, f"{second.capitalize()}Options")
        assert callable(getattr(module, f"run_{second}" if second else "run"))
        assert all(documentation(options)[1][entry.name] for entry in fields(options))
        assert run(*name.split(), "--help").out[0].startswith(f"usage: dc-ssdae {name} ")


def test_version_and_entry_points(run: Run) -> None:
    assert run("--version").out == [f"dc-ssdae {version('dc-ssdae')}"]
    (script,) = entry_points(group="console_scripts", name="dc-ssdae")
    assert script.load() is main
    done = subprocess.run([sys.executable, "-m", "dc_ssdae", "decod"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dc-ssdae: unknown command 'decod' (did you mean 'decode'?)")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Put a command `made` in the table that raises an error."""

    def put(error: BaseException) -> None:
        def run(options: Options) -> int:
            raise error

        monkeypatch.setitem(sys.modules, "dc_ssdae.cli.made", SimpleNamespace(Options=Options, run=run))
        monkeypatch.setattr(main_module, "COMMANDS", {"made": "made for a test"})

    return put


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a thing\nis wrong"), 2, "dc-ssdae made: a thing is wrong"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "dc-ssdae made: x: No such file or directory"),
        (OSError(), 2, "dc-ssdae made: OSError"),
        (KeyboardInterrupt(), 130, "dc-ssdae made: interrupted"),
    ],
)
def test_expected_errors_are_one_line_and_debug_adds_the_traceback(
    error: BaseException, code: int, line: str, command: Callable[[BaseException], None], run: Run
) -> None:
    command(error)
    assert run("made") == (code, [], [line])
    for words in (["--debug", "made"], ["made", "--debug"]):
        outcome = run(*words)
        assert (outcome.code, outcome.err[-1]) == (code, line)
        assert outcome.err[0] == "Traceback (most recent call last):"


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), SystemExit(3)])
def test_what_is_not_expected_is_left_to_python(error: BaseException, command: Callable[[BaseException], None]) -> None:
    command(error)
    with pytest.raises(type(error)):
        main(["made"])


def test_a_reader_that_has_gone_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as stdout:
        done = subprocess.run([sys.executable, "-m", "dc_ssdae", "info"], stdout=stdout, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")


def test_what_the_output_cannot_encode_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    say("é\udce9 3 f²/c")
    stdout.flush()
    assert stdout.buffer.getvalue() == b"\\xe9\\udce9 3 f\\xb2/c\n"


@pytest.mark.parametrize("debug", [False, True])
def test_out_of_memory_fails_one_file_with_a_hint_and_a_bug_ends_it(
    debug: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def process(source: Path, target: Path) -> tuple[str, tuple[str, ...]]:
        if source.name == "bug":
            raise RuntimeError("shapes cannot be multiplied")
        if source.name == "big":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return "done", ()

    targets = {Path(name): Path(f"{name}.png") for name in ("one", "big", "two")}
    assert for_each_file(Options(debug=debug), targets, process) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [f"{name}: done -> {name}.png" for name in ("one", "two")]
    assert ("Traceback" in captured.err) is debug
    assert re.match(r"dc-ssdae: big: out of memory; try ", captured.err.splitlines()[-1])
    with pytest.raises(RuntimeError, match="shapes"):
        for_each_file(Options(), {Path("bug"): Path("bug.png")}, process)


def test_a_command_that_ends_well_closes_its_process_group(run: Run, tmp_path: Path) -> None:
    importlib.import_module("dc_ssdae.distributed")  # as a command does that joins processes
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert run("info", "no-preset").code == 2
        assert dist.is_initialized()
        assert run("info").code == 0
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
