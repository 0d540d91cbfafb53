"""Recordings into a data folder: once each, whatever dies; and turns in seconds onto frames."""
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from data import tokenise
from data.dialogues import Dialogues
from data.made_up import hum
from data.tokenise import Recording, fit, on_frames, split_ids
from flatten import check


def turn(role, start_sec, end_sec, text='hi'):
    return dict(role=role, start_sec=start_sec, end_sec=end_sec, text=text)


@pytest.fixture
def prepare(small_codec, tmp_path):
    """prepare(items, read, '--part=2') -> the folder, made with a codec of 32 codes."""
    small_codec.save(tmp_path / 'codec')

    def prepare(items, read, *settings, out='out', recipe=None):
        args = tokenise.arguments('').parse_args([
            f'--out={tmp_path / out}', f'--codec={tmp_path / "codec"}', *settings])
        tokenise.run(items, read, args, recipe or {})
        return tmp_path / out
    return prepare


def records(folder):
    found = {}
    for split in ('train', 'val', 'test'):
        dialogues = Dialogues(str(folder), split)
        found[split] = [dialogues[i] for i in range(len(dialogues))]
    return found


def read_hum(k, codec):
    """k: seconds of humming by the user, which the assistant answers; below 0 it cannot be read."""
    if k < 0:
        raise ValueError(f'{k} s of audio')
    wave = np.zeros(round((k + 0.5) * 16000), np.float32)
    wave[:round(k * 16000)] = hum(140, k)
    turns = [turn('user', 0, k, ' what \n now '), turn('assistant', 0.5, k + 0.5)]
    return Recording(wave, wave[::-1].copy(), turns)


ITEMS = {f'u{i}': 0.4 + 0.05 * (i % 7) for i in range(12)}


def test_a_folder_is_complete(prepare, small_codec, capsys):
    out = prepare(ITEMS | {'broken': -1}, read_hum, '--part=3', '--test_share=0.2')
    found = records(out)
    assert {split: len(rows) for split, rows in found.items()} == dict(train=9, val=1, test=2)
    rows = {row['id']: row for rows in found.values() for row in rows}
    assert rows.keys() == ITEMS.keys()
    for id, row in rows.items():
        wave = read_hum(ITEMS[id], small_codec).user
        assert len(row['user']) == len(row['assistant']) == -(-len(wave) // 640)
        assert row['user'].tolist() == small_codec.encode(np.pad(wave, (0, -len(wave) % 640))).tolist()
        assert row['turns'][0] == dict(role='user', start=0, end=int(np.ceil(ITEMS[id] * 25 - 1e-6)),
                                       text='what now')
        check(row, 32)
    skipped = [json.loads(line) for line in (out / 'skipped.jsonl').read_text().splitlines()]
    assert skipped == [dict(id='broken', reason='-1 s of audio')]
    assert sorted(path.name for path in out.iterdir()) == [
        'codec', 'prepared.json', 'skipped.jsonl', 'test.arrow', 'train.arrow', 'val.arrow']
    assert 'records                        9 train, 1 val, 2 test' in capsys.readouterr().out
    prepare(ITEMS | {'broken': -1}, read_hum, '--part=3', '--test_share=0.2')
    assert 'is prepared already' in capsys.readouterr().out


def test_killed_and_continued_equals_uninterrupted(prepare, monkeypatch):
    whole, read_again = prepare(ITEMS, read_hum, '--part=2', out='whole'), []

    def die(path, *rest):
        if path.endswith('000003.arrow'):
            raise KeyboardInterrupt
        return make_part(path, *rest)
    make_part = tokenise.make_part
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenise, 'make_part', die)
        prepare(ITEMS, read_hum, '--part=2')
    out = prepare(ITEMS, lambda k, codec: read_again.append(k) or read_hum(k, codec), '--part=2')
    assert len(read_again) == 6         # three of six parts were there
    for name in ('train.arrow', 'val.arrow', 'test.arrow', 'prepared.json', 'skipped.jsonl'):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_what_was_skipped_is_added_by_the_same_command(prepare, capsys, monkeypatch):
    """Five were skipped; four are back when one is still broken. Only these five are read again, also where
    that is broken off, and the folder is as if all had been there at once."""
    items, read_now = ITEMS | {'broken': -1}, []

    def read(k, codec, missing=()):
        read_now.append(k)
        if k in missing:
            raise OSError('no file')
        return read_hum(k, codec)._replace(remark='both hum' if k > 0.62 else '')

    settings, late = ('--part=3', '--test_share=0.2'), (ITEMS['u1'], ITEMS['u3'])     # u1 and u8, u3 and u10
    whole = prepare(items, read, *settings, out='whole')
    assert 'note: in 2 recordings both hum; the first is u5' in capsys.readouterr().out
    out = prepare(items, partial(read, missing=late), *settings)
    assert len((out / 'skipped.jsonl').read_text().splitlines()) == 5
    capsys.readouterr()
    prepare(items, partial(read, missing=late), *settings)
    assert 'prepared already; 5 recordings still cannot be read' in capsys.readouterr().out

    def die(path, *rest):
        raise KeyboardInterrupt
    read_now.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenise, 'make_part', die)
        prepare(items, read, *settings)
    assert 'u1, which was skipped, can be read now: all 5' in capsys.readouterr().out
    prepare(items, read, *settings)
    assert set(read_now) == {*late, -1}
    for name in ('train.arrow', 'val.arrow', 'test.arrow', 'prepared.json', 'skipped.jsonl'):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_other_settings_are_not_mixed_in(prepare):
    prepare(ITEMS, read_hum, recipe=dict(role='user'))
    message = 'was made from other material or settings .{}.; choose another --out'
    with pytest.raises(ValueError, match=message.format('role')):
        prepare(ITEMS, read_hum, recipe=dict(role='assistant'))
    with pytest.raises(ValueError, match=message.format('part')):
        prepare(ITEMS, read_hum, '--part=5', recipe=dict(role='user'))


def test_nothing_to_prepare(prepare):
    message = 'none of the 2 recordings could be prepared: 2 such as a: -1 s of audio$'
    with pytest.raises(ValueError, match=message):
        prepare(dict(a=-1, b=-2), read_hum)

    def refuse(n_sec, codec):
        raise ValueError(f'no file {n_sec}.wav' if n_sec % 3 else f'the channel {n_sec} is mute')
    with pytest.raises(ValueError, match='none of the 4 recordings could be prepared: '
                       r'3 such as b: no file 1\.wav; 1 such as a: the channel 0 is mute$'):
        prepare(dict(a=0, b=1, c=2, d=4), refuse)
    skipped = [dict(id=letter, reason=f'no {letter}') for letter in 'abcdefghijklm']
    assert tokenise.count_kinds(skipped).endswith('; 1 such as j: no j; and 3 kinds more')
    with pytest.raises(ValueError, match='no recordings were found'):
        prepare({}, read_hum)
    assert prepare(ITEMS, read_hum, out='later')


def test_codes_beside_audio(small_codec):
    """A channel that comes as codes is laid beside one that comes as audio, and filled up with silence."""
    wave, codes = hum(140, 1.0), np.arange(24, dtype=np.uint16)
    fitted = fit(Recording(wave, codes, []), small_codec, 0.1)
    assert len(fitted.user) == 16000
    assert fitted.assistant.tolist() == [*range(24), small_codec.silence_codes[0]]


FRAME = np.zeros(640, np.float32)
TURN_AT_NO_TIME = dict(turn('user', 0, 1), words=[dict(text='a', start_sec=float('nan'), end_sec=1)])


@pytest.mark.parametrize('recording, message', [
    (Recording(None, None, []), 'neither channel has audio'),
    (Recording(np.zeros(0, np.float32), None, []), 'no samples in a row'),
    (Recording(np.zeros((5, 2), np.float32), None, []), 'no samples in a row'),
    (Recording(np.full(640, np.nan, np.float32), None, []), 'no numbers'),
    (Recording(np.array([3, 40]), None, []), 'codes 3 to 40, codec mel has 0 to 31'),
    (Recording(np.zeros(16000, np.float32), np.zeros(20000, np.float32), []),
     "1.00 s and the assistant's 1.28 s, more than"),
    (Recording(FRAME, None, [turn('user', 0, None)]), 'a time that is no number'),
    (Recording(FRAME, None, [TURN_AT_NO_TIME]), 'a time that is no number'),
    (Recording(FRAME, None, [turn('assistant', 0, 1)]),
     'a turn of the assistant at 0 s, but there is no such channel'),
])
def test_unfit_recordings(recording, message, small_codec):
    with pytest.raises(ValueError, match=message):
        fit(recording, small_codec, 0.1)


def test_turns_on_frames():
    """
    At 25 Hz: every frame that a turn touches; 0.12 s is the border of frame 3, in whatever way it is rounded
    in binary.
    """
    turns = [turn('user', -0.5, 0.12), turn('user', 0.1, 0.30), turn('assistant', 0.12, 9.0),
             turn('user', 0.2, 0.25), turn('assistant', 9.5, 10)]
    turns[1]['words'] = [
        dict(text='a', start_sec=0.1, end_sec=0.2), dict(text='b', start_sec=0.2, end_sec=0.5)]
    framed, n_lost = on_frames(turns, 20, 25.0)
    assert [(t['role'], t['start'], t['end']) for t in framed] == [
        ('user', 0, 3), ('user', 3, 8), ('assistant', 3, 20)]
    assert n_lost == 2
    assert [(w['text'], w['start'], w['end']) for w in framed[1]['words']] == [('a', 3, 5), ('b', 5, 8)]


times = st.floats(-2, 12, allow_nan=False)


@given(st.lists(st.builds(turn, st.sampled_from(['user', 'assistant']), times, times)), st.integers(1, 200),
       st.sampled_from([12.5, 25.0, 50.0]))
def test_framed_turns_are_a_record(turns, n_frame, rate_hz):
    framed, n_lost = on_frames(turns, n_frame, rate_hz)
    check(dict(id='x', user=[0] * n_frame, assistant=[0] * n_frame, turns=framed), 1)
    assert len(framed) + n_lost == len(turns)


def test_the_split_is_by_id():
    ids = [f'id{i}' for i in range(1000)]
    splits = split_ids(ids, 0.01, 0.02, seed=0)
    assert [list(splits.values()).count(split) for split in ('train', 'val', 'test')] == [970, 10, 20]
    assert split_ids(ids[::-1], 0.01, 0.02, seed=0) == splits != split_ids(ids, 0.01, 0.02, seed=1)
    assert set(split_ids(ids[:3], 0.01, 0.01, seed=0).values()) == {'train', 'val', 'test'}
    assert set(split_ids(ids[:2], 0.01, 0.01, seed=0).values()) == {'train', 'val'}
    assert set(split_ids(ids[:3], 0.0, 0.0, seed=0).values()) == {'train'}


def test_statistics(prepare):
    """
    Ten seconds: the user 0 to 4, the assistant 3 to 8 and the user again 9 to 10: 1 s both, 1 s neither, two
    changes.
    """
    def read(_, codec):
        wave = np.zeros(160000, np.float32)
        return Recording(wave, wave, [turn('user', 0, 4), turn('assistant', 3, 8), turn('user', 9, 10)])
    out = prepare(dict(a=0, b=0, c=0), read)
    table = json.loads((out / 'prepared.json').read_text())
    assert table['both_speak'] == table['neither_speaks'] == '10.0%' and table['floor_changes_a_minute'] == 12
    assert table['gap user to assistant'].startswith('median -1.00 s')
    assert table['gap assistant to user'].startswith('median 1.00 s')


@pytest.mark.slow
def test_a_thousand_utterances_with_a_killed_worker_and_a_corrupt_file(small_codec, tmp_path):
    """
    Two processes; one is killed in the middle of a part (kill -9, as the system does when memory runs out).
    The other ends its part too: 999 records, once each, and the file that is no audio is named.
    """
    soundfile = pytest.importorskip('soundfile')
    small_codec.save(tmp_path / 'codec')
    with open(tmp_path / 'corpus.jsonl', 'w') as manifest:
        for i in range(1000):
            path = tmp_path / f'{i:04d}.wav'
            soundfile.write(path, hum(100 + i % 200, 0.2 + 0.001 * (i % 100), seed=i), 16000)
            manifest.write(json.dumps(dict(key=f'k{i}', wav=str(path), txt=f'number {i}')) + '\n')
    (tmp_path / '0537.wav').write_bytes(b'RIFF no audio')
    command = [
        sys.executable, str(ROOT / 'data/manifest/prepare.py'), str(tmp_path / 'corpus.jsonl'),
        f'--out={tmp_path / "out"}', f'--codec={tmp_path / "codec"}', '--part=20', '--role=user']

    def start(rank):
        env = dict(os.environ, RANK=str(rank), WORLD_SIZE='2', OMP_NUM_THREADS='1')
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    workers = [start(0), start(1)]
    while len(list((tmp_path / 'out').glob('parts/*.arrow'))) < 10:
        assert workers[0].poll() is None and workers[1].poll() is None
        time.sleep(0.01)
    workers[1].send_signal(signal.SIGKILL)
    out, err = workers[0].communicate(timeout=120)
    assert workers[0].returncode == 0 and workers[1].wait() == -signal.SIGKILL, err
    ids = [row['id'] for rows in records(tmp_path / 'out').values() for row in rows]
    assert sorted(ids) == sorted(f'k{i}' for i in range(1000) if i != 537)
    skipped = [json.loads(line) for line in Path(tmp_path / 'out/skipped.jsonl').read_text().splitlines()]
    assert [entry['id'] for entry in skipped] == ['k537'] and '0537.wav is not audio' in skipped[0]['reason']
    assert '1 recordings were skipped' in out
