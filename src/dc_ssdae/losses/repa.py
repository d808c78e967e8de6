"""Alignment of the decoder's features with the features of a pretrained vision transformer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dc_ssdae.errors import InputError, check_at_least, did_you_mean
from dc_ssdae.losses.backbones import (
    FrozenBackbone,
    WeightsFile,
    find_weights,
    fixed_random_state,
    hugging_face_file,
    load_exactly,
    read_weights,
)
from dc_ssdae.losses.term import StepOutputs
from dc_ssdae.networks.timm_encoder import PatchTokens, create_transformer

if TYPE_CHECKING:
    from dc_ssdae.autoencoder import DCSSDAE

DINOV2_B = "vit_base_patch14_dinov2.lvd142m"


class REPALoss(nn.Module):
    """1 − cosine similarity of the decoder's tokens, through a trained head, with a backbone's patch tokens.

    The mean over tokens: (B,) float32 (Yu et al. 2024). The image is resized so that the backbone's patches are the
    decoder's tokens.

    "auto" takes bfloat16: the backbone's tokens keep a cosine of 0.9999 with float32's, which changes a loss of 0.005
    by up to 0.5 % and one of 0.3 by 0.01 %. Measured with random weights of DINOv2-B/14, layer scales from 0.05 to 1
    among them, on 128 pixel crops of photos.

    Args:
        decoder_channels: D of `StepOutputs.decoder_features`.
        backbone: timm's name of a vision transformer that takes images of any size; DINOv2-B/14 by default.
        layer: the decoder's middle block to read, from 0; None is min(4, ⌊n/2⌋) of n.
        weights: folder with the backbone's file, or "random"; None searches for it (`find_weights`). A folder holds
            timm's file as NAME.safetensors or NAME/model.safetensors, or DINOv2's own under its published name.
        precision: "float32", "bfloat16", or "auto", which is bfloat16 on CUDA devices that compute in it.

    Raises:
        InputError: a setting is unknown, or the weights are not found.
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
        check_at_least(0, layer=layer or 0)
        self.decoder_layer = layer
        self.weights_file = find_weights("repa", transformer_file(backbone), weights)
        self.random_weights = self.weights_file is None
        network = PatchTokens(build_transformer(backbone, self.weights_file))
        self.backbone = FrozenBackbone(network, precision, bfloat16_is_safe=True)
        self.head = nn.Sequential(
            nn.Linear(decoder_channels, decoder_channels),
            nn.SiLU(),
            nn.Linear(decoder_channels, network.channels),
        )

    @classmethod
    def for_model(cls, model: "DCSSDAE", decoder_channels: int | None = None, **settings: Any) -> "REPALoss":
        """Build the term for a model.

        Args:
            model: its decoder has the method `forward_with_features`, and the attribute `feature_channels` with D.
            decoder_channels: D, for a decoder without that attribute.
            settings: the constructor's other arguments.

        Raises:
            InputError: the decoder does not tell D, or the constructor raises.
        """
        decoder_channels = decoder_channels or getattr(model.decoder, "feature_channels", None)
        if decoder_channels is None:
            raise InputError(
                f"losses.repa: {type(model.decoder).__name__} has no attribute feature_channels, which tells how many "
                "channels its forward_with_features gives; add both, or leave the term out: --losses.repa 0"
            )
        return cls(decoder_channels, **settings)

    @classmethod
    def fetch(cls, backbone: str = DINOV2_B, weights: str | None = None, **_: Any) -> None:
        """Find or download the weights for the constructor's settings, without building anything.

        Raises:
            InputError: the backbone is unknown, or the weights are not found.
        """
        find_weights("repa", transformer_file(backbone), weights)

    def forward(self, outputs: StepOutputs) -> Tensor:
        features = outputs.decoder_features
        if features is None:
            raise InputError("losses.repa reads the decoder's features, and this step computed none")
        rows, columns = features.shape[-2:]
        with torch.no_grad():
            targets = self.backbone(outputs.record.x, rows, columns).float()
        tokens = features.flatten(2).transpose(1, 2).to(next(self.head.parameters(), targets).dtype)
        return 1.0 - F.cosine_similarity(self.head(tokens).float(), targets, dim=-1).mean(dim=1)


def transformer_file(backbone: str) -> WeightsFile:
    """Describe the weights file of a model of timm.

    Raises:
        InputError: timm has no such model, or no weights of it on the Hugging Face Hub.
    """
    import timm

    config = timm.get_pretrained_cfg(backbone) if timm.is_model_pretrained(backbone) else None
    if config is None or not config.hf_hub_id:
        hint = did_you_mean(backbone, [*timm.list_models(), *timm.list_pretrained()])
        raise InputError(f"timm has no weights of {backbone!r} on the Hugging Face Hub{hint}")
    name = f"{config.architecture}.{config.tag}"
    # A file by the model's name, a repository's snapshot in a folder of that name, or the file of the model's authors.
    names = (f"{name}.safetensors", f"{name}/model.safetensors", *([Path(config.url).name] if config.url else []))
    return hugging_face_file(config.hf_hub_id, names)


def build_transformer(backbone: str, path: Path | None) -> Any:
    """Build a vision transformer of timm that takes images of any size.

    Args:
        backbone: timm's name.
        path: timm's file or that of DINOv2's authors; None draws random weights, the same at every start.

    Raises:
        InputError: the model is not such a transformer, or the file is damaged or another network's.
    """
    from timm.models.vision_transformer import checkpoint_filter_fn

    with fixed_random_state():
        transformer = create_transformer(backbone)
    if path is None:
        return transformer
    # Read here and not by timm, which fills what a file with a classifier lacks with random numbers.
    tensors = read_weights(path)
    if "mask_token" in tensors:  # DINOv2's own file
        tensors = checkpoint_filter_fn(tensors, transformer)
    classifier = transformer.pretrained_cfg["classifier"] or ()
    load_exactly(transformer, {name: tensors[name] for name in tensors if not name.startswith(classifier)}, path)
    return transformer
