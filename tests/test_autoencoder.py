"""The autoencoder as users meet it: shapes, noise, steps, saving, loading, and the errors they can cause."""

import copy
import inspect
import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import (
    TINY_DECODER,
    edit_config,
    image,
    loading_refusal,
    loads_or_refuses,
    refusal,
    tiny,
)

from dc_ssdae import DCSSDAE
from dc_ssdae.autoencoder import COMPONENTS
from dc_ssdae.latent import LatentStatistics, draw_noise
from dc_ssdae.model_folder import NOT_MEASURED, read_config, write_latent_statistics

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(saved_folder: Path) -> DCSSDAE:
    """The saved model, which tests never change."""
    return DCSSDAE.from_pretrained(saved_folder)


class TestShapes:
    @torch.no_grad()
    @pytest.mark.parametrize("encoder", ["KLEncoder", "DCEncoder"])
    @pytest.mark.parametrize("factor", [8, 16, 32, 64, 128])
    def test_sides_that_differ(self, factor: int, encoder: str) -> None:
        model = tiny(factor, encoder)
        x = image(1, 2 * factor, factor)
        posterior = model.encode(x).latent_dist
        assert posterior.mean.shape == (1, 4, 2, 1)
        assert posterior.kl().shape == (1,)
        y = model.decode(posterior.mode()).sample
        assert y.shape == x.shape
        assert y.isfinite().all()

    def test_what_is_no_batch_of_images_or_latents(self, model: DCSSDAE) -> None:
        tiled = copy.deepcopy(model)
        tiled.enable_tiling(16)
        for x, words in (
            (torch.zeros(3, 8), "an image batch has shape (B, 3, H, W)"),
            (torch.zeros(1, 3, 13, 21), "pad it to 16×24"),
            (torch.zeros(0, 3, 16, 16), "(0, 3, 16, 16)"),
        ):
            assert words in refusal(model.encode, x)
            assert words in refusal(tiled.encode, x)
        for shape in ((4, 2, 2), (1, 3, 2, 2), (1, 4, 0, 2), (0, 4, 2, 2)):
            refusal(model.decode, torch.zeros(shape))
        for value in (torch.zeros(1, 3, 16, 16).byte(), model.encode(image()), np.zeros((1, 4, 2, 2)), [1.0]):
            for function in (model.encode, model.decode, model, partial(model.field, image())):
                assert "must be a floating-point tensor, not " in refusal(function, value)

    def test_images_far_outside_their_range_are_warned_of_once(self, model: DCSSDAE) -> None:
        model, x = copy.deepcopy(model), image()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.encode(1.3 * x)  # resampling overshoots
            for _ in range(2):
                model.encode(127.5 * (x + 1.0))
                model.encode(3.0 * x)
        assert [warning.filename for warning in caught] == [__file__]
        assert "[-1, 1]" in str(caught[0].message)

    @torch.no_grad()
    def test_a_reconstruction_and_tuples_in_place_of_outputs_as_diffusers_has_them(self, model: DCSSDAE) -> None:
        x = image(2)
        (posterior,) = model.encode(x, return_dict=False)
        assert torch.equal(posterior.mean, model.encode(x).latent_dist.mean)
        (y,) = model.decode(posterior.mode(), return_dict=False)
        assert torch.equal(y, model(x).sample)
        z = posterior.sample(torch.Generator().manual_seed(3))
        drawn = model(sample=x, sample_posterior=True, return_dict=False, generator=torch.Generator().manual_seed(3))
        assert torch.equal(drawn[0], model.decode(z).sample)
        theirs, ours = (inspect.signature(kind.forward).parameters for kind in (AutoencoderKL, DCSSDAE))
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def test_a_model_saved_before_there_were_predictions_patches_and_statistics(copied_folder: Path) -> None:
    z, model = torch.randn(1, 4, 2, 3), DCSSDAE.from_pretrained(copied_folder)
    config = json.loads((copied_folder / "config.json").read_text())
    assert config["dynamics"]["init_args"].pop("prediction") == "field"
    assert config["decoder"]["init_args"].pop("patch") is None
    assert {name: config.pop(name) for name in NOT_MEASURED} == NOT_MEASURED
    (copied_folder / "config.json").write_text(json.dumps(config))
    loaded = DCSSDAE.from_pretrained(copied_folder)
    assert torch.equal(loaded.decode(z).sample, model.decode(z).sample)
    assert loaded.config == model.config


def test_a_field_in_patches_is_warned_of() -> None:
    for changes in ({"patch": 4, "multipliers": [1, 2]}, {"block_shortcut": "zero"}):
        decoder = {"init_args": {**TINY_DECODER["init_args"], **changes}}
        with pytest.warns(UserWarning, match="wants prediction 'image'"):
            tiny(decoder=decoder)
        with warnings.catch_warnings(action="error"):
            tiny(decoder=decoder, dynamics={"init_args": {"prediction": "image"}})


class TestNoise:
    @torch.no_grad()
    def test_a_decode_is_reproducible_leaves_the_default_generator_alone_and_takes_noise(self, model: DCSSDAE) -> None:
        z = torch.randn(2, 4, 3, 4)
        before = torch.get_rng_state()
        first = model.decode(z, num_steps=2).sample
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(123)
        assert torch.equal(model.decode(z, num_steps=2).sample, first)
        noise = draw_noise((2, 3, 24, 32), torch.Generator().manual_seed(5))
        y = model.decode(z, noise=noise).sample
        assert torch.equal(y, model.decode(z, generator=torch.Generator().manual_seed(5)).sample)
        assert "noise is torch.float32 of shape (2, 3, 24, 16)" in refusal(model.decode, z, noise=noise[..., :16])
        assert "noise or generator, not both" in refusal(model.decode, z, noise=noise, generator=torch.Generator())

    @torch.no_grad()
    @pytest.mark.parametrize("encoder", ["KLEncoder", "DCEncoder"])
    def test_an_images_latent_does_not_depend_on_its_neighbours(self, encoder: str) -> None:
        model, x = tiny(8, encoder), image(3)
        alone = model.encode(x[:1]).latent_dist.mode()
        for neighbours in (100.0 * x[1:], -x[:1]):
            z = model.encode(torch.cat([neighbours, x[:1]])).latent_dist.mode()
            torch.testing.assert_close(z[-1:], alone, atol=1e-5, rtol=0.0)


def test_gradients_reach_every_parameter() -> None:
    """From the reconstruction, in training mode, through encoder and decoder."""
    model = tiny().train()
    model(image(2)).sample.square().mean().backward()
    without = [name for name, given in model.named_parameters() if given.grad is None or not given.grad.any()]
    assert without == []


class TestSaving:
    @torch.no_grad()
    @pytest.mark.parametrize(
        ("encoder", "dynamics"), [("KLEncoder", "EquilibriumMatching"), ("DCEncoder", "FlowMatching")]
    )
    def test_a_loaded_model_gives_the_same_bits(self, encoder: str, dynamics: str, tmp_path: Path) -> None:
        model = tiny(16, encoder, dynamics={"class_path": dynamics})
        x = image(2)
        model.train().save_pretrained(tmp_path)
        model.eval()
        assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1, "weights are as readable as the config"
        for loading in ({}, {"low_cpu_mem_usage": False}):
            loaded = DCSSDAE.from_pretrained(tmp_path, **loading)
            assert not any(module.training for module in loaded.modules())
            torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0.0, rtol=0.0)
            posterior, expected = loaded.encode(x).latent_dist, model.encode(x).latent_dist
            assert torch.equal(posterior.mean, expected.mean)
            assert torch.equal(posterior.logvar, expected.logvar)
            decoded = [chosen.decode(expected.mode(), num_steps=2).sample for chosen in (loaded, model)]
            assert torch.equal(*decoded)

    def test_every_setting_is_pinned(self, tmp_path: Path) -> None:
        """What a model was built with by default stands in its file, so that another default cannot change it."""
        model = tiny()
        model.save_pretrained(tmp_path)
        config = read_config(tmp_path)
        names = {name for name in config if not name.startswith("_")}
        assert names == {"latent_channels", "downsample_factor", *COMPONENTS, *NOT_MEASURED, "provenance"}
        # Under this key diffusers keeps a list of settings which it drops from the config on reload.
        assert "_use_default_values" not in {*config, *model.config}
        handed_over = {"latent_channels", "downsample_factor", "time_conditioning"}
        for part, classes in COMPONENTS.items():
            parameters = inspect.signature(classes[config[part]["class_path"]]).parameters
            assert set(config[part]["init_args"]) == set(parameters) - handed_over, part
        assert TINY_DECODER["init_args"].items() <= config["decoder"]["init_args"].items()
        assert config["dynamics"]["init_args"]["decay"] == "linear"

    @torch.no_grad()
    def test_the_config_survives_and_statistics_change_neither_latents_nor_images(self, tmp_path: Path) -> None:
        dynamics = {"init_args": {"decay": "piecewise", "decay_start": 1.2}}
        model, x = tiny(16, "DCEncoder", dynamics=dynamics, provenance={"steps": 30}), image()
        z, y = model.encode(x).latent_dist.mean, model(x).sample
        model.register_to_config(**STATISTICS.settings())
        model.save_pretrained(tmp_path / "first")
        loaded = DCSSDAE.from_pretrained(tmp_path / "first")
        loaded.save_pretrained(tmp_path / "second")
        assert read_config(tmp_path / "first") == read_config(tmp_path / "second")
        assert loaded.dynamics.decay.start == 1.2
        assert {**loaded.config, **STATISTICS.settings()} == loaded.config
        assert torch.equal(loaded.encode(x).latent_dist.mean, z)
        assert torch.equal(loaded(x).sample, y)
        for copied in (DCSSDAE.from_config(model.config), copy.deepcopy(model)):
            assert copied.config == loaded.config


STATISTICS = LatentStatistics([0.5, -1.0, 0.25, 1e-7], [1.0, 2.0, 0.0, 0.1], 1000)


def test_writing_statistics_keeps_all_else(copied_folder: Path) -> None:
    path = copied_folder / "config.json"
    path.chmod(0o640)
    before = json.loads(path.read_text())
    write_latent_statistics(copied_folder, STATISTICS)
    after = json.loads(path.read_text())
    assert {**before, **STATISTICS.settings()} == after
    assert list(after) == sorted(after)
    assert path.stat().st_mode & 0o777 == 0o640
    write_latent_statistics(copied_folder, None)
    assert json.loads(path.read_text()) == before


class TestUnknownSettings:
    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"latent_channels": 0}, "latent_channels is 0"),
            ({"downsample_factor": 12}, "downsample_factor is 12"),
            ({"decoder": {"init_arg": {}}}, "key of decoder 'init_arg' (did you mean 'init_args'?)"),
            ({"decoder": {"init_args": 5}}, "init_args of decoder is 5; it must be of type Mapping"),
            ({"dynamics": {"class_path": "Encoder"}}, "class of dynamics 'Encoder'"),
            ({"encoder": {"init_args": {"depths": [0, 1]}}}, "depths has 2 stages"),
            ({"dynamics": {"init_args": {"decay": "cosine"}}}, "'cosine'"),
            # A string "false" is true to Python: what is not of the setting's type must not be taken for it.
            ({"encoder": {"init_args": {"variational": "false"}}}, "variational"),
        ],
        ids=str,
    )
    def test_of_the_constructor(self, given: dict[str, Any], named: str) -> None:
        with torch.device("meta"):
            assert named in refusal(DCSSDAE, **{"latent_channels": 32, "downsample_factor": 32, **given})

    def test_of_from_preset_and_from_pretrained(self, saved_folder: Path) -> None:
        for changes, words in (
            ({"latent_chanels": 4}, "'latent_chanels' (did you mean 'latent_channels'?)"),
            ({"dynamics": {"gradient_scal": 1.0}}, "'gradient_scal' (did you mean 'gradient_scale'?)"),
            ({"encoder": "KLEncoder"}, "encoder"),
        ):
            assert words in refusal(DCSSDAE.from_preset, "demo", **changes)
        assert "'torch_dtyp'" in loading_refusal(saved_folder, torch_dtyp=torch.float16)

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"latent_chanels": 4}, "setting of DCSSDAE 'latent_chanels' (did you mean 'latent_channels'?)"),
            ({"decoder": {"init_args": {"colour": 1}}}, "'colour'"),
            ({"_class_name": "AutoencoderKL"}, "not of a 'DCSSDAE'"),
            ({"spatial_compression_ratio": 16}, "spatial_compression_ratio is 16; it must be 8"),
            ({"scaling_factor": 0.0}, "scaling_factor is 0.0"),
            ({"shift_factor": float("nan")}, "shift_factor is nan"),
            ({"latents_mean": [0.0] * 3}, "latents_mean"),
            ({"latents_std": [1.0, 1.0, 1.0, -0.1]}, "latents_std is -0.1"),
        ],
        ids=str,
    )
    def test_of_config_json(self, changes: dict[str, Any], named: str, copied_folder: Path) -> None:
        edit_config(copied_folder, **changes)
        assert named in loading_refusal(copied_folder)


class TestSpoiltFolders:
    @pytest.mark.parametrize("name", ["", "no-such-model", "no/such/folder"])
    def test_names_that_can_be_no_hub_id_do_not_wait_for_the_network(self, name: str) -> None:
        assert "no such folder, nor the id of a model on the hub" in loading_refusal(name)

    def test_tensors_are_missing_left_over_or_misshapen(self, copied_folder: Path) -> None:
        tensors = load_file(copied_folder / WEIGHTS)
        tensors.pop("decoder.conv_out.bias")
        tensors["decoder.conv_out.bais"] = torch.zeros(3)
        tensors["encoder.conv_in.bias"] = torch.zeros(9)
        save_file(tensors, copied_folder / WEIGHTS)
        message = loading_refusal(copied_folder)
        assert "missing: decoder.conv_out.bias" in message
        assert "left over: decoder.conv_out.bais" in message
        assert "encoder.conv_in.bias has shape (9,), not (8,)" in message

    def test_weights_whose_header_lies_or_that_are_cut_anywhere(self, copied_folder: Path) -> None:
        body = (copied_folder / WEIGHTS).read_bytes()
        header = 8 + int.from_bytes(body[:8], "little")
        lies = (b'"F32"', b'"F16"'), (b'"data_offsets":[0,', b'"data_offsets":[4,')
        lengths = (0, 7, 8, header // 2, header, header + 5, len(body) - 1)
        spoilt = [*(body.replace(*lie, 1) for lie in lies), body + b"\0", *(body[:length] for length in lengths)]
        for content in spoilt:
            (copied_folder / WEIGHTS).write_bytes(content)
            message = loading_refusal(copied_folder)
            assert f"{WEIGHTS} is truncated" in message


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a JSON object."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


TEXTS = ("", "none", "linear", "DCEncoder", "os.system", "../x", "8")
OTHERS = (None, True, -0.5, float("nan"), float("inf"), 1e30, [], [1, None], {}, {"class_path": 1}, {"init_args": 2})
REPLACEMENTS = st.integers(-2, 40) | st.sampled_from(TEXTS) | st.sampled_from(OTHERS).map(copy.deepcopy)


@settings(derandomize=True, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_mutated_config_loads_or_is_refused_in_one_line(
    saved_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    config = json.loads((saved_folder / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 2), label="mutations")):
        *above, key = data.draw(st.sampled_from(sorted(places(config), key=repr)), label="place")
        node = config
        for step in above:
            node = node[step]
        if data.draw(st.booleans(), label="replaced, not deleted"):
            node[key] = data.draw(REPLACEMENTS, label="value")
        else:
            del node[key]
    folder = tmp_path_factory.mktemp("mutated")
    (folder / WEIGHTS).symlink_to(saved_folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config))
    loads_or_refuses(folder)


def test_a_whole_file_over_shards_loads(tmp_path: Path) -> None:
    first, second = tiny(), tiny()
    first.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    second.save_pretrained(tmp_path)
    loaded = DCSSDAE.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), second.state_dict(), atol=0.0, rtol=0.0)


class Derived(DCSSDAE):
    """A user's own, with nothing changed."""


def test_a_subclass_saves_and_loads(saved_folder: Path, tmp_path: Path) -> None:
    assert type(Derived.from_pretrained(saved_folder)) is Derived
    Derived.from_config({**tiny().config, "_class_name": "Derived"}).save_pretrained(tmp_path)
    assert type(Derived.from_pretrained(tmp_path)) is Derived
    assert "is of a 'Derived', not of a 'DCSSDAE'" in loading_refusal(tmp_path)


def test_parts_that_torch_compile_has_wrapped_are_saved_under_their_own_names(tmp_path: Path) -> None:
    model = tiny()
    names = list(model.state_dict())
    model.decoder.middle = torch.compile(model.decoder.middle)
    model.decoder = torch.compile(model.decoder)
    wrapped = dict(model.named_modules())
    model.save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / WEIGHTS)) == sorted(names)
    assert dict(model.named_modules()) == wrapped
