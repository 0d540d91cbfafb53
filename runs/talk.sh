#!/usr/bin/env bash
# A conversation of ten minutes at real speed, measured at the ear, by the page in Chromium, with 1 and with 4 talkers: the figures
# of docs/talk.md.
#   runs/talk.sh                       31 minutes; nothing else should run beside it; needs what make demo trained, and Chromium
#   BROWSER= runs/talk.sh              without the page
#   DURATION=60 RESULT= runs/talk.sh   a first look, which leaves bench/results/ as it is
set -euo pipefail
cd "$(dirname "$0")/.."

CHECKPOINT=${CHECKPOINT:-out/demo}
TALKERS=${TALKERS:-1 4}
DURATION=${DURATION:-600}       # seconds
BROWSER=${BROWSER-yes}
OUT=${OUT:-out/talk}
RESULT=${RESULT-bench/results/talk.json}
PYTHON=${PYTHON:-.venv/bin/python}

# questions in voices that are heard nowhere in training; hardly a noise, as one that comes with each question would count as its start
mkdir -p "$OUT/questions"
say() { [ -f "$OUT/questions/$1.wav" ] || $PYTHON data/demo/prepare.py --say="$2" --voice="$1" --sample_rate=16000 --snr_db=60 --wav="$OUT/questions/$1.wav"; }
say linda  'What is the capital of Japan?'
say Andy   'What is two plus three?'
say f2     'Tell me the capital of Egypt.'
say pablo  'What is your name?'
say steph  'What is the capital of Canada?'
say m3     'How are you today?'
say Alicia 'What is one plus one?'
say edward 'Tell me the capital of Russia.'
say Gene   'Tell me a joke.'
say zac    'What is the capital of Peru?'
$PYTHON -m live.questions "$OUT"/questions/*.wav --sec="$DURATION" --out="$OUT/user.wav"

figures=()
if [ "$BROWSER" ]; then
    $PYTHON talk.py --checkpoint="$CHECKPOINT" --user="$OUT/user.wav" --browser=true --reply_sec=0 --out="$OUT/browser"
    figures+=("$OUT/browser/user.json")
fi
for n in $TALKERS; do
    $PYTHON talk.py --checkpoint="$CHECKPOINT" --user="$OUT/user.wav" --n_user="$n" --max_talkers="$n" --reply_sec=0 --out="$OUT/$n"
    figures+=("$OUT/$n/user.json")
done
$PYTHON -m measures.talks "${figures[@]}" ${RESULT:+--write="$RESULT"}
