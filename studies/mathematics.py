"""Draw the figures of docs/mathematics.md with the package's dynamics and samplers: python studies/mathematics.py"""

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dc_ssdae.dynamics import EquilibriumMatching
from dc_ssdae.samplers import gradient_descent

OUT = Path(__file__).resolve().parents[1] / "docs/images"
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#666666"  # told apart by the colour-blind too
PIXELS, SEED = 48, 0
IMAGES = torch.zeros(3, PIXELS)
IMAGES[:, :2] = torch.tensor([[-1.2, -0.8], [1.3, -0.6], [0.1, 1.3]])  # all images lie in the plane of two pixels


def decays() -> Figure:
    """The decays c(γ), each with its name at its line."""
    figure = Figure(figsize=(6.2, 3.0), layout="constrained")
    axes = figure.subplots()
    level = torch.linspace(0, 1, 201)
    labels = {"linear": (BLUE, 0.36, 0.68), "truncated": (ORANGE, 0.2, 1.04), "piecewise": (GREEN, 0.2, 1.34)}
    for name, (colour, x, y) in labels.items():
        axes.plot(level, EquilibriumMatching(decay=name).decay(level), color=colour, linewidth=2)
        axes.annotate(name, (x, y), color=colour)
    axes.set(xlabel="level γ", ylabel="c(γ)", xlim=(0, 1), ylim=(0, 1.5), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_xticklabels(["0\nnoise", "0.25", "0.5", "0.75", "1\nimage"])
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def exact_field(dynamics: EquilibriumMatching, x: Tensor, levels: int = 200) -> Tensor:
    """The field that minimises the loss at x (B, PIXELS), if all IMAGES are as likely: the mean of the targets."""
    level = torch.linspace(0, 0.98, levels)[:, None, None, None]
    noise = (x[None, :, None] - level * IMAGES) / (1 - level)  # (levels, B, images, PIXELS)
    target = dynamics.gradient_scale * dynamics.decay(level) * (noise - IMAGES)
    # The density of x at a level, given the image: the density of the noise, times the change of volume.
    logarithm = -0.5 * noise.square().sum(-1) - PIXELS * torch.log1p(-level[..., 0])
    weight = torch.softmax(logarithm.transpose(0, 1).flatten(1), dim=1)
    return torch.einsum("bk,bkp->bp", weight, target.transpose(0, 1).flatten(1, 2))


def descent() -> Figure:
    """The field between three images, and default descents from noise."""
    dynamics = EquilibriumMatching()
    figure = Figure(figsize=(6.2, 4.9), layout="constrained")
    axes = figure.subplots()
    grid = torch.zeros(15 * 13, PIXELS)
    grid[:, :2] = torch.cartesian_prod(torch.linspace(-2.3, 2.3, 15), torch.linspace(-1.9, 2.1, 13))
    direction = -exact_field(dynamics, grid)
    axes.quiver(*grid[:, :2].T, *direction[:, :2].T, color="#bbbbbb", width=0.0035, angles="xy")
    noises = torch.randn(5, PIXELS, generator=torch.Generator().manual_seed(SEED))
    noises[:, :2] = torch.tensor([[-2.1, 0.9], [2.1, 1.2], [1.4, -1.7], [-1.9, -1.5], [-0.7, 1.9]])
    steps = dynamics.step_sizes(4)
    out = gradient_descent(
        lambda x: exact_field(dynamics, x), noises, num_steps=4, step_size=steps, return_trajectory=True
    )
    assert out.trajectory is not None
    path = out.trajectory[..., :2]
    for line in path.unbind(1):
        axes.plot(*line.T, color=BLUE, linewidth=1.3, marker="o", markersize=3.5)
    axes.scatter(*path[0].T, s=36, facecolor="white", edgecolor=BLUE, linewidth=1.5, zorder=3)
    axes.scatter(*IMAGES[:, :2].T, s=120, color=ORANGE, marker="*", zorder=4)
    for number, (x, y) in enumerate(IMAGES[:, :2].tolist(), 1):
        axes.annotate(f"image {number}", (x, y), (8, -14), textcoords="offset points", color=ORANGE)
    axes.annotate("noise", path[0, 0].tolist(), (0, 8), textcoords="offset points", color=BLUE, ha="center")
    arrow = {"arrowstyle": "-", "color": BLUE, "linewidth": 0.8, "shrinkB": 4}
    axes.annotate("after one step", path[1, 0].tolist(), (-1.9, -0.1), color=BLUE, va="center", arrowprops=arrow)
    axes.set(xlabel="first pixel", ylabel="second pixel", xlim=(-2.4, 2.4), ylim=(-2, 2.2), aspect="equal")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    matplotlib.rcParams |= {"font.size": 10, "svg.hashsalt": "dc-ssdae", "text.color": GREY, "svg.fonttype": "path"}
    for make in (decays, descent):
        make().savefig(OUT / f"{make.__name__}.svg", metadata={"Date": None})
