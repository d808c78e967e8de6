"""The autoencoder as users meet it: shapes, noise, steps, saving, loading, and the errors they can cause."""

import copy
import inspect
import json
import shutil
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
from tiny_models import (
    TINY_DECODER,
    edit_config,
    image,
    loading_refusal,
    loads_or_refuses,
    refusal,
    tiny,
    tiny_encoder,
)

from dc_ssdae import DCSSDAE, InputError
from dc_ssdae.autoencoder import COMPONENTS
from dc_ssdae.latent import LatentStatistics, draw_noise
from dc_ssdae.model_folder import NOT_MEASURED, write_latent_statistics

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

    @pytest.mark.parametrize("shape", [(4, 2, 2), (1, 3, 2, 2), (1, 4, 0, 2), (0, 4, 2, 2)])
    def test_what_is_no_latent_batch(self, shape: tuple[int, ...], model: DCSSDAE) -> None:
        with pytest.raises(InputError):
            model.decode(torch.zeros(shape))

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

    def test_what_is_no_tensor_of_floats_is_told_in_one_line(self, model: DCSSDAE) -> None:
        output = model.encode(image())
        for value in (torch.zeros(1, 3, 16, 16).byte(), torch.zeros(1, 4, 2, 2).int(), output, np.zeros((1, 4, 2, 2))):
            for function in (model.encode, model.decode, model, partial(model.field, image())):
                with pytest.raises(InputError, match=r"floating-point numbers, not (torch\.|EncoderOutput|ndarray)"):
                    function(value)

    @torch.no_grad()
    def test_tuples_in_place_of_outputs(self, model: DCSSDAE) -> None:
        x = image()
        (posterior,) = model.encode(x, return_dict=False)
        assert torch.equal(posterior.mean, model.encode(x).latent_dist.mean)
        (y,) = model.decode(posterior.mode(), return_dict=False)
        assert torch.equal(y, model.decode(posterior.mode()).sample)
        assert torch.equal(model(x).sample, y)
        assert torch.equal(model(x, return_dict=False)[0], y)

    @torch.no_grad()
    def test_a_reconstruction_as_diffusers_call_it(self, model: DCSSDAE) -> None:
        x = image(2)
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
    def test_a_decode_is_reproducible_and_leaves_the_default_generator_alone(self, model: DCSSDAE) -> None:
        z = torch.randn(2, 4, 3, 4)
        before = torch.get_rng_state()
        first = model.decode(z, num_steps=2).sample
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(123)
        assert torch.equal(model.decode(z, num_steps=2).sample, first)

    @torch.no_grad()
    @pytest.mark.parametrize("encoder", ["KLEncoder", "DCEncoder"])
    def test_an_images_latent_does_not_depend_on_its_neighbours(self, encoder: str) -> None:
        model, x = tiny(8, encoder), image(3)
        alone = model.encode(x[:1]).latent_dist.mode()
        for neighbours in (100.0 * x[1:], -x[:1]):
            z = model.encode(torch.cat([neighbours, x[:1]])).latent_dist.mode()
            torch.testing.assert_close(z[-1:], alone, atol=1e-5, rtol=0.0)

    @torch.no_grad()
    def test_noise_may_be_given(self, model: DCSSDAE) -> None:
        z = torch.randn(2, 4, 2, 3)
        noise = draw_noise((2, 3, 16, 24), torch.Generator().manual_seed(5))
        y = model.decode(z, noise=noise).sample
        assert torch.equal(y, model.decode(z, generator=torch.Generator().manual_seed(5)).sample)
        with pytest.raises(InputError, match=r"noise is .*\(2, 3, 16, 16\).*\(2, 3, 16, 24\)"):
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
    @pytest.mark.parametrize(
        ("encoder", "dynamics"), [("KLEncoder", "EquilibriumMatching"), ("DCEncoder", "FlowMatching")]
    )
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
            ({"max_shard_size": "50KB", "variant": "ema"}, {"variant": "ema"}),
            ({}, {"low_cpu_mem_usage": False}),
            ({}, {"subfolder": "."}),
        ],
    )
    def test_other_ways_to_save_and_load(self, saving: Any, loading: Any, tmp_path: Path) -> None:
        model, x = tiny(), image()
        model.save_pretrained(tmp_path, **saving)
        assert torch.equal(DCSSDAE.from_pretrained(tmp_path, **loading)(x).sample, model(x).sample)
        expected = (tmp_path / "config.json").stat().st_mode
        assert all(file.stat().st_mode == expected for file in tmp_path.iterdir()), "weights are as readable"
        if "variant" in saving:
            assert ".safetensors: no such file; there is diffusion_pytorch_model.ema-" in loading_refusal(tmp_path)

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


STATISTICS = LatentStatistics([0.5, -1.0, 0.25, 1e-7], [1.0, 2.0, 0.0, 0.1], 1000)


class TestLatentStatistics:
    def settings(self, config: Any) -> dict[str, Any]:
        return {name: config[name] for name in NOT_MEASURED}

    def test_survive_saving_and_loading(self, tmp_path: Path) -> None:
        model = tiny()
        model.register_to_config(**STATISTICS.settings())
        model.save_pretrained(tmp_path / "first")
        loaded = DCSSDAE.from_pretrained(tmp_path / "first")
        assert self.settings(loaded.config) == STATISTICS.settings()
        assert self.settings(DCSSDAE.from_config(model.config).config) == STATISTICS.settings()
        assert self.settings(copy.deepcopy(model).config) == STATISTICS.settings()

    @torch.no_grad()
    def test_change_neither_latents_nor_images(self) -> None:
        model, x = tiny(), image()
        z, y = model.encode(x).latent_dist.mean, model(x).sample
        model.register_to_config(**STATISTICS.settings())
        assert torch.equal(model.encode(x).latent_dist.mean, z)
        assert torch.equal(model(x).sample, y)

    def test_a_folder_from_before_there_were_any_loads(self, copied_folder: Path) -> None:
        config = json.loads((copied_folder / "config.json").read_text())
        old = {name: value for name, value in config.items() if name not in NOT_MEASURED}
        assert len(old) == len(config) - 4
        (copied_folder / "config.json").write_text(json.dumps(old))
        assert self.settings(DCSSDAE.from_pretrained(copied_folder).config) == NOT_MEASURED
        write_latent_statistics(copied_folder, STATISTICS)
        assert self.settings(DCSSDAE.from_pretrained(copied_folder).config) == STATISTICS.settings()

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"scaling_factor": 0.0}, "scaling_factor is 0.0"),
            ({"scaling_factor": 10**400}, "scaling_factor is inf"),
            ({"shift_factor": float("nan")}, "shift_factor is nan"),
            ({"latents_mean": [0.0] * 3}, "latents_mean"),
            ({"latents_std": [1.0, 1.0, 1.0, -0.1]}, "latents_std is -0.1"),
        ],
        ids=str,
    )
    def test_wrong_values_are_named_in_one_line(self, given: dict[str, Any], named: str, copied_folder: Path) -> None:
        with torch.device("meta"):
            assert named in refusal(DCSSDAE.from_preset, "demo", **given)
        edit_config(copied_folder, **given)
        assert named in loading_refusal(copied_folder)

    def test_writing_keeps_all_else(self, copied_folder: Path) -> None:
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


def build(**settings: Any) -> DCSSDAE:
    return DCSSDAE(**{"latent_channels": 32, "downsample_factor": 32, **settings})


class TestUnknownSettings:
    @pytest.mark.parametrize(
        ("given", "named", "suggested"),
        [
            ({"latent_chanels": 4}, "latent_chanels", "latent_channels"),
            ({"dynamics": {"gradient_scal": 1.0}}, "gradient_scal", "gradient_scale"),
        ],
    )
    def test_from_preset(self, given: dict[str, Any], named: str, suggested: str) -> None:
        assert f"{named!r} (did you mean {suggested!r}?)" in refusal(DCSSDAE.from_preset, "demo", **given)
        assert "encoder" in refusal(DCSSDAE.from_preset, "demo", encoder="KLEncoder")

    @pytest.mark.parametrize("part", COMPONENTS)
    def test_the_level_of_a_part(self, part: str) -> None:
        for value, words in (
            ({"init_arg": {}}, f"key of {part} 'init_arg' (did you mean 'init_args'?)"),
            ({"class_path": "Encoder"}, f"class of {part} 'Encoder'"),
            (5, f"{part} is 5; it must be of type Mapping"),
            ({"init_args": 5}, f"init_args of {part} is 5; it must be of type Mapping"),
        ):
            assert words in refusal(build, **{part: value})

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"latent_channels": 0}, "latent_channels is 0"),
            ({"downsample_factor": 12}, "downsample_factor is 12"),
            ({"encoder": {"init_args": {"norm": "rms"}}}, "'rms'"),
            ({"encoder": {"init_args": {"depths": [0, 1]}}}, "depths has 2 stages"),
            ({"dynamics": {"init_args": {"decay": "cosine"}}}, "'cosine'"),
            # A string "false" is true to Python: what is not of the setting's type must not be taken for it.
            ({"encoder": {"init_args": {"variational": "false"}}}, "variational"),
            ({"decoder": {"init_args": {"channels": 47.5}}}, "channels"),
            ({"dynamics": {"init_args": {"gradient_scale": "4"}}}, "gradient_scale"),
        ],
        ids=str,
    )
    def test_values_out_of_range_or_of_another_type(self, given: dict[str, Any], named: str) -> None:
        with torch.device("meta"):
            assert named in refusal(build, **given)

    def test_from_pretrained(self, saved_folder: Path) -> None:
        assert "'torch_dtyp'" in loading_refusal(saved_folder, torch_dtyp=torch.float16)


class TestSpoiltFolders:
    def test_an_unknown_setting_in_config_json(self, copied_folder: Path) -> None:
        edit_config(copied_folder, latent_chanels=4)
        message = loading_refusal(copied_folder)
        assert "setting of DCSSDAE 'latent_chanels' (did you mean 'latent_channels'?)" in message

    def test_an_unknown_setting_of_a_part_in_config_json(self, copied_folder: Path) -> None:
        edit_config(copied_folder, decoder={"class_path": "UViTDecoder", "init_args": {"colour": 1}})
        assert "'colour'" in loading_refusal(copied_folder)

    @pytest.mark.parametrize("class_name", ["AutoencoderKL", None, ["DCSSDAE"]])
    def test_config_json_of_another_class(self, class_name: Any, copied_folder: Path) -> None:
        edit_config(copied_folder, _class_name=class_name)
        assert "not of a 'DCSSDAE'" in loading_refusal(copied_folder)

    @pytest.mark.parametrize("text", ["", "[]", b"\xff\xfe{}"])
    def test_config_json_that_is_no_json_object(self, text: str | bytes, copied_folder: Path) -> None:
        (copied_folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        assert "config.json" in loading_refusal(copied_folder)

    def test_folders_without_a_model(self, tmp_path: Path) -> None:
        assert "config.json is missing" in loading_refusal(tmp_path)
        assert "no such folder" in loading_refusal(tmp_path / "absent")
        (tmp_path / "file").write_text("")
        assert "no such folder" in loading_refusal(tmp_path / "file")

    @pytest.mark.parametrize("name", ["no-such-model", "no/such/folder"])
    def test_names_that_can_be_no_hub_id_do_not_wait_for_the_network(self, name: str) -> None:
        assert "no such folder, nor the id of a model on the hub" in loading_refusal(name)

    def test_weights_that_are_missing(self, copied_folder: Path) -> None:
        (copied_folder / WEIGHTS).unlink()
        assert WEIGHTS in loading_refusal(copied_folder)
        assert "ema" in loading_refusal(copied_folder, variant="ema")

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

    @pytest.mark.parametrize(
        ("good", "bad"),
        [(b'"F32"', b'"F16"'), (b'"F32"', b'"F99"'), (b'"data_offsets":[0,', b'"data_offsets":[4,')],
    )
    def test_weights_whose_header_lies(self, good: bytes, bad: bytes, copied_folder: Path) -> None:
        body = (copied_folder / WEIGHTS).read_bytes()
        assert good in body
        (copied_folder / WEIGHTS).write_bytes(body.replace(good, bad, 1))
        assert WEIGHTS in loading_refusal(copied_folder)

    def test_weights_cut_anywhere_or_with_bytes_too_many(self, copied_folder: Path) -> None:
        body = (copied_folder / WEIGHTS).read_bytes()
        header = 8 + int.from_bytes(body[:8], "little")
        for length in (0, 7, 8, header // 2, header, header + 5, len(body) - 1):
            (copied_folder / WEIGHTS).write_bytes(body[:length])
            assert f"{WEIGHTS} is truncated" in loading_refusal(copied_folder)
        (copied_folder / WEIGHTS).write_bytes(body + b"\0\0")
        assert WEIGHTS in loading_refusal(copied_folder)

    @pytest.mark.parametrize("index", ["[]", '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "no.safetensors"}}'])
    def test_an_index_of_shards_that_is_none(self, index: str, copied_folder: Path) -> None:
        (copied_folder / f"{WEIGHTS}.index.json").write_text(index)
        loading_refusal(copied_folder)

    @settings(derandomize=True, deadline=None, max_examples=25)
    @given(data=st.data())
    def test_weights_with_a_byte_of_the_header_changed(
        self, saved_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        folder = shutil.copytree(saved_folder, tmp_path_factory.mktemp("changed") / "copied")
        body = bytearray((folder / WEIGHTS).read_bytes())
        header = 8 + int.from_bytes(body[:8], "little")
        place = data.draw(st.integers(0, header - 1), label="place")
        value = data.draw(st.integers(0, 255), label="value")
        assume(body[place] != value)
        body[place] = value
        (folder / WEIGHTS).write_bytes(body)
        loads_or_refuses(folder)


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
    @settings(derandomize=True, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def test_a_mutated_config_loads_or_is_refused_in_one_line(
        self, saved_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        config = json.loads((saved_folder / "config.json").read_text())
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
        (folder / WEIGHTS).symlink_to(saved_folder / WEIGHTS)
        (folder / "config.json").write_text(json.dumps(config))
        loads_or_refuses(folder)


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
@pytest.mark.parametrize(("decay", "gradient_scale"), [("linear", 1.0), ("truncated", 4.0), ("piecewise", 4.0)])
def test_a_true_field_is_decoded_exactly_in_any_number_of_steps(decay: str, gradient_scale: float) -> None:
    """The network is replaced by the field of one image, λ c(γ) (ε − x) with γ read off the distance to it."""
    model = tiny(dynamics={"init_args": {"decay": decay, "gradient_scale": gradient_scale}})
    image = torch.rand(1, 3, 16, 24) * 2 - 1
    noise = torch.randn(1, 3, 16, 24)

    class TrueField(torch.nn.Module):
        def forward(self, x: torch.Tensor, z: torch.Tensor, time: None = None) -> torch.Tensor:
            remaining = (x - image).norm() / (noise - image).norm()
            return gradient_scale * model.dynamics.decay(1.0 - remaining) * (noise - image)

    model.decoder = TrueField()
    for num_steps in (1, 2, 8):
        y = model.decode(torch.zeros(1, 4, 2, 3), noise=noise, num_steps=num_steps).sample
        torch.testing.assert_close(y, image, atol=1e-4, rtol=0)


class Derived(DCSSDAE):
    """A user's own, with nothing changed."""


class TestDerived:
    def test_a_subclass_saves_and_loads(self, saved_folder: Path, tmp_path: Path) -> None:
        assert type(Derived.from_pretrained(saved_folder)) is Derived
        config = tiny().config
        Derived.from_config({**config, "_class_name": "Derived"}).save_pretrained(tmp_path)
        assert type(Derived.from_pretrained(tmp_path)) is Derived
        assert "is of a 'Derived', not of a 'DCSSDAE'" in loading_refusal(tmp_path)


class TestCompiled:
    def test_parts_that_torch_compile_has_wrapped_are_saved_under_their_own_names(self, tmp_path: Path) -> None:
        model = tiny()
        names = list(model.state_dict())
        model.decoder.middle = torch.compile(model.decoder.middle)
        model.decoder = torch.compile(model.decoder)
        wrapped = dict(model.named_modules())
        model.save_pretrained(tmp_path)
        assert sorted(load_file(tmp_path / WEIGHTS)) == sorted(names)
        assert dict(model.named_modules()) == wrapped


class TestFollowingSettings:
    def test_they_cannot_be_set(self) -> None:
        model = tiny()
        with pytest.raises(InputError, match="force_upcast cannot be changed"):
            model.register_to_config(force_upcast=True)
        model.register_to_config(scaling_factor=0.5)
        assert model.config.scaling_factor == 0.5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([1.0], "not list"),
        (torch.zeros(3, 8), "an image batch has shape (B, 3, H, W)"),
        (torch.zeros(1, 3, 13, 21), "pad it to 16×24"),
    ],
)
def test_what_is_no_image_batch_is_told_in_one_line(given: Any, words: str) -> None:
    model = tiny()
    assert words in refusal(model.encode, given)
    model.enable_tiling(16)
    assert words in refusal(model.encode, given)
