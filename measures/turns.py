"""
Who takes the turn, when, and who lets whom speak: a conversation on two channels as numbers.

    frame       0         10        20        30        40        50        60
    user        ..░░░░░░░-------░░░░..................░░...................░░░░░░░░░░░░░░░░....
    assistant   ..........▓▓..........▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓..........▓▓▓▓▓................
                          │           │               │                    └ interrupted at 59, it yielded after 4 frames
                          │           └ response: 2   └ a backchannel, it talks on
                          └ a false start, in the user's pause

A conversation is a dict, the same whether a checkpoint had it, another system, or two people
(measures/foreign.py):

    id, rate_hz, n_frame    every time below is in whole frames at rate_hz
    turns                   [role, start, end (exclusive), text, words where known], by start: as it happened
    speaks                  user, assistant -> bool [n_frame]: who makes a sound, pauses within turns left out
    expected                the assistant's turns in the reference; None where there is no reference
    wave, sample_rate       float32 [n_sample, 2], user left, assistant right; or None
    chunk_frames            frames a chunk; 0: it was not made in chunks

The paper (OmniFlatten, arXiv:2410.17799, v2, table 4) says Acc@K: at the K-th token after the user's last
meaningful one the assistant speaks; at the K-th after the user's first it is silent. Whether that is at or by
the K-th is not said: both are given.
"""
import numpy as np

from flatten import ROLES

KS = 1, 5, 10, 25               # the paper's
MAX_K = 40                      # how far a curve over K goes: 1.6 s
# no answer by then is none (paper), and who talks on into the other's turn for so long has not yielded
PATIENCE_SEC = 1.5
JOIN_SEC = 0.4                  # shorter gaps don't end a stretch of speech
PAUSE_SEC = 0.2                 # shorter gaps in the user's turn are no pause that could be taken for its end
OVERLAP_SEC = 0.24              # people, too, begin this much before the other has ended: early, not false
# up to this much, while the assistant speaks, is no wish to speak
BACKCHANNEL_SEC, BACKCHANNEL_WORDS = 1.0, 3


def conversation(id, rate_hz, user, decoded, silence_codes, chunk_frames=0, expected=None, wave=None,
                 sample_rate=0):
    """user: the user's turns; decoded: the dialogue that sample.converse returned -> the conversation that
    they were. A channel speaks where a turn of it has a code that is not one of silence_codes."""
    turns = sorted([*user, *(turn for turn in decoded['turns'] if turn['role'] == 'assistant')],
                   key=lambda turn: turn['start'])
    n_frame, speaks = len(decoded['user']), {}
    for role in ROLES:
        speaks[role] = np.zeros(n_frame, bool)
        for turn in turns:
            if turn['role'] == role:
                of = slice(turn['start'], turn['end'])
                speaks[role][of] = ~np.isin(decoded[role][of], silence_codes)
    return dict(id=id, rate_hz=rate_hz, n_frame=n_frame, turns=turns, speaks=speaks, expected=expected,
                wave=wave, sample_rate=sample_rate, chunk_frames=chunk_frames)


def stretches(speaks, rate_hz, join_sec=JOIN_SEC):
    """bool [n_frame] -> [(start, end)] of the speech; gaps shorter than join_sec don't end a stretch."""
    joined = []
    for start, end in np.flatnonzero(np.diff(speaks, prepend=False, append=False)).reshape(-1, 2).tolist():
        if joined and start - joined[-1][1] < join_sec * rate_hz:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def user_turns(conversation, said, patience):
    """The user's turns. Where nobody noted them but a detector of speech, those between which the assistant
    had its chance and kept silent are one, with a pause in it."""
    turns = [dict(turn) for turn in conversation['turns'] if turn['role'] == 'user']
    # from behind: what was joined can be joined again
    for one, other in reversed(list(zip(turns, turns[1:]))):
        if conversation['expected'] is None and other['start'] - one['end'] < patience and not any(
                a < other['start'] and b > one['end'] for a, b in said):
            one.update(end=other['end'], text=f'{one["text"]} {other["text"]}'.strip())
            turns.remove(other)
    return turns


def assess(conversation):
    """
    What the assistant did about each of the user's turns: a list of dicts, times in frames, with
      start, end   of the user's turn; text: what was said
      kind         'interruption': the assistant was speaking when it began; 'backchannel': so it was, and the user only said
                   "mhm" (the reference's assistant talks on past it; without one: short, see
                   BACKCHANNEL_SEC); else 'question'
      response     from the end of the turn to the assistant's first sound before the next turn; below 0 if it began in the last
                   OVERLAP_SEC and went on; None: no such sound, or nobody waited for it (a backchannel)
      expects      is an answer due: the reference has one; without a reference, there were PATIENCE_SEC of time for one
      false_start  frame at which the assistant began to speak inside the turn, or had talked on for PATIENCE_SEC since it began; or None
      pauses       [(start, end, taken)]: the user's pauses inside the turn, did the assistant begin to speak there
      unprompted   frame at which it began a second time after its answer, before the user's next turn; or None
      yielded      from the start of the turn until the assistant was silent; None where it was not speaking, or never stopped
      was_speaking the assistant, when the turn began
      goes_on      has the assistant more to say: the reference's talks on for a second after the turn (without a reference: who knows, True)
      speaks_from_start, speaks_from_end   bool [MAX_K]: the assistant, from the start and from the end of the turn on
      said         the assistant's turns that begin between this turn's start and the next's
      due          the reference's turn that answers; None where there is none, or the user cuts it off
    """
    rate_hz, n_frame, expected = conversation['rate_hz'], conversation['n_frame'], conversation['expected']
    patience, overlap = round(PATIENCE_SEC * rate_hz), round(OVERLAP_SEC * rate_hz)
    said = stretches(conversation['speaks']['assistant'], rate_hz)
    turns = user_turns(conversation, said, patience)
    speaks = np.zeros(n_frame + MAX_K, bool)
    for a, b in said:
        speaks[a:b] = True
    outcomes = []
    for i, turn in enumerate(turns):
        start, end = turn['start'], turn['end']
        until = turns[i + 1]['start'] if i + 1 < len(turns) else n_frame
        sounding = next(((a, b) for a, b in said if a < start < b), None)      # as the user begins
        kind = 'interruption' if sounding else 'question'
        if expected is None:
            is_short = end - start < BACKCHANNEL_SEC * rate_hz and len(
                turn['text'].split()) <= BACKCHANNEL_WORDS
            if sounding and is_short:
                kind = 'backchannel'
        elif any(a['start'] < start and end < a['end'] for a in expected):
            kind = 'backchannel'
        begun = [(a, b) for a, b in said if start < a < end]
        early = next(((a, b) for a, b in begun if a >= end - overlap and b > end), None)
        after = [(a, b) for a, b in said if end <= a < until]
        answer = None if kind == 'backchannel' else early or next(iter(after), None)
        again = [a for a, b in after if (a, b) != answer]
        false_start = next((a for a, b in begun if (a, b) != early), None)
        if sounding and kind != 'backchannel' and sounding[1] - start > patience:
            false_start = start + patience
        silent = stretches(~conversation['speaks']['user'][start:end], rate_hz, 0)
        pauses = [(start + a, start + b)
                  for a, b in silent
                  if b - a >= PAUSE_SEC * rate_hz and 0 < a and start + b < end]
        due = None if expected is None else next((a for a in expected if start < a['start'] <= until), None)
        outcomes.append(
            dict(
                kind=kind, start=start, end=end, text=turn['text'], expects=kind != 'backchannel'
                and (due is not None if expected is not None else answer is not None or until < n_frame
                     or n_frame - end >= patience), response=answer[0] - end if answer else None,
                false_start=false_start, pauses=[
                    (a, b, any(a < at <= b for at, _ in begun)) for a, b in pauses
                ], unprompted=again[0] if answer and again else None, was_speaking=sounding is not None,
                yielded=sounding[1] - start if sounding and sounding[1] < n_frame else None,
                goes_on=expected is None
                or any(a['start'] < start and a['end'] >= end + rate_hz for a in expected),
                speaks_from_start=speaks[start:start + MAX_K], speaks_from_end=speaks[end:end + MAX_K], said=[
                    t for t in conversation['turns']
                    if t['role'] == 'assistant' and start <= t['start'] < until
                ], due=due if due is not None and due['end'] <= until else None))
    return outcomes


def accuracy(outcomes, k, yields=False, exactly=False):
    """Acc@k -> (hits, cases): has the assistant answered within the first k frames after the user's end; or
    (yields) has it, interrupted, fallen silent within the first k after the user's start. exactly: does it
    speak, is it silent, at the k-th (of a turn shorter than that at its last: afterwards it may answer)."""
    if yields:
        cases = [f for f in outcomes if f['kind'] == 'interruption']
        hits = [
            f for f in cases if f['yielded'] is not None and f['yielded'] < k
            and not (exactly and f['speaks_from_start'][min(k, f['end'] - f['start']) - 1])]
    else:
        cases = [f for f in outcomes if f['expects']]
        hits = [
            f for f in cases if f['response'] is not None and f['response'] < k
            and not (exactly and not f['speaks_from_end'][k - 1])]
    return len(hits), len(cases)


def mean(values):
    values = list(values)
    return float(np.mean(values)) if values else None


def summarise(outcomes, rate_hz):
    """outcomes of all conversations -> {figure: value}. A share is of those turns that it speaks of; None where
    there are none."""
    patience = PATIENCE_SEC * rate_hz
    due = [f for f in outcomes if f['expects']]
    responses = [
        max(f['response'], 0) for f in due if f['response'] is not None and f['response'] <= patience]
    cut = [f for f in outcomes if f['kind'] == 'interruption']
    yields = [f['yielded'] for f in cut if f['yielded'] is not None and f['yielded'] <= patience]
    mhm = [f for f in outcomes if f['kind'] == 'backchannel' and f['goes_on'] and f['was_speaking']]
    pauses = [taken for f in outcomes for *_, taken in f['pauses']]

    def acc(yields):
        for exactly in (True, False):
            for k in KS:
                hits, n = accuracy(outcomes, k, yields, exactly)
                yield f'{"user" if yields else "assistant"}_acc_{"at" if exactly else "by"}_{k}', hits / n if n else None

    def ms(values, average):
        return 1e3 * float(average(values)) / rate_hz if values else None

    return dict(
        n_turn=len(outcomes),
        n_answer_due=len(due), n_interruption=len(cut), n_backchannel=len(mhm), n_pause=len(pauses),
        **dict(acc(yields=False)), response_ms=ms(responses,
                                                  np.mean), response_median_ms=ms(responses, np.median),
        no_answer_rate=1 - len(responses) / len(due) if due else None,
        false_start_rate=mean(f['false_start'] is not None for f in outcomes if f['kind'] != 'backchannel'),
        pause_taken_rate=mean(pauses), unprompted_rate=mean(f['unprompted'] is not None for f in due),
        **dict(acc(yields=True)), yield_ms=ms(yields, np.mean), yield_median_ms=ms(yields, np.median),
        no_yield_rate=1 - len(yields) / len(cut) if cut else None,
        backchannel_stopped_rate=mean(f['yielded'] is not None and f['yielded'] <= f['end'] - f['start']
                                       + rate_hz / 2 for f in mhm))


def who_speaks(conversations):
    """{figure: value} over all of them: shares of the time, and the gaps where the floor changes hands
    (medians, below 0: overlap)."""
    total = both = neither = 0
    gaps = {('user', 'assistant'): [], ('assistant', 'user'): []}
    for c in conversations:
        user, assistant = (np.zeros(c['n_frame'], bool) for _ in ROLES)
        spoken = []
        for role, joined in (('user', user), ('assistant', assistant)):
            for start, end in stretches(c['speaks'][role], c['rate_hz']):
                joined[start:end] = True
                spoken.append((start, end, role))
        total, both, neither = total + c['n_frame'], both + int((user & assistant).sum()), neither + int(
            (~user & ~assistant).sum())
        spoken.sort()
        for (_, end, one), (start, _, other) in zip(spoken, spoken[1:]):
            if one != other:
                gaps[one, other].append(1e3 * (start - end) / c['rate_hz'])
    return dict(
        n_conversation=len(conversations), sec=sum(c['n_frame'] / c['rate_hz'] for c in conversations),
        both_speak=both / total if total else None, neither_speaks=neither / total if total else None, **{
            f'gap_{one}_to_{other}_ms': float(np.median(values)) if values else None
            for (one, other), values in gaps.items()})
