"""
Records: is a dialogue what docs/format.md says?

    check(dialogue, n_codes)        raises ValueError, one sentence, where it is not
"""
from operator import itemgetter

import numpy as np

from layouts import ROLES

TURN = [('role', str), ('start', (int, np.integer)), ('end', (int, np.integer)), ('text', str)]
START = itemgetter('start')


def check(dialogue, n_codes, codes_per_frame=None):
    """Raises ValueError, one sentence with the id, unless the dialogue is a record as in docs/format.md.
    codes_per_frame: None: as many as it has"""
    name = f'dialogue {dialogue.get("id")!r}'
    for key in ('id', 'user', 'assistant', 'turns'):
        if key not in dialogue:
            raise ValueError(f'{name} has no field {key!r}')
    try:
        channels = {role: np.asarray(dialogue[role]) for role in ROLES}
    except ValueError:
        raise ValueError(f'{name}: a channel is a list of lists; each is one list of codes')
    for role, codes in channels.items():
        if not len(codes):
            continue
        if codes.ndim > 2 or codes.dtype.kind not in 'iu':
            raise ValueError(f'{name}: the {role} channel is not a list of whole numbers')
        n_code = codes_per_frame or codes.size // len(codes)
        if codes.shape[1:] != (n_code,) * (n_code > 1):
            raise ValueError(f'{name}: a frame of the {role} channel has {codes.size // len(codes)} codes, '
                             f'of the codec {n_code}')
        size = n_codes // n_code        # of several codes a frame each has a range of its own
        first = np.arange(n_code) * size if n_code > 1 else 0
        over = codes - first if n_code > 1 else codes
        if not (over.max() < size and (over.dtype.kind == 'u' or over.min() >= 0)):
            at = np.argwhere((codes < first) | (codes >= first + size))[0]
            raise ValueError(f'{name}: {role} code {codes[tuple(at)]} at frame {at[0]} is out of range, '
                             f'the codec has {np.max(first)} to {np.max(first) + size - 1}'
                             + ' there' * (n_code > 1))
    n_user, n_assistant = map(len, channels.values())
    if n_user != n_assistant and n_user and n_assistant:
        raise ValueError(f'{name}: channels of unequal length, user {n_user} frames and assistant '
                         f'{n_assistant}; cut or pad them to one clock (a one-sided utterance leaves '
                         'the other empty)')
    if not isinstance(dialogue.get('prompt', ''), str):
        raise ValueError(f'{name}: its prompt is {dialogue["prompt"]!r}, and has to be a text')
    check_turns(name, dialogue['turns'], {role: len(codes) for role, codes in channels.items()})


def check_turns(name, turns, n_frame):
    """n_frame: {role: length of its channel}"""
    if not isinstance(turns, (list, tuple)) or not all([isinstance(turn, dict) for turn in turns]):
        raise ValueError(f'{name}: turns is not a list of objects with role, start, end and text')
    for key, kind in TURN:
        for turn in turns:
            if not isinstance(turn.get(key), kind):
                raise ValueError(f'{name}: a turn has {key} {turn.get(key)!r}; it needs role, start, end '
                                 '(whole frames) and text')
    last_end = dict.fromkeys(ROLES, 0)
    for turn in sorted(turns, key=START):
        role, start, end = turn['role'], turn['start'], turn['end']
        if role not in ROLES:
            raise ValueError(f'{name}: a turn has role {role!r}, known are {" and ".join(ROLES)}')
        is_written = start == end >= 0 and not n_frame[role]    # a text that nobody spoke
        if not (is_written or 0 <= start < end <= n_frame[role]):
            raise ValueError(f'{name}: {role} turn {start} to {end} does not lie in its channel of '
                             f'{n_frame[role]} frames')
        if start < last_end[role]:
            raise ValueError(f'{name}: {role} turns overlap, one starts at frame {start} before the last '
                             f'ended at {last_end[role]}')
        last_end[role] = end
        if turn.get('words'):
            check_words(name, turn)


def check_words(name, turn):
    """Its words lie in it, one after the other by their starts. A short one may have no frame of its own."""
    words, last_start = turn['words'], turn['start']
    for word in words if isinstance(words, (list, tuple)) else [words]:
        text, start, end = map(word.get, ('text', 'start', 'end')) if isinstance(word, dict) else [None] * 3
        is_word = isinstance(text, str) and all([isinstance(at, (int, np.integer)) for at in (start, end)])
        if not is_word or not last_start <= start <= end <= turn['end']:
            raise ValueError(f'{name}: {turn["role"]} turn {turn["start"]} to {turn["end"]} has the word '
                             f'{word!r:.80}; each needs text, start and end (whole frames) in its turn, and '
                             'starts with the last one or later')
        last_start = start
