"""From checkpoint or recording to the table; the turn-taking itself is proved in test_turns.py."""
import json
import re
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch

import evaluate
import train
from codec.mel import MelCodec
from common.audio import write_audio
from data.made_up import hum
from evaluate import answers, plain, table
from measures.turns import assess, conversation


def turn(role, start, end, text=''):
    return dict(role=role, start=start, end=end, text=text)


# frames          0         10        20        30        40        50        60
# user              ░░░░░░░░            ░░░░░░░░░░░         ░░░░░░
# assistant                 ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓              (interrupted at 20, stops at 24; answers at 31)
REFERENCE = dict(
    id='r', user=np.arange(70), assistant=np.arange(70), turns=[
        turn('user', 2, 10, 'a?'),
        turn('assistant', 10, 24, 'An interrupted'),
        turn('user', 20, 31, 'b?'),
        turn('assistant', 31, 40, 'It is B.'),
        turn('user', 42, 48, 'c?'),
        turn('assistant', 48, 60, 'It is C.')])
USER, ANSWERS = ([dict(t) for t in REFERENCE['turns'] if t['role'] == role] for role in ('user', 'assistant'))


def compare(*turns):
    assistant = [99] * 70
    for t in turns:
        assistant[t['start']:t['end']] = range(t['start'], t['end'])
    decoded = dict(user=list(range(70)), assistant=assistant, turns=list(turns))
    return answers([assess(conversation('r', 25.0, USER, decoded, [99], expected=ANSWERS))], [decoded],
                   [REFERENCE])


def test_answers_against_the_reference():
    """
    The first answer is cut off, so two can be compared. Both right; then 'It is D.' for 'It is B.': one of
    6 words, half of the answers.
    """
    found = compare(*ANSWERS)
    assert found == dict(n_answer=2, answer_accuracy=1.0, answer_wer=0.0, answer_cer=None,
                         spoken_accuracy=1.0, code_error_rate=0.0, code_error_rate_of_another_answer=1.0)
    found = compare(ANSWERS[0], dict(ANSWERS[1], text='It is D.'), dict(ANSWERS[2], text='it is  c'))
    assert (found['answer_accuracy'], found['answer_wer']) == (0.5, pytest.approx(1 / 6))
    assert plain('It is  PARIS.') == plain('it is paris') != plain('it is rome')


def test_codes_against_the_reference():
    """
    'It is C.' ends 6 frames early, half of its 12 codes: 0.5, and 0 for the other; each is still nearest to
    its own. Without texts nothing is said of texts. The codes of the other's answer are as spoken wrong.
    """
    found = compare(*[dict(t, text='') for t in ANSWERS[:2]], dict(ANSWERS[2], end=54, text=''))
    assert found == dict(n_answer=2, code_error_rate=0.25, code_error_rate_of_another_answer=1.0,
                         spoken_accuracy=1.0)
    assert compare(ANSWERS[0], ANSWERS[1])['spoken_accuracy'] == 0.5        # nothing is said the second time
    # the last answer in two parts, none of which is written
    parts = [dict(ANSWERS[2], end=50, text=''), dict(ANSWERS[2], start=52, text='')]
    assert 'answer_accuracy' not in compare(*[dict(t, text='') for t in ANSWERS[:2]], *parts)


def test_the_table_leaves_out_what_was_not_measured():
    rows = table(dict(n_turn=3, n_answer_due=2, assistant_acc_by_5=0.5, assistant_acc_at_5=None,
                      response_ms=120.4, response_median_ms=None))
    assert rows == [('turns of the user; answers due', '3, 2', '', ''),
                    ('assistant speaks by frame 5, at frame 5 (Acc@5)', '50.0 %, -', '53.6 %', '18.8 %'),
                    ('… response, mean, median', '120 ms, -', '193 ms', '553 ms')]


def test_forgotten_stages_stand_apart():
    """The layout it decodes in comes first, the others below a line that has no figure."""
    losses = dict(loss=19.5, text=19.5, bits_per_sec=200)
    rows = table(dict(loss=dict(asr=losses, duplex3=losses)))
    assert [row[:2] for row in rows[::2]] == [
        ('loss of duplex3: text', '19.500'), ('other tasks: those of earlier stages may be forgotten', ''),
        ('… all, nats a token; bits a second', '19.500, 200.0')]
    assert len(table(dict(loss=dict(duplex3=losses)))) == 2


@pytest.mark.slow
def test_command_line(small_run, run, tmp_path):
    data, checkpoint = small_run
    out = run('evaluate.py', f'--checkpoint={checkpoint}', f'--data={data}', f'--out={tmp_path}',
              f'--export={tmp_path}/fdb').stdout
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['n_turn'] == 5 and metrics['train_steps'] == 30 and metrics['train_sec'] > 0
    assert 'Acc@10' in out
    page = (tmp_path / 'report.html').read_text()
    assert all(f'd{i}' in page for i in range(5)) and (tmp_path / 'fdb').is_dir()
    for figures in metrics['loss'].values():
        assert {'loss', 'text', 'speech', 'silence', 'bits_per_sec'} == set(figures)
    fails = run('evaluate.py', f'--checkpoint={checkpoint}', f'--data={tmp_path}', fails=True)
    assert 'no test.arrow' in fails.stderr


def test_the_loss_is_what_training_saw(small_run):
    """On val, where the model was saved: the val loss of the log's last line, with sums in another order."""
    data, checkpoint = small_run
    metrics = evaluate.main(evaluate.Config(
        checkpoint=str(checkpoint), data=str(data), split='val', dtype='float32', n_report=0,
        out=str(checkpoint / 'on_val')))
    logged = [json.loads(line) for line in (checkpoint / 'log.jsonl').read_text().splitlines()][-1]
    assert logged['kind'] == 'val'
    assert metrics['loss']['duplex3']['loss'] == pytest.approx(logged['loss'], rel=1e-5)


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason='no AVX-512 VNNI')
def test_what_int8_loses_is_measured(small_run, tmp_path):
    data, checkpoint = small_run
    cfg = evaluate.Config(checkpoint=str(checkpoint), data=str(data), device='cpu', n_report=0,
                          out=str(tmp_path))
    whole, rounded = (evaluate.main(replace(cfg, dtype=dtype))['loss']['duplex3']['loss']
                      for dtype in ('float32', 'int8'))
    assert rounded != whole and rounded == pytest.approx(whole, rel=0.05)


def test_an_alignment_checkpoint_has_error_rates_and_no_conversation(small_run, tmp_path):
    data, _ = small_run
    train.main(train.Config(
        data=str(data), out_dir=str(tmp_path / 'run'), stages='asr+tts.assistant:2', n_layer=1, n_head=2,
        n_kv_head=1, n_embd=32, n_inner=32, block_size=256, batch_size=4, batch_tokens=1024, device='cpu',
        dtype='float32', tensorboard=False))
    metrics = evaluate.main(evaluate.Config(checkpoint=str(tmp_path / 'run'), data=str(data)))
    assert {'asr', 'tts.assistant'} == set(metrics['loss'])
    assert metrics['asr_user_wer'] > 0 and 'n_turn' not in metrics
    assert 'tts_assistant_wer' in metrics and 'tts_user_wer' not in metrics


@pytest.mark.slow
def test_finished_dialogues_of_another_system(run, tmp_path):
    """The user hums for a second, the other hums back 0.6 s later; by energy, as webrtcvad wants voices."""
    wave = 1e-4 * np.random.default_rng(0).standard_normal((16000 * 5, 2)).astype(np.float32)
    wave[16000:32000, 0] += hum(120, 1.0)
    wave[41600:57600, 1] += hum(220, 1.0)
    write_audio(str(tmp_path / 'one.wav'), wave, 16000)
    out = run('evaluate.py', f'--dialogues={tmp_path}', '--vad=energy').stdout
    metrics = json.loads((tmp_path / 'evaluation' / 'metrics.json').read_text())
    assert metrics['n_answer_due'] == 1 and metrics['response_ms'] == pytest.approx(600, abs=80)
    assert 'report.html' in out
    swapped = evaluate.main(evaluate.Config(
        dialogues=str(tmp_path), vad='energy', user_channel=1, out=str(tmp_path / 'swapped')))
    assert swapped['gap_assistant_to_user_ms'] == metrics['gap_user_to_assistant_ms']
    assert swapped['both_speak'] == metrics['both_speak'] == 0


def test_a_judge_scores_answers_and_reference(small_run, tmp_path):
    """A server that gives 7 to an answer that has more than three letters, else 2."""
    class Judge(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            asked = request['messages'][-1]['content']
            score = 7 if len(re.findall('"answer": "(.*?)"', asked)[-1]) > 3 else 2
            content = json.dumps(dict(score=score, why='so'))
            body = json.dumps(dict(choices=[dict(message=dict(content=content))],
                                   usage=dict(prompt_tokens=9, completion_tokens=9))).encode()
            self.send_response(200)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    said = [turn('user', 5, 30, 'what?'), turn('assistant', 30, 50, 'a long answer')]
    decoded = dict(user=np.ones(70), assistant=np.ones(70), turns=said[1:])
    asked = conversation('x', 25.0, said[:1], decoded, [0], expected=[turn('assistant', 30, 50, 'so')])
    server = ThreadingHTTPServer(('127.0.0.1', 0), Judge)
    Thread(target=server.serve_forever, daemon=True).start()
    cfg = evaluate.Config(judge_url=f'http://127.0.0.1:{server.server_port}/v1', judge_model='seven')
    try:
        figures = evaluate.ask_judge(cfg, [asked], str(tmp_path / 'judge.jsonl'))
    finally:
        server.shutdown()
        server.server_close()
    assert figures == dict(judge_score_of_answers=7.0, n_judged_answers=1, judge_score_of_reference=2.0,
                           n_judged_reference=1)
    row = ('judge, 1 to 10: answers judged, score', '1, 7.00', '4.88 en, 5.6 zh', '3.92 en')
    assert row in table(figures)


def test_without_a_vocoder_the_report_has_no_sound(small_run, tmp_path, monkeypatch, capsys):
    def decode(self, codes):
        raise ValueError('no vocoder here')
    data, checkpoint = small_run
    monkeypatch.setattr(MelCodec, 'decode', decode)
    cfg = evaluate.Config(checkpoint=str(checkpoint), data=str(data), out=str(tmp_path))
    assert evaluate.main(cfg)['n_turn'] == 5
    assert 'note: the report will be without sound: no vocoder here' in capsys.readouterr().out
    page = (tmp_path / 'report.html').read_text()
    assert 'd3' in page and 'id="mp3-' not in page
    with pytest.raises(ValueError, match='no vocoder'):
        evaluate.main(replace(cfg, export=str(tmp_path / 'fdb')))


def test_word_times_of_two_people_and_the_mirror(tmp_path):
    """
    Switchboard's style. A asks until 1.48 s, B answers at 1.68 (200 ms) until 3.0; A goes on at 3.4 (400
    ms), B says 'uh-huh' into it at 4.0. From the other side B's two turns are the user's: the first is
    answered after 400 ms, the second is a backchannel to A.
    """
    words = [('A', 0.4, 0.8, 'how'), ('A', 0.9, 1.48, 'so'), ('B', 1.68, 2.2, 'well'),
             ('B', 2.3, 3.0, 'because'), ('A', 3.4, 3.9, 'I'), ('A', 3.9, 5.4, 'see'),
             ('B', 4.0, 4.3, 'uh-huh')]
    (tmp_path / 'sw.tsv').write_text('\n'.join('\t'.join(map(str, row)) for row in words))
    cfg = evaluate.Config(dialogues=str(tmp_path), n_report=0)
    there = evaluate.main(replace(cfg, user_name='A', assistant_name='B'))
    back = evaluate.main(replace(cfg, user_name='B', assistant_name='A'))
    assert (there['n_turn'], there['n_answer_due']) == (2, 1)
    assert (there['response_ms'], there['false_start_rate']) == (200, 0.5)
    assert (back['n_turn'], back['n_answer_due'], back['response_ms']) == (2, 1, 400)
    assert back['n_backchannel'] == back['n_backchannel_speaking'] == 1
    assert back['backchannel_stopped_rate'] == 0
    assert there['gap_user_to_assistant_ms'] == back['gap_assistant_to_user_ms']
    assert there['gap_assistant_to_user_ms'] == back['gap_user_to_assistant_ms']
    assert all(there[key] == back[key] for key in ('both_speak', 'neither_speaks', 'sec'))
