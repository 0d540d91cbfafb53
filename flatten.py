"""
A two-channel conversation becomes one sequence of token ids, and comes back.

A dialogue is two channels of speech codes on one clock and the turns that were spoken (the record of data/):

>>> dialogue = dict(id='hi', user=[1, 2, 3, 4, 5, 9, 9, 9, 9, 9, 9], assistant=[9, 9, 9, 9, 9, 6, 7, 8, 6, 9, 9],
...                 turns=[dict(role='user', start=0, end=5, text='who'), dict(role='assistant', start=5, end=9, text='me')])

A layout says which streams, in which order, in what portions, and what is fed but not learned (~). In duplex3
the model hears a chunk of the user, then writes, then speaks (OmniFlatten, arXiv:2410.17799; + is learned, ·
is silence):

>>> vocab = Letters()                                              # here every letter is a text token
>>> print(draw(flatten(dialogue, get_layout('duplex3', speech_chunk=4), vocab)[0], get_layout('duplex3', 4), vocab))
chunk            |           0 |           1 |           2
user.speech      | 1  2  3  4  | 5  9  9  9  | 9  9  9  ·
assistant.text   | ·+ ·+       | m+ e+       | ·+ ·+
assistant.speech | ·+ ·+ ·+ ·+ | ·+ 6+ 7+ 8+ | 6+ ·+ ·+ ·+
>>> print(draw(flatten(dialogue, get_layout('duplex2', speech_chunk=4), vocab)[0], get_layout('duplex2', 4), vocab))
chunk            |           0 |           1 |           2
user.speech      | 1  2  3  4  | 5  9  9  9  | 9  9  9  ·
assistant.speech | ·+ ·+ ·+ ·+ | ·+ 6+ 7+ 8+ | 6+ ·+ ·+ ·+

The stages before it take whole turns, without a clock: speech to text and back, then the four streams by
turns:

>>> for name in ('asr', 'tts'):
...     for document in flatten(dialogue, get_layout(name), vocab):
...         print(f'{name} ', draw(document, get_layout(name), vocab))
asr  <|asr|>+ <|sos|>+ 1 2 3 4 5 <|eos|>+ <|sot|>+ w+ h+ o+ <|eot|>+
asr  <|asr|>+ <|sos|>+ 6 7 8 6 <|eos|>+ <|sot|>+ m+ e+ <|eot|>+
tts  <|tts|>+ <|sot|>+ w h o <|eot|>+ <|sos|>+ 1+ 2+ 3+ 4+ 5+ <|eos|>+
tts  <|tts|>+ <|sot|>+ m e <|eot|>+ <|sos|>+ 6+ 7+ 8+ 6+ <|eos|>+
>>> print(draw(flatten(dialogue, get_layout('half_duplex'), vocab)[0], get_layout('half_duplex'), vocab))
<|sos|>+ 1 2 3 4 5 <|eos|>+ <|sot|>+ w+ h+ o+ <|eot|>+ <|sot|>+ m+ e+ <|eot|>+ <|sos|>+ 6+ 7+ 8+ 6+ <|eos|>+

Back again: what a layout carries returns exactly; duplex layouts carry no turns of the user.

>>> unflatten(flatten(dialogue, get_layout('duplex3'), vocab)[0].ids, get_layout('duplex3'), vocab, silence_code=9)['turns']
[{'role': 'assistant', 'start': 5, 'end': 9, 'text': 'me'}]

    python flatten.py --layout=duplex3 --tokenizer=FOLDER FILE.jsonl         dialogues in, {"id", "ids", "learned"} out
    python flatten.py --layout=duplex3 --tokenizer=FOLDER --inverse FILE     and the other way

A vocabulary is anything with .control, .code_start, .n_codes, .encode(text) and .decode(ids):
vocabulary.py's, or Letters.
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

# ---------------------------------------------------------------------------------------------------------------------
# layouts

# name: (order, streams). Orders: 'turn', each turn is a document; 'turns', all turns one after the other;
# 'chunks', the streams in portions of so many tokens, for as long as the dialogue lasts.
# A stream belongs to a role, or, without a dot, to the speaker of the turn. ~ is fed, not learned: the user
# is
# listened to, not imitated (paper section 3.3: steadier, as the user's channel is noisy).
LAYOUTS = {
    'asr':         ('turn',   '<|asr|> <|sos|> ~speech <|eos|> <|sot|> text <|eot|>'),
    'tts':         ('turn',   '<|tts|> <|sot|> ~text <|eot|> <|sos|> speech <|eos|>'),
    'half_duplex': ('turns',  {'user':      '<|sos|> ~speech <|eos|> <|sot|> text <|eot|>',
                               'assistant': '<|sot|> text <|eot|> <|sos|> speech <|eos|>'}),
    'duplex3':     ('chunks', '~user.speech 10, assistant.text 2, assistant.speech 10'),
    'duplex2':     ('chunks', '~user.speech 10, assistant.speech 10'),
}


class Slot(NamedTuple):
    what: str       # a control token such as <|sos|>, or a stream: user.speech, assistant.text, …
    n: int          # tokens a chunk; 0: as many as the turn has
    learned: bool

    @property
    def kind(self):
        return self.what.split('.')[-1]     # 'speech', 'text', or the control token itself


@dataclass(frozen=True)
class Layout:
    name: str
    order: str
    # role -> [Slot]; a layout in chunks has one list, of both roles, under 'user' and 'assistant' alike
    slots: dict
    learn_user_text: bool = True

    @cached_property
    def chunk(self):
        return self.slots['assistant'] if self.order == 'chunks' else []

    @cached_property
    def period(self):
        return sum(slot.n for slot in self.chunk)   # tokens a chunk; 0 for layouts by turns

    @cached_property
    def learned(self):
        # [K], of a chunk
        return np.repeat([slot.learned for slot in self.chunk], [slot.n for slot in self.chunk])

    @cached_property
    def speech_chunk(self):
        return next((slot.n for slot in self.chunk if slot.kind == 'speech'), 0)    # frames a chunk

    @cached_property
    def text_chunk(self):
        return next((slot.n for slot in self.chunk if slot.kind == 'text'), 0)      # text tokens a chunk

    def settings(self):
        """What get_layout(**settings) makes this layout of again."""
        return dict(name=self.name, speech_chunk=self.speech_chunk or None, text_chunk=self.text_chunk
                    or None, learn_user_text=self.learn_user_text)


def get_layout(name, speech_chunk=None, text_chunk=None, learn_user_text=True):
    """The layout of that name; 'asr.user' or 'tts.assistant' takes the turns of one role only. Chunk sizes
    are in tokens, None leaves the layout's own. Whether the 4-stream stage learns the user's text (its
    recognition target) is not said in
    the paper: yes, unless learn_user_text is False. Raises ValueError for an unknown name, and for a chunk
    size under 1."""
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
        slots[role] = [Slot(what, int(n or 0), not mark) for mark, what, n in re.findall(r'(~?)([^\s,~]+)(?: '
                                                                                         r'(\d+))?', text)]
        if order == 'chunks':
            slots[role] = [slot._replace(n=sizes[slot.kind] or slot.n) for slot in slots[role]]
        elif role == 'user' and not learn_user_text:
            slots[role] = [
                slot._replace(learned=slot.learned and slot.kind != 'text') for slot in slots[role]]
    return Layout(name + ('.' + only_role if only_role else ''), order, slots, learn_user_text)


# ---------------------------------------------------------------------------------------------------------------------
# dialogue -> ids

class Document(NamedTuple):
    ids: np.ndarray         # int32 [T]
    learned: np.ndarray     # bool [T], is this id a target of the loss
    n_dropped: int          # text tokens that found no room (see lay_text)


TURN = [('role', str), ('start', (int, np.integer)), ('end', (int, np.integer)), ('text', str)]
START = itemgetter('start')


def check(dialogue, n_codes):
    """Raises ValueError, one sentence with the id, unless the dialogue is a record as docs/format.md has
    it."""
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
            raise ValueError(f'{name}: {role} code {codes[at]} at frame {at} is out of range, the codec has '
                             f'0 to {n_codes - 1}')
    n_user, n_assistant = map(len, channels.values())
    if n_user != n_assistant and n_user and n_assistant:
        raise ValueError(f'{name}: channels of unequal length, user {n_user} frames and assistant '
                         f'{n_assistant}; '
                         'cut or pad them to one clock (a one-sided utterance leaves the other empty)')
    last_end, turns = dict.fromkeys(ROLES, 0), dialogue['turns']
    if not isinstance(turns, (list, tuple)) or not all([isinstance(turn, dict) for turn in turns]):
        raise ValueError(f'{name}: turns is not a list of objects with role, start, end and text')
    for key, kind in TURN:
        for turn in turns:
            if not isinstance(turn.get(key), kind):
                raise ValueError(f'{name}: a turn has {key} {turn.get(key)!r}; it needs role, start, end '
                                 '(whole frames) and text')
    for turn in sorted(turns, key=START):
        role, start, end = turn['role'], turn['start'], turn['end']
        if role not in ROLES:
            raise ValueError(f'{name}: a turn has role {role!r}, known are {" and ".join(ROLES)}')
        if not 0 <= start < end <= len(channels[role]):
            raise ValueError(f'{name}: {role} turn {start} to {end} does not lie in its channel of '
                             f'{len(channels[role])} frames')
        if start < last_end[role]:
            raise ValueError(f'{name}: {role} turns overlap, one starts at frame {start} before the last '
                             f'ended at {last_end[role]}')
        last_end[role] = end


def flatten(dialogue, layout, vocab, is_checked=False):
    """dialogue -> [Document]: one, or one per turn for layouts of order 'turn'. Raises ValueError (see check,
    which takes a
    tenth of the time: a loader has it done once)."""
    if not is_checked:
        check(dialogue, vocab.n_codes)
    if layout.order == 'chunks':
        if len(dialogue['user']) != len(dialogue['assistant']):
            raise ValueError(f'dialogue {dialogue["id"]!r} has one channel only, {layout.name} needs both')
        return [lay_chunks(dialogue, layout, vocab)]
    turns = sorted((turn for turn in dialogue['turns'] if turn['role'] in layout.slots),
                   key=lambda turn: turn['start'])
    parts = [lay_turn(dialogue, turn, layout.slots[turn['role']], vocab) for turn in turns]
    if layout.order == 'turns' and parts:
        parts = [
            Document(np.concatenate([p.ids for p in parts]), np.concatenate([p.learned for p in parts]), 0)]
    return parts


def lay_turn(dialogue, turn, slots, vocab):
    streams = dict(
        speech=np.asarray(dialogue[turn['role']][turn['start']:turn['end']], np.int32)
        + np.int32(vocab.code_start), text=vocab.encode(turn['text']))
    parts = [streams[slot.kind] if slot.kind in streams else [vocab.control[slot.what]] for slot in slots]
    n = sum(map(len, parts))
    ids, learned, at = np.empty(n, np.int32), np.empty(n, bool), 0
    for slot, part in zip(slots, parts):
        ids[at:at + len(part)], learned[at:at + len(part)] = part, slot.learned
        at += len(part)
    return Document(ids, learned, 0)


def lay_chunks(dialogue, layout, vocab):
    n_frame = len(dialogue['user'])
    n_chunk = -(-n_frame // layout.speech_chunk)
    # (N chunks, K tokens a chunk)
    ids, learned = np.empty((n_chunk, layout.period), np.int32), np.empty((n_chunk, layout.period), bool)
    learned[:] = layout.learned
    n_dropped = at = 0
    for slot in layout.chunk:
        role = slot.what.split('.')[0]
        if slot.kind == 'speech':       # the last chunk is filled up with silence, on both channels
            stream = np.empty(n_chunk * slot.n, np.int32)
            stream.fill(vocab.control['<|silent_speech|>'] - vocab.code_start)
            codes = np.asarray(dialogue[role])
            # the user's silence is real audio; the assistant's is a token of its own, so that it can be
            # predicted as one
            spans = [(t['start'], t['end']) for t in dialogue['turns'] if t['role'] == role
                     ] if role == 'assistant' else [(0, n_frame)]
            for start, end in spans:
                stream[start:end] = codes[start:end]
            stream += vocab.code_start
        else:
            stream, n_dropped = lay_text(dialogue, role, n_chunk, slot.n, layout.speech_chunk, vocab)
        ids[:, at:at + slot.n] = stream.reshape(n_chunk, slot.n)
        at += slot.n
    return Document(ids.reshape(-1), learned.reshape(-1), n_dropped)


def is_broken_off(turn, turns):
    """Does another role speak into the turn, and still when it ends? That is a barge-in; an "mhm" is over
    before."""
    return any([
        turn['start'] < other['start'] < turn['end'] <= other['end']
        for other in turns
        if other['role'] != turn['role']])


def lay_text(dialogue, role, n_chunk, text_chunk, speech_chunk, vocab):
    """A turn's text starts in the chunk in which its speech starts. Text that outlasts the turn runs on into
    the silence after it, until the role's next turn starts or the dialogue ends; when the other side spoke
    into the turn and on when it ended (a barge-in, no "mhm"), what the speech left unsaid is dropped with it.
    Returns the stream and the count of dropped tokens."""
    stream = np.empty(n_chunk * text_chunk, np.int32)
    stream.fill(vocab.control['<|silent_text|>'])
    turns = sorted([t for t in dialogue['turns'] if t['role'] == role], key=START)
    n_dropped = 0
    for turn, following in zip(turns, turns[1:] + [None]):
        first = turn['start'] // speech_chunk
        limit = following['start'] // speech_chunk if following else n_chunk
        if is_broken_off(turn, dialogue['turns']):
            limit = min(limit, (turn['end'] - 1) // speech_chunk + 1)
        tokens = vocab.encode(turn['text'])
        room = (limit - first) * text_chunk
        kept = tokens[:room]
        # what is kept has to read back as itself: no half characters, nor spaces that hang on the next word
        if len(tokens) > room:
            while kept and vocab.encode(vocab.decode(kept)) != kept:
                kept = kept[:-1]
        stream[first * text_chunk:first * text_chunk + len(kept)] = kept
        n_dropped += len(tokens) - len(kept)
    return stream, n_dropped


# ---------------------------------------------------------------------------------------------------------------------
# ids -> dialogue

def unflatten(ids, layout, vocab, silence_code=0, id=''):
    """ids [T] of one document -> dialogue. The inverse of flatten for all that the layout carries: flatten
    gives the same ids again, if assistant turns have silence between them (or their texts have). What it does
    not carry: the assistant's codes outside its turns come back as silence_code, and layouts by turns put one
    turn after the other. asr gives a user's utterance, tts an assistant's. Raises ValueError where the ids do
    not follow the layout."""
    if not isinstance(ids, (list, np.ndarray)) or (len(ids) and np.asarray(ids).dtype.kind not in 'iu'):
        raise ValueError(f'{layout.name} document {id!r}: ids is not a list of whole numbers')
    ids = np.asarray(ids, np.int64)
    if layout.order == 'chunks':
        return dict(id=id, **read_chunks(ids, layout, vocab, silence_code, f'{layout.name} document {id!r}'))
    channels, turns, at, n_frame = {role: [] for role in ROLES}, [], 0, 0
    while at < len(ids):
        fitting = [role for role in layout.slots if ids[at] == vocab.control[layout.slots[role][0].what]]
        role = 'assistant' if layout.name == 'tts' else fitting[0] if fitting else None
        if not fitting:
            raise ValueError(f'{layout.name} document {id!r}: token {at} is {ids[at]}, where a turn has to '
                             'start')
        at, codes, text = read_turn(ids, at, layout.slots[role], vocab, f'{layout.name} document {id!r}')
        turns.append(dict(role=role, start=n_frame, end=n_frame + len(codes), text=text))
        for each in ROLES:
            channels[each] += codes if each == role else [silence_code
                                                          ] * len(codes) if layout.order == 'turns' else []
        n_frame += len(codes)
    return dict(id=id, **channels, turns=turns)


def read_turn(ids, at, slots, vocab, name):
    codes, text = [], ''
    for slot, following in zip(slots, slots[1:] + [None]):
        if slot.kind not in ('speech', 'text'):
            if at >= len(ids) or ids[at] != vocab.control[slot.what]:
                raise ValueError(f'{name}: token {at} is {ids[at] if at < len(ids) else "missing"}, where '
                                 f'{slot.what} has to stand')
            at += 1
            continue
        # a stream ends at the next control token
        stop = np.flatnonzero(ids[at:] == vocab.control[following.what])
        if not len(stop):
            raise ValueError(f'{name}: no {following.what} after token {at}')
        part, at = ids[at:at + stop[0]], at + int(stop[0])
        if slot.kind == 'speech':
            codes = read_codes(part, vocab, name).tolist()
        else:
            text = vocab.decode(part.tolist())
    return at, codes, text


def read_codes(part, vocab, name):
    codes = part - vocab.code_start
    if len(codes) and not (0 <= codes.min() and codes.max() < vocab.n_codes):
        raise ValueError(f'{name}: an id in a speech slot is no speech code ({vocab.code_start} to '
                         f'{vocab.code_start + vocab.n_codes - 1})')
    return codes


def read_chunks(ids, layout, vocab, silence_code, name):
    if len(ids) % layout.period:
        raise ValueError(f'{name}: {len(ids)} ids are no whole number of chunks of {layout.period}')
    ids = ids.reshape(-1, layout.period)        # (N chunks, K tokens a chunk)
    streams, at = {}, 0
    for slot in layout.chunk:
        streams[slot.what] = ids[:, at:at + slot.n].reshape(-1)
        at += slot.n
    silent_speech, silent_text = vocab.control['<|silent_speech|>'], vocab.control['<|silent_text|>']
    user, said = streams['user.speech'], streams['assistant.speech']
    n_frame = int(np.flatnonzero(user != silent_speech)[-1]) + 1 if (user != silent_speech).any() else 0
    said = said[:n_frame]
    speaking = said != silent_speech
    runs = np.flatnonzero(np.diff(speaking, prepend=False, append=False)).reshape(-1, 2).tolist()
    turns = [dict(role='assistant', start=start, end=end, text='') for start, end in runs]
    if 'assistant.text' in streams:
        text = streams['assistant.text'].reshape(len(ids),
                                                 next(slot.n for slot in layout.chunk if slot.kind == 'text'))
        turns = read_text(runs, text, text != silent_text, layout.speech_chunk, vocab)
    assistant = np.full(n_frame, silence_code)
    assistant[speaking] = read_codes(said[speaking], vocab, name)
    return dict(user=read_codes(user[:n_frame], vocab, name).tolist(), assistant=assistant.tolist(),
                turns=turns)


def read_text(runs, text, written, n, vocab):
    """Each run of speech is a turn and has the text written from its first chunk on, as long as it speaks or
    the text runs on. Text that starts anew while the speech goes on is a turn of its own: two turns touched.
    Flatten never writes otherwise,
    but a model may: text one chunk before speech is that speech's; text that starts anew in silence was never
    said, and is left out."""
    fresh = written[:, 0].copy()                    # [N], does text start in this chunk, after silence
    fresh[1:] &= ~written[:-1, -1]
    spans = []
    for (start, end), following in zip(runs, runs[1:] + [None]):
        cuts = [
            c * n
            for c in range(start // n + 1, (end - 1) // n + 1)
            if fresh[c] and written[start // n:c].any()
        # the next turn's text may start in this one's last chunk
            and not (following and following[0] // n == c)]
        spans += zip([start] + cuts, cuts + [end])
    begins = [start // n for start, _ in spans]
    begins = [c - 1 if c - 1 > before and fresh[c - 1] else c for before, c in zip([-1] + begins, begins)]
    turns = []
    for (start, end), begin, limit in zip(spans, begins, begins[1:] + [len(text)]):
        spoken = (end - 1) // n + 1
        limit = next((c for c in range(spoken, limit) if fresh[c] or not written[c, 0]), limit)
        tokens = text[begin:limit][written[begin:limit]]
        turns.append(dict(role='assistant', start=start, end=end, text=vocab.decode(tokens.tolist())))
    return turns


# ---------------------------------------------------------------------------------------------------------------------
# drawings

class Letters:
    """A vocabulary that can be read without a tokenizer, for pictures and tests: ids are code points."""
    n_codes = 64
    control = {name: 0xE000 + i for i, name in enumerate(CONTROL)}     # in Unicode's private use area
    code_start = 0x110000                                              # after the last code point

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return ''.join(map(chr, ids))


def spell(i, vocab):
    """One id, as short as can be: a code's number, a text token's letters, · for silence, or the control
    token."""
    i = int(i)
    names = {id: name for name, id in vocab.control.items()}
    if i in names:
        return '·' if 'silent' in names[i] else names[i]
    return str(i - vocab.code_start) if i >= vocab.code_start else vocab.decode([i]).replace('\n', '⏎') or '∅'


def draw(document, layout, vocab):
    """The document as text, + behind what is learned; layouts in chunks as a grid, one line a stream."""
    words = [spell(i, vocab) + '+' * int(learned) for i, learned in zip(document.ids, document.learned)]
    if layout.order != 'chunks':
        return ' '.join(words)
    words = np.array(words, object).reshape(-1, layout.period)
    # a token and its + or a space
    cell = max((len(word) - word.endswith('+') for word in words.reshape(-1)), default=1) + 1
    wide = max(slot.n for slot in layout.chunk) * (cell + 1) - 1
    margin = max(len(slot.what) for slot in layout.chunk)
    lines = [f'{"chunk":{margin}}' + ''.join(f' | {c:>{wide}}' for c in range(len(words)))]
    at = 0
    for slot in layout.chunk:
        portions = [
            ' '.join(f'{w if w.endswith("+") else w + " ":>{cell}}'
                     for w in row[at:at + slot.n])
            for row in words]
        lines.append(f'{slot.what:{margin}}' + ''.join(f' | {portion:{wide}}' for portion in portions))
        at += slot.n
    return '\n'.join(line.rstrip() for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def main():
    parser = Parser(description=__doc__.split('\n\n')[0].strip(),
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('path', help='JSON lines of dialogues (or, with --inverse, of ids), - for standard '
                                     'input')
    parser.add_argument('--layout', default='duplex3', help=', '.join(LAYOUTS))
    parser.add_argument('--tokenizer', required=True, help='folder with tokenizer.json, or vocab.json and '
                                                           'merges.txt')
    parser.add_argument('--inverse', action='store_true', help='from ids back to dialogues')
    parser.add_argument('--speech_chunk', type=int, help="frames a chunk, None: the layout's own")
    parser.add_argument('--text_chunk', type=int, help="text tokens a chunk, None: the layout's own")
    parser.add_argument('--learn_user_text', choices=('true', 'false'), default='true', help='half_duplex: '
                        'is the text of '
                        'the user a target')
    parser.add_argument('--n_codes', type=int, default=4096, help="size of the speech codebook (4096: "
                                                                  "CosyVoice's), where FOLDER does not name "
                                                                  "its codes")
    parser.add_argument('--silence_code', type=int, default=0, help='with --inverse: stands where the '
                                                                    'assistant is silent')
    args = parser.parse_args()
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
