"""
A checkpoint with the real Qwen2 BPE opens in transformers 5 and 4.57: logits and ids are equal, and each id
has a name.
"""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

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
