"""
Audio with its text, a row each, becomes one-sided utterances,
from which the alignment stage (ASR, TTS) learns.

    {"audio": "a/1.wav", "text": "Hello there."}                BLSP and most others; "transcript", too
    {"key": "u1", "wav": "a/1.wav", "txt": "Hello there."}      wenet's data.list
    {"audio_filepath": "a/1.wav", "offset": 3.2, "duration": 1.5, "text": "Hello."}
        NeMo: a piece of a file; wenet says start and end for the same

    python data/manifest/prepare.py train.jsonl --codec=codecs/s3 --out=data/libri
    python data/manifest/prepare.py data.list --role=assistant --codec=codecs/s3 --out=data/tts

An utterance is the user's by default (ASR); --role=assistant is for a voice that the model is to have (TTS).
The file of rows may be gzipped.
"""
import os
from functools import partial

from data import tokenise
from data.recordings import by_id, find_audio, read_piece, read_rows

FIELDS = dict(id=('id', 'key'), audio=('audio', 'wav', 'audio_filepath'), text=('text', 'transcript', 'txt'))


def pick(row, names):
    return next((row[name] for name in names if name in row), None)


def list_items(path):
    """id -> (where, row). Rows without an id are called after their place, as are those that are no rows."""
    return by_id((str(pick(row or {}, FIELDS['id']) or where), (where, row))
                 for where, row, _ in read_rows(path))


def read_recording(item, codec, args):
    where, row = item
    if row is None:
        raise ValueError(f'{where}, is no JSON object')
    chosen = dict(audio=args.audio_field, text=args.text_field)
    names = FIELDS | {kind: (name,) for kind, name in chosen.items() if name}
    audio, text = (pick(row, names[kind]) for kind in ('audio', 'text'))
    for kind, value in dict(audio=audio, text=text).items():
        if not isinstance(value, str) or not value.strip():
            found = f'no {kind}' if value is None else f'{kind} {value!r:.80}'
            raise ValueError(f'{where}, has {found} under {" or ".join(names[kind])}; '
                             f'--{kind}_field=NAME says where it is')
    path = find_audio(audio, args.audio_dir or os.path.dirname(os.path.abspath(args.manifest)))
    waves = read_piece(path, path, codec.sample_rate, *piece(row, where))
    if args.channel is None and len(waves) > 1:
        raise ValueError(f'{path} has {len(waves)} channels; --channel=N says which, 0 to {len(waves) - 1}')
    if (args.channel or 0) not in range(len(waves)):
        raise ValueError(f'{path} has no --channel={args.channel}: it has {len(waves)}, counted from 0')
    wave = waves[args.channel or 0]
    turn = dict(role=args.role, start_sec=0.0, end_sec=len(wave) / codec.sample_rate, text=text)
    return tokenise.Recording(**{'user': None, 'assistant': None, args.role: wave}, turns=[turn])


def piece(row, where):
    """start_sec, end_sec, whole_sec: where in its file a row's audio is, as far as the row says it."""
    at = {key: row[key] for key in ('offset', 'start', 'end', 'duration') if row.get(key) is not None}
    if not all(isinstance(sec, (int, float)) for sec in at.values()):
        raise ValueError(f'{where}, has times that are no numbers: {at}')
    start_sec = at.get('offset', at.get('start'))
    if start_sec is None:
        return 0.0, None, at.get('duration')
    return start_sec, at.get('end', start_sec + at['duration'] if 'duration' in at else None), None


def main():
    parser = tokenise.arguments(__doc__)
    parser.add_argument('manifest', help='JSON rows, .gz or not')
    parser.add_argument('--audio_dir',
                        help='where its paths start, or any part of them (the folder of the manifest)')
    parser.add_argument('--role', choices=('user', 'assistant'), default='user', help='who speaks (user)')
    parser.add_argument('--channel', type=int, help='of the files, from 0; needed where they have several')
    parser.add_argument('--audio_field', help=f'name of the field ({" or ".join(FIELDS["audio"])})')
    parser.add_argument('--text_field', help=f'name of the field ({" or ".join(FIELDS["text"])})')
    args = parser.parse_args()
    settings = ('manifest', 'audio_dir', 'role', 'channel', 'audio_field', 'text_field')
    recipe = {key: getattr(args, key) for key in settings}
    tokenise.run(list_items(args.manifest), partial(read_recording, args=args), args, recipe)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
