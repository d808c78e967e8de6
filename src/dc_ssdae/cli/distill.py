"""`dc-ssdae distill`: trains a model to decode in one step what a teacher decodes in several, and compares them."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import complain, is_main_process, say, select_device, side_by_side
from dc_ssdae.cli.run_config import RunOptions, read_config_of, read_run_config
from dc_ssdae.cli.train import new_run_folder, resume, start, watching_training
from dc_ssdae.errors import InputError, counted, prefixed
from dc_ssdae.presets import read_yaml
from dc_ssdae.settings import setting
from dc_ssdae.training.config import ModelConfig, RunConfig

if TYPE_CHECKING:
    from dc_ssdae.training.loop import Outcome

CHANGED: Mapping[str, Any] = {"steps": 20_000, "lr": 1e-4, "weight_decay": 0.0, "ema_start": 0}
"""Settings of a distillation that differ from those of the teacher's run, unless they are given."""

LEFT_OUT = ("minutes", "init_from", "output", "processes")
"""Settings of the teacher's run that a distillation does not take over."""


@dataclass(kw_only=True)
class Options(RunOptions):
    """Train a copy of a model to decode in one step what the model, its teacher, decodes in several.

    --teacher DIR --steps K starts a run, whose settings are given as for dc-ssdae train; --resume RUN continues it.
    Student and teacher start from the same noise and latent; at the end they are compared on validation images. The run
    saves, resumes and logs as dc-ssdae train does. If the teacher comes from a training run, the settings of that run
    are the defaults.

    Args:
        teacher: folder of a saved model or of a training run, or photos_f8c16, which comes with this package.
        steps: number of steps of the teacher, by default 8; its step size is --distillation.step_size.
        resume: continue the distillation in this folder; if it is finished, compare again.
    """

    teacher: str | None = setting(None, metavar="DIR")
    steps: int | None = setting(None, at_least=1, metavar="K")
    resume: Path | None = setting(None, metavar="RUN")


def run(options: Options) -> None:
    """Train the student, then compare it with its teacher, unless a signal asked for the end."""
    with watching_training(options.resume is not None):
        if options.resume is None:
            config, path = _new_config(options)
            _preview(options.program, config)
            outcome: Outcome | None
            config, outcome = start(options.program, config, path)
        else:
            if options.teacher is not None or options.steps is not None:
                raise InputError("--resume continues with the run's own teacher; leave --teacher and --steps out")
            path = options.resume
            if RunConfig.from_mapping(read_yaml(path / "config.yaml")).distillation is None:
                raise InputError(f"--resume {path} is not a distillation; continue it with dc-ssdae train --resume")
            config, outcome = resume(options, path)
    if is_main_process() and (outcome is None or outcome.stopped_by is None):
        _compare(path, config)


def _new_config(options: Options) -> tuple[RunConfig, Path]:
    """Make the configuration of a new distillation, and choose its folder.

    Raises:
        InputError: no teacher is given; or its run reads images by a class that is not of this package.
    """
    from dc_ssdae.data.sources import check_runs_nothing
    from dc_ssdae.provenance import name_of_path

    if options.teacher is None:
        raise InputError("which model is the teacher? give --teacher DIR, the folder of a saved model or of a run")
    base = _base(options.teacher)
    for name, value in base.get("data", {}).items():
        if any(key.startswith(f"data.{name}") for key, _ in options.settings):
            continue
        check_runs_nothing(value, Path(options.teacher))
        class_path = str(value.get("class_path")) if isinstance(value, Mapping) else ""
        if "." in class_path and not class_path.startswith("dc_ssdae."):
            raise InputError(f"the teacher's run reads images by {class_path}; if you trust it, give --data.{name}")
    # Also as settings, which go over what a file says, such as the config.yaml of an earlier distillation.
    given = options.given("teacher", "steps")
    options.settings += [(f"distillation.{name}", str(value)) for name, value in given.items()]
    config, _ = read_run_config(options, base)
    return config, new_run_folder(config.training.output, f"{name_of_path(options.teacher)}-distilled")


def _base(teacher: str) -> dict[str, Any]:
    """Make the default configuration of a student: the teacher's model, and the settings of its run, if it has one."""
    from dc_ssdae.model_folder import model_folder, read_config
    from dc_ssdae.training.build import decoder_groups

    folder = model_folder(teacher)
    config, base = read_config(folder), read_config_of(folder)
    model: dict[str, Any] = {entry.name: config.get(entry.name) for entry in fields(ModelConfig)}
    training, losses = base.get("training", {}), base.get("losses", {})
    # The latent's batch norm has seen all latents there are: the encoder no longer changes.
    with prefixed(f"--teacher {teacher}"):
        groups = [name for name in decoder_groups(ModelConfig(**model)) if name != "decoder.latent_inputs"]
    seed = training.get("seed", 0) + 1  # not the crops and noise of the teacher's run
    return {
        **base,
        "model": model,
        "training": {**training, **dict.fromkeys(LEFT_OUT), **CHANGED, "seed": seed, "train": groups},
        "losses": {**{name: losses[name] for name in ("dynamics", "lpips") if name in losses}, "repa": 0.0, "kl": 0.0},
        "distillation": {"teacher": teacher, "steps": 8},
    }


def _preview(program: str, config: RunConfig) -> None:
    """Report what the teacher's steps are worth before time is spent on learning them."""
    from dc_ssdae.training.build import load_teacher, own_classes
    from dc_ssdae.training.comparison import compare, open_images

    if not is_main_process() or config.distillation is None:
        return
    with suppress(InputError):  # the run itself finds the mistake, for all processes
        images, split = open_images(config, 16)
        teacher = load_teacher(Path(config.distillation.teacher), own_classes(config.model)).to(select_device("auto"))
        (one, several, _), count, _ = compare(teacher, teacher, images, config.distillation)
        figures = ", ".join(f"{entry['name']} {entry['psnr']:.2f} dB" for entry in (one, several))
        worse = "; the steps make it worse: try fewer, or another step size" if several["psnr"] < one["psnr"] else ""
        complain(program, f"PSNR on {counted(count, f'{split} image')}: {figures}{worse}")


def _compare(path: Path, config: RunConfig) -> None:
    """Compare student and teacher, and print a table."""
    from accelerate.utils.memory import clear_device_cache

    from dc_ssdae.training.comparison import PAGE_FILE, PICTURE_FILE, REPORT_FILE, compare_distilled

    clear_device_cache(garbage_collection=True)  # what the training's cycles of references still hold
    report = compare_distilled(config, path)
    say(side_by_side(report["decodings"]))
    say(f"Means over {report['images']} {report['split']} images of {report['image_size']} px, cut from the centre.")
    for name in report["random_backbones"]:
        say(f"The student's figures mean nothing: the backbone of losses.{name} has random weights.")
    say(f"{path / PAGE_FILE}, {path / REPORT_FILE}, {path / PICTURE_FILE} (its rows: the originals, then as above)")
