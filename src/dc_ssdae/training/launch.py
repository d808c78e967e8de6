"""Starting a run and going on with one: everything is checked, and the folder is there, before the trainer begins."""

import json
import os
import shutil
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import DistributedType

from dc_ssdae.data.sources import ImageSources, open_sources
from dc_ssdae.errors import InputError, lenient_stderr
from dc_ssdae.files import naming, write_whole
from dc_ssdae.machine import slow_dtype_note
from dc_ssdae.model_folder import NOT_MEASURED, model_folder, read_config
from dc_ssdae.training.build import build_model, check_components, fetch_backbones
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.distributed import check_batch, on_main_process, start_processes, together
from dc_ssdae.training.initial import check_encoder_is_trained
from dc_ssdae.training.logging import JsonLines, read_lines
from dc_ssdae.training.origin import inherited
from dc_ssdae.training.run import (
    CONFIG_FILE,
    RunFolder,
    RunLock,
    create_run,
    describe_environment,
    is_finished,
    recover_run,
)
from dc_ssdae.training.stopping import StopRequest
from dc_ssdae.training.trainer import Outcome, Trainer


def start_run(config: RunConfig, config_text: str, path: Path, cpu: bool = False, replace: bool = False) -> Outcome:
    """Begin a run in a new folder and train.

    Args:
        config: of the run.
        config_text: the same as YAML, which is kept in the folder.
        path: of the run's folder.
        cpu: use no GPU.
        replace: put it in the place of an earlier run.

    Raises:
        InputError: the configuration, the data, the processes or the folder do not fit.
        TrainingFailed: as `Trainer.run`.
    """
    with StopRequest() as stop, lenient_stderr(), naming(path):
        accelerator = start_processes(config.training.processes, cpu)
        sources = _check(config, accelerator, starts=True)
        teacher = None if config.distillation is None else model_folder(config.distillation.teacher)
        with init_empty_weights():  # not on the meta device, where a user's constructor could read no number
            model_config = _model_config(config, teacher)
        on_main_process(accelerator, partial(create_run, path, config_text, model_config, replace, teacher))
        run = RunFolder(path, config.training.keep_every)
        return _train(config, run, accelerator, sources, stop, is_new=True)


def resume_run(config: RunConfig, config_text: str | None, path: Path, cpu: bool = False) -> Outcome | None:
    """Go on with a run from its last checkpoint, or from the start where there is none.

    Args:
        config: of the run, perhaps with another budget.
        config_text: the same as YAML, to replace the run's own; None keeps that.
        path: of the run's folder.
        cpu: use no GPU.

    Returns:
        How it ended; None where the run was finished already.

    Raises:
        InputError: as `start_run`; or the checkpoint is damaged.
        TrainingFailed: as `Trainer.run`.
    """
    run = RunFolder(path, config.training.keep_every)
    if is_finished(run, config.training):
        if os.environ.get("RANK", "0") != "0":
            return None
        with suppress(InputError, OSError), RunLock(path):  # else another process is at it, or nothing can be written
            recover_run(run)
        return None
    with StopRequest() as stop, lenient_stderr(), naming(path):
        accelerator = start_processes(config.training.processes, cpu)
        teacher = run.teacher if run.teacher.is_dir() else None
        sources = _check(config, accelerator, run.checkpoints.last() is None, teacher)
        return _train(config, run, accelerator, sources, stop, config_text)


def _check(config: RunConfig, accelerator: Accelerator, starts: bool, teacher: Path | None = None) -> ImageSources:
    data = config.data

    def check() -> ImageSources:
        check_config(config, accelerator, starts, teacher)
        return open_sources(data.root, data.dataset, data.validation, data.cache)

    sources = together(accelerator, check)
    for first in (True, False):  # a download is for one process of each machine; the others find it then
        mine = config.losses if accelerator.is_local_main_process is first else {}
        together(accelerator, partial(fetch_backbones, mine))
    return sources


def check_config(config: RunConfig, accelerator: Accelerator, starts: bool, teacher: Path | None = None) -> None:
    """Find what does not fit in a run's configuration, before anything is read or downloaded.

    Args:
        config: of the run.
        accelerator: of its processes.
        starts: whether it begins with random weights, those of `training.init_from` or its teacher's.
        teacher: the run's copy of it, where there is one.

    Raises:
        InputError: says what does not fit.
    """
    check_batch(config.training.batch_size, config.training.accumulation_steps, accelerator.num_processes)
    check_components(config, starts, teacher, accelerator.distributed_type == DistributedType.FSDP)
    if starts:
        check_encoder_is_trained(config)
    if config.data.root is None and config.data.dataset is None:
        raise InputError("data.root is not given; name a folder of images, tar shards, or a pattern of shards")


def _train(
    config: RunConfig,
    run: RunFolder,
    accelerator: Accelerator,
    sources: ImageSources,
    stop: StopRequest,
    config_text: str | None = None,
    is_new: bool = False,
) -> Outcome:
    lock = RunLock(run.path)
    on_main_process(accelerator, lock.acquire)
    try:

        def prepare() -> None:
            if not (run.model / "config.json").is_file():
                run.model.mkdir(exist_ok=True)
                with init_empty_weights():
                    teacher = run.teacher if run.teacher.is_dir() else None
                    (run.model / "config.json").write_text(_model_config(config, teacher), encoding="utf-8")
            recover_run(run)
            if config_text is not None:
                write_whole(run.path / CONFIG_FILE, config_text.encode())
            lines = JsonLines(run.path / "environment.jsonl", partial(print, file=sys.stderr))
            lines.write(describe_environment(_hardware(accelerator)))

        on_main_process(accelerator, prepare)
        note = slow_dtype_note(accelerator.device, config.training.precision)
        if note and accelerator.is_main_process:
            print(f"{note}: try --training.precision float32", file=sys.stderr)
        # Of all batches alike in size cuDNN tries its algorithms once, and takes the fastest.
        torch.backends.cudnn.benchmark = True
        trainer = Trainer(config, run, accelerator, sources, stop)
        if sources.validation is None and config.data.root is not None and accelerator.is_main_process:
            print(
                f"{config.data.root} has no validation/: nothing is evaluated, no checkpoint is the best",
                file=sys.stderr,
            )
        return trainer.run()
    except Exception:
        # A mistake that only the first step shows: what is mended begins anew, under the same name. Here, because
        # whoever does not hold the lock would delete another process's run.
        nothing_done = run.checkpoints.last() is None and not read_lines(run.metrics)
        if is_new and accelerator.is_main_process and nothing_done:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    finally:
        lock.release()


def _model_config(config: RunConfig, teacher: Path | None) -> str:
    """The model's config.json; a latent is normalised as that of the model whose encoder the run keeps."""
    model = json.loads(build_model(config.model).to_json_string())
    source = teacher
    if teacher is None and config.training.init_from is not None and config.training.keeps_latent:
        source = model_folder(config.training.init_from)
    given = {} if source is None else read_config(source)
    model |= {name: given[name] for name in NOT_MEASURED if name in given}
    model["provenance"] = inherited(config, teacher)
    return json.dumps(model, indent=2, sort_keys=True) + "\n"


def _hardware(accelerator: Accelerator) -> dict[str, Any]:
    device = accelerator.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
        "distribution": accelerator.distributed_type.value,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }
