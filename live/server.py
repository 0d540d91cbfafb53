"""
Many people talk to one model: the page and a WebSocket on one port.

    browser ◄─ live/talk.html ─┐             ┌─ Talker ─┐
    browser ◄─ /v1/realtime ───┤ event loop  ├─ Talker ─┤ one thread: who has a chunk is answered,
    client  ◄─ /v1/realtime ───┘             └─ Talker ─┘ side by side at one Table

/v1/realtime speaks the subset of OpenAI's Realtime API that vLLM-Omni, SGLang-Omni and Unmute share:

    https://platform.openai.com/docs/api-reference/realtime
    https://github.com/vllm-project/vllm-omni/pull/3907
    https://github.com/sgl-project/sglang-omni, sglang_omni/serve/realtime
    https://github.com/kyutai-labs/unmute, unmute/openai_realtime_api_events.py

A message is a JSON text; audio in it is base64 of mono PCM16, 24 kHz unless session.update says otherwise.
docs/talk.md lists the events. Names are those of the beta, as the three have them (response.audio.delta); a
client whose session.update has session.type "realtime", as OpenAI's newer ones, gets
response.output_audio.delta.

What is wrong is refused in a sentence: an "error" event, the reason of a close, or an HTTP answer.
"""
import asyncio
import base64
import binascii
import hmac
import json
import os
import resource
import socket
import threading
import time
import traceback
import uuid
from collections import deque
from contextlib import asynccontextmanager
from functools import partial
from urllib.parse import urlsplit

import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web

from live.save import MAX_UPLOAD_BYTES, zip_conversation
from live.talker import Talker, speaking_lag, talk_on

RATE_HZ = 24000                     # unless the client gives another
RATES_HZ = 8000, 96000
MAX_FRAME_BYTES = 1 << 19           # base64 of two seconds at 96 kHz
MAX_CONNECTIONS = 256
MAX_FAULTS = 20                     # of one client, after which it is sent away
MAX_AHEAD_SEC = 10                  # that audio may come faster than real time
MAX_UNSENT_SEC, MAX_UNSENT = 2.0, 1000      # audio, and events, that wait for the network
READ_SEC = 10                       # in which a client has to read what it is sent
ASK_SEC = 10                        # in which a caller has to send its request
LOCAL = 'localhost', '127.0.0.1', '::1'
NEW_NAMES = {'response.audio': 'response.output_audio',
             'response.audio_transcript': 'response.output_audio_transcript'}
TOO_LONG = f'a frame may have {MAX_FRAME_BYTES} bytes'
PAGE = os.path.join(os.path.dirname(__file__), 'talk.html')


class Socket(web.WebSocketResponse):
    """Says why it closes where aiohttp gives a number only."""

    async def close(self, *, code=WSCloseCode.OK, message=b'', drain=True):
        if code == WSCloseCode.MESSAGE_TOO_BIG:
            message = TOO_LONG.encode()
        return await super().close(code=code, message=message, drain=drain)


class Session:
    """One client: waits for a place, then talks. All of it runs in the event loop."""

    def __init__(self, server, ws, transport):
        self.server, self.ws, self.transport = server, ws, transport
        self.id, self.rate, self.prompt, self.names = f'sess_{uuid.uuid4().hex}', RATE_HZ, server.prompt, {}
        self.seat = self.talker = None
        self.unsent, self.n_unsent_sec, self.has_unsent = deque(), 0.0, asyncio.Event()
        self.n_dropped_sec, self.is_sending = 0.0, False
        self.n_fault, self.n_heard_sec, self.began = 0, 0.0, None

    # -------------------------------------------------------------------------------- to the client

    def send(self, *events):
        """Puts events in line. Where the client's network falls behind, the oldest audio is dropped."""
        for event in events:
            audio = len(event['delta']) * 3 / 8 / self.rate if event['type'] == 'response.audio.delta' else 0
            self.unsent.append((event, audio))
            self.n_unsent_sec += audio
        while self.n_unsent_sec > MAX_UNSENT_SEC:
            oldest = next(pair for pair in self.unsent if pair[1])
            self.unsent.remove(oldest)
            self.n_unsent_sec -= oldest[1]
            self.n_dropped_sec += oldest[1]
        if len(self.unsent) > MAX_UNSENT:
            self.transport.abort()
        self.has_unsent.set()

    def emit(self, *events):
        """send, from the thread"""
        self.server.loop.call_soon_threadsafe(self.send, *events)

    async def keep_sending(self):
        try:
            while True:
                await self.has_unsent.wait()
                self.has_unsent.clear()
                while self.unsent:
                    event, audio = self.unsent.popleft()
                    self.n_unsent_sec -= audio
                    self.is_sending = True
                    await asyncio.wait_for(self.ws.send_str(self.as_text(event)), READ_SEC)
                    self.is_sending = False
                    if self.n_dropped_sec:
                        ms, self.n_dropped_sec = round(1e3 * self.n_dropped_sec), 0.0
                        self.send(dict(type='nanoduplex.behind', where='network', dropped_ms=ms))
        except asyncio.TimeoutError:    # it never reads
            self.transport.abort()
        except ConnectionError:         # it has gone; the loop that receives ends, too
            pass
        finally:
            self.is_sending = False
            self.unsent.clear()

    def as_text(self, event):
        name, _, rest = event['type'].rpartition('.')
        return json.dumps(event | dict(type=f'{self.names.get(name, name)}.{rest}' if name else rest,
                                       event_id=f'event_{uuid.uuid4().hex[:20]}'))

    def describe(self):
        session = dict(
            id=self.id, object='realtime.session', model=self.server.name, modalities=['text', 'audio'],
            input_audio_format='pcm16', output_audio_format='pcm16', input_sample_rate=self.rate,
            output_sample_rate=self.rate, turn_detection=None, instructions=self.prompt,
            chunk_ms=self.server.chunk_ms, codec_rate=self.server.codec.sample_rate)
        if self.names:
            pcm = dict(format=dict(type='audio/pcm', rate=self.rate))
            session.update(type='realtime', audio=dict(input=pcm, output=pcm))
        return session

    def start(self, seat):
        """It gets a seat."""
        self.seat = seat
        self.server.ids.append(self.id)
        if self.prompt != self.server.prompt:
            seat.reset(self.prompt)
        self.send(dict(type='session.created', session=self.describe()))

    # -------------------------------------------------------------------------------- from the client

    async def receive(self):
        """Returns when the client goes, or is sent away."""
        async for message in self.ws:
            try:
                if message.type != WSMsgType.TEXT:
                    raise ValueError('binary frames are not read: audio comes as JSON, {"type": '
                                     '"input_audio_buffer.append", "audio": base64 of PCM16}')
                self.obey(message.data)
            except ValueError as error:
                self.n_fault += 1
                self.send(dict(type='error', error=dict(
                    type='invalid_request_error', code='invalid_value', message=str(error))))
                if self.n_fault >= MAX_FAULTS:
                    return await self.leave(f'{MAX_FAULTS} messages were wrong, the last one: {error}')
            if self.began and self.n_heard_sec > MAX_AHEAD_SEC + self.server.speed * (
                    time.monotonic() - self.began):
                return await self.leave(f'audio came {MAX_AHEAD_SEC} s ahead of real time: send it as it is '
                                        'spoken')

    async def leave(self, why):
        while (self.unsent or self.is_sending) and not self.ws.closed:
            await asyncio.sleep(0.01)
        await self.ws.close(code=WSCloseCode.POLICY_VIOLATION, message=why.encode()[:120])

    def obey(self, text):
        try:
            event = json.loads(text)
        except (ValueError, RecursionError) as error:   # RecursionError: 100,000 brackets
            raise ValueError(f'the message is no JSON ({error})') from None
        kind = event.get('type') if isinstance(event, dict) else None
        if kind == 'input_audio_buffer.append':
            return self.hear(event.get('audio'))
        if kind == 'session.update':
            return self.update(event.get('session'))
        if kind == 'response.cancel':
            if self.talker:
                self.talker.wants_cancel = True
                self.server.wake()
        elif kind in ('input_audio_buffer.commit', 'input_audio_buffer.clear'):
            # turns are the model's affair: clients for half duplex wait for this answer, nothing else happens
            self.send(dict(type=kind.replace('commit', 'committed').replace('clear', 'cleared')))
        elif kind != 'response.create':     # likewise
            raise ValueError(f'unknown event {str(kind)[:60]!r}; known are session.update, response.cancel, '
                             'input_audio_buffer.append')

    def hear(self, audio):
        if not isinstance(audio, str):
            raise ValueError('input_audio_buffer.append needs "audio": base64 of PCM16')
        try:
            pcm = base64.b64decode(audio, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError('"audio" is no base64') from None
        if len(pcm) % 2:
            raise ValueError(f'"audio" has {len(pcm)} bytes, half a sample: a sample of PCM16 has two')
        self.began = self.began or time.monotonic()
        self.n_heard_sec += len(pcm) / 2 / self.rate
        if not self.seat:       # who waits for a place is not heard
            return
        if not self.talker:
            self.talker = Talker(self.seat, self.server.codec, self.server.lag, self.rate, self.emit)
            self.server.talkers[self.talker] = self
        self.talker.push(np.frombuffer(pcm, '<i2').astype(np.float32) / 32768)
        if self.talker.has_work():
            self.server.wake()

    def update(self, session):
        if not isinstance(session, dict):
            raise ValueError('session.update needs "session", an object')
        for side in ('input', 'output'):
            if session.get(f'{side}_audio_format', 'pcm16') != 'pcm16':
                raise ValueError(f'{side}_audio_format has to be pcm16')
        audio = session.get('audio')
        pcm = audio.get('input') if isinstance(audio, dict) else None
        pcm = pcm.get('format') if isinstance(pcm, dict) else None
        rate = pcm.get('rate') if isinstance(pcm, dict) else None
        rate, prompt = rate or session.get('input_sample_rate', self.rate), session.get('instructions')
        if type(rate) is not int or not RATES_HZ[0] <= rate <= RATES_HZ[1]:
            raise ValueError(f'the rate has to be a whole number from {RATES_HZ[0]} to {RATES_HZ[1]}')
        prompt = self.prompt if prompt is None else prompt
        if not isinstance(prompt, str) or len(prompt) > 10000:
            raise ValueError('instructions have to be a text of at most 10,000 characters')
        if self.talker and (rate, prompt) != (self.rate, self.prompt):
            raise ValueError('rate and instructions have to come before the first audio')
        if self.seat and prompt != self.prompt:
            self.seat.reset(prompt)         # ValueError: it is too long for the model
        self.rate, self.prompt = rate, prompt
        self.names = NEW_NAMES if session.get('type') == 'realtime' else self.names
        self.send(dict(type='session.updated', session=self.describe()))


class Server:
    """
    Serves talkers until it is stopped.
        table       as many talk at once as it has seats
        max_waiting more wait for a place; others are refused
        token       None: whoever comes to a local address is let in
        speed       how much faster than real time audio may come, for tests
    """

    def __init__(self, name, table, codec, max_waiting=16, token=None, prompt='', speed=1.0):
        self.name, self.codec, self.token, self.prompt, self.speed = name, codec, token, prompt, speed
        self.table, self.free, self.max_waiting = table, table.seats[::-1], max_waiting
        self.lag, self.chunk_ms = speaking_lag(codec), round(1e3 * table.layout.speech_chunk / codec.rate_hz)
        self.n_place, self.sessions = len(self.free), []    # by arrival, those who wait, too
        self.ids = deque(maxlen=256)                        # of sessions, those that are over, too
        self.talkers, self.is_stopping = {}, False          # Talker -> Session
        self.silent = {}        # who has not asked yet, by arrival: aiohttp's protocol -> timer
        self.work_to_do, self.in_turn = threading.Condition(), threading.Lock()
        with open(PAGE, encoding='utf-8') as file:
            self.page = file.read()

    # -------------------------------------------------------------------------------- the thread

    def wake(self):
        with self.work_to_do:
            self.work_to_do.notify()

    def work(self):
        """A chunk of all who have one, again and again. Who has one a moment later waits for those."""
        while not self.is_stopping:
            with self.work_to_do:
                self.work_to_do.wait_for(
                    lambda: self.is_stopping or any(talker.has_work() for talker in list(self.talkers)), 1.0)
            with self.in_turn:
                talkers = [talker for talker in list(self.talkers) if talker.has_work()]
                # who has a chunk does not wait until others, who have none yet, were listened to
                due = [talker for talker in talkers if talker.is_due()]
                talk_on(self.table, due or talkers, self.give_up)

    def give_up(self, talker, error):
        traceback.print_exception(error)
        if session := self.talkers.pop(talker, None):
            self.loop.call_soon_threadsafe(self.fail, session)

    def fail(self, session):
        session.send(dict(type='error', error=dict(type='server_error', code='model',
                                                   message='the model failed; its log says where')))
        asyncio.ensure_future(session.leave('the model failed'))

    # -------------------------------------------------------------------------------- who comes in

    def check(self, request):
        """Raises HTTP 403 for those who may not come in."""
        host = urlsplit(f'//{request.host}').hostname
        origin = request.headers.get('Origin')
        if origin and urlsplit(origin).netloc != request.host:
            raise web.HTTPForbidden(text=f'the page of {origin[:100]} may not talk to this model\n')
        if not self.token:
            # a page can give its own name the address 127.0.0.1
            if host not in LOCAL:
                raise web.HTTPForbidden(text='without a token only localhost is served\n')
            return
        given = request.headers.get('Authorization', '').removeprefix('Bearer ')
        given = request.query.get('token') or given
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            raise web.HTTPForbidden(text='the token is missing or wrong: open the address that talk.py '
                                         'printed, ?token=... included\n')

    def connect(self, runner):
        """-> the protocol for one who calls. aiohttp waits for a request for ever; here that ends after
        ASK_SEC, and sooner where others need the place."""
        if len(runner.server.connections) >= MAX_CONNECTIONS:
            longest = next((caller for caller in self.silent if caller.transport), None)
            if not longest:
                return Full()
            self.hang_up(longest)
        caller = runner.server()
        self.silent[caller] = self.loop.call_later(ASK_SEC, self.hang_up, caller)
        return caller

    def hang_up(self, caller):
        self.silent.pop(caller).cancel()
        if caller.transport:        # else it has gone, or is still about TLS, which has a time limit, too
            refuse(caller.transport, '408 Request Timeout', 'no request came in time\n')

    @web.middleware
    async def answer(self, request, handler):
        timer = self.silent.pop(request.protocol, None)     # None: its second request
        if timer:
            timer.cancel()
        return await handler(request)

    async def get_page(self, request):
        self.check(request)
        return web.Response(text=self.page, content_type='text/html', headers={
            'Cache-Control': 'no-store', 'X-Frame-Options': 'DENY', 'Referrer-Policy': 'no-referrer'})

    async def save(self, request):
        """A wav of what was heard at the user's end, and its turns -> a zip of wav, transcript, report"""
        self.check(request)
        if request.query.get('session') not in self.ids:
            raise web.HTTPForbidden(text='only who talks can save\n')
        form = await request.post()
        try:
            if not isinstance(form.get('wav'), web.FileField):
                raise ValueError('a form with the file "wav" and the text "turns" was expected')
            content = await self.loop.run_in_executor(
                None, zip_conversation, form['wav'].file.read(), str(form.get('turns')), self.name,
                self.codec)
        except ValueError as error:
            raise web.HTTPBadRequest(text=f'{error}\n')
        return web.Response(body=content, content_type='application/zip')

    async def realtime(self, request):
        self.check(request)
        if len(self.sessions) >= self.n_place + self.max_waiting:
            raise web.HTTPServiceUnavailable(text=f'{self.n_place} talk and {self.max_waiting} wait: '
                                                  'come back later\n')
        ws = Socket(max_msg_size=MAX_FRAME_BYTES, heartbeat=15, compress=False)
        # taken before the first await: others who come meanwhile count it
        session = Session(self, ws, request.transport)
        self.sessions.append(session)
        sender = None
        try:
            await ws.prepare(request)
            # what the network cannot take shows after half a second, and is not kept in the kernel
            request.get_extra_info('socket').setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            sender = asyncio.create_task(session.keep_sending())
            self.seat()
            await session.receive()
        finally:
            if sender:
                sender.cancel()
            self.sessions.remove(session)
            self.talkers.pop(session.talker, None)
            if session.seat:
                # not before the thread has left it
                await self.loop.run_in_executor(None, self.clear, session.seat)
                self.free.append(session.seat)
                self.free.sort(key=lambda seat: -seat.row)      # low rows first: few rows are computed then
            self.seat()
        return ws

    def clear(self, seat):
        with self.in_turn:
            seat.reset(self.prompt)

    def seat(self):
        """Gives free places to those who wait, and tells the others theirs."""
        waiting = [session for session in self.sessions if not session.seat]
        while self.free and waiting:
            waiting.pop(0).start(self.free.pop())
        for place, session in enumerate(waiting, 1):
            session.send(dict(type='nanoduplex.queued', place=place))

    # -------------------------------------------------------------------------------- starting and stopping

    @asynccontextmanager
    async def listening(self, host, port, ssl=None):
        """Serves while the block runs; gives the port, which is a free one where port is 0."""
        self.loop = asyncio.get_running_loop()
        app = web.Application(client_max_size=MAX_UPLOAD_BYTES, middlewares=[self.answer])
        app.add_routes([web.get('/', self.get_page), web.get('/v1/realtime', self.realtime),
                        web.post('/save', self.save)])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, keepalive_timeout=1.0)
        await runner.setup()
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))    # a thousand callers leave files to open
        listener = await self.loop.create_server(
            partial(self.connect, runner), host, port, ssl=ssl, ssl_handshake_timeout=ssl and ASK_SEC,
            backlog=1024)
        thread = threading.Thread(target=self.work, daemon=True)
        thread.start()
        try:
            yield listener.sockets[0].getsockname()[1]
        finally:
            listener.close()
            for session in list(self.sessions):
                await session.ws.close(code=WSCloseCode.GOING_AWAY, message=b'the server stops')
            await runner.cleanup()
            self.is_stopping = True
            self.wake()
            await self.loop.run_in_executor(None, thread.join)


class Full(asyncio.Protocol):
    """Whom there is no room for."""

    def connection_made(self, transport):
        refuse(transport, '503 Service Unavailable', f'{MAX_CONNECTIONS} are connected: come back later\n')


def refuse(transport, status, text):
    transport.write(f'HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n'
                    f'Connection: close\r\n\r\n{text}'.encode())
    transport.close()
