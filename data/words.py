"""
Times of words, as aligners and corpora write them, in one form: [(word, start_sec, end_sec, speaker)].

    a.json        moshi-finetune's {"alignments": [["Hello", [0.1, 0.5], "SPEAKER_MAIN"], …]}, SpokenWOZ's
                  [{"speaker": "A", "word": "Hello", "start": 0.1, "end": 0.5}, …], or a TextGrid as JSON
    a.TextGrid    Praat's, long or short: a tier "words", or one for each speaker, "Ann - words", as the
                  Montreal Forced Aligner names them
    a.ctm         a 1 0.10 0.40 Hello 0.98: recording, channel (the speaker), start, duration, word and
                  perhaps confidence; a whole corpus may be in one such file

They lie beside a.wav, or where a corpus's script is told to look. Sides of a dialogue that were aligned one
by one are a.user.TextGrid and a.assistant.TextGrid. Switchboard's own lists: recordings.word_list.
"""
import json
import math
import os
import re
from functools import lru_cache

from data.recordings import end_below, plain_word, spoken

SUFFIXES = ('.json', '.TextGrid', '.ctm')
WORD_TIER = re.compile(r'(?:(.*?)\s*-\s*)?words?', re.I)        # "words", "Ann - words"
SILENCE = re.compile(r'<.*>|\[.*\]|\{.*\}|!?sil|sp', re.I)      # as aligners write what is no word
UNKNOWN = re.compile(r'[<[](?:unk|oov)[]>]', re.I)              # a word that was said but is in no dictionary


def read_words(audio, place=None, names=(), beside=SUFFIXES):
    """
    -> (the words of audio, None where no file has them; what audio is called in a CTM file, None if there is
    none). Raises ValueError where there is more than one file, or one that cannot be read.
        place       a file, or the folder that an aligner wrote, where an end of the audio's path leads to
                    such a file; None: beside the audio
        names       what a CTM file may call it, before its name without .wav
        beside      suffixes of such files beside the audio
    """
    names, words, name = [*names, os.path.basename(os.path.splitext(audio)[0])], None, None
    for role, path in find_words(audio, place, beside):
        if path.lower().endswith('.ctm'):
            name = next((name for name in names if name in ctm_index(path)), None)
            if name is None and path == place:      # a corpus's, and an aligner may leave a recording out
                continue
            content = ctm_rows(path, name or names[-1])
        else:
            with open(path, 'rb') as file:
                content = file.read()
        words = (words or []) + [(*word[:3], role or word[3]) for word in parse(path, content)]
    return words, name


def find_words(audio, place, beside):
    """-> [(role, path)]; role is None for a file of all speakers."""
    if place is not None and os.path.isfile(place):
        return [(None, place)]
    if place is not None and not os.path.isdir(place):
        raise ValueError(f'no file or folder {place}, where word times were to be')
    stem, found = os.path.splitext(audio)[0], []
    for role in (None, 'user', 'assistant'):
        for suffix in SUFFIXES if place else beside:
            path = f'{stem}.{role}{suffix}' if role else stem + suffix
            path = end_below(path, place) if place else path if os.path.isfile(path) else None
            if path:
                found.append((role, path))
    roles = [role for role, _ in found]
    if len(set(roles)) < len(roles) or None in roles and len(roles) > 1:
        names = ' and '.join(os.path.basename(path) for _, path in found)
        raise ValueError(f'{audio} has word times in {names}; keep one')
    return found


def by_role(words, audio, assistant_speakers):
    """
    -> ({role: [dict(text, start_sec, end_sec)] in order}, how many speakers are the user, a remark). Who is
    called assistant is the assistant in any case. Raises ValueError where of several speakers none is.
    """
    speakers = sorted({str(speaker) for *_, speaker in words})
    assistants = {'assistant', *assistant_speakers}
    if len(speakers) > 1 and not set(speakers) & assistants:
        raise ValueError(f'the words of {audio} are of the speakers {", ".join(speakers)}, none of them the '
                         f'assistant: --assistant_speakers={speakers[-1]} says who is')
    said, remarks = dict(user=[], assistant=[]), []
    for *word, speaker in words:
        said['assistant' if str(speaker) in assistants else 'user'].append(word)
    for role in said:
        said[role], remark = clean_words(said[role])
        remarks.append(remark)
    return said, len(set(speakers) - assistants), max(remarks)


def clean_words(words, text=None):
    """
    [(word, start_sec, end_sec)] -> ([dict(text, start_sec, end_sec)] in order, without sounds and what an
    aligner does not know; a remark). text: of the turn. Words are spelled as it has them, marks and all, and
    those that the aligner does not know are filled in, if its letters are those of the words.
    """
    words = [(spoken(word), *at) for word, *at in sorted(words, key=lambda word: word[1]) if spoken(word)]
    known = ['' if UNKNOWN.fullmatch(word) else word for word, *_ in words]
    spelled, remark = spell(known, text or '') if words else [], ''
    if spelled is None and text:
        remark = "an aligner's words are not those of the text, and kept as the aligner has them"
    elif spelled is None and '' in known:
        remark = 'some words are missing, as the aligner did not know them'
    return [dict(text=word, start_sec=start_sec, end_sec=end_sec) for word, (_, start_sec, end_sec)
            in zip(known if spelled is None else spelled, words) if word], remark


def spell(words, text):
    """
    Words in any spelling, '' for one that nobody knows -> the pieces of a text that they are, which are all
    of it; None where their letters are not those of the text.
        ['what', '', 'said'], '"What?", he said.' -> ['"What?",', 'he', 'said.']
    """
    text = ' '.join(text.split())
    letters = [(at, letter) for at, char in enumerate(text) for letter in char.casefold() if letter.isalnum()]
    firsts = [n for n, (at, _) in enumerate(letters) if n == 0 or ' ' in text[letters[n - 1][0]:at]]
    starts = find_starts([''.join(filter(str.isalnum, word.casefold())) if word else None for word in words],
                         ''.join(letter for _, letter in letters), firsts)
    if not letters or starts is None:
        return None
    cuts = [0]
    for at in starts[1:]:
        last = letters[at - 1][0] + 1 if at else 0
        here = letters[at][0] if at < len(letters) else len(text)
        # a mark after a space belongs to the word that follows, "(he said)"
        cuts.append(last + text[last:here].rfind(' ') if ' ' in text[last:here] else here)
    return [text[start:end].strip() for start, end in zip(cuts, [*cuts[1:], len(text)])]


def find_starts(words, letters, firsts):
    """Where in letters each word starts, if they are all of it, None for a word that may be anything; None if
    they are not. What may be anything ends where the words after it are first found, at a letter that follows
    a space (firsts) if there is one."""
    starts, at = [], 0
    for n, word in enumerate(words):
        starts.append(at)
        if word is not None:
            if not letters.startswith(word, at):
                return None
            at += len(word)
            continue
        following = words[n + 1:]
        is_last = None not in following
        known = ''.join(following if is_last else following[:following.index(None)])
        if is_last:
            at = len(letters) - len(known)
        else:
            ends = (first for first in firsts if first > at and letters.startswith(known, first))
            at = next(ends, letters.find(known, at + 1))
        if at <= starts[-1] or not known and not is_last:       # two unknown: where would the first end?
            return None
    return starts if at == len(letters) else None


# ------------------------------------------------------------------------------------------------------------
# files

def parse(path, content):
    """The bytes of such a file -> its words. Raises ValueError."""
    kind = os.path.splitext(path)[1].lower()
    if kind not in PARSERS:
        raise ValueError(f'{path} is no file of word times: {", ".join(PARSERS)} are read')
    try:
        # Praat writes UTF-16 where a text is not ASCII
        text = content.decode('utf-16' if content[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is neither UTF-8 nor UTF-16 ({error})') from None
    words = PARSERS[kind](text, path)
    for word, start_sec, end_sec, _ in words:
        if not isinstance(word, str) or not math.isfinite(start_sec + end_sec):
            raise ValueError(f'{path} has the word {word!r} from {start_sec} s to {end_sec} s')
    return words


def parse_json(text, path):
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f'{path} is no JSON ({error})') from None
    is_textgrid = isinstance(content, dict) and 'tiers' in content
    return parse_textgrid(text, path) if is_textgrid else in_json(content, path)


def in_json(content, path):
    """The words of an object or a list from JSON."""
    try:
        if isinstance(content, list):
            rows = [plain_word(row) for row in content]
            words = [(row['word'], row['start'], row['end'], row['role']) for row in rows]
        else:
            words = [(text, *span, speaker) for text, span, speaker in content['alignments']]
        return [(text, start + 0.0, end + 0.0, speaker) for text, start, end, speaker in words]
    except (KeyError, TypeError, ValueError, AttributeError) as error:      # ValueError: too few, or too many
        raise ValueError(f'{path} has no alignments of the form [[word, [start, end], speaker], …], '
                         f'nor is it a list of {{speaker, word, start, end}} ({error})') from None


def parse_textgrid(text, path):
    try:
        from praatio.utilities.errors import ParsingError
        from praatio.utilities.textgrid_io import parseTextgridStr
    except ModuleNotFoundError:
        raise ValueError(f'{path} is read by praatio: pip install praatio') from None
    try:
        tiers = parseTextgridStr(text)['tiers']
        names = {tier['name']: WORD_TIER.fullmatch(tier['name'].strip()) for tier in tiers}
        words = [(word, float(start), float(end), names[tier['name']][1] or 'words')
                 for tier in tiers if names[tier['name']] for start, end, word in tier['entries']]
    except (ParsingError, LookupError, ValueError, TypeError, AttributeError) as error:
        what = f'{type(error).__name__}: {error}'
        raise ValueError(f'{path} is no TextGrid that can be read ({what})') from None
    if not any(names.values()):
        raise ValueError(f'{path} has the tiers {", ".join(map(repr, names))}: none is called "words", or '
                         '"NAME - words"')
    return [word for word in words if is_word(word[0])]


def parse_ctm(text, path):
    words = []
    for line in text.splitlines():
        try:
            if line.strip() and not line.startswith(';;'):
                _, channel, start_sec, n_sec, word, *_ = line.split()
                words.append((word, float(start_sec), float(start_sec) + float(n_sec), channel))
        except ValueError:
            raise ValueError(f'{path} has {line!r:.80}, which is no row of a CTM file, as '
                             '"recording 1 0.98 0.25 hi" is: channel, start, duration, word') from None
    return [word for word in words if is_word(word[0])]


PARSERS = {'.json': parse_json, '.textgrid': parse_textgrid, '.ctm': parse_ctm}


def is_word(text):
    return bool(spoken(text)) and (not SILENCE.fullmatch(spoken(text)) or bool(UNKNOWN.fullmatch(text)))


@lru_cache(4)
def ctm_index(path):
    """recording -> [(start, end)] of its rows, in bytes. The words of a corpus would fill the memory."""
    index, last, end = {}, None, 0
    with open(path, 'rb') as file:
        for line in file:
            start, end = end, end + len(line)
            if not line.strip() or line.startswith(b';;'):
                continue
            name = line.split(maxsplit=1)[0].decode('utf-8', 'replace')
            if name != last:
                index.setdefault(name, []).append((start, end))
            else:
                index[name][-1] = (index[name][-1][0], end)
            last = name
    return index


def ctm_rows(path, name):
    """-> the rows of a recording, as bytes"""
    index = ctm_index(path)
    if name not in index:
        there = ', '.join(list(index)[:3]) + (', …' if len(index) > 3 else '')
        raise ValueError(f'{path} has no words of {name}, but of {there or "nobody"}')
    rows = []
    with open(path, 'rb') as file:
        for start, end in index[name]:
            file.seek(start)
            rows.append(file.read(end - start))
    return b''.join(rows)
