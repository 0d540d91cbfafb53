"""
Text dialogues become conversations on two channels: they are read, filtered, spoken, and laid on one clock.

    user       ░░ What is the, um,   capital of Peru? ░░      ░ uh-huh ░        ░░ And of France? ░░
    assistant                                           ▓▓ The capital of Peru is Lima, a│        ▓▓ Paris. ▓▓
                                 no answer yet        at once      goes on           stops

    python data/simulate.py --check --examples=5 alpaca.json            # what can be spoken, what not and why
    python data/simulate.py --wav=3 --out=out/listen alpaca.json        # three of them, to listen to; for
                                                                        # evaluate.py --dialogues=out/listen
    python data/simulate.py --codec=data/demo --out=data/simulated alpaca.json belle.jsonl

Files hold JSON or JSON lines in the forms of Alpaca, BELLE, MOSS, UltraChat, ShareGPT, OpenAI, OASST or LCCC,
recognised by content. A turn that cannot be spoken, or that uses a tool, ends its dialogue; the pairs of a
question and an answer before it are kept.

The paper's data (arXiv:2410.17799, section 4), and the settings for it:

    the assistant answers at once                                           --response_sec=0
    the user goes on after a normally distributed pause, not given there    --gap_mean_sec --gap_sd_sec
    whether that pause is longer after a long answer is not given           --gap_share
    the user interrupts, how often is not given; the assistant stops        --p_interrupt --reaction_sec
    noise of 15 to 30 dB, in the user's channel alone                       --noise --snr_db
    no backchannels ("uh-huh"), no hesitations ("um")                       --p_backchannel=0 --p_hesitate=0

What a dialogue becomes depends on --seed, its id and the settings alone, not on the dialogues before it or on
the process that makes it. All splits draw from the same voices; for voices that are heard nowhere else, make
a data set of its own with --user_voices.
"""
import functools
import glob
import hashlib
import json
import math
import os
import re
import sys
import zlib
from collections import Counter

import numpy as np

from common.audio import read_audio, write_audio
from data import tokenise
from data.texts import ALL_REASONS, collect, language, print_table
from data.tts import HAN, SAMPLE_RATE, CosyVoice, Espeak, add_noise, noises
from flatten import ROLES

LEVEL = 0.05                    # root mean square of every voice, -26 dB
FADE_SEC = 0.01                 # of a voice that stops inside a word
# "mhm" is not among them: espeak-ng spells it out
BACKCHANNELS = {'en': ('uh-huh', 'yeah', 'okay', 'right'), 'zh': ('嗯', '对', '嗯嗯', '好')}
FILLERS = {'en': (', um,', ', uh,'), 'zh': ('，嗯，', '，呃，')}
MARGIN_SEC = 0.3                # a backchannel keeps away from either end of the turn that it is said to
MIN_INTERRUPTED_SEC = 1.0       # a shorter turn is over before it can be interrupted


# ------------------------------------------------------------------------------------------------------------
# who speaks when

def make_plan(id, n_pair, tts, user_voices, args):
    """All that chance decides about a dialogue. It depends on seed, id and settings only, not on what is
    said or how long that takes."""
    rng = np.random.default_rng([args.seed, zlib.crc32(id.encode())])

    def gap():
        return max(args.gap_min_sec, rng.normal(args.gap_mean_sec, args.gap_sd_sec))

    # the order of the lines below is that of the random numbers: in another order the data would be other
    plan = dict(voice=user_voices[rng.integers(len(user_voices))], style=tts.style(rng),
                snr_db=rng.uniform(*args.snr_db), noise=rng.random(2),
                lead_sec=gap(), tail_sec=gap(), steps=[])
    shares = args.p_interrupt, args.p_backchannel, args.p_hesitate
    for _ in range(n_pair):
        interrupts, backchannel, hesitates = (rng.random(3) < shares).tolist()
        plan['steps'].append(dict(
            gap_sec=gap(),
            interrupts=interrupts, interrupt_at=rng.uniform(0.2, 0.8),
            reaction_sec=rng.uniform(*args.reaction_sec),
            backchannel=backchannel, backchannel_at=rng.random(), backchannel_word=rng.random(),
            hesitates=hesitates, hesitate_at=rng.random(), hesitate_sec=rng.uniform(0.3, 1.2),
            filler=rng.random()))
    return plan


# a word with the punctuation around it; a Chinese character is a word
WORD = re.compile(rf'[“‘（《「(\"\']*(?:[{HAN}]|[^\s{HAN}“‘（《「]+)[^\w\s“‘（《「(]*')


def place_words(text, heard, n_sample):
    """
    -> [(word, end in text, start sample)]. heard: (text, start sample) as the TTS tells them, or None. A TTS
    cuts the text in other places and leaves parts out, so a start that it does not tell is interpolated
    between those that it tells, in proportion to the characters.
    """
    known, at = {0: 0}, 0
    for word, start in heard or []:
        word = word.rstrip(',，')
        found = text.find(word, at) if word else -1
        if found >= 0:
            known[found], at = start, found + len(word)
    known[len(text)] = n_sample
    starts = np.maximum.accumulate([known[i] for i in sorted(known)])
    return [(word.group().strip(), word.end(), int(np.interp(word.start(), sorted(known), starts)))
            for word in WORD.finditer(text)]


def say(tts, text, voice, style):
    wave, heard = tts.say(text, voice, **style)[:2]
    power = np.mean(wave ** 2) if len(wave) else 0
    if power == 0:
        raise ValueError(f'no sound of {text!r} in voice {voice}')
    return (wave * (LEVEL / np.sqrt(power))).astype(np.float32), heard


def say_user(tts, text, step, plan):
    """-> text, wave, heard; with a pause before some word, and sometimes a filler before the pause, if the
    plan says so."""
    words = [word for word in WORD.finditer(text) if re.search(r'\w', word.group())]
    if not step['hesitates'] or len(words) < 4:
        return text, *say(tts, text, plan['voice'], plan['style'])
    cut = words[1 + int(step['hesitate_at'] * (len(words) - 2))].start()
    first, rest = text[:cut].rstrip(' ,，、'), text[cut:]
    if step['filler'] < 0.5:
        fillers = FILLERS[language(text)]
        first += fillers[int(step['filler'] * 2 * len(fillers))]
        text = first + ' ' * (language(text) == 'en') + rest
    comma = ',' if language(text) == 'en' else '，'      # the voice stays up: it is not the end
    one, heard = say(tts, first.rstrip(comma) + comma, plan['voice'], plan['style'])
    pause = np.zeros(round(step['hesitate_sec'] * SAMPLE_RATE), np.float32)
    other, heard_too = say(tts, rest, plan['voice'], plan['style'])
    if heard is not None:
        heard = heard + [(word, start + len(one) + len(pause)) for word, start in heard_too]
    return text, np.concatenate([one, pause, other]), heard


def make_turn(role, start, text, wave, heard):
    return dict(role=role, start=start, text=text, wave=wave, words=place_words(text, heard, len(wave)),
                known=heard is not None)


def end(turn):
    return turn['start'] + len(turn['wave'])


def interrupt(turn, stop):
    """The assistant falls silent at sample stop; its text ends with the last word that it has begun."""
    turn['wave'] = turn['wave'][:stop - turn['start']].copy()
    n = min(len(turn['wave']), round(FADE_SEC * SAMPLE_RATE))
    turn['wave'][len(turn['wave']) - n:] *= np.linspace(1, 0, n, dtype=np.float32)
    turn['words'] = [word for word in turn['words'] if turn['start'] + word[2] < stop]
    turn['text'] = turn['text'][:turn['words'][-1][1]].rstrip()


def simulate(texts, plan, tts, args, hop=1):
    """-> user's wave, assistant's wave (16 kHz, without noise), turns in seconds as tokenise.Recording has
    them. hop: samples a frame of the codec, which need not be whole (SNAC: 1365.33). The assistant starts
    where a frame starts: otherwise it would start in the frame in which the user ends."""
    def samples(sec):
        return round(sec * SAMPLE_RATE)

    def after(answer, gap_sec):     # a long answer takes longer to think over
        return end(answer) + samples(gap_sec) + round(args.gap_share * len(answer['wave']))

    turns, answers = [], []
    for step, question, answer in zip(plan['steps'], texts[::2], texts[1::2]):
        last, start, stop = answers[-1] if answers else None, samples(plan['lead_sec']), None
        said = say_user(tts, question, step, plan)
        if last:
            start = after(last, step['gap_sec'])
            is_long = len(last['wave']) >= samples(MIN_INTERRUPTED_SEC)
            # a question that is over before the assistant has reacted to it interrupts nobody
            outlasts_reaction = len(said[1]) > samples(step['reaction_sec'] + 0.1)
            if step['interrupts'] and is_long and outlasts_reaction:
                start = last['start'] + int(step['interrupt_at'] * len(last['wave']))
                stop = start + samples(step['reaction_sec'])
        user = make_turn('user', start, *said)
        start = math.ceil(math.ceil((end(user) + samples(args.response_sec)) / hop) * hop)
        answered = say(tts, answer, args.assistant_voice, args.assistant_style)
        assistant = make_turn('assistant', start, answer, *answered)
        if after(assistant, plan['tail_sec']) > samples(args.max_sec):
            break
        if stop is not None:
            last['backchannel'] = None
            if stop < end(last):
                interrupt(last, stop)
        turns += [user, assistant]
        answers.append(assistant)
        assistant['backchannel'] = step if step['backchannel'] else None
    if not turns:
        raise ValueError(f'the first question and answer are longer than --max_sec={args.max_sec:g}')
    for turn in answers:
        if step := turn['backchannel']:
            words = BACKCHANNELS[language(turn['text'])]
            text = words[int(step['backchannel_word'] * len(words))]
            said = say(tts, text, plan['voice'], plan['style'])
            room = len(turn['wave']) - len(said[0]) - 2 * samples(MARGIN_SEC)
            if room >= 0:
                start = turn['start'] + samples(MARGIN_SEC) + int(step['backchannel_at'] * room)
                turns.append(make_turn('user', start, text, *said))
    turns.sort(key=lambda turn: turn['start'])
    waves = {role: np.zeros(after(answers[-1], plan['tail_sec']), np.float32) for role in ROLES}
    record = []
    for turn in turns:
        waves[turn['role']][turn['start']:end(turn)] += turn['wave']
        start_sec, end_sec = turn['start'] / SAMPLE_RATE, end(turn) / SAMPLE_RATE
        seconds = [(turn['start'] + start) / SAMPLE_RATE for *_, start in turn['words']] + [end_sec]
        words = [dict(text=word, start_sec=a, end_sec=b)
                 for (word, *_), a, b in zip(turn['words'], seconds, seconds[1:])]
        record.append(dict(role=turn['role'], start_sec=start_sec, end_sec=end_sec, text=turn['text'],
                           words=words if turn['known'] else []))
    return *waves.values(), record


@functools.lru_cache(64)
def read_noise(path):
    return read_audio(path, SAMPLE_RATE, channel=0)


def with_noise(wave, plan, bank):
    """Adds a noise of the bank (waves, or paths of files) in a loop: which one, from where in it, and how
    loud, the plan says."""
    noise, name = bank[int(plan['noise'][0] * len(bank))], 'noise'
    if isinstance(noise, str):
        name, noise = noise, read_noise(noise)
    piece = np.resize(np.roll(noise, -int(plan['noise'][1] * len(noise))), len(wave))
    power = np.mean(piece ** 2)
    if power == 0:
        raise ValueError(f'{name} is silent for {len(wave) / SAMPLE_RATE:.0f} s')
    return add_noise(wave, piece, plan['snr_db'], LEVEL ** 2, power)


# ------------------------------------------------------------------------------------------------------------
# the command line

def span(text):
    low, high = map(float, text.split(','))
    return low, high


def voice_options(parser):
    """Who speaks, and in what noise."""
    parser.add_argument('--tts', choices=('espeak', 'cosyvoice'), default='espeak')
    parser.add_argument('--tts_command', help='with cosyvoice: how its worker is started')
    parser.add_argument('--user_voices',
                        help='a folder of prompt wavs, or names with commas between '
                             '(espeak: all but the odd)')
    parser.add_argument('--noise',
                        help='folder of noise files, at any depth, as MUSAN has them '
                             '(without: made up, white to pink)')


def arguments():
    parser = tokenise.arguments(__doc__)
    parser.add_argument('files', nargs='+', help='text dialogues: .json, .jsonl, .gz of them')
    parser.add_argument('--check', action='store_true', help='only count what can be spoken')
    parser.add_argument('--examples', type=int, default=0,
                        help='with --check: show so many dialogues that are kept and that are not')
    parser.add_argument('--wav', type=int, default=0,
                        help='only write the first so many as wavs, with transcripts, into --out')
    parser.add_argument('--max_words', type=int, default=200,
                        help='words, or Chinese characters, a turn may have (200: the paper)')
    parser.add_argument('--max_symbols', type=float, default=0.05,
                        help='share of rare symbols a turn may have; they are left out (0.05)')
    voice_options(parser)
    parser.add_argument('--assistant_voice', help='a prompt wav or a name, which no user has (espeak: f1)')
    parser.add_argument('--response_sec', type=float, default=0.0,
                        help='until the assistant answers (0: the paper)')
    parser.add_argument('--gap_mean_sec', type=float, default=0.6,
                        help='until the user speaks again: a normal distribution (0.6; not in the paper)')
    parser.add_argument('--gap_sd_sec', type=float, default=0.4, help='(0.4; not in the paper)')
    parser.add_argument('--gap_share', type=float, default=0.15,
                        help='of the length of an answer, by which the gap after it is longer (0.15; 0: the '
                             'same for all)')
    parser.add_argument('--gap_min_sec', type=float, default=0.1, help='(0.1)')
    parser.add_argument('--p_interrupt', type=float, default=0.15,
                        help='that the user does not wait for the end of an answer (0.15; not in the paper)')
    parser.add_argument('--reaction_sec', type=span, default=(0.2, 0.4),
                        help='until the interrupted assistant stops, from,to (0.2,0.4; the paper: at once)')
    parser.add_argument('--p_backchannel', type=float, default=0.1,
                        help='that the user says uh-huh during an answer (0.1; the paper: 0)')
    parser.add_argument('--p_hesitate', type=float, default=0.1,
                        help='that the user pauses inside a turn for 0.3 to 1.2 s (0.1; the paper: 0)')
    parser.add_argument('--snr_db', type=span, default=(15.0, 30.0),
                        help="of the noise in the user's channel, from,to (15,30: the paper)")
    parser.add_argument('--max_sec', type=float, default=140.0,
                        help='longer dialogues end after a pair (140: duplex3 in 8,192 tokens)')
    return parser


def find(folder, endings):
    paths = sorted(path for path in glob.glob(os.path.join(glob.escape(folder), '**'), recursive=True)
                   if path.lower().endswith(endings))
    if not paths:
        raise ValueError(f'{folder} holds no {" or ".join(endings)}')
    return paths


def pick_tts(args):
    """-> tts, the voices of --user_voices; None where espeak's are not given"""
    voices = args.user_voices
    if voices:
        voices = find(voices, ('.wav',)) if os.path.isdir(voices) else voices.split(',')
    if args.tts == 'espeak':
        return Espeak(forgets=True), voices
    if not (args.tts_command and voices):
        raise ValueError('--tts=cosyvoice needs --tts_command and --user_voices')
    return CosyVoice(args.tts_command, voices), voices


def pick_voices(args):
    """-> tts, the users' voices. The assistant keeps one voice and one way of speaking."""
    for name in ('p_interrupt', 'p_backchannel', 'p_hesitate'):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f'--{name}={getattr(args, name)}: a probability is from 0 to 1')
    for name in ('reaction_sec', 'snr_db'):
        if getattr(args, name)[0] > getattr(args, name)[1]:
            raise ValueError(f'--{name}: the first number is above the second')
    if min(args.response_sec, args.gap_min_sec, args.gap_sd_sec, args.gap_share, args.reaction_sec[0]) < 0:
        raise ValueError('--response_sec, --gap_min_sec, --gap_sd_sec, --gap_share and --reaction_sec '
                         'are not below 0')
    if args.tts == 'cosyvoice' and not args.assistant_voice:
        raise ValueError('--tts=cosyvoice needs --tts_command, --user_voices and --assistant_voice')
    tts, voices = pick_tts(args)
    if args.tts == 'espeak':
        args.assistant_style, args.assistant_voice = dict(rate=200), args.assistant_voice or 'f1'
        return tts, voices or [voice for voice in tts.voices if voice != args.assistant_voice]
    args.assistant_style = {}
    return tts, voices


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if any(word.startswith(('--check', '--wav')) for word in argv):     # these tokenise nothing
        argv = ['--codec=', '--out=out/simulated', *argv]
    args = arguments().parse_args(argv)
    items, table, notes = collect(args.files, args)
    if int(os.environ.get('RANK', 0)) == 0:
        print_table(table, notes, args.examples, args.seed)
    if args.check:
        return
    if not items:
        counts = sum(table.values(), Counter())
        why = ', '.join(f'{counts[reason]} {reason}' for reason in ALL_REASONS if counts[reason])
        raise ValueError(f'none of the {counts["dialogues"]} dialogues can be spoken ({why or "no rows"}); '
                         '--check --examples=5 shows some')
    tts, voices = pick_voices(args)
    bank = find(args.noise, ('.wav', '.flac')) if args.noise else noises()

    def read_recording(what, codec):
        import soxr
        id, texts = what
        plan = make_plan(id, len(texts) // 2, tts, voices, args)
        rate, hop = SAMPLE_RATE, 1
        if codec:
            rate, hop = codec.sample_rate, SAMPLE_RATE / codec.rate_hz
        user, assistant, turns = simulate(texts, plan, tts, args, hop)
        user = soxr.resample(with_noise(user, plan, bank), SAMPLE_RATE, rate)
        return tokenise.Recording(user, soxr.resample(assistant, SAMPLE_RATE, rate), turns)

    if args.wav:
        os.makedirs(args.out, exist_ok=True)
        for id, texts in list(items.items())[:args.wav]:
            recording, path = read_recording((id, texts), None), os.path.join(args.out, id)
            write_audio(path + '.wav', np.stack([recording.user, recording.assistant], 1), SAMPLE_RATE)
            with open(path + '.jsonl', 'w', encoding='utf-8') as file:     # as evaluate.py --dialogues reads
                for turn in sorted(recording.turns, key=lambda turn: turn['start_sec']):
                    row = {key: turn[key] for key in ('role', 'start_sec', 'end_sec', 'text')}
                    file.write(json.dumps(row, ensure_ascii=False) + '\n')
            n_sec = len(recording.user) / SAMPLE_RATE
            print(f'{path}.wav  {n_sec:.1f} s, left the user, right the assistant')
        return
    no_matter = ('files', 'check', 'examples', 'wav', 'out', 'codec', 'tokenizer', 'batch_sec', 'n_thread',
                 'device', 'tts_command')
    digest = hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]
    recipe = {key: value for key, value in vars(args).items() if key not in no_matter}
    recipe |= dict(user_voices=voices, n_noise=len(bank), texts=digest)
    tokenise.run({id: (id, texts) for id, texts in items.items()}, read_recording, args, recipe)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
