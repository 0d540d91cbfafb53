"""Shards in WebDataset's form: any sample of any tar, whole or not."""
import gzip
import io
import json
import shutil
import sys
import tarfile

import numpy as np
import pytest
from test_corpora import check_reasons, turns
from test_words_in import ALIGNMENTS, TALK, long_textgrid

from data.made_up import hum
from data.webdataset import prepare as shards

soundfile = pytest.importorskip('soundfile')
webdataset = pytest.importorskip('webdataset')


def audio(*waves, format='flac', rate=16000):
    subtype = dict(flac='PCM_16', wav='PCM_16', mp3='MPEG_LAYER_III', ogg='VORBIS', opus='OPUS')[format]
    file = io.BytesIO()
    container = 'ogg' if format == 'opus' else format
    soundfile.write(file, np.stack(waves, 1), rate, format=container, subtype=subtype)
    return file.getvalue()


def write_tar(path, *files):
    """[(name, str, bytes or what becomes JSON)] in this order"""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, content in files:
            content = json.dumps(content) if isinstance(content, dict | list) else content
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


ONE = audio(hum(140, 1.0))      # 25 frames


def said(records):
    return {id: turns(record) for id, record in records.items()}


def test_all_forms_of_a_sample(tmp_path, prepare, small_codec):  # noqa: F811
    """The shards lie in folders of their own; the keys are those that webdataset itself gives."""
    files = [('./f.flac', ONE), ('./f.json', dict(text='flac')), ('__meta__/f.flac', ONE), ('README', 'hm'),
             ('a/w.WAV', audio(hum(140, 1.0), format='wav')), ('a/w.txt', 'wav\n'),
             ('a/m.mp3', audio(hum(140, 1.0), format='mp3')),
             ('a/m.json', dict(text='a calm voice', transcript='mp3'))]
    first = write_tar(tmp_path / 'en/0.tar', *files)
    write_tar(tmp_path / 'de/0.tar', ('o.json', dict(text='a voice', transcription='ogg', other=1)),
              ('o.ogg', audio(hum(140, 1.0), format='ogg')),
              ('p.opus', audio(hum(140, 1.0, rate=48000), format='opus', rate=48000)),
              ('p.json', dict(text=['opus'])))
    records, skipped = prepare(shards, f'{first}::{tmp_path}/de/*.tar')
    assert not skipped and said(records) == {
        id: [('user', 0, 25, text)] for id, text in {
            'en/0/f': 'flac', 'en/0/a/w': 'wav', 'en/0/a/m': 'mp3',
            'de/0/o': 'ogg', 'de/0/p': 'opus'}.items()}
    wave = soundfile.read(io.BytesIO(ONE), dtype='float32')[0]
    assert (records['en/0/f']['user'] == small_codec.encode(wave)).all()
    assert not len(records['en/0/f']['assistant'])
    theirs = {sample['__key__'].removeprefix('./') for sample in webdataset.WebDataset(
        str(first), shardshuffle=False, empty_check=False)}
    assert theirs == {id.removeprefix('en/0/') for id in records if id.startswith('en')}
    records, _ = prepare(shards, first, '--role=assistant')
    assert said(records)['0/f'] == [('assistant', 0, 25, 'flac')]


def test_braces_and_gzip_and_a_second_run(tmp_path, prepare, monkeypatch, capsys):  # noqa: F811
    """The same samples plain and gzipped, in parts of two; whatever order they are read in, a shard is
    unpacked once. The second run of the command has nothing to do."""
    unpacked, unpack = [], shards.unpack
    monkeypatch.setattr(shards, 'unpack', lambda path: unpacked.append(path) or unpack(path))
    for shard in range(3):
        write_tar(tmp_path / f's-{shard:03d}.tar', *(
            pair for n, key in enumerate('abc') for pair in (
                (f'{key}.flac', audio(hum(100 + 30 * shard + 10 * n, 1.0))),
                (f'{key}.json', dict(text=f'{key} {shard}')))))
    plain, _ = prepare(shards, str(tmp_path / 's-{000..002}.tar'), '--part=2')
    assert said(plain) == {f's-{shard:03d}/{key}': [('user', 0, 25, f'{key} {shard}')]
                           for shard in range(3) for key in 'abc'}
    (tmp_path / 'packed').mkdir()
    for path in tmp_path.glob('*.tar'):
        (tmp_path / f'packed/{path.name}.gz').write_bytes(gzip.compress(path.read_bytes()))
    unpack.cache_clear()
    pattern = str(tmp_path / 'packed/s-{000..002}.tar.gz')
    packed, _ = prepare(shards, pattern, '--part=2')
    assert said(packed) == said(plain) and unpack.cache_info().misses == 3 < len(unpacked)
    assert all((packed[id]['user'] == plain[id]['user']).all() for id in plain)
    capsys.readouterr()
    shards.main()       # the command of the last prepare
    assert 'is prepared already' in capsys.readouterr().out
    for pattern in 's-{000..003}.tar', '*.tgz':
        with pytest.raises(ValueError, match='no file .*(s-003.tar|[*].tgz)$'):
            prepare(shards, tmp_path / pattern)

def test_bad_samples_are_named(tmp_path, prepare, capsys):  # noqa: F811
    path = write_tar(
        tmp_path / 'bad.tar', ('good.flac', ONE), ('good.json', dict(text='good')), ('one.flac', ONE),
        ('one.json', dict(text=['a dog barks'])), ('late.txt', 'late'),
        ('silent.json', dict(text='x')), ('mute.flac', ONE), ('mute.json', dict(caption='a dog')),
        ('many.flac', ONE), ('many.json', dict(text=['a dog', 'barks'])), ('twice.flac', ONE),
        ('twice.txt', 'x'),
        ('twice.flac', ONE), ('v.1.flac', ONE), ('v.2.flac', ONE), ('v.txt', 'x'), ('noise.flac', 'no audio'),
        ('noise.txt', 'x'), ('json.flac', ONE), ('json.json', '{'), ('list.flac', ONE), ('list.json', ['x']),
        ('two.flac', audio(hum(140, 1.0), hum(220, 1.0))), ('two.txt', 'two'), ('late.flac', ONE))
    records, skipped = prepare(shards, path)
    assert said(records) == {f'bad/{key}': [('user', 0, 25, text)] for key, text in (
        ('good', 'good'), ('one', 'a dog barks'), ('late', 'late'))}
    reasons = dict(
        silent='bad.tar, silent, has no audio (flac, mp3, wav, ogg, opus)',
        mute='mute, has no text under transcription or transcript or text, nor a .txt; --text_field=NAME',
        many="has ['a dog', 'barks'] under", twice='bad.tar has twice.flac and twice.flac for twice',
        v='has v.1.flac and v.2.flac for v, and one can be taken; a name ends at its first dot',
        noise='noise.flac is not audio', json='json.json is no JSON', list='list.json is no JSON object',
        two='has 2 channels: --channel=0 or 1 takes one as an utterance; --user_channel')
    check_reasons(skipped, {f'bad/{key}': reason for key, reason in reasons.items()})
    assert 'note: in 1 recordings the text is a list of one' in capsys.readouterr().out
    assert said(prepare(shards, path, '--text_field=caption')[0]) == {'bad/mute': [('user', 0, 25, 'a dog')]}
    assert 'bad/two' in prepare(shards, path, '--channel=0')[0]
    assert prepare(shards, path, '--channel=1')[0].keys() == {'bad/two'}


@pytest.mark.parametrize('pack', [False, True])
def test_truncated_shards(tmp_path, prepare, pack):  # noqa: F811
    """Cut in b's audio, between two files, in a header, and in the first file; and no tar at all. The whole
    one is read to its end."""
    files = [('a.flac', ONE), ('a.txt', 'a'), ('b.flac', audio(hum(220, 1.0))), ('b.txt', 'b')]
    content = write_tar(tmp_path / 'whole.tar', *files).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        b = tar.getmember('b.flac')
    suffix = '.tar.gz' if pack else '.tar'
    for name, end in dict(audio=b.offset_data + 9, between=b.offset, header=b.offset + 99, early=600).items():
        (tmp_path / f'{name}{suffix}').write_bytes(gzip.compress(content[:end]) if pack else content[:end])
    (tmp_path / f'none{suffix}').write_bytes(b'\x1f\x8b no gzip' if pack else b'no tar')
    if pack:    # the file itself is cut: not a byte of the last sample is known to be right
        packed = gzip.compress(content)
        (tmp_path / 'packed.tar.gz').write_bytes(packed[:-len(packed) // 4])
    shards.unpack.cache_clear()
    records, skipped = prepare(shards, f'{tmp_path}/*.tar*')
    assert records.keys() == {'whole/a', 'whole/b', 'audio/a', 'between/a', 'header/a'} | (
        {'packed/a'} if pack else set())
    reasons = {'audio': f'audio{suffix} is cut off or damaged after b.flac: what follows is lost',
               'audio/b': f'audio{suffix} is cut off in b.flac',
               'between': 'is cut off or damaged after a.txt',
               'header': 'is cut off or damaged after a.txt', 'none': 'is no tar',
               'early': 'is cut off or damaged after a.flac', 'early/a': 'is cut off in a.flac'}
    if pack:
        reasons |= {'packed': 'is cut off or damaged after b.flac', 'packed/b': 'is cut off in b.flac'}
    check_reasons(skipped, reasons)


def test_words_and_dialogues(tmp_path, prepare):  # noqa: F811
    pytest.importorskip('praatio')
    stereo = audio(hum(140, 2.0), hum(220, 2.0))
    hello, hi = TALK.values()
    path = write_tar(
        tmp_path / 'talks.tar', ('moshi.flac', stereo),
        ('moshi.json', dict(alignments=ALIGNMENTS, lang='en')),
        ('grid.flac', stereo), ('grid.TextGrid', long_textgrid(**{'A - words': hello, 'B - words': hi})),
        ('ctm.flac', stereo), ('ctm.ctm', 'x A 0.2 0.4 hello\nx A 0.6 0.4 there\nx B 1.2 0.3 hi\n'),
        ('mono.flac', ONE), ('mono.txt', 'Hello, there!'), ('mono.TextGrid', long_textgrid(words=hello)),
        ('none.flac', stereo), ('none.txt', 'x'))
    records, skipped = prepare(shards, path, '--user_channel=1', '--assistant_speakers=B')
    assert said(records) == {f'talks/{key}': [('user', 5, 25, 'hello there'), ('assistant', 30, 38, 'hi')]
                             for key in ('moshi', 'grid', 'ctm')}
    check_reasons(skipped, {
        'talks/mono': 'talks.tar, mono, has 1 channels; with --user_channel each sample is a dialogue of two',
        'talks/none': 'talks.tar, none, has no times of words'})
    records, _ = prepare(shards, path)
    assert records['talks/mono']['words'] == [[
        dict(text='Hello,', start=5, end=15), dict(text='there!', start=15, end=25)]]


def test_only_files_are_read(tmp_path, prepare, monkeypatch):  # noqa: F811
    """webdataset would give "pipe:" to a shell."""
    for url in f'pipe:touch {tmp_path}/was_run', 'http://127.0.0.1:9/a.tar':
        with pytest.raises(ValueError, match='is no file: only files are read, no commands are run'):
            prepare(shards, url)
    assert not (tmp_path / 'was_run').exists()
    path = write_tar(tmp_path / 'a.tar', ('a.flac', ONE), ('a.txt', 'a'))
    shutil.copy(path, tmp_path / 'a.tar.gz')
    with pytest.raises(ValueError, match='are both called a; keep one'):
        prepare(shards, f'{path}::{path}.gz')
    monkeypatch.setitem(sys.modules, 'webdataset.shardlists', None)
    with pytest.raises(ValueError, match='pip install webdataset'):
        prepare(shards, path)


def test_help_shows_the_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['prepare.py', '--help'])
    with pytest.raises(SystemExit):
        shards.main()
    assert 'python data/webdataset/prepare.py' in capsys.readouterr().out


def test_a_shard_without_a_file(tmp_path):
    """A folder alone, and then no header; and a tar of nothing at all, which is whole."""
    with tarfile.open(tmp_path / 'folder.tar', 'w') as tar:
        folder = tarfile.TarInfo('a')
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    content = (tmp_path / 'folder.tar').read_bytes()
    (tmp_path / 'folder.tar').write_bytes(content[:512] + b'no header' * 99)
    write_tar(tmp_path / 'nothing.tar')
    items = shards.list_items([str(tmp_path / '*.tar')])
    assert items.keys() == {'folder'} and 'cut off or damaged after its start' in items['folder']
