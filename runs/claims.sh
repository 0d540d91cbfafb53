#!/usr/bin/env bash
# Claims of the paper and of ours, tested on the demo: each line of measures/claims.py trained with several seeds and measured.
#   runs/claims.sh                          an hour and a half on two CPU cores with bf16 units; needs the demo's data
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

read_text() {   # seed: a model of the dialogues' text, whose folder has rows for text alone, as Qwen2's has
    text=$OUT/of_text/$1
    [ -f "$text/model.safetensors" ] && return
    echo "$text: a model of the dialogues' text, from which lines start"
    $PYTHON train.py config/demo.py --data="$DATA" $base --stages=text:300 --optimizer=adamw --seed="$1" --eval_interval=10000 --n_listen=0 \
        --out_dir="$text.run" --resume=true > "$text.log" 2>&1 || { tail -3 "$text.log"; exit 1; }
    rm -rf "$text"
    $PYTHON - "$text.run" "$DATA/tokenizer" "$text" << 'END'
import shutil, sys
from dataclasses import replace
import torch
from model import Qwen2
from vocabulary import Vocabulary
run, tokenizer, text = sys.argv[1:]
model, n_text = Qwen2.from_pretrained(run), Vocabulary.load(run).n_text
model.model.embed_tokens.weight = torch.nn.Parameter(model.model.embed_tokens.weight[:n_text].clone())
model.config = replace(model.config, vocab_size=n_text)
shutil.copytree(tokenizer, text)
model.save_pretrained(text)
END
}

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

lines=$($PYTHON -m measures.claims --list --steps="$STEPS")
base=$(sed -n 's/^base \(.*\) --stages=.*/\1/p' <<< "$lines")
mkdir -p "$OUT/of_text"
for seed in $SEEDS; do
    [[ -n "$LINES" && "$LINES" != *from_text* ]] || read_text "$seed"
done

for seed in $SEEDS; do
    while read -r name settings; do
        [ -n "$LINES" ] && [[ " $LINES " != *" $name "* ]] && continue
        mkdir -p "$OUT/$name"
        echo "$name $seed ${settings//TEXT/$OUT/of_text/$seed}"
    done <<< "$lines"
done | OMP_NUM_THREADS=1 xargs -P "$JOBS" -I{} bash -c 'run_one {}'
echo
$PYTHON -m measures.claims "$OUT" ${RESULT:+--result="$RESULT"} ${FIGURE:+--figure="$FIGURE"}
