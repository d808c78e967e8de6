"""The minimal loop: reproducible, learns, tells what went wrong."""

import math

import pytest
import torch

from dc_ssdae import DCSSDAE, InputError
from dc_ssdae.data.sample_photos import sample_photos
from dc_ssdae.losses import LossWeights
from dc_ssdae.presets import load_preset
from dc_ssdae.training.config import TrainingConfig
from dc_ssdae.training.randomness import image_generator
from dc_ssdae.training.trainer import compute_losses, draw_batch, learning_rate, train


@pytest.fixture(scope="module")
def photos():
    return [photo.pixels for photo in sample_photos("train")[:2]]


def tiny_model(**dynamics):
    torch.manual_seed(0)
    return DCSSDAE.from_preset("demo", decoder={"channels": 8, "multipliers": [1, 1, 2, 2]}, **dynamics)


def tiny_config(**settings):
    return TrainingConfig(**{"image_size": 32, "batch_size": 2, "steps": 3, "lr": 1e-3, **settings})


def test_two_runs_of_the_same_seed_are_bit_identical(photos):
    first, second = tiny_model(), tiny_model()
    records = [train(model, photos, tiny_config()) for model in (first, second)]
    assert [r.losses for r in records[0]] == [r.losses for r in records[1]]
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_another_seed_draws_another_batch(photos):
    model = tiny_model()
    batches = [draw_batch(photos, model, tiny_config(seed=seed), 0) for seed in (0, 1)]
    assert not torch.equal(batches[0].noise, batches[1].noise)
    assert not torch.equal(batches[0].x, batches[1].x)


def test_an_image_is_drawn_from_its_place_in_the_batch_alone(photos):
    model = tiny_model()
    small = draw_batch(photos, model, tiny_config(batch_size=2), 5)
    large = draw_batch(photos, model, tiny_config(batch_size=4), 5)
    for part in ("x", "noise", "level"):
        assert torch.equal(getattr(small, part), getattr(large, part)[:2])


def test_generators_of_different_places_differ():
    draws = {
        torch.rand(1, generator=image_generator(seed, step, index)).item()
        for seed in range(3)
        for step in range(20)
        for index in range(20)
    }
    assert len(draws) == 3 * 20 * 20


def test_training_lowers_the_loss_and_ends_in_eval_mode(photos):
    model = tiny_model()
    config = tiny_config(steps=60, lr=5e-3, batch_size=4)
    unseen = draw_batch(photos, model, tiny_config(batch_size=16), 10_000)
    before = compute_losses(model, unseen, config).terms["dynamics"].item()
    history = train(model, photos, config)
    after = compute_losses(model, unseen, config).terms["dynamics"].item()
    print(f"loss {before:.4f} -> {after:.4f}")
    assert after < 0.7 * before
    assert not model.training
    assert [record.step for record in history] == list(range(60))


def test_the_clock_ends_a_run(photos):
    history = train(tiny_model(), photos, tiny_config(steps=None, minutes=1e-6))
    assert len(history) == 1


def test_flow_matching_trains_as_well(photos):
    torch.manual_seed(0)
    model = DCSSDAE(
        latent_channels=4,
        downsample_factor=8,
        encoder={"class_path": "KLEncoder", "init_args": {"channels": 8, "norm_groups": 8}},
        decoder={"init_args": {"channels": 8, "multipliers": [1, 1, 1, 2], "norm_groups": 8, "middle_layers": 1}},
        dynamics={"class_path": "FlowMatching"},
    )
    history = train(model, photos, tiny_config())
    assert all(math.isfinite(record.losses["total"]) for record in history)


def test_total_is_the_weighted_sum_of_the_terms(photos):
    model = tiny_model().train()
    config = tiny_config(loss_weights=LossWeights(dynamics=2.0, kl=0.01))
    losses = compute_losses(model, draw_batch(photos, model, config, 0), config)
    expected = 2.0 * losses.terms["dynamics"] + 0.01 * losses.terms["kl"]
    torch.testing.assert_close(losses.total, expected)


def test_bfloat16_comes_close_to_float32(photos):
    model = tiny_model().train()
    batch = draw_batch(photos, model, tiny_config(), 0)
    exact, rough = (compute_losses(model, batch, tiny_config(precision=p)) for p in ("float32", "bfloat16"))
    assert rough.total.dtype == torch.float32
    assert rough.total.item() != exact.total.item()
    assert rough.total.item() == pytest.approx(exact.total.item(), rel=0.02)


def test_a_loss_that_is_not_finite_names_the_step(photos):
    model = tiny_model()
    with torch.no_grad():
        model.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 0"):
        train(model, photos, tiny_config())


def test_learning_rate_warms_up_and_decays():
    config = tiny_config(steps=1000, lr=1.0, warmup=0.1)
    rates = [learning_rate(config, progress) for progress in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"steps": None}, "minutes"),
        ({"minutes": 1.0}, "minutes"),
        ({"lr": 0.0}, "lr"),
        ({"batch_size": -1}, "batch_size"),
        ({"warmup": 1.0}, "warmup"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"precision": "float61"}, "float61"),
        ({"lr": "3e-4"}, "lr is '3e-4'"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"crop_scale": (2.0, 0.1)}, "crop_scale"),
        ({"crop_scale": (0.1, 2.0)}, "crop_scale"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_named(settings, name):
    with pytest.raises(InputError, match=name):
        tiny_config(**settings)


def test_settings_from_a_mapping():
    config = TrainingConfig.from_mapping({"steps": 1, "crop_scale": [0.2, 0.4], "loss_weights": {"kl": 0.5}})
    assert config.crop_scale == (0.2, 0.4)
    assert config.loss_weights == LossWeights(kl=0.5)
    with pytest.raises(InputError, match="did you mean 'batch_size'"):
        TrainingConfig.from_mapping({"steps": 1, "batchsize": 2})
    with pytest.raises(InputError, match="loss weight 'lk'"):
        TrainingConfig.from_mapping({"steps": 1, "loss_weights": {"lk": 1.0}})


def test_the_demo_presets_training_section_is_valid():
    TrainingConfig.from_mapping({**load_preset("demo")["training"], "steps": 1})
