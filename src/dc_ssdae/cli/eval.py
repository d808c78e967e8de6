"""`dc-ssdae eval`: measures one autoencoder under a named protocol, and shows its worst and best images."""

from dataclasses import dataclass
from pathlib import Path

from dc_ssdae.cli.common import (
    advising_on_batches,
    check_outputs,
    say,
    writable_model,
    write_outputs,
)
from dc_ssdae.cli.evaluation import open_evaluation, tell_report
from dc_ssdae.cli.options import EvaluationOptions
from dc_ssdae.errors import InputError
from dc_ssdae.presets import SHIPPED_MODEL
from dc_ssdae.settings import setting

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

    model: str = setting(SHIPPED_MODEL, metavar="MODEL")
    out: Path = setting(Path("evaluation"), metavar="DIR")
    show: int = setting(6, at_least=1, metavar="N")
    add_to_model: bool = setting(False, name="--add-to-model")


def run(options: Options) -> None:
    """Measure, write and print; the worst and best images are reconstructed again."""
    from dc_ssdae.evaluation.candidates import open_candidate, parse_candidate

    spec = parse_candidate(options.model)
    check_outputs(options, [options.out / name for name in FILES])
    name = spec.value if spec.kind == "ours" else options.model
    folder = writable_model(name, "leave --add-to-model out") if options.add_to_model else None
    before = _weights_in(folder)
    images, device, processes, classes, about = open_evaluation(options)
    import torch
    from tqdm import tqdm

    from dc_ssdae.card import CARD_FILE, note_evaluation
    from dc_ssdae.evaluation.arena import Entry
    from dc_ssdae.evaluation.candidates import OurCandidate
    from dc_ssdae.evaluation.evaluate import evaluate, reconstruct_places
    from dc_ssdae.evaluation.report.evaluation import EvaluationReport

    candidate = open_candidate(spec, getattr(torch, options.dtype), classes, about["decoding"]).to(device)
    count, hidden = len(processes.share(len(images))), None if processes.is_main else True
    settings, bar = about["settings"], tqdm(total=count, unit="image", leave=False, disable=hidden)
    with advising_on_batches(options), bar:
        evaluation = evaluate(candidate, images, about["suite"], settings, device, processes, bar.update)
    if not processes.is_main:
        return
    if not isinstance(candidate, OurCandidate):
        about["decoding"] = {}
    report = EvaluationReport(entries=[Entry(spec.label, candidate, evaluation=evaluation)], **about)
    text, ranked = tell_report(options, report, evaluation.broken), report.ranked()
    worst = reconstruct_places(candidate, images, ranked[: options.show], settings, device)
    best = reconstruct_places(candidate, images, ranked[::-1][: options.show], settings, device)
    contents = (report.as_page(worst, best), text, report.as_json(), report.as_csv())
    write_outputs(options, dict(zip(FILES, contents, strict=True)))
    if folder is None:
        return
    if before != _weights_in(folder):
        raise InputError(f"the weights in {folder} have changed while they were measured; nothing is written there")
    note_evaluation(folder, report.as_provenance())
    say(f"-> {folder / 'config.json'}, {folder / CARD_FILE}")


def _weights_in(folder: Path | None) -> list[tuple[Path, int]]:
    """Identify the weights of a model by their files: a run that continues replaces them."""
    return [(file, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))] if folder else []
