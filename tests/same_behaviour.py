"""Whether another revision behaves as this working tree does: python tests/same_behaviour.py REVISION.

A refactor shows that what users have stays as it is: losses of short runs to the bit, configurations, files of saved
models, and what is refused. Everything runs through the command line, in both trees, and the outcomes are compared.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = ("images_per_second", "seconds", "memory_gib")
PHOTOS = "--data.dataset.class_path=dc_ssdae.data.sample_photos.SamplePhotos --data.dataset.init_args.split=train"
RECIPE = f"""
train --recipe three_phase --config demo --training.output recipe {PHOTOS} --data.image_size=32 --data.workers=0
--model.dynamics.init_args.prediction=field --losses.lpips=0 --losses.repa=0
--training.optimizer=schedule_free_radam --training.batch_size=4 --training.steps=7
"""
RUNS = {
    "demo": "demo --steps 20 --out demo",
    "recipe": RECIPE,
    "resumed": "train --resume recipe --phases.decoder_refinement.training.steps=20",
    "distillation": f"distill --teacher demo --steps 2 --training.output distillation --training.steps=20 {PHOTOS}",
}
REFUSED = """
trian
train demo
train --config nope
train --config demo --training.lr=fast
train --config demo --training.stepz=3
train --config demo --data.root=nowhere
train --config demo --model.encoder.class_path=Nothing --data.root=.
train --config demo --losses.nothing=1
train --resume demo --training.lr=1
train --recipe three_phase --config demo --phases.nothing.training.steps=3
distill --teacher nowhere
reconstruct nothing.png --out out
decode photo.png --out out
info nothing
eval --data nowhere
convert diffusers nowhere --out out2
pack . out4 --format png --quality 3
""".strip().splitlines()


def observe(tree: Path) -> dict[str, Any]:
    """Everything that is compared, of the package in `tree`."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dc_ssdae", *words.split()]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for run_name, words in RUNS.items():
            done = run(words)
            found[f"run {run_name}"] = done.stderr[-2000:] if done.returncode else "ends well"
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
            found[f"preset {preset}"] = run(f"train --config {preset} --print_config").stdout
            found[f"info {preset}"] = run(f"info {preset} --json").stdout
        (folder / "photo.png").write_bytes(b"no photo")
        for line in REFUSED:
            done = run(line)
            messages = [text for text in done.stderr.strip().splitlines() if not text.startswith(("W", "E0", "I0"))]
            found[f"refused: {line}"] = (done.returncode, len(messages), messages[-1:] or "")
    return found


def main() -> int:
    """Print what differs; gives 1 where anything does but the wording of messages."""
    with tempfile.TemporaryDirectory() as name:
        archive = subprocess.run(["git", "-C", ROOT, "archive", sys.argv[1]], stdout=subprocess.PIPE, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(name, filter="data")
        before = observe(Path(name))
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
