#!/usr/bin/env bash
# Chunks of 80, 200, 400 and 800 ms: the demo trained with each, what it answers, and when that is heard: the table of docs/talk.md.
#   runs/chunks.sh                                     twenty minutes on two CPU cores with bf16 units; needs the demo's data
#   STEPS=20 DURATION=20 RESULT= runs/chunks.sh        does it run?
set -euo pipefail
cd "$(dirname "$0")/.."

DATA=${DATA:-data/demo}
OUT=${OUT:-out/chunks}
STEPS=${STEPS:-1200}
DURATION=${DURATION:-120}       # seconds of conversation
RESULT=${RESULT-bench/results/chunks.json}
PYTHON=${PYTHON:-.venv/bin/python}
export PYTHON DURATION
[ -f "$DATA/train.arrow" ] || $PYTHON data/demo/prepare.py --out="$DATA"

# Five text tokens a second, as the demo has; a chunk of 80 ms cannot have less than one, which is what Moshi and NeMo's duplex give it.
# The longest dialogue, 9.2 s, has 575 tokens in chunks of 80 ms, so all rows are of 576 here (the demo's: 512).
runs=()
for chunk in '2 1' '5 1' '10 2' '20 4'; do
    read -r speech text <<< "$chunk"
    run=$OUT/$speech
    runs+=("$run")
    [ -f "$run/talk/user.json" ] && continue        # measured by an earlier try
    echo; echo "== $((40 * speech)) ms"
    $PYTHON train.py config/demo.py --data="$DATA" --stages="asr.user+tts.assistant:$((STEPS * 5 / 24)),duplex3:$((STEPS - STEPS * 5 / 24))" \
        --speech_chunk="$speech" --text_chunk="$text" --block_size=576 --batch_tokens=2304 --batch_size=4 --n_listen=0 --out_dir="$run" --resume=true
    $PYTHON evaluate.py --checkpoint="$run" --data="$DATA" --n_report=0
    CHECKPOINT=$run TALKERS=1 OUT=$OUT/talk RESULT='' runs/talk.sh
    mkdir -p "$run/talk" && cp "$OUT/talk/1/user.json" "$run/talk/user.json"
done
echo
$PYTHON -m measures.talks "${runs[@]}" ${RESULT:+--write="$RESULT"}
