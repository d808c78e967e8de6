"""Whether another revision behaves as this working tree does: python tests/same_behaviour.py REVISION.

A refactor shows that what users have stays as it is: losses of short runs to the bit, configurations, files of saved
models, and what is refused. Everything runs through the command line, in both trees, and the outcomes are compared.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = ("images_per_second", "seconds", "memory_gib")
TINY = [
    "--model.latent_channels=4",
    "--model.downsample_factor=8",
    "--model.encoder.init_args.widths=[8,16,16,16]",
    "--model.encoder.init_args.depths=[0,1,1,1]",
    "--model.decoder.init_args.channels=8",
    "--model.decoder.init_args.multipliers=[1,1,2,2]",
    "--model.decoder.init_args.middle_layers=1",
    "--model.decoder.init_args.norm_groups=4",
    "--model.decoder.init_args.heads=2",
    "--data.dataset.class_path=dc_ssdae.data.sample_photos.SamplePhotos",
    "--data.dataset.init_args.split=train",
    "--data.image_size=32",
    "--data.workers=0",
    "--training.batch_size=4",
    "--training.precision=float32",
    "--losses.lpips=0",
]
RUNS = {
    "demo": ["demo", "--steps", "20", "--out", "demo"],
    "recipe": [
        *("train", "--recipe", "three_phase", "--training.output", "recipe", *TINY, "--training.steps=7"),
        *("--losses.repa=0", "--data.image_size=32"),
    ],
    "resumed": ["train", "--resume", "recipe", "--phases.decoder_refinement.training.steps=20"],
    "distillation": [
        *("distill", "--teacher", "demo", "--steps", "2", "--training.output", "distillation", "--training.steps=20"),
        *("--data.dataset.class_path=dc_ssdae.data.sample_photos.SamplePhotos", "--data.dataset.init_args.split=train"),
    ],
}
REFUSED = """
nothing
trian
train
train --config nope
train --config missing.yaml
train --confg demo
train demo
train --config demo --training.lr
train --config demo --training.lr=
train --config demo --training.lr=fast
train --config demo --training.lr=0
train --config demo --training.lr=-1e-3
train --config demo --training.lr=.nan
train --config demo --training.steps=2.5
train --config demo --training.steps=null --training.minutes=null
train --config demo --training.stepz=3
train --config demo --trainng.steps=3
train --config demo --training=3
train --config demo --training.betas=[0.9]
train --config demo --training.betas=[0.9,1.0]
train --config demo --training.flip=maybe
train --config demo --data.flip=maybe
train --config demo --training.precision=half
train --config demo --training.optimizer=sgd
train --config demo --training.seed=5000000000
train --config demo --training.train=[]
train --config demo --training.train=[nowhere] --data.root=.
train --config demo --training.batch_size=3 --training.accumulation_steps=2
train --config demo --training.keep_every=30
train --config demo --training.best_metric=fid
train --config demo --training.output=
train --config demo --data.image_size=20
train --config demo --data.image_size=4
train --config demo --data.root=a --data.dataset.class_path=ImageFolder
train --config demo --data.dataset.init_args.path=a
train --config demo --data.max_broken_share=2
train --config demo --model.latent_channels=0
train --config demo --model.downsample_factor=12
train --config demo --model.encoder.class_path=Nothing --data.root=.
train --config demo --model.encoder.class_path=no.such.Class --data.root=.
train --config demo --model.encoder.init_args.width=3 --data.root=.
train --config demo --model.encoder.init_args.widths=wide --data.root=.
train --config demo --model.encoder.what=3
train --config demo --losses.nothing=1
train --config demo --losses.kl=-1
train --config demo --losses.kl=strong
train --config demo --losses.kl.wait=1
train --config demo --losses.dynamics=0 --losses.kl=0
train --config demo
train --config demo --data.root=nowhere
train --config demo --resume=nowhere
train --resume nowhere
train --resume
train --resume demo --training.lr=1
train --resume demo --config demo --model.latent_channels=8
train --resume recipe --phases.low_resolution.training.lr=1
train --resume recipe --phases.nothing.training.lr=1
train --recipe nothing
train --recipe three_phase --config demo --phases.nothing.training.steps=3
train --recipe three_phase --config demo --phases.low_resolution.model.latent_channels=3
train --config demo --phases.low_resolution.training.steps=3
distill
distill --teacher nowhere
distill --teacher demo --steps 0
distill --teacher demo --step 2
distill --resume demo
reconstruct
reconstruct nothing.png --out out
reconstruct photo.png
reconstruct photo.png --out out --steps 0
reconstruct photo.png --out out --sampler fast
reconstruct photo.png --out out --tolerance -1
reconstruct photo.png --out out --momentum 2
reconstruct photo.png --out out --device tpu
reconstruct photo.png --out out --dtype int8
reconstruct photo.png --out out --model nowhere
reconstruct photo.png --out out --start 0.5
reconstruct photo.png --out out --import no.such.module
decode photo.png --out out
encode photo.png --out out --seed 3
info nothing
info --groups
eval --data nowhere
eval --data . --protocol nothing
eval --data . --metrics beauty
compare --data . --out out
compare jpeg:200 --data . --out out
stats --data .
convert
convert original nothing.safetensors --preset demo --out out2
convert diffusers nowhere --out out2
export --out demo
export --out out3 --size 1 2 3
pack nowhere out4
pack . out4 --format png --quality 3
latents nowhere out5
latents . out5 --seed 3
curves nowhere
study
study sampling --data . --samplers nothing
bench
bench nothing
bench train
bench train --config demo --compare nothing
bench decode nowhere
""".strip().splitlines()


def observe(tree: Path) -> dict[str, Any]:
    """Everything that is compared, of the package in `tree`."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(words: list[str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dc_ssdae", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for run_name, words in RUNS.items():
            done = run(words)
            found[f"run {run_name}"] = done.returncode or done.stderr[-2000:] if done.returncode else 0
        for path in sorted(folder.rglob("*")):
            key = str(path.relative_to(folder))
            if path.name == "metrics.jsonl":
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                found[key] = [{k: v for k, v in line.items() if k not in VARIABLE} for line in lines]
            elif path.name in ("config.yaml", "recipe.yaml", "config.json", "README.md", "distillation.json"):
                found[key] = path.read_text()
            elif path.suffix == ".safetensors":
                found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        for preset in sorted(path.stem for path in (tree / "src/dc_ssdae/presets").glob("*.yaml")):
            found[f"preset {preset}"] = run(["train", "--config", preset, "--print_config"]).stdout
            found[f"info {preset}"] = run(["info", preset, "--json"]).stdout
        (folder / "photo.png").write_bytes(b"no photo")
        for line in REFUSED:
            done = run(line.replace("nothing", "", 1).split() if line == "nothing" else line.split())
            messages = [text for text in done.stderr.strip().splitlines() if not text.startswith(("W", "E0", "I0"))]
            found[f"refused: {line}"] = (done.returncode, len(messages), messages[-1:] or "")
    return found


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A working tree of a revision of this repository."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)


def main() -> int:
    """Print what differs; gives 1 where anything does but the wording of messages."""
    with checkout(sys.argv[1]) as tree:
        before = observe(tree)
    after = observe(ROOT)
    differs = 0
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        only_words = key.startswith("refused") and old is not None and new is not None and old[:2] == new[:2]
        differs += not only_words
        print(f"{'words  ' if only_words else 'DIFFERS'} {key}\n  - {str(old)[:600]}\n  + {str(new)[:600]}")
    print(f"{len(before)} outcomes, {differs} differ in more than the wording of a message")
    return 1 if differs else 0


if __name__ == "__main__":
    raise SystemExit(main())
