"""Photos that the shipped model has not seen, and what it makes of them: python studies/sheet.py OUT.png [--photos 4]

Ten, or the first of them. Squares of 256 px, pixel for pixel, of the photos that scikit-image carries: original left,
one step right.
"""

import argparse
from importlib import resources
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import read_image, to_model_range, to_pillow, to_uint8
from dc_ssdae.evaluation.metrics import psnr

SIDE, LINE, GAP = 256, 18, 4
PLACES = {
    "astronaut.png": (0, 100),
    "chelsea.png": (20, 90),
    "coffee.png": (60, 150),
    "motorcycle_left.png": (150, 240),
    "rocket.jpg": (60, 200),
    "retina.jpg": (560, 560),
    "grass.png": (100, 100),
    "gravel.png": (100, 100),
    "hubble_deep_field.jpg": (300, 400),
    "page.png": (0, 60),
}
"""Of each photo: top and left of the square."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--photos", type=int, default=len(PLACES))
    args = parser.parse_args()
    model = DCSSDAE.from_pretrained()
    pair = 2 * SIDE + GAP
    sheet = Image.new("RGB", (2 * pair + 4 * GAP, (args.photos + 1) // 2 * (SIDE + LINE)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, (top, left)) in enumerate([*PLACES.items()][: args.photos]):
        with resources.as_file(resources.files("skimage.data") / name) as file:
            pixels = read_image(file).pixels
        pixels = pixels[:, : pixels.shape[1] // 8 * 8, : pixels.shape[2] // 8 * 8]
        top, left = min(top, pixels.shape[1] - SIDE), min(left, pixels.shape[2] - SIDE)
        top, left = max(top, 0), max(left, 0)
        with torch.inference_mode():  # of the whole photo, so that no border is within the square
            z = model.encode(to_model_range(pixels)[None]).latent_dist.mode()
            decoded = to_uint8(model.decode(z).sample[0])
        square = (slice(None), slice(top, top + SIDE), slice(left, left + SIDE))
        x, y = (pair + 4 * GAP) * (index % 2), (SIDE + LINE) * (index // 2)
        for place, side in enumerate((pixels, decoded)):
            sheet.paste(to_pillow(side[square].contiguous()), (x + (SIDE + GAP) * place, y + LINE))
        figure = f"{psnr(pixels[square], decoded[square]):.1f} dB"
        draw.text((x + 2, y + 3), f"{Path(name).stem}: original", fill="black")
        draw.text((x + SIDE + GAP + 2, y + 3), f"photos_f8c16, {figure}", fill="black")
    sheet.save(args.out, quality=95)


if __name__ == "__main__":
    main()
