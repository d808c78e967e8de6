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
from tiny_models import refusal as refusal_of

from dc_ssdae import DCSSDAE, __version__
from dc_ssdae.cli.latent_file import read_latent, write_latent
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
def test_encode_then_decode_is_reconstruct(dtype: str, run: Run, model_dir: Path) -> None:
    photos = [save_photo(Path(f"{width}.png"), height, width) for height, width in ((30, 17), (1, 1))]
    words = ("--model", model_dir, "--device", "cpu", "--dtype", dtype, "--tile_size", 16, "--out")
    decoding = ("--steps", 2, "--seed", 7)
    assert run("reconstruct", *photos, *words, "direct", *decoding).code == 0
    assert run("encode", *photos, *words, "latents").code == 0
    latents = sorted(Path("latents").iterdir())
    assert {str(load_file(latent)["latent"].dtype) for latent in latents} == {f"torch.{dtype}"}
    assert run("decode", *latents, *words, "decoded", *decoding).code == 0
    for photo in photos:
        assert Path("direct", photo).read_bytes() == Path("decoded", photo).read_bytes()


def test_sampling(run: Run, refusal: Refusal, photo: Path, model_dir: Path) -> None:
    words = ("encode", photo, "--out", "out", "--overwrite", "--model")

    def latent(*more: object) -> torch.Tensor:
        assert run(*words, model_dir, *more).code == 0
        return load_file("out/photo.safetensors")["latent"]

    sample = latent("--sample")
    assert torch.equal(sample, latent("--sample", "--seed", 0))
    assert not torch.equal(sample, latent())
    assert not torch.equal(sample, latent("--sample", "--seed", 1))
    stages = {"widths": [16, 16, 16, 16], "depths": [1, 1, 1, 1], "variational": False}
    DCSSDAE(4, 8, encoder={"init_args": stages}, decoder=TINY_DECODER).save_pretrained("point")
    assert run(*words, "point").code == 0
    assert "no variance to sample with" in refusal(*words, "point", "--sample")


def test_bad_latents_among_good_ones(encoded: Path, run: Run, refusal: Refusal, model_dir: Path) -> None:
    truncated = Path(shutil.copy(encoded, "truncated.safetensors"))
    os.truncate(truncated, encoded.stat().st_size - 1)
    last = shutil.copy(encoded, "last.safetensors")
    bad = [truncated, "absent.safetensors", "pickled.pt", save_photo(Path("x.png"), 8, 8)]
    outcome = run("decode", encoded, *bad, last, "--model", model_dir, "--out", "out", "--device", "cpu")
    assert (outcome.code, len(outcome.out)) == (2, 2)
    for path, line in zip(bad, outcome.err, strict=True):
        assert line.startswith("dc-ssdae decode: ")
        assert str(path) in line
    assert sorted(path.name for path in Path("out").iterdir()) == ["last.png", "photo.png"]
    other = save_model(Path("f16"), downsample_factor=16)
    line = refusal("decode", encoded, "--model", other, "--out", "other")
    assert all(part in line for part in (str(encoded), "(4, 8)", "(4, 16)"))


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
def test_a_file_with_wrong_parts_is_refused(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    save_file(tensors, "x.safetensors", {**METADATA, **metadata})
    assert refusal_of(read_latent, Path("x.safetensors")).startswith("x.safetensors: ")


def test_a_latent_that_is_not_finite_is_not_written() -> None:
    assert "24 of 24 values" in refusal_of(write_latent, Path("x"), LATENT / 0, (13, 22), 8)
    assert not Path("x").exists()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(place=st.floats(0, 1, exclude_max=True), new=st.binary(max_size=3), dropped=st.sampled_from([0, 1, 9, 10**6]))
def test_every_damaged_file_is_read_or_refused_in_one_line(
    encoded: Path, place: float, new: bytes, dropped: int
) -> None:
    content, path = encoded.read_bytes(), Path("damaged.safetensors")
    start = int(place * len(content))
    path.write_bytes(content[:start] + new + content[start + dropped :])
    told = str(path)
    try:
        assert read_latent(path)[0].isfinite().all()
    except InputError as error:
        told = str(error)
    assert str(path) in told
    assert len(told.splitlines()) == 1
