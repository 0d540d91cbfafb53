"""
Losses by stream (text, speech, silence), in nats a token, and of all in bits a second of conversation. Bits a
second compare across layouts, which lay the same second out as different numbers of tokens.
"""
import math
import time

import torch

from data.loader import STREAMS


def token_weights(batch, text_weight):
    """-> (N), of the targets in the loss"""
    return torch.where(batch.stream == STREAMS.index('text'), text_weight, 1.0)


def stream_sums(losses, batch, device):
    """losses (N), in nats -> float64 (2, 3): the sum of each stream's losses, and the number of its tokens"""
    sums = torch.zeros(2, len(STREAMS), dtype=torch.float64, device=device)
    sums[0].index_add_(0, batch.stream, losses.detach().double())
    sums[1].index_add_(0, batch.stream, torch.ones_like(losses, dtype=torch.float64))
    return sums


def loss_sums(model, loader, device, autocast):
    """-> stream_sums over all documents of a loader, and how many seconds of conversation these are"""
    sums, sec = torch.zeros(2, len(STREAMS), dtype=torch.float64, device=device), 0.0
    model.eval()
    with torch.no_grad(), autocast:
        for batch in loader.epoch():
            batch = batch.to(device)
            losses = model(batch.idx, batch.pos, batch.doc, batch.learn, batch.targets)
            sums += stream_sums(losses, batch, device)
            sec += batch.sec
    model.train()
    return sums, sec


def over_processes(place, sums, sec):
    """stream_sums and seconds of one process -> those of all"""
    both = torch.cat([sums.flatten(), sums.new_tensor([sec])])
    place.all_reduce(both)
    return both[:-1].view_as(sums), float(both[-1])


def by_stream(sums, sec):
    """stream_sums -> {'loss': nats a token, 'text': …, 'speech': …, 'silence': … (the same for each stream
    that has tokens), 'bits_per_sec': the sum of all in bits, a second of conversation; nan of text alone}"""
    nats, counts = sums.tolist()
    if not any(counts):     # each step was skipped
        return dict(loss=math.nan, bits_per_sec=math.nan)
    values = {name: nats[i] / counts[i] for i, name in enumerate(STREAMS) if counts[i]}
    bits_per_sec = sum(nats) / math.log(2) / sec if sec else math.nan
    return dict(loss=sum(nats) / sum(counts), **values, bits_per_sec=bits_per_sec)


def format_losses(values):
    """'loss  0.024 text  0.026 speech  0.024 silence  0.023 |     1.0 b/s'"""
    streams = ' '.join(f'{key} {values[key]:6.3f}' if key in values else f'{key}    -  ' for key in STREAMS)
    return f'loss {values["loss"]:6.3f} {streams} | {values["bits_per_sec"]:7.1f} b/s'


class Meter:
    """What came together since the last line of the log: add() after each micro-step, end_step() after each
    step. All stays on the device, so that nobody waits for it."""

    def __init__(self, batches, device):
        self.batches = batches
        self.sums = torch.zeros(2, len(STREAMS), dtype=torch.float64, device=device)    # see stream_sums
        self.of_step = torch.zeros_like(self.sums)
        # of the whole run: steps that were skipped, and how many of them there were in a row just now
        self.n_skipped, self.n_in_a_row = torch.zeros(2, device=device)
        self.restart()

    def restart(self):
        self.sums.zero_()
        self.sec, self.n_step, self.start, self.waited_sec = 0.0, 0, time.time(), self.batches.wait_sec

    def add(self, batch, losses):
        self.of_step += stream_sums(losses, batch, losses.device)
        self.sec += batch.sec

    def end_step(self, grad_norm):
        """-> float32 [], 1 for a step whose loss or gradient is not finite, which does not count; else 0"""
        is_bad = (~grad_norm.isfinite()).float()
        self.sums += torch.where(is_bad.bool(), 0.0, self.of_step)
        self.of_step.zero_()
        self.n_skipped += is_bad
        self.n_in_a_row.add_(1.0).mul_(is_bad)
        self.n_step += 1
        return is_bad

    def pack(self, place):
        """-> what goes into a saved state, the sums of all processes"""
        sums, sec = over_processes(place, self.sums, self.sec)
        return dict(sums=sums.tolist(), sec=sec, n_step=self.n_step, elapsed_sec=time.time() - self.start,
                    n_skipped=float(self.n_skipped), n_in_a_row=float(self.n_in_a_row))

    def unpack(self, packed, is_main):
        """Goes on from there; the sums, which will be summed over all processes, on the first one only."""
        if is_main:
            self.sums.copy_(self.sums.new_tensor(packed['sums']))
            self.sec = packed['sec']
        self.n_step, self.start = packed['n_step'], time.time() - packed['elapsed_sec']
        self.n_skipped.fill_(packed['n_skipped'])
        self.n_in_a_row.fill_(packed['n_in_a_row'])
