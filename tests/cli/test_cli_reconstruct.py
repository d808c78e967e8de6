"""`dc-ssdae reconstruct` on image files of all kinds, and on what users get wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_samples import random_pixels
from PIL import Image

from dc_ssdae import DCSSDAE
from dc_ssdae.data.images import read_image, to_model_range, to_uint8


@pytest.fixture
def reconstruct(run: Callable, model_dir: Path, tmp_path: Path) -> Callable:
    """Reconstruct files with the small model into `tmp_path / "out"`."""

    def call(*words: object) -> object:
        return run(
            "reconstruct", *words, "--model", model_dir, "--out", tmp_path / "out", "--overwrite", "--device", "cpu"
        )

    return call


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 300), (8, 8)])
def test_any_size(height: int, width: int, reconstruct: Callable, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png", random_pixels(height, width))
    outcome = reconstruct(photo)
    h, w = -(-height // 8), -(-width // 8)
    line = f"photo.png: height {height}, width {width}, latent 4x{h}x{w} -> {tmp_path}/out/photo.png"
    assert outcome == (0, [line], [])
    with Image.open(tmp_path / "out" / "photo.png") as written:
        assert (written.format, written.mode, written.size) == ("PNG", "RGB", (width, height))


def test_pixels_are_those_of_the_model_in_python(reconstruct: Callable, model_dir: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png", random_pixels(24, 40))
    model = DCSSDAE.from_pretrained(model_dir)
    x = to_model_range(read_image(photo).pixels)[None]
    with torch.inference_mode():
        latent = model.encode(x).latent_dist.mode()
        default = to_uint8(model.decode(latent).sample[0])
        seeded = to_uint8(model.decode(latent, generator=torch.Generator().manual_seed(5), num_steps=3).sample[0])
    assert not torch.equal(default, seeded)

    assert reconstruct(photo).code == 0
    assert torch.equal(read_image(tmp_path / "out" / "photo.png").pixels, default)
    assert reconstruct(photo, "--seed", 0).code == 0
    assert torch.equal(read_image(tmp_path / "out" / "photo.png").pixels, default)
    assert reconstruct(photo, "--seed", 5, "--steps", 3).code == 0
    assert torch.equal(read_image(tmp_path / "out" / "photo.png").pixels, seeded)


def test_photo_with_exif_orientation_comes_out_upright(reconstruct: Callable, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its left side
    turned = save(tmp_path / "turned.jpg", random_pixels(20, 33), exif=exif)
    with Image.open(turned) as image:
        upright = save(tmp_path / "upright.png", np.ascontiguousarray(np.rot90(np.array(image), -1)))
    assert reconstruct(turned, upright).code == 0
    assert (tmp_path / "out" / "turned.png").read_bytes() == (tmp_path / "out" / "upright.png").read_bytes()


def test_what_was_converted_is_noted(reconstruct: Callable, tmp_path: Path) -> None:
    photo = save(tmp_path / "alpha.png", random_pixels(19, 21, channels=4))
    outcome = reconstruct(photo)
    assert outcome.code == 0
    assert outcome.err == [f"dc-ssdae reconstruct: {photo}: alpha composited over white"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_float32(dtype: str, reconstruct: Callable, photo: Path, tmp_path: Path) -> None:
    assert reconstruct(photo).code == 0
    full = read_image(tmp_path / "out" / "photo.png").pixels.float()
    assert reconstruct(photo, "--dtype", dtype).code == 0
    half = read_image(tmp_path / "out" / "photo.png").pixels.float()
    assert not torch.equal(full, half)
    assert (full - half).abs().mean() < 2


def test_one_bad_file_among_three(reconstruct: Callable, photo: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff no photo")
    last = shutil.copy(photo, tmp_path / "last.png")
    outcome = reconstruct(photo, bad, last)
    assert outcome.code == 2
    assert len(outcome.out) == 2
    assert len(outcome.err) == 1
    assert outcome.err[0].startswith(f"dc-ssdae reconstruct: cannot read image '{bad}': ")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["last.png", "photo.png"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "it is a directory"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: Image.new("F", (8, 8)).save(path, "TIFF"), "32-bit float pixels"),
    ],
)
def test_what_is_no_image_is_one_line(
    make: Callable[[Path], object], reason: str, reconstruct: Callable, tmp_path: Path
) -> None:
    make(tmp_path / "x.png")
    outcome = reconstruct(tmp_path / "x.png")
    assert outcome.code == 2
    assert not outcome.out
    assert len(outcome.err) == 1
    assert outcome.err[0].startswith(f"dc-ssdae reconstruct: cannot read image '{tmp_path / 'x.png'}': {reason}")
    assert not list((tmp_path / "out").iterdir())


def test_debug_shows_the_traceback_of_a_bad_file(reconstruct: Callable, tmp_path: Path) -> None:
    outcome = reconstruct(tmp_path / "x.png", "--debug")
    assert outcome.code == 2
    assert outcome.err[0] == "Traceback (most recent call last):"
    assert outcome.err[-1].startswith("dc-ssdae reconstruct: cannot read image ")


def test_colliding_stems_are_refused_before_anything_else(run: Callable, tmp_path: Path) -> None:
    one, two = tmp_path / "a" / "photo.png", tmp_path / "b" / "photo.jpg"
    outcome = run("reconstruct", one, two, "--model", "missing", "--out", tmp_path / "out")
    target = tmp_path / "out" / f"{two.stem}.png"
    line = f"dc-ssdae reconstruct: {one} and {two} would both be written to {target}; rename one of them"
    assert outcome == (2, [], [line])
    assert not (tmp_path / "out").exists()


def test_an_input_is_never_overwritten(run: Callable, model_dir: Path, photo: Path, tmp_path: Path) -> None:
    before = photo.read_bytes()
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "alias.jpg").symlink_to(photo)
    namesake = tmp_path / "elsewhere" / "photo.webp"
    namesake.parent.mkdir()
    Image.open(photo).save(namesake)
    # Its own file; that under another name of the folder; another input's, which goes by another name.
    for inputs, out in (
        ([photo], tmp_path),
        ([photo], tmp_path / "folder"),
        ([tmp_path / "alias.jpg", namesake], tmp_path),
    ):
        outcome = run("reconstruct", *inputs, "--model", model_dir, "--out", out, "--overwrite")
        message = f"{out / 'photo.png'} is one of the inputs and would be overwritten; choose another --out"
        assert outcome == (2, [], [f"dc-ssdae reconstruct: {message}"])
    assert photo.read_bytes() == before


def test_out_that_is_a_file_is_refused(run: Callable, model_dir: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    outcome = run("reconstruct", photo, "--model", model_dir, "--out", tmp_path / "file")
    assert outcome == (2, [], [f"dc-ssdae reconstruct: --out {tmp_path / 'file'} is a file, not a folder"])
    assert (tmp_path / "file").read_text() == "mine"


def test_model_that_is_not_to_be_had_is_one_line(
    run: Callable, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outcome = run("reconstruct", photo, "--model", "nobody/nothing", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert outcome.err[-1].startswith(
        "dc-ssdae reconstruct: nobody/nothing: no such folder, and not to be had from the hub: "
    )
    assert "Traceback" not in "".join(outcome.err)


def test_result_that_is_not_finite_is_one_line(run: Callable, photo: Path, tmp_path: Path) -> None:
    model = DCSSDAE.from_preset("demo")
    with torch.no_grad():
        model.decoder.conv_out.bias.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    outcome = run("reconstruct", photo, "--model", tmp_path / "model", "--out", tmp_path / "out")
    count = 3 * 24 * 37
    line = f"dc-ssdae reconstruct: {photo}: {count} of {count} values of the image are infinite or NaN"
    assert outcome == (2, [], [line])


def test_samplers_stop_and_say_what_they_took(reconstruct: Callable, model_dir: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png", random_pixels(16, 24))
    settings = {"sampler": "nesterov", "num_steps": 5, "step_size": [0.1] * 5, "momentum": 0.2, "tolerance": 0.01}
    model = DCSSDAE.from_pretrained(model_dir)
    with torch.inference_mode():
        z = model.encode(to_model_range(read_image(photo).pixels)[None]).latent_dist.mode()
        expected = model.decode(z, **settings)
    words = ("--sampler", "nesterov", "--num_steps", 5, "--step_size", "0.1,0.1,0.1,0.1,0.1", "--momentum", 0.2)
    outcome = reconstruct(photo, *words, "--tolerance", 0.01)
    assert outcome.code == 0
    assert outcome.out[0].endswith(f", 5 evaluations, field RMS {float(expected.residual_rms[0]):.4g}")
    assert torch.equal(read_image(tmp_path / "out" / "photo.png").pixels, to_uint8(expected.sample[0]))

    outcome = reconstruct(photo, "--sampler", "gradient_descent", "--num_steps", 9, "--tolerance", 1e6)
    assert ", 1 evaluations" not in outcome.out[0], "one evaluation needs no remark"


def test_a_trajectory_is_written_beside_the_image(reconstruct: Callable, model_dir: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png", random_pixels(13, 20))
    assert reconstruct(photo, "--steps", 3, "--return_trajectory").code == 0
    image = read_image(tmp_path / "out" / "photo.png").pixels
    states = read_image(tmp_path / "out" / "photo-trajectory.png").pixels
    assert tuple(states.shape) == (3, 13, 4 * 20)
    assert torch.equal(states[:, :, 60:], image)
    assert not torch.equal(states[:, :, :20], image)

    other = save(tmp_path / "photo-trajectory.jpg", random_pixels(8, 8))
    outcome = reconstruct(photo, other, "--steps", 3, "--return_trajectory")
    assert outcome.code == 2
    assert "would both be written to" in outcome.err[0]
    assert reconstruct(photo, other, "--steps", 3).code == 0


def test_a_draft_is_where_the_decode_starts(reconstruct: Callable, model_dir: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png", random_pixels(16, 24))
    drafts = tmp_path / "drafts"
    drafts.mkdir()
    pixels = random_pixels(16, 24, seed=4)
    draft = save(drafts / "photo.png", pixels)
    model = DCSSDAE.from_pretrained(model_dir)
    with torch.inference_mode():
        z = model.encode(to_model_range(read_image(photo).pixels)[None]).latent_dist.mode()
        expected = to_uint8(model.decode(z, draft=to_model_range(read_image(draft).pixels)[None], start=0.7).sample[0])
    for path in (draft, drafts):
        assert reconstruct(photo, "--draft", path, "--start", 0.7).code == 0
        assert torch.equal(read_image(tmp_path / "out" / "photo.png").pixels, expected)

    save(drafts / "photo.png", pixels[:8])
    outcome = reconstruct(photo, "--draft", drafts, "--start", 0.7)
    assert outcome.code == 2
    assert "height 8, width 24" in outcome.err[0]
    (drafts / "photo.png").unlink()
    outcome = reconstruct(photo, "--draft", drafts, "--start", 0.7)
    assert outcome.code == 2
    assert "drafts/photo.png" in outcome.err[0]


def test_an_image_that_diverges_is_told(reconstruct: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = save(tmp_path / "photo.png", random_pixels(8, 8))
    monkeypatch.setattr(DCSSDAE, "_predict", lambda model, x, *_, **settings: -2.0 * x)  # a field of 3 x
    outcome = reconstruct(photo, "--steps", 8, "--step_size", 2)
    assert outcome.code == 0
    assert outcome.err == [
        f"dc-ssdae reconstruct: {photo}: diverged; this is the best state it had: try a smaller --step_size"
    ]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--sampler", "nestorov"], "did you mean 'nesterov'"),
        (["--sampler", "euler"], "unknown sampler of EquilibriumMatching 'euler'"),
        (["--sampler", "one_step", "--steps", "2"], "reconstruct: --steps is 2; sampler 'one_step' has one"),
        (["--step_size", "x"], "argument --step_size: 'x' is not a number"),
        (["--step_size", "0.1,0.2", "--steps", "3"], "reconstruct: --step_size lists 2 numbers for --steps 3"),
        (["--tolerance", "-1"], "--tolerance is -1.0"),
        (["--tolerance", "nan"], "--tolerance is nan"),
        (["--momentum", "1"], "--momentum is 1.0"),
        (["--sampler", "gradient_descent", "--momentum", "0.1"], "--momentum is for sampler"),
        (["--start", "0.5"], "--draft and --start go together"),
        (["--draft", "x.png"], "--draft and --start go together"),
        (["--draft", "x.png", "--start", "1.5"], "--start is 1.5"),
    ],
)
def test_decoding_options_that_do_not_fit_are_one_line(
    words: list[str], named: str, reconstruct: Callable, tmp_path: Path
) -> None:
    outcome = reconstruct(save(tmp_path / "photo.png", random_pixels(8, 8)), *words)
    assert outcome.code == 2
    assert outcome.out == []
    assert len(outcome.err) == 1
    assert named in outcome.err[0]


def test_tiles_are_those_of_the_model_in_python(
    reconstruct: Callable, run: Callable, model_dir: Path, tmp_path: Path
) -> None:
    photo = save(tmp_path / "photo.png", random_pixels(40, 64))
    model = DCSSDAE.from_pretrained(model_dir)
    model.enable_tiling(32)
    with torch.inference_mode():
        latent = model.encode(to_model_range(read_image(photo).pixels)[None]).latent_dist.mode()
        expected = to_uint8(model.decode(latent).sample[0])
    assert reconstruct(photo).code == 0
    assert not torch.equal(read_image(tmp_path / "out" / "photo.png").pixels, expected)
    assert reconstruct(photo, "--tile_size", 32).code == 0
    assert torch.equal(read_image(tmp_path / "out" / "photo.png").pixels, expected)
    shared = ("--model", model_dir, "--out", tmp_path / "apart", "--device", "cpu", "--tile_size", 32)
    assert run("encode", photo, *shared).code == 0
    assert run("decode", tmp_path / "apart" / "photo.safetensors", *shared).code == 0
    assert torch.equal(read_image(tmp_path / "apart" / "photo.png").pixels, expected)


def test_a_tile_size_that_does_not_fit_the_model(reconstruct: Callable, photo: Path) -> None:
    line = "dc-ssdae reconstruct: tile_size is 36; it must be a multiple of f = 8, at least 16"
    assert reconstruct(photo, "--tile_size", 36) == (2, [], [line])
