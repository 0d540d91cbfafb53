"""
Speech codecs: a wave becomes integers, so many a second, and comes back.

    wave ─ codec.encode ─► codes ─ codec.decode ─► wave

    s3.py     CosyVoice's, which the paper uses
    mel.py    the one that the demo trains for itself

A codec is anything with these, and a line in CODECS:

    name, fingerprint       which codec, and which weights of it: data of another fingerprint is refused
    rate_hz, sample_rate    codes a second, samples a second
    n_codes                 codes are 0 .. n_codes - 1
    silence_codes           those that stand for silence, the commonest first
    describe()              -> dict of name, rate_hz, n_codes, sample_rate, fingerprint
    encode(wave)            float32 [n_sample] at sample_rate -> uint16 [n_frame], a code each begun frame
    encode_many(waves)      the same for a list, in batches
    decode(codes)           uint16 [n_frame] -> float32 [n_frame * sample_rate / rate_hz]
    save(folder), load(folder)

    python -m codec encode question.wav --codec=data/demo           # [17, 17, 203, …], 25 a second
    python -m codec --help
"""
import importlib
import os

from safetensors import SafetensorError

from common.files import read_json

CODECS = {'mel': 'codec.mel.MelCodec', 's3': 'codec.s3.S3Codec'}     # imported when they are needed


def load_codec(folder):
    """The codec that was saved in a folder, or in codec/ of a data folder or checkpoint.
    Raises ValueError if there is none."""
    for place in (folder, os.path.join(folder, 'codec')):
        path = os.path.join(place, 'codec.json')
        if os.path.isfile(path):
            name = read_json(path).get('name')
            if name not in CODECS:
                raise ValueError(f'{path} is of codec {name!r}; known are {", ".join(CODECS)}')
            try:
                module, _, kind = CODECS[name].rpartition('.')
                return getattr(importlib.import_module(module), kind).load(place)
            except (OSError, KeyError, SafetensorError) as error:
                raise ValueError(f'{place} holds no complete codec ({error}); prepare the data again')
    raise ValueError(f'no codec in {folder}: it has no codec.json, nor has {os.path.join(folder, "codec")}')
