"""
The demo's speech codec: 25 integers a second, fitted in half a minute on a CPU to what espeak-ng's voices say
(data/demo/prepare.py). A big tokeniser (CosyVoice's: s3.py) is made the same way, of more.
"""
import functools
import hashlib
import json
import os

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from common.files import read_json, write_json

N_FFT, WINDOW, HOP, N_MEL = 512, 400, 160, 40   # 25 ms windows every 10 ms
PATCH, CONTEXT = 4, 8       # in 10 ms frames: what a code stands for, and what is looked at on either side
FLOOR = 1e-5                # as a power, 50 dB below the clip's level: what is quieter is silence
SIDE = (WINDOW - HOP) // 2  # samples: centres each window on its 10 ms
# power of the loudest 20 dB of what espeak-ng's voices say, summed over the bands: the median, some -17 dBFS
TYPICAL = 700.0


def mel_filters(sample_rate, low_hz=60.0, high_hz=7600.0):
    """Triangles, equally spaced on the mel scale: (n_bin, n_mel)."""
    low, high = (2595 * np.log10(1 + hz / 700) for hz in (low_hz, high_hz))
    edge_hz = 700 * (10 ** (np.linspace(low, high, N_MEL + 2) / 2595) - 1)
    bin_hz = np.arange(N_FFT // 2 + 1)[:, None] * sample_rate / N_FFT
    rise = (bin_hz - edge_hz[:-2]) / (edge_hz[1:-1] - edge_hz[:-2])
    fall = (edge_hz[2:] - bin_hz) / (edge_hz[2:] - edge_hz[1:-1])
    return torch.tensor(np.maximum(0, np.minimum(rise, fall)), dtype=torch.float32)


def kmeans(x, k, rng, n_iter=15):
    """Lloyd's algorithm from k random points; a cluster that runs empty restarts at a random point."""
    centre = x[torch.as_tensor(rng.choice(len(x), k, replace=False))]
    for _ in range(n_iter):
        near = nearest(x, centre)
        count = torch.bincount(near, minlength=k)[:, None]
        total = torch.zeros_like(centre).index_add_(0, near, x)
        centre = torch.where(count > 0, total / count.clamp(min=1), x[torch.as_tensor(rng.choice(len(x), k))])
    return centre


def nearest(x, centre):
    half = (centre ** 2).sum(1) / 2
    return torch.cat([(half - rows @ centre.T).argmin(1) for rows in x.split(8192)])


class MelCodec:
    """
    25 integers a second of 16 kHz audio, which say what is said and not who says it.

        wave ─ log-mel ─ patches of 40 ms ± 80 ms ─ network ─ 24 numbers, loudness ─ nearest centre ─► code
        code ─ how the assistant's voice sounds there on average ─ Griffin-Lim ─► wave

    The network learns to name the phoneme in the middle of a patch, spoken by many voices over noise. Its
    narrowest layer is clustered. So new voices get the codes of the others; the big tokenisers do the same
    with a recogniser (CosyVoice, arXiv:2407.05407, section 2.1). A whole clip is brought to one level first,
    so gain does not matter.
    """
    name, rate_hz, sample_rate = 'mel', 25.0, 16000

    def __init__(self, arrays, silence_codes):
        self.arrays = arrays    # name -> tensor: all that was learned
        self.n_codes = len(arrays['centre'])
        self.silence_codes = np.array(silence_codes, dtype=np.uint16)
        self.filters = mel_filters(self.sample_rate)
        self.window = torch.hann_window(WINDOW)
        self.settings = dict(name=self.name, rate_hz=self.rate_hz, sample_rate=self.sample_rate,
                             n_codes=self.n_codes, silence_codes=self.silence_codes.tolist())
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for key in sorted(arrays):
            digest.update(arrays[key].numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def describe(self):
        """What a data set or a checkpoint notes of the codec, to be compared before their ids are mixed."""
        keys = ('name', 'rate_hz', 'n_codes', 'sample_rate', 'fingerprint')
        return {key: getattr(self, key) for key in keys}

    def power(self, wave):
        """(n * HOP + 2 SIDE,) -> (n, n_mel)"""
        return torch.fft.rfft(wave.unfold(0, WINDOW, HOP) * self.window, N_FFT).abs().square() @ self.filters

    def log_mel(self, wave):
        """(n_sample,) -> (n_frame * PATCH, n_mel), log power over the clip's level."""
        wave = torch.as_tensor(np.asarray(wave, dtype=np.float32))
        n = -(-len(wave) // (HOP * PATCH)) * PATCH
        power = self.power(F.pad(wave, (SIDE, n * HOP + SIDE - len(wave))))
        loud = power.sum(1)
        level = loud[loud >= 0.01 * loud.max()].mean()      # of the loudest 20 dB: pauses do not count
        return (power / level.clamp(min=1e-8) + FLOOR).log()

    def look(self, mel):
        """(n_frame * PATCH, n_mel) -> (n_frame, (PATCH + 2 CONTEXT) * n_mel), patches with their context."""
        padded = F.pad(mel.T[None], (CONTEXT, CONTEXT), mode='replicate')[0].T
        return padded.unfold(0, PATCH + 2 * CONTEXT, PATCH).flatten(1)

    def embed(self, mel):
        """(n_frame * PATCH, n_mel) -> (n_frame, n_dim + 1): the network's narrow layer, and loudness."""
        return self.place(self.look(mel), mel.exp().sum(1).log().view(-1, PATCH).mean(1, keepdim=True))

    def place(self, look, loud):
        """What look returns, and the log power of each patch's middle (n_frame, 1) -> what embed returns"""
        a = self.arrays
        x = (look - a['mean']) / a['std']
        x = F.relu(F.linear(x, a['0.weight'], a['0.bias']))
        x = F.relu(F.linear(x, a['1.weight'], a['1.bias']))
        x = F.linear(x, a['2.weight'], a['2.bias'])
        return torch.cat([x, a['loudness'] * loud], 1)

    def encode(self, wave):
        """float32 (n_sample,) at 16 kHz -> uint16 (ceil(n_sample / 640),)"""
        if len(wave) == 0:
            return np.empty(0, np.uint16)
        return nearest(self.embed(self.log_mel(wave)), self.arrays['centre']).numpy().astype(np.uint16)

    def encode_many(self, waves):
        return [self.encode(wave) for wave in waves]

    def decode(self, codes):
        """uint16 (n_frame,) -> float32 (n_frame * 640,)"""
        speaker = self.speak()
        return np.concatenate([speaker.push(codes), speaker.finish()])

    def stream(self):
        return MelStream(self)

    def speak(self):
        return MelSpeaker(self)

    @functools.cached_property
    def spectra(self):
        """How each code sounds: (n_codes, PATCH, n_bin), amplitudes"""
        want = (self.arrays['patch'].exp() - FLOOR).clamp(min=1e-9)
        power = want @ self.filters.T
        for _ in range(30):     # undo the mel filters by multiplicative steps, which stay positive
            step = want / (power @ self.filters + 1e-12) @ self.filters.T
            power = power * step / (self.filters.sum(1) + 1e-6)
        return power.sqrt().numpy()

    @classmethod
    def fit(cls, waves, labels, voice, n_codes=512, n_dim=24, width=256, n_epoch=6, loudness=0.6, seed=0):
        """
        waves: clips of many voices. labels: the phoneme of each of their 40 ms, as integers, 0 is silence.
        voice: for each clip, whether it is the voice that decode should have.
        """
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        self = cls({'centre': torch.zeros(n_codes, n_dim + 1)}, [])
        mels = [self.log_mel(wave) for wave in waves]
        x = torch.cat([self.look(mel) for mel in mels])
        y = torch.as_tensor(np.concatenate(labels))
        a = self.arrays = {'mean': x.mean(0), 'std': x.std(0), 'loudness': torch.tensor(loudness)}
        x = (x - a['mean']) / a['std']
        sizes = (x.shape[1], width, width, n_dim, int(y.max()) + 1)
        net = []
        for n_in, n_out in zip(sizes, sizes[1:]):
            net += [(torch.randn(n_out, n_in, generator=generator) * (2 / n_in) ** 0.5).requires_grad_(),
                    torch.zeros(n_out, requires_grad=True)]
        n_step, batch = n_epoch * len(x) // 512, 512
        optimiser = torch.optim.AdamW(net, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=n_step)
        for _ in range(n_step):
            rows = torch.randint(len(x), (batch,), generator=generator)
            h = x[rows] + 0.1 * torch.randn(batch, x.shape[1], generator=generator)
            for i in (0, 2, 4, 6):
                h = F.linear(h, net[i], net[i + 1])
                h = F.relu(h) if i < 4 else h
            loss = F.cross_entropy(h, y[rows], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        for i in range(3):
            a[f'{i}.weight'], a[f'{i}.bias'] = net[2 * i].detach(), net[2 * i + 1].detach()

        mel = torch.cat(mels)
        z = torch.cat([self.embed(clip) for clip in mels])
        keep = (y > 0) | (torch.rand(len(y), generator=generator) < 0.2)    # silence needs few codes
        a['centre'] = kmeans(z[keep], n_codes, rng)
        code = nearest(z, a['centre'])
        mine = torch.as_tensor(np.repeat(voice, [len(label) for label in labels]))
        mean = torch.zeros(n_codes, PATCH * N_MEL)
        for rows in torch.ones_like(mine), mine:    # all voices; where decode's has the code, that one alone
            count = torch.bincount(code[rows], minlength=n_codes)[:, None]
            total = torch.zeros_like(mean).index_add_(0, code[rows], mel.view(-1, PATCH * N_MEL)[rows])
            mean = torch.where(count > 0, total / count.clamp(min=1), mean)
        mean = mean.view(n_codes, PATCH, N_MEL)
        patch = mean.clone().requires_grad_()
        optimiser = torch.optim.Adam([patch], lr=0.1)
        # nudge what a code sounds like until it is heard as that code, in that voice's sentences
        for _ in range(30):
            distance = torch.cdist(self.embed(patch[code[mine]].flatten(0, 1)), a['centre']) ** 2
            loss = F.cross_entropy(-2 * distance, code[mine]) + 0.1 * F.mse_loss(patch, mean)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        a['patch'] = patch.detach()
        count = torch.bincount(code, minlength=n_codes)
        quiet = torch.zeros(n_codes).index_add_(0, code, (y == 0).float()) > 0.5 * count
        digital_silence = self.encode(np.zeros(self.sample_rate))
        return cls(a, np.union1d(np.flatnonzero(quiet.numpy()), digital_silence))

    def save(self, folder):
        os.makedirs(folder, exist_ok=True)
        save_file(self.arrays, os.path.join(folder, 'codec.safetensors'))
        write_json(os.path.join(folder, 'codec.json'), self.settings | {'fingerprint': self.fingerprint})

    @classmethod
    def load(cls, folder):
        settings = read_json(os.path.join(folder, 'codec.json'))
        self = cls(load_file(os.path.join(folder, 'codec.safetensors')), settings['silence_codes'])
        if self.fingerprint != settings['fingerprint']:
            raise ValueError(f'{folder}/codec.safetensors is not the one that codec.json was written with: '
                             'prepare the data again')
        return self


class RunningLevel:
    """
    How loud somebody speaks, as log_mel has it of a clip, but of what was heard so far: the mean of the
    loudest 20 dB of the last 10 s of sound. Sound is what is 6 dB above the noise, so a pause of any length,
    however noisy, leaves the level as it is. Before anything is heard it is 10 dB below that of espeak-ng's
    voices, which suits talkers from 20 dB below to 20 dB above them. This start counts as 30 ms of sound, and
    as nothing once there was 1 s.
    """
    start, quiet = TYPICAL / 10, TYPICAL / 1e4      # 40 dB below espeak-ng nobody speaks
    sound_db, rise_db_sec, n_hop = 6.0, 3.0, 1000   # the noise is the lowest power; it may rise by 3 dB/s

    def __init__(self):
        self.heard, self.noise, self.level = [], np.inf, self.start

    def hear(self, loud):
        """power of a few hops, summed over the bands"""
        for power in loud.tolist():
            self.noise = max(self.quiet, min(power, self.noise * 10 ** (self.rise_db_sec * HOP / 16000 / 10)))
            # A bang counts as 10 dB above the level, as loud vowels are,
            # lest all else seem silent beside it; but at first a level that is too low has to rise at once
            if power > self.noise * 10 ** (self.sound_db / 10):
                self.heard.append(min(power, (10 if len(self.heard) >= 100 else 100) * self.level))
        if self.heard:
            del self.heard[:-self.n_hop]
            speech = np.array(self.heard)
            speech = speech[speech >= 0.01 * speech.max()]
            weight = 3 * max(0, 1 - len(speech) / 100)
            self.level = (speech.sum() + weight * self.start) / (len(speech) + weight)


class MelStream:
    """
    MelCodec.encode as the samples come (streaming.py). A code is sure 87.5 ms after the end of its 40 ms: the
    80 ms that the network looks ahead, and what a window has more than its hop. encode brings a whole clip to
    its level; here the clip has no end yet, and RunningLevel takes its place. Nothing else is different.
    """
    lookahead_sec = (CONTEXT * HOP + SIDE) / MelCodec.sample_rate

    def __init__(self, codec):
        self.codec, self.level = codec, RunningLevel()
        self.wave, self.n_sample, self.n_code = np.zeros(SIDE, np.float32), 0, 0
        self.power = None       # of the last PATCH + 2 CONTEXT hops

    def push(self, samples):
        self.wave = np.concatenate([self.wave, np.asarray(samples, np.float32)])
        self.n_sample += len(samples)
        codes, n = [], PATCH * HOP
        while len(self.wave) >= n + 2 * SIDE:       # always four hops at once, so rounding is always the same
            power = self.codec.power(torch.from_numpy(self.wave[:n + 2 * SIDE]))
            self.wave = self.wave[n:]
            self.level.hear(power.sum(1))
            codes += self.look(power)
        return np.array(codes, np.uint16)

    def look(self, power):
        """The next four hops -> [the code of the four that now have their context]"""
        if self.power is None:
            self.power = power[:1].expand(CONTEXT, -1)
        self.power = torch.cat([self.power, power])[-(PATCH + 2 * CONTEXT):]
        if len(self.power) < PATCH + 2 * CONTEXT:
            return []
        mel = (self.power / self.level.level + FLOOR).log()
        loud = mel[CONTEXT:CONTEXT + PATCH].exp().sum(1).log().mean()
        self.n_code += 1
        return nearest(self.codec.place(mel.T.reshape(1, -1), loud.view(1, 1)),
                       self.codec.arrays['centre']).tolist()

    def finish(self):
        n_frame = -(-self.n_sample // (PATCH * HOP))
        codes = self.push(np.zeros(n_frame * PATCH * HOP - self.n_sample + SIDE)).tolist() if n_frame else []
        while self.n_code < n_frame:
            codes += self.look(self.power[-1:].expand(PATCH, -1))
        return np.array(codes, np.uint16)


class MelSpeaker:
    """
    MelCodec.decode as the codes come: Griffin-Lim, 40 ms by 40 ms. The phases of a hop begin as if what was
    said before went on, settle with those of the other hops of its code, and stay: nothing waits for the next
    code. lookahead_sec: samples are sure 7.5 ms after their code, as a window reaches that far beyond it.
    """
    n_iter, past = 8, 2         # past: earlier hops whose windows reach into the next one's
    lookahead_sec = SIDE / MelCodec.sample_rate

    def __init__(self, codec):
        self.spectra, self.window, self.rng = codec.spectra, codec.window.numpy(), np.random.default_rng(0)
        self.target = np.empty((0, N_FFT // 2 + 1), np.float32)     # amplitudes, a row a hop
        self.phase = self.target.astype(np.complex64)               # of length 1
        # sum of overlapping windows, and of their weights, from the first sample on that is not out
        self.wave, self.weight, self.skip = *np.zeros((2, WINDOW - HOP), np.float32), SIDE

    def push(self, codes):
        return np.concatenate([np.empty(0, np.float32), *map(self.say, np.asarray(codes, np.int64))])

    def finish(self):
        # the last window reaches 2 SIDE beyond its hop, the last half of it beyond the last code
        return loud_enough(self.wave, self.weight)[:SIDE] if len(self.target) else np.empty(0, np.float32)

    def frames(self, hops=slice(None)):
        """Windows of the hops that have their phases"""
        wave = np.fft.irfft(self.target[:len(self.phase)][hops] * self.phase[hops], N_FFT)[:, :WINDOW]
        return (wave * self.window).astype(np.float32)

    def phases(self, first, more=()):
        """What the phases are from hop `first` on in the sum of all windows, with more samples behind it"""
        wave = add_up(self.frames()) / add_up([self.window ** 2] * len(self.phase)).clip(0.01)
        wave = np.lib.stride_tricks.sliding_window_view(np.concatenate([wave, more]), WINDOW)[::HOP][first:]
        phase = np.fft.rfft(wave * self.window, N_FFT)
        return (phase / np.abs(phase).clip(1e-12)).astype(np.complex64)

    def say(self, code):
        """-> its 40 ms, later by the half window that is still open"""
        n_past = len(self.target)
        self.target = np.concatenate([self.target, self.spectra[code]])
        for hop in range(n_past, n_past + PATCH):   # faint noise goes on for silence: its phases are random
            more = 1e-6 * self.rng.standard_normal(HOP)
            self.phase = np.concatenate([self.phase, self.phases(hop, more)])
        for _ in range(self.n_iter):    # keep the amplitudes, let the phases follow from the wave
            self.phase[n_past:] = self.phases(n_past)
        n = PATCH * HOP
        self.wave = np.pad(self.wave, (0, n)) + add_up(self.frames(slice(n_past, None)))
        self.weight = np.pad(self.weight, (0, n)) + add_up([self.window ** 2] * PATCH)
        out = loud_enough(self.wave[:n], self.weight[:n])[self.skip:]
        self.wave, self.weight, self.skip = self.wave[n:], self.weight[n:], 0
        self.target, self.phase = self.target[-self.past:], self.phase[-self.past:]
        return out


def add_up(frames):
    """n windows, HOP apart -> (n * HOP + WINDOW - HOP,)"""
    wave = np.zeros(len(frames) * HOP + WINDOW - HOP, np.float32)
    for i, frame in enumerate(frames):
        wave[i * HOP:i * HOP + WINDOW] += frame
    return wave


def loud_enough(wave, weight):
    """Codes tell of a level of 1. What is heard is 6 dB below espeak-ng's, so that no peak is cut off."""
    return (0.5 * TYPICAL ** 0.5 * wave / weight.clip(0.01)).clip(-1, 1)
