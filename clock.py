"""
Streams on the clock in the ways of the neighbours (layouts.py, WAYS): how each is laid in chunks, and found
again. A step is a chunk; NeMo's and Moshi's are 80 ms.

    text@turn       NeMo    . . <|begin|> hel lo . . <|eot|> .      the turn lasts from <|begin|> to <|eot|>
    text@word       Moshi   . <|epad|> hel lo . <|epad|> you . . .      each word when it is said
    state                   n-irq n-irq irq irq n-irq                   was the assistant interrupted?
    speech +0 +1 +1         codes of one frame, the second and third a step late
    speech@dedup            3 3 3 8 -> 3 8                              SyncLLM
"""
from bisect import bisect_left

import numpy as np

from common.record import START


def turns_of(dialogue, role):
    return sorted([turn for turn in dialogue['turns'] if turn['role'] == role], key=START)


def find_turns(streams, n, n_frame, vocab):
    """-> the turns that a stream of these tells of; None where there is no such. streams: name -> ids (N
    steps, tokens a step); n: frames a step"""
    if 'state' in streams:
        return find_stops(streams['state'].reshape(-1), n, vocab)
    if 'assistant.text@turn' in streams:
        return [dict(role='assistant', start=start, end=end, text=vocab.decode(text))
                for start, end, text in find_marked(streams['assistant.text@turn'], n, n_frame, vocab)]
    if 'assistant.text@word' in streams:
        found = find_words(streams['assistant.text@word'], n, n_frame, vocab)
        return [dict(role='assistant', start=words[0]['start'], end=words[-1]['end'],
                     text=' '.join(word['text'] for word in words), words=words) for words in found]
    return None


# ------------------------------------------------------------------------------------------------------------
# text@turn and speech@turn

def to_step(frame, n):
    """Frames -> steps of n frames, to the nearest, a half upwards, as NeMo rounds."""
    return (2 * frame + n) // (2 * n)


def lay_turns(dialogue, role, n_chunk, m, n, vocab):
    """
    -> the text stream, int32 [n_chunk * m], and how many tokens were lost. As in NeMo's DuplexS2SDataset
    the text goes on behind the end of its turn until another begins; <|eot|> takes the place of what stands
    there.
    """
    stream = np.full(n_chunk * m, vocab.control['<|silent_text|>'], np.int32)
    n_text = 0
    for turn in turns_of(dialogue, role):
        tokens, at = vocab.encode(turn['text']), to_step(turn['start'], n) * m
        laid = [vocab.control['<|begin|>'], *tokens][:max(0, len(stream) - at)]
        stream[at:at + len(laid)] = laid
        end = to_step(turn['end'], n) * m
        if at < len(stream) and end < len(stream):
            stream[end] = vocab.control['<|eot|>']
        n_text += len(tokens)
    n_kept = np.count_nonzero(~np.isin(stream, [*map(vocab.control.get, TEXT_MARKS)]))
    return stream, n_text - n_kept


TEXT_MARKS = ('<|silent_text|>', '<|begin|>', '<|eot|>')


def mark_turns(stream, dialogue, role, n, vocab):
    """speech@turn: of speech [n_frame] or [n_frame, codes] the frames where text@turn has <|begin|> and
    <|eot|> become <|sos|> and <|eos|>."""
    for turn in turns_of(dialogue, role):
        for frame, mark in ((turn['start'], '<|sos|>'), (turn['end'], '<|eos|>')):
            at = to_step(frame, n) * n
            if at < len(stream):
                stream[at] = vocab.control[mark]
    return stream


def find_marked(text, n, n_frame, vocab):
    """text [N, m] -> [(start, end, ids of text)], in frames"""
    m, found = text.shape[1], []
    ids = text.reshape(-1)
    starts = np.flatnonzero(ids == vocab.control['<|begin|>'])
    for at, limit in zip(starts, [*starts[1:], len(ids)]):
        ends = np.flatnonzero(ids[at:limit] == vocab.control['<|eot|>'])
        end = (at + ends[0] if len(ends) else limit) // m * n
        kept = ids[at:limit][~np.isin(ids[at:limit], [*map(vocab.control.get, TEXT_MARKS)])]
        found.append((int(at) // m * n, min(int(end), n_frame), kept.tolist()))
    return found


# ------------------------------------------------------------------------------------------------------------
# text@word

def lay_words(dialogue, role, n_chunk, m, n, vocab):
    """
    -> the text stream, int32 [n_chunk * m], and how many tokens were lost. A word starts in the step in
    which it is said, and takes the place of what is left of the word before (moshi-finetune's Interleaver).
    """
    stream = np.full(n_chunk * m, vocab.control['<|silent_text|>'], np.int32)
    words = []
    for turn in turns_of(dialogue, role):
        if not turn.get('words'):
            raise ValueError(f'dialogue {dialogue["id"]!r}: the {role} turn at frame {turn["start"]} has no '
                             'words with their times (docs/corpora.md: word times)')
        words += [(word['start'] // n * m, vocab.encode(' ' * (i > 0) + word['text']))
                  for i, word in enumerate(turn['words'])]
    limits = [at for at, _ in words[1:]] + [len(stream)]
    n_lost = 0
    for (at, tokens), limit in zip(words, limits):
        kept = tokens[:max(0, limit - at)]
        if kept and at and stream[at - 1] == vocab.control['<|silent_text|>']:
            stream[at - 1] = vocab.control['<|epad|>']
        stream[at:at + len(kept)] = kept
        n_lost += len(tokens) - len(kept)
    return stream, n_lost


def find_words(text, n, n_frame, vocab):
    """
    text [N, m] -> [[word of a turn: dict(text, start, end)]], in frames. The first word of a turn has no
    space before it. Where a word ends is not written: there the next begins, or its last token stands.
    """
    m, ids, turns = text.shape[1], text.reshape(-1), []
    is_word = ~np.isin(ids, [vocab.control['<|silent_text|>'], vocab.control['<|epad|>']])
    spans = []                  # (first place, its ids)
    for at in np.flatnonzero(is_word).tolist():
        begins = vocab.decode([ids[at]]).startswith(' ')
        if begins or not at or not is_word[at - 1] or not spans:
            spans.append((at, []))
        spans[-1][1].append(int(ids[at]))
    for at, tokens in spans:
        word = vocab.decode(tokens)
        start, end = at // m * n, min((at + len(tokens) - 1) // m * n + n, n_frame)
        if not word.startswith(' ') or not turns:
            turns.append([])
        turns[-1].append(dict(text=word.removeprefix(' '), start=start, end=end))
    return turns


# ------------------------------------------------------------------------------------------------------------
# state

def is_broken_off(turn, turns):
    """Does the other role speak into this turn, and still when it ends? That is a barge-in; a backchannel
    ("mhm") is over before."""
    start, end, role = turn['start'], turn['end'], turn['role']
    return any([start < other['start'] < end <= other['end'] for other in turns if other['role'] != role])


def broken_off(own, turns):
    """The same of each of a role's own turns, fast for a million: as turns of one role do not overlap, what
    speaks when a turn ends is the other role's last to start before that."""
    others = sorted([other for other in turns if own and other['role'] != own[0]['role']], key=START)
    starts = [other['start'] for other in others]
    last = [others[i - 1] if (i := bisect_left(starts, turn['end'])) else turn for turn in own]
    return [turn['start'] < other['start'] and turn['end'] <= other['end'] for turn, other in zip(own, last)]


def was_stopped(turns, n_frame):
    """-> bool [n_frame]: from the end of a turn of the assistant that was broken off until its next starts"""
    is_stopped, own = np.zeros(n_frame, bool), turns_of(dict(turns=turns), 'assistant')
    for turn, following, is_cut in zip(own, [*own[1:], None], broken_off(own, turns)):
        is_stopped[turn['end']:following and following['start']] = is_cut
    return is_stopped


def lay_state(dialogue, n_chunk, n, vocab):
    """-> a token a chunk: <|irq|> where the assistant was stopped, else <|n-irq|>. What holds at the last
    frame of a chunk, holds for the chunk. (Mini-Omni2's interruptions, arXiv:2410.11190: there <|irq|> begins
    where the user's "Stop Omni" ends.)"""
    is_stopped = was_stopped(dialogue['turns'], n_chunk * n)
    irq, n_irq = vocab.control['<|irq|>'], vocab.control['<|n-irq|>']
    return np.where(is_stopped.reshape(n_chunk, n)[:, -1:], irq, n_irq).reshape(-1)


def find_stops(state, n, vocab):
    """state [N] -> turns that lay_state makes the same of: of the assistant, broken off by a frame of the
    user at its end."""
    edges = np.flatnonzero(np.diff(state == vocab.control['<|irq|>'], prepend=False, append=False)) * n
    turns, begin = [], 0
    for stop, go_on in edges.reshape(-1, 2).tolist():
        turns += [dict(role='assistant', start=begin, end=stop, text=''),
                  dict(role='user', start=stop - 1, end=stop, text='')]
        begin = go_on
    if turns and begin < len(state) * n:
        turns.append(dict(role='assistant', start=begin, end=begin + 1, text=''))
    return turns


def play_until_stopped(dialogue, codes, turns):
    """What is heard of recorded turns of the assistant, and codes of its channel, if playing stops where a
    decoded dialogue says <|irq|> -> dict(assistant, turns)"""
    stops = [turn['end'] for turn in dialogue['turns'] if turn['role'] == 'assistant']
    played = [dict(turn, end=min([stop for stop in stops if turn['start'] < stop] + [turn['end']]))
              for turn in turns]
    return dict(assistant=codes, turns=played)


# ------------------------------------------------------------------------------------------------------------
# late rows, and chunks without repeats

def shift(stream, slot, layout, vocab):
    """The ids of a slot in all chunks -> ids and learned, (N chunks, tokens of the slot), where the codes of
    each place are late by its delay. What fills the gap is not learned."""
    places = layout.codes_per_frame if slot.kind == 'speech' else 1
    block = stream.reshape(-1, slot.n, places)              # (N - n_late, frames or tokens a chunk, places)
    silent = vocab.control['<|silent_speech|>' if slot.kind == 'speech' else '<|silent_text|>']
    ids = np.full((len(block) + layout.n_late * bool(len(block)), *block.shape[1:]), silent, np.int32)
    learned = np.zeros(ids.shape, bool)
    for place, late in enumerate(np.resize(slot.delays or [0], places).tolist()):
        ids[late:late + len(block), :, place] = block[:, :, place]
        learned[late:late + len(block), :, place] = slot.learned
    return ids.reshape(len(ids), slot.n * places), learned.reshape(len(ids), slot.n * places)


def unshift(ids, slot, layout):
    """The inverse of shift: ids (N, tokens of the slot) -> (N - n_late, tokens of the slot)"""
    places = layout.codes_per_frame if slot.kind == 'speech' else 1
    n = len(ids) - layout.n_late
    block = ids.reshape(len(ids), slot.n, places)
    delays = np.resize(slot.delays or [0], places).tolist()
    columns = [block[late:late + n, :, place] for place, late in enumerate(delays)]
    return np.stack(columns, -1).reshape(max(n, 0), slot.n * places)


def drop_repeats(ids, learned, layout):
    """Chunks (N, K) -> ids, learned, both flat, and where chunks begin. Of equal codes in a row, those of one
    slot in one chunk, the first stays."""
    keep, at = np.ones(ids.shape, bool), 0
    for slot, size in zip(layout.chunk, layout.sizes):
        if slot.way == 'dedup':
            keep[:, at + 1:at + size] = ids[:, at + 1:at + size] != ids[:, at:at + size - 1]
        at += size
    return ids[keep], learned[keep], np.cumsum([0, *keep.sum(1)[:-1]]).tolist()


def repeat(codes, n):
    """1 to n codes -> n: each as often as the others, the earlier once more where that does not work out"""
    each, more = divmod(n, len(codes))
    return [code for i, code in enumerate(codes) for _ in range(each + (i < more))]
