"""
What the public corpora of two-channel conversations have in common, for the prepare.py of each: samples,
which are files of one stem, in folders or in tars; and the way from two sides, audio and what is said, to a
dialogue.

    train/0001.tar: 7.flac 7.json       {'train/0001/7': {'.flac': Place, '.json': Place},
    train/0002/8.flac  8.json            'train/0002/8': …}
"""
import functools
import io
import json
import os
import re
import tarfile
from contextlib import contextmanager
from typing import NamedTuple

from data import tokenise
from data.recordings import TarBytes, plain_files, read_all, read_bytes, read_piece, spoken, turns_of

# a sound, [laughter]; of a word what was not said, ab[solute]-; a tag of a speech synthesis, <strong>
NO_TEXT = re.compile(r'\[[^][]*\]|</?\w+>')


class Place(NamedTuple):
    """Where a file is: alone, or in a tar."""
    name: str               # below the corpus's folder, as if the tar had been unpacked
    path: str
    offset: int = 0
    size: int | None = None     # None: alone

    def read(self):
        with open(self.path, 'rb') as file:
            if self.size is None:
                return read_all(file, self.name)
            return read_bytes(file, self.path, self.name, self.offset, self.size)


@functools.lru_cache(32)
def tar_index(path):
    """name -> {'.flac': (offset, size), '.json': …}. With this index any file of a tar may be next."""
    index = {}
    try:
        with open(path, 'rb') as file:
            tar = tarfile.open(fileobj=TarBytes(file, os.path.getsize(path)), mode='r:')
            for name, *place in plain_files(tar):
                name, extension = os.path.splitext(name)
                index.setdefault(name, {})[extension] = tuple(place)
    except tarfile.TarError as error:
        if not index:       # of one that is cut off, what lies before the cut is good
            raise ValueError(f'{path} is no tar ({error})') from None
    return index


def list_samples(folder, suffixes):
    """stem -> {suffix: Place} of the files below a folder, in the order of their names. A tar counts as the
    folder that it would be unpacked to."""
    if not os.path.isdir(folder):
        raise ValueError(f'no folder {folder}')
    samples = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(parent, name)
            stem, suffix = os.path.splitext(os.path.relpath(path, folder))
            if suffix in suffixes and os.path.isfile(path):     # a pipe would be waited for
                samples.setdefault(stem, {})[suffix] = Place(stem + suffix, path)
            for inside, files in tar_index(path).items() if suffix == '.tar' and os.path.isfile(path) else ():
                key = os.path.normpath(os.path.join(stem, inside))
                for suffix in files.keys() & set(suffixes):
                    samples.setdefault(key, {})[suffix] = Place(key + suffix, path, *files[suffix])
    return samples


@contextmanager
def expected_form(name):
    """What is missing in a file, or is of another kind, ends in a sentence that names the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f'{name} has not the form that --help shows '
                         f'({type(error).__name__}: {error})') from None


def read_json(place):
    try:
        return json.loads(place.read())
    except FileNotFoundError:
        raise ValueError(f'no file {place.path}') from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{place.name} is no JSON ({error})') from None


def read_audio(place, n_channel, sample_rate):
    """-> float32 [n_channel, n_sample]"""
    file = place.path if place.size is None else io.BytesIO(place.read())
    waves = read_piece(file, place.name, sample_rate)
    if len(waves) != n_channel:
        raise ValueError(f'{place.name} has {len(waves)} channels, not {n_channel}')
    return waves


def said(text, start_sec, end_sec, words=()):
    """A word, or several with the times of each, where they are known."""
    text = ' '.join(NO_TEXT.sub('', spoken(text)).split())
    if words and not start_sec - 1 <= words[0]['start_sec'] <= end_sec + 1:     # 1: aligners differ
        raise ValueError(f'{text!r:.40} is said from {start_sec} s to {end_sec} s, but its first word at '
                         f'{words[0]["start_sec"]} s')
    return dict(text=text, start_sec=start_sec + 0.0, end_sec=end_sec + 0.0, words=list(words))


def dialogue(waves, sides, args):
    """
    -> a Recording of two sides, one the user and the other the assistant, as args.user_channel says.
        waves   two of float32 [n_sample]
        sides   two lists of said(). These, or their words where all have them, become turns; a pause longer
                than args.gap_sec ends one.
    """
    roles = ['assistant', 'user'] if args.user_channel == 1 else ['user', 'assistant']
    turns = []
    for role, pieces in zip(roles, sides):
        has_words = all(piece['words'] for piece in pieces)
        if has_words:
            pieces = [word for piece in pieces for word in piece['words']]
        pieces = sorted((piece for piece in pieces if piece['text']), key=lambda piece: piece['start_sec'])
        for turn in turns_of({role: pieces}, args.gap_sec):
            turns.append(turn if has_words else dict(turn, words=[]))
    if not turns:
        raise ValueError('nothing is said in it')
    return tokenise.Recording(**dict(zip(roles, waves)), turns=turns)


def arguments(doc):
    parser = tokenise.arguments(doc)
    parser.add_argument('--user_channel', type=int, choices=(0, 1), default=1,
                        help='which side is the user; the assistant is the other (1)')
    parser.add_argument('--gap_sec', type=float, default=0.6, help='a longer pause ends a turn (0.6)')
    return parser
