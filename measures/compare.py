"""
Runs of different layouts, side by side, from what evaluate.py measured of each (runs/layouts.sh).

    python -m measures.compare out/layouts/* --write=docs/layouts.md

    bits a second       of conversation: what the model could not foresee of what it learns, by its loss on
                        test. A layout that learns more has more of them
    tokens a second     of conversation, in documents
    answers right       the text is the reference's. By turns the model is told where the user's turn ends; on
                        the clock it has to find that itself
    response            from the end of the user's turn, on the clock only
    interruptions       that a layout with a state says within a second
"""
import argparse
import os
import re

from common.files import read_json, whole
from config import Parser
from layouts import LAYOUTS


def row(folder):
    """What evaluate.py measured of a run -> its cells"""
    path = os.path.join(folder, 'evaluation', 'metrics.json')
    metrics = read_json(path)
    name, loss = list(metrics['loss'].items())[-1]

    def cell(key, form):
        value = metrics.get(key)
        return '' if value is None else form.format(value)
    heard = metrics.get('heard_wer', metrics.get('asr_user_wer'))
    return [f'`{name}`', f'{loss["bits_per_sec"]:.1f}', f'{metrics["tokens_per_sec"][name]:.0f}',
            cell('answer_accuracy', '{:.0%}'), '' if heard is None else f'{heard:.0%}',
            cell('response_ms', '{:.0f} ms'), cell('stop_found_rate', '{:.0%}')]


HEAD = ['layout', 'bits a second', 'tokens a second', 'answers right', "user's words wrong", 'response',
        'interruptions heard']


def table(folders):
    rows = sorted((row(folder) for folder in folders),
                  key=lambda cells: list(LAYOUTS).index(cells[0].strip('`').split('.')[0]))
    lines = [HEAD, ['---', *['--:'] * (len(HEAD) - 1)], *rows]
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines)


def main():
    parser = Parser(prog='python -m measures.compare', description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', help='runs that evaluate.py has measured')
    parser.add_argument('--write', help='a Markdown file, whose table of layouts is replaced')
    args = parser.parse_args()
    printed = table(args.folders)
    print(printed)
    if args.write:
        with open(args.write, encoding='utf-8') as file:
            text = file.read()
        pattern = r'^\| layout \|.*?(?=\n\n|\n?\Z)'
        if not re.search(pattern, text, re.M | re.S):
            raise ValueError(f'{args.write} has no table that begins with "| layout |"')
        with whole(args.write) as part, open(part, 'w', encoding='utf-8') as file:
            file.write(re.sub(pattern, lambda _: printed, text, flags=re.M | re.S))


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error))
