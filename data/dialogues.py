"""
Dialogues on disk: a data folder holds train.arrow, val.arrow and test.arrow (each may be in parts, as
train-00000-of-00008.arrow). These are Arrow IPC files of records (docs/format.md), memory-mapped. Dialogues
are tokenised once; a layout is applied when they are loaded. The codes of a codec of several codebooks lie in
the file frame after frame, in a flat list.

Every record has a checksum, and is compared with it when it is first read: so to open a file costs nothing
however large it is, and what was damaged since it was written is found before it is learned. The metadata
have one of their own. Files without checksums are read, too.

    dialogues = [dict(id='1', user=[…], assistant=[…], turns=[…])]
    save_dialogues('data/mine/train.arrow', dialogues, codec.describe())
    Dialogues('data/mine', 'train')[0]
"""
import glob
import json
import os
import zlib
from bisect import bisect_right
from itertools import accumulate

import numpy as np
import pyarrow as pa

from common.files import whole
from common.levels import codes_per_frame

WORD = pa.struct([('text', pa.string()), ('start', pa.int32()), ('end', pa.int32())])
TURN = pa.struct([('role', pa.string()), ('start', pa.int32()), ('end', pa.int32()), ('text', pa.string()),
                  ('words', pa.list_(WORD))])
TURNS_WITHOUT_WORDS = pa.list_(pa.struct([field for field in TURN if field.name != 'words']))
SCHEMA = pa.schema([
    ('id', pa.string()),
    ('user', pa.list_(pa.uint16())),    # a code a frame, or several, frame after frame
    ('assistant', pa.list_(pa.uint16())),
    ('turns', pa.list_(TURN)),
    ('prompt', pa.string()),            # what the assistant is told before it begins; files may lack it
    ('crc32', pa.uint32()),             # Columns.checksum of all others; 0: none. Files may lack it
])
MAGIC = b'ARROW1\0\0'
DAMAGED = 'is not what was written (its checksum differs): copy the file again, or prepare it again'


def save_dialogues(path, dialogues, codec, **notes):
    """Writes an Arrow file of dialogues, with the codec's description and notes in its metadata. The file
    appears whole or not at all. Channels are lists or arrays, [n_frame] or [n_frame, codes a frame]."""
    save_table(path, to_table(dialogues, codec), codec, **notes)


def to_table(dialogues, codec):
    """Raises ValueError for frames of another length than the codec's, and for what is no text."""
    rows, n_code = [], codes_per_frame(codec)
    for row in dialogues:
        channels = {role: np.asarray(row[role], None if len(row[role]) else np.uint16)
                    for role in ('user', 'assistant')}
        for role, codes in channels.items():
            if codes.shape[1:] not in ((), (n_code,)):
                raise ValueError(f'dialogue {row["id"]!r}: the {role} channel has shape {codes.shape}, '
                                 f'and codec {codec["name"]} {n_code} codes a frame')
        rows.append(row | {role: codes.reshape(-1) for role, codes in channels.items()})
    try:
        table = pa.Table.from_pylist(rows, SCHEMA)
    except UnicodeEncodeError as error:     # JSON may hold half a surrogate pair, UTF-8 may not
        raise ValueError(f'{error.object!r:.80} is no text that can be written ({error.reason})') from None
    try:
        parts = [Columns(batch, n_code) for batch in table.to_batches()]
    except ValueError:
        return table        # without checksums: what is no record is named when it is read
    sums = [part.checksum(i) for part in parts for i in range(len(part))]
    return table.set_column(table.num_columns - 1, SCHEMA.field('crc32'), pa.array(sums, pa.uint32()))


def metadata(codec, **notes):
    """What a file says of itself, with a checksum."""
    about = json.dumps(dict(notes, codec=codec))
    return {'nanoduplex': about, 'crc32': f'{zlib.crc32(about.encode()):08x}'}


def save_table(path, table, codec, **notes):
    """The same of a table of SCHEMA."""
    table = table.replace_schema_metadata(metadata(codec, **notes))
    with whole(path) as part, pa.OSFile(part, 'wb') as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def open_table(path):
    """-> the table of a file, memory-mapped; what its metadata say. Raises ValueError for a file that is
    none, or not what was written. Records are compared with their checksums when they are read."""
    try:
        source = pa.memory_map(path)
        reader = pa.ipc.open_file(source)
        table = reader.read_all()
        source.seek(len(MAGIC))     # the footer lists the batches; they also lie one behind the other
        if sum(1 for _ in pa.ipc.open_stream(source)) != reader.num_record_batches:
            raise ValueError('some of its records are lost')
        for batch in table.to_batches():
            batch.validate()
        stored = table.schema.metadata or {}
        about, crc32 = stored[b'nanoduplex'], stored.get(b'crc32')
        if crc32 and int(crc32, 16) != zlib.crc32(about):
            raise ValueError(f'what it says of itself {DAMAGED}')
        about = dict(json.loads(about))
        kinds = {field.name: field.type for field in table.schema}
        for field in SCHEMA:
            known = [field.type] + [TURNS_WITHOUT_WORDS] * (field.name == 'turns')
            known += [None] * (field.name == 'prompt' or field.name == 'crc32' and not crc32)
            if kinds.get(field.name) not in known:
                raise ValueError(f'its column {field.name} is {kinds.get(field.name)}, not {field.type}')
        return table, about
    except (pa.ArrowException, OSError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not a file of dialogues ({error}); prepare it again') from None


class Dialogues:
    """The records of one split of a data folder; [i] -> dict(id, user uint16 [n_frame], or [n_frame, codes a
    frame], assistant, turns, and prompt, if it has one). .codec is the description of the codec that they
    were made with, .codes_per_frame how many codes a frame of it has. with_words, which may be set at any
    time: turns have their words, too, where the file has them. Reading is slower then."""

    def __init__(self, folder, split, with_words=False):
        shards = sorted(glob.glob(os.path.join(glob.escape(folder), f'{split}-?????-of-?????.arrow')))
        paths = shards or [os.path.join(folder, f'{split}.arrow')]
        if not os.path.isdir(folder):
            raise ValueError(f'no data folder {folder}; prepare it first '
                             '(for the demo: python data/demo/prepare.py)')
        if not os.path.exists(paths[0]):
            raise ValueError(f'{folder} holds no {split}.arrow; prepare it first '
                             '(for the demo: python data/demo/prepare.py)')
        if shards and len(shards) != int(shards[0][-11:-6]):
            raise ValueError(f'{folder} holds {len(shards)} of the {int(shards[0][-11:-6])} files of {split}')
        self.folder, self.split, self.parts, self.paths, self.codec = folder, split, [], [], None
        self.with_words = with_words
        for path in paths:
            table, about = open_table(path)
            try:
                codec = about['codec']
                n = codes_per_frame(codec)
                columns = [Columns(batch, n) for batch in table.to_batches() if batch.num_rows]
            except (TypeError, KeyError, ValueError) as error:
                raise ValueError(f'{path} is not a file of dialogues ({error}); prepare it again')
            if self.codec and codec != self.codec:
                raise ValueError(f'{path} was made with codec {codec}, {paths[0]} with {self.codec}')
            self.codec, self.codes_per_frame = codec, n
            self.parts += columns
            self.paths += [path] * len(columns)
        self.firsts = [0, *accumulate(map(len, self.parts))]
        self.is_checked = bytearray(self.firsts[-1])    # records do not change: one check is enough
        self.has_prompts = any(part.prompt for part in self.parts)
        self.n_frame = []       # of the user's channels, and of the assistant's
        for role in ('user', 'assistant'):
            lengths = [np.diff(part.codes[role][0]) for part in self.parts]
            self.n_frame.append(np.concatenate([np.zeros(0, np.int32), *lengths]))

    def prompt(self, i):
        """The prompt of record i, '' where it has none."""
        if not self.has_prompts:
            return ''
        part = bisect_right(self.firsts, i) - 1
        prompts, i = self.parts[part].prompt, i - self.firsts[part]
        try:
            return prompts[i:i + 1][0] if prompts else ''
        except (UnicodeDecodeError, IndexError):
            raise ValueError(f'{self.paths[part]}: the prompt of record {i} {DAMAGED}') from None

    def __len__(self):
        return self.firsts[-1]

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = bisect_right(self.firsts, i) - 1
        columns, at = self.parts[part], i - self.firsts[part]
        try:
            if not self.is_checked[i]:
                columns.check(at)
                self.is_checked[i] = True
            record = columns[at]
            if self.with_words:
                columns.add_words(at, record['turns'])
        except (ValueError, IndexError):        # UnicodeDecodeError, too; of files without checksums
            at = i - self.firsts[self.paths.index(self.paths[part])]
            raise ValueError(f'{self.paths[part]}: record {at} {DAMAGED}') from None
        return record


class Columns:
    """A record batch as numpy views into the mapped file: nothing is copied, and only the record that is
    asked for is parsed. n_code: codes a frame"""

    def __init__(self, batch, n_code):
        columns = {name: batch.column(name) for name in SCHEMA.names if name in batch.schema.names}
        self.id = Strings(columns['id'])
        self.codes = {role: self.frames(columns[role], role, n_code) for role in ('user', 'assistant')}
        turns = columns['turns']
        fields = {key: turns.values.field(key) for key in ('role', 'start', 'end', 'text')}
        for key, values in dict(fields, id=columns['id']).items():
            if values.null_count:
                raise ValueError(f'{values.null_count} have no {key}')
        self.turn_offsets = turns.offsets.to_numpy()
        self.start, self.end = fields['start'].to_numpy(), fields['end'].to_numpy()
        prompts = columns.get('prompt')
        self.prompt = Strings(prompts) if prompts and prompts.null_count < len(prompts) else None
        self.role, self.text = Strings(fields['role']), Strings(fields['text'])
        self.words = None
        words = turns.values.field('words') if turns.type.value_type.get_field_index('words') >= 0 else None
        if words and len(words.values):
            fields = {key: words.values.field(key) for key in ('text', 'start', 'end')}
            if any(values.null_count for values in fields.values()):
                raise ValueError('a word has no text, start or end')
            self.word_offsets = words.offsets.to_numpy()
            self.words = Strings(fields['text']), fields['start'].to_numpy(), fields['end'].to_numpy()
        sums = columns.get('crc32')
        self.sums = None if sums is None else sums.fill_null(0).to_numpy()
        for role, (offsets, codes) in self.codes.items():
            check_offsets(offsets, len(codes), role)
        check_offsets(self.turn_offsets, len(self.start), 'turns')

    def frames(self, column, role, n_code):
        """-> the frame at which each record's channel starts, the last one's end; all frames: codes [N], or
        [N, n_code]"""
        offsets, codes = column.offsets.to_numpy(), column.values.to_numpy()
        if n_code == 1:
            return offsets, codes
        wrong = np.flatnonzero(np.diff(offsets) % n_code)
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(f'record {self.id[i:i + 1][0]!r} has {np.diff(offsets)[i]} {role} codes, '
                             f'and a frame has {n_code}')
        first, end = offsets[[0, -1]]
        return (offsets - first) // n_code, codes[first:end].reshape(-1, n_code)

    def checksum(self, i):
        """The CRC-32 of all that record i has, without reading its texts; never 0, which stands for none. It
        finds every damage of up to 32 bits in a row, and of others all but one in 4 billion."""
        a, b = self.turn_offsets[i:i + 2].tolist()
        pieces = [*self.id.bytes(i, i + 1)[1:], *(of[at[i]:at[i + 1]] for at, of in self.codes.values()),
                  *self.role.bytes(a, b), *self.text.bytes(a, b), self.start[a:b], self.end[a:b]]
        if self.words is not None:
            (texts, starts, ends), n_word = self.words, np.diff(self.word_offsets[a:b + 1])
            c, d = self.word_offsets[[a, b]].tolist()
            if n_word.any():        # in a file without words there are none to look at
                pieces += [n_word, *texts.bytes(c, d), starts[c:d], ends[c:d]]
        pieces += self.prompt.bytes(i, i + 1)[1:] if self.prompt else []
        crc32 = 0
        for piece in pieces:
            crc32 = zlib.crc32(piece, crc32)
        return crc32 or 1

    def check(self, i):
        """Raises ValueError where record i is not what its checksum says, if it has one."""
        if self.sums is not None and self.sums[i] and self.checksum(i) != self.sums[i]:
            raise ValueError('the checksum differs')

    def __len__(self):
        return len(self.turn_offsets) - 1

    def __getitem__(self, i):
        codes = {role: values[offsets[i]:offsets[i + 1]] for role, (offsets, values) in self.codes.items()}
        of = slice(*self.turn_offsets[i:i + 2].tolist())
        columns = zip(self.role[of], self.start[of].tolist(), self.end[of].tolist(), self.text[of])
        turns = [dict(role=role, start=start, end=end, text=text) for role, start, end, text in columns]
        prompt = self.prompt[i:i + 1][0] if self.prompt else ''
        return dict(id=self.id[i:i + 1][0], **codes, turns=turns) | (dict(prompt=prompt) if prompt else {})

    def add_words(self, i, turns):
        """To the turns of record i, where the file has them."""
        if self.words is None:
            return
        first = self.turn_offsets[i]
        offsets = self.word_offsets[first:first + len(turns) + 1].tolist()
        of = slice(offsets[0], offsets[-1])
        texts, starts, ends = self.words
        words = [dict(text=text, start=start, end=end) for text, start, end
                 in zip(texts[of], starts[of].tolist(), ends[of].tolist())]
        for turn, start, end in zip(turns, offsets, offsets[1:]):
            if start < end:
                turn['words'] = words[start - of.start:end - of.start]


def check_offsets(offsets, n, what):
    """Where the lists of a column begin and end among its n values. Raises ValueError unless they lie one
    behind the other: lengths are used before a record is read."""
    if len(offsets) and (offsets[0] < 0 or offsets[-1] > n or (offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f'the lengths of its {what} are damaged')


class Strings:
    """A column of strings: [slice] -> list, without pyarrow's microseconds a call."""

    def __init__(self, array):
        _, offsets, letters = array.buffers()
        self.offsets = np.frombuffer(offsets, np.int32)[array.offset:]
        self.letters = memoryview(letters or b'')

    def bytes(self, start, end):
        """-> how many bytes each has, and the bytes"""
        first, last = self.offsets[[start, end]].tolist()
        return np.diff(self.offsets[start:end + 1]), self.letters[first:last]

    def __getitem__(self, of):
        offsets = self.offsets[of.start:of.stop + 1].tolist()
        first, last = offsets[0], offsets[-1]
        whole = str(self.letters[first:last], 'utf8')
        if len(whole) == last - first:      # ASCII: a byte a letter
            return [whole[start - first:end - first] for start, end in zip(offsets, offsets[1:])]
        return [str(self.letters[start:end], 'utf8') for start, end in zip(offsets, offsets[1:])]
