"""Claims are judged by their rule, and every line of runs/claims.sh is one that train.py takes."""
import json
import os

import pytest
from conftest import ROOT

import config
import train
from measures.claims import CLAIMS, FIGURES, LINES, folder_name, main, read_runs, settings, tables, verdict


def runs_of(**values):
    """{line: runs whose spoken answers are right in these shares}"""
    return {name: [dict.fromkeys(FIGURES) | dict(spoken_accuracy=value) for value in each]
            for name, each in values.items()}


@pytest.mark.parametrize('base, other, said', [
    ((0.9, 0.92, 0.94), (0.5, 0.6, 0.4), 'holds here: 92.0% against 50.0%'),
    ((0.5, 0.6, 0.4), (0.9, 0.92, 0.94), 'does not hold: 50.0% against 92.0%'),
    ((0.9, 0.8, 0.7), (0.8, 0.7, 0.75), 'cannot be told: 80.0% against 75.0%'),  # two errors: 12.9
    ((0.9, 0.8, 0.7), (0.6, 0.7, 0.65), 'holds here: 80.0% against 65.0%'),      # two errors: 12.9
    ((0.9, 0.8, 0.7), (0.8,), None),                                            # one seed says nothing
])
def test_verdict(base, other, said):
    claim = next(claim for claim in CLAIMS if (claim.line, claim.against) == ('base', 'text weighs 1'))
    assert verdict(claim, runs_of(base=base, **{'text weighs 1': other})) == said


def test_less_is_better_of_some_figures():
    claim = next(claim for claim in CLAIMS if claim.figure == 'response_ms')
    runs = {claim.line: [dict(response_ms=ms) for ms in (90, 100, 110)],
            claim.against: [dict(response_ms=ms) for ms in (190, 200, 210)]}
    assert verdict(claim, runs) == 'holds here: 100 ms against 200 ms'


def test_claims_are_about_lines_and_figures():
    for claim in CLAIMS:
        assert {claim.line, claim.against} <= LINES.keys() and claim.figure in FIGURES, claim
    assert len({folder_name(name) for name in LINES}) == len(LINES)


def test_lines_are_settings_of_train():
    """The same number of steps, and of parameters but for what two or eight layers cannot meet."""
    n_param = {}
    for name, line in settings(600).items():
        cfg = config.load(train.Config, [str(ROOT / 'config/demo.py'), *line.split()])
        assert sum(n_step for _, n_step, _ in cfg.curriculum()) == 600, name
        attention = cfg.n_embd ** 2 * (2 + 2 * cfg.n_kv_head / cfg.n_head)
        n_param[name] = cfg.n_layer * (attention + 3 * cfg.n_embd * cfg.n_inner)
    assert all(n == pytest.approx(n_param['base'], rel=0.01) for n in n_param.values()), n_param


def test_runs_become_a_table(tmp_path, capsys, monkeypatch):
    for name, right in (('base/1', 0.9), ('base/2', 1.0), ('no_alignment/1', 0.2), ('before/1', 0.5)):
        folder = tmp_path / name / 'evaluation'
        folder.mkdir(parents=True)
        (folder / 'metrics.json').write_text(json.dumps(dict(
            spoken_accuracy=right, response_ms=120.0, loss=dict(duplex3=dict(bits_per_sec=5.25)))))
    (tmp_path / 'base' / '3').mkdir()       # not measured yet
    (tmp_path / 'base' / '1.log').write_text('')
    runs = read_runs(tmp_path)
    assert list(runs) == ['base', 'no alignment', 'before'] and len(runs['base']) == 2
    assert tables(runs).splitlines() == [
        '| line | spoken answer right | response | bits a second | seeds |',
        '| --- | --: | --: | --: | --: |',
        '| base | 95.0% ± 7.1 | 120 ms ± 0 | 5.2 ± 0.0 | 2 |',
        '| no alignment | 20.0% | 120 ms | 5.2 | 1 |',
        '| before | 50.0% | 120 ms | 5.2 | 1 |']
    pytest.importorskip('matplotlib')
    monkeypatch.setattr('sys.argv', ['claims', str(tmp_path), f'--figure={tmp_path / "a.png"}',
                                     f'--result={tmp_path / "a.json"}'])
    main()
    assert (tmp_path / 'a.png').read_bytes()[1:4] == b'PNG'
    assert json.loads((tmp_path / 'a.json').read_text())['runs'] == json.loads(json.dumps(runs))


def test_an_empty_folder_is_told(tmp_path, monkeypatch):
    os.makedirs(tmp_path / 'none')
    monkeypatch.setattr('sys.argv', ['claims', str(tmp_path / 'none')])
    with pytest.raises(ValueError, match='no run there'):
        main()
