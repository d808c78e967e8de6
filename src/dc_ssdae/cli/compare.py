"""`dc-ssdae compare`: any number of autoencoders through one protocol, with pictures, figures and costs."""

from argparse import Namespace
from functools import partial

from dc_ssdae.cli.common import (
    add_output_option,
    check_outputs,
    complain,
    describe,
    import_classes,
    say,
    write_outputs,
)
from dc_ssdae.cli.decoding_options import naming_options
from dc_ssdae.cli.evaluation_options import (
    MODELS,
    add_evaluation_options,
    load_suite,
    open_evaluation,
    parse_models,
    report_settings,
)
from dc_ssdae.cli.parser import CommandParser, filled, whole_number
from dc_ssdae.errors import InputError

PROGRAM = "dc-ssdae compare"
FILES = ("index.html", "table.md", "table.json", "pareto.png")


def build_parser() -> CommandParser:
    """Build the command's parser."""
    parser = CommandParser(
        prog=PROGRAM,
        description="Reconstruct the same images with any number of autoencoders, and measure all of them under one "
        "protocol: quality with its intervals, latent, parameters, speed and memory. Writes DIR/index.html, table.md, "
        "table.json and pareto.png. A model that fails is reported in its row, the others finish, and the exit code "
        "is 2. Needs the extra eval: pip install 'dc-ssdae[eval]'.",
    )
    parser.add_argument("models", nargs="+", type=filled, metavar="MODEL", help=MODELS)
    add_output_option(parser)
    add_evaluation_options(parser)
    parser.add_argument(
        "--rounds", type=whole_number(1), default=3, metavar="R", help="in which speed is measured (default 3)"
    )
    parser.add_argument("--show", type=whole_number(1), default=8, metavar="N", help="images on the page (default 8)")
    return parser


def run(args: Namespace) -> int:
    """Measure, write and print; gives the exit code."""
    import os

    specs = parse_models(args.models)
    check_outputs(args, [args.out / name for name in FILES])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("compare runs in one process, so that speeds can be compared; eval takes several")
    opened = open_evaluation(args)
    classes = import_classes(args.modules)
    suite = load_suite(args, opened)

    from tqdm import tqdm

    from dc_ssdae.evaluation.arena import run_arena
    from dc_ssdae.evaluation.arena_report import ArenaReport
    from dc_ssdae.evaluation.candidate_names import open_candidate
    from dc_ssdae.evaluation.candidates import Candidate

    # All of them before the hours that measuring takes: what cannot be loaded is a mistake to mend at once.
    candidates: dict[str, Candidate] = {}
    for spec in specs:
        try:
            with naming_options():
                candidates[spec.label] = open_candidate(spec, opened.dtype, classes, opened.decoding)
        except (InputError, OSError) as error:
            raise InputError(f"{spec.label}: {describe(error)}") from error
    openers = {label: partial(candidates.__getitem__, label) for label in candidates}
    with tqdm(total=len(specs) * len(opened.images), unit="image", leave=False, disable=None) as bar:
        entries = run_arena(
            openers,
            opened.images,
            suite,
            opened.settings,
            opened.device,
            args.rounds,
            args.show,
            bar.update,
            lambda label, reason: complain(args.program, f"{label} failed: {reason}"),
            args.debug,
        )
    if all(entry.failed is not None for entry in entries):
        raise InputError("every model failed; nothing is written")
    report = ArenaReport(entries=entries, rounds=args.rounds, **report_settings(args, opened, suite))
    for image in report.broken:
        complain(args.program, f"left out: {image.reason}")
    text = report.as_markdown()
    say(text)  # before anything that can fail: hours may have gone into the figures
    pareto = report.as_picture()
    contents = (report.as_page(pareto), text.encode("utf-8", "backslashreplace"), report.as_json().encode(), pareto)
    write_outputs(args, dict(zip(FILES, contents, strict=True)))
    return 2 if any(entry.failed is not None for entry in entries) else 0
