#!/usr/bin/env bash
# Two small models with equal budgets, equilibrium matching and flow matching, and what each needs to decode well.
#   examples/sampling_study.sh PHOTOS OUT
# Half an hour on two idle CPU cores. Interrupted and started again, it goes on where it was.
set -euo pipefail
if [ $# -ne 2 ]; then
  echo "usage: $0 PHOTOS OUT" >&2
  exit 2
fi
photos=$1 out=$2
pids=()
for kind in EquilibriumMatching FlowMatching; do
  if [ -e "$out/$kind" ]; then
    OMP_NUM_THREADS=1 dc-ssdae train --resume "$out/$kind" &
  else
    OMP_NUM_THREADS=1 dc-ssdae train --config demo --data.root "$photos" --model.dynamics.class_path $kind \
      --model.dynamics.init_args.prediction image \
      --training.steps 3000 --training.lr 2e-3 --training.ema_decay 0.998 --training.evaluate_every 1000 \
      --data.workers 1 --training.output "$out/$kind" &
  fi
  pids+=($!)
done
for pid in "${pids[@]}"; do
  wait "$pid"
done
python "$(dirname "$0")/../studies/sampling.py" --model "$out/EquilibriumMatching" --baseline "$out/FlowMatching" \
  --data "$photos" --size 64 --images 100 --steps 1,2,3,4,8,16 --step_sizes default,0.5 --tolerances 0.2,0.1,0.05 --out "$out/study" --overwrite
