"""
Folders in the form of kyutai's moshi-finetune become dialogues of two channels.

    data.jsonl      {"path": "stereo/a.wav", "duration": 24.5}; paths start at the folder of data.jsonl
    stereo/a.wav    left: the assistant (Moshi), right: the user; or, in its place, two mono files,
                    a.user.wav and a.assistant.wav
    stereo/a.json   {"alignments": [["Hello", [0.1, 0.5], "SPEAKER_MAIN"], …]}; rarely the user's words;
                    or SpokenWOZ's [{"speaker": "A", "word": "Hello", "start": 0.1, "end": 0.5}, …];
                    or, beside sw02001.wav, Switchboard's sw2001A-ms98-a-word.text and …B…

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
from data.recordings import by_id, plain_word, read_halves, read_piece, read_rows, spoken, turns_of, word_list


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
    words, n_user = read_words(path, args.assistant_speakers)
    remark = tokenise.SEVERAL.format('user') if n_user > 1 else ''
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


def read_words(audio, assistant_speakers):
    """-> (role -> its words in order, how many speakers are the user), from what lies beside the audio"""
    path = os.path.splitext(audio)[0] + '.json'
    found = word_list(audio) if not os.path.isfile(path) else []
    found = found or read_json(path)
    speakers = sorted({str(speaker) for *_, speaker in found})
    if len(speakers) > 1 and not set(speakers) & set(assistant_speakers):
        raise ValueError(f'the words of {audio} are of the speakers {", ".join(speakers)}, none of them the '
                         f'assistant: --assistant_speakers={speakers[-1]} says who is')
    words = dict(user=[], assistant=[])
    for text, start_sec, end_sec, speaker in found:
        if not isinstance(text, str) or not math.isfinite(start_sec + end_sec):
            raise ValueError(f'{path} has the word {text!r} from {start_sec} s to {end_sec} s')
        role = 'assistant' if str(speaker) in assistant_speakers else 'user'
        if spoken(text):
            words[role].append(dict(text=spoken(text), start_sec=start_sec, end_sec=end_sec))
    words = {role: sorted(said, key=lambda word: word['start_sec']) for role, said in words.items()}
    return words, len(set(speakers) - set(assistant_speakers))


def read_json(path):
    """[(text, start_sec, end_sec, speaker)]"""
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        if isinstance(content, list):
            rows = [plain_word(row) for row in content]
            words = [(row['word'], row['start'], row['end'], row['role']) for row in rows]
        else:
            words = [(text, *span, speaker) for text, span, speaker in content['alignments']]
        return [(text, start + 0.0, end + 0.0, speaker) for text, start, end, speaker in words]
    except json.JSONDecodeError as error:
        raise ValueError(f'{path} is no JSON ({error})')
    except (KeyError, TypeError, ValueError, AttributeError) as error:      # ValueError: too few, or too many
        raise ValueError(f'{path} has no alignments of the form [[word, [start, end], speaker], …], '
                         f'nor is it a list of {{speaker, word, start, end}} ({error})')


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
