"""
The demo's speech codec: 25 integers a second, fitted in half a minute on a CPU to what espeak-ng's voices say
(data/demo/prepare.py). A big tokeniser (CosyVoice's: s3.py) is made the same way, of more.
"""
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

    def log_mel(self, wave):
        """(n_sample,) -> (n_frame * PATCH, n_mel), log power over the clip's level."""
        wave = torch.as_tensor(np.asarray(wave, dtype=np.float32))
        n = -(-len(wave) // (HOP * PATCH)) * PATCH
        side = (WINDOW - HOP) // 2      # centres each window on its 10 ms
        wave = F.pad(wave, (side, n * HOP + side - len(wave)))
        power = torch.fft.rfft(wave.unfold(0, WINDOW, HOP) * self.window, N_FFT).abs().square() @ self.filters
        loud = power.sum(1)
        level = loud[loud >= 0.01 * loud.max()].mean()      # of the loudest 20 dB: pauses do not count
        return (power / level.clamp(min=1e-8) + FLOOR).log()

    def look(self, mel):
        """(n_frame * PATCH, n_mel) -> (n_frame, (PATCH + 2 CONTEXT) * n_mel), patches with their context."""
        padded = F.pad(mel.T[None], (CONTEXT, CONTEXT), mode='replicate')[0].T
        return padded.unfold(0, PATCH + 2 * CONTEXT, PATCH).flatten(1)

    def embed(self, mel):
        """(n_frame * PATCH, n_mel) -> (n_frame, n_dim + 1): the network's narrow layer, and loudness."""
        a = self.arrays
        x = (self.look(mel) - a['mean']) / a['std']
        x = F.relu(F.linear(x, a['0.weight'], a['0.bias']))
        x = F.relu(F.linear(x, a['1.weight'], a['1.bias']))
        x = F.linear(x, a['2.weight'], a['2.bias'])
        loud = mel.exp().sum(1).log().view(-1, PATCH).mean(1, keepdim=True)
        return torch.cat([x, a['loudness'] * loud], 1)

    def encode(self, wave):
        """float32 (n_sample,) at 16 kHz -> uint16 (ceil(n_sample / 640),)"""
        if len(wave) == 0:
            return np.empty(0, np.uint16)
        return nearest(self.embed(self.log_mel(wave)), self.arrays['centre']).numpy().astype(np.uint16)

    def encode_many(self, waves):
        return [self.encode(wave) for wave in waves]

    def decode(self, codes, n_iter=32):
        """uint16 (n_frame,) -> float32 (n_frame * 640,)"""
        if len(codes) == 0:
            return np.empty(0, np.float32)
        mel = self.arrays['patch'][torch.as_tensor(np.asarray(codes, dtype=np.int64))].flatten(0, 1)
        want = (mel.exp() - FLOOR).clamp(min=1e-9)
        power = want @ self.filters.T       # (n_frame * PATCH, n_bin)
        for _ in range(30):     # undo the mel filters by multiplicative steps, which stay positive
            step = want / (power @ self.filters + 1e-12) @ self.filters.T
            power = power * step / (self.filters.sum(1) + 1e-6)
        target = F.pad(power.sqrt().T, (0, 1))      # (n_bin, n_frame * PATCH + 1)
        stft = dict(n_fft=N_FFT, hop_length=HOP, win_length=WINDOW, window=self.window)
        uniform = torch.rand(target.shape, generator=torch.Generator().manual_seed(0))
        phase = torch.exp(2j * torch.pi * uniform)
        for _ in range(n_iter):     # Griffin-Lim: keep the loudness, let the phase settle
            wave = torch.istft(target * phase, **stft, length=len(mel) * HOP)
            again = torch.stft(wave, **stft, return_complex=True)
            phase = again / again.abs().clamp(min=1e-8)
        wave = torch.istft(target * phase, **stft, length=len(mel) * HOP)
        # istft centres a frame on its start, log_mel on its middle
        wave = F.pad(wave, (HOP // 2, -(HOP // 2)))
        return (0.7 * wave / wave.abs().max().clamp(min=0.7)).numpy()

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
