"""Users' own classes by name: imported where a user asks for it, found only where imported already."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_models import refusal

from dc_ssdae.classes import find_imported, full_name, import_class, importing_from

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Write a module into a folder that imports search; what was imported from there is forgotten afterwards."""

    def write_module(name: str, text: str) -> Path:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    with importing_from(tmp_path):
        yield write_module
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in str(getattr(module, "__file__", None) or getattr(module, "__path__", "")):
            del sys.modules[name]


class TestImportClass:
    def test_a_class_and_a_class_inside_a_class(self, write: Write) -> None:
        write("own_package.own_parts", "class Outer:\n    class Inner:\n        pass\n")
        outer = import_class("own_package.own_parts.Outer")
        assert full_name(outer) == "own_package.own_parts.Outer"
        assert import_class(full_name(outer.Inner)) is outer.Inner
        assert find_imported(full_name(outer.Inner)) is outer.Inner

    def test_a_class_whose_package_has_a_module_of_its_name(self, write: Write) -> None:
        write("own_twin.Part", "class Part:\n    pass\n")
        write("own_twin.__init__", "from own_twin.Part import Part\n")
        kind = import_class("own_twin.Part.Part")
        assert full_name(kind) == "own_twin.Part.Part"
        assert import_class("own_twin.Part") is kind
        assert find_imported("own_twin.Part.Part") is kind

    @pytest.mark.parametrize("name", ["MyEncoder", "", "a..B", "../a.B"])
    def test_what_is_no_full_name(self, name: str) -> None:
        assert (name.rpartition(".")[0] or repr(name)) in refusal(import_class, name)

    def test_a_module_or_a_class_that_is_missing(self, write: Write) -> None:
        write("own_module", "import os\n\nclass Encoder:\n    pass\n\nclass _Hidden:\n    pass\n")
        for name, message in (
            ("no_such_module.Part", "No module named 'no_such_module'"),
            ("own_module.parts.Part", "No module named 'own_module.parts'"),
            ("own_module.Encodr", "'Encodr' (did you mean 'Encoder'?); accepted: Encoder, os"),
            ("own_module.os", "'own_module.os' is a module, not a class"),
        ):
            assert message in refusal(import_class, name)


@pytest.mark.parametrize(
    ("text", "named", "line"),
    [
        ("x = 1\nimport no_such_library\n", "ModuleNotFoundError: No module named 'no_such_library'", 2),
        ("\n\nraise RuntimeError('two\\nlines')\n", "RuntimeError: two lines", 3),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3", 2),
    ],
)
def test_an_error_inside_is_named_with_its_line(text: str, named: str, line: int, write: Write) -> None:
    path = write("own_package.broken", text)
    message = refusal(import_class, "own_package.broken.Part")
    assert message.startswith(f"importing own_package.broken failed with {named}")
    assert message.endswith(f"({path}, line {line})")
