"""Users' own classes by their full name: importing them, where a user asks for it, and finding imported ones."""

import importlib
import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from dc_ssdae.errors import InputError, check_type, unknown_name


def full_name(kind: type) -> str:
    """Give a class's module and name in it, module.Class, by which a configuration names it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def check_classes(classes: Iterable[type]) -> list[type]:
    """List the classes that a user has passed.

    Raises:
        InputError: it is no list, or holds something else.
    """
    listed = list(classes) if isinstance(classes, Iterable) else classes
    check_type("classes", listed, list[type])
    return listed


@contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Let imports inside the block find the modules of `folder` first, as `python -m` does with the current one."""
    place = str(folder.resolve())
    sys.path.insert(0, place)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(place)


def import_module(name: str) -> ModuleType:
    """Import a module that the user, not a file of somebody else, has named.

    Args:
        name: as in an import statement, my_package.encoders.

    Raises:
        InputError: there is no such module; or it raised an exception, which is named with file and line.
    """
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        # The deepest line of a module's own level: what was being imported, not what it called.
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "<module>"]
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"importing {name} failed with {message}{where}") from error


def import_object(path: str) -> Any:
    """Import what the user's own configuration names.

    Args:
        path: module.name, or module.Class.name.

    Raises:
        InputError: it names no module, the module cannot be imported, or has no such name.
    """
    owner_name, _, name = path.rpartition(".")
    if not owner_name:
        raise InputError(f"{path!r} is not in a module; write module.Class, such as my_package.my_module.MyClass")
    try:
        owner = import_module(owner_name)
    except InputError:
        owner = find_imported(owner_name)  # a class; the modules before it are imported by now
        if not isinstance(owner, type):
            raise
    if not hasattr(owner, name):
        raise unknown_name(f"object of {owner_name}", name, [key for key in dir(owner) if not key.startswith("_")])
    return getattr(owner, name)


def import_class(class_path: str) -> type:
    """Import the class that the user's own configuration names.

    Args:
        class_path: module.Class, or module.Outer.Inner.

    Raises:
        InputError: as `import_object`; or it is no class.
    """
    value = import_object(class_path)
    if not isinstance(value, type):
        raise InputError(f"{class_path!r} is a {type(value).__name__}, not a class")
    return value


def find_imported(class_path: str) -> Any:
    """Find what a full name stands for among the modules that are imported already; never imports one.

    Args:
        class_path: module.Class, or module.Outer.Inner.

    Returns:
        What is there, which need not be a class; None where no such module is imported or it has no such name.
    """
    parts = class_path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        value: Any = sys.modules.get(".".join(parts[:split]))
        if value is not None:
            for name in parts[split:]:
                # Static, because a module or class can answer getattr with an import.
                value = inspect.getattr_static(value, name, None)
            return value
    return None
