"""
How people differ, for the demo's codec: what espeak-ng says, as a larger or a smaller mouth would, faster
here and slower there, breathier, in a room, over noise, through another microphone; and voices drawn from
an acoustic model that was trained on people.

All of it happens to spectra: power (n_hop, n_bin), a row each 10 ms, as `spectrum` in codec/mel.py has it.
The acoustic model is pocketsphinx's for US English (BSD, in its package on PyPI): how the cepstra of each
phoneme are distributed over many people.

pip install pocketsphinx
"""
import os
import struct

import numpy as np

from codec.mel import N_FFT, TYPICAL

HZ = np.arange(N_FFT // 2 + 1) * 16000 / N_FFT      # of each bin
MEL = np.log(HZ / 700 + 1)
MEL /= MEL[-1]
# five places along the mel scale at which a mouth's resonances are moved
CENTERS = np.array([[0.12], [0.3], [0.48], [0.66], [0.85]])
BUMPS = np.exp(-0.5 * ((MEL - CENTERS) / 0.11) ** 2).astype(np.float32)


def between(rng, low, high):
    """a factor from low to high, as likely to be halved as to be doubled"""
    return np.exp(rng.uniform(np.log(low), np.log(high)))


def wander(rng, n, step):
    """(n,), normally distributed, a new value every `step`, straight lines between them"""
    knots = rng.standard_normal(int(n / step) + 3)
    return np.interp(np.arange(n) / step, np.arange(len(knots)), knots)


def stretch(power, marks, rng):
    """Faster here, slower there: -> power of another length, marks (hops) moved with it"""
    n = len(power)
    pace = between(rng, 0.8, 1.25) * np.exp(0.35 * wander(rng, n, 12))
    ends = np.concatenate([[0], np.cumsum(pace)])
    source = np.interp(np.arange(max(8, int(ends[-1]))), ends, np.arange(n + 1)).clip(0, n - 1)
    left = source.astype(int)
    right = np.minimum(left + 1, n - 1)
    share = (source - left)[:, None]
    marks = np.interp(marks, np.arange(n + 1), ends).astype(int)
    return (power[left] * (1 - share) + power[right] * share).astype(np.float32), marks


class Speaker:
    """One person's mouth, throughout a dialogue. size: from how many times as small to how many as large."""

    def __init__(self, rng, size=(0.75, 1.3)):
        knots_hz = np.array([0, 500, 1200, 2400, 4000, 8000])
        scale = between(rng, *size) * np.exp(rng.normal(0, 0.06, 5))
        self.from_hz = np.interp(HZ, knots_hz, np.concatenate([[0], np.cumsum(np.diff(knots_hz) * scale)]))
        breath = rng.uniform() ** 2 if rng.random() < 0.6 else 0
        if rng.random() < 0.5:      # more of it above some frequency
            breath = breath / (1 + np.exp((rng.uniform(500, 4000) - HZ) / 500))
        self.breath, self.accent = breath, 0.09 * rng.uniform(0, 1.4)

    def says(self, power, rng):
        """Frequencies are moved, for a speaker's size, and a little to and fro, for their vowels; harmonics
        give way to noise."""
        moves = np.stack([wander(rng, len(power), rng.uniform(10, 25)) for _ in BUMPS], 1)
        place = np.exp((self.accent * moves).astype(np.float32) @ BUMPS) * (self.from_hz * N_FFT / 16000)
        place = place.clip(0, N_FFT / 2 - 0.01).astype(np.float32)
        left = place.astype(np.int64)
        share = place - left
        low, high = (np.take_along_axis(power, at, 1) for at in (left, left + 1))
        power = low * (1 - share) + high * share
        if np.any(self.breath):
            wide = np.cumsum(np.pad(power, ((0, 0), (5, 4)), mode='edge'), 1)
            envelope = (wide[:, 9:] - wide[:, :-9]) / 9
            power = (1 - self.breath) * power + self.breath * envelope * rng.exponential(size=power.shape)
        return power.astype(np.float32)


def microphone(rng):
    """What a microphone makes of each bin's power: a tilt, and five smooth bends"""
    place = np.log(HZ + 150)
    place = (place - place[0]) / (place[-1] - place[0])
    gain_db = rng.normal(0, 6) * (2 * place - 1)
    for k in range(1, 6):
        gain_db += rng.normal(0, 6 / (1 + k / 2)) * np.cos(np.pi * k * place + rng.uniform(0, 2 * np.pi))
    return 10 ** (gain_db / 10)


def room(power, rng):
    """Echoes that die away by 60 dB in 0.1 to 0.7 s, 12 dB below the voice to 5 dB above it"""
    fall = np.float32(10 ** (-6 / 100 / rng.uniform(0.1, 0.7)))
    echo, share = np.zeros_like(power), np.float32((1 - fall) / 10 ** rng.uniform(-0.5, 1.2))
    for i in range(1, len(power)):
        echo[i] = fall * echo[i - 1] + share * power[i - 1]
    # it comes and goes, from bin to bin
    return power + echo * rng.standard_exponential(power.shape, np.float32) ** np.float32(0.7)


def noise(n, level, snr_db, rng):
    """(n, n_bin), flat to steeper than pink, bent now and then. level: the power of speech, over all bins"""
    color = (HZ + 50) ** -rng.uniform(0, 1.5)
    if rng.random() < 0.3:
        bend = np.cos(rng.uniform(1, 4) * np.pi * HZ / HZ[-1] + rng.uniform(0, 6))
        color = color * np.exp(rng.normal() * bend)
    color = (level * 10 ** (-snr_db / 10) * color / color.sum()).astype(np.float32)
    return color * rng.standard_exponential((n, len(HZ)), np.float32)


def heard(power, rng, snr_db=(12, 45)):
    """Speech as it is recorded somewhere: most often through some microphone and in a room, always over
    noise, from 20 dB softer than espeak-ng to 10 dB louder"""
    if rng.random() < 0.9:
        power = power * microphone(rng).astype(np.float32)
    if rng.random() < 0.75:
        power = room(power, rng)
    loud = power.sum(1)
    level = loud[loud >= 0.01 * loud.max()].mean()      # of the loudest 20 dB: pauses do not count
    power = power + noise(len(power), level, rng.uniform(*snr_db), rng)
    return (power * TYPICAL / level * 10 ** rng.uniform(-2, 1)).astype(np.float32)


# espeak-ng's phonemes in those of the acoustic model (CMU's)
CMU = {name: phones.split() for name, phones in {
    '_': 'SIL', '_:': 'SIL', 'p': 'P', 'b': 'B', 't': 'T', 't[': 'T', 'd': 'D', 'k': 'K', 'g': 'G',
    'f': 'F', 'v': 'V', 'T': 'TH', 'D': 'DH', 's': 'S', 'z': 'Z', 'S': 'SH', 'Z': 'ZH', 'h': 'HH',
    'tS': 'CH', 'dZ': 'JH', 'm': 'M', 'n': 'N', 'N': 'NG', 'l': 'L', 'r': 'R', 'r-': 'R', 'w': 'W',
    'j': 'Y', ';': 'Y', 'I': 'IH', 'I2': 'IH', 'i': 'IY', 'i:': 'IY', 'E': 'EH', 'a': 'AE', 'aa': 'AE',
    '0': 'AA', 'A:': 'AA', 'O:': 'AO', 'O2': 'AO', 'V': 'AH', '@': 'AH', '@2': 'AH', '@5': 'AH',
    'U': 'UH', 'u:': 'UW', '3': 'ER', '3:': 'ER', 'eI': 'EY', 'aI': 'AY', 'aI2': 'AY', 'OI': 'OY',
    'oU': 'OW', 'aU': 'AW', '@L': 'AH L', 'VR': 'AH R', 'A@': 'AA R', 'O@': 'AO R', 'o@': 'AO R',
    'e@': 'EH R', 'i@3': 'IH R', 'U@': 'UH R'}.items()}
VOICELESS = 'SIL P T K F TH S SH CH HH'.split()


class People:
    """
    Voices drawn from the acoustic model. It has each of its 42 phonemes as 128 Gaussians over 13 cepstra of
    25 mel bands, and weights for the beginning, middle and end of the phoneme between this and that other
    one. A person is a direction in the space of cepstra: of each phoneme they say what lies in that
    direction. The settings of the cepstra are those of the model's feat.params.
    """

    def __init__(self):
        import pocketsphinx
        folder = os.path.join(os.path.dirname(pocketsphinx.__file__), 'model', 'en-us', 'en-us')
        self.mean = read_gaussians(os.path.join(folder, 'means'))
        self.std = np.sqrt(read_gaussians(os.path.join(folder, 'variances')).clip(1e-4))
        self.weight = read_weights(os.path.join(folder, 'sendump'))
        names, self.keys, self.thirds = read_phonemes(os.path.join(folder, 'mdef'))
        self.number = {name: i for i, name in enumerate(names)}
        alone = self.weight[:3 * len(names)].reshape(len(names), 3, -1)     # whatever stands beside
        center = np.einsum('ptg,pgc->pc', np.exp(alone), self.mean) / 3
        self.direction = (self.mean - center[:, None]) / self.mean.std(1)[:, None]
        edges_mel = np.linspace(*(2595 * np.log10(1 + hz / 700) for hz in (130, 6800)), 27)
        self.band_hz = 700 * (10 ** (edges_mel[1:-1] / 2595) - 1)
        k = np.arange(13)[:, None]
        cosines = np.cos(np.pi * k * (np.arange(25) + 0.5) / 25) * np.sqrt(np.where(k, 2, 1) / 25)
        self.bands = cosines / (1 + 11 * np.sin(np.pi * k / 22))    # a cepstrum's 13 numbers -> 25 log powers
        self.emphasis = np.abs(1 - 0.97 * np.exp(-2j * np.pi * np.arange(len(HZ)) / N_FFT)).clip(0.1) ** 2

    def person(self, rng):
        return rng.standard_normal(13)

    def between(self, left, phone, right):
        """-> rows of weight, (3,): beginning, middle and end of a phoneme between two others, at the first
        place in a word where that is known; else whatever stands beside"""
        keys = context_key(left, phone, right, np.arange(4))
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        known = at[self.keys[at] == keys]
        return self.thirds[known[0]] if len(known) else 3 * phone + np.arange(3)

    def say(self, phonemes, n_hop, person, rng):
        """phonemes: [(espeak-ng's name, first hop)] -> power (n_hop, n_bin)"""
        cepstra, voiced, speaks = np.zeros((n_hop, 13)), np.zeros(n_hop), np.zeros((n_hop, 1))
        starts, phones = [start for _, start in phonemes] + [n_hop], []
        for (name, _), start, end in zip(phonemes, starts, starts[1:]):
            edges = np.linspace(start, end, len(CMU[name]) + 1)
            phones += zip(CMU[name], edges, edges[1:])
        numbers = [self.number[name] for name, *_ in phones]
        silence = self.number['SIL']
        around = zip([silence, *numbers], numbers, [*numbers[1:], silence])
        for (name, start, end), (left, phone, right) in zip(phones, around):
            edges = np.linspace(start, end, 4).round().astype(int)
            for row, a, b in zip(self.between(left, phone, right), edges, edges[1:]):
                likely = self.weight[row] + 3 / np.sqrt(13) * self.direction[phone] @ person
                which = np.argmax(likely + rng.gumbel(size=len(likely)))
                off = 0.3 * self.std[phone, which] * rng.standard_normal(13)
                cepstra[a:b] = self.mean[phone, which] + off
            a, b = round(start), round(end)
            voiced[a:b], speaks[a:b] = name not in VOICELESS, name != 'SIL'
        cepstra = smooth(cepstra, 7)        # a mouth takes some 50 ms from one sound to the next
        log_power = np.stack([np.interp(HZ, self.band_hz, bands) for bands in cepstra @ self.bands])
        pitch_hz = between(rng, 85, 260) * np.exp(0.12 * wander(rng, n_hop, 30))[:, None]
        off_hz = (HZ / pitch_hz - np.round(HZ / pitch_hz)) * pitch_hz       # to the nearest harmonic
        comb = 0.03 + np.exp(-0.5 * (off_hz / 32) ** 2)
        share = smooth(voiced[:, None], 3) / (1 + np.exp((HZ - rng.uniform(2500, 6000)) / 600))
        source = share * comb / comb.mean(1, keepdims=True) + (1 - share) * rng.exponential(size=comb.shape)
        return (np.exp(log_power) / self.emphasis * source * np.maximum(speaks, 1e-4)).astype(np.float32)


def smooth(rows, n):
    """a weighted mean over n rows, n odd"""
    weight = np.hanning(n + 2)[1:-1]
    padded = np.pad(rows, ((n // 2, n // 2), (0, 0)), mode='edge')
    return sum(w * padded[i:i + len(rows)] for i, w in enumerate(weight / weight.sum()))


def read_gaussians(path):
    """A file of sphinxtrain -> (42 phonemes, 128 Gaussians, 13 cepstra), without the cepstra's changes"""
    with open(path, 'rb') as f:
        data = f.read()
    at = data.index(b'endhdr\n') + len(b'endhdr\n')
    order, n_phoneme, n_feature, n_gaussian, *n_cepstrum = struct.unpack_from('<7i', data, at)
    assert (order, n_feature, n_cepstrum) == (0x11223344, 3, [13] * 3), f'{path} is not what is read here'
    values = np.frombuffer(data, '<f4', n_phoneme * 3 * n_gaussian * 13, at + 4 * 8)
    return values.reshape(n_phoneme, 3, n_gaussian, 13)[:, 0].copy()


def read_weights(path, n_gaussian=128):
    """Logarithms (n_mixture, n_gaussian)"""
    with open(path, 'rb') as f:
        data = f.read()
    n_mixture = len(data) // (3 * n_gaussian)       # the header is shorter than one row
    at, length = 0, 1
    while length:       # the header: texts, each after its length
        length, = struct.unpack_from('<i', data, at)
        at += 4 + length
    n, n_mixture = struct.unpack_from('<2i', data, at)
    assert n == n_gaussian, f'{path} is not what is read here'
    first = len(data) - 3 * n * n_mixture
    levels = np.frombuffer(data, np.uint8, n * n_mixture, first).reshape(n, n_mixture)
    # in units of 2 ** 10 times sphinx's logarithm of base 1.0001
    return np.ascontiguousarray(-1024 * np.log(1.0001) * levels.T.astype(np.float32))


def context_key(left, phoneme, right, place):
    """place in the word: 0 within, 1 at its beginning, 2 at its end, 3 the word itself"""
    return ((phoneme * 42 + left) * 42 + right) * 4 + place


def read_phonemes(path):
    """The binary mdef -> names of the 42 phonemes; context_key of each phoneme between two others, sorted;
    the rows of weights of its thirds, (n_context, 3)"""
    with open(path, 'rb') as f:
        data = f.read()
    assert data[:4] == b'BMDF', f'{path} is not what is read here'
    at = 12 + struct.unpack_from('<i', data, 8)[0]          # behind a description of the format
    n_phoneme, n_phone, n_third, _, _, _, n_sequence, _, n_node, _ = struct.unpack_from('<10i', data, at)
    names = data[at + 40:].split(b'\0', n_phoneme)[:n_phoneme]
    at += 40 + sum(len(name) + 1 for name in names)
    at += -at % 4 + 8 * n_node
    phones = np.frombuffer(data, [('sequence', '<i4'), ('matrix', '<i4'), ('context', 'u1', 4)], n_phone, at)
    thirds = np.frombuffer(data, '<u2', n_sequence * n_third, at + 12 * n_phone + 4).reshape(-1, n_third)
    phones = phones[n_phoneme:]         # the first have no context
    place, phoneme, left, right = phones['context'].astype(np.int64).T
    keys = context_key(left, phoneme, right, place)
    order = np.argsort(keys)
    return [name.decode() for name in names], keys[order], thirds[phones['sequence'][order]]
