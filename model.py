"""
Qwen2 in one file: the unmodified text model that learns to listen and to speak (arXiv 2407.10671).
Its files carry Hugging Face's own names, so a checkpoint folder opens in transformers, and back.

    idx (B, T) ─ embed_tokens ─► x (B, T, C) ─► n_layer blocks ─► learned rows ─ norm, head ─► logits (N, V)

    a block:
      x ─┬─ RMSNorm ─┬─ q (B, T, H, D) ─ RoPE ─┐
         │           ├─ k (B, T, K, D) ─ RoPE ─┼─ attention per document ─ o ─ + ─┬─ RMSNorm ─ SwiGLU ─ + ─►
         │           └─ v (B, T, K, D) ────────┘ (H / K heads of q share k, v) │  │                     │
         └─────────────────────────────────────────────────────────────────────┘  └─────────────────────┘

    B rows   T positions   C channels (n_embd)   H query heads   K key and value heads   D channels of a head
    S positions to attend to   V ids in the vocabulary   N positions to score

    model = Qwen2(ModelConfig(1024, 1024, n_layer=4, n_head=6, n_kv_head=2, n_embd=192, n_inner=512))
    model = Qwen2.from_pretrained('Qwen2-0.5B')
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    block_size: int             # longest context in tokens; a note for the caller, as RoPE needs no table
    n_layer: int
    n_head: int
    n_kv_head: int              # fewer than n_head: the KV cache is n_head / n_kv_head times smaller (GQA)
    n_embd: int
    n_inner: int                # width inside SwiGLU
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tie_embeddings: bool = True # one matrix reads and predicts tokens: 28 % of Qwen2-0.5B's parameters

    def __post_init__(self):
        for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}; it has to be at least 1')
        if self.n_embd % (2 * self.n_head): # RoPE turns channels in pairs
            raise ValueError(f'n_embd={self.n_embd} is no even multiple of n_head={self.n_head}')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head={self.n_head} is no multiple of n_kv_head={self.n_kv_head}')

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

# of the compiled functions; torch.compile imports seconds' worth of modules, so not before it is called for
@cache
def compiled(function, **settings):
    return torch.compile(function, **settings)

# -----------------------------------------------------------------------------
# attention: on packed rows four ways to the same numbers, of which each device has its fastest

def attend_dense(q, k, v, mask=None):
    """q (B, T, H, D), k, v (B, S, K, D) -> (B, T, H, D). No mask: causal, or one new token that sees all."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2) # (B, heads, T or S, D)
    is_causal = mask is None and q.size(2) == k.size(2)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)
    return y.transpose(1, 2)

def attend_by_document(q, k, v, lengths):
    """
    The same on packed rows, a causal call per document: on a CPU 2 to 3 times as fast as a mask. Those of a
    length in between take 0.6 times as long again in plain bf16 matmuls; the longer want too much memory that
    way, T * T * H a layer.
    """
    attend = [
        attend_in_blocks if q.dtype == torch.bfloat16 and 64 <= T <= 1024 else attend_dense for T in lengths]
    q, k, v = (x.flatten(0, 1).split(lengths) for x in (q, k, v)) # of each document (length, heads, D)
    return torch.cat([attend(*(x[None] for x in qkv)) for attend, *qkv in zip(attend, q, k, v, strict=True)],
                     dim=1)

@cache
def causal_bias(start, n, G, dtype):
    """(1, n * G, start + n), 0 where query start .. start + n - 1 may look at a key, else -inf; a row for
    each head of a group"""
    return torch.full((n, start + n), -torch.inf, dtype=dtype).triu(start + 1).repeat_interleave(G, 0)[None]

def attend_in_blocks(q, k, v, n=128):
    """q (B, T, H, D), k, v (B, T, K, D) -> (B, T, H, D), causal: n queries after the other, each against the
    keys up to its end."""
    (B, T, H, D), K = q.size(), k.size(2)
    G = H // K # query heads that share k and v lie together, as more rows of the same matmul
    q = q.view(B, T, K, G, D).transpose(1, 2).reshape(B * K, T * G, D)
    k, v = (x.transpose(1, 2).reshape(B * K, T, D) for x in (k, v))
    y = []
    for start in range(0, T, n):
        end = min(start + n, T)
        bias = causal_bias(start, n, G, q.dtype)[:, :(end - start) * G, :end]
        scores = torch.baddbmm(bias, q[:, start * G:end * G], k[:, :end].mT, alpha=D ** -0.5)
        y.append(scores.softmax(-1) @ v[:, :end]) # (B * K, (end - start) * G, D)
    return torch.cat(y, dim=1).view(B, K, T, G, D).transpose(1, 2).reshape(B, T, H, D)

def is_start(doc):
    """doc (B, T) -> (B, T), True where a document starts; each is contiguous and ends with its row"""
    starts = torch.ones_like(doc, dtype=torch.bool)
    starts[:, 1:] = doc[:, 1:] != doc[:, :-1]
    return starts

def document_lengths(doc):
    """doc (B, T) -> the lengths of all documents, row after row"""
    starts = is_start(doc).flatten().nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([doc.numel()])).tolist()

def document_mask(doc):
    """doc (B, T) -> (B, 1, T, T), True where a query (row) may look at a key (column)."""
    return (doc[:, None, :, None] == doc[:, None, None, :]).tril()

def document_starts(doc):
    """doc (B, T) -> (B, T), where in its row each position's document starts"""
    place = torch.arange(doc.size(1), device=doc.device).expand_as(doc)
    return torch.where(is_start(doc), place, 0).cummax(dim=1).values

def document_blocks(doc, size=128):
    """
    doc (B, T) -> the BlockMask that create_block_mask makes of (2, 8192) in 0.9 s on a CPU, in 2 ms and
    without a word from the device. Documents start further right the further right a query is. So the size
    queries of block i see something of key blocks first .. i, first being where the document of its first
    query starts; and all of key blocks whole .. i - 1, those right of where the document of its last query
    starts. In between, and at i itself, some see some:

        first = 0, whole = 2, i = 4:   some  some  all  all  some
    """
    B, T = doc.size()
    n = -(-T // size) # blocks in a row
    start = document_starts(doc)
    i = torch.arange(n, device=doc.device) # (n)
    padded = F.pad(start, (0, n * size - T), value=T) # queries that are none see nothing
    first = padded[:, ::size] // size # (B, n)
    whole = ((padded[:, size - 1::size] + size - 1) // size).minimum(i)
    # (B, n, n)
    some, all_ = (first[:, :, None] + i).minimum(i[:, None]), (whole[:, :, None] + i).minimum(i[:, None])
    n_some = whole - first + 1
    some = torch.where(i == n_some[:, :, None] - 1, i[:, None], some) # the last of them is i itself
    lists = [x.int()[:, None] for x in (n_some, some, i - whole, all_)] # one for all heads
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=size, seq_lengths=(T, T), mask_mod=lambda b, h, query, key:
        (key >= start[b, query]) & (key <= query))

def attend_flex(q, k, v, block_mask):
    """On Hopper; one fused kernel once compiled, so where the block around it is not, it is compiled by
    itself."""
    flex = compiled(flex_attention,
                    dynamic=False) if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    # k and v are parts of larger tensors, whose start a CPU's kernel takes for theirs (pytorch #157612); a
    # copy takes 33 MB for 32,768 tokens
    # (B, heads, T, D)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    return flex(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)

def document_ends(doc):
    """
    doc (B, T) -> int32, 0 and where each document ends among the B * T positions. Padded to a fixed length,
    as FlashAttention would be prepared anew for another, with documents of length 0, as these are tried and
    left at once: B * T / 64, or 256, when a row of 1,024 tokens of speech recognition holds 3 documents.
    """
    n_document = max(doc.numel() // 64, 256)
    number = is_start(doc).flatten().cumsum(0) - 1 # (B * T)
    torch._assert_async(number[-1] < n_document, f'over {n_document} documents in a batch of '
                                                 f'{tuple(doc.shape)} tokens')
    return torch.searchsorted(number, torch.arange(n_document + 1, device=doc.device), out_int32=True)

def attend_varlen(q, k, v, ends):
    """FlashAttention 2, in bf16: on an A100 faster than flex."""
    from torch.nn.attention.varlen import varlen_attn  # 1 s of imports
    B, T, H, D = q.size()
    if q.size(2) != k.size(2): # torch 2.11 has no enable_gqa here
        k, v = (x.repeat_interleave(H // x.size(2), dim=2) for x in (k, v)) # (B, T, H, D)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    # all to the left, none to the right
    return varlen_attn(q, k, v, ends, ends, T, T, window_size=(-1, 0)).view(B, T, H, D)

def fastest_attention(device):
    if device.type != 'cuda':
        return 'by_document'
    # FlashAttention knows no fp32
    is_ampere = torch.cuda.get_device_capability(device)[0] == 8
    return 'varlen' if is_ampere and torch.is_autocast_enabled('cuda') else 'flex'

def choose_attention(doc, name):
    """What all layers do alike, worked out once per forward."""
    if name == 'flex':
        return partial(attend_flex, block_mask=document_blocks(doc))
    if name == 'varlen':
        return partial(attend_varlen, ends=document_ends(doc))
    if name == 'by_document':
        return partial(attend_by_document, lengths=document_lengths(doc))
    assert name == 'dense', name
    return partial(attend_dense, mask=document_mask(doc))

def attend_grouped(q, k, v, mask):
    """
    The same for few queries, mask (H / K * T, S) added to the scores: the heads that share k and v follow
    each other as one head's queries. So k and v are read once, not H / K times: in bf16 on a CPU one token at
    S = 512 takes 0.07 ms instead of 0.79.
    """
    (B, T, H, D), K = q.size(), k.size(2)
    rows = q.transpose(1, 2).reshape(B, K, H // K * T, D).to(k.dtype)
    y = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), mask)
    return y.view(B, H, T, D).transpose(1, 2).to(q.dtype)


class KVCache:
    """
    Keys and values of the latest positions, in a ring: position p lies in slot p % max_len, so forgetting the
    oldest moves nothing. Keys are stored after their rotation, and a score depends on the distance of query
    and key only: positions just keep counting (next_pos), beyond max_len too. After an hour of conversation,
    200,000 tokens, an fp32 angle is still good to 0.01 rad.

    A pass is begun by advance() on the host; all else is work on the device from tensors that stay where they
    are, which can be captured in a CUDA graph and replayed.
    """

    def __init__(self, model, n_row, max_len, bucket=256, dtype=None):
        # stored in the model's dtype, if not in another; on its device
        config, weight = model.config, model.model.norm.weight
        # one slot more than are used: all of them would be another case to torch.compile than some, and
        # compiled anew
        shape = (config.n_layer, n_row, config.n_kv_head, max_len + 1, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype or weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.max_len, self.bucket = max_len, bucket
        self.len = 0        # positions held
        self.next_pos = 0   # positions ever seen
        # the same for the device
        self.oldest, self.first_new = torch.zeros(2, dtype=torch.int64, device=weight.device)

    def advance(self, T):
        """Makes room for T new positions."""
        assert self.len + T <= self.max_len, f'{self.len + T} positions in a KV cache of {self.max_len}, drop() some'
        self.oldest.fill_(self.next_pos - self.len)
        self.first_new.fill_(self.next_pos)
        self.len += T
        self.next_pos += T
        # attention reads whole buckets: few shapes, and short contexts don't pay for max_len
        self.n_slot = min(self.max_len, -(-self.next_pos // self.bucket) * self.bucket)

    def place(self, T):
        """-> pos (T) of the new positions, mask (T, S), 0 where they may look at a slot, else -inf"""
        pos = self.first_new + torch.arange(T, device=self.keys.device)
        self.new_slots = pos % self.max_len
        slots = torch.arange(self.n_slot, device=self.keys.device)
        # the last position put into each slot, below 0: none yet
        held = pos[-1] - (pos[-1] - slots) % self.max_len
        may = (held >= self.oldest) & (held <= pos[:, None])
        # as all layers add it
        return pos, torch.zeros_like(may, dtype=self.keys.dtype).masked_fill_(~may, -torch.inf)

    def extend(self, layer, k, v):
        """k, v (B, T, K, D) of the new positions -> those of all slots, (B, S, K, D)"""
        for x, new in ((self.keys[layer], k), (self.values[layer], v)): # (B, K, max_len + 1, D)
            x.index_copy_(2, self.new_slots, new.transpose(1, 2).to(x.dtype))
        return (x[layer, :, :, :self.n_slot].transpose(1, 2) for x in (self.keys, self.values))

    def drop(self, n):
        """Forgets the n oldest positions."""
        assert 0 <= n <= self.len, f'cannot drop {n} of {self.len} positions'
        self.len -= n

    def keep(self, n_row):
        """Forgets all rows but the first n_row."""
        self.keys, self.values = self.keys[:, :n_row].clone(), self.values[:, :n_row].clone()

# -----------------------------------------------------------------------------
# the head and its loss: of 156,032 logits a row, which never all exist at once

def score(logits, targets, weights):
    """logits (n, V) -> losses (n), fp32; logits turn into the gradient of sum(weights * losses), in place."""
    x = logits.float()
    lse = x.logsumexp(-1, keepdim=True) # (n, 1)
    losses = lse - x.gather(1, targets[:, None]) # (n, 1)
    # weights * probability, in one pass where it is compiled
    logits.copy_(x.sub_(lse).exp_().mul_(weights[:, None]))
    # less the weight at the target
    logits.scatter_(1, targets[:, None], (torch.expm1(-losses) * weights[:, None]).type_as(logits))
    return losses[:, 0]


def add_product(total, a, b):
    """total (V, C) fp32 += a (n, V).T @ b (n, C), without rounding the sum to bf16."""
    if a.dtype == torch.float32:
        total.addmm_(a.T, b)
    elif total.is_cuda:
        torch.addmm(total, a.T, b, out_dtype=torch.float32, out=total)
    else: # a CPU has no such matmul; 4,096 rows of products, 7 MB, are added while they are in its cache
        for rows, columns in zip(total.split(4096), a.split(4096, dim=1), strict=True):
            rows += columns.T @ b


class LinearCrossEntropy(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, head, targets, weights, chunk, dtype, with_gradient):
        losses = torch.empty(len(x), device=x.device)
        rows, matrix = x.to(dtype), head.to(dtype)
        if with_gradient:
            d_rows, d_head = torch.empty_like(rows), torch.zeros_like(head, dtype=torch.float32)
        for i in range(0, len(x), chunk):
            part = slice(i, i + chunk)
            logits = rows[part] @ matrix.T # (n, V)
            if x.is_cuda:
                # the last chunk's size varies
                losses[part] = compiled(score, dynamic=True)(logits, targets[part], weights[part])
            else: # 32 rows, 20 MB in fp32, stay in the cache
                parts = zip(*(y.split(32) for y in (logits, targets[part], weights[part])), strict=True)
                losses[part] = torch.cat([score(*y) for y in parts])
            if with_gradient:
                d_rows[part] = logits @ matrix
                add_product(d_head, logits, rows[part])
        if with_gradient:
            ctx.gradients, ctx.dtypes = (d_rows, d_head), (x.dtype, head.dtype)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx, d_total, _):
        assert ctx.gradients is not None, 'backward ran twice; the gradients were given away, as a copy takes 0.6 GB'
        (d_rows, d_head), ctx.gradients = ctx.gradients, None
        x_dtype, head_dtype = ctx.dtypes
        return d_rows.mul_(d_total).to(x_dtype), d_head.mul_(d_total).to(
            head_dtype), None, None, None, None, None


def linear_cross_entropy(x, head, targets, weights=None, chunk=4096):
    """
    x (N, C), head (V, C), targets (N), weights (N) or None for ones -> total: the sum of weights * losses,
    and losses (N) without gradient, both fp32. The gradients of x and head are worked out chunk rows at a
    time on the way forward, 3 matmuls where recomputing takes 4; the head's is summed in fp32, also where
    matmuls are in bf16. Many rows a chunk, as each reads the head twice and its gradient once: at 256 rows a
    GPU spends longer on that than on the matmuls.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights
    with torch.autocast(kind, enabled=False):
        return LinearCrossEntropy.apply(x, head, targets, weights, chunk, dtype, torch.is_grad_enabled())

# -----------------------------------------------------------------------------
# the model

def rotate(x, cos, sin):
    """RoPE on x (B, T, heads, D): channel i turns with i + D/2 (Hugging Face), not with i + 1 (the paper)."""
    a, b = x.chunk(2, dim=-1)
    y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return y.type_as(x) # cos and sin are fp32, x may be bf16


class Attention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.layer, self.head_dim = layer, D
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        # Qwen2 has biases here and nowhere else
        self.qkv_proj = nn.Linear(C, (config.n_head + 2 * config.n_kv_head) * D)
        self.o_proj = nn.Linear(config.n_head * D, C, bias=False)

    def forward(self, x, cos, sin, attend, kv_cache):
        B, T, C = x.size()
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim) # (B, T, H + 2 K, D)
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        q, k = rotate(qk, cos, sin).split([self.n_head, self.n_kv_head], dim=2) # (B, T, H, D), (B, T, K, D)
        if kv_cache is not None:
            k, v = kv_cache.extend(self.layer, k, v) # (B, S, K, D)
        return self.o_proj(attend(q, k, v).reshape(B, T, C))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.n_embd, 2 * config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend, kv_cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend, kv_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        # on packed rows: 'flex', 'varlen', 'by_document', 'dense'; None: what is fastest on the device
        self.attention = None
        self.model = nn.ModuleDict(dict(
            embed_tokens = nn.Embedding(config.vocab_size, config.n_embd),
            layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            norm = nn.RMSNorm(config.n_embd, config.norm_eps),
        ))
        is_tied = config.tie_embeddings
        self.lm_head = None if is_tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # 1 / sqrt(n_embd) lets a branch keep the size of what it reads; 0.02, as for GPT-2's width, makes the
        # demo learn
        # half as fast. 2 * n_layer branches add up, so each starts that much smaller
        std = config.n_embd ** -0.5
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif name.endswith(('o_proj.weight', 'down_proj.weight')):
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer))
            elif name.endswith('proj.weight'):
                nn.init.normal_(p, std=std)
            elif p.dim() == 2: # embedding and head: logits start small
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, pos=None, doc=None, learn=None, targets=None, weights=None, kv_cache=None,
                ids=None):
        """
        idx (B, T)
        pos (B, T)  positions, which restart with each document; None: 0 .. T-1
        doc (B, T)  number of the document that a position belongs to; None: a row is one document
        learn (N)   indices into the B*T positions, flattened: only these pass the head; None: all do
        targets (N) what follows them: returns the cross-entropy of each, losses (N) in fp32; where gradients
        are
                    enabled (total, losses), and the gradients are those of total, the sum of weights * losses
        weights (N) in that sum; None: ones
        kv_cache    the rows go on where it ends
        ids         the only ids to score, slice or indices: a speech slot allows 4,097 of 156,032; None: all
        Without targets returns logits, fp32: (N, V) or (B, T, V), with len(ids) instead of V.
        """
        B, T = idx.size()
        assert kv_cache is None or (pos is None and doc is None), 'a KV cache counts one document a row'
        if kv_cache is not None:
            kv_cache.advance(T)
            x = self.read_on(idx, kv_cache)
        else:
            pos = torch.arange(T, device=idx.device)[None] if pos is None else pos
            name = self.attention or fastest_attention(idx.device)
            x = self.read(idx, pos, attend_dense if doc is None else choose_attention(doc, name))

        if learn is not None: # the head is 28 % of the work, and 12 of 22 tokens of duplex3 need it
            x = x.flatten(0, 1)[learn] # (N, C)
        head = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight # (V, C)
        x = self.model.norm(x)
        if targets is None:
            return F.linear(x, head if ids is None else head[ids]).float()
        chunk = 4096 if x.is_cuda else 512 # 1.3 GB of logits, 0.16 GB: a CPU is no faster with more
        total, losses = linear_cross_entropy(x, head, targets, weights, chunk)
        return (total, losses) if torch.is_grad_enabled() else losses

    def read(self, idx, pos, attend, kv_cache=None):
        """idx (B, T), pos (B or 1, T) -> what the blocks make of it, (B, T, C)"""
        D = self.config.head_dim
        freq = self.config.rope_theta ** (-torch.arange(0, D, 2, device=idx.device).float() / D) # (D/2)
        angle = pos[:, :, None, None].float() * freq # (B, T, 1, D/2), the same for all heads and layers
        cos, sin = angle.cos(), angle.sin()
        x = self.model.embed_tokens(idx) # (B, T, C)
        for block in self.model.layers:
            x = block(x, cos, sin, attend, kv_cache)
        return x

    def read_on(self, idx, kv_cache):
        """The same where kv_cache, advanced by T, ends: without a word from the host."""
        pos, mask = kv_cache.place(idx.size(1))
        mask = mask.repeat(self.config.n_head // self.config.n_kv_head, 1)
        return self.read(idx, pos[None], partial(attend_grouped, mask=mask), kv_cache)

    def compile_blocks(self, backend='inductor'):
        """All blocks are compiled, as one: they differ by weights only. For batches of one shape (B, T)."""
        if self.attention is None and not self.model.norm.weight.is_cuda:
            self.attention = 'dense' # by document each batch would be compiled for its own lengths
        for block in self.model.layers:
            block.compile(fullgraph=True, dynamic=False, backend=backend)

    def n_param(self):
        return sum(p.numel() for p in self.parameters()) # a tied head counts once

    @torch.no_grad()
    def grow(self, vocab_size, new, n_text, how='spread', scale=0.5, words=None, seed=0):
        """
        Makes the vocabulary vocab_size long and gives the rows `new` a start, of the embedding and of an
        untied head alike; all others stay as they are. The paper doesn't say how; transformers'
        resize_token_embeddings draws with 1e-9 of the old covariance, by which all codes start the same.
        Here, by `how`:
            spread  mean of the n_text old rows, plus scale times their standard deviation, drawn for each
            words   the mean of the rows words[i] (ids that describe i); for those without description, spread
            normal  N(0, 0.02)
            zeros
        """
        if how not in ('spread', 'words', 'normal', 'zeros'):
            raise ValueError(f"new rows can start from 'spread', 'words', 'normal' or 'zeros', not {how!r}")
        untouched = set(range(len(self.model.embed_tokens.weight), vocab_size)) - set(new)
        assert not untouched, f'rows {sorted(untouched)[:5]} .. would have no start'
        generator, new = torch.Generator().manual_seed(seed), torch.tensor(new)
        for owner in [self.model.embed_tokens] + [self.lm_head] * (self.lm_head is not None):
            old = owner.weight
            rows = old.new_zeros(vocab_size, old.size(1)) # (V, C)
            rows[:len(old)] = old
            mean, std = 0.0, dict(normal=0.02).get(how, 0.0)
            if how in ('spread', 'words'):
                mean, std = old[:n_text].mean(0), scale * old[:n_text].std(0)
            rows[new] = mean + std * torch.randn(len(new), old.size(1), generator=generator)
            for i, ids in (words.items() if how == 'words' else ()):
                rows[i] = old[ids].mean(0)
            owner.weight = nn.Parameter(rows)
        self.config = replace(self.config, vocab_size=vocab_size)

    def flops_per_token(self, learned_share=1.0, mean_keys=0.0):
        """
        Training FLOPs that a token requires: 2 per matmul weight forward, twice that backward; the head for
        learned tokens only, attention for the keys that a query sees on average (T/2 in one causal document).
        nanoGPT and PaLM count T keys, which at T = 8,192 is 39 % more MFU for nothing.
        """
        config = self.config
        body = sum(p.numel() for p in self.model.layers.parameters() if p.dim() == 2)
        head = config.vocab_size * config.n_embd
        attention = 4 * config.n_layer * config.n_head * config.head_dim * mean_keys # q @ k and weights @ v
        return 3 * (2 * body + 2 * head * learned_share + attention)

    # -------------------------------------------------------------------------
    # Hugging Face folders

    @classmethod
    def from_pretrained(cls, folder):
        """Reads config.json and model.safetensors, or its shards, of a Hugging Face folder, as fp32."""
        config = read_config(folder)
        with torch.device('meta'): # shapes without storage: no time lost on random numbers
            model = cls(config)
        expected, weights = model.hf_state_dict(), read_weights(folder)
        if config.tie_embeddings:
            weights.pop('lm_head.weight', None) # some exporters write the tied matrix twice
        for name in sorted(expected.keys() | weights.keys()):
            if name not in weights:
                raise ValueError(f'{folder} lacks the tensor {name}; download or export it again')
            if name not in expected:
                raise ValueError(f'{folder} has a tensor {name} that its config.json does not; correct that')
            shape, asked = tuple(weights[name].shape), tuple(expected[name].shape)
            if shape != asked:
                raise ValueError(f'{folder}: {name} is {shape}, but {asked} by config.json; correct that')
            if weights[name].dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f'{folder}: {name} is {weights[name].dtype}, a quantised export; take the '
                                 'original in bfloat16')
        joined = {
            name: torch.cat([weights[part].float()
                             for part in hf_names(name)])
            for name in model.state_dict()}
        model.load_state_dict(joined, assign=True)
        return model

    def hf_state_dict(self):
        """The weights under Hugging Face's names, as views: what is one matrix here is up to three there."""
        config, weights = self.config, {}
        sizes = dict(
            qkv_proj=[n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)],
            gate_up_proj=[config.n_inner] * 2)
        for name, x in self.state_dict().items():
            owner = name.split('.')[-2]
            weights.update(zip(hf_names(name), x.split(sizes.get(owner, len(x))), strict=True))
        return weights

    def save_pretrained(self, folder, extra=None):
        """Writes what from_pretrained, transformers, vLLM, llama.cpp read; extra goes into config.json."""
        config, extra, folder = self.config, extra or {}, Path(folder)
        dtype = str(self.model.norm.weight.dtype).removeprefix('torch.')
        about = {theirs: getattr(config, ours) for ours, theirs in HF_NAMES.items()} | {
            'architectures': ['Qwen2ForCausalLM'],
            'model_type': 'qwen2',
            # twice, for transformers 4 and 5: without rope_theta, 4 takes 10,000 and says nothing
            'rope_theta': config.rope_theta,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': config.rope_theta},
            'torch_dtype': dtype,
            'dtype': dtype,
            'hidden_act': 'silu',
            'attention_dropout': 0.0,
            'initializer_range': 0.02,
            'use_cache': True,
            'use_sliding_window': False,
            'max_window_layers': config.n_layer,
        }
        special = ('bos_token_id', 'eos_token_id', 'pad_token_id')
        generation = {name: extra[name] for name in special if name in extra}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'config.json').write_text(json.dumps(about | extra, indent=2) + '\n')
        (folder / 'generation_config.json').write_text(json.dumps(generation, indent=2) + '\n')
        # tied: no lm_head.weight
        save_file(self.hf_state_dict(), folder / 'model.safetensors', metadata={'format': 'pt'})


# matrices that read the same x are one here, as one large matmul is faster: their rows in the files, one
# under the other
FUSED = dict(qkv_proj=('q_proj', 'k_proj', 'v_proj'), gate_up_proj=('gate_proj', 'up_proj'))

def hf_names(name):
    """A parameter's name here -> the names of its parts in Hugging Face's files."""
    *path, owner, kind = name.split('.')
    return ['.'.join([*path, part, kind]) for part in FUSED.get(owner, [owner])]

# ModelConfig's names and those of config.json; rope_theta has two places there
HF_NAMES = dict(
    vocab_size = 'vocab_size', block_size = 'max_position_embeddings', n_layer = 'num_hidden_layers',
    n_head = 'num_attention_heads', n_kv_head = 'num_key_value_heads', n_embd = 'hidden_size',
    n_inner = 'intermediate_size', norm_eps = 'rms_norm_eps', tie_embeddings = 'tie_word_embeddings',
)

def read_config(folder):
    path = Path(folder) / 'config.json'
    if not path.is_file():
        raise ValueError(f'{folder} has no config.json; give the folder of a Hugging Face Qwen2 model')
    defaults = dict(tie_word_embeddings=False, hidden_act='silu', use_sliding_window=False, rope_theta=1e4)
    config = defaults | json.loads(path.read_text(encoding='utf-8')) # transformers assumes the same
    rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
    config['rope_type'] = rope.get('rope_type', rope.get('type', 'default'))
    known_values = dict(model_type='qwen2', hidden_act='silu', rope_type='default', use_sliding_window=False)
    for name, known in known_values.items():
        if config.get(name) != known:
            raise ValueError(f'{path}: {name} is {config.get(name)!r}, only {known!r} is known here')
    for name in HF_NAMES.values():
        if name not in config:
            raise ValueError(f'{path} lacks {name}; take the config.json that came with the weights')
    sizes = {ours: config[theirs] for ours, theirs in HF_NAMES.items()}
    return ModelConfig(**sizes, rope_theta=rope.get('rope_theta', config['rope_theta']))

def read_weights(folder):
    index, names = Path(folder) / 'model.safetensors.index.json', ['model.safetensors']
    if index.is_file(): # sharded
        names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
    weights = {}
    for path in (Path(folder) / name for name in names):
        if not path.is_file():
            raise ValueError(f'{folder} has no {path.name}; download it, or convert what there is')
        try:
            weights |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f'{path} is no complete safetensors file ({error}); download it again') from None
    return weights
