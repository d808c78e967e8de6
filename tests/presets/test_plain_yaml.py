"""The YAML reader: what it takes for a number, what it refuses, and that what is written is read back."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import refusal

from dc_ssdae.presets import dump_yaml, parse_yaml, read_yaml
from dc_ssdae.presets.plain_yaml import LARGEST_FILE


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("-.inf", -math.inf),
        ("010", 10),
        ("300_000", 300_000),
        ("1:30", "1:30"),
        ("no", "no"),
        ("", None),
        ("['1e-6', 1, 2.5, true, ~]", ["1e-6", 1, 2.5, True, None]),
        ("{<<: {a: 1, b: 2}, b: 3}", {"a": 1, "b": 3}),
    ],
)
def test_what_plain_words_are(text: str, value: Any) -> None:
    found = parse_yaml(text, "x")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2", 4),
        ("a: [1\nb: 2", 2),
        ("a: b\n\tc: d", 2),
        ("!!python/object:os.system x", 1),
        ("a: \0", None),
        ("- a", None),
    ],
)
def test_refusals_are_one_line_with_the_place(text: str, line: int | None) -> None:
    message = refusal(read_yaml, text, "f.yaml")
    assert message.startswith("f.yaml " if line is None else f"f.yaml:{line}: ")


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    for content in (bytes(range(256)), b"a: 1\n" * LARGEST_FILE, b"a: ["):
        file.write_bytes(content)
        assert "f.yaml" in refusal(read_yaml, file)
    for path in (tmp_path, tmp_path / "missing.yaml"):
        assert str(path) in refusal(read_yaml, path)
    file.write_bytes(b"\xef\xbb\xbfa: \xc3\xa9")
    assert read_yaml(file) == {"a": "é"}


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text()
data = st.recursive(
    scalars | st.from_regex(r"[-+.0-9eExX_:~<nyYNof]{1,8}", fullmatch=True),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(value=data)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert repr(parse_yaml(dump_yaml({"a": value}), "x")) == repr({"a": value})


def test_a_number_is_one_to_readers_of_yaml_1_1_too() -> None:
    assert yaml.safe_load(dump_yaml({"lr": 1e-6, "steps": 3})) == {"lr": 1e-6, "steps": 3}
