"""
The rows that a model is trained on. The layout is applied here, when dialogues are loaded, so one data set
serves every stage and every chunk size:

    dialogues ─ shuffle ─ flatten ─ cut at chunk borders ─ pack ─► rows of block_size ─► Batch

    row 0 | dialogue 17                    | dialogue 4         | dialogue 230   |··|
    row 1 | dialogue 92                             | dialogue 61              |····|     ·· is padding

The documents in a row are strangers and must not see each other: Batch.doc numbers them and Batch.pos
restarts. The order of rows depends on seed and epoch alone. Rank r of w takes rows r, r + w, …: together the
ranks read each row once, and a run on two machines reads what it would read on one.
"""
import time
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import cache, lru_cache
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import torch

from flatten import flatten, lay_prompt

STREAMS = ('text', 'speech', 'silence')     # what a learned token can be


class Batch(NamedTuple):
    idx: torch.Tensor       # int64 [B, T] ids that are fed
    pos: torch.Tensor       # int64 [B, T] position in its document
    doc: torch.Tensor       # int64 [B, T] number of its document in the batch
    learn: torch.Tensor     # int64 [N] places in the flattened [B * T] whose output is scored
    targets: torch.Tensor   # int64 [N] the ids to be predicted there
    stream: torch.Tensor    # int64 [N] what kind of id that is, an index into STREAMS
    sec: float              # of conversation

    def to(self, device):
        tensors = (value.to(device, non_blocking=True) for value in self[:-1])  # needs pinned memory
        return Batch(*tensors, self.sec)

    def pin_memory(self):
        return Batch(*(value.pin_memory() for value in self[:-1]), self.sec)


# ------------------------------------------------------------------------------------------------------------
# packing

def pack(lengths, capacity):
    """
    -> rows of documents: lists of their numbers, whose lengths sum to capacity at most.

    Best-fit decreasing: the longest document left goes into the fullest row that still takes it. The 64 rows
    with the most room are then taken apart and filled again by `fill`. On the lengths of bench/lengths, 4,096
    documents at a time, that leaves 0.15 % of padding instead of 0.37 % in rows of 1,024, and 0.45 % instead
    of 0.70 % in rows of 8,192: a quarter per cent of all training (docs/log.md).
    """
    rows, rooms = [], []                                # rooms: (room left, row), sorted
    for i in np.argsort(-np.asarray(lengths), kind='stable').tolist():
        at = bisect_left(rooms, (lengths[i], -1))       # the fullest row that still takes it
        if at == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(at)
        rows[row].append(i)
        insort(rooms, (room - lengths[i], row))
    # 64 rows are a twentieth of those of 4,096 documents; more of them gain little, and cost their square
    loosest = {row for _, row in rooms[-64:]}
    again = fill([i for row in sorted(loosest) for i in rows[row]], lengths, capacity)
    if len(again) < len(loosest):
        rows = [members for row, members in enumerate(rows) if row not in loosest] + again
    return rows


def fill(documents, lengths, capacity):
    """Rows one by one: the longest document left, and beside it those that leave the least room."""
    rows, left = [], sorted(documents, key=lengths.__getitem__)
    while left:
        row = [left.pop()]
        room = capacity - lengths[row[0]]
        n_fit = bisect_right(left, room, key=lengths.__getitem__)
        taken = fullest_subset([lengths[i] for i in left[:n_fit][::-1]], room)
        rows.append(row + [left.pop(n_fit - 1 - k) for k in taken])
    return rows


def fullest_subset(lengths, room):
    """
    -> the positions, ascending, of those lengths whose sum is the largest that is not above room.

    sums[k] is the set of all sums that the first k lengths can have, kept in the bits of an integer: bit n
    says that one of them is n. To add a length to all sums of a set is then one shift.
    """
    sums, mask = [1], (2 << room) - 1           # of no lengths: only 0; the mask cuts off sums above room
    for length in lengths:
        if sums[-1] >> room:                    # one of the sums is room itself
            break
        sums.append((sums[-1] | sums[-1] << length) & mask)
    total, taken = sums[-1].bit_length() - 1, []
    for k in range(len(sums) - 2, -1, -1):      # back: a length is needed if there is no such sum without it
        if not sums[k] >> total & 1:
            taken.append(k)
            total -= lengths[k]
    return taken[::-1]


# ------------------------------------------------------------------------------------------------------------
# rows

class Piece(NamedTuple):
    """n ids of a document from `at` on: one document of a row. They are laid when the row is read."""
    lay: Callable           # () -> Document
    at: int
    n: int
    sec: float              # of conversation
    i: int                  # number of its dialogue


class Loader:
    """
    Batches of packed rows, without end (next_batch) or one pass in order (epoch). .state is the position: a
    dict that, assigned again, continues at the same row. Raises ValueError, with the file, for data that
    doesn't fit.

    How many ids a dialogue in chunks will have follows from its number of frames. So rows are packed before
    anything is flattened, and a rank flattens only what it trains on. For layouts by turns the text counts,
    too, and all dialogues of a window are flattened.
    """
    window = 4096       # dialogues that are shuffled and packed together

    def __init__(self, dialogues, layouts, vocab, block_size, batch_size, seed=0, rank=0, world_size=1,
                 user_noise=0.0, padded=True):
        """padded=False: a batch is one row without padding, for devices that need no fixed shapes."""
        self.dialogues, self.layouts, self.vocab = dialogues, layouts, copy(vocab)
        self.block_size, self.batch_size, self.padded = block_size, batch_size, padded
        self.seed, self.rank, self.world_size, self.user_noise = seed, rank, world_size, user_noise
        # a third of the time is BPE; 65,536 texts of 24 tokens take about 70 MB
        self.vocab.encode = lru_cache(2 ** 16)(vocab.encode)
        self.code_end, self.last_id = vocab.code_start + vocab.n_codes, max(vocab.control.values())
        self.n_window = -(-len(dialogues) // self.window)
        self.state = dict(epoch=0, window=0, row=0)
        self.places = np.arange(block_size)
        self.is_checked = bytearray(len(dialogues))     # records do not change: one check is enough
        dialogues.with_words |= any(layout.needs_words for layout in layouts)
        for layout in layouts:
            if len(layout.learned) > block_size + 1:
                raise ValueError(f'a chunk of {layout.name} has {len(layout.learned)} tokens, '
                                 f'more than block_size {block_size}')
        self.counts = {}
        self.rows, self.loaded = self.read_window(0, 0), (0, 0)
        if not self.rows:
            raise ValueError(f'{dialogues.folder}: nothing in {dialogues.split} fits layout '
                             f'{"+".join(layout.name for layout in layouts)} and block_size {block_size} '
                             f'({self.counts})')

    def read_window(self, epoch, window, shuffle=True):
        """-> packed rows [[Piece]] of a window of dialogues. Each epoch has its own order."""
        order = np.arange(len(self.dialogues))
        if shuffle:
            np.random.default_rng([0, self.seed, epoch]).shuffle(order)
        order = order[window * self.window:(window + 1) * self.window]
        pieces, counts = [], dict(dialogues=len(order), one_sided=0, too_long=0)
        n_frames = [n_frame[order].tolist() for n_frame in self.dialogues.n_frame]
        for i, n_user, n_assistant in zip(order.tolist(), *n_frames):
            is_one_sided = n_user != n_assistant and 0 in (n_user, n_assistant)
            for layout in self.layouts:
                if layout.order == 'chunks' and is_one_sided:   # an utterance for the alignment stage
                    counts['one_sided'] += 1
                    continue
                for parts in ([self.cut(i, n_user, layout)] if layout.period else
                              self.take(i, layout, epoch)):
                    counts['too_long'] += not parts
                    pieces += parts
        packed = pack([piece.n - 1 for piece in pieces], self.block_size)   # the last id is a target only
        rows = [[pieces[i] for i in members] for members in packed]
        if shuffle:
            np.random.default_rng([1, self.seed, epoch, window]).shuffle(rows)
        self.counts = dict(counts, documents=len(pieces), tokens=sum(piece.n for piece in pieces),
                           rows=len(rows), sec=sum(piece.sec for piece in pieces))
        return rows

    def take(self, i, layout, epoch):
        """For each document of dialogue i: its [Piece], or [] if it does not fit into a row."""
        pieces, width, rate_hz = [], layout.codes_per_frame, self.dialogues.codec['rate_hz']
        for document in self.flatten(i, layout, epoch):
            parts, at, ends = [], 0, [*document.cuts[1:], len(document.ids)]
            for end, following in zip(ends, [*ends[1:], None]):     # as many chunks as fit into a row
                if not following or following - at > self.block_size + 1:
                    n_code = np.count_nonzero(self.is_speech(document.ids[at:end]))
                    sec = (document.n_frame * (end - at) / len(document.ids) or n_code / width) / rate_hz
                    parts.append(Piece(lambda document=document: document, at, end - at, sec, i))
                    at = end
            pieces.append(parts if all([1 < piece.n <= self.block_size + 1 for piece in parts]) else [])
        return pieces

    def cut(self, i, n_frame, layout):
        """Dialogue i, in chunks -> [Piece], cut at chunk borders so that each fits into a row. The first has
        the prompt; if that leaves no room for a chunk: []."""
        n_prompt = len(lay_prompt(self.dialogues.prompt(i), self.vocab))
        n_chunk, n_most = layout.n_chunk(n_frame), (self.block_size + 1) // layout.period
        n_first = max(0, self.block_size + 1 - n_prompt) // layout.period   # chunks that fit after the prompt
        if not n_first or not n_chunk:
            return []

        def lay():
            return self.flatten(i, layout)[0]
        if n_chunk > n_first:
            lay = cache(lay)            # several rows share it
        pieces, at = [], 0
        for first, end in pairwise([0, *range(n_first, n_chunk, n_most), n_chunk]):
            sec = (end - first) * layout.speech_chunk / self.dialogues.codec['rate_hz']
            to = n_prompt + end * layout.period
            pieces.append(Piece(lay, at, to - at, sec, i))
            at = to
        return pieces

    def flatten(self, i, layout, epoch=0):
        rng = np.random.default_rng([3, self.seed, epoch, i]) if layout.order == 'segments' else None
        record = self.dialogues[i]
        try:
            documents = flatten(record, layout, self.vocab, self.is_checked[i], rng)
        except ValueError as error:
            raise ValueError(f'{self.dialogues.folder}/{self.dialogues.split}.arrow: record {i}: {error}')
        self.is_checked[i] = True
        return documents

    def is_speech(self, ids):
        is_code = ids >= self.vocab.code_start      # behind the codes stand only tokens that came later
        return is_code & (ids < self.code_end) if self.code_end <= self.last_id else is_code

    def next_rows(self, n):
        """-> the next n rows [(row, place)], of all ranks together. A place is (epoch, window, row)."""
        rows = []
        epoch, window, first = (self.state[key] for key in ('epoch', 'window', 'row'))
        while len(rows) < n:
            if self.loaded != (epoch, window):
                self.rows, self.loaded = self.read_window(epoch, window), (epoch, window)
            some = self.rows[first:first + n - len(rows)]
            rows += [(row, (epoch, window, first + i)) for i, row in enumerate(some)]
            first += len(some)
            if first >= len(self.rows):
                window, first = window + 1, 0
            if window == self.n_window:
                epoch, window = epoch + 1, 0
        self.state = dict(epoch=epoch, window=window, row=first)
        return rows

    def next_batch(self):
        """The next batch_size rows of this rank."""
        rows = self.next_rows(self.batch_size * self.world_size)[self.rank::self.world_size]
        return self.collate([self.lay(row, place) for row, place in rows])

    def lay(self, row, place=None):
        """
        -> [(ids, learned, sec)] of the row's documents. With its place in the order, user_noise is added:
        that share of the codes that are fed but not learned becomes any other code. It depends on the place
        only, not on the rank.
        """
        documents = []
        rng = np.random.default_rng([2, self.seed, *place]) if self.user_noise and place else None
        for lay, at, n, sec, _ in row:
            document = lay()
            ids, learned = document.ids[at:at + n], document.learned[at:at + n]
            if rng:
                hit = ~learned & self.is_speech(ids) & (rng.random(n) < self.user_noise)
                size = self.vocab.n_codes // self.dialogues.codes_per_frame     # of a place of the frame
                first = ids - (ids - self.vocab.code_start) % size
                ids = np.where(hit, first + rng.integers(size, size=n, dtype=np.int32), ids)
            documents.append((ids, learned, sec))
        return documents

    def measure(self, n_window=8):
        """Counts of a whole epoch: of all its windows if they are few, else in proportion to the first ones.
        Everything in these is flattened once, so that data that doesn't fit is found before the first step:
        about a second for 50 M tokens."""
        total = dict.fromkeys([*self.counts, 'learned', 'text_dropped'], 0)
        for window in range(min(n_window, self.n_window)):
            for lay, at, n, *_ in chain(*self.read_window(0, window)):
                document = lay()
                total['learned'] += int(np.count_nonzero(document.learned[at + 1:at + n]))
                total['text_dropped'] += document.n_dropped if at == 0 else 0
            total.update({key: total[key] + value for key, value in self.counts.items()})
        proportion = min(1, n_window * self.window / len(self.dialogues))
        return {key: type(value)(value / proportion) for key, value in total.items()}

    def epoch(self):
        """Every document once, in file order of windows: this rank's part of the batches. For evaluation.
        Padded batches have one shape, and all ranks have as many: a last one may be padding altogether."""
        for window in range(self.n_window):
            rows = self.read_window(0, window, shuffle=False)
            for first in range(0, len(rows), self.world_size * self.batch_size):
                at = first + self.rank * self.batch_size
                mine = rows[at:at + self.batch_size]
                if mine or self.padded:
                    yield self.collate([self.lay(row) for row in mine])

    def collate(self, rows):
        """Rows of documents (ids, learned, sec) -> Batch. All is laid side by side in flat arrays first."""
        B, T = self.batch_size, self.block_size
        rows = rows + [[]] * (B - len(rows))        # of padding only: another shape would be compiled anew
        n = B * T if self.padded else sum(len(ids) - 1 for row in rows for ids, _, _ in row)
        idx, pos, doc, following = np.zeros(n, np.int64), *np.empty((3, n), np.int64)
        scored, total_sec, at, number = np.zeros(n, bool), 0., 0, 0
        for b, row in enumerate(rows):
            for ids, learned, sec in row:
                to = at + len(ids) - 1          # every id is fed but the last, and predicted but the first
                idx[at:to], following[at:to], scored[at:to] = ids[:-1], ids[1:], learned[1:]
                pos[at:to], doc[at:to] = self.places[:to - at], number
                at, total_sec, number = to, total_sec + sec, number + 1
            if self.padded:                     # padding is a document of its own, nothing in it is learned
                end = b * T + T
                pos[at:end], doc[at:end] = self.places[:end - at], number
                at, number = end, number + 1
        learn = np.flatnonzero(scored)          # (N)
        targets = following.take(learn)
        silent = [self.vocab.control[name] for name in ('<|silent_text|>', '<|silent_speech|>')]
        is_silent = (targets == silent[0]) | (targets == silent[1])
        is_speech = self.is_speech(targets)
        stream = (is_speech.view(np.int8) + 2 * is_silent.view(np.int8)).astype(np.int64)   # as in STREAMS
        shape = (B if self.padded else 1, -1)
        arrays = [*(x.reshape(shape) for x in (idx, pos, doc)), learn, targets, stream]
        return Batch(*map(torch.from_numpy, arrays), total_sec)


class Mixture:
    """Loaders of several data sets as one: the next row comes from the set that is furthest behind its
    weight. So every stretch of rows holds the sets by weight, on any number of ranks."""

    def __init__(self, loaders, weights):
        self.loaders, self.weights = loaders, [weight / sum(weights) for weight in weights]
        self.taken = [0] * len(loaders)

    @property
    def state(self):
        return dict(taken=list(self.taken), loaders=[loader.state for loader in self.loaders])

    @state.setter
    def state(self, state):
        self.taken = list(state['taken'])
        for loader, loader_state in zip(self.loaders, state['loaders'], strict=True):
            loader.state = loader_state

    def next_rows(self, n_row):
        """-> the next rows [(loader, row, place)], of all ranks together"""
        order = []
        for _ in range(n_row):
            n = sum(self.taken) + 1
            behind = [weight * n - taken for weight, taken in zip(self.weights, self.taken)]
            order.append(behind.index(max(behind)))
            self.taken[order[-1]] += 1
        rows = [iter(loader.next_rows(order.count(i))) for i, loader in enumerate(self.loaders)]
        return [(self.loaders[i], *next(rows[i])) for i in order]

    def next_batch(self):
        first = self.loaders[0]
        chosen = self.next_rows(first.batch_size * first.world_size)[first.rank::first.world_size]
        return first.collate([loader.lay(row, place) for loader, row, place in chosen])

    def measure(self):
        counts = [loader.measure() for loader in self.loaders]
        return {key: sum(count[key] for count in counts) for key in counts[0]}

    def epoch(self):
        for loader in self.loaders:
            yield from loader.epoch()


class Prefetch:
    """
    Makes a loader's (or mixture's) next batches in a thread while the device computes: the same batches, on
    the device. .state is the position after those that were handed out, .wait_sec how long the caller has
    waited for them. What the loader raises, next_batch raises. The loader gets its state before; afterwards
    only the thread may use it.
    """

    def __init__(self, loader, device, n_ahead=2):
        self.loader, self.device, self.state, self.wait_sec = loader, torch.device(device), loader.state, 0.0
        if self.device.type == 'cuda' and self.device.index is None:    # in a thread cuda would mean cuda:0
            self.device = torch.device('cuda', torch.cuda.current_device())
        self.thread = ThreadPoolExecutor(1)
        self.ahead = deque(self.thread.submit(self.make_batch) for _ in range(n_ahead))

    def make_batch(self):
        batch = self.loader.next_batch()
        if self.device.type == 'cuda':
            with torch.cuda.device(self.device):
                batch = batch.pin_memory()
        return batch, self.loader.state

    def next_batch(self):
        start = time.perf_counter()
        self.ahead.append(self.thread.submit(self.make_batch))
        batch, self.state = self.ahead.popleft().result()
        self.wait_sec += time.perf_counter() - start
        return batch.to(self.device)

    def close(self):
        """Ends the thread, after the batch at hand. Without close it ends with the process."""
        self.thread.shutdown(cancel_futures=True)
