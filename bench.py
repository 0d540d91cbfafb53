"""
How fast, on this machine: a table, and the same as JSON with commit, versions and machine.

    python bench.py --cpu           ratios, ours to others', by the CPU time of one thread: what CI can check
    python bench.py                 on a GPU: ceilings, head, attention, training, decoding; the cheapest and most telling rows first
    python bench.py --peers         and beside them what others would use, where installed: the same rows, documents kept apart

Figures are medians, with the lowest and the highest of n; on a CPU the two sides of a ratio take turns. MFU
counts required FLOPs only (model.flops_per_token: 6 a weight and token, the head for learned tokens,
attention for the keys that a query sees), against the datasheet and against the largest matmul measured here.
Training is timed from one optimiser step to the next, in train.py itself and in the others' own trainers,
each in its own process. Weights are random, the data is made on the spot.
"""
import argparse
import gc
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from common.device import PEAK_FLOPS, pick_dtype
from common.files import write_json
from config import Parser
from data.dialogues import Dialogues, save_dialogues
from data.loader import Loader, pack
from decode import Duplex
from flatten import get_layout
from model import ModelConfig, Qwen2, choose_attention, linear_cross_entropy
from vocabulary import BYTE_OF_CHAR, QWEN2_PATTERN, Vocabulary

ROOT = os.path.dirname(os.path.abspath(__file__))
LENGTHS = os.path.join(ROOT, 'bench', 'lengths')
# Qwen2-0.5B; 151,936 rows and 4,096 codes: V = 156,032
QWEN2 = dict(n_layer=24, n_head=14, n_kv_head=2, n_embd=896, n_inner=4864)
TINY = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_inner=128)
DEMO = dict(n_layer=4, n_head=3, n_kv_head=1, n_embd=192, n_inner=512)          # config/demo.py
# what a row may fail with, peers' interfaces that have changed among them: it is reported, and the others run
FAILURES = (RuntimeError, OSError, ImportError, ValueError, TypeError, AttributeError, LookupError,
            AssertionError, subprocess.SubprocessError)


class Bench:
    """What all rows use: the device, the sizes, the clock, and the table as it grows."""

    def __init__(self, args):
        self.args, self.start, self.row, self.figures, self.missing = args, time.time(), None, [], []
        self.is_cuda = torch.cuda.is_available() and not args.cpu
        self.device = torch.device('cuda' if self.is_cuda else 'cpu')
        self.dtype = pick_dtype('auto', self.device)
        self.autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(
            self.device.type, self.dtype)
        self.sizes, self.n = self.pick((TINY, 2), (QWEN2, 5))
        self.vocab = vocabulary(*self.pick((600, 32), (151_936, 4096)))

    def pick(self, tiny, full):
        return tiny if self.args.tiny else full

    def add(self, name, samples, unit, note=''):
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
        """why: a sentence, or the error."""
        if isinstance(why, Exception):
            why = f'{type(why).__name__}: {why}'.split('\n')[0][:200]
        self.missing.append(dict(row=self.row, name=name, why=why))
        print(f'{self.row:10} {name:44} {"-":>9} {why}', flush=True)

    def has(self, name, *packages):
        """Are a peer's packages installed? If not, that is a line of the table."""
        installed = {distribution.metadata['Name'] for distribution in importlib.metadata.distributions()}
        absent = [package for package in packages if package not in installed]
        if absent:
            self.miss(name, f'not installed: pip install {" ".join(absent)}')
        return not absent

    def clock(self):
        if not self.is_cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def measure(self, functions, n=None):
        """{name: function} -> {name: seconds [n]} of those that ran: on a CPU in turns, on a GPU one by one;
        the first call is not counted."""
        turns, seconds, failed = [(i, name) for i in range((n or self.n) + 1) for name in functions
                                  ], {name: [] for name in functions}, set()
        for _, name in sorted(turns,
                              key=lambda turn: list(functions).index(turn[1])) if self.is_cuda else turns:
            if name in failed:
                continue
            try:
                start = self.clock()
                functions[name]()
                seconds[name].append(self.clock() - start)
            except FAILURES as error:
                failed.add(name)
                self.miss(name, error)
        return {name: np.array(each[1:]) for name, each in seconds.items() if name not in failed}

    def ratio(self, name, seconds, theirs, ours, note=''):
        if theirs in seconds and ours in seconds:
            self.add(name, seconds[theirs] / seconds[ours], 'x', note)

    def peak(self, function):
        """Bytes that a call takes at most, beyond what was there."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            return torch.cuda.max_memory_allocated() - before
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')                         # the high-water mark sinks to what is resident now
        before = resident('VmRSS')
        function()
        return resident('VmHWM') - before

    def save(self, path):
        git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
        with open('/proc/cpuinfo' if os.path.exists('/proc/cpuinfo') else os.devnull) as file:
            cpu = next((line.split(': ')[1].strip() for line in file if line.startswith('model name')),
                       platform.machine())
        wanted = ('torch', 'numpy', 'tiktoken', 'safetensors', 'pyarrow', 'triton', 'transformers',
                  'accelerate', 'trl', 'liger-kernel', 'vllm')
        versions = {
            dist.metadata['Name']: dist.version
            for dist in importlib.metadata.distributions()
            if dist.metadata['Name'] in wanted}
        about = dict(
            command=' '.join(['python', 'bench.py',
                              *sys.argv[1:]]), date=time.strftime('%Y-%m-%d %H:%M:%S '
                                                                  'UTC', time.gmtime(self.start)),
            commit=git(['git', 'rev-parse', 'HEAD']).stdout.strip() or None,
            uncommitted=bool(git(['git', 'status', '--porcelain', '-uno']).stdout),
            machine=dict(cpu=cpu, cores=os.cpu_count(),
                         gpu=torch.cuda.get_device_name() if self.is_cuda else None,
                         system=platform.platform()), versions=dict(python=platform.python_version(),
                                                                    **versions),
            dtype=str(self.dtype).removeprefix('torch.'), threads=torch.get_num_threads(),
            tiny=self.args.tiny, sec=time.time() - self.start, figures=self.figures, missing=self.missing)
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_json(path, about)


def resident(key):
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

# ---------------------------------------------------------------------------------------------------------------------
# data on the spot

def vocabulary(n_row, n_codes):
    """Text is bytes; speech codes come after row n_row, which makes it as long as the real one."""
    return Vocabulary([chr(c) for c in sorted(BYTE_OF_CHAR, key=BYTE_OF_CHAR.get)], [], QWEN2_PATTERN, [], {},
                      n_row, None, n_codes)

def write_data(folder, vocab, frames, turn_frames=190, n_letter=12):
    """A data folder of dialogues of so many frames each, in which user and assistant take turns of
    turn_frames."""
    rng, records = np.random.default_rng(0), []
    for i, n_frame in enumerate(frames):
        cuts = np.linspace(0, n_frame, max(2, round(n_frame / turn_frames)) + 1).astype(int).tolist()
        turns = [
            dict(role=('user', 'assistant')[k % 2], start=start, end=end,
                 text=''.join(map(chr, rng.integers(97, 123, n_letter))))
            for k, (start, end) in enumerate(zip(cuts, cuts[1:]))]
        user, assistant = rng.integers(0, vocab.n_codes, (2, n_frame)).astype(np.uint16)
        records.append(dict(id=str(i), user=user, assistant=assistant, turns=turns))
    codec = dict(name='random', rate_hz=25.0, n_codes=vocab.n_codes, sample_rate=16000, fingerprint='0' * 16)
    for split, n in dict(train=len(records), val=1).items():
        save_dialogues(os.path.join(folder, f'{split}.arrow'), records[:n], codec)
    vocab.save(os.path.join(folder, 'tokenizer'))

def make_loader(folder, vocab, stage, T, n_row):
    return Loader(Dialogues(folder, 'train'), [get_layout(name) for name in stage.split('+')], vocab, T,
                  n_row)

def hf_batch(batch):
    """The same for transformers, which keeps documents apart where positions start anew (and use_cache is
    False: else it lets them mix without a word). Labels are shifted already."""
    labels = torch.full_like(batch.idx, -100)
    labels.view(-1)[batch.learn] = batch.targets
    return dict(input_ids=batch.idx, position_ids=batch.pos, labels=labels, shift_labels=labels)

def hf_config(sizes, V, attention):
    from transformers import Qwen2Config
    return Qwen2Config(vocab_size=V, hidden_size=sizes['n_embd'], intermediate_size=sizes['n_inner'],
                       num_hidden_layers=sizes['n_layer'], num_attention_heads=sizes['n_head'],
                       num_key_value_heads=sizes['n_kv_head'], max_position_embeddings=8192, rope_theta=1e6,
                       tie_word_embeddings=True, use_cache=False, attn_implementation=attention)

# ---------------------------------------------------------------------------------------------------------------------
# rows: data, and the parts of a step

def packing(bench):
    """Waste on the two lists of lengths; and all that a loader does."""
    for name, T, stage in (('asr_1024', 1024, 'asr.user'), ('dialogue_8192', 8192, 'duplex3')):
        path = os.path.join(LENGTHS, f'{name}.npy')
        if not os.path.exists(path):
            bench.miss(f'{name}: waste', f'no {os.path.normpath(path)}')
            continue
        lengths = np.load(path).tolist()
        for size in (Loader.window, len(lengths)):
            n_row = sum(len(pack(lengths[at:at + size], T)) for at in range(0, len(lengths), size))
            bench.add(f'{name}: waste, {size} at once', 100 * (1 - sum(lengths) / (n_row * T)), '%')
        some = np.array(lengths[:bench.pick(64, Loader.window)])
        # documents of about these lengths: 10 frames are 22 ids in duplex3; asr adds 18 to a turn's
        with tempfile.TemporaryDirectory() as folder:
            frames, turn = (some * 10 // 22, 190) if stage == 'duplex3' else (2 * (some - 18), 10_000)
            write_data(folder, bench.vocab, frames, turn)
            make = partial(make_loader, folder, bench.vocab, stage, T, 8)
            loader = make()
            n_batch = len(loader.rows) // 8
            n_token = loader.counts['tokens'] * n_batch * 8 / len(loader.rows)

            gc.collect()
            # a new loader makes Python look through all that torch has imported: as long as reading an epoch
            # of asr
            gc.freeze()

            def read(get):
                loader = get()
                for _ in range(n_batch):        # noqa: B023
                    loader.next_batch()

            seconds = bench.measure(dict(first=lambda: read(make),    # noqa: B023
                                         later=lambda: read(lambda: loader)))    # noqa: B023
        bench.add(f'{name}: flatten, pack, index', n_token / seconds['first'] / 1e6, 'M tokens/s',
                  f'a core, from Arrow to batches of {stage}, first epoch')
        bench.add(f'{name}: later epochs', n_token / seconds['later'] / 1e6, 'M tokens/s',
                  'texts are encoded, and dialogues checked, already')


def step(bench):
    """Two layers of the real width, forward and backward: the head on learned tokens, against logits of all
    as transformers has them."""
    torch.manual_seed(0)
    V, T, model = bench.vocab.size, bench.pick(128, 1024), Qwen2(
        ModelConfig(bench.vocab.size, 1024, **bench.sizes | dict(n_layer=2)))
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder, bench.vocab, bench.pick([50] * 30, [450] * 30))      # one document a row
        batches = {
            n_row: make_loader(folder, bench.vocab, 'duplex3', T, n_row).next_batch() for n_row in (1, 4)}

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
    for name in seconds:
        bench.add(f'{name}, {T} tokens', 1e3 * seconds[name], 'ms', f'forward and backward, 2 layers, V={V}, '
                                                                    f'{len(batches[1].learn) / T:.0%} '
                                                                    'learned')
    bench.ratio('full logits / ours, time', seconds, 'full', 'ours')
    if not os.path.exists('/proc/self/clear_refs'):
        return bench.miss('extra memory', 'read from /proc, which only Linux has')
    peaks = {}
    for name, is_ours in sides.items():
        each = []
        for _ in range(bench.pick(1, 3)):
            model.zero_grad()       # gradients are part of what is counted
            each.append(bench.peak(partial(run, 4, is_ours)))
        peaks[name] = np.array(each)
        bench.add(f'{name}, {4 * T} tokens, extra memory', peaks[name] / 1e9, 'GB', 'gradients included')
    bench.ratio('ours / full logits, extra memory', peaks, 'ours', 'full')


def ceilings(bench):
    """What the device can do at most, at any shape and at the model's."""
    size, C, n_inner = bench.pick(256, 8192), bench.sizes['n_embd'], bench.sizes['n_inner']
    for m, k, n in ((size, size, size), (4 * size, C, 2 * n_inner), (4 * size, n_inner, C)):
        a, b = (torch.randn(shape, device=bench.device, dtype=bench.dtype) for shape in ((m, k), (k, n)))
        seconds = bench.measure(dict(matmul=lambda: [a @ b for _ in range(10)]),     # noqa: B023
                                4 * bench.n)['matmul'] / 10
        bench.add(f'matmul {m} x {k} x {n}', 2 * m * k * n / seconds / 1e12, 'TFLOP/s')
    x = torch.empty(4 * size * size, device=bench.device, dtype=bench.dtype)
    bench.add('copy', 2 * x.nbytes / bench.measure(dict(copy=x.clone), 4 * bench.n)['copy'] / 1e9, 'GB/s',
              'read and written')


def head(bench):
    """Linear and cross-entropy of one micro-batch, ours by chunk."""
    C, V, n_all = bench.sizes['n_embd'], bench.vocab.size, bench.pick(512, 32_768)
    n = n_all * 12 // 22
    x = torch.randn(n_all, C, device=bench.device, requires_grad=True)
    weight = (0.02 * torch.randn(V, C, device=bench.device)).requires_grad_()
    labels = torch.randint(V, (n_all,), device=bench.device)
    labels[n:] = -100

    def liger():
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        return LigerFusedLinearCrossEntropyLoss(reduction='sum')(weight.to(bench.dtype), x.to(bench.dtype),
                                                                 labels)

    def trl():
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction
        # temperature, chunk, softcapping, scale, what is returned
        settings = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ('log_probs',))
        return -_ChunkedLogProbFunction.apply(x[:n].to(bench.dtype), weight, None, labels[:n], *
                                              settings)[0].sum()

    losses = {
        f'ours, chunk {chunk}': lambda chunk=chunk: linear_cross_entropy(x[:n], weight, labels[:n], None,
                                                                         chunk)[0]
        for chunk in bench.pick((64, 4096), (256, 1024, 4096, 8192))}
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
    for name in seconds:
        bench.add(name, 1e3 * seconds[name] / n, 'ms/row', f'forward and backward, of {n} learned rows out '
                                                           f'of {n_all}')
        bench.add(f'{name}, memory', bench.peak(partial(run, losses[name])) / 1e9, 'GB', 'gradients included')
        if name != 'ours, chunk 4096':
            bench.ratio(f'{name} / ours, chunk 4096', seconds, name, 'ours, chunk 4096')


def attention(bench):
    """Packed rows, forward and backward, by each of the backends that run here."""
    H, K, D = bench.sizes['n_head'], bench.sizes['n_kv_head'], bench.sizes['n_embd'] // bench.sizes['n_head']
    for T, n_doc, B in bench.pick([(128, 4, 2)], [(1024, 4, 32),
                                                  (8192, 3, 4)] if bench.is_cuda else [(1024, 4, 1),
                                                                                       (4096, 3, 1)]):
        doc = (torch.arange(T, device=bench.device) * n_doc // T).expand(B, T).contiguous()
        q, k, v = (torch.randn(B, T, heads, D, device=bench.device, dtype=bench.dtype, requires_grad=True)
                   for heads in (H, K, K))
        runs = {
            name: lambda name=name: choose_attention(doc, name)(q, k, v).sum().backward()    # noqa: B023
            for name in (('flex', 'varlen', 'dense') if bench.is_cuda else ('by_document', 'dense'))}
        # with the making of the mask, which is once for all layers in the model
        seconds = bench.measure(runs)
        # twice the forward's backward, and the keys before a query only
        flops = 3 * 4 * H * D * B * (T * T / n_doc) / 2
        for name in seconds:
            bench.add(f'{name}, {B} x {T}, {n_doc} documents a row', 1e3 * seconds[name], 'ms',
                      f'{flops / np.median(seconds[name]) / 1e12:.3g} TFLOP/s')
        bench.ratio(f'dense mask / ours, T={T}', seconds, 'dense', next(iter(runs)))

# ---------------------------------------------------------------------------------------------------------------------
# rows: training

# stamps the clock after each step of any torch optimiser, and ends the process after n_step of them
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
    """(seconds of each step after the first n_warm, peak of memory) of code that trains, run in that
    checkout."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'stamps.json')
        env = {} if bench.is_cuda else dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
        done = subprocess.run([sys.executable, '-c', STAMPS + code,
                               str(n_step), path, *arguments], cwd=checkout, capture_output=True, text=True,
                              env=os.environ | env, timeout=bench.args.row_sec)
        if not os.path.exists(path):
            raise RuntimeError(done.stderr.strip().split('\n')[-1])
        with open(path) as file:
            result = json.load(file)
    return np.diff(result['stamps'])[n_warm - 1:], result['peak']

def our_arguments(folder, stage, T, batch_size, n_micro, sizes, **more):
    settings = dict(data=folder, out_dir=os.path.join(folder, 'ours'), stages=f'{stage}:1000', block_size=T,
                    batch_size=batch_size, batch_tokens=batch_size * n_micro * T, eval_interval=1000,
                    log_interval=1000, tensorboard=False)
    return [f'--{key}={value}' for key, value in (settings | sizes | more).items()]

def train_peer(kind, folder, stage, T, batch_size, n_micro, sizes, is_cuda):
    """The same rows in the trainers of others, in the process of timed_steps, which ends it."""
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
    more = {
        'TRL, tuned': dict(gradient_checkpointing=False), 'HF + Liger': dict(use_liger_kernel=True),
        'HF + compile': dict(torch_compile=True)}.get(kind, {})
    common = dict(model=model, data_collator=torch.utils.data.default_collate)
    if not kind.startswith('TRL'):
        return Trainer(args=TrainingArguments(**settings | more), train_dataset=Rows(), **common).train()
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(folder, 'tokenizer'), pad_token='<|eot|>',
                                              eos_token='<|eot|>')
    # rows are packed already
    arguments = SFTConfig(**settings | more, max_length=T, dataset_kwargs=dict(skip_prepare_dataset=True))
    rows = torch.utils.data.default_collate([row for row, _ in zip(Rows(), range(4 * batch_size * n_micro))])
    # the only kind it takes
    rows = Dataset.from_dict({key: value.numpy() for key, value in rows.items()}).with_format('torch')
    SFTTrainer(args=arguments, train_dataset=rows, processing_class=tokenizer, **common).train()


def demo(bench):
    """config/demo.py's model and batch, run by run: train.py, transformers' Trainer, and train.py of another
    commit."""
    T, n_row = 512, 4
    n_step, n_warm, n_run = bench.pick((3, 1, 1), (12, 4, 5))
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder, vocabulary(512, 512),
                   np.random.default_rng(0).integers(140, 231, bench.pick(32, 600)), turn_frames=40)
        arguments = ['config/demo.py', *our_arguments(folder, 'duplex3', T, n_row, 1, DEMO, device='cpu')]
        runs = dict(ours=(OURS, arguments, ROOT))
        if bench.has('HF Trainer', 'transformers', 'accelerate'):
            settings = dict(kind='HF Trainer', folder=folder, stage='duplex3', T=T, batch_size=n_row,
                            n_micro=1, sizes=DEMO, is_cuda=False)
            runs['HF Trainer'] = (PEER, [json.dumps(settings)], ROOT)
        if bench.args.before:
            before = os.path.join(folder, 'before')
            subprocess.run(['git', 'worktree', 'add', '--detach', before, bench.args.before], cwd=ROOT,
                           capture_output=True, check=True)
            runs[f'ours at {bench.args.before[:7]}'] = (OURS, arguments, before)
        steps = {name: [] for name in runs}
        try:
            for _ in range(n_run):
                for name, (code, arguments, checkout) in runs.items():
                    steps[name].append(
                        np.median(timed_steps(bench, code, arguments, n_step, n_warm, checkout)[0]))
        finally:
            if bench.args.before:
                subprocess.run(['git', 'worktree', 'remove', '--force', before], cwd=ROOT,
                               capture_output=True)
    steps = {name: np.array(each) for name, each in steps.items()}
    for name in runs:
        bench.add(name, n_row * T / steps[name], 'tokens/s', f'CPU time, {n_row} x {T} tokens a step, each '
                                                             f'of {n_step - n_warm} steps the median')
        if name != 'ours':
            bench.ratio(f'{name} / ours, time', steps, name, 'ours')


MIXES = {   # stage, T, frames a dialogue, frames a turn, letters a turn
    'T=1024, all rows': ('tts.assistant', 1024, 6000, 300, 2),
    'T=1024, half': ('asr.user+tts.assistant', 1024, 6000, 300, 12),
    'T=8192, duplex3': ('duplex3', 8192, 1500, 190, 12),            # a minute each, 3,300 tokens
}

def training(bench, mix):
    """Steps of 262,144 tokens with Qwen2-0.5B's sizes: train.py, and the peers."""
    stage, T, n_frame, turn, n_letter = MIXES[mix]
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if bench.is_cuda else 0
    # 1 MB a token
    micro = next((tokens for least, tokens in ((100, 65_536), (60, 32_768), (30, 16_384)) if memory > least),
                 8192)
    n_row, n_micro, n_step, n_warm = micro // T, 262_144 // micro, 6, 2
    if bench.args.tiny:
        T, n_frame, turn, n_row, n_micro, n_step, n_warm = T // 4, n_frame // 4, turn // 4, 2, 2, 3, 1
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder, bench.vocab, [n_frame] * bench.pick(16, 2_400_000 // n_frame), turn, n_letter)
        batch = make_loader(folder, bench.vocab, stage, T, 4).next_batch()
        share, mean_keys = len(batch.learn) / batch.idx.numel(), float((batch.pos + 1).double().mean())
        with torch.device('meta'):
            flops = Qwen2(ModelConfig(bench.vocab.size, T, **bench.sizes)).flops_per_token(share, mean_keys)

        def report(kind, rows, code, arguments):
            steps, peak = timed_steps(bench, code, arguments, n_step, n_warm)
            rates, name = n_row * n_micro * T / steps, f'{kind}, {mix}'
            bench.add(name, rates, 'tokens/s', f'{n_row * n_micro * T} a step, {rows} rows at once, AdamW '
                                               'included')
            bench.add(f'{name}, learned', rates * share, 'tokens/s', f'{share:.0%} of all')
            if bench.is_cuda:
                limits = [(flops_a_sec, f'the {gpu}')
                          for gpu, flops_a_sec in PEAK_FLOPS.items()
                          if gpu in torch.cuda.get_device_name()][:1]
                rates_measured = [figure['median'] for figure in bench.figures if figure['unit'] == 'TFLOP/s']
                limits += [
                    (1e12 * max(rates_measured), 'the largest matmul measured')] if rates_measured else []
                for limit, of in limits:
                    bench.add(f'{name}, MFU', 100 * rates * flops / limit, '%', f'of {limit / 1e12:.0f} '
                                                                                f'TFLOP/s, {of}; '
                                                                                f'{flops / 1e9:.3f} GFLOP a '
                                                                                'token')
                bench.add(f'{name}, memory', peak / 1e9, 'GB', 'at most, all included')
            return np.median(rates)
        more = dict(compile=bench.is_cuda, device=bench.device.type, log_interval=1)
        ours = report('ours', n_row, OURS, our_arguments(folder, stage, T, n_row, n_micro, bench.sizes,
                                                         **more))
        with open(os.path.join(folder, 'ours', 'log.jsonl')) as file:
            waits = [json.loads(line)['loader_wait'] for line in file]
        bench.add(f'ours, {mix}, loader wait', 100 * np.array(waits[n_warm:]), '%', 'of the step')
        for kind, package in (('TRL, tuned', 'trl'), ('TRL, as documented', 'trl'),
                              ('HF + compile', 'accelerate'), ('HF + Liger', 'liger-kernel')):
            if not bench.args.peers or not bench.has(kind, 'transformers', package):
                continue
            # 8 rows at once are its default
            for rows in [min(8, n_row)] if kind == 'TRL, as documented' else [n_row, n_row // 2, n_row // 4]:
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

# ---------------------------------------------------------------------------------------------------------------------
# rows: decoding

class HFLoop:
    """A duplex3 chunk in transformers: 12 passes too, logits of the last position only, always the likeliest
    of all ids."""

    def __init__(self, model, n_row, context, is_static):
        from transformers import DynamicCache, StaticCache
        self.device, self.forward = model.device, model.forward
        self.cache = StaticCache(config=model.config, max_cache_len=context
                                 + 22 * 150) if is_static else DynamicCache()
        # (n_row, 1)
        self.last = self.read(torch.zeros(n_row, context, dtype=torch.int64, device=self.device))
        if is_static and self.device.type == 'cuda':
            self.forward = torch.compile(model.forward, mode='reduce-overhead', fullgraph=True)

    @torch.inference_mode()
    def read(self, ids):
        return self.forward(ids, past_key_values=self.cache, use_cache=True,
                            logits_to_keep=1).logits.argmax(-1).clone()

    def step(self, codes):
        # (n_row, 11)
        ids, said = torch.cat([self.last, torch.as_tensor(codes, device=self.device)], 1), []
        for _ in range(12):
            ids = self.read(ids)
            said.append(ids)
        self.last = ids
        return torch.cat(said, 1).cpu()


class VLLMLoop:
    """vLLM cannot be fed in between: a chunk is a request, whose beginning it finds in its prefix cache."""

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
    # whole chunks of 22
    context, rng = bench.pick(44, 1012 if bench.is_cuda else 396), np.random.default_rng(0)
    vocab = vocabulary(bench.vocab.code_start, bench.vocab.n_codes)
    # a text slot scores as many ids as the real one
    vocab.n_text = bench.pick(vocab.n_text, 151_643)
    with bench.device:
        model = Qwen2(ModelConfig(vocab.size, 4096, **bench.sizes)).to(bench.dtype).eval()

    def our_loop(dtype=None):
        duplex = Duplex(model, vocab, get_layout('duplex3'), n_row, max_context=4096, compile=bench.is_cuda,
                        dtype=dtype)
        for _ in range(context // 22):
            duplex.step(rng.integers(0, vocab.n_codes, (n_row, 10)))
        return duplex

    def hf_loop(is_static):
        from transformers import Qwen2ForCausalLM
        hf = Qwen2ForCausalLM(hf_config(bench.sizes, vocab.size, 'sdpa')).to(bench.device, bench.dtype).eval()
        hf.load_state_dict(model.hf_state_dict(), strict=False)     # lm_head is tied
        return HFLoop(hf, n_row, context, is_static)
    loops = dict(ours=our_loop)
    if not bench.is_cuda and torch.cpu._is_vnni_supported():       # what decode.pick_linear asks for
        loops['ours, int8'] = partial(our_loop, torch.int8)
    if (bench.args.peers or not bench.is_cuda) and bench.has('HF', 'transformers'):
        loops |= {'HF DynamicCache': partial(hf_loop, False)
                  } | ({'HF StaticCache, compiled': partial(hf_loop, True)} if bench.args.peers else {})
    if bench.args.peers and bench.has('vLLM', 'vllm'):
        loops['vLLM'] = partial(VLLMLoop, model, vocab, n_row, context)
    codes, steps = rng.integers(0, vocab.n_codes, (n_row, 10)), {}
    for name, loop in loops.items():
        try:
            steps[name] = partial(loop().step, codes)
        except FAILURES as error:
            bench.miss(f'{name}, batch {n_row}', error)
    seconds = bench.measure(steps, 100 if bench.is_cuda else bench.n)
    for name, each in seconds.items():
        bench.add(f'{name}, batch {n_row}: a chunk', 1e3 * each, 'ms', f'12 passes, {context} tokens before')
        if bench.is_cuda:
            bench.add(f'{name}, batch {n_row}: p99', 1e3 * np.quantile(each, 0.99), 'ms', f'of {len(each)} '
                                                                                          'chunks')
            bench.add(f'{name}, batch {n_row}: real time', 0.4 * n_row / each, 'x')
        for ours in [each for each in loops if each.startswith('ours')
                     ] if not name.startswith('ours') else ():
            bench.ratio(f'{name} / {ours}, batch {n_row}', seconds, name, ours)

# ---------------------------------------------------------------------------------------------------------------------

# name: (function, seconds it takes, and with peers)
CPU_ROWS = dict(packing=(packing, 60, 60), attention=(attention, 60, 60), step=(step, 240, 240),
                decode1=(partial(decoding, n_row=1), 120, 150),
                decode8=(partial(decoding, n_row=8), 240, 300), demo=(demo, 240, 240))
GPU_ROWS = dict(ceilings=(ceilings, 10, 10), head=(head, 20, 40), half=(partial(training,
                                                                                mix='T=1024, half'), 70, 300),
                decode1=(partial(decoding,
                                 n_row=1), 60, 120), duplex8192=(partial(training,
                                                                         mix='T=8192, duplex3'), 70, 300),
                rows1024=(partial(training, mix='T=1024, all rows'), 60, 300), attention=(attention, 40, 40),
                decode64=(partial(decoding, n_row=64), 40, 90), decode256=(partial(decoding,
                                                                                   n_row=256), 40, 90),
                decode16=(partial(decoding, n_row=16), 40, 90), packing=(packing, 40, 40))


def give_up(*_):
    raise TimeoutError('took longer than --row_sec')

def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cpu', action='store_true', help='the ratios, on one thread of the CPU')
    parser.add_argument('--peers', action='store_true', help="on a GPU: the others' trainers and decoders "
                                                             "beside ours")
    parser.add_argument('--only', help=f'some rows, as a,b; with --cpu {", ".join(CPU_ROWS)}; else '
                                       f'{", ".join(GPU_ROWS)}')
    parser.add_argument('--before', help='a commit: with --cpu, the demo is trained by its train.py, too')
    parser.add_argument('--budget', type=float, help='seconds; rows that do not fit are left out (default: '
                                                     '570 on a GPU, 3600 on a CPU)')
    parser.add_argument('--row_sec', type=float, default=600, help='seconds after which a row, or a trainer '
                                                                   'in it, is given up')
    parser.add_argument('--tiny', action='store_true', help='toy sizes: shows that the rows work, on any '
                                                            'machine, and nothing else')
    parser.add_argument('--save', help='where the JSON goes (default: bench/results/cpu.json or cuda.json)')
    args = parser.parse_args()
    rows = CPU_ROWS if args.cpu else GPU_ROWS
    names = args.only.split(',') if args.only else list(rows)
    if set(names) - set(rows):
        raise SystemExit(f'no row {min(set(names) - set(rows))!r}; known are {", ".join(rows)}')
    if not (args.cpu or args.tiny or torch.cuda.is_available()):
        raise SystemExit('no GPU here; --cpu measures the ratios that one thread can check')
    bench = Bench(args)
    torch.set_float32_matmul_precision('high')
    if not bench.is_cuda:
        torch.set_num_threads(1)
    path = args.save or os.path.join(ROOT, 'bench', 'results', f'{bench.device.type}.json')
    budget = args.budget or (570 if bench.is_cuda else 3600)
    signal.signal(signal.SIGALRM, give_up)
    for name in names:
        function, *sec = rows[name]
        bench.row, left = name, budget - (time.time() - bench.start)
        if sec[args.peers] > left and not args.tiny:
            bench.miss(name, f'left out: it takes {sec[args.peers]} s, of --budget={budget:.0f} are left '
                             f'{left:.0f}')
        else:
            signal.alarm(int(args.row_sec) + 1)
            try:
                function(bench)
            except FAILURES as error:
                bench.miss(name, error)
            signal.alarm(0)
        gc.collect()
        torch.cuda.empty_cache()
        bench.save(path)        # after each row: a kill leaves what there is
    print(f'{path}: {len(bench.figures)} figures, {len(bench.missing)} missing, '
          f'{time.time() - bench.start:.0f} s')


if __name__ == '__main__':
    main()
