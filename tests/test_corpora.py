"""
Corpora in: what lies in a corpus's files comes out as dialogues, what cannot be read is left out with a
reason, and nothing in a manifest is run.
"""
import copy
import gzip
import json
import sys
from argparse import Namespace

import numpy as np
import pytest
from conftest import ROOT

from codec.s3 import S3Codec
from data.codes import prepare as codes
from data.lhotse import prepare as lhotse_cuts
from data.made_up import hum
from data.manifest import prepare as manifest
from data.moshi_finetune import prepare as moshi
from flatten import flatten, get_layout, unflatten
from vocabulary import Vocabulary

soundfile = pytest.importorskip('soundfile')
pytest.importorskip('soxr')

REAL = ROOT / '../shared/data'
real = pytest.mark.skipif(not REAL.is_dir(), reason='no ../shared/data')


@pytest.mark.parametrize('content, message', [
    (None, '^no file .*a.jsonl$'),
    (json.dumps([dict(audio='a.wav', text='Hi.')] * 3, indent=1), 'none of its 14 lines is a JSON object'),
    ('RIFF\0\0\n\0', 'none of its 2 lines is a JSON object; JSON lines are expected'),
])
def test_a_file_that_is_no_manifest(prepare, tmp_path, content, message):
    if content is not None:
        (tmp_path / 'a.jsonl').write_text(content)
    for module in (manifest, moshi, lhotse_cuts, codes):
        with pytest.raises(ValueError, match=message):
            prepare(module, tmp_path / 'a.jsonl')
    with pytest.raises(ValueError, match='^no file .*a.json$'):
        prepare(lhotse_cuts, tmp_path / 'a.json')


def write_rows(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    content = ''.join(line + '\n' for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == '.gz' else content)
    return path


def write_wav(path, *waves, rate=16000):
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, np.stack(waves, 1), rate, subtype='PCM_16')
    return soundfile.read(path, dtype='float32', always_2d=True)[0].T


def turns(record):
    return [(turn['role'], turn['start'], turn['end'], turn['text']) for turn in record['turns']]


def check_reasons(skipped, reasons):
    """Just these were skipped, each for a reason that says what is expected."""
    assert skipped.keys() == reasons.keys(), skipped
    assert all(reason in skipped[id] for id, reason in reasons.items()), skipped


# ------------------------------------------------------------------------------------------------------------
# manifest

def test_rows_of_all_names_become_utterances_and_bad_ones_are_named(tmp_path, prepare, small_codec):
    """1 s at 16 kHz is 25 frames. A piece of a file is that piece alone: encoded as if it were a file."""
    wave, = write_wav(tmp_path / 'wavs/a.wav', hum(140, 1.0))
    write_wav(tmp_path / 'wavs/two.wav', hum(140, 1.0), hum(220, 1.0))
    (tmp_path / 'wavs/broken.wav').write_bytes(b'RIFF, or so it seems')
    path = write_rows(tmp_path / 'rows.jsonl.gz', [
        {'audio': 'wavs/a.wav', 'text': 'one'},
        {'key': 'k', 'wav': '/gone/wavs/a.wav', 'txt': '二'},
        {'id': 7, 'audio_filepath': 'wavs/a.wav', 'offset': 0.2, 'duration': 0.4, 'text': 'a piece'},
        '{"audio": ',
        {'audio': 'wavs/a.wav'},
        {'id': 'late', 'audio': 'wavs/a.wav', 'offset': 3, 'text': 'x'},
        {'id': 'long', 'audio': 'wavs/a.wav', 'duration': 9, 'text': 'x'},
        {'id': 'two', 'audio': 'wavs/two.wav', 'text': 'x'},
        {'id': 'broken', 'audio': 'wavs/broken.wav', 'text': 'x'},
        {'id': 'url', 'audio': 'http://host/a.wav', 'text': 'x'},
        {'id': 'none', 'audio': 'wavs/b.wav', 'text': 'x'},
    ])
    records, skipped = prepare(manifest, path)
    assert {id: turns(record) for id, record in records.items()} == {
        'rows.jsonl.gz, row 1': [('user', 0, 25, 'one')],
        'k': [('user', 0, 25, '二')],
        '7': [('user', 0, 10, 'a piece')]}
    assert (records['k']['user'] == small_codec.encode(wave)).all() and len(records['k']['assistant']) == 0
    assert (records['7']['user'] == small_codec.encode(wave[3200:9600])).all()
    check_reasons(skipped, {
        'rows.jsonl.gz, row 4': 'no JSON object',
        'rows.jsonl.gz, row 5': 'has no text under text or transcript or txt; --text_field=NAME',
        'late': 'is 1.00 s long; there is nothing from 3',
        'long': '1.00 s long, but 9.00 s by its manifest',
        'two': 'has 2 channels; --channel=N says which, 0 to 1',
        'broken': 'not audio',
        'url': 'no path',
        'none': 'no file'})

    records, skipped = prepare(manifest, path, '--role=assistant', '--channel=0')
    assert {'two', 'k'} < records.keys()
    assert turns(records['two']) == [('assistant', 0, 25, 'x')] and len(records['two']['user']) == 0
    records, skipped = prepare(manifest, path, '--channel=1')
    assert records.keys() == {'two'} and 'has no --channel=1: it has 1, counted from 0' in skipped['k']


def test_nothing_is_called_none():
    with pytest.raises(ValueError, match='^row 1, has no text$'):
        codes.take_text(dict(text=None), 'text', 'row 1')
    with pytest.raises(ValueError, match='^row 1, has no codes: '):
        codes.take_codes({}, 'codes', Namespace(codes='codes'), None, 'row 1')
    args = Namespace(user_speakers=['user'], assistant_speakers=['agent'])
    with pytest.raises(ValueError, match='^row 1, has a turn without a speaker; --user_speakers'):
        lhotse_cuts.role_of(Namespace(speaker=None, channel=None), [0, 1], {}, args, 'row 1')


def test_two_rows_of_one_id_are_refused(tmp_path):
    with pytest.raises(ValueError, match="id 'a'"):
        manifest.list_items(str(write_rows(tmp_path / 'rows.jsonl', [{'id': 'a'}, {'id': 'a'}])))


@real
def test_data_list_of_wenet(prepare):
    """The paths begin with test/resources/dataset, which is nowhere; their end is in the list's folder."""
    records, skipped = prepare(manifest, REAL / 'speech/data.list')
    texts = [turn['text'][:6] for record in records.values() for turn in record['turns']]
    assert not skipped and sorted(texts) == ['IT WAS', '广州市房地产']
    # 68,496 and 139,680 samples of 640
    assert sorted(len(record['user']) for record in records.values()) == [108, 219]


# ------------------------------------------------------------------------------------------------------------
# moshi-finetune

def test_moshi_words_become_turns_at_pauses(tmp_path, prepare, small_codec):
    assistant, user = write_wav(tmp_path / 'stereo/a.wav', hum(140, 3.0), hum(220, 3.0))
    for name in 'bcd':
        write_wav(tmp_path / f'stereo/{name}.wav', hum(140, 1.0), hum(220, 1.0))
    words = [['Hello', [0.2, 0.6], 'SPEAKER_MAIN'], ['there.', [0.7, 1.0], 'SPEAKER_MAIN'],
             ['好', [2.0, 2.2], 'SPEAKER_MAIN'], ['的。', [2.2, 2.4], 'SPEAKER_MAIN'],
             ['Hi!', [1.2, 1.5], 'SPEAKER_01']]
    for name, content in ('a', {'alignments': words}), ('b', {'alignments': []}), ('c', {'words': []}):
        (tmp_path / f'stereo/{name}.json').write_text(json.dumps(content))
    rows = [{'path': f'stereo/{name}.wav', 'duration': n_sec}
            for name, n_sec in (('a', 3.0), ('b', 2.0), ('c', 1.0), ('d', 1.0))]
    path = write_rows(tmp_path / 'data.jsonl', [*rows, '?'])
    records, skipped = prepare(moshi, path)
    record, = records.values()
    assert turns(record) == [
        ('assistant', 5, 25, 'Hello there.'), ('user', 30, 38, 'Hi!'), ('assistant', 50, 60, '好的。')]
    assert record['words'][0] == [dict(text='Hello', start=5, end=15), dict(text='there.', start=17, end=25)]
    assert (record['user'] == small_codec.encode(user)).all()
    assert (record['assistant'] == small_codec.encode(assistant)).all()
    assert '1.00 s long, but 2.00 s by its manifest' in skipped['stereo/b']
    assert 'no alignments' in skipped['stereo/c']
    assert 'd.json' in skipped['stereo/d'] and 'row 5' in skipped['data.jsonl, row 5']

    records, _ = prepare(moshi, path, '--user_channel=0', '--assistant_speakers=SPEAKER_01', '--gap_sec=5')
    assert turns(records['stereo/a']) == [
        ('user', 5, 60, 'Hello there. 好的。'), ('assistant', 30, 38, 'Hi!')]
    assert (records['stereo/a']['user'] == small_codec.encode(assistant)).all()


def test_two_mono_files_in_place_of_a_stereo_file(tmp_path, prepare, small_codec):
    """b's assistant is 0.5 s shorter, c's 1.2 s, d's file has two channels, e lacks the assistant's."""
    waves = {}
    for name, n_sec in (('a', 2.0), ('b', 1.5), ('c', 0.8), ('d', 2.0), ('e', 2.0)):
        waves[name], = write_wav(tmp_path / f'talks/{name}.user.wav', hum(140, 2.0))
        channels = [hum(220, n_sec)] * (1 + (name == 'd'))
        if name != 'e':
            write_wav(tmp_path / f'talks/{name}.assistant.wav', *channels)
        words = [['Hi.', [0.2, 0.6], 'SPEAKER_MAIN']]
        (tmp_path / f'talks/{name}.json').write_text(json.dumps(dict(alignments=words)))
    rows = [dict(path=f'talks/{name}.wav', duration=2.0) for name in waves]
    records, skipped = prepare(moshi, write_rows(tmp_path / 'data.jsonl', rows))
    assert {id: (len(record['user']), len(record['assistant'])) for id, record in records.items()} == {
        'talks/a': (50, 50), 'talks/b': (50, 50)}
    assert (records['talks/a']['user'] == small_codec.encode(waves['a'])).all()
    assert turns(records['talks/b']) == [('assistant', 5, 15, 'Hi.')]
    check_reasons(skipped, {
        'talks/c': 'c.assistant.wav 0.80 s: the two files of a dialogue start together and differ by 1 s',
        'talks/d': 'd.assistant.wav has 2 channels, the file of one side has one',
        'talks/e': 'e.assistant.wav'})


def test_word_lists_of_spokenwoz_and_switchboard(tmp_path, prepare):
    words = [('A', 0.2, 0.6, 'Hi'), ('B', 1.0, 1.4, 'Hello'), ('B', 1.4, 1.8, '[laughter]')]
    for name in ('a', 'ms', 'sw02001', 'sw2002'):
        write_wav(tmp_path / f'{name}.wav', hum(140, 2.0), hum(220, 2.0))
    keys = dict(a=('word', 'start', 'end', 1), ms=('Word', 'BeginTime', 'EndTime', 1000))
    for name, (what, since, until, unit) in keys.items():
        (tmp_path / f'{name}.json').write_text(json.dumps([
            {'speaker': speaker, what: word, since: start * unit, until: end * unit}
            for speaker, start, end, word in words]))
    for side in 'AB':
        (tmp_path / f'sw2001{side}-ms98-a-word.text').write_text(''.join(
            f'sw2001{side}-ms98-a-0001 {start} {end} {word}\n'
            for speaker, start, end, word in words if speaker == side))
    (tmp_path / 'sw2002A-ms98-a-word.text').write_text('sw2002A-ms98-a-0001 0.0 hi\n')
    rows = [dict(path=f'{name}.wav') for name in ('a', 'ms', 'sw02001', 'sw2002')]
    path = write_rows(tmp_path / 'data.jsonl', rows)
    records, skipped = prepare(moshi, path, '--assistant_speakers=B')
    assert {id: turns(record) for id, record in records.items()} == dict.fromkeys(
        ['a', 'ms', 'sw02001'], [('user', 5, 15, 'Hi'), ('assistant', 25, 35, 'Hello')])
    check_reasons(skipped, dict(sw2002='word.text, row 1, is no word of Switchboard'))
    with pytest.raises(ValueError, match='speakers A, B, none of them the assistant: --assistant_speakers=B'):
        prepare(moshi, path)


# ------------------------------------------------------------------------------------------------------------
# lhotse

SAID = [('user', 0.2, 0.8, 'Hi <|0|> there <|3|>'), ('agent', 1.2, 0.6, 'Hello.')]


def recording(path, n_sec, channels=(0,), rate=16000, kind='file'):
    return dict(id=str(path), sources=[dict(type=kind, channels=list(channels), source=str(path))],
                sampling_rate=rate, num_samples=round(n_sec * rate), duration=n_sec)


def cut(id, user, assistant=None, n_sec=2.0, said=SAID, channel=0, kind='MonoCut', **more):
    supervisions = [
        dict(id=f'{id}-{i}', recording_id=id, start=start, duration=n, channel=where[0] if where else 0,
             text=text, speaker=speaker)
        for i, (speaker, start, n, text, *where) in enumerate(said)]
    custom = dict(custom=dict(target_audio=assistant)) if assistant else {}
    return dict(id=id, start=0, duration=n_sec, channel=channel, supervisions=supervisions, recording=user,
                type=kind, **custom, **more)


def nemo_docs(cut):
    """
    As NeMo's documentation prints a cut: path for sources, no type, supervisions without channel and
    recording_id.
    """
    def without(row, *names):
        return {key: value for key, value in row.items() if key not in names}

    def plain(recording):
        return dict(without(recording, 'sources'), path=recording['sources'][0]['source'])

    return dict(
        without(cut, 'type'), recording=plain(cut['recording']),
        supervisions=[without(said, 'channel', 'recording_id') for said in cut['supervisions']],
        custom=dict(target_audio=plain(cut['custom']['target_audio'])))


@pytest.fixture
def duplex(tmp_path):
    """Two seconds of two speakers, a file each, the assistant's at another rate and a sample short."""
    pytest.importorskip('lhotse')
    user, = write_wav(tmp_path / 'wavs/user.wav', hum(140, 2.0))
    assistant, = write_wav(tmp_path / 'wavs/agent.wav', hum(220, 2.0, rate=22050)[:-1], rate=22050)
    write_wav(tmp_path / 'wavs/both.wav', hum(140, 2.0), hum(220, 2.0))
    return recording('wavs/user.wav', 2.0), recording('wavs/agent.wav', 44099 / 22050, rate=22050), user


def test_both_forms_of_nemo_cuts_are_the_same_dialogue(tmp_path, prepare, duplex, small_codec):
    user, assistant, wave = duplex
    whole = cut('c', user, assistant)
    one, _ = prepare(lhotse_cuts, write_rows(tmp_path / 'lhotse.jsonl.gz', [whole]))
    other, _ = prepare(lhotse_cuts, write_rows(tmp_path / 'docs.jsonl', [nemo_docs(whole)]))
    (tmp_path / 'cuts.json').write_text(json.dumps([whole]))
    as_list, _ = prepare(lhotse_cuts, tmp_path / 'cuts.json')
    old, _ = prepare(lhotse_cuts, write_rows(tmp_path / 'old.jsonl', [whole | {'type': 'Cut'}]))
    assert str(one) == str(other) == str(as_list) == str(old)
    assert turns(one['c']) == [('user', 5, 25, 'Hi there'), ('assistant', 30, 45, 'Hello.')]
    assert len(one['c']['assistant']) == 50 and (one['c']['user'] == small_codec.encode(wave)).all()

    whole['supervisions'][1]['speaker'] = 'Bob'
    path = write_rows(tmp_path / 'bob.jsonl', [whole, cut('d', user, assistant)])
    reason = ("bob.jsonl, row 1, has a turn of speaker 'Bob'; --user_speakers and --assistant_speakers say "
              "who that is")
    assert prepare(lhotse_cuts, path)[1] == {'c': reason}
    assert prepare(lhotse_cuts, path, '--assistant_speakers=Bob,agent')[0].keys() == {'c', 'd'}


def test_truncated_cut_is_a_window_of_both_files(tmp_path, prepare, duplex, small_codec):
    """
    From 0.4 s to 1.4 s: the first turn began 0.2 s before, the second ends 0.4 s after. Lhotse does the
    truncation.
    """
    from lhotse import CutSet
    from lhotse.serialization import deserialize_item
    user, assistant, wave = duplex
    whole = deserialize_item(copy.deepcopy(cut('c', user, assistant)))
    window = whole.truncate(offset=0.4, duration=1.0, preserve_id=True)
    CutSet.from_cuts([window]).to_file(tmp_path / 'cuts.jsonl')
    assert json.loads((tmp_path / 'cuts.jsonl').read_text())['supervisions'][0]['start'] == -0.2
    records, _ = prepare(lhotse_cuts, tmp_path / 'cuts.jsonl')
    assert turns(records['c']) == [('user', 0, 15, 'Hi there'), ('assistant', 20, 25, 'Hello.')]
    assert (records['c']['user'] == small_codec.encode(wave[6400:22400])).all()
    assert len(records['c']['assistant']) == 25


def test_channels_of_a_stereo_recording_are_never_guessed(tmp_path, prepare, duplex, small_codec):
    said = [('A', 0.2, 0.8, 'Hi.', 0), ('B', 1.2, 0.6, 'Hello.', 1)]
    stereo = cut('s', recording('wavs/both.wav', 2.0, (0, 1)), said=said, channel=[0, 1], kind='MultiCut')
    path = write_rows(tmp_path / 'cuts.jsonl', [stereo, cut('m', duplex[0], said=said[:1])])
    records, skipped = prepare(lhotse_cuts, path)
    assert records.keys() == {'m'} and '--user_channel' in skipped['s']
    wave = soundfile.read(tmp_path / 'wavs/both.wav', dtype='float32')[0]
    for user, expected in (0, ['user', 'assistant']), (1, ['assistant', 'user']):
        records, skipped = prepare(lhotse_cuts, path, f'--user_channel={user}')
        assert skipped.keys() == {'m'} and [turn['role'] for turn in records['s']['turns']] == expected
        assert (records['s']['user'] == small_codec.encode(wave[:, user])).all()
        assert (records['s']['assistant'] == small_codec.encode(wave[:, 1 - user])).all()


def test_two_mono_sources_are_the_two_channels(tmp_path, prepare, duplex, small_codec):
    """As Lhotse writes two files of one dialogue: a recording of two sources, a channel each."""
    write_wav(tmp_path / 'wavs/other.wav', hum(220, 2.0))
    pair = dict(recording('wavs/user.wav', 2.0), channel_ids=[0, 1])
    pair['sources'] += recording('wavs/other.wav', 2.0, (1,))['sources']
    said = [('A', 0.2, 0.8, 'Hi.', 0), ('B', 1.2, 0.6, 'Hello.', 1)]
    path = write_rows(tmp_path / 'cuts.jsonl', [cut('s', pair, said=said, channel=[0, 1], kind='MultiCut')])
    records, _ = prepare(lhotse_cuts, path, '--user_channel=0')
    assert turns(records['s']) == [('user', 5, 25, 'Hi.'), ('assistant', 30, 45, 'Hello.')]
    assert (records['s']['user'] == small_codec.encode(duplex[2])).all()


def test_utterances_and_what_is_skipped(tmp_path, prepare, duplex):
    user = duplex[0]
    spoken = cut('u', user, said=[
        ('7169', 0.2, 0.8, 'Hi you'), ('2404', 1.2, 0.4, 'Yes'), ('2404', 1.7, 0.1, None)])
    bad = [
        cut('silent', user, said=[]),
        cut('agent', user),
        cut('gone', recording('wavs/gone.wav', 2.0)),
        cut('short', recording('wavs/user.wav', 5.0)),
        cut('mixed', user, kind='MixedCut'),
        cut('changed', dict(user, transforms=[{'name': 'Speed'}])),
        cut('odd', user) | {'duration': None},
        cut('nan', user, said=[('x', float('nan'), 1.0, 'x')]),
        cut('shar', recording('', 2.0, kind='shar')),
        {'id': 'empty'},
        cut('bare', None),
        {key: value for key, value in cut('features', user).items() if key != 'recording'},
        cut('mono', recording('wavs/both.wav', 2.0))]
    path = write_rows(tmp_path / 'cuts.jsonl', [spoken, *bad, 'x'])
    records, skipped = prepare(lhotse_cuts, path, '--role=assistant')
    assert turns(records.pop('u')) == [('assistant', 5, 25, 'Hi you'), ('assistant', 30, 40, 'Yes')]
    assert not records
    reasons = dict(
        silent='no supervision with a text',
        agent="turn of 'user', who is not in its audio",
        gone='no file',
        short='2.00 s long, but 5.00 s',
        mixed='MixedCut',
        changed='Speed',
        odd='TypeError',
        nan='not all finite',
        shar='give that folder',
        empty='TypeError',
        bare='has no recording, and so no audio: "lhotse cut simple -r RECORDINGS -s SUPERVISIONS CUTS"',
        features='or give the recordings themselves, with --supervisions=FILE',
        mono='has 2 channels, not [0]')
    assert {id: skipped.get(id) for id, reason in reasons.items() if reason not in skipped.get(id, '')} == {}
    assert len(skipped) == len(reasons) + 1       # and the x


def test_several_speakers_in_one_channel_are_noted(tmp_path, prepare, duplex, capsys):
    """Of c and d; e's two names are the user's by a setting, and f's second speaker has no name."""
    said = {id: [(first, 0.2, 0.4, 'Hi'), (second, 1.0, 0.4, 'Ho')] for id, first, second in (
        ('a', 'x', 'x'), ('c', 'x', 'y'), ('d', 'y', 'User'), ('e', 'user', 'User'), ('f', 'x', None))}
    path = write_rows(tmp_path / 'cuts.jsonl', [
        cut(id, duplex[0], said=turns_said) for id, turns_said in said.items()])
    records, _ = prepare(lhotse_cuts, path)
    assert len(records) == 5
    note = 'note: in {} recordings several speakers of one channel became one user; the first is {}\n'
    assert capsys.readouterr().out.count(note.format(2, 'c')) == 1

    write_wav(tmp_path / 'a.wav', hum(140, 2.0), hum(220, 2.0))
    write_wav(tmp_path / 'b.wav', hum(140, 2.0), hum(220, 2.0))
    for name, third in (('a', 'B'), ('b', 'C')):
        words = [['Hi', [0.2, 0.4], 'SPEAKER_MAIN'], ['Ho', [0.8, 1.0], 'B'], ['Hm', [1.5, 1.7], third]]
        (tmp_path / f'{name}.json').write_text(json.dumps(dict(alignments=words)))
    prepare(moshi, write_rows(tmp_path / 'data.jsonl', [dict(path='a.wav'), dict(path='b.wav')]))
    assert note.format(1, 'b') in capsys.readouterr().out


def test_words_are_kept(tmp_path, prepare, duplex):
    spoken = cut('u', duplex[0], said=[('7169', 0.2, 0.8, 'Hi you')])
    spoken['supervisions'][0]['alignment'] = {
        'word': [['Hi', 0.2, 0.3, None], ['', 0.5, 0.1, None], ['you', 0.6, 0.4, None]]}
    records, _ = prepare(lhotse_cuts, write_rows(tmp_path / 'cuts.jsonl', [spoken]))
    assert records['u']['words'] == [[dict(text='Hi', start=5, end=13), dict(text='you', start=15, end=25)]]


def test_recordings_and_supervisions(tmp_path, prepare, duplex):
    write_rows(tmp_path / 'recordings.jsonl.gz', [dict(duplex[0], id='r')])
    said = write_rows(tmp_path / 'supervisions.jsonl.gz', [
        dict(id=str(i), recording_id='r', start=i, duration=0.5, channel=0, text=f'text {i}')
        for i in range(2)])
    records, _ = prepare(lhotse_cuts, tmp_path / 'recordings.jsonl.gz', f'--supervisions={said}')
    assert turns(records['r']) == [('user', 0, 13, 'text 0'), ('user', 25, 38, 'text 1')]


def test_shar_written_by_lhotse_is_the_same_data(tmp_path, prepare, duplex, monkeypatch):
    """
    Flac keeps 16 bits as they are. The last cut has no target_audio: .nodata in its tar. Then the tars are
    damaged.
    """
    from lhotse import CutSet
    from lhotse.serialization import deserialize_item
    user, assistant, _ = duplex
    cuts = [cut(id, user, assistant) for id in ('a', 'b.1', 'c')]
    plain, _ = prepare(lhotse_cuts, write_rows(tmp_path / 'cuts.jsonl', cuts))
    monkeypatch.chdir(tmp_path)     # lhotse's paths start here
    (tmp_path / 'shar').mkdir()
    written = CutSet.from_cuts(deserialize_item(copy.deepcopy(each)) for each in [*cuts, cut('d', user)])
    written.to_shar(str(tmp_path / 'shar'), fields={'recording': 'flac', 'target_audio': 'flac'},
                    shard_size=2)
    records, skipped = prepare(lhotse_cuts, tmp_path / 'shar')
    assert records.keys() == {'a', 'b.1', 'c'} and skipped.keys() == {'d'}
    assert 'target_audio.000001.tar has .nodata' in skipped['d']
    for id, record in records.items():
        assert turns(record) == turns(plain[id])
        assert (record['user'] == plain[id]['user']).all()
        assert (record['assistant'] == plain[id]['assistant']).mean() > 0.9

    tar = tmp_path / 'shar/recording.000000.tar'
    tar.write_bytes(tar.read_bytes()[:-len(tar.read_bytes()) // 2])
    (tmp_path / 'shar/recording.000001.tar').write_bytes(b'no tar')
    lhotse_cuts.tar_index.cache_clear()
    records, skipped = prepare(lhotse_cuts, tmp_path / 'shar')
    assert records.keys() == {'a'}
    assert 'has .flac for cut b.1' in skipped['b.1'] and 'is no tar' in skipped['c']


@pytest.mark.parametrize('where', ['recording', 'target_audio', 'shar', 'pair', 'url'])
def test_no_command_of_a_manifest_is_run(where, tmp_path, prepare, duplex):
    """Lhotse would give a source of type "command" to the shell. This one would leave a file."""
    user, assistant, _ = duplex
    trap = recording(f'touch {tmp_path}/was_run; cat {tmp_path}/wavs/user.wav', 2.0, kind='command')
    by_url = recording('http://127.0.0.1:9/a.wav', 2.0, kind='url')
    bad = dict(recording=cut('bad', trap, assistant), target_audio=cut('bad', user, trap),
               shar=cut('bad', user, assistant), url=cut('bad', by_url, assistant)).get(where)
    path, settings = tmp_path / 'cuts.jsonl', []
    write_rows(path, [bad, cut('good', user, assistant)])
    if where == 'shar':     # a field without its audio is stored as rows
        path = tmp_path / 'shar'
        path.mkdir()
        write_rows(path / 'cuts.000000.jsonl.gz', [bad, cut('good', user, assistant)])
        write_rows(path / 'recording.000000.jsonl.gz', [
            dict(cut_id='bad', recording=trap), dict(cut_id='good', recording=dict(user))])
        settings = [f'--audio_dir={tmp_path}']
    if where == 'pair':
        path = write_rows(tmp_path / 'recordings.jsonl', [dict(trap, id='bad'), dict(user, id='good')])
        said = [dict(id=id, recording_id=id, start=0, duration=1.0, channel=0, text='Hi.')
                for id in ('bad', 'good')]
        settings = [f'--supervisions={write_rows(tmp_path / "supervisions.jsonl", said)}']
    records, skipped = prepare(lhotse_cuts, path, *settings)
    kind = 'url' if where == 'url' else 'command'
    assert records.keys() == {'good'} and f"type '{kind}'" in skipped['bad']
    assert not (tmp_path / 'was_run').exists()


def test_without_lhotse_the_pip_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'lhotse', None)
    monkeypatch.setattr(sys, 'argv', ['prepare.py', 'cuts.jsonl', '--out=x', '--codec=y'])
    with pytest.raises(ValueError, match='pip install .lhotse'):
        lhotse_cuts.main()


@real
def test_fixtures_of_lhotse(prepare, tmp_path):
    pytest.importorskip('lhotse')
    folder = REAL / 'lhotse'
    # paths from test/fixtures/ami on; two speakers, one channel
    records, skipped = prepare(lhotse_cuts, folder / 'ami/cuts.json')
    assert not skipped and [turns(record) for record in records.values()] == [
        [('user', 36, 71, "I'M ABIGAIL CLAFLIN"), ('user', 84, 109, 'YOU CAN CALL ME ABBIE')]]
    records, skipped = prepare(lhotse_cuts, folder / 'ljspeech/cuts.json', f'--audio_dir={folder}',
                               '--role=assistant')
    texts = {turn['text'] for record in records.values() for turn in record['turns']}
    assert not skipped and texts == {'IN EIGHTEEN THIRTEEN', 'EIGHT THE PRESS YARD'}
    assert sorted(len(record['assistant']) for record in records.values()) == [39, 40]      # 1.54 and 1.60 s
    libri = folder / 'mini_librispeech/lhotse'
    with pytest.raises(ValueError, match="none of the 38 .*'command' .'sox "):
        prepare(lhotse_cuts, libri / 'recordings.jsonl.gz',
                f'--supervisions={libri / "supervisions.jsonl.gz"}')
    with pytest.raises(ValueError, match='none of the 2 .* has .nodata'):
        prepare(lhotse_cuts, folder / 'lsmix')


@real
def test_stereo_fixture_of_lhotse(prepare, tmp_path):
    pytest.importorskip('lhotse')
    n_sec = soundfile.info(REAL / 'lhotse/stereo.wav').duration
    said = [('A', 0.1, 0.3, 'left', 0), ('B', 0.5, 0.3, 'right', 1)]
    whole = cut('s', recording(REAL / 'lhotse/stereo.wav', n_sec, (0, 1), rate=8000), said=said,
                channel=[0, 1], kind='MultiCut', n_sec=n_sec)
    records, _ = prepare(lhotse_cuts, write_rows(tmp_path / 'cuts.jsonl', [whole]), '--user_channel=1')
    assert turns(records['s']) == [('assistant', 2, 10, 'left'), ('user', 12, 20, 'right')]
    assert len(records['s']['user']) == np.ceil(n_sec * 25)


# ------------------------------------------------------------------------------------------------------------
# codes

def slam_row(index, number, tokens, **more):
    asked = f'USER: before ASSISTANT: so <USER>: question {number}'
    return dict(split_name='x', index=index, round=number, source_text=asked,
                target_text=f'answer {number}', target_token=tokens, **more)


def test_rounds_become_a_dialogue_where_the_user_can_be_heard(tmp_path, prepare, small_codec, capsys):
    """
    25 Hz: round 1 is 25 frames of question and 5 of answer, 12 frames pass (0.5 s), round 2 is 20 and 3.
    Rows may be in any order.
    """
    one, = write_wav(tmp_path / 'wavs/one.wav', hum(140, 1.0))
    write_wav(tmp_path / 'wavs/two.wav', hum(180, 0.8))
    path = write_rows(tmp_path / 'rows.jsonl', [
        slam_row(1, 2, [6, 7, 8], source_wav='/elsewhere/wavs/two.wav'),
        slam_row(1, 1, [1, 2, 3, 4, 5], source_wav='wavs/one.wav'),
        slam_row(2, 1, [9, 9], source_token=[4, 4, 4]),
        slam_row(3, 1, [1, 32]),
        slam_row(4, 2, [1], source_token=[4]),
        slam_row(5, 1, 'no list'),
        '{',
        slam_row(6, 1, [3, 3], source_wav='wavs/gone.wav'),
        slam_row(6, 2, [1], source_wav='wavs/one.wav')])
    records, skipped = prepare(codes, path)
    assert '3 dialogues of two channels from 4 rows; 5 rows are one-sided' in capsys.readouterr().out
    first, second, alone = records['x-1'], records['x-2'], records['rows.jsonl, row 8']
    assert turns(first) == [('user', 0, 25, 'question 1'), ('assistant', 25, 30, 'answer 1'),
                            ('user', 42, 62, 'question 2'), ('assistant', 62, 65, 'answer 2')]
    assert first['assistant'][25:30].tolist() == [1, 2, 3, 4, 5]
    assert first['assistant'][62:65].tolist() == [6, 7, 8] and len(first['user']) == 65
    assert np.isin(first['assistant'][30:62], small_codec.silence_codes).all()
    assert (first['user'][:20] == small_codec.encode(one)[:20]).mean() > 0.5
    assert turns(second) == [('user', 0, 3, 'question 1'), ('assistant', 3, 5, 'answer 1')]
    assert second['user'][:3].tolist() == [4, 4, 4]
    assert turns(alone) == [('assistant', 0, 2, 'answer 1')] and len(alone['user']) == 0
    check_reasons(skipped, {
        'rows.jsonl, row 4': 'code 32 at frame 1 of target_token; codec mel has 0 to 31',
        'x-4': 'rounds [2]',
        'rows.jsonl, row 6': 'no list of codes',
        'rows.jsonl, row 7': 'no JSON object'})
    # a round whose user cannot be heard makes the others of its dialogue one-sided
    assert len(records) == 4
    assert len(prepare(codes, path, '--one_sided')[0]) == 6       # all but those skipped for their codes
    renamed = write_rows(tmp_path / 'other.jsonl',
                         [dict(answer='Yes.', answer_cosyvoice_speech_token=[1, 2])])
    records, _ = prepare(codes, renamed, '--codes=answer_cosyvoice_speech_token', '--text=answer')
    assert turns(records['other.jsonl, row 1']) == [('assistant', 0, 2, 'Yes.')]


def test_codes_in_other_forms(tmp_path, prepare):
    """One field of an object; all that is readable is the same three codes."""
    good = [[12, 5, 7], [[12, 5, 7]], [[[12, 5, 7]]], '12 5 7', ' 12,5, 7\n']
    bad = [[[12, 5], [7, 1]], '12 five', '', 'a.npy', [1.5], {'a': 1}, None]
    path = write_rows(tmp_path / 'rows.jsonl', [
        dict(answer=dict(codes=tokens, text='Yes.')) for tokens in [*good, *bad]])
    fields = '--codes=answer.codes', '--text=answer.text'
    records, skipped = prepare(codes, path, *fields, '--one_sided')
    assert [record['assistant'].tolist() for record in records.values()] == [[12, 5, 7]] * len(good)
    assert {turns(record)[0] for record in records.values()} == {('assistant', 0, 3, 'Yes.')}
    reasons = ['has 2 lists in answer.codes: a codec of one codebook has one code a frame', *[
        '"12 45 7" and "12,45,7" are read; --codes=FIELD names another field'] * (len(bad) - 1)]
    check_reasons(skipped, {
        f'rows.jsonl, row {n}': reason for n, reason in enumerate(reasons, len(good) + 1)})

    both = dict(answer=dict(codes='1 2', text='Yes.'), ask=dict(codes=[[3, 4, 5]], text='What?'), n=dict(i=1))
    plain = {'answer.codes': [1], 'answer.text': 'A name with a dot.'}
    path = write_rows(tmp_path / 'both.jsonl', [both, plain])
    records, _ = prepare(codes, path, *fields, '--user_codes=ask.codes', '--user_text=ask.text',
                         '--dialogue_fields=n.i')
    assert turns(records['1']) == [('user', 0, 3, 'What?'), ('assistant', 3, 5, 'Yes.')]
    assert turns(records['both.jsonl, row 2']) == [('assistant', 0, 1, 'A name with a dot.')]


@real
def test_real_rows_become_dialogues_flatten_and_come_back(tmp_path, prepare):
    """
    Ten rows of SLAM-Omni, seven dialogues. Their user's audio is not here: first they are one-sided, then
    the user gets codes of a real answer for a voice, so that the layouts of two channels have something to
    lay.
    """
    S3Codec.create(variant='v1_50hz', silence_codes=[230, 440, 491]).save(tmp_path / 's3')
    source = REAL / 'speech_tokens/slam_omni_en.jsonl'
    rows = [json.loads(line) for line in open(source, encoding='utf-8')]
    vocab = Vocabulary.load(REAL / 'qwen2_tokenizer', n_codes=4096)

    records, skipped = prepare(codes, source, codec=tmp_path / 's3')
    assert not skipped and len(records) == 10
    for record in records.values():
        flat, = flatten(record, get_layout('tts'), vocab)
        back = unflatten(flat.ids, get_layout('tts'), vocab)
        row = rows[int(record['id'].split()[-1]) - 1]
        assert back['assistant'] == row['target_token'] and back['turns'][0]['text'] == row['target_text']

    spoken = [dict(row, source_token=rows[i - 1]['target_token'][:200]) for i, row in enumerate(rows)]
    records, skipped = prepare(codes, write_rows(tmp_path / 'spoken.jsonl', spoken), codec=tmp_path / 's3')
    assert not skipped and len(records) == 7 and len(records['identity-2']['turns']) == 6
    said = "Wow, that's a lot of water! No wonder we call it the blue planet."
    assert records['identity-2']['turns'][2]['text'] == said
    for record in records.values():
        for name, chunk in ('half_duplex', None), ('duplex3', 20), ('duplex2', 20):
            layout = get_layout(name, speech_chunk=chunk)
            flat, = flatten(record, layout, vocab)
            back = unflatten(flat.ids, layout, vocab, silence_code=230)
            answers, again_answers = ([turn for turn in each['turns'] if turn['role'] == 'assistant']
                                      for each in (record, back))
            # Qwen2's 5 tokens a second are enough for all that is said
            assert len(answers) == len(record['turns']) // 2 and flat.n_dropped == 0
            for turn, again in zip(answers, again_answers, strict=True):
                assert np.array_equal(record['assistant'][turn['start']:turn['end']],
                                      back['assistant'][again['start']:again['end']])
                assert name == 'duplex2' or turn['text'] == again['text']
            if layout.order == 'chunks':
                assert np.array_equal(back['user'][:len(record['user'])], record['user'])
                assert np.array_equal(flatten(dict(back, id='x'), layout, vocab)[0].ids, flat.ids)


def test_the_prepared_corpus_names_its_help(capsys, monkeypatch):
    for module in (lhotse_cuts, manifest, moshi, codes):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', '--help'])
        with pytest.raises(SystemExit) as end:
            module.main()
        corpus, out = module.__name__.split('.')[1], capsys.readouterr().out
        assert end.value.code == 0 and f'python data/{corpus}/prepare.py' in out
