"""The settings of a run: what is refused, and that nothing else than a refusal comes of nonsense."""

import copy
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dc_ssdae.errors import InputError
from dc_ssdae.presets import dump_yaml, list_presets, load_preset, read_yaml
from dc_ssdae.training.config import (
    BUILT_IN_LOSSES,
    SECTIONS,
    LossConfig,
    RunConfig,
    TrainingConfig,
)

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
    inner: Any = mapping
    for part in parts:
        if not isinstance(inner.get(part), dict):
            inner[part] = {}
        inner = inner[part]
    inner[last] = value
    return mapping


def refusal(mapping: Any) -> InputError:
    with pytest.raises(InputError) as error:
        RunConfig.from_mapping(mapping)
    assert len(str(error.value).splitlines()) == 1
    return error.value


def check_round_trip(config: RunConfig) -> None:
    """Plain data and YAML of a configuration give it back."""
    plain = config.to_mapping()
    assert RunConfig.from_mapping(plain) == config
    assert RunConfig.from_mapping(read_yaml(dump_yaml(plain))) == config


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_is_a_configuration(name: str) -> None:
    check_round_trip(RunConfig.from_mapping(load_preset(name)))


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
    assert isinstance(config.training.lr, float)
    assert (config.training.precision, config.training.betas) == ("float16", (0.9, 0.99))
    check_round_trip(config)


def test_losses_are_weights_or_mappings() -> None:
    config = RunConfig.from_mapping(valid())
    assert config.losses == {
        "dynamics": LossConfig(1.0),
        "lpips": LossConfig(0.5),
        "repa": LossConfig(0.25),
        "kl": LossConfig(1e-5),
        "edges": LossConfig(0.1, OWN_LOSS["class_path"], OWN_LOSS["init_args"]),
    }
    assert RunConfig(config.model, losses={"kl": LossConfig(0.5)}).losses["kl"].weight == 0.5


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.steps", 1000.0),
        ("training.steps", True),
        ("training.steps", 0),
        ("training.steps", None),  # neither steps nor minutes
        ("training.lr", None),
        ("training.lr", "1e-4"),
        ("training.lr", 10**400),
        ("training.lr", float("nan")),
        ("training.minutes", float("inf")),
        ("training.lr", 0),
        ("training.ema_decay", 1),
        ("training.seed", 2**32),
        ("training.betas", [0.9]),
        ("training.betas", [0.9, 2]),
        ("training.optimizer", "adam"),
        ("training.precision", 16),
        ("training.output", False),
        ("training.output", " "),
        ("training.train", []),
        ("training.train", "decoder"),
        ("training.best_metric", "psrn"),
        ("training.best_metric", "psnr:up"),
        ("training.keep_every", 300),  # no multiple of checkpoint_every
        ("training.lrr", 1),
        ("training", 5),
        ("trainin", {}),
        ("data.root", "x"),  # beside data.dataset
        ("data.flip", "no"),
        ("data.image_size", 60),  # no multiple of f
        ("data.image_size", 10**6),
        ("data.validation", 5),
        ("data.dataset.init_args", [1]),
        ("model", None),
        ("model.latent_channels", None),
        ("model.downsample_factor", 12),
        ("model.downsample_factor", -8),
        ("model.encoder", "KLEncoder"),
        ("model.encoder.norm", "none"),
        ("losses", 5),
        ("losses", dict.fromkeys(BUILT_IN_LOSSES, 0)),
        ("losses.kl", None),
        ("losses.kl", True),
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


def test_settings_are_checked_in_python_too() -> None:
    config = RunConfig.from_mapping(valid())
    assert config.with_training(steps=5).training.steps == 5
    with pytest.raises(InputError, match=r"training.steps is -5; it must be at least 1"):
        config.with_training(steps=-5)


def test_the_learning_rate_of_adamw_rises_and_falls() -> None:
    training = TrainingConfig(optimizer="adamw", lr=2.0, warmup=0.25)
    rates = [training.learning_rate(progress) for progress in (0.0, 0.125, 0.25, 0.625, 1.0)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0], abs=1e-12)
    assert {TrainingConfig(lr=2.0).learning_rate(progress) for progress in (0.0, 0.5, 1.0)} == {2.0}


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([2**70, "no"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from(["class_path", "init_args", "weight"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
names = (
    st.sampled_from([entry.name for kind in SECTIONS.values() for entry in fields(kind)])
    | st.sampled_from(["losses", "kl", "edges", "class_path", "init_args", "weight", *SECTIONS])
    | st.text(max_size=12)
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """`valid()` after one to three mutations: a value replaced, removed, renamed or added at any depth."""
    mapping: Any = valid()
    for _ in range(draw(st.integers(1, 3))):
        inner = mapping
        while inside := [key for key, value in inner.items() if isinstance(value, dict) and value]:
            if draw(st.integers(0, 5)) == 5:
                break
            inner = inner[draw(st.sampled_from(inside))]
        key = draw(st.sampled_from([*inner, "x"]))
        kept = inner.pop(key, None)
        if draw(st.booleans()):
            inner[draw(names | st.just(key))] = draw(junk | st.just(kept))
    return mapping


@settings(max_examples=200, derandomize=True, deadline=None)
@given(mapping=mutated())
def test_mutations_are_accepted_or_refused_in_one_line(mapping: Any) -> None:
    message = ""
    try:
        config = RunConfig.from_mapping(mapping)
        assert RunConfig.from_mapping(config.to_mapping()) == config
    except InputError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
