"""
Trains again and again under faults, until each run has ended, and compares it with one that nobody disturbed:
weights, moments and log, bit for bit. runs/soak.sh calls it, with many faults; test_faults.py with few.

    SIGKILL         at any moment, from the start of Python on; with n_process processes all of them at once
    SIGTERM         likewise; once it trains it has to save, and to end with 143
    damage          in any file of the newest state: a flipped bit, cut short, emptied, deleted
    full disk       a small tmpfs, with so much room left that saving fails (only root can mount one)

Each process has to end in time, without a traceback; each state that was not damaged on purpose has to be
whole.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint import states
from common.manifest import find_damage, list_files

ROOT = Path(__file__).parent.parent
MAX_SEC = 300       # that a process may take: more is a hang


@dataclass
class Count:
    """What docs/promises.md reports."""
    run: int = 0
    kill: int = 0
    term: int = 0
    saved_by_term: int = 0
    damage: int = 0
    passed_over: int = 0
    full: int = 0
    lost: int = 0
    traceback: int = 0
    hang: int = 0
    half_written: int = 0
    faults: list = field(default_factory=list)      # what went wrong, in words

    def blame(self, what, words):
        setattr(self, what, getattr(self, what) + 1)
        self.faults.append(f'{what}: {words}')


@contextmanager
def small_disk(folder, n_byte):
    """-> is there a tmpfs of that size at folder"""
    folder.mkdir(parents=True)
    command = ['mount', '-t', 'tmpfs', '-o', f'size={n_byte}', 'tmpfs', folder]
    is_mounted = os.geteuid() == 0 and subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(['umount', folder])


def start(settings, n_process):
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n_process}']
    command = [sys.executable, *(launcher if n_process > 1 else []), str(ROOT / 'train.py'), *settings]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))


def finish(process, count, number=None, after_sec=MAX_SEC):
    """Waits for a process, at most after_sec; then sends it the signal -> (its code, what it printed)"""
    try:
        out, errors = process.communicate(timeout=after_sec)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, number or signal.SIGKILL)
        if number is None:
            count.blame('hang', f'{after_sec} s')
        try:
            out, errors = process.communicate(timeout=MAX_SEC)
        except subprocess.TimeoutExpired:
            count.blame('hang', f'{MAX_SEC} s after {number}')
            os.killpg(process.pid, signal.SIGKILL)
            out, errors = process.communicate()
    if 'Traceback' in errors and f'File "{ROOT / "train.py"}"' in errors:      # torchrun has one of its own
        count.blame('traceback', errors[-3000:])
    return process.returncode, out + errors


def damage_newest(folder, rng):
    """-> what was done to a file of the newest state, None where there is no other to fall back on"""
    found = list(states(folder).values())
    if len(found) < 2:
        return None
    name = rng.choice([*list_files(found[0]), 'manifest.json'])
    path = Path(found[0]) / name
    content = bytearray(path.read_bytes())
    match rng.choice(('bit', 'cut', 'empty', 'gone')) if name != 'manifest.json' else 'empty':
        case 'bit' if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case 'cut':
            del content[len(content) // 2:]
        case 'empty' | 'bit':
            content.clear()
        case 'gone':
            path.unlink()
            return f'{found[0]}/{name} deleted'
    path.write_bytes(content)
    return f'{found[0]}/{name} damaged'


def check_folder(out_dir, damaged, count):
    """What is there is whole, but for what was damaged on purpose and may be there still."""
    for folder in states(out_dir).values():
        found = find_damage(folder)
        if found != [] and not (damaged and damaged.startswith(folder)):
            count.blame('half_written', f'{folder}: {found}')


def one_run(settings, out_dir, plan, rng, count, n_process, within_sec, disk):
    """Trains out_dir to its end, with the faults of plan, a list of names, as long as there are some. A fault
    that came too late goes back to plan, for the next run -> within_sec, in which the next should come."""
    settings = [*settings, f'--out_dir={out_dir}', '--resume=true']
    damaged, is_noticed, filler = None, False, disk and disk / 'filler'
    while True:
        fault = plan.pop() if plan else None
        if fault == 'damage':
            done = damage_newest(out_dir, rng)
            if done:
                damaged, is_noticed, count.damage = done, False, count.damage + 1
            else:
                plan.insert(len(plan) // 2, fault)
                within_sec *= 1.3       # else it would never come so far
            fault = 'kill'
        if fault == 'full' and filler:
            room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            with open(filler, 'wb') as file:
                file.write(bytes(max(0, room - rng.randrange(200_000))))
        process = start(settings, n_process)
        numbers = dict(kill=signal.SIGKILL, term=signal.SIGTERM)
        after_sec = rng.uniform(0, within_sec) if fault in numbers else MAX_SEC
        code, said = finish(process, count, numbers.get(fault), after_sec)
        if damaged and not is_noticed and 'is damaged (' in said:
            count.passed_over, is_noticed = count.passed_over + 1, True
        if fault == 'full' and filler:
            filler.unlink()
            if code and 'No space left' in said:
                count.full += 1
            elif code:
                count.blame('lost', f'full disk: {code}: {said[-1000:]}')
        elif fault == 'term' and 'SIGTERM: ' in said:
            count.saved_by_term += code == 143 or n_process > 1
        elif fault is None and code:
            count.blame('lost', f'{code}: {said[-1000:]}')
            return within_sec
        if fault in numbers and code:
            setattr(count, fault, getattr(count, fault) + 1)
        elif fault in numbers:
            plan.append(fault)
            within_sec *= 0.8       # the machine has less to do than when the undisturbed run was timed
        check_folder(out_dir, damaged, count)
        if code == 0:
            return within_sec


def compare(undisturbed, out_dir, count):
    """Are all weights, moments, and figures of the log the same, bit for bit?"""
    newest = [next(iter(states(folder).values())) for folder in (undisturbed, out_dir)]
    for name in ('model.safetensors', 'optimizer.safetensors'):
        if len({(Path(folder) / name).read_bytes() for folder in newest}) > 1:
            count.blame('lost', f'{name} of {newest} differ')
    if len({(Path(folder) / 'model.safetensors').read_bytes() for folder in (undisturbed, out_dir)}) > 1:
        count.blame('lost', 'the published weights differ')
    timed = 'tokens_per_sec', 'loader_wait', 'train_sec'
    logs = [[{key: value for key, value in json.loads(line).items() if key not in timed}
             for line in open(Path(folder) / 'log.jsonl')] for folder in (undisturbed, out_dir)]
    if logs[0] != logs[1]:
        count.blame('lost', 'log.jsonl differs')


def soak(settings, out, plan, seed=0, n_process=1):
    """settings: of train.py, without out_dir; plan: faults in their order -> Count"""
    count, rng, plan = Count(), random.Random(seed), list(plan)
    undisturbed = out / 'undisturbed'
    began = time.monotonic()
    code, said = finish(start([*settings, f'--out_dir={undisturbed}'], n_process), count)
    within_sec = (time.monotonic() - began) / 2
    assert code == 0, said
    n_byte = sum(path.stat().st_size for path in undisturbed.rglob('*') if path.is_file())
    print(f'undisturbed: {2 * within_sec:.0f} s; {len(plan)} faults to come', flush=True)
    with small_disk(out / 'disk', 8 * n_byte) as is_small:
        if not is_small:
            print('note: no small disk can be mounted here, so none will be full')
        while plan or not count.run:
            out_dir, n_before = str(out / 'disk' / f'run{count.run}'), len(plan)
            within_sec = one_run(settings, out_dir, plan, rng, count, n_process, within_sec,
                                 is_small and out / 'disk')
            compare(undisturbed, out_dir, count)
            subprocess.run(['rm', '-r', out_dir])
            count.run += 1
            print(f'run {count.run} ended, after {n_before - len(plan)} faults: {count}', flush=True)
            if count.lost:
                break
    return count


def main():
    out, n_kill, n_other, n_process, *settings = sys.argv[1:]
    plan = ['kill'] * int(n_kill) + ['term', 'damage', 'full'] * int(n_other)
    random.Random(1).shuffle(plan)
    count = soak(settings, Path(out), plan, n_process=int(n_process))
    print(f'{count.kill} SIGKILLs, {count.term} SIGTERMs ({count.saved_by_term} of them while it trained: '
          f'saved), {count.damage} damaged newest states ({count.passed_over} passed over for the one '
          f'before), {count.full} full disks; {count.run} runs ended; lost {count.lost}, tracebacks '
          f'{count.traceback}, hangs {count.hang}, half-written states {count.half_written}')
    raise SystemExit('\n'.join(count.faults) or None)


if __name__ == '__main__':
    main()
