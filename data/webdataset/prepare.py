"""
Shards in WebDataset's form, tars of audio and text as LAION's collections and Emilia are published, become
one-sided utterances, or dialogues where a file has two channels and the times of its words.

    EN-B000000.tar
        EN_W000000.mp3      flac, mp3, wav, ogg or opus
        EN_W000000.json     {"text": "Hello there.", …}; transcription and transcript go before text, as a
                            text beside them describes the sound
        EN_W000001.flac
        EN_W000001.txt      the text alone
        EN_W000001.TextGrid or .ctm, if the times of the words are known (data/words.py), or in the .json, as
                            moshi-finetune has them, "alignments": [["Hello", [0.1, 0.5], "SPEAKER_MAIN"], …]

What goes together has one name up to the first dot. The id is shard/name, EN-B000000/EN_W000000. Shards may
be gzipped, and be named with braces and stars:

    python data/webdataset/prepare.py 'emilia/EN-B{000000..000099}.tar' --codec=codecs/s3 --out=data/emilia
    python data/webdataset/prepare.py 'voices/*.tar' --role=assistant --codec=codecs/s3 --out=data/voices
    python data/webdataset/prepare.py talks.tar --user_channel=1 --codec=codecs/s3 --out=data/talks

The library webdataset expands the names and says what goes together (pip install webdataset). It reads a
shard as a stream from its beginning and gives no offsets. Parts that any process may claim, and take up
again, need any sample next, so tarfile lists where the files are, in 15 microseconds each.
"""
import glob
import gzip
import io
import json
import os
import re
import tarfile
import tempfile
import threading
import time
import zlib
from functools import lru_cache, partial

from data import tokenise
from data.recordings import TarBytes, one_channel, plain_files, read_bytes, read_piece, turns_of
from data.words import by_role, clean_words, in_json, parse

AUDIO = ('flac', 'mp3', 'wav', 'ogg', 'opus')
WORDS = ('textgrid', 'ctm')
TEXT_FIELDS = ('transcription', 'transcript', 'text')
UNPACKING = threading.Lock()


# ------------------------------------------------------------------------------------------------------------
# shards

def list_shards(patterns):
    """Names with {000..099} and * -> paths, in order. Raises ValueError where a file is missing."""
    try:
        from webdataset.shardlists import expand_urls
    except ModuleNotFoundError as error:
        raise ValueError(f'there is no {error.name} here: pip install webdataset') from None
    paths = []
    for path in (path for pattern in patterns for path in expand_urls(pattern)):
        if '://' in path or path.startswith('pipe:'):
            raise ValueError(f'{path!r} is no file: only files are read, no commands are run and nothing is '
                             'downloaded')
        found = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path)))
        if not found:
            raise ValueError(f'no file {path}')
        paths += found
    return list(dict.fromkeys(paths))


def list_items(patterns):
    """id -> (the shard, the name of the sample in it, {suffix: [(offset, size)]}), or, as a string, why it
    cannot be read. What a shard has lost is an item of its own, so that it is seen."""
    from webdataset.tariterators import base_plus_ext
    shards, items, ids, shown = list_shards(patterns), {}, set(), time.time()
    top = os.path.commonpath([os.path.dirname(os.path.abspath(shard)) for shard in shards])
    for n, shard in enumerate(shards, 1):
        id = os.path.relpath(os.path.abspath(shard), top).removesuffix('.gz').removesuffix('.tar')
        if id in ids:
            raise ValueError(f'{shard} and another shard are both called {id}; keep one')
        ids.add(id)
        try:
            files, is_whole = tar_files(shard)
        except ValueError as error:
            items[id] = str(error)
            continue
        if not is_whole:
            last = files[-1][0] if files else 'its start'
            items[id] = f'{shard} is cut off or damaged after {last}: what follows is lost'
        for name, *place in files:
            key, suffix = base_plus_ext(name.removeprefix('./'))
            if key and not re.match('__[^/]*__/', key):     # such a folder is WebDataset's own
                sample = items.setdefault(f'{id}/{key}', (shard, key, {}))[2]
                sample.setdefault(suffix.lower(), []).append(tuple(place))
        if time.time() - shown > 5 and int(os.environ.get('RANK', 0)) == 0:
            shown = time.time()
            print(f'{n} of {len(shards)} shards listed, {len(items)} samples', flush=True)
    return items


def is_gzip(file):
    return os.pread(file.fileno(), 2, 0) == b'\x1f\x8b'


def tar_files(path):
    """-> ([(name, offset, size)] of the files in a tar, gzipped or not; whether it has its end). Offsets are
    those in the unpacked tar. Of a tar that was cut off, what comes before the cut is good. Raises ValueError
    for what is no tar."""
    files = []
    with open(path, 'rb') as file:
        unpacked, n_byte = file, os.path.getsize(path)
        if is_gzip(file):
            unpacked, n_byte = gzip.open(file), most_unpacked(path)
        try:
            tar = tarfile.open(fileobj=TarBytes(unpacked, n_byte), mode='r:')
            for place in plain_files(tar):
                files.append(place)
            unpacked.seek(tar.offset)
            is_whole = unpacked.read(512) == bytes(512)     # a block of zeros ends a tar
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            if not files:
                raise ValueError(f'{path} is no tar, or cut off in its first file ({error})') from None
            is_whole = False
    return files, is_whole


def most_unpacked(path):
    """-> the bytes that a gzipped shard may have. Audio shrinks to a half: a hundredth is a bomb."""
    return max(2 ** 30, 100 * os.path.getsize(path))


@lru_cache(2)
def unpack(path):
    """A gzipped shard -> the same unpacked, in a file without a name, as gzip has no way to its middle."""
    file = tempfile.TemporaryFile()
    try:
        with gzip.open(path) as packed:
            blocks = iter(partial(packed.read1, 1 << 20), b'')      # read loses what is before a cut
            for block in blocks:
                file.write(block)
                if file.tell() > most_unpacked(path):
                    raise ValueError(f'{path} unpacks to over {file.tell() >> 30} GB: is it a bomb?')
    except (EOFError, zlib.error, gzip.BadGzipFile):
        pass        # cut off; read_file says in which of its files
    file.flush()
    return file


def read_file(path, offset, size, name):
    """-> the bytes of a file in a tar"""
    with open(path, 'rb') as file:
        if is_gzip(file):
            with UNPACKING:     # not by each of the threads that want something of it
                file = unpack(path)
        return read_bytes(file, path, name, offset, size)


# ------------------------------------------------------------------------------------------------------------
# one sample

def read_recording(item, codec, args):
    if isinstance(item, str):
        raise ValueError(item)
    shard, key, _ = item
    where = f'{shard}, {key}'
    suffix, audio = take(item, AUDIO)
    if audio is None:
        raise ValueError(f'{where}, has no audio ({", ".join(AUDIO)})')
    row, words = read_json(item), read_words(item)
    if words is None and 'alignments' in row:
        words = in_json(row, f'{where}.json')
    waves = read_piece(io.BytesIO(audio), f'{where}.{suffix}', codec.sample_rate)
    if args.user_channel is not None:
        return dialogue(waves, words, where, args)
    if len(waves) == 2 and args.channel is None:
        raise ValueError(f'{where}, has 2 channels: --channel=0 or 1 takes one as an utterance; '
                         '--user_channel=0 or 1 makes a dialogue of two, if the times of its words are known')
    wave, (text, remark) = one_channel(waves, args.channel, where), read_text(item, row, args.text_field)
    turn = dict(role=args.role, start_sec=0.0, end_sec=len(wave) / codec.sample_rate, text=text)
    if words:
        turn['words'], remark = clean_words([word[:3] for word in words], text)
    return tokenise.Recording(**{'user': None, 'assistant': None, args.role: wave}, turns=[turn],
                              remark=remark)


def dialogue(waves, words, where, args):
    if len(waves) != 2 or words is None:
        what = 'no times of words' if len(waves) == 2 else f'{len(waves)} channels'
        raise ValueError(f'{where}, has {what}; with --user_channel each sample is a dialogue of two '
                         'channels and has alignments in its .json, a .TextGrid or a .ctm')
    words, n_user, remark = by_role(words, where, args.assistant_speakers)
    remark = tokenise.SEVERAL.format('user') if n_user > 1 else remark
    user, assistant = waves[args.user_channel], waves[1 - args.user_channel]
    return tokenise.Recording(user, assistant, turns_of(words, args.gap_sec), remark)


def take(item, kinds):
    """-> the suffix and the bytes of the file of one of these kinds, a.b.flac is a flac; (None, None) where
    there is none. Raises ValueError where there are two."""
    shard, key, sample = item
    places = [(suffix, place) for suffix in sample if suffix.rpartition('.')[2] in kinds
              for place in sample[suffix]]
    if len(places) > 1:
        names = ' and '.join(f'{key}.{suffix}' for suffix, _ in places)
        raise ValueError(f'{shard} has {names} for {key}, and one can be taken; a name ends at its first dot')
    for suffix, place in places:
        return suffix, read_file(shard, *place, f'{key}.{suffix}')
    return None, None


def read_json(item):
    suffix, content = take(item, ('json',))
    try:
        row = json.loads(content or '{}')
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{item[0]}, {item[1]}.{suffix} is no JSON ({error})') from None
    if not isinstance(row, dict):
        raise ValueError(f'{item[0]}, {item[1]}.{suffix} is no JSON object')
    return row


def read_words(item):
    suffix, content = take(item, WORDS)
    return None if content is None else parse(f'{item[0]}, {item[1]}.{suffix}', content)


def read_text(item, row, field):
    """-> what is said, of the .json or else the .txt, and a remark"""
    fields = (field,) if field else TEXT_FIELDS
    text = next((row[name] for name in fields if row.get(name) is not None), None)
    if text is None and not field:
        content = take(item, ('txt',))[1]
        text = content if content is None else content.decode('utf-8-sig', 'replace')
    remark = ''
    if isinstance(text, list) and len(text) == 1:
        (text,), remark = text, 'the text is a list of one, as descriptions of sounds are'
    if not isinstance(text, str) or not text.strip():
        found = 'no text' if text is None else f'{text!r:.80}'
        where = f'under {" or ".join(fields)}{"" if field else ", nor a .txt"}'
        raise ValueError(f'{item[0]}, {item[1]}, has {found} {where}; --text_field=NAME says where it is')
    return text, remark


def main():
    parser = tokenise.arguments(__doc__)
    parser.add_argument('shards', nargs='+',
                        help="tars, gzipped or not; 'a{000..099}.tar' and 'a*.tar' are expanded")
    parser.add_argument('--role', choices=('user', 'assistant'), default='user', help='who speaks (user)')
    parser.add_argument('--channel', type=int, help='of the audio, from 0; needed where it has several')
    parser.add_argument('--user_channel', type=int, choices=(0, 1),
                        help='samples are dialogues of two channels; the assistant has the other')
    parser.add_argument('--text_field', help=f'name of the field in the .json ({" or ".join(TEXT_FIELDS)})')
    parser.add_argument('--assistant_speakers', default='SPEAKER_MAIN', type=lambda names: names.split(','),
                        help='of a dialogue; all others are the user (SPEAKER_MAIN)')
    parser.add_argument('--gap_sec', type=float, default=0.6,
                        help='of a dialogue: a longer pause between words ends a turn (0.6)')
    args = parser.parse_args()
    settings = ('shards', 'role', 'channel', 'user_channel', 'text_field', 'assistant_speakers', 'gap_sec')
    recipe = {key: getattr(args, key) for key in settings}
    tokenise.run(list_items(args.shards), partial(read_recording, args=args), args, recipe)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
