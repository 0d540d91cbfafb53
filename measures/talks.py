"""
What talk.py --user measured of live conversations, as a table (runs/talk.sh, runs/chunks.sh).

    python -m measures.talks out/talk/1/user.json out/talk/4/user.json --write=bench/results/talk.json
    python -m measures.talks out/chunks/80_ms out/chunks/200_ms --write=bench/results/chunks.json

A folder is a run with evaluate.py's figures beside those of talk/user.json: a row says what a chunk's length
does to what the model says, and to when it is heard.
"""
import argparse
import os

import numpy as np

from common.files import read_json, write_json
from common.origin import describe_run


def summarise(talks):
    """
    talks: of each talker response_ms, yield_ms, late_ms (lists), drift_ms, n_glitch, dropped_ms, n_turn,
    n_false_start -> the same of all: of a list median, p90, max and n, of drift the largest, else the sum
    """
    def spread(values):
        return dict(median=float(np.median(values)), p90=float(np.percentile(values, 90)),
                    max=float(max(values)), n=len(values)) if values else None
    figures = {key: spread([value for talk in talks for value in talk[key]])
               for key in ('response_ms', 'yield_ms', 'late_ms')}
    drifts = [talk['drift_ms'] for talk in talks if talk['drift_ms'] is not None]
    sums = {key: sum(talk[key] for talk in talks)
            for key in ('n_glitch', 'dropped_ms', 'n_turn', 'n_false_start')}
    return figures | dict(drift_ms=max(drifts, key=abs, default=None)) | sums


def cell(spread, which):
    return f'{spread[which]:.0f} ms' if spread else '-'


def talk_row(talk):
    late, by = talk['late_ms'], talk.get('browser', '')
    return {
        'talkers, time': f'{talk["n_user"]}, {talk["sec"]:.0f} s' + (by and f', {by}'),
        'question to first sound': cell(talk['response_ms'], 'median'),
        '90 % within': cell(talk['response_ms'], 'p90'),
        'interruption to silence': cell(talk['yield_ms'], 'median'),
        '90 % within ': cell(talk['yield_ms'], 'p90'),
        'parts after their chunk, at most': late and f'{late["median"]:.0f}, {late["max"]:.0f} ms' or '-',
        'drift': '-' if talk['drift_ms'] is None else f'{round(talk["drift_ms"])} ms',
        'glitches': str(talk['n_glitch']),
        'false starts': f'{talk["n_false_start"]} of {talk["n_turn"]}',
        'dropped': f'{talk["dropped_ms"]} ms'}


def chunk_row(run):
    def share(key):
        return '-' if run[key] is None else f'{100 * run[key]:.1f} %'
    talk, response_ms = run['talk'], run['response_ms']
    return {
        'chunk': f'{talk["chunk_ms"]} ms',
        'answers right': share('answer_accuracy'),
        'response, the model alone': '-' if response_ms is None else f'{response_ms:.0f} ms',
        'false starts': share('false_start_rate'),
        'question to first sound': cell(talk['response_ms'], 'median'),
        '90 % within': cell(talk['response_ms'], 'p90'),
        'interruption to silence': cell(talk['yield_ms'], 'median'),
        '90 % within ': cell(talk['yield_ms'], 'p90'),
        'glitches': str(talk['n_glitch'])}


def read(path):
    """What talk.py wrote, or a run -> dict"""
    if not os.path.isdir(path):
        return read_json(path)
    metrics = read_json(os.path.join(path, 'evaluation', 'metrics.json'))
    keys = 'answer_accuracy', 'n_answer', 'response_ms', 'false_start_rate', 'n_turn', 'train_steps'
    kept = {key: metrics.get(key) for key in keys}      # a model that says nothing has no answer_accuracy
    return kept | dict(talk=read_json(os.path.join(path, 'talk', 'user.json')))


def table(results):
    rows = [chunk_row(each) if 'talk' in each else talk_row(each) for each in results]
    lines = [rows[0].keys(), ['---:'] * len(rows[0]), *(row.values() for row in rows)]
    return '\n'.join('| ' + ' | '.join(text.strip() for text in cells) + ' |' for cells in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='+', help='files that talk.py wrote, or runs that hold talk/user.json')
    parser.add_argument('--write', help='a JSON file for the figures')
    args = parser.parse_args()
    results = [read(path) for path in args.paths]
    print(table(results))
    if args.write:
        write_json(args.write, dict(origin=describe_run(), results=results))


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
