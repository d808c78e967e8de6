"""The tables and three pictures of the documentation that are made from what the studies wrote.

The site's build puts the table NAME where a page has the line `[Table NAME](FILE)`. Run as a script, this writes the
pictures, docs/architecture.png, docs/sampling_study.png and docs/probe_steps.png; `python studies/tables.py NAME`
prints a table.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dc_ssdae.evaluation.curves import COLOURS, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]


def lines(name: str, folder: str = "results") -> list[dict[str, Any]]:
    """Read FOLDER/NAME.jsonl."""
    return [json.loads(line) for line in (ROOT / folder / f"{name}.jsonl").read_text().splitlines()]


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
    return markdown(["variant", "evaluations", "seeds", *(head for head, _ in QUALITY.values()), "ms per image"], rows)


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
    return markdown(["model", "evaluations", *(head for head, _ in QUALITY.values()), "ms per image"], rows)


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
    series = {}
    for variant, label in VARIANTS.items():
        runs = by_variant("architecture")[variant]
        series[label] = [(int(count), [run["evaluations"][count] for run in runs]) for count in runs[0]["evaluations"]]
    return quality_figure(series)


SAMPLERS = {
    ("EqM", "gradient_descent", None): "EqM, gradient descent",
    ("EqM", "nesterov", None): "EqM, Nesterov",
    ("EqM", "gradient_descent", 0.5): "EqM, steps of 0.5/L",
    ("FM", "euler", None): "FM, Euler",
    ("FM", "midpoint", None): "FM, midpoint",
}
"""Model, sampler and step size of what the picture of the sampling study shows, and what it calls them."""


def sampling_figure() -> "Figure":
    """PSNR and LPIPS of the sampling study's models by evaluations; a PSNR below 17 dB is left out."""
    series = {}
    for (model, sampler, size), label in SAMPLERS.items():
        rows = [m for m in sampling_study()["measurements"] if (m["model"], m["sampler"]) == (model, sampler)]
        rows = [m for m in rows if m["step_size"] == size and m["tolerance"] is None and m["psnr"] > 17]
        series[label] = [(round(m["evaluations"]), [m]) for m in rows]
    return quality_figure(series)


def quality_figure(series: Mapping[str, Sequence[tuple[int, Sequence[Mapping[str, float]]]]]) -> "Figure":
    """PSNR and LPIPS by evaluations of the decoder, a line for each label: the evaluations, and each seed's figures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), dpi=100, layout="constrained")
    panels = dict(zip(("psnr", "lpips"), figure.subplots(1, 2), strict=True))
    for name, title in (("psnr", "PSNR in dB: higher is better"), ("lpips", "LPIPS of SqueezeNet: lower is better")):
        axes, ends = panels[name], []
        most = max(count for points in series.values() for count, _ in points)
        for color, (label, points) in zip(COLOURS, series.items(), strict=False):
            counts = [count for count, _ in points]
            seeds = [[seed[name] for seed in found] for _, found in points]
            low, mean, high = (np.array([f(values) for values in seeds]) for f in (min, statistics.fmean, max))
            axes.plot(counts, mean, marker="o", markersize=5, linewidth=2, color=color)
            axes.fill_between(counts, low, high, color=color, alpha=0.1, linewidth=0)
            ends.append((counts[-1], mean[-1], label, color))
        label_ends(axes, ends)
        axes.set(title=title, xlabel="evaluations of the decoder", xscale="log", xlim=(0.9, 4.2 * most))
        ticks = [2**power for power in range(most.bit_length())]
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
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
    head = ["weight", "std of the latent", "noise in it", "active channels of 4", "PSNR, dB", "two steps, dB"]
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


def equal_time() -> str:
    """Quality by what the network answers, by patch and by size, each with the same processor time."""
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for line in lines("equal_time", "studies"):
        if match := re.fullmatch(r"patch(\d)_(\w+)_(\d+)px_seed\d", line["name"]):
            patch, prediction, size = match.groups()
            found.setdefault((prediction, patch), {}).setdefault(size, []).append(line)
    names = (("psnr", 2), ("ssim", 3), ("psnr_2_steps", 2))
    rows = []
    for prediction, patch in sorted(found):
        row = [f"{prediction}, patch {patch}"]
        for size in ("64", "128"):
            runs = found[prediction, patch][size]
            row += [spread([run[name] for run in runs], digits) for name, digits in names]
        rows.append(row)
    head = [f"{size} px: {name}" for size in (64, 128) for name in ("PSNR, dB", "SSIM", "two steps, dB")]
    return markdown(["the network predicts", *head], rows)


DECODERS = {
    "diffusers:AutoencoderKL": "AutoencoderKL",
    "preset:sd_f8c4_frozen_eqm": "decoder S",
    "preset:fast_f8c16": "`fast_f8c16`",
    "diffusers:AutoencoderTiny": "AutoencoderTiny",
}


def decode_speed() -> str:
    """Seconds of a decode, with memory that is kept and without, and how they compare with AutoencoderKL's."""
    rows = []
    for size in (256, 512, 1024):
        figures = json.loads((ROOT / "studies" / f"decode_speed_{size}.json").read_text())["figures"]
        measured = {figure["model"]: figure for figure in figures}
        for name, title in DECODERS.items():
            row = [title, str(size)]
            for figure in (measured.get(name), measured.get(f"kept:{name}")):
                seconds = figure and f"{statistics.median(figure['seconds']):.3g}"
                row += [seconds or "", f"{figure['times_as_fast']:.3g}" if figure else ""]
            rows.append(row)
    times = "times as fast as AutoencoderKL"
    return markdown(["decoder", "px", "s", times, "s, memory kept", f"{times}, not kept"], rows)


def encode_speed() -> str:
    """Seconds of encoding, the share of the processor's peak, and how many times as fast `fast_f8c16` is."""
    figures = json.loads((ROOT / "studies/bench_encode.json").read_text())["figures"]
    rows = []
    for figure in figures:
        label = figure["label"].removeprefix("preset:")
        median = figure["seconds"]["median"]
        # The ratio is of fast_f8c16 to the other, round by round.
        times = f"{1 / figure['ratio']['median']:.2g}" if figure["ratio"] else ""
        rows.append([label, str(figure["size"]), f"{median:.3g}", f"{100 * figure['share_of_peak']:.0f} %", times])
    return markdown(["encoder", "px", "s", "of the peak", "`fast_f8c16` is faster by a factor of"], rows)


@cache
def sampling_study() -> dict[str, Any]:
    """Read what `studies/sampling.py` found."""
    return json.loads((ROOT / "results/sampling_study.json").read_text())


def sampling() -> str:
    """Quality and field of each way to decode."""
    columns = {"model": "", "sampler": "", "num_steps": "", "step_size": "g", "momentum": "g", "tolerance": "g"}
    columns |= {"evaluations": ".3g", "psnr": ".2f", "ssim": ".3f", "lpips": ".3f", "residual_rms": ".3g"}
    rows = [
        ["" if m[name] is None else f"{m[name]:{digits}}" for name, digits in columns.items()]
        for m in sampling_study()["measurements"]
    ]
    head = ["model", "sampler", "steps", "η · L", "μ", "tolerance", "evaluations"]
    return markdown([*head, *(title for title, _ in QUALITY.values()), "field RMS"], rows)


def needed() -> str:
    """The evaluations that the two models need for the same quality."""
    rows = []
    for name, (title, digits) in QUALITY.items():
        for entry in sampling_study()["needed"][name]:
            told = ["not reached" if m is None else f"{m['evaluations']:.3g}" for m in entry["models"]]
            rows.append([title, f"{entry['target']:.{digits}f}", *told])
    return markdown(["quality", "to reach", "evaluations, FM", "evaluations, EqM"], rows)


def probes(study: str) -> dict[str, list[dict[str, Any]]]:
    """The lines of results/probe.jsonl of one study, a list of seeds for each variant."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines("probe"):
        if line["study"] == study:
            found.setdefault(line["variant"], []).append(line)
    return found


def distances(line: Mapping[str, Any], images: str) -> list[dict[str, Any]]:
    """The distances of a probe's samples, or of reconstructions."""
    return [entry for entry in line["distances"] if entry["images"] == images]


def probe_encoders() -> str:
    """A row for each latent: how hard its field is, and how far samples and reconstructions are from photos."""
    rows = []
    for variant, runs in probes("encoders").items():
        shape = "×".join(map(str, runs[0]["about"]["latent_shape"]))
        values = [spread([run["loss"]["value"] for run in runs], 3)]
        values += [
            spread([distances(run, images)[0]["value"]["value"] for run in runs], 0)
            for images in ("samples", "reconstructions")
        ]
        rows.append([variant, shape, *values, spread([run["copying"]["value"] for run in runs], 2)])
    return markdown(["latent of", "c×h×w", "loss", "distance of samples", "of reconstructions", "copying"], rows)


def probe_spoilt() -> str:
    """Loss and distance of clean and spoilt latents, over seeds."""
    rows = []
    for variant, runs in probes("spoilt").items():
        far = [
            spread([distances(run, images)[0]["value"]["value"] for run in runs], 0)
            for images in ("samples", "reconstructions")
        ]
        rows.append([variant, str(len(runs)), spread([run["loss"]["value"] for run in runs], 3), *far])
    return markdown(["latent", "seeds", "loss", "distance of samples", "of reconstructions"], rows)


def probe_samplers() -> str:
    """The distance of samples by sampler and number of steps."""
    rows = []
    for variant, runs in probes("dynamics").items():
        for entry in sorted(distances(runs[0], "samples"), key=lambda entry: (entry["sampler"], entry["num_steps"])):
            evaluations = entry["evaluations"] or entry["num_steps"]
            far = f"{entry['value']['value']:.0f} ({entry['value']['low']:.0f} to {entry['value']['high']:.0f})"
            figures = [str(entry["num_steps"]), f"{evaluations:.3g}", far, f"{entry['variance']:.2f}"]
            rows.append([variant, entry["sampler"], *figures])
    return markdown(["dynamics", "sampler", "steps", "evaluations", "distance of samples", "variance"], rows)


def probe_figure() -> "Figure":
    """The distance of samples against evaluations of the network, a line for each sampler."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.0), dpi=120, layout="constrained")
    axes, ends = figure.subplots(), []
    for variant, runs in probes("dynamics").items():
        samplers: dict[str, list[tuple[float, float]]] = {}
        for entry in distances(runs[0], "samples"):
            place = entry["evaluations"] or entry["num_steps"]
            samplers.setdefault(entry["sampler"], []).append((place, entry["value"]["value"]))
        for sampler, points in samplers.items():
            colour = COLOURS[len(ends) % len(COLOURS)]
            evaluations, far = zip(*sorted(points), strict=True)
            axes.plot(evaluations, far, color=colour, marker="o", markersize=4)
            ends.append((128, far[-1], f"{variant.replace('equilibrium matching', 'EqM')}: {sampler}", colour))
        floor = distances(runs[0], "reconstructions")[0]["value"]["value"]
        axes.axhline(floor, color="#8a94a3", linestyle="--", linewidth=1.0)
    axes.set(xlabel="evaluations of the network per sample", ylabel="Fréchet distance of SqueezeNet features")
    ticks = sorted(
        {entry["num_steps"] for runs in probes("dynamics").values() for entry in runs[0]["distances"]} - {None}
    )
    axes.set(xscale="log", xlim=(0.9 * min(ticks), 6 * max(ticks)), ylim=(0.0, None))
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.minorticks_off()
    label_ends(axes, ends)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (
        *(architecture, counts, stopping, claim, distillation, stability, kl, kick),
        *(equal_time, decode_speed, encode_speed, sampling, needed),
        *(probe_encoders, probe_spoilt, probe_samplers),
    )
}


def main() -> None:
    if names := sys.argv[1:]:
        print("\n".join(TABLES[name]() for name in names))
        return
    figures = {"architecture": architecture_figure, "sampling_study": sampling_figure, "probe_steps": probe_figure}
    for name, draw in figures.items():
        (ROOT / f"docs/{name}.png").write_bytes(save_picture(draw))


if __name__ == "__main__":
    main()
