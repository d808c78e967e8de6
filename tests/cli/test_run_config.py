"""The configuration from the command line: layers, flags, messages, help, and the YAML that is printed."""

import functools
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dc_ssdae.cli import run_config
from dc_ssdae.cli.run_config import build_run_parser, config_yaml, parse_run_config
from dc_ssdae.errors import InputError
from dc_ssdae.presets import list_presets, read_yaml
from dc_ssdae.training.config import RunConfig

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


def parse(*words: str, base: dict[str, Any] | None = None) -> RunConfig:
    return parse_run_config(words, base).config


def refusal(*words: str) -> str:
    with pytest.raises(InputError) as error:
        parse_run_config(words)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert len(message) <= 400
    return message


def test_a_preset_alone() -> None:
    config, name = parse_run_config(DEMO)
    assert name == "demo"
    assert (config.training.batch_size, config.training.lr, config.data.image_size) == (8, 1.5e-3, 64)


def test_files_are_laid_over_each_other(write: Write) -> None:
    first, second = write("first.yaml", OWN), write("second.yml", "losses: {edges: 0.5}\ntraining:\ndata: {flip: no}\n")
    config, name = parse_run_config([*DEMO, "--config", first, f"--config={second}"])
    assert name == "second"
    assert config.training.lr == 1e-6
    assert config.training.batch_size == 8
    assert config.data.flip is False
    assert config.model.encoder == {
        "init_args": {"widths": [16, 32, 64, 64], "depths": [0, 1, 1, 1], "block_shortcut": True, "norm": "none"},
    }
    edges = config.losses["edges"]
    assert (edges.weight, edges.class_path, edges.init_args) == (0.5, "my_project.Edges", {"sharpness": 1e-6})


def test_a_file_alone_needs_no_preset(write: Write) -> None:
    config, name = parse_run_config(["--config", write("mine", "model: {latent_channels: 4, downsample_factor: 8}")])
    assert name == "mine"
    assert config.data.image_size == 256


def test_another_class_drops_the_settings_of_the_first(write: Write) -> None:
    assert parse(*DEMO, "--model.encoder.class_path", "KLEncoder").model.encoder == {"class_path": "KLEncoder"}
    same = parse(*DEMO, "--model.encoder.class_path", "DCEncoder").model.encoder
    assert same is not None
    assert same["init_args"] == {"widths": [16, 32, 64, 64], "depths": [0, 1, 1, 1], "block_shortcut": True}
    again = write("again.yaml", "losses: {edges: {class_path: my_project.Edges}}")
    other = write("other.yaml", "losses: {edges: {class_path: my_project.Corners, init_args: {count: 3}}}")
    own = write("own.yaml", OWN)
    assert parse(*DEMO, "--config", own, "--config", again).losses["edges"].init_args == {"sharpness": 1e-6}
    assert parse(*DEMO, "--config", own, "--config", other).losses["edges"].init_args == {"count": 3}
    null = write("null.yaml", "model: {encoder: null}")
    assert parse(*DEMO, "--config", null).model.encoder is None


def test_flags_go_over_configurations_wherever_they_stand(write: Write) -> None:
    own = write("own.yaml", OWN)
    for words in (("--training.lr", "2", *DEMO, "--config", own), (*DEMO, "--config", own, "--training.lr=2")):
        assert parse(*words).training.lr == 2.0
    assert parse(*DEMO, "--training.lr", "1", "--training.lr", "2").training.lr == 2.0


def test_the_order_of_a_class_and_its_settings_does_not_matter() -> None:
    encoder = {"class_path": "my.Encoder", "init_args": {"x": 1e-6, "deep": {"y": [1, 2]}}}
    flags = [
        "--model.encoder.init_args.x=1e-6",
        "--model.encoder.class_path=my.Encoder",
        "--model.encoder.init_args.deep.y=[1, 2]",
    ]
    for words in (flags, flags[::-1], ["--model.encoder", "{class_path: my.Encoder}", *flags]):
        assert parse(*DEMO, *words).model.encoder == encoder


@pytest.mark.parametrize(
    ("flag", "path", "value"),
    [
        ("--training.lr=1e-4", "training.lr", 1e-4),
        ("--training.lr=1", "training.lr", 1.0),
        ("--training.steps=300_000", "training.steps", 300_000),
        ("--training.minutes=null", "training.minutes", None),
        ("--training.betas=[0.8, 0.9]", "training.betas", [0.8, 0.9]),
        ("--training.precision=bf16", "training.precision", "bfloat16"),
        ("--training.optimizer=schedule_free_radam", "training.optimizer", "schedule_free_radam"),
        ("--training.output=no", "training.output", "no"),
        ("--training.output=1e3", "training.output", "1e3"),
        ("--training.output=[a", "training.output", "[a"),
        ("--training.output=\udcff", "training.output", "\udcff"),
        ("--data.root=null", "data.root", None),
        ("--data.flip=false", "data.flip", False),
        ("--data.workers=0", "data.workers", 0),
        ("--data.validation=/a/{1..2}.tar", "data.validation", "/a/{1..2}.tar"),
        ("--data.validation=5", "data.validation", "5"),
        ("--data.validation.class_path=a.B", "data.validation", {"class_path": "a.B"}),
        ("--data.dataset={class_path: a.B}", "data.dataset", {"class_path": "a.B"}),
        ("--losses.kl=1e-3", "losses.kl.weight", 1e-3),
        ("--losses.kl.weight=0", "losses.kl.weight", 0.0),
        ("--losses={kl: 0.1}", "losses.kl.weight", 0.1),
        ("--model.decoder.init_args.pattern=*.tar", "model.decoder.init_args.pattern", "*.tar"),
        ("--model.decoder.init_args.text='5'", "model.decoder.init_args.text", "5"),
        ("--model.decoder.init_args.flag=true", "model.decoder.init_args.flag", True),
    ],
)
def test_flags_have_the_fields_types(flag: str, path: str, value: Any) -> None:
    found: Any = parse(*DEMO, flag).to_mapping()
    for part in path.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)
    name, _, text = flag.partition("=")
    assert parse(*DEMO, name, text) == parse(*DEMO, flag)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--trainin.lr=1",
            "unknown option '--trainin.lr' (did you mean '--training.lr'?); settings are --section.name",
        ),
        ("--training.lrr=1", "unknown setting of training 'lrr' (did you mean 'lr'?); accepted: accumulation_steps, "),
        ("--training.batch-size=4", "unknown setting of training 'batch-size' (did you mean 'batch_size'?)"),
        ("--data.rot x", "unknown setting of data 'rot' (did you mean 'root'?); accepted: aug_scale, "),
        ("--data.root.x=1", "unknown setting of data 'root.x' (did you mean 'root'?)"),
        ("--confg demo", "unknown option '--confg' (did you mean '--config'?)"),
        ("--print-config", "unknown option '--print-config' (did you mean '--print_config'?)"),
        ("--print_config=x", "--print_config takes no value, but was given 'x'"),
        ("-x", "unknown option '-x'; settings are --section.name with section model, data, training, "),
        ("--training=5", "--training is a section; give its settings one by one, as --training.lr 1e-4"),
        ("--training.lr", "--training.lr has no value; write --training.lr VALUE or --training.lr=VALUE"),
        ("--training.lr=", "--training.lr has no value; "),
        ("--training.minutes=", "--training.minutes has no value; "),
        ("--training.wandb --training.lr 1", "--training.wandb has no value; "),
        ("--config", "--config has no value; "),
        ("--config=", "--config has no value; "),
        ("garbage", "unexpected word 'garbage'; write settings as --section.name VALUE, presets as --config NAME"),
        ("training.lr=1", "unexpected word 'training.lr'; write settings as --section.name VALUE"),
        ("--", "unexpected word '--'"),
        ("--losses.=1", "--losses. has an empty part"),
        ("--losses..x=1", "--losses..x has an empty part"),
        ("--losses.kll=1", "unknown loss term 'kll' (did you mean 'kl'?)"),
        ("--losses.kl.weight=x", "losses.kl.weight is 'x'; it must be a number"),
        ("--losses.kl.wieght=1", "unknown setting of losses.kl 'wieght' (did you mean 'weight'?)"),
        ("--model.encoder.norm=none", "unknown key of model.encoder 'norm'; accepted: class_path, init_args"),
        ("--training.steps=1e3", "training.steps is 1000.0; it must be a whole number or null; write 1000"),
        ("--training.steps=1:30", "training.steps is '1:30'; it must be a whole number or null"),
        ("--training.steps=" + "9" * 5000, "training.steps is '9999"),
        ("--training.lr=nan", "training.lr is 'nan'; it must be a number"),
        ("--training.lr=.nan", "training.lr is nan; it must be a finite number"),
        ("--training.lr=1e999", "training.lr is inf; it must be a finite number"),
        ("--training.lr=no", "training.lr is false; it must be a number"),
        ("--training.lr=null", "training.lr is null; it must be a number"),
        ("--training.lr=[1", "training.lr is '[1'; it must be a number"),
        ("--training.lr -1", "training.lr is -1.0; it must be above 0"),
        ("--training.optimizer=adam", "unknown training.optimizer 'adam' (did you mean 'adamw'?)"),
        ("--training.betas=0.9", "training.betas is 0.9; it must be two numbers, such as [0.9, 0.999]"),
        ("--training.compile=1", "training.compile is 1; it must be true or false"),
        ("--data.image_size=60", "data.image_size is 60; it must be a multiple of model.downsample_factor, 8"),
        ("--data.validation.x=5", "unknown key of data.validation 'x'; accepted: class_path, init_args"),
        ("--config demmo", "--config: unknown preset 'demmo' (did you mean 'demo'?); accepted: dc_f128c512_eqm, "),
        ("--config demmo.yaml", "--config: no such file 'demmo.yaml' (did you mean 'demo'?)"),
        ("--config no/such", "--config: no such file 'no/such'"),
        ("--config ~nobody/x.yaml", "--config: no such file '~nobody/x.yaml'"),
        ("--config " + "x" * 5000, "--config: unknown preset 'xxx"),
        ("--config a\0b.yaml", "--config: no such file 'a\\x00b.yaml'"),
        ("--config /", "/ is a folder, not a YAML file"),
        ("--model.encoder." + "a." * 30 + "b=1", "--model.encoder.a.a."),
    ],
)
def test_a_mistake_in_a_word_is_one_line(words: str, message: str) -> None:
    assert refusal(*DEMO, *words.split(" ")).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {lr: [1\nmodel: 3", "f.yaml:2: expected ',' or ']', but got ':'"),
        ("training:\n  lr: 1\n  lr: 2", "f.yaml:3: the key 'lr' stands there twice"),
        ("# nothing", "f.yaml is empty; it must hold settings"),
        ("- a", "f.yaml does not hold a mapping"),
        ("trainin: {lr: 1}", "unknown section of f.yaml 'trainin' (did you mean 'training'?); accepted: data, descrip"),
        ("training.lr: 1", "unknown section of f.yaml 'training.lr' (did you mean 'training'?); accepted: data, descr"),
        ("training: 5", "section training of f.yaml is 5; it must be a mapping of settings"),
        ("losses: [kl]", "section losses of f.yaml is ['kl']; it must be a mapping of settings"),
        ("training: {lr: no}", "training.lr is false; it must be a number"),
        ("training: {lr: null}", "training.lr is null; it must be a number"),
        ("losses: {1: 2}", "a loss term is called 1; use letters, digits and underscores"),
        ("losses: {kl: }", "losses.kl is null; it must be a weight, or a mapping with weight, class_path, init_args"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(
    text: str, message: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write("f.yaml", text)
    assert refusal(*DEMO, "--config", "f.yaml").startswith(message)
    # A later layer that would be right does not hide that a section is none.
    if message.startswith("section"):
        assert refusal(*DEMO, "--config", "f.yaml", "--training.lr", "1").startswith(message)


def test_without_a_model_a_preset_is_asked_for() -> None:
    message = "the configuration has no section model; start from a preset with --config PRESET"
    assert refusal() == message
    assert refusal("--training.lr", "1") == message


def test_a_base_lies_below_everything() -> None:
    base = parse(*DEMO, "--training.seed", "3", "--losses.kl", "0.5").to_mapping()
    config, name = parse_run_config(["--training.batch_size", "4"], base)
    assert name == ""
    assert (config.training.seed, config.training.batch_size, config.losses["kl"].weight) == (3, 4, 0.5)
    assert parse(*DEMO, base=base).training.seed == 3
    assert parse(base=base).to_mapping() == base


def test_print_config_prints_what_gives_the_same_run(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *DEMO,
        "--config",
        write("own.yaml", OWN),
        "--training.output=no",
        "--data.root=写真/1:30",
        "--losses.kl=1e-3",
        "--data.validation.class_path=my.Set",
        "--data.validation.init_args={a: '09', b: [[1e-6, null], [{c: x}]], '1': \"\\n\"}",
    ]
    with pytest.raises(SystemExit) as end:
        parse_run_config([*words, "--print_config"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert parse("--config", write("printed.yaml", text)) == parse(*words)
    lines = text.splitlines()
    comments = [line for line in lines if line.lstrip().startswith("#")]
    assert "  # optimiser steps; null where minutes alone decide." in comments
    assert lines[lines.index("  # optimiser steps; null where minutes alone decide.") + 1] == "  steps: 1000"
    assert max(map(len, comments)) <= 100
    for section, kind in run_config.SECTION_CLASSES.items():
        if section == "distillation":  # a section of those runs alone
            assert f"{section}:" not in lines
            continue
        assert f"{section}:" in lines
        for name in run_config._descriptions(kind)[1]:
            place = next(index for index, line in enumerate(lines) if line.startswith(f"  {name}:"))
            assert lines[place - 1].startswith("  # ")


def test_print_config_on_a_terminal_that_knows_no_unicode(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    words = [*DEMO, "--data.root", "写真"]
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit):
        parse_run_config([*words, "--print_config"])
    stream.flush()
    assert parse("--config", write("printed.yaml", written.getvalue().decode("ascii"))) == parse(*words)


@pytest.mark.parametrize("name", list_presets())
def test_a_written_configuration_is_read_back(name: str, tmp_path: Path) -> None:
    config = parse("--config", name, "--training.output", "\udcff \x85")
    (tmp_path / "config.yaml").write_text(config_yaml(config), encoding="utf-8")
    assert RunConfig.from_mapping(read_yaml(tmp_path / "config.yaml")) == config


def test_help_fits_a_terminal_and_names_everything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        parse_run_config([*DEMO, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for name in list_presets():
        assert name in words
    for section, kind in run_config.SECTION_CLASSES.items():
        for name, description in run_config._descriptions(kind)[1].items():
            assert f"--{section}.{name} " in words
            assert description, f"{section}.{name} has no description"
    assert "(default: 0.0003)" in words
    assert "--losses.NAME X sets a weight, 0 leaves the term out (default: dynamics 1, " in words
    assert "lpips 0.5, repa 0.25, kl 1e-06)" in words
    assert text.isascii()


def test_every_field_is_described() -> None:
    """By its section's docstring, which is where help and comments come from."""
    for kind in run_config.SECTION_CLASSES.values():
        assert list(run_config._descriptions(kind)[1]) == list(kind.__dataclass_fields__)


def test_the_parser_is_jsonargparses_and_has_every_default() -> None:
    parser = build_run_parser("dc-ssdae train")
    assert isinstance(parser, jsonargparse.ArgumentParser)
    defaults = parser.get_defaults()
    assert defaults["training.batch_size"] == 192
    assert defaults["data.image_size"] == 256


def test_reading_a_configuration_imports_nothing_heavy() -> None:
    program = """
import sys
from dc_ssdae.cli.run_config import parse_run_config
parse_run_config(["--config", "demo", "--training.lr", "1e-4"])
print([name for name in ("torch", "numpy", "diffusers", "PIL", "accelerate") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def parser() -> jsonargparse.ArgumentParser:
    """Built once: building takes as long as reading a configuration."""
    return build_run_parser("dc-ssdae train")


def check_outcome(words: list[str], parser: jsonargparse.ArgumentParser) -> None:
    """The words give a configuration that is its own plain data's, or a refusal of one line."""
    try:
        config = parse_run_config(words, parser=parser).config
    except InputError as error:
        message = str(error)
    except SystemExit as end:
        message = f"ended with {end.code}"
    else:
        message = ""
        assert RunConfig.from_mapping(config.to_mapping()) == config
    assert len(message.splitlines()) <= 1, message
    assert len(message) <= 400, message
    assert not message.startswith("ended") or message == "ended with 0"


VALID = [
    "--config=demo",
    "--training.lr=1e-4",
    "--training.betas=[0.9, 0.99]",
    "--training.steps=10",
    "--training.precision=bf16",
    "--data.root=/data",
    "--data.flip=no",
    "--data.validation.class_path=my.Set",
    "--model.encoder.init_args.norm=none",
    "--losses.kl.weight=0",
    "--losses.edges={class_path: a.B, init_args: {x: 1}}",
]
pieces = st.sampled_from(
    [
        "--",
        "=",
        ".",
        "-",
        "null",
        "{",
        "[",
        "]",
        "&a [*a]",
        "1e",
        ": ",
        "\n",
        "'",
        '"',
        "\0",
        "\udcff",
        "no",
        "é",
        "losses",
    ]
) | st.text(max_size=6)


@st.composite
def mutated_words(draw: st.DrawFn) -> list[str]:
    """`VALID` after one to three mutations: words split, dropped, doubled, added, cut, swapped or written into."""
    words = list(VALID)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(words) - 1))
        word = words[place]
        cut = draw(st.integers(0, len(word)))
        action = draw(st.sampled_from(["split", "drop", "double", "add", "cut", "swap", "write", "value", "value"]))
        if action == "split":
            words[place : place + 1] = word.split("=", 1)
        elif action == "drop" and len(words) > 1:
            del words[place]
        elif action == "double":
            words.insert(draw(st.integers(0, len(words))), word)
        elif action == "add":
            words.insert(place, draw(pieces))
        elif action == "cut":
            words[place] = word[:cut]
        elif action == "swap":
            other = draw(st.sampled_from(VALID))
            words[place] = f"{word.partition('=')[0]}={other.partition('=')[2]}"
        elif action == "write":
            words[place] = word[:cut] + draw(pieces) + word[cut:]
        else:
            words[place] = f"{word.partition('=')[0]}={draw(pieces)}"
    return words


@settings(max_examples=200, derandomize=True, deadline=None)
@given(words=mutated_words())
def test_mutated_words_are_accepted_or_refused_in_one_line(
    words: list[str], parser: jsonargparse.ArgumentParser
) -> None:
    check_outcome(words, parser)


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
        action = draw(st.sampled_from(["remove", "double", "insert", "overwrite", "flip", "lines"]))
        if action == "remove":
            content = content[:start] + content[end:]
        elif action == "double":
            content = content[:end] + content[start:]
        elif action == "insert":
            content = content[:start] + draw(pieces).encode("utf-8", "surrogatepass") + content[start:]
        elif action == "overwrite":
            content = content[:start] + draw(st.binary(max_size=4)) + content[end:]
        elif action == "flip" and start < len(content):
            content = content[:start] + bytes([content[start] ^ 1 << draw(st.integers(0, 7))]) + content[start + 1 :]
        elif action == "lines":
            lines = content.splitlines(keepends=True) or [b""]
            line = draw(st.integers(0, len(lines) - 1))
            lines.insert(draw(st.integers(0, len(lines))), lines.pop(line))
            content = b"".join(lines)
    return content


@settings(max_examples=200, derandomize=True, deadline=None)
@given(content=mutated_files())
def test_mutated_files_are_accepted_or_refused_in_one_line(
    content: bytes, mutated_file: Path, parser: jsonargparse.ArgumentParser
) -> None:
    mutated_file.write_bytes(content)
    check_outcome(["--config", str(mutated_file)], parser)


@pytest.fixture(scope="module")
def mutated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the mutations of a file are written, one after the other."""
    return tmp_path_factory.mktemp("mutations") / "mutated.yaml"
