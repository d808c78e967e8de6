"""Libraries that only some data sets need."""

import importlib
from typing import Any

from dc_ssdae.errors import InputError


def import_optional(module: str) -> Any:
    """Import a module of a package in the extra `data`.

    Raises:
        InputError: the package is not installed; says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"this needs {module.partition('.')[0]}: pip install 'dc-ssdae[data]' ({error})") from error
