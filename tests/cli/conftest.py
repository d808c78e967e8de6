"""A small saved model, a photo, and ways to run the command line in this process."""

import os
from pathlib import Path

import pytest
from cli_samples import PEERS, Outcome, Refusal, Run, Words, save_model, save_photo, save_photos

from dc_ssdae.cli.main import COMMANDS, main
from dc_ssdae.losses import backbones


@pytest.fixture(autouse=True)
def any_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of the test's own, in lines as long as in a pipe; say nothing of what this CPU may lack."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dc_ssdae.machine.slow_dtype_note", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `dc-ssdae WORDS…` in this process."""

    def run_words(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out.splitlines(), captured.err.splitlines())

    return run_words


@pytest.fixture
def refusal(run: Run) -> Refusal:
    """Run `dc-ssdae WORDS…`, which are refused; gives the one line that says why."""

    def refused(*words: object) -> str:
        outcome = run(*words)
        assert (outcome.code, outcome.out) == (2, [])
        (line,) = outcome.err
        program, _, told = line.partition(": ")
        assert program in ("dc-ssdae", *(f"dc-ssdae {name}" for name in COMMANDS))
        return told

    return refused


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo preset (f8, c4) with random weights, saved."""
    return save_model(tmp_path_factory.mktemp("saved") / "small")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A PNG of 24 by 37 pixels (height by width)."""
    return save_photo(tmp_path / "photo.png", 24, 37)


@pytest.fixture(scope="session")
def five_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images, and a file that is none."""
    folder = save_photos(tmp_path_factory.mktemp("photos"), "0", "1", "2", "3", "4")
    (folder / "3b.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def measuring(five_photos: Path) -> Words:
    """What an evaluation measures, and on what."""
    return ("--data", five_photos, "--size", 32, "--workers", 0, "--device", "cpu", "--metrics", "psnr")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autoencoders in `peers.py`, on a machine without weights of metrics."""
    Path("peers.py").write_text(PEERS)
    monkeypatch.delenv(backbones.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are written whole cannot be put into their place."""

    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", fail)
