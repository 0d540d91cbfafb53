"""
Fisher and Switchboard (LDC): telephone calls on two channels become dialogues. All folders are searched for
recordings, and for the transcript of each, by name:

    fe_03_00001.sph     fe_03_00001.txt             3.76 5.54 A: and i generally prefer
    sw02001.sph         sw2001A-ms98-a-word.text    sw2001A-ms98-a-0002 0.977625 1.177625 hi
                        sw2001B-ms98-a-word.text    so Switchboard has times of words

A is channel 0, B channel 1. Where fe_03_00001.wav is there, it is read in place of the .sph: all of Fisher is
compressed with shorten, which only sph2pipe unpacks (docs/corpora.md).

    python data/ldc/prepare.py LDC2004S13 LDC2004T19 LDC2005S13 LDC2005T19 --codec=codecs/s3 --out=data/fisher
    python data/ldc/prepare.py LDC97S62 swb_ms98_transcriptions --codec=codecs/s3 --out=data/switchboard
"""
import os
import re
from functools import partial

from data import tokenise
from data.recordings import word_list
from data.sides import arguments, dialogue, list_samples, read_audio, said

AUDIO = re.compile(r'fe_03_\d{5}|sw0?\d{4}')
TEXT = re.compile(r'fe_03_\d{5}|sw\d{4}[AB]-ms98-a-word')
FISHER_ROW = re.compile(r'(\d+(?:\.\d*)?)\s+(\d+(?:\.\d*)?)\s+([AB]):(.*)')
# Fisher: (( what was hard to hear )). Switchboard: {a made-up word}, <b_aside>, them_1: another way to say it
MEANT = re.compile(r'\[[^][/]*/([^][]*)\]')      # Switchboard: [what was said/what was meant]
NO_TEXT = re.compile(r'\(\(|\)\)|[{}]|<[be]_aside>|_\d\b')


def list_items(folders):
    """'fe_03_00001' -> (Place of its audio, Place of its transcript; of Switchboard's two, of one)"""
    audio, texts = {}, {}
    for folder in folders:
        for key, places in list_samples(folder, ('.sph', '.wav', '.txt', '.text')).items():
            name = os.path.basename(key)
            if AUDIO.fullmatch(name) and places.keys() & {'.sph', '.wav'}:
                if '.wav' in places or name not in audio:
                    audio[name] = places.get('.wav') or places['.sph']
            if TEXT.fullmatch(name) and places.keys() & {'.txt', '.text'}:
                call = name[:6] if name.startswith('sw') else name
                texts[call] = places.get('.txt') or places['.text']
    if not audio:
        raise ValueError(f'no recordings such as fe_03_00001.sph or sw02001.wav are in {" ".join(folders)}')
    return {name: (place, texts.get(re.sub('^sw0', 'sw', name))) for name, place in audio.items()}


def read_recording(item, codec, args):
    place, text = item
    if text is None:
        raise ValueError(f'there is no transcript of {place.name} in the folders given')
    sides = dict(A=[], B=[])
    if text.name.endswith('.txt'):
        for side, start_sec, end_sec, words in read_fisher(text):
            sides[side].append(said(NO_TEXT.sub('', words), start_sec, end_sec))
    else:       # the lists of both sides lie in one folder, and are found by the name of the audio
        beside = os.path.join(os.path.dirname(text.path), os.path.basename(place.name))
        for word, start_sec, end_sec, side in word_list(beside):
            word = said(NO_TEXT.sub('', MEANT.sub(r'\1', word)), start_sec, end_sec)
            sides[side].append(dict(word, words=[word]))
    return dialogue(read_audio(place, 2, codec.sample_rate), list(sides.values()), args)


def read_fisher(place):
    """[(side, start_sec, end_sec, text)]"""
    rows = []
    for n, line in enumerate(place.read().decode().splitlines(), 1):
        if line.strip() and not line.startswith('#'):
            found = FISHER_ROW.fullmatch(line.strip())
            if not found:
                raise ValueError(f'{place.name}, row {n}, is no row of Fisher, as "3.76 5.54 A: and i" is: '
                                 f'{line.strip()!r:.80}')
            rows.append((found[3], float(found[1]), float(found[2]), found[4]))
    return rows


def main():
    parser = arguments(__doc__)
    parser.add_argument('folders', nargs='+', help='where recordings and transcripts are')
    args = parser.parse_args()
    recipe = {key: getattr(args, key) for key in ('folders', 'user_channel', 'gap_sec')}
    tokenise.run(list_items(args.folders), partial(read_recording, args=args), args, recipe)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
