"""
What the rows of new ids start from, in the embedding and in the head, when a model of text learns to hear and
to talk. The paper does not say. In transformers' resize_token_embeddings all codes start the same, as it
draws with 1e-9 of the old rows' covariance.
"""
from dataclasses import replace

import torch

from vocabulary import CONTROL


def describe(name):
    """'<|silent_text|>' -> words for it"""
    return CONTROL.get(name) or name.strip('<|>').replace('_', ' ')


def project(vectors, n_embd, generator):
    """(n, d) -> (n, n_embd): as like one another as before, each number N(0, 1) over all"""
    x = vectors - vectors.mean(0)
    x = x / x.square().sum(1).mean().sqrt()         # of length 1, on average
    return x @ torch.randn(x.size(1), n_embd, generator=generator)


@torch.no_grad()
def grow(model, vocab, new, how='spread', scale=0.5, vectors=None, seed=0):
    """
    Makes a model's vocabulary vocab.size long and gives the rows `new` a start, in the embedding and in an
    untied head; all other rows stay. By how:

        spread  mean of the text's rows, plus scale times their standard deviation, drawn for each
        words   of a control token the mean of the rows of words that describe it; spread for the others
        codec   spread, but codes that the codec takes for alike start alike: instead of being drawn, what it
                knows of each, vectors (n_codes, d), is projected at random
        normal  N(0, 0.02)
        zeros
    """
    ways = 'spread', 'words', 'codec', 'normal', 'zeros'
    if how not in ways:
        raise ValueError(f'new rows can start from {", ".join(ways)}, not {how!r}')
    untouched = {*range(model.config.vocab_size, vocab.size)} - {*new}
    assert not untouched, f'rows {sorted(untouched)[:5]} .. would have no start'
    described = {i: vocab.encode(describe(name)) for name, i in vocab.control.items() if i in {*new}}
    generator, new = torch.Generator().manual_seed(seed), torch.tensor(new)
    for layer in [model.model.embed_tokens] + [model.lm_head] * (model.lm_head is not None):
        old = layer.weight
        rows = old.new_zeros(vocab.size, old.size(1))           # (V, C)
        rows[:len(old)] = old
        mean, std = 0.0, 0.02 if how == 'normal' else 0.0
        if how in ('spread', 'words', 'codec'):
            text = old[:vocab.n_text]
            mean, std = text.mean(0), scale * text.std(0)
        draws = torch.randn(len(new), old.size(1), generator=generator)
        if how == 'codec':
            code = new - vocab.code_start
            is_code = (code >= 0) & (code < len(vectors))
            draws[is_code] = project(vectors, old.size(1), generator)[code[is_code]]
        rows[new] = mean + std * draws
        for i, ids in (described.items() if how == 'words' else ()):
            rows[i] = old[ids].mean(0)
        layer.weight = torch.nn.Parameter(rows)
    model.config = replace(model.config, vocab_size=vocab.size)
