"""
Is everything right that runs on a GPU? The rows of python bench.py --check, under ten minutes, the cheapest
first.

    head       N=65, gradient of the head                     0.00265 error …    pass: at most 0.02
    duplex     compiled against eager, temperature 1                0 ids …      pass: at most 0

Each compares a path of the GPU with a plain one: fused or compiled code with its definition, captured graphs
with eager passes, a run that was killed and resumed with one that was not. Errors are norms of differences
over norms of the plain result. On a CPU the same rows run with what a CPU has, as a test of the rows.
"""
import copy
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from common.device import Place, peak_flops
from data.dialogues import Dialogues
from data.loader import Loader
from data.made_up import make_codec, make_vocabulary, write_data
from decode import Duplex, Sampling
from flatten import get_layout
from model import (
    ModelConfig,
    Qwen2,
    add_product,
    attend_grouped,
    choose_attention,
    document_ends,
    linear_cross_entropy,
)
from parallel import Copies, Shards, gather
from table import Table

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def verify(bench, name, value, limit, unit='error', at_least=False):
    """Adds a line to the table, which passes if value is at most (or at least) limit."""
    is_right = value >= limit if at_least else value <= limit       # NaN is never right
    bound = 'at least' if at_least else 'at most'
    bench.add(name, value, unit, f'{"pass" if is_right else "FAIL"}: {bound} {limit:g}')
    if not is_right:
        bench.failed.append(f'{bench.row}: {name}')


def error(ours, plain):
    ours, plain = ours.double(), plain.double()
    return float((ours - plain).norm() / plain.norm().clamp_min(1e-30))


def rounding(bench):
    """The error that is allowed to one result in the device's dtype."""
    return 2e-2 if bench.dtype == torch.bfloat16 else 1e-4


# ------------------------------------------------------------------------------------------------------------
# parts of the model

def device(bench):
    """What it is, and the matmul of bf16 that adds to fp32, on which the head's gradient relies."""
    if bench.is_cuda:
        gpu = torch.cuda.get_device_properties(bench.device)
        verify(bench, f'{gpu.name}: compute capability', gpu.major + gpu.minor / 10, 8.0, 'version',
               at_least=True)
        bench.add('memory', gpu.total_memory / 1e9, 'GB')
    n, V, C = bench.pick((64, 500, 32), (4096, 20_000, 896))
    a, b = (torch.randn(n, m, device=bench.device, dtype=bench.dtype) for m in (V, C))
    total = torch.ones(V, C, device=bench.device)
    add_product(total, a, b)
    limit = 1e-5 if bench.is_cuda or bench.dtype == torch.float32 else rounding(bench)
    expected = 1 + a.double().T @ b.double()
    verify(bench, f'sum in fp32 of products in {bench.dtype}', error(total, expected), limit)


def head(bench):
    """linear_cross_entropy against all logits at once."""
    C, V = bench.sizes['n_embd'], bench.vocab.size
    for n in bench.pick((0, 1, 65), (0, 1, 4097)):
        x = torch.randn(n, C, device=bench.device, requires_grad=True)
        weight = (0.02 * torch.randn(V, C, device=bench.device)).requires_grad_()
        targets, weights = torch.randint(V, (n,), device=bench.device), torch.rand(n, device=bench.device)

        def ours(x=x, weight=weight, targets=targets, weights=weights):
            x.grad = weight.grad = None
            with bench.autocast:
                total, losses = linear_cross_entropy(x, weight, targets, weights)
            total.backward()
            return losses
        losses = ours()
        if not n:
            verify(bench, 'N=0, gradient of the head', float(weight.grad.abs().max()), 0.0)
            continue
        d_x, d_weight = x.grad, weight.grad
        x.grad = weight.grad = None
        plain = F.cross_entropy(x @ weight.T, targets, reduction='none')
        (plain * weights).sum().backward()
        verify(bench, f'N={n}, losses', error(losses, plain.detach()), rounding(bench))
        verify(bench, f'N={n}, gradient of rows', error(d_x, x.grad), rounding(bench))
        verify(bench, f'N={n}, gradient of the head', error(d_weight, weight.grad), rounding(bench))
        if n > 1:
            bench.add(f'N={n}, peak memory', bench.peak(ours) / 1e9, 'GB')


def attention(bench):
    """Each implementation for packed rows, forward and backward, against the dense mask in fp32."""
    H, K, D = bench.sizes['n_head'], bench.sizes['n_kv_head'], bench.sizes['n_embd'] // bench.sizes['n_head']
    names = ('flex', 'varlen') if bench.is_cuda else ('by_document',)
    for T in bench.pick((128,), (1024, 8192)):
        cuts = np.sort(np.random.default_rng(0).choice(np.arange(1, T), 5, replace=False))
        doc = torch.from_numpy(np.searchsorted(cuts, np.arange(T), 'right')).expand(2, T).contiguous()
        doc = doc.to(bench.device)
        qkv = [torch.randn(2, T, heads, D, device=bench.device) for heads in (H, K, K)]
        direction = torch.randn(2, T, H, D, device=bench.device)

        def run(name, dtype, doc=doc, qkv=qkv, direction=direction):
            inputs = [x.to(dtype, copy=True).requires_grad_() for x in qkv]
            y = choose_attention(doc, name)(*inputs).reshape(direction.shape)
            y.backward(direction.to(dtype))
            return [y.detach(), *(x.grad for x in inputs)]
        plain = run('dense', torch.float32)
        for name in names:
            for what, ours, expected in zip(('y', 'dq', 'dk', 'dv'), run(name, bench.dtype), plain):
                verify(bench, f'{name}, T={T}, {what}', error(ours, expected), rounding(bench))
        if bench.is_cuda:
            bench.add(f'varlen, T={T}: documents', len(document_ends(doc)) - 1, 'documents',
                      'of which 12 exist')


def blocks(bench):
    """Two compiled layers against eager ones, over four batches, the last of which has a row of padding."""
    sizes = bench.sizes | dict(n_layer=2)
    T = bench.pick(128, 1024)
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder, bench.vocab, [bench.pick(50, 450)] * 17)
        layouts = [get_layout('duplex3')]
        loader = Loader(Dialogues(folder, 'train'), layouts, bench.vocab, T, 4)
        batches = [batch.to(bench.device) for batch, _ in zip(loader.epoch(), range(3))]
        batches.append([batch.to(bench.device) for batch in loader.epoch()][-1])
    torch.manual_seed(0)
    eager, ours = (Qwen2(ModelConfig(bench.vocab.size, T, **sizes)).to(bench.device) for _ in 'ab')
    ours.load_state_dict(eager.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours.wrap_blocks(compiles=True, checkpoints=True, backend='inductor' if bench.is_cuda else 'eager')
    for model in (eager, ours):
        for batch in batches:
            with bench.autocast:
                total, _ = model(batch.idx, batch.pos, batch.doc, batch.learn, batch.targets)
            total.backward()
    gradients = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (ours, eager)]
    verify(bench, 'gradient of 4 batches, compiled and computed again', error(*gradients), rounding(bench))
    if not bench.is_cuda:       # there 'dense' is compiled, here flex is, with its BlockMask
        return
    verify(bench, 'graphs', torch._dynamo.utils.counters['stats']['unique_graphs'], 3, 'graphs')


# ------------------------------------------------------------------------------------------------------------
# decoding

def backends(bench):
    """Attention of decoding, few queries with a mask that is added, in torch's kernels."""
    H, K, D = bench.sizes['n_head'], bench.sizes['n_kv_head'], bench.sizes['n_embd'] // bench.sizes['n_head']
    S = bench.pick(64, 1024)
    fused = SDPBackend.EFFICIENT_ATTENTION if bench.is_cuda else SDPBackend.FLASH_ATTENTION
    for T in (1, 11):
        q, k, v = (torch.randn(8, n, heads, D, device=bench.device, dtype=bench.dtype)
                   for n, heads in ((T, H), (S, K), (S, K)))
        mask = torch.zeros(1, 1, H // K * T, S, device=bench.device, dtype=bench.dtype)
        mask[..., S // 2:] = -torch.inf
        results = {}
        for backend in (SDPBackend.MATH, fused):
            with sdpa_kernel(backend):
                results[backend] = attend_grouped(q, k, v, mask)
        results['chosen'] = attend_grouped(q, k, v, mask)
        plain = results.pop(SDPBackend.MATH)
        for name, y in results.items():
            name = str(name).split('.')[-1].lower()
            verify(bench, f'{T} queries, {name}', error(y, plain), rounding(bench))


@contextmanager
def decisive_model(bench):
    """Two layers whose choices do not hang on the last bit; in fp32 proper, as TF32 would decide close ones
    otherwise."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    torch.manual_seed(0)
    model = Qwen2(ModelConfig(bench.vocab.size, 256, **bench.sizes | dict(n_layer=2))).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5)
    try:
        yield model.to(bench.device)
    finally:
        torch.set_float32_matmul_precision(precision)


def duplex(bench):
    """Captured graphs, also compiled, against eager passes: the same ids, past the end of the cache and after
    users have left. On a CPU, which has no graphs: compiled passes."""
    layout = get_layout('duplex3')
    users = np.random.default_rng(0).integers(0, bench.vocab.n_codes, (8, 12, 10))

    def talk(model, temperature, uses_graphs, **settings):
        sampling = Sampling(text_temperature=temperature, speech_temperature=temperature)
        decoder = Duplex(model, bench.vocab, layout, 8, sampling, max_context=130, **settings)
        decoder.uses_graphs = uses_graphs and decoder.uses_graphs
        decoder.warm_up(12)
        for c in range(12):
            if c == 8:
                decoder.keep(3)
            decoder.step(users[:decoder.n_row, c])
        return torch.cat(decoder.ids, 1).cpu()
    with decisive_model(bench) as model:
        for temperature in (0.0, 1.0):
            eager = talk(model, temperature, False)
            for name in ('graphs', 'compiled') if bench.is_cuda else ('compiled',):
                ids = talk(model, temperature, True, compile=name == 'compiled')
                n_other = int((ids != eager).sum())
                verify(bench, f'{name} against eager, temperature {temperature:g}', n_other, 0, 'ids')
            if bench.is_cuda and not temperature:       # at another one they draw other random numbers
                cpu = talk(copy.deepcopy(model).cpu(), temperature, False)
                verify(bench, 'against a CPU', int((eager != cpu).sum()), 0, 'ids')


def table(bench):
    """Four users at one table, who begin and speak at different times, against each in a Duplex of their own,
    eager: the same ids, past the end of the cache, and frame by frame what a step returns."""
    layout, settings = get_layout('duplex3'), dict(sampling=Sampling(1.0, 1.0), max_context=130)
    users, expected = np.random.default_rng(0).integers(0, bench.vocab.n_codes, (4, 9, 10)), []
    with decisive_model(bench) as model:
        for user in users:
            alone = Duplex(model, bench.vocab, layout, **settings)
            alone.uses_graphs = False
            expected.append([np.concatenate(alone.step(chunk[None]), 1)[0] for chunk in user])
        seats = (one := Table(model, bench.vocab, layout, 4, **settings)).seats
        one.warm_up(9)
        n_other, n_heard = 0, [0] * 4
        for step in range(18):      # user i comes in step i, and misses each third one
            talk = [i for i in range(4) if i <= step and n_heard[i] < 9 and (step + i) % 3 != 2]
            if not talk:
                continue
            frames = [[] for _ in talk]
            said = one.step([seats[i] for i in talk], [users[i, n_heard[i]] for i in talk],
                            lambda i, codes, frames=frames: frames[i].append(codes))
            for i, text, speech, told in zip(talk, *said, frames):
                n_other += int((np.concatenate([text, speech]) != expected[i][n_heard[i]]).sum())
                n_other += int((np.concatenate(told) != speech).sum())
                n_heard[i] += 1
    assert n_heard == [9] * 4, n_heard
    verify(bench, 'at one table against alone', n_other, 0, 'ids')


# ------------------------------------------------------------------------------------------------------------
# training

@contextmanager
def process_group(bench):
    """Of one process"""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group('nccl' if bench.is_cuda else 'gloo', rank=0, world_size=1,
                                init_method=f'file://{folder}/store')
        try:
            yield
        finally:
            dist.destroy_process_group()


def group(bench):
    """Broadcast, all-reduce in bf16 and fp32, barrier; and a graph captured beside them, as listening does in
    training."""
    wrong = 0.0
    with process_group(bench):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.arange(1000, device=bench.device).to(dtype)
            y = x.clone()
            dist.broadcast(y, 0)
            work = dist.all_reduce(y, async_op=True)
            work.wait()
            dist.barrier()
            wrong += float((x - y).abs().sum())
        if bench.is_cuda:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode='thread_local'):
                doubled = 2 * x
            graph.replay()
            wrong += float((doubled - 2 * x).abs().sum())
    verify(bench, 'broadcast, all-reduce, barrier, capture', wrong, 0.0)


def shards(bench):
    """--shard=true, in a group of one process, against a whole copy: three steps of two layers, which are
    compiled and computed again; then the weights as a checkpoint has them."""
    sizes, T = bench.sizes | dict(n_layer=2), bench.pick(128, 1024)
    place = Place(bench.device, bench.dtype)
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder, bench.vocab, [bench.pick(50, 450)] * 13)
        loader = Loader(Dialogues(folder, 'train'), [get_layout('duplex3')], bench.vocab, T, 4)
        batches = [loader.next_batch().to(bench.device) for _ in range(3)]
    losses, norms, weights = {}, {}, {}
    with process_group(bench):
        for make in (Copies, Shards):
            torch.manual_seed(0)
            model = Qwen2(ModelConfig(bench.vocab.size, T, **sizes)).to(bench.device)
            gradients = make(model, place)
            model.wrap_blocks(compiles=bench.is_cuda, checkpoints=True)
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            losses[make], norms[make] = [], []
            for batch in batches:
                with bench.autocast:
                    total, each = model(batch.idx, batch.pos, batch.doc, batch.learn, batch.targets)
                gradients.backward(total, is_last=True)
                norm = gradients.finish(torch.tensor(float(len(each)), device=bench.device), 1.0)
                optimizer.step()
                gradients.zero()
                losses[make].append(each.mean())
                norms[make].append(norm)
            weights[make] = torch.cat([gather(p, place).flatten() for p in model.parameters()])
    for name, of in (('losses', losses), ('norms of gradients', norms)):    # AdamW hides a factor in these
        values = (torch.stack(of[make]) for make in (Shards, Copies))
        verify(bench, f'{name} in three steps', error(*values), rounding(bench))
    verify(bench, 'weights', error(weights[Shards], weights[Copies]), rounding(bench))


def no_waits(bench):
    """Two steps ask the GPU for no value, which torch's sync debugging would refuse."""
    if not bench.is_cuda:
        return bench.miss('waits for the GPU', 'there is none')
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder, bench.vocab, [450] * 9)
        loader = Loader(Dialogues(folder, 'train'), [get_layout('duplex3')], bench.vocab, 1024, 4)
        batches = [loader.next_batch().to(bench.device) for _ in range(2)]
    model = Qwen2(ModelConfig(bench.vocab.size, 1024, **bench.sizes | dict(n_layer=2))).to(bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(batch):
        with bench.autocast:
            total, _ = model(batch.idx, batch.pos, batch.doc, batch.learn, batch.targets)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    step(batches[0])        # compiles, and sets up the optimiser
    torch.cuda.set_sync_debug_mode('error')
    try:
        for batch in batches:
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    verify(bench, 'waits for the GPU in two steps', 0, 0, 'waits')     # one would have raised


def speed(bench):
    """Steps of the whole model, compiled, on 2 and 4 rows of duplex3: tokens a second, MFU, memory, and the
    kernels in which a step spends most of its time."""
    T, vocab = bench.pick(256, 8192), bench.vocab
    torch.manual_seed(0)
    model = Qwen2(ModelConfig(vocab.size, T, **bench.sizes)).to(bench.device)
    gradients = Copies(model, Place(bench.device))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model.wrap_blocks(compiles=bench.is_cuda)
    for n_row in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            write_data(folder, vocab, [bench.pick(100, 1500)] * 40)
            loader = Loader(Dialogues(folder, 'train'), [get_layout('duplex3')], vocab, T, n_row)
            batch = loader.next_batch().to(bench.device)

        def step(batch=batch):
            with bench.autocast:
                total, _ = model(batch.idx, batch.pos, batch.doc, batch.learn, batch.targets)
            gradients.backward(total, is_last=True)
            gradients.finish(torch.tensor(float(len(batch.learn)), device=bench.device), 1.0)
            optimizer.step()
            gradients.zero()
        if bench.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        rates = n_row * T / bench.measure(dict(step=step))['step']
        name = f'{n_row} x {T}'
        learned, mean_keys = len(batch.learn) / batch.idx.numel(), float((batch.pos + 1).double().mean())
        bench.add(name, rates, 'tokens/s', f'{learned:.0%} learned, AdamW included')
        if bench.is_cuda:
            add_mfu(bench, name, rates, model.flops_per_token(learned, mean_keys))
            bench.add(f'{name}, memory', torch.cuda.max_memory_allocated() / 1e9, 'GB', 'at most')
    activities = [ProfilerActivity.CUDA if bench.is_cuda else ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        step()
        bench.clock()       # waits for the GPU
    key = 'self_device_time_total' if bench.is_cuda else 'self_cpu_time_total'
    kernels = sorted(profiled.key_averages(), key=lambda kernel: -getattr(kernel, key))
    total = sum(getattr(kernel, key) for kernel in kernels)
    for kernel in kernels[:8]:
        share = 100 * getattr(kernel, key) / total
        bench.add(f'profile: {kernel.key[:60]}', share, '%', f'{kernel.count} calls')


def add_mfu(bench, name, rates, flops):
    """rates: tokens a second; flops: of a token"""
    gpu, most = peak_flops(bench.device)
    limits = [(most, f'the {gpu}')] if gpu else []
    measured = [figure['median'] for figure in bench.figures if figure['unit'] == 'TFLOP/s']
    if measured:
        limits.append((1e12 * max(measured), 'the largest matmul measured'))
    for limit, owner in limits:
        bench.add(f'{name}, MFU', 100 * rates * flops / limit, '%',
                  f'of {limit / 1e12:.0f} TFLOP/s, {owner}; {flops / 1e9:.3f} GFLOP a token')


def train(folder, out, *settings, kill_at=None):
    """Runs train.py -> its output. kill_at: text after which it is killed"""
    script = os.path.join(ROOT, 'train.py')
    process = subprocess.Popen([sys.executable, script, f'--data={folder}', f'--out_dir={out}', *settings],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    printed = ''
    for line in process.stdout:
        printed += line
        if kill_at and kill_at in line:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return printed
    if process.wait():
        print(printed)
        raise RuntimeError(printed.strip().split('\n')[-1])
    return printed


def resume(bench):
    """20 steps of a small model, evaluated, saved and heard each five: killed after step 10 and resumed, it
    logs the same losses; on a GPU up to the order of additions."""
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder, make_vocabulary(600, 32), [60] * 30, turn_frames=20, codec=make_codec())
        settings = ['--stages=duplex3:20', '--n_layer=2', '--n_embd=64', '--n_head=2', '--n_kv_head=1',
                    '--n_inner=64', '--block_size=256', '--batch_size=2', '--batch_tokens=1024',
                    '--eval_interval=5', '--log_interval=5', '--n_listen=1', '--tensorboard=false',
                    f'--device={bench.device.type}', f'--compile={bench.is_cuda}']
        whole, killed = (os.path.join(folder, name) for name in ('whole', 'killed'))
        printed = train(folder, whole, *settings)
        notes = [line for line in printed.split('\n') if line.startswith('note: ') and 'heard' in line]
        verify(bench, 'listenings that failed', len(notes), 0, 'notes')
        train(folder, killed, *settings, kill_at='val      10/20')
        train(folder, killed, *settings, '--resume=true')
        losses = []
        for out in (whole, killed):
            with open(os.path.join(out, 'log.jsonl')) as file:
                losses.append(torch.tensor([json.loads(line)['loss'] for line in file]))
        verify(bench, 'losses after being killed and resumed', error(*losses), 1e-3 if bench.is_cuda else 0.0)


def rows_that_fit(bench):
    """--auto_batch with a step of 36 rows, which has nine divisors."""
    if not bench.is_cuda:
        return bench.miss('auto_batch', 'it tries the memory of a GPU')
    T = bench.pick(256, 8192)
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder, bench.vocab, [1500] * 40)
        start = time.perf_counter()
        printed = train(folder, os.path.join(folder, 'out'), '--stages=duplex3:1', f'--block_size={T}',
                        f'--batch_tokens={36 * T}', '--auto_batch=true', '--eval_interval=1', '--n_listen=0',
                        '--tensorboard=false', *[f'--{name}={size}' for name, size in bench.sizes.items()])
        sec = time.perf_counter() - start
    n_row = int(re.search(r'micro-steps of (\d+) x', printed)[1])
    verify(bench, f'rows of {T} that fit', n_row, 1, 'rows', at_least=True)
    verify(bench, 'auto_batch and one step', sec, 300, 's')


ROWS = dict(        # name: (function, seconds it takes, the same with --peers)
    device=(device, 5, 5),
    group=(group, 10, 10),
    shards=(shards, 40, 40),
    backends=(backends, 5, 5),
    head=(head, 20, 20),
    attention=(attention, 60, 60),
    no_waits=(no_waits, 40, 40),
    duplex=(duplex, 60, 60),
    table=(table, 30, 30),
    blocks=(blocks, 60, 60),
    resume=(resume, 100, 100),
    auto_batch=(rows_that_fit, 120, 120),
    speed=(speed, 90, 90),
)
