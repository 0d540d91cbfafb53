"""
The demo from end to end, small: espeak, codec, dialogues, training, a wav that was never heard, and its
answer.
"""
import json
import pathlib

import numpy as np
import pytest
import soundfile

import config
import evaluate
import sample
import train
from common.audio import read_audio

ROOT = pathlib.Path(__file__).parent.parent
PREPARE = ('data/demo/prepare.py', '--n_dialogue=60', '--n_clip=120')

pytestmark = pytest.mark.slow
pytest.importorskip('espeakng_loader')


@pytest.fixture(scope='module')
def prepared(tmp_path_factory, run):
    folder = tmp_path_factory.mktemp('demo') / 'data'
    run(*PREPARE, f'--out={folder}')
    return folder


def test_prepare(prepared, run):
    about = json.loads((prepared / 'prepared.json').read_text())
    assert about['loudness_correlation'] > 0.8 and about['duration_error'] == 0 and about['same_codes'] > 0.5
    assert about['train']['n_dialogue'] == 60 and about['test']['n_question'] >= 100
    assert 'is prepared already' in run(*PREPARE, f'--out={prepared}').stdout


def test_prepared_twice_is_the_same(prepared, tmp_path, run):
    """
    The same questions of the same voices at the same times. Not the same bits: espeak-ng's noises differ now
    and then.
    """
    from data.dialogues import Dialogues
    run(*PREPARE, f'--out={tmp_path}')
    one, other = ((folder / 'tokenizer/tokenizer.json').read_bytes() for folder in (tmp_path, prepared))
    assert one == other
    for split in ('train', 'test'):
        first, second = Dialogues(str(prepared), split), Dialogues(str(tmp_path), split)
        assert len(first) == len(second)
        moved = []
        for a, b in ((first[i], second[i]) for i in range(len(first))):
            assert a['id'] == b['id'] and [t['text'] for t in a['turns']] == [t['text'] for t in b['turns']]
            moved.append(max([abs(t['end'] - u['end']) for t, u in zip(a['turns'], b['turns'])], default=0))
        assert np.mean(np.array(moved) <= 2) > 0.95


def test_test_voices_are_not_heard_in_training(prepared):
    from data.dialogues import Dialogues
    voices = {}
    for split in ('train', 'val', 'test'):
        dialogues = Dialogues(str(prepared), split)
        voices[split] = {dialogues[i]['id'].split('-')[2] for i in range(len(dialogues))}
    assert not voices['train'] & voices['test'] and not voices['train'] & voices['val']
    assert len(voices['test']) >= 20


def test_train_sample_evaluate(prepared, tmp_path, run):
    """The demo's own config, for a few steps; then a question in another voice through every command."""
    cfg = config.load(train.Config, [
        str(ROOT / 'config/demo.py'), f'--data={prepared}', f'--out_dir={tmp_path}/run',
        '--stages=asr.user+tts.assistant:6, duplex3:6', '--eval_interval=6', '--batch_size=4',
        '--tensorboard=false'])
    metrics = train.main(cfg)
    assert metrics['step'] == 12 and np.isfinite(metrics['val_loss'])
    run('data/demo/prepare.py', '--say=What is the capital of France?', f'--wav={tmp_path}/question.wav',
        '--voice=linda', '--rate=150')
    assert soundfile.info(tmp_path / 'question.wav').samplerate == 44100
    assert 1.5 < len(read_audio(str(tmp_path / 'question.wav'), 16000)) / 16000 < 4
    dialogue, = sample.main(config.load(sample.Config, [
        f'--checkpoint={tmp_path}/run', f'--user={tmp_path}/question.wav', '--silence_bias=-100',
        '--reply_sec=1']))
    user = [turn for turn in dialogue['turns'] if turn['role'] == 'user']
    assert user and 0.3 < user[0]['start'] / 25 < 0.7       # half a second of noise comes first
    measured = evaluate.main(config.load(evaluate.Config, [
        f'--checkpoint={tmp_path}/run', f'--data={prepared}', '--n_dialogue=8']))
    assert measured['n_turn'] >= 8 and measured['train_steps'] == 12


@pytest.mark.parametrize('name, stages', [
    ('demo_half_duplex', 'half_duplex:3'), ('demo_duplex2', 'duplex2:3')])
def test_the_other_stages_run(prepared, tmp_path, name, stages):
    first = config.load(train.Config, [
        str(ROOT / 'config/demo.py'), f'--data={prepared}', f'--out_dir={tmp_path}/a', '--stages=duplex3:2',
        '--tensorboard=false'])
    train.main(first)
    second = config.load(train.Config, [
        str(ROOT / f'config/{name}.py'), f'--data={prepared}', f'--out_dir={tmp_path}/b',
        f'--init_from={tmp_path}/a', f'--stages={stages}', '--tensorboard=false'])
    assert train.main(second)['step'] == 3


def test_unknown_voice(tmp_path, run):
    result = run('data/demo/prepare.py', '--say=hi', '--voice=nobody', f'--wav={tmp_path}/a.wav', fails=True)
    assert "espeak-ng has no voice 'nobody'" in result.stderr and not (tmp_path / 'a.wav').exists()
