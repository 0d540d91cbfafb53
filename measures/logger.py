"""
Writes a run's figures: lines in out_dir/log.jsonl, and, if the settings say so, tensorboard and wandb. Prints
what a stage goes through.
"""
import json
import math
import os
import time
from dataclasses import asdict

from common.device import peak_flops
from common.files import whole
from measures.best import is_better
from measures.losses import by_stream, format_losses, over_processes


class Logger:
    """log(kind='val', step=300, loss=…) writes figures, log_heard conversations. step: where the run starts,
    or goes on; lines of log.jsonl after it are deleted first."""

    def __init__(self, cfg, step):
        self.path = os.path.join(cfg.out_dir, 'log.jsonl')
        lines = [json.dumps(row) + '\n' for row in read_log(self.path) if row['step'] <= step]
        with whole(self.path) as part, open(part, 'w') as file:
            file.writelines(lines)
        self.wandb = open_wandb(cfg) if cfg.wandb else None
        self.tensorboard = open_tensorboard(cfg.out_dir, step) if cfg.tensorboard else None

    def log(self, **values):
        values = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in values.items()}     # JSON has no NaN
        with open(self.path, 'a') as file:
            file.write(json.dumps(values) + '\n')
        kind = values['kind']
        scalars = {f'{kind}/{key}': value for key, value in values.items() if isinstance(value, float)}
        if self.tensorboard:
            for key, value in scalars.items():
                self.tensorboard.add_scalar(key, value, values['step'])
        if self.wandb:
            self.wandb.log(dict(scalars, step=values['step']))

    def log_heard(self, step, conversations):
        """The sound and text of conversations (measures/turns.py), for tensorboard and wandb."""
        for talk in conversations:
            name, wave = f'heard/{talk["id"]}', talk['wave']
            lines = [f'{turn["start"] / talk["rate_hz"]:.2f} s {turn["role"]}: {turn["text"]}'
                     for turn in talk['turns']]
            text = '\n\n'.join(lines)
            if self.tensorboard:
                self.tensorboard.add_text(name, text, step)
            if self.tensorboard and wave is not None:       # it plays one channel, so both voices are mixed
                self.tensorboard.add_audio(name, wave.mean(1), step, talk['sample_rate'])
            if self.wandb and wave is not None:
                import wandb
                self.wandb.log({name: wandb.Audio(wave, talk['sample_rate'], caption=text), 'step': step})


def read_log(path):
    """-> [row] of a log.jsonl. Lines that are none of ours are left out: half written ones, before a kill,
    and what somebody else put there."""
    rows = []
    for line in open_lines(path):
        try:
            row = json.loads(line)
            rows += [row] if isinstance(row['step'], int) and isinstance(row['kind'], str) else []
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return rows


def open_lines(path):
    if not os.path.exists(path):
        return []
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.readlines()


def open_tensorboard(out_dir, step):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        return None     # it is optional: pip install tensorboard
    return SummaryWriter(out_dir, purge_step=step)


def open_wandb(cfg):
    """-> a wandb run. Its id is kept in out_dir/wandb.id, so that a resumed training continues the same run.
    Raises ValueError if wandb cannot start."""
    import wandb
    path = os.path.join(cfg.out_dir, 'wandb.id')
    run_id = None
    if os.path.exists(path):
        with open(path) as file:
            run_id = file.read()
    try:
        run = wandb.init(project=cfg.wandb, name=os.path.basename(cfg.out_dir), id=run_id, resume='allow',
                         dir=cfg.out_dir, config=asdict(cfg), reinit='finish_previous')
    except wandb.Error as error:
        raise ValueError(f'wandb={cfg.wandb} cannot start: {error}')
    with open(path, 'w') as file:
        file.write(run.id)
    # wandb's own counter only goes up, but a resumed training goes back to its last checkpoint
    run.define_metric('*', step_metric='step')
    return run


def print_stage(run, stage):
    """What a stage of train.py goes through, and notes on settings that make no sense together."""
    cfg, c, n_step = run.cfg, stage.counts, stage.last - stage.first
    n_dialogue = sum(len(loader.dialogues) for loader in stage.loader.loaders)
    padding = 1 - c['tokens'] / (c['rows'] * cfg.block_size + c['documents'])
    run.print(f'stage {stage.name}, steps {stage.first} to {stage.last}: an epoch has {c["dialogues"]} of '
              f'{n_dialogue} dialogues, {c["documents"]} documents, {c["sec"] / 3600:.2f} h, '
              f'{c["tokens"]} tokens, {c["learned"] / c["tokens"]:.0%} learned, '
              + (f'{padding:.1%} padding, ' if stage.loader.loaders[0].padded else 'no padding, ')
              + f'{c["too_long"]} documents too long, {c["text_dropped"]} text tokens dropped; '
              f'it takes {stage.epoch_steps:.3g} steps, the stage {n_step / stage.epoch_steps:.3g} epochs')
    if n_step < 100 and stage.epoch_steps < 10:
        run.print(f'note: {n_step} steps in all, as a step takes {cfg.batch_tokens} tokens and an epoch has '
                  f'{c["tokens"]}: a model hardly moves in so few; a --batch_tokens of '
                  f'{c["tokens"] / 100:.2g} would make 100 an epoch')
    if n_step > 50 * stage.epoch_steps:
        run.print(f'note: the stage goes through its data {n_step / stage.epoch_steps:.0f} times: '
                  'it will know it by heart')
    if cfg.warmup_steps > run.n_step / 2:
        run.print(f'note: warmup_steps={cfg.warmup_steps} of {run.n_step} steps: the learning rate hardly '
                  f'gets to {cfg.learning_rate}')
    n_document = c['too_long'] + c['documents']
    if c['too_long'] > 0.05 * n_document:
        run.print(f'note: {c["too_long"]} of {n_document} documents are longer than '
                  f'block_size={cfg.block_size} and left out: raise it')


# ------------------------------------------------------------------------------------------------------------
# what is printed and logged

def log_training(run, stage, meter, lr, grad_norm, batch, n_learned):
    """Prints and logs the steps since the last line."""
    cfg, state = run.cfg, run.state
    sums, sec = over_processes(run.place, meter.sums, meter.sec)    # waits for the device; other steps don't
    losses = by_stream(sums, sec)
    n_skipped = int(meter.n_skipped)
    elapsed = time.time() - meter.start
    tokens_per_sec = meter.n_step * cfg.batch_tokens / elapsed
    state['sec_heard'] += sec
    state['train_sec'] += elapsed
    mfu = utilisation(run, batch, n_learned, tokens_per_sec)
    run.print(f'step {state["step"]:>6}/{run.n_step} | {format_losses(losses)} | lr {lr:.1e} | '
              f'norm {grad_norm:6.2f} | {1e3 * elapsed / meter.n_step:6.0f} ms | '
              f'{tokens_per_sec / 1e3:6.1f}k tok/s | '
              + (f'mfu {mfu:4.0%} | ' if mfu else '') + f'{state["sec_heard"] / 3600:6.2f} h heard'
              + (f' | {n_skipped} steps skipped' if n_skipped else ''))
    if run.logger:
        loader_wait = (meter.batches.wait_sec - meter.waited_sec) / elapsed
        run.logger.log(kind='train', step=state['step'], stage=stage.name, lr=lr, grad_norm=grad_norm,
                       tokens_per_sec=tokens_per_sec, mfu=mfu, hours_heard=state['sec_heard'] / 3600,
                       loader_wait=loader_wait, skipped=n_skipped, **losses)
    meter.restart()


def log_evaluation(run, stage, metrics):
    """Prints and logs an evaluation, and notes in the state whether it is the best so far."""
    state, name = run.state, run.examiner.figure(stage)
    is_best = is_better(name, metrics, state)
    shares = {'answers right': metrics.get('answer_accuracy'), 'turns well': metrics.get('well_taken_rate')}
    run.print(f'val  {state["step"]:>6}/{run.n_step} | {format_losses(metrics)} | '
              + ''.join(f'{key} {100 * value:.1f} % | ' for key, value in shares.items() if value is not None)
              + ('best so far' if is_best else f'best {name} was {state["best"]:.3f}'))
    if is_best:
        state.update(best=metrics[name], best_by=name, best_loss=metrics['loss'], best_step=state['step'])
    if run.logger:
        run.logger.log(kind='val', step=state['step'], stage=stage.name, train_sec=state['train_sec'],
                       **metrics)


def utilisation(run, batch, n_learned, tokens_per_sec):
    """MFU: the FLOPs that these tokens require, over the most that the GPU can do. None for other devices."""
    device, world_size = run.place.device, run.place.world_size
    _, most = peak_flops(device)
    if not most:
        return None
    mean_keys = float((batch.pos + 1).double().mean())
    flops = run.model.flops_per_token(n_learned * world_size / run.cfg.batch_tokens, mean_keys)
    return tokens_per_sec * flops / (most * world_size)


def print_start(run, state_bytes, n_micro_step):
    cfg, place = run.cfg, run.place
    run.print(f'{run.model.n_param() / 1e6:.1f} M parameters, {run.vocab.size} ids, {place.device}, '
              f'{str(place.dtype).removeprefix("torch.")}, {place.world_size} process(es) with '
              f'{state_bytes / 1e9:.2g} GB of weights, gradients and moments each; '
              f'{n_micro_step} micro-steps of {cfg.batch_size} x {cfg.block_size} x '
              f'{place.world_size} = {cfg.batch_tokens} tokens a step, {run.n_step} steps')
