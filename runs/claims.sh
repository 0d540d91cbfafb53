#!/usr/bin/env bash
# Claims of the paper and of ours, tested on the demo: each line of measures/claims.py trained with several seeds and measured.
#   runs/claims.sh                          about an hour on two CPU cores with bf16 units; needs the demo's data
#   SEEDS='1 2 3 4 5' runs/claims.sh        more seeds: runs that are there are kept
#   LINES='base no_alignment' runs/claims.sh        only these lines
set -euo pipefail
cd "$(dirname "$0")/.."

DATA=${DATA:-data/demo}
OUT=${OUT:-out/claims}
STEPS=${STEPS:-400}
SEEDS=${SEEDS:-1 2 3}
JOBS=${JOBS:-2}                 # side by side, each on one core
LINES=${LINES:-}
RESULT=${RESULT-bench/results/claims.json}
FIGURE=${FIGURE-docs/claims.png}
PYTHON=${PYTHON:-.venv/bin/python}
export DATA OUT PYTHON
[ -z "$FIGURE" ] || $PYTHON -c 'import matplotlib' 2> /dev/null || { echo 'the figure needs matplotlib: pip install matplotlib, or FIGURE= for none'; exit 1; }
[ -f "$DATA/train.arrow" ] || $PYTHON data/demo/prepare.py --out="$DATA"

run_one() {     # name seed settings…
    run=$OUT/$1/$2
    [ -f "$run/evaluation/metrics.json" ] && return       # measured by an earlier try
    # rows of 576: in chunks of 80 ms the longest dialogue has 575 tokens
    {   $PYTHON train.py config/demo.py --data="$DATA" "${@:3}" --seed="$2" --block_size=576 --batch_tokens=2304 --batch_size=4 \
            --eval_interval=10000 --n_listen=0 --out_dir="$run" --resume=true
        $PYTHON evaluate.py --checkpoint="$run" --data="$DATA" --n_report=0
    } > "$run.log" 2>&1 || { tail -3 "$run.log"; return 255; }
    echo "$run: $(grep 'as spoken' "$run.log" | tr -s ' ')"
}
export -f run_one

for seed in $SEEDS; do
    $PYTHON -m measures.claims --list --steps="$STEPS" | while read -r name settings; do
        [ -n "$LINES" ] && [[ " $LINES " != *" $name "* ]] && continue
        mkdir -p "$OUT/$name"
        echo "$name $seed $settings"
    done
done | OMP_NUM_THREADS=1 xargs -P "$JOBS" -I{} bash -c 'run_one {}'
echo
$PYTHON -m measures.claims "$OUT" ${RESULT:+--result="$RESULT"} ${FIGURE:+--figure="$FIGURE"}
