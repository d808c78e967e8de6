"""The processes of a run: that the launcher started what was asked for, and that they work together."""

import os

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, InitProcessGroupKwargs

from dc_ssdae.distributed import PATIENCE, Processes
from dc_ssdae.errors import InputError

ENGINES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
"""What the checkpoints and the batch norm over processes are made for."""


def start_processes(wanted: int | None, cpu: bool = False) -> Accelerator:
    """Join the process group that the launcher set up, and check that it is what was asked for.

    Precision is not Accelerate's business here: the loop casts the networks itself.

    Args:
        wanted: number of processes; None takes what there is.
        cpu: use no GPU.

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
    return accelerator


def check_batch(batch_size: int, accumulation_steps: int, processes: int) -> None:
    """Refuse a global batch that does not divide evenly.

    Raises:
        InputError: says what it must be a multiple of.
    """
    parts = processes * accumulation_steps
    if batch_size % parts:
        raise InputError(
            f"training.batch_size is {batch_size}; with {processes} processes and training.accumulation_steps "
            f"{accumulation_steps} it must be a multiple of {parts}"
        )


def processes_of(accelerator: Accelerator) -> Processes:
    """The processes of a run, for what they exchange besides gradients."""
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator.device)
