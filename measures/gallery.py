"""
The same dialogues with several checkpoints, side by side, to be heard: one HTML file, which opens offline.

    python -m measures.gallery out/a out/b --data=data/demo --out=gallery.html

    test-00003-Gene2    out/a                               out/b
                        ▶ ──────────── 0:08                 ▶ ──────────── 0:08
                        user  What is the capital of …?     user  What is the capital of …?
                        assistant  Cairo. ✓ right           assistant  Lisbon. ✕ wrong, expected: Cairo.

Each checkpoint listens to the users of the first dialogues of the split; all hear the same codes. The figures
on top are those that evaluate.py left in each checkpoint's folder, over the whole split that it was run on.
"""
import argparse
import html
import os
import re
from itertools import islice

import numpy as np

from checkpoint import check_codec, load_checkpoint
from common.device import pick_device, pick_dtype
from common.files import JSON_TEXT, read_json, whole
from config import Parser
from data.dialogues import Dialogues
from decode import Sampling, render
from flatten import ROLES, START
from measures import replies
from measures.report import is_wrong, marks, mp3, percent, table, template
from measures.turns import assess, stretches, with_user_of

STYLE = """
.plain td:nth-child(n) { font-weight: 400; color: var(--ink); }
.row { display: grid; gap: 10px 16px; margin-top: 28px; min-width: min-content;
    grid-template-columns: repeat(var(--n), minmax(250px, 1fr)); }
.wide { overflow-x: auto; }
.plain { margin-top: 20px; }
.row h2 { grid-column: 1 / -1; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px; }
h3 { margin: 0; font-size: 15px; overflow-wrap: anywhere; }
article svg { width: 100%; height: 22px; display: block; margin: 6px 0; }
audio { width: 100%; height: 40px; }
ol { list-style: none; margin: 8px 0 0; padding: 0; }
li { margin-top: 3px; }
li b { font-size: 13px; color: var(--user); }
li .assistant { color: var(--assistant); }
small { color: var(--soft); font-size: 13px; margin-left: 6px; display: inline-block; }
small.wrong { color: var(--now); font-weight: 600; }
@media (max-width: 640px) { .row { grid-template-columns: minmax(0, 1fr); min-width: 0; } }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="note">{note}</p>
<div class="wide plain" tabindex="0" role="group" aria-label="Figures">{figures}</div>
<div class="wide">{rows}</div>
</main>
<script>
document.addEventListener('play', event => {{       // one at a time
    for (const audio of document.querySelectorAll('audio')) if (audio !== event.target) audio.pause();
}}, true);
</script>
</body>
</html>
"""
FIGURES = [('answers right of all', 'answer_accuracy'), ('response, median', 'response_median_ms'),
           ('false starts', 'false_start_rate'), ('pauses taken for the end', 'pause_taken_rate'),
           ('silent 10 frames after an interruption', 'user_acc_by_10')]


def hear(folder, data, references, device, user_waves):
    """-> of the checkpoint in folder a conversation (measures/turns.py) with each reference's user.
    user_waves: {id: wave}, those decoded so far."""
    checkpoint = load_checkpoint(folder, device)
    codec, layout = checkpoint.codec, checkpoint.layout
    check_codec(folder, codec.describe(), data)
    if layout.order != 'chunks' or not layout.period or not layout.has_speech_of('assistant'):
        raise ValueError(f'{folder} decodes in {layout.name}, in which the assistant does not speak chunk by '
                         'chunk: it has no conversation to be heard')
    decoded = replies.hear(checkpoint, references, [range(len(references))], dtype=pick_dtype('auto', device),
                           sampling=Sampling(text_weight=checkpoint.info.text_weight))
    heard = []
    for reference, dialogue in zip(references, decoded):
        if reference['id'] not in user_waves:
            user_waves[reference['id']] = codec.decode(np.asarray(reference['user']))
        wave = render(dialogue, codec, user_waves[reference['id']])
        heard.append(with_user_of(reference, dialogue, codec, layout.speech_chunk, wave))
    return heard


def is_right(turn):
    return bool(turn['said']) and not is_wrong(turn)


def lines(c, outcomes, has_text):
    """The transcript as items of a list; behind each turn stands what was found."""
    notes = {}      # (role, start of a turn) -> HTML
    for turn in outcomes:
        found = [mark[3] for mark in marks([turn], c['rate_hz'], has_text=False)]
        notes['user', turn['start']] = ''.join(f'<small>{html.escape(note)}</small>' for note in found)
        if turn['due'] and turn['said'] and has_text:
            wrong = f'<small class="wrong">✕ wrong, expected: {html.escape(turn["due"]["text"])}</small>'
            at = turn['said'][0]['start']
            notes['assistant', at] = '<small>✓ right</small>' if is_right(turn) else wrong
    for turn in sorted(c['turns'], key=START):
        yield (f'<li><b class="{turn["role"]}">{turn["role"]}</b> <span dir="auto">'
               f'{html.escape(turn["text"] or "(speech)")}</span>'
               f'{notes.get((turn["role"], turn["start"]), "")}</li>')


def cell(name, c, outcomes, has_text):
    """A conversation of the checkpoint called name."""
    bars = ''
    for role, y in zip(ROLES, (2, 12)):
        d = ''.join(f'M{a} {y}h{b - a}v8h{a - b}z' for a, b in stretches(c['speaks'][role], c['rate_hz']))
        bars += f'<path fill="var(--{role})" d="{d}"/>'
    sound, _ = mp3(c['wave'], c['sample_rate'])
    label = html.escape(f'{c["id"]}, {name}')
    return (f'<article aria-label="{label}"><h3>{html.escape(name)}</h3>'
            f'<svg viewBox="0 0 {c["n_frame"]} 22" preserveAspectRatio="none" aria-hidden="true">{bars}</svg>'
            f'<audio controls preload="metadata" aria-label="{label}" src="data:audio/mpeg;base64,{sound}">'
            f'</audio><ol>{"".join(lines(c, outcomes, has_text))}</ol></article>')


def compare(folders, outcomes, writes):
    """-> rows for report.table. Of each checkpoint: the outcomes of its conversations; does it write text"""
    due = [[turn for talk in talks for turn in talk if turn['due']] for talks in outcomes]
    counts = [f'{sum(map(is_right, turns))} of {len(turns)}' if has_text else 'no text'
              for turns, has_text in zip(due, writes)]
    rows = [('answers right below', *counts)]
    paths = [os.path.join(folder, 'evaluation', 'metrics.json') for folder in folders]
    found = [read_json(path) if os.path.isfile(path) else {} for path in paths]
    if any(found):
        rows.append(('evaluated by evaluate.py', *[''] * len(folders)))
    for label, key in FIGURES if any(found) else ():
        show = percent if not key.endswith('_ms') else '{:.0f} ms'.format
        values = [metrics.get(key) for metrics in found]
        rows.append((label, *('-' if value is None else show(value) for value in values)))
    return rows


def write(path, folders, talks, note):
    """talks: of each checkpoint in folders, its conversations, all with the same users in the same order"""
    outcomes = [list(map(assess, each)) for each in talks]
    writes = [any(part['text'] for talk in each for turn in talk for part in turn['said'])
              for each in outcomes]
    rows = []
    for i, first in enumerate(talks[0]):
        cells = ''.join(cell(folder, each[i], found[i], has_text)
                        for folder, each, found, has_text in zip(folders, talks, outcomes, writes))
        rows.append(f'<section class="row" style="--n:{len(folders)}">'
                    f'<h2>{html.escape(str(first["id"]))}</h2>{cells}</section>')
    style = re.search('<style>(.*?)</style>', template(), re.DOTALL)[1] + STYLE
    page = PAGE.format(title=html.escape(' · '.join(folders)), note=html.escape(note), style=style,
                       figures=table(compare(folders, outcomes, writes), folders), rows='\n'.join(rows))
    with whole(path) as part, open(part, 'w', **JSON_TEXT) as file:
        file.write(page)


def main():
    parser = Parser(prog='python -m measures.gallery', description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoints', nargs='+', help='folders that train.py wrote, such as out/demo')
    parser.add_argument('--data', default='data/demo')
    parser.add_argument('--split', default='test')
    parser.add_argument('--n_dialogue', type=int, default=8, help='the first so many that have two sides')
    parser.add_argument('--out', default='gallery.html')
    args = parser.parse_args()
    data, device, user_waves = Dialogues(args.data, args.split), pick_device('auto'), {}
    if args.n_dialogue < 1:
        raise ValueError(f'--n_dialogue={args.n_dialogue}: it has to be at least 1')
    two_sided = (i for i, (n_user, n_assistant) in enumerate(zip(*data.n_frame)) if n_user == n_assistant > 0)
    references = [data[i] for i in islice(two_sided, args.n_dialogue)]
    if not references:
        raise ValueError(f'{args.data} has no two-sided dialogue in {args.split}')
    talks = []
    for folder in args.checkpoints:
        print(f'{folder} listens to {len(references)} dialogues', flush=True)
        talks.append(hear(folder, data, references, device, user_waves))
    note = (f'{len(references)} dialogues of {args.data}, {args.split}: the user left, the assistant right. '
            'What evaluate.py found is of all the dialogues that it was given.')
    write(args.out, args.checkpoints, talks, note)
    print(f'look and listen: {args.out}, {os.path.getsize(args.out) / 1e6:.1f} MB')


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
