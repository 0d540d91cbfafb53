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

A vocabulary is anything with .control, .code_start, .n_codes, .n_text, .encode(text) and .decode(ids): that
of vocabulary.py, or Letters.
"""
import argparse
import json
import signal
import sys
from typing import NamedTuple

import numpy as np

import clock
import templates
from clock import broken_off
from common.files import read_jsonl
from common.record import START, check
from config import Parser
from layouts import LAYOUTS, ROLES, get_layout
from vocabulary import CONTROL, Vocabulary

# ------------------------------------------------------------------------------------------------------------
# dialogue -> ids

class Document(NamedTuple):
    ids: np.ndarray         # int32 [T]
    learned: np.ndarray     # bool [T], is this id a target of the loss
    n_dropped: int = 0      # text tokens that found no room (see lay_text)
    cuts: tuple = ()        # where it may be cut, if its chunks differ in length
    n_frame: int = 0        # of conversation, where the number of codes does not tell


def flatten(dialogue, layout, vocab, is_checked=False, rng=None):
    """
    dialogue -> [Document]: one, or one for each turn or pair of turns, as the layout's order says. Raises
    ValueError where check does, and where the dialogue lacks what the layout needs.
    is_checked  leaves the check out: a loader needs it once, and it takes a tenth of the time
    rng         a numpy Generator, for layouts that draw; None: always the same draws
    """
    if not is_checked:
        check(dialogue, vocab.n_codes, layout.codes_per_frame)
    if layout.order == 'chunks':
        if len(dialogue['user']) != len(dialogue['assistant']):
            raise ValueError(f'dialogue {dialogue["id"]!r} has one channel only, {layout.name} needs both')
        return [lay_chunks(dialogue, layout, vocab)]
    turns = sorted([turn for turn in dialogue['turns'] if turn['role'] in layout.slots], key=START)
    if layout.order == 'pair':
        pairs = [pair for pair in zip(turns, turns[1:]) if (pair[0]['role'], pair[1]['role']) == ROLES]
        spoken = [dict(zip(ROLES, pair)) for pair in pairs]
    else:
        spoken = [{'': turn, turn['role']: turn} for turn in turns]
    # a turn without speech is none for a layout that needs the speech; all turns of a line have a role
    spoken = [turns for turns in spoken if has_speech(turns, layout)]
    if layout.order == 'segments':
        rng = rng or np.random.default_rng(0)
        turns = [turns[''] for turns in spoken]
        return [join(templates.lay_segments(dialogue, turn, layout, vocab, rng))._replace(
            n_frame=turn['end'] - turn['start']) for turn in turns]
    documents = [lay_line(layout.slots[[*turns][-1]], dialogue, turns, vocab, layout) for turns in spoken]
    if layout.order == 'turns' and documents:
        if 'start' in layout.slots:
            documents.insert(0, lay_line(layout.slots['start'], dialogue, {}, vocab, layout))
        ids, learned, *_ = zip(*documents)
        documents = [Document(np.concatenate(ids), np.concatenate(learned))]
    return documents


def has_speech(turns, layout):
    """Is there speech wherever the layout's line for these turns {role: turn} needs some?"""
    roles = [slot.role for slot in layout.spoken[[*turns][-1]]]
    return all([turns[role]['start'] < turns[role]['end'] for role in roles])


def lay_line(items, dialogue, turns, vocab, layout):
    """A line of a layout -> Document. turns: {role: turn}, and '' for whoever speaks"""
    return join(templates.lay(items, dialogue, turns, vocab, layout))


def join(parts):
    """[(ids, learned)] -> Document"""
    n = sum([len(part) for part, _ in parts])
    ids, learned, at = np.empty(n, np.int32), np.empty(n, bool), 0
    for part, is_learned in parts:
        end = at + len(part)
        ids[at:end], learned[at:end] = part, is_learned
        at = end
    return Document(ids, learned)


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
    n_chunk = layout.n_chunk(len(dialogue['user']))
    ids = np.empty((n_chunk, len(layout.learned)), np.int32)    # (N chunks, K tokens a chunk)
    learned = np.empty(ids.shape, bool)
    learned[:] = layout.learned
    n_dropped = at = 0
    for slot, size in zip(layout.chunk, layout.sizes):
        part = slice(at, at + size)
        stream, lost = lay_stream(dialogue, slot, max(0, n_chunk - layout.n_late), layout, vocab)
        n_dropped += lost
        if layout.n_late:
            ids[:, part], learned[:, part] = clock.shift(stream, slot, layout, vocab)
        else:
            ids[:, part] = stream.reshape(n_chunk, size)
        at += size
    cuts, n_frame = (), len(dialogue['user']) * layout.is_ragged
    if layout.is_ragged:
        ids, learned, cuts = clock.drop_repeats(ids, learned, layout)
    prompt = np.array(lay_prompt(dialogue.get('prompt', ''), vocab), np.int32)
    cuts = tuple(len(prompt) + cut for cut in cuts)
    learned = np.concatenate([np.zeros(len(prompt), bool), learned.reshape(-1)])
    return Document(np.concatenate([prompt, ids.reshape(-1)]), learned, n_dropped, cuts, n_frame)


def lay_stream(dialogue, slot, n_chunk, layout, vocab):
    """-> the ids of a slot in all n_chunk chunks, [n_chunk * tokens], and how many tokens found no room"""
    n = layout.speech_chunk
    if slot.kind == 'speech':
        stream = lay_speech(dialogue, slot, n_chunk * n, vocab)
        return clock.mark_turns(stream, dialogue, slot.role, n, vocab) if slot.way == 'turn' else stream, 0
    if slot.kind == 'text':
        lay = {'': lay_text, 'turn': clock.lay_turns, 'word': clock.lay_words}[slot.way]
        return lay(dialogue, slot.role, n_chunk, slot.n, n, vocab)
    if slot.kind == 'state':
        return clock.lay_state(dialogue, n_chunk, n, vocab), 0
    return np.full(n_chunk, vocab.control[slot.what]), 0


def lay_speech(dialogue, slot, n, vocab):
    """
    -> n frames of ids, [n] or, with several codes a frame, [n, codes]. The user's channel is fed as it is:
    its silence is real audio. Of the assistant's channel only the turns are fed; its other frames become
    <|silent_speech|>, a token that can be learned. So do the frames that the last chunk lacks, in both.
    """
    codes = np.asarray(dialogue[slot.role])
    stream = np.empty((n, *codes.shape[1:]), np.int32)
    stream.fill(vocab.control['<|silent_speech|>'] - vocab.code_start)
    if slot.role == 'user' or slot.way in ('real', 'turn'):
        stream[:len(codes)] = codes
        if slot.way == 'dedup':     # the last chunk is then as long as the others when it is read back
            stream[len(codes):] = codes[-1:]
    else:
        for turn in dialogue['turns']:
            if turn['role'] == slot.role:
                stream[turn['start']:turn['end']] = codes[turn['start']:turn['end']]
    stream += vocab.code_start
    return stream


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
    for turn, following, is_cut in zip(turns, turns[1:] + [None], broken_off(turns, dialogue['turns'])):
        first = turn['start'] // speech_chunk       # chunks from first to limit are this turn's
        limit = following['start'] // speech_chunk if following else n_chunk
        if is_cut:
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
    return dict(id=id, **templates.parse(ids, layout, vocab, silence_code, name))


def parse_chunks(ids, layout, vocab, silence_code, name):
    n_prompt = count_prompt(ids, vocab)
    prompt, ids = vocab.decode(ids[1:n_prompt - 1].tolist()) if n_prompt else '', ids[n_prompt:]
    if layout.is_ragged:
        ids = templates.fill_chunks(ids, layout, vocab, name)
    elif len(ids) % layout.period:
        raise ValueError(f'{name}: {len(ids)} ids are no whole number of chunks of {layout.period}')
    chunks = ids.reshape(-1, len(layout.learned))       # (N chunks, K tokens a chunk)
    streams, at = {}, 0                                 # name -> (N, tokens of the slot)
    for slot, size in zip(layout.chunk, layout.sizes):
        part = chunks[:, at:at + size]
        streams[slot.what] = clock.unshift(part, slot, layout) if layout.n_late else part
        at += size
    silent = vocab.control['<|silent_speech|>']
    speech = {what.partition('.')[0]: ids.reshape(-1, layout.codes_per_frame)    # (n_frame, codes)
              for what, ids in streams.items() if '.speech' in what}
    heard = np.flatnonzero((speech['user'] != silent).any(1))
    n_frame = int(heard[-1]) + 1 if len(heard) else 0       # what fills up the last chunk is left out
    dialogue = dict(user=templates.to_codes(speech['user'][:n_frame], layout, vocab, name).tolist())
    said = speech.get('assistant', np.full_like(speech['user'], silent))[:n_frame]
    turns = find_turns(streams, said, n_frame, layout, vocab, silence_code)
    marks = [silent, vocab.control['<|sos|>'], vocab.control['<|eos|>']]
    said = np.where(np.isin(said, marks), np.add(silence_code, vocab.code_start), said)
    dialogue.update(assistant=templates.to_codes(said, layout, vocab, name).tolist(), turns=turns)
    return dialogue | (dict(prompt=prompt) if prompt else {})


def find_turns(streams, said, n_frame, layout, vocab, silence_code):
    """-> the turns that a document in chunks carries. streams: name -> ids (N chunks, tokens); said: ids of
    the assistant's speech (n_frame, codes)"""
    turns = clock.find_turns(streams, layout.speech_chunk, n_frame, vocab)
    if turns is not None:
        return turns
    is_real = 'assistant.speech@real' in streams
    silence = np.add(silence_code, vocab.code_start) if is_real else vocab.control['<|silent_speech|>']
    speaks = (said != silence).any(1)
    runs = np.flatnonzero(np.diff(speaks, prepend=False, append=False)).reshape(-1, 2).tolist()
    if 'assistant.text' in streams:
        return match_text(runs, streams['assistant.text'], layout.speech_chunk, vocab)
    return [dict(role='assistant', start=start, end=end, text='') for start, end in runs]


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

class Names(dict):
    """Control tokens, each of which gets its id when it is first asked for."""

    def __missing__(self, name):
        self[name] = Letters.n_text + len(self)
        return self[name]


class Letters:
    """A vocabulary that can be read without a tokenizer, for drawings and tests: ids are code points."""
    n_text = 0x110000           # after the last code point
    code_start = 0x120000

    def __init__(self, n_codes=64):
        self.n_codes, self.control = n_codes, Names({name: self.n_text + i for i, name in enumerate(CONTROL)})

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return ''.join(map(chr, ids))


def spell(i, vocab):
    """One id in few letters: a code's number, a text token's letters, · for silence, or a control token."""
    i, names = int(i), {id: name for name, id in vocab.control.items()}
    if i in names:
        return '·' if 'silent' in names[i] else names[i]
    return str(i - vocab.code_start) if i >= vocab.code_start else vocab.decode([i]).replace('\n', '⏎') or '∅'


def draw(document, layout, vocab):
    """The document as text, with + after what is learned. Chunks of one length are drawn as a grid, a line a
    stream."""
    words = [spell(i, vocab) + '+' * int(learned) for i, learned in zip(document.ids, document.learned)]
    if not layout.period:
        return ' '.join(words)
    n_prompt = count_prompt(document.ids, vocab)
    prompt, words = ' '.join(words[:n_prompt]), words[n_prompt:]
    words = [word if word.endswith('+') else word + ' ' for word in words]
    cell = max(map(len, words), default=2)
    wide = max(slot.n for slot in layout.chunk) * (cell + 1) - 1
    chunks = [words[at:at + layout.period] for at in range(0, len(words), layout.period)]
    lines, at = [('chunk', [f'{c:>{wide}}' for c in range(len(chunks))])], 0
    for slot, size in zip(layout.chunk, layout.sizes):
        places = size // slot.n         # where a frame has several codes, each has a line
        for place in range(places):
            portions = [' '.join(f'{word:>{cell}}' for word in chunk[at + place:at + size:places])
                        for chunk in chunks]
            name = slot.what + f' {place}' * (places > 1)
            lines.append((name, [f'{portion:{wide}}' for portion in portions]))
        at += size
    margin = max(len(name) for name, _ in lines)
    lines = [' | '.join([f'{name:{margin}}', *cells]).rstrip() for name, cells in lines]
    return '\n'.join([prompt] * bool(prompt) + lines)


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
        help="size of a speech codebook (4096: CosyVoice's), where FOLDER does not name its codes")
    add('--codes_per_frame', type=int, help="of the codec; None: as many as the layout has rows for")
    add('--rate_hz', type=float, default=25.0, help='frames a second of the codec')
    add('--silence_code', type=int, default=0, help='with --inverse: stands where the assistant is silent')
    return parser


def main():
    args = arguments().parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # python flatten.py … | head
    layout = get_layout(args.layout, args.speech_chunk, args.text_chunk, args.learn_user_text == 'true',
                        args.codes_per_frame, args.rate_hz)
    if args.n_codes < 1:
        raise ValueError(f'--n_codes={args.n_codes}: a codebook has at least one code')
    vocab = Vocabulary.load(args.tokenizer, args.n_codes * layout.codes_per_frame, layout.control)
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
