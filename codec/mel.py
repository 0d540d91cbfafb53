"""
The demo's speech codec: 25 integers a second, fitted in a minute and a half on a CPU to voices
that data/demo/prepare.py draws. A big tokeniser (CosyVoice's: s3.py) is made the same way, of more.
"""
import functools
import hashlib
import json
import os

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from codec.embedding import HIGH_HZ, LOW_HZ, N_BAND, N_HOP, SpeechEmbedding, slaney
from common.device import Place, pick_dtype
from common.files import read_json, write_json

N_FFT, WINDOW, HOP, N_MEL = 512, 400, 160, 40   # 25 ms windows every 10 ms
PATCH, CONTEXT = 4, 8       # in 10 ms frames: what a code stands for, and what is heard of what comes next
FLOOR = 1e-5                # as a power, 50 dB below the level: what is quieter is silence
SIDE = (WINDOW - HOP) // 2  # samples: centres each window on its 10 ms
HANN = torch.hann_window(WINDOW).numpy()
# what espeak-ng's voices keep up for 120 ms, as a power summed over the bands: the median, some -18 dBFS
TYPICAL = 640.0
# logarithms of the level before anybody has spoken, 10 dB below espeak-ng's voices, and of the lowest one
START, LOWEST = np.log(TYPICAL / 10), np.log(TYPICAL / 1000)
FALL = 0.04 * np.log(10) / 10   # per 40 ms: 1 dB a second


def mel_edges(low_hz=60.0, high_hz=7600.0):
    """Of N_MEL bands, equally spaced on the mel scale; a band's center is the edge of its neighbours."""
    low, high = (2595 * np.log10(1 + hz / 700) for hz in (low_hz, high_hz))
    return 700 * (10 ** (np.linspace(low, high, N_MEL + 2) / 2595) - 1)


def mel_filters(sample_rate):
    """Triangles: (n_bin, n_mel)."""
    edge_hz = mel_edges()
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


def evenly(z, label):
    """
    Distances should tell what is said, not by whom. Rows of z (n, n_dim), with what is said in each as
    integers (n, n_label) -> a matrix (n_dim, n_dim). In z @ matrix, rows in which the same is said differ as
    much in one direction as in any other, and all rows as much as before. Linear discriminant analysis
    begins so, too.
    """
    label = torch.unique(label, dim=0, return_inverse=True)[1]
    count = torch.bincount(label)[:, None]
    mean = torch.zeros(len(count), z.shape[1]).index_add_(0, label, z) / count
    value, vector = torch.linalg.eigh(torch.cov((z - mean[label]).T))
    white = vector * value.clamp(min=1e-6 * value.max()) ** -0.5 @ vector.T
    return white * (z.std(0).norm() / (z @ white).std(0).norm())


def to_bands():
    """log-mel of a hop (n_mel,) @ matrix (n_mel, N_BAND) + (N_BAND,) is what SpeechEmbedding takes: both have
    about the same bands, so those of ours that lie around one of its are enough"""
    edge_hz = mel_edges()
    center, wide_hz = slaney(edge_hz[1:-1]), edge_hz[2:] - edge_hz[:-2]
    theirs = np.linspace(slaney(LOW_HZ), slaney(HIGH_HZ), N_BAND + 2)[1:-1]
    share = np.stack([np.interp(theirs, center, row) for row in np.eye(N_MEL)])
    # its triangles have an area of 1, ours a height of 1; its samples are integers
    scale = np.log10(2 / wide_hz) @ share + np.log10(TYPICAL * 2 ** 30) + 2
    return torch.tensor(share / np.log(10)).float(), torch.tensor(scale).float()


TO_BANDS = to_bands()


class Network(torch.nn.Module):
    """
    What is said, 25 times a second, whoever says it. It has heard all before, and 80 ms of what follows.

        120 ms of log-mel ───────────────┬─ two layers ─┬─ GRU ─┬─ 24 numbers
        0.4 s of it ── SpeechEmbedding ──┘              └───────┘
    """

    def __init__(self, width=192, n_dim=24, embedding=None):
        super().__init__()
        self.embedding = embedding
        n_in = N_MEL, embedding.n_out if embedding else 0
        for name, n in zip(('mel', 'heard'), n_in):
            self.register_buffer(f'{name}_mean', torch.zeros(n))
            self.register_buffer(f'{name}_std', torch.ones(n))
        self.first = torch.nn.Linear((PATCH + CONTEXT) * n_in[0] + n_in[1], width)
        self.second = torch.nn.Linear(width, width)
        self.past = torch.nn.GRU(width, width, batch_first=True)
        self.narrow = torch.nn.Linear(2 * width, n_dim)

    @torch.no_grad()
    def hear(self, mel, before=None):
        """(n_clip, n_frame, PATCH + CONTEXT, n_mel) -> what the embedding makes of it
        (n_clip, n_frame, n_heard); the hops that it needs of these for what comes next"""
        if not self.embedding:
            return mel.new_empty(*mel.shape[:2], 0), None
        if before is None:      # there was nothing else than the first hop, on and on
            first = mel[:, 0, :1].expand(-1, N_HOP - PATCH - CONTEXT, -1)
            before = torch.cat([first, mel[:, 0, :CONTEXT]], 1)
        # each hop over the level when it was heard first: (n_clip, N_HOP - PATCH + n_frame * PATCH, n_mel)
        hops = torch.cat([before, mel[:, :, CONTEXT:].flatten(1, 2)], 1)
        matrix, scale = TO_BANDS
        return self.embedding(hops @ matrix + scale), hops[:, PATCH - N_HOP:]

    def tell(self, mel, heard, past=None):
        """-> (n_clip, n_frame, n_dim), state of the GRU"""
        x = torch.cat([((mel - self.mel_mean) / self.mel_std).flatten(2),
                       (heard - self.heard_mean) / self.heard_std], 2)
        x = F.relu(self.second(F.relu(self.first(x))))
        after, past = self.past(x, past)
        return self.narrow(torch.cat([after, x], 2)), past


def hops(wave):
    """(n * HOP + 2 SIDE,) -> power (n, n_bin)"""
    return torch.fft.rfft(wave.unfold(0, WINDOW, HOP) * torch.hann_window(WINDOW), N_FFT).abs().square()


def spectrum(wave):
    """float32 (n_sample,) at 16 kHz -> power (n_frame * PATCH, n_bin), filled up with zeros"""
    n = -(-len(wave) // (HOP * PATCH)) * PATCH
    wave = torch.as_tensor(np.asarray(wave, dtype=np.float32))
    return hops(F.pad(wave, (SIDE, n * HOP + SIDE - len(wave))))


def look(power, level=START):
    """
    (n_frame * PATCH + CONTEXT, n_mel) -> log power over the level (n_frame, PATCH + CONTEXT, n_mel), and the
    level afterwards.

    The level is the highest that a sound has kept up for 120 ms so far, so a bang does not count. It falls by
    1 dB a second. A code knows of nothing that comes later than its 80 ms, so a stream and a whole clip get
    the same.
    """
    heard = power.unfold(0, PATCH + CONTEXT, PATCH).transpose(1, 2)
    fallen = FALL * torch.arange(1, len(heard) + 1)
    loud = heard.sum(2).unflatten(1, (-1, PATCH)).mean(2).amin(1).clamp(min=1e-20).log() + fallen
    levels = torch.cummax(torch.cat([torch.tensor([level], dtype=loud.dtype), loud]), 0).values[1:] - fallen
    levels = levels.clamp(min=LOWEST)
    return (heard / levels.exp()[:, None, None] + FLOOR).log(), float(levels[-1])


def look_at_clip(power):
    """A whole clip: what comes after it is its last hop, on and on."""
    return look(torch.cat([power, power[-1:].expand(CONTEXT, -1)]))[0]


def padded(clips, n):
    """n_clip arrays of (n_frame, ...) -> (n_clip, n, ...), filled up with what comes last in each"""
    ends = (clip[-1:].expand(n - len(clip), *clip.shape[1:]) for clip in clips)
    return torch.stack([torch.cat(parts) for parts in zip(clips, ends)])


class MelCodec:
    """
    25 integers a second of 16 kHz audio, which say what is said and not who says it.

        wave ─ log-mel over a running level ─ network ─ 24 numbers, loudness ─ nearest centre ─► code
        code ─ how the assistant's voice sounds there on average ─ Griffin-Lim ─► wave

    The network learns to name the phoneme and the word that is being said, by many voices, in rooms, over
    noise. Its narrowest layer is clustered. So new voices get the codes of the others; the big tokenisers do
    the same with a recogniser (CosyVoice, arXiv:2407.05407, section 2.1).
    """
    name, rate_hz, sample_rate = 'mel', 25.0, 16000

    def __init__(self, arrays, silence_codes):
        self.arrays = arrays    # name -> tensor: all that was learned
        self.n_codes = len(arrays['centre'])
        self.silence_codes = np.array(silence_codes, dtype=np.uint16)
        self.filters = mel_filters(self.sample_rate)
        weights = {key.removeprefix('network.'): x for key, x in arrays.items() if key.startswith('network.')}
        with torch.device('meta'):      # draws no random numbers, which a run that listens would miss
            embedding = SpeechEmbedding() if len(weights['heard_mean']) else None
            self.network = Network(len(weights['second.bias']), len(weights['narrow.bias']), embedding)
        self.network.load_state_dict(weights, assign=True)
        self.network.requires_grad_(False)
        if embedding:
            embedding.fast()
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

    def vectors(self):
        return self.arrays['centre']

    def place(self, mel, heard, past=None):
        """What Network.tell takes -> its narrow layer and the patch's loudness (n_clip, n_frame, n_dim + 1),
        the state of its GRU"""
        x, past = self.network.tell(mel, heard, past)
        loud = mel[:, :, :PATCH].exp().sum(3).log().mean(2)
        return torch.cat([x, self.arrays['loudness'] * loud[..., None]], 2), past

    def place_many(self, mels, heards, n_clip=32):
        """Of clips of any length, n_clip at a time"""
        for at in range(0, len(mels), n_clip):
            some = [each[at:at + n_clip] for each in (mels, heards)]
            n = max(map(len, some[0]))
            z = self.place(*(padded(each, n) for each in some))[0]
            yield from (row[:len(mel)] for row, mel in zip(z, some[0]))

    def encode_power(self, powers):
        """Clips of power (n_frame * PATCH, n_mel) -> [uint16 (n_frame,)]"""
        mels = [look_at_clip(power) for power in powers]
        heards = [self.network.hear(mel[None])[0][0] for mel in mels]
        return [nearest(z, self.arrays['centre']).numpy().astype(np.uint16)
                for z in self.place_many(mels, heards)]

    def encode(self, wave):
        """float32 (n_sample,) at 16 kHz -> uint16 (ceil(n_sample / 640),)"""
        stream, block = self.stream(), 60 * self.sample_rate        # hours take no more memory than a minute
        parts = [stream.push(wave[at:at + block]) for at in range(0, len(wave), block)]
        return np.concatenate([*parts, stream.finish()])

    def encode_many(self, waves):
        """The same of many clips, up to rounding. Side by side: a GRU takes as long for one as for a few"""
        codes = iter(self.encode_power([spectrum(wave) @ self.filters for wave in waves if len(wave)]))
        return [next(codes) if len(wave) else np.empty(0, np.uint16) for wave in waves]

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
    def fit(cls, powers, labels, voice, embedding=None, n_codes=512, n_dim=24, width=192, n_epoch=6, seed=0):
        """
        powers: clips of many voices, (n_frame * PATCH, n_mel). labels: what is said in each of their 40 ms,
        as integers (n_frame, n_label): the phoneme, 0 is silence; and what else should be told, such as the
        word. voice: for each clip, whether it is the voice that decode should have. embedding: a
        SpeechEmbedding to hear through, too; None: log-mel has to do.
        """
        from tqdm import tqdm  # who only encodes and decodes does not need it
        mels = [look_at_clip(power) for power in powers]
        labels = [torch.as_tensor(label) for label in labels]
        # a GRU's steps are small: a second thread would wait for them, spinning beside whatever else runs
        n_thread = torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = Network(width, n_dim, embedding)
            # the embedding learns nothing, so it is asked once
            clips = tqdm(mels, desc='hearing the clips', unit='clip', mininterval=1)
            heards = [network.hear(mel[None])[0][0] for mel in clips]
            learn(mels, heards, labels, network, n_epoch)
        torch.set_num_threads(n_thread)
        a = {f'network.{key}': x for key, x in network.state_dict().items()}
        a |= {'loudness': torch.tensor(0.6), 'centre': torch.zeros(n_codes, n_dim + 1)}
        self, rng = cls(a, []), np.random.default_rng(seed)
        z, label = torch.cat(list(self.place_many(mels, heards))), torch.cat(labels)
        phoneme = label[:, 0]
        change = evenly(z[phoneme > 0, :-1], label[phoneme > 0])
        z[:, :-1] = z[:, :-1] @ change
        for key in 'weight', 'bias':        # from now on the network's last layer makes them so
            x = a[f'network.narrow.{key}']
            x.copy_(change.T @ x)
        # silence needs few codes
        keep = rng.permutation(np.flatnonzero((phoneme > 0).numpy() | (rng.random(len(phoneme)) < 0.2)))
        a['centre'] = kmeans(z[keep[:400 * n_codes]], n_codes, rng)
        code = nearest(z, a['centre'])
        mine = torch.as_tensor(np.repeat(voice, [len(mel) for mel in mels]))
        patches = torch.cat([mel[:, :PATCH] for mel in mels])
        mean = torch.zeros(n_codes, PATCH, N_MEL)
        for rows in torch.ones_like(mine), mine:    # all voices; where decode's has the code, that one alone
            count = torch.bincount(code[rows], minlength=n_codes)[:, None, None]
            total = torch.zeros_like(mean).index_add_(0, code[rows], patches[rows])
            mean = torch.where(count > 0, total / count.clamp(min=1), mean)
        each = code.split([len(mel) for mel in mels])
        a['patch'] = self.nudge(mean, [codes for codes, is_mine in zip(each, voice) if is_mine])
        count = torch.bincount(code, minlength=n_codes)
        quiet = torch.zeros(n_codes).index_add_(0, code, (phoneme == 0).float()) > 0.5 * count
        digital_silence = self.encode(np.zeros(self.sample_rate))
        return cls(a, np.union1d(np.flatnonzero(quiet.numpy()), digital_silence))

    def nudge(self, mean, clips, n_step=30):
        """What a code sounds like, moved until it is heard as that code in the voice's sentences (codes)"""
        patch, longest = mean.clone().requires_grad_(), max(map(len, clips))
        code = padded(clips, longest)
        optimiser = torch.optim.Adam([patch], lr=0.1)
        for _ in range(n_step):
            hops = patch[code].flatten(1, 2)        # (n_clip, longest * PATCH, n_mel)
            hops = torch.cat([hops, hops[:, -1:].expand(-1, CONTEXT, -1)], 1)
            mel = hops.unfold(1, PATCH + CONTEXT, PATCH).transpose(2, 3)
            z = self.place(mel, self.network.hear(mel)[0])[0]
            distance = torch.cdist(z.flatten(0, 1), self.arrays['centre']) ** 2
            loss = F.cross_entropy(-2 * distance, code.flatten()) + 0.1 * F.mse_loss(patch, mean)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return patch.detach()

    def save(self, folder):
        os.makedirs(folder, exist_ok=True)
        # the embedding's lie in another order (fast), which a file cannot have
        arrays = {name: x.contiguous() for name, x in self.arrays.items()}
        save_file(arrays, os.path.join(folder, 'codec.safetensors'))
        write_json(os.path.join(folder, 'codec.json'), self.settings | {'fingerprint': self.fingerprint})

    @classmethod
    def load(cls, folder):
        settings = read_json(os.path.join(folder, 'codec.json'))
        arrays = load_file(os.path.join(folder, 'codec.safetensors'))
        try:
            self = cls(arrays, settings['silence_codes'])
        except (KeyError, RuntimeError) as error:       # another version's, or damaged
            raise ValueError(f'{folder}/codec.safetensors is not the codec that this version makes '
                             f'({" ".join(str(error).split())}): prepare the data again') from None
        if self.fingerprint != settings['fingerprint']:
            raise ValueError(f'{folder}/codec.safetensors is not the one that codec.json was written with: '
                             'prepare the data again')
        return self


def learn(mels, heards, labels, network, n_epoch, batch=48):
    """The network, trained to name what is said: one linear layer a label on top of its narrowest one."""
    from tqdm import tqdm  # who only encodes and decodes does not need it
    everything = {'mel': [mel[:, 0] for mel in mels]} | ({'heard': heards} if network.embedding else {})
    for name, rows in everything.items():
        std, mean = torch.std_mean(torch.cat(rows), 0)
        getattr(network, f'{name}_mean').copy_(mean)
        getattr(network, f'{name}_std').copy_(std.clamp(min=1e-3))
    sizes = torch.cat(labels).amax(0) + 1
    heads = torch.nn.ModuleList(torch.nn.Linear(network.narrow.out_features, int(n)) for n in sizes)
    parameters = [x for name, x in network.named_parameters() if not name.startswith('embedding.')]
    parameters += heads.parameters()
    n_step = max(200, n_epoch * -(-len(mels) // batch))
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=n_step)
    by_length = torch.tensor([len(mel) for mel in mels]).argsort()
    autocast = Place(torch.device('cpu'), pick_dtype('auto', torch.device('cpu'))).autocast
    for _ in tqdm(range(n_step), desc='fitting the codec', unit='step', mininterval=1):
        # clips of about the same length, so that little of a batch is filling
        at = int(torch.randint(len(mels), ()))
        rows = by_length[max(0, at - 2 * batch):at + 2 * batch]
        rows = rows[torch.randperm(len(rows))[:batch]].tolist()
        n = max(len(mels[i]) for i in rows)
        with autocast():
            x = network.tell(*(padded([each[i] for i in rows], n) for each in (mels, heards)))[0].float()
        real = torch.arange(n) < torch.tensor([len(mels[i]) for i in rows])[:, None]
        y = padded([labels[i] for i in rows], n)[real]
        loss = sum(F.cross_entropy(head(x[real]), named, label_smoothing=0.1)
                   for head, named in zip(heads, y.T))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
    network.requires_grad_(False)


class MelStream:
    """
    MelCodec.encode as the samples come (streaming.py), with the same codes but for rounding. A code is sure
    87.5 ms after the end of its 40 ms: the 80 ms that the network looks ahead, and what a window has more
    than its hop.
    """
    lookahead_sec = (CONTEXT * HOP + SIDE) / MelCodec.sample_rate

    def __init__(self, codec):
        self.codec, self.level, self.before, self.past = codec, START, None, None
        self.wave, self.n_sample = np.zeros(SIDE, np.float32), 0
        self.power = torch.empty(0, N_MEL)      # of the hops from the next code's first on

    def push(self, samples):
        self.wave = np.concatenate([self.wave, np.asarray(samples, np.float32)])
        self.n_sample += len(samples)
        n_hop = (len(self.wave) - 2 * SIDE) // HOP
        if n_hop < 1:
            return np.empty(0, np.uint16)
        power = hops(torch.from_numpy(self.wave[:n_hop * HOP + 2 * SIDE])) @ self.codec.filters
        self.wave = self.wave[n_hop * HOP:]
        return self.codes(power)

    def missing(self, n):
        n_hop = n * PATCH + CONTEXT - len(self.power)
        return n_hop * HOP + 2 * SIDE - len(self.wave)

    def codes(self, power):
        """The next hops -> the codes that now have their context"""
        self.power = torch.cat([self.power, power])
        n_code = (len(self.power) - CONTEXT) // PATCH
        if n_code < 1:
            return np.empty(0, np.uint16)
        mel, self.level = look(self.power[:n_code * PATCH + CONTEXT], self.level)
        self.power = self.power[n_code * PATCH:]
        heard, self.before = self.codec.network.hear(mel[None], self.before)
        z, self.past = self.codec.place(mel[None], heard, self.past)
        return nearest(z[0], self.codec.arrays['centre']).numpy().astype(np.uint16)

    def finish(self):
        if self.n_sample == 0:
            return np.empty(0, np.uint16)
        last = self.push(np.zeros(-self.n_sample % (PATCH * HOP) + SIDE))
        return np.concatenate([last, self.codes(self.power[-1:].expand(CONTEXT, -1))])


class MelSpeaker:
    """
    MelCodec.decode as the codes come: Griffin-Lim, 40 ms by 40 ms. The phases of a hop begin as if what was
    said before went on, settle with those of the other hops of its code, and stay: nothing waits for the next
    code. lookahead_sec: samples are sure 7.5 ms after their code, as a window reaches that far beyond it.
    """
    n_iter = 4      # 8: 0.4 dB nearer to what codes say, in half as much time again
    lookahead_sec = SIDE / MelCodec.sample_rate

    def __init__(self, codec):
        self.spectra, self.silence_codes = codec.spectra, {*codec.silence_codes.tolist()}
        self.rng = np.random.default_rng(0)
        # sum of overlapping windows, and of their weights, from the first sample on that is not out
        self.wave, self.weight, self.skip = *np.zeros((2, WINDOW - HOP), np.float32), SIDE

    def push(self, codes):
        return np.concatenate([np.empty(0, np.float32), *map(self.say, np.asarray(codes, np.int64))])

    def finish(self):
        # the last window reaches 2 SIDE beyond its hop, the last half of it beyond the last code
        return loud_enough(self.wave, self.weight)[:SIDE] if self.weight.any() else np.empty(0, np.float32)

    def say(self, code):
        """-> its 40 ms, later by the half window that is still open"""
        n, target = PATCH * HOP, self.spectra[code]         # (PATCH, n_bin), amplitudes
        past, weight = np.pad(self.wave, (0, n)), np.pad(self.weight, (0, n))
        wave = past.copy()
        for at, amplitude in zip(range(0, n, HOP), target):
            window = slice(at, at + WINDOW)
            begun = wave[window] / weight[window].clip(0.01)
            begun[-HOP:] = 1e-6 * self.rng.standard_normal(HOP)     # so that silence has random phases
            wave[window] += sound_of(amplitude, begun)
            weight[window] += HANN ** 2
        # keep the amplitudes, let the phases follow from the wave; nobody hears the phases of silence
        for _ in range(0 if code in self.silence_codes else self.n_iter):
            wave = past + add_up(sound_of(target, (wave / weight.clip(0.01))[WINDOWS]))
        out = loud_enough(wave[:n], weight[:n])[self.skip:]
        self.wave, self.weight, self.skip = wave[n:], weight[n:], 0
        return out


# the samples of a code's windows
WINDOWS = np.arange(PATCH)[:, None] * HOP + np.arange(WINDOW)


def sound_of(amplitude, wave):
    """Windows with these amplitudes (…, n_bin), and with the phases of wave (…, WINDOW)"""
    x = np.fft.rfft(wave * HANN, N_FFT)
    return np.fft.irfft(x * (amplitude / np.abs(x).clip(1e-12)), N_FFT)[..., :WINDOW] * HANN


def add_up(frames):
    """n windows, HOP apart -> (n * HOP + WINDOW - HOP,)"""
    wave = np.zeros(len(frames) * HOP + WINDOW - HOP, np.float32)
    for i, frame in enumerate(frames):
        wave[i * HOP:i * HOP + WINDOW] += frame
    return wave


def loud_enough(wave, weight):
    """Codes tell of a level of 1. What is heard is 6 dB below espeak-ng's, so that no peak is cut off."""
    return (0.5 * TYPICAL ** 0.5 * wave / weight.clip(0.01)).clip(-1, 1)
