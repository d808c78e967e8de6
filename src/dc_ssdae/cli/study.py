"""`dc-ssdae study sampling`: measures samplers, steps and tolerances of one or two models."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dc_ssdae.cli.common import advising_on_batches, check_outputs, load_model, say, tell_of_images, write_outputs
from dc_ssdae.cli.options import BatchOptions, ModelOptions, OutputOptions
from dc_ssdae.errors import InputError, check_names, counted
from dc_ssdae.settings import setting

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

FILES = ("index.html", "study.json", "table.md", "study.png")


@dataclass(kw_only=True)
class SamplingOptions(ModelOptions, OutputOptions, BatchOptions):
    """Measure how quality and time depend on sampler, number of steps, step size and tolerance.

    Writes quality against evaluations of the decoder and against time to DIR/index.html, study.json, table.md and
    study.png; with --baseline also how many evaluations each of the two models needs for the same quality. Every image
    is decoded from the mode of its latent and from the default noise. Values of a list are separated by commas.
    Requires pip install 'dc-ssdae[eval]'.

    Args:
        baseline: another model to compare with, such as one trained by flow matching.
        data: images to measure on: a folder of images or shards, or a pattern of shards, as in data.root of a training
            run. If the folder has a subfolder validation/, its images are used.
        images: largest number of images.
        rounds: number of rounds in which every setting is timed.
        samplers: names of samplers; by default all that suit each model.
        steps: numbers of steps; by default 1,2,4,8,16.
        step_sizes: step sizes of descents, in units of 1/L, where L is the slope of the field near the data. The word
            default stands for the step size that decoding uses by default. By default default,0.5.
        momenta: momenta of nesterov; by default 0.3.
        tolerances: tolerances at which descents stop, with at most the largest number in --steps; by default
            0.2,0.1,0.05,0.025.
        descents: other total distances, in units of 1/L, that the steps of gradient descent after the first cover
            together; by default none.
        lpips: network of LPIPS; LPIPS is left out if the weights are not on this machine.
    """

    baseline: str | None = setting(None, metavar="DIR")
    data: str = setting(metavar="ROOT")
    out: Path = setting(Path("sampling-study"), metavar="DIR")
    images: int = setting(256, at_least=1, metavar="N")
    rounds: int = setting(3, at_least=1, metavar="R")
    samplers: list[str] | None = setting(None, metavar="NAME,...")
    steps: list[int] | None = setting(None, at_least=1, metavar="N,...")
    step_sizes: list[str] = setting(["default", "0.5"], metavar="X,...")
    momenta: list[float] | None = setting(None, metavar="X,...")
    tolerances: list[float] | None = setting(None, metavar="X,...")
    descents: list[float] | None = setting(None, metavar="X,...")
    lpips: Literal["vgg", "alex", "squeeze", "none"] = "vgg"


def run_sampling(options: SamplingOptions) -> None:
    """Measure, write and print."""
    import torch
    from tqdm import tqdm

    from dc_ssdae.data.loader import ValidationImages
    from dc_ssdae.data.sources import open_sources
    from dc_ssdae.decoding import SAMPLERS
    from dc_ssdae.evaluation.candidates import name_apart, parse_candidate
    from dc_ssdae.evaluation.report.study import SamplingStudy
    from dc_ssdae.evaluation.sampling_study import Grid, measure_sampling
    from dc_ssdae.timing import describe_machine

    check_names("sampler", options.samplers or (), SAMPLERS)
    check_outputs(options, [options.out / name for name in FILES])
    given = options.given("steps", "samplers", "momenta", "tolerances", "descents")
    grid = Grid(step_sizes=[_step_size(text) for text in options.step_sizes], **given)
    specs = name_apart([parse_candidate(text) for text in (options.baseline, options.model) if text is not None])
    models = {spec.label: load_model(replace(options, model=spec.value)) for spec in specs}
    device = models[specs[0].label].device
    lpips, notes = _lpips(options.lpips, device)
    sources = open_sources(options.data, None, None, None)
    images = ValidationImages(sources.validation or sources.train, options.size, options.images)
    read = [images[place] for place in range(len(images))]
    broken = [image.broken for image in read if image.broken is not None]
    tell_of_images(options.program, options.size, broken, sum(image.enlarged for image in read), len(read))
    pixels = torch.stack([image.pixels for image in read if image.broken is None])
    count = options.rounds * sum(len(grid.settings(model.dynamics)) for model in models.values())
    bar = tqdm(total=count, unit="decode", leave=False, disable=None)
    with advising_on_batches(options), bar, torch.inference_mode():
        measurements = measure_sampling(models, pixels, grid, options.batch, options.rounds, lpips, bar.update)
    measured = f"{counted(len(pixels), 'image')} of {options.size} px, cut from the centre, batches of {options.batch}"
    times = f"times are of decode alone, medians of {counted(options.rounds, 'round')}"
    protocol = f"{measured}, {options.dtype}, output rounded to uint8; {times}."
    study = SamplingStudy(measurements, list(models), [protocol, *notes], describe_machine(device))
    text = study.as_markdown()
    say(text)
    picture = study.as_picture()
    contents = (study.as_page(picture), study.as_json(), text, picture)
    write_outputs(options, dict(zip(FILES, contents, strict=True)))


def _lpips(net: str, device: "torch.device") -> "tuple[Callable[[Tensor, Tensor], Tensor] | None, list[str]]":
    """Load the LPIPS distance, or say why there is none."""
    from dc_ssdae.losses.backbones import weights_on_this_machine
    from dc_ssdae.losses.perceptual import LPIPSLoss, trunk_file

    if net == "none":
        return None, []
    if weights_on_this_machine(trunk_file(net)) is None:
        return None, [f"No LPIPS: the weights of {net} are not on this machine, and nothing is downloaded."]
    return LPIPSLoss(net).to(device).distance, []


def _step_size(text: str) -> float | None:
    try:
        return None if text == "default" else float(text)
    except ValueError:
        raise InputError(f"--step_sizes holds {text!r}; it must hold numbers, or the word default") from None
