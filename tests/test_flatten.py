"""Layouts: drawings that cannot go stale, the inverse, and what is refused."""
import doctest
import json
import pathlib
import re

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import flatten as F
from flatten import LAYOUTS, Letters, check, count_prompt, draw, flatten, get_layout, lay_prompt, unflatten
from measures.draw import show

VOCAB = Letters()
GOLDEN = pathlib.Path(__file__).parent / 'golden'


def turn(role, start, end, text):
    return dict(role=role, start=start, end=end, text=text)


def dialogue(n_frame, *turns, id='d'):
    """A channel that counts, so that a code shows its frame: user 0, 1, 2 …, assistant the same from 32."""
    codes = np.arange(n_frame) % 32
    return dict(id=id, user=codes.tolist(), assistant=(codes + 32).tolist(), turns=list(turns))


EXAMPLES = {
    # the user asks for 5 frames, the answer starts with the very next one;
    # the last chunk is filled up with silence
    'turn_taking': dialogue(14, turn('user', 0, 5, 'hi?'), turn('assistant', 5, 11, 'yes')),
    # the user speaks into the answer at frame 7; the assistant stops at 10, in chunk 2:
    # of 8 letters 3 chunks x 2 are written
    'barge_in': dialogue(24, turn('user', 0, 3, 'q'), turn('assistant', 3, 10, 'abcdefgh'),
                         turn('user', 7, 20, 'stop')),
    # "mhm" ends while the answer goes on: no barge-in, all 12 letters are written,
    # in the silence after the turn, too
    'backchannel': dialogue(24, turn('assistant', 3, 13, 'abcdefghijkl'), turn('user', 6, 8, 'mhm')),
    # 12 letters want 6 chunks: the text outlasts its turn by 4,
    # then the next turn, in chunk 5, cuts its last two letters
    'overlong_text': dialogue(32, turn('assistant', 1, 6, 'abcdefghijkl'), turn('assistant', 21, 30, 'xy')),
    # nobody takes the floor: all the model is asked for is silence
    'silence': dialogue(8, turn('user', 2, 5, 'mhm')),
}


@pytest.mark.parametrize('name', EXAMPLES)
def test_golden(name, regen):
    """Each drawing was derived by hand once (the comments above) and is reviewed as text."""
    drawn = []
    for layout in (get_layout('duplex3', speech_chunk=4), get_layout('duplex2', speech_chunk=4),
                   get_layout('half_duplex'), get_layout('asr'), get_layout('tts')):
        for document in flatten(EXAMPLES[name], layout, VOCAB):
            title = f'{layout.name}, {document.n_dropped} text tokens dropped'
            drawn.append(f'{title}\n{draw(document, layout, VOCAB)}\n')
    path = GOLDEN / f'{name}.txt'
    if regen:
        path.write_text('\n'.join(drawn), encoding='utf-8')
    assert '\n'.join(drawn) == path.read_text(encoding='utf-8')


def test_the_pictures_in_the_docstring():
    result = doctest.testmod(F)
    assert result.failed == 0 and result.attempted == 14


def test_shown_against_time():
    """
    8 chunks of 3 frames at 25 Hz; without its colours the barge-in reads as: the answer from frame 3, both
    speaking (▓) from 7 to 10.
    """
    shown = show(EXAMPLES['barge_in'], get_layout('duplex3', speech_chunk=3), VOCAB, rate_hz=25.0)
    lines = re.sub('\033\\[\\d*m', '', shown).splitlines()
    assert lines[0] == 'd  8 chunks of 3 frames, 64 tokens, 40 learned, 2 text tokens dropped'
    assert lines[1].split() == ['seconds', '|'.join(f'{0.12 * c:.1f}' for c in range(8))]
    grid = {line[:17].strip(): line[17:].split('|') for line in lines[2:6]}
    assert ''.join(grid['user words']).startswith('q') and 'stop' in ''.join(grid['user words'])
    assert ''.join(grid['user.speech']) == '███▁▁▁▁▓▓▓' + '█' * 10 + '▁' * 4
    assert ''.join(grid['assistant.speech']) == '▁▁▁████▓▓▓' + '▁' * 14
    assert [cell.strip() for cell in grid['assistant.text']] == ['··', 'ab', 'cd', 'ef', *4 * ['··']]


def test_duplex3_by_hand():
    """11 frames, chunks of 4: 3 chunks of 4 + 2 + 4 = 30 tokens, 18 of them learned. The answer starts at
    frame 5, so in chunk 1 the assistant is silent for one frame, then says codes 37, 38, 39, and its two
    letters stand before them."""
    layout = get_layout('duplex3', speech_chunk=4)
    document, = flatten(dialogue(11, turn('assistant', 5, 9, 'me')), layout, VOCAB)
    s, t, c = VOCAB.control['<|silent_speech|>'], VOCAB.control['<|silent_text|>'], VOCAB.code_start
    assert document.ids.tolist() == [
        c, c + 1, c + 2, c + 3, t, t, s, s, s, s,
        c + 4, c + 5, c + 6, c + 7, ord('m'), ord('e'), s, c + 37, c + 38, c + 39,
        c + 8, c + 9, c + 10, s, t, t, c + 40, s, s, s]
    assert document.learned.tolist() == ([False] * 4 + [True] * 6) * 3


@st.composite
def dialogues(draw):
    """Any dialogue with silence between an assistant's turns."""
    n_frame = draw(st.integers(1, 60))
    turns = []
    for role in ('user', 'assistant'):
        cuts = draw(st.lists(st.integers(0, n_frame), unique=True, max_size=6).map(sorted))
        turns += [turn(role, start, end, draw(st.text('abé字 ', max_size=12)))
                  for start, end in zip(cuts[::2], cuts[1::2])]
    codes = st.lists(st.integers(0, VOCAB.n_codes - 1), min_size=n_frame, max_size=n_frame)
    prompt = draw(st.one_of(st.just(''), st.text('abé字 ', max_size=12)))
    return dict(id='x', user=draw(codes), assistant=draw(codes), turns=turns, prompt=prompt)


sizes = dict(speech_chunk=st.integers(1, 12), text_chunk=st.integers(1, 3))


@given(dialogues(), st.sampled_from(['duplex3', 'duplex2']), sizes['speech_chunk'], sizes['text_chunk'])
@settings(max_examples=300, deadline=None)
def test_chunks_come_back(d, name, speech_chunk, text_chunk):
    """unflatten undoes flatten: channels, turns of the assistant and the prompt return, its text as far as it
    was not dropped, and what returned flattens to the same ids."""
    layout = get_layout(name, speech_chunk, text_chunk)
    document, = flatten(d, layout, VOCAB)
    back = unflatten(document.ids, layout, VOCAB, silence_code=7, id='x')
    n_prompt = count_prompt(document.ids, VOCAB)
    assert n_prompt == len(lay_prompt(d['prompt'], VOCAB)) and not document.learned[:n_prompt].any()
    assert len(document.ids) == n_prompt + -(-len(d['user']) // speech_chunk) * layout.period
    assert back['user'] == d['user'] and back.get('prompt', '') == d['prompt']
    mine = sorted((t for t in d['turns'] if t['role'] == 'assistant'), key=lambda t: t['start'])
    assert [(t['start'], t['end']) for t in back['turns']] == [(t['start'], t['end']) for t in mine]
    said = set().union(*(range(t['start'], t['end']) for t in mine))
    assert back['assistant'] == [code if f in said else 7 for f, code in enumerate(d['assistant'])]
    if name == 'duplex3':
        assert all(t['text'].startswith(b['text']) for t, b in zip(mine, back['turns']))
        assert sum(len(t['text']) - len(b['text']) for t, b in zip(mine, back['turns'])) == document.n_dropped
    again, = flatten(back, layout, VOCAB)
    assert again.ids.tolist() == document.ids.tolist()


@given(dialogues(), st.sampled_from(['asr', 'tts', 'half_duplex']))
@settings(max_examples=200, deadline=None)
def test_turns_come_back(d, name):
    layout = get_layout(name)
    turns = sorted(d['turns'], key=lambda t: t['start'])
    documents = flatten(d, layout, VOCAB)
    backs = [unflatten(document.ids, layout, VOCAB) for document in documents]
    got = [(t['text'], b[t['role']][t['start']:t['end']]) for b in backs for t in b['turns']]
    assert got == [(t['text'], d[t['role']][t['start']:t['end']]) for t in turns]
    for document, b in zip(documents, backs):
        again = [each.ids for each in flatten(b, layout, VOCAB)]
        assert np.concatenate(again).tolist() == document.ids.tolist()
    if name == 'half_duplex':
        assert [t['role'] for b in backs for t in b['turns']] == [t['role'] for t in turns]


def test_two_turns_in_one_chunk_stay_two():
    d = dialogue(36, turn('assistant', 0, 28, 'a'), turn('assistant', 29, 30, 'b'))
    layout = get_layout('duplex3', speech_chunk=9)
    back = unflatten(flatten(d, layout, VOCAB)[0].ids, layout, VOCAB)
    assert [(t['start'], t['end'], t['text']) for t in back['turns']] == [(0, 28, 'a'), (29, 30, 'b')]


def test_touching_turns_come_back_where_their_texts_do_not_touch():
    d = dialogue(24, turn('assistant', 2, 14, 'a'), turn('assistant', 14, 22, 'bc'))
    layout = get_layout('duplex3', speech_chunk=4)
    document, = flatten(d, layout, VOCAB)
    back = unflatten(document.ids, layout, VOCAB)
    # 12, for 14: the border of a chunk
    assert [(t['start'], t['end'], t['text']) for t in back['turns']] == [(2, 12, 'a'), (12, 22, 'bc')]
    assert flatten(back, layout, VOCAB)[0].ids.tolist() == document.ids.tolist()


def test_text_a_model_writes_one_chunk_early_is_that_of_the_speech_to_come():
    layout, silent = get_layout('duplex3', 4), VOCAB.control['<|silent_text|>']
    document, = flatten(dialogue(40, turn('assistant', 4, 10, 'ab'), turn('assistant', 24, 32, 'xyz')),
                        layout, VOCAB)
    grid = document.ids.reshape(-1, layout.period)      # chunks 6 and 7 hold xy and z: now a chunk earlier
    grid[5:8, 4:6] = [[ord('x'), ord('y')], [ord('z'), silent], [silent, silent]]
    assert [t['text'] for t in unflatten(grid.reshape(-1), layout, VOCAB)['turns']] == ['ab', 'xyz']
    grid[3, 4:6] = [ord('?'), ord('?')]                 # and in the silence between nobody says this
    assert [t['text'] for t in unflatten(grid.reshape(-1), layout, VOCAB)['turns']] == ['ab', 'xyz']


@given(dialogues(), st.integers(1, 12), st.integers(0, 59))
@settings(max_examples=200, deadline=None)
def test_the_present_does_not_depend_on_the_future(d, speech_chunk, frame):
    """Codes after a frame do not change any token of a chunk that ends before it."""
    layout = get_layout('duplex3', speech_chunk)
    changed = dict(d)
    for role in ('user', 'assistant'):
        changed[role] = [c if f < frame else (c + 1) % VOCAB.n_codes for f, c in enumerate(d[role])]
    n_past = frame // speech_chunk * layout.period
    before, after = flatten(d, layout, VOCAB)[0], flatten(changed, layout, VOCAB)[0]
    assert before.ids[:n_past].tolist() == after.ids[:n_past].tolist()


def test_text_is_never_cut_inside_a_character():
    class Bytes(Letters):
        def encode(self, text):
            return list(text.encode())

        def decode(self, ids):
            return bytes(ids).decode(errors='replace')

    d = dialogue(8, turn('assistant', 0, 8, 'a字b'))     # 1 + 3 + 1 bytes, room for 4 - 1
    document, = flatten(d, get_layout('duplex3', 8, 3), Bytes())
    assert unflatten(document.ids, get_layout('duplex3', 8, 3), Bytes())['turns'][0]['text'] == 'a'
    assert document.n_dropped == 4


def test_a_cut_text_reads_back_as_itself():
    """
    Two spaces are one token at the end of a text, and two before a word, as Qwen2 cuts them: they go
    together.
    """
    class Spaces(Letters):
        def encode(self, text):
            stripped = text.rstrip(' ')
            return [*map(ord, stripped)] + ([ord('_')] if len(text) > len(stripped) else [])

        def decode(self, ids):
            return ''.join(map(chr, ids)).replace('_', '  ')

    layout = get_layout('duplex3', 8, 3)
    document, = flatten(dialogue(8, turn('assistant', 0, 8, 'a  b')), layout, Spaces())
    assert unflatten(document.ids, layout, Spaces())['turns'][0]['text'] == 'a' and document.n_dropped == 3


def test_an_empty_dialogue():
    d = dict(id='e', user=[], assistant=[], turns=[])
    for name in ('duplex3', 'duplex2'):
        document, = flatten(d, get_layout(name), VOCAB)
        assert len(document.ids) == 0 and unflatten(document.ids, get_layout(name), VOCAB, id='e') == d
        assert 'user.speech' in draw(document, get_layout(name), VOCAB)


def test_a_listeners_mhm_does_not_cost_text_that_fits():
    d = dialogue(40, turn('assistant', 0, 20, 'abcdefghij'), turn('user', 9, 11, 'mhm'))
    assert flatten(d, get_layout('duplex3', speech_chunk=4), VOCAB)[0].n_dropped == 0


def test_options():
    layout = get_layout('half_duplex', learn_user_text=False)
    document, = flatten(EXAMPLES['turn_taking'], layout, VOCAB)
    assert 'h?' not in draw(document, layout, VOCAB) and ' h i ? ' in draw(document, layout, VOCAB)
    assert [slot.n for slot in get_layout('duplex3', 5, 3).chunk] == [5, 3, 5]
    assert get_layout('duplex3').period == 22 and get_layout('duplex2').period == 20


@pytest.mark.parametrize('change, message', [
    (dict(user=[0, 64, 1]), "dialogue 'd': user code 64 at frame 1 is out of range, the codec has 0 to 63"),
    (dict(user=[0, -1, 1]), 'user code -1 at frame 1 is out of range'),
    (dict(user=[0, 1]), 'channels of unequal length, user 2 frames and assistant 3'),
    (dict(user=[0.5, 1, 1]), 'the user channel is not a list of whole numbers'),
    (dict(turns=[turn('user', 0, 4, '')]), 'user turn 0 to 4 does not lie in its channel of 3 frames'),
    (dict(turns=[turn('user', 2, 2, '')]), 'user turn 2 to 2 does not lie'),
    (dict(turns=[turn('user', 0, 2, ''), turn('user', 1, 3, '')]),
     'user turns overlap, one starts at frame 1 before the last ended at 2'),
    (dict(turns=[turn('robot', 0, 2, '')]), "a turn has role 'robot'"),
    (dict(turns=[dict(role='user', start=0, end=2)]), 'a turn has text None'),
    (dict(turns=[turn('user', 0.0, 2, '')]), 'a turn has start 0.0'),
    (dict(turns=[1]), 'turns is not a list of objects'),
    (dict(turns=None), 'turns is not a list'),
    (dict(user=[[1], [1, 2]]), 'a list of lists'),
])
def test_refused(change, message):
    d = dict(dialogue(3), **change)
    with pytest.raises(ValueError) as error:
        check(d, VOCAB.n_codes)
    assert message in str(error.value) and '\n' not in str(error.value)


def test_refused_layouts():
    duplex3, one_sided = get_layout('duplex3'), dict(dialogue(3), assistant=[])
    for call, message in (
        (lambda: get_layout('duplex4'), "did you mean 'duplex3'"),
        (lambda: get_layout('duplex3', 0), 'speech_chunk is 0'),
        (lambda: flatten(one_sided, duplex3, VOCAB), 'one channel only'),
        (lambda: unflatten([1] * 23, duplex3, VOCAB), '23 ids are no whole number of chunks of 22'),
        (lambda: unflatten([1], get_layout('asr'), VOCAB), 'where a turn has to start'),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)


def test_every_layout_is_drawn():
    """In the docstring, or in docs/layouts.md, whose drawings tests/test_layouts.py runs."""
    drawn = F.__doc__ + (ROOT / 'docs/layouts.md').read_text(encoding='utf-8')
    assert all(f"'{name}" in drawn for name in LAYOUTS if name not in ('mini_omni', 'moshi'))
    assert F.CONTROL.keys() <= VOCAB.control.keys()


def test_command_line(tmp_path, small_tokenizer, run):
    """Through the shell and back: dialogues, ids, the same dialogues."""
    rows = []
    for name in ('turn_taking', 'silence'):
        answers = [t for t in EXAMPLES[name]['turns'] if t['role'] == 'assistant']
        rows.append(dict(EXAMPLES[name], id=name, turns=answers or [turn('assistant', 0, 8, 'ok')]))
    (tmp_path / 'in.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
    arguments = ['--layout=duplex3', f'--tokenizer={small_tokenizer}', '--n_codes=64']
    out = run('flatten.py', *arguments, tmp_path / 'in.jsonl').stdout
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line['id'] for line in lines] == ['turn_taking', 'silence']
    assert all(len(line['ids']) == len(line['learned']) == 44 or len(line['ids']) == 22 for line in lines)
    assert set(lines[0]['learned']) == {0, 1}
    (tmp_path / 'ids.jsonl').write_text(out)
    out = run('flatten.py', *arguments, '--inverse', tmp_path / 'ids.jsonl').stdout
    for row, got in zip(rows, map(json.loads, out.splitlines()), strict=True):
        assert got['turns'] == row['turns'] and got['user'] == row['user']


@pytest.mark.parametrize('line, message', [
    ('{"id": "a", "user": [1], "assistant": [1], '
     '"turns": [{"role": "user", "start": 0, "end": 2, "text": ""}]}', ":2: dialogue 'a': user turn 0 to 2"),
    ('{"id": "a", "user": [1]}', ":2: dialogue 'a' has no field 'assistant'"),
    ('not json', ':2: not JSON'),
    ('[1]', ':2: not a JSON object'),
])
def test_command_line_names_file_and_row(tmp_path, small_tokenizer, run, line, message):
    good = '{"id": "a", "user": [1], "assistant": [1], "turns": []}'
    (tmp_path / 'in.jsonl').write_text(f'{good}\n{line}\n')
    result = run('flatten.py', f'--tokenizer={small_tokenizer}', tmp_path / 'in.jsonl', fails=True)
    assert f'in.jsonl{message}' in result.stderr and result.stderr.count('\n') == 1
