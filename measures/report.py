"""
A page to see and hear conversations on: figures and plots on top, below them each dialogue with a player. It
is one file, which opens offline.

    from measures import report
    report.write('report.html', 'out/demo on data/demo', conversations, list(map(assess, conversations)),
                 figures=[('answers within 400 ms', '97 %', '68 %')], curves={'train text': [(50, 2.7)]})

Beside the figures it answers "which?": its list can be cut down to the dialogues with a wrong answer, a late
one, a false start, and so on.

    |> 1.9 / 7.9 s
            0 s            1 s            2 s            3 s
    user        What is two plus three?         ░ hatched: both speak ░ ...
                ▁▃▅▇▅▃▁▃▅▇▅▃▁▂▄▂▁
                                 |──| 120 ms    ▼ false start
    assistant                       ▁▃▅▇▅▃▁▃▅▇▅▃▁
                                    Two plus three is five.

report.html beside this file is the template. Texts reach the page as JSON and as escaped HTML, the sound as
MP3 in base64, which the page decodes when a dialogue is opened.
"""
import base64
import html
import io
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import numpy as np

from common.files import JSON_TEXT, whole
from flatten import ROLES
from measures.replies import is_right, written
from measures.turns import KS, MAX_K, PATIENCE_SEC, accuracy, in_time, stretches

NBSP = '\u00a0'
# Speech up to 6 kHz in at most 40 kb/s: 100 dialogues of 30 s are 20 MB of base64, and digital silence costs
# next to nothing. The bit rate has to be VARIABLE: at a constant rate below 40 kb/s there is no room for the
# header that tells the encoder's delay, so all would sound 46 to 69 ms late.
MP3 = dict(format='MP3', bitrate_mode='VARIABLE', compression_level=0.95)
MP3_RATES = 8000, 11025, 12000, 16000       # MP3 has more, at which it takes more bits


def mp3(wave, sample_rate):
    """float32 [n_sample, 2] -> (base64, the sample rate it is at)"""
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise ValueError(f'a report with sound needs {error.name}: '
                         'pip install "soundfile>=0.13" soxr') from None
    if 'MP3' not in soundfile.available_formats():
        raise ValueError(f'libsndfile {soundfile.__libsndfile_version__} cannot write MP3, '
                         'which a report\'s sound is in: pip install -U "soundfile>=0.13"')
    assert wave.ndim == 2 and wave.shape[1] == 2, f'wave is {wave.shape}, it has to be (n_sample, 2)'
    if sample_rate not in MP3_RATES:
        wave, sample_rate = soxr.resample(wave, sample_rate, 16000), 16000
    file = io.BytesIO()
    soundfile.write(file, np.clip(wave, -1, 1), sample_rate, **MP3)
    return base64.b64encode(file.getvalue()).decode(), sample_rate


def loudness(wave, speaks):
    """How loud a channel is: a digit from 0 to 9 a frame. Without a wave, 6 where it speaks, else 0."""
    if wave is None:
        return ''.join('6' if s else '0' for s in speaks)
    edges = np.linspace(0, len(wave), len(speaks) + 1).astype(int)
    levels = np.array([np.sqrt(np.mean(wave[a:b] ** 2)) if b > a else 0 for a, b in zip(edges, edges[1:])])
    shares = levels / max(levels.max(initial=0), 1e-4)
    digits = np.round(9 * np.sqrt(shares)).astype(int)      # the root, so that quiet sounds are seen, too
    return ''.join(map(str, digits))


def is_wrong(turn):
    """Did it answer, and not with the reference's words? As in evaluate.py, where no answer is wrong, too."""
    has_answered = turn['said'] or turn['response'] is not None
    return bool(has_answered and not all(is_right(*pair) for pair in written([[turn]])))


def marks(outcomes, rate_hz, has_text=True):
    """Yields what the page writes between the lanes: kind, first frame, last frame, label, and the start of
    the user's turn that it belongs to. has_text: the assistant writes what it says."""
    patience = PATIENCE_SEC * rate_hz

    def ms(frames):
        return f'{1e3 * abs(frames) / rate_hz:,.0f} ms' + ' early' * (frames < 0)

    for f in outcomes:
        start, end, response, yielded = f['start'], f['end'], f['response'], f['yielded']
        if f['kind'] == 'interruption':
            outcome = f'yields after {ms(yielded)}' if yielded is not None else \
                'never yields' if f['was_speaking'] else 'finds it silent'
            yield 'interruption', start, start + (yielded or 0), f'interrupts, {outcome}', start
        if f['kind'] == 'backchannel':
            is_stopped = yielded is not None and yielded <= patience
            label = '○ backchannel' + (f', silent after {ms(yielded)}' if is_stopped else '')
            yield 'backchannel', start, start, label, start
        if f['false_start'] is not None:
            yield 'false start', f['false_start'], f['false_start'], '▼ false start', start
        if response is not None:
            first, last = min(end, end + response), max(end, end + response)
            if response > patience:
                yield 'late answer', first, last, f'{ms(response)}, late', start
            else:
                yield 'answer', first, last, ms(response), start
        elif f['expects']:
            yield 'no answer', end, end, '✕ no answer', start
        if has_text and is_wrong(f):
            at = f['said'][0]['start'] if f['said'] else end
            yield 'wrong answer', at, at, '✕ wrong answer', start
        if f['unprompted'] is not None:
            yield 'unprompted', f['unprompted'], f['unprompted'], '▼ spoke again', start


def dialogue(c, outcomes, has_text=True):
    """A conversation as the page reads it; the sound is apart."""
    both, spans = np.ones(c['n_frame'], bool), {}
    for role in ROLES:
        spans[role] = stretches(np.asarray(c['speaks'][role]), c['rate_hz'])
        speaks = np.zeros(c['n_frame'], bool)
        for a, b in spans[role]:
            speaks[a:b] = True
        both &= speaks
    waves = [None, None] if c['wave'] is None else c['wave'].T
    return dict(
        id=str(c['id']), rate_hz=c['rate_hz'], n_frame=c['n_frame'], chunk_frames=c['chunk_frames'],
        turns=c['turns'], expected=c['expected'], spans=spans, both=stretches(both, c['rate_hz'], 0),
        marks=list(marks(outcomes, c['rate_hz'], has_text)),
        loud={role: loudness(wave, c['speaks'][role]) for role, wave in zip(ROLES, waves)})


def ticks(high):
    """At most six round numbers from 0 to high."""
    step = 10 ** math.floor(math.log10(high / 3))
    step *= next(m for m in (1, 2, 5, 10) if high / (m * step) <= 5)
    return [step * i for i in range(math.floor(high / step + 1e-9) + 1)]


def percent(share):
    return f'{100 * share:.0f}{NBSP}%'


def plot(title, says, x_label, lines, y_ticks=None, y_text=percent, bars=False):
    """lines: [(label, [(x, y)], colour 0 to 3, dashed)]. says: the figures in a sentence, which stands below
    the plot, and is read out to those who cannot see it."""
    xs, ys = zip(*(point for _, points, *_ in lines for point in points))
    y_ticks = y_ticks or ticks(max(ys))
    x_max, y_min, y_max = max(*xs, 1), y_ticks[0], max(*ys, y_ticks[-1])
    shapes, keys = [], []

    def at(x, y):
        return f'{44 + 288 * x / x_max:.1f} {166 - 156 * (y - y_min) / (y_max - y_min):.1f}'

    for y in y_ticks:
        text_y = float(at(0, y).split()[1]) + 4
        shapes.append(f'<path class="grid" d="M{at(0, y)}h288"/>'
                      f'<text x="38" y="{text_y}" text-anchor="end">{y_text(y)}</text>')
    for x in ticks(x_max):
        text_x = at(x, 0).split()[0]
        shapes.append(f'<text x="{text_x}" y="182" text-anchor="middle">{x:,.4g}</text>')
    for label, points, colour, dashed in lines:
        if bars:
            d = ''.join(f'M{at(x, y_min)}L{at(x, y)}' for x, y in points if y)
        else:
            d = 'M' + 'L'.join(at(x, y) for x, y in points) + 'h0'
        look = f'class="line c{colour}{" dashed" * dashed}{" bar" * bars}"'
        shapes.append(f'<path {look} d="{d}"/>')
        keys.append(f'<span><svg width="26" height="8" aria-hidden="true"><path {look} d="M0 4h26"/></svg> '
                    f'{html.escape(label)}</span>')
    legend = f'<p class="keys">{" ".join(keys)}</p>' if len(lines) > 1 else ''
    return (f'<figure><figcaption>{html.escape(title)}</figcaption>{legend}'
            f'<svg viewBox="0 0 340 204" role="img" aria-label="{html.escape(f"{title}. {says}")}">'
            f'{"".join(shapes)}<text x="188" y="200" text-anchor="middle">{html.escape(x_label)}</text></svg>'
            f'<p>{html.escape(says)}</p></figure>')


def turn_plots(outcomes, rate_hz):
    """The response times, and Acc@K for the answers and for the user's interruptions."""
    due, patience = [f for f in outcomes if f['expects']], PATIENCE_SEC * rate_hz
    times = [max(f['response'], 0) for f in due if in_time(f['response'], patience)]
    if times:
        says = (f'Median {1e3 * np.median(times) / rate_hz:.0f} ms. {len(due) - len(times)} of {len(due)} '
                f'answers came later than {PATIENCE_SEC}{NBSP}s, or not at all.')
        points = [(1e3 * k / rate_hz, times.count(k) / len(due)) for k in range(math.floor(patience) + 1)]
        yield plot('Response time', says, "ms from the user's end to the answer's start",
                   [('answers', points, 1, False)], bars=True)
    for title, yields, colour in (('Acc@K: the assistant takes its turn', False, 1),
                                  ('Acc@K: it yields to an interruption', True, 0)):
        n = accuracy(outcomes, 1, yields)[1]
        if not n:
            continue
        by, at = ([(k, accuracy(outcomes, k, yields, exactly)[0] / n) for k in range(1, MAX_K + 1)]
                  for exactly in (False, True))
        says = f'{n} turns. By frame ' + ', '.join(f'{k}: {percent(by[k - 1][1])}' for k in KS) + '.'
        x_label = f"K frames of {1e3 / rate_hz:.0f} ms after the user's {'start' if yields else 'end'}"
        lines = [('by frame K', by, colour, False), ('at frame K', at, 2, True)]
        yield plot(title, says, x_label, lines, ticks(1))


def loss_plots(curves):
    """A plot for each stream, with its loss in training and on val over the steps; one logarithmic scale."""
    kinds = {}      # 'text' -> [('train', [(step, log10 of the loss)])]
    for label, points in curves.items():
        name, _, kind = label.rpartition(' ')
        points = [(step, math.log10(value)) for step, value in points if value > 0]
        if points:
            kinds.setdefault(kind, []).append((name or kind, points))
    ys = [y for lines in kinds.values() for _, points in lines for _, y in points]
    if not ys:
        return
    low = math.floor(min(ys))
    high = max(math.ceil(max(ys)), low + 1)
    steps = (1,) if high - low > 2 else (1, 2, 5)
    y_ticks = [decade + math.log10(step) for decade in range(low, high) for step in steps] + [high]
    for kind, lines in kinds.items():
        ends = ', '.join(f'{name} {10 ** points[-1][1]:.3g}' for name, points in lines)
        lines = [(name, points, i % 4, name == 'val') for i, (name, points) in enumerate(lines)]
        yield plot('Loss of all streams' if kind == 'loss' else f'Loss of {kind}', f'At the end: {ends}.',
                   'step', lines, y_ticks, lambda y: f'{10 ** y:.2g}')


def table(figures, heads):
    """figures: [(label, a value for each of heads)]. A label without a value heads the lines below it, which
    stand back. The last column is left out where nobody has a value."""
    n_column = len(heads) - (not any(values[-1] for _, *values in figures))
    head = ''.join(f'<th scope="col">{html.escape(each)}</th>' for each in ['figure', *heads[:n_column]])
    rows = []
    for label, *values in figures:
        if values[0]:
            # a unit stays with its number
            cells = ''.join(f'<td>{html.escape(re.sub("(?<=[0-9]) ", NBSP, value))}</td>'
                            for value in values[:n_column])
            rows.append(f'<tr><th scope="row">{html.escape(label)}</th>{cells}</tr>')
        else:
            rows.append(f'</tbody><tbody><tr><th scope="rowgroup" colspan="{1 + n_column}">'
                        f'{html.escape(label)}</th></tr>')
    if not figures:
        return ''
    return f'<table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def template():
    with open(os.path.splitext(__file__)[0] + '.html', encoding='utf-8') as file:
        return file.read()


def write(path, title, conversations, outcomes=None, figures=None, curves=None, note='', links=(),
          heads=('measured', 'theirs')):
    """
    Writes the page.
        outcomes    turns.assess of each conversation; of more behind them, which only the plots count
        figures     [(label, a value for each of heads)], see table
        curves      {label: [(step, loss)]}
        links       [(label, file)], relative to the page
    """
    n = len(conversations)
    assert outcomes is None or len(outcomes) >= n, f'{len(outcomes)} outcomes, {n} conversations'
    plots = []
    if outcomes:
        plots += turn_plots([f for of_one in outcomes for f in of_one], conversations[0]['rate_hz'])
    if curves:
        plots += loss_plots(curves)
    has_text = any(part['text'] for of_one in outcomes or () for f in of_one for part in f['said'])
    page = [dialogue(c, f, has_text) for c, f in zip(conversations, outcomes or [[]] * n)]
    heard = [(c, one) for c, one in zip(conversations, page) if c['wave'] is not None]
    sounds = []
    with ThreadPoolExecutor() as pool:      # LAME is the slow part, and lets go of the interpreter
        encoded = pool.map(lambda pair: mp3(pair[0]['wave'], pair[0]['sample_rate']), heard)
        for i, (sound, sample_rate) in enumerate(encoded):
            sounds.append(f'<script type="text/plain" id="mp3-{i}">{sound}</script>')
            heard[i][1].update(mp3=f'mp3-{i}', sample_rate=sample_rate)
    summary = table(figures or [], heads) + (f'<div class="plots">{"".join(plots)}</div>' if plots else '')
    dialogues = json.dumps(page, ensure_ascii=False, separators=(',', ':'))
    parts = dict(
        title=html.escape(title), note=html.escape(note),
        links=' · '.join(f'<a href="{quote(file)}">{html.escape(label)}</a>' for label, file in links),
        sounds='\n'.join(sounds), summary=summary,
        dialogues=dialogues.replace('<', '\\u003c'))    # '<' would let a text end the script that it is in
    with whole(path) as part, open(part, 'w', **JSON_TEXT) as file:
        # in one pass: a text with {{title}} in it stays one
        file.write(re.sub(r'{{(\w+)}}', lambda match: parts[match[1]], template()))
