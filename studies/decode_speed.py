"""Time decoders as programs get them, each in a process of its own; the processes take turns.

    python studies/decode_speed.py RESULTS.json [--size 256,512] [--rounds 3] [MODEL ...]

MODEL is as `dc-ssdae bench decode` takes it, which measures all models in one process that keeps its freed memory. Here
a process does so only where `kept:` stands before its MODEL. One image, float32, one thread; medians of processor time.
Ratios are to the first MODEL, round by round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from dc_ssdae import keep_freed_memory
from dc_ssdae.evaluation.candidates import PythonCandidate, open_candidate, parse_candidate
from dc_ssdae.timing import describe_machine

S = "preset:sd_f8c4_frozen_eqm"
MODELS = ["diffusers:AutoencoderKL", S, f"kept:{S}", "preset:fast_f8c16", "diffusers:AutoencoderTiny"]


@torch.inference_mode()
def serve(model: str) -> None:
    """Decode a latent for each size that comes in, and tell the seconds."""
    if model.startswith("kept:"):
        keep_freed_memory()
    torch.set_num_threads(1)
    candidate = open_candidate(parse_candidate(model.removeprefix("kept:")))
    assert isinstance(candidate, PythonCandidate)
    latents: dict[int, torch.Tensor] = {}
    for line in sys.stdin:
        size = int(line)
        if size not in latents:
            latents[size] = torch.randn_like(candidate.latent(candidate.encode(torch.zeros(1, 3, size, size)), None))
        begin = time.process_time()
        candidate.value.decode(latents[size], return_dict=False)
        print(time.process_time() - begin, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--size", default="256,512")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_intermixed_args()
    command = [sys.executable, __file__, "--serve"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = {
        model: subprocess.Popen(
            [*command, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=alone
        )
        for model in args.models or MODELS
    }
    figures = []
    for size in map(int, args.size.split(",")):
        seconds: dict[str, list[float]] = {model: [] for model in children}
        for round_ in range(args.rounds + 1):
            for model, child in list(children.items())[:: -1 if round_ % 2 else 1]:
                assert child.stdin
                assert child.stdout
                child.stdin.write(f"{size}\n")
                taken = float(child.stdout.readline())
                if round_:  # the first is not counted
                    seconds[model].append(taken)
        first = next(iter(seconds.values()))
        for model, times in seconds.items():
            ratio = statistics.median(base / own for base, own in zip(first, times, strict=True))
            figures.append({"model": model, "size": size, "seconds": times, "times_as_fast": ratio})
            print(f"{model} {size} px: {statistics.median(times):.3f} s, {ratio:.2f} times", flush=True)
    found = {"rounds": args.rounds, "figures": figures, "machine": describe_machine()}
    args.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for child in children.values():
        child.communicate()


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1:2] == ["--serve"] else main()
