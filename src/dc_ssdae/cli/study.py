"""`dc-ssdae study sampling`: measures samplers, steps and tolerances of one or two models."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dc_ssdae.cli.common import advising_on_batches, check_outputs, load_model, say, tell_of_images, write_outputs
from dc_ssdae.cli.options import BatchOptions, ModelOptions, OutputOptions, SizeOptions
from dc_ssdae.cli.run_config import read_config_of
from dc_ssdae.errors import InputError, check_names, counted
from dc_ssdae.settings import setting

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dc_ssdae.autoencoder import DCSSDAE

FILES = ("study.json", "table.md", "study.png")


@dataclass(kw_only=True)
class Options(ModelOptions, OutputOptions, SizeOptions, BatchOptions):
    """Measure how quality and time depend on sampler, number of steps, step size and tolerance.

    Writes quality against evaluations of the decoder and against time to DIR/study.json, table.md and study.png; with
    --baseline also how many evaluations each of the two models needs for the same quality. Every image is decoded from
    the mode of its latent and from the default noise. Values of a list are separated by commas. Requires pip install
    'dc-ssdae[eval]'.

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

    program = "dc-ssdae study sampling"
    baseline: str | None = setting(None, metavar="DIR")
    data: str = setting(metavar="ROOT")
    out: Path = setting(Path("sampling-study"), metavar="DIR")
    images: int = setting(256, at_least=1, metavar="N")
    rounds: int = setting(3, at_least=1, metavar="R")
    samplers: list[str] | None = setting(None, metavar="NAME,...")
    steps: list[int] | None = setting(None, at_least=1, metavar="N,...")
    step_sizes: list[str] | None = setting(None, metavar="X,...")
    momenta: list[float] | None = setting(None, metavar="X,...")
    tolerances: list[float] | None = setting(None, metavar="X,...")
    descents: list[float] | None = setting(None, metavar="X,...")
    lpips: Literal["vgg", "alex", "squeeze", "none"] = "vgg"


def run(options: Options) -> None:
    """Measure, write and print."""
    import torch
    from tqdm import tqdm

    from dc_ssdae.decoding import SAMPLERS
    from dc_ssdae.evaluation.candidate_names import name_apart, parse_candidate
    from dc_ssdae.evaluation.sampling_report import SamplingStudy
    from dc_ssdae.evaluation.sampling_study import Grid, measure_sampling
    from dc_ssdae.timing import describe_machine

    check_names("sampler", options.samplers or (), SAMPLERS)
    check_outputs(options, [options.out / name for name in FILES])
    names = ("steps", "samplers", "momenta", "tolerances", "descents")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.step_sizes is not None:
        given["step_sizes"] = [_step_size(text) for text in options.step_sizes]
    grid = Grid(**given)
    texts = [text for text in (options.baseline, options.model) if text is not None]
    specs = name_apart([parse_candidate(text) for text in texts])
    labels = [spec.label for spec in specs]
    paths = [spec.value if spec.kind == "ours" else text for spec, text in zip(specs, texts, strict=True)]
    models = {label: load_model(replace(options, model=path)) for label, path in zip(labels, paths, strict=True)}
    count = options.rounds * sum(len(grid.settings(model.dynamics)) for model in models.values())
    lpips, notes = _lpips(options, models[labels[0]])
    if options.baseline is not None:
        notes.append(_differences(paths))
    pixels = _read_images(options)
    with (
        advising_on_batches(options),
        tqdm(total=count, unit="decode", leave=False, disable=None) as bar,
        torch.inference_mode(),
    ):
        measurements = measure_sampling(models, pixels, grid, options.batch, options.rounds, lpips, bar.update)
    protocol = (
        f"{counted(len(pixels), 'image')} of {options.size} px (shorter side resized, cut from the centre), modes of "
        f"their latents, decode's default noise, {options.dtype}, batches of {options.batch}, output rounded to "
        f"uint8; means over images. Times: medians of "
        f"{counted(options.rounds, 'round')} in alternating order, of decode alone."
    )
    study = SamplingStudy(measurements, labels, [protocol, *notes], describe_machine(models[labels[0]].device))
    text = study.as_markdown()
    say(text)
    write_outputs(options, dict(zip(FILES, (study.as_json().encode(), text.encode(), study.as_picture()), strict=True)))


def _read_images(options: Options) -> "Tensor":
    import torch

    from dc_ssdae.data.loader import ValidationImages
    from dc_ssdae.data.sources import open_sources

    sources = open_sources(options.data, None, None, None)
    images = ValidationImages(sources.validation or sources.train, options.size, options.images)
    read = [images[place] for place in range(len(images))]
    broken = [image.broken for image in read if image.broken is not None]
    tell_of_images(options.program, options.size, broken, sum(image.enlarged for image in read), len(read))
    return torch.stack([image.pixels for image in read if image.broken is None])


def _lpips(options: Options, model: "DCSSDAE") -> "tuple[Callable[[Tensor, Tensor], Tensor] | None, list[str]]":
    """Load the LPIPS distance, or say why there is none."""
    from dc_ssdae.losses.backbones import weights_on_this_machine
    from dc_ssdae.losses.perceptual import LPIPSLoss, trunk_file

    if options.lpips == "none":
        return None, []
    if weights_on_this_machine(trunk_file(options.lpips)) is None:
        return None, [f"No LPIPS: the weights of {options.lpips} are not on this machine, and nothing is downloaded."]
    return LPIPSLoss(options.lpips).to(model.device).distance, []


def _differences(paths: Sequence[str]) -> str:
    """Say how the configurations of the models' runs differ."""
    from dc_ssdae.model_folder import model_folder

    configs = []
    for path in paths:
        sections = read_config_of(model_folder(path))
        if not sections:
            return f"{path} is no run: whether the models were trained equally is not known here."
        configs.append({f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()})
    names = {name for config in configs for name in config} - {"training.output"}
    differing = sorted(name for name in names if configs[0].get(name) != configs[1].get(name))
    return f"The two runs' configurations differ in {', '.join(differing) or 'nothing'}."


def _step_size(text: str) -> float | None:
    try:
        return None if text == "default" else float(text)
    except ValueError:
        raise InputError(f"--step_sizes holds {text!r}; it must hold numbers, or the word default") from None
