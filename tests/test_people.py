"""Voices of people for the demo: what is made of a spectrum, what an acoustic model says, who is tested."""
import subprocess

import numpy as np
import pytest

from codec.mel import TYPICAL
from data.demo.prepare import HOLD, PHONEMES, WORDS, labels_of
from data.people import BUMPS, CMU, HZ, People, Speaker, heard, room, stretch
from measures import voices


@pytest.fixture(scope='module')
def people():
    pytest.importorskip('pocketsphinx')
    return People()


def test_the_acoustic_model_is_read(people):
    """Each mixture's weights add up to one, in 8 bits, and every phoneme that is asked for is there."""
    assert people.mean.shape == people.std.shape == (42, 128, 13) and people.weight.shape == (5126, 128)
    assert np.abs(np.exp(people.weight).sum(1) - 1).max() < 0.1
    assert {phone for phones in CMU.values() for phone in phones} <= people.number.keys()


def test_what_stands_beside_a_phoneme_is_heard_in_it(people):
    """An /uw/ after /r/ (Peru) begins otherwise than after /t/ (two), and ends as one; noise of a throat is
    known beside nothing."""
    r, t, uw, silence, noise = (people.number[name] for name in ('R', 'T', 'UW', 'SIL', '+NSN+'))
    assert np.all(np.diff(people.keys) > 0) and people.thirds.shape == (len(people.keys), 3)
    assert people.thirds.min() >= 3 * 42 and people.thirds.max() == len(people.weight) - 1
    rows = [people.between(before, uw, silence) for before in (r, t)]
    mouth = [np.exp(people.weight[each]) @ people.mean[uw] for each in rows]        # (3, 13) each
    begins, _, ends = np.linalg.norm(mouth[0] - mouth[1], axis=1)
    assert begins > 3 * ends, (begins, ends)
    assert people.between(noise, uw, silence).tolist() == [3 * uw, 3 * uw + 1, 3 * uw + 2]


def test_a_person_speaks(people):
    """Of most, /s/ is high, /u:/ is low, /i:/ has more at 2 to 3 kHz than /u:/, and a pause is silent. The
    same draws say the same."""
    said = []
    for seed in (0, *range(10)):
        rng = np.random.default_rng(seed)
        sounds = [('_', 0), ('s', 20), ('i:', 60), ('u:', 100)]
        said.append(people.say(sounds, 140, people.person(rng), rng))
    assert np.array_equal(said[0], said[1]) and not np.array_equal(said[0], said[2])
    center, tilt, silence = [], [], []
    for power in said[1:]:
        assert power.shape == (140, 257) and power.dtype == np.float32 and (power >= 0).all()
        pause, s, i, u = (power[at:at + 20].mean(0) for at in (0, 30, 70, 110))
        silence.append(pause.sum() / i.sum())
        center.append([(part * HZ).sum() / part.sum() for part in (s, u)])
        voice, high = (HZ > 200) & (HZ < 4000), (HZ > 1900) & (HZ < 3000)
        tilt.append(np.log(i[high].sum() / i[voice].sum() / u[high].sum() * u[voice].sum()))
    high_s, low_u = np.median(center, 0)
    assert np.median(silence) < 1e-3 and np.mean(tilt) > 0.5 and high_s > 3000 and low_u < 1200


def test_marks_move_with_the_sound():
    for seed in range(20):
        power = np.full((200, 257), 1e-3, np.float32)
        power[[30, 90, 150]] = 1
        slower, marks = stretch(power, [0, 30, 90, 150, 200], np.random.default_rng(seed))
        assert marks[0] == 0 and marks[-1] == len(slower) and (np.diff(marks) > 0).all()
        for mark in marks[1:4]:
            assert slower[max(0, mark - 2):mark + 4].max() > 0.3, (seed, mark)


def test_another_mouth():
    """A tone of 1 kHz stays one, and lies where a mouth of other size has it: at 0.7 to 1.6 times."""
    power = np.zeros((100, 257), np.float32)
    power[:, 31:34] = 1
    found = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        other = Speaker(rng).says(power, rng)
        assert other.shape == power.shape and other.dtype == np.float32 and (other >= 0).all()
        found.append(HZ[other.mean(0).argmax()])
    assert 600 < min(found) < 850 and 1200 < max(found) < 1700
    assert BUMPS.shape == (5, 257)


def test_a_room_and_a_microphone():
    """Echoes die away, 10 dB or more in 0.3 s; what is recorded has a level of 20 dB below espeak-ng's to
    10 dB above it, whatever it had before."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        power = np.zeros((200, 257), np.float32)
        power[20:40] = rng.uniform(0.5, 1, (20, 257))
        echo = room(power, rng).sum(1)
        assert echo[:20].sum() == 0 and echo[45] > 0 and echo[75] < 0.1 * echo[45]
        for gain in (1e-6, 1e6):
            loud = np.percentile(heard(gain * power, rng).sum(1), 95)
            assert 0.003 * TYPICAL < loud < 30 * TYPICAL


def test_a_pause_names_the_word_before():
    """For HOLD frames; nothing before the first word, and the next one is named as soon as it begins."""
    word, next_word, p = (WORDS.index('japan'), WORDS.index('hello'), PHONEMES.index('P'))
    label = labels_of(160, [('Japan?', 8), ('Hello', 80)], [('p', 8), ('_', 16), ('p', 80), ('_', 96)], 120)
    spoken = [0] * 2 + [p] * 2 + [0] * 16 + [p] * 4 + [0] * 16      # 4 hops a frame
    assert label[:, 0].tolist() == spoken
    said = [0] * 2 + [word] * (2 + HOLD) + [0] * (16 - HOLD) + [next_word] * (4 + HOLD) + [0] * (16 - HOLD)
    assert label[:, 1].tolist() == said


def test_how_voices_are_asked(monkeypatch):
    """The table's dialogues and recordings: who was interrupted is no reference; a room is as loud as what
    comes straight, and noise lies 20 dB below."""
    def turns(*rows):
        return dict(turns=[dict(zip(('role', 'start', 'end', 'text'), row)) for row in rows])
    dialogues = [turns(('user', 0, 5, 'a'), ('assistant', 8, 20, 'A'), ('user', 15, 20, 'b'),
                       ('assistant', 23, 30, 'B'), ('user', 40, 50, 'c'), ('assistant', 53, 60, 'C'))]
    assert voices.asked(dialogues) == {'b': 'B', 'c': 'C'}
    click = np.zeros(16000)
    click[0] = 1
    response = voices.echo(click, np.random.default_rng(0))
    assert np.sum(response[1:] ** 2) == pytest.approx(1) and response[0] == 1 and not response[1:32].any()
    energy = [np.sum(response[at:at + 1600] ** 2) for at in (800, 2400)]
    assert 10 * np.log10(energy[0] / energy[1]) == pytest.approx(20, abs=2)     # 60 dB in 0.3 s
    tone = np.sin(np.arange(8000) / 5)
    for is_room, snr_db in ((False, 35), (True, 20)):
        wave, end_sec = voices.record(tone, np.random.default_rng(0), is_room)
        assert end_sec == pytest.approx(0.8) and len(wave) / 16000 == pytest.approx(4.8)
        quiet = np.mean(wave[:4000] ** 2)
        assert 10 * np.log10(voices.LEVEL ** 2 / quiet) == pytest.approx(snr_db, abs=1)
    monkeypatch.setattr(voices.shutil, 'which', lambda name: None)
    monkeypatch.setattr(voices.importlib.util, 'find_spec', lambda name: None)
    assert voices.find_voices() == {}
    rows = {'x': {where: dict(right=0.5, early=0.0, none=0.25) for where in ('clean', 'room')}}
    assert voices.table(rows).splitlines()[-1] == '| x | 50% | 0% | 25% | 50% | 0% | 25% |'


@pytest.mark.skipif(not voices.shutil.which('flite'), reason='flite is not installed')
def test_a_voice_of_a_person():
    found = voices.find_voices()
    assert 'flite slt' in found and 'flite awb_time' not in found
    wave = found['flite slt']('What is your name?')
    assert 0.8 < len(wave) / 16000 < 2 and np.abs(wave[:160]).max() > 0
    with pytest.raises(subprocess.CalledProcessError):
        voices.speak(['false'], 'hello')


def test_pico():
    pytest.importorskip('ttspico')
    found = voices.find_voices()
    british, american = (found[f'pico {accent}']('What is your name?') for accent in ('en-GB', 'en-US'))
    assert british.dtype == np.float32 and 0.6 < len(british) / 16000 < 2
    assert 0.05 < np.abs(british).max() <= 1 and not np.array_equal(british, american)
