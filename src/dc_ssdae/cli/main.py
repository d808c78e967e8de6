"""The entry point `dc-ssdae`: finds the command, runs it, and turns users' errors into one line and exit code 2."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dc_ssdae.cli.common import complain, describe
from dc_ssdae.errors import InputError, ToldElsewhere, lenient_stderr, unknown_name

PROGRAM = "dc-ssdae"
USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


class Command(NamedTuple):
    """A command: its `module`, one line of `help`, and the names of its class of options and its function.

    The options are a dataclass (see `dc_ssdae.cli.parser`); the function takes one and gives the exit code.
    """

    module: str
    help: str
    options: str = "Options"
    function: str = "run"


COMMANDS: Mapping[str, Command] = {
    "reconstruct": Command("reconstruct", "encode images and decode them again, to PNG"),
    "encode": Command("encode", "encode images to latents, one safetensors file each"),
    "decode": Command("decode", "decode latents to PNG images"),
    "train": Command("train", "train a model, or go on with a run"),
    "stats": Command("stats", "measure the mean and standard deviation of latents"),
    "eval": Command("eval", "measure an autoencoder, and show its worst and best images"),
    "compare": Command("compare", "measure many autoencoders alike, with pictures and costs"),
    "curves": Command("curves", "draw the losses and the evaluations of runs"),
    "distill": Command("distill", "teach a model to do in one step what it does in several"),
    "study sampling": Command("study", "sweep samplers, steps and tolerances of a model, or of two"),
    "info": Command("info", "list the presets, or describe a preset or a saved model"),
    "convert original": Command(
        "convert", "convert a checkpoint of the DC-SSDAE authors' own code", "OriginalOptions", "run_original"
    ),
    "convert diffusers": Command(
        "convert", "join a published encoder of diffusers with a new decoder", "DiffusersOptions", "run_diffusers"
    ),
    "export": Command("export", "write a model as programs for torch.export, C++ and ONNX"),
    "pack": Command("pack", "turn a folder of images into tar shards"),
    "latents": Command("latents", "encode a data set once, to shards of latents"),
    "bench encode": Command("bench", "time encoding with one or several models", "EncodeOptions", "run_models"),
    "bench decode": Command("bench", "time decoding with one or several models", "DecodeOptions", "run_models"),
    "bench train": Command("bench", "time training steps, on random images", "TrainOptions", "run_train"),
    "bench data": Command("bench", "time the input pipeline of one or several data sets", "DataOptions", "run_data"),
    "demo": Command("demo", "train a small model on real photos and write a report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after the program's name; None takes them from `sys.argv`.

    Returns:
        The exit code: 0; 2 if the user's input cannot be used; 130 after Ctrl-C; 141 if the reader of the output has
        gone. A bug raises its exception.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    program = PROGRAM
    with lenient_stderr():
        try:
            name, rest = choose_command([word for word in words if word != "--debug"])
            program = f"{PROGRAM} {name}"
            function, options = prepare_command(name, rest, debug)
            code = function(options) or 0
            if "dc_ssdae.distributed" in sys.modules:
                # Here, because a recipe's phases share the group; a failure leaves it, where closing it could hang.
                sys.modules["dc_ssdae.distributed"].leave_group()
            sys.stdout.flush()
            return code
        except SystemExit as end:
            if end.code:  # from a user's own class
                raise
            return 0  # after --help and the like, which have printed by now
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


def choose_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split words into the command's name, of one or two words, and the words after it.

    Raises:
        InputError: there is no such command.
        SystemExit: after --help and --version, with 0.
    """
    if words[:1] == ["--version"]:
        from dc_ssdae import __version__

        print(PROGRAM, __version__)
        raise SystemExit(0)
    for name in (" ".join(words[:2]), *words[:1]):
        if name in COMMANDS:
            return name, list(words[len(name.split()) :])
    group = [name for name in COMMANDS if words and name.partition(" ")[0] == words[0]]
    program, rest = (f"{PROGRAM} {words[0]}", words[1:]) if group else (PROGRAM, words)
    if rest[:1] in (["-h"], ["--help"]):
        print_commands(program, group or list(COMMANDS))
        raise SystemExit(0)
    names = sorted({name.split()[bool(group)] for name in group or COMMANDS})
    kind = f"{words[0]} command" if group else "command"
    if not rest:
        raise InputError(f"which {kind}? one of {', '.join(names)}; {program} --help describes them")
    if rest[0].startswith("-"):
        raise unknown_name("option", rest[0], ["--help"] if group else ["--help", "--version", "--debug"])
    raise unknown_name(kind, rest[0], names)


def print_commands(program: str, names: Sequence[str]) -> None:
    """Print a line of help for each command."""
    width, whole = max(map(len, names)), program == PROGRAM
    print(f"usage: {program} COMMAND ... [--debug]\n       {program} --help{' | --version' * whole}\n")
    if whole:
        print("Deep-compression image autoencoders whose decoder is a one-step diffusion model.\n")
    print("commands:")
    for name in names:
        print(f"  {name:{width}}  {COMMANDS[name].help}")
    print(f"\n{program} COMMAND --help describes a command.")


def prepare_command(name: str, words: Sequence[str], debug: bool) -> tuple[Callable[[Any], int | None], Any]:
    """Import a command and parse its words; gives its function and the options to call it with.

    Raises:
        InputError: a word is wrong.
        SystemExit: after --help, with 0.
    """
    from dc_ssdae.cli.parser import CommandParser
    from dc_ssdae.machine import keep_freed_memory

    keep_freed_memory()
    command = COMMANDS[name]
    module = importlib.import_module(f"dc_ssdae.cli.{command.module}")
    options = CommandParser(getattr(module, command.options)).parse(words)
    options.debug = debug
    return getattr(module, command.function), options
