"""What the probe measures: encoders beside controls, latents spoilt on purpose, and samplers of both dynamics.

    python studies/probe.py STUDY --data DIR --out DIR [--weights DIR] [--steps N] [--seeds N]

STUDY is spoilt, encoders or dynamics; picture draws docs/probe_samples.jpg of the encoders' samples. Each probe is a
run of `dc-ssdae probe` in OUT, which goes on where it was interrupted; its figures become a line of
results/probe.jsonl, in the place of an earlier one of the same probe.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dc_ssdae import DCSSDAE
from dc_ssdae.data.images import to_uint8
from dc_ssdae.evaluation.candidates import load_saved_model
from dc_ssdae.presets import SHIPPED_MODEL
from dc_ssdae.randomness import named_generator

RESULTS = Path(__file__).resolve().parents[1] / "results" / "probe.jsonl"


class Spoilt:
    """The shipped model, whose latents are spoilt image by image; decoding knows nothing of it."""

    def __init__(self) -> None:
        self.model: DCSSDAE = load_saved_model(SHIPPED_MODEL, torch.float32, ())

    def encode(self, x: Tensor) -> Tensor:
        latents = self.model.encode(x).latent_dist.mode()
        # By the image, so that it is spoilt alike whenever it is encoded.
        generators = [named_generator(0, str(image.numpy().tobytes())) for image in to_uint8(x)]
        spoilt = [self.spoil(latent, generator) for latent, generator in zip(latents, generators, strict=True)]
        return torch.stack(spoilt)

    def spoil(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        return self.model.decode(z).sample


class Noisy(Spoilt):
    """With noise of each channel's own standard deviation."""

    def spoil(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        std = torch.tensor(self.model.config.latents_std).view(-1, 1, 1)
        return latent + std * torch.randn(latent.shape, generator=generator)


class Shuffled(Spoilt):
    """With the channels in another order in each image."""

    def spoil(self, latent: Tensor, generator: torch.Generator) -> Tensor:
        return latent[torch.randperm(len(latent), generator=generator)]


def studies(weights: Path) -> dict[str, dict[str, list[str]]]:
    """The probes of each study: options by name."""
    flow, equilibrium = ["--dynamics", "flow_matching"], ["--dynamics", "equilibrium_matching"]
    steps = ["--sampling-steps", "4,8,16,32,64,128"]
    return {
        "spoilt": {
            "clean": ["--model", f"clean={SHIPPED_MODEL}"],
            "noise": ["--model", "noise=python:probe.Noisy"],
            "shuffled channels": ["--model", "shuffled channels=python:probe.Shuffled"],
        },
        "encoders": {
            SHIPPED_MODEL: ["--model", SHIPPED_MODEL],
            "TAESD3": ["--model", f"TAESD3=diffusers:{weights / 'taesd3'}"],
            "TAESD": ["--model", f"TAESD=diffusers:{weights / 'taesd'}"],
            "random encoder": ["--model", "random encoder=preset:fast_f8c16"],
            "pixels": ["--model", "pixels=pixels:8"],
        },
        "dynamics": {
            "flow matching": ["--model", SHIPPED_MODEL, *flow, *steps],
            "equilibrium matching": ["--model", SHIPPED_MODEL, *equilibrium, *steps],
        },
    }


def run(study: str, name: str, seed: int, words: list[str], out: Path) -> dict[str, Any]:
    """Run a probe, unless its report is there, and read its figures."""
    folder = out / f"{study}-{name.replace(' ', '_')}-{seed}"
    if not (folder / "probe.json").is_file():
        command = [sys.executable, "-m", "dc_ssdae", "probe", *words, "--seed", str(seed), "--out", str(folder)]
        subprocess.run(command, check=True, cwd=Path(__file__).parent)  # where probe.Noisy is found
    found = json.loads((folder / "probe.json").read_text())
    kept = ("loss", "copying", "distances", "levels", "field_loss", "clean_error", "seconds_per_sample", "about")
    return {"study": study, "variant": name, "seed": seed, **{key: found[key] for key in kept}}


def picture(out: Path) -> None:
    """Draw samples of each encoder's probe into docs/probe_samples.jpg."""
    from matplotlib.figure import Figure

    found = {name: out / f"encoders-{name.replace(' ', '_')}-0" / "samples.png" for name in studies(out)["encoders"]}
    figure = Figure(figsize=(8.4, 0.98 * len(found)), dpi=130, layout="constrained")
    for axes, (name, file) in zip(figure.subplots(len(found), 1), found.items(), strict=True):
        with Image.open(file) as samples:
            side = samples.width // 8
            wide = Image.new("RGB", (12 * side, side))
            wide.paste(samples.crop((0, 0, 8 * side, side)), (0, 0))
            wide.paste(samples.crop((0, side, 4 * side, 2 * side)), (8 * side, 0))
        axes.imshow(wide, interpolation="lanczos")
        axes.set_title(name, loc="left", fontsize=10)
        axes.axis("off")
    figure.savefig(RESULTS.parents[1] / "docs" / "probe_samples.jpg", pil_kwargs={"quality": 88})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["spoilt", "encoders", "dynamics", "picture"])
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=Path("../shared/weights"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    if given.study == "picture":
        picture(given.out)
        return
    shared = ["--data", str(given.data.resolve()), "--size", "64", "--steps", str(given.steps), "--workers", "0"]
    shared += ["--device", "cpu", "--samples", str(given.samples)]
    for seed in range(given.seeds):
        for name, words in studies(given.weights.resolve())[given.study].items():
            line = run(given.study, name, seed, [*words, *shared], given.out.resolve())
            known = [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
            keys = ("study", "variant", "seed")
            known = [other for other in known if any(other[key] != line[key] for key in keys)]
            RESULTS.write_text("".join(json.dumps(entry) + "\n" for entry in [*known, line]))


if __name__ == "__main__":
    main()
