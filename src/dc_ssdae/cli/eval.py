"""`dc-ssdae eval`: measures one autoencoder under a named protocol, and shows its worst and best images."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dc_ssdae.cli.common import (
    advising_on_batches,
    check_outputs,
    import_classes,
    main_first,
    say,
    told_by_one_process,
    writable_model,
    write_outputs,
)
from dc_ssdae.cli.decoding import naming_options
from dc_ssdae.cli.evaluation import (
    OpenEvaluation,
    load_suite,
    open_evaluation,
    parse_models,
    report_settings,
    tell_report,
)
from dc_ssdae.cli.options import EvaluationOptions
from dc_ssdae.errors import InputError
from dc_ssdae.presets import SHIPPED_MODEL
from dc_ssdae.settings import setting

if TYPE_CHECKING:
    from dc_ssdae.evaluation.candidates import Candidate
    from dc_ssdae.evaluation.evaluation_report import EvaluationReport

FILES = ("report.html", "report.md", "report.json", "images.csv")


@dataclass(kw_only=True)
class Options(EvaluationOptions):
    """Measure an autoencoder: rFID, PSNR, SSIM, LPIPS, DreamSim and rFDD with 95 % intervals, and its latents.

    Writes DIR/report.html with the worst and best images, report.md, report.json, and images.csv with a line per image.
    To use several processes: torchrun --nproc_per_node N -m dc_ssdae eval ... Requires pip install 'dc-ssdae[eval]'.

    Args:
        model: model to measure, named as in dc-ssdae compare; photos_f8c16 is the trained model that comes with this
            package.
        show: number of worst and of best images in report.html.
        add_to_model: also write the results into config.json and README.md of the model's folder, replacing earlier
            results for the same protocol, data, size and decoding.
    """

    program = "dc-ssdae eval"
    model: str = setting(SHIPPED_MODEL, metavar="MODEL")
    out: Path = setting(Path("evaluation"), metavar="DIR")
    show: int = setting(6, at_least=1, metavar="N")
    add_to_model: bool = setting(False, name="--add-to-model")


@told_by_one_process()
def run(options: Options) -> None:
    """Measure, write and print."""
    (spec,) = parse_models([options.model])
    check_outputs(options, [options.out / name for name in FILES])
    folder = None
    if options.add_to_model:
        folder = writable_model(spec.value if spec.kind == "ours" else options.model, "leave --add-to-model out")
    before = _weights_in(folder)
    opened = open_evaluation(options)
    classes = import_classes(options.modules)
    import torch
    from tqdm import tqdm

    from dc_ssdae.card import CARD_FILE, note_evaluation
    from dc_ssdae.distributed import Processes
    from dc_ssdae.evaluation.candidate_names import open_candidate
    from dc_ssdae.evaluation.candidates import OurCandidate
    from dc_ssdae.evaluation.evaluate import evaluate
    from dc_ssdae.evaluation.evaluation_report import EvaluationReport

    processes = Processes.join(opened.device)
    if processes.count > 1 and opened.device.type == "cuda":
        opened = opened._replace(device=torch.device(processes.device))
    suite = main_first(processes, lambda: load_suite(options, opened))
    with naming_options():
        candidate = open_candidate(spec, opened.dtype, classes, opened.decoding).to(opened.device)
    count, hidden = len(processes.share(len(opened.images))), None if processes.is_main else True
    with advising_on_batches(options), tqdm(total=count, unit="image", leave=False, disable=hidden) as bar:
        evaluation = evaluate(candidate, opened.images, suite, opened.settings, opened.device, processes, bar.update)
    if not processes.is_main:
        return
    if not isinstance(candidate, OurCandidate):
        opened = opened._replace(decoding={})
    settings = report_settings(options, opened, suite)
    report = EvaluationReport(label=spec.label, remarks=candidate.remarks, evaluation=evaluation, **settings)
    _write(options, report, candidate, opened)
    if folder is None:
        return
    if before != _weights_in(folder):
        raise InputError(f"the weights in {folder} have changed while they were measured; nothing is written there")
    figures = report.as_provenance()
    if not figures["metrics"]:
        raise InputError(f"no metric has a value; nothing is written to {folder}")
    note_evaluation(folder, figures)
    say(f"-> {folder / 'config.json'}, {folder / CARD_FILE}")


def _weights_in(folder: Path | None) -> list[tuple[Path, int]]:
    """Identify the weights of a model by their files: a run that continues replaces them."""
    files = [] if folder is None else sorted(folder.glob("*.safetensors"))
    return [(file, file.stat().st_mtime_ns) for file in files]


def _write(options: Options, report: "EvaluationReport", candidate: "Candidate", opened: OpenEvaluation) -> None:
    """Write everything; the worst and best images are reconstructed again."""
    from dc_ssdae.evaluation.evaluate import reconstruct_places

    text = tell_report(options, report, report.evaluation.broken)
    ranked = report.ranked()
    worst, best = (
        reconstruct_places(candidate, opened.images, places[: options.show], opened.settings, opened.device)
        for places in (ranked, ranked[::-1])
    )
    contents = (
        report.as_page(worst, best),
        text.encode("utf-8", "backslashreplace"),
        report.as_json().encode("utf-8"),
        report.as_csv().encode("utf-8", "backslashreplace"),
    )
    write_outputs(options, dict(zip(FILES, contents, strict=True)))
