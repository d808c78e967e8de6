"""`dc-ssdae reconstruct`: its images are the model's, whatever the files and the options; what does not fit is told."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_samples import Refusal, Run, Words, random_pixels, save_photo
from PIL import Image
from torch import Tensor

from dc_ssdae import DCSSDAE
from dc_ssdae.data.images import read_image, to_model_range, to_uint8


@pytest.fixture
def words(model_dir: Path) -> Words:
    return ("--model", model_dir, "--out", "out", "--overwrite", "--device", "cpu")


@pytest.fixture
def reconstruct(run: Run, words: Words) -> Run:
    """Reconstruct files with the small model into out/."""
    return lambda *more: run("reconstruct", *more, *words)


def written(name: str) -> Tensor:
    return read_image(Path("out", name)).pixels


@pytest.fixture
def expected(model_dir: Path) -> Callable[..., Tensor]:
    """What the model makes of a photo in Python."""

    @torch.inference_mode()
    def decode(photo: Path, tile_size: int | None = None, seed: int = 0, **settings: Any) -> Tensor:
        model = DCSSDAE.from_pretrained(model_dir)
        if tile_size:
            model.enable_tiling(tile_size)
        z = model.encode(to_model_range(read_image(photo).pixels)[None]).latent_dist.mode()
        return to_uint8(model.decode(z, generator=torch.Generator().manual_seed(seed), **settings).sample[0])

    return decode


def test_any_size(reconstruct: Run) -> None:
    sizes = [(1, 1), (7, 130), (37, 23)]
    photos = [save_photo(Path(f"{index}.png"), *size) for index, size in enumerate(sizes)]
    outcome = reconstruct(*photos)
    assert (outcome.code, outcome.err) == (0, [])
    for photo, (height, width), line in zip(photos, sizes, outcome.out, strict=True):
        latent = f"4x{-(-height // 8)}x{-(-width // 8)}"
        assert line == f"{photo}: height {height}, width {width}, latent {latent} -> out/{photo}"
        with Image.open(Path("out", photo)) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (width, height))


@pytest.mark.parametrize(
    ("more", "settings"),
    [
        ("", {}),
        ("--seed 5 --steps 3", {"seed": 5, "num_steps": 3}),
        ("--tile_size 16", {"tile_size": 16}),
        (
            "--sampler nesterov --num_steps 3 --step_size 0.1,0.1,0.2 --momentum 0.2 --tolerance 0.01",
            {"sampler": "nesterov", "num_steps": 3, "step_size": [0.1, 0.1, 0.2], "momentum": 0.2, "tolerance": 0.01},
        ),
    ],
)
def test_pixels_are_those_of_the_model_in_python(
    reconstruct: Run, expected: Callable[..., Tensor], more: str, settings: dict[str, Any]
) -> None:
    photo = save_photo(Path("photo.png"), 24, 40)
    shutil.copy(photo, "twin.png")
    assert reconstruct(photo, "twin.png", *more.split()).code == 0
    for name in ("photo.png", "twin.png"):  # each image starts from the seed's noise
        assert torch.equal(written(name), expected(photo, **settings))
    assert torch.equal(written("photo.png"), expected(photo)) is not bool(settings)


def test_what_was_converted_is_noted(reconstruct: Run) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(random_pixels(20, 33)).save("turned.jpg", exif=exif)
    Image.fromarray(random_pixels(19, 21, channels=4)).save("alpha.png")
    outcome = reconstruct("turned.jpg", "alpha.png")
    assert (outcome.code, outcome.err) == (0, ["dc-ssdae reconstruct: alpha.png: alpha composited over white"])
    assert written("turned.png").shape == (3, 33, 20)


def test_inputs_and_outputs_that_collide(refusal: Refusal, photo: Path, tmp_path: Path) -> None:
    before = photo.read_bytes()
    refuse = partial(refusal, "reconstruct", "--model", "missing", "--overwrite", "--out")
    line = refuse("out", photo, "b/photo.jpg")
    assert all(path in line for path in (str(photo), "b/photo.jpg", "out/photo.png"))
    assert not Path("out").exists()
    Path("folder").symlink_to(tmp_path)
    Path("alias.jpg").symlink_to(photo)
    # Its own file; the file under another name of the folder; another input's, which goes by another name.
    for inputs, out in (([photo], tmp_path), ([photo], "folder"), (["alias.jpg", "b/photo.webp"], tmp_path)):
        assert f"{out}/photo.png is one of the inputs" in refuse(out, *inputs)
    assert photo.read_bytes() == before
    assert f"--out {photo} is a file" in refuse(photo, "other.png")


def test_a_result_that_is_not_finite_is_one_line(refusal: Refusal, photo: Path) -> None:
    model = DCSSDAE.from_preset("demo")
    torch.nn.init.constant_(model.decoder.conv_out.bias, float("nan"))
    model.save_pretrained("model")
    line = refusal("reconstruct", photo, "--model", "model", "--out", "out")
    assert line.startswith(f"{photo}: {3 * 24 * 37} of {3 * 24 * 37} values ")


def test_a_trajectory_is_written_beside_the_image(reconstruct: Run) -> None:
    photo = save_photo(Path("photo.png"), 13, 20)
    assert ", 3 evaluations, field RMS " in reconstruct(photo, "--steps", 3, "--return_trajectory").out[0]
    states = written("photo-trajectory.png")
    assert tuple(states.shape) == (3, 13, 4 * 20)
    assert torch.equal(states[:, :, 60:], written("photo.png"))
    assert not torch.equal(states[:, :, :20], states[:, :, 60:])
    assert "photo-trajectory.png" in reconstruct(photo, "photo-trajectory.jpg", "--return_trajectory").err[0]
    assert "evaluations" not in reconstruct(photo, "--steps", 9, "--tolerance", 1e6).out[0], "it stopped at once"


def test_a_draft_is_where_the_decode_starts(reconstruct: Run, expected: Callable[..., Tensor]) -> None:
    photo = save_photo(Path("photo.png"), 16, 24)
    draft = save_photo(Path("drafts/photo.png"), 16, 24, seed=4)
    decoded = expected(photo, draft=to_model_range(read_image(draft).pixels)[None], start=0.7)
    for path in (draft, draft.parent):
        assert reconstruct(photo, "--draft", path, "--start", 0.7).code == 0
        assert torch.equal(written("photo.png"), decoded)
    save_photo(draft, 8, 24)
    assert "(8, 24)" in reconstruct(photo, "--draft", draft, "--start", 0.7).err[0]
    draft.unlink()
    assert str(draft) in reconstruct(photo, "--draft", draft.parent, "--start", 0.7).err[0]


def test_an_image_that_diverges_is_told(reconstruct: Run, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DCSSDAE, "_predict", lambda model, x, *_, **settings: -2.0 * x)  # a field of 3 x
    outcome = reconstruct(photo, "--steps", 8, "--step_size", 2)
    assert outcome.code == 0
    (line,) = outcome.err
    assert line.startswith(f"dc-ssdae reconstruct: {photo}: diverged; ")
