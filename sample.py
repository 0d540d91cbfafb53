"""
Listens and talks: the user's speech goes in chunk by chunk, the assistant's text and speech come out.

    python sample.py --checkpoint=out/demo --user=question.wav      a file of any rate; stereo with --user_channel=0
    python sample.py --checkpoint=out/demo --data=data/demo         the user's side of prepared dialogues, many at once

    user     ─ 10 codes ─┐                    ┌─ 10 codes ─┐
    assistant            └─► 2 text, 10 codes ┘            └─► 2 text, 10 codes        one chunk, 400 ms at 25 Hz

Each dialogue becomes a stereo wav (user left, assistant right) and a transcript, a JSON line a turn with its times.
"""
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

import config
from codec import Vocabulary, load_codec, read_audio, write_audio
from data.loader import Dialogues
from flatten import ROLES, get_layout, unflatten
from model import KVCache, Qwen2
from train import pick_device


@dataclass(frozen=True)
class Config:
    checkpoint: str = 'out/demo'        # a folder that train.py wrote: model, tokenizer, codec and layout
    user: str | None = None             # a wav (flac, ogg, mp3, …) of the user
    user_channel: int | None = None     # which channel of it is the user's, from 0; needed where there are several
    data: str | None = None             # or a data folder, whose dialogues' user channels are listened to
    split: str = 'test'
    n_dialogue: int = 8                 # the first so many of the split; 0: all
    out: str | None = None              # folder for what is written; None: CHECKPOINT/samples
    reply_sec: float = 6.0              # silence after the user's file, in which the assistant can answer
    text_temperature: float = 0.0       # 0: always the likeliest
    speech_temperature: float = 0.0
    text_top_k: int = 0                 # sample among the k likeliest; 0: among all
    speech_top_k: int = 0
    silence_bias: float = 0.0           # added to the logit of silence in speech slots: below 0 talks sooner, above 0 later
    max_context: int | None = None      # tokens remembered, then the oldest chunks leave; None: the model's block_size
    seed: int = 1337
    device: str = 'auto'                # auto: a GPU if there is one

    def __post_init__(self):
        if (self.user is None) == (self.data is None):
            raise ValueError('give --user=FILE.wav or --data=FOLDER, one of them')
        for name in ('n_dialogue', 'reply_sec', 'text_temperature', 'speech_temperature', 'text_top_k', 'speech_top_k'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name} is {getattr(self, name)}, it cannot be negative')


class Duplex:
    """
    A model in conversation with n_row users at once. step takes one chunk of each user's codes, int [n_row, n], and
    returns what the assistant writes and says meanwhile: text ids [n_row, m], speech codes [n_row, n], -1 where silent.

    Only ids that a slot allows are scored (in a speech slot of the real model 4,097 of 156,032); against sampling from
    all ids this takes the chance of the others away and shares it out. The user's ids are fed together with the
    assistant's last, so a duplex3 chunk takes 12 passes, not 22. Past max_context tokens the oldest chunks leave.
    """

    def __init__(self, model, vocab, layout, n_row=1, max_context=None, text_temperature=0.0, speech_temperature=0.0,
                 text_top_k=0, speech_top_k=0, silence_bias=0.0, text_weight=1.0, seed=1337):
        if layout.order != 'chunks':
            raise ValueError(f'layout {layout.name} has no chunks: it cannot listen and talk at once; sample from a duplex3 or duplex2 checkpoint')
        self.model, self.vocab, self.layout, self.n_row = model, vocab, layout, n_row
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.temperature = dict(text=text_temperature, speech=speech_temperature)
        self.top_k = dict(text=text_top_k, speech=speech_top_k)
        max_context = max_context or model.config.block_size
        if max_context < 2 * layout.period:
            raise ValueError(f'max_context {max_context} holds no two chunks of {layout.period} tokens')
        self.cache = KVCache(model, n_row, max_context)
        self.unfed = torch.empty(n_row, 0, dtype=torch.int64, device=self.device)   # said, but not yet read by the model
        self.ids = []                   # [n_row, tokens] of the whole conversation, in pieces
        # a slot's ids lie in one stretch of the head (no row is copied), in which the others' logits are lowered to -inf
        silent = dict(text=vocab.control['<|silent_text|>'], speech=vocab.control['<|silent_speech|>'])
        self.stretch, self.bias = {}, {}
        for kind, (first, end) in dict(text=(0, vocab.n_text), speech=(vocab.code_start, vocab.code_start + vocab.n_codes)).items():
            self.stretch[kind] = slice(min(first, silent[kind]), max(end, silent[kind] + 1))
            bias = torch.full((self.stretch[kind].stop,), -torch.inf, device=self.device)
            bias[first:end] = 0.0
            # training that weighs text text_weight times makes writing that much likelier than it is: here it is taken back
            bias[silent[kind]] = silence_bias if kind == 'speech' else math.log(text_weight)
            self.bias[kind] = bias[self.stretch[kind]]

    @torch.inference_mode()
    def step(self, user_codes):
        layout, vocab = self.layout, self.vocab
        user_codes = torch.as_tensor(np.asarray(user_codes, np.int64), device=self.device).view(self.n_row, -1)
        if user_codes.shape[1] != layout.speech_chunk or user_codes.min() < 0 or user_codes.max() >= vocab.n_codes:
            raise ValueError(f'a chunk is {layout.speech_chunk} codes from 0 to {vocab.n_codes - 1} for each of {self.n_row} users')
        said = dict(text=[], speech=[])
        while self.cache.len + self.unfed.shape[1] + layout.period > self.cache.max_len:
            self.cache.drop(layout.period)
        for slot in layout.chunk:
            if not slot.learned:
                self.feed(user_codes + vocab.code_start)
                continue
            for _ in range(slot.n):
                token = self.sample(slot.kind)          # (n_row, 1)
                said[slot.kind].append(token)
                self.feed(token)
        text, speech = (torch.cat(said[kind], dim=1).cpu().numpy() if said[kind] else np.empty((self.n_row, 0), np.int64)
                        for kind in ('text', 'speech'))
        return text, np.where(speech == vocab.control['<|silent_speech|>'], -1, speech - vocab.code_start)

    def feed(self, ids):
        self.unfed = torch.cat([self.unfed, ids], dim=1)
        self.ids.append(ids)

    def sample(self, kind):
        T = self.unfed.shape[1]
        last = torch.arange(1, self.n_row + 1, device=self.device) * T - 1
        logits = self.model(self.unfed, kv_cache=self.cache, learn=last, ids=self.stretch[kind]) + self.bias[kind]
        self.unfed = self.unfed[:, :0]
        if self.temperature[kind] == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / self.temperature[kind]
            if self.top_k[kind]:
                least = logits.topk(min(self.top_k[kind], logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            token = torch.multinomial(logits.softmax(-1), 1, generator=self.generator)
        return token + self.stretch[kind].start


def converse(model, vocab, layout, users, silence_code, **settings):
    """users: [codes of each user] -> ([dialogue as sampled], seconds each chunk took). All users are listened to side by
    side, the shorter ones with silence after their end."""
    n = layout.speech_chunk
    n_chunk = max(-(-len(codes) // n) for codes in users)
    heard = np.full((len(users), n_chunk * n), silence_code, np.int64)
    for row, codes in zip(heard, users):
        row[:len(codes)] = codes
    duplex, chunk_sec = Duplex(model, vocab, layout, len(users), **settings), []
    for c in range(n_chunk):
        start = time.perf_counter()
        duplex.step(heard[:, c * n:c * n + n])
        chunk_sec.append(time.perf_counter() - start)
    ids = torch.cat(duplex.ids, dim=1).cpu().numpy()        # (n_row, N chunks * K)
    dialogues = []
    for row, codes in zip(ids, users):
        dialogue, n_frame = unflatten(row, layout, vocab, silence_code), len(codes)
        turns = [dict(turn, end=min(turn['end'], n_frame)) for turn in dialogue['turns'] if turn['start'] < n_frame]
        dialogues.append(dict(dialogue, turns=turns, **{role: dialogue[role][:n_frame] for role in ROLES}))
    return dialogues, chunk_sec


# ---------------------------------------------------------------------------------------------------------------------

def load_checkpoint(folder, device='cpu'):
    """(model, vocab, layout, codec, text_weight) of a folder that train.py wrote. Raises ValueError for any other."""
    path = os.path.join(folder, 'config.json')
    if not os.path.isfile(path):
        raise ValueError(f'{folder} is no checkpoint: it has no config.json (train one: python train.py config/demo.py)')
    with open(path) as file:
        about = json.load(file).get('nanoduplex')
    if not about:
        raise ValueError(f'{path} has no entry "nanoduplex": not a model that train.py wrote, so its layout and codec are unknown')
    vocab = Vocabulary.load(folder, about['n_codes'])
    model = Qwen2.from_pretrained(folder).to(device).eval()
    if model.config.vocab_size != vocab.size:
        raise ValueError(f'{folder}: its model has {model.config.vocab_size} ids, its tokenizer with {vocab.n_codes} codes {vocab.size}: '
                         'the checkpoint is of another vocabulary')
    codec = load_codec(os.path.join(folder, 'codec'))
    if codec.about() != about['codec']:
        raise ValueError(f'{folder} was trained with codec {about["codec"]}, in its folder lies {codec.about()}')
    layout = get_layout(about['layout'], about['speech_chunk'] or None, about['text_chunk'])
    return model, vocab, layout, codec, about['text_weight']


def spans(is_speech, rate_hz, gap_sec=0.4):
    """bool [n_frame] -> [(start, end)] of the stretches of speech; gaps shorter than gap_sec do not end one."""
    edges = np.flatnonzero(np.diff(is_speech, prepend=False, append=False)).reshape(-1, 2).tolist()
    merged = []
    for start, end in edges:
        if merged and start - merged[-1][1] < gap_sec * rate_hz:
            start = merged.pop()[0]
        merged.append((start, end))
    return merged


def render(dialogue, codec, user_wave=None):
    """float32 [n_sample, 2]: the user left (their own recording where there is one), the assistant right."""
    n_frame, hop = len(dialogue['user']), round(codec.sample_rate / codec.rate_hz)
    wave = np.zeros((n_frame * hop, 2), np.float32)
    user_wave = codec.decode(np.asarray(dialogue['user'])) if user_wave is None else user_wave[:len(wave)]
    wave[:len(user_wave), 0] = user_wave
    for turn in dialogue['turns']:
        if turn['role'] == 'assistant':     # between its turns the assistant is silent, not quietly noisy
            said = codec.decode(np.asarray(dialogue['assistant'][turn['start']:turn['end']]))
            wave[turn['start'] * hop:turn['end'] * hop, 1] = said
    return wave


def write_transcript(path, dialogue, rate_hz):
    with open(path + '.part', 'w', encoding='utf-8') as file:
        for turn in sorted(dialogue['turns'], key=lambda turn: turn['start']):
            times = dict(start_sec=round(turn['start'] / rate_hz, 3), end_sec=round(turn['end'] / rate_hz, 3))
            file.write(json.dumps(dict(role=turn['role'], **times, text=turn['text']), ensure_ascii=False) + '\n')
    os.replace(path + '.part', path)


def reply_frames(dialogue):
    """Frames from the end of each user turn to the assistant's first speech after it, None if the user speaks first."""
    starts = sorted(turn['start'] for turn in dialogue['turns'] if turn['role'] == 'assistant')
    users = sorted((turn['start'], turn['end']) for turn in dialogue['turns'] if turn['role'] == 'user')
    nexts = [start for start, _ in users[1:]] + [len(dialogue['user'])]
    return [next((start - end for start in starts if end <= start < following), None) for (_, end), following in zip(users, nexts)]


def main(cfg):
    """Decodes what cfg names and writes it. Returns the dialogues."""
    device = pick_device(cfg.device)
    model, vocab, layout, codec, text_weight = load_checkpoint(cfg.checkpoint, device)
    silence_code, waves = int(codec.silence_codes[0]), None
    codec.decode(np.resize(codec.silence_codes, round(codec.rate_hz)))      # a vocoder that cannot be started is found out now, not at the end
    start = time.perf_counter()
    if cfg.user:
        wave = read_audio(cfg.user, codec.sample_rate, cfg.user_channel)
        wave = np.concatenate([wave, np.zeros(round(cfg.reply_sec * codec.sample_rate), np.float32)])
        codes = codec.encode(wave)
        heard = spans(~np.isin(codes, codec.silence_codes), codec.rate_hz)
        names, waves, users = [os.path.splitext(os.path.basename(cfg.user))[0]], [wave], [codes]
        user_turns = [[dict(role='user', start=a, end=b, text='') for a, b in heard]]      # nobody wrote down what was said
    else:
        dialogues = Dialogues(cfg.data, cfg.split)
        if dialogues.codec != codec.about():
            raise ValueError(f'{cfg.data} was made with codec {dialogues.codec["name"]} {dialogues.codec["fingerprint"]}, {cfg.checkpoint} was trained '
                             f'with {codec.name} {codec.fingerprint}: prepare the data with the checkpoint\'s codec')
        chosen = [dialogues[i] for i in range(min(cfg.n_dialogue or len(dialogues), len(dialogues)))]
        chosen = [d for d in chosen if len(d['user'])]
        if not chosen:
            raise ValueError(f'{cfg.data}: no dialogue with a user channel in {cfg.split}')
        names, users = [d['id'] for d in chosen], [d['user'] for d in chosen]
        user_turns = [[turn for turn in d['turns'] if turn['role'] == 'user'] for d in chosen]
    codec_sec = time.perf_counter() - start
    decoded, chunk_sec = converse(model, vocab, layout, users, silence_code, max_context=cfg.max_context, seed=cfg.seed, text_weight=text_weight,
                                  text_temperature=cfg.text_temperature, speech_temperature=cfg.speech_temperature,
                                  text_top_k=cfg.text_top_k, speech_top_k=cfg.speech_top_k, silence_bias=cfg.silence_bias)
    out = cfg.out or os.path.join(cfg.checkpoint, 'samples')
    os.makedirs(out, exist_ok=True)
    replies = []
    for i, (name, dialogue) in enumerate(zip(names, decoded)):
        dialogue.update(id=name, turns=user_turns[i] + dialogue['turns'])
        start = time.perf_counter()
        wave = render(dialogue, codec, waves[i] if waves else None)
        codec_sec += time.perf_counter() - start
        path = os.path.join(out, re.sub(r'[^\w.-]', '_', name))     # an id may hold a slash
        write_audio(path + '.wav', wave, codec.sample_rate)
        write_transcript(path + '.jsonl', dialogue, codec.rate_hz)
        replies += reply_frames(dialogue)
        print(f'{path}.wav  {len(wave) / codec.sample_rate:.1f} s')
        for turn in sorted(dialogue['turns'], key=lambda turn: turn['start']):
            print(f'  {turn["start"] / codec.rate_hz:6.2f} s  {turn["role"]:9}  {turn["text"] or "(speech)"}')
    chunk_ms = 1e3 * layout.speech_chunk / codec.rate_hz
    heard_sec = sum(len(codes) for codes in users) / codec.rate_hz
    first = next((1e3 * frames / codec.rate_hz for frames in replies if frames is not None), None)
    print(f'chunk {chunk_ms:.0f} ms | model {1e3 * np.median(chunk_sec):.1f} ms a chunk for {len(users)} at once | codec {1e3 * codec_sec:.0f} ms in all | '
          f'real-time factor {(sum(chunk_sec) + codec_sec) / heard_sec:.3f} | first reply '
          + (f'{first:.0f} ms after the user stopped' if first is not None else 'none'))
    return decoded


if __name__ == '__main__':
    try:
        main(config.load(Config, sys.argv[1:]))
    except ValueError as error:
        raise SystemExit(str(error))
