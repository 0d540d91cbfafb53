"""Full-Duplex-Bench's and TurnBench's definitions: small timelines, whose figures are worked out by hand."""
import json
import math

import numpy as np
import pytest

soundfile = pytest.importorskip('soundfile', reason='pip install soundfile soxr')
pytest.importorskip('soxr', reason='pip install soundfile soxr')

import evaluate  # noqa: E402
from flatten import ROLES  # noqa: E402
from measures import foreign, full_duplex_bench, turnbench  # noqa: E402
from measures.full_duplex_bench import (  # noqa: E402
    Case,
    distance,
    find_backchannels,
    is_takeover,
    measure,
    overlap_times,
)
from tests.test_foreign import SAID, speech, write_dialogue  # noqa: E402


def case(words=None, heard=(), task='smooth_turn_taking', start=0.0, end=0.0, n_sec=10.0, id='1'):
    return Case('a', id, task, start, end, n_sec, words, list(heard))


@pytest.mark.parametrize('words, heard, taken', [
    ([], [], False),
    ([(2.0, 2.4)], [], False),                                          # one word of 0.4 s
    ([(2.0, 2.2), (2.2, 2.4), (2.4, 2.9)], [], False),                  # three in 0.9 s
    ([(2.0, 2.2), (2.2, 2.4), (2.4, 2.6), (2.6, 2.8)], [], True),       # four in 0.8 s
    ([(2.0, 2.2), (2.8, 3.0)], [], True),                               # two, from first to last 1 s
    (None, [(2.0, 2.9)], False),                                        # heard only: by its length
    (None, [(2.0, 2.4), (2.8, 3.0)], True),
    ([], [(2.0, 4.0)], False),                                          # no word was recognised in it
])
def test_takeover(words, heard, taken):
    assert is_takeover(case(words, heard)) is taken


def test_takeover_rate_and_latency():
    """
    The user ends at 3 s. Of four, three take the turn: 0.5 s later, 0.2 s too early (0 s), 1 s later by what
    is heard. The mean of 0.5, 0 and 1 is 0.5. Pauses have no latency.
    """
    said = [[(3.5, 5.0)], [(2.8, 4.0)], [(3.1, 3.3)]]
    cases = [*(case(words, end=3.0) for words in said), case(None, [(4.0, 5.5)], end=3.0)]
    assert measure(cases) == [dict(folder='a', task='smooth_turn_taking', n=4, takeover_rate=0.75,
                                   latency_sec=pytest.approx(0.5), n_latency=3, n_unknown=1)]
    found, = measure([each._replace(task='pause_handling') for each in cases])
    assert found == dict(folder='a', task='pause_handling', n=4, takeover_rate=0.75, n_unknown=1)


def test_after_an_interruption_counts_what_follows_it():
    """The user interrupts from 2 to 3 s. What was said before that ends counts neither in words nor heard."""
    def interrupted(words, heard):
        return full_duplex_bench.make_case('a', '1', 'user_interruption', 2.0, 3.0, 9.0, words, heard)

    assert interrupted([(0.5, 2.2), (3.4, 3.9)], []).words == [(3.4, 3.9)]
    heard = interrupted(None, [(0.5, 2.2), (2.8, 3.6), (5.0, 6.0)]).heard
    assert heard == [(3.0, 3.6), (5.0, 6.0)]


@pytest.mark.parametrize('words, heard, taken, n', [
    ([], [(1.0, 1.4)], False, 1),                                           # nothing recognised, short
    ([(1.0, 1.2), (1.2, 1.4)], [(1.0, 1.4)], False, 1),                     # two words
    ([(1.0, 1.1), (1.1, 1.2), (1.2, 1.4)], [(1.0, 1.4)], True, 1),          # three
    ([(1.0, 1.2)], [(1.0, 2.0)], True, 1),                                  # one second
    ([(1.0, 1.2)], [(1.0, 2.0), (4.0, 4.3)], False, 2),                     # … but the last stretch decides
    ([(1.0, 1.2)], [(1.0, 1.2), (4.0, 7.1), (8.0, 8.2)], True, 1),          # over 3 s: that is all
])
def test_backchannels(words, heard, taken, n):
    is_taken, found = find_backchannels(case(words, heard))
    assert (is_taken, len(found)) == (taken, n)


def test_times_of_backchannels_beside_peoples():
    """
    0.9 s are five windows of 0.2 s (the last is short); a backchannel from 0.25 to 0.35 s is in the second.
    People's in the same window: 0. In another: the square root of ln 2. People's three windows (0, 1, 0) are,
    in five, (0, 1/4, 1/2, 1/4, 0): beside (0, 1, 0, 0, 0) the mean is (0, 5/8, 1/4, 1/8, 0), the divergences
    ln 8/5 and 1/4 ln 2/5 + 3/4 ln 2. A backchannel from 0.25 to 0.45 s is in two windows.
    """
    one = [(0.25, 0.35)]
    assert distance(one, 0.9, [0, 2, 0, 0, 0]) == pytest.approx(0, abs=1e-4)
    assert distance(one, 0.9, [1, 0, 0, 0, 0]) == pytest.approx(math.sqrt(math.log(2)), abs=1e-4)
    half = (math.log(8 / 5) + math.log(2 / 5) / 4 + 3 * math.log(2) / 4) / 2
    assert distance(one, 0.9, [0, 1, 0]) == pytest.approx(math.sqrt(half), abs=1e-4)
    assert distance([(0.25, 0.45)], 0.9, [0, 1, 1, 0, 0]) == pytest.approx(0, abs=1e-4)
    assert distance([], 0.9, [1, 1]) == 1.0
    cases = [case([], [(0.25, 0.35)], 'backchannel', n_sec=0.9, id='7'),
             case([], [], 'backchannel', n_sec=1.0, id='8')]
    assert measure(cases, {'7': [0, 1, 0]}) == [dict(
        folder='a', task='backchannel', n=2, takeover_rate=0.0, per_sec=pytest.approx(1 / 0.9 / 2),
        jsd=pytest.approx(math.sqrt(half), abs=1e-4), n_unknown=0)]
    assert measure(cases)[0]['jsd'] is None


@pytest.mark.parametrize('heard, stop, response', [
    ([(1.0, 3.0), (4.1, 5.0)], 0.5, 0.6),                       # stops 0.5 s after the overlap begins
    ([(1.0, 2.0), (2.4, 3.0), (4.1, 5.0)], 0.5, 0.6),           # a gap of 0.4 s is none
    ([(1.0, 2.0), (2.6, 3.0), (4.1, 5.0)], None, 0.6),          # one of 0.6 s is: it was silent at 2.5
    ([(1.0, 6.0)], 1.0, None),                                  # talks through: the whole overlap
    ([], None, None),
])
def test_overlap(heard, stop, response):
    """The user speaks over the assistant from 2.5 to 3.5 s."""
    found = overlap_times(case(None, heard, 'overlap', 2.5, 3.5))
    assert found == (stop and pytest.approx(stop), response and pytest.approx(response))


def write_sample(folder, said, n_sec=6.0, words=None, **notes):
    """said: {'input.wav': [(start, end)], …}"""
    folder.mkdir(parents=True)
    for pitch, (name, spans) in zip((120, 180), said.items()):
        soundfile.write(folder / name, speech(spans, n_sec, pitch), 16000)
    for name, note in notes.items():
        (folder / f'{name}.json').write_text(json.dumps(note))
    if words is not None:
        chunks = [dict(text='so', timestamp=[start, end]) for start, end in words]
        (folder / 'output.json').write_text(json.dumps(dict(text='', chunks=chunks)))


def test_their_folders_are_read(tmp_path, capsys):
    """
    A sample of each kind. The pause's assistant talks into it for 1.4 s: by their script a takeover, 1.0. The
    others' times are heard. The distribution of people lies in the folder.
    """
    def two(user, assistant):
        return {'input.wav': user, 'output.wav': assistant}

    v1 = tmp_path / 'v1.0'
    write_sample(v1 / 'candor_pause_handling/1', two([(0.4, 1.2), (1.88, 3.4)], [(1.4, 2.8)]),
                 words=[(1.4, 2.8)], pause=[dict(text='[PAUSE]', timestamp=[1.2, 1.88])])
    write_sample(v1 / 'candor_turn_taking/1', two([(0.4, 2.0)], [(2.5, 4.0)]),
                 turn_taking=[dict(text='[TURN-TAKING]', timestamp=[2.0, 2.1])])
    write_sample(v1 / 'synthetic_user_interruption/1', two([(2.0, 3.0)], [(0.4, 2.4), (3.6, 5.0)]),
                 interrupt=[dict(context='', interrupt='', timestamp=[2.0, 3.0])])
    write_sample(v1 / 'icc_backchannel/1', two([(0.4, 5.0)], [(2.06, 2.34)]), words=[])
    write_sample(tmp_path / 'v1.5/background_speech/1', two([(2.0, 3.0)], [(0.4, 2.4), (3.6, 5.0)]),
                 metadata=dict(context_text='', timestamps=[2.0, 3.0]))
    (tmp_path / foreign.HUMAN).write_text(json.dumps({'1': [0] * 10 + [1, 1] + [0] * 19}))
    metrics = evaluate.main(evaluate.Config(dialogues=str(tmp_path), vad='energy', n_report=0))
    found = {figures['folder']: figures for figures in metrics['full_duplex_bench']}
    about = pytest.approx
    assert found == {
        'v1.0/candor_pause_handling': dict(
            folder='v1.0/candor_pause_handling', task='pause_handling', n=1, takeover_rate=1.0, n_unknown=0),
        'v1.0/candor_turn_taking': dict(
            folder='v1.0/candor_turn_taking', task='smooth_turn_taking', n=1, takeover_rate=1.0,
            latency_sec=about(0.5, abs=0.03), n_latency=1, n_unknown=1),
        'v1.0/synthetic_user_interruption': dict(
            folder='v1.0/synthetic_user_interruption', task='user_interruption', n=1, takeover_rate=1.0,
            latency_sec=about(0.6, abs=0.03), n_latency=1, n_unknown=1),
        'v1.0/icc_backchannel': dict(
            folder='v1.0/icc_backchannel', task='backchannel', n=1, takeover_rate=0.0, per_sec=about(1 / 6),
            jsd=about(0, abs=0.01), n_unknown=0),
        'v1.5/background_speech': dict(
            folder='v1.5/background_speech', task='overlap', n=1, stop_sec=about(0.4, abs=0.03), n_stop=1,
            response_sec=about(0.6, abs=0.03), n_response=1)}
    assert metrics['n_pause'] == 1 and metrics['pause_taken_rate'] == 1
    out = capsys.readouterr().out
    assert 'v1.0/candor_pause_handling: takeover rate' in out and '0.935' in out and 'PersonaPlex*' in out
    assert 'the words of 2 samples are not known' in out
    one_set = evaluate.Config(dialogues=str(v1 / 'candor_pause_handling'), vad='energy', n_report=0)
    alone = evaluate.main(one_set)
    assert [(each['folder'], each['takeover_rate']) for each in alone['full_duplex_bench']] == [
        ('candor_pause_handling', 1.0)]


def test_an_export_has_the_figures_of_what_was_exported(tmp_path):
    """
    The question ends at 2.0 s, the answer begins at 2.4; into it the user breaks from 4.4 to 5.6 s, it stops
    at 5.2, and goes on at 6.0 with one word of 0.4 s, which is no takeover.
    """
    (tmp_path / 'sw.txt').write_text('\n'.join(' '.join(map(str, row)) for row in SAID))
    spans = {role: [(start, end) for who, start, end, _ in SAID if who == role] for role in ROLES}
    write_dialogue(tmp_path / 'sw.wav', **spans, n_sec=8.0)
    talks = list(foreign.read_conversations(tmp_path))
    foreign.export_full_duplex_bench(talks, str(tmp_path / 'out'))
    here = {each['folder']: each for each in measure(full_duplex_bench.cases_of(talks))}
    exported = full_duplex_bench.read_cases(str(tmp_path / 'out'), 'energy')
    there = {each['folder']: each for each in measure(exported)}
    assert here.keys() == there.keys() and len(here) == 4
    for name, figures in here.items():
        assert there[name] == {key: pytest.approx(value, abs=0.03) if isinstance(value, float) else value
                               for key, value in figures.items()}
    assert here['smooth_turn_taking']['latency_sec'] == pytest.approx(0.4)
    assert here['pause_handling']['takeover_rate'] == here['user_interruption']['takeover_rate'] == 0
    overlap = here['v1.5/user_interruption']
    assert (overlap['stop_sec'], overlap['response_sec']) == (pytest.approx(0.8), pytest.approx(0.4))


def test_a_text_without_times_is_spread_over_its_turn():
    turn = dict(start=10, end=30, text='a b c d')
    assert list(full_duplex_bench.words_of(turn)) == [(10, 15), (15, 20), (20, 25), (25, 30)]
    assert not list(full_duplex_bench.words_of(dict(turn, text='')))


# ------------------------------------------------------------------------------------------------------------
# TurnBench

def talk(user, assistant, chunk_frames=10):
    speaks = {role: np.array([c == '#' for c in drawing]) for role, drawing in zip(ROLES, (user, assistant))}
    return dict(id='20', rate_hz=25.0, n_frame=len(user), speaks=speaks, chunk_frames=chunk_frames)


#        0         10        20        30        40        50        60        70
USER = '..###########...........................#####################.................'
MODEL = '.......................#####......................##########..................#.'


def test_turnbench_submission():
    """
    At 25 Hz in chunks of 10 frames, 80 ms of look-ahead: it begins in frame 23, decided by 30 / 25 + 0.08 =
    1.28 s, in silence: eot. In frame 50, decided by 60 / 25 + 0.08 = 2.48 s, while the user speaks: an
    interruption by the other. What is decided after the end is not there. A gap of 0.4 s is no silence.
    """
    n = len(MODEL)
    assert turnbench.events(talk(USER.ljust(n, '.'), MODEL), 0.08) == ([1.28], [2.48])
    assert turnbench.events(talk(USER.ljust(n, '.'), MODEL, chunk_frames=0), 0.0) == ([0.96, 3.16], [2.04])
    gap = USER[:5] + '.' * 10 + '#' * 20
    assert turnbench.events(talk(gap.ljust(40, '.'), '.' * 8 + '#' * 4 + '.' * 28), 0.0) == ([], [0.4])
    silent = talk('.' * n, '.' * n)
    assert turnbench.submission([(talk(USER.ljust(n, '.'), MODEL), silent)], 0.08) == dict(
        schema_version=1, predictions=[dict(
            conversation_id='20', speaker_1=dict(eot=[1.28], interruption=[]),
            speaker_2=dict(eot=[], interruption=[2.48]))])


def test_turnbench_of_a_checkpoint(small_run, tmp_path, capsys):
    """It listens to both sides; times rise, end with a chunk, and lie in the recording."""
    data, checkpoint = small_run
    path = tmp_path / 'predictions.json'
    evaluate.main(evaluate.Config(checkpoint=str(checkpoint), data=str(data), n_report=0, out=str(tmp_path),
                                  turnbench=str(path)))
    content = json.loads(path.read_text())
    assert content['schema_version'] == 1 and len(content['predictions']) == 5
    for row in content['predictions']:
        assert row.keys() == {'conversation_id', 'speaker_1', 'speaker_2'}
        for speaker in ('speaker_1', 'speaker_2'):
            for times in row[speaker].values():
                assert times == sorted(set(times))
    assert 'each time is the end of a chunk of' in capsys.readouterr().out
