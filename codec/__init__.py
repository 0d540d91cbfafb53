"""
Speech codecs: a wave becomes integers, so many a second, and comes back (python -m codec --help).

    wave ─ codec.encode ─► codes ─ codec.decode ─► wave

    s3.py     CosyVoice's, which the paper uses
    mel.py    the one that the demo trains for itself
    rvq.py    SNAC, Mimi, DAC: several codebooks, and so several codes a frame

A codec is anything with these, and a line in CODECS:

    name, fingerprint       which codec, and which weights of it: data of another fingerprint is refused
    rate_hz, sample_rate    frames a second, samples a second
    n_codes                 codes are 0 .. n_codes - 1
    levels                  codes a frame of each codebook (common/levels.py); left out where it is (1,)
    silence_codes           [k] frames that stand for silence, the commonest first
    describe()              -> dict of name, rate_hz, n_codes, sample_rate, fingerprint; levels, if not (1,)
    encode(wave)            float32 [n_sample] -> uint16 [n_frame], or [n_frame, sum(levels)] if that is > 1;
    encode_many(waves)      a frame each begun one; the same for a list, in batches
    decode(codes)           what encode returns -> float32 [n_frame * sample_rate / rate_hz]
    stream(), speak()       the same of audio, of codes, that come bit by bit (streaming.py)
    vectors()               float32 tensor [n_codes, d], near each other where codes are alike
    save(folder), load(folder)
"""
import importlib
import os

from safetensors import SafetensorError

from common.files import read_json

CODECS = {'mel': 'mel.MelCodec', 's3': 's3.S3Codec', 'snac': 'rvq.Snac', 'mimi': 'rvq.Mimi', 'dac': 'rvq.Dac'}


def load_codec(folder):
    """The codec that was saved in a folder, or in codec/ of a data folder or checkpoint.
    Raises ValueError if there is none."""
    for place in (folder, os.path.join(folder, 'codec')):
        path = os.path.join(place, 'codec.json')
        if os.path.isfile(path):
            name = read_json(path).get('name')
            if not isinstance(name, str) or name not in CODECS:
                raise ValueError(f'{path} is of codec {name!r:.80}; known are {", ".join(CODECS)}')
            try:
                module, kind = CODECS[name].split('.')      # imported when they are needed
                return getattr(importlib.import_module(f'codec.{module}'), kind).load(place)
            except (OSError, LookupError, TypeError, OverflowError, SafetensorError) as error:
                raise ValueError(f'{place} holds no complete codec ({error}); prepare the data again')
    raise ValueError(f'no codec in {folder}: it has no codec.json, nor has {os.path.join(folder, "codec")}')
