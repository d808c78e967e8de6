"""Decoders trained on a frozen vision transformer: what trains, what is saved, and where weights come from."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import last, metrics, resume, run_config, start
from tiny_models import refusal
from torch import Tensor

from dc_ssdae import DCSSDAE
from dc_ssdae.model_folder import NOT_MEASURED, read_config, write_latent_statistics
from dc_ssdae.training.build import check_components, fetch_weights
from dc_ssdae.training.config import RunConfig

FILE = "test_vit.r160_in1k.safetensors"


def config_of(root: Path | None = None, channels: int = 64, weights: str = "random", **training: Any) -> RunConfig:
    """A tiny decoder on a tiny transformer, of width 64, at f16."""
    encoder = {"class_path": "TimmEncoder", "init_args": {"name": "test_vit", "weights": weights}}
    model = {"latent_channels": channels, "downsample_factor": 16, "encoder": encoder}
    settings = {"latent_noise": 0.8, "latent_statistics": 9, "gradient_clip": 1.0, "checkpoint_every": 50, **training}
    return run_config(root, None, {"kl": 0.0}, model, **settings)


def saved_tensors(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "diffusion_pytorch_model.safetensors")


def of_transformer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.partition("transformer.")[2]: value for name, value in tensors.items() if "transformer." in name}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, atol=0.0, rtol=0.0)


def statistics(run: Path) -> dict[str, Any]:
    return {name: read_config(run / "model")[name] for name in NOT_MEASURED}


def test_a_decoder_learns_on_it_and_the_model_is_whole(images: Path, tmp_path: Path) -> None:
    config, path = config_of(images, steps=40, lr=2e-3), tmp_path / "run"
    start(config, path)
    losses = torch.tensor([entry["loss/dynamics"] for entry in metrics(path)])
    assert losses[-10:].mean() < 0.7 * losses[:5].mean()
    settings, ae = read_config(path / "model"), DCSSDAE.from_pretrained(path / "model")
    assert settings["provenance"]["untrained"] == ["encoder"], "random, and nothing taught it"
    assert not any(parameter.requires_grad for parameter in ae.encoder.parameters())
    # A layer norm's tokens have the mean 0 and the root mean square 1.
    assert settings["scaling_factor"] == pytest.approx(1.0, abs=1e-3)
    assert settings["shift_factor"] == pytest.approx(0.0, abs=1e-3)
    assert len(settings["latents_std"]) == 64
    torch.manual_seed(config.training.seed)
    fresh, x = DCSSDAE(**config.to_mapping()["model"]), 2.0 * torch.rand(1, 3, 48, 80) - 1.0
    z = ae.encode(x).latent_dist.mode()
    assert torch.equal(fresh.encode(x).latent_dist.mode(), z)
    for sampler in ("one_step", "gradient_descent", "nesterov", "nesterov_eqm"):
        with torch.no_grad():
            assert ae.decode(z, sampler=sampler).sample.shape == x.shape
    transformer = DiTTransformer2DModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=64,
        out_channels=64,
        sample_size=4,
        norm_num_groups=4,
        num_embeds_ada_norm=1000,
    )
    pipeline = DiTPipeline(transformer.eval(), ae, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline([3], guidance_scale=1.0, num_inference_steps=2, output_type="pt").images
    assert sorted(pictures.shape) == [1, 3, 64, 64]


def test_the_projection_trains_and_the_transformer_stays(images: Path, tmp_path: Path) -> None:
    path, config = tmp_path / "run", config_of(images, channels=4, steps=2)
    start(config, path)
    torch.manual_seed(config.training.seed)
    before = DCSSDAE(**config.to_mapping()["model"]).state_dict()
    after, learnt = saved_tensors(path), last(path).tensors["model"]
    assert_same(of_transformer(after), of_transformer(before))
    for name in ("encoder.projection.weight", "encoder.projection.bias"):
        assert not torch.equal(learnt[f"model.{name}"], before[name])
    message = "leaves the encoder out, whose weights are random"
    assert message in refusal(check_components, config.with_training(train=["decoder"]))
    check_components(config.with_training(train=["encoder", "decoder"]))
    wanted = "names encoder.transformer, of which nothing can train"
    assert wanted in refusal(check_components, config.with_training(train=["encoder.transformer", "decoder"]))


def test_published_weights_arrive_when_a_run_starts_and_never_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no answer")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.delenv("DC_SSDAE_WEIGHTS", raising=False)
    config = config_of(images, weights="pretrained", steps=2)
    message = refusal(start, config, tmp_path / "run")
    for part in (FILE, "timm/test_vit.r160_in1k", "DC_SSDAE_WEIGHTS", "--model.encoder.init_args.weights random"):
        assert part in message
    assert not (tmp_path / "run").exists()

    (tmp_path / "weights").mkdir()
    torch.manual_seed(5)
    published = timm.create_model("test_vit", num_classes=10).state_dict()
    save_file(published, tmp_path / "weights" / FILE)
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(tmp_path / "weights"))
    start(config, tmp_path / "run")
    monkeypatch.delenv("DC_SSDAE_WEIGHTS")
    transformer = of_transformer(saved_tensors(tmp_path / "run"))
    assert_same(transformer, {name: published[name] for name in transformer})
    assert published.keys() - transformer.keys() == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    provenance = read_config(tmp_path / "run" / "model")["provenance"]
    assert provenance["source"] == "timm test_vit"
    assert "untrained" not in provenance

    resume(config.with_training(steps=4), tmp_path / "run")
    DCSSDAE.from_pretrained(tmp_path / "run" / "model")
    again = config.with_training(init_from=str(tmp_path / "run"))
    fetch_weights(again, starts=True)
    start(again, tmp_path / "again")
    assert_same(of_transformer(saved_tensors(tmp_path / "again")), transformer)


def test_known_statistics_stay_where_nothing_of_it_trains(images: Path, tmp_path: Path) -> None:
    """As in any run whose training.train leaves the encoder out: a diffusion model may rely on them."""
    start(config_of(images, steps=1), tmp_path / "first")
    write_latent_statistics(tmp_path / "first" / "model", None)
    measured = statistics(tmp_path / "first")
    start(config_of(images, steps=1, init_from=str(tmp_path / "first")), tmp_path / "second")
    assert statistics(tmp_path / "second") != measured, "nobody knew them"
    measured = statistics(tmp_path / "second")
    more = config_of(images, steps=1, latent_statistics=3, init_from=str(tmp_path / "second"))
    start(more, tmp_path / "third")
    assert statistics(tmp_path / "third") == measured
    resume(more.with_training(steps=2), tmp_path / "third")
    assert statistics(tmp_path / "third") == measured
