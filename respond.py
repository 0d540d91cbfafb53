"""
Decoding of layouts by turns: the model reads what a layout feeds, and writes the rest.

    asr          <|asr|> <|sos|> codes <|eos|> <|sot|>  ──►  text <|eot|>
    glm4voice    … <|assistant|> streaming_transcription ──►  13 text, 26 codes, 13 text, … <|user|>

    respond     turns in, dialogues out
    Writer      a model that writes one document id by id, where a Reader (templates.py) says which may come

One document is written at a time: rows of a batch would want different ids at each step.
"""
import math
from typing import NamedTuple

import numpy as np
import torch

from common.linear import Int8, pick_linear
from common.record import START
from decode import Sampling, SlotHead, for_decoding, to_dialogue
from flatten import lay_prompt, unflatten
from model import KVCache
from templates import Choice, Reader, advance, is_in


class Asked(NamedTuple):
    """What a layout may feed of one turn."""
    codes: np.ndarray       # [n_frame] or [n_frame, codes]
    text: str = ''
    prompt: str = ''


class Writer:
    """write: the steps of a Reader -> ids of a whole document."""

    def __init__(self, model, vocab, layout, sampling=None, max_context=None, dtype=None, max_new_tokens=0):
        weight = model.model.norm.weight
        linear, rest = pick_linear(dtype or weight.dtype, weight.device, False)
        self.model, self.vocab, self.layout = for_decoding(model, rest, linear), vocab, layout
        self.sampling, self.device = sampling or Sampling(), weight.device
        self.max_context = max_context or model.config.block_size
        self.max_new_tokens = max_new_tokens or self.max_context
        cache_dtype = torch.bfloat16 if linear is Int8 else rest
        bucket = 32 if self.device.type == 'cpu' else 1024
        self.cache = KVCache(self.model, 1, self.max_context, bucket, cache_dtype)
        self.heads, self.generator = {}, torch.Generator(self.device).manual_seed(self.sampling.seed)

    @torch.inference_mode()
    def write(self, steps, name):
        """name: of the document, for errors. A stream ends after max_new_tokens, or where the context is
        nearly full. Raises ValueError for a document that does not fit all the same."""
        self.cache.len = self.cache.next_pos = 0
        ids, unfed, n_new = [], [], 0
        step = next(steps, None)
        while step is not None:
            if not isinstance(step, Choice):
                unfed += step.tolist()
                ids += step.tolist()
                step = next(steps, None)
                continue
            if len(ids) >= self.max_context:
                raise ValueError(f'{name}: its document is longer than the context of {self.max_context} '
                                 'tokens; a larger --max_context may hold it')
            is_long = n_new >= self.max_new_tokens or len(ids) > self.max_context - 64  # more has to come
            ranges = step.stops if is_long and step.stops else step.allowed
            token = self.choose(step.kind, ranges, unfed)
            unfed, n_new = [token], 0 if is_in(token, step.stops) else n_new + 1
            ids.append(token)
            step = advance(steps, token)
        return ids

    def choose(self, kind, ranges, unfed):
        idx = torch.tensor([unfed], device=self.device)         # (1, T)
        self.cache.advance(idx.shape[1])
        x = self.model.model.norm(self.model.run_blocks_cached(idx, self.cache)[:, -1])     # (1, C)
        head = self.head(kind, ranges)
        noise = None
        if head.temperature:
            noise = torch.empty(1, len(head.bias), device=self.device).exponential_(generator=self.generator)
        return int(head.choose(head(x), noise))

    def head(self, kind, ranges):
        if (kind, ranges) not in self.heads:
            head = SlotHead(self.model, self.vocab, kind, ranges, self.sampling, None)
            # training weighed all but codes by text_weight, which made an end so much likelier than a code
            codes = slice(*(max(0, i - head.start) for i in (
                self.vocab.code_start, self.vocab.code_start + self.vocab.n_codes)))
            head.bias -= math.log(self.sampling.text_weight)
            head.bias[codes] += math.log(self.sampling.text_weight)
            self.heads[kind, ranges] = head
        return self.heads[kind, ranges]


def respond(model, vocab, layout, conversations, silence_code, text_model=None, on_document=lambda: None,
            names=None, **settings):
    """
    conversations [[Asked]] -> [dialogue], each read back from the document that was written. A layout whose
    documents are single turns gets conversations of one turn; settings are Writer's.
        text_model  another model, or the same, that writes the texts before, and never speaks (Mini-Omni
                    takes its text from such a second sample)
        names       of the conversations, for errors
    """
    if text_model and not said_text(layout):
        raise ValueError(f'layout {layout.name} has no text that the assistant writes: text_from has nothing '
                         'to give it')
    writer = Writer(model, vocab, layout, **settings)
    texter = text_model and Writer(text_model, vocab, layout, **settings)
    dialogues = []
    for i, asked in enumerate(conversations):
        name, texts = names[i] if names else f'conversation {i}', None
        if texter:
            texts = []
            texter.write(steps_of(Reader(layout, vocab, is_mute=True), asked, write_texts=texts), name)
        ids = writer.write(steps_of(Reader(layout, vocab), asked, read_texts=texts), name)
        if layout.is_ragged:
            dialogue = to_dialogue(ids, layout, vocab, silence_code, len(asked[0].codes))
        else:
            dialogue = unflatten(ids, layout, vocab, silence_code)
        dialogues.append(dict(dialogue, id=name))
        on_document()
    return dialogues


def ask(dialogue, layout, prompt=None):
    """What there is to answer in a dialogue -> [(id, [Asked])], one for each document. prompt: None: the
    dialogue's own"""
    prompt = dialogue.get('prompt', '') if prompt is None else prompt
    if layout.order == 'chunks':
        return [(dialogue['id'], [Asked(dialogue['user'], prompt=prompt)])]
    # a voice reads what anybody said; all others answer the user
    turns = [turn for turn in sorted(dialogue['turns'], key=START)
             if turn['role'] in layout.slots and (layout.is_voice or turn['role'] == 'user')]
    asked = [Asked(dialogue[turn['role']][turn['start']:turn['end']], turn['text'], prompt) for turn in turns]
    if layout.order == 'turns':
        return [(dialogue['id'], asked)] * bool(asked)
    return [(f'{dialogue["id"]}-{number}', [each]) for number, each in enumerate(asked, 1)]


def said_text(layout):
    """The slots of text that the assistant writes."""
    return [slot for line in layout.slots for slot in layout.all_slots(line)
            if slot.kind == 'text' and slot.learned and (slot.role or line) == 'assistant']


def steps_of(reader, asked, write_texts=None, read_texts=None):
    """The steps of a whole document. write_texts: a list that gets the ids of each text that the assistant
    writes; read_texts: such a list, of what it has to write"""
    layout, vocab = reader.layout, reader.vocab
    if layout.is_ragged:
        yield from chunk_steps(reader, asked[0])
    elif layout.order == 'segments':
        ids = to_ids(asked[0].codes, vocab)
        text, speech, _, pair, end = next(iter(layout.slots.values()))
        yield np.array([*ids, vocab.control[pair.what]])
        end = vocab.control[end.what]
        yield from reader.read_stream(text, ((end, end + 1),))
        yield from reader.expect(np.array([end]))
    elif layout.order == 'turns':
        if 'start' in layout.slots:
            yield from line_steps(reader, 'start', asked[0])
        for turn in asked:
            yield from line_steps(reader, 'user', turn)
            yield from line_steps(reader, 'assistant', turn, write_texts, read_texts)
    else:
        yield from line_steps(reader, [*layout.slots][-1], asked[0], write_texts, read_texts)


def line_steps(reader, line, turn, write_texts=None, read_texts=None):
    """The steps of one line. What it feeds is known of the turn."""
    vocab, layout, slots = reader.vocab, reader.layout, reader.layout.all_slots(line)
    known = {key: vocab.encode(text) for key, text in (('text', turn.text), ('prompt', turn.prompt))}
    known['speech'] = to_ids(turn.codes, vocab)
    is_voice = layout.is_voice      # its text is known, also where it is learned
    reader.given = {slot.what: list(known[slot.kind]) for slot in slots
                    if slot.kind in known and (not slot.learned or (is_voice and slot.kind == 'text'))}
    reader.given['words'] = [vocab.encode(word) for word in turn.text.split()]
    mine = [slot.what for slot in said_text(layout) if slot in slots]
    if read_texts is not None and mine:
        reader.given[mine[0]] = list(read_texts.pop(0))
    reader.found = {}
    yield from reader.read(layout.slots[line])
    if write_texts is not None and mine:
        write_texts.append(reader.found[mine[0]])


def chunk_steps(reader, turn):
    """Chunks of unequal length, behind the prompt: those of the user are fed, without repeats."""
    layout, prompt = reader.layout, lay_prompt(turn.prompt, reader.vocab)
    if prompt:
        yield np.array(prompt)
    slot = next(slot for slot in layout.chunk if slot.role == 'user')
    firsts = reader.firsts(layout.chunk)
    codes = to_ids(turn.codes, reader.vocab)
    for at in range(0, len(codes), slot.n):
        chunk = codes[at:at + slot.n]
        reader.given = {slot.what: [id for id, before in zip(chunk, [None, *chunk]) if id != before]}
        reader.found = {}
        yield from reader.read(layout.chunk, firsts)


def to_ids(codes, vocab):
    return (np.asarray(codes, np.int64).reshape(-1) + vocab.code_start).tolist()
