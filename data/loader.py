"""
The rows that a model is trained on. The layout is applied here, when dialogues are loaded, so one data set
serves every stage and chunk size:

    dialogues ─ shuffle ─ flatten ─ cut at chunk borders ─ pack ─► rows of block_size ─► Batch

    row 0 | dialogue 17                    | dialogue 4         | dialogue 230   |··|
    row 1 | dialogue 92                             | dialogue 61              |····|     ·· is padding

Documents in a row are neighbours by chance and must not see each other: Batch.doc numbers them and Batch.pos
restarts. The order of rows depends on seed and epoch only. Rank r of w takes rows r, r + w, …, so ranks share
nothing, miss nothing, and a run on two machines reads what it would read on one.
"""
import os
import time
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import cache, lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from flatten import flatten

# ---------------------------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    idx: torch.Tensor       # int64 [B, T] ids that are fed
    pos: torch.Tensor       # int64 [B, T] position in its document
    doc: torch.Tensor       # int64 [B, T] number of its document in the batch
    learn: torch.Tensor     # int64 [N] places in the flattened [B * T] whose output is scored
    targets: torch.Tensor   # int64 [N] the ids to be predicted there
    stream: torch.Tensor    # int64 [N] what kind of id that is, an index into STREAMS
    sec: float              # of conversation

    def to(self, device):
        # asynchronous from pinned memory only
        return Batch(*(value.to(device, non_blocking=True) for value in self[:-1]), self.sec)

    def pin_memory(self):
        return Batch(*(value.pin_memory() for value in self[:-1]), self.sec)


STREAMS = ('text', 'speech', 'silence')


def pack(lengths, capacity):
    """Rows of documents: lists of document numbers, each list's lengths sum to capacity at most. Best-fit
    decreasing; what it leaves open is in few rows, which are taken apart and filled again, exactly."""
    rows, rooms = [], []                            # rooms: (room left, row), sorted
    for i in np.argsort(-np.asarray(lengths), kind='stable').tolist():
        at = bisect_left(rooms, (lengths[i], -1))           # the fullest row that still takes it
        if at == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(at)
        rows[row].append(i)
        insort(rooms, (room - lengths[i], row))
    # 64: a twentieth of the rows of 4,096 documents, and most of the waste; more gain little, and cost their
    # square
    loosest = {row for _, row in rooms[-64:]}
    again = fill([i for row in sorted(loosest) for i in rows[row]], lengths, capacity)
    if len(again) < len(loosest):
        rows = [members for row, members in enumerate(rows) if row not in loosest] + again
    return rows


def fill(documents, lengths, capacity):
    """Rows one by one: the longest document left, and with it those that leave the least room. Which sums can
    be had is told
    by the bits of an integer: bit n of sums[k] is set if some of the first k documents sum to n (they fit,
    the longest first)."""
    rows, documents = [], sorted(documents, key=lengths.__getitem__)
    while documents:
        row = [documents.pop()]
        room = capacity - lengths[row[0]]
        n_fit, sums = bisect_right(documents, room, key=lengths.__getitem__), [1]
        while len(sums) <= n_fit and not sums[-1] >> room:
            sums.append((sums[-1] | sums[-1] << lengths[documents[n_fit - len(sums)]]) & (2 << room) - 1)
        total, taken = sums[-1].bit_length() - 1, []
        # and back: document k is needed if the sum can't be had without it
        for k in range(len(sums) - 1, 0, -1):
            if not sums[k - 1] >> total & 1:
                taken.append(n_fit - k)
                total -= lengths[documents[n_fit - k]]
        rows.append(row + [documents.pop(at) for at in reversed(taken)])
    return rows


class Piece(NamedTuple):
    """Ids of a document that are one document of a row: n of them, from at on. They are laid when the row is
    read."""
    read: Callable          # () -> Document
    at: int
    n: int
    sec: float              # of conversation


class Loader:
    """Batches of packed rows, without end (next_batch) or one pass in order (epoch). .state is the position:
    a dict that, assigned again, continues at the same row. Raises ValueError, with the file, for data that
    doesn't fit.

    A dialogue in chunks is as long as its frames say: rows are packed before anything is laid, and a rank
    flattens what it trains on. By turns the text counts, too, and a window is flattened as a whole."""
    # dialogues shuffled and packed together; lengths near block_size, as the demo's, leave most padding
    window = 4096

    def __init__(self, dialogues, layouts, vocab, block_size, batch_size, seed=0, rank=0, world_size=1,
                 user_noise=0.0, padded=True):
        self.dialogues, self.layouts, self.vocab, self.user_noise = dialogues, layouts, copy(
            vocab), user_noise
        # a third of the time is BPE; 65,536 texts of 24 tokens are about 70 MB
        self.vocab.encode = lru_cache(2 ** 16)(vocab.encode)
        self.block_size, self.batch_size, self.seed, self.rank, self.world_size = block_size, batch_size, seed, rank, world_size
        # False: the rows of a batch as one, without padding; a CPU needs no fixed shapes
        self.padded = padded
        self.n_window = -(-len(dialogues) // self.window)
        self.state = dict(epoch=0, window=0, row=0)
        # records are not written to: one check is enough
        self.places, self.is_checked = np.arange(block_size), bytearray(len(dialogues))
        for layout in layouts:
            if layout.period > block_size + 1:
                raise ValueError(f'a chunk of {layout.name} has {layout.period} tokens, more than block_size '
                                 f'{block_size}')
        self.counts = {}
        self.rows, self.loaded = self.read_window(0, 0), (0, 0)
        if not self.rows:
            raise ValueError(f'{dialogues.folder}: nothing in {dialogues.split} fits layout '
                             f'{"+".join(layout.name for layout in layouts)} and block_size {block_size} '
                             f'({self.counts})')

    def read_window(self, epoch, window, shuffle=True):
        """Packed rows [[Piece]] of a window of dialogues. Each epoch has its own order."""
        order = np.arange(len(self.dialogues))
        if shuffle:
            np.random.default_rng([0, self.seed, epoch]).shuffle(order)
        order = order[window * self.window:(window + 1) * self.window]
        pieces, counts = [], dict(dialogues=len(order), one_sided=0, too_long=0)
        for i, n_user, n_assistant in zip(order.tolist(),
                                          *(n[order].tolist() for n in self.dialogues.n_frame)):
            for layout in self.layouts:
                if layout.order == 'chunks' and n_user != n_assistant and 0 in (n_user, n_assistant):
                    counts['one_sided'] += 1            # an utterance for the alignment stage: no dialogue
                    continue
                for found in self.cut(i, n_user, layout):
                    counts['too_long'] += not found
                    pieces += found
        rows = [[pieces[i] for i in members] for members in pack([piece.n - 1
                                                                  for piece in pieces], self.block_size)]
        if shuffle:
            np.random.default_rng([1, self.seed, epoch, window]).shuffle(rows)
        self.counts = dict(counts, documents=len(pieces), tokens=sum(piece.n for piece in pieces),
                           rows=len(rows), sec=sum(piece.sec for piece in pieces))
        return rows

    def cut(self, i, n_frame, layout):
        """For each document of dialogue i its [Piece] of at most block_size + 1 ids (the last is only a
        target). Chunks are cut at chunk borders; a document by turns is left whole, and left out when it does
        not fit."""
        room, rate_hz = self.block_size + 1, self.dialogues.codec['rate_hz']
        if layout.order != 'chunks':
            documents = self.flatten(i, layout)
            return [[
                Piece(lambda document=document: document, 0, len(document.ids),
                      np.count_nonzero(document.ids >= self.vocab.code_start)
                      / rate_hz)] if 1 < len(document.ids) <= room else [] for document in documents]
        n_chunk, step = -(-n_frame // layout.speech_chunk), room // layout.period
        def read():
            return self.flatten(i, layout)[0]
        if n_chunk > step:
            read = cache(read)          # several rows share it
        return [[
            Piece(read, at * layout.period,
                  min(step, n_chunk - at) * layout.period,
                  min(step, n_chunk - at) * layout.speech_chunk / rate_hz) for at in range(0, n_chunk, step)]]

    def flatten(self, i, layout):
        try:
            documents = flatten(self.dialogues[i], layout, self.vocab, self.is_checked[i])
            self.is_checked[i] = True
            return documents
        except ValueError as error:
            raise ValueError(f'{os.path.join(self.dialogues.folder, self.dialogues.split)}.arrow: record '
                             f'{i}: {error}')

    def next_rows(self, n):
        """The next n rows [(row, place)] of the order, whoever trains on them."""
        rows, at = [], dict(self.state)
        while len(rows) < n:
            if self.loaded != (at['epoch'], at['window']):
                self.rows, self.loaded = self.read_window(at['epoch'],
                                                          at['window']), (at['epoch'], at['window'])
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
        return self.batch([
            self.lay(*row)
            for row in self.next_rows(self.batch_size * self.world_size)[self.rank::self.world_size]])

    def lay(self, row, place=None):
        """[(ids, learned, sec)] of a row's documents. Given its place in the order, the share user_noise of
        the codes that are fed but not learned is any other code, which depends on the place alone, not on the
        rank that reads it."""
        laid = []
        for read, at, n, sec in row:
            document = read()
            laid.append((document.ids[at:at + n], document.learned[at:at + n], sec))
        if not self.user_noise or place is None:
            return laid
        rng, garbled = np.random.default_rng([2, self.seed, *place]), []
        for ids, learned, sec in laid:
            hit = ~learned & (ids >= self.vocab.code_start) & (rng.random(len(ids)) < self.user_noise)
            codes = self.vocab.code_start + rng.integers(self.vocab.n_codes, size=len(ids), dtype=np.int32)
            garbled.append((np.where(hit, codes, ids), learned, sec))
        return garbled

    def measure(self, n_window=8):
        """Counts of a whole epoch: of all its windows if they are few, else of the first in proportion. All
        in them is laid once, so that data that doesn't fit is found before the first step: about a second in
        50 M tokens."""
        total = dict.fromkeys([*self.counts, 'learned', 'text_dropped'], 0)
        for window in range(min(n_window, self.n_window)):
            for read, at, n, _ in chain(*self.read_window(0, window)):
                document = read()
                total['learned'] += int(np.count_nonzero(document.learned[at + 1:at + n]))
                total['text_dropped'] += document.n_dropped if at == 0 else 0
            total.update({key: total[key] + value for key, value in self.counts.items()})
        share = min(1, n_window * self.window / len(self.dialogues))
        return {key: type(value)(value / share) for key, value in total.items()}

    def epoch(self):
        """Every document once, in file order of windows: this rank's share of the batches. For evaluation."""
        for window in range(self.n_window):
            rows = self.read_window(0, window, shuffle=False)
            for at in range(self.rank * self.batch_size, len(rows), self.world_size * self.batch_size):
                yield self.batch([self.lay(row) for row in rows[at:at + self.batch_size]])

    def batch(self, rows):
        """A Batch of laid rows: documents side by side in flat arrays, then all at once."""
        B, T = len(rows), self.block_size
        n = B * T if self.padded else sum(len(ids) - 1 for row in rows for ids, _, _ in row)
        idx, pos, doc, following = np.zeros(n, np.int64), *np.empty((3, n), np.int64)
        scored, sec, at, number = np.zeros(n, bool), 0., 0, 0
        for b, row in enumerate(rows):
            for ids, learned, each in row:
                to = at + len(ids) - 1          # every id is fed but the last, and predicted but the first
                idx[at:to], following[at:to], scored[at:to] = ids[:-1], ids[1:], learned[1:]
                pos[at:to], doc[at:to] = self.places[:to - at], number
                at, sec, number = to, sec + each, number + 1
            if self.padded:                     # padding is a document of its own, nothing in it is learned
                end = b * T + T
                pos[at:end], doc[at:end] = self.places[:end - at], number
                at, number = end, number + 1
        learn = np.flatnonzero(scored)          # (N)
        targets = following.take(learn)
        silent = (targets == self.vocab.control['<|silent_text|>']) | (
            targets == self.vocab.control['<|silent_speech|>'])
        # as in STREAMS
        stream = ((targets >= self.vocab.code_start).view(np.int8)
                  + 2 * silent.view(np.int8)).astype(np.int64)
        return Batch(
            *(torch.from_numpy(each.reshape(B if self.padded else 1, -1)) for each in (idx, pos, doc)),
            *map(torch.from_numpy, (learn, targets, stream)), sec)


class Mixture:
    """Loaders of several data sets as one: the next row comes from the set that is furthest behind its share,
    so that any stretch of rows holds the sets by weight, on any number of ranks."""

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
        return first.batch([loader.lay(row, place) for loader, row, place in chosen])

    def measure(self):
        counts = [loader.measure() for loader in self.loaders]
        return {key: sum(each[key] for each in counts) for key in counts[0]}

    def epoch(self):
        for loader in self.loaders:
            yield from loader.epoch()


class Prefetch:
    """A loader, or a mixture, whose next batches a thread makes while the device computes: the same batches,
    on the device. .state is the position after those that were handed out; .wait_sec is how long the caller
    has waited for them. What the loader raises, next_batch raises. From here on the loader is the thread's:
    it is given its state before."""

    def __init__(self, loader, device, n_ahead=2):
        self.loader, self.device, self.state, self.wait_sec = loader, torch.device(device), loader.state, 0.0
        if self.device.type == 'cuda' and self.device.index is None:
            # a thread's own current device is cuda:0
            self.device = torch.device('cuda', torch.cuda.current_device())
        self.thread = ThreadPoolExecutor(1)
        self.ahead = deque(self.thread.submit(self.read) for _ in range(n_ahead))

    def read(self):
        batch = self.loader.next_batch()
        if self.device.type == 'cuda':
            with torch.cuda.device(self.device):
                batch = batch.pin_memory()
        return batch, self.loader.state

    def next_batch(self):
        start = time.perf_counter()
        self.ahead.append(self.thread.submit(self.read))
        batch, self.state = self.ahead.popleft().result()
        self.wait_sec += time.perf_counter() - start
        return batch.to(self.device)

    def close(self):
        """Ends the thread, after the batch at hand. Without it, it ends with the process."""
        self.thread.shutdown(cancel_futures=True)
