"""Users' own classes by their full name: importing them, where a user asks for it, and finding imported ones."""

import importlib
import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from dc_ssdae.errors import InputError, unknown_name


def full_name(kind: type) -> str:
    """Give a class's module and name in it, module.Class, by which a configuration names it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def check_classes(classes: Iterable[type]) -> list[type]:
    """List the classes that a user has passed.

    Raises:
        InputError: it is no list, or holds something else.
    """
    if isinstance(classes, Iterable) and not isinstance(classes, type):
        listed = list(classes)
        if all(isinstance(kind, type) for kind in listed):
            return listed
    raise InputError(f"classes is {classes!r}; it must be a list of classes, such as classes=[MyEncoder]")


@contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Let imports inside the block find the modules of `folder` first, as `python -m` does with the current one."""
    place = str(folder.resolve())
    sys.path.insert(0, place)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if place in sys.path:
            sys.path.remove(place)


def import_module(name: str) -> ModuleType:
    """Import a module that the user, not a file of somebody else, has named.

    Args:
        name: as in an import statement, my_package.encoders.

    Raises:
        InputError: there is no such module; or it raised an exception, which is named with file and line.
    """
    if not isinstance(name, str) or not _is_dotted(name):
        raise InputError(f"{name!r} is no module name; write it as in an import statement, my_package.my_module")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that imports another missing one raises the same exception, with the other's name.
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            hint = "; leave .py out" if name.endswith(".py") else ""
            raise InputError(f"no module named {name!r}{hint}") from None
        raise _failed(name, error) from error
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from error


def import_class(class_path: str) -> type:
    """Import the class that the user's own configuration names.

    Args:
        class_path: module.Class, or module.Outer.Inner.

    Raises:
        InputError: it names no module, the module cannot be imported, or holds no class of that name.
    """
    if not isinstance(class_path, str) or "." not in class_path or not _is_dotted(class_path):
        raise InputError(f"{class_path!r} names no class of a module; write module.Class, my_package.my_module.MyClass")
    owner_name, _, name = class_path.rpartition(".")
    owner: object
    try:
        owner = import_module(owner_name)
    except InputError as error:
        # What looks like a module may be a class that holds the class; the modules before it are imported by now.
        owner = find_imported(owner_name)
        if error.__cause__ is not None or not isinstance(owner, type):
            raise
    if not hasattr(owner, name):
        public = [key for key, value in vars(owner).items() if isinstance(value, type) and not key.startswith("_")]
        raise unknown_name(f"class of {owner_name}", name, public)
    value = getattr(owner, name)
    if not isinstance(value, type):
        raise InputError(f"{class_path!r} is a {type(value).__name__}, not a class")
    return value


def find_imported(class_path: str) -> object | None:
    """Find what a full name stands for among the modules that are imported already; never imports one.

    Args:
        class_path: module.Class, or module.Outer.Inner.

    Returns:
        What is there, which need not be a class; None where no such module is imported or it has no such name.
    """
    parts = class_path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        value: object = sys.modules.get(".".join(parts[:split]))
        if value is not None:
            for name in parts[split:]:
                # Static, because a module or class can answer getattr with an import.
                value = inspect.getattr_static(value, name, None)
            return value
    return None


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _failed(name: str, error: BaseException) -> InputError:
    frames = traceback.extract_tb(error.__traceback__)
    # The deepest line of a module's own level: what was being imported, not what it called.
    lines = [(frame.filename, frame.lineno) for frame in frames if frame.name == "<module>"]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append((error.filename, error.lineno))
    where = f" ({lines[-1][0]}, line {lines[-1][1]})" if lines else ""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    message = " ".join(f"{type(error).__name__}: {text}".split())
    return InputError(f"importing {name} failed with {message}{where}")
