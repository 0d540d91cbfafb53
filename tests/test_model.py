"""
The model equals its reference, transformers' Qwen2, on tiny random weights; and where it computes one thing
in several ways, they equal each other. In fp32 on a CPU.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import model as model_module
from model import (
    KVCache,
    ModelConfig,
    Qwen2,
    attend_by_document,
    attend_dense,
    attend_flex,
    attend_in_blocks,
    choose_attention,
    compiled,
    document_blocks,
    document_ends,
    document_lengths,
    document_starts,
    fastest_attention,
    linear_cross_entropy,
    score,
)

# flex runs uncompiled here on purpose: a CPU compiles it for a minute
pytestmark = pytest.mark.filterwarnings('ignore:flex_attention called without torch.compile')
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
    """Draws larger weights than a new model's, so that biases and norms matter and greedy text varies."""
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

# ------------------------------------------------------------------------------------------------------------
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
    ours, theirs = model.hf_state_dict(), hf.state_dict()
    assert ours.keys() == theirs.keys() - ({'lm_head.weight'} if tie else set())
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    owner = model.model.layers[1].mlp.gate_up_proj.weight
    assert ours['model.layers.1.mlp.up_proj.weight'].data_ptr() == owner[96:].data_ptr(), 'a copy, not a view'
    assert ('lm_head.weight' in load_file(tmp_path / 'model.safetensors')) == (not tie)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['rope_theta'] == config['rope_parameters']['rope_theta'] == 5e5
    assert config['dtype'] == config['torch_dtype'] == 'float32'
    assert config['nanoduplex'] == {'layout': 'duplex3'}


def test_loaded_weights_can_be_trained(tmp_path):
    """Also where embedding and head share a matrix, so that both add to one gradient."""
    tiny().save_pretrained(tmp_path)
    model = Qwen2.from_pretrained(tmp_path)
    model(tokens(1, 8), learn=torch.arange(8), targets=tokens(8))[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@torch.no_grad()
def test_older_and_sharded_folders_load(tmp_path):
    hf = hf_folder(tmp_path, max_shard_size='100KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    edit(tmp_path / 'config.json', rope_parameters=..., rope_theta=1e6) # as transformers 4 writes it
    idx = tokens(1, 24)
    assert (Qwen2.from_pretrained(tmp_path)(idx) - hf(idx).logits).abs().max() < 1e-4

# ------------------------------------------------------------------------------------------------------------
# equal to itself

@torch.no_grad()
def test_the_past_does_not_see_the_future():
    model, idx = tiny(), tokens(1, 24)
    changed = torch.cat([idx[:, :15], (idx[:, 15:] + 1) % 256], dim=1)
    a, b = model(idx), model(changed)
    assert torch.equal(a[:, :15], b[:, :15]) and not torch.isclose(a[:, 15:], b[:, 15:]).all(-1).any()


@torch.no_grad()
@pytest.mark.parametrize('attention', ['by_document', 'dense', 'flex', 'varlen'])
def test_neighbours_in_a_row_do_not_see_each_other(varlen_on_cpu, attention):
    model, idx = tiny(), tokens(3, 24)
    model.attention = attention
    changed = torch.where(DOC == 1, (idx + 1) % 256, idx)
    a, b = model(idx, POS, DOC), model(changed, POS, DOC)
    assert torch.equal(a[DOC != 1], b[DOC != 1]) and not torch.isclose(a[DOC == 1], b[DOC == 1]).all(-1).any()


def test_document_lengths():
    """DOC has rows of 5 12 7, of 24 and of 23 1. A document ends with its row, even if the next row starts
    with the same number."""
    assert document_lengths(DOC) == [5, 12, 7, 24, 23, 1]
    assert document_lengths(torch.zeros(2, 3, dtype=torch.int64)) == [3, 3]


def random_documents(B, T, mean, seed):
    """-> (B, T): numbers that grow by 1 at random positions, a document of mean tokens on average"""
    return (torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 1 / mean).cumsum(1)


@pytest.fixture
def varlen_on_cpu(monkeypatch):
    """Stands in for varlen_attn, as FlashAttention has no CPU kernel: causal attention from end to end."""
    def varlen_attn(q, k, v, ends, ends_k, max_q, max_k, window_size):
        assert window_size == (-1, 0) and ends.dtype == torch.int32 and q.size(1) == k.size(1) == v.size(1)
        number = torch.searchsorted(ends, torch.arange(len(q)), right=True) # of each position's document
        return attend_dense(q[None], k[None], v[None], (number[:, None] == number).tril())[0]
    monkeypatch.setattr('torch.nn.attention.varlen.varlen_attn', varlen_attn)


@pytest.mark.parametrize('seed, T, mean', [(0, 24, 5), (1, 24, 100), (2, 200, 70), (3, 7, 1)])
def test_all_ways_of_attention_are_equal(varlen_on_cpu, seed, T, mean):
    """All equal the dense mask on packed rows, forward and gradients; flex forward only, as it has no
    backward on a CPU."""
    doc, idx = random_documents(2, T, mean, seed), tokens(2, T, seed=seed)
    pos, learn = torch.arange(T) - document_starts(doc), torch.arange(0, 2 * T, 3)
    targets = idx.flatten()[learn]
    results = {}
    for name in ('dense', 'by_document', 'varlen', 'flex'):
        model = tiny()
        model.attention = name
        if name == 'flex':
            with torch.no_grad():
                results[name] = [model(idx, pos, doc, learn, targets)]
        else:
            total, losses = model(idx, pos, doc, learn, targets)
            total.backward()
            results[name] = [losses] + [p.grad for p in model.parameters()]
    for values in results.values():
        for ours, reference in zip(values, results['dense']):
            assert (ours - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize('T', [1, 5, 127, 128, 129, 300])
def test_attention_in_blocks_equals_the_whole(T):
    """Forward and gradients: equal in fp32, up to rounding; in bf16, which it is for, as near to the fp32
    result as SDPA's kernel."""
    generator = torch.Generator().manual_seed(T)
    qkv = [torch.randn(2, T, heads, 8, generator=generator) for heads in (6, 2, 2)]

    def run(attend, dtype):
        x = [y.to(dtype).requires_grad_() for y in qkv]
        y = attend(*x)
        return [y] + list(torch.autograd.grad(y.float().square().sum(), x))
    reference = run(attend_dense, torch.float32)
    for ours, whole in zip(run(attend_in_blocks, torch.float32), reference):
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-4)
    for ours, kernel, whole in zip(run(attend_in_blocks, torch.bfloat16), run(attend_dense, torch.bfloat16),
                                   reference):
        assert (ours.float() - whole).norm() <= 2.5 * (kernel.float() - whole).norm() + 1e-3 * whole.norm()


def test_bf16_on_a_cpu_takes_the_blocks(monkeypatch):
    taken = []
    monkeypatch.setattr(model_module, 'attend_in_blocks',
                        lambda q, k, v: taken.append(q.size(1)) or attend_dense(q, k, v))
    for dtype in (torch.float32, torch.bfloat16):
        attend_by_document(*(torch.randn(1, 1224, 2, 8, dtype=dtype) for _ in range(3)),
                           lengths=[100, 63, 1025, 36])
    assert taken == [100]


def test_each_device_has_its_attention(monkeypatch):
    """Hopper and Blackwell: flex; A100 and its kin: FlashAttention, which has no fp32; a CPU: by document."""
    assert fastest_attention(torch.device('cpu')) == 'by_document'
    for capability, autocast, name in (((9, 0), True, 'flex'), ((10, 0), True, 'flex'),
                                       ((8, 0), True, 'varlen'), ((8, 9), True, 'varlen'),
                                       ((8, 0), False, 'flex'), ((7, 5), False, 'flex')):
        monkeypatch.setattr(torch.cuda, 'get_device_capability',
                            lambda device, capability=capability: capability)
        monkeypatch.setattr(torch, 'is_autocast_enabled', lambda kind, autocast=autocast: autocast)
        assert fastest_attention(torch.device('cuda')) == name, (capability, autocast)
    doc, model = DOC, tiny()
    for name, attend in (('flex', attend_flex), ('by_document', attend_by_document), ('dense', attend_dense)):
        assert choose_attention(doc, name).func is attend
    monkeypatch.setattr(model_module, 'fastest_attention', lambda device: 'unknown')
    with pytest.raises(AssertionError, match='unknown'):
        model(tokens(3, 24), POS, DOC)


def test_blocks_of_documents_are_those_drawn_in_the_docstring():
    """A document of 13 positions and one of 27, in blocks of 8."""
    mask = document_blocks(torch.tensor([[0] * 13 + [1] * 27]), size=8)
    blocks = []
    for name in ('kv', 'full_kv'):
        counts, lists = getattr(mask, name + '_num_blocks')[0, 0], getattr(mask, name + '_indices')[0, 0]
        blocks.append([row[:n].tolist() for n, row in zip(counts, lists)])
    assert blocks == [[[0], [0, 1], [1, 2], [1, 3], [1, 4]], [[], [], [], [2], [2, 3]]]


@pytest.mark.parametrize('B, T, mean, size', [(3, 256, 30, 16), (2, 250, 100, 16), (1, 64, 1000, 16),
                                              (2, 70, 2, 16), (2, 10, 3, 16), (2, 600, 200, 128)])
def test_blocks_of_documents_equal_those_of_create_block_mask(B, T, mean, size):
    """For each query block the full and partial key blocks; and the transpose, which the gradients need."""
    doc = random_documents(B, T, mean, seed=T)
    ours = document_blocks(doc, size)
    theirs = create_block_mask(lambda b, h, query, key: (doc[b, query] == doc[b, key]) & (query >= key),
                               B, None, T, T, device='cpu', BLOCK_SIZE=size)
    assert ours.shape == (B, 1, T, T) and ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ('kv', 'full_kv', 'q', 'full_q'):
        sets = []
        for mask in (ours, theirs):
            counts, lists = getattr(mask, name + '_num_blocks'), getattr(mask, name + '_indices')
            assert counts.dtype == lists.dtype == torch.int32 and lists.max() < -(-T // size)
            rows = zip(counts.flatten(), lists.flatten(0, 2), strict=True)
            sets.append([sorted(row[:n].tolist()) for n, row in rows])
        assert sets[0] == sets[1], name


def test_document_starts_and_ends():
    """DOC again. After the last document there are only empty ones, up to 256."""
    assert document_starts(DOC).tolist() == [[0] * 5 + [5] * 12 + [17] * 7, [0] * 24, [0] * 23 + [23]]
    ends = document_ends(DOC)
    assert ends.tolist() == [0, 5, 17, 24, 48, 71] + [72] * 251 and ends.dtype == torch.int32
    assert len(document_ends(DOC.new_zeros(40, 1024))) == 641
    with pytest.raises(RuntimeError, match='over 256 documents'):
        document_ends(torch.arange(300)[None])


def test_masks_are_made_without_a_gpu_sync():
    """Fake tensors have shapes but no values. Asking for a value, or for a shape that depends on one, is an
    error; on a GPU it would be a sync."""
    with FakeTensorMode():
        doc = torch.zeros(4, 1024, dtype=torch.int64)
        assert document_blocks(doc).kv_indices.shape == (4, 1, 8, 8)
        assert document_ends(doc).shape == (257,)
        with pytest.raises(DynamicOutputShapeException):
            document_lengths(doc)


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
    In one layer, keys and values depend on their own token only. So reading 20 positions, dropping the 13
    oldest and reading 3 more gives the same as reading the last 10 alone, although those then stand at
    positions 0 to 9 instead of 13 to 22.
    """
    model, idx = tiny(n_layer=1), tokens(2, 23)
    cache = KVCache(model, n_row=2, max_len=20)
    model(idx[:, :20], kv_cache=cache)
    cache.drop(13)
    assert (cache.len, cache.next_pos) == (7, 20)
    rest = torch.cat([model(part, kv_cache=cache) for part in idx[:, 20:].split([1, 2], dim=1)], dim=1)
    torch.testing.assert_close(rest, model(idx[:, 13:])[:, 7:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('attention', [None, 'varlen', 'flex'])
def test_blocks_compile_once(varlen_on_cpu, attention):
    """There is one graph for all blocks and for all batches of a shape. backend='eager' skips inductor, which
    takes a minute."""
    model, eager = tiny(), tiny()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.attention = attention
    model.wrap_blocks(compiles=True, backend='eager')
    for seed in range(4):
        doc, idx = random_documents(2, 48, 20, seed), tokens(2, 48, seed=seed)
        batch = (idx, torch.arange(48) - document_starts(doc), doc, torch.arange(30 + seed),
                 tokens(30 + seed))
        with torch.set_grad_enabled(attention != 'flex'):
            ours, theirs = model(*batch), eager(*batch)
        torch.testing.assert_close(ours, theirs)
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1
        assert not torch._dynamo.utils.counters['graph_break']
    if attention is None:
        assert model.attention == 'dense' and model.state_dict().keys() == eager.state_dict().keys()
        ours[0].backward()
        theirs[0].backward()
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.slow # a minute of C++
@pytest.mark.parametrize('attention', ['dense', 'flex'])
def test_compiled_blocks_equal_eager_ones(attention):
    """Compiled by inductor, as on a GPU; flex forward only."""
    model, eager, doc, idx = tiny(), tiny(), random_documents(2, 200, 50, seed=0), tokens(2, 200)
    torch._dynamo.reset()
    model.attention = attention
    model.wrap_blocks(compiles=True)
    batch = (idx, torch.arange(200) - document_starts(doc), doc, torch.arange(400), tokens(400))
    with torch.set_grad_enabled(attention != 'flex'):
        ours, theirs = model(*batch), eager(*batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    if attention != 'flex':
        ours[0].backward()
        theirs[0].backward()
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm()


@pytest.mark.slow # half a minute of C++
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_compiled_score_equals_the_eager_one(dtype):
    """Compiled as on a GPU it leaves the logits alone, as writing into them would cost another copy. The last
    chunk has another number of rows, which does not compile it again."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for n in (64, 37, 100):
        x, head, targets, weights = head_and_rows(n, n_vocab=3000, dtype=dtype)
        logits = (x @ head.T).detach()
        before = logits.clone()
        losses, gradient = compiled(score, dynamic=True)(logits, targets, weights)
        assert torch.equal(logits, before) and gradient.dtype == dtype
        expected_losses, expected = score(logits, targets, weights)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
        rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(gradient, expected, rtol=rtol, atol=1e-6)
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


def test_start_from_nothing():
    """Standard deviations are 1 / sqrt(256) = 0.0625, divided by sqrt(2 * 3 layers) where a branch ends. The
    first loss is ln(256) = 5.55."""
    torch.manual_seed(0)
    model = Qwen2(replace(TINY, n_embd=256, n_inner=512))
    block = model.model.layers[1]
    parts = block.self_attn.qkv_proj.weight.split([256, 128, 128])
    for part in parts + block.mlp.gate_up_proj.weight.split([512, 512]):
        assert part.std().item() == pytest.approx(0.0625, rel=0.05)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.0625 / 6 ** 0.5, rel=0.05)
    assert block.self_attn.qkv_proj.bias.abs().sum() == 0
    _, losses = model(tokens(2, 24), learn=torch.arange(48), targets=tokens(48, seed=1))
    assert losses.mean().item() == pytest.approx(5.55, rel=0.05)


# ------------------------------------------------------------------------------------------------------------
# the loss

def head_and_rows(n, n_vocab=300, n_embd=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, head = (torch.randn(size, n_embd, generator=generator).to(dtype).requires_grad_()
               for size in (n, n_vocab))
    return x, head, tokens(n, vocab_size=n_vocab), torch.rand(n, generator=generator)

def whole(x, head, targets, weights):
    """The reference: total, losses and the gradients of x and head from all logits at once."""
    losses = F.cross_entropy(x @ head.T, targets, reduction='none')
    total = (losses * weights).sum()
    return [total, losses, *torch.autograd.grad(total, (x, head))]

def in_chunks(x, head, targets, weights, chunk):
    total, losses = linear_cross_entropy(x, head, targets, weights, chunk)
    assert not losses.requires_grad
    return [total, losses, *torch.autograd.grad(total, (x, head))]


@pytest.mark.parametrize('chunk', [1, 7, 64, 100, 4096])
def test_loss_in_chunks_equals_the_whole(chunk):
    x, head, targets, weights = head_and_rows(100)
    for ours, theirs in zip(in_chunks(x, head, targets, weights, chunk), whole(x, head, targets, weights),
                            strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5 if ours.dim() == 0 else 5e-6)
    ours, theirs = in_chunks(x, head, targets, None, chunk), whole(x, head, targets, torch.ones(100))
    torch.testing.assert_close(ours[3], theirs[3], rtol=1e-6, atol=5e-6)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, head, targets, weights, chunk)[1], ours[1])


def test_gradients_follow_what_becomes_of_the_total():
    x, head, targets, weights = head_and_rows(9)
    (linear_cross_entropy(x, head, targets, weights)[0] / 4).backward()
    for grad, theirs in zip((x.grad, head.grad), whole(x, head, targets, weights)[2:], strict=True):
        torch.testing.assert_close(grad, theirs / 4, rtol=1e-5, atol=1e-6)
    total, _ = linear_cross_entropy(x, head, targets)
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match='backward ran twice'):
        total.backward()


def test_nothing_to_learn_is_a_loss_of_zero():
    x, head, targets, _ = head_and_rows(0)
    total, losses = linear_cross_entropy(x, head, targets)
    total.backward()
    assert total == 0 and losses.shape == (0,) and x.grad.shape == (0, 32) and not head.grad.any()


def test_bf16_matmuls_and_fp32_sums():
    """
    In autocast the head stays fp32, and so does its gradient. 2,048 rows are added one by one: a bf16 sum,
    whose steps at 256 are 2, would lose small products, and the gradient would be 10 % off; and a total loss
    of 2,048 * 6 = 12,000 would be a multiple of 64.
    """
    x, head, targets, weights = head_and_rows(2048, n_vocab=60)
    x = (x.detach() * 0.1 + 1).requires_grad_() # alike, so that their products add up
    reference = whole(x, head, targets, weights)
    with torch.autocast('cpu', torch.bfloat16):
        ours = in_chunks(x, head, targets, weights, chunk=1)
    for value in ours:
        assert value.dtype == torch.float32
    assert abs(ours[0] / reference[0] - 1) < 2e-3 and ours[0] % 1 != 0
    for a, b in zip(ours[1:], reference[1:], strict=True):
        assert (a - b).norm() < 0.01 * b.norm()

    # where the whole model is in bf16, gradients are, too
    y, matrix = (z.detach().bfloat16().requires_grad_() for z in (x, head))
    half = in_chunks(y, matrix, targets, weights, chunk=1)
    assert [z.dtype for z in half] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    for a, b in zip(half[1:], reference[1:], strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def test_logits_never_exist_whole():
    """The largest tensor that any operation makes has chunk * V elements of logits, or V * C of the head's
    gradient."""
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            sizes = [x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
            self.size = max([self.size, *sizes])
            return made

    x, head, targets, weights = head_and_rows(2000, n_vocab=1000)
    for chunk, size in ((2000, 2_000_000), (100, 100_000), (20, 64_000)): # 64,000: x itself
        with Largest() as largest:
            in_chunks(x, head, targets, weights, chunk)
        assert largest.size == size, chunk

# ------------------------------------------------------------------------------------------------------------

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

# ------------------------------------------------------------------------------------------------------------
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
    (break_weights(lambda weights: weights.update({NORM: weights[NORM].to(torch.int8)})),
     f'{NORM} is torch.int8, a quantised export'),
    (lambda folder: (folder / 'model.safetensors.index.json').write_text(
        json.dumps(dict(weight_map=dict(a='model.safetensors', b='model-00002-of-00002.safetensors')))),
     'has no model-00002-of-00002.safetensors; download it'),
    (lambda folder: (folder / 'config.json').unlink(), 'has no config.json'),
    (lambda folder: (folder / 'model.safetensors').unlink(), 'has no model.safetensors'),
    (lambda folder: (folder / 'model.safetensors').write_text('version git-lfs'), 'no complete safetensors'),
    (lambda folder: (folder / 'config.json').write_text('{"model_'), 'config.json is no JSON'),
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
