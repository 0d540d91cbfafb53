"""
Seamless Interaction (Meta): two people face to face, with a wav and a JSON file each, become dialogues of two
channels.

    improvised/dev/0000/0005/V00_S0809_I00000582_P0947.wav      one person, 48 kHz, mono
                             V00_S0809_I00000582_P0947.json
        {"metadata:transcript": [{"transcript": "Nice one.", "start": 24.3, "end": 25.1,
                                  "words": [{"word": "Nice", "start": 24.3, "end": 24.6}, …]}, …]}
    improvised/dev/0000/0012.tar: V00_S0809_I00000582_P0383.wav …   as on Hugging Face, in tars

Tars are read as they are, or unpacked. Files whose names are the same up to _P are of one interaction. Side 0
is the person whose id sorts first (P0383), side 1 the other.

    python data/seamless/prepare.py seamless_interaction --codec=codecs/s3 --out=data/face_to_face
"""
import os
import re
from functools import partial

from data import tokenise
from data.recordings import side_by_side
from data.sides import arguments, dialogue, expected_form, list_samples, read_audio, read_json, said

FILE_ID = re.compile(r'(V\d+_S\d+_I\d+)_(P\w+)')


def list_items(folder):
    """interaction -> {person: {'.wav': Place, '.json': Place}}"""
    interactions = {}
    for key, places in list_samples(folder, ('.wav', '.json')).items():
        file_id = FILE_ID.fullmatch(os.path.basename(key))
        if file_id and '.wav' in places:
            people = interactions.setdefault(file_id[1], {})
            if file_id[2] in people:
                raise ValueError(f'{places[".wav"].name} is there twice: {people[file_id[2]][".wav"].name}')
            people[file_id[2]] = places
    if not interactions:
        raise ValueError(f'{folder} holds no files such as V00_S0809_I00000582_P0947.wav, nor tars of them')
    return interactions


def read_recording(people, codec, args):
    if len(people) != 2:
        raise ValueError(f'it takes two people, and here is {" and ".join(sorted(people))}')
    wavs = [people[name]['.wav'] for name in sorted(people)]
    sides = [read_transcript(people[name]) for name in sorted(people)]
    waves = [read_audio(wav, 1, codec.sample_rate)[0] for wav in wavs]
    return dialogue(side_by_side(waves, [wav.name for wav in wavs], codec.sample_rate), sides, args)


def read_transcript(places):
    """-> [said()] of one person"""
    if '.json' not in places:
        raise ValueError(f'beside {places[".wav"].name} there is no .json')
    name, pieces = places['.json'].name, []
    with expected_form(name):
        for piece in read_json(places['.json'])['metadata:transcript']:
            words, at_sec = [], piece['start']
            for word in piece['words']:
                # a word that the aligner could not place has no time: it stands where the last one ended
                start_sec = word.get('start', at_sec)
                at_sec = word.get('end', start_sec)
                words.append(said(word['word'], start_sec, at_sec))
            pieces.append(said(piece['transcript'], piece['start'], piece['end'], words))
    if not any(piece['text'] for piece in pieces):
        raise ValueError(f'{name} has no word; of some people the sound is missing')
    return pieces


def main():
    parser = arguments(__doc__)
    parser.add_argument('folder', help='the corpus, or a part of it')
    args = parser.parse_args()
    recipe = {key: getattr(args, key) for key in ('folder', 'user_channel', 'gap_sec')}
    tokenise.run(list_items(args.folder), partial(read_recording, args=args), args, recipe)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
