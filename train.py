"""
Trains a Qwen2 on flattened dialogues, on one device or on many.

    python train.py config/demo.py --batch_size=4                           a laptop
    python train.py config/demo.py --resume=true                            go on where it was killed
    torchrun --standalone --nproc_per_node=2 train.py config/demo.py        two GPUs, or two processes on a CPU

    each stage of the curriculum: rows of packed dialogues ─► loss on learned tokens ─► AdamW ─► now and then: val, save

out_dir becomes a Hugging Face model folder with the weights that did best on val (checkpoint.py says what is
where); log.jsonl has every line that was printed, config.py the settings, and report.html the loss curves and
what the model answered at the last evaluation, to be heard.
"""
import gc
import importlib.util
import math
import os
import re
import resource
import shutil
import sys
import time
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from typing import NamedTuple

import torch
import torch.distributed as dist

import config
from checkpoint import (
    Info,
    check_codec,
    check_vocabulary,
    last_state,
    load_state,
    move_aside,
    publish,
    read_info,
    save_state,
)
from common.device import PEAK_FLOPS, pick_device, pick_dtype
from data.dialogues import Dialogues
from data.loader import STREAMS, Loader, Mixture, Prefetch
from flatten import get_layout
from measures.draw import draw_batch, print_coloured
from measures.listen import Listener
from measures.logger import Logger
from measures.losses import by_stream, format_losses, loss_sums, stream_sums
from model import ModelConfig, Qwen2
from vocabulary import CONTROL, Vocabulary


@dataclass(frozen=True)
class Config:
    # what is learned
    # a folder with train.arrow, val.arrow, codec/; or several by weight: 'data/a:0.7,data/b:0.3'
    data: str = 'data/demo'
    # layouts and steps or epochs, one after the other: 'asr.user+tts:400, duplex3:5epochs'
    stages: str = 'duplex3:1000'
    # frames a chunk; None: the layout's own, 10 (400 ms at 25 Hz; with codes of 50 Hz take 20)
    speech_chunk: int | None = None
    text_chunk: int | None = None       # text tokens a chunk; None: the layout's own, 2
    learn_user_text: bool = True        # half_duplex: is the user's text a target; the paper does not say
    # the model; with init_from its sizes come from the checkpoint
    # a checkpoint, or a Hugging Face Qwen2, whose vocabulary then grows; None: random weights
    init_from: str | None = None
    # where ids that are new start: spread (mean and spread of the old), words, normal, zeros
    new_rows: str = 'spread'
    new_rows_scale: float = 0.5         # of spread, in standard deviations of the old rows
    n_layer: int = 4
    n_head: int = 6
    n_kv_head: int = 2
    n_embd: int = 192
    n_inner: int = 512
    # tokens a row; at 55 a second (duplex3 at 25 Hz) 18.6 s of conversation
    block_size: int = 1024
    # the batch
    batch_size: int = 4                 # rows a micro-step on each device: as many as its memory takes
    auto_batch: bool = False            # on a GPU: instead of batch_size, the most rows that its memory takes
    # tokens an optimiser step over all devices; micro-steps follow from it
    batch_tokens: int = 4096
    # share of the user's codes replaced at random in training: unknown voices differ, too
    user_noise: float = 0.0
    # of a text token in the loss: there are few, and all else follows from them
    text_weight: float = 1.0
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
    # of the matmuls: float32, bfloat16; auto: bfloat16 where the hardware multiplies it
    dtype: str = 'auto'
    # the blocks, by torch.compile: for GPUs; on a CPU it would need the dense mask, and be slower
    compile: bool = False
    tensorboard: bool = True            # log there too, where tensorboard is installed
    wandb: str | None = None            # log there too, in the project of that name
    # dialogues of val that the model listens to at each evaluation, to be heard in out_dir/report.html; 0:
    # none
    n_listen: int = 2
    # print so many rows of each stage as the model gets them, in colour, and stop
    show: int = 0
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
            raise ValueError('user_noise has to lie between 0 and 1, text_weight above 0, grad_clip and '
                             'warmup_steps not below 0')
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
                raise ValueError(f'data: {part.strip()!r} is not FOLDER or FOLDER:WEIGHT with a weight above '
                                 '0')
        return sets

    def curriculum(self):
        """[([Layout], steps, epochs)] of the stages, one of the two is None. Raises ValueError for a stage
        that cannot be read."""
        stages = []
        for part in self.stages.split(','):
            names, _, length = part.strip().partition(':')
            found = re.fullmatch(r'\s*(\d+\.?\d*)\s*(epochs?)?\s*', length)
            n, unit = found.groups() if found else ('0', None)
            if not float(n) or not (unit or n.isdigit()):
                raise ValueError(f'stages: {part.strip()!r} is not LAYOUT:STEPS, LAYOUT:5epochs or '
                                 'LAYOUT+LAYOUT:STEPS')
            layouts = [
                get_layout(name.strip(), self.speech_chunk, self.text_chunk, self.learn_user_text)
                for name in names.split('+')]
            stages.append((layouts, None, float(n)) if unit else (layouts, int(n), None))
        return stages

class Place(NamedTuple):
    """Where this process computes: alone, or as one of those that torchrun started."""
    device: torch.device
    dtype: torch.dtype      # of the matmuls
    rank: int
    world_size: int

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def all_reduce(self, *tensors):
        for tensor in tensors if self.world_size > 1 else ():
            dist.all_reduce(tensor)

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()


class Stage(NamedTuple):
    """One stage of the curriculum: steps first to last of the run."""
    layouts: list
    first: int
    last: int
    loader: Mixture
    val_loader: Mixture
    counts: dict            # of an epoch, see Loader.measure
    epoch_steps: float      # optimiser steps in an epoch
    info: Info              # for the checkpoints written in it

    @property
    def name(self):
        return '+'.join(layout.name for layout in self.layouts)


class Run(NamedTuple):
    """All that outlives a step."""
    cfg: Config
    place: Place
    model: Qwen2
    vocab: Vocabulary
    gradient: torch.Tensor  # fp32 [n_param], of all parameters one after the other
    optimizer: torch.optim.Optimizer
    state: dict             # step, loader, best, best_step, sec_heard, train_sec: what state.json holds
    n_step: int
    logger: Logger | None   # these two on the first process only
    listener: Listener | None

    def print(self, *values):
        if self.place.is_main:
            print(*values, flush=True)


def main(cfg):
    """Trains as cfg says, returns the metrics of the last evaluation. Raises ValueError where cfg and files
    don't agree."""
    place = join(cfg)
    check_settings(cfg, place)
    torch.manual_seed(cfg.seed)
    train_data, val_data = open_data(cfg)
    resume_from = last_state(cfg.out_dir) if cfg.resume else None
    cfg, model, vocab = build_model(cfg, place, train_data[0], resume_from)
    gradient = share_start(model, place)
    # before compiling, which would do it for every size; compiled it takes less memory
    if cfg.auto_batch:
        cfg = replace(cfg, batch_size=find_batch_size(model, cfg, place), auto_batch=False)
        gradient.zero_()
    if cfg.compile:
        model.compile_blocks()
    stages = plan_stages(cfg, place, vocab, train_data, val_data)
    if cfg.show:
        if place.is_main:
            show_rows(cfg, stages, vocab)
        return {}
    optimizer = make_optimizer(model, cfg)
    state = dict(step=0, loader=None, best=None, best_step=None, sec_heard=0.0, train_sec=0.0)
    if resume_from:
        state = load_state(resume_from, model, optimizer)
    open_out_dir(cfg, place, resume_from, state)
    logger = Logger(cfg, state['step']) if place.is_main else None
    listener = Listener(cfg, vocab, val_data, place.dtype) if place.is_main else None
    run = Run(cfg, place, model, vocab, gradient, optimizer, state, stages[-1].last, logger, listener)
    print_start(run)
    # Python's garbage collector need not look through all that torch has imported, again and again
    gc.freeze()
    metrics = {}
    for stage in stages:
        if state['step'] < stage.last:      # else it was done before the run was resumed
            print_stage(run, stage)
            metrics = train_stage(run, stage)
    if not metrics:
        run.print(f'{cfg.out_dir} had finished its {run.n_step} steps before')
    run.print(f'{cfg.out_dir}: {state["train_sec"]:.0f} s of training, best val loss {state["best"]:.3f}, '
              f'at most {peak_bytes(place.device) / 1e9:.1f} GB of memory a process')
    # the first to leave would take the others' connections with it while rank 0 still saves
    place.barrier()
    if place.world_size > 1:
        dist.destroy_process_group()
    return dict(step=state['step'], best_val_loss=state['best'], train_sec=state['train_sec'],
                **{f'val_{key}': value for key, value in metrics.items()})


# ---------------------------------------------------------------------------------------------------------------------
# what a run starts from

def join(cfg):
    """Joins the other processes, if torchrun started several -> Place."""
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = pick_device(cfg.device)
    if device.type == 'cuda':
        device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    return Place(device, pick_dtype(cfg.dtype, device), rank, world_size)


def check_settings(cfg, place):
    """Raises ValueError for settings that this machine, or this number of processes, cannot run."""
    if cfg.auto_batch and place.device.type != 'cuda':
        raise ValueError('auto_batch tries how much the memory of a GPU takes, and there is none: give '
                         'batch_size')
    if cfg.wandb and not importlib.util.find_spec('wandb'):
        raise ValueError(f'wandb={cfg.wandb}: wandb is not installed (pip install wandb)')
    batch_size = 1 if cfg.auto_batch else cfg.batch_size
    micro_tokens = batch_size * cfg.block_size * place.world_size
    if cfg.batch_tokens % micro_tokens:
        raise ValueError(f'batch_tokens {cfg.batch_tokens} is no multiple of batch_size {batch_size} x '
                         'block_size '
                         f'{cfg.block_size} x {place.world_size} processes = {micro_tokens}; '
                         f'the next is {-(-cfg.batch_tokens // micro_tokens) * micro_tokens}')


def open_data(cfg):
    """-> [Dialogues] of train and of val, one a data set, all made with the same codec."""
    folders = [folder for folder, _ in cfg.mixture()]
    train_data, val_data = ([Dialogues(folder, split) for folder in folders] for split in ('train', 'val'))
    codec = train_data[0].codec
    for dialogues in train_data + val_data:
        if dialogues.codec != codec:
            raise ValueError(f'{dialogues.folder} was made with codec {dialogues.codec}, {folders[0]} with '
                             f'{codec}: '
                             'they cannot be mixed')
    return train_data, val_data


def build_model(cfg, place, dialogues, resume_from):
    """A run goes on, starts from a checkpoint, or from random weights -> cfg with the model's sizes, model,
    vocabulary."""
    start_from = resume_from or cfg.init_from
    if start_from and not os.path.isdir(start_from):
        raise ValueError(f'init_from: no folder {start_from}; download the model, and give the folder with '
                         'its config.json')
    vocab = Vocabulary.load(start_from or os.path.join(dialogues.folder, 'tokenizer'),
                            dialogues.codec['n_codes'])
    if not start_from:
        sizes = cfg.n_layer, cfg.n_head, cfg.n_kv_head, cfg.n_embd, cfg.n_inner
        return cfg, Qwen2(ModelConfig(vocab.size, cfg.block_size, *sizes)).to(place.device), vocab
    model, info = Qwen2.from_pretrained(start_from), read_info(start_from)
    if cfg.block_size > model.config.block_size and place.is_main:
        print(f'note: block_size={cfg.block_size}, {start_from} has seen contexts of at most '
              f'{model.config.block_size}')
    if info:
        check_vocabulary(start_from, model, vocab)
        check_codec(start_from, info.codec, dialogues)
    else:
        new = vocab.untrained + list(range(model.config.vocab_size, vocab.size))
        if place.is_main:
            print(f'{start_from}: {len(new)} ids are new of {vocab.size}, their rows start from '
                  f'{cfg.new_rows}')
        words = {vocab.control[name]: vocab.encode(text) for name, text in CONTROL.items()}
        words = {i: ids for i, ids in words.items() if i in vocab.untrained}
        model.grow(vocab.size, new, vocab.n_text, cfg.new_rows, cfg.new_rows_scale, words, cfg.seed)
    model.config = replace(model.config, block_size=cfg.block_size)     # the context it will know
    sizes = {
        name: getattr(model.config, name) for name in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner')}
    return replace(cfg, **sizes), model.to(place.device), vocab         # config.py will say them


def share_start(model, place):
    """
    Gives all processes the weights of the first, whatever each machine's random numbers or files were -> the
    gradient.

    The gradients of all parameters are views of one flat fp32 tensor, into which hundreds of micro-steps add.
    So there is one all-reduce a step, and no DDP, which would split the compiled graphs and reduce bucket by
    bucket what takes 12 ms of 60 s (100 M tokens on 8 GPUs).
    """
    params = list(model.parameters())
    gradient = torch.zeros(model.n_param(), device=place.device)
    for p, piece in zip(params, gradient.split([p.numel() for p in params])):
        p.grad = piece.view_as(p)
        if place.world_size > 1:
            dist.broadcast(p.data, 0)
    return gradient


def find_batch_size(model, cfg, place):
    """The most rows a micro-step that the memory takes, of those that divide the step. Tried with the most
    expensive rows
    there are: one document each, of which everything is learned."""
    device, best = place.device, 0
    rows = cfg.batch_tokens // (cfg.block_size * place.world_size)
    moments = torch.empty(2 * model.n_param(), device=device)       # AdamW will want them
    for n in (n for n in range(1, rows + 1) if rows % n == 0):
        idx = torch.zeros(n, cfg.block_size, dtype=torch.int64, device=device)
        pos = torch.arange(cfg.block_size, device=device).expand_as(idx)
        learn = torch.arange(idx.numel(), device=device)
        try:
            with place.autocast():
                total, _ = model(idx, pos, idx, learn, idx.flatten(), torch.ones(len(learn), device=device))
            total.backward()
        except torch.OutOfMemoryError:
            break
        best = n
    del moments
    if place.world_size > 1:
        least = torch.tensor(best, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        best = int(least)
    if not best:
        raise ValueError(f'not even one row of block_size={cfg.block_size} fits into the memory of {device}')
    return best


def plan_stages(cfg, place, vocab, train_data, val_data):
    """-> [Stage], their data looked through, so that what doesn't fit is found before the first step."""
    rows_a_step = cfg.batch_tokens // cfg.block_size
    shape = vocab, cfg.block_size, cfg.batch_size, cfg.seed, place.rank, place.world_size
    weights = [weight for _, weight in cfg.mixture()]
    padded = is_padded(cfg, place)
    before = read_info(cfg.init_from) if cfg.init_from else None
    trained = {layout.name: layout for layout in before.layouts} if before else {}
    stages, first = [], 0
    for layouts, n_step, n_epoch in cfg.curriculum():
        loaders = [Loader(data, layouts, *shape, cfg.user_noise, padded) for data in train_data]
        val_loaders = [Loader(data, layouts, *shape, padded=padded) for data in val_data]
        loader, val_loader = Mixture(loaders, weights), Mixture(val_loaders, weights)
        counts = loader.measure()
        epoch_steps = counts['rows'] / rows_a_step
        n_step = n_step or max(1, round(n_epoch * epoch_steps))
        # a layout that is trained again comes last: the checkpoint decodes in the last one
        for layout in layouts:
            trained.pop(layout.name, None)
            trained[layout.name] = layout
        info = Info(list(trained.values()), cfg.text_weight, vocab.code_start, vocab.n_codes,
                    train_data[0].codec)
        stages.append(Stage(layouts, first, first + n_step, loader, val_loader, counts, epoch_steps, info))
        first += n_step
    return stages


def is_padded(cfg, place):
    # a CPU needs no batches of one shape, unless it compiles
    return place.device.type != 'cpu' or cfg.compile


def make_optimizer(model, cfg):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]     # biases and norms: no pull towards zero
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=others, weight_decay=0.0)]
    is_fused = matrices[0].device.type in ('cuda', 'cpu')
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=is_fused)


def open_out_dir(cfg, place, resume_from, state):
    """The folder of the run: a used one is moved aside, unless the run in it goes on."""
    is_used = os.path.exists(os.path.join(cfg.out_dir, 'log.jsonl'))
    if not resume_from and not is_used and glob(os.path.join(cfg.out_dir, '*')):
        raise ValueError(f'{cfg.out_dir} holds files that are no run of train.py: choose another --out_dir')
    place.barrier()         # all have read what they start from, which may be what is moved now
    if not place.is_main:
        return
    if not resume_from and is_used:
        print(f'{cfg.out_dir} held another run, moved to {move_aside(cfg.out_dir)}')
    elif resume_from and state['best_step'] == state['step']:
        publish(resume_from, cfg.out_dir)       # it may have been killed right before
    os.makedirs(cfg.out_dir, exist_ok=True)
    config.save(cfg, os.path.join(cfg.out_dir, 'config.py'))


# ---------------------------------------------------------------------------------------------------------------------
# training

def get_lr(step, n_step, cfg):
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, n_step - cfg.warmup_steps)
    return cfg.min_learning_rate + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.learning_rate
                                                                               - cfg.min_learning_rate)


def token_weights(batch, text_weight):
    """-> (N), of the targets in the loss"""
    return torch.where(batch.stream == STREAMS.index('text'), text_weight, 1.0)


class Meter:
    """What came together since the last line of the log."""

    def __init__(self, batches, device):
        self.batches = batches
        self.sums = torch.zeros(2, len(STREAMS), dtype=torch.float64, device=device)    # see stream_sums
        self.restart()

    def restart(self):
        self.sums.zero_()
        self.sec, self.n_step, self.start, self.waited_sec = 0.0, 0, time.time(), self.batches.wait_sec

    def add(self, batch, losses):
        self.sums += stream_sums(losses, batch, losses.device)
        self.sec += batch.sec


def train_stage(run, stage):
    """Trains to the end of a stage, evaluating and saving on the way. Returns the metrics of the last
    evaluation."""
    cfg, place, model, state = run.cfg, run.place, run.model, run.state
    if state['step'] == stage.first:
        # another layout: its losses do not compare with the last one's
        state.update(best=None, best_step=None)
    else:
        stage.loader.state = state['loader']
    batches = Prefetch(stage.loader, place.device)
    meter = Meter(batches, place.device)
    n_micro = cfg.batch_tokens // (cfg.batch_size * cfg.block_size * place.world_size)
    while state['step'] < stage.last:
        lr = get_lr(state['step'], run.n_step, cfg)
        for group in run.optimizer.param_groups:
            group['lr'] = lr
        n_learned, total_weight = 0, torch.zeros((), device=place.device)
        for _ in range(n_micro):
            batch = batches.next_batch()
            weights = token_weights(batch, cfg.text_weight)
            with place.autocast():
                # scalar, (N)
                total, losses = model(batch.idx, batch.pos, batch.doc, batch.learn, batch.targets, weights)
            total.backward()
            n_learned += len(losses)
            total_weight += weights.sum()
            meter.add(batch, losses)
        # rows hold unequal numbers of learned tokens, and a mean of means would weigh them unequally: so far
        # the gradient
        # is of a sum; it is divided once, by the weight of all tokens of all ranks
        place.all_reduce(run.gradient, total_weight)
        run.gradient.div_(total_weight)
        grad_norm = run.gradient.norm()
        if cfg.grad_clip:
            run.gradient.mul_((cfg.grad_clip / grad_norm).clamp(max=1.0))
        run.optimizer.step()
        run.gradient.zero_()
        state['step'] += 1
        meter.n_step += 1

        is_evaluated = state['step'] % cfg.eval_interval == 0 or state['step'] == stage.last
        if is_evaluated or state['step'] % cfg.log_interval == 0:
            mfu = partial(utilisation, run, batch, n_learned)
            log_training(run, stage, meter, lr, float(grad_norm), mfu)
        if is_evaluated:
            metrics = evaluate(run, stage)
            log_evaluation(run, stage, metrics)
            state['loader'] = batches.state
            if place.is_main:
                save_and_listen(run, stage)
            meter.restart()
    batches.close()
    return metrics


def evaluate(run, stage):
    """The loss on all of val, each rank its part -> by_stream's dict."""
    sums, sec = loss_sums(run.model, stage.val_loader, run.place.device, run.place.autocast())
    return by_stream(*over_ranks(run.place, sums, sec))


def log_evaluation(run, stage, metrics):
    """Prints and logs an evaluation, and notes in the state whether it is the best so far."""
    state = run.state
    is_best = state['best'] is None or metrics['loss'] < state['best']
    run.print(f'val  {state["step"]:>6}/{run.n_step} | {format_losses(metrics)} | '
              + ('best so far' if is_best else f'best was {state["best"]:.3f}'))
    if is_best:
        state.update(best=metrics['loss'], best_step=state['step'])
    if run.logger:
        run.logger.log(kind='val', step=state['step'], stage=stage.name, **metrics)


def save_and_listen(run, stage):
    """On the first process: writes the state to go on from and, after the best evaluation, the run's model.
    Then the model is heard. The other processes wait at their next all-reduce."""
    cfg, state = run.cfg, run.state
    codec_folder = os.path.join(cfg.mixture()[0][0], 'codec')
    folder = save_state(cfg.out_dir, run.model, run.optimizer, run.vocab, stage.info, codec_folder, state)
    if state['best_step'] == state['step']:
        publish(folder, cfg.out_dir)
    heard = run.listener.hear(state['step'], run.model, stage.layouts)
    run.logger.log_heard(state['step'], heard)
    run.listener.report(state['step'], heard)


def over_ranks(place, sums, sec):
    """stream_sums and seconds of one process -> of all."""
    both = torch.cat([sums.flatten(), sums.new_tensor([sec])])
    place.all_reduce(both)
    return both[:-1].view_as(sums), float(both[-1])


# ---------------------------------------------------------------------------------------------------------------------
# what is printed and logged

def log_training(run, stage, meter, lr, grad_norm, mfu):
    """Prints and logs the steps since the last line, and starts anew. Raises ValueError where training has
    diverged."""
    cfg, state = run.cfg, run.state
    sums, sec = over_ranks(run.place, meter.sums, meter.sec)    # waits for the device, as other lines don't
    losses = by_stream(sums, sec)
    if not math.isfinite(losses['loss'] + grad_norm):
        raise ValueError(f'loss is {losses["loss"]}, gradient norm {grad_norm} at step {state["step"]}: '
                         'lower '
                         f'learning_rate, and go on from {last_state(cfg.out_dir) or "the start"} with '
                         '--resume=true')
    elapsed = time.time() - meter.start
    tokens_per_sec = meter.n_step * cfg.batch_tokens / elapsed
    state['sec_heard'] += sec
    state['train_sec'] += elapsed
    mfu = mfu(tokens_per_sec)
    run.print(f'step {state["step"]:>6}/{run.n_step} | {format_losses(losses)} | lr {lr:.1e} | norm '
              f'{grad_norm:6.2f} | '
              f'{1e3 * elapsed / meter.n_step:6.0f} ms | {tokens_per_sec / 1e3:6.1f}k tok/s | '
              + (f'mfu {mfu:4.0%} | ' if mfu else '') + f'{state["sec_heard"] / 3600:6.2f} h heard')
    if run.logger:
        run.logger.log(kind='train', step=state['step'], stage=stage.name, lr=lr, grad_norm=grad_norm,
                       tokens_per_sec=tokens_per_sec, mfu=mfu, hours_heard=state['sec_heard'] / 3600,
                       loader_wait=(meter.batches.wait_sec - meter.waited_sec) / elapsed, **losses)
    meter.restart()


def utilisation(run, batch, n_learned, tokens_per_sec):
    """MFU: the FLOPs that these tokens require, over what the GPUs can do at most. None on devices nobody
    looked up."""
    device, world_size = run.place.device, run.place.world_size
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    peak_flops = next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)
    if not peak_flops:
        return None
    mean_keys = float((batch.pos + 1).double().mean())
    flops = run.model.flops_per_token(n_learned * world_size / run.cfg.batch_tokens, mean_keys)
    return tokens_per_sec * flops / (peak_flops * world_size)


def print_start(run):
    cfg, place = run.cfg, run.place
    n_micro = cfg.batch_tokens // (cfg.batch_size * cfg.block_size * place.world_size)
    run.print(f'{run.model.n_param() / 1e6:.1f} M parameters, {run.vocab.size} ids, {place.device}, '
              f'{str(place.dtype).removeprefix("torch.")}, {place.world_size} process(es); {n_micro} '
              'micro-steps of '
              f'{cfg.batch_size} x {cfg.block_size} x {place.world_size} = {cfg.batch_tokens} tokens a step, '
              f'{run.n_step} steps')


def print_stage(run, stage):
    """What the stage goes through, and notes on settings that a reader would frown at."""
    cfg, c = run.cfg, stage.counts
    n_dialogue = sum(len(loader.dialogues) for loader in stage.loader.loaders)
    padding = 'no padding'
    if is_padded(cfg, run.place):
        padding = f'{1 - c["tokens"] / (c["rows"] * cfg.block_size + c["documents"]):.1%} padding'
    n_step = stage.last - stage.first
    run.print(f'stage {stage.name}, steps {stage.first} to {stage.last}: an epoch has {c["dialogues"]} of '
              f'{n_dialogue} '
              f'dialogues, {c["documents"]} documents, {c["sec"] / 3600:.2f} h, {c["tokens"]} tokens, '
              f'{c["learned"] / c["tokens"]:.0%} learned, {padding}, {c["too_long"]} documents too long, '
              f'{c["text_dropped"]} text tokens dropped; it takes {stage.epoch_steps:.3g} steps, '
              f'the stage {n_step / stage.epoch_steps:.3g} epochs')
    if n_step < 100 and stage.epoch_steps < 10:
        run.print(f'note: {n_step} steps in all, as a step takes {cfg.batch_tokens} tokens and an epoch has '
                  f'{c["tokens"]}: a model hardly moves in so few; a --batch_tokens of '
                  f'{c["tokens"] / 100:.2g} would '
                  'make 100 an epoch')
    if n_step > 50 * stage.epoch_steps:
        run.print(f'note: the stage goes through its data {n_step / stage.epoch_steps:.0f} times: '
                  'it will know it by heart')
    if cfg.warmup_steps > run.n_step / 2:
        run.print(f'note: warmup_steps={cfg.warmup_steps} of {run.n_step} steps: the learning rate hardly '
                  'gets to '
                  f'{cfg.learning_rate}')
    n_all = c['too_long'] + c['documents']
    if c['too_long'] > 0.05 * n_all:
        run.print(f'note: {c["too_long"]} of {n_all} documents are longer than block_size={cfg.block_size} '
                  'and left '
                  'out: raise it')


def peak_bytes(device):
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    # ru_maxrss is in KiB on Linux, in bytes on a Mac
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def show_rows(cfg, stages, vocab):
    """Prints the first cfg.show rows of each stage, from the tensors that the model would get."""
    columns = shutil.get_terminal_size((110, 24)).columns
    for stage in stages:
        print(f'stage {stage.name}')
        clean, n_shown = copy(stage.loader), 0      # without user_noise, to see what it replaced
        clean.loaders, clean.taken = [copy(each) for each in clean.loaders], list(clean.taken)
        for each in clean.loaders:
            each.user_noise = 0.0
        while n_shown < cfg.show:
            batch, without_noise = stage.loader.next_batch(), clean.next_batch()
            n_row = min(len(batch.idx), cfg.show - n_shown)
            weights = token_weights(batch, cfg.text_weight)
            print_coloured(
                draw_batch(batch, stage.layouts, vocab, STREAMS, weights, n_row, columns, without_noise.idx))
            n_shown += n_row


if __name__ == '__main__':
    try:
        main(config.load(Config, sys.argv[1:]))
    except ValueError as error:
        raise SystemExit(str(error))
