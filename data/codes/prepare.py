"""
Ready speech codes become dialogues: rows as SLAM-Omni publishes them (worstchan/…-SLAM-Omni), made with
CosyVoice at 50 Hz.

    {"split_name": "identity", "index": 2, "round": 2, "source_text": "USER: … <USER>: Wow, a lot!",
     "source_wav": "audio/audio_2.wav", "target_text": "Yes, it certainly is!", "target_token": [745, 545, …]}

    user       ▓ round 1 ▓                    ▓ round 2 ▓
    assistant             ▓ target_token ▓ gap            ▓ target_token ▓

Other fields are named by settings, with a dot into an object. Codes are a list of integers, such a list alone
in another, or a string, "12 45 7" or "12,45,7":

    {"answer": {"codes": [[12, 45, 7]], "text": "Hello."}}      --codes=answer.codes --text=answer.text

Of a codec of several codebooks they are numbered from 0 in each codebook, as its own tools give them, by
codebook or by frame, depth first (common/levels.py); or a string, with # before a frame, as Mini-Omni has it:

    [[7, 9], [1, 2, 3, 4], [5, 6, …]]       [[7, 1, 5, 6, 2, …], [9, …]]        "# 7 1 5 6 2 … # 9 …"

An index whose rounds all have the user's codes or audio becomes a dialogue of two channels. Of any other
index each row becomes a one-sided utterance of the assistant.

    python -m codec s3 --variant=v1_50hz --silence_codes=230,440,491 --out=codecs/s3_50hz
    python data/codes/prepare.py rows.jsonl --codec=codecs/s3_50hz --out=data/slam --one_sided
    python data/codes/prepare.py rows.jsonl --codec=codecs/s3 --audio_dir=. --out=data/slam

Nothing in a row says which codec made it: give the right one. Codes that it doesn't have are refused, but
codes of another rate look the same.
"""
import json
import os
import re
from functools import partial

import numpy as np

from common.levels import codes_per_frame, interleave, split
from data import tokenise
from data.recordings import find_audio, read_piece, read_rows

FIELDS = dict(codes='target_token', text='target_text', user_codes='source_token', user_audio='source_wav',
              user_text='source_text', round='round')


def list_items(args):
    """id -> (places of the rows of a dialogue, whether the user is to be heard). Only the places in the file
    are kept, as the codes of a whole corpus would fill the memory."""
    if args.manifest.endswith('.gz'):
        raise ValueError(f'{args.manifest}: unpack it first, rows are looked up by their place')
    audio_dir = args.audio_dir or os.path.dirname(os.path.abspath(args.manifest))
    dialogues, counts = {}, dict(dialogues=0, rounds=0, one_sided=0)
    for where, row, offset in read_rows(args.manifest):
        key = [str('' if row is None else value_of(row, name, '')) for name in args.dialogue_fields]
        heard = not args.one_sided and row is not None and has_user(row, args, audio_dir)
        dialogues.setdefault('-'.join(key) if any(key) else where, []).append((where, offset, heard))

    items = {}
    for id, rows in dialogues.items():
        places = [(where, offset) for where, offset, _ in rows]
        if all(heard for _, _, heard in rows):
            counts['dialogues'] += 1
            counts['rounds'] += len(rows)
            items[id] = (places, True)
        else:
            counts['one_sided'] += len(rows)
            items |= {where: ([(where, offset)], False) for where, offset in places}
    if int(os.environ.get('RANK', 0)) == 0:
        why = f'those whose user has no {args.user_codes} and no file {args.user_audio}'
        if args.one_sided:
            why = 'as --one_sided asks for'
        print(f'{counts["dialogues"]} dialogues of two channels from {counts["rounds"]} rows; '
              f'{counts["one_sided"]} rows are one-sided, {why}')
    return items


def value_of(row, name, default=None):
    """What a field holds; answer.codes is the field codes of the object in the field answer."""
    if name in row:
        return row[name]
    for part in name.split('.'):
        if not isinstance(row, dict) or part not in row:
            return default
        row = row[part]
    return row


def has_user(row, args, audio_dir):
    if value_of(row, args.user_codes):
        return True
    try:
        return bool(find_audio(value_of(row, args.user_audio), audio_dir))
    except ValueError:
        return False


def read_row(path, where, offset):
    with open(path, 'rb') as file:
        file.seek(offset)
        try:
            row = json.loads(file.readline())
        except (ValueError, RecursionError):
            row = None
    if not isinstance(row, dict):
        raise ValueError(f'{where}, is no JSON object')
    return row


def read_recording(item, codec, args):
    places, is_dialogue = item
    rows = [(where, read_row(args.manifest, where, offset)) for where, offset in places]
    if not is_dialogue:
        (where, row), = rows
        codes = take_codes(row, 'codes', args, codec, where)
        text = take_text(row, args.text, where)
        return tokenise.Recording(None, codes, [turn('assistant', 0, len(codes), text, codec)])

    rounds = [value_of(row, args.round, 1) for _, row in rows]
    if not all(type(number) is int for number in rounds) or sorted(rounds) != list(range(1, len(rows) + 1)):
        raise ValueError(f'{rows[0][0]}, begins a dialogue of the rounds {rounds}, not 1 to {len(rows)}')
    rows.sort(key=lambda pair: value_of(pair[1], args.round, 1))
    audio_dir = args.audio_dir or os.path.dirname(os.path.abspath(args.manifest))
    users, answers, turns, at = [], [], [], 0       # at: the frame
    for where, row in rows:
        if turns:
            at += round(args.gap_sec * codec.rate_hz)
        user = take_user(row, codec, args, audio_dir, where)
        codes = take_codes(row, 'codes', args, codec, where)
        n_user = len(user) if user.dtype.kind != 'f' else -(-len(user) // hop(codec))
        # before the last <USER>: the text repeats the earlier rounds
        user_text = take_text(row, args.user_text, where).rsplit('<USER>:', 1)[-1].strip()
        turns.append(turn('user', at, at + n_user, user_text, codec))
        users.append((at, user))
        at += n_user
        turns.append(turn('assistant', at, at + len(codes), take_text(row, args.text, where), codec))
        answers.append((at, codes))
        at += len(codes)
    if len({user.dtype.kind for _, user in users}) > 1:
        raise ValueError(f'{rows[0][0]}, is of a dialogue whose user has codes in some rounds '
                         'and audio in others')
    return tokenise.Recording(lay(users, at, codec), lay(answers, at, codec), turns)


def hop(codec):
    return round(codec.sample_rate / codec.rate_hz)


def lay(pieces, n_frame, codec):
    """Pieces on a channel of silence: of samples, or of codes."""
    if pieces[0][1].dtype.kind == 'f':
        channel, step = np.zeros(n_frame * hop(codec), np.float32), hop(codec)
    else:
        channel, step = np.resize(codec.silence_codes, (n_frame, *codec.silence_codes.shape[1:])), 1
    for at, piece in pieces:
        channel[at * step:at * step + len(piece)] = piece
    return channel


def turn(role, start, end, text, codec):
    return dict(role=role, start_sec=start / codec.rate_hz, end_sec=end / codec.rate_hz, text=text)


def take_user(row, codec, args, audio_dir, where):
    if value_of(row, args.user_codes):
        return take_codes(row, 'user_codes', args, codec, where)
    path = find_audio(value_of(row, args.user_audio), audio_dir)
    waves = read_piece(path, path, codec.sample_rate)
    if len(waves) != 1:
        raise ValueError(f'{path} has {len(waves)} channels, the user is one')
    return waves[0]


def take_text(row, name, where):
    text = value_of(row, name)
    if not isinstance(text, str):
        found = f'{name} {text!r:.80}, no text' if text is not None else f'no {name}'
        raise ValueError(f'{where}, has {found}')
    return text


def take_codes(row, key, args, codec, where):
    """key: the setting that names the field, codes or user_codes"""
    name = getattr(args, key)
    codes = found = value_of(row, name)
    if found is not None and codes_per_frame(codec.describe()) > 1:
        try:
            return join_books(found, codec)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f'{where}, has in {name} no codes of {codec.name}: {error}') from None
    while isinstance(codes, list) and len(codes) == 1 and isinstance(codes[0], list):
        codes = codes[0]        # [[1, 2, 3]], as of a batch of one
    if isinstance(codes, str) and re.fullmatch(r'\s*\d+([\s,]+\d+)*\s*', codes):
        codes = [int(code) for code in re.findall(r'\d+', codes)]
    if isinstance(codes, list) and len(codes) > 1 and all(isinstance(each, list) for each in codes):
        raise ValueError(f'{where}, has {len(codes)} lists in {name}: a codec of one codebook has one code a '
                         'frame; keep the first codebook, or join the pieces, to one list')
    if not isinstance(codes, list) or not codes or not all(type(code) is int for code in codes):
        what = f'no {name}' if found is None else f'{name} {found!r:.80}, no list of codes'
        raise ValueError(f'{where}, has {what}: [12, 45, 7], [[12, 45, 7]], "12 45 7" and "12,45,7" are '
                         f'read; --{key}=FIELD names another field, --{key}=answer.codes one in an object')
    for frame, code in enumerate(codes):
        if not 0 <= code < codec.n_codes:
            raise ValueError(f'{where}, has code {code} at frame {frame} of {name}; '
                             f'codec {codec.name} has 0 to {codec.n_codes - 1}')
    return np.array(codes, np.uint16)


def join_books(found, codec):
    """Codes of several codebooks, by codebook or by frame -> as codec.encode numbers them"""
    levels, n_code = codec.levels, sum(codec.levels)
    is_text = isinstance(found, str)
    if is_text:
        found = [[int(code) for code in frame.split()] for frame in found.split('#') if frame.strip()]
    if is_nested(found) and len(found) == 1 and is_nested(found[0]):
        found = found[0]                    # [[[7, 9], [1, 2, 3, 4], …]], as of a batch of one
    elif is_nested(found) and all(len(book) == 1 and is_nested(book) for book in found):
        found = [book[0] for book in found]         # [[[7, 9]], [[1, 2, 3, 4]], …], as snac returns them
    if not is_nested(found) or not all(type(code) is int for part in found for code in part):
        raise ValueError(f'{found!r:.80} is no list of codebooks, nor of frames')
    is_frames = all(len(frame) == n_code for frame in found)
    is_books = not is_text and len(found) == len(levels) and all(
        len(book) * levels[0] == len(found[0]) * n for book, n in zip(found, levels))
    if is_frames and is_books:
        raise ValueError(f'{n_code} lists of {n_code} can be codebooks and can be frames; write frames as a '
                         'string, "# 7 1 … # 9 2 …"')
    if is_frames:
        found = split(np.array(found), levels)
    elif len(found) != len(levels):
        raise ValueError(f'{len(found)} lists, neither {len(levels)} codebooks nor frames of {n_code} codes')
    return interleave(found, levels, codec.n_codes // n_code)


def is_nested(codes):
    return isinstance(codes, list) and len(codes) > 0 and all(isinstance(each, list) for each in codes)


def main():
    parser = tokenise.arguments(__doc__)
    parser.add_argument('manifest', help='JSON rows, not gzipped')
    parser.add_argument('--audio_dir',
                        help="where the paths of the user's audio start, or any part of them "
                             '(the folder of the manifest)')
    parser.add_argument('--one_sided', action='store_true',
                        help='take the answers only; a codec that is a mere description '
                             'cannot encode the user')
    parser.add_argument('--gap_sec', type=float, default=0.5,
                        help='between an answer and the next round; '
                             'the assistant itself answers at once (0.5)')
    parser.add_argument('--dialogue_fields', type=lambda names: names.split(','), default='split_name,index',
                        help='that rounds of a dialogue share (split_name,index)')
    for key, name in FIELDS.items():
        parser.add_argument(f'--{key}', metavar='FIELD', default=name,
                            help=f'name of that field; a.b is b in the object a ({name})')
    args = parser.parse_args()
    settings = ('manifest', 'audio_dir', 'one_sided', 'gap_sec', 'dialogue_fields', *FIELDS)
    recipe = {key: getattr(args, key) for key in settings}
    tokenise.run(list_items(args), partial(read_recording, args=args), args, recipe)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
