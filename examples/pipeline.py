"""Put a saved autoencoder into a pipeline of diffusers: python examples/pipeline.py --vae DIR --out pictures.png.

The transformer is small and its weights are random, so the pictures show nothing: what works here is the way from a
seed through a real pipeline and the autoencoder to a PNG. Train the transformer, and nothing else in here changes.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from dc_ssdae import DCSSDAE

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--vae", required=True, help="folder of a saved model, such as runs/demo/model")
parser.add_argument("--out", type=Path, default=Path("pictures.png"), help="PNG to write (default: pictures.png)")
parser.add_argument("--save", type=Path, help="folder to save the pipeline to")
parser.add_argument("--latents", type=int, default=16, help="side of a picture in latents, an even number")
parser.add_argument("--steps", type=int, default=10, help="steps of the diffusion")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

torch.manual_seed(arguments.seed)
vae = DCSSDAE.from_pretrained(arguments.vae)
transformer = DiTTransformer2DModel(
    in_channels=vae.config.latent_channels,
    out_channels=vae.config.latent_channels,
    sample_size=arguments.latents,
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=2,
)
pipeline = DiTPipeline(transformer.eval(), vae, DDIMScheduler())
generators = [torch.Generator().manual_seed(arguments.seed + index) for index in range(2)]
pictures = pipeline([207, 360], generator=generators, num_inference_steps=arguments.steps).images

width, height = pictures[0].size
sheet = Image.new("RGB", (width * len(pictures), height))
for index, picture in enumerate(pictures):
    sheet.paste(picture, (width * index, 0))
sheet.save(arguments.out)
print(f"{arguments.out}: {len(pictures)} pictures of {width}×{height} pixels, from a transformer with random weights")
if arguments.save:
    pipeline.save_pretrained(arguments.save)
    print(f"{arguments.save}: the pipeline; import dc_ssdae before DiffusionPipeline.from_pretrained")
