"""Real pipelines of diffusers, tiny and with random weights, around a DCSSDAE as their `vae`; nothing is patched."""

import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_models import tiny
from torch import Tensor

from dc_ssdae import DCSSDAE
from dc_ssdae.latent import LatentStatistics

WIDTH = 8
"""Of the prompts' embeddings."""

HEADS = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
JOINT = {**HEADS, "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}
"""Of transformers that attend to images and prompts together."""

STATISTICS = LatentStatistics([0.5, -0.25, 0.75, 0.125], [1.5, 2.0, 0.5, 1.25], 100)
"""Far from 0 and 1, so that a pipeline that does not undo them, or undoes others, gives another picture."""

MEASURED = SimpleNamespace(
    scaling_factor=2.1591796875**-0.5, shift_factor=0.28125, latents_mean=STATISTICS.mean, latents_std=STATISTICS.std
)
"""What the vae's config must say: of all values together the variance is 2.1591796875."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompt(batch: int) -> dict[str, Any]:
    return {"prompt_embeds": torch.randn(batch, 3, WIDTH, generator=seeded(3)), "guidance_scale": 1.0}


def pooled_prompt(batch: int) -> dict[str, Any]:
    return {**prompt(batch), "pooled_prompt_embeds": torch.randn(batch, WIDTH, generator=seeded(4))}


def sana_prompt(batch: int) -> dict[str, Any]:
    return {**prompt(batch), "prompt_attention_mask": torch.ones(batch, 3), "use_resolution_binning": False}


def classes(batch: int) -> dict[str, Any]:
    return {"class_labels": list(range(batch)), "guidance_scale": 1.0}


def dit(vae: Any, kind: type) -> Any:
    transformer = DiTTransformer2DModel(
        **HEADS,
        out_channels=4,
        sample_size=4,
        norm_num_groups=4,
        num_embeds_ada_norm=1000,  # the pipeline's number of the class for guidance
    )
    return kind(transformer.eval(), vae, DDIMScheduler())  # in training it drops classes at random


def sana(vae: Any, kind: type) -> Any:
    transformer = SanaTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=4,
    )
    return kind(None, None, vae, transformer, FlowMatchEulerDiscreteScheduler())


def unet(**settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        **settings,
    )


def stable_diffusion(vae: Any, kind: type) -> Any:
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return kind(vae, None, None, unet(), scheduler, None, None, requires_safety_checker=False)


def stable_diffusion_xl(vae: Any, kind: type) -> Any:
    times = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    predictor = unet(**times, projection_class_embeddings_input_dim=WIDTH + 6 * 4)
    return kind(vae, None, None, None, None, predictor, EulerDiscreteScheduler(), add_watermarker=False)


def stable_diffusion_3(vae: Any, kind: type) -> Any:
    transformer = SD3Transformer2DModel(
        **JOINT,
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        caption_projection_dim=2 * 8,
        pos_embed_max_size=16,
    )
    return kind(transformer, FlowMatchEulerDiscreteScheduler(), vae, *[None] * 6)


def flux(vae: Any, kind: type) -> Any:
    transformer = FluxTransformer2DModel(**JOINT, in_channels=4 * 4, num_single_layers=1, axes_dims_rope=(2, 2, 4))
    return kind(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer)


def unscaled(latents: Tensor, config: Any) -> Tensor:
    return latents / config.scaling_factor


def unscaled_and_shifted(latents: Tensor, config: Any) -> Tensor:
    return latents / config.scaling_factor + config.shift_factor


def unscaled_by_channel(latents: Tensor, config: Any) -> Tensor:
    """Stable Diffusion XL's way, with scaling_factor besides mean and standard deviation of the channels."""
    std, mean = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_std, config.latents_mean))
    return latents * std / config.scaling_factor + mean


@dataclass(frozen=True)
class Case:
    """A pipeline, what it is called with, and what its documentation says of the latents it hands to the vae."""

    build: Callable[..., Any]
    kind: type
    unscale: Callable[[Tensor, Any], Tensor]
    given: Callable[[int], dict[str, Any]] = prompt
    factor: int = 8
    encoder: str = "KLEncoder"
    height: int = 32
    width: int = 48
    noise_of_its_own: bool = False  # the generator goes on to the decode

    def arguments(self, batch: int = 1) -> dict[str, Any]:
        """What goes into a call, but for the generator."""
        image = torch.rand(batch, 3, self.height, self.width, generator=seeded(5))
        given = {"height": self.height, "width": self.width, "image": image, "strength": 1.0}
        taken = given.keys() & inspect.signature(self.kind.__call__).parameters
        return {**self.given(batch), **{name: given[name] for name in taken}, "num_inference_steps": 2}


CASES = {
    "DiT": Case(dit, DiTPipeline, unscaled, classes, encoder="DCEncoder", width=32),  # it makes squares only
    "Sana": Case(sana, SanaPipeline, unscaled, sana_prompt, 32, "DCEncoder", 64, 96),
    "SD": Case(stable_diffusion, StableDiffusionPipeline, unscaled, noise_of_its_own=True),
    "SDXL": Case(stable_diffusion_xl, StableDiffusionXLPipeline, unscaled_by_channel, pooled_prompt),
    "SD3": Case(stable_diffusion_3, StableDiffusion3Pipeline, unscaled_and_shifted, pooled_prompt),
    "Flux": Case(flux, FluxPipeline, unscaled_and_shifted, pooled_prompt, 16, "DCEncoder", width=64),
}
IMAGE_TO_IMAGE = {
    "SD": StableDiffusionImg2ImgPipeline,
    "SDXL": StableDiffusionXLImg2ImgPipeline,
    "SD3": StableDiffusion3Img2ImgPipeline,
    "Flux": FluxImg2ImgPipeline,
}
OF_IMAGES = {f"{name}-img2img": replace(CASES[name], kind=kind) for name, kind in IMAGE_TO_IMAGE.items()}
CASES |= OF_IMAGES
each_pipeline = pytest.mark.parametrize("name", CASES)


@functools.cache
def pipeline_of(name: str) -> Any:
    """Built once in a process; a test leaves it as it was."""
    case = CASES[name]
    torch.manual_seed(1)
    vae = tiny(case.factor, case.encoder)
    vae.register_to_config(**STATISTICS.settings())
    pipeline = case.build(vae, case.kind)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(name: str, generator: torch.Generator, pipeline: Any = None, batch: int = 2, **settings: Any) -> Tensor:
    """Pictures in [0, 1], (B, 3, H, W); or latents, where `output_type` says so."""
    arguments = {**CASES[name].arguments(batch), "output_type": "pt", **settings}
    images = (pipeline or pipeline_of(name))(**arguments, generator=generator).images
    return images if arguments["output_type"] == "latent" else as_pictures(images)


def as_pictures(images: Any) -> Tensor:
    """Older versions of diffusers give DiT's as arrays with the channels last."""
    images = torch.as_tensor(images)
    return images.permute(0, 3, 1, 2) if images.shape[-1] == 3 else images


@each_pipeline
def test_a_seed_is_a_picture(name: str) -> None:
    """Whatever the default generator's state, and without using that up."""
    first = pictures(name, seeded(7))
    assert first.shape == (2, 3, CASES[name].height, CASES[name].width)
    assert first.isfinite().all()
    assert first.std() > 0.05
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(pictures(name, seeded(7)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(pictures(name, seeded(8)), first, atol=1e-2)


@pytest.mark.parametrize("name", [name for name in CASES if name != "DiT"])  # which does not give its latents
@torch.no_grad()
def test_the_picture_is_the_decode_of_the_unscaled_latents(name: str) -> None:
    case, generator = CASES[name], seeded(7)
    latents = pictures(name, generator, output_type="latent")
    if case.build is flux:  # it packs 2×2 latents into a token
        rows, columns = case.height // (2 * case.factor), case.width // (2 * case.factor)
        tokens = latents.view(2, rows, columns, 4, 2, 2)
        latents = tokens.permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 2 * rows, 2 * columns)
    own = {"generator": generator} if case.noise_of_its_own else {}
    y = pipeline_of(name).vae.decode(case.unscale(latents, MEASURED), **own).sample
    torch.testing.assert_close(pictures(name, seeded(7)), (y / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("name", OF_IMAGES)
@torch.no_grad()
def test_images_are_encoded_and_scaled(name: str) -> None:
    """What noise is added to is a sample of the encoding, drawn from the generator that was given, and scaled."""
    pipeline = pipeline_of(name)
    adding = "scale_noise" if hasattr(pipeline.scheduler, "scale_noise") else "add_noise"
    with mock.patch.object(pipeline.scheduler, adding, wraps=getattr(pipeline.scheduler, adding)) as noising:
        pictures(name, seeded(7))
    started_from = noising.call_args_list[0].args[0]
    z = pipeline.vae.encode(2.0 * CASES[name].arguments(2)["image"] - 1.0).latent_dist.sample(seeded(7))
    torch.testing.assert_close(CASES[name].unscale(started_from, MEASURED), z, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("name", ["SD", "Flux", "Sana"])
def test_tiling_and_slicing(name: str) -> None:
    """Through the pipeline's own methods, where its version of diffusers has them, or the vae's."""
    pipeline = pipeline_of(name)
    vae = pipeline.vae
    whole = pictures(name, seeded(7))
    getattr(pipeline, "enable_vae_tiling", vae.enable_tiling)()
    assert vae.use_tiling
    vae.enable_tiling(2 * CASES[name].factor)
    tiled = pictures(name, seeded(7))
    assert tiled.isfinite().all()
    assert not torch.allclose(tiled, whole, atol=1e-3)
    getattr(pipeline, "disable_vae_tiling", vae.disable_tiling)()
    assert torch.equal(pictures(name, seeded(7)), whole)

    getattr(pipeline, "enable_vae_slicing", vae.enable_slicing)()
    assert vae.use_slicing
    torch.testing.assert_close(pictures(name, seeded(7)), whole, atol=1e-4, rtol=0.0)
    vae.disable_slicing()


LOADING = """
import sys
from pathlib import Path

import torch

import dc_ssdae
from diffusers import DiffusionPipeline

for folder in Path(sys.argv[1]).iterdir():
    if folder.is_dir():
        absent, arguments = torch.load(folder / "call.pt", weights_only=True)
        pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
        images = pipeline(**arguments, generator=torch.Generator().manual_seed(7)).images
        torch.save(torch.as_tensor(images), folder / "loaded.pt")
"""


def absent_parts(pipeline: Any) -> dict[str, None]:
    """What from_pretrained must be told to do without."""
    return {name: None for name in pipeline.config if name.startswith(("text_encoder", "tokenizer"))}


def save(folder: Path) -> None:
    """Save every pipeline with a call of it and the pictures that it gives."""
    for name, case in CASES.items():
        pipeline = pipeline_of(name)
        pipeline.save_pretrained(folder / name)
        torch.save((absent_parts(pipeline), {**case.arguments(2), "output_type": "pt"}), folder / name / "call.pt")
        torch.save(pictures(name, seeded(7)), folder / name / "expected.pt")


@pytest.fixture(scope="module")
def saved(made_once: Any) -> Path:
    return made_once("pipelines", save)


def test_a_fresh_process_that_imports_dc_ssdae_loads_the_pipelines(saved: Path) -> None:
    """And nothing more than that; they make the same pictures, bit for bit."""
    # Another number of threads is another order of sums.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", LOADING, str(saved)], env=environment, check=True)
    for name in CASES:
        loaded = as_pictures(torch.load(saved / name / "loaded.pt"))
        assert torch.equal(loaded, torch.load(saved / name / "expected.pt")), name


@each_pipeline
def test_half_precision(name: str, saved: Path) -> None:
    dtype = torch.float16
    half = DiffusionPipeline.from_pretrained(saved / name, **absent_parts(pipeline_of(name)), torch_dtype=dtype)
    half.set_progress_bar_config(disable=True)
    assert half.vae.dtype == dtype
    assert isinstance(half.vae, DCSSDAE)
    # Prompts are of the type that a text encoder would have given in; images stay as they are.
    prompts = {key: part.to(dtype) for key, part in CASES[name].arguments(2).items() if key.endswith("prompt_embeds")}
    y = pictures(name, seeded(7), half, **prompts)
    torch.testing.assert_close(y.float(), torch.load(saved / name / "expected.pt"), atol=0.02, rtol=0.0)
    assert half.vae.dtype == dtype, "a pipeline that asks for force_upcast must find it off"


def test_in_the_place_of_another_vae(saved: Path, tmp_path: Path) -> None:
    """`vae=` while loading somebody else's pipeline."""
    parts = {**pipeline_of("SD").components, "vae": AutoencoderKL(norm_num_groups=4, block_out_channels=(8,))}
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path)
    vae = DCSSDAE.from_pretrained(saved / "SD" / "vae")
    swapped = DiffusionPipeline.from_pretrained(tmp_path, **absent_parts(pipeline_of("SD")), vae=vae)
    assert torch.equal(pictures("SD", seeded(7), swapped), torch.load(saved / "SD" / "expected.pt"))


def test_without_measured_statistics_the_latents_go_through_as_they_are() -> None:
    """The defaults are numbers that change nothing, in every formula above."""
    latents, config = torch.randn(1, 4, 2, 3), tiny().config
    for unscale in (unscaled, unscaled_and_shifted):
        assert torch.equal(unscale(latents, config), latents)
    # With these Stable Diffusion XL divides by scaling_factor alone.
    assert (config.latents_mean, config.latents_std) == (None, None)
