"""
How well a model does in a layout by turns, where there is no clock: its answers, and what it writes down of
what it hears.

    answer_accuracy     a user's turn ─► the model ─► the text of its answer, compared with the reference's
    heard_wer           … ─► the text of the turn itself (asr, salm, half_duplex, usdm_sft, usdm_pretrain)

    figures = replies(checkpoint, dialogues)
"""
from flatten import ROLES, START, is_broken_off
from measures.words import error_rate, plain
from respond import Asked, respond


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
        right = [plain(theirs) == plain(text) for theirs, text in said]
        figures |= dict(n_answer=len(said), answer_accuracy=sum(right) / len(right))
    return figures
