"""
The model against its reference, transformers' Qwen2, on tiny random weights; and the ways it has to compute
one thing against each other. In fp32 on a CPU.
"""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import model as model_module
from model import (
    KVCache,
    ModelConfig,
    Qwen2,
    attend_by_document,
    attend_dense,
    document_lengths,
    document_mask,
)

TINY = ModelConfig(vocab_size=256, block_size=512, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, n_inner=96)
DOC = torch.tensor([[0] * 5 + [1] * 12 + [2] * 7, [7] * 24, [3] * 23 + [4]]) # (3, 24)
POS = torch.cat([torch.arange(n) for n in (5, 12, 7, 24, 23, 1)]).view(3, 24)


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n_thread = torch.get_num_threads()
    torch.set_num_threads(1) # on a busy machine 2 threads are 10 times slower on such sizes
    yield
    torch.set_num_threads(n_thread)

def lively(model):
    """Weights far from their start, so that biases and norms matter and greedy text does not stand still."""
    torch.manual_seed(1337)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=1.0 if 'norm' in name else 0.0, std=0.15)
    return model.eval()

def tiny(**changes):
    return lively(Qwen2(replace(TINY, **changes)))

def tokens(*shape, vocab_size=TINY.vocab_size, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))

def hf_folder(folder, n_kv_head=2, tie=True, **save):
    hf = lively(Qwen2ForCausalLM(Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=n_kv_head, max_position_embeddings=512, tie_word_embeddings=tie,
        bos_token_id=None, eos_token_id=None, rope_parameters={'rope_type': 'default', 'rope_theta': 1e6})))
    hf.save_pretrained(folder, **save)
    return hf

def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...})) # ...: to be left out

# -----------------------------------------------------------------------------
# equal to transformers

@torch.no_grad()
@pytest.mark.parametrize('n_kv_head, tie', [(2, True), (4, False), (1, False)])
def test_equals_transformers(tmp_path, n_kv_head, tie):
    hf = hf_folder(tmp_path, n_kv_head, tie)
    model = Qwen2.from_pretrained(tmp_path)
    assert model.n_param() == hf.num_parameters()
    idx = tokens(3, 24)
    reference = hf(idx).logits # (3, 24, 256)
    assert (model(idx) - reference).abs().max() < 1e-4 and reference.std() > 0.5

    packed = model(idx, pos=POS, doc=DOC)
    for row in range(3):
        for number in DOC[row].unique(): # each document as if it were alone
            where = DOC[row] == number
            alone = hf(idx[row:row + 1, where]).logits[0]
            assert (packed[row, where] - alone).abs().max() < 1e-4


@torch.no_grad()
def test_greedy_continuation_equals_transformers_over_200_tokens(tmp_path):
    hf = hf_folder(tmp_path)
    model = Qwen2.from_pretrained(tmp_path)
    idx = tokens(2, 11)
    reference = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=200, do_sample=False)
    cache, out = KVCache(model, n_row=2, max_len=211), idx
    logits = model(out, kv_cache=cache)
    while out.size(1) < 211:
        out = torch.cat([out, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        logits = model(out[:, -1:], kv_cache=cache)
    assert out.tolist() == reference.tolist()
    assert len(set(out[0].tolist())) > 20, 'greedy text stands still, the test proves little'
    assert model(out)[:, 10:-1].argmax(-1).tolist() == reference[:, 11:].tolist() # and without a cache


@torch.no_grad()
@pytest.mark.parametrize('tie', [True, False])
def test_saved_folder_opens_in_transformers_and_here(tmp_path, tie):
    model = tiny(tie_embeddings=tie, rope_theta=5e5)
    model.save_pretrained(tmp_path, extra={'eos_token_id': 5, 'nanoduplex': {'layout': 'duplex3'}})
    idx = tokens(2, 24)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (hf(idx).logits - model(idx)).abs().max() < 1e-4
    assert hf.generation_config.eos_token_id == 5

    again = Qwen2.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert ('lm_head.weight' in load_file(tmp_path / 'model.safetensors')) == (not tie)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['rope_theta'] == config['rope_parameters']['rope_theta'] == 5e5
    assert config['dtype'] == config['torch_dtype'] == 'float32'
    assert config['nanoduplex'] == {'layout': 'duplex3'}


def test_loaded_weights_can_be_trained(tmp_path):
    """Tied: the gradient of the head and that of the embedding meet in one matrix."""
    tiny().save_pretrained(tmp_path)
    model = Qwen2.from_pretrained(tmp_path)
    model(tokens(1, 8), learn=torch.arange(8), targets=tokens(8)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@torch.no_grad()
def test_older_and_sharded_folders_load(tmp_path):
    hf = hf_folder(tmp_path, max_shard_size='100KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    edit(tmp_path / 'config.json', rope_parameters=..., rope_theta=1e6) # as transformers 4 writes it
    idx = tokens(1, 24)
    assert (Qwen2.from_pretrained(tmp_path)(idx) - hf(idx).logits).abs().max() < 1e-4

# -----------------------------------------------------------------------------
# equal to itself

@torch.no_grad()
def test_the_past_does_not_see_the_future():
    model, idx = tiny(), tokens(1, 24)
    changed = torch.cat([idx[:, :15], (idx[:, 15:] + 1) % 256], dim=1)
    a, b = model(idx), model(changed)
    assert torch.equal(a[:, :15], b[:, :15]) and not torch.isclose(a[:, 15:], b[:, 15:]).all(-1).any()


@torch.no_grad()
@pytest.mark.parametrize('attention', ['by document', 'dense'])
def test_neighbours_in_a_row_do_not_see_each_other(monkeypatch, attention):
    if attention == 'dense':
        dense = partial(attend_dense, mask=document_mask(DOC))
        monkeypatch.setattr(model_module, 'choose_attention', lambda idx, doc, cache: dense)
    model, idx = tiny(), tokens(3, 24)
    changed = torch.where(DOC == 1, (idx + 1) % 256, idx)
    a, b = model(idx, POS, DOC), model(changed, POS, DOC)
    assert torch.equal(a[DOC != 1], b[DOC != 1]) and not torch.isclose(a[DOC == 1], b[DOC == 1]).all(-1).any()


def test_document_lengths():
    """Rows 5 12 7, 24 and 23 1; equal numbers at the seam of two rows do not join their documents."""
    assert document_lengths(DOC) == [5, 12, 7, 24, 23, 1]
    assert document_lengths(torch.zeros(2, 3, dtype=torch.int64)) == [3, 3]


def test_attention_by_document_equals_the_dense_mask(monkeypatch):
    """Forward and gradients; on a CPU the model takes the first way, elsewhere the second."""
    idx, learn, targets = tokens(3, 24), tokens(30, vocab_size=72, seed=1), tokens(30, seed=2)
    choices = {'by document': partial(attend_by_document, lengths=document_lengths(DOC)),
               'dense': partial(attend_dense, mask=document_mask(DOC))}
    chosen = model_module.choose_attention(idx, DOC, None)
    assert chosen.func is attend_by_document and chosen.keywords == choices['by document'].keywords
    assert model_module.choose_attention(idx.to('meta'), DOC.to('meta'), None).func is attend_dense
    results = []
    for attend in choices.values():
        monkeypatch.setattr(model_module, 'choose_attention', lambda idx, doc, cache, attend=attend: attend)
        model = tiny()
        loss = model(idx, POS, DOC, learn, targets)
        loss.sum().backward()
        results.append([loss] + [p.grad for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_losses_are_the_cross_entropy_of_the_learned_positions():
    model, idx, learn, targets = tiny(), tokens(3, 24), torch.tensor([0, 5, 24, 71]), tokens(4, seed=2)
    logp = model(idx, POS, DOC).log_softmax(-1).view(72, 256)
    losses = model(idx, POS, DOC, learn, targets)
    torch.testing.assert_close(losses, -logp[learn, targets])
    with torch.autocast('cpu', torch.bfloat16):
        rough = model(idx, POS, DOC, learn, targets)
    assert rough.dtype == torch.float32 and (rough - losses).abs().max() < 0.2
    assert model(idx, learn=learn[:0], targets=targets[:0]).shape == (0,) # a batch may hold nothing to learn


@torch.no_grad()
@pytest.mark.parametrize('tie', [True, False])
def test_some_rows_of_the_head(tie):
    model, idx = tiny(tie_embeddings=tie), tokens(2, 9)
    full = model(idx)
    for ids in (slice(100, 200), torch.tensor([255, 3, 100])):
        torch.testing.assert_close(model(idx, ids=ids), full[..., ids])


@torch.no_grad()
def test_cache_fed_in_chunks_equals_the_whole():
    model, idx = tiny(), tokens(2, 24)
    cache = KVCache(model, n_row=2, max_len=24)
    parts = [model(part, kv_cache=cache) for part in idx.split([7, 1, 11, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(idx), rtol=1e-4, atol=1e-4)
    assert cache.len == cache.next_pos == 24
    with pytest.raises(AssertionError, match='25 positions in a KV cache of 24'):
        model(idx[:, :1], kv_cache=cache)


@torch.no_grad()
def test_dropped_positions_are_forgotten():
    """
    One layer, whose keys and values know their own token only: to read 20 positions, drop the 13 oldest and
    read 3 more is to read the last 10 alone, though these stand at positions 0 to 9 then, not 13 to 22.
    """
    model, idx = tiny(n_layer=1), tokens(2, 23)
    cache = KVCache(model, n_row=2, max_len=20)
    model(idx[:, :20], kv_cache=cache)
    cache.drop(13)
    assert (cache.len, cache.next_pos) == (7, 20)
    rest = torch.cat([model(part, kv_cache=cache) for part in idx[:, 20:].split([1, 2], dim=1)], dim=1)
    torch.testing.assert_close(rest, model(idx[:, 13:])[:, 7:], rtol=1e-4, atol=1e-4)


def test_compiles_without_a_graph_break():
    model, idx = tiny(), tokens(2, 8)
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    args = dict(learn=torch.arange(8), targets=tokens(8))
    torch.testing.assert_close(compiled(idx, **args), model(idx, **args))


def test_start_from_nothing():
    """N(0, 1 / sqrt(256) = 0.0625), over sqrt(2 * 3 layers) where the residual stream is written; first loss ln(256) = 5.55."""
    torch.manual_seed(0)
    model = Qwen2(replace(TINY, n_embd=256, n_inner=512))
    block = model.model.layers[1]
    assert block.self_attn.q_proj.weight.std().item() == pytest.approx(0.0625, rel=0.05)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.0625 / 6 ** 0.5, rel=0.05)
    assert block.self_attn.q_proj.bias.abs().sum() == 0
    loss = model(tokens(2, 24), learn=torch.arange(48), targets=tokens(48, seed=1)).mean().item()
    assert loss == pytest.approx(5.55, rel=0.05)


@pytest.mark.parametrize('tie', [True, False])
@pytest.mark.parametrize('how', ['spread', 'words', 'normal', 'zeros'])
def test_grown_rows(how, tie):
    """Ids 250 to 255 were spare, 256 to 4351 are new. Old rows stay, the model says of old ids what it said before."""
    model = tiny(tie_embeddings=tie)
    before, idx = {name: x.clone() for name, x in model.state_dict().items()}, tokens(2, 20, vocab_size=250)
    logits = model(idx).detach()
    model.grow(4352, list(range(250, 4352)), n_text=240, how=how, scale=0.5, words={250: [3, 5]})
    assert model.config.vocab_size == 4352 and (model.lm_head is None) == tie
    torch.testing.assert_close(model(idx)[..., :250], logits[..., :250])
    for name in ['model.embed_tokens.weight'] + ['lm_head.weight'] * (not tie):
        rows, old = model.state_dict()[name], before[name]
        assert torch.equal(rows[:250], old[:250])
        new, text = rows[256:], old[:240]
        mean, std = {'normal': (0, 0.02), 'zeros': (0, 0)}.get(how, (text.mean(0), 0.5 * text.std(0)))
        # 4,096 draws: a mean is good to 1/64 of a standard deviation, 5 of these is never exceeded; a deviation to 1/90
        assert ((new.mean(0) - mean).abs() <= 5 / 64 * torch.as_tensor(std)).all()
        torch.testing.assert_close(new.std(0), torch.as_tensor(std).expand(64).float(), rtol=0.06, atol=0)
        if how == 'words':
            torch.testing.assert_close(rows[250], (old[3] + old[5]) / 2)
    with pytest.raises(ValueError, match='not .*middle'):
        model.grow(4480, list(range(4352, 4480)), 240, how='middle')


def test_flops_of_qwen2_half_a_billion():
    """
    24 layers of 14,909,440 weights in matmuls, 156,160 rows of 896. One document of 1,024, all rows learned:
    3 * (2 * 357,826,560 + 2 * 139,919,360 + 4 * 24 * 896 * 512) = 3.119e9.
    """
    with torch.device('meta'):
        model = Qwen2(ModelConfig(156_160, 8192, 24, n_head=14, n_kv_head=2, n_embd=896, n_inner=4864))
    assert model.flops_per_token(mean_keys=512) == pytest.approx(3.119e9, rel=1e-3)
    assert model.flops_per_token(learned_share=12 / 22, mean_keys=4096) == pytest.approx(3.662e9, rel=1e-3)
    assert model.n_param() == 24 * (14_909_440 + 896 + 256 + 2 * 896) + 156_160 * 896 + 896

# -----------------------------------------------------------------------------
# mistakes end in one sentence

def break_config(**changes):
    return lambda folder: edit(folder / 'config.json', **changes)

def break_weights(change):
    def apply(folder):
        weights = load_file(folder / 'model.safetensors')
        change(weights)
        save_file(weights, folder / 'model.safetensors')
    return apply

NORM = 'model.norm.weight'

@pytest.mark.parametrize('damage, message', [
    (break_config(model_type='llama'), "model_type is 'llama'"),
    (break_config(num_key_value_heads=...), "lacks num_key_value_heads"),
    (break_config(num_attention_heads=5), 'n_embd=64 is no even multiple of n_head=5'),
    (break_config(rope_parameters={'rope_type': 'yarn', 'rope_theta': 1e6}), "rope_type is 'yarn'"),
    (break_config(intermediate_size=97), r'layers\.0\.mlp\.down_proj\.weight is \(64, 96\), but \(64, 97\)'),
    (break_config(num_hidden_layers=2), r'has a tensor model\.layers\.2'),
    (break_weights(lambda weights: weights.pop(NORM)), f'lacks the tensor {NORM}'),
    (break_weights(lambda weights: weights.update({NORM: weights[NORM].to(torch.int8)})), f'{NORM} is torch.int8, a quantised export'),
    (lambda folder: (folder / 'model.safetensors.index.json').write_text(
        json.dumps(dict(weight_map=dict(a='model.safetensors', b='model-00002-of-00002.safetensors')))), 'has no model-00002-of-00002.safetensors; download it'),
    (lambda folder: (folder / 'config.json').unlink(), 'has no config.json'),
    (lambda folder: (folder / 'model.safetensors').unlink(), 'has no model.safetensors'),
    (lambda folder: (folder / 'model.safetensors').write_text('version git-lfs'), 'no complete safetensors'),
])
def test_a_broken_folder_is_named(tmp_path, damage, message):
    tiny().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        Qwen2.from_pretrained(tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('changes', [dict(n_head=3), dict(n_kv_head=3), dict(n_layer=0), dict(n_embd=68)])
def test_impossible_sizes_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(TINY, **changes)
