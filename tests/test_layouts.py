"""The neighbours' layouts: their own worked examples, the inverse, causality, and what is refused."""
import doctest
import json
import pathlib

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import clock
import templates
from flatten import Letters, draw, flatten, unflatten
from layouts import LAYOUTS, get_layout

SPEECH_TOKENS = ROOT / '../shared/data/speech_tokens'
WIDTHS = dict(moshi=8, mini_omni=7, outetts3=2)     # codes a frame


def word(text, start, end):
    return dict(text=text, start=start, end=end)


def turn(role, start, end, text, words=None):
    return dict(role=role, start=start, end=end, text=text) | (dict(words=words) if words else {})


def codes(n, width=1, first=0):
    """A channel that counts; of several codes a frame each counts in a range of its own of 8."""
    if width == 1:
        return [first + f % 32 for f in range(n)]
    return [[place * 8 + (first + f) % 8 for place in range(width)] for f in range(n)]


def dialogue(*turns, n=14, width=1, **more):
    return dict(id='d', user=codes(n, width), assistant=codes(n, width, 32 if width == 1 else 3),
                turns=list(turns), **more)


def letters(width=1):
    return Letters(64 if width == 1 else 8 * width)


def laid(d, layout, vocab=None):
    vocab = vocab or letters(layout.codes_per_frame)
    return [draw(document, layout, vocab) for document in flatten(d, layout, vocab)]


def text_row(turns, name, n, rate_hz=12.5):
    """The text stream of a dialogue of n frames, a letter a frame, in the marks of the specifications"""
    layout, vocab = get_layout(name, rate_hz=rate_hz), letters(8 if name == 'moshi' else 1)
    d = dialogue(*turns, n=n, width=layout.codes_per_frame)
    document, = flatten(d, layout, vocab)
    names = {i: name for name, i in vocab.control.items()}
    marks = {'<|silent_text|>': '.', '<|epad|>': 'E', '<|begin|>': 'B', '<|eot|>': 'S'}
    ids = document.ids.reshape(-1, layout.period)[:n, 0].tolist()
    return ''.join(marks[names[i]] if i in names else chr(i) for i in ids), document.n_dropped


# ------------------------------------------------------------------------------------------------------------
# their own examples


@pytest.mark.parametrize('words, row, n_lost', [
    # times in frames of 80 ms: .17 s is frame 2, .50 frame 6, .62 frame 7 (moshi-finetune, interleaver.py;
    # there every word starts with a space of its own, here all but the first of a turn do)
    ([('ab', 2, 5), ('cde', 6, 8), ('f', 7, 10)], '.Eab.E  f....', 3),
    ([('a', 0, 1), ('b', 1, 2), ('cd', 3, 6), ('e', 4, 5)], 'a E  e.......', 3),
])
def test_moshi_places_words_where_they_are_said(words, row, n_lost):
    """What is left of a word gives way to the next; <|epad|> announces a word after silence. In the first
    example ' cde' keeps its space only, as ' f' starts a frame later."""
    t = turn('assistant', words[0][1], 13, ' '.join(w[0] for w in words), [word(*w) for w in words])
    got, n_dropped = text_row([t], 'moshi', 13)
    assert n_dropped >= n_lost - 1 and len(got) == 13
    starts = {at: w[0] for w in words for at in [words[words.index(w)][1]]}
    assert all(got[at] in (starts[at][0], ' ') for at in starts)
    assert got.count('E') == sum(at > 0 and at - 1 not in covered(words) for at in starts)


def covered(words):
    """Frames that hold a token, by the rule above"""
    taken, limits = set(), [w[1] for w in words[1:]] + [13]
    for (text, at, _), limit in zip(words, limits):
        n = len(text) + (at != words[0][1])
        taken |= set(range(at, min(at + n, limit)))
    return taken


@pytest.mark.parametrize('turns, n, row', [
    # 80 ms a frame; from NeMo's DuplexS2SDataset, run: letters for its tokens
    ([(3, 8, 'xy')], 13, '...Bxy..S....'),
    ([(3, 5, 'wxyz')], 13, '...BwSyz.....'),
    ([(3, 6, 'wxyz')], 6, '...Bwx'),
    ([(1, 4, 'vwxyz'), (5, 10, 'a')], 15, '.BvwSBa...S....'),
    ([(3, 5, 'x'), (5, 10, 'y')], 13, '...BxBy...S..'),
])
def test_nemo_text_on_its_grid(turns, n, row):
    turns = [turn('assistant', start, min(end, n), text) for start, end, text in turns]
    got, n_dropped = text_row(turns, 'nemo_duplex', n)
    assert got == row
    assert n_dropped == sum(len(t['text']) for t in turns) - sum(letter.islower() for letter in row)


def test_nemo_rounds_to_the_nearest_step():
    """25 frames a second, 2 a step: 5 frames are 2.5 steps, which is 3; NeMo's .20 s at .08 s a step."""
    assert [clock.to_step(frame, 2) for frame in (1, 3, 5, 7, 9)] == [1, 2, 3, 4, 5]
    assert [clock.to_step(frame, 1) for frame in range(4)] == [0, 1, 2, 3]


def test_nemo_codes_are_a_step_late_and_marked():
    """Text . . B x y . S .  with codes 10 to 17: column 0 is the delay, then 10 11 B 13 14 15 S 17"""
    d = dialogue(turn('assistant', 2, 6, 'xy'), n=8)
    d['assistant'] = list(range(10, 18))
    layout, vocab = get_layout('nemo_duplex', speech_chunk=1), Letters()
    lines = draw(flatten(d, layout, vocab)[0], layout, vocab).splitlines()
    line = lines[2].replace('<|', '«').replace('|>', '»')
    row = [cell.strip() for cell in line.split('|')[1:]]
    assert row == ['·', '10+', '11+', '«sos»+', '13+', '14+', '15+', '«eos»+', '17+']


def test_moshi_delays():
    """Rows of 17: text, 8 of the assistant, 8 of the user; the first codes of a frame with it, others one
    step later. The user is never learned, nor is what fills a gap."""
    layout, vocab = get_layout('moshi', rate_hz=12.5), letters(8)
    document, = flatten(dialogue(n=4, width=8), layout, vocab)
    grid, learned = (x.reshape(-1, 17) for x in (document.ids, document.learned))
    silent, c = vocab.control['<|silent_speech|>'], vocab.code_start
    assert layout.period == 17 and grid.shape == (5, 17)        # one step more for what is late
    assert grid[:, 1].tolist() == [c + 3, c + 4, c + 5, c + 6, silent]
    assert grid[:, 2].tolist() == [silent, c + 11, c + 12, c + 13, c + 14]
    assert grid[:, 9].tolist() == [c, c + 1, c + 2, c + 3, silent]
    assert not learned[:, 9:].any() and learned[:, 2].tolist() == [False] + [True] * 4
    assert learned[:, :2].tolist() == [[True, True]] * 4 + [[False, False]]


def test_mini_omni_is_slam_llms_grid():
    """Two tokens of text, two SNAC frames: 10 columns, as SLAM-LLM's speech_dataset_s2s.py lays them."""
    layout, vocab = get_layout('mini_omni'), letters(7)
    d = dialogue(turn('user', 0, 1, ''), turn('assistant', 2, 4, 'xy'), n=4, width=7)
    document, = flatten(d, layout, vocab)
    grid, learned = (x[-80:].reshape(10, 8).T for x in (document.ids, document.learned))
    p, eoa = vocab.control['<|silent_speech|>'], vocab.control['<|eos|>']
    assert grid[0].tolist() == [ord('x'), ord('y'), vocab.control['<|eot|>']] + [
        vocab.control['<|silent_text|>']] * 7
    assert learned[0].tolist() == [True] * 3 + [False] * 7      # nothing of the text row after its end
    for i in range(7):
        said = [vocab.code_start + i * 8 + 5, vocab.code_start + i * 8 + 6]
        assert grid[i + 1].tolist() == [p] * (i + 1) + said + [eoa] + [p] * (6 - i) and learned[i + 1].all()
    assert not document.learned[:-80].any()                     # the question


def test_mini_omni_with_more_text_than_speech():
    """11 tokens and the end: 12 columns; of the last two the rows of speech are not learned."""
    layout = get_layout('mini_omni')
    d = dialogue(turn('user', 0, 1, ''), turn('assistant', 2, 4, 'abcdefghijk'), n=4, width=7)
    document, = flatten(d, layout, letters(7))
    learned = document.learned[-96:].reshape(12, 8)
    assert learned[:, 0].all() and learned[:10].all() and not learned[10:, 1:].any()


@pytest.mark.parametrize('n, late, rows', [
    # G = 3, from SLAM-LLM's examples/s2s: two tokens of text and the end
    (5, 2, [['w', 'p', 'p', 'p'], ['x', 'p', 'p', 'p'], ['T', '0', '1', '2'], ['p', '3', '4', 'A']]),
    (6, 2, [['w', 'p', 'p', 'p'], ['x', 'p', 'p', 'p'], ['T', '0', '1', '2'], ['p', '3', '4', '5'],
            ['p', 'A', 'p', 'p']]),
])
def test_slam_omni_groups(n, late, rows):
    table = {'slam': ('pair', f'~user.speech [assistant.text | assistant.speech 3 +{late}]')}
    layout, vocab = get_layout('slam', table=table), Letters()
    d = dialogue(turn('user', 0, 1, ''), turn('assistant', 2, 2 + n, 'wx'), n=2 + n)
    d['assistant'] = [0, 0, *range(n)]
    document, = flatten(d, layout, vocab)
    names = {vocab.control['<|eos|>']: 'A', vocab.control['<|eot|>']: 'T'}
    names |= {vocab.control[f'<|silent_{kind}|>']: 'p' for kind in ('text', 'speech')}
    names |= {vocab.code_start + i: str(i) for i in range(n)} | {ord('w'): 'w', ord('x'): 'x'}
    assert [[names[i] for i in row] for row in document.ids[1:].reshape(-1, 4).tolist()] == rows


@pytest.mark.parametrize('n_text, n_speech, expected', [
    (3, 9, 't1 t2 a1 a2 a3 a4 t3 a5 a6 a7 a8 a9'),
    (5, 5, 't1 t2 a1 a2 a3 a4 t3 t4 a5 t5'),
    (2, 4, 't1 t2 a1 a2 a3 a4'),
    (0, 3, 'a1 a2 a3'),
])
def test_glm4voice_portions(n_text, n_speech, expected):
    """2 : 4 for 13 : 26. Text comes first; what is left of either follows in one run."""
    layout, vocab = get_layout('glm4voice', 4, 2), Letters()
    d = dialogue(turn('user', 0, 2, ''), turn('assistant', 2, 2 + n_speech, 'abcde'[:n_text]), n=12)
    d['assistant'] = [0, 0, *range(1, 11)]
    document, = flatten(d, layout, vocab)
    names = {ord(letter): f't{i}' for i, letter in enumerate('abcde', 1)}
    names |= {vocab.code_start + i: f'a{i}' for i in range(1, 10)}
    *ids, end = document.ids[document.learned].tolist()     # the answer and its end alone are learned
    assert ' '.join(names[i] for i in ids) == expected and end == vocab.control['<|user|>']


def test_usdm_sft_string_and_mask():
    layout, vocab = get_layout('usdm_sft'), Letters()
    d = dialogue(turn('user', 0, 2, 'hi'), turn('assistant', 2, 3, 'yo'), n=3)
    document, = flatten(d, layout, vocab)
    names = {i: name for name, i in vocab.control.items()}
    text = ''.join(names.get(i) or (f'<{i - vocab.code_start}>' if i >= vocab.code_start else chr(i))
                   for i in document.ids.tolist())
    assert text == (
        "Below is a conversation between the user and the agent. Each turn includes the user's speech and "
        "its corresponding transcript, along with the agent's response text and the corresponding speech.\n\n"
        '### User\n<0><1><|correspond|>hi\n### Agent\nyo<|correspond|><34><|eos|>\n')
    assert drawn_learned(document, vocab) == ['h', 'i', '\n', 'y', 'o', '<|correspond|>', '34', '<|eos|>']
    unlearned = get_layout('usdm_sft', learn_user_text=False)
    assert drawn_learned(flatten(d, unlearned, vocab)[0], vocab)[0] == '\n'


def drawn_learned(document, vocab):
    names = {i: name for name, i in vocab.control.items()}
    return [names.get(i) or (str(i - vocab.code_start) if i >= vocab.code_start else chr(i))
            for i in document.ids[document.learned].tolist()]


class Draws:
    """A generator of random numbers that gives those it was made of."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def random(self):
        return self.draws.pop(0)

    standard_normal = random


@pytest.mark.parametrize('draws, expected', [
    # a border (0: in the middle), then for each segment: text first? both?   (naver-ai/usdm, by hand)
    ((0, .2, .2, .8, .2), 'a   b ≡ 0 1 2 3 4 5 6 7 8 ≡ c'),
    ((0, .2, .8, .8, .2), 'a   b → 5 6 7 8 ≡ c'),
    ((0, .8, .2, .8, .8), '0 1 2 3 4 ≡ a   b → 5 6 7 8'),
    ((0, .2, .8, .2, .8), 'a   b   c'),
])
def test_usdm_pretrain_draws(draws, expected):
    """Words a [0, 3) b [3, 5) c [5, 9), segments of 5 frames: a b | c"""
    layout, vocab = get_layout('usdm_pretrain', speech_chunk=5), Letters()
    t = turn('user', 0, 9, 'a b c', [word('a', 0, 3), word('b', 3, 5), word('c', 5, 9)])
    d = dict(id='u', user=list(range(9)), assistant=[], turns=[t])
    document, = flatten(d, layout, vocab, rng=Draws(*draws))
    drawn = draw(document, layout, vocab).replace('+', '').replace('<|correspond|>', '≡')
    assert drawn.replace('<|continue|>', '→').split() == [*expected.split(), '<|endoftext|>']
    assert document.learned.all()


def test_usdm_pauses_and_words_without_frames():
    """A pause is shared by half; a word without frames joins the one before and the one behind, if that has
    frames."""
    t = turn('user', 0, 20, '', [word('a', 1, 4), word('b', 8, 12), word('c', 14, 14), word('d', 14, 20)])
    words = templates.whole_words(dict(id='u'), t, get_layout('usdm_pretrain'))
    assert [(w['text'], w['start'], w['end']) for w in words] == [('a', 0, 6), ('b', 6, 13), ('c', 13, 14),
                                                                 ('d', 14, 20)]
    t = turn('user', 0, 9, '', [word('a', 0, 3), word('b', 3, 3), word('c', 3, 9)])
    words = templates.whole_words(dict(id='u'), t, get_layout('usdm_pretrain'))
    assert [w['text'] for w in words] == ['a b c']


@pytest.mark.skipif(not SPEECH_TOKENS.is_dir(), reason='needs ../shared/data')
@pytest.mark.parametrize('number', range(3))
def test_outetts_strings_are_its_own(number):
    """From its speaker files, the strings that OuteTTS's v1 code made of them: of the audio all, of the text
    what the speaker file has too (its newer code writes "i ve" there)."""
    prompts = json.loads((SPEECH_TOKENS / 'outetts_v1_prompts.json').read_text())[number]
    speaker = json.loads((SPEECH_TOKENS / pathlib.Path(prompts['speaker_file']).name).read_text())
    words, all_codes = [], []
    for each in speaker['words']:
        words.append(word(each['word'], len(all_codes), len(all_codes) + len(each['codes'])))
        all_codes += each['codes']
    t = turn('assistant', 0, len(all_codes), ' '.join(w['text'] for w in words), words)
    d = dict(id='o', user=[], assistant=all_codes, turns=[t])
    layout, vocab = get_layout('outetts', rate_hz=75.0), Letters(4096)
    document, = flatten(d, layout, vocab)
    names = {i: name for name, i in vocab.control.items()}
    text = ''.join(names.get(i) or (f'<|{i - vocab.code_start}|>' if i >= vocab.code_start else chr(i))
                   for i in document.ids.tolist())
    head, audio = prompts['training_prompt'].split('<|audio_start|>')
    assert text.split('<|audio_start|>')[1] == audio
    mine = text.split('<|audio_start|>')[0]
    assert mine.replace('<|text_sep|>', '') == head.replace('<|text_sep|>', '')
    back = unflatten(document.ids, layout, vocab)
    assert back['assistant'] == all_codes and back['turns'] == [t]


def test_syncllm_by_hand():
    """Chunks of 4, the assistant's before the user's: of repeats in a chunk one is left, and repeated to fill
    the chunk again."""
    layout, vocab = get_layout('syncllm', 4), Letters()
    d = dialogue(turn('assistant', 0, 8, ''), n=8)
    d.update(assistant=[5, 5, 7, 7, 7, 7, 7, 7], user=[9, 9, 9, 9, 9, 3, 3, 3])
    document, = flatten(d, layout, vocab)
    drawn = draw(document, layout, vocab).replace('+', '').replace('<|assistant|>', 'A')
    assert drawn.replace('<|user|>', 'U') == 'A 5 7 U 9 A 7 U 9 3' and document.cuts == (0, 5)
    back = unflatten(document.ids, layout, vocab)
    assert back['assistant'] == d['assistant'] and back['user'] == [9, 9, 9, 9, 9, 9, 3, 3]


def test_blsp_learns_the_continuation_only():
    layout, vocab = get_layout('blsp'), Letters()
    d = dict(id='b', user=[1, 2], assistant=[], prompt='Go on.',
             turns=[turn('user', 0, 2, 'once'), turn('assistant', 2, 2, 'upon')])
    document, = flatten(d, layout, vocab)
    assert drawn_learned(document, vocab) == ['u', 'p', 'o', 'n', '<|endoftext|>']
    text = ''.join(chr(i) if i < vocab.n_text else '#' for i in document.ids.tolist())
    assert text == '###[Human]:Go on.##\n\n\n###[Assistant]:upon#'


def test_irq_by_hand():
    """The user says "stop" from frame 3 to 6, in the noise of an answer that ends there: from then on irq."""
    layout, vocab = get_layout('mini_omni2_irq', 2), Letters()
    d = dialogue(turn('assistant', 0, 6, ''), turn('user', 3, 6, 'stop'), turn('assistant', 12, 14, ''), n=14)
    document, = flatten(d, layout, vocab)
    state = document.ids.reshape(-1, 3)[:, 2]
    assert (state == vocab.control['<|irq|>']).tolist() == [False] * 3 + [True] * 3 + [False]


def test_golden(regen):
    """One dialogue in all layouts of the neighbours, reviewed as text; docs/layouts.md explains it."""
    said = [turn('user', 0, 4, 'ab c', [word('ab', 0, 2), word('c', 3, 4)]),
            turn('assistant', 5, 9, 'de fg', [word('de', 5, 6), word('fg', 7, 9)]),
            turn('user', 8, 11, 'h', [word('h', 8, 11)])]
    drawn = []
    for name in list(LAYOUTS)[5:]:
        width = WIDTHS.get(name, 1)
        layout = get_layout(name, rate_hz=12.5)
        for text in laid(dialogue(*said, n=12, width=width, prompt='p'), layout):
            drawn.append(f'{name}\n{text}\n')
    path = ROOT / 'tests/golden/neighbours.txt'
    if regen:
        path.write_text('\n'.join(drawn), encoding='utf-8')
    assert '\n'.join(drawn) == path.read_text(encoding='utf-8')


@pytest.mark.parametrize('name', ['moshi', 'nemo_duplex', 'syncllm', 'mini_omni2_irq'])
def test_an_empty_dialogue(name):
    layout = get_layout(name)
    vocab = letters(layout.codes_per_frame)
    document, = flatten(dict(id='e', user=[], assistant=[], turns=[]), layout, vocab)
    assert len(document.ids) == 0 and unflatten(document.ids, layout, vocab)['user'] == []


# ------------------------------------------------------------------------------------------------------------
# proofs

@st.composite
def dialogues(draw, width, letters='abé字'):
    """Any dialogue whose turns have words that are said one after the other."""
    n = draw(st.integers(2, 40))
    turns = []
    for role in ('user', 'assistant'):
        cuts = draw(st.lists(st.integers(0, n), unique=True, max_size=6).map(sorted))
        for start, end in zip(cuts[::2], cuts[1::2]):
            at = sorted(draw(st.lists(st.integers(start, end), min_size=2, max_size=8)))
            texts = draw(st.lists(st.text(letters, min_size=1, max_size=3), min_size=len(at) // 2,
                                  max_size=len(at) // 2))
            words = [word(text, *span) for text, span in zip(texts, zip(at[::2], at[1::2]))]
            turns.append(turn(role, start, end, ' '.join(texts), words))
    channels = {}
    for role in ('user', 'assistant'):
        values = draw(st.lists(st.integers(0, 7), min_size=n * width, max_size=n * width))
        channels[role] = [[place * 8 + code for place, code in enumerate(values[f * width:f * width + width])]
                          for f in range(n)] if width > 1 else values
    return dict(id='x', **channels, turns=turns, prompt=draw(st.text('abé字 ', max_size=6)))


def spoken(turns, role):
    return [t for t in sorted(turns, key=lambda t: t['start']) if t['role'] == role]


@given(st.data(), st.sampled_from([name for name in LAYOUTS if LAYOUTS[name][0] != 'segments']))
@settings(max_examples=300, deadline=None)
def test_what_is_laid_comes_back(data, name):
    """Of every layout: what unflatten finds flattens to the same ids, and the streams that the layout carries
    are those of the dialogue."""
    width = WIDTHS.get(name, 1)
    layout, vocab = get_layout(name, rate_hz=12.5), letters(width)      # a frame a step: NeMo rounds
    d = data.draw(dialogues(width))
    silence = 0 if width == 1 else [place * 8 for place in range(width)]
    if name == 'duplex3_real':      # its turns are where the assistant can be heard
        turns = [turn for turn in d['turns'] if turn['role'] == 'assistant']
        d['assistant'] = [max(code, 1) * any(turn['start'] <= at < turn['end'] for turn in turns)
                          for at, code in enumerate(d['assistant'])]
    documents = flatten(d, layout, vocab)
    for document in documents:
        back = unflatten(document.ids, layout, vocab, silence_code=silence)
        again = flatten(back, layout, vocab)
        if document.n_dropped == 0:     # lost text may have been the beginning of a word
            assert np.concatenate([each.ids for each in again] or [[]]).tolist() == document.ids.tolist()
    if layout.order == 'chunks' and not layout.is_ragged:
        assert back['user'] == d['user'] and back.get('prompt', '') == d['prompt']
    if name == 'moshi':
        assert back['assistant'] == d['assistant']
    if name == 'glm4voice' and documents:
        assert [t['text'] for t in spoken(back['turns'], 'assistant')] == [
            t['text'] for t in spoken(d['turns'], 'assistant')]
    if name in ('outetts', 'outetts3'):
        backs = [unflatten(document.ids, layout, vocab) for document in documents]
        turns = sorted(d['turns'], key=lambda t: t['start'])
        texts = [t['text'] for t in turns]
        if name == 'outetts':
            texts = [templates.join_words([w['text'] for w in t['words']]) for t in turns]
        assert [b['turns'][0]['text'] for b in backs] == texts
        assert [b['assistant'] for b in backs] == [d[t['role']][t['start']:t['end']] for t in turns]


@given(st.data(), st.integers(1, 12), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_usdm_pretrain_tells_the_truth(data, n_segment_frame, seed):
    """Whatever is drawn: the speech in a document is that of the turn, in order, and so is the text; equal
    seeds draw equally."""
    layout, vocab = get_layout('usdm_pretrain', n_segment_frame), Letters()
    d = data.draw(dialogues(1, 'abé'))
    turns = sorted(d['turns'], key=lambda t: t['start'])
    for t, document in zip(turns, flatten(d, layout, vocab, rng=np.random.default_rng(seed)), strict=True):
        back = unflatten(document.ids, layout, vocab)
        said = d[t['role']][t['start']:t['end']]
        at = 0
        for each in back['turns'][0]['words']:
            part = back['assistant'][each['start']:each['end']]
            if part:        # a stretch of the turn's speech behind the last
                at = next(i for i in range(at, len(said)) if said[i:i + len(part)] == part) + len(part)
        texts = ' '.join(w['text'] for w in back['turns'][0]['words'] if w['text']).split()
        rest = iter(templates.join_words([w['text'] for w in t['words']]).split())
        assert all(any(text == other for other in rest) for text in texts)
    again = [flatten(d, layout, vocab, rng=np.random.default_rng(seed)) for _ in range(2)]
    assert [x.ids.tolist() for x in again[0]] == [x.ids.tolist() for x in again[1]]


@given(st.data(), st.sampled_from(['moshi', 'nemo_duplex', 'mini_omni2_irq']), st.integers(0, 39))
@settings(max_examples=150, deadline=None)
def test_the_present_does_not_depend_on_later_codes(data, name, frame):
    width = WIDTHS.get(name, 1)
    layout, vocab = get_layout(name), letters(width)
    d = data.draw(dialogues(width))
    changed = dict(d)
    for role in ('user', 'assistant'):
        channel = np.array(d[role])
        channel[frame:] += 1 - 8 * (channel[frame:] % 8 == 7)       # another code of the same place
        changed[role] = channel.tolist()
    n_past = frame // layout.speech_chunk * layout.period
    before, after = flatten(d, layout, vocab)[0], flatten(changed, layout, vocab)[0]
    n_prompt = len(before.ids) % layout.period
    assert before.ids[:n_prompt + n_past].tolist() == after.ids[:n_prompt + n_past].tolist()


# ------------------------------------------------------------------------------------------------------------
# what is refused

@pytest.mark.parametrize('line, message', [
    ('~user.foo', "nothing is called 'user.foo'; streams are speech, text"),
    ('text@sideways', 'text@sideways is unknown; known are speech@real'),
    ('<|sos|> %', "'%' is no slot"),
    ('[text : speech]', 'is none of [text 13 : speech 26]'),
    ('[text <|sos|> | speech] <|eos|>', "the bracket before ' <|eos|>' is none of"),
    ('[text 3 : speech 3', 'a bracket is missing'),
    ('text | speech', 'a bracket is missing'),
    ('text]', 'is none of'),
])
def test_lines_that_cannot_be_read(line, message):
    with pytest.raises(ValueError) as error:
        get_layout('mine', table={'mine': ('turn', line)})
    assert message in str(error.value) and 'layout mine' in str(error.value)


def test_dialogues_that_lack_what_a_layout_needs():
    plain = dialogue(turn('user', 0, 5, 'hi'), turn('assistant', 5, 9, 'yo'))
    newline = dialogue(turn('user', 0, 5, 'h\ni'), turn('assistant', 5, 9, 'yo'))
    for d, name, message in [
        (plain, 'outetts', "dialogue 'd': the user turn at frame 0 has no words with their times"),
        (plain, 'usdm_pretrain', 'has no words with their times'),
        (newline, 'usdm_sft', "'h\\ni' contains the beginning of"),
        (plain, 'mini_omni', 'a frame of the user channel has 1 codes, of the codec 7'),
        (dialogue(n=4, width=2), 'moshi', 'has 2 codes, of the codec 8'),
        (dialogue(n=4, width=2), 'duplex3', 'has 2 codes, of the codec 1'),
    ]:
        with pytest.raises(ValueError) as error:
            flatten(d, get_layout(name), letters(WIDTHS.get(name, 1)))
        assert message in str(error.value) and '\n' not in str(error.value)
    with pytest.raises(ValueError, match='moshi has 8 codes a frame, the codec mel has 1'):
        get_layout('moshi').bind(dict(name='mel', rate_hz=25.0))


def test_pictures():
    """Those of docs/layouts.md and of templates.py"""
    for result in (doctest.testmod(templates), doctest.testfile(str(ROOT / 'docs/layouts.md'), False)):
        assert result.failed == 0 and result.attempted > 5
