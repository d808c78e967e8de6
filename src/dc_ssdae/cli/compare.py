"""`dc-ssdae compare`: measures any number of autoencoders under one protocol, with pictures and costs."""

import os
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import check_outputs, complain, write_outputs
from dc_ssdae.cli.evaluation import open_evaluation, tell_report
from dc_ssdae.cli.options import EvaluationOptions
from dc_ssdae.errors import InputError, prefixed
from dc_ssdae.settings import setting

if TYPE_CHECKING:
    import torch

    from dc_ssdae.evaluation.arena import Entry
    from dc_ssdae.evaluation.candidates import CandidateSpec
    from dc_ssdae.evaluation.report.arena import ArenaReport
    from dc_ssdae.probe.report import ProbeReport

FILES = ("index.html", "table.md", "table.json", "pareto.png")


@dataclass(kw_only=True)
class Options(EvaluationOptions):
    """Measure any number of autoencoders on the same images under one protocol.

    Reports quality with intervals, latent shape, parameters, speed and memory. Writes DIR/index.html, table.md,
    table.json and pareto.png. If a model fails, its row says so, the others are still measured, and the exit code is 2.
    With --probe, a small diffusion transformer is also trained on each latent, as by dc-ssdae probe, and the table
    shows how good the latents are to generate from. Requires pip install 'dc-ssdae[eval]'.

    Args:
        models: folder or hub id of a model of this package, or folder of a training run; photos_f8c16, the model that
            comes with this package; preset:NAME (random weights); diffusers:FOLDER_OR_HUB_ID; python:MODULE.NAME (an
            object with encode and decode, or a function from images to images, (B, 3, H, W) in [-1, 1]); jpeg:QUALITY;
            webp:QUALITY; bicubic:FACTOR; or pixels:PATCH. LABEL=MODEL sets the name in the reports.
        rounds: number of rounds in which speed is measured.
        show: number of images in index.html.
        probe: train a nano probe by flow matching for this many minutes on the latent of each model, on the training
            images of --data (at most --limit of them), and write a page for each in DIR/probe.
        probe_steps: as --probe, but for this many steps, which are the same on a slow and on a fast machine.
    """

    models: list[str] = setting(positional=True, metavar="MODEL")
    rounds: int = setting(3, at_least=1, metavar="R")
    show: int = setting(8, at_least=1, metavar="N")
    probe: float | None = setting(None, above=0.0, metavar="MINUTES")
    probe_steps: int | None = setting(None, at_least=1, name="--probe-steps", metavar="N")


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
    from dc_ssdae.probe.report import comparison_caveats, comparison_columns

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
    code = 2 if any(entry.failed is not None for entry in entries) else 0

    def write() -> "ArenaReport":
        report = ArenaReport(entries=entries, rounds=options.rounds, **about)
        pareto = report.as_picture()
        contents = (report.as_page(pareto), report.as_markdown(), report.as_json(), pareto)
        write_outputs(options, dict(zip(FILES, contents, strict=True)))
        return report

    if options.probe is not None or options.probe_steps is not None:
        write()  # hours may have gone into it, and more will into the probes
        probes, failed = probe_entries(options, specs, entries, settings.size, device, tell)
        about |= {"more_columns": comparison_columns(probes), "more_caveats": comparison_caveats(probes)}
        code = 2 if failed else code
    report = ArenaReport(entries=entries, rounds=options.rounds, **about)
    tell_report(options, report, report.broken)
    write()
    return code


def probe_entries(
    options: Options,
    specs: "Sequence[CandidateSpec]",
    entries: "Sequence[Entry]",
    size: int,
    device: "torch.device",
    tell: Callable[[str, str], object],
) -> "tuple[list[ProbeReport], bool]":
    """Probe the latents of the models that were measured, write a page for each, and note their figures.

    Returns:
        The reports, and whether a probe failed or a signal ended the probing.
    """
    from dc_ssdae.cli.probe import ProbeOptions, probe_latent
    from dc_ssdae.data.sources import open_sources
    from dc_ssdae.evaluation.estimates import Estimate
    from dc_ssdae.evaluation.evaluate import describe_failure
    from dc_ssdae.probe.features import load_features

    probe = ProbeOptions(program=options.program, steps=options.probe_steps, minutes=options.probe)
    given: dict[str, Any] = {
        "size": size,
        "limit": options.limit,
        "batch_size": options.batch,
        "workers": options.workers,
    }
    given |= {"seed": options.seed, "dtype": options.dtype}
    given["images"] = open_sources(options.data, None, None, None)
    given["features"] = cache(partial(load_features, download=options.download, random=options.random_backbones))
    reports: list[ProbeReport] = []
    for place, (spec, entry) in enumerate(zip(specs, entries, strict=True)):
        shape = None if entry.evaluation is None else entry.evaluation.latent_shape
        if shape is None or len(shape) != 3 or spec.kind == "bicubic":
            continue
        name = re.sub(r"[^\w.-]+", "_", spec.label)
        folder = options.out / "probe" / f"{place}-{name}"  # two labels may give one name
        work = {"folder": folder, "spec": spec, "candidate": entry.candidate, **given}
        try:
            report = probe_latent(probe, options.program, device, **work)
        except Exception as error:  # a user's code, or diffusers', may raise anything
            reason = describe_failure(error, options.batch)
            tell(f"{entry.label}'s probe", reason)
            entry.more = {"probe_loss": Estimate(reason=f"its probe failed: {reason}")}
            continue
        if report is None:
            return reports, True
        write_outputs(replace(options, out=folder), {"index.html": report.as_page(), "probe.json": report.as_json()})
        entry.more = report.figures()
        reports.append(report)
    return reports, any("probe_loss" in entry.more and entry.more["probe_loss"].value is None for entry in entries)
