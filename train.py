"""
Trains a Qwen2 on flattened dialogues, on one device or on many.

    python train.py config/demo.py --batch_size=4                           a laptop
    python train.py config/demo.py --resume=true                            go on where it was killed
    torchrun --standalone --nproc_per_node=2 train.py config/demo.py        two GPUs, or two processes on a CPU

    for each stage of the curriculum: rows of packed dialogues ─► loss on learned tokens ─► AdamW ─► now and then: val, save

out_dir is a Hugging Face model folder with the weights that did best on val, tokenizer and codec beside them; in
out_dir/step-000300 lies the state to continue from, in log.jsonl every line that was printed, in config.py the settings,
in report.html the loss curves and what the model answered at the last evaluation, to be heard.
"""
import gc
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import sys
import time
from contextlib import nullcontext
from copy import copy
from dataclasses import asdict, dataclass, replace
from glob import glob

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import config
from codec import Vocabulary
from data.loader import STREAMS, Dialogues, Loader, Mixture, Prefetch
from flatten import CONTROL, get_layout, print_coloured
from measures.batch import draw_batch
from measures.listen import Listener
from model import ModelConfig, Qwen2


@dataclass(frozen=True)
class Config:
    # what is learned
    data: str = 'data/demo'             # a folder with train.arrow, val.arrow, codec/; or several by weight: 'data/a:0.7,data/b:0.3'
    stages: str = 'duplex3:1000'        # layouts and steps or epochs, one after the other: 'asr.user+tts:400, duplex3:5epochs'
    speech_chunk: int | None = None     # frames a chunk; None: the layout's own, 10 (400 ms at 25 Hz; with codes of 50 Hz take 20)
    text_chunk: int | None = None       # text tokens a chunk; None: the layout's own, 2
    learn_user_text: bool = True        # half_duplex: is the user's text a target; the paper does not say
    # the model; with init_from its sizes come from the checkpoint
    init_from: str | None = None        # a checkpoint, or a Hugging Face Qwen2, whose vocabulary then grows; None: random weights
    new_rows: str = 'spread'            # where ids that are new start: spread (mean and spread of the old), words, normal, zeros
    new_rows_scale: float = 0.5         # of spread, in standard deviations of the old rows
    n_layer: int = 4
    n_head: int = 6
    n_kv_head: int = 2
    n_embd: int = 192
    n_inner: int = 512
    block_size: int = 1024              # tokens a row; at 55 a second (duplex3 at 25 Hz) 18.6 s of conversation
    # the batch
    batch_size: int = 4                 # rows a micro-step on each device: as many as its memory takes
    auto_batch: bool = False            # on a GPU: instead of batch_size, the most rows that its memory takes
    batch_tokens: int = 4096            # tokens an optimiser step over all devices; micro-steps follow from it
    user_noise: float = 0.0             # share of the user's codes replaced at random in training: unknown voices differ, too
    text_weight: float = 1.0            # of a text token in the loss: there are few, and all else follows from them
    # AdamW
    learning_rate: float = 1e-3
    min_learning_rate: float = 0.0      # where the cosine ends
    warmup_steps: int = 50
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1           # on matrices only
    grad_clip: float = 1.0              # 0.0: no clipping
    # running
    out_dir: str = 'out/demo'
    resume: bool = False                # continue the run in out_dir, where there is one
    eval_interval: int = 200            # steps between evaluations on all of val; each also saves the state
    log_interval: int = 10
    device: str = 'auto'                # cuda, cpu, …; auto: a GPU if there is one
    dtype: str = 'auto'                 # of the matmuls: float32, bfloat16; auto: bfloat16 where the hardware multiplies it
    compile: bool = False               # the blocks, by torch.compile: for GPUs; on a CPU it would need the dense mask, and be slower
    tensorboard: bool = True            # log there too, where tensorboard is installed
    wandb: str | None = None            # log there too, in the project of that name
    n_listen: int = 2                   # dialogues of val that the model listens to at each evaluation, to be heard in out_dir/report.html; 0: none
    show: int = 0                       # print so many rows of each stage as the model gets them, in colour, and stop
    seed: int = 1337

    def __post_init__(self):
        for name in ('batch_size', 'batch_tokens', 'block_size', 'eval_interval', 'log_interval'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}, it has to be at least 1')
        if self.n_listen < 0 or self.show < 0:
            raise ValueError(f'n_listen is {self.n_listen}, show is {self.show}; they cannot be negative')
        if self.dtype not in ('auto', 'float32', 'bfloat16'):
            raise ValueError(f"dtype is {self.dtype!r}, known are 'auto', 'float32' and 'bfloat16'")
        if not 0 <= self.user_noise <= 1 or self.text_weight <= 0 or self.grad_clip < 0 or self.warmup_steps < 0:
            raise ValueError('user_noise has to lie between 0 and 1, text_weight above 0, grad_clip and warmup_steps not below 0')
        if not self.out_dir.strip('/.'):
            raise ValueError(f'out_dir is {self.out_dir!r}; it has to name a folder for the run')
        object.__setattr__(self, 'out_dir', os.path.normpath(self.out_dir))
        self.curriculum()
        self.mixture()

    def mixture(self):
        """[(folder, weight)] of the data sets. Raises ValueError for a list that cannot be read."""
        sets = []
        for part in self.data.split(','):
            folder, colon, weight = part.strip().rpartition(':')
            try:
                sets.append((folder, float(weight)) if colon else (weight, 1.0))
            except ValueError:
                raise ValueError(f'data: {part.strip()!r} is not FOLDER:WEIGHT')
            if not sets[-1][0] or not 0 < sets[-1][1] < math.inf:
                raise ValueError(f'data: {part.strip()!r} is not FOLDER or FOLDER:WEIGHT with a weight above 0')
        return sets

    def curriculum(self):
        """[([Layout], steps, epochs)] of the stages, one of the two is None. Raises ValueError for a stage that cannot be read."""
        stages = []
        for part in self.stages.split(','):
            names, _, length = part.strip().partition(':')
            found = re.fullmatch(r'\s*(\d+\.?\d*)\s*(epochs?)?\s*', length)
            n, unit = found.groups() if found else ('0', None)
            if not float(n) or not (unit or n.isdigit()):
                raise ValueError(f'stages: {part.strip()!r} is not LAYOUT:STEPS, LAYOUT:5epochs or LAYOUT+LAYOUT:STEPS')
            layouts = [get_layout(name.strip(), self.speech_chunk, self.text_chunk, self.learn_user_text) for name in names.split('+')]
            stages.append((layouts, None, float(n)) if unit else (layouts, int(n), None))
        return stages


# dense bf16 FLOP/s from the datasheets, for MFU; other devices print none
PEAK_FLOPS = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12, 'L40S': 362e12, 'RTX 4090': 165e12}


def get_lr(step, n_step, cfg):
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    share = (step - cfg.warmup_steps) / max(1, n_step - cfg.warmup_steps)
    return cfg.min_learning_rate + 0.5 * (1 + math.cos(math.pi * share)) * (cfg.learning_rate - cfg.min_learning_rate)


def pick_device(name):
    """'auto' is a GPU if there is one. Raises ValueError for what this machine does not have."""
    kind = name if name != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        return torch.empty(0, device=kind).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'device {name!r} cannot be used here: ' + str(error).split('\n')[0])


def pick_dtype(name, device):
    if name != 'auto':
        return getattr(torch, name)
    if device.type == 'cuda':
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # a CPU without avx512_bf16 emulates bf16, more slowly than fp32
    return torch.bfloat16 if device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported() else torch.float32


def stream_sums(losses, batch, device):
    """losses (N) -> float64 (2, 3): the sum in nats and the number of tokens by stream."""
    sums = torch.zeros(2, len(STREAMS), dtype=torch.float64, device=device)
    sums[0].index_add_(0, batch.stream, losses.detach().double())
    sums[1].index_add_(0, batch.stream, torch.ones_like(losses, dtype=torch.float64))
    return sums


def loss_sums(model, loader, device, autocast):
    """-> stream_sums over every document of a loader once, and the seconds of conversation that they are."""
    sums, sec = torch.zeros(2, len(STREAMS), dtype=torch.float64, device=device), 0.0
    model.eval()
    with torch.no_grad(), autocast:
        for batch in loader.epoch():
            batch = batch.to(device)
            sums += stream_sums(model(batch.idx, batch.pos, batch.doc, batch.learn, batch.targets), batch, device)
            sec += batch.sec
    model.train()
    return sums, sec


def token_weights(batch, cfg):
    return torch.where(batch.stream == STREAMS.index('text'), cfg.text_weight, 1.0)     # (N)


def by_stream(sums, sec):
    """Sums by stream -> nats a token, whole and by stream, and bits a second of conversation (comparable across layouts)."""
    nats, counts = sums.tolist()
    values = {name: nats[i] / counts[i] for i, name in enumerate(STREAMS) if counts[i]}
    return dict(loss=sum(nats) / sum(counts), **values, bits_per_sec=sum(nats) / math.log(2) / sec)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints: written beside and renamed; nothing is pickled

def save_model(folder, model, vocab, about, data):
    """A Hugging Face folder, with what sample.py needs besides: the codec, and the layout in config.json."""
    model.save_pretrained(folder, extra={'nanoduplex': about})
    vocab.save(folder)
    if os.path.isdir(os.path.join(data, 'codec')):
        shutil.copytree(os.path.join(data, 'codec'), os.path.join(folder, 'codec'), dirs_exist_ok=True)


def save_state(cfg, step, model, optimizer, vocab, about, state):
    """out_dir/step-000300, with all that the run needs to go on as if it had not stopped."""
    folder = os.path.join(cfg.out_dir, f'step-{step:06d}')
    shutil.rmtree(folder + '.part', ignore_errors=True)
    save_model(folder + '.part', model, vocab, about, cfg.mixture()[0][0])
    names = {p: name for name, p in model.named_parameters()}
    tensors = {f'{names[p]}.{key}': value for p, entry in optimizer.state.items() for key, value in entry.items()}
    save_file(tensors | {'rng': torch.get_rng_state()}, os.path.join(folder + '.part', 'optimizer.safetensors'))
    with open(os.path.join(folder + '.part', 'state.json'), 'w') as file:
        json.dump(dict(state, step=step), file)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(folder + '.part', folder)
    for old in glob(os.path.join(cfg.out_dir, 'step-*')):
        if old != folder:
            shutil.rmtree(old)
    return folder


def load_state(folder, model, optimizer):
    tensors = load_file(os.path.join(folder, 'optimizer.safetensors'))
    missing = [name for name, _ in model.named_parameters() if f'{name}.exp_avg' not in tensors]
    if missing:
        raise ValueError(f'{folder} was saved by another version of this code (it has no state of {missing[0]}): start from its weights, '
                         f'--init_from={folder}, into another --out_dir')
    for name, p in model.named_parameters():
        optimizer.state[p] = {key: tensors[f'{name}.{key}'].to(p.device) for key in ('step', 'exp_avg', 'exp_avg_sq')}
    torch.set_rng_state(tensors['rng'])
    with open(os.path.join(folder, 'state.json')) as file:
        return json.load(file)


def publish(folder, out_dir):
    """The files of a saved step become those of out_dir, each replaced whole; the weights come last."""
    for path in sorted(glob(os.path.join(folder, '**'), recursive=True), key=lambda path: path.endswith('model.safetensors')):
        name = os.path.relpath(path, folder)
        if os.path.isfile(path) and name not in ('optimizer.safetensors', 'state.json'):
            os.makedirs(os.path.dirname(os.path.join(out_dir, name)), exist_ok=True)
            shutil.copy(path, os.path.join(out_dir, name + '.part'))
            os.replace(os.path.join(out_dir, name + '.part'), os.path.join(out_dir, name))


def last_state(out_dir):
    return max((path for path in glob(os.path.join(out_dir, 'step-*')) if not path.endswith('.part')), default=None)


def move_aside(out_dir):
    """A run that is not continued is kept, under another name."""
    n = 1
    while os.path.exists(f'{out_dir}.{n}'):
        n += 1
    os.rename(out_dir, f'{out_dir}.{n}')
    return f'{out_dir}.{n}'


# ---------------------------------------------------------------------------------------------------------------------

def main(cfg):
    """Trains as cfg says, returns the metrics of the last evaluation. Raises ValueError where cfg and files don't agree."""
    # where we run: alone, or one of the processes that torchrun started
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = pick_device(cfg.device)
    if device.type == 'cuda':
        device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    is_main = rank == 0
    say = print if is_main else lambda *_, **__: None
    dtype = pick_dtype(cfg.dtype, device)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    torch.manual_seed(cfg.seed)

    if cfg.auto_batch and device.type != 'cuda':
        raise ValueError('auto_batch tries how much the memory of a GPU takes, and there is none: give batch_size')
    if cfg.wandb and not importlib.util.find_spec('wandb'):
        raise ValueError(f'wandb={cfg.wandb}: wandb is not installed (pip install wandb)')
    rows_a_step = cfg.batch_tokens // cfg.block_size
    check_batch(replace(cfg, batch_size=1) if cfg.auto_batch else cfg, world_size)

    # the run goes on, starts from a checkpoint, or starts from nothing
    folders, weights = zip(*cfg.mixture())
    train_data, val_data = ([Dialogues(folder, split) for folder in folders] for split in ('train', 'val'))
    codec = train_data[0].codec
    for dialogues in train_data + val_data:
        if dialogues.codec != codec:
            raise ValueError(f'{dialogues.folder} was made with codec {dialogues.codec}, {folders[0]} with {codec}: they cannot be mixed')
    start_from = last_state(cfg.out_dir) if cfg.resume else None
    is_resumed = start_from is not None
    start_from = start_from or cfg.init_from
    if start_from and not os.path.isdir(start_from):
        raise ValueError(f'init_from: no folder {start_from}; download the model, and give the folder with its config.json')
    vocab = Vocabulary.load(start_from or os.path.join(folders[0], 'tokenizer'), codec['n_codes'])
    if start_from:
        model = Qwen2.from_pretrained(start_from)
        if cfg.block_size > model.config.block_size:
            say(f'note: block_size={cfg.block_size}, {start_from} has seen contexts of at most {model.config.block_size}')
        if about_checkpoint(start_from):
            check_checkpoint(start_from, model, vocab, train_data[0])
        else:
            new = vocab.untrained + list(range(model.config.vocab_size, vocab.size))
            say(f'{start_from}: {len(new)} ids are new of {vocab.size}, their rows start from {cfg.new_rows}')
            words = {vocab.control[name]: vocab.encode(text) for name, text in CONTROL.items() if vocab.control[name] in vocab.untrained}
            model.grow(vocab.size, new, vocab.n_text, cfg.new_rows, cfg.new_rows_scale, words, cfg.seed)
        model.config = replace(model.config, block_size=cfg.block_size)     # the context it will know
        sizes = {name: getattr(model.config, name) for name in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner')}
        cfg = replace(cfg, **sizes)                                         # what config.py will say
    else:
        model = Qwen2(ModelConfig(vocab.size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_kv_head, cfg.n_embd, cfg.n_inner))
    model.to(device)
    params = list(model.parameters())
    # all gradients lie in one flat fp32 tensor, into which hundreds of micro-steps add: one all-reduce a step, and no DDP, which would
    # split the compiled graphs and reduce bucket by bucket what takes 12 ms in 60 s (100 M tokens on 8 GPUs)
    gradient = torch.zeros(model.n_param(), device=device)
    for p, piece in zip(params, gradient.split([p.numel() for p in params])):
        p.grad = piece.view_as(p)
        if world_size > 1:
            dist.broadcast(p.data, 0)       # the same start everywhere, whatever each machine's random numbers or files were
    if cfg.auto_batch:      # before compiling, which would do it for every size; compiled it takes less memory
        cfg = replace(cfg, batch_size=find_batch_size(model, cfg, autocast, world_size), auto_batch=False)
        gradient.zero_()
    if cfg.compile:
        model.compile_blocks()
    n_micro = rows_a_step // (cfg.batch_size * world_size)
    place = (vocab, cfg.block_size, cfg.batch_size, cfg.seed, rank, world_size)
    padded = device.type != 'cpu' or cfg.compile        # fixed shapes
    stages = []
    for layouts, n, epochs in cfg.curriculum():
        loader = Mixture([Loader(dialogues, layouts, *place, cfg.user_noise, padded) for dialogues in train_data], weights)
        val_loader = Mixture([Loader(dialogues, layouts, *place, padded=padded) for dialogues in val_data], weights)
        counts = loader.measure()
        stages.append((layouts, n or max(1, round(epochs * counts['rows'] / rows_a_step)), counts['rows'] / rows_a_step, counts, loader, val_loader))
    if cfg.show:
        if is_main:
            show(cfg, stages, vocab)
        return {}

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]     # biases and norms: no pull towards zero
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=device.type in ('cuda', 'cpu'))
    state = dict(step=0, loader=None, best=None, best_step=None, sec_heard=0.0, train_sec=0.0)
    if is_resumed:
        state = load_state(start_from, model, optimizer)
        if is_main and state['best_step'] == state['step']:
            publish(start_from, cfg.out_dir)    # it may have been killed right before
    elif glob(os.path.join(cfg.out_dir, '*')) and not os.path.exists(os.path.join(cfg.out_dir, 'log.jsonl')):
        raise ValueError(f'{cfg.out_dir} holds files that are no run of train.py: choose another --out_dir')
    if world_size > 1:
        dist.barrier()      # all have read what they start from, which may be what is moved now
    if not is_resumed and is_main and os.path.exists(os.path.join(cfg.out_dir, 'log.jsonl')):
        say(f'{cfg.out_dir} held another run, moved to {move_aside(cfg.out_dir)}')
    if is_main:
        os.makedirs(cfg.out_dir, exist_ok=True)
        config.save(cfg, os.path.join(cfg.out_dir, 'config.py'))
    log, log_heard = open_log(cfg, state['step']) if is_main else (lambda **_: None, None)
    listener = Listener(cfg, vocab, val_data, dtype, say) if is_main else None

    n_step = sum(n for _, n, *_ in stages)
    say(f'{model.n_param() / 1e6:.1f} M parameters, {vocab.size} ids, {device}, {str(dtype).removeprefix("torch.")}, {world_size} process(es); '
        f'{n_micro} micro-steps of {cfg.batch_size} x {cfg.block_size} x {world_size} = {cfg.batch_tokens} tokens a step, {n_step} steps')
    peak_flops = next((flops for name, flops in PEAK_FLOPS.items() if device.type == 'cuda' and name in torch.cuda.get_device_name(device)), None)

    def evaluate(val_loader):
        """The whole val set, each rank its share."""
        return by_stream(*reduce(*loss_sums(model, val_loader, device, autocast)))

    def reduce(sums, sec):
        if world_size > 1:
            both = torch.cat([sums.flatten(), sums.new_tensor([sec])])
            dist.all_reduce(both)
            return both[:-1].view_as(sums), float(both[-1])
        return sums, sec

    gc.freeze()     # Python's collector need not look through all that torch has imported again and again, in the loader's time
    # training: one stage after the other, in one run with one schedule
    metrics, step, first = {}, state['step'], 0
    learned = about_checkpoint(cfg.init_from).get('learned', []) if cfg.init_from else []
    for layouts, n_stage_step, steps_an_epoch, c, loader, val_loader in stages:
        last = first + n_stage_step
        learned = list(dict.fromkeys([*learned, *(layout.name for layout in layouts)]))     # in this run and in those before it
        if step >= last:                # done before the run was resumed
            first = last
            continue
        name = '+'.join(layout.name for layout in layouts)
        say(f'stage {name}, steps {first} to {last}: an epoch has {c["dialogues"]} of {sum(map(len, train_data))} dialogues, {c["documents"]} documents, '
            f'{c["sec"] / 3600:.2f} h, {c["tokens"]} tokens, {c["learned"] / c["tokens"]:.0%} learned, '
            + (f'{1 - c["tokens"] / (c["rows"] * cfg.block_size + c["documents"]):.1%} padding' if padded else 'no padding') + f', {c["too_long"]} documents too long, '
            f'{c["text_dropped"]} text tokens dropped; it takes {steps_an_epoch:.3g} steps, the stage {n_stage_step / steps_an_epoch:.3g} epochs')
        for doubt in doubts(cfg, c, n_stage_step, steps_an_epoch, n_step):
            say(f'note: {doubt}')
        if step == first:
            state = dict(state, best=None, best_step=None)      # another layout: its losses do not compare with the last one's
        else:
            loader.state = state['loader']
        batches = Prefetch(loader, device)
        about = dict(layout=layouts[-1].name, learned=learned, speech_chunk=layouts[-1].speech_chunk, text_chunk=cfg.text_chunk, text_weight=cfg.text_weight,
                     code_start=vocab.code_start, n_codes=vocab.n_codes, codec=codec)
        sums, sec, timed_from, timed_steps = torch.zeros(2, len(STREAMS), dtype=torch.float64, device=device), 0.0, time.time(), 0
        waited_sec = 0.0

        while step < last:
            lr = get_lr(step, n_step, cfg)
            for group in optimizer.param_groups:
                group['lr'] = lr
            n_learned, total_weight = 0, torch.zeros((), device=device)
            for _ in range(n_micro):
                batch = batches.next_batch()
                weights = token_weights(batch, cfg)
                with autocast:
                    total, losses = model(batch.idx, batch.pos, batch.doc, batch.learn, batch.targets, weights)     # scalar, (N)
                total.backward()
                n_learned += len(losses)
                total_weight += weights.sum()
                sums += stream_sums(losses, batch, device)
                sec += batch.sec
            # rows hold unequal numbers of learned tokens, a mean of means would weigh them unequally: so far the gradient is
            # of a sum; it is divided once, by the weight of all tokens of all ranks
            if world_size > 1:
                dist.all_reduce(gradient)
                dist.all_reduce(total_weight)
            gradient.div_(total_weight)
            grad_norm = gradient.norm()
            if cfg.grad_clip:
                gradient.mul_((cfg.grad_clip / grad_norm).clamp(max=1.0))
            optimizer.step()
            gradient.zero_()
            step += 1
            timed_steps += 1

            if step % cfg.log_interval == 0 or step == last or step % cfg.eval_interval == 0:
                total, total_sec = reduce(sums, sec)    # this and the next lines wait for the device, others don't
                seen = by_stream(total, total_sec)
                if not math.isfinite(seen['loss'] + float(grad_norm)):
                    raise ValueError(f'loss is {seen["loss"]}, gradient norm {float(grad_norm)} at step {step}: lower learning_rate, '
                                     f'and go on from {last_state(cfg.out_dir) or "the start"} with --resume=true')
                elapsed = time.time() - timed_from
                tokens_per_sec = timed_steps * cfg.batch_tokens / elapsed
                state['sec_heard'] += total_sec
                state['train_sec'] += elapsed
                mfu = None
                if peak_flops:
                    mean_keys = float((batch.pos + 1).double().mean())
                    flops = model.flops_per_token(n_learned * world_size / cfg.batch_tokens, mean_keys)
                    mfu = tokens_per_sec * flops / (peak_flops * world_size)
                streams = ' '.join(f'{key} {seen[key]:6.3f}' if key in seen else f'{key}    -  ' for key in STREAMS)
                say(f'step {step:>6}/{n_step} | loss {seen["loss"]:6.3f} {streams} | {seen["bits_per_sec"]:7.1f} b/s | lr {lr:.1e} | '
                    f'norm {float(grad_norm):6.2f} | {1e3 * elapsed / timed_steps:6.0f} ms | {tokens_per_sec / 1e3:6.1f}k tok/s | '
                    + (f'mfu {mfu:4.0%} | ' if mfu else '') + f'{state["sec_heard"] / 3600:6.2f} h heard', flush=True)
                log(kind='train', step=step, stage=name, lr=lr, grad_norm=float(grad_norm), tokens_per_sec=tokens_per_sec, mfu=mfu,
                    hours_heard=state['sec_heard'] / 3600, loader_wait=(batches.wait_sec - waited_sec) / elapsed, **seen)
                sums.zero_()
                sec, timed_from, timed_steps, waited_sec = 0.0, time.time(), 0, batches.wait_sec

            if step % cfg.eval_interval == 0 or step == last:
                metrics = evaluate(val_loader)
                is_best = state['best'] is None or metrics['loss'] < state['best']
                state.update(loader=batches.state, **(dict(best=metrics['loss'], best_step=step) if is_best else {}))
                streams = ' '.join(f'{key} {metrics[key]:6.3f}' if key in metrics else f'{key}    -  ' for key in STREAMS)
                say(f'val  {step:>6}/{n_step} | loss {metrics["loss"]:6.3f} {streams} | {metrics["bits_per_sec"]:7.1f} b/s | '
                    + ('best so far' if is_best else f'best was {state["best"]:.3f}'), flush=True)
                log(kind='val', step=step, stage=name, **metrics)
                if is_main:
                    folder = save_state(cfg, step, model, optimizer, vocab, about, state)
                    if is_best:
                        publish(folder, cfg.out_dir)
                    heard = listener.hear(step, model, layouts)     # the others wait at their next all-reduce
                    log_heard(step, heard)
                    listener.report(step, heard)
                timed_from = time.time()
        batches.close()
        first = last
    if not metrics:
        say(f'{cfg.out_dir} had finished its {n_step} steps before')
    # ru_maxrss is in KiB on Linux, in bytes on a Mac
    peak = torch.cuda.max_memory_allocated() if device.type == 'cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    say(f'{cfg.out_dir}: {state["train_sec"]:.0f} s of training, best val loss {state["best"]:.3f}, at most {peak / 1e9:.1f} GB of memory a process')
    if world_size > 1:
        dist.barrier()      # the first to leave would take the others' connections with it while rank 0 still saves
        dist.destroy_process_group()
    return dict(step=step, best_val_loss=state['best'], train_sec=state['train_sec'], **{f'val_{key}': value for key, value in metrics.items()})


def show(cfg, stages, vocab):
    """Prints the first cfg.show rows of each stage, from the tensors that the model would get."""
    for layouts, _, _, _, loader, _ in stages:
        print(f'stage {"+".join(layout.name for layout in layouts)}')
        clean, n_shown = copy(loader), 0        # without user_noise, to see what it replaced
        clean.loaders, clean.taken = [copy(each) for each in loader.loaders], list(loader.taken)
        for each in clean.loaders:
            each.user_noise = 0.0
        while n_shown < cfg.show:
            batch, told = loader.next_batch(), clean.next_batch()
            n_row = min(len(batch.idx), cfg.show - n_shown)
            print_coloured(draw_batch(batch, layouts, vocab, STREAMS, token_weights(batch, cfg), n_row, shutil.get_terminal_size((110, 24)).columns, told.idx))
            n_shown += n_row


def check_batch(cfg, world_size):
    micro_tokens = cfg.batch_size * cfg.block_size * world_size
    if cfg.batch_tokens % micro_tokens:
        raise ValueError(f'batch_tokens {cfg.batch_tokens} is no multiple of batch_size {cfg.batch_size} x block_size {cfg.block_size} x '
                         f'{world_size} processes = {micro_tokens}; the next is {-(-cfg.batch_tokens // micro_tokens) * micro_tokens}')


def find_batch_size(model, cfg, autocast, world_size):
    """The most rows a micro-step that the memory takes, of those that divide the step. Tried with the most expensive rows there are:
    one document each, of which everything is learned."""
    device, rows, best = next(model.parameters()).device, cfg.batch_tokens // (cfg.block_size * world_size), 0
    moments = torch.empty(2 * model.n_param(), device=device)       # AdamW will want them
    for n in (n for n in range(1, rows + 1) if rows % n == 0):
        idx = torch.zeros(n, cfg.block_size, dtype=torch.int64, device=device)
        learn = torch.arange(idx.numel(), device=device)
        try:
            with autocast:
                total, _ = model(idx, torch.arange(cfg.block_size, device=device).expand_as(idx), idx, learn, idx.flatten(), torch.ones_like(learn, dtype=torch.float32))
            total.backward()
        except torch.OutOfMemoryError:
            break
        best = n
    del moments
    if world_size > 1:
        least = torch.tensor(best, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        best = int(least)
    if not best:
        raise ValueError(f'not even one row of block_size={cfg.block_size} fits into the memory of {device}')
    return best


def doubts(cfg, counts, n_stage_step, steps_an_epoch, n_step):
    """What a reader of the settings would frown at, a sentence each."""
    if n_stage_step < 100 and steps_an_epoch < 10:
        yield (f'{n_stage_step} steps in all, as a step takes {cfg.batch_tokens} tokens and an epoch has {counts["tokens"]}: a model hardly moves in so few; '
               f'a --batch_tokens of {counts["tokens"] / 100:.2g} would make 100 an epoch')
    if n_stage_step > 50 * steps_an_epoch:
        yield f'the stage goes through its data {n_stage_step / steps_an_epoch:.0f} times: it will know it by heart'
    if cfg.warmup_steps > n_step / 2:
        yield f'warmup_steps={cfg.warmup_steps} of {n_step} steps: the learning rate hardly gets to {cfg.learning_rate}'
    if counts['too_long'] > 0.05 * (counts['too_long'] + counts['documents']):
        yield f'{counts["too_long"]} of {counts["too_long"] + counts["documents"]} documents are longer than block_size={cfg.block_size} and left out: raise it'


def about_checkpoint(folder):
    """What a checkpoint of ours says of itself (layout, codec, …); {} of another's."""
    with open(os.path.join(folder, 'config.json')) as file:
        return json.load(file).get('nanoduplex', {})


def check_checkpoint(folder, model, vocab, dialogues):
    """Ids must mean the same to the weights and to the data."""
    if model.config.vocab_size != vocab.size:
        raise ValueError(f'{folder}: its model has {model.config.vocab_size} ids, its tokenizer with {vocab.n_codes} codes {vocab.size}: '
                         'the checkpoint is of another vocabulary')
    codec = about_checkpoint(folder).get('codec')
    if codec and codec != dialogues.codec:
        raise ValueError(f'{dialogues.folder} was made with codec {dialogues.codec["name"]} {dialogues.codec["fingerprint"]}, {folder} was trained with '
                         f'codec {codec["name"]} {codec["fingerprint"]}: prepare the data with the checkpoint\'s codec, or start another run')


def open_log(cfg, step):
    """log(**values) appends a line to out_dir/log.jsonl; lines after the step that a run resumes from are taken out. log_heard(step,
    conversations) is for what can play audio. Both also write to tensorboard and wandb, where they are wanted."""
    path = os.path.join(cfg.out_dir, 'log.jsonl')
    lines = []
    if os.path.exists(path):
        with open(path) as file:
            lines = [line for line in file if line.startswith('{') and line.endswith('}\n')]      # the last may be half a line
        lines = [line for line in lines if json.loads(line)['step'] <= step]
    with open(path + '.part', 'w') as file:
        file.writelines(lines)
    os.replace(path + '.part', path)
    writer, run = None, open_wandb(cfg) if cfg.wandb else None
    if cfg.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(cfg.out_dir, purge_step=step)
        except ModuleNotFoundError:
            pass        # an extra: pip install tensorboard

    def log(**values):
        with open(path, 'a') as file:
            file.write(json.dumps(values) + '\n')
        scalars = {f'{values["kind"]}/{key}': value for key, value in values.items() if isinstance(value, float)}
        for key, value in scalars.items() if writer else ():
            writer.add_scalar(key, value, values['step'])
        if run:
            run.log(dict(scalars, step=values['step']))

    def log_heard(step, conversations):
        for each in conversations:
            name, wave = f'heard/{each["id"]}', each['wave']
            said = '\n\n'.join(f'{turn["start"] / each["rate_hz"]:.2f} s {turn["role"]}: {turn["text"]}' for turn in each['turns'])
            if writer:
                writer.add_text(name, said, step)
            if writer and wave is not None:     # it plays one channel: both voices in it
                writer.add_audio(name, wave.mean(1), step, each['sample_rate'])
            if run and wave is not None:
                import wandb
                run.log({name: wandb.Audio(wave, each['sample_rate'], caption=said), 'step': step})
    return log, log_heard


def open_wandb(cfg):
    """A run of wandb, which a resumed run of ours continues."""
    import wandb
    path = os.path.join(cfg.out_dir, 'wandb.id')
    known = None
    if os.path.exists(path):
        with open(path) as file:
            known = file.read()
    try:
        run = wandb.init(project=cfg.wandb, name=os.path.basename(cfg.out_dir), id=known, resume='allow', dir=cfg.out_dir, config=asdict(cfg),
                         reinit='finish_previous')
    except wandb.Error as error:
        raise ValueError(f'wandb={cfg.wandb} cannot start: {error}')
    with open(path, 'w') as file:
        file.write(run.id)
    run.define_metric('*', step_metric='step')      # its own counter only goes up, a resumed run goes back to its last state
    return run


if __name__ == '__main__':
    try:
        main(config.load(Config, sys.argv[1:]))
    except ValueError as error:
        raise SystemExit(str(error))
