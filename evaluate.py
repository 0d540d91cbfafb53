"""
Lets a checkpoint listen to the users of a split, and measures how it takes turns, what it answers, and
whether its voice says what its text says.

    python evaluate.py --checkpoint=out/demo --data=data/demo
        prints a table, and writes metrics.json and report.html into out/demo/evaluation
    python evaluate.py --dialogues=recordings
        the same for dialogues that any system or people had: stereo audio, transcripts, or both

    user       ░░░ question ░░░│                                     │░░░ next question ░░░
    assistant                  │   ▓▓▓▓ answer ▓▓▓▓                  │▓▓▓▓│
                               └ 3 ┘ by 5 frames: took the turn      └────┘ by 10 frames: yielded

docs/evaluation.md defines each measure. Beside ours the table has the figures of the paper (OmniFlatten, ACL
2025, tables 1 to 4), which come from other test data. A second table has Full-Duplex-Bench's measures.
"""
import os
import sys
import time
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

import config
from checkpoint import check_codec, last_state, load_checkpoint
from common.device import Place, pick_device, pick_dtype
from common.files import read_json, write_json
from common.linear import pick_linear
from common.origin import describe_run
from data.dialogues import Dialogues
from data.loader import STREAMS, Loader
from decode import Sampling, for_decoding, render
from flatten import ROLES
from measures import foreign, full_duplex_bench, judge, report, turnbench, words
from measures.losses import by_stream, loss_sums
from measures.replies import hear, is_right, replies, side_by_side, stops, written
from measures.turns import PATIENCE_SEC, assess, conversation, mean, summarise, who_speaks, with_user_of
from measures.words import plain


@dataclass(frozen=True)
class Config:
    checkpoint: str = 'out/demo'        # a folder that train.py wrote
    data: str = 'data/demo'
    split: str = 'test'
    n_dialogue: int = 0                 # the first so many; 0: all
    out: str | None = None              # None: 'evaluation' in the checkpoint, or in the folder of dialogues
    n_report: int = 100                 # dialogues in report.html; 0: no report
    export: str | None = None           # a new folder, for the scripts of Full-Duplex-Bench
    turnbench: str | None = None        # a file: TurnBench's submission; speaker 1 of the data is the user

    # instead of checkpoint and data: dialogues of others
    dialogues: str | None = None        # a folder; measures/foreign.py says which files it may have
    user_channel: int = 0               # the audio channel of the user, 0 or 1
    user_name: str = 'user'             # what the transcripts call the user, and the assistant
    assistant_name: str = 'assistant'
    gap_sec: float = 0.5                # a longer pause ends a turn
    vad: str = 'webrtc'                 # how speech is heard that no transcript has: webrtc, energy

    # decoding
    batch_size: int = 64                # dialogues listened to side by side
    text_temperature: float = 0.0
    speech_temperature: float = 0.0
    silence_bias: float = 0.0
    seed: int = 1337
    device: str = 'auto'                # auto: a GPU if there is one
    dtype: str = 'auto'                 # float32, bfloat16, on a CPU int8; auto: see train.py

    # other models' ears and opinions
    whisper: str | None = None          # a folder with Whisper: does the assistant say what it writes
    judge_url: str | None = None        # scores answers: an endpoint, 'http://localhost:8000/v1'
    judge_model: str = 'default'        # what that endpoint calls the model
    judge_prompt: str | None = None     # a text file; None: measures/judge.txt
    judge_usd_per_m_in: float = 0.0     # price of a million tokens read, for the costs that are printed
    judge_usd_per_m_out: float = 0.0    # … written

    def __post_init__(self):
        if self.batch_size < 1 or self.n_dialogue < 0 or self.n_report < 0:
            raise ValueError('batch_size has to be at least 1, n_dialogue and n_report not below 0')
        if self.dtype not in ('auto', 'float32', 'bfloat16', 'int8'):
            raise ValueError(f"dtype is {self.dtype!r}, known are 'auto', 'float32', 'bfloat16' and 'int8'")
        if self.user_channel not in (0, 1):
            raise ValueError(f'user_channel is {self.user_channel}: a stereo file has 0 and 1')


# ------------------------------------------------------------------------------------------------------------
# the table

def acc_rows(label, key, theirs):
    """theirs: [(k, OmniFlatten's Acc@k, Moshi's)]"""
    return [(f'{label} by frame {k}, at frame {k} (Acc@{k})', f'{key}_acc_by_{k} {key}_acc_at_{k}', *figures)
            for k, *figures in theirs]


# label, the figure or the figures of a line, OmniFlatten's, Moshi's
ROWS = [
    ('turns of the user; answers due', 'n_turn n_answer_due', '', ''),
    *acc_rows('assistant speaks', 'assistant',
              [(1, '20.6 %', '2.9 %'), (5, '53.6 %', '18.8 %'), (10, '66.3 %', '38.5 %'),
               (25, '71.7 %', '55.1 %')]),
    ('… response, mean, median', 'response_ms response_median_ms', '193 ms', '553 ms'),
    (f'… none within {PATIENCE_SEC} s', 'no_answer_rate', '', ''),
    ('… turns of the user dealt with well', 'well_taken_rate', '', ''),
    ('… false starts, in a turn of the user', 'false_start_rate', '', ''),
    ('… pauses of the user; taken for the end', 'n_pause pause_taken_rate', '', ''),
    ('… speaks again, unprompted', 'unprompted_rate', '', ''),
    ('user interrupts, times; while it speaks', 'n_interruption n_interruption_speaking', '', ''),
    *acc_rows('… it is silent', 'user',
              [(1, '10.9 %', '0.0 %'), (5, '30.9 %', '6.2 %'), (10, '41.8 %', '14.8 %'),
               (25, '51.8 %', '45.7 %')]),
    ('… after, mean, median', 'yield_ms yield_median_ms', '287 ms', '753 ms'),
    (f'… not within {PATIENCE_SEC} s', 'no_yield_rate', '', ''),
    ('backchannels of the user; while it speaks', 'n_backchannel n_backchannel_speaking', '', ''),
    ('… that stopped it', 'backchannel_stopped_rate', '', ''),
    ('questions into which it talks on', 'n_ran_on', '', ''),
    ('penalty time, false stops (SID-Bench)', 'penalty_sec false_stop_rate', '', ''),
    ('both speak, neither does', 'both_speak neither_speaks', '', ''),
    ('gap, user to assistant, back', 'gap_user_to_assistant_ms gap_assistant_to_user_ms', '', ''),
    ('answers that can be compared; right', 'n_answer answer_accuracy', '', ''),
    ('… as spoken: nearest to the right one', 'spoken_accuracy', '', ''),
    ('… word errors, character errors', 'answer_wer answer_cer', '', ''),
    ("… speech codes: errors, another answer's", 'code_error_rate code_error_rate_of_another_answer', '', ''),
    ('… as Whisper hears it: words, characters', 'said_wer said_cer', '', ''),
    ('what the user says, written down: words, characters', 'heard_wer heard_cer', '', ''),
    ('interruptions; heard within a second', 'n_stop stop_found_rate', '', ''),
    ('… after their end; false ones a minute', 'stop_ms false_stop_per_min', '', ''),
    ('judge, 1 to 10: answers judged, score', 'n_judged_answers judge_score_of_answers',
     '4.88 en, 5.6 zh', '3.92 en'),
    ("… the reference's", 'n_judged_reference judge_score_of_reference', '7.65 en, 6.83 zh', ''),
    *((f'ASR of the {role}: words, characters', f'asr_{role}_wer asr_{role}_cer', '7.91 en, 26.1 zh', '')
      for role in ROLES),
    ('TTS by the same ASR: words, characters', 'tts_assistant_wer tts_assistant_cer', '', ''),
    ('TTS by Whisper: words, characters', 'tts_assistant_whisper_wer tts_assistant_whisper_cer',
     '4.51 en, 4.46 zh', ''),
]


def format_value(key, value):
    if value is None:
        return '-'
    if key.endswith('_ms'):
        return f'{value:.0f} ms'
    if key.startswith('n_'):
        return str(value)
    if key.endswith('_sec'):
        return f'{value:.2f} s'
    if key.startswith('judge') or key.endswith('per_min'):
        return f'{value:.2f}'
    return f'{100 * value:.1f} %'


def table(metrics):
    """-> [(label, ours, OmniFlatten's, Moshi's)] of what was measured, as text"""
    rows = []
    for label, keys, theirs, moshi in ROWS:
        values = {key: metrics.get(key) for key in keys.split()}
        if any(value is not None for value in values.values()):
            rows.append((label, ', '.join(format_value(*item) for item in values.items()), theirs, moshi))
    losses = metrics.get('loss', {})
    for i, name in enumerate(reversed(losses)):     # the layout it decodes in was trained last
        if i == 1:
            rows.append(('other tasks: those of earlier stages may be forgotten', '', '', ''))
        rows += loss_rows(name, losses[name])
    return rows


def loss_rows(name, losses):
    kinds = [kind for kind in STREAMS if kind in losses]
    by_kind = ', '.join(f'{losses[kind]:.3f}' for kind in kinds)
    return [(f'loss of {name}: {", ".join(kinds)}', by_kind, '', ''),
            ('… all, nats a token; bits a second', f'{losses["loss"]:.3f}, {losses["bits_per_sec"]:.1f}',
             '', '')]


def format_table(rows):
    wide = max(len(label) for label, *_ in rows)
    lines = []
    for label, ours, theirs, moshi in [('', 'measured', 'OmniFlatten*', 'Moshi*'), *rows]:
        lines.append(f'{label:{wide}}  {ours:>19}  {theirs:>15}  {moshi:>7}'.rstrip())
    return '\n'.join([*lines, '* from the paper, on other test data'])


# ------------------------------------------------------------------------------------------------------------
# answers

def answers(outcomes, decoded, references):
    """
    Compares the answers with the reference's, where the user lets the reference finish -> figures: is the
    text the same, how many words are wrong, and how many speech codes (edit distance; for comparison also the
    distance to the reference's next answer, which is another). duplex2 writes no text: codes only. So an
    answer as spoken is right if, of all answers of the references, it is nearest to its own.
    """
    texts, codes = written(outcomes), []        # of each answer: (the reference's, ours)
    for turns, dialogue, reference in zip(outcomes, decoded, references):
        for turn in [turn for turn in turns if turn['due']]:
            due, said = turn['due'], turn['said']
            said_codes = [code for part in said
                          for code in np.ravel(dialogue['assistant'][part['start']:part['end']]).tolist()]
            codes.append((reference['assistant'][due['start']:due['end']].ravel().tolist(), said_codes))
    distances = [Levenshtein.normalized_distance(said, due) for due, said in codes]
    others = []
    for i in range(len(codes)):
        following = (i + 1) % len(codes)
        if plain(texts[i][0]) != plain(texts[following][0]):
            others.append(Levenshtein.normalized_distance(codes[i][1], codes[following][0]))
    known = {plain(text): due for (text, _), (due, _) in zip(texts, codes)}     # each answer's codes, once
    nearest = [min(known, key=lambda text: Levenshtein.normalized_distance(said, known[text]))
               if said else None for _, said in codes]
    spoken_right = [text == plain(due) for text, (due, _) in zip(nearest, texts)]
    figures = dict(n_answer=len(texts), spoken_accuracy=mean(spoken_right), code_error_rate=mean(distances),
                   code_error_rate_of_another_answer=mean(others))
    if any(said for _, said in texts):
        errors = words.error_rate(*zip(*texts))
        right = [is_right(*pair) for pair in texts]
        figures |= dict(answer_accuracy=mean(right), answer_wer=errors['wer'], answer_cer=errors['cer'])
        wrong = [pair for pair, each in zip(texts, right) if not each]
        for due, said in wrong[:5]:
            print(f'  wrong: {said!r}, expected {due!r}')
    return figures


# ------------------------------------------------------------------------------------------------------------
# a checkpoint

def measure_checkpoint(cfg):
    """-> (metrics, conversations, the outcomes of each)"""
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    checkpoint = load_checkpoint(cfg.checkpoint, device)
    model, _, codec, info = checkpoint
    dialogues = Dialogues(cfg.data, cfg.split)
    check_codec(cfg.checkpoint, codec.describe(), dialogues)
    print(f'{cfg.checkpoint}: losses of {cfg.data}, {cfg.split}', flush=True)
    metrics = dict(n_param=model.n_param(), **measure_losses(checkpoint, dialogues, device, dtype))
    state = last_state(cfg.checkpoint)
    if state:
        trained = read_json(os.path.join(state, 'state.json'))
        metrics.update(train_sec=trained['train_sec'], train_steps=trained['step'],
                       hours_heard=trained['sec_heard'] / 3600)
    references = [dialogues[i] for i in range(min(cfg.n_dialogue or len(dialogues), len(dialogues)))]
    if checkpoint.layout.order == 'turn':
        metrics |= measure_alignment(cfg, checkpoint, references)
    if checkpoint.layout.order != 'chunks':
        if not checkpoint.layout.is_voice and checkpoint.layout.name.split('.')[0] != 'asr':
            print(f'what it answers, turn by turn, to {len(references)} dialogues', flush=True)
            metrics |= replies(checkpoint, references, dtype=dtype, sampling=sampling_of(cfg, info))
        return metrics, [], []
    references = [each for each in references if len(each['user']) == len(each['assistant'])]
    if not references:
        raise ValueError(f'{cfg.data} has no two-sided dialogue in {cfg.split}')
    has_sound = can_be_heard(cfg, codec)
    start = time.perf_counter()
    decoded = listen(cfg, checkpoint, references, dtype)
    metrics['decode_sec'] = time.perf_counter() - start
    print(f'{len(references)} dialogues heard in {metrics["decode_sec"]:.0f} s', flush=True)
    if checkpoint.layout.has_state and not checkpoint.layout.has_speech_of('assistant'):
        metrics |= stops(decoded, references, codec.rate_hz, checkpoint.layout.speech_chunk)
        return metrics, [], []
    conversations = []
    for i, (reference, dialogue) in enumerate(zip(references, decoded)):
        is_rendered = has_sound and (i < cfg.n_report or cfg.whisper or cfg.export)
        wave = render(dialogue, codec) if is_rendered else None
        conversations.append(with_user_of(reference, dialogue, codec, checkpoint.layout.speech_chunk, wave))
    if cfg.turnbench:
        write_turnbench(cfg, checkpoint, references, decoded, dtype)
    outcomes = [assess(talk) for talk in conversations]
    return metrics | answers(outcomes, decoded, references), conversations, outcomes


def write_turnbench(cfg, checkpoint, references, decoded, dtype):
    """The model listens to the other side, too. A side without turns, as in recordings without a transcript,
    speaks where its codes are not silence."""
    codec, chunk = checkpoint.codec, checkpoint.layout.speech_chunk
    swap = dict(zip(ROLES, reversed(ROLES)))
    mirrored = [dict(each, user=each['assistant'], assistant=each['user'],
                     turns=[dict(turn, role=swap[turn['role']]) for turn in each['turns']])
                for each in references]
    sides = []
    for dialogues, heard in ((references, decoded), (mirrored, listen(cfg, checkpoint, mirrored, dtype))):
        whole = [[dict(role='user', start=0, end=len(each['user']), text='')] for each in dialogues]
        users = [[turn for turn in each['turns'] if turn['role'] == 'user'] for each in dialogues]
        sides.append([
            conversation(each['id'], codec.rate_hz, user or all_of_it, said, codec.silence_codes, chunk)
            for each, user, all_of_it, said in zip(dialogues, users, whole, heard)])
    lookahead_sec = codec.stream().lookahead_sec
    write_json(cfg.turnbench, turnbench.submission(zip(*sides), lookahead_sec))
    print(f'{cfg.turnbench}: {len(references)} conversations; each time is the end of a chunk of '
          f'{1000 * chunk / codec.rate_hz:.0f} ms, and {1000 * lookahead_sec:.0f} ms of the codec')


def measure_losses(checkpoint, dialogues, device, dtype):
    """-> dict(loss, tokens_per_sec) of {layout: what by_stream returns}, of {layout: tokens a second of
    conversation}, over all documents of a split, for each layout that was trained"""
    model, vocab, _, info = checkpoint
    block_size = model.config.block_size
    linear, rest = pick_linear(dtype, device, compile=False)
    if dtype == torch.int8:     # what rounding costs is measured, too
        model = for_decoding(model, rest, linear)
    losses, tokens_per_sec = {}, {}
    for layout in info.layouts:
        n_row = max(1, 8192 // block_size)
        loader = Loader(dialogues, [layout], vocab, block_size, n_row, padded=device.type != 'cpu')
        sums, sec = loss_sums(model, loader, device, Place(device, rest).autocast())
        if sec:
            losses[layout.name] = by_stream(sums, sec)
            counts = loader.measure()
            tokens_per_sec[layout.name] = counts['tokens'] / counts['sec']
    return dict(loss=losses, tokens_per_sec=tokens_per_sec)


def measure_alignment(cfg, checkpoint, references):
    """-> error rates of the model's ASR and TTS. They are measured right after the alignment stage, as in the
    paper: what is trained on dialogue afterwards forgets them."""
    model, vocab, codec, info = checkpoint
    names = {layout.name for layout in info.layouts}
    asr, tts = ([role for role in ROLES if {task, f'{task}.{role}'} & names] for task in ('asr', 'tts'))
    tts = [role for role in tts if role in asr or cfg.whisper]      # an ear judges only voices it has learned
    print(f'what it hears ({", ".join(asr) or "nobody"}), what it says '
          f'({", ".join(tts) or "nothing that it has an ear for"})', flush=True)
    figures = words.alignment(model, vocab, codec, references, asr=asr, tts=tts, whisper=cfg.whisper,
                              text_weight=info.text_weight)
    return {f'{name}_{key}': rates[key] for name, rates in figures.items() for key in ('wer', 'cer')}


def can_be_heard(cfg, codec):
    """Can the codec make sound? Asked before hours of listening. If it cannot, the report is silent; but
    Whisper and the export need sound."""
    try:
        codec.decode(np.repeat(codec.silence_codes[:1], round(codec.rate_hz), 0))
    except ValueError as error:
        if cfg.whisper or cfg.export:
            raise
        print(f'note: the report will be without sound: {error}')
        return False
    return True


def sampling_of(cfg, info):
    return Sampling(cfg.text_temperature, cfg.speech_temperature, silence_bias=cfg.silence_bias,
                    text_weight=info.text_weight, seed=cfg.seed)


def listen(cfg, checkpoint, references, dtype):
    """-> the dialogue that the model has with each reference's user"""
    n, batches = checkpoint.layout.speech_chunk, side_by_side(references, cfg.batch_size)
    n_chunk = sum(-(-len(references[batch[-1]]['user']) // n) for batch in batches)
    with tqdm(total=n_chunk, desc='listening', unit=' chunks', leave=False, disable=None) as bar:
        return hear(checkpoint, references, batches, bar.update, dtype=dtype,
                    sampling=sampling_of(cfg, checkpoint.info))


# ------------------------------------------------------------------------------------------------------------

def main(cfg):
    """Measures what cfg names, prints and writes it. Returns the metrics."""
    out = cfg.out or os.path.join(cfg.dialogues or cfg.checkpoint, 'evaluation')
    if cfg.whisper:     # a wrong folder ends the run now, not after all the listening
        words.load_whisper(cfg.whisper, pick_device(cfg.device))
    if cfg.dialogues:
        talks = foreign.read_conversations(
            cfg.dialogues, user_channel=cfg.user_channel, user_name=cfg.user_name,
            assistant_name=cfg.assistant_name, vad=cfg.vad, gap_sec=cfg.gap_sec)
        conversations = list(islice(talks, cfg.n_dialogue or None))
        outcomes = [assess(talk) for talk in conversations]
        metrics = {}
    else:
        metrics, conversations, outcomes = measure_checkpoint(cfg)
    if conversations:
        metrics |= summarise([turn for turns in outcomes for turn in turns], conversations[0]['rate_hz'])
        metrics |= who_speaks(conversations)
        metrics['full_duplex_bench'] = on_full_duplex_bench(cfg, conversations)
    if conversations and cfg.whisper:
        said = words.said_as_written(conversations, cfg.whisper, device=pick_device(cfg.device))
        metrics |= dict(said_wer=said['wer'], said_cer=said['cer'])
    os.makedirs(out, exist_ok=True)
    origin = describe_run()
    write_json(os.path.join(out, 'metrics.json'), dict(origin=origin, **metrics))
    if conversations and cfg.judge_url:     # last: a server that fails does not take the rest along
        metrics |= ask_judge(cfg, conversations, os.path.join(out, 'judge.jsonl'))
        write_json(os.path.join(out, 'metrics.json'), dict(origin=origin, **metrics))
    rows = table(metrics)
    print('\n' + format_table(rows))
    if metrics.get('full_duplex_bench'):
        print('\n' + full_duplex_bench.table(metrics['full_duplex_bench']))
    if conversations and cfg.n_report:
        write_report(cfg, os.path.join(out, 'report.html'), conversations, outcomes, rows)
    if cfg.export:
        counts = foreign.export_full_duplex_bench(conversations, cfg.export)
        print(f'{cfg.export}: ' + ', '.join(f'{n} of {task}' for task, n in counts.items()))
    return metrics


def on_full_duplex_bench(cfg, conversations):
    cases, people = [], {}
    if cfg.dialogues:
        cases = full_duplex_bench.read_cases(cfg.dialogues, cfg.vad, cfg.n_dialogue or None)
        people = full_duplex_bench.read_people(cfg.dialogues)
    return full_duplex_bench.measure(cases or full_duplex_bench.cases_of(conversations), people)


def write_report(cfg, path, conversations, outcomes, rows):
    figures = [(label, ours, ' / '.join(filter(None, theirs))) for label, ours, *theirs in rows]
    data = cfg.dialogues or f'{cfg.data}, {cfg.split}'
    note = (f'{data}: {len(conversations)} dialogues. OmniFlatten / Moshi: from the paper, on other test '
            f'data. A frame is {1e3 / conversations[0]["rate_hz"]:.0f} ms; frames are counted from the end '
            'of what the user says and, where the user interrupts, from its start.'
            + f' The first {cfg.n_report} dialogues stand below.' * (len(conversations) > cfg.n_report))
    report.write(path, cfg.dialogues or cfg.checkpoint, conversations[:cfg.n_report],
                 outcomes, figures, note=note, heads=('measured', 'OmniFlatten / Moshi'))
    print(f'look and listen: {path}')


def ask_judge(cfg, conversations, cache):
    figures = {}
    for name, use_expected in (('answers', False), ('reference', True)):
        if use_expected and conversations[0]['expected'] is None:
            continue
        items = judge.to_items(conversations, use_expected)
        scores = judge.score(
            items, cfg.judge_url, cfg.judge_model, prompt_path=cfg.judge_prompt or judge.PROMPT,
            cache_path=cache, usd_per_m_in=cfg.judge_usd_per_m_in, usd_per_m_out=cfg.judge_usd_per_m_out)
        given = [answer['score'] for answer in scores if answer['score'] is not None]
        figures |= {f'judge_score_of_{name}': mean(given), f'n_judged_{name}': len(given)}
    return figures


if __name__ == '__main__':
    try:
        main(config.load(Config, sys.argv[1:]))
    except ValueError as error:
        raise SystemExit(str(error))
