"""The colour photos that scikit-image carries in its wheel, split for the demo; nothing is downloaded."""

from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from dc_ssdae.data.images import read_image
from dc_ssdae.errors import InputError, check_names

# What each shows, and its size in pixels, height x width. The two splits share no subject; the motorcycles
# are a stereo pair, nearly the same picture, and must stay on the same side. The wheel's other colour images
# (colour wheel, chessboard, logo, horse silhouette) are drawings, and two photos (Hubble's deep field, a retina)
# are mostly black: with them, 90 seconds of training gave 1.2 dB less on the photos held out (one run each).
_FILES = {
    # 512x512: Eileen Collins in an orange space suit, before a flag and a shuttle model; 500x741: a red motorcycle in a
    # garage with shelves, twice; 512x512: stained tissue under a microscope, brown glands and blue nuclei on white
    "train": ("astronaut.png", "motorcycle_left.png", "motorcycle_right.png", "ihc.png"),
    # 300x451: a tabby cat's face; 400x600: an espresso in a red cup on a wooden table; 427x640: a rocket on its launch
    # pad between lattice towers at dusk
    "held_out": ("chelsea.png", "coffee.png", "rocket.jpg"),
}


class SamplePhoto(NamedTuple):
    """A photo: its `name` (the file's stem) and uint8 `pixels` (3, H, W)."""

    name: str
    pixels: Tensor


class SamplePhotos:
    """The photos as a data set, held in memory: each as it is, and twice with its colours exchanged, GBR and BRG.

    So few photos have few colours. (600 steps of the demo gave 22.6 dB so, in place of 22.0 dB without; one seed.)

    Args:
        split: as of `sample_photos`.

    Raises:
        InputError: as of `sample_photos`.
    """

    def __init__(self, split: Literal["train", "held_out"] = "train") -> None:
        self._photos = sample_photos(split)
        self.classes: list[str] = []

    def __len__(self) -> int:
        return 3 * len(self._photos)

    def name(self, index: int) -> str:
        """The photo's name."""
        return self._photos[index // 3].name

    def read(self, index: int) -> tuple[Tensor, int]:
        """The photo, uint8 (3, H, W), and -1: it has no label."""
        return self._photos[index // 3].pixels.roll(-(index % 3), 0), -1


def sample_photos(split: Literal["train", "held_out"]) -> list[SamplePhoto]:
    """Read the demo's photos from the installed scikit-image package.

    Args:
        split: "train" (astronaut, motorcycle_left, motorcycle_right, ihc) or "held_out" (chelsea, coffee,
            rocket).

    Returns:
        The photos, always in the same order, at their own sizes.

    Raises:
        InputError: there is no such split, or scikit-image or one of its photos is not installed.
    """
    check_names("split of the sample photos", [split], _FILES)
    try:
        folder = resources.files("skimage") / "data"
        return [SamplePhoto(Path(name).stem, read_image(Path(str(folder / name))).pixels) for name in _FILES[split]]
    except (ImportError, InputError) as error:
        raise InputError(f"scikit-image's photos cannot be read: pip install 'dc-ssdae[demo]' ({error})") from error
