"""Train the former preset demo and look closely at every step whose KL is a multiple of what it was before.

    OMP_NUM_THREADS=1 python studies/logvar_explosion.py PHOTOS RESULTS.jsonl [--seed S] [--steps N] [--lr X]

PHOTOS is a folder of images. Of each jump it tells where the largest log-variance comes from: the step's images seen
with the weights of before (`batch`), or the images of before seen with the step's weights (`weights`).
"""

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from equal_time import images
from torch import Tensor

from dc_ssdae.data.images import to_model_range
from dc_ssdae.data.transforms import random_scaled_crop
from dc_ssdae.presets import read_yaml
from dc_ssdae.training.build import build_step, place_step
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.optimizer import build_optimizer, set_learning_rate
from dc_ssdae.training.step import draw_noise

JUMP = 5.0
"""Times the median of the last 100 steps."""


@torch.no_grad()
def largest(encoder: Any, crops: Tensor) -> float:
    """The largest log-variance before it is clamped."""
    seen: list[Tensor] = []
    hook = encoder.latent_head.register_forward_hook(lambda module, given, output: seen.append(output))
    encoder(to_model_range(crops))
    hook.remove()
    return round(float(seen[0].chunk(2, dim=1)[1].max()), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = Path(__file__).with_suffix(".yaml")
    given = read_yaml(file.read_text(encoding="utf-8"), str(file))
    given["training"] |= {"steps": args.steps, "lr": args.lr, "seed": args.seed}
    given["data"]["root"] = str(args.photos)
    config = RunConfig.from_mapping(given)
    photos, training, size = images(args.photos), config.training, config.data.image_size
    torch.manual_seed(args.seed)
    step = build_step(config)
    place_step(step, config, torch.device("cpu"))
    optimizer = build_optimizer(step, training)
    history: list[float] = []
    before: tuple[Any, Tensor] | None = None
    for number in range(args.steps):
        generator = torch.Generator().manual_seed(args.seed * 10**6 + number)
        chosen = torch.randint(len(photos), (training.batch_size,), generator=generator).tolist()
        crops = torch.stack([random_scaled_crop(photos[i], size, config.data.aug_scale, generator) for i in chosen])
        places = range(number * training.batch_size, (number + 1) * training.batch_size)
        losses = step(crops, *draw_noise(step.model, size, args.seed, training.batch_size, places, "cpu"))
        kl = float(losses.terms["kl"].detach())
        typical = statistics.median(history[-100:]) if len(history) >= 100 else float("inf")
        if before is not None and kl > JUMP * typical:
            encoder, earlier = before
            line = {"seed": args.seed, "step": number, "kl": round(kl, 1), "typical": round(typical, 1)}
            line |= {"now": largest(step.model.encoder, crops), "batch": largest(encoder, crops)}
            line |= {"weights": largest(step.model.encoder, earlier), "earlier": largest(encoder, earlier)}
            line |= {"photos": chosen if kl > 100 * typical else []}
            print(json.dumps(line), flush=True)
            with args.results.open("a", encoding="utf-8") as results:
                results.write(json.dumps(line) + "\n")
        history.append(kl)
        before = copy.deepcopy(step.model.encoder), crops
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), training.gradient_clip or float("inf"))
        set_learning_rate(optimizer, training.learning_rate((number + 1) / args.steps))
        optimizer.step()
        optimizer.zero_grad()
        if number % 500 == 499:
            print(f"{number + 1} steps, KL {statistics.median(history[-100:]):.1f}", flush=True)


if __name__ == "__main__":
    main()
