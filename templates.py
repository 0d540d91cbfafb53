"""
Layouts by turns: a line of slots (layouts.py) becomes ids, and is read back id by id.

    lay         what is said -> ids
    Reader      ids -> what is said. It says at each step which ids may come: unflatten gives it those of a
                document, and decode.py those that a model chooses. So what can be trained can be decoded, and
                a document that is read back was laid by the same line.

Besides plain slots a line has groups, drawn here with letters as text and numbers as codes:

>>> from flatten import Letters, draw, flatten
>>> from layouts import LAYOUTS, get_layout
>>> word = dict(text='hi', start=0, end=1), dict(text='yo', start=1, end=3)
>>> turn = dict(role='user', start=0, end=3, text='hi yo', words=list(word))
>>> hello = dict(id='hello', user=[1, 2, 3], assistant=[], turns=[turn])
>>> def show(line):
...     layout = get_layout('mine', table={'mine': ('turn', line)})
...     print(draw(flatten(hello, layout, Letters())[0], layout, Letters()))

Portions in turn, until both streams have ended; once one has, the other goes on alone:

>>> show('[text 2 : speech 1] <|eos|>')
h+ i+ 1+  + y+ 2+ o+ 3+ <|eos|>+

Rows side by side, column by column. Each row ends with <|eot|> or <|eos|>; speech may come some columns late:

>>> show('[text | speech +1]')
h+ ·+ i+ 1+  + 2+ y+ 3+ o+ <|eos|>+ <|eot|>+ ·

Words one by one, with the codes in which each is said:

>>> show('{word / <|sot|>} <|eot|> {word <|sos|> speech <|eos|>} <|eot|>')
h+ i+ <|sot|>+ y+ o+ <|eot|>+ h+ i+ <|sos|>+ 1+ <|eos|>+ y+ o+ <|sos|>+ 2+ 3+ <|eos|>+ <|eot|>+
"""
import re
from itertools import accumulate
from typing import NamedTuple

import numpy as np

import clock
from layouts import DURATIONS, ROLES, Group

WIDE = '[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]'      # Chinese and Japanese, without spaces between words

# ------------------------------------------------------------------------------------------------------------
# what is said -> ids


def lay(items, dialogue, turns, vocab, layout):
    """-> [(ids, learned)], a part for each item. turns: role -> its turn; '' -> that of whoever speaks"""
    parts, text = [], ()
    for item in items:
        if isinstance(item, Group):
            parts += LAY[item.kind](item, dialogue, turns, vocab, layout)
            continue
        ids = stream_ids(item, dialogue, turns.get(item.role), vocab, layout)
        if item.kind == 'literal' and ids[0] in text:
            text = vocab.decode(text)
            raise ValueError(f'dialogue {dialogue["id"]!r}: {text!r:.60} contains the beginning of '
                             f'{item.what[1:-1]!r}, by which {layout.name} ends it')
        text = ids if item.kind in ('text', 'word', 'prompt') else ()
        parts.append((ids, item.learned))
    return parts


def stream_ids(slot, dialogue, turn, vocab, layout):
    match slot.kind:
        case 'speech':
            codes = np.asarray(dialogue[turn['role']][turn['start']:turn['end']], np.int32)
            return codes.reshape(-1) + np.int32(vocab.code_start)
        case 'text' | 'word':
            return vocab.encode(turn['text'])
        case 'prompt':
            return vocab.encode(dialogue.get('prompt', ''))
        case 'literal':
            return vocab.encode(slot.what[1:-1])
        case 'duration':
            sec = (turn['end'] - turn['start']) / layout.rate_hz    # 27 frames of 75 a second: <|t_0.36|>
            if round(100 * sec) >= len(DURATIONS):
                raise ValueError(f'dialogue {dialogue["id"]!r}: the word {turn["text"]!r:.40} lasts '
                                 f'{sec:.1f} s, and {DURATIONS[-1]} is the longest')
            return [vocab.control[DURATIONS[round(100 * sec)]]]
    return [vocab.control[slot.what]]


def lay_words(group, dialogue, turns, vocab, layout):
    items, between = group.parts[0], group.parts[1] if len(group.parts) > 1 else []
    role = items[0].role
    words = say_words(dialogue, turns[role], layout)
    parts = []
    for i, word in enumerate(words):
        parts += lay(items, dialogue, {role: word}, vocab, layout)
        parts += lay(between, dialogue, {}, vocab, layout) if between and i < len(words) - 1 else []
    return parts


def say_words(dialogue, turn, layout):
    """-> the words of a turn, each with the frames from the end of the word before it (a pause belongs to
    the word behind it, as in OuteTTS), and the last with the rest of the turn."""
    if not turn.get('words'):
        raise ValueError(f'dialogue {dialogue["id"]!r}: the {turn["role"]} turn at frame {turn["start"]} has '
                         f'no words with their times, which {layout.name} needs (docs/corpora.md: word '
                         'times)')
    ends = list(accumulate([word['end'] for word in turn['words'][:-1]], max)) + [turn['end']]
    return [dict(role=turn['role'], start=start, end=end, text=word['text'])
            for word, start, end in zip(turn['words'], [turn['start'], *ends], ends)]


def lay_portions(group, dialogue, turns, vocab, layout):
    streams = []
    for slot, in group.parts:
        size = slot.n * (layout.codes_per_frame if slot.kind == 'speech' else 1)
        streams.append((stream_ids(slot, dialogue, turns[slot.role], vocab, layout), size, slot.learned))
    n_round = max(-(-len(ids) // size) for ids, size, _ in streams)
    return [(ids[n * size:n * size + size], learned)
            for n in range(n_round) for ids, size, learned in streams]


def lay_rows(group, dialogue, turns, vocab, layout):
    """Behind its <|eot|> a row of text is not learned; rows of speech are, up to the column in which the last
    of them ends (as in SLAM-LLM's training of Mini-Omni)."""
    blocks = []
    for slot, in group.parts:
        ids = np.asarray(stream_ids(slot, dialogue, turns[slot.role], vocab, layout), np.int32)
        blocks.append(lay_row(ids, slot, vocab, layout))        # (columns, rows of the slot)
    n_column = max(map(len, blocks))
    ids, learned = [], []
    for (slot,), block in zip(group.parts, blocks):
        silent, n = vocab.control[f'<|silent_{slot.kind}|>'], n_column - len(block)
        ids.append(np.pad(block, ((0, n), (0, 0)), constant_values=silent))
        learned.append(np.pad(np.full(block.shape, slot.learned), ((0, n), (0, 0))))
    return [(np.hstack(ids).reshape(-1), np.hstack(learned).reshape(-1))]


def lay_row(ids, slot, vocab, layout):
    """ids of a stream -> its rows, (columns, tokens a column), late by the slot's delays, with their end."""
    end, silent = vocab.control[END[slot.kind]], vocab.control[f'<|silent_{slot.kind}|>']
    width, n = (layout.codes_per_frame if slot.kind == 'speech' else 1), slot.n or 1
    frames = np.append(ids, [end] * width).reshape(-1, width)
    frames = np.pad(frames, ((0, -len(frames) % n), (0, 0)), constant_values=silent)
    columns = frames.reshape(-1, n * width)
    delays = np.resize(slot.delays or [0], width).tolist() * n
    rows = [np.pad(column, (late, max(delays) - late), constant_values=silent)
            for column, late in zip(columns.T, delays)]
    return np.stack(rows, 1)


LAY = {'[:': lay_portions, '[|': lay_rows, '{': lay_words}
END = {'text': '<|eot|>', 'speech': '<|eos|>'}


# ------------------------------------------------------------------------------------------------------------
# stretches of speech and text at random (USDM, arXiv:2402.05706, its pre-training)

def lay_segments(dialogue, turn, layout, vocab, rng):
    """
    The turn is cut at starts of words into segments of about 10 s. Of each either the text or the speech is
    written, at even odds; and at even odds <|correspond|> follows, with the other of the two. <|continue|>
    stands between two segments where speech follows text or text speech.
    """
    text, speech, go_on, pair, finish = layout.slots[turn['role']]
    words = whole_words(dialogue, turn, layout)
    firsts = cut_at_words([word['start'] - turn['start'] for word in words], turn['end'] - turn['start'],
                          speech.n, rng)
    parts, last = [], None
    for first, end in zip(firsts, firsts[1:] + [len(words)]):
        segment = words[first:end]
        span = dict(role=turn['role'], start=segment[0]['start'], end=segment[-1]['end'],
                    text=join_words([word['text'] for word in segment]))
        is_text, has_both = rng.random() < 0.5, rng.random() < 0.5
        for n, slot in enumerate((text, speech) if is_text else (speech, text)):
            if n == 1 and not has_both:
                break
            if n == 1 or last not in (None, slot):
                parts.append(([vocab.control[(pair if n else go_on).what]], True))
            if slot is text and last is text:
                span['text'] = ' ' + span['text']
            parts.append((stream_ids(slot, dialogue, span, vocab, layout), slot.learned))
            last = slot
    return parts + [([vocab.control[finish.what]], True)]


def whole_words(dialogue, turn, layout):
    """-> the words of a turn, so that each frame of it belongs to one: a pause by half to both its
    neighbours, a word without frames to its neighbours."""
    words = [dict(word) for word in turn.get('words') or say_words(dialogue, turn, layout)]
    words[0]['start'], words[-1]['end'] = turn['start'], turn['end']
    for word, following in zip(words, words[1:]):       # words may overlap
        middle = (min(word['end'], turn['end']) + following['start'] + 1) // 2
        word['end'] = following['start'] = max(middle, word['start'])
    i = 0
    while i < len(words) and len(words) > 1:
        if words[i]['start'] < words[i]['end']:
            i += 1
            continue
        # into the word before, or, at the beginning, into the next; a healthy word behind it is taken along
        first = max(i - 1, 0)
        has_next = i + 1 < len(words) and (not i or words[i + 1]['start'] < words[i + 1]['end'])
        joined = words[first:i + 1 + has_next]
        words[first:i + 1 + has_next] = [dict(text=join_words([word['text'] for word in joined]),
                                              start=joined[0]['start'], end=joined[-1]['end'])]
        i = first
    return words


def cut_at_words(starts, n_frame, n_segment_frame, rng):
    """-> numbers of the words at which segments begin. The border k of K lies where a normal distribution
    says (mean n_frame * k / K, standard deviation n_frame / 2K, at most two of them away), at the nearest
    start of a word."""
    n_segment = n_frame // n_segment_frame + 1
    firsts = {0}
    for k in range(1, n_segment):
        away = 3.0
        while abs(away) > 2:
            away = rng.standard_normal()
        border = n_frame / n_segment * (k + away / 2)
        at = [*starts, n_frame]
        firsts.add(min(range(len(at)), key=lambda i: abs(at[i] - border)))
    return sorted(firsts - {len(starts)})


def join_words(texts):
    """Words as a text; between Chinese characters there is no space."""
    return re.sub(f'(?<={WIDE}) (?={WIDE})', '', ' '.join(texts))


# ------------------------------------------------------------------------------------------------------------
# ids -> what is said

class Choice(NamedTuple):
    """A step at which one of several ids may come."""
    kind: str           # 'text' or 'speech'
    allowed: tuple      # ranges of ids: (first, end), …
    stops: tuple = ()   # those among them with which a stream ends


class Reader:
    """
    read(items) is a generator. It yields an array of ids that have to come, or a Choice, and is then sent the
    id that came. found gets the streams: their ids by name, and 'words', for each word a dict of its own.
        given       name of a stream -> its ids, where they are known before; they have to come
        is_mute     nothing is said where speech could be written beside text
    """

    def __init__(self, layout, vocab, given=None, is_mute=False):
        self.layout, self.vocab, self.given, self.is_mute = layout, vocab, given or {}, is_mute
        self.found = {}
        self.held = None        # an id that ended a stream, and begins what follows

    def read(self, items, after=()):
        for i, item in enumerate(items):
            stops = self.firsts(items[i + 1:], after)
            if isinstance(item, Group):
                yield from READ[item.kind](self, item, stops)
            elif item.kind in ('speech', 'text', 'word', 'prompt'):
                yield from self.read_stream(item, stops, item.n if self.layout.is_ragged else None)
            elif item.kind == 'duration':
                yield from self.take(Choice('text', self.ranges(item)[0]))
            else:
                ids = stream_ids(item, {}, None, self.vocab, self.layout)
                yield from self.expect(np.asarray(ids))

    def parse(self, items, ids, at, name, after=()):
        """-> what is found in ids, from place at on, and where it ends. Raises ValueError where other ids
        have to stand."""
        self.found = {}
        steps = self.read_segments(items) if self.layout.order == 'segments' else self.read(items, after)
        step = next(steps, None)
        while step is not None:
            if isinstance(step, Choice):
                came = int(ids[at]) if at < len(ids) else None
                if came is None or not is_in(came, step.allowed):
                    raise ValueError(f'{name}: token {at} is {"missing" if came is None else came}, where '
                                     f'{step.kind} has to stand')
                at, step = at + 1, advance(steps, came)
                continue
            for id in step:
                if at >= len(ids) or ids[at] != id:
                    names = {id: name for name, id in self.vocab.control.items()}
                    came = ids[at] if at < len(ids) else 'missing'
                    raise ValueError(f'{name}: token {at} is {came}, where '
                                     f'{names.get(int(id), int(id))} has to stand')
                at += 1
            step = next(steps, None)
        at, self.held = at - (self.held is not None), None      # what was held is of those after
        return self.found, at

    def take(self, choice):
        """-> the next id, which is one of the allowed"""
        id, self.held = self.held, None
        return (yield choice) if id is None else id

    def expect(self, ids):
        if self.held is not None:
            assert self.held == ids[0], (self.held, ids)
            ids, self.held = ids[1:], None
        if len(ids):
            yield ids

    def ranges(self, slot):
        return allowed(slot, self.layout, self.vocab)

    def firsts(self, items, after=()):
        """-> ranges of the ids with which items can begin; after: with which what follows them can"""
        found = ()
        for item in items:
            if isinstance(item, Group):
                slots = [part[0] for part in item.parts]
                for slot in slots if item.kind == '[:' else slots[:1]:
                    found += self.firsts([slot])
                if item.kind == '[|':
                    return found + one(self.vocab.control[END[slots[0].kind]])
            elif item.kind in ('speech', 'text', 'word', 'prompt'):
                found += self.ranges(item)[0]
            elif item.kind == 'duration':
                return found + self.ranges(item)[0]
            else:
                first = int(stream_ids(item, {}, None, self.vocab, self.layout)[0])
                return found + one(first)
        return found + after

    def read_stream(self, slot, stops, n_most=None):
        """The stream's ids, up to one that begins what follows, or n_most of them."""
        ids = self.found.setdefault(slot.what, [])
        if slot.what in self.given:
            ids += self.given[slot.what]
            yield from self.expect(np.asarray(self.given[slot.what], np.int64))
            return
        if self.is_mute and slot.kind == 'speech':
            return
        places, n, kind = self.ranges(slot), 0, 'speech' if slot.kind == 'speech' else 'text'
        while n != n_most:
            place = n % len(places)     # a frame ends with its last code, and a chunk has one at least
            ends = stops if not place and (n or not self.layout.is_ragged) else ()
            id = yield from self.take(Choice(kind, places[place] + ends, ends))
            if is_in(id, ends):
                self.held = id
                return
            ids.append(id)
            n += 1

    def read_words(self, group, stops):
        items, *between = group.parts
        outer, starts = self.found, self.firsts(items)
        outer['words'] = []
        if 'words' in self.given and not any(item.kind == 'speech' for item in items):
            yield from self.expect_words(items, between)
            return
        may_come = starts
        while True:
            self.held = yield from self.take(Choice('text', may_come + stops, stops))
            if is_in(self.held, stops):
                return
            self.found = {}
            if between and outer['words']:
                yield from self.read(between[0], starts)
            may_come = self.firsts(between[0]) if between else starts
            yield from self.read(items, may_come + stops)
            outer['words'].append(self.found)
            self.found = outer

    def expect_words(self, items, between):
        """A text that is known before, word by word"""
        for i, ids in enumerate(self.given['words']):
            yield from self.read(between[0]) if i and between else ()
            self.given['word'] = ids
            yield from self.read(items)
        self.given.pop('word', None)

    def read_portions(self, group, stops):
        slots = [slot for slot, in group.parts if slot.kind == 'text' or not self.is_mute]
        while slots:
            for slot in list(slots):
                if slot.what in self.given:
                    ids, self.given[slot.what] = np.split(self.given[slot.what], [slot.n])
                    self.found[slot.what] = self.found.get(slot.what, []) + ids.tolist()
                    yield from self.expect(ids)
                    if not len(self.given[slot.what]):
                        slots.remove(slot)
                    continue
                is_last = not any(len(self.given.get(other.what, ())) for other in slots)
                others = sum((self.ranges(other)[0] for other in slots if other is not slot), ())
                n = slot.n * (self.layout.codes_per_frame if slot.kind == 'speech' else 1)
                # while a text is known that has to be written, the speech goes on
                yield from self.read_stream(slot, others + stops if is_last else (),
                                            n if len(slots) > 1 else None)
                if self.held is not None:       # this stream has ended
                    slots.remove(slot)
                    if is_in(self.held, stops):
                        return

    def read_rows(self, group, stops):
        rows = []       # (slot, place in the frame, ranges of ids, columns that it is late)
        for slot, in group.parts:
            places = self.ranges(slot)
            delays = np.resize(slot.delays or [0], len(places)).tolist()
            rows += [(slot, *row) for row in zip(range(len(places)), places, delays)] * (slot.n or 1)
        said = {(slot, place): [] for slot, place, _, _ in rows}
        ended = {key: self.is_mute and key[0].kind == 'speech' for key in said}
        column = 0
        while not all(ended.values()):
            for slot, place, ranges, late in rows:
                end = one(self.vocab.control[END[slot.kind]])
                if column < late or ended[slot, place]:
                    yield from self.expect(np.asarray([self.vocab.control[f'<|silent_{slot.kind}|>']]))
                    continue
                if slot.what in self.given:
                    id = self.given[slot.what].pop(0) if self.given[slot.what] else end[0][0]
                    yield from self.expect(np.array([id]))
                else:
                    id = yield from self.take(Choice(slot.kind, ranges + end, end))
                if is_in(id, end):
                    ended[slot, place] = True
                else:
                    said[slot, place].append(id)
            column += 1
        for slot, in group.parts:
            codes = [said[slot, place] for place in range(len(self.ranges(slot)))]
            self.found[slot.what] = [id for frame in zip(*codes) for id in frame]

    def read_segments(self, items):
        """Finds them as words are found: {'word': ids, 'speech': ids}, or one of the two."""
        text, speech, go_on, pair, end = items
        marks = {one(self.vocab.control[mark.what]): mark for mark in (go_on, pair, end)}
        streams = {self.ranges(text)[0]: 'word', self.ranges(speech)[0]: 'speech'}
        self.found['words'], is_pair = [], False
        while True:
            id = yield from self.take(Choice('text', sum((*marks, *streams), ())))
            mark = next((mark for ranges, mark in marks.items() if is_in(id, ranges)), None)
            if mark == end:
                return
            if mark:
                is_pair = mark == pair
                continue
            self.held = id
            kind = next(kind for ranges, kind in streams.items() if is_in(id, ranges))
            if not is_pair or not self.found['words']:
                self.found['words'].append({})
            slot = text if kind == 'word' else speech
            others = sum((*marks, *(ranges for ranges in streams if ranges != self.ranges(slot)[0])), ())
            self.found[slot.what] = []
            yield from self.read_stream(slot, others)
            self.found['words'][-1][kind] = self.found.pop(slot.what)
            is_pair = False


READ = {'[:': Reader.read_portions, '[|': Reader.read_rows, '{': Reader.read_words}


def allowed(slot, layout, vocab):
    """-> for each place of a frame, or the one of text, the ranges of ids that a stream may have there"""
    marks = [vocab.control[name] for name in MARKS.get(slot.what.partition('.')[2] or slot.kind, ())]
    if layout.order == 'chunks' and slot.kind in ('text', 'speech'):
        marks.append(vocab.control[f'<|silent_{slot.kind}|>'])
    marks = tuple((id, id + 1) for id in marks)
    if slot.kind == 'speech':
        size = vocab.n_codes // layout.codes_per_frame      # each place has codes of its own
        firsts = [vocab.code_start + place * size for place in range(layout.codes_per_frame)]
        return [((first, first + size), *marks) for first in firsts]
    if slot.kind == 'duration':
        ids = [vocab.control[name] for name in DURATIONS]
        return [((min(ids), max(ids) + 1),)]
    return [marks if slot.kind == 'state' else ((0, vocab.n_text), *marks)]


MARKS = {'text@turn': ('<|begin|>', '<|eot|>'), 'text@word': ('<|epad|>',),
         'speech@turn': ('<|sos|>', '<|eos|>'), 'state': ('<|irq|>', '<|n-irq|>')}


def advance(steps, came):
    """Sends a Reader's steps the id that came -> the next step; None at the end"""
    try:
        return steps.send(came)
    except StopIteration:
        return None


def one(id):
    return ((id, id + 1),)


def is_in(id, ranges):
    return any(first <= id < end for first, end in ranges)


# ------------------------------------------------------------------------------------------------------------
# a document -> dialogue

def parse(ids, layout, vocab, silence_code, name):
    """Layouts by turns -> channels, turns and prompt of a dialogue, one turn after the other"""
    reader, channels, turns, prompt, at = Reader(layout, vocab), {r: [] for r in ROLES}, [], '', 0
    firsts = {role: reader.firsts(items) for role, items in layout.slots.items()}
    if len(ids) and 'start' in layout.slots:
        found, at = reader.parse(layout.slots['start'], ids, at, name)
        prompt = vocab.decode(found.get('prompt', []))
        del firsts['start']
    # a side of which a layout has no speech keeps an empty channel
    sides = [role for role in ROLES if layout.order in ('turns', 'pair') and layout.has_speech_of(role)]
    n_frame = 0
    while at < len(ids):
        line = next((role for role, ranges in firsts.items() if is_in(ids[at], ranges)), None)
        if not line:
            raise ValueError(f'{name}: token {at} is {ids[at]}, where a turn has to start')
        found, at = reader.parse(layout.slots[line], ids, at, name)
        prompt = vocab.decode(found.get('prompt', [])) or prompt
        for role, streams in by_role(found, line, layout):
            codes = to_codes(np.array(streams.get('speech', []), np.int64), layout, vocab, name)
            end, words = n_frame + len(codes), read_words(streams.get('words'), n_frame, layout, vocab)
            text = vocab.decode(streams['text']) if 'text' in streams else join_words(
                [word['text'] for word in words])
            turn = dict(role=role, start=n_frame, end=end, text=text)
            turns.append(dict(turn, words=words) if words else turn)
            for each in {role, *sides} if len(codes) else ():
                channels[each] += codes.tolist() if each == role else [silence_code] * len(codes)
            n_frame = end
    return dict(channels, turns=turns) | (dict(prompt=prompt) if prompt else {})


def by_role(found, line, layout):
    """What a Reader found in a line -> [(role, {'speech': ids, 'text': ids, 'words': …})], in their order"""
    if layout.order == 'pair':
        return [(role, {what.split('.')[1]: ids for what, ids in found.items() if what.startswith(role)})
                for role in ROLES]
    if layout.order in ('turn', 'segments') and len(layout.slots) == 2:
        line = 'assistant' if layout.is_voice else 'user'       # both have this line
    if 'words' in found:
        found['speech'] = [id for word in found['words'] for id in word.get('speech', ())]
    return [(line, found)]


def read_words(words, start, layout, vocab):
    """[{'word': ids, 'speech': ids}] of a Reader -> the words of a turn that starts at that frame"""
    read = []
    for word in words or ():
        end = start + len(word.get('speech', ())) // layout.codes_per_frame
        read.append(dict(text=vocab.decode(word.get('word', [])), start=start, end=end))
        start = end
    return read


def to_codes(ids, layout, vocab, name):
    """ids of speech -> codes, [n_frame] or [n_frame, codes]"""
    codes = ids - vocab.code_start
    if codes.size and not (0 <= codes.min() and codes.max() < vocab.n_codes):
        raise ValueError(f'{name}: an id in a speech slot is no speech code ({vocab.code_start} to '
                         f'{vocab.code_start + vocab.n_codes - 1})')
    return codes.reshape(-1, layout.codes_per_frame) if layout.codes_per_frame > 1 else codes.reshape(-1)


def fill_chunks(ids, layout, vocab, name):
    """A document in chunks that lack their repeats -> ids of whole chunks"""
    reader, filled, at = Reader(layout, vocab), [], 0
    firsts = reader.firsts(layout.chunk)
    ids = [*ids.tolist(), firsts[0][0]]     # the last stream, too, ends where a chunk begins
    while at < len(ids) - 1:
        found, at = reader.parse(layout.chunk, ids, at, name, firsts)
        for slot in layout.chunk:
            codes = found[slot.what] if slot.kind == 'speech' else [vocab.control[slot.what]]
            filled += clock.repeat(codes, slot.n)
    return np.array(filled, np.int64)
