"""The settings of a run: what is refused, in which words, and that nothing else than a refusal comes of nonsense."""

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dc_ssdae.errors import InputError
from dc_ssdae.presets import dump_yaml, list_presets, load_preset, read_yaml
from dc_ssdae.training.config import (
    BUILT_IN_LOSSES,
    DataConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)

OWN_LOSS = {"class_path": "my_project.Edges", "init_args": {"scales": [1, 2], "sharpness": 1e-6}, "weight": 0.1}
SECTIONS: Mapping[str, type] = {"model": ModelConfig, "data": DataConfig, "training": TrainingConfig}


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


def refusal(mapping: Any) -> str:
    """The message with which a mapping is refused."""
    with pytest.raises(InputError) as error:
        RunConfig.from_mapping(mapping)
    return str(error.value)


def check_round_trip(config: RunConfig) -> None:
    """Plain data and YAML of a configuration give it back."""
    plain = config.to_mapping()
    assert RunConfig.from_mapping(plain) == config
    assert RunConfig.from_mapping(read_yaml(dump_yaml(plain))) == config


def check_refusal(error: InputError) -> None:
    """A message is one line that can be read."""
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert 10 <= len(message) <= 400, message


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


def test_a_configuration_is_made_plain() -> None:
    """What only resembles plain data is copied and converted, so that a saved configuration equals its run's."""
    mapping = valid()
    mapping["model"]["encoder"]["init_args"]["widths"] = (16, 32, 64, 64)
    mapping["model"]["dynamics"] = {"class_path": None, "init_args": None}
    mapping["training"] |= {"lr": 1, "precision": "fp16"}
    config = RunConfig.from_mapping(mapping)
    assert config.model.encoder == {
        "init_args": {"widths": [16, 32, 64, 64], "depths": [0, 1, 1, 1], "block_shortcut": True}
    }
    assert config.model.dynamics is None
    assert isinstance(config.training.lr, float)
    assert config.training.precision == "float16"
    assert config.training.betas == (0.9, 0.99)
    check_round_trip(config)
    mapping["model"]["encoder"]["init_args"]["depths"].append(5)
    assert config.model.encoder["init_args"]["depths"] == [0, 1, 1, 1]


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
    with pytest.raises(InputError, match=r"losses.kl.weight is -1.0; it must be at least 0"):
        RunConfig(config.model, losses={"kl": LossConfig(-1.0)})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.steps", 1000.0, "training.steps is 1000.0; it must be a whole number or null; write 1000"),
        ("training.steps", "1e3", "training.steps is '1e3'; it must be a whole number or null"),
        ("training.steps", True, "training.steps is true; it must be a whole number or null"),
        ("training.steps", 0, "training.steps is 0; it must be at least 1"),
        ("training.steps", 10**400, "training.steps is a number of more than 64 bits; it must be smaller"),
        ("training.steps", None, "training.steps and training.minutes are both null; one of them must end the run"),
        ("training.lr", None, "training.lr is null; it must be a number"),
        ("training.lr", [1e-4], "training.lr is [0.0001]; it must be a number"),
        ("training.lr", "1e-4", "training.lr is '1e-4'; it must be a number"),
        ("training.lr", 10**400, "training.lr is a number of more than 64 bits; it must be a finite number"),
        ("training.lr", float("nan"), "training.lr is nan; it must be a finite number"),
        ("training.minutes", float("inf"), "training.minutes is inf; it must be a finite number"),
        ("training.lr", 0, "training.lr is 0.0; it must be above 0"),
        ("training.ema_decay", 1, "training.ema_decay is 1.0; it must be at least 0 and below 1"),
        ("training.seed", 2**32, "training.seed is 4294967296; it must be at least 0 and at most 4294967295"),
        ("training.betas", 0.9, "training.betas is 0.9; it must be two numbers, such as [0.9, 0.999]"),
        ("training.betas", [0.9], "training.betas is [0.9]; it must be two numbers, such as [0.9, 0.999]"),
        ("training.betas", [0.9, 2], "training.betas is [0.9, 2.0]; both must be from 0 to below 1"),
        ("training.optimizer", "adam", "unknown training.optimizer 'adam' (did you mean 'adamw'?); accepted: adamw, "),
        ("training.optimizer", False, "training.optimizer is false; it must be one of schedule_free_radam, adamw"),
        ("training.precision", "bf61", "unknown training.precision 'bf61' (did you mean 'bf16'?); accepted: bf16, "),
        ("training.precision", 16, "training.precision is 16; it must be one of float32, bfloat16, float16"),
        ("training.output", False, "training.output is false; it must be text or null; put it in quotes"),
        ("training.output", " ", "training.output is empty; give it a name, or leave it out"),
        ("training.output", "a\0b", "training.output is 'a\\x00b'; it must be text without a NUL character"),
        ("training.best_metric", "psrn", "unknown training.best_metric 'psrn' (did you mean 'psnr'?); accepted: mse, "),
        ("training.best_metric", "psnr:up", "unknown direction of training.best_metric psnr 'up'; accepted: max, min"),
        ("training.keep_every", 300, "training.keep_every is 300; it must be a multiple of training.checkpoint_every"),
        ("training.accumulation_steps", 3, "training.batch_size is 8; it must be a multiple of training.accumulation"),
        ("training.lrr", 1, "unknown setting of training 'lrr' (did you mean 'lr'?); accepted: accumulation_steps, "),
        ("training", 5, "section training is 5; it must be a mapping of settings"),
        ("trainin", {}, "unknown section of the configuration 'trainin' (did you mean 'training'?); accepted: data, "),
        ("data.rot", "x", "unknown setting of data 'rot' (did you mean 'root'?); accepted: aug_scale, "),
        ("data.root", "x", "data.root and data.dataset are both given; one of them names the images, set one to null"),
        ("data.flip", "no", "data.flip is 'no'; it must be true or false"),
        ("data.workers", "auto", "data.workers is 'auto'; it must be a whole number or null"),
        ("data.image_size", 60, "data.image_size is 60; it must be a multiple of model.downsample_factor, 8"),
        ("data.image_size", 10**6, "data.image_size is 1000000; it must be at least 8 and at most 65536"),
        (
            "data.validation",
            5,
            "data.validation is 5; it must be text, a mapping with class_path and init_args or null",
        ),
        ("data.validation", {}, "data.validation has no class_path; name the class as module.Class"),
        ("data.dataset.class_path", "a b", "data.dataset.class_path is 'a b'; it must be a class name, your own as "),
        ("data.dataset.init_args", [1], "data.dataset.init_args is [1]; it must be a mapping from the settings' names"),
        ("data.dataset.init_args.x", float("inf"), "data.dataset.init_args.x is inf; it must be a finite number"),
        ("data.dataset.init_args.x", {1.5: 2}, "data.dataset.init_args.x has the key 1.5; keys must be text"),
        ("data.dataset.init_args.x", [{1}], "data.dataset.init_args.x[0] is {1}; it must be null, true or false, a nu"),
        ("model", None, "the configuration has no section model; start from a preset with --config PRESET"),
        ("model.latent_channels", None, "model.latent_channels is not given; start from a preset, or set it"),
        ("model.latent_channels", 2**40, "model.latent_channels is 1099511627776; it must be at least 1 and at most "),
        ("model.downsample_factor", 12, "model.downsample_factor is 12; it must be a power of two from 8 on"),
        ("model.downsample_factor", 4, "model.downsample_factor is 4; it must be a power of two from 8 on"),
        ("model.downsample_factor", -8, "model.downsample_factor is -8; it must be a power of two from 8 on"),
        ("model.encoder", "KLEncoder", "model.encoder is 'KLEncoder'; it must be a mapping with class_path and init_"),
        ("model.encoder.norm", "none", "unknown key of model.encoder 'norm'; accepted: class_path, init_args"),
        ("losses", 5, "section losses is 5; it must be a mapping from names to weights"),
        ("losses", dict.fromkeys(BUILT_IN_LOSSES, 0), "losses: every weight is 0, there is nothing to train"),
        ("losses.kl", None, "losses.kl is null; it must be a weight, or a mapping with weight, class_path, init_args"),
        ("losses.kl", True, "losses.kl is true; it must be a weight, or a mapping with weight, class_path, init_args"),
        ("losses.kl", -1, "losses.kl.weight is -1.0; it must be at least 0"),
        ("losses.edges.wieght", 1, "unknown setting of losses.edges 'wieght' (did you mean 'weight'?); accepted: "),
        ("losses.kll", 1, "unknown loss term 'kll' (did you mean 'kl'?); accepted: dynamics, kl, lpips, repa, or "),
        ("losses.a-b", 1, "a loss term is called 'a-b'; use letters, digits and underscores"),
    ],
)
def test_a_mistake_names_the_setting_the_value_and_what_is_right(path: str, value: Any, message: str) -> None:
    assert refusal(changed(path, value)).startswith(message)


def test_a_mapping_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert "nested more than 40 deep" in refusal(changed("model.encoder.init_args.x", loop))
    assert refusal(changed("training.lr", loop)).endswith("it must be a number")


@pytest.mark.parametrize("given", [None, [], "demo", 5])
def test_only_a_mapping_is_a_configuration(given: Any) -> None:
    assert refusal(given).startswith("a configuration is a mapping of sections, not ")


def test_settings_are_checked_in_python_too() -> None:
    config = RunConfig.from_mapping(valid())
    assert config.with_training(steps=5).training.steps == 5
    with pytest.raises(InputError, match=r"training.steps is -5; it must be at least 1"):
        config.with_training(steps=-5)
    with pytest.raises(InputError, match=r"data.image_size is 4; it must be at least 8"):
        DataConfig(image_size=4)


def test_the_learning_rate_of_adamw_rises_and_falls() -> None:
    training = TrainingConfig(optimizer="adamw", lr=2.0, warmup=0.25)
    rates = [training.learning_rate(progress) for progress in (0.0, 0.125, 0.25, 0.625, 1.0)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0], abs=1e-12)
    assert {TrainingConfig(lr=2.0).learning_rate(progress) for progress in (0.0, 0.5, 1.0)} == {2.0}


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, 2**63, -1, 0, 1, 8, 64])
    | st.floats()
    | st.text(max_size=20)
    | st.text(min_size=300, max_size=500)
    | st.binary(max_size=5)
    | st.sampled_from([object(), int, ("a",), {1, 2}, "no", "null", "a\nb", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.integers() | st.none(), inner, max_size=3)
        | st.dictionaries(st.sampled_from(["class_path", "init_args", "weight"]), inner, max_size=3)
    ),
    max_leaves=6,
)
names = (
    st.sampled_from([entry.name for kind in SECTIONS.values() for entry in fields(kind)])
    | st.sampled_from(["losses", "kl", "edges", "class_path", "init_args", "weight", *SECTIONS])
    | st.text(max_size=12)
    | st.text(min_size=500, max_size=600)
    | st.integers()
    | st.none()
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """`valid()` after one to three mutations: a value replaced, removed, renamed or added at any depth."""
    mapping: Any = valid()
    for _ in range(draw(st.integers(1, 3))):
        inner = mapping
        while True:
            inside = [key for key, value in inner.items() if isinstance(value, dict) and value]
            if not inside or draw(st.integers(0, 5)) == 5:
                break
            inner = inner[draw(st.sampled_from(inside))]
        key = draw(st.sampled_from(list(inner))) if inner else "x"
        action = draw(st.sampled_from(["replace", "remove", "rename", "add"]))
        if action == "replace":
            inner[key] = draw(junk)
        elif action == "add":
            inner[draw(names)] = draw(junk)
        elif key in inner:
            value = inner.pop(key)
            if action == "rename":
                inner[draw(names)] = value
    return mapping


@settings(max_examples=300, derandomize=True, deadline=None)
@given(mapping=mutated())
def test_mutations_are_accepted_or_refused_in_one_line(mapping: Any) -> None:
    try:
        config = RunConfig.from_mapping(mapping)
    except InputError as error:
        check_refusal(error)
    else:
        check_round_trip(config)
