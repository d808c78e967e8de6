"""Every step of training, evaluation and decoding on a pretended GPU: no tensor elsewhere, no wait but those named.

Fake tensors have a shape, a dtype and a device, and no values. An operation on tensors of two devices fails as it would
on a GPU; where the host asks for a value, a recorder notes who did, and makes one up. Autograd's engine alone is left
out: it wants the device's streams.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from tiny import MODEL, SIZE, batch, run_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dc_ssdae
from dc_ssdae import DCSSDAE
from dc_ssdae.data.loader import Batch
from dc_ssdae.distributed import Processes
from dc_ssdae.training import loop as loop_module
from dc_ssdae.training import trainer as trainer_module
from dc_ssdae.training.run import RunFolder
from dc_ssdae.training.stopping import StopRequest
from dc_ssdae.training.trainer import Trainer

PACKAGE = str(Path(dc_ssdae.__file__).parent)
CUDA = torch.device("cuda:0")
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Notes which function of the package made the host wait for the device."""

    def __init__(self, answers: dict[str, bool] | None = None) -> None:
        super().__init__()
        self.by: list[str] = []
        self.answers = answers or {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_device = any(isinstance(leaf, Tensor) and leaf.device.type == "cuda" for leaf in tree_leaves((args, kwargs)))
        if func is aten._local_scalar_dense.default:
            name = self.note() if on_device else ""
            return self.value(args[0], name)
        if func is aten.nonzero.default:
            self.note()
            return torch.zeros(1, args[0].ndim, dtype=torch.int64, device=args[0].device)
        result = func(*args, **(kwargs or {}))
        target = args[0] if func is aten.copy_.default else result
        if on_device and isinstance(target, Tensor) and target.device.type == "cpu":
            self.note()
        return result

    def value(self, tensor: Tensor, name: str) -> float | bool | int:
        if tensor.dtype == torch.bool:
            return self.answers.get(name, True)
        return 1.0 if tensor.is_floating_point() else 1

    def note(self) -> str:
        """The innermost function of the package; waits of one function after another count once."""
        frame: Any = sys._getframe(2)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        name = "the test" if frame is None else frame.f_code.co_name
        if self.by[-1:] != [name]:
            self.by.append(name)
        return name


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(nn.Module, "_apply", apply)
    monkeypatch.setattr(torch.autograd, "grad", lambda total, x, **_: (total * torch.empty_like(x),))
    with FakeTensorMode():
        yield


def apply(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """As PyTorch's, which swaps a fake tensor's contents, and cannot where something else refers to it."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = function(buffer)
    return module


def fake_trainer(monkeypatch: pytest.MonkeyPatch, folder: Path, config: Any) -> Trainer:
    """The trainer itself, on a device that is not there."""
    accelerator: Any = SimpleNamespace(
        device=CUDA,
        distributed_type=DistributedType.NO,
        prepare=lambda *parts: parts,
        unwrap_model=lambda module: module,
        backward=lambda loss: backward(trainer.module, loss),
    )
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
    # There is no generator of a device that is not there.
    monkeypatch.setattr(trainer_module, "draw_noise", lambda *_: [*(tensor.to(CUDA) for tensor in batch(0)[1:]), None])
    sources: Any = SimpleNamespace(train=range(16), validation=None)
    trainer = Trainer(config, RunFolder(folder), accelerator, Processes(device=CUDA), sources, StopRequest())
    return trainer


def backward(module: nn.Module, loss: Tensor) -> None:
    """Gradients where PyTorch would put them; its engine has no queue for a device that is not there."""
    assert loss.requires_grad
    assert loss.device == CUDA
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter)


FM = {"dynamics": {"class_path": "FlowMatching"}}
IMAGE = {"dynamics": {"class_path": "EquilibriumMatching", "init_args": {"prediction": "image"}}}
ENERGY = {"dynamics": {"class_path": "EquilibriumMatching", "init_args": {"explicit_energy": "dot"}}}


@pytest.mark.parametrize(
    ("model", "training"),
    [
        ({}, {"precision": "bfloat16", "gradient_clip": 1.0}),
        (FM, {"optimizer": "schedule_free_radam"}),
        (ENERGY, {"precision": "bfloat16"}),
    ],
)
def test_a_training_step_waits_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: dict[str, Any], training: dict[str, Any]
) -> None:
    trainer = fake_trainer(monkeypatch, tmp_path, run_config(model=model, **training))
    loggers: Any = SimpleNamespace(step=lambda *_: None, say=lambda *_: None, broken=lambda *_: None)
    pixels = torch.empty(4, 3, SIZE, SIZE, dtype=torch.uint8)
    images = Batch(pixels=pixels, draw=SimpleNamespace(tolist=lambda: [0, 1, 2, 3]), broken=[])
    trainer._batches = itertools.repeat(images)
    trainer._upcoming = trainer._fetch()
    for finite in (True, True, False):  # the third is thrown away
        with monkeypatch.context() as patch, Waits() as waits:
            patch.setattr(loop_module, "math", SimpleNamespace(inf=math.inf, isfinite=lambda _, it=finite: it))
            trainer._train_step(loggers)
        assert waits.by == ["_exchange"]
    assert (trainer.step, trainer.skipped_steps) == (3, 1)
    trainer.module.eval()
    with Waits() as waits, trainer.ema.applied_to(trainer.module.model):
        output = trainer.module.reconstruct(pixels.to(CUDA))
        posterior = trainer.module.posterior(pixels.to(CUDA))
    assert output.device == posterior.mean.device == CUDA
    assert waits.by == ["_check_range"]


@pytest.mark.parametrize(
    ("model", "side", "settings", "waits"),
    [
        ({}, 12, {}, []),  # in tiles
        (ENERGY, 4, {"sampler": "gradient_descent", "return_trajectory": True}, []),
        (FM, 4, {"sampler": "midpoint"}, []),
        (IMAGE, 4, {"sampler": "nesterov", "tolerance": 0.1}, ["nesterov", "decode"]),
    ],
)
def test_decoding_waits_where_a_sampler_needs_an_answer(
    model: dict[str, Any], side: int, settings: dict[str, Any], waits: list[str]
) -> None:
    autoencoder = DCSSDAE(**{**MODEL, **model}).eval().to(CUDA)
    autoencoder.enable_tiling(64, 0.25)
    with torch.no_grad(), Waits({"nesterov": False, "decode": False}) as found:
        output = autoencoder.decode(torch.empty(2, 4, side, side, device=CUDA), **settings)
    assert output.sample.shape == (2, 3, 8 * side, 8 * side)
    assert {value.device for value in output.values()} == {CUDA}
    assert found.by == waits
