"""What new rows start from: by its rule, and nothing else moves."""
from types import SimpleNamespace

import pytest
import torch

from codec.s3 import S3Codec
from model import ModelConfig, Qwen2
from rows import grow, project

WAYS = 'spread', 'words', 'codec', 'normal', 'zeros'
VECTORS = torch.randn(4000, 8, generator=torch.Generator().manual_seed(5)) + 3


def tiny(tie):
    torch.manual_seed(0)
    return Qwen2(ModelConfig(256, 64, n_layer=2, n_head=2, n_kv_head=1, n_embd=64, n_inner=96,
                             tie_embeddings=tie))


@pytest.mark.parametrize('tie', [True, False])
@pytest.mark.parametrize('how', WAYS)
def test_grown_rows(how, tie):
    """Ids 250 to 255 were spare, 256 to 4351 are new, from 300 to 4299 codes. Old rows stay, and so do the
    logits of old ids."""
    model = tiny(tie)
    before, idx = {name: x.clone() for name, x in model.state_dict().items()}, torch.arange(40).view(2, 20)
    vocab = SimpleNamespace(size=4352, n_text=240, code_start=300, control={'<|say_it|>': 250},
                            encode={'say it': [3, 5]}.get)
    logits = model(idx).detach()
    grow(model, vocab, range(250, 4352), how, 0.5, VECTORS)
    assert model.config.vocab_size == 4352 and (model.lm_head is None) == tie
    torch.testing.assert_close(model(idx)[..., :250], logits[..., :250])
    for name in ['model.embed_tokens.weight'] + ['lm_head.weight'] * (not tie):
        rows, old = model.state_dict()[name], before[name]
        assert torch.equal(rows[:250], old[:250])
        new, text = rows[256:], old[:240]
        mean, std = {'normal': (0, 0.02), 'zeros': (0, 0)}.get(how, (text.mean(0), 0.5 * text.std(0)))
        if how == 'codec':
            spread = (rows[300:4300] - mean) / std
            assert spread.square().mean().item() == pytest.approx(1, rel=0.05)
            # of 64 directions, distances come back to 1 / sqrt(2 * 64) = 9 %
            near, far = (torch.pdist(x[:200]) for x in (spread / 8, VECTORS))
            assert torch.corrcoef(torch.stack([near, far]))[0, 1] > 0.9
            new = rows[4300:]
        else:
            # 4,096 draws: their deviation is good to 1/90
            torch.testing.assert_close(new.std(0), torch.as_tensor(std).expand(64).float(), rtol=0.06, atol=0)
        # their mean is good to 1 / sqrt(n) of a standard deviation, of which we allow 5
        assert ((new.mean(0) - mean).abs() <= 5 / len(new) ** 0.5 * torch.as_tensor(std)).all()
        if how == 'words':
            torch.testing.assert_close(rows[250], (old[3] + old[5]) / 2)
    with pytest.raises(ValueError, match="not 'middle'"):
        grow(model, vocab, [], 'middle')


def test_some_codes_are_new():
    """A checkpoint of ours that gets control tokens: its codes stay."""
    model = tiny(True)
    before = model.model.embed_tokens.weight.clone()
    vocab = SimpleNamespace(size=384, n_text=100, code_start=120, control={}, encode=None)
    grow(model, vocab, [110, *range(256, 384)], 'codec', 0.5, VECTORS[:100])
    changed = (model.model.embed_tokens.weight[:256] != before).any(1).nonzero()
    assert changed.flatten().tolist() == [110]


def test_projection_is_a_projection():
    """Twice as far apart is twice as far apart; where all codes lie does not matter."""
    x = torch.randn(50, 3)
    one, other = (project(v, 32, torch.Generator().manual_seed(1)) for v in (x, 2 * x + 7))
    torch.testing.assert_close(one, other)


def test_digits_of_cosyvoice():
    """As s3tokenizer numbers them: the sum of (digit + 1) * 3 ** place."""
    x = S3Codec.create(variant='v2_25hz').vectors()
    assert x.shape == (6561, 8) and len(x.unique(dim=0)) == 6561 and {*x.unique().tolist()} == {-1, 0, 1}
    torch.testing.assert_close(((x + 1) * 3 ** torch.arange(8)).sum(1), torch.arange(6561.0))
