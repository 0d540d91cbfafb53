"""
The rows that a model in training really gets, drawn from nothing but the tensors of a batch: train.py
--show=1.

    chunk            |               0 |               1
    user.speech      |  0   1   2   3  |  4  15~  6   7      fed, not learned; ~ another code in its place, by user_noise
                next |              aᵗ |              cᵗ     after the chunk's last the model has to know the text to come
    assistant.text   | a+  b+          | c+  d+              fed, and learned where the one before was fed
                next | bᵗ  ·⁻          | dᵗ 36ˢ
    assistant.speech |  ·+ 33+ 34+ 35+ | 36+ 37+  ·+  ·+
                next | 33ˢ 34ˢ 35ˢ     | 37ˢ  ·⁻  ·⁻

A wrong mask shows as a token without its mark, a wrong target as a ! in red.
"""
import argparse
import os
import re
import sys

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
    """The dialogue against time, a character a frame: grey is fed, green is learned, yellow is both
    speaking."""
    document, = flatten(dialogue, layout, vocab)
    n = layout.speech_chunk
    grid = document.ids.reshape(-1, layout.period)      # (N chunks, K tokens a chunk)
    said = {role: np.zeros(len(grid) * n, bool) for role in ROLES}
    # what the user said, a letter a frame from where the turn starts
    words = np.full(len(grid) * n, ' ', '<U1')
    for turn in dialogue['turns']:
        said[turn['role']][turn['start']:turn['end']] = True
        if turn['role'] == 'user':
            letters = list(turn['text'])[:len(words) - turn['start']]
            words[turn['start']:turn['start'] + len(letters)] = letters
    both, at = said['user'] & said['assistant'], 0
    rows = [('seconds', '', [f'{c * n / rate_hz:.1f}' for c in range(len(grid))]),
            ('user words', '', [''.join(row) for row in words.reshape(-1, n)])]
    for slot in layout.chunk:
        role = slot.what.split('.')[0]
        if slot.kind == 'text':
            cells = [''.join(spell(i, vocab) for i in row[at:at + slot.n]) for row in grid]
        else:
            cells = [
                ''.join('█▓'[int(both[f])] if said[role][f] else '▁'
                        for f in range(c * n, c * n + n))
                for c in range(len(grid))]
        rows.append((slot.what, GREEN if slot.learned else GREY, cells))
        at += slot.n
    margin = max(len(name) for name, _, _ in rows)
    wide = max([n] + [len(cell) for _, _, cells in rows for cell in cells])
    n_shown = max(1, (columns - margin) // (wide + 1))
    lines = [f'{BOLD}{dialogue["id"]}{PLAIN}  {len(grid)} chunks of {n} frames, {document.ids.size} tokens, '
             f'{document.learned.sum()} learned, {document.n_dropped} text tokens dropped']
    for first in range(0, len(grid), n_shown):
        for name, colour, cells in rows:
            line = f'{GREY}|{PLAIN}{colour}'.join(f'{cell:{wide}}' for cell in cells[first:first + n_shown])
            lines.append(f'{name:{margin}} {colour}'
                         + re.sub('▓+', lambda run: YELLOW + run.group() + PLAIN + colour, line)     # noqa: B023
                         + PLAIN)
        lines.append('')
    return '\n'.join(lines)


def draw_batch(batch, layouts, vocab, streams, weights, n_row=1, columns=110, clean=None):
    """
    The first rows of a data.loader.Batch, from nothing but its tensors, for whoever doubts them. Under each
    token that is fed stands the one that has to be predicted there, so that a target is the fed token after
    it (in a layout in chunks the one after the last of user.speech is the first of assistant.text). weights
    [N]: of the targets in the loss; clean [B, T]: idx before user_noise.
    """
    idx, pos, doc = (x.cpu().numpy() for x in (batch.idx, batch.pos, batch.doc))         # (B, T)
    clean, (B, T) = idx if clean is None else clean.cpu().numpy(), idx.shape
    # -1: nothing is learned here
    target, stream, weight = np.full(B * T, -1), np.zeros(B * T, int), np.zeros(B * T)
    for whole, values in ((target, batch.targets), (stream, batch.stream), (weight, weights)):
        whole[batch.learn.cpu().numpy()] = values.cpu().numpy()
    target, stream, weight = (x.reshape(B, T) for x in (target, stream, weight))
    # of the streams: letters, too, for a screen without colours
    looks = list(zip('ᵗˢ⁻', (GREEN, CYAN, YELLOW)))
    lines = [
        f'fed: {GREEN}+ is learned{PLAIN}, {GREY}others are not{PLAIN}, {YELLOW}~ was replaced by '
        f'user_noise{PLAIN}; next: what has to be predicted there, '
        + ', '.join(f'{colour}{mark} {name}{PLAIN}' for (mark, colour), name in zip(looks, streams))
        + f', {RED}! is not the next token{PLAIN}']
    for b in range(n_row):
        starts = [0, *(np.flatnonzero(np.diff(doc[b])) + 1).tolist(), T]
        spans = [slice(*ends) for ends in zip(starts, starts[1:])]
        # id 0 throughout, nothing learned
        is_padding = [not idx[b, of].any() and (target[b, of] < 0).all() for of in spans]
        n_padding, n_wrong, parts = sum(of.stop - of.start
                                        for of, empty in zip(spans, is_padding)
                                        if empty), 0, []
        for of, empty in zip(spans, is_padding):
            ids, targets, n = idx[b, of], target[b, of], of.stop - of.start
            runs = np.split(pos[b, of], np.flatnonzero(np.diff(pos[b, of]) != 1) + 1)
            name = f'{BOLD}{"padding" if empty else f"document {doc[b, of.start]}"}{PLAIN}, positions ' + ', '.join(
                f'{run[0]} to {run[-1]}' for run in runs)
            if empty:
                parts.append(name)
                continue
            # what follows the last is not fed, and not known here
            is_wrong = (targets[:-1] >= 0) & (targets[:-1] != ids[1:])
            is_target, n_wrong = np.append(False, targets[:-1] >= 0), n_wrong + int(is_wrong.sum())
            fed, following = [], []
            for i in range(n):
                mark, colour = ('~',
                                YELLOW) if ids[i] != clean[b, of][i] else ('+',
                                                                           GREEN) if is_target[i] else (' ',
                                                                                                        GREY)
                fed.append((spell(ids[i], vocab) + mark, colour))
                mark, colour = looks[stream[b, of][i]] if targets[i] >= 0 else ('', PLAIN)
                mark, colour = (mark + '!', RED) if i < n - 1 and is_wrong[i] else (mark, colour)
                following.append((spell(targets[i], vocab) + mark if targets[i] >= 0 else '', colour))
            layout = next((layout for layout in layouts if fits(ids, layout, vocab)), None)
            name += f', {layout.name}' if layout else f', {RED}! no document of {"+".join(layout.name for layout in layouts)}{PLAIN}'
            parts += [
                name, *(grid(fed, following, layout, columns)
                        if layout and layout.order == 'chunks' else strip(fed, following, columns))]
        learned = target[b] >= 0
        counts = [
            f'{(stream[b][learned] == i).sum()} {name}'
            + ''.join(f' x{w:g}'
                      for w in np.unique(weight[b][learned & (stream[b] == i)]))
            for i, name in enumerate(streams)]
        n_document = len(spans) - sum(is_padding)
        lines.append(f'{BOLD}row {b}{PLAIN}: {T} tokens, {learned.mean():.1%} learned ({", ".join(counts)}), '
                     f'{n_document} documents, {n_padding / T:.1%} padding'
                     + (f', {RED}{n_wrong} targets are not the next token{PLAIN}' if n_wrong else ''))
        lines += parts + ['']
    return '\n'.join(lines)


def fits(ids, layout, vocab):
    """Could ids, perhaps without their end, be a document of this layout?"""
    if layout.order != 'chunks':
        first = [vocab.control[slots[0].what] for slots in layout.slots.values()]
        return ids[0] in first
    kinds = np.resize(
        np.repeat([slot.kind == 'speech' for slot in layout.chunk], [slot.n for slot in layout.chunk]),
        len(ids))
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
