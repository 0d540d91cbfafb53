#!/usr/bin/env bash
# What learning from its own conversations does to the demo's turns (grpo.py), against plain training for as long: the table of docs/claims.md.
#   runs/turns.sh                           a quarter of an hour on two CPU cores with bf16 units; needs out/demo from make demo
#   SEEDS=1 STEPS=3 RESULT= runs/turns.sh   does it run?
set -euo pipefail
cd "$(dirname "$0")/.."

CHECKPOINT=${CHECKPOINT:-out/demo}
DATA=${DATA:-data/demo}
OUT=${OUT:-out/turns}
STEPS=${STEPS:-40}
SEEDS=${SEEDS:-1 2 3}
RESULT=${RESULT-bench/results/turns.json}
PYTHON=${PYTHON:-.venv/bin/python}

measure() {
    [ -f "$OUT/$1/evaluation/metrics.json" ] || $PYTHON evaluate.py --checkpoint="$2" --data="$DATA" --n_report=0 --out="$OUT/$1/evaluation"
}

measure 'before/1' "$CHECKPOINT"
for seed in $SEEDS; do
    run="$OUT/its own conversations/$seed"
    $PYTHON grpo.py --init_from="$CHECKPOINT" --data="$DATA" --out_dir="$run" --n_step="$STEPS" --seed="$seed" --resume=true
    measure "its own conversations/$seed" "$run"

    # as much compute of what trained it, duplex3 on the data's dialogues, at the same learning rate. A step of grpo.py talks (a pass through
    # the model for each token), looks at what the first model would do (another), and learns (three): 5 passes of 64 conversations of
    # 506 tokens. A step of train.py is 3 passes of 2,048 tokens. 5 * 64 * 506 / (3 * 2048) = 26
    run="$OUT/plain training/$seed"
    $PYTHON train.py config/demo.py --init_from="$CHECKPOINT" --data="$DATA" --out_dir="$run" --optimizer=adamw --learning_rate=2e-4 \
        --batch_size=4 --stages="duplex3:$((STEPS * 26))" --n_listen=0 --seed="$seed" --resume=true
    measure "plain training/$seed" "$run"
done
echo
$PYTHON -m measures.claims "$OUT" ${RESULT:+--result="$RESULT"}
