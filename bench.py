"""
How fast is it on this machine? Prints a table, and writes it as JSON with commit, versions and machine.

    python bench.py --cpu           our time against others', as CPU time of one thread: for any machine
    python bench.py --check         on a GPU: is everything right there (measures/check.py)
    python bench.py                 on a GPU: ceilings, head, attention, training, decoding; quick rows first
    python bench.py --peers         the same, and beside it what others would use, where that is installed

A row of the table (--only=step,demo) is one benchmark, of several figures. A peer is others' code for the
same work: transformers, TRL, Liger, vLLM. Peers get the same rows and keep documents apart, too.

Figures are medians, with the lowest and the highest of n. On a CPU the two sides of a ratio take turns, so
both meet the same load. MFU, model FLOPs utilisation, counts required FLOPs only (Qwen2.flops_per_token: 6
per weight and token, the head for learned tokens, attention for the keys that a query sees), against the
datasheet and against the largest matmul measured here. Training is timed from one optimiser step to the next,
in train.py itself and in the peers' trainers, each in its own process. Weights and data are random.

Row packing reads bench/lengths, drawn from distributions made for this project. asr_1024.npy: 20,000
documents of speech recognition, 297 tokens on average, for rows of 1,024. dialogue_8192.npy: 20,000 duplex3
dialogues, 2,698 tokens on average, for rows of 8,192.
"""
import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from functools import partial
from runpy import run_path

import numpy as np
import torch
from torch.nn import functional as F

from common.device import pick_dtype
from common.files import read_json, read_jsonl, write_json
from common.origin import describe_run, installed_versions
from config import Parser
from data.dialogues import Dialogues
from data.loader import Loader, pack
from data.made_up import make_vocabulary, write_data
from decode import Duplex
from flatten import get_layout
from measures import check
from model import ModelConfig, Qwen2, choose_attention, linear_cross_entropy
from vocabulary import Vocabulary

ROOT = os.path.dirname(os.path.abspath(__file__))
# Qwen2-0.5B, with V = 156,032 in the benchmarks: 151,936 rows, and 4,096 codes
QWEN2 = dict(n_layer=24, n_head=14, n_kv_head=2, n_embd=896, n_inner=4864)
TINY = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_inner=128)
DEMO = {name: run_path(os.path.join(ROOT, 'config/demo.py'))[name] for name in TINY}
# an error of these kinds, as from a peer's changed interface, becomes a line of the table; others still run
FAILURES = (RuntimeError, OSError, ImportError, ValueError, TypeError, AttributeError, LookupError,
            AssertionError, subprocess.SubprocessError)


class Bench:
    """What all rows use: the device, the sizes, the clock, and the table as it grows."""

    def __init__(self, args):
        self.args, self.start, self.row, self.figures, self.missing = args, time.time(), None, [], []
        self.failed, self.row_sec = [], {}      # of --check: 'row: name'; row -> how long it took
        self.origin = describe_run()    # now, as the results may lie in the clone, and make it look changed
        self.is_cuda = torch.cuda.is_available() and not args.cpu
        self.device = torch.device('cuda' if self.is_cuda else 'cpu')
        self.dtype = pick_dtype('auto', self.device)
        is_plain = self.dtype == torch.float32
        self.autocast = nullcontext() if is_plain else torch.autocast(self.device.type, self.dtype)
        self.sizes, self.n = self.pick((TINY, 2), (QWEN2, 5))
        self.vocab = make_vocabulary(*self.pick((600, 32), (151_936, 4096)))

    def pick(self, tiny, full):
        return tiny if self.args.tiny else full

    def add(self, name, samples, unit, note=''):
        """Adds a figure to the table -> its median."""
        samples = np.atleast_1d(np.asarray(samples, float))
        figure = dict(row=self.row, name=name, median=np.median(samples), low=samples.min(),
                      high=samples.max(), n=len(samples), unit=unit, note=note)
        self.figures.append(figure)
        median, low, high = (f'{x:,.0f}' if abs(x) >= 1000 else f'{x:.3g}'
                             for x in (figure['median'], figure['low'], figure['high']))
        print(f'{self.row:10} {name:44} {median:>9} {unit:10} {low:>9} .. {high:9} n={len(samples):<4} '
              f'{note}', flush=True)
        return figure['median']

    def miss(self, name, why):
        """Adds a line that says why a figure is missing: a sentence, or the error."""
        if isinstance(why, Exception):
            why = f'{type(why).__name__}: {why}'.split('\n')[0][:200]
        self.missing.append(dict(row=self.row, name=name, why=why))
        print(f'{self.row:10} {name:44} {"-":>9} {why}', flush=True)

    def has(self, name, *packages):
        """Are a peer's packages installed? If not, the table says so."""
        absent = [package for package in packages if package not in installed_versions()]
        if absent:
            self.miss(name, f'not installed: pip install {" ".join(absent)}')
        return not absent

    def clock(self):
        if not self.is_cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def measure(self, functions, n=None):
        """{name: function} -> {name: seconds [n]} of those that did not fail. On a CPU they take turns, on a
        GPU they run one by one. The first call is not counted."""
        n_call = (n or self.n) + 1
        order = list(functions) * n_call
        if self.is_cuda:
            order = [name for name in functions for _ in range(n_call)]
        seconds = {name: [] for name in functions}
        for name in order:
            if name not in seconds:
                continue
            try:
                start = self.clock()
                functions[name]()
                seconds[name].append(self.clock() - start)
            except FAILURES as error:
                del seconds[name]
                self.miss(name, error)
        return {name: np.array(samples[1:]) for name, samples in seconds.items()}

    def ratio(self, name, seconds, theirs, ours):
        if theirs in seconds and ours in seconds:
            self.add(name, seconds[theirs] / seconds[ours], 'x')

    def peak(self, function):
        """-> the most bytes that a call takes, beyond those in use before."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            return torch.cuda.max_memory_allocated() - before
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')                         # sets VmHWM, the peak, to what is resident now
        before = resident_bytes('VmRSS')
        function()
        return resident_bytes('VmHWM') - before

    def save(self, path):
        result = self.origin | dict(
            dtype=str(self.dtype).removeprefix('torch.'), threads=torch.get_num_threads(),
            tiny=self.args.tiny, sec=time.time() - self.start, figures=self.figures, missing=self.missing,
            failed=self.failed, row_sec=self.row_sec)
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_json(path, result)

def resident_bytes(key):
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

# ------------------------------------------------------------------------------------------------------------
# the same batches for all

def make_loader(folder, vocab, stage, T, n_row):
    layouts = [get_layout(name) for name in stage.split('+')]
    return Loader(Dialogues(folder, 'train'), layouts, vocab, T, n_row)

def hf_batch(batch):
    """The same batch for transformers: it keeps documents apart where positions restart, but only if
    use_cache is False. Labels are shifted already."""
    labels = torch.full_like(batch.idx, -100)
    labels.view(-1)[batch.learn] = batch.targets
    return dict(input_ids=batch.idx, position_ids=batch.pos, labels=labels, shift_labels=labels)

def hf_config(sizes, V, attention):
    from transformers import Qwen2Config
    return Qwen2Config(vocab_size=V, hidden_size=sizes['n_embd'], intermediate_size=sizes['n_inner'],
                       num_hidden_layers=sizes['n_layer'], num_attention_heads=sizes['n_head'],
                       num_key_value_heads=sizes['n_kv_head'], max_position_embeddings=8192, rope_theta=1e6,
                       tie_word_embeddings=True, use_cache=False, attn_implementation=attention)

# ------------------------------------------------------------------------------------------------------------
# rows: data, and the parts of a step

def packing(bench):
    """How much of the rows is padding, for the two lists of lengths; and how fast a loader makes batches."""
    for name, T, stage in (('asr_1024', 1024, 'asr.user'), ('dialogue_8192', 8192, 'duplex3')):
        lengths = np.load(os.path.join(ROOT, 'bench', 'lengths', f'{name}.npy')).tolist()
        for size in (Loader.window, len(lengths)):
            n_row = sum(len(pack(lengths[at:at + size], T)) for at in range(0, len(lengths), size))
            bench.add(f'{name}: waste, {size} at once', 100 * (1 - sum(lengths) / (n_row * T)), '%')
        rates = loader_rates(bench, np.array(lengths[:bench.pick(64, Loader.window)]), stage, T)
        bench.add(f'{name}: flatten, pack, index', rates['first'], 'M tokens/s',
                  f'a core, from Arrow to batches of {stage}, first epoch')
        bench.add(f'{name}: later epochs', rates['later'], 'M tokens/s',
                  'texts are encoded, and dialogues checked, already')

def loader_rates(bench, lengths, stage, T):
    """-> {'first': of a new loader's epoch, 'later': of one that has read it before}, in M tokens a second"""
    with tempfile.TemporaryDirectory() as folder:
        # documents of about these lengths: 10 frames are 22 ids in duplex3; asr adds 18 to a turn's frames
        frames, turn = (lengths * 10 // 22, 190) if stage == 'duplex3' else (2 * (lengths - 18), 10_000)
        write_data(folder, bench.vocab, frames, turn)
        make = partial(make_loader, folder, bench.vocab, stage, T, 8)
        loader = make()
        n_batch = len(loader.rows) // 8
        n_token = loader.counts['tokens'] * n_batch * 8 / len(loader.rows)

        def run_epoch(get_loader):
            loader = get_loader()
            for _ in range(n_batch):
                loader.next_batch()
        gc.collect()
        gc.freeze()     # else each new loader makes Python check all that torch imported, as long as an epoch
        seconds = bench.measure(dict(first=lambda: run_epoch(make), later=lambda: run_epoch(lambda: loader)))
    return {name: n_token / sec / 1e6 for name, sec in seconds.items()}

def step(bench):
    """Two layers of the real width, forward and backward: our head, for learned tokens only, against logits
    of all tokens, as transformers has them."""
    torch.manual_seed(0)
    V, T = bench.vocab.size, bench.pick(128, 1024)
    model = Qwen2(ModelConfig(V, 1024, **bench.sizes | dict(n_layer=2)))
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder, bench.vocab, bench.pick([50] * 30, [450] * 30))      # one document a row
        loaders = {n_row: make_loader(folder, bench.vocab, 'duplex3', T, n_row) for n_row in (1, 4)}
        batches = {n_row: loader.next_batch() for n_row, loader in loaders.items()}

    def run(n_row, is_ours):
        batch, labels = batches[n_row], hf_batch(batches[n_row])['labels']
        model.zero_grad()
        with bench.autocast:
            if is_ours:
                loss = model(batch.idx, batch.pos, batch.doc, batch.learn, batch.targets)[0]
            else:
                logits = model(batch.idx, batch.pos, batch.doc)     # (B, T, V), fp32
                loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100,
                                       reduction='sum')
        loss.backward()
    sides = dict(ours=True, full=False)
    seconds = bench.measure({name: partial(run, 1, is_ours) for name, is_ours in sides.items()})
    note = f'forward and backward, 2 layers, V={V}, {len(batches[1].learn) / T:.0%} learned'
    for name in seconds:
        bench.add(f'{name}, {T} tokens', 1e3 * seconds[name], 'ms', note)
    bench.ratio('full logits / ours, time', seconds, 'full', 'ours')
    if not os.path.exists('/proc/self/clear_refs'):
        return bench.miss('extra memory', 'read from /proc, which only Linux has')
    peaks = {}
    for name, is_ours in sides.items():
        samples = []
        for _ in range(bench.pick(1, 3)):
            model.zero_grad()       # so that new gradients count as extra memory
            samples.append(bench.peak(partial(run, 4, is_ours)))
        peaks[name] = np.array(samples)
        bench.add(f'{name}, {4 * T} tokens, extra memory', peaks[name] / 1e9, 'GB', 'gradients included')
    bench.ratio('ours / full logits, extra memory', peaks, 'ours', 'full')

def ceilings(bench):
    """What the device reaches at most: in a large matmul, in matmuls of the model's shapes, and in a copy."""
    size, C, n_inner = bench.pick(256, 8192), bench.sizes['n_embd'], bench.sizes['n_inner']
    for m, k, n in ((size, size, size), (4 * size, C, 2 * n_inner), (4 * size, n_inner, C)):
        a, b = (torch.randn(shape, device=bench.device, dtype=bench.dtype) for shape in ((m, k), (k, n)))
        seconds = bench.measure(dict(matmul=lambda: [a @ b for _ in range(10)]),     # noqa: B023
                                4 * bench.n)['matmul'] / 10
        bench.add(f'matmul {m} x {k} x {n}', 2 * m * k * n / seconds / 1e12, 'TFLOP/s')
    x = torch.empty(4 * size * size, device=bench.device, dtype=bench.dtype)
    seconds = bench.measure(dict(copy=x.clone), 4 * bench.n)['copy']
    bench.add('copy', 2 * x.nbytes / seconds / 1e9, 'GB/s', 'read and written')

def head(bench):
    """Linear layer and cross-entropy for one micro-batch; ours by chunk."""
    C, V, n_all = bench.sizes['n_embd'], bench.vocab.size, bench.pick(512, 32_768)
    n = n_all * 12 // 22
    x = torch.randn(n_all, C, device=bench.device, requires_grad=True)
    weight = (0.02 * torch.randn(V, C, device=bench.device)).requires_grad_()
    labels = torch.randint(V, (n_all,), device=bench.device)
    labels[n:] = -100

    def ours(chunk):
        return linear_cross_entropy(x[:n], weight, labels[:n], None, chunk)[0]

    def liger():
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        loss = LigerFusedLinearCrossEntropyLoss(reduction='sum')
        return loss(weight.to(bench.dtype), x.to(bench.dtype), labels)

    def trl():
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction
        # temperature, chunk, softcapping, scale, what is returned
        settings = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ('log_probs',))
        rows = x[:n].to(bench.dtype)
        return -_ChunkedLogProbFunction.apply(rows, weight, None, labels[:n], *settings)[0].sum()

    chunks = bench.pick((64, 4096), (256, 1024, 4096, 8192))
    losses = {f'ours, chunk {chunk}': partial(ours, chunk) for chunk in chunks}
    if bench.args.peers:
        losses['full logits'] = lambda: F.cross_entropy(F.linear(x, weight).float(), labels, reduction='sum')
        losses |= dict(TRL=trl) if bench.has('TRL', 'trl') else {}
        losses |= dict(Liger=liger) if bench.has('Liger', 'liger-kernel') else {}

    def run(loss_of):
        x.grad = weight.grad = None
        with bench.autocast:
            loss = loss_of()
        loss.backward()
    seconds = bench.measure({name: partial(run, loss_of) for name, loss_of in losses.items()})
    note = f'forward and backward, of {n} learned rows out of {n_all}'
    for name in seconds:
        bench.add(name, 1e3 * seconds[name] / n, 'ms/row', note)
        bench.add(f'{name}, memory', bench.peak(partial(run, losses[name])) / 1e9, 'GB', 'gradients included')
        if name != 'ours, chunk 4096':
            bench.ratio(f'{name} / ours, chunk 4096', seconds, name, 'ours, chunk 4096')

def attention(bench):
    """Attention in packed rows, forward and backward, by all implementations that run on the device."""
    H, K, D = bench.sizes['n_head'], bench.sizes['n_kv_head'], bench.sizes['n_embd'] // bench.sizes['n_head']
    names = ('flex', 'varlen', 'dense') if bench.is_cuda else ('by_document', 'dense')      # ours, others
    full = [(1024, 4, 32), (8192, 3, 4)] if bench.is_cuda else [(1024, 4, 1), (4096, 3, 1)]
    for T, n_doc, B in bench.pick([(128, 4, 2)], full):
        doc = (torch.arange(T, device=bench.device) * n_doc // T).expand(B, T).contiguous()
        q, k, v = (torch.randn(B, T, heads, D, device=bench.device, dtype=bench.dtype, requires_grad=True)
                   for heads in (H, K, K))

        def run(attend, qkv=(q, k, v)):
            attend(*qkv).sum().backward()
        # without what the model makes once for all layers, of doc
        seconds = bench.measure({name: partial(run, choose_attention(doc, name)) for name in names})
        # the backward pass takes twice the forward's; a query sees half its document on average
        flops = 3 * 4 * H * D * B * (T * T / n_doc) / 2
        for name in seconds:
            bench.add(f'{name}, {B} x {T}, {n_doc} documents a row', 1e3 * seconds[name], 'ms',
                      f'{flops / np.median(seconds[name]) / 1e12:.3g} TFLOP/s')
        bench.ratio(f'dense mask / ours, T={T}', seconds, 'dense', names[0])

# ------------------------------------------------------------------------------------------------------------
# rows: training

# runs before a trainer's code: notes the time after each step of any torch optimiser, and ends the process
# after n_step of them
STAMPS = '''
import json, os, sys, time, torch
from torch.optim.optimizer import register_optimizer_step_post_hook
n_step, path, stamps, is_cuda = int(sys.argv.pop(1)), sys.argv.pop(1), [], torch.cuda.is_available()
def stamp(*_):
    if is_cuda:
        torch.cuda.synchronize()
    stamps.append(time.perf_counter() if is_cuda else time.process_time())
    if len(stamps) == n_step:
        with open(path, 'w') as file:
            json.dump(dict(stamps=stamps, peak=torch.cuda.max_memory_allocated() if is_cuda else 0), file)
        os._exit(0)
register_optimizer_step_post_hook(stamp)
'''
OURS = 'import config, train; train.main(config.load(train.Config, sys.argv[1:]))'
PEER = 'import bench; bench.train_peer(**json.loads(sys.argv[1]))'

def timed_steps(bench, code, arguments, n_step, n_warm, checkout=ROOT):
    """Runs code that trains, in that checkout -> seconds of each step after the first n_warm, and the peak of
    memory in bytes."""
    env = {} if bench.is_cuda else dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'stamps.json')
        command = [sys.executable, '-c', STAMPS + code, str(n_step), path, *arguments]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=os.environ | env,
                              timeout=bench.args.row_sec)
        if not os.path.exists(path):
            raise RuntimeError(done.stderr.strip().split('\n')[-1])
        result = read_json(path)
    return np.diff(result['stamps'])[n_warm - 1:], result['peak']

def our_arguments(folder, stage, T, batch_size, n_micro, sizes, **more):
    settings = dict(data=folder, out_dir=os.path.join(folder, 'ours'), stages=f'{stage}:1000', block_size=T,
                    batch_size=batch_size, batch_tokens=batch_size * n_micro * T, eval_interval=1000,
                    log_interval=1000, tensorboard=False)
    return [f'--{key}={value}' for key, value in (settings | sizes | more).items()]

def train_peer(kind, folder, stage, T, batch_size, n_micro, sizes, is_cuda):
    """The same rows in a peer's trainer; runs in the process of timed_steps, which ends it."""
    from transformers import AutoTokenizer, Qwen2ForCausalLM, Trainer, TrainingArguments
    device = torch.device('cuda' if is_cuda else 'cpu')
    vocab = Vocabulary.load(os.path.join(folder, 'tokenizer'))
    loader = make_loader(folder, vocab, stage, T, 1)

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield {key: value[0] for key, value in hf_batch(loader.next_batch()).items()}
    model = Qwen2ForCausalLM(hf_config(sizes, vocab.size, 'flex_attention' if is_cuda else 'sdpa')).to(device)
    settings = dict(output_dir=tempfile.mkdtemp(dir=folder), max_steps=1000,
                    per_device_train_batch_size=batch_size, gradient_accumulation_steps=n_micro,
                    bf16=pick_dtype('auto', device) == torch.bfloat16, use_cpu=not is_cuda, report_to=[],
                    save_strategy='no', remove_unused_columns=False)
    more = {'TRL, tuned': dict(gradient_checkpointing=False), 'HF + Liger': dict(use_liger_kernel=True),
            'HF + compile': dict(torch_compile=True)}
    settings |= more.get(kind, {})
    common = dict(model=model, data_collator=torch.utils.data.default_collate)
    if not kind.startswith('TRL'):
        return Trainer(args=TrainingArguments(**settings), train_dataset=Rows(), **common).train()
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(folder, 'tokenizer'), pad_token='<|eot|>',
                                              eos_token='<|eot|>')
    packed = dict(skip_prepare_dataset=True)
    arguments = SFTConfig(**settings, max_length=T, dataset_kwargs=packed)
    rows = torch.utils.data.default_collate([row for row, _ in zip(Rows(), range(4 * batch_size * n_micro))])
    # the only kind of data set that SFTTrainer takes
    rows = Dataset.from_dict({key: value.numpy() for key, value in rows.items()}).with_format('torch')
    SFTTrainer(args=arguments, train_dataset=rows, processing_class=tokenizer, **common).train()

def demo(bench):
    """config/demo.py's model and batch in turns in train.py, transformers' Trainer, train.py of --before."""
    T, n_row = 512, 4
    n_step, n_warm, n_run = bench.pick((3, 1, 1), (12, 4, 5))
    with tempfile.TemporaryDirectory() as folder:
        frames = np.random.default_rng(0).integers(140, 231, bench.pick(32, 600))
        write_data(folder, make_vocabulary(512, 512), frames, turn_frames=40)
        arguments = ['config/demo.py', *our_arguments(folder, 'duplex3', T, n_row, 1, DEMO, device='cpu')]
        arguments.append('--new_rows=spread')      # made-up data have no codec by which they could start
        # name: (code, arguments, checkout). Trainer's optimizer, not the demo's Muon
        runs = dict(ours=(OURS, [*arguments, '--optimizer=adamw'], ROOT))
        if bench.has('HF Trainer', 'transformers', 'accelerate'):
            settings = dict(kind='HF Trainer', folder=folder, stage='duplex3', T=T, batch_size=n_row,
                            n_micro=1, sizes=DEMO, is_cuda=False)
            runs['HF Trainer'] = (PEER, [json.dumps(settings)], ROOT)
        git = partial(subprocess.run, cwd=ROOT, capture_output=True)
        before = os.path.join(folder, 'before')
        if bench.args.before:
            git(['git', 'worktree', 'add', '--detach', before, bench.args.before], check=True)
            runs[f'ours at {bench.args.before[:7]}'] = (OURS, arguments, before)
        seconds = {name: [] for name in runs}
        try:
            for _ in range(n_run):
                for name, (code, arguments, checkout) in runs.items():
                    steps, _ = timed_steps(bench, code, arguments, n_step, n_warm, checkout)
                    seconds[name].append(np.median(steps))
        finally:
            if bench.args.before:
                git(['git', 'worktree', 'remove', '--force', before])
    seconds = {name: np.array(samples) for name, samples in seconds.items()}
    note = f'CPU time, {n_row} x {T} tokens a step, each of {n_step - n_warm} steps the median'
    for name in runs:
        bench.add(name, n_row * T / seconds[name], 'tokens/s', note)
        if name != 'ours':
            bench.ratio(f'{name} / ours, time', seconds, name, 'ours')

MIXES = {   # stage, T, frames a dialogue, frames a turn, letters a turn
    'T=1024, all rows': ('tts.assistant', 1024, 6000, 300, 2),
    'T=1024, half': ('asr.user+tts.assistant', 1024, 6000, 300, 12),
    'T=8192, duplex3': ('duplex3', 8192, 1500, 190, 12),            # a minute each, 3,300 tokens
}

def training(bench, mix):
    """Steps of 262,144 tokens with Qwen2-0.5B's sizes: in train.py, and in the peers."""
    stage, T, n_frame, turn_frames, n_letter = MIXES[mix]
    n_fit = tokens_that_fit(bench)
    n_row, n_micro, n_step, n_warm = n_fit // T, 262_144 // n_fit, 6, 2
    if bench.args.tiny:
        T, n_frame, turn_frames = T // 4, n_frame // 4, turn_frames // 4
        n_row, n_micro, n_step, n_warm = 2, 2, 3, 1
    with tempfile.TemporaryDirectory() as folder:
        n_dialogue = bench.pick(16, 2_400_000 // n_frame)
        write_data(folder, bench.vocab, [n_frame] * n_dialogue, turn_frames, n_letter)
        batch = make_loader(folder, bench.vocab, stage, T, 4).next_batch()
        learned, mean_keys = len(batch.learn) / batch.idx.numel(), float((batch.pos + 1).double().mean())
        with torch.device('meta'):
            flops = Qwen2(ModelConfig(bench.vocab.size, T, **bench.sizes)).flops_per_token(learned, mean_keys)

        def report(kind, rows, code, arguments):
            """Times a trainer and adds its figures -> its tokens a second."""
            steps, peak = timed_steps(bench, code, arguments, n_step, n_warm)
            name, n_token = f'{kind}, {mix}', n_row * n_micro * T
            rates = n_token / steps
            bench.add(name, rates, 'tokens/s', f'{n_token} a step, {rows} rows at once, AdamW included')
            bench.add(f'{name}, learned', rates * learned, 'tokens/s', f'{learned:.0%} of all')
            if bench.is_cuda:
                check.add_mfu(bench, name, rates, flops)
                bench.add(f'{name}, memory', peak / 1e9, 'GB', 'at most, all included')
            return np.median(rates)
        arguments = our_arguments(folder, stage, T, n_row, n_micro, bench.sizes, compile=bench.is_cuda,
                                  device=bench.device.type, log_interval=1)
        ours = report('ours', n_row, OURS, arguments)
        waits = [row['loader_wait'] for _, row in read_jsonl(os.path.join(folder, 'ours', 'log.jsonl'))]
        bench.add(f'ours, {mix}, loader wait', 100 * np.array(waits[n_warm:]), '%', 'of the step')
        for kind, package in (('TRL, tuned', 'trl'), ('TRL, as documented', 'trl'),
                              ('HF + compile', 'accelerate'), ('HF + Liger', 'liger-kernel')):
            if not bench.args.peers or not bench.has(kind, 'transformers', package):
                continue
            n_rows = [n_row, n_row // 2, n_row // 4]    # fewer at once where memory is short
            if kind == 'TRL, as documented':
                n_rows = [min(8, n_row)]                # TRL's default
            for rows in n_rows:
                settings = dict(kind=kind, folder=folder, stage=stage, T=T, batch_size=rows,
                                n_micro=n_row * n_micro // rows, sizes=bench.sizes, is_cuda=bench.is_cuda)
                try:
                    theirs = report(kind, rows, PEER, [json.dumps(settings)])
                    bench.add(f'ours to {kind}, {mix}', ours / theirs, 'x')
                    break
                except FAILURES as error:
                    bench.miss(f'{kind}, {rows} rows at once', error)
                    if 'out of memory' not in str(error):
                        break

def tokens_that_fit(bench):
    """-> how many tokens can go through the model at once; training takes 1 MB for each."""
    memory_gb = torch.cuda.get_device_properties(0).total_memory / 1e9 if bench.is_cuda else 0
    sizes = ((100, 65_536), (60, 32_768), (30, 16_384), (-1, 8192))
    return next(n_token for least_gb, n_token in sizes if memory_gb > least_gb)

# ------------------------------------------------------------------------------------------------------------
# rows: decoding

class HFLoop:
    """A duplex3 chunk in transformers: 12 passes as in ours, logits of the last position only, greedy."""

    def __init__(self, model, n_row, context, is_static):
        from transformers import DynamicCache, StaticCache
        self.device, self.forward = model.device, model.forward
        self.cache = DynamicCache()
        if is_static:
            self.cache = StaticCache(config=model.config, max_cache_len=context + 22 * 150)
        prompt = torch.zeros(n_row, context, dtype=torch.int64, device=self.device)
        self.last = self.next_ids(prompt)       # (n_row, 1)
        if is_static and self.device.type == 'cuda':
            self.forward = torch.compile(model.forward, mode='reduce-overhead', fullgraph=True)

    @torch.inference_mode()
    def next_ids(self, ids):
        output = self.forward(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits.argmax(-1).clone()

    def step(self, codes):
        ids = torch.cat([self.last, torch.as_tensor(codes, device=self.device)], 1)     # (n_row, 11)
        chosen = []
        for _ in range(12):
            ids = self.next_ids(ids)
            chosen.append(ids)
        self.last = ids
        return torch.cat(chosen, 1).cpu()

class VLLMLoop:
    """vLLM takes no input while it generates; so a chunk is a new request, its start in the prefix cache."""

    def __init__(self, model, vocab, n_row, context):
        from vllm import LLM, SamplingParams
        self.folder = tempfile.TemporaryDirectory()
        model.save_pretrained(self.folder.name)
        self.llm = LLM(self.folder.name, skip_tokenizer_init=True, enable_prefix_caching=True,
                       max_model_len=4096, gpu_memory_utilization=0.5)
        self.sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        self.ids = np.random.default_rng(0).integers(0, 1000, (n_row, context)).tolist()

    def step(self, codes):
        prompts = [ids + row for ids, row in zip(self.ids, codes.tolist())]
        outputs = self.llm.generate([dict(prompt_token_ids=ids) for ids in prompts], self.sampling,
                                    use_tqdm=False)
        self.ids = [ids + list(output.outputs[0].token_ids) for ids, output in zip(prompts, outputs)]

def decoding(bench, n_row):
    """A duplex3 chunk, 400 ms, of n_row dialogues at once."""
    torch.manual_seed(0)
    context = bench.pick(44, 1012 if bench.is_cuda else 396)    # tokens: chunks of 22
    rng = np.random.default_rng(0)
    loops = decoding_loops(bench, n_row, context, rng)
    codes, steps = rng.integers(0, bench.vocab.n_codes, (n_row, 10)), {}
    for name, make_loop in loops.items():
        try:
            steps[name] = partial(make_loop().step, codes)
        except FAILURES as error:
            bench.miss(f'{name}, batch {n_row}', error)
    seconds = bench.measure(steps, 100 if bench.is_cuda else bench.n)
    our_names = [name for name in loops if name.startswith('ours')]
    for name, sec in seconds.items():
        bench.add(f'{name}, batch {n_row}: a chunk', 1e3 * sec, 'ms', f'12 passes, {context} tokens before')
        if bench.is_cuda:
            p99 = 1e3 * np.quantile(sec, 0.99)
            bench.add(f'{name}, batch {n_row}: p99', p99, 'ms', f'of {len(sec)} chunks')
            bench.add(f'{name}, batch {n_row}: real time', 0.4 * n_row / sec, 'x')
        for ours in our_names if name not in our_names else ():
            bench.ratio(f'{name} / {ours}, batch {n_row}', seconds, name, ours)

def users(bench):
    """How many can talk to one device at once: a chunk of all may take as long as it lasts, 400 ms."""
    context, most = bench.pick(44, 1012), 0
    for n_row in bench.pick((1, 2), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)):
        rng = np.random.default_rng(0)
        loop = decoding_loops(bench, n_row, context, rng)['ours']()
        codes = rng.integers(0, bench.vocab.n_codes, (n_row, 10))
        seconds = bench.measure(dict(ours=partial(loop.step, codes)), bench.pick(2, 40)).get('ours')
        if seconds is None:
            break       # out of memory
        bench.add(f'{n_row} users: a chunk', 1e3 * seconds, 'ms', f'{context} tokens before')
        if np.quantile(seconds, 0.99) > 0.4:
            break
        most = n_row
    bench.add('users within 400 ms', most, 'users', 'p99 of their chunks, numbers doubled')

def decoding_loops(bench, n_row, context, rng):
    """-> {name: function that makes a loop, which has read context tokens; its step takes (n_row, 10)}"""
    vocab = make_vocabulary(bench.vocab.code_start, bench.vocab.n_codes)
    vocab.n_text = bench.pick(vocab.n_text, 151_643)       # a text slot scores as many ids as the real one
    with bench.device:
        model = Qwen2(ModelConfig(vocab.size, 4096, **bench.sizes)).to(bench.dtype).eval()

    def our_loop(dtype=None):
        duplex = Duplex(model, vocab, get_layout('duplex3'), n_row, max_context=4096, compile=bench.is_cuda,
                        dtype=dtype)
        duplex.warm_up(context // 22 + 110)
        for _ in range(context // 22):
            duplex.step(rng.integers(0, vocab.n_codes, (n_row, 10)))
        return duplex

    def hf_loop(is_static):
        from transformers import Qwen2ForCausalLM
        hf = Qwen2ForCausalLM(hf_config(bench.sizes, vocab.size, 'sdpa')).to(bench.device, bench.dtype).eval()
        hf.load_state_dict(model.hf_state_dict(), strict=False)     # lm_head is tied
        return HFLoop(hf, n_row, context, is_static)
    loops = dict(ours=our_loop)
    if not bench.is_cuda and torch.cpu._is_vnni_supported():        # which common.linear.pick_linear asks for
        loops['ours, int8'] = partial(our_loop, torch.int8)
    if (bench.args.peers or not bench.is_cuda) and bench.has('HF', 'transformers'):
        loops['HF DynamicCache'] = partial(hf_loop, False)
        if bench.args.peers:
            loops['HF StaticCache, compiled'] = partial(hf_loop, True)
    if bench.args.peers and bench.has('vLLM', 'vllm'):
        loops['vLLM'] = partial(VLLMLoop, model, vocab, n_row, context)
    return loops

# ------------------------------------------------------------------------------------------------------------

# name: (function, seconds it takes, seconds with peers)
CPU_ROWS = dict(
    packing=(packing, 60, 60),
    attention=(attention, 60, 60),
    step=(step, 240, 240),
    decode1=(partial(decoding, n_row=1), 120, 150),
    decode8=(partial(decoding, n_row=8), 240, 300),
    demo=(demo, 240, 240),
)
GPU_ROWS = dict(
    ceilings=(ceilings, 10, 10),
    head=(head, 20, 30),
    half=(partial(training, mix='T=1024, half'), 50, 300),
    decode1=(partial(decoding, n_row=1), 40, 120),
    duplex8192=(partial(training, mix='T=8192, duplex3'), 50, 300),
    rows1024=(partial(training, mix='T=1024, all rows'), 50, 300),
    attention=(attention, 20, 20),
    decode64=(partial(decoding, n_row=64), 40, 90),
    users=(users, 120, 120),
    decode256=(partial(decoding, n_row=256), 40, 90),
    decode16=(partial(decoding, n_row=16), 40, 90),
    packing=(packing, 40, 40),
)

def read_arguments():
    """-> args, the rows to run as {name: (function, seconds, seconds with peers)}"""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option('--cpu', action='store_true', help='measure ratios on one thread of the CPU')
    option('--check', action='store_true', help='is everything right that runs on a GPU; code 1 if not')
    option('--peers', action='store_true', help='on a GPU: measure the trainers and decoders of others, too')
    option('--only', help=f'rows to run, a,b: with --cpu {", ".join(CPU_ROWS)}; with --check '
                          f'{", ".join(check.ROWS)}; else {", ".join(GPU_ROWS)}')
    option('--before', help='a commit: with --cpu, train the demo with its train.py, too')
    option('--budget', type=float,
           help='seconds; a row that needs more than is left is skipped (default: 570, on a CPU 3600)')
    option('--row_sec', type=float, default=600, help='seconds after which a row, or a trainer, is ended')
    option('--tiny', action='store_true', help='toy sizes, for any machine: only shows that the rows run')
    option('--save', help='where the JSON goes (default: bench/results/cpu.json, cuda.json, check-….json)')
    args = parser.parse_args()
    rows = check.ROWS if args.check else CPU_ROWS if args.cpu else GPU_ROWS
    names = args.only.split(',') if args.only else list(rows)
    if set(names) - set(rows):
        raise SystemExit(f'no row {min(set(names) - set(rows))!r}; known are {", ".join(rows)}')
    if not (args.cpu or args.tiny or torch.cuda.is_available()):
        raise SystemExit('no GPU here; run python bench.py --cpu, which measures ratios on one CPU thread')
    return args, {name: rows[name] for name in names}

def give_up(*_):
    raise TimeoutError('took longer than --row_sec')

def main():
    args, rows = read_arguments()
    bench = Bench(args)
    torch.set_float32_matmul_precision('high')
    if not bench.is_cuda:
        torch.set_num_threads(1)
    name = 'check-' * args.check + bench.device.type
    path = args.save or os.path.join(ROOT, 'bench', 'results', f'{name}.json')
    budget = args.budget or (570 if bench.is_cuda else 3600)
    signal.signal(signal.SIGALRM, give_up)
    for name, (function, *needed_sec) in rows.items():
        bench.row = name
        left_sec = budget - (time.time() - bench.start)
        if needed_sec[args.peers] > left_sec and not args.tiny:
            bench.miss(name, f'left out: it takes {needed_sec[args.peers]} s; '
                             f'of --budget={budget:.0f}, {left_sec:.0f} s are left')
            bench.failed.append(f'{name}, left out')    # of --check: what did not run is not right
        else:
            signal.alarm(int(args.row_sec) + 1)
            start = time.time()
            try:
                function(bench)
            except FAILURES as error:
                if args.check:      # a row that ends early is the bug that was looked for
                    traceback.print_exc()
                bench.miss(name, error)
                bench.failed.append(name)
            signal.alarm(0)
            bench.row_sec[name] = round(time.time() - start, 1)
        gc.collect()
        torch.cuda.empty_cache()
        bench.save(path)        # after each row, so that a killed run leaves the rows before
    print(f'{path}: {len(bench.figures)} figures, {len(bench.missing)} missing, '
          f'{time.time() - bench.start:.0f} s')
    if args.check and bench.failed:
        raise SystemExit(f'{len(bench.failed)} failed: ' + ', '.join(bench.failed))

if __name__ == '__main__':
    main()
