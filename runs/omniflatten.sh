#!/usr/bin/env bash
# OmniFlatten (arXiv:2410.17799), from corpora to a model that listens and talks, on eight A100s: the whole recipe, to be read
# and to be run. Everything that is killed goes on where it was when this is started again. runs/rehearsal.sh is the same in
# small, on a laptop, in a minute.
#   QWEN2=… COSYVOICE=… runs/omniflatten.sh
set -euo pipefail
cd "$(dirname "$0")/.."

# What you bring: the weights, the corpora, the texts.
QWEN2=${QWEN2:-models/Qwen2-0.5B}                           # huggingface.co/Qwen/Qwen2-0.5B (or Qwen2-1.5B, Qwen2.5-0.5B)
COSYVOICE=${COSYVOICE:-models/CosyVoice-300M-25Hz}          # modelscope.cn/iic/CosyVoice-300M-25Hz
COSYVOICE_PYTHON=${COSYVOICE_PYTHON:-envs/cosyvoice/bin/python}     # of the environment that its checkout wants
COSYVOICE_CHECKOUT=${COSYVOICE_CHECKOUT:-src/CosyVoice}
SPEECH=${SPEECH:-corpora/librispeech.jsonl corpora/wenetspeech.jsonl}       # a JSON line an utterance: {"key", "wav", "txt"}
TEXTS=${TEXTS:-corpora/alpaca.json corpora/moss.jsonl corpora/belle.jsonl corpora/ultrachat.jsonl}
USER_VOICES=${USER_VOICES:-corpora/voices}                  # prompt wavs of many speakers, each with its words in a .txt
ASSISTANT_VOICE=${ASSISTANT_VOICE:-corpora/assistant.wav}   # one voice
NOISE=${NOISE:-corpora/musan}
N_GPU=${N_GPU:-8}
run() { torchrun --standalone --nproc_per_node="$N_GPU" --max_restarts=2 "$@"; }      # a process that dies is started again, and all go on
say() { echo; echo "== $*"; }

say 'codec: CosyVoice tokens, 4096 codes at 25 Hz'
worker="$COSYVOICE_PYTHON codec/cosyvoice_worker.py --checkout=$COSYVOICE_CHECKOUT --model=$COSYVOICE --voice=$ASSISTANT_VOICE"
[ -f codecs/s3/codec.json ] || python -m codec s3 --checkpoint="$COSYVOICE/speech_tokenizer_v1.onnx" --out=codecs/s3 --vocoder="$worker"

say 'speech with its text, for alignment'
aligned=()
for manifest in $SPEECH; do
    name=$(basename "$manifest" .jsonl)
    run data/manifest/prepare.py "$manifest" --codec=codecs/s3 --out="data/$name"
    aligned+=("data/$name")
done

say 'dialogues: texts, spoken on two channels. Barge-in as in the second version of the paper, which has no backchannels'
# shellcheck disable=SC2086
run data/simulate.py $TEXTS --codec=codecs/s3 --out=data/dialogues --tts=cosyvoice --tts_command="$worker" --user_voices="$USER_VOICES" \
    --assistant_voice="$ASSISTANT_VOICE" --noise="$NOISE" --p_backchannel=0 --p_hesitate=0

# The paper's learning rate, rows and epochs are in the configs. Its batch of 100 M tokens stays for alignment; in dialogues it
# would be 20 steps in all (known from arithmetic: 2,000 h are 400 M tokens), so here they are of 1 M: 8 * 131,072
dialogue=(--batch_tokens=1048576 --warmup_steps=100 --eval_interval=200 --log_interval=10)

say '1: alignment';     run train.py config/align.py        --resume=true --init_from="$QWEN2" --data="$(IFS=,; echo "${aligned[*]}")"
say '2: half-duplex';   run train.py config/half_duplex.py  --resume=true "${dialogue[@]}"
say '3: three streams'; run train.py config/duplex3.py      --resume=true "${dialogue[@]}"
say '4: two streams';   run train.py config/duplex2.py      --resume=true "${dialogue[@]}"

say 'listen, and measure'
for corpus in "${aligned[@]}"; do
    python evaluate.py --checkpoint=out/align --data="$corpus" --out="out/align/evaluation/$(basename "$corpus")"
done
for model in duplex3 duplex2; do
    python sample.py --checkpoint="out/$model" --data=data/dialogues --n_dialogue=8
    python evaluate.py --checkpoint="out/$model" --data=data/dialogues
done
