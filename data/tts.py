"""
Voices for simulated conversations: text to speech, and noise to put under it.

A TTS is anything with

    .voices                         list of names
    .style(rng) -> dict             how somebody speaks throughout a dialogue, as keywords for say
    .say(text, voice, **style) -> wave, words, …
        wave    float32 at 16 kHz, without silence around it
        words   [(text, start sample)], or None if unknown

    Espeak()                        some hundred robotic voices at 650 x real time, English and Chinese
    CosyVoice(COMMAND, voices)      the paper's, through a worker; a voice is a wav and a .txt with its words

pip install espeakng-loader soxr
"""
import _ctypes
import ctypes
import functools
import os
import re
import tempfile
import threading

import numpy as np

from codec.worker import Worker
from common.audio import read_audio
from common.files import some

SAMPLE_RATE = 16000
HAN = '\u3400-\u4dbf\u4e00-\u9fff'      # Chinese characters, for use in a character class
# of espeak-ng's variants: jokes, and voices that only whisper
UNUSED_VOICES = ('AnxiousAndy Demonic Tweaky UniRobot anikaRobot croak robosoft robosoft2 robosoft3 '
                 'robosoft4 robosoft5 robosoft6 robosoft7 robosoft8 whisper whisperf').split()
# variants to hold out. Several are near copies of each other (steph2, steph3): these are held out together,
# or not at all
TEST_VOICES = ('Alicia Andy Gene Gene2 Mike mike2 belinda david edward edward2 f2 f5 linda m3 m7 pablo '
               'steph steph2 steph3 zac').split()
VAL_VOICES = 'aunty boris Lee m5 sandro victor'.split()


@functools.cache
def espeak_variants():
    """espeak-ng's variants of each of its voices, by name."""
    import espeakng_loader
    return sorted(os.listdir(os.path.join(espeakng_loader.get_data_path(), 'voices', '!v')))


def train_voices():
    return sorted({*espeak_variants()} - {*TEST_VOICES, *VAL_VOICES, *UNUSED_VOICES})


def trim(wave):
    """-> first and end sample of what can be heard"""
    loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
    return loud[0], loud[-1] + 1


class Event(ctypes.Structure):      # espeak_EVENT of speak_lib.h
    _fields_ = [('type', ctypes.c_int), ('unique_id', ctypes.c_uint), ('text_position', ctypes.c_int),
                ('length', ctypes.c_int), ('audio_ms', ctypes.c_int), ('sample', ctypes.c_int),
                ('user_data', ctypes.c_void_p), ('name', ctypes.c_char * 8)]


class Espeak:
    """Reads text aloud, Chinese where it has Chinese characters, else English, and tells when each word and
    each phoneme begins."""
    lock = threading.Lock()     # the library is one for the whole process, and does one thing at a time

    def __init__(self, forgets=False):
        """forgets: what it says does not depend on what it said before, for 3 ms a text. Its flutter and its
        echo run on from text to text, which changes a wave by some samples, now and then by hundreds."""
        self.voices = [voice for voice in espeak_variants() if voice not in UNUSED_VOICES]
        self.forgets = forgets
        self.load()

    def load(self):
        import espeakng_loader
        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        # 2: synchronous. 0x8001: with phoneme events, without exit() on an error
        self.rate_hz = self.lib.espeak_Initialize(2, 0, data, 0x8001)
        assert self.rate_hz == 22050, f'espeak_Initialize answered {self.rate_hz} with {data}'
        self.pcm, self.events = [], []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int,
                                    ctypes.POINTER(Event))
        self.callback = callback(self.receive)      # kept: the library has only a bare pointer to it

    def receive(self, pcm, n_sample, event):
        if n_sample:
            self.pcm.append(np.ctypeslib.as_array(pcm, (n_sample,)).copy())
        i = 0
        while event[i].type:    # 0 ends the list, 1 is a word, 7 a phoneme
            # only a phoneme has a name; a sentence has its number in these bytes
            self.events.append((event[i].type, event[i].sample, event[i].text_position, event[i].length,
                                event[i].name.decode(errors='replace')))
            i += 1
        return 0

    @staticmethod
    def style(rng, vary_size=True):
        style = dict(rate=int(rng.integers(150, 221)), pitch=int(rng.integers(30, 71)),
                     pitch_range=int(rng.integers(20, 81)), size=1.0)
        if vary_size:
            style['size'] = float(np.exp(rng.uniform(np.log(0.84), np.log(1.4))))
        return style

    def say(self, text, voice, rate=170, pitch=50, pitch_range=50, size=1.0, accent='en-us'):
        """-> wave at 16 kHz without silence around it, words and phonemes as lists of (text, start sample).
        rate: words a minute. size: a factor on all frequencies, at the same speed, as if the speaker were
        smaller (above 1) or larger. accent: one of espeak-ng's for English."""
        import soxr
        if voice not in espeak_variants():
            raise ValueError(f'espeak-ng has no voice {voice!r}; there are {some(espeak_variants())}')
        language = 'cmn' if re.search(f'[{HAN}]', text) else accent
        with self.lock:
            if self.forgets:        # nothing else resets the library, not even espeak_Terminate
                self.lib.espeak_Terminate()
                _ctypes.dlclose(self.lib._handle)
                self.load()
                self.lib.espeak_ng_SetRandSeed(ctypes.c_long(1))
                ctypes.CDLL(None).srand(1)      # some voices (caleb) take their breath from C's rand
            # a language that the library doesn't know leaves the voice as it was; a variant that it doesn't
            # know is ignored without an error
            if self.lib.espeak_SetVoiceByName(f'{language}+{voice}'.encode()) != 0:
                raise ValueError(f'espeak-ng has no voice {language}+{voice}')
            self.lib.espeak_SetSynthCallback(self.callback)
            for parameter, value in (1, rate / size), (2, 100), (3, pitch), (4, pitch_range):
                self.lib.espeak_SetParameter(parameter, int(value), 0)
            self.pcm.clear(), self.events.clear()
            data = text.encode()
            self.lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1, None, None)
            pcm, events = np.concatenate([np.zeros(0, np.int16), *self.pcm]), list(self.events)
        if not np.any(pcm):
            raise ValueError(f'espeak-ng makes no sound of {text!r}')
        wave = soxr.resample(pcm.astype(np.float32) / 32768, self.rate_hz * size, SAMPLE_RATE, quality='LQ')
        first, end = trim(wave)
        at = [max(0, round(sample * SAMPLE_RATE / self.rate_hz / size) - first) for _, sample, *_ in events]
        begun = [(e[2] - 1, start) for e, start in zip(events, at) if e[0] == 1]    # place in text, sample
        places = [place for place, _ in begun] + [len(text)]
        words = [(text[a:b].strip(), start) for a, b, (_, start) in zip(places, places[1:], begun)]
        # "'" and "," are stress marks
        phonemes = [(e[4].strip("',").rstrip('#'), start) for e, start in zip(events, at) if e[0] == 7]
        return wave[first:end], words, phonemes


class CosyVoice:
    """Speaks through a worker (codec/cosyvoice_worker.py), one turn at a time."""

    def __init__(self, command, voices):
        self.worker, self.voices = Worker(command), voices

    def style(self, rng):
        return {}       # the prompt's

    def say(self, text, voice):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'said.wav')
            try:
                self.worker.ask(text=text, voice=voice, out=path)
            except ValueError as error:
                if self.worker.process.poll() is None:
                    raise       # it cannot say this; the next it can
                raise SystemExit(f'{error}; what is done is kept, the same command goes on') from None
            wave = read_audio(path, SAMPLE_RATE)
        if not np.any(wave):
            raise ValueError(f'the worker makes no sound of {text!r} in voice {voice}')
        first, end = trim(wave)
        return wave[first:end], None


def add_noise(wave, noise, snr_db, speech_power, noise_power=1.0):
    """wave, with noise of the same length, snr_db below a voice of speech_power (powers are mean squares)"""
    return wave + noise * np.float32(np.sqrt(speech_power / noise_power / 10 ** (snr_db / 10)))


@functools.cache
def noises():
    """Eight times half a minute of noise, white to nearly pink, of mean square 1; each can be looped."""
    rng, n_sample = np.random.default_rng(1), 2 ** 19
    frequency = np.maximum(np.arange(n_sample // 2 + 1), n_sample * 50 / SAMPLE_RATE)  # flat below 50 Hz
    bank = []
    for slope in np.linspace(0, 0.9, 8):
        wave = np.fft.irfft(rng.standard_normal((len(frequency), 2)) @ [1, 1j] * frequency ** -slope)
        bank.append((wave / np.sqrt(np.mean(wave ** 2))).astype(np.float32))
    return bank
