"""
Who is listened to: a recording, rows of a JSON lines file, the users of prepared dialogues.
"""
import os
from typing import NamedTuple

import numpy as np

from common.audio import read_audio
from common.files import read_jsonl
from common.levels import is_silent
from data.recordings import by_id
from flatten import ROLES
from measures.turns import stretches


class Heard(NamedTuple):
    """What the model listens to."""
    id: str
    codes: np.ndarray           # of the user, [n_frame]
    turns: list                 # the user's
    expected: list | None       # the assistant's in the data; None for a file
    wave: np.ndarray | None     # the user's own recording
    prompt: str
    said: np.ndarray = ()       # the assistant's channel in the data
    row: dict = {}              # of input


def first(dialogues, n):
    """The first n of a split, 0: all. Raises ValueError where two have one id: their files would be one."""
    chosen = (dialogues[i] for i in range(min(n or len(dialogues), len(dialogues))))
    return list(by_id((dialogue['id'], dialogue) for dialogue in chosen).values())


def read_input(cfg, codec, layout):
    """What sample.py's --user or --input names -> [Heard]. Raises ValueError where the layout answers to
    something else: some read a text aloud, all others listen."""
    reply_sec = cfg.reply_sec * (layout.order == 'chunks')      # an answer needs time, where there is a clock
    if cfg.user:
        name = os.path.splitext(os.path.basename(cfg.user))[0]
        heard = {name: listen_to_file(cfg.user, codec, cfg.user_channel, reply_sec, name, cfg.prompt or '')}
    else:
        heard = read_rows(cfg, codec, reply_sec)
    for id, user in heard.items():
        if not (user.row.get('text') if layout.is_voice else len(user.codes)):
            wanted = 'text' if layout.is_voice else 'audio'
            raise ValueError(f'{id}: layout {layout.name} needs "{wanted}" in rows of --input')
    return list(heard.values())


def read_rows(cfg, codec, reply_sec):
    """JSON lines -> {id: Heard}"""
    heard = {}
    for number, row in read_jsonl(cfg.input):
        id = str(row.get('id', f'{os.path.splitext(os.path.basename(cfg.input))[0]}-{number}'))
        prompt = row.get('instruction', cfg.instruction or cfg.prompt or '')
        if not isinstance(row.get('audio', row.get('text')), str):
            raise ValueError(f'{cfg.input}:{number}: a row needs "audio", a file, or "text" to be read aloud')
        if id in heard:
            raise ValueError(f'{cfg.input}:{number}: an earlier row has the id {id!r}, too')
        try:
            user = Heard(id, codec.silence_codes[:0], [], None, None, prompt)
            if 'audio' in row:
                user = listen_to_file(row['audio'], codec, cfg.user_channel, reply_sec, id, prompt)
            heard[id] = user._replace(row=row)
        except ValueError as error:
            raise ValueError(f'{cfg.input}:{number}: {error}') from None
    if not heard:
        raise ValueError(f'{cfg.input} has no rows')
    return heard


def listen_to_file(path, codec, channel, reply_sec, id, prompt):
    wave = read_audio(path, codec.sample_rate, channel)
    wave = np.concatenate([wave, np.zeros(round(reply_sec * codec.sample_rate), np.float32)])
    codes = codec.encode(wave)
    spans = stretches(~is_silent(codes, codec.silence_codes), codec.rate_hz)
    turns = [dict(role='user', start=start, end=end, text='') for start, end in spans]  # without text
    return Heard(id, codes, turns, None, wave, prompt)


def listen_to(dialogues, cfg):
    """The users of dialogues -> [Heard]"""
    heard = []
    for dialogue in dialogues:
        turns, expected = ([turn for turn in dialogue['turns'] if turn['role'] == role] for role in ROLES)
        if len(dialogue['user']):
            prompt = dialogue.get('prompt', '') if cfg.prompt is None else cfg.prompt
            heard.append(Heard(dialogue['id'], dialogue['user'], turns, expected, None, prompt,
                               dialogue['assistant']))
    if not heard:
        raise ValueError(f'{cfg.data}: no dialogue with a user channel in {cfg.split}')
    return heard
