"""
Speech codecs: a wave becomes integers, so many a second, and comes back.

    wave float32 [n_sample] ─ codec.encode ─► codes uint16 [n_frame] ─ codec.decode ─► wave

    s3.py     CosyVoice's, the paper's; cosyvoice_worker.py decodes them, in CosyVoice's own environment (worker.py talks to it)
    mel.py    the one that the demo trains for itself

Anything with the same name, rate_hz, sample_rate, n_codes, fingerprint, silence_codes, describe, encode,
encode_many, decode, save and load will do, and a line in CODECS.

    python -m codec encode question.wav --codec=data/demo           # [17, 17, 203, …], 25 a second
    python -m codec --help
"""
import importlib
import os

from safetensors import SafetensorError

from common.files import read_json

CODECS = {'mel': 'codec.mel.MelCodec', 's3': 'codec.s3.S3Codec'}     # imported when they are needed


def load_codec(folder):
    """The codec that was saved in a folder, or in codec/ of a data folder or checkpoint. Raises ValueError if
    there is none."""
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
