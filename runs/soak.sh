#!/usr/bin/env bash
# A bad day: the demo's trainer, in small, killed and starved and lied to, and started again each time. Every run has to end with the
# weights, moments and log of one that nobody disturbed, bit for bit. Prints the figures of docs/promises.md (tests/soak.py does the work).
#   runs/soak.sh                        50 kills and 15 each of SIGTERM, damaged states and full disks; some ten minutes on two CPU cores
#   PROCESSES=2 runs/soak.sh            the same of two processes under torchrun
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/soak}
PYTHON=${PYTHON:-.venv/bin/python}
PROCESSES=${PROCESSES:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=.
rm -rf "$OUT" && mkdir -p "$OUT"
"$PYTHON" data/demo/prepare.py --out="$OUT/data" --n_dialogue=64 --n_clip=200 | tail -n 1
"$PYTHON" tests/soak.py "$OUT" "${KILLS:-50}" "${OTHERS:-15}" "$PROCESSES" config/demo.py --data="$OUT/data" \
    --stages=asr.user+tts.assistant:40,duplex3:160 --n_layer=2 --n_embd=64 --n_head=2 --n_inner=128 --batch_size=2 --n_listen=1 \
    --eval_interval=40 --log_interval=10 --save_interval_sec=0.5 --tensorboard=false --timeout_sec=20
