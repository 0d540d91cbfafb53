"""
Drawings for the terminal: a dialogue against time, and the rows that a model in training gets.

    python -m measures.draw data/demo --index=1         a dialogue, who speaks when
    python train.py config/demo.py --show=1             rows, from the tensors of a batch alone:

    chunk            |               0 |               1
    user.speech      |  0   1   2   3  |  4  15~  6   7      fed, not learned; ~ was replaced by user_noise
                next |              aᵗ |              cᵗ     what has to be predicted at that token
    assistant.text   | a+  b+          | c+  d+              + is learned, where the token before it was fed
                next | bᵗ  ·⁻          | dᵗ 36ˢ
    assistant.speech |  ·+ 33+ 34+ 35+ | 36+ 37+  ·+  ·+
                next | 33ˢ 34ˢ 35ˢ     | 37ˢ  ·⁻  ·⁻         ᵗ text, ˢ speech, ⁻ silence

With a wrong mask a token lacks its mark; a wrong target is marked with a red !.
"""
import argparse
import os
import re
import shutil
import sys
from copy import copy
from typing import NamedTuple

import numpy as np

from config import Parser
from data.dialogues import Dialogues
from data.loader import STREAMS
from flatten import ROLES, count_prompt, flatten, get_layout, spell
from measures.losses import token_weights
from templates import Reader, allowed, is_in
from vocabulary import Vocabulary

GREY, GREEN, YELLOW, CYAN, RED, BOLD, PLAIN = (f'\033[{n}m' for n in (90, 32, 33, 36, 31, 1, 0))


def print_coloured(text):
    """Prints text, without its colours if the output is no terminal. NO_COLOR and FORCE_COLOR overrule that
    (no-color.org, force-color.org)."""
    is_coloured = sys.stdout.isatty() or os.environ.get('FORCE_COLOR')
    print(text if is_coloured and not os.environ.get('NO_COLOR') else re.sub('\033\\[\\d+m', '', text))


# ------------------------------------------------------------------------------------------------------------
# a dialogue against time

def show(dialogue, layout, vocab, rate_hz, columns=110):
    """-> the dialogue against time, a character a frame. Grey is fed, green is learned, and where both speak
    it is yellow."""
    document, = flatten(dialogue, layout, vocab)
    n = layout.speech_chunk
    ids = document.ids[count_prompt(document.ids, vocab):]
    chunks = ids.reshape(-1, layout.period)                 # (N chunks, K tokens a chunk)
    lines = draw_speech(dialogue['turns'], len(chunks) * n)
    in_chunks = {name: [line[at:at + n] for at in range(0, len(line), n)] for name, line in lines.items()}
    rows = [('seconds', '', [f'{c * n / rate_hz:.1f}' for c in range(len(chunks))]),
            ('user words', '', in_chunks['user words'])]
    at = 0
    for slot, size in zip(layout.chunk, layout.sizes):
        if slot.kind == 'speech':
            cells = in_chunks[slot.role]
        else:
            cells = [''.join(spell(i, vocab) for i in ids[at:at + size]) for ids in chunks]
        rows.append((slot.what, GREEN if slot.learned else GREY, cells))
        at += size
    head = (f'{BOLD}{dialogue["id"]}{PLAIN}  {len(chunks)} chunks of {n} frames, {document.ids.size} tokens, '
            f'{document.learned.sum()} learned, {document.n_dropped} text tokens dropped')
    told = [f'prompt: {dialogue["prompt"]}'] if dialogue.get('prompt') else []
    return '\n'.join([head, *told, *side_by_side(rows, n, columns)])


def draw_speech(turns, n_frame):
    """-> {name: a character for each frame}. 'user', 'assistant': █ where the role speaks, ▓ where both do, ▁
    elsewhere; 'user words': the user's text from the start of each turn, a letter a frame."""
    speaks = {role: np.zeros(n_frame, bool) for role in ROLES}
    words = np.full(n_frame, ' ', '<U1')
    for turn in turns:
        start = turn['start']
        speaks[turn['role']][start:turn['end']] = True
        if turn['role'] == 'user':
            letters = list(turn['text'])[:n_frame - start]
            words[start:start + len(letters)] = letters
    bar = np.where(speaks['user'] & speaks['assistant'], '▓', '█')
    bars = {role: ''.join(np.where(speaks[role], bar, '▁')) for role in ROLES}
    return {**bars, 'user words': ''.join(words)}


def side_by_side(rows, n, columns):
    """rows: [(name, colour, [cell of each chunk])] -> lines, with as many chunks beside each other as fit. n:
    frames a chunk; columns: of the terminal"""
    margin = max(len(name) for name, _, _ in rows)
    wide = max([n] + [len(cell) for _, _, cells in rows for cell in cells])
    n_shown, lines = max(1, (columns - margin) // (wide + 1)), []
    for first in range(0, len(rows[0][2]), n_shown):
        for name, colour, cells in rows:
            line = f'{GREY}|{PLAIN}{colour}'.join(f'{cell:{wide}}' for cell in cells[first:first + n_shown])
            line = re.sub('(▓+)', rf'{YELLOW}\1{PLAIN}{colour}', line)
            lines.append(f'{name:{margin}} {colour}{line}{PLAIN}')
        lines.append('')
    return lines


# ------------------------------------------------------------------------------------------------------------
# rows of a batch

class Row(NamedTuple):
    """A row of a batch, or one document in it: arrays [T]."""
    idx: np.ndarray
    clean: np.ndarray       # idx before user_noise
    pos: np.ndarray
    doc: np.ndarray
    target: np.ndarray      # -1 where nothing is learned
    stream: np.ndarray
    weight: np.ndarray      # of the target in the loss

    def documents(self):
        """-> [Row], one for each document, and one for padding"""
        starts = [0, *(np.flatnonzero(np.diff(self.doc)) + 1).tolist(), len(self.doc)]
        return [Row(*(x[start:end] for x in self)) for start, end in zip(starts, starts[1:])]

    def is_padding(self):
        return not self.idx.any() and (self.target < 0).all()       # id 0 throughout, and nothing is learned

    def is_wrong(self):
        """-> bool [T]: targets that are not the token fed next. Which token follows the last is unknown."""
        wrong = (self.target[:-1] >= 0) & (self.target[:-1] != self.idx[1:])
        return np.append(wrong, False)


def get_rows(batch, weights, clean, n_row):
    """The first n_row rows of a data.loader.Batch -> [Row], made from its tensors alone. weights and clean as
    in draw_batch."""
    learn = batch.learn.cpu().numpy()
    clean = batch.idx if clean is None else clean
    arrays = [x.cpu().numpy() for x in (batch.idx, clean, batch.pos, batch.doc)]
    for empty, values in ((-1, batch.targets), (0, batch.stream), (0.0, weights)):
        values = values.cpu().numpy()
        spread = np.full(batch.idx.numel(), empty, values.dtype)    # (B * T)
        spread[learn] = values
        arrays.append(spread.reshape(batch.idx.shape))
    return [Row(*(x[b] for x in arrays)) for b in range(n_row)]


# mark and colour of each of STREAMS; the marks are for screens without colours
LOOKS = list(zip('ᵗˢ⁻', (GREEN, CYAN, YELLOW)))


def draw_batch(batch, layouts, vocab, streams, weights, n_row=1, columns=110, clean=None):
    """
    -> a drawing of the first n_row rows of a data.loader.Batch, to see whether masks and targets are right.
    Under each token that is fed stands the one to be predicted there, which is the token fed next. (In
    chunks, the first of assistant.text stands under the last of user.speech.)
    weights (N): of the targets in the loss; clean (B, T): idx before user_noise; None: there was no noise
    """
    looks = ', '.join(f'{colour}{mark} {name}{PLAIN}' for (mark, colour), name in zip(LOOKS, streams))
    lines = [f'fed: {GREEN}+ is learned{PLAIN}, {GREY}others are not{PLAIN}, {YELLOW}~ was replaced by '
             f'user_noise{PLAIN}; next: what has to be predicted there, {looks}, '
             f'{RED}! is not the next token{PLAIN}']
    for b, row in enumerate(get_rows(batch, weights, clean, n_row)):
        lines.append(f'{BOLD}row {b}{PLAIN}: ' + summary(row, streams))
        for document in row.documents():
            lines += draw_document(document, layouts, vocab, columns)
        lines.append('')
    return '\n'.join(lines)


def show_rows(stage, vocab, text_weight, n_row):
    """Prints the first n_row rows of a stage of train.py, from the tensors that the model would get."""
    print(f'stage {stage.name}')
    columns, n_shown = shutil.get_terminal_size((110, 24)).columns, 0
    clean = copy(stage.loader)      # the same without user_noise, to see what it replaced
    clean.loaders, clean.taken = [copy(each) for each in clean.loaders], list(clean.taken)
    for each in clean.loaders:
        each.user_noise = 0.0
    while n_shown < n_row:
        batch, clean_idx = stage.loader.next_batch(), clean.next_batch().idx
        n = min(len(batch.idx), n_row - n_shown)
        weights = token_weights(batch, text_weight)
        print_coloured(draw_batch(batch, stage.layouts, vocab, STREAMS, weights, n, columns, clean_idx))
        n_shown += n


def summary(row, streams):
    """'140 tokens, 55.0% learned (4 text x5, 60 speech x1, 13 silence x1), 2 documents, 3.0% padding'"""
    counts, T = [], len(row.idx)
    for i, name in enumerate(streams):
        is_counted = (row.target >= 0) & (row.stream == i)
        weights = ''.join(f' x{weight:g}' for weight in np.unique(row.weight[is_counted]))
        counts.append(f'{is_counted.sum()} {name}{weights}')
    documents = [document for document in row.documents() if not document.is_padding()]
    n_padding = T - sum(len(document.idx) for document in documents)
    n_wrong = sum(int(document.is_wrong().sum()) for document in documents)
    wrong = f', {RED}{n_wrong} targets are not the next token{PLAIN}' if n_wrong else ''
    return (f'{T} tokens, {(row.target >= 0).mean():.1%} learned ({", ".join(counts)}), '
            f'{len(documents)} documents, {n_padding / T:.1%} padding{wrong}')


def draw_document(document, layouts, vocab, columns):
    """-> lines: the document's number, positions and layout, then its tokens and targets"""
    runs = np.split(document.pos, np.flatnonzero(np.diff(document.pos) != 1) + 1)
    positions = ', '.join(f'{run[0]} to {run[-1]}' for run in runs)
    if document.is_padding():
        return [f'{BOLD}padding{PLAIN}, positions {positions}']
    name = f'{BOLD}document {document.doc[0]}{PLAIN}, positions {positions}, '
    layout = next((layout for layout in layouts if fits(document.idx, layout, vocab)), None)
    if layout:
        name += layout.name
    else:
        name += f'{RED}! no document of {"+".join(layout.name for layout in layouts)}{PLAIN}'
    fed, following = mark_tokens(document, vocab)
    if layout and layout.period:
        n = count_prompt(document.idx, vocab)
        prompt = lay_out_in_order(fed[:n], following[:n], columns) if n else []
        return [name, *prompt, *lay_out_chunks(fed[n:], following[n:], layout, columns)]
    return [name, *lay_out_in_order(fed, following, columns)]


def mark_tokens(document, vocab):
    """-> two lists of cells (text, colour): the tokens that are fed, and those to be predicted there"""
    fed, following = [], []
    is_target = np.append(False, document.target[:-1] >= 0)
    for i, is_wrong in enumerate(document.is_wrong()):
        mark, colour = ('+', GREEN) if is_target[i] else (' ', GREY)
        if document.idx[i] != document.clean[i]:
            mark, colour = '~', YELLOW
        fed.append((spell(document.idx[i], vocab) + mark, colour))
        if document.target[i] < 0:
            following.append(('', PLAIN))
            continue
        mark, colour = LOOKS[document.stream[i]]
        mark, colour = (mark + '!', RED) if is_wrong else (mark, colour)
        following.append((spell(document.target[i], vocab) + mark, colour))
    return fed, following


def fits(ids, layout, vocab):
    """Could ids be a document of this layout? The end of the document may be missing."""
    if not layout.period:
        reader = Reader(layout, vocab)
        lines = [layout.slots['start']] if 'start' in layout.slots else layout.slots.values()
        ids = ids[count_prompt(ids, vocab):] if layout.order == 'chunks' else ids
        return any(is_in(ids[0], reader.firsts(line)) for line in lines)
    ids, at = ids[count_prompt(ids, vocab):], 0
    chunks = ids[:len(ids) // layout.period * layout.period].reshape(-1, layout.period)
    for slot, size in zip(layout.chunk, layout.sizes):
        ranges = [range(*each) for place in allowed(slot, layout, vocab) for each in place]
        if not all(any(i in each for each in ranges) for i in chunks[:, at:at + size].reshape(-1).tolist()):
            return False
        at += size
    return True


def lay_out_chunks(fed, following, layout, columns):
    """Cells (text, colour) of a document in chunks -> lines for each stream, with as many chunks beside each
    other as fit into columns"""
    K, n_chunk = layout.period, -(-len(fed) // layout.period)
    n_missing = n_chunk * K - len(fed)      # of the last chunk
    fed, following = (cells + [('', PLAIN)] * n_missing for cells in (fed, following))
    widths = [max(len(text) for text, _ in fed[k::K] + following[k::K]) for k in range(K)]
    streams, at = [], 0     # (name, its places in a chunk, how wide they are)
    for slot, size in zip(layout.chunk, layout.sizes):
        end = at + size
        streams.append((slot.what, range(at, end), sum(widths[at:end]) + size - 1))
        at = end
    margin, chunk_width = max(len(name) for name, _, _ in streams), max(width for _, _, width in streams)
    n_shown, lines = max(1, (columns - margin) // (chunk_width + 3)), []
    for first in range(0, n_chunk, n_shown):
        chunks = range(first, min(first + n_shown, n_chunk))
        lines.append(f'{"chunk":{margin}}' + ''.join(f' | {c:>{chunk_width}}' for c in chunks))
        for stream, places, width in streams:
            for name, cells in ((stream, fed), (f'{"next":>{margin}}', following)):
                line = f'{name:{margin}}'
                for c in chunks:
                    tokens = ' '.join(paint(cells[c * K + k], widths[k]) for k in places)
                    line += f' | {tokens}' + ' ' * (chunk_width - width)
                lines.append(line)
    return [line.rstrip() for line in lines]


def lay_out_in_order(fed, following, columns):
    """Cells (text, colour) of any document -> lines, one token after the other"""
    lines, pair, pair_width = [], ['fed ', 'next'], 4
    for cells in zip(fed, following):
        width = max(len(text) for text, _ in cells)
        if pair_width + 1 + width > columns and pair_width > 4:
            lines, pair, pair_width = lines + pair, ['fed ', 'next'], 4
        pair = [f'{line} {paint(cell, width)}' for line, cell in zip(pair, cells)]
        pair_width += 1 + width
    return [line.rstrip() for line in lines + pair]


def paint(cell, width):
    """A cell (text, colour) in colour, right-aligned. Spaces at its end stay outside of the colour, so that
    rstrip finds them at the end of a line."""
    text, colour = cell
    visible = text.rstrip()
    painted = f'{colour}{visible}{PLAIN}' if visible else ''
    return ' ' * (width - len(text)) + painted + ' ' * (len(text) - len(visible))


def main():
    parser = Parser(prog='python -m measures.draw', formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    description='Draws a dialogue of a data folder, in colour.')
    parser.add_argument('folder', help='a data folder, such as data/demo')
    parser.add_argument('--split', default='test', help='train, val or test')
    parser.add_argument('--index', type=int, default=0, help='which dialogue')
    parser.add_argument('--layout', default='duplex3', help='one in chunks, such as duplex3')
    parser.add_argument('--speech_chunk', type=int, help="frames a chunk, None: the layout's own")
    parser.add_argument('--text_chunk', type=int, help="text tokens a chunk, None: the layout's own")
    parser.add_argument('--tokenizer', help='None: the one in the data folder')
    args = parser.parse_args()
    layout = get_layout(args.layout, args.speech_chunk, args.text_chunk)
    if not layout.period:
        raise ValueError(f'--layout={args.layout}: only layouts in chunks can be drawn against time, such as '
                         'duplex3')
    dialogues = Dialogues(args.folder, args.split, layout.needs_words)
    layout = layout.bind(dialogues.codec)
    vocab = Vocabulary.load(args.tokenizer or os.path.join(args.folder, 'tokenizer'),
                            dialogues.codec['n_codes'], layout.control)
    if not 0 <= args.index < len(dialogues):
        raise ValueError(f'--index={args.index}: {args.split} of {args.folder} has {len(dialogues)} '
                         'dialogues, counted from 0')
    columns = os.get_terminal_size().columns if sys.stdout.isatty() else 110
    print_coloured(show(dialogues[args.index], layout, vocab, dialogues.codec['rate_hz'], columns))


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error))
