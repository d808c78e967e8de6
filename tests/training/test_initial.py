"""What a run starts from: the average of another, and what its loss terms have learnt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import run_config
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
    publish_model(run, run.checkpoints.save(Checkpoint(tensors, {"step": 4})) / "ema.safetensors")
    return step


def of_term(step: TrainingStep, name: str) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in step.objective.terms[name].state_dict().items()}


def names_of(step: TrainingStep, name: str) -> set[str]:
    return {f"objective.terms.{name}.{key}" for key in step.objective.terms[name].state_dict()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def assert_is_average(step: TrainingStep, source: TrainingStep) -> None:
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(step.model.state_dict()[name], tensor + 1), name


def test_the_model_is_the_average_and_the_terms_are_the_last_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved_run(tmp_path / "run", terms(one=3, two=4))
    step = step_of(2, terms(one=3, two=4))
    assert not same(of_term(step, "one"), of_term(source, "one"))
    loaded = load_initial_weights(step, str(tmp_path / "run"))
    assert_is_average(step, source)
    for name in ("one", "two"):
        assert same(of_term(step, name), of_term(source, name))
        assert float(of_term(step, name)["seen"][0]) == 5.0
    assert loaded == names_of(step, "one") | names_of(step, "two")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("other", ["two", "three"])
def test_a_term_of_another_form_starts_anew_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    source = saved_run(tmp_path / "run", terms(one=3, two=4))
    step = step_of(2, terms(one=3, **{other: 5}))
    before = of_term(step, other)
    assert load_initial_weights(step, str(tmp_path / "run")) == names_of(step, "one")
    assert same(of_term(step, other), before)
    assert same(of_term(step, "one"), of_term(source, "one"))
    assert_is_average(step, source)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"losses.{other} starts anew: {tmp_path / 'run'} does not fit; ")
    # The model's folder alone has no terms.
    assert load_initial_weights(step, str(tmp_path / "run" / "model")) == set()
    assert same(of_term(step, other), before)


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    step = step_of(2)
    DCSSDAE.from_preset("demo").save_pretrained(tmp_path / "other")
    create_run(tmp_path / "begun", "", step.model.to_json_string())
    for name, message in (
        ("nowhere", "nowhere"),
        ("other", "training.init_from .* has shape"),
        ("begun", "no such file"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_initial_weights(step, str(tmp_path / name))
        assert len(str(caught.value).splitlines()) == 1


def test_a_frozen_term_that_nothing_has_trained_is_refused(tmp_path: Path) -> None:
    train = ["decoder", "losses.two"]
    for name, losses in (("some", terms(two=3)), ("all", terms(one=3, two=3))):
        saved_run(tmp_path / name, losses)
    some, every = (
        run_config(losses=terms(one=3, two=3), train=train, init_from=str(tmp_path / name)) for name in ("some", "all")
    )
    with pytest.raises(InputError) as caught:
        load_step(some, RunFolder(tmp_path / "new"), None)
    assert str(caught.value).startswith("losses.one has parameters of its own, which are new and would not train")
    load_step(every, RunFolder(tmp_path / "new"), None)


def test_what_a_frozen_term_has_learnt_stands_still_and_reaches_the_model() -> None:
    step = step_of(1, terms(one=3), train=["decoder"])
    term = step.objective.terms["one"]
    step.train()
    assert not term.training
    assert not any(parameter.requires_grad for parameter in term.parameters())
    outputs = type("Outputs", (), {"prediction": torch.ones(2, 3, 4, 4, requires_grad=True)})()
    term(outputs).sum().backward()
    assert outputs.prediction.grad is not None
