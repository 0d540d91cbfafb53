"""The README is true: its commands parse, its table of files is the tree, its layouts are those of
flatten.py."""
import json
import pathlib
import re
import shlex
import textwrap

import pytest

import config
import evaluate
import sample
import train
from data import simulate
from flatten import LAYOUTS

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
COMMANDS = re.findall(r'python3? ((?:train|sample|evaluate)\.py [^`#\n]*)', README + ''.join(
    path.read_text() for path in [ROOT / 'Makefile', *sorted((ROOT / 'config').glob('*.py'))]))
SCRIPTS = {'train.py': train, 'sample.py': sample, 'evaluate.py': evaluate}


@pytest.mark.parametrize('command', sorted(set(COMMANDS)))
def test_commands_parse(command, monkeypatch):
    """Each train, sample and evaluate line of README, Makefile and configs: files exist, settings are known
    and typed."""
    monkeypatch.chdir(ROOT)
    script, *arguments = shlex.split(command.split('&&')[0])
    if '--help' not in arguments:
        config.load(SCRIPTS[script].Config, arguments)


@pytest.mark.parametrize('batch_size, n_rank', [(None, 1), (4, 1), (None, 2)])
def test_the_demos_batches_divide(batch_size, n_rank):
    """Alone, with --batch_size=4, and under torchrun on two."""
    cfg = config.load(train.Config, [str(ROOT / 'config/demo.py')] +
                      ([f'--batch_size={batch_size}'] if batch_size else []))
    assert cfg.batch_tokens % (cfg.batch_size * cfg.block_size * n_rank) == 0


def test_there_are_commands():
    assert len(set(COMMANDS)) >= 8


def test_table_of_files(regen):
    """Line counts are those of wc -l; pytest --regen writes them."""
    path, readme = ROOT / 'README.md', README
    rows = re.findall(r'^\| `([\w/.]+\.py)` \| +(\d+) \|', readme, re.M)
    assert {name for name, _ in rows} >= {path.name for path in ROOT.glob('*.py')}
    for name, n in rows:
        n_line = len((ROOT / name).read_text(encoding='utf-8').splitlines())
        if regen:
            readme = re.sub(rf'^\| `{name}` \| +\d+ \|', f'| `{name}` | {n_line} |', readme, flags=re.M)
        else:
            assert int(
                n
            ) == n_line, f'{name} has {n_line} lines, the README says {n}: pytest --regen tests/test_readme.py'
    if regen:
        path.write_text(readme, encoding='utf-8')


@pytest.mark.skipif(not (ROOT.parent / 'shared/data/text').is_dir(), reason='no ../shared/data/text')
def test_table_of_what_can_be_spoken():
    """The figures are those that data/simulate.py --check prints."""
    files = ['belle_eval_set.jsonl', 'fastchat_dummy.json', 'lccc_toy.json', 'oasst_en_100_tree.jsonl']
    args = simulate.arguments(
    ).parse_args(['--out=', '--codec=', *(str(ROOT.parent / 'shared/data/text' / name) for name in files)])
    _, table, _ = simulate.collect(args.files, args)
    columns = ['dialogues', 'whole', 'part', *simulate.REASONS, 'script', 'symbols', 'long', 'empty']
    rows = re.findall(r"^\| (?:BELLE's|FastChat's|LCCC's|OASST,|all).*?\|((?: \d+ \|)+)$", README, re.M)
    rows = [[int(cell) for cell in row.split('|')[:-1]] for row in rows]
    assert rows[:4] == [[counts[column] for column in columns] for counts in table.values()]
    assert rows[4] == [sum(column) for column in zip(*rows[:4])]


def test_ratios():
    """Those of the efficiency table are in the file that python bench.py --cpu wrote."""
    figures = json.loads((ROOT / 'bench/results/cpu.json').read_text())['figures']
    section = README[README.index('## Efficiency'):README.index('## Use your own')]
    ratios = [f'{figure["median"]:.3g} x' for figure in figures if figure['unit'] == 'x']
    assert len(ratios) >= 8 and sorted(ratios) == sorted(re.findall(r'[\d.]+ x(?= \|)', section))


def test_the_demos_table():
    """It is what evaluate.py printed of bench/results/demo.json, which make demo left in
    out/demo/evaluation/metrics.json."""
    printed = evaluate.format_table(evaluate.table(json.loads((ROOT / 'bench/results/demo.json').read_text())))
    assert textwrap.indent(printed, '    ') in README


def test_layouts():
    text = ' '.join(README.split())
    for _, streams in LAYOUTS.values():
        for stream in [streams] if isinstance(streams, str) else streams.values():
            assert ' '.join(stream.split()) in text
