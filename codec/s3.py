"""
CosyVoice's speech tokens, which the paper uses. S3Codec encodes here. To decode it asks CosyVoice, which runs
in an environment of its own (worker.py talks to cosyvoice_worker.py).

    python -m codec s3 --checkpoint=speech_tokenizer_v1.onnx --out=codecs/s3

    pip install --no-deps s3tokenizer==0.3.0; pip install onnx einops protobuf ml_dtypes tqdm soundfile soxr
"""
import hashlib
import importlib.machinery
import json
import math
import os
import shlex
import sys
import tempfile
import types
import uuid
from collections import namedtuple

import numpy as np
import torch
from torch.nn import functional as F

from codec.streaming import Windows
from codec.worker import Worker
from common.audio import read_audio
from common.files import read_json, write_json

# model is s3tokenizer's name for it, sha256 its published file's (s3tokenizer 0.3.0), silence_codes what
# others found: see S3Codec.create
Variant = namedtuple('Variant', 'model rate_hz n_codes sha256 silence_codes')
VARIANTS = {
    'v1_25hz': Variant('speech_tokenizer_v1_25hz', 25.0, 4096,
                       '56285ddd4a83e883ee0cb9f8d69c1089b53a94b1f78ff7e4a0224a27eb4cb486', []),
    'v1_50hz': Variant('speech_tokenizer_v1', 50.0, 4096,
                       '23b5a723ed9143aebfd9ffda14ac4c21231f31c35ef837b6a13bb9e5488abb1e', []),
    'v2_25hz': Variant('speech_tokenizer_v2_25hz', 25.0, 6561,
                       'd43342aa12163a80bf07bffb94c9de2e120a8df2f9917cd2f642e7f4219c6f71', [4218]),
    'v3_25hz': Variant('speech_tokenizer_v3_25hz', 25.0, 6561,
                       '23236a74175dbdda47afc66dbadd5bcb41303c467a57c261cb8539ad9db9208d',
                       [1, 2, 28, 29, 55, 248, 494, 2241, 2242, 2322, 2323]),
}
# of 10 ms: the encoder has 30 s of positions; 2 s at each inner end are not trusted
WINDOW_FRAMES, OVERLAP_FRAMES = 3000, 400
# of a stream. v1 counts positions from where a window begins, so there it begins where encode's does. The
# other two are a quarter of a second's look-ahead
BEFORE_SEC, AFTER_SEC, STEP_SEC = {'v1': 28.0, 'v2': 10.0, 'v3': 10.0}, 0.2, 0.08
# encoded at once: v1_50hz holds 180 MB of attention scores for each 30 s
BATCH_FRAMES = 8 * WINDOW_FRAMES


def commands_file():
    """Of the user: the vocoders' commands that were given here, a line of JSON each. codec.json has one, too,
    but a checkpoint comes from anybody, and no file that is loaded may start a program."""
    config = os.environ.get('XDG_CONFIG_HOME') or os.path.expanduser('~/.config')
    return os.path.join(config, 'nanoduplex', 'vocoders')


def is_known(command):
    if not os.path.isfile(commands_file()):
        return False
    with open(commands_file(), encoding='utf-8') as file:
        return json.dumps(command) in file.read().splitlines()


def remember(command):
    if is_known(command):
        return
    try:
        os.makedirs(os.path.dirname(commands_file()), mode=0o700, exist_ok=True)
        with open(commands_file(), 'a', encoding='utf-8') as file:
            file.write(json.dumps(command) + '\n')
    except OSError as error:
        print(f'note: the vocoder cannot be remembered ({error}); to decode, set NANODUPLEX_VOCODER')


def look_up(variant):
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant} of CosyVoice's tokens; "
                         f'known are {", ".join(VARIANTS)}')
    return VARIANTS[variant]


def sha256_of(path):
    if not os.path.isfile(path):
        raise ValueError(f'no file {path}')
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(2 ** 24):
            digest.update(block)
    return digest.hexdigest()


def import_s3tokenizer():
    """s3tokenizer imports torchaudio, and uses it for nothing but reading files, which read_audio does here.
    So where torchaudio is missing, or breaks as PyPI's does beside a torch without CUDA (libc10_cuda.so), an
    empty module stands in for it."""
    stub = types.ModuleType('torchaudio')
    # others ask find_spec('torchaudio') whether it is there, which fails for a module without a spec
    stub.__spec__ = importlib.machinery.ModuleSpec('torchaudio', None)
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules['torchaudio'] = stub
    try:
        import s3tokenizer
    except ImportError as error:
        raise ValueError(f"CosyVoice's tokens need s3tokenizer ({error}): "
                         'pip install --no-deps s3tokenizer==0.3.0; '
                         'pip install onnx einops protobuf ml_dtypes tqdm') from None
    finally:
        if sys.modules.get('torchaudio') is stub:
            del sys.modules['torchaudio']       # lhotse would take it for the real one
    return s3tokenizer


def load_s3(path, variant):
    """
    -> the encoder in a .onnx file, and how many codes a second its convolutions make.

    s3tokenizer.load_model(path) is not used: it tells the variants apart by the names in the path. It would
    run weights of 25 Hz at 50 Hz without complaint, and any weights in a folder called v2 as those of v2.
    """
    s3tokenizer = import_s3tokenizer()
    import onnx
    from google.protobuf.message import DecodeError
    kinds = {'v1': s3tokenizer.S3Tokenizer, 'v2': s3tokenizer.S3TokenizerV2, 'v3': s3tokenizer.S3TokenizerV3}
    kind = kinds[variant[:2]]
    model = kind(VARIANTS[variant].model)       # the exact name: the first convolution's stride depends on it
    for name, parameter in model.named_parameters():
        # what the file lacks stays NaN, and is noticed below. s3tokenizer loads v3 with strict=False, as its
        # file lacks the ln.bias, which then are 0: only these may be missing
        if not name.endswith('ln.bias'):
            torch.nn.init.constant_(parameter, math.nan)
    try:
        model.init_from_onnx(path)
        if any(parameter.isnan().any() for parameter in model.parameters()):
            raise ValueError('weights are missing')
        nodes = onnx.load(path, load_external_data=False).graph.node
    except (DecodeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f'{path} is no {variant} ({reason})') from None
    stride = math.prod(attribute.ints[0] for node in nodes if node.op_type == 'Conv'
                       for attribute in node.attribute if attribute.name == 'strides')
    return model.eval(), 100 / stride


class S3Codec:
    """
    The tokens of CosyVoice (arXiv:2407.05407), made with PyPI's s3tokenizer: a quantised layer from inside a
    recogniser of speech in many languages.

        wave ─ log-mel, a frame every 10 ms ─ windows of 30 s ─ encoder ─ nearest of 4096 ─► code     here
        code ─ flow matching ─ mel ─ HiFi-GAN ─► wave                                             by a Worker

    codec.json names the weights by path and SHA-256, and other weights are refused. The encoder hears a whole
    clip at once, and ignores what is 80 dB below the clip's loudest sound: in another clip the same second
    gets other codes.
    """
    name, sample_rate, device = 's3', 16000, 'cpu'
    is_given = False        # was the vocoder given by the user, or does a file name it

    def __init__(self, variant, sha256, silence_codes, checkpoint, vocoder):
        self.variant, self.sha256, self.checkpoint, self.vocoder = variant, sha256, checkpoint, vocoder
        known = look_up(variant)
        self.rate_hz, self.n_codes, self.fingerprint = known.rate_hz, known.n_codes, sha256[:16]
        self.silence_codes = np.array(silence_codes, dtype=np.uint16)
        sizes_sec = BEFORE_SEC[variant[:2]], AFTER_SEC, STEP_SEC
        self.stream_frames = tuple(round(sec * self.rate_hz) for sec in sizes_sec)
        self.model = self.worker = None         # until needed

    @classmethod
    def create(cls, checkpoint=None, variant=None, sha256=None, silence_codes=(), vocoder=''):
        """Recognises a published file and listens to silence. Without a file: a description of codes that
        were made elsewhere, which cannot encode."""
        if checkpoint is None:
            if variant is None or not (silence_codes or look_up(variant).silence_codes):
                raise ValueError('without --checkpoint, say which codes: '
                                 '--variant=v1_50hz --silence_codes=230,440,491')
            self = cls(variant, look_up(variant).sha256, [], None, vocoder)
            heard = []
        else:
            checkpoint, digest = os.path.abspath(checkpoint), sha256_of(checkpoint)
            known = next((name for name in VARIANTS if VARIANTS[name].sha256 == digest), None)
            if known and variant not in (None, known):
                raise ValueError(f'{checkpoint} is {known}, not {variant}')
            if not known and (variant is None or sha256 != digest):
                size_mb = os.path.getsize(checkpoint) / 1e6
                raise ValueError(f'{checkpoint} ({size_mb:.1f} MB) is none of {", ".join(VARIANTS)} as '
                                 'published: damaged, or another; if you know it, '
                                 f'give --variant=… --sha256={digest}')
            variant = known or variant
            self = cls(variant, digest, [], checkpoint, vocoder)
            self.model, rate_hz = load_s3(checkpoint, variant)
            if not known and rate_hz != self.rate_hz:
                raise ValueError(f'{checkpoint} makes {rate_hz:g} codes a second, {variant} {self.rate_hz:g}')
            heard = self.hear_silence()
        # v1 has no published silence codes. Those of v2 are what MiniCPM-o 4.5 puts in front, those of v3
        # what CosyVoice thins out (cosyvoice/cli/model.py at ace7c47; breaths among them). Both come from
        # language models, whose pauses need not be those of recordings. So they are only added to what is
        # heard here, whose first code is used to pad
        codes = list(dict.fromkeys([*heard, *silence_codes, *VARIANTS[variant].silence_codes]))
        if max(codes) >= self.n_codes:
            raise ValueError(f'there is no code {max(codes)}, {variant} has 0 to {self.n_codes - 1}')
        self.silence_codes, self.is_given = np.array(codes, dtype=np.uint16), True
        return self

    def hear_silence(self, share=0.01):
        """The codes that are at least this share of quiet rooms; first the commonest of digital silence."""
        rng, n_sample, second = np.random.default_rng(0), 4 * self.sample_rate, round(self.rate_hz)
        frequency = np.maximum(np.fft.rfftfreq(n_sample, 1 / self.sample_rate), 50)
        rooms = [np.zeros(n_sample)]
        for level_db in (-80, -65, -50):
            for slope in (0, 0.5):      # white noise, pink noise
                noise = np.fft.irfft(rng.standard_normal((len(frequency), 2)) @ [1, 1j] * frequency ** -slope)
                rooms.append(10 ** (level_db / 20) * noise / noise.std())
        # each room alone, and after half a second of a buzz as loud as speech: of a clip with the buzz in it
        # the encoder ignores what is 80 dB below
        t = np.arange(n_sample)
        buzz = np.where(t < self.sample_rate // 2, t * 150 / self.sample_rate % 1 - 0.5, 0)
        codes = self.encode_many([room + gain * buzz for room in rooms for gain in (0, 0.04, 0.4)])
        codes = np.array(codes, dtype=np.int64)[:, second:-second // 2]     # away from the buzz and the end
        commonest = int(np.bincount(codes[:3].ravel()).argmax())            # [:3]: digital silence
        frequent = np.flatnonzero(np.bincount(codes.ravel()) >= share * codes.size)
        return [commonest, *frequent.tolist()]

    def describe(self):
        keys = ('name', 'rate_hz', 'n_codes', 'sample_rate', 'fingerprint')
        return {key: getattr(self, key) for key in keys}

    def vectors(self):
        if self.variant.startswith('v1'):
            self.load_model()
            return self.model.quantizer.codebook.float().cpu()
        # v2 and v3 round eight numbers to -1, 0, 1 each, the first the last digit of the code
        return torch.arange(self.n_codes)[:, None] // 3 ** torch.arange(8) % 3 - 1.0

    def encode(self, wave):
        """float32 (n_sample,) at 16 kHz -> uint16 (ceil(n_sample / 640),), or 320 at 50 Hz"""
        return self.encode_many([wave])[0]

    def encode_many(self, waves):
        """
        In batches. The codes are the same as one by one, except where rounding decides between two that are
        equally near.

        s3tokenizer could cut the windows itself, but where its last window lies within the overlap, up to 2 s
        are lost (of clips of 52 to 56 s, 78 to 82 s, …). Here a window begins only where the one before does
        not reach the end.
        """
        self.load_model()
        from s3tokenizer import log_mel_spectrogram  # load_model saw to it that this works

        hop, windows, n_window = round(self.sample_rate / self.rate_hz), [], []
        for wave in waves:
            wave = F.pad(torch.tensor(wave, dtype=torch.float32, device=self.device), (0, -len(wave) % hop))
            mel = log_mel_spectrogram(wave) if len(wave) else wave[None]
            end = max(mel.shape[1] > 0, mel.shape[1] - OVERLAP_FRAMES)
            starts = range(0, end, WINDOW_FRAMES - OVERLAP_FRAMES)
            windows += [mel[:, start:start + WINDOW_FRAMES] for start in starts]
            n_window.append(len(starts))
        half, codes, joined = round(OVERLAP_FRAMES / 200 * self.rate_hz), iter(self.quantise(windows)), []
        for wave, n in zip(waves, n_window):
            parts = []
            for i in range(n):      # of each overlap the window before and the window after have half
                part = next(codes)
                parts.append(part[half if i else 0:len(part) - half if i < n - 1 else None])
            joined.append(np.concatenate([np.empty(0, np.uint16), *parts]))
            n_wanted = -(-len(wave) // hop)
            if len(joined[-1]) != n_wanted:
                n_sec = len(wave) / self.sample_rate
                raise ValueError(f'{self.checkpoint} made {len(joined[-1])} codes of {n_sec:.2f} s, '
                                 f'{self.variant} makes {n_wanted}')
        return joined

    def load_model(self):
        if self.model is None:
            if self.checkpoint is None:
                raise ValueError(f'this codec only describes {self.variant}; to encode, it needs the '
                                 'weights: python -m codec s3 --checkpoint=speech_tokenizer_….onnx --out=…')
            if sha256_of(self.checkpoint) != self.sha256:
                raise ValueError(f'{self.checkpoint} is not the file that codec.json was written with: '
                                 f'its SHA-256 is not {self.fingerprint}…')
            self.model, _ = load_s3(self.checkpoint, self.variant)
        self.model.to(self.device)

    def quantise(self, windows):
        """Log-mels (128, n) of 10 ms -> the codes of each"""
        from s3tokenizer import padding
        codes = [None] * len(windows)
        order = sorted(range(len(windows)), key=lambda i: windows[i].shape[1])
        while order:
            longest = windows[order[-1]].shape[1]
            batch = order[-max(1, BATCH_FRAMES // longest):]
            batch = [i for i in batch if windows[i].shape[1] > 0.8 * longest]   # so there is little padding
            order = order[:-len(batch)]
            mels, n_frame = padding([windows[i] for i in batch])
            found, n_code = self.model.quantize(mels, n_frame.to(self.device))
            for i, row, n in zip(batch, found.cpu().numpy(), n_code.tolist()):
                codes[i] = row[:n].astype(np.uint16)
        return codes

    def stream(self):
        """
        A rolling window, which begins where encode's does, or later. What is 80 dB below the loudest sound
        so far is ignored; encode knows the loudest of the clip. The encoder looks both ways, so codes differ
        from those of a whole clip: python -m codec stream tells how many.
        """
        self.load_model()
        from s3tokenizer import log_mel_spectrogram
        hop, loudest = round(self.sample_rate / self.rate_hz), -math.inf

        def hear(wave, first):
            nonlocal loudest
            wave = torch.tensor(wave, dtype=torch.float32, device=self.device)
            mel = log_mel_spectrogram(F.pad(wave, (0, -len(wave) % hop)))
            loudest = max(loudest, mel.max().item())
            return self.quantise([mel.clamp(min=loudest - 2)])[0]       # 80 dB in its units: (log10 + 4) / 4
        return S3Windows(hear, hop, 1, np.empty(0, np.uint16), *self.stream_frames, self.rate_hz)

    def speak(self):
        """CosyVoice's own streaming (cosyvoice_worker.py). It knows fewer of a code's neighbours than decode
        does, and cross-fades: the samples are not those of decode."""
        return S3Speaker(self)

    def start_worker(self):
        command = os.environ.get('NANODUPLEX_VOCODER') or self.vocoder
        if not command:
            raise ValueError('nothing is known that turns these codes into audio: '
                             "python -m codec s3 … --vocoder='COMMAND', "
                             "or NANODUPLEX_VOCODER='COMMAND', as codec/cosyvoice_worker.py is")
        if not os.environ.get('NANODUPLEX_VOCODER') and not self.is_given and not is_known(command):
            raise ValueError('codec.json names a program that was not given on this machine: if you trust '
                             f'it, NANODUPLEX_VOCODER={shlex.quote(command)} starts it')
        self.worker = self.worker or Worker(command)
        return self.worker

    def decode(self, codes):
        """uint16 (n_frame,) -> float32 (n_frame * 640,), or 320 at 50 Hz"""
        if len(codes) == 0:
            return np.empty(0, np.float32)
        worker = self.start_worker()
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'decoded.wav')
            worker.ask(codes=[int(code) for code in codes], out=path)
            return self.fit(read_audio(path, self.sample_rate), len(codes))

    def fit(self, wave, n_code):
        """What the vocoder made of n_code codes, with as many samples as they last"""
        n_sample = round(n_code * self.sample_rate / self.rate_hz)
        # CosyVoice leaves out up to a mel frame, 12 ms
        if abs(len(wave) - n_sample) > 0.1 * self.sample_rate + 0.02 * n_sample:
            n_sec, wanted_sec = len(wave) / self.sample_rate, n_sample / self.sample_rate
            raise ValueError(f'{self.worker.command} made {n_sec:.2f} s of {wanted_sec:.2f} s of codes: '
                             f'is its model for {self.variant}?')
        return np.pad(wave[:n_sample], (0, max(0, n_sample - len(wave))))

    def save(self, folder):
        os.makedirs(folder, exist_ok=True)
        settings = self.describe() | dict(
            variant=self.variant, checkpoint=self.checkpoint, sha256=self.sha256, vocoder=self.vocoder,
            silence_codes=self.silence_codes.tolist())
        write_json(os.path.join(folder, 'codec.json'), settings)
        if self.is_given and self.vocoder:
            remember(self.vocoder)

    @classmethod
    def load(cls, folder):
        settings = read_json(os.path.join(folder, 'codec.json'))
        keys = ('variant', 'sha256', 'silence_codes', 'checkpoint', 'vocoder')
        return cls(*(settings[key] for key in keys))


class S3Windows(Windows):

    def first(self, at):
        stride, half = (round(n * self.rate_hz / 100) for n in (WINDOW_FRAMES - OVERLAP_FRAMES,
                                                                OVERLAP_FRAMES // 2))
        return max((at - half) // stride * stride, super().first(at))


class S3Speaker:
    """
    One turn, decoded while its codes come. push waits for nothing: it hands the codes over, and returns the
    samples that CosyVoice has made by then.
    """

    def __init__(self, codec):
        self.codec, self.worker, self.n_code, self.n_sample = codec, codec.start_worker(), 0, 0
        self.session, self.resampler = uuid.uuid4().hex, None

    def push(self, codes):
        self.n_code += len(codes)
        return self.ask(codes, False) if self.n_code else np.empty(0, np.float32)

    def finish(self):
        if not self.n_code:
            return np.empty(0, np.float32)
        rest = self.ask([], True)
        return self.codec.fit(np.concatenate([np.zeros(self.n_sample, np.float32), rest]),
                              self.n_code)[self.n_sample:]

    def ask(self, codes, is_last):
        import soundfile
        import soxr
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'part.wav')
            self.worker.ask(session=self.session, codes=[int(code) for code in codes], last=is_last, out=path)
            wave, rate = soundfile.read(path, dtype='float32')
        if self.resampler is None:
            self.resampler = soxr.ResampleStream(rate, self.codec.sample_rate, 1)
        wave = self.resampler.resample_chunk(wave, last=is_last)
        self.n_sample += 0 if is_last else len(wave)
        return wave
