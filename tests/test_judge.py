"""The judge against a real server on this machine, which answers, fails, stalls and talks nonsense."""
import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from measures import judge
from tests.conftest import ROOT

KEY = 'sk-this-is-secret'


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)


def completion(content, usage=True):
    answer = dict(choices=[dict(message=dict(role='assistant', content=content))])
    if usage:
        answer['usage'] = dict(prompt_tokens=100, completion_tokens=10)
    return json.dumps(answer).encode()


def send(handler, body, status=200, headers=None, length=None):
    handler.send_response(status)
    for name, value in {'Content-Length': len(body) if length is None else length, **(headers or {})}.items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body)


def good(handler, asked, n):
    """The score of question 'q7' is 7."""
    send(handler, completion(json.dumps(dict(score=int(asked['question'][1:]), why=f'好 {asked["answer"]}'))))


@contextmanager
def serve(behave):
    """behave(handler, what is asked, number of the request) -> (url, the requests so far)"""
    requests, over = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            prompt, _, asked = body['messages'][0]['content'].partition('\n\n{\n')
            requests.append(dict(body, path=self.path, key=self.headers['Authorization'], prompt=prompt,
                                 asked=json.loads('{' + asked)))
            try:
                behave(self, requests[-1]['asked'], len(requests))
            except OSError:
                pass            # who asked has gone

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.over = over
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}/v1', requests
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def make_items(n):
    history = [dict(role='user', text='hi')]
    return [dict(id=f'd{i}', question=f'q{i % 10 + 1}', answer=f'answer {i} 你好', history=history)
            for i in range(n)]


def ask(tmp_path, url, items, **settings):
    default = dict(key=KEY, cache_path=str(tmp_path / 'cache.jsonl'), timeout_sec=2, pause_sec=0.001,
                   log=lambda _: None)
    return judge.score(items, url, 'model', **dict(default, **settings))


def test_scores_in_order(tmp_path):
    """
    The earlier an answer was asked for the later it comes. 10 answers of 100 tokens in, 10 out, at 2 and 8
    USD a million: (1000 * 2 + 100 * 8) / 1e6 = 0.0028 USD; the mean of 1 to 10 and 4 again is 59 / 11 = 5.36.
    Two dialogues with the same words are asked once.
    """
    def behave(handler, asked, n):
        time.sleep(0.01 * (10 - n))
        good(handler, asked, n)

    items, said = make_items(10), []
    items.append(dict(items[3], id='again'))
    with serve(behave) as (url, requests):
        rows = ask(tmp_path, url + '/', items, usd_per_m_in=2.0, usd_per_m_out=8.0, log=said.append)
    assert [row['score'] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 4]
    assert rows[3] == dict(id='d3', score=4, why='好 answer 3 你好') and rows[10] == dict(rows[3], id='again')
    assert len(requests) == 10
    one = requests[0]
    assert (one['path'], one['key']) == ('/v1/chat/completions', f'Bearer {KEY}')
    assert (one['model'], one['temperature']) == ('model', 0)
    assert '{"score": n, "why": "..."}' in one['prompt']
    assert set(one['asked']) == {'history', 'question', 'answer'}
    assert said[-1] == 'judge 11/11 | mean 5.36 | without a score 0 | 1,000 tokens in, 100 out, 0.0028 USD'


def test_asked_side_by_side(tmp_path):
    """The server answers only when four are there; a fifth never is."""
    four, now, most = threading.Barrier(4, timeout=2), [], []

    def behave(handler, asked, n):
        now.append(n)
        most.append(len(now))
        four.wait()
        now.remove(n)
        good(handler, asked, n)

    with serve(behave) as (url, requests):
        rows = ask(tmp_path, url, make_items(8), n_parallel=4)
    assert all(row['score'] for row in rows) and max(most) == 4 and len(requests) == 8


def trickle(handler, piece):
    while not handler.server.over.wait(0.02):       # never as long as a timeout of recv
        handler.wfile.write(piece)


def stall(handler):
    handler.server.over.wait(2)


def hang_up(handler):
    handler.wfile.write(b'HTTP/1.0 200 OK\r\nContent-Le')
    handler.connection.close()


def slow_body(handler):
    handler.wfile.write(b'HTTP/1.0 200 OK\r\n\r\n')
    trickle(handler, b' ')


def with_score(text):
    return lambda h: send(h, completion(f'{{"score": {text}, "why": "x"}}'))


RIGHT = completion('{"score": 7, "why": "x"}')
FAULTS = dict(
    rate_limit=lambda h: send(h, b'slow down', 429, {'Retry-After': 0}),
    error_500=lambda h: send(h, b'oops', 500),
    error_503=lambda h: send(h, b'', 503),
    stalls=stall,
    trickles_headers=lambda h: (h.wfile.write(b'HTTP/1.0 200 OK\r\nX: '), trickle(h, b'x')),
    trickles_body=slow_body,
    hangs_up=lambda h: h.connection.close(),
    hangs_up_midway=hang_up,
    no_http=lambda h: h.wfile.write(b'SSH-2.0-OpenSSH\r\n\r\n'),
    body_shorter_than_said=lambda h: send(h, RIGHT[:-20], length=len(RIGHT)),
    body_longer_than_said=lambda h: send(h, RIGHT, length=20),
    html=lambda h: send(h, b'<html>Log in, please</html>'),
    no_utf8=lambda h: send(h, b'\xff\xfe\x00'),
    nested=lambda h: send(h, b'[' * 100000),
    a_list=lambda h: send(h, b'[]'),
    error_in_200=lambda h: send(h, b'{"error": {"message": "busy"}}'),
    no_choices=lambda h: send(h, b'{"choices": []}'),
    no_content=lambda h: send(h, completion(None)),
    prose=lambda h: send(h, completion('I would give it 8 out of 10.')),
    no_score=lambda h: send(h, completion('{"why": "good"}')),
    two_scores=lambda h: send(h, completion('{"score": 3, "why": "x"} or {"score": 8, "why": "y"}')),
    **{f'score_{text}': with_score(text)
       for text in ('"8/10"', '"8"', '11', '0', '-3', 'null', 'true', 'NaN', '[8]', '1e999')},
)


@pytest.mark.parametrize('is_slow', [False, True])
def test_asked_again_after_each_fault(tmp_path, is_slow):
    """
    Each fault comes once, then the right answer: two requests a question, none of the faults is taken for a
    score. Slow ones are given up after a timeout of 0.3 s; the others are seen at once, long before one of
    5 s.
    """
    slow, seen = ('stalls', 'trickles_headers', 'trickles_body'), set()
    names = [name for name in FAULTS if (name in slow) == is_slow]

    def behave(handler, asked, n):
        name = asked['answer']
        FAULTS[name](handler) if name not in seen and not seen.add(name) else send(handler, RIGHT)

    items = [dict(id=name, question='q', answer=name, history=[]) for name in names]
    with serve(behave) as (url, requests):
        start = time.monotonic()
        rows = ask(tmp_path, url, items, timeout_sec=0.3 if is_slow else 5, n_try=2)
        assert time.monotonic() - start < 3
    assert {row['id']: row['score'] for row in rows} == dict.fromkeys(names, 7)
    assert len(requests) == 2 * len(names)


@pytest.mark.parametrize('fault, reason', [
    ('score_11', '"score": 11'), ('html', 'Log in, please'), ('stalls', 'within 0.1 s'),
    ('trickles_body', 'within 0.1 s'), ('error_500', 'said 500: oops')])
def test_a_lasting_fault_is_no_score(tmp_path, fault, reason):
    """
    Question 1 never gets a score: after n_try requests it stays without one, says why, and only it is asked
    by the next run.
    """
    def behave(handler, asked, n):
        FAULTS[fault](handler) if asked['question'] == 'q1' else good(handler, asked, n)

    said = []
    with serve(behave) as (url, requests):
        rows = ask(tmp_path, url, make_items(3), timeout_sec=0.1, n_try=2, log=said.append)
        assert len(requests) == 4 and 'mean 2.50 | without a score 1 |' in said[-1]
        assert rows[0]['score'] is None and reason in rows[0]['error'] and rows[2]['score'] == 3
        ask(tmp_path, url, make_items(3), timeout_sec=0.1, n_try=1)
    assert [request['asked']['question'] for request in requests[4:]] == ['q1']


def test_waits_as_long_as_it_is_asked_to(tmp_path):
    def behave(handler, asked, n):
        at.append(time.monotonic())
        send(handler, b'', 429, {'Retry-After': 0.2}) if n == 1 else good(handler, asked, n)

    at = []
    with serve(behave) as (url, _):
        assert ask(tmp_path, url, make_items(1))[0]['score'] == 1
    assert 0.2 <= at[1] - at[0] < 1
    assert 8 < judge.read_retry_after(formatdate(time.time() + 10, usegmt=True)) <= 10
    assert judge.read_retry_after(formatdate(0, usegmt=True)) == 0
    assert judge.read_retry_after('soon') is None and judge.read_retry_after(None) is None


def test_a_day_is_too_long_to_wait(tmp_path):
    with serve(lambda h, *_: send(h, b'quota', 429, {'Retry-After': 86400})) as (url, requests):
        with pytest.raises(ValueError, match='said 429: quota'):
            ask(tmp_path, url, make_items(1))
    assert len(requests) == 1


@pytest.mark.parametrize('status', [400, 401, 403, 404, 302])
def test_refused_once_and_said_clearly(tmp_path, status):
    """Not asked again, nor where a redirect points. The server quotes the key, we do not."""
    def behave(handler, *_):
        send(handler, f'no: {handler.headers["Authorization"]}'.encode(), status, {'Location': '/else'})

    with serve(behave) as (url, requests), pytest.raises(ValueError) as caught:
        ask(tmp_path, url, make_items(1))
    said = f'the judge cannot be asked: {url}/chat/completions said {status}: no: Bearer (key)'
    assert str(caught.value) == said
    assert [request['path'] for request in requests] == ['/v1/chat/completions']


def test_one_refused_answer_does_not_end_it(tmp_path):
    """A filter of contents says 400 to one answer, the others are judged."""
    def behave(handler, asked, n):
        send(handler, b'inappropriate', 400) if asked['question'] == 'q1' else good(handler, asked, n)

    with serve(behave) as (url, requests):
        rows = ask(tmp_path, url, make_items(4))
    assert [row['score'] for row in rows] == [None, 2, 3, 4]
    assert 'inappropriate' in rows[0]['error'] and len(requests) == 4


def test_nobody_there(tmp_path):
    with serve(good) as (url, _):
        pass
    start = time.monotonic()
    with pytest.raises(ValueError, match=f'cannot be asked: {url}/chat/completions: .*refused'):
        ask(tmp_path, url, make_items(1000))
    assert time.monotonic() - start < 1


def test_a_server_that_dies_ends_the_run(tmp_path):
    """After 20 answers it fails: 8 in a row, and what 2 threads have begun meanwhile, not all of the 1000."""
    def behave(handler, asked, n):
        good(handler, asked, n) if n <= 20 else send(handler, b'out of memory', 500)

    with serve(behave) as (url, requests):
        with pytest.raises(ValueError, match='said 500: out of memory'):
            ask(tmp_path, url, make_items(1000), n_parallel=2, n_try=1)
    assert len(requests) < 40 and (tmp_path / 'cache.jsonl').read_bytes().count(b'\n') == 20


def test_the_second_run_asks_nothing(tmp_path):
    with serve(good) as (url, requests):
        first = ask(tmp_path, url, make_items(9))
        assert ask(tmp_path, url, make_items(9)) == first and len(requests) == 9
        ask(tmp_path, url, [dict(make_items(1)[0], history=[])])        # another history: another question
        (tmp_path / 'prompt.txt').write_text('请打分。', encoding='utf-8')
        ask(tmp_path, url, make_items(1), prompt_path=str(tmp_path / 'prompt.txt'))
        assert len(requests) == 11 and requests[-1]['prompt'] == '请打分。'


def test_half_a_line_is_asked_again(tmp_path):
    """Cut at any byte of its last line the cache gives the others, and is whole again after the run."""
    cache = tmp_path / 'cache.jsonl'
    with serve(good) as (url, requests):
        ask(tmp_path, url, make_items(3), n_parallel=1)
        whole = cache.read_bytes()
        last = len(whole.splitlines(keepends=True)[-1])
        for n_cut in (1, 2, last // 2, last - 1):
            cache.write_bytes(whole[:-n_cut])
            requests.clear()
            assert [row['score'] for row in ask(tmp_path, url, make_items(3))] == [1, 2, 3]
            assert len(requests) == 1 and cache.read_bytes() == whole
    cache.write_text('my diary')
    with pytest.raises(ValueError, match='cache.jsonl is not a cache'):
        ask(tmp_path, url, make_items(3))
    assert cache.read_text() == 'my diary'


def write_transcripts(folder, n):
    for i in range(n):
        rows = [dict(role='user', start_sec=0.4, end_sec=1.0, text=f'q{i + 1}'),
                dict(role='assistant', start_sec=1.2, end_sec=2.0, text=f'a{i}')]
        (folder / f't{i}.jsonl').write_text('\n'.join(json.dumps(row) for row in rows))
    return [str(folder / f't{i}.jsonl') for i in range(n)]


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
def test_killed_and_resumed(tmp_path, how, monkeypatch, capsys):
    """
    The server answers three, then stalls. Ctrl-C ends it at once though a request may last a minute; what
    was judged is kept.
    """
    with serve(lambda h, asked, n: good(h, asked, n) if n <= 3 or n > 5 else stall(h)) as (url, requests):
        arguments = [f'--url={url}', '--model=m', '--n_parallel=2', f'--out={tmp_path}/out',
                     *write_transcripts(tmp_path, 6)]
        monkeypatch.setenv('OPENAI_API_KEY', KEY)
        process = subprocess.Popen(
            [sys.executable, '-m', 'measures.judge', *arguments], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,       # a shell's background job, and what it starts, ignores Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while len(requests) < 5:
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(how)
        output = process.communicate(timeout=10)[0]
        cache = (tmp_path / 'out_cache.jsonl').read_bytes()
        assert cache.count(b'\n') == 3 and cache.endswith(b'\n')
        monkeypatch.setattr(sys, 'argv', ['judge.py', *arguments])
        judge.main()
    again = capsys.readouterr().out
    assert len(requests) == 8
    assert 'judge 6/6 | mean 3.50 | without a score 0 | 300 tokens in, 30 out' in again
    assert '   4  q4 ' in again
    rows = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [(row['id'], row['question'], row['answer'], row['score']) for row in rows] == [
        (f't{i}/1', f'q{i + 1}', f'a{i}', i + 1) for i in range(6)]
    for text in (output.decode(), again, *(path.read_text(encoding='utf-8') for path in tmp_path.iterdir())):
        assert KEY not in text


def test_the_key_stays_here(tmp_path):
    """
    Not in the cache, even if the judge repeats it; a key with a line break is not printed by the HTTP
    library.
    """
    leak = completion(json.dumps(dict(score=7, why=f'your key is {KEY}')))
    with serve(lambda h, *_: send(h, leak)) as (url, _):
        rows = ask(tmp_path, url, make_items(1))
        assert rows[0]['why'] == 'your key is (key)' and KEY not in (tmp_path / 'cache.jsonl').read_text()
        for wrong in (f'{KEY}\nX: y', f'{KEY}…'):
            with pytest.raises(ValueError) as caught:
                ask(tmp_path, url, make_items(2), key=wrong)
            assert KEY not in str(caught.value)
        assert ask(tmp_path, url, make_items(3), key=f' {KEY}\n')[2]['score'] == 7


@pytest.mark.parametrize('text, score', [
    ('{"score": 8, "why": "x"}', 8),
    ('```json\n{"score": 7.5, "why": "x"}\n```', 7.5),
    ('Here: {"why": "two\nlines", "score": 10} Thanks!', 10),
    ('<think>maybe {"score": 3}</think>{"score": 8}', 8),
    ('{"score": 8, "why": "一"} so {"score": 8}', 8),
    ('{"result": {"score": 6}}', 6),
])
def test_what_stands_around_the_json(text, score):
    assert judge.read_score(text)['score'] == score


def test_what_cannot_be_printed():
    assert judge.read_score('{"score": 8, "why": "a \\ud83d\\nb"}')['why'] == 'a ? b'


def test_a_server_that_does_not_count(tmp_path):
    said = []
    with serve(lambda h, *_: send(h, completion('{"score": 7}', usage=False))) as (url, _):
        ask(tmp_path, url, make_items(1), usd_per_m_in=1.0, log=said.append)
    costs = 'tokens and cost unknown: the server does not say'
    assert said == [f'judge 1/1 | mean 7.00 | without a score 0 | {costs}']


# frames          0         10        20        30        40
# user              a?────        mhm      b?───   (b? is said into the answer to a?)
# assistant               A1 A2────────────────       B──
TURNS = [dict(role='user', start=2, end=8, text='a?'), dict(role='assistant', start=9, end=11, text='A1'),
         dict(role='assistant', start=12, end=28, text='A2'), dict(role='user', start=16, end=19, text='mhm'),
         dict(role='user', start=25, end=30, text='b?'), dict(role='assistant', start=34, end=37, text='B')]


def test_conversations_to_items():
    """The answer to a? came in two turns, to mhm came none; b? was asked after all that began before it."""
    expected = [dict(role='assistant', start=9, end=14, text='E1'),
                dict(role='assistant', start=30, end=40, text='E2')]
    conversation = dict(id='c', turns=TURNS, expected=expected)
    history = [dict(role='user', text='a?'), dict(role='assistant', text='A1'),
               dict(role='assistant', text='A2'), dict(role='user', text='mhm')]
    assert judge.to_items([conversation]) == [
        dict(id='c/1', question='a?', answer='A1 A2', history=[]),
        dict(id='c/3', question='b?', answer='B', history=history)]
    items = judge.to_items([conversation], use_expected=True)
    assert [(item['question'], item['answer']) for item in items] == [('a?', 'E1'), ('b?', 'E2')]


@pytest.mark.parametrize('role, complaint', [
    ('user', "conversation 'c': what the user says in turn 1 .* transcript"),
    ('assistant', 'no answer .* transcript'),
])
def test_words_are_needed(role, complaint):
    turns = [dict(turn, text='' if turn['role'] == role else turn['text']) for turn in TURNS]
    with pytest.raises(ValueError, match=complaint):
        judge.to_items([dict(id='c', turns=turns)])


def test_a_wrong_transcript(tmp_path, monkeypatch):
    (tmp_path / 'x.jsonl').write_text('{"role": "user"}\n')
    monkeypatch.setattr(sys, 'argv', [
        'judge.py', '--url=http://127.0.0.1:9/v1', '--model=m', str(tmp_path / 'x.jsonl')])
    with pytest.raises(SystemExit, match='x.jsonl, line 1: a line is JSON with role, start_sec and text'):
        judge.main()
