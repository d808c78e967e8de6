"""`dc-ssdae eval`: one autoencoder under a named protocol, with intervals, latents, and its worst and best images."""

import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import (
    add_output_option,
    check_outputs,
    complain,
    import_classes,
    say,
    told_by_one_process,
    write_outputs,
)
from dc_ssdae.cli.decoding_options import naming_options
from dc_ssdae.cli.evaluation_options import (
    MODELS,
    OpenEvaluation,
    add_evaluation_options,
    load_suite,
    open_evaluation,
    parse_models,
    report_settings,
)
from dc_ssdae.cli.parser import CommandParser, filled, whole_number
from dc_ssdae.errors import InputError, is_out_of_memory
from dc_ssdae.presets import SHIPPED_MODEL

if TYPE_CHECKING:
    from dc_ssdae.distributed import Processes
    from dc_ssdae.evaluation.candidate_names import CandidateSpec
    from dc_ssdae.evaluation.candidates import Candidate
    from dc_ssdae.evaluation.evaluate import Evaluation
    from dc_ssdae.evaluation.metric_networks import MetricSuite

FILES = ("report.html", "report.md", "report.json", "images.csv")


def build_parser() -> CommandParser:
    """Build the command's parser."""
    parser = CommandParser(
        prog="dc-ssdae eval",
        description="Reconstruct images and measure rFID, PSNR, SSIM, LPIPS, DreamSim and rFDD with 95 % intervals, "
        "and the latents. Writes DIR/report.html with the worst and the best images, report.md, report.json and "
        "images.csv with a line an image. Several processes share the work: torchrun --nproc_per_node N -m dc_ssdae "
        "eval ... Needs the extra eval: pip install 'dc-ssdae[eval]'.",
    )
    parser.add_argument("--model", default=SHIPPED_MODEL, type=filled, metavar="MODEL", help=MODELS)
    add_output_option(parser, "evaluation")
    add_evaluation_options(parser)
    parser.add_argument(
        "--show", type=whole_number(1), default=6, metavar="N", help="worst and best images on the page (default 6)"
    )
    parser.add_argument(
        "--add-to-model",
        action="store_true",
        help="also write the figures into config.json and README.md of the model's folder, in place of earlier ones of "
        "the same protocol, data, size and decoding",
    )
    return parser


@told_by_one_process
def run(args: Namespace) -> int:
    """Measure, write and print; gives the exit code."""
    (spec,) = parse_models([args.model])
    check_outputs(args, [args.out / name for name in FILES])
    folder = _folder_to_add_to(spec) if args.add_to_model else None
    before = None if folder is None else _weight_files(folder)
    opened = open_evaluation(args)
    classes = import_classes(args.modules)
    import torch

    from dc_ssdae.distributed import Processes
    from dc_ssdae.evaluation.candidate_names import open_candidate

    processes = Processes.join(opened.device)
    if processes.count > 1 and opened.device.type == "cuda":
        opened = opened._replace(device=torch.device(processes.device))
    for turn in (True, False):  # what is to be downloaded, the main process downloads, and the others find
        if processes.is_main is turn:
            suite = load_suite(args, opened)
        processes.gather(None)
    with naming_options():
        candidate = open_candidate(spec, opened.dtype, classes, opened.decoding).to(opened.device)
    evaluation = _evaluate(args, opened, candidate, suite, processes)
    if processes.is_main:
        figures = _write(args, spec.label, opened, candidate, suite, evaluation)
        if folder is not None:
            _add_to_model(folder, figures, before == _weight_files(folder))
    return 0


def _folder_to_add_to(spec: "CandidateSpec") -> Path:
    """Find the folder of the model that --add-to-model means, before the time that measuring takes.

    Raises:
        InputError: it is no saved model of this package, or nothing can be written there.
    """
    from dc_ssdae.model_folder import model_folder, read_config

    if spec.kind != "ours" or not os.path.isdir(spec.value):
        raise InputError(
            f"--add-to-model writes into the folder of a saved model or a run of this package; {spec.value} is none"
        )
    folder = model_folder(spec.value)
    read_config(folder)
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} cannot be written to: leave --add-to-model out")
    return folder


def _weight_files(folder: Path) -> list[tuple[str, int, int]]:
    """What tells whether a model's weights are still those that were measured: a run replaces them as it goes on."""
    files = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
    return [(name, status.st_ino, status.st_mtime_ns) for name, status in files]


def _add_to_model(folder: Path, figures: dict[str, Any], is_same: bool) -> None:
    from dc_ssdae.card import CARD_FILE, note_evaluation

    if not is_same:
        raise InputError(f"the weights in {folder} have changed while they were measured: nothing is added to them")
    if not figures["metrics"]:
        raise InputError(f"no metric has a value: nothing is added to {folder}")
    note_evaluation(folder, figures)
    say(f"-> {folder / 'config.json'}, {folder / CARD_FILE}")


def _evaluate(
    args: Namespace, opened: OpenEvaluation, candidate: "Candidate", suite: "MetricSuite", processes: "Processes"
) -> "Evaluation":
    from tqdm import tqdm

    from dc_ssdae.evaluation.evaluate import evaluate

    images = opened.images
    disabled = None if processes.is_main else True
    try:
        with tqdm(total=len(processes.share(len(images))), unit="image", leave=False, disable=disabled) as bar:
            return evaluate(candidate, images, suite, opened.settings, opened.device, processes, bar.update)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"out of memory with --batch {args.batch}; try a smaller one, or --dtype bfloat16") from None


def _write(
    args: Namespace,
    label: str,
    opened: OpenEvaluation,
    candidate: "Candidate",
    suite: "MetricSuite",
    evaluation: "Evaluation",
) -> dict[str, Any]:
    """Look at the worst and best images again, and write everything; gives the figures for the model's config."""
    from dc_ssdae.evaluation.candidates import OurCandidate
    from dc_ssdae.evaluation.evaluate import reconstruct_places
    from dc_ssdae.evaluation.evaluation_report import EvaluationReport

    if not isinstance(candidate, OurCandidate):
        opened = opened._replace(decoding={})
    settings = report_settings(args, opened, suite)
    report = EvaluationReport(label=label, remarks=candidate.remarks, evaluation=evaluation, **settings)
    for image in evaluation.broken:
        complain(args.program, f"left out: {image.reason}")
    text = report.as_markdown()
    say(text)  # before anything that can fail: hours may have gone into the figures
    ranked = report.ranked()

    def shown(places: list[int]) -> list[Any]:
        return reconstruct_places(candidate, opened.images, places, opened.settings, opened.device)

    worst, best = shown(ranked[: args.show]), shown(ranked[::-1][: args.show])
    contents = (
        report.as_page(worst, best),
        text.encode("utf-8", "backslashreplace"),
        report.as_json().encode("utf-8"),
        report.as_csv().encode("utf-8", "backslashreplace"),
    )
    write_outputs(args, dict(zip(FILES, contents, strict=True)))
    return report.as_provenance()
