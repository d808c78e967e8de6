"""The parts of the architecture against each other: one budget, three seeds, quality at 1, 2, 4 and 8 evaluations.

    DC_SSDAE_WEIGHTS=FOLDER python studies/architecture.py DATA MODELS results/architecture.jsonl [NAME ...]

DATA has train/ and validation/, folders of images; FOLDER has torchvision's SqueezeNet, for LPIPS. Each NAME is one of
`runs()`, all by default; those that the file has are left out. Ten minutes of one thread's processor time a run, f8c4,
64 px, as `studies/equal_time.py` trains. Each averaged model is kept, MODELS/NAME.
"""

import json
import time
from typing import Any

import torch
from equal_time import DECODERS, arguments, images, left, train
from other_dynamics import Deterministic
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import to_model_range, to_uint8
from dc_ssdae.data.transforms import center_crop, resize_shorter_side
from dc_ssdae.losses.perceptual import LPIPSLoss

SECONDS, SIZE, SEEDS, MARKS = 600, 64, (0, 1, 2), 6
COUNTS: dict[str, dict[str, Any]] = {str(count): {"num_steps": count} for count in (1, 2, 4, 8)}
"""What `DCSSDAE.decode` is told, by name."""

SHORTCUTS = {
    "encoder": {"init_args": {"widths": [16, 32, 64, 64], "depths": [0, 1, 1, 1], "block_shortcut": True}},
    "decoder": {"init_args": {**DECODERS[4][0]["init_args"], "block_shortcut": "cosines"}},
}


def dynamics(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": settings}


EQM, FM, PLAIN = "EquilibriumMatching", "FlowMatching", "other_dynamics.Deterministic"
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fm_field": (1, {"dynamics": dynamics(FM)}),
    "fm_image": (1, {"dynamics": dynamics(FM, prediction="image")}),
    "fm_image_unweighted": (1, {"dynamics": dynamics("other_dynamics.UnweightedFlowMatching")}),
    "eqm_field": (1, {"dynamics": dynamics(EQM)}),
    "eqm_field_truncated": (1, {"dynamics": dynamics(EQM, decay="truncated")}),
    "eqm_image": (1, {"dynamics": dynamics(EQM, prediction="image")}),
    "eqm_image_patch4": (4, {"dynamics": dynamics(EQM, prediction="image")}),
    "deterministic_patch4": (4, {"dynamics": dynamics(PLAIN)}),
    "eqm_image_patch4_shortcuts": (4, {"dynamics": dynamics(EQM, prediction="image"), **SHORTCUTS}),
    "deterministic_patch4_shortcuts": (4, {"dynamics": dynamics(PLAIN), **SHORTCUTS}),
}
"""By name: the decoder's patch, and what else of the model differs."""


def runs() -> dict[str, dict[str, Any]]:
    """By name: what `equal_time.train` takes."""
    found = {}
    for variant, (patch, parts) in VARIANTS.items():
        decoder, lr = DECODERS[patch]
        for seed in SEEDS:
            model = {"decoder": decoder, **parts}
            shared = {"size": SIZE, "seed": seed, "seconds": SECONDS}
            found[f"{variant}_seed{seed}"] = {**shared, "lr": lr, "model": model, "variant": variant}
    return found


@torch.inference_mode()
def measure(
    model: DCSSDAE, photos: list[Tensor], lpips: LPIPSLoss, decodings: dict[str, dict[str, Any]] = COUNTS
) -> dict[str, dict[str, float]]:
    """PSNR, SSIM, LPIPS, evaluations and milliseconds an image (of the decoder alone), of each way to decode."""
    measured = {}
    crops = torch.stack([center_crop(resize_shorter_side(photo, SIZE), SIZE) for photo in photos])
    x = crops.float() / 255
    z = torch.cat([model.encode(to_model_range(part)).latent_dist.mode() for part in crops.split(10)])
    is_plain = isinstance(model.dynamics, Deterministic)
    for name, settings in list(decodings.items())[: 1 if is_plain else None]:
        begin = time.process_time()
        decoded = [
            model.decode(part, **settings, noise=torch.zeros(len(part), 3, SIZE, SIZE) if is_plain else None)
            for part in z.split(10)
        ]
        milliseconds = 1000 * (time.process_time() - begin) / len(photos)
        pixels = to_uint8(torch.cat([part.sample for part in decoded]))
        spent = torch.cat([part.num_evaluations for part in decoded if part.num_evaluations is not None])
        y = pixels.float() / 255
        pairs = zip((2 * y - 1).split(10), (2 * x - 1).split(10), strict=True)
        near = torch.cat([lpips.distance(*pair) for pair in pairs])
        measured[name] = {
            "psnr": round(float((-10 * (x - y).square().flatten(1).mean(dim=1).log10()).mean()), 3),
            "ssim": round(float(structural_similarity_index_measure(y, x, data_range=1.0)), 4),
            "lpips": round(float(near.mean()), 4),
            "milliseconds": round(milliseconds, 2),
            "evaluations": round(float(spent.float().mean()), 3),
        }
    return measured


def main() -> None:
    known = runs()
    args = arguments(__doc__, known, "data", "models", "results")
    photos = {split: images(args.data / split) for split in ("train", "validation")}
    lpips = LPIPSLoss("squeeze").eval()
    for name in left(args, known):
        run = known[name]
        curve: list[dict[str, float]] = []

        def at_mark(model: DCSSDAE, seconds: float, curve: list[dict[str, float]] = curve) -> None:
            one = measure(model, photos["validation"][::3], lpips, {"1": COUNTS["1"]})["1"]
            curve.append({"seconds": round(seconds, 1), "psnr": one["psnr"], "lpips": one["lpips"]})

        model, steps = train(run, photos["train"], MARKS, at_mark)
        model.save_pretrained(args.models / name)
        line = {"name": name, "variant": run["variant"], "seed": run["seed"], "lr": run["lr"], "steps": steps}
        line |= {"evaluations": measure(model, photos["validation"], lpips), "curve": curve}
        print(json.dumps(line), flush=True)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
