"""Training in phases: what changes in each, what it starts from, what is refused beforehand, stopping and going on."""

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from killed import EVENTS, KILLED
from terms import HOOKED, Hooked, send
from tiny import last, run_config
from torch import Tensor, nn

from dc_ssdae import DCSSDAE
from dc_ssdae.cli.run_config import config_yaml
from dc_ssdae.errors import InputError
from dc_ssdae.parameter_groups import parameter_groups, select_groups
from dc_ssdae.training import start as start_module
from dc_ssdae.training.build import build_model
from dc_ssdae.training.recipe import (
    Phase,
    Recipe,
    finished_phases,
    read_recipe,
    resolved_recipe,
    settled_phases,
    train_recipe,
)
from dc_ssdae.training.step import TrainingStep
from dc_ssdae.training.trainer import Outcome, Trainer, TrainingFailed

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
    return train_recipe(recipe, path, config_yaml, [].append, cpu=True)


def resume(recipe: Recipe, path: Path) -> Outcome | None:
    return train_recipe(recipe, path, config_yaml, [].append, resumes=True, cpu=True)


def different(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that are not bit for bit the same; NaN and the sign of 0 count."""
    assert one.keys() == other.keys()

    def bits(tensor: Tensor) -> bytes:
        return tensor.contiguous().numpy().tobytes()

    return {name for name, tensor in one.items() if bits(tensor) != bits(other[name])}


def assert_same_checkpoints(one: Path, other: Path) -> None:
    first, second = last(one), last(other)
    for file in ("model", "ema", "optimizer"):
        assert different(first.tensors[file], second.tensors[file]) == set(), file
    assert {**first.state, "seconds": 0} == {**second.state, "seconds": 0}


class Begun(NamedTuple):
    """What a phase was before its first step: its weights, and how many steps there were in memory."""

    weights: dict[str, Tensor]
    steps_alive: int


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> dict[str, Begun]:
    return watch(monkeypatch)


def watch(monkeypatch: pytest.MonkeyPatch) -> dict[str, Begun]:
    """Keep what each phase that begins from now on is, by the name of its folder."""
    found: dict[str, Begun] = {}

    class Watched(Trainer):
        def run(self) -> Outcome:
            gc.collect()
            # By its type alone: isinstance asks objects that do not like it.
            found[self.run_folder.path.name] = Begun(
                {name: tensor.clone() for name, tensor in self.module.state_dict().items()},
                sum(type(thing) is TrainingStep for thing in gc.get_objects()),
            )
            return super().run()

    monkeypatch.setattr(start_module, "Trainer", Watched)
    return found


class Trained(NamedTuple):
    """A recipe that nothing disturbed."""

    recipe: Recipe
    path: Path
    begun: dict[str, Begun]

    def folder(self, name: str) -> Path:
        return self.recipe.folder(self.path, name)


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    recipe = resolved_recipe(recipe_of(images, optimizer="schedule_free_radam", steps=7, checkpoint_every=7))
    path = tmp_path_factory.mktemp("recipes") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        begun = watch(monkeypatch)
        assert start(recipe, path) == Outcome(7, None)
    return Trained(recipe, path, begun)


def groups_of(names: list[str] | None) -> dict[str, list[str]]:
    """The tiny model's groups that train."""
    groups = parameter_groups(build_model(run_config().model))
    return groups if names is None else {name: groups[name] for name in select_groups(groups, names)}


# --- what a recipe does ---


@pytest.mark.parametrize("name", list(PHASES))
def test_a_phase_changes_its_groups_and_nothing_else(trained: Trained, name: str) -> None:
    before = trained.begun[trained.folder(name).name].weights
    before = {key.removeprefix("model."): tensor for key, tensor in before.items()}
    after = last(trained.folder(name)).tensors
    groups = groups_of(PHASES[name].get("train"))
    allowed = {tensor for held in groups.values() for tensor in held}
    for weights in ({key.removeprefix("model."): t for key, t in after["model"].items()}, after["ema"]):
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
    model = DCSSDAE.from_pretrained(path / "model")
    assert different(last(path / "3-head").tensors["ema"], model.state_dict()) == set()
    for name in PHASES:
        assert last(trained.folder(name)).state["step"] == 7
        assert DCSSDAE.from_pretrained(trained.folder(name) / "model").config["latents_mean"] is not None
        assert len((trained.folder(name) / "evaluations.jsonl").read_text().splitlines()) == 1
    counts = [trained.begun[trained.folder(name).name].steps_alive for name in PHASES]
    assert len(set(counts)) == 1, "a phase keeps the one before it in memory"


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
    nothing = {
        "train": ["encoder"],
        "losses": {"dynamics": 0.0, "kl": 0.0, "still": {"class_path": f"{__name__}.Still"}},
    }
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


def at_call(number: int, work: Callable[[], object]) -> Callable[[int, Tensor], Tensor]:
    """A hook that does something once, at a call counted over all phases."""
    seen = 0

    def hook(call: int, value: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if seen == number + 1:
            work()
        return value

    return hook


interrupt = send(signal.SIGTERM)


def test_a_finished_recipe_is_left_as_it_is(photos: Path, whole: Path) -> None:
    def contents() -> dict[Path, bytes]:
        files = (path for path in whole.rglob("*") if path.is_file() and path.name != ".lock")
        return {path: path.read_bytes() for path in files}

    before = contents()
    assert resume(stopped_recipe(photos), whole) is None
    assert contents() == before


def test_a_moved_recipe_goes_on(photos: Path, whole: Path, tmp_path: Path) -> None:
    """Where its second phase has no checkpoint yet, from what that starts from."""
    path = tmp_path / "elsewhere" / "moved"
    shutil.copytree(whole, path, symlinks=True)
    shutil.rmtree(path / "3-three")
    shutil.rmtree(path / "2-two" / "checkpoints")
    (path / "2-two" / "model" / WEIGHTS).unlink()
    (path / "model").unlink()
    assert resume(stopped_recipe(photos), path) == Outcome(3, None)
    assert_same_checkpoints(path / "2-two", whole / "2-two")
    assert_same_checkpoints(path / "3-three", whole / "3-three")
    assert os.readlink(path / "model") == "3-three/model"


def test_phases_may_start_from_any_earlier_one_or_from_another_run(
    photos: Path, whole: Path, tmp_path: Path, begun: dict[str, Begun]
) -> None:
    phases = {
        "first": {"init_from": str(whole / "2-two")},
        "left": {"train": ["encoder"]},
        "right": {"train": ["decoder"], "starts_from": "first"},
        "other": {"init_from": str(whole), "starts_from": None},
    }
    start(recipe_of(photos, phases, steps=1, latent_statistics=0), tmp_path / "run")
    for folder, source in (
        ("1-first", whole / "2-two"),
        ("2-left", tmp_path / "run" / "1-first"),
        ("3-right", tmp_path / "run" / "1-first"),
        ("4-other", whole / "3-three"),
    ):
        average = {f"model.{key}": tensor for key, tensor in last(source).tensors["ema"].items()}
        assert different(begun[folder].weights, average) == set(), folder
    # Each changes its own half, from one and the same start.
    left, right, first = (last(tmp_path / "run" / name).tensors["ema"] for name in ("2-left", "3-right", "1-first"))
    assert {name.partition(".")[0] for name in different(left, first)} == {"encoder"}
    assert {name.partition(".")[0] for name in different(right, first)} == {"decoder"}


def test_stopped_by_a_signal_it_ends_as_if_nothing_had_happened(photos: Path, whole: Path, tmp_path: Path) -> None:
    recipe, path = stopped_recipe(photos), tmp_path / "run"
    Hooked.hook = at_call(7, interrupt)
    assert start(recipe, path) == Outcome(2, "SIGTERM")
    assert finished_phases(recipe, path) == ["one", "two"]
    assert os.readlink(path / "model") == "2-two/model", "the best there is"
    assert resume(recipe, path) == Outcome(3, None)
    for folder in ("1-one", "2-two", "3-three"):
        assert_same_checkpoints(path / folder, whole / folder)
    assert os.readlink(path / "model") == "3-three/model"


def test_a_signal_between_two_phases_ends_it(photos: Path, whole: Path, tmp_path: Path) -> None:
    recipe, path = stopped_recipe(photos), tmp_path / "run"
    with pytest.MonkeyPatch.context() as between:
        between.setattr("accelerate.utils.memory.clear_device_cache", lambda **_: interrupt())
        assert start(recipe, path) == Outcome(3, "SIGTERM")
    assert not (path / "2-two").exists()
    assert resume(recipe, path) == Outcome(3, None)
    assert_same_checkpoints(path / "3-three", whole / "3-three")


def killed_at(work: Callable[[], object], change: str, after: int) -> bool:
    """Do some work in a forked process that ends at a change to a file, or some changes after it; says whether so."""
    child = os.fork()
    if child == 0:
        left: int | None = None

        def hook(event: str, given: tuple[Any, ...]) -> None:
            nonlocal left
            if event not in EVENTS:
                return
            if left is None and re.match(change, f"{event} {given[0]}"):
                left = after + 1
            left = None if left is None else left - 1
            if left == 0:
                os._exit(KILLED)

        try:
            sys.addaudithook(hook)
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


KILLS = (
    (r"os\.mkdir .*/\.1-one\..*\.partial", 0),  # nothing but the recipe
    (r"os\.rename .*/2-two/checkpoints/", 0),
    (r"os\.symlink 2-two/model", 0),  # finished, and nobody knows yet
    (r"os\.symlink 2-two/model", 1),
    (r"os\.rename .*/\.3-three\..*\.partial", 1),  # a phase without a step
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
    recipe, names = stopped_recipe(photos), list(STOPPED)
    for number in places:
        path = tmp_path / str(number) / "run"
        if (path / "1-one" / "checkpoints" / "last").exists():
            DCSSDAE.from_pretrained(path / "model")
        finished = finished_phases(recipe, path)
        assert finished == names[: len(finished)]
        assert resume(recipe, path) == (None if finished == names else Outcome(3, None))
        for folder in ("1-one", "2-two", "3-three"):
            assert_same_checkpoints(path / folder, whole / folder)
        assert os.readlink(path / "model") == "3-three/model"
        model = DCSSDAE.from_pretrained(path / "model")
        assert different(model.state_dict(), last(whole / "3-three").tensors["ema"]) == set()


def test_a_recipe_that_is_being_trained_is_left_alone(
    photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole, path, symlinks=True)
    shutil.rmtree(path / "3-three")
    before = (path / "recipe.yaml").read_bytes()
    recipe = stopped_recipe(photos, steps=5)

    def lose(folder: Path) -> None:
        raise InputError(f"{folder} is being trained")

    monkeypatch.setattr(start_module, "run_lock", lose)
    with pytest.raises(InputError, match=f"{path} is being trained"):
        resume(recipe, path)
    assert (path / "recipe.yaml").read_bytes() == before
    assert not (path / "3-three").exists()


def test_a_signal_in_the_last_step_of_a_phase_keeps_the_next_from_beginning(photos: Path, tmp_path: Path) -> None:
    Hooked.hook = at_call(2, interrupt)
    assert start(stopped_recipe(photos), tmp_path / "run") == Outcome(3, "SIGTERM")
    assert not (tmp_path / "run" / "2-two").exists()


def test_the_last_phase_may_go_on_and_the_others_may_not(photos: Path, whole: Path, tmp_path: Path) -> None:
    recipe = stopped_recipe(photos)
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    names = [phase.name for phase in recipe.phases]
    assert settled_phases(recipe, tmp_path / "run") == names[:-1]
    longer = recipe.phases[-1].config.with_training(steps=5)
    more = Recipe([*recipe.phases[:-1], recipe.phases[-1]._replace(config=longer)])
    assert resume(more, tmp_path / "run") == Outcome(5, None)
    assert read_recipe(tmp_path / "run") == more


if __name__ == "__main__":
    of_photos, into = map(Path, sys.argv[1:3])
    for place in map(int, sys.argv[3:]):
        at, later = KILLS[place]
        run = into / str(place) / "run"
        if not killed_at(partial(start, stopped_recipe(of_photos), run), at, later):
            sys.exit(f"it was not killed at {at}")
