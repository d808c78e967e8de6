"""Recipes: phases, configurations and settings laid over each other; what going on may change; the packaged ones."""

import json
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
from accelerate import init_empty_weights
from run_words import options, parse, parse_recipe

from dc_ssdae.cli.run_config import read_settings
from dc_ssdae.cli.train import read_new_recipe, run
from dc_ssdae.errors import InputError
from dc_ssdae.parameter_groups import parameter_groups, select_groups
from dc_ssdae.presets import list_presets, list_recipes
from dc_ssdae.training.build import build_model
from dc_ssdae.training.recipe import (
    Recipe,
    change_recipe,
    recipe_yaml,
    resolved_recipe,
)

RECIPE = """\
description: three of them
phases:
  low: {data: {image_size: 64}, training: {steps: 30, lr: 1.0e-3}}
  latent:
    data: {image_size: 128}
    training: {steps: 20, train: [decoder.latent_inputs]}
    losses: {kl: 1.0e-5}
  head: {starts_from: low, training: {train: [decoder.head]}, losses: {kl: 0}}
"""
WORDS = ("--recipe", "r.yaml", "--config", "demo")

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file into the current folder and give its name; r.yaml, the recipe, is there."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    write_file("r.yaml", RECIPE)
    return write_file


def make(*words: str) -> Recipe:
    return parse_recipe(*WORDS, *words)


def of(recipe: Recipe, setting: str) -> list[Any]:
    """A setting in each phase; its name as training.lr."""
    return [reduce(getitem, setting.split("."), phase.config.to_mapping()) for phase in recipe.phases]


def test_phases_lie_over_the_configuration_and_start_one_from_another(write: Write) -> None:
    recipe, name = read_new_recipe(options(*WORDS), "r.yaml")
    assert name == "demo-r"
    assert [phase.name for phase in recipe.phases] == ["low", "latent", "head"]
    assert [phase.starts_from for phase in recipe.phases] == [None, "low", "low"]
    assert of(recipe, "data.image_size") == [64, 128, 64]
    assert of(recipe, "training.steps") == [30, 20, 1000]
    assert of(recipe, "training.train") == [None, ["decoder.latent_inputs"], ["decoder.head"]]
    assert of(recipe, "losses.kl.weight") == [1e-6, 1e-5, 0.0]
    assert [recipe.folder(Path("run"), phase.name).name for phase in recipe.phases] == ["1-low", "2-latent", "3-head"]


def test_settings_of_all_phases_and_of_one(write: Write) -> None:
    """What is given to start from is for the first phase alone; a phase's own setting stays its own."""
    words = ["--phases.latent.training.steps", "5", "--training.steps=7", "--phases.head.losses.kl", "2"]
    recipe = make(*words, "--phases.latent.training.init_from", "other", "--training.init_from", "saved")
    assert of(recipe, "training.steps") == [7, 5, 7]
    assert of(recipe, "losses.kl.weight") == [1e-6, 1e-5, 2.0]
    assert of(recipe, "training.init_from") == ["saved", "other", None]
    assert [phase.starts_from for phase in recipe.phases] == [None, None, "low"]


def test_a_configuration_with_phases_lies_over_the_recipe(write: Write) -> None:
    write(
        "mine.yaml",
        "training: {lr: 5.0e-4, seed: 3}\n"
        "phases:\n  low: {training: {steps: 1}}\n  head: {starts_from: null}\n  last: {training: {train: [encoder]}}\n",
    )
    recipe, name = read_new_recipe(options(*WORDS, "--config", "mine.yaml"), "r.yaml")
    assert name == "mine-r"
    assert [phase.name for phase in recipe.phases] == ["low", "latent", "head", "last"]
    assert [phase.starts_from for phase in recipe.phases] == [None, "low", "latent", "head"]
    assert of(recipe, "training.steps") == [1, 20, 1000, 1000]
    assert of(recipe, "training.lr") == [1e-3, 5e-4, 5e-4, 5e-4]
    assert of(recipe, "training.seed") == [3, 4, 5, 6], "no phase sees the crops and noise of another"
    with pytest.raises(InputError, match="'phases'"):
        parse("--config", "demo", "--config", "mine.yaml")


@pytest.mark.parametrize(
    ("recipe", "words", "told"),
    [
        (RECIPE, "--phases.lo.training.steps 5", "did you mean 'low'?"),
        (RECIPE, "--phases.low.training.stpes 5", "did you mean 'steps'?"),
        (RECIPE, "--phases.low.model.latent_channels 8", "section of phases.low 'model'"),
        (RECIPE, "--phases.head.training.init_from x", "phases.head has both"),
        (RECIPE, "--phases.head.data.image_size 60", "phase head: data.image_size"),
        ("description: none", "", "phases is None"),
        ("phases: {low: {model: {latent_channels: 8}}, high: {}}", "", "sections model"),
        ("phases: {low: 3}", "", "phases.low is 3"),
        ("phases: {low: {training: true}}", "", "phases.low.training is True"),
        ("phases: {low: {training: {precision: []}}}", "", "phase low: training.precision"),
        ("phases: {lo-w: {}}", "", "'lo-w'"),
        ("phases: {low: {trainin: {}}}", "", "did you mean 'training'?"),
        ("phases: {low: {starts_from: low}}", "", "'low'"),
        (RECIPE, "--recipe tree_phase", "did you mean 'three_phase'?"),
    ],
)
def test_a_mistake_is_one_line(recipe: str, words: str, told: str, write: Write) -> None:
    write("r.yaml", recipe)
    with pytest.raises(InputError) as caught:
        make(*words.split())
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_printed_recipe_gives_the_same_phases_again(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--training.output=run", "--training.seed=5", "--phases.head.training.seed=50", "--data.root", "写真"]
    assert of(make(*words), "training.seed") == [5, 6, 50]
    with pytest.raises(SystemExit) as end:
        run(options(*WORDS, *words, "--print_config"))
    assert end.value.code == 0
    text = capsys.readouterr().out
    write("printed.yaml", text)
    again = parse_recipe("--recipe", "printed.yaml", "--training.output", "other", "--phases.low.training.steps", "3")
    assert of(again, "training.steps") == [3, 20, 1000]
    assert of(again, "training.output") == ["other"] * 3, "the folder is no part of a printed recipe"
    assert of(again, "data.root") == ["写真"] * 3


def change(*words: str, settled: tuple[str, ...] = ()) -> Recipe:
    nested = read_settings(options(*words).settings)
    return change_recipe(make("--training.output", "run"), nested, nested.pop("phases", {}), settled)


def test_settings_change_what_is_not_settled(write: Write) -> None:
    assert change() == make("--training.output", "run")
    changed = change("--training.steps", "9", "--phases.head.training.steps", "8", settled=("low",))
    assert of(changed, "training.steps") == [30, 9, 8]
    assert [phase.starts_from for phase in changed.phases] == [None, "low", "low"]
    assert of(change("--losses.kl", "0.5", settled=("low",)), "losses.kl.weight") == [1e-6, 0.5, 0.5]


@pytest.fixture
def begun(write: Write, tmp_path: Path) -> Path:
    """A recipe's folder whose first phase is finished, whose second has begun and whose third has not."""
    recipe, folder = make("--training.output", "run"), tmp_path / "run"
    for place, (phase, step) in enumerate(zip(recipe.phases[:2], (30, 5), strict=True)):
        checkpoint = folder / f"{place + 1}-{phase.name}" / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint.parent / "last").symlink_to(checkpoint.name)
        (checkpoint / "state.json").write_text(json.dumps({"format": 1, "step": step, "seconds": 1.0}))
        (checkpoint.parents[1] / "config.yaml").touch()
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe))
    return folder


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--phases.low.training.steps 40", "phase low is finished"),
        ("--phases.latent.training.lr 1", "2-latent"),
        ("--model.latent_channels 8", "model.latent_channels is"),
        ("--training.output other", "training.output is"),
        ("--losses.mine.class_path a.B", "losses.mine is "),
        ("--config demo", "--config"),
        ("--phases.lov.training.steps 40", "did you mean 'low'?"),
    ],
)
def test_a_begun_phase_stays_what_it_is(begun: Path, words: str, told: str) -> None:
    before = (begun / "recipe.yaml").read_bytes()
    with pytest.raises(InputError) as caught:
        run(options("--resume", str(begun), *words.split()))
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert (begun / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize("preset", [name for name in list_presets() if not name.startswith("rae_")])
@pytest.mark.parametrize("name", list_recipes())
def test_a_packaged_recipe_fits_every_preset_whose_encoder_can_train(name: str, preset: str) -> None:
    """Its sizes divide, its groups are there, and each phase but the first trains a part of the model."""
    phases = resolved_recipe(parse_recipe("--recipe", name, "--config", preset)).phases
    with init_empty_weights():
        groups = parameter_groups(build_model(phases[0].config.model))
    for phase in phases:
        assert phase.config.model == phases[0].config.model
        named = [group for group in phase.config.training.train or groups if not group.startswith("losses.")]
        chosen = select_groups(groups, named)
        assert 0 < len(chosen) < len(groups) or phase.starts_from is None
    if (name, preset) == ("three_phase", "dc_f32c32_eqm"):
        assert [phase.config.data.image_size for phase in phases] == [256, 512, 256]
        assert [phase.starts_from for phase in phases] == [None, *(phase.name for phase in phases[:2])]
        assert chosen == ["decoder.head"]
