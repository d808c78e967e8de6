"""Train a decoder on the frozen encoder of TAESD3, or of another model, from latents that are computed once.

    dc-ssdae convert diffusers madebyollin/taesd3 --decoder-size fast --out taesd3
    OMP_NUM_THREADS=1 python studies/taesd3_decoder.py taesd3 PHOTOS LATENTS.pt OUT --minutes 95
    OMP_NUM_THREADS=1 python studies/taesd3_decoder.py OUT PHOTOS LATENTS.pt OUT2 --size 128 --batch 2 --seed 1

PHOTOS is a folder of images, each of which is encoded once, whole, at a random scale or with a shorter side of 256 px;
LATENTS.pt keeps them with their pixels, for runs on the same encoder, which takes half the time of a training step
otherwise. A step sees the same part of an image and of its latent. Minutes are processor time. The learning rate warms
up for 2 % of it and falls to 0 in the last 30 %. OUT is the averaged model, saved every five minutes.
"""

import argparse
import time
from pathlib import Path

import torch
from equal_time import averaged, images
from torch import Tensor

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import to_model_range
from dc_ssdae.data.transforms import resize_shorter_side
from dc_ssdae.model_folder import NOT_MEASURED
from dc_ssdae.networks.norms import GlobalBatchNorm2d
from dc_ssdae.provenance import name_of_path
from dc_ssdae.training.ema import ExponentialMovingAverage

SHORTER_SIDES, LONGEST = (160, 352), 448
PURE_NOISE, EMA_DECAY, WARM_UP, DECAY, BETAS = 0.9, 0.9985, 0.02, 0.3, (0.9, 0.99)
Pair = tuple[Tensor, Tensor]
"""uint8 (3, H, W), and its latent (c, H/f, W/f), float16."""


@torch.inference_mode()
def encoded(model: DCSSDAE, photos: list[Tensor]) -> list[Pair]:
    generator, f = torch.Generator().manual_seed(1), model.config.downsample_factor
    pairs = []
    for number, photo in enumerate(photos):
        least, most = (min(side, *photo.shape[-2:]) for side in SHORTER_SIDES)
        side = int(torch.randint(least, most + 1, (1,), generator=generator)) if number % 3 else min(most, 256)
        photo = resize_shorter_side(photo, side)
        if torch.rand(1, generator=generator) < 0.5:
            photo = photo.flip(-1)
        height, width = (min(side // f * f, LONGEST) for side in photo.shape[-2:])
        photo = photo[:, :height, :width].contiguous()
        pairs.append((photo, model.encode(to_model_range(photo[None])).latent_dist.mode()[0].half()))
        if number % 100 == 99:
            print(f"{number + 1} of {len(photos)} encoded", flush=True)
    return pairs


def crops(pairs: list[Pair], batch: int, size: int, f: int, generator: torch.Generator) -> Pair:
    """Random squares: float32 (B, 3, size, size) in [-1, 1], and their latents (B, c, size/f, size/f)."""
    found = []
    for index in torch.randint(len(pairs), (batch,), generator=generator).tolist():
        pixels, latent = pairs[index]
        top, left = (int(torch.randint(n - size // f + 1, (1,), generator=generator)) for n in latent.shape[-2:])
        square = pixels[:, top * f : top * f + size, left * f : left * f + size]
        found.append((square, latent[:, top : top + size // f, left : left + size // f]))
    x, z = (torch.stack(part) for part in zip(*found, strict=True))
    return to_model_range(x), z.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "photos", "latents", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=95.0)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-statistics", action="store_true", help="normalise latents by those of the batch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    given = DCSSDAE.from_pretrained(args.model)
    if not args.latents.exists():
        torch.save(encoded(given, images(args.photos)), args.latents)
    pairs = [pair for pair in torch.load(args.latents, mmap=True) if min(pair[0].shape[-2:]) >= args.size]
    f = given.config.downsample_factor
    kept = ("latent_channels", "downsample_factor", "encoder", "decoder", *NOT_MEASURED)
    model = DCSSDAE(
        **{name: given.config[name] for name in kept},
        dynamics={"init_args": {"prediction": "image", "pure_noise": PURE_NOISE}},
        provenance={
            "initialised_from": name_of_path(args.model),
            "data": name_of_path(args.photos),
            "images": len(pairs),
        },
    )
    model.load_state_dict(given.state_dict())
    model.decoder.train()
    for module in model.decoder.modules():
        if isinstance(module, GlobalBatchNorm2d):
            module.inputs_stay = not args.batch_statistics
    optimizer = torch.optim.AdamW(model.decoder.parameters(), args.lr, BETAS, weight_decay=0.0)
    average = ExponentialMovingAverage(model, EMA_DECAY)
    begin, step, saved, losses = time.process_time(), 0, 0, [0.0]
    while (progress := (time.process_time() - begin) / (60.0 * args.minutes)) < 1.0:
        optimizer.param_groups[0]["lr"] = args.lr * min(progress / WARM_UP + 1e-3, 1.0, (1.0 - progress) / DECAY)
        generator = torch.Generator().manual_seed(args.seed * 10**7 + step)
        x, z = crops(pairs, args.batch, args.size, f, generator)
        level = model.dynamics.sample_level(args.batch, generator=generator)
        record = model.dynamics.corrupt(x, torch.randn(x.shape, generator=generator), level)
        loss = model.dynamics.loss(record, model.decoder(record.x_level, z)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        average.update(model, step)
        losses.append(float(loss.detach()))
        if progress * args.minutes >= 5 * (saved + 1):
            saved += 1
            averaged(model, average).save_pretrained(args.out)
            print(f"{5 * saved} minutes, step {step}, loss {sum(losses[-500:]) / len(losses[-500:]):.5f}", flush=True)
    averaged(model, average).save_pretrained(args.out)
    print(f"done after step {step}")


if __name__ == "__main__":
    main()
