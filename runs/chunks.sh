#!/usr/bin/env bash
# Chunks of 80, 200, 400 and 800 ms: what a model trained with each answers, and when that is heard: the table of docs/talk.md.
#   runs/chunks.sh                      twenty minutes on two CPU cores with bf16 units, half of it training; needs the demo's data
#   DURATION=20 RESULT= runs/chunks.sh  does it run?
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-out/claims}          # the models are those of runs/claims.sh, its first seed: what is trained already is taken
DURATION=${DURATION:-120}       # seconds of conversation
RESULT=${RESULT-bench/results/chunks.json}
PYTHON=${PYTHON:-.venv/bin/python}
export OUT PYTHON DURATION
LINES='base chunks_of_80_ms chunks_of_200_ms chunks_of_800_ms' SEEDS=1 RESULT='' FIGURE='' runs/claims.sh

runs=()
for line in chunks_of_80_ms chunks_of_200_ms base chunks_of_800_ms; do
    run=$OUT/$line/1
    runs+=("$run")
    [ -f "$run/talk/user.json" ] && continue        # measured by an earlier try
    CHECKPOINT=$run BROWSER='' TALKERS=1 OUT=$OUT.talk RESULT='' runs/talk.sh
    mkdir -p "$run/talk" && cp "$OUT.talk/1/user.json" "$run/talk/user.json"
done
echo
$PYTHON -m measures.talks "${runs[@]}" ${RESULT:+--write="$RESULT"}
