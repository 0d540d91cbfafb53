"""
Recordings become a data folder. Every data/<corpus>/prepare.py lists its recordings and reads one; all else
is here:

    recordings ─ parts of 256 ─ a process claims one ─ read (threads) ─ encode (batches) ─► parts/000017.arrow
    all parts ─ split by a hash of the id ─► train.arrow val.arrow test.arrow, codec/, prepared.json

One process or a hundred write the same files. Each takes the next part that nobody holds:

    python data/manifest/prepare.py corpus.jsonl --codec=codecs/s3 --out=data/corpus
    torchrun --nproc_per_node=8 data/manifest/prepare.py corpus.jsonl --codec=codecs/s3 --out=data/corpus

A part is claimed by a lock. When a process dies the system frees its lock, and another process takes over the
part. (torchrun itself stops all processes when one dies; with --max_restarts=2 it starts them again.) A run
that was killed goes on with the missing parts when the same command is given again. A recording that cannot
be read is left out, and listed in skipped.jsonl with the reason. The same command tries those again, when all
else is done: what can be read by then is added, the rest stays as it is.
"""
import argparse
import fcntl
import hashlib
import json
import os
import shutil
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from codec import load_codec
from common.device import pick_device
from common.files import as_text, printable, read_json, read_jsonl, remove, whole, write_json, write_jsonl
from common.levels import codes_per_frame
from config import Parser
from data.dialogues import SCHEMA, Columns, metadata, open_table, save_table, to_table
from data.recordings import by_id
from flatten import ROLES, check

SEVERAL = 'several speakers of one channel became one {}'      # a remark
TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'vocab.json', 'merges.txt', 'config.json')


class Recording(NamedTuple):
    # float32 [n_sample] at codec.sample_rate, or codes as codec.encode returns them; None: no such channel
    user: np.ndarray | None
    assistant: np.ndarray | None
    # dict(role, start_sec, end_sec, text) and, where known, words: [dict(text, start_sec, end_sec)]
    turns: list
    remark: str = ''    # of what was done to it; printed once, at the end, with the number of such recordings


def arguments(doc):
    """The settings that every prepare.py has."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--out', required=True, help='data folder to write')
    add('--codec', required=True, help='folder with codec.json: data/demo, codecs/s3')
    add('--tokenizer', help='folder of a BPE to put beside the data, for models trained from nothing')
    add('--val_share', type=float, default=0.01, help='of the recordings, by a hash of their id (0.01)')
    add('--test_share', type=float, default=0.01, help='likewise (0.01)')
    add('--part', type=int, default=256, help='recordings a part: what a kill can cost (256)')
    add('--batch_sec', type=float, default=600.0, help='seconds of audio that are encoded at once (600)')
    add('--n_thread', type=int, default=4, help='threads that read files meanwhile (4)')
    add('--max_mismatch_sec', type=float, default=0.1,
        help='a recording whose channels differ by more in length is skipped (0.1)')
    add('--device', default='auto', help='for the codec')
    add('--seed', type=int, default=0, help='of the split')
    return parser


def run(items, read_recording, args, settings, splits=None):
    """
    Writes the data folder args.out. Raises ValueError where it holds another data set, or nothing could be
    read.
        items               id -> what read_recording takes
        read_recording      (what, codec) -> Recording; runs in threads; a recording for which it raises
                            ValueError or OSError is skipped
        settings            those that change what read_recording returns, as JSON
        splits              {id: 'train', 'val' or 'test'}; None: by a hash of the id
    """
    shares = args.val_share, args.test_share
    if min(args.part, args.n_thread, args.batch_sec) <= 0 or min(shares) < 0 or sum(shares) >= 1:
        raise ValueError('--part, --n_thread and --batch_sec have to be above 0, '
                         '--val_share and --test_share from 0 to below 1 together')
    if not items:
        raise ValueError('there is nothing to prepare: no recordings were found')
    codec = load_codec(args.codec)
    device = pick_device(args.device)
    items = by_id((printable(id), what) for id, what in items.items())      # by what it is written and shown
    splits = splits and {printable(id): split for id, split in splits.items()}
    codec.device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}' if device.type == 'cuda' else device
    ids = list(items)
    recipe = dict(settings, codec=codec.describe(), part=args.part, seed=args.seed, val_share=args.val_share,
                  test_share=args.test_share, max_mismatch_sec=args.max_mismatch_sec, n_item=len(ids),
                  ids=hashlib.sha256('\n'.join(ids).encode()).hexdigest()[:16])
    parts = [ids[at:at + args.part] for at in range(0, len(ids), args.part)]
    reader = partial(read_one, items=items, read_recording=read_recording, codec=codec,
                     max_mismatch_sec=args.max_mismatch_sec)
    marker = os.path.join(args.out, 'prepared.json')
    if is_prepared(marker, recipe) and not reopen(args, recipe, codec, parts, reader):
        return
    with ThreadPoolExecutor(args.n_thread) as pool:
        def make(number, path):
            return make_part(path, parts[number], reader, codec, args, pool)

        def finish_all():
            finish(args, recipe, codec, ids, len(parts), splits)
        work_on_parts(args.out, recipe, len(parts), make, finish_all)


def work_on_parts(out, recipe, n_part, make, finish):
    """Shares the parts of out with all processes that were started for it. Raises ValueError where it holds
    parts of another recipe.
        make        (number, path) -> seconds of speech in the part that it wrote to path
        finish      makes the data set of all parts, and out/prepared.json
    """
    marker, folder = os.path.join(out, 'prepared.json'), os.path.join(out, 'parts')
    os.makedirs(folder, exist_ok=True)
    recipe_path = os.path.join(folder, 'recipe.json')
    if not is_prepared(recipe_path, recipe):
        write_recipe(recipe_path, recipe)
    with open(os.path.join(out, '.lock'), 'w') as lock:
        share_parts(n_part, folder, marker, lock, make, finish)


def share_parts(n_part, folder, marker, lock, make, finish):
    """Makes the parts that nobody holds, again and again until all are there; then one process finishes."""
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    progress = Progress(n_part)
    while not os.path.exists(marker):
        missing = missing_parts(folder, n_part)
        if not missing:
            with Claim(lock, n_part) as is_mine:
                if is_mine and not os.path.exists(marker):
                    finish()
            continue
        first, n_done = rank * len(missing) // world_size, 0    # each process begins elsewhere
        for number in missing[first:] + missing[:first]:
            path = os.path.join(folder, f'{number:06d}.arrow')
            with Claim(lock, number) as is_mine:
                if is_mine and not os.path.exists(path) and not os.path.exists(marker):
                    sec = make(number, path)
                    n_done += 1
                    if rank == 0:
                        progress.show(sec, n_part - len(missing_parts(folder, n_part)))
        if not n_done:
            time.sleep(0.5)     # others hold what is left; if one of them dies, its lock is free


def is_prepared(path, recipe):
    """Was it made by this recipe? Raises ValueError if by another."""
    if not os.path.exists(path):
        return False
    before, recipe = read_json(path).get('recipe'), json.loads(json.dumps(recipe))
    if not isinstance(before, dict):
        raise ValueError(f'{path} does not say what the folder was made from: choose another --out')
    if before != recipe:
        changed = [key for key in sorted(before.keys() | recipe.keys()) if before.get(key) != recipe.get(key)]
        raise ValueError(f'{os.path.dirname(path)} was made from other material or settings '
                         f'({", ".join(changed)}); choose another --out, or delete it')
    return True


def write_recipe(path, recipe):
    """Every process writes it, each through a file of its own."""
    with whole(path, f'.{os.getpid()}.part') as part, open(part, 'w') as file:
        json.dump(dict(recipe=recipe), file)


class Claim:
    """Tries to lock byte `number` of a file for a with block, which gets whether it worked. The system frees
    the lock when its process ends, however it ends. POSIX locks work across machines on file systems that
    support them (NFS 4, Lustre)."""

    def __init__(self, file, number, wait=False):
        self.file, self.number, self.how = file, number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)

    def __enter__(self):
        try:
            fcntl.lockf(self.file, self.how, 1, self.number)
            return True
        except (BlockingIOError, PermissionError):      # another process has it
            self.file = None
            return False

    def __exit__(self, *_):
        if self.file:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, self.number)


def missing_parts(folder, n_part):
    there = {entry.name for entry in os.scandir(folder)} if os.path.isdir(folder) else set()
    return [number for number in range(n_part) if f'{number:06d}.arrow' not in there]


class Progress:

    def __init__(self, n_part):
        self.n_part, self.start, self.sec, self.n_before, self.shown = n_part, time.time(), 0.0, None, 0.0

    def show(self, sec, n_done):
        self.sec += sec
        self.n_before = n_done - 1 if self.n_before is None else self.n_before
        if time.time() - self.shown < 5 and n_done < self.n_part:
            return
        self.shown, elapsed = time.time(), time.time() - self.start
        left_min = elapsed / max(1, n_done - self.n_before) * (self.n_part - n_done) / 60
        print(f'part {n_done:>6}/{self.n_part} | {self.sec / 3600:8.2f} h by this process, '
              f'{self.sec / elapsed:6.1f} x real time | {left_min:.0f} min left', flush=True)


# ------------------------------------------------------------------------------------------------------------
# one part

def read_one(id, items, read_recording, codec, max_mismatch_sec):
    """-> (id, its Recording or, as a string, why it cannot be read)"""
    try:
        return id, fit(read_recording(items[id], codec), codec, max_mismatch_sec)
    except (ValueError, OSError) as error:
        return id, printable(str(error))
    except Exception as error:      # what nobody thought of, in one of a million rows, ends no run of days
        at = traceback.extract_tb(error.__traceback__)[-1]
        what = f'{type(error).__name__}: {error}'
        return id, printable(f'it cannot be read ({what[:300]}; {os.path.basename(at.filename)}:{at.lineno})')


def make_part(path, ids, reader, codec, args, pool):
    """Reads, encodes and writes the recordings of a part, but for those that it had before. Returns the
    seconds of them."""
    before, about = read_part(before_path(path)) if os.path.exists(before_path(path)) else (None, {})
    there = set() if before is None else set(before['id'].to_pylist())
    remarks, n_lost = about.get('remarks', {}), about.get('lost_turns', 0)
    records, skipped, n = [], [], 4 * args.n_thread
    # while one group is encoded, the next is read
    missing = [id for id in ids if id not in there]
    groups = [missing[at:at + n] for at in range(0, len(missing), n)]
    coming = [pool.submit(reader, id) for id in groups[0]]
    for following in groups[1:] + [[]]:
        found = [future.result() for future in coming]
        coming = [pool.submit(reader, id) for id in following]
        skipped += [dict(id=id, reason=reason) for id, reason in found if isinstance(reason, str)]
        good = [(id, recording) for id, recording in found if not isinstance(recording, str)]
        codes = encode([recording for _, recording in good], codec, args.batch_sec)
        for (id, recording), channels in zip(good, codes):
            n_frame = max(len(channel) for channel in channels.values())
            turns, lost = on_frames(recording.turns, n_frame, codec.rate_hz)
            record = dict(id=id, **channels, turns=turns)
            check(record, codec.n_codes, codes_per_frame(codec.describe()))
            records.append(record)
            n_lost += lost
            if recording.remark:
                add_remarks(remarks, {recording.remark: (1, id)})
    table = to_table(records, codec.describe())
    if before is not None:
        table = in_order(pa.concat_tables([before, table], promote_options='default'), ids)
    save_table(path, table, codec.describe(), skipped=skipped, lost_turns=n_lost, remarks=remarks)
    return sum(max(len(record['user']), len(record['assistant'])) for record in records) / codec.rate_hz


def fit(recording, codec, max_mismatch_sec):
    """Both channels on one clock: the shorter is filled up with silence. Raises ValueError where that would
    be too much."""
    hop = round(codec.sample_rate / codec.rate_hz)
    channels = {role: getattr(recording, role) for role in ROLES if getattr(recording, role) is not None}
    n_code = codes_per_frame(codec.describe())
    if not channels:
        raise ValueError('neither channel has audio')
    for role, channel in channels.items():
        is_wave = channel.dtype.kind == 'f'
        if channel.shape[1:] != (() if is_wave or n_code == 1 else (n_code,)) or not len(channel):
            wanted = 'samples in a row' if is_wave else f'frames of {n_code} codes'
            raise ValueError(f'the {role} channel has shape {channel.shape}, no {wanted}')
        if is_wave and not np.isfinite(channel).all():
            raise ValueError(f'the {role} channel has samples that are no numbers')
        if not is_wave and not 0 <= channel.min() <= channel.max() < codec.n_codes:
            raise ValueError(f'the {role} channel has codes {channel.min()} to {channel.max()}, '
                             f'codec {codec.name} has 0 to {codec.n_codes - 1}')
    n_frames = {role: -(-len(channel) // hop) if channel.dtype.kind == 'f' else len(channel)
                for role, channel in channels.items()}
    longest, shortest = max(n_frames.values()), min(n_frames.values())
    if (longest - shortest) / codec.rate_hz > max_mismatch_sec + 1 / codec.rate_hz:
        user_sec, assistant_sec = (n_frames[role] / codec.rate_hz for role in ROLES)
        raise ValueError(f"the user channel has {user_sec:.2f} s and the assistant's {assistant_sec:.2f} s, "
                         f'more than --max_mismatch_sec={max_mismatch_sec} apart')
    for turn in recording.turns:
        if turn['role'] not in channels:
            raise ValueError(f'a turn of the {turn["role"]} at {turn["start_sec"]} s, '
                             'but there is no such channel')
        words = turn.get('words') or []
        times = (span[key] for span in [turn, *words] for key in ('start_sec', 'end_sec'))
        if not all(isinstance(sec, (int, float)) and np.isfinite(sec) for sec in times):
            raise ValueError(f'a turn or a word of the {turn["role"]} has a time that is no number: {turn}')
        for word in words:
            if word['end_sec'] < word['start_sec']:
                raise ValueError(f'the word {word["text"]!r} of the {turn["role"]} starts at '
                                 f'{word["start_sec"]} s and ends before that, at {word["end_sec"]} s')
    for role, channel in channels.items():
        if channel.dtype.kind == 'f':
            channels[role] = np.pad(channel.astype(np.float32, copy=False), (0, longest * hop - len(channel)))
        else:
            more = np.repeat(codec.silence_codes[:1], longest - len(channel), 0)
            channels[role] = np.concatenate([channel.astype(np.uint16), more])
    return recording._replace(**channels)


def encode(recordings, codec, batch_sec):
    """[Recording] -> [{role: codes}]. Waves of like length are encoded together, as many as are batch_sec
    long in all, with their padding."""
    codes = [{role: np.empty(0, np.uint16) for role in ROLES} for _ in recordings]
    waves = []
    for i, recording in enumerate(recordings):
        for role in ROLES:
            channel = getattr(recording, role)
            if channel is not None and channel.dtype.kind == 'f':
                waves.append((len(channel), i, role))
            elif channel is not None:
                codes[i][role] = channel
    waves.sort(reverse=True)        # the longest first: it says how many fit beside it
    while waves:
        n = max(1, int(batch_sec * codec.sample_rate // waves[0][0]))
        batch, waves = waves[:n], waves[n:]
        found = codec.encode_many([getattr(recordings[i], role) for _, i, role in batch])
        for (_, i, role), channel in zip(batch, found):
            codes[i][role] = channel
    return codes


def on_frames(turns, n_frame, rate_hz):
    """Turns in seconds -> (turns in whole frames, how many were lost). A turn holds every frame that it
    touches, and so does a word; what lies outside the recording or in the same role's last turn is cut off,
    and a turn of which nothing is left is lost."""
    def clip(span, first, last):
        # 1e-6: 0.12 s at 25 Hz is frame 3, though 0.12 * 25 is 3.0000000000000004 or 2.9999999999999996
        start, end = np.floor(span['start_sec'] * rate_hz + 1e-6), np.ceil(span['end_sec'] * rate_hz - 1e-6)
        return int(np.clip(start, first, last)), int(np.clip(end, first, last))

    framed, last_end, n_lost = [], dict.fromkeys(ROLES, 0), 0
    for turn in sorted(turns, key=lambda turn: turn['start_sec']):
        start, end = clip(turn, last_end[turn['role']], n_frame)
        if start >= end:
            n_lost += 1
            continue
        last_end[turn['role']] = end
        words = []
        for word in sorted(turn.get('words') or [], key=lambda word: word['start_sec']):
            first, last = clip(word, start, end)
            if first < last or word['start_sec'] == word['end_sec']:
                words.append(dict(text=as_text(word['text']), start=first, end=last))
        text = as_text(' '.join(turn['text'].split()))
        framed.append(dict(role=turn['role'], start=start, end=end, text=text, words=words))
    return framed, n_lost


def read_part(path):
    """-> (the table of a part, or of a split, what is noted of it). All of it is compared with its checksums.
    Columns that older folders lack are empty."""
    table, about = open_table(path)
    try:
        for batch in table.to_batches():
            columns = Columns(batch, codes_per_frame(about['codec']))
            for i in range(len(columns)):
                columns.check(i)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{path} is damaged ({error}): delete it, and the same command makes it '
                         'again') from None
    for field in SCHEMA:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(SCHEMA.names).cast(SCHEMA), about


def in_order(table, ids):
    rows = {id: row for row, id in enumerate(table['id'].to_pylist())}
    return table.take(pa.array([rows[id] for id in ids if id in rows], pa.int64()))


def add_remarks(remarks, more):
    """Both are {remark: (how many recordings, the id of the first)}; the first gets the sum."""
    for remark, (n, first) in more.items():
        n_before, first = remarks.get(remark, (0, first))
        remarks[remark] = n_before + n, first


# ------------------------------------------------------------------------------------------------------------
# what was skipped, again

def reopen(args, recipe, codec, parts, reader):
    """
    Of a data folder that is finished, reads again what was skipped. If some of it can be read now, the folder
    becomes unfinished, with all that it has in its parts, and True is returned.

        000016.arrow            a part of which nothing was skipped
        000017.before.arrow     what there is of a part that is to be made again
    """
    marker, path = (os.path.join(args.out, name) for name in ('prepared.json', 'skipped.jsonl'))
    skipped = read_skipped(path)
    with ThreadPoolExecutor(args.n_thread) as pool:
        found = pool.map(reader, skipped)
        first = next((id for id, what in found if not isinstance(what, str)), None)
        pool.shutdown(cancel_futures=True)
    if first is None:
        left = f'; {len(skipped)} recordings still cannot be read, {path} says why' if skipped else ''
        print(f'{args.out} is prepared already{left}')
        return False
    with open(os.path.join(args.out, '.lock'), 'w') as lock, Claim(lock, len(parts) + 1, wait=True):
        if os.path.exists(marker) and first in read_skipped(path):      # else another process was here
            print(f'{first}, which was skipped, can be read now: all {len(skipped)} that were skipped '
                  'are tried again')
            lay_out_parts(args.out, codec, parts, skipped)
            write_recipe(os.path.join(args.out, 'parts', 'recipe.json'), recipe)
            os.remove(marker)
    return not is_prepared(marker, recipe)


def read_skipped(path):
    """{id: why}"""
    if not os.path.isfile(path):
        return {}
    try:
        return {str(entry['id']): str(entry['reason']) for _, entry in read_jsonl(path)}
    except KeyError as error:
        raise ValueError(f'{path} has a row without {error}: it is damaged; choose another --out') from None


def before_path(path):
    return f'{os.path.splitext(path)[0]}.before.arrow'


def lay_out_parts(out, codec, parts, skipped):
    """Writes the parts of a finished data folder again; those of which something was skipped, unfinished."""
    folder, number_of = os.path.join(out, 'parts'), {id: n for n, ids in enumerate(parts) for id in ids}
    batches = [[] for _ in parts]
    for split in ('train', 'val', 'test'):
        table, _ = read_part(os.path.join(out, f'{split}.arrow'))
        for batch in table.to_batches():
            if len(batch):      # finish wrote a batch for each part
                batches[number_of[batch['id'][0].as_py()]].append(batch)
    done = read_json(os.path.join(out, 'prepared.json'))
    about = dict(lost_turns=done.get('turns_outside_their_recording', 0), remarks=done.get('remarks', {}))
    remove(folder)      # of a process that was killed here
    os.makedirs(folder)
    for number, ids in enumerate(parts):
        path = os.path.join(folder, f'{number:06d}.arrow')
        # folders that were prepared before there were prompts lack that column
        table = pa.Table.from_batches(batches[number]) if batches[number] else SCHEMA.empty_table()
        table = in_order(table, ids)
        save_table(path if skipped.keys().isdisjoint(ids) else before_path(path), table, codec.describe(),
                   skipped=[], **about)
        about = dict(lost_turns=0, remarks={})      # the first part has those of all


# ------------------------------------------------------------------------------------------------------------
# all parts

def split_ids(ids, val_share, test_share, seed):
    """id -> 'train', 'val' or 'test', the same in whatever order the ids come. Where a share is asked for, it
    is one id at least. Of only two ids, one is for train and one for val."""
    order = sorted(ids, key=lambda id: hashlib.sha256(f'{seed} {id}'.encode()).digest())
    n_val, n_test = (max(1, round(share * len(ids))) if share and len(ids) > others else 0
                     for others, share in ((1, val_share), (2, test_share)))
    splits = dict.fromkeys(ids, 'train')
    return splits | dict.fromkeys(order[:n_val], 'val') | dict.fromkeys(order[n_val:n_val + n_test], 'test')


def count_kinds(skipped, n=10):
    """'5 such as a: no file a.wav; …', the commonest first. Reasons that differ in names and numbers alone,
    which are not of letters, are of one kind."""
    kinds = {}
    for entry in skipped:
        kinds.setdefault(tuple(filter(str.isalpha, entry['reason'].split())), []).append(entry)
    kinds = sorted(kinds.values(), key=len, reverse=True)
    shown = [f'{len(kind)} such as {kind[0]["id"]}: {kind[0]["reason"]}' for kind in kinds[:n]]
    return '; '.join(shown + [f'and {len(kinds) - n} kinds more'] * (len(kinds) > n))


def finish(args, recipe, codec, ids, n_part, splits=None):
    """The parts become the data set, and a table of what is in it is printed. splits: {id: 'train', 'val' or
    'test'}; None: by a hash of the id."""
    tables, skipped, lost_turns, remarks = [], [], 0, {}
    for number in range(n_part):
        table, about = read_part(os.path.join(args.out, 'parts', f'{number:06d}.arrow'))
        skipped += about['skipped']
        lost_turns += about['lost_turns']
        add_remarks(remarks, about['remarks'])
        tables.append(table)
    if len(skipped) == len(ids):
        shutil.rmtree(os.path.join(args.out, 'parts'))      # so that the same command tries again
        raise ValueError(f'none of the {len(ids)} recordings could be prepared: {count_kinds(skipped)}')
    unread = {entry['id'] for entry in skipped}
    splits = splits or split_ids([id for id in ids if id not in unread], args.val_share, args.test_share,
                                 args.seed)
    counts = Statistics(codec.rate_hz, codes_per_frame(codec.describe()))
    schema = SCHEMA.with_metadata(metadata(codec.describe()))
    with ExitStack() as all_appear:     # the three files at once, or none
        for split in ('train', 'val', 'test'):
            path = all_appear.enter_context(whole(os.path.join(args.out, f'{split}.arrow')))
            with pa.OSFile(path, 'wb') as sink, pa.ipc.new_file(sink, schema) as writer:
                for table in tables:
                    is_chosen = [splits[id] == split for id in table['id'].to_pylist()]
                    chosen = table.filter(pa.array(is_chosen, pa.bool_()))
                    counts.add(split, chosen)
                    writer.write_table(chosen.cast(schema))
    write_jsonl(os.path.join(args.out, 'skipped.jsonl'), skipped)
    if os.path.realpath(args.codec) != os.path.realpath(args.out):
        codec.save(os.path.join(args.out, 'codec'))
    if args.tokenizer:
        os.makedirs(os.path.join(args.out, 'tokenizer'), exist_ok=True)
        for name in TOKENIZER_FILES:
            if os.path.exists(os.path.join(args.tokenizer, name)):
                shutil.copy(os.path.join(args.tokenizer, name), os.path.join(args.out, 'tokenizer', name))
    table = counts.table() | dict(skipped=len(skipped), turns_outside_their_recording=lost_turns)
    for key, value in table.items():
        print(f'{key:30} {value}')
    if skipped:
        print(f'{len(skipped)} recordings were skipped, {os.path.join(args.out, "skipped.jsonl")} says why: '
              f'{count_kinds(skipped)}')
    for remark, (n, first) in remarks.items():
        print(f'note: in {n} recordings {remark}; the first is {first}')
    write_json(os.path.join(args.out, 'prepared.json'), dict(recipe=recipe, **table, remarks=remarks))
    shutil.rmtree(os.path.join(args.out, 'parts'))
    os.remove(os.path.join(args.out, '.lock'))


class Statistics:
    """Who speaks when, in the figures that are known of Switchboard. There, both sides speak 0.7 to 8.8 % of
    the time, and neither does 10 to 29 %."""

    def __init__(self, rate_hz, n_code):
        self.rate_hz, self.n_code = rate_hz, n_code         # frames a second, codes a frame
        self.n, self.n_frame = dict(train=0, val=0, test=0), 0
        self.n_dialogue = self.dialogue_frame = self.both = self.neither = self.n_change = 0
        self.n_turn, self.gaps = dict.fromkeys(ROLES, 0), {'user to assistant': [], 'assistant to user': []}

    def add(self, split, table):
        self.n[split] += len(table)
        lengths = [(pc.list_value_length(table[role]).to_numpy() // self.n_code).tolist() for role in ROLES]
        for n_user, n_assistant, turns in zip(*lengths, table['turns'].to_pylist()):
            n_frame = max(n_user, n_assistant)
            self.n_frame += n_frame
            for turn in turns:
                self.n_turn[turn['role']] += 1
            if n_user != n_assistant:
                continue        # one side only
            speaks = {role: np.zeros(n_frame, bool) for role in ROLES}
            for turn in turns:
                speaks[turn['role']][turn['start']:turn['end']] = True
            self.n_dialogue += 1
            self.dialogue_frame += n_frame
            self.both += int((speaks['user'] & speaks['assistant']).sum())
            self.neither += int((~speaks['user'] & ~speaks['assistant']).sum())
            for one, other in zip(turns, turns[1:]):        # by start
                if one['role'] != other['role']:
                    self.n_change += 1
                    gap_sec = (other['start'] - one['end']) / self.rate_hz
                    self.gaps[f'{one["role"]} to {other["role"]}'].append(gap_sec)

    def table(self):
        table = dict(records=', '.join(f'{n} {split}' for split, n in self.n.items()),
                     hours=round(self.n_frame / self.rate_hz / 3600, 4),
                     turns=', '.join(f'{n} {role}' for role, n in self.n_turn.items()))
        if not self.n_dialogue:
            return table
        minutes = self.dialogue_frame / self.rate_hz / 60
        table |= dict(dialogues=self.n_dialogue,
                      both_speak=f'{self.both / self.dialogue_frame:.1%}',
                      neither_speaks=f'{self.neither / self.dialogue_frame:.1%}',
                      floor_changes_a_minute=round(self.n_change / minutes, 1))
        for name, gaps in self.gaps.items():
            if gaps:
                median, low, high = np.median(gaps), np.quantile(gaps, 0.1), np.quantile(gaps, 0.9)
                table[f'gap {name}'] = (f'median {median:.2f} s, 10 % below {low:.2f} s, '
                                        f'90 % below {high:.2f} s')
        return table
