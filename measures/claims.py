"""
What each idea of the paper buys, tested on the demo: lines of training that differ in one thing, each with
several seeds, the same number of tokens and as many parameters. runs/claims.sh trains them.

    python -m measures.claims --list --steps=400            each line's name and settings, for runs/claims.sh
    python -m measures.claims out/claims --result=bench/results/claims.json

The second prints a table (mean ± standard deviation over the seeds) and what becomes of each claim:

    holds here          the line is better than the one it is compared with by more than twice the standard
                        error of the difference, in the figure that the claim is about
    does not hold       it is worse by as much
    cannot be told      anything between

Two standard errors of three seeds are a low bar: of twenty claims without a cause one would pass it.

pip install matplotlib      for --figure
"""
import argparse
import os
import re
from typing import NamedTuple

import numpy as np

from common.files import read_json, whole, write_json
from common.origin import describe_run
from config import Parser

ALIGNED = 'asr.user+tts.assistant:{a}'
DUPLEX = 'duplex3:{d}'          # what is left of the steps after the alignment
ADAMW = '--optimizer=adamw'     # Muon is for random weights only
# of every line, beside config/demo.py: the demo as it was when they were chosen
BASE = ('--n_layer=4 --n_head=3 --n_kv_head=1 --n_embd=192 --n_inner=512 --new_rows=spread '
        '--new_rows_scale=0.5')
# name -> the line's own settings. {s}: all steps, {a}: a fifth of them, {d}: four fifths, {h}: half of these,
# {r}: three fifths, {text}: a model that has read the dialogues, and has no rows for anything else
LINES = {
    'base':             f'--stages={ALIGNED},{DUPLEX}',
    'no alignment':     '--stages=duplex3:{s}',
    'half-duplex first': f'--stages={ALIGNED},half_duplex:{{a}},duplex3:{{r}}',
    'then two streams': f'--stages={ALIGNED},duplex3:{{h}},duplex2:{{h}}',
    'two streams alone': f'--stages={ALIGNED},duplex2:{{d}}',
    'chunks of 80 ms':  f'--stages={ALIGNED},{DUPLEX} --speech_chunk=2 --text_chunk=1',
    'chunks of 200 ms': f'--stages={ALIGNED},{DUPLEX} --speech_chunk=5 --text_chunk=1',
    'chunks of 800 ms': f'--stages={ALIGNED},{DUPLEX} --speech_chunk=20 --text_chunk=4',
    'text weighs 1':    f'--stages={ALIGNED},{DUPLEX} --text_weight=1',
    'user learned, too': f'--stages={ALIGNED},duplex3_user:{{d}}',
    'silence as codes': f'--stages={ALIGNED},duplex3_real:{{d}}',
    '2 wide layers':    f'--stages={ALIGNED},{DUPLEX} --n_layer=2 --n_embd=256 --n_head=4 --n_inner=808',
    '8 narrow layers':  f'--stages={ALIGNED},{DUPLEX} --n_layer=8 --n_embd=128 --n_head=2 --n_inner=384',
    'rows by the codec': f'--stages={ALIGNED},{DUPLEX} --new_rows=codec --new_rows_scale=3',
    'by AdamW':         f'--stages={ALIGNED},{DUPLEX} {ADAMW}',
    'from text, spread': f'--stages={ALIGNED},{DUPLEX} {ADAMW} --init_from={{text}}',
    'from text, words': f'--stages={ALIGNED},{DUPLEX} {ADAMW} --init_from={{text}} --new_rows=words',
    'from text, codec': f'--stages={ALIGNED},{DUPLEX} {ADAMW} --init_from={{text}} --new_rows=codec '
                        '--new_rows_scale=3',
    'from text, normal': f'--stages={ALIGNED},{DUPLEX} {ADAMW} --init_from={{text}} --new_rows=normal',
    'from text, zeros': f'--stages={ALIGNED},{DUPLEX} {ADAMW} --init_from={{text}} --new_rows=zeros',
}


class Claim(NamedTuple):
    says: str
    line: str
    against: str
    figure: str         # a key of FIGURES
    theirs: str         # the paper's own figures, where it has some


class Figure(NamedTuple):
    head: str
    form: str
    is_better: int      # 1: the higher, -1: the lower


FIGURES = {
    'spoken_accuracy':      Figure('spoken answer right', '{:.1%}', 1),
    'answer_accuracy':      Figure('written answer right', '{:.1%}', 1),
    'assistant_acc_by_10':  Figure('answers by 10 frames', '{:.1%}', 1),
    'response_ms':          Figure('response', '{:.0f} ms', -1),
    'false_start_rate':     Figure('false starts', '{:.1%}', -1),
    'pause_taken_rate':     Figure('pauses taken', '{:.1%}', -1),
    'user_acc_by_10':       Figure('yields by 10 frames', '{:.1%}', 1),
    'bits_per_sec':         Figure('bits a second', '{:.1f}', -1),
}
# theirs: OmniFlatten's scores of answers, 1 to 10 by a language model (v2, table 3, English)
CLAIMS = [
    Claim('Aligning speech and text first helps.', 'base', 'no alignment', 'spoken_accuracy',
          'holds: 3.89 against 2.99'),
    Claim('A half-duplex stage before the dialogue helps.', 'half-duplex first', 'base', 'spoken_accuracy',
          'holds: 4.88 against 3.89'),
    Claim('Three streams answer better than two that come after them.', 'base', 'then two streams',
          'spoken_accuracy', 'holds: 3.92 against 2.19 (as heard)'),
    Claim('Two streams need three before them.', 'then two streams', 'two streams alone', 'spoken_accuracy',
          'not compared'),
    Claim('Shorter chunks answer sooner (200 ms against 400).', 'chunks of 200 ms', 'base', 'response_ms',
          'holds (v1, table 3)'),
    Claim('Longer chunks yield by 10 frames more often (400 ms against 200).', 'base', 'chunks of 200 ms',
          'user_acc_by_10', 'holds (v1, table 3)'),
    Claim('… (800 ms against 400).', 'chunks of 800 ms', 'base', 'user_acc_by_10', 'holds (v1, table 3)'),
    Claim('Chunks of 400 ms answer better than those of 80.', 'base', 'chunks of 80 ms', 'spoken_accuracy',
          'not compared'),
    Claim('Text should weigh more than speech (5 against 1).', 'base', 'text weighs 1', 'spoken_accuracy',
          'not compared'),
    Claim("The user's channel is better not learned.", 'base', 'user learned, too', 'spoken_accuracy',
          'training is said to be steadier so (section 3.3)'),
    Claim('Silence is better one token than real codes.', 'base', 'silence as codes', 'spoken_accuracy',
          'not compared'),
    Claim('At equal compute 4 layers beat 2 wide ones.', 'base', '2 wide layers', 'spoken_accuracy',
          'not compared'),
    Claim('… and 8 narrow ones beat 4.', '8 narrow layers', 'base', 'spoken_accuracy', 'not compared'),
    Claim('Codes that are alike should start alike.', 'rows by the codec', 'base', 'spoken_accuracy',
          'does not say'),
    Claim('Muon learns more in as many steps than AdamW.', 'base', 'by AdamW', 'spoken_accuracy',
          'AdamW'),
    Claim('A model of text learns more than random weights.', 'from text, spread', 'by AdamW',
          'spoken_accuracy', 'starts from Qwen2-0.5B'),
    Claim('… where the codes meet a model of text.', 'from text, codec', 'from text, spread',
          'spoken_accuracy', 'does not say'),
    Claim('New rows are better spread as the old ones are than drawn from N(0, 0.02).', 'from text, spread',
          'from text, normal', 'spoken_accuracy', 'does not say'),
    Claim('… than zeros.', 'from text, spread', 'from text, zeros', 'spoken_accuracy', 'does not say'),
    Claim('Control tokens should start from words that describe them.', 'from text, words',
          'from text, spread', 'spoken_accuracy', 'does not say'),
]


def settings(steps):
    """{name: arguments of train.py} of all lines, for so many steps. TEXT stands for {text}."""
    a = steps // 5
    known = dict(s=steps, a=a, d=steps - a, r=steps - 2 * a, h=(steps - a) // 2, text='TEXT')
    return {name: f'{BASE} {line.format(**known)}' for name, line in LINES.items()}


def read_runs(folder):
    """FOLDER/NAME/SEED/evaluation/metrics.json -> {name: [metrics]} of those that are there"""
    runs, named = {}, {folder_name(name): name for name in LINES}
    for name in [*named, *sorted({*os.listdir(folder)} - {*named})]:
        at = os.path.join(folder, name)
        paths = [os.path.join(at, seed, 'evaluation', 'metrics.json')
                 for seed in (sorted(os.listdir(at)) if os.path.isdir(at) else ())]
        found = [flat(read_json(path)) for path in paths if os.path.exists(path)]
        if found:
            runs[named.get(name, name)] = found
    return runs


def folder_name(name):
    return re.sub(r'\W+', '_', name)


def flat(metrics):
    """The figures of one run; bits a second are those of the last layout."""
    return {key: metrics.get(key) for key in FIGURES} | dict(
        bits_per_sec=list(metrics['loss'].values())[-1]['bits_per_sec'])


def mean_and_deviation(runs, key):
    """-> mean and standard deviation over the seeds, the number of them; None where it was not measured"""
    values = [run[key] for run in runs if run.get(key) is not None]
    if not values:
        return None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, len(values)


def verdict(claim, runs):
    """-> 'holds here', … and by how much; None where a line is missing or has one seed"""
    both = [mean_and_deviation(runs.get(name, ()), claim.figure) for name in (claim.line, claim.against)]
    if None in both or min(n for *_, n in both) < 2:
        return None
    (here, s, n), (there, s_there, n_there) = both
    better = (here - there) * FIGURES[claim.figure].is_better
    error = (s ** 2 / n + s_there ** 2 / n_there) ** 0.5
    said = 'cannot be told' if abs(better) <= 2 * error else 'holds here' if better > 0 else 'does not hold'
    form = FIGURES[claim.figure].form
    return f'{said}: {form.format(here)} against {form.format(there)}'


def tables(runs):
    """-> the lines and the claims, in Markdown"""
    keys = [key for key in FIGURES if any(run.get(key) is not None for each in runs.values() for run in each)]
    rows = [['line', *(FIGURES[key].head for key in keys), 'seeds'], ['---', *['--:'] * (len(keys) + 1)]]
    for name, each in runs.items():
        cells = []
        for key in keys:
            found, form = mean_and_deviation(each, key), FIGURES[key].form
            spread = f' ± {form.format(found[1]).rstrip("% ms")}' if found and found[2] > 1 else ''
            cells.append(form.format(found[0]) + spread if found else '')
        rows.append([name, *cells, str(len(each))])
    claims = [['claim', 'here', 'the paper'], ['---'] * 3]
    for claim in CLAIMS:
        said = verdict(claim, runs)
        if said:
            claims.append([f'{claim.says} *{claim.line}* / *{claim.against}*', said, claim.theirs])
    parts = (rows, claims) if len(claims) > 2 else (rows,)
    return '\n\n'.join('\n'.join('| ' + ' | '.join(row) + ' |' for row in part) for part in parts)


def draw(runs, path):
    """A PNG: a dot for each seed, a line for the mean, of each figure"""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    keys = [key for key in ('spoken_accuracy', 'assistant_acc_by_10', 'response_ms', 'user_acc_by_10')
            if any(mean_and_deviation(each, key) for each in runs.values())]
    size = 2 + 2.8 * len(keys), 1.2 + 0.36 * len(runs)
    figure, axes = pyplot.subplots(1, len(keys), figsize=size, sharey=True, squeeze=False)
    for key, axis in zip(keys, axes[0]):
        for i, each in enumerate(runs.values()):
            values = [run[key] for run in each if run.get(key) is not None]
            axis.plot(values, [i] * len(values), 'o', color='#2a6f97', alpha=0.6, markersize=5)
            if values:
                axis.plot([np.mean(values)] * 2, [i - 0.3, i + 0.3], color='#d1495b', linewidth=2)
        if base := mean_and_deviation(runs.get('base', ()), key):
            axis.axvline(base[0], color='#999999', linewidth=0.8, linestyle=':')
        axis.set_title(FIGURES[key].head, fontsize=10)
        if FIGURES[key].form.endswith("%}"):
            axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        axis.tick_params(labelsize=8)
        axis.spines[['top', 'right']].set_visible(False)
    axes[0, 0].set_yticks(range(len(runs)), list(runs))
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    with whole(path) as part:
        figure.savefig(part, dpi=130, format='png')


def main():
    parser = Parser(prog='python -m measures.claims', description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', help='where runs/claims.sh left its runs')
    parser.add_argument('--list', action='store_true', help='print the lines instead: name, folder, settings')
    parser.add_argument('--steps', type=int, default=400, help='of training, for --list')
    parser.add_argument('--result', help='a JSON file for the figures of every run')
    parser.add_argument('--figure', help='a PNG to draw')
    args = parser.parse_args()
    if args.list:
        for name, line in settings(args.steps).items():
            print(f'{folder_name(name)} {line}')
        return
    if not args.folder or not (runs := read_runs(args.folder)):
        raise ValueError(f'{args.folder or "no folder given"}: no run there that evaluate.py has measured '
                         '(runs/claims.sh makes them)')
    print(tables(runs))
    if args.result:
        write_json(args.result, dict(origin=describe_run(), runs=runs))
    if args.figure:
        draw(runs, args.figure)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error))
