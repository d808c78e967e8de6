"""Starting a run and going on with one: everything is checked, and the folder is there, before the trainer begins."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.sources import ImageSources, open_sources
from dc_ssdae.distributed import Processes
from dc_ssdae.errors import InputError, lenient_stderr
from dc_ssdae.files import naming, write_whole
from dc_ssdae.machine import slow_dtype_note
from dc_ssdae.model_folder import NOT_MEASURED, model_folder, read_config
from dc_ssdae.training.build import check_components, fetch_backbones
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.distributed import check_batch, processes_of, start_processes
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
    run = RunFolder(path, config.training.keep_every)
    with StopRequest() as stop, lenient_stderr(), naming(path):
        accelerator = start_processes(config.training.processes, cpu)
        processes = processes_of(accelerator)
        model, sources = _check(config, accelerator, processes, starts=True)
        teacher = None if config.distillation is None else model_folder(config.distillation.teacher)
        model_config = _model_config(config, model, teacher)
        processes.on_main(partial(create_run, path, config_text, model_config, replace, teacher))
        with locked(path, processes):
            try:
                return _trainer(config, run, accelerator, processes, sources, stop).run()
            except Exception:
                # A mistake that only the first step shows: what is mended begins anew, under the same name. Within the
                # lock, because whoever does not hold it would delete another process's run.
                if processes.is_main and run.checkpoints.last() is None and not read_lines(run.metrics):
                    shutil.rmtree(path, ignore_errors=True)
                raise


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
        if os.environ.get("RANK", "0") == "0":
            with suppress(InputError, OSError), RunLock(path):  # else another process is at it, or the disk is full
                recover_run(run)
        return None
    with StopRequest() as stop, lenient_stderr(), naming(path):
        accelerator = start_processes(config.training.processes, cpu)
        processes = processes_of(accelerator)
        teacher = run.teacher if run.teacher.is_dir() else None
        model, sources = _check(config, accelerator, processes, run.checkpoints.last() is None, teacher)

        def restore() -> None:
            if not (run.model / "config.json").is_file():
                run.model.mkdir(exist_ok=True)
                (run.model / "config.json").write_text(_model_config(config, model, teacher), encoding="utf-8")
            recover_run(run)
            if config_text is not None:
                write_whole(run.path / CONFIG_FILE, config_text.encode())

        with locked(path, processes):
            processes.on_main(restore)
            return _trainer(config, run, accelerator, processes, sources, stop).run()


def check_config(config: RunConfig, accelerator: Accelerator, starts: bool, teacher: Path | None = None) -> DCSSDAE:
    """Find what does not fit in a run's configuration, before anything is read or downloaded.

    Args:
        config: of the run.
        accelerator: of its processes.
        starts: whether it begins with random weights, those of `training.init_from` or its teacher's.
        teacher: the run's copy of its teacher, where there is one.

    Returns:
        The model, without weights.

    Raises:
        InputError: says what does not fit.
    """
    check_batch(config.training.batch_size, config.training.accumulation_steps, accelerator.num_processes)
    model = check_components(config, starts, teacher, accelerator.distributed_type == DistributedType.FSDP)
    if config.data.root is None and config.data.dataset is None:
        raise InputError("data.root is not given; name a folder of images, tar shards, or a pattern of shards")
    return model


@contextmanager
def locked(path: Path, processes: Processes) -> Iterator[None]:
    """Keep others from writing into the folder of a run or of a recipe for a while.

    Raises:
        InputError: another process is at it.
    """
    lock = RunLock(path)
    processes.on_main(lock.acquire)
    try:
        yield
    finally:
        lock.release()


def _check(
    config: RunConfig, accelerator: Accelerator, processes: Processes, starts: bool, teacher: Path | None = None
) -> tuple[DCSSDAE, ImageSources]:
    data = config.data

    def check() -> tuple[DCSSDAE, ImageSources]:
        model = check_config(config, accelerator, starts, teacher)
        return model, open_sources(data.root, data.dataset, data.validation, data.cache)

    checked = processes.together(check)
    for first in (True, False):  # a download is for one process of each machine; the others find it then
        mine = config.losses if accelerator.is_local_main_process is first else {}
        processes.together(partial(fetch_backbones, mine))
    return checked


def _trainer(
    config: RunConfig,
    run: RunFolder,
    accelerator: Accelerator,
    processes: Processes,
    sources: ImageSources,
    stop: StopRequest,
) -> Trainer:
    """Note what the run is started with, and set everything up for its first step."""
    device = accelerator.device
    hardware = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes.count,
        "distribution": accelerator.distributed_type.value,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }
    lines = JsonLines(run.path / "environment.jsonl", partial(print, file=sys.stderr))
    processes.on_main(lambda: lines.write(describe_environment(hardware)))
    note = slow_dtype_note(device, config.training.precision)
    if note and processes.is_main:
        print(f"{note}: try --training.precision float32", file=sys.stderr)
    # cuDNN tries its algorithms once on the batches, which are alike in size, and takes the fastest.
    torch.backends.cudnn.benchmark = True
    trainer = Trainer(config, run, accelerator, processes, sources, stop)
    if sources.validation is None and config.data.root is not None and processes.is_main:
        print(
            f"{config.data.root} has no validation/: nothing is evaluated, no checkpoint is the best", file=sys.stderr
        )
    return trainer


def _model_config(config: RunConfig, model: DCSSDAE, teacher: Path | None) -> str:
    """The model's config.json; its latent is normalised as the latent of the model whose encoder the run keeps."""
    settings = json.loads(model.to_json_string())
    source = teacher
    if teacher is None and config.training.init_from is not None and config.training.keeps_latent:
        source = model_folder(config.training.init_from)
    given = {} if source is None else read_config(source)
    settings |= {name: given[name] for name in NOT_MEASURED if name in given}
    settings["provenance"] = inherited(config, teacher)
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"
