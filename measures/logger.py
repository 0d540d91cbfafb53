"""
Writes a run's figures: lines in out_dir/log.jsonl, and, if the settings say so, tensorboard and wandb. Prints
what a stage goes through.
"""
import json
import os
from dataclasses import asdict

from common.files import whole


class Logger:
    """log(kind='val', step=300, loss=…) writes figures, log_heard conversations. step: where the run starts,
    or goes on; lines of log.jsonl after it are deleted first."""

    def __init__(self, cfg, step):
        self.path = os.path.join(cfg.out_dir, 'log.jsonl')
        lines = []
        if os.path.exists(self.path):
            with open(self.path) as file:       # the last line may be half written
                lines = [line for line in file if line.startswith('{') and line.endswith('}\n')]
        with whole(self.path) as part, open(part, 'w') as file:
            file.writelines(line for line in lines if json.loads(line)['step'] <= step)
        self.wandb = open_wandb(cfg) if cfg.wandb else None
        self.tensorboard = open_tensorboard(cfg.out_dir, step) if cfg.tensorboard else None

    def log(self, **values):
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
