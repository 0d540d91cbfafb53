"""
Behavior-SD: conversations of two synthetic voices, with backchannels, interruptions and fillers, become
dialogues of two channels.

    train/0001.tar: 7.flac      stereo, 22.05 kHz: channel 0 is speaker 0, channel 1 speaker 1
                    7.json
        {"utterances": [
            {"speaker_idx": 1, "tts_text": "So, um… we should go.", "start_time": 0.0, "end_time": 2.7,
             "backchannels": [{"tts_text": "Yeah.", "start_time": 1.1, "end_time": 1.5}]}, …]}

Tars are read as they are, or unpacked. A backchannel stands with what the other says, and is a turn of the
listener. An interruption is a turn that begins in one of the other's.

    python data/behavior_sd/prepare.py behavior-sd --codec=codecs/s3 --out=data/behavior
"""
from functools import partial

from data import tokenise
from data.sides import arguments, dialogue, expected_form, list_samples, read_audio, read_json, said


def list_items(folder):
    """'train/0001/7' -> {'.flac': Place, '.json': Place}"""
    samples = list_samples(folder, ('.flac', '.json'))
    items = {key: places for key, places in samples.items() if '.flac' in places}
    if not items:
        raise ValueError(f'{folder} holds no .flac files, nor tars of them')
    return items


def read_recording(places, codec, args):
    if '.json' not in places:
        raise ValueError(f'beside {places[".flac"].name} there is no .json')
    sides = [], []
    with expected_form(places['.json'].name):
        for utterance in read_json(places['.json'])['utterances']:
            speaker = utterance['speaker_idx']
            sides[speaker].append(piece_of(utterance))
            for backchannel in utterance.get('backchannels') or ():
                sides[1 - speaker].append(piece_of(backchannel))
    return dialogue(read_audio(places['.flac'], 2, codec.sample_rate), sides, args)


def piece_of(utterance):
    return said(utterance['tts_text'], utterance['start_time'], utterance['end_time'])


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
