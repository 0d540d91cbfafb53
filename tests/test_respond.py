"""Decoding of all layouts: what is laid can be written, only what a layout allows is written, and a document
that a model writes is read back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layouts import WIDTHS, dialogues

import respond
from decode import Duplex, converse
from flatten import flatten, unflatten
from layouts import LAYOUTS, get_layout
from measures.words import transcribe
from model import ModelConfig, Qwen2
from respond import Asked, Writer, steps_of
from templates import Choice, Reader, advance, is_in
from vocabulary import Vocabulary

BY_TURNS = [name for name, (order, _) in LAYOUTS.items() if order != 'chunks'] + ['syncllm']


@pytest.fixture(scope='module')
def make_model(small_tokenizer):
    """make_model(layout) -> a model of random weights that says something, and its vocabulary"""
    def make_model(layout, n_codes=32, block_size=768, seed=0):
        vocab = Vocabulary.load(small_tokenizer, n_codes, layout.control)
        torch.manual_seed(seed)
        model = Qwen2(ModelConfig(vocab.size, block_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32,
                                  n_inner=64)).eval()
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(8)
        return model, vocab
    return make_model


def asked_of(d, layout):
    """What respond is asked, for each document of a dialogue."""
    turns = sorted(d['turns'], key=lambda t: t['start'])
    if layout.is_ragged:
        return [[Asked(d['user'], prompt=d['prompt'])]]
    pairs = [(a, b) for a, b in zip(turns, turns[1:]) if (a['role'], b['role']) == ('user', 'assistant')]
    chosen = [a for a, _ in pairs] if layout.order == 'pair' else turns
    asked = [Asked(d[t['role']][t['start']:t['end']], t['text'], d['prompt']) for t in chosen]
    return [[each] for each in asked]


@given(st.data(), st.sampled_from([name for name in BY_TURNS
                                   if LAYOUTS[name][0] in ('turn', 'pair', 'chunks')]))
@settings(max_examples=100, deadline=None)
def test_what_is_laid_can_be_written(small_tokenizer, data, name):
    """A writer that chooses what a laid document has: each id is allowed, and the document comes out. What
    the layout feeds, the steps give by themselves."""
    width = WIDTHS.get(name, 1)
    layout = get_layout(name)
    vocab = Vocabulary.load(small_tokenizer, 64 if width == 1 else 8 * width, layout.control)
    d = data.draw(dialogues(width, 'abé'))
    documents = flatten(d, layout, vocab)
    for document, asked in zip(documents, asked_of(d, layout), strict=True):
        written, ids = [], document.ids.tolist()
        steps = steps_of(Reader(layout, vocab), asked)
        step = next(steps, None)
        while step is not None:
            if isinstance(step, Choice):
                assert is_in(ids[len(written)], step.allowed)
                written.append(ids[len(written)])
                step = advance(steps, written[-1])
            else:
                written += step.tolist()
                step = next(steps, None)
        assert written == ids


@pytest.mark.parametrize('name', BY_TURNS)
def test_every_layout_is_decoded(make_model, name):
    """A model of random weights writes documents that are read back, whatever it chooses; it repeats itself
    only at temperature 0."""
    width = WIDTHS.get(name, 1)
    layout = get_layout(name, *((4, None) if name == 'syncllm' else ()))
    model, vocab = make_model(layout, 32 if width == 1 else 8 * width)
    codes = np.arange(12)[:, None] % 8 + np.arange(width) * 8 if width > 1 else np.arange(12)
    asked = [[Asked(codes, 'yes ok', 'hi')]] * 2
    asked = [turns * 2 for turns in asked] if layout.order == 'turns' else asked
    silence = 0 if width == 1 else [8 * place for place in range(width)]
    options = dict(max_new_tokens=40)
    first, second = respond.respond(model, vocab, layout, asked, silence, **options)
    assert first['turns'] == second['turns'] and first['assistant'] == second['assistant']
    hot = respond.Sampling(text_temperature=1.5, speech_temperature=1.5)
    hot, again = respond.respond(model, vocab, layout, asked, silence, sampling=hot, **options)
    if name not in ('syncllm', 'outetts3'):     # all may be silent there
        assert hot['turns'] != again['turns'] or hot['assistant'] != again['assistant']
    roles = {t['role'] for t in first['turns']}
    assert roles <= {'user', 'assistant'} and (name == 'syncllm' or roles)
    if layout.has_speech_of('user') and not layout.is_voice:
        user = np.asarray(first['user'])[:12]
        assert name == 'usdm_pretrain' or np.array_equal(user, codes)       # what was asked is in it


def test_cached_steps_equal_one_forward(make_model):
    """What the writer chooses is the likeliest of the allowed ids, in one pass over the whole document."""
    layout = get_layout('usdm_sft')
    model, vocab = make_model(layout)
    asked = [Asked(np.arange(9), '', '')]
    writer = Writer(model, vocab, layout, max_new_tokens=30)
    choices, choose = [], writer.choose

    def record(kind, ranges, unfed):
        choices.append(ranges)
        return choose(kind, ranges, unfed)
    writer.choose = record
    ids = writer.write(steps_of(Reader(layout, vocab), asked), 'it')
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    steps, at, free = steps_of(Reader(layout, vocab), asked), 0, []
    step = next(steps, None)
    while step is not None:
        if isinstance(step, Choice):
            free.append(at)
            at += 1
            step = advance(steps, ids[at - 1])
        else:
            at += len(step)
            step = next(steps, None)
    assert len(free) == len(choices) > 20
    for at, ranges in zip(free, choices):
        rows = torch.tensor([i for first, end in ranges for i in range(first, end)])
        assert ids[at] == rows[logits[at - 1, rows].argmax()]


def test_asr_equals_the_measures(make_model):
    """measures/words.py writes many transcripts side by side; here they come one by one."""
    layout = get_layout('asr')
    model, vocab = make_model(layout)
    utterances = [np.arange(n) % 32 for n in (5, 9, 12)]
    asked = [[Asked(codes)] for codes in utterances]
    for codes, turns, text in zip(utterances, asked, transcribe(model, vocab, utterances)):
        one, = respond.respond(model, vocab, layout, [turns], 0, max_new_tokens=len(codes))
        assert one['turns'][0]['text'] == text or len(vocab.encode(text)) >= len(codes)


@pytest.mark.parametrize('name', ['mini_omni', 'glm4voice', 'half_duplex', 'usdm_sft'])
def test_text_of_a_second_sample(make_model, name):
    """The answer has the text that the other model writes when it never speaks, which is not the text that
    the model writes itself."""
    width = WIDTHS.get(name, 1)
    layout, n_codes = get_layout(name), 32 if width == 1 else 8 * width
    codes = np.arange(6)[:, None] % 8 + np.arange(width) * 8 if width > 1 else np.arange(6)
    asked = [[Asked(codes, '', 'hi')]]
    silence = 0 if width == 1 else [8 * place for place in range(width)]
    model, vocab = make_model(layout, n_codes)
    for seed in range(1, 20):       # one that writes something
        other, texts = make_model(layout, n_codes, seed=seed)[0], []
        Writer(other, vocab, layout, max_new_tokens=30).write(
            steps_of(Reader(layout, vocab, is_mute=True), asked[0], write_texts=texts), 'it')
        if texts[0]:
            break
    answers = [respond.respond(model, vocab, layout, asked, silence, text_model=each, max_new_tokens=30)
               for each in (other, None)]
    said, alone = ([t['text'] for t in answer['turns'] if t['role'] == 'assistant'] for answer, in answers)
    assert said == [vocab.decode(texts[0])] != alone and said[0]


def test_text_of_a_second_sample_in_duplex(make_model):
    """Chunk by chunk; the second sample hears the user, and its own silence."""
    layout = get_layout('duplex3')
    model, vocab = make_model(layout)
    other, _ = make_model(layout, seed=1)
    user = np.arange(40) % 32
    mute, both = Duplex(other, vocab, layout, is_mute=True), Duplex(model, vocab, layout)
    for c in range(4):
        text, speech = mute.step([user[10 * c:10 * c + 10]])
        assert (speech == -1).all()
        assert np.array_equal(both.step([user[10 * c:10 * c + 10]], torch.as_tensor(text))[0], text)
    (said,), _ = converse(model, vocab, layout, [user], 0, text_model=other)
    ids = torch.cat(both.ids, 1)[0].tolist()
    assert said == dict(unflatten(ids, layout, vocab, 0), turns=said['turns'])


def test_a_long_document_is_refused(make_model):
    layout = get_layout('asr')
    model, vocab = make_model(layout, block_size=128)
    with pytest.raises(ValueError, match='long: its document is longer than the context of 128 tokens'):
        respond.respond(model, vocab, layout, [[Asked(np.arange(200) % 32)]], 0, names=['long'])


def test_text_from_needs_a_text(make_model):
    layout = get_layout('tts')
    model, vocab = make_model(layout)
    with pytest.raises(ValueError, match='layout tts has no text that the assistant writes'):
        respond.respond(model, vocab, layout, [[Asked(np.arange(5))]], 0, text_model=model)


@pytest.mark.parametrize('name', ['moshi', 'nemo_duplex', 'mini_omni2_irq'])
def test_layouts_on_the_clock_stream(make_model, name):
    """Late codes, text by word or by turn, a state: what streams in chunks equals one forward over it all, at
    every place that is chosen; and it is read back."""
    width = WIDTHS.get(name, 1)
    layout = get_layout(name, rate_hz=12.5)
    model, vocab = make_model(layout, 32 if width == 1 else 8 * width)
    rng = np.random.default_rng(0)
    user = rng.integers(0, 8, (20, width)) + np.arange(width) * 8 if width > 1 else rng.integers(0, 32, 20)
    silence = 0 if width == 1 else [8 * place for place in range(width)]
    dialogue, = converse(model, vocab, layout, [user], silence)[0]
    assert np.array_equal(dialogue['user'], user)
    duplex, passes = Duplex(model, vocab, layout), []
    sample = duplex.sample

    def count(key, ids):
        token = sample(key, ids)
        passes.append((key, ids.shape[1], duplex.cache.n_slot))
        return token
    duplex.sample = count
    for c in range(layout.n_chunk(20)):
        frame = user[c] if c < 20 else np.asarray(silence)
        duplex.step(frame)
    ids = torch.cat(duplex.ids, 1)
    with torch.no_grad():
        logits = model(ids)[0]
    assert [*Duplex(model, vocab, layout).passes(layout.n_chunk(20))] == passes     # which a GPU captures
    n_checked, at = 0, 0
    for c in range(layout.n_chunk(20)):
        for slot, size in zip(layout.chunk, layout.sizes):
            for place in range(size):
                if at and duplex.is_chosen(slot, place % (size // slot.n), c):
                    head = duplex.heads[duplex.key(slot, place % (size // slot.n))]
                    scores = logits[at - 1, head.start:head.start + len(head.bias)] + head.bias
                    assert ids[0, at] == scores.argmax() + head.start
                    n_checked += 1
                at += 1
    assert n_checked > 15
    # rows of the user come late as they were laid in training
    laid, = flatten(dict(id='', user=user.tolist(), assistant=user.tolist(), turns=[]), layout, vocab) \
        if name != 'mini_omni2_irq' else (None,)
    if laid:
        rows = [slot.role == 'user' for slot, size in zip(layout.chunk, layout.sizes) for _ in range(size)]
        mine, theirs = (np.asarray(x).reshape(-1, layout.period)[:20, rows] for x in (ids[0], laid.ids))
        assert np.array_equal(mine, theirs)


def test_speech_stops_where_the_state_says_so(make_model):
    """A layout with a state before the assistant's speech: after <|irq|> there is silence."""
    table = {'careful': ('chunks', '~user.speech 2, state, assistant.speech 2')}
    layout = get_layout('careful', table=table)
    model, vocab = make_model(layout)
    duplex = Duplex(model, vocab, layout)
    with torch.no_grad():       # irq at every other place, whatever the model hears
        for c in range(6):
            duplex.heads['state'].bias[:] = -torch.inf
            which = vocab.control['<|irq|>' if c % 2 else '<|n-irq|>']
            duplex.heads['state'].bias[which - duplex.heads['state'].start] = 0
            speech = duplex.heads['speech']
            speech.bias[vocab.control['<|silent_speech|>'] - speech.start] = -1e9
            _, said = duplex.step([[1, 2]])
            assert (said == -1).all() if c % 2 else (said >= 0).all()
