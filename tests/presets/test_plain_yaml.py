"""The YAML reader: what it takes for a number, what it refuses, and that what is written is read back."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dc_ssdae.errors import InputError
from dc_ssdae.presets import dump_yaml, parse_yaml, read_yaml
from dc_ssdae.presets.plain_yaml import LARGEST_FILE


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        ("-3.0e-3", -3e-3),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("010", 10),
        ("300_000", 300_000),
        ("0x1F", 31),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("_1", "_1"),
        ("no", False),
        ("true", True),
        ("~", None),
        ("", None),
        ("'1e-6'", "1e-6"),
        ("[1, 2.5, x]", [1, 2.5, "x"]),
        ("&a {x: 1}", {"x": 1}),
        ("{x: &a [1], y: *a}", {"x": [1], "y": [1]}),
        ("{<<: {a: 1, b: 2}, b: 3}", {"a": 1, "b": 3}),
    ],
)
def test_what_plain_words_are(text: str, value: Any) -> None:
    found = parse_yaml(text, "x")
    assert found == value
    assert type(found) is type(value)


def bomb() -> str:
    """Ten lines that stand for 10^9 values."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2", "f.yaml:4: the key 'c' stands there twice"),
        ("a: [1\nb: 2", "f.yaml:2: expected ',' or ']', but got ':'"),
        ("a: b: c", "f.yaml:1: mapping values are not allowed here"),
        ("a: b\n\tc: d", "f.yaml:2: found character '\\t' that cannot start any token"),
        ("--- {a: 1}\n--- {b: 1}", "f.yaml:2: expected a single document in the stream, but found another document"),
        ("a: *x", "f.yaml:1: found undefined alias 'x'"),
        ("&a [*a]", "f.yaml:1: the alias *a stands inside what it refers to"),
        ("x: &a {y: {z: *a}}", "f.yaml:1: the alias *a stands inside what it refers to"),
        (bomb(), "f.yaml:6: more than 50000 values"),
        ("[" * 100_000, "f.yaml:1: nested more than 48 deep"),
        ("a:\n" + "".join(f"{' ' * depth}b:\n" for depth in range(1, 200)), "f.yaml:48: nested more than 48 deep"),
        ("? [a]\n: 1", "f.yaml:1: a key must be a word, not a list or mapping"),
        ("on: 1", "f.yaml:1: the key 'on' is not read as text; put it in quotes"),
        ("!!python/object:os.system x", "f.yaml:1: tags such as tag:yaml.org,2002:python/object:os.system are not "),
        ("a: !!int x", "f.yaml:1: tags such as tag:yaml.org,2002:int are not accepted; text goes in quotes"),
        ("a: " + "9" * 5000, "f.yaml:1: the number 99999999999999999999… does not fit in 64 bits"),
        ("a: 0x" + "f" * 5000, "f.yaml:1: the number 0xffffffffffffffffff… does not fit in 64 bits"),
        ('a: "\\UFFFFFFFF"', "f.yaml is not YAML: "),
        ("a: \0", "f.yaml is not text: it holds the character '\\x00'"),
        ("", "f.yaml is empty; it must hold settings"),
        ("# only a comment", "f.yaml is empty; it must hold settings"),
        ("- a", "f.yaml does not hold a mapping"),
        ("word", "f.yaml does not hold a mapping"),
    ],
    ids=range(23),
)
def test_refusals_are_one_line_with_the_place(text: str, message: str) -> None:
    before = time.perf_counter()
    with pytest.raises(InputError) as error:
        read_yaml(text, "f.yaml")
    assert time.perf_counter() - before < 5.0
    assert str(error.value).startswith(message)
    assert len(str(error.value).splitlines()) == 1


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    for content, message in (
        (bytes(range(256)), "f.yaml is not text in UTF-8; is it a YAML file?"),
        (b"a: 1\n" * LARGEST_FILE, "f.yaml has more than 256 KiB; that is no configuration"),
        (b"a: [", "f.yaml:1: "),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError) as error:
            read_yaml(file)
        assert message in str(error.value)
    for path, message in (
        (tmp_path, "is a folder, not a YAML file"),
        (tmp_path / "missing.yaml", "no such file or directory"),
        (tmp_path / "a\0b", "is not the name of a file"),
        (tmp_path / ("x" * 5000), "file name too long"),
    ):
        with pytest.raises(InputError, match=message) as error:
            read_yaml(path)
        assert len(str(error.value)) < 200


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_bytes(b"\xef\xbb\xbfa: \xc3\xa9")
    assert read_yaml(tmp_path / "f.yaml") == {"a": "é"}


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.from_regex(r"[-+.0-9eExX_:~<nyYNof]{1,8}", fullmatch=True)
    | st.characters(categories=["Cs"])
    | st.sampled_from(
        ["1e-6", "09", "0o7", "1:30", "2026-01-31", "<<", "=", "\x85", "\u2028", "a\nb", "*a", "&a", "!a"]
    )
)
keys = st.text() | st.integers(-100, 100) | st.sampled_from(["no", "1e-6", "09", "", "<<", "~"])
data = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(value=data, ascii_only=st.booleans())
def test_what_is_written_is_read_back(value: Any, ascii_only: bool) -> None:
    text = dump_yaml({"a": value}, ascii_only)
    assert not ascii_only or text.isascii()
    assert repr(parse_yaml(text, "x")) == repr({"a": value})
    text.encode("utf-8")
