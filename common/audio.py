"""
Audio files in and out, by soundfile and soxr (pip install soundfile soxr).

Files come from strangers, so they are read block by block: a header that claims a trillion samples takes no
memory, an hour of stereo at 48 kHz no more than what is kept of it. What is cut off is refused.
"""
import os
import re
from contextlib import contextmanager

import numpy as np

from common.files import printable, whole

MAX_SEC = 6 * 3600      # read at once: of one channel, float32 at 16 kHz, 1.4 GB
BLOCK = 2 ** 18         # samples of a channel that are read before they are resampled
CUT_OFF_SEC = 0.1       # a file may lack so much of what its header says


@contextmanager
def open_audio(file, name):
    """A path or a file object -> a soundfile.SoundFile. Raises ValueError for what cannot be read, also in
    the block."""
    import soundfile  # only those who touch audio need it
    try:
        with soundfile.SoundFile(file) as audio:
            if audio.frames and audio.samplerate:
                check_header(audio, name)
            yield audio
    except (soundfile.SoundFileError, TypeError) as error:      # TypeError: a .raw file names no rate
        raise ValueError(f'{name} is not audio that can be read ({printable(str(error))})') from None


def check_header(audio, name):
    """Raises ValueError where a wav has fewer bytes than its header says: libsndfile would shorten it.
    Programs that write into a pipe do not know the length, and put a number of 2 GB or more there."""
    found = re.search(r'^ ?(?:data|SSND) : (\d+) \(should be (\d+)\)', audio.extra_info, re.M)
    claimed, there = map(int, found.groups()) if found else (0, 0)
    n_sec = audio.frames / audio.samplerate
    if claimed < 2 ** 31 - 2 ** 16 and n_sec * (claimed - there) > CUT_OFF_SEC * there:
        raise ValueError(f'{name} is cut off: {n_sec:.2f} s are there of '
                         f'{n_sec * claimed / max(1, there):.2f} s')


def read_samples(audio, name, sample_rate, n=None, channels=slice(None)):
    """
    The next n samples, None for all -> float32 [n_sample, n_channel] at sample_rate, of these channels.
    Raises ValueError where there are fewer than the header says, or more than MAX_SEC.
    """
    import soxr
    rate, n_left = audio.samplerate, max(0, audio.frames - audio.tell())
    n = n_left if n is None else min(n, n_left)
    if n > MAX_SEC * rate:
        raise ValueError(f'{name} has {n / rate / 3600:,.1f} h by its header, and {MAX_SEC / 3600:g} h are '
                         'read at once at most: cut it into pieces')
    n_channel = len(range(audio.channels)[channels])
    stream, parts, n_read = None, [np.empty((0, n_channel), np.float32)], 0
    if rate != sample_rate:
        stream = soxr.ResampleStream(rate, sample_rate, n_channel)      # as if it were done at one go
    while n_read < n:
        block = audio.read(min(BLOCK, n - n_read), dtype='float32', always_2d=True)
        block = np.ascontiguousarray(block[:, channels])
        if not np.isfinite(block).all():
            row, column = np.argwhere(~np.isfinite(block))[0]
            at, value = audio.tell() - len(block) + row, block[row, column]
            raise ValueError(f'{name}: sample {at}, at {at / rate:.3f} s, is {value}; every sample has to be '
                             'a number')
        n_read += len(block)
        is_last = n_read >= n or not len(block)
        if stream is not None:
            block = stream.resample_chunk(block, last=is_last).reshape(-1, n_channel)
        parts.append(block)
        if is_last:
            break
    if n - n_read > CUT_OFF_SEC * rate:
        raise ValueError(f'{name} is cut off or damaged: of {n / rate:.2f} s {n_read / rate:.2f} can be read')
    return np.concatenate(parts)


def read_audio(path, sample_rate, channel=None):
    """-> float32 [n_sample], one channel at sample_rate. Raises ValueError for what cannot be listened to."""
    if not os.path.isfile(path):
        raise ValueError(f'no file {path}')
    with open_audio(path, path) as audio:
        n_channel = audio.channels
        if channel is None and n_channel > 1:
            raise ValueError(f'{path} has {n_channel} channels: say which is the user\'s, 0 to '
                             f'{n_channel - 1}, with --user_channel (sample.py) or --channel (codec)')
        if not 0 <= (channel or 0) < n_channel:
            raise ValueError(f'{path} has {n_channel} channels, 0 to {n_channel - 1}; there is no channel '
                             f'{channel}')
        one = channel or 0
        wave = read_samples(audio, path, sample_rate, channels=slice(one, one + 1))[:, 0]
    if not len(wave):
        raise ValueError(f'{path} has no samples')
    return wave


def write_audio(path, wave, sample_rate):
    """float32 [n_sample] or [n_sample, n_channel] -> a wav of 16 bits, which appears whole or not at all."""
    import soundfile
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or '.'):
        raise ValueError(f'cannot write {path}: '
                         + ('it is a folder' if os.path.isdir(path) else 'its folder does not exist'))
    wave = np.asarray(wave)
    with whole(path) as part, soundfile.SoundFile(part, 'w', sample_rate, 1 if wave.ndim == 1
                                                  else wave.shape[1], 'PCM_16',
                                                  format='WAV') as file:
        for at in range(0, len(wave), BLOCK):       # an hour would be copied as a whole
            file.write(np.clip(wave[at:at + BLOCK], -1, 1))
