"""
Lhotse cuts become dialogues, or one-sided utterances. Each supervision is a turn.
What a cut becomes depends on it:

    a cut                                               user              assistant      roles of turns by
    with target_audio (NeMo speechlm2's duplex cuts)    recording         target_audio   supervision.speaker
    of two channels, as telephone corpora have          --user_channel    the other      supervision.channel
    of one channel                                      one-sided: --role says whose it is; several
                                                        speakers become one, which is noted at the end

    cuts.jsonl.gz (or .json)                                    a cut a line
    recordings.jsonl.gz --supervisions=supervisions.jsonl.gz
    folder/cuts.000000.jsonl.gz recording.000000.tar …          Lhotse Shar: give the folder

Cuts may be as Lhotse writes them, before 0.8 as "Cut", or as NeMo's documentation prints them: "path" for
"sources", no "type".

    python data/lhotse/prepare.py duplex/cuts.jsonl.gz --codec=codecs/s3 --out=data/duplex
    python data/lhotse/prepare.py fisher_shar --user_channel=0 --codec=codecs/s3 --out=data/fisher

Lhotse parses the manifests: pip install 'lhotse>=1.30,!=1.33.0'. The audio is read here, for two reasons.
Lhotse resamples with torchaudio where it is installed and with scipy elsewhere, to other samples. And it
would run a source of type "command" in a shell; here only files are read, no commands and no URLs.
"""
import functools
import glob
import gzip
import io
import json
import math
import os
import re
import zlib
from pathlib import Path

from data import tokenise
from data.recordings import by_id, find_audio, read_all, read_bytes, read_piece, read_rows
from data.sides import tar_index
from data.words import clean_words, is_word

AUDIO = ('recording', 'target_audio')       # what a cut's audio is called in Shar


def import_lhotse():
    try:
        import lhotse
    except ModuleNotFoundError as error:    # lhotse itself, or what 1.33.0 forgets to require
        raise ValueError(f"there is no {error.name} here: pip install 'lhotse>=1.30,!=1.33.0'")
    return lhotse


# ------------------------------------------------------------------------------------------------------------
# the cuts, without their audio

def list_items(path, supervisions=None):
    """id -> (where, cut as JSON, the Shar tars that hold its audio). As JSON a cut takes the least memory,
    and there may be a million."""
    if supervisions:
        return by_id(list_pair(path, supervisions))
    if not os.path.isdir(path):
        return by_id(list_cuts(path))
    shards = sorted(glob.glob(os.path.join(glob.escape(path), 'cuts.*.jsonl*')))
    if not shards:
        raise ValueError(f'{path} is no Shar folder: it holds no cuts.000000.jsonl.gz')
    return by_id(pair for shard in shards for pair in list_shard(path, shard))


def list_cuts(path):
    read = read_json if path.endswith(('.json', '.json.gz')) else read_rows
    for where, cut, _ in read(path):
        yield str((cut or {}).get('id', where)), (where, json.dumps(cut), {})


def read_json(path):
    """The same as read_rows, for a file that holds one JSON list."""
    try:
        with gzip.open(path) if path.endswith('.gz') else open(path, 'rb') as file:
            cuts = json.loads(read_all(file, path))
    except FileNotFoundError:
        raise ValueError(f'no file {path}') from None
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise ValueError(f'{path} is no JSON file ({error})')
    if not isinstance(cuts, list):
        raise ValueError(f'{path} is no list of cuts')
    for n, cut in enumerate(cuts, 1):
        yield f'{os.path.basename(path)}, cut {n}', cut if isinstance(cut, dict) else None, None


def list_pair(recordings, supervisions):
    lhotse = import_lhotse()
    for path in (recordings, supervisions):     # Lhotse would run "pipe:…" in a shell, and open URLs
        if not os.path.isfile(path):
            raise ValueError(f'no file {path}')
    try:
        cuts = lhotse.CutSet.from_manifests(
            recordings=lhotse.RecordingSet.from_file(recordings),
            supervisions=lhotse.SupervisionSet.from_file(supervisions))
        for cut in cuts:
            yield cut.recording.id, (f'recording {cut.recording.id}', json.dumps(cut.to_dict()), {})
    except (OSError, EOFError, zlib.error, RecursionError, ArithmeticError, ValueError, KeyError, TypeError,
            AttributeError, AssertionError) as error:
        raise ValueError(f'{recordings} and {supervisions} are no recordings and supervisions of Lhotse '
                         f'({type(error).__name__}: {error})')


def list_shard(folder, cuts):
    """The cuts of a shard. A recording is in a tar; if only its manifest was stored, that is in JSON rows."""
    number = os.path.basename(cuts).split('.')[1]
    tars, stored = {}, {}       # field -> path of its tar; field -> {cut id: its manifest}
    for field in AUDIO:
        path = os.path.join(folder, f'{field}.{number}.tar')
        if os.path.isfile(path):
            tars[field] = path
        paths = glob.glob(os.path.join(glob.escape(folder), f'{field}.{number}.jsonl*'))
        if paths:
            stored[field] = {row['cut_id']: row.get(field) for _, row, _ in read_rows(paths[0]) if row}
    for where, cut, _ in read_rows(cuts):
        cut_id = str((cut or {}).get('id', where))
        for field in tars.keys() | stored.keys():
            if cut is not None:
                holder = cut if field == 'recording' else cut.setdefault('custom', {})
                holder.pop(field, None)     # a placeholder
                if stored.get(field, {}).get(cut_id):
                    holder[field] = stored[field][cut_id]
        yield cut_id, (where, json.dumps(cut), tars)


# ------------------------------------------------------------------------------------------------------------
# one cut

def read_recording(item, codec, args):
    where, cut, tars = item
    cut = json.loads(cut)
    if cut is None:
        raise ValueError(f'{where}, is no JSON object')
    beside = args.manifest if tars else os.path.dirname(os.path.abspath(args.manifest))
    cut, turns = parse(cut, where, args.audio_dir or beside)
    recordings = {}
    for field in AUDIO:
        if field in tars:
            recording = from_tar(tars[field], str(cut.id), where)
        else:
            recording = cut.recording if field == 'recording' else (cut.custom or {}).get(field)
        if recording is not None:
            recordings[field] = recording
    if 'recording' not in recordings:
        raise ValueError(f'{where}, has no recording, and so no audio: "lhotse cut simple -r RECORDINGS -s '
                         'SUPERVISIONS CUTS" makes cuts that have one, or give the recordings themselves, '
                         'with --supervisions=FILE')

    channels = [cut.channel] if isinstance(cut.channel, int) else list(cut.channel)
    heard = load(recordings['recording'], channels, cut, codec.sample_rate, where)
    waves, by_channel = {}, {}
    if 'target_audio' in recordings:
        target = recordings['target_audio']
        answers = load(target, target.channel_ids, cut, codec.sample_rate, where)
        waves = dict(user=heard[0], assistant=answers[0])
        if len(heard) + target.num_channels > 2:
            raise ValueError(f'{where}, has {len(heard)} channels and {target.num_channels} more in '
                             'target_audio; each is to be one speaker')
    elif len(channels) == 2 and args.user_channel in channels:
        by_channel = {channel: 'user' if channel == args.user_channel else 'assistant'
                      for channel in channels}
        waves = dict(zip(by_channel.values(), heard))
    elif len(channels) > 1 or args.user_channel is not None:
        raise ValueError(f'{where}, has the channels {channels}: '
                         "--user_channel says which of two is the user's, and is for two only")
    else:
        waves[args.role] = heard[0]
    for turn, supervision in zip(turns, cut.supervisions):
        turn['role'] = role_of(supervision, waves, by_channel, args, where)
    remark = remark_on(turns, cut.supervisions, args)
    if any(aligned(supervision) and not turn['words'] for turn, supervision in zip(turns, cut.supervisions)):
        remark = remark or 'words are outside of their supervision, and left out'
    if len(waves) < 2:      # from one side alone nothing is learned without its text
        turns = [turn for turn in turns if turn['text']]
    if not turns:
        raise ValueError(f'{where}, has no supervision{"" if len(waves) == 2 else " with a text"}')
    return tokenise.Recording(waves.get('user'), waves.get('assistant'), turns, remark)


def parse(cut, where, audio_dir):
    """JSON -> a Cut of Lhotse whose sources are files that exist, and its turns, still without roles."""
    import_lhotse()
    from lhotse.serialization import deserialize_item
    if 'sources' in cut:
        raise ValueError(f'{where}, is a recording, no cut: what is said in it, --supervisions=FILE says')
    custom = cut.get('custom') or {}
    keys = ('id', 'start', 'duration', 'channel', 'recording', 'supervisions')
    kept = {key: cut[key] for key in keys if cut.get(key) is not None}
    kept['custom'] = {key: custom[key] for key in ('target_audio',) if key in custom}
    kept['type'] = cut.get('type', 'MonoCut')
    if kept['type'] == 'Cut':       # what a MonoCut was called before Lhotse 0.8
        kept['type'] = 'MonoCut'
    if kept['type'] not in ('MonoCut', 'MultiCut'):
        raise ValueError(f'{where}, is a {kept["type"]}, whose audio is only made when it is read: '
                         'write it out with CutSet.save_audios first')
    try:
        for recording in [kept.get('recording'), *kept['custom'].values()]:
            if recording is not None:
                if 'path' in recording:     # NeMo's documentation
                    recording['sources'] = [dict(type='file', channels=[0], source=recording.pop('path'))]
                check_numbers(recording['duration'])
                check_sources(recording, where, audio_dir)
        kept.setdefault('channel', 0)
        for supervision in kept.get('supervisions', ()):
            supervision.setdefault('recording_id', kept['id'])
            supervision.pop('custom', None)
        cut = deserialize_item(kept)
        channels = cut.channel if isinstance(cut.channel, list) else [cut.channel]
        check_numbers(cut.start, cut.duration, *channels)
        return cut, [turn_of(supervision, cut.start) for supervision in cut.supervisions]
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f'{where}, is no cut of Lhotse ({type(error).__name__}: {error})')


def check_numbers(*values):
    if not all(map(math.isfinite, values)):
        raise TypeError(f'the numbers {values} are not all finite')


def check_sources(recording, where, audio_dir):
    """Makes sure that only files are read. A source of type "command" has a line for the shell, which Lhotse
    would run; it is refused before Lhotse sees it."""
    if recording.get('transforms'):
        raise ValueError(f'{where}, has a recording to be changed when it is read '
                         f'({recording["transforms"]}): write it out with CutSet.save_audios first')
    for source in recording['sources']:
        if source['type'] == 'shar':
            raise ValueError(f'{where}, has its audio in the tars of a Shar folder: give that folder')
        if source['type'] != 'file':
            raise ValueError(f'{where}, has audio of type {source["type"]!r} ({source["source"]!r:.80}): '
                             'only files are read, no commands are run and nothing is downloaded')
        source['source'] = find_audio(source['source'], audio_dir)


def from_tar(path, cut_id, where):
    """A Recording of Lhotse, its audio in memory."""
    from lhotse.serialization import deserialize_item
    from lhotse.shar.utils import fill_shar_placeholder
    entry = tar_index(path).get(cut_id, {})
    if len(entry) != 2 or '.json' not in entry:
        there = ' and '.join(entry) or 'nothing'
        raise ValueError(f'{where}: {os.path.basename(path)} has {there} for cut {cut_id}: '
                         'its audio was left out (.nodata), or the tar is cut off')
    extension, = entry.keys() - {'.json'}
    with open(path, 'rb') as file:
        audio, manifest = (read_bytes(file, path, cut_id + suffix, *entry[suffix])
                           for suffix in (extension, '.json'))
    try:
        recording = deserialize_item(json.loads(manifest))
        check_numbers(recording.duration)
        fill_shar_placeholder(recording, data=audio, tarpath=Path(cut_id + extension))
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise ValueError(f'{where}: {os.path.basename(path)} has no recording of Lhotse in {cut_id}.json '
                         f'({type(error).__name__}: {error})')
    return recording


def load(recording, channels, cut, sample_rate, where):
    """-> the waves of these channels of a recording, in the cut's part of it."""
    # target_audio may be shorter than the cut; --max_mismatch_sec says by how much
    end_sec = min(cut.start + cut.duration, recording.duration)
    waves = {}
    for source in recording.sources:
        file, name = source.source, source.source
        if source.type == 'memory':
            file, name = io.BytesIO(source.source), where
        found = read_piece(file, name, sample_rate, cut.start, end_sec, recording.duration)
        if len(found) != len(source.channels):
            owner = source.source if source.type == 'file' else 'its audio'
            raise ValueError(f'{where}: {owner} has {len(found)} channels, not {source.channels}')
        waves |= dict(zip(source.channels, found))
    if not set(channels) <= waves.keys():
        raise ValueError(f'{where}, wants channels {channels} of a recording that has {sorted(waves)}')
    return [waves[channel] for channel in channels]


def roles_by_name(args):
    return dict.fromkeys(args.user_speakers, 'user') | dict.fromkeys(args.assistant_speakers, 'assistant')


def remark_on(turns, supervisions, args):
    """Are several people one role? Those whom a setting calls by that role are one."""
    roles, people = roles_by_name(args), {}
    for turn, supervision in zip(turns, supervisions):
        if supervision.speaker is not None:
            name = roles.get(supervision.speaker, supervision.speaker)
            people.setdefault(turn['role'], set()).add(name)
    return ' and '.join(tokenise.SEVERAL.format(role) for role, names in people.items() if len(names) > 1)


def role_of(supervision, waves, by_channel, args, where):
    by_speaker = roles_by_name(args).get(supervision.speaker)
    if len(waves) == 1:
        role, = waves
        if by_speaker not in (None, role):
            raise ValueError(f'{where}, has a turn of {supervision.speaker!r}, who is not in its audio: '
                             'there is no target_audio')
        return role
    channels = supervision.channel
    channels = [channels] if isinstance(channels, int) else list(channels or ())
    if len(channels) == 1 and channels[0] in by_channel:
        return by_channel[channels[0]]
    if by_speaker is None:
        speaker = f'of speaker {supervision.speaker!r}' if supervision.speaker else 'without a speaker'
        raise ValueError(f'{where}, has a turn {speaker}; --user_speakers and --assistant_speakers say who '
                         'that is')
    return by_speaker


def turn_of(supervision, cut_start_sec):
    check_numbers(supervision.start, supervision.duration,
                  *(number for word in aligned(supervision) for number in (word.start, word.duration)))
    text = re.sub(r'<\|\d+\|>', '', supervision.text or '')     # <|3|>: time stamps of NeMo's
    text = ' '.join(text.split())
    return dict(start_sec=supervision.start, end_sec=supervision.end, text=text,
                words=clean_words(words_of(supervision, cut_start_sec), text)[0])


def aligned(supervision):
    return [word for word in (supervision.alignment or {}).get('word', ()) if is_word(str(word.symbol))]


def words_of(supervision, cut_start_sec):
    """-> [(word, start_sec, end_sec)] in the cut. Lhotse has their times in the recording; until its pull
    request 1193 they moved with the cut, as a supervision does. Shar and save_audios forget where in its
    recording a cut was, and then no time is known: words that are outside of their supervision are left out,
    all of them."""
    for offset_sec in (cut_start_sec, 0.0):
        words = [(str(word.symbol), word.start - offset_sec, word.end - offset_sec)
                 for word in aligned(supervision)]
        # 0.1: aligners and manifests round
        if all(supervision.start - 0.1 <= start and end <= supervision.end + 0.1 for _, start, end in words):
            return words
    return []


def main():
    def names(text):
        return text.split(',')

    parser = tokenise.arguments(__doc__)
    parser.add_argument('manifest', help='cuts, recordings, or a Shar folder')
    parser.add_argument('--supervisions', help='where the manifest is of recordings')
    parser.add_argument('--audio_dir',
                        help='where its paths start, or any part of them (the folder of the manifest)')
    parser.add_argument('--user_speakers', type=names, default='user,User', help='(user,User)')
    parser.add_argument('--assistant_speakers', type=names, default='agent,Agent,assistant,Assistant',
                        help='(agent,Agent,assistant,Assistant)')
    parser.add_argument('--user_channel', type=int,
                        help='of recordings with two channels; the assistant has the other')
    parser.add_argument('--role', choices=('user', 'assistant'), default='user',
                        help='who speaks where there is one channel (user)')
    args = parser.parse_args()
    import_lhotse()
    settings = ('manifest', 'supervisions', 'audio_dir', 'user_speakers', 'assistant_speakers',
                'user_channel', 'role')
    recipe = {key: getattr(args, key) for key in settings}
    items = list_items(args.manifest, args.supervisions)
    tokenise.run(items, functools.partial(read_recording, args=args), args, recipe)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
