"""
Trains a Qwen2 on flattened dialogues, on one device or on many.

    python train.py config/demo.py --batch_size=4                           a laptop
    python train.py config/demo.py --resume=true                            go on where it was killed
    torchrun --standalone --nproc_per_node=2 train.py config/demo.py        two GPUs, or two CPU processes

    each stage: rows of packed dialogues ─► loss on learned tokens ─► step ─► now and then: evaluate, save

out_dir becomes a Hugging Face model folder with the weights that did best on val (checkpoint.py says what
lies where). Beside them: log.jsonl with every line that was printed, config.py with the settings, and
report.html with the loss curves and with what the model answered at the last evaluation, as audio.
"""
import gc
import importlib.util
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from glob import glob
from typing import NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist

import checkpoint
import config
import guard
from codec import load_codec
from common.device import Place, join
from common.files import remove, whole
from common.memory import check_memory, find_batch_size, peak_bytes
from data.dialogues import Dialogues
from data.loader import Loader, Mixture, Prefetch
from flatten import get_layout
from measures.best import FIGURES, Examiner
from measures.draw import show_rows
from measures.listen import Listener
from measures.logger import Logger, log_evaluation, log_training, print_stage, print_start
from measures.losses import Meter, by_stream, loss_sums, over_processes, token_weights
from model import ModelConfig, Qwen2
from parallel import Copies, Shards
from rows import grow
from vocabulary import Vocabulary


@dataclass(frozen=True)
class Config:
    # data: a folder with train.arrow, val.arrow and codec/, or several by weight: 'data/a:0.7,data/b:0.3'
    data: str = 'data/demo'
    # layouts, and how many steps or epochs of them, stage by stage: 'asr.user+tts:400, duplex3:5epochs'
    stages: str = 'duplex3:1000'
    speech_chunk: int | None = None     # frames a chunk; None: the layout's own, 10: 400 ms at 25 Hz
    text_chunk: int | None = None       # text tokens a chunk; None: the layout's own, 2
    learn_user_text: bool = True        # half_duplex: is the user's text a target; the paper does not say

    # model: init_from is a checkpoint, whose sizes are taken; None starts from random weights. A Hugging Face
    # Qwen2 gets new rows for control tokens and speech codes, which start as new_rows says (rows.py); with
    # codec, the codes' rows of random weights start so, too
    init_from: str | None = None
    new_rows: str = 'spread'            # spread, words, codec, normal or zeros
    new_rows_scale: float = 0.5         # of the first three, in standard deviations of the text's rows
    n_layer: int = 4
    n_head: int = 6
    n_kv_head: int = 2
    n_embd: int = 192
    n_inner: int = 512
    block_size: int = 1024              # tokens a row; 18.6 s at the 55 tokens a second of duplex3

    # batch
    batch_size: int = 4                 # rows a micro-step on each device: as many as its memory takes
    auto_batch: bool = False            # on a GPU: finds that number by trying, instead of batch_size
    batch_tokens: int = 4096            # tokens an optimiser step, over all devices and micro-steps
    user_noise: float = 0.0             # share of the user's codes replaced at random: new voices differ, too
    text_weight: float = 1.0            # of a text token in the loss: text is rare, and decides what is said

    # a cosine schedule. muon: torch's Muon for the matrices of the layers, AdamW for the rest; from random
    # weights only, as weights that AdamW trained get worse by it (arXiv:2605.10468)
    optimizer: str = 'adamw'
    learning_rate: float = 1e-3
    min_learning_rate: float = 0.0      # where the cosine ends
    warmup_steps: int = 50
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1           # on matrices only
    grad_clip: float = 1.0              # 0.0: no clipping

    # running
    out_dir: str = 'out/demo'
    resume: bool = False                # go on with the run in out_dir, where there is one
    eval_interval: int = 200            # steps between evaluations on all of val; each also saves the state
    save_interval_sec: float = 900.0    # so often it is saved at least, while training goes on
    log_interval: int = 10
    select: str = 'loss'                # the best step by its loss on val, answers or turns: measures/best.py
    eval_dialogues: int | None = None   # of val, answered at an evaluation; None: 40, for loss none
    n_listen: int = 2                   # dialogues of val to answer at an evaluation, for report.html
    listen_interval: int = 1            # evaluations from one to the next at which that is done
    device: str = 'auto'                # cuda, cpu, …; auto: a GPU if there is one
    dtype: str = 'auto'                 # of matmuls: float32, bfloat16; auto: bfloat16 in hardware, or fp32
    compile: bool = False               # the blocks, by torch.compile: for GPUs, a CPU gets slower by it
    shard: bool = False                 # each process holds a part of the model only: for 7 B parameters
    checkpoint_blocks: bool = False     # backward computes blocks again: a third more work for less memory
    reduce_dtype: str = 'float32'       # of gradients on their way to other processes; bfloat16: half as much
    tensorboard: bool = True            # log there, too, where tensorboard is installed
    wandb: str | None = None            # log there, too, in the project of this name
    show: int = 0                       # print so many rows of each stage as the model gets them, and stop
    max_skipped: int = 10               # steps in a row without a finite loss and gradient: then it stops
    timeout_sec: float = 1800.0         # a process waits so long for the others; the first may be listening
    seed: int = 1337

    def __post_init__(self):
        for name in ('batch_size', 'batch_tokens', 'block_size', 'eval_interval', 'log_interval',
                     'listen_interval', 'max_skipped'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}, it has to be at least 1')
        for name in ('n_listen', 'show', 'grad_clip', 'warmup_steps', 'eval_dialogues'):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f'{name} is {getattr(self, name)}, it cannot be negative')
        for name in ('save_interval_sec', 'timeout_sec'):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f'{name} is {getattr(self, name)}, it has to be above 0')
        if self.select not in FIGURES or (self.select != 'loss' and self.eval_dialogues == 0):
            raise ValueError(f'select is {self.select!r}, known are {", ".join(FIGURES)}; '
                             'all but loss need eval_dialogues')
        if self.dtype not in ('auto', 'float32', 'bfloat16'):
            raise ValueError(f"dtype is {self.dtype!r}, known are 'auto', 'float32' and 'bfloat16'")
        if self.reduce_dtype not in ('float32', 'bfloat16'):
            raise ValueError(f"reduce_dtype is {self.reduce_dtype!r}, known are 'float32' and 'bfloat16'")
        if self.optimizer not in ('adamw', 'muon'):
            raise ValueError(f"optimizer is {self.optimizer!r}, known are 'adamw' and 'muon'")
        if self.optimizer == 'muon' and (self.shard or self.init_from):
            raise ValueError('muon is for whole matrices and random weights: no shard, no init_from')
        if self.shard and (self.auto_batch or self.reduce_dtype != 'float32'):
            raise ValueError("shard goes without auto_batch, and with reduce_dtype='float32'")
        if not 0 <= self.user_noise <= 1 or self.text_weight <= 0:
            raise ValueError(f'user_noise is {self.user_noise}, it has to lie between 0 and 1; '
                             f'text_weight is {self.text_weight}, it has to be above 0')
        if not self.out_dir.strip('/.'):
            raise ValueError(f'out_dir is {self.out_dir!r}; it has to name a folder for the run')
        object.__setattr__(self, 'out_dir', os.path.normpath(self.out_dir))
        self.curriculum()
        self.mixture()

    def mixture(self):
        """data -> [(folder, weight)]. Raises ValueError for a list that cannot be read."""
        sets = []
        for part in map(str.strip, self.data.split(',')):
            folder, colon, weight = part.rpartition(':')
            try:
                sets.append((folder, float(weight)) if colon else (weight, 1.0))
            except ValueError:
                raise ValueError(f'data: {part!r} is not FOLDER:WEIGHT')
            if not sets[-1][0] or not 0 < sets[-1][1] < math.inf:
                raise ValueError(f'data: {part!r} is not FOLDER or FOLDER:WEIGHT with a weight above 0')
        return sets

    def curriculum(self, codec=None):
        """stages -> [([Layout], steps or None, epochs or None)], for data of that codec. Raises ValueError
        for what is none."""
        stages = []
        for part in map(str.strip, self.stages.split(',')):
            names, _, length = part.partition(':')
            match = re.fullmatch(r'\s*(\d+\.?\d*)\s*(epochs?)?\s*', length)
            n, unit = match.groups() if match else ('0', None)
            if not float(n) or not (unit or n.isdigit()):
                raise ValueError(f'stages: {part!r} is not LAYOUT:STEPS, LAYOUT:5epochs or '
                                 'LAYOUT+LAYOUT:STEPS')
            settings = self.speech_chunk, self.text_chunk, self.learn_user_text
            layouts = [get_layout(name.strip(), *settings) for name in names.split('+')]
            layouts = [layout.bind(codec) for layout in layouts] if codec else layouts
            stages.append((layouts, None, float(n)) if unit else (layouts, int(n), None))
        return stages


class Stage(NamedTuple):
    """One stage of the curriculum: the steps of the run from first to last."""
    layouts: list
    first: int
    last: int
    loader: Mixture
    val_loader: Mixture
    counts: dict            # of an epoch, see Loader.measure
    epoch_steps: float      # optimiser steps in an epoch
    info: checkpoint.Info   # for the checkpoints written in it

    @property
    def name(self):
        return '+'.join(layout.name for layout in self.layouts)


class Run(NamedTuple):
    """What all steps of a run share."""
    cfg: Config
    place: Place
    model: Qwen2
    vocab: Vocabulary
    gradients: object       # Copies or Shards of parallel.py
    optimizer: torch.optim.Optimizer
    state: dict             # what state.json holds, see main
    n_step: int
    examiner: Examiner
    logger: Logger | None   # logger and listener: on the first process only
    listener: Listener | None
    saver: checkpoint.Saver
    guard: guard.Guard

    def print(self, text):
        if self.place.is_main:
            print(text, flush=True)


def main(cfg):
    """Trains as cfg says, returns the last evaluation. Raises ValueError where cfg and the files disagree,
    SystemExit after a signal (guard.py)."""
    place = join(cfg.device, cfg.dtype, cfg.timeout_sec)
    check_settings(cfg, place)
    torch.manual_seed(cfg.seed)
    train_data, val_data = open_data(cfg)
    # torchrun --max_restarts starts a process again that died: it goes on, whatever the command says
    is_restart = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0
    resume_from = checkpoint.find_state(cfg.out_dir, place) if cfg.resume or is_restart else None
    given, (cfg, model, vocab) = cfg, build_model(cfg, place, train_data[0], resume_from)
    facts = guard.check_nodes(given, place, train_data + val_data, vocab)
    state_bytes = check_memory(model.n_param(), place, cfg.shard)
    gradients = Shards(model, place) if cfg.shard else Copies(model, place, getattr(torch, cfg.reduce_dtype))
    model.wrap_blocks(checkpoints=cfg.checkpoint_blocks)
    if cfg.auto_batch:      # before compiling, which would take place for every size; compiled it takes less
        cfg = replace(cfg, batch_size=find_batch_size(model, cfg, place), auto_batch=False)
        facts['batch_size'] = cfg.batch_size
        gradients.zero()
    model.wrap_blocks(cfg.compile, cfg.checkpoint_blocks)
    stages = plan_stages(cfg, place, vocab, train_data, val_data)
    if cfg.show:
        if place.is_main:
            for stage in stages:
                show_rows(stage, vocab, cfg.text_weight, cfg.show)
        return {}
    optimizer = make_optimizer(model, cfg)
    examiner = Examiner(cfg, vocab, val_data, stages, place)
    state = dict(run_id=uuid4().hex, step=0, loader=None, best=None, best_by='loss', best_step=None,
                 sec_heard=0.0, train_sec=0.0, save_sec=0.0, meter=None, facts={})
    if resume_from:
        state |= checkpoint.load_state(resume_from, model, optimizer)
        if (note := guard.compare(state['facts'], facts, asdict(cfg), resume_from)) and place.is_main:
            print(note)
    state['facts'] = facts
    open_out_dir(cfg, place, resume_from, state)
    logger = Logger(cfg, state['step']) if place.is_main else None
    listener = Listener(cfg, vocab, val_data, place.dtype) if place.is_main else None
    saver = checkpoint.Saver()
    watch = guard.Guard(place, cfg.save_interval_sec, cfg.timeout_sec, saver)
    run = Run(cfg, place, model, vocab, gradients, optimizer, state, stages[-1].last, examiner, logger,
              listener, saver, watch)
    print_start(run, state_bytes, count_micro_steps(cfg, place))
    gc.freeze()     # Python's collector need not look through all that torch has imported, again and again
    metrics = {}
    with watch:
        for stage in stages:
            if state['step'] < stage.last:      # else it was done before the run was resumed
                print_stage(run, stage)
                metrics = train_stage(run, stage)
        saver.wait()
    if not metrics:
        run.print(f'{cfg.out_dir} had finished its {run.n_step} steps before')
    run.print(f'{cfg.out_dir}: {state["train_sec"]:.0f} s of training and {state["save_sec"]:.1f} s of '
              f'saving and listening, best val {state["best_by"]} {state["best"]:.3f}, at most '
              f'{peak_bytes(place.device) / 1e9:.1f} GB of memory a process')
    place.barrier()         # a process that ends closes its connections, while the first may still be saving
    if place.world_size > 1:
        dist.destroy_process_group()
    val = {f'val_{key}': value for key, value in metrics.items()}
    best = {f'best_val_{state["best_by"]}': state['best'], 'best_step': state['best_step']}
    return dict(step=state['step'], train_sec=state['train_sec'], **best, **val)


# ------------------------------------------------------------------------------------------------------------
# what a run starts from

def check_settings(cfg, place):
    """Raises ValueError for settings that this machine, or this number of processes, cannot run."""
    if cfg.auto_batch and place.device.type != 'cuda':
        raise ValueError('auto_batch tries how much the memory of a GPU takes, and there is none: '
                         'give batch_size')
    if cfg.shard and place.world_size == 1:
        raise ValueError('shard splits the model over the processes that torchrun starts, and there is one')
    if cfg.wandb and not importlib.util.find_spec('wandb'):
        raise ValueError(f'wandb={cfg.wandb}: wandb is not installed (pip install wandb)')
    n_row = 1 if cfg.auto_batch else cfg.batch_size
    micro_tokens = n_row * cfg.block_size * place.world_size
    if cfg.batch_tokens % micro_tokens:
        following = -(-cfg.batch_tokens // micro_tokens) * micro_tokens
        raise ValueError(f'batch_tokens {cfg.batch_tokens} is no multiple of batch_size {n_row} x block_size '
                         f'{cfg.block_size} x {place.world_size} processes = {micro_tokens}; '
                         f'the next is {following}')


def open_data(cfg):
    """-> [Dialogues] of train and [Dialogues] of val, one for each data set, all made with the same codec."""
    folders = [folder for folder, _ in cfg.mixture()]
    train_data, val_data = ([Dialogues(folder, split) for folder in folders] for split in ('train', 'val'))
    codec = train_data[0].codec
    for dialogues in train_data + val_data:
        if dialogues.codec != codec:
            raise ValueError(f'{dialogues.folder} was made with codec {dialogues.codec}, {folders[0]} with '
                             f'{codec}: they cannot be mixed')
    return train_data, val_data


def build_model(cfg, place, dialogues, resume_from):
    """Loads the model to resume or to start from, or makes one of random weights -> cfg with the model's
    sizes, the model on its device (with --shard=true on the CPU), its vocabulary."""
    device = 'cpu' if cfg.shard else place.device
    folder = resume_from or cfg.init_from
    if folder and not os.path.isdir(folder):
        raise ValueError(f'init_from: no folder {folder}; download the model, and give the folder with its '
                         'config.json')
    if folder and not resume_from:      # what is resumed was checked when it was found
        checkpoint.check(folder, tells=place.is_main)
    info = checkpoint.read_info(folder) if folder else None
    layouts = sum((layouts for layouts, *_ in cfg.curriculum()), info.layouts if info else [])
    control = dict.fromkeys(name for layout in layouts for name in layout.control)
    vocab = Vocabulary.load(folder or os.path.join(dialogues.folder, 'tokenizer'), dialogues.codec['n_codes'],
                            control)
    vectors = load_codec(dialogues.folder).vectors() if cfg.new_rows == 'codec' else None
    names = 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner'
    if not folder:
        sizes = {name: getattr(cfg, name) for name in names}
        model = Qwen2(ModelConfig(vocab.size, cfg.block_size, **sizes))
        if cfg.new_rows == 'codec':
            codes = range(vocab.code_start, vocab.code_start + vocab.n_codes)
            grow(model, vocab, codes, 'codec', cfg.new_rows_scale, vectors, cfg.seed)
        return cfg, model.to(device), vocab
    model, notes = Qwen2.from_pretrained(folder), []
    if cfg.block_size > model.config.block_size:
        notes.append(f'note: block_size={cfg.block_size}, {folder} has seen contexts of at most '
                     f'{model.config.block_size}')
    if info:
        checkpoint.check_vocabulary(folder, model, vocab)
        checkpoint.check_codec(folder, info.codec, dialogues)
    if vocab.untrained or not info:     # of a checkpoint of ours: the control tokens of another layout
        new = list(dict.fromkeys([*vocab.untrained, *range(model.config.vocab_size, vocab.size)]))
        notes.append(f'{folder}: {len(new)} ids are new of {vocab.size}, '
                     f'their rows start from {cfg.new_rows}')
        grow(model, vocab, new, cfg.new_rows, cfg.new_rows_scale, vectors, cfg.seed)
    for note in notes if place.is_main else ():
        print(note)
    model.config = replace(model.config, block_size=cfg.block_size)     # the context that it will know
    sizes = {name: getattr(model.config, name) for name in names}       # config.py will say them
    return replace(cfg, **sizes), model.to(device), vocab


def plan_stages(cfg, place, vocab, train_data, val_data):
    """-> [Stage]. All data is looked through, so that what doesn't fit is found before the first step."""
    shape = vocab, cfg.block_size, cfg.batch_size, cfg.seed, place.rank, place.world_size
    weights = [weight for _, weight in cfg.mixture()]
    padded = is_padded(cfg, place)
    before = checkpoint.read_info(cfg.init_from) if cfg.init_from else None
    trained = {layout.name: layout for layout in before.layouts} if before else {}
    stages, first = [], 0
    for layouts, n_step, n_epoch in cfg.curriculum(train_data[0].codec):
        loaders = [Loader(data, layouts, *shape, cfg.user_noise, padded) for data in train_data]
        val_loaders = [Loader(data, layouts, *shape, padded=padded) for data in val_data]
        loader, val_loader = Mixture(loaders, weights), Mixture(val_loaders, weights)
        counts = loader.measure()
        epoch_steps = counts['rows'] / (cfg.batch_tokens // cfg.block_size)
        last = first + (n_step or max(1, round(n_epoch * epoch_steps)))
        for layout in layouts:      # what is trained again comes last: checkpoints decode in the last layout
            trained.pop(layout.name, None)
            trained[layout.name] = layout
        codec = train_data[0].codec
        info = checkpoint.Info([*trained.values()], cfg.text_weight, vocab.code_start, vocab.n_codes, codec,
                               before.runs if before else [])
        stages.append(Stage(layouts, first, last, loader, val_loader, counts, epoch_steps, info))
        first = last
    return stages


def is_padded(cfg, place):
    """Do all batches need one shape, and all processes equally many? On a CPU they don't, unless it compiles
    or each batch needs the shards of all."""
    return place.device.type != 'cpu' or cfg.compile or cfg.shard


def make_optimizer(model, cfg):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]     # biases and norms are not pulled towards zero
    hidden = [p for p in model.model.layers.parameters() if p.dim() >= 2 and cfg.optimizer == 'muon']
    matrices = [p for p in matrices if not any(p is q for q in hidden)]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=others, weight_decay=0.0)]
    is_fused = matrices[0].device.type in ('cuda', 'cpu')
    adamw = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=is_fused)
    return WithMuon(hidden, adamw, cfg) if hidden else adamw


class WithMuon:
    """Muon for some matrices and AdamW for the rest, as one optimizer. Muon's steps are scaled to AdamW's, so
    one learning rate is right for both (arXiv:2502.16982, section 2.2)."""

    def __init__(self, matrices, adamw, cfg):
        self.both = torch.optim.Muon(matrices, lr=cfg.learning_rate, weight_decay=cfg.weight_decay,
                                     adjust_lr_fn='match_rms_adamw'), adamw
        self.state = self.both[0].state = adamw.state       # of each parameter, whoever moves it
        self.param_groups = [group for each in self.both for group in each.param_groups]
        self.defaults = {'fused': False}        # as a whole: Muon is not

    def step(self):
        for each in self.both:
            each.step()

    def zero_grad(self):
        for each in self.both:
            each.zero_grad()


def open_out_dir(cfg, place, resume_from, state):
    """Makes the folder of the run. A used one is moved aside, unless the run in it goes on."""
    is_used = os.path.exists(os.path.join(cfg.out_dir, 'log.jsonl'))
    if not resume_from and not is_used and glob(os.path.join(cfg.out_dir, '*')):
        raise ValueError(f'{cfg.out_dir} holds files that are no run of train.py: choose another --out_dir')
    place.barrier()         # all processes have read what they start from, which may lie in that folder
    if place.local_rank == 0:
        remove(cfg.out_dir + '.received')
    if place.is_main and not resume_from and is_used:
        print(f'{cfg.out_dir} held another run, moved to {checkpoint.move_aside(cfg.out_dir)}')
    place.barrier()
    # a state that is still there lies on a disk of this node, from when the first process of a run was here
    if not resume_from and place.local_rank == 0 and checkpoint.last_state(cfg.out_dir):
        print(f'{cfg.out_dir} held another run on this node, moved to {checkpoint.move_aside(cfg.out_dir)}')
    if not place.is_main:
        return
    if resume_from:
        checkpoint.publish_again(cfg.out_dir, state['best_step'])
    os.makedirs(cfg.out_dir, exist_ok=True)
    with whole(os.path.join(cfg.out_dir, 'config.py')) as part:
        config.save(cfg, part)


# ------------------------------------------------------------------------------------------------------------
# training

def train_stage(run, stage):
    """Trains to the end of a stage, evaluating and saving on the way. Returns the last evaluation."""
    cfg, place, model, state = run.cfg, run.place, run.model, run.state
    if state['step'] == stage.first:    # another layout: its losses do not compare with the last one's
        state.update(best=None, best_step=None)
    else:
        stage.loader.state = state['loader']
    batches = Prefetch(stage.loader, place.device)
    meter = Meter(batches, place.device)
    if state['meter']:
        meter.unpack(state['meter'], place.is_main)
    while state['step'] < stage.last:
        at = batches.state
        lr = get_lr(state['step'], run.n_step, cfg)
        for group in run.optimizer.param_groups:
            group['lr'] = lr
        n_learned, total_weight = 0, torch.zeros((), device=place.device)
        n_micro_step = count_micro_steps(cfg, place)
        for i in range(n_micro_step):
            batch = batches.next_batch()
            weights = token_weights(batch, cfg.text_weight)
            with place.autocast():      # -> scalar, (N)
                total, losses = model(batch.idx, batch.pos, batch.doc, batch.learn, batch.targets, weights)
            run.gradients.backward(total, is_last=i == n_micro_step - 1)
            n_learned += len(losses)
            # NaN, for all processes, where total is not finite though its gradient may be
            total_weight += weights.sum() + 0 * total.detach()
            meter.add(batch, losses)
        grad_norm = run.gradients.finish(total_weight, cfg.grad_clip)
        guard.step_unless(meter.end_step(grad_norm), run.optimizer)
        run.gradients.zero()
        state['step'] += 1

        is_evaluated = state['step'] % cfg.eval_interval == 0 or state['step'] == stage.last
        if is_evaluated or state['step'] % cfg.log_interval == 0:
            log_training(run, stage, meter, lr, float(grad_norm), batch, n_learned)
            if meter.n_in_a_row >= cfg.max_skipped:
                batches.close()
                raise ValueError(guard.describe_skipped(run, stage, int(meter.n_in_a_row), at))
        if is_evaluated:
            metrics = evaluate(run, stage)
            log_evaluation(run, stage, metrics)
            meter.restart()
        number, is_due = run.guard.ask()
        if is_evaluated or is_due or number:
            start = time.time()
            state.update(loader=batches.state, meter=meter.pack(place))
            save_and_listen(run, stage, is_evaluated and not number)
            state['save_sec'] += time.time() - start
            meter.start += time.time() - start
        if number:
            batches.close()
            run.saver.wait()
            run.guard.stop(number, state['step'], cfg.out_dir)
    batches.close()
    return metrics


def get_lr(step, n_step, cfg):
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, n_step - cfg.warmup_steps)
    above = cfg.learning_rate - cfg.min_learning_rate
    return cfg.min_learning_rate + 0.5 * (1 + math.cos(math.pi * progress)) * above


def count_micro_steps(cfg, place):
    return cfg.batch_tokens // (cfg.batch_size * cfg.block_size * place.world_size)


def evaluate(run, stage):
    """The loss on all of val, of which each process takes a part, as by_stream has it; and what the examiner
    measures"""
    sums, sec = loss_sums(run.model, stage.val_loader, run.place.device, run.place.autocast())
    return by_stream(*over_processes(run.place, sums, sec)) | run.examiner.measure(run, stage)


def save_and_listen(run, stage, listens):
    """On the first process: saves the state to go on from and, if this evaluation was the best, the run's
    model. Then the model answers some dialogues of val, while others wait at their next all-reduce."""
    cfg, state = run.cfg, run.state
    snapshot = checkpoint.take_snapshot(run.model, run.optimizer, run.place)
    run.guard.saved()
    if not run.place.is_main:
        return
    codec_folder = os.path.join(cfg.mixture()[0][0], 'codec')
    run.saver.save(cfg.out_dir, snapshot, run.vocab, stage.info, codec_folder, state)
    n_evaluation = -(-state['step'] // cfg.eval_interval)
    if not listens or (n_evaluation % cfg.listen_interval and state['step'] < run.n_step):
        return
    model = snapshot.on(run.place.device, run.place.dtype) if cfg.shard else run.model
    heard = run.listener.hear(state['step'], model, stage.layouts)
    run.logger.log_heard(state['step'], heard)
    run.listener.report(state['step'], heard)


if __name__ == '__main__':
    with guard.one_sentence():
        main(config.load(Config, sys.argv[1:]))
