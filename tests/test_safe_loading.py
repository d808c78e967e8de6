"""A folder from a stranger cannot run code: pickles under every name, and configs that name any."""

import contextlib
import io
import json
import os
import pickle
import shlex
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel
from diffusers.training_utils import EMAModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, loading_refusal, loads_or_refuses, refusal, tiny, tiny_encoder

from dc_ssdae import DCSSDAE
from dc_ssdae.weights import PICKLE_SUFFIXES, read_safetensors

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"


class Canary:
    """What, unpickled, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o700)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """The folder that a payload would make; whatever a test does, it must not be there at its end."""
    path = tmp_path / "code-ran"
    yield path
    assert not path.exists(), "a stranger's code ran"


def payloads(canary: Path) -> dict[str, bytes]:
    """Pickles that run code when loaded: plain, of the oldest protocol, and in the zip file that torch.save writes."""
    zipped = io.BytesIO()
    torch.save({"weight": Canary(canary)}, zipped)
    plain, old = (pickle.dumps(Canary(canary), protocol) for protocol in (None, 0))
    return {"plain": plain, "old": old, "zip": zipped.getvalue()}


KINDS = ["plain", "old", "zip"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_payloads_work(kind: str, tmp_path: Path) -> None:
    """Else the tests below would show nothing."""
    canary = tmp_path / "code-ran"
    body = payloads(canary)[kind]
    for load in (pickle.load, partial(torch.load, weights_only=False)):
        with contextlib.suppress(Exception):
            load(io.BytesIO(body))
    assert canary.exists()


@pytest.mark.parametrize("suffix", PICKLE_SUFFIXES)
def test_a_pickle_in_place_of_the_weights(suffix: str, copied_folder: Path, canary: Path) -> None:
    path = copied_folder / f"{STEM}{suffix}"
    path.write_bytes(payloads(canary)["zip"])
    DCSSDAE.from_pretrained(copied_folder)  # beside good weights it is not read
    (copied_folder / WEIGHTS).unlink()
    assert f"{path.name} is a pickle file, which could run code" in loading_refusal(copied_folder)
    assert "is a pickle file" in refusal(read_safetensors, path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [WEIGHTS, f"{STEM}.fp16.safetensors", f"{STEM}.pickle"])
def test_a_pickle_under_another_name(name: str, kind: str, copied_folder: Path, canary: Path) -> None:
    (copied_folder / WEIGHTS).unlink()
    (copied_folder.parent / name).write_bytes(payloads(canary)[kind])
    (copied_folder / name).symlink_to(copied_folder.parent / name)
    for arguments in ({}, {"variant": "fp16"}, {"low_cpu_mem_usage": False}):
        assert "safetensors" in loading_refusal(copied_folder, **arguments)


INSIDE = (f"{STEM}.bin", "shard.safetensors", "../payload.bin", "../good.safetensors", "ABSOLUTE", ".", "", "x/../p")


@pytest.mark.parametrize("inside", INSIDE)
def test_an_index_that_names_a_pickle_or_a_path_elsewhere(inside: str, copied_folder: Path, canary: Path) -> None:
    target = inside.replace("ABSOLUTE", str(copied_folder.parent / "payload.bin"))
    weight_map = dict.fromkeys(load_file(copied_folder / WEIGHTS), target)
    (copied_folder / WEIGHTS).rename(copied_folder / "../good.safetensors")
    for path in ("../payload.bin", "shard.safetensors", f"{STEM}.bin"):
        (copied_folder / path).write_bytes(payloads(canary)["zip"])
    for index in (f"{WEIGHTS}.index.json", f"{WEIGHTS}.index.fp16.json", f"{STEM}.bin.index.json"):
        (copied_folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for variant in (None, "fp16"):
        loading_refusal(copied_folder, variant=variant)


EXTRAS: list[dict[str, Any]] = [
    {"auto_map": {"AutoModel": "modeling_evil.Evil"}, "trust_remote_code": True},
    {"custom_pipeline": "modeling_evil"},
    {"_class_name": ["modeling_evil", "Evil"]},
    {"quantization_config": {"quant_method": "modeling_evil"}},
    {"classes": ["modeling_evil.Evil"]},
    {"encoder": {"class_path": "modeling_evil.Evil"}},
]


@pytest.mark.parametrize("extra", EXTRAS, ids=" ".join)
def test_a_module_in_the_folder_is_not_imported(extra: dict[str, Any], copied_folder: Path, canary: Path) -> None:
    (copied_folder / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Evil: pass\n")
    edit_config(copied_folder, **extra)
    loading_refusal(copied_folder)
    assert "modeling_evil" not in sys.modules


def test_arguments_that_open_a_door_or_do_not_fit_are_refused(saved_folder: Path) -> None:
    doors = ("trust_remote_code", "custom_pipeline", "pickle_module", "ignore_mismatched_sizes", "quantization_config")
    others = {"proxies": {"https": "proxy:80"}, "scaling_factor": -1.0}
    for argument, value in {**dict.fromkeys(doors, True), **others}.items():
        assert argument in loading_refusal(saved_folder, **{argument: value})


def test_a_pickle_is_converted_as_the_refusal_says(copied_folder: Path, canary: Path) -> None:
    """By the command in the message as it stands; of a malicious pickle that runs nothing."""
    tensors, pickled = load_file(copied_folder / WEIGHTS), copied_folder / f"{STEM}.bin"
    (copied_folder / WEIGHTS).unlink()
    pickled.write_bytes(payloads(canary)["zip"])
    program, option, code = shlex.split(loading_refusal(copied_folder).split("convert it: ")[1])
    assert (program, option) == ("python", "-c")
    with pytest.raises(pickle.UnpicklingError):
        exec(code, {})
    assert not (copied_folder / WEIGHTS).exists()
    torch.save(tensors, pickled)
    exec(code, {})
    torch.testing.assert_close(DCSSDAE.from_pretrained(copied_folder).state_dict(), tensors, atol=0.0, rtol=0.0)


PLACES = st.floats(0.0, 1.0) | st.floats(0.0, 0.05)
CONTENTS = st.sampled_from([*KINDS, "zeros", "noise", "digit"])


@settings(derandomize=True, deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(splices=st.lists(st.tuples(PLACES, CONTENTS, st.booleans()), min_size=1, max_size=3), keep_length=st.booleans())
def test_payloads_anywhere_in_the_weights(
    splices: list[tuple[float, str, bool]], keep_length: bool, copied_folder: Path, canary: Path, saved_folder: Path
) -> None:
    """Written over the file's bytes or between them: it loads or is refused in one line, and nothing runs."""
    parts = {**payloads(canary), "zeros": bytes(64), "noise": bytes(range(256)), "digit": b"7"}
    body = (saved_folder / WEIGHTS).read_bytes()
    length = len(body)
    for place, kind, insert in splices:
        start = int(place * len(body))
        body = body[:start] + parts[kind] + body[start if insert else start + len(parts[kind]) :]
    (copied_folder / WEIGHTS).write_bytes(body[:length] if keep_length else body)
    loads_or_refuses(copied_folder)
    assert not canary.exists()


@pytest.mark.parametrize("beside", ["", "a.b"])
def test_an_index_of_an_old_name_never_leads_to_a_pickle(
    beside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers prefers it to the weights where a variant is asked for."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("something was unpickled"))
    model = tiny()
    folder = tmp_path / beside / "model"
    model.save_pretrained(folder, variant="fp16")
    # It puts the variant behind the second dot of the whole path.
    pieces = (folder / f"{WEIGHTS}.index.json").as_posix().split(".")
    index = Path(".".join([*pieces[:2], "fp16", *pieces[2:]]))
    index.parent.mkdir(parents=True, exist_ok=True)
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), "w.bin")}))
    (folder / "w.bin").write_bytes(b"no matter")
    assert "only older versions wrote" in loading_refusal(folder, variant="fp16")
    index.unlink()
    assert not DCSSDAE.from_pretrained(folder, variant="fp16").training


def test_what_is_missing_is_an_error_of_the_system_too(copied_folder: Path, tmp_path: Path) -> None:
    """Which diffusers' callers catch."""
    (tmp_path / "empty").mkdir()
    for folder, arguments, words in (
        (tmp_path / "absent", {}, "no such folder"),
        (tmp_path / "empty", {}, "config.json is missing"),
        (copied_folder, {"subfolder": "vae"}, "vae holds no model"),
        (copied_folder, {"variant": "fp16"}, f"{STEM}.fp16.safetensors: no such file"),
    ):
        assert words in loading_refusal(folder, **arguments)
        with pytest.raises(OSError, match=words):
            DCSSDAE.from_pretrained(folder, **arguments)


class TestDiffusersArguments:
    """Arguments of diffusers' own `from_pretrained`."""

    def test_what_does_nothing_is_accepted_and_config_entries_are_overridden(self, saved_folder: Path) -> None:
        nothing = {"proxies": None, "ignore_mismatched_sizes": False, "flashpack_kwargs": {}}
        model, info = DCSSDAE.from_pretrained(saved_folder, output_loading_info=True, scaling_factor=0.5, **nothing)
        assert model.config.scaling_factor == 0.5
        assert not any(info.values())
        assert DCSSDAE.from_pretrained(saved_folder, output_loading_info=False).config.scaling_factor == 1.0

    def test_auto_model_loads_a_part_of_a_pipeline(self, saved_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(saved_folder, tmp_path / "vae")
        index = {"_class_name": "DiffusionPipeline", "vae": ["dc_ssdae", "DCSSDAE"]}
        (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        assert type(AutoModel.from_pretrained(str(tmp_path), subfolder="vae")) is DCSSDAE


class TestRegistered:
    """What is put into the config of a model can be loaded."""

    @pytest.mark.parametrize(
        "settings", [{"mine": 1}, {"scaling_factor": "x"}, {"latent_channels": 5}, {"force_upcast": True}]
    )
    def test_what_could_not_be_loaded_is_refused(self, settings: dict[str, Any]) -> None:
        model = tiny()
        before = model.config
        refusal(model.register_to_config, **settings)
        assert model.config == before

    def test_averaged_weights_of_diffusers_are_saved_and_loaded(self, tmp_path: Path) -> None:
        model = tiny()
        average = EMAModel(model.parameters(), decay=0.75, model_cls=DCSSDAE, model_config=model.config)
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        average.step(model.parameters())
        average.save_pretrained(tmp_path)
        loaded = EMAModel.from_pretrained(tmp_path, DCSSDAE)
        assert (loaded.decay, loaded.optimization_step) == (0.75, 1)
        assert all(torch.equal(*pair) for pair in zip(loaded.shadow_params, average.shadow_params, strict=True))
        loaded.save_pretrained(tmp_path / "again")
        DCSSDAE.from_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    "given",
    [
        {"encoder": {"class_path": "KLEncoder", "init_args": {"channels": 2**32}}},
        {"encoder": {"class_path": "DCEncoder", "init_args": {"widths": [16] * 4, "depths": [0, 1, 1, 100_000]}}},
        {"encoder": tiny_encoder("KLEncoder", 8), "decoder": {"init_args": {"middle_layers": 10**9}}},
    ],
)
def test_too_large_a_network_is_refused_before_memory_or_time_is_spent(given: dict[str, Any]) -> None:
    config = {"latent_channels": 4, "downsample_factor": 8, **given}
    assert "its settings are too large" in refusal(DCSSDAE.without_weights, config)


def test_damaged_headers_and_configs_are_refused(copied_folder: Path) -> None:
    weights = load_file(copied_folder / WEIGHTS)
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    for kind in (torch.int32, torch.float8_e4m3fn, torch.bool):
        save_file({**weights, name: weights[name].to(kind)}, copied_folder / WEIGHTS)
        assert name in loading_refusal(copied_folder)
    with open(copied_folder / WEIGHTS, "wb") as file:
        file.write((3 * 2**30).to_bytes(8, "little"))
        file.truncate(4 * 2**30)
    loading_refusal(copied_folder)
    save_file(weights, copied_folder / WEIGHTS)
    index = copied_folder / f"{WEIGHTS}.index.json"
    whole = json.dumps({"weight_map": dict.fromkeys(weights, WEIGHTS)})
    for text in ("[]", '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "no.safetensors"}}', whole):
        index.write_text(text, encoding="utf-8")
        loading_refusal(copied_folder)
    index.unlink()
    for content in (b"", b"[]", b"\xff\xfe{}", b"[" * 200_000):
        (copied_folder / "config.json").write_bytes(content)
        assert "config.json" in loading_refusal(copied_folder)
