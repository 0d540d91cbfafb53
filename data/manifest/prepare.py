"""
Audio with its text, a row each, becomes one-sided utterances,
from which the alignment stage (ASR, TTS) learns.

    {"audio": "a/1.wav", "text": "Hello there."}                BLSP and most others; "transcript", too
    {"key": "u1", "wav": "a/1.wav", "txt": "Hello there."}      wenet's data.list
    {"audio_filepath": "a/1.wav", "offset": 3.2, "duration": 1.5, "text": "Hello."}
        NeMo: a piece of a file; wenet says start and end for the same
    {"audio": "a/1.wav", "text": "Hello there.", "words": "a/1.TextGrid"}
        a file with the times of the words (data/words.py); without a text, turns follow from them

    python data/manifest/prepare.py train.jsonl --codec=codecs/s3 --out=data/libri
    python data/manifest/prepare.py data.list --role=assistant --codec=codecs/s3 --out=data/tts
    python data/manifest/prepare.py train.jsonl --words=aligned --codec=codecs/s3 --out=data/libri

--words is the folder that an aligner wrote, or a CTM file of the whole corpus. Without it, the words of
a/1.wav are those of a/1.TextGrid or a/1.ctm, if there is one.

An utterance is the user's by default (ASR); --role=assistant is for a voice that the model is to have (TTS).
The file of rows may be gzipped.
"""
import os
from functools import partial

from data import tokenise
from data.recordings import by_id, find_audio, one_channel, read_piece, read_rows, turns_of
from data.words import clean_words, read_words

BESIDE = ('.TextGrid', '.ctm')      # a .json beside the audio may be anything
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
    folder = args.audio_dir or os.path.dirname(os.path.abspath(args.manifest))
    require('audio', audio, names, where)
    path = find_audio(audio, folder)
    place = find_audio(row['words'], folder) if row.get('words') else args.words
    id = pick(row, FIELDS['id'])
    words, name = read_words(path, place, [] if id is None else [str(id)], BESIDE)
    if not words or text is not None:
        require('text', text, names, where)
    start_sec, end_sec, whole_sec = piece(row, where)
    waves = read_piece(path, path, codec.sample_rate, start_sec, end_sec, whole_sec)
    wave = one_channel(waves, args.channel, path)
    n_sec = len(wave) / codec.sample_rate
    # an aligner that calls a row by its id was given the piece alone: its time begins there
    is_of_piece = name not in (None, os.path.basename(os.path.splitext(path)[0]))
    words, remark = clean_words(of_piece(words or [], 0.0 if is_of_piece else start_sec, n_sec, where), text)
    if text is None:
        turns = turns_of({args.role: words}, args.gap_sec)
    else:
        turns = [dict(role=args.role, start_sec=0.0, end_sec=n_sec, text=text, words=words)]
    if not turns:
        raise ValueError(f'{where}, has no text, and no words in its {n_sec:.2f} s')
    if place and not words:
        remark = 'there are no times of the words'
    return tokenise.Recording(**{'user': None, 'assistant': None, args.role: wave}, turns=turns,
                              remark=remark)


def require(kind, value, names, where):
    if not isinstance(value, str) or not value.strip():
        found = f'no {kind}' if value is None else f'{kind} {value!r:.80}'
        raise ValueError(f'{where}, has {found} under {" or ".join(names[kind])}; '
                         f'--{kind}_field=NAME says where it is')


def of_piece(words, start_sec, n_sec, where):
    """Words of a file -> [(word, start_sec, end_sec)] of those whose middle is in a piece of it."""
    speakers = sorted({str(speaker) for *_, speaker in words})
    if len(speakers) > 1:
        raise ValueError(f'{where}, has the words of {", ".join(speakers)}; an utterance is of one speaker')
    words = ((word, start - start_sec, end - start_sec) for word, start, end, _ in words)
    return [word for word in words if 0 <= (word[1] + word[2]) / 2 <= n_sec]


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
    parser.add_argument('--words', help='where the times of the words are: the folder that an aligner wrote, '
                                        'or a CTM file of the corpus (beside the audio)')
    parser.add_argument('--gap_sec', type=float, default=0.6,
                        help='where there is no text: a longer pause between words ends a turn (0.6)')
    args = parser.parse_args()
    settings = ('manifest', 'audio_dir', 'role', 'channel', 'audio_field', 'text_field', 'words', 'gap_sec')
    recipe = {key: getattr(args, key) for key in settings}
    tokenise.run(list_items(args.manifest), partial(read_recording, args=args), args, recipe)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
