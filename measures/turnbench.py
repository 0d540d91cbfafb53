"""
A submission for TurnBench (github.com/SesameAILabs/turnbench, docs/SUBMISSION_FORMAT.md): when a model that
listens to one speaker of a recorded conversation takes the turn. It listens twice, once to each.

    speaker_1    ░░░░░░░░░░░░       ░░░░░░░░░░░░
    the model                ▓▓▓▓▓       ▓▓▓▓▓▓▓        it listens to speaker_1, in the seat of speaker_2
                             │           └ begins in speech: an interruption by speaker_2
                             └ begins in silence: speaker_1's turn has ended, eot

A time is one by which all audio was heard that the decision depended on. What the model says anywhere in a
chunk may depend on all of the user's chunk, so the time is the chunk's end, and the codec's look-ahead later:
an assistant that begins in frame 23, with chunks of 10 frames at 25 Hz and 80 ms of look-ahead, decided at
30 / 25 + 0.08 = 1.28 s.
"""
import numpy as np

from measures.turns import stretches

JOIN_SEC = 0.5          # shorter gaps are no silence


def events(conversation, lookahead_sec):
    """-> (eot, interruption): the times in seconds, rising, at which the assistant decided to speak"""
    rate_hz, n_frame, speaks = (conversation[key] for key in ('rate_hz', 'n_frame', 'speaks'))
    chunk, user = conversation['chunk_frames'], np.zeros(n_frame, bool)
    for start, end in stretches(speaks['user'], rate_hz, JOIN_SEC):
        user[start:end] = True
    times = {False: set(), True: set()}     # did the user speak when it decided
    for start, _ in stretches(speaks['assistant'], rate_hz, JOIN_SEC):
        heard = (start // chunk + 1) * chunk if chunk else start + 1    # so many frames
        sec = round(heard / rate_hz + lookahead_sec, 3)
        if sec <= n_frame / rate_hz:
            times[bool(user[heard - 1])].add(sec)
    return sorted(times[False]), sorted(times[True])


def submission(pairs, lookahead_sec):
    """pairs: [(the model listens to speaker 1, to speaker 2)], conversations of one id -> the submission"""
    predictions = []
    for pair in pairs:
        (eot_1, by_2), (eot_2, by_1) = (events(talk, lookahead_sec) for talk in pair)
        predictions.append(dict(conversation_id=pair[0]['id'], speaker_1=dict(eot=eot_1, interruption=by_1),
                                speaker_2=dict(eot=eot_2, interruption=by_2)))
    return dict(schema_version=1, predictions=predictions)
