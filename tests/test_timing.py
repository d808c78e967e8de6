"""Medians with their spread, and the description of the machine."""

import torch

from dc_ssdae.timing import Spread, describe_machine

CPU = torch.device("cpu")


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_machine_is_described() -> None:
    machine = describe_machine(CPU)
    assert machine["cpu"]
    assert machine["threads"] == torch.get_num_threads()
    assert (machine["device"], machine["device_name"], machine["cuda"]) == ("cpu", None, None)
    assert "device" not in describe_machine()
