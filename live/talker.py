"""
One conversation as it happens: the user's samples go in as they come, events come out. No sockets here.

    user        ─ samples ─► codec.stream ─ codes ─┐                     ┌─► text
    assistant                                      └─► a chunk, Table ───┴─ codes ─► codec.speak ─► samples

The clock is the microphone. A chunk of the assistant's speech stands for the same time as the user's chunk
from which it was made, so it is heard that much later, and all that is sent is as long as what was heard. A
frame is sent as soon as the model has chosen it:

    user's chunk          |░░░░░░░░.......|
    assistant's chunk     |............▓▓▓|                what the model writes about this time
    … as it is played                     |............▓▓▓|
                                           └ silence is sent, too, so that the next chunk comes in time

An event is a dict, its "type" as in OpenAI's Realtime API (live/server.py).
"""
import base64
import threading
from collections import deque

import numpy as np
import soxr

from common.levels import is_silent
from measures.turns import BACKCHANNEL_SEC, JOIN_SEC, OVERLAP_SEC, PAUSE_SEC

MAX_WAIT_SEC = 1.0      # what waits so long after its chunk was heard is dropped, the oldest first
ONSET_FRAMES = 2        # the user speaks once so many frames in a row are no silence


def check(layout):
    """Raises ValueError where nobody can talk to such a model."""
    if not layout.period or not layout.has_speech_of('assistant'):
        raise ValueError(f'layout {layout.name} cannot listen and talk at once, chunk by chunk; '
                         'talk to a duplex3 or duplex2 checkpoint')
    if layout.n_late:
        raise ValueError(f'layout {layout.name} lays some codes of a frame later than others, which talk.py '
                         'does not undo yet')


def speaking_lag(codec):
    """How many samples codec.speak() keeps back at most, as later codes may change them."""
    speaker, hop = codec.speak(), codec.sample_rate / codec.rate_hz
    got, lag = 0, 0
    for n in range(1, round(codec.rate_hz) + 1):
        got += len(speaker.push(codec.silence_codes[:1]))
        lag = max(lag, round(n * hop) - got)
    return lag


class Talker:
    """
    push takes samples, from any thread; the rest is called by talk_on, in one thread.
        seat        of a Table, with nothing said yet
        lag         speaking_lag(codec), in samples
        rate        samples a second, both ways
        emit        is called with one event or several, as they happen
    """

    def __init__(self, seat, codec, lag, rate, emit):
        self.seat, self.codec, self.rate, self.emit = seat, codec, rate, emit
        self.layout, self.vocab = seat.layout, seat.vocab
        self.n, self.hop = self.layout.speech_chunk, codec.sample_rate / codec.rate_hz
        self.lag, self.stream = lag, codec.stream()
        # of the user
        self.lock, self.waiting, self.n_waiting, self.n_dropped = threading.Lock(), deque(), 0, 0
        self.n_told = 0                     # of n_dropped
        self.inward = soxr.ResampleStream(rate, codec.sample_rate, 1, dtype='float32', quality='MQ')
        self.codes = codec.silence_codes[:0]        # heard, but no chunk yet
        self.n_frame = 0                    # in chunks
        self.n_said, self.before = 0, None  # of them, of the chunk that is written; the response before it
        self.max_waiting = round(rate * (MAX_WAIT_SEC + self.n / codec.rate_hz))
        self.n_sounding = 0                 # frames without silence, up to now
        self.span = None                    # [first, last] frame of what the user says, or said last
        self.is_user_speaking = False
        # of the assistant
        self.speaker, self.began = None, 0  # the first frame of what it says
        self.response, self.n_response = None, 0
        self.text_ids, self.text, self.is_text_over = [], '', False
        # in this response; the frame with whose time its sound begins; samples
        self.has_spoken, self.due, self.n_sent = False, 0, 0
        # a response is over after so many silent frames; its text may come a chunk before its speech
        self.n_quiet, self.max_quiet = 0, max(round(JOIN_SEC * codec.rate_hz), self.n + 1)
        self.wants_cancel = self.is_cancelled = False       # the client wants no more of it

    # -------------------------------------------------------------------------------- what the user says

    def push(self, samples):
        """float32 [n] at rate. Where the model falls behind, the oldest samples are dropped."""
        with self.lock:
            self.waiting.append(samples)
            self.n_waiting += len(samples)
            while self.n_waiting > self.max_waiting and len(self.waiting) > 1:
                n = len(self.waiting.popleft())
                self.n_waiting -= n
                self.n_dropped += n

    def has_work(self):
        return self.wants_cancel or self.completes(1)

    def is_due(self):
        """Is it the model's turn"""
        return self.wants_cancel or self.completes(self.n)

    def completes(self, n):
        """Do codes of the next chunk, n or all that it lacks, come of what waits"""
        n = min(n, self.n - len(self.codes))
        return n <= 0 or self.n_waiting * self.codec.sample_rate >= self.stream.missing(n) * self.rate

    def listen(self):
        """-> the user's next chunk, if what came completes one"""
        if self.wants_cancel:
            self.wants_cancel = False
            self.cancel()
        if len(self.codes) < self.n:
            with self.lock:
                samples, self.n_waiting, dropped = list(self.waiting), 0, self.n_dropped
                self.waiting.clear()
            if dropped > self.n_told:
                self.emit(dict(type='nanoduplex.behind', where='model',
                               dropped_ms=round(1e3 * (dropped - self.n_told) / self.rate)))
                self.n_told = dropped
            if samples:
                samples = self.inward.resample_chunk(np.concatenate(samples))
                new = self.stream.push(samples)
                self.codes = np.concatenate([self.codes, new]) if len(new) else self.codes
        if len(self.codes) >= self.n:
            chunk, self.codes = self.codes[:self.n], self.codes[self.n:]
            self.watch(chunk)
            self.n_said, self.before = 0, self.response
            return chunk

    def user_ms(self, frame):
        """When the user's frame was in the microphone."""
        return round(1e3 * (frame / self.codec.rate_hz + self.n_told / self.rate))

    def watch(self, chunk):
        """Tells when the user starts and stops to speak."""
        quiet = JOIN_SEC * self.codec.rate_hz
        for i, silent in enumerate(is_silent(chunk, self.codec.silence_codes)):
            frame = self.n_frame + i
            self.n_sounding = 0 if silent else self.n_sounding + 1
            if self.n_sounding >= ONSET_FRAMES:
                if not self.is_user_speaking:
                    self.is_user_speaking = True
                    self.span = [frame - self.n_sounding + 1, frame]
                    self.emit(dict(type='input_audio_buffer.speech_started',
                                   audio_start_ms=self.user_ms(self.span[0])))
                self.span[1] = frame
            if self.is_user_speaking and frame - self.span[1] >= quiet:
                self.is_user_speaking = False
                self.emit(dict(type='input_audio_buffer.speech_stopped',
                               audio_end_ms=self.user_ms(self.span[1] + 1)))

    # -------------------------------------------------------------------------------- what the assistant says

    def end_chunk(self, text, speech):
        """text ids [m], speech codes [n, …] of the chunk whose frames were said"""
        ids = [i for i in text.tolist() if i < self.vocab.n_text]
        # text after a gap, while the assistant still ends its sentence, is the next one's
        is_next = bool(ids) and self.is_text_over and (speech < 0).any() and not self.speaker
        if is_next and self.before and self.before == self.response:
            self.end()
        self.is_text_over = not ids
        if ids:
            self.write(ids)
        self.n_frame += self.n

    def begin(self):
        if not self.response:
            self.n_response += 1
            self.response, self.has_spoken, self.n_sent, self.n_quiet = f'resp_{self.n_response}', False, 0, 0
            self.text_ids, self.text, self.is_cancelled = [], '', False
            self.emit(dict(type='response.created', response=dict(
                id=self.response, object='realtime.response', status='in_progress')))

    def write(self, ids):
        self.begin()
        self.n_quiet = 0
        self.text_ids += ids
        text = self.vocab.decode(self.text_ids)
        if not text.endswith('\ufffd'):     # else half a character
            delta, self.text = text[len(self.text):], text
            self.emit(dict(type='response.audio_transcript.delta', delta=delta, **self.place()))

    def place(self):
        return dict(response_id=self.response, item_id=f'item_{self.n_response}', output_index=0,
                    content_index=0)

    def say(self, codes):
        """The chunk's next frame, int [codes a frame], -1 is silence"""
        i, pieces = self.n_said, []
        self.n_said += 1
        if codes.min() >= 0:
            self.begin()
            if not self.has_spoken:
                self.has_spoken, self.began, self.due = True, self.n_frame + i, self.n_frame + self.n
                self.outward = soxr.ResampleStream(self.codec.sample_rate, self.rate, 1, dtype='float32',
                                                   quality='MQ')
                pieces.append(np.zeros(self.sample(i) + self.lag, np.float32))
            self.speaker, self.n_quiet = self.speaker or self.codec.speak(), 0
            pieces.append(self.speaker.push((codes if len(codes) > 1 else codes[0])[None].astype(np.uint16)))
        elif self.response:
            if self.speaker and self.is_interrupted(self.n_frame + i):
                self.speaker = None
                return self.end(is_cancelled=True)
            if self.speaker:
                pieces.append(self.speaker.finish())
            self.speaker, self.n_quiet = None, self.n_quiet + 1
            if self.has_spoken and self.n_quiet < self.max_quiet:       # it may go on
                pieces.append(np.zeros(self.sample(i + 1) - self.sample(i), np.float32))
        if pieces:
            self.sound(np.concatenate(pieces))
        if self.response and self.n_quiet >= self.max_quiet:
            self.end()

    def sample(self, i):
        """The first of the chunk's frame i"""
        return round(i * self.hop)

    def is_interrupted(self, frame):
        """Has the assistant fallen silent in this frame because of the user? The user began while it spoke,
        and not in its last OVERLAP_SEC: before anybody can yield, it had ended by itself. The user speaks
        (almost) up to then, and that is no "mhm", as far as one knows by now."""
        rate_hz = self.codec.rate_hz
        if not self.span or not self.began < self.span[0] <= frame - OVERLAP_SEC * rate_hz:
            return False
        first, last = self.span
        is_over = self.n_frame + self.n - 1 - last >= PAUSE_SEC * rate_hz
        is_backchannel = is_over and last + 1 - first < BACKCHANNEL_SEC * rate_hz
        return frame <= last + JOIN_SEC * rate_hz and not is_backchannel

    def sound(self, samples):
        samples = self.outward.resample_chunk(samples)
        if len(samples) and not self.is_cancelled:      # a codec that speaks in windows has some now and then
            pcm = (np.clip(samples, -1, 1) * 32767).astype('<i2').tobytes()
            # who plays it knows from this how late it is
            due_ms = self.user_ms(self.due) + round(1e3 * self.n_sent / self.rate)
            self.n_sent += len(samples)
            self.emit(dict(type='response.audio.delta', delta=base64.b64encode(pcm).decode(), **self.place(),
                           due_ms=due_ms))

    def end(self, is_cancelled=False):
        place = self.place()
        if is_cancelled:
            self.cancel()
        is_cancelled = self.is_cancelled
        self.emit(
            dict(type='response.audio.done', **place),
            dict(type='response.audio_transcript.done', transcript=self.text, **place),
            dict(type='response.done', response=dict(
                id=self.response, object='realtime.response',
                status='cancelled' if is_cancelled else 'completed',
                status_details=dict(type='cancelled', reason='turn_detected') if is_cancelled else None)))
        self.response = None

    def cancel(self):
        """The client is to hear no more of this response; the model goes on, unheard."""
        if self.response and not self.is_cancelled:
            self.is_cancelled = True
            self.emit(dict(type='output_audio_buffer.cleared', response_id=self.response, n_sent=self.n_sent))


def talk_on(table, talkers, on_error):
    """Listens to what came, and writes at most one chunk for each, of all side by side. A fault in one
    conversation ends that one: on_error is called with the talker and the exception."""
    failed = set()

    def attempt(talker, function, *args):
        try:
            return None if talker in failed else function(*args)
        except Exception as error:
            failed.add(talker)
            on_error(talker, error)
    heard = {talker: attempt(talker, talker.listen) for talker in talkers}
    ready = [talker for talker in talkers if heard[talker] is not None]
    if ready:
        try:
            said = table.step([talker.seat for talker in ready], [heard[talker] for talker in ready],
                              lambda i, codes: attempt(ready[i], ready[i].say, codes))
        except Exception as error:      # the model's: it is shared
            for talker in ready:
                on_error(talker, error)
            return
        for talker, text, speech in zip(ready, *said):
            attempt(talker, talker.end_chunk, text, speech)
