"""The best step by what is wanted: chosen, logged, told, resumed; and nothing of training changes by it."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_dialogues
from safetensors.torch import load_file
from test_turns import converse

import checkpoint
import evaluate
import train
from checkpoint import last_state, read_info
from flatten import LAYOUTS, get_layout
from measures import curves
from measures.best import Examiner, first_sec, is_better, lacks
from measures.turns import assess, is_well_taken


@pytest.fixture
def toy(small_run, tmp_path):
    """Ten steps on dialogues whose codec can be loaded, evaluated at 5 and 10."""
    return train.Config(data=str(small_run[0]), out_dir=str(tmp_path / 'run'), stages='duplex3:10', n_layer=1,
                        n_head=2, n_kv_head=1, n_embd=32, n_inner=64, block_size=256, batch_size=2,
                        batch_tokens=512, eval_interval=5, log_interval=5, warmup_steps=2, learning_rate=3e-3,
                        device='cpu', dtype='float32', tensorboard=False, n_listen=0)


def log(cfg, kind='val'):
    rows = [json.loads(line) for line in open(Path(cfg.out_dir) / 'log.jsonl')]
    return [{key: x for key, x in row.items() if key not in ('tokens_per_sec', 'loader_wait', 'train_sec')}
            for row in rows if kind in ('', row['kind'])]


def weights(folder):
    return load_file(Path(folder) / 'model.safetensors')


def equal(a, b):
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def measured(monkeypatch, losses, answers):
    """What each evaluation finds, one after the other; nothing is decoded."""
    losses, answers = iter(losses), iter(answers)
    monkeypatch.setattr(train, 'evaluate', lambda run, stage, real=train.evaluate:
                        real(run, stage) | dict(loss=next(losses)))
    monkeypatch.setattr(Examiner, 'answer', lambda *_: dict(answer_accuracy=next(answers)))


@pytest.mark.parametrize('select, best', [('loss', 20), ('answers', 15)])
def test_the_step_with_most_right_answers_is_kept_whatever_its_loss(toy, monkeypatch, select, best):
    """Step 20 has the least loss, 10 and 15 the most right answers, and 15 of those the lesser loss."""
    measured(monkeypatch, [4.0, 3.0, 2.0, 1.0, 1.5], [0.5, 0.9, 0.9, 0.6, 0.8])
    cfg = replace(toy, stages='duplex3:25', select=select, eval_dialogues=3)
    metrics = train.main(cfg)
    name, value = ('loss', 1.0) if select == 'loss' else ('answer_accuracy', 0.9)
    assert (metrics['best_step'], metrics[f'best_val_{name}']) == (best, value)
    assert equal(weights(cfg.out_dir), weights(f'{cfg.out_dir}/step-{best:06d}'))
    run, = read_info(cfg.out_dir).runs
    assert (run['selected'], run['steps']) == (dict(by=name, value=value), best)
    assert read_info(last_state(cfg.out_dir)).runs[0]['selected'] is None       # step 25 was not chosen
    assert [row['answer_accuracy'] for row in log(cfg)] == [0.5, 0.9, 0.9, 0.6, 0.8]


def test_resumed_keeps_the_best(toy, monkeypatch, tmp_path):
    """It dies at step 12. The best was step 5, by answers; what follows is worse, though its loss is less."""
    answers, losses = [0.9, 0.2, 0.3, 0.4], [4.0, 3.0, 2.0, 1.0]
    whole, killed = (replace(toy, stages='duplex3:20', select='answers', out_dir=str(tmp_path / name))
                     for name in ('whole', 'killed'))
    measured(monkeypatch, losses, answers)
    train.main(whole)

    def die(step, *rest, real=train.get_lr):
        if step == 12:
            raise KeyboardInterrupt
        return real(step, *rest)

    def save_and_wait(self, *arguments, real=checkpoint.Saver.save):
        real(self, *arguments)
        self.wait()
    monkeypatch.undo()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        measured(patch, losses, answers)
        patch.setattr(train, 'get_lr', die)
        patch.setattr(checkpoint.Saver, 'save', save_and_wait)
        train.main(killed)
    measured(monkeypatch, losses[2:], answers[2:])
    metrics = train.main(replace(killed, resume=True))
    assert (metrics['best_step'], metrics['best_val_answer_accuracy']) == (5, 0.9)
    assert log(whole, '') == log(killed, '')
    for folder in ('.', 'step-000005', 'step-000020'):
        assert equal(*(weights(Path(cfg.out_dir) / folder) for cfg in (whole, killed)))


def test_examined_it_learns_the_same_and_evaluate_finds_the_same(toy, tmp_path):
    """All five dialogues of val: weights, moments and random numbers end as those of a run that nobody
    examined; and evaluate.py finds the figures that chose the step."""
    plain, examined = (replace(toy, stages='duplex3:60', eval_interval=30, out_dir=str(tmp_path / name))
                       for name in ('plain', 'examined'))
    examined = replace(examined, select='turns')
    train.main(plain)
    metrics = train.main(examined)
    for name in ('model.safetensors', 'optimizer.safetensors'):
        ours, theirs = (load_file(Path(last_state(cfg.out_dir)) / name) for cfg in (plain, examined))
        assert equal(ours, theirs)
    assert 'well_taken_rate' not in log(plain)[0]
    found = evaluate.main(evaluate.Config(
        checkpoint=examined.out_dir, data=toy.data, split='val', device='cpu', dtype='float32', n_report=0,
        out=str(tmp_path / 'out')))
    row = next(row for row in log(examined) if row['step'] == metrics['best_step'])
    assert row['well_taken_rate'] == metrics['best_val_well_taken_rate'] == found['well_taken_rate']
    assert row['answer_accuracy'] == found.get('answer_accuracy', 0.0)


def test_by_turns_answers_count_and_turns_are_refused(toy):
    """half_duplex has no clock; duplex2 writes nothing; alignment before dialogue goes by its loss."""
    metrics = train.main(replace(toy, stages='half_duplex:2', select='answers', eval_dialogues=1))
    assert 0 <= metrics['best_val_answer_accuracy'] <= 1
    for stages, select, sentence in (
            ('half_duplex:2', 'turns', 'half_duplex, the last stage, goes by turns, without a clock; its '
                                       'best step can be chosen by loss or answers'),
            ('duplex2:2', 'answers', 'duplex2, the last stage, writes no answers; .* by loss or turns'),
            ('duplex3:2, asr:2', 'answers', 'asr, the last stage, writes no answers; .* by loss$')):
        with pytest.raises(ValueError, match=sentence):
            train.main(replace(toy, stages=stages, select=select))
    with pytest.raises(ValueError, match="select is 'turn', known are loss, answers, turns"):
        replace(toy, select='turn')
    with pytest.raises(ValueError, match='all but loss need eval_dialogues'):
        replace(toy, select='turns', eval_dialogues=0)


def test_a_stage_without_answers_goes_by_its_loss(toy, monkeypatch, capsys):
    measured(monkeypatch, [3.0, 2.0, 5.0], [0.2])
    metrics = train.main(replace(toy, stages='asr:10, duplex3:5', select='answers'))
    assert 'note: a model of stage asr writes no answers: its best step is chosen by its loss' in (
        capsys.readouterr().out)
    assert (metrics['best_step'], metrics['best_val_answer_accuracy']) == (15, 0.2)


def test_data_that_nobody_answers_is_refused_before_training(toy, small_data):
    with pytest.raises(ValueError, match='codec'):      # a folder without the codec
        train.main(replace(toy, data=str(small_data), select='answers'))


def test_which_layouts_have_which_figures():
    kinds = {name: [select for select in ('answers', 'turns') if not lacks(get_layout(name), select)]
             for name in LAYOUTS}
    both, answers = ['answers', 'turns'], ['answers']
    assert kinds == dict(
        asr=[], tts=[], text=answers, half_duplex=answers, duplex3=both, duplex3_user=both,
        duplex3_real=both, duplex2=['turns'], blsp=answers, salm=[],
        usdm_pretrain=[], usdm_sft=answers, glm4voice=answers, mini_omni=answers, mini_omni2_irq=[],
        outetts=[], outetts3=[], syncllm=['turns'], moshi=both, nemo_duplex=both)


def test_the_first_seconds_end_where_a_turn_does():
    """Of 100 frames the first 60: a turn of 50 to 70 does not fit, so nothing of it is heard."""
    dialogue = dict(next(make_dialogues(1, n_frame=(100, 101))), turns=[
        dict(role='user', start=0, end=20, text='a'), dict(role='assistant', start=22, end=40, text='b'),
        dict(role='user', start=50, end=70, text='c'), dict(role='assistant', start=71, end=90, text='d')])
    cut = first_sec(dialogue, 60)
    assert len(cut['user']) == len(cut['assistant']) == 50 and [t['text'] for t in cut['turns']] == ['a', 'b']
    assert first_sec(dialogue, 100) == dialogue and len(first_sec(dialogue, 500)['user']) == 100


def test_better():
    """None before; another figure before; more; as many at less loss; at more."""
    state = dict(best=0.5, best_by='answer_accuracy', best_loss=2.0)
    for before, accuracy, loss, expected in (
            (dict(state, best=None), 0.1, 9.0, True), (dict(state, best_by='loss'), 0.1, 9.0, True),
            (state, 0.6, 9.0, True), (state, 0.5, 1.9, True), (state, 0.5, 2.0, False),
            (state, 0.4, 0.1, False)):
        assert is_better('answer_accuracy', dict(answer_accuracy=accuracy, loss=loss), before) == expected
    assert is_better('loss', dict(loss=1.0), dict(best=2.0, best_by='loss'))
    assert not is_better('loss', dict(loss=2.0), dict(best=2.0, best_by='loss'))


ASKED, ANSWERED = '.####' + 27 * '.', '......####'
PAUSED = '.########------#########.......'
CUT, ANSWERED_TWICE = '.###' + 8 * '.' + 24 * '#' + 4 * '.', 6 * '.' + 8 * '#' + 22 * '.' + '#'
# user, the reference's assistant, ours, and which of the user's turns are dealt with well
WORKED = [
    # answered at once; after 9 frames; after 10, which is one too many; never
    (ASKED, ANSWERED, ANSWERED, [True]), (ASKED, ANSWERED, 14 * '.' + '####', [True]),
    (ASKED, ANSWERED, 15 * '.' + '####', [False]), (ASKED, ANSWERED, '', [False]),
    # the pause respected, and taken
    (PAUSED, 24 * '.' + '####', 24 * '.' + '####', [True]),
    (PAUSED, 24 * '.' + '####', 10 * '.' + '####' + 10 * '.' + '####', [False]),
    # interrupted at frame 12: silent after 9 frames; after 10
    (CUT, ANSWERED_TWICE, 6 * '.' + 15 * '#' + 15 * '.' + '#', [True, True]),
    (CUT, ANSWERED_TWICE, 6 * '.' + 16 * '#' + 14 * '.' + '#', [True, False]),
]


@pytest.mark.parametrize('user, reference, ours, expected', WORKED)
def test_dealt_with_well(user, reference, ours, expected):
    outcomes = assess(converse(user, ours, reference))
    assert [is_well_taken(turn, 25.0) for turn in outcomes] == expected


def test_a_backchannel_is_to_be_talked_over():
    """"Mhm" of 5 frames at 20, while the reference talks on for 2 s: the assistant goes on, or stops."""
    user, reference = '.####...............#####' + 60 * '.', '......' + 70 * '#'
    goes_on, stops = (assess(converse(user, ours, reference)) for ours in (reference, '......' + 18 * '#'))
    assert [turn['kind'] for turn in goes_on] == ['question', 'backchannel']
    assert [is_well_taken(turn, 25.0) for turn in goes_on] == [True, True]
    assert [is_well_taken(turn, 25.0) for turn in stops] == [True, False]


def test_curves_are_printed_and_drawn(tmp_path, capsys, monkeypatch):
    """The loss is least at 300, the answers are most at 200 and 400, and 400 has the lesser loss: each in
    bold, each with a mark. Of an earlier stage nothing is shown."""
    rows = [dict(kind='val', stage='asr', step=50, loss=0.001)]
    rows += [dict(kind='val', stage='duplex3', step=step, loss=loss, answer_accuracy=share, response_ms=None,
                  train_sec=step / 8)
             for step, loss, share in (
                 (100, 0.5, 0.1), (200, 0.1, 0.94), (300, 0.02, 0.9), (400, 0.03, 0.94))]
    (tmp_path / 'log.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    monkeypatch.setattr('sys.argv', ['curves', str(tmp_path), f'--svg={tmp_path}/a.svg'])
    curves.main()
    lines = capsys.readouterr().out.split('\n')
    assert lines[0] == '| step | training | loss on val | answers right |'
    assert lines[2:6] == ['| 100 | 12 s | 0.5000 | 10.0 % |', '| 200 | 25 s | 0.1000 | 94.0 % |',
                          '| 300 | 38 s | **0.0200** | 90.0 % |', '| 400 | 50 s | 0.0300 | **94.0 %** |']
    from xml.etree import ElementTree
    drawn = ElementTree.parse(tmp_path / 'a.svg').getroot()
    assert len(drawn.findall('.//{*}circle')) == 2
    (tmp_path / 'log.jsonl').write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match='has 1 evaluations'):
        curves.read_evaluations(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize('shard', [False, True])
def test_two_processes_find_what_one_does(toy, tmp_path, run, shard):
    """The first one decodes, with a copy or with what both have a half of; both know the best step."""
    alone, both = (replace(toy, select='turns', out_dir=str(tmp_path / name)) for name in ('alone', 'both'))
    both = replace(both, batch_size=1, shard=shard)
    train.main(alone)
    launcher = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
    run('train.py', *[f'--{name}={getattr(both, name)}' for name in both.__dataclass_fields__],
        launcher=launcher)
    for ours, theirs in zip(log(both), log(alone), strict=True):
        assert ours.keys() == theirs.keys() and ours['loss'] == pytest.approx(theirs['loss'], rel=1e-3)
    chosen = read_info(both.out_dir).runs[-1]
    assert chosen['selected']['by'] == 'well_taken_rate'
    assert chosen['selected']['value'] == max(row['well_taken_rate'] for row in log(both))
