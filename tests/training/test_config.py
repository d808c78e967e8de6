"""The settings of a run: what is refused, and that nothing else than a refusal comes of nonsense."""

import copy
from functools import reduce
from operator import getitem
from typing import Any

import pytest

from dc_ssdae.errors import InputError
from dc_ssdae.presets import dump_yaml, load_preset, read_yaml
from dc_ssdae.training.config import BUILT_IN_LOSSES, RunConfig, TrainingConfig

OWN_LOSS = {"class_path": "my_project.Edges", "init_args": {"scales": [1, 2], "sharpness": 1e-6}, "weight": 0.1}


def valid() -> dict[str, Any]:
    """The demo with every kind of setting: components, an own loss, a validation set, null, a pair."""
    preset = load_preset("demo")
    preset["training"] |= {"betas": [0.9, 0.99], "keep_every": 400, "output": "runs/x"}
    preset["data"] |= {
        "dataset": {"class_path": "Shards", "init_args": {"pattern": "a-{0..9}.tar"}},
        "validation": "photos",
        "workers": None,
    }
    return {**preset, "losses": {"kl": 1e-5, "edges": copy.deepcopy(OWN_LOSS)}}


def changed(path: str, value: Any) -> dict[str, Any]:
    """`valid()` with one setting replaced; path as training.lr."""
    mapping = valid()
    *parts, last = path.split(".")
    reduce(getitem, parts, mapping)[last] = value
    return mapping


def refusal(mapping: Any) -> InputError:
    with pytest.raises(InputError) as error:
        RunConfig.from_mapping(mapping)
    assert len(str(error.value).splitlines()) == 1
    return error.value


def test_the_defaults_are_the_papers() -> None:
    config = RunConfig.from_mapping({"model": {"latent_channels": 32, "downsample_factor": 32}})
    training = config.training
    assert (training.batch_size, training.precision, training.optimizer) == (192, "bfloat16", "schedule_free_radam")
    assert (training.lr, training.weight_decay, training.gradient_clip) == (3e-4, 1e-3, 0.1)
    assert (training.ema_decay, training.ema_start) == (0.999, 50_000)
    assert {name: loss.weight for name, loss in config.losses.items()} == dict(BUILT_IN_LOSSES)


def test_what_only_resembles_a_type_becomes_it() -> None:
    mapping = valid()
    mapping["model"]["dynamics"] = {"class_path": None, "init_args": None}
    mapping["training"] |= {"lr": 1, "precision": "fp16"}
    config = RunConfig.from_mapping(mapping)
    assert config.model.dynamics is None
    assert (config.losses["kl"].weight, config.losses["lpips"].weight) == (1e-5, 0.5)
    assert isinstance(config.training.lr, float)
    assert (config.training.precision, config.training.betas) == ("float16", (0.9, 0.99))
    assert RunConfig.from_mapping(read_yaml(dump_yaml(config.to_mapping()))) == config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.steps", None),  # neither steps nor minutes
        ("training.lr", float("nan")),
        ("training.betas", [0.9, 2]),
        ("training.best_metric", "psnr:up"),
        ("training.keep_every", 300),  # no multiple of checkpoint_every
        ("training.lrr", 1),
        ("data.root", "x"),  # beside data.dataset
        ("data.image_size", 60),  # no multiple of f
        ("model.downsample_factor", 12),
        ("model.encoder", "KLEncoder"),
        ("losses", dict.fromkeys(BUILT_IN_LOSSES, 0)),
        ("losses.edges.wieght", 1),
        ("losses.kll", 1),
    ],
)
def test_a_mistake_names_the_setting(path: str, value: Any) -> None:
    assert refusal(changed(path, value)).field == path


def test_mistakes_that_stand_elsewhere_than_they_are_named() -> None:
    assert refusal(changed("training.accumulation_steps", 3)).field == "training.batch_size"
    assert refusal(changed("losses.kl", -1)).field == "losses.kl.weight"
    assert refusal(changed("losses.a-b", 1)).field == "losses"
    assert "did you mean 'adamw'?" in str(refusal(changed("training.optimizer", "adam")))


def test_the_learning_rate_of_adamw_rises_and_falls() -> None:
    training = TrainingConfig(optimizer="adamw", lr=2.0, warmup=0.25)
    rates = [training.learning_rate(progress) for progress in (0.0, 0.125, 0.25, 0.625, 1.0)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0], abs=1e-12)
    assert {TrainingConfig(lr=2.0).learning_rate(progress) for progress in (0.0, 0.5, 1.0)} == {2.0}
