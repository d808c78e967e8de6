"""Linear maps between a latent and blocks of pixels, which start as the strongest cosines of a photo, as JPEG's do."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae.errors import InputError

COLOUR_AXES = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
"""Of red, green and blue: brightness, red against blue, and both against green; orthogonal to each other."""

STRENGTHS = (0.175, 0.039, 0.019)
"""Standard deviation of a block's first cosine along each colour axis, divided by the block's side; in [-1, 1].

That of others falls with the sum of their two frequencies, and that of the block's mean is 5 times as large. Rounded
from crops of photos of ImageNet and BSDS500.
"""

MEAN_STRENGTH = 5.0


class BlockAnalysis(nn.Conv2d):
    """A linear map of each f×f block of pixels and the eight around it: (B, 3, H, W) -> (B, c, H/f, W/f).

    It starts as the c strongest cosines of the block itself, each divided by its usual standard deviation.

    Args:
        channels: c, at most 3·f².
        factor: f, side of a block in pixels.
    """

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__(3 * factor**2, channels, 3, padding=1)
        self.factor = factor
        cosines, deviations = strongest_cosines(channels, factor)
        _start(self, cosines / deviations[:, None])

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pixel_unshuffle(input, self.factor))


class BlockSynthesis(nn.Conv2d):
    """A linear map of each latent pixel and the eight around it to an f×f block: (B, c, h, w) -> (B, 3, h·f, w·f).

    Args:
        channels: c, at most 3·f².
        factor: f, side of a block in pixels.
        start: "cosines" undoes a fresh `BlockAnalysis`; "zero" is for the latent of another encoder.
    """

    def __init__(self, channels: int, factor: int, start: str = "cosines") -> None:
        super().__init__(channels, 3 * factor**2, 3, padding=1)
        self.factor = factor
        cosines, deviations = strongest_cosines(channels, factor)
        _start(self, (cosines * deviations[:, None]).T if start == "cosines" else torch.zeros_like(cosines.T))

    def forward(self, input: Tensor) -> Tensor:
        return F.pixel_shuffle(super().forward(input), self.factor)


def strongest_cosines(count: int, side: int) -> tuple[Tensor, Tensor]:
    """The cosines of the two-dimensional discrete cosine transform (DCT-II) that vary most in photos.

    Args:
        count: how many, at most 3·side².
        side: of a block, in pixels.

    Returns:
        Orthonormal rows (count, 3·side²), their values in the order of pixel-unshuffle, and the standard deviation
        (count,) that photos in [-1, 1] have along each; float32.

    Raises:
        InputError: a block has fewer.
    """
    if count > 3 * side**2:
        raise InputError(f"a block shortcut of {side}×{side} pixels has at most {3 * side**2} channels, not {count}")
    frequency = torch.arange(side, dtype=torch.float64)
    waves = torch.cos(math.pi / side * frequency[:, None] * (frequency + 0.5)) * math.sqrt(2.0 / side)
    waves[0] /= math.sqrt(2.0)
    colours = torch.tensor(COLOUR_AXES, dtype=torch.float64)
    colours = colours / colours.norm(dim=1, keepdim=True)
    fall = frequency[:, None] + frequency
    fall[0, 0] = 1.0 / MEAN_STRENGTH
    deviations = side * torch.tensor(STRENGTHS, dtype=torch.float64)[:, None, None] / fall
    kept = deviations.flatten().sort(descending=True, stable=True).indices[:count]
    colour, row, column = torch.unravel_index(kept, deviations.shape)
    cosines = torch.einsum("nc,ny,nx->ncyx", colours[colour], waves[row], waves[column])
    return cosines.flatten(1).float(), deviations.flatten()[kept].float()


@torch.no_grad()
def _start(layer: nn.Conv2d, weight: Tensor) -> None:
    layer.weight.zero_()
    layer.weight[:, :, 1, 1] = weight
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
