"""What several tests need: a small tokenizer, a small data set, the command line."""
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow as pa
import pytest
import torch
from forks import Forks

from data.dialogues import Dialogues
from data.made_up import make_codec

torch.set_num_threads(1)         # tiny models: a second thread only waits

ROOT = pathlib.Path(__file__).parent.parent
os.environ['XDG_CONFIG_HOME'] = tempfile.mkdtemp()      # codec/s3.py remembers commands there


def pytest_addoption(parser):
    parser.addoption('--regen', action='store_true', help='write tests/golden anew')


@pytest.fixture
def regen(request):
    return request.config.getoption('--regen')


@pytest.fixture(scope='session')
def forks():
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope='session')
def run(forks):
    """run('flatten.py', '--help') -> the finished process. With fails=True it has to end with code 1 and no
    traceback. n_process: as many of them as torchrun would start -> the first one. launcher: what starts it
    in place of a fork (forks.py)."""
    def run(script, *arguments, fails=False, n_process=1, launcher=None, input=''):
        words, env = [str(ROOT / script), *map(str, arguments)], dict(os.environ, PYTHONPATH=str(ROOT))
        if launcher:
            results = [subprocess.run([*launcher, *words], capture_output=True, text=True, cwd=ROOT,
                                      env=dict(env, OMP_NUM_THREADS='1'), input=input)]
        else:
            places = ranks(n_process) if n_process > 1 else [{}]
            results = forks.run(*((words, env | place, ROOT) for place in places), input=input)
        for result in results:
            assert (result.returncode == 1) if fails else (
                result.returncode == 0), f'{result.returncode}\n{result.stdout}\n{result.stderr}'
            assert not fails or 'Traceback' not in result.stderr, result.stderr
        return results[0]
    return run


def ranks(n, n_node=1):
    """-> the environment of each of n processes, as torchrun gives it"""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]))
    return [dict(address, RANK=str(i), WORLD_SIZE=str(n), LOCAL_RANK=str(i % (n // n_node)),
                 LOCAL_WORLD_SIZE=str(n // n_node)) for i in range(n)]


TEXTS = [
    'what is the capital of france?', 'the capital of france is paris.', 'yes', 'ok', 'mhm', 'stop', 'hi?']


@pytest.fixture(scope='session')
def small_tokenizer(tmp_path_factory):
    """A folder with tokenizer.json: a byte-level BPE cut as Qwen2's is, trained on a few sentences."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    from vocabulary import QWEN2_PATTERN
    folder = tmp_path_factory.mktemp('tokenizer')
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_PATTERN), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(str(folder / 'tokenizer.json'))
    return folder


CODEC = dict(name='toy', rate_hz=25.0, n_codes=32, sample_rate=16000, fingerprint='0123456789abcdef')


def make_dialogues(n, seed=0, n_frame=(40, 120)):
    """Dialogues a model can learn: the user's codes are all k, the assistant answers with k's text and code k
    + 16."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        length, k = int(rng.integers(*n_frame)), int(rng.integers(1, 7))
        end = int(rng.integers(10, length - 15))
        user, assistant = np.zeros(length, int), np.zeros(length, int)
        user[:end], assistant[end:end + 15] = k, k + 16
        yield dict(
            id=f'd{i}', user=user.tolist(), assistant=assistant.tolist(), turns=[
                dict(role='user', start=0, end=end, text=TEXTS[k]),
                dict(role='assistant', start=end, end=end + 15, text=TEXTS[k])])


@pytest.fixture(scope='session')
def small_data(tmp_path_factory, small_tokenizer):
    """A data folder as a prepare.py leaves it."""
    import shutil

    from data.dialogues import save_dialogues
    folder = tmp_path_factory.mktemp('data')
    shutil.copytree(small_tokenizer, folder / 'tokenizer')
    for split, n in (('train', 60), ('val', 10), ('test', 10)):
        save_dialogues(str(folder / f'{split}.arrow'), make_dialogues(n, seed=len(split)), CODEC)
    return folder


@pytest.fixture(scope='session')
def small_codec():
    return make_codec()


@pytest.fixture(scope='session')
def small_run(tmp_path_factory, small_tokenizer, small_codec):
    """(data folder, checkpoint folder): a model of a few seconds' training, with its codec, as a user would
    have it."""
    import shutil

    import train
    from data.dialogues import save_dialogues
    data = tmp_path_factory.mktemp('spoken')
    shutil.copytree(small_tokenizer, data / 'tokenizer')
    small_codec.save(data / 'codec')
    for split, n in (('train', 40), ('val', 5), ('test', 5)):
        save_dialogues(str(data / f'{split}.arrow'), make_dialogues(n, seed=len(split)),
                       small_codec.describe())
    out = tmp_path_factory.mktemp('run') / 'run'
    train.main(
        train.Config(data=str(data), out_dir=str(out), stages='duplex3:30', n_layer=2, n_head=2, n_kv_head=1,
                     n_embd=32, n_inner=64, block_size=256, batch_size=4, batch_tokens=1024, eval_interval=30,
                     learning_rate=3e-3, warmup_steps=5, device='cpu', dtype='float32', tensorboard=False,
                     n_listen=0))
    return data, out


@pytest.fixture(scope='session')
def codec_folder(small_codec, tmp_path_factory):
    folder = tmp_path_factory.mktemp('mel')
    small_codec.save(folder)
    return folder


@pytest.fixture
def prepare(monkeypatch, tmp_path, codec_folder):
    """prepare(module, path, '--role=user') -> (id -> record, id -> why it was skipped)"""
    def prepare(module, path, *settings, codec=codec_folder):
        out = tmp_path / f'out{len(list(tmp_path.glob("out*")))}'
        monkeypatch.setattr(sys, 'argv', [
            'prepare.py', str(path), f'--out={out}', f'--codec={codec}', *settings])
        module.main()
        records = []
        for split in ('train', 'val', 'test'):
            data = Dialogues(str(out), split)       # which gives turns without words
            stored = pa.ipc.open_file(str(out / f'{split}.arrow')).read_all()['turns'].to_pylist()
            records += [dict(data[i], words=[turn['words'] for turn in stored[i]]) for i in range(len(data))]
        with open(out / 'skipped.jsonl', encoding='utf-8') as file:
            skipped = [json.loads(line) for line in file]
        by_id = {record['id']: record for record in records}
        return by_id, {entry['id']: entry['reason'] for entry in skipped}
    return prepare
