"""
Qwen2 in one file: the unmodified text model that learns to listen and to speak (arXiv 2407.10671).
Its files carry Hugging Face's names, so transformers opens our checkpoint folders and we open theirs.

    idx (B, T) ─ embed_tokens ─► x (B, T, C) ─► n_layer blocks ─► learned rows ─ norm, head ─► logits (N, V)

    a block:
      x ─┬─ RMSNorm ─┬─ q (B, T, H, D) ─ RoPE ─┐
         │           ├─ k (B, T, K, D) ─ RoPE ─┼─ attention per document ─ o ─ + ─┬─ RMSNorm ─ SwiGLU ─ + ─►
         │           └─ v (B, T, K, D) ────────┘ (H / K heads of q share k, v) │  │                     │
         └─────────────────────────────────────────────────────────────────────┘  └─────────────────────┘

    B rows   T positions   C channels (n_embd)   H query heads   K key and value heads   D channels of a head
    S positions to attend to   V ids in the vocabulary   N positions to score

A packed row holds several documents, one after the other. A query attends to its own document only, and
positions restart with each document. A learned position is one whose prediction counts in the loss.

A GPU sync: Python queues work for a GPU and runs ahead of it. When Python asks for a value (.item(),
.tolist(), a shape that depends on values), it waits until the queue is empty, and then the GPU idles until
Python has queued more. So here no pass on a GPU asks for a value.

    model = Qwen2(ModelConfig(1024, 1024, n_layer=4, n_head=6, n_kv_head=2, n_embd=192, n_inner=512))
    model = Qwen2.from_pretrained('Qwen2-0.5B')
"""

import json
import math
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from common.files import read_json


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    block_size: int             # longest context in tokens; the model ignores it, as RoPE needs no table
    n_layer: int
    n_head: int
    n_kv_head: int              # fewer than n_head: the KV cache is n_head / n_kv_head times smaller (GQA)
    n_embd: int
    n_inner: int                # width inside SwiGLU
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tie_embeddings: bool = True # embedding and head share a matrix: 28 % of Qwen2-0.5B's parameters

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

@cache # one per function; called late, as torch.compile imports seconds' worth of modules
def compiled(function, **settings):
    return torch.compile(function, **settings)

# ------------------------------------------------------------------------------------------------------------
# attention: four implementations for packed rows with equal results; fastest_attention picks one by device

def attend_dense(q, k, v, mask=None):
    """q (B, T, H, D), k, v (B, S, K, D) -> (B, T, H, D). No mask: causal if T = S, else all see all keys."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2) # (B, heads, T or S, D)
    is_causal = mask is None and q.size(2) == k.size(2)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)
    return y.transpose(1, 2)

def attend_by_document(q, k, v, lengths):
    """
    Packed rows with one causal call per document -> (1, B * T, H, D); lengths are those of document_lengths.
    On a CPU this is 2 to 3 times as fast as a mask. In bf16, documents of 64 to 1,024 tokens go through
    attend_in_blocks, which takes 0.6 times as long; longer ones would need too much memory there, T * T * H.
    """
    q, k, v = (x.flatten(0, 1).split(lengths) for x in (q, k, v)) # per document (length, heads, D)
    y = []
    for q_doc, k_doc, v_doc in zip(q, k, v, strict=True):
        use_blocks = q_doc.dtype == torch.bfloat16 and 64 <= len(q_doc) <= 1024
        attend = attend_in_blocks if use_blocks else attend_dense
        y.append(attend(q_doc[None], k_doc[None], v_doc[None])) # (1, length, H, D)
    return torch.cat(y, dim=1)

@cache
def causal_bias(start, n, G, dtype):
    """(1, n * G, start + n): 0 where queries from start on may see a key, else -inf; G rows a query."""
    return torch.full((n, start + n), -torch.inf, dtype=dtype).triu(start + 1).repeat_interleave(G, 0)[None]

def attend_in_blocks(q, k, v, n=128):
    """q (B, T, H, D), k, v (B, T, K, D) -> (B, T, H, D), causal, in plain matmuls for n queries at a time."""
    (B, T, H, D), K = q.size(), k.size(2)
    G = H // K # the query heads that share k and v become G times as many rows of one matmul
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
    """doc (B, T) -> (B, T), True where a document starts. Documents are contiguous and end with their row."""
    starts = torch.ones_like(doc, dtype=torch.bool)
    starts[:, 1:] = doc[:, 1:] != doc[:, :-1]
    return starts

def document_lengths(doc):
    """doc (B, T) -> the lengths of all documents, row after row. A list, hence a sync: for CPUs."""
    starts = is_start(doc).flatten().nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([doc.numel()])).tolist()

def document_starts(doc):
    """doc (B, T) -> (B, T): for each position, the position in its row where its document starts."""
    place = torch.arange(doc.size(1), device=doc.device).expand_as(doc)
    return torch.where(is_start(doc), place, 0).cummax(dim=1).values

def document_blocks(doc, size=128):
    """
    doc (B, T) -> BlockMask, for (2, 8192) in 2 ms on a CPU, where create_block_mask takes 0.9 s; no GPU sync.

    flex_attention works on tiles of size queries by size keys. For each block of queries a BlockMask lists
    the key blocks that all its queries see whole (full), and those that they see in part (partial), where
    mask_mod decides. All other key blocks are skipped. A row of two documents, a and b, with size = 8:

        key block           0         1         2         3         4
        documents       aaaaaaaa  aaaaabbb  bbbbbbbb  bbbbbbbb  bbbbbbbb     first  first_full
        query block 0   partial                                                0        0
                    1   partial   partial                                      0        1
                    2             partial   partial                            1        2
                    3             partial   full      partial                  1        2
                    4             partial   full      full      partial        1        2

    A query sees the keys from the start of its document up to itself. So in query block i the first query
    sees furthest to the left: from key block first on. The last query's document starts last, and first_full
    is the first key block after that start: from there on all queries see all keys, except in block i, where
    each sees one key more than the query before. Partial: first .. first_full - 1, and i. Full: the others.
    """
    B, T = doc.size()
    n = -(-T // size) # blocks in a row
    i = torch.arange(n, device=doc.device) # (n), numbers of query blocks, and of the places in a list
    start = document_starts(doc)
    padded = F.pad(start, (0, n * size - T), value=T) # the queries that fill the last block see no key
    first = padded[:, ::size] // size # (B, n)
    first_full = ((padded[:, size - 1::size] + size - 1) // size).minimum(i) # (B, n), rounded up to a block
    n_partial, n_full = first_full - first + 1, i - first_full # (B, n)
    # (B, n, n): a list for each query block; only its first n_partial or n_full entries count
    partial_blocks = (first[:, :, None] + i).minimum(i[:, None])
    partial_blocks = torch.where(i == n_partial[:, :, None] - 1, i[:, None], partial_blocks) # the last is i
    full_blocks = (first_full[:, :, None] + i).minimum(i[:, None])
    lists = [x.int()[:, None] for x in (n_partial, partial_blocks, n_full, full_blocks)] # 1 for all heads
    is_visible = lambda b, h, query, key: (key >= start[b, query]) & (key <= query)
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=size, seq_lengths=(T, T), mask_mod=is_visible)

def attend_flex(q, k, v, block_mask):
    """FlexAttention, for Hopper: a fused kernel once compiled, with the block around it or by itself."""
    is_alone = q.is_cuda and not torch.compiler.is_compiling()
    flex = compiled(flex_attention, dynamic=False) if is_alone else flex_attention
    # copies (33 MB for 32,768 tokens), as k and v are views into a larger tensor, and a CPU's kernel reads
    # from the start of that (pytorch #157612)
    k, v = (x.transpose(1, 2).contiguous() for x in (k, v)) # (B, K, T, D)
    return flex(q.transpose(1, 2), k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)

def document_ends(doc):
    """
    doc (B, T) -> int32 (n_document + 1): 0 and where each document ends among the B * T positions.
    FlashAttention is set up anew for another number of documents. So there are always B * T / 64, at least
    256; those that do not exist have length 0 and cost nearly nothing. That is plenty: 16 for a row of 1,024
    tokens, which in speech recognition holds 3.
    """
    n_document = max(doc.numel() // 64, 256)
    number = is_start(doc).flatten().cumsum(0) - 1 # (B * T), of each position's document
    torch._assert_async(number[-1] < n_document,
                        f'over {n_document} documents in a batch of {tuple(doc.shape)} tokens')
    return torch.searchsorted(number, torch.arange(n_document + 1, device=doc.device), out_int32=True)

def attend_varlen(q, k, v, ends):
    """FlashAttention 2, in bf16: on an A100 faster than flex."""
    from torch.nn.attention.varlen import varlen_attn  # 1 s of imports
    B, T, H, D = q.size()
    gqa = dict(enable_gqa=True) if 'enable_gqa' in signature(varlen_attn).parameters else {} # from torch 2.12
    if H != k.size(2) and not gqa:
        k, v = (x.repeat_interleave(H // x.size(2), dim=2) for x in (k, v)) # (B, T, H, D)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    # window_size: all keys to the left, none to the right
    return varlen_attn(q, k, v, ends, ends, T, T, window_size=(-1, 0), **gqa).view(B, T, H, D)

def fastest_attention(device):
    if device.type != 'cuda':
        return 'by_document'
    is_ampere = torch.cuda.get_device_capability(device)[0] == 8
    # FlashAttention cannot do fp32
    return 'varlen' if is_ampere and torch.is_autocast_enabled('cuda') else 'flex'

def choose_attention(doc, name):
    """-> attend(q, k, v) for packed rows; what all layers need of doc is computed here, once per forward."""
    if name == 'flex':
        return partial(attend_flex, block_mask=document_blocks(doc))
    if name == 'varlen':
        return partial(attend_varlen, ends=document_ends(doc))
    if name == 'by_document':
        return partial(attend_by_document, lengths=document_lengths(doc))
    assert name == 'dense', name
    is_same_document = doc[:, None, :, None] == doc[:, None, None, :] # (B, 1, T of queries, T of keys)
    return partial(attend_dense, mask=is_same_document.tril())

def attend_grouped(q, k, v, mask):
    """
    For few queries and a KV cache: q (B, T, H, D), k, v (B, S, K, D), mask (B or 1, 1, H / K * T, S), which
    is added to the scores -> (B, T, H, D). Heads that share k and v are laid end to end as one head's
    queries, so k and v are read once, not H / K times: in bf16 on a CPU one token at S = 512 takes 0.07 ms
    instead of 0.79.
    """
    (B, T, H, D), K = q.size(), k.size(2)
    rows = q.transpose(1, 2).reshape(B, K, H // K * T, D).to(k.dtype)
    y = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), mask)
    return y.reshape(B, H, T, D).transpose(1, 2).to(q.dtype)

class KVCache:
    """
    Keys and values of the latest positions, in a ring: position p lies in slot p % max_len, so forgetting the
    oldest moves nothing. Keys are stored after their rotation, and a score depends on the distance of query
    and key only: positions just keep counting (next_pos), beyond max_len too. After an hour of conversation,
    200,000 tokens, an fp32 angle is still good to 0.01 rad.

    Python calls advance() before each pass. All the rest is work on the device, from tensors that stay at
    their addresses, so that a CUDA graph can capture it once and replay it.
    """

    def __init__(self, model, n_row, max_len, bucket=256, dtype=None):
        config, weight = model.config, model.model.norm.weight # dtype None: the model's
        # a slot more than is ever used: torch.compile would compile "all slots" apart from "some of them"
        shape = (n_row, config.n_kv_head, max_len + 1, config.head_dim)
        # a tensor a layer: of one tensor for all layers a compiled pass would copy the whole to change a part
        zeros = partial(torch.zeros, device=weight.device)
        self.keys, self.values = ([zeros(shape, dtype=dtype or weight.dtype) for _ in range(config.n_layer)]
                                  for _ in range(2))
        self.max_len, self.bucket = max_len, bucket
        self.len = 0        # positions held
        self.next_pos = 0   # positions ever seen
        # the device's copies: the oldest position held, the first of this pass
        self.oldest, self.first_new = zeros((), dtype=torch.int64), zeros((), dtype=torch.int64)

    def advance(self, T):
        """Makes room for T new positions."""
        new_len = self.len + T
        assert new_len <= self.max_len, f'{new_len} positions in a KV cache of {self.max_len}, drop() some'
        self.oldest.fill_(self.next_pos - self.len)
        self.first_new.fill_(self.next_pos)
        self.len = new_len
        self.next_pos += T
        self.n_slot = self.count_slots(self.next_pos)

    def count_slots(self, n_pos):
        """-> slots that attention reads once n_pos positions were seen. It reads whole buckets: there are few
        shapes, and a short context does not pay for max_len."""
        return min(self.max_len, -(-n_pos // self.bucket) * self.bucket)

    def place(self, T):
        """-> pos (1, T) of the new positions; mask (1, 1, T, S), 0 where they may see a slot, else -inf."""
        pos = self.first_new + torch.arange(T, device=self.first_new.device)
        self.new_slots = pos % self.max_len
        slots = torch.arange(self.n_slot, device=pos.device)
        held = pos[-1] - (pos[-1] - slots) % self.max_len # (S), the latest position in each; below 0: none
        is_visible = (held >= self.oldest) & (held <= pos[:, None])
        return pos[None], self.mask_of(is_visible[None, None])

    def mask_of(self, is_visible):
        return torch.zeros_like(is_visible, dtype=self.keys[0].dtype).masked_fill_(~is_visible, -torch.inf)

    def extend(self, layer, k, v):
        """k, v (B, T, K, D) of the new positions -> those of all slots, (B, S, K, D)."""
        rings = self.keys[layer], self.values[layer] # (B, K, max_len + 1, D) each
        for ring, new in zip(rings, (k, v)):
            ring.index_copy_(2, self.new_slots, new.transpose(1, 2).to(ring.dtype))
        return (ring[:, :, :self.n_slot].transpose(1, 2) for ring in rings)

    def drop(self, n):
        """Forgets the n oldest positions."""
        assert 0 <= n <= self.len, f'cannot drop {n} of {self.len} positions'
        self.len -= n

    def keep(self, n_row):
        """Forgets all rows but the first n_row."""
        self.keys, self.values = ([x[:n_row].clone() for x in rings] for rings in (self.keys, self.values))

# ------------------------------------------------------------------------------------------------------------
# head and loss: 156,032 logits a row are too many to store for all rows at once, so they come in chunks

def score(logits, targets, weights):
    """logits (n, V) -> losses (n), fp32, and the gradient of sum(weights * losses), as large as logits."""
    x = logits.to(torch.float32, copy=True)
    lse = x.logsumexp(-1, keepdim=True) # (n, 1)
    losses = lse - x.gather(1, targets[:, None]) # (n, 1)
    # d loss / d logit is the probability, minus 1 at the target; one pass over the logits when compiled
    gradient = x.sub_(lse).exp_().mul_(weights[:, None]).type_as(logits)
    # probability - 1 is expm1(-loss), which stays exact where the loss is small
    at_target = torch.expm1(-losses) * weights[:, None]
    return losses[:, 0], gradient.scatter_(1, targets[:, None], at_target.type_as(logits))

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
            if x.is_cuda: # dynamic, as the last chunk's size varies
                losses[part], gradient = compiled(score, dynamic=True)(logits, targets[part], weights[part])
            else: # 32 rows, 20 MB in fp32, stay in the cache; their gradient takes the place of their logits
                gradient = logits
                for at in range(0, len(logits), 32):
                    few = slice(i + at, min(i + at + 32, i + chunk))
                    losses[few], logits[at:at + 32] = score(logits[at:at + 32], targets[few], weights[few])
            if with_gradient:
                d_rows[part] = gradient @ matrix
                add_product(d_head, gradient, rows[part])
        if with_gradient:
            ctx.gradients, ctx.dtypes = (d_rows, d_head), (x.dtype, head.dtype)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx, d_total, _):
        assert ctx.gradients, 'backward ran twice, but changes the gradients in place, as a copy takes 0.6 GB'
        (d_rows, d_head), (x_dtype, head_dtype), ctx.gradients = ctx.gradients, ctx.dtypes, None
        d_x, d_head = d_rows.mul_(d_total).to(x_dtype), d_head.mul_(d_total).to(head_dtype)
        return d_x, d_head, None, None, None, None, None

def linear_cross_entropy(x, head, targets, weights=None, chunk=4096):
    """
    x (N, C), head (V, C), targets (N), weights (N) or None for ones -> total, the sum of weights * losses,
    and losses (N) without gradient; both fp32. The gradients of x and head are computed in the forward pass,
    chunk rows at a time: 3 matmuls, where recomputing the logits in backward takes 4. The head's gradient is
    summed in fp32, also where matmuls are in bf16. Each chunk reads the head twice and its gradient once, so
    chunks are large: with 256 rows a GPU spends longer on that than on the matmuls.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights
    with torch.autocast(kind, enabled=False):
        return LinearCrossEntropy.apply(x, head, targets, weights, chunk, dtype, torch.is_grad_enabled())

# ------------------------------------------------------------------------------------------------------------
# the model

def rotate(x, cos, sin):
    """RoPE on x (B, T, heads, D): channel i turns with i + D/2 (Hugging Face), not with i + 1 (the paper)."""
    a, b = x.chunk(2, dim=-1)
    y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return y.type_as(x) # cos and sin are fp32, x may be bf16

class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        # Qwen2 has biases here and nowhere else
        self.qkv_proj = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

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
        self.attention = None # for packed rows: a name of choose_attention's; None: fastest_attention's
        self.model = nn.ModuleDict(dict(
            embed_tokens = nn.Embedding(config.vocab_size, config.n_embd),
            layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            norm = nn.RMSNorm(config.n_embd, config.norm_eps)))
        is_tied = config.tie_embeddings
        self.lm_head = None if is_tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # with std 1 / sqrt(n_embd) a branch's output is as large as its input; with GPT-2's 0.02 the demo
        # learns half as fast. 2 * n_layer branches add up, so the last matrix of each starts smaller
        std = config.n_embd ** -0.5
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif name.endswith(('o_proj.weight', 'down_proj.weight')): # the last of a branch
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
        learn (N)   indices of the learned positions among the B * T: only these pass the head; None: all do
        targets (N) ids to predict there -> losses (N), the cross-entropy of each, fp32. Where gradients are
                    enabled -> (total, losses): call backward on total, the sum of weights * losses
        weights (N) of the losses in that sum; None: ones
        kv_cache    continue its rows
        ids         score only these ids, a slice or indices: a speech slot allows 4,097 of 156,032; None: all
        Without targets -> logits, fp32: (N, V) or (B, T, V), with len(ids) instead of V.
        """
        B, T = idx.size()
        assert kv_cache is None or (pos is None and doc is None), 'a KV cache counts one document a row'
        if kv_cache is not None:
            kv_cache.advance(T)
            x = self.run_blocks_cached(idx, kv_cache)
        else:
            pos = torch.arange(T, device=idx.device)[None] if pos is None else pos
            name = self.attention or fastest_attention(idx.device)
            x = self.run_blocks(idx, pos, attend_dense if doc is None else choose_attention(doc, name))

        if learn is not None: # the head is 28 % of the work, and 12 of 22 tokens of duplex3 need it
            x = x.flatten(0, 1)[learn] # (N, C)
        head = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight # (V, C)
        x = self.model.norm(x)
        if targets is None:
            return F.linear(x, head if ids is None else head[ids]).float()
        chunk = 4096 if x.is_cuda else 512 # 1.3 GB of logits, 0.16 GB: a CPU is no faster with more
        total, losses = linear_cross_entropy(x, head, targets, weights, chunk)
        return (total, losses) if torch.is_grad_enabled() else losses

    def run_blocks(self, idx, pos, attend, kv_cache=None):
        """idx (B, T), pos (B or 1, T) -> embedding and all blocks, without the last norm: (B, T, C)."""
        D = self.config.head_dim
        freq = self.config.rope_theta ** (-torch.arange(0, D, 2, device=idx.device).float() / D) # (D/2)
        angle = pos[:, :, None, None].float() * freq # (B, T, 1, D/2), the same for all heads and layers
        cos, sin = angle.cos(), angle.sin()
        x = self.model.embed_tokens(idx) # (B, T, C)
        for block in self.model.layers:
            x = block(x, cos, sin, attend, kv_cache)
        return x

    def run_blocks_cached(self, idx, kv_cache):
        """run_blocks for the positions that kv_cache.advance(T) made room for; without a GPU sync."""
        pos, mask = kv_cache.place(idx.size(1))
        mask = mask.repeat(1, 1, self.config.n_head // self.config.n_kv_head, 1)
        return self.run_blocks(idx, pos, partial(attend_grouped, mask=mask), kv_cache)

    def wrap_blocks(self, compiles=False, checkpoints=False, backend='inductor'):
        """
        compiles    compile one block for all, as they differ in weights only; for batches of one shape (B, T)
        checkpoints keep only the blocks' inputs for backward, which computes them again: a third more work
        """
        if compiles and self.attention is None and not self.model.norm.weight.is_cuda:
            self.attention = 'dense' # by_document would compile each batch for its own lengths
        for block in self.model.layers:
            forward = Block.forward.__get__(block) # what FSDP does before and after forward stays outside
            if compiles:
                forward = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend)
            if checkpoints: # there is no dropout, so no random numbers to restore
                forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
            block.forward = forward

    def n_param(self):
        return sum(p.numel() for p in self.parameters()) # a tied head counts once

    def flops_per_token(self, learned_share=1.0, mean_keys=0.0):
        """
        FLOPs that training needs for a token: 2 per matmul weight forward and 4 backward; the head for
        learned tokens only, attention for the keys that a query sees on average (T/2 in one causal document).
        nanoGPT and PaLM count T keys, which at T = 8,192 reports 39 % more MFU for the same speed.
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
        """Reads config.json and model.safetensors, or its shards, of a Hugging Face folder, as fp32. Raises
        ValueError, one sentence with the folder, if they are missing, broken or do not fit each other."""
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
            shape, wanted = tuple(weights[name].shape), tuple(expected[name].shape)
            if shape != wanted:
                raise ValueError(f'{folder}: {name} is {shape}, but {wanted} by config.json; correct that')
            if weights[name].dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f'{folder}: {name} is {weights[name].dtype}, a quantised export; take the '
                                 'original in bfloat16')
        joined = {name: torch.cat([weights[part].float() for part in hf_names(name)])
                  for name in model.state_dict()}
        model.load_state_dict(joined, assign=True)
        return model

    def hf_state_dict(self):
        """The weights under Hugging Face's names, as views: a fused matrix here is two or three there."""
        config, weights = self.config, {}
        n_kv = config.n_kv_head * config.head_dim
        n_rows = dict(qkv_proj=[config.n_embd, n_kv, n_kv], gate_up_proj=[config.n_inner] * 2)
        for name, x in self.state_dict().items():
            layer = name.split('.')[-2]
            weights.update(zip(hf_names(name), x.split(n_rows.get(layer, len(x))), strict=True))
        return weights

    def save_pretrained(self, folder, extra=None):
        """Writes what from_pretrained, transformers, vLLM, llama.cpp read; extra goes into config.json."""
        config, extra, folder = self.config, extra or {}, Path(folder)
        dtype = str(self.model.norm.weight.dtype).removeprefix('torch.')
        content = {theirs: getattr(config, ours) for ours, theirs in HF_NAMES.items()} | dict(
            architectures=['Qwen2ForCausalLM'], model_type='qwen2',
            # transformers 4 reads this one, and silently takes 10,000 without it; 5 reads rope_parameters
            rope_theta=config.rope_theta,
            rope_parameters=dict(rope_type='default', rope_theta=config.rope_theta),
            torch_dtype=dtype, dtype=dtype, hidden_act='silu', attention_dropout=0.0, initializer_range=0.02,
            use_cache=True, use_sliding_window=False, max_window_layers=config.n_layer)
        special = ('bos_token_id', 'eos_token_id', 'pad_token_id')
        generation = {name: extra[name] for name in special if name in extra}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'config.json').write_text(json.dumps(content | extra, indent=2) + '\n')
        (folder / 'generation_config.json').write_text(json.dumps(generation, indent=2) + '\n')
        # a tied model has no lm_head.weight
        save_file(self.hf_state_dict(), folder / 'model.safetensors', metadata={'format': 'pt'})

# matrices that read the same x are one here, their rows one under the other, as a large matmul is faster
FUSED = dict(qkv_proj=('q_proj', 'k_proj', 'v_proj'), gate_up_proj=('gate_proj', 'up_proj'))

def hf_names(name):
    """A parameter's name here -> the names of its parts in Hugging Face's files."""
    *path, layer, kind = name.split('.')
    return ['.'.join([*path, part, kind]) for part in FUSED.get(layer, [layer])]

# ModelConfig's names and those of config.json; rope_theta has two places there
HF_NAMES = dict(
    vocab_size = 'vocab_size', block_size = 'max_position_embeddings', n_layer = 'num_hidden_layers',
    n_head = 'num_attention_heads', n_kv_head = 'num_key_value_heads', n_embd = 'hidden_size',
    n_inner = 'intermediate_size', norm_eps = 'rms_norm_eps', tie_embeddings = 'tie_word_embeddings')

def read_config(folder):
    path = Path(folder) / 'config.json'
    if not path.is_file():
        raise ValueError(f'{folder} has no config.json; give the folder of a Hugging Face Qwen2 model')
    # what transformers assumes
    defaults = dict(tie_word_embeddings=False, hidden_act='silu', use_sliding_window=False, rope_theta=1e4)
    config = defaults | read_json(path)
    rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
    config['rope_type'] = rope.get('rope_type', rope.get('type', 'default'))
    supported = dict(model_type='qwen2', hidden_act='silu', rope_type='default', use_sliding_window=False)
    for name, value in supported.items():
        if config.get(name) != value:
            raise ValueError(f'{path}: {name} is {config.get(name)!r}, but only {value!r} is supported here')
    for name in HF_NAMES.values():
        if name not in config:
            raise ValueError(f'{path} lacks {name}; take the config.json that came with the weights')
    sizes = {ours: config[theirs] for ours, theirs in HF_NAMES.items()}
    return ModelConfig(**sizes, rope_theta=rope.get('rope_theta', config['rope_theta']))

def read_weights(folder):
    """-> {name: tensor} of model.safetensors, or of all shards that its index names."""
    index, names = Path(folder) / 'model.safetensors.index.json', ['model.safetensors']
    if index.is_file():
        names = sorted(set(read_json(index)['weight_map'].values()))
    weights = {}
    for path in (Path(folder) / name for name in names):
        if not path.is_file():
            raise ValueError(f'{folder} has no {path.name}; download it, or convert what there is')
        try:
            weights |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f'{path} is no complete safetensors file ({error}); download it again') from None
    return weights
