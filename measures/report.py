"""
A page to see and hear conversations on: figures and plots on top, below them each dialogue with a player. It
is one file, which opens offline.

    from measures import report
    report.write('report.html', 'out/demo on data/demo', conversations, list(map(assess, conversations)),
                 figures=[('answers within 400 ms', '97 %', '68 %')], curves={'train text': [(50, 2.7)]})

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

from common.files import whole
from flatten import ROLES
from measures.turns import KS, MAX_K, PATIENCE_SEC, accuracy, stretches

NBSP = '\u00a0'
# Speech up to 6 kHz in at most 40 kb/s, 100 dialogues of 30 s in 20 MB of base64; digital silence costs next
# to nothing. VARIABLE, as with a
# constant rate below 40 kb/s there is no room for the header that tells the encoder's delay: all would sound
# 46 to 69 ms late.
MP3 = dict(format='MP3', bitrate_mode='VARIABLE', compression_level=0.95)
MP3_RATES = 8000, 11025, 12000, 16000       # MP3 has more, at which it takes more bits


def mp3(wave, sample_rate):
    """float32 [n_sample, 2] -> (base64, the sample rate it is at)"""
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise ValueError(
            f'a report with sound needs {error.name}: pip install "soundfile>=0.13" soxr') from None
    if 'MP3' not in soundfile.available_formats():
        raise ValueError(f'libsndfile {soundfile.__libsndfile_version__} cannot write MP3, which a report\'s '
                         'sound is in: pip install -U "soundfile>=0.13"')
    assert wave.ndim == 2 and wave.shape[1] == 2, f'wave is {wave.shape}, it has to be (n_sample, 2)'
    if sample_rate not in MP3_RATES:
        wave, sample_rate = soxr.resample(wave, sample_rate, 16000), 16000
    file = io.BytesIO()
    soundfile.write(file, np.clip(wave, -1, 1), sample_rate, **MP3)
    return base64.b64encode(file.getvalue()).decode(), sample_rate


def loudness(wave, speaks):
    """A digit a frame, 0 to 9, of one channel; 0 or 6 where there is only speaks to go by."""
    if wave is None:
        return ''.join('6' if s else '0' for s in speaks)
    edges = np.linspace(0, len(wave), len(speaks) + 1).astype(int)
    levels = np.array([np.sqrt(np.mean(wave[a:b] ** 2)) if b > a else 0 for a, b in zip(edges, edges[1:])])
    # the root: quiet sounds are seen too
    return ''.join(map(str, np.round(9 * np.sqrt(levels / max(levels.max(initial=0), 1e-4))).astype(int)))


def marks(outcomes, rate_hz):
    """What the page writes between the lanes: [kind, first frame, last frame, label, start of the user turn
    that it belongs to]."""
    patience = PATIENCE_SEC * rate_hz

    def ms(frames):
        return f'{1e3 * abs(frames) / rate_hz:,.0f} ms' + ' early' * (frames < 0)
    for f in outcomes:
        start, end, response, yielded = f['start'], f['end'], f['response'], f['yielded']
        if f['kind'] == 'interruption':
            yield 'interruption', start, start + (yielded or 0), 'interrupts, ' + (
                'never yields' if yielded is None else f'yields after {ms(yielded)}'), start
        if f['kind'] == 'backchannel':
            yield 'backchannel', start, start, '○ backchannel' + (
                f', silent after {ms(yielded)}' if yielded is not None and yielded <= patience else ''), start
        if f['false_start'] is not None:
            yield 'false start', f['false_start'], f['false_start'], '▼ false start', start
        if response is not None:
            is_late = response > patience
            yield 'late answer' if is_late else 'answer', min(end,
                                                              end + response), max(end, end + response), ms(
                                                                  response) + is_late * ', late', start
        elif f['expects']:
            yield 'no answer', end, end, '✕ no answer', start
        if f['unprompted'] is not None:
            yield 'unprompted', f['unprompted'], f['unprompted'], '▼ spoke again', start


def dialogue(c, outcomes):
    """A conversation as the page reads it; the sound is apart."""
    both, spans = np.ones(c['n_frame'], bool), {}
    for role in ROLES:
        spans[role] = stretches(np.asarray(c['speaks'][role]), c['rate_hz'])
        speaks = np.zeros(c['n_frame'], bool)
        for a, b in spans[role]:
            speaks[a:b] = True
        both &= speaks
    return dict(
        id=str(c['id']), rate_hz=c['rate_hz'], n_frame=c['n_frame'], chunk_frames=c['chunk_frames'],
        turns=c['turns'], expected=c['expected'], spans=spans, both=stretches(both, c['rate_hz'], 0),
        marks=list(marks(outcomes, c['rate_hz'])), loud={
            role: loudness(None if c['wave'] is None else c['wave'][:, i], c['speaks'][role])
            for i, role in enumerate(ROLES)})


def ticks(high):
    """At most six round numbers from 0 to high."""
    step = 10 ** math.floor(math.log10(high / 3))
    step *= next(m for m in (1, 2, 5, 10) if high / (m * step) <= 5)
    return [step * i for i in range(math.floor(high / step + 1e-9) + 1)]


def percent(share):
    return f'{100 * share:.0f}{NBSP}%'


def plot(title, says, x_label, lines, y_ticks=None, y_text=percent, bars=False):
    """lines: [(label, [(x, y)], colour 0 to 3, dashed)]. says: the figures as a sentence, for who cannot see
    the plot, below it for all."""
    xs, ys = zip(*(point for _, points, *_ in lines for point in points))
    y_ticks = y_ticks or ticks(max(ys))
    x_max, y_min, y_max = max(*xs, 1), y_ticks[0], max(*ys, y_ticks[-1])
    shapes, keys = [], []

    def at(x, y):
        return f'{44 + 288 * x / x_max:.1f} {166 - 156 * (y - y_min) / (y_max - y_min):.1f}'
    for y in y_ticks:
        shapes.append(f'<path class="grid" d="M{at(0, y)}h288"/><text x="38" '
                      f'y="{float(at(0, y).split()[1]) + 4}" text-anchor="end">{y_text(y)}</text>')
    shapes += [
        f'<text x="{at(x, 0).split()[0]}" y="182" text-anchor="middle">{x:,.4g}</text>' for x in ticks(x_max)]
    for label, points, colour, dashed in lines:
        d = ''.join(f'M{at(x, y_min)}L{at(x, y)}' for x, y in points if y) if bars else 'M' + 'L'.join(
            at(x, y) for x, y in points) + 'h0'
        look = f'class="line c{colour}{" dashed" * dashed}{" bar" * bars}"'
        shapes.append(f'<path {look} d="{d}"/>')
        keys.append(f'<span><svg width="26" height="8" aria-hidden="true"><path {look} d="M0 4h26"/></svg> '
                    f'{html.escape(label)}</span>')
    return (f'<figure><figcaption>{html.escape(title)}</figcaption>'
            + f'<p class="keys">{" ".join(keys)}</p>' *
            (len(lines) > 1) + '<svg viewBox="0 0 340 204" role="img" '
            f'aria-label="{html.escape(f"{title}. {says}")}">{"".join(shapes)}'
            '<text x="188" y="200" '
            f'text-anchor="middle">{html.escape(x_label)}</text></svg><p>{html.escape(says)}</p></figure>')


def turn_plots(outcomes, rate_hz):
    """The response times, and Acc@K for the answers and for the user's interruptions."""
    due = [f for f in outcomes if f['expects']]
    times = [max(f['response'], 0) for f in due if f['response'] is not None and f['response'] < MAX_K]
    if times:
        yield plot(
            'Response time', f'Median {1e3 * np.median(times) / rate_hz:.0f} ms. '
            f'{len(due) - len(times)} of {len(due)} answers came later than '
            f'{MAX_K / rate_hz:.1f}{NBSP}s, or not at all.', 'ms from the user\'s end to the '
            'answer\'s start', [('answers', [
                (1e3 * k / rate_hz, times.count(k) / len(due)) for k in range(MAX_K)], 1, False)], bars=True)
    for title, yields, colour in (('Acc@K: the assistant takes its turn', False, 1), ('Acc@K: it yields to '
                                                                                      'an interruption', True,
                                                                                      0)):
        n = accuracy(outcomes, 1, yields)[1]
        by, at = ([(k, accuracy(outcomes, k, yields, exactly)[0] / n)
                   for k in range(1, MAX_K + 1)] if n else []
                  for exactly in (False, True))
        if n:
            yield plot(
                title, f'{n} turns. By frame ' + ', '.join(f'{k}: {percent(by[k - 1][1])}' for k in KS) + '.',
                f'K frames of {1e3 / rate_hz:.0f} ms after the user\'s {"start" if yields else "end"}', [
                    ('by frame K', by, colour, False), ('at frame K', at, 2, True)], ticks(1))


def loss_plot(curves):
    kinds = list(dict.fromkeys(label.split()[-1] for label in curves))
    lines = [(label, [(step, math.log10(value))
                      for step, value in points
                      if value > 0], kinds.index(label.split()[-1]) % 4, 'val' in label.split())
             for label, points in curves.items()]
    lines = [line for line in lines if line[1]]
    if not lines:
        return ''
    low, high = (fold(y for _, points, *_ in lines for _, y in points) for fold in (min, max))
    low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    y_ticks = [
        decade + math.log10(m)
        for decade in range(low, high)
        for m in ((1, ) if high - low > 2 else (1, 2, 5))] + [high]
    says = 'At the end: ' + ', '.join(
        f'{label} {10 ** points[-1][1]:.3g}' for label, points, *_ in lines) + '.'
    return plot('Loss', says, 'step', lines, y_ticks, lambda y: f'{10 ** y:.2g}')


def table(figures):
    has_theirs = any(theirs for *_, theirs in figures)

    def cells(values):
        # a unit stays with its number
        return ''.join(f'<td>{html.escape(re.sub("(?<=[0-9]) ", NBSP, value))}</td>' for value in values)

    rows = ''.join(f'<tr><th scope="row">{html.escape(label)}</th>{cells(values[:1 + has_theirs])}</tr>'
                   for label, *values in figures)
    head = '<th scope="col">ours</th>' + '<th scope="col">theirs</th>' * has_theirs
    if not figures:
        return ''
    return f'<table><thead><tr><th scope="col">figure</th>{head}</tr></thead><tbody>{rows}</tbody></table>'


def write(path, title, conversations, outcomes=None, figures=None, curves=None, note='', links=()):
    """Writes the page. outcomes: turns.assess of each conversation; figures: [(label, ours, theirs)]; curves:
    {label: [(step, loss)]};
    links: [(label, file)], relative to the page."""
    assert outcomes is None or len(outcomes) == len(
        conversations), f'{len(outcomes)} outcomes, {len(conversations)} conversations'
    plots = [*turn_plots([f for of_one in outcomes for f in of_one], conversations[0]['rate_hz'])
             ] if outcomes else []
    plots += [loss_plot(curves)] if curves else []
    page, sounds = [dialogue(c, f) for c, f in zip(conversations, outcomes or [[]] * len(conversations))], []
    heard = [(c, one) for c, one in zip(conversations, page) if c['wave'] is not None]
    with ThreadPoolExecutor() as pool:      # LAME is the slow part, and lets go of the interpreter
        for i, (sound, sample_rate
                ) in enumerate(pool.map(lambda pair: mp3(pair[0]['wave'], pair[0]['sample_rate']), heard)):
            sounds.append(f'<script type="text/plain" id="mp3-{i}">{sound}</script>')
            heard[i][1].update(mp3=f'mp3-{i}', sample_rate=sample_rate)
    with open(os.path.splitext(__file__)[0] + '.html', encoding='utf-8') as file:
        template = file.read()
    # '<' would let a text end the script that it stands in
    parts = dict(
        title=html.escape(title), note=html.escape(note),
        links=' · '.join(f'<a href="{quote(file)}">{html.escape(label)}</a>' for label, file in links),
        sounds='\n'.join(sounds), summary=table(figures or []) +
        (f'<div class="plots">{"".join(plots)}</div>' if plots else ''),
        dialogues=json.dumps(page, ensure_ascii=False, separators=(',', ':')).replace('<', '\\u003c'))
    with whole(path) as part, open(part, 'w', encoding='utf-8') as file:
        # in one pass: a text with {{title}} in it stays one
        file.write(re.sub(r'{{(\w+)}}', lambda match: parts[match[1]], template))
