"""The entry point: help without torch, suggestions, and how errors, bugs and interruptions end."""

import importlib
import io
import os
import re
import subprocess
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch.distributed as dist

from dc_ssdae.cli import main as main_module
from dc_ssdae.cli.common import Done, Job, for_each_file
from dc_ssdae.cli.main import COMMANDS, Command, main
from dc_ssdae.cli.parser import CommandParser
from dc_ssdae.errors import InputError

HEAVY = ("torch", "diffusers", "numpy", "PIL")


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS), ["info"], []])
def test_help_and_listing_import_nothing_heavy(words: list[str]) -> None:
    program = f"""
import sys
from dc_ssdae.cli.main import main
code = main({words!r})
print("imported:", *[name for name in {HEAVY!r} if name in sys.modules])
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == (0 if words else 2), done.stderr
    assert done.stdout.splitlines()[-1].strip() == "imported:"


def test_help_lists_every_command(run: Callable) -> None:
    outcome = run("--help")
    assert outcome.code == 0
    assert not outcome.err
    for name, command in COMMANDS.items():
        assert any(line.split() == [name, *command.help.split()] for line in outcome.out)
    assert max(map(len, outcome.out)) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_parser_and_a_run(name: str, run: Callable) -> None:
    module = importlib.import_module(COMMANDS[name].module)
    assert callable(module.build_parser().parse_args)
    assert callable(module.run)
    outcome = run(name, "--help")
    assert outcome.code == 0
    assert outcome.out[0].startswith(f"usage: dc-ssdae {name} ")


def test_version_and_entry_points(run: Callable) -> None:
    assert run("--version").out == [f"dc-ssdae {version('dc-ssdae')}"]
    (script,) = entry_points(group="console_scripts", name="dc-ssdae")
    assert script.load() is main
    done = subprocess.run([sys.executable, "-m", "dc_ssdae", "decod"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("dc-ssdae: unknown command 'decod' (did you mean 'decode'?)")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "dc-ssdae: which command? dc-ssdae --help lists them"),
        (["reconstuct"], "dc-ssdae: unknown command 'reconstuct' (did you mean 'reconstruct'?); accepted: bench, "),
        (["xyz"], "dc-ssdae: unknown command 'xyz'; accepted: "),
        (["--debgu", "info"], "dc-ssdae: unknown option '--debgu' (did you mean '--debug'?); accepted: "),
        (["encode", "a.png", "--modle", "x"], "dc-ssdae encode: unknown option '--modle' (did you mean '--model'?)"),
        (["encode", "a.png", "--modle=x"], "dc-ssdae encode: unknown option '--modle' (did you mean '--model'?)"),
        (["encode", "a.png", "--mod", "x"], "dc-ssdae encode: unknown option '--mod' (did you mean '--model'?)"),
        (["encode", "a.png"], "dc-ssdae encode: the following arguments are required: --out"),
        (["encode", "--model", "m", "--out", "o"], "dc-ssdae encode: the following arguments are required: IMAGE"),
        (["encode", "", "--model", "m", "--out", "o"], "dc-ssdae encode: argument IMAGE: the name is empty"),
        (["info", "demo", "more"], "dc-ssdae info: unrecognized arguments: more"),
        (["convert"], "dc-ssdae convert: the following arguments are required: SOURCE"),
        (["convert", "orignal"], "dc-ssdae convert: argument SOURCE: invalid choice: 'orignal' (choose from "),
        (["convert", "original", "--perset", "x"], "dc-ssdae convert: unknown option '--perset' (did you mean '--pre"),
        (["demo", "--minute", "3"], "dc-ssdae demo: unknown option '--minute' (did you mean '--minutes'?)"),
    ],
)
def test_misuse_is_one_line(words: list[str], message: str, run: Callable) -> None:
    outcome = run(*words)
    assert outcome.code == 2
    assert not outcome.out
    assert len(outcome.err) == 1
    assert outcome.err[0].startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "argument --steps/--num_steps: '0' is not a whole number from 1 on"),
        (["--steps", "1.5"], "argument --steps/--num_steps: '1.5' is not a whole number from 1 on"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number from 0 to 4294967295"),
        (["--seed", "4294967296"], "argument --seed: '4294967296' is not a whole number from 0 to 4294967295"),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8' (choose from "),
        (["--device", "gpu"], "argument --device: unknown device 'gpu'; accepted: auto, cpu, cuda, cuda:N, mps"),
        (["--device", "cuda:x"], "argument --device: unknown device 'cuda:x'; accepted: "),
        (["--device", "cuda:99"], "no device 'cuda:99' on this machine: "),
        (["--model", "missing"], "'missing': no such folder, nor the id of a model on the hub"),
        (["--model", ""], "argument --model: the name is empty"),
        (["--out", ""], "argument --out: the name is empty"),
    ],
)
def test_bad_values_are_one_line(words: list[str], message: str, run: Callable, model_dir: object, tmp_path) -> None:
    outcome = run("reconstruct", "a.png", "--model", model_dir, "--out", tmp_path / "out", *words)
    assert outcome.code == 2
    assert len(outcome.err) == 1
    assert outcome.err[0].startswith(f"dc-ssdae reconstruct: {message}")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Namespace], int]], None]:
    """Put a command `made` in the table, whose `run` is the function given."""

    def put(run: Callable[[Namespace], int]) -> None:
        module = types.ModuleType("made_command")
        module.build_parser = lambda: CommandParser(prog="dc-ssdae made")  # type: ignore[attr-defined]
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "made_command", module)
        monkeypatch.setattr(main_module, "COMMANDS", {"made": Command("made_command", "made for a test")})

    return put


def raising(error: BaseException) -> Callable[[Namespace], int]:
    def run(args: Namespace) -> int:
        raise error

    return run


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
    error: BaseException, code: int, line: str, command: Callable, run: Callable
) -> None:
    command(raising(error))
    assert run("made") == (code, [], [line])
    for words in (["--debug", "made"], ["made", "--debug"]):
        outcome = run(*words)
        assert outcome.code == code
        assert outcome.err[0] == "Traceback (most recent call last):"
        assert outcome.err[-1] == line


def test_bugs_keep_their_traceback(command: Callable) -> None:
    command(raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["made"])


def test_reader_that_has_gone_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as stdout:
        done = subprocess.run([sys.executable, "-m", "dc_ssdae", "info"], stdout=stdout, stderr=subprocess.PIPE)
    assert done.stderr == b""
    assert done.returncode == 141


def test_names_that_the_output_cannot_encode_are_escaped(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from dc_ssdae.cli.common import say

    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    say("é\udce9 3 f²/c")
    stdout.flush()
    assert stdout.buffer.getvalue() == b"\\xe9\\udce9 3 f\\xb2/c\n"


@pytest.mark.parametrize("debug", [False, True])
def test_out_of_memory_fails_one_file_with_a_hint(debug: bool, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    def process(job: Job) -> Done:
        if job.source.name == "big":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return Done(f"{job.source.name} done")

    jobs = [Job(tmp_path / name, tmp_path / f"{name}.png") for name in ("one", "big", "two")]
    assert for_each_file(Namespace(program="dc-ssdae made", debug=debug), jobs, process) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["one done", "two done"]
    assert ("Traceback" in captured.err) is debug
    last = captured.err.splitlines()[-1]
    assert re.fullmatch(r"dc-ssdae made: .*/big: out of memory; try a smaller image, .*", last)


def test_a_bug_in_one_file_is_not_swallowed(tmp_path) -> None:
    def process(job: Job) -> Done:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        for_each_file(Namespace(program="dc-ssdae made"), [Job(tmp_path, tmp_path)], process)


def test_a_command_that_ends_well_closes_its_process_group(run: Callable, tmp_path: Path) -> None:
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
