"""The reader of latents: what it yields, in which process, and what it says of damaged folders."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latent_samples import SETTINGS, encoded_photos, write_photos
from safetensors.torch import load_file, save_file
from tiny_models import refusal, tiny
from torch import Tensor
from torch.utils.data import DataLoader

from dc_ssdae import DCSSDAE
from dc_ssdae.data.encode_latents import LatentEncoder
from dc_ssdae.data.latents import Latent, LatentDataset
from dc_ssdae.errors import InputError

FILES = ("000000.safetensors", "000001.safetensors", "000002.safetensors", "manifest.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven photos in three shards: mean, standard deviation, and those of the mirrored images."""
    root = tmp_path_factory.mktemp("latents")
    encoded_photos(write_photos(root / "photos"), root / "out", replace(SETTINGS, store="mean_std"))
    return root / "out"


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A folder to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def edit_manifest(folder: Path, change: Callable[[Any], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def yielded(dataset: LatentDataset, epoch: int = 0) -> list[Latent]:
    dataset.set_epoch(epoch)
    return [dataset[index] for index in range(len(dataset))]


def same(some: list[Latent], others: list[Latent]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(one.latent, other.latent) and one[1:] == other[1:] for one, other in pairs)


# --- what it yields ---


def test_flips_and_noise_follow_from_seed_epoch_and_index_alone(folder: Path) -> None:
    dataset = LatentDataset(folder)
    first = yielded(dataset)
    assert same(first[::-1], [dataset[index] for index in range(6, -1, -1)])
    assert same(first, yielded(LatentDataset(folder)))
    assert not same(first, yielded(LatentDataset(folder, seed=1)))
    second = yielded(dataset, epoch=1)
    assert all(not torch.equal(one.latent, other.latent) for one, other in zip(first, second, strict=True))
    assert same(first, yielded(dataset))


def test_samples_are_of_the_stored_gaussians_and_half_are_mirrored(folder: Path) -> None:
    dataset = LatentDataset(folder)
    stored = dataset.stored(2)
    seen: dict[bool, list[Tensor]] = {False: [], True: []}
    for epoch in range(1000):
        dataset.set_epoch(epoch)
        seen[dataset[2].flipped].append(dataset[2].latent)
    assert 440 < len(seen[True]) < 560
    for flipped, mean, std in ((False, stored.latent, stored.std), (True, stored.latent_flip, stored.std_flip)):
        noise = (torch.stack(seen[flipped]) - mean) / std  # type: ignore[operator]
        assert noise.mean(dim=0).abs().max() < 0.25
        assert abs(noise.std().item() - 1.0) < 0.03


def test_what_is_not_asked_for_is_left_out(folder: Path) -> None:
    plain = LatentDataset(folder, flip=False, sample=False)
    plain[0].latent.zero_()  # which changes nothing in the data set
    assert all(torch.equal(plain[index].latent, plain.stored(index).latent) for index in range(7))
    sampled, mirrored = LatentDataset(folder, flip=False), LatentDataset(folder, flip=True, sample=True)
    assert not any(found.flipped for found in yielded(sampled))
    kept = [found for found in yielded(mirrored) if not found.flipped]
    assert 0 < len(kept) < 7
    assert same(kept, [sampled[found.place] for found in kept])  # mirroring does not change the noise


def pipeline_decode(vae: DCSSDAE, z: Tensor, shifts: bool) -> Tensor:
    """As pipelines end: diffusers' DiT, Sana and Stable Diffusion do not shift, Stable Diffusion 3 and Flux do."""
    z = z / vae.config.scaling_factor
    return vae.decode(z + vae.config.shift_factor if shifts else z, num_steps=1).sample


@pytest.mark.parametrize("normalise", ["scaling", "shift_and_scaling", "global"])
def test_what_a_network_learns_is_what_the_pipeline_decodes(tmp_path: Path, normalise: Any) -> None:
    vae = tiny(scaling_factor=0.13025, shift_factor=-0.6)
    encoder = LatentEncoder.of(vae, "tiny")
    encoded_photos(write_photos(tmp_path / "photos"), tmp_path / "out", replace(SETTINGS, flip=False), encoder)
    dataset = LatentDataset(tmp_path / "out", normalise=normalise)
    if normalise == "global":
        vae.register_to_config(**dataset.statistics.settings())
    shifts = normalise != "scaling"
    stored, z = dataset.stored(6).latent, dataset[6].latent
    torch.testing.assert_close(dataset.denormalise(z), stored, atol=1e-6, rtol=1e-5)
    expected = vae.decode(stored[None], num_steps=1).sample
    torch.testing.assert_close(pipeline_decode(vae, z[None], shifts), expected, atol=1e-4, rtol=1e-4)
    assert (pipeline_decode(vae, z[None], not shifts) - expected).abs().max() > 1e-3  # of the other kind


@pytest.mark.parametrize("normalise", ["channels", "global"])
def test_normalised_latents_have_mean_0_and_deviation_1(folder: Path, normalise: Any) -> None:
    dataset, raw = LatentDataset(folder, normalise=normalise), LatentDataset(folder)
    z = torch.stack([found.latent for epoch in range(60) for found in yielded(dataset, epoch)])
    values = z.transpose(0, 1).flatten(1) if normalise == "channels" else z.view(1, -1)
    assert values.mean(dim=1).abs().max() < 0.05
    assert (values.std(dim=1) - 1.0).abs().max() < 0.05
    last = torch.stack([found.latent for found in yielded(raw, 59)])
    torch.testing.assert_close(dataset.denormalise(z[-7:]), last)
    assert torch.equal(raw.denormalise(z[0]), z[0])
    assert dataset.normalise(z[:2].bfloat16()).dtype == torch.bfloat16


def test_a_channel_that_never_changes_is_divided_by_one(copied: Path) -> None:
    edit_manifest(copied, lambda manifest: manifest["statistics"].update(latents_std=[0.0, 1.0, 1.0]))
    dataset = LatentDataset(copied, normalise="channels")
    raw, z = LatentDataset(copied)[3].latent[0], dataset[3].latent
    torch.testing.assert_close(z[0], raw - dataset.statistics.mean[0])
    torch.testing.assert_close(dataset.denormalise(z)[0], raw)


# --- in a training loop ---


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_an_epoch_reaches_workers_that_live_on(folder: Path, start: str) -> None:
    dataset = LatentDataset(folder)
    dataset[0]  # what is open here must do no harm there
    loader = DataLoader(
        dataset, batch_size=4, num_workers=1, persistent_workers=True, multiprocessing_context=start, shuffle=True
    )
    for epoch in range(2):
        dataset.set_epoch(epoch)
        columns = [torch.cat(column) for column in zip(*loader, strict=True)]
        found = [Latent(z, *map(int, others)) for z, *others in zip(*columns, strict=True)]
        assert same(sorted(found, key=lambda latent: latent.place), yielded(dataset, epoch))


def test_there_is_none_beyond_the_ends(folder: Path) -> None:
    for index in (7, -1):
        with pytest.raises(IndexError, match=f"there are 7 latents, none at {index}"):
            LatentDataset(folder)[index]


# --- what is refused ---


def test_what_is_not_stored_cannot_be_had(tmp_path: Path) -> None:
    out = tmp_path / "out"
    encoded_photos(write_photos(tmp_path / "photos"), out, replace(SETTINGS, flip=False))
    for option, told in (("flip", "flip needs --flip"), ("sample", "sample needs --store mean_std")):
        assert told in refusal(LatentDataset, out, **{option: True})
    assert "did you mean 'channels'" in refusal(LatentDataset, out, normalise="channel")
    assert "seed is -1" in refusal(LatentDataset, out, seed=-1)
    assert "epoch is -1" in refusal(LatentDataset(out).set_epoch, -1)
    assert not any(found.flipped for found in yielded(LatentDataset(out)))


def test_folders_without_latents(folder: Path, tmp_path: Path) -> None:
    assert "manifest.json is missing" in refusal(LatentDataset, tmp_path / "absent")
    shutil.copytree(folder, tmp_path / "parts" / "train")
    assert "name a folder of one part" in refusal(LatentDataset, tmp_path / "parts")
    for content, told in (("{", "Expecting"), ("[]", "format is None"), ('{"format": "shards"}', "'shards'")):
        (tmp_path / "manifest.json").write_text(content)
        assert told in refusal(LatentDataset, tmp_path)


@pytest.mark.parametrize(
    ("section", "changed", "told"),
    [
        ("", {"version": 2}, "version is 2"),
        ("", {"images": 8}, "7 images, not 8"),
        ("", {"latent_shape": [3, 2]}, "latent_shape"),
        ("settings", {"store_dtype": "object"}, "store_dtype"),
        ("model", {"scaling_factor": 0.0}, "scaling_factor"),
        ("model", {"latents_mean": [1.0]}, "latents_mean has 1 number, not 3"),
        ("statistics", {"latents_mean": None}, "latents_mean"),
        ("statistics", {"latents_std": [1.0, 1.0, float("nan")]}, "latents_std"),
        ("shards", {"name": "../000000.safetensors"}, "is not the name of a shard"),
        ("shards", {"images": 10**400}, "cannot be used"),
    ],
)
def test_a_manifest_with_what_cannot_be(copied: Path, section: str, changed: dict[str, Any], told: str) -> None:
    def change(manifest: Any) -> None:
        found = manifest[section] if section else manifest
        (found[0] if section == "shards" else found).update(changed)

    edit_manifest(copied, change)
    assert told in refusal(LatentDataset, copied)


def test_shards_that_are_missing_or_damaged(copied: Path) -> None:
    path = copied / FILES[1]
    content = path.read_bytes()
    dataset = LatentDataset(copied)
    dataset.verify()
    dataset[3]
    path.unlink()
    assert FILES[1] in refusal(LatentDataset, copied)
    path.write_bytes(content[:-1])
    assert f"{FILES[1]} does not have {len(content)} bytes" in refusal(LatentDataset, copied)
    path.write_bytes(b"\xff" * len(content))
    assert f"{FILES[1]}' cannot be read: " in refusal(LatentDataset(copied).__getitem__, 3)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{FILES[1]} is damaged" in refusal(LatentDataset(copied).verify)


@pytest.mark.parametrize("key", ["latents", "latents_flip_std", "labels", "name_ends", "name_characters"])
def test_shards_with_other_tensors(copied: Path, key: str) -> None:
    path = copied / FILES[0]
    tensors = load_file(path)
    without = {name: tensor for name, tensor in tensors.items() if name != key}
    for changed in (without, {**tensors, key: tensors[key].double()}, {**tensors, key: tensors[key][None]}):
        save_file(changed, path)
        edit_manifest(copied, lambda manifest: manifest["shards"][0].update(bytes=path.stat().st_size))
        assert re.search(f"{FILES[0]}' cannot be read: .*{key}", refusal(LatentDataset(copied).__getitem__, 0))


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=3), PLAIN, max_size=2)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every entry of a JSON value: what holds it, and its key or index there."""
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(entry, dict | list):
            yield from places(entry)


def check_read_or_refused(folder: Path) -> None:
    """Read all that there is, or be refused in one line; any other exception fails the test."""
    told = "one line"
    try:
        dataset = LatentDataset(folder)
        assert [dataset.stored(index) and dataset[index].place for index in range(len(dataset))] == list(range(7))
    except InputError as error:
        told = str(error)
    assert len(told.splitlines()) == 1


checked = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@checked
@given(data=st.data())
def test_changed_manifests_are_refused_in_one_line_or_read(folder: Path, copied: Path, data: st.DataObject) -> None:
    content = json.loads((folder / "manifest.json").read_bytes())
    holder, key = data.draw(st.sampled_from(list(places(content))))
    if data.draw(st.booleans()):
        holder[key] = data.draw(VALUES)
    else:
        del holder[key]
    (copied / "manifest.json").write_text(json.dumps(content))
    check_read_or_refused(copied)


@checked
@given(where=st.integers(0, 10**6), value=st.binary(min_size=1, max_size=4))
def test_changed_shards_are_refused_in_one_line_or_read(copied: Path, folder: Path, where: int, value: bytes) -> None:
    content = bytearray((folder / FILES[0]).read_bytes())
    place = where % (len(content) - len(value))
    content[place : place + len(value)] = value
    (copied / FILES[0]).write_bytes(content)
    check_read_or_refused(copied)
