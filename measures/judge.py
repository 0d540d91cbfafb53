"""
A language model as judge: each answer of the assistant gets a score from 1 to 10 for fluency and coherence,
as in the paper, which asked Qwen-max.

    python -m measures.judge --url=http://127.0.0.1:8000/v1 --model=qwen-max out/demo/samples/test-*.jsonl

    answers ─┬─ in the cache ───────────────────────────────┬─► scores, in the order of the answers
             └─ new ─► n_parallel at once ─► the server ────┤     {"score": 8, "why": "…"}
                               └◄─ again: 429, 5xx, silence, nonsense

The server is any endpoint that speaks OpenAI's chat completions; its key is OPENAI_API_KEY. judge.txt is what
the judge is told.
"""
import argparse
import hashlib
import http.client
import json
import math
import os
import pathlib
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from email.utils import parsedate_to_datetime

from common.files import printable, read_jsonl, write_jsonl
from config import Parser
from flatten import ROLES, START

PROMPT = str(pathlib.Path(__file__).with_suffix('.txt'))
MAX_WAIT_SEC = 600      # a server that asks for a longer pause is not waited for
MAX_LOST = 8            # after so many questions in a row without an answer the server is given up


class Unjudged(Exception):
    """(reason, status, seconds that the server asks to wait or None).
    Status 0: no answer came; 200: an answer without a score."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):     # a redirected request would take the key along
        return None


OPENER = urllib.request.build_opener(NoRedirect)


def post(url, body, key, timeout_sec, is_over):
    """
    -> status, headers, bytes. Raises Unjudged if they have not come after timeout_sec, or when is_over is
    set. urllib's own timeout restarts with each byte that comes, so a slow server could hold us for ever: a
    thread of its own waits.
    """
    headers = {'Content-Type': 'application/json', **({'Authorization': f'Bearer {key}'} if key else {})}
    request = urllib.request.Request(url, body, headers)
    box, until = queue.SimpleQueue(), time.monotonic() + timeout_sec

    def work():
        try:
            try:
                response = OPENER.open(request, timeout=2 * timeout_sec)    # the clock below counts
            except urllib.error.HTTPError as error:     # a response, too, of another status
                response = error
            with response:
                box.put((response.status, response.headers, response.read(1 << 20)))
        except (OSError, http.client.HTTPException) as error:
            box.put(error)
    threading.Thread(target=work, daemon=True).start()
    answer = TimeoutError(f'no answer within {timeout_sec:g} s')
    while time.monotonic() < until and not is_over.is_set():
        with suppress(queue.Empty):
            answer = box.get(timeout=min(0.1, timeout_sec))
            break
    if isinstance(answer, Exception):
        raise Unjudged(f'{url}: {answer}', 0, None)
    return answer


def read_score(text):
    """What the judge wrote -> dict(score, why). Around the JSON there may be a remark or a fence (```).
    Two different scores are no score."""
    verdicts = []
    text_after_thinking = text.rpartition('</think>')[2]       # where other scores are weighed
    for piece in re.findall(r'\{[^{}]*\}', text_after_thinking):
        with suppress(ValueError):
            verdicts.append(json.loads(piece, strict=False))
    verdicts = [verdict for verdict in verdicts if 'score' in verdict]
    values = [verdict['score'] for verdict in verdicts]
    if len(set(map(repr, values))) != 1 or type(values[0]) not in (int, float) or not 1 <= values[0] <= 10:
        raise Unjudged(f'the judge gave no score from 1 to 10: {text[:100]!r}', 200, None)
    why = str(verdicts[0].get('why', '')).encode(errors='replace').decode()    # not all JSON can be printed
    return dict(score=values[0], why=' '.join(why.split()))


def read_retry_after(header):
    if re.fullmatch(r'\d+(\.\d+)?', header or ''):
        return float(header)
    with suppress(TypeError, ValueError):       # or it is a date
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())


def open_cache(path):
    """-> ({key: dict(score, why)}, the file to append to). Half a last line, of a killed run, is cut off."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    file = open(path, 'a+b')
    file.seek(0)
    *lines, half = file.read().split(b'\n')
    try:
        known = {row['key']: dict(score=row['score'], why=row['why']) for row in map(json.loads, lines)}
        if half[:1] not in (b'', b'{'):     # a file of another kind is not cut
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path} is not a cache of judge.py: name another file, or delete it')
    file.truncate(file.tell() - len(half))
    return known, file


class Asker:
    """Puts questions to the judge, each up to n_try times. Threads may share one."""

    def __init__(self, url, model, key, timeout_sec, n_try, pause_sec):
        self.url, self.model, self.key = url.rstrip('/') + '/chat/completions', model, key
        self.timeout_sec, self.n_try, self.pause_sec = timeout_sec, n_try, pause_sec
        self.is_over = threading.Event()    # set when the run ends: nobody waits any longer
        self.used = []      # (tokens in, tokens out) of each answer; None where the server does not say

    def ask(self, text):
        """-> dict(score, why), or dict(score=None, error, status) where none could be had"""
        for i in range(self.n_try):
            try:
                return self.ask_once(text)
            except Unjudged as error:
                reason, status, retry_after = error.args
            # with some chance, so that the threads do not all come back in the same moment
            if retry_after is None:
                pause = self.pause_sec * 2 ** i * random.uniform(0.5, 1)
            else:
                pause = retry_after + random.uniform(0, self.pause_sec)
            is_refused = 300 <= status < 500 and status not in (408, 425, 429)
            if is_refused or i == self.n_try - 1 or pause > MAX_WAIT_SEC or self.is_over.wait(pause):
                return dict(score=None, error=reason, status=status)

    def ask_once(self, text):
        message = dict(model=self.model, temperature=0, messages=[dict(role='user', content=text)])
        body = json.dumps(message).encode()
        status, headers, answer = post(self.url, body, self.key, self.timeout_sec, self.is_over)
        answer = answer.decode('utf-8', 'replace')
        if len(self.key) > 7:       # some servers quote it in errors; "none" or "EMPTY" is no secret
            answer = answer.replace(self.key, '(key)')
        if status != 200:
            reason = f'{self.url} said {status}: {" ".join(answer.split())[:300]}'
            raise Unjudged(reason, status, read_retry_after(headers['Retry-After']))
        try:
            answer = json.loads(answer)
            usage = answer.get('usage') or {}
            counts = usage.get('prompt_tokens'), usage.get('completion_tokens')
            self.used.append(counts if all(type(count) is int for count in counts) else None)
            return read_score(answer['choices'][0]['message']['content'])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise Unjudged(f'{self.url} gave no chat completion: {str(answer)[:100]!r}', 200, None)


def progress(keys, judged, used, usd_per_m_in, usd_per_m_out):
    """'judge 12/40 | mean 7.25 | without a score 0 | 9,000 tokens in, 600 out'"""
    rows = [judged[key] for key in keys if key in judged]
    scores = [row['score'] for row in rows if row['score'] is not None]
    mean = f'{sum(scores) / len(scores):.2f}' if scores else '-'
    cost = 'tokens and cost unknown: the server does not say'
    if None not in used:
        n_in, n_out = (sum(count) for count in zip((0, 0), *used))
        cost = f'{n_in:,} tokens in, {n_out:,} out'
        if usd_per_m_in or usd_per_m_out:
            cost += f', {(n_in * usd_per_m_in + n_out * usd_per_m_out) / 1e6:.4f} USD'
    return f'judge {len(rows)}/{len(keys)} | mean {mean} | without a score {len(rows) - len(scores)} | {cost}'


def check_server(url, n_parallel, n_try, timeout_sec, key, prompt_path):
    """Raises ValueError for what no server could be asked with."""
    if not re.match(r'https?://[^/]', url) or n_parallel < 1 or n_try < 1 or timeout_sec <= 0:
        raise ValueError(f'the judge needs a url such as http://127.0.0.1:8000/v1 (it is {url!r}), '
                         'n_parallel and n_try of at least 1, a timeout above 0')
    if not (key.isascii() and key.isprintable()):       # the HTTP library would print it
        raise ValueError('the key of the judge holds characters that no key has: copy it again')
    if not os.path.isfile(prompt_path):
        raise ValueError(f'there is no file {prompt_path} with a prompt for the judge')


def score(items, url, model, key=None, prompt_path=PROMPT, cache_path='out/judge_cache.jsonl', n_parallel=8,
          timeout_sec=60, n_try=4, usd_per_m_in=0.0, usd_per_m_out=0.0, pause_sec=2.0, log=print):
    """
    items: [dict(id, question, answer, history=[dict(role, text)])] -> in their order [dict(id, score, why)],
    or dict(id, score=None, error, status) where there is no score: the next run asks these again. Raises
    ValueError where going on is of no use: wrong key, url or model, a server that is not there.
        usd_per_m_in    price of a million tokens that the judge reads; _out: that it writes
        pause_sec       before the second try; doubled before each later one, unless the server names a time
    """
    key = (os.environ.get('OPENAI_API_KEY', '') if key is None else key).strip()
    check_server(url, n_parallel, n_try, timeout_sec, key, prompt_path)
    prompt = pathlib.Path(prompt_path).read_text(encoding='utf-8').strip()
    asker = Asker(url, model, key, timeout_sec, n_try, pause_sec)
    texts = []
    for item in items:
        fields = {name: item[name] for name in ('history', 'question', 'answer')}
        texts.append(prompt + '\n\n' + json.dumps(fields, ensure_ascii=False, indent=1))
    keys = [hashlib.sha256(json.dumps([model, text]).encode()).hexdigest() for text in texts]
    judged, cache = open_cache(cache_path)
    new = {key: text for key, text in zip(keys, texts) if key not in judged}    # each text is asked once
    pool = ThreadPoolExecutor(n_parallel)
    try:
        ask_all(new, asker, pool, judged, cache, len(set(keys)) - len(new),
                lambda: log(progress(keys, judged, asker.used, usd_per_m_in, usd_per_m_out)))
    finally:        # on Ctrl-C, too: what is under way is given up, what was judged is in the cache
        asker.is_over.set()
        pool.shutdown(wait=False, cancel_futures=True)
        cache.close()
    log(progress(keys, judged, asker.used, usd_per_m_in, usd_per_m_out))
    return [dict(judged[key], id=item['id']) for key, item in zip(keys, items)]


def ask_all(new, asker, pool, judged, cache, n_judged, log_progress):
    """Asks new {key: text}, puts the answers into judged and the scores into the cache. n_judged: how many
    scores the cache had. Raises ValueError as soon as the server is of no use."""
    n_lost = n_down = 0
    logged_at = time.monotonic()
    futures = {pool.submit(asker.ask, text): key for key, text in new.items()}
    for future in as_completed(futures):
        key, row = futures[future], future.result()
        judged[key] = row
        status = row.get('status', 200)
        if row['score'] is not None:
            cache.write((json.dumps(dict(key=key, model=asker.model, **row)) + '\n').encode())
            cache.flush()
            n_judged += 1
        n_lost += status != 200
        n_down = n_down + 1 if status == 0 or status == 429 or status >= 500 else 0
        # one question may be refused for its text; where none is taken the fault is not the questions'
        none_is_taken = not n_judged and n_lost == min(MAX_LOST, len(new))
        if status in (401, 404) or n_down == MAX_LOST or none_is_taken:
            raise ValueError(f'the judge cannot be asked: {row["error"]}')
        if time.monotonic() - logged_at > 5:
            log_progress()
            logged_at = time.monotonic()


def to_items(conversations, use_expected=False):
    """-> the items that score takes: for each turn of the user, what the assistant said until the next one
    (use_expected: what the reference says there), and the turns before. Raises ValueError where the text of a
    turn is not known."""
    items = []
    for talk in conversations:
        users, assistants = ([turn for turn in talk['turns'] if turn['role'] == role] for role in ROLES)
        users = sorted(users, key=START)
        turns = sorted(users + (talk['expected'] if use_expected else assistants), key=START)
        for i, user in enumerate(users):
            if not user['text'].strip():
                raise ValueError(f'conversation {talk["id"]!r}: what the user says in turn {i + 1} '
                                 'is not written down; the judge needs a transcript')
            before = [turn for turn in turns if turn['start'] < user['start']]
            after = [turn for turn in turns if turn['start'] >= user['start']]
            until = users[i + 1]['start'] if i + 1 < len(users) else float('inf')
            said = [turn['text'] for turn in after if turn['role'] == 'assistant' and turn['start'] < until]
            history = [dict(role=turn['role'], text=turn['text']) for turn in before]
            if said:
                items.append(dict(id=f'{talk["id"]}/{i + 1}', question=user['text'],
                                  answer=' '.join(said).strip(), history=history))
    if items and not any(item['answer'] for item in items):     # as of a model of speech alone
        raise ValueError(f'conversation {conversations[0]["id"]!r} and all others: '
                         'no answer is written down; the judge needs a transcript')
    return items


def read_transcript(path):
    turns = []
    for line, row in read_jsonl(path):
        turn = dict(role=row.get('role'), start=row.get('start_sec'), text=row.get('text'))
        is_turn = isinstance(turn['text'], str) and turn['role'] in ROLES
        if not is_turn or type(turn['start']) not in (int, float) or not math.isfinite(turn['start']):
            raise ValueError(f'{path}, line {line}: a line is JSON with role, start_sec and text, '
                             'as sample.py writes it')
        turns.append(turn)
    return dict(id=os.path.splitext(os.path.basename(path))[0], turns=turns)


def main():
    parser = Parser(description=__doc__.strip().split('\n\n')[0],
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('transcripts', nargs='+', help='JSON lines as sample.py writes them, one file a dialogue')
    add('--url', required=True, help='of the endpoint, with /v1')
    add('--model', required=True, help='as the endpoint calls it')
    add('--judge_prompt', default=PROMPT, help='a text file: what the judge is told')
    add('--out', default='out/judge', help='OUT.jsonl gets the scores, OUT_cache.jsonl is the cache')
    add('--n_parallel', type=int, default=8, help='requests under way at once')
    add('--usd_per_m_in', type=float, default=0.0, help='price of a million tokens in')
    add('--usd_per_m_out', type=float, default=0.0, help='price of a million tokens out')
    args = parser.parse_args()
    try:
        items = to_items(list(map(read_transcript, args.transcripts)))
        rows = score(items, args.url, args.model, prompt_path=args.judge_prompt,
                     cache_path=args.out + '_cache.jsonl', n_parallel=args.n_parallel,
                     usd_per_m_in=args.usd_per_m_in, usd_per_m_out=args.usd_per_m_out)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error))
    write_jsonl(args.out + '.jsonl', (dict(item, **row) for item, row in zip(items, rows)))
    for item, row in zip(items, rows):
        question, answer, why = map(printable, (item['question'], item['answer'], row.get('why')
                                                or row['error']))
        print(f'{row["score"] or "-":>4}  {question[:40]:40}  {answer[:40]:40}  {why}')
    print(f'written: {args.out}.jsonl')


if __name__ == '__main__':
    main()
