"""Training a field that is the gradient of an energy: second derivatives, checkpoints, and what it is refused with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batch, run_config

from dc_ssdae import InputError
from dc_ssdae.training.build import build_step, check_components
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.step import TrainingStep


def config(energy: str | None, root: Path | None = None, **training: Any) -> RunConfig:
    dynamics = {"class_path": "EquilibriumMatching", "init_args": {"explicit_energy": energy, "gradient_scale": 2.0}}
    return run_config(root, model={"dynamics": dynamics}, **training)


def moved_step(energy: str | None, **training: Any) -> TrainingStep:
    torch.manual_seed(0)
    step = build_step(config(energy, **training))
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # what begins at zero would hide what is before it
    return step.train()


@pytest.mark.parametrize("energy", ["dot", "l2"])
def test_the_loss_is_that_of_the_energys_gradient(energy: str) -> None:
    """‖∇E − λ (1 − γ) (ε − x)‖²/λ², ∇E by autograd through the plain decoder."""
    pixels, noise, level, latent_noise = batch(0)
    found = moved_step(energy)(pixels, noise, level, latent_noise).terms["dynamics"]
    model = moved_step(energy).model
    x = pixels.float() / 127.5 - 1.0
    gamma = level[:, None, None, None]
    posterior = model.encoder(x)
    z = posterior.mean + (0.5 * posterior.logvar).exp() * latent_noise
    x_level = (gamma * x + (1.0 - gamma) * noise).requires_grad_()
    answer = model.decoder(x_level, z)
    total = (x_level * answer).sum() if energy == "dot" else 0.5 * answer.square().sum()
    (gradient,) = torch.autograd.grad(total, x_level)
    expected = (gradient - 2.0 * (1.0 - gamma) * (noise - x)).square().mean() / 4.0
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        step = moved_step("l2", gradient_checkpointing=checkpointing)
        step(*batch(0)).total.backward()
        gradients.append({name: parameter.grad for name, parameter in step.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert torch.equal(gradient, gradients[1][name]), name


def test_compiling_is_refused_and_sharding_too() -> None:
    with pytest.raises(InputError, match=r"explicit_energy.*training.compile false"):
        check_components(config("dot", compile=True))
    with pytest.raises(InputError, match=r"explicit_energy.*FSDP"):
        check_components(config("dot"), sharded=True)
    check_components(config(None, compile=True), sharded=True)
