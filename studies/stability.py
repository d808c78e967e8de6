"""What diverges: learning rate times 1, 3 and 10, both dynamics, both predictions, encoder with and without its norm.

    OMP_NUM_THREADS=1 python studies/stability.py DATA results/stability.jsonl [NAME ...]

DATA has train/ and validation/, folders of images. Runs of 1,000 steps of 8 crops of 32 px, f8c4, the decoder of patch
1 of `studies/equal_time.py`; and KL weights from 1e-8 to 1e-4, of the same with the image as the prediction. Runs that
the file has are left out.
"""

import json
import math
import statistics
from typing import Any

import torch
from equal_time import DECODERS, SMALL, arguments, averaged, images, left
from torch import Tensor

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import to_model_range, to_uint8
from dc_ssdae.data.transforms import center_crop, random_scaled_crop, resize_shorter_side
from dc_ssdae.latent import LatentMoments
from dc_ssdae.presets import load_preset
from dc_ssdae.training.build import build_step, place_step
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.ema import ExponentialMovingAverage
from dc_ssdae.training.optimizer import build_optimizer, set_learning_rate
from dc_ssdae.training.step import draw_noise

STEPS, SIZE, BATCH, LR = 1000, 32, 8, 1e-3
ACTIVE = 0.01
"""KL in nats a value, on average, from which a channel counts as active."""


def runs() -> dict[str, dict[str, Any]]:
    """By name: what differs."""
    found = {}
    for norm in ("rms_norm", "none"):
        for dynamics in ("EquilibriumMatching", "FlowMatching"):
            for prediction in ("field", "image"):
                for factor in (1, 3, 10):
                    name = f"{dynamics}_{prediction}_{norm}_lr{factor}"
                    found[name] = {"norm": norm, "dynamics": dynamics, "prediction": prediction, "factor": factor}
    for kl in ("1e-8", "1e-7", "1e-6", "1e-5", "1e-4"):
        shared: dict[str, Any] = {"norm": "rms_norm", "dynamics": "EquilibriumMatching", "prediction": "image"}
        found[f"kl{kl}"] = {**shared, "factor": 1, "kl": float(kl)}
    return found


def train(run: dict[str, Any], photos: list[Tensor]) -> tuple[DCSSDAE, dict[str, Any]]:
    """The averaged model, and what its losses did."""
    preset = load_preset("demo")
    model = {
        **preset["model"],
        "encoder": {"init_args": {**SMALL["init_args"], "norm": run["norm"]}},
        "decoder": DECODERS[1][0],
        "dynamics": {"class_path": run["dynamics"], "init_args": {"prediction": run["prediction"]}},
    }
    losses = {**preset["losses"], "kl": run.get("kl", 1e-6)}
    training = {**preset["training"], "lr": LR * run["factor"], "batch_size": BATCH, "steps": STEPS}
    data = {"image_size": SIZE, "aug_scale": 8.0, "root": "."}
    config = RunConfig.from_mapping({"model": model, "data": data, "losses": losses, "training": training})
    torch.manual_seed(0)
    step = build_step(config)
    place_step(step, config, torch.device("cpu"))
    optimizer = build_optimizer(step, config.training)
    average = ExponentialMovingAverage(step.model, 0.99, 0)
    totals, kls, skipped = [], [], []
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number)
        chosen = torch.randint(len(photos), (BATCH,), generator=generator).tolist()
        crops = torch.stack([random_scaled_crop(photos[i], SIZE, config.data.aug_scale, generator) for i in chosen])
        noise = draw_noise(step.model, SIZE, 0, BATCH, range(number * BATCH, (number + 1) * BATCH), "cpu")
        result = step(crops, *noise)
        result.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(step.parameters(), 1.0)
        total = float(result.total.detach())
        totals.append(total)
        kls.append(float(result.terms["kl"].detach()))
        if math.isfinite(total) and math.isfinite(float(norm)):
            set_learning_rate(optimizer, config.training.learning_rate((number + 1) / STEPS))
            optimizer.step()
        else:
            skipped.append(number)
        optimizer.zero_grad()
        average.update(step.model, number + 1)
    finite = [total for total in totals if math.isfinite(total)]
    first = statistics.fmean(finite[:10]) if finite else math.nan
    # A window of 20 steps in a row whose median is above that of the start.
    above = next((i for i in range(50, STEPS - 20) if statistics.median(totals[i : i + 20]) > first), None)
    return averaged(step.model, average), {
        "skipped": len(skipped),
        "first_skipped": skipped[0] if skipped else None,
        "above_its_start": above,
        "last_loss": round(statistics.median(totals[-50:]), 5),
        "largest_kl": round(max(kls), 1),
        "last_kl": round(statistics.median(kls[-50:]), 1),
    }


@torch.inference_mode()
def measure(model: DCSSDAE, photos: list[Tensor]) -> dict[str, float]:
    """PSNR of one step and of two; the latent's standard deviation, that of its noise alone, and active channels."""
    crops = torch.stack([center_crop(resize_shorter_side(photo, SIZE), SIZE) for photo in photos])
    posterior = model.encode(to_model_range(crops)).latent_dist
    found: dict[str, float] = {}
    for steps in (1, 2):
        y = model.decode(posterior.mode(), num_steps=steps).sample
        if not y.isfinite().all():
            return {}
        error = (to_uint8(y).float() - crops.float()).square().flatten(1).mean(dim=1) / 255**2
        found[f"psnr_{steps}"] = round(float((-10 * error.log10()).mean()), 3)
    moments = LatentMoments(posterior.mean.shape[1])
    moments.add(posterior)
    _, std = moments.mean_and_std()
    assert posterior.logvar is not None
    nats = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar).mean(dim=(0, 2, 3))
    found |= {"latent_std": round(statistics.fmean(std), 4), "noise_std": round(float(posterior.std.mean()), 4)}
    return {**found, "active_channels": int((nats > ACTIVE).sum())}


def main() -> None:
    known = runs()
    args = arguments(__doc__, known, "data", "results")
    photos = {split: images(args.data / split) for split in ("train", "validation")}
    for name in left(args, known):
        model, told = train(known[name], photos["train"])
        line = {"name": name, **known[name], **told, **measure(model, photos["validation"])}
        print(json.dumps(line), flush=True)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
