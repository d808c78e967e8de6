"""The parser of every command: options from a dataclass, and one line for what does not fit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from dc_ssdae.cli.parser import CommandParser, Options
from dc_ssdae.errors import InputError
from dc_ssdae.settings import setting


@dataclass(kw_only=True)
class BaseOptions(Options):
    """What commands share.

    Args:
        quick: leave the rest out.
    """

    quick: bool = False


@dataclass(kw_only=True)
class MadeOptions(BaseOptions):
    """Make something; needs pip install 'made-up[for-a-test]'.

    Args:
        source: where from.
        more: further files.
        out: where to.
        steps: how many.
        rate: one, or one per step.
        modules: to import.
        size: height and width.
        kind: which, to 100 %.
    """

    source: Path = setting(positional=True, metavar="SRC")
    more: list[Path] = setting([], positional=True, metavar="MORE")
    out: Path = setting(metavar="DIR")
    steps: int = setting(4, at_least=1, at_most=9, alias="--num_steps")
    rate: float | list[float] | None = setting(None, above=0.0, metavar="X[,X]")
    modules: list[str] = setting([], name="--import", repeated=True)
    size: list[int] | None = setting(None, spaced=True)
    kind: Literal["small", "large"] | None = None


def parse(*words: str) -> MadeOptions:
    options = CommandParser(MadeOptions, "dc-ssdae make").parse(words)
    assert isinstance(options, MadeOptions)
    return options


def test_every_kind_of_option() -> None:
    assert parse("a", "--out", "o") == MadeOptions(source=Path("a"), out=Path("o"), program="dc-ssdae make")
    words = "a --num_steps 2 b --out=o --import x c --rate 0.1,2 --import y --size 8 16 --kind large --quick"
    assert parse(*words.split()) == MadeOptions(
        source=Path("a"),
        more=[Path("b"), Path("c")],
        out=Path("o"),
        steps=2,
        rate=[0.1, 2.0],
        modules=["x", "y"],
        size=[8, 16],
        kind="large",
        quick=True,
        program="dc-ssdae make",
    )
    assert parse("a", "--out", "o", "--rate", "2").rate == 2.0


@pytest.mark.parametrize(
    ("words", "field", "told"),
    [
        ("", "SRC", "missing: SRC, --out; usage: dc-ssdae make SRC --out DIR [options]"),
        ("a --out", "--out", "expected one argument"),
        ("a --out=", "--out", "missing"),
        ("a --out o --num_steps 10", "--steps", "10"),
        ("a --out o --rate nan", "--rate", "nan"),
        ("a --out o --rate 1,x", "--rate", "x"),
        ("a --out o --rate 1,0", "--rate", "0"),
        ("a --out o --kind larg", "--kind", "did you mean 'large'"),
        ("a --out o --kin large", "--kin", "did you mean '--kind'"),
        ("a --out o --quick=1", "--quick", "1"),
    ],
)
def test_what_does_not_fit_is_named(words: str, field: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        parse(*words.split())
    assert error.value.field == field
    assert field in str(error.value)
    assert told in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "48")
    text = CommandParser(MadeOptions, "dc-ssdae make").format_help()
    lines = text.splitlines()
    assert lines[0] == "usage: dc-ssdae make SRC --out DIR [options]"
    assert "'made-up[for-a-test]'." in text, "no line is broken at a hyphen"
    assert any(line.split() == ["--steps", "N,", "--num_steps", "N"] for line in lines)
    assert "how many (default: 4)" in text
    assert "small|large" in text
    assert "to 100 %" in text
    assert text.index("--kind") < text.index("--quick") < text.index("--debug"), "its own options first"
