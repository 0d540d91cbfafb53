"""
Which step of a run is the best: what --select compares, on val, at each evaluation.

    loss        nats a token: the least. What a model does with it, is not asked
    answers     answer_accuracy: the share of the answers that have the reference's words
    turns       well_taken_rate: the share of the user's turns that it deals with well (turns.is_well_taken)

For the last two the model answers eval_dialogues dialogues of val, the first minute of each, on the first
process, decoded as evaluate.py does it: nothing is drawn at random, and training goes on with the same random
numbers. Where two steps are equal, the loss decides. A stage that has no such figure, as one of alignment,
goes by its loss; if the last stage has none, the run is refused before its first step.
"""
from itertools import islice

from checkpoint import Checkpoint, take_snapshot
from codec import load_codec
from decode import Sampling
from flatten import ROLES
from measures.replies import hear, is_right, replies, side_by_side, written
from measures.turns import assess, summarise, with_user_of
from respond import said_text

FIGURES = dict(loss='loss', answers='answer_accuracy', turns='well_taken_rate')
LOGGED = ('answer_accuracy', 'well_taken_rate', 'response_ms', 'assistant_acc_by_10', 'user_acc_by_10',
          'false_start_rate', 'pause_taken_rate')
N_DIALOGUE = 40
FIRST_SEC = 60.0        # of each dialogue: training waits meanwhile
BATCH_SIZE = 64         # dialogues side by side


def lacks(layout, select):
    """-> why a model of this layout has no such figure; '' if it has"""
    if select == 'answers' and not (said_text(layout) and layout.order in ('chunks', 'turns', 'pair')):
        return 'writes no answers'
    if select == 'turns' and not (layout.order == 'chunks' and layout.has_speech_of('assistant')):
        return 'goes by turns, without a clock' if layout.order != 'chunks' else 'never speaks'
    return ''


def is_better(name, metrics, state):
    """Is an evaluation better, by the figure of this name, than the best in the state?"""
    if state['best'] is None or state['best_by'] != name:
        return True
    if name == 'loss':
        return metrics['loss'] < state['best']
    return (metrics[name], -metrics['loss']) > (state['best'], -state['best_loss'])


def first_sec(dialogue, n_frame):
    """Of a dialogue the turns that end within n_frame frames; its channels end there, or where the first of
    the other turns starts."""
    left_out = [turn['start'] for turn in dialogue['turns'] if turn['end'] > n_frame]
    n_frame = min([n_frame, *left_out])
    turns = [turn for turn in dialogue['turns'] if turn['end'] <= n_frame]
    return dict(dialogue, turns=turns, **{role: dialogue[role][:n_frame] for role in ROLES})


class Examiner:
    """measure: what the model answers to some dialogues of val, in figures. Raises ValueError, before
    training, where the settings want figures that the last stage or val cannot have."""

    def __init__(self, cfg, vocab, val_data, stages, place):
        n_dialogue = N_DIALOGUE * (cfg.select != 'loss') if cfg.eval_dialogues is None else cfg.eval_dialogues
        self.select, self.vocab, self.dtype, self.dialogues = cfg.select, vocab, place.dtype, []
        if not n_dialogue:
            return
        layout, self.rate_hz = stages[-1].info.layouts[-1], val_data[0].codec['rate_hz']
        if why := lacks(layout, cfg.select):
            raise ValueError(f'select={cfg.select}: a model of layout {layout.name}, the last stage, {why}; '
                             'its best step can be chosen by ' + ' or '.join(
                                 name for name in FIGURES if not lacks(layout, name)))
        n_frame = round(FIRST_SEC * self.rate_hz)
        for data in val_data:       # of several data sets, from each as many
            two_sided = (i for i, (n, m) in enumerate(zip(*data.n_frame)) if n == m > 0)
            some = islice(two_sided, -(-n_dialogue // len(val_data)))
            self.dialogues += [first_sec(data[i], n_frame) for i in some]
        roles = {turn['role'] for dialogue in self.dialogues for turn in dialogue['turns']}
        if roles != set(ROLES):
            folders = ', '.join(data.folder for data in val_data)
            raise ValueError(f'{folders}: val has no two-channel dialogue in whose first {FIRST_SEC:.0f} s '
                             'both have a turn, so there is nothing for eval_dialogues to answer')
        self.codec = load_codec(val_data[0].folder) if place.is_main else None
        for stage in stages if place.is_main else ():
            if why := lacks(stage.info.layouts[-1], cfg.select):
                print(f'note: a model of stage {stage.name} {why}: its best step is chosen by its loss')

    def figure(self, stage):
        """-> the name of the figure that is compared in a stage"""
        return FIGURES['loss' if lacks(stage.info.layouts[-1], self.select) else self.select]

    def measure(self, run, stage):
        """-> {figure: value}, of LOGGED those that the stage has, the same on all processes, which call it
        together. {} where no dialogues are answered."""
        layout = stage.info.layouts[-1]
        if not self.dialogues or all(lacks(layout, name) for name in ('answers', 'turns')):
            return {}
        model = run.model
        if run.cfg.shard:
            snapshot = take_snapshot(model, None, run.place)
            model = snapshot and snapshot.on(run.place.device, run.place.dtype)
        figures = self.answer(model, stage.info) if run.place.is_main else None
        return run.place.gather(figures)[0]

    def answer(self, model, info):
        checkpoint = Checkpoint(model, self.vocab, self.codec, info)
        layout, codec = checkpoint.layout, self.codec
        settings = dict(dtype=self.dtype, sampling=Sampling(text_weight=info.text_weight))
        if layout.order != 'chunks':
            found = replies(checkpoint, self.dialogues, **settings)
            return dict(answer_accuracy=found.get('answer_accuracy', 0.0))      # it may have written nothing
        decoded = hear(checkpoint, self.dialogues, side_by_side(self.dialogues, BATCH_SIZE), **settings)
        outcomes = [assess(with_user_of(reference, dialogue, codec, layout.speech_chunk))
                    for reference, dialogue in zip(self.dialogues, decoded)]
        found = summarise([turn for turns in outcomes for turn in turns], codec.rate_hz)
        if said_text(layout):
            right = [is_right(*texts) for texts in written(outcomes)]
            found['answer_accuracy'] = sum(right) / max(1, len(right))
        return {key: found[key] for key in LOGGED if found.get(key) is not None}
