"""table.py: who talks beside others says what they say alone, whoever comes, goes or is silent meanwhile."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.made_up import make_vocabulary
from decode import Duplex, Sampling
from flatten import get_layout
from model import ModelConfig, Qwen2
from table import Table

VOCAB, N_CHUNK, N_SEAT = make_vocabulary(300, 16), 7, 5
PROMPTS = ['', 'Be brief.']
SAMPLING = Sampling(text_temperature=1.0, speech_temperature=1.0)


def make_model():
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=64)
    model = Qwen2(ModelConfig(VOCAB.size, 128, **sizes)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5)     # so that no choice hangs on the last bit
    return model


@pytest.fixture(scope='module', params=['duplex3', 'duplex2'])
def alone(request):
    """-> a table; chunks [user, chunk, code]; what each is told alone, {prompt: [user][chunk]}. The context
    holds four or five chunks of seven."""
    model, layout = make_model(), get_layout(request.param)
    users = np.random.default_rng(0).integers(0, VOCAB.n_codes, (N_SEAT, N_CHUNK, 10))
    kept = dict(sampling=SAMPLING, max_context=100)
    said = {}
    for prompt in PROMPTS:
        each = [Duplex(model, VOCAB, layout, prompt=prompt, **kept) for _ in users]
        said[prompt] = [[np.concatenate(duplex.step(chunk), 1)[0] for chunk in user]
                        for duplex, user in zip(each, users)]
    return Table(model, VOCAB, layout, N_SEAT, **kept), users, said


class Event:
    """Of a GPU whose work is done at once: with it a frame is told after the next was begun."""
    record = synchronize = lambda self: None


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_as_each_alone(alone, data):
    """In each step some of them have a chunk. One who has ended leaves the seat to another user."""
    table, users, said = alone
    table.is_there = data.draw(st.sampled_from([None, Event()]), 'like a GPU')
    at = {}     # seat -> [user, prompt, chunks heard]
    for _ in range(data.draw(st.integers(1, 20), 'steps')):
        talk = data.draw(st.lists(st.integers(0, N_SEAT - 1), min_size=1, unique=True), 'who talks')
        for row in talk:
            if at.get(row, (0, 0, N_CHUNK))[2] == N_CHUNK:
                at[row] = [data.draw(st.integers(0, N_SEAT - 1)), data.draw(st.sampled_from(PROMPTS)), 0]
                table.seats[row].reset(at[row][1])
        frames, chunks = [[] for _ in talk], [users[at[row][0], at[row][2]] for row in talk]

        def on_frame(i, codes, frames=frames):
            frames[i].extend(codes)
        got = table.step([table.seats[row] for row in talk], chunks, on_frame)
        for i, (row, text, speech) in enumerate(zip(talk, *got)):
            user, prompt, c = at[row]
            assert np.array_equal(np.concatenate([text, speech]), said[prompt][user][c]), (row, at[row])
            assert frames[i] == speech.tolist()
            at[row][2] += 1
    table.is_there = None


def test_few_sizes(alone):
    """Each is prepared once, so there are few; they hold all who talk."""
    table = alone[0]
    assert table.sizes() == [1, 2, 4, 5] and Table.sizes(type('', (), dict(seats=[0]))) == [1]
    for first in range(N_SEAT):
        for last in range(first, N_SEAT):
            rows = table.span([table.seats[first], table.seats[last]])
            assert 0 <= rows.start <= first and last < rows.stop <= N_SEAT
            assert rows.stop - rows.start in table.sizes()


def test_warm_up_leaves_nothing(alone):
    table, users, said = alone
    table.warm_up(9)
    got = table.step(table.seats[:2], users[:2, 0], lambda i, codes: None)
    for i, (text, speech) in enumerate(zip(*got)):
        assert np.array_equal(np.concatenate([text, speech]), said[''][i][0])
    assert table.on_frame is None       # else it holds a talker who may have left
    for seat in table.seats:
        seat.reset()


def test_a_prompt_that_does_not_fit(alone):
    with pytest.raises(ValueError, match='holds no two chunks of 2. tokens behind a prompt of'):
        alone[0].seats[0].reset('Be brief. ' * 20)
