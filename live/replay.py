"""
A user without a browser: plays a recording into the socket at real speed, and hears what comes back.

    microphone  |10 ms|10 ms|10 ms|…        one clock for both, as in a browser: at each tick the 10 ms of the
    ear         |10 ms|10 ms|10 ms|…        recording before it are sent, and 10 ms of sound are taken
"""
import asyncio
import base64
import json
import time
from collections import deque
from dataclasses import dataclass, field

import aiohttp
import numpy as np

TICK_SEC = 0.01
MARGIN_SEC = 0.01       # an answer's first sound waits for what comes as late as the latest, and this
N_LATE = 200            # of so many parts, the last ones: 8 s


class Player:
    """What the page's worklet does (live/talk.html): what comes is played one after the other."""

    def __init__(self, rate):
        self.rate, self.queue, self.n_queued = rate, deque(), 0
        self.is_open = False        # is more of this response to come
        self.n_glitch, self.late = 0, deque(maxlen=N_LATE)

    def add(self, samples, late_sec=0.0):
        """late_sec: how long after it could have been heard, if nothing took time, this part came"""
        if not self.n_queued and not self.is_open:      # it waits, so that the next part comes in time
            wait_sec = max(self.late, default=late_sec + MARGIN_SEC) - late_sec
            self.put(np.zeros(round((max(wait_sec, 0) + MARGIN_SEC) * self.rate), np.float32))
        self.late.append(late_sec)
        self.put(samples)
        self.is_open = True

    def put(self, samples):
        self.queue.append(samples)
        self.n_queued += len(samples)

    def drop(self):
        """-> how many samples will not be played"""
        n, self.n_queued, self.is_open = self.n_queued, 0, False
        self.queue.clear()
        return n

    def take(self, n):
        """-> float32 [n], silence where there is nothing to play"""
        out, at = np.zeros(n, np.float32), 0
        while at < n and self.queue:
            part = self.queue.popleft()
            out[at:at + len(part)] = part[:n - at]
            if len(part) > n - at:
                self.queue.appendleft(part[n - at:])
            at += min(len(part), n - at)
        self.n_queued -= at
        if at < n and self.is_open:     # it ran dry in the middle of an answer
            self.n_glitch += 1
            self.is_open = False
        return out


@dataclass
class Heard:
    """What a conversation was at the user's end."""
    rate: int
    wave: np.ndarray                # float32 [n_sample, 2]: microphone, ear
    turns: list = field(default_factory=list)       # the assistant's: role, start_sec, end_sec, text
    late_ms: list = field(default_factory=list)     # (when, how long after it) a chunk's first part came
    dropped_ms: dict = field(default_factory=dict)  # model, network -> audio that was dropped
    n_glitch: int = 0
    events: list = field(default_factory=list)      # all but audio
    browser: str = ''               # its name and version, if there was one


class User:
    """Talks to url. wave: float32 [n_sample] at rate; speed: how much faster than real time"""

    def __init__(self, url, wave, rate, speed=1.0, prompt=None):
        self.url, self.rate, self.speed, self.prompt = url, rate, speed, prompt
        self.n = round(TICK_SEC * rate)
        wave = np.concatenate([wave, np.zeros(-len(wave) % self.n, np.float32)])
        self.heard = Heard(rate, np.stack([wave, np.zeros_like(wave)], 1))
        self.player, self.tick, self.start = Player(rate), 0, None
        self.response = None        # of the turn that is heard
        self.chunk_ms, self.n_chunk = 1, None       # the last chunk of which something came

    async def talk(self):
        """-> Heard. Raises ValueError, with the server's words, where it is refused."""
        async with aiohttp.ClientSession() as http:
            try:
                async with http.ws_connect(self.url, max_msg_size=1 << 22) as ws:
                    await self.greet(ws)
                    reader = asyncio.create_task(self.read(ws))
                    await self.play(ws)
                    reader.cancel()
            except aiohttp.WSServerHandshakeError as error:
                raise ValueError(f'{self.url} refuses ({error.status})') from None
        self.heard.n_glitch = self.player.n_glitch
        return self.heard

    async def greet(self, ws):
        settings = dict(input_sample_rate=self.rate)
        settings |= {} if self.prompt is None else dict(instructions=self.prompt)
        await ws.send_json(dict(type='session.update', session=settings))
        seen = set()
        while not {'session.created', 'session.updated'} <= seen:       # it may have to wait for a place
            message = await ws.receive()
            if message.type != aiohttp.WSMsgType.TEXT:
                raise ValueError(f'{self.url} closed: {ws.close_code} {message.extra or ""}')
            event = json.loads(message.data)
            if event['type'] == 'error':
                raise ValueError(event['error']['message'])
            seen.add(event['type'])
            self.chunk_ms = event.get('session', {}).get('chunk_ms', self.chunk_ms)

    async def play(self, ws):
        self.start, n = time.monotonic(), self.n
        microphone, ear = self.heard.wave.T
        for self.tick in range(len(microphone) // n):
            await asyncio.sleep(self.start + self.tick * TICK_SEC / self.speed - time.monotonic())
            at = self.tick * n
            if self.tick:
                pcm = (np.clip(microphone[at - n:at], -1, 1) * 32767).astype('<i2').tobytes()
                await ws.send_json(dict(type='input_audio_buffer.append',
                                        audio=base64.b64encode(pcm).decode()))
            if self.player.n_queued and self.heard.turns:
                self.heard.turns[-1]['end_sec'] = (self.tick + 1) * TICK_SEC
            ear[at:at + n] = self.player.take(n)

    async def read(self, ws):
        async for message in ws:
            event = json.loads(message.data)
            kind, now = event['type'], (time.monotonic() - self.start) * self.speed
            if kind == 'response.audio.delta':
                samples = np.frombuffer(base64.b64decode(event['delta']), '<i2').astype(np.float32) / 32768
                late_ms = 1e3 * now - event['due_ms']
                self.player.add(samples, late_ms / 1e3)
                if event['response_id'] != self.response:
                    self.response = event['response_id']
                    start_sec = self.tick * TICK_SEC
                    self.heard.turns.append(dict(role='assistant', start_sec=start_sec, text='',
                                                 end_sec=start_sec + TICK_SEC))
                if event['due_ms'] // self.chunk_ms != self.n_chunk:
                    self.n_chunk = event['due_ms'] // self.chunk_ms
                    self.heard.late_ms.append((now, late_ms))
                continue
            self.heard.events.append(event | dict(at_sec=now))
            if kind == 'response.done':
                self.player.is_open = False
            elif kind == 'response.audio_transcript.done' and event['response_id'] == self.response:
                self.heard.turns[-1]['text'] = event['transcript']
            elif kind == 'output_audio_buffer.cleared':
                self.player.drop()
            elif kind == 'nanoduplex.behind':
                dropped = self.heard.dropped_ms
                dropped[event['where']] = dropped.get(event['where'], 0) + event['dropped_ms']


def talk_all(waits_sec, *user):
    """Users alike, who begin so long from now -> [Heard]"""
    async def after(sec):
        await asyncio.sleep(sec)
        return await User(*user).talk()

    async def together():
        return await asyncio.gather(*map(after, waits_sec))
    return asyncio.run(together())


def drift_ms(late_ms):
    """How much later parts came in the last third than in the first, medians; None of too few."""
    n = len(late_ms) // 3
    lates = [late for _, late in late_ms]
    return float(np.median(lates[-n:]) - np.median(lates[:n])) if n else None
