"""Published encoders of diffusers: settings from configs, tensors from weights, parity, and what is refused."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dc_ssdae import DCSSDAE, InputError
from dc_ssdae.cli.main import main
from dc_ssdae.components import COMPONENTS
from dc_ssdae.interop.diffusers_encoders import (
    CLASSES,
    UNSAFE_IN_FLOAT16,
    convert_diffusers,
    convert_tensors,
    diffusers_names,
    model_settings,
)
from dc_ssdae.networks import DiffusersEncoder, KLEncoder, UViTDecoder

TOLERANCE = 1e-4

WEIGHTS = "diffusion_pytorch_model.safetensors"


def refusal(work: Callable[[], object]) -> str:
    """The one line of an InputError."""
    with pytest.raises(InputError) as error:
        work()
    text = str(error.value)
    assert text
    assert len(text.splitlines()) == 1
    return text


@torch.no_grad()
def perturbed(model: Any) -> Any:
    """Every parameter off its start, the ones and zeros of norms too, keeping activations of a sane size."""
    for parameter in model.parameters():
        spread = parameter.std() if parameter.ndim > 1 else 0.5
        parameter.add_(0.5 * spread * torch.randn_like(parameter))
    return model.eval()


def tiny_kl(widths: tuple[int, ...] = (8, 16, 16, 16), **given: Any) -> AutoencoderKL:
    blocks = {
        "block_out_channels": widths,
        "down_block_types": len(widths) * ("DownEncoderBlock2D",),
        "up_block_types": len(widths) * ("UpDecoderBlock2D",),
        "norm_num_groups": 4,
    }
    return perturbed(AutoencoderKL(**{"latent_channels": 4, **blocks, **given}))


def tiny_dc(sana: bool, **given: Any) -> AutoencoderDC:
    scales: tuple[int, ...] = (5,) if sana else ()
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            "block_out_channels": (16, 32, 32, 64),
            "layers_per_block": (1, 1, 2, 1) if sana else (0, 1, 1, 2),
            "qkv_multiscales": ((), (), (), scales),
        }.items()
    }
    block = {"downsample_block_type": "Conv" if sana else "pixel_unshuffle"}
    return perturbed(AutoencoderDC(**{"latent_channels": 8, "scaling_factor": 0.41407, **block, **sides, **given}))


def tiny_taesd(**given: Any) -> AutoencoderTiny:
    widths = {"encoder_block_out_channels": 4 * (16,), "decoder_block_out_channels": 4 * (16,)}
    return perturbed(AutoencoderTiny(latent_channels=5, **{**widths, **given}))


def with_old_attention_names(folder: Path) -> None:
    """Rename what Stable Diffusion's first checkpoints call otherwise."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        for theirs, before in old.items():
            name = name.replace(theirs, before)
        state[name] = tensor
    assert sum(".query." in name for name in state) == 4
    save_file(state, folder / WEIGHTS, {"format": "pt"})


MODELS: dict[str, Callable[[], Any]] = {
    "kl f8": tiny_kl,
    "kl f16": lambda: tiny_kl((8, 16, 24, 24, 24), layers_per_block=2, latent_channels=6),
    "kl of an odd ratio": lambda: tiny_kl((16, 24, 24, 40), act_fn="swish"),
    "kl without quant_conv": lambda: tiny_kl(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159),
    "kl without attention": lambda: tiny_kl(mid_block_add_attention=False),
    "kl with old names": tiny_kl,
    "dc": lambda: tiny_dc(False),
    "dc without a shortcut": lambda: tiny_dc(False, encoder_out_shortcut=False),
    "dc of sana": lambda: tiny_dc(True),
    "tiny": lambda: tiny_taesd(scaling_factor=1.5, shift_factor=0.1, num_encoder_blocks=(1, 2, 1, 1)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_what_the_command_saves_encodes_as_diffusers_does(name: str, tmp_path: Path) -> None:
    theirs = MODELS[name]()
    theirs.save_pretrained(tmp_path / "published", max_shard_size="60KB" if name == "dc" else "5GB")
    assert (tmp_path / "published" / f"{WEIGHTS}.index.json").exists() == (name == "dc")
    if name == "kl with old names":
        with_old_attention_names(tmp_path / "published")
    words = ["convert", "diffusers", str(tmp_path / "published"), "--out", str(tmp_path / "ours")]
    assert main([*words, "--decoder-size", "XS"]) == 0
    ours = DCSSDAE.from_pretrained(tmp_path / "ours")
    assert isinstance(ours.decoder, UViTDecoder)
    factor = ours.config.downsample_factor
    for height, width in ((64, 64), (64, 96)):
        x = 2.0 * torch.rand(2, 3, height, width) - 1.0
        posterior, encoded = ours.encode(x).latent_dist, theirs.encode(x)
        if name.startswith(("dc", "tiny")):
            assert posterior.logvar is None
            mean = encoded.latents if name == "tiny" else encoded.latent
        else:
            mean = encoded.latent_dist.mean
            torch.testing.assert_close(posterior.logvar, encoded.latent_dist.logvar, atol=TOLERANCE, rtol=0.0)
        assert mean.shape[-2:] == (height // factor, width // factor)
        assert mean.std() > 0.02
        torch.testing.assert_close(posterior.mean, mean, atol=TOLERANCE, rtol=0.0)
    assert ours.config.scaling_factor == theirs.config.scaling_factor
    assert ours.config.shift_factor == (theirs.config.get("shift_factor") or 0.0)


def test_an_absent_quant_conv_is_exactly_the_identity() -> None:
    theirs = tiny_kl(use_quant_conv=False)
    ours = KLEncoder(4, 8, channels=8, multipliers=[1, 2, 2, 2], blocks_per_level=1, norm_groups=4)
    ours.load_state_dict(convert_tensors(ours, theirs.state_dict()))
    x = torch.randn(2, 8, 5, 7) * torch.logspace(-20, 20, 8).view(1, 8, 1, 1)
    assert torch.equal(ours.latent_head[3](x), x)


# --- configs as they are published ---


def kl_config(**given: Any) -> dict[str, Any]:
    blocks = {"down_block_types": 4 * ["DownEncoderBlock2D"], "up_block_types": 4 * ["UpDecoderBlock2D"]}
    published = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "layers_per_block": 2, "norm_num_groups": 32}
    widths = {"block_out_channels": [128, 256, 512, 512]}
    named = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "_name_or_path": "somewhere/else"}
    return {**named, **blocks, **published, **widths, "latent_channels": 4, "sample_size": 512, **given}


def dc_config(stages: int, channels: int, sana: bool = False, **given: Any) -> dict[str, Any]:
    widths = [128, 256, 512, 512, 1024, 1024, 2048, 2048][:stages]
    kinds = ["ResBlock"] * 3 + ["EfficientViTBlock"] * (stages - 3)
    scales = [[]] * 3 + [[5] if sana else []] * (stages - 3)
    norms = ["batch_norm"] * 3 + ["rms_norm"] * (stages - 3)
    encoder, decoder = ([2, 2, 2, 3, 3, 3], [3] * 6) if sana else ([0, 4, 8, 2, 2, 2, 2, 2], [0, 5, 10, 2, 2, 2, 2, 2])
    return {
        "_class_name": "AutoencoderDC",
        "_diffusers_version": "0.32.0.dev0",
        "attention_head_dim": 32,
        "decoder_act_fns": "silu" if sana else ["relu"] * 3 + ["silu"] * (stages - 3),
        "decoder_block_out_channels": widths,
        "decoder_block_types": kinds,
        "decoder_layers_per_block": decoder[:stages],
        "decoder_norm_types": "rms_norm" if sana else norms,
        "decoder_qkv_multiscales": scales,
        "downsample_block_type": "Conv" if sana else "pixel_unshuffle",
        "encoder_block_out_channels": widths,
        "encoder_block_types": kinds,
        "encoder_layers_per_block": encoder[:stages],
        "encoder_qkv_multiscales": scales,
        "in_channels": 3,
        "latent_channels": channels,
        "upsample_block_type": "interpolate" if sana else "pixel_shuffle",
        **given,
    }


PLAYGROUND = {
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    "scaling_factor": 0.5,
}

PUBLISHED: dict[str, tuple[dict[str, Any], int, float]] = {
    "Stable Diffusion": (kl_config(), 8, 0.18215),
    "SDXL": (kl_config(scaling_factor=0.13025, force_upcast=True), 8, 0.13025),
    "Playground": (kl_config(**PLAYGROUND), 8, 0.5),
    "FLUX": (
        kl_config(
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            latents_mean=None,
            latents_std=None,
            mid_block_add_attention=True,
        ),
        8,
        0.3611,
    ),
    "DC-AE f32c32": (dc_config(6, 32, scaling_factor=0.3189), 32, 0.3189),
    "DC-AE f64c128": (dc_config(7, 128, scaling_factor=0.2889), 64, 0.2889),
    "DC-AE f128c512": (dc_config(8, 512, scaling_factor=0.4883), 128, 0.4883),
    "SANA": (dc_config(6, 32, sana=True, scaling_factor=0.41407), 32, 0.41407),
}


def encoder_of(settings_of_model: dict[str, Any]) -> Any:
    part = settings_of_model["encoder"]
    shape = {key: settings_of_model[key] for key in ("latent_channels", "downsample_factor")}
    with torch.device("meta"):
        return COMPONENTS["encoder"][part["class_path"]](**shape, **part["init_args"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_name_every_tensor(name: str) -> None:
    config, factor, scaling_factor = PUBLISHED[name]
    found = model_settings(config)
    assert found["downsample_factor"] == factor
    assert found["scaling_factor"] == scaling_factor
    assert found["latents_mean"] == config.get("latents_mean")
    assert found["latents_std"] == config.get("latents_std")
    with torch.device("meta"):
        reference = CLASSES[config["_class_name"]].from_config(config)
    theirs = {
        key: tensor.numel()
        for key, tensor in reference.state_dict().items()
        if key.startswith(("encoder.", "quant_conv."))
    }
    ours = encoder_of(found)
    names = diffusers_names(ours)
    if name == "FLUX":
        names = {key: value for key, value in names.items() if not key.startswith("latent_head.3.")}
    assert sorted(source for sources in names.values() for source in sources) == sorted(theirs)
    for key, sources in names.items():
        assert ours.state_dict()[key].numel() == sum(theirs[source] for source in sources)


@pytest.mark.parametrize(
    ("name", "preset"), [("SANA", "sana_f32c32_frozen_eqm"), ("Stable Diffusion", "sd_f8c4_frozen_eqm")]
)
def test_the_presets_are_of_the_published_encoders(name: str, preset: str) -> None:
    published = encoder_of(model_settings(PUBLISHED[name][0]))
    with torch.device("meta"):
        ours = DCSSDAE.from_preset(preset).encoder
    shapes = [{key: tensor.shape for key, tensor in part.state_dict().items()} for part in (published, ours)]
    assert shapes[0] == shapes[1]
    if name == "SANA":
        assert (ours.variational, ours.out_shortcut) == (published.variational, published.out_shortcut)


def test_a_family_is_called_by_its_name() -> None:
    assert model_settings(PUBLISHED["SANA"][0])["encoder"]["init_args"] == {
        "architecture": "dc_ae_sana",
        "variational": False,
        "out_shortcut": True,
    }
    assert model_settings(PUBLISHED["DC-AE f64c128"][0])["encoder"]["init_args"]["architecture"] == "dc_ae"


# --- what is refused ---


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (kl_config(down_block_types=3 * ["DownEncoderBlock2D"] + ["AttnDownEncoderBlock2D"]), "down_block_types is 'A"),
        (kl_config(down_block_types=["DownEncoderBlock2D"]), "down_block_types has 1 levels; block_out_channels has"),
        (kl_config(act_fn="relu"), "act_fn is 'relu'; this package's encoder has silu or swish there"),
        (kl_config(in_channels=4), "in_channels is 4; this package's encoder has 3 there"),
        (kl_config(double_z=False), "unknown setting of AutoencoderKL 'double_z'"),
        (kl_config(layers_per_block=10**9), "layers_per_block has 1000000000; it must be a whole number from 1 to 100"),
        (kl_config(layers_per_block=True), "layers_per_block is True"),
        (kl_config(use_quant_conv="false"), "use_quant_conv is 'false'"),
        (kl_config(norm_num_groups=0), "norm_num_groups has 0"),
        (kl_config(norm_num_groups=48), "norm_groups"),
        (kl_config(block_out_channels=[]), "block_out_channels is empty"),
        (kl_config(block_out_channels=[128], down_block_types=["DownEncoderBlock2D"]), "downsample_factor"),
        (dc_config(6, 32, attention_head_dim=64), "attention_head_dim is 64; this package's encoder has 32 there"),
        (dc_config(6, 32, downsample_block_type="max_pool"), "downsample_block_type is 'max_pool'"),
        (dc_config(6, 32, encoder_qkv_multiscales=[[], [], [], [5], [5], [3]]), "the same in all its attention"),
        (dc_config(6, 32, encoder_layers_per_block=[2, 2]), "encoder_layers_per_block has 2 stages"),
        (dc_config(6, 32, encoder_layers_per_block=[2, 2, 0, 2, 2, 2]), "only the first may be 0"),
        (dc_config(6, 32, encoder_block_types="DownBlock"), "unknown block type of DCEncoder 'DownBlock'"),
        (dc_config(6, 33), "out_shortcut needs a last width that is a multiple of latent_channels"),
        (
            {"_class_name": "VQModel"},
            "config.json describes a 'VQModel'; the encoders of AutoencoderKL and",
        ),
        ({"_class_name": "DCSSDAE"}, "which needs no conversion"),
        ({"_class_name": "os.system"}, "config.json describes a 'os.system'"),
        ({"_class_name": ["AutoencoderKL"]}, "config.json describes a ['AutoencoderKL']"),
        ({}, "config.json describes a None"),
    ],
)
def test_what_this_package_does_not_have_is_refused(config: dict[str, Any], message: str) -> None:
    assert message in refusal(lambda: encoder_of(model_settings(config)))


SMALL_KL = {**tiny_kl().config, "_class_name": "AutoencoderKL"}
SMALL_DC = {**tiny_dc(True).config, "_class_name": "AutoencoderDC"}

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70_000),
    st.just(10**30),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.one_of(st.integers(0, 64), st.text(max_size=3), st.lists(st.integers(0, 7), max_size=2)), max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=1),
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    config=st.sampled_from([SMALL_KL, SMALL_DC]),
    changes=st.dictionaries(st.integers(0, 40), VALUES, min_size=1, max_size=2),
    lost=st.integers(0, 60),
)
@example(config=SMALL_DC, changes={0: "\n"}, lost=60)
@example(config=SMALL_KL, changes={4: [8, 16, 16, 10**12]}, lost=60)
def test_no_config_raises_anything_but_an_input_error(
    config: dict[str, Any], changes: dict[int, Any], lost: int
) -> None:
    mutated = dict(config)
    keys = list(mutated)
    for place, value in changes.items():
        mutated[keys[place % len(keys)]] = value
    if lost < len(keys):
        mutated.pop(keys[lost])
    with suppress(InputError):
        encoder_of(model_settings(mutated))


@pytest.mark.parametrize("config", [SMALL_KL, SMALL_DC], ids=["kl", "dc"])
def test_what_is_mutated_is_right_before(config: dict[str, Any]) -> None:
    encoder_of(model_settings(config))


@pytest.mark.parametrize("config", [SMALL_KL, SMALL_DC], ids=["kl", "dc"])
def test_every_setting_of_the_wrong_type_is_one_line_if_it_is_read(config: dict[str, Any]) -> None:
    refused = set()
    for key in config:
        try:
            encoder_of(model_settings({**config, key: {"a\nb": "c\nd"}}))
        except InputError as error:
            refused.add(key)
            told = str(error)
            if "\n" in told or key not in f"{told} _class_name":
                pytest.fail(f"{key}: {told}")
    assert {"_class_name", "in_channels", "latent_channels"} < refused


# --- folders ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("published")
    tiny_kl().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a saved AutoencoderKL, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "kl"))


def convert(name: object, **given: Any) -> DCSSDAE:
    return convert_diffusers(str(name), **{"decoder_size": "XS", **given})


@pytest.mark.parametrize(
    "change", [{"scaling_factor": "x"}, {"sample_size": None}, {"up_block_types": [3]}, {"out": 1}]
)
def test_a_spoilt_config_is_one_line(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert refusal(lambda: convert(folder)).startswith(str(folder))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "{}"])
def test_a_damaged_config_is_one_line(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert refusal(lambda: convert(folder)).startswith(f"{folder}: ")


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)

    def told(changed: dict[str, Tensor]) -> str:
        save_file(changed, folder / WEIGHTS, {"format": "pt"})
        return refusal(lambda: convert(folder))

    name = "encoder.mid_block.resnets.0.conv1.bias"
    lacking = {key: tensor for key, tensor in state.items() if key != name}
    assert told(lacking) == f"{folder}: its file lacks the tensor {name} of AutoencoderKL"
    assert told({**state, "encoder.another": torch.zeros(1)}) == (
        f"{folder}: its file has left over the tensor encoder.another of AutoencoderKL"
    )
    assert name in told({**state, name: torch.zeros(3)})
    assert (
        told({**state, name: torch.full_like(state[name], torch.inf)}) == f"{folder}: the tensor {name} is not finite"
    )


def test_a_tensor_that_no_name_map_knows_is_refused() -> None:
    state = tiny_kl().state_dict()
    encoder = KLEncoder(4, 8, channels=8, multipliers=[1, 2, 2, 2], blocks_per_level=1, norm_groups=4)
    lacking = {key: tensor for key, tensor in state.items() if key != "quant_conv.bias"}
    assert refusal(lambda: convert_tensors(encoder, lacking)) == "the encoder lacks the tensor quant_conv.bias"
    more = {**state, "encoder.new": torch.zeros(1)}
    assert refusal(lambda: convert_tensors(encoder, more)) == "the encoder has left over the tensor encoder.new"
    odd = {**state, "quant_conv.bias": torch.zeros(9)}
    assert "quant_conv.bias has shape (9,)" in refusal(lambda: convert_tensors(encoder, odd))
    assert "Identity" in refusal(lambda: diffusers_names(nn.Identity()))


@pytest.mark.parametrize("place", [3, 40, 4000])
def test_damaged_headers_are_one_line(folder: Path, place: int) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[place] ^= 1 << 6
    (folder / WEIGHTS).write_bytes(content)
    assert refusal(lambda: convert(folder)).startswith(str(folder))


def test_a_truncated_file_is_one_line(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    assert refusal(lambda: convert(folder)).startswith(f"{folder} cannot be loaded as AutoencoderKL: ")


class Bomb:
    """What a pickle does when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.fixture
def no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever unpickles is told on, whether or not the pickle would do any harm."""

    def unpickle(*given: object, **more: object) -> None:
        pytest.fail(f"torch.load{given}")

    monkeypatch.setattr(torch, "load", unpickle)


@pytest.mark.usefixtures("no_pickles")
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin", "model.ckpt"])
def test_a_pickle_is_never_loaded(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(Bomb(tmp_path / "exploded"), folder / name)
    told = refusal(lambda: convert(folder))
    assert told.startswith(f"{folder / name} is a pickle file, which could run code when loaded; convert it: python -c")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin", "model.ckpt"])
def test_the_command_that_is_told_converts_a_pickle(folder: Path, name: str) -> None:
    expected = convert(folder).encoder.state_dict()
    torch.save(load_file(folder / WEIGHTS), folder / name)
    (folder / WEIGHTS).unlink()
    words = shlex.split(refusal(lambda: convert(folder)).partition("convert it: ")[2])
    subprocess.run([sys.executable, *words[1:]], check=True)
    found = convert(folder).encoder.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


VARIANTS: list[tuple[str | None, str]] = [
    (None, f"{WEIGHTS}.index.json"),
    ("fp16", f"{WEIGHTS}.index.fp16.json"),
    ("fp16", f"{WEIGHTS}.fp16.index.json"),
]
"""Each with the name of its index; diffusers once wrote the last."""


def with_pickled_shards(folder: Path, index: str, shard: str) -> None:
    """An index of safetensors, in name, whose tensors are in a pickle that diffusers would load; and safetensors."""
    state = load_file(folder / WEIGHTS)
    torch.save(state, folder / shard)
    save_file({"x": torch.zeros(1)}, folder / "a.safetensors")
    (folder / WEIGHTS).unlink()
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, shard)}))


@pytest.mark.usefixtures("no_pickles")
@pytest.mark.parametrize(("variant", "index"), VARIANTS)
@pytest.mark.parametrize("shard", ["w.bin", "w", "w.safetensors.pt", "w.SAFETENSORS", "w.gguf"])
def test_an_index_that_names_a_pickle_is_refused(folder: Path, variant: str | None, index: str, shard: str) -> None:
    with_pickled_shards(folder, index, shard)
    told = refusal(lambda: convert(folder, variant=variant))
    assert str(folder) in told
    assert shard in told


@pytest.mark.usefixtures("no_pickles")
def test_an_index_in_a_folder_beside_is_not_looked_at(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers would look for it with the variant behind the second dot of the whole path, wherever that is."""
    monkeypatch.chdir(tmp_path)
    meant, beside = Path("a.b.c"), Path("a.b.fp16.c")
    for copy in (meant, beside):
        shutil.copytree(saved, copy)
    with_pickled_shards(beside, f"{WEIGHTS}.index.json", "w.bin")
    shutil.copy(beside / "w.bin", meant)
    (meant / WEIGHTS).rename(meant / "diffusion_pytorch_model.fp16.safetensors")
    convert(meant, variant="fp16")


@pytest.mark.usefixtures("no_pickles")
@pytest.mark.parametrize(("variant", "index"), VARIANTS)
def test_shards_are_loaded_by_their_index(folder: Path, variant: str | None, index: str) -> None:
    expected = convert(folder).encoder.state_dict()
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    shards = {name: f"some-{number % 2}.safetensors" for number, name in enumerate(state)}
    for shard in set(shards.values()):
        save_file({name: state[name] for name in state if shards[name] == shard}, folder / shard, {"format": "pt"})
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    found = convert(folder, variant=variant).encoder.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    (folder / "some-1.safetensors").unlink()
    told = refusal(lambda: convert(folder, variant=variant))
    assert told == f"{folder}: {index} names 'some-1.safetensors', which is missing"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"x": "../w.safetensors"}}', '{"weight_map": {"x": 3}}'],
)
def test_a_damaged_index_is_one_line(folder: Path, text: str) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text(text)
    assert refusal(lambda: convert(folder)).startswith(str(folder / f"{WEIGHTS}.index.json"))


def test_a_pickle_beside_safetensors_is_passed_over(folder: Path, tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "exploded"), folder / "diffusion_pytorch_model.bin")
    convert(folder)
    assert not (tmp_path / "exploded").exists()


def test_quantised_weights_are_refused(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gguf"}}))
    assert "its weights are quantised" in refusal(lambda: convert(folder))


def test_a_pipeline_a_subfolder_and_a_variant(saved: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(saved, pipeline / "vae")
    AutoencoderKL.from_pretrained(saved, torch_dtype=torch.float16).save_pretrained(pipeline / "half", variant="fp16")
    expected = convert(saved).encoder.state_dict()
    for where in ({}, {"subfolder": "vae"}, {"subfolder": "half", "variant": "fp16"}):
        found = convert(pipeline, **where).encoder.state_dict()
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-3, rtol=1e-3)
    assert "there is no config.json, in nowhere/" in refusal(lambda: convert(pipeline, subfolder="nowhere"))
    name = "diffusion_pytorch_model.fp16.safetensors"
    assert refusal(lambda: convert(saved, variant="fp16")) == f"{saved}: there is no {name}"
    half = pipeline / "half"
    assert refusal(lambda: convert(half)) == f"{half}: there is no {WEIGHTS}; there is the variant 'fp16'"


def test_names_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = refusal(lambda: convert("no-owner/no-model"))
    assert told == "no-owner/no-model: the hub cannot be reached, and no copy was downloaded before"
    for name in ("nowhere", "a/b/c", "a\0b/c", "\ud800/x", ""):
        assert "no such folder, nor the id of a model on the hub" in refusal(lambda name=name: convert(name))
    (tmp_path / "model.ckpt").touch()
    assert "is a file; name the folder" in refusal(lambda: convert(tmp_path / "model.ckpt"))
    assert "there is no config.json" in refusal(lambda: convert(tmp_path))


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
@pytest.mark.parametrize("where", ["", "vae"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_model_of_the_hub(saved: Path, snapshot: Path, where: str, variant: str | None) -> None:
    shutil.copytree(saved, snapshot / where, dirs_exist_ok=True)
    if variant:
        (snapshot / where / WEIGHTS).rename(snapshot / where / f"diffusion_pytorch_model.{variant}.safetensors")
    expected = convert(saved).state_dict()
    found = convert("owner/name", variant=variant).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.usefixtures("no_pickles")
@pytest.mark.parametrize("where", ["", "vae"])
@pytest.mark.parametrize(("variant", "index"), VARIANTS)
def test_an_index_on_the_hub_that_names_a_pickle_is_refused(
    saved: Path, snapshot: Path, where: str, variant: str | None, index: str
) -> None:
    shutil.copytree(saved, snapshot / where, dirs_exist_ok=True)
    with_pickled_shards(snapshot / where, index, "w.bin")
    told = refusal(lambda: convert("owner/name", variant=variant))
    assert told == f"owner/name: {index} is no index of safetensors that lie beside it"


@pytest.mark.usefixtures("no_pickles")
@pytest.mark.parametrize("where", ["", "vae"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_model_of_the_hub_that_is_a_pickle_alone(
    saved: Path, snapshot: Path, where: str, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which no pickle is fetched: the hub's list of files tells, or what diffusers has kept."""
    (snapshot / where).mkdir(exist_ok=True)
    shutil.copy(saved / "config.json", snapshot / where)
    name = "diffusion_pytorch_model.bin"
    if listed:
        files = ["README.md", "unet/a.safetensors", str(Path(where, name)), str(Path(where, "config.json"))]
        monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository: files)
    else:
        torch.save(load_file(saved / WEIGHTS), snapshot / where / name)
    told = refusal(lambda: convert("owner/name"))
    assert told.startswith(f"owner/name: its weights are a pickle alone, {name}, which could run code when loaded;")
    assert "hf download owner/name --local-dir name, and name that folder" in told


@pytest.mark.parametrize("listed", [True, False])
def test_a_model_of_the_hub_without_weights(
    saved: Path, snapshot: Path, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(saved / "config.json", snapshot)
    if listed:
        files = ["config.json", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.bin"]
        monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository: files)
        (snapshot / "diffusion_pytorch_model.fp16.bin").touch()  # which something else has fetched
    told = refusal(lambda: convert("owner/name"))
    where = "on the hub" if listed else "in what was kept from the hub, which is out of reach"
    assert told == f"owner/name: there is no {WEIGHTS} {where}"


def test_what_the_hub_refuses_is_one_line(saved: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(saved / "config.json", snapshot)

    def refuse(*given: object, **more: object) -> None:
        raise OSError("403\nforbidden.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    told = "owner/name: no such folder, and it cannot be downloaded from the hub: 403 forbidden."
    assert refusal(lambda: convert("owner/name")) == told


@pytest.mark.parametrize(("stated", "remarked"), [(True, True), (False, False), (None, False)])
def test_what_is_unsafe_in_float16_is_remarked_where_it_is_stated(
    folder: Path, stated: bool | None, remarked: bool
) -> None:
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "force_upcast"}
    path.write_text(json.dumps(config if stated is None else {**config, "force_upcast": stated}))
    remarks: list[str] = []
    convert(folder, remark=remarks.append)
    assert remarks == ([UNSAFE_IN_FLOAT16] if remarked else [])


def test_the_decoder_follows_from_the_seed(saved: Path) -> None:
    before = torch.get_rng_state()
    first = convert(saved, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    second, other = convert(saved, seed=5), convert(saved, seed=6)
    states = [model.decoder.state_dict() for model in (first, second, other)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not torch.equal(states[0]["image_in.weight"], states[2]["image_in.weight"])
    assert not first.training


def test_size_and_dynamics_are_the_users(saved: Path) -> None:
    assert convert(saved, dynamics="FlowMatching").dynamics.conditions_on_time
    assert "unknown size of UViTDecoder 'XXS'" in refusal(lambda: convert(saved, decoder_size="XXS"))
    assert "unknown class of dynamics 'FlowMathcing'" in refusal(lambda: convert(saved, dynamics="FlowMathcing"))


def test_a_decoder_of_patches_predicts_the_image_and_starts_without_a_shortcut(saved: Path) -> None:
    model = convert(saved, decoder_size="fast")
    assert model.config.dynamics["init_args"]["prediction"] == "image"
    assert isinstance(model.decoder, UViTDecoder)
    assert model.decoder.block_shortcut.weight.count_nonzero() == 0


def test_a_trained_decoder_joins_its_own_encoder_alone(saved: Path, tmp_path: Path) -> None:
    """The file need not hold the encoder; what it holds of it must be the published one's."""
    trained = convert(saved, seed=5, decoder_size="fast").half()
    trained.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    kept = {name: tensor for name, tensor in whole.items() if name.startswith(("decoder.", "encoder.latent_head."))}
    for tensors in (whole, kept):
        save_file(tensors, file)
        model = convert(saved, decoder=tmp_path)
        assert model.config.dynamics == trained.config.dynamics
        assert model.config.provenance == {"source": trained.config.provenance["source"], "untrained": ["decoder"]}
        for name, tensor in model.decoder.state_dict().items():
            assert torch.equal(tensor, trained.decoder.state_dict()[name].to(tensor.dtype)), name
    for name, change, message in (
        ("encoder.latent_head.2.bias", lambda tensor: tensor + 1, "was trained on another encoder than that of"),
        ("decoder.conv_out.bias", lambda tensor: tensor[1:], "has no decoder.conv_out.bias of shape"),
    ):
        save_file({**kept, name: change(kept[name])}, file)
        assert message in refusal(lambda: convert(saved, decoder=tmp_path))
    save_file({name: tensor for name, tensor in kept.items() if name.startswith("decoder.")}, file)
    assert "has no encoder tensor to check" in refusal(lambda: convert(saved, decoder=tmp_path))
    tiny_taesd().save_pretrained(tmp_path / "other")
    told = "was trained on another encoder than that of other: latent_channels differs"
    save_file(whole, file)
    assert told in refusal(lambda: convert(tmp_path / "other", decoder=tmp_path)).replace(f"{tmp_path}/", "")


def test_a_wrapped_encoder_has_no_decoder_and_names_what_it_does_not_know(tmp_path: Path) -> None:
    tiny_taesd().save_pretrained(tmp_path)
    model = convert(tmp_path, decoder_size="fast")
    assert not [name for name in model.encoder.state_dict() if "decoder" in name]
    settings = model.config.encoder["init_args"]["settings"]
    with pytest.raises(InputError, match="unknown setting of AutoencoderTiny 'num_blocks'"):
        DiffusersEncoder(5, 8, settings={**settings, "num_blocks": 3})
    with pytest.raises(InputError, match="latent_channels is 4; AutoencoderTiny has 5"):
        DiffusersEncoder(4, 8, settings=settings)
    with pytest.raises(InputError, match="autoencoder of DiffusersEncoder 'DiffusionPipeline'"):
        DiffusersEncoder(5, 8, autoencoder="DiffusionPipeline")


def test_a_wrapped_encoder_gives_the_same_latents_with_its_activations_computed_again(tmp_path: Path) -> None:
    tiny_taesd().save_pretrained(tmp_path)
    model = convert(tmp_path, decoder_size="fast")
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        latents = model.encoder(x).mean
        latents.square().sum().backward()
        found.append([latents, *(parameter.grad for parameter in model.encoder.parameters())])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)
