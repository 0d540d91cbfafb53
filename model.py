"""
Qwen2 in one file: the unmodified text model that learns to listen and to speak (arXiv 2407.10671).
Its state dict carries Hugging Face's own names, so a checkpoint folder opens in transformers, and back.

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
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F


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

# -----------------------------------------------------------------------------
# attention: two ways to the same numbers

def attend_dense(q, k, v, mask=None):
    """q (B, T, H, D), k, v (B, S, K, D) -> (B, T, H, D). No mask: causal, or one new token that sees all."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2) # (B, heads, T or S, D)
    is_causal = mask is None and q.size(2) == k.size(2)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)
    return y.transpose(1, 2)

def attend_by_document(q, k, v, lengths):
    """The same on packed rows, a causal call per document: on a CPU 2 to 3 times as fast as a mask."""
    q, k, v = (x.flatten(0, 1).split(lengths) for x in (q, k, v)) # of each document (length, heads, D)
    return torch.cat([attend_dense(*(x[None] for x in qkv)) for qkv in zip(q, k, v, strict=True)], dim=1)

def document_lengths(doc):
    """doc (B, T) -> the lengths of all documents, row after row; each is contiguous and ends with its row."""
    is_start = torch.ones_like(doc, dtype=torch.bool)
    is_start[:, 1:] = doc[:, 1:] != doc[:, :-1]
    starts = is_start.flatten().nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([doc.numel()])).tolist()

def document_mask(doc):
    """doc (B, T) -> (B, 1, T, T), True where a query (row) may look at a key (column)."""
    return (doc[:, None, :, None] == doc[:, None, None, :]).tril()

def choose_attention(idx, doc, kv_cache):
    """What all layers do alike, worked out once per forward."""
    T = idx.size(1)
    if doc is not None and idx.device.type == 'cpu':
        return partial(attend_by_document, lengths=document_lengths(doc))
    if doc is not None:
        return partial(attend_dense, mask=document_mask(doc))
    if kv_cache is not None and kv_cache.len > 0 and T > 1: # all that is cached, and causal among the new
        mask = torch.ones(T, kv_cache.len + T, dtype=torch.bool, device=idx.device).tril(kv_cache.len)
        return partial(attend_dense, mask=mask)
    return attend_dense


class KVCache:
    """
    Keys and values of the positions read so far, oldest first; keys are stored after their rotation. With
    RoPE a score depends on the distance of query and key only, so nothing moves when the oldest leave:
    positions just keep counting (next_pos), beyond max_len too. After an hour of conversation, 200,000
    tokens, an fp32 angle is still good to 0.01 rad.
    """

    def __init__(self, model, n_row, max_len):
        config, weight = model.config, model.model.norm.weight # stored in the model's dtype, on its device
        shape = (config.n_layer, n_row, config.n_kv_head, max_len, config.head_dim)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.max_len = max_len
        self.len = 0        # positions held; moved by the model, once all layers have seen the new ones
        self.next_pos = 0   # positions ever seen

    def extend(self, layer, k, v):
        """k, v (B, T, K, D) of the new positions -> those of all positions, (B, len + T, K, D)"""
        end = self.len + k.size(1)
        assert end <= self.max_len, f'{end} positions in a KV cache of {self.max_len}, drop() some'
        keys, values = self.keys[layer, :, :, :end], self.values[layer, :, :, :end] # (B, K, end, D)
        keys[:, :, self.len:] = k.transpose(1, 2)
        values[:, :, self.len:] = v.transpose(1, 2)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def drop(self, n):
        """Forgets the n oldest positions."""
        assert 0 <= n <= self.len, f'cannot drop {n} of {self.len} positions'
        for x in (self.keys, self.values):
            x[:, :, :, :self.len - n] = x[:, :, :, n:self.len].clone() # a copy, as source and target overlap
        self.len -= n

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
        self.q_proj = nn.Linear(C, config.n_head * D) # Qwen2 has biases here and nowhere else
        self.k_proj = nn.Linear(C, config.n_kv_head * D)
        self.v_proj = nn.Linear(C, config.n_kv_head * D)
        self.o_proj = nn.Linear(config.n_head * D, C, bias=False)

    def forward(self, x, cos, sin, attend, kv_cache):
        B, T, C = x.size()
        q = rotate(self.q_proj(x).view(B, T, -1, self.head_dim), cos, sin) # (B, T, H, D)
        k = rotate(self.k_proj(x).view(B, T, -1, self.head_dim), cos, sin) # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)                   # (B, T, K, D)
        if kv_cache is not None:
            k, v = kv_cache.extend(self.layer, k, v) # (B, S, K, D)
        return self.o_proj(attend(q, k, v).reshape(B, T, C))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


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
        self.model = nn.ModuleDict(dict(
            embed_tokens = nn.Embedding(config.vocab_size, config.n_embd),
            layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            norm = nn.RMSNorm(config.n_embd, config.norm_eps),
        ))
        is_tied = config.tie_embeddings
        self.lm_head = None if is_tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # 1 / sqrt(n_embd) lets a branch keep the size of what it reads; 0.02, as for GPT-2's width, makes the demo learn
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

    def forward(self, idx, pos=None, doc=None, learn=None, targets=None, kv_cache=None, ids=None):
        """
        idx (B, T)
        pos (B, T)  positions, which restart with each document; None: 0 .. T-1
        doc (B, T)  number of the document that a position belongs to; None: a row is one document
        learn (N)   indices into the B*T positions, flattened: only these pass the head; None: all do
        targets (N) what follows them: returns the cross-entropy of each (N), fp32, for the caller to sum
        kv_cache    the rows go on where it ends
        ids         the only ids to score, slice or indices: a speech slot allows 4,097 of 156,032; None: all
        Without targets returns logits, fp32: (N, V) or (B, T, V), with len(ids) instead of V.
        """
        B, T = idx.size()
        assert kv_cache is None or (pos is None and doc is None), 'a KV cache counts one document a row'
        if pos is None:
            start = 0 if kv_cache is None else kv_cache.next_pos
            pos = torch.arange(start, start + T, device=idx.device).expand(B, T)
        D = self.config.head_dim
        freq = self.config.rope_theta ** (-torch.arange(0, D, 2, device=idx.device).float() / D) # (D/2)
        angle = pos[:, :, None, None].float() * freq # (B, T, 1, D/2), the same for all heads and layers
        cos, sin = angle.cos(), angle.sin()
        attend = choose_attention(idx, doc, kv_cache)

        x = self.model.embed_tokens(idx) # (B, T, C)
        for block in self.model.layers:
            x = block(x, cos, sin, attend, kv_cache)
        if kv_cache is not None:
            kv_cache.len += T
            kv_cache.next_pos += T

        if learn is not None: # the head is 28 % of the work, and 12 of 22 tokens of duplex3 need it
            x = x.flatten(0, 1)[learn] # (N, C)
        head = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight # (V, C)
        logits = F.linear(self.model.norm(x), head if ids is None else head[ids]).float()
        return logits if targets is None else F.cross_entropy(logits, targets, reduction='none')

    def n_param(self):
        return sum(p.numel() for p in self.parameters()) # a tied head counts once

    @torch.no_grad()
    def grow(self, vocab_size, new, n_text, how='spread', scale=0.5, words=None, seed=0):
        """
        Makes the vocabulary vocab_size long and gives the rows `new` a start, of the embedding and of an untied head
        alike; all others stay as they are. The paper doesn't say how; transformers' resize_token_embeddings draws
        with 1e-9 of the old covariance, by which all codes start the same. Here, by `how`:
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
        expected, weights = model.state_dict(), read_weights(folder)
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
                raise ValueError(f'{folder}: {name} is {weights[name].dtype}, a quantised export; take the original in bfloat16')
        model.load_state_dict({name: x.float() for name, x in weights.items()}, assign=True)
        return model

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
        weights = {name: x.contiguous() for name, x in self.state_dict().items()} # tied: no lm_head.weight
        save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})


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
