"""One step's computation: its total by hand, in other precisions and memory orders, in parts, and its inverse."""

from typing import Any

import pytest
import torch
from states import without_zeros
from tiny import SIZE, batch, different, run_config
from torch import Tensor

from dc_ssdae.data.images import to_model_range
from dc_ssdae.errors import InputError
from dc_ssdae.losses import Losses
from dc_ssdae.training.build import build_step, check_components, place_step
from dc_ssdae.training.step import TrainingStep, draw_noise

DYNAMICS: dict[str, dict[str, Any]] = {
    "eqm": {"class_path": "EquilibriumMatching", "init_args": {"decay": "truncated", "gradient_scale": 4.0}},
    "fm": {"class_path": "FlowMatching"},
    "dot": {"class_path": "EquilibriumMatching", "init_args": {"explicit_energy": "dot", "gradient_scale": 2.0}},
    "l2": {"class_path": "EquilibriumMatching", "init_args": {"explicit_energy": "l2", "gradient_scale": 2.0}},
}


def training_step(
    dynamics: str = "eqm", precision: str = "float32", channels_last: bool = False, **settings: Any
) -> TrainingStep:
    """The same weights whatever the rest."""
    torch.manual_seed(0)
    training = {"precision": precision, "channels_last": channels_last, **settings}
    config = run_config(model={"dynamics": DYNAMICS[dynamics]}, losses={"kl": 0.01}, **training)
    step = build_step(config)
    without_zeros(step)
    place_step(step, config, torch.device("cpu"))
    return step


def gradients(step: TrainingStep, losses: Losses) -> dict[str, Tensor]:
    step.zero_grad()
    losses.total.backward()
    return {name: parameter.grad.clone() for name, parameter in step.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_the_total_by_hand(dynamics: str) -> None:
    step = training_step(dynamics)
    pixels, noise, level, latent_noise = batch(0)
    losses = step(pixels, noise, level, latent_noise)

    model = training_step(dynamics).model
    x = pixels.float() / 127.5 - 1.0
    gamma = level[:, None, None, None]
    posterior = model.encoder(x)
    z = posterior.mean + (0.5 * posterior.logvar).exp() * latent_noise
    if dynamics == "fm":
        prediction = model.decoder((1.0 - gamma) * x + gamma * noise, z, level)
        errors = (prediction - (x - noise)).square()
    elif dynamics == "eqm":
        prediction = model.decoder(gamma * x + (1.0 - gamma) * noise, z, None)
        decay = torch.where(gamma <= 0.8, torch.ones_like(gamma), (1.0 - gamma) / 0.2)
        errors = (prediction / 4.0 - decay * (noise - x)).square()
    else:  # the gradient of an energy
        x_level = (gamma * x + (1.0 - gamma) * noise).requires_grad_()
        answer = model.decoder(x_level, z)
        energy = (x_level * answer).sum() if dynamics == "dot" else 0.5 * answer.square().sum()
        (gradient,) = torch.autograd.grad(energy, x_level)
        errors = (gradient / 2.0 - (1.0 - gamma) * (noise - x)).square()
    kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1.0 - posterior.logvar).sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(losses.terms["dynamics"], errors.mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.terms["kl"], kl, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(losses.total, errors.mean() + 0.01 * kl, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(step, losses).items():
        assert gradient.isfinite().all(), name
        # An energy's gradient does not see what is added to the decoder's answer at its end.
        assert gradient.any() or dynamics == "l2", f"no gradient reaches {name}"


def test_noise_on_the_latent_reaches_the_decoder_alone() -> None:
    step = training_step("fm")
    pixels, noise, level, latent_noise = batch(0)
    added = 0.7 * torch.randn_like(latent_noise)
    seen = []
    step.model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    plain, noisy = step(pixels, noise, level, latent_noise), step(pixels, noise, level, latent_noise, added)
    torch.testing.assert_close(seen[1] - seen[0], added, atol=1e-5, rtol=1e-5)
    assert noisy.terms["kl"] == plain.terms["kl"]
    assert noisy.terms["dynamics"] != plain.terms["dynamics"]


def test_gradient_checkpointing_changes_nothing() -> None:
    steps = [training_step("l2", gradient_checkpointing=checkpointing) for checkpointing in (False, True)]
    assert different(*(gradients(step, step(*batch(0))) for step in steps)) == set()


def test_second_derivatives_are_neither_compiled_nor_sharded() -> None:
    for settings, sharded, told in (({"compile": True}, False, "training.compile false"), ({}, True, "FSDP")):
        with pytest.raises(InputError, match=rf"explicit_energy.*{told}"):
            check_components(run_config(model={"dynamics": DYNAMICS["dot"]}, **settings), sharded=sharded)
    check_components(run_config(compile=True), sharded=True)


def test_half_precision_is_close() -> None:
    half, full = training_step(precision="bfloat16"), training_step()
    losses, expected = half(*batch(0)), full(*batch(0))
    assert losses.total.dtype == torch.float32
    assert losses.total != expected.total, "not in half precision"
    assert {value.dtype for value in losses.terms.values()} == {torch.float32}
    torch.testing.assert_close(losses.terms, dict(expected.terms), atol=0.0, rtol=0.05)
    found, wanted = (
        torch.cat([gradient.flatten() for gradient in gradients(step, result).values()])
        for step, result in ((half, losses), (full, expected))
    )
    assert found.dtype == torch.float32, "weights and gradients stay float32"
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=0) > 0.98


def test_channels_last_is_the_same_but_for_rounding() -> None:
    other, plain = training_step(channels_last=True), training_step()
    losses, expected = other(*batch(0)), plain(*batch(0))
    torch.testing.assert_close(losses.total, expected.total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(other, losses), gradients(plain, expected), atol=2e-5, rtol=1e-3)
    seen = []
    other.model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    other(*batch(0))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_reconstructing_is_decoding_the_mode() -> None:
    step = training_step("fm", channels_last=True).eval()
    pixels = batch(0)[0]
    found = step.reconstruct(pixels)
    assert (found.shape, found.dtype, found.requires_grad) == ((4, 3, SIZE, SIZE), torch.float32, False)
    with torch.no_grad():
        mode = step.model.encode(to_model_range(pixels)).latent_dist.mode()
        expected = step.model.decode(mode).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# --- what a step draws ---


def test_the_split_of_a_batch_and_the_default_generator_change_no_noise() -> None:
    model = training_step().model
    whole = draw_noise(model, SIZE, 3, 6, range(6, 12), "cpu", 0.5)
    latents = (6, 4, SIZE // 8, SIZE // 8)
    assert [part.shape for part in whole] == [(6, 3, SIZE, SIZE), (6,), latents, latents]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    parts = [draw_noise(model, SIZE, 3, 6, numbers, "cpu", 0.5) for numbers in ([6, 7], [8, 9, 10, 11])]
    assert torch.equal(torch.get_rng_state(), before)
    for expected, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(expected, torch.cat(pieces))
    *others, augmentation = draw_noise(model, SIZE, 3, 6, range(6, 12), "cpu")
    assert augmentation is None
    assert all(torch.equal(one, other) for one, other in zip(whole[:3], others, strict=True)), "another run"


def test_noise_is_normal_levels_are_the_dynamics_own_and_no_two_images_get_the_same() -> None:
    model = training_step("fm").model
    noise, level, latent_noise, augmentation = draw_noise(model, SIZE, 3, 6, range(400), "cpu", 0.8)
    others = draw_noise(model, SIZE, 4, 6, range(400), "cpu")
    for mine, theirs in ((level, others[1]), (noise[:, 0, 0, 0], others[0][:, 0, 0, 0])):
        assert len(torch.cat([mine, theirs]).unique()) == 800
    for normal in (noise, latent_noise, level.logit()):
        bound = 4 / normal.numel() ** 0.5
        assert abs(float(normal.mean())) < bound
        assert abs(float(normal.var()) - 1) < 2 * bound
    strengths = augmentation.flatten(1).std(dim=1) / 0.8
    assert (strengths.sort().values - torch.linspace(0.0, 1.0, 400)).abs().mean() < 0.03, "not uniform in [0, τ]"
    assert abs(float(torch.stack([augmentation, latent_noise]).prod(0).mean())) < 0.02
    assert abs(float(torch.stack([noise.flatten(1)[:, :4], latent_noise.flatten(1)[:, :4]]).prod(0).mean())) < 0.1
