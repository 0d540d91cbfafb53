"""
Full-Duplex-Bench's measures, v1 (arXiv:2503.04721) and v1.5 (arXiv:2507.23159), by the definitions of its
scripts (github.com/DanielLin94144/Full-Duplex-Bench, CC BY-NC 4.0), of which nothing is used here.

    pause_handling          takeover rate, low: is a pause of the user taken for the end?
    smooth_turn_taking      takeover rate, high; latency
    user_interruption       the same of what is said after the interruption
    backchannel             takeover rate, low; backchannels a second, high; when, beside people (JSD), low
    v1.5, four overlaps     stop latency, response latency

    user        ░░░░░░ what is ─────── the capital ░░░░░│
    assistant                                           │    ▓▓▓▓▓▓▓ a takeover: 1 s or four words ▓▓▓▓▓▓
                                                        └────┘ latency

    takeover            from the first word of what is said to the last it is TURN_SEC or more, or has more
                        than TURN_WORDS words
    latency             from the end of the user's turn to the first word of a takeover; 0 if it was earlier
    backchannel         a stretch of the assistant's speech of LONG_SEC at most; a longer one is a takeover.
                        So is one of TURN_SEC or three words if it is the last, as in their script, and it
                        counts as a backchannel, too
    JSD                 the square root of the Jensen-Shannon divergence (nats) between the backchannels in
                        windows of WINDOW_SEC and people's; 1 without a backchannel
    stop latency        from the start of the overlap until the assistant, which was speaking, is silent; at
                        most until the overlap ends, as in their script
    response latency    from the end of the overlap until the assistant begins to speak again

Words are those of output.json, or of a checkpoint's text, spread evenly over its turn. Where there are none,
speech is heard (measures/foreign.py; theirs: Silero), and only its length makes a takeover. An overlap is
where metadata.json says. Left out is what a language model judges: v1's score of interruptions, v1.5's
behaviours.
"""
import itertools
import os
from typing import NamedTuple

import numpy as np

from common.files import read_json
from measures import foreign
from measures.turns import mean, stretches

TURN_SEC, TURN_WORDS = 1.0, 3
LONG_SEC = 3.0
WINDOW_SEC = 0.2
JOIN_SEC = 0.5          # v1.5: gaps of the assistant up to this are no end of its speech

SYSTEMS = 'dGSLM', 'Moshi', 'Freeze-Omni', 'PersonaPlex', 'GPT-Realtime'
# theirs, in the order of SYSTEMS: their repository's v1_v1.5/README.md, 2026. None was found for v1.5
PUBLISHED = {
    ('pause_handling', 'takeover_rate'): (0.934, 0.985, 0.642, 0.584, 0.010),
    ('pause_handling, Candor', 'takeover_rate'): (0.935, 0.980, 0.481, 0.662, 0.120),
    ('backchannel', 'takeover_rate'): (0.691, 1.000, 0.636, 0.327, 0.000),
    ('backchannel', 'per_sec'): (0.015, 0.001, 0.001, 0.025, 0.007),
    ('backchannel', 'jsd'): (0.934, 0.957, 0.997, 0.649, 0.980),
    ('smooth_turn_taking', 'takeover_rate'): (0.975, 0.941, 0.336, 0.992, 1.000),
    ('smooth_turn_taking', 'latency_sec'): (0.352, 0.265, 0.953, 0.070, 1.470),
    ('user_interruption', 'takeover_rate'): (0.917, 1.000, 0.867, 1.000, 0.970),
    ('user_interruption', 'latency_sec'): (2.531, 0.257, 1.409, 0.400, 1.500)}
LABELS = {'takeover_rate': 'takeover rate', 'latency_sec': 'latency, s', 'per_sec': 'backchannels a second',
          'jsd': 'JSD', 'stop_sec': 'stop latency, s', 'response_sec': 'response latency, s'}
NOTES = {'pause.json': 'pause_handling', 'turn_taking.json': 'smooth_turn_taking',
         'interrupt.json': 'user_interruption', 'metadata.json': 'overlap'}
TASKS = 'pause_handling', 'backchannel', 'smooth_turn_taking', 'user_interruption', 'overlap'  # as in tables


class Case(NamedTuple):
    """What an assistant did in a sample. Times in seconds."""
    folder: str             # the set of samples
    id: str                 # in it
    task: str               # one of TASKS
    start: float            # of the overlap, or of the interruption
    end: float              # …, or of the user's turn
    n_sec: float
    words: list | None      # [(start, end)] of the assistant; None: it speaks, but what is not known
    heard: list             # [(start, end)] of its speech, the shortest gap between two is 0.1


# ------------------------------------------------------------------------------------------------------------
# samples

def read_cases(folder, vad='webrtc', n=None):
    """
    -> [Case] of Full-Duplex-Bench's samples, the first n; [] if the folder holds other dialogues. Those whose
    task neither their files nor their folder's name tells are left out. Raises ValueError as
    foreign.read_conversations does.
    """
    files = foreign.find_dialogues(folder)
    folders = {id: each['transcript'] for id, each in itertools.islice(sorted(files.items()), n)
               if foreign.is_sample(each.get('transcript'))}
    cases = [read_case(id, path, vad) for id, path in folders.items()]
    return [case for case in cases if case]


def read_case(id, folder, vad):
    """id: the sample's path below the folder of all"""
    there = {name for name in NOTES if os.path.exists(os.path.join(folder, name))}
    parent = os.path.dirname(id) or os.path.basename(os.path.dirname(os.path.abspath(folder)))
    note = next((name for name in NOTES if name in there), None)
    if not note and 'backchannel' not in parent:
        return None
    task = NOTES[note] if note else 'backchannel'
    start, end = foreign.read_note(folder, note)[0] if note else (0.0, 0.0)
    end = start if task == 'smooth_turn_taking' else end
    words = foreign.timed_words(os.path.join(folder, 'output.json'))
    wave = foreign.read_audio(os.path.join(folder, 'output.wav'), foreign.SAMPLE_RATE, 0)
    rate_hz, n_sec = foreign.WINDOW_HZ, len(wave) / foreign.SAMPLE_RATE
    heard = foreign.hear(wave, rate_hz, int(n_sec * rate_hz), vad)
    heard = [(a / rate_hz, b / rate_hz) for a, b in stretches(heard, rate_hz, 0)]
    spans = None if words is None else [(a, b) for _, a, b in words]
    return make_case(parent, os.path.basename(id), task, start, end, n_sec, spans, heard)


def make_case(folder, id, task, start, end, n_sec, words, heard):
    """Of a user_interruption counts what the assistant says after it, as their recogniser hears only that."""
    if task == 'user_interruption':
        words = words and [(a, b) for a, b in words if a >= end - 1e-6]
        heard = [(max(a, end), b) for a, b in heard if b > end]
    return Case(folder, id, task, start, end, n_sec, words if words is not None or heard else [], heard)


def cases_of(conversations):
    """Yields the Cases of conversations, which are cut into samples as for the export."""
    for talk in conversations:
        yield from (case_of(talk, n, sample) for n, sample in enumerate(foreign.samples_of(talk)))


def case_of(talk, n, sample):
    def seconds(frames):
        return tuple(float(frame - sample.start) / talk['rate_hz'] for frame in frames)

    note = sample.note if isinstance(sample.note, dict) else sample.note[0]
    inside = [turn for turn in talk['turns'] if turn['role'] == 'assistant'
              and turn['start'] < sample.end and turn['end'] > sample.since]
    words = [list(words_of(turn)) for turn in inside]
    spans = [seconds(word) for turn in words for word in turn if sample.since <= word[0] < sample.end]
    speaks = talk['speaks']['assistant'][sample.start:sample.end]
    heard = [(a / talk['rate_hz'], b / talk['rate_hz']) for a, b in stretches(speaks, talk['rate_hz'], 0)]
    return make_case(sample.task, f'{talk["id"]}/{n}', NOTES[sample.note_name],
                     *seconds(note['timestamps'] if 'timestamps' in note else note['timestamp']),
                     len(speaks) / talk['rate_hz'], spans if all(words) else None, heard)


def words_of(turn):
    """Yields (start, end) of a turn's words, in frames; without times they are spread evenly over it."""
    if 'words' in turn:
        yield from ((word['start'], word['end']) for word in turn['words'])
        return
    n = len(turn['text'].split())
    edges = np.linspace(turn['start'], turn['end'], n + 1).tolist()
    yield from zip(edges[:n], edges[1:])


# ------------------------------------------------------------------------------------------------------------
# measures

def measure(cases, people=None):
    """
    -> [figures of a set of samples], None where nothing was measured: a dict of folder, task, n, and
        takeover_rate, latency_sec, n_latency (takeovers), n_unknown (samples whose words are not known)
        per_sec, jsd        of task backchannel
        stop_sec, n_stop, response_sec, n_response      of task overlap
    people: {id: their backchannels, in windows}, as icc_gt_distribution.json has them, for the JSD
    """
    groups = {}
    for case in cases:
        groups.setdefault((case.folder, case.task), []).append(case)
    found = []
    for folder, task in sorted(groups, key=lambda key: (TASKS.index(key[1]), key[0])):
        group = groups[folder, task]
        figures = dict(folder=folder, task=task, n=len(group))
        if task == 'overlap':
            stops, responses = ([each for each in times if each is not None]
                                for times in zip(*map(overlap_times, group)))
            figures |= dict(stop_sec=mean(stops), n_stop=len(stops), response_sec=mean(responses),
                            n_response=len(responses))
        else:
            n_unknown = sum(case.words is None for case in group)
            measured = of_backchannels(group, people or {}) if task == 'backchannel' else of_takeovers(group)
            figures |= dict(measured, n_unknown=n_unknown)
        found.append(figures)
    return found


def is_takeover(case):
    """What it said, first word to last; without words, its speech"""
    spans = case.heard if case.words is None else case.words
    if not spans:
        return False
    n_sec = spans[-1][1] - spans[0][0]
    return n_sec >= TURN_SEC - 1e-6 or case.words is not None and len(spans) > TURN_WORDS


def of_takeovers(cases):
    taken = [case for case in cases if is_takeover(case)]
    figures = dict(takeover_rate=len(taken) / len(cases))
    if cases[0].task != 'pause_handling':
        firsts = [(case.heard if case.words is None else case.words)[0][0] for case in taken]
        latencies = [max(first - case.end, 0.0) for first, case in zip(firsts, taken)]
        figures |= dict(latency_sec=mean(latencies), n_latency=len(latencies))
    return figures


def of_backchannels(cases, people):
    rates, distances, taken = [], [], []
    for case in cases:
        is_taken, backchannels = find_backchannels(case)
        taken.append(is_taken)
        rates.append(len(backchannels) / case.n_sec)
        if case.id in people:
            distances.append(distance(backchannels, case.n_sec, people[case.id]))
    return dict(takeover_rate=mean(taken), per_sec=mean(rates), jsd=mean(distances))


def find_backchannels(case):
    """-> (is it a takeover, [(start, end)])"""
    is_taken, backchannels = False, []
    for start, end in case.heard:
        if end - start > LONG_SEC:
            return True, backchannels
        n_word = sum(a <= end and b > start for a, b in case.words or ())
        is_taken = end - start >= TURN_SEC or n_word >= TURN_WORDS
        backchannels.append((start, end))
    return is_taken, backchannels


def distance(backchannels, n_sec, people):
    """Backchannels, in seconds of n_sec, and people's, a number for each of any number of windows of the same
    time -> JSD, 0 to 0.83; 1 without a backchannel"""
    if not backchannels:
        return 1.0
    ours = np.full(int(n_sec / WINDOW_SEC) + 1, 1e-10)
    for start, end in backchannels:
        ours[int(start / WINDOW_SEC):int(end / WINDOW_SEC) + 1] += 1
    theirs = np.interp(np.linspace(0, 1, len(ours)), np.linspace(0, 1, len(people)), people)
    p, q = ours / ours.sum(), theirs / theirs.sum()
    between = (p + q) / 2
    divergences = [float(np.sum(np.where(each > 0, each * np.log(np.maximum(each, 1e-300) / between), 0)))
                   for each in (p, q)]
    return max(sum(divergences) / 2, 0.0) ** 0.5


def overlap_times(case):
    """-> (stop latency, response latency), in seconds; None if it did not speak, or does not speak again"""
    said = []
    for start, end in case.heard:
        if said and start - said[-1][1] <= JOIN_SEC:
            start = said.pop()[0]
        said.append((start, end))
    until = next((b for a, b in said if a <= case.start < b), None)
    again = next((a for a, _ in said if a > case.end), None)
    return until and min(until, case.end) - case.start, again and again - case.end


# ------------------------------------------------------------------------------------------------------------
# beside the others

def read_people(folder):
    """icc_gt_distribution.json, which their repository has, if it was put into the folder"""
    path = os.path.join(folder, foreign.HUMAN)
    return read_json(path) if os.path.exists(path) else {}


def table(found):
    """What measure returned -> lines, what was measured beside the published; '' if there are no samples"""
    rows = []
    for figures in found:
        name, n = figures['task'], figures['n']
        name += ', Candor' if name == 'pause_handling' and 'candor' in figures['folder'].lower() else ''
        for key, label in LABELS.items():
            if key in figures:
                n_case = figures.get(f'n_{key.removesuffix("_sec")}', n)
                rows.append([f'{figures["folder"]}: {label}', f'{n_case}', as_text(figures[key]),
                             *map(as_text, PUBLISHED.get((name, key), [None] * len(SYSTEMS)))])
    if not rows:
        return ''
    head = 'Full-Duplex-Bench, by its definitions', 'n', 'measured', *(f'{system}*' for system in SYSTEMS)
    rows = [head, *rows]
    wide = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '.join([row[0].ljust(wide[0]), *map(str.rjust, row[1:], wide[1:])]) for row in rows]
    lines.append("* theirs, from their repository, on their recordings; for v1.5 none was found")
    n_unknown = sum(figures.get('n_unknown', 0) for figures in found)
    if n_unknown:
        lines.append(f'the words of {n_unknown} samples are not known: there a takeover is {TURN_SEC:g} s '
                     'of speech, as it is heard')
    lines.append("left out, as a language model judges them: the score of interruptions, v1.5's behaviours")
    return '\n'.join(lines)


def as_text(value):
    return '-' if value is None else f'{value:.3f}'
