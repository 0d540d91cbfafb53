"""
A conversation as it was heard at the user's end becomes files: a stereo wav (user left, assistant right), a
transcript, a report, and times from mouth to ear.
"""
import io
import json
import os
import tempfile
import time
import zipfile

import numpy as np
import soundfile

from common.audio import read_audio, write_audio
from common.files import write_jsonl
from common.levels import is_silent
from decode import write_transcript
from flatten import ROLES
from measures import report
from measures.foreign import read_conversation
from measures.turns import assess, stretches

MAX_UPLOAD_BYTES = 42 << 20         # 11 minutes of stereo at 16 kHz
GAP_SEC = 0.5                       # a longer silence ends what the user said


def write_conversation(folder, id, wave, sample_rate, turns, title, codec, note=''):
    """
    Writes ID.wav, ID.jsonl and report.html.
        wave    float32 [n_sample, 2]
        turns   the assistant's: [role, start_sec, end_sec, text]
        codec   hears when the user speaks: noise after a word is speech to webrtcvad and to energy
    -> dict: response_ms, for each question, from its end to the first sound that answers; yield_ms, for each
    interruption, from its start to silence; n_turn of the user, n_false_start in them
    """
    path = os.path.join(folder, id)
    write_audio(path + '.wav', wave, sample_rate)
    codes = codec.encode(read_audio(path + '.wav', codec.sample_rate, 0))
    spans = stretches(~is_silent(codes, codec.silence_codes), codec.rate_hz, GAP_SEC)
    n_sec = len(wave) / sample_rate     # a codec's last frame may be longer
    user = [dict(role='user', start_sec=start / codec.rate_hz, text='',
                 end_sec=min(end / codec.rate_hz, n_sec))
            for start, end in spans]
    write_jsonl(path + '.jsonl', user + turns)

    def read(rate_hz):
        return read_conversation(id, rate_hz, 0, GAP_SEC, dict(zip(ROLES, ROLES)), 'energy', 2,
                                 audio=path + '.wav', transcript=path + '.jsonl')
    heard = read(codec.rate_hz)
    outcomes = assess(read(100.0))      # to 10 ms
    write_transcript(path + '.jsonl', heard, codec.rate_hz)
    report.write(os.path.join(folder, 'report.html'), title, [heard], [assess(heard)], note=note)
    return dict(response_ms=[10 * turn['response'] for turn in outcomes if turn['response'] is not None],
                yield_ms=[10 * turn['yielded'] for turn in outcomes
                          if turn['kind'] == 'interruption' and turn['yielded'] is not None],
                n_turn=len(outcomes), n_false_start=sum(turn['false_start'] is not None for turn in outcomes))


def zip_conversation(wav, turns, title, codec):
    """wav: the bytes of a file; turns: JSON -> the bytes of a zip. Raises ValueError for what is no such
    conversation."""
    try:
        info = soundfile.info(io.BytesIO(wav))
        if (info.format, info.subtype, info.channels) != ('WAV', 'PCM_16', 2):
            raise ValueError(f'the recording is {info.format} {info.subtype} of {info.channels} channels, it '
                             'has to be a WAV of PCM_16 and two')
        wave, sample_rate = soundfile.read(io.BytesIO(wav), dtype='float32')
    except soundfile.SoundFileError:
        raise ValueError('the recording is no wav') from None
    if len(wave) < sample_rate // 10:
        raise ValueError('nothing was recorded yet')
    try:
        turns = json.loads(turns)
        turns = [dict(role='assistant', start_sec=float(turn['start_sec']), end_sec=float(turn['end_sec']),
                      text=str(turn['text'])) for turn in turns]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ValueError('"turns" has to be JSON: [{"start_sec": 0.4, "end_sec": 1.9, "text": "Hello."}]'
                         ) from None
    id = time.strftime('talk-%Y%m%d-%H%M%S')
    with tempfile.TemporaryDirectory() as folder:
        write_conversation(folder, id, np.ascontiguousarray(wave), sample_rate, turns, f'{title}, {id}',
                           codec)
        file = io.BytesIO()
        with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(os.listdir(folder)):
                archive.write(os.path.join(folder, name), f'{id}/{name}')
    return file.getvalue()
