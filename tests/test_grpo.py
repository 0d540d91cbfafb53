"""grpo.py: rewards by drawings, the policy of decoding, better gets likelier, resumed equals whole."""
from dataclasses import replace

import pytest
import torch

import grpo
from checkpoint import load_checkpoint
from common.device import Place
from data.dialogues import Dialogues
from decode import Duplex
from flatten import get_layout
from grpo import World, advantages, earliness, fill_places, log_probs, loss_sums, reward, talk
from measures.turns import assess
from tests.test_turns import converse


@pytest.fixture(scope='module')
def world(small_run):
    data, folder = small_run
    cfg = grpo.Config(init_from=str(folder), data=str(data))
    model, vocab, codec, info = load_checkpoint(str(folder))
    layout = info.layouts[-1]
    return World(cfg, Place(torch.device('cpu')), vocab, layout, codec, info, fill_places(layout)), model


def users(world, n):
    data = Dialogues(world.cfg.data, 'train')
    return [data[i] for i in range(n)]


# 25 frames a second: all is earned within 5 frames, nothing from 20 on
QUESTION = '#' * 20 + '.' * 60
ANSWER = '.' * 25 + '#' * 30 + '.' * 25


@pytest.mark.parametrize('assistant, earned', [
    (ANSWER, 1.0 + 1),                                      # after 5 frames, and right: the texts are all ''
    ('.' * 32 + '#' * 25 + '.' * 23, 1 - 7 / 15 + 1),       # after 12: 7 of the 15 frames too late
    ('.' * 80, 0.0 + 1),                                    # silence; as a text, '' is right in a drawing
    ('.' * 10 + '#' * 4 + '.' * 11 + '#' * 30 + '.' * 25, 1.0 + 1 - 1),     # a false start
    (ANSWER[:65] + '#' * 10 + '.' * 5, 1.0 + 1 - 1),        # speaks again
])
def test_what_a_question_earns(assistant, earned):
    turn, = assess(converse(QUESTION, assistant, ANSWER))
    assert sum(reward(turn, 25.0)) == pytest.approx(earned)


def test_what_interruptions_and_backchannels_earn():
    """The second turn: the reference's assistant stops for it, or talks on."""
    asked = '#' * 10 + '.' * 20
    stops, goes_on = '.' * 12 + '#' * 20 + '.' * 58, '.' * 12 + '#' * 70 + '.' * 8
    cut, mhm = asked + '#' * 30 + '.' * 30, asked + '#' * 8 + '.' * 52
    late = '.' * 12 + '#' * 26 + '.' * 52       # silent 8 frames after it began: 3 of 15 too late
    earned = [reward(assess(converse(*drawn))[1], 25.0)[0] for drawn in (
        (cut, stops, stops), (cut, late, stops), (mhm, goes_on, goes_on), (mhm, stops, goes_on))]
    assert earned == pytest.approx([1.0, 1 - 3 / 15, 0.0, -1.0])


def test_earliness():
    assert [earliness(n, 25.0) for n in (None, -3, 0, 5, 20, 80)] == [0, 1, 1, 1, 0, 0]


def test_the_policy_is_that_of_decoding(world):
    """The probabilities that a step is taken by are those that Duplex drew from, with all its rules."""
    world, model = world
    dialogues, drawn = users(world, 2), []
    choose = Duplex.next_token
    def spy(self, key, ids, noise):
        x = self.model.model.norm(self.model.run_blocks_cached(ids, self.cache)[:, -1])
        drawn.append((key, (self.heads[key](x) / world.cfg.temperature).log_softmax(-1)))
        self.cache.len -= ids.shape[1]          # it is read again
        self.cache.next_pos -= ids.shape[1]
        self.cache.advance(ids.shape[1])
        return choose(self, key, ids, noise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Duplex, 'next_token', spy)
        ids, duplex = talk(world, model, dialogues, 2, world.cfg.temperature, seed=3)
    with torch.no_grad():
        for (_, logs, chosen), key in zip(log_probs(world, model, ids, duplex.heads), world.chosen):
            theirs = torch.stack([each for name, each in drawn if name == key], 1)
            assert theirs.shape == logs.shape
            allowed = theirs.isfinite()
            assert torch.allclose(logs[allowed], theirs[allowed], atol=1e-4)
            assert (logs[~allowed] < -1e3).all()
            assert theirs.gather(2, chosen[..., None]).isfinite().all()     # what was drawn is allowed


def test_advantages_are_of_a_turn_within_its_group(world):
    """Two users, two conversations with each. Chunks have 10 frames; the second turn begins in chunk 3."""
    world, _ = world
    asked, answer = '#' * 10 + '.' * 20, '.' * 12 + '#' * 20
    user, reference = asked + '#' * 30 + '.' * 30, answer + '.' * 58
    late = '.' * 12 + '#' * 26 + '.' * 52
    outcomes = [assess(converse(user, said, reference)) for said in (reference, late, reference, reference)]
    worth = advantages(world, outcomes, 2, 9)
    half = 3 / 15 / 2           # what the late one earns less, halved by the mean
    assert worth[..., 1].abs().max() == 0       # nobody wrote anything
    worth = worth[..., 0]
    assert worth[:, :3].abs().max() == 0        # both answered the question alike
    assert worth[0, 3:].tolist() == pytest.approx([half] * 6)
    assert worth[1, 3:].tolist() == pytest.approx([-half] * 6)
    assert worth[2:].abs().max() == 0           # nothing to choose between in the other group


@pytest.mark.parametrize('parts', [(1.0, 0.0), (0.0, 1.0)])
def test_a_step_makes_the_better_conversation_likelier(world, parts):
    """One step of plain SGD, for when it spoke or for what it wrote: what earned more becomes likelier, what
    earned less rarer."""
    world, model = world
    ids, duplex = talk(world, model, users(world, 1), 2, 1.0, seed=5)
    ids, n_chunk = ids.clone(), torch.tensor([ids.shape[1] // world.layout.period] * 2)
    worth = torch.tensor([1.0, -1.0]).view(2, 1, 1) * torch.tensor(parts) * torch.ones(int(n_chunk[0]), 1)

    def log_p(model):
        with torch.no_grad():
            both = log_probs(world, model, ids, duplex.heads)
            if parts[1]:        # of its text
                return next(logs.gather(2, chosen[..., None]).sum((1, 2)) for _, logs, chosen in both)
            total = 0           # whether it was silent
            for key, (_, logs, chosen) in zip(world.chosen, both):
                silence = world.vocab.control[f'<|silent_{key}|>'] - duplex.heads[key].start
                p = logs[..., silence].exp()
                total = total + torch.where(chosen == silence, p, 1 - p).log().sum(1)
            return total
    moved = load_checkpoint(world.cfg.init_from).model.requires_grad_(True)
    policy, apart, n_token = loss_sums(world, moved, model, ids, worth, n_chunk, duplex.heads)
    assert float(apart.detach()) == pytest.approx(0, abs=1e-3) and n_token == 2 * 12 * int(n_chunk[0])
    (policy / n_token).backward()
    with torch.no_grad():
        for p in moved.parameters():
            p -= 1e-2 * p.grad if p.grad is not None else 0
    better, worse = (log_p(moved) - log_p(model)).tolist()
    assert better > 1e-4 and worse < -1e-4
    assert loss_sums(world, moved, model, ids, worth, n_chunk, duplex.heads)[1] > 0
    # chunks that do not count change nothing
    short = loss_sums(world, moved, model, ids, worth, n_chunk - 2, duplex.heads)
    assert short[2] == n_token - 2 * 12 * 2


def test_resumed_equals_uninterrupted(small_run, tmp_path, capsys):
    data, folder = small_run
    cfg = grpo.Config(init_from=str(folder), data=str(data), out_dir=str(tmp_path / 'a'), n_step=3, n_user=2,
                      n_sample=2, eval_interval=1, tensorboard=False)
    whole = grpo.main(cfg)
    grpo.main(replace(cfg, out_dir=str(tmp_path / 'b'), n_step=2))
    again = grpo.main(replace(cfg, out_dir=str(tmp_path / 'b'), resume=True))
    assert again['step'] == whole['step'] == 3 and again['best'] == whole['best']
    weights = [load_checkpoint(str(tmp_path / name / 'step-000003')).model.state_dict() for name in 'ab']
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    start = load_checkpoint(str(folder)).model.state_dict()
    assert any(not torch.equal(weights[0][name], start[name]) for name in start)
    load_checkpoint(str(tmp_path / 'a'))        # the best one is published, and is a checkpoint as any other
    assert 'note: changed' not in capsys.readouterr().out       # a longer run is no other
    grpo.main(replace(cfg, out_dir=str(tmp_path / 'b'), resume=True, kl_weight=0.5, n_step=4))
    assert 'kl_weight 0.1 -> 0.5; the run may not end' in capsys.readouterr().out


def test_bad_settings_are_told(small_run):
    data, folder = small_run
    for settings, words in ((dict(), 'choose another --out_dir'), (dict(n_sample=1), 'a group needs 2'),
                            (dict(temperature=0.0), 'above 0'), (dict(data='nowhere'), 'nowhere')):
        given = dict(init_from=str(folder), data=str(data), out_dir=str(folder), tensorboard=False) | settings
        with pytest.raises(ValueError, match=words):
            grpo.main(grpo.Config(**given))
        assert load_checkpoint(str(folder))
    with pytest.raises(ValueError, match='holds a run of train.py'):
        grpo.main(grpo.Config(**dict(given, n_sample=2, temperature=1.0, data=str(data), resume=True)))


def test_prompts_are_refused(world, monkeypatch):
    """The conversations would be without them."""
    data, record = Dialogues(world[0].cfg.data, 'train'), dict(users(world[0], 1)[0], prompt='Go on.')
    monkeypatch.setattr(Dialogues, '__getitem__', lambda self, i: record)
    with pytest.raises(ValueError, match='record 0 has a prompt'):
        grpo.pick_users(world[0], data, 100)


def test_layouts_without_chunks_are_refused():
    for name in ('half_duplex', 'nemo_duplex'):
        with pytest.raises(ValueError, match='grpo.py is for chunks'):
            fill_places(get_layout(name))
