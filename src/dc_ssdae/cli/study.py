"""`dc-ssdae study`: sweeps that answer a question about models; one sub-command each."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import (
    add_batch_option,
    add_data_option,
    add_model_options,
    add_output_option,
    add_size_option,
    advising_on_batches,
    check_outputs,
    load_model,
    say,
    tell_of_images,
    write_outputs,
)
from dc_ssdae.cli.parser import CommandParser, filled, number, whole_number
from dc_ssdae.errors import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dc_ssdae.autoencoder import DCSSDAE

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
    import torch
    from tqdm import tqdm

    from dc_ssdae.decoding import SAMPLERS
    from dc_ssdae.errors import unknown_name
    from dc_ssdae.evaluation.candidate_names import name_apart, parse_candidate
    from dc_ssdae.evaluation.sampling_report import SamplingStudy
    from dc_ssdae.evaluation.sampling_study import Grid, measure_sampling
    from dc_ssdae.timing import describe_machine

    for name in args.samplers or ():
        if name not in SAMPLERS:
            raise unknown_name("sampler", name, SAMPLERS)
    check_outputs(args, [args.out / name for name in FILES])
    names = ("steps", "samplers", "step_sizes", "momenta", "tolerances", "descents")
    grid = Grid(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    paths = [path for path in (args.baseline, args.model) if path is not None]
    labels = [spec.label for spec in name_apart([parse_candidate(path) for path in paths])]
    models = {
        label: load_model(Namespace(**{**vars(args), "model": path})) for label, path in zip(labels, paths, strict=True)
    }
    count = args.rounds * sum(len(grid.settings(model.dynamics)) for model in models.values())
    lpips, lpips_note = _lpips(args, models[labels[0]])
    pixels = _read_images(args)
    with (
        advising_on_batches(args),
        tqdm(total=count, unit="decode", leave=False, disable=None) as bar,
        torch.inference_mode(),
    ):
        measurements = measure_sampling(models, pixels, grid, args.batch, args.rounds, lpips, bar.update)
    protocol = (
        f"{counted(len(pixels), 'image')} of {args.size} px (shorter side resized, cut from the centre), modes of "
        f"their latents, decode's default noise, {args.dtype}, batches of {args.batch}, output rounded to uint8; "
        f"means over images. Times: medians of {counted(args.rounds, 'round')} in alternating order, of decode alone."
    )
    notes = [protocol, *lpips_note, *([] if args.baseline is None else [_differences(paths)])]
    study = SamplingStudy(measurements, labels, notes, describe_machine(models[labels[0]].device))
    text = study.as_markdown()
    say(text)
    write_outputs(args, dict(zip(FILES, (study.as_json().encode(), text.encode(), study.as_picture()), strict=True)))
    return 0


def _read_images(args: Namespace) -> "Tensor":
    import torch

    from dc_ssdae.data.loader import ValidationImages
    from dc_ssdae.data.sources import open_sources

    sources = open_sources(args.data, None, None, None)
    images = ValidationImages(sources.validation or sources.train, args.size, args.images)
    read = [images[place] for place in range(len(images))]
    broken = [image.broken for image in read if image.broken is not None]
    tell_of_images(args, broken, sum(image.enlarged for image in read), len(read))
    return torch.stack([image.pixels for image in read if image.broken is None])


def _lpips(args: Namespace, model: "DCSSDAE") -> "tuple[Callable[[Tensor, Tensor], Tensor] | None, list[str]]":
    """The distance, or why there is none."""
    from dc_ssdae.losses.perceptual import LPIPSLoss

    if args.lpips == "none":
        return None, []
    if not LPIPSLoss.is_on_this_machine(args.lpips):
        return None, [f"No LPIPS: the weights of {args.lpips} are not on this machine, and nothing is downloaded."]
    return LPIPSLoss(args.lpips).to(model.device).distance, []


def _differences(paths: Sequence[str]) -> str:
    """Where the models come from runs, say in what the runs' configurations differ."""
    from dc_ssdae.presets import read_yaml

    configs = []
    for path in paths:
        folder = Path(path)
        files = [folder / "config.yaml", folder.resolve().parent / "config.yaml"]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            return f"{path} is no run: whether the models were trained equally is not known here."
        sections = {name: section for name, section in read_yaml(file).items() if isinstance(section, Mapping)}
        configs.append({f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()})
    names = {name for config in configs for name in config} - {"training.output"}
    differing = sorted(name for name in names if configs[0].get(name) != configs[1].get(name))
    return f"The two runs' configurations differ in {', '.join(differing) or 'nothing'}."


def _list_of(parse: "Callable[[str], Any]") -> "Callable[[str], list[Any]]":
    def parse_list(text: str) -> list[Any]:
        return [parse(part.strip()) for part in text.split(",")]

    return parse_list


def _step_size(text: str) -> float | None:
    return None if text == "default" else number(text)
