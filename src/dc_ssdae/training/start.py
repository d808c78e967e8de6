"""Starting a run and going on with one: everything is checked, and the folder is there, before the trainer begins."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

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
from dc_ssdae.training.build import check_components, fetch_backbones
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.logging import JsonLines, read_lines
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
from dc_ssdae.training.stopping import StopRequest
from dc_ssdae.training.trainer import Outcome, Trainer

ENGINES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
"""What the checkpoints and the batch norm over processes are made for."""


@contextmanager
def new_run(config: RunConfig, config_text: str, path: Path, cpu: bool = False) -> Iterator[Trainer]:
    """Begin a run in a new folder; the block trains.

    Args:
        config: of the run.
        config_text: the same as YAML, which is kept in the folder.
        path: of the run's folder.
        cpu: use no GPU.

    Raises:
        InputError: the configuration, the data, the processes or the folder do not fit.
    """
    run = RunFolder(path, config.training.keep_every)
    with StopRequest() as stop, lenient_stderr(), naming(path):
        accelerator, processes = start_processes(config.training.processes, cpu)
        model, sources = _check(config, accelerator, processes, starts=True)
        teacher = None if config.distillation is None else model_folder(config.distillation.teacher)
        source = teacher if config.training.init_from is None else model_folder(config.training.init_from)
        model_config = _model_config(config, model, source)
        processes.on_main(partial(create_run, path, config_text, model_config, teacher))
        with locked(path, processes):
            try:
                yield _trainer(config, run, accelerator, processes, sources, stop)
            except Exception:
                # A mistake that only the first step shows: what is mended begins anew, under the same name. Within the
                # lock, because whoever does not hold it would delete another process's run.
                if processes.is_main and run.checkpoints.last() is None and not read_lines(run.metrics):
                    shutil.rmtree(path, ignore_errors=True)
                raise


def start_run(config: RunConfig, config_text: str, path: Path, cpu: bool = False) -> Outcome:
    """Begin a run as `new_run` does, and train.

    Raises:
        InputError: as `new_run`.
        TrainingFailed: as `Trainer.run`.
    """
    with new_run(config, config_text, path, cpu) as trainer:
        return trainer.run()


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
        InputError: as `new_run`; or the checkpoint is damaged.
        TrainingFailed: as `Trainer.run`.
    """
    run = RunFolder(path, config.training.keep_every)
    if is_finished(run, config.training):
        if os.environ.get("RANK", "0") == "0":
            with suppress(InputError, OSError), run_lock(path):  # else another process is at it, or the disk is full
                recover_run(run)
        return None
    with StopRequest() as stop, lenient_stderr(), naming(path):
        accelerator, processes = start_processes(config.training.processes, cpu)
        teacher = run.teacher if run.teacher.is_dir() else None
        _, sources = _check(config, accelerator, processes, run.checkpoints.last() is None, teacher)
        with locked(path, processes):
            processes.on_main(partial(recover_run, run))
            if config_text is not None:
                processes.on_main(partial(write_whole, path / CONFIG_FILE, config_text.encode()))
            return _trainer(config, run, accelerator, processes, sources, stop).run()


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
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(
        mixed_precision="no", cpu=cpu, step_scheduler_with_optimizer=False, kwargs_handlers=[patience]
    )
    engine, count = accelerator.distributed_type, accelerator.num_processes
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            f"Accelerate was told to accumulate gradients over {accelerator.gradient_accumulation_steps} steps; "
            "leave that out, and set training.accumulation_steps"
        )
    if engine not in ENGINES:
        accepted = ", ".join(accepted.value for accepted in ENGINES)
        raise InputError(f"Accelerate was told to use {engine.value}; this trainer runs on {accepted}")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise InputError("Accelerate was told to compile; leave --dynamo_backend out, and set training.compile")
    if wanted not in (None, count):
        raise InputError(f"training.processes is {wanted}, but the launcher started {count}")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        right = DistributedType.FSDP, "2"
        if accelerator.device.type == "cpu" or (engine, os.environ.get("FSDP_VERSION", "1")) != right:
            raise InputError(
                f"FSDP was asked for, but Accelerate runs {engine.value} on {accelerator.device.type}; "
                "this trainer shards on GPUs alone, started by accelerate launch --use_fsdp --fsdp_version 2"
            )
        # On by default, and made for models whose every tensor is sharded: it trips over batch statistics.
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    # For several processes on the CPU the launcher sets these, starts one process, and says nothing.
    launched_several = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") and (
        "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and "KMP_BLOCKTIME" in os.environ
    )
    if count == 1 and launched_several:
        raise InputError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu; "
            "use: ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m dc_ssdae train …"
        )
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


def _check(
    config: RunConfig, accelerator: Accelerator, processes: Processes, starts: bool, teacher: Path | None = None
) -> tuple[DCSSDAE, ImageSources]:
    """Find what does not fit in a run's configuration; gives the model, without weights, and the images."""

    def check() -> tuple[DCSSDAE, ImageSources]:
        data, is_sharded = config.data, accelerator.distributed_type == DistributedType.FSDP
        model = check_components(config, starts, teacher, processes.count, is_sharded)
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
    if processes.is_main:
        environment = describe_environment(device, processes.count, accelerator.distributed_type.value)
        JsonLines(run.path / "environment.jsonl", partial(print, file=sys.stderr)).write(environment)
        if note := slow_dtype_note(device, config.training.precision):
            print(f"{note}: try --training.precision float32", file=sys.stderr)
        if sources.validation is None and config.data.root is not None:
            missing = f"{config.data.root} has no validation/"
            print(f"{missing}: nothing is evaluated, no checkpoint is the best", file=sys.stderr)
    # cuDNN tries its algorithms once on the batches, which are alike in size, and takes the fastest.
    torch.backends.cudnn.benchmark = True
    return Trainer(config, run, accelerator, processes, sources, stop)


def _model_config(config: RunConfig, model: DCSSDAE, source: Path | None) -> str:
    """The model's config.json; its latent is normalised as the latent of the model whose encoder the run keeps."""
    settings = json.loads(model.to_json_string())
    if source is not None and config.training.keeps_latent:
        given = read_config(source)
        settings |= {name: given[name] for name in NOT_MEASURED if name in given}
    settings["provenance"] = inherited(config, source)
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"
