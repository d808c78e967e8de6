"""The configuration from the command line: layers, settings, messages, help, and the YAML that is printed."""

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_words import PARSER, options, parse

from dc_ssdae.cli.run_config import config_yaml, read_run_config
from dc_ssdae.errors import InputError
from dc_ssdae.presets import list_presets, read_yaml
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

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file and give its path."""

    def write_file(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_file


def refusal(*words: str) -> InputError:
    with pytest.raises(InputError) as error:
        parse(*words)
    assert len(str(error.value).splitlines()) == 1
    return error.value


def test_files_are_laid_over_each_other(write: Write) -> None:
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


def test_another_class_drops_the_settings_of_the_first(write: Write) -> None:
    assert parse(*DEMO, "--model.encoder.class_path", "KLEncoder").model.encoder == {"class_path": "KLEncoder"}
    same = parse(*DEMO, "--model.encoder.class_path", "DCEncoder").model.encoder
    assert same is not None
    assert same["init_args"] == {"widths": [16, 32, 64, 64], "depths": [0, 1, 1, 1], "block_shortcut": True}
    own = write("own.yaml", OWN)
    other = write("other.yaml", "losses: {edges: {class_path: my_project.Corners, init_args: {count: 3}}}")
    assert parse(*DEMO, "--config", own, "--config", other).losses["edges"].init_args == {"count": 3}
    assert parse(*DEMO, "--config", write("null.yaml", "model: {encoder: null}")).model.encoder is None


def test_settings_go_over_configurations_wherever_they_stand(write: Write) -> None:
    own = write("own.yaml", OWN)
    for words in (("--training.lr", "2", *DEMO, "--config", own), (*DEMO, "--config", own, "--training.lr=2")):
        assert parse(*words).training.lr == 2.0
    assert parse(*DEMO, "--training.lr", "1", "--training.lr", "2").training.lr == 2.0
    encoder = {"class_path": "my.Encoder", "init_args": {"x": 1e-6, "deep": {"y": [1, 2]}}}
    flags = [
        "--model.encoder.init_args.x=1e-6",
        "--model.encoder.class_path=my.Encoder",
        "--model.encoder.init_args.deep.y=[1, 2]",
    ]
    for flag_order in (flags, flags[::-1]):
        assert parse(*DEMO, *flag_order).model.encoder == encoder


@pytest.mark.parametrize(
    ("flag", "path", "value"),
    [
        ("--training.lr=1", "training.lr", 1.0),
        ("--training.steps=300_000", "training.steps", 300_000),
        ("--training.minutes=null", "training.minutes", None),
        ("--training.betas=[0.8, 0.9]", "training.betas", [0.8, 0.9]),
        ("--training.precision=bf16", "training.precision", "bfloat16"),
        ("--training.output=1e3", "training.output", "1e3"),
        ("--training.output=[a", "training.output", "[a"),
        ("--data.root=null", "data.root", None),
        ("--data.flip=false", "data.flip", False),
        ("--data.validation=/a/{1..2}.tar", "data.validation", "/a/{1..2}.tar"),
        ("--data.validation.class_path=a.B", "data.validation", {"class_path": "a.B"}),
        ("--data.dataset={class_path: a.B}", "data.dataset", {"class_path": "a.B"}),
        ("--losses.kl=1e-3", "losses.kl.weight", 1e-3),
        ("--losses.kl.weight=0", "losses.kl.weight", 0.0),
        ("--model.decoder.init_args.pattern=*.tar", "model.decoder.init_args.pattern", "*.tar"),
        ("--model.decoder.init_args.text='5'", "model.decoder.init_args.text", "5"),
        ("--model.decoder.init_args.flag=true", "model.decoder.init_args.flag", True),
    ],
)
def test_a_settings_word_has_the_fields_type(flag: str, path: str, value: Any) -> None:
    found: Any = parse(*DEMO, flag).to_mapping()
    for part in path.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)
    name, _, text = flag.partition("=")
    assert parse(*DEMO, name, text) == parse(*DEMO, flag)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ("--trainin.lr=1", "trainin"),
        ("--training.lrr=1", "training.lrr"),
        ("--data.root.x=1", "data.root"),
        ("--losses.kll=1", "losses.kll"),
        ("--losses.kl.weight=x", "losses.kl.weight"),
        ("--losses.kl.wieght=1", "losses.kl.wieght"),
        ("--model.encoder.norm=none", "model.encoder.norm"),
        ("--training.steps=1e3", "training.steps"),
        ("--training.steps=1:30", "training.steps"),
        ("--training.lr=.nan", "training.lr"),
        ("--training.lr=null", "training.lr"),
        ("--training.lr=[1", "training.lr"),
        ("--training.optimizer=adam", "training.optimizer"),
        ("--training.compile=1", "training.compile"),
    ],
)
def test_a_wrong_setting_is_named(words: str, field: str) -> None:
    assert refusal(*DEMO, words).field == field


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--confg demo", "'--config'"),
        ("--print-config", "'--print_config'"),
        ("--training=5", "--training"),
        ("--training.lr", "--training.lr"),
        ("--training.minutes=", "--training.minutes has no value"),
        ("--losses.kl=", "--losses.kl has no value"),
        ("--losses.kl", "--losses.kl has no value"),
        ("--config", "--config"),
        ("garbage", "unknown word 'garbage'"),
        ("--config demmo", "did you mean 'demo'?"),
        ("--config demmo.yaml", "'demmo.yaml'"),
        ("--config ~nobody/x.yaml", "'~nobody/x.yaml'"),
        ("--config /", "is a directory"),
        ("--phases.low.training.lr=1", "'phases'"),
    ],
)
def test_a_wrong_word_is_named(words: str, told: str) -> None:
    assert told in str(refusal(*DEMO, *words.split(" ")))


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("training: {lr: [1\nmodel: 3", None),
        ("training:\n  lr: 1\n  lr: 2", None),
        ("# nothing", None),
        ("- a", None),
        ("trainin: {lr: 1}", "trainin"),
        ("training: 5", "training"),
        ("losses: [kl]", "losses"),
        ("training: {lr: no}", "training.lr"),
        ("losses: {1: 2}", "losses"),
        ("losses: {kl: }", "losses.kl"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(text: str, field: str | None, write: Write) -> None:
    error = refusal(*DEMO, "--config", write("f.yaml", text))
    assert error.field == field
    assert field is not None or "f.yaml" in str(error)


def test_without_a_model_a_preset_is_asked_for() -> None:
    assert refusal("--training.lr", "1").field == "model"


def test_a_base_lies_below_everything() -> None:
    base = parse(*DEMO, "--training.seed", "3", "--losses.kl", "0.5").to_mapping()
    config = parse("--training.batch_size", "4", base=base)
    assert (config.training.seed, config.training.batch_size, config.losses["kl"].weight) == (3, 4, 0.5)
    assert parse(base=base).to_mapping() == base


def test_print_config_prints_what_gives_the_same_run(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *(*DEMO, "--config", write("own.yaml", OWN), "--training.output=no", "--data.root=写真/1:30"),
        "--losses.kl=1e-3",
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
        for name in documentation(kind)[1] if section != "distillation" else ():
            place = next(index for index, line in enumerate(lines) if line.startswith(f"  {name}:"))
            assert lines[place - 1].startswith("  # ")


@pytest.mark.parametrize("name", list_presets())
def test_a_written_configuration_is_read_back(name: str, tmp_path: Path) -> None:
    config = parse("--config", name, "--training.output", "\x85 é")
    (tmp_path / "config.yaml").write_text(config_yaml(config), encoding="utf-8")
    assert RunConfig.from_mapping(read_yaml(tmp_path / "config.yaml")) == config


def test_help_fits_a_terminal_and_describes_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = PARSER.format_help()
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for section, kind in SECTIONS.items():
        described = documentation(kind)[1]
        assert list(described) == list(kind.__dataclass_fields__)
        for name in described:
            assert f"--{section}.{name} " in words
    assert "(default: 0.0003)" in words
    assert "lpips 0.5, repa 0.25, kl 1e-06)" in words


def test_reading_a_configuration_imports_nothing_heavy() -> None:
    program = """
import sys
from dc_ssdae.cli.train import Options
from dc_ssdae.cli.parser import CommandParser
from dc_ssdae.cli.run_config import read_run_config
read_run_config(CommandParser(Options, "dc-ssdae train").parse(["--config", "demo", "--training.lr", "1e-4"]))
print([name for name in ("torch", "numpy", "diffusers", "PIL", "accelerate") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def check_outcome(*words: str) -> None:
    """The words give a configuration that is its own plain data's, or a refusal of one line."""
    message = ""
    try:
        config = parse(*words)
        assert RunConfig.from_mapping(config.to_mapping()) == config
    except (InputError, SystemExit) as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


VALID = [
    "--config=demo",
    "--training.lr=1e-4",
    "--training.betas=[0.9, 0.99]",
    "--training.steps=10",
    "--training.precision=bf16",
    "--data.root=/data",
    "--data.flip=false",
    "--data.validation.class_path=my.Set",
    "--model.encoder.init_args.norm=none",
    "--losses.kl.weight=0",
    "--losses.edges={class_path: a.B, init_args: {x: 1}}",
]
pieces = st.sampled_from(
    ["--", "=", ".", "-", "null", "{", "[", "]", "1e", ":", "'", '"', "no", "é", "losses"]
) | st.text(max_size=6)


@st.composite
def mutated_words(draw: st.DrawFn) -> list[str]:
    """`VALID` after one to three mutations: words dropped, doubled, added, cut or given another value."""
    words = list(VALID)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(words) - 1))
        cut = draw(st.integers(0, len(words[place])))
        name = words[place].partition("=")[0]
        words[place : place + 1] = draw(
            st.sampled_from(
                [
                    words[place].split("=", 1),
                    [words[place]] * 2,
                    [draw(pieces), words[place]],
                    [words[place][:cut] + draw(pieces) + words[place][cut:]],
                    [f"{name}={draw(pieces)}"],
                ]
            )
        )
    return words


@settings(max_examples=150, derandomize=True, deadline=None)
@given(words=mutated_words())
def test_mutated_words_are_accepted_or_refused_in_one_line(words: list[str]) -> None:
    check_outcome(*words)


@functools.cache
def printed() -> str:
    return config_yaml(parse(*VALID))


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """A printed configuration after one to three mutations of its bytes."""
    content = printed().encode()
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        inserted = draw(pieces.map(str.encode) | st.binary(max_size=4) | st.just(content[start:end]))
        content = content[: draw(st.sampled_from([start, end]))] + inserted + content[end:]
    return content


@settings(max_examples=100, derandomize=True, deadline=None)
@given(content=mutated_files())
def test_mutated_files_are_accepted_or_refused_in_one_line(content: bytes, mutated_file: Path) -> None:
    mutated_file.write_bytes(content)
    check_outcome("--config", str(mutated_file))


@pytest.fixture(scope="module")
def mutated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the mutations of a file are written, one after the other."""
    return tmp_path_factory.mktemp("mutations") / "mutated.yaml"
