"""
Conversations with one model that begin and end each at its own time.

    seat 0   ─ chunk ─┐                        ┌─►
    seat 1            ├─ passes of one batch ──┤        has said nothing new: what is computed for it is lost
    seat 2   ─ chunk ─┘                        └─►

Those who have a chunk at the same time are answered side by side. On a GPU a chunk takes hardly longer for
64 than for one. Each row of the KV cache is a seat, and counts its own positions.
"""
import numpy as np
import torch

from decode import Duplex
from model import KVCache


class Rows(KVCache):
    """A KV cache in which each row begins, goes on and forgets by itself."""

    def __init__(self, model, n_row, *args):
        super().__init__(model, n_row, *args)
        # on the device, of each row: the oldest position held, the first after this pass, is it of a seat
        self.state = torch.zeros(3, n_row, dtype=torch.int64, device=self.keys[0].device)
        self.oldest, self.seen, self.is_used = self.state
        self.first_new = torch.zeros_like(self.seen)

    def take(self, rows, seats):
        """The next passes are for a slice of rows. Of these, seats' count: the others' results are lost."""
        self.rows, self.seats, self.len = rows, seats, max(seat.len for seat in seats)
        state = torch.zeros(self.state.shape, dtype=torch.int64)
        for seat in seats:
            state[:, seat.row] = torch.tensor([seat.next_pos - seat.len, seat.next_pos, 1])
        self.state.copy_(state)

    def advance(self, T):
        for seat in self.seats:
            seat.len += T
            seat.next_pos += T
            assert seat.len <= self.max_len, f'{seat.len} positions in a KV cache of {self.max_len}'
        self.first_new.copy_(self.seen)
        self.seen += T
        self.n_slot = self.count_slots(max(seat.next_pos for seat in self.seats))

    def place(self, T):
        """-> pos (B, T); mask (B, 1, T, S)"""
        oldest, first, is_used = (x[self.rows, None] for x in (self.oldest, self.first_new, self.is_used > 0))
        pos = first + torch.arange(T, device=first.device)              # (B, T)
        # the last slot, max_len, is read by nobody
        self.new_slots = torch.where(is_used, pos % self.max_len, self.max_len)
        last, slots = pos[:, -1:], torch.arange(self.n_slot, device=first.device)
        held = last - (last - slots) % self.max_len                     # (B, S), as in KVCache
        is_visible = (held >= oldest)[:, None] & (held[:, None] <= pos[:, :, None])     # (B, T, S)
        return pos, self.mask_of((is_visible | ~is_used[:, None])[:, None])     # no softmax of nothing

    def extend(self, layer, k, v):
        rings = self.keys[layer][self.rows], self.values[layer][self.rows]      # (B, K, max_len + 1, D) each
        row = torch.arange(len(k), device=k.device)[:, None]
        for ring, new in zip(rings, (k, v)):
            ring.transpose(1, 2).index_put_((row, self.new_slots), new.to(ring.dtype))
        return (ring[:, :, :self.n_slot].transpose(1, 2) for ring in rings)


class Seat:
    """A row of the table, and what its conversation has come to."""

    def __init__(self, table, row):
        self.table, self.row, self.layout, self.vocab = table, row, table.layout, table.vocab

    def reset(self, prompt=''):
        """A new conversation begins here. Raises ValueError for a prompt that the context cannot hold."""
        ids, device = self.table.lay(prompt), self.table.device
        self.unfed, self.n_prompt = torch.tensor([ids], dtype=torch.int64, device=device), len(ids)
        self.len = self.next_pos = 0        # positions held, and ever seen
        self.generator = torch.Generator(device).manual_seed(self.table.sampling.seed)

    def forget(self):
        """Forgets the oldest chunks, if the next one needs their place."""
        period = self.table.layout.period
        while self.len + self.unfed.shape[1] + period > self.table.max_context:
            self.len -= self.n_prompt or period
            self.n_prompt = 0


class Table(Duplex):
    """
    A Duplex whose n_row users are seats. step gives each frame to on_frame, int [codes a frame], -1 is
    silence, as soon as it is chosen; on a GPU, which works on the next one meanwhile, once that has begun.
    """

    cache_class = Rows

    def make_room(self, prompt):
        super().make_room(prompt)
        kinds = {slot.kind for slot in self.layout.chunk}
        # what such layouts keep from chunk to chunk would have to be kept by seat
        assert not self.layout.n_late and 'state' not in kinds, self.layout
        self.prompt = prompt
        self.is_there = torch.cuda.Event() if self.device.type == 'cuda' else None
        self.seats = [Seat(self, row) for row in range(self.n_row)]
        for seat in self.seats:
            seat.reset(prompt)

    @torch.inference_mode()
    def step(self, seats, chunks, on_frame):
        """
        seats       [Seat], of those who have said something
        chunks      int [len(seats), codes of a chunk]
        on_frame    of the number of a seat among them, and a frame
        -> text ids [len(seats), m], speech codes as of Duplex.step
        """
        said, chunks = [None] * len(seats), np.asarray(chunks).reshape(len(seats), -1)
        lengths = [seat.unfed.shape[1] for seat in seats]
        for length in set(lengths):     # who has just begun feeds fewer ids, or a prompt
            numbers = [i for i, each in enumerate(lengths) if each == length]
            group = [seats[i] for i in numbers]
            text, speech = self.step_group(group, chunks[numbers],
                                           lambda j, codes, numbers=numbers: on_frame(numbers[j], codes))
            for j, i in enumerate(numbers):
                said[i] = text[j], speech[j]
        return [np.stack(each) for each in zip(*said)]

    def step_group(self, seats, chunks, on_frame):
        rows = self.span(seats)
        at = [seat.row - rows.start for seat in seats]      # their places among these rows
        self.n_row, self.group = rows.stop - rows.start, list(zip(seats, at))
        self.frame, self.chosen = [], None      # also of a step that failed
        for seat in seats:
            seat.forget()
        self.cache.take(rows, seats)
        heard = np.zeros((self.n_row, chunks.shape[1]), np.int64)
        heard[at] = chunks
        self.unfed = self.unfed.new_zeros(self.n_row, seats[0].unfed.shape[1])
        self.unfed[at] = torch.cat([seat.unfed for seat in seats])
        self.on_frame = on_frame
        text, speech = super().step(heard)
        self.tell()
        self.on_frame = None    # who talked is not kept
        self.ids.clear()        # a conversation may last for hours
        for seat, row in self.group:
            seat.unfed = self.unfed[row:row + 1]
        return text[at], speech[at]

    def span(self, seats):
        """-> the slice of rows that is computed, which has one of few sizes"""
        # on a GPU a graph reads the rows for which it was captured
        first = 0 if self.uses_graphs else min(seat.row for seat in seats)
        end = max(seat.row for seat in seats) + 1
        size = next(n for n in self.sizes() if n >= end - first)
        first = min(first, len(self.seats) - size)
        return slice(first, first + size)

    def sizes(self):
        """1, 2, 4 … and all: for each a CPU's libraries prepare their matmuls, and a GPU has graphs"""
        n_seat = len(self.seats)
        return [*(2 ** i for i in range(n_seat.bit_length()) if 2 ** i < n_seat), n_seat]

    def warm_up(self, n_chunk):
        """All that takes time once takes it now. Before the conversations only."""
        layout, self.n_prompt = self.layout, self.seats[0].n_prompt
        n_code = layout.speech_chunk * layout.codes_per_frame
        for n in self.sizes():
            self.n_row = n
            self.cache.take(slice(0, n), self.seats[:1])
            super().warm_up(n_chunk)
            for seat in self.seats[:n]:
                seat.reset(self.prompt)
            for _ in range(2):      # the first chunk has no token before it
                self.step(self.seats[:n], np.zeros((n, n_code)), lambda i, codes: None)
        for seat in self.seats:
            seat.reset(self.prompt)

    def draw(self, n_id):
        noise = torch.ones(self.n_row, n_id, device=self.device)
        for seat, row in self.group:    # each has its own, so the company changes nothing
            noise[row].exponential_(generator=seat.generator)
        return noise

    def write(self, slot, place, text=None):
        token = super().write(slot, place, text)
        if slot.kind == 'speech':
            self.frame.append(token)
            if len(self.frame) == self.layout.codes_per_frame:
                self.tell()     # the frame before
                codes, self.frame = torch.cat(self.frame, 1), []        # (n_row, codes a frame)
                self.chosen = codes.to('cpu', non_blocking=True)
                if self.is_there:
                    self.is_there.record()
                else:
                    self.tell()
        return token

    def tell(self):
        """Gives the last chosen frame to on_frame, unless it has it."""
        if self.chosen is None:
            return
        if self.is_there:
            self.is_there.synchronize()     # waits for that frame, not for what the GPU was given since
        codes, self.chosen = self.chosen.numpy(), None
        codes = np.where(codes == self.vocab.control['<|silent_speech|>'], -1, codes - self.vocab.code_start)
        for number, (_, row) in enumerate(self.group):
            self.on_frame(number, codes[row])
