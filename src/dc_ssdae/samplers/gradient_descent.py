"""Gradient descent on a field that points uphill."""

from collections.abc import Callable, Sequence

from torch import Tensor

from dc_ssdae.samplers.descent import Schedule, descend
from dc_ssdae.samplers.result import SamplerResult


def gradient_descent(
    field: Callable[..., Tensor],
    x_init: Tensor,
    num_steps: int = 8,
    step_size: Schedule = 0.5,
    tolerance: float | None = None,
    *,
    condition: Tensor | Sequence[Tensor] = (),
    bucket: bool = False,
    return_trajectory: bool = False,
) -> SamplerResult:
    """Descend x ← x − η f(x) (SPEC section 2, "Gradient descent decode").

    An image whose field is not finite, or grows to more than 10 times its first root mean square, is given up: it
    falls back to its best state, where the field was smallest.

    Args:
        field: f, (B, …) -> (B, …), any floating dtype; pointing uphill. With `condition`, called with it too.
        x_init: (B, …), where the descent starts.
        num_steps: at least 1; with a tolerance, the most that an image gets.
        step_size: η > 0; stable below 2/L where f ≈ L (x − x*). One for all steps, a sequence with one for each, or a
            function of the step's index from 0.
        tolerance: an image is done when the root mean square of its f is below it; that step is still applied. It
            leaves the batch, so that later steps cost less, and the field meets fewer rows. None does all steps.
        condition: one or several tensors (B, …) that belong to the images, such as their latents: the field gets the
            rows of the images that are left, after x.
        bucket: for a compiled field: fill up the shrinking batch to powers of two, at least two, by repeating images,
            and mark it as varying, so that torch.compile compiles once.
        return_trajectory: keep every state.

    Raises:
        InputError: a setting is out of range, or the field returns another shape.
    """
    return descend(
        field,
        x_init,
        num_steps,
        step_size,
        tolerance=tolerance,
        condition=condition,
        bucket=bucket,
        return_trajectory=return_trajectory,
    )
