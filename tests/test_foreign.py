"""
Dialogues of others: who is heard when, what their transcripts say, what is refused, and what
Full-Duplex-Bench gets.
"""
import json
import sys

import numpy as np
import pytest

soundfile = pytest.importorskip('soundfile', reason='pip install soundfile soxr')
pytest.importorskip('soxr', reason='pip install soundfile soxr')

from common.audio import read_audio  # noqa: E402
from data.made_up import hum  # noqa: E402
from decode import write_transcript  # noqa: E402
from measures import foreign  # noqa: E402
from measures.turns import assess, who_speaks  # noqa: E402
from tests.conftest import ROOT  # noqa: E402

# seconds at which they speak: the second time into each other
USER, ASSISTANT = [(0.4, 1.6), (3.0, 4.0)], [(1.8, 2.8), (3.8, 5.2)]


def speech(spans, n_sec, pitch_hz, rate=16000):
    wave = 1e-4 * np.random.default_rng(pitch_hz).standard_normal(round(n_sec * rate)).astype(np.float32)
    for start, end in spans:
        said = hum(pitch_hz, end - start, rate)
        wave[round(start * rate):round(start * rate) + len(said)] += said
    return wave


def write_dialogue(path, user=USER, assistant=ASSISTANT, n_sec=6.0, rate=16000):
    channels = [speech(user, n_sec, 120, rate), speech(assistant, n_sec, 180, rate)]
    soundfile.write(path, np.stack(channels, axis=1), rate)


def spans(conversation, role):
    return [(turn['start'], turn['end']) for turn in conversation['turns'] if turn['role'] == role]


@pytest.mark.parametrize('vad', ['webrtc', 'energy'])
@pytest.mark.parametrize('name, rate', [('a.wav', 16000), ('a.flac', 24000)])
def test_voices_are_heard_when_they_speak(tmp_path, vad, name, rate):
    if vad == 'webrtc':
        pytest.importorskip('webrtcvad', reason='pip install webrtcvad-wheels')
    write_dialogue(tmp_path / name, rate=rate)
    c, = foreign.read_conversations(tmp_path, vad=vad)
    assert (c['id'], c['n_frame'], c['expected'], c['chunk_frames']) == ('a', 150, None, 0)
    assert (c['wave'].shape, c['sample_rate']) == ((96000, 2), 16000)
    for role, truth in (('user', USER), ('assistant', ASSISTANT)):
        assert np.shape(spans(c, role)) == (2, 2)
        assert np.abs(np.array(spans(c, role)) - 25 * np.array(truth)).max() <= 2
        inside = np.concatenate([np.arange(*span) for span in spans(c, role)])
        assert set(np.flatnonzero(c['speaks'][role])) <= set(inside)
    assert [turn['start'] for turn in c['turns']] == sorted(turn['start'] for turn in c['turns'])


def test_swapped_channels_are_the_same_conversation(tmp_path):
    for name, channels in (('here', [0, 1]), ('there', [1, 0])):
        (tmp_path / name).mkdir()
        write_dialogue(tmp_path / name / 'a.wav')
        wave, rate = soundfile.read(tmp_path / name / 'a.wav')
        soundfile.write(tmp_path / name / 'a.wav', wave[:, channels], rate)
    one, = foreign.read_conversations(tmp_path / 'here', vad='energy')
    other, = foreign.read_conversations(tmp_path / 'there', vad='energy', user_channel=1)
    mirrored, = foreign.read_conversations(tmp_path / 'there', vad='energy')
    np.testing.assert_equal(one, other)
    assert spans(one, 'user') == spans(mirrored, 'assistant')
    assert spans(one, 'assistant') == spans(mirrored, 'user')


def test_two_mono_files_are_the_two_channels(tmp_path):
    """The assistant's file is 0.4 s shorter: silence. By 1.2 s it would be another dialogue's."""
    for name in ('whole', 'halves'):
        (tmp_path / name).mkdir()
    write_dialogue(tmp_path / 'whole/a.wav')
    wave, rate = soundfile.read(tmp_path / 'whole/a.wav')
    wave[-6400:, 1] = 0
    soundfile.write(tmp_path / 'whole/a.wav', wave, rate)
    soundfile.write(tmp_path / 'halves/a.user.wav', wave[:, 0], rate)
    soundfile.write(tmp_path / 'halves/a.assistant.wav', wave[:-6400, 1], rate)
    whole, = foreign.read_conversations(tmp_path / 'whole', vad='energy')
    for user_channel in (0, 1):     # the names say who is who
        halves, = foreign.read_conversations(tmp_path / 'halves', vad='energy', user_channel=user_channel)
        np.testing.assert_equal(halves, whole)

    def refused(message):
        with pytest.raises(ValueError) as error:
            list(foreign.read_conversations(tmp_path / 'halves', vad='energy'))
        assert message in str(error.value)

    soundfile.write(tmp_path / 'halves/a.assistant.wav', wave[:-19200, 1], rate)
    refused('a.user.wav is 6.00 s long and')
    refused('a.assistant.wav 4.80 s: the two files of a dialogue start together and differ by 1 s at most')
    soundfile.write(tmp_path / 'halves/a.assistant.wav', wave, rate)
    refused('a.assistant.wav has 2 channels, the file of one side has one')
    soundfile.write(tmp_path / 'halves/a.wav', wave, rate)
    refused('has more than one audio for a: a.assistant.wav and a.user.wav and a.wav; keep one')
    for name in ('a.wav', 'a.assistant.wav'):
        (tmp_path / 'halves' / name).unlink()
    refused('two files of one channel are to be called a.user.user.wav and')


def test_time_runs_both_ways():
    """
    What a detector finds in a recording played backwards is what it finds forwards: it holds on to neither
    end.
    """
    pytest.importorskip('webrtcvad', reason='pip install webrtcvad-wheels')
    windows = speech(USER, 6.0, 120).reshape(-1, 160)
    for detect in (lambda x: foreign.hear_voice(x, 2), foreign.hear_energy):
        heard = detect(windows)
        assert heard.any() and (detect(windows[::-1, ::-1]) == heard[::-1]).all()
    twice, once = (foreign.hear(windows.ravel(), rate_hz, round(6 * rate_hz), 'energy')
                   for rate_hz in (25.0, 12.5))
    assert twice.any()
    assert (once >= twice[::2] & twice[1::2]).all() and (once <= twice[::2] | twice[1::2]).all()


def test_a_pause_is_no_end_and_a_click_no_beginning(tmp_path):
    """
    0.5 to 1.3 s, a pause of 0.4 s, then until 2.5 s: one turn, which is silent in between. A burst of 60 ms
    is nobody.
    """
    write_dialogue(tmp_path / 'a.wav', user=[(0.5, 1.3), (1.7, 2.5), (4.0, 4.06)], assistant=[])
    c, = foreign.read_conversations(tmp_path, vad='energy')
    (start, end), = spans(c, 'user')
    assert abs(start - 12.5) <= 2 and abs(end - 62.5) <= 2 and not c['speaks']['user'][35:40].any()
    two, = foreign.read_conversations(tmp_path, vad='energy', gap_sec=0.3)
    assert len(spans(two, 'user')) == 2 and not spans(two, 'assistant')


WORDS = [('A', 0.40, 0.72, 'What'), ('A', 0.72, 0.88, 'is'), ('A', 1.30, 1.60, 'that?'),
         ('B', 1.80, 2.20, 'A'), ('B', 2.20, 2.80, 'dog.'), ('A', 2.40, 2.60, 'mhm'),
         ('B', 3.30, 3.70, 'Yes.')]


def rows(form):
    table = [[role, str(start), str(end), word] for role, start, end, word in WORDS]
    objects = [dict(role=role, start=start, end=end, word=word) for role, start, end, word in WORDS]
    silence = [['A', '0.0', '0.4', '[silence]']]
    alignments = [[word, [start, end], role] for role, start, end, word in WORDS]
    spoken_woz = [dict(speaker=role, word=word, start=start, end=end) for role, start, end, word in WORDS]
    in_ms = [dict(speaker=role, Word=word, BeginTime=round(1000 * start), EndTime=round(1000 * end))
             for role, start, end, word in WORDS]
    switchboard = [f'sw2001{role}-ms98-a-0001 {start} {end} {word}' for role, start, end, word in WORDS]
    return {
        'SpokenWOZ': json.dumps(spoken_woz),
        'SpokenWOZ, ms': json.dumps(in_ms),
        'Switchboard': '\n'.join([*switchboard, 'sw2001B-ms98-a-0002 4.0 9.0 [silence]']),
        'jsonl': '\n'.join(map(json.dumps, objects)),
        'json': json.dumps(objects),
        'tsv': 'role\tstart\tend\tword\n' + '\n'.join(map('\t'.join, table)),
        'csv': '\n'.join(map(','.join, silence + table)),
        'txt': '\n\n'.join(map('   '.join, table)) + '\n',
        'alignments': json.dumps(dict(alignments=alignments)),
    }[form]


SUFFIX = {'alignments': 'json', 'SpokenWOZ': 'json', 'SpokenWOZ, ms': 'json', 'Switchboard': 'txt'}


@pytest.mark.parametrize('form', ['jsonl', 'json', 'tsv', 'csv', 'txt', *SUFFIX])
def test_words_become_turns_in_any_form(tmp_path, form):
    """
    'is' ends at 0.88 s, 'that?' starts at 1.30: a gap of 0.42 s, a pause. 'mhm' starts 0.8 s after 'that?',
    'Yes.' 0.5 s after 'dog.': new turns. Frames are seconds * 25: 0.40 s is 10, 0.88 s is 22, 1.30 s is 32.5,
    to even: 32.
    """
    (tmp_path / f'sw.{SUFFIX.get(form, form)}').write_text(rows(form))
    c, = foreign.read_conversations(tmp_path, user_name='A', assistant_name='B', gap_sec=0.45)
    assert [(turn['role'], turn['start'], turn['end'], turn['text']) for turn in c['turns']] == [
        ('user', 10, 40, 'What is that?'), ('assistant', 45, 70, 'A dog.'), ('user', 60, 65, 'mhm'),
        ('assistant', 82, 92, 'Yes.')]
    assert c['turns'][0]['words'] == [
        dict(text='What', start=10, end=18), dict(text='is', start=18, end=22),
        dict(text='that?', start=32, end=40)]
    assert c['n_frame'] == 92 and c['wave'] is None
    assert np.flatnonzero(c['speaks']['user']).tolist() == [*range(10, 22), *range(32, 40), *range(60, 65)]
    assert np.flatnonzero(c['speaks']['assistant']).tolist() == [*range(45, 70), *range(82, 92)]


def test_both_word_lists_of_switchboard_are_one_dialogue(tmp_path):
    """As they are published: a file a side, audio with a 0 more in its name."""
    for side in 'AB':
        said = [f'sw2001{side}-ms98-a-0001 {start} {end} {word}'
                for role, start, end, word in WORDS if role == side]
        (tmp_path / f'sw2001{side}-ms98-a-word.text').write_text('\n'.join(said))
    alone, = foreign.read_conversations(tmp_path, user_name='A', assistant_name='B')
    write_dialogue(tmp_path / 'sw02001.wav')
    c, = foreign.read_conversations(tmp_path, user_name='A', assistant_name='B')
    assert (alone['id'], c['id'], c['n_frame']) == ('sw2001', 'sw02001', 150)
    assert c['turns'] == alone['turns'] and len(c['turns']) == 3


def test_sounds_are_no_words(tmp_path):
    words = [('A', 0.4, 0.8, 'Yes'), ('A', 0.8, 1.6, '[laughter]'), ('A', 2.0, 2.2, '[laughter-sure]'),
             ('B', 1.0, 1.2, '[vocalized-noise]'), ('B', 3.0, 3.2, 'Mhm')]
    (tmp_path / 'words.txt').write_text('\n'.join(' '.join(map(str, row)) for row in words))
    texts = [(0, 1, 'Well [laughter] yes [noise]'), (2, 3, '[vocalized-noise]'), (4, 5, '')]
    (tmp_path / 'turns.jsonl').write_text('\n'.join(
        json.dumps(dict(role='A', start_sec=start, end_sec=end, text=text)) for start, end, text in texts))
    of_turns, of_words = foreign.read_conversations(tmp_path, user_name='A', assistant_name='B', gap_sec=1.0)
    assert [(turn['start'], turn['end'], turn['text']) for turn in of_words['turns']] == [
        (10, 20, 'Yes'), (50, 55, 'sure'), (75, 80, 'Mhm')]
    assert [(turn['start'], turn['text']) for turn in of_turns['turns']] == [(0, 'Well yes'), (100, '')]


@pytest.mark.parametrize('sound', ['[laughter]', '[vocalized-noise]', '[LAUGH]', '<breath>', '{lipsmack}',
                                   '(coughs)', '[background speech]', ' [noise] <noise>'])
def test_no_sound_is_a_word(tmp_path, sound):
    """The other laughs into a word: nobody speaks at the same time."""
    rows = [dict(role='user', start=0.4, end=2.0, word='well (so)'),
            dict(role='assistant', start=0.8, end=1.6, word=sound),
            dict(role='assistant', start=2.4, end=2.8, word='yes')]
    (tmp_path / 'a.json').write_text(json.dumps(rows))
    c, = foreign.read_conversations(tmp_path)
    assert [turn['text'] for turn in c['turns']] == ['well (so)', 'yes']
    assert who_speaks([c])['both_speak'] == 0


def test_what_sample_wrote_comes_back(tmp_path):
    turns = [
        dict(role='user', start=10, end=40, text='What is that?'),
        dict(role='assistant', start=45, end=70, text='狗。'),
        dict(role='user', start=75, end=100, text='')]
    write_transcript(str(tmp_path / 'd0.jsonl'), dict(turns=turns[::-1]), 25.0)
    alone, = foreign.read_conversations(tmp_path)
    assert alone['turns'] == turns and alone['n_frame'] == 100 and alone['speaks']['assistant'].sum() == 25
    write_dialogue(tmp_path / 'd0.wav', assistant=[(1.9, 2.6), (4.5, 5.5)])         # the second is in no turn
    c, = foreign.read_conversations(tmp_path, vad='energy')
    assert c['turns'] == turns and c['n_frame'] == 150
    said = np.flatnonzero(c['speaks']['assistant'])
    assert abs(said[0] - 47.5) <= 2 and abs(said[-1] + 1 - 65) <= 2 and len(said) == said[-1] + 1 - said[0]


def test_who_has_no_words_is_heard(tmp_path):
    """moshi-finetune as a rule has the assistant's words only."""
    write_dialogue(tmp_path / 'a.wav')
    alignments = [['A', [1.8, 2.2], 'SPEAKER_MAIN'], ['dog.', [2.2, 2.8], 'SPEAKER_MAIN']]
    (tmp_path / 'a.json').write_text(json.dumps(dict(alignments=alignments)))
    c, = foreign.read_conversations(tmp_path, vad='energy', assistant_name='SPEAKER_MAIN')
    assert spans(c, 'assistant') == [(45, 70)] and [turn['text'] for turn in c['turns']] == ['', 'A dog.', '']
    assert np.abs(np.array(spans(c, 'user')) - 25 * np.array(USER)).max() <= 2


def line(**changes):
    return json.dumps(dict(dict(role='user', start=0.5, end=1.0, word='hi'), **changes))


@pytest.mark.parametrize('name, content, message', [
    ('a.jsonl', line(role='A') + '\n' + line(role='B'),
     'a.jsonl, row 1, is of role A; the file has the roles A, B, and the user is called user, the assistant '
     'assistant: user_name and assistant_name say who is who'),
    ('a.jsonl', '\n'.join(line(role=f'r{i:03d}') for i in range(108)), 'r008, r009 and 98 more, and the'),
    ('a.jsonl', line() + '\n' + line(end=0.4),
     'a.jsonl, row 2, is from 0.5 s to 0.4 s: times count from 0, and an end is not before its start'),
    ('a.jsonl', line(start=-1), 'a.jsonl, row 1, is from -1.0 s to 1.0 s'),
    ('a.jsonl', line(end=float('nan')), 'a.jsonl, row 1, is from 0.5 s to nan s'),
    ('a.jsonl', line(end=float('inf')), 'a.jsonl, row 1, is from 0.5 s to inf s'),
    ('a.jsonl', line(end='soon'), 'a.jsonl, row 1, has no start and end in seconds'),
    ('a.jsonl', line(end=None), 'a.jsonl, row 1, has no start and end in seconds'),
    ('a.jsonl', line(text='hi'), 'a.jsonl, row 1, is neither a word (role, start, end, word) nor a turn '
     '(role, start_sec, end_sec, text)'),
    ('a.jsonl', line(word=7), 'a.jsonl, row 1, is neither'),
    ('a.jsonl', '7', 'a.jsonl, row 1, is neither'),
    ('a.jsonl', line() + '\n' + json.dumps(dict(role='user', start_sec=2, end_sec=3, text='hi')),
     'has words and turns in one file; keep the words'),
    ('a.jsonl', 'hello', 'a.jsonl is no transcript (Expecting value'),
    ('a.jsonl', '', 'a.jsonl has no rows, and there is no audio of its name beside it'),
    ('a.json', '{"loss": 1}', 'a.json is no transcript (not a list); other files have to lie elsewhere'),
    ('a.json', '{"alignments": [["hi", 0.5]]}', 'a.json is no transcript ('),
    ('a.tsv', 'user\t0.5\t1.0', 'a.tsv, row 1, is neither a word'),
    ('a.txt', 'see the wiki', 'a.txt, row 1, is neither a word'),
])
def test_transcripts_that_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        list(foreign.read_conversations(tmp_path))
    assert message in str(error.value)


def test_folders_that_are_refused(tmp_path, monkeypatch):
    def refused(message, **options):
        with pytest.raises(ValueError) as error:
            list(foreign.read_conversations(tmp_path, **options))
        assert message in str(error.value)

    refused(f'{tmp_path} has no dialogue: no audio (.wav .flac .ogg .mp3) and no transcript (.jsonl .json '
            '.tsv .csv .txt)')
    with pytest.raises(ValueError, match='no folder'):
        foreign.read_conversations(tmp_path / 'gone')
    soundfile.write(tmp_path / 'a.wav', np.zeros(16000), 16000)
    refused(f'{tmp_path / "a.wav"} has 1 channel, a dialogue has two: the user on one, the assistant on the '
            'other')
    soundfile.write(tmp_path / 'a.wav', np.zeros((16000, 3)), 16000)
    refused('a.wav has 3 channels, a dialogue has two')
    soundfile.write(tmp_path / 'a.wav', np.zeros((16000, 2)), 16000)
    (tmp_path / 'a.jsonl').write_text(line(end=1.05) + '\n' + line(end=1.2))
    refused('a.jsonl, row 2, ends at 1.2 s, the audio beside it at 1.00 s; is it cut off, or the audio of '
            'another?')
    (tmp_path / 'a.jsonl').write_text(line(end=1.05))       # rounded, no more
    c, = foreign.read_conversations(tmp_path, vad='energy')
    assert spans(c, 'user') == [(12, 25)] and c['n_frame'] == 25 and not c['speaks']['assistant'].any()
    (tmp_path / 'a.tsv').write_text('')
    refused('has more than one transcript for a: a.jsonl and a.tsv; keep one')
    (tmp_path / 'a.tsv').unlink()
    refused("vad is 'silero' (webrtc or energy)", vad='silero')
    refused('aggressiveness 4 (0 to 3)', aggressiveness=4)
    refused('user_channel 2 (0 or 1)', user_channel=2)
    refused("user_name 'A', assistant_name 'A' (two names)", user_name='A', assistant_name='A')
    refused('rate_hz is 0 (above 0, up to 100)', rate_hz=0)
    monkeypatch.setitem(sys.modules, 'webrtcvad', None)
    refused('to hear who speaks: pip install webrtcvad-wheels, or choose vad=energy, which needs nothing')


def conversation(tmp_path, words, n_sec=None):
    tmp_path.mkdir()
    (tmp_path / 'sw.txt').write_text('\n'.join(' '.join(map(str, row)) for row in words))
    if n_sec:
        write_dialogue(tmp_path / 'sw.wav', n_sec=n_sec)
    return next(foreign.read_conversations(tmp_path))


SAID = [('user', 0.4, 1.0, 'Wait,'), ('user', 1.4, 2.0, 'why?'), ('assistant', 2.4, 3.2, 'Because'),
        ('assistant', 3.2, 5.2, 'everything'), ('user', 4.4, 5.6, 'Stop!'), ('assistant', 6.0, 6.4, 'Sorry.')]


def test_full_duplex_bench_layout(tmp_path):
    """
    Two turns of the user: a question with a pause, answered 0.4 s after its end, and an interruption, after
    which the assistant says one more word. A sample's times count from its own start: the question's from
    0.4 s on. The interruption is a sample of v1, and one of v1.5.
    """
    c = conversation(tmp_path / 'in', SAID, n_sec=8.0)
    n_sample = foreign.export_full_duplex_bench([c], str(tmp_path / 'out'))
    assert n_sample == {'smooth_turn_taking': 1, 'pause_handling': 1, 'user_interruption': 1,
                        'v1.5/user_interruption': 1}
    files = {str(path.relative_to(tmp_path / 'out')): path
             for path in (tmp_path / 'out').rglob('*') if path.is_file()}
    always = 'input.wav', 'output.wav', 'output.json', 'transcription.json'
    notes = {'smooth_turn_taking': 'turn_taking.json', 'pause_handling': 'pause.json',
             'user_interruption': 'interrupt.json', 'v1.5/user_interruption': 'metadata.json'}
    assert set(files) == {'samples.json'} | {
        f'{task}/1/{name}' for task, note in notes.items() for name in (*always, note)}
    got = {name: json.loads(path.read_text()) for name, path in files.items() if name.endswith('.json')}
    assert got['smooth_turn_taking/1/turn_taking.json'] == [dict(text='[TURN-TAKING]', timestamp=[1.6, 1.6])]
    assert got['smooth_turn_taking/1/output.json'] == dict(text='Because everything', chunks=[
        dict(text='Because', timestamp=[2.0, 2.8]), dict(text='everything', timestamp=[2.8, 4.8])])
    assert got['smooth_turn_taking/1/transcription.json'] == [
        dict(text='Wait,', timestamp=[0.0, 0.6]), dict(text='why?', timestamp=[1.0, 1.6])]
    assert got['pause_handling/1/pause.json'] == [dict(text='[PAUSE]', timestamp=[0.6, 1.0])]
    assert got['pause_handling/1/output.json'] == dict(text='', chunks=[])
    assert got['user_interruption/1/interrupt.json'] == [
        dict(context='Wait, why?', interrupt='Stop!', timestamp=[4.0, 5.2])]
    assert got['user_interruption/1/output.json'] == dict(text='Sorry.', chunks=[
        dict(text='Sorry.', timestamp=[5.6, 6.0])])
    assert got['samples.json'] == [
        dict(sample='smooth_turn_taking/1', id='sw', start_sec=0.4, end_sec=4.4),
        dict(sample='pause_handling/1', id='sw', start_sec=0.4, end_sec=2.0),
        dict(sample='user_interruption/1', id='sw', start_sec=0.4, end_sec=8.0),
        dict(sample='v1.5/user_interruption/1', id='sw', start_sec=0.4, end_sec=8.0)]
    assert got['v1.5/user_interruption/1/metadata.json'] == dict(
        context_text='Wait, why?', current_turn_text='Stop!', timestamps=[4.0, 5.2])
    assert [word['text'] for word in got['v1.5/user_interruption/1/output.json']['chunks']] == [
        'Because', 'everything', 'Sorry.']
    for channel, name in enumerate(('input.wav', 'output.wav')):
        wave, rate = soundfile.read(files[f'smooth_turn_taking/1/{name}'], dtype='float32')
        assert (rate, wave.shape) == (16000, (64000,))
        np.testing.assert_allclose(wave, c['wave'][6400:70400, channel], atol=1e-4)
    with pytest.raises(ValueError, match='is there already, its old samples would be counted with the new'):
        foreign.export_full_duplex_bench([c], str(tmp_path / 'out'))


def test_what_was_exported_comes_back(tmp_path):
    """Times count from a sample's start. An assistant without words, or interrupted, is heard."""
    c = conversation(tmp_path / 'in', SAID, n_sec=8.0)
    foreign.export_full_duplex_bench([c], str(tmp_path / 'out'))
    found = {talk['id']: talk for talk in foreign.read_conversations(tmp_path / 'out', vad='energy')}
    assert found.keys() == {'pause_handling/1', 'smooth_turn_taking/1', 'user_interruption/1',
                            'v1.5/user_interruption/1'}

    def said(id, role):
        return [(turn['start'], turn['end'], turn['text']) for turn in found[id]['turns']
                if turn['role'] == role]
    assert said('smooth_turn_taking/1', 'user') == said('pause_handling/1', 'user') == [(0, 40, 'Wait, why?')]
    assert said('smooth_turn_taking/1', 'assistant') == [(50, 100, 'Because everything')]
    assert said('user_interruption/1', 'user') == [(0, 40, 'Wait, why?'), (100, 130, 'Stop!')]
    np.testing.assert_allclose(found['smooth_turn_taking/1']['wave'], c['wave'][6400:70400], atol=1e-4)
    heard, before = found['user_interruption/1']['speaks'], c['speaks']
    assert heard['assistant'].any() and (heard['user'] == before['user'][10:200]).all()

    foreign.export_full_duplex_bench([c], str(tmp_path / 'in/export'))      # does not count twice
    assert [talk['id'] for talk in foreign.read_conversations(tmp_path / 'in', vad='energy')] == ['sw']

    (tmp_path / 'out/pause_handling/1/transcription.json').write_text('[{"text": "Wait,"}]')
    with pytest.raises(ValueError, match='pause_handling/1/transcription.json is no list of words'):
        list(foreign.read_conversations(tmp_path / 'out', vad='energy'))


# a pause of 0.68 s, into which the assistant talks for 1.4 s
TAKEN = [('user', 0.4, 1.2, 'so I was'), ('assistant', 1.4, 2.8, 'How nice'), ('user', 1.88, 3.4, 'there')]


def test_the_pause_that_ends_a_turn_can_be_set(tmp_path):
    """
    By 0.5 s the user's two parts are turns, a question and an interruption. By 0.7 s they are one turn, with
    a pause that is taken for its end, and a sample of pause_handling.
    """
    (tmp_path / 'a.txt').write_text('\n'.join(' '.join(map(str, row)) for row in TAKEN))
    for gap_sec, n_turn, tasks in ((0.5, 2, 'smooth_turn_taking user_interruption v1.5/user_interruption'),
                                   (0.7, 1, 'pause_handling')):
        c, = foreign.read_conversations(tmp_path, gap_sec=gap_sec)
        found = assess(c)
        assert len(found) == n_turn and [sample.task for sample in foreign.samples_of(c)] == tasks.split()
    assert found[0]['pauses'] == [(30, 47, True)] and found[0]['false_start'] == 35


def test_a_samples_own_pauses_end_no_turn(tmp_path):
    """
    As Full-Duplex-Bench's own example of a pause: 0.68 s, which pause.json has. The folder of the sample can
    be read, too, and that of the set; words may lack an end, or be sorted by speaker.
    """
    folder = tmp_path / 'synthetic_pause_handling/1'
    folder.mkdir(parents=True)
    for name, role, pitch in (('input.wav', 'user', 120), ('output.wav', 'assistant', 180)):
        spans = [(start, end) for who, start, end, _ in TAKEN if who == role]
        soundfile.write(folder / name, speech(spans, 4.0, pitch), 16000)
    (folder / 'pause.json').write_text('[{"text": "[PAUSE]", "timestamp": [1.2, 1.88]}]')
    for root, id in ((tmp_path, 'synthetic_pause_handling/1'), (folder.parent, '1'), (folder, '1')):
        c, = foreign.read_conversations(root, vad='energy')
        assert (c['id'], c['expected']) == (id, None)
        turn, = assess(c)       # heard, without a transcript
        assert [taken for *_, taken in turn['pauses']] == [True] and turn['false_start'] is not None
    item = [dict(text=word, timestamp=[start, end]) for role, start, end, word in TAKEN if role == 'user']
    item += [dict(text='?', timestamp=[None, None]), dict(text='and', timestamp=[3.5, None])]
    (folder / 'transcription.json').write_text(json.dumps([dict(speaker='A', item=item)]))
    c, = foreign.read_conversations(folder, vad='energy')
    assert [turn['text'] for turn in c['turns'] if turn['role'] == 'user'] == ['so I was there and']
    (folder / 'pause.json').write_text('[{"text": "[PAUSE]"}]')
    with pytest.raises(ValueError, match='pause.json does not say from when to when'):
        list(foreign.read_conversations(folder, vad='energy'))


def test_output_json_is_written_for_all_or_none(tmp_path):
    """Their scripts pass over a sample without output.json: only those of silent assistants would count."""
    known, heard = conversation(tmp_path / 'a', SAID), conversation(tmp_path / 'b', SAID, n_sec=8.0)
    for turn in heard['turns']:
        del turn['words']
    with pytest.raises(ValueError, match='sw has no audio, and not all words of the assistants have times'):
        foreign.export_full_duplex_bench([known, heard], str(tmp_path / 'no'))
    assert not (tmp_path / 'no').exists()
    heard['turns'] = [turn for turn in heard['turns'] if turn['role'] == 'user' or turn['start'] > 140]
    foreign.export_full_duplex_bench([heard], str(tmp_path / 'out'))
    assert list((tmp_path / 'out').rglob('output.wav')) and not list((tmp_path / 'out').rglob('output.json'))
    foreign.export_full_duplex_bench([known], str(tmp_path / 'words'))
    assert list((tmp_path / 'words').rglob('output.json')) and not list((tmp_path / 'words').rglob('*.wav'))
    with pytest.raises(ValueError, match="there is no user's turn"):
        foreign.export_full_duplex_bench([], str(tmp_path / 'none'))


MATERIAL = ROOT / '../shared/data'


@pytest.mark.skipif(not MATERIAL.is_dir(), reason='no real speech in ../shared/data')
@pytest.mark.parametrize('vad', ['webrtc', 'energy'])
def test_real_voices_are_heard_when_they_speak(tmp_path, vad):
    """
    Two readers and two short sentences on two channels, over a quiet noise: each is heard from its first
    10 ms within 35 dB of its loudest to its last, but for 3 frames (energy: 4, at the faint end of a
    sentence).
    """
    if vad == 'webrtc':
        pytest.importorskip('webrtcvad', reason='pip install webrtcvad-wheels')
    wave, truth = 1e-3 * np.random.default_rng(0).standard_normal((20 * 16000, 2)).astype(np.float32), []
    for channel, start_sec, name in (
        (0, 0.5, 'lhotse/ljspeech/storage/LJ002-0035.wav'),
        (1, 2.4, 'speech/zero_shot_prompt.wav'),
        (0, 5.5, 'speech/librispeech-1995-1837-0001.wav'),
        (1, 13.0, 'speech/output1.wav'),
    ):
        said = read_audio(str(MATERIAL / name), 16000, 0)
        level_db = 20 * np.log10(np.abs(said[:len(said) // 160 * 160]).reshape(-1, 160).max(1) + 1e-9)
        loud = np.flatnonzero(level_db > level_db.max() - 35)
        said = said[loud[0] * 160:(loud[-1] + 1) * 160]
        start = round(start_sec * 16000)
        wave[start:start + len(said), channel] += said
        truth.append((channel, start_sec * 25, (start_sec + len(said) / 16000) * 25))
    soundfile.write(tmp_path / 'a.wav', wave, 16000)
    c, = foreign.read_conversations(tmp_path, vad=vad, gap_sec=1.0)
    got = [(int(turn['role'] == 'assistant'), turn['start'], turn['end']) for turn in c['turns']]
    assert len(got) == 4, got
    assert np.abs(np.array(got) - np.array(truth)).max() <= (3 if vad == 'webrtc' else 4), (got, truth)
