#!/usr/bin/env bash
# runs/omniflatten.sh in small: the same programs and stages, in that order, from public recordings and text dialogues to a model
# that has heard a wav and written one. It learns next to nothing in its few steps: what it shows is that every part fits the next.
#   runs/rehearsal.sh                      two CPU cores, no download; espeak-ng for CosyVoice, the demo's codec for its tokens
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/rehearsal}
DATA=${DATA:-}                          # a folder with recordings and texts; without one, some are made
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
say() { echo; echo "== $*"; }
rm -rf "$OUT" && mkdir -p "$OUT/corpora"

say 'codec and BPE'
"$PYTHON" data/demo/prepare.py --out="$OUT/demo" --n_dialogue=64 --n_clip=200 | tail -n 3
codec=(--codec="$OUT/demo")

say 'Qwen2 in small, as a Hugging Face folder'
tokenizer=$OUT/demo/tokenizer
[ -d "$DATA/qwen2_tokenizer" ] && tokenizer=$DATA/qwen2_tokenizer
"$PYTHON" - "$tokenizer" "$OUT/qwen2" <<'EOF'
import shutil, sys
from vocabulary import Vocabulary
from model import ModelConfig, Qwen2
tokenizer, out = sys.argv[1:]
n_row = -(-(Vocabulary.load(tokenizer).n_text + 293) // 128) * 128       # 293 spare rows, as Qwen2 has
Qwen2(ModelConfig(n_row, 1024, n_layer=2, n_head=2, n_kv_head=1, n_embd=64, n_inner=128)).save_pretrained(out)
for name in ('tokenizer.json', 'vocab.json', 'merges.txt'):
    shutil.copy(f'{tokenizer}/{name}', out)
EOF

say 'speech with its text, for alignment: Lhotse cuts, and a manifest of audio and text'
lhotse=$DATA/lhotse/ljspeech/cuts.json
manifest=$DATA/speech/data.list
[ -f "$lhotse" ] || lhotse=
if [ ! -f "$manifest" ]; then
    manifest=$OUT/corpora/data.list
    for i in 1 2 3 4; do
        text="This is number $i, and it is made on the spot."
        "$PYTHON" data/demo/prepare.py --say="$text" --wav="$OUT/corpora/$i.wav" --voice=linda
        echo "{\"key\": \"made-$i\", \"wav\": \"$i.wav\", \"txt\": \"$text\"}" >> "$manifest"
    done
fi
aligned=$OUT/manifest:0.5
"$PYTHON" data/manifest/prepare.py "$manifest" "${codec[@]}" --out="$OUT/manifest"
if [ -n "$lhotse" ]; then
    "$PYTHON" data/lhotse/prepare.py "$lhotse" "${codec[@]}" --out="$OUT/lhotse"
    aligned=$aligned,$OUT/lhotse:0.5
fi

say 'dialogues: texts, spoken on two channels'
texts=("$DATA/text/fastchat_dummy.json" "$DATA/text/lccc_toy.json" "$DATA/text/oasst_en_100_tree.jsonl" "$DATA/text/belle_eval_set.jsonl")
if [ ! -f "${texts[0]}" ]; then
    texts=("$OUT/corpora/alpaca.json")
    "$PYTHON" - "${texts[0]}" <<'EOF'
import json, sys
json.dump([dict(instruction=f'What comes after the number {n}?', input='', output=f'After {n} comes {n + 1}.') for n in range(40)], open(sys.argv[1], 'w'))
EOF
fi
"$PYTHON" data/simulate.py "${texts[@]}" "${codec[@]}" --out="$OUT/dialogues" --max_words=8 --max_sec=20 --p_interrupt=0.3

small=(--block_size=512 --batch_size=1 --batch_tokens=512 --learning_rate=1e-3 --warmup_steps=2 --eval_interval=10 --log_interval=5 --compile=false --device=cpu)
say '1: alignment';     "$PYTHON" train.py config/align.py       "${small[@]}" --init_from="$OUT/qwen2" --data="$aligned" --out_dir="$OUT/align" --stages=asr+tts:10
say '2: half-duplex';   "$PYTHON" train.py config/half_duplex.py "${small[@]}" --init_from="$OUT/align" --data="$OUT/dialogues" --out_dir="$OUT/half_duplex" --stages=half_duplex:10
say '3: three streams'; "$PYTHON" train.py config/duplex3.py     "${small[@]}" --init_from="$OUT/half_duplex" --data="$OUT/dialogues" --out_dir="$OUT/duplex3" --stages=duplex3:20
say '4: two streams';   "$PYTHON" train.py config/duplex2.py     "${small[@]}" --init_from="$OUT/duplex3" --data="$OUT/dialogues" --out_dir="$OUT/duplex2" --stages=duplex2:10

say 'listen'
"$PYTHON" data/demo/prepare.py --say='What is the capital of Japan?' --voice=linda --wav="$OUT/question.wav"
for model in duplex3 duplex2; do
    "$PYTHON" sample.py --checkpoint="$OUT/$model" --user="$OUT/question.wav" --device=cpu
done
echo
echo "rehearsed in $SECONDS s: $OUT/duplex3/samples/question.wav has the user left, the assistant right"
