"""`dc-ssdae curves`: losses and evaluations of runs as a picture."""

from dataclasses import dataclass
from pathlib import Path

from dc_ssdae.cli.common import check_outputs, complain, say
from dc_ssdae.cli.options import OutputOptions
from dc_ssdae.files import write_whole
from dc_ssdae.settings import setting


@dataclass(kw_only=True)
class Options(OutputOptions):
    """Plot the losses and evaluations of one or several training runs, with a panel per loss term and per metric.

    The phases of a recipe follow each other. Requires pip install 'dc-ssdae[eval]'.

    Args:
        runs: folder of a training run.
        out: file to write: .png, .svg or .pdf.
    """

    runs: list[Path] = setting(positional=True, metavar="RUN")
    out: Path = setting(Path("curves.png"), metavar="FILE")


def run(options: Options) -> None:
    """Draw the runs."""
    from dc_ssdae.evaluation.curves import curves_figure, read_runs, save_picture

    check_outputs(options, [options.out])
    runs = read_runs(options.runs)
    for note in (note for run in runs for note in run.notes):
        complain(options.program, note)
    write_whole(options.out, save_picture(lambda: curves_figure(runs), options.out.suffix[1:].lower() or "png"))
    say(f"{', '.join(run.name for run in runs)} -> {options.out}")
