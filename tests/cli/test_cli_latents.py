"""`dc-ssdae encode` and `decode`: the latent files between them, whole and damaged."""

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_samples import random_pixels, save_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dc_ssdae import DCSSDAE, __version__
from dc_ssdae.cli.latent_file import LatentFile, read_latent, write_latent
from dc_ssdae.cli.main import main
from dc_ssdae.data.images import read_image, to_model_range
from dc_ssdae.errors import InputError

METADATA = {"format": "dc-ssdae latent", "format_version": "1", "latent_channels": "4", "downsample_factor": "8"}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def encoded(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latent of a photo of 13 by 22 pixels (height by width)."""
    folder = tmp_path_factory.mktemp("encoded")
    Image.fromarray(random_pixels(13, 22)).save(folder / "photo.png")
    assert main(["encode", f"{folder}/photo.png", "--model", str(model_dir), "--out", str(folder)]) == 0
    return folder / "photo.safetensors"


@pytest.fixture
def decode(run: Callable, model_dir: Path, tmp_path: Path) -> Callable:
    def call(*words: object) -> object:
        return run("decode", *words, "--model", model_dir, "--out", tmp_path / "out", "--overwrite", "--device", "cpu")

    return call


def test_file_holds_the_mode_and_the_size(encoded: Path, model_dir: Path) -> None:
    tensors = load_file(encoded)
    assert set(tensors) == {"latent", "original_size"}
    assert tensors["original_size"].dtype == torch.int64
    assert tensors["original_size"].tolist() == [13, 22]
    assert metadata_of(encoded) == {**METADATA, "dc_ssdae_version": __version__}
    # By numpy, as a second opinion on the padding: reflection below and at the right.
    image = read_image(encoded.with_suffix(".png")).pixels.numpy()
    pixels = torch.from_numpy(np.pad(image, ((0, 0), (0, 3), (0, 2)), mode="reflect"))
    with torch.inference_mode():
        mode = DCSSDAE.from_pretrained(model_dir).encode(to_model_range(pixels)[None]).latent_dist.mode()
    assert torch.equal(tensors["latent"], mode[0])


def test_written_files_obey_the_umask(encoded: Path) -> None:
    assert encoded.stat().st_mode == encoded.with_suffix(".png").stat().st_mode
    assert sorted(path.name for path in encoded.parent.iterdir()) == ["photo.png", "photo.safetensors"]


@pytest.mark.parametrize("words", [["--steps", 2, "--seed", 7], ["--dtype", "bfloat16"]])
def test_encode_then_decode_is_reconstruct(words: list[object], run: Callable, model_dir: Path, tmp_path: Path) -> None:
    photos = []
    for index, (height, width) in enumerate([(30, 17), (1, 1), (16, 24)]):
        photos.append(tmp_path / f"photo{index}.png")
        Image.fromarray(random_pixels(height, width)).save(photos[-1])
    model = ["--model", model_dir, "--device", "cpu"]
    encoding = words if "--dtype" in words else []
    assert run("reconstruct", *photos, *model, "--out", tmp_path / "direct", *words).code == 0
    assert run("encode", *photos, *model, "--out", tmp_path / "latents", *encoding).code == 0
    latents = sorted((tmp_path / "latents").iterdir())
    assert run("decode", *latents, *model, "--out", tmp_path / "decoded", *words).code == 0
    for photo in photos:
        direct, decoded = (tmp_path / folder / photo.name for folder in ("direct", "decoded"))
        assert direct.read_bytes() == decoded.read_bytes()


def test_seeds_differ(encoded: Path, decode: Callable, tmp_path: Path) -> None:
    results = []
    for words in ([], ["--seed", 0], ["--seed", 1], ["--seed", 4294967295]):
        assert decode(encoded, *words).code == 0
        results.append((tmp_path / "out" / "photo.png").read_bytes())
    assert results[0] == results[1]
    assert len(set(results)) == 3


def test_sampling(run: Callable, photo: Path, model_dir: Path, tmp_path: Path) -> None:
    def latent(*words: object) -> torch.Tensor:
        assert run("encode", photo, "--model", model_dir, "--out", tmp_path / "out", "--overwrite", *words).code == 0
        return load_file(tmp_path / "out" / "photo.safetensors")["latent"]

    mode, sample, again = latent(), latent("--sample"), latent("--sample", "--seed", 0)
    assert torch.equal(sample, again)
    assert not torch.equal(sample, mode)
    assert not torch.equal(sample, latent("--sample", "--seed", 1))


def test_seed_without_sampling_is_refused(run: Callable, photo: Path, tmp_path: Path) -> None:
    outcome = run("encode", photo, "--model", "missing", "--out", tmp_path / "out", "--seed", 1)
    assert outcome == (2, [], ["dc-ssdae encode: --seed is for --sample; the mode is not random"])


def test_sampling_without_a_variance_is_refused(run: Callable, photo: Path, tmp_path: Path) -> None:
    tiny = {"channels": 16, "multipliers": [1, 1, 1, 1], "middle_layers": 1, "heads": 1, "norm_groups": 8}
    stages = {"widths": [16, 16, 16, 16], "depths": [1, 1, 1, 1]}
    model = DCSSDAE(4, 8, encoder={"init_args": {**stages, "variational": False}}, decoder={"init_args": tiny})
    model.save_pretrained(tmp_path / "model")
    words = ("encode", photo, "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert run(*words).code == 0
    outcome = run(*words, "--sample", "--overwrite")
    assert outcome.code == 2
    assert outcome.err == [
        f"dc-ssdae encode: {photo}: this model's encoder gives no variance to sample with; leave --sample out"
    ]


def test_model_of_another_kind_is_refused(encoded: Path, run: Callable, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", latent_channels=2, downsample_factor=32)
    outcome = run("decode", encoded, "--model", model, "--out", tmp_path / "out")
    differences = "latent_channels is 4, the model's 2; downsample_factor is 8, the model's 32"
    assert outcome == (2, [], [f"dc-ssdae decode: {encoded}: the latent does not fit the model: {differences}"])


LATENT, SIZE = torch.zeros(4, 2, 3), torch.tensor([13, 22])
WHOLE = {"latent": LATENT, "original_size": SIZE}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (WHOLE, {"format": "pt"}, "not a latent file"),
        (WHOLE, {"format_version": "2"}, "format version '2'"),
        (WHOLE, {"latent_channels": "8"}, "latent_channels is 8"),
        (WHOLE, {"downsample_factor": "x"}, "downsample_factor in its metadata is 'x'"),
        ({"latent": LATENT}, {}, "holds the tensors latent; needs latent and original_size"),
        ({**WHOLE, "latent": LATENT.int()}, {}, "latent is int32 of shape (4, 2, 3)"),
        ({**WHOLE, "latent": LATENT / 0}, {}, "24 of 24 values of the latent are infinite or NaN"),
        ({**WHOLE, "original_size": SIZE[:1]}, {}, "original_size is int64 of shape (1,)"),
        ({**WHOLE, "original_size": SIZE + 8}, {}, "original_size is 21 by 30 pixels"),
    ],
)
def test_file_with_wrong_parts_is_refused(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], message: str, decode: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {**METADATA, **metadata})
    outcome = decode(path)
    assert outcome.code == 2
    assert len(outcome.err) == 1
    assert outcome.err[0].startswith(f"dc-ssdae decode: {path}: {message}")


def test_truncated_file_names_the_tensor(encoded: Path, decode: Callable, tmp_path: Path) -> None:
    broken = Path(shutil.copy(encoded, tmp_path / "broken.safetensors"))
    os.truncate(broken, encoded.stat().st_size - 1)
    outcome = decode(broken)
    assert outcome.code == 2
    assert len(outcome.err) == 1
    assert outcome.err[0].startswith(f"dc-ssdae decode: {broken} is truncated: tensor '")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_missing_and_pickled_files_are_one_line(name: str, decode: Callable, tmp_path: Path) -> None:
    outcome = decode(tmp_path / name)
    assert outcome.code == 2
    assert len(outcome.err) == 1
    assert str(tmp_path / name) in outcome.err[0]


def test_latent_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    latent = LATENT.clone()
    latent[1, 1, 1] = float("inf")
    with pytest.raises(InputError, match="1 of 24 values of the latent are infinite or NaN"):
        write_latent(tmp_path / "x.safetensors", LatentFile(latent, (13, 22), 8))
    assert not list(tmp_path.iterdir())


def test_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    content = LatentFile(torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)), (40, 81), 20)
    content = content._replace(latent=content.latent.half())
    write_latent(tmp_path / "x.safetensors", content)
    again = read_latent(tmp_path / "x.safetensors")
    assert torch.equal(again.latent, content.latent)
    assert again.latent.dtype == torch.float16
    assert again[1:] == content[1:]


mutations = st.one_of(
    st.tuples(st.just("set"), st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
    st.tuples(st.just("insert"), st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.integers(1, 16)),
    st.tuples(st.just("end"), st.floats(0, 1, exclude_max=True), st.just(0)),
)


def mutate(content: bytes, kind: str, place: float, value: int) -> bytes:
    start = int(place * len(content))
    before, after = content[:start], content[start:]
    if kind == "set":
        return before + bytes([value]) + after[1:]
    if kind == "insert":
        return before + bytes([value]) + after
    return before + (after[value:] if kind == "cut" else b"")


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(mutations, min_size=1, max_size=3), min_size=20, max_size=20))
def test_every_damaged_file_decodes_or_fails_in_one_line(
    encoded: Path, model_dir: Path, damages: list[list[tuple[str, float, int]]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for index, damage in enumerate(damages):
            content = encoded.read_bytes()
            for kind, place, value in damage:
                content = mutate(content, kind, place, value)
            files.append(Path(folder, f"{index}.safetensors"))
            files[-1].write_bytes(content)
        words = ["decode", *map(str, files), "--model", str(model_dir), "--out", f"{folder}/out", "--device", "cpu"]
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = main(words)
        decoded = {path.stem for path in Path(folder, "out").iterdir()}
    failed = [file for file in files if file.stem not in decoded]
    lines = stderr.getvalue().splitlines()
    assert code == (2 if failed else 0)
    assert len(lines) == len(failed)
    for file, line in zip(failed, lines, strict=True):
        assert str(file) in line
    assert len(stdout.getvalue().splitlines()) == len(decoded)
