"""
Faults, put in on purpose: killed, told to stop, starved of disk, lied to by a flipped bit. What is damaged is
named, what was stopped goes on, and a run ends bit for bit where it would have ended undisturbed.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import soak
import torch
from conftest import CODEC, ROOT, make_dialogues
from safetensors.torch import load_file

import checkpoint
import evaluate
import sample
import train
from checkpoint import last_state, load_checkpoint, states
from common.manifest import find_damage, list_files, write_manifest
from data.dialogues import save_dialogues

TORCHRUN = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


@pytest.fixture
def toy(small_data, tmp_path):
    return train.Config(data=str(small_data), out_dir=str(tmp_path / 'run'), stages='duplex3:10', n_layer=1,
                        n_head=2, n_kv_head=1, n_embd=32, n_inner=64, block_size=128, batch_size=2,
                        batch_tokens=512, eval_interval=5, log_interval=5, warmup_steps=2, learning_rate=3e-3,
                        device='cpu', dtype='float32', tensorboard=False, n_listen=0)


def arguments(cfg):
    return [f'--{name}={getattr(cfg, name)}' for name in cfg.__dataclass_fields__]


def equal_runs(*cfgs):
    """Weights, moments and random numbers, bit for bit."""
    names = 'model.safetensors', 'optimizer.safetensors'
    a, b = ({f'{name}/{key}': x for name in names for key, x in load_file(
        Path(last_state(cfg.out_dir)) / name).items()} for cfg in cfgs)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log(cfg):
    lines = [json.loads(line) for line in open(Path(cfg.out_dir) / 'log.jsonl')]
    timed = 'tokens_per_sec', 'loader_wait', 'train_sec'
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def flip(path, at=None):
    """One bit, in the middle."""
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    Path(path).write_bytes(content)


DAMAGES = {'not as it was written': flip, 'missing': os.remove,
           'empty': lambda path: Path(path).write_bytes(b'')}


# ------------------------------------------------------------------------------------------------------------
# damaged checkpoints

def test_every_damage_to_every_file_is_named(small_run, tmp_path):
    """Weights, moments, state, tokenizer, codec: a flipped bit, an empty file, one that is gone, one that is
    cut short. In the manifest itself each of its bits, but for those that no reader looks at."""
    source, folder = last_state(small_run[1]), tmp_path / 'step'
    names = [name for name in list_files(source) if name != 'README.md']     # which people edit
    assert {'codec/codec.json', 'merges.txt', 'optimizer.safetensors', 'state.json'} < set(names)
    shutil.copytree(source, folder)
    assert find_damage(folder) == []
    for name in names:
        content = (folder / name).read_bytes()
        for what, damage in [*DAMAGES.items(), ('not as it was written', lambda path: os.truncate(path, 1))]:
            damage(folder / name)
            assert find_damage(folder) == [f'{name} is {what}']
            (folder / name).write_bytes(content)
    manifest = (folder / 'manifest.json').read_bytes()
    for at in range(0, len(manifest), 7):
        flip(folder / 'manifest.json', at)
        assert find_damage(folder) != []
        (folder / 'manifest.json').write_bytes(manifest)
    (folder / 'notes.txt').write_text('a file that is no part of it')
    assert find_damage(folder) == []


def test_manifest_is_made_of_what_is_there(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/.hidden').write_text('x')
    (tmp_path / 'empty').write_text('')
    write_manifest(tmp_path)
    assert json.loads((tmp_path / 'manifest.json').read_text())['empty'] == [0, (
        'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855')]     # FIPS 180-4, of no bytes
    assert find_damage(tmp_path) == [] and find_damage(tmp_path / 'a') is None
    (tmp_path / 'a/.hidden').unlink()
    os.mkfifo(tmp_path / 'a/.hidden')       # which would be waited for
    assert find_damage(tmp_path) == ['a/.hidden is missing']


def test_nothing_reads_a_damaged_checkpoint(toy, small_run, tmp_path, capsys):
    """sample.py, evaluate.py, --init_from; the sentence names the file, and a folder that is whole."""
    data, source = small_run
    out = tmp_path / 'out'
    shutil.copytree(source, out)
    flip(out / 'merges.txt')
    message = re.escape(f'{out} is damaged: merges.txt is not as it was written; {last_state(out)} is whole')
    for call in (lambda: sample.main(sample.Config(checkpoint=str(out), data=str(data))),
                 lambda: evaluate.main(evaluate.Config(checkpoint=str(out), data=str(data))),
                 lambda: train.main(replace(toy, data=str(data), init_from=str(out)))):
        with pytest.raises(ValueError, match=message):
            call()
    load_checkpoint(last_state(out))
    assert 'manifest' not in capsys.readouterr().out
    (out / 'manifest.json').unlink()    # as there was none before, and by somebody who changes a file
    load_checkpoint(out)
    assert f'note: {out} has no manifest.json' in capsys.readouterr().out


@pytest.mark.parametrize('name, damage', [
    ('model.safetensors', flip), ('optimizer.safetensors', flip), ('state.json', flip),
    ('config.json', os.remove), ('optimizer.safetensors', lambda path: os.truncate(path, 100)),
    ('manifest.json', DAMAGES['empty'])])
def test_a_damaged_state_is_passed_over(toy, tmp_path, capsys, name, damage):
    """From the one before, and the run ends as it would have. What was published is mended, too."""
    whole = replace(toy, out_dir=str(tmp_path / 'whole'))
    train.main(whole)
    train.main(replace(toy, stages='duplex3:10'))
    newest, before = states(toy.out_dir).values()
    damage(Path(newest) / name)
    flip(Path(toy.out_dir) / 'model.safetensors')
    capsys.readouterr()
    train.main(replace(toy, resume=True))
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f'{newest} is damaged ({name} is ') and said.endswith(f'): going on from {before}')
    assert equal_runs(whole, toy) and log(whole) == log(toy)
    assert [find_damage(folder) for folder in (toy.out_dir, *states(toy.out_dir).values())] == [[]] * 3


def test_a_published_model_is_mended(toy):
    train.main(toy)
    for name, damage in (('model.safetensors', flip), ('config.json', os.remove),
                         ('manifest.json', os.remove)):
        damage(Path(toy.out_dir) / name)
        train.main(replace(toy, resume=True))
        assert find_damage(toy.out_dir) == []


def test_where_nothing_is_whole_all_files_are_named(toy):
    train.main(toy)
    for folder, name in zip(states(toy.out_dir).values(), ('state.json', 'model.safetensors')):
        flip(Path(folder) / name)
    with pytest.raises(ValueError) as error:
        train.main(replace(toy, resume=True))
    assert re.search('step-000010 is damaged .state.json is .*; .*step-000005 is damaged .model.safetensors '
                     'is .*: there is nothing whole to go on from', str(error.value))
    for folder in states(toy.out_dir).values():
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match='run holds a model, but no step-… folder: there is nothing whole'):
        train.main(replace(toy, resume=True))
    assert os.path.exists(toy.out_dir) and not os.path.exists(toy.out_dir + '.1')


def test_a_state_without_a_manifest_is_checked_as_far_as_can_be(toy, capsys):
    """As it was written before November 26, 2026: a note; a file that is gone or cut short in a sentence."""
    train.main(toy)
    newest, before = map(Path, states(toy.out_dir).values())
    for folder in (newest, before):
        (folder / 'manifest.json').unlink()
    capsys.readouterr()
    train.main(replace(toy, resume=True))
    assert f'note: {newest} has no manifest.json' in capsys.readouterr().out
    os.truncate(newest / 'optimizer.safetensors', 100)
    with pytest.raises(ValueError, match='optimizer.safetensors cannot be read'):
        train.main(replace(toy, resume=True))
    (newest / 'optimizer.safetensors').unlink()
    train.main(replace(toy, resume=True))
    assert 'step-000010 is damaged (optimizer.safetensors is missing): going' in capsys.readouterr().out


def test_the_last_two_and_the_best_are_kept(toy, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.2, 2.1])

    def fake(sums, sec, real=train.by_stream):
        return dict(real(sums, sec), loss=next(losses))
    monkeypatch.setattr(train, 'by_stream', fake)
    train.main(replace(toy, stages='duplex3:25'))
    assert list(states(toy.out_dir)) == [25, 20, 10]
    assert (Path(toy.out_dir) / 'model.safetensors').read_bytes() == (
        Path(toy.out_dir) / 'step-000010/model.safetensors').read_bytes()


def test_what_is_no_state_and_no_log_line_is_no_matter(toy, tmp_path):
    train.main(replace(toy, stages='duplex3:10'))
    out = Path(toy.out_dir)
    (out / 'step-notes.txt').write_text('mine')
    (out / 'step-99').write_text('a file')
    (out / 'step-000007.part').mkdir()      # of a process that was killed while it saved
    first, *lines = (out / 'log.jsonl').read_bytes().splitlines()
    others = [b'{"a line": "without a step"}', b'{"step": "9"}', b'[3]', b'{"kind": "", "step": 5', b'\xff']
    (out / 'log.jsonl').write_bytes(b'\n'.join([first, *others, *lines]))
    train.main(replace(toy, stages='duplex3:15', resume=True))
    assert [row['step'] for row in log(toy)] == [5, 5, 10, 10, 15, 15]
    assert not list(out.glob('*.part')) and (out / 'step-notes.txt').exists() and (out / 'step-99').exists()


# ------------------------------------------------------------------------------------------------------------
# told to stop, killed, out of disk

@pytest.fixture
def at_step(monkeypatch):
    """at_step(7, call): the run calls that right before step 8"""
    def at_step(which, call, real=train.get_lr):
        monkeypatch.setattr(train, 'get_lr', lambda step, *rest: (
            step == which and call(), real(step, *rest))[1])
    return at_step


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_saves_and_ends(toy, tmp_path, at_step, capsys, number, code):
    """In the midst of an interval; the log goes on as if nothing had been."""
    whole, before = replace(toy, out_dir=str(tmp_path / 'whole')), signal.getsignal(number)
    train.main(whole)
    at_step(7, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        train.main(toy)
    assert ended.value.code == code and Path(last_state(toy.out_dir)).name == 'step-000008'
    assert f'{number.name}: {toy.out_dir} is saved at step 8' in capsys.readouterr().out
    assert signal.getsignal(number) == before
    at_step(-1, None)
    train.main(replace(toy, resume=True))
    assert equal_runs(whole, toy) and log(whole) == log(toy)


def test_it_is_saved_by_the_clock(toy, tmp_path, at_step):
    """Each step here, as far as the last one is written; killed in the midst, it goes on from there."""
    whole = replace(toy, out_dir=str(tmp_path / 'whole'), eval_interval=10)
    often = replace(whole, out_dir=toy.out_dir, save_interval_sec=1e-9)
    train.main(whole)

    def die():
        time.sleep(0.3)     # until it is written
        raise KeyboardInterrupt
    at_step(7, die)
    with pytest.raises(KeyboardInterrupt):
        train.main(often)
    assert 1 <= next(iter(states(toy.out_dir))) <= 7
    assert not (Path(toy.out_dir) / 'model.safetensors').exists()       # it was not evaluated yet
    at_step(-1, None)
    train.main(replace(often, resume=True))
    assert equal_runs(whole, often) and log(whole) == log(often)


def starved(tmp_path, mount):
    """A small disk, tmp_path/disk, or a note that there can be none."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', mount, 'tmpfs', disk]).returncode:
        pytest.skip('only root can mount a small disk')
    return disk


@pytest.mark.slow
@pytest.mark.parametrize('fault', ['full', 'read-only'])
def test_a_disk_that_takes_no_more(toy, tmp_path, run, fault):
    """A tmpfs that has room for the first state, or that becomes read-only: one sentence, and that state is
    whole. With room again the run ends as it would have."""
    whole = replace(toy, out_dir=str(tmp_path / 'whole'), stages='duplex3:300', eval_interval=100, n_embd=128)
    train.main(whole)
    n_byte = sum(path.stat().st_size for path in Path(last_state(whole.out_dir)).rglob('*'))
    disk = starved(tmp_path, f'size={int(1.6 * n_byte) if fault == "full" else 10 * n_byte}')
    try:
        cfg = replace(whole, out_dir=str(disk / 'run'))
        process = subprocess.Popen([sys.executable, ROOT / 'train.py', *arguments(cfg)], cwd=ROOT, text=True,
                                   stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                                   env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)))
        while fault == 'read-only' and process.poll() is None:
            if states(cfg.out_dir):
                subprocess.run(['mount', '-o', 'remount,ro', disk])     # it may be writing: then again
            time.sleep(0.01)
        errors = process.communicate()[1]
        assert process.returncode == 1 and 'Traceback' not in errors, errors
        assert ('No space left' if fault == 'full' else 'Read-only file system') in errors.splitlines()[-1]
        subprocess.run(['mount', '-o', f'remount,rw,size={10 * n_byte}', disk], check=True)
        assert find_damage(last_state(cfg.out_dir)) == []
        train.main(replace(cfg, resume=True))
        assert equal_runs(whole, cfg)
    finally:
        subprocess.run(['umount', disk])


# ------------------------------------------------------------------------------------------------------------
# what cannot be learned from

@pytest.fixture
def bad_steps(monkeypatch):
    """bad_steps({3, 4}): the losses of steps 4 and 5 are not numbers"""
    def bad_steps(which):
        step, get_lr, token_weights = [0], train.get_lr, train.token_weights
        monkeypatch.setattr(train, 'get_lr', lambda at, *rest: (
            step.__setitem__(0, at), get_lr(at, *rest))[1])
        monkeypatch.setattr(train, 'token_weights', lambda *rest: token_weights(*rest) * (
            float('nan') if step[0] in which else 1.0))
    return bad_steps


def test_a_step_that_is_not_finite_is_skipped(toy, bad_steps, capsys):
    """Nothing of it is in the weights, the moments, or the losses of the log; and it is counted."""
    bad_steps({3, 4, 6})
    saved = {}

    def keep(self, out_dir, snapshot, *rest):
        saved[rest[-1]['step']] = {name: x.clone() for name, x in snapshot.moments.items()} | {
            name: x.clone() for name, x in snapshot.model.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Saver, 'save', keep)
        train.main(replace(toy, save_interval_sec=1e-9))

    def same(a, b):
        return all(torch.equal(saved[a][name], saved[b][name]) for name in saved[a])
    assert [same(step, step - 1) for step in range(2, 11)] == [step in (4, 5, 7) for step in range(2, 11)]
    assert [line['skipped'] for line in log(toy) if line['kind'] == 'train'] == [2, 3]
    assert all(5 < line['loss'] < 7 for line in log(toy))
    assert '| 3 steps skipped' in capsys.readouterr().out


@pytest.mark.slow
def test_all_processes_skip_what_one_of_them_cannot_learn(toy, tmp_path, run):
    """Only the second one's rows of step 4 are bad; the first one skips the step, too."""
    script = tmp_path / 'bad.py'
    script.write_text('''
import os, sys, config, train
step = [0]
def get_lr(at, *rest, real=train.get_lr):
    step[0] = at
    return real(at, *rest)
def token_weights(*rest, real=train.token_weights):
    return real(*rest) * (float('nan') if step[0] == 3 and os.environ['RANK'] == '1' else 1.0)
train.get_lr, train.token_weights = get_lr, token_weights
train.main(config.load(train.Config, sys.argv[1:]))
''')
    run(script, *arguments(replace(toy, batch_size=1)), n_process=2)
    moments = load_file(Path(last_state(toy.out_dir)) / 'optimizer.safetensors')
    assert {float(x) for name, x in moments.items() if name.endswith('.step')} == {9.0}
    assert [line['skipped'] for line in log(toy) if line['kind'] == 'train'] == [1, 1]


def test_too_many_in_a_row_name_their_dialogues(toy, bad_steps):
    """It stops at the last good state, and what is logged is a strict JSON."""
    bad_steps(range(6, 100))
    with pytest.raises(ValueError) as error:
        train.main(replace(toy, stages='duplex3:30', log_interval=2, eval_interval=6, max_skipped=4))
    said = re.fullmatch(r'4 steps in a row were skipped up to step 10, as loss or gradient was not finite; '
                        r'the last was of dialogues (d\d+, .*): mend or leave out .* go on from '
                        '.*step-000006 with --resume=true', str(error.value))
    last = log(toy)[-1]
    assert last['kind'] == 'skipped' and last['step'] == 10 and ', '.join(last['dialogues'][:3]) in said[1]
    assert 'NaN' not in (Path(toy.out_dir) / 'log.jsonl').read_text()


# ------------------------------------------------------------------------------------------------------------
# a run that goes on under other circumstances

def test_what_changed_is_announced_or_refused(toy, small_data, small_tokenizer, tmp_path, capsys):
    train.main(replace(toy, stages='duplex3:5'))
    resumed = replace(toy, stages='duplex3:5', resume=True)
    capsys.readouterr()
    train.main(replace(resumed, log_interval=3, save_interval_sec=7.0))     # which change no weight
    assert 'note' not in capsys.readouterr().out
    train.main(replace(resumed, stages='duplex3:6', learning_rate=1e-3, seed=7))
    assert re.search(r"note: changed since \S*step-000005: stages duplex3:5 -> duplex3:6, learning_rate "
                     "0.003 -> 0.001, seed 1337 -> 7; the run may not end, bit", capsys.readouterr().out)
    with pytest.raises(ValueError, match='n_layer is 3, but 1 in .*step-000006: a model keeps its sizes'):
        train.main(replace(resumed, n_layer=3))
    moved, other = tmp_path / 'moved', tmp_path / 'other'
    shutil.copytree(small_data, moved)      # the same data elsewhere is the same data
    train.main(replace(resumed, stages='duplex3:6', learning_rate=1e-3, seed=7, data=str(moved)))
    assert 'note' not in capsys.readouterr().out
    shutil.copytree(small_data, other)
    save_dialogues(str(other / 'train.arrow'), make_dialogues(61), CODEC)
    with pytest.raises(ValueError, match='step-000006 is in the midst of other data than .*other'):
        train.main(replace(resumed, data=str(other)))


@pytest.mark.slow
def test_other_numbers_of_processes_read_the_same(toy, tmp_path, run):
    """5 steps on one and 5 on two, and the reverse: the same place in the data after each, and the weights
    of one process up to the order of additions."""
    whole = replace(toy, out_dir=str(tmp_path / 'whole'), batch_size=1)
    train.main(whole)
    for name, first, n in (('up', [], (1, 2)), ('down', TORCHRUN, (2, 1))):
        cfg = replace(whole, out_dir=str(tmp_path / name), resume=True)
        begun = replace(cfg, stages='duplex3:10', max_skipped=9)
        script = tmp_path / 'stops.py'
        script.write_text('''
import os, signal, sys, config, guard, train
def get_lr(step, *rest, real=train.get_lr):
    if step == 6 and os.environ.get('RANK', '0') == os.environ['STOPPED']:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(step, *rest)
train.get_lr = get_lr
with guard.one_sentence():
    train.main(config.load(train.Config, sys.argv[1:]))
''')
        environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT),
                           STOPPED='1' if first else '0')       # the signal reaches the second one only
        subprocess.run([*(first or [sys.executable]), script, *arguments(begun)], env=environment, cwd=ROOT)
        assert next(iter(states(cfg.out_dir))) == 7
        printed = run('train.py', *arguments(cfg), n_process=n[1]).stdout
        assert f'step-000007: processes {n[0]} -> {n[1]}; the run' in printed
        folders = [Path(last_state(each.out_dir)) for each in (whole, cfg)]
        ends = [json.loads((folder / 'state.json').read_text()) for folder in folders]
        assert ends[0]['loader'] == ends[1]['loader']
        assert ends[0]['sec_heard'] == pytest.approx(ends[1]['sec_heard'])
        ours, theirs = (load_file(folder / 'model.safetensors') for folder in folders)
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_lost_processes_are_named_and_the_job_goes_on(toy, tmp_path):
    """The first of two processes is killed before step 8, the second stands still before step 9. The other
    one names it: at once, and a roll call after timeout_sec; torchrun ends the stopped one after a wait of
    30 s, here 10. It starts both again each time, and they end bit for bit where two undisturbed ones end."""
    script = tmp_path / 'lost.py'
    script.write_text(f'''
import os, signal, sys, config, guard, train
def get_lr(step, *rest, real=train.get_lr):
    marker = '{tmp_path}/done-' + str(step)     # each fault once, in whichever start it comes to that
    number = {{(7, '0'): signal.SIGKILL, (8, '1'): signal.SIGSTOP}}.get((step, os.environ['RANK']))
    if number and '--out_dir={tmp_path / 'lost'}' in sys.argv and not os.path.exists(marker):
        open(marker, 'w').close()
        os.kill(os.getpid(), number)
    return real(step, *rest)
train.get_lr = get_lr
guard.ROLL_CALL_SEC = 8      # 20, for machines with more to do
with guard.one_sentence():
    train.main(config.load(train.Config, sys.argv[1:]))
''')
    torchrun = (sys.executable, '-c', 'from torch.distributed.elastic.multiprocessing.api import PContext\n'
                'PContext.close.__defaults__ = None, 10\n'
                'from torch.distributed.run import main; main()', *TORCHRUN[3:], '--max_restarts=5')
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    whole, lost = (replace(toy, batch_size=1, timeout_sec=12.0, out_dir=str(tmp_path / name))
                   for name in ('whole', 'lost'))
    took_sec = []
    for cfg in (whole, lost):
        start = time.monotonic()
        result = subprocess.run([*torchrun, script, *arguments(cfg)], env=environment, cwd=ROOT,
                                capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        took_sec.append(time.monotonic() - start)
    for rank, why in enumerate(('by peer', '(Timed out|timeout caused)')):
        assert re.search(f'^process {1 - rank}: .*{why}.*; no sign of life from process {rank}$',
                         result.stderr, re.M), result.stderr
    assert took_sec[1] < 12 + 2 * 8 + 10 + 6 * took_sec[0]       # timeout, roll calls, torchrun; three starts
    assert equal_runs(whole, lost)


# ------------------------------------------------------------------------------------------------------------
# all of it, again and again

@pytest.mark.slow
def test_soak_in_short(toy, small_run, tmp_path):
    """runs/soak.sh with some of its faults: each run ends as if there had been none."""
    cfg = replace(toy, data=str(small_run[0]), stages='asr+tts:100, duplex3:200', eval_interval=50,
                  save_interval_sec=0.2, n_listen=1)
    settings = [setting for setting in arguments(cfg) if not setting.startswith(('--out_dir', '--resume'))]
    plan = ['kill', 'full', 'damage', 'kill', 'term']
    count = soak.soak(settings, tmp_path, plan)
    assert not count.faults and count.run and count.kill > 1, count
