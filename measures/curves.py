"""
What a run measured on val over its steps, and which step is best by each: the loss, the answers, the turns.

    python train.py config/demo.py --batch_size=4 --select=answers --eval_interval=100 --out_dir=out/select
    python -m measures.curves out/select --svg=docs/select.svg

    | step | training | loss on val | answers right | turns dealt with well | response, mean |
    |  800 |    130 s | **0.019**   |       97.5 %  |            **93.8 %** |         126 ms |

Of the last stage only: losses of others do not compare. The figures are those that train.py writes to
log.jsonl where --eval_dialogues is above 0 (measures/best.py).
"""
import argparse
import math
import os
from html import escape

from common.files import whole
from measures.logger import read_log


def share(x):
    return f'{100 * x:.1f} %'


# key in log.jsonl -> what it is called, is less better, its unit as text
CURVES = {
    'loss': ('loss on val', True, '{:.4f}'.format),
    'answer_accuracy': ('answers right', False, share),
    'well_taken_rate': ('turns dealt with well', False, share),
    'response_ms': ('response, mean', True, '{:.0f} ms'.format)}
WIDTH, HEIGHT = 460, 210        # of a plot, in px
COLOURS = {'loss': '#b35900', 'answer_accuracy': '#1f6f8b', 'well_taken_rate': '#3a7d44',
           'response_ms': '#7a4b94'}
STYLE = ('svg{background:#fff;color:#222;font:13px sans-serif}text{fill:#222}.grid{stroke:#ddd}'
         '.best{fill:#fff;stroke-width:2.5}.line{fill:none;stroke-width:2}')


def read_evaluations(out_dir):
    """-> the rows of log.jsonl that are evaluations of the run's last stage. Raises ValueError if there are
    fewer than two."""
    rows = [row for row in read_log(os.path.join(out_dir, 'log.jsonl')) if row['kind'] == 'val']
    rows = [row for row in rows if row.get('stage') == rows[-1].get('stage')]
    rows = list({row['step']: row for row in rows if isinstance(row.get('loss'), float)}.values())
    if len(rows) < 2:
        raise ValueError(f'{out_dir}/log.jsonl has {len(rows)} evaluations of its last stage, and a curve '
                         'takes two: train with a smaller --eval_interval')
    return rows


def best_step(rows, key):
    """The step that --select would have kept: of equal ones that of the least loss."""
    is_less = CURVES[key][1]
    measured = [row for row in rows if isinstance(row.get(key), float)]
    return min(measured, key=lambda row: (row[key] if is_less else -row[key], row['loss']))['step']


def known(rows):
    """-> the keys of CURVES that were measured at all"""
    return [key for key in CURVES if any(isinstance(row.get(key), float) for row in rows)]


def table(rows):
    """-> Markdown, the best of each column in bold"""
    keys = known(rows)
    best = {key: best_step(rows, key) for key in keys}
    lines = ['| step | training | ' + ' | '.join(CURVES[key][0] for key in keys) + ' |',
             '|---:' * (len(keys) + 2) + '|']
    for row in rows:
        cells = [CURVES[key][2](row[key]) if isinstance(row.get(key), float) else '-' for key in keys]
        cells = [f'**{cell}**' if row['step'] == best[key] else cell for key, cell in zip(keys, cells)]
        lines.append(f'| {row["step"]} | {row["train_sec"]:.0f} s | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def plot(rows, key, top):
    """-> SVG of one curve, its best step marked; the loss on a logarithmic scale"""
    name, _, as_text = CURVES[key]
    points = [(row['step'], row[key]) for row in rows if isinstance(row.get(key), float)]
    scale = math.log if key == 'loss' else float
    low, high = (scale(bound(value for _, value in points)) for bound in (min, max))
    first, last = rows[0]['step'], rows[-1]['step']
    left, right, bottom, head = 70, WIDTH - 20, top + HEIGHT - 34, top + 34

    def at(step, value):
        x = left + (right - left) * (step - first) / (last - first)
        return x, bottom - (bottom - head) * (scale(value) - low) / ((high - low) or 1)

    best = best_step(rows, key)
    head_line = f'<tspan font-weight="bold">{escape(name)}</tspan>, best at step {best}'
    parts = [f'<text x="{left}" y="{top + 18}">{head_line}: {as_text(dict(points)[best])}</text>']
    for value in sorted({min(points, key=lambda p: p[1])[1], max(points, key=lambda p: p[1])[1]}):
        y = at(first, value)[1]
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>'
                     f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{as_text(value)}</text>')
    for step in (first, last):
        parts.append(f'<text x="{at(step, points[0][1])[0]:.1f}" y="{bottom + 18}" '
                     f'text-anchor="middle">{step}</text>')
    line = 'L'.join(f'{x:.1f} {y:.1f}' for x, y in (at(*point) for point in points))
    x, y = at(best, dict(points)[best])
    parts.append(f'<path class="line" stroke="{COLOURS[key]}" d="M{line}"/>'
                 f'<circle class="best" stroke="{COLOURS[key]}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    return ''.join(parts)


def svg(rows, title):
    keys = known(rows)
    plots = ''.join(plot(rows, key, 26 + i * HEIGHT) for i, key in enumerate(keys))
    height = 30 + HEIGHT * len(keys)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}"><style>{STYLE}</style><title>{escape(title)}</title>'
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>'
            f'<text x="12" y="20">{escape(title)}</text>{plots}</svg>\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', help='the folder of a run of train.py')
    parser.add_argument('--svg', help='a file for the picture')
    args = parser.parse_args()
    rows = read_evaluations(args.run)
    print(table(rows))
    if args.svg:
        with whole(args.svg) as part, open(part, 'w', encoding='utf-8') as file:
            file.write(svg(rows, f'{args.run}: val over the steps of {rows[0]["stage"]}'))
        print(f'\n{args.svg} is written')


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
