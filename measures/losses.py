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


def by_stream(sums, sec):
    """stream_sums -> {'loss': nats a token, 'text': …, 'speech': …, 'silence': … (the same for each stream
    that has tokens), 'bits_per_sec': the sum of all in bits, a second of conversation}"""
    nats, counts = sums.tolist()
    values = {name: nats[i] / counts[i] for i, name in enumerate(STREAMS) if counts[i]}
    return dict(loss=sum(nats) / sum(counts), **values, bits_per_sec=sum(nats) / math.log(2) / sec)


def format_losses(values):
    """'loss  0.024 text  0.026 speech  0.024 silence  0.023 |     1.0 b/s'"""
    streams = ' '.join(f'{key} {values[key]:6.3f}' if key in values else f'{key}    -  ' for key in STREAMS)
    return f'loss {values["loss"]:6.3f} {streams} | {values["bits_per_sec"]:7.1f} b/s'


class Meter:
    """What came together since the last line of the log."""

    def __init__(self, batches, device):
        self.batches = batches
        self.sums = torch.zeros(2, len(STREAMS), dtype=torch.float64, device=device)    # see stream_sums
        self.restart()

    def restart(self):
        self.sums.zero_()
        self.sec, self.n_step, self.start, self.waited_sec = 0.0, 0, time.time(), self.batches.wait_sec

    def add(self, batch, losses):
        self.sums += stream_sums(losses, batch, losses.device)
        self.sec += batch.sec
