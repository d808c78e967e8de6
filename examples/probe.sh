#!/usr/bin/env bash
# Which latent is better to generate from? Two probes of each autoencoder, by flow matching and by equilibrium matching.
#   examples/probe.sh PHOTOS OUT MODEL...        for a GPU: STEPS=50000 NETWORK=S BATCH=256
#   STEPS=100 SIZE=64 BATCH=32 examples/probe.sh PHOTOS OUT photos_f8c16       to try it out on a CPU
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: $0 PHOTOS OUT MODEL..." >&2
  exit 2
fi
photos=$1 out=$2
shift 2
for model in "$@"; do
  name=${model%%=*}
  for dynamics in flow_matching equilibrium_matching; do
    dc-ssdae probe --model "$model" --data "$photos" --size "${SIZE:-256}" --network "${NETWORK:-nano}" \
      --steps "${STEPS:-2000}" --train-batch "${BATCH:-32}" --dynamics "$dynamics" --sampling-steps 8,32,128 \
      --out "$out/$(basename "$name")-$dynamics"
  done
done
