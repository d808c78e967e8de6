"""`dc-ssdae study`: sweeps that answer a question about models; one sub-command each."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import (
    add_batch_option,
    add_data_option,
    add_model_options,
    add_output_option,
    add_size_option,
    check_outputs,
    complain,
    load_model,
    say,
    write_outputs,
)
from dc_ssdae.cli.parser import CommandParser, filled, number, whole_number
from dc_ssdae.errors import InputError, counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.evaluation.sampling_study import Grid, Measurement

PROGRAM = "dc-ssdae study"
FILES = ("study.json", "table.md", "study.png")


def build_parser() -> CommandParser:
    """Build the command's parser, with one below it for each study."""
    parser = CommandParser(prog=PROGRAM, description="Sweep settings of models and show what they are worth.")
    studies = parser.add_subparsers(metavar="STUDY", parser_class=CommandParser, required=True)
    _add_sampling(studies)
    return parser


def run(args: Namespace) -> int:
    """Measure, write and print; gives the exit code."""
    return int(args.study(args))


def _add_sampling(studies: Any) -> None:
    parser = studies.add_parser(
        "sampling",
        help="samplers, steps and tolerances of one model, or of two",
        description="Decode images with each sampler, number of steps, step size and tolerance, and write quality "
        "against evaluations of the decoder and against time: DIR/study.json, table.md and study.png. With --baseline, "
        "also the evaluations that each of the two models needs for the same quality. Every decode starts from the "
        "mode of the image's latent and from decode's default noise. Needs matplotlib: pip install 'dc-ssdae[eval]'.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--baseline", type=filled, metavar="DIR", help="another one to compare with, such as a flow-matching model"
    )
    add_data_option(parser)
    add_output_option(parser, "sampling-study")
    parser.add_argument("--images", type=whole_number(1), default=256, metavar="N", help="at most (default 256)")
    add_size_option(parser)
    add_batch_option(parser)
    parser.add_argument(
        "--rounds", type=whole_number(1), default=3, metavar="R", help="in which everything is timed (default 3)"
    )
    sweep = parser.add_argument_group("what is swept, as lists with commas")
    sweep.add_argument("--samplers", type=_list_of(filled), metavar="NAME,...", help="default: all of each model's")
    sweep.add_argument("--steps", type=_list_of(whole_number(1)), metavar="N,...", help="default 1,2,4,8,16")
    sweep.add_argument(
        "--step_sizes",
        type=_list_of(_step_size),
        metavar="X,...",
        help="of descents, in units of 1/L, L the field's slope near the data; the word default is what decode takes "
        "by itself (default: default,0.5)",
    )
    sweep.add_argument("--momenta", type=_list_of(number), metavar="X,...", help="of nesterov; default 0.3")
    sweep.add_argument(
        "--tolerances",
        type=_list_of(number),
        metavar="X,...",
        help="at which descents of a given step size stop, at the largest of --steps; default 0.2,0.1,0.05,0.025",
    )
    sweep.add_argument(
        "--descents",
        type=_list_of(number),
        metavar="X,...",
        help="other ways, in units of 1/L, that gradient descent's steps after the first share; default none",
    )
    parser.add_argument(
        "--lpips",
        choices=("vgg", "alex", "squeeze", "none"),
        default="vgg",
        help="network of LPIPS (default vgg), left out where its weights are not on this machine",
    )
    parser.set_defaults(study=_study_sampling)


def _study_sampling(args: Namespace) -> int:
    from dc_ssdae.decoding import SAMPLERS
    from dc_ssdae.errors import unknown_name
    from dc_ssdae.evaluation.sampling_report import SamplingStudy
    from dc_ssdae.evaluation.sampling_study import Grid
    from dc_ssdae.timing import describe_machine

    for name in args.samplers or ():
        if name not in SAMPLERS:
            raise unknown_name("sampler", name, SAMPLERS)
    check_outputs(args, [args.out / name for name in FILES])
    names = ("steps", "samplers", "step_sizes", "momenta", "tolerances", "descents")
    grid = Grid(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    models = _load_models(args)
    for name, model in models.items():
        if args.size % model.config.downsample_factor:
            raise InputError(f"--size {args.size} is no multiple of {name}'s f = {model.config.downsample_factor}")
        grid.settings(model.dynamics)
    lpips, lpips_note = _lpips(args, next(iter(models.values())))
    pixels = _read_images(args)
    measurements = _measure(args, models, pixels, grid, lpips)
    notes = [_protocol(args, len(pixels)), *([lpips_note] if lpips_note else []), *_differences(args)]
    study = SamplingStudy(measurements, list(models), notes, describe_machine(next(iter(models.values())).device))
    text = study.as_markdown()
    say(text)
    write_outputs(args, dict(zip(FILES, (study.as_json().encode(), text.encode(), study.as_picture()), strict=True)))
    return 0


def _load_models(args: Namespace) -> "dict[str, DCSSDAE]":
    """The models by name, the baseline first."""
    paths = [path for path in (args.baseline, args.model) if path is not None]
    names = [_model_name(path) for path in paths]
    if len(set(names)) < len(names):
        names = paths
    if len(set(names)) < len(names):
        raise InputError(f"--model and --baseline are both {paths[0]}")
    return {
        name: load_model(Namespace(**{**vars(args), "model": path})) for name, path in zip(names, paths, strict=True)
    }


def _model_name(path: str) -> str:
    resolved = Path(path).resolve()
    return resolved.parent.name if resolved.name == "model" else resolved.name


def _read_images(args: Namespace) -> "Tensor":
    import torch

    from dc_ssdae.data.loader import ValidationImages, enlarged_caveat
    from dc_ssdae.data.sources import open_sources

    sources = open_sources(args.data, None, None, None)
    images = ValidationImages(sources.validation or sources.train, args.size, args.images)
    read = [images[place] for place in range(len(images))]
    for image in read:
        if image.broken is not None:
            complain(args.program, f"left out: {image.broken.reason}")
    usable = [image.pixels for image in read if image.broken is None]
    if not usable:
        raise InputError(f"none of {counted(len(read), 'image')} can be read")
    for line in enlarged_caveat(sum(image.enlarged for image in read), len(usable), args.size):
        complain(args.program, line)
    return torch.stack(usable)


def _lpips(args: Namespace, model: "DCSSDAE") -> "tuple[Callable[[Tensor, Tensor], Tensor] | None, str]":
    """The distance, and why there is none."""
    from dc_ssdae.losses.perceptual import LPIPSLoss

    if args.lpips == "none":
        return None, ""
    if not LPIPSLoss.is_on_this_machine(args.lpips):
        return None, f"No LPIPS: the weights of {args.lpips} are not on this machine, and nothing is downloaded."
    return LPIPSLoss(args.lpips).to(model.device).distance, ""


def _measure(
    args: Namespace,
    models: "dict[str, DCSSDAE]",
    pixels: "Tensor",
    grid: "Grid",
    lpips: "Callable[[Tensor, Tensor], Tensor] | None",
) -> "list[Measurement]":
    import torch
    from tqdm import tqdm

    from dc_ssdae.evaluation.sampling_study import measure_sampling

    count = args.rounds * sum(len(grid.settings(model.dynamics)) for model in models.values())
    try:
        with tqdm(total=count, unit="decode", leave=False, disable=None) as bar, torch.inference_mode():
            return measure_sampling(models, pixels, grid, args.batch, args.rounds, lpips, bar.update)
    except torch.OutOfMemoryError:
        raise InputError(f"out of memory with --batch {args.batch}; try a smaller one, or --dtype bfloat16") from None


def _protocol(args: Namespace, count: int) -> str:
    return (
        f"{counted(count, 'image')} of {args.size} px (shorter side resized, cut from the centre), modes of their "
        f"latents, decode's default noise, {args.dtype}, batches of {args.batch}, output rounded to uint8; "
        f"means over images. Times: medians of {counted(args.rounds, 'round')} in alternating order, of decode alone."
    )


def _differences(args: Namespace) -> list[str]:
    """Where both models come from runs, in what the runs' configurations differ."""
    from dc_ssdae.presets import read_yaml

    if args.baseline is None:
        return []
    configs = []
    for path in (args.baseline, args.model):
        folder = Path(path)
        files = [folder / "config.yaml", folder.resolve().parent / "config.yaml"]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            return [f"{path} is no run: whether the two were trained equally is not known here."]
        configs.append(_flat(read_yaml(file, str(file))))
    names = sorted(name for name in {**configs[0], **configs[1]} if configs[0].get(name) != configs[1].get(name))
    differing = [name for name in names if name != "training.output"]
    return [f"The two runs' configurations differ in {', '.join(differing) or 'nothing'}."]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _list_of(parse: "Callable[[str], Any]") -> "Callable[[str], list[Any]]":
    def parse_list(text: str) -> list[Any]:
        return [parse(part.strip()) for part in text.split(",")]

    return parse_list


def _step_size(text: str) -> float | None:
    return None if text == "default" else number(text)
