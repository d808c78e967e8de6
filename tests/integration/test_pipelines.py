"""Real pipelines of diffusers, tiny and with random weights, around a DCSSDAE as their `vae`; nothing is patched."""

import subprocess
import sys
from collections.abc import Callable, Iterator
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
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    SanaPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from generators import WIDTH, dit_transformer, flux_transformer, sana_transformer, unet
from tiny_models import tiny
from torch import Tensor

from dc_ssdae import DCSSDAE
from dc_ssdae.latent import LatentStatistics

STATISTICS = LatentStatistics([0.5, -0.25, 0.75, 0.125], [1.5, 2.0, 0.5, 1.25], 100)
"""Far from 0 and 1, so that a pipeline that does not undo them, or undoes others, gives another picture."""

MEASURED = SimpleNamespace(**STATISTICS.settings())
"""What the vae's config must say."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeddings(batch: int) -> Tensor:
    return torch.randn(batch, 3, WIDTH, generator=seeded(3))


def prompt(batch: int) -> dict[str, Any]:
    return {"prompt_embeds": embeddings(batch)}


def pooled_prompt(batch: int) -> dict[str, Any]:
    return {**prompt(batch), "pooled_prompt_embeds": torch.randn(batch, WIDTH, generator=seeded(4))}


def dit(vae: Any, kind: type = DiTPipeline) -> Any:
    return kind(dit_transformer().eval(), vae, DDIMScheduler())  # in training it drops classes at random


def sana(vae: Any, kind: type = SanaPipeline) -> Any:
    return kind(None, None, vae, sana_transformer(), FlowMatchEulerDiscreteScheduler())


def stable_diffusion(vae: Any, kind: type = StableDiffusionPipeline) -> Any:
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return kind(vae, None, None, unet(), scheduler, None, None, requires_safety_checker=False)


def stable_diffusion_xl(vae: Any, kind: type = StableDiffusionXLPipeline) -> Any:
    times = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    predictor = unet(**times, projection_class_embeddings_input_dim=WIDTH + 6 * 4)
    return kind(vae, None, None, None, None, predictor, EulerDiscreteScheduler(), add_watermarker=False)


def stable_diffusion_3(vae: Any, kind: type = StableDiffusion3Pipeline) -> Any:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=8,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=16,
    )
    return kind(transformer, FlowMatchEulerDiscreteScheduler(), vae, *[None] * 6)


def flux(vae: Any, kind: type = FluxPipeline) -> Any:
    return kind(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, flux_transformer())


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
    settings: tuple[tuple[str, Any], ...] = ()
    takes_image: bool = False
    noise_of_its_own: bool = False  # the generator goes on to the decode

    def make(self) -> Any:
        torch.manual_seed(1)
        vae = tiny(self.factor, self.encoder)
        vae.register_to_config(**STATISTICS.settings())
        pipeline = self.build(vae, self.kind)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def arguments(self, batch: int = 1) -> dict[str, Any]:
        """What goes into a call, but for the generator."""
        image = torch.rand(batch, 3, self.height, self.width, generator=seeded(5))
        start = {"image": image, "strength": 1.0} if self.takes_image else {}
        size = {} if self.kind is DiTPipeline else {"height": self.height, "width": self.width}
        if self.takes_image and self.kind not in (FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline):
            size = {}  # the image's
        return {**self.given(batch), **size, **start, **dict(self.settings), "num_inference_steps": 2}


UNGUIDED = (("guidance_scale", 1.0),)
OF_SANA = (*UNGUIDED, ("use_resolution_binning", False))

CASES = {
    "DiT": Case(
        dit,
        DiTPipeline,
        unscaled,
        lambda batch: {"class_labels": list(range(batch))},
        encoder="DCEncoder",
        width=32,  # it makes squares only
        settings=UNGUIDED,
    ),
    "Sana": Case(
        sana,
        SanaPipeline,
        unscaled,
        lambda batch: {**prompt(batch), "prompt_attention_mask": torch.ones(batch, 3)},
        factor=32,
        encoder="DCEncoder",
        height=64,
        width=96,
        settings=OF_SANA,
    ),
    "SD": Case(stable_diffusion, StableDiffusionPipeline, unscaled, settings=UNGUIDED, noise_of_its_own=True),
    "SDXL": Case(stable_diffusion_xl, StableDiffusionXLPipeline, unscaled_by_channel, pooled_prompt, settings=UNGUIDED),
    "SD3": Case(
        stable_diffusion_3,
        StableDiffusion3Pipeline,
        unscaled_and_shifted,
        pooled_prompt,
        encoder="DCEncoder",
        settings=UNGUIDED,
    ),
    "Flux": Case(flux, FluxPipeline, unscaled_and_shifted, pooled_prompt, factor=16, encoder="DCEncoder", width=64),
}
IMAGE_TO_IMAGE = {
    "SD": StableDiffusionImg2ImgPipeline,
    "SDXL": StableDiffusionXLImg2ImgPipeline,
    "SD3": StableDiffusion3Img2ImgPipeline,
    "Flux": FluxImg2ImgPipeline,
}
CASES |= {f"{name}-img2img": replace(CASES[name], kind=kind, takes_image=True) for name, kind in IMAGE_TO_IMAGE.items()}
each_pipeline = pytest.mark.parametrize("name", CASES)
made: dict[str, Any] = {}


@pytest.fixture
def pipeline(name: str) -> Iterator[Any]:
    """Built once in a process; a test leaves it as it was."""
    if name not in made:
        made[name] = CASES[name].make()
    yield made[name]
    made[name].vae.disable_tiling()
    made[name].vae.disable_slicing()


def pictures(pipeline: Any, name: str, generator: Any, batch: int = 1, **settings: Any) -> Tensor:
    """Pictures in [0, 1], (B, 3, H, W); or latents, where `output_type` says so."""
    arguments = {**CASES[name].arguments(batch), "output_type": "pt", **settings}
    images = pipeline(**arguments, generator=generator).images
    return images if arguments["output_type"] == "latent" else as_pictures(images)


def as_pictures(images: Any) -> Tensor:
    """Older versions of diffusers give DiT's as arrays with the channels last."""
    images = torch.as_tensor(images)
    return images.permute(0, 3, 1, 2) if images.shape[-1] == 3 else images


def by_hand(latents: Tensor, name: str, vae: DCSSDAE, **settings: Any) -> Tensor:
    """The pictures of a pipeline's latents."""
    case = CASES[name]
    if case.build is flux:  # it packs 2×2 latents into a token
        rows, columns = (side // (2 * case.factor) for side in (case.height, case.width))
        tokens = latents.view(len(latents), rows, columns, 4, 2, 2)
        latents = tokens.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), 4, 2 * rows, 2 * columns)
    with torch.no_grad():
        y = vae.decode(case.unscale(latents, MEASURED), **settings).sample
    return (y / 2 + 0.5).clamp(0, 1)


@each_pipeline
def test_a_seed_is_a_picture(name: str, pipeline: Any) -> None:
    """Whatever the default generator's state, and without using that up."""
    case = CASES[name]
    first = pictures(pipeline, name, seeded(7), batch=2)
    assert first.shape == (2, 3, case.height, case.width)
    assert first.isfinite().all()
    assert first.std() > 0.05
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(pictures(pipeline, name, seeded(7), batch=2), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(pictures(pipeline, name, seeded(8), batch=2), first, atol=1e-2)


@pytest.mark.parametrize("name", [name for name in CASES if name != "DiT"])  # which does not give its latents
def test_the_picture_is_the_decode_of_the_unscaled_latents(name: str, pipeline: Any) -> None:
    generator = seeded(7)
    latents = pictures(pipeline, name, generator, output_type="latent")
    own = {"generator": generator} if CASES[name].noise_of_its_own else {}
    torch.testing.assert_close(
        by_hand(latents, name, pipeline.vae, **own), pictures(pipeline, name, seeded(7)), atol=1e-5, rtol=0.0
    )


@pytest.mark.parametrize("name", ["DiT"])
@torch.no_grad()
def test_the_picture_of_dit_too(name: str, pipeline: Any) -> None:
    """Its loop gone through by hand."""
    latents = torch.randn(1, 4, 4, 4, generator=seeded(7))
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(2)
    for time in scheduler.timesteps:
        prediction = pipeline.transformer(latents, timestep=time[None], class_labels=torch.tensor([0])).sample
        latents = scheduler.step(prediction, time, latents).prev_sample
    expected = by_hand(latents, name, pipeline.vae)
    torch.testing.assert_close(pictures(pipeline, name, seeded(7)), expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.takes_image])
@torch.no_grad()
def test_images_are_encoded_and_scaled(name: str, pipeline: Any) -> None:
    """What noise is added to is a sample of the encoding, drawn from the generator that was given, and scaled."""
    arguments = CASES[name].arguments()
    adding = "scale_noise" if hasattr(pipeline.scheduler, "scale_noise") else "add_noise"
    with mock.patch.object(pipeline.scheduler, adding, wraps=getattr(pipeline.scheduler, adding)) as noising:
        pictures(pipeline, name, seeded(7))
    started_from = noising.call_args_list[0].args[0]
    z = pipeline.vae.encode(2.0 * arguments["image"] - 1.0).latent_dist.sample(seeded(7))
    assert started_from.shape == z.shape
    torch.testing.assert_close(CASES[name].unscale(started_from, MEASURED), z, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("name", ["SD", "Flux", "Sana"])
def test_tiling_and_slicing(name: str, pipeline: Any) -> None:
    """Through the pipeline's own methods, where its version of diffusers has them, or the vae's."""
    case, vae = CASES[name], pipeline.vae
    whole = pictures(pipeline, name, seeded(7), batch=2)
    getattr(pipeline, "enable_vae_tiling", vae.enable_tiling)()
    assert vae.use_tiling
    vae.enable_tiling(2 * case.factor)
    tiled = pictures(pipeline, name, seeded(7), batch=2)
    assert tiled.isfinite().all()
    assert not torch.allclose(tiled, whole, atol=1e-3)
    getattr(pipeline, "disable_vae_tiling", vae.disable_tiling)()
    assert torch.equal(pictures(pipeline, name, seeded(7), batch=2), whole)

    getattr(pipeline, "enable_vae_slicing", vae.enable_slicing)()
    batches = []
    hook = vae.decoder.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    sliced = pictures(pipeline, name, seeded(7), batch=2)
    hook.remove()
    assert batches == [1, 1]
    torch.testing.assert_close(sliced, whole, atol=1e-4, rtol=0.0)


LOADING = """
import sys
from pathlib import Path

import torch

import dc_ssdae
from diffusers import DiffusionPipeline

for folder in Path(sys.argv[1]).iterdir():
    if folder.is_dir():
        call = torch.load(folder / "call.pt", weights_only=True)
        pipeline = DiffusionPipeline.from_pretrained(folder, **call["absent"])
        generator = torch.Generator().manual_seed(call["seed"])
        images = pipeline(**call["arguments"], generator=generator).images
        torch.save(torch.as_tensor(images), folder / "loaded.pt")
"""


def absent_parts(pipeline: Any) -> dict[str, None]:
    """What from_pretrained must be told to do without."""
    return {name: None for name in pipeline.config if name.startswith(("text_encoder", "tokenizer"))}


def save_and_load(folder: Path) -> None:
    """Save every pipeline with a picture of it, and let a fresh process load it and make that picture again."""
    for name, case in CASES.items():
        pipeline = made.get(name) or case.make()
        made[name] = pipeline
        pipeline.save_pretrained(folder / name)
        arguments = {**case.arguments(2), "output_type": "pt"}
        call = {"absent": absent_parts(pipeline), "arguments": arguments, "seed": 7}
        torch.save(call, folder / name / "call.pt")
        torch.save(pictures(pipeline, name, seeded(7), batch=2), folder / name / "expected.pt")
    (folder / "load.py").write_text(LOADING)
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number is another order of sums
    command = [sys.executable, str(folder / "load.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    (folder / "output.txt").write_text(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def saved(made_once: Any) -> Path:
    return made_once("pipelines", save_and_load)


@each_pipeline
def test_a_fresh_process_that_imports_dc_ssdae_loads_the_pipeline(name: str, saved: Path) -> None:
    """And nothing more than that; it makes the same picture, bit for bit."""
    loaded = saved / name / "loaded.pt"
    assert loaded.exists(), (saved / "output.txt").read_text()[-2000:]
    expected = torch.load(saved / name / "expected.pt")
    assert torch.equal(as_pictures(torch.load(loaded)), expected)


def load(folder: Path, pipeline: Any, **settings: Any) -> Any:
    loaded = DiffusionPipeline.from_pretrained(folder, **absent_parts(pipeline), **settings)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def cast_inputs(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """The prompts, which a text encoder would have given in the pipeline's type; images stay as they are."""
    arguments = CASES[name].arguments(2)
    return {key: value.to(dtype) for key, value in arguments.items() if key.endswith("prompt_embeds")}


@each_pipeline
def test_half_precision(name: str, saved: Path, pipeline: Any) -> None:
    dtype = torch.float16
    half = load(saved / name, pipeline, torch_dtype=dtype)
    assert half.vae.dtype == dtype
    assert isinstance(half.vae, DCSSDAE)
    expected = torch.load(saved / name / "expected.pt")
    y = pictures(half, name, seeded(7), batch=2, **cast_inputs(name, dtype))
    assert y.isfinite().all()
    torch.testing.assert_close(y.float(), expected, atol=0.02, rtol=0.0)
    assert half.vae.dtype == dtype, "a pipeline that asks for force_upcast must find it off"


@pytest.mark.parametrize("name", ["SD"])
def test_in_the_place_of_another_vae(name: str, saved: Path, pipeline: Any, tmp_path: Path) -> None:
    """`vae=` while loading somebody else's pipeline."""
    theirs = AutoencoderKL(
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    other = StableDiffusionPipeline(**{**pipeline.components, "vae": theirs}, requires_safety_checker=False)
    other.save_pretrained(tmp_path)
    swapped = load(tmp_path, pipeline, vae=DCSSDAE.from_pretrained(saved / name / "vae"))
    expected = torch.load(saved / name / "expected.pt")
    assert torch.equal(pictures(swapped, name, seeded(7), batch=2), expected)


def test_without_measured_statistics_the_latents_go_through_as_they_are() -> None:
    """The defaults are numbers that change nothing, in every formula above."""
    latents, config = torch.randn(1, 4, 2, 3), tiny().config
    for unscale in (unscaled, unscaled_and_shifted):
        assert torch.equal(unscale(latents, config), latents)
    assert config.latents_mean is None  # with which Stable Diffusion XL divides by scaling_factor alone
    assert config.latents_std is None
