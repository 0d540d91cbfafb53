"""
Codecs of several codebooks, each of which says what the ones before it have left out: SNAC (of Mini-Omni and
Orpheus), Mimi (of Moshi) and DAC (of OuteTTS). They are made of a folder with config.json and weights, as
published, by snac and transformers:

    python -m codec snac --checkpoint=snac_24khz --out=codecs/snac
    python -m codec mimi --checkpoint=mimi --out=codecs/mimi                   # or --codebooks=16, of its 32
    python -m codec dac --checkpoint=dac_24khz --out=codecs/dac

    pip install snac 'transformers>=5.3'

                   frames a second   levels          codes a second   n_codes
    SNAC, 24 kHz   11.72             (1, 2, 4)       82.0             7 * 4,096 = 28,672
    Mimi           12.5              (1,) * 8        100              8 * 2,048 = 16,384
    DAC, 24 kHz    75                (1, 1)          150              2 * 1,024 = 2,048

How the codes of a frame are ordered and numbered: common/levels.py.
"""
import os
import pickle
import threading

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional as F

from codec.s3 import sha256_of
from codec.streaming import Windows
from common.files import read_json, some, write_json
from common.levels import deinterleave, interleave

# encoded or decoded at once: 44 s of SNAC, 41 s of Mimi, 6.8 s of DAC. The first layer of Mimi's encoder then
# makes 512 * 1,920 samples * 64 channels * 4 bytes = 252 MB
WINDOW_FRAMES = 512
WEIGHTS = 'model.safetensors', 'pytorch_model.bin'      # the first that is there
BROKEN = (OSError, EOFError, SafetensorError, pickle.UnpicklingError, RuntimeError, KeyError, TypeError,
          ValueError)       # what files that are damaged, or of something else, raise


def weights_in(folder):
    paths = [os.path.join(folder, name) for name in WEIGHTS]
    path = next(filter(os.path.isfile, paths), None)
    if path is None:
        raise ValueError(f'no weights in {folder}: it has neither {" nor ".join(WEIGHTS)}')
    return path


class RvqCodec:
    """
    What the three have in common; .model is opened when it is needed. codec.json names the weights by path
    and SHA-256, and other weights are refused.

    Long audio is cut into windows, which also read some frames before and after. SNAC and DAC hear up to
    2.5 and 10 frames to either side, so that their codes are those of the whole. Mimi hears 10 s back in each
    of its eight layers: of long audio it hears no more than the window and the 160 frames (12.8 s) before.

    silence_codes are the frames that digital silence gives. The codebooks follow the faintest noise, so no
    other silence is recognised.
    """
    device, before, after = 'cpu', 16, 16       # before, after: frames that a window reads, and does not keep
    stream_frames = None            # of a stream: frames read before and after a block, and of the block
    model = codebooks = None        # codebooks: how many are used unless it is said; None: all

    def __init__(self, checkpoint, sha256, sample_rate, rate_hz, levels, codebook_size, silence_codes):
        self.checkpoint, self.sha256, self.fingerprint = checkpoint, sha256, sha256[:16]
        self.sample_rate, self.rate_hz, self.hop = sample_rate, rate_hz, round(sample_rate / rate_hz)
        self.levels, self.codebook_size = tuple(levels), codebook_size
        self.codes_per_frame = sum(levels)
        self.n_codes = self.codes_per_frame * codebook_size
        self.silence_codes = np.array(silence_codes, np.uint16)     # [k, codes_per_frame]; [k] if that is 1

    @classmethod
    def create(cls, checkpoint, codebooks=None):
        """Of a folder with config.json and weights. Raises ValueError if it is not of this codec."""
        checkpoint = os.path.abspath(checkpoint)
        model, sample_rate, hop, levels, codebook_size = cls.read(checkpoint)
        codebooks = codebooks or cls.codebooks or len(levels)
        if not 0 < codebooks <= len(levels) or cls.codebooks is None and codebooks < len(levels):
            which = f'1 to {len(levels)} of its' if cls.codebooks else f'all {len(levels)}'
            raise ValueError(f'--codebooks={codebooks}: {cls.name} works with {which} codebooks')
        if sum(levels[:codebooks]) * codebook_size > 2 ** 16:
            raise ValueError(
                f'--codebooks={codebooks} of {codebook_size} codes are more than uint16 can number')
        self = cls(checkpoint, sha256_of(weights_in(checkpoint)), sample_rate, sample_rate / hop,
                   levels[:codebooks], codebook_size, [])
        self.model = model
        frames = self.encode(np.zeros(4 * sample_rate))
        frames = np.concatenate([frames[len(frames) // 2:][:1], frames])    # the first has no border nearby
        _, firsts = np.unique(frames, axis=0, return_index=True)
        self.silence_codes = frames[np.sort(firsts)]
        return self

    def describe(self):
        keys = ('name', 'rate_hz', 'n_codes', 'sample_rate', 'fingerprint')
        levels = dict(levels=list(self.levels)) if self.codes_per_frame > 1 else {}
        return {key: getattr(self, key) for key in keys} | levels

    def vectors(self):
        raise ValueError(f'codec {self.name}: which codes are alike is not known across its codebooks, as '
                         'new_rows=codec needs; take new_rows=spread')

    def load_model(self):
        if self.model is None:
            if sha256_of(weights_in(self.checkpoint)) != self.sha256:
                raise ValueError(f'{self.checkpoint} does not hold the weights that codec.json was written '
                                 f'with: their SHA-256 is not {self.fingerprint}…')
            self.model, *_ = self.read(self.checkpoint)
        self.model.to(self.device)

    def windows(self, n_frame):
        """-> [(frames to be read, which of those are kept)], slices"""
        for at in range(0, n_frame, WINDOW_FRAMES):
            first, end = max(0, at - self.before), min(n_frame, at + WINDOW_FRAMES)
            yield slice(first, min(n_frame, end + self.after)), slice(at - first, end - first)

    def encode(self, wave):
        """float32 [n_sample] at sample_rate -> uint16 [n_frame, codes_per_frame], a frame each begun hop;
        [n_frame] if a frame has one code"""
        self.load_model()
        n_frame, parts = -(-len(wave) // self.hop), [self.no_codes()]
        for read, keep in self.windows(n_frame):
            parts.append(self.frames_of(wave[read.start * self.hop:read.stop * self.hop])[keep])
        return np.concatenate(parts)

    def encode_many(self, waves):
        return [self.encode(wave) for wave in waves]    # padding would change codes

    def no_codes(self):
        return np.empty((0, self.codes_per_frame) if self.codes_per_frame > 1 else 0, np.uint16)

    @torch.inference_mode()
    def frames_of(self, wave, hear=None):
        """What encode returns, at one go"""
        wave = torch.tensor(wave, dtype=torch.float32, device=self.device)
        books = (hear or self.hear)(F.pad(wave, (0, -len(wave) % self.hop))[None, None])
        books = [book.reshape(-1).cpu().numpy() for book in books]
        frames = interleave(books, self.levels, self.codebook_size)
        return frames if self.codes_per_frame > 1 else frames[:, 0]

    def decode(self, codes):
        """uint16 [n_frame, codes_per_frame] -> float32 [n_frame * hop]. Raises ValueError for a code that
        does not belong to its place."""
        self.load_model()
        books, parts = self.books_of(codes), [np.empty(0, np.float32)]
        for read, keep in self.windows(len(codes)):
            part = [book[:, read.start * n:read.stop * n] for book, n in zip(books, self.levels)]
            parts.append(self.wave_of(part, read.start)[keep.start * self.hop:keep.stop * self.hop])
        return np.concatenate(parts)

    def books_of(self, codes):
        """-> [[1, n_frame * n] codes of each codebook]"""
        books = deinterleave(codes, self.levels, self.codebook_size)
        return [torch.as_tensor(book, device=self.device)[None] for book in books]

    @torch.inference_mode()
    def wave_of(self, books, first):
        """What decode returns, at one go. first: the frame of the whole with which books begin"""
        wave = self.say(books, first).reshape(-1)
        n_frame = books[0].shape[1] // self.levels[0]
        # transformers' DAC leaves out 8 samples at the end
        return F.pad(wave, (0, n_frame * self.hop - len(wave))).cpu().numpy()

    def stream(self):
        """In windows (streaming.py), which read all that a frame's codes depend on."""
        self.load_model()
        return Windows(lambda wave, first: self.frames_of(wave), self.hop, 1, self.no_codes(),
                       *self.stream_frames, self.rate_hz)

    def speak(self):
        self.load_model()
        return Windows(lambda codes, first: self.wave_of(self.books_of(codes), first), 1, self.hop,
                       np.empty(0, np.float32), *self.stream_frames, self.rate_hz)

    def save(self, folder):
        os.makedirs(folder, exist_ok=True)
        settings = self.describe() | dict(
            levels=list(self.levels), codebook_size=self.codebook_size, checkpoint=self.checkpoint,
            sha256=self.sha256, silence_codes=self.silence_codes.tolist())
        write_json(os.path.join(folder, 'codec.json'), settings)

    @classmethod
    def load(cls, folder):
        settings = read_json(os.path.join(folder, 'codec.json'))
        keys = 'checkpoint', 'sha256', 'sample_rate', 'rate_hz', 'levels', 'codebook_size', 'silence_codes'
        return cls(*(settings[key] for key in keys))


class Snac(RvqCodec):
    """hubertsiuzdak/snac_24khz. Those of 32 and 44.1 kHz, for music, have attention, and are not read."""
    name, stream_frames = 'snac', (3, 3, 2)
    lock = threading.Lock()         # where a window begins is noted in the model

    @staticmethod
    def read(folder):
        """-> model, sample_rate, samples a frame, levels, codes of a codebook"""
        path, config = weights_in(folder), read_json(os.path.join(folder, 'config.json'))
        try:
            from snac import SNAC
            from snac.layers import DecoderBlock
        except ImportError as error:
            raise ValueError(f'SNAC needs {error.name}: pip install snac') from None
        try:
            model = SNAC(**config).eval()
            if model.attn_window_size:
                raise ValueError('it has attention: take snac_24khz')
            # weights_only: nothing in the file is run
            is_safe = path.endswith('.safetensors')
            model.load_state_dict(load_file(path) if is_safe else torch.load(path, 'cpu', weights_only=True))
        except BROKEN as error:
            raise ValueError(f'{folder} is no SNAC that can be read ({first_line(error)})') from None
        coarse = n_row = model.vq_strides[0]
        for block in model.decoder.model:
            if isinstance(block, DecoderBlock):
                n_row *= block.block[1].stride[0]
                block.block[2] = PlacedNoise(block.block[2].linear, n_row)
        levels = [coarse // stride for stride in model.vq_strides]
        return model, model.sampling_rate, int(model.hop_length) * coarse, levels, model.codebook_size

    def hear(self, wave):
        """[1, 1, n_frame * hop] -> codes of each codebook, [1, n_frame * n]"""
        return self.model.encode(wave)

    def say(self, books, first):
        """The inverse -> [1, 1, n_frame * hop]"""
        with self.lock:
            for module in self.model.modules():
                if isinstance(module, PlacedNoise):
                    module.first = first
            return self.model.decode(books)


class PlacedNoise(torch.nn.Module):
    """The noise that SNAC's decoder adds, but the same at the same place of a wave, lest windows differ. It
    repeats after 2 ** 17 numbers, at the fastest every 5.5 s."""
    noise = torch.randn(2 ** 17, generator=torch.Generator().manual_seed(0))

    def __init__(self, linear, n_row):
        super().__init__()
        self.linear, self.n_row, self.first = linear, n_row, 0      # rows a frame; the frame it begins with

    def forward(self, x):
        place = torch.arange(x.shape[-1]) + self.first * self.n_row
        return x + self.noise[place % len(self.noise)].to(x) * self.linear(x)


class Mimi(RvqCodec):
    """kyutai/mimi. Moshi takes 8 of its 32 codebooks; the first alone is what is said rather than how."""
    name, codebooks, before, after = 'mimi', 8, 160, 0      # causal: it hears nothing of what comes after

    @staticmethod
    def read(folder):
        model = open_transformers('mimi', 'MimiModel', folder)
        from transformers import __version__ as version
        if tuple(map(int, version.split('.')[:2])) < (5, 3):
            raise ValueError(f"transformers {version} lets Mimi's layers hear more than 10 s back, so codes "
                             "would be others: pip install 'transformers>=5.3'")
        c = model.config
        return (model, c.sampling_rate, round(c.sampling_rate / c.frame_rate), [1] * c.num_quantizers,
                c.codebook_size)

    def hear(self, wave):
        return self.model.encode(wave, num_quantizers=len(self.levels)).audio_codes[0]

    def say(self, books, first):
        return self.model.decode(torch.stack(books, 1)).audio_values

    def stream(self):
        return MimiStream(self)

    def speak(self):
        return MimiSpeaker(self)


class Dac(RvqCodec):
    """descript/dac_24khz, or another that transformers' DacModel reads. OuteTTS takes two codebooks."""
    name, codebooks, stream_frames = 'dac', 2, (8, 8, 8)

    @staticmethod
    def read(folder):
        model = open_transformers('dac', 'DacModel', folder)
        c = model.config
        return model, c.sampling_rate, c.hop_length, [1] * c.n_codebooks, c.codebook_size

    def hear(self, wave):
        return self.model.encode(wave, n_quantizers=len(self.levels)).audio_codes[0]

    def say(self, books, first):
        return self.model.decode(audio_codes=torch.stack(books, 1)).audio_values


class MimiStream:
    """Mimi is causal: a frame's codes are sure when it ends. transformers keeps what its convolutions and its
    attention heard before."""
    lookahead_sec = 0.0

    def __init__(self, codec):
        self.codec, self.wave, self.cache = codec, np.empty(0, np.float32), {}
        codec.load_model()
        check_mimi(codec.model)

    def hear(self, wave):
        heard = self.codec.model.encode(wave, num_quantizers=len(self.codec.levels), use_streaming=True,
                                        **self.cache)
        self.cache = dict(encoder_cache=heard.encoder_cache, padding_cache=heard.padding_cache)
        return heard.audio_codes[0]

    def push(self, samples):
        self.wave, parts = np.concatenate([self.wave, np.asarray(samples)]), [self.codec.no_codes()]
        while len(self.wave) >= self.codec.hop:
            parts.append(self.codec.frames_of(self.wave[:self.codec.hop], self.hear))
            self.wave = self.wave[self.codec.hop:]
        return np.concatenate(parts)

    def missing(self, n):
        return n * self.codec.hop - len(self.wave)

    def finish(self):
        return self.push(np.zeros(-len(self.wave) % self.codec.hop))


class MimiSpeaker:
    """Likewise. Of the convolutions of its decoder nothing is kept but what they read: less than eight of the
    transformer's steps back, two of which are a frame."""
    n_step = 8

    def __init__(self, codec):
        self.codec, self.codes, self.steps, self.cache = codec, None, None, None
        codec.load_model()
        check_mimi(codec.model)

    @torch.inference_mode()
    def say(self, books):
        model, decoder = self.codec.model, self.codec.model.decoder
        latents = model.quantizer.decode(torch.stack(books, 1))     # of the frame before, too: to upsample
        new = decoder.upsample(latents)[..., -2:].transpose(1, 2)
        new = decoder.decoder_transformer(new, cache=self.cache, use_cache=True)
        self.cache, new = new.cache, new.last_hidden_state.transpose(1, 2)
        self.steps = new if self.steps is None else torch.cat([self.steps, new], 2)[..., -self.n_step - 2:]
        return decoder.decoder_seanet(self.steps)[..., -self.codec.hop:]

    def push(self, codes):
        parts = [np.empty(0, np.float32)]
        for frame in np.asarray(codes):
            self.codes = np.stack([frame] if self.codes is None else [self.codes[-1], frame])
            parts.append(self.say(self.codec.books_of(self.codes)).reshape(-1).cpu().numpy())
        return np.concatenate(parts)

    def finish(self):
        return np.empty(0, np.float32)


def check_mimi(model):
    if not hasattr(model.decoder, 'decoder_transformer'):
        raise ValueError("Mimi streams by parts of transformers 5.24: pip install 'transformers>=5.24'")


def open_transformers(kind, name, folder):
    weights_in(folder)
    found = read_json(os.path.join(folder, 'config.json')).get('model_type')
    if found != kind:       # transformers would only warn, and draw random weights
        raise ValueError(f'{folder}/config.json is of a {found} model, not of {kind}')
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f'{kind} needs {error.name}: pip install transformers') from None
    try:
        model, about = getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, output_loading_info=True)
        if about['missing_keys']:
            raise ValueError(f'it lacks {some(sorted(about["missing_keys"]), 2)}')
    except BROKEN as error:
        raise ValueError(f'{folder} is no {kind} that can be read ({first_line(error)})') from None
    return model.float().eval()


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
