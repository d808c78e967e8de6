"""Starting a run and going on with one: everything is checked, and the folder is there, before the trainer begins."""

import json
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, InitProcessGroupKwargs

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.sources import ImageSources, open_sources
from dc_ssdae.distributed import PATIENCE, Processes
from dc_ssdae.errors import InputError, lenient_stderr
from dc_ssdae.files import naming, write_whole
from dc_ssdae.machine import slow_dtype_note
from dc_ssdae.model_folder import NOT_MEASURED, model_folder, read_config
from dc_ssdae.training.build import check_components, fetch_weights
from dc_ssdae.training.config import RunConfig, TrainingConfig, keeps_latent
from dc_ssdae.training.logging import JsonLines, read_lines
from dc_ssdae.training.loop import Outcome
from dc_ssdae.training.origin import inherited
from dc_ssdae.training.run import (
    CONFIG_FILE,
    RunFolder,
    create_run,
    describe_environment,
    is_finished,
    recover_run,
    run_lock,
)
from dc_ssdae.training.step import trains
from dc_ssdae.training.stopping import StopRequest
from dc_ssdae.training.trainer import Trainer

ENGINES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
"""What the checkpoints and the batch norm over processes are made for."""


class Task(ABC):
    """What a run trains, as far as starting it goes.

    Attributes:
        training: how it is trained.
    """

    training: TrainingConfig

    @abstractmethod
    def check(self, run: RunFolder, processes: Processes, distribution: DistributedType) -> Any:
        """Find mistakes before anything heavy is built; gives what it trains on.

        Raises:
            InputError: something does not fit.
        """

    def fetch(self, run: RunFolder) -> None:  # noqa: B027
        """Find weights by others, or download them; one process of each machine is the first to do so."""

    @abstractmethod
    def create(self, path: Path) -> None:
        """Make the folder of a new run."""

    @abstractmethod
    def loop(self, run: RunFolder, accelerator: Accelerator, processes: Processes, sources: Any, stop: Any) -> Any:
        """Make the `TrainingLoop`."""


@dataclass
class AutoencoderTask(Task):
    """The training of an autoencoder, by its configuration and the same as YAML."""

    config: RunConfig
    config_text: str | None
    _model: DCSSDAE | None = None

    @property
    def training(self) -> TrainingConfig:  # type: ignore[override]
        return self.config.training

    def check(self, run: RunFolder, processes: Processes, distribution: DistributedType) -> ImageSources:
        config, data = self.config, self.config.data
        starts, teacher = run.checkpoints.last() is None, run.teacher if run.teacher.is_dir() else None
        self._model = check_components(config, starts, teacher, processes.count, distribution == DistributedType.FSDP)
        sources = open_sources(data.root, data.dataset, data.validation, data.cache)
        if processes.is_main and data.root is not None and sources.validation is None:
            print(f"{data.root} has no validation/: nothing is evaluated, no checkpoint is the best", file=sys.stderr)
        return sources

    def fetch(self, run: RunFolder) -> None:
        fetch_weights(self.config, starts=run.checkpoints.last() is None)

    def create(self, path: Path) -> None:
        """Make the run's folder; the latent is normalised as by the model whose encoder the run keeps."""
        assert self._model is not None
        training, distillation = self.config.training, self.config.distillation
        teacher = None if distillation is None else model_folder(distillation.teacher)
        source = teacher if training.init_from is None else model_folder(training.init_from)
        settings = json.loads(self._model.to_json_string())
        if source is not None and (keeps_latent(training.train) or not trains(self._model.encoder)):
            settings |= {name: value for name, value in read_config(source).items() if name in NOT_MEASURED}
        settings["provenance"] = inherited(self.config, source)
        create_run(path, self.config_text or "", json.dumps(settings, indent=2, sort_keys=True) + "\n", teacher)

    def loop(
        self, run: RunFolder, accelerator: Accelerator, processes: Processes, sources: Any, stop: StopRequest
    ) -> Trainer:
        return Trainer(self.config, run, accelerator, processes, sources, stop)


def start_run(
    config: RunConfig, config_text: str | None, path: Path, cpu: bool = False, resumes: bool = False
) -> Outcome:
    """Train an autoencoder in a new folder, or go on with one; see `start_task`.

    Args:
        config: of the run.
        config_text: the same as YAML, which is kept in the folder; None keeps what a run has that goes on.
        path: of the run's folder.
        cpu: use no GPU.
        resumes: whether the folder is there; for `resume_run`.

    Raises:
        InputError: the configuration, the data, the processes or the folder do not fit.
        TrainingFailed: as `TrainingLoop.run`.
    """
    return start_task(AutoencoderTask(config, config_text), config_text, path, cpu, resumes)


def start_task(
    task: Task, config_text: str | None, path: Path, cpu: bool = False, resumes: bool | None = None
) -> Outcome:
    """Begin a run in a new folder, or go on with one, and train.

    Args:
        task: what is trained.
        config_text: its configuration as YAML, which is kept in the folder; None keeps what a run has that goes on.
        path: of the run's folder.
        cpu: use no GPU.
        resumes: whether the folder is there; None looks.

    Raises:
        InputError: the configuration, the data, the processes or the folder do not fit.
        TrainingFailed: as `TrainingLoop.run`.
    """
    run, training = RunFolder(path, task.training.keep_every), task.training
    with StopRequest() as stop, lenient_stderr(), naming(path):
        accelerator, processes = start_processes(training.processes, cpu)
        if resumes is None:
            resumes = processes.on_main((path / CONFIG_FILE).is_file)
        sources = processes.together(partial(task.check, run, processes, accelerator.distributed_type))
        for first in (True, False):  # a download is for one process of each machine; the others find it then
            is_my_turn = accelerator.is_local_main_process is first
            processes.together(partial(task.fetch, run) if is_my_turn else lambda: None)
        if not resumes:
            processes.on_main(partial(task.create, path))
        with locked(path, processes):
            if resumes:
                processes.on_main(partial(recover_run, run))
            if resumes and config_text is not None:
                processes.on_main(partial(write_whole, path / CONFIG_FILE, config_text.encode()))
            if processes.is_main:
                distribution = accelerator.distributed_type.value
                environment = describe_environment(accelerator.device, processes.count, distribution)
                JsonLines(path / "environment.jsonl", partial(print, file=sys.stderr)).write(environment)
                if note := slow_dtype_note(accelerator.device, training.precision):
                    print(f"{note}: try --training.precision float32", file=sys.stderr)
            # cuDNN tries its algorithms once on the batches, which are alike in size, and takes the fastest.
            torch.backends.cudnn.benchmark = True
            try:
                return task.loop(run, accelerator, processes, sources, stop).run()
            except Exception:
                # A mistake that only the first step shows: what is mended begins anew, under the same name. Within the
                # lock, because whoever does not hold it would delete another process's run.
                is_new = not resumes and run.checkpoints.last() is None and not read_lines(run.metrics)
                if is_new and processes.is_main:
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
            with suppress(InputError, OSError), run_lock(path):  # else another process is at it, or the disk is full
                recover_run(run)
        return None
    return start_run(config, config_text, path, cpu, resumes=True)


def start_processes(wanted: int | None, cpu: bool = False) -> tuple[Accelerator, Processes]:
    """Join the process group that the launcher set up, and check that it is what was asked for.

    Precision is not Accelerate's business here: the loop casts the networks itself.

    Args:
        wanted: number of processes; None takes what there is.
        cpu: use no GPU.

    Returns:
        The process group as Accelerate has it; and its processes, for what they exchange besides gradients.

    Raises:
        InputError: the engine does not give what was asked for; says how to get it.
    """
    accelerator = Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    engine, count, device = accelerator.distributed_type, accelerator.num_processes, accelerator.device.type
    accumulated, told = accelerator.gradient_accumulation_steps, "Accelerate was told to"
    compiles = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    wants_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    has_fsdp2 = engine == DistributedType.FSDP and device != "cpu" and os.environ.get("FSDP_VERSION", "1") == "2"
    refusals = (
        (accumulated != 1, f"{told} accumulate over {accumulated} steps; set training.accumulation_steps instead"),
        (engine not in ENGINES, f"{told} use {engine.value}; this trainer runs on {', '.join(ENGINES)}"),
        (compiles, f"{told} compile; leave --dynamo_backend out, and set training.compile"),
        (wanted not in (None, count), f"training.processes is {wanted}, but the launcher started {count}"),
        (wants_fsdp and not has_fsdp2, f"{told} use FSDP, which here needs GPUs and --fsdp_version 2"),
    )
    for is_refused, message in refusals:
        if is_refused:
            raise InputError(message)
    if wants_fsdp:
        # On by default, and made for models whose every tensor is sharded: it trips over batch statistics.
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    return accelerator, Processes(accelerator.process_index, count, accelerator.device)


@contextmanager
def locked(path: Path, processes: Processes) -> Iterator[None]:
    """Keep others from writing into the folder of a run or of a recipe, as `run_lock` does, in the main process.

    Raises:
        InputError: another process has the lock.
    """
    with ExitStack() as stack:
        processes.on_main(lambda: stack.enter_context(run_lock(path)))
        yield
