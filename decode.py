"""
Listening and talking: the user's speech goes in chunk by chunk, the assistant's text and speech come out.

    user     ─ 10 codes ─┐                    ┌─ 10 codes ─┐
    assistant            └─► 2 text, 10 codes ┘            └─► 2 text, 10 codes     a chunk is 400 ms at 25 Hz

    Duplex.step     a chunk of each user in, the assistant's chunk out
    converse        whole recordings, many side by side
    render          a decoded dialogue as stereo sound
"""
import json
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn

import templates
from common.files import whole
from common.linear import Int8, pick_linear
from flatten import ROLES, lay_prompt, unflatten
from model import KVCache, Qwen2

# ------------------------------------------------------------------------------------------------------------
# choosing a token

@dataclass(frozen=True)
class Sampling:
    """How a token is chosen among those that its slot allows."""
    text_temperature: float = 0.0       # 0: always the likeliest
    speech_temperature: float = 0.0
    text_top_k: int = 0                 # choose among the k likeliest; 0: among all
    speech_top_k: int = 0
    silence_bias: float = 0.0           # added to the logit of silence in speech slots; below 0 talks sooner
    text_weight: float = 1.0            # training's: it made writing that much likelier, which is undone here
    seed: int = 1337


class SlotHead(nn.Module):
    """
    The part of the model's head from which one kind of slot, text or speech, is chosen: in a speech slot of
    Qwen2-0.5B these are 4,097 ids of 156,032. forward: x (n_row, C) -> logits (n_row, n_id) of ids start,
    start + 1 …
        ranges      of the ids that the slot allows: (first, end), …
    """

    def __init__(self, model, vocab, kind, ranges, sampling, linear):
        super().__init__()
        # rows are taken in one stretch, as a view; ids in it that the slot does not allow get -inf
        stretch = slice(min(first for first, _ in ranges), max(end for _, end in ranges))
        rows = (model.lm_head or model.model.embed_tokens).weight[stretch]      # (n_id, C)
        bias = torch.full((stretch.stop,), -torch.inf, device=rows.device)
        for first, end in ranges:
            bias[first:end] = 0.0
        silent = vocab.control[f'<|silent_{kind}|>']
        if silent < stretch.stop:       # stays forbidden where it is
            bias[silent] += math.log(sampling.text_weight) if kind == 'text' else sampling.silence_bias
        self.start, self.bias = stretch.start, bias[stretch]
        if linear:
            self.linear = linear(rows)
        else:
            self.linear = nn.Linear(rows.shape[1], len(rows), bias=False, device='meta')
            self.linear.weight = nn.Parameter(rows, requires_grad=False)
        self.temperature = getattr(sampling, f'{kind}_temperature')
        self.top_k = getattr(sampling, f'{kind}_top_k')

    def forward(self, x):
        return self.linear(x).float() + self.bias

    def choose(self, logits, noise):
        """logits (n_row, n_id) -> ids (n_row, 1). noise (n_row, n_id): exponential; None: temperature is 0"""
        if noise is not None:
            logits = logits / self.temperature
            if self.top_k:
                least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            # the largest of p / noise is a draw from p; torch.multinomial does the same, but waits for a GPU
            logits = logits.softmax(-1) / noise
        return logits.argmax(-1, keepdim=True) + self.start


# ------------------------------------------------------------------------------------------------------------
# conversations

def for_decoding(model, dtype, linear):
    """A copy of model in dtype, with linear layers of class linear, if given. Weights that need not change
    are shared with the original."""
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
    A model in conversation with n_row users at once. step takes one chunk of each user's codes, int [n_row,
    n], and returns what the assistant writes and says meanwhile: text ids [n_row, m] and speech codes [n_row,
    n], in which -1 is silence.

    Only ids that a slot allows are scored; their probabilities are those of the whole head, scaled to sum to
    1. The user's ids are fed together with the assistant's last one, so a chunk of duplex3 takes 12 passes
    through the model and not 22. Beyond max_context tokens the oldest chunks are forgotten, first of all the
    prompt, which all users share.

    Within a chunk nothing waits for the device. On a GPU the passes of each shape (11 tokens, 1 token for
    text, 1 for speech) are captured once as a CUDA graph and replayed. warm_up captures them before the
    conversation, as a capture takes tens of milliseconds.
    """

    cache_class = KVCache

    def __init__(self, model, vocab, layout, n_row=1, sampling=None, max_context=None, dtype=None,
                 compile=False, prompt='', is_mute=False):
        if not layout.period:
            raise ValueError(f'layout {layout.name} has no chunks of one length: it cannot listen and talk '
                             'at once; sample from a duplex3 or duplex2 checkpoint')
        weight = model.model.norm.weight
        self.vocab, self.layout, self.n_row, self.device = vocab, layout, n_row, weight.device
        self.max_context = max_context or model.config.block_size
        self.is_mute = is_mute      # writes, but never speaks
        linear, rest = pick_linear(dtype or weight.dtype, self.device, compile)
        self.model = for_decoding(model, rest, linear)
        self.sampling, self.heads = sampling or Sampling(), {}
        for slot, place in self.places():       # one for each kind of slot, and each place of a frame
            ranges = templates.allowed(slot, layout, vocab)[place]
            kind = 'speech' if slot.kind == 'speech' else 'text'
            key = self.key(slot, place)
            self.heads[key] = SlotHead(self.model, vocab, kind, ranges, self.sampling, linear)
        self.cache_dtype = torch.bfloat16 if linear is Int8 else rest   # attention reads half as much
        self.uses_graphs = self.device.type == 'cuda'
        self.read_one, self.compile = self.model.run_blocks_cached, compile
        self.make_room(prompt)
        if compile:
            self.compile_pass()

    def make_room(self, prompt):
        bucket = 32 if self.device.type == 'cpu' else 1024
        self.cache = self.cache_class(self.model, self.n_row, self.max_context, bucket, self.cache_dtype)
        self.forget_graphs()
        self.reset(prompt)

    def forget_graphs(self):
        self.graphs = {}            # on a GPU: shape of a pass -> what was captured
        # a pool ends with the last graph in it, so new graphs need a new one
        self.pool = torch.cuda.graph_pool_handle() if self.uses_graphs else None

    def reset(self, prompt=''):
        """Forgets all that was said: a new conversation begins, in the same memory."""
        layout, prompt = self.layout, self.lay(prompt)
        self.generator = torch.Generator(self.device).manual_seed(self.sampling.seed)
        self.cache.len = self.cache.next_pos = 0
        # ids that were chosen or heard, but that the model has not read yet: the prompt, if there is one
        self.unfed = torch.tensor([prompt] * self.n_row, dtype=torch.int64, device=self.device)
        self.ids = [self.unfed]     # those of the whole conversation, in pieces of [n_row, tokens]
        self.n_prompt = len(prompt)     # tokens of it that are not forgotten
        # of the user's last chunks, ids (n_row, n, codes of a frame), as some codes are laid late
        silent = self.vocab.control['<|silent_speech|>']
        empty = self.unfed.new_full((self.n_row, layout.speech_chunk, layout.codes_per_frame), silent)
        self.n_chunk, self.heard, self.is_stopped = 0, [empty] * layout.n_late, None

    def lay(self, prompt):
        """A prompt -> its ids"""
        ids, period = lay_prompt(prompt, self.vocab), self.layout.period
        if self.max_context < 2 * period + len(ids):
            raise ValueError(f'max_context {self.max_context} holds no two chunks of {period} tokens'
                             + f' behind a prompt of {len(ids)}' * bool(ids))
        return ids

    @torch.inference_mode()
    def compile_pass(self):
        """Compiles the passes of one token, 11 of 12, before the conversation. One graph serves all sizes of
        the cache."""
        self.read_one = torch.compile(self.model.run_blocks_cached, dynamic=True, fullgraph=True)
        random = self.generator.get_state()
        self.sample(next(iter(self.heads)), self.unfed.new_zeros(self.n_row, 1))
        self.generator.set_state(random)        # as if nothing had been drawn
        self.cache.len = self.cache.next_pos = 0

    def places(self):
        """(slot, place in its frame) of each token of a chunk that the model chooses"""
        return [(slot, place) for slot, size in zip(self.layout.chunk, self.layout.sizes)
                for place in list(range(size // slot.n)) * slot.n if slot.learned and slot.role != 'user']

    @staticmethod
    def key(slot, place):
        return slot.kind + f' {place}' * (place > 0)    # of a head: 'text', 'speech', 'speech 1', …

    def passes(self, n_chunk):
        """(head, T, slots) of each pass in the first n_chunk chunks of a conversation: what is chosen, how
        many ids are read for it, and how many slots of the cache."""
        n_unfed, n_read = self.n_prompt, 0
        for c in range(n_chunk):
            for slot, size in zip(self.layout.chunk, self.layout.sizes):
                for place in list(range(size // slot.n)) * slot.n:
                    if self.is_chosen(slot, place, c) and n_unfed:
                        n_read += n_unfed
                        yield self.key(slot, place), n_unfed, self.cache.count_slots(n_read)
                        n_unfed = 0
                    n_unfed += 1

    def is_chosen(self, slot, place, n_chunk):
        """Does the model choose the token there? Not before the first frame of a place that is late."""
        late = slot.delays[place % len(slot.delays)] if slot.delays else 0
        return slot.learned and slot.role != 'user' and n_chunk >= late

    @torch.inference_mode()
    def warm_up(self, n_chunk):
        """Captures all that n_chunk chunks need. Before the conversation only: it overwrites the cache."""
        for key, T, n_slot in dict.fromkeys(self.passes(n_chunk)) if self.uses_graphs else ():
            noise = torch.ones(self.n_row, len(self.heads[key].bias), device=self.device)
            self.cache.n_slot = n_slot
            self.graphs[key, self.n_row, T, n_slot] = self.capture(
                key, self.unfed.new_zeros(self.n_row, T), noise if self.heads[key].temperature else None)

    @torch.inference_mode()
    def step(self, user_codes, text=None):
        """text: ids (n_row, m), where what is written in this chunk is known before"""
        layout, vocab, n = self.layout, self.vocab, self.layout.speech_chunk
        user_codes = np.asarray(user_codes, np.int64).reshape(self.n_row, -1)
        n_code = n * layout.codes_per_frame
        if user_codes.shape[1] != n_code or user_codes.min() < 0 or user_codes.max() >= vocab.n_codes:
            raise ValueError(f'a chunk is {n_code} codes from 0 to {vocab.n_codes - 1} '
                             f'for each of {self.n_row} users')
        heard = torch.as_tensor(user_codes + vocab.code_start).to(self.device)
        self.heard.append(heard.view(self.n_row, n, -1))
        while self.cache.len + self.unfed.shape[1] + layout.period > self.cache.max_len:
            self.cache.drop(self.n_prompt or layout.period)
            self.n_prompt = 0
        said = dict(text=[], speech=[], state=[])
        for slot, size in zip(layout.chunk, layout.sizes):
            if slot.role == 'user':
                late = slot.delays or (0,) * layout.codes_per_frame
                late = np.resize(late, layout.codes_per_frame)
                block = [self.heard[-1 - steps][:, :, place] for place, steps in enumerate(late)]
                self.feed(torch.stack(block, -1).view(self.n_row, size))
                continue
            for i in range(size):
                token = self.write(slot, i % (size // slot.n), None if text is None else text[:, i:i + 1])
                said.setdefault(slot.kind, []).append(token)
                self.feed(token)
        self.heard, self.n_chunk, n_text = self.heard[1:], self.n_chunk + 1, len(said['text'])
        # the only line that waits for the device
        tokens = torch.cat(said['text'] + said['speech'] + said['state'], dim=1).cpu().numpy()
        text, speech = np.split(tokens[:, :n_text + len(said['speech'])], [n_text], 1)  # (n_row, m), (…, n)
        return text, np.where(speech == vocab.control['<|silent_speech|>'], -1, speech - vocab.code_start)

    def write(self, slot, place, text=None):
        """-> the next token of a slot, (n_row, 1): the known text, what can only be silence, or a choice"""
        silent = self.vocab.control['<|silent_text|>' if slot.kind == 'text' else '<|silent_speech|>']
        if slot.kind == 'text' and text is not None:
            return text
        if slot.kind not in ('text', 'speech', 'state'):
            return self.unfed.new_full((self.n_row, 1), self.vocab.control[slot.what])
        is_first = not self.unfed.shape[1]      # of a conversation that begins with the assistant
        is_mute = self.is_mute and slot.kind == 'speech'
        if is_first or is_mute or not self.is_chosen(slot, place, self.n_chunk):
            return self.unfed.new_full((self.n_row, 1), silent)
        ids, self.unfed = self.unfed, self.unfed[:, :0]
        token = self.sample(self.key(slot, place), ids)
        if slot.kind == 'state':
            self.is_stopped = token == self.vocab.control['<|irq|>']
        if slot.kind == 'speech' and self.is_stopped is not None:
            token = token.masked_fill(self.is_stopped, silent)
        return token

    def feed(self, ids):
        self.unfed = torch.cat([self.unfed, ids], dim=1)
        self.ids.append(ids)

    def draw(self, n_id):
        """-> noise (n_row, n_id), exponential"""
        return torch.empty(self.n_row, n_id, device=self.device).exponential_(generator=self.generator)

    def sample(self, key, ids):
        """Reads ids (n_row, T) and chooses one token, (n_row, 1), by the head of that key."""
        noise = self.draw(len(self.heads[key].bias)) if self.heads[key].temperature else None
        self.cache.advance(ids.shape[1])
        for x in (ids, *self.cache.keys, *self.cache.values) if self.compile else ():
            torch._dynamo.mark_static(x, [*range(1, x.dim())])    # only n_row and cache.n_slot change
        if not self.uses_graphs:
            return self.next_token(key, ids, noise)
        shape = key, *ids.shape, self.cache.n_slot
        if shape not in self.graphs:
            self.graphs[shape] = self.capture(key, ids, noise)
        graph, inputs, token = self.graphs[shape]
        for static, new in zip(inputs, (ids, noise)):
            if static is not None:
                static.copy_(new)
        graph.replay()
        return token.clone()

    def capture(self, key, *inputs):
        """-> a CUDA graph of next_token, the tensors that it reads, the one that it writes. next_token runs
        twice here, which is harmless: the same keys go into the same slots of the cache."""
        inputs = [x if x is None else x.clone() for x in inputs]
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):   # libraries allocate workspaces now, as a capture does not allow it
            self.next_token(key, *inputs)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # One pool for all: they run one after the other, and what one writes is copied before the next runs.
        # thread_local: when a model is heard in training, the loader's thread allocates at the same time
        with torch.cuda.graph(graph, self.pool, capture_error_mode='thread_local'):
            token = self.next_token(key, *inputs)
        return graph, inputs, token

    def next_token(self, key, ids, noise):
        read = self.read_one if ids.shape[1] == 1 else self.model.run_blocks_cached
        x = self.model.model.norm(read(ids, self.cache)[:, -1])     # (n_row, C)
        head = self.heads[key]
        return head.choose(head(x), noise)

    def keep(self, n_row):
        """Goes on with the first n_row users only."""
        self.cache.keep(n_row)
        self.n_row, self.unfed = n_row, self.unfed[:n_row]
        self.forget_graphs()
        self.ids, self.heard = ([x[:n_row] for x in each] for each in (self.ids, self.heard))
        self.is_stopped = None      # the next chunk says


def converse(model, vocab, layout, users, silence_code, on_chunk=lambda: None, prompts=None, text_model=None,
             **settings):
    """
    users: [codes of each] -> ([dialogue as decoded], seconds each chunk took); settings are Duplex's. All
    users are listened to side by side, those of one prompt after those of another. A user's last chunk is
    filled up with silence; users who have ended leave. prompts: of each; None: there are none
    text_model: a model that listens, too, and writes the text, but never speaks, as Mini-Omni has it
    """
    if len(set(prompts or [])) > 1:
        decoded, chunk_sec = [None] * len(users), []
        for prompt in dict.fromkeys(prompts):
            group = [i for i, each in enumerate(prompts) if each == prompt]
            said, sec = converse(model, vocab, layout, [users[i] for i in group], silence_code, on_chunk,
                                 [prompt], text_model, **settings)
            chunk_sec += sec
            for i, dialogue in zip(group, said):
                decoded[i] = dialogue
        return decoded, chunk_sec
    n, n_chunk = layout.speech_chunk, [layout.n_chunk(len(codes)) for codes in users]
    order = sorted(range(len(users)), key=lambda i: -n_chunk[i])    # the longest first: last rows end first
    heard = np.empty((len(users), max(n_chunk) * n, *np.shape(users[0])[1:]), np.int64)
    heard[:] = silence_code
    for row, i in zip(heard, order):
        row[:len(users[i])] = users[i]
    settings['prompt'] = prompts[0] if prompts else ''
    duplex = Duplex(model, vocab, layout, len(users), **settings)
    writer = text_model and Duplex(text_model, vocab, layout, len(users), is_mute=True, **settings)
    n_prompt = duplex.n_prompt
    duplex.warm_up(max(n_chunk))
    chunk_sec, ids = [], [None] * len(users)
    for c in range(max(n_chunk) + 1):
        n_row = sum(c < m for m in n_chunk)
        # not each time one ends: to leave, the others' keys and values are copied, and graphs captured again
        if n_row <= 0.75 * duplex.n_row:
            rows = torch.cat(duplex.ids, dim=1).cpu().numpy()       # (n_row, chunks * K)
            for row, i in zip(rows, order[:duplex.n_row]):
                ids[i] = row[:n_prompt + n_chunk[i] * layout.period]
            for each in (duplex, writer) if writer else (duplex,):
                each.keep(n_row)
        if n_row:
            start, chunk = time.perf_counter(), heard[:duplex.n_row, c * n:c * n + n]
            known = dict(text=torch.as_tensor(writer.step(chunk)[0]).to(duplex.device)) if writer else {}
            duplex.step(chunk, **known)
            chunk_sec.append(time.perf_counter() - start)
            on_chunk()
    decoded = [to_dialogue(row, layout, vocab, silence_code, len(codes)) for row, codes in zip(ids, users)]
    return decoded, chunk_sec


def to_dialogue(ids, layout, vocab, silence_code, n_frame):
    """ids of a whole conversation -> its dialogue, cut off where the user's n_frame frames end."""
    dialogue = unflatten(ids, layout, vocab, silence_code)
    channels = {role: dialogue[role][:n_frame] for role in ROLES}
    turns = [turn for turn in dialogue['turns'] if turn['start'] < n_frame]
    return dict(dialogue, **channels, turns=[dict(turn, end=min(turn['end'], n_frame)) for turn in turns])


def render(dialogue, codec, user_wave=None):
    """float32 [n_sample, 2]: the user left (their own recording where there is one), the assistant right."""
    n_frame, hop = max(len(dialogue[role]) for role in ROLES), round(codec.sample_rate / codec.rate_hz)
    wave = np.zeros((n_frame * hop, 2), np.float32)
    if user_wave is None and len(dialogue['user']):
        user_wave = codec.decode(np.asarray(dialogue['user']))
    if user_wave is not None:
        wave[:len(user_wave), 0] = user_wave[:len(wave)]
    for turn in dialogue['turns']:
        if turn['role'] == 'assistant' and turn['start'] < turn['end']:
            # between turns there is digital silence, not the codec's noise
            said = codec.decode(np.asarray(dialogue['assistant'][turn['start']:turn['end']]))
            wave[turn['start'] * hop:turn['end'] * hop, 1] = said
    return wave


def write_transcript(path, dialogue, rate_hz):
    """A JSON line a turn: role, start_sec, end_sec, text."""
    with whole(path) as part, open(part, 'w', encoding='utf-8') as file:
        for turn in sorted(dialogue['turns'], key=lambda turn: turn['start']):
            row = dict(role=turn['role'], start_sec=round(turn['start'] / rate_hz, 3),
                       end_sec=round(turn['end'] / rate_hz, 3), text=turn['text'])
            file.write(json.dumps(row, ensure_ascii=False) + '\n')
