"""
Public two-channel corpora, in made examples of their forms: both sides come out with what each says, the
assistant is the side that was chosen, and what cannot be read is left out with a reason.
"""
import json
import sys
import tarfile

import numpy as np
import pytest
from test_corpora import check_reasons, turns

from data import sides
from data.behavior_sd import prepare as behavior_sd
from data.ldc import prepare as ldc
from data.made_up import hum
from data.otospeech import prepare as otospeech
from data.seamless import prepare as seamless

soundfile = pytest.importorskip('soundfile')
pytest.importorskip('soxr')


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_audio(path, *waves, rate=16000, **how):
    """-> float32 [n_channel, n_sample] as it is read again"""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack(waves, 1), rate, **how)
    return soundfile.read(path, dtype='float32', always_2d=True)[0].T


def pack(folder):
    """folder/… -> folder.tar, which is all that is left"""
    with tarfile.open(f'{folder}.tar', 'w') as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f'./{path.name}')
            path.unlink()
    folder.rmdir()


# ------------------------------------------------------------------------------------------------------------
# what they have in common

def test_a_tar_is_the_folder_that_it_would_be(tmp_path):
    for name in 'ab':
        write(tmp_path / f'train/0001/{name}.json', dict(name=name))
    write(tmp_path / 'train/0001/a.txt', 'no')
    before = sides.list_samples(str(tmp_path), ('.json',))
    pack(tmp_path / 'train/0001')
    after = sides.list_samples(str(tmp_path), ('.json',))
    assert list(before) == list(after) == ['train/0001/a', 'train/0001/b']
    for key, places in after.items():
        assert places.keys() == {'.json'} and places['.json'].name == before[key]['.json'].name
        assert sides.read_json(places['.json']) == dict(name=key[-1])
    with pytest.raises(ValueError, match='^no folder .*none$'):
        sides.list_samples(str(tmp_path / 'none'), ('.json',))


def test_no_sound_and_no_tag_is_text():
    for text, plain in [('[laughter] so [laughter-yeah]', 'so yeah'), ('<strong>yes</strong>', 'yes'),
                        ('ab[solute]- not', 'ab- not'), ('[mn]', ''), ('1 < 2', '1 < 2')]:
        assert sides.said(text, 0, 1)['text'] == plain


# ------------------------------------------------------------------------------------------------------------
# Seamless Interaction

def transcript(*pieces):
    """pieces: lists of (word, start, end)"""
    return {'metadata:transcript': [
        dict(transcript=' '.join(word for word, *_ in piece), start=piece[0][1], end=piece[-1][2],
             words=[dict(word=word, start=start, end=end, score=0.9) for word, start, end in piece])
        for piece in pieces], 'metadata:vad': []}


def test_two_people_of_seamless_become_a_dialogue(tmp_path, prepare, small_codec):
    """P0059A is in a folder, P0060 in a tar. A pause of 0.2 s ends no turn, one of 0.8 s does. "one." has no
    time, P0060's wav is 0.1 s short."""
    name = 'improvised/dev/0000/{}/V00_S0038_I00000125_{}'.format
    first, = write_audio(tmp_path / f'{name("0022", "P0059A")}.wav', hum(140, 3.0))
    said = transcript(
        [('Nice', 0.2, 0.6), ('one.', 0.6, 1.0)], [('Yes.', 1.2, 1.4)], [('Well?', 2.2, 2.6)])
    del said['metadata:transcript'][0]['words'][1]['start'], said['metadata:transcript'][0]['words'][1]['end']
    write(tmp_path / f'{name("0022", "P0059A")}.json', said)
    second, = write_audio(tmp_path / f'{name("0037", "P0060")}.wav', hum(220, 2.9))
    write(tmp_path / f'{name("0037", "P0060")}.json',
          transcript([('[laughter]', 0.4, 0.6), ('Hm.', 0.6, 0.8)]))
    pack((tmp_path / name('0037', '')).parent)

    records, skipped = prepare(seamless, tmp_path)
    record, = records.values()
    assert record['id'] == 'V00_S0038_I00000125' and not skipped
    assert turns(record) == [('assistant', 5, 35, 'Nice one. Yes.'), ('user', 15, 20, 'Hm.'),
                             ('assistant', 55, 65, 'Well?')]
    assert record['words'][0] == [dict(text='Nice', start=5, end=15), dict(text='one.', start=15, end=15),
                                  dict(text='Yes.', start=30, end=35)]
    assert (record['assistant'] == small_codec.encode(first)).all()
    assert (record['user'][:70] == small_codec.encode(second)[:70]).all()

    records, _ = prepare(seamless, tmp_path, '--user_channel=0', '--gap_sec=0.1')
    record, = records.values()
    assert turns(record) == [('user', 5, 15, 'Nice one.'), ('assistant', 15, 20, 'Hm.'),
                             ('user', 30, 35, 'Yes.'), ('user', 55, 65, 'Well?')]
    assert (record['user'] == small_codec.encode(first)).all()


def test_what_is_skipped_of_seamless(tmp_path, prepare):
    hi = transcript([('Hi.', 0.2, 0.6)])
    for id, other, said in [
            ('I1', [2.0], hi), ('I2', [0.9], hi), ('I3', [2.0, 2.0], hi), ('I4', [], hi), ('I5', [2.0], None),
            ('I6', [2.0], transcript()), ('I7', [2.0], {'id': 'V'}), ('I8', [2.0], '{'),
            ('I9', [2.0], transcript([('Hi.', None, 0.6)]))]:
        for person, lengths, text in ('P1', [2.0], hi), ('P2', other, said):
            path = tmp_path / f'V0_S0_{id}_{person}'
            if lengths:
                write_audio(path.with_suffix('.wav'), *(hum(140, n_sec) for n_sec in lengths))
            if text is not None:
                write(path.with_suffix('.json'), text)
    records, skipped = prepare(seamless, tmp_path)
    assert records.keys() == {'V0_S0_I1'}
    check_reasons(skipped, {
        'V0_S0_I2': 'V0_S0_I2_P1.wav is 2.00 s long and V0_S0_I2_P2.wav 0.90 s',
        'V0_S0_I3': 'V0_S0_I3_P2.wav has 2 channels, not 1',
        'V0_S0_I4': 'it takes two people, and here is P1',
        'V0_S0_I5': 'beside V0_S0_I5_P2.wav there is no .json',
        'V0_S0_I6': 'V0_S0_I6_P2.json has no word; of some people the sound is missing',
        'V0_S0_I7': "V0_S0_I7_P2.json has not the form that --help shows (KeyError: 'metadata:transcript')",
        'V0_S0_I8': 'V0_S0_I8_P2.json is no JSON',
        'V0_S0_I9': 'V0_S0_I9_P2.json has not the form that --help shows (TypeError'})
    write_audio(tmp_path / 'again/V0_S0_I1_P1.wav', hum(140, 1.0))
    with pytest.raises(ValueError, match='^again/V0_S0_I1_P1.wav is there twice: V0_S0_I1_P1.wav$'):
        prepare(seamless, tmp_path)
    with pytest.raises(ValueError, match='holds no files such as V00_S0809_I00000582_P0947.wav'):
        prepare(seamless, tmp_path.parent / tmp_path.name / 'out0')


# ------------------------------------------------------------------------------------------------------------
# Behavior-SD

def utterance(speaker, text, start, end, *backchannels):
    return dict(uttr_type=None, speaker_idx=speaker, tts_text=text, start_time=start, end_time=end,
                backchannels=[dict(tts_text=said, start_time=since, end_time=until)
                              for said, since, until in backchannels])


def test_a_backchannel_is_a_turn_of_the_listener(tmp_path, prepare, small_codec):
    """Speaker 0 says "Yeah." while speaker 1 talks, and is interrupted later."""
    talk = [utterance(1, 'So, um... we should go.', 0.2, 1.4, ('Yeah.', 0.6, 0.8), ('[laughter]', 1.0, 1.2)),
            utterance(0, 'But I', 1.6, 2.4), utterance(1, 'Wait!', 2.2, 2.8)]
    write_audio(tmp_path / 'train/0001/7.flac', hum(140, 3.0, 22050), hum(220, 3.0, 22050), rate=22050)
    write(tmp_path / 'train/0001/7.json', dict(utterances=talk))
    for name, content in [('8', dict(utterances=[])), ('9', dict(utterances=[dict(speaker_idx=0)])),
                          ('10', None), ('11', dict(utterances=talk))]:
        write_audio(tmp_path / f'train/0001/{name}.flac', *[hum(140, 3.0)] * (1 + (name != '11')))
        if content:
            write(tmp_path / f'train/0001/{name}.json', content)
    pack(tmp_path / 'train/0001')
    records, skipped = prepare(behavior_sd, tmp_path)
    said = [(1, 5, 35, 'So, um... we should go.'), (0, 15, 20, 'Yeah.'), (0, 40, 60, 'But I'),
            (1, 55, 70, 'Wait!')]
    record = records['train/0001/7']
    assert turns(record) == [(('assistant', 'user')[side], *rest) for side, *rest in said]
    assert record['words'] == [[]] * 4 and len(record['user']) == 75
    check_reasons(skipped, {
        'train/0001/8': 'nothing is said in it',
        'train/0001/9': "9.json has not the form that --help shows (KeyError: 'tts_text')",
        'train/0001/10': 'beside train/0001/10.flac there is no .json',
        'train/0001/11': 'train/0001/11.flac has 1 channels, not 2'})
    swapped, _ = prepare(behavior_sd, tmp_path, '--user_channel=0')
    record, again = swapped['train/0001/7'], record
    assert turns(record) == [(('user', 'assistant')[side], *rest) for side, *rest in said]
    assert (record['user'] == again['assistant']).all() and (record['assistant'] == again['user']).all()
    assert (record['user'] != again['user']).any()
    with pytest.raises(ValueError, match='holds no .flac files, nor tars of them'):
        prepare(behavior_sd, tmp_path / 'out0')


# ------------------------------------------------------------------------------------------------------------
# otoSpeech

def label(session, speaker, start, end, text, *times):
    row = dict(session_id=session, speaker=speaker, start_time=start, end_time=end, words=text)
    if times:
        row['word_alignment'] = [[word, *span] for word, span in zip(text.split(), times)]
    return row


def test_sessions_of_otospeech_and_their_labels(tmp_path, prepare, small_codec):
    """ann is channel 1 of s, by its .json. Only her words have times."""
    shard = tmp_path / 'oto/data/train/shard-000000'
    for name in 'stuv':
        one, other = write_audio(shard / f'{name}.flac', hum(140, 2.0), hum(220, 2.0))
        write(shard / f'{name}.json', dict(session_id=name, speakers=[
            dict(speaker_id='ann', channel=1), dict(speaker_id='bob', channel=0)]))
    pack(shard)
    write(tmp_path / 'seglst.json', [
        label('s', 'ann', 0.2, 0.8, 'Oh hi.', (0.2, 0.4), (0.4, 0.8)), label('s', 'bob', 1.0, 1.6, 'Hello.'),
        label('t', 'eve', 0.2, 0.8, 'Who?'), label('v', 'ann', 1.6, 1.9, 'Late.', (0.0, 0.3))])
    labels = f'--labels={tmp_path / "seglst.json"}'
    records, skipped = prepare(otospeech, tmp_path / 'oto', labels)
    assert turns(records['s']) == [('user', 5, 20, 'Oh hi.'), ('assistant', 25, 40, 'Hello.')]
    assert records['s']['words'] == [
        [dict(text='Oh', start=5, end=10), dict(text='hi.', start=10, end=20)], []]
    assert (records['s']['assistant'] == small_codec.encode(one)).all()
    assert (records['s']['user'] == small_codec.encode(other)).all()
    check_reasons(skipped, {
        't': "t.json, or its part of --labels, has not the form that --help shows (KeyError: 'eve')",
        'u': 'nothing is said in it',
        'v': "'Late.' is said from 1.6 s to 1.9 s, but its first word at 0.0 s"})
    records, _ = prepare(otospeech, tmp_path / 'oto', labels, '--user_channel=0')
    assert [turn['role'] for turn in records['s']['turns']] == ['assistant', 'user']
    with pytest.raises(ValueError, match='has recordings without transcripts: --labels=seglst.json has them'):
        prepare(otospeech, tmp_path / 'oto')
    with pytest.raises(ValueError, match='^no file .*none.json$'):
        prepare(otospeech, tmp_path / 'oto', f'--labels={tmp_path / "none.json"}')
    with pytest.raises(ValueError, match='holds neither sessions .* nor speaker_1_audio.wav'):
        prepare(otospeech, tmp_path / 'out0')


def test_talks_of_otospeech_in_srt(tmp_path, prepare, small_codec):
    """Channel bleed is the other's voice, laughter no word. A backchannel is a turn like any."""
    waves = {}
    for id, speakers in ('42', '12'), ('43', '12'), ('44', '1'):
        for n in speakers:
            waves[n], = write_audio(tmp_path / f'{id}/speaker_{n}_audio.wav', hum(100 + 40 * int(n), 2.0))
        write_audio(tmp_path / f'{id}/combined_audio.wav', hum(140, 2.0), hum(180, 2.0))
    write(tmp_path / '42/speaker_1_annotation_a.srt',
          '1\n00:00:00,200 --> 00:00:00,800\n[Normal Turn] Hey man,\nhow is it going?\n\n'
          '2\n00:00:01,000 --> 00:00:01,200\n[Channel Bleed] Fine.\n\n'
          '3\n00:00:01,800 --> 00:00:01,920\n[Laughter]\n')
    write(tmp_path / '42/speaker_2_annotation_a.srt',
          '\ufeff1\r\n00:00:00,400 --> 00:00:00,600\r\n[Continuer Backchannel] Uh-huh.\r\n\r\n'
          '2\r\n00:00:01,240 --> 00:00:01,600\r\n[Normal Turn] Fine.\r\n')
    write(tmp_path / '43/speaker_1_annotation_a.srt', '1\n00:00:00,200 --> 00:00:00,800\nHey man\n')
    records, skipped = prepare(otospeech, tmp_path)
    assert turns(records['42']) == [('assistant', 5, 20, 'Hey man, how is it going?'),
                                    ('user', 10, 15, 'Uh-huh.'), ('user', 31, 40, 'Fine.')]
    assert (records['42']['user'] == small_codec.encode(waves['2'])).all()
    check_reasons(skipped, {
        '43': "speaker_1_annotation_a.srt has an entry without number, times or [label]: '1\\n00:00:00,200",
        '44': "its folder has not the form that --help shows (KeyError: 'speaker_2_audio.wav')"})


# ------------------------------------------------------------------------------------------------------------
# Fisher and Switchboard

FISHER = """# fe_03_00001.sph
# Transcribed at the LDC

0.20 0.80 A: hi (( um )) [laughter]
1.00 1.40 B: an- hello
1.50 1.60 B: [mn]
1.44 1.80 B: (( ))
"""


def shorten(path):
    """A sphere file whose header says that it is compressed; what follows nobody reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'NIST_1A\n   1024\nsample_count -i 16000\nsample_rate -i 8000\nchannel_count -i 2\n'
                     b'sample_n_bytes -i 1\nsample_coding -s26 ulaw,embedded-shorten-v2.00\nend_head\n'
                     .ljust(1024) + b'ajkg\2' + bytes(9000))


def test_calls_of_fisher(tmp_path, prepare, small_codec):
    """8 kHz, mu-law. 00002 is compressed; 00003, too, but has been unpacked beside it."""
    audio, text = tmp_path / 'S13/fe_03_p1_sph1/audio/000', tmp_path / 'T19/fe_03_p1_tran/data/trans/000'
    call = hum(140, 2.0, 8000), hum(220, 2.0, 8000)
    write_audio(audio / 'fe_03_00001.sph', *call, rate=8000, format='NIST', subtype='ULAW')
    shorten(audio / 'fe_03_00002.sph')
    shorten(audio / 'fe_03_00003.sph')
    write_audio(tmp_path / 'wavs/fe_03_00003.wav', *call, rate=8000)
    for n in (4, 5):
        write_audio(audio / f'fe_03_0000{n}.sph', *call, rate=8000, format='NIST', subtype='PCM_16')
    for n, content in (1, FISHER), (2, FISHER), (3, FISHER), (5, FISHER + 'and so on\n'), (6, FISHER):
        write(text / f'fe_03_0000{n}.txt', content)
    records, skipped = prepare(ldc, tmp_path)
    said = [(5, 20, 'hi um'), (25, 35, 'an- hello')]
    for id in ('fe_03_00001', 'fe_03_00003'):
        assert turns(records[id]) == [(role, *rest) for role, rest in zip(('assistant', 'user'), said)]
        assert len(records[id]['user']) == 50 and records[id]['words'] == [[], []]
    path = audio / 'fe_03_00002'
    check_reasons(skipped, {
        'fe_03_00002': f'cannot read: "sph2pipe -p -f wav {path}.sph {path}.wav" unpacks it',
        'fe_03_00004': 'there is no transcript of S13/fe_03_p1_sph1/audio/000/fe_03_00004.sph',
        'fe_03_00005': 'row 8, is no row of Fisher, as "3.76 5.54 A: and i" is: \'and so on\''})
    records, _ = prepare(ldc, tmp_path, '--user_channel=0')
    assert turns(records['fe_03_00001']) == [(role, *rest) for role, rest in zip(('user', 'assistant'), said)]
    with pytest.raises(ValueError, match='no recordings such as fe_03_00001.sph or sw02001.wav are in'):
        prepare(ldc, text)


def test_calls_of_switchboard_have_times_of_words(tmp_path, prepare):
    for name in ('sw02001', 'sw02002'):
        write_audio(tmp_path / f'LDC97S62/{name}.sph', hum(140, 2.0, 8000), hum(220, 2.0, 8000), rate=8000,
                    format='NIST', subtype='ULAW')
    words = dict(A=[(0.0, 0.2, '[silence]'), (0.2, 0.4, '[laughter-hi]'), (0.4, 0.6, "[it'n/isn't]"),
                    (0.6, 0.8, 'them_1'), (1.8, 1.9, '<b_aside>')],
                 B=[(1.0, 1.4, '{ebonite}'), (1.4, 1.6, 'th[at]-')])
    for side, rows in words.items():
        start = f'sw2001{side}-ms98-a-'
        write(tmp_path / f'text/20/2001/{start}word.text', ''.join(
            f'{start}0001 {since} {until} {word}\n' for since, until, word in rows))
        write(tmp_path / f'text/20/2001/{start}trans.text', f'{start}0001 0.0 2.0 no\n')
    records, skipped = prepare(ldc, tmp_path)
    assert turns(records['sw02001']) == [('assistant', 5, 20, "hi isn't them"),
                                         ('user', 25, 40, 'ebonite th-')]
    assert records['sw02001']['words'][1] == [dict(text='ebonite', start=25, end=35),
                                              dict(text='th-', start=35, end=40)]
    check_reasons(skipped, {'sw02002': 'no transcript of LDC97S62/sw02002.sph in the folders given'})


def test_each_corpus_names_its_help(capsys, monkeypatch):
    for module in (seamless, behavior_sd, otospeech, ldc):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', '--help'])
        with pytest.raises(SystemExit) as end:
            module.main()
        corpus, out = module.__name__.split('.')[1], capsys.readouterr().out
        assert end.value.code == 0 and f'python data/{corpus}/prepare.py' in out and '--user_channel' in out
