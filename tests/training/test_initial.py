"""What a run starts from: the average of another, and what its loss terms have learnt."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import different, run_config
from torch import Tensor, nn

from dc_ssdae import DCSSDAE
from dc_ssdae.errors import InputError
from dc_ssdae.training.build import build_step, load_initial_weights, load_step
from dc_ssdae.training.checkpoint import Checkpoint
from dc_ssdae.training.run import RunFolder, create_run, publish_model
from dc_ssdae.training.step import TrainingStep


class Head(nn.Module):
    """A term with parameters, in width channels, and a buffer."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.mix = nn.Linear(3, width)
        self.register_buffer("seen", torch.zeros(width))

    def forward(self, outputs: Any) -> Tensor:
        return self.mix(outputs.prediction.flatten(2).mean(dim=2)).square().mean(dim=1)


def terms(**widths: int) -> dict[str, Any]:
    return {
        name: {"class_path": f"{__name__}.Head", "init_args": {"width": width}, "weight": 0.1}
        for name, width in widths.items()
    }


def step_of(seed: int, losses: dict[str, Any] | None = None, **training: Any) -> TrainingStep:
    torch.manual_seed(seed)
    return build_step(run_config(losses=losses, **training))


def saved_run(path: Path, losses: dict[str, Any] | None = None) -> TrainingStep:
    """Write a run whose average is no other than its weights plus 1; gives what the weights are of."""
    step = step_of(1, losses)
    for term in step.objective.terms.values():
        for buffer in term.buffers():
            buffer.fill_(5.0)
    create_run(path, "", step.model.to_json_string())
    run = RunFolder(path)
    average = {name: tensor + 1 for name, tensor in step.model.state_dict().items()}
    tensors = {"model": step.state_dict(), "ema": average, "optimizer": {}}
    publish_model(run, run.checkpoints.save(Checkpoint(tensors, {"step": 4})), {"step": 4})
    return step


def of_term(step: TrainingStep, name: str) -> dict[str, Tensor]:
    prefix = f"objective.terms.{name}."
    return {key: tensor.clone() for key, tensor in step.state_dict().items() if key.startswith(prefix)}


@pytest.mark.parametrize("other", ["two", "three"])
def test_a_term_of_another_form_starts_anew_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    source = saved_run(tmp_path / "run", terms(one=3, two=4))
    step = step_of(2, terms(one=3, **{other: 5}))
    before = of_term(step, other)
    assert load_initial_weights(step, str(tmp_path / "run")) == of_term(step, "one").keys()
    assert different(of_term(step, other), before) == set()
    assert different(of_term(step, "one"), of_term(source, "one")) == set()
    average = {name: tensor + 1 for name, tensor in source.model.state_dict().items()}
    assert different(step.model.state_dict(), average) == set()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"losses.{other} starts anew: {tmp_path / 'run'} does not fit; ")
    # The model's folder alone has no terms.
    assert load_initial_weights(step, str(tmp_path / "run" / "model")) == set()


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    step = step_of(2)
    DCSSDAE.from_preset("demo").save_pretrained(tmp_path / "other")
    create_run(tmp_path / "begun", "", step.model.to_json_string())
    told = {"nowhere": "nowhere", "other": "training.init_from .* has shape", "begun": "no such file"}
    for name, message in told.items():
        with pytest.raises(InputError, match=message) as caught:
            load_initial_weights(step, str(tmp_path / name))
        assert len(str(caught.value).splitlines()) == 1


def test_a_frozen_term_that_nothing_has_trained_is_refused(tmp_path: Path) -> None:
    train = ["decoder", "losses.two"]
    saved_run(tmp_path / "some", terms(two=3))
    saved_run(tmp_path / "all", terms(one=3, two=3))
    for name in ("all", "some"):
        config = run_config(losses=terms(one=3, two=3), train=train, init_from=str(tmp_path / name))
        with nullcontext() if name == "all" else pytest.raises(InputError, match=r"^losses\.one has parameters"):
            load_step(config, RunFolder(tmp_path / "new"), None)


def test_what_a_frozen_term_has_learnt_stands_still_and_reaches_the_model() -> None:
    step = step_of(1, terms(one=3), train=["decoder"])
    term = step.objective.terms["one"]
    step.train()
    assert not term.training
    assert not any(parameter.requires_grad for parameter in term.parameters())
    outputs = SimpleNamespace(prediction=torch.ones(2, 3, 4, 4, requires_grad=True))
    term(outputs).sum().backward()
    assert outputs.prediction.grad is not None
