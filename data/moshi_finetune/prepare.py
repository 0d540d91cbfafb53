"""
Folders in the form of kyutai's moshi-finetune become dialogues of two channels.

    data.jsonl      {"path": "stereo/a.wav", "duration": 24.5}; paths start at the folder of data.jsonl
    stereo/a.wav    left: the assistant (Moshi), right: the user; or, in its place, two mono files,
                    a.user.wav and a.assistant.wav
    stereo/a.json   {"alignments": [["Hello", [0.1, 0.5], "SPEAKER_MAIN"], …]}; rarely the user's words. Or
                    a.TextGrid, a.ctm, or a list of words in another form (data/words.py)

    words    Hello there.      Well, yes.
             ├──────────┤ gap  ├────────┤        a pause longer than --gap_sec ends a turn
    turns    0            1    2          3 s

    python data/moshi_finetune/prepare.py data.jsonl --codec=codecs/s3 --out=data/talk
    python data/moshi_finetune/prepare.py data.jsonl --words=aligned --codec=codecs/s3 --out=data/talk

Without the user's words the user's channel has its audio but no turns. Duplex training needs no more; the
layouts by turns (asr, half_duplex) then see the assistant only.
"""
import os
from functools import partial

from data import tokenise
from data.recordings import by_id, find_audio, read_halves, read_piece, read_rows, turns_of, word_list
from data.words import SUFFIXES, by_role, read_words


def list_items(path):
    def pairs():
        for where, row, _ in read_rows(path):
            named = isinstance((row or {}).get('path'), str)
            yield os.path.splitext(row['path'])[0] if named else where, (where, row if named else None)
    return by_id(pairs())


def read_recording(item, codec, args):
    where, row = item
    duration_sec, folder = (row or {}).get('duration'), os.path.dirname(os.path.abspath(args.manifest))
    if row is None or not isinstance(duration_sec, (int, float, type(None))):
        raise ValueError(f'{where}, is no object with a path and a duration in seconds')
    path = os.path.join(folder, row['path'])
    user, assistant = read_channels(path, codec.sample_rate, duration_sec, args.user_channel)
    words, n_user, remark = by_role(find_words(path, row, folder, args.words), path, args.assistant_speakers)
    remark = tokenise.SEVERAL.format('user') if n_user > 1 else remark
    return tokenise.Recording(user, assistant, turns_of(words, args.gap_sec), remark)


def read_channels(path, sample_rate, duration_sec, user_channel):
    """-> the user's wave and the assistant's: of a stereo file, or of two mono files in its place"""
    halves = read_halves(path, sample_rate, duration_sec)
    if halves is not None:
        return halves
    waves = read_piece(path, path, sample_rate, whole_sec=duration_sec)
    if len(waves) != 2:
        raise ValueError(f'{path} has {len(waves)} channels, not one for the user and one for the assistant; '
                         'two mono files are to be called a.user.wav and a.assistant.wav')
    return waves[user_channel], waves[1 - user_channel]


def find_words(path, row, folder, place):
    place = find_audio(row['words'], folder) if 'words' in row else place
    words, _ = read_words(path, place)
    if words is None and not word_list(path):
        stem = os.path.splitext(path)[0]
        raise ValueError(f'{path} has no times of words {"in " + place if place else "beside it"}: no file '
                         f'{" or ".join(stem + suffix for suffix in SUFFIXES)}')
    return word_list(path) if words is None else words


def main():
    parser = tokenise.arguments(__doc__)
    parser.add_argument('manifest', help='the data.jsonl')
    parser.add_argument('--user_channel', type=int, choices=(0, 1), default=1,
                        help='the assistant has the other (1: right)')
    parser.add_argument('--assistant_speakers', default='SPEAKER_MAIN', type=lambda names: names.split(','),
                        help='all others are the user (SPEAKER_MAIN)')
    parser.add_argument('--gap_sec', type=float, default=0.6,
                        help='a longer pause between words ends a turn (0.6)')
    parser.add_argument('--words', help='where the times of the words are: the folder that an aligner wrote, '
                                        'or a CTM file of all recordings (beside the audio)')
    args = parser.parse_args()
    settings = ('manifest', 'user_channel', 'assistant_speakers', 'gap_sec', 'words')
    recipe = {key: getattr(args, key) for key in settings}
    tokenise.run(list_items(args.manifest), partial(read_recording, args=args), args, recipe)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
