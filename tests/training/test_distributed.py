"""Two processes compute what one does, sharded or not, fail together, and are refused where they became one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate import init_empty_weights
from accelerate.state import AcceleratorState
from tiny import batch, differences, run_config
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from two_processes import PROCESSES, TwoProcesses

from dc_ssdae.distributed import PATIENCE, Processes, sum_over_processes
from dc_ssdae.errors import InputError
from dc_ssdae.presets import list_presets, load_preset
from dc_ssdae.training.build import build_model, build_step, check_components, place_step
from dc_ssdae.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.ema import ExponentialMovingAverage
from dc_ssdae.training.optimizer import (
    build_optimizer,
    evaluated_weights,
    load_optimizer_state,
    optimizer_state,
)
from dc_ssdae.training.start import start_processes
from dc_ssdae.training.step import TrainingStep
from dc_ssdae.training.tensors import like, whole

REPOSITORY = Path(__file__).resolve().parents[2]
BEFORE, STEPS = 8, 11
"""Steps before the checkpoint, and all; RAdam moves the weights from the sixth on."""

OPTIMIZERS: tuple[str, ...] = ("adamw", "schedule_free_radam")


def training_step(sharded: bool = False) -> TrainingStep:
    """The same weights in every process, placed as a run does; a KL term so strong that no gradient is rounding."""
    torch.manual_seed(0)
    config = run_config(losses={"kl": 0.01})
    step = build_step(config)
    place_step(step, config, torch.device("cpu"), sharded)
    return step


def share(tensors: tuple[Tensor, ...], rank: int, processes: int) -> tuple[Tensor, ...]:
    size = tensors[0].shape[0] // processes
    return tuple(tensor[rank * size : (rank + 1) * size] for tensor in tensors)


# --- what one run does, whatever it is wrapped in ---


class Run:
    """The trainer's own steps around a module: optimiser, average, state."""

    def __init__(self, name: str, module: TrainingStep, checkpoint: Checkpoint | None = None) -> None:
        self.module = module
        self.optimizer = build_optimizer(module, run_config(optimizer=name, lr=0.01, betas=[0.9, 0.9]).training)
        for group in self.optimizer.param_groups:
            group["eps"] = 1e-3  # else Adam makes whole steps of a gradient's rounding errors
        self.average = ExponentialMovingAverage(module.model, 0.8)
        self._evaluated = evaluated_weights(self.optimizer, module.model)
        if checkpoint is not None:
            for name_, tensor in module.state_dict().items():
                tensor.copy_(like(checkpoint.tensors["model"][name_], tensor))
            self.average.load_state_dict(checkpoint.tensors["ema"])
            load_optimizer_state(self.optimizer, module, checkpoint.tensors["optimizer"], checkpoint.state["groups"])

    def train(self, steps: range, rank: int = 0, processes: int = 1) -> None:
        for step in steps:
            self.module(*share(batch(step), rank, processes)).total.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update(self.module.model, step + 1, self._evaluated)

    def reconstructed(self) -> Tensor:
        """By the averaged weights; leaves no trace."""
        self.module.eval()
        with self.average.applied_to(self.module.model):
            images = self.module.reconstruct(batch(99)[0])
        self.module.train()
        return images

    def checkpoint(self, step: int) -> Checkpoint:
        optimizer, groups = optimizer_state(self.optimizer, self.module)
        files = {"model": self.module.state_dict(), "ema": self.average.state_dict(), "optimizer": optimizer}
        tensors = {file: whole(group) for file, group in files.items()}
        return Checkpoint(tensors, {"step": step, "groups": json.loads(json.dumps(groups))})


def shard(module: TrainingStep, reshard: bool) -> TrainingStep:
    """By FSDP2: the decoder on its own, the rest at the root."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    fully_shard(module.model.decoder, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    register_fsdp_forward_method(module, "reconstruct")
    return module


def plain_runs(folder: Path) -> None:
    """In one process: train, write a checkpoint, go on."""
    for name in OPTIMIZERS:
        run = Run(name, training_step())
        run.train(range(BEFORE))
        write_checkpoint(folder / f"plain-{name}", run.checkpoint(BEFORE))
        torch.save(run.reconstructed(), folder / f"plain-{name}-images")
        run.train(range(BEFORE, STEPS))
        write_checkpoint(folder / f"plain-{name}-end", run.checkpoint(STEPS))


# --- what each of two processes does ---


def gradients(rank: int, processes: int) -> dict[str, Tensor]:
    """Two steps' gradients of the mean loss, and the statistics that they leave."""
    module = training_step()
    wrapped: Any = DistributedDataParallel(module) if processes > 1 else module
    record = {}
    for step in range(2):
        module.zero_grad()
        losses = wrapped(*share(batch(step), rank, processes))
        losses.total.backward()
        record |= {f"{step} {name}": parameter.grad.clone() for name, parameter in module.named_parameters()}
        record |= {f"{step} {name}": buffer.clone() for name, buffer in module.named_buffers()}
        record[f"{step} losses"] = sum_over_processes(losses.total.detach()) / processes
    return record


def failures(processes: Processes, rank: int) -> dict[str, Any]:
    def fail(error: Exception, ranks: tuple[int, ...] = (0, 1)) -> str:
        if rank in ranks:
            raise error
        return "fine"

    def raised(work: Callable[[], object]) -> str:
        with pytest.raises(InputError) as caught:
            work()
        return str(caught.value)

    return {
        "result": processes.on_main(lambda: f"from {rank}"),
        "full disk": raised(lambda: processes.on_main(lambda: fail(OSError(28, "No space\nleft")))),
        "other fails": raised(lambda: processes.together(lambda: fail(InputError("of 1"), (1,)))),
        "both fail": raised(lambda: processes.together(lambda: fail(OSError(2, f"of {rank}")))),
        "and it still works": sum_over_processes(torch.tensor([1.0 + rank])).tolist(),
        "too many wanted": raised(lambda: start_processes(3, cpu=True)),
    }


def sharded_runs(folder: Path, rank: int) -> dict[str, Any]:
    record: dict[str, Any] = {}

    def keep(run: Run, step: int, name: str) -> None:
        checkpoint = run.checkpoint(step)
        if rank == 0:
            write_checkpoint(folder / name, checkpoint)

    for name in OPTIMIZERS:
        # What fully_shard leaves unsharded after a forward pass must not be taken for the weights.
        run = Run(name, shard(training_step(sharded=True), reshard=name == "adamw"))
        assert isinstance(next(run.module.model.decoder.parameters()), DTensor)
        run.train(range(BEFORE), rank, PROCESSES)
        record[f"{name} images"] = run.reconstructed()
        keep(run, BEFORE, f"sharded-{name}")
        run.train(range(BEFORE, STEPS), rank, PROCESSES)
        keep(run, STEPS, f"sharded-{name}-end")

        run = Run(name, shard(training_step(sharded=True), reshard=True), read_checkpoint(folder / f"plain-{name}"))
        keep(run, BEFORE, f"loaded-{name}")
        run.train(range(BEFORE, STEPS), rank, PROCESSES)
        keep(run, STEPS, f"loaded-{name}-end")
    return record


def work(rank: int, folder: str) -> None:
    _, processes = start_processes(PROCESSES, cpu=True)
    record: dict[str, Any] = {
        "failures": failures(processes, rank),
        "gradients": gradients(rank, PROCESSES),
        "sharded": sharded_runs(Path(folder), rank),
    }
    torch.save(record, f"{folder}/record{rank}")


@pytest.fixture(scope="module")
def folder(made_once: Any, two_processes: TwoProcesses) -> Path:
    """Everything that two processes have done, and what they did it with."""

    def run(folder: Path) -> None:
        plain_runs(folder)
        two_processes(work, str(folder))

    return made_once("distributed", run)


@pytest.fixture(scope="module")
def records(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"record{rank}", weights_only=True) for rank in range(PROCESSES)]


def assert_close(found: Checkpoint, expected: Checkpoint) -> None:
    for file, tensors in expected.tensors.items():
        torch.testing.assert_close(found.tensors[file], dict(tensors), atol=1e-5, rtol=1e-5)
    assert {"format": 1, **found.state} == {"format": 1, **expected.state}


# --- the tests ---


def test_gradients_and_statistics_are_those_of_the_global_batch(records: list[dict[str, Any]]) -> None:
    expected = gradients(0, 1)
    for record in records:
        torch.testing.assert_close(record["gradients"], expected, atol=1e-5, rtol=0.0)


def test_a_failure_anywhere_is_everyones(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert record["failures"] == {
            "result": "from 0",
            "full disk": "[Errno 28] No space left",
            "other fails": "of 1",
            "both fail": "[Errno 2] of 0",
            "and it still works": [3.0],
            "too many wanted": "training.processes is 3, but the launcher started 2",
        }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_and_plain_processes_do_the_same_and_go_on_from_each_other(
    folder: Path, records: list[dict[str, Any]], name: str
) -> None:
    sharded, plain, loaded = (read_checkpoint(folder / f"{kind}-{name}") for kind in ("sharded", "plain", "loaded"))
    assert_close(sharded, plain)
    assert differences(loaded, plain) == set()
    images = torch.load(folder / f"plain-{name}-images", weights_only=True)
    for record in records:
        torch.testing.assert_close(record["sharded"][f"{name} images"], images, atol=1e-4, rtol=1e-4)

    run = Run(name, training_step(), sharded)
    assert differences(run.checkpoint(BEFORE), sharded) == set()
    run.train(range(BEFORE, STEPS))
    ends = {kind: read_checkpoint(folder / f"{kind}-{name}-end") for kind in ("sharded", "plain", "loaded")}
    assert_close(run.checkpoint(STEPS), ends["sharded"])
    assert_close(ends["sharded"], ends["plain"])
    assert_close(ends["loaded"], ends["plain"])


def test_the_example_of_sharding_wraps_classes_of_every_preset() -> None:
    settings = yaml.safe_load((REPOSITORY / "examples" / "fsdp2.yaml").read_text())["fsdp_config"]
    wrapped = set(settings["fsdp_transformer_layer_cls_to_wrap"].split(","))
    for preset in list_presets():
        with init_empty_weights():
            model = build_model(RunConfig.from_mapping(load_preset(preset)).model)
        assert wrapped <= {type(module).__name__ for module in model.modules()}, preset


# --- refusals ---


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "told to use FSDP"),
        # It would divide every gradient.
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, r"over 4 steps; .*set training\.accumulation_steps"),
    ],
)
def test_what_a_launcher_does_otherwise_is_refused(variables: dict[str, str], message: str) -> None:
    with patch.dict(os.environ, variables), pytest.raises(InputError, match=message):
        start_processes(None, cpu=True)


def test_processes_wait_for_each_other_for_days() -> None:
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for begin in (lambda: start_processes(2, cpu=True), lambda: Processes.join(torch.device("cpu"))):
        with (
            patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true", **group}),
            patch.object(dist, "init_process_group", side_effect=InterruptedError) as asked,
            pytest.raises(InterruptedError),
        ):
            begin()
        assert asked.call_args.kwargs["timeout"] == PATIENCE
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_batch_must_divide_evenly() -> None:
    config = run_config(batch_size=12, accumulation_steps=2)
    check_components(config, processes=3)
    with pytest.raises(InputError, match=r"batch_size is 12; .* multiple of 8$"):
        check_components(config, processes=4)
