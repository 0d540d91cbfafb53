"""Audio files in and out, by soundfile and soxr (pip install soundfile soxr)."""
import os

import numpy as np

from common.files import whole


def read_audio(path, sample_rate, channel=None):
    """-> float32 [n_sample], one channel at sample_rate. Raises ValueError for what cannot be listened to."""
    import soundfile  # pip install soundfile soxr: only those who touch audio need them
    import soxr
    if not os.path.isfile(path):
        raise ValueError(f'no file {path}')
    try:
        wave, rate = soundfile.read(path, dtype='float32', always_2d=True)     # (n_sample, n_channel)
    except (soundfile.SoundFileError, TypeError) as error:      # TypeError: a .raw file names no rate
        raise ValueError(f'{path} is not audio that can be read ({error})') from None
    n_sample, n_channel = wave.shape
    if channel is None and n_channel > 1:
        raise ValueError(f'{path} has {n_channel} channels: say which is the user\'s, 0 to {n_channel - 1}, '
                         'with --user_channel (sample.py) or --channel (codec)')
    if not 0 <= (channel or 0) < n_channel:
        raise ValueError(f'{path} has {n_channel} channels, 0 to {n_channel - 1}; there is no channel '
                         f'{channel}')
    if n_sample == 0:
        raise ValueError(f'{path} has no samples')
    wave = wave[:, channel or 0]
    if not np.isfinite(wave).all():
        at = int(np.argmin(np.isfinite(wave)))
        raise ValueError(f'{path}: sample {at}, at {at / rate:.3f} s, is {wave[at]}; every sample has to be '
                         'a number')
    return soxr.resample(wave, rate, sample_rate) if rate != sample_rate else wave


def write_audio(path, wave, sample_rate):
    """float32 [n_sample] or [n_sample, n_channel] -> a wav of 16 bits, which appears whole or not at all."""
    import soundfile
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or '.'):
        raise ValueError(f'cannot write {path}: '
                         + ('it is a folder' if os.path.isdir(path) else 'its folder does not exist'))
    with whole(path) as part:
        soundfile.write(part, np.clip(wave, -1, 1), sample_rate, format='WAV', subtype='PCM_16')
