#!/usr/bin/env bash
# Three phases, a distillation and their curves for a small model on a folder of photos; minutes on two CPU cores.
#   examples/three_phases.sh PHOTOS OUT
# Interrupted and started again, it goes on where it was.
set -euo pipefail
if [ $# -ne 2 ]; then
  echo "usage: $0 PHOTOS OUT" >&2
  exit 2
fi
photos=$1 out=$2 here=$(dirname "$0")
if [ -e "$out/phases" ]; then
  dc-ssdae train --resume "$out/phases"
else
  dc-ssdae train --recipe "$here/three_phases.yaml" --config demo --data.root "$photos" --training.output "$out/phases"
fi
# RUN/model leads to the model of the last phase that has ended; another one's means that a signal came first.
if [ "$(readlink "$out/phases/model")" != 3-decoder_refinement/model ]; then
  exit 0
fi
if [ -e "$out/distilled" ]; then
  dc-ssdae distill --resume "$out/distilled"
else
  dc-ssdae distill --teacher "$out/phases" --steps 2 --training.steps 200 --training.lr 1e-3 \
    --training.output "$out/distilled"
fi
dc-ssdae curves "$out/phases" "$out/distilled" --out "$out/curves.png" --overwrite
