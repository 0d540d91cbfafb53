"""
Dialogues on disk, and the rows that a model is trained on.

A data folder holds train.arrow, val.arrow and test.arrow (or train-00000-of-00008.arrow …): Arrow IPC files of records
as design.md describes them, memory-mapped, tokenised once. The layout is applied here, when they are loaded, so one
data set serves every stage and chunk size:

    dialogues ─ shuffle ─ flatten ─ cut at chunk borders ─ pack ─► rows of block_size ─► Batch

    row 0 | dialogue 17                    | dialogue 4         | dialogue 230   |··|
    row 1 | dialogue 92                             | dialogue 61              |····|     ·· is padding

Documents in a row are neighbours by chance and must not see each other: Batch.doc numbers them and Batch.pos restarts.
The order of rows depends on seed and epoch only. Rank r of w takes rows r, r + w, …, so ranks share nothing, miss
nothing, and a run on two machines reads what it would read on one.
"""
import glob
import json
import os
from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from flatten import flatten

_SPAN = [('text', pa.string()), ('start', pa.int32()), ('end', pa.int32())]
SCHEMA = pa.schema([
    ('id', pa.string()),
    ('user', pa.list_(pa.uint16())),            # a code a frame
    ('assistant', pa.list_(pa.uint16())),
    ('turns', pa.list_(pa.struct([('role', pa.string()), ('start', pa.int32()), ('end', pa.int32()), ('text', pa.string()),
                                  ('words', pa.list_(pa.struct(_SPAN)))]))),
])


def save_dialogues(path, dialogues, codec, **notes):
    """Writes an Arrow file of dialogues with the codec's description, and notes, in its metadata; it appears whole or not at all."""
    table = pa.Table.from_pylist(list(dialogues), SCHEMA.with_metadata({'nanoduplex': json.dumps(dict(notes, codec=codec))}))
    with pa.OSFile(path + '.part', 'wb') as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    os.replace(path + '.part', path)


class Dialogues:
    """The records of one split of a data folder. len, [i] -> dict(id, user uint16 [n_frame], assistant, turns), .codec."""

    def __init__(self, folder, split):
        shards = sorted(glob.glob(os.path.join(glob.escape(folder), f'{split}-?????-of-?????.arrow')))
        paths = shards or [os.path.join(folder, f'{split}.arrow')]
        if not os.path.isdir(folder):
            raise ValueError(f'no data folder {folder}; prepare it first (for the demo: python data/demo/prepare.py)')
        if not os.path.exists(paths[0]):
            raise ValueError(f'{folder} holds no {split}.arrow; prepare it first (for the demo: python data/demo/prepare.py)')
        if shards and len(shards) != int(shards[0][-11:-6]):
            raise ValueError(f'{folder} holds {len(shards)} of the {int(shards[0][-11:-6])} files of {split}')
        self.folder, self.split, self.parts, self.codec = folder, split, [], None
        for path in paths:
            try:
                table = pa.ipc.open_file(pa.memory_map(path)).read_all()
                codec = json.loads(table.schema.metadata[b'nanoduplex'])['codec']
                columns = [Columns(batch) for batch in table.to_batches() if batch.num_rows]
            except (pa.ArrowInvalid, TypeError, KeyError, ValueError) as error:
                raise ValueError(f'{path} is not a file of dialogues ({error}); prepare it again')
            if self.codec and codec != self.codec:
                raise ValueError(f'{path} was made with codec {codec}, {paths[0]} with {self.codec}')
            self.codec = codec
            self.parts += columns
        self.firsts = np.cumsum([0] + [len(part) for part in self.parts])

    def __len__(self):
        return int(self.firsts[-1])

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = int(np.searchsorted(self.firsts, i, side='right')) - 1
        return self.parts[part][i - self.firsts[part]]


class Columns:
    """A record batch as numpy views into the mapped file: no copy, and nothing is parsed but the record asked for."""

    def __init__(self, batch):
        columns = {name: batch.column(name) for name in SCHEMA.names}
        self.id = columns['id']
        self.codes = {role: (columns[role].offsets.to_numpy(), columns[role].values.to_numpy()) for role in ('user', 'assistant')}
        self.turns = columns['turns']
        self.turn_offsets = self.turns.offsets.to_numpy()

    def __len__(self):
        return len(self.id)

    def __getitem__(self, i):
        codes = {role: values[offsets[i]:offsets[i + 1]] for role, (offsets, values) in self.codes.items()}
        start, end = self.turn_offsets[i], self.turn_offsets[i + 1]
        fields = [self.turns.values.field(key).slice(start, end - start).to_pylist() for key in ('role', 'start', 'end', 'text')]
        turns = [dict(zip(('role', 'start', 'end', 'text'), values)) for values in zip(*fields)]
        return dict(id=self.id[i].as_py(), **codes, turns=turns)


# ---------------------------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    idx: torch.Tensor       # int64 [B, T] ids that are fed
    pos: torch.Tensor       # int64 [B, T] position in its document
    doc: torch.Tensor       # int64 [B, T] number of its document in the row
    learn: torch.Tensor     # int64 [N] places in the flattened [B * T] whose output is scored
    targets: torch.Tensor   # int64 [N] the ids to be predicted there
    stream: torch.Tensor    # int64 [N] what kind of id that is, an index into STREAMS
    sec: float              # of conversation

    def to(self, device):
        return Batch(*(value.to(device) if isinstance(value, torch.Tensor) else value for value in self))


STREAMS = ('text', 'speech', 'silence')


def pack(lengths, capacity):
    """Best-fit decreasing: lists of document numbers, each list's lengths sum to capacity at most."""
    bins, open_bins = [], []                        # open_bins: (room left, bin number), sorted
    for i in np.argsort(-np.asarray(lengths), kind='stable').tolist():
        at = bisect_left(open_bins, (lengths[i], -1))       # the fullest row that still takes it
        if at == len(open_bins):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = open_bins.pop(at)
        bins[number].append(i)
        insort(open_bins, (room - lengths[i], number))
    return bins


class Loader:
    """Batches of packed rows, without end (next_batch) or one pass in order (epoch). .state is the position: a dict
    that, assigned again, continues at the same row. Raises ValueError, with the file, for data that doesn't fit."""
    window = 4096       # dialogues shuffled and packed together; lengths near block_size, as the demo's, leave most padding

    def __init__(self, dialogues, layouts, vocab, block_size, batch_size, seed=0, rank=0, world_size=1, user_noise=0.0):
        self.dialogues, self.layouts, self.vocab, self.user_noise = dialogues, layouts, vocab, user_noise
        self.block_size, self.batch_size, self.seed, self.rank, self.world_size = block_size, batch_size, seed, rank, world_size
        self.n_window = -(-len(dialogues) // self.window)
        self.state = dict(epoch=0, window=0, row=0)
        self.counts = {}
        for layout in layouts:
            if layout.period > block_size + 1:
                raise ValueError(f'a chunk of {layout.name} has {layout.period} tokens, more than block_size {block_size}')
        self.rows, self.loaded = self.read_window(0, 0), (0, 0)
        if not self.rows:
            raise ValueError(f'{dialogues.folder}: nothing in {dialogues.split} fits layout '
                             f'{"+".join(layout.name for layout in layouts)} and block_size {block_size} ({self.counts})')

    def read_window(self, epoch, window, shuffle=True):
        """Packed rows [[(ids, learned, channels)]] of a window of dialogues. Each epoch has its own order."""
        order = np.arange(len(self.dialogues))
        if shuffle:
            np.random.default_rng([0, self.seed, epoch]).shuffle(order)
        documents, counts = [], dict(dialogues=0, one_sided=0, too_long=0, documents=0, tokens=0, learned=0, text_dropped=0, sec=0.)
        for i in order[window * self.window:(window + 1) * self.window]:
            dialogue = self.dialogues[i]
            for layout in self.layouts:
                if layout.order == 'chunks' and len(dialogue['user']) != len(dialogue['assistant']) and \
                        0 in (len(dialogue['user']), len(dialogue['assistant'])):
                    counts['one_sided'] += 1            # an utterance for the alignment stage: no dialogue
                    continue
                try:
                    flat = flatten(dialogue, layout, self.vocab)
                except ValueError as error:
                    raise ValueError(f'{os.path.join(self.dialogues.folder, self.dialogues.split)}.arrow: record {i}: {error}')
                for document in flat:
                    counts['text_dropped'] += document.n_dropped
                    pieces = self.cut(document, layout)
                    counts['too_long'] += not pieces
                    documents += pieces
            counts['dialogues'] += 1
        rows = [[documents[i] for i in members] for members in pack([len(ids) - 1 for ids, _, _ in documents], self.block_size)]
        if shuffle:
            np.random.default_rng([1, self.seed, epoch, window]).shuffle(rows)
        counts['documents'] = len(documents)
        counts['tokens'] = sum(len(ids) for ids, _, _ in documents)
        counts['learned'] = sum(int(learned[1:].sum()) for _, learned, _ in documents)
        counts['sec'] = sum(self.sec(ids, channels) for ids, _, channels in documents)
        counts['rows'] = len(rows)
        self.counts = counts
        return rows

    def cut(self, document, layout):
        """Pieces of at most block_size + 1 ids (the last is only a target). Chunks are cut at chunk borders; a document
        by turns is left whole, and left out when it does not fit."""
        ids, learned, room = document.ids, document.learned, self.block_size + 1
        if layout.order == 'chunks':
            step = room // layout.period * layout.period
            return [(ids[at:at + step], learned[at:at + step], 2) for at in range(0, len(ids), step)]
        return [(ids, learned, 1)] if 1 < len(ids) <= room else []

    def sec(self, ids, channels):
        n_speech = (ids >= self.vocab.code_start).sum() + (ids == self.vocab.control['<|silent_speech|>']).sum()
        return float(n_speech) / channels / self.dialogues.codec['rate_hz']

    def next_rows(self, n):
        """The next n rows [(row, place)] of the order, whoever trains on them."""
        rows, at = [], dict(self.state)
        while len(rows) < n:
            if self.loaded != (at['epoch'], at['window']):
                self.rows, self.loaded = self.read_window(at['epoch'], at['window']), (at['epoch'], at['window'])
            found = self.rows[at['row']:at['row'] + n - len(rows)]
            rows += [(row, (at['epoch'], at['window'], at['row'] + i)) for i, row in enumerate(found)]
            at['row'] += len(found)
            if at['row'] >= len(self.rows):
                at = dict(epoch=at['epoch'], window=at['window'] + 1, row=0)
                if at['window'] == self.n_window:
                    at = dict(epoch=at['epoch'] + 1, window=0, row=0)
        self.state = at
        return rows

    def next_batch(self):
        """The next batch_size rows of this rank."""
        return self.batch([self.garble(*row) for row in self.next_rows(self.batch_size * self.world_size)[self.rank::self.world_size]])

    def garble(self, row, place):
        """A row in which that share of the codes that are fed but not learned is any other code. It depends on the row's
        place in the order alone, not on the rank that reads it."""
        if not self.user_noise:
            return row
        rng, garbled = np.random.default_rng([2, self.seed, *place]), []
        for ids, learned, channels in row:
            hit = ~learned & (ids >= self.vocab.code_start) & (rng.random(len(ids)) < self.user_noise)
            codes = self.vocab.code_start + rng.integers(self.vocab.n_codes, size=len(ids), dtype=np.int32)
            garbled.append((np.where(hit, codes, ids), learned, channels))
        return garbled

    def measure(self, n_window=8):
        """Counts of a whole epoch: of all its windows if they are few, else of the first in proportion. They cost about a
        second in 50 M tokens."""
        total = dict.fromkeys(self.counts, 0)
        for window in range(min(n_window, self.n_window)):
            self.read_window(0, window)
            total = {key: total[key] + self.counts[key] for key in total}
        share = min(1, n_window * self.window / len(self.dialogues))
        return {key: type(value)(value / share) for key, value in total.items()}

    def epoch(self):
        """Every document once, in file order of windows: this rank's share of the batches. For evaluation."""
        for window in range(self.n_window):
            rows = self.read_window(0, window, shuffle=False)
            for at in range(self.rank * self.batch_size, len(rows), self.world_size * self.batch_size):
                yield self.batch(rows[at:at + self.batch_size])

    def batch(self, rows):
        B, T = len(rows), self.block_size
        idx, pos, doc = (np.zeros((B, T), np.int64) for _ in range(3))
        learn, targets, sec = [], [], 0.
        for b, row in enumerate(rows):
            at = 0
            for d, (ids, learned, channels) in enumerate(row):
                n = len(ids) - 1        # every id is fed but the last, and predicted but the first
                idx[b, at:at + n] = ids[:-1]
                pos[b, at:at + n] = np.arange(n)
                doc[b, at:at + n] = d
                scored = np.flatnonzero(learned[1:])
                learn.append(b * T + at + scored)
                targets.append(ids[1:][scored])
                sec += self.sec(ids, channels)
                at += n
            doc[b, at:] = len(row)      # padding is a document of its own, of which nothing is learned
            pos[b, at:] = np.arange(T - at)
        learn, targets = np.concatenate(learn), np.concatenate(targets).astype(np.int64)
        silent = np.isin(targets, [self.vocab.control['<|silent_text|>'], self.vocab.control['<|silent_speech|>']])
        stream = np.where(silent, STREAMS.index('silence'),
                          np.where(targets >= self.vocab.code_start, STREAMS.index('speech'), STREAMS.index('text')))
        return Batch(*map(torch.from_numpy, (idx, pos, doc, learn, targets, stream)), sec)


class Mixture:
    """Loaders of several data sets as one: the next row comes from the set that is furthest behind its share, so that any
    stretch of rows holds the sets by weight, on any number of ranks."""

    def __init__(self, loaders, weights):
        self.loaders, self.shares = loaders, [weight / sum(weights) for weight in weights]
        self.taken = [0] * len(loaders)

    @property
    def state(self):
        return dict(taken=list(self.taken), loaders=[loader.state for loader in self.loaders])

    @state.setter
    def state(self, state):
        self.taken = list(state['taken'])
        for loader, each in zip(self.loaders, state['loaders'], strict=True):
            loader.state = each

    def next_batch(self):
        first, order = self.loaders[0], []
        for _ in range(first.batch_size * first.world_size):
            behind = [share * (sum(self.taken) + 1) - n for share, n in zip(self.shares, self.taken)]
            order.append(behind.index(max(behind)))
            self.taken[order[-1]] += 1
        rows = [iter(loader.next_rows(order.count(i))) for i, loader in enumerate(self.loaders)]
        chosen = [(self.loaders[i], *next(rows[i])) for i in order][first.rank::first.world_size]
        return first.batch([loader.garble(row, place) for loader, row, place in chosen])

    def measure(self):
        counts = [loader.measure() for loader in self.loaders]
        return {key: sum(each[key] for each in counts) for key in counts[0]}

    def epoch(self):
        for loader in self.loaders:
            yield from loader.epoch()
