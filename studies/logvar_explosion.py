"""Train the former preset demo and look closely at how far a single step moves the encoder's log-variances.

    OMP_NUM_THREADS=1 python studies/logvar_explosion.py PHOTOS RESULTS.jsonl [--steps N] [--kick N] [--former]

PHOTOS is a folder of images. Of each step whose KL, without the bound of training, is a multiple of what it was before,
it tells where the largest log-variance comes from: the step's images seen with the weights of before (`batch`), or the
images of before seen with the step's weights (`weights`). `--kick` follows, in one step, the gradient of a larger
log-variance in place of the loss's, as long as clipping lets it be; it writes the next hundred steps, and ends.
`--former` trains without the bound, and with a clamp that stops gradients.
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
from torch.nn import functional as F

from dc_ssdae import latent
from dc_ssdae.data.images import to_model_range
from dc_ssdae.data.transforms import random_scaled_crop
from dc_ssdae.presets import read_yaml
from dc_ssdae.training.build import build_step, place_step
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.optimizer import build_optimizer, set_learning_rate
from dc_ssdae.training.step import draw_noise

JUMP, KICKED = 5.0, 100
"""A jump is so many times the median KL of the last 100 steps; and the steps after a kick that are written."""

ADAM_AFTER_QUIET = (1 - 0.9) / (1 - 0.999) ** 0.5
"""Learning rates that a weight moves by its first gradient after a long time of none (Kingma and Ba 2015)."""


def seen(encoder: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The features (B, C, h, w) before the convolution to mean and log-variance, and what it gives, (B, 2c, h, w)."""
    found: list[Tensor] = []
    hook = encoder.latent_head.register_forward_hook(lambda module, given, output: found.extend((given[0], output)))
    encoder(x)
    hook.remove()
    return found[0], found[1]


@torch.no_grad()
def look(encoder: Any, crops: Tensor) -> dict[str, float]:
    """The largest log-variance before any bound, the mean KL, and how far Adam can move a log-variance at once.

    That is by the sum of the features' magnitudes behind it, times the learning rate, times `ADAM_AFTER_QUIET`.
    """
    features, moments = seen(encoder, to_model_range(crops))
    head = encoder.latent_head
    behind = F.conv2d(features.abs(), torch.ones_like(head.weight[:1]), padding=head.padding)
    mean, logvar = moments.double().chunk(2, dim=1)
    kl = 0.5 * (mean.square() + logvar.clamp(*latent.LOGVAR_RANGE).exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
    return {"kl": float(kl), "logvar": float(logvar.max()), "behind": float(behind.max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--kick", type=int)
    parser.add_argument("--former", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.former:
        latent._clamped = lambda values, lowest, highest: values.clamp(lowest, highest)
        latent.DiagonalGaussian.bounded = lambda self: self  # type: ignore[method-assign, assignment]
    file = Path(__file__).with_suffix(".yaml")
    given = read_yaml(file.read_text(encoding="utf-8"), str(file))
    given["training"] |= {"steps": args.steps, "lr": args.lr, "seed": args.seed}
    given["data"]["root"] = str(args.photos)
    config = RunConfig.from_mapping(given)
    photos, training, size = images(args.photos), config.training, config.data.image_size
    torch.manual_seed(args.seed)
    step = build_step(config)
    place_step(step, config, torch.device("cpu"))
    encoder, optimizer = step.model.encoder, build_optimizer(step, training)
    run = {"seed": args.seed, "lr": args.lr, "former": args.former, "kick": args.kick}
    history: list[float] = []
    before: tuple[Any, Tensor] | None = None
    largest = {"rise": 0.0}

    def write(line: dict[str, Any]) -> None:
        line = run | {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}
        print(json.dumps(line), flush=True)
        with args.results.open("a", encoding="utf-8") as results:
            results.write(json.dumps(line) + "\n")

    for number in range(args.steps):
        generator = torch.Generator().manual_seed(args.seed * 10**6 + number)
        chosen = torch.randint(len(photos), (training.batch_size,), generator=generator).tolist()
        crops = torch.stack([random_scaled_crop(photos[i], size, config.data.aug_scale, generator) for i in chosen])
        now = look(encoder, crops)
        if before is not None:
            former, earlier = before
            rise = look(encoder, earlier)["logvar"] - look(former, earlier)["logvar"]
            rate = optimizer.param_groups[0]["lr"]
            if len(history) >= 100 and rise > largest["rise"] and number - 1 != args.kick:
                reach = rate * ADAM_AFTER_QUIET * look(former, earlier)["behind"]
                largest = {"rise": rise, "reach": reach, "lr": rate, "step": number - 1}
            typical = statistics.median(history[-100:]) if len(history) >= 100 else float("inf")
            if now["kl"] > JUMP * typical or (args.kick is not None and 0 <= number - args.kick <= KICKED):
                told = {"batch": look(former, crops)["logvar"], "weights": look(encoder, earlier)["logvar"]}
                write({"step": number, "typical": typical, **now, "rise": rise, **told})
        history.append(now["kl"])
        before = copy.deepcopy(encoder), crops
        places = range(number * training.batch_size, (number + 1) * training.batch_size)
        losses = step(crops, *draw_noise(step.model, size, args.seed, training.batch_size, places, "cpu"))
        if number == args.kick:
            (-1e3 * seen(encoder, to_model_range(crops))[1].chunk(2, dim=1)[1].mean()).backward()
        else:
            losses.total.backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), training.gradient_clip or float("inf"))
        set_learning_rate(optimizer, training.learning_rate((number + 1) / args.steps))
        optimizer.step()
        optimizer.zero_grad()
        if number % 500 == 499:
            print(f"{number + 1} steps, KL {statistics.median(history[-100:]):.1f}, {largest}", flush=True)
        if args.kick is not None and number == args.kick + KICKED:
            break
    write(
        {
            "steps": args.steps,
            "kl": statistics.median(history[-100:]),
            **{f"largest_{k}": v for k, v in largest.items()},
        }
    )


if __name__ == "__main__":
    main()
