"""A recipe from the command line: phases, configurations and flags laid over each other; what going on may change."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dc_ssdae.cli.run_config import parse_run_config
from dc_ssdae.cli.run_recipe import asks_for_recipe, lay_over_recipe, parse_recipe, recipe_yaml
from dc_ssdae.cli.train import build_parser
from dc_ssdae.errors import InputError
from dc_ssdae.presets import dump_yaml
from dc_ssdae.training.recipe import Recipe, read_recipe, recipe_mapping

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


WORDS = ("--recipe", "r.yaml", "--config", "demo")


def parse(*words: str) -> Recipe:
    return parse_recipe([*WORDS, *words]).recipe


def one_line(error: InputError) -> str:
    message = str(error)
    assert len(message.splitlines()) == 1
    assert len(message) <= 400
    return message


def refusal(*words: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_recipe(words)
    return one_line(caught.value)


def of(recipe: Recipe, setting: str) -> list[Any]:
    """A setting in each phase; its name as training.lr."""
    found = []
    for phase in recipe.phases:
        value: Any = phase.config.to_mapping()
        for part in setting.split("."):
            value = value[part]
        found.append(value)
    return found


# --- a new recipe ---


def test_phases_lie_over_the_configuration_and_start_one_from_another(write: Write) -> None:
    recipe, name, output = parse_recipe(WORDS)
    assert (name, output) == ("demo-r", None)
    assert [phase.name for phase in recipe.phases] == ["low", "latent", "head"]
    assert [phase.starts_from for phase in recipe.phases] == [None, "low", "low"]
    assert of(recipe, "data.image_size") == [64, 128, 64]
    assert of(recipe, "training.steps") == [30, 20, 1000]
    assert of(recipe, "training.lr") == [1e-3, 1.5e-3, 1.5e-3]
    assert of(recipe, "training.train") == [None, ["decoder.latent_inputs"], ["decoder.head"]]
    assert of(recipe, "losses.kl.weight") == [1e-6, 1e-5, 0.0]
    assert of(recipe, "losses.lpips.weight") == [0.0] * 3
    assert of(recipe, "model.latent_channels") == [4] * 3


def test_flags_of_all_phases_and_of_one(write: Write) -> None:
    words = ["--phases.latent.training.steps", "5", "--training.steps=7", "--phases.head.losses.kl", "2"]
    for order in (words, ["--training.steps=7", *words[:2], *words[3:]]):
        recipe = parse(*order)
        assert of(recipe, "training.steps") == [7, 5, 7]
        assert of(recipe, "losses.kl.weight") == [1e-6, 1e-5, 2.0]
    assert of(parse_recipe(["--training.steps=7", *WORDS]).recipe, "training.steps") == [7] * 3
    assert of(parse("--phases.low.training.train=[encoder, decoder.head]"), "training.train")[0] == [
        "encoder",
        "decoder.head",
    ]
    assert of(parse("--phases.low.data.flip", "no"), "data.flip") == [False, True, True]
    assert parse_recipe([*WORDS, "--training.output", "mine"]).output == "mine"


def test_a_configuration_with_phases_lies_over_the_recipe(write: Write) -> None:
    write(
        "mine.yaml",
        "training: {lr: 5.0e-4, seed: 3}\n"
        "phases:\n  low: {training: {steps: 1}}\n  head: {starts_from: null}\n  last: {training: {train: [encoder]}}\n",
    )
    recipe, name, _ = parse_recipe([*WORDS, "--config", "mine.yaml"])
    assert name == "mine-r"
    assert [phase.name for phase in recipe.phases] == ["low", "latent", "head", "last"]
    assert [phase.starts_from for phase in recipe.phases] == [None, "low", "latent", "head"]
    assert of(recipe, "training.steps") == [1, 20, 1000, 1000]
    assert of(recipe, "training.lr") == [1e-3, 5e-4, 5e-4, 5e-4]
    assert of(recipe, "training.seed") == [3, 4, 5, 6], "no phase sees the crops and noise of another"
    with pytest.raises(InputError, match=r"mine\.yaml has phases: give it by --recipe mine\.yaml"):
        parse_run_config(["--config", "demo", "--config", "mine.yaml"])


def test_what_phases_start_from(write: Write) -> None:
    """What is given for all phases is for the first; a phase's own stays its own."""
    for words in (["--training.init_from", "saved"], ["--phases.low.training.init_from", "saved"]):
        recipe = parse(*words)
        assert of(recipe, "training.init_from") == ["saved", None, None]
        assert [phase.starts_from for phase in recipe.phases] == [None, "low", "low"]
    write("saved.yaml", "training: {init_from: saved}")
    assert of(parse("--config", "saved.yaml"), "training.init_from") == ["saved", None, None]
    recipe = parse("--phases.latent.training.init_from", "other", "--training.init_from", "saved")
    assert of(recipe, "training.init_from") == ["saved", "other", None]
    assert [phase.starts_from for phase in recipe.phases] == [None, None, "low"]
    write("own.yaml", "phases: {latent: {training: {init_from: own}}}")
    recipe = parse("--config", "own.yaml", "--training.init_from", "saved")
    assert of(recipe, "training.init_from") == ["saved", "own", None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--phases.lo.training.steps 5", "unknown phase of the recipe 'lo' (did you mean 'low'?); accepted: head, l"),
        ("--phases.low.training.stpes 5", "unknown setting of training 'stpes' (did you mean 'steps'?)"),
        ("--phases.low.training.steps no", "phase low: training.steps is false; it must be a whole number"),
        ("--phases.low.training.steps", "--phases.low.training.steps has no value; "),
        ("--phases.low 5", "--phases.low names no setting of a phase; write --phases.PHASE.section.name VALUE"),
        ("--phases.low. 5", "--phases.low. names no setting of a phase"),
        ("--phases.low.training 5", "--training is a section; give its settings one by one"),
        ("--phases.low.model.latent_channels 8", "--phases.low.model: section model is of all phases; give --model"),
        ("--phases.low.training.output x", "phases.low.training.output: the phases lie in the recipe's folder; name t"),
        ("--phases.head.training.init_from x", "phases.head has both starts_from and training.init_from; give one of "),
        ("--phases.head.losses.kll 5", "phase head: unknown loss term 'kll' (did you mean 'kl'?)"),
        ("--training.lr -1", "phase low: training.lr is -1.0; it must be above 0"),
        ("--data.image_size 60", "phase low: data.image_size is 60; it must be a multiple of model.downsample_factor"),
        ("--phases.head.data.image_size 60", "phase head: data.image_size is 60; it must be a multiple of model.downs"),
        ("--phases.head.training.accumulation_steps 3", "phase head: training.batch_size is 8; it must be a multiple"),
        ("--recipe r.yaml", "--recipe is given twice"),
        ("--recipe=", "--recipe has no value"),
        ("--phases.latent.losses {dynamics: 0, kl: 0}", "phase latent: losses: every weight is 0"),
    ],
)
def test_a_mistake_in_a_word_is_one_line(words: str, message: str, write: Write) -> None:
    assert refusal(*WORDS, *words.split(" ", 1)).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phases:", "section phases of recipe f is null; it must be a mapping from names to settings"),
        ("phases: {}", "section phases of recipe f is {}; it must be a mapping from names to settings"),
        ("phases: [low]", "section phases of recipe f is ['low']; it must be a mapping"),
        ("description: none", "section phases of recipe f is null"),
        ("# nothing", "f.yaml is empty"),
        (
            "phases: {low: {}}\nmodel: {latent_channels: 4}",
            "unknown section of recipe f 'model'; accepted: description, ",
        ),
        ("phases: {low: {}}\ntraining: {lr: 1.0}", "unknown section of recipe f 'training'; accepted: description, "),
        ("phases: {low: }", "phases.low of recipe f is null; it must be a mapping of sections"),
        ("phases: {low: {training: }}", "phases.low.training of recipe f is null; it must be a mapping"),
        ("phases: {low: {losses: 5}}", "phases.low.losses of recipe f is 5; it must be a mapping"),
        (
            "phases: {low: {model: {latent_channels: 4}}}",
            "recipe f has the phases' section model: leave --config out, or take that section out",
        ),
        ("phases: {low: {trainin: {}}}", "unknown section of phases.low 'trainin' (did you mean 'training'?)"),
        ("phases: {low: {training: {lrr: 1}}}", "phase low: unknown setting of training 'lrr' (did you mean 'lr'?)"),
        ("phases: {low: {training: {train: []}}}", "phase low: training.train is []; name the groups that train"),
        (
            "phases: {low: {training: {train: decoder}}}",
            "phase low: training.train is 'decoder'; it must be a list of ",
        ),
        ("phases: {low: {training: {output: x}}}", "phases.low.training.output: the phases lie in the recipe's folder"),
        ("phases: {low-res: {}}", "a phase is called 'low-res'; use letters, digits and underscores"),
        ("phases: {1: {}}", "a phase is called 1; use letters, digits and underscores"),
        ("phases: {low: {}, low: {}}", "f.yaml:1: the key 'low' stands there twice"),
        (
            "phases: {low: {starts_from: low}}",
            "unknown earlier phase that phases.low starts_from 'low'; accepted: none",
        ),
        (
            "phases: {low: {}, mid: {}, head: {starts_from: mit}}",
            "unknown earlier phase that phases.head starts_from 'mit' (did you mean 'mid'?); accepted: low, mid",
        ),
        ("phases: {low: {}, head: {starts_from: [low]}}", "unknown earlier phase that phases.head starts_from ['low']"),
        (
            "phases: {low: {}, head: {starts_from: low, training: {init_from: x}}}",
            "phases.head has both starts_from and training.init_from; give one of them",
        ),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(text: str, message: str, write: Write) -> None:
    write("f.yaml", text)
    assert refusal("--recipe", "f.yaml", "--config", "demo").startswith(message)


def test_a_recipe_that_is_not_there(write: Write) -> None:
    message = refusal("--recipe", "tree_phase", "--config", "demo")
    assert message.startswith("--recipe: unknown recipe 'tree_phase' (did you mean 'three_phase'?)")
    assert message.endswith(", or a YAML file")
    assert refusal("--recipe", "no/such.yaml", "--config", "demo").startswith("--recipe: unknown recipe 'no/such.yaml'")
    assert refusal("--recipe", "/", "--config", "demo") == "/ is a folder, not a YAML file"
    assert refusal("--recipe", "three_phase").endswith(
        "the configuration has no section model; start from a preset with --config PRESET"
    )


def test_flags_of_phases_need_a_recipe() -> None:
    with pytest.raises(InputError, match=r"--phases\.low: phases are those of a recipe; give --recipe NAME too"):
        parse_run_config(["--config", "demo", "--phases.low.training.lr", "1"])
    assert not asks_for_recipe(["--config", "demo", "--phases.low.training.lr", "1"])
    assert asks_for_recipe(["--recipe", "x"])
    assert asks_for_recipe(["--recipe=x"])


def test_what_is_printed_is_read_back(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data.root", "写真", "--training.seed", "5", "--phases.head.training.steps", "3"]
    with pytest.raises(SystemExit) as end:
        parse(*words, "--print_config")
    assert end.value.code == 0
    write("recipe.yaml", capsys.readouterr().out)
    assert read_recipe(tmp_path) == parse(*words)
    write("recipe.yaml", recipe_yaml(parse(*words), ascii_only=True))
    assert (tmp_path / "recipe.yaml").read_text().isascii()
    assert read_recipe(tmp_path) == parse(*words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml", "recipe.yaml"]


def test_a_printed_recipe_gives_the_same_phases_again(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--training.output=run", "--training.seed=5", "--phases.head.training.seed=50"]
    recipe = parse(*words)
    assert of(recipe, "training.seed") == [5, 6, 50]
    write("printed.yaml", recipe_yaml(recipe))
    assert parse_recipe(["--recipe", "printed.yaml"]).recipe == recipe
    again = parse_recipe(["--recipe", "printed.yaml", "--training.output", "other", "--phases.low.training.steps", "3"])
    assert again.output == "other"
    assert of(again.recipe, "training.steps") == [3, 20, 1000]
    other = recipe_yaml(recipe).replace("latent_channels: 4", "latent_channels: 8", 1)
    write("other.yaml", other)
    message = "phases.latent has another section model than the others; give it by --config, for all"
    assert refusal("--recipe", "other.yaml") == message


# --- going on ---


def lay(*words: str, finished: tuple[str, ...] = ()) -> Recipe:
    return lay_over_recipe(parse("--training.output", "run"), words, finished)


def test_flags_change_what_is_not_finished(write: Write) -> None:
    assert lay() == parse("--training.output", "run")
    changed = lay("--training.steps", "9", "--phases.head.training.steps", "8", finished=("low",))
    assert of(changed, "training.steps") == [30, 9, 8]
    assert [phase.starts_from for phase in changed.phases] == [None, "low", "low"]
    assert of(lay("--losses.kl", "0.5", finished=("low",)), "losses.kl.weight") == [1e-6, 0.5, 0.5]
    assert of(lay("--model.latent_channels", "8"), "model.latent_channels") == [8] * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--phases.low.training.steps 40", "phase low is finished, and others have started from it: it cannot change"),
        ("--phases.lov.training.steps 40", "unknown phase of the recipe 'lov' (did you mean 'low'?)"),
        ("--phases.head.model.latent_channels 8", "--phases.head.model: section model is of all phases"),
        ("--model.latent_channels 8", "section model cannot change: phase low is finished"),
        ("--training.output other", "training.output: the phases lie in the recipe's folder, which may be moved"),
        ("--phases.head.training.output other", "training.output: the phases lie in the recipe's folder"),
        ("--training.init_from other", "phases.latent has both starts_from and training.init_from; give one of them"),
        ("--phases.head.training.lr no", "phase head: training.lr is false; it must be a number"),
        ("--config demo", "--config and --recipe are for a new run; change single settings by flags"),
        ("--recipe three_phase", "--config and --recipe are for a new run; change single settings by flags"),
    ],
)
def test_what_cannot_change_is_one_line(words: str, message: str, write: Write) -> None:
    with pytest.raises(InputError) as caught:
        lay(*words.split(), finished=("low",))
    assert one_line(caught.value).startswith(message)


@pytest.fixture
def begun(write: Write, tmp_path: Path) -> Path:
    """A recipe's folder whose first phase is finished, whose second has begun and whose third has not."""
    recipe = parse("--training.output", "run")
    run = tmp_path / "run"
    for place, (phase, step) in enumerate(zip(recipe.phases[:2], (30, 5), strict=True)):
        checkpoint = run / f"{place + 1}-{phase.name}" / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint.parent / "last").symlink_to(checkpoint.name)
        (checkpoint / "state.json").write_text(json.dumps({"format": 1, "step": step, "seconds": 1.0}))
        (checkpoint.parents[1] / "config.yaml").touch()
    (run / "recipe.yaml").write_text(recipe_yaml(recipe))
    return run


def test_going_on_with_flags(begun: Path) -> None:
    args = build_parser().parse_args(["--resume", str(begun)])
    assert (args.resume, args.changed, args.recipe) == (begun, False, read_recipe(begun))
    args = build_parser().parse_args([f"--resume={begun}", "--debug"])
    assert args.changed is False
    args = build_parser().parse_args(["--resume", str(begun), "--training.steps", "25"])
    assert args.changed is True
    assert of(args.recipe, "training.steps") == [30, 25, 25]
    args = build_parser().parse_args(["--resume", str(begun), "--phases.head.training.lr", "1"])
    assert of(args.recipe, "training.lr") == [1e-3, 1.5e-3, 1.0]
    assert read_recipe(begun) != args.recipe, "reading the command has written"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--phases.low.training.steps 40", "phase low is finished"),
        ("--phases.latent.training.lr 1", "training.lr is 0.0015 in "),
        ("--training.lr 1", "training.lr is 0.0015 in "),
        ("--losses.mine.class_path a.B", "losses.mine is not part of "),
        ("--recipe three_phase", "--config and --recipe are for a new run"),
    ],
)
def test_a_begun_phase_stays_what_it_is(begun: Path, words: str, message: str) -> None:
    before = (begun / "recipe.yaml").read_bytes()
    with pytest.raises(InputError) as caught:
        build_parser().parse_args(["--resume", str(begun), *words.split()])
    assert one_line(caught.value).startswith(message)
    if "{" not in message and message.endswith(" in "):
        assert str(begun / "2-latent") in str(caught.value)
    assert (begun / "recipe.yaml").read_bytes() == before


def test_the_configuration_to_go_on_with_is_printed(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args(["--resume", str(begun), "--training.steps", "25", "--print_config"])
    assert end.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["phases"]["latent"]["training"]["steps"] == 25
    assert of(read_recipe(begun), "training.steps") == [30, 20, 1000]


# --- nonsense ---


@functools.cache
def plain() -> str:
    return dump_yaml(yaml.safe_load(RECIPE))


pieces = st.sampled_from(
    ["{", "}", "[", "]", "- ", ": ", "null", "\n", "  ", "&a [*a]", "1e9", "starts_from: ", "low", "'", "é", "model:"]
)


@st.composite
def mutated_recipes(draw: st.DrawFn) -> bytes:
    """A recipe after one to three mutations of its bytes."""
    content = plain().encode()
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 20)))
        action = draw(st.sampled_from(["remove", "double", "insert", "overwrite", "lines", "cut"]))
        if action == "remove":
            content = content[:start] + content[end:]
        elif action == "double":
            content = content[:end] + content[start:]
        elif action == "insert":
            content = content[:start] + draw(pieces).encode() + content[start:]
        elif action == "overwrite":
            content = content[:start] + draw(st.binary(max_size=4)) + content[end:]
        elif action == "cut":
            content = content[:start]
        else:
            lines = content.splitlines(keepends=True) or [b""]
            line = draw(st.integers(0, len(lines) - 1))
            lines.insert(draw(st.integers(0, len(lines))), lines.pop(line))
            content = b"".join(lines)
    return content


@st.composite
def mutated_mappings(draw: st.DrawFn) -> bytes:
    """A recipe in which one to three of its values, at any depth, are replaced, taken away or given another name."""
    recipe = yaml.safe_load(RECIPE)
    names = [
        "low",
        "latent",
        "head",
        "starts_from",
        "training",
        "init_from",
        "train",
        "steps",
        "output",
        "losses",
        "",
        1,
    ]
    values = st.sampled_from(
        [
            None,
            True,
            -1,
            0,
            1.5,
            2**70,
            "low",
            "",
            "\0",
            [],
            ["decoder"],
            [None],
            {},
            {"weight": 0},
            {"class_path": "a.B"},
        ]
    )
    for _ in range(draw(st.integers(1, 3))):
        inner: Any = recipe
        while True:
            keys = [key for key, value in inner.items() if isinstance(value, dict)]
            if not keys or draw(st.integers(0, 3)) == 0:
                break
            inner = inner[draw(st.sampled_from(keys))]
        key = draw(st.sampled_from([*inner, *names] if inner else names))
        if draw(st.booleans()):
            inner[key] = draw(values)
        elif key in inner:
            kept = inner.pop(key)
            if draw(st.booleans()):
                inner[draw(st.sampled_from(names))] = kept
    return yaml.safe_dump(recipe, sort_keys=False).encode()


@pytest.fixture(scope="module")
def mutated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the mutations of a recipe are written, one after the other."""
    return tmp_path_factory.mktemp("mutations") / "recipe.yaml"


@settings(max_examples=150, derandomize=True, deadline=None)
@given(content=st.one_of(mutated_recipes(), mutated_mappings()))
def test_mutated_recipes_are_accepted_or_refused_in_one_line(content: bytes, mutated_file: Path) -> None:
    mutated_file.write_bytes(content)
    try:
        recipe = parse_recipe(["--recipe", str(mutated_file), "--config", "demo"]).recipe
    except InputError as error:
        message = str(error)
    else:
        message = ""
        mutated_file.write_text(dump_yaml(recipe_mapping(recipe)))
        assert read_recipe(mutated_file.parent) == recipe
    assert len(message.splitlines()) <= 1, message
    assert len(message) <= 400 + len(os.fspath(mutated_file)), message
