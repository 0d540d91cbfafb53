"""
Lets a checkpoint listen to a split's users, and measures: how it takes turns, what it answers, whether it
says that.

    python evaluate.py --checkpoint=out/demo --data=data/demo           a table, out/demo/evaluation/metrics.json and report.html
    python evaluate.py --dialogues=recordings                           the same of finished dialogues, whoever had them: stereo
                                                                        audio, transcripts, or both
                                                                        (measures/foreign.py)

    user       ░░░ question ░░░│                                     │░░░ next question ░░░
    assistant                  │   ▓▓▓▓ answer ▓▓▓▓                  │▓▓▓▓│
                               └ 3 ┘ by 5 frames: took the turn      └────┘ by 10 frames: yielded

Beside ours the table has the figures of the paper (OmniFlatten, ACL 2025, tables 1 to 4): theirs, on their
test data.
"""
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

import config
from checkpoint import check_codec, last_state, load_checkpoint
from common.device import pick_device, pick_dtype
from common.files import read_json, write_json
from data.dialogues import Dialogues
from data.loader import STREAMS, Loader
from decode import Sampling, converse, for_decoding, pick_linear, render
from flatten import ROLES
from measures import foreign, judge, report, words
from measures.losses import by_stream, loss_sums
from measures.turns import PATIENCE_SEC, assess, conversation, mean, summarise, who_speaks


@dataclass(frozen=True)
class Config:
    checkpoint: str = 'out/demo'        # a folder that train.py wrote
    data: str = 'data/demo'
    split: str = 'test'
    n_dialogue: int = 0                 # the first so many; 0: all
    dialogues: str | None = None        # instead of checkpoint and data: a folder of finished dialogues
    user_channel: int = 0               # of those: the audio channel on which the user is, 0 or 1
    user_name: str = 'user'             # what their transcripts call the user, and the assistant
    assistant_name: str = 'assistant'
    vad: str = 'webrtc'                 # how speech is heard where nobody noted it: webrtc, or by energy
    # folder for what is written; None: 'evaluation' in the checkpoint, or in the folder of dialogues
    out: str | None = None
    n_report: int = 100                 # dialogues in report.html; 0: no report
    export: str | None = None           # a new folder, for the scripts of Full-Duplex-Bench
    # decoding
    batch_size: int = 64                # dialogues listened to side by side
    text_temperature: float = 0.0
    speech_temperature: float = 0.0
    silence_bias: float = 0.0
    seed: int = 1337
    device: str = 'auto'                # auto: a GPU if there is one
    # float32, bfloat16, or on a CPU int8; auto: bfloat16 where the device multiplies it
    dtype: str = 'auto'
    # others' ears and opinions
    whisper: str | None = None          # a folder with Whisper: does the assistant say what it writes
    # an OpenAI-compatible endpoint, 'http://localhost:8000/v1': scores the answers from 1 to 10
    judge_url: str | None = None
    judge_model: str = 'default'        # what that endpoint calls the model
    judge_prompt: str | None = None     # a text file; None: measures/judge.txt
    judge_usd_per_m_in: float = 0.0     # price of a million tokens read, and written, for the costs
    judge_usd_per_m_out: float = 0.0

    def __post_init__(self):
        if self.batch_size < 1 or self.n_dialogue < 0 or self.n_report < 0:
            raise ValueError('batch_size has to be at least 1, n_dialogue and n_report not below 0')
        if self.dtype not in ('auto', 'float32', 'bfloat16', 'int8'):
            raise ValueError(f"dtype is {self.dtype!r}, known are 'auto', 'float32', 'bfloat16' and 'int8'")
        if self.user_channel not in (0, 1):
            raise ValueError(f'user_channel is {self.user_channel}: a stereo file has 0 and 1')


# label, the figure or the figures of a line, OmniFlatten's, Moshi's
ROWS = [('turns of the user; answers due', 'n_turn n_answer_due', '', ''),
        *((f'assistant takes the turn, Acc@{k}: by, at', f'assistant_acc_by_{k} assistant_acc_at_{k}', theirs,
           moshi) for k, theirs, moshi in ((1, '20.6 %', '2.9 %'), (5, '53.6 %', '18.8 %'),
                                           (10, '66.3 %', '38.5 %'), (25, '71.7 %', '55.1 %'))),
        ('… response, mean, median', 'response_ms response_median_ms', '193 ms', '553 ms'),
        (f'… none within {PATIENCE_SEC} s', 'no_answer_rate', '', ''),
        ('… false starts, in a turn of the user', 'false_start_rate', '', ''),
        ('… pauses of the user; taken for the end', 'n_pause pause_taken_rate', '', ''),
        ('… speaks again, unprompted', 'unprompted_rate', '', ''),
        ('user interrupts, times', 'n_interruption', '', ''),
        *((f'… assistant yields, Acc@{k}: by, at', f'user_acc_by_{k} user_acc_at_{k}', theirs, moshi)
          for k, theirs, moshi in ((1, '10.9 %', '0.0 %'), (5, '30.9 %', '6.2 %'), (10, '41.8 %', '14.8 %'),
                                   (25, '51.8 %', '45.7 %'))),
        ('… after, mean, median', 'yield_ms yield_median_ms', '287 ms', '753 ms'),
        (f'… not within {PATIENCE_SEC} s', 'no_yield_rate', '', ''),
        ('backchannels of the user; that stopped it', 'n_backchannel backchannel_stopped_rate', '', ''),
        ('both speak, neither does', 'both_speak neither_speaks', '', ''),
        ('gap, user to assistant, back', 'gap_user_to_assistant_ms gap_assistant_to_user_ms', '', ''),
        ('answers that can be compared; right', 'n_answer answer_accuracy', '', ''),
        ('… word errors, character errors', 'answer_wer answer_cer', '', ''),
        ("… speech codes: errors, another answer's", 'code_error_rate code_error_rate_of_another_answer', '',
         ''), ('… as Whisper hears it: words, characters', 'said_wer said_cer', '', ''),
        ('judge, 1 to 10: answers judged, score', 'n_judged_answers judge_score_of_answers', '4.88 en, 5.6 '
         'zh', '3.92 en'),
        ("… the reference's", 'n_judged_reference judge_score_of_reference', '7.65 en, 6.83 zh', ''),
        *((f'ASR of the {role}: words, characters', f'asr_{role}_wer asr_{role}_cer', '7.91 en, 26.1 zh', '')
          for role in ('user', 'assistant')),
        ('TTS by the same ASR: words, characters', 'tts_assistant_wer tts_assistant_cer', '', ''),
        ('TTS by Whisper: words, characters', 'tts_assistant_whisper_wer tts_assistant_whisper_cer',
         '4.51 en, 4.46 zh', ''), ]


def written(key, value):
    if value is None:
        return '-'
    if key.endswith('_ms'):
        return f'{value:.0f} ms'
    if key.startswith('n_'):
        return str(value)
    if key.startswith('judge'):
        return f'{value:.2f}'
    return f'{100 * value:.1f} %'


def table(metrics):
    """[(label, ours, OmniFlatten's, Moshi's)] of what was measured, as text."""
    rows = [(label, ', '.join(written(key, metrics.get(key))
                              for key in keys.split()), theirs, moshi)
            for label, keys, theirs, moshi in ROWS
            if any(metrics.get(key) is not None for key in keys.split())]
    for name, losses in metrics.get('loss', {}).items():
        kinds = [kind for kind in STREAMS if kind in losses]
        before = '' if name == list(metrics['loss'])[-1] else ', a stage before'
        rows.append((f'loss of {name}{before}: {", ".join(kinds)}',
                     ', '.join(f'{losses[kind]:.3f}' for kind in kinds), '', ''))
        rows.append(('… all, nats a token; bits a second', f'{losses["loss"]:.3f}, '
                                                           f'{losses["bits_per_sec"]:.1f}', '', ''))
    return rows


def laid_out(rows):
    wide = max(len(label) for label, *_ in rows)
    lines = [('', 'ours', 'OmniFlatten*', 'Moshi*'), *rows, ('* theirs, from the paper, on other test '
                                                             'data', '', '', '')]
    return '\n'.join(f'{label:{wide}}  {ours:>19}  {theirs:>15}  {moshi:>7}'.rstrip()
                     for label, ours, theirs, moshi in lines)


def plain(text):
    """Lower case, letters and digits: 'Paris.' and 'paris' are the same answer."""
    return ' '.join(''.join(c if c.isalnum() else ' ' for c in text.lower()).split())


def answers(found, decoded, references):
    """
    -> figures: the answers against the reference's, where the user lets it finish: is the text the same, how
    many of its words are wrong, and of its codes (edit distance; as a yardstick that to the next question's
    answer). duplex2 writes no text: codes only.
    """
    pairs, codes = [], []
    for turns, dialogue, reference in zip(found, decoded, references):
        for turn in turns:
            if turn['due']:
                pairs.append((turn['due']['text'], ' '.join(said['text'] for said in turn['said'])))
                codes.append(([
                    code for said in turn['said'] for code in dialogue['assistant'][said['start']:said['end']]
                ], reference['assistant'][turn['due']['start']:turn['due']['end']].tolist()))
    distances = [Levenshtein.normalized_distance(*both) for both in codes]
    others = [
        Levenshtein.normalized_distance(said, other)
        for (said, _), (_, other), (text,
                                    _), (another,
                                         _) in zip(codes, codes[1:] + codes[:1], pairs, pairs[1:] + pairs[:1])
        if plain(text) != plain(another)]
    figures = dict(n_answer=len(pairs), code_error_rate=mean(distances),
                   code_error_rate_of_another_answer=mean(others))
    if any(text for _, text in pairs):
        errors = words.error_rate(*zip(*pairs))
        figures |= dict(answer_accuracy=mean(plain(due) == plain(text) for due, text in pairs),
                        answer_wer=errors['wer'], answer_cer=errors['cer'])
        for due, text in [pair for pair in pairs if plain(pair[0]) != plain(pair[1])][:5]:
            print(f'  wrong: {text!r}, expected {due!r}')
    return figures


def losses(model, vocab, dialogues, layouts, device, dtype):
    """{layout: loss by stream in nats a token, bits a second of conversation} of all documents of a split."""
    found, block_size = {}, model.config.block_size
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    n_row = max(1, 8192 // block_size)
    for layout in layouts:
        loader = Loader(dialogues, [layout], vocab, block_size, n_row, padded=device.type != 'cpu')
        sums, sec = loss_sums(model, loader, device, autocast)
        if sec:
            found[layout.name] = by_stream(sums, sec)
    return found


def can_be_heard(cfg, codec):
    """Found out before the hours of listening, not after. The figures need no vocoder."""
    try:
        codec.decode(np.resize(codec.silence_codes, round(codec.rate_hz)))
    except ValueError as error:
        if cfg.whisper or cfg.export:
            raise
        print(f'note: the report will be without sound: {error}')
        return False
    return True


def from_checkpoint(cfg):
    """-> (metrics, conversations, what each turn came to)"""
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    checkpoint = load_checkpoint(cfg.checkpoint, device)
    model, vocab, codec, info = checkpoint
    layout, text_weight, names = checkpoint.layout, info.text_weight, [each.name for each in info.layouts]
    dialogues = Dialogues(cfg.data, cfg.split)
    check_codec(cfg.checkpoint, codec.describe(), dialogues)
    print(f'{cfg.checkpoint}: losses of {cfg.data}, {cfg.split}', flush=True)
    linear, rest = pick_linear(dtype, device, compile=False)
    # what is lost by it is measured, too
    rounded = for_decoding(model, rest, linear) if dtype == torch.int8 else model
    metrics = dict(n_param=model.n_param(), loss=losses(rounded, vocab, dialogues, info.layouts, device,
                                                        rest))
    state = last_state(cfg.checkpoint)
    if state:
        trained = read_json(os.path.join(state, 'state.json'))
        metrics.update(train_sec=trained['train_sec'], train_steps=trained['step'],
                       hours_heard=trained['sec_heard'] / 3600)
    references = [dialogues[i] for i in range(min(cfg.n_dialogue or len(dialogues), len(dialogues)))]
    if layout.order == 'turn':      # after alignment, as in the paper: whoever goes on to dialogue forgets it
        asr, tts = (
            [role for role in ROLES if {task, f'{task}.{role}'} & set(names)] for task in ('asr', 'tts'))
        # an ear that never learned a voice cannot judge it
        tts = [role for role in tts if role in asr or cfg.whisper]
        print(f'what it hears ({", ".join(asr) or "nobody"}), what it says '
              f'({", ".join(tts) or "nothing that it has an ear for"})', flush=True)
        heard = words.alignment(model, vocab, codec, references, asr=asr, tts=tts, whisper=cfg.whisper,
                                text_weight=text_weight)
        metrics |= {
            f'{name}_{key}': figures[key] for name, figures in heard.items() for key in ('wer', 'cer')}
    both = [reference for reference in references if len(reference['user']) == len(reference['assistant'])]
    if layout.order != 'chunks':
        return metrics, [], []
    if not both:
        raise ValueError(f'{cfg.data} has no two-sided dialogue in {cfg.split}')
    has_sound = can_be_heard(cfg, codec)
    decoded, start, n = [None] * len(both), time.perf_counter(), layout.speech_chunk
    # those side by side end together
    order = sorted(range(len(both)), key=lambda i: len(both[i]['user']))
    batches = [order[at:at + cfg.batch_size] for at in range(0, len(both), cfg.batch_size)]
    with tqdm(total=sum(-(-len(both[batch[-1]]['user']) // n) for batch in batches), desc='listening',
              unit=' chunks', leave=False, disable=None) as bar:
        for batch in batches:
            said, _ = converse(
                model, vocab, layout, [both[i]['user'] for i in batch], int(codec.silence_codes[0]),
                bar.update, dtype=dtype, sampling=Sampling(cfg.text_temperature, cfg.speech_temperature,
                                                           silence_bias=cfg.silence_bias,
                                                           text_weight=text_weight, seed=cfg.seed))
            for i, dialogue in zip(batch, said):
                decoded[i] = dialogue
    metrics['decode_sec'] = time.perf_counter() - start
    print(f'{len(both)} dialogues heard in {metrics["decode_sec"]:.0f} s', flush=True)
    conversations = []
    for i, (reference, dialogue) in enumerate(zip(both, decoded)):
        turns = {role: [turn for turn in reference['turns'] if turn['role'] == role] for role in ROLES}
        wave = render(dialogue,
                      codec) if has_sound and (i < cfg.n_report or cfg.whisper or cfg.export) else None
        conversations.append(
            conversation(reference['id'], codec.rate_hz, turns['user'], dialogue, codec.silence_codes, n,
                         turns['assistant'], wave, codec.sample_rate))
    found = [assess(c) for c in conversations]
    return metrics | answers(found, decoded, both), conversations, found


def main(cfg):
    """Measures what cfg names, prints and writes it. Returns the metrics."""
    out = cfg.out or os.path.join(cfg.dialogues or cfg.checkpoint, 'evaluation')
    if cfg.whisper:
        # a wrong folder is told now, not after all the listening
        words.load_whisper(cfg.whisper, pick_device(cfg.device))
    if cfg.dialogues:
        read = foreign.read_conversations(cfg.dialogues, user_channel=cfg.user_channel, user_name=cfg.user_name,
                            assistant_name=cfg.assistant_name, vad=cfg.vad)
        conversations = list(islice(read, cfg.n_dialogue or None))
        metrics, found = {}, [assess(c) for c in conversations]
    else:
        metrics, conversations, found = from_checkpoint(cfg)
    if conversations:
        metrics |= summarise([turn for turns in found for turn in turns],
                             conversations[0]['rate_hz']) | who_speaks(conversations)
    if conversations and cfg.whisper:
        said = words.said_as_written(conversations, cfg.whisper, device=pick_device(cfg.device))
        metrics |= dict(said_wer=said['wer'], said_cer=said['cer'])
    os.makedirs(out, exist_ok=True)
    write_json(os.path.join(out, 'metrics.json'), metrics)
    if conversations and cfg.judge_url:     # last: a server that fails does not take the rest along
        metrics |= judged(cfg, conversations, os.path.join(out, 'judge.jsonl'))
        write_json(os.path.join(out, 'metrics.json'), metrics)
    rows = table(metrics)
    print('\n' + laid_out(rows))
    if conversations and cfg.n_report:
        path = os.path.join(out, 'report.html')
        report.write(
            path, cfg.dialogues or cfg.checkpoint, conversations[:cfg.n_report], found[:cfg.n_report],
            [(label, ours, ' / '.join(filter(None, (theirs, moshi)))) for label, ours, theirs, moshi in rows],
            note=(cfg.dialogues or f'{cfg.data}, {cfg.split}') + f': {len(conversations)} '
            'dialogues. Theirs: OmniFlatten / '
            'Moshi, from the paper, on other '
            'test data.')
        print(f'look and listen: {path}')
    if cfg.export:
        counts = foreign.export_full_duplex_bench(conversations, cfg.export)
        print(f'{cfg.export}: ' + ', '.join(f'{n} of {task}' for task, n in counts.items()))
    return metrics


def judged(cfg, conversations, cache):
    figures = {}
    for name, use_expected in (('answers', False), ('reference', True)):
        if use_expected and conversations[0]['expected'] is None:
            continue
        items = judge.to_items(conversations, use_expected)
        scores = judge.score(items, cfg.judge_url, cfg.judge_model, prompt_path=cfg.judge_prompt
                             or judge.PROMPT, cache_path=cache, usd_per_m_in=cfg.judge_usd_per_m_in,
                             usd_per_m_out=cfg.judge_usd_per_m_out)
        given = [each['score'] for each in scores if each['score'] is not None]
        figures |= {f'judge_score_of_{name}': mean(given), f'n_judged_{name}': len(given)}
    return figures


if __name__ == '__main__':
    try:
        main(config.load(Config, sys.argv[1:]))
    except ValueError as error:
        raise SystemExit(str(error))
