"""Processes that work together: how long they wait for each other, and how they fail."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState

from dc_ssdae.distributed import Processes
from dc_ssdae.errors import InputError, ToldElsewhere


class Begun(Exception):
    """The group would now be made."""


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_processes_wait_for_days(monkeypatch: pytest.MonkeyPatch, device: str, backend: str) -> None:
    given: dict[str, Any] = {}

    def begin(**options: Any) -> None:
        given.update(options)
        raise Begun

    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.distributed, "init_process_group", begin)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    if device == "cuda":
        multi_gpu = ("nccl", DistributedType.MULTI_GPU)
        monkeypatch.setattr(PartialState, "_prepare_backend", lambda *_: multi_gpu)
    with pytest.raises(Begun):
        Processes.join(torch.device(device))
    assert (given["backend"], given["timeout"]) == (backend, timedelta(days=7))


def test_alone_an_error_stays_what_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        Processes().together(lambda: 1 / 0)
    assert issubclass(ToldElsewhere, InputError)
    assert Processes().together(lambda: 3) == 3
