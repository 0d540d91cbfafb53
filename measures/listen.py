"""
Lets a model in training answer some dialogues of val, so that you can hear it learn.

    out/demo/report.html                        loss curves, the latest conversations, links to earlier ones
    out/demo/listen/step-000800-val-3.wav       the user left, the assistant right
    out/demo/listen/step-000800-val-3.jsonl     what was said, a line for each turn

train.py does this at each evaluation, on its first process, while the others wait at their next all-reduce.
It changes nothing that training goes on with: it decodes with a copy of the model and draws no random number.
So a run with n_listen ends with the same weights, bit for bit, as one without.
"""
import importlib.util
import os
from itertools import islice
from pathlib import Path

import numpy as np

from codec import load_codec
from common.audio import write_audio
from common.files import file_name
from data.loader import STREAMS
from decode import Sampling, converse, render, write_transcript
from flatten import ROLES
from measures import turns
from measures.logger import read_log
from measures.report import write

LISTEN_SEC = 30.0       # of each dialogue: training waits meanwhile
N_POINT = 500           # of a curve, about what a screen can show


class Listener:
    """hear: the model answers the users of n_listen dialogues; report: writes out_dir/report.html."""

    def __init__(self, cfg, vocab, val_data, dtype):
        self.cfg, self.vocab, self.dtype = cfg, vocab, dtype
        self.folder, self.rate_hz = val_data[0].folder, val_data[0].codec['rate_hz']
        two_sided = ((data, i) for data in val_data
                     for i, (n_user, n_assistant) in enumerate(zip(*data.n_frame))
                     if n_user == n_assistant > 0)
        n_frame = round(LISTEN_SEC * self.rate_hz)
        self.dialogues = [cut(data[i], n_frame) for data, i in islice(two_sided, cfg.n_listen)]
        self.user_waves = {}        # id -> the user's sound, which is the same at each evaluation
        self.mute_because = '' if importlib.util.find_spec('soundfile') else 'pip install soundfile soxr'
        self.notes = set()          # those printed so far

    def note(self, text):
        """Prints a note, but no note twice in a run."""
        if text not in self.notes:
            print(f'note: {text}')
        self.notes.add(text)

    def hear(self, step, model, layouts):
        """-> [conversation] of measures/turns.py, written to out_dir/listen. Where the stage or the data
        allow none, or the memory or the disk is full: [], and a note. Training goes on."""
        if not self.cfg.n_listen:
            return []
        try:
            return self.answer(step, model, *self.prepare(layouts))
        except (ValueError, RuntimeError, OSError) as error:
            self.note('nothing is heard: ' + (str(error).strip() or type(error).__name__).split('\n')[0])
            return []

    def answer(self, step, model, layout, codec):
        users = [dialogue['user'] for dialogue in self.dialogues]
        prompts = [dialogue.get('prompt', '') for dialogue in self.dialogues]
        decoded, _ = converse(
            model, self.vocab, layout, users, codec.silence_codes[0].tolist(), prompts=prompts,
            dtype=self.dtype, sampling=Sampling(text_weight=self.cfg.text_weight),
            max_context=max(self.cfg.block_size, 2 * layout.period))    # decoding needs room for two chunks
        folder = os.path.join(self.cfg.out_dir, 'listen')
        os.makedirs(folder, exist_ok=True)
        conversations = []
        for reference, dialogue in zip(self.dialogues, decoded):
            wave = self.render(reference, dialogue, codec)
            conversation = turns.with_user_of(reference, dialogue, codec, layout.speech_chunk, wave)
            path = os.path.join(folder, f'step-{step:06d}-' + file_name(reference['id']))
            write_transcript(path + '.jsonl', conversation, self.rate_hz)
            if wave is not None:
                write_audio(path + '.wav', wave, codec.sample_rate)
            conversations.append(conversation)
        return conversations

    def prepare(self, layouts):
        """-> the layout to converse in, the codec. Raises ValueError where there can be no conversation."""
        layout = next((layout for layout in reversed(layouts) if layout.order == 'chunks'), None)
        if not layout:
            raise ValueError(f'{"+".join(layout.name for layout in layouts)} goes by turns, without a clock, '
                             'so nobody can converse with it')
        if not self.dialogues:
            raise ValueError(f'{self.folder} has no dialogue of two channels in val')
        # loaded at each evaluation: the process of a vocoder ends with it, and its memory is training's again
        return layout, load_codec(self.folder)

    def render(self, reference, dialogue, codec):
        """-> float32 [n_sample, 2]; None, with a note, where the codec cannot make sound on this machine. The
        transcript is written all the same."""
        if not self.mute_because:
            try:
                if reference['id'] not in self.user_waves:
                    self.user_waves[reference['id']] = codec.decode(np.asarray(reference['user']))
                return render(dialogue, codec, self.user_waves[reference['id']])
            except ValueError as error:         # this machine lacks the codec's vocoder
                self.mute_because = str(error)
        self.note(f'what the model says is written, but not heard: {self.mute_because}')
        return None

    def report(self, step, conversations):
        out_dir, remark = self.cfg.out_dir, f'{self.cfg.stages} on {self.cfg.data}. Loss in nats a token.'
        if conversations:
            remark += (f' Up to {LISTEN_SEC:.0f} s of {len(conversations)} dialogues of val: '
                       'the user as the codec has them, the assistant as the model answers.')
        links = []
        for path in sorted(Path(out_dir, 'listen').glob('step-*.jsonl')):
            _, at, name = path.stem.split('-', 2)
            if int(at) < step:      # later ones are of a run that was resumed from an earlier step
                wav = path.with_suffix('.wav')
                links.append((f'step {int(at)}, {name}', f'listen/{(wav if wav.exists() else path).name}'))
        write(os.path.join(out_dir, 'report.html'), f'{out_dir}, step {step}', conversations,
              outcomes=[turns.assess(talk) for talk in conversations],
              curves=read_curves(os.path.join(out_dir, 'log.jsonl')), note=remark, links=links)


def cut(dialogue, n_frame):
    """The first n_frame frames of a dialogue."""
    kept = [turn for turn in dialogue['turns'] if turn['start'] < n_frame]
    kept = [dict(turn, end=min(turn['end'], n_frame)) for turn in kept]
    return dict(dialogue, turns=kept, **{role: dialogue[role][:n_frame] for role in ROLES})


def read_curves(path):
    """log.jsonl -> {'train loss': [(step, nats a token)], 'train text': …, 'val loss': …}, of the whole run.
    A long curve is thinned evenly to at most N_POINT points; its last point stays."""
    curves = {}
    for row in read_log(path):
        for key in ('loss', *STREAMS):
            if isinstance(row.get(key), float):
                curves.setdefault(f'{row["kind"]} {key}', []).append((row['step'], row[key]))
    thinned = {}
    for label, points in curves.items():
        every = -(-len(points) // N_POINT)
        thinned[label] = points[::-1][::every][::-1]    # counted from the end
    return thinned
