"""The entry point `dc-ssdae`: finds the command, runs it, and turns users' errors into one line and exit code 2."""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dc_ssdae.cli.common import complain, describe
from dc_ssdae.cli.parser import CommandParser
from dc_ssdae.errors import InputError, ToldElsewhere, lenient_stderr, unknown_name
from dc_ssdae.machine import keep_freed_memory

PROGRAM = "dc-ssdae"
USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


class Command(NamedTuple):
    """A command: its `module`, with `build_parser()` and `run(args) -> exit code`, and one line of `help`."""

    module: str
    help: str


COMMANDS: Mapping[str, Command] = {
    "reconstruct": Command("dc_ssdae.cli.reconstruct", "encode images and decode them again, to PNG"),
    "encode": Command("dc_ssdae.cli.encode", "encode images to latents, one safetensors file each"),
    "decode": Command("dc_ssdae.cli.decode", "decode latents to PNG images"),
    "train": Command("dc_ssdae.cli.train", "train a model, or go on with a run"),
    "stats": Command("dc_ssdae.cli.stats", "measure the mean and standard deviation of latents"),
    "eval": Command("dc_ssdae.cli.eval", "measure an autoencoder: quality, latents, worst and best images"),
    "compare": Command("dc_ssdae.cli.compare", "measure many autoencoders alike, with pictures and costs"),
    "curves": Command("dc_ssdae.cli.curves", "draw the losses and the evaluations of runs"),
    "distill": Command("dc_ssdae.cli.distill", "teach a model to do in one step what it does in several"),
    "study": Command("dc_ssdae.cli.study", "sweep samplers, steps and tolerances of a model, or of two"),
    "info": Command("dc_ssdae.cli.info", "list the presets, or describe a preset or a saved model"),
    "convert": Command("dc_ssdae.cli.convert", "turn other people's checkpoints into models of this package"),
    "export": Command("dc_ssdae.cli.export", "write a model as programs for torch.export, C++ and ONNX"),
    "pack": Command("dc_ssdae.cli.pack", "turn a folder of images into tar shards"),
    "latents": Command("dc_ssdae.cli.latents", "encode a data set once, to shards of latents"),
    "bench": Command("dc_ssdae.cli.bench", "measure how fast models encode and decode, train, and read images"),
    "demo": Command("dc_ssdae.cli.demo", "train a small model on real photos and write a report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after the program's name; None takes them from `sys.argv`.

    Returns:
        The exit code: 0, or 2 where what the user gave cannot be used, 130 after Ctrl-C, 141 where the reader
        of the output has gone. A bug leaves its exception.
    """
    with lenient_stderr():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(words: list[str]) -> int:
    debug = "--debug" in words
    program = PROGRAM
    try:
        try:
            name, rest = _choose_command(words)
            program = f"{PROGRAM} {name}"
            keep_freed_memory()
            command = importlib.import_module(COMMANDS[name].module)
            args = command.build_parser().parse_args(rest)
        except SystemExit:  # how argparse ends --help and --version, which have printed by now
            code = 0
        else:
            args.debug = debug
            code = int(command.run(args))
            if "dc_ssdae.distributed" in sys.modules:
                # Here, because a recipe's phases share the group; a failure leaves it, where closing it could hang.
                sys.modules["dc_ssdae.distributed"].leave_group()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # As in `dc-ssdae info | head -1`. What the interpreter flushes at its end goes nowhere instead of failing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (InputError, OSError, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exception(error)
        interrupted = isinstance(error, KeyboardInterrupt)
        if not isinstance(error, ToldElsewhere):
            complain(program, "interrupted" if interrupted else describe(error))
        return INTERRUPTED if interrupted else USER_ERROR


def _choose_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split off the options before the command, and the command's name from what belongs to it."""
    place = next((index for index, word in enumerate(words) if not word.startswith("-")), len(words))
    _build_parser().parse_args(words[:place])
    if place == len(words):
        raise InputError(f"which command? {PROGRAM} --help lists them")
    if words[place] not in COMMANDS:
        raise unknown_name("command", words[place], COMMANDS)
    return words[place], list(words[place + 1 :])


def _build_parser() -> CommandParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())
    parser = CommandParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [options] COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Deep-compression image autoencoders whose decoder is a one-step diffusion model.\n\n"
        f"commands:\n{listing}\n\n{PROGRAM} COMMAND --help describes a command.",
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    return parser


class _ShowVersion(argparse.Action):
    """argparse's own action wants the version text beforehand: every command would look it up."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from dc_ssdae import __version__

        print(PROGRAM, __version__)
        parser.exit()
