"""`dc-ssdae curves`: losses and evaluations of runs as a picture."""

from argparse import Namespace
from pathlib import Path

from dc_ssdae.cli.common import add_overwrite_option, check_outputs, complain, say
from dc_ssdae.cli.parser import CommandParser, file_path
from dc_ssdae.files import write_whole


def build_parser() -> CommandParser:
    """Build the command's parser."""
    parser = CommandParser(
        prog="dc-ssdae curves",
        description="Draw the losses and the evaluations of one or several runs, a panel a loss term and a measure. "
        "The phases of a recipe are drawn one after the other. Needs matplotlib: pip install 'dc-ssdae[eval]'.",
    )
    parser.add_argument("runs", nargs="+", type=file_path, metavar="RUN", help="folder of a training run")
    parser.add_argument(
        "--out",
        type=file_path,
        default=Path("curves.png"),
        metavar="FILE",
        help="picture to write: .png, .svg or .pdf (default curves.png)",
    )
    add_overwrite_option(parser)
    return parser


def run(args: Namespace) -> int:
    """Draw the runs; gives the exit code."""
    from dc_ssdae.evaluation.curves import draw_curves, picture_format, read_runs

    kind = picture_format(args.out)
    check_outputs(args, [args.out])
    runs = read_runs(args.runs)
    for note in (note for run in runs for note in run.notes):
        complain(args.program, note)
    write_whole(args.out, draw_curves(runs, kind))
    say(f"{', '.join(run.name for run in runs)} -> {args.out}")
    return 0
