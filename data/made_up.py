"""Made-up data for benchmarks, checks and tests: random dialogues, a vocabulary of bytes, a codec of hums."""
import os

import numpy as np

from codec.mel import MelCodec, mel_filters, spectrum
from data.dialogues import save_dialogues
from vocabulary import BYTE_OF_CHAR, QWEN2_PATTERN, Vocabulary


def make_vocabulary(n_row, n_codes):
    """Text is bytes. Speech codes come after row n_row, so that V is as large as the real one."""
    chars = [chr(c) for c in sorted(BYTE_OF_CHAR, key=BYTE_OF_CHAR.get)]
    return Vocabulary(chars, [], QWEN2_PATTERN, [], {}, n_row, None, n_codes)


def write_data(folder, vocab, frames, turn_frames=190, n_letter=12, codec=None):
    """A data folder with a dialogue for each number in frames, which is its length. User and assistant take
    turns of about turn_frames frames and n_letter letters. codec: one that can be heard; None: only a name"""
    rng, records = np.random.default_rng(0), []
    for i, n_frame in enumerate(frames):
        cuts = np.linspace(0, n_frame, max(2, round(n_frame / turn_frames)) + 1).astype(int).tolist()
        turns = []
        for k, (start, end) in enumerate(zip(cuts, cuts[1:])):
            text = ''.join(map(chr, rng.integers(97, 123, n_letter)))
            turns.append(dict(role=('user', 'assistant')[k % 2], start=start, end=end, text=text))
        user, assistant = rng.integers(0, vocab.n_codes, (2, n_frame)).astype(np.uint16)
        records.append(dict(id=str(i), user=user, assistant=assistant, turns=turns))
    described = dict(name='random', rate_hz=25.0, n_codes=vocab.n_codes, sample_rate=16000,
                     fingerprint='0' * 16)
    if codec:
        described = codec.describe()
        codec.save(os.path.join(folder, 'codec'))
    for split, n in dict(train=len(records), val=1).items():
        save_dialogues(os.path.join(folder, f'{split}.arrow'), records[:n], described)
    vocab.save(os.path.join(folder, 'tokenizer'))


def hum(pitch_hz, n_sec, rate=16000, seed=0):
    """A vowel of sorts: ten harmonics that swell and fade, over a little noise."""
    t = np.arange(int(n_sec * rate)) / rate
    tone = sum(np.sin(2 * np.pi * pitch_hz * k * t) / k for k in range(1, 11))
    tone *= np.sin(np.pi * np.linspace(0, 1, len(t)))
    noise = np.random.default_rng(seed).standard_normal(len(t))
    return (0.1 * tone + 1e-3 * noise).astype(np.float32)


def make_codec(embedding=None):
    """A MelCodec of 32 codes that tells six hums from silence."""
    powers, labels = [], []
    for i in range(24):
        silence = 1e-3 * np.random.default_rng(i).standard_normal(8000)
        wave = np.concatenate([silence, hum(100 + 40 * (i % 6), 1.0, seed=i)])
        powers.append(spectrum(wave) @ mel_filters(16000) * 10 ** np.random.default_rng(i).uniform(-2.5, 0.5))
        labels.append(np.repeat([[0], [1 + i % 6]], [12, 26], axis=0))
    return MelCodec.fit(powers, labels, np.ones(24, bool), embedding, n_codes=32, width=32, n_dim=8)
