"""What the page computes, against `DCSSDAE.decode` and what follows from its states; and what it refuses."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import image, refusal, tiny
from torch import Tensor

from dc_ssdae import DCSSDAE
from dc_ssdae.app.compute import Models, Settings, channels, read_photo
from dc_ssdae.data.images import to_model_range, to_uint8, write_png
from dc_ssdae.evaluation.candidates import parse_candidates

SIZE = 32
HERE = __name__


def broken(x: Tensor) -> Tensor:
    raise KeyError("a user's own bug")


def cropping(x: Tensor) -> Tensor:
    return x[..., 1:]


@pytest.fixture(scope="module")
def models(saved_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Of equilibrium matching ("eqm"), flow matching ("fm"), and others."""
    torch.manual_seed(1)
    flowing = tmp_path_factory.mktemp("flowing")
    tiny(dynamics={"class_path": "FlowMatching"}).save_pretrained(flowing)
    others = (f"python:{HERE}.broken", f"python:{HERE}.cropping", "jpeg:50", "bicubic:2", "lost=no-folder/x/y")
    return Models(parse_candidates([f"eqm={saved_folder}", f"fm={flowing}", *others]))


@pytest.fixture
def photo() -> Tensor:
    return to_uint8(image(1, SIZE, SIZE)[0])


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize(
    ("label", "settings", "decoding"),
    [
        ("eqm", {}, {}),
        ("eqm", {"steps": 9, "tolerance": 0.1}, {}),  # which one step has not
        ("eqm", {"sampler": "gradient_descent", "steps": 3}, {"num_steps": 3}),
        ("eqm", {"sampler": "nesterov", "steps": 3}, {"sampler": "nesterov", "num_steps": 3}),
        ("eqm", {"sampler": "gradient_descent", "steps": 5, "tolerance": 1e9}, {"num_steps": 5, "tolerance": 1e9}),
        ("fm", {"sampler": "euler", "steps": 3, "tolerance": 0.1}, {"num_steps": 3}),
        ("fm", {"sampler": "midpoint", "steps": 2}, {"sampler": "midpoint", "num_steps": 2}),
    ],
)
@torch.no_grad()
def test_a_reconstruction_is_what_the_model_decodes(
    models: Models, photo: Tensor, label: str, settings: dict, decoding: dict
) -> None:
    found = models.reconstruct(label, photo, Settings(size=SIZE, seed=5, **settings), traced=True)
    model = DCSSDAE.from_pretrained(models.specs[label].value)
    z = model.encode(to_model_range(photo)[None]).latent_dist.mode()
    drawn = {"generator": torch.Generator().manual_seed(5), "return_trajectory": True}
    expected = model.decode(z, **drawn, **decoding)
    assert torch.equal(found.image, to_uint8(expected.sample[0]))
    assert found.latent is not None
    assert torch.equal(found.latent, z[0])
    assert found.evaluations == int(expected.num_evaluations[0])
    steps = 1 if "tolerance" in decoding else decoding.get("num_steps", 1)
    assert len(found.states) == steps + 1
    for state, x in zip(found.states, expected.trajectory, strict=False):
        assert torch.equal(state.pixels, to_uint8(x[0]))
        error = (state.pixels.double() - photo.double()).square().mean()
        assert state.psnr == pytest.approx(10 * math.log10(255**2 / float(error)))
    assert found.psnr == found.states[-1].psnr
    assert found.facts()[0] == f"PSNR {found.psnr:.2f} dB"


@torch.no_grad()
def test_residuals_are_what_the_steps_follow(models: Models, photo: Tensor) -> None:
    """x ← x − η f(x), and x ← x + (t_i − t_{i+1}) v(x, t_i): the steps tell of the field."""
    times = [(1 - step / 3) ** 4 for step in range(4)]
    model = models.open("eqm").value
    cases = {
        ("eqm", "gradient_descent"): model.dynamics.step_sizes(3),
        ("fm", "euler"): [now - after for now, after in pairwise(times)],
    }
    for (label, sampler), sizes in cases.items():
        found = models.reconstruct(label, photo, Settings(SIZE, sampler, 3), traced=True)
        x = to_model_range(photo)[None]
        opened = models.open(label).value
        z = opened.encode(x).latent_dist.mode()
        states = opened.decode(z, sampler=sampler, num_steps=3, return_trajectory=True).trajectory  # its noise: seed 0
        moved = [rms(after - before) / size for before, after, size in zip(states, states[1:], sizes, strict=False)]
        assert [state.residual for state in found.states[:-1]] == pytest.approx(moved, rel=1e-3)
        assert math.isnan(found.states[-1].residual) is (label == "fm")


def test_a_seed_gives_the_same_image_again(models: Models, photo: Tensor) -> None:
    one, again, other = (models.reconstruct("eqm", photo, Settings(SIZE, seed=seed)).image for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_others_have_no_states(models: Models, photo: Tensor) -> None:
    resized, coded = (models.reconstruct(label, photo, Settings(), traced=True) for label in ("bicubic:2", "jpeg:50"))
    assert (resized.states, coded.states, coded.latent) == ([], [], None)
    assert resized.latent is not None
    assert resized.latent.shape == (3, 16, 16)
    assert coded.bits is not None
    assert f"{coded.bits / SIZE**2:.2f} bits per pixel" in coded.facts()


def test_channels_are_shown_from_black_to_white(models: Models) -> None:
    latent = torch.randn(70, 4, 6)
    latent[1] = 2.5
    shown = channels(latent)
    assert len(shown) == 64
    for channel, values in zip(shown, latent.numpy(), strict=False):
        assert (channel.mean, channel.std) == pytest.approx((np.mean(values), np.std(values)), abs=1e-6)
    assert int(shown[0].pixels.flatten(1).argmax(dim=1)[0]) == int(latent[0].argmax())
    assert shown[0].pixels.aminmax() == (0, 255)
    assert shown[1].pixels.max() == 0
    assert channels(torch.randn(20, 8)) == []  # tokens


def test_photos_are_resized_and_cropped(tmp_path: Path) -> None:
    write_png(torch.full((3, 40, 90), 77, dtype=torch.uint8), tmp_path / "grey.png")
    assert torch.equal(read_photo(tmp_path / "grey.png", 24), torch.full((3, 24, 24), 77, dtype=torch.uint8))


def test_what_cannot_be_done_is_said_in_a_line(models: Models, photo: Tensor, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no photo")
    assert "drop one" in refusal(read_photo, None, SIZE)
    assert refusal(read_photo, tmp_path / "notes.png", SIZE).startswith("cannot read image 'notes.png'")
    for name, value in {"size": 0, "steps": 65, "tolerance": -1.0, "seed": None}.items():
        assert name in refusal(Settings, **{name: value})

    def refused(label: str, pixels: Tensor = photo, **settings: object) -> str:
        return refusal(models.reconstruct, label, pixels, Settings(**settings))

    assert refused("eqm", photo[:, :20, :20]).startswith("eqm: ")
    assert "multiples of f = 8" in refused("eqm", photo[:, :20, :20])
    assert "euler" in refused("eqm", sampler="euler")
    assert "a user's own bug" in refused("broken")
    assert "31" in refused("cropping")
    assert refused("lost").startswith("lost: ")
    assert "jpeg:50" in refused("no-such-model")
