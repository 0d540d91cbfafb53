"""
Listens and talks: the user's speech goes in chunk by chunk, the assistant's text and speech come out.

    python sample.py --checkpoint=out/demo --user=question.wav      a file of any rate; stereo with --user_channel=0
    python sample.py --checkpoint=out/demo --data=data/demo         the user's side of prepared dialogues, many at once

    user     ─ 10 codes ─┐                    ┌─ 10 codes ─┐
    assistant            └─► 2 text, 10 codes ┘            └─► 2 text, 10 codes        one chunk, 400 ms at 25 Hz

Each dialogue becomes a stereo wav (user left, assistant right) and a transcript, a JSON line a turn with its
times; all of them report.html, to look at and listen to.
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
from data.dialogues import Dialogues
from decode import Sampling, converse, render, write_transcript
from flatten import ROLES
from measures import report
from measures.turns import assess, conversation, stretches

MAX_REPORT = 100        # dialogues in report.html: below 20 MB, if they last half a minute


@dataclass(frozen=True)
class Config:
    checkpoint: str = 'out/demo'        # a folder that train.py wrote: model, tokenizer, codec and layout
    user: str | None = None             # a wav (flac, ogg, mp3, …) of the user
    # which channel of it is the user's, from 0; needed where there are several
    user_channel: int | None = None
    data: str | None = None             # or a data folder, whose dialogues' user channels are listened to
    split: str = 'test'
    n_dialogue: int = 8                 # the first so many of the split; 0: all
    out: str | None = None              # folder for what is written; None: CHECKPOINT/samples
    reply_sec: float = 6.0              # silence after the user's file, in which the assistant can answer
    text_temperature: float = 0.0       # 0: always the likeliest
    speech_temperature: float = 0.0
    text_top_k: int = 0                 # sample among the k likeliest; 0: among all
    speech_top_k: int = 0
    # added to the logit of silence in speech slots: below 0 talks sooner, above 0 later
    silence_bias: float = 0.0
    # tokens remembered, then the oldest chunks leave; None: the model's block_size
    max_context: int | None = None
    seed: int = 1337
    device: str = 'auto'                # auto: a GPU if there is one
    # float32, bfloat16, or on a CPU int8; auto: bfloat16 where the device multiplies it
    dtype: str = 'auto'
    # on a GPU: fuses what lies between the matmuls, for a minute's compiling at the start
    compile: bool = False

    def __post_init__(self):
        if self.compile and pick_device(self.device).type == 'cpu':
            raise ValueError('compile is for a GPU: on a CPU the packed weights are faster than what is '
                             'compiled')
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


def main(cfg):
    """Decodes what cfg names and writes it. Returns the dialogues."""
    device = pick_device(cfg.device)
    checkpoint = load_checkpoint(cfg.checkpoint, device)
    codec, layout = checkpoint.codec, checkpoint.layout
    silence_code = int(codec.silence_codes[0])
    # a vocoder that cannot start: now, not at the end
    codec.decode(np.resize(codec.silence_codes, round(codec.rate_hz)))
    start = time.perf_counter()
    heard = [listen_to_file(cfg, codec)] if cfg.user else listen_to_data(cfg, codec)
    codec_sec = time.perf_counter() - start
    sampling = Sampling(cfg.text_temperature, cfg.speech_temperature, cfg.text_top_k, cfg.speech_top_k,
                        cfg.silence_bias, checkpoint.info.text_weight, cfg.seed)
    decoded, chunk_sec = converse(checkpoint.model, checkpoint.vocab, layout, [each.codes for each in heard],
                                  silence_code, sampling=sampling, max_context=cfg.max_context,
                                  dtype=pick_dtype(cfg.dtype, device), compile=cfg.compile)
    out = cfg.out or os.path.join(cfg.checkpoint, 'samples')
    os.makedirs(out, exist_ok=True)
    conversations = []
    for each, dialogue in zip(heard, decoded):
        dialogue.update(id=each.id, turns=each.turns + dialogue['turns'])
        start = time.perf_counter()
        wave = render(dialogue, codec, each.wave)
        codec_sec += time.perf_counter() - start
        path = os.path.join(out, re.sub(r'[^\w.-]', '_', each.id))     # an id may hold a slash
        write_audio(path + '.wav', wave, codec.sample_rate)
        write_transcript(path + '.jsonl', dialogue, codec.rate_hz)
        conversations.append(conversation(each.id, codec.rate_hz, each.turns, dialogue, codec.silence_codes,
                                          layout.speech_chunk, each.expected, wave, codec.sample_rate))
        print(f'{path}.wav  {len(wave) / codec.sample_rate:.1f} s')
        for turn in sorted(dialogue['turns'], key=lambda turn: turn['start']):
            print(f'  {turn["start"] / codec.rate_hz:6.2f} s  {turn["role"]:9}  {turn["text"] or "(speech)"}')
    found = [assess(each) for each in conversations]
    responses = [turn['response'] for turns in found for turn in turns if turn['response'] is not None]
    first_reply = f'{1e3 * responses[0] / codec.rate_hz:.0f} ms after the user stopped' if responses else 'none'
    heard_sec = sum(len(each.codes) for each in heard) / codec.rate_hz
    print(f'chunk {1e3 * layout.speech_chunk / codec.rate_hz:.0f} ms | '
          f'model {1e3 * np.median(chunk_sec):.1f} ms a chunk for {len(heard)} at once | '
          f'codec {1e3 * codec_sec:.0f} ms in all | real-time factor '
          f'{(sum(chunk_sec) + codec_sec) / heard_sec:.3f} | '
          f'first reply {first_reply}')
    page = os.path.join(out, 'report.html')
    note = f'{cfg.checkpoint} listens to {cfg.user or f"{cfg.data}, {cfg.split}"}.'
    report.write(page, os.path.normpath(out), conversations[:MAX_REPORT], found[:MAX_REPORT], note=note)
    print(f'look and listen: {page}')
    return decoded


def listen_to_file(cfg, codec):
    wave = read_audio(cfg.user, codec.sample_rate, cfg.user_channel)
    wave = np.concatenate([wave, np.zeros(round(cfg.reply_sec * codec.sample_rate), np.float32)])
    codes = codec.encode(wave)
    spans = stretches(~np.isin(codes, codec.silence_codes), codec.rate_hz)
    # nobody wrote down what was said
    turns = [dict(role='user', start=start, end=end, text='') for start, end in spans]
    return Heard(os.path.splitext(os.path.basename(cfg.user))[0], codes, turns, None, wave)


def listen_to_data(cfg, codec):
    dialogues = Dialogues(cfg.data, cfg.split)
    check_codec(cfg.checkpoint, codec.describe(), dialogues)
    chosen = [dialogues[i] for i in range(min(cfg.n_dialogue or len(dialogues), len(dialogues)))]
    heard = []
    for dialogue in chosen:
        turns, expected = ([turn for turn in dialogue['turns'] if turn['role'] == role] for role in ROLES)
        if len(dialogue['user']):
            heard.append(Heard(dialogue['id'], dialogue['user'], turns, expected, None))
    if not heard:
        raise ValueError(f'{cfg.data}: no dialogue with a user channel in {cfg.split}')
    return heard


if __name__ == '__main__':
    try:
        main(config.load(Config, sys.argv[1:]))
    except ValueError as error:
        raise SystemExit(str(error))
