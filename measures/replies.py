"""
How well a model does where nobody speaks on a clock: in layouts by turns, its answers, and what it writes
down of what it hears; in layouts with a state, when it says that it was interrupted.

    answer_accuracy     a user's turn ─► the model ─► the text of its answer, compared with the reference's
    heard_wer           … ─► the text of the turn itself (asr, salm, half_duplex, usdm_sft, usdm_pretrain)

    stop_found_rate     an interruption of the reference ─► <|irq|> within a second of its end, or earlier
                        by a chunk at most; stop_ms: after that end, on average
    false_stop_per_min  <|irq|> where the reference goes on

    figures = replies(checkpoint, dialogues)
    figures = stops(decoded, references, rate_hz, chunk_frames)

For layouts on a clock: who is listened to beside whom (hear), and which texts are compared (written).
"""
import numpy as np

from clock import is_broken_off, was_stopped
from decode import converse
from flatten import ROLES, START
from measures.words import error_rate, plain
from respond import Asked, respond


def side_by_side(references, batch_size):
    """-> [[i]]: numbers of the references that are listened to together, as they end at about one time"""
    order = sorted(range(len(references)), key=lambda i: len(references[i]['user']))
    return [order[at:at + batch_size] for at in range(0, len(order), batch_size)]


def hear(checkpoint, references, batches, on_chunk=lambda: None, **settings):
    """-> the dialogue that the model has with each reference's user. batches: what side_by_side returns;
    settings are dtype and sampling"""
    model, vocab, codec, info = checkpoint
    silence, layout, decoded = codec.silence_codes[0].tolist(), info.layouts[-1], [None] * len(references)
    if layout.is_ragged:
        asked = [[Asked(each['user'], prompt=each.get('prompt', ''))] for each in references]
        return respond(model, vocab, layout, asked, silence, **settings)
    for batch in batches:
        users, prompts = zip(*[(references[i]['user'], references[i].get('prompt', '')) for i in batch])
        said, _ = converse(model, vocab, layout, users, silence, on_chunk, prompts, **settings)
        for i, dialogue in zip(batch, said):
            decoded[i] = dialogue
    return decoded


def written(outcomes):
    """outcomes: of each conversation what turns.assess returns -> [(the reference's answer, ours)], texts, of
    all turns whose answer the user lets the reference finish"""
    return [(turn['due']['text'], ' '.join(part['text'] for part in turn['said']).strip())
            for turns in outcomes for turn in turns if turn['due']]


def is_right(due, said):
    """Does an answer have the reference's words?"""
    return plain(due) == plain(said)


def replies(checkpoint, dialogues, **settings):
    """-> dict(n_answer, answer_accuracy, heard_wer, heard_cer), those that the layout can have; settings are
    respond's. Answers that the user broke off are no reference."""
    layout = checkpoint.layout
    answered, conversations = [], []        # answered: for each conversation its pairs of turns
    for dialogue in dialogues:
        turns = sorted(dialogue['turns'], key=START)
        pairs = [pair for pair in zip(turns, turns[1:]) if (pair[0]['role'], pair[1]['role']) == ROLES]
        asked = [Asked(dialogue['user'][turn['start']:turn['end']], '', dialogue.get('prompt', ''))
                 for turn, _ in pairs]
        pairs = [(turn, reply, is_broken_off(reply, turns)) for turn, reply in pairs]
        if layout.order == 'turns':
            answered += [pairs] * bool(pairs)
            conversations += [asked] * bool(pairs)
        else:
            answered += [[pair] for pair in pairs]
            conversations += [[turn] for turn in asked]
    silence = checkpoint.codec.silence_codes[0].tolist()
    decoded = respond(checkpoint.model, checkpoint.vocab, layout, conversations, silence, **settings)
    heard, said = [], []        # (the reference's text, ours)
    for pairs, dialogue in zip(answered, decoded):
        ours = [[turn['text'] for turn in dialogue['turns'] if turn['role'] == role] for role in ROLES]
        for i, (turn, reply, is_broken) in enumerate(pairs):
            heard += [(turn['text'], ours[0][i])] if i < len(ours[0]) else []
            said += [(reply['text'], ours[1][i])] if i < len(ours[1]) and not is_broken else []
    figures = {}
    if any(text for _, text in heard):
        errors = error_rate(*zip(*heard))
        figures |= dict(heard_wer=errors['wer'], heard_cer=errors['cer'])
    if any(text for _, text in said):
        right = [is_right(*texts) for texts in said]
        figures |= dict(n_answer=len(said), answer_accuracy=sum(right) / len(right))
    return figures


def stops(decoded, references, rate_hz, chunk_frames):
    """decoded: dialogues as decode.converse returns them, which know when the model began to say <|irq|>"""
    delays, n_stop, n_false, n_frame = [], 0, 0, 0
    for dialogue, reference in zip(decoded, references):
        n = len(reference['user'])
        ours, theirs = (edges(was_stopped(each['turns'], n)) for each in (dialogue, reference))
        for at in theirs:
            near = [stop for stop in ours if at - chunk_frames <= stop <= at + rate_hz]
            delays += [near[0] - at] if near else []
            ours = [stop for stop in ours if stop not in near]
        n_stop, n_false, n_frame = n_stop + len(theirs), n_false + len(ours), n_frame + n
    figures = dict(n_stop=n_stop, false_stop_per_min=60 * rate_hz * n_false / n_frame)
    if n_stop:
        figures['stop_found_rate'] = len(delays) / n_stop
    return figures | (dict(stop_ms=1e3 * float(np.mean(delays)) / rate_hz) if delays else {})


def edges(is_stopped):
    """Frames at which it becomes true."""
    return np.flatnonzero(np.diff(is_stopped, prepend=False) & is_stopped).tolist()
