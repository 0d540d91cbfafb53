"""
A language model as judge: each answer of the assistant gets 1 to 10 for fluency and coherence (the paper
asked Qwen-max).

    python -m measures.judge --url=http://127.0.0.1:8000/v1 --model=qwen-max out/demo/samples/test-*.jsonl

    answers ─┬─ in the cache ───────────────────────────────┬─► scores, in the order of the answers
             └─ new ─► n_parallel at once ─► the server ────┤     {"score": 8, "why": "…"}
                               └◄─ again: 429, 5xx, silence, nonsense

Any endpoint that speaks OpenAI's chat completions; the key is OPENAI_API_KEY. The question put to it stands
in judge.txt.
"""
import argparse
import hashlib
import http.client
import json
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

from common.files import whole
from config import Parser

PROMPT = str(pathlib.Path(__file__).with_suffix('.txt'))
MAX_WAIT_SEC = 600      # a server that asks for a longer pause has had enough for today
MAX_LOST = 8            # so many answers in a row not taken: the server will not take the next either


class Unjudged(Exception):
    """(reason, status, seconds that the server asks to wait or None). Status 0: no answer came; 200: an
    answer without a score."""


class Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):     # the key would go along
        return None


OPENER = urllib.request.build_opener(Stay)


def post(url, body, key, timeout_sec, is_over):
    """
    -> status, headers, bytes. Raises Unjudged if they have not come after timeout_sec, or when is_over.
    urllib's timeout is one
    of each recv: a server that sends a byte now and then would hold the line for ever. Such a line is left to
    its own thread.
    """
    headers = {'Content-Type': 'application/json', **({'Authorization': f'Bearer {key}'} if key else {})}
    request = urllib.request.Request(url, body, headers)
    box, until = queue.SimpleQueue(), time.monotonic() + timeout_sec

    def work():
        try:
            try:
                # the clock below is the one that counts
                response = OPENER.open(request, timeout=2 * timeout_sec)
            except urllib.error.HTTPError as error:     # a response too, of another status
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
    """What the judge wrote -> dict(score, why). Around the JSON may stand a fence or a remark; two scores are
    no score."""
    found = []
    # who thinks aloud weighs other scores before
    for piece in re.findall(r'\{[^{}]*\}', re.sub(r'(?s).*</think>', '', text)):
        with suppress(ValueError):
            found.append(json.loads(piece, strict=False))
    found = [each for each in found if 'score' in each]
    values = [each['score'] for each in found]
    if len(set(map(repr, values))) != 1 or type(values[0]) not in (int, float) or not 1 <= values[0] <= 10:
        raise Unjudged(f'the judge gave no score from 1 to 10: {text[:100]!r}', 200, None)
    # \ud83d alone is JSON, but cannot be printed
    why = str(found[0].get('why', '')).encode(errors='replace').decode()
    return dict(score=values[0], why=' '.join(why.split()))


def read_retry_after(header):
    if re.fullmatch(r'\d+(\.\d+)?', header or ''):
        return float(header)
    with suppress(TypeError, ValueError):       # or it is a date
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())


def open_cache(path):
    """-> ({key: dict(score, why)}, the file to append to). Half a last line, of a run that was killed, is cut
    off."""
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


def score(items, url, model, key=None, prompt_path=PROMPT, cache_path='out/judge_cache.jsonl', n_parallel=8,
          timeout_sec=60, n_try=4, usd_per_m_in=0.0, usd_per_m_out=0.0, pause_sec=2.0, say=print):
    """
    items: [dict(id, question, answer, history=[dict(role, text)])] -> in their order [dict(id, score, why)],
    or dict(id, score=None, error, status) where there is none: these alone the next run asks again.
    usd_per_m: price of a
    million tokens. pause_sec: before the second try; doubled before each later one, unless the server names a
    time. Raises ValueError where going on is of no use: wrong key, url or model, a server that is not there.
    """
    if not re.match(r'https?://[^/]', url) or n_parallel < 1 or n_try < 1 or timeout_sec <= 0:
        raise ValueError(f'the judge needs a url such as http://127.0.0.1:8000/v1 (it is {url!r}), '
                         'n_parallel and n_try of at least 1, a timeout above 0')
    key = (os.environ.get('OPENAI_API_KEY', '') if key is None else key).strip()
    if not (key.isascii() and key.isprintable()):       # the HTTP library would print it
        raise ValueError('the key of the judge holds characters that no key has: copy it again')
    if not os.path.isfile(prompt_path):
        raise ValueError(f'there is no file {prompt_path} with a prompt for the judge')
    prompt = pathlib.Path(prompt_path).read_text(encoding='utf-8').strip()
    url = url.rstrip('/') + '/chat/completions'
    # used: (tokens in, tokens out) of each answer, None where it does not say
    is_over, used = threading.Event(), []

    def ask(text):
        body = json.dumps(dict(model=model, temperature=0, messages=[dict(role='user',
                                                                          content=text)])).encode()
        status, about, answer = post(url, body, key, timeout_sec, is_over)
        answer = answer.decode('utf-8', 'replace')
        # some servers quote it; "none" or "EMPTY" is no secret
        answer = answer.replace(key, '(key)') if len(key) > 7 else answer
        if status != 200:
            raise Unjudged(f'{url} said {status}: {" ".join(answer.split())[:300]}', status,
                           read_retry_after(about['Retry-After']))
        try:
            answer = json.loads(answer)
            usage = answer.get('usage') or {}
            counts = usage.get('prompt_tokens'), usage.get('completion_tokens')
            used.append(counts if all(type(count) is int for count in counts) else None)
            return read_score(answer['choices'][0]['message']['content'])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise Unjudged(f'{url} gave no chat completion: {str(answer)[:100]!r}', 200, None)

    def judge(text):
        for i in range(n_try):
            try:
                return ask(text)
            except Unjudged as error:
                reason, status, retry_after = error.args
            # the threads do not all come back in the same moment, nor before the time that was named
            pause = pause_sec * 2**i * random.uniform(
                0.5, 1) if retry_after is None else retry_after + random.uniform(0, pause_sec)
            is_refused = 300 <= status < 500 and status not in (408, 425, 429)
            if is_refused or i == n_try - 1 or pause > MAX_WAIT_SEC or is_over.wait(pause):
                return dict(score=None, error=reason, status=status)

    def progress():
        rows = [known[each] for each in keys if each in known]
        scores = [row['score'] for row in rows if row['score'] is not None]
        n_in, n_out = (sum(count) for count in zip((0, 0), *filter(None, used)))
        usd = f', {(n_in * usd_per_m_in + n_out * usd_per_m_out) / 1e6:.4f} USD' if usd_per_m_in or usd_per_m_out else ''
        cost = f'{n_in:,} tokens in, {n_out:,} out{usd}' if None not in used else 'tokens and cost unknown: the server does not say'
        say(f'judge {len(rows)}/{len(keys)} | mean {f"{sum(scores) / len(scores):.2f}" if scores else "-"} | '
            f'without a score {len(rows) - len(scores)} | {cost}')

    texts = [
        prompt + '\n\n'
        + json.dumps({name: item[name]
                      for name in ('history', 'question', 'answer')}, ensure_ascii=False, indent=1)
        for item in items]
    keys = [hashlib.sha256(json.dumps([model, text]).encode()).hexdigest() for text in texts]
    known, cache = open_cache(cache_path)
    # what was said twice is asked once
    new = {each: text for each, text in zip(keys, texts) if each not in known}
    n_judged, n_lost, n_down, said_at = len(set(keys)) - len(new), 0, 0, time.monotonic()
    pool = ThreadPoolExecutor(n_parallel)
    try:
        futures = {pool.submit(judge, text): each for each, text in new.items()}
        for future in as_completed(futures):
            row = known[futures[future]] = future.result()
            status = row.get('status', 200)
            if row['score'] is not None:
                cache.write((json.dumps(dict(key=futures[future], model=model, **row)) + '\n').encode())
                cache.flush()
                n_judged += 1
            n_lost += status != 200
            n_down = n_down + 1 if status == 0 or status == 429 or status >= 500 else 0
            # one answer may be refused for what stands in it; where none is taken the fault is not theirs
            if status in (401, 404) or n_down == MAX_LOST or (not n_judged
                                                              and n_lost == min(MAX_LOST, len(new))):
                raise ValueError(f'the judge cannot be asked: {row["error"]}')
            if time.monotonic() - said_at > 5:
                progress()
                said_at = time.monotonic()
    finally:        # on Ctrl-C too: what is under way is given up, what was judged is in the cache
        is_over.set()
        pool.shutdown(wait=False, cancel_futures=True)
        cache.close()
    progress()
    return [dict(known[each], id=item['id']) for each, item in zip(keys, items)]


def to_items(conversations, use_expected=False):
    """What the assistant said to each user turn, until the next one, with the turns before; or what the
    reference has there."""
    items = []
    for conversation in conversations:
        users = sorted((turn for turn in conversation['turns'] if turn['role'] == 'user'),
                       key=lambda turn: turn['start'])
        answers = conversation['expected'] if use_expected else [
            turn for turn in conversation['turns'] if turn['role'] == 'assistant']
        turns = sorted(users + answers, key=lambda turn: turn['start'])
        for i, user in enumerate(users):
            if not user['text'].strip():
                raise ValueError(f'conversation {conversation["id"]!r}: what the user says in turn {i + 1} '
                                 'is not written down; the judge needs a transcript')
            until = users[i + 1]['start'] if i + 1 < len(users) else float('inf')
            said = [
                turn['text']
                for turn in turns
                if turn['role'] == 'assistant' and user['start'] <= turn['start'] < until]
            history = [
                dict(role=turn['role'], text=turn['text']) for turn in turns if turn['start'] < user['start']]
            if said:
                items.append(
                    dict(id=f'{conversation["id"]}/{i + 1}', question=user['text'],
                         answer=' '.join(said).strip(), history=history))
    # one may be without words, a model of speech alone writes none at all
    if items and not any(item['answer'] for item in items):
        raise ValueError(f'conversation {conversations[0]["id"]!r} and all others: no answer is written '
                         'down; the judge needs a transcript')
    return items


def read_transcript(path):
    turns = []
    with open(path, encoding='utf-8') as file:
        for i, line in enumerate(file):
            try:
                row = json.loads(line)
                turns.append(dict(role=row['role'], start=row['start_sec'], text=row['text']))
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{path}, line {i + 1}: a line is JSON with role, start_sec and text, as '
                                 'sample.py writes it')
    return dict(id=os.path.splitext(os.path.basename(path))[0], turns=turns)


def main():
    parser = Parser(description=__doc__.strip().split('\n\n')[0],
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('transcripts', nargs='+', help='JSON lines as sample.py writes them, one file a '
                                                       'dialogue')
    parser.add_argument('--url', required=True, help='of the endpoint, with /v1')
    parser.add_argument('--model', required=True, help='as the endpoint calls it')
    parser.add_argument('--judge_prompt', default=PROMPT, help='a text file: what the judge is told')
    parser.add_argument('--out', default='out/judge', help='OUT.jsonl gets the scores, OUT_cache.jsonl what '
                                                           'is not asked again')
    parser.add_argument('--n_parallel', type=int, default=8, help='requests under way at once')
    parser.add_argument('--usd_per_m_in', type=float, default=0.0, help='price of a million tokens in')
    parser.add_argument('--usd_per_m_out', type=float, default=0.0, help='price of a million tokens out')
    args = parser.parse_args()
    try:
        items = to_items(list(map(read_transcript, args.transcripts)))
        rows = score(items, args.url, args.model, prompt_path=args.judge_prompt,
                     cache_path=args.out + '_cache.jsonl', n_parallel=args.n_parallel,
                     usd_per_m_in=args.usd_per_m_in, usd_per_m_out=args.usd_per_m_out)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error))
    with whole(args.out + '.jsonl') as part, open(part, 'w', encoding='utf-8') as file:
        for item, row in zip(items, rows):
            file.write(json.dumps(dict(item, **row), ensure_ascii=False) + '\n')
            print(f'{row["score"] or "-":>4}  {item["question"][:40]:40}  {item["answer"][:40]:40}  '
                  f'{row.get("why") or row.get("error")}')
    print(f'written: {args.out}.jsonl')


if __name__ == '__main__':
    main()
