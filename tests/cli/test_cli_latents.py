"""`dc-ssdae encode` and `decode`: the latent files between them, whole and damaged."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_samples import Refusal, Run, save_model, save_photo
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import TINY_DECODER

from dc_ssdae import DCSSDAE, __version__
from dc_ssdae.cli.latent_file import LatentFile, read_latent, write_latent
from dc_ssdae.cli.main import main
from dc_ssdae.data.images import read_image, to_model_range
from dc_ssdae.errors import InputError

METADATA = {"format": "dc-ssdae latent", "format_version": "1", "latent_channels": "4", "downsample_factor": "8"}
LATENT, SIZE = torch.zeros(4, 2, 3), torch.tensor([13, 22])
WHOLE = {"latent": LATENT, "original_size": SIZE}


@pytest.fixture(scope="module")
def encoded(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latent of a photo of 13 by 22 pixels (height by width)."""
    folder = tmp_path_factory.mktemp("encoded")
    photo = save_photo(folder / "photo.png", 13, 22)
    assert main(["encode", str(photo), "--model", str(model_dir), "--out", str(folder)]) == 0
    return folder / "photo.safetensors"


def test_a_file_holds_the_mode_and_the_size(encoded: Path, model_dir: Path) -> None:
    tensors = load_file(encoded)
    assert set(tensors) == {"latent", "original_size"}
    assert tensors["original_size"].dtype == torch.int64
    assert tensors["original_size"].tolist() == [13, 22]
    with safe_open(encoded, "pt") as file:
        assert file.metadata() == {**METADATA, "dc_ssdae_version": __version__}
    # By numpy, as a second opinion on the padding: reflection below and at the right.
    image = read_image(encoded.with_suffix(".png")).pixels.numpy()
    pixels = torch.from_numpy(np.pad(image, ((0, 0), (0, 3), (0, 2)), mode="reflect"))
    with torch.inference_mode():
        mode = DCSSDAE.from_pretrained(model_dir).encode(to_model_range(pixels)[None]).latent_dist.mode()
    assert torch.equal(tensors["latent"], mode[0])
    assert encoded.stat().st_mode == encoded.with_suffix(".png").stat().st_mode, "others can read it"
    assert sorted(path.name for path in encoded.parent.iterdir()) == ["photo.png", "photo.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encode_then_decode_is_reconstruct(dtype: str, run: Run, model_dir: Path, tmp_path: Path) -> None:
    photos = [save_photo(tmp_path / f"{width}.png", height, width) for height, width in ((30, 17), (1, 1))]
    words = ("--model", model_dir, "--device", "cpu", "--dtype", dtype, "--out")
    decoding = ("--steps", 2, "--seed", 7)
    assert run("reconstruct", *photos, *words, tmp_path / "direct", *decoding).code == 0
    assert run("encode", *photos, *words, tmp_path / "latents").code == 0
    latents = sorted((tmp_path / "latents").iterdir())
    assert {str(load_file(latent)["latent"].dtype) for latent in latents} == {f"torch.{dtype}"}
    assert run("decode", *latents, *words, tmp_path / "decoded", *decoding).code == 0
    for photo in photos:
        direct, decoded = (tmp_path / folder / photo.name for folder in ("direct", "decoded"))
        assert direct.read_bytes() == decoded.read_bytes()


def test_sampling(run: Run, refusal: Refusal, photo: Path, model_dir: Path, tmp_path: Path) -> None:
    words = ("encode", photo, "--out", tmp_path / "out", "--overwrite", "--model")

    def latent(*more: object) -> torch.Tensor:
        assert run(*words, model_dir, *more).code == 0
        return load_file(tmp_path / "out" / "photo.safetensors")["latent"]

    sample = latent("--sample")
    assert torch.equal(sample, latent("--sample", "--seed", 0))
    assert not torch.equal(sample, latent())
    assert not torch.equal(sample, latent("--sample", "--seed", 1))
    assert "--seed is for --sample" in refusal(*words, "missing", "--seed", 1)
    stages = {"widths": [16, 16, 16, 16], "depths": [1, 1, 1, 1], "variational": False}
    DCSSDAE(4, 8, encoder={"init_args": stages}, decoder=TINY_DECODER).save_pretrained(tmp_path / "point")
    assert run(*words, tmp_path / "point").code == 0
    assert "no variance to sample with" in refusal(*words, tmp_path / "point", "--sample")


def test_a_model_of_another_kind_is_refused(encoded: Path, refusal: Refusal, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", downsample_factor=16)
    line = refusal("decode", encoded, "--model", model, "--out", tmp_path / "out")
    assert all(part in line for part in (str(encoded), "(4, 8)", "(4, 16)"))


def test_bad_latents_among_good_ones(encoded: Path, run: Run, model_dir: Path, tmp_path: Path) -> None:
    truncated = Path(shutil.copy(encoded, tmp_path / "truncated.safetensors"))
    os.truncate(truncated, encoded.stat().st_size - 1)
    last = shutil.copy(encoded, tmp_path / "last.safetensors")
    bad = [truncated, tmp_path / "absent.safetensors", tmp_path / "pickled.pt", save_photo(tmp_path / "x.png", 8, 8)]
    out = tmp_path / "out"
    outcome = run("decode", encoded, *bad, last, "--model", model_dir, "--out", out, "--device", "cpu")
    assert (outcome.code, len(outcome.out)) == (2, 2)
    for path, line in zip(bad, outcome.err, strict=True):
        assert line.startswith("dc-ssdae decode: ")
        assert str(path) in line
    assert sorted(path.name for path in out.iterdir()) == ["last.png", "photo.png"]


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        (WHOLE, {"format": "pt"}),
        (WHOLE, {"latent_channels": "8"}),
        (WHOLE, {"downsample_factor": "0"}),
        ({"latent": LATENT}, {}),
        ({**WHOLE, "latent": LATENT[None]}, {}),
        ({**WHOLE, "latent": LATENT.int()}, {}),
        ({**WHOLE, "latent": LATENT / 0}, {}),
        ({**WHOLE, "original_size": SIZE.float()}, {}),
        ({**WHOLE, "original_size": SIZE + 8}, {}),
    ],
)
def test_a_file_with_wrong_parts_is_refused(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {**METADATA, **metadata})
    with pytest.raises(InputError) as error:
        read_latent(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    latent = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).half()
    write_latent(tmp_path / "x.safetensors", LatentFile(latent, (40, 81), 20))
    again = read_latent(tmp_path / "x.safetensors")
    assert torch.equal(again.latent, latent)
    assert again.latent.dtype == torch.float16
    assert again[1:] == ((40, 81), 20)
    latent[1, 1, 1] = float("inf")
    with pytest.raises(InputError, match="1 of 30 values"):
        write_latent(tmp_path / "y.safetensors", LatentFile(latent, (40, 81), 20))
    assert not (tmp_path / "y.safetensors").exists()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(place=st.floats(0, 1, exclude_max=True), new=st.binary(max_size=3), dropped=st.sampled_from([0, 1, 9, 10**6]))
def test_every_damaged_file_is_read_or_refused_in_one_line(
    encoded: Path, place: float, new: bytes, dropped: int
) -> None:
    content, path = encoded.read_bytes(), encoded.parent.parent / "damaged.safetensors"
    start = int(place * len(content))
    path.write_bytes(content[:start] + new + content[start + dropped :])
    told = str(path)
    try:
        assert read_latent(path).latent.isfinite().all()
    except InputError as error:
        told = str(error)
    assert str(path) in told
    assert len(told.splitlines()) == 1
