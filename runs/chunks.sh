#!/usr/bin/env bash
# Chunks of 80, 200, 400 and 800 ms: what the demo trained with each answers, and when that is heard: the table of docs/talk.md.
#   runs/chunks.sh                      a quarter of an hour on two CPU cores with bf16 units, half of it training; needs the demo's data
#   OUT=out/try STEPS=20 DURATION=20 RESULT= runs/chunks.sh      does it run?
set -euo pipefail
cd "$(dirname "$0")/.."

DATA=${DATA:-data/demo}
OUT=${OUT:-out/chunks}          # what is trained or measured there already is taken
STEPS=${STEPS:-1200}            # as many as config/demo.py
DURATION=${DURATION:-120}       # seconds of conversation
JOBS=${JOBS:-2}                 # side by side, each on one core
RESULT=${RESULT-bench/results/chunks.json}
PYTHON=${PYTHON:-.venv/bin/python}
export DATA OUT STEPS DURATION PYTHON

train() {       # frames of speech and tokens of text a chunk
    run=$OUT/$(($1 * 40))_ms
    [ -f "$run/evaluation/metrics.json" ] && return
    # rows of 576: in chunks of 80 ms the longest dialogue has 575 tokens
    {   $PYTHON train.py config/demo.py --data="$DATA" --speech_chunk="$1" --text_chunk="$2" --stages="duplex3:$STEPS" --block_size=576 \
            --batch_tokens=2304 --batch_size=4 --eval_interval=10000 --n_listen=0 --out_dir="$run" --resume=true
        $PYTHON evaluate.py --checkpoint="$run" --data="$DATA" --n_report=0
    } > "$run.log" 2>&1 || { tail -3 "$run.log"; return 255; }
    echo "$run: $(grep 'as spoken' "$run.log" | tr -s ' ')"
}
export -f train
mkdir -p "$OUT"
printf '%s\n' '2 1' '5 1' '10 2' '20 4' | OMP_NUM_THREADS=1 xargs -P "$JOBS" -I{} bash -c 'train {}'

runs=()
for ms in 80 200 400 800; do
    run=$OUT/${ms}_ms
    runs+=("$run")
    [ -f "$run/talk/user.json" ] && continue        # measured by an earlier try
    CHECKPOINT=$run BROWSER='' TALKERS=1 OUT=$OUT.talk RESULT='' runs/talk.sh
    mkdir -p "$run/talk" && cp "$OUT.talk/1/user.json" "$run/talk/user.json"
done
echo
$PYTHON -m measures.talks "${runs[@]}" ${RESULT:+--write="$RESULT"}
