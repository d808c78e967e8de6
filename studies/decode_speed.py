"""Time decoders in one process as a Python program gets them, which has not called `keep_freed_memory`.

    OMP_NUM_THREADS=1 python studies/decode_speed.py RESULTS.json [--kept] [--size 256,512] [--rounds 3] [MODEL ...]

The first MODEL (as `dc-ssdae bench decode` takes it) is what ratios are to. `dc-ssdae bench decode` measures the same,
and keeps freed memory for all models alike, as --kept does here.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from dc_ssdae import keep_freed_memory
from dc_ssdae.evaluation.candidate_names import open_candidate, parse_candidate
from dc_ssdae.evaluation.speed import measure_speed
from dc_ssdae.timing import describe_machine

MODELS = ["diffusers:AutoencoderKL", "preset:sd_f8c4_frozen_eqm", "preset:fast_f8c16", "diffusers:AutoencoderTiny"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--kept", action="store_true")
    parser.add_argument("--size", default="256,512")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_intermixed_args()
    if args.kept:
        keep_freed_memory()
    torch.set_num_threads(1)
    candidates = {spec.label: open_candidate(spec) for spec in map(parse_candidate, args.models)}
    figures = []
    for size in map(int, args.size.split(",")):
        cpu = torch.device("cpu")
        for entry in measure_speed("decode", candidates, size, 1, cpu, torch.float32, args.rounds):
            figures.append(asdict(entry))
            seconds, ratio = entry.seconds.median, "" if entry.ratio is None else f"{entry.ratio.median:.2f} times"
            memory = (entry.peak_memory_bytes or 0) / 2**30
            print(
                f"{entry.label} {size} px: {seconds:.3f} s {ratio} {entry.share_of_peak:.0%} {memory:.2f} GiB",
                flush=True,
            )
    found = {"kept": args.kept, "rounds": args.rounds, "figures": figures, "machine": describe_machine()}
    args.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
