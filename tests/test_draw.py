"""What train.py --show draws is what the model gets."""
import re

import pytest
import torch

from data.dialogues import Dialogues, save_dialogues
from data.loader import STREAMS, Loader, Mixture
from flatten import get_layout
from measures.draw import draw_batch
from tests.test_flatten import EXAMPLES, GOLDEN, VOCAB


@pytest.fixture
def batch_of(tmp_path):
    """batch_of(layouts) -> (a batch of the examples as train.py gets it, the same before user_noise)"""
    def batch_of(layouts, user_noise=0.0, padded=True):
        save_dialogues(str(tmp_path / 'train.arrow'), EXAMPLES.values(),
                       dict(rate_hz=25.0, n_codes=VOCAB.n_codes))
        args = Dialogues(str(tmp_path), 'train'), [get_layout(name, 4) for name in layouts], VOCAB, 140, 2
        return [Mixture([Loader(*args, user_noise=share, padded=padded)], [1.0]).next_batch()
                for share in (user_noise, 0.0)]
    return batch_of


def drawn(batch, layouts, clean=None, n_row=1):
    weights = 1.0 + 4 * (batch.stream == 0)
    text = draw_batch(batch, [get_layout(name, 4) for name in layouts], VOCAB, STREAMS, weights, n_row, 100,
                      clean)
    return re.sub('\033\\[\\d+m', '', text)


def test_golden_batch(regen, batch_of):
    """
    First rows, of documents in chunks and by turns, some with codes replaced; to be held against the
    drawings of the dialogues.
    """
    text = []
    for layouts in (['duplex3'], ['half_duplex'], ['asr', 'tts', 'duplex2']):
        noisy, clean = batch_of(layouts, user_noise=0.1)
        text.append(f'{"+".join(layouts)}\n{drawn(noisy, layouts, clean.idx)}')
    path = GOLDEN / 'batch.txt'
    if regen:
        path.write_text('\n'.join(text), encoding='utf-8')
    assert '\n'.join(text) == path.read_text(encoding='utf-8')


@pytest.mark.parametrize('layouts', [['duplex3'], ['half_duplex', 'asr']])
def test_a_mask_that_is_wrong_by_one_token_is_seen(layouts, batch_of):
    """Whatever target is left out, added, weighed or named otherwise, and whatever token, position or
    document is another, the drawing is another, too; targets that are late by a token are called wrong."""
    batch, _ = batch_of(layouts)
    whole, others = drawn(batch, layouts, n_row=2), []
    keep = ~torch.eye(len(batch.learn), dtype=torch.bool)

    def with_one(name, i, value):
        changed = getattr(batch, name).flatten().index_fill(0, torch.tensor(i), value)
        return batch._replace(**{name: changed.view_as(batch.idx)})

    for i in range(0, len(keep), 7):
        kept = {name: getattr(batch, name)[keep[i]] for name in ('learn', 'targets', 'stream')}
        others.append(batch._replace(**kept))
        others.append(batch._replace(stream=(batch.stream + ~keep[i]) % 3))
    others += [with_one('idx', i, VOCAB.code_start + 63) for i in range(0, 140, 9)]
    others += [with_one(name, 20, 77) for name in ('pos', 'doc')]
    unlearned = [i for i in range(140) if i not in batch.learn][3]
    others.append(batch._replace(
        learn=torch.cat([batch.learn, torch.tensor([unlearned])]),
        targets=torch.cat([batch.targets, batch.idx[0, unlearned + 1:unlearned + 2]]),
        stream=torch.cat([batch.stream, torch.tensor([1])])))
    late = batch._replace(targets=batch.targets.roll(1))
    drawings = [drawn(other, layouts, n_row=2) for other in [*others, late]]
    assert len({whole, *drawings}) == len(drawings) + 1
    assert 'targets are not the next token' not in whole and 'targets are not the next token' in drawings[-1]


def test_rows_without_padding_are_drawn_as_the_model_gets_them(batch_of):
    batch, _ = batch_of(['duplex3'], padded=False)
    text = drawn(batch, ['duplex3'])
    assert batch.idx.shape[0] == 1 and f'row 0: {batch.idx.numel()} tokens' in text and '0.0% padding' in text
    assert text.count('document ') == len(batch.doc.unique()) == text.count('positions 0 to')
