"""A run's configuration from a command's words, as the tests need it."""

from typing import Any

from dc_ssdae.cli.parser import CommandParser
from dc_ssdae.cli.run_config import read_run_config
from dc_ssdae.cli.train import Options, read_new_recipe
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.recipe import Recipe

PARSER = CommandParser(Options, "dc-ssdae train")


def options(*words: str) -> Options:
    """The options of `dc-ssdae train`."""
    parsed = PARSER.parse(words)
    assert isinstance(parsed, Options)
    return parsed


def parse(*words: str, base: dict[str, Any] | None = None) -> RunConfig:
    return read_run_config(options(*words), base)[0]


def parse_recipe(*words: str) -> Recipe:
    given = options(*words)
    assert given.recipe is not None
    return read_new_recipe(given, given.recipe)[0]
