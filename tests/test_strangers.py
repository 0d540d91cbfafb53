"""
Files of strangers: what is damaged is found, what is too large is refused, names do not become paths, texts
stay texts. The thousands of inputs are fuzz.py's; docs/security.md says what is trusted.
"""
import gzip
import io
import json
import os
import stat
import struct
import subprocess
import sys
import tarfile
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

soundfile = pytest.importorskip('soundfile')
pytest.importorskip('soxr')

import clock  # noqa: E402
from common import audio, files  # noqa: E402
from common.audio import read_audio, write_audio  # noqa: E402
from common.files import as_text, file_name, printable, read_json, write_json  # noqa: E402
from data import recordings, sides, texts  # noqa: E402
from data.dialogues import Dialogues, save_dialogues  # noqa: E402
from data.loader import Loader  # noqa: E402
from data.made_up import hum, make_vocabulary, write_data  # noqa: E402
from data.manifest import prepare as manifest  # noqa: E402
from data.tokenise import read_part  # noqa: E402
from data.webdataset import prepare as webdataset  # noqa: E402
from flatten import get_layout  # noqa: E402
from inputs import first  # noqa: E402
from measures import judge, report  # noqa: E402
from tests.conftest import CODEC, ROOT, make_dialogues  # noqa: E402


def rows_of(n=5):
    words = [dict(text='hí', start=11, end=12)]
    for i, row in enumerate(make_dialogues(n, n_frame=(40, 60))):
        row['turns'][0] |= dict(end=20, words=words) if row['turns'][0]['end'] > 20 else dict(words=[])
        yield row | dict(prompt='Be brief.' * (i % 2))


# ------------------------------------------------------------------------------------------------------------
# checksums

def test_no_flipped_bit_of_an_arrow_file_changes_what_is_read(tmp_path):
    """Each byte of a small file in turn: what is read is what was written, or nothing is."""
    path = tmp_path / 'train.arrow'
    save_dialogues(str(path), rows_of(3), CODEC)
    written, content = read_all(tmp_path), path.read_bytes()
    n_found = 0
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1:])
        try:
            assert read_all(tmp_path) == written, at
        except ValueError as error:
            n_found += 1
            assert type(error) is ValueError and str(error).startswith(str(path)), error
    assert n_found > 100
    for end in range(0, len(content) - 1, 97):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match='is not a file of dialogues .*; prepare it again'):
            read_all(tmp_path)


def in_memory(path):
    """The table of a file that is going to be written again"""
    with open(path, 'rb') as file:
        return pa.ipc.open_file(file.read()).read_all()


def read_all(folder):
    dialogues = Dialogues(str(folder), 'train', with_words=True)
    return [dict(row, user=row['user'].tolist(), assistant=row['assistant'].tolist()) for row in dialogues]


def test_a_damaged_record_is_named_when_it_is_read(tmp_path, small_tokenizer):
    """The codes of record 3 of the second of two files. The others are read; the loader says which it is."""
    codes = np.arange(100, dtype=np.uint16) % 32
    for part in range(2):
        rows = [dict(id=f'{part}{i}', user=codes, assistant=codes + (part == i - 2 == 1), turns=[])
                for i in range(5)]
        save_dialogues(str(tmp_path / f'train-{part:05d}-of-00002.arrow'), rows, CODEC | dict(n_codes=33))
    path = tmp_path / 'train-00001-of-00002.arrow'
    content, mark = path.read_bytes(), (codes + 1).tobytes()
    assert content.count(mark) == 1
    path.write_bytes(content.replace(mark, (codes + 2).tobytes()))
    dialogues = Dialogues(str(tmp_path), 'train')
    assert [dialogues[i]['id'] for i in (0, 7, 9)] == ['00', '12', '14']
    with pytest.raises(ValueError, match='00001-of-00002.arrow: record 3 is not what was written'):
        dialogues[8]
    vocab = make_vocabulary(300, 33)
    loader = Loader(Dialogues(str(tmp_path), 'train'), [get_layout('duplex3')], vocab, 256, 2)
    with pytest.raises(ValueError, match='^[^:]*00001-of-00002.arrow: record 3 is not what was written'):
        loader.measure()


def test_a_file_without_checksums_is_read(tmp_path):
    """As they were written before. A file that says that it has them needs the column."""
    path = str(tmp_path / 'train.arrow')
    save_dialogues(path, rows_of(), CODEC)
    written, table = read_all(tmp_path), pa.ipc.open_file(path).read_all().drop_columns(['crc32'])
    for metadata, is_read in ((table.schema.metadata, False), ({'nanoduplex': json.dumps(dict(codec=CODEC))},
                                                               True)):
        table = table.replace_schema_metadata(metadata)
        with pa.OSFile(path, 'wb') as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        if is_read:
            assert read_all(tmp_path) == written
        else:
            with pytest.raises(ValueError, match='its column crc32 is None, not uint32'):
                Dialogues(str(tmp_path), 'train')


def test_a_checksum_does_not_depend_on_how_a_table_is_cut(tmp_path):
    """Slices, filters and concatenations keep their records' checksums, with words or without."""
    path = str(tmp_path / 'train.arrow')
    save_dialogues(path, rows_of(6), CODEC)
    table = in_memory(path)
    for changed in (table[2:5], table.take([4, 0]), pa.concat_tables([table[3:], table[:2]])):
        with pa.OSFile(path, 'wb') as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(changed, max_chunksize=2)
        assert [row['id'] for row in read_all(tmp_path)] == changed['id'].to_pylist()


def test_a_lost_batch_is_noticed(tmp_path):
    path = tmp_path / 'train.arrow'
    save_dialogues(str(path), rows_of(6), CODEC)
    table = in_memory(path)
    with pa.OSFile(str(path), 'wb') as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    content = path.read_bytes()
    n_footer = struct.unpack('<i', content[-10:-6])[0]
    footer = content[-10 - n_footer:-10]
    at = footer.index(struct.pack('<i', 3) + struct.pack('<q', first_batch(content)))     # a list of 3 places
    footer = footer[:at] + struct.pack('<i', 2) + footer[at + 4:]
    path.write_bytes(content[:-10 - n_footer] + footer + content[-10:])
    assert pa.ipc.open_file(str(path)).num_record_batches == 2
    with pytest.raises(ValueError, match='some of its records are lost'):
        Dialogues(str(tmp_path), 'train')


def first_batch(content):
    """-> where the first record batch is: behind the magic and the schema's message"""
    return 8 + 8 + struct.unpack('<i', content[12:16])[0]


def test_a_damaged_part_is_named(tmp_path):
    """A part of a run that was killed, then damaged."""
    path = tmp_path / 'part.arrow'
    save_dialogues(str(path), rows_of(), CODEC)
    content = path.read_bytes()
    assert len(read_part(str(path))[0]) == 5 and content.count(b'Be brief.') >= 1
    path.write_bytes(content.replace(b'Be brief.', b'Be brisk.'))
    with pytest.raises(ValueError, match='part.arrow is damaged .*, and the same command makes it again'):
        read_part(str(path))


# ------------------------------------------------------------------------------------------------------------
# sizes that are not there, or too large

def test_a_header_that_lies_takes_no_memory(tmp_path):
    """36 bits of a FLAC's header are the number of its samples."""
    path = tmp_path / 'a.flac'
    soundfile.write(path, hum(140, 1.0), 16000)
    content = bytearray(path.read_bytes())
    content[21] |= 0x0f
    path.write_bytes(content)
    for read in (read_audio, lambda path, rate: recordings.read_piece(path, path, rate)):
        with pytest.raises(ValueError, match='a.flac has .* h by its header, and 6 h are read at once'):
            read(str(path), 16000)
    content[21] &= 0xf0
    content[23] |= 0x40     # 4 million samples more: 4 minutes
    path.write_bytes(content)
    with pytest.raises(ValueError, match='a.flac is (cut off or damaged: of .* 1.00 can be read|not audio)'):
        read_audio(str(path), 16000)


@pytest.mark.parametrize('suffix', ['wav', 'flac', 'mp3', 'aiff'])
def test_what_is_cut_off_is_not_shortened(tmp_path, suffix):
    path = tmp_path / f'a.{suffix}'
    soundfile.write(path, hum(140, 2.0), 16000)
    content = path.read_bytes()
    assert len(read_audio(str(path), 16000)) == 32000
    path.write_bytes(content[:len(content) * 2 // 3])
    with pytest.raises(ValueError, match='cut off|not audio that can be read'):
        read_audio(str(path), 16000)


def test_a_wav_from_a_pipe_is_read(tmp_path):
    """ffmpeg and sox do not know the length when they write the header."""
    path = tmp_path / 'a.wav'
    soundfile.write(path, hum(140, 1.0), 16000)
    content = path.read_bytes()
    at = content.index(b'data') + 4
    for claimed in (2 ** 32 - 1, 2 ** 31 - 1, 0x7ffff000 - 36):
        path.write_bytes(content[:at] + struct.pack('<I', claimed) + content[at + 4:])
        assert len(read_audio(str(path), 16000)) == 16000


@pytest.mark.parametrize('rate', [8000, 22050, 44100, 48000])
def test_blocks_are_the_whole(tmp_path, rate, monkeypatch):
    """Read block by block and resampled on the way: the same samples as at one go."""
    import soxr
    path = tmp_path / 'a.wav'
    soundfile.write(path, np.stack([hum(140, 2.0, rate), hum(220, 2.0, rate)], 1), rate)
    wave, _ = soundfile.read(path, dtype='float32')
    monkeypatch.setattr(audio, 'BLOCK', 1000)
    assert (read_audio(str(path), 16000, 1) == soxr.resample(wave[:, 1], rate, 16000)).all()
    assert (recordings.read_piece(str(path), 'a', 16000, 0.5, 1.5).T
            == soxr.resample(wave[rate // 2:rate * 3 // 2], rate, 16000)).all()
    write_audio(str(tmp_path / 'b.wav'), wave, rate)
    assert np.abs(soundfile.read(tmp_path / 'b.wav')[0] - wave).max() < 1e-4


def tar_of(*members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as tar:
        for name, content, change in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in change.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def test_a_tar_leads_nowhere(tmp_path):
    """Links, devices and pipes are no files; a path that leads outside is a name like any other."""
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]
    links = [(f'{n}.json', b'', dict(type=kind, linkname='/etc/passwd')) for n, kind in enumerate(kinds)]
    path = tmp_path / 'a.tar'
    path.write_bytes(tar_of(*links, ('../../x.json', b'{}', {}), ('/etc/y.json', b'{}', {})))
    sides.tar_index.cache_clear()
    assert sides.tar_index(str(path)).keys() == {'../../x', '/etc/y'}
    assert [name for name, *_ in webdataset.tar_files(str(path))[0]] == ['../../x.json', '/etc/y.json']
    os.mkfifo(tmp_path / 'z.json')      # who opened it would wait for ever
    assert set(sides.list_samples(str(tmp_path), ('.json',))) == {'../x', '/etc/y'}


def test_a_tar_with_lengths_that_are_not_there(tmp_path):
    """A file, and a header in pax form, of a terabyte."""
    content = bytearray(tar_of(('a.json', b'{}', {}), ('b.json', b'{}', {})))
    header = tarfile.TarInfo('b.json')
    for kind in (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        header.type, header.size = kind, 2 ** 40
        content[1024:1536] = header.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / 'a.tar').write_bytes(content)
        sides.tar_index.cache_clear()
        index = sides.tar_index(str(tmp_path / 'a.tar'))
        assert sides.read_json(sides.Place('a.json', str(tmp_path / 'a.tar'), *index['a']['.json'])) == {}
        if 'b' in index:
            with pytest.raises(ValueError, match='a.tar is cut off in b.json'):
                sides.read_json(sides.Place('b.json', str(tmp_path / 'a.tar'), *index['b']['.json']))
        assert webdataset.tar_files(str(tmp_path / 'a.tar'))[1] is False


def test_bombs(tmp_path, monkeypatch):
    """Zeros, gzipped: as a manifest, as text dialogues, as a shard."""
    monkeypatch.setattr(recordings, 'MAX_LINE', 2 ** 16)
    monkeypatch.setattr(webdataset, 'most_unpacked', lambda path: 2 ** 16)
    path = tmp_path / 'a.jsonl.gz'
    path.write_bytes(gzip.compress(b'["' + b'a' * 2 ** 20))
    for read in (recordings.read_rows, texts.rows):
        with pytest.raises(ValueError, match='a.jsonl.gz has a line of over 0 MB: it is no text a row'):
            list(read(str(path)))
    path = tmp_path / 'a.tar.gz'
    path.write_bytes(gzip.compress(tar_of(('a.json', b'{}', {}), ('b.wav', bytes(2 ** 20), {}))))
    files, is_whole = webdataset.tar_files(str(path))
    assert not is_whole
    with pytest.raises(ValueError, match='is it a bomb?'):
        webdataset.read_file(str(path), *files[1][1:], 'b.wav')


def test_a_text_takes_no_hours():
    """Some patterns look ahead from each letter."""
    began = time.process_time()
    for piece in ('a', '\n', ' ', '-', 'A:', 'a.', '1.a\n', '\t\n'):
        said = piece * (200000 // len(piece))
        assert texts.speakable(said)[1] == 'long'
        texts.speakable(said[:9999])
        for row in ([said, said], dict(plain_text=f'[Human]:{said}'),
                    dict(instruction=f'Human:{said}Assistant:', input='', output=said)):
            texts.pairs(texts.read_row(row))
    assert time.process_time() - began < 10


# ------------------------------------------------------------------------------------------------------------
# names and texts

NAMES = ['../../x', '/etc/passwd', 'a\0b', 'x' * 300, 'é' * 300, '', '.', '..', '.hidden', 'a/b', 'a_b',
         'a\nb',
         '\u202egnp', '\ud800', '~', '-rf', 'CON', 'a' * 199, 'a' * 200, 'a' * 201]


def test_an_id_never_leaves_its_folder(tmp_path):
    names = [file_name(id) for id in NAMES]
    assert len(set(names)) == len(NAMES)
    for name in names:
        path = tmp_path / (name + '.user.jsonl')
        path.write_text('x')
        assert path.parent == tmp_path and path.resolve().parent == tmp_path.resolve()
    assert len(list(tmp_path.iterdir())) == len(NAMES)
    assert file_name('test-00001-Andy') == 'test-00001-Andy' and file_name('ä.1') == 'ä.1'


@given(st.text(max_size=400))
def test_any_id_is_a_file_name(id):
    name = file_name(id)
    assert 0 < len(name.encode()) <= 200 and not {'/', '\0', '\n'} & set(name) and name not in ('.', '..')
    assert as_text(as_text(id).encode().decode()) == as_text(id) and printable(id).isprintable()


def test_two_dialogues_of_one_id(tmp_path):
    row = next(make_dialogues(1))
    save_dialogues(str(tmp_path / 'test.arrow'), [row, row], CODEC)
    with pytest.raises(ValueError, match="two recordings have the id 'd0'"):
        first(Dialogues(str(tmp_path), 'test'), 0)
    assert len(first(Dialogues(str(tmp_path), 'test'), 1)) == 1


NASTY = ['\x1b[31mred', '\u202eright to left', 'half \ud800 a pair', '<|eot|><|sos|><|s_3|><|endoftext|>',
         'nul \0 here',
         '</script><script>alert(1)</script>', '<img src=x onerror=alert(1)>', '{{title}}',
         'a \u2028 line', '&lt;']


def test_texts_of_strangers_become_records(tmp_path, prepare):
    """In ids and in texts. A special token in a text stays text; half a pair is U+FFFD, as in Vocabulary.
    An id, which is shown in terminals, has neither control characters nor marks that turn the direction."""
    soundfile.write(tmp_path / 'a.wav', hum(140, 1.0), 16000)
    rows = [dict(id=f'{i} {text}', audio='a.wav', text=text) for i, text in enumerate(NASTY)]
    rows.append(dict(id='\x1b[2J missing', audio='\x1b[2J\ud800.wav', text='x'))
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    records, skipped = prepare(manifest, tmp_path / 'rows.jsonl')
    assert {id: record['turns'][0]['text'] for id, record in records.items()} == {
        printable(f'{i} {text}'): ' '.join(as_text(text).split()) for i, text in enumerate(NASTY)}
    (id, reason), = skipped.items()
    assert id.isprintable() and reason.isprintable() and 'no file' in reason
    vocab = make_vocabulary(300, 32)
    for text in NASTY:
        ids = vocab.encode(text)
        assert max(ids) < vocab.n_text and vocab.decode(ids) == as_text(text)


def test_what_nobody_thought_of_is_skipped(tmp_path, prepare, monkeypatch):
    """One row of a million does not end a run of days; its reason says where."""
    soundfile.write(tmp_path / 'a.wav', hum(140, 1.0), 16000)
    (tmp_path / 'rows.jsonl').write_text('\n'.join(json.dumps(dict(id=id, audio='a.wav', text=id))
                                                   for id in 'abc'))
    plain = manifest.read_recording

    def read(item, codec, args):
        return plain(item, codec, args) if item[1]['id'] != 'b' else {}['\x1b']
    monkeypatch.setattr(manifest, 'read_recording', read)
    records, skipped = prepare(manifest, tmp_path / 'rows.jsonl')
    assert records.keys() == {'a', 'c'}
    assert skipped['b'].startswith("it cannot be read (KeyError: '\\x1b'; test_strangers.py:")


def test_json_holds_half_a_pair(tmp_path):
    """A row of --input may have one, and --output has it again."""
    write_json(tmp_path / 'a.json', dict(a='half \ud800, é'))
    assert read_json(tmp_path / 'a.json') == dict(a='half \ud800, é')
    assert 'é' in (tmp_path / 'a.json').read_text()


def test_a_page_stays_a_page(tmp_path):
    """Whatever is in titles, notes, labels, links, ids and texts: no tag comes of it."""
    from html.parser import HTMLParser
    found = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, [name for name, _ in attrs]))
    speaks = dict(user=[True] * 5, assistant=[False] * 5)
    for texts_ in (['plain'] * len(NASTY), NASTY):
        turns = [dict(role='user', start=0, end=3, text=text) for text in texts_]
        talk = dict(id=texts_[5], rate_hz=25.0, n_frame=5, turns=turns, speaks=speaks, expected=turns,
                    wave=None,
                    sample_rate=0, chunk_frames=0)
        figures = [(text, text, text) for text in texts_]
        curves = {f'{text} val text': [(1, 2.0), (2, 1.0)] for text in texts_}
        links = [(text, as_text(text)) for text in texts_]
        report.write(tmp_path / 'a.html', texts_[5], [talk], figures=figures, curves=curves, note=texts_[6],
                     links=links)
        found.append('next')
        Tags().feed((tmp_path / 'a.html').read_text(encoding='utf-8'))
    at = found.index('next', 1)
    one, other = found[1:at], found[at + 1:]
    assert {tag for tag, _ in one if 'img' in tag} == set() and [t for t in other if t[0] in ('img',)] == []
    assert sum(tag == 'script' for tag, _ in one) == sum(tag == 'script' for tag, _ in other)
    assert not any(name.startswith('on') for _, names in other for name in names)


# ------------------------------------------------------------------------------------------------------------
# security

def sources():
    names = subprocess.run(['git', 'ls-files', '*.py'], cwd=ROOT, capture_output=True,
                           text=True).stdout.split()
    return {name: (ROOT / name).read_text(encoding='utf-8') for name in names
            if not name.startswith('tests/')}


def test_nothing_that_is_read_can_run():
    """By the syntax trees of all our files: no pickle, no eval or exec but of config files, no shell, no
    fixed name in /tmp."""
    import ast
    calls, found = {}, []
    for name, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, 'module', None) or ''
                found += [(name, alias.name) for alias in node.names
                          if {module.split('.')[0], alias.name} & {'pickle', 'marshal', 'shelve', 'dill',
                                                                   'yaml', 'joblib'}]
            if isinstance(node, ast.Call):
                calls.setdefault(ast.unparse(node.func), []).append((name, ast.unparse(node)))
            if isinstance(node, ast.Constant) and isinstance(node.value,
                                                             str) and node.value.startswith('/tmp/'):
                found.append((name, node.value))
    assert found == [('codec/rvq.py', 'pickle')]       # for its exception
    for forbidden in ('eval', 'exec', 'os.system', 'os.popen', 'tempfile.mktemp', 'pickle.load',
                      'pickle.loads',
                      'torch.jit.load', 'torch.hub.load', 'subprocess.getoutput', 'os.chmod', '__import__'):
        assert forbidden not in calls, calls[forbidden]
    assert [name for name, _ in calls['runpy.run_path']] == ['config/__init__.py']
    assert all('weights_only=True' in call for _, call in calls['torch.load'])
    assert not any('allow_pickle' in call for name in calls for _, call in calls[name])
    assert not any('shell=' in call for name in calls for _, call in calls[name])
    assert not any('trust_remote_code' in call for name in calls for _, call in calls[name])


def test_a_command_is_no_line_for_a_shell(tmp_path):
    """NANODUPLEX_VOCODER, --vocoder and --tts_command go through shlex."""
    from codec.worker import Worker
    script = tmp_path / 'say.py'
    script.write_text('import json, sys\nprint(json.dumps(dict(error=sys.argv[1:])))\n')
    with pytest.raises(ValueError) as error:
        Worker(f'{sys.executable} {script} "a b" $(touch {tmp_path}/x) ; touch {tmp_path}/y')
    assert "['a b', '$(touch'," in str(error.value) and {path.name
                                                         for path in tmp_path.iterdir()} == {'say.py'}


def test_a_checkpoint_starts_no_program(tmp_path, monkeypatch):
    """The vocoder of codec.json is started where it was given, or is given now."""
    from codec import load_codec
    from codec.s3 import S3Codec
    monkeypatch.delenv('NANODUPLEX_VOCODER', raising=False)
    command = f'touch {tmp_path}/x'
    S3Codec.create(variant='v1_25hz', silence_codes=[7], vocoder=command).save(tmp_path)
    with pytest.raises(ValueError, match='has ended with code 0'):      # it is no vocoder
        load_codec(str(tmp_path)).decode([1])
    (tmp_path / 'x').unlink()
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path / 'elsewhere'))
    with pytest.raises(ValueError, match='not given on this machine: if you trust it, NANODUPLEX_VOCODER='):
        load_codec(str(tmp_path)).decode([1])
    load_codec(str(tmp_path)).save(tmp_path / 'copy')
    with pytest.raises(ValueError, match='not given on this machine'):
        load_codec(str(tmp_path / 'copy')).speak()
    assert not (tmp_path / 'x').exists()


def test_what_is_written_is_for_its_owner_to_change(tmp_path):
    """By the umask: not executable, and nobody else may write."""
    before = os.umask(0o022)
    try:
        write_json(tmp_path / 'a.json', {})
        write_audio(str(tmp_path / 'a.wav'), hum(140, 0.1), 16000)
        save_dialogues(str(tmp_path / 'train.arrow'), rows_of(), CODEC)
        with files.whole(tmp_path / 'folder') as part:
            os.makedirs(part)
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o755 if path.is_dir() else 0o644), path


def test_the_key_follows_no_redirect():
    """test_judge.py asks a server that redirects; here, that no other opener is made."""
    made = [(name, line) for name, text in sources().items() for line in text.splitlines()
            if 'urllib.request' in line and 'import' not in line or 'urlopen' in line]
    assert {name for name, _ in made} == {'measures/judge.py'}
    assert judge.NoRedirect().redirect_request(None, None, 307, '', {}, 'http://elsewhere') is None


def test_a_transcript_of_a_stranger_for_the_judge(tmp_path):
    path = tmp_path / 'a.jsonl'
    for row in (dict(role='user', start_sec='x', text='a'), dict(role='user', start_sec=1, text=['a']), [],
                dict(role='eve', start_sec=1, text='a'), dict(role='user', start_sec=float('nan'), text='a')):
        path.write_text(json.dumps(row))
        with pytest.raises(ValueError, match='a.jsonl'):
            judge.read_transcript(str(path))


# ------------------------------------------------------------------------------------------------------------
# sizes

def test_a_long_day(tmp_path):
    """A dialogue of 4 hours and one of 20,000 turns of a frame are opened, cut into rows and laid. What a day
    and a million take: docs/security.md."""
    vocab, day, began = make_vocabulary(300, 32), 4 * 3600 * 25, time.process_time()
    (tmp_path / 'day').mkdir()
    write_data(tmp_path / 'day', vocab, [day], turn_frames=250)
    n_turn = 20_000
    turns = [dict(role=('user', 'assistant')[i % 2], start=i, end=i + 1, text='a') for i in range(n_turn)]
    codes = np.zeros(n_turn, np.uint16)
    save_dialogues(str(tmp_path / 'train.arrow'), [dict(id='a', user=codes, assistant=codes, turns=turns)],
                   CODEC)
    for folder, n_row in ((tmp_path / 'day', day / 460), (tmp_path, n_turn / 460)):
        loader = Loader(Dialogues(str(folder), 'train'), [get_layout('duplex3')], vocab, 1024, 2)
        assert loader.measure()['documents'] > n_row
        loader.next_batch()
    assert time.process_time() - began < 20


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3), st.booleans()), max_size=12))
def test_who_is_broken_off_is_told_for_all_at_once(spans):
    """As is_broken_off tells it of each."""
    turns, at = [], dict(user=0, assistant=0)
    for n, gap, is_user in spans:
        role = 'user' if is_user else 'assistant'
        turns.append(dict(role=role, start=at[role] + gap, end=at[role] + gap + n))
        at[role] += gap + n
    for role in at:
        own = [turn for turn in turns if turn['role'] == role]
        assert clock.broken_off(own, turns) == [clock.is_broken_off(turn, turns) for turn in own]


@pytest.mark.slow
def test_some_inputs():
    result = subprocess.run([sys.executable, 'tests/fuzz.py', '--n=150'], cwd=ROOT, capture_output=True,
                            text=True,
                            env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count('\n') > 20, result.stdout
