"""
A live conversation: what is sent is as long as what was heard, an interruption is heard at once, talkers do
not disturb each other, and whatever is wrong is refused in a sentence.

Most use a model that is a rule: it answers when the user falls silent, and yields when the user speaks.
"""
import asyncio
import base64
import io
import json
import os
import pathlib
import re
import shutil
import socket
import tempfile
import zipfile
from contextlib import asynccontextmanager

import numpy as np
import pytest

from flatten import get_layout
from live.talker import Talker, check, speaking_lag, talk_on
from table import Seat, Table

aiohttp = pytest.importorskip('aiohttp')
soundfile = pytest.importorskip('soundfile')

import config  # noqa: E402
import talk  # noqa: E402
from checkpoint import load_checkpoint  # noqa: E402
from data.made_up import hum, make_vocabulary  # noqa: E402
from decode import Sampling  # noqa: E402
from live import browser, questions  # noqa: E402
from live import server as live_server  # noqa: E402
from live.replay import Player, User, drift_ms  # noqa: E402
from live.save import write_conversation, zip_conversation  # noqa: E402
from live.server import Server, Session  # noqa: E402
from measures import talks  # noqa: E402

HOP, LAG = 640, 100             # samples a frame, samples that the speaker keeps back
VOCAB = make_vocabulary(400, 8)
ANSWER = 'It is 5.'


class Tone:
    """A codec of two sounds: code 1 is loud, 0 is silence."""
    name, rate_hz, sample_rate, silence_codes = 'tone', 25.0, 16000, np.array([0], np.uint16)

    def stream(self):
        return ToneStream()

    def encode(self, wave):
        return self.stream().push(wave)

    def speak(self):
        return ToneSpeaker()


class ToneStream:
    def __init__(self):
        self.rest = np.zeros(0, np.float32)

    def push(self, samples):
        self.rest = np.concatenate([self.rest, samples])
        n = len(self.rest) // HOP
        frames, self.rest = self.rest[:n * HOP].reshape(n, HOP), self.rest[n * HOP:]
        return (np.abs(frames).max(1, initial=0) > 0.05).astype(np.uint16)

    def missing(self, n):
        return n * HOP - len(self.rest)


class ToneSpeaker:
    """Gives samples LAG later than their codes, as one with windows does."""
    def __init__(self):
        self.n_said = self.n_given = 0

    def push(self, codes, keeps=LAG):
        self.n_said += HOP * len(codes)
        n, self.n_given = self.n_said - keeps - self.n_given, self.n_said - keeps
        return np.full(n, 0.5, np.float32) * np.sin(np.arange(n) / 5, dtype=np.float32)

    def finish(self):
        return self.push([], 0)


class Rules:
    """In place of a Table: a rule on each seat."""
    def __init__(self, *rules):
        self.layout, self.seats = get_layout('duplex3'), [*rules]
        for row, rule in enumerate(rules):
            rule.row = row

    def step(self, seats, chunks, on_frame):
        said = []
        for i, (rule, codes) in enumerate(zip(seats, chunks)):
            text, speech = rule.choose(codes[None])
            for code in speech[0]:
                on_frame(i, code[None])
            said.append((text[0], speech[0]))
        return [np.stack(each) for each in zip(*said)]


class Rule:
    """In place of a Seat: answers with n_frame frames as soon as the user falls silent; when the user speaks
    again, it falls silent after 7 more."""
    def __init__(self, n_frame=50):
        self.layout, self.vocab, self.n_frame = get_layout('duplex3'), VOCAB, n_frame
        self.reset()

    def reset(self, prompt=''):
        self.has_heard, self.left = False, 0

    def choose(self, codes):
        speech, text = np.full((1, 10), -1), np.full((1, 2), VOCAB.control['<|silent_text|>'])
        for i, code in enumerate(codes[0]):
            if code:
                self.has_heard, self.left = True, min(self.left, 7)
            elif self.has_heard:
                self.has_heard, self.left = False, self.n_frame
                self.to_write = VOCAB.encode(ANSWER)
            if self.left:
                speech[0, i] = 1
                self.left -= 1
        if self.left and self.to_write:
            ids, self.to_write = self.to_write[:2], self.to_write[2:]
            text[0, :len(ids)] = ids
        return text, speech


def sound(n_sec):
    return hum(200, n_sec).clip(-.5, .5) + 0.3 * np.sin(np.arange(int(16000 * n_sec)) / 9).astype(np.float32)


def silence(n_sec):
    return np.zeros(round(16000 * n_sec), np.float32)


def tell(talker, wave, n=320):
    """The user says wave, n samples at a time -> all events"""
    heard_before = len(talker.events)
    for part in np.split(wave, range(n, len(wave), n)):
        talker.push(part)
        while talker.has_work():
            work(talker)
    return talker.events[heard_before:]


def work(*talkers):
    def on_error(talker, error):
        raise error
    seat = talkers[0].seat
    talk_on(seat.table if isinstance(seat, Seat) else Rules(seat), talkers, on_error)


def make_talker(seat, codec=None, lag=LAG, rate=16000):
    """It keeps its events."""
    events = []
    talker = Talker(seat, codec or Tone(), lag, rate, lambda *new: events.extend(new))
    talker.events = events
    return talker


def decoded(events):
    pcm = b''.join(base64.b64decode(e['delta']) for e in events if e['type'] == 'response.audio.delta')
    return np.frombuffer(pcm, '<i2') / 32768


def kinds(events):
    return [event['type'] for event in events]


# ---- one talker

def test_an_answer_is_as_long_as_it_was_written_and_in_its_place():
    """
    The user ends at 1 s, frame 25: the answer begins there, in the chunk from frame 20 on, so 5 frames of
    silence and what the speaker keeps back come before it. 50 frames follow, up to frame 75, and 10 of
    silence, as it may go on.
    """
    talker = make_talker(Rule(), lag=speaking_lag(Tone()))
    assert talker.lag == LAG
    events = tell(talker, np.concatenate([sound(1), silence(4)]))
    heard = decoded(events)
    assert len(heard) == 5 * HOP + LAG + 50 * HOP + 10 * HOP
    first, *_, last = np.flatnonzero(heard)
    assert first == 5 * HOP + LAG + 1 and 55 * HOP + LAG - 20 < last < 55 * HOP + LAG
    parts = [event for event in events if event['type'] == 'response.audio.delta']
    # played one after the other, each begins when it is due: the first with its chunk, at 1.2 s, the others
    # 40 ms apart
    due_ms = [1200, *range(1200 + 6 * 40, 1200 + 56 * 40, 40)]
    assert [part['due_ms'] for part in parts[:51]] == due_ms
    sizes = [len(base64.b64decode(part['delta'])) // 2 for part in parts]
    assert sizes[:-10] == [6 * HOP] + [HOP] * 49
    assert ''.join(event['delta'] for event in events if 'transcript.delta' in event['type']) == ANSWER
    started, stopped = (next(e for e in events if e['type'] == f'input_audio_buffer.speech_{what}')
                        for what in ('started', 'stopped'))
    assert started['audio_start_ms'] == 0 and stopped['audio_end_ms'] == 1000
    done = events[kinds(events).index('response.done')]
    assert done['response']['status'] == 'completed' and 'output_audio_buffer.cleared' not in kinds(events)


def test_an_interruption_is_flushed():
    """
    The user begins again at 2.2 s, frame 55, and the assistant falls silent in frame 62, in the next chunk.
    What was sent and not played yet, two frames of that chunk among it, is to be dropped.
    """
    talker = make_talker(Rule(100))
    events = tell(talker, np.concatenate([sound(1), silence(1.2), sound(1), silence(1)]))
    at = kinds(events).index('output_audio_buffer.cleared')
    before = decoded(events[:at])
    assert events[at]['n_sent'] == len(before) == (5 + 62 - 25) * HOP
    done = kinds(events).index('response.done')
    assert events[done]['response']['status'] == 'cancelled'
    assert 'response.audio.delta' not in kinds(events[at:done])
    assert 'response.created' in kinds(events[done:])       # and the new question is answered


def test_who_began_before_the_answer_does_not_interrupt_it():
    """The answer of 4 frames begins and ends while the end of the question still counts as speech."""
    talker = make_talker(Rule(4))
    events = tell(talker, np.concatenate([sound(1), silence(2)]))
    assert len(decoded(events)) == (5 + 4 + 10) * HOP + LAG
    assert 'output_audio_buffer.cleared' not in kinds(events)


class Deaf(Rule):
    """Its answer to the first second goes on whatever the user says, and ends in frame 25 + n_frame."""
    def choose(self, codes):
        self.n_heard = getattr(self, 'n_heard', 0) + len(codes[0])
        return super().choose(codes if self.n_heard <= 30 else np.zeros_like(codes))


@pytest.mark.parametrize('start_sec, n_sec, is_interrupted', [
    (2.56, 0.4, False),     # "mhm", over 4 frames before the chunk's end at 3.2 s, in which the answer ends …
    (2.48, 0.4, False),     # … and known to be over
    (2.88, 1.2, False),     # a question that begins 0.12 s before the answer ends
    (2.48, 1.2, True)])
def test_who_says_mhm_before_an_answer_ends_does_not_interrupt_it(start_sec, n_sec, is_interrupted):
    """The answer ends by itself at 3 s, frame 75: nothing of it may be lost, or be called an interruption."""
    talker = make_talker(Deaf())
    events = tell(talker, np.concatenate([sound(1), silence(start_sec - 1), sound(n_sec), silence(2)]))
    assert ('output_audio_buffer.cleared' in kinds(events)) == is_interrupted
    done = events[kinds(events).index('response.done')]
    assert done['response']['status'] == ('cancelled' if is_interrupted else 'completed')
    assert len(decoded(events)) >= 55 * HOP or is_interrupted


def test_a_short_gap_ends_no_answer():
    """Silent in its frames 20 to 27: one response, as long as before, and silent there."""
    class Halting(Rule):
        def choose(self, codes):
            text, speech = super().choose(codes)
            self.n_said = getattr(self, 'n_said', 0)
            for i in np.flatnonzero(speech[0] >= 0):
                if 20 <= self.n_said < 28:
                    speech[0, i] = -1
                self.n_said += 1
            return text, speech

    talker = make_talker(Halting())
    events = tell(talker, np.concatenate([sound(1), silence(4)]))
    heard = decoded(events)
    assert kinds(events).count('response.done') == 1 and len(heard) == 65 * HOP + LAG
    gap = slice(25 * HOP + LAG, 33 * HOP + LAG)
    assert not heard[gap].any()
    assert heard[gap.stop:gap.stop + 20].any() and heard[gap.start - 20:gap.start].any()


def test_a_client_cancels():
    talker = make_talker(Rule(100))
    tell(talker, np.concatenate([sound(1), silence(1)]))
    talker.wants_cancel = True
    events = tell(talker, silence(5))
    assert kinds(events)[0] == 'output_audio_buffer.cleared' and not len(decoded(events))
    assert kinds(events).count('output_audio_buffer.cleared') == 1
    assert events[-1]['response']['status'] == 'cancelled'


def test_rates_are_converted():
    """At 24 kHz the answer is as long in seconds, to a resampler's 20 ms."""
    talker = make_talker(Rule(), rate=24000)
    t = np.arange(24000) / 24000
    wave = np.concatenate([0.4 * np.sin(2 * np.pi * 300 * t), np.zeros(4 * 24000)]).astype(np.float32)
    heard = decoded(tell(talker, wave, 480))
    assert len(heard) / 24000 == pytest.approx((65 * HOP + LAG) / 16000, abs=0.06)


def test_work_to_do():
    """There is some when a frame was heard, and the model's when a chunk was."""
    talker = make_talker(Rule())
    for n in range(1, 11):
        talker.push(silence(639 / 16000))
        assert not talker.has_work()
        talker.push(silence(1 / 16000))
        assert talker.has_work() and talker.is_due() == (n == 10)
        assert (talker.listen() is None) == (n < 10)


def test_what_waits_too_long_is_dropped():
    """Of 5 s at once, in parts of 0.1 s, the newest second and a chunk stay; the client is told, and times
    go on."""
    talker = make_talker(Rule())
    for _ in range(50):
        talker.push(np.concatenate([silence(0.05), sound(0.05)]))
    assert talker.n_waiting == 16000 + 6400
    while talker.has_work():
        work(talker)
    events = talker.events
    assert events[0] == dict(type='nanoduplex.behind', where='model', dropped_ms=3600)
    started = next(event for event in events if event['type'] == 'input_audio_buffer.speech_started')
    assert 3600 <= started['audio_start_ms'] < 3800


def test_who_cannot_be_talked_to():
    with pytest.raises(ValueError, match='half_duplex cannot listen and talk at once'):
        check(get_layout('half_duplex'))
    check(get_layout('duplex3'))


# ---- the model

@pytest.mark.parametrize('later', [0, 4800, 6400])
def test_talkers_side_by_side_are_as_each_alone(small_run, later):
    """Two conversations over the same weights, one of which begins 0, 0.3 or 0.4 s later, give what each
    gives by itself; and so does one that begins where another ended."""
    import torch
    model, vocab, codec, info = checkpoint = load_checkpoint(str(small_run[1]))
    waves = [np.concatenate([hum(pitch, 1.0), silence(1.5)] * 2) for pitch in (100, 300, 200)]
    table = Table(model, vocab, checkpoint.layout, 3, dtype=torch.float32, sampling=Sampling(1.0, 1.0))
    alone = []
    for wave in waves:
        table.seats[0].reset()
        alone.append(tell(make_talker(table.seats[0], codec, 0), wave, 3200))
    beside = [make_talker(seat, codec, 0) for seat in table.seats[:0:-1]]       # seats 2 and 1
    for at in range(0, len(waves[0]) + later, 3200):
        for talker, wave, first in zip(beside, waves, (0, later)):
            talker.push(wave[max(at - first, 0):max(at - first + 3200, 0)])
        while any(talker.has_work() for talker in beside):
            work(*(talker for talker in beside if talker.has_work()))
    for talker, events in zip(beside, alone):
        assert talker.events == events and 'response.audio.delta' in kinds(events)
    table.seats[2].reset()
    assert tell(make_talker(table.seats[2], codec, 0), waves[2], 3200) == alone[2]


# ---- the server

@asynccontextmanager
async def serving(rules=None, codec=None, **settings):
    """-> (the server, its address)"""
    settings.setdefault('speed', 1000.0)
    server = Server('rule', Rules(*(rules or [Rule(), Rule()])), codec or Tone(), **settings)
    async with server.listening('127.0.0.1', 0) as port:
        yield server, f'http://127.0.0.1:{port}'


class Client:
    def __init__(self, ws):
        self.ws = ws

    async def until(self, *wanted):
        """-> the first event of one of these types, after the others"""
        while True:
            message = await asyncio.wait_for(self.ws.receive(), 10)
            assert message.type == aiohttp.WSMsgType.TEXT, (message.type, self.ws.close_code, message.extra)
            event = json.loads(message.data)
            if event['type'] in wanted:
                return event

    async def say(self, wave):
        pcm = (wave * 32767).astype('<i2').tobytes()
        await self.ws.send_json(dict(type='input_audio_buffer.append', audio=base64.b64encode(pcm).decode()))

    async def ask(self, until='response.done', rate=16000):
        for part in np.split(np.concatenate([sound(0.6), silence(3)]), 36):
            await self.say(part)
            await asyncio.sleep(0.002)
        return await self.until(until)

    async def closed(self):
        """-> (code, reason)"""
        while True:
            message = await asyncio.wait_for(self.ws.receive(), 10)
            if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                return self.ws.close_code, message.extra


@asynccontextmanager
async def client(url, is_seated=True, **options):
    async with aiohttp.ClientSession() as http, http.ws_connect(url + '/v1/realtime', **options) as ws:
        one = Client(ws)
        if is_seated:
            await one.until('session.created')
            await ws.send_json(dict(type='session.update', session=dict(input_sample_rate=16000)))
            await one.until('session.updated')
        yield one


def test_protocol():
    async def run():
        async with serving() as (server, url), client(url) as one:
            created = await one.ask('response.created')
            first = await one.until('response.audio.delta')
            assert first['response_id'] == created['response']['id'] and first['event_id']
            done = await one.until('response.audio_transcript.done')
            assert done['transcript'] == ANSWER
            assert (await one.until('response.done'))['response']['status'] == 'completed'
            await one.ws.send_json(dict(type='input_audio_buffer.commit'))
            await one.until('input_audio_buffer.committed')

        # a client of OpenAI's newer kind
        async with serving() as (server, url), client(url) as one:
            await one.ws.send_json(dict(type='session.update', session=dict(
                type='realtime', audio=dict(input=dict(format=dict(type='audio/pcm', rate=16000))))))
            session = (await one.until('session.updated'))['session']
            assert session['audio']['output']['format']['rate'] == 16000
            await one.ask('response.output_audio.delta')
            done = await one.until('response.output_audio_transcript.done')
            assert done['transcript'] == ANSWER
    asyncio.run(run())


def append(audio):
    return json.dumps(dict(type='input_audio_buffer.append', audio=audio))


def update(**session):
    return json.dumps(dict(type='session.update', session=session))


WRONG = [
    ('not json', 'the message is no JSON'), ('[' * 100000, 'the message is no JSON'),
    ('[1]', 'unknown event'), ('{"type": "dance"}', "unknown event 'dance'"), ('{"type": {}}', 'unknown'),
    (append('AAA'), '"audio" is no base64'), (append('Hello, how are you?'), '"audio" is no base64'),
    (append('QUJD'), 'half a sample'), (append(None), 'needs "audio"'), (append([1]), 'needs "audio"'),
    (update(input_sample_rate=1), 'the rate has'), (update(input_sample_rate='x'), 'the rate has'),
    (update(input_audio_format='g711_ulaw'), 'has to be pcm16'), (update(instructions=7), 'instructions'),
    (update(audio=[1], instructions='x' * 10001), 'instructions'),
    ('{"type": "session.update", "session": 1}', 'an object'), (b'\0\0', 'binary frames are not read')]


def test_what_is_wrong_is_refused_and_others_are_not_disturbed():
    """Each wrong message gets a sentence, and the conversation goes on; after MAX_FAULTS it ends. Beside it
    another talks, and hears exactly what it hears alone."""
    async def run():
        async with serving() as (server, url), client(url) as good, client(url) as bad:
            asking = asyncio.create_task(good.ask())
            for message, sentence in WRONG:
                await (bad.ws.send_bytes if isinstance(message, bytes) else bad.ws.send_str)(message)
                error = (await bad.until('error'))['error']
                assert sentence in error['message'], f'{str(message)[:60]}: {error}'
                assert error['type'] == 'invalid_request_error' and '\n' not in error['message']
            assert (await asking)['response']['status'] == 'completed'
            await bad.ask()         # it may still talk
            for _ in range(live_server.MAX_FAULTS - len(WRONG)):
                await bad.ws.send_str('x')
            code, reason = await bad.closed()
            assert code == 1008 and 'messages were wrong' in reason
            assert (await good.ask())['response']['status'] == 'completed'
    asyncio.run(run())


def test_too_large_and_too_fast():
    async def run():
        async with serving(speed=1.0) as (server, url), client(url) as good:
            async with client(url) as bad:
                try:        # 100 MB: the server does not read them to the end
                    await bad.ws.send_str(append('A' * 100_000_000))
                except (ConnectionError, RuntimeError):
                    pass
                code, reason = await bad.closed()
                assert code in (1009, 1006) and (code == 1006 or 'a frame may have' in reason)
            async with client(url) as bad:
                for _ in range(24):
                    await bad.say(silence(0.5))
                code, reason = await bad.closed()
                assert code == 1008 and 'ahead of real time' in reason
            await good.say(sound(0.1))
            for _ in range(100):        # what is closed leaves a moment later
                if len(server.sessions) == 1:
                    break
                await asyncio.sleep(0.05)
            assert len(server.sessions) == 1
    asyncio.run(run())


async def get(url, **headers):
    async with aiohttp.ClientSession() as http, http.get(url, headers=headers) as answer:
        return answer.status, await answer.text()


def test_who_may_come_in():
    async def run():
        async with serving() as (server, url):
            status, page = await get(url)
            assert status == 200 and '</html>' in page
            for path in ('/', '/v1/realtime'):
                status, text = await get(url + path, Origin='https://evil.example')
                assert status == 403
                assert text == 'the page of https://evil.example may not talk to this model\n'
                # another site's name that was given our address
                status, text = await get(url + path, Host='evil.example', Origin='http://evil.example')
                assert status == 403 and 'only localhost' in text
            async with client(url, origin=url):
                pass
        async with serving(token='abc') as (server, url):
            for address in (url, url + '/?token=x', url + '/?token=ä', url + '/v1/realtime'):
                status, text = await get(address)
                assert status == 403 and 'token is missing or wrong' in text
            assert (await get(url + '/?token=abc'))[0] == 200
            async with client(url, headers=dict(Authorization='Bearer abc')):
                pass
    asyncio.run(run())


def test_more_wait_in_line_and_others_are_refused(monkeypatch):
    async def run():
        async with serving([Rule()], max_waiting=2) as (server, url), client(url, False) as third:
            async with client(url, False) as second, client(url, False) as last:
                await third.until('session.created')
                assert (await second.until('nanoduplex.queued'))['place'] == 1
                assert (await last.until('nanoduplex.queued'))['place'] == 2
                status, text = await get(url + '/v1/realtime')
                assert status == 503 and '1 talk and 2 wait' in text
                await third.ws.close()
                await second.until('session.created')
                assert (await last.until('nanoduplex.queued'))['place'] == 1
                await second.ws.close()
                await last.until('session.created')
                await last.ws.send_str(update(input_sample_rate=16000))
                await last.ask()        # and the place is as new
        # more connections than there may be, all in use: the next are told so
        monkeypatch.setattr(live_server, 'MAX_CONNECTIONS', 2)
        async with serving() as (server, url), client(url) as one, client(url):
            status, text = await get(url)
            assert status == 503 and text == '2 are connected: come back later\n'
            assert (await one.ask())['response']['status'] == 'completed'
    asyncio.run(run())


def test_who_calls_and_says_nothing(monkeypatch):
    """A thousand connections that never send a request, or send it letter by letter: they are told, after
    ASK_SEC or as soon as others need their places. Who talks goes on, and whoever comes is served."""
    monkeypatch.setattr(live_server, 'MAX_CONNECTIONS', 20)
    monkeypatch.setattr(live_server, 'ASK_SEC', 0.5)

    async def run():
        async with serving() as (server, url), client(url) as one:
            asking = asyncio.create_task(one.ask())
            address = '127.0.0.1', int(url.rpartition(':')[2])
            callers = [await asyncio.open_connection(*address) for _ in range(1000)]

            async def drip():
                for letter in b'GET / HTTP/1.1\r\nX: ' + b'x' * 200:
                    for _, writer in callers[-10:]:
                        writer.write(bytes([letter]))
                    await asyncio.sleep(0.02)
            dripping = asyncio.create_task(drip())
            assert (await get(url))[0] == 200
            async with client(url) as two:
                assert (await two.ask())['response']['status'] == 'completed'
            assert (await asking)['response']['status'] == 'completed'
            answers = await asyncio.wait_for(asyncio.gather(
                *(reader.read(200) for reader, _ in callers), return_exceptions=True), 20)
            dripping.cancel()
            for text in answers[:-10]:
                assert b'408' in text and text.endswith(b'no request came in time\n')
            # whose letters were still on their way may see a reset instead
            assert all(isinstance(text, ConnectionError) or b'408' in text for text in answers[-10:])
            assert not server.silent
            for _, writer in callers:
                writer.close()
    asyncio.run(run())


class Stuck:
    """A socket whose other end never reads."""
    closed = False

    async def send_str(self, text):
        await asyncio.sleep(60)


def test_who_never_reads_is_dropped_and_nothing_piles_up(monkeypatch):
    monkeypatch.setattr(live_server, 'READ_SEC', 0.05)
    aborted = []

    class Transport:
        def abort(self):
            aborted.append(True)

    async def run():
        server = Server('rule', Rules(Rule()), Tone())
        session = Session(server, Stuck(), Transport())
        delta = base64.b64encode(bytes(24000 * 2 // 10)).decode()        # 0.1 s
        session.send(*(dict(type='response.audio.delta', delta=delta, n=i) for i in range(100)))
        assert [event['n'] for event, _ in session.unsent][0] == 80     # the newest two seconds
        assert session.n_dropped_sec == pytest.approx(8.0)
        await session.keep_sending()
        assert aborted == [True]
        session.send(*(dict(type='a.b') for _ in range(live_server.MAX_UNSENT + 1)))
        assert aborted == [True, True]
    asyncio.run(run())


def test_a_fault_in_one_conversation_ends_that_one(capfd):
    class Broken(Rule):
        def choose(self, codes):
            raise RuntimeError('out of memory')

    async def run():
        async with serving([Broken(), Rule()]) as (server, url), client(url) as bad, client(url) as good:
            await bad.say(silence(0.5))
            error = (await bad.until('error'))['error']
            assert error['type'] == 'server_error'
            assert (await bad.closed())[1] == 'the model failed'
            assert (await good.ask())['response']['status'] == 'completed'
    asyncio.run(run())
    assert 'out of memory' in capfd.readouterr().err


# ---- at the user's end

def test_player():
    """
    The first part waits for 20 ms; parts follow each other; running dry is a glitch, and what is dropped is
    not heard. An answer waits for as much as the latest of the last parts was later than its first, and 10.
    """
    player = Player(1000)
    player.add(np.ones(100), 0.1)
    assert np.flatnonzero(player.take(200))[[0, -1]].tolist() == [20, 119]
    assert player.n_glitch == 1
    player.add(np.ones(50), 0.13)
    player.add(np.ones(50), 0.1)
    heard = player.take(110)
    assert heard[:10].sum() == 0 and heard[10:].sum() == 100 and player.n_glitch == 1
    player.add(np.ones(100), 0.1)       # in time: no wait
    assert player.take(10).sum() == 10
    assert player.drop() == 90 and player.take(10).sum() == 0 and player.n_glitch == 1
    player.add(np.ones(100), 0.1)
    assert np.flatnonzero(player.take(100))[0] == 40


def test_drift():
    assert drift_ms([(i, 100.0 + i) for i in range(9)]) == 6.0 and drift_ms([(0, 1.0)]) is None


@pytest.mark.slow
@pytest.mark.alone
def test_replay_measures_at_the_ear(tmp_path):
    """
    The user ends at 1 s; that chunk ends at 1.2 s, so the answer is heard at 1.2 s + its 5 frames, which is
    400 ms after the end, + what waits: 6 ms in the speaker, 10 ms for the microphone, 20 ms for jitter. The
    interruption at 3.2 s, frame 80, is at the start of a chunk that ends at 3.6 s: silence 400 ms later.
    """
    wave = np.concatenate([sound(1), silence(2.2), sound(1), silence(1.8)])

    async def run():
        async with serving([Rule(100)], speed=2.0) as (server, url):
            return await User(url + '/v1/realtime', wave, 16000, speed=2.0).talk()
    heard = asyncio.run(run())
    times = write_conversation(str(tmp_path), 'one', heard.wave, 16000, heard.turns, 'One', Tone())
    response, *_ = times['response_ms']
    assert 410 <= response <= 900 and 380 <= times['yield_ms'][0] <= 900, times
    assert heard.turns[0]['text'] == ANSWER and not heard.dropped_ms
    assert {'one.wav', 'one.jsonl', 'report.html'} == {file.name for file in tmp_path.iterdir()}
    rows = [json.loads(line) for line in (tmp_path / 'one.jsonl').read_text().splitlines()]
    assert [row['role'] for row in rows][:2] == ['user', 'assistant'] and rows[1]['text'] == ANSWER


def test_saving():
    file = io.BytesIO()
    soundfile.write(file, np.stack([sound(1), silence(1)], 1), 16000, format='WAV', subtype='PCM_16')
    turns = json.dumps([dict(start_sec=0.2, end_sec=0.5, text='<b>')])
    names = zipfile.ZipFile(io.BytesIO(zip_conversation(file.getvalue(), turns, 'demo', Tone()))).namelist()
    assert [name.rpartition('.')[2] for name in names] == ['html', 'jsonl', 'wav']
    mono = io.BytesIO()
    soundfile.write(mono, silence(1), 16000, format='FLAC')
    for wav, rows, sentence in ((b'', turns, 'no wav'), (b'RIFF' * 99, turns, 'no wav'),
                                (mono.getvalue(), turns, 'FLAC PCM_16 of 1 channels'),
                                (file.getvalue(), 'x', '"turns" has to be JSON'),
                                (file.getvalue(), '[{"start_sec": 1}]', '"turns" has to be JSON'),
                                (file.getvalue(), json.dumps([dict(start_sec=0, end_sec=9, text='')]),
                                 'the audio beside it at')):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            zip_conversation(wav, rows, 'demo', Tone())

    async def run():
        async with serving() as (server, url), client(url) as one, aiohttp.ClientSession() as http:
            async def save(id, content):
                form = aiohttp.FormData(dict(turns='[]'))
                form.add_field('wav', content, filename='talk.wav')
                async with http.post(f'{url}/save?session={id}', data=form) as answer:
                    return answer.status, await answer.read()
            assert (await save('x', file.getvalue()))[0] == 403
            id = server.sessions[0].id
            status, content = await save(id, file.getvalue())
            assert status == 200 and len(zipfile.ZipFile(io.BytesIO(content)).namelist()) == 3
            assert await save(id, b'x') == (400, b'the recording is no wav\n')
            await one.ask()
    asyncio.run(run())


def test_command(small_run, tmp_path, capsys):
    """python talk.py --user=…, with a model of a few seconds' training"""
    soundfile.write(tmp_path / 'user.wav', np.concatenate([hum(140, 1.0), silence(0.5)]), 16000)
    cfg = config.load(talk.Config, [
        f'--checkpoint={small_run[1]}', f'--user={tmp_path}/user.wav', f'--out={tmp_path}/out',
        '--n_user=2', '--reply_sec=1', '--speed=3', '--device=cpu'])
    one, two = talk.main(cfg)
    assert len(one.wave) == len(two.wave) == 2.5 * 16000
    assert 'question to first sound' in capsys.readouterr().out
    assert (tmp_path / 'out' / 'user-2' / 'report.html').exists()
    figures = talks.read(str(tmp_path / 'out' / 'user.json'))
    assert (figures['n_user'], figures['sec'], figures['chunk_ms']) == (2, 2.5, 400)


def test_figures_of_all_talkers():
    """Of lists the median and more, of drift the largest, of counts the sum; and a row of the table."""
    def talk_of(response_ms, drift_ms, n_glitch):
        return dict(response_ms=response_ms, yield_ms=[], late_ms=[100.0], drift_ms=drift_ms, n_turn=4,
                    n_glitch=n_glitch, dropped_ms=0, n_false_start=1)
    figures = talks.summarise([talk_of([600, 700], 3.0, 0), talk_of([800], -9.0, 2), talk_of([], None, 0)])
    assert figures['response_ms'] == dict(median=700, p90=780, max=800, n=3) and not figures['yield_ms']
    assert (figures['drift_ms'], figures['n_glitch'], figures['n_turn']) == (-9.0, 2, 12)
    row = talks.table([dict(n_user=3, sec=600, **figures)]).splitlines()[-1]
    assert row == '| 3, 600 s | 700 ms | 780 ms | - | - | 100, 100 ms | -9 ms | 2 | 3 of 12 | 0 ms |'


def test_a_user_of_minutes():
    """Questions in turn, and silence; some follow so soon that they interrupt; the last is answered, too."""
    one, two = np.full(16000, 0.1, np.float32), np.full(24000, 0.2, np.float32)
    wave = questions.string([one, two], 60, np.random.default_rng(1))
    edges = np.flatnonzero(np.diff(wave, prepend=0))
    starts, ends = edges[::2], edges[1::2]
    assert len(wave) == 60 * 16000 and {*(ends - starts).tolist()} == {16000, 24000}
    gaps_sec = (starts[1:] - ends[:-1]) / 16000
    assert (gaps_sec < 1).any() and (gaps_sec > 2).any() and len(wave) - ends[-1] > 2.5 * 16000
    with pytest.raises(ValueError, match='2 s hold no question'):
        questions.string([one], 2, np.random.default_rng(1))


def test_settings_that_do_not_go_together(monkeypatch):
    for argument, sentence in (
            ('--cert=a', 'cert and key go together'), ('--speed=0', 'speed has to be above'),
            ('--n_user=5', 'talk at once'), ('--max_talkers=0', 'at least 1'), ('--dtype=half', 'known are'),
            ('--browser=true', 'plays --user=FILE')):
        with pytest.raises(SystemExit, match=sentence):
            config.load(talk.Config, [argument])
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        cfg = talk.Config(port=taken.getsockname()[1])
        with pytest.raises(ValueError, match='cannot serve on 127.0.0.1'):
            asyncio.run(talk.serve(cfg, Server('rule', Rules(Rule()), Tone())))
    monkeypatch.setattr(browser, 'CHROMIUM', None)
    with pytest.raises(ValueError, match='takes Chromium and playwright'):
        asyncio.run(browser.hear('http://localhost', np.zeros(16000, np.float32), 16000))
    cfg = talk.Config(cert='/nowhere', key='/nowhere')
    with pytest.raises(ValueError, match='no certificate and its key'):
        asyncio.run(talk.serve(cfg, Server('rule', Rules(Rule()), Tone())))


# ---- in a browser

FIREFOX = shutil.which('firefox-esr') or shutil.which('firefox')


def ask_and_interrupt(folder):
    """-> a microphone's recording: somebody asks, and speaks again into the answer"""
    wave = np.concatenate([silence(2), sound(1), silence(2.2), sound(1.2), silence(20)])
    soundfile.write(folder / 'microphone.wav', wave, 16000, subtype='PCM_16')
    return folder / 'microphone.wav'


# what the microphone hears: a tenth of what the ear heard 90 ms before; somebody else
ECHO = '''
    const burst = i => .1 * Math.abs(Math.sin(i / 17) * Math.sin(i / 5));
    const ear = Array.from({length: 300}, (_, i) => burst(i)), noise = i => .001 * (i * 7919 % 13) / 13;
    [ear.map((_, i) => .1 * burst(i - 9) + noise(i)), ear.map((_, i) => burst(i * 1.7 + 40) + noise(i))]
        .map(mic => hears_itself({levels: {mic, ear}}))'''


@pytest.mark.slow
@pytest.mark.alone
def test_in_a_browser(tmp_path):
    """
    The page is opened, asked, answers, is interrupted, and the conversation is saved; the times in the saved
    wav are those at the ear. Dark and on a phone's screen it fits, and a keyboard is enough.
    """
    pytest.importorskip('playwright')
    if not browser.CHROMIUM:
        pytest.skip('no Chromium here')
    microphone = ask_and_interrupt(tmp_path)
    troubles = []

    async def run():
        phone = dict(color_scheme='dark', viewport=dict(width=390, height=844))
        async with (serving([Rule(100)], speed=1.0) as (server, url),
                    browser.opened(microphone, **phone) as page):
            page.on('pageerror', lambda error: troubles.append(str(error)))
            page.on('console', lambda m: troubles.append(m.text) if m.type in ('error', 'warning') else None)
            await page.goto(url)
            assert await page.evaluate(ECHO) == [True, False]
            await page.keyboard.press('t')
            await page.wait_for_function('talk && talk.yields.length && talk.responses.length > 1')
            await page.wait_for_function('document.getElementById("who").textContent === "Nobody speaks."')
            assert await page.evaluate('document.documentElement.scrollWidth') <= 390
            said = await page.inner_text('#said')
            assert ANSWER in said and 'interrupts, silence after' in said and 'after' in said
            assert not await page.inner_text('#warning')
            await page.screenshot(path=str(tmp_path / 'talk.png'))
            wave, rate, turns = await browser.save(page)
            shown = await page.evaluate('[talk.responses, talk.yields, talk.n_glitch]')
            await page.keyboard.press('t')
            assert await page.inner_text('#talk') == 'Talk'
            return write_conversation(str(tmp_path), 'again', wave, rate, turns, 'Again', server.codec), shown
    times, ((first, *_), (yielded, *_), n_glitch) = asyncio.run(run())
    assert not troubles and n_glitch == 0
    # the user falls silent inside a chunk: its rest, and 400 ms as written, and what waits
    assert 400 <= times['response_ms'][0] <= 900 and times['yield_ms'][0] <= 900, times
    assert abs(first - times['response_ms'][0]) < 100 and abs(yielded - times['yield_ms'][0]) < 100


@pytest.mark.slow
@pytest.mark.alone
def test_a_browser_is_measured(tmp_path):
    pytest.importorskip('playwright')
    if not browser.CHROMIUM:
        pytest.skip('no Chromium here')

    wave, rate = soundfile.read(ask_and_interrupt(tmp_path), dtype='float32')

    async def run():
        async with serving([Rule(100)], speed=1.0) as (server, url):
            return server, await browser.hear(url, wave[:12 * rate], rate)
    server, heard = asyncio.run(run())
    talk.tell(talk.Config(user='asked.wav', out=str(tmp_path / 'out')), server, [heard])
    figures = talks.read(str(tmp_path / 'out' / 'asked.json'))
    assert figures['response_ms']['n'] == 2 and figures['yield_ms']['n'] == 1 and not figures['dropped_ms']
    # by the page's clock of 10 ms; a part that comes sooner than it was spoken would be a wrong clock
    assert heard.late_ms and all(-1 < late < 800 for _, late in heard.late_ms), heard.late_ms
    assert figures['n_glitch'] == 0
    assert talks.talk_row(figures)['talkers, time'].startswith('1, 12 s, Chromium '), figures


# an oscillator in place of the microphone: 1 s of sound after 2 s, and 1.2 s more from 5.2 s on
OSCILLATOR = '''() => {
    if (location.protocol === 'about:') return;
    navigator.mediaDevices.getUserMedia = async () => {
        const context = new AudioContext(), tone = context.createOscillator(), gain = context.createGain();
        const microphone = context.createMediaStreamDestination(), now = context.currentTime;
        tone.connect(gain).connect(microphone);
        tone.start();
        gain.gain.value = 0;
        for (const [sec, level] of [[2, .5], [3, 0], [5.2, .5], [6.4, 0]])
            gain.gain.setValueAtTime(level, now + sec);
        await context.resume();
        return microphone.stream;
    };
}'''


class Firefox:
    """Headless, told what to do by WebDriver BiDi. Its AudioContext needs a sound device: pulseaudio gives it
    one that nobody hears."""
    async def __aenter__(self):
        self.folder = tempfile.TemporaryDirectory()
        env = dict(os.environ, XDG_RUNTIME_DIR=self.folder.name)
        (pathlib.Path(self.folder.name) / 'user.js').write_text('user_pref("media.autoplay.default", 0);\n')
        pipes = dict(stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=env)
        self.sound = await asyncio.create_subprocess_exec(
            'pulseaudio', '-n', '--exit-idle-time=-1', '--load=module-null-sink',
            '--load=module-native-protocol-unix', **pipes)
        self.browser = await asyncio.create_subprocess_exec(
            FIREFOX, '--headless', '--no-remote', '--profile', self.folder.name, '--remote-debugging-port=0',
            **pipes)
        while not (found := re.search(rb'BiDi listening on (\S+)', line := await asyncio.wait_for(
                self.browser.stdout.readline(), 60))):
            assert line, 'Firefox ended'
        self.http, self.n = aiohttp.ClientSession(), 0
        self.ws = await self.http.ws_connect(found[1].decode() + '/session')
        await self.do('session.new', capabilities={})
        self.context = (await self.do('browsingContext.getTree'))['contexts'][0]['context']
        return self

    async def __aexit__(self, *_):
        await self.http.close()
        for process in self.browser, self.sound:
            process.terminate()
            await process.communicate()
        self.folder.cleanup()

    async def do(self, method, **params):
        self.n += 1
        await self.ws.send_json(dict(id=self.n, method=method, params=params))
        while (answer := await self.ws.receive_json(timeout=30)).get('id') != self.n:
            pass
        assert answer['type'] == 'success', answer
        return answer['result']

    async def run(self, script):
        """-> what it gives, by JSON"""
        answer = await self.do('script.evaluate', expression=f'JSON.stringify({script})', awaitPromise=True,
                               userActivation=True, target=dict(context=self.context))
        return json.loads(answer['result'].get('value', 'null'))

    async def wait(self, script):
        """-> what it gives, once that is true"""
        for _ in range(60):
            if value := await self.run(script):
                return value
            await asyncio.sleep(0.5)
        raise AssertionError(f'never came: {script}')


@pytest.mark.slow
@pytest.mark.alone
def test_in_firefox():
    """The page is opened, asked, answers, is interrupted, and the conversation is saved."""
    if not FIREFOX or not shutil.which('pulseaudio'):
        pytest.skip('no Firefox here, or no pulseaudio')

    async def run():
        async with serving([Rule(100)], speed=1.0) as (server, url), Firefox() as firefox:
            await firefox.do('script.addPreloadScript', functionDeclaration=OSCILLATOR)
            await firefox.do('browsingContext.navigate', context=firefox.context, url=url, wait='complete')
            await firefox.run("document.getElementById('talk').click()")
            times = await firefox.wait('talk && talk.yields.length && [talk.responses, talk.yields]')
            await firefox.run("document.getElementById('save').click()")
            await firefox.wait("document.getElementById('warning').textContent.startsWith('Saved: talk-')")
            return times
    (response_ms, *_), (yield_ms, *_) = asyncio.run(run())
    assert 400 <= response_ms <= 900 and yield_ms <= 900
