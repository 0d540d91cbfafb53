"""
Listens and talks: the user's speech goes in chunk by chunk, the assistant's text and speech come out.

    python sample.py --checkpoint=out/demo --user=question.wav      a file; stereo needs --user_channel=0 or 1
    python sample.py --checkpoint=out/demo --data=data/demo         the users of prepared dialogues

    user     ─ 10 codes ─┐                    ┌─ 10 codes ─┐
    assistant            └─► 2 text, 10 codes ┘            └─► 2 text, 10 codes     a chunk is 400 ms at 25 Hz

Writes a stereo wav (user left, assistant right) and a transcript (a JSON line for each turn, with its times)
for each dialogue, and report.html to see and hear them all. decode.py is what listens and talks.
"""
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import config
from checkpoint import check_codec, load_checkpoint
from common.audio import read_audio, write_audio
from common.device import pick_device, pick_dtype
from common.levels import is_silent
from data.dialogues import Dialogues
from decode import Sampling, converse, render, write_transcript
from flatten import ROLES
from measures import report
from measures.turns import assess, conversation, stretches

MAX_REPORT = 100        # dialogues in report.html: below 20 MB, if they last half a minute


@dataclass(frozen=True)
class Config:
    checkpoint: str = 'out/demo'        # a folder that train.py wrote: model, tokenizer, codec and layout
    user: str | None = None             # a recording of the user: wav, flac, ogg, mp3, … of any rate
    user_channel: int | None = None     # the user's channel in it, from 0; needed where there are several
    data: str | None = None             # or a data folder, to listen to the users of its dialogues
    split: str = 'test'
    n_dialogue: int = 8                 # the first so many of the split; 0: all
    out: str | None = None              # folder for what is written; None: CHECKPOINT/samples
    prompt: str | None = None           # what the assistant is told; None: with data, what each dialogue says
    reply_sec: float = 6.0              # silence after the recording, in which the assistant can answer
    text_temperature: float = 0.0       # 0: always the likeliest
    speech_temperature: float = 0.0
    text_top_k: int = 0                 # sample among the k likeliest; 0: among all
    speech_top_k: int = 0
    silence_bias: float = 0.0           # added to the logit of silent speech: below 0 talks sooner
    max_context: int | None = None      # tokens it remembers, the latest; None: the model's block_size
    seed: int = 1337
    device: str = 'auto'                # auto: a GPU if there is one
    dtype: str = 'auto'                 # float32, bfloat16, on a CPU int8; auto: see train.py
    compile: bool = False               # on a GPU: fuses the work between matmuls; a minute at the start

    def __post_init__(self):
        if self.compile and pick_device(self.device).type == 'cpu':
            raise ValueError('compile is for a GPU: on a CPU packed weights are faster than compiled ones')
        if self.dtype not in ('auto', 'float32', 'bfloat16', 'int8'):
            raise ValueError(f"dtype is {self.dtype!r}, known are 'auto', 'float32', 'bfloat16' and 'int8'")
        if (self.user is None) == (self.data is None):
            raise ValueError('give --user=FILE.wav or --data=FOLDER, one of them')
        for name in ('n_dialogue', 'reply_sec', 'text_temperature', 'speech_temperature', 'text_top_k',
                     'speech_top_k'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name} is {getattr(self, name)}, it cannot be negative')


class Heard(NamedTuple):
    """What the model listens to."""
    id: str
    codes: np.ndarray           # of the user, [n_frame]
    turns: list                 # the user's
    expected: list | None       # the assistant's in the data; None for a file
    wave: np.ndarray | None     # the user's own recording
    prompt: str


def main(cfg):
    """Decodes what cfg names and writes it. Returns the dialogues."""
    device = pick_device(cfg.device)
    checkpoint = load_checkpoint(cfg.checkpoint, device)
    codec, layout = checkpoint.codec, checkpoint.layout
    codec.decode(np.repeat(codec.silence_codes[:1], round(codec.rate_hz), 0))   # so a vocoder fails now
    start = time.perf_counter()
    heard = [listen_to_file(cfg, codec)] if cfg.user else listen_to_data(cfg, codec)
    codec_sec = time.perf_counter() - start
    sampling = Sampling(cfg.text_temperature, cfg.speech_temperature, cfg.text_top_k, cfg.speech_top_k,
                        cfg.silence_bias, checkpoint.info.text_weight, cfg.seed)
    users, prompts = [user.codes for user in heard], [user.prompt for user in heard]
    decoded, chunk_sec = converse(
        checkpoint.model, checkpoint.vocab, layout, users, codec.silence_codes[0].tolist(), prompts=prompts,
        sampling=sampling, max_context=cfg.max_context, dtype=pick_dtype(cfg.dtype, device),
        compile=cfg.compile)
    out = cfg.out or os.path.join(cfg.checkpoint, 'samples')
    os.makedirs(out, exist_ok=True)
    conversations = []
    for user, dialogue in zip(heard, decoded):
        dialogue.update(id=user.id, turns=user.turns + dialogue['turns'])
        start = time.perf_counter()
        wave = render(dialogue, codec, user.wave)
        codec_sec += time.perf_counter() - start
        path = os.path.join(out, re.sub(r'[^\w.-]', '_', user.id))     # an id may hold a slash
        write_audio(path + '.wav', wave, codec.sample_rate)
        write_transcript(path + '.jsonl', dialogue, codec.rate_hz)
        conversations.append(conversation(user.id, codec.rate_hz, user.turns, dialogue, codec.silence_codes,
                                          layout.speech_chunk, user.expected, wave, codec.sample_rate))
        print(f'{path}.wav  {len(wave) / codec.sample_rate:.1f} s')
        for turn in sorted(dialogue['turns'], key=lambda turn: turn['start']):
            print(f'  {turn["start"] / codec.rate_hz:6.2f} s  {turn["role"]:9}  {turn["text"] or "(speech)"}')
    outcomes = [assess(talk) for talk in conversations]
    responses = [turn['response'] for turns in outcomes for turn in turns if turn['response'] is not None]
    reply = f'{1e3 * responses[0] / codec.rate_hz:.0f} ms after the user stopped' if responses else 'none'
    factor = (sum(chunk_sec) + codec_sec) / (sum(map(len, users)) / codec.rate_hz)
    print(f'chunk {1e3 * layout.speech_chunk / codec.rate_hz:.0f} ms | '
          f'model {1e3 * np.median(chunk_sec):.1f} ms a chunk for {len(heard)} at once | '
          f'codec {1e3 * codec_sec:.0f} ms in all | real-time factor {factor:.3f} | first reply {reply}')
    page = os.path.join(out, 'report.html')
    note = f'{cfg.checkpoint} listens to {cfg.user or f"{cfg.data}, {cfg.split}"}.'
    report.write(page, os.path.normpath(out), conversations[:MAX_REPORT], outcomes[:MAX_REPORT],
                 note=note)
    print(f'look and listen: {page}')
    return decoded


def listen_to_file(cfg, codec):
    wave = read_audio(cfg.user, codec.sample_rate, cfg.user_channel)
    wave = np.concatenate([wave, np.zeros(round(cfg.reply_sec * codec.sample_rate), np.float32)])
    codes = codec.encode(wave)
    spans = stretches(~is_silent(codes, codec.silence_codes), codec.rate_hz)
    turns = [dict(role='user', start=start, end=end, text='') for start, end in spans]  # without text
    return Heard(os.path.splitext(os.path.basename(cfg.user))[0], codes, turns, None, wave, cfg.prompt or '')


def listen_to_data(cfg, codec):
    dialogues = Dialogues(cfg.data, cfg.split)
    check_codec(cfg.checkpoint, codec.describe(), dialogues)
    chosen = [dialogues[i] for i in range(min(cfg.n_dialogue or len(dialogues), len(dialogues)))]
    heard = []
    for dialogue in chosen:
        turns, expected = ([turn for turn in dialogue['turns'] if turn['role'] == role] for role in ROLES)
        if len(dialogue['user']):
            prompt = dialogue.get('prompt', '') if cfg.prompt is None else cfg.prompt
            heard.append(Heard(dialogue['id'], dialogue['user'], turns, expected, None, prompt))
    if not heard:
        raise ValueError(f'{cfg.data}: no dialogue with a user channel in {cfg.split}')
    return heard


if __name__ == '__main__':
    try:
        main(config.load(Config, sys.argv[1:]))
    except ValueError as error:
        raise SystemExit(str(error))
