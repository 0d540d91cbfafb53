"""
Two nodes without a shared disk: two folders on this machine, with out_dir=run in both; once two agents of
torchrun, then processes that are told what agents tell them. Only the node of the first one writes there.
"""
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, ranks
from safetensors.torch import load_file

import train


@pytest.fixture
def toy(small_data):
    """A run without a schedule, so that 10 steps and 5 more are 15 steps."""
    return train.Config(
        data=str(small_data), out_dir='run', stages='duplex3:15', n_layer=1, n_head=2, n_kv_head=1, n_embd=32,
        n_inner=64, block_size=128, batch_size=1, batch_tokens=512, eval_interval=5, log_interval=5,
        warmup_steps=0, learning_rate=3e-3, min_learning_rate=3e-3, device='cpu', dtype='float32',
        tensorboard=False, n_listen=0)


def two_nodes(forks, cfgs, folders, fails=False):
    """Runs train.py on both, the first folder's node has the first process -> what they printed."""
    printed = []
    for done in forks.run(*(
            ([ROOT / 'train.py', *settings(cfg)], dict(os.environ, PYTHONPATH=str(ROOT)) | place, folder)
            for cfg, folder, place in zip(cfgs, folders, ranks(2, n_node=2)))):
        printed.append(done.stdout + done.stderr)
        assert bool(done.returncode) == fails, printed[-1]
    return printed


def two_agents(cfg, folders):
    """The same by torchrun."""
    agents, port = [], ranks(2)[0]['MASTER_PORT']
    for node, folder in enumerate(folders):
        launcher = ['-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', f'--node_rank={node}',
                    '--master_addr=127.0.0.1', f'--master_port={port}', str(ROOT / 'train.py')]
        agents.append(subprocess.Popen(
            [sys.executable, *launcher, *settings(cfg)], cwd=folder, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.STDOUT, env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))))
    printed = [agent.communicate()[0] for agent in agents]
    assert not any(agent.returncode for agent in agents), '\n\n'.join(printed)


def settings(cfg):
    return [f'--{name}={getattr(cfg, name)}' for name in cfg.__dataclass_fields__]


def weights(folder, step):
    return load_file(folder / f'run/step-{step:06d}/model.safetensors')


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_run_goes_on_wherever_its_first_process_is(toy, tmp_path, forks):
    """10 steps, then 5 more: resumed on the same two nodes, and with the nodes exchanged, so that the first
    process finds no run on its disk. Both end where 15 steps at once end, bit for bit."""
    folders = {name: tmp_path / name for name in ('whole', 'idle', 'a', 'b', 'c', 'd', 'empty')}
    for folder in folders.values():
        folder.mkdir()
    two_agents(toy, [folders['whole'], folders['idle']])
    assert not (folders['idle'] / 'run').exists()
    two_nodes(forks, [replace(toy, stages='duplex3:10')] * 2, [folders['a'], folders['b']])
    shutil.copytree(folders['a'] / 'run', folders['c'] / 'run')
    resumed = replace(toy, resume=True)
    two_nodes(forks, [resumed] * 2, [folders['a'], folders['b']])
    (folders['d'] / 'run').mkdir()
    (folders['d'] / 'run/notes.txt').write_text('precious')
    two_nodes(forks, [resumed] * 2, [folders['d'], folders['c']])
    assert (folders['d'] / 'run.1/notes.txt').read_text() == 'precious'     # moved aside, not replaced
    expected = weights(folders['whole'], 15)
    assert equal(weights(folders['a'], 15), expected) and equal(weights(folders['d'], 15), expected)
    # the log came along, the state that was sent to the other node is deleted there
    logs = [[line.split('"loss"')[1] for line in open(folders[name] / 'run/log.jsonl') if '"val"' in line]
            for name in 'ad']
    assert logs[0] == logs[1] and len(logs[0]) == 3
    assert not list(folders['b'].iterdir()) and weights(folders['c'], 10)


@pytest.mark.slow
def test_nodes_that_differ_are_told(toy, tmp_path, forks):
    for name in 'ab':
        (tmp_path / name).mkdir()
    cfgs, folders = [toy, replace(toy, seed=7)], [tmp_path / 'a', tmp_path / 'b']
    printed = '\n'.join(two_nodes(forks, cfgs, folders, fails=True))
    assert 'seed: 1337 on process 0' in printed and '7 on process 1' in printed
    assert 'all nodes need the same settings and files' in printed and not (tmp_path / 'a/run').exists()


@pytest.mark.slow
def test_two_runs_under_one_name_are_not_mixed(toy, tmp_path, forks):
    for name in 'ab':
        (tmp_path / name).mkdir()
        train.main(replace(toy, out_dir=str(tmp_path / name / 'run'), stages='duplex3:5', batch_size=2))
    resumed = replace(toy, resume=True)
    printed = '\n'.join(two_nodes(forks, [resumed] * 2, [tmp_path / 'a', tmp_path / 'b'], fails=True))
    assert 'out_dir=run holds one run where process 0 runs and another where process 1 does' in printed
