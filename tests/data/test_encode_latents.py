"""Encoding a data set: what is in the shards, that neither killing nor sharing changes it, and what is refused."""

import functools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from glob import glob
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_samples import encoded, image_array, write_images, write_tar
from filelock import FileLock
from latent_processes import work
from latent_samples import SETTINGS, constant, digests, encoded_photos, pooled, pooling, write_photos
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import tiny
from torch import Tensor
from two_processes import PROCESSES, TwoProcesses

from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.data.images import read_image, to_model_range
from dc_ssdae.data.latent_manifest import ModelScaling, Store, tensor_names
from dc_ssdae.data.latent_shard import LatentEncoder, LatentSettings, encoder_sha256, noise_generator
from dc_ssdae.data.latents import LatentDataset
from dc_ssdae.data.loader import ReadingFailed
from dc_ssdae.data.shards import Shards
from dc_ssdae.data.transforms import center_crop, resize_shorter_side
from dc_ssdae.errors import InputError
from dc_ssdae.latent import DiagonalGaussian


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    return content


def prepared(photos: Path, name: str, size: int = 16) -> Tensor:
    return center_crop(resize_shorter_side(read_image(photos / name).pixels, size), size)


# --- what is written ---


@pytest.mark.parametrize("store", ["mean", "sample", "mean_std"])
def test_the_reader_gives_exactly_what_the_model_gives(photos: Path, tmp_path: Path, store: Store) -> None:
    model = tiny()
    encoder = LatentEncoder.of(model, "tiny")
    settings = LatentSettings(16, store, flip=True, seed=3, shard_size=3)
    [part], lines = encoded_photos(photos, tmp_path / "out", settings, encoder)
    assert (part.images, part.shards, part.unlabelled, part.broken) == (7, 3, 0, 1)
    assert len(lines) == 1
    dataset = LatentDataset(tmp_path / "out", flip=False, sample=False)
    assert len(dataset) == 7
    names = [*(f"bird/image_{number:03d}.png" for number in range(3)), "bird/image_1.png"]
    names += [f"cat/image_{number:03d}.png" for number in range(3, 7)]
    index = 0
    for first, last in ((0, 2), (2, 3), (3, 5), (5, 6), (6, 8)):  # batches of two, in shards of three
        batch = names[first:last]
        blank = torch.zeros(3, 16, 16, dtype=torch.uint8)
        pixels = torch.stack([blank if "image_1." in name else prepared(photos, name) for name in batch])
        expected = []
        for flipped in (False, True):
            with torch.inference_mode():
                posterior = model.encode(to_model_range(pixels.flip(-1) if flipped else pixels)).latent_dist
            assert posterior.logvar is not None
            if store == "sample":
                z = posterior.sample([noise_generator(3, name, flipped) for name in batch])
            else:
                z = posterior.mean
            expected.append((z, torch.exp(0.5 * posterior.logvar)))
        for row, name in enumerate(batch):
            if "image_1." in name:
                continue
            stored, given = dataset.stored(index), dataset[index]
            assert (stored.name, stored.label) == (name, int(name.startswith("cat")))
            assert given[1:] == (stored.label, index, False)
            found = [(stored.latent, stored.std), (stored.latent_flip, stored.std_flip)]
            for (z, std), (latent, deviation) in zip(expected, found, strict=True):
                assert latent is not None
                assert torch.equal(latent, z[row])
                assert (deviation is None) == (store != "mean_std")
                assert deviation is None or torch.equal(deviation, std[row])
            assert torch.equal(given.latent, expected[0][0][row])
            assert not torch.equal(stored.latent, found[1][0])
            index += 1
    assert index == 7
    mirrored = LatentDataset(tmp_path / "out", flip=True, sample=False)
    sides = [mirrored[place] for place in range(7)]
    assert {side.flipped for side in sides} == {False, True}
    for side in sides:
        stored = mirrored.stored(side.place)
        assert torch.equal(side.latent, stored.latent_flip if side.flipped else stored.latent)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_latents_may_be_stored_in_fewer_bits(photos: Path, tmp_path: Path, dtype: Any) -> None:
    encoded_photos(photos, tmp_path / "out", replace(SETTINGS, store_dtype=dtype))
    expected = pooled(prepared(photos, "bird/image_000.png")[None]).mean[0].to(getattr(torch, dtype))
    dataset = LatentDataset(tmp_path / "out", flip=False)
    assert torch.equal(dataset.stored(0).latent, expected)
    assert torch.equal(dataset[0].latent, expected.float())


@pytest.mark.parametrize("store", ["mean", "sample"])
def test_plain_safetensors_and_a_loader_of_lightningdit_find_their_way(
    photos: Path, tmp_path: Path, store: Any
) -> None:
    """As LightningDiT's data set reads features: every *.safetensors of the folder, by these keys, row by row."""
    encoded_photos(photos, tmp_path / "out", replace(SETTINGS, store=store))
    files = sorted(glob(str(tmp_path / "out" / "*.safetensors")))
    dataset, index = LatentDataset(tmp_path / "out"), 0
    for path in files:
        with safe_open(path, framework="pt", device="cpu") as file:
            for row in range(file.get_slice("labels").get_shape()[0]):
                stored = dataset.stored(index)
                for key, latent in (("latents", stored.latent), ("latents_flip", stored.latent_flip)):
                    assert latent is not None
                    assert torch.equal(file.get_slice(key)[row : row + 1].squeeze(0), latent)
                assert file.get_slice("labels")[row : row + 1].tolist() == [stored.label]
                index += 1
    assert index == len(dataset) == 7
    torch.save({}, tmp_path / "out" / "latents_stats.pt")  # which it leaves in the folder
    assert len(LatentDataset(tmp_path / "out")) == 7
    assert "finished already" in encoded_photos(photos, tmp_path / "out", replace(SETTINGS, store=store))[1][0]


@pytest.mark.parametrize("store", ["mean", "sample", "mean_std"])
def test_statistics_are_of_what_a_reader_yields(photos: Path, tmp_path: Path, store: Any) -> None:
    encoded_photos(photos, tmp_path / "out", replace(SETTINGS, store=store))
    statistics = manifest_of(tmp_path / "out")["statistics"]
    shards = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    keys = ("latents", "latents_flip")
    z = torch.cat([shard[key] for shard in shards for key in keys]).double().transpose(0, 1).flatten(1)
    variance = z.var(dim=1, correction=0)
    if store == "mean_std":
        std = torch.cat([shard[f"{key}_std"] for shard in shards for key in keys]).double()
        variance = variance + std.square().transpose(0, 1).flatten(1).mean(dim=1)
    torch.testing.assert_close(torch.tensor(statistics["latents_mean"]).double(), z.mean(dim=1))
    torch.testing.assert_close(torch.tensor(statistics["latents_std"]).double(), variance.sqrt())
    assert statistics["shift_factor"] == pytest.approx(float(z.mean()))
    total = variance.mean() + z.mean(dim=1).var(correction=0)
    assert statistics["scaling_factor"] == pytest.approx(float(total.rsqrt()))


def test_the_manifest_says_what_is_there(photos: Path, tmp_path: Path) -> None:
    encoded_photos(photos, tmp_path / "out")
    manifest = manifest_of(tmp_path / "out")
    found = digests(tmp_path / "out")
    assert list(found) == ["000000.safetensors", "000001.safetensors", "000002.safetensors", "manifest.json"]
    assert {shard["name"]: shard["sha256"] for shard in manifest["shards"]}.items() <= found.items()
    assert [shard["images"] for shard in manifest["shards"]] == [3, 2, 2]
    assert (manifest["images"], manifest["classes"], manifest["unlabelled"]) == (7, ["bird", "cat"], 0)
    assert manifest["model"] == {
        "name": "pooling",
        "sha256": "00",
        "downsample_factor": 8,
        "latent_channels": 3,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "latents_mean": None,
        "latents_std": None,
    }
    assert manifest["latent_shape"] == [3, 2, 2]
    [entry] = manifest["broken"]
    assert entry["name"] == str(photos / "bird" / "image_1.png")
    expected = {name: value for name, value in asdict(SETTINGS).items() if name != "seed"}
    assert expected.items() <= manifest["settings"].items()
    assert os.stat(tmp_path / "out" / "000000.safetensors").st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    os.umask(current := os.umask(0))
    return current


def test_parts_classes_and_a_limit(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "cat", 4)
    write_images(tmp_path / "validation" / "bird", 2)
    parts: dict[str, Any] = {name: ImageFolder(str(tmp_path / name)) for name in ("train", "validation")}
    done, _ = encoded_photos(parts, tmp_path / "out", limit=2)
    assert [(part.name, part.images, part.folder) for part in done] == [
        (name, 2, tmp_path / "out" / name) for name in parts
    ]
    train = LatentDataset(tmp_path / "out" / "train")
    assert [train.stored(index).name for index in range(2)] == ["cat/image_000.png", "cat/image_002.png"]
    assert [train[index].label for index in range(2)] == [1, 1]
    assert train.classes == ["bird", "cat"]
    [part], _ = encoded_photos(parts, tmp_path / "one", only="train")
    assert (part.name, part.images) == ("train", 4)
    assert LatentDataset(tmp_path / "one" / "train")[0].label == 1
    with pytest.raises(InputError, match="there are no validation images: it has train"):
        encoded_photos({"train": parts["train"]}, tmp_path / "two", only="validation")
    with pytest.raises(InputError, match="there are no train images: it is not divided"):
        encoded_photos({"": parts["train"]}, tmp_path / "two", only="train")


def test_shards_with_labels(tmp_path: Path) -> None:
    members = {f"{number}.png": encoded(image_array(number)) for number in range(4)}
    write_tar(tmp_path / "a.tar", {**members, "4.cls": b"6", "4.png": members["0.png"]})
    [part], _ = encoded_photos({"": Shards(str(tmp_path / "a.tar"))}, tmp_path / "out", workers=1)
    assert (part.images, part.unlabelled) == (5, 4)
    dataset = LatentDataset(tmp_path / "out")
    assert [dataset[index].label for index in range(5)] == [-1, -1, -1, -1, 6]
    assert dataset.stored(4).name == "a.tar/4.png"
    assert dataset.classes == []


def test_noise_belongs_to_the_image(photos: Path, tmp_path: Path) -> None:
    """Another batch size, another order or fewer images draw the same; another seed and the mirrored image do not."""
    settings = replace(SETTINGS, store="sample")
    encoded_photos(photos, tmp_path / "a", settings)
    encoded_photos(photos, tmp_path / "b", replace(settings, shard_size=5), batch_size=5)
    encoded_photos({"": ImageFolder(str(photos))}, tmp_path / "c", settings, limit=2)
    encoded_photos(photos, tmp_path / "d", replace(settings, seed=1))
    a, b, c, d = (LatentDataset(tmp_path / name) for name in "abcd")
    # `pooled` gives the same for an image in whatever batch it stands
    assert all(torch.equal(a.stored(index).latent, b.stored(index).latent) for index in range(7))
    assert c.stored(1).name == a.stored(3).name == "cat/image_003.png"
    assert torch.equal(c.stored(1).latent, a.stored(3).latent)
    assert not torch.equal(a.stored(0).latent, d.stored(0).latent)
    flipped = pooled(prepared(photos, "bird/image_000.png").flip(-1)[None])
    found = a.stored(0).latent_flip
    assert found is not None
    assert torch.equal(found, flipped.sample([noise_generator(0, "bird/image_000.png", True)])[0])
    assert not torch.allclose(found, flipped.sample([noise_generator(0, "bird/image_000.png", False)])[0])


def test_the_encoder_alone_makes_the_model(tmp_path: Path) -> None:
    model = tiny()
    before = encoder_sha256(model)
    with torch.no_grad():
        next(model.decoder.parameters()).add_(1.0)
    model.register_to_config(scaling_factor=2.0, latents_mean=[0.0] * 4)  # as `dc-ssdae stats` does
    assert encoder_sha256(model) == before
    assert LatentEncoder.of(model, "x").sha256 == before
    with torch.no_grad():
        next(model.encoder.parameters()).view(-1)[0].add_(1e-3)
    assert encoder_sha256(model) != before


# --- going on ---


class Killed(BaseException):
    pass


class Countdown:
    """Lets the calls that change the disk fail once `left` of them are done; None lets all through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        for name in ("replace", "fsync", "mkdir", "unlink"):
            monkeypatch.setattr(os, name, functools.partial(self._call, getattr(os, name)))

    def _call(self, original: Callable, *arguments: Any, **options: Any) -> Any:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed
        return original(*arguments, **options)


def test_ended_between_any_two_writes_it_goes_on_to_the_same_bytes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, flip=False, shard_size=4)
    encoded_photos(photos, tmp_path / "whole", settings)
    expected = digests(tmp_path / "whole")
    countdown = Countdown(monkeypatch)
    for instant in range(1000):
        out = tmp_path / f"out_{instant}"
        countdown.left = instant
        try:
            encoded_photos(photos, out, settings)
            break
        except Killed:
            countdown.left = None
            encoded_photos(photos, out, settings)
            assert digests(out) == expected
    assert 20 < instant < 999


def kill_after(shards: int, photos: Path, out: Path) -> None:
    """Encode, and end this process by SIGKILL at the moment at which a shard is finished."""
    torch.set_num_threads(1)  # those of the process it was forked from are not there
    replace_file, done = os.replace, []

    def counting(source: Any, target: Any) -> None:
        replace_file(source, target)
        done.append(str(target))
        if sum(path.endswith(".safetensors") for path in done) == shards:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counting
    encoded_photos(photos, out)


def test_killed_it_goes_on_with_the_shards_that_are_missing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded_photos(photos, tmp_path / "whole")
    out = tmp_path / "out"
    for _ in range(2):  # one shard each time
        process = multiprocessing.get_context("fork").Process(target=kill_after, args=(1, photos, out))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["000000.safetensors", "000001.safetensors"]
    with pytest.raises(InputError, match=r"dc-ssdae latents has not finished with .*run the same command again"):
        LatentDataset(out)
    encoded_images: list[int] = []

    def counting(pixels: Tensor) -> DiagonalGaussian:
        encoded_images.append(len(pixels))
        return pooled(pixels)

    _, lines = encoded_photos(photos, out, encoder=pooling(encode=counting))
    assert sum(encoded_images) == 1 + 2 * 2  # to see what the encoder gives; the two images that were missing, twice
    assert lines == []  # the broken one was named before
    assert digests(out) == digests(tmp_path / "whole")
    _, lines = encoded_photos(photos, out)
    assert [line.partition(" is ")[2] for line in lines] == ["finished already; nothing to do"]


def test_other_numbers_of_the_model_refuse_nothing_and_those_at_the_end_are_kept(photos: Path, tmp_path: Path) -> None:
    """`dc-ssdae stats` may write the model's config.json between an interruption and going on, or later."""

    def failing(pixels: Tensor) -> DiagonalGaussian:
        if done:
            raise InputError("enough")
        done.extend(tmp_path.glob("out/000000.safetensors"))
        return pooled(pixels)

    done: list[Path] = []
    with pytest.raises(InputError, match="enough"):
        encoded_photos(photos, tmp_path / "out", encoder=pooling(encode=failing))
    assert len(done) == 1
    scaling = ModelScaling(0.5, 0.25, [0.0, 0.1, 0.2], [1.0, 2.0, 0.0])
    encoded_photos(photos, tmp_path / "out", encoder=pooling(scaling=scaling))
    assert asdict(scaling).items() <= manifest_of(tmp_path / "out")["model"].items()
    assert LatentDataset(tmp_path / "out").manifest.scaling == scaling
    before = digests(tmp_path / "out")
    assert asdict(scaling).keys().isdisjoint(manifest_of(tmp_path / "out")["settings"])
    finished = "is finished already; nothing to do"
    for now, told in ((scaling, finished), (replace(scaling, shift_factor=0.0), "has changed since")):
        _, [line] = encoded_photos(photos, tmp_path / "out", encoder=pooling(scaling=now))
        assert finished in line
        assert line.endswith(told)
        assert digests(tmp_path / "out") == before


def test_a_failure_leaves_no_lock_behind_and_two_do_not_both_enter(photos: Path, tmp_path: Path) -> None:
    out, refused = tmp_path / "out", []

    def failing(pixels: Tensor) -> DiagonalGaussian:
        if (out / ".latents.lock").exists():
            refused.append(refusal(photos, out))
            assert (out / ".latents.lock").exists()  # of the one that is at work
            raise InputError("enough")
        return pooled(pixels)

    assert refusal(photos, out, encoder=pooling(encode=failing)) == "enough"
    assert refused == [f"another dc-ssdae latents is writing to {str(out)!r}"]
    assert sorted(path.name for path in out.iterdir()) == [".latents"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert "choose an empty folder" in refusal(photos, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_several_processes_write_the_same_bytes_and_fail_together(
    made_once: Any, two_processes: TwoProcesses, tmp_path: Path
) -> None:
    def fill(folder: Path) -> None:
        write_photos(folder / "photos")
        two_processes(work, str(folder))

    folder = made_once("latents-processes", fill)
    [part], [line] = encoded_photos(folder / "photos", tmp_path / "out", replace(SETTINGS, store="sample"))
    assert digests(folder / "out") == digests(tmp_path / "out")
    records = [torch.load(folder / f"record{rank}", weights_only=False) for rank in range(PROCESSES)]
    for record in records:
        assert [found._replace(folder=part.folder) for found in record["parts"]] == [part]
    assert [len(record["lines"]) for record in records] == [0, 1]  # each names what is broken in its own share
    assert records[1]["lines"][0].replace(str(folder), "") == line.replace(str(folder), "")
    for name, told in (
        ("one fails", "the latent of 'cat/image_006.png' is infinite or NaN as float32, computed in float32"),
        ("all fail", "size 12 is no multiple of this model's f = 8; 16 is"),
        ("main fails", f"the destination {str(folder / 'photos')!r} holds 'bird'; choose an empty folder"),
    ):
        assert [record[name] for record in records] == [f"InputError: {told}"] * 2, name
    assert not (folder / "nan" / "manifest.json").exists()
    assert records[0]["few"] == ["1 shard can keep at most as many processes busy; smaller shards keep more"]


# --- what is refused ---


def refusal(*given: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        encoded_photos(*given, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_images_or_models_in_one_destination(photos: Path, tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "out"
    options = {} if finished else {"max_broken_share": 0.0}
    if finished:
        encoded_photos(photos, out)
    else:
        assert "1 of 8 images are broken" in refusal(photos, out, **options)  # told by the second of three shards
    for changed, told in (
        ({"size": 32}, "was begun with size 16, not 32; choose another destination"),
        ({"store": "sample"}, "was begun with store mean, not sample"),
        ({"flip": False}, "was begun with flip True, not False"),
        ({"store_dtype": "float16"}, "was begun with store_dtype float32, not float16"),
        ({"shard_size": 4}, "was begun with shard_size 3, not 4"),
    ):
        assert told in refusal(photos, out, replace(SETTINGS, **changed))  # type: ignore[arg-type]
    encoder = pooling(compute_dtype="bfloat16")
    assert "was begun with compute_dtype float32, not bfloat16" in refusal(photos, out, SETTINGS, encoder)
    encoder = pooling(sha256="11", name="another")
    assert "was encoded with another model than another" in refusal(photos, out, SETTINGS, encoder)
    assert "from other images than are in the source now" in refusal(photos, out, limit=7)
    (photos / "cat" / "image_006.png").rename(photos / "bird" / "image_006.png")
    assert "from other images than are in the source now" in refusal(photos, out)
    (photos / "bird" / "image_006.png").rename(photos / "cat" / "image_006.png")
    status = (photos / "cat" / "image_006.png").stat()
    os.utime(photos / "cat" / "image_006.png", ns=(0, 0))
    assert "from files that have changed since" in refusal(photos, out)
    os.utime(photos / "cat" / "image_006.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    encoded_photos(photos, out, replace(SETTINGS, seed=4), batch_size=3)  # a mean has no noise
    assert len(LatentDataset(out)) == 7


def test_where_nothing_is_finished_other_settings_may_begin_anew(photos: Path, tmp_path: Path) -> None:
    def large(pixels: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(pooled(pixels).mean * 1e5)

    encoder, half = pooling(encode=large), replace(SETTINGS, store_dtype="float16")
    told = "the latent of 'bird/image_000.png' is infinite or NaN as float16, computed in float32"
    assert refusal(photos, tmp_path / "out", half, encoder) == told
    encoded_photos(photos, tmp_path / "out", replace(half, store_dtype="bfloat16"), encoder)
    assert LatentDataset(tmp_path / "out").stored(0).latent.dtype == torch.bfloat16


def test_encoders_that_do_not_fit(photos: Path, tmp_path: Path) -> None:
    for store in ("sample", "mean_std"):
        told = refusal(photos, tmp_path / "out", replace(SETTINGS, store=store), pooling(encode=constant))
        assert told == f"this model's encoder gives no variance, which {store!r} needs; store the mean"

    def exhausted(pixels: Tensor) -> DiagonalGaussian:
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return pooled(pixels)

    assert "out of memory with 2 images at a time" in refusal(
        photos, tmp_path / "a", SETTINGS, pooling(encode=exhausted)
    )

    def collapsed(pixels: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(torch.zeros(len(pixels), 3, 2, 2))

    assert "has collapsed" in refusal(photos, tmp_path / "b", SETTINGS, pooling(encode=collapsed))


def test_broken_images_leave_no_holes_and_too_many_end_it(photos: Path, tmp_path: Path) -> None:
    for number in range(3, 6):
        (photos / "cat" / f"image_{number:03d}.png").write_bytes(b"")
    _, lines = encoded_photos(photos, tmp_path / "out", replace(SETTINGS, shard_size=2), max_broken_share=0.5)
    assert len(lines) == 4
    dataset = LatentDataset(tmp_path / "out")
    assert [shard.images for shard in dataset.manifest.shards] == [2, 1, 0, 1]
    assert [dataset.stored(index).name for index in range(4)] == [
        *(f"bird/image_{number:03d}.png" for number in range(3)),
        "cat/image_006.png",
    ]
    assert "4 of 8 images are broken, more than the share of 0.4 that" in refusal(
        photos, tmp_path / "few", max_broken_share=0.4
    )
    for path in photos.rglob("*.png"):
        path.write_bytes(b"")
    assert "none of 8 images can be read; the first: " in refusal(photos, tmp_path / "none", max_broken_share=1.0)


def test_destinations_that_must_not_be(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("")
    assert "holds 'thesis.tex'; choose an empty folder" in refusal(photos, out)
    (out / "manifest.json").write_text('{"format": "dc-ssdae shards"}')
    assert "was not written by dc-ssdae latents" in refusal(photos, out)
    encoded_photos(photos, tmp_path / "damaged")
    (tmp_path / "damaged" / "000001.safetensors").unlink()
    assert "000001.safetensors' is missing or damaged" in refusal(photos, tmp_path / "damaged")
    with FileLock(tmp_path / ".latents.lock"):
        assert "another dc-ssdae latents is writing to" in refusal({"": ImageFolder(str(photos))}, tmp_path)


def test_a_disk_that_goes_away_is_told(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: ImageFolder, index: int) -> Tensor:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ImageFolder, "read", lost)
    with pytest.raises(ReadingFailed, match="Input/output error"):
        encoded_photos(photos, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"size": 0}, "size is 0"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"store": "means"}, "did you mean 'mean'"),
        ({"store_dtype": "float8"}, "unknown dtype of stored latents 'float8'"),
    ],
)
def test_settings_are_checked(settings: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        LatentSettings(**settings)


def test_names_of_tensors() -> None:
    assert tensor_names("mean_std", True) == ["latents_flip", "latents_flip_std"]
    assert tensor_names("sample", False) == ["latents"]
