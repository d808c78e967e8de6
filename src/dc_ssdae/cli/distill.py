"""`dc-ssdae distill`: teach a model to do in one step what it does in several, and compare."""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import complain, say
from dc_ssdae.cli.parser import CommandParser, filled, whole_number
from dc_ssdae.cli.train import (
    find_own_classes,
    is_main_process,
    read_run,
    take_option,
    tell_end,
    told_once,
    watching_training,
)
from dc_ssdae.errors import InputError
from dc_ssdae.training.changes import check_changes, lasting_settings

if TYPE_CHECKING:
    from dc_ssdae.training.config import RunConfig
    from dc_ssdae.training.trainer import Outcome

PROGRAM = "dc-ssdae distill"

DEFAULT_STEPS = 8
"""Of the teacher (SPEC section 2, "Distillation")."""

CHANGED: Mapping[str, Any] = {
    "steps": 20_000,
    "minutes": None,
    "lr": 1e-4,
    "weight_decay": 0.0,
    "ema_start": 0,
    "init_from": None,
    "output": None,
    "processes": None,
}
"""What a distillation does otherwise than the run that the teacher comes from; flags go over it."""

TERMS = ("dynamics", "lpips")
"""Of the teacher's objective, the terms that a student keeps."""

OWN_OPTIONS = {
    "--teacher": "the folder of a saved model, or of a run",
    "--steps": "a whole number",
    "--resume": "the folder of a run",
}


class DistillParser:
    """Reads the command's own words; what is left are settings of a run, as `dc-ssdae train` takes them."""

    def parse_args(self, words: Sequence[str]) -> argparse.Namespace:
        """Read and check everything.

        Raises:
            InputError: something is wrong; one line.
            SystemExit: after --help and --print_config.
        """
        try:
            return _parse(words)
        except InputError as error:
            raise told_once(error) from error


def build_parser() -> DistillParser:
    """Build the command's parser."""
    return DistillParser()


def _own_parser() -> CommandParser:
    parser = CommandParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} --teacher DIR [--steps K] [--config FILE] [--section.name VALUE]\n"
        f"       {PROGRAM} --resume RUN [--section.name VALUE]",
        description="Train a copy of a model so that it lands in one step where the teacher lands in several, from the "
        "same noise and latent; then compare the two on validation images. It is a run like any other: it saves, "
        "resumes and logs as dc-ssdae train does, and takes the same --config FILE and --section.name VALUE, which "
        "dc-ssdae train --help lists. Where the teacher comes from a run, data and loop are that run's by default.",
    )
    parser.add_argument("--teacher", type=filled, metavar="DIR", help="the folder of a saved model, or of a run")
    parser.add_argument(
        "--steps",
        type=whole_number(1),
        default=None,
        metavar="K",
        help=f"of the teacher (default {DEFAULT_STEPS}); its step size is --distillation.step_size",
    )
    parser.add_argument("--resume", type=filled, metavar="RUN", help="go on with a distillation, or compare again")
    return parser


def _parse(words: Sequence[str]) -> argparse.Namespace:
    from dc_ssdae.cli.run_config import build_run_parser, parse_run_config

    parser, rest, own = _own_parser(), list(words), []
    if "--help" in words or "-h" in words:
        parser.parse_args(["--help"])
    for name, needs in OWN_OPTIONS.items():
        value, rest = take_option(rest, name, needs)
        own += [] if value is None else [f"{name}={value}"]
    args = parser.parse_args(own)
    run_parser = build_run_parser(PROGRAM)
    for name in ("--teacher", "--steps"):
        run_parser.add_argument(name)  # to be suggested where one is misspelt
    if args.resume is None:
        if args.teacher is None:
            raise InputError("which model is to be taught from? --teacher DIR, a saved model's folder or a run's")
        # Also as flags, which go over what a file says, such as the config.yaml of an earlier distillation.
        rest.append(f"--distillation.teacher={args.teacher}")
        rest += [] if args.steps is None else [f"--distillation.steps={args.steps}"]
        from dc_ssdae.data.sources import check_runs_nothing

        base = _base(args.teacher, args.steps or DEFAULT_STEPS)
        for name, value in base.get("data", {}).items():
            if any(word.startswith(f"--data.{name}") for word in rest):
                continue
            check_runs_nothing(value, Path(args.teacher))
            class_path = str(value.get("class_path")) if isinstance(value, Mapping) else ""
            if "." in class_path and not class_path.startswith("dc_ssdae."):
                raise InputError(
                    f"--teacher {args.teacher} reads images by {class_path}; if you trust it, give --data.{name}"
                )
        config = parse_run_config(rest, base=base, parser=run_parser).config
        return argparse.Namespace(program=PROGRAM, resume=None, config=config)
    if args.teacher is not None or args.steps is not None:
        raise InputError("--resume goes on with the run's own teacher; leave --teacher and --steps out")
    path = Path(args.resume)
    before = read_run(path)
    if before.distillation is None:
        raise InputError(f"--resume {path} is no distillation; go on with it by dc-ssdae train --resume {path}")
    after = parse_run_config(rest, base=before.to_mapping(), parser=run_parser).config if rest else before
    check_changes(lasting_settings(before), lasting_settings(after), path)
    return argparse.Namespace(program=PROGRAM, resume=path, config=after, changed=after != before)


def _base(teacher: str, steps: int) -> dict[str, Any]:
    """What a student starts from: the teacher's model, and the data and the loop of its run, if it comes from one."""
    from dc_ssdae.autoencoder import COMPONENTS
    from dc_ssdae.model_folder import model_folder, read_config
    from dc_ssdae.training.build import decoder_groups
    from dc_ssdae.training.config import ModelConfig

    find_own_classes()
    folder = model_folder(teacher)
    if not folder.is_dir():
        raise InputError(f"--teacher {teacher}: no such folder")
    config = read_config(folder)
    try:
        model = {name: config[name] for name in ("latent_channels", "downsample_factor", *COMPONENTS)}
    except KeyError as error:
        raise InputError(f"--teacher {teacher}: its config.json lacks {error.args[0]}") from None
    base = _run_of(folder)
    losses = {name: term for name, term in base.get("losses", {}).items() if name in TERMS}
    return {
        **base,
        "model": model,
        # The latent's batch norm has seen all latents there are: the encoder no longer changes.
        "training": {
            **base.get("training", {}),
            **CHANGED,
            "seed": base.get("training", {}).get("seed", 0) + 1,  # not the crops and noise of the teacher's run
            "train": [name for name in decoder_groups(ModelConfig(**model)) if name != "decoder.latent_inputs"],
        },
        "losses": {**losses, "repa": {"weight": 0.0}, "kl": {"weight": 0.0}},
        "distillation": {"teacher": teacher, "steps": steps},
    }


def _run_of(folder: Path) -> dict[str, Any]:
    """The configuration of the run that a model's folder belongs to; nothing for a model alone."""
    from dc_ssdae.presets import read_yaml
    from dc_ssdae.training.config import RunConfig

    file = folder.resolve().parent / "config.yaml"  # RUN/model of a recipe leads to that of its last phase
    if folder.name != "model" or not file.is_file():
        return {}
    return RunConfig.from_mapping(read_yaml(file, str(file))).to_mapping()


def run(args: argparse.Namespace) -> int:
    """Train the student, then compare; gives the exit code, 0 also where a signal asked for the end."""
    with watching_training(args):
        path = _train(args)
    if path is not None and is_main_process():
        _compare(path, args.config)
    return 0


def _train(args: argparse.Namespace) -> Path | None:
    """Train until the end; gives the run's folder, None where a signal came first."""
    from dc_ssdae.cli.run_config import config_yaml
    from dc_ssdae.training.build import resolved
    from dc_ssdae.training.run import check_new
    from dc_ssdae.training.start import resume_run, start_run

    outcome: Outcome | None
    if args.resume is None:
        teacher = Path(args.config.distillation.teacher).absolute()
        name = teacher.parent.name if teacher.name == "model" else teacher.name
        path = Path(args.config.training.output or Path("runs") / f"{name}-distilled")
        if is_main_process():
            check_new(path)
        config = resolved(args.config)
        _preview(config)
        outcome = start_run(config, config_yaml(config), path)
    else:
        path = args.resume
        outcome = resume_run(args.config, config_yaml(args.config) if args.changed else None, path)
    if outcome is not None:
        tell_end(PROGRAM, outcome, path)
    return path if outcome is None or outcome.stopped_by is None else None


def _preview(config: "RunConfig") -> None:
    """Say what the teacher's steps are worth, and what the cache may take, before the time is spent."""
    from dc_ssdae.training.build import check_components
    from dc_ssdae.training.comparison import preview_teacher

    if not is_main_process() or (config.data.root is None and config.data.dataset is None):
        return
    with suppress(InputError):  # the run itself finds the mistake, for all processes
        check_components(config)
        complain(PROGRAM, preview_teacher(config))
    assert config.distillation is not None
    if config.distillation.cache_steps is not None:
        images = config.distillation.cache_steps * config.training.batch_size
        gibibytes = images * 3 * config.data.image_size**2 * 4 / 2**30
        complain(PROGRAM, f"the teacher's results of {images} draws will take {gibibytes:.2g} GiB in the run's folder")


def _compare(path: Path, config: "RunConfig") -> None:
    from accelerate.utils.memory import clear_device_cache

    from dc_ssdae.training.comparison import compare_distilled

    clear_device_cache(garbage_collection=True)  # what the training's cycles of references still hold
    say(compare_distilled(config, path))
