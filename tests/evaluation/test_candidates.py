"""The autoencoders that can be measured: how they are named, how they are opened, and what they give."""

import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file
from tiny_models import TINY_DECODER, PatchEncoder, image, refusal, tiny
from torch import Tensor, nn
from torchvision.transforms import functional as tvf

from dc_ssdae import DCSSDAE, DiagonalGaussian
from dc_ssdae.data.images import to_model_range, to_uint8
from dc_ssdae.evaluation.candidates import (
    RANDOM_WEIGHTS,
    Candidate,
    CandidateSpec,
    OurCandidate,
    PythonCandidate,
    open_candidate,
    parse_candidate,
    parse_candidates,
)

HERE = __name__

WEIGHTS = "diffusion_pytorch_model.safetensors"


def opened(text: str, **given: Any) -> Candidate:
    return open_candidate(parse_candidate(text), **given)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@torch.no_grad()
def reconstruct(candidate: Candidate, x: Tensor, given: Sequence[torch.Generator] | None = None) -> Tensor:
    return candidate.reconstruct(x, given)[1].images


@torch.no_grad()
def posterior_of(candidate: Candidate, x: Tensor) -> DiagonalGaussian:
    posterior = candidate.encode(x).posterior
    assert posterior is not None
    return posterior


# --- naming ---


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with some folders."""
    monkeypatch.chdir(tmp_path)
    for name in ("run/model", "run/vae", "lr=0.1", "runs/lr=0.1", "a:b=c", "first/mine", "second/mine"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "label", "kind", "value"),
    [
        ("jpeg:75", "jpeg:75", "jpeg", "75"),
        ("bicubic:2.5", "bicubic:2.5", "bicubic", "2.5"),
        ("preset: demo ", "preset:demo", "preset", "demo"),
        ("python:package.module.name", "name", "python", "package.module.name"),
        ("owner/name", "owner/name", "ours", "owner/name"),
        (" DC-AE f32c32 (SANA) =diffusers:owner/name", "DC-AE f32c32 (SANA)", "diffusers", "owner/name"),
        ("run/", "run", "ours", "run/"),
        ("./run/model/", "run", "ours", "./run/model/"),
        ("diffusers:run/vae", "run", "diffusers", "run/vae"),
        ("mine=diffusers:runs/lr=0.1", "mine", "diffusers", "runs/lr=0.1"),
        ("a:b=c", "a:b=c", "ours", "a:b=c"),
    ],
)
def test_every_form_with_and_without_a_label(here: Path, text: str, label: str, kind: str, value: str) -> None:
    assert parse_candidate(text) == CandidateSpec(label, kind, value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        *((f"{kind}:{quality}", f"{kind}:QUALITY") for kind in ("jpeg", "webp") for quality in ("0", "101", "7.5", "")),
        *((f"bicubic:{factor}", "bicubic:FACTOR") for factor in ("0.99", "-8", "nan", "inf", 5000 * "9")),
        *((f"python:{path}", "python:MODULE.NAME") for path in ("name", "module.", "a..b", "a/b.c", "a.b()")),
        ("", "folder"),
        ("png:75", "jpeg, ours, pixels, preset"),
        ("a:b=jpeg:75", "jpeg, ours, pixels, preset"),
    ],
)
def test_what_names_nothing(text: str, told: str) -> None:
    assert told in refusal(parse_candidate, text)


def test_models_of_the_same_name_want_labels(here: Path) -> None:
    texts = ["first/mine", "jpeg:75", "other=diffusers:second/mine"]
    assert [spec.label for spec in parse_candidates(texts)] == ["mine", "jpeg:75", "other"]
    for pair in (["jpeg:75", "jpeg:75"], ["python:a.b", "b=jpeg:75"], ["first/mine", "diffusers:second/mine"]):
        assert "LABEL=" in refusal(parse_candidates, pair)


# --- models of this package ---


@pytest.fixture(scope="module")
def our_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("ours") / "mine"
    tiny().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("decoding", [{}, {"num_steps": 3}])
def test_ours_reconstructs_as_the_model_does(our_folder: Path, decoding: dict[str, Any]) -> None:
    model, x = DCSSDAE.from_pretrained(our_folder), image(2)
    candidate = opened(str(our_folder), decoding=decoding)
    assert isinstance(candidate, OurCandidate)
    assert candidate.count_parameters() == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        encoded, decoded = candidate.reconstruct(x)
        posterior = model.encode(x).latent_dist
        expected = model.decode(posterior.mode(), **decoding)
    assert torch.equal(decoded.images, expected.sample)
    assert decoded.num_evaluations is not None
    assert decoded.num_evaluations.tolist() == [decoding.get("num_steps", 1)] * 2
    z = candidate.latent(encoded, generators(2))
    assert torch.equal(z, posterior.sample(generators(2)))
    assert not torch.equal(z, posterior.mode())
    assert "euler" in refusal(opened, str(our_folder), decoding={"sampler": "euler"})


def test_a_training_runs_folder_means_its_model(our_folder: Path, tmp_path: Path) -> None:
    spec = parse_candidate(str(tmp_path))
    assert spec.label == tmp_path.name
    assert "holds no model" in refusal(open_candidate, spec)
    shutil.copytree(our_folder, tmp_path / "model")
    x = image()
    assert torch.equal(reconstruct(open_candidate(spec), x), reconstruct(opened(str(our_folder)), x))
    assert parse_candidate(str(tmp_path / "model")).label == tmp_path.name


def test_a_users_classes_are_handed_on(tmp_path: Path) -> None:
    elsewhere = type("Elsewhere", (PatchEncoder,), {"__module__": "no_such_module", "__qualname__": "Elsewhere"})
    model = DCSSDAE(4, 8, encoder={"class_path": "Elsewhere"}, decoder=TINY_DECODER, classes=[elsewhere])
    model.save_pretrained(tmp_path)
    assert "no_such_module.Elsewhere" in refusal(opened, str(tmp_path))
    assert reconstruct(opened(str(tmp_path), classes=[elsewhere]), image()).shape == (1, 3, 32, 48)


@pytest.mark.parametrize("kind", ["", "diffusers:", "preset:"])
@pytest.mark.parametrize("name", ["no-owner/no-model", "no-folder", "a/b/c"])
def test_what_is_nowhere(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert name in refusal(opened, f"{kind}{name}")


# --- diffusers ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder for each of some small models, by the class's name."""
    folder = tmp_path_factory.mktemp("diffusers")
    torch.manual_seed(2)
    blocks = {"down_block_types": 2 * ("DownEncoderBlock2D",), "up_block_types": 2 * ("UpDecoderBlock2D",)}
    stages = {
        "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 16, 32),
        "layers_per_block": (1, 1, 1),
        "qkv_multiscales": ((), (), (5,)),
    }
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in stages.items()}
    tiny_sides = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    models = (
        AutoencoderKL(latent_channels=4, block_out_channels=(8, 16), norm_num_groups=4, **blocks),
        AutoencoderDC(latent_channels=8, attention_head_dim=8, **sides),
        AutoencoderTiny(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **tiny_sides),
    )
    for model in models:
        model.save_pretrained(folder / type(model).__name__)
    return {type(model).__name__: folder / type(model).__name__ for model in models}


@pytest.mark.parametrize(
    ("kind", "latent", "shape"),
    [
        (AutoencoderKL, lambda output: output.latent_dist.mode(), (2, 4, 16, 24)),
        (AutoencoderDC, lambda output: output.latent, (2, 8, 8, 12)),
        (AutoencoderTiny, lambda output: output.latents, (2, 4, 16, 24)),
    ],
)
def test_diffusers_reconstructs_as_it_does_itself(
    saved: dict[str, Path], kind: Any, latent: Callable[[Any], Tensor], shape: tuple[int, ...]
) -> None:
    """Loaded and called as diffusers' documentation has it; only KL has a variance."""
    folder, x = saved[kind.__name__], image(2)
    candidate, model = opened(f"diffusers:{folder}"), kind.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model.decode(latent(model.encode(x))).sample
    assert torch.equal(reconstruct(candidate, x), expected)
    posterior = posterior_of(candidate, x)
    assert posterior.mean.shape == shape
    assert (posterior.logvar is not None) == (kind is AutoencoderKL)
    assert torch.equal(reconstruct(candidate, x, generators(2)), expected) == (kind is not AutoencoderKL)
    assert candidate.remarks == []
    assert candidate.count_parameters() == sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values())
    # A config alone gives random weights.
    alone = folder.parent / f"{kind.__name__}_alone" / "vae"
    alone.mkdir(parents=True)
    shutil.copy(folder / "config.json", alone)
    untrained = opened(f"diffusers:{alone.parent}")
    assert untrained.remarks == [RANDOM_WEIGHTS]
    assert posterior_of(untrained, x).mean.shape == shape


@pytest.mark.parametrize("place", ["", "vae"])
def test_a_folder_of_diffusers_may_be_a_pipelines_or_hold_a_model_of_ours(
    saved: dict[str, Path], our_folder: Path, tmp_path: Path, place: str
) -> None:
    x, decoding = image(), {"num_steps": 2}
    shutil.copytree(our_folder, tmp_path / "mine" / place)
    shutil.copytree(saved["AutoencoderKL"], tmp_path / "theirs" / place)
    ours = opened(f"diffusers:{tmp_path / 'mine'}", decoding=decoding)
    assert isinstance(ours, OurCandidate)
    assert torch.equal(reconstruct(ours, x), reconstruct(opened(str(our_folder), decoding=decoding), x))
    theirs = opened(f"diffusers:{tmp_path / 'theirs'}")
    assert torch.equal(reconstruct(theirs, x), reconstruct(opened(f"diffusers:{saved['AutoencoderKL']}"), x))


# --- random weights and half precision ---


@pytest.mark.parametrize("text", ["preset:demo", "diffusers:AutoencoderTiny"])
def test_an_architecture_has_random_weights_and_says_so(text: str) -> None:
    before = torch.get_rng_state()
    first = opened(text)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    second = opened(text)
    assert first.remarks == [RANDOM_WEIGHTS]
    x = image()
    assert torch.equal(reconstruct(first, x), reconstruct(second, x))


@pytest.mark.parametrize("text", ["preset:demo", "{ours}", "diffusers:{kl}", f"python:{HERE}.Network"])
def test_it_can_be_opened_in_half_precision(our_folder: Path, saved: dict[str, Path], text: str) -> None:
    candidate = opened(text.format(ours=our_folder, kl=saved["AutoencoderKL"]), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in candidate.module.parameters()} == {torch.bfloat16}
    assert reconstruct(candidate, image()).isfinite().all()


# --- a user's own ---


def darker(x: Tensor) -> Tensor:
    return 0.5 * x


class Halving:
    """Keeps every second pixel."""

    def encode(self, x: Tensor) -> Any:
        return x[:, :, ::2, ::2]

    def decode(self, z: Tensor) -> Any:
        return z.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


class Raising(Halving):
    def __init__(self) -> None:
        raise RuntimeError("first\nsecond")


class Outer:
    Inner = Halving


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


an_object = Halving()
a_number = 5


def test_a_function_does_all_its_work_in_decode() -> None:
    x = image(2)
    candidate = opened(f"python:{HERE}.darker")
    assert not candidate.splits
    encoded, decoded = candidate.reconstruct(x, generators(2))
    assert encoded.posterior is None
    assert torch.equal(decoded.images, 0.5 * x)


@pytest.mark.parametrize("name", ["an_object", "Halving", "Outer.Inner"])
def test_an_object_or_a_class_without_arguments(name: str) -> None:
    x = image(2)
    candidate = opened(f"python:{HERE}.{name}")
    assert candidate.splits
    assert torch.equal(reconstruct(candidate, x)[:, :, ::2, 1::2], x[:, :, ::2, ::2])


def test_a_network_is_in_eval_mode_and_moves() -> None:
    candidate, x = opened(f"python:{HERE}.Network"), image(2)
    assert torch.equal(reconstruct(candidate, x), reconstruct(candidate, x))
    assert candidate.to(torch.device("meta")).module.shrink.weight.is_meta


def test_an_encoder_may_give_its_latent_in_several_ways() -> None:
    z = image(2)
    gaussian = DiagonalGaussian(z, torch.full_like(z, -2.0))
    without = (SimpleNamespace(latents=z), torch.distributions.Normal(z, torch.ones_like(z)))
    with_one = ((gaussian,), SimpleNamespace(latent_dist=gaussian))
    for output, logvar in zip((*without, *with_one), (None, None, gaussian.logvar, gaussian.logvar), strict=True):
        value = SimpleNamespace(encode=lambda x, output=output: output, decode=darker)
        posterior = posterior_of(PythonCandidate(value, "mine"), z)
        assert torch.equal(posterior.mean, z)
        assert posterior.logvar is logvar or torch.equal(posterior.logvar, logvar)


def test_a_decoder_may_give_its_images_in_several_ways() -> None:
    x = image(2)
    for give in (lambda x: x, lambda x: (x, "more"), lambda x: SimpleNamespace(sample=x)):
        assert torch.equal(reconstruct(PythonCandidate(give, "mine"), x), x)
    for wrong in (None, [x], x.numpy(), (None,), ()):
        told = refusal(reconstruct, PythonCandidate(lambda _, wrong=wrong: wrong, "mine"), x)
        assert type(wrong).__name__ in told


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (f"{HERE}.Raising", "RuntimeError: first second"),
        (f"{HERE}.a_number", "int"),
        (f"{HERE}.Outer.nothing", "nothing"),
        ("no_such_module.part.name", "no_such_module"),
        ("own_raising.f", "own_raising.py, line 2"),
    ],
)
def test_modules_of_the_current_folder_and_what_cannot_be_imported(here: Path, path: str, told: str) -> None:
    (here / "own_raising.py").write_text("x = 1\nraise RuntimeError('first\\nsecond')\n")
    (here / "own_codec.py").write_text("def brighter(x):\n    return x + 0.25\n")
    assert told in refusal(opened, f"python:{path}")
    x = image()
    assert torch.equal(reconstruct(opened("python:own_codec.brighter"), x), x + 0.25)


# --- codecs and resizing ---


@pytest.mark.parametrize(("kind", "quality"), [("jpeg", 1), ("jpeg", 60), ("webp", 100)])
def test_a_codec_is_pillows(kind: str, quality: int) -> None:
    pixels = to_uint8(image(3, 40, 56))
    candidate = opened(f"{kind}:{quality}")
    encoded, decoded = candidate.reconstruct(to_model_range(pixels), generators(3))
    assert encoded.posterior is None
    for before, after, bits in zip(pixels, to_uint8(decoded.images), encoded.bits or [], strict=True):
        buffer = io.BytesIO()
        Image.fromarray(before.permute(1, 2, 0).numpy()).save(buffer, kind, quality=quality)
        assert torch.equal(after, tvf.pil_to_tensor(Image.open(buffer).convert("RGB")))
        assert bits == 8 * len(buffer.getvalue())
    assert (candidate.count_parameters(), candidate.is_baseline) == (None, True)


@pytest.mark.parametrize(
    ("factor", "size", "small"), [("1", (32, 48), (32, 48)), ("2.5", (32, 31), (13, 12)), ("100", (32, 48), (1, 1))]
)
def test_bicubic_is_torchvisions_resizing_there_and_back(
    factor: str, size: tuple[int, int], small: tuple[int, int]
) -> None:
    x = image(2, *size)
    candidate = opened(f"bicubic:{factor}")
    assert posterior_of(candidate, x).mean.shape == (2, 3, *small)
    bicubic: Any = {"interpolation": tvf.InterpolationMode.BICUBIC, "antialias": True}
    shrunk = tvf.resize(x, list(small), **bicubic)
    assert torch.equal(reconstruct(candidate, x, generators(2)), tvf.resize(shrunk, list(size), **bicubic))
    assert candidate.is_baseline
