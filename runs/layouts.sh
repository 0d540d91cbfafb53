#!/usr/bin/env bash
# Every layout that fits the demo's data (one code a frame), trained for the same steps and measured: the table of docs/layouts.md.
# It is a smoke test of all of them and a first look, no ranking: 300 steps are a quarter of the demo's.
#   runs/layouts.sh                        a minute or two a layout on two CPU cores with bf16 units; needs the demo's data
#   STEPS=1200 runs/layouts.sh             as long as the demo
set -euo pipefail
cd "$(dirname "$0")/.."

DATA=${DATA:-data/demo}
STOP_DATA=${STOP_DATA:-out/stop_phrases}
OUT=${OUT:-out/layouts}
STEPS=${STEPS:-300}
PYTHON=${PYTHON:-.venv/bin/python}
[ -f "$DATA/train.arrow" ] || $PYTHON data/demo/prepare.py --out="$DATA"

runs=()
for layout in asr tts half_duplex duplex3 duplex2 blsp salm usdm_pretrain usdm_sft glm4voice mini_omni2_irq outetts syncllm nemo_duplex; do
    runs+=("$OUT/$layout")
    [ -f "$OUT/$layout/evaluation/metrics.json" ] && continue       # measured by an earlier try
    echo; echo "== $layout"
    data=$DATA chunk=()
    if [ "$layout" = mini_omni2_irq ]; then     # a model that hears the user alone needs words that stop it
        data=$STOP_DATA chunk=(--speech_chunk=5)
        $PYTHON data/stop/prepare.py --codec="$DATA" --tokenizer="$DATA/tokenizer" --n_sample=1500 --val_share=0.05 --test_share=0.2 --out="$data"
    fi
    $PYTHON train.py config/demo.py --data="$data" --stages="$layout:$STEPS" "${chunk[@]}" --batch_size=4 --n_listen=0 \
        --eval_interval="$STEPS" --out_dir="$OUT/$layout" --resume=true
    $PYTHON sample.py --checkpoint="$OUT/$layout" --data="$data" --n_dialogue=2 --max_new_tokens=200
    $PYTHON evaluate.py --checkpoint="$OUT/$layout" --data="$data" --n_dialogue=40 --n_report=0
done
echo
$PYTHON -m measures.compare "${runs[@]}"
