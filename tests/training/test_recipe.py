"""A recipe's file: what is read, what is refused; and that the packaged recipes fit every preset."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import init_empty_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import run_config

from dc_ssdae.cli.run_recipe import parse_recipe
from dc_ssdae.errors import InputError
from dc_ssdae.parameter_groups import parameter_groups, select_groups
from dc_ssdae.presets import dump_yaml, list_presets, list_recipes
from dc_ssdae.training.build import build_model
from dc_ssdae.training.recipe import Phase, Recipe, check_phase_name, read_recipe, recipe_mapping, resolved_recipe

RECIPE = Recipe(
    [
        Phase("low", run_config("photos"), None),
        Phase("latent", run_config("photos", train=["decoder.latent_inputs"], steps=3), "low"),
        Phase("other", run_config("photos", init_from="saved"), None),
        Phase("head_2", run_config("photos", train=["decoder.head"], losses={"kl": 0.0}), "low"),
    ]
)


def write(folder: Path, content: dict[str, Any] | str | bytes) -> Path:
    """Write a recipe's file; gives the folder."""
    text = content if isinstance(content, str | bytes) else dump_yaml(content)
    (folder / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def changed(name: str, **sections: Any) -> dict[str, Any]:
    """`RECIPE` as plain data, with sections of a phase replaced."""
    mapping = recipe_mapping(RECIPE)
    mapping["phases"][name] = {**mapping["phases"][name], **sections}
    return mapping


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_recipe(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert read_recipe(write(tmp_path, recipe_mapping(RECIPE))) == RECIPE


@pytest.mark.parametrize("name", ["", "a b", "..", "1st", "é", None])
def test_a_name_that_is_none_is_refused(name: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a phase is called"):
        check_phase_name(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("phases: [low]", "recipe.yaml has no phases"),
        ("phases: {a b: {}}", "a phase is called 'a b'"),
        ("phases: {low: }", "phases.low of "),
        ("phases: {low: {}}", "phase low of "),
        (changed("latent", starts_from="head_2"), "starts from 'head_2', which is no earlier phase"),
        (changed("latent", starts_from=["low"]), "starts from ['low'], which is no earlier phase"),
        (changed("other", starts_from="low"), "phases.other has both starts_from and training.init_from"),
        (changed("other", training={"lr": -1.0}), "phase other of "),
        (changed("other", traning={}), "unknown section of the configuration 'traning' (did you mean 'training'?)"),
    ],
)
def test_a_damaged_recipe_is_refused(content: dict[str, Any] | str, message: str, tmp_path: Path) -> None:
    assert message in refusal(write(tmp_path, content))


pieces = st.sampled_from(["{", "}", "[", "- ", ": ", "null", "\n", "  ", "&a [*a]", "1e9", "starts_from", "low", "é"])


@st.composite
def mutated_recipes(draw: st.DrawFn) -> bytes:
    """A written recipe after one to three mutations of its bytes."""
    content = dump_yaml(recipe_mapping(RECIPE)).encode()
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
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


@pytest.fixture(scope="module")
def mutated_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the mutations are written, one after the other."""
    return tmp_path_factory.mktemp("mutations")


@settings(max_examples=30, derandomize=True, deadline=None)
@given(content=mutated_recipes())
def test_mutated_recipes_are_read_or_refused_in_one_line(content: bytes, mutated_folder: Path) -> None:
    write(mutated_folder, content)
    try:
        recipe = read_recipe(mutated_folder)
    except InputError as error:
        message = str(error)
    else:
        message = ""
        assert read_recipe(write(mutated_folder, recipe_mapping(recipe))) == recipe
    assert len(message.splitlines()) <= 1


def test_reading_a_recipe_needs_no_torch(tmp_path: Path) -> None:
    write(tmp_path, recipe_mapping(RECIPE))
    program = f"""
import sys
from pathlib import Path
from dc_ssdae.training.recipe import read_recipe
read_recipe(Path({str(tmp_path)!r}))
print([name for name in ("torch", "numpy", "diffusers", "PIL", "accelerate") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the packaged recipes ---


@pytest.mark.parametrize("preset", list_presets())
@pytest.mark.parametrize("name", list_recipes())
def test_a_packaged_recipe_fits_every_preset(name: str, preset: str) -> None:
    """Its groups are there, its sizes divide, and each phase but the first trains a part of the model."""
    recipe = resolved_recipe(parse_recipe(["--recipe", name, "--config", preset]).recipe)
    assert len({str(phase.config.model) for phase in recipe.phases}) == 1
    config = recipe.phases[0].config
    with init_empty_weights():
        groups = parameter_groups(build_model(config.model))
    for phase in recipe.phases:
        assert phase.config.data.image_size % config.model.downsample_factor == 0
        named = [group for group in phase.config.training.train or groups if not group.startswith("losses.")]
        chosen = select_groups(groups, named)
        assert 0 < len(chosen) <= len(groups)


def test_three_phase_is_what_it_says() -> None:
    recipe = parse_recipe(["--recipe", "three_phase", "--config", "dc_f32c32_eqm"]).recipe
    low, latent, head = recipe.phases
    assert [phase.starts_from for phase in recipe.phases] == [None, low.name, latent.name]
    assert [phase.config.data.image_size for phase in recipe.phases] == [256, 512, 256]
    with init_empty_weights():
        groups = parameter_groups(build_model(low.config.model))
    assert low.config.training.train is None
    chosen = [select_groups(groups, phase.config.training.train or list(groups)) for phase in (latent, head)]
    assert chosen == [
        ["encoder.stages.5", "encoder.latent_head", "decoder.latent_inputs"],
        ["decoder.head"],
    ]
    rates = [phase.config.training.lr for phase in recipe.phases]
    assert [rate / rates[0] for rate in rates] == pytest.approx([1.0, 1.6 / 6.4, 5.4 / 6.4], rel=0.02)
    # What a loss term has learnt in the first phase is used by the second; nothing changes it there.
    assert low.config.losses["repa"] == latent.config.losses["repa"]
    assert head.config.losses["repa"].weight == head.config.losses["kl"].weight == 0.0
    for phase in (latent, head):  # averaged from where they start
        assert phase.config.training.ema_start == 0
