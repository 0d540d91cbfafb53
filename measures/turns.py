"""
Who takes the turn, when, and who lets whom speak: a conversation on two channels as numbers.

    frame       0         10        20        30        40        50        60
    user        ..░░░░░░░-------░░░░..................░░...................░░░░░░░░░░░░░░░░....
    assistant   ..........▓▓..........▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓..........▓▓▓▓▓................
                          │           │               │                    └ interrupted at 59, yields after 4
                          │           └ response: 2   └ a backchannel, it talks on
                          └ a false start, in the user's pause

The words used here:

    stretch         speech without a gap of JOIN_SEC or more
    turn            what one side says until it is the other's turn; it may have pauses in it
    interruption    a turn that the user begins while the reference's assistant speaks (a barge-in): it should
                    yield. So all models have the same interruptions, whatever they say. Without a reference:
                    while the assistant itself speaks
    backchannel     the same, but the user only says "mhm" and does not want the turn
    question        every other turn of the user
    reference       the dialogue of the data, from which the user's side was taken

A conversation is a dict, the same for a checkpoint, another system, or two people (measures/foreign.py):

    id, rate_hz, n_frame    all times below are whole frames at rate_hz
    turns                   [role, start, end (exclusive), text, words where known], by start
    speaks                  user, assistant -> bool [n_frame]: who makes a sound, pauses left out
    expected                the assistant's turns in the reference; None where there is no reference
    wave, sample_rate       float32 [n_sample, 2], user left, assistant right; or None
    chunk_frames            frames a chunk; 0: it was not made in chunks

The paper (OmniFlatten, arXiv:2410.17799, v2, table 4) defines Acc@K: at the K-th token after the user's last
meaningful one the assistant speaks; at the K-th after the user's first it is silent. It does not say whether
"at" means at that token or up to it, so both are given.
"""
import numpy as np

from common.levels import is_silent
from flatten import ROLES, START

KS = 1, 5, 10, 25               # the paper's
MAX_K = 40                      # how far a curve over K goes: 1.6 s at 25 Hz
PATIENCE_SEC = 1.5              # an answer has to come within this time (paper), and so does a yield
JOIN_SEC = 0.4                  # shorter gaps don't end a stretch of speech
PAUSE_SEC = 0.2                 # shorter gaps in the user's turn are no pause that could be taken for its end
OVERLAP_SEC = 0.24              # people, too, begin this much before the other has ended: early, not false
# without a reference, a turn is a backchannel if it begins while the assistant speaks, is shorter than this,
# and has at most so many words
BACKCHANNEL_SEC, BACKCHANNEL_WORDS = 1.0, 3
# an assistant was stopped by a backchannel if it falls silent up to so long after it; if the reference goes
# on for less than the second, it had ended anyway
STOPPED_SEC, GOES_ON_SEC = 0.3, 0.5


def conversation(id, rate_hz, user, decoded, silence_codes, chunk_frames=0, expected=None, wave=None,
                 sample_rate=0):
    """user: the user's turns; decoded: a dialogue that decode.converse returned -> the conversation that they
    had. A channel speaks where one of its turns has a frame that is not among silence_codes."""
    assistant = [turn for turn in decoded['turns'] if turn['role'] == 'assistant']
    turns, n_frame = sorted([*user, *assistant], key=START), len(decoded['user'])
    speaks = {role: np.zeros(n_frame, bool) for role in ROLES}
    for turn in turns:
        frames = slice(turn['start'], turn['end'])
        speaks[turn['role']][frames] = ~is_silent(decoded[turn['role']][frames], silence_codes)
    return dict(id=id, rate_hz=rate_hz, n_frame=n_frame, turns=turns, speaks=speaks, expected=expected,
                wave=wave, sample_rate=sample_rate, chunk_frames=chunk_frames)


def with_user_of(reference, decoded, codec, chunk_frames, wave=None):
    """-> the conversation that a model had with the user of a reference, which is a dialogue of the data"""
    user, expected = ([turn for turn in reference['turns'] if turn['role'] == role] for role in ROLES)
    return conversation(reference['id'], codec.rate_hz, user, decoded, codec.silence_codes, chunk_frames,
                        expected, wave, codec.sample_rate)


def stretches(speaks, rate_hz, join_sec=JOIN_SEC):
    """bool [n_frame] -> [(start, end)] of the speech; gaps shorter than join_sec don't end a stretch."""
    joined = []
    for start, end in np.flatnonzero(np.diff(speaks, prepend=False, append=False)).reshape(-1, 2).tolist():
        if joined and start - joined[-1][1] < join_sec * rate_hz:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def user_turns(conversation, said):
    """The user's turns. said: the assistant's stretches. A detector of speech, unlike a transcript, cuts a
    turn at each pause. So without a reference, turns that are close to each other are joined if the assistant
    does not speak between them, and the first is no backchannel ("mhm", just before an answer ends)."""
    turns = [dict(turn) for turn in conversation['turns'] if turn['role'] == 'user']
    patience = round(PATIENCE_SEC * conversation['rate_hz'])
    for turn, following in reversed(list(zip(turns, turns[1:]))):   # backwards: they can be joined again
        has_spoken = any(start < following['start'] and end > turn['end'] for start, end in said)
        is_close = following['start'] - turn['end'] < patience
        kind = kind_of(turn, said, conversation['expected'], conversation['rate_hz'])
        if conversation['expected'] is None and is_close and not has_spoken and kind != 'backchannel':
            turn.update(end=following['end'], text=f'{turn["text"]} {following["text"]}'.strip())
            turns.remove(following)
    return turns


def assess(conversation):
    """
    What the assistant did about each of the user's turns: a list of dicts, times in frames, with
      start, end    of the user's turn; text: what was said
      kind          'interruption', 'backchannel' or 'question' (see kind_of)
      response      from the end of the turn to the assistant's first sound before the next turn; below 0 if
                    it began in the last OVERLAP_SEC and went on; None: no such sound, or a backchannel
      expects       is an answer due: the reference has one; without a reference, there were PATIENCE_SEC
      false_start   frame at which the assistant began to speak inside the turn, or had talked on for
                    PATIENCE_SEC since it began; or None
      pauses        [(start, end, taken)] of the user in the turn; taken: the assistant began to speak there
      unprompted    frame at which it began again after its answer, before the user's next turn; or None
      yielded       from the start of the turn until the assistant was silent; None if it was not speaking
                    (an interruption, too, may find it silent), or never stopped
      was_speaking  the assistant, when the turn began
      goes_on       has the assistant more to say: the reference's talks on for GOES_ON_SEC after the turn
                    (without a reference nobody knows: True)
      stopped       is it a backchannel, and the assistant spoke, had more to say, and is silent within
                    STOPPED_SEC after it
      speaks_from_start, speaks_from_end    bool [MAX_K]: the assistant, from the turn's start and end on
      said          the assistant's turns that begin between this turn's start and the next's
      due           the reference's turn that answers; None if there is none, or the user cuts it off
    """
    said = stretches(conversation['speaks']['assistant'], conversation['rate_hz'])
    speaks = np.zeros(conversation['n_frame'] + MAX_K, bool)
    for start, end in said:
        speaks[start:end] = True
    turns = user_turns(conversation, said)
    untils = [turn['start'] for turn in turns[1:]] + [conversation['n_frame']]
    return [assess_turn(conversation, turn, until, said, speaks) for turn, until in zip(turns, untils)]


def assess_turn(conversation, turn, until, said, speaks):
    """One turn of the user; the next begins at `until`. said: the assistant's stretches. speaks: bool, a
    value for each frame, of the same."""
    rate_hz, n_frame, expected = (conversation[key] for key in ('rate_hz', 'n_frame', 'expected'))
    start, end, patience = turn['start'], turn['end'], round(PATIENCE_SEC * rate_hz)
    sounding = sounding_at(start, said)     # in which the user begins
    kind = kind_of(turn, said, expected, rate_hz)
    begun = [(a, b) for a, b in said if start < a < end]
    early = next(((a, b) for a, b in begun if a >= end - round(OVERLAP_SEC * rate_hz) and b > end), None)
    after = [(a, b) for a, b in said if end <= a < until]
    answer = None if kind == 'backchannel' else early or next(iter(after), None)
    again = [a for a, b in after if (a, b) != answer]
    false_start = next((a for a, b in begun if (a, b) != early), None)
    if sounding and kind != 'backchannel' and sounding[1] - start > patience:
        false_start = start + patience
    due = expects = None
    if expected is None:        # without a reference: it answered, or had the time to
        expects = answer is not None or until < n_frame or n_frame - end >= patience
    else:
        due = next((a for a in expected if start < a['start'] <= until), None)
        expects = due is not None
    goes_on = expected is None or any(
        a['start'] < start and a['end'] >= end + GOES_ON_SEC * rate_hz for a in expected)
    yielded = sounding[1] - start if sounding and sounding[1] < n_frame else None
    is_stopped = in_time(yielded, end - start + STOPPED_SEC * rate_hz)
    return dict(
        kind=kind, start=start, end=end, text=turn['text'],
        expects=kind != 'backchannel' and expects,
        response=answer[0] - end if answer else None,
        false_start=false_start,
        pauses=pauses_in(conversation, turn, [a for a, _ in begun]),
        unprompted=again[0] if answer and again else None,
        was_speaking=sounding is not None,
        yielded=yielded,
        goes_on=goes_on,
        stopped=kind == 'backchannel' and sounding is not None and goes_on and is_stopped,
        speaks_from_start=speaks[start:start + MAX_K], speaks_from_end=speaks[end:end + MAX_K],
        said=[t for t in conversation['turns'] if t['role'] == 'assistant' and start <= t['start'] < until],
        due=due if due is not None and due['end'] <= until else None)


def sounding_at(frame, said):
    """-> of the assistant's stretches, the one that has begun and not ended; or None"""
    return next(((a, b) for a, b in said if a < frame < b), None)


def kind_of(turn, said, expected, rate_hz):
    """What a turn of the user is. With a reference, its assistant decides (expected: its turns): the user
    begins in one of its turns, and it talks on past the user's end, or not. Without one, the assistant does
    (said: its stretches), and how short the turn is."""
    start, end = turn['start'], turn['end']
    if expected is None:
        is_over = sounding_at(start, said) is not None
        is_short = end - start < BACKCHANNEL_SEC * rate_hz and len(turn['text'].split()) <= BACKCHANNEL_WORDS
    else:
        spoken_into = [a for a in expected if a['start'] < start < a['end']]
        is_over, is_short = bool(spoken_into), any(end < a['end'] for a in spoken_into)
    return ('backchannel' if is_short else 'interruption') if is_over else 'question'


def pauses_in(conversation, turn, begun):
    """-> [(start, end, taken)] of the user's pauses in a turn. begun: frames at which the assistant began to
    speak in that turn."""
    start, end = turn['start'], turn['end']
    pauses = []
    for a, b in stretches(~conversation['speaks']['user'][start:end], conversation['rate_hz'], 0):
        if b - a >= PAUSE_SEC * conversation['rate_hz'] and 0 < a and start + b < end:
            taken = any(start + a < at <= start + b for at in begun)
            pauses.append((start + a, start + b, taken))
    return pauses


def accuracy(outcomes, k, yields=False, exactly=False):
    """
    Acc@k -> (hits, cases): of the answers due, how many began within k frames after the user's end.
        yields      of the interruptions, how many found the assistant silent within k frames after the
                    user's start
        exactly     the assistant also has to speak, or be silent, at the k-th frame itself (in a shorter turn
                    at its last frame, as the assistant may answer afterwards)
    """
    if yields:
        cases = [turn for turn in outcomes if turn['kind'] == 'interruption']
        hits = [turn for turn in cases if turn['yielded'] is not None and turn['yielded'] < k]
        if exactly:
            hits = [turn for turn in hits
                    if not turn['speaks_from_start'][min(k, turn['end'] - turn['start']) - 1]]
    else:
        cases = [turn for turn in outcomes if turn['expects']]
        hits = [turn for turn in cases if turn['response'] is not None and turn['response'] < k]
        if exactly:
            hits = [turn for turn in hits if turn['speaks_from_end'][k - 1]]
    return len(hits), len(cases)


def is_well_taken(turn, rate_hz):
    """
    Did the assistant deal well with a turn of the user, one of assess? It talks on at a backchannel, if it
    has more to say. In any other turn it starts neither falsely nor in a pause, begins the answer that is due
    within 10 frames of the user's end, and is silent within 10 frames of the start of an interruption.
    """
    if turn['kind'] == 'backchannel':
        return not turn['stopped']
    is_early = turn['false_start'] is not None or any(taken for *_, taken in turn['pauses'])
    is_late = turn['expects'] and not in_time(turn['response'], 9)
    is_cut = turn['kind'] == 'interruption' and turn['was_speaking']
    talks_over = is_cut and not in_time(turn['yielded'], 9)
    return not (is_early or is_late or talks_over)


def mean(values):
    values = list(values)
    return float(np.mean(values)) if values else None


def summarise(outcomes, rate_hz):
    """outcomes of all conversations -> {figure: value}. A rate is a share of the turns that it is about; None
    if there are no such turns."""
    patience = PATIENCE_SEC * rate_hz
    due = [turn for turn in outcomes if turn['expects']]
    cut = [turn for turn in outcomes if turn['kind'] == 'interruption']
    backchannels = [turn for turn in outcomes if turn['kind'] == 'backchannel']
    over = [turn for turn in backchannels if turn['goes_on']]
    talked_over = [turn for turn in over if turn['was_speaking']]
    others = [turn for turn in outcomes if turn['kind'] != 'backchannel']
    responses = [max(turn['response'], 0) for turn in due if in_time(turn['response'], patience)]
    yields = [turn['yielded'] for turn in cut if in_time(turn['yielded'], patience)]
    pauses = [taken for turn in outcomes for *_, taken in turn['pauses']]

    def ms(values, average):
        return 1e3 * float(average(values)) / rate_hz if values else None

    return dict(
        n_turn=len(outcomes), n_answer_due=len(due), n_pause=len(pauses),
        n_interruption=len(cut), n_interruption_speaking=sum(turn['was_speaking'] for turn in cut),
        n_backchannel=len(over), n_backchannel_speaking=len(talked_over),
        n_ran_on=sum(turn['was_speaking'] for turn in outcomes if turn['kind'] == 'question'),
        **accuracies(outcomes, 'assistant', yields=False),
        response_ms=ms(responses, np.mean), response_median_ms=ms(responses, np.median),
        no_answer_rate=1 - len(responses) / len(due) if due else None,
        false_start_rate=mean(turn['false_start'] is not None for turn in others),
        pause_taken_rate=mean(pauses),
        well_taken_rate=mean(is_well_taken(turn, rate_hz) for turn in outcomes),
        unprompted_rate=mean(turn['unprompted'] is not None for turn in due),
        **accuracies(outcomes, 'user', yields=True),
        yield_ms=ms(yields, np.mean), yield_median_ms=ms(yields, np.median),
        no_yield_rate=1 - len(yields) / len(cut) if cut else None,
        backchannel_stopped_rate=mean(turn['stopped'] for turn in talked_over),
        **penalty_times(cut + talked_over, rate_hz))


def penalty_times(outcomes, rate_hz):
    """
    -> SID-Bench's figures (arXiv:2603.24144), of interruptions and backchannels into which the assistant
    speaks. What each costs the user, in seconds:
        stopped by an interruption      the time until it stopped
        not, before that was over       all of the interruption
        stopped by a backchannel        all of the backchannel, as the conversation is derailed
        not                             nothing
    There a clip of the user's speech is what a detector hears; here the user's turn is that clip, and an
    interruption wants the turn from its start.
    """
    costs, false_stops, delays = [], [], []
    for turn in [turn for turn in outcomes if turn['was_speaking']]:
        n_sec = (turn['end'] - turn['start']) / rate_hz
        is_stopped = in_time(turn['yielded'], turn['end'] - turn['start'])
        if turn['kind'] == 'backchannel':
            false_stops.append(is_stopped)
            costs.append(n_sec if is_stopped else 0.0)
        else:
            delays += [turn['yielded'] / rate_hz] if is_stopped else []
            costs.append(turn['yielded'] / rate_hz if is_stopped else n_sec)
    return dict(penalty_sec=mean(costs), false_stop_rate=mean(false_stops), stop_delay_sec=mean(delays))


def in_time(n_frame, limit):
    return n_frame is not None and n_frame <= limit


def accuracies(outcomes, role, yields):
    """-> {'assistant_acc_at_5': share, …} for each of KS, at that frame and by it"""
    figures = {}
    for exactly in (True, False):
        for k in KS:
            hits, n = accuracy(outcomes, k, yields, exactly)
            figures[f'{role}_acc_{"at" if exactly else "by"}_{k}'] = hits / n if n else None
    return figures


def who_speaks(conversations):
    """-> {figure: value} over all of them: shares of the time, and the gaps between one's end and the other's
    start (medians; below 0: they overlap)."""
    total = both = neither = 0
    gaps = {('user', 'assistant'): [], ('assistant', 'user'): []}
    for talk in conversations:
        speaks = {role: np.zeros(talk['n_frame'], bool) for role in ROLES}
        spans = []
        for role in ROLES:
            for start, end in stretches(talk['speaks'][role], talk['rate_hz']):
                speaks[role][start:end] = True
                spans.append((start, end, role))
        total += talk['n_frame']
        both += int((speaks['user'] & speaks['assistant']).sum())
        neither += int((~speaks['user'] & ~speaks['assistant']).sum())
        spans.sort()
        for (_, end, role), (start, _, next_role) in zip(spans, spans[1:]):
            if role != next_role:
                gaps[role, next_role].append(1e3 * (start - end) / talk['rate_hz'])
    medians = {f'gap_{role}_to_{other}_ms': float(np.median(values)) if values else None
               for (role, other), values in gaps.items()}
    return dict(n_conversation=len(conversations),
                sec=sum(talk['n_frame'] / talk['rate_hz'] for talk in conversations),
                both_speak=both / total if total else None, neither_speaks=neither / total if total else None,
                **medians)
