"""Latent statistics over a data set: shares of processes, images that are broken, and batches."""

import pytest
import torch
from torch import Tensor

from dc_ssdae import InputError
from dc_ssdae.data.loader import ValidationImages
from dc_ssdae.evaluation.latent_statistics import LatentSurvey, latent_statistics
from dc_ssdae.latent import DiagonalGaussian, LatentMoments


class Source:
    """Eleven images of one value each; some are broken."""

    blocks = (11,)

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 11

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> tuple[Tensor, int]:
        if index in self.broken:
            raise InputError(f"cannot read {self.name(index)}")
        return torch.full((3, 8, 8), 10 * index, dtype=torch.uint8), -1


class Encoder:
    """Gives each image's value, and a variance of 1; remembers the sizes of its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, pixels: Tensor) -> DiagonalGaussian:
        assert pixels.dtype == torch.uint8
        self.batches.append(pixels.shape[0])
        mean = pixels[:, :2, ::8, ::8].float()
        return DiagonalGaussian(mean, torch.zeros_like(mean))


def survey(encode: Encoder, broken: tuple[int, ...] = (), **given: int) -> LatentSurvey:
    images = ValidationImages(Source(broken), 8, given.pop("limit", 100))
    return latent_statistics(encode, images, 2, **{"batch_size": 3, "workers": 0, **given})


@pytest.mark.parametrize("batch_size", [1, 4, 20])
@pytest.mark.parametrize("broken", [(), (0, 10), (4,)])
def test_every_image_that_can_be_read_counts_once(broken: tuple[int, ...], batch_size: int) -> None:
    found = survey(Encoder(), broken, batch_size=batch_size)
    values = torch.tensor([10.0 * index for index in range(11) if index not in broken], dtype=torch.float64)
    statistics = found.moments.statistics()
    assert statistics.count == len(values)
    assert statistics.mean == pytest.approx([values.mean().item()] * 2, rel=1e-12)
    assert statistics.std == pytest.approx([(values.var(correction=0).item() + 1.0) ** 0.5] * 2, rel=1e-12)
    assert [image.name for image in found.broken] == [f"image {index}" for index in broken]


@pytest.mark.parametrize("broken", [(), (0, 10), (10,), tuple(range(1, 11))])
@pytest.mark.parametrize("processes", [2, 3, 4, 15])
def test_processes_share_the_images(processes: int, broken: tuple[int, ...]) -> None:
    """Each encodes equally many batches; the last image, which fills up, counts once, and is named once if broken."""
    encoders = [Encoder() for _ in range(processes)]
    found = [
        survey(encode, broken, process=process, processes=processes, batch_size=2)
        for process, encode in enumerate(encoders)
    ]
    assert len({tuple(encode.batches) for encode in encoders}) == 1
    assert sum(encoders[0].batches) == -(-11 // processes)
    together = LatentMoments.from_states(torch.stack([part.moments.state() for part in found])).statistics()
    alone = survey(Encoder(), broken).moments.statistics()
    assert together.count == alone.count == 11 - len(broken)
    assert together.mean == pytest.approx(alone.mean, rel=1e-12)
    assert together.std == pytest.approx(alone.std, rel=1e-12)
    assert sorted(image.name for part in found for image in part.broken) == sorted(f"image {i}" for i in broken)


def test_images_are_spread_over_the_data_set() -> None:
    found = survey(Encoder(), limit=3)
    assert found.moments.images == 3
    assert found.moments.statistics().mean == pytest.approx([(0 + 30 + 70) / 3] * 2)


def test_progress_and_workers() -> None:
    done: list[int] = []
    images = ValidationImages(Source((2,)), 8, 100)
    found = latent_statistics(Encoder(), images, 2, 4, 1, advance=done.append)
    assert done == [4, 4, 3]
    assert found.moments.state().equal(survey(Encoder(), (2,), batch_size=4).moments.state())


def test_a_data_set_without_a_readable_image() -> None:
    found = survey(Encoder(), tuple(range(11)))
    assert len(found.broken) == 11
    with pytest.raises(InputError, match="no image"):
        found.moments.statistics()
