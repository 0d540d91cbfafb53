"""
Listens and talks: the user's speech goes in chunk by chunk, the assistant's text and speech come out.

    python sample.py --checkpoint=out/demo --user=question.wav      a file of any rate; stereo with --user_channel=0
    python sample.py --checkpoint=out/demo --data=data/demo         the user's side of prepared dialogues, many at once

    user     ─ 10 codes ─┐                    ┌─ 10 codes ─┐
    assistant            └─► 2 text, 10 codes ┘            └─► 2 text, 10 codes        one chunk, 400 ms at 25 Hz

Each dialogue becomes a stereo wav (user left, assistant right) and a transcript, a JSON line a turn with its times; all of them
report.html, to look at and listen to.
"""
import json
import math
import os
import re
import sys
import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn

import config
from codec import Vocabulary, load_codec, read_audio, write_audio
from data.loader import Dialogues
from flatten import ROLES, get_layout, unflatten
from measures import report
from measures.turns import conversation, find, stretches
from model import KVCache, Qwen2
from train import pick_device, pick_dtype

MAX_REPORT = 100        # dialogues in report.html: below 20 MB, if they last half a minute


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
    dtype: str = 'auto'                 # float32, bfloat16, or on a CPU int8; auto: bfloat16 where the device multiplies it
    compile: bool = False               # on a GPU: fuses what lies between the matmuls, for a minute's compiling at the start

    def __post_init__(self):
        if self.compile and pick_device(self.device).type == 'cpu':
            raise ValueError('compile is for a GPU: on a CPU the packed weights are faster than what is compiled')
        if self.dtype not in ('auto', 'float32', 'bfloat16', 'int8'):
            raise ValueError(f"dtype is {self.dtype!r}, known are 'auto', 'float32', 'bfloat16' and 'int8'")
        if (self.user is None) == (self.data is None):
            raise ValueError('give --user=FILE.wav or --data=FOLDER, one of them')
        for name in ('n_dialogue', 'reply_sec', 'text_temperature', 'speech_temperature', 'text_top_k', 'speech_top_k'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name} is {getattr(self, name)}, it cannot be negative')


class Packed(nn.Module):
    """
    A bf16 linear layer on a CPU, its weight stored in the blocks that oneDNN multiplies: F.linear blocks it anew in every
    call, which for one token takes as long as all else. What torch.compile's freezing does, without a minute of compiling.
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1), bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')


class Int8(nn.Module):
    """
    A linear layer whose weight and inputs are rounded to 8 bits, both by 127ths of the largest in the row: of the weight
    here, of x in each call, for each token by itself. For a few tokens a CPU waits for weights, and these are half of bf16's.
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        weight = weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(1e-30) / 127
        rows = (weight / scale[:, None]).round().to(torch.int8)
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = 'fbgemm'      # 'x86' may pack for oneDNN, which takes half as long again
        with warnings.catch_warnings():     # such tensors will go (pytorch #184982); onednn.qlinear_prepack, which stays, is slower for a few tokens
            warnings.simplefilter('ignore', UserWarning)
            self.weight = torch.ops.quantized.linear_prepack(
                torch._make_per_channel_quantized_tensor(rows, scale.double(), torch.zeros(len(rows), dtype=torch.int64), 0))
        torch.backends.quantized.engine = engine
        self.bias = bias

    def forward(self, x):
        # linear_dynamic saves 10 us of 80 to 700, but takes one scale for all rows: users would change what others are told
        scale = x.abs().amax(-1, keepdim=True).clamp_min_(1e-30)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x / scale, 1 / 127, 128, self.weight).mul_(scale)
        return y if self.bias is None else y.add_(self.bias)


def pick_linear(dtype, device, compile):
    """-> the class that multiplies fastest in dtype, None for nn.Linear; and the dtype of all else."""
    if dtype == torch.int8:
        # without VNNI two products are added in 16 bits, which they may exceed
        if device.type != 'cpu' or compile or not torch.cpu._is_vnni_supported() or 'fbgemm' not in torch.backends.quantized.supported_engines:
            raise ValueError('dtype int8 is for CPUs with AVX-512 VNNI, and nothing is compiled: take bfloat16 or float32')
        return Int8, torch.float32
    # what is packed cannot be compiled, and on a CPU gains more: compiling there is for tests of what a GPU does
    is_packed = device.type == 'cpu' and not compile and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Packed if is_packed else None, dtype


def for_decoding(model, dtype, linear):
    """model in dtype, which shares with the original what need not change; its linear layers are of class linear, if given."""
    with torch.device('meta'):
        copy = Qwen2(model.config)
    copy.load_state_dict({name: x.to(dtype) for name, x in model.state_dict().items()}, assign=True)
    for module in list(copy.model.layers.modules()) if linear else ():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, linear(child.weight, child.bias))
    return copy.eval()


class Duplex:
    """
    A model in conversation with n_row users at once. step takes one chunk of each user's codes, int [n_row, n], and
    returns what the assistant writes and says meanwhile: text ids [n_row, m], speech codes [n_row, n], -1 where silent.

    Only ids that a slot allows are scored (in a speech slot of the real model 4,097 of 156,032); against sampling from
    all ids this takes the chance of the others away and shares it out. The user's ids are fed together with the
    assistant's last, so a duplex3 chunk takes 12 passes, not 22. Past max_context tokens the oldest chunks leave.

    Between a chunk's first pass and its last nothing is asked of the device. On a GPU the passes of each shape (11 tokens,
    1 for text, 1 for speech) are captured once as a CUDA graph and replayed.
    """

    def __init__(self, model, vocab, layout, n_row=1, max_context=None, text_temperature=0.0, speech_temperature=0.0,
                 text_top_k=0, speech_top_k=0, silence_bias=0.0, text_weight=1.0, seed=1337, dtype=None, compile=False):
        if layout.order != 'chunks':
            raise ValueError(f'layout {layout.name} has no chunks: it cannot listen and talk at once; sample from a duplex3 or duplex2 checkpoint')
        weight = model.model.norm.weight
        self.device, dtype = weight.device, dtype or weight.dtype
        linear, rest = pick_linear(dtype, self.device, compile)
        self.model, self.vocab, self.layout, self.n_row = for_decoding(model, rest, linear), vocab, layout, n_row
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.temperature = dict(text=text_temperature, speech=speech_temperature)
        self.top_k = dict(text=text_top_k, speech=speech_top_k)
        max_context = max_context or model.config.block_size
        if max_context < 2 * layout.period:
            raise ValueError(f'max_context {max_context} holds no two chunks of {layout.period} tokens')
        self.cache = KVCache(self.model, n_row, max_context, 32 if self.device.type == 'cpu' else 1024,
                             torch.bfloat16 if linear is Int8 else rest)     # half of what attention reads
        self.unfed = torch.empty(n_row, 0, dtype=torch.int64, device=self.device)   # said, but not yet read by the model
        self.ids = []                   # [n_row, tokens] of the whole conversation, in pieces
        self.graphs = {}                # shape of a pass -> what was captured; only on a GPU
        self.read_one = self.model.read_on
        # a slot's ids lie in one stretch of the head (no row is copied), in which the others' logits are lowered to -inf
        silent = dict(text=vocab.control['<|silent_text|>'], speech=vocab.control['<|silent_speech|>'])
        head = (self.model.lm_head or self.model.model.embed_tokens).weight
        self.start, self.head, self.bias = {}, {}, {}
        for kind, (first, end) in dict(text=(0, vocab.n_text), speech=(vocab.code_start, vocab.code_start + vocab.n_codes)).items():
            stretch = slice(min(first, silent[kind]), max(end, silent[kind] + 1))
            bias = torch.full((stretch.stop,), -torch.inf, device=self.device)
            bias[first:end] = 0.0
            # training that weighs text text_weight times makes writing that much likelier than it is: here it is taken back
            bias[silent[kind]] = silence_bias if kind == 'speech' else math.log(text_weight)
            self.start[kind], self.bias[kind] = stretch.start, bias[stretch]
            self.head[kind] = nn.Linear(head.shape[1], len(self.bias[kind]), bias=False, device='meta')
            self.head[kind].weight = nn.Parameter(head[stretch], requires_grad=False)
            if linear:
                self.head[kind] = linear(head[stretch])
        self.compile = compile
        if compile:
            self.compile_pass()

    @torch.inference_mode()
    def compile_pass(self):
        """Compiles the passes of one token, 11 of 12, now rather than in the conversation."""
        self.read_one = torch.compile(self.model.read_on, dynamic=True, fullgraph=True)     # one graph for all buckets of the cache
        self.sample('speech', self.unfed.new_zeros(self.n_row, 1))
        self.cache.len = self.cache.next_pos = 0

    @torch.inference_mode()
    def step(self, user_codes):
        layout, vocab = self.layout, self.vocab
        user_codes = np.asarray(user_codes, np.int64).reshape(self.n_row, -1)
        if user_codes.shape[1] != layout.speech_chunk or user_codes.min() < 0 or user_codes.max() >= vocab.n_codes:
            raise ValueError(f'a chunk is {layout.speech_chunk} codes from 0 to {vocab.n_codes - 1} for each of {self.n_row} users')
        heard = torch.as_tensor(user_codes + vocab.code_start).to(self.device)
        said = dict(text=[], speech=[])
        while self.cache.len + self.unfed.shape[1] + layout.period > self.cache.max_len:
            self.cache.drop(layout.period)
        for slot in layout.chunk:
            if not slot.learned:
                self.feed(heard)
                continue
            for _ in range(slot.n):
                ids, self.unfed = self.unfed, self.unfed[:, :0]
                token = self.sample(slot.kind, ids)     # (n_row, 1)
                said[slot.kind].append(token)
                self.feed(token)
        n_text = len(said['text'])
        tokens = torch.cat(said['text'] + said['speech'], dim=1).cpu().numpy()     # waits for the device, the only time
        speech = tokens[:, n_text:]
        return tokens[:, :n_text], np.where(speech == vocab.control['<|silent_speech|>'], -1, speech - vocab.code_start)

    def feed(self, ids):
        self.unfed = torch.cat([self.unfed, ids], dim=1)
        self.ids.append(ids)

    def sample(self, kind, ids):
        """Reads ids (n_row, T), says one token."""
        noise = None
        if self.temperature[kind]:      # the likeliest of p / noise is a draw from p, as in torch.multinomial, which waits for the device
            noise = torch.empty(self.n_row, len(self.bias[kind]), device=self.device).exponential_(generator=self.generator)
        self.cache.advance(ids.shape[1])
        for x in (ids, self.cache.keys, self.cache.values) if self.compile else ():
            torch._dynamo.mark_static(x)        # of all sizes only n_slot changes
        if self.device.type != 'cuda':
            return self.next_token(kind, ids, noise)
        shape = kind, ids.shape[1], self.cache.n_slot
        if shape not in self.graphs:
            self.graphs[shape] = self.capture(kind, ids, noise)
        graph, inputs, token = self.graphs[shape]
        for static, new in zip(inputs, (ids, noise)):
            if static is not None:
                static.copy_(new)
        graph.replay()
        return token.clone()

    def capture(self, kind, *inputs):
        """-> a CUDA graph of next_token, the tensors that it reads, the one that it writes. Reading twice changes nothing: the
        same keys go into the same slots."""
        inputs = [x if x is None else x.clone() for x in inputs]
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):   # libraries make their workspaces, which they may not during a capture
            self.next_token(kind, *inputs)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode='thread_local'):    # in training another thread allocates meanwhile
            token = self.next_token(kind, *inputs)
        return graph, inputs, token

    def next_token(self, kind, ids, noise):
        read = self.read_one if ids.shape[1] == 1 else self.model.read_on
        x = read(ids, self.cache)[:, -1]                                            # (n_row, C)
        logits = self.head[kind](self.model.model.norm(x)).float() + self.bias[kind]
        if noise is not None:
            logits = logits / self.temperature[kind]
            if self.top_k[kind]:
                least = logits.topk(min(self.top_k[kind], logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            logits = logits.softmax(-1) / noise
        return logits.argmax(-1, keepdim=True) + self.start[kind]

    def keep(self, n_row):
        """Goes on with the first n_row users only."""
        self.cache.keep(n_row)
        self.n_row, self.unfed, self.ids, self.graphs = n_row, self.unfed[:n_row], [ids[:n_row] for ids in self.ids], {}


def converse(model, vocab, layout, users, silence_code, on_chunk=lambda: None, **settings):
    """users: [codes of each user] -> ([dialogue as sampled], seconds each chunk took). All users are listened to side by
    side, the last chunk of each is filled up with silence; who has ended leaves soon after, and costs nothing any more."""
    n = layout.speech_chunk
    n_chunk = [-(-len(codes) // n) for codes in users]
    order = sorted(range(len(users)), key=lambda i: -n_chunk[i])       # the longest first: who leaves is at the end
    heard = np.full((len(users), max(n_chunk) * n), silence_code, np.int64)
    for row, i in zip(heard, order):
        row[:len(users[i])] = users[i]
    duplex, chunk_sec, ids = Duplex(model, vocab, layout, len(users), **settings), [], [None] * len(users)
    for c in range(max(n_chunk) + 1):
        n_row = sum(c < m for m in n_chunk)
        if n_row <= 0.75 * duplex.n_row:        # not at each end: the others' keys and values are copied, on a GPU graphs captured
            rows = torch.cat(duplex.ids, dim=1).cpu().numpy()           # (n_row, chunks * K)
            for row, i in zip(rows, order[:duplex.n_row]):
                ids[i] = row[:n_chunk[i] * layout.period]
            duplex.keep(n_row)
        if n_row:
            start = time.perf_counter()
            duplex.step(heard[:duplex.n_row, c * n:c * n + n])
            chunk_sec.append(time.perf_counter() - start)
            on_chunk()
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
        heard = stretches(~np.isin(codes, codec.silence_codes), codec.rate_hz)
        names, waves, users = [os.path.splitext(os.path.basename(cfg.user))[0]], [wave], [codes]
        turns = [[dict(role='user', start=a, end=b, text='') for a, b in heard]]      # nobody wrote down what was said
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
        turns = [d['turns'] for d in chosen]
    codec_sec = time.perf_counter() - start
    decoded, chunk_sec = converse(model, vocab, layout, users, silence_code, max_context=cfg.max_context, seed=cfg.seed, text_weight=text_weight,
                                  dtype=pick_dtype(cfg.dtype, device), compile=cfg.compile,
                                  text_temperature=cfg.text_temperature, speech_temperature=cfg.speech_temperature,
                                  text_top_k=cfg.text_top_k, speech_top_k=cfg.speech_top_k, silence_bias=cfg.silence_bias)
    out = cfg.out or os.path.join(cfg.checkpoint, 'samples')
    os.makedirs(out, exist_ok=True)
    conversations = []
    for i, (name, dialogue) in enumerate(zip(names, decoded)):
        user_turns, expected = ([turn for turn in turns[i] if turn['role'] == role] for role in ROLES)
        dialogue.update(id=name, turns=user_turns + dialogue['turns'])
        start = time.perf_counter()
        wave = render(dialogue, codec, waves[i] if waves else None)
        codec_sec += time.perf_counter() - start
        path = os.path.join(out, re.sub(r'[^\w.-]', '_', name))     # an id may hold a slash
        write_audio(path + '.wav', wave, codec.sample_rate)
        write_transcript(path + '.jsonl', dialogue, codec.rate_hz)
        conversations.append(conversation(name, codec.rate_hz, user_turns, dialogue, codec.silence_codes, layout.speech_chunk,
                                          None if cfg.user else expected, wave, codec.sample_rate))
        print(f'{path}.wav  {len(wave) / codec.sample_rate:.1f} s')
        for turn in sorted(dialogue['turns'], key=lambda turn: turn['start']):
            print(f'  {turn["start"] / codec.rate_hz:6.2f} s  {turn["role"]:9}  {turn["text"] or "(speech)"}')
    chunk_ms = 1e3 * layout.speech_chunk / codec.rate_hz
    heard_sec = sum(len(codes) for codes in users) / codec.rate_hz
    found = [find(c) for c in conversations]
    first = next((1e3 * turn['response'] / codec.rate_hz for turns in found for turn in turns if turn['response'] is not None), None)
    page = os.path.join(out, 'report.html')
    report.write(page, os.path.normpath(out), conversations[:MAX_REPORT], found[:MAX_REPORT], note=f'{cfg.checkpoint} listens to {cfg.user or f"{cfg.data}, {cfg.split}"}.')
    print(f'chunk {chunk_ms:.0f} ms | model {1e3 * np.median(chunk_sec):.1f} ms a chunk for {len(users)} at once | codec {1e3 * codec_sec:.0f} ms in all | '
          f'real-time factor {(sum(chunk_sec) + codec_sec) / heard_sec:.3f} | first reply '
          + (f'{first:.0f} ms after the user stopped' if first is not None else 'none'))
    print(f'look and listen: {page}')
    return decoded


if __name__ == '__main__':
    try:
        main(config.load(Config, sys.argv[1:]))
    except ValueError as error:
        raise SystemExit(str(error))
