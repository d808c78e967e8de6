#!/usr/bin/env bash
# The model that comes with the package against codecs, plain resizing and any autoencoders of diffusers.
#   examples/arena.sh PHOTOS OUT [PEER ...]
# PEER is the folder or hub id of an AutoencoderTiny, AutoencoderKL, AutoencoderDC …, such as madebyollin/taesd3. LPIPS is
# SqueezeNet's: DC_SSDAE_WEIGHTS names the folder with squeezenet1_1-b8a52dc0.pth. SIZE (256) and LIMIT (150) photos.
# Open OUT/index.html.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: $0 PHOTOS OUT [PEER ...]" >&2
  exit 2
fi
photos=$1 out=$2
shift 2
# bicubic:3.46 has as many values as a latent of f8 with 16 channels, bicubic:6.93 as one with 4.
dc-ssdae compare ours=photos_f8c16 "${@/#/diffusers:}" jpeg:30 jpeg:15 webp:20 bicubic:3.46 bicubic:6.93 \
  --data "$photos" --size "${SIZE:-256}" --limit "${LIMIT:-150}" --metrics psnr,ssim,lpips --lpips squeeze \
  --out "$out" --overwrite
