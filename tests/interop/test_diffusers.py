"""Autoencoders of diffusers: which become encoders of ours, which are wrapped, and what is refused."""

import json
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import make_images, run_config, start
from tiny_models import edit_config, refusal
from torch import Tensor

from dc_ssdae import DCSSDAE
from dc_ssdae.components import HANDED_OVER
from dc_ssdae.errors import InputError
from dc_ssdae.evaluation.candidates import DiffusersCandidate
from dc_ssdae.interop.diffusers import (
    OWN_ENCODERS,
    UNSAFE_IN_FLOAT16,
    convert_diffusers,
    diffusers_names,
    latent_settings,
)
from dc_ssdae.networks import DiffusersEncoder, UViTDecoder

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"


def blocks(*widths: int, **given: Any) -> dict[str, Any]:
    """Settings of a small AutoencoderKL, and of the classes that are built like it."""
    kinds = {f"{way}_block_types": len(widths) * (f"{way.title()}{side}Block2D",) for way, side in SIDES.items()}
    return {"block_out_channels": widths, "norm_num_groups": 4, "latent_channels": 4, **kinds, **given}


def both(given: dict[str, Any], first: str = "encoder_") -> dict[str, Any]:
    """Settings that encoder and decoder have."""
    return {f"{side}{name}": value for side in (first, "decoder_") for name, value in given.items()}


SIDES = {"down": "Encoder", "up": "Decoder"}
STATISTICS = {"latents_mean": [-1.5, 2.0, -1.0, 2.5], "latents_std": [8.0, 6.0, 0.5, 5.0]}
KL = blocks(8, 16, 16, 16)
STAGES = {"block_types": 3 * ("ResBlock",) + ("EfficientViTBlock",), "block_out_channels": (16, 32, 32, 64)}
CAE = both({**STAGES, "layers_per_block": (0, 1, 1, 2), "qkv_multiscales": 4 * ((),)})
SANA = both({**STAGES, "layers_per_block": (1, 1, 2, 1), "qkv_multiscales": ((), (), (), (5,))})
DC = {"latent_channels": 8, "scaling_factor": 0.4, "downsample_block_type": "pixel_unshuffle"}
TAESD = both({"block_out_channels": 4 * (16,)})
TINY = {**TAESD, "latent_channels": 5, "scaling_factor": 1.5, "shift_factor": 0.1}
QWEN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, **STATISTICS}
QWEN_21 = {**QWEN, "decoder_base_dim": 8, "temperal_downsample": [False, True, True]}
LTX = {"latent_channels": 8, "scaling_factor": 0.7}
LTX |= both({"block_out_channels": 4 * (16,), "layers_per_block": 5 * (1,)}, first="")
WIDTHS = {"encoder_block_out_channels": (8, 16, 16, 16), "decode_block_out_channels": (8, 16, 16, 16)}
OF_TWO_FRAMES = {"latents_mean": [1.0, 9.0, 2.0, 9.0, 3.0, 9.0, 4.0, 9.0], "latents_std": 4 * [2.0, 9.0]}
COSMOS = {**WIDTHS, "num_layers": 1, "latent_channels": 4, "attention_resolutions": (8,), **OF_TWO_FRAMES}
VIT = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "encoder_input_size": 56, "noise_tau": 0.8}
VIT |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
RAE = {
    **VIT,
    "decoder_intermediate_size": 32,
    "scaling_factor": 0.5,
    "latents_mean": [[[2.0]]],
    "latents_std": [[[3.0]]],
}

OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "f8": ("AutoencoderKL", {**KL, **STATISTICS, "scaling_factor": 0.5}),
    "f16": ("AutoencoderKL", blocks(8, 16, 24, 24, 24, layers_per_block=2, latent_channels=6)),
    "odd ratio": ("AutoencoderKL", blocks(16, 24, 24, 40, act_fn="swish")),
    "no quant_conv": ("AutoencoderKL", {**KL, "use_quant_conv": False, "shift_factor": 0.1159}),
    "old names": ("AutoencoderKL", KL),
    "shards": ("AutoencoderDC", {**DC, **CAE}),
    "no shortcut": ("AutoencoderDC", {**DC, **CAE, "encoder_out_shortcut": False}),
    "sana": ("AutoencoderDC", {**DC, **SANA, "downsample_block_type": "Conv"}),
}

WRAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "kl of another activation": ("AutoencoderKL", {**KL, "act_fn": "relu"}),
    "kl without attention": ("AutoencoderKL", {**KL, **STATISTICS, "mid_block_add_attention": False}),
    "dc of other heads": ("AutoencoderDC", {**DC, **CAE, "attention_head_dim": 16}),
    "tiny": ("AutoencoderTiny", TINY),
    "vq": ("VQModel", {**KL, "vq_embed_dim": 6, "num_vq_embeddings": 16}),
    "flux 2": ("AutoencoderKLFlux2", KL),
    "qwen image": ("AutoencoderKLQwenImage", QWEN),
    "qwen image 2.1": ("AutoencoderKLQwenImage21", QWEN_21),
    "ltx": ("AutoencoderKLLTXVideo", LTX),
    "cosmos": ("AutoencoderKLCosmos", COSMOS),
    "rae": ("AutoencoderRAE", RAE),
}
OF_VIDEO = ("qwen image", "qwen image 2.1", "ltx", "cosmos")


@torch.no_grad()
def make(kind: str, given: dict[str, Any], folder: Path, **saving: Any) -> Any:
    """Save a model of diffusers, every parameter off its start, keeping activations of a sane size; and give it."""
    torch.manual_seed(3)
    model = getattr(diffusers, kind)(**given).eval()
    for parameter in model.parameters():
        spread = parameter.std() if parameter.ndim > 1 else 0.5
        parameter.add_(0.5 * spread * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name in ("bn.running_mean", "latents_mean"):
            buffer.copy_(torch.randn(4).repeat_interleave(len(buffer) // 4))
        elif name in ("bn.running_var", "latents_std"):
            buffer.copy_((0.5 + torch.rand(4)).repeat_interleave(len(buffer) // 4))
    model.save_pretrained(folder, **saving)
    return model


def convert(name: object, **given: Any) -> DCSSDAE:
    return convert_diffusers(str(name), **{"decoder_size": "XS", **given})


def with_old_attention_names(folder: Path) -> None:
    """Rename what Stable Diffusion's first checkpoints call otherwise."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = load_file(folder / WEIGHTS)
    for theirs, before in old.items():
        state = {name.replace(theirs, before): tensor for name, tensor in state.items()}
    assert sum(".query." in name for name in state) == 4
    save_file(state, folder / WEIGHTS)


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
def test_kl_and_dc_become_encoders_of_ours(name: str, tmp_path: Path) -> None:
    theirs = make(*OWN[name], tmp_path, max_shard_size="60KB" if name == "shards" else "5GB")
    assert (tmp_path / f"{WEIGHTS}.index.json").exists() == (name == "shards")
    if name == "old names":
        with_old_attention_names(tmp_path)
    convert(tmp_path).save_pretrained(tmp_path / "ours")
    ours = DCSSDAE.from_pretrained(tmp_path / "ours")
    assert ours.config.encoder["class_path"] == OWN[name][0].replace("Autoencoder", "") + "Encoder"
    for width in (64, 96):
        x = 2.0 * torch.rand(2, 3, 64, width) - 1.0
        output = theirs.encode(x)
        expected = [output.latent] if "latent" in output else [output.latent_dist.mean, output.latent_dist.logvar]
        assert expected[0].std() > 0.02
        torch.testing.assert_close([*ours.encode(x).latent_dist.moments], expected, atol=1e-4, rtol=0.0)
    for setting, unknown in (("scaling_factor", 1.0), ("shift_factor", 0.0), ("latents_mean", None)):
        assert ours.config[setting] == (theirs.config.get(setting) or unknown)


def normalised(z: Tensor, config: Any) -> Tensor:
    """The latent as DCSSDAE's settings normalise it, and most pipelines of diffusers."""
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    shift = config.get("shift_factor") or 0.0 if mean is None else torch.tensor(mean).view(-1, 1, 1)
    return (z - shift) * config.get("scaling_factor", 1.0) / (1.0 if std is None else torch.tensor(std).view(-1, 1, 1))


def as_in_pipelines(name: str, theirs: Any, z: Tensor) -> Tensor:
    """The normalised latent of diffusers' pipelines, Flux2's and LTX's with statistics among the weights."""
    if name == "flux 2":
        blocks = diffusers.Flux2Pipeline._patchify_latents(z)
        mean, std = theirs.bn.running_mean, (theirs.bn.running_var + theirs.config.batch_norm_eps).sqrt()
        return diffusers.Flux2Pipeline._unpatchify_latents((blocks - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    if name == "ltx":
        statistics = theirs.latents_mean, theirs.latents_std, theirs.config.scaling_factor
        return diffusers.LTXPipeline._normalize_latents(z.unsqueeze(2), *statistics).squeeze(2)
    if name == "cosmos":
        config = theirs.config
        mean, std = (
            torch.tensor(values).view(4, 2)[:, :1, None] for values in (config.latents_mean, config.latents_std)
        )
        return (z - mean) / std
    return z if name == "rae" else normalised(z, theirs.config)


@pytest.mark.parametrize("name", WRAPPED)
def test_any_other_encoder_is_run_as_it_is_and_stays_frozen(name: str, tmp_path: Path) -> None:
    theirs, remarks = make(*WRAPPED[name], tmp_path / "theirs"), list[str]()
    convert(tmp_path / "theirs", remark=remarks.append).save_pretrained(tmp_path / "ours")
    ours = DCSSDAE.from_pretrained(tmp_path / "ours")
    assert isinstance(ours.encoder, DiffusersEncoder)
    assert any("diffusers' own code" in line for line in remarks) == (WRAPPED[name][0] in OWN_ENCODERS)
    assert not [key for key in ours.encoder.state_dict() if "decoder" in key]
    x = 2.0 * torch.rand(2, 3, 64, 64) - 1.0
    with torch.no_grad():
        given = torch.cat([x, torch.ones(2, 1, 64, 64)], dim=1) if name == "qwen image 2.1" else x
        output = theirs.encode(x / 2 + 0.5 if name == "rae" else given.unsqueeze(2) if name in OF_VIDEO else x)
        z = output.latent_dist.mode() if "latent_dist" in output else output[0]
        image = theirs.decode(z)[0][:, :3]
        z, image = (z.squeeze(2), image.squeeze(2)) if name in OF_VIDEO else (z, image)
        posterior = ours.encode(x).latent_dist
        torch.testing.assert_close(posterior.mean, z, atol=1e-5, rtol=0.0)
        expected = as_in_pipelines(name, theirs, z)
        torch.testing.assert_close(normalised(posterior.mean, ours.config), expected, atol=1e-4, rtol=1e-5)
        candidate = DiffusersCandidate(theirs, name)
        decoded = candidate.decode(candidate.encode(x).posterior.mode()).images
        torch.testing.assert_close(decoded, 2 * image - 1 if name == "rae" else image)
    model = {part: ours.config[part] for part in (*HANDED_OVER["encoder"], "encoder", "decoder", "dynamics")}
    data, images = {"image_size": 64, "validation_images": 1}, make_images(tmp_path / "images", 4)
    training = {"train": ["decoder"], "init_from": str(tmp_path / "ours"), "steps": 1, "batch_size": 2}
    start(run_config(images, data, {"kl": 0.0}, model, **training), tmp_path / "run")
    before, after = (load_file(tmp_path / folder / WEIGHTS) for folder in ("ours", "run/model"))
    assert {key.partition(".")[0] for key in after if not torch.equal(after[key], before[key])} == {"decoder"}
    trained = DCSSDAE.from_pretrained(tmp_path / "run/model")
    assert normalised(z, trained.config).equal(normalised(z, ours.config))


def test_flux_2_places_of_other_statistics_are_pooled() -> None:
    theirs = diffusers.AutoencoderKLFlux2(**KL, batch_norm_eps=0.25)
    theirs.bn.running_mean[:4] = torch.tensor([0.0, 0.0, 0.0, 4.0])
    theirs.bn.running_var[:4] = 0.75
    found = latent_settings(theirs, 4)
    assert (found["latents_mean"][0], found["latents_std"][0]) == (1.0, 2.0)


SD = blocks(128, 256, 512, 512, layers_per_block=2, norm_num_groups=32)
PUBLISHED_SANA = both({"block_types": 3 * ("ResBlock",) + 3 * ("EfficientViTBlock",)})
PUBLISHED_SANA |= {"downsample_block_type": "Conv"}


@pytest.mark.parametrize(
    ("kind", "published", "preset"),
    [("AutoencoderKL", SD, "sd_f8c4_frozen_eqm"), ("AutoencoderDC", PUBLISHED_SANA, "sana_f32c32_frozen_eqm")],
)
def test_the_presets_are_of_the_published_encoders(kind: str, published: dict[str, Any], preset: str) -> None:
    with torch.device("meta"):
        theirs = getattr(diffusers, kind)(**published)
        part = OWN_ENCODERS[kind](theirs.config)
        models = DCSSDAE.from_preset(preset, encoder=part), DCSSDAE.from_preset(preset)
    shapes = [{name: value.shape for name, value in model.encoder.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    for setting in ("architecture", "variational", "out_shortcut") if kind == "AutoencoderDC" else ():
        assert part["init_args"][setting] == models[1].config.encoder["init_args"][setting]
    needed = {source for sources in diffusers_names(models[0].encoder).values() for source in sources}
    assert needed == {name for name in theirs.state_dict() if name.startswith(("encoder.", "quant_conv."))}


# --- what is refused ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    make("AutoencoderKL", KL, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a saved AutoencoderKL, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "kl"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"double_z": False}, "unknown setting of AutoencoderKL 'double_z'"),
        ({"layers_per_block": 10**9}, "too large"),
        ({"block_out_channels": [8, 16, 16, 10**12]}, "cannot be built with its settings"),
        ({"norm_num_groups": 48}, "cannot be built with its settings"),
        ({"scaling_factor": "x"}, "scaling_factor is 'x'"),
        ({"latents_mean": [1.0]}, "latents_mean"),
        ({"_class_name": "DCSSDAE"}, "'DCSSDAE' is no autoencoder of diffusers"),
        ({"_class_name": "os.system"}, "'os.system' is no autoencoder"),
        ({"_class_name": "UNet2DModel"}, "'UNet2DModel' is no autoencoder"),
        ({"_class_name": ["AutoencoderKL"]}, "is no autoencoder"),
        ({"_class_name": None}, "None is no autoencoder"),
    ],
)
def test_a_config_that_is_no_encoders_is_refused(change: dict[str, Any], told: str, folder: Path) -> None:
    edit_config(folder, **change)
    message = refusal(convert, folder)
    assert message.startswith(f"{folder}: ")
    assert told in message


SOUND = {"encoder_hidden_size": 8, "decoder_channels": 8, "decoder_input_channels": 4}


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        ("AutoencoderKL", {**KL, "in_channels": 5}, "AutoencoderKL does not encode images of 3 channels: "),
        ("AutoencoderKL", blocks(8, 16, 16), "downsample_factor is 4"),
        ("AutoencoderOobleck", SOUND, "AutoencoderOobleck does not encode images of 3 channels: "),
    ],
)
def test_what_does_not_encode_images_is_refused(kind: str, given: dict[str, Any], told: str, tmp_path: Path) -> None:
    make(kind, given, tmp_path)
    assert told in refusal(convert, tmp_path)


def test_an_encoder_of_one_size_says_which(tmp_path: Path) -> None:
    make(*WRAPPED["rae"], tmp_path)
    with pytest.raises(InputError, match="AutoencoderRAE takes images of 64×64 pixels, not 64×96"):
        convert(tmp_path).encode(torch.zeros(1, 3, 64, 96))


VALUES = st.sampled_from([None, True, -1, 0, 70_000, 10**30, 0.5, float("nan"), "", "x", [], [8] * 4, [[1]], {"a": 1}])


@settings(max_examples=60, derandomize=True, deadline=None)
@given(places=st.lists(st.integers(0, 40), min_size=1, max_size=2), value=VALUES)
def test_no_config_raises_anything_but_an_input_error(saved: Path, places: list[int], value: object) -> None:
    folder = shutil.copytree(saved, saved.with_name("mutated"), dirs_exist_ok=True)
    names = [*json.loads((folder / "config.json").read_text())]
    edit_config(folder, **{names[place % len(names)]: value for place in places})
    with suppress(InputError):
        convert(folder)


def test_files_that_do_not_fit_are_told(folder: Path) -> None:
    state, name = load_file(folder / WEIGHTS), "encoder.mid_block.resnets.0.conv1.bias"
    content = (folder / WEIGHTS).read_bytes()
    for change, told in (
        ({name: None}, f"missing: {name}"),
        ({"encoder.another": torch.zeros(1)}, "left over: encoder.another"),
        ({name: torch.zeros(3)}, f"{name} has shape (3,)"),
        ({name: torch.full_like(state[name], torch.inf)}, f"{name} is not finite"),
    ):
        changed = {key: tensor for key, tensor in {**state, **change}.items() if tensor is not None}
        save_file(changed, folder / WEIGHTS)
        assert told in refusal(convert, folder)
    for spoilt in (content[:-100], b"\xff" + content[1:]):
        (folder / WEIGHTS).write_bytes(spoilt)
        assert f"{folder / WEIGHTS} is truncated, or no safetensors file" in refusal(convert, folder)
    for text in ("", "[1]", "{}"):
        (folder / "config.json").write_text(text)
        assert refusal(convert, folder).startswith(f"{folder}: ")


@pytest.fixture
def no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever unpickles is told on, whether or not the pickle would do any harm."""
    monkeypatch.setattr(torch, "load", lambda *given, **more: pytest.fail(f"torch.load{given}"))


def test_the_command_that_is_told_converts_a_pickle(folder: Path) -> None:
    expected = convert(folder).encoder.state_dict()
    torch.save(load_file(folder / WEIGHTS), folder / f"{STEM}.bin")
    convert(folder)
    (folder / WEIGHTS).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *given, **more: pytest.fail("unpickled"))
        told = refusal(convert, folder)
    subprocess.run([sys.executable, *shlex.split(told.partition("convert it: ")[2])[1:]], check=True)
    found = convert(folder).encoder.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


INDICES = [
    (None, f"{WEIGHTS}.index.json"),
    ("fp16", f"{WEIGHTS}.index.fp16.json"),
    ("fp16", f"{WEIGHTS}.fp16.index.json"),
]
"""Variant, and name of its index; diffusers once wrote the last."""


@pytest.mark.usefixtures("no_pickles")
@pytest.mark.parametrize(("variant", "index"), INDICES)
def test_shards_are_loaded_by_their_index_and_none_is_a_pickle(folder: Path, variant: str | None, index: str) -> None:
    expected = convert(folder).encoder.state_dict()
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    shards = {name: f"some-{number % 2}.safetensors" for number, name in enumerate(state)}
    for shard in set(shards.values()):
        save_file({name: state[name] for name in state if shards[name] == shard}, folder / shard)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    found = convert(folder, variant=variant).encoder.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    (folder / "some-1.safetensors").unlink()
    assert f"{folder / 'some-1.safetensors'}: no such file" in refusal(convert, folder, variant=variant)
    for wrong in ("w.bin", "w", "w.safetensors.pt", "../w.safetensors", 3):
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, wrong)}))
        assert f"{folder / index} must name safetensors beside it" in refusal(convert, folder, variant=variant)
    (folder / index).write_text("[]")
    assert f"{folder / index} must name safetensors" in refusal(convert, folder, variant=variant)


def test_a_pipeline_a_subfolder_and_a_variant(saved: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(saved, pipeline / "vae")
    half = diffusers.AutoencoderKL.from_pretrained(saved, torch_dtype=torch.float16)
    half.save_pretrained(pipeline / "half", variant="fp16")
    expected = convert(saved).encoder.state_dict()
    for where in ({}, {"subfolder": "vae"}, {"subfolder": "half", "variant": "fp16"}, {"subfolder": "half"}):
        found = convert(pipeline, **where).encoder.state_dict()
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-3, rtol=1e-3)
    assert "there is no config.json, in nowhere/" in refusal(convert, pipeline, subfolder="nowhere")
    assert f"{STEM}.fp16.safetensors: no such file" in refusal(convert, saved, variant="fp16")


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which huggingface_hub keeps what it has downloaded of owner/name; the hub is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = 40 * "a"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text(commit)
    return snapshot


@pytest.mark.usefixtures("no_pickles")
@pytest.mark.parametrize(("where", "variant"), [("", None), ("vae", None), ("vae", "fp16")])
def test_a_model_of_the_hub(saved: Path, snapshot: Path, where: str, variant: str | None) -> None:
    shutil.copytree(saved, snapshot / where, dirs_exist_ok=True)
    name = f"{STEM}.{variant}.safetensors" if variant else WEIGHTS
    (snapshot / where / WEIGHTS).rename(snapshot / where / name)
    model = convert("owner/name", variant=variant)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in convert(saved).state_dict().items())
    assert model.config.provenance["source"] == "AutoencoderKL owner/name"
    torch.save(load_file(snapshot / where / name), snapshot / where / f"{STEM}.bin")
    (snapshot / where / name).unlink()
    told = refusal(convert, "owner/name", variant=variant)
    assert told.startswith(f"owner/name: there is no {name} on the hub")


def test_names_that_are_no_model(tmp_path: Path, snapshot: Path) -> None:
    for name in (
        "no-owner/no-model",
        "nowhere",
        "a/b/c",
        "a\0b/c",
        "\ud800/x",
        "a b/c",
        "",
        str(tmp_path / "model.ckpt"),
    ):
        assert "no such folder" in refusal(convert, name)
    assert "there is no config.json, neither there nor in vae/" in refusal(convert, tmp_path)


# --- the new model ---


def test_what_is_unsafe_in_float16_is_remarked_where_it_is_stated(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["force_upcast"]
    for stated, expected in (({"force_upcast": True}, [UNSAFE_IN_FLOAT16]), ({"force_upcast": False}, []), ({}, [])):
        (folder / "config.json").write_text(json.dumps({**config, **stated}))
        remarks: list[str] = []
        convert(folder, remark=remarks.append)
        assert remarks == expected


def test_the_decoder_follows_from_the_seed_and_the_users_settings(saved: Path) -> None:
    before = torch.get_rng_state()
    first = convert(saved, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    second, other, wrapped = convert(saved, seed=5), convert(saved, seed=6), convert(saved, wrap=True)
    states = [model.decoder.state_dict() for model in (first, second, other)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not torch.equal(states[0]["image_in.weight"], states[2]["image_in.weight"])
    assert not first.training
    assert isinstance(wrapped.encoder, DiffusersEncoder)
    assert convert(saved, dynamics="FlowMatching").dynamics.conditions_on_time
    assert "unknown size of UViTDecoder 'XXS'" in refusal(convert, saved, decoder_size="XXS")
    fast = convert(saved, decoder_size="fast")
    assert fast.config.dynamics["init_args"]["prediction"] == "image"
    assert isinstance(fast.decoder, UViTDecoder)
    assert fast.decoder.block_shortcut.weight.count_nonzero() == 0


def test_a_trained_decoder_joins_its_own_encoder_alone(saved: Path, tmp_path: Path) -> None:
    """The file need not hold the encoder; what it holds of it must be the published one's."""
    trained = convert(saved, seed=5, decoder_size="fast").half()
    trained.save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS
    whole = load_file(file)
    kept = {name: tensor for name, tensor in whole.items() if name.startswith(("decoder.", "encoder.latent_head."))}
    for tensors in (whole, kept):
        save_file(tensors, file)
        model = convert(saved, decoder=tmp_path)
        assert model.config.dynamics == trained.config.dynamics
        assert model.config.provenance == {"source": trained.config.provenance["source"], "untrained": ["decoder"]}
        for name, tensor in model.decoder.state_dict().items():
            assert torch.equal(tensor, trained.decoder.state_dict()[name].to(tensor.dtype)), name
    bias = {"encoder.latent_head.2.bias": kept["encoder.latent_head.2.bias"] + 1}
    short = {"decoder.conv_out.bias": kept["decoder.conv_out.bias"][1:]}
    alone = {name: tensor for name, tensor in kept.items() if name.startswith("decoder.")}
    for tensors, told in (
        ({**kept, **bias}, "encoder.latent_head.2.bias differs"),
        ({**kept, **short}, "decoder.conv_out.bias has shape"),
        (alone, "must keep a tensor of it"),
    ):
        save_file(tensors, file)
        assert told in refusal(convert, saved, decoder=tmp_path)
    save_file(whole, file)
    make(*WRAPPED["tiny"], tmp_path / "other")
    assert "latent_channels differs" in refusal(convert, tmp_path / "other", decoder=tmp_path)


def test_a_wrapped_encoder_names_what_it_does_not_know() -> None:
    for wrong, told in (
        ({"settings": {"num_blocks": 3}}, "unknown setting of AutoencoderTiny 'num_blocks'"),
        ({"autoencoder": "DiffusionPipeline"}, "'DiffusionPipeline' is no autoencoder of diffusers"),
        ({"autoencoder": "os"}, "'os' is no autoencoder of diffusers"),
    ):
        assert told in refusal(DiffusersEncoder, 5, 8, **wrong)
    encoder = DiffusersEncoder(4, 8, settings={**TAESD, "latent_channels": 5})
    assert "latent_channels is 4" in refusal(encoder, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["tiny", "flux 2"])
def test_a_wrapped_encoder_gives_the_same_latents_with_its_activations_computed_again(
    name: str, tmp_path: Path
) -> None:
    make(*WRAPPED[name], tmp_path)
    model, found = convert(tmp_path, decoder_size="fast"), []
    x = 2.0 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1.0
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        latents = model.encoder(x).mean
        latents.square().sum().backward()
        found.append([latents, *(parameter.grad for parameter in model.encoder.parameters())])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)
