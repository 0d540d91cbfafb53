"""A run's figures: a line each in out_dir/log.jsonl, and in tensorboard and wandb where they are wanted."""
import json
import os
from dataclasses import asdict

from common.files import whole


class Logger:
    """log(kind='val', step=300, loss=…) for figures, log_heard for conversations. Lines after `step`, from
    which a run is resumed, are taken out of log.jsonl first."""

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
        scalars = {
            f'{values["kind"]}/{key}': value for key, value in values.items() if isinstance(value, float)}
        if self.tensorboard:
            for key, value in scalars.items():
                self.tensorboard.add_scalar(key, value, values['step'])
        if self.wandb:
            self.wandb.log(dict(scalars, step=values['step']))

    def log_heard(self, step, conversations):
        """Conversations of measures/turns.py, to be listened to."""
        for each in conversations:
            name, wave = f'heard/{each["id"]}', each['wave']
            turns = [
                f'{turn["start"] / each["rate_hz"]:.2f} s {turn["role"]}: {turn["text"]}'
                for turn in each['turns']]
            text = '\n\n'.join(turns)
            if self.tensorboard:
                self.tensorboard.add_text(name, text, step)
            if self.tensorboard and wave is not None:       # it plays one channel: both voices in it
                self.tensorboard.add_audio(name, wave.mean(1), step, each['sample_rate'])
            if self.wandb and wave is not None:
                import wandb
                self.wandb.log({name: wandb.Audio(wave, each['sample_rate'], caption=text), 'step': step})


def open_tensorboard(out_dir, step):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        return None     # an extra: pip install tensorboard
    return SummaryWriter(out_dir, purge_step=step)


def open_wandb(cfg):
    """A run of wandb, which a resumed run of ours continues."""
    import wandb
    path = os.path.join(cfg.out_dir, 'wandb.id')
    known = None
    if os.path.exists(path):
        with open(path) as file:
            known = file.read()
    try:
        run = wandb.init(project=cfg.wandb, name=os.path.basename(cfg.out_dir), id=known, resume='allow',
                         dir=cfg.out_dir, config=asdict(cfg), reinit='finish_previous')
    except wandb.Error as error:
        raise ValueError(f'wandb={cfg.wandb} cannot start: {error}')
    with open(path, 'w') as file:
        file.write(run.id)
    # its own counter only goes up, a resumed run goes back to its last state
    run.define_metric('*', step_metric='step')
    return run
