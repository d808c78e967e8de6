"""The autoencoder as users meet it: shapes, noise, steps, saving, loading, and the errors they can cause."""

import copy
import inspect
import json
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import TINY_DECODER, image, tiny, tiny_encoder

from dc_ssdae import DCSSDAE, InputError
from dc_ssdae.autoencoder import COMPONENTS
from dc_ssdae.latent import LatentStatistics, draw_noise
from dc_ssdae.model_folder import NOT_MEASURED, write_latent_statistics

WEIGHTS = "diffusion_pytorch_model.safetensors"
FACTORS = [8, 16, 32, 64, 128]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[DCSSDAE, Path]:
    """A model and the folder it was saved to, which tests read and never change."""
    torch.manual_seed(0)
    model = tiny()
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def copied(saved: tuple[DCSSDAE, Path], tmp_path: Path) -> Path:
    """A copy of the saved folder, to be spoilt."""
    return copy_folder(saved[1], tmp_path / "copied")


def copy_folder(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in ("config.json", WEIGHTS):
        (target / file).write_bytes((source / file).read_bytes())
    return target


def refusal(folder: Path, **arguments: Any) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(InputError) as error:
        DCSSDAE.from_pretrained(folder, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestShapes:
    @torch.no_grad()
    @pytest.mark.parametrize("encoder", ["KLEncoder", "DCEncoder"])
    @pytest.mark.parametrize(("rows", "columns"), [(3, 1), (1, 2)])
    @pytest.mark.parametrize("factor", FACTORS)
    def test_sides_that_differ(self, factor: int, rows: int, columns: int, encoder: str) -> None:
        model = tiny(factor, encoder)
        x = image(1, rows * factor, columns * factor)
        posterior = model.encode(x).latent_dist
        assert posterior.mean.shape == (1, 4, rows, columns)
        assert posterior.kl().shape == (1,)
        y = model.decode(posterior.mode()).sample
        assert y.shape == x.shape
        assert y.isfinite().all()

    def test_sides_that_do_not_fit_are_told_the_size_to_pad_to(self) -> None:
        with pytest.raises(InputError, match=r"13×21.*f = 8.*16×24"):
            tiny().encode(image(1, 13, 21))

    @pytest.mark.parametrize("shape", [(4, 2, 2), (1, 3, 2, 2), (1, 4, 0, 2), (0, 4, 2, 2)])
    def test_what_is_no_latent_batch(self, shape: tuple[int, ...], saved: tuple[DCSSDAE, Path]) -> None:
        with pytest.raises(InputError):
            saved[0].decode(torch.zeros(shape))

    def test_images_far_outside_their_range_are_warned_of_once(self, saved: tuple[DCSSDAE, Path]) -> None:
        model, x = copy.deepcopy(saved[0]), image()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.encode(1.3 * x)  # resampling overshoots
            for _ in range(2):
                model.encode(127.5 * (x + 1.0))
                model.encode(3.0 * x)
        assert [warning.filename for warning in caught] == [__file__]
        assert "[-1, 1]" in str(caught[0].message)

    def test_what_is_no_tensor_of_floats_is_told_in_one_line(self, saved: tuple[DCSSDAE, Path]) -> None:
        model = saved[0]
        output = model.encode(image())
        for value in (torch.zeros(1, 3, 16, 16).byte(), torch.zeros(1, 4, 2, 2).int(), output, np.zeros((1, 4, 2, 2))):
            for function in (model.encode, model.decode, model, partial(model.field, image())):
                with pytest.raises(InputError, match=r"floating-point numbers, not (torch\.|EncoderOutput|ndarray)"):
                    function(value)

    @torch.no_grad()
    def test_tuples_in_place_of_outputs(self, saved: tuple[DCSSDAE, Path]) -> None:
        model, x = saved[0], image()
        (posterior,) = model.encode(x, return_dict=False)
        assert torch.equal(posterior.mean, model.encode(x).latent_dist.mean)
        (y,) = model.decode(posterior.mode(), return_dict=False)
        assert torch.equal(y, model.decode(posterior.mode()).sample)
        assert torch.equal(model(x).sample, y)
        assert torch.equal(model(x, return_dict=False)[0], y)

    @torch.no_grad()
    def test_a_reconstruction_as_diffusers_call_it(self, saved: tuple[DCSSDAE, Path]) -> None:
        model, x = saved[0], image(2)
        z = model.encode(x).latent_dist.sample(torch.Generator().manual_seed(3))
        expected = model.decode(z).sample
        drawn = model(sample=x, sample_posterior=True, return_dict=False, generator=torch.Generator().manual_seed(3))
        assert torch.equal(drawn[0], expected)
        assert torch.equal(model(x, True, True, torch.Generator().manual_seed(3)).sample, expected)
        theirs = inspect.signature(AutoencoderKL.forward).parameters
        ours = inspect.signature(DCSSDAE.forward).parameters
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def test_a_model_saved_before_there_were_predictions_and_patches_means_field_and_one(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dynamics"]["init_args"].pop("prediction") == "field"
    assert config["decoder"]["init_args"].pop("patch") is None
    config["decoder"]["init_args"] |= {"norm_groups": 8, "blocks_per_level": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    z = torch.randn(1, 4, 2, 3)
    assert torch.equal(DCSSDAE.from_pretrained(tmp_path).decode(z).sample, model.decode(z).sample)


def test_a_field_in_patches_is_warned_of() -> None:
    decoder = {"init_args": {**TINY_DECODER["init_args"], "patch": 4, "multipliers": [1, 2]}}
    with pytest.warns(UserWarning, match="wants prediction 'image'"):
        tiny(decoder=decoder)
    shortcut = {"init_args": {**TINY_DECODER["init_args"], "block_shortcut": "zero"}}
    with pytest.warns(UserWarning, match="wants prediction 'image'"):
        tiny(decoder=shortcut)
    with warnings.catch_warnings(action="error"):
        tiny(decoder=shortcut, dynamics={"init_args": {"prediction": "image"}})
        tiny(decoder=decoder, dynamics={"init_args": {"prediction": "image"}})
        tiny()


class TestNoise:
    @torch.no_grad()
    def test_a_decode_is_reproducible(self, saved: tuple[DCSSDAE, Path]) -> None:
        model, z = saved[0], torch.randn(2, 4, 3, 4)
        first = model.decode(z).sample
        torch.manual_seed(123)
        torch.randn(5)
        assert torch.equal(model.decode(z).sample, first)

    @torch.no_grad()
    @pytest.mark.parametrize("encoder", ["KLEncoder", "DCEncoder"])
    def test_an_images_latent_does_not_depend_on_its_neighbours(self, encoder: str) -> None:
        model, x = tiny(8, encoder), image(3)
        alone = model.encode(x[:1]).latent_dist.mode()
        for neighbours in (100.0 * x[1:], -x[:1]):
            z = model.encode(torch.cat([neighbours, x[:1]])).latent_dist.mode()
            torch.testing.assert_close(z[-1:], alone, atol=1e-5, rtol=0.0)

    @torch.no_grad()
    def test_decoding_leaves_the_default_generator_alone(self, saved: tuple[DCSSDAE, Path]) -> None:
        before = torch.get_rng_state()
        saved[0].decode(torch.zeros(2, 4, 2, 2), num_steps=2)
        assert torch.equal(torch.get_rng_state(), before)

    @torch.no_grad()
    def test_one_generator_serves_the_images_in_order(self, saved: tuple[DCSSDAE, Path]) -> None:
        model, z = saved[0], torch.randn(2, 4, 2, 3)
        together = model.decode(z, generator=torch.Generator().manual_seed(5)).sample
        generator = torch.Generator().manual_seed(5)
        for index in range(2):
            alone = model.decode(z[index : index + 1], generator=generator).sample
            torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=0.0)
        assert not torch.allclose(together, model.decode(z).sample)

    @torch.no_grad()
    def test_a_list_has_one_generator_per_image(self, saved: tuple[DCSSDAE, Path]) -> None:
        model = saved[0]
        z = torch.randn(1, 4, 2, 3).expand(3, -1, -1, -1)
        y = model.decode(z, generator=[torch.Generator().manual_seed(seed) for seed in (1, 2, 1)]).sample
        torch.testing.assert_close(y[0], y[2], atol=1e-5, rtol=0.0)
        assert not torch.allclose(y[0], y[1])
        single = model.decode(z[:1], generator=torch.Generator().manual_seed(2)).sample
        torch.testing.assert_close(y[1:2], single, atol=1e-5, rtol=0.0)
        with pytest.raises(InputError, match="2 generators for 3 images"):
            model.decode(z, generator=[torch.Generator(), torch.Generator()])

    @torch.no_grad()
    def test_noise_may_be_given(self, saved: tuple[DCSSDAE, Path]) -> None:
        model, z = saved[0], torch.randn(2, 4, 2, 3)
        noise = draw_noise((2, 3, 16, 24), torch.Generator().manual_seed(5))
        y = model.decode(z, noise=noise).sample
        assert torch.equal(y, model.decode(z, generator=torch.Generator().manual_seed(5)).sample)
        with pytest.raises(InputError, match=r"noise has shape \(2, 3, 16, 16\).*\(2, 3, 16, 24\)"):
            model.decode(z, noise=noise[..., :16])
        with pytest.raises(InputError, match="noise or generator, not both"):
            model.decode(z, noise=noise, generator=torch.Generator())


def test_gradients_reach_every_parameter() -> None:
    """From the reconstruction, in training mode, through encoder and decoder."""
    model = tiny().train()
    model(image(2)).sample.square().mean().backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


class TestSaving:
    @torch.no_grad()
    @pytest.mark.parametrize("encoder", ["KLEncoder", "DCEncoder"])
    @pytest.mark.parametrize("dynamics", ["EquilibriumMatching", "FlowMatching"])
    def test_a_loaded_model_gives_the_same_bits(self, encoder: str, dynamics: str, tmp_path: Path) -> None:
        model = tiny(16, encoder, dynamics={"class_path": dynamics})
        x = image(2)
        model.train()
        model.save_pretrained(tmp_path)
        model.eval()
        loaded = DCSSDAE.from_pretrained(tmp_path)
        assert not any(module.training for module in loaded.modules())
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        posterior, expected = loaded.encode(x).latent_dist, model.encode(x).latent_dist
        assert torch.equal(posterior.mean, expected.mean)
        assert torch.equal(posterior.logvar, expected.logvar)
        for num_steps in (1, 2):
            y = loaded.decode(expected.mode(), num_steps=num_steps).sample
            assert torch.equal(y, model.decode(expected.mode(), num_steps=num_steps).sample)

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("saving", "loading"),
        [
            ({"max_shard_size": "50KB"}, {}),
            ({"variant": "ema"}, {"variant": "ema"}),
            ({"max_shard_size": "50KB", "variant": "ema"}, {"variant": "ema"}),
            ({}, {"low_cpu_mem_usage": False}),
            ({}, {"subfolder": "."}),
        ],
        ids=["shards", "variant", "shards of a variant", "plain memory", "subfolder"],
    )
    def test_other_ways_to_save_and_load(self, saving: Any, loading: Any, tmp_path: Path) -> None:
        model, x = tiny(), image()
        model.save_pretrained(tmp_path, **saving)
        assert torch.equal(DCSSDAE.from_pretrained(tmp_path, **loading)(x).sample, model(x).sample)

    @pytest.mark.parametrize("saving", [{}, {"max_shard_size": "50KB"}], ids=["one file", "shards"])
    def test_weights_are_as_readable_as_the_config(self, saving: dict[str, str], tmp_path: Path) -> None:
        tiny().save_pretrained(tmp_path, **saving)
        expected = (tmp_path / "config.json").stat().st_mode
        assert all(file.stat().st_mode == expected for file in tmp_path.iterdir())

    @torch.no_grad()
    def test_half_precision(self, saved: tuple[DCSSDAE, Path]) -> None:
        model, folder = saved
        loaded = DCSSDAE.from_pretrained(folder, torch_dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        x = image()
        y = loaded(x).sample
        assert y.dtype == torch.bfloat16
        assert (y.float() - model(x).sample).abs().max() < 0.2

    def test_every_setting_is_pinned(self, tmp_path: Path) -> None:
        """What a model was built with by default stands in its file, so that another default cannot change it."""
        model = DCSSDAE(8, 8, decoder=TINY_DECODER, encoder=tiny_encoder("KLEncoder", 8))
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        names = {name for name in config if not name.startswith("_")}
        assert names == {"latent_channels", "downsample_factor", *COMPONENTS, *NOT_MEASURED, "provenance"}
        # Under this key diffusers keeps a list of settings which it drops from the config on reload.
        assert "_use_default_values" not in {*config, *model.config}
        handed_over = {"latent_channels", "downsample_factor", "time_conditioning"}
        for part, classes in COMPONENTS.items():
            parameters = inspect.signature(classes[config[part]["class_path"]]).parameters
            assert set(config[part]["init_args"]) == set(parameters) - handed_over, part
        given = TINY_DECODER["init_args"]
        assert {name: config["decoder"]["init_args"][name] for name in given} == given
        assert config["dynamics"]["init_args"]["decay"] == "linear"

    def test_the_config_survives_saving_and_loading(self, tmp_path: Path) -> None:
        model = tiny(16, "DCEncoder", dynamics={"init_args": {"decay": "piecewise", "decay_start": 1.2}})
        model.save_pretrained(tmp_path / "first")
        loaded = DCSSDAE.from_pretrained(tmp_path / "first")
        loaded.save_pretrained(tmp_path / "second")
        first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
        for config in (first, second):
            config.pop("_name_or_path", None)
        assert first == second
        assert loaded.config.latent_channels == 4
        assert loaded.config.downsample_factor == 16
        assert loaded.dynamics.decay.start == 1.2
        assert DCSSDAE.from_config(model.config).config["encoder"] == model.config["encoder"]

    def test_from_preset_is_in_eval_mode(self) -> None:
        model = DCSSDAE.from_preset("demo")
        assert not any(module.training for module in model.modules())
        assert model.config.latent_channels == 4
        assert isinstance(model.encoder, torch.nn.Module)
        assert isinstance(model.decoder, torch.nn.Module)


STATISTICS = LatentStatistics([0.5, -1.0, 0.25, 1e-7], [1.0, 2.0, 0.0, 0.1], 1000)


class TestLatentStatistics:
    def settings(self, config: Any) -> dict[str, Any]:
        return {name: config[name] for name in NOT_MEASURED}

    def test_survive_saving_and_loading(self, tmp_path: Path) -> None:
        model = tiny()
        before = {name: value for name, value in model.config.items() if name not in NOT_MEASURED}
        model.register_to_config(**STATISTICS.settings())
        assert self.settings(model.config) == STATISTICS.settings()
        assert {name: value for name, value in model.config.items() if name not in NOT_MEASURED} == before
        model.save_pretrained(tmp_path / "first")
        loaded = DCSSDAE.from_pretrained(tmp_path / "first")
        assert self.settings(loaded.config) == STATISTICS.settings()
        loaded.save_pretrained(tmp_path / "second")
        assert self.settings(json.loads((tmp_path / "second" / "config.json").read_text())) == STATISTICS.settings()
        assert self.settings(DCSSDAE.from_config(model.config).config) == STATISTICS.settings()
        assert self.settings(copy.deepcopy(model).config) == STATISTICS.settings()

    def test_are_settings_of_a_preset_and_whole_numbers_become_floats(self) -> None:
        with torch.device("meta"):
            model = DCSSDAE.from_preset("demo", scaling_factor=2, latents_mean=[0, 1, 2, 3], latents_std=[1, 1, 1, 0])
        assert model.config.scaling_factor == 2.0
        values = [model.config.scaling_factor, *model.config.latents_mean, *model.config.latents_std]
        assert {type(value) for value in values} == {float}

    @torch.no_grad()
    def test_change_neither_latents_nor_images(self) -> None:
        model, x = tiny(), image()
        z, y = model.encode(x).latent_dist.mean, model(x).sample
        model.register_to_config(**STATISTICS.settings())
        assert torch.equal(model.encode(x).latent_dist.mean, z)
        assert torch.equal(model(x).sample, y)

    def test_a_folder_from_before_there_were_any_loads(self, copied: Path) -> None:
        config = json.loads((copied / "config.json").read_text())
        old = {name: value for name, value in config.items() if name not in NOT_MEASURED}
        assert len(old) == len(config) - 4
        (copied / "config.json").write_text(json.dumps(old))
        assert self.settings(DCSSDAE.from_pretrained(copied).config) == NOT_MEASURED
        write_latent_statistics(copied, STATISTICS)
        assert self.settings(DCSSDAE.from_pretrained(copied).config) == STATISTICS.settings()

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"scaling_factor": None}, "scaling_factor is None"),
            ({"scaling_factor": 0.0}, "scaling_factor is 0.0"),
            ({"scaling_factor": 10**400}, "scaling_factor is 1"),
            ({"shift_factor": float("nan")}, "shift_factor is nan"),
            ({"latents_mean": 0.0}, "latents_mean is 0.0"),
            ({"latents_mean": [0.0] * 3}, "latents_mean has 3 numbers"),
            ({"latents_mean": [0.0, 0.0, True, 0.0]}, "latents_mean[2] is True"),
            ({"latents_std": [1.0, 1.0, 1.0, -0.1]}, "latents_std[3] is -0.1"),
        ],
        ids=str,
    )
    def test_wrong_values_are_named_in_one_line(self, given: dict[str, Any], named: str, copied: Path) -> None:
        with torch.device("meta"), pytest.raises(InputError) as error:
            DCSSDAE.from_preset("demo", **given)
        assert named in str(error.value)
        assert "\n" not in str(error.value)
        config = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps({**config, **given}))
        assert named in refusal(copied)

    def test_of_another_number_of_channels(self, copied: Path) -> None:
        statistics = LatentStatistics([0.0] * 3, [1.0] * 3, 5)
        with pytest.raises(InputError, match="latents_mean has 3 numbers"):
            tiny().register_to_config(**statistics.settings())
        with pytest.raises(InputError, match=r"config\.json is missing"):
            write_latent_statistics(copied.parent, STATISTICS)

    def test_writing_keeps_all_else(self, copied: Path) -> None:
        path = copied / "config.json"
        path.chmod(0o640)
        before, weights = json.loads(path.read_text()), (copied / WEIGHTS).read_bytes()
        write_latent_statistics(copied, STATISTICS)
        after = json.loads(path.read_text())
        assert {**before, **STATISTICS.settings()} == after
        assert list(after) == sorted(after)
        assert path.stat().st_mode & 0o777 == 0o640
        assert (copied / WEIGHTS).read_bytes() == weights
        assert {file.name for file in copied.iterdir()} == {"config.json", WEIGHTS}
        write_latent_statistics(copied, None)
        assert json.loads(path.read_text()) == before

    def test_the_order_of_a_config_written_by_hand_stays(self, copied: Path) -> None:
        path = copied / "config.json"
        config = dict(sorted(json.loads(path.read_text()).items(), reverse=True))
        path.write_text(json.dumps(config))
        write_latent_statistics(copied, STATISTICS)
        assert list(json.loads(path.read_text())) == list(config)


def build(**settings: Any) -> DCSSDAE:
    return DCSSDAE(**{"latent_channels": 32, "downsample_factor": 32, **settings})


class TestUnknownSettings:
    @pytest.mark.parametrize(
        ("given", "named", "suggested"),
        [
            ({"latent_chanels": 4}, "latent_chanels", "latent_channels"),
            ({"encoder": {"atention_scales": [5]}}, "atention_scales", "attention_scales"),
            ({"dynamics": {"gradient_scal": 1.0}}, "gradient_scal", "gradient_scale"),
        ],
    )
    def test_from_preset(self, given: dict[str, Any], named: str, suggested: str) -> None:
        with pytest.raises(InputError) as error:
            DCSSDAE.from_preset("demo", **given)
        assert f"{named!r} (did you mean {suggested!r}?)" in str(error.value)

    def test_from_preset_with_a_part_that_is_no_mapping(self) -> None:
        with pytest.raises(InputError, match="encoder"):
            DCSSDAE.from_preset("demo", encoder="KLEncoder")

    @pytest.mark.parametrize("part", COMPONENTS)
    def test_the_level_of_a_part(self, part: str) -> None:
        with pytest.raises(InputError, match=rf"key of {part} 'init_arg' \(did you mean 'init_args'\?\)"):
            build(**{part: {"init_arg": {}}})
        with pytest.raises(InputError, match=f"class of {part} 'Encoder'"):
            build(**{part: {"class_path": "Encoder"}})
        with pytest.raises(InputError, match=f"{part} is 5; it must be of type Mapping"):
            build(**{part: 5})
        with pytest.raises(InputError, match=f"init_args of {part} is 5; it must be of type Mapping"):
            build(**{part: {"init_args": 5}})

    @pytest.mark.parametrize(
        ("part", "name"),
        [("encoder", "latent_channels"), ("encoder", "downsample_factor"), ("decoder", "time_conditioning")],
    )
    def test_what_follows_from_other_settings(self, part: str, name: str) -> None:
        with pytest.raises(InputError, match=f"unknown setting of .* {name!r}"):
            build(**{part: {"init_args": {name: 8}}})

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"latent_channels": 0}, "latent_channels is 0"),
            ({"latent_channels": 4.0}, "latent_channels is 4.0"),
            ({"downsample_factor": 12}, "downsample_factor is 12"),
            ({"encoder": {"init_args": {"norm": "rms"}}}, "'rms'"),
            ({"encoder": {"init_args": {"depths": [0, 1]}}}, "depths has 2 stages"),
            ({"encoder": {"class_path": "KLEncoder", "init_args": {"channels": 100}}}, "norm_groups"),
            ({"dynamics": {"init_args": {"decay": "cosine"}}}, "'cosine'"),
        ],
        ids=str,
    )
    def test_values_out_of_range(self, given: dict[str, Any], named: str) -> None:
        with torch.device("meta"), pytest.raises(InputError) as error:
            build(**given)
        assert named in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("part", "name", "value"),
        [
            ("encoder", "variational", "false"),
            ("decoder", "channels", 47.5),
            ("dynamics", "gradient_scale", "4"),
        ],
    )
    def test_values_of_another_type_are_named(self, part: str, name: str, value: Any) -> None:
        """A string "false" is true to Python: what is not of the setting's type must not be taken for it."""
        with torch.device("meta"), pytest.raises(InputError) as error:
            build(**{part: {"init_args": {name: value}}})
        assert name in str(error.value)
        assert "\n" not in str(error.value)

    def test_from_pretrained(self, saved: tuple[DCSSDAE, Path]) -> None:
        assert "'torch_dtyp' (did you mean 'torch_dtype'?)" in refusal(saved[1], torch_dtyp=torch.float16)
        assert "only safetensors" in refusal(saved[1], use_safetensors=False)
        assert "only safetensors" in refusal(saved[1], use_flashpack=True)


class TestSpoiltFolders:
    def edit(self, folder: Path, **changes: Any) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    def test_an_unknown_setting_in_config_json(self, copied: Path) -> None:
        self.edit(copied, latent_chanels=4)
        assert "setting in config.json 'latent_chanels' (did you mean 'latent_channels'?)" in refusal(copied)

    @pytest.mark.parametrize("part", COMPONENTS)
    def test_an_unknown_setting_of_a_part_in_config_json(self, part: str, copied: Path) -> None:
        config = json.loads((copied / "config.json").read_text())
        config[part]["init_args"]["colour"] = 1
        (copied / "config.json").write_text(json.dumps(config))
        assert "'colour'" in refusal(copied)

    @pytest.mark.parametrize("class_name", ["AutoencoderKL", "Trap", None, ["DCSSDAE"]])
    def test_config_json_of_another_class(self, class_name: Any, copied: Path) -> None:
        self.edit(copied, _class_name=class_name)
        assert "not of a 'DCSSDAE'" in refusal(copied)

    @pytest.mark.parametrize("text", ["", "[]", b"\xff\xfe{}"])
    def test_config_json_that_is_no_json_object(self, text: str | bytes, copied: Path) -> None:
        (copied / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        assert "config.json" in refusal(copied)

    def test_folders_without_a_model(self, tmp_path: Path) -> None:
        assert "config.json is missing" in refusal(tmp_path)
        assert "no such folder" in refusal(tmp_path / "absent")
        (tmp_path / "file").write_text("")
        assert "no such folder" in refusal(tmp_path / "file")

    @pytest.mark.parametrize("name", ["", "no-such-model", "no/such/folder", "~/no-such"])
    def test_names_that_can_be_no_hub_id_do_not_wait_for_the_network(self, name: str) -> None:
        with pytest.raises(InputError, match="no such folder, nor the id of a model on the hub"):
            DCSSDAE.from_pretrained(name)

    def test_weights_that_are_missing(self, copied: Path) -> None:
        (copied / WEIGHTS).unlink()
        assert WEIGHTS in refusal(copied)
        assert "ema" in refusal(copied, variant="ema")

    def test_tensors_are_missing_left_over_or_misshapen(self, copied: Path) -> None:
        tensors = load_file(copied / WEIGHTS)
        tensors.pop("decoder.conv_out.bias")
        tensors["decoder.conv_out.bais"] = torch.zeros(3)
        tensors["encoder.conv_in.bias"] = torch.zeros(9)
        save_file(tensors, copied / WEIGHTS)
        message = refusal(copied)
        assert "missing: decoder.conv_out.bias" in message
        assert "left over: decoder.conv_out.bais" in message
        assert "encoder.conv_in.bias has shape (9,), not (8,)" in message

    def test_a_config_that_does_not_fit_the_weights(self, copied: Path) -> None:
        self.edit(copied, latent_channels=5)
        assert " has shape (8,), not (10,)" in refusal(copied)

    def test_weights_with_bytes_too_many(self, copied: Path) -> None:
        with (copied / WEIGHTS).open("ab") as file:
            file.write(b"\0\0")
        assert WEIGHTS in refusal(copied)

    @pytest.mark.parametrize(
        ("good", "bad"),
        [(b'"F32"', b'"F16"'), (b'"F32"', b'"F99"'), (b'"data_offsets":[0,', b'"data_offsets":[4,')],
        ids=["dtype", "unknown dtype", "offset"],
    )
    def test_weights_whose_header_lies(self, good: bytes, bad: bytes, copied: Path) -> None:
        body = (copied / WEIGHTS).read_bytes()
        assert good in body
        (copied / WEIGHTS).write_bytes(body.replace(good, bad, 1))
        assert WEIGHTS in refusal(copied)

    @pytest.mark.parametrize(
        "index",
        ["[]", '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "absent.safetensors"}}'],
    )
    def test_an_index_of_shards_that_is_none(self, index: str, copied: Path) -> None:
        (copied / f"{WEIGHTS}.index.json").write_text(index)
        refusal(copied)

    @settings(derandomize=True, deadline=None, max_examples=40)
    @given(data=st.data())
    def test_weights_cut_anywhere(
        self, saved: tuple[DCSSDAE, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        folder = copy_folder(saved[1], tmp_path_factory.mktemp("cut") / "copied")
        body = (folder / WEIGHTS).read_bytes()
        length = data.draw(st.integers(0, len(body) - 1), label="length")
        (folder / WEIGHTS).write_bytes(body[:length])
        message = refusal(folder)
        assert WEIGHTS in message
        header = 8 + int.from_bytes(body[:8], "little")
        assert ("truncated: tensor '" in message) == (length >= header)

    @settings(derandomize=True, deadline=None, max_examples=40)
    @given(data=st.data())
    def test_weights_with_a_byte_of_the_header_changed(
        self, saved: tuple[DCSSDAE, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        folder = copy_folder(saved[1], tmp_path_factory.mktemp("changed") / "copied")
        body = bytearray((folder / WEIGHTS).read_bytes())
        header = 8 + int.from_bytes(body[:8], "little")
        place = data.draw(st.integers(0, header - 1), label="place")
        value = data.draw(st.integers(0, 255), label="value")
        assume(body[place] != value)
        body[place] = value
        (folder / WEIGHTS).write_bytes(body)
        loads_or_refuses(folder)


def loads_or_refuses(folder: Path) -> None:
    """Loading gives a model or one line; any other exception fails the test."""
    try:
        DCSSDAE.from_pretrained(folder)
        message = ""
    except InputError as error:
        message = str(error)
    assert "\n" not in message


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a JSON object."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


REPLACEMENTS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.floats(-10.0, 10.0) | st.sampled_from([float("nan"), float("inf"), 1e30]),
    st.sampled_from(["", "none", "linear", "DCEncoder", "os.system", "../x", "8"]),
    st.lists(st.integers(-1, 9) | st.none(), max_size=5),
    st.dictionaries(st.sampled_from(["class_path", "init_args", "channels"]), st.integers(0, 3), max_size=2),
)


class TestMutatedConfigs:
    @settings(derandomize=True, deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def test_a_mutated_config_loads_or_is_refused_in_one_line(
        self, saved: tuple[DCSSDAE, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        config = json.loads((saved[1] / "config.json").read_text())
        for _ in range(data.draw(st.integers(1, 2), label="mutations")):
            *above, key = data.draw(st.sampled_from(sorted(places(config), key=repr)), label="place")
            node = config
            for step in above:
                node = node[step]
            action = data.draw(st.sampled_from(["replace", "replace", "delete", "rename"]), label="action")
            if action == "replace":
                node[key] = data.draw(REPLACEMENTS, label="value")
            elif action == "delete" or isinstance(node, list):
                del node[key]
            else:
                node[f"{key}x"] = node.pop(key)
        folder = tmp_path_factory.mktemp("mutated")
        (folder / WEIGHTS).symlink_to(saved[1] / WEIGHTS)
        (folder / "config.json").write_text(json.dumps(config))
        loads_or_refuses(folder)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """A module on the path that leaves a file behind when it is imported; gives the path of that file."""
    sprung = tmp_path / "sprung"
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "trap_module.py").write_text(
        f"import pathlib\npathlib.Path({str(sprung)!r}).write_text('')\n\nclass Trap:\n    pass\n"
    )
    sys.path.insert(0, str(modules))
    yield sprung
    sys.path.remove(str(modules))
    sys.modules.pop("trap_module", None)


class TestForeignCode:
    def test_the_trap_springs(self, trap: Path) -> None:
        __import__("trap_module")
        assert trap.exists()

    @pytest.mark.parametrize("part", COMPONENTS)
    @pytest.mark.parametrize("class_path", ["os.system", "trap_module.Trap", "trap_module:Trap", "torch.nn.Linear"])
    def test_a_config_cannot_name_other_code(self, part: str, class_path: str, copied: Path, trap: Path) -> None:
        config = json.loads((copied / "config.json").read_text())
        config[part] = {"class_path": class_path, "init_args": {}}
        (copied / "config.json").write_text(json.dumps(config))
        message = refusal(copied)
        assert repr(class_path) in message
        assert "trap_module" not in sys.modules
        assert not trap.exists()
        with pytest.raises(InputError):
            DCSSDAE.from_config(config)
        assert not trap.exists()


class TestSavingOver:
    def test_a_whole_file_over_shards_loads(self, tmp_path: Path) -> None:
        first, second = tiny(), tiny()
        first.save_pretrained(tmp_path, max_shard_size="50KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        second.save_pretrained(tmp_path)
        loaded = DCSSDAE.from_pretrained(tmp_path)
        for name, tensor in second.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)


@torch.no_grad()
@pytest.mark.parametrize("decay", ["linear", "truncated", "piecewise"])
@pytest.mark.parametrize("gradient_scale", [1.0, 4.0])
@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_a_true_field_is_decoded_exactly_in_any_number_of_steps(
    decay: str, gradient_scale: float, num_steps: int
) -> None:
    """The network is replaced by the field of one image, λ c(γ) (ε − x) with γ read off the distance to it."""
    model = tiny(dynamics={"init_args": {"decay": decay, "gradient_scale": gradient_scale}})
    image = torch.rand(1, 3, 16, 24) * 2 - 1
    noise = torch.randn(1, 3, 16, 24)

    class TrueField(torch.nn.Module):
        def forward(self, x: torch.Tensor, z: torch.Tensor, time: None = None) -> torch.Tensor:
            remaining = (x - image).norm() / (noise - image).norm()
            return gradient_scale * model.dynamics.decay(1.0 - remaining) * (noise - image)

    model.decoder = TrueField()
    y = model.decode(torch.zeros(1, model.config.latent_channels, 2, 3), noise=noise, num_steps=num_steps).sample
    torch.testing.assert_close(y, image, atol=1e-4, rtol=0)


class Derived(DCSSDAE):
    """A user's own, with nothing changed."""


class TestDerived:
    def test_a_subclass_saves_and_loads(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        config = tiny().config
        Derived.from_config({**config, "_class_name": "Derived"}).save_pretrained(tmp_path)
        loaded = Derived.from_pretrained(tmp_path)
        assert type(loaded) is Derived
        with pytest.raises(InputError, match="is of a 'Derived', not of a 'DCSSDAE'"):
            DCSSDAE.from_pretrained(tmp_path)

    def test_a_subclass_loads_what_the_class_has_saved(self, saved: tuple[DCSSDAE, Path]) -> None:
        assert type(Derived.from_pretrained(saved[1])) is Derived


class TestCompiled:
    def test_a_part_that_torch_compile_has_wrapped_is_saved_under_its_own_names(self, tmp_path: Path) -> None:
        model = tiny()
        model.decoder = torch.compile(model.decoder)
        wrapped = model.decoder
        model.save_pretrained(tmp_path)
        assert model.decoder is wrapped
        loaded = DCSSDAE.from_pretrained(tmp_path)
        assert loaded.decoder.conv_out.weight.equal(wrapped._orig_mod.conv_out.weight)

    def test_so_is_what_is_wrapped_deeper(self, tmp_path: Path) -> None:
        model = tiny()
        names = list(model.state_dict())
        model.decoder.middle = torch.compile(model.decoder.middle)
        model.decoder = torch.compile(model.decoder)
        wrapped = dict(model.named_modules())
        model.save_pretrained(tmp_path)
        assert sorted(load_file(tmp_path / WEIGHTS)) == sorted(names)
        assert dict(model.named_modules()) == wrapped


class TestFollowingSettings:
    def test_they_come_back_through_from_config(self) -> None:
        model = tiny()
        assert DCSSDAE.from_config(model.config).config == model.config

    @pytest.mark.parametrize(("name", "value"), [("block_out_channels", [1, 2, 3]), ("spatial_compression_ratio", 16)])
    def test_a_wrong_one_in_a_file_is_refused(self, copied: Path, name: str, value: Any) -> None:
        config = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps({**config, name: value}))
        assert f"{name} is {value!r}; it follows from the other settings as" in refusal(copied)

    def test_they_cannot_be_set(self) -> None:
        model = tiny()
        with pytest.raises(InputError, match="force_upcast is True; it follows"):
            model.register_to_config(force_upcast=True)
        model.register_to_config(scaling_factor=0.5)
        assert model.config.scaling_factor == 0.5


class TestVariants:
    def test_a_model_of_one_variant_alone_names_it(self, tmp_path: Path) -> None:
        tiny().save_pretrained(tmp_path, variant="fp16")
        assert refusal(tmp_path).endswith("no such file; there is the variant 'fp16'")
        DCSSDAE.from_pretrained(tmp_path, variant="fp16")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([1.0], "not list"),
        (torch.zeros(3, 8), "an image batch has shape (B, 3, H, W)"),
        (torch.zeros(1, 3, 12, 8), "multiples of f = 8"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "not torch.uint8"),
    ],
)
def test_what_is_no_image_batch_is_told_in_one_line(given: Any, words: str) -> None:
    model = tiny()
    model.enable_tiling(16)
    with pytest.raises(InputError) as error:
        model.encode(given)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
