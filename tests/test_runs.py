"""The recipes in runs/: the big one's commands are understood by what they start, the small one runs."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import config
import evaluate
import sample
import talk
import train
from checkpoint import read_info
from common.audio import read_audio
from data import simulate, tokenise
from data.manifest import prepare as manifest
from flatten import get_layout


def test_every_command_of_the_big_recipe_parses(tmp_path, monkeypatch):
    """It is run with a torchrun and a python that only write down what they were asked."""
    for name in ('torchrun', 'python'):
        (tmp_path / name).write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\037" "$word"; done >> '
                                     f'{tmp_path}/asked; echo >> {tmp_path}/asked\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / 'libri.jsonl').write_text(json.dumps(dict(key='a', wav='a.wav', txt='a')) + '\n')
    subprocess.run([str(ROOT / 'runs/omniflatten.sh')], check=True, capture_output=True,
                   env=dict(os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}',
                            SPEECH=f'{tmp_path}/libri.jsonl', TEXTS='a.json b.json'))
    asked = [line.rstrip('\x1f').split('\x1f') for line in (tmp_path / 'asked').read_text().splitlines()]
    launcher = '--standalone', '--nproc_per_node=8', '--max_restarts=2', '-m'
    asked = [[word for word in words if word not in launcher] for words in asked]
    prepare, listen = ['codec', 'data/manifest/prepare.py', 'data/simulate.py'], ['sample.py', 'evaluate.py']
    assert [words[0] for words in asked] == prepare + 4 * ['train.py'] + ['evaluate.py'] + 2 * listen
    monkeypatch.chdir(ROOT)
    prepared, out = [], {}
    monkeypatch.setattr(tokenise, 'run', lambda items, read, args, recipe: prepared.append(args))
    for script, *arguments in asked:
        if script == 'data/manifest/prepare.py':
            monkeypatch.setattr(sys, 'argv', [script, *arguments])
            manifest.main()
        elif script == 'data/simulate.py':
            prepared.append(simulate.arguments().parse_args(arguments))
        elif script == 'train.py':
            cfg = config.load(train.Config, arguments)
            assert cfg.batch_tokens % (cfg.batch_size * cfg.block_size * 8) == 0
            out[cfg.init_from] = cfg
        elif script in ('sample.py', 'evaluate.py'):
            module = dict(sample=sample, evaluate=evaluate)[script[:-3]]
            assert config.load(module.Config, arguments).checkpoint in [cfg.out_dir for cfg in out.values()]
    assert prepared[1].files == ['a.json', 'b.json']
    assert prepared[1].tts == 'cosyvoice' and prepared[1].p_backchannel == 0
    # each stage starts where the one before ends, and reads what was prepared
    assert list(out) == ['models/Qwen2-0.5B', 'out/align', 'out/half_duplex', 'out/duplex3']
    stages = list(out.values())
    assert [cfg.out_dir for cfg in stages] == ['out/align', 'out/half_duplex', 'out/duplex3', 'out/duplex2']
    assert [cfg.data for cfg in stages] == [prepared[0].out] + 3 * [prepared[1].out]
    for cfg in stages:
        adamw = cfg.learning_rate, cfg.beta1, cfg.beta2, cfg.weight_decay, cfg.min_learning_rate
        assert adamw == (2e-5, 0.9, 0.95, 0.1, 0.0)
    lengths = ['asr+tts:5epochs', 'half_duplex:5epochs', 'duplex3:5epochs', 'duplex2:5epochs']
    assert [cfg.stages for cfg in stages] == lengths


@pytest.mark.parametrize('name, block_size', [
    ('align', 1024), ('half_duplex', 8192), ('duplex3', 8192), ('duplex2', 8192)])
def test_the_configs_are_the_papers(name, block_size):
    """On eight GPUs; 100 M tokens a step."""
    cfg = config.load(train.Config, [str(ROOT / f'config/{name}.py')])
    assert cfg.block_size == block_size and cfg.batch_tokens == 100_007_936
    assert cfg.batch_tokens % (8 * cfg.batch_size * cfg.block_size) == 0


def test_every_command_of_the_chunks_parses(tmp_path, monkeypatch):
    """runs/chunks.sh, and in it runs/talk.sh, with a python that only writes down what it was asked."""
    (tmp_path / 'python').write_text(
        f'#!/bin/sh\n(for word in "$@"; do printf "%s\\037" "$word"; done; echo) >> {tmp_path}/asked\n')
    (tmp_path / 'python').chmod(0o755)
    os.makedirs(tmp_path / 'out.talk/1')
    (tmp_path / 'out.talk/1/user.json').touch()
    subprocess.run([str(ROOT / 'runs/chunks.sh')], check=True, capture_output=True, env=dict(
        os.environ, PYTHON=f'{tmp_path}/python', DATA=str(tmp_path), OUT=f'{tmp_path}/out', JOBS='1'))
    asked = [line.rstrip('\x1f').split('\x1f') for line in (tmp_path / 'asked').read_text().splitlines()]
    monkeypatch.chdir(ROOT)
    runs = [config.load(train.Config, words[1:]) for words in asked if words[0] == 'train.py']
    chunks = [(cfg.speech_chunk, cfg.text_chunk) for cfg in runs]
    assert chunks == [(2, 1), (5, 1), (10, 2), (20, 4)]
    assert {cfg.stages for cfg in runs} == {config.load(train.Config, ['config/demo.py']).stages}
    for cfg in runs:        # the demo's longest dialogue has 230 frames, and is one row
        layout = get_layout('duplex3', cfg.speech_chunk, cfg.text_chunk)
        assert layout.n_chunk(230) * layout.period <= cfg.block_size
        assert cfg.batch_tokens % (cfg.batch_size * cfg.block_size) == 0
    spoken = [config.load(talk.Config, words[1:]).checkpoint for words in asked if words[0] == 'talk.py']
    judged = [config.load(evaluate.Config, words[1:]).checkpoint
              for words in asked if words[0] == 'evaluate.py']
    assert judged == [cfg.out_dir for cfg in runs] and set(judged) == set(spoken) and spoken == asked[-1][2:6]


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """With the recordings and texts of ../shared/data, where they are; else the script makes some."""
    pytest.importorskip('espeakng_loader')
    data = ROOT.parent / 'shared/data'
    env = dict(os.environ, OUT=str(tmp_path / 'out'), PYTHON=sys.executable,
               DATA=str(data) if data.is_dir() else '')
    done = subprocess.run([str(ROOT / 'runs/rehearsal.sh')], env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    layouts = dict(align='tts', half_duplex='half_duplex', duplex3='duplex3', duplex2='duplex2')
    for name, layout in layouts.items():
        assert read_info(tmp_path / 'out' / name).layouts[-1].name == layout
        lines = (tmp_path / 'out' / name / 'log.jsonl').read_text().splitlines()
        losses = [row['loss'] for row in map(json.loads, lines) if row['kind'] == 'train']
        assert losses[-1] < losses[0]
    question = read_audio(str(tmp_path / 'out/question.wav'), 16000)
    for name in ('duplex3', 'duplex2'):
        path = tmp_path / 'out' / name / 'samples' / 'question'
        user, assistant = (read_audio(f'{path}.wav', 16000, channel) for channel in (0, 1))
        np.testing.assert_allclose(user[:len(question)], question, atol=1e-3)
        assert len(user) == len(assistant) and path.with_suffix('.jsonl').exists()
    shutil.rmtree(tmp_path / 'out')
