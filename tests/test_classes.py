"""Users' own classes by name: imported where a user asks for it, found only where imported already."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_models import refusal

from dc_ssdae.classes import find_imported, full_name, import_class, import_module, importing_from

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


def test_it_needs_no_torch() -> None:
    code = "import sys, dc_ssdae.classes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


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
        assert name.rpartition(".")[0] in refusal(import_class, name)

    def test_a_module_that_is_missing(self, write: Write) -> None:
        write("own_module", "class Part:\n    pass\n")
        for name in ("no_such_module", "own_module.parts"):
            assert f"No module named '{name}'" in refusal(import_class, f"{name}.Part")

    def test_a_class_that_is_missing(self, write: Write) -> None:
        write("own_module", "import os\n\nclass Encoder:\n    pass\n\nclass _Hidden:\n    pass\n")
        message = refusal(import_class, "own_module.Encodr")
        assert message == "unknown object of own_module 'Encodr' (did you mean 'Encoder'?); accepted: Encoder, os"
        assert refusal(import_class, "own_module.os") == "'own_module.os' is a module, not a class"


class TestImportModule:
    @pytest.mark.parametrize(
        ("text", "named", "line"),
        [
            ("x = 1\nimport no_such_library\n", "ModuleNotFoundError: No module named 'no_such_library'", 2),
            ("\n\nraise RuntimeError('two\\nlines')\n", "RuntimeError: two lines", 3),
            ("import sys\nsys.exit(3)\n", "SystemExit: 3", 2),
        ],
    )
    def test_an_error_inside_is_named_with_its_line(self, text: str, named: str, line: int, write: Write) -> None:
        path = write("own_package.broken", text)
        for call, name in ((import_module, "own_package.broken"), (import_class, "own_package.broken.Part")):
            message = refusal(call, name)
            assert message.startswith(f"importing own_package.broken failed with {named}")
            assert message.endswith(f"({path}, line {line})")


def test_the_search_path_is_left_as_it_was(tmp_path: Path) -> None:
    before = list(sys.path)
    with importing_from(tmp_path):
        assert sys.path[0] == str(tmp_path.resolve())
    with pytest.raises(ZeroDivisionError), importing_from(tmp_path):
        _ = 1 / 0
    assert sys.path == before


class TestFindImported:
    def test_it_imports_nothing(self, write: Write) -> None:
        write("own_trap", "class Trap:\n    pass\n")
        write("own_lazy", "def __getattr__(name):\n    import own_trap\n    return own_trap.Trap\n")
        import_module("own_lazy")
        for name in ("own_trap.Trap", "own_lazy.Trap", "own_lazy.own_trap.Trap"):
            assert find_imported(name) is None
        assert "own_trap" not in sys.modules
        assert import_class("own_trap.Trap") is find_imported("own_trap.Trap")

    @pytest.mark.parametrize("name", ["", "..", "os", "os.no_such.name", "no_such_module.A"])
    def test_what_is_not_there(self, name: str) -> None:
        assert find_imported(name) is None
