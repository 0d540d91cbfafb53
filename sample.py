"""
Listens and talks: the user's speech goes in chunk by chunk, the assistant's text and speech come out.

    python sample.py --checkpoint=out/demo --user=question.wav      a file; stereo needs --user_channel=0 or 1
    python sample.py --checkpoint=out/demo --data=data/demo         the users of prepared dialogues
    python sample.py --checkpoint=out/blsp --input=in.jsonl --output=out.jsonl --instruction='Sum it up.'

    user     ─ 10 codes ─┐                    ┌─ 10 codes ─┐
    assistant            └─► 2 text, 10 codes ┘            └─► 2 text, 10 codes     a chunk is 400 ms at 25 Hz

Writes a stereo wav (user left, assistant right) and a transcript (a JSON line for each turn, with its times)
for each dialogue, and report.html to see and hear them all. decode.py is what listens and talks; in a layout
by turns the model answers turn after turn (respond.py).

A row of in.jsonl has "audio", a file, or, where the layout reads aloud, "text"; if it likes, "id" and
"instruction". out.jsonl has it again, with "response", what the assistant writes, and "wav", what it says.
"""
import os
import sys
import time
from dataclasses import dataclass

import numpy as np

import config
from checkpoint import check_codec, load_checkpoint
from clock import play_until_stopped
from common.audio import write_audio
from common.device import pick_device, pick_dtype
from common.files import file_name, write_jsonl
from data.dialogues import Dialogues
from decode import Sampling, converse, render, write_transcript
from flatten import ROLES
from inputs import first, listen_to, read_input
from measures import report
from measures.turns import assess, conversation
from respond import Asked, ask, respond

MAX_REPORT = 100        # dialogues in report.html: below 20 MB, if they last half a minute


@dataclass(frozen=True)
class Config:
    checkpoint: str = 'out/demo'        # a folder that train.py wrote: model, tokenizer, codec and layout
    user: str | None = None             # a recording of the user: wav, flac, ogg, mp3, … of any rate
    user_channel: int | None = None     # the user's channel in it, from 0; needed where there are several
    data: str | None = None             # or a data folder, to listen to the users of its dialogues
    input: str | None = None            # or JSON lines, a turn in each; see above
    output: str | None = None           # JSON lines to write, one for each of input
    instruction: str | None = None      # for rows of input without one; the model gets it as its prompt
    split: str = 'test'
    n_dialogue: int = 8                 # the first so many of the split; 0: all
    out: str | None = None              # folder for what is written; None: CHECKPOINT/samples
    prompt: str | None = None           # what the assistant is told; None: with data, what each dialogue says
    reply_sec: float = 6.0              # silence after the recording, in which the assistant can answer
    text_temperature: float = 0.0       # 0: always the likeliest
    speech_temperature: float = 0.0
    text_top_k: int = 0                 # sample among the k likeliest; 0: among all
    speech_top_k: int = 0
    silence_bias: float = 0.0           # added to the logit of silent speech: below 0 talks sooner
    text_from: str | None = None        # a checkpoint (the same?) that writes the text and never speaks
    max_new_tokens: int = 500           # by turns: a text or a stretch of speech ends there at the latest
    max_context: int | None = None      # tokens it remembers, the latest; None: the model's block_size
    seed: int = 1337
    device: str = 'auto'                # auto: a GPU if there is one
    dtype: str = 'auto'                 # float32, bfloat16, on a CPU int8; auto: see train.py
    compile: bool = False               # on a GPU: fuses the work between matmuls; a minute at the start

    def __post_init__(self):
        if self.compile and pick_device(self.device).type == 'cpu':
            raise ValueError('compile is for a GPU: on a CPU packed weights are faster than compiled ones')
        if self.dtype not in ('auto', 'float32', 'bfloat16', 'int8'):
            raise ValueError(f"dtype is {self.dtype!r}, known are 'auto', 'float32', 'bfloat16' and 'int8'")
        if [self.user, self.data, self.input].count(None) != 2:
            raise ValueError('give --user=FILE.wav or --data=FOLDER, or --input=FILE.jsonl: one of them')
        if (self.output or self.instruction) and not self.input:
            raise ValueError('output and instruction go with input; without, it is --out and --prompt')
        for name in ('n_dialogue', 'reply_sec', 'text_temperature', 'speech_temperature', 'text_top_k',
                     'speech_top_k'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name} is {getattr(self, name)}, it cannot be negative')


def main(cfg):
    """Decodes what cfg names and writes it. Returns the dialogues."""
    device = pick_device(cfg.device)
    checkpoint = load_checkpoint(cfg.checkpoint, device)
    codec, text_model = checkpoint.codec, None
    codec.decode(np.repeat(codec.silence_codes[:1], round(codec.rate_hz), 0))   # so a vocoder fails now
    if cfg.text_from:
        other = load_checkpoint(cfg.text_from, device)
        if other.vocab.tokens != checkpoint.vocab.tokens or other.vocab.control != checkpoint.vocab.control:
            raise ValueError(f'text_from: {cfg.text_from} has another vocabulary than {cfg.checkpoint}')
        text_model = other.model
    sampling = Sampling(cfg.text_temperature, cfg.speech_temperature, cfg.text_top_k, cfg.speech_top_k,
                        cfg.silence_bias, checkpoint.info.text_weight, cfg.seed)
    settings = dict(sampling=sampling, max_context=cfg.max_context, text_model=text_model,
                    dtype=pick_dtype(cfg.dtype, device))
    dialogues = Dialogues(cfg.data, cfg.split) if cfg.data else []
    if cfg.data:
        check_codec(cfg.checkpoint, codec.describe(), dialogues)
        dialogues = first(dialogues, cfg.n_dialogue)
    heard = [] if cfg.data else read_input(cfg, codec, checkpoint.layout)
    out = cfg.out or os.path.join(cfg.checkpoint, 'samples')
    os.makedirs(out, exist_ok=True)
    return (talk if checkpoint.layout.period else answer)(cfg, checkpoint, settings, dialogues, heard, out)


def talk(cfg, checkpoint, settings, dialogues, heard, out):
    """Layouts in chunks: all users are listened to side by side."""
    codec, layout = checkpoint.codec, checkpoint.layout
    heard = heard or listen_to(dialogues, cfg)
    users, prompts = [user.codes for user in heard], [user.prompt for user in heard]
    decoded, chunk_sec = converse(
        checkpoint.model, checkpoint.vocab, layout, users, codec.silence_codes[0].tolist(), prompts=prompts,
        compile=cfg.compile, **settings)
    conversations, rows, codec_sec = [], [], 0.0
    for user, dialogue in zip(heard, decoded):
        if layout.has_state and len(user.said):
            dialogue.update(play_until_stopped(dialogue, user.said, user.expected))
        dialogue.update(id=user.id, turns=user.turns + dialogue['turns'])
        start = time.perf_counter()
        wave = render(dialogue, codec, user.wave)
        codec_sec += time.perf_counter() - start
        rows.append(user.row | write(out, dialogue, codec, wave))
        conversations.append(conversation(user.id, codec.rate_hz, user.turns, dialogue, codec.silence_codes,
                                          layout.speech_chunk, user.expected, wave, codec.sample_rate))
    outcomes = [assess(talk) for talk in conversations]
    responses = [turn['response'] for turns in outcomes for turn in turns if turn['response'] is not None]
    reply = f'{1e3 * responses[0] / codec.rate_hz:.0f} ms after the user stopped' if responses else 'none'
    factor = (sum(chunk_sec) + codec_sec) / (sum(map(len, users)) / codec.rate_hz)
    print(f'chunk {1e3 * layout.speech_chunk / codec.rate_hz:.0f} ms | '
          f'model {1e3 * np.median(chunk_sec):.1f} ms a chunk for {len(heard)} at once | '
          f'codec {1e3 * codec_sec:.0f} ms in all | real-time factor {factor:.3f} | first reply {reply}')
    page = os.path.join(out, 'report.html')
    note = f'{cfg.checkpoint} listens to {cfg.user or cfg.input or f"{cfg.data}, {cfg.split}"}.'
    report.write(page, os.path.normpath(out), conversations[:MAX_REPORT], outcomes[:MAX_REPORT],
                 note=note)
    print(f'look and listen: {page}')
    if cfg.output:
        write_jsonl(cfg.output, rows)
    return decoded


def answer(cfg, checkpoint, settings, dialogues, heard, out):
    """Layouts by turns: one document after the other."""
    codec, layout, start, rows = checkpoint.codec, checkpoint.layout, time.perf_counter(), []
    asked = [(user.id, [Asked(user.codes, user.row.get('text', ''), user.prompt)]) for user in heard]
    asked += [each for dialogue in dialogues for each in ask(dialogue, layout, cfg.prompt)]
    if not asked:
        raise ValueError(f'{cfg.data}: in {cfg.split} nobody says what layout {layout.name} answers')
    names, turns = zip(*asked)
    decoded = respond(checkpoint.model, checkpoint.vocab, layout, turns, codec.silence_codes[0].tolist(),
                      names=names, max_new_tokens=cfg.max_new_tokens, **settings)
    for i, dialogue in enumerate(decoded):
        rows.append((heard[i].row if heard else {}) | write(out, dialogue, codec, render(dialogue, codec)))
    print(f'{len(decoded)} documents in {time.perf_counter() - start:.1f} s')
    if cfg.output:
        write_jsonl(cfg.output, rows)
    return decoded


def write(out, dialogue, codec, wave):
    """Writes a dialogue's wav and transcript, and prints it -> what --output says of it."""
    path = os.path.join(out, file_name(dialogue['id']))
    write_audio(path + '.wav', wave, codec.sample_rate)
    write_transcript(path + '.jsonl', dialogue, codec.rate_hz)
    print(f'{path}.wav  {len(wave) / codec.sample_rate:.1f} s')
    turns = sorted(dialogue['turns'], key=lambda turn: turn['start'])
    for turn in turns:
        print(f'  {turn["start"] / codec.rate_hz:6.2f} s  {turn["role"]:9}  {turn["text"] or "(speech)"}')
    texts = {role: ' '.join(turn['text'] for turn in turns if turn['role'] == role) for role in ROLES}
    return dict(id=dialogue['id'], response=texts['assistant'], transcript=texts['user'], wav=path + '.wav')


if __name__ == '__main__':
    try:
        main(config.load(Config, sys.argv[1:]))
    except ValueError as error:
        raise SystemExit(str(error))
