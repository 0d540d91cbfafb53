"""bench.py: its table is whole, and what it compares is the same."""
import json
import math

import pytest
import torch

import bench
from data.made_up import make_vocabulary, write_data
from model import ModelConfig, Qwen2

FIGURE = {'row', 'name', 'median', 'low', 'high', 'n', 'unit', 'note'}
RESULT = {'command', 'date', 'commit', 'uncommitted', 'machine', 'versions', 'dtype', 'threads', 'tiny',
          'sec', 'figures', 'missing', 'failed', 'row_sec'}


def read_result(path):
    result = json.loads(path.read_text())
    assert set(result) == RESULT
    for figure in result['figures']:
        assert set(figure) == FIGURE and figure['n'] >= 1 and figure['unit']
        assert figure['low'] <= figure['median'] <= figure['high'] and math.isfinite(figure['median']), figure
    return result


def test_a_tiny_run_writes_the_table_and_the_same_as_json(run, tmp_path):
    done = run('bench.py', '--cpu', '--tiny', '--only=attention,step', f'--save={tmp_path}/b.json')
    result = read_result(tmp_path / 'b.json')
    assert result['tiny'] and result['threads'] == 1
    assert torch.cuda.is_available() or result['machine']['gpu'] is None
    assert torch.__version__.startswith(result['versions']['torch'])     # which may lack "+cu130"
    assert not result['missing'] and {figure['row'] for figure in result['figures']} == {'attention', 'step'}
    for figure in result['figures']:
        line = next(line for line in done.stdout.split('\n')
                    if line.startswith(figure['row']) and figure['name'] in line)
        assert figure['unit'] in line and f'n={figure["n"]}' in line
    assert len({figure['name'] for figure in result['figures']}) == len(result['figures'])


@pytest.mark.slow
def test_all_rows_run_at_toy_size(run, tmp_path):
    """GPU rows run on the CPU here. Only figures of peers that are not installed may be missing."""
    for where, rows in ((['--cpu'], bench.CPU_ROWS), ([], bench.GPU_ROWS)):
        run('bench.py', '--tiny', *where, f'--save={tmp_path}/b.json')
        result = read_result(tmp_path / 'b.json')
        assert {figure['row'] for figure in result['figures']} == set(rows), result['missing']
        assert all('not installed' in missing['why'] for missing in result['missing']), result['missing']


@pytest.mark.slow
def test_checks_run_and_pass_on_a_cpu(run, tmp_path):
    """What needs a GPU is named as missing."""
    printed = run('bench.py', '--check', '--tiny', f'--save={tmp_path}/b.json').stdout
    result = read_result(tmp_path / 'b.json')
    assert not result['failed'] and 'FAIL' not in printed
    rows = {entry['row'] for entry in result['figures'] + result['missing']}
    assert rows == set(bench.check.ROWS)
    assert {missing['row'] for missing in result['missing']} == {'no_waits', 'auto_batch'}
    passed = [figure for figure in result['figures'] if figure['note'].startswith('pass')]
    assert len(passed) >= 20


def test_a_check_that_fails_ends_with_its_name(monkeypatch, capsys, tmp_path):
    def row(bench):
        for name, value in (('right', 0.5), ('wrong', 2.0), ('no number', math.nan)):
            bench_check.verify(bench, name, value, 1.0)
    bench_check = bench.check
    monkeypatch.setattr(bench_check, 'ROWS', dict(row=(row, 1, 1), error=(lambda bench: 1 / 0, 1, 1)))
    monkeypatch.setattr(bench, 'FAILURES', (ZeroDivisionError,))
    monkeypatch.setattr('sys.argv', ['bench.py', '--check', '--tiny', f'--save={tmp_path}/b.json'])
    with pytest.raises(SystemExit, match='3 failed: row: wrong, row: no number, error'):
        bench.main()
    printed = capsys.readouterr().out
    assert printed.count('FAIL') == 2 and printed.count('pass: at most 1') == 1
    monkeypatch.setattr(bench_check, 'ROWS', dict(late=(row, 9999, 9999)))      # no time is left for it
    monkeypatch.setattr('sys.argv', ['bench.py', '--check', '--cpu', f'--save={tmp_path}/b.json'])
    with pytest.raises(SystemExit, match='1 failed: late, left out'):
        bench.main()


def test_a_row_that_fails_is_a_line_and_the_others_run(monkeypatch, capsys, tmp_path):
    def out_of_memory(bench):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 61 GiB\nmore')

    rows = dict(full=(out_of_memory, 1, 1), fine=(lambda bench: bench.add('a figure', [1, 2, 4], 'ms'), 1, 1),
                late=(out_of_memory, 9999, 9999))
    monkeypatch.setattr(bench, 'CPU_ROWS', rows)
    monkeypatch.setattr('sys.argv', ['bench.py', '--cpu', f'--save={tmp_path}/b.json'])
    bench.main()
    result = read_result(tmp_path / 'b.json')
    figure, = result['figures']
    assert [figure[key] for key in ('name', 'median', 'low', 'high', 'n')] == ['a figure', 2, 1, 4, 3]
    full, late = result['missing']
    assert full['why'] == 'OutOfMemoryError: CUDA out of memory. Tried to allocate 61 GiB'
    assert 'left out: it takes 9999 s' in late['why']
    assert '61 GiB' in capsys.readouterr().out


def test_required_flops_by_hand():
    """Qwen2-0.5B at T = 1,024, one document of which all is learned."""
    with torch.device('meta'):
        model = Qwen2(ModelConfig(156_032, 1024, **bench.QWEN2))
    layer = 896 * (896 + 128 + 128) + 896 * 896 + 3 * 896 * 4864       # q, k, v; o; gate, up, down
    assert layer == 14_909_440
    assert model.flops_per_token(1.0, 512) == 6 * (24 * layer + 156_032 * 896) + 3 * 4 * 24 * 896 * 512
    assert model.flops_per_token(0.5, 512) == model.flops_per_token(1.0, 512) - 3 * 156_032 * 896
    assert 3.10e9 < model.flops_per_token(1.0, 512) < 3.13e9           # 3.119 there


def test_peers_get_the_same_rows_targets_and_documents(tmp_path):
    """The sum of transformers' losses is ours: documents are kept apart, nothing is shifted twice."""
    transformers = pytest.importorskip('transformers')
    vocab = make_vocabulary(600, 32)
    write_data(tmp_path, vocab, [70, 30, 50, 20, 90, 40])
    batch = bench.make_loader(tmp_path, vocab, 'duplex3', 256, 2).next_batch()
    assert len(batch.doc[0].unique()) > 1
    torch.manual_seed(0)
    model = Qwen2(ModelConfig(vocab.size, 256, **bench.TINY))
    hf = transformers.Qwen2ForCausalLM(bench.hf_config(bench.TINY, vocab.size, 'sdpa'))
    hf.load_state_dict(model.hf_state_dict(), strict=False)
    total = model(batch.idx, batch.pos, batch.doc, batch.learn, batch.targets)[0]
    theirs = hf(**bench.hf_batch(batch)).loss * len(batch.learn)
    assert math.isclose(total.item(), theirs.item(), rel_tol=1e-5)


def test_help_and_mistakes(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for arguments, message in (
            (['--help'], '--peers'), (['--cpu', '--only=stp'], "no row 'stp'"),
            (['--onyl=step'], 'unrecognized arguments: --onyl'), ([], 'run python bench.py --cpu')):
        monkeypatch.setattr('sys.argv', ['bench.py', *arguments])
        with pytest.raises(SystemExit) as end:
            bench.main()
        assert message in capsys.readouterr().out + str(end.value)
