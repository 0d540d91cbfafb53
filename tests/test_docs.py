"""
README and docs/ are true: commands parse, figures are those that a command printed, tables and drawings are
those of the code. pytest --regen tests/test_docs.py writes line counts and figures anew (after make demo, or
python bench.py --cpu).
"""
import argparse
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pytest
from conftest import ROOT

import config
import evaluate
import grpo
import hub
import sample
import talk
import train
from data import simulate, texts
from data.dialogues import SCHEMA
from flatten import LAYOUTS, Letters, draw, flatten, get_layout, unflatten
from measures import claims, full_duplex_bench, talks, voices

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
README, FORMAT, EVALUATION, PERFORMANCE, CORPORA = ((ROOT / name).read_text(encoding='utf-8') for name in (
    'README.md', 'docs/format.md', 'docs/evaluation.md', 'docs/performance.md', 'docs/corpora.md'))
DEMO = json.loads((ROOT / 'bench/results/demo.json').read_text())
VOICES = json.loads((ROOT / 'bench/results/voices.json').read_text())
CUDA_DEMO = json.loads((ROOT / 'bench/results/cuda_demo.json').read_text())
TALKS = json.loads((ROOT / 'bench/results/talk.json').read_text())
BENCH = json.loads((ROOT / 'bench/results/cpu.json').read_text())
GPU = json.loads((ROOT / 'bench/results/cuda.json').read_text())
GPU_ROWS, GPU_USERS = (json.loads((ROOT / f'bench/results/cuda_{name}.json').read_text())
                       for name in ('rows', 'users'))
GPU_HEAD = json.loads((ROOT / 'bench/results/cuda_head.json').read_text())
PROGRAM = r'(?:torchrun|python3?|make|pytest)'
SETTINGS = {'train.py': train.Config, 'sample.py': sample.Config, 'evaluate.py': evaluate.Config,
            'talk.py': talk.Config, 'grpo.py': grpo.Config, 'hub.py': hub.Config}


# ------------------------------------------------------------------------------------------------------------
# commands

def commands():
    """(where, words) of each line that runs one of our programs: in the pages, the Makefile and the
    configs."""
    for path in [*PAGES, ROOT / 'Makefile', *(ROOT / 'config').glob('*.py')]:
        text = path.read_text(encoding='utf-8').replace('$(BIN)/', '')
        lines = re.findall(rf'^(?:#? {{2,}}|\t)({PROGRAM} .*)$', text, re.M)
        mentions = re.findall(rf'`({PROGRAM} [^`\n]*)`', text)
        for line in lines + [mention for mention in mentions if not mention.startswith('python -m')]:
            for command in re.split(r'&& | \| ', line.split(' #')[0]):
                is_ours = re.match(PROGRAM, command) and not re.match(r'python -m (pytest|venv|pip)', command)
                if is_ours and '…' not in command:
                    yield path.relative_to(ROOT), command.strip()


COMMANDS = sorted({(str(where), command) for where, command in commands()})


class Parsed(Exception):
    pass


@pytest.mark.parametrize('where, command', COMMANDS)
def test_commands_parse(where, command, monkeypatch):
    """Files exist, settings are known and typed, options are the script's own. Nothing is run."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] == 'make':
        assert all(f'\n{target}:' in (ROOT / 'Makefile').read_text() for target in words[1:]), command
        return
    if words[0] == 'pytest':
        assert all((ROOT / word).exists() for word in words[1:] if word.startswith('tests/')), command
        return
    launcher = r'--standalone|-m|--nproc_per_node=\d|--max_restarts=\d'
    words = [word for word in words[1:] if not re.fullmatch(launcher, word)]
    script, *arguments = words[:words.index('>')] if '>' in words else words
    if '--help' in arguments:
        return
    if script in SETTINGS:
        config.load(SETTINGS[script], arguments)
        return
    real = argparse.ArgumentParser.parse_args

    def parse(self, *given):
        real(self, *given)
        raise Parsed
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse)
    monkeypatch.setattr(sys, 'argv', [script, *arguments])
    with pytest.raises(Parsed):
        if script.endswith('.py'):
            runpy.run_path(script, run_name='__main__')
        elif importlib.util.find_spec(script).submodule_search_locations:
            runpy.run_module(f'{script}.__main__', run_name='__main__')
        else:
            runpy.run_module(script, run_name='__main__')


def test_there_are_commands():
    assert len(COMMANDS) >= 40
    assert {where for where, _ in COMMANDS} >= {'README.md', 'docs/corpora.md', 'Makefile', 'config/demo.py'}


@pytest.mark.parametrize('batch_size, n_rank', [(None, 1), (4, 1), (None, 2)])
def test_the_demos_batches_divide(batch_size, n_rank):
    """Alone, with --batch_size=4, and under torchrun on two."""
    more = [f'--batch_size={batch_size}'] if batch_size else []
    cfg = config.load(train.Config, [str(ROOT / 'config/demo.py'), *more])
    assert cfg.batch_tokens % (cfg.batch_size * cfg.block_size * n_rank) == 0


# ------------------------------------------------------------------------------------------------------------
# a stranger's walk

def record(folder, n_talk):
    """Made-up recordings in the README's form: a stereo wav, the assistant left, and the times of its
    words."""
    import soundfile

    from data.tts import SAMPLE_RATE, Espeak
    espeak, rows = Espeak(), []
    os.makedirs(folder / 'talks')
    for i in range(n_talk):
        wave, alignments, at = np.zeros((12 * SAMPLE_RATE, 2), np.float32), [], SAMPLE_RATE // 2
        for channel, speaker, voice, text in ((1, 'USER', 'linda', f'What comes after {i + 1}?'),
                                              (0, 'SPEAKER_MAIN', 'Andy', f'After {i + 1} comes {i + 2}.')):
            said, words, _ = espeak.say(text, voice)
            wave[at:at + len(said), channel] = 0.5 * said
            starts = [at + start for _, start in words] + [at + len(said)]
            for (word, _), start, end in zip(words, starts, starts[1:]):
                alignments.append([word, [start / SAMPLE_RATE, end / SAMPLE_RATE], speaker])
            at += len(said) + SAMPLE_RATE // 4
        soundfile.write(folder / 'talks' / f'{i}.wav', wave, SAMPLE_RATE)
        (folder / 'talks' / f'{i}.json').write_text(json.dumps(dict(alignments=alignments)))
        rows.append(json.dumps(dict(path=f'talks/{i}.wav', duration=12.0)))
    (folder / 'data.jsonl').write_text('\n'.join(rows))


def walk():
    """The README's five lines."""
    return re.search(r'<!-- walk.*?-->\n\n((?:    .*\n)+)', README)[1].strip().split('\n')


def test_the_walk_has_five_commands():
    assert len(walk()) == 5


@pytest.mark.slow
def test_the_walk(tmp_path):
    """Lines 2 to 5 as they stand in the README, in a folder beside a copy of the code: with smaller data and
    fewer steps, as the lines are the same for any. The first, make install, is how these tests came to
    run."""
    pytest.importorskip('espeakng_loader')
    files = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True,
                           text=True)
    for name in files.stdout.split():
        if (ROOT / name).is_file():
            os.makedirs((tmp_path / name).parent, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    record(tmp_path / 'recordings', 8)
    fewer_steps = ['--stages=duplex3:20', '--warmup_steps=5', '--eval_interval=20', '--log_interval=20']
    smaller = {'data/demo/prepare.py': ['--n_dialogue=64', '--n_clip=200'],
               'train.py': fewer_steps}
    for line in walk()[1:]:
        _, script, *arguments = shlex.split(line)
        done = subprocess.run([sys.executable, script, *arguments, *smaller.get(script, [])], cwd=tmp_path,
                              env=dict(os.environ, PYTHONPATH=str(tmp_path)), capture_output=True, text=True)
        assert done.returncode == 0, f'{line}\n{done.stdout}{done.stderr}'
    assert len(list((tmp_path / 'out/mine/samples').glob('*.wav'))) == 1        # one of eight is for testing


# ------------------------------------------------------------------------------------------------------------
# language

def prose(text):
    """Without code, tables, comments and links."""
    text = re.sub(r'<!--.*?-->', '', text, flags=re.S)
    lines = [line for line in text.split('\n') if not re.match(r'    |\||#|!', line)]
    return re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', '\n'.join(lines))


def test_the_readme_is_finished_in_one_go():
    sentences = re.split(r'(?<=[.?!])\s+', prose(README))
    n_word = [len(sentence.split()) for sentence in sentences if len(sentence.split()) > 2]
    assert len(README.split()) <= 2000 and statistics.median(n_word) <= 18


def test_a_clone_is_enough():
    patterns = '*.py', '*/*.py', 'data/*/*.py', 'runs/*', 'config/*', 'Makefile'
    paths = [*PAGES, *(path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())]
    for path in paths:
        text = path.read_text(encoding='utf-8')
        if path.parent.name != 'tests':
            assert 'shared/' not in text and 'design.md' not in text, path


# ------------------------------------------------------------------------------------------------------------
# figures

def put(page, old, new, regen):
    """old is to be new in a page: --regen writes it."""
    assert old.strip(), f'{page}: there is no place for {new!r}'
    if regen:
        path = ROOT / page
        path.write_text(path.read_text(encoding='utf-8').replace(old, new), encoding='utf-8')
    else:
        assert old == new, f'{page} says {old!r}, it is {new!r}: pytest --regen tests/test_docs.py'


def printed(text, name):
    """What stands between <!-- printed: name --> and <!-- end -->."""
    return re.search(rf'<!-- printed: {name} -->\n(.*?)<!-- end -->', text, re.S)[1]


def test_table_of_files(regen):
    """Every file of ours that is no script of a corpus has its row in docs/files.md, with the lines that
    wc -l counts; README.md has some of them."""
    folders = ('.', 'common', 'codec', 'data', 'measures', 'live')
    there = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).glob('*.py')}
    for name, is_whole in (('README.md', False), ('docs/files.md', True)):
        text = (ROOT / name).read_text(encoding='utf-8')
        rows = dict(re.findall(r'^\| `([\w/.]+\.py)` \| +(\d+) \|', text, re.M))
        listed = there - {'codec/__main__.py'} | {'config/__init__.py'}
        assert rows.keys() == listed if is_whole else len(rows) > 8 and rows.keys() <= listed
        for file, n in rows.items():
            n_line = len((ROOT / file).read_text(encoding='utf-8').splitlines())
            put(name, f'| `{file}` | {n} |', f'| `{file}` | {n_line} |', regen)


RESULTS = {'answers that are right': 'answer_accuracy',
           'assistant takes the turn within 10 frames': 'assistant_acc_by_10',
           '… response, mean': 'response_ms', '… false starts': 'false_start_rate',
           'interrupted, it is silent within 10 frames': 'user_acc_by_10',
           '… within 25 frames': 'user_acc_by_25'}


def test_results(regen):
    """The README's are those of bench/results/demo.json, which is out/demo/evaluation/metrics.json of make
    demo."""
    for label, key in RESULTS.items():
        row = re.search(rf'^\| {re.escape(label)} \| (.*?) \|', README, re.M)
        put('README.md', row[0], f'| {label} | {evaluate.format_value(key, DEMO[key])} |', regen)
    row = re.search(r'^\| training \| (.*?) \|', README, re.M)
    put('README.md', row[0], f'| training | {DEMO["train_sec"]:.0f} s |', regen)
    heard, = (talk['response_ms']['median'] for talk in TALKS['results'] if talk.get('browser'))
    row = re.search(r'^\| … heard in Chromium, median \| (.*?) \|', README, re.M)
    put('README.md', row[0], f'| … heard in Chromium, median | {heard:.0f} ms |', regen)
    people, label = VOICES['voices']['people, all'], 'asked by voices of people; in a room'
    row = re.search(rf'^\| … {label} \| (.*?) \|', README, re.M)
    right = '; '.join(f'{100 * people[where]["right"]:.1f} %' for where in ('clean', 'room'))
    put('README.md', row[0], f'| … {label} | {right} |', regen)
    put('docs/evaluation.md', printed(EVALUATION, 'voices'), f'\n{voices.table(VOICES["voices"])}\n\n', regen)
    table = textwrap.indent(evaluate.format_table(evaluate.table(DEMO)), '    ')
    put('docs/evaluation.md', printed(EVALUATION, 'demo'), f'\n{table}\n\n', regen)
    table = full_duplex_bench.table(DEMO.get('full_duplex_bench', []))
    table = textwrap.indent(table, '    ') if table else 'Not measured yet.'
    old = printed(EVALUATION, 'full_duplex_bench')
    put('docs/evaluation.md', f'full_duplex_bench -->\n{old}', f'full_duplex_bench -->\n\n{table}\n\n', regen)


def reader(*results):
    """-> value(row, name), which is text: a figure that bench.py printed, the first of that name"""
    figures = {}
    for figure in (figure for result in results for figure in result['figures']):
        figures.setdefault((figure['row'], figure['name']), figure)

    def value(row, name):
        figure = figures[row, name]
        x = figure['median']
        return f'{x:,.0f} {figure["unit"]}' if abs(x) >= 1000 else f'{x:.3g} {figure["unit"]}'
    return value


def gpu_table():
    """What python bench.py, and --peers, printed on a GPU."""
    value, head = reader(GPU, GPU_USERS, GPU_ROWS), partial(reader(GPU_HEAD), 'head')
    ours = 'ours, chunk 4096'
    rows = [['', '', ''], ['---'] * 3]
    assert GPU_HEAD['versions']['trl'].startswith('1.16.')      # as the table says, and this:
    assert '17873 learned rows out of 32768' in str(GPU_HEAD['figures'])
    for row, mix, label in (('duplex8192', 'T=8192, duplex3', 'rows of 8,192: dialogues of a minute'),
                            ('rows1024', 'T=1024, all rows', 'rows of 1,024: synthesis'),
                            ('half', 'T=1024, half', 'rows of 1,024: half recognition, half synthesis')):
        rate, mfu, memory = (value(row, f'ours, {mix}{part}') for part in ('', ', MFU', ', memory'))
        rows.append([f'training, {label}', rate, f'{mfu} MFU, {memory}'])
    rows.append(['… waiting for the loader', value(row, f'ours, {mix}, loader wait'), ''])
    rows.append(['head and loss, forward and backward, of 32,768 tokens, 17,873 of them learned', head(ours),
                 head(f'{ours}, memory')])
    for name, label in (('full logits', 'full logits'), ('TRL', "TRL 1.16's loss")):
        times = f'{head(name)}, {head(f"{name} / {ours}")} as long'
        rows.append([f'… {label}', times, head(f'{name}, memory')])
    for n in (1, 64):
        sec, rate = (value(f'decode{n}', f'ours, batch {n}: {what}') for what in ('a chunk', 'real time'))
        rows.append([f'a chunk of duplex3, 400 ms, for {n} at once', sec, f'{rate} real time'])
    rows.append(['… for 512 at once', value('users', '512 users: a chunk'), ''])
    largest = value('ceilings', 'matmul 8192 x 8192 x 8192')
    rows.append(['for comparison: the largest matmul, and a copy', largest, value('ceilings', 'copy')])
    return '\n' + ''.join(f'| {" | ".join(row)} |\n' for row in rows) + '\n'


def bench_table():
    """The ratios that python bench.py --cpu printed, and what they are made of."""
    value = reader(BENCH)
    # label, row, ours, theirs, their ratio
    rows = [
        ("training step, 2 layers of Qwen2-0.5B's width, 1,024 tokens of duplex3, beside full logits", 'step',
         'ours, 1024 tokens', 'full, 1024 tokens', 'full logits / ours, time'),
        ('… extra memory at 4,096 tokens, gradients included', 'step', 'ours, 4096 tokens, extra memory',
         'full, 4096 tokens, extra memory', 'ours / full logits, extra memory'),
        ('attention, 1,024 tokens in 4 documents, beside a dense mask', 'attention',
         'by_document, 1 x 1024, 4 documents a row', 'dense, 1 x 1024, 4 documents a row',
         'dense mask / ours, T=1024'),
        ('… 4,096 tokens in 3 documents', 'attention', 'by_document, 1 x 4096, 3 documents a row',
         'dense, 1 x 4096, 3 documents a row', 'dense mask / ours, T=4096'),
        ("the demo's training, beside transformers' Trainer", 'demo', 'ours', 'HF Trainer',
         'HF Trainer / ours, time'),
    ]
    for n in (1, 8):
        theirs = f'HF DynamicCache, batch {n}: a chunk'
        label = f"a chunk of Qwen2-0.5B's shape, batch {n}, bf16, beside transformers in bf16"
        rows.append((label, f'decode{n}', f'ours, batch {n}: a chunk', theirs,
                     f'HF DynamicCache / ours, batch {n}'))
        rows.append(('… int8', f'decode{n}', f'ours, int8, batch {n}: a chunk', theirs,
                     f'HF DynamicCache / ours, int8, batch {n}'))
    lines = ['| | ours | beside it | ratio |', '|---|---|---|---|']
    for label, row, *names in rows:
        lines.append(f'| {label} | ' + ' | '.join(value(row, name) for name in names) + ' |')
    for name in ('asr_1024', 'dialogue_8192'):
        waste = value('packing', f'{name}: waste, 4096 at once')
        rates = 'flatten, pack, index', 'later epochs'
        first, later = (value('packing', f'{name}: {rate}') for rate in rates)
        lines.append(f'| {name}: padding, 4,096 documents at a time | {waste} | | |')
        lines.append(f'| {name}: flatten, pack and index, first epoch / later | {first} / {later} | | |')
    return '\n' + '\n'.join(lines) + '\n\n'


def test_performance(regen):
    put('docs/performance.md', printed(PERFORMANCE, 'bench'), bench_table(), regen)
    put('docs/performance.md', printed(PERFORMANCE, 'gpu'), gpu_table(), regen)
    row = re.search(r'that took \d+ s, .*? by frame 10', PERFORMANCE)
    right, silent = (f'{100 * CUDA_DEMO[share]:.1f} % of {CUDA_DEMO[n]}' for share, n in (
        ('answer_accuracy', 'n_answer'), ('user_acc_by_10', 'n_interruption')))
    put('docs/performance.md', row[0], f'that took {CUDA_DEMO["train_sec"]:.0f} s, compiling included '
        f'(`bench/results/cuda_demo.json`): {right} answers are right, {silent} interruptions silent '
        'by frame 10', regen)
    row = re.search(r'`make demo` trains in \d+ s', PERFORMANCE)
    put('docs/performance.md', row[0], f'`make demo` trains in {DEMO["train_sec"]:.0f} s', regen)


@pytest.mark.parametrize('name', ['talk', 'chunks', 'cuda_talk'])
def test_live_figures(name, regen):
    """Those of bench/results/, which runs/talk.sh and runs/chunks.sh wrote, and talk.py on a GPU."""
    text, path = (ROOT / 'docs/talk.md').read_text(encoding='utf-8'), ROOT / f'bench/results/{name}.json'
    there = talks.table(json.loads(path.read_text())['results']) if path.exists() else 'Not measured yet.'
    old = printed(text, name)
    put('docs/talk.md', f'<!-- printed: {name} -->\n{old}', f'<!-- printed: {name} -->\n\n{there}\n\n', regen)


@pytest.mark.parametrize('name', ['claims', 'turns'])
def test_claims(name, regen):
    """Those of bench/results/, which runs/claims.sh and runs/turns.sh wrote."""
    text, path = (ROOT / 'docs/claims.md').read_text(encoding='utf-8'), ROOT / f'bench/results/{name}.json'
    there = claims.tables(json.loads(path.read_text())['runs']) if path.exists() else 'Not measured yet.'
    head = f'<!-- printed: {name} -->\n'
    put('docs/claims.md', head + printed(text, name), f'{head}\n{there}\n\n', regen)


@pytest.mark.skipif(not (ROOT.parent / 'shared/data/text').is_dir(), reason='no ../shared/data/text')
def test_table_of_what_can_be_spoken():
    """The figures are those that data/simulate.py --check prints."""
    files = ['belle_eval_set.jsonl', 'fastchat_dummy.json', 'lccc_toy.json', 'oasst_en_100_tree.jsonl']
    paths = [str(ROOT.parent / 'shared/data/text' / name) for name in files]
    args = simulate.arguments().parse_args(['--out=', '--codec=', *paths])
    _, table, _ = texts.collect(args.files, args)
    columns = ['dialogues', 'whole', 'part', *texts.REASONS, 'script', 'symbols', 'long', 'empty']
    rows = re.findall(r"^\| (?:BELLE's|FastChat's|LCCC's|OASST,|all).*?\|((?: \d+ \|)+)$", CORPORA, re.M)
    rows = [[int(cell) for cell in row.split('|')[:-1]] for row in rows]
    assert rows[:4] == [[counts[column] for column in columns] for counts in table.values()]
    assert rows[4] == [sum(column) for column in zip(*rows[:4])]


# ------------------------------------------------------------------------------------------------------------
# tables and drawings of the code

def test_record():
    """docs/format.md has every field of the record, and of a turn."""
    turn = SCHEMA.field('turns').type.value_type
    names = [*SCHEMA.names, *(turn.field(i).name for i in range(turn.num_fields))]
    rows = re.findall(r'^\| ([\w, ]+) \|', FORMAT, re.M)
    assert set(names) <= {name.strip() for row in rows for name in row.split(',')}


def test_layouts():
    """As declared, and as drawn; the neighbours' are drawn in docs/layouts.md."""
    text = ' '.join(FORMAT.split())
    for _, streams in list(LAYOUTS.values())[:5]:
        for stream in [streams] if isinstance(streams, str) else streams.values():
            assert ' '.join(stream.split()) in text
    user, assistant = [1, 2, 3, 4, 5] + 6 * [9], 5 * [9] + [6, 7, 8, 6, 9, 9]
    turns = [dict(role='user', start=0, end=5, text='who'), dict(role='assistant', start=5, end=9, text='me')]
    dialogue, layout = dict(id='', user=user, assistant=assistant, turns=turns), get_layout('duplex3', 4)
    drawing = draw(flatten(dialogue, layout, Letters())[0], layout, Letters())
    assert '\n'.join('    ' + line for line in drawing.split('\n')) in FORMAT
    (name, order, streams), = re.findall(r"^    '(\w+)': +\('(\w+)', '(.*)'\),$", FORMAT, re.M)
    with pytest.MonkeyPatch.context() as patch:     # the layout of one's own
        patch.setitem(LAYOUTS, name, (order, streams))
        layout = get_layout(name, 4)
        document, = flatten(dialogue, layout, Letters())
    assert textwrap.indent(draw(document, layout, Letters()), '    ') in FORMAT
    assert unflatten(document.ids, layout, Letters(), 9, '') == dict(dialogue, turns=turns[1:])
    rows = (ROOT / 'tests/golden/batch.txt').read_text(encoding='utf-8')
    drawn = FORMAT[FORMAT.index('document 0,'):]
    for line in re.findall(r'^    ((?:user|assistant)\.\w+ +\|.*[+~ᵗ].*)$', drawn, re.M):
        assert line in rows
