"""The measures are right: worked examples, drawn and derived by hand in tests/golden/measures.txt."""
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import measures.turns
from flatten import ROLES
from measures.turns import assess, conversation, penalty_times, stretches, summarise, who_speaks

GOLDEN = (pathlib.Path(__file__).parent / 'golden' / 'measures.txt').read_text()
EXAMPLES = dict(re.findall(r'^== (.*)\n((?:(?!==).*\n?)*)', GOLDEN, re.M))


def turns_of(role, drawing):
    return [dict(role=role, start=m.start(), end=m.end(), text='') for m in re.finditer('[#-]+', drawing)]


def converse(user, assistant, reference=None):
    """Drawings -> a conversation, as sample.py and evaluate.py make it: the code of silence is 0."""
    n_frame = max(len(user), len(assistant))
    channels = {role: [int(c == '#') for c in drawing.ljust(n_frame, '.')]
                for role, drawing in (('user', user), ('assistant', assistant))}
    decoded = dict(channels, turns=turns_of('assistant', assistant))
    expected = None if reference is None else turns_of('assistant', reference)
    return conversation('drawn', 25.0, turns_of('user', user), decoded, [0], expected=expected)


def read(example):
    drawings = dict(re.findall(r'^(user|assistant|reference) +([#.-]+)$', example, re.M))
    pairs = [pair.split() for line in example.splitlines() if ' | ' in line for pair in line.split(' | ')]
    figures = {key: None if value == 'n' else float(value) for key, value in pairs}
    return converse(**drawings), figures


@pytest.mark.parametrize('name', EXAMPLES)
def test_worked_example(name):
    drawn, figures = read(EXAMPLES[name])
    found = summarise(assess(drawn), drawn['rate_hz'])
    expected = {key: value if value is None else pytest.approx(value) for key, value in figures.items()}
    assert figures and {key: found[key] for key in figures} == expected


def test_the_drawing_in_the_docstring():
    """The user's turns begin at 2, 38 and 59; the picture says what becomes of each."""
    user, assistant = (re.search(f'{role} +([.░▓-]+)', measures.turns.__doc__).group(1) for role in ROLES)
    user, assistant = user.replace('░', '#'), assistant.replace('▓', '#')
    one, mhm, cut = assess(converse(user, assistant, assistant))
    assert (one['false_start'], one['pauses'], one['end'], one['response']) == (10, [(9, 16, True)], 20, 2)
    assert (mhm['start'], mhm['kind'], mhm['yielded']) == (38, 'backchannel', 10)
    assert (cut['start'], cut['kind'], cut['yielded']) == (59, 'interruption', 4)


def test_a_backchannel_is_not_joined_with_the_next_question():
    """
    "Mhm" just before the answer ends, 22 frames (0.88 s) later a question: the answer was not interrupted.
    Two parts of a question, as far apart, are one; and so are those of an interruption, whose first lasts for
    a second.
    """
    mhm = '.##########................#######......................##########...........'
    answer = '.............#####################.......................................####'
    assert [turn['kind'] for turn in assess(converse(mhm, answer))] == ['question', 'backchannel', 'question']
    parts = '.##########................#########################......................####......'
    cut, = assess(converse(parts[20:], answer[9:]))
    assert cut['kind'] == 'interruption' and cut['end'] == 58
    alone, = assess(converse(mhm[20:], ''))
    assert alone['kind'] == 'question' and (alone['start'], alone['end']) == (7, 46)


@given(st.text('#.', min_size=40, max_size=80), st.text('#.', min_size=40, max_size=80),
       st.text('#.', min_size=40, max_size=80), st.text('#.', min_size=40, max_size=80))
@settings(max_examples=100, deadline=None)
def test_two_models_have_the_same_interruptions(user, reference, one, other):
    """What a turn of the user is depends on the user and the reference alone."""
    found = [assess(converse(user, assistant.ljust(80, '.'), reference)) for assistant in (one, other)]
    assert [turn['kind'] for turn in found[0]] == [turn['kind'] for turn in found[1]]
    figures = [summarise(outcomes, 25.0) for outcomes in found]
    for key in ('n_turn', 'n_answer_due', 'n_interruption', 'n_backchannel'):
        assert figures[0][key] == figures[1][key]


def test_penalties():
    """
    At 25 Hz: an interruption of 20 frames (0.8 s) stops it after 5 (0.2 s), another not in its time (0.8 s);
    a backchannel of 10 frames stops it (0.4 s), another does not (0). The mean is 1.4 / 4. One in which it is
    silent counts for nothing.
    """
    def turn(kind, n, yielded, was_speaking=True):
        return dict(kind=kind, start=100, end=100 + n, yielded=yielded, was_speaking=was_speaking)

    found = penalty_times([
        turn('interruption', 20, 5), turn('interruption', 20, 21), turn('interruption', 20, None, False),
        turn('backchannel', 10, 10), turn('backchannel', 10, None)], 25.0)
    assert found == {key: pytest.approx(value) for key, value in dict(
        penalty_sec=0.35, false_stop_rate=0.5, stop_delay_sec=0.2).items()}


def moved(turn, n):
    return dict(turn, start=turn['start'] + n, end=turn['end'] + n)


@given(st.lists(st.tuples(st.integers(5, 40), st.integers(20, 60)), min_size=1, max_size=5),
       st.integers(0, 12))
@settings(max_examples=50, deadline=None)
def test_replies_shifted_by_some_frames_come_later_by_those(lengths, n):
    """
    Answers of 15 frames in gaps of 50: n frames later each, the response is n frames longer, and nothing
    else changes.
    """
    at, user, answers = 2, [], []
    for n_user, _ in lengths:
        user.append(dict(role='user', start=at, end=at + n_user, text=''))
        answers.append(dict(role='assistant', start=at + n_user, end=at + n_user + 15, text=''))
        at += n_user + 50

    def measure(shift):
        spoken = [moved(turn, shift) for turn in answers]
        codes = np.zeros(at, int)
        for turn in spoken:
            codes[turn['start']:turn['end']] = 1
        decoded = dict(user=np.ones(at, int), assistant=codes, turns=spoken)
        return summarise(assess(conversation('x', 25.0, user, decoded, [0], expected=answers)), 25.0)

    still, later = measure(0), measure(n)
    assert later['response_ms'] == pytest.approx(still['response_ms'] + 40 * n)
    assert later['response_median_ms'] == 40 * n
    assert (later['no_answer_rate'], later['false_start_rate'], later['unprompted_rate']) == (0, 0, 0)


def test_shares_of_time_and_channels_swapped():
    """
    60 frames: the user speaks 2-20 and 40-50, the other 18-30 and 55-58; both 18-20, neither 0-2, 30-40,
    50-55, 58-60.
    """
    one = '..##################....................##########..........'
    other = '..................############.........................###..'
    there, back = who_speaks([converse(one, other)]), who_speaks([converse(other, one)])
    assert there == dict(n_conversation=1, sec=2.4, both_speak=2 / 60, neither_speaks=pytest.approx(19 / 60),
                         gap_user_to_assistant_ms=pytest.approx((-80 + 200) / 2),
                         gap_assistant_to_user_ms=400)
    assert back == dict(there, gap_user_to_assistant_ms=there['gap_assistant_to_user_ms'],
                        gap_assistant_to_user_ms=there['gap_user_to_assistant_ms'])


@given(st.lists(st.booleans(), max_size=80), st.integers(0, 8))
@settings(max_examples=100, deadline=None)
def test_stretches_cover_all_speech_and_no_long_gap(speaks, n_join):
    speaks = np.array(speaks, bool)
    found = stretches(speaks, 25.0, n_join / 25)
    covered = np.zeros_like(speaks)
    for start, end in found:
        assert speaks[start] and speaks[end - 1]
        covered[start:end] = True
    assert (covered | ~speaks).all()
    for (_, end), (start, _) in zip(found, found[1:]):
        assert start - end >= max(n_join, 1)


@given(st.text('#.-', min_size=1, max_size=60), st.text('#.', min_size=1, max_size=60),
       st.none() | st.text('#.', max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_conversation_can_be_measured(user, assistant, reference):
    drawn = converse(user, assistant, reference)
    figures = summarise(assess(drawn), 25.0)
    shares = [value for key, value in figures.items() if '_acc_' in key or key.endswith('_rate')]
    assert all(value is None or 0 <= value <= 1 for value in shares)
    assert set(drawn['speaks']) == set(ROLES)
