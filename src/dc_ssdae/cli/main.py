"""The entry point `dc-ssdae`: finds the command, runs it, and turns users' errors into one line and exit code 2."""

import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence

from dc_ssdae.cli.common import complain, describe, is_main_process
from dc_ssdae.cli.parser import CommandParser
from dc_ssdae.errors import InputError, lenient_stderr, unknown_name
from dc_ssdae.machine import keep_freed_memory

PROGRAM = "dc-ssdae"
USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


COMMANDS: Mapping[str, str] = {
    "reconstruct": "encode images and decode them again, to PNG",
    "encode": "encode images to latents, one safetensors file each",
    "decode": "decode latents to PNG images",
    "train": "train a model, or go on with a run",
    "stats": "measure the mean and standard deviation of latents",
    "eval": "measure an autoencoder, and show its worst and best images",
    "compare": "measure many autoencoders alike, with pictures and costs",
    "probe": "see how good latents are to generate from",
    "curves": "draw the losses and the evaluations of runs",
    "distill": "teach a model to do in one step what it does in several",
    "info": "list the presets, or describe a preset or a saved model",
    "convert original": "convert a checkpoint of the DC-SSDAE authors' own code",
    "convert diffusers": "join a published encoder of diffusers with a new decoder",
    "export": "write a model as programs for torch.export, C++ and ONNX",
    "pack": "turn a folder of images into tar shards",
    "latents": "encode a data set once, to shards of latents",
    "bench encode": "time encoding with one or several models",
    "bench decode": "time decoding with one or several models",
    "bench train": "time training steps, on random images",
    "bench data": "time the input pipeline of one or several data sets",
    "demo": "train a small model on real photos and write a report",
    "app": "try models on photos, on a page in the browser",
}
"""What each command does, in a line.

The command's first word names its module, which has its options, a dataclass (see `dc_ssdae.cli.parser`), and a
function that takes them and gives the exit code: Options and run, or for a second word such as "train" TrainOptions and
run_train.
"""


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
            keep_freed_memory()
            first, _, second = name.partition(" ")
            module = importlib.import_module(f"dc_ssdae.cli.{first}")
            options = CommandParser(getattr(module, f"{second.capitalize()}Options"), program).parse(rest)
            options.debug = debug
            code = getattr(module, f"run_{second}" if second else "run")(options) or 0
            distributed = sys.modules.get("torch.distributed")
            if distributed is not None and distributed.is_available() and distributed.is_initialized():
                # Here, because a recipe's phases share the group; a failure leaves it, where closing it could hang.
                distributed.destroy_process_group()
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
            # All processes of a run raise an InputError, unless it says otherwise.
            if is_main_process() or getattr(error, "in_one_process", True):
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
    group = [name for name in COMMANDS if words and name.startswith(f"{words[0]} ")]
    program, rest = (f"{PROGRAM} {words[0]}", words[1:]) if group else (PROGRAM, words)
    if rest[:1] in (["-h"], ["--help"]):
        print_commands(program, group or list(COMMANDS))
        raise SystemExit(0)
    names = sorted({name.split()[bool(group)] for name in group or COMMANDS})
    if not rest:
        raise InputError(f"which command? one of {', '.join(names)}; {program} --help describes them")
    raise unknown_name("command", rest[0], [*names, "--help", "--version", "--debug"])


def print_commands(program: str, names: Sequence[str]) -> None:
    """Print a line of help for each command."""
    width = max(map(len, names))
    print(f"usage: {program} COMMAND ... [--debug]\n       {PROGRAM} --help | --version\n")
    print("Deep-compression image autoencoders whose decoder is a one-step diffusion model.\n\ncommands:")
    for name in names:
        print(f"  {name:{width}}  {COMMANDS[name]}")
    print(f"\n{program} COMMAND --help describes a command.")
