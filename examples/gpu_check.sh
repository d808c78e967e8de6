#!/usr/bin/env bash
# One GPU: time and memory of a step of each paper preset with the whole objective, then 500 steps on real images.
#   examples/gpu_check.sh PHOTOS OUT
# 128 px, batch 192, bfloat16. Without backbone weights on the machine (DC_SSDAE_WEIGHTS), give WEIGHTS=random: times,
# memory and finiteness stay what they are, values of LPIPS and REPA mean nothing.
set -euo pipefail
if [ $# -ne 2 ]; then
  echo "usage: $0 PHOTOS OUT" >&2
  exit 2
fi
photos=$1 out=$2
mkdir -p "$out"
common=(--data.image_size 128 --training.batch_size 192 --training.precision bfloat16)
backbones=()
if [ -n "${WEIGHTS:-}" ]; then
  backbones=(--losses.lpips.init_args.weights "$WEIGHTS" --losses.repa.init_args.weights "$WEIGHTS")
fi
for preset in ${PRESETS:-vq_f8c4_fm dc_f32c32_fm dc_f32c32_eqm dc_f64c128_eqm dc_f128c512_eqm}; do
  dc-ssdae bench train --config "$preset" "${common[@]}" --json > "$out/$preset.bench.json"
  dc-ssdae train --config "$preset" "${common[@]}" ${backbones[@]+"${backbones[@]}"} --data.root "$photos" \
    --training.steps "${STEPS:-500}" --training.max_skipped_steps 1 --training.checkpoint_every 500 \
    --training.evaluate_every 500 --training.output "$out/$preset"
  python3 - "$out/$preset" <<'PY'
import json, statistics, sys
lines = [json.loads(line) for line in open(f"{sys.argv[1]}/metrics.jsonl")]
rates = [line["images_per_second"] for line in lines[len(lines) // 5 :]]
skipped = sum("skipped" in line for line in lines)
print(f"{sys.argv[1]}: {len(lines)} steps, {skipped} not finite, median {statistics.median(rates):.1f} images/s, "
      f"{lines[-1]['memory_gib']:.1f} GiB, loss {lines[0]['loss/total']:.4f} -> {lines[-1]['loss/total']:.4f}")
PY
done
