"""
A checkpoint with the real Qwen2 BPE opens in transformers 5 and 4.57: logits and ids are equal, and each id
has a name. Cards say how a model came to be, and their lines run; data sets go to the Hub and come back.
"""
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT

import card
import hub
from common.manifest import find_damage, read_manifest
from data.dialogues import Dialogues
from data.made_up import hum
from flatten import get_layout
from model import ModelConfig, Qwen2
from vocabulary import Vocabulary

QWEN2 = ROOT.parent / 'shared' / 'data' / 'qwen2_tokenizer'
TEXTS = ['The capital of France is Paris.', '你好，今天天气怎么样？', 'e\u0301 12,345 \n\n <|eot|> <|s_7|> ',
         "I'LL don't\tstop", '🙂🎈 ｆｕｌｌ']
OPEN = """
import json, sys, numpy, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
ask = json.load(open(out + '/ask.json'))
with torch.no_grad():
    numpy.save(out + '/logits.npy', model(torch.tensor(ask['idx'])).logits.float().numpy())
answer = dict(version=transformers.__version__, n=len(tokenizer),
              names=tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))),
              ids=[tokenizer(text, split_special_tokens=True)['input_ids'] for text in ask['texts']],
              control=[tokenizer.convert_tokens_to_ids(name) for name in ask['control']])
json.dump(answer, open(out + '/answer.json', 'w'))
"""


@pytest.fixture(scope='module')
def transformers_4():
    """A folder with transformers 4.57, its hub and its tokenizers; all else is the environment's."""
    folder = ROOT / '.venv' / 'transformers-4.57'
    if not (folder / 'transformers').is_dir():
        wanted = ['transformers==4.57.6', 'huggingface_hub==0.36.0', 'tokenizers==0.22.1']
        install = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', f'--target={folder}.part']
        pip = subprocess.run([*install, *wanted], capture_output=True, text=True)
        if pip.returncode and not os.environ.get('CI'):
            pytest.skip(f'transformers 4.57 cannot be installed here: {pip.stderr[-300:]}')
        assert pip.returncode == 0, pip.stderr
        os.rename(f'{folder}.part', folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('tie', [True, False])
@pytest.mark.parametrize('version', ['5', '4.57'])
def test_opens_in_transformers(version, tie, tmp_path, small_tokenizer, request):
    vocab = Vocabulary.load(QWEN2 if QWEN2.is_dir() else small_tokenizer, n_codes=4096)
    torch.manual_seed(0)
    config = ModelConfig(vocab.size, 512, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_inner=48,
                         tie_embeddings=tie)
    model = Qwen2(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    folder = tmp_path / 'export'
    model.save_pretrained(folder, extra={'nanoduplex': dict(code_start=vocab.code_start, n_codes=4096)})
    vocab.save(folder)
    idx = torch.randint(vocab.size, (2, 60))
    ask = dict(idx=idx.tolist(), texts=TEXTS, control=list(vocab.control))
    (tmp_path / 'ask.json').write_text(json.dumps(ask))
    path = str(request.getfixturevalue('transformers_4')) if version == '4.57' else ''
    env = dict(os.environ, PYTHONPATH=path, HF_HUB_OFFLINE='1')
    done = subprocess.run([sys.executable, '-c', OPEN, str(folder), str(tmp_path)], env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads((tmp_path / 'answer.json').read_text())
    assert answer['version'].startswith(version + '.')
    assert answer['n'] == vocab.size
    assert len(set(answer['names'])) == vocab.size and None not in answer['names']
    assert answer['ids'] == [vocab.encode(text) for text in TEXTS]
    assert answer['control'] == list(vocab.control.values())
    with torch.no_grad():
        np.testing.assert_allclose(np.load(tmp_path / 'logits.npy'), model(idx).numpy(), atol=1e-4, rtol=0)
    shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------------
# cards, and data for the Hub's viewer

def card_of(folder):
    """-> (the YAML in front, the text)"""
    import yaml
    _, head, text = (folder / 'README.md').read_text(encoding='utf-8').split('---\n', 2)
    return yaml.safe_load(head), text


def test_a_run_writes_its_card(small_run):
    """In the folder of the run and of its state; the manifest does not name it, so it may be edited."""
    data, run = small_run
    for folder in (run, run / 'step-000030'):
        head, text = card_of(folder)
        assert head == dict(license='unknown', library_name='nanoduplex', pipeline_tag='audio-to-audio',
                            tags=card.TAGS)
        # 30 steps of 1,024 tokens
        assert '30,720 tokens' in text and f'`{data}, train`: 40 dialogues' in text and 'duplex3:30' in text
        assert 'The best step of the run by loss' in text and 'Not measured yet' in text
        assert 'README.md' not in read_manifest(folder)
    assert re.search(r'nanoduplex at commit [0-9a-f]{40}|commit unknown', text)


@pytest.fixture
def exported(small_run, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(small_run[1], run)
    (run / 'evaluation').mkdir()
    measured = dict(answer_accuracy=0.975, response_ms=126.4, n_turn=9, origin=dict(command='evaluate.py'))
    (run / 'evaluation/metrics.json').write_text(json.dumps(measured))
    cfg = hub.Config(checkpoint=str(run), out=str(tmp_path / 'hub/mine'), license='mit', language='en, zh',
                     base_model='Qwen/Qwen2-0.5B', datasets='me/talks')
    hub.main(cfg)
    return cfg


def test_what_is_uploaded(exported):
    """What others need, whole, and nothing of the run's states."""
    out = Path(exported.out)
    head, text = card_of(out)
    assert (head['license'], head['language'], head['base_model'], head['datasets']) == (
        'mit', ['en', 'zh'], 'Qwen/Qwen2-0.5B', ['me/talks'])
    assert '# mine\n' in text and '| answers that are right | 97.5 % |' in text and '| 126 |' in text
    names = {path.relative_to(out).parts[0] for path in out.rglob('*') if path.is_file()}
    assert {'model.safetensors', 'config.json', 'codec', 'manifest.json', 'README.md'} <= names
    assert not {name for name in names if name.startswith('step-')} | names & {'log.jsonl', 'state.json'}
    assert find_damage(out) == []
    with pytest.raises(ValueError, match='is there already'):
        hub.main(exported)


def test_the_cards_lines_run(exported, tmp_path, monkeypatch, capsys):
    """As they stand there, FOLDER aside: a recording in, a stereo answer out."""
    soundfile = pytest.importorskip('soundfile')
    lines = re.search('```python\n(.*?)```', card_of(Path(exported.out))[1], re.S)[1]
    monkeypatch.chdir(tmp_path)
    soundfile.write('question.wav', hum(150, 1.0), 16000)
    exec(lines.replace('FOLDER', exported.out), {})
    wave, rate = soundfile.read('answer.wav')
    assert rate == 16000 and wave.shape == (7 * 16000, 2) and capsys.readouterr().out.startswith('[')


def test_what_cannot_be_exported_is_refused(small_run, exported, tmp_path):
    ours = dict(checkpoint=exported.checkpoint, out=str(tmp_path / 'other'))
    with pytest.raises(ValueError, match='license: under which'):
        hub.main(hub.Config(**ours))
    os.utime(os.path.join(exported.checkpoint, 'evaluation/metrics.json'), (1, 1))
    with pytest.raises(ValueError, match='older than the weights'):
        hub.main(hub.Config(**ours, license='mit'))
    with pytest.raises(ValueError, match='neither Arrow nor parquet'):
        hub.main(hub.Config(data=str(tmp_path), out=str(tmp_path / 'other'), license='mit'))
    with pytest.raises(ValueError, match='one of them'):
        hub.Config(out='x')
    assert not (tmp_path / 'other').exists()


def test_data_for_the_viewer_and_back(small_run, tmp_path):
    """Parquet whose schema names its features, a card with a configuration for each; and from the parquet
    the same records again, each checked."""
    soundfile = pytest.importorskip('soundfile')
    data, out, again = str(small_run[0]), tmp_path / 'hub', tmp_path / 'again'
    hub.main(hub.Config(data=data, out=str(out), license='cc-by-4.0', n_heard=2))
    head, _ = card_of(out)
    codes, heard = head['configs']
    splits = [(each['split'], each['path']) for each in codes['data_files']]
    assert codes['config_name'] == 'codes' and codes['default'] and splits == [
        ('train', 'codes/train-*.parquet'), ('validation', 'codes/val-*.parquet'),
        ('test', 'codes/test-*.parquet')]
    assert all(list(out.glob(each['path'])) for each in codes['data_files'] + heard['data_files'])
    schema = pq.read_schema(next(out.glob('codes/val-*')))
    described = json.loads(schema.metadata[b'huggingface'])['info']['features']
    assert list(described) == schema.names and described['user'] == [dict(dtype='uint16', _type='Value')]
    assert described['turns'][0]['text'] == dict(dtype='string', _type='Value')
    table = pq.read_table(out / 'heard/test.parquet')
    described = json.loads(table.schema.metadata[b'huggingface'])['info']['features']
    assert described['audio'] == dict(_type='Audio')
    row = table.to_pylist()[1]
    wave, rate = soundfile.read(io.BytesIO(row['audio']['bytes']))
    reference = Dialogues(data, 'test')[1]
    assert table.num_rows == 2 and rate == 16000 and wave.shape == (640 * len(reference['user']), 2)
    assert reference['turns'][0]['text'] in row['said']
    if importlib.util.find_spec('datasets'):
        import datasets
        val = datasets.load_dataset(str(out), 'codes', split='validation', cache_dir=str(tmp_path / 'c'))
        assert val[0]['id'] == Dialogues(data, 'val')[0]['id']

    hub.main(hub.Config(data=str(out), out=str(again)))
    for split in hub.SPLITS:
        ours, theirs = Dialogues(data, split), Dialogues(str(again), split)
        assert ours.codec == theirs.codec and len(ours) == len(theirs)
        for i in range(len(ours)):
            np.testing.assert_equal(theirs[i], ours[i])
    table = pq.read_table(next(out.glob('codes/val-*')))
    texts = table.to_pylist()
    texts[0]['user'][0] ^= 1        # a bit that another program changed
    changed = pa.Table.from_pylist(texts, table.schema)
    pq.write_table(changed, next(out.glob('codes/val-*')))
    with pytest.raises(ValueError, match='record 0 is not what was written'):
        hub.main(hub.Config(data=str(out), out=str(tmp_path / 'third')))
    assert not (tmp_path / 'third').exists()


def test_each_layout_has_lines_that_fit_it():
    samples = {name: card.sample(get_layout(name)) for name in ('duplex3', 'half_duplex', 'syncllm', 'tts')}
    assert [*samples.values()] == [card.IN_CHUNKS, card.BY_TURNS, card.BY_TURNS, card.READ_ALOUD]
