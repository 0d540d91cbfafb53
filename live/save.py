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

from common.audio import write_audio
from common.files import write_jsonl
from decode import write_transcript
from flatten import ROLES
from measures import report
from measures.foreign import read_conversation
from measures.turns import assess

MAX_UPLOAD_BYTES = 42 << 20         # 11 minutes of stereo at 16 kHz
GAP_SEC = 0.5                       # a longer silence ends what the user said


def write_conversation(folder, id, wave, sample_rate, turns, title, rate_hz=25.0, note=''):
    """
    Writes ID.wav, ID.jsonl and report.html.
        wave    float32 [n_sample, 2]
        turns   the assistant's: [role, start_sec, end_sec, text]; the user's are heard in the wave
    -> dict(response_ms, yield_ms): for each question, from its end to the first sound that answers; for each
    interruption, from its start to silence
    """
    path = os.path.join(folder, id)
    write_audio(path + '.wav', wave, sample_rate)
    write_jsonl(path + '.jsonl', turns)

    def read(rate_hz):
        return read_conversation(id, rate_hz, 0, GAP_SEC, dict(zip(ROLES, ROLES)), 'webrtc', 2,
                                 audio=path + '.wav', transcript=path + '.jsonl')
    heard = read(rate_hz)
    outcomes = assess(read(100.0))      # to 10 ms
    write_transcript(path + '.jsonl', heard, rate_hz)
    report.write(os.path.join(folder, 'report.html'), title, [heard], [assess(heard)], note=note)
    return dict(response_ms=[10 * turn['response'] for turn in outcomes if turn['response'] is not None],
                yield_ms=[10 * turn['yielded'] for turn in outcomes
                          if turn['kind'] == 'interruption' and turn['yielded'] is not None])


def zip_conversation(wav, turns, title, rate_hz):
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
                           rate_hz)
        file = io.BytesIO()
        with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(os.listdir(folder)):
                archive.write(os.path.join(folder, name), f'{id}/{name}')
    return file.getvalue()
