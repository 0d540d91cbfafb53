"""
What a model hears while it speaks, and where that stops it: data for the layout mini_omni2_irq, as the report
of Mini-Omni2 describes it (arXiv:2410.11190).

    user         ░░░░░░░░░░░░░░ Stop Omni. ░░░░░░░░░░░░     noise, a stop phrase in it, a tail of noise
    assistant   │                         │                 its turn breaks off where the phrase ends
    state        n-irq n-irq … n-irq n-irq irq irq irq

    python data/stop/prepare.py --codec=data/demo --tokenizer=data/demo/tokenizer --out=data/stops
    python data/stop/prepare.py --noise=LibriTTS --n_sample=20000 --codec=codecs/s3 --out=data/stops

The noise is any audio: of machines, of music, of people who talk to somebody else. It lies as far below the
phrase as --snr_db says. A share of the samples has no stop phrase. One half of these is noise alone, in the
other half the same voices say something else.

Only what is heard has sound. The assistant's channel is silence, and its turn has no text: its own voice is
not needed for the state, and its echo in the user's channel is not simulated. Voices of val and test are
heard nowhere else. Noises and sentences are the same in all splits.
"""
import hashlib
import json
import math
import os
import re
import zlib

import numpy as np

from data import tokenise
from data.simulate import find, pick_tts, say, span, voice_options, with_noise
from data.tts import SAMPLE_RATE, TEST_VOICES, VAL_VOICES, noises, train_voices

PHRASES = ['Stop Omni.']
# some begin or end as the phrase does
SENTENCES = [
    'Stop worrying.', 'Stop at the corner.', 'Where is the bus stop?', 'Hello Omni.', 'Thank you, Omni.',
    'Top of the morning.', 'Tell me more.', 'Go on, please.', 'What time is it?', 'I will be home at six.',
    'Did you call your mother?', 'Put it on the table.', 'Nobody knows.', 'Yes, of course.',
    'Come over here, Tom.', 'That is a nice story.']
AUDIO = ('.wav', '.flac', '.mp3', '.ogg', '.opus')


def read_lines(path, default):
    """-> the lines of a file that are not blank; default where there is no path"""
    if path is None:
        return default
    if not os.path.isfile(path):
        raise ValueError(f'no file {path}')
    with open(path, encoding='utf-8') as file:
        lines = [line.strip() for line in file if line.strip()]
    if not lines:
        raise ValueError(f'{path} has nothing to say: it needs a text a line')
    return lines


def split_voices(voices, args):
    """Names, None for all of espeak's -> {split: its voices}. As many of a hundred are held out as of a
    hundred samples, but one at least."""
    if voices is None:
        return dict(test=TEST_VOICES, val=VAL_VOICES, train=train_voices())
    split_of = tokenise.split_ids(voices, args.val_share, args.test_share, args.seed)
    return {split: [voice for voice in voices if split_of[voice] == split] for split in split_of.values()}


def make_sample(id, voice, tts, bank, args, rate_hz):
    """-> what is heard, float32 at 16 kHz, and its turns in seconds. Both depend on seed, id and settings
    only. bank: noises, as waves or paths. rate_hz: frames a second"""
    rng = np.random.default_rng([args.seed, zlib.crc32(id.encode())])
    # the order of these lines is that of the random numbers: in another order the data would be other
    plan = dict(snr_db=rng.uniform(*args.snr_db), noise=rng.random(2))
    before_sec, tail_sec = rng.uniform(args.min_sec, args.max_sec), rng.uniform(0, args.tail_sec)
    chance, style = rng.random(), tts.style(rng)
    stops = chance >= args.share_without
    texts = args.phrases if stops else args.sentences if chance < args.share_without / 2 else ['']
    text = texts[rng.integers(len(texts))]
    # not in the first frame: a turn is broken off by somebody who begins after it
    start = max(round(before_sec * SAMPLE_RATE), math.ceil(SAMPLE_RATE / rate_hz))
    said = say(tts, text, voice, style)[0] if text else np.zeros(0, np.float32)
    end = start + len(said)
    wave = np.pad(said, (start, round(tail_sec * SAMPLE_RATE)))
    turns = [dict(role='user', start_sec=start / SAMPLE_RATE, end_sec=end / SAMPLE_RATE, text=text)]
    if stops:
        turns.append(dict(role='assistant', start_sec=0.0, end_sec=end / SAMPLE_RATE, text=''))
    return with_noise(wave, plan, bank), turns if text else []


def arguments():
    parser = tokenise.arguments(__doc__)
    voice_options(parser)
    add = parser.add_argument
    add('--n_sample', type=int, default=10000, help='(10000)')
    add('--phrases', help=f'file of what stops the assistant, a text a line ({", ".join(PHRASES)})')
    add('--sentences', help='file of what does not stop it, a text a line (some that are like the phrase)')
    add('--share_without', type=float, default=0.3,
        help='of samples without a phrase, half of them with a sentence in its place (0.3)')
    add('--min_sec', type=float, default=0.5, help='of noise before the phrase, at least (0.5)')
    add('--max_sec', type=float, default=6.0, help='of noise before the phrase, at most (6)')
    add('--tail_sec', type=float, default=10.0, help='of noise behind the phrase, at most (10: Mini-Omni2)')
    add('--snr_db', type=span, default=(0.0, 20.0), help='of the phrase over the noise, from,to (0,20)')
    return parser


def check_settings(args):
    if not 0 <= args.share_without <= 1:
        raise ValueError(f'--share_without={args.share_without}: a share is from 0 to 1')
    if not 0 <= args.min_sec <= args.max_sec < math.inf or not 0 <= args.tail_sec < math.inf:
        raise ValueError('--min_sec, --max_sec and --tail_sec are not below 0, --min_sec not above --max_sec')
    if args.snr_db[0] > args.snr_db[1]:
        raise ValueError('--snr_db: the first number is above the second')
    phrases, sentences = ({' '.join(re.findall(r'\w+', text.lower())) for text in texts}
                          for texts in (args.phrases, args.sentences))
    if both := phrases & sentences:
        raise ValueError(f'{min(both)!r} is among the --phrases and among the --sentences; does it stop the '
                         'assistant, or not?')


def main():
    args = arguments().parse_args()
    args.phrases, args.sentences = read_lines(args.phrases, PHRASES), read_lines(args.sentences, SENTENCES)
    check_settings(args)
    bank = find(args.noise, AUDIO) if args.noise else noises()
    tts, names = pick_tts(args)
    voices = split_voices(names, args)
    numbers = [f'{i:06d}' for i in range(args.n_sample)]
    items, splits = {}, {}
    for i, (number, split) in enumerate(tokenise.split_ids(
            numbers, args.val_share, args.test_share, args.seed).items()):
        if not voices.get(split):
            raise ValueError(f'{len(names)} voices are too few: train, val and test need voices of their own')
        voice = voices[split][i % len(voices[split])]
        id = f'{number}-{os.path.splitext(os.path.basename(voice))[0]}'
        items[id], splits[id] = (id, voice), split

    def read_recording(what, codec):
        import soxr
        wave, turns = make_sample(*what, tts, bank, args, codec.rate_hz)
        wave = soxr.resample(wave, SAMPLE_RATE, codec.sample_rate)
        n_frame = -(-len(wave) // round(codec.sample_rate / codec.rate_hz))
        silence = np.repeat(codec.silence_codes[:1], n_frame, 0)
        return tokenise.Recording(wave, silence, turns)

    no_matter = ('phrases', 'sentences', 'out', 'codec', 'tokenizer', 'batch_sec', 'n_thread', 'device',
                 'tts_command')
    digest = hashlib.sha256(json.dumps([args.phrases, args.sentences]).encode()).hexdigest()[:16]
    recipe = {key: value for key, value in vars(args).items() if key not in no_matter}
    tokenise.run(items, read_recording, args, recipe | dict(n_noise=len(bank), texts=digest), splits)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
