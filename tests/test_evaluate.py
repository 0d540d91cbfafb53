"""The measures are right: each figure is derived by hand beside it."""
import json

import pytest

from evaluate import plain, summarise, turn_taking


def turn(role, start, end, text=''):
    return dict(role=role, start=start, end=end, text=text)


# frames          0         10        20        30        40        50        60
# user              ░░░░░░░░            ░░░░░░░░░░░         ░░░░░░
# assistant                 ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓              (interrupted at 20, stops at 24; answers at 31)
REFERENCE = dict(id='r', user=list(range(70)), assistant=list(range(70)), turns=[
    turn('user', 2, 10, 'a?'), turn('assistant', 10, 24, 'An interrupted'), turn('user', 20, 31, 'b?'), turn('assistant', 31, 40, 'It is B.'),
    turn('user', 42, 48, 'c?'), turn('assistant', 48, 60, 'It is C.')])
ANSWERS = [dict(t) for t in REFERENCE['turns'] if t['role'] == 'assistant']


def measure(*turns):
    assistant = [99] * 70
    for t in turns:
        assistant[t['start']:t['end']] = range(t['start'], t['end'])
    return summarise(turn_taking(REFERENCE, dict(user=REFERENCE['user'], assistant=assistant, turns=list(turns))), rate_hz=25.0)


def test_a_perfect_assistant():
    """Starts in the very frame in which the user has ended: 0 ms, within 1. Interrupted at frame 20 it is silent from 24: 4
    frames, 160 ms. Two of three answers are whole, both are right, and the codes are those of the reference."""
    m = measure(*ANSWERS)
    assert m == dict(m, n_question=3, n_answer=2, n_interruption=1, answer_accuracy=1.0, assistant_acc_by_1=1.0, assistant_acc_by_25=1.0,
                     response_ms=0.0, false_start_rate=0.0, unprompted_rate=0.0, user_acc_by_10=1.0, user_acc_by_25=1.0, yield_ms=160.0, code_error_rate=0.0)
    assert m['code_error_rate_of_another_answer'] == 1.0


def test_a_late_assistant():
    """3 frames later everywhere is 120 ms; by the 1st frame it has never answered, by the 5th always. The answer to a? now
    starts at 13 and ends at 27, 7 frames after the user's barge-in at 20, and that to b? ends 1 after the next: 160 ms."""
    m = measure(*[dict(t, start=t['start'] + 3, end=t['end'] + 3) for t in ANSWERS])
    assert (m['response_ms'], m['assistant_acc_by_1'], m['assistant_acc_by_5'], m['yield_ms']) == (120.0, 0.0, 1.0, 160.0)


def test_a_silent_assistant():
    m = measure()
    assert (m['answer_accuracy'], m['assistant_acc_by_25'], m['false_start_rate'], m['n_interruption']) == (0.0, 0.0, 0.0, 0)
    assert m['response_ms'] is None and m['user_acc_by_25'] is None and m['code_error_rate'] == 1.0


def test_a_babbling_assistant():
    """It speaks all the time in turns of 5 frames with a frame between: into every question it starts anew."""
    m = measure(*[turn('assistant', at, at + 5, 'bla') for at in range(1, 64, 6)])
    assert m['false_start_rate'] == 1.0 and m['answer_accuracy'] == 0.0


def test_who_cannot_wait():
    """After the answer to c? at 48 to 60 it adds a remark at 64: after one of three user turns."""
    assert measure(*ANSWERS, turn('assistant', 64, 68, 'oh'))['unprompted_rate'] == pytest.approx(1 / 3)


def test_who_never_stops_never_takes_the_turn():
    m = measure(turn('assistant', 0, 70, 'bla'))
    assert (m['assistant_acc_by_25'], m['response_ms'], m['user_acc_by_25']) == (0.0, None, 0.0)


def test_a_stubborn_assistant():
    """It talks on through the barge-ins at 20 and 42 until frame 50: yields after 30 and 8 frames, 760 ms on the average, once
    within 25; and that speech, begun before, is no false start."""
    m = measure(turn('assistant', 10, 50, 'on and on'))
    assert (m['user_acc_by_25'], m['yield_ms'], m['false_start_rate']) == (0.5, 760.0, 0.0)


def test_the_right_text_however_written():
    assert plain('It is  PARIS.') == plain('it is paris') != plain('it is rome')
    m = measure(ANSWERS[0], dict(ANSWERS[1], text='it is b'), dict(ANSWERS[2], text='It is B.'))
    assert m['answer_accuracy'] == 0.5


def test_command_line(small_run, run):
    data, checkpoint = small_run
    out = run('evaluate.py', f'--checkpoint={checkpoint}', f'--data={data}').stdout
    metrics = json.loads((checkpoint / 'metrics.json').read_text())
    assert 'answer_accuracy' in out and metrics['n_question'] == 5 and metrics['train_steps'] == 30 and metrics['train_sec'] > 0
