"""
Talk to a checkpoint: a page with a microphone, on this machine or for others.

    python talk.py --checkpoint=out/demo                        open the address that it prints
    python talk.py --checkpoint=out/demo --user=question.wav    without a browser: a recording, at real speed
    python talk.py --host=0.0.0.0 --cert=cert.pem --key=key.pem         for others: HTTPS, and a token

    microphone ─► /v1/realtime ─► codec ─► model ─► codec ─► /v1/realtime ─► ear
                  10 ms each               a chunk (400 ms) at a time

With --user, times are printed as they are at the ear: from the end of a question to the first sound, from an
interruption to silence; and wav, transcript and report.html are written, as sample.py does, and NAME.json
(runs/talk.sh). live/server.py is the server and its protocol, docs/talk.md says what it allows.
"""
import asyncio
import multiprocessing
import os
import secrets
import signal
import socket
import ssl
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

import config
from checkpoint import load_checkpoint
from common.audio import read_audio
from common.device import pick_device, pick_dtype
from common.files import write_json
from common.origin import describe_run
from decode import Sampling
from live.browser import hear
from live.replay import drift_ms, talk_all
from live.save import write_conversation
from live.server import LOCAL, Server
from live.talker import check
from measures.talks import summarise
from table import Table

SPAWN = multiprocessing.get_context('spawn')
N_A_PROCESS = 8     # users with a recording: all of them take a twentieth of a core


@dataclass(frozen=True)
class Config:
    checkpoint: str = 'out/demo'        # a folder that train.py wrote: model, tokenizer, codec and layout
    host: str = '127.0.0.1'             # '0.0.0.0': other machines, too, which need the token that is printed
    port: int = 8000                    # 0: a free one
    token: str | None = None            # instead of one made up at each start
    cert: str | None = None             # TLS: the certificate (chain) and its key, PEM files; browsers give a
    key: str | None = None              # microphone only to localhost and to HTTPS
    max_talkers: int = 4                # talk at once; more wait
    max_waiting: int = 16               # wait; more are refused
    prompt: str = ''                    # what the assistant is told
    text_temperature: float = 0.0       # 0: always the likeliest
    speech_temperature: float = 0.0
    silence_bias: float = 0.0           # added to the logit of silent speech: below 0 talks sooner
    max_context: int | None = None      # tokens it remembers, the latest; None: the model's block_size
    seed: int = 1337
    device: str = 'auto'                # auto: a GPU if there is one
    dtype: str = 'auto'                 # float32, bfloat16, on a CPU int8; auto: see train.py

    # a recording instead of a person
    user: str | None = None             # a recording of the user: wav, flac, ogg, mp3, … of any rate
    user_channel: int | None = None     # the user's channel in it, from 0; needed where there are several
    n_user: int = 1                     # so many play it at once, each in a conversation of their own
    repeat: int = 1                     # each plays it so many times, one after the other
    browser: bool = False               # by the page, in headless Chromium, in place of a socket
    reply_sec: float = 6.0              # silence after the recording, in which the assistant can answer
    speed: float = 1.0                  # above 1: faster than real time; then the times say nothing
    out: str | None = None              # folder for what is written; None: CHECKPOINT/talks

    def __post_init__(self):
        if self.dtype not in ('auto', 'float32', 'bfloat16', 'int8'):
            raise ValueError(f"dtype is {self.dtype!r}, known are 'auto', 'float32', 'bfloat16' and 'int8'")
        if bool(self.cert) != bool(self.key):
            raise ValueError('cert and key go together')
        if min(self.max_talkers, self.n_user, self.repeat) < 1 or min(self.max_waiting, self.reply_sec) < 0:
            raise ValueError('max_talkers, n_user and repeat have to be at least 1, '
                             'max_waiting and reply_sec not below 0')
        if not self.speed > 0 or not 0 <= self.port < 65536:
            raise ValueError('speed has to be above 0, port from 0 to 65535')
        if self.n_user > self.max_talkers:
            raise ValueError(f'n_user is {self.n_user}: max_talkers, {self.max_talkers}, talk at once')
        if self.browser and (not self.user or self.n_user > 1 or self.speed != 1):
            raise ValueError('browser=True plays --user=FILE, once, at real speed')


def make_server(cfg):
    device = pick_device(cfg.device)
    model, vocab, codec, info = checkpoint = load_checkpoint(cfg.checkpoint, device)
    check(checkpoint.layout)
    # a second thread only waits where a small model's layers take microseconds: parts of the demo's answers
    # came 113 ms after their chunk with one, 141 with two, on two cores that others used, too
    is_small = sum(p.numel() for p in model.parameters()) < 1e8
    torch.set_num_threads(1 if is_small else min(torch.get_num_threads(), 8))
    sampling = Sampling(cfg.text_temperature, cfg.speech_temperature, silence_bias=cfg.silence_bias,
                        text_weight=info.text_weight, seed=cfg.seed)
    table = Table(model, vocab, checkpoint.layout, cfg.max_talkers, sampling=sampling,
                  max_context=cfg.max_context, dtype=pick_dtype(cfg.dtype, device), prompt=cfg.prompt)
    table.warm_up(table.max_context // checkpoint.layout.period + 2)
    is_local = cfg.host in LOCAL
    token = cfg.token or (None if is_local or cfg.user else secrets.token_urlsafe(16))
    name = os.path.basename(os.path.normpath(cfg.checkpoint))
    return Server(name, table, codec, cfg.max_waiting, token, cfg.prompt, cfg.speed)


async def serve(cfg, server):
    """Until Ctrl-C."""
    context = None
    if cfg.cert:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(cfg.cert, cfg.key)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f'{cfg.cert}, {cfg.key}: no certificate and its key ({error})') from None
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        async with server.listening(cfg.host, cfg.port, context) as port:
            host = 'localhost' if cfg.host in LOCAL else cfg.host
            host = socket.gethostname() if host in ('0.0.0.0', '::') else host
            print(f'talk: http{"s" * bool(context)}://{host}:{port}/'
                  + f'?token={server.token}' * bool(server.token), flush=True)
            if host != 'localhost' and not context:
                print('browsers on other machines give no microphone to http: take --cert and --key, or '
                      f'ssh -L {port}:localhost:{port}', flush=True)
            await stop.wait()
    except OSError as error:
        raise ValueError(f'cannot serve on {cfg.host}:{cfg.port}: {error.strerror or error}') from None


async def replay(cfg, server):
    """Users who play a recording -> [Heard], in real time"""
    rate = server.codec.sample_rate     # so nothing is resampled on the way
    wave = read_audio(cfg.user, rate, cfg.user_channel)
    wave = np.tile(np.concatenate([wave, np.zeros(round(cfg.reply_sec * rate), np.float32)]), cfg.repeat)
    print(f'{cfg.user}: {len(wave) / rate / cfg.speed:.0f} s, at once by {cfg.n_user}', flush=True)
    # in processes of their own, so that they take none of the server's time; they end when it does (Ctrl-C)
    deaf = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with ProcessPoolExecutor(-(-cfg.n_user // N_A_PROCESS), SPAWN, **deaf) as pool:
        async with server.listening('127.0.0.1', 0) as port:
            address, query = f'http://127.0.0.1:{port}/', f'?token={server.token}' * bool(server.token)
            if cfg.browser:
                return [await hear(address + query, wave, rate)]
            # chunks of several users end at different times, as in life
            waits = np.arange(cfg.n_user) * server.chunk_ms / 1e3 / cfg.n_user / cfg.speed
            user = f'{address}v1/realtime{query}', wave, rate, cfg.speed
            talks = [asyncio.get_running_loop().run_in_executor(pool, talk_all, some, *user)
                     for some in np.split(waits, range(N_A_PROCESS, cfg.n_user, N_A_PROCESS))]
            return sum(await asyncio.gather(*talks), [])


def tell(cfg, server, heard):
    """Writes and prints what each user heard."""
    out = cfg.out or os.path.join(cfg.checkpoint, 'talks')
    os.makedirs(out, exist_ok=True)
    name = os.path.splitext(os.path.basename(cfg.user))[0]

    talks = []
    for i, one in enumerate(heard, 1):
        folder = os.path.join(out, f'{name}-{i}' if len(heard) > 1 else name)
        os.makedirs(folder, exist_ok=True)
        times = write_conversation(folder, name, one.wave, one.rate, one.turns, f'{name}, live',
                                   server.codec, f'{cfg.checkpoint} listens to {cfg.user}.')
        for turn in one.turns:
            print(f'  {turn["start_sec"]:6.2f} s  {turn["text"] or "(speech)"}')
        talks.append(times | dict(late_ms=[late for _, late in one.late_ms], drift_ms=drift_ms(one.late_ms),
                                  n_glitch=one.n_glitch, dropped_ms=sum(one.dropped_ms.values())))
        print_figures(summarise(talks[-1:]), server.chunk_ms)
        print(f'look and listen: {os.path.join(folder, "report.html")}')
    write_json(os.path.join(out, f'{name}.json'), dict(
        origin=describe_run(), chunk_ms=server.chunk_ms, n_user=len(heard),
        sec=len(heard[0].wave) / heard[0].rate, browser=heard[0].browser, **summarise(talks)))


def print_figures(figures, chunk_ms):
    def spread(key):
        x = figures[key]
        return f'{x["median"]:.0f} ms (90 % within {x["p90"]:.0f}, all within {x["max"]:.0f}, of {x["n"]})' \
            if x else 'none'
    drift = figures['drift_ms']
    print(f'question to first sound {spread("response_ms")} | interruption to silence {spread("yield_ms")} | '
          f'chunk {chunk_ms} ms, parts arrive {spread("late_ms")} after it | '
          f'drift {"-" if drift is None else f"{round(drift)} ms"} | glitches {figures["n_glitch"]} | '
          f'false starts {figures["n_false_start"]} | dropped {figures["dropped_ms"]} ms')


def main(cfg):
    server = make_server(cfg)
    if not cfg.user:
        with suppress(KeyboardInterrupt):
            return asyncio.run(serve(cfg, server))
    heard = asyncio.run(replay(cfg, server))
    tell(cfg, server, heard)
    return heard


if __name__ == '__main__':
    try:
        main(config.load(Config, sys.argv[1:]))
    except ValueError as error:
        raise SystemExit(str(error))
    except KeyboardInterrupt:
        raise SystemExit('stopped before the figures were written')
