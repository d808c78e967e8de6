"""`dc-ssdae compare`: measures any number of autoencoders under one protocol, with pictures and costs."""

import os
import traceback
from dataclasses import dataclass

from dc_ssdae.cli.common import check_outputs, complain, write_outputs
from dc_ssdae.cli.evaluation import open_evaluation, tell_report
from dc_ssdae.cli.options import EvaluationOptions
from dc_ssdae.errors import InputError, prefixed
from dc_ssdae.settings import setting

FILES = ("index.html", "table.md", "table.json", "pareto.png")


@dataclass(kw_only=True)
class Options(EvaluationOptions):
    """Measure any number of autoencoders on the same images under one protocol.

    Reports quality with intervals, latent shape, parameters, speed and memory. Writes DIR/index.html, table.md,
    table.json and pareto.png. If a model fails, its row says so, the others are still measured, and the exit code is 2.
    Requires pip install 'dc-ssdae[eval]'.

    Args:
        models: folder or hub id of a model of this package, or folder of a training run; photos_f8c16, the model that
            comes with this package; preset:NAME (random weights); diffusers:FOLDER_OR_HUB_ID; python:MODULE.NAME (an
            object with encode and decode, or a function from images to images, (B, 3, H, W) in [-1, 1]); jpeg:QUALITY;
            webp:QUALITY; bicubic:FACTOR; or pixels:PATCH. LABEL=MODEL sets the name in the reports.
        rounds: number of rounds in which speed is measured.
        show: number of images in index.html.
    """

    models: list[str] = setting(positional=True, metavar="MODEL")
    rounds: int = setting(3, at_least=1, metavar="R")
    show: int = setting(8, at_least=1, metavar="N")


def run(options: Options) -> int:
    """Measure, write and print; gives the exit code."""
    from dc_ssdae.evaluation.candidates import open_candidate, parse_candidates

    specs = parse_candidates(options.models)
    check_outputs(options, [options.out / name for name in FILES])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("compare runs in one process, so that speeds can be compared; eval takes several")
    images, device, _, classes, about = open_evaluation(options)
    import torch
    from tqdm import tqdm

    from dc_ssdae.evaluation.arena import Entry, run_arena
    from dc_ssdae.evaluation.report.arena import ArenaReport

    # All of them before the hours that measuring takes: what cannot be loaded is a mistake to mend at once.
    entries = []
    for spec in specs:
        with prefixed(spec.label):
            candidate = open_candidate(spec, getattr(torch, options.dtype), classes, about["decoding"])
            entries.append(Entry(spec.label, candidate))

    def tell(label: str, reason: str) -> None:
        if options.debug:
            traceback.print_exc()
        complain(options.program, f"{label} failed: {reason}")

    suite, settings = about["suite"], about["settings"]
    with tqdm(total=len(specs) * len(images), unit="image", leave=False, disable=None) as bar:
        run_arena(entries, images, suite, settings, device, options.rounds, options.show, bar.update, tell)
    if all(entry.failed is not None for entry in entries):
        raise InputError("every model failed; nothing is written")
    report = ArenaReport(entries=entries, rounds=options.rounds, **about)
    text, pareto = tell_report(options, report, report.broken), report.as_picture()
    contents = (report.as_page(pareto), text, report.as_json(), pareto)
    write_outputs(options, dict(zip(FILES, contents, strict=True)))
    return 2 if any(entry.failed is not None for entry in entries) else 0
