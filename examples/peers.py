"""Write the configs of small versions of diffusers' autoencoders: python examples/peers.py FOLDER.

A folder with a config and no weights is a model with random weights: `dc-ssdae compare diffusers:FOLDER/AutoencoderKL`.
Their cost and latents can be looked at without a download; for their quality, name a trained one, such as
`diffusers:stabilityai/sd-vae-ft-mse`.
"""

import sys
from pathlib import Path

from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

folder = Path(sys.argv[1])
levels = 6
AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(32, 64, 64, 64),
    layers_per_block=1,
    norm_num_groups=16,
).save_config(folder / "AutoencoderKL")
AutoencoderDC(
    latent_channels=32,
    encoder_block_out_channels=(32, *(64,) * (levels - 1)),
    decoder_block_out_channels=(32, *(64,) * (levels - 1)),
    encoder_layers_per_block=(0, *(1,) * (levels - 1)),
    decoder_layers_per_block=(1,) * levels,
    encoder_qkv_multiscales=((),) * levels,
    decoder_qkv_multiscales=((),) * levels,
).save_config(folder / "AutoencoderDC")
AutoencoderTiny(encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4).save_config(
    folder / "AutoencoderTiny"
)
