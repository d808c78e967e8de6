"""What a model costs: parameters, latent shape, compression and FLOPs from its architecture alone; time by trying."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.errors import InputError

T = TypeVar("T")


class Flops(NamedTuple):
    """FLOPs for one image of `encode` and of one `decode_step`, an evaluation of the decoder."""

    encode: int
    decode_step: int


def count_parameters(model: DCSSDAE) -> dict[str, int]:
    """Count a model's parameters, buffers excluded: by part ("encoder", "decoder"), and in "total"."""
    parts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in model.named_children()}
    return {**parts, "total": sum(parameter.numel() for parameter in model.parameters())}


def latent_shape(model: DCSSDAE, height: int, width: int) -> tuple[int, int, int]:
    """Give the shape (c, h, w) of the latent of an image.

    Args:
        model: any; only its config is read.
        height: of the image in pixels, a multiple of the model's f.
        width: likewise.

    Raises:
        InputError: a side is no positive multiple of f.
    """
    factor = model.config.downsample_factor
    if min(height, width) < 1 or height % factor or width % factor:
        raise InputError(f"an image's sides must be positive multiples of f = {factor}, not {height} and {width}")
    return model.config.latent_channels, height // factor, width // factor


def compression_ratio(model: DCSSDAE) -> float:
    """Give the number of image values (three a pixel) for each latent value: 3 f²/c."""
    return 3 * model.config.downsample_factor**2 / model.config.latent_channels


def count_flops(model: DCSSDAE, size: int) -> Flops:
    """Count the FLOPs of encoding one square image, and of one step of decoding it.

    Two FLOPs for a multiply-add. Convolutions and matrix products (attention's too) are counted, as
    `torch.utils.flop_counter` does; pointwise operations and normalisations are not. Nothing is computed.

    Args:
        model: any; only its config is read.
        size: side of the image in pixels, a multiple of the model's f.

    Raises:
        InputError: `size` is no positive multiple of f.
    """
    latent_shape(model, size, size)
    # The plain form of attention is made of matrix products, which the counter knows on every device. With gradients,
    # because without them convolutions take short cuts. The meta device is the quickest to count on, but it has no
    # autocast, which a user's own classes may want.
    own = any("." in model.config[part]["class_path"] for part in ("encoder", "decoder"))
    with FakeTensorMode() if own else torch.device("meta"), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        twin = DCSSDAE.from_config(model.config).eval()
        image = torch.empty(1, 3, size, size)
        with FlopCounterMode(display=False) as encoding:
            latent = twin.posterior(image).mode()
        with FlopCounterMode(display=False) as decoding:
            twin.field(image, latent, torch.zeros(1) if twin.dynamics.conditions_on_time else None)
    return Flops(encoding.get_total_flops(), decoding.get_total_flops())


@torch.inference_mode()
def measure_seconds(model: DCSSDAE, size: int, repeats: int = 3) -> dict[str, float]:
    """Time "encode", and "decode_step", of one image, on the model's device and in its dtype: seconds.

    Args:
        model: in eval mode.
        size: the image's side in pixels, a multiple of f.
        repeats: timed runs, after one that is not timed; the median counts.
    """
    x = torch.zeros(1, 3, size, size, device=model.device)
    z, encode = timed(lambda: model.encode(x).latent_dist.mode(), model.device, repeats)
    _, decode_step = timed(lambda: model.decode(z).sample, model.device, repeats)
    return {"encode": encode, "decode_step": decode_step}


def timed(run: Callable[[], T], device: torch.device, repeats: int) -> tuple[T, float]:
    """Run something once untimed and `repeats` times timed; gives its result and the median seconds."""
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        result = run()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds[1:])


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given, so that a clock may be read."""
    if device.type in ("cuda", "mps"):
        torch.accelerator.synchronize(device)
