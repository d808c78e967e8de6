"""Training in phases: what changes in each, what it starts from, what is refused beforehand, stopping and going on."""

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from killed import KILLED, run_in_child
from terms import HOOKED, Hooked, at, send
from tiny import differences, different, last, run_config
from torch import Tensor, nn

from dc_ssdae import DCSSDAE
from dc_ssdae.cli.run_config import config_yaml
from dc_ssdae.errors import InputError
from dc_ssdae.parameter_groups import parameter_groups, select_groups
from dc_ssdae.training import start as start_module
from dc_ssdae.training.build import build_model
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.loop import Outcome, TrainingFailed
from dc_ssdae.training.recipe import (
    Phase,
    Recipe,
    read_recipe,
    resolved_recipe,
    settled_phases,
    train_recipe,
)
from dc_ssdae.training.step import TrainingStep

WEIGHTS = "diffusion_pytorch_model.safetensors"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

LATENT = ["encoder.stages.-1", "encoder.latent_head", "decoder.latent_inputs"]
PHASES: dict[str, dict[str, Any]] = {
    "low": {},
    "latent": {"train": LATENT, "data": {"image_size": 64}, "batch_size": 3, "lr": 5e-4},
    "head": {"train": ["decoder.head"], "losses": {"kl": 0.0}},
}
"""The packaged recipe's, small."""


def recipe_of(root: Path, phases: Mapping[str, Mapping[str, Any]] = PHASES, **training: Any) -> Recipe:
    """Phases of the tiny model, each from the one before; `sources` names others."""
    made: list[Phase] = []
    for name, settings in phases.items():
        own = {**training, **settings}
        before = made[-1].name if made and own.get("init_from") is None else None
        starts_from = own.pop("starts_from", before)
        made.append(Phase(name, run_config(**{"root": root, **own}), starts_from))
    return Recipe(made)


def start(recipe: Recipe, path: Path) -> Outcome | None:
    return train_recipe(recipe, path, config_yaml, cpu=True)


def resume(recipe: Recipe, path: Path) -> Outcome | None:
    return train_recipe(recipe, path, config_yaml, resumes=True, cpu=True)


class Trained(NamedTuple):
    """A recipe that nothing disturbed, and how many steps there were in memory before each phase."""

    recipe: Recipe
    path: Path
    alive: list[int]

    def folder(self, name: str) -> Path:
        return self.recipe.folder(self.path, name)


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    recipe = resolved_recipe(recipe_of(images, optimizer="schedule_free_radam", steps=7, checkpoint_every=7))
    found = Trained(recipe, tmp_path_factory.mktemp("recipes") / "run", [])

    def spell(config: RunConfig) -> str:
        # Asked for just before a phase begins. By its type alone: isinstance asks objects that do not like it.
        found.alive.append(sum(type(thing) is TrainingStep for thing in gc.get_objects()))
        return config_yaml(config)

    gc.collect()  # what other tests have left
    assert train_recipe(recipe, found.path, spell, cpu=True) == Outcome(7, None)
    return found


# --- what a recipe does ---


@pytest.mark.parametrize("name", list(PHASES))
def test_a_phase_changes_its_groups_and_nothing_else(trained: Trained, name: str) -> None:
    after, source = last(trained.folder(name)).tensors, {"latent": "low", "head": "latent"}.get(name)
    torch.manual_seed(0)
    fresh = build_model(run_config().model).state_dict()
    before = fresh if source is None else last(trained.folder(source)).tensors["ema"]
    groups = parameter_groups(build_model(run_config().model))
    if (train := PHASES[name].get("train")) is not None:
        groups = {group: groups[group] for group in select_groups(groups, train)}
    allowed = {tensor for held in groups.values() for tensor in held}
    for weights in ({key.removeprefix("model."): tensor for key, tensor in after["model"].items()}, after["ema"]):
        changed = different(before, weights)
        assert changed <= allowed
        for group, held in groups.items():
            assert changed & set(held), f"{group} has not changed"
        moved = {f"decoder.latent_norm.{buffer}" for buffer in STATISTICS} & changed
        assert len(moved) == (3 if "decoder.latent_inputs" in groups else 0)
    held = {tensor.rpartition("/")[0].removeprefix("model.") for tensor in after["optimizer"]}
    assert held == allowed & {key for key, _ in build_model(run_config().model).named_parameters()}
    if name != "low":
        assert len(allowed) < len(before) / 2


def test_what_is_left_of_a_recipe(trained: Trained) -> None:
    path = trained.path
    assert {entry.name for entry in path.iterdir()} == {".lock", "1-low", "2-latent", "3-head", "model", "recipe.yaml"}
    assert read_recipe(path) == trained.recipe
    assert os.readlink(path / "model") == "3-head/model"
    for name in PHASES:
        assert DCSSDAE.from_pretrained(trained.folder(name) / "model").config["latents_mean"] is not None
        assert len((trained.folder(name) / "evaluations.jsonl").read_text().splitlines()) == 1
    assert len(trained.alive) == 3
    assert len(set(trained.alive)) == 1, "a phase keeps the one before in memory"


# --- mistakes, found before the first phase ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ["decodr"]}, "phase head: training.train: unknown parameter group"),
        ({"batch_size": 3, "processes": 2}, "training.processes is 2, but the launcher started 1"),
        ({"losses": {"mine": {"class_path": "terms.Hooked", "init_args": {"stop": 1}}}}, "phase head: losses.mine"),
        ({"root": None}, "phase head: either data.root or data.dataset"),
        ({"init_from": "nowhere/at/all", "starts_from": None}, "phase head: training.init_from nowhere/at/all: "),
    ],
)
def test_a_mistake_in_a_phase_is_found_before_the_first(
    photos: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    phases = {"low": {}, "latent": {"train": LATENT}, "head": settings}
    with pytest.raises(InputError) as caught:
        start(recipe_of(photos, phases), tmp_path / "run")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_that_a_first_step_shows_leaves_the_phases_before_it(photos: Path, tmp_path: Path) -> None:
    still = {"class_path": f"{__name__}.Still"}
    nothing = {"train": ["encoder"], "losses": {"dynamics": 0.0, "kl": 0.0, "still": still}}
    with pytest.raises(TrainingFailed, match="no loss term depends on anything that trains"):
        start(recipe_of(photos, {"one": {"steps": 2}, "two": nothing}), tmp_path / "run")
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {".lock", "1-one", "model", "recipe.yaml"}
    mended = recipe_of(photos, {"one": {"steps": 2}, "two": {"steps": 2, "train": ["encoder"]}})
    assert resume(mended, tmp_path / "run") == Outcome(2, None)


class Still(nn.Module):
    """A term that hangs on nothing that trains."""

    def forward(self, outputs: Any) -> Tensor:
        return outputs.record.x.mean()


# --- stopping and going on ---


STOPPED = {
    "one": {},
    "two": {"train": ["decoder", "losses.hooked"]},
    "three": {"train": ["decoder.head"], "losses": {**HOOKED, "kl": 0.0}},
}


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three phases of three steps with a term of its own parameters, that nothing disturbed."""
    path = tmp_path_factory.mktemp("recipes") / "whole"
    assert start(stopped_recipe(photos), path) == Outcome(3, None)
    return path


def stopped_recipe(photos: Path, **training: Any) -> Recipe:
    return recipe_of(photos, STOPPED, **{"losses": HOOKED, "steps": 3, "latent_statistics": 0, **training})


def assert_same_recipes(path: Path, whole: Path) -> None:
    for folder in ("1-one", "2-two", "3-three"):
        found, expected = last(path / folder), last(whole / folder)
        assert differences(found, expected) == set()
        assert {**found.state, "seconds": 0} == {**expected.state, "seconds": 0}
    assert os.readlink(path / "model") == "3-three/model"
    model = DCSSDAE.from_pretrained(path / "model")
    assert different(model.state_dict(), last(whole / "3-three").tensors["ema"]) == set()


interrupt = send(signal.SIGTERM)


def test_a_moved_recipe_goes_on(photos: Path, whole: Path, tmp_path: Path) -> None:
    """Where its second phase has no checkpoint yet, from what that starts from."""
    path = shutil.copytree(whole, tmp_path / "elsewhere" / "moved", symlinks=True)
    shutil.rmtree(path / "3-three")
    shutil.rmtree(path / "2-two" / "checkpoints")
    (path / "2-two" / "model" / WEIGHTS).unlink()
    (path / "model").unlink()
    assert resume(stopped_recipe(photos), path) == Outcome(3, None)
    assert_same_recipes(path, whole)


def test_phases_may_start_from_any_earlier_one_or_from_another_run(photos: Path, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    phases = {
        "first": {"init_from": str(whole / "2-two"), "train": ["decoder.head"]},
        "left": {"train": ["encoder"]},
        "right": {"train": ["decoder"], "starts_from": "first"},
        "other": {"init_from": str(whole), "starts_from": None, "train": ["decoder.head"]},
    }
    start(recipe_of(photos, phases, steps=1, latent_statistics=0), path)
    head = "decoder.up.3", "decoder.norm_out", "decoder.conv_out"
    for folder, source, part in (
        ("1-first", whole / "2-two", head),
        ("2-left", path / "1-first", "encoder"),
        ("3-right", path / "1-first", "decoder"),
        ("4-other", whole / "3-three", head),
    ):
        changed = different(last(path / folder).tensors["ema"], last(source).tensors["ema"])
        assert changed, folder
        assert all(name.startswith(part) for name in changed), folder


def test_stopped_by_signals_it_ends_as_if_nothing_had_happened(photos: Path, whole: Path, tmp_path: Path) -> None:
    recipe, path = stopped_recipe(photos), tmp_path / "run"
    with pytest.MonkeyPatch.context() as between:
        between.setattr("accelerate.utils.memory.clear_device_cache", lambda **_: interrupt())
        assert start(recipe, path) == Outcome(3, "SIGTERM")
    assert not (path / "2-two").exists()
    Hooked.hook = at({2: interrupt})  # in the last step of a phase
    assert resume(recipe, path) == Outcome(3, "SIGTERM")
    assert not (path / "3-three").exists()
    Hooked.hook = at({1: interrupt})  # in the middle of a phase
    assert resume(recipe, path) == Outcome(2, "SIGTERM")
    assert settled_phases(recipe, path) == ["one", "two"]
    assert os.readlink(path / "model") == "2-two/model"
    Hooked.hook = None
    assert resume(recipe, path) == Outcome(3, None)
    assert_same_recipes(path, whole)


KILLS = (
    (r"os\.mkdir .*/\.1-one\.partial", 0),  # nothing but the recipe
    (r"os\.rename .*/2-two/checkpoints/", 0),
    (r"os\.symlink 2-two/model", 0),  # finished, and nobody knows yet
    (r"os\.symlink 2-two/model", 1),
    (r"os\.rename .*/\.3-three\.partial", 1),  # a phase without a step
    (r"os\.symlink 3-three/model", 1),
)
"""Changes to files, and how many more there are before the end."""


@pytest.mark.parametrize("places", [(0, 2, 4), pytest.param((1, 3, 5), marks=pytest.mark.slow)])
def test_killed_at_a_change_to_a_file_it_ends_as_if_nothing_had_happened(
    places: tuple[int, ...], photos: Path, whole: Path, tmp_path: Path
) -> None:
    # In a process of its own: what has run a backward pass cannot be forked and run another.
    settings = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, __file__, str(photos), str(tmp_path), *map(str, places)]
    subprocess.run(words, check=True, env={**os.environ, **settings})
    recipe = stopped_recipe(photos)
    for number in places:
        path = tmp_path / str(number) / "run"
        if (path / "1-one" / "checkpoints" / "last").exists():
            DCSSDAE.from_pretrained(path / "model")
        assert resume(recipe, path) in (Outcome(3, None), None)
        assert_same_recipes(path, whole)


def test_the_last_phase_may_go_on_where_nobody_trains_and_the_others_may_not(
    photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, path = stopped_recipe(photos), tmp_path / "run"
    shutil.copytree(whole, path, symlinks=True)
    before = contents(path)
    assert resume(recipe, path) is None
    assert settled_phases(recipe, path) == ["one", "two"]
    longer = recipe.phases[-1].config.with_training(steps=5)
    more = Recipe([*recipe.phases[:-1], recipe.phases[-1]._replace(config=longer)])

    def lose(folder: Path) -> None:
        raise InputError(f"{folder} is being trained")

    with monkeypatch.context() as patch:
        patch.setattr(start_module, "run_lock", lose)
        with pytest.raises(InputError, match=f"{path} is being trained"):
            resume(more, path)
    assert contents(path) == before
    assert resume(more, path) == Outcome(5, None)
    assert read_recipe(path) == more


def contents(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != ".lock"}


if __name__ == "__main__":
    of_photos, into = map(Path, sys.argv[1:3])
    for place in map(int, sys.argv[3:]):
        since, later = KILLS[place]
        run = into / str(place) / "run"
        if run_in_child(partial(start, stopped_recipe(of_photos), run), later, since=since) != KILLED:
            sys.exit(f"it was not killed at {since}")
