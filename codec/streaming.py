"""
Codecs that hear and speak while the audio is still coming. Every codec has

    codec.stream()    a Stream:   push(samples) -> codes,    finish() -> the codes of what is left,
                                  missing(n) -> samples that are still to come until n more codes are sure
    codec.speak()     a Speaker:  push(codes)   -> samples,  finish() -> the samples that are left

Any number of samples or codes may be pushed, none too, and in whatever pieces they come, the same comes out.
What is sure comes out at once; lookahead_sec says how long after the end of its frame that is, at most.
A Stream is of one talker, a Speaker of one turn.

A codec that hears or says only so far to either side does both in windows (Windows, here): SNAC and DAC,
CosyVoice's tokens. The demo's codec (mel.py) and Mimi (rvq.py) go on from where they were.
"""
import numpy as np


class Windows:
    """
    Blocks of `step` frames, each read with `before` frames before it and `after` frames behind it.

    work(rows, first frame): rows of these frames, which at the end of a wave may lack some -> n_out rows a
    frame. Rows are samples, or frames of codes; n_in come in a frame. empty: what comes out if nothing does.
    """

    def __init__(self, work, n_in, n_out, empty, before, after, step, rate_hz):
        self.work, self.n_in, self.n_out, self.empty = work, n_in, n_out, empty
        self.before, self.after, self.step, self.rate_hz = before, after, step, rate_hz
        self.lookahead_sec = (step - 1 + after) / rate_hz
        self.rows, self.n_row = None, 0     # from self.start on; all that were pushed
        self.start = self.at = 0            # frames: the first in self.rows, the first of the next block

    def push(self, rows):
        rows = np.asarray(rows)
        if len(rows):
            self.rows = rows if self.rows is None else np.concatenate([self.rows, rows])
            self.n_row += len(rows)
        return self.blocks(self.n_row // self.n_in, False)

    def missing(self, n):
        n_frame = self.at + -(-n // self.step) * self.step + self.after
        return n_frame * self.n_in - self.n_row

    def finish(self):
        return self.blocks(-(-self.n_row // self.n_in), True)

    def blocks(self, n_frame, is_end):
        parts = [self.empty]
        while self.at + self.step + self.after <= n_frame or is_end and self.at < n_frame:
            first, end = self.first(self.at), min(self.at + self.step, n_frame)
            stop = min(end + self.after, n_frame)
            read = self.rows[(first - self.start) * self.n_in:(stop - self.start) * self.n_in]
            made = self.work(read, first)
            parts.append(made[(self.at - first) * self.n_out:(end - first) * self.n_out])
            kept = self.first(end)
            self.rows = self.rows[(kept - self.start) * self.n_in:]
            self.at, self.start = end, kept
        return np.concatenate(parts)

    def first(self, at):
        """The frame from which on a block that begins at frame `at` is read"""
        return max(0, at - self.before)
