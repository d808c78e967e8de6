"""What tests of the loop start with: none of the state that Accelerate keeps, no hook; and images to train on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from terms import Hooked
from tiny import forget_processes, make_images


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    Hooked.hook = None
    forget_processes()
    yield
    Hooked.hook = None
    forget_processes()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of nine training and three validation images."""
    root = tmp_path_factory.mktemp("images")
    make_images(root / "train", 9)
    make_images(root / "validation", 3, seed=1)
    return root


@pytest.fixture(scope="module")
def photos(images: Path) -> Path:
    """The training images alone: nothing is evaluated."""
    return images / "train"
