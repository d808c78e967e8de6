"""Encoding a data set: what is in the shards, that neither killing nor sharing changes it, and what is refused."""

import functools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_samples import encoded, image_array, write_images, write_tar
from interrupted import digests, instants_with_equal_ends
from latent_processes import work
from latent_samples import SETTINGS, encoded_photos, pooled, pooling, write_photos
from safetensors.torch import load_file
from tiny_models import refusal as refusal_of
from tiny_models import tiny
from torch import Tensor
from two_processes import PROCESSES, TwoProcesses

from dc_ssdae.data.encode_latents import LatentEncoder, LatentSettings
from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.data.images import read_image
from dc_ssdae.data.latents import LatentDataset
from dc_ssdae.data.shards import Shards
from dc_ssdae.data.transforms import center_crop, resize_shorter_side
from dc_ssdae.errors import InputError
from dc_ssdae.latent import DiagonalGaussian
from dc_ssdae.randomness import named_generator

NAMES = [f"{'bird' if number < 3 else 'cat'}/image_{number:03d}.png" for number in range(7)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


# --- what is written ---


@pytest.mark.parametrize(("store", "dtype"), [("mean", "float32"), ("sample", "bfloat16"), ("mean_std", "float16")])
def test_shards_and_reader_give_exactly_what_the_encoder_gives(
    photos: Path, tmp_path: Path, store: Any, dtype: Any
) -> None:
    """LightningDiT's data set reads every *.safetensors of the folder, in the order of their names, by these keys."""
    manifests, _ = encoded_photos(photos, tmp_path / "out", LatentSettings(16, store, True, 3, dtype, shard_size=3))
    images = [resize_shorter_side(read_image(photos / name).pixels, 16) for name in NAMES]
    pixels = torch.stack([center_crop(image, 16) for image in images])
    expected: dict[str, Any] = {"latents_std": 7 * [None], "latents_flip_std": 7 * [None]}
    for key, suffix, x in (("latents", "", pixels), ("latents_flip", "\0flipped", pixels.flip(-1))):
        posterior = pooled(x)  # gives the same for an image in whatever batch it stands
        sample = posterior.sample([named_generator(3, name + suffix) for name in NAMES])
        expected[key] = (sample if store == "sample" else posterior.mean).to(getattr(torch, dtype))
        if store == "mean_std":
            expected[f"{key}_std"] = posterior.std.to(getattr(torch, dtype))
    torch.save({}, tmp_path / "out" / "latents_stats.pt")  # which LightningDiT leaves in the folder
    shards = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert torch.equal(torch.cat([shard["latents"] for shard in shards]), expected["latents"])
    assert torch.equal(torch.cat([shard["latents_flip"] for shard in shards]), expected["latents_flip"])
    assert torch.cat([shard["labels"] for shard in shards]).tolist() == [0, 0, 0, 1, 1, 1, 1]
    dataset = LatentDataset(tmp_path / "out", flip=False, sample=False)
    for index, name in enumerate(NAMES):
        stored = dataset.stored(index)
        assert stored[:2] == (name, int(index > 2))
        for key, found in zip(("latents", "latents_std", "latents_flip", "latents_flip_std"), stored[2:], strict=True):
            assert found is expected[key][index] or torch.equal(found, expected[key][index])
        assert torch.equal(dataset[index].latent, stored.latent.float())
        assert dataset[index][1:] == (stored.label, index, False)
    # The statistics are of what a reader yields: Var z = Var μ + E σ².
    z = torch.cat([expected["latents"], expected["latents_flip"]]).double()
    variance = z.var(dim=(0, 2, 3), correction=0)
    if store == "mean_std":
        std = torch.cat([expected["latents_std"], expected["latents_flip_std"]]).double()
        variance = variance + std.square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(dataset.statistics.mean, z.mean(dim=(0, 2, 3)).tolist())
    torch.testing.assert_close(dataset.statistics.std, variance.sqrt().tolist())
    assert manifests[""]["statistics"] == dataset.statistics.settings()


def test_the_manifest_says_what_is_there(photos: Path, tmp_path: Path) -> None:
    manifests, _ = encoded_photos(photos, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest == manifests[""]
    found = digests(tmp_path / "out")
    assert [*found] == ["000000.safetensors", "000001.safetensors", "000002.safetensors", "manifest.json"]
    assert {shard["name"]: shard["sha256"] for shard in manifest["shards"]}.items() <= found.items()
    assert [shard["images"] for shard in manifest["shards"]] == [3, 2, 2]
    assert (manifest["images"], manifest["classes"], manifest["unlabelled"]) == (7, ["bird", "cat"], 0)
    assert (manifest["latent_shape"], manifest["settings"]["size"]) == ([3, 2, 2], 16)
    assert {"name": "pooling", "sha256": "00", "scaling_factor": 1.0}.items() <= manifest["model"].items()
    assert [entry["name"] for entry in manifest["broken"]] == [str(photos / "bird" / "image_1.png")]
    assert (tmp_path / "out" / "000000.safetensors").stat().st_mode == (photos / NAMES[0]).stat().st_mode


def test_parts_classes_and_a_limit(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "cat", 4)
    write_images(tmp_path / "validation" / "bird", 2)
    parts: dict[str, Any] = {name: ImageFolder(str(tmp_path / name)) for name in ("train", "validation")}
    encoded_photos(parts, tmp_path / "out", limit=2)
    train, validation = (LatentDataset(tmp_path / "out" / name) for name in parts)
    assert [train.stored(index).name for index in range(2)] == ["cat/image_000.png", "cat/image_002.png"]
    assert (len(train), train[0].label, validation[0].label, train.classes) == (2, 1, 0, ["bird", "cat"])


def test_shards_with_labels(tmp_path: Path) -> None:
    members = {f"{number}.png": encoded(image_array(number)) for number in range(4)}
    write_tar(tmp_path / "a.tar", {**members, "4.cls": b"6", "4.png": members["0.png"]})
    manifests, _ = encoded_photos({"": Shards(str(tmp_path / "a.tar"))}, tmp_path / "out", workers=1)
    dataset = LatentDataset(tmp_path / "out")
    assert [dataset[index].label for index in range(5)] == [-1, -1, -1, -1, 6]
    assert (dataset.stored(4).name, dataset.classes, manifests[""]["unlabelled"]) == ("a.tar/4.png", [], 4)


def test_the_encoder_alone_makes_the_model() -> None:
    model = tiny()
    before = LatentEncoder.of(model, "x").sha256
    next(model.decoder.parameters()).data.add_(1.0)
    model.register_to_config(scaling_factor=2.0, latents_mean=[0.0] * 4)  # as `dc-ssdae stats` does
    assert LatentEncoder.of(model, "x").sha256 == before
    next(model.encoder.parameters()).data.view(-1)[0].add_(1e-3)
    assert LatentEncoder.of(model, "x").sha256 != before


# --- going on ---


def test_ended_between_any_two_writes_it_goes_on_to_the_same_bytes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, flip=False, shard_size=4)
    instants = instants_with_equal_ends(lambda out: encoded_photos(photos, out, settings), tmp_path, monkeypatch)
    assert instants > 20


def test_what_is_finished_is_kept_and_other_scaling_refuses_nothing(photos: Path, tmp_path: Path) -> None:
    """`dc-ssdae stats` may write the model's config.json between an interruption and going on, or later."""
    out, encoded_images = tmp_path / "out", list[int]()

    def counting(pixels: Tensor) -> DiagonalGaussian:
        encoded_images.append(len(pixels))
        if len(encoded_images) == 3:
            raise InputError("enough")  # in the second shard of three
        return pooled(pixels)

    settings, counts = replace(SETTINGS, flip=False), pooling(encode=counting)
    assert refusal(photos, out, settings, counts) == "enough"
    assert sorted(path.name for path in out.iterdir()) == [".latents", "000000.safetensors"]
    assert "has not finished" in refusal_of(LatentDataset, out)
    scaling = {"scaling_factor": 0.5, "shift_factor": 0.25, "latents_mean": [0.0] * 3, "latents_std": [1.0, 2.0, 0.0]}
    manifests, _ = encoded_photos(photos, out, settings, replace(counts, scaling=scaling))
    assert sum(encoded_images[3:]) == 5
    assert scaling.items() <= manifests[""]["model"].items()
    before = digests(out)
    for now, told in ((scaling, "nothing to do"), ({**scaling, "shift_factor": 0.0}, "has changed since")):
        _, lines = encoded_photos(photos, out, settings, pooling(scaling=now))
        assert lines[-1].endswith(told)
        assert digests(out) == before


def test_several_processes_write_the_same_bytes_and_fail_together(
    made_once: Any, two_processes: TwoProcesses, tmp_path: Path
) -> None:
    def fill(folder: Path) -> None:
        write_photos(folder / "photos")
        two_processes(work, str(folder))

    folder = made_once("latents-processes", fill)
    manifests, [line] = encoded_photos(folder / "photos", tmp_path / "out", replace(SETTINGS, store="sample"))
    assert digests(folder / "out") == digests(tmp_path / "out")
    records = [torch.load(folder / f"record{rank}", weights_only=False) for rank in range(PROCESSES)]
    assert [record["manifests"] for record in records] == [manifests] * 2
    assert [record["lines"] for record in records] == [[], [line]]  # each names what is broken in its own share
    for name, told in (("one fails", "cat/image_006.png"), ("all fail", "size 12"), ("main fails", "'bird'")):
        assert told in records[0][name]
        assert records[1][name] == records[0][name]
    assert not (folder / "nan" / "manifest.json").exists()


# --- what is refused ---


refusal = functools.partial(refusal_of, encoded_photos)


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_images_or_models_in_one_destination(photos: Path, tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "out"
    if finished:
        encoded_photos(photos, out)
    else:
        assert "1 of 8 images are broken" in refusal(photos, out, max_broken_share=0.0)  # by the second of three shards
    for changed in ({"size": 32}, {"store": "sample"}, {"flip": False}, {"shard_size": 4}, {"store_dtype": "float16"}):
        settings = replace(SETTINGS, **changed)  # type: ignore[arg-type]
        assert f"was begun with {next(iter(changed))} " in refusal(photos, out, settings)
    assert "begun with compute_dtype" in refusal(photos, out, encoder=pooling(compute_dtype="bfloat16"))
    assert "different model" in refusal(photos, out, encoder=pooling(sha256="11"))
    last, moved = photos / "cat" / "image_006.png", photos / "bird" / "image_006.png"
    last.rename(moved)
    assert "begun with different " in refusal(photos, out)
    moved.rename(last)
    status = last.stat()
    os.utime(last, ns=(0, 0))
    assert "begun with different " in refusal(photos, out)
    os.utime(last, ns=(status.st_atime_ns, status.st_mtime_ns))
    encoded_photos(photos, out, replace(SETTINGS, seed=4), batch_size=3)  # a mean has no noise
    assert len(LatentDataset(out)) == 7


def test_encoders_that_do_not_fit(photos: Path, tmp_path: Path) -> None:
    def collapsed(pixels: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(torch.zeros(len(pixels), 3, 2, 2))

    def exhausted(pixels: Tensor) -> DiagonalGaussian:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def large(pixels: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(pooled(pixels).mean * 1e5)

    for encode, changed, told in (
        (collapsed, {"store": "mean_std"}, "no variance"),
        (exhausted, {}, "out of memory with 2 images at a time"),
        (large, {"store_dtype": "float16"}, "'bird/image_000.png' is infinite or NaN as float16"),
    ):
        settings = replace(SETTINGS, **changed)  # type: ignore[arg-type]
        assert told in refusal(photos, tmp_path / "out", settings, pooling(encode=encode))
    # Where no shard is finished, other settings may begin anew.
    encoded_photos(photos, tmp_path / "out", replace(SETTINGS, store_dtype="bfloat16"), pooling(encode=large))
    assert LatentDataset(tmp_path / "out").stored(0).latent.dtype == torch.bfloat16


def test_broken_images_leave_no_holes_and_too_many_end_it(photos: Path, tmp_path: Path) -> None:
    for number in range(3, 6):
        (photos / "cat" / f"image_{number:03d}.png").write_bytes(b"")
    settings = replace(SETTINGS, shard_size=2)
    manifests, lines = encoded_photos(photos, tmp_path / "out", settings, max_broken_share=0.5)
    assert len(lines) == len(manifests[""]["broken"]) == 4
    assert [shard["images"] for shard in manifests[""]["shards"]] == [2, 1, 0, 1]
    dataset = LatentDataset(tmp_path / "out")
    assert [dataset.stored(index).name for index in range(4)] == [*NAMES[:3], NAMES[6]]
    assert "more than the share of 0.4" in refusal(photos, tmp_path / "few", max_broken_share=0.4)


def test_destinations_that_must_not_be(photos: Path, tmp_path: Path) -> None:
    out, refused = tmp_path / "out", list[str]()

    def encoding(pixels: Tensor) -> DiagonalGaussian:
        refused.append(refusal(photos, out))
        return pooled(pixels)

    encoded_photos(photos, out, encoder=pooling(encode=encoding))
    assert "another dc-ssdae latents is writing to" in refused[-1]
    (out / "000001.safetensors").unlink()
    assert "000001.safetensors' is missing or damaged" in refusal(photos, out)


@pytest.mark.parametrize(
    ("name", "value"), [("size", 0), ("shard_size", 0), ("seed", -1), ("store", "means"), ("store_dtype", "float8")]
)
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        LatentSettings(**{name: value})
    assert caught.value.field == name
