"""Alignment of the decoder's features with those of a pretrained vision transformer."""

import difflib
import importlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae.errors import InputError, check_at_least
from dc_ssdae.losses.backbones import (
    FrozenBackbone,
    WeightsFile,
    check_precision,
    find_weights,
    fixed_random_state,
    hub_file,
    hugging_face_file,
    load_exactly,
    read_weights,
)
from dc_ssdae.losses.term import StepOutputs
from dc_ssdae.networks import UViTDecoder

if TYPE_CHECKING:
    from dc_ssdae.autoencoder import DCSSDAE

DINOV2_B = "vit_base_patch14_dinov2.lvd142m"


class REPALoss(nn.Module):
    """1 − cosine similarity of the decoder's tokens, through a head that trains, with a backbone's patch tokens.

    A mean over tokens: (B,) float32 (SPEC section 2; Yu et al. 2024). The image is resized so that the backbone's
    patches are the decoder's tokens.

    "auto" takes bfloat16: the backbone's tokens keep a cosine of 0.9999 with float32's, which changes a loss of 0.005
    by up to 0.5 % and one of 0.3 by 0.01 %. Measured with random weights of DINOv2-B/14, layer scales from 0.05 to 1
    among them, on 128 pixel crops of photos.

    Args:
        decoder_channels: D of `StepOutputs.decoder_features`.
        backbone: a vision transformer of timm that takes images of any size; DINOv2-B/14 by default.
        layer: the decoder's middle block to read, from 0; None is min(4, ⌊n/2⌋) of n.
        weights: folder with the backbone's file, or "random"; None looks for it (`find_weights`). A folder holds
            timm's file as NAME.safetensors or NAME/model.safetensors, or the authors' under its own name.
        precision: "float32", "bfloat16", or "auto", which is bfloat16 on CUDA devices that compute in it.

    Raises:
        InputError: a setting is unknown, or the weights are not to be had.
    """

    reads_decoder_features = True

    def __init__(
        self,
        decoder_channels: int,
        backbone: str = DINOV2_B,
        layer: int | None = None,
        weights: str | None = None,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        check_at_least(1, decoder_channels=decoder_channels)
        file = _file(backbone, layer, precision)
        self.decoder_layer = layer
        self.weights_file = find_weights("repa", file, weights)
        self.random_weights = self.weights_file is None
        network = _build(backbone, self.weights_file)
        self.backbone = FrozenBackbone(network, precision, bfloat16_is_safe=True)
        self.head = nn.Sequential(
            nn.Linear(decoder_channels, decoder_channels),
            nn.SiLU(),
            nn.Linear(decoder_channels, network.channels),
        )

    @classmethod
    def for_model(
        cls,
        model: "DCSSDAE",
        backbone: str = DINOV2_B,
        layer: int | None = None,
        weights: str | None = None,
        precision: str = "auto",
        decoder_channels: int | None = None,
    ) -> "REPALoss":
        """Build the term for a model.

        Args:
            model: its decoder has `forward_with_features`. A decoder that is no `UViTDecoder` tells D by an attribute
                `feature_channels`, unless `decoder_channels` is given.
            backbone: as the constructor's, like the others.
            layer: see there.
            weights: see there.
            precision: see there.
            decoder_channels: D; None asks the decoder.

        Raises:
            InputError: the decoder gives no features, or the constructor raises.
        """
        decoder: Any = model.decoder
        name = type(decoder).__name__
        if not callable(getattr(decoder, "forward_with_features", None)):
            raise InputError(f"losses.repa: {name} has no forward_with_features; leave the term out: --losses.repa 0")
        if isinstance(decoder, UViTDecoder):
            blocks = len(decoder.middle.blocks)
            if layer is not None and not 0 <= layer < blocks:
                raise InputError(f"losses.repa: layer is {layer}; the decoder has middle blocks 0 to {blocks - 1}")
            decoder_channels = decoder_channels or decoder.middle.project_out.in_features
        decoder_channels = decoder_channels or getattr(decoder, "feature_channels", None)
        if decoder_channels is None:
            raise InputError(
                f"losses.repa: {name} has no attribute feature_channels, the channels of its features; add it, give "
                "losses.repa.init_args.decoder_channels, or leave the term out: --losses.repa 0"
            )
        return cls(decoder_channels, backbone, layer, weights, precision)

    @classmethod
    def fetch(
        cls,
        backbone: str = DINOV2_B,
        layer: int | None = None,
        weights: str | None = None,
        precision: str = "auto",
        decoder_channels: int | None = None,
    ) -> None:
        """Find or download the weights that the same settings need, without building anything.

        Raises:
            InputError: a setting is unknown, or the weights are not to be had.
        """
        find_weights("repa", _file(backbone, layer, precision), weights)

    def forward(self, outputs: StepOutputs) -> Tensor:
        features = outputs.decoder_features
        if features is None:
            raise InputError("losses.repa reads the decoder's features, and this step computed none")
        rows, columns = features.shape[-2:]
        with torch.no_grad():
            targets = self.backbone(outputs.record.x, rows, columns).float()
        tokens = features.flatten(2).transpose(1, 2).to(next(self.head.parameters(), targets).dtype)
        return 1.0 - F.cosine_similarity(self.head(tokens).float(), targets, dim=-1).mean(dim=1)


class PatchTokens(nn.Module):
    """Patch tokens (B, rows · columns, channels) of images in [-1, 1], resized so that each token is one patch.

    Args:
        transformer: of timm.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        self.channels: int = transformer.embed_dim
        self.register_buffer("mean", torch.tensor(transformer.pretrained_cfg["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(transformer.pretrained_cfg["std"]).view(3, 1, 1))

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        height, width = self.transformer.patch_embed.patch_size
        x = F.interpolate(x, (rows * height, columns * width), mode="bicubic", antialias=True)
        x = (0.5 * x + 0.5 - self.mean) / self.std
        return self.transformer.forward_features(x)[:, self.transformer.num_prefix_tokens :]


def _file(backbone: str, layer: int | None, precision: str) -> WeightsFile:
    check_precision(precision)
    if layer is not None:
        check_at_least(0, layer=layer)
    return transformer_file(backbone)


def transformer_file(backbone: str) -> WeightsFile:
    """Describe the file of a model of timm's.

    Raises:
        InputError: timm has no such model, or no weights of it.
    """
    import timm

    architecture = backbone.partition(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(backbone, [*timm.list_models(), *timm.list_pretrained()], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise InputError(f"losses.repa: timm has no model {backbone!r}{hint}")
    try:
        config = timm.get_pretrained_cfg(backbone)
    except RuntimeError as error:
        raise InputError(f"losses.repa: backbone {backbone!r}: {error}") from None
    name = f"{architecture}.{config.tag}" if config is not None and config.tag else architecture
    url = config.url if config is not None else None
    # A file by the model's name, a repository's snapshot in a folder of that name, or the authors' own file.
    names = (f"{name}.safetensors", f"{name}/model.safetensors", *([Path(url).name] if url else []))
    if config is not None and config.hf_hub_id:
        return hugging_face_file(config.hf_hub_id, config.hf_hub_filename or "model.safetensors", names)
    if url:
        found = hub_file(url)
        return WeightsFile(names, found.origin, found.cached, found.download)
    raise InputError(f"losses.repa: timm knows no weights of {backbone!r}; take another backbone")


def _build(backbone: str, path: Path | None) -> PatchTokens:
    return PatchTokens(build_transformer(backbone, path))


def build_transformer(backbone: str, path: Path | None) -> Any:
    """Build a vision transformer of timm that takes images of any size.

    Args:
        backbone: timm's name.
        path: of timm's file or the authors'; None draws random weights, the same at every start.

    Raises:
        InputError: it is no such transformer, or the file is damaged or another network's.
    """
    import timm

    try:
        with fixed_random_state():
            transformer = timm.create_model(backbone, pretrained=False, num_classes=0, dynamic_img_size=True)
        _ = transformer.num_prefix_tokens, transformer.patch_embed.patch_size, transformer.embed_dim
    except (TypeError, AttributeError):
        raise InputError(
            f"losses.repa: {backbone} of timm is no vision transformer that takes images of any size; {DINOV2_B} is one"
        ) from None
    if path is not None:
        load_exactly(transformer, _native_names(transformer, read_weights(path)), path)
    return transformer


def _native_names(transformer: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring a file of the authors' to timm's names, and leave out what features do not need.

    timm's converter would resample what has another shape; a file that has all names is taken as it is.
    """
    if not transformer.state_dict().keys() <= tensors.keys():
        converter = getattr(importlib.import_module(type(transformer).__module__), "checkpoint_filter_fn", None)
        with suppress(AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # of another network's file
            tensors = converter(dict(tensors), transformer) if converter is not None else tensors
    classifier = transformer.pretrained_cfg["classifier"]
    unused = ["mask_token", *([classifier] if isinstance(classifier, str) else classifier or [])]
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(unused))}
