"""What several evaluations are good for: fixed numbers of them, stopping when the field is small, and distillation.

    DC_SSDAE_WEIGHTS=FOLDER python studies/decoding.py DATA MODELS results/decoding.jsonl [NAME ...]

MODELS is what `studies/architecture.py` has kept. A NAME is one of its runs, all of `VARIANTS` by default; or one of
`distilled`, whose student learns for five minutes to do in one step what that model does in eight, and is compared with
the same model trained on for the same processor time. Those that the file has are left out.
"""

import json
import time
from pathlib import Path
from typing import Any

from architecture import COUNTS, SIZE, measure, runs
from equal_time import arguments, images, left, train

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.cli.main import main as dc_ssdae
from dc_ssdae.losses.perceptual import LPIPSLoss

VARIANTS = ("fm_field", "eqm_field", "eqm_image_patch4")
DISTILLED = ("eqm_image_patch4",)
STEPS, SECONDS, LR = 8, 300, 1e-3
FIXED = {str(count): {"num_steps": count} for count in (1, 2, 3, 4, 6, 8, 16)}
STOPPED = {f"tolerance {value}": {"num_steps": 16, "tolerance": value} for value in (0.2, 0.1, 0.05, 0.025)}


def known_runs() -> list[str]:
    names = [name for name, run in runs().items() if run["variant"] in VARIANTS]
    return [*names, *(f"distilled_{name}" for name in names if runs()[name]["variant"] in DISTILLED)]


def distilled(teacher: Path, data: Path, out: Path) -> DCSSDAE:
    words = ["distill", "--teacher", teacher, "--steps", STEPS, "--data.root", data, "--data.image_size", SIZE]
    words += ["--data.aug_scale", 5.0, "--data.workers", 0, "--training.minutes", SECONDS / 60, "--training.lr", LR]
    words += ["--training.steps", "null", "--training.batch_size", 8, "--training.optimizer", "adamw"]
    words += ["--training.precision", "float32", "--training.ema_decay", 0.99]
    words += ["--losses.lpips", 0, "--training.output", out]
    if code := dc_ssdae([str(word) for word in words]):
        raise SystemExit(code)
    return DCSSDAE.from_pretrained(out / "model")


def main() -> None:
    known = known_runs()
    args = arguments(__doc__, known, "data", "models", "results")
    photos = {split: images(args.data / split) for split in ("train", "validation")}
    lpips = LPIPSLoss("squeeze").eval()
    for name in left(args, known):
        source = name.removeprefix("distilled_")
        run = runs()[source]
        line: dict[str, Any] = {"name": name, "variant": run["variant"], "seed": run["seed"]}
        if name == source:
            model = DCSSDAE.from_pretrained(args.models / source)
            stopped = STOPPED if run["variant"].startswith("eqm") else {}
            line["decodings"] = measure(model, photos["validation"], lpips, {**FIXED, **stopped})
        else:
            begin = time.process_time()
            student = distilled(args.models / source, args.data, args.models / name)
            line["seconds"] = round(time.process_time() - begin, 1)
            more = {**run, "seconds": line["seconds"], "lr": LR, "seed": run["seed"] + 1000}
            trained_on, _ = train({**more, "init": args.models / source}, photos["train"])
            for what, model in (("teacher", DCSSDAE.from_pretrained(args.models / source)), ("student", student)):
                line[what] = measure(model, photos["validation"], lpips, COUNTS)
            line["trained_on"] = measure(trained_on, photos["validation"], lpips, COUNTS)
        print(json.dumps(line), flush=True)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
