"""
otoSpeech: two people on the line become dialogues of two channels. Its releases have two forms:

    processed-141h          data/train/shard-000000.tar: S.flac (stereo), S.json; tars are read as they are
                                {"speakers": [{"speaker_id": "ann", "channel": 0}, …]}
                            seglst.json, from elsewhere (docs/corpora.md):
                                [{"session_id": "S", "speaker": "ann", "start_time": 0.5, "end_time": 1.4,
                                  "words": "Oh hi.", "word_alignment": [["Oh", 0.5, 0.8], …]}, …]
    turn-104h               42/speaker_1_audio.wav (mono; speaker 1 is side 0), speaker_1_annotation_a.srt
                                1
                                00:00:00,588 --> 00:00:03,068
                                [Normal Turn] Hey man, how is it going?

    python data/otospeech/prepare.py otoSpeech-141h --labels=seglst.json --codec=codecs/s3 --out=data/oto
    python data/otospeech/prepare.py otoSpeech-104h --codec=codecs/s3 --out=data/oto_turn
"""
import os
import re
from functools import partial

from data import tokenise
from data.recordings import side_by_side
from data.sides import Place, arguments, dialogue, expected_form, list_samples, read_audio, read_json, said

SRT_TIME = r'(\d+):(\d+):(\d+)[,.](\d{3})'
SRT_ENTRY = re.compile(rf'\d+\s+{SRT_TIME} *--> *{SRT_TIME}\s+\[([^]]+)\]\s*(.*)', re.S)
# under these labels of turn-104h nobody says a word, or it is the voice of the other
NO_SPEECH = {'Awkward Silence', 'Channel Bleed', 'Laughter', 'Non-Speech Noise', 'Speech, Non-Linguistic'}


def list_items(folder, labels):
    """id -> (what reads it, what that takes beside the sample rate)"""
    sessions, talks = {}, {}
    for key, places in list_samples(folder, ('.flac', '.json', '.wav', '.srt')).items():
        parent, name = os.path.split(key)
        if {'.flac', '.json'} <= places.keys():
            sessions[name] = places
        talks.setdefault(parent, {}).update((name + suffix, place) for suffix, place in places.items())
    talks = {id: files for id, files in talks.items() if 'speaker_1_audio.wav' in files}
    if sessions and not labels:
        raise ValueError(f'{folder} has recordings without transcripts: --labels=seglst.json has them')
    if not sessions and not talks:
        raise ValueError(f'{folder} holds neither sessions (.flac with .json) nor speaker_1_audio.wav')
    rows = {}
    with expected_form(labels):
        for row in read_json(Place(labels, labels)) if labels else ():
            rows.setdefault(row['session_id'], []).append(row)
    return {id: (read_session, (places, rows.get(id, ()))) for id, places in sessions.items()} | {
        id: (read_talk, (files,)) for id, files in talks.items()}


def read_session(places, rows, sample_rate):
    sides = [], []
    with expected_form(f'{places[".json"].name}, or its part of --labels,'):
        channels = {row['speaker_id']: row['channel'] for row in read_json(places['.json'])['speakers']}
        for row in rows:
            # the times of words count from the beginning of the session
            words = [said(*word) for word in row.get('word_alignment') or ()]
            side = sides[channels[row['speaker']]]
            side.append(said(row['words'], row['start_time'], row['end_time'], words))
    return read_audio(places['.flac'], 2, sample_rate), sides


def read_talk(files, sample_rate):
    with expected_form('its folder'):
        wavs = [files[f'speaker_{n}_audio.wav'] for n in (1, 2)]
        sides = [read_srt(files[f'speaker_{n}_annotation_a.srt']) for n in (1, 2)]
    waves = [read_audio(wav, 1, sample_rate)[0] for wav in wavs]
    return side_by_side(waves, [wav.name for wav in wavs], sample_rate), sides


def read_srt(place):
    """-> [said()]"""
    pieces = []
    for entry in re.split(r'\n\s*\n', place.read().decode('utf-8-sig').replace('\r', '').strip()):
        found = SRT_ENTRY.fullmatch(entry.strip())
        if not found:
            raise ValueError(f'{place.name} has an entry without number, times or [label]: {entry!r:.80}')
        *times, label, text = found.groups()
        start_sec, end_sec = (int(hours) * 3600 + int(minutes) * 60 + int(sec) + int(ms) / 1000
                              for hours, minutes, sec, ms in (times[:4], times[4:]))
        if label not in NO_SPEECH:
            pieces.append(said(text, start_sec, end_sec))
    return pieces


def read_recording(item, codec, args):
    read, what = item
    return dialogue(*read(*what, codec.sample_rate), args)


def main():
    parser = arguments(__doc__)
    parser.add_argument('folder', help='the corpus, or a part of it')
    parser.add_argument('--labels', help='seglst.json: what is said in the sessions of processed-141h')
    args = parser.parse_args()
    recipe = {key: getattr(args, key) for key in ('folder', 'labels', 'user_channel', 'gap_sec')}
    tokenise.run(list_items(args.folder, args.labels), partial(read_recording, args=args), args, recipe)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
