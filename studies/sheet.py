"""Photos that the shipped model has not seen, and what it makes of them: original left, one step of the decoder right.

    python studies/sheet.py docs/photos.jpg lead             # two photos, nearly whole
    python studies/sheet.py docs/photos_f8c16.jpg squares    # ten squares of 256 px

Pixel for pixel; the photos come with scikit-image.
"""

import argparse
from importlib import resources
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import read_image, to_model_range, to_pillow, to_uint8
from dc_ssdae.evaluation.metrics import psnr

LINE, GAP = 24, 4
LAYOUTS: dict[str, tuple[int, int, int, dict[str, tuple[int, int]]]] = {
    "lead": (1, 384, 512, {"astronaut.png": (0, 0), "coffee.png": (16, 72)}),
    "squares": (
        2,
        256,
        256,
        {
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
        },
    ),
}
"""Pairs per row, height and width of a picture, and of each photo the top and left of what is shown."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("layout", choices=LAYOUTS)
    args = parser.parse_args()
    columns, height, width, places = LAYOUTS[args.layout]
    model, font = DCSSDAE.from_pretrained(), ImageFont.load_default(size=15)
    pair = 2 * width + GAP
    rows = -(-len(places) // columns)
    sheet = Image.new("RGB", (columns * (pair + 4 * GAP) - 4 * GAP, rows * (height + LINE)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, (top, left)) in enumerate(places.items()):
        with resources.as_file(resources.files("skimage.data") / name) as file:
            pixels = read_image(file).pixels
        pixels = pixels[:, : pixels.shape[1] // 8 * 8, : pixels.shape[2] // 8 * 8]
        top, left = max(min(top, pixels.shape[1] - height), 0), max(min(left, pixels.shape[2] - width), 0)
        with torch.inference_mode():  # of the whole photo, so that no border is within what is shown
            z = model.encode(to_model_range(pixels)[None]).latent_dist.mode()
            decoded = to_uint8(model.decode(z).sample[0])
        shown = (slice(None), slice(top, top + height), slice(left, left + width))
        original, output = pixels[shown].contiguous(), decoded[shown].contiguous()
        x, y = (pair + 4 * GAP) * (index % columns), (LINE + height) * (index // columns)
        texts = Path(name).stem.removesuffix("_left").replace("_", " "), f"{psnr(original, output):.1f} dB"
        if args.layout == "lead":
            per_block = "numbers per block of 8 by 8 pixels"
            texts = f"original: 192 {per_block}", f"from a latent of 16 {per_block}, in one step: {texts[1]}"
        for place, (picture, text) in enumerate(zip((original, output), texts, strict=True)):
            sheet.paste(to_pillow(picture), (x + (width + GAP) * place, y + LINE))
            draw.text((x + (width + GAP) * place + 2, y + 3), text, fill="black", font=font)
    sheet.save(args.out, quality=92)


if __name__ == "__main__":
    main()
