"""The reader of latents: what it yields, in which process, and what it says of damaged folders."""

import copy
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latent_samples import SETTINGS, constant, encoded_photos, pooling, write_photos
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from torch import nn
from torch.utils.data import DataLoader

from dc_ssdae import DCSSDAE
from dc_ssdae.data import latents as latents_module
from dc_ssdae.data.latent_manifest import LatentManifest
from dc_ssdae.data.latent_shard import LatentEncoder
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


def yielded(dataset: LatentDataset) -> list[Latent]:
    return [dataset[index] for index in range(len(dataset))]


def same(some: list[Latent], others: list[Latent]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(one.latent, other.latent) and one[1:] == other[1:] for one, other in pairs)


# --- what it yields ---


def test_flips_and_noise_follow_from_seed_epoch_and_index_alone(folder: Path) -> None:
    dataset = LatentDataset(folder)
    first = yielded(dataset)
    assert same(first, yielded(dataset))
    assert same(first[::-1], [dataset[index] for index in range(6, -1, -1)])
    assert same(first, yielded(LatentDataset(folder)))
    assert not same(first, yielded(LatentDataset(folder, seed=1)))
    dataset.set_epoch(1)
    second = yielded(dataset)
    assert not same(first, second)
    assert all(not torch.equal(one.latent, other.latent) for one, other in zip(first, second, strict=True))
    dataset.set_epoch(0)
    assert same(first, yielded(dataset))


def test_samples_are_of_the_stored_gaussians_and_half_are_mirrored(folder: Path) -> None:
    dataset = LatentDataset(folder)
    stored = dataset.stored(2)
    assert stored.std is not None
    assert stored.latent_flip is not None
    assert stored.std_flip is not None
    seen: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for epoch in range(1000):
        dataset.set_epoch(epoch)
        found = dataset[2]
        seen[found.flipped].append(found.latent)
    assert 440 < len(seen[True]) < 560
    for flipped, mean, std in ((False, stored.latent, stored.std), (True, stored.latent_flip, stored.std_flip)):
        noise = (torch.stack(seen[flipped]) - mean) / std
        assert noise.mean(dim=0).abs().max() < 0.25
        assert (noise.std(dim=0) - 1.0).abs().max() < 0.2
        assert abs(noise.mean().item()) < 0.05
        assert abs(noise.std().item() - 1.0) < 0.03


def test_what_is_not_asked_for_is_left_out(folder: Path) -> None:
    plain = LatentDataset(folder, flip=False, sample=False)
    for index in range(7):
        assert torch.equal(plain[index].latent, plain.stored(index).latent)
    sampled = LatentDataset(folder, flip=False)
    mirrored = LatentDataset(folder, flip=True, sample=True)
    assert not any(found.flipped for found in yielded(sampled))
    assert any(found.flipped for found in yielded(mirrored))
    kept = [found for found in yielded(mirrored) if not found.flipped]
    assert same(kept, [sampled[found.place] for found in kept])  # mirroring does not change the noise


def test_writing_into_a_latent_changes_nothing(folder: Path) -> None:
    dataset = LatentDataset(folder, flip=False, sample=False)
    before = dataset[0].latent.clone()
    dataset[0].latent.zero_()
    dataset.stored(0).latent.zero_()
    assert torch.equal(dataset[0].latent, before)


def pipeline_decode(vae: DCSSDAE, z: torch.Tensor, shifts: bool) -> torch.Tensor:
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
    shift, scale = vae.config.shift_factor if shifts else 0.0, vae.config.scaling_factor
    for index in range(7):
        stored, z = dataset.stored(index).latent, dataset[index].latent
        torch.testing.assert_close(z, (stored - shift) * scale, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(dataset.denormalise(z), stored, atol=1e-6, rtol=1e-5)
    expected = vae.decode(stored[None], num_steps=1).sample
    for image in (
        vae.decode(dataset.denormalise(z)[None], num_steps=1).sample,
        pipeline_decode(vae, z[None], shifts),
    ):
        torch.testing.assert_close(image, expected, atol=1e-4, rtol=1e-4)
    assert (pipeline_decode(vae, z[None], not shifts) - expected).abs().max() > 1e-3  # of the other kind


@pytest.mark.parametrize("normalise", ["channels", "global"])
def test_normalised_latents_have_mean_0_and_deviation_1(folder: Path, normalise: Any) -> None:
    dataset = LatentDataset(folder, normalise=normalise)
    z = []
    for epoch in range(60):
        dataset.set_epoch(epoch)
        z += [found.latent for found in yielded(dataset)]
    values = torch.stack(z).transpose(0, 1).flatten(1)
    if normalise == "channels":
        torch.testing.assert_close(values.mean(dim=1), torch.zeros(3), atol=0.05, rtol=0.0)
        torch.testing.assert_close(values.std(dim=1), torch.ones(3), atol=0.05, rtol=0.0)
    assert abs(values.mean().item()) < 0.05
    assert abs(values.std().item() - 1.0) < 0.05
    raw = LatentDataset(folder)
    raw.set_epoch(59)
    torch.testing.assert_close(dataset.denormalise(torch.stack(z[-7:])), torch.stack([raw[i].latent for i in range(7)]))
    assert torch.equal(raw.denormalise(z[0]), z[0])
    half = dataset.normalise(torch.zeros(2, 3, 2, 2, dtype=torch.bfloat16))
    assert (half.shape, half.dtype) == ((2, 3, 2, 2), torch.bfloat16)


def test_a_channel_that_never_changes_is_divided_by_one(tmp_path: Path) -> None:
    encoded_photos(write_photos(tmp_path / "photos"), tmp_path / "out", encoder=pooling(encode=constant))
    dataset = LatentDataset(tmp_path / "out", normalise="channels")
    assert dataset.statistics.std[0] == 0.0
    z = dataset[3].latent
    assert torch.equal(z[0], torch.zeros(2, 2))
    assert torch.equal(dataset.denormalise(z)[0], torch.full((2, 2), 0.25))


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
        batches = list(loader)
        assert [type(batch) for batch in batches] == [Latent, Latent]
        assert batches[0].latent.shape == (4, 3, 2, 2)
        for batch in batches:
            for row, place in enumerate(batch.place.tolist()):
                expected = dataset[place]
                assert torch.equal(batch.latent[row], expected.latent)
                assert (batch.label[row], batch.flipped[row]) == (expected.label, expected.flipped)
        assert sorted(torch.cat([batch.place for batch in batches]).tolist()) == list(range(7))


def test_a_small_training_loop_learns(folder: Path) -> None:
    dataset = LatentDataset(folder, sample=False, normalise="channels")
    loader = DataLoader(dataset, batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(12, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for epoch in range(30):
        dataset.set_epoch(epoch)
        for batch in loader:
            loss = nn.functional.cross_entropy(model(batch.latent.flatten(1)), batch.label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_it_is_copied_and_pickled_and_keeps_few_files_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = LatentDataset(folder, normalise="global", seed=3)
    dataset.set_epoch(5)
    expected = yielded(dataset)
    for other in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        assert same(yielded(other), expected)
    monkeypatch.setattr(latents_module, "OPEN_SHARDS", 1)
    order = [0, 3, 6, 1, 4, 5, 2]
    assert same([dataset[index] for index in order], [expected[index] for index in order])
    assert len(dataset._opened.shards) == 3
    fresh = LatentDataset(folder, normalise="global", seed=3)
    fresh.set_epoch(5)
    assert same([fresh[index] for index in order], [expected[index] for index in order])
    assert len(fresh._opened.shards) == 1


def test_places_beyond_the_end(folder: Path) -> None:
    dataset = LatentDataset(folder)
    for index in (7, -1):
        with pytest.raises(IndexError, match=f"there are 7 latents, none at {index}"):
            dataset[index]
    assert len(list(dataset)) == 7  # type: ignore[call-overload]  # Python's old protocol, by index


# --- what is refused ---


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        LatentDataset(folder, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_what_is_not_stored_cannot_be_had(tmp_path: Path) -> None:
    encoded_photos(write_photos(tmp_path / "photos"), tmp_path / "out", replace(SETTINGS, flip=False))
    out = tmp_path / "out"
    assert "holds no mirrored images; encode again with --flip" in refusal(out, flip=True)
    assert "holds the mean of each latent, which cannot be sampled from" in refusal(out, sample=True)
    assert "did you mean 'channels'" in refusal(out, normalise="channel")
    assert "flip is 'no'; it must be true or false" in refusal(out, flip="no")
    assert "seed is -1" in refusal(out, seed=-1)
    dataset = LatentDataset(out)
    assert not any(found.flipped for found in yielded(dataset))
    assert dataset.stored(0)[3:] == (None, None, None)
    with pytest.raises(InputError, match="epoch is -1"):
        dataset.set_epoch(-1)


def test_folders_without_latents(folder: Path, tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "absent")
    assert "manifest.json is missing; dc-ssdae latents writes" in refusal(tmp_path)
    (tmp_path / ".latents").mkdir()
    assert "has not finished with" in refusal(tmp_path)
    for part in ("validation", "train"):
        shutil.copytree(folder, tmp_path / "parts" / part)
    assert refusal(tmp_path / "parts").endswith("holds train/ and validation/; name one of them")
    (tmp_path / "manifest.json").write_text('{"format": "dc-ssdae shards", "version": 1}')
    assert "is not of latents" in refusal(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "dc-ssdae latents", "version": 2}')
    assert "is of version 2; this dc-ssdae reads 1" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"scaling_factor": 0.0}, "cannot be scaled"),
        ({"scaling_factor": None}, "scaling_factor is None; it must be a number"),
        ({"shift_factor": float("inf")}, "cannot be scaled"),
        ({"latents_std": [1.0, 1.0, -1.0]}, "cannot be scaled"),
        ({"latents_mean": [1.0]}, "latents_mean has 1 number, not 3"),
        ({"latents_mean": "abc"}, "latents_mean is 'abc'"),
    ],
)
def test_numbers_of_the_model_that_cannot_be(copied: Path, changed: dict[str, Any], told: str) -> None:
    manifest = json.loads((copied / "manifest.json").read_bytes())
    manifest["model"] |= changed
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert told in refusal(copied)
    assert "is damaged: " in refusal(copied)
    del manifest["model"][next(iter(changed))]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert f"is damaged: '{next(iter(changed))}'" in refusal(copied)


def test_shards_that_are_missing_or_damaged(copied: Path) -> None:
    path = copied / FILES[1]
    content = path.read_bytes()
    path.unlink()
    assert refusal(copied) == f"shard {str(path)!r} is missing; encode the images again"
    path.write_bytes(content[:-1])
    assert f"has {len(content) - 1} bytes where manifest.json says {len(content)}" in refusal(copied)
    path.write_bytes(b"\xff" * len(content))
    dataset = LatentDataset(copied)
    dataset[0]
    with pytest.raises(InputError, match=r"000001.safetensors' cannot be read: .*header") as caught:
        dataset[3]
    assert len(str(caught.value).splitlines()) == 1
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    changed = LatentDataset(copied)
    with pytest.raises(InputError, match=r"000001.safetensors' is damaged: its SHA-256 is not that of manifest.json"):
        changed.verify()
    path.write_bytes(content)
    LatentDataset(copied).verify()
    shutil.copyfile(copied / FILES[0], path)
    assert refusal(copied).endswith("encode the images again")


def test_a_shard_cut_short_after_it_was_opened(copied: Path) -> None:
    dataset = LatentDataset(copied)
    dataset[0]
    os.truncate(copied / FILES[0], 0)  # whoever reads it through mapped memory is killed by the system
    with pytest.raises(InputError, match=f"{FILES[0]}' has been cut short"):
        dataset[0]


@pytest.mark.parametrize("key", ["latents", "latents_flip_std", "labels", "name_ends"])
def test_shards_with_other_tensors(copied: Path, key: str) -> None:
    path = copied / FILES[0]
    tensors = load_file(path)
    for changed, told in (
        ({**tensors, key: tensors[key][:1].clone()}, f"does not fit its manifest.json: {key} is"),
        ({**tensors, key: tensors[key].double()}, f"{key} is F64 of shape"),
        ({name: tensor for name, tensor in tensors.items() if name != key}, f"cannot be read: .*{key}"),
    ):
        save_file(changed, path)
        manifest = json.loads((copied / "manifest.json").read_bytes())
        manifest["shards"][0]["bytes"] = path.stat().st_size
        (copied / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match=told):
            LatentDataset(copied)[0]


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=3), PLAIN, max_size=2)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every entry of a JSON value: what holds it, and its key or index there."""
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(entry, dict | list):
            yield from places(entry)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_manifests_are_refused_in_one_line_or_read(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = json.loads((folder / "manifest.json").read_bytes())
    holder, key = data.draw(st.sampled_from(list(places(content))))
    if data.draw(st.booleans()):
        holder[key] = data.draw(VALUES)
    else:
        del holder[key]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    problem = "one line"
    try:
        manifest = LatentManifest.read(tmp_path)
        assert sum(shard.images for shard in manifest.shards) == 7
    except InputError as error:
        problem = str(error)
    assert len(problem.splitlines()) == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 10**6), value=st.binary(min_size=1, max_size=4))
def test_changed_shards_are_refused_in_one_line_or_read(copied: Path, folder: Path, where: int, value: bytes) -> None:
    content = bytearray((folder / FILES[0]).read_bytes())
    place = where % (len(content) - len(value))
    content[place : place + len(value)] = value
    (copied / FILES[0]).write_bytes(content)
    dataset = LatentDataset(copied)
    problem = "one line"
    try:
        for index in range(3):
            dataset[index]
            dataset.stored(index)
    except InputError as error:
        problem = str(error)
    assert len(problem.splitlines()) == 1
