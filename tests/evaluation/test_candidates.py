"""The autoencoders that can be measured: how they are named, how they are opened, and what they give."""

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.models.modeling_utils import ModelMixin
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import TINY_DECODER, image, tiny
from torch import Tensor, nn
from torchvision.transforms import functional as tvf

from dc_ssdae import DCSSDAE, DiagonalGaussian, InputError
from dc_ssdae.data.images import to_model_range, to_uint8
from dc_ssdae.evaluation.candidate_names import CandidateSpec, name_apart, open_candidate, parse_candidate
from dc_ssdae.evaluation.candidates import (
    RANDOM_WEIGHTS,
    BicubicCandidate,
    Candidate,
    CodecCandidate,
    DiffusersCandidate,
    OurCandidate,
    PythonCandidate,
)
from dc_ssdae.presets import list_presets

HERE = __name__

WEIGHTS = "diffusion_pytorch_model.safetensors"


def opened(text: str, **given: Any) -> Candidate:
    return open_candidate(parse_candidate(text), **given)


def refusal(work: Callable[[], object]) -> str:
    """The one line of an InputError."""
    with pytest.raises(InputError) as error:
        work()
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def complaint(text: str) -> str | None:
    """What is wrong with a candidate's name; None where it is read."""
    try:
        spec = parse_candidate(text)
    except InputError as error:
        return str(error)
    assert spec.kind in ("ours", "preset", "diffusers", "python", "jpeg", "webp", "bicubic")
    assert spec.value
    return None


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@torch.no_grad()
def reconstruct(candidate: Candidate, x: Tensor, given: Sequence[torch.Generator] | None = None) -> Tensor:
    return candidate.reconstruct(x, given)[1].images


def latent_shape(candidate: Candidate, x: Tensor) -> tuple[int, ...]:
    with torch.no_grad():
        posterior = candidate.encode(x).posterior
    assert posterior is not None
    return tuple(posterior.mean.shape)


# --- naming ---


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestParsing:
    @pytest.mark.parametrize(
        ("text", "label", "kind", "value"),
        [
            ("jpeg:75", "jpeg:75", "jpeg", "75"),
            ("jpeg:1", "jpeg:1", "jpeg", "1"),
            ("webp:100", "webp:100", "webp", "100"),
            ("bicubic:8", "bicubic:8", "bicubic", "8"),
            ("bicubic:1", "bicubic:1", "bicubic", "1"),
            ("bicubic:2.5", "bicubic:2.5", "bicubic", "2.5"),
            ("preset:demo", "preset:demo", "preset", "demo"),
            ("python:package.module.name", "name", "python", "package.module.name"),
            ("python:module.name", "name", "python", "module.name"),
            ("owner/name", "owner/name", "ours", "owner/name"),
            ("diffusers:owner/name", "owner/name", "diffusers", "owner/name"),
            ("JPEG at 75=jpeg:75", "JPEG at 75", "jpeg", "75"),
            (" mine =preset:demo", "mine", "preset", "demo"),
            ("DC-AE f32c32 (SANA)=diffusers:owner/name", "DC-AE f32c32 (SANA)", "diffusers", "owner/name"),
            ("mine=owner/name", "mine", "ours", "owner/name"),
            ("γ=python:module.name", "γ", "python", "module.name"),
            ("preset: demo ", "preset:demo", "preset", "demo"),
        ],
    )
    def test_it_reads_every_form_with_and_without_a_label(self, text: str, label: str, kind: str, value: str) -> None:
        assert parse_candidate(text) == CandidateSpec(label, kind, value)

    @pytest.mark.parametrize(
        ("text", "label", "kind", "value"),
        [
            ("run", "run", "ours", "run"),
            ("run/", "run", "ours", "run/"),
            ("run/model", "run", "ours", "run/model"),
            ("./run/model/", "run", "ours", "./run/model/"),
            ("diffusers:run/vae", "run", "diffusers", "run/vae"),
            ("diffusers:run", "run", "diffusers", "run"),
            ("mine=run", "mine", "ours", "run"),
        ],
    )
    def test_a_folder_is_called_by_its_own_name(self, here: Path, text: str, label: str, kind: str, value: str) -> None:
        for name in ("model", "vae"):
            (here / "run" / name).mkdir(parents=True)
        assert parse_candidate(text) == CandidateSpec(label, kind, value)

    def test_the_current_folder_has_a_name_too(self, here: Path) -> None:
        assert parse_candidate(".") == CandidateSpec(here.name, "ours", ".")

    @pytest.mark.parametrize(
        ("text", "label", "kind", "value"),
        [
            ("lr=0.1", "lr=0.1", "ours", "lr=0.1"),
            ("runs/lr=0.1", "lr=0.1", "ours", "runs/lr=0.1"),
            ("mine=runs/lr=0.1", "mine", "ours", "runs/lr=0.1"),
            ("mine=lr=0.1", "mine", "ours", "lr=0.1"),
            ("diffusers:runs/lr=0.1", "lr=0.1", "diffusers", "runs/lr=0.1"),
            ("mine=diffusers:runs/lr=0.1", "mine", "diffusers", "runs/lr=0.1"),
            ("a:b=c", "a:b=c", "ours", "a:b=c"),
        ],
    )
    def test_an_equals_sign_in_a_path_stays_there(
        self, here: Path, text: str, label: str, kind: str, value: str
    ) -> None:
        for name in ("lr=0.1", "runs/lr=0.1", "a:b=c"):
            (here / name).mkdir(parents=True)
        assert parse_candidate(text) == CandidateSpec(label, kind, value)
        assert parse_candidate(str(here / "runs" / "lr=0.1")).label == "lr=0.1"

    @pytest.mark.parametrize("kind", ["jpeg", "webp"])
    @pytest.mark.parametrize("quality", ["0", "101", "7.5", "-1", "best", "1e1", "75 80"])
    def test_a_quality_is_a_whole_number_from_1_to_100(self, kind: str, quality: str) -> None:
        told = refusal(lambda: parse_candidate(f"{kind}:{quality}"))
        assert told == f"'{kind}:{quality}': the quality is a whole number from 1 to 100, as in {kind}:75"

    @pytest.mark.parametrize("factor", ["0", "0.99", "-8", "nan", "inf", "1e999", "much"])
    def test_a_factor_is_a_number_from_1_on(self, factor: str) -> None:
        told = refusal(lambda: parse_candidate(f"bicubic:{factor}"))
        assert told == f"'bicubic:{factor}': the factor is a number from 1 on, as in bicubic:8"

    def test_an_unknown_preset_has_the_known_ones_listed(self) -> None:
        told = refusal(lambda: parse_candidate("preset:demmo"))
        assert told.startswith("unknown preset 'demmo' (did you mean 'demo'?)")
        assert all(name in told for name in list_presets())

    @pytest.mark.parametrize("path", ["name", "module.", ".name", "a..b", "module:name", "a/b.c", "a.b c", "a.b()"])
    def test_a_python_name_has_its_module(self, path: str) -> None:
        told = refusal(lambda: parse_candidate(f"python:{path}"))
        assert told.endswith(": write python:MODULE.NAME, as in python:my_package.my_module.my_autoencoder")

    @pytest.mark.parametrize(
        "text", ["", " ", "mine=", "mine= ", "jpeg:", "preset: ", "png:75", "JPEG:75", "mine=png:75", "a:b=jpeg:75"]
    )
    def test_what_names_nothing_has_the_forms_listed(self, here: Path, text: str) -> None:
        told = refusal(lambda: parse_candidate(text))
        assert told.startswith(f"{text!r} names no model; it is the folder or hub id of a model of this package")
        assert "bicubic:FACTOR" in told

    @pytest.mark.parametrize(
        "text", ["run", "./run", "a/b/run", "/no/such/run", "diffusers:run", "mine=run", "mine=a=b"]
    )
    def test_a_folder_that_is_not_there(self, here: Path, text: str) -> None:
        value = text.removeprefix("mine=").removeprefix("diffusers:")
        assert f"there is no folder {value!r}" in refusal(lambda: parse_candidate(text))

    def test_a_misspelt_path_is_not_taken_for_a_hub_id(self, here: Path) -> None:
        (here / "runs").mkdir()
        assert "there is no folder 'runs/mine'" in refusal(lambda: parse_candidate("runs/mine"))

    @settings(max_examples=400, derandomize=True, deadline=None)
    @given(
        text=st.builds(
            "".join,
            st.lists(
                st.one_of(
                    st.sampled_from(
                        ["jpeg:", "webp:", "bicubic:", "preset:", "python:", "diffusers:", "=", "/", ".", "9"]
                    ),
                    st.text(max_size=8),
                    st.integers().map(str),
                    st.floats().map(str),
                ),
                max_size=6,
            ),
        )
    )
    @example("\0")
    @example("diffusers:a\0b/c")
    @example("\ud800/\ud800")
    @example("bicubic:1__0")
    @example("jpeg:²")
    def test_no_text_raises_anything_but_an_input_error(self, text: str) -> None:
        told = complaint(text)
        assert told is None or (told and "\n" not in told)

    @pytest.mark.parametrize("form", ["{}", "diffusers:{}", "mine={}", "{}/b", "diffusers:{}/b", "a/{}", "{}:b", "{}="])
    def test_a_name_too_long_for_a_file_is_an_input_error(self, form: str) -> None:
        text = form.format(300 * "x")
        assert "\n" not in (complaint(text) or "may be a hub id")

    @pytest.mark.parametrize("kind", ["jpeg", "webp", "bicubic"])
    def test_a_number_of_too_many_digits_is_an_input_error(self, kind: str) -> None:
        assert f"as in {kind}:" in refusal(lambda: parse_candidate(f"{kind}:{5000 * '9'}"))


class TestNamingApart:
    def test_different_names_stay(self) -> None:
        specs = [parse_candidate(text) for text in ("jpeg:75", "jpeg:80", "mine=jpeg:75", "owner/name")]
        assert name_apart(specs) == specs
        assert name_apart([]) == []

    def test_folders_of_the_same_name_get_more_of_their_paths(self, here: Path) -> None:
        for name in ("first/run", "second/run", "third"):
            (here / name).mkdir(parents=True)
        specs = [parse_candidate(text) for text in ("first/run", "third", "diffusers:second/run")]
        assert [spec.label for spec in specs] == ["run", "third", "run"]
        apart = name_apart(specs)
        assert [spec.label for spec in apart] == ["first/run", "third", "second/run"]
        assert [(spec.kind, spec.value) for spec in apart] == [(spec.kind, spec.value) for spec in specs]

    @pytest.mark.parametrize(
        ("first", "second", "label"),
        [
            ("jpeg:75", "jpeg:75", "jpeg:75"),
            ("mine=jpeg:75", "mine=webp:75", "mine"),
            ("python:a.model", "python:b.model", "model"),
            ("owner/name", "owner/name", "owner/name"),
            ("run", "run", "run"),
            ("best=jpeg:75", "python:a.best", "best"),
        ],
    )
    def test_two_of_one_name_are_refused(self, here: Path, first: str, second: str, label: str) -> None:
        (here / "run").mkdir()
        told = refusal(lambda: name_apart([parse_candidate(first), parse_candidate(second)]))
        assert told == f"two models have the name {label!r}; give one another name with LABEL=…"


# --- models of this package ---


class Shrinking(nn.Module):
    """A user's own encoder."""

    def __init__(self, latent_channels: int, downsample_factor: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 2 * latent_channels, downsample_factor, downsample_factor)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian.from_moments(self.patch(x))


@pytest.fixture(scope="module")
def our_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("ours") / "mine"
    tiny().save_pretrained(folder)
    return folder


class TestOurs:
    def test_it_reconstructs_as_the_model_does(self, our_folder: Path) -> None:
        model, x = DCSSDAE.from_pretrained(our_folder), image(2)
        candidate = opened(str(our_folder))
        assert isinstance(candidate, OurCandidate)
        assert candidate.remarks == []
        assert candidate.splits
        assert candidate.count_parameters() == sum(parameter.numel() for parameter in model.parameters())
        with torch.no_grad():
            encoded, decoded = candidate.reconstruct(x)
            assert torch.equal(decoded.images, model(x).sample)
        assert encoded.bits is None
        assert latent_shape(candidate, x) == (2, 4, 4, 6)
        assert decoded.num_evaluations is not None
        assert decoded.num_evaluations.tolist() == [1, 1]

    def test_a_sample_of_the_latent_is_drawn_by_an_images_own_generator(self, our_folder: Path) -> None:
        candidate, x = opened(str(our_folder)), image(2)
        with torch.no_grad():
            posterior = DCSSDAE.from_pretrained(our_folder).encode(x).latent_dist
            encoded = candidate.encode(x)
            z = candidate.latent(encoded, generators(2))
        assert torch.equal(z, posterior.sample(generators(2)))
        assert not torch.equal(z, posterior.mode())

    def test_what_decoding_takes_is_handed_on(self, our_folder: Path) -> None:
        x = image(2)
        candidate = opened(str(our_folder), decoding={"num_steps": 3})
        model = DCSSDAE.from_pretrained(our_folder)
        with torch.no_grad():
            decoded = candidate.reconstruct(x)[1]
            expected = model.decode(model.encode(x).latent_dist.mode(), num_steps=3)
        assert torch.equal(decoded.images, expected.sample)
        assert decoded.num_evaluations is not None
        assert decoded.num_evaluations.tolist() == [3, 3]

    def test_a_training_runs_folder_means_its_model(self, our_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("model: {}\n")
        spec = parse_candidate(str(tmp_path))
        assert spec.label == tmp_path.name
        assert "holds no model" in refusal(lambda: open_candidate(spec))
        shutil.copytree(our_folder, tmp_path / "model")
        x = image()
        assert torch.equal(reconstruct(open_candidate(spec), x), reconstruct(opened(str(our_folder)), x))
        assert parse_candidate(str(tmp_path / "model")).label == tmp_path.name

    def test_it_can_be_opened_in_half_precision(self, our_folder: Path) -> None:
        candidate = opened(str(our_folder), dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in candidate.module().parameters()} == {torch.bfloat16}
        assert reconstruct(candidate, image()).isfinite().all()

    def test_a_users_classes_are_handed_on(self, tmp_path: Path) -> None:
        part = {"class_path": "Elsewhere"}
        elsewhere = type("Elsewhere", (Shrinking,), {"__module__": "no_such_module", "__qualname__": "Elsewhere"})
        DCSSDAE(4, 8, encoder=part, decoder=TINY_DECODER, classes=[elsewhere]).save_pretrained(tmp_path)
        assert "no_such_module.Elsewhere" in refusal(lambda: opened(str(tmp_path)))
        assert reconstruct(opened(str(tmp_path), classes=[elsewhere]), image()).shape == (1, 3, 32, 48)

    def test_damaged_files_are_refused(self, our_folder: Path, tmp_path: Path) -> None:
        folder = tmp_path / "mine"
        shutil.copytree(our_folder, folder)
        state = load_file(folder / WEIGHTS)
        name = sorted(state)[0]
        save_file({key: value for key, value in state.items() if key != name}, folder / WEIGHTS, {"format": "pt"})
        assert name in refusal(lambda: opened(str(folder)))
        (folder / "config.json").write_text("{")
        assert "is no JSON object" in refusal(lambda: opened(str(folder)))
        (folder / "config.json").unlink()
        assert "config.json is missing" in refusal(lambda: opened(str(folder)))

    @pytest.mark.parametrize("form", ["no-owner/no-model", "diffusers:no-owner/no-model"])
    def test_the_hub_is_out_of_reach(self, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "no-owner/no-model" in refusal(lambda: opened(form))

    def test_a_preset_has_random_weights_and_says_so(self) -> None:
        before = torch.get_rng_state()
        first = opened("preset:demo")
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(7)
        second = opened("mine=preset:demo", decoding={"num_steps": 2})
        assert first.remarks == second.remarks == [RANDOM_WEIGHTS]
        states = [candidate.module().state_dict() for candidate in (first, second)]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        assert not any(module.training for module in first.module().modules())
        assert reconstruct(first, image()).shape == (1, 3, 32, 48)


# --- diffusers ---


def small_models() -> dict[str, ModelMixin]:
    blocks = {
        "block_out_channels": (8, 16),
        "down_block_types": 2 * ("DownEncoderBlock2D",),
        "up_block_types": 2 * ("UpDecoderBlock2D",),
        "norm_num_groups": 4,
    }
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 16, 32),
            "layers_per_block": (1, 1, 1),
            "qkv_multiscales": ((), (), (5,)),
        }.items()
    }
    tiny_sides = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    return {
        "AutoencoderKL": AutoencoderKL(latent_channels=4, **blocks),
        "AutoencoderDC": AutoencoderDC(latent_channels=8, attention_head_dim=8, **sides),
        "AutoencoderTiny": AutoencoderTiny(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **tiny_sides),
        "VQModel": VQModel(latent_channels=3, num_vq_embeddings=16, **blocks),
    }


LATENTS = {
    "AutoencoderKL": (2, 4, 16, 24),
    "AutoencoderDC": (2, 8, 8, 12),
    "AutoencoderTiny": (2, 4, 16, 24),
    "VQModel": (2, 3, 16, 24),
}
"""Of two images of 32×48."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each of the small models, by the class's name."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("diffusers")
    for name, model in small_models().items():
        model.save_pretrained(folder / name)
    return folder


def directly(name: str, folder: Path, x: Tensor) -> Tensor:
    """What diffusers gives, loaded and called as its documentation has it."""
    kinds: dict[str, Any] = {
        "AutoencoderKL": AutoencoderKL,
        "AutoencoderDC": AutoencoderDC,
        "AutoencoderTiny": AutoencoderTiny,
        "VQModel": VQModel,
    }
    model = kinds[name].from_pretrained(folder).eval()
    with torch.no_grad():
        encoded = model.encode(x)
        latents = {
            "AutoencoderKL": lambda: encoded.latent_dist.mode(),
            "AutoencoderDC": lambda: encoded.latent,
            "AutoencoderTiny": lambda: encoded.latents,
            "VQModel": lambda: encoded.latents,
        }[name]()
        return model.decode(latents).sample


def rewrite(saved: Path, folder: Path, config: Any = None, weights: Any = None) -> str:
    """Copy the saved KL model with another config (a mapping of changes, or text) and with other weights."""
    shutil.copytree(saved / "AutoencoderKL", folder, dirs_exist_ok=True)
    if isinstance(config, dict):
        config = json.dumps({**json.loads((folder / "config.json").read_text()), **config})
    if isinstance(config, str):
        (folder / "config.json").write_text(config)
    if isinstance(weights, dict):
        save_file(weights, folder / WEIGHTS, {"format": "pt"})
    elif isinstance(weights, bytes):
        (folder / WEIGHTS).write_bytes(weights)
    return f"diffusers:{folder}"


class TestDiffusers:
    @pytest.mark.parametrize("name", LATENTS)
    def test_it_reconstructs_as_diffusers_does(self, saved: Path, name: str) -> None:
        x = image(2)
        candidate = opened(f"diffusers:{saved / name}")
        assert isinstance(candidate, DiffusersCandidate)
        assert torch.equal(reconstruct(candidate, x), directly(name, saved / name, x))
        assert latent_shape(candidate, x) == LATENTS[name]
        assert candidate.remarks == []
        expected = sum(tensor.numel() for tensor in load_file(saved / name / WEIGHTS).values())
        assert candidate.count_parameters() == expected
        assert not any(module.training for module in candidate.module().modules())

    @pytest.mark.parametrize("name", LATENTS)
    def test_only_kl_has_a_variance(self, saved: Path, name: str) -> None:
        with torch.no_grad():
            posterior = opened(f"diffusers:{saved / name}").encode(image()).posterior
        assert (posterior.logvar is not None) == (name == "AutoencoderKL")

    def test_kls_sample_is_drawn_by_an_images_own_generator(self, saved: Path) -> None:
        x = image(2)
        candidate = opened(f"diffusers:{saved / 'AutoencoderKL'}")
        model = AutoencoderKL.from_pretrained(saved / "AutoencoderKL")
        with torch.no_grad():
            theirs = model.encode(x).latent_dist
            noise = torch.stack([torch.randn(theirs.mean.shape[1:], generator=given) for given in generators(2)])
            expected = model.decode(theirs.mean + theirs.std * noise).sample
        sampled = reconstruct(candidate, x, generators(2))
        torch.testing.assert_close(sampled, expected, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(sampled, reconstruct(candidate, x), atol=1e-3)
        torch.testing.assert_close(reconstruct(candidate, x[1:], generators(2)[1:]), sampled[1:], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("name", ["AutoencoderDC", "AutoencoderTiny", "VQModel"])
    def test_a_sample_of_a_point_is_the_point(self, saved: Path, name: str) -> None:
        x = image(2)
        candidate = opened(f"diffusers:{saved / name}")
        assert torch.equal(reconstruct(candidate, x, generators(2)), reconstruct(candidate, x))

    @pytest.mark.parametrize("name", LATENTS)
    def test_a_config_alone_gives_random_weights_and_says_so(self, saved: Path, tmp_path: Path, name: str) -> None:
        shutil.copy(saved / name / "config.json", tmp_path)
        before = torch.get_rng_state()
        first = opened(f"diffusers:{tmp_path}")
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(7)
        second = opened(f"diffusers:{tmp_path}")
        x = image(2)
        assert first.remarks == [RANDOM_WEIGHTS]
        assert torch.equal(reconstruct(first, x), reconstruct(second, x))
        assert latent_shape(first, x) == LATENTS[name]
        assert not any(module.training for module in first.module().modules())

    def test_a_pipelines_autoencoder_is_in_its_sub_folder(self, saved: Path, tmp_path: Path) -> None:
        shutil.copytree(saved / "AutoencoderKL", tmp_path / "pipeline" / "vae")
        (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        x = image(2)
        expected = directly("AutoencoderKL", saved / "AutoencoderKL", x)
        for text in (f"diffusers:{tmp_path / 'pipeline'}", f"diffusers:{tmp_path / 'pipeline' / 'vae'}"):
            assert parse_candidate(text).label == "pipeline"
            assert torch.equal(reconstruct(opened(text), x), expected)

    def test_a_pipelines_config_alone_gives_random_weights(self, saved: Path, tmp_path: Path) -> None:
        (tmp_path / "vae").mkdir()
        shutil.copy(saved / "AutoencoderKL" / "config.json", tmp_path / "vae")
        candidate = opened(f"diffusers:{tmp_path}")
        assert candidate.remarks == [RANDOM_WEIGHTS]
        assert latent_shape(candidate, image(2)) == LATENTS["AutoencoderKL"]

    @pytest.mark.parametrize("place", ["", "vae"])
    def test_a_folder_of_ours_gives_one_of_ours(self, our_folder: Path, tmp_path: Path, place: str) -> None:
        shutil.copytree(our_folder, tmp_path / "mine" / place)
        x = image()
        candidate = opened(f"diffusers:{tmp_path / 'mine'}", decoding={"num_steps": 2})
        assert isinstance(candidate, OurCandidate)
        expected = opened(str(our_folder), decoding={"num_steps": 2})
        assert torch.equal(reconstruct(candidate, x), reconstruct(expected, x))

    @pytest.mark.parametrize("config_alone", [False, True])
    def test_it_can_be_opened_in_half_precision(self, saved: Path, tmp_path: Path, config_alone: bool) -> None:
        shutil.copytree(saved / "AutoencoderKL", tmp_path / "kl")
        if config_alone:
            (tmp_path / "kl" / WEIGHTS).unlink()
        candidate = opened(f"diffusers:{tmp_path / 'kl'}", dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in candidate.module().parameters()} == {torch.bfloat16}
        assert reconstruct(candidate, image()).isfinite().all()

    def test_rae_takes_and_gives_images_from_0_to_1(self) -> None:
        seen: list[Tensor] = []

        class AutoencoderRAE(nn.Module):
            dtype, encoder_mean = torch.float32, 0.5

            def encode(self, x: Tensor) -> Any:
                seen.append(x)
                return SimpleNamespace(latent=x.mean(dim=1, keepdim=True))

            def decode(self, z: Tensor) -> Any:
                return SimpleNamespace(sample=z.expand(-1, 3, -1, -1))

        x = image(2)
        images = reconstruct(DiffusersCandidate(AutoencoderRAE()), x)
        torch.testing.assert_close(seen[0], (x + 1) / 2)
        torch.testing.assert_close(images, x.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1), atol=1e-6, rtol=0)

    @pytest.mark.parametrize(
        "name",
        ["UNet2DModel", "StableDiffusionPipeline", "AutoencoderMine", "DDIMScheduler", "logging", "", None, 3, ["x"]],
    )
    def test_a_class_that_is_no_autoencoder_is_refused(self, saved: Path, tmp_path: Path, name: object) -> None:
        told = refusal(lambda: opened(rewrite(saved, tmp_path, config={"_class_name": name})))
        assert told == f"diffusers:{tmp_path}: {name!r} is no autoencoder of diffusers"

    @pytest.mark.parametrize("text", ["", "{", "[1]", '"AutoencoderKL"', "null", "3", "{}"])
    def test_a_damaged_config_is_refused(self, saved: Path, tmp_path: Path, text: str) -> None:
        assert refusal(lambda: opened(rewrite(saved, tmp_path, config=text))).startswith(f"diffusers:{tmp_path}: ")

    @pytest.mark.parametrize("with_weights", [True, False])
    @pytest.mark.parametrize(
        "changes", [{"block_out_channels": "x"}, {"norm_num_groups": 7}, {"latent_channels": None}, {"act_fn": "no"}]
    )
    def test_a_config_that_fits_no_model_is_refused(
        self, saved: Path, tmp_path: Path, changes: dict[str, Any], with_weights: bool
    ) -> None:
        text = rewrite(saved, tmp_path, config=changes)
        if not with_weights:
            (tmp_path / WEIGHTS).unlink()
        assert refusal(lambda: opened(text)).startswith(f"diffusers:{tmp_path}")

    def test_a_folder_without_a_config_is_refused(self, tmp_path: Path) -> None:
        told = refusal(lambda: opened(f"diffusers:{tmp_path}"))
        assert told == f"diffusers:{tmp_path}: there is no config.json, neither there nor in vae/"

    def test_a_pickle_is_never_loaded(self, saved: Path, tmp_path: Path) -> None:
        text = rewrite(saved, tmp_path)
        torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "diffusion_pytorch_model.bin")
        assert opened(text).remarks == []
        (tmp_path / WEIGHTS).unlink()
        told = refusal(lambda: opened(text))
        assert f"{tmp_path / 'diffusion_pytorch_model.bin'} is a pickle file, which could run code" in told
        assert str(tmp_path / WEIGHTS) in told

    def test_an_index_that_names_a_pickle_is_refused(
        self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = rewrite(saved, tmp_path)
        state = load_file(tmp_path / WEIGHTS)
        torch.save(state, tmp_path / "w.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, "w.bin")}
        (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        monkeypatch.setattr(torch, "load", lambda *given, **more: pytest.fail("unpickled"))
        assert "w.bin" in refusal(lambda: opened(text))
        (tmp_path / "w.bin").unlink()
        (tmp_path / WEIGHTS).unlink()
        assert "w.bin" in refusal(lambda: opened(text))

    def test_what_is_loaded_is_called_by_its_folder(self, saved: Path) -> None:
        folder = str(saved / "AutoencoderKL")
        assert opened(f"diffusers:{folder}").module().config["_name_or_path"] == folder

    def test_missing_tensors_are_refused(self, saved: Path, tmp_path: Path) -> None:
        state = load_file(saved / "AutoencoderKL" / WEIGHTS)
        first, second, third, *rest = sorted(state)
        told = refusal(lambda: opened(rewrite(saved, tmp_path, weights={name: state[name] for name in rest})))
        assert all(f"missing: {name}" in told for name in (first, second, third))

    def test_a_tensor_left_over_is_refused(self, saved: Path, tmp_path: Path) -> None:
        state = {**load_file(saved / "AutoencoderKL" / WEIGHTS), "encoder.another": torch.zeros(1)}
        told = refusal(lambda: opened(rewrite(saved, tmp_path, weights=state)))
        assert "left over: encoder.another" in told

    def test_a_misshapen_tensor_is_refused(self, saved: Path, tmp_path: Path) -> None:
        state = {**load_file(saved / "AutoencoderKL" / WEIGHTS), "encoder.conv_in.bias": torch.zeros(9)}
        told = refusal(lambda: opened(rewrite(saved, tmp_path, weights=state)))
        assert told.startswith(f"diffusers:{tmp_path}")
        assert "encoder.conv_in.bias" in told

    @pytest.mark.parametrize("kind", ["empty", "junk", "cut short"])
    def test_a_damaged_file_is_refused(self, saved: Path, tmp_path: Path, kind: str) -> None:
        whole = (saved / "AutoencoderKL" / WEIGHTS).read_bytes()
        weights = {"empty": b"", "junk": b"no tensors", "cut short": whole[:-100]}[kind]
        told = refusal(lambda: opened(rewrite(saved, tmp_path, weights=weights)))
        assert told.startswith(f"diffusers:{tmp_path}: {tmp_path / WEIGHTS} is truncated, or no safetensors file")


# --- a user's own ---


def darker(x: Tensor) -> Tensor:
    return 0.5 * x


class Halving:
    """Keeps every second pixel."""

    def encode(self, x: Tensor) -> Any:
        return x[:, :, ::2, ::2]

    def decode(self, z: Tensor) -> Any:
        return z.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


class WithSettings(Halving):
    def __init__(self, factor: int) -> None:
        self.factor = factor


class Raising(Halving):
    def __init__(self) -> None:
        raise RuntimeError("first\nsecond")


class Outer:
    class Inner(Halving):
        pass


class Network(nn.Module):
    """With dropout, which eval mode switches off."""

    def __init__(self) -> None:
        super().__init__()
        self.shrink = nn.Conv2d(3, 5, 4, stride=4)
        self.enlarge = nn.ConvTranspose2d(5, 3, 4, stride=4)
        self.dropout = nn.Dropout(0.5)

    def encode(self, x: Tensor) -> Tensor:
        return self.dropout(self.shrink(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.enlarge(z)


class Whole(nn.Module):
    """A network from images to images."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


an_object = Halving()
a_number = 5
TOTAL = 3 * 5 * 16 + 5 + 5 * 3 * 16 + 3
"""Parameters of `Network`."""


def encoding(give: Callable[[Tensor], Any]) -> PythonCandidate:
    """A candidate whose `encode` wraps its latent in some way."""
    value = Halving()
    value.encode = lambda x: give(Halving().encode(x))  # type: ignore[method-assign]
    return PythonCandidate(value, "mine")


class TestPython:
    def test_a_function_does_all_its_work_in_decode(self) -> None:
        x = image(2)
        candidate = opened(f"python:{HERE}.darker")
        assert not candidate.splits
        encoded, decoded = candidate.reconstruct(x, generators(2))
        assert encoded.posterior is None
        assert torch.equal(decoded.images, 0.5 * x)
        assert candidate.count_parameters() is None
        assert candidate.module() is None
        assert candidate.to(torch.device("cpu")) is candidate

    @pytest.mark.parametrize("name", ["an_object", "Halving", "Outer.Inner"])
    def test_an_object_or_a_class_without_arguments(self, name: str) -> None:
        x = image(2)
        candidate = opened(f"python:{HERE}.{name}")
        assert candidate.splits
        assert latent_shape(candidate, x) == (2, 3, 16, 24)
        assert torch.equal(reconstruct(candidate, x)[:, :, ::2, 1::2], x[:, :, ::2, ::2])
        assert candidate.count_parameters() is None

    def test_a_network_is_in_eval_mode_and_its_parameters_are_counted(self) -> None:
        x = image(2)
        candidate = opened(f"python:{HERE}.Network")
        module = candidate.module()
        assert isinstance(module, Network)
        assert not any(part.training for part in module.modules())
        assert candidate.count_parameters() == TOTAL
        assert torch.equal(reconstruct(candidate, x), reconstruct(candidate, x))
        assert latent_shape(candidate, x) == (2, 5, 8, 12)
        assert candidate.to(torch.device("meta")) is candidate
        assert module.shrink.weight.is_meta

    def test_a_network_from_images_to_images(self) -> None:
        candidate = opened(f"python:{HERE}.Whole")
        assert not candidate.splits
        assert candidate.count_parameters() == 12
        assert reconstruct(candidate, image(2)).shape == (2, 3, 32, 48)

    @pytest.mark.parametrize("name", ["Network", "Whole"])
    def test_a_network_can_be_opened_in_half_precision(self, name: str) -> None:
        x = image(2)
        torch.manual_seed(0)
        half = opened(f"python:{HERE}.{name}", dtype=torch.bfloat16)
        torch.manual_seed(0)
        full = opened(f"python:{HERE}.{name}")
        assert {parameter.dtype for parameter in half.module().parameters()} == {torch.bfloat16}
        torch.testing.assert_close(reconstruct(half, x).float(), reconstruct(full, x), atol=0.05, rtol=0.05)

    @pytest.mark.parametrize(
        "give",
        [
            lambda z: z,
            lambda z: (z,),
            lambda z: SimpleNamespace(latents=z),
            lambda z: SimpleNamespace(latent=z),
            lambda z: SimpleNamespace(latent_dist=SimpleNamespace(mean=z)),
            lambda z: (SimpleNamespace(latents=z),),
            lambda z: torch.distributions.Normal(z, torch.ones_like(z)),
        ],
        ids=["tensor", "1-tuple", "latents", "latent", "latent_dist", "1-tuple of latents", "distribution"],
    )
    def test_an_encoder_may_give_its_latent_in_several_ways(self, give: Callable[[Tensor], Any]) -> None:
        x = image(2)
        posterior = encoding(give).encode(x).posterior
        assert posterior is not None
        assert torch.equal(posterior.mean, x[:, :, ::2, ::2])
        assert posterior.logvar is None

    @pytest.mark.parametrize(
        "give",
        [
            lambda z: SimpleNamespace(latent_dist=DiagonalGaussian(z, torch.full_like(z, -2.0))),
            lambda z: DiagonalGaussian(z, torch.full_like(z, -2.0)),
            lambda z: (DiagonalGaussian(z, torch.full_like(z, -2.0)),),
        ],
        ids=["latent_dist", "Gaussian", "1-tuple"],
    )
    def test_an_encoder_may_give_a_variance_too(self, give: Callable[[Tensor], Any]) -> None:
        x = image(2)
        candidate = encoding(give)
        encoded = candidate.encode(x)
        assert encoded.posterior is not None
        assert encoded.posterior.logvar is not None
        assert (encoded.posterior.logvar == -2.0).all()
        noise = torch.stack([torch.randn(3, 16, 24, generator=given) for given in generators(2)])
        sample = candidate.latent(encoded, generators(2))
        torch.testing.assert_close(sample, x[:, :, ::2, ::2] + torch.exp(torch.tensor(-1.0)) * noise)

    @pytest.mark.parametrize(
        ("give", "kind"),
        [
            (lambda z: None, "NoneType"),
            (lambda z: (z, z), "tuple"),
            (lambda z: [z], "list"),
            (lambda z: SimpleNamespace(code=z), "SimpleNamespace"),
            (lambda z: z.numpy(), "ndarray"),
        ],
        ids=["None", "pair", "list", "another field", "array"],
    )
    def test_an_encoder_that_gives_no_latent(self, give: Callable[[Tensor], Any], kind: str) -> None:
        told = refusal(lambda: encoding(give).encode(image()))
        assert told == f"encode of mine gives {kind}, not a latent: a tensor, latent_dist or latents"

    @pytest.mark.parametrize(
        "give", [lambda x: x, lambda x: (x,), lambda x: SimpleNamespace(sample=x)], ids=["tensor", "1-tuple", "sample"]
    )
    def test_a_decoder_may_give_its_images_in_several_ways(self, give: Callable[[Tensor], Any]) -> None:
        x = image(2)
        assert torch.equal(reconstruct(PythonCandidate(give, "mine"), x), x)

    @pytest.mark.parametrize(
        "give",
        [lambda x: None, lambda x: [x], lambda x: x.numpy(), lambda x: (None,), lambda x: ()],
        ids=["None", "list", "array", "1-tuple of None", "empty tuple"],
    )
    def test_a_decoder_that_gives_no_images(self, give: Callable[[Tensor], Any]) -> None:
        told = refusal(lambda: reconstruct(PythonCandidate(give, "mine"), image()))
        assert told.startswith("images (B, 3, H, W) are expected from a decoder, not ")

    @pytest.mark.parametrize(
        ("name", "reason"),
        [("WithSettings", "TypeError: WithSettings.__init__() missing"), ("Raising", "RuntimeError: first second")],
    )
    def test_a_class_that_cannot_be_made_without_arguments(self, name: str, reason: str) -> None:
        told = refusal(lambda: opened(f"python:{HERE}.{name}"))
        assert told.startswith(f"python:{HERE}.{name}: making the class without arguments failed with {reason}")
        assert told.endswith("; name an object or a function instead")

    def test_what_is_neither_a_function_nor_an_autoencoder_is_refused(self) -> None:
        told = refusal(lambda: opened(f"python:{HERE}.a_number"))
        assert told.endswith(
            "is neither a function from images to images nor an object with encode and decode, but int"
        )

    @pytest.mark.parametrize("name", ["nothing", "Outer.nothing", "Nothing.nothing"])
    def test_a_name_that_the_module_lacks(self, name: str) -> None:
        assert "othing" in refusal(lambda: opened(f"python:{HERE}.{name}"))

    @pytest.mark.parametrize("path", ["no_such_module.name", "no_such_module.part.name", "no_such_module.a.b.c", "1.2"])
    def test_a_module_that_is_not_there(self, path: str) -> None:
        assert path.split(".")[0] in refusal(lambda: opened(f"python:{path}"))

    def test_a_class_inside_a_class_inside_a_class_that_is_not_there(self) -> None:
        assert "Inner" in refusal(lambda: opened(f"python:{HERE}.Outer.Inner.nothing"))

    def test_a_module_of_the_current_folder(self, here: Path) -> None:
        (here / "own_candidate_module.py").write_text("def brighter(x):\n    return x + 0.25\n")
        x = image()
        assert torch.equal(reconstruct(opened("python:own_candidate_module.brighter"), x), x + 0.25)

    @pytest.mark.parametrize("name", ["f", "Class.f"])
    def test_a_module_that_raises_is_named_with_its_line(self, here: Path, name: str) -> None:
        (here / "own_raising_module.py").write_text("x = 1\nraise RuntimeError('first\\nsecond')\n")
        told = refusal(lambda: opened(f"python:own_raising_module.{name}"))
        assert "RuntimeError: first second" in told
        assert "own_raising_module.py, line 2" in told


# --- codecs and resizing ---


def photo(height: int = 40, width: int = 56) -> Tensor:
    """Smooth colours and some grain, uint8 (3, H, W)."""
    rows, columns = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 5, width)
    smooth = torch.stack([torch.sin(rows + columns), torch.cos(rows * columns), torch.sin(2 * rows - columns)])
    return to_uint8(0.8 * smooth + 0.1 * torch.randn(3, height, width))


def by_pillow(pixels: Tensor, kind: str, quality: int) -> tuple[Tensor, int]:
    """What Pillow makes of an image, and how many bits it writes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, kind, quality=quality)
    decoded = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    return tvf.pil_to_tensor(decoded), 8 * len(buffer.getvalue())


class TestCodecs:
    @pytest.mark.parametrize("kind", ["jpeg", "webp"])
    @pytest.mark.parametrize("quality", [1, 60, 100])
    def test_it_is_pillows(self, kind: str, quality: int) -> None:
        pixels = torch.stack([photo(), photo().flip(0), photo().flip(2)])
        candidate = opened(f"{kind}:{quality}")
        assert isinstance(candidate, CodecCandidate)
        encoded, decoded = candidate.reconstruct(to_model_range(pixels), generators(3))
        expected = [by_pillow(one, kind, quality) for one in pixels]
        assert encoded.posterior is None
        assert encoded.bits == [bits for _, bits in expected]
        assert torch.equal(to_uint8(decoded.images), torch.stack([images for images, _ in expected]))
        assert decoded.images.dtype == torch.float32
        assert decoded.num_evaluations is None

    @pytest.mark.parametrize("kind", ["jpeg", "webp"])
    def test_a_higher_quality_is_closer_and_larger(self, kind: str) -> None:
        x = to_model_range(photo())[None]
        found = [opened(f"{kind}:{quality}").reconstruct(x) for quality in (5, 40, 75, 95)]
        errors = [(decoded.images - x).square().mean().item() for _, decoded in found]
        bits = [encoded.bits[0] for encoded, _ in found if encoded.bits is not None]
        assert errors == sorted(errors, reverse=True)
        assert bits == sorted(bits)
        assert len({*errors}) == len({*bits}) == 4

    def test_it_has_no_network_and_says_where_it_runs(self) -> None:
        candidate = opened("webp:50")
        assert candidate.splits
        assert candidate.module() is None
        assert candidate.count_parameters() is None
        assert candidate.remarks == ["codec, on one core of the CPU"]


class TestBicubic:
    @pytest.mark.parametrize(
        ("factor", "size", "small"),
        [
            ("4", (32, 48), (8, 12)),
            ("3", (32, 50), (11, 17)),
            ("2.5", (32, 31), (13, 12)),
            ("100", (32, 48), (1, 1)),
        ],
    )
    def test_it_is_torchvisions_resizing_there_and_back(
        self, factor: str, size: tuple[int, int], small: tuple[int, int]
    ) -> None:
        x = image(2, *size)
        candidate = opened(f"bicubic:{factor}")
        assert isinstance(candidate, BicubicCandidate)
        assert latent_shape(candidate, x) == (2, 3, *small)
        bicubic: Any = {"interpolation": tvf.InterpolationMode.BICUBIC, "antialias": True}
        shrunk = tvf.resize(x, list(small), **bicubic)
        assert torch.equal(reconstruct(candidate, x), tvf.resize(shrunk, list(size), **bicubic))
        assert torch.equal(reconstruct(candidate, x, generators(2)), reconstruct(candidate, x))
        assert candidate.count_parameters() == 0
        assert candidate.remarks == ["resizing"]

    def test_a_factor_of_1_changes_nothing(self) -> None:
        x = image(2)
        torch.testing.assert_close(reconstruct(opened("bicubic:1"), x), x)
