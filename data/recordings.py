"""What all corpora of rows and audio files have in common, for the prepare.py of each."""
import gzip
import json
import math
import os
import re
import shlex
import tarfile
import zlib

import numpy as np

from common.audio import open_audio, read_samples

WORD_FIELDS = dict(speaker='role', Word='word', BeginTime='start', EndTime='end')       # SpokenWOZ's: ours
SWITCHBOARD_ROW = re.compile(r'sw\d+([AB])-ms98-a-\d+')
SWITCHBOARD_FILE = re.compile(r'sw(\d+)([AB])-ms98-a-word\.text')
# as Switchboard writes sounds
NO_SPEECH = re.compile(r'(?<! ) *\[(?:silence|noise|laughter|vocalized-noise)\]')
# bytes: an hour of codes is a line of a megabyte. What is more is damage, or a bomb
MAX_LINE, MAX_TEXT, MAX_HEADER = 2 ** 28, 2 ** 31, 2 ** 20
PAIR_SEC = 1.0          # two files of one dialogue may differ by this much in length
WIDE = '[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]'      # Chinese and Japanese, without spaces between words


def read_rows(path):
    """Yields ('train.jsonl, row 3', the object there or None for anything else, its offset in the file).
    A row that is no JSON spoils no other; a file of such rows alone is no manifest."""
    offset = n_row = n_object = 0
    try:
        with gzip.open(path) if path.endswith('.gz') else open(path, 'rb') as file:
            for n, line in enumerate(lines_of(file, path), 1):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if line.strip():
                    n_row, n_object = n_row + 1, n_object + isinstance(row, dict)
                    yield f'{os.path.basename(path)}, row {n}', row if isinstance(row, dict) else None, offset
                offset += len(line)
    except FileNotFoundError:
        raise ValueError(f'no file {path}') from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f'{path} cannot be read to its end ({error})')
    if n_row and not n_object:
        raise ValueError(f'{path} is no manifest: none of its {n_row} lines is a JSON object; JSON lines are '
                         'expected, each object whole on a line of its own')


def lines_of(file, path):
    """Yields the lines of an open file, as bytes. Raises ValueError for one that is too long to be one: some
    kilobytes of gzip may hold gigabytes without an end."""
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise ValueError(f'{path} has a line of over {MAX_LINE >> 20} MB: it is no text a row')
        yield line


def read_all(file, path):
    """The same of a whole file."""
    content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise ValueError(f'{path} unpacks to over {MAX_TEXT >> 30} GB: cut it into files of JSON lines')
    return content


class TarBytes:
    """A tar of at most n_byte bytes, as tarfile is to see it. Headers are small: one that claims gigabytes,
    which tarfile would read, is damaged or a bomb."""

    def __init__(self, file, n_byte):
        self.file, self.n_byte, self.tell = file, n_byte, file.tell

    def read(self, n):
        if n > MAX_HEADER:
            raise tarfile.ReadError(f'a header of {n} bytes')
        return self.file.read(n)

    def seek(self, place):
        if place > self.n_byte:
            raise tarfile.ReadError('it ends before its files do')
        return self.file.seek(place)


def plain_files(tar):
    """Yields (name, offset, size) of the files in an open tar. Links, devices and sparse files are none here:
    nothing is ever unpacked to a name, or read from a place, that a tar says."""
    for member in tar:
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) and not member.sparse:
            yield member.name, member.offset_data, member.size


def read_bytes(file, path, name, offset, size):
    """-> all bytes of a file in a tar. Raises ValueError where that is cut off; a size from a tar may be any
    number."""
    is_there = offset + size <= os.fstat(file.fileno()).st_size
    content = os.pread(file.fileno(), size, offset) if is_there else b''
    if len(content) < size:
        raise ValueError(f'{path} is cut off in {name}')
    return content


def by_id(pairs):
    """[(id, what)] -> {id: what}. Raises ValueError where two have the same id: one of them would be lost."""
    items = {}
    for id, what in pairs:
        if id in items:
            raise ValueError(f'two recordings have the id {id!r}; every one needs its own')
        items[id] = what
    return items


def end_below(path, folder):
    """-> the longest end of a path that is a file below folder, None if there is none. Corpora are copied to
    other machines, and what belongs to them is written in folders of the same names."""
    names = [name for name in path.split('/') if name]
    ends = (os.path.join(folder, *names[at:]) for at in range(len(names)))
    return next(filter(os.path.isfile, ends), None)


def find_audio(path, folder):
    """-> the file that a manifest's path means. An absolute path that exists is taken as it is. Of any other
    the longest end that exists below folder is taken."""
    if not isinstance(path, str) or '://' in path:
        raise ValueError(f'{path!r} is no path of a file on this machine')
    found = path if os.path.isabs(path) and os.path.isfile(path) else end_below(path, folder)
    if found is None:
        raise ValueError(f'no file {path}, nor an end of that path below {folder}; '
                         '--audio_dir=FOLDER says where the audio is')
    return found


def read_piece(file, name, sample_rate, start_sec=0.0, end_sec=None, whole_sec=None):
    """A path or bytes -> float32 [n_channel, n_sample] at sample_rate. Only the piece is read, as an hour of
    audio may be cut into thousands. whole_sec: how long the file is by its manifest; a file of another length
    was cut off or replaced, and its words would not be those of the text."""
    if isinstance(file, str) and not os.path.isfile(file):
        raise ValueError(f'no file {name}')
    if str(file).lower().endswith('.sph') and is_shortened(file):
        wav = os.path.splitext(file)[0] + '.wav'
        raise ValueError(f'{name} is compressed with shorten, which soundfile cannot read: '
                         f'"sph2pipe -p -f wav {shlex.quote(file)} {shlex.quote(wav)}" unpacks it')
    with open_audio(file, name) as audio:
        rate, n_sec = audio.samplerate, audio.frames / audio.samplerate
        end_sec = n_sec if end_sec is None else end_sec
        check_length(name, n_sec, whole_sec)
        if not 0 <= start_sec < end_sec <= n_sec + 0.1:     # 0.1: manifests round
            raise ValueError(f'{name} is {n_sec:.2f} s long; '
                             f'there is nothing from {start_sec} s to {end_sec} s')
        audio.seek(min(round(start_sec * rate), audio.frames))
        waves = read_samples(audio, name, sample_rate, round((end_sec - start_sec) * rate))
    return np.ascontiguousarray(waves.T)


def one_channel(waves, channel, name):
    """Waves [n_channel, n_sample] -> that of an utterance. channel: the setting, None for files of one."""
    if channel is None and len(waves) > 1:
        raise ValueError(f'{name} has {len(waves)} channels; --channel=N says which, 0 to {len(waves) - 1}')
    if (channel or 0) not in range(len(waves)):
        raise ValueError(f'{name} has no --channel={channel}: it has {len(waves)}, counted from 0')
    return waves[channel or 0]


def is_shortened(path):
    """Is it a NIST sphere file, .sph, whose samples are compressed with shorten?"""
    with open(path, 'rb') as file:
        return b'embedded-shorten' in file.read(1024)       # its header


def check_length(name, n_sec, whole_sec):
    if whole_sec is not None and abs(whole_sec - n_sec) > 0.1:
        raise ValueError(f'{name} is {n_sec:.2f} s long, but {whole_sec:.2f} s by its manifest; '
                         'was it cut off, or replaced?')


def halves_of(path):
    """a.wav -> [a.user.wav, a.assistant.wav], where a dialogue of two mono files would lie"""
    stem, suffix = os.path.splitext(path)
    return [f'{stem}.{role}{suffix}' for role in ('user', 'assistant')]


def read_halves(path, sample_rate, whole_sec):
    """-> float32 [2, n_sample] of the two mono files in the place of a stereo file, the user first; None
    where there is the file itself, or neither of the two."""
    halves = halves_of(path)
    if os.path.isfile(path) or not any(map(os.path.isfile, halves)):
        return None
    found = [read_piece(half, half, sample_rate) for half in halves]
    for half, waves in zip(halves, found):
        if len(waves) != 1:
            raise ValueError(f'{half} has {len(waves)} channels, the file of one side has one')
    pair = side_by_side([wave for wave, in found], halves, sample_rate)
    check_length(' with '.join(halves), pair.shape[1] / sample_rate, whole_sec)
    return pair


def side_by_side(waves, paths, sample_rate):
    """Two waves of files of their own -> float32 [2, n_sample]; the shorter gets silence at its end."""
    one_sec, other_sec = (len(wave) / sample_rate for wave in waves)
    if abs(one_sec - other_sec) > PAIR_SEC:
        raise ValueError(f'{paths[0]} is {one_sec:.2f} s long and {paths[1]} {other_sec:.2f} s: '
                         f'the two files of a dialogue start together and differ by {PAIR_SEC:g} s at most')
    n_sample = max(map(len, waves))
    return np.stack([np.pad(wave, (0, n_sample - len(wave))) for wave in waves])


def plain_word(row):
    """
    A row of a word list -> the same in our names, role, start, end (seconds), word; others stay as they are.
        {"speaker": "A", "Word": "hi", "BeginTime": 460, "EndTime": 1520}       SpokenWOZ, milliseconds
        {"role": "sw2001A-ms98-a-0001", …}                                      Switchboard: side A
    """
    plain = {WORD_FIELDS.get(key, key): value for key, value in row.items()}
    for key in ('BeginTime', 'EndTime'):
        if isinstance(row.get(key), (int, float)):
            plain[WORD_FIELDS[key]] = row[key] / 1000
    side = SWITCHBOARD_ROW.fullmatch(str(plain.get('role')))
    return dict(plain, role=side[1]) if side else plain


def word_list(audio):
    """[(word, start_sec, end_sec, 'A' or 'B')] of Switchboard's lists, one a side, that lie beside
    sw02001.wav or sw2001.wav; [] of any other audio."""
    folder, stem = os.path.split(os.path.splitext(audio)[0])
    number, words = stem.removeprefix('sw').removeprefix('0'), []
    for path in [os.path.join(folder, f'sw{number}{side}-ms98-a-word.text') for side in 'AB']:
        if not os.path.isfile(path):
            continue
        with open(path, encoding='utf-8') as file:
            for n, line in enumerate(file, 1):
                try:
                    id, start_sec, end_sec, word = line.split()
                    words.append((word, float(start_sec), float(end_sec), SWITCHBOARD_ROW.fullmatch(id)[1]))
                except (ValueError, TypeError):     # TypeError: another id
                    raise ValueError(f'{path}, row {n}, is no word of Switchboard, as '
                                     f'"sw2001A-ms98-a-0001 0.0 0.98 hi" is: {line.strip()!r:.80}') from None
    return words


def spoken(text):
    """A text without Switchboard's sounds; [laughter-yeah] is a yeah with a laugh."""
    return NO_SPEECH.sub('', re.sub(r'\[laughter-([^]]+)\]', r'\1', text)).strip()


def turns_of(words, gap_sec):
    """{role: its words in order} -> turns; a pause longer than gap_sec ends one."""
    turns = []
    for role, said in words.items():
        last_end_sec = -math.inf
        for word in said:
            if word['start_sec'] - last_end_sec > gap_sec:
                turns.append(dict(role=role, start_sec=word['start_sec'], words=[]))
            turns[-1]['words'].append(word)
            last_end_sec = turns[-1]['end_sec'] = max(last_end_sec, word['end_sec'])
    for turn in turns:
        text = ' '.join(word['text'].strip() for word in turn['words'])
        turn['text'] = re.sub(f'(?<={WIDE}) +(?={WIDE})', '', text)
    return turns
