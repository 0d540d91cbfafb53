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

A wrong mask shows as a token without its mark, a wrong target as a ! in red.
"""
import argparse
import os
import re
import sys
from typing import NamedTuple

import numpy as np

from config import Parser
from data.dialogues import Dialogues
from flatten import ROLES, flatten, get_layout, spell
from vocabulary import Vocabulary

GREY, GREEN, YELLOW, CYAN, RED, BOLD, PLAIN = (f'\033[{n}m' for n in (90, 32, 33, 36, 31, 1, 0))


def print_coloured(text):
    """Without its colours where nobody would see them; NO_COLOR and FORCE_COLOR overrule (no-color.org,
    force-color.org)."""
    is_coloured = sys.stdout.isatty() or os.environ.get('FORCE_COLOR')
    print(text if is_coloured and not os.environ.get('NO_COLOR') else re.sub('\033\\[\\d+m', '', text))


def show(dialogue, layout, vocab, rate_hz, columns=110):
    """The dialogue against time, a character for each frame: grey is fed, green is learned, yellow is both
    speaking."""
    document, = flatten(dialogue, layout, vocab)
    n = layout.speech_chunk
    grid = document.ids.reshape(-1, layout.period)      # (N chunks, K tokens a chunk)
    speaks = {role: np.zeros(len(grid) * n, bool) for role in ROLES}
    words = np.full(len(grid) * n, ' ', '<U1')          # the user's text, a letter a frame
    for turn in dialogue['turns']:
        start = turn['start']
        speaks[turn['role']][start:turn['end']] = True
        if turn['role'] == 'user':
            letters = list(turn['text'])[:len(words) - start]
            words[start:start + len(letters)] = letters
    both = speaks['user'] & speaks['assistant']
    rows = [('seconds', '', [f'{c * n / rate_hz:.1f}' for c in range(len(grid))]),
            ('user words', '', [''.join(row) for row in words.reshape(-1, n)])]
    at = 0
    for slot in layout.chunk:
        if slot.kind == 'text':
            cells = [''.join(spell(i, vocab) for i in row[at:at + slot.n]) for row in grid]
        else:
            bars = np.where(speaks[slot.role], np.where(both, '▓', '█'), '▁')
            cells = [''.join(chunk) for chunk in bars.reshape(-1, n)]
        rows.append((slot.what, GREEN if slot.learned else GREY, cells))
        at += slot.n
    head = (f'{BOLD}{dialogue["id"]}{PLAIN}  {len(grid)} chunks of {n} frames, {document.ids.size} tokens, '
            f'{document.learned.sum()} learned, {document.n_dropped} text tokens dropped')
    return '\n'.join([head, *side_by_side(rows, n, columns)])


def side_by_side(rows, n, columns):
    """rows: [(name, colour, [cell of each chunk])] -> lines, as many chunks next to each other as there is
    room for"""
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


class Row(NamedTuple):
    """One row of a batch: arrays [T]. target is -1 where nothing is learned; clean: idx before user_noise."""
    idx: np.ndarray
    clean: np.ndarray
    pos: np.ndarray
    doc: np.ndarray
    target: np.ndarray
    stream: np.ndarray
    weight: np.ndarray

    def documents(self):
        """-> the Rows of its documents, padding included"""
        starts = [0, *(np.flatnonzero(np.diff(self.doc)) + 1).tolist(), len(self.doc)]
        return [Row(*(x[start:end] for x in self)) for start, end in zip(starts, starts[1:])]

    def is_padding(self):
        return not self.idx.any() and (self.target < 0).all()       # id 0 throughout, and nothing is learned

    def is_wrong(self):
        """-> bool [T]: targets that are not the token fed next. What follows the last token is not known
        here."""
        wrong = (self.target[:-1] >= 0) & (self.target[:-1] != self.idx[1:])
        return np.append(wrong, False)


def rows_of(batch, weights, clean, n_row):
    """The first rows of a data.loader.Batch, from nothing but its tensors. weights (N): of the targets in the
    loss"""
    learn = batch.learn.cpu().numpy()
    clean = batch.idx if clean is None else clean
    arrays = [x.cpu().numpy() for x in (batch.idx, clean, batch.pos, batch.doc)]
    for empty, values in ((-1, batch.targets), (0, batch.stream), (0.0, weights)):
        values = values.cpu().numpy()
        spread = np.full(batch.idx.numel(), empty, values.dtype)    # (B * T)
        spread[learn] = values
        arrays.append(spread.reshape(batch.idx.shape))
    return [Row(*(x[b] for x in arrays)) for b in range(n_row)]


LOOKS = list(zip('ᵗˢ⁻', (GREEN, CYAN, YELLOW)))     # of STREAMS; letters, too, for a screen without colours


def draw_batch(batch, layouts, vocab, streams, weights, n_row=1, columns=110, clean=None):
    """
    Draws the first rows of a data.loader.Batch, to see whether masks and targets are right. Under each token
    that is fed
    stands the one to be predicted there: the token fed next (in chunks, the first of assistant.text under the
    last of user.speech). weights (N): of the targets in the loss; clean (B, T): idx before user_noise.
    """
    looks = ', '.join(f'{colour}{mark} {name}{PLAIN}' for (mark, colour), name in zip(LOOKS, streams))
    lines = [f'fed: {GREEN}+ is learned{PLAIN}, {GREY}others are not{PLAIN}, {YELLOW}~ was replaced by '
             f'user_noise{PLAIN}; next: what has to be predicted there, {looks}, '
             f'{RED}! is not the next token{PLAIN}']
    for b, row in enumerate(rows_of(batch, weights, clean, n_row)):
        lines.append(f'{BOLD}row {b}{PLAIN}: ' + summary(row, streams))
        for document in row.documents():
            lines += draw_document(document, layouts, vocab, columns)
        lines.append('')
    return '\n'.join(lines)


def summary(row, streams):
    """'140 tokens, 55.0 % learned (4 text x5, 60 speech x1, 13 silence x1), 2 documents, 3.0 % padding'"""
    counts, T = [], len(row.idx)
    for i, name in enumerate(streams):
        of_stream = (row.target >= 0) & (row.stream == i)
        weights = ''.join(f' x{weight:g}' for weight in np.unique(row.weight[of_stream]))
        counts.append(f'{of_stream.sum()} {name}{weights}')
    documents = row.documents()
    n_padding = sum(len(document.idx) for document in documents if document.is_padding())
    n_document = sum(not document.is_padding() for document in documents)
    n_wrong = sum(int(document.is_wrong().sum()) for document in documents if not document.is_padding())
    wrong = f', {RED}{n_wrong} targets are not the next token{PLAIN}' if n_wrong else ''
    return (f'{T} tokens, {(row.target >= 0).mean():.1%} learned ({", ".join(counts)}), '
            f'{n_document} documents, {n_padding / T:.1%} padding{wrong}')


def draw_document(document, layouts, vocab, columns):
    """-> lines: its name and positions, then its tokens and targets"""
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
    fed, following = cells_of(document, vocab)
    in_chunks = layout and layout.order == 'chunks'
    return [name, *(grid(fed, following, layout, columns) if in_chunks else strip(fed, following, columns))]


def cells_of(document, vocab):
    """-> (text, colour) of each token that is fed, and of each that has to be predicted there"""
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
    """Could ids, perhaps without their end, be a document of this layout?"""
    if layout.order != 'chunks':
        first = [vocab.control[slots[0].what] for slots in layout.slots.values()]
        return ids[0] in first
    in_chunk = [slot.kind == 'speech' for slot in layout.chunk for _ in range(slot.n)]
    kinds = np.resize(in_chunk, len(ids))
    control = np.isin(ids, list(vocab.control.values()))
    is_speech = (ids >= vocab.code_start) | (ids == vocab.control['<|silent_speech|>'])
    is_text = ~control & (ids < vocab.code_start) | (ids == vocab.control['<|silent_text|>'])
    return bool(np.where(kinds, is_speech, is_text).all())


def grid(fed, following, layout, columns):
    """Cells (text, colour) of a document in chunks: lines for each stream, as many chunks side by side as
    there is room for."""
    K, n_chunk = layout.period, -(-len(fed) // layout.period)
    fed, following = (cells + [('', PLAIN)] * (n_chunk * K - len(cells)) for cells in (fed, following))
    cell = [max(len(text) for text, _ in fed[k::K] + following[k::K]) for k in range(K)]
    ends = np.cumsum([slot.n for slot in layout.chunk]).tolist()
    slots = [(slot.what, range(end - slot.n, end)) for slot, end in zip(layout.chunk, ends)]
    wide = max(sum(cell[k] + 1 for k in places) - 1 for _, places in slots)
    margin = max(len(name) for name, _ in slots)
    n_shown, lines = max(1, (columns - margin) // (wide + 3)), []
    for first in range(0, n_chunk, n_shown):
        chunks = range(first, min(first + n_shown, n_chunk))
        lines.append(f'{"chunk":{margin}}' + ''.join(f' | {c:>{wide}}' for c in chunks))
        for what, places in slots:
            for name, cells in ((what, fed), (f'{"next":>{margin}}', following)):
                portions = [
                    ' '.join(paint(cells[c * K + k], cell[k])
                             for k in places) + ' ' * (wide + 1 - sum(cell[k] + 1
                                                                      for k in places))
                    for c in chunks]
                lines.append(f'{name:{margin}}' + ''.join(f' | {portion}' for portion in portions))
    return [line.rstrip() for line in lines]


def strip(fed, following, columns):
    """Cells of any document, one after the other."""
    lines, rows, wide = [], ['fed ', 'next'], 4
    for pair in zip(fed, following):
        cell = max(len(text) for text, _ in pair)
        if wide + 1 + cell > columns and wide > 4:
            lines, rows, wide = lines + rows, ['fed ', 'next'], 4
        rows, wide = [f'{row} {paint(each, cell)}' for row, each in zip(rows, pair)], wide + 1 + cell
    return [line.rstrip() for line in lines + rows]


def paint(cell, wide):
    text, colour = cell
    shown = text.rstrip()       # so that the spaces at the end of a line are its end
    return ' ' * (wide - len(text)) + (f'{colour}{shown}{PLAIN}'
                                       if shown else '') + ' ' * (len(text) - len(shown))


def main():
    parser = Parser(prog='python -m measures.draw', description='Draws a dialogue of a data folder, in '
                                                                'colour.',
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('folder', help='a data folder, such as data/demo')
    parser.add_argument('--split', default='test', help='train, val or test')
    parser.add_argument('--index', type=int, default=0, help='which dialogue')
    parser.add_argument('--layout', default='duplex3', help='duplex3 or duplex2')
    parser.add_argument('--speech_chunk', type=int, help="frames a chunk, None: the layout's own")
    parser.add_argument('--text_chunk', type=int, help="text tokens a chunk, None: the layout's own")
    parser.add_argument('--tokenizer', help='None: the one in the data folder')
    args = parser.parse_args()
    layout = get_layout(args.layout, args.speech_chunk, args.text_chunk)
    if layout.order != 'chunks':
        raise ValueError(f'layouts in chunks are drawn here, not {layout.name}')
    dialogues = Dialogues(args.folder, args.split)
    vocab = Vocabulary.load(args.tokenizer or os.path.join(args.folder, 'tokenizer'),
                            dialogues.codec['n_codes'])
    if not 0 <= args.index < len(dialogues):
        raise ValueError(f'--index={args.index}: {args.folder} has {len(dialogues)} dialogues in '
                         f'{args.split}')
    columns = os.get_terminal_size().columns if sys.stdout.isatty() else 110
    print_coloured(show(dialogues[args.index], layout, vocab, dialogues.codec['rate_hz'], columns))


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error))
