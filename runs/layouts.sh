#!/usr/bin/env bash
# Every layout that fits the demo's data (one code a frame), trained for the same steps and measured: the table of docs/layouts.md.
# It is a smoke test of all of them and a first look, no ranking: 300 steps are a sixth of the demo's.
#   runs/layouts.sh                        a quarter of an hour on two CPU cores with bf16 units; needs the demo's data
#   STEPS=1900 runs/layouts.sh             as long as the demo
set -euo pipefail
cd "$(dirname "$0")/.."

DATA=${DATA:-data/demo}
OUT=${OUT:-out/layouts}
STEPS=${STEPS:-300}
PYTHON=${PYTHON:-.venv/bin/python}
[ -f "$DATA/train.arrow" ] || $PYTHON data/demo/prepare.py --out="$DATA"

for layout in asr tts half_duplex duplex3 duplex2 blsp salm usdm_pretrain usdm_sft glm4voice mini_omni2_irq outetts syncllm nemo_duplex; do
    [ -f "$OUT/$layout/evaluation/metrics.json" ] && continue       # measured by an earlier try
    echo; echo "== $layout"
    chunk=()        # a state or a step of 80 ms is two of the demo's frames
    [ "$layout" = mini_omni2_irq ] && chunk=(--speech_chunk=2)
    $PYTHON train.py config/demo.py --data="$DATA" --stages="$layout:$STEPS" "${chunk[@]}" --batch_size=4 --n_listen=0 \
        --eval_interval="$STEPS" --out_dir="$OUT/$layout" --resume=true
    $PYTHON sample.py --checkpoint="$OUT/$layout" --data="$DATA" --n_dialogue=2 --max_new_tokens=200
    $PYTHON evaluate.py --checkpoint="$OUT/$layout" --data="$DATA" --n_dialogue=40 --n_report=0
done
echo
$PYTHON -m measures.compare "$OUT"/*
