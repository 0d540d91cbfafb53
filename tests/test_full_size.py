"""
Training at full size: Qwen2-0.5B with 156,032 rows takes optimiser steps on a CPU, from a folder as Hugging
Face has it.
"""
import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CODEC, ROOT, make_dialogues

import train
from data.dialogues import save_dialogues
from model import ModelConfig, Qwen2

QWEN2 = ROOT.parent / 'shared' / 'data' / 'qwen2_tokenizer'
HALF_A_BILLION = ModelConfig(151_936, 131_072, n_layer=24, n_head=14, n_kv_head=2, n_embd=896, n_inner=4864)


@pytest.mark.slow
def test_full_size(tmp_path, small_tokenizer, capsys):
    """
    Random weights in bfloat16, grown by 4,096 codes: in five steps of 128 tokens the loss falls. That takes
    some 10 GB of memory and of disk: 498 M parameters * 4 bytes * (weight, gradient, two moments) = 8.0 GB.
    """
    torch.manual_seed(0)
    with torch.device('meta'):
        model = Qwen2(HALF_A_BILLION)
    model = model.to_empty(device='cpu').bfloat16()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'norm' in name:
                p.fill_(1)
            else:
                p.normal_(std=0.02)
    model.save_pretrained(tmp_path / 'base')
    del model
    # the small tokenizer knows fewer ids than the model has rows; the rows above them are spare
    tokenizer = QWEN2 if QWEN2.is_dir() else small_tokenizer
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, tmp_path / 'base' / name)
    dialogue, = make_dialogues(1, n_frame=(45, 50))
    # eight times the same dialogue, as losses of steps on different rows could not be compared
    for split in ('train', 'val'):
        save_dialogues(str(tmp_path / f'{split}.arrow'), [dialogue] * 8, dict(CODEC, n_codes=4096))
    cfg = train.Config(data=str(tmp_path), init_from=str(tmp_path / 'base'), out_dir=str(tmp_path / 'run'),
                       stages='duplex3:5', block_size=128, batch_size=1, batch_tokens=128, learning_rate=1e-4,
                       warmup_steps=1, log_interval=1, eval_interval=5, device='cpu', dtype='float32',
                       tensorboard=False)
    n_thread = torch.get_num_threads()
    torch.set_num_threads(2)
    train.main(replace(cfg))
    torch.set_num_threads(n_thread)
    rows = map(json.loads, (Path(cfg.out_dir) / 'log.jsonl').read_text().splitlines())
    losses = [row['loss'] for row in rows if row['kind'] == 'train']
    out = capsys.readouterr().out
    assert '497.7 M parameters, 156032 ids' in out
    assert len(losses) == 5 and all(a > b for a, b in zip(losses, losses[1:])), losses
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with capsys.disabled():
        print(f'\nfull size: losses {losses}, at most {most:.1f} GiB')
    shutil.rmtree(tmp_path)
