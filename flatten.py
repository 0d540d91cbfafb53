"""
A two-channel conversation becomes one sequence of token ids, and comes back.

A dialogue is two channels of speech codes on one clock, and the turns that were spoken (docs/format.md):

>>> user, assistant = [1, 2, 3, 4, 5, 9, 9, 9, 9, 9, 9], [9, 9, 9, 9, 9, 6, 7, 8, 6, 9, 9]
>>> turns = [dict(role='user', start=0, end=5, text='who'), dict(role='assistant', start=5, end=9, text='me')]
>>> dialogue = dict(id='hi', user=user, assistant=assistant, turns=turns)

A layout says which streams there are, in which order and in what portions, and what is fed but not learned.
In duplex3 the model hears a chunk of the user, then writes, then speaks (OmniFlatten, arXiv:2410.17799):

>>> vocab = Letters()                           # here every letter is a text token
>>> def show(*layout):
...     for document in flatten(dialogue, get_layout(*layout), vocab):
...         print(draw(document, get_layout(*layout), vocab))
>>> show('duplex3', 4)                          # chunks of 4 frames; + is learned, · is silence
chunk            |           0 |           1 |           2
user.speech      | 1  2  3  4  | 5  9  9  9  | 9  9  9  ·
assistant.text   | ·+ ·+       | m+ e+       | ·+ ·+
assistant.speech | ·+ ·+ ·+ ·+ | ·+ 6+ 7+ 8+ | 6+ ·+ ·+ ·+
>>> show('duplex2', 4)
chunk            |           0 |           1 |           2
user.speech      | 1  2  3  4  | 5  9  9  9  | 9  9  9  ·
assistant.speech | ·+ ·+ ·+ ·+ | ·+ 6+ 7+ 8+ | 6+ ·+ ·+ ·+

A prompt, what the assistant is told before the conversation, stands before the first chunk:

>>> told = flatten(dict(dialogue, prompt='Be kind.'), get_layout('duplex2', 11), vocab)[0]
>>> print(draw(told, get_layout('duplex2', 11), vocab))
<|sot|> B e   k i n d . <|eot|>
chunk            |                                0
user.speech      | 1  2  3  4  5  9  9  9  9  9  9
assistant.speech | ·+ ·+ ·+ ·+ ·+ 6+ 7+ 8+ 6+ ·+ ·+

The stages of training before take whole turns, without a clock: speech to text (asr), text to speech (tts),
then both sides of a conversation, turn by turn:

>>> show('asr')
<|asr|>+ <|sos|>+ 1 2 3 4 5 <|eos|>+ <|sot|>+ w+ h+ o+ <|eot|>+
<|asr|>+ <|sos|>+ 6 7 8 6 <|eos|>+ <|sot|>+ m+ e+ <|eot|>+
>>> show('tts')
<|tts|>+ <|sot|>+ w h o <|eot|>+ <|sos|>+ 1+ 2+ 3+ 4+ 5+ <|eos|>+
<|tts|>+ <|sot|>+ m e <|eot|>+ <|sos|>+ 6+ 7+ 8+ 6+ <|eos|>+
>>> show('half_duplex')
<|sos|>+ 1 2 3 4 5 <|eos|>+ <|sot|>+ w+ h+ o+ <|eot|>+ <|sot|>+ m+ e+ <|eot|>+ <|sos|>+ 6+ 7+ 8+ 6+ <|eos|>+

And back. What a layout carries returns exactly; the duplex layouts carry no turns of the user:

>>> document, = flatten(dialogue, get_layout('duplex3'), vocab)
>>> unflatten(document.ids, get_layout('duplex3'), vocab, silence_code=9)['turns']
[{'role': 'assistant', 'start': 5, 'end': 9, 'text': 'me'}]

    python flatten.py --layout=duplex3 --tokenizer=FOLDER FILE.jsonl        dialogues -> {"id", "ids", …}
    python flatten.py --layout=duplex3 --tokenizer=FOLDER --inverse FILE    and back

A vocabulary is anything with .control, .code_start, .n_codes, .encode(text) and .decode(ids): that of
vocabulary.py, or Letters.
"""
import argparse
import difflib
import json
import re
import signal
import sys
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from common.files import read_jsonl
from config import Parser
from vocabulary import CONTROL, Vocabulary

ROLES = ('user', 'assistant')

# ------------------------------------------------------------------------------------------------------------
# layouts

# name: (order, streams). The orders: 'turn', each turn is a document of its own; 'turns', all turns follow
# each other in one document; 'chunks', portions of the streams take turns for as long as the dialogue lasts.
# A stream belongs to a role, or, without a dot, to the speaker of the turn. ~ is fed, not learned: the user
# is listened to, not imitated (paper, section 3.3: training is steadier so, as the user's channel is noisy).
LAYOUTS = {
    'asr':         ('turn',   '<|asr|> <|sos|> ~speech <|eos|> <|sot|> text <|eot|>'),
    'tts':         ('turn',   '<|tts|> <|sot|> ~text <|eot|> <|sos|> speech <|eos|>'),
    'half_duplex': ('turns',  {'user':      '<|sos|> ~speech <|eos|> <|sot|> text <|eot|>',
                               'assistant': '<|sot|> text <|eot|> <|sos|> speech <|eos|>'}),
    'duplex3':     ('chunks', '~user.speech 10, assistant.text 2, assistant.speech 10'),
    'duplex2':     ('chunks', '~user.speech 10, assistant.speech 10'),
}
SLOT = re.compile(r'(~?)([^\s,~]+)(?: (\d+))?')


class Slot(NamedTuple):
    what: str       # a control token such as <|sos|>, or a stream: user.speech, assistant.text, …
    n: int          # tokens a chunk; 0: as many as the turn has
    learned: bool

    @property
    def role(self):
        return self.what.split('.')[0]

    @property
    def kind(self):
        return self.what.split('.')[-1]     # 'speech', 'text', or the control token itself


@dataclass(frozen=True)
class Layout:
    name: str
    order: str
    slots: dict     # role -> [Slot]; in chunks both roles have the same list
    learn_user_text: bool = True

    @cached_property
    def chunk(self):
        return self.slots['assistant'] if self.order == 'chunks' else []

    @cached_property
    def period(self):
        return sum(slot.n for slot in self.chunk)   # tokens a chunk; 0 for layouts by turns

    @cached_property
    def learned(self):
        return np.repeat([slot.learned for slot in self.chunk], [slot.n for slot in self.chunk])    # [K]

    @cached_property
    def speech_chunk(self):
        return next((slot.n for slot in self.chunk if slot.kind == 'speech'), 0)    # frames a chunk

    @cached_property
    def text_chunk(self):
        return next((slot.n for slot in self.chunk if slot.kind == 'text'), 0)      # text tokens a chunk

    def settings(self):
        """-> a dict; get_layout(**settings) makes this layout again"""
        return dict(name=self.name, speech_chunk=self.speech_chunk or None,
                    text_chunk=self.text_chunk or None, learn_user_text=self.learn_user_text)


def get_layout(name, speech_chunk=None, text_chunk=None, learn_user_text=True):
    """
    The layout of that name; 'asr.user' or 'tts.assistant' takes the turns of one role only. Raises ValueError
    for an unknown name or a chunk size below 1.
    speech_chunk, text_chunk: frames and text tokens a chunk; None: as many as LAYOUTS says
    learn_user_text: does half_duplex learn what the user says, as a recognition task; the paper doesn't say
    """
    name, _, only_role = name.partition('.')
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, LAYOUTS, 1, 0)[0]
        raise ValueError(f'no layout {name!r}; did you mean {near!r}? (known: {", ".join(LAYOUTS)})')
    if only_role and (only_role not in ROLES or LAYOUTS[name][0] != 'turn'):
        raise ValueError(f'no layout {name}.{only_role}: a role, {" or ".join(ROLES)}, goes with asr and tts')
    sizes = {'speech': speech_chunk, 'text': text_chunk}
    for kind, n in sizes.items():
        if n is not None and n < 1:
            raise ValueError(f'{kind}_chunk is {n}: a chunk holds at least one {kind} token')
    order, streams = LAYOUTS[name]
    slots = {}
    for role in [only_role] if only_role else ROLES:
        text = streams if isinstance(streams, str) else streams[role]
        slots[role] = [Slot(what, int(n or 0), not mark) for mark, what, n in SLOT.findall(text)]
        if order == 'chunks':
            slots[role] = [slot._replace(n=sizes[slot.kind] or slot.n) for slot in slots[role]]
        elif role == 'user' and not learn_user_text:
            slots[role] = [slot._replace(learned=False) if slot.kind == 'text' else slot
                           for slot in slots[role]]
    return Layout(name + ('.' + only_role if only_role else ''), order, slots, learn_user_text)


# ------------------------------------------------------------------------------------------------------------
# dialogue -> ids

class Document(NamedTuple):
    ids: np.ndarray         # int32 [T]
    learned: np.ndarray     # bool [T], is this id a target of the loss
    n_dropped: int          # text tokens that found no room (see lay_text)


TURN = [('role', str), ('start', (int, np.integer)), ('end', (int, np.integer)), ('text', str)]
START = itemgetter('start')


def check(dialogue, n_codes):
    """Raises ValueError, one sentence with the id, unless the dialogue is a record as in docs/format.md."""
    name = f'dialogue {dialogue.get("id")!r}'
    for key in ('id', 'user', 'assistant', 'turns'):
        if key not in dialogue:
            raise ValueError(f'{name} has no field {key!r}')
    try:
        channels = {role: np.asarray(dialogue[role]) for role in ROLES}
    except ValueError:
        raise ValueError(f'{name}: a channel is a list of lists; each is one list of codes')
    for role, codes in channels.items():
        if codes.ndim != 1 or (len(codes) and codes.dtype.kind not in 'iu'):
            raise ValueError(f'{name}: the {role} channel is not a list of whole numbers')
        if len(codes) and not (codes.max() < n_codes and (codes.dtype.kind == 'u' or codes.min() >= 0)):
            at = int(np.argmax((codes < 0) | (codes >= n_codes)))
            raise ValueError(f'{name}: {role} code {codes[at]} at frame {at} is out of range, '
                             f'the codec has 0 to {n_codes - 1}')
    n_user, n_assistant = map(len, channels.values())
    if n_user != n_assistant and n_user and n_assistant:
        raise ValueError(f'{name}: channels of unequal length, user {n_user} frames and assistant '
                         f'{n_assistant}; cut or pad them to one clock (a one-sided utterance leaves '
                         'the other empty)')
    if not isinstance(dialogue.get('prompt', ''), str):
        raise ValueError(f'{name}: its prompt is {dialogue["prompt"]!r}, and has to be a text')
    check_turns(name, dialogue['turns'], {role: len(codes) for role, codes in channels.items()})


def check_turns(name, turns, n_frame):
    """n_frame: {role: length of its channel}"""
    if not isinstance(turns, (list, tuple)) or not all([isinstance(turn, dict) for turn in turns]):
        raise ValueError(f'{name}: turns is not a list of objects with role, start, end and text')
    for key, kind in TURN:
        for turn in turns:
            if not isinstance(turn.get(key), kind):
                raise ValueError(f'{name}: a turn has {key} {turn.get(key)!r}; it needs role, start, end '
                                 '(whole frames) and text')
    last_end = dict.fromkeys(ROLES, 0)
    for turn in sorted(turns, key=START):
        role, start, end = turn['role'], turn['start'], turn['end']
        if role not in ROLES:
            raise ValueError(f'{name}: a turn has role {role!r}, known are {" and ".join(ROLES)}')
        if not 0 <= start < end <= n_frame[role]:
            raise ValueError(f'{name}: {role} turn {start} to {end} does not lie in its channel of '
                             f'{n_frame[role]} frames')
        if start < last_end[role]:
            raise ValueError(f'{name}: {role} turns overlap, one starts at frame {start} before the last '
                             f'ended at {last_end[role]}')
        last_end[role] = end


def flatten(dialogue, layout, vocab, is_checked=False):
    """dialogue -> [Document]: one, or one per turn for layouts of order 'turn'. Raises ValueError where check
    does; is_checked leaves it out, as a loader needs it once and it takes a tenth of the time."""
    if not is_checked:
        check(dialogue, vocab.n_codes)
    if layout.order == 'chunks':
        if len(dialogue['user']) != len(dialogue['assistant']):
            raise ValueError(f'dialogue {dialogue["id"]!r} has one channel only, {layout.name} needs both')
        return [lay_chunks(dialogue, layout, vocab)]
    turns = sorted([turn for turn in dialogue['turns'] if turn['role'] in layout.slots], key=START)
    documents = [lay_turn(dialogue, turn, layout.slots[turn['role']], vocab) for turn in turns]
    if layout.order == 'turns' and documents:
        ids, learned, _ = zip(*documents)
        documents = [Document(np.concatenate(ids), np.concatenate(learned), 0)]
    return documents


def lay_turn(dialogue, turn, slots, vocab):
    codes = np.asarray(dialogue[turn['role']][turn['start']:turn['end']], np.int32)
    streams = dict(speech=codes + np.int32(vocab.code_start), text=vocab.encode(turn['text']))
    parts = [streams[slot.kind] if slot.kind in streams else [vocab.control[slot.what]] for slot in slots]
    n = sum(map(len, parts))
    ids, learned, at = np.empty(n, np.int32), np.empty(n, bool), 0
    for slot, part in zip(slots, parts):
        ids[at:at + len(part)], learned[at:at + len(part)] = part, slot.learned
        at += len(part)
    return Document(ids, learned, 0)


def lay_prompt(prompt, vocab):
    """-> ids of what the assistant is told before the first chunk: fed, not learned; [] for ''"""
    return [vocab.control['<|sot|>'], *vocab.encode(prompt), vocab.control['<|eot|>']] if prompt else []


def count_prompt(ids, vocab):
    """-> how many ids of a document in chunks are its prompt. A chunk never starts with <|sot|>."""
    if not len(ids) or ids[0] != vocab.control['<|sot|>']:
        return 0
    ends = np.flatnonzero(np.asarray(ids) == vocab.control['<|eot|>'])
    return int(ends[0]) + 1 if len(ends) else len(ids)


def lay_chunks(dialogue, layout, vocab):
    n_chunk = -(-len(dialogue['user']) // layout.speech_chunk)
    ids = np.empty((n_chunk, layout.period), np.int32)      # (N chunks, K tokens a chunk)
    learned = np.empty((n_chunk, layout.period), bool)
    learned[:] = layout.learned
    n_dropped = at = 0
    for slot in layout.chunk:
        if slot.kind == 'speech':
            stream = lay_speech(dialogue, slot.role, n_chunk * slot.n, vocab)
        else:
            stream, n_dropped = lay_text(dialogue, slot.role, n_chunk, slot.n, layout.speech_chunk, vocab)
        ids[:, at:at + slot.n] = stream.reshape(n_chunk, slot.n)
        at += slot.n
    prompt = np.array(lay_prompt(dialogue.get('prompt', ''), vocab), np.int32)
    learned = np.concatenate([np.zeros(len(prompt), bool), learned.reshape(-1)])
    return Document(np.concatenate([prompt, ids.reshape(-1)]), learned, n_dropped)


def lay_speech(dialogue, role, n, vocab):
    """-> n ids. The user's channel is fed as it is: its silence is real audio. Of the assistant's channel
    only the turns are fed; its other frames become <|silent_speech|>, a token that can be learned. So do the
    frames that the last chunk lacks, in both channels."""
    codes = np.asarray(dialogue[role])
    stream = np.empty(n, np.int32)
    stream.fill(vocab.control['<|silent_speech|>'] - vocab.code_start)
    if role == 'user':
        stream[:len(codes)] = codes
    else:
        for turn in dialogue['turns']:
            if turn['role'] == role:
                stream[turn['start']:turn['end']] = codes[turn['start']:turn['end']]
    stream += vocab.code_start
    return stream


def is_broken_off(turn, turns):
    """Does the other role speak into this turn, and still when it ends? That is a barge-in; a backchannel
    ("mhm") is over before."""
    start, end, role = turn['start'], turn['end'], turn['role']
    return any([start < other['start'] < end <= other['end'] for other in turns if other['role'] != role])


def lay_text(dialogue, role, n_chunk, text_chunk, speech_chunk, vocab):
    """
    -> the role's text stream, int32 [n_chunk * text_chunk], and how many tokens found no room.

    A turn's text starts in the chunk in which its speech starts. Text that takes longer than the speech runs
    on into the silence after it, until the role's next turn starts or the dialogue ends. Of a turn that was
    broken off the rest of the text is dropped with the rest of the speech.
    """
    stream = np.empty(n_chunk * text_chunk, np.int32)
    stream.fill(vocab.control['<|silent_text|>'])
    turns = sorted([turn for turn in dialogue['turns'] if turn['role'] == role], key=START)
    n_dropped = 0
    for turn, following in zip(turns, turns[1:] + [None]):
        first = turn['start'] // speech_chunk       # chunks from first to limit are this turn's
        limit = following['start'] // speech_chunk if following else n_chunk
        if is_broken_off(turn, dialogue['turns']):
            limit = min(limit, (turn['end'] - 1) // speech_chunk + 1)
        tokens = vocab.encode(turn['text'])
        room = (limit - first) * text_chunk
        kept = tokens[:room]
        if len(tokens) > room:      # what is kept has to read back as itself: no half characters
            while kept and vocab.encode(vocab.decode(kept)) != kept:
                kept = kept[:-1]
        stream[first * text_chunk:first * text_chunk + len(kept)] = kept
        n_dropped += len(tokens) - len(kept)
    return stream, n_dropped


# ------------------------------------------------------------------------------------------------------------
# ids -> dialogue

def unflatten(ids, layout, vocab, silence_code=0, id=''):
    """
    ids [T] of one document -> dialogue. The inverse of flatten for all that the layout carries: flatten gives
    the same ids again, if assistant turns have silence between them (or their texts have). What a layout does
    not carry: the assistant's codes outside its turns come back as silence_code, and layouts by turns put one
    turn after the other. asr gives a user's utterance, tts an assistant's. Raises ValueError where the ids do
    not follow the layout.
    """
    name = f'{layout.name} document {id!r}'
    if not isinstance(ids, (list, np.ndarray)) or (len(ids) and np.asarray(ids).dtype.kind not in 'iu'):
        raise ValueError(f'{name}: ids is not a list of whole numbers')
    ids = np.asarray(ids, np.int64)
    if layout.order == 'chunks':
        return dict(id=id, **parse_chunks(ids, layout, vocab, silence_code, name))
    channels, turns, at, n_frame = {role: [] for role in ROLES}, [], 0, 0
    while at < len(ids):
        firsts = {vocab.control[slots[0].what]: role for role, slots in layout.slots.items()}
        if ids[at] not in firsts:
            raise ValueError(f'{name}: token {at} is {ids[at]}, where a turn has to start')
        # in tts and asr both roles start alike: the voice is the assistant's, the ear is for the user
        role = {'tts': 'assistant', 'asr': 'user'}.get(layout.name, firsts[ids[at]])
        at, codes, text = parse_turn(ids, at, layout.slots[role], vocab, name)
        turns.append(dict(role=role, start=n_frame, end=n_frame + len(codes), text=text))
        channels[role] += codes
        if layout.order == 'turns':
            channels[ROLES[1 - ROLES.index(role)]] += [silence_code] * len(codes)
        n_frame += len(codes)
    return dict(id=id, **channels, turns=turns)


def parse_turn(ids, at, slots, vocab, name):
    """-> where the turn that starts at `at` ends, its codes, its text"""
    codes, text = [], ''
    for slot, following in zip(slots, slots[1:] + [None]):
        if slot.kind not in ('speech', 'text'):
            if at >= len(ids) or ids[at] != vocab.control[slot.what]:
                found = ids[at] if at < len(ids) else 'missing'
                raise ValueError(f'{name}: token {at} is {found}, where {slot.what} has to stand')
            at += 1
            continue
        stops = np.flatnonzero(ids[at:] == vocab.control[following.what])   # a stream ends at a control token
        if not len(stops):
            raise ValueError(f'{name}: no {following.what} after token {at}')
        part, at = ids[at:at + stops[0]], at + int(stops[0])
        if slot.kind == 'speech':
            codes = to_codes(part, vocab, name).tolist()
        else:
            text = vocab.decode(part.tolist())
    return at, codes, text


def to_codes(ids, vocab, name):
    codes = ids - vocab.code_start
    if len(codes) and not (0 <= codes.min() and codes.max() < vocab.n_codes):
        raise ValueError(f'{name}: an id in a speech slot is no speech code ({vocab.code_start} to '
                         f'{vocab.code_start + vocab.n_codes - 1})')
    return codes


def parse_chunks(ids, layout, vocab, silence_code, name):
    n_prompt = count_prompt(ids, vocab)
    prompt, ids = vocab.decode(ids[1:n_prompt - 1].tolist()) if n_prompt else '', ids[n_prompt:]
    if len(ids) % layout.period:
        raise ValueError(f'{name}: {len(ids)} ids are no whole number of chunks of {layout.period}')
    chunks = ids.reshape(-1, layout.period)     # (N chunks, K tokens a chunk)
    streams, at = {}, 0
    for slot in layout.chunk:
        streams[slot.what] = chunks[:, at:at + slot.n]
        at += slot.n
    user, said = streams['user.speech'].reshape(-1), streams['assistant.speech'].reshape(-1)
    heard = np.flatnonzero(user != vocab.control['<|silent_speech|>'])
    n_frame = int(heard[-1]) + 1 if len(heard) else 0       # what fills up the last chunk is left out
    speaks = said[:n_frame] != vocab.control['<|silent_speech|>']
    runs = np.flatnonzero(np.diff(speaks, prepend=False, append=False)).reshape(-1, 2).tolist()
    turns = [dict(role='assistant', start=start, end=end, text='') for start, end in runs]
    if 'assistant.text' in streams:
        turns = match_text(runs, streams['assistant.text'], layout.speech_chunk, vocab)
    assistant = np.full(n_frame, silence_code)
    assistant[speaks] = to_codes(said[:n_frame][speaks], vocab, name)
    user = to_codes(user[:n_frame], vocab, name)
    dialogue = dict(user=user.tolist(), assistant=assistant.tolist(), turns=turns)
    return dialogue | (dict(prompt=prompt) if prompt else {})


def match_text(runs, text, speech_chunk, vocab):
    """
    runs [(start, end)] of speech, in frames, and text (N chunks, m) -> the assistant's turns.

    A run is a turn, and has the text written from its first chunk on, for as long as it speaks or the text
    goes on. Text that starts anew while the run goes on starts another turn: two turns touched. flatten
    writes nothing else, but a model may. Its text one chunk before a run belongs to the run. Text that starts
    anew in silence was never said, and is left out.
    """
    written = text != vocab.control['<|silent_text|>']      # (N, m)
    starts = written[:, 0].copy()                           # [N], does text start here, after silence
    starts[1:] &= ~written[:-1, -1]
    spans = []
    for run, following in zip(runs, runs[1:] + [None]):
        spans += split_run(run, following, starts, written, speech_chunk)
    first_chunks, before = [], -1
    for start, _ in spans:
        c = start // speech_chunk
        first_chunks.append(c - 1 if c - 1 > before and starts[c - 1] else c)
        before = c
    turns = []
    for (start, end), first, limit in zip(spans, first_chunks, first_chunks[1:] + [len(text)]):
        silent_from = (end - 1) // speech_chunk + 1         # the first chunk after the speech
        ends = (c for c in range(silent_from, limit) if starts[c] or not written[c, 0])
        chunks = slice(first, next(ends, limit))
        words = vocab.decode(text[chunks][written[chunks]].tolist())
        turns.append(dict(role='assistant', start=start, end=end, text=words))
    return turns


def split_run(run, following, starts, written, speech_chunk):
    """-> [(start, end)] of the turns in a run of speech, which is cut where text starts anew after text."""
    start, end = run
    first, last = start // speech_chunk, (end - 1) // speech_chunk
    cuts = [start]
    for c in range(first + 1, last + 1):
        is_next_turns = following and following[0] // speech_chunk == c     # it may start in this one's last
        if starts[c] and written[first:c].any() and not is_next_turns:
            cuts.append(c * speech_chunk)
    return list(zip(cuts, cuts[1:] + [end]))


# ------------------------------------------------------------------------------------------------------------
# drawings

class Letters:
    """A vocabulary that can be read without a tokenizer, for drawings and tests: ids are code points."""
    n_codes = 64
    control = {name: 0xE000 + i for i, name in enumerate(CONTROL)}      # in Unicode's private use area
    code_start = 0x110000                                               # after the last code point

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return ''.join(map(chr, ids))


def spell(i, vocab):
    """One id in few letters: a code's number, a text token's letters, · for silence, or a control token."""
    i = int(i)
    names = {id: name for name, id in vocab.control.items()}
    if i in names:
        return '·' if 'silent' in names[i] else names[i]
    return str(i - vocab.code_start) if i >= vocab.code_start else vocab.decode([i]).replace('\n', '⏎') or '∅'


def draw(document, layout, vocab):
    """The document as text, with + after what is learned. Chunks are drawn as a grid, a line a stream."""
    words = [spell(i, vocab) + '+' * int(learned) for i, learned in zip(document.ids, document.learned)]
    if layout.order != 'chunks':
        return ' '.join(words)
    n_prompt = count_prompt(document.ids, vocab)
    prompt, words = ' '.join(words[:n_prompt]), words[n_prompt:]
    words = [word if word.endswith('+') else word + ' ' for word in words]
    cell = max(map(len, words), default=2)
    wide = max(slot.n for slot in layout.chunk) * (cell + 1) - 1
    margin = max(len(slot.what) for slot in layout.chunk)
    chunks = [words[at:at + layout.period] for at in range(0, len(words), layout.period)]
    lines = [f'{"chunk":{margin}}' + ''.join(f' | {c:>{wide}}' for c in range(len(chunks)))]
    at = 0
    for slot in layout.chunk:
        portions = [' '.join(f'{word:>{cell}}' for word in chunk[at:at + slot.n]) for chunk in chunks]
        lines.append(f'{slot.what:{margin}}' + ''.join(f' | {portion:{wide}}' for portion in portions))
        at += slot.n
    return '\n'.join([prompt] * bool(prompt) + [line.rstrip() for line in lines])


# ------------------------------------------------------------------------------------------------------------
# the command line

def arguments():
    parser = Parser(description=__doc__.split('\n\n')[0].strip(),
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('path', help='JSON lines of dialogues (or, with --inverse, of ids), - for standard input')
    add('--layout', default='duplex3', help=', '.join(LAYOUTS))
    add('--tokenizer', required=True, help='folder with tokenizer.json, or vocab.json and merges.txt')
    add('--inverse', action='store_true', help='from ids back to dialogues')
    add('--speech_chunk', type=int, help="frames a chunk, None: the layout's own")
    add('--text_chunk', type=int, help="text tokens a chunk, None: the layout's own")
    add('--learn_user_text', choices=('true', 'false'), default='true',
        help='half_duplex: is the text of the user a target')
    add('--n_codes', type=int, default=4096,
        help="size of the speech codebook (4096: CosyVoice's), where FOLDER does not name its codes")
    add('--silence_code', type=int, default=0, help='with --inverse: stands where the assistant is silent')
    return parser


def main():
    args = arguments().parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # python flatten.py … | head
    layout = get_layout(args.layout, args.speech_chunk, args.text_chunk, args.learn_user_text == 'true')
    if args.n_codes < 1:
        raise ValueError(f'--n_codes={args.n_codes}: a codebook has at least one code')
    vocab = Vocabulary.load(args.tokenizer, args.n_codes)
    if not 0 <= args.silence_code < vocab.n_codes:
        raise ValueError(f'--silence_code={args.silence_code} is out of range, the codec has 0 to '
                         f'{vocab.n_codes - 1}')
    n_dropped = 0
    for row, value in read_jsonl(args.path):
        try:
            if args.inverse:
                dialogue = unflatten(value['ids'], layout, vocab, args.silence_code, value['id'])
                print(json.dumps(dialogue, ensure_ascii=False))
                continue
            for document in flatten(value, layout, vocab):
                n_dropped += document.n_dropped
                learned = document.learned.astype(int).tolist()
                print(json.dumps(dict(id=value['id'], ids=document.ids.tolist(), learned=learned)))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            what = f'no field {error}' if isinstance(error, KeyError) else error
            raise ValueError(f'{args.path}:{row}: {what}') from None
    if n_dropped:
        print(f'{n_dropped} text tokens found no room and were dropped; a larger --text_chunk keeps them',
              file=sys.stderr)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error))
