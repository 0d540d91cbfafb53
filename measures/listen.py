"""
Lets a model in training answer some dialogues of val, so that one can hear it learn.

    out/demo/report.html                        loss curves, the latest conversations, links to earlier ones
    out/demo/listen/step-000800-val-3.wav       the user left, the assistant right
    out/demo/listen/step-000800-val-3.jsonl     what was said, a line for each turn

train.py does this at each evaluation, on its first process, while the others wait at their next all-reduce.
It touches
nothing that training goes on with: it decodes with a copy of the model and draws no random number. So a run
that listens ends with the same weights, bit for bit, as one that does not.
"""
import importlib.util
import json
import os
import re
from itertools import islice
from pathlib import Path

import numpy as np

from codec import load_codec
from common.audio import write_audio
from data.loader import STREAMS
from decode import Sampling, converse, render, write_transcript
from measures import turns
from measures.report import write

LISTEN_SEC = 30.0       # of each dialogue: training waits meanwhile
N_POINT = 500           # of a curve, about what a screen can show


class Listener:
    """hear(step, model, layouts) -> [conversation], written to out_dir/listen; report(step, conversations)
    writes out_dir/report.html."""

    def __init__(self, cfg, vocab, val_data, dtype):
        self.cfg, self.vocab, self.dtype, self.noted = cfg, vocab, dtype, set()
        self.folder, self.rate_hz = val_data[0].folder, val_data[0].codec['rate_hz']
        both = ((data, i)
                for data in val_data
                for i, (n_user, n_assistant) in enumerate(zip(*data.n_frame))
                if n_user == n_assistant > 0)
        self.dialogues = [
            cut(data[i], round(LISTEN_SEC * self.rate_hz)) for data, i in islice(both, cfg.n_listen)]
        self.user_waves = {}        # id -> what the user is heard to say, the same at each evaluation
        self.mute_because = '' if importlib.util.find_spec('soundfile') else 'pip install soundfile soxr'

    def note(self, text):
        if text not in self.noted:
            print(f'note: {text}')
        self.noted.add(text)

    def hear(self, step, model, layouts):
        if not self.cfg.n_listen:
            return []
        layout = next((layout for layout in reversed(layouts) if layout.order == 'chunks'), None)
        if not layout:
            self.note(f'{"+".join(layout.name for layout in layouts)} goes by turns, without a clock: nobody '
                      'can converse with it, so nothing is heard')
            return []
        if not self.dialogues:
            self.note(f'nothing is heard: {self.folder} has no dialogue of two channels in val')
            return []
        try:
            # anew each time: a vocoder that it starts ends with it, and leaves its memory to the training
            codec = load_codec(self.folder)
        except ValueError as error:
            self.note(f'nothing is heard: {error}')
            return []
        decoded, _ = converse(
            model,
            self.vocab,
            layout,
            [d['user'] for d in self.dialogues],
            int(codec.silence_codes[0]),
            dtype=self.dtype,
        # two chunks, or it cannot go on
            sampling=Sampling(text_weight=self.cfg.text_weight),
            max_context=max(self.cfg.block_size, 2 * layout.period))
        os.makedirs(os.path.join(self.cfg.out_dir, 'listen'), exist_ok=True)
        conversations = []
        for reference, dialogue in zip(self.dialogues, decoded):
            path = os.path.join(self.cfg.out_dir, 'listen',
                                f'step-{step:06d}-' + re.sub(r'[^\w.-]', '_', reference['id']))
            user, expected = ([turn
                               for turn in reference['turns']
                               if turn['role'] == role]
                              for role in ('user', 'assistant'))
            wave = self.render(reference, dialogue, codec)
            conversations.append(
                turns.conversation(reference['id'], self.rate_hz, user, dialogue, codec.silence_codes,
                                   layout.speech_chunk, expected, wave, codec.sample_rate))
            write_transcript(path + '.jsonl', conversations[-1], self.rate_hz)
            if wave is not None:
                write_audio(path + '.wav', wave, codec.sample_rate)
        return conversations

    def render(self, reference, dialogue, codec):
        """-> float32 [n_sample, 2]. Where nothing here can make it, None, and a note once: training goes on,
        the transcript says what was said."""
        if not self.mute_because:
            try:
                if reference['id'] not in self.user_waves:
                    self.user_waves[reference['id']] = codec.decode(np.asarray(reference['user']))
                return render(dialogue, codec, self.user_waves[reference['id']])
            except ValueError as error:         # a codec whose vocoder is not here
                self.mute_because = str(error)
        self.note(f'what the model says is written, but not heard: {self.mute_because}')
        return None

    def report(self, step, conversations):
        note = f'{self.cfg.stages} on {self.cfg.data}. Loss in nats a token.'
        if conversations:
            note += (f' Up to {LISTEN_SEC:.0f} s of {len(conversations)} dialogues of val: '
                     'the user as the codec has them, the assistant as the model answers.')
        links = []
        for path in sorted(Path(self.cfg.out_dir, 'listen').glob('step-*.jsonl')):
            _, at, name = path.stem.split('-', 2)
            if int(at) < step:      # a run that was resumed may have heard more before
                wav = path.with_suffix('.wav')
                links.append((f'step {int(at)}, {name}', f'listen/{(wav if wav.exists() else path).name}'))
        write(os.path.join(self.cfg.out_dir, 'report.html'), f'{self.cfg.out_dir}, step {step}',
              conversations, outcomes=[turns.assess(each) for each in conversations],
              curves=read_curves(os.path.join(self.cfg.out_dir, 'log.jsonl')), note=note, links=links)


def cut(dialogue, n_frame):
    """The first n_frame frames of a dialogue."""
    said = [
        dict(turn, end=min(turn['end'], n_frame)) for turn in dialogue['turns'] if turn['start'] < n_frame]
    return dict(dialogue, turns=said, user=dialogue['user'][:n_frame],
                assistant=dialogue['assistant'][:n_frame])


def read_curves(path):
    """log.jsonl -> {'train loss': [(step, nats a token)], 'train text': …, 'val loss': …}, of the whole run,
    thinned evenly; the last point stays."""
    curves = {}
    with open(path) as file:
        for row in map(json.loads, file):
            for key in ('loss', *STREAMS):
                if key in row:
                    curves.setdefault(f'{row["kind"]} {key}', []).append((row['step'], row[key]))
    return {label: points[::-1][::-(-len(points) // N_POINT)][::-1] for label, points in curves.items()}
