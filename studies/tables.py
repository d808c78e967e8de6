"""Make the tables of docs/results.md and its picture of the architecture's study: python studies/tables.py [--check]

A table stands between `<!-- table NAME -->` and `<!-- end -->`. With --check nothing is written, and the exit code is 1
where a table is not what the files give.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dc_ssdae.evaluation.curves import COLOURS, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def lines(name: str) -> list[dict[str, Any]]:
    """What results/NAME.jsonl holds."""
    return [json.loads(line) for line in (ROOT / "results" / f"{name}.jsonl").read_text().splitlines()]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    aligned = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, aligned, *rows))


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and from which to which the seeds are."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def by_variant(name: str, *holding: str) -> dict[str, list[dict[str, Any]]]:
    """The lines of results/NAME.jsonl that hold this, a list of seeds for each variant."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines(name):
        if all(key in line for key in holding):
            found.setdefault(line["variant"], []).append(line)
    return found


QUALITY = {"psnr": ("PSNR, dB", 2), "ssim": ("SSIM", 3), "lpips": ("LPIPS squeeze", 3)}
"""What is measured: its heading, and digits."""


def figures(measured: Sequence[dict[str, float]], *more: tuple[str, int]) -> list[str]:
    """The quality of the seeds, and more of what they have, with its digits."""
    names = [*((name, digits) for name, (_, digits) in QUALITY.items()), *more]
    return [spread([m[name] for m in measured], digits) for name, digits in names]


def architecture() -> str:
    """Quality of each variant by evaluations, over its seeds."""
    rows = []
    for variant, runs in by_variant("architecture").items():
        for count in runs[0]["evaluations"]:
            measured = [run["evaluations"][count] for run in runs]
            rows.append([f"`{variant}`", count, str(len(runs)), *figures(measured, ("milliseconds", 1))])
    return markdown(["variant", "evaluations", "seeds", *(head for head, _ in QUALITY.values()), "ms an image"], rows)


def counts() -> str:
    """PSNR of each variant by a fixed number of evaluations."""
    found = by_variant("decoding", "decodings")
    names = [name for name in next(iter(found.values()))[0]["decodings"] if name.isdigit()]
    rows = [
        [f"`{variant}`", *(spread([run["decodings"][name]["psnr"] for run in runs], 2) for name in names)]
        for variant, runs in found.items()
    ]
    return markdown(["evaluations", *names], rows)


def stopping() -> str:
    """What stopping each image by its own field costs and gives."""
    rows = []
    for variant, runs in by_variant("decoding", "decodings").items():
        for name in runs[0]["decodings"]:
            if not name.isdigit():
                measured = [run["decodings"][name] for run in runs]
                evaluations = spread([m["evaluations"] for m in measured], 1)
                rows.append([f"`{variant}`", name.removeprefix("tolerance "), evaluations, *figures(measured)])
    return markdown(["variant", "tolerance", "evaluations", *(head for head, _ in QUALITY.values())], rows)


NEAR = 0.05
"""dB below the best that still count as reaching it: more evaluations change as little."""


def claim() -> str:
    """How many evaluations equilibrium matching needs for the best PSNR that flow matching reaches, seed by seed."""
    found = by_variant("decoding", "decodings")
    rows = []
    for fm, eqm in zip(found["fm_field"], found["eqm_field"], strict=True):
        fixed = {
            name: {int(count): m["psnr"] for count, m in run["decodings"].items() if count.isdigit()}
            for name, run in (("fm", fm), ("eqm", eqm))
        }
        best = max(fixed["fm"].values())
        theirs, ours = (
            next((count for count, psnr in fixed[name].items() if psnr >= best - NEAR), None) for name in ("fm", "eqm")
        )
        assert theirs is not None
        told = "never" if ours is None else f"{ours} ({100 * (1 - ours / theirs):.0f} % fewer)"
        rows.append([str(fm["seed"]), f"{best:.2f}", str(theirs), told])
    return markdown(["seed", "best PSNR of flow matching, dB", "its evaluations", "equilibrium matching's"], rows)


def distillation() -> str:
    """The teacher, its student and the model that trained on instead."""
    rows = []
    for runs in by_variant("decoding", "student").values():
        for who, told in (("teacher", "teacher"), ("student", "student"), ("trained_on", "trained on")):
            rows += [
                [told, count, *figures([run[who][count] for run in runs], ("milliseconds", 1))]
                for count in ("1", "2", "8")
            ]
    return markdown(["model", "evaluations", *(head for head, _ in QUALITY.values()), "ms an image"], rows)


VARIANTS = {
    "deterministic_patch4": "no noise, patches of 4",
    "eqm_image_patch4": "EqM, image, patches of 4",
    "eqm_image": "EqM, image",
    "eqm_field": "EqM, field",
    "eqm_field_truncated": "EqM, field, truncated decay",
    "fm_field": "FM, field",
    "fm_image": "FM, image",
}
"""What the picture calls the variants."""


def architecture_figure() -> "Figure":
    """PSNR and LPIPS of the variants by evaluations: means over the seeds, and bands from seed to seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), dpi=100, layout="constrained")
    panels = dict(zip(("psnr", "lpips"), figure.subplots(1, 2), strict=True))
    for name, title in (("psnr", "PSNR in dB: higher is better"), ("lpips", "LPIPS of SqueezeNet: lower is better")):
        axes, ends = panels[name], {}
        for color, (variant, label) in zip(COLOURS, VARIANTS.items(), strict=False):
            runs = by_variant("architecture")[variant]
            counts = [int(count) for count in runs[0]["evaluations"]]
            seeds = [[m[name] for m in run["evaluations"].values()] for run in runs]
            low, mean, high = (np.array([f(c) for c in zip(*seeds, strict=True)]) for f in (min, statistics.fmean, max))
            axes.plot(counts, mean, marker="o", markersize=5, linewidth=2, color=color)
            axes.fill_between(counts, low, high, color=color, alpha=0.1, linewidth=0)
            ends[variant] = counts[-1], mean[-1], label, color
        label_ends(axes, [*ends.values()])
        axes.set(title=title, xlabel="evaluations of the decoder", xscale="log", xlim=(0.9, 34))
        axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def label_ends(axes: "Axes", ends: Sequence[tuple[int, float, str, str]]) -> None:
    """Write each line's name beside its last point, moved up or down where two would overlap."""
    low, high = axes.get_ylim()
    apart, places = 0.055 * (high - low), {}
    for x, y, label, color in sorted(ends, key=lambda end: end[1]):
        places[x] = place = max(y, places.get(x, -float("inf")) + apart)
        text = axes.annotate(label, (x, y), xytext=(x * 1.12, place), color=color, va="center", fontsize=10)
        text.set_bbox({"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0})


def stability() -> str:
    """PSNR of each run of the learning rates, from which step it went wrong, and its largest KL."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines("stability"):
        if "kl" not in line:
            norm = "norm" if line["norm"] != "none" else "no norm"
            found.setdefault(f"{line['dynamics']}, {line['prediction']}, {norm}", []).append(line)
    rows = []
    for name, runs in found.items():
        ends = [f"{run['psnr_1']:.1f}" if "psnr_1" in run else "none" for run in runs]
        for index, run in enumerate(runs):
            if run["skipped"]:
                ends[index] += f", {run['skipped']} steps not finite from step {run['first_skipped']}"
            elif run["above_its_start"] is not None:
                ends[index] += f", loss above its start at step {run['above_its_start']}"
        rows.append([name, *ends, *(f"{run['largest_kl']:.0e}" for run in runs)])
    rates = [f"{run['factor'] / 1000:g}" for run in next(iter(found.values()))]
    head = ["dynamics, prediction, encoder", *(f"dB at {rate}" for rate in rates)]
    return markdown([*head, *(f"largest KL at {rate}" for rate in rates)], rows)


def kl() -> str:
    """The latent at each weight of the KL."""
    rows = []
    for line in lines("stability"):
        if "kl" in line:
            names = {"latent_std": ".2f", "noise_std": ".3f", "active_channels": "", "psnr_1": ".2f", "psnr_2": ".2f"}
            rows.append([f"{line['kl']:.0e}", *(f"{line[name]:{digits}}" for name, digits in names.items())])
    head = ["weight", "latent's std", "of it noise", "active channels of 4", "PSNR, dB", "in two steps, dB"]
    return markdown(head, rows)


def kick() -> str:
    """What a single step does to the log-variances, with training's bound on them and without."""
    rows = []
    for first, last in ((0, 0), (1, 1), (2, 10), (11, 20), (21, 50), (51, 80), (81, 100)):
        row = [f"{first}" if first == last else f"{first} to {last}"]
        for former in (True, False):
            found = [line for line in lines("logvar_explosion") if line["former"] == former and "logvar" in line]
            within = [line for line in found if first <= line["step"] - line["kick"] <= last]
            for name, digits in (("logvar", ".1f"), ("behind", ",.0f"), ("kl", ".2g")):
                row.append(f"{max(line[name] for line in within):{digits}}")
        rows.append(row)
    each = ("log-variance", "features", "KL of it")
    return markdown(["steps after", *(f"{name}, {told}" for told in ("no bound", "bound") for name in each)], rows)


TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make for make in (architecture, counts, stopping, claim, distillation, stability, kl, kick)
}


def filled(text: str) -> str:
    """The document with its tables made anew."""
    return PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    document = ROOT / "docs/results.md"
    before = document.read_text(encoding="utf-8")
    after = filled(before)
    if args.check:
        return int(after != before)
    document.write_text(after, encoding="utf-8")
    (ROOT / "docs/architecture.png").write_bytes(save_picture(architecture_figure))
    return 0


if __name__ == "__main__":
    sys.exit(main())
