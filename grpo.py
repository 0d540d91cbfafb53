"""
Lets a trained model learn from its own conversations to take turns well: group-relative policy optimisation
(GRPO, arXiv:2402.03300, section 4.1), as Kyutai rewards a voice model's turns (arXiv:2606.11167).

    python grpo.py --init_from=out/demo --out_dir=out/turns
    python evaluate.py --checkpoint=out/turns

    8 users of train ─► 8 conversations with each, drawn from the model
        user        ░░ What is ░░  ░░ two plus three? ░░                ░░ yeah ░░
        first                     ▓ Two …                                                      -1.0
        second                                            ▓▓ Two plus three is five. ▓▓           2.0
      ─► a reward for each turn of the user ─► less its mean over the 8 ─► one step: what the model chose from
         that turn on gets likelier where this is above 0, and rarer where it is below

The users are recordings, so they do not answer the model: they ask when they asked the reference's assistant.
A model that is late to answer is interrupted by the same words. What each turn earns stands in `reward`.

A step is taken on conversations of the model as it is (none is used twice), so there is no ratio to be cut.
It stays near the model that it began as: the loss has kl_weight times the divergence from that one, over all
tokens that a slot allows. out_dir is what train.py writes, too; --resume=true goes on.
"""
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

import checkpoint
import config
import guard
from common.device import Place, join
from common.files import whole
from common.origin import git
from data.dialogues import Dialogues
from decode import Duplex, Sampling, to_dialogue
from measures.listen import cut
from measures.logger import Logger
from measures.replies import is_right, written
from measures.turns import assess, mean, summarise, with_user_of
from model import attend_dense
from parallel import Copies

SOON_SEC, LATE_SEC = 0.2, 0.8     # answers and silences earn all by the first, nothing from the second on


@dataclass(frozen=True)
class Config:
    init_from: str = 'out/demo'         # a checkpoint in chunks: duplex3 or duplex2
    data: str = 'data/demo'             # its train split has the users, its val split those it is measured by
    out_dir: str = 'out/turns'
    n_step: int = 40
    n_user: int = 8                     # users a step, over all devices
    n_sample: int = 8                   # conversations with each: a group
    batch_size: int = 16                # conversations a micro-step on each device
    temperature: float = 1.0            # of the conversations, text and speech
    kl_weight: float = 0.1
    learning_rate: float = 2e-4         # AdamW's, after warmup_steps the same to the end
    warmup_steps: int = 5
    grad_clip: float = 1.0              # 0.0: no clipping

    resume: bool = False                # go on with the run in out_dir, where there is one
    eval_interval: int = 10             # steps between evaluations on val; each also saves the state
    n_val: int = 0                      # dialogues of val for that; 0: all
    device: str = 'auto'                # see train.py
    dtype: str = 'auto'
    tensorboard: bool = True
    wandb: str | None = None
    save_interval_sec: float = 900.0    # so often it is saved at least
    timeout_sec: float = 1800.0         # a process waits so long for the others
    seed: int = 1337

    def __post_init__(self):
        for name in ('n_step', 'n_user', 'batch_size', 'eval_interval'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}, it has to be at least 1')
        if self.n_sample < 2:
            raise ValueError(f'n_sample is {self.n_sample}: a group needs 2 to compare')
        if self.temperature <= 0:
            raise ValueError(f'temperature is {self.temperature}, it has to be above 0: there is nothing to '
                             'compare where all conversations are the same')
        for name in ('kl_weight', 'warmup_steps', 'grad_clip', 'n_val'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name} is {getattr(self, name)}, it cannot be negative')


# ------------------------------------------------------------------------------------------------------------
# conversations and what they earn

def earliness(n_frame, rate_hz):
    """1 for what happens within SOON_SEC, less and less until LATE_SEC; 0 for None: it never does"""
    if n_frame is None:
        return 0.0
    late = (n_frame / rate_hz - SOON_SEC) / (LATE_SEC - SOON_SEC)
    return 1 - min(max(late, 0.0), 1.0)


def reward(turn, rate_hz):
    """
    What a turn of the user earned the model -> (for when it spoke, for what it wrote). turn: see
    measures/turns.py, assess

        an answer is due    +1 for one at once; +1 if it is the right one
        an interruption     +1 for falling silent at once
        "yeah", "okay"      -1 for falling silent
        any                 -1 for beginning to speak inside the turn, or talking on; -1 for speaking again
                            after the answer
    """
    when = earliness(turn['response'], rate_hz) if turn['expects'] else 0.0
    if turn['kind'] == 'interruption':
        when += earliness(turn['yielded'], rate_hz)
    when -= sum((turn['stopped'], turn['false_start'] is not None, turn['unprompted'] is not None))
    return when, float(sum(is_right(*pair) for pair in written([[turn]])))


class World(NamedTuple):
    """Where the model talks: all that stays the same."""
    cfg: Config
    place: Place
    vocab: object
    layout: object
    codec: object
    info: checkpoint.Info
    chosen: dict            # head of Duplex -> places in a chunk that the model fills by it

    def sampling(self, temperature, seed=0):
        """As evaluate.py decodes, but drawn."""
        return Sampling(temperature, temperature, text_weight=self.info.text_weight, seed=seed)


def fill_places(layout):
    """{head of Duplex: [place in a chunk]} of the tokens that the model chooses. Raises ValueError for a
    layout without chunks, or whose silence is no token, or with states or late codes."""
    if not layout.period or layout.has_state or layout.n_late or any(slot.way for slot in layout.chunk):
        raise ValueError(f'layout {layout.name}: grpo.py is for chunks with a token for silence, as duplex3')
    chosen, at = {}, 0
    for slot, size in zip(layout.chunk, layout.sizes):
        for i in range(size):
            if slot.learned and slot.role != 'user':
                chosen.setdefault(Duplex.key(slot, i % (size // slot.n)), []).append(at + i)
        at += size
    if 0 in sum(chosen.values(), []):
        raise ValueError(f'layout {layout.name} begins with the assistant, grpo.py needs the user first')
    return chosen


def talk(world, model, dialogues, n_sample, temperature, seed=0):
    """Each user is listened to n_sample times -> ids int64 (n_dialogue * n_sample, n_chunk * K); the Duplex
    that chose them. Users who have ended are silent."""
    layout, n, n_frames = world.layout, world.layout.speech_chunk, [len(each['user']) for each in dialogues]
    n_chunk = max(map(layout.n_chunk, n_frames))
    shape = len(dialogues), n_chunk * n, *np.shape(dialogues[0]['user'])[1:]
    heard = np.full(shape, world.codec.silence_codes[0], np.int64)
    for row, dialogue in zip(heard, dialogues):
        row[:len(dialogue['user'])] = dialogue['user']
    heard = np.repeat(heard, n_sample, 0)
    duplex = Duplex(model, world.vocab, layout, len(heard), world.sampling(temperature, seed),
                    max_context=max(2, n_chunk) * layout.period, dtype=world.place.dtype)
    for c in range(n_chunk):
        duplex.step(heard[:, c * n:c * n + n])
    return torch.cat(duplex.ids, 1), duplex


def assess_all(world, ids, dialogues, n_sample):
    """ids of conversations -> [outcomes of measures/turns.py: one for each turn of the user] of each"""
    codec, outcomes = world.codec, []
    for row, ids_of_row in enumerate(ids.cpu().numpy()):
        reference = dialogues[row // n_sample]
        n_frame = len(reference['user'])
        ids_of_row = ids_of_row[:world.layout.n_chunk(n_frame) * world.layout.period]
        said = to_dialogue(ids_of_row, world.layout, world.vocab, codec.silence_codes[0].tolist(), n_frame)
        outcomes.append(assess_one(world, reference, said))
    return outcomes


def assess_one(world, reference, said):
    """said: the dialogue that somebody had with the reference's user"""
    return assess(with_user_of(reference, said, world.codec, world.layout.speech_chunk))


def advantages(world, outcomes, n_sample, n_chunk):
    """
    -> float32 (n_conversation, n_chunk, 2): what a chunk's choices are worth, of when it spoke and of what it
    wrote: what the turn earned that began last, less the mean of its group. Before the first turn it is the
    first turn's.
    """
    worth = np.zeros((len(outcomes), n_chunk, 2), np.float32)
    for first in range(0, len(outcomes), n_sample):
        group = outcomes[first:first + n_sample]
        for turns in zip(*group, strict=True):      # the same turn of the user in each conversation
            earned = np.array([reward(turn, world.codec.rate_hz) for turn in turns])
            is_first, start = turns[0] is group[0][0], turns[0]['start'] // world.layout.speech_chunk
            worth[first:first + n_sample, 0 if is_first else start:] = (earned - earned.mean(0))[:, None]
    return torch.from_numpy(worth)


# ------------------------------------------------------------------------------------------------------------
# a step

def log_probs(world, model, ids, heads):
    """ids (B, T) -> for each head: (places (N), log of the probabilities of what a slot allows (B, N, n_id),
    and which of these was chosen (B, N)). The policy is Duplex's."""
    pos = torch.arange(ids.shape[1] - 1, device=ids.device)[None]
    x = model.model.norm(model.run_blocks(ids[:, :-1], pos, attend_dense))      # (B, T - 1, C)
    matrix = model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    for key, places in world.chosen.items():
        head, period = heads[key], world.layout.period
        at = torch.tensor([c + place for c in range(0, ids.shape[1], period) for place in places])
        at = at.to(ids.device)
        rows = matrix[head.start:head.start + len(head.bias)]
        # what is forbidden has a bias of -inf, of which a gradient cannot be taken
        logits = F.linear(x[:, at - 1], rows).float() + head.bias.clamp(min=-1e4)
        yield at, (logits / world.cfg.temperature).log_softmax(-1), ids[:, at] - head.start


def loss_sums(world, model, reference, ids, worth, n_chunk, heads):
    """
    ids (B, T), worth (B, T / K, 2), n_chunk (B): how many chunks of each row count -> the sum over the chosen
    tokens of  -worth * log p  and of the divergence from the reference model, and how many tokens there are.

    When it spoke depends on whether a token is silence, and on nothing else of it. So there p is that of
    silence, or of its contrary: which of 512 codes was drawn would only add noise. What it wrote depends on
    each token of its text.
    """
    with torch.no_grad():
        before = [each for _, each, _ in log_probs(world, reference, ids, heads)]
    policy = divergence = n_token = 0.0
    each = zip(world.chosen, log_probs(world, model, ids, heads), before)
    for key, (at, logs, chosen), logs_before in each:
        chunk = at // world.layout.period
        counts = (chunk < n_chunk[:, None]).float()     # (B, N)
        name = '<|silent_text|>' if key == 'text' else '<|silent_speech|>'
        silence = world.vocab.control[name] - heads[key].start
        log_silent = logs[..., silence]
        log_p = torch.where(chosen == silence, log_silent, torch.log1p(-log_silent.exp().clamp(max=1 - 1e-6)))
        gain = worth[:, chunk, 0] * log_p
        if key == 'text':
            gain = gain + worth[:, chunk, 1] * logs.gather(2, chosen[..., None])[..., 0]
        policy = policy - (counts * gain).sum()
        divergence = divergence + (counts * (logs.exp() * (logs - logs_before)).sum(2)).sum()
        n_token += float(counts.sum())
    return policy, divergence, n_token


def take_step(world, model, reference, gradients, optimizer, dialogues, seed):
    """Talks to the users of this process and learns from it -> {figure: value} of the step"""
    cfg, place, start = world.cfg, world.place, time.time()
    ids, duplex = talk(world, model, dialogues, cfg.n_sample, cfg.temperature, seed)
    ids = ids.clone()           # of inference mode: nothing that is learned from may be
    outcomes = assess_all(world, ids, dialogues, cfg.n_sample)
    talk_sec = time.time() - start
    n_chunk = torch.tensor([world.layout.n_chunk(len(each['user'])) for each in dialogues])
    n_chunk = n_chunk.repeat_interleave(cfg.n_sample).to(place.device)
    worth = advantages(world, outcomes, cfg.n_sample, ids.shape[1] // world.layout.period).to(place.device)
    total_tokens, divergence = torch.zeros((), device=place.device), 0.0
    batches = torch.arange(len(ids)).split(cfg.batch_size)
    for rows in batches:
        with place.autocast():
            policy, apart, n_token = loss_sums(world, model, reference, ids[rows], worth[rows], n_chunk[rows],
                                               duplex.heads)
        gradients.backward(policy + cfg.kl_weight * apart, is_last=rows is batches[-1])
        total_tokens += n_token
        divergence += float(apart.detach())
    norm = gradients.finish(total_tokens, cfg.grad_clip)
    optimizer.step()
    gradients.zero()
    heard_sec = cfg.n_sample * sum(len(each['user']) for each in dialogues) / world.codec.rate_hz
    every, apart, heard_sec = zip(*place.gather((outcomes, divergence, heard_sec)))
    return dict(figures(world, sum(every, [])), kl=sum(apart) / float(total_tokens), grad_norm=float(norm),
                heard_sec=sum(heard_sec), talk_sec=talk_sec, sec=time.time() - start)


FIGURES = ('assistant_acc_by_10', 'false_start_rate', 'pause_taken_rate', 'user_acc_by_10',
           'backchannel_stopped_rate')


def figures(world, outcomes):
    """outcomes of conversations -> {'reward': mean of a turn, 'answer_accuracy': …, and FIGURES}"""
    turns, rate_hz = sum(outcomes, []), world.codec.rate_hz
    found = summarise(turns, rate_hz)
    return dict(reward=mean(sum(reward(turn, rate_hz)) for turn in turns),
                answer_accuracy=mean(is_right(*pair) for pair in written(outcomes)),
                **{key: found[key] for key in FIGURES})


def in_words(values):
    """'reward 1.42 | answers right 96 %, by 10 frames 98 % | …'"""
    share = {key: '-' if value is None else f'{value:.0%}' for key, value in values.items()}
    return (f'reward {values["reward"]:.3f} | right {share["answer_accuracy"]}, by 10 frames '
            f'{share["assistant_acc_by_10"]} | false starts {share["false_start_rate"]}, pauses taken '
            f'{share["pause_taken_rate"]} | yields by 10 {share["user_acc_by_10"]}, stopped by backchannels '
            f'{share["backchannel_stopped_rate"]}')


# ------------------------------------------------------------------------------------------------------------
# a run

def pick_users(world, dialogues, n_frame, decisive=False):
    """-> numbers of the dialogues of two channels with a turn of the user in the first n_frame frames.
    decisive: only those with an interruption, a backchannel or a pause, of which there is most to be learned;
    all of them, where there are no such"""
    found, harder = [], []
    for i, (n_user, n_assistant) in enumerate(zip(*dialogues.n_frame)):
        if n_user != n_assistant or n_user < world.layout.speech_chunk:
            continue
        reference = cut(dialogues[i], n_frame)
        if reference.get('prompt'):
            raise ValueError(f'{dialogues.folder}/{dialogues.split}.arrow: record {i} has a prompt: grpo.py '
                             'talks without prompts, so it needs data without them')
        turns = assess_one(world, reference, reference)
        found += [i] * bool(turns)
        harder += [i] * any(turn['kind'] != 'question' or turn['pauses'] for turn in turns)
    return harder or found if decisive else found


def main(cfg):
    """Raises ValueError where cfg and the files disagree, SystemExit after a signal (guard.py)."""
    place = join(cfg.device, cfg.dtype, cfg.timeout_sec)
    torch.manual_seed(cfg.seed)
    if cfg.n_user % place.world_size:
        raise ValueError(f'n_user {cfg.n_user} is no multiple of {place.world_size} processes')
    first = checkpoint.load_checkpoint(cfg.init_from, place.device)
    data, val_data = (Dialogues(cfg.data, split) for split in ('train', 'val'))
    checkpoint.check_codec(cfg.init_from, first.info.codec, data)
    layout, reference = first.layout, first.model.requires_grad_(False)
    world = World(cfg, place, first.vocab, layout, first.codec, first.info, fill_places(layout))
    n_frame = reference.config.block_size // layout.period * layout.speech_chunk    # what it has learned from
    numbers, val_numbers = pick_users(world, data, n_frame, True), pick_users(world, val_data, n_frame)
    if not numbers or not val_numbers:
        raise ValueError(f'{cfg.data} has no dialogue of two channels in {"val" if numbers else "train"}')
    val = [cut(val_data[i], n_frame) for i in val_numbers[:cfg.n_val or None]]
    resume_from = checkpoint.find_state(cfg.out_dir, place) if cfg.resume else None
    model = checkpoint.load_checkpoint(resume_from or cfg.init_from, place.device).model.requires_grad_(True)
    gradients = Copies(model, place)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    state = dict(run_id=uuid4().hex, step=0, best=None, best_by='reward', best_step=None, train_sec=0.0,
                 sec_heard=0.0)
    if resume_from:
        state |= checkpoint.load_state(resume_from, model, optimizer)
    if state['best_by'] != 'reward':
        raise ValueError(f'{cfg.out_dir} holds a run of train.py: choose another --out_dir')
    facts = describe(cfg, data, val_data, layout)
    if resume_from and (changed := guard.compare(state['facts'], facts, {}, resume_from)) and place.is_main:
        print(changed)
    state['facts'] = facts
    open_out_dir(cfg, place, resume_from, state)
    logger, saver = Logger(cfg, state['step']) if place.is_main else None, checkpoint.Saver()
    with guard.Guard(place, cfg.save_interval_sec, cfg.timeout_sec, saver) as watch:
        if not resume_from:
            measure(world, model, val, state, logger)
        while state['step'] < cfg.n_step:
            for group in optimizer.param_groups:
                group['lr'] = cfg.learning_rate * min(1, (state['step'] + 1) / max(1, cfg.warmup_steps))
            rng = np.random.default_rng([cfg.seed, state['step']])
            mine = rng.choice(numbers, cfg.n_user, replace=len(numbers) < cfg.n_user)
            users = [cut(data[i], n_frame) for i in mine[place.rank::place.world_size].tolist()]
            seed = int(rng.integers(2 ** 31)) + place.rank
            values = take_step(world, model, reference, gradients, optimizer, users, seed)
            state.update(step=state['step'] + 1, train_sec=state['train_sec'] + values['sec'],
                         sec_heard=state['sec_heard'] + values['heard_sec'])
            note(world, state, logger, 'grpo', values)
            is_evaluated = state['step'] % cfg.eval_interval == 0 or state['step'] == cfg.n_step
            if is_evaluated:
                measure(world, model, val, state, logger)
            number, is_due = watch.ask()
            if is_evaluated or is_due or number:
                snapshot = checkpoint.take_snapshot(model, optimizer, place)
                watch.saved()
                if place.is_main:
                    saver.save(cfg.out_dir, snapshot, world.vocab, world.info,
                               os.path.join(cfg.init_from, 'codec'), state)
            if number:
                saver.wait()
                watch.stop(number, state['step'], cfg.out_dir)
        saver.wait()
    if place.is_main:
        print(f'{cfg.out_dir}: {state["train_sec"]:.0f} s, best reward on val {state["best"]:.3f} at step '
              f'{state["best_step"]}')
    if place.world_size > 1:
        place.barrier()
        dist.destroy_process_group()
    return state


def describe(cfg, data, val_data, layout):
    """What the run depends on (guard.compare), and checkpoints say of it (checkpoint.describe_run)"""
    n_token = layout.n_chunk(int(np.mean(data.n_frame[0][data.n_frame[1] > 0]))) * layout.period
    facts = asdict(cfg) | {f'{cfg.data}, {each.split}: dialogues': len(each) for each in (data, val_data)}
    del facts['n_step']     # the learning rate has no end: a longer run begins with the shorter one
    return facts | dict(stages=f'grpo.{layout.name}', optimizer='adamw', torch=torch.__version__,
                        commit=git('describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'),
                        batch_tokens=cfg.n_user * cfg.n_sample * n_token)


def measure(world, model, val, state, logger):
    """Talks to the users of val as evaluate.py would; notes the best reward in state."""
    part = val[world.place.rank::world.place.world_size]
    outcomes = assess_all(world, talk(world, model, part, 1, 0.0)[0], part, 1) if part else []
    values = figures(world, sum(world.place.gather(outcomes), []))
    if state['step'] and (state['best'] is None or values['reward'] > state['best']):
        state.update(best=values['reward'], best_step=state['step'])
    note(world, state, logger, 'val', values)


def note(world, state, logger, kind, values):
    if logger:
        took = f' | kl {values["kl"]:.4f} | {values["sec"]:.1f} s' if 'sec' in values else ''
        print(f'{kind:4} {state["step"]:>5}/{world.cfg.n_step} | {in_words(values)}{took}', flush=True)
        logger.log(kind=kind, step=state['step'], **values)


def open_out_dir(cfg, place, resume_from, state):
    """Makes the folder. One that is in use is moved aside, unless the run in it goes on."""
    if place.is_main and not resume_from and os.path.exists(cfg.out_dir):
        if not os.path.exists(os.path.join(cfg.out_dir, 'log.jsonl')):
            raise ValueError(f'{cfg.out_dir} is no run: choose another --out_dir')
        if os.path.realpath(cfg.out_dir) == os.path.realpath(cfg.init_from):
            raise ValueError(f'{cfg.out_dir} is what init_from starts from: choose another --out_dir')
        print(f'{cfg.out_dir} held another run, moved to {checkpoint.move_aside(cfg.out_dir)}')
    if place.is_main:
        if resume_from:
            checkpoint.publish_again(cfg.out_dir, state['best_step'])
        os.makedirs(cfg.out_dir, exist_ok=True)
        with whole(os.path.join(cfg.out_dir, 'config.py')) as part:
            config.save(cfg, part)
    place.barrier()


if __name__ == '__main__':
    with guard.one_sentence():
        main(config.load(Config, sys.argv[1:]))
