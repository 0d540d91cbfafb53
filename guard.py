"""
What keeps a run from losing much: between two steps it is asked whether to save, or to stop; what must end it
ends it in one sentence.

    SIGTERM, SIGINT (Ctrl-C), SIGUSR1   the step, or evaluation, at hand is finished and saved; then the run
                                        ends with 128 + the signal's number: 143, 130, 138
    save_interval_sec                   so often it is saved at least
    a process dies, or stands still     the others wait timeout_sec at most, and say which one it was
    a loss or gradient is not finite    the step is skipped by all processes alike; after max_skipped of them
                                        in a row the run stops, and names the dialogues
"""
import errno
import os
import re
import signal
import threading
import time
import zlib
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from checkpoint import last_state
from common.files import some
from common.origin import git

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
# of the machine, which no code can mend: full, over quota, read-only, forbidden, broken
FAULTS = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG
ROLL_CALL_SEC = 20      # for processes to report, when one is missing


class Guard:
    """
    with Guard(...) as guard: each process of the run calls guard.ask() after each step, all together.

    In the block signals only leave a note, and an error of the connection to other processes becomes a
    ValueError that names the missing ones.
    """

    def __init__(self, place, save_interval_sec, timeout_sec, saver):
        self.place, self.save_interval_sec, self.saver, self.signal = place, save_interval_sec, saver, 0
        self.saved_at, self.handlers, self.group = time.monotonic(), {}, None
        if place.world_size > 1 and place.device.type != 'cpu':     # so that no GPU is waited for
            self.group = dist.new_group(backend='gloo', timeout=timedelta(seconds=timeout_sec))

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():   # only there Python lets us
            self.handlers = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def note(self, number, frame):
        self.signal = self.signal or number     # torchrun passes on what the terminal has sent already

    def __exit__(self, kind, error, trace):
        lost = describe_lost(error)     # before torchrun's SIGTERM may end this one, too
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if lost:
            raise ValueError(lost) from None

    def ask(self):
        """-> the number of the signal that ends the run, or 0; and is it time to save? The same on all
        processes, though the clock is the first one's, and a signal may have reached only one."""
        is_free = self.place.is_main and not self.saver.is_busy
        if is_free:
            self.saver.wait()       # raises, if the last one could not be written
        is_due = is_free and time.monotonic() - self.saved_at >= self.save_interval_sec
        answer = torch.tensor([self.signal, is_due])
        if self.place.world_size > 1:
            dist.all_reduce(answer, dist.ReduceOp.MAX, group=self.group)
        number, is_due = answer.tolist()
        return number, bool(is_due)

    def saved(self):
        self.saved_at = time.monotonic()

    def stop(self, number, step, out_dir):
        """Ends the process, after a signal and all that is to be saved."""
        if self.place.is_main:
            print(f'{signal.Signals(number).name}: {out_dir} is saved at step {step}, --resume=true goes on',
                  flush=True)
        if self.place.world_size > 1:
            self.place.barrier()        # a process that ends closes its connections
            dist.destroy_process_group()
        raise SystemExit(128 + number)


def describe_lost(error):
    """What a process says whose connection to another has broken, or that has waited for it too long; None
    for any other error."""
    rank, world_size = (int(os.environ.get(name, default))
                        for name, default in (('RANK', 0), ('WORLD_SIZE', 1)))
    words = '(?i)gloo|nccl|timed out|timeout|connection|by peer'
    is_lost = isinstance(error, RuntimeError) and re.search(words, str(error))
    if world_size == 1 or not is_lost:
        return None
    why = ' '.join(str(error).split('] ', 1)[-1].split('. ')[0].split())
    try:
        missing = call_roll(rank, world_size)
    except RuntimeError:
        return f'process {rank}: {why}; nor does the node of process 0 answer'
    who = f'no sign of life from process {some(missing)}' if missing else 'yet all processes are alive'
    return f'process {rank}: {why}; {who}'


def call_roll(rank, world_size):
    """-> the numbers of the processes that do not report within ROLL_CALL_SEC. They do so where torchrun has
    introduced them to each other."""
    store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False,
                          timeout=timedelta(seconds=ROLL_CALL_SEC))
    start = os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)
    keys = [f'nanoduplex/{start}/{n}' for n in range(world_size)]
    store.set(keys[rank], 'here')
    until = time.monotonic() + ROLL_CALL_SEC
    while not store.check(keys) and time.monotonic() < until:
        time.sleep(0.1)
    return [n for n, key in enumerate(keys) if not store.check([key])]


@contextmanager
def one_sentence():
    """For scripts: what a user or the machine did wrong ends in a sentence, without a traceback."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(str(error))
    except OSError as error:
        if error.errno not in FAULTS:
            raise
        raise SystemExit(f'{error.filename or "a file"}: {error.strerror}; mend that, and go on with '
                         '--resume=true from the last state that was saved')
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT)
    except RuntimeError as error:
        if lost := describe_lost(error):
            raise SystemExit(lost)
        raise


# ------------------------------------------------------------------------------------------------------------
# steps that nothing can be learned from

def step_unless(is_bad, optimizer):
    """AdamW's step, unless is_bad, float32 [], is 1. Its fused kernel looks itself, so nobody waits."""
    if optimizer.defaults['fused']:
        optimizer.found_inf = is_bad
        optimizer.step()
    elif not is_bad:
        optimizer.step()


def describe_skipped(run, stage, n_skipped, at):
    """What a run says that stops after n_skipped bad steps; at: the loader's place before the last of them,
    which nobody else uses any more. All dialogues of that step are in log.jsonl."""
    cfg, state = run.cfg, run.state
    run.saver.wait()
    stage.loader.state = at
    rows = stage.loader.next_rows(cfg.batch_tokens // cfg.block_size)
    names = list(dict.fromkeys(part.dialogues[piece.i]['id'] for part, row, _ in rows for piece in row))
    if run.logger:
        run.logger.log(kind='skipped', step=state['step'], stage=stage.name, dialogues=names)
    return (f'{n_skipped} steps in a row were skipped up to step {state["step"]}, as loss or gradient was '
            f'not finite; the last was of dialogues {some(names)}: mend or leave out what is wrong with '
            f'them, or lower learning_rate, and go on from {last_state(cfg.out_dir) or "the start"} with '
            '--resume=true')


# ------------------------------------------------------------------------------------------------------------
# is what goes on the same run

# settings that change nothing in the weights; the data is compared itself
FREE = {'data', 'out_dir', 'resume', 'save_interval_sec', 'log_interval', 'n_listen', 'listen_interval',
        'tensorboard', 'wandb', 'show', 'max_skipped', 'timeout_sec', 'auto_batch'}
SIZES = 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner'


def check_nodes(cfg, place, data, vocab):
    """-> {name: what a run depends on: settings, data, text tokens, …}. Raises ValueError, on all processes,
    where that of one node differs from that of another."""
    facts = asdict(cfg) | {'torch': torch.__version__, 'ids': vocab.size}
    for dialogues in data:
        checksum = zlib.crc32(np.concatenate(dialogues.n_frame).tobytes())
        name = f'{dialogues.folder}, {dialogues.split}'
        facts[f'{name}: dialogues'], facts[f'{name}: checksum of lengths'] = len(dialogues), checksum
    text = ' '.join(turn['text'] for turn in data[0][0]['turns']) if len(data[0]) else ''
    facts[f'ids of {text!r}'] = vocab.encode(text)
    place.check_equal(facts)
    return facts | dict(device=place.device.type, dtype=str(place.dtype), processes=place.world_size,
                        weights=[weight for _, weight in cfg.mixture()],
                        commit=git('describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'))


def compare(before, now, sizes, folder):
    """
    before, now: what the run in folder depended on, and depends on (check_nodes) -> a note of what has
    changed, or None. sizes: those of its model. Raises ValueError where it cannot go on at all: its place in
    the data is none in other data, and a model keeps its sizes.
    """
    def lengths(facts):
        return [value for name, value in facts.items() if name.endswith(('dialogues', 'lengths'))]
    if not before:      # as it was before November 26, 2026
        return None
    if lengths(before) != lengths(now):
        raise ValueError(f'{folder} is in the midst of other data than {now["data"]} (the numbers or lengths '
                         f'of dialogues differ): start a new run from it, --init_from={folder}')
    changed = [name for name in before if ': ' not in name and name not in FREE
               and name in now and before[name] != now[name]]
    for name in SIZES:
        if name in changed and now[name] != sizes[name]:
            raise ValueError(f'{name} is {now[name]}, but {sizes[name]} in {folder}: a model keeps its sizes')
    if 'optimizer' in changed:
        raise ValueError(f'optimizer is {now["optimizer"]}, but {before["optimizer"]} in {folder}: the '
                         'moments of one are of no use to the other')
    changed = [f'{name} {before[name]} -> {now[name]}' for name in changed if name not in SIZES]
    return (f'note: changed since {folder}: {", ".join(changed)}; the run may not end, bit for bit, as it '
            'would have without' if changed else None)
