"""
Lets a checkpoint listen to a split's users and measures how it takes turns, what it answers, and whether it says that.

    python evaluate.py --checkpoint=out/demo --data=data/demo           a table, and CHECKPOINT/metrics.json

    user       ░░░ question ░░░│                                     │░░░ next question ░░░
    assistant  ......false.....│▓▓▓▓ answer ▓▓▓▓                     │▓▓▓▓│
                       start   └ by 10 frames: took the turn         └────┘ by 25 frames: yielded
"""
import json
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein

import config
from data.loader import Dialogues
from sample import converse, load_checkpoint
from train import last_state, pick_device


@dataclass(frozen=True)
class Config:
    checkpoint: str = 'out/demo'        # a folder that train.py wrote
    data: str = 'data/demo'
    split: str = 'test'
    n_dialogue: int = 0                 # the first so many; 0: all
    batch_size: int = 64                # dialogues listened to side by side
    text_temperature: float = 0.0
    speech_temperature: float = 0.0
    silence_bias: float = 0.0
    seed: int = 1337
    device: str = 'auto'                # auto: a GPU if there is one


def plain(text):
    """Lower case, letters and digits: 'Paris.' and 'paris' are the same answer."""
    return ' '.join(''.join(c if c.isalnum() else ' ' for c in text.lower()).split())


def turn_taking(reference, decoded):
    """
    What the assistant of one decoded dialogue did about each of the reference's user turns: a list of dicts with
      response    frames from the end of the turn until the assistant starts to speak, before the next turn; or None
      false_start did the assistant begin to speak inside the turn
      unprompted  did it, after the turn, begin to speak a second time although nobody had said more
      yielded     frames from the start of the turn until the assistant was silent; None where it was not speaking
      answer      what it wrote then; expected: the reference's text, None where the user interrupted that
      codes, expected_codes   what it said then, likewise
    """
    n_frame = len(reference['user'])
    speaking = np.zeros(n_frame + 1, bool)
    theirs = [turn for turn in decoded['turns'] if turn['role'] == 'assistant']
    for turn in theirs:
        speaking[turn['start']:turn['end']] = True
    users = sorted((turn for turn in reference['turns'] if turn['role'] == 'user'), key=lambda turn: turn['start'])
    answers = sorted((turn for turn in reference['turns'] if turn['role'] == 'assistant'), key=lambda turn: turn['start'])
    found = []
    for user, following in zip(users, users[1:] + [None]):
        until = following['start'] if following else n_frame
        start = min((turn['start'] for turn in theirs if user['end'] <= turn['start'] < until), default=None)
        said = [turn for turn in theirs if user['start'] <= turn['start'] < until]
        expected = next((turn for turn in answers if user['start'] < turn['start'] <= until), None)
        is_whole = expected is not None and expected['end'] <= until
        found.append(dict(
            response=None if start is None else start - user['end'],
            unprompted=sum(user['end'] <= turn['start'] < until for turn in theirs) > 1,
            false_start=any(user['start'] < turn['start'] < user['end'] for turn in theirs),
            yielded=int(np.flatnonzero(~speaking[user['start']:])[0]) if speaking[user['start'] - 1] and speaking[user['start']] else None,
            answer=' '.join(turn['text'] for turn in said),
            codes=[code for turn in said for code in decoded['assistant'][turn['start']:turn['end']]],
            expected=expected['text'] if is_whole else None,
            expected_codes=[int(code) for code in reference['assistant'][expected['start']:expected['end']]] if is_whole else None))
    return found


def summarise(found, rate_hz):
    """The table over all user turns. Shares are of those turns that the measure speaks of; None where there are none."""
    def share(values):
        values = list(values)
        return float(np.mean(values)) if values else None

    whole = [turn for turn in found if turn['expected'] is not None]
    responses = [turn['response'] for turn in found if turn['response'] is not None]
    interrupted = [turn['yielded'] for turn in found if turn['yielded'] is not None]
    others = whole[1:] + whole[:1]      # another question's answer, as a yardstick: what would a wrong answer measure
    right = [plain(turn['answer']) == plain(turn['expected']) for turn in whole]
    return dict(
        n_question=len(found), n_answer=len(whole), n_interruption=len(interrupted),
        answer_accuracy=share(right),
        **{f'assistant_acc_by_{k}': share(turn['response'] is not None and turn['response'] < k for turn in found) for k in (1, 5, 10, 25)},
        response_ms=1e3 * share(responses) / rate_hz if responses else None,
        false_start_rate=share(turn['false_start'] for turn in found),
        unprompted_rate=share(turn['unprompted'] for turn in found),
        **{f'user_acc_by_{k}': share(frames < k for frames in interrupted) for k in (10, 25)},
        yield_ms=1e3 * share(interrupted) / rate_hz if interrupted else None,
        code_error_rate=share(Levenshtein.normalized_distance(turn['codes'], turn['expected_codes']) for turn in whole),
        code_error_rate_of_another_answer=share(Levenshtein.normalized_distance(turn['codes'], other['expected_codes'])
                                                for turn, other in zip(whole, others) if plain(turn['expected']) != plain(other['expected'])))


def main(cfg):
    if cfg.batch_size < 1 or cfg.n_dialogue < 0:
        raise ValueError('batch_size has to be at least 1, n_dialogue at least 0')
    device = pick_device(cfg.device)
    model, vocab, layout, codec, text_weight = load_checkpoint(cfg.checkpoint, device)
    dialogues = Dialogues(cfg.data, cfg.split)
    if dialogues.codec != codec.about():
        raise ValueError(f'{cfg.data} was made with codec {dialogues.codec["name"]} {dialogues.codec["fingerprint"]}, {cfg.checkpoint} was trained '
                         f'with codec {codec.name} {codec.fingerprint}: prepare the data with the checkpoint\'s codec')
    references = [dialogues[i] for i in range(min(cfg.n_dialogue or len(dialogues), len(dialogues)))]
    references = [reference for reference in references if len(reference['user']) == len(reference['assistant'])]
    if not references:
        raise ValueError(f'{cfg.data} has no two-sided dialogue in {cfg.split}')
    found, start, chunk_sec = [], time.perf_counter(), []
    for at in range(0, len(references), cfg.batch_size):
        batch = references[at:at + cfg.batch_size]
        decoded, sec = converse(model, vocab, layout, [reference['user'] for reference in batch], int(codec.silence_codes[0]), seed=cfg.seed, text_weight=text_weight,
                                text_temperature=cfg.text_temperature, speech_temperature=cfg.speech_temperature, silence_bias=cfg.silence_bias)
        chunk_sec += sec
        found += [turn for pair in zip(batch, decoded) for turn in turn_taking(*pair)]
        print(f'{min(at + cfg.batch_size, len(references))} of {len(references)} dialogues, {time.perf_counter() - start:.0f} s', flush=True)
    metrics = summarise(found, codec.rate_hz)
    state = last_state(cfg.checkpoint)
    if state:
        with open(os.path.join(state, 'state.json')) as file:
            trained = json.load(file)
        metrics.update(train_sec=trained['train_sec'], train_steps=trained['step'], hours_heard=trained['sec_heard'] / 3600)
    metrics.update(n_param=model.n_param(), decode_sec=time.perf_counter() - start)
    path = os.path.join(cfg.checkpoint, 'metrics.json')
    with open(path + '.part', 'w') as file:
        json.dump(metrics, file, indent=1)
    os.replace(path + '.part', path)
    for turn in [turn for turn in found if turn['expected'] and plain(turn['answer']) != plain(turn['expected'])][:5]:
        print(f'  wrong: {turn["answer"]!r}, expected {turn["expected"]!r}')
    for key, value in metrics.items():
        unit = 'ms' if key.endswith('_ms') else 's' if key.endswith('_sec') else ''
        print(f'{key:35} {"-" if value is None else f"{value:.3f}" if isinstance(value, float) and value < 10 else f"{value:,.0f}":>10} {unit}')
    return metrics


if __name__ == '__main__':
    try:
        main(config.load(Config, sys.argv[1:]))
    except ValueError as error:
        raise SystemExit(str(error))
