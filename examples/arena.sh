#!/usr/bin/env bash
# A model that is trained here, against small autoencoders of diffusers (random weights), JPEG and plain resizing.
#   examples/arena.sh PHOTOS OUT
# Six minutes on two idle CPU cores, five of them the training; STEPS=100 makes it short,
# LIMIT=10 compares fewer photos than 30. Open OUT/arena/index.html.
set -euo pipefail
if [ $# -ne 2 ]; then
  echo "usage: $0 PHOTOS OUT" >&2
  exit 2
fi
photos=$1 out=$2
if [ -e "$out/model" ]; then
  dc-ssdae train --resume "$out/model"
else
  dc-ssdae train --config demo --data.root "$photos" --training.steps "${STEPS:-1500}" --training.lr 2e-3 \
    --training.ema_decay 0.99 --training.output "$out/model"
fi
python "$(dirname "$0")/peers.py" "$out/peers"
dc-ssdae compare ours="$out/model" diffusers:"$out"/peers/AutoencoderKL diffusers:"$out"/peers/AutoencoderDC \
  diffusers:"$out"/peers/AutoencoderTiny jpeg:75 jpeg:20 bicubic:8 \
  --data "$photos" --size 128 --limit "${LIMIT:-30}" --out "$out/arena" --overwrite
