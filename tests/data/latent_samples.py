"""A quick encoder, photos for it, and a way to encode them, that the tests of latents share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from broken_samples import write_images
from torch import Tensor
from torch.nn.functional import avg_pool2d

from dc_ssdae.data.encode_latents import LatentEncoder, LatentSettings, encode_latents
from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.data.images import to_model_range
from dc_ssdae.data.sources import ImageSource
from dc_ssdae.latent import DiagonalGaussian

SETTINGS = LatentSettings(size=16, shard_size=3, flip=True)


def pooled(pixels: Tensor) -> DiagonalGaussian:
    """A latent (3, 2, 2) of an image of 16 pixels: its colours eight times smaller, the less certain the brighter."""
    mean = avg_pool2d(to_model_range(pixels), 8)
    return DiagonalGaussian(mean, mean - 2.0)


def pooling(**changed: Any) -> LatentEncoder:
    """`pooled` as an encoder."""
    given: dict[str, Any] = {"encode": pooled, "name": "pooling", "sha256": "00", "downsample_factor": 8}
    return LatentEncoder(**{**given, "latent_channels": 3, "compute_dtype": "float32", **changed})


def write_photos(root: Path) -> Path:
    """Seven photos of two classes and, as the fourth in order, a file that is none."""
    write_images(root / "bird", 3)
    write_images(root / "cat", 4, first=3)
    (root / "bird" / "image_1.png").write_bytes(b"no image")
    return root


def encoded_photos(
    photos: Path | Mapping[str, ImageSource],
    target: Path,
    settings: LatentSettings = SETTINGS,
    encoder: LatentEncoder | None = None,
    **options: Any,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Encode photos; gives the manifests, and the lines that were reported."""
    parts = {"": ImageFolder(str(photos))} if isinstance(photos, Path) else photos
    lines: list[str] = []
    given = {"batch_size": 2, "max_broken_share": 0.2, "report": lines.append, **options}
    return encode_latents(parts, target, encoder or pooling(), settings, **given), lines
