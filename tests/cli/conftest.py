"""A small saved model, a photo, and a way to run the command line in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from cli_samples import random_pixels, save_model
from PIL import Image

from dc_ssdae.cli.main import main


class Outcome(NamedTuple):
    """What a run of the command line left: its exit code, and the lines of standard output and error."""

    code: int
    out: list[str]
    err: list[str]


Run = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say nothing of instructions that this machine's CPU may lack."""
    monkeypatch.setattr("dc_ssdae.machine.slow_dtype_note", lambda *_: None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `dc-ssdae WORDS…` in this process."""

    def run_words(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out.splitlines(), captured.err.splitlines())

    return run_words


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo preset (f8, c4) with random weights, saved."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A PNG of 24 by 37 pixels (height by width)."""
    path = tmp_path / "photo.png"
    Image.fromarray(random_pixels(24, 37)).save(path)
    return path
