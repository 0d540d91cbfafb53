"""
Dialogues of any system, or of two people, become conversations (measures/turns.py), and conversations become
a folder for Full-Duplex-Bench. Files of one name, a.wav and a.jsonl, are one dialogue:

    a.wav       stereo, the user on channel user_channel; flac, ogg, mp3 likewise
    a.user.wav  and a.assistant.wav: a mono file of each in its place
    a.jsonl     turns: {"role": "user", "start_sec": 0.4, "end_sec": 1.9, "text": "Hello."}, as of sample.py,
                or words: {"role": "A", "start": 0.4, "end": 0.7, "word": "Hello"}
    a.tsv       words: role, start, end, word, with tabs between; .csv with commas, .txt with spaces
    a.json      a list of such objects, or moshi-finetune's {"alignments": [["Hello", [0.4, 0.7], "A"], …]},
                or SpokenWOZ's words, [{"speaker": "A", "word": "Hello", "start": 0.4, "end": 0.7}, …]
    sw2001A-ms98-a-word.text, sw2001B-ms98-a-word.text: Switchboard's word lists, for sw02001.wav

    b/input.wav and output.wav: a sample of Full-Duplex-Bench, in a folder of its own anywhere below, or that
                folder itself, with the user's words in transcription.json and the assistant's in output.json,
                if they are there, and the pauses that end no turn in pause.json; only where none of the other
                files lie in the folder itself

    words, or heard   ▓▓▓▓ ▓▓▓        ▓▓▓▓▓          ▓▓▓▓
    turns             └──────┘ gap_sec └───┘   gap   └──┘     a gap below gap_sec is a pause in a turn

Who speaks when is taken from a role's words. Where there are none, it is heard in the role's channel, and
counts inside its turns if there are turns. A role without any row in the transcript is heard, too:
moshi-finetune has few words of the user. A voice that leaks into the other channel is also heard there, so
channels have to be clean, or transcribed. Sounds are no words: [noise], [laughter], <breath>, {lipsmack},
and (coughs), if that is the whole text.
"""
import csv
import json
import math
import os
import re
from typing import NamedTuple

import numpy as np

from common.audio import read_audio, write_audio
from common.files import some, whole, write_json
from data.recordings import SWITCHBOARD_FILE, halves_of, plain_word, side_by_side, spoken, turns_of
from flatten import ROLES
from measures.turns import assess, stretches

AUDIO = '.wav', '.flac', '.ogg', '.mp3'
TRANSCRIPT = '.jsonl', '.json', '.tsv', '.csv', '.txt'
COLUMNS = ['role', 'start', 'end', 'word']
SOUND = re.compile(r'\[[^][]*\]|<[^<>]*>|\{[^{}]*\}|^\([^()]*\)$')
HUMAN = 'icc_gt_distribution.json'      # Full-Duplex-Bench's, of people's backchannels; no transcript
SAMPLE_RATE = 16000                     # what webrtcvad, Whisper and Full-Duplex-Bench listen to
WINDOW_HZ = 100                         # speech is looked for in windows of 10 ms
SHORTEST_SEC = 0.1                      # shorter gaps are closed, as in a "t", then shorter bursts dropped


def read_conversations(folder, rate_hz=25.0, user_channel=0, gap_sec=0.5, user_name='user',
                       assistant_name='assistant', vad='webrtc', aggressiveness=2):
    """
    -> an iterator over the conversations in a folder, by name. Nothing is guessed: ValueError where anything
    is in doubt.
        gap_sec                     a longer pause ends a turn, unless a sample's pause.json has it
        user_name, assistant_name   what the transcripts call them, as A and B
        vad                         webrtc or energy, see hear_voice and hear_energy
        aggressiveness              of webrtc, 0 to 3: how much a sound has to be like speech
    """
    if not os.path.isdir(folder):
        raise ValueError(f'no folder {folder}')
    is_known = vad in ('webrtc', 'energy') and aggressiveness in range(4) and user_channel in (0, 1)
    if not is_known or user_name == assistant_name:
        raise ValueError(f'vad is {vad!r} (webrtc or energy), aggressiveness {aggressiveness} (0 to 3), '
                         f'user_channel {user_channel} (0 or 1), '
                         f'user_name {user_name!r}, assistant_name {assistant_name!r} (two names)')
    if not 0 < rate_hz <= WINDOW_HZ or not gap_sec >= 0:
        raise ValueError(f'rate_hz is {rate_hz} (above 0, up to {WINDOW_HZ}), gap_sec {gap_sec} (from 0)')
    files = find_dialogues(folder)
    names = {user_name: 'user', assistant_name: 'assistant'}
    return (read_conversation(id, rate_hz, user_channel, gap_sec, names, vad, aggressiveness, **paths)
            for id, paths in sorted(files.items()))


def find_dialogues(folder):
    """{id: dict(audio, transcript)}: a path, or a list of two where each side has a file of its own, the
    user's first if the names say which that is. A sample's transcript is its folder. Raises ValueError for a
    folder without dialogues."""
    samples = list_samples(folder)
    if {'input.wav', 'output.wav'} <= set(os.listdir(folder)):      # it is a sample itself
        return samples
    files = list_dialogues(folder, leave_out=('samples.json', HUMAN) if samples else ()) or samples
    if not files:
        raise ValueError(f'{folder} has no dialogue: no audio ({" ".join(AUDIO)}) and no transcript '
                         f'({" ".join(TRANSCRIPT)})')
    return files


def list_dialogues(folder, leave_out):
    """The same of the files that lie in the folder itself"""
    names = [name for name in sorted(os.listdir(folder)) if name not in leave_out]
    heard = {stem for stem, suffix in map(os.path.splitext, names) if suffix.lower() in AUDIO}
    found, files = {}, {}
    for name in names:
        id, kind, side = place_of(name, heard)
        if kind:
            found.setdefault((id, kind), []).append((side, name))
    for (id, kind), parts in found.items():
        sides = [side for side, _ in parts]
        if len(set(sides)) < len(sides) or '' in sides and len(sides) > 1:
            names = ' and '.join(name for _, name in parts)
            raise ValueError(f'{folder} has more than one {kind} for {id}: {names}; keep one')
        paths = [os.path.join(folder, name) for _, name in sorted(parts, reverse=True)]
        files.setdefault(id, {})[kind] = paths[0] if sides == [''] else paths
    return files


def place_of(name, heard):
    """-> (id of its dialogue, kind: audio, transcript or None, side: '' if both are in it). heard: the names
    of all audio, without .wav"""
    stem, suffix = os.path.splitext(name)
    id, _, side = stem.rpartition('.')
    word_list = SWITCHBOARD_FILE.fullmatch(name)
    if word_list:       # audio of sw2001A-ms98-a-word.text is sw02001.wav, as published, or sw2001.wav
        number, side = word_list.groups()
        return f'sw0{number}' if f'sw0{number}' in heard else f'sw{number}', 'transcript', side
    if suffix.lower() in AUDIO:
        is_half = side in ROLES and all(f'{id}.{role}' in heard for role in ROLES)
        return (id, 'audio', side) if is_half else (stem, 'audio', '')
    return stem, 'transcript' if suffix.lower() in TRANSCRIPT else None, ''


def list_samples(folder):
    """The same of Full-Duplex-Bench's folders, anywhere below: the id is the path, smooth_turn_taking/1."""
    files = {}
    for at, _, names in os.walk(folder):
        if {'input.wav', 'output.wav'} <= set(names):
            audio = [os.path.join(at, name) for name in ('input.wav', 'output.wav')]
            id = os.path.relpath(at, folder)
            id = os.path.basename(os.path.abspath(at)) if id == '.' else id
            files[id] = dict(audio=audio, transcript=at)
    return files


def read_conversation(id, rate_hz, user_channel, gap_sec, names, vad, aggressiveness, audio=None,
                      transcript=None):
    wave = read_channels(audio, user_channel) if audio else None
    n_sec = len(wave) / SAMPLE_RATE if audio else None
    turns = read_transcript(transcript, names, gap_sec, n_sec) if transcript else []
    if not audio and not turns:
        raise ValueError(f'{transcript} has no rows, and there is no audio of its name beside it')
    if audio:
        n_frame = math.ceil(rate_hz * n_sec - 1e-6)
    else:
        n_frame = max(1, *(round(rate_hz * turn['end_sec']) for turn in turns))
    for span in [*turns, *(word for turn in turns for word in turn.get('words', ()))]:
        start, end = (round(rate_hz * span.pop(key)) for key in ('start_sec', 'end_sec'))
        span['start'] = min(start, n_frame - 1)
        span['end'] = min(max(end, span['start'] + 1), n_frame)
    speaks = {role: np.zeros(n_frame, bool) for role in ROLES}
    for channel, role in enumerate(ROLES):
        own = [turn for turn in turns if turn['role'] == role]
        for span in [word for turn in own for word in turn.get('words', [turn])]:
            speaks[role][span['start']:span['end']] = True
        if audio and not any('words' in turn for turn in own):
            heard = hear(wave[:, channel], rate_hz, n_frame, vad, aggressiveness)
            speaks[role] = heard & speaks[role] if own else heard
            if not own:
                spans = stretches(heard, rate_hz, gap_sec)
                turns += [dict(role=role, start=start, end=end, text='') for start, end in spans]
    turns = sorted(turns, key=lambda turn: (turn['start'], turn['end']))
    if transcript and is_sample(transcript):
        pauses = read_note(transcript, 'pause.json')
        turns = join_over([(rate_hz * start, rate_hz * end) for start, end in pauses], turns)
    return dict(id=id, rate_hz=rate_hz, n_frame=n_frame, turns=turns, speaks=speaks, expected=None,
                wave=wave, sample_rate=SAMPLE_RATE if audio else 0, chunk_frames=0)


def join_over(pauses, turns):
    """The user's turns before and after a pause, (start, end), are one."""
    joined, last = [], None     # last: of the user's
    for turn in turns:
        is_user = turn['role'] == 'user'
        if is_user and last and any(start < turn['start'] and end > last['end'] for start, end in pauses):
            last.update(end=max(last['end'], turn['end']), text=f'{last["text"]} {turn["text"]}'.strip())
            if 'words' in last:
                last['words'] = last['words'] + turn['words']
            continue
        last = turn if is_user else last
        joined.append(turn)
    return joined


def read_channels(audio, user_channel):
    """The path of a stereo file, or those of two mono files -> float32 [n_sample, 2] at SAMPLE_RATE, the user
    first"""
    import soundfile
    paths = [audio] if isinstance(audio, str) else audio
    waves = [read_audio(path, SAMPLE_RATE, 0) for path in paths]
    for path in paths:
        n_channel = soundfile.info(path).channels
        if len(paths) == 2 and n_channel != 1:
            raise ValueError(f'{path} has {n_channel} channels, the file of one side has one')
        if len(paths) == 1 and n_channel != 2:
            halves = ' and '.join(map(os.path.basename, halves_of(path)))
            raise ValueError(f'{path} has {n_channel} channel{"s" * (n_channel > 1)}, a dialogue has two: '
                             'the user on one, the assistant on the other; two files of one channel are '
                             f'to be called {halves}')
    if len(paths) == 2:
        return side_by_side(waves, paths, SAMPLE_RATE).T
    waves.append(read_audio(audio, SAMPLE_RATE, 1))
    return np.stack([waves[user_channel], waves[1 - user_channel]], axis=1)


def rows_of(path):
    """Yields ('a.tsv, row 3', the object there, or None for anything else)."""
    name, suffix = os.path.basename(path), os.path.splitext(path)[1].lower()
    columns = COLUMNS
    split = {'.jsonl': json.loads, '.tsv': lambda line: line.split('\t'),
             '.csv': lambda line: next(csv.reader([line])), '.txt': lambda line: line.split(None, 3),
             '.text': lambda line: line.split(None, 3)}
    try:
        with open(path, encoding='utf-8-sig') as file:
            rows = json.load(file) if suffix == '.json' else [line.rstrip('\r\n') for line in file]
        if isinstance(rows, dict) and isinstance(rows.get('alignments'), list):
            rows = [dict(role=row[2], start=row[1][0], end=row[1][1], word=row[0])
                    for row in rows['alignments']]
        if not isinstance(rows, list):
            raise TypeError('not a list')
        for n, row in enumerate(rows, 1):
            if suffix != '.json':
                if not row.strip():
                    continue
                row = split[suffix](row)
            if isinstance(row, list):
                if n == 1 and row[0] in COLUMNS:        # a line with the names of the columns
                    columns = row
                    continue
                row = dict(zip(columns, row)) if len(row) == len(columns) else None
            yield f'{name}, row {n}', plain_word(row) if isinstance(row, dict) else None
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f'{path} is no transcript ({error}); other files have to lie elsewhere') from None


def is_sample(transcript):
    """Is it a folder of Full-Duplex-Bench"""
    return isinstance(transcript, str) and os.path.isdir(transcript)


def rows_of_sample(folder):
    """The same of a folder of Full-Duplex-Bench. After an interruption output.json has only the words that
    follow it: none are taken then, so that the assistant is heard."""
    files = dict(user='transcription.json', assistant='output.json')
    if os.path.exists(os.path.join(folder, 'interrupt.json')):
        del files['assistant']
    for role, name in files.items():
        path = os.path.join(folder, name)
        for n, (text, start, end) in enumerate(timed_words(path) or (), 1):
            yield f'{path}, word {n}', dict(role=role, start=start, end=end, word=text)


def timed_words(path):
    """-> [(text, start_sec, end_sec)] of a list of words of Full-Duplex-Bench, None where there is no such
    file. A word without a start is left out; one without an end, which their recogniser makes, ends at
    once."""
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        chunks = content['chunks'] if isinstance(content, dict) else content
        chunks = [chunk for each in chunks for chunk in each.get('item', [each])]     # by speaker
        words = [(chunk['text'].strip(), *chunk['timestamp']) for chunk in chunks]
        return [(text, start, start if end is None else end) for text, start, end in words
                if start is not None]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path} is no list of words, [{{text, timestamp: [start, end]}}], '
                         f'nor has it one as chunks ({error})') from None


def read_note(folder, name):
    """-> [(start_sec, end_sec)], what a sample's file of notes, [{timestamp: [start, end]}] or
    {timestamps: [start, end]}, is about; [] without that file"""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        notes = content if isinstance(content, list) else [dict(timestamp=content['timestamps'])]
        spans = [tuple(map(float, note['timestamp'])) for note in notes]
        if not spans or not all(0 <= start <= end < math.inf for start, end in spans):
            raise ValueError(f'times are {spans}')
        return spans
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f'{path} does not say from when to when, in seconds ({error})') from None


def read_transcript(path, names, gap_sec, n_sec):
    """-> [turns], times in seconds. names: {what a role is called there: the role}. n_sec: of the audio, None
    where there is none."""
    turns, words = [], {role: [] for role in ROLES}
    paths = [path] if isinstance(path, str) else path
    of_sample = is_sample(path)
    rows = [row for each in paths for row in (rows_of_sample(each) if of_sample else rows_of(each))]
    names = dict(zip(ROLES, ROLES)) if of_sample else names
    for where, row in rows:
        is_row = row is not None and 'role' in row and ('word' in row) != ('text' in row)
        if not is_row or not isinstance(row.get('word', row.get('text')), str):
            raise ValueError(f'{where}, is neither a word (role, start, end, word) '
                             'nor a turn (role, start_sec, end_sec, text)')
        if str(row['role']) not in names:
            roles = some(sorted({str(row['role']) for _, row in rows if row and 'role' in row}))
            user, assistant = names
            raise ValueError(f'{where}, is of role {row["role"]}; the file has the roles {roles}, '
                             f'and the user is called {user}, the assistant {assistant}: '
                             'user_name and assistant_name say who is who')
        try:
            at = {f'{key}_sec': float(row.get(f'{key}_sec', row.get(key))) for key in ('start', 'end')}
        except (TypeError, ValueError):
            raise ValueError(f'{where}, has no start and end in seconds')
        if not 0 <= at['start_sec'] <= at['end_sec'] < math.inf:
            raise ValueError(f'{where}, is from {at["start_sec"]} s to {at["end_sec"]} s: '
                             'times count from 0, and an end is not before its start')
        # 0.1: transcripts round; a sample may end in the middle of a word
        if not of_sample and n_sec is not None and at['end_sec'] > n_sec + 0.1:
            raise ValueError(f'{where}, ends at {at["end_sec"]} s, the audio beside it at {n_sec:.2f} s; '
                             'is it cut off, or the audio of another?')
        said = row.get('word', row.get('text'))
        text = ' '.join(SOUND.sub(' ', spoken(said)).split())
        if said and not text:
            continue    # a sound, no speech
        role, said = names[str(row['role'])], dict(at, text=text)
        turns.append(dict(said, role=role)) if 'text' in row else words[role].append(said)
    if turns and any(words.values()):
        raise ValueError(f'{paths[0]} has words and turns in one file; keep the words: '
                         'turns follow from them')
    words = {role: sorted(said, key=lambda word: word['start_sec']) for role, said in words.items()}
    return turns or turns_of(words, gap_sec)


# ------------------------------------------------------------------------------------------------------------
# speech and silence

def hear(wave, rate_hz, n_frame, vad='webrtc', aggressiveness=2):
    """float32 [n_sample] at SAMPLE_RATE -> bool [n_frame]. A frame is speech if half of its windows are."""
    hop = SAMPLE_RATE // WINDOW_HZ
    windows = wave[:len(wave) // hop * hop].reshape(-1, hop)
    heard = hear_voice(windows, aggressiveness) if vad == 'webrtc' else hear_energy(windows)
    kept = np.zeros(len(heard), bool)
    for start, end in stretches(heard, WINDOW_HZ, SHORTEST_SEC):
        kept[start:end] = end - start >= SHORTEST_SEC * WINDOW_HZ
    frame = ((np.arange(len(heard)) + 0.5) * rate_hz / WINDOW_HZ).astype(int)
    return 2 * np.bincount(frame, kept, n_frame) >= np.bincount(frame, minlength=n_frame).clip(1)


def hear_voice(windows, aggressiveness):
    """Speech is what webrtcvad hears both in the wave and in the wave reversed. Its two errors are one-sided:
    it takes 60 to 140 ms after speech for speech, and sometimes the beginning of a file."""
    try:
        import webrtcvad
    except ImportError:
        raise ValueError('to hear who speaks: pip install webrtcvad-wheels, '
                         'or choose vad=energy, which needs nothing')
    pcm = (windows.clip(-1, 1) * 32767).astype('<i2')

    def run(pcm):
        detector = webrtcvad.Vad(aggressiveness)
        return np.array([detector.is_speech(window.tobytes(), SAMPLE_RATE) for window in pcm], bool)
    return run(pcm) & run(pcm[::-1, ::-1])[::-1]


def hear_energy(windows):
    """Speech is 10 dB above the channel's noise, at most 30 dB below its loudest second, and above -60 dB of
    full scale. The noise is the level below which 10 % of the windows are. The loudest second is the 100
    loudest windows, wherever they are; its level is their median."""
    if not len(windows):
        return np.zeros(0, bool)
    level_db = 10 * np.log10(np.square(windows).mean(1) + 1e-12)
    noise_db = np.percentile(level_db, 10)
    loudest_db = np.median(np.sort(level_db)[-WINDOW_HZ:])
    return level_db > max(noise_db + 10, loudest_db - 30, -60)


# ------------------------------------------------------------------------------------------------------------

# of v1.5, where speech overlaps the assistant's: the folder, and what metadata.json calls what is said
OVERLAPS = dict(interruption=('v1.5/user_interruption', 'current_turn_text'),
                backchannel=('v1.5/user_backchannel', 'backchannel_text'))


class Sample(NamedTuple):
    """A part of a conversation, from start to end (frames), for one of the benchmark's tasks."""
    task: str           # the folder
    start: int
    end: int
    note_name: str      # the file that says what it is about
    note: list | dict   # what stands in it; timestamps in frames
    since: int          # the assistant's words count from this frame on


def samples_of(conversation):
    """Yields the Samples of a conversation: up to two for each of the user's turns, one for a backchannel."""
    outcomes = assess(conversation)
    turns = [turn for turn in outcomes if turn['kind'] != 'backchannel']
    for turn in outcomes:
        start, end, kind = turn['start'], turn['end'], turn['kind']
        before = next((other for other in reversed(turns) if other['start'] < start), None)
        until = next((other['start'] for other in turns if other['start'] > start), conversation['n_frame'])
        first, context = (before['start'], before['text']) if before else (0, '')
        if kind == 'interruption':
            note = dict(context=context, interrupt=turn['text'], timestamp=(start, end))
            yield Sample('user_interruption', first, until, 'interrupt.json', [note], end)
        if kind in OVERLAPS:
            task, text = OVERLAPS[kind]
            note = {'context_text': context, text: turn['text'], 'timestamps': (start, end)}
            yield Sample(task, first, until, 'metadata.json', note, first)
            continue
        if turn['expects']:
            note = dict(text='[TURN-TAKING]', timestamp=(end, end))
            yield Sample('smooth_turn_taking', start, until, 'turn_taking.json', [note], start)
        if turn['pauses']:
            notes = [dict(text='[PAUSE]', timestamp=(a, b)) for a, b, _ in turn['pauses']]
            yield Sample('pause_handling', start, end, 'pause.json', notes, start)


def export_full_duplex_bench(conversations, folder):
    """
    Writes a new folder for the scripts of Full-Duplex-Bench, with a sample for each turn of the user ->
    {task: samples}.

        smooth_turn_taking/1/   from the user's turn to the next one
            turn_taking.json    [{text, timestamp}]: the end of the turn
        pause_handling/1/       a turn with pauses
            pause.json          [{text, timestamp}]: from and to, of each pause
        user_interruption/1/    from the turn before to the turn after
            interrupt.json      [{context, interrupt, timestamp}]: the turn before, this one, from and to
        v1.5/user_interruption/1/, v1.5/user_backchannel/1/     likewise
            metadata.json       {context_text, current_turn_text or backchannel_text, timestamps}
        …/input.wav, output.wav     user and assistant, 16 kHz, where there is audio
        …/output.json               {text, chunks: [{text, timestamp}]}: the assistant's words; after an
                                    interruption only those
        …/transcription.json        [{text, timestamp}]: the user's words, where their times are known
        samples.json                which part of which conversation each sample is

    output.json is written only if all of the assistant's words have times; else their get_transcript/asr.py
    makes it from output.wav. (If only some had it, their scripts would skip the others and count the silent
    ones alone.) The texts that their judges read are empty where turns were only heard, and v1.5's also wants
    each dialogue without the overlap. Left out: the assistant's backchannels, as people's, beside which they
    are measured, are of their own recordings.
    """
    conversations, counts, rows = list(conversations), {}, []
    if os.path.exists(folder):
        raise ValueError(f'{folder} is there already, its old samples would be counted with the new: '
                         'remove it, or give another')
    turns = [turn for talk in conversations for turn in talk['turns'] if turn['role'] == 'assistant']
    has_words = all('words' in turn for turn in turns)
    with whole(folder) as part:
        for talk in conversations:
            if talk['wave'] is None and not has_words:
                raise ValueError(f'{talk["id"]} has no audio, and not all words of the assistants '
                                 'have times: their scripts need either')
            for sample in samples_of(talk):
                counts[sample.task] = counts.get(sample.task, 0) + 1
                name = f'{sample.task}/{counts[sample.task]}'
                rows.append(dict(sample=name, id=talk['id'], start_sec=sample.start / talk['rate_hz'],
                                 end_sec=sample.end / talk['rate_hz']))
                write_sample(os.path.join(part, name), sample, talk, has_words)
        if not rows:
            raise ValueError("there is no user's turn in any conversation that could be exported")
        write_json(os.path.join(part, 'samples.json'), rows)
    return counts


def write_sample(folder, sample, talk, has_words):
    """has_words: are the times of all the assistants' words known"""
    os.makedirs(folder)
    rate_hz = talk['rate_hz']

    def seconds(frames):
        return [round((frame - sample.start) / rate_hz, 3) for frame in frames]

    def in_seconds(rows):
        if isinstance(rows, dict):
            return dict(rows, timestamps=seconds(rows['timestamps']))
        return [dict(row, timestamp=seconds(row['timestamp'])) for row in rows]

    words = {}
    for role, first in zip(ROLES, (sample.start, sample.since)):
        said = [word for turn in talk['turns'] if turn['role'] == role for word in turn.get('words', ())]
        said = [word for word in said if first <= word['start'] < sample.end]
        chunks = [dict(text=word['text'], timestamp=(word['start'], word['end'])) for word in said]
        words[role] = in_seconds(chunks)
    write_json(os.path.join(folder, sample.note_name), in_seconds(sample.note))
    if words['user']:
        write_json(os.path.join(folder, 'transcription.json'), words['user'])
    if has_words:
        text = ' '.join(word['text'] for word in words['assistant'])
        write_json(os.path.join(folder, 'output.json'), dict(text=text, chunks=words['assistant']))
    if talk['wave'] is not None:
        import soxr
        first, last = (round(frame / rate_hz * talk['sample_rate']) for frame in (sample.start, sample.end))
        channels = soxr.resample(talk['wave'][first:last], talk['sample_rate'], SAMPLE_RATE).T
        for name, wave in zip(('input.wav', 'output.wav'), channels):
            write_audio(os.path.join(folder, name), wave, SAMPLE_RATE)
