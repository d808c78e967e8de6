"""Train models for the same processor time on one thread each, and measure what they reconstruct in one step and two.

    OMP_NUM_THREADS=1 python studies/equal_time.py DATA RESULTS.jsonl [NAME ...]

DATA has train/ and validation/, folders of images. Each NAME is one of RUNS (all by default); each adds a line to
RESULTS. Processor time and not the clock: other work on the machine then changes little. AdamW, 5 % of the time warm-up
and a cosine to 0, dynamics and KL alone, batches of 8 at 64 px and of 4 at 128 px; the averaged weights count.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.folder import ImageFolder
from dc_ssdae.data.images import to_model_range, to_uint8
from dc_ssdae.data.transforms import center_crop, random_scaled_crop, resize_shorter_side
from dc_ssdae.presets import load_preset
from dc_ssdae.training.build import build_step, place_step
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.ema import ExponentialMovingAverage
from dc_ssdae.training.optimizer import build_optimizer, set_learning_rate
from dc_ssdae.training.step import draw_noise

SMALL = {"init_args": {"widths": [16, 32, 64, 64], "depths": [0, 1, 1, 1]}}
"""The encoder of the preset demo."""


def decoder(patch: int, channels: int, multipliers: list[int], norm_groups: int) -> dict[str, Any]:
    shape = {"patch": patch, "channels": channels, "multipliers": multipliers, "norm_groups": norm_groups}
    return {"init_args": {**shape, "middle_layers": 2, "blocks_per_level": 1}}


# At each patch the widths with which a training step costs about the same.
DECODERS = {
    1: (decoder(1, 12, [1, 1, 4, 4], 1), 3e-3),
    2: (decoder(2, 16, [1, 3, 6], 8), 1.5e-3),
    4: (decoder(4, 48, [1, 2], 8), 1.5e-3),
    8: (decoder(8, 128, [1], 8), 1.5e-3),
}
SECONDS, BATCH = {64: 180, 128: 300}, {64: 8, 128: 4}


def runs() -> dict[str, dict[str, Any]]:
    """By name: size, seed, learning rate, seconds and the model's settings."""
    found = {}
    for size in (64, 128):
        for prediction in ("image", "field"):
            for patch, (network, lr) in DECODERS.items():
                for seed in (0, 1, 2):
                    model = {"decoder": network, "dynamics": {"init_args": {"prediction": prediction}}}
                    name = f"patch{patch}_{prediction}_{size}px_seed{seed}"
                    found[name] = {"size": size, "seed": seed, "lr": lr, "seconds": SECONDS[size], "model": model}
    for seed in (0, 1, 2):
        fast = load_preset("fast_f8c4")["model"]
        before = {"decoder": DECODERS[1][0], "encoder": SMALL, "dynamics": {}}
        shared = {"size": 64, "seed": seed, "seconds": 300}
        found[f"fast_f8c4_seed{seed}"] = {**shared, "lr": 1e-3, "model": fast}
        found[f"former_demo_seed{seed}"] = {**shared, "lr": 3e-3, "model": before}
    return found


def images(folder: Path) -> list[Tensor]:
    found = ImageFolder(str(folder))
    return [found.read(index)[0].contiguous() for index in range(len(found))]


def train(
    run: dict[str, Any], photos: list[Tensor], marks: int = 1, at_mark: Callable[[DCSSDAE, float], object] | None = None
) -> tuple[DCSSDAE, int]:
    """The averaged model, and how many steps it has done.

    Args:
        run: size, seed, lr, seconds and model; init, the folder of a model to start from, may be there too.
        photos: uint8 (3, H, W).
        marks: at so many equal parts of the time `at_mark` is called, whose own time does not count.
        at_mark: takes the averaged model and the seconds of training.
    """
    size, seed, batch = run["size"], run["seed"], BATCH[run["size"]]
    preset = load_preset("demo")
    training = {**preset["training"], "lr": run["lr"], "seed": seed, "batch_size": batch}
    data = {"image_size": size, "aug_scale": 5.0 * 64 / size, "root": "."}
    model = {**preset["model"], "encoder": SMALL, **run["model"]}
    config = RunConfig.from_mapping({"model": model, "data": data, "losses": preset["losses"], "training": training})
    torch.manual_seed(seed)
    step = build_step(config)
    if "init" in run:
        step.model.load_state_dict(DCSSDAE.from_pretrained(run["init"]).state_dict())
    place_step(step, config, torch.device("cpu"))
    optimizer = build_optimizer(step, config.training)
    average = ExponentialMovingAverage(step.model, config.training.ema_decay, config.training.ema_start)
    begin, done, progress, passed = time.process_time(), 0, 0.0, 0
    while progress < 1.0:
        warm = progress / 0.05 if progress < 0.05 else 0.5 * (1.0 + math.cos(math.pi * (progress - 0.05) / 0.95))
        set_learning_rate(optimizer, max(warm, 1e-3) * run["lr"])
        generator = torch.Generator().manual_seed(seed * 10**6 + done)
        chosen = torch.randint(len(photos), (batch,), generator=generator).tolist()
        crops = [random_scaled_crop(photos[index], size, config.data.aug_scale, generator) for index in chosen]
        noise = draw_noise(step.model, size, seed, batch, range(done * batch, (done + 1) * batch), "cpu")
        step(torch.stack(crops), *noise).total.backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        average.update(step.model, done)
        progress = (time.process_time() - begin) / run["seconds"]
        if at_mark is not None and progress * marks >= passed + 1:
            stopped = time.process_time()
            passed = int(progress * marks)
            at_mark(averaged(step.model, average), stopped - begin)
            begin += time.process_time() - stopped
    return averaged(step.model, average), done


def averaged(model: DCSSDAE, average: ExponentialMovingAverage) -> DCSSDAE:
    """A copy with the averaged weights, in eval mode."""
    copied = copy.deepcopy(model).eval()
    copied.load_state_dict(average.state_dict())
    return copied


@torch.inference_mode()
def measure(model: DCSSDAE, size: int, photos: list[Tensor]) -> dict[str, float]:
    """PSNR and SSIM of the rounded pictures in one step, and PSNR in two; means over images."""
    values: dict[str, list[float]] = {"psnr": [], "ssim": [], "psnr_2_steps": []}
    for first in range(0, len(photos), 10):
        crops = [center_crop(resize_shorter_side(photo, size), size) for photo in photos[first : first + 10]]
        x = torch.stack(crops).float() / 255.0
        z = model.encode(to_model_range(torch.stack(crops))).latent_dist.mode()
        for steps, name in ((1, "psnr"), (2, "psnr_2_steps")):
            y = to_uint8(model.decode(z, num_steps=steps).sample).float() / 255.0
            values[name] += (-10.0 * (x - y).square().flatten(1).mean(dim=1).log10()).tolist()
            if steps == 1:
                values["ssim"] += structural_similarity_index_measure(y, x, data_range=1.0, reduction="none").tolist()
    return {name: round(sum(each) / len(each), 4) for name, each in values.items()}


def arguments(document: str | None, known: Iterable[str], *folders: str) -> argparse.Namespace:
    """Read a study's command line: its folders and files, and names of runs; one thread from here on."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    for folder in folders:
        parser.add_argument(folder, type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_intermixed_args()
    for name in args.names:
        if name not in known:
            parser.error(f"there is no run {name}; there are {', '.join(known)}")
    torch.set_num_threads(1)
    return args


def left(args: argparse.Namespace, known: Iterable[str]) -> list[str]:
    """The runs that are asked for and that the results do not have yet."""
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
    done = {json.loads(line)["name"] for line in lines}
    return [name for name in args.names or known if name not in done]


def main() -> None:
    known = runs()
    args = arguments(__doc__, known, "data", "results")
    photos = {split: images(args.data / split) for split in ("train", "validation")}
    for name in left(args, known):
        run = known[name]
        model, steps = train(run, photos["train"])
        parameters = {
            part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("encoder", "decoder")
        }
        line = {"name": name, "steps": steps, **measure(model, run["size"], photos["validation"]), **parameters}
        print(json.dumps(line), flush=True)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "lr": run["lr"], "seconds": run["seconds"]}) + "\n")


if __name__ == "__main__":
    main()
