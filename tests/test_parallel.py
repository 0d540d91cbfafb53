"""Copies and shards of a model: the same gradients, losses, and checkpoints as one process."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from checkpoint import last_state
from common.device import Place
from common.memory import check_memory

TORCHRUN = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


@pytest.fixture
def toy(small_data, tmp_path):
    return train.Config(
        data=str(small_data), out_dir=str(tmp_path / 'run'), stages='duplex3:10', n_layer=2, n_head=2,
        n_kv_head=1, n_embd=32, n_inner=64, block_size=128, batch_size=1, batch_tokens=512, eval_interval=5,
        log_interval=5, warmup_steps=2, learning_rate=3e-3, device='cpu', dtype='float32', tensorboard=False,
        n_listen=0)


def arguments(cfg):
    return [f'--{name}={getattr(cfg, name)}' for name in cfg.__dataclass_fields__]


def losses(cfg):
    rows = [json.loads(line) for line in open(Path(cfg.out_dir) / 'log.jsonl')]
    return [(row['kind'], row['step'], row['loss']) for row in rows]


def tensors(cfg, name='model.safetensors'):
    return load_file(Path(last_state(cfg.out_dir)) / name)


def assert_close(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize('tied', [True, False])
def test_shards_equal_copies(toy, tmp_path, run, tied):
    """Two processes with half of the model each: the losses of two with all of it, to 1e-5, and the weights
    and moments. (AdamW's steps have one size, however small the gradient: where it is near 0, rounding
    decides.) Then the state of the shards goes on in one process that has all, and that of the copies in
    shards."""
    if not tied:
        base = replace(toy, stages='duplex3:1', out_dir=str(tmp_path / 'base'), batch_size=2)
        train.main(base)
        untie(Path(base.out_dir))
        toy = replace(toy, init_from=base.out_dir)
    copies = replace(toy, out_dir=str(tmp_path / 'copies'))
    shards = replace(toy, out_dir=str(tmp_path / 'shards'), shard=True)
    for cfg in (copies, shards):
        run('train.py', *arguments(cfg), n_process=2)
    for (kind, step, ours), theirs in zip(losses(shards), losses(copies), strict=True):
        assert (kind, step) == theirs[:2] and ours == pytest.approx(theirs[2], rel=1e-5)
    assert_close(tensors(shards), tensors(copies), 1e-4)
    assert_close(*(tensors(cfg, 'optimizer.safetensors') for cfg in (shards, copies)), 1e-5)
    files = [sorted(path.relative_to(cfg.out_dir) for path in Path(cfg.out_dir).rglob('*'))
             for cfg in (shards, copies)]
    assert files[0] == files[1]

    longer = dict(stages='duplex3:14', resume=True)
    one = replace(shards, shard=False, batch_size=2, **longer)
    train.main(one)
    run('train.py', *arguments(replace(copies, shard=True, **longer)), n_process=2)
    assert_close(tensors(one), tensors(copies), 1e-4)


def untie(folder):
    """Gives the model in a checkpoint a head of its own."""
    from safetensors.torch import save_file
    config = json.loads((folder / 'config.json').read_text())
    weights = load_file(folder / 'model.safetensors')
    weights['lm_head.weight'] = 0.5 * weights['model.embed_tokens.weight']
    (folder / 'config.json').write_text(json.dumps(config | dict(tie_word_embeddings=False)))
    save_file(weights, folder / 'model.safetensors')
    (folder / 'manifest.json').unlink()


@pytest.mark.slow
def test_shards_are_heard_and_computed_again(toy, small_run, tmp_path, run):
    """Compiled, with --checkpoint_blocks, in bf16. The first process gathers the model and listens."""
    cfg = replace(toy, data=str(small_run[0]), shard=True, n_listen=1, checkpoint_blocks=True, compile=True,
                  dtype='bfloat16')
    printed = run('train.py', *arguments(cfg), n_process=2).stdout
    assert 'note' not in printed and len(list((Path(cfg.out_dir) / 'listen').glob('*.jsonl'))) == 2
    copies = replace(cfg, shard=False, compile=False, out_dir=str(tmp_path / 'copies'))
    run('train.py', *arguments(copies), n_process=2)
    for ours, theirs in zip(losses(cfg), losses(copies), strict=True):
        assert ours[2] == pytest.approx(theirs[2], rel=1e-2)


BUCKETS = '''
import sys, torch, torch.distributed as dist
from common.device import join
from model import ModelConfig, Qwen2
from parallel import Copies
place = join('cpu', 'float32')
def gradient(n_bucket, dtype=torch.float32, n_micro_step=2):
    torch.manual_seed(place.rank)       # all get the first process's weights
    model = Qwen2(ModelConfig(64, 64, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, n_inner=64))
    gradients = Copies(model, place, dtype, n_bucket)
    sent = []
    gradients.send = lambda real=gradients.send: (sent.append(len(done)), real())
    done = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: done.append(1))
    for step in range(2):       # what the first step leaves behind does not reach the second
        gradients.zero()
        for i in range(n_micro_step):
            idx = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(7 * place.rank + i))
            total, losses = model(idx, targets=idx.flatten(), learn=torch.arange(32))
            gradients.backward(total, i == n_micro_step - 1)
        norm = gradients.finish(torch.tensor(float(n_micro_step * 32)), 0.0)
    return gradients.flat, norm, sent, len(gradients.buckets), len(done)
whole, norm, _, n_bucket, _ = gradient(2 ** 25)
assert n_bucket == 1
parts, norm_of_parts, sent, n_bucket, n_done = gradient(2000)
assert n_bucket > 5 and len(sent) == 2 * n_bucket
assert torch.equal(whole, parts) and norm == norm_of_parts and norm > 0
assert sent[0] < sent[n_bucket - 1] <= n_done // 2, sent       # in the midst of backward, not after it
rounded, *_ = gradient(2000, torch.bfloat16)
assert 0 < (rounded - whole).norm() / whole.norm() < 0.01
mine = whole.clone()
dist.broadcast(mine, 0)
assert torch.equal(mine, whole)
dist.barrier()      # a process that ends closes its connections
dist.destroy_process_group()
'''


@pytest.mark.slow
def test_buckets_sum_to_the_same_and_leave_while_backward_runs(tmp_path, run):
    script = tmp_path / 'buckets.py'
    script.write_text(BUCKETS)
    run(script, n_process=2)


def test_blocks_that_are_computed_again_learn_the_same(toy, tmp_path):
    again = replace(toy, checkpoint_blocks=True, out_dir=str(tmp_path / 'again'))
    train.main(toy)
    train.main(again)
    assert all(torch.equal(x, tensors(again)[name]) for name, x in tensors(toy).items())


@pytest.mark.parametrize('n_process, shard, expected', [
    (1, False, 'cpu has 80 GB: --shard=true splits them, over more than 2 processes'),
    (8, False, 'cpu has 80 GB: --shard=true makes it 15 GB for each of 8 processes'),
    (1, True, 'over more than 2 processes'), (2, True, None), (8, True, None)])
def test_what_cannot_fit_is_told_before(monkeypatch, n_process, shard, expected):
    """Qwen2-7B: 7.6 B parameters of 16 bytes are 122 GB."""
    monkeypatch.setattr('common.memory.memory_bytes', lambda device: 80e9)
    place = Place(torch.device('cpu'), world_size=n_process)
    if expected is None:
        assert check_memory(7_620_000_000, place, shard) == 16 * 7_620_000_000 // n_process
        return
    with pytest.raises(ValueError, match='7.6 B parameters take 122 GB of weights, gradients and moments'):
        check_memory(7_620_000_000, place, shard)
    with pytest.raises(ValueError, match=expected):
        check_memory(7_620_000_000, place, shard)


@pytest.mark.parametrize('settings, message', [
    (dict(shard=True), 'shard splits the model over the processes that torchrun starts, and there is one')])
def test_refused(toy, settings, message):
    with pytest.raises(ValueError, match=message):
        train.main(replace(toy, **settings))
