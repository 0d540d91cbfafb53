"""
How fast: one line a measurement, medians over repeats.

    python bench.py         dialogues of a minute flattened to duplex3, on one core
"""
import time

import numpy as np

from flatten import Letters, flatten, get_layout


def minute_dialogue(rng, rate_hz=25, n_turn=8):
    """A minute of turns one after the other, 42 letters each."""
    n_frame = 60 * rate_hz
    cuts = np.linspace(0, n_frame, n_turn + 1).astype(int).tolist()
    turns = [dict(role=('user', 'assistant')[i % 2], start=cuts[i], end=cuts[i + 1] - 10, text='a text as long as what is said in it takes') for i in range(n_turn)]
    user, assistant = rng.integers(0, Letters.n_codes, (2, n_frame)).astype(np.uint16)
    return dict(id='bench', user=user, assistant=assistant, turns=turns)


def main():
    rng, layout, vocab = np.random.default_rng(0), get_layout('duplex3'), Letters()
    dialogues = [minute_dialogue(rng) for _ in range(200)]
    rates = []
    for _ in range(7):
        start = time.perf_counter()
        n_token = sum(len(flatten(dialogue, layout, vocab)[0].ids) for dialogue in dialogues)
        rates.append(n_token / (time.perf_counter() - start))
    print(f'flatten duplex3 {np.median(rates) / 1e6:8.1f} M tokens/s on one core, {len(dialogues)} dialogues of a minute, {n_token // len(dialogues)} tokens each')


if __name__ == '__main__':
    main()
