"""
How many questions of a data set are answered right when other voices ask them: espeak-ng's that nobody was
trained on, and voices made of recordings of people, as flite, festival and Pico have them where they are
installed (apt-get install flite festival festvox-kdlpc16k festvox-us-slt-hts; pip install ttspico, which
takes a C compiler). Each as it is, and in a room: echoes that die away by 60 dB in 0.3 s, as loud as what
comes straight, over noise at 20 dB.

    python -m measures.voices --checkpoint=out/demo --data=data/demo

    right     the text of the first answer is the one that the data set has for this question
    early     the answer begins before the question has ended
    none      there is no answer within 4 s

These voices are for testing: never train on them.
"""
import argparse
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile

import numpy as np
from tqdm import tqdm

from checkpoint import check_codec, load_checkpoint
from clock import is_broken_off
from common.audio import read_audio
from common.device import pick_device, pick_dtype
from common.files import write_json
from common.origin import describe_run
from config import Parser
from data.dialogues import Dialogues
from data.tts import SAMPLE_RATE, TEST_VOICES, Espeak, add_noise, noises, trim
from decode import Sampling, converse
from flatten import ROLES, START
from measures.words import plain

FESTIVAL = '/usr/share/festival/voices'
# awb_time can only tell the time; kal has 8 kHz; kal_diphone is of the recordings of flite's kal16
UNUSED = 'awb_time', 'kal', 'kal_diphone'
LEAD_SEC, REPLY_SEC, LEVEL = 0.3, 4.0, 0.08


def asked(dialogues):
    """{question: its answer} of the dialogues that nobody interrupts"""
    answers = {}
    for dialogue in (dialogues[i] for i in range(len(dialogues))):
        turns = sorted(dialogue['turns'], key=START)
        for turn, reply in zip(turns, turns[1:]):
            if (turn['role'], reply['role']) == ROLES and not is_broken_off(reply, turns):
                answers[turn['text']] = reply['text']
    return answers


def speak(command, text):
    """What a command says into the file that is its last word, at 16 kHz, without silence around it"""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'said.wav')
        subprocess.run([*command, path], check=True, input=text, text=True)
        wave = read_audio(path, SAMPLE_RATE)
    first, end = trim(wave)
    return wave[first:end]


def pico(accent, text):
    """What SVOX Pico says, at 16 kHz, without silence around it"""
    from ttspico import TtsEngine  # where it is installed
    wave = np.frombuffer(TtsEngine(accent).speak(text), np.int16) / np.float32(32768)
    first, end = trim(wave)
    return wave[first:end]


def find_voices():
    """{name: text -> wave at 16 kHz} of those that are installed"""
    found = {}
    if shutil.which('flite'):
        listed = subprocess.run(['flite', '-lv'], check=True, capture_output=True, text=True).stdout
        for name in sorted({*listed.split(':')[1].split()} - {*UNUSED}):
            say = ['flite', '-voice', name, '-o']
            found[f'flite {name}'] = lambda text, say=say: speak(say, text)
    if shutil.which('text2wave'):
        names = [name for language in os.listdir(FESTIVAL) for name in os.listdir(f'{FESTIVAL}/{language}')]
        for name in sorted({*names} - {*UNUSED}):
            say = ['text2wave', '-eval', f'(voice_{name})', '-o']
            found[f'festival {name}'] = lambda text, say=say: speak(say, text)
    if importlib.util.find_spec('ttspico'):
        for accent in 'en-GB', 'en-US':
            found[f'pico {accent}'] = functools.partial(pico, accent)
    return found


def echo(wave, rng, decay_sec=0.3):
    """Noise that dies away by 60 dB in decay_sec, as loud in all as what comes straight"""
    n = round(1.2 * decay_sec * SAMPLE_RATE)
    tail = rng.standard_normal(n) * 10 ** (-3 * np.arange(n) / decay_sec / SAMPLE_RATE)
    tail[:SAMPLE_RATE // 500] = 0       # the first wall is 35 cm away
    response = tail / np.sqrt(np.sum(tail ** 2))
    response[0] = 1
    return np.convolve(wave, response)


def record(wave, rng, is_room, level=LEVEL):
    """-> a user's wave with noise before, under and behind the question; second at which the question ends.
    level: the root mean square of the speech"""
    wave = np.pad(wave * level / np.sqrt(np.mean(wave ** 2)), (round(LEAD_SEC * SAMPLE_RATE), 0))
    end_sec = len(wave) / SAMPLE_RATE
    wave = np.pad(wave, (0, round(REPLY_SEC * SAMPLE_RATE)))
    if is_room:
        wave = echo(wave, rng)[:len(wave)]
    noise = noises()[rng.integers(len(noises()))]
    at = rng.integers(len(noise) - len(wave))
    wave = add_noise(wave, noise[at:at + len(wave)], 20 if is_room else 35, level ** 2)
    return wave.astype(np.float32), end_sec


def ask(checkpoint, waves, ends_sec, answers, dtype):
    """-> {'right', 'early', 'none': shares of the questions}"""
    codec, layout = checkpoint.codec, checkpoint.layout
    sampling = Sampling(0.0, 0.0, text_weight=checkpoint.info.text_weight)
    heard, _ = converse(checkpoint.model, checkpoint.vocab, layout, codec.encode_many(waves),
                        codec.silence_codes[0].tolist(), sampling=sampling, dtype=dtype)
    said = [sorted((turn for turn in each['turns'] if turn['role'] == 'assistant'), key=START)
            for each in heard]
    right = [bool(turns) and plain(turns[0]['text']) == plain(answer) for turns, answer in zip(said, answers)]
    early = [bool(turns) and turns[0]['start'] / codec.rate_hz < end for turns, end in zip(said, ends_sec)]
    return dict(right=np.mean(right), early=np.mean(early), none=np.mean([not turns for turns in said]))


def table(rows):
    """{voice: {'clean' and 'room': shares}} -> Markdown"""
    lines = ['| voice | right | early | none | in a room: right | early | none |', '|---' + '|--:' * 6 + '|']
    for voice, row in rows.items():
        cells = [f'{row[where][key]:.0%}' for where in row for key in ('right', 'early', 'none')]
        lines.append('| ' + ' | '.join([voice, *cells]) + ' |')
    return '\n'.join(lines)


def main():
    parser = Parser(prog='python -m measures.voices', description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--checkpoint', default='out/demo', help='of duplex3 or duplex2')
    parser.add_argument('--data', default='data/demo', help='whose test split has the questions and answers')
    parser.add_argument('--level_db', type=float, default=0.0,
                        help='how much louder the voices are than 22 dB below full scale: -20 is soft')
    parser.add_argument('--n_noise', type=int, default=1,
                        help='how often each question is asked, in another noise and room each time')
    parser.add_argument('--result', help='a JSON file for the figures')
    args = parser.parse_args()
    if args.n_noise < 1:
        raise ValueError(f'--n_noise={args.n_noise}: each question has to be asked once at least')
    device = pick_device('auto')
    checkpoint, dialogues = load_checkpoint(args.checkpoint, device), Dialogues(args.data, 'test')
    check_codec(args.checkpoint, checkpoint.codec.describe(), dialogues)
    if checkpoint.layout.order != 'chunks' or checkpoint.codec.sample_rate != SAMPLE_RATE:
        raise ValueError(f'{args.checkpoint}: its layout has to be on the clock, its codec has to have '
                         f'{SAMPLE_RATE} Hz')
    answers, espeak = asked(dialogues), Espeak(forgets=True)
    voices = {'espeak-ng, unheard': lambda text: espeak.say(
        text, TEST_VOICES[list(answers).index(text) % len(TEST_VOICES)])[0], **find_voices()}
    rows, level = {}, LEVEL * 10 ** (args.level_db / 20)
    for voice, say in tqdm(voices.items(), desc='voices', leave=False, disable=None):
        waves = [say(text) for text in answers]
        for where in ('clean', 'room'):
            rngs = [np.random.default_rng(1 + i) for i in range(args.n_noise)]
            recorded, ends_sec = zip(*(record(wave, rng, where == 'room', level) for rng in rngs
                                       for wave in waves))
            rows.setdefault(voice, {})[where] = ask(checkpoint, recorded, ends_sec,
                                                    [*answers.values()] * args.n_noise,
                                                    pick_dtype('auto', device))
    people = [row for voice, row in rows.items() if not voice.startswith('espeak')]
    if people:
        rows['people, all'] = {where: {key: np.mean([row[where][key] for row in people])
                                       for key in people[0][where]} for where in people[0]}
    print(f'{len(answers)} questions, asked by every voice in {args.n_noise} noises at {args.level_db:+g} dB')
    print(table(rows))
    if args.result:
        write_json(args.result, dict(origin=describe_run(), n_question=len(answers), n_noise=args.n_noise,
                                     level_db=args.level_db, voices=rows))


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(str(error)) from None
