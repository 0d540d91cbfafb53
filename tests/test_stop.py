"""
Stop phrases in noise: what is written down is what was mixed, in voices and at levels as asked, and the state
of mini_omni2_irq follows from it. With tones for voices, but for espeak-ng's own test.
"""
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from clock import is_broken_off
from common.audio import write_audio
from data import simulate, tokenise
from data.dialogues import Dialogues
from data.stop import prepare
from data.tts import SAMPLE_RATE
from flatten import Letters, check, flatten, get_layout

SPLITS = ('train', 'val', 'test')
FILES = tuple(f'{split}.arrow' for split in SPLITS) + ('prepared.json', 'skipped.jsonl')
VOICES = [f'v{i}' for i in range(10)]


class Hum:
    """50 ms of a tone a character, a tone for each voice."""
    voices = VOICES

    def style(self, rng):
        return {}

    def say(self, text, voice):
        return np.sin(np.arange(len(text) * 800) * 0.1 * (1 + VOICES.index(voice))).astype(np.float32), None


@pytest.fixture
def make(monkeypatch, tmp_path, codec_folder):
    """make('--n_sample=9') -> the folder that was written"""
    monkeypatch.setattr(simulate, 'Espeak', lambda forgets: Hum())

    def make(*options, out='out'):
        monkeypatch.setattr(sys, 'argv', [
            'prepare.py', f'--codec={codec_folder}', f'--out={tmp_path / out}', '--device=cpu', '--max_sec=2',
            '--tail_sec=2', f'--user_voices={",".join(VOICES)}', *options])
        prepare.main()
        return tmp_path / out
    return make


def records(folder):
    return {split: list(Dialogues(str(folder), split)) for split in SPLITS}


def get_args(**changes):
    args = prepare.arguments().parse_args(['--out=', '--codec='])
    args.phrases, args.sentences = prepare.PHRASES, prepare.SENTENCES
    vars(args).update(changes)
    return args


def sample(id='a', bank=None, rate_hz=25.0, **changes):
    return prepare.make_sample(id, 'v1', Hum(), bank or simulate.noises(), get_args(**changes), rate_hz)


def same(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


@pytest.mark.parametrize('n', [1, 5])
def test_the_state_is_irq_from_the_end_of_the_phrase_on(n, make, small_codec):
    """Of chunks of n frames each has the state of its last frame. Sentences and noise stop nobody."""
    layout, vocab, seen = get_layout('mini_omni2_irq', n), Letters(small_codec.n_codes), set()
    irq = vocab.control['<|irq|>']
    for row in sum(records(make('--n_sample=60')).values(), []):
        said = [turn for turn in row['turns'] if turn['role'] == 'user']
        stopped = [turn for turn in row['turns'] if turn['role'] == 'assistant']
        n_frame = len(row['user'])
        assert row['assistant'].tolist() == [small_codec.silence_codes[0]] * n_frame
        document, = flatten(row, layout, vocab)
        state = document.ids.reshape(-1, n + 1)[:, -1] == irq
        end = n_frame + n
        if stopped:
            assert is_broken_off(*stopped, row['turns']) and said[0]['text'] == 'Stop Omni.'
            assert stopped[0]['start'] == 0 < said[0]['start'] and stopped[0]['text'] == ''
            end = stopped[0]['end']
            assert end == said[0]['end']
        elif said:
            assert said[0]['text'] in prepare.SENTENCES
        seen.add((len(stopped), len(said)))
        assert state.tolist() == [(chunk + 1) * n > end for chunk in range(len(state))]
    assert seen == {(1, 1), (0, 1), (0, 0)}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.sampled_from([11.71875, 12.5, 25, 75]), st.sampled_from([0, 0.02, 0.3]),
       st.sampled_from([0, 1e-4, 0.1, 1]), st.sampled_from([0, 0.01, 1]))
def test_whatever_is_drawn_breaks_off_in_whole_frames(seed, rate_hz, min_sec, more_sec, tail_sec):
    """… and the phrase is heard between the frames of its turn, and only there."""
    wave, turns = sample(f'{seed}', rate_hz=rate_hz, min_sec=min_sec, max_sec=min_sec + more_sec,
                         tail_sec=tail_sec, share_without=0, snr_db=(90, 90))
    n_frame = int(np.ceil(len(wave) / SAMPLE_RATE * rate_hz))
    framed, n_lost = tokenise.on_frames(turns, n_frame, rate_hz)
    silence = np.zeros(n_frame, np.uint16)
    check(dict(id='x', user=silence, assistant=silence, turns=framed), 1)
    user, = (turn for turn in framed if turn['role'] == 'user')
    assistant, = (turn for turn in framed if turn['role'] == 'assistant')
    assert not n_lost and is_broken_off(assistant, framed) and user['end'] == assistant['end']
    loud = np.flatnonzero(np.abs(wave) > 0.01) / SAMPLE_RATE * rate_hz
    # a word begins and ends more softly than 0.01, so that may lie in the frame before or behind
    assert 0 <= int(loud[0]) - user['start'] <= 1 and 0 <= user['end'] - int(loud[-1]) - 1 <= 1


def test_noise_is_as_loud_as_asked(tmp_path):
    """Of made-up noise, and of files at any depth, which may be shorter or longer than the sample."""
    os.makedirs(tmp_path / 'a/b')
    rng = np.random.default_rng(0)
    write_audio(str(tmp_path / 'a/b/short.wav'), 0.3 * rng.standard_normal(9000), 22050)
    write_audio(str(tmp_path / 'a/long.WAV'), 0.01 * rng.standard_normal((500000, 2)), SAMPLE_RATE)
    for bank in (simulate.noises(), simulate.find(str(tmp_path), prepare.AUDIO)):
        for snr_db in (-5, 3, 20):
            for id in 'abc':
                wave, turns = sample(id, bank, snr_db=(snr_db, snr_db), share_without=0, min_sec=3)
                start, end = (round(turns[0][key] * SAMPLE_RATE) for key in ('start_sec', 'end_sec'))
                noise = np.mean(np.concatenate([wave[:start], wave[end:]]) ** 2)
                speech = np.mean(wave[start:end] ** 2) - noise
                assert abs(10 * np.log10(speech / noise) - snr_db) < 1


def test_lengths_and_shares_are_as_asked():
    drawn = [sample(str(i), share_without=0.4, min_sec=1, max_sec=3, tail_sec=2) for i in range(300)]
    turns = [turns for _, turns in drawn]
    n_stop, n_said = (sum(len(found) >= n for found in turns) for n in (2, 1))
    assert abs(n_stop / 300 - 0.6) < 0.09 and abs(n_said / 300 - 0.8) < 0.07
    starts = [found[0]['start_sec'] for found in turns if found]
    tails = [len(wave) / SAMPLE_RATE - found[0]['end_sec'] for wave, found in drawn if found]
    for drawn, low, high in ((starts, 1, 3), (tails, 0, 2)):
        assert low <= min(drawn) < low + 0.1 and high - 0.1 < max(drawn) <= high
    assert {found[0]['text'] for found in turns if len(found) == 1} == {*prepare.SENTENCES}


def test_nobody_who_is_held_out_is_heard_in_training(make):
    found = records(make('--n_sample=80', '--val_share=0.2', '--test_share=0.3'))
    heard = {split: {row['id'].split('-')[1] for row in rows} for split, rows in found.items()}
    assert {split: len(rows) for split, rows in found.items()} == dict(train=40, val=16, test=24)
    assert {split: len(names) for split, names in heard.items()} == dict(train=5, val=2, test=3)
    assert set.union(*heard.values()) == {*VOICES}


def test_own_phrases_and_sentences(make, tmp_path):
    (tmp_path / 'phrases.txt').write_text('halt\n\n be quiet \n')
    (tmp_path / 'sentences.txt').write_text('go on\n')
    found = records(make('--n_sample=40', f'--phrases={tmp_path}/phrases.txt', '--share_without=0.5',
                         f'--sentences={tmp_path}/sentences.txt'))
    said = {(turn['text'], len(row['turns'])) for rows in found.values() for row in rows
            for turn in row['turns'] if turn['role'] == 'user'}
    assert said == {('halt', 2), ('be quiet', 2), ('go on', 1)}


def test_killed_and_continued_equals_uninterrupted(make, monkeypatch):
    whole, made, make_part = make('--n_sample=9', '--part=2', out='whole'), [], tokenise.make_part

    def die(path, *rest):
        if path.endswith('000003.arrow'):
            raise KeyboardInterrupt
        return make_part(path, *rest)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenise, 'make_part', die)
        make('--n_sample=9', '--part=2')
    monkeypatch.setattr(tokenise, 'make_part', lambda *part: made.append(part) or make_part(*part))
    assert same(make('--n_sample=9', '--part=2'), whole) and len(made) == 2        # of five


def test_two_processes_equal_one(make, monkeypatch):
    """Forked, as locks are a process's own. Neither goes on from its first part before the other has one."""
    whole, make_part = make('--n_sample=9', '--part=2', '--n_thread=1', out='whole'), tokenise.make_part
    fork = multiprocessing.get_context('fork')
    both = fork.Barrier(2)

    def work(rank):
        torch.set_num_threads(1)
        is_first = [True]

        def meet(path, *rest):
            if is_first:
                is_first.clear()
                both.wait(30)
            return make_part(path, *rest)
        os.environ.update(RANK=str(rank), WORLD_SIZE='2')
        tokenise.make_part = meet
        make('--n_sample=9', '--part=2')
    workers = [fork.Process(target=work, args=(rank,)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert same(whole.parent / 'out', whole)


SAY = '''
import hashlib, sys
from data.tts import Espeak
espeak, said = Espeak(forgets=True), {}
for voice in sys.argv[1:]:
    wave = espeak.say('Stop Omni.', voice)[0]
    said.setdefault(voice, set()).add(hashlib.sha256(wave.tobytes()).hexdigest())
print(sorted((voice, *waves) for voice, waves in said.items()))
'''


def test_espeak_forgets():
    """Each voice says the same again, after whatever was said before, and in another process. (In one of its
    own, as the library has one state for all that use it.)"""
    pytest.importorskip('espeakng_loader')
    printed = [subprocess.run([sys.executable, '-c', SAY, *order.split()], capture_output=True, text=True,
                              cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)), check=True).stdout
               for order in ('f2 caleb m5 f2 f2 caleb m5', 'm5 f2 belinda caleb')]
    assert eval(printed[0]) == [found for found in eval(printed[1]) if found[0] != 'belinda']


@pytest.mark.parametrize('setting, message', [
    ('--snr_db=20,0', '--snr_db: the first number is above the second'),
    ('--phrases={}/empty', 'empty has nothing to say: it needs a text a line'),
    ('--sentences={}/nowhere', 'no file .*/nowhere'),
    ('--sentences={}/phrase', "'stop omni' is among the --phrases and among the --sentences"),
    ('--noise={}', r'holds no \.wav or \.flac or \.mp3'),
    ('--share_without=1.5', 'a share is from 0 to 1'),
    ('--min_sec=3', '--min_sec not above --max_sec'),
    ('--tail_sec=-1', 'not below 0'),
    ('--user_voices=v1', '1 voices are too few: train, val and test need voices of their own'),
    ('--tts=cosyvoice', '--tts=cosyvoice needs --tts_command and --user_voices'),
    ('--n_sample=0', 'there is nothing to prepare'),
])
def test_mistakes(setting, message, make, tmp_path):
    (tmp_path / 'empty').write_text(' \n')
    (tmp_path / 'phrase').write_text('stop, omni!\n')
    with pytest.raises(ValueError, match=message):
        make(setting.format(tmp_path))


def test_other_settings_are_not_mixed_in(make, tmp_path):
    make('--n_sample=5')
    (tmp_path / 'phrases').write_text('halt')
    for setting, changed in (('--snr_db=0,5', 'snr_db'), (f'--phrases={tmp_path}/phrases', 'texts')):
        with pytest.raises(ValueError, match=rf'was made from other material or settings \({changed}\)'):
            make('--n_sample=5', setting)
