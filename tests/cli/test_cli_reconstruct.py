"""`dc-ssdae reconstruct`: its images are the model's, whatever the files and the options; what does not fit is told."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_samples import Outcome, Refusal, Run, Words, random_pixels, save_photo
from PIL import Image
from torch import Tensor

from dc_ssdae import DCSSDAE
from dc_ssdae.data.images import read_image, to_model_range, to_uint8


@pytest.fixture
def words(model_dir: Path, tmp_path: Path) -> Words:
    return ("--model", model_dir, "--out", tmp_path / "out", "--overwrite", "--device", "cpu")


@pytest.fixture
def reconstruct(run: Run, words: Words) -> Run:
    """Reconstruct files with the small model into `tmp_path / "out"`."""
    return lambda *more: run("reconstruct", *more, *words)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Tensor]:
    """Read a file of `tmp_path / "out"`."""
    return lambda name: read_image(tmp_path / "out" / name).pixels


@pytest.fixture
def expected(model_dir: Path) -> Callable[..., Tensor]:
    """What the model makes of a photo in Python."""

    @torch.inference_mode()
    def decode(photo: Path, tile_size: int | None = None, **settings: Any) -> Tensor:
        model = DCSSDAE.from_pretrained(model_dir)
        if tile_size:
            model.enable_tiling(tile_size)
        z = model.encode(to_model_range(read_image(photo).pixels)[None]).latent_dist.mode()
        return to_uint8(model.decode(z, **settings).sample[0])

    return decode


def test_any_size(reconstruct: Run, tmp_path: Path) -> None:
    sizes = [(1, 1), (7, 130), (37, 23)]
    photos = [save_photo(tmp_path / f"{index}.png", *size) for index, size in enumerate(sizes)]
    outcome = reconstruct(*photos)
    assert (outcome.code, outcome.err) == (0, [])
    for photo, (height, width), line in zip(photos, sizes, outcome.out, strict=True):
        out, latent = tmp_path / "out" / photo.name, f"4x{-(-height // 8)}x{-(-width // 8)}"
        assert line == f"{photo.name}: height {height}, width {width}, latent {latent} -> {out}"
        with Image.open(out) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (width, height))


def test_pixels_are_those_of_the_model_in_python(
    reconstruct: Run, expected: Callable[..., Tensor], written: Callable[[str], Tensor], tmp_path: Path
) -> None:
    photo = save_photo(tmp_path / "photo.png", 16, 24)
    twin = shutil.copy(photo, tmp_path / "twin.png")
    default = expected(photo)
    for seed in ((), ("--seed", 0)):
        assert reconstruct(photo, twin, *seed).code == 0
        assert torch.equal(written("photo.png"), default)
        assert torch.equal(written("twin.png"), default), "each image starts from the seed's noise"
    assert reconstruct(photo, "--seed", 5, "--steps", 3).code == 0
    seeded = expected(photo, generator=torch.Generator().manual_seed(5), num_steps=3)
    assert torch.equal(written("photo.png"), seeded)
    assert not torch.equal(seeded, default)
    assert reconstruct(photo, "--dtype", "bfloat16").code == 0
    difference = (written("photo.png").float() - default.float()).abs()
    assert 0.0 < difference.mean() < 2.0


def test_what_was_converted_is_noted(reconstruct: Run, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(random_pixels(20, 33)).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(random_pixels(19, 21, channels=4)).save(tmp_path / "alpha.png")
    outcome = reconstruct(tmp_path / "turned.jpg", tmp_path / "alpha.png")
    assert outcome.code == 0
    assert outcome.err == [f"dc-ssdae reconstruct: {tmp_path}/alpha.png: alpha composited over white"]
    with Image.open(tmp_path / "out" / "turned.png") as upright:
        assert upright.size == (20, 33)


def test_one_bad_file_among_three(reconstruct: Run, photo: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff no photo")
    outcome = reconstruct(photo, bad, shutil.copy(photo, tmp_path / "last.png"))
    assert (outcome.code, len(outcome.out), len(outcome.err)) == (2, 2, 1)
    assert outcome.err[0].startswith(f"dc-ssdae reconstruct: cannot read image '{bad}': ")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["last.png", "photo.png"]
    debugged = reconstruct(bad, "--debug")
    assert debugged.err[0] == "Traceback (most recent call last):"
    assert debugged.err[-1] == outcome.err[0]


def test_inputs_and_outputs_that_collide(refusal: Refusal, photo: Path, tmp_path: Path) -> None:
    before = photo.read_bytes()
    refuse = partial(refusal, "reconstruct", "--model", "missing", "--overwrite", "--out")
    line = refuse(tmp_path / "out", photo, tmp_path / "b" / "photo.jpg")
    assert all(str(path) in line for path in (photo, tmp_path / "b" / "photo.jpg", tmp_path / "out" / "photo.png"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "alias.jpg").symlink_to(photo)
    # Its own file; that under another name of the folder; another input's, which goes by another name.
    for inputs, out in (
        ([photo], tmp_path),
        ([photo], tmp_path / "folder"),
        ([tmp_path / "alias.jpg", tmp_path / "b" / "photo.webp"], tmp_path),
    ):
        assert f"{out / 'photo.png'} is one of the inputs" in refuse(out, *inputs)
    assert photo.read_bytes() == before
    assert f"--out {photo} is a file" in refuse(photo, tmp_path / "other.png")


def test_a_result_that_is_not_finite_is_one_line(refusal: Refusal, photo: Path, tmp_path: Path) -> None:
    model = DCSSDAE.from_preset("demo")
    torch.nn.init.constant_(model.decoder.conv_out.bias, float("nan"))
    model.save_pretrained(tmp_path / "model")
    line = refusal("reconstruct", photo, "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert line.startswith(f"{photo}: {3 * 24 * 37} of {3 * 24 * 37} values ")


def test_samplers_stop_and_say_what_they_took(
    reconstruct: Run, expected: Callable[..., Tensor], written: Callable[[str], Tensor], tmp_path: Path
) -> None:
    photo = save_photo(tmp_path / "photo.png", 8, 16)
    settings = {"sampler": "nesterov", "num_steps": 3, "step_size": [0.1, 0.1, 0.2], "momentum": 0.2}
    given = ("--sampler", "nesterov", "--num_steps", 3, "--step_size", "0.1,0.1,0.2", "--momentum", 0.2)
    outcome = reconstruct(photo, *given, "--tolerance", 0.01)
    assert ", 3 evaluations, field RMS " in outcome.out[0]
    assert torch.equal(written("photo.png"), expected(photo, tolerance=0.01, **settings))
    outcome = reconstruct(photo, "--sampler", "gradient_descent", "--steps", 9, "--tolerance", 1e6)
    assert "evaluations" not in outcome.out[0], "one evaluation needs no remark"


def test_a_trajectory_is_written_beside_the_image(
    reconstruct: Run, written: Callable[[str], Tensor], tmp_path: Path
) -> None:
    photo = save_photo(tmp_path / "photo.png", 13, 20)
    assert reconstruct(photo, "--steps", 3, "--return_trajectory").code == 0
    states = written("photo-trajectory.png")
    assert tuple(states.shape) == (3, 13, 4 * 20)
    assert torch.equal(states[:, :, 60:], written("photo.png"))
    assert not torch.equal(states[:, :, :20], states[:, :, 60:])
    other = save_photo(tmp_path / "photo-trajectory.jpg", 8, 8)
    assert reconstruct(photo, other, "--steps", 2).code == 0
    assert "photo-trajectory.png" in reconstruct(photo, other, "--return_trajectory").err[0]


def test_a_draft_is_where_the_decode_starts(
    reconstruct: Run, expected: Callable[..., Tensor], written: Callable[[str], Tensor], tmp_path: Path
) -> None:
    photo = save_photo(tmp_path / "photo.png", 16, 24)
    draft = save_photo(tmp_path / "drafts" / "photo.png", 16, 24, seed=4)
    decoded = expected(photo, draft=to_model_range(read_image(draft).pixels)[None], start=0.7)
    for path in (draft, draft.parent):
        assert reconstruct(photo, "--draft", path, "--start", 0.7).code == 0
        assert torch.equal(written("photo.png"), decoded)
    save_photo(draft, 8, 24)
    assert "height 8, width 24" in reconstruct(photo, "--draft", draft, "--start", 0.7).err[0]
    draft.unlink()
    assert str(draft) in reconstruct(photo, "--draft", draft.parent, "--start", 0.7).err[0]


def test_an_image_that_diverges_is_told(reconstruct: Run, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DCSSDAE, "_predict", lambda model, x, *_, **settings: -2.0 * x)  # a field of 3 x
    outcome: Outcome = reconstruct(photo, "--steps", 8, "--step_size", 2)
    assert outcome.code == 0
    (line,) = outcome.err
    assert line.startswith(f"dc-ssdae reconstruct: {photo}: diverged; ")


def test_tiles_are_those_of_the_model_in_python(
    reconstruct: Run,
    run: Run,
    words: Words,
    expected: Callable[..., Tensor],
    written: Callable[[str], Tensor],
    tmp_path: Path,
) -> None:
    photo = save_photo(tmp_path / "photo.png", 24, 40)
    tiled = expected(photo, 16)
    assert not torch.equal(tiled, expected(photo))
    assert reconstruct(photo, "--tile_size", 16).code == 0
    assert torch.equal(written("photo.png"), tiled)
    assert run("encode", photo, *words, "--tile_size", 16).code == 0
    assert run("decode", tmp_path / "out" / "photo.safetensors", *words, "--tile_size", 16).code == 0
    assert torch.equal(written("photo.png"), tiled)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("--sampler nestorov", "did you mean 'nesterov'"),
        ("--sampler euler", "'euler'"),
        ("--sampler one_step --steps 2", "'num_steps'"),
        ("--tolerance -1", "--tolerance is -1.0"),
        ("--sampler gradient_descent --momentum 0.1", "'momentum'"),
        ("--start 0.5", "--draft"),
        ("--tile_size 36", "tile_size is 36"),
        ("--model nobody/nothing", "nobody/nothing"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    more: str, named: str, refusal: Refusal, words: Words, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert named in refusal("reconstruct", photo, *words, *more.split())
