"""
Folders in the form of kyutai's moshi-finetune become dialogues of two channels.

    data.jsonl      {"path": "stereo/a.wav", "duration": 24.5}; paths start at the folder of data.jsonl
    stereo/a.wav    left: the assistant (Moshi), right: the user; or, in its place, two mono files,
                    a.user.wav and a.assistant.wav
    stereo/a.json   {"alignments": [["Hello", [0.1, 0.5], "SPEAKER_MAIN"], …]}; rarely the user's words

    words    Hello there.      Well, yes.
             ├──────────┤ gap  ├────────┤        a pause longer than --gap_sec ends a turn
    turns    0            1    2          3 s

    python data/moshi_finetune/prepare.py data.jsonl --codec=codecs/s3 --out=data/talk

Without the user's words the user's channel has its audio but no turns. Duplex training needs no more; the
layouts by turns (asr, half_duplex) then see the assistant only.
"""
import json
import math
import os
from functools import partial

from data import tokenise
from data.recordings import by_id, check_length, halves_of, read_piece, read_rows, side_by_side, turns_of


def list_items(path):
    def pairs():
        for where, row, _ in read_rows(path):
            if row is None or not isinstance(row.get('path'), str):
                yield where, (where, None, None)
            else:
                audio = os.path.join(os.path.dirname(os.path.abspath(path)), row['path'])
                yield os.path.splitext(row['path'])[0], (where, audio, row.get('duration'))
    return by_id(pairs())


def read_recording(item, codec, args):
    where, path, duration_sec = item
    if path is None or not isinstance(duration_sec, (int, float, type(None))):
        raise ValueError(f'{where}, is no object with a path and a duration in seconds')
    user, assistant = read_channels(path, codec.sample_rate, duration_sec, args.user_channel)
    words = read_words(os.path.splitext(path)[0] + '.json', args.assistant_speakers)
    return tokenise.Recording(user, assistant, turns_of(words, args.gap_sec))


def read_channels(path, sample_rate, duration_sec, user_channel):
    """-> the user's wave and the assistant's: of a stereo file, or of two mono files in its place"""
    halves = halves_of(path)
    if os.path.isfile(path) or not any(map(os.path.isfile, halves)):
        waves = read_piece(path, path, sample_rate, whole_sec=duration_sec)
        if len(waves) != 2:
            raise ValueError(f'{path} has {len(waves)} channels, not one for the user and one for the '
                             f'assistant; two mono files are to be called {" and ".join(halves)}')
        return waves[user_channel], waves[1 - user_channel]
    found = [read_piece(half, half, sample_rate) for half in halves]
    for half, waves in zip(halves, found):
        if len(waves) != 1:
            raise ValueError(f'{half} has {len(waves)} channels, the file of one side has one')
    pair = side_by_side([wave for wave, in found], halves, sample_rate)
    check_length(' with '.join(halves), pair.shape[1] / sample_rate, duration_sec)
    return pair


def read_words(path, assistant_speakers):
    """role -> its words in order"""
    words = dict(user=[], assistant=[])
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        alignments = [(text, start_sec, end_sec, speaker, math.isfinite(start_sec + end_sec))
                      for text, (start_sec, end_sec), speaker in content['alignments']]
    except json.JSONDecodeError as error:
        raise ValueError(f'{path} is no JSON ({error})')
    except (KeyError, TypeError, ValueError) as error:      # ValueError: too few elements, or too many
        raise ValueError(f'{path} has no alignments of the form [[word, [start, end], speaker], …] ({error})')
    for text, start_sec, end_sec, speaker, is_finite in alignments:
        if not is_finite or not isinstance(text, str):
            raise ValueError(f'{path} has the word {text!r} from {start_sec} s to {end_sec} s')
        role = 'assistant' if speaker in assistant_speakers else 'user'
        words[role].append(dict(text=text, start_sec=start_sec, end_sec=end_sec))
    return {role: sorted(said, key=lambda word: word['start_sec']) for role, said in words.items()}


def main():
    parser = tokenise.arguments(__doc__)
    parser.add_argument('manifest', help='the data.jsonl')
    parser.add_argument('--user_channel', type=int, choices=(0, 1), default=1,
                        help='the assistant has the other (1: right)')
    parser.add_argument('--assistant_speakers', default='SPEAKER_MAIN', type=lambda names: names.split(','),
                        help='all others are the user (SPEAKER_MAIN)')
    parser.add_argument('--gap_sec', type=float, default=0.6,
                        help='a longer pause between words ends a turn (0.6)')
    args = parser.parse_args()
    settings = ('manifest', 'user_channel', 'assistant_speakers', 'gap_sec')
    recipe = {key: getattr(args, key) for key in settings}
    tokenise.run(list_items(args.manifest), partial(read_recording, args=args), args, recipe)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
