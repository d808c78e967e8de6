"""The configuration from the command line: layers, settings, messages, help, and the YAML that is printed."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_words import PARSER, options, parse, parse_recipe

from dc_ssdae.cli.run_config import config_yaml, read_run_config
from dc_ssdae.errors import InputError
from dc_ssdae.presets import list_presets
from dc_ssdae.settings import documentation
from dc_ssdae.training.config import SECTIONS, RunConfig

DEMO = ("--config", "demo")
OWN = """\
losses:
  edges: {class_path: my_project.Edges, init_args: {sharpness: 1e-6}, weight: 2}
model:
  encoder:
    init_args: {norm: none}
training: {lr: 1e-6}
"""


def write(name: str, text: str) -> str:
    """Write a file and give its path."""
    Path(name).write_text(text, encoding="utf-8")
    return name


def refusal(*words: str) -> InputError:
    with pytest.raises(InputError) as error:
        parse(*words)
    assert len(str(error.value).splitlines()) == 1
    return error.value


def test_files_are_laid_over_each_other() -> None:
    first = write("first.yaml", OWN)
    second = write("second.yml", "losses: {edges: 0.5}\ntraining:\ndata: {flip: false}\n")
    config, name = read_run_config(options(*DEMO, "--config", first, f"--config={second}"))
    assert name == "second"
    assert (config.training.lr, config.training.batch_size, config.data.flip) == (1e-6, 8, False)
    assert config.model.encoder == {
        "init_args": {"widths": [16, 32, 64, 64], "depths": [0, 1, 1, 1], "block_shortcut": True, "norm": "none"},
    }
    edges = config.losses["edges"]
    assert (edges.weight, edges.class_path, edges.init_args) == (0.5, "my_project.Edges", {"sharpness": 1e-6})


def test_another_class_drops_the_settings_of_the_first() -> None:
    assert parse(*DEMO, "--model.encoder.class_path", "KLEncoder").model.encoder == {"class_path": "KLEncoder"}
    same = parse(*DEMO, "--model.encoder.class_path", "DCEncoder").model.encoder
    assert same is not None
    assert same["init_args"] == {"widths": [16, 32, 64, 64], "depths": [0, 1, 1, 1], "block_shortcut": True}
    own = write("own.yaml", OWN)
    other = write("other.yaml", "losses: {edges: {class_path: my_project.Corners, init_args: {count: 3}}}")
    assert parse(*DEMO, "--config", own, "--config", other).losses["edges"].init_args == {"count": 3}
    assert parse(*DEMO, "--config", write("null.yaml", "model: {encoder: null}")).model.encoder is None


def test_settings_go_over_configurations_wherever_they_stand() -> None:
    own = write("own.yaml", OWN)
    assert parse("--training.lr", "1", *DEMO, "--training.lr=2", "--config", own).training.lr == 2.0
    flags = ["--model.encoder.init_args.deep.y=[1, 2]", "--model.encoder.class_path=my.Encoder"]
    for flag_order in (flags, flags[::-1]):
        encoder = {"class_path": "my.Encoder", "init_args": {"deep": {"y": [1, 2]}}}
        assert parse(*DEMO, *flag_order).model.encoder == encoder


SETTINGS: list[tuple[str, str, Any]] = [
    ("--training.lr=1", "training.lr", 1.0),
    ("--training.minutes=null", "training.minutes", None),
    ("--training.output=1e3", "training.output", "1e3"),
    ("--training.output=[a", "training.output", "[a"),
    ("--data.root=null", "data.root", None),
    ("--data.dataset={class_path: a.B}", "data.dataset", {"class_path": "a.B"}),
    ("--losses.kl=1e-3", "losses.kl.weight", 1e-3),
    ("--model.decoder.init_args.pattern=*.tar", "model.decoder.init_args.pattern", "*.tar"),
    ("--model.decoder.init_args.text='5'", "model.decoder.init_args.text", "5"),
]


@pytest.mark.parametrize(("flag", "path", "value"), SETTINGS)
def test_a_settings_word_has_the_fields_type(flag: str, path: str, value: Any) -> None:
    found: Any = parse(*DEMO, flag).to_mapping()
    for part in path.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)
    name, _, text = flag.partition("=")
    assert parse(*DEMO, name, text) == parse(*DEMO, flag)


@pytest.mark.parametrize(
    ("words", "field", "told"),
    [
        ("--trainin.lr=1", "trainin", "did you mean 'training'"),
        ("--training.lrr=1", "training.lrr", "did you mean 'lr'"),
        ("--data.root.x=1", "data.root", "data.root"),
        ("--training.lr=[1", "training.lr", "'[1'"),
        ("--training=5", "--training", "unknown option '--training'"),
        ("--confg demo", "--confg", "did you mean '--config'"),
        ("--training.minutes=", None, "--training.minutes has no value"),
        ("--losses.kl", None, "--losses.kl has no value"),
        ("garbage", "garbage", "unknown word 'garbage'"),
        ("--config demmo", None, "did you mean 'demo'?"),
        ("--config demmo.yaml", None, "'demmo.yaml'"),
        ("--config ~nobody/x.yaml", None, "'~nobody/x.yaml'"),
        ("--phases.low.training.lr=1", "phases", "'phases'"),
    ],
)
def test_a_wrong_word_is_named(words: str, field: str | None, told: str) -> None:
    error = refusal(*DEMO, *words.split(" "))
    assert error.field == field
    assert told in str(error)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("training: 5", "training"),
        ("losses: [kl]", "losses"),
        ("losses: {1: 2}", "losses"),
        ("losses: {kl: }", "losses.kl"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(text: str, field: str) -> None:
    assert refusal(*DEMO, "--config", write("f.yaml", text)).field == field


def test_a_base_lies_below_everything() -> None:
    base = parse(*DEMO, "--training.seed", "3", "--losses.kl", "0.5").to_mapping()
    config = parse("--training.batch_size", "4", base=base)
    assert (config.training.seed, config.training.batch_size, config.losses["kl"].weight) == (3, 4, 0.5)
    assert parse(base=base).to_mapping() == base
    assert refusal("--training.lr", "1").field == "model", "without a base, a preset is asked for"


@pytest.mark.parametrize("name", list_presets())
def test_print_config_prints_what_gives_the_same_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *("--config", name, "--config", write("own.yaml", OWN), "--training.output=no", "--data.root=写真/1:30\x85"),
        "--data.validation.class_path=my.Set",
        "--data.validation.init_args={a: '09', b: [[1e-6, null], [{c: x}]], '1': \"\\n\"}",
    ]
    with pytest.raises(SystemExit) as end:
        parse(*words, "--print_config")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert parse("--config", write("printed.yaml", text)) == parse(*words)
    lines = text.splitlines()
    assert "distillation:" not in lines, "a section of those runs alone"
    for section, kind in SECTIONS.items():
        for setting in documentation(kind)[1] if section != "distillation" else ():
            place = next(index for index, line in enumerate(lines) if line.startswith(f"  {setting}:"))
            assert lines[place - 1].startswith("  # ")


def test_help_fits_a_terminal_and_describes_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = PARSER.format_help()
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for section, kind in SECTIONS.items():
        described = documentation(kind)[1]
        assert list(described) == list(kind.__dataclass_fields__)
        assert all(f"--{section}.{name} " in words for name in described)
    assert "(default: 0.0003)" in words
    assert "lpips 0.5, repa 0.25, kl 1e-06)" in words


VALID = ["--config=demo", "--losses.edges={class_path: a.B, init_args: {x: 1}}", *(flag for flag, _, _ in SETTINGS)]
pieces = st.sampled_from(["--", "=", ".", "null", "{", "]", "1e", ":", "'", "no", "é", "losses"]) | st.text(max_size=6)
places = st.floats(0, 1, exclude_max=True)
RECIPE = "phases: {low: {training: {steps: 30}, losses: {kl: 2}}, high: {starts_from: low, data: {image_size: 64}}}"


@functools.cache
def printed() -> str:
    return config_yaml(parse(*VALID))


@settings(max_examples=150, derandomize=True, deadline=None)
@given(number=st.integers(0, len(VALID) - 1), place=places, new=pieces, dropped=st.sampled_from([0, 1, 9, 99]))
def test_mutations_of_words_and_files_are_accepted_or_refused(
    number: int, place: float, new: str, dropped: int
) -> None:
    def mutated(text: str) -> str:
        start = int(place * len(text))
        return text[:start] + new + text[start + dropped :]

    file = write("mutated.yaml", mutated(printed()))
    for words in ([*VALID[:number], mutated(VALID[number]), *VALID[number + 1 :]], ["--config", file]):
        with contextlib.suppress(InputError, SystemExit):
            config = parse(*words)
            assert RunConfig.from_mapping(config.to_mapping()) == config
    recipe = write("recipe.yaml", mutated(RECIPE))
    with contextlib.suppress(InputError):
        parse_recipe("--recipe", recipe, *DEMO)
