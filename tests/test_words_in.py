"""Times of words: from every form that they come in, through a data folder, and back."""
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_corpora import check_reasons, cut, duplex, turns, write_rows, write_wav  # noqa: F401

from data import words
from data.dialogues import Dialogues, save_dialogues
from data.lhotse import prepare as lhotse_cuts
from data.made_up import hum
from data.manifest import prepare as manifest
from data.moshi_finetune import prepare as moshi
from data.tokenise import Recording, fit, on_frames
from flatten import Letters, check, flatten, get_layout

LONG = '''File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 2.0
tiers? <exists>
size = {n}
item []:
'''


def long_textgrid(**tiers):
    """As MFA writes it, silence included. tiers: name='words' or 'A - words' -> [(word, start, end)]"""
    text = LONG.format(n=len(tiers))
    for n, (name, entries) in enumerate(tiers.items(), 1):
        text += (f'    item [{n}]:\n        class = "IntervalTier" \n        name = "{name}" \n'
                 f'        xmin = 0 \n        xmax = 2.0 \n        intervals: size = {len(entries)} \n')
        for m, (word, start, end) in enumerate(entries, 1):
            text += (f'        intervals [{m}]:\n            xmin = {start} \n            xmax = {end} \n'
                     f'            text = "{word}" \n')
    return text


def short_textgrid(**tiers):
    text = f'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n2.0\n<exists>\n{len(tiers)}\n'
    for name, entries in tiers.items():
        text += f'"IntervalTier"\n"{name}"\n0\n2.0\n{len(entries)}\n'
        text += ''.join(f'{start}\n{end}\n"{word}"\n' for word, start, end in entries)
    return text


def json_textgrid(**tiers):
    """MFA's --output_format=json"""
    return json.dumps(dict(start=0, end=2.0, tiers={
        name: dict(type='interval', entries=[[start, end, word] for word, start, end in entries])
        for name, entries in tiers.items()}))


HELLO = [('', 0, 0.2), ('hello', 0.2, 0.6), ('there', 0.6, 1.0), ('', 1.0, 2.0)]
PHONES = [('HH', 0.2, 0.3), ('sil', 0.3, 2.0)]
FRAMES = [dict(text='Hello', start=5, end=15), dict(text='there.', start=15, end=25)]


# ------------------------------------------------------------------------------------------------------------
# the record

def turn(role, start, end, text='a b', **more):
    return dict(role=role, start=start, end=end, text=text, **more)


def test_words_come_back_only_where_they_are_asked_for(tmp_path, small_codec):
    """The first dialogue's second turn has none, nor has the second's first."""
    said = [dict(text='ä', start=0, end=2), dict(text='b', start=2, end=2)]
    dialogues = [
        dict(id='1', user=[1] * 9, assistant=[2] * 9, turns=[
            turn('user', 0, 4, words=said), turn('user', 4, 5)]),
        dict(id='2', user=[1] * 9, assistant=[2] * 9, turns=[
            turn('user', 0, 4, words=[]), turn('assistant', 4, 9, words=[dict(text='c', start=5, end=9)])])]
    save_dialogues(tmp_path / 'train.arrow', dialogues, small_codec.describe())
    data = Dialogues(str(tmp_path), 'train')
    assert not any('words' in turn for i in range(2) for turn in data[i]['turns'])
    data.with_words = True
    assert [[turn.get('words') for turn in data[i]['turns']] for i in range(2)] == [
        [said, None], [None, [dict(text='c', start=5, end=9)]]]
    for i in range(2):
        check(data[i], small_codec.n_codes)
        data.with_words = False
        plain, _ = (flatten(record, get_layout('duplex3'), Letters())[0].ids
                    for record in (data[i], dialogues[i]))
        data.with_words = True
        assert np.array_equal(plain, flatten(data[i], get_layout('duplex3'), Letters())[0].ids)

    none = [dict(dialogue, turns=[turn('user', 0, 4)]) for dialogue in dialogues]
    save_dialogues(tmp_path / 'val.arrow', none, small_codec.describe())
    assert 'words' not in Dialogues(str(tmp_path), 'val', with_words=True)[1]['turns'][0]
    save_dialogues(tmp_path / 'test.arrow', [dict(none[0], turns=[
        turn('user', 0, 4, words=[dict(text=None, start=0, end=1)])])], small_codec.describe())
    with pytest.raises(ValueError, match='a word has no text, start or end'):
        Dialogues(str(tmp_path), 'test')


@pytest.mark.parametrize('bad', [
    5, 'ab', [5], [dict(text='a', start=2)], [dict(text=None, start=2, end=3)],
    [dict(text='a', start=2.0, end=3)], [dict(text='a', start=1, end=3)], [dict(text='a', start=3, end=2)],
    [dict(text='a', start=3, end=9)], [dict(text='a', start=4, end=5), dict(text='b', start=3, end=5)]])
def test_words_that_are_none(bad):
    dialogue = dict(id='x', user=[0] * 9, assistant=[0] * 9, turns=[turn('user', 2, 8, words=bad)])
    with pytest.raises(ValueError, match="^dialogue 'x': user turn 2 to 8 has the word .* each needs text"):
        check(dialogue, 1)


times = st.floats(-2, 12, allow_nan=False)
spans = st.tuples(times, st.floats(0, 3)).map(lambda at: dict(text='w', start_sec=at[0], end_sec=sum(at)))
spoken = st.builds(lambda role, span, words: dict(span, role=role, words=words),
                   st.sampled_from(['user', 'assistant']), spans, st.lists(spans))


@given(st.lists(spoken), st.integers(1, 200), st.sampled_from([12.5, 25.0, 50.0]))
def test_whatever_the_times_are_the_framed_words_are_a_record(said, n_frame, rate_hz):
    framed, _ = on_frames(said, n_frame, rate_hz)
    check(dict(id='x', user=[0] * n_frame, assistant=[0] * n_frame, turns=framed), 1)


def test_words_outside_their_turn_are_cut_off():
    at = [(-1, -0.5), (-0.5, 0.1), (0.1, 0.1), (0.3, 0.9), (0.9, 2)]
    said = dict(turn('user', 0, 0), start_sec=0.0, end_sec=0.4, words=[
        dict(text=str(n), start_sec=start, end_sec=end) for n, (start, end) in enumerate(at)])
    framed, _ = on_frames([said], 50, 25.0)
    assert [(word['text'], word['start'], word['end']) for word in framed[0]['words']] == [
        ('1', 0, 3), ('2', 2, 3), ('3', 7, 10)]


def test_a_word_that_ends_before_it_starts(small_codec):
    said = dict(role='user', start_sec=0.0, end_sec=1.0, text='a',
                words=[dict(text='a', start_sec=0.5, end_sec=0.4)])
    message = "the word 'a' of the user starts at 0.5 s and ends before that, at 0.4 s"
    with pytest.raises(ValueError, match=message):
        fit(Recording(np.zeros(16000, np.float32), None, [said]), small_codec, 0.1)


# ------------------------------------------------------------------------------------------------------------
# spelling

@pytest.mark.parametrize('said, text, expected', [
    (['hello', 'there'], 'Hello there.', ['Hello', 'there.']),
    (['what', '', 'said'], '"What?", he said.', ['"What?",', 'he', 'said.']),
    (['he', 'said', 'yes'], 'He said (yes)', ['He', 'said', '(yes)']),
    (['hello', 'he', 'said'], 'Hello — he said', ['Hello —', 'he', 'said']),
    (["don't", 'well', 'known'], "Don't! Well-known", ["Don't!", 'Well-', 'known']),
    (['今天', '天气', '好'], '今天天气好。', ['今天', '天气', '好。']),
    (['straße', 'ist'], 'STRASSE  ist\n', ['STRASSE', 'ist']),
    (['नमस्ते', 'जी'], 'नमस्ते जी!', ['नमस्ते', 'जी!']),
    (['a', '-', 'b'], 'A - b', ['A -', '', 'b']),
    (['a', 'c'], 'a b', None), (['a'], 'a b', None), (['a', ''], 'a', None), (['', ''], 'a b', None),
    (['a', '', '-', '', 'b'], 'a b c b', None), (['the', ''], 'The end', ['The', 'end']),
    (['', 'a', '', 'a'], 'Has a cat a', ['Has', 'a', 'cat', 'a']), ([], '', None), (['a'], '', None)])
def test_words_are_spelled_as_the_text(said, text, expected):
    assert words.spell(said, text) == expected


letters = st.text(st.characters(categories=['L', 'Nd']), min_size=1, max_size=4)


@given(st.lists(letters, min_size=1, max_size=8), st.data())
def test_marks_and_capitals_never_hide_a_text(tokens, data):
    """Whatever marks stand at the end of words, the pieces are the text, word by word."""
    marked = [token + data.draw(st.sampled_from(['', '.', '?!', ',', '…"'])) for token in tokens]
    assert words.spell([token.lower() for token in tokens], ' '.join(marked)) == marked


def test_two_unknown_words_cost_no_more_time_than_one():
    """A pattern that goes back and forth would take longer than the universe has."""
    assert words.spell(['the', ''] * 500 + ['end'], 'the cat ' * 500 + 'and') is None
    assert words.spell(['the', ''] * 500, 'the cat ' * 500) == ['the', 'cat'] * 500


def test_unknown_words_are_filled_in_or_missing():
    said = [('the', 0.0, 0.2), ('<unk>', 0.2, 0.5), ('[laughter]', 0.5, 0.6), ('cat', 0.6, 0.9)]
    kept, remark = words.clean_words(said, 'The jabberwock, cat.')
    assert [word['text'] for word in kept] == ['The', 'jabberwock,', 'cat.'] and not remark
    kept, remark = words.clean_words(said)
    assert [word['text'] for word in kept] == ['the', 'cat'] and 'some words are missing' in remark
    kept, remark = words.clean_words(said, 'Something else.')
    assert [word['text'] for word in kept] == ['the', 'cat'] and 'are not those of the text' in remark
    assert words.clean_words([], 'Hello.') == ([], '')


# ------------------------------------------------------------------------------------------------------------
# one-sided utterances

@pytest.mark.parametrize('form', [long_textgrid, short_textgrid])
def test_textgrids_beside_the_audio(form, tmp_path, prepare):  # noqa: F811
    pytest.importorskip('praatio')
    for name in 'abcde':
        write_wav(tmp_path / f'wavs/{name}.wav', hum(140, 2.0))
    for name, content in dict(
            a=form(words=HELLO, phones=PHONES).encode(), b=form(words=HELLO).encode('utf-16'),
            c=form(**{'A - words': HELLO, 'A - phones': PHONES}).encode(), d=form(phones=PHONES).encode(),
            e=b'File type = "ooTextFile"\nno more').items():
        (tmp_path / f'wavs/{name}.TextGrid').write_bytes(content)
    path = write_rows(tmp_path / 'rows.jsonl', [
        dict(id=name, audio=f'wavs/{name}.wav', text='Hello there.') for name in 'abcde'])
    records, skipped = prepare(manifest, path)
    assert {id: (turns(record), record['words']) for id, record in records.items()} == dict.fromkeys(
        'abc', ([('user', 0, 50, 'Hello there.')], [FRAMES]))
    check_reasons(skipped, dict(d='has the tiers \'phones\': none is called "words"', e='is no TextGrid'))


def test_a_folder_that_an_aligner_wrote(tmp_path, prepare, capsys):  # noqa: F811
    """c was left out; d has no text, so its turns follow from its words; e has them in two files."""
    pytest.importorskip('praatio')
    for name in 'abcde':
        write_wav(tmp_path / f'wavs/{name}.wav', hum(140, 2.0))
    (tmp_path / 'aligned/wavs').mkdir(parents=True)
    pause = [('hello', 0.2, 0.6), ('<unk>', 0.6, 0.7), ('there', 1.4, 1.8)]
    for name, content in {'a.TextGrid': long_textgrid(words=HELLO), 'b.json': json_textgrid(words=HELLO),
                          'd.TextGrid': short_textgrid(words=pause), 'e.TextGrid': long_textgrid(words=HELLO),
                          'e.ctm': 'e 1 0.2 0.4 hello\n'}.items():
        (tmp_path / 'aligned/wavs' / name).write_text(content)
    path = write_rows(tmp_path / 'rows.jsonl', [
        dict(id=name, audio=f'/gone/wavs/{name}.wav', **({} if name == 'd' else dict(text='Hello there.')))
        for name in 'abcde'])
    records, skipped = prepare(manifest, path, f'--words={tmp_path / "aligned"}')
    assert {id: record['words'][0] for id, record in records.items() if id in 'abc'} == dict(
        a=FRAMES, b=FRAMES, c=[])
    assert turns(records['d']) == [('user', 5, 15, 'hello'), ('user', 35, 45, 'there')]
    check_reasons(skipped, dict(e='e.wav has word times in e.TextGrid and e.ctm; keep one'))
    out = capsys.readouterr().out
    assert 'note: in 1 recordings there are no times of the words; the first is c' in out
    assert 'some words are missing, as the aligner did not know them; the first is d' in out
    assert turns(prepare(manifest, path, f'--words={tmp_path / "aligned"}', '--gap_sec=1')[0]['d']) == [
        ('user', 5, 45, 'hello there')]
    with pytest.raises(ValueError, match='no file or folder .*gone'):
        prepare(manifest, path, f'--words={tmp_path / "gone"}')


CTM = ''';; a comment
long 1 0.30 0.20 no
long 1 0.50 0.30 hello
a 1 0.20 0.40 hello 0.98
a 1 0.60 0.40 there

a 1 1.00 0.10 <eps>
long 1 0.80 0.40 there
u1 1 0.20 0.40 hello
u1 1 0.60 0.40 there
'''


def test_a_ctm_file_of_a_corpus(tmp_path, prepare):  # noqa: F811
    """Rows of one recording need not be together. Words of 'long' count from its start, and those outside of
    a row's piece are not its words; an aligner that was given the piece alone calls it by its id, and counts
    from there."""
    write_wav(tmp_path / 'a.wav', hum(140, 2.0))
    write_wav(tmp_path / 'long.wav', hum(140, 3.0))
    (tmp_path / 'all.ctm').write_text(CTM)
    (tmp_path / 'bad.ctm').write_text('a 1 0.2 hello\n')
    (tmp_path / 'other.ctm').write_text('b 1 0.2 0.4 hello\n')
    piece = dict(audio='long.wav', text='Hello there.', offset=0.48, duration=1.0)
    path = write_rows(tmp_path / 'rows.jsonl', [
        dict(id='a', audio='a.wav', text='Hello there.'), dict(piece, id='u1'), dict(piece, id='u2'),
        dict(piece, id='late', offset=1.6), dict(id='bad', audio='a.wav', words='bad.ctm', text='Hi'),
        dict(id='other', audio='a.wav', words='other.ctm'),
        dict(id='gone', audio='a.wav', words='gone.ctm', text='x')])
    records, skipped = prepare(manifest, path, f'--words={tmp_path / "all.ctm"}')
    assert records['a']['words'] == records['u1']['words'] == [FRAMES]
    assert [(word['text'], word['start'], word['end']) for word in records['u2']['words'][0]] == [
        ('Hello', 0, 8), ('there.', 8, 18)]
    assert records['late']['words'] == [[]] and records['u1']['turns'][0]['text'] == 'Hello there.'
    check_reasons(skipped, {
        'bad': "bad.ctm has 'a 1 0.2 hello', which is no row of a CTM file",
        'other': 'has no text under text or transcript or txt',
        'gone': 'no file gone.ctm'})
    (tmp_path / 'a.ctm').write_text('b 1 0.2 0.4 hello\n')
    assert 'a.ctm has no words of a, but of b' in prepare(manifest, path)[1]['a']


def test_two_speakers_are_no_utterance(tmp_path, prepare):  # noqa: F811
    write_wav(tmp_path / 'a.wav', hum(140, 2.0))
    (tmp_path / 'a.ctm').write_text('a A 0.2 0.4 hello\na B 0.6 0.4 there\n')
    path = write_rows(tmp_path / 'rows.jsonl', [dict(audio='a.wav', text='x'), dict(audio='a.wav')])
    with pytest.raises(ValueError, match='has the words of A, B; an utterance is of one speaker'):
        prepare(manifest, path)


# ------------------------------------------------------------------------------------------------------------
# dialogues

TALK = dict(A=[('hello', 0.2, 0.6), ('there', 0.6, 1.0)], B=[('hi', 1.2, 1.5)])
ALIGNMENTS = [[word, [start, end], speaker] for speaker, said in TALK.items() for word, start, end in said]
EXPECTED = [('user', 5, 25, 'hello there'), ('assistant', 30, 38, 'hi')]


def test_two_speakers_in_all_forms_are_the_same_dialogue(tmp_path, prepare):  # noqa: F811
    """One word list of Switchboard among them."""
    pytest.importorskip('praatio')
    tiers = {f'{speaker} - words': said for speaker, said in TALK.items()}
    ctm = ''.join(f'NAME {speaker} {start} {end - start:.1f} {word}\n'
                  for speaker, said in TALK.items() for word, start, end in said)
    switchboard = {f'sw2001{speaker}-ms98-a-word.text': ''.join(
        f'sw2001{speaker}-ms98-a-0001 {start} {end} {word}\n' for word, start, end in said)
        for speaker, said in TALK.items()}
    files = {'long.TextGrid': long_textgrid(**tiers), 'short.TextGrid': short_textgrid(**tiers),
             'grid.json': json_textgrid(**tiers), 'ctm.ctm': ctm.replace('NAME', 'ctm'),
             'moshi.json': json.dumps(dict(alignments=ALIGNMENTS)), **switchboard}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    names = ['long', 'short', 'grid', 'ctm', 'moshi', 'sw02001', 'none']
    for name in names:
        write_wav(tmp_path / f'{name}.wav', hum(140, 2.0), hum(220, 2.0))
    path = write_rows(tmp_path / 'data.jsonl', [dict(path=f'{name}.wav') for name in names])
    records, skipped = prepare(moshi, path, '--assistant_speakers=B')
    assert {id: turns(record) for id, record in records.items()} == dict.fromkeys(names[:-1], EXPECTED)
    assert {str(record['words']) for record in records.values()} == {str([
        [dict(text='hello', start=5, end=15), dict(text='there', start=15, end=25)],
        [dict(text='hi', start=30, end=38)]])}
    check_reasons(skipped, dict(none='none.wav has no times of words beside it: no file'))
    with pytest.raises(ValueError, match='speakers A, B, none of them the assistant: --assistant_speakers=B'):
        prepare(moshi, path)


def test_sides_that_were_aligned_one_by_one(tmp_path, prepare):  # noqa: F811
    """In b both files are called words, in c a row names a file of both."""
    pytest.importorskip('praatio')
    for name in 'abc':
        write_wav(tmp_path / f'talks/{name}.wav', hum(140, 2.0), hum(220, 2.0))
    for name in 'ab':
        for role, said in zip(('user', 'assistant'), TALK.values()):
            at = tmp_path / ('talks' if name == 'a' else 'aligned/talks')
            at.mkdir(exist_ok=True, parents=True)
            (at / f'{name}.{role}.TextGrid').write_text(long_textgrid(words=said))
    (tmp_path / 'both.ctm').write_text('c assistant 1.2 0.3 hi\nc user 0.2 0.4 hello\nc user 0.6 0.4 there\n')
    rows = [dict(path=f'talks/{name}.wav') for name in 'abc']
    rows[2]['words'] = 'both.ctm'
    path = write_rows(tmp_path / 'data.jsonl', rows)
    records, skipped = prepare(moshi, path)
    assert {id: turns(record) for id, record in records.items()} == {'talks/a': EXPECTED, 'talks/c': EXPECTED}
    assert 'talks/b' in skipped
    records, skipped = prepare(moshi, path, f'--words={tmp_path / "aligned"}')
    assert turns(records['talks/b']) == EXPECTED and 'talks/a' in skipped


def aligned_cut(user):
    said = cut('c', user, said=[('7169', 0.2, 0.8, 'Hello there.')])
    silence = [[mark, 0.6, 0.0, None] for mark in ('', '<eps>')]
    said['supervisions'][0]['alignment'] = dict(phone=[['HH', 0.2, 0.1, None]], word=[
        ['HELLO', 0.2, 0.4, None], *silence, ['THERE', 0.6, 0.4, None]])
    return said


def to_shar(folder, one_cut):
    from lhotse import CutSet
    folder.mkdir()
    CutSet.from_cuts([one_cut]).to_shar(str(folder), fields=dict(recording='flac'))
    return folder


def test_alignments_of_lhotse(tmp_path, prepare, duplex, monkeypatch, capsys):  # noqa: F811
    """In cuts, in supervisions beside recordings, and in Shar; and in a window of 0.5 s that begins 0.2 s
    after the recording's start, which Shar forgets."""
    from lhotse import CutSet
    from lhotse.serialization import deserialize_item

    def words_in(*arguments):
        (record,) = prepare(lhotse_cuts, *arguments)[0].values()
        return record['words'][0]

    whole = aligned_cut(duplex[0])
    assert words_in(write_rows(tmp_path / 'cuts.jsonl', [whole])) == FRAMES
    recordings = write_rows(tmp_path / 'recordings.jsonl', [dict(duplex[0], id='c')])
    said = write_rows(tmp_path / 'supervisions.jsonl', whole['supervisions'])
    assert words_in(recordings, f'--supervisions={said}') == FRAMES

    parsed = deserialize_item(aligned_cut(duplex[0]))
    window = parsed.truncate(offset=0.2, duration=0.5)
    within = [dict(text='Hello', start=0, end=10), dict(text='there.', start=10, end=13)]
    CutSet.from_cuts([window]).to_file(tmp_path / 'window.jsonl')
    assert words_in(tmp_path / 'window.jsonl') == within
    old = json.loads((tmp_path / 'window.jsonl').read_text())   # of a Lhotse that moved words with the cut
    old['supervisions'][0]['alignment'] = dict(word=[['HELLO', 0.0, 0.4, None], ['THERE', 0.4, 0.4, None]])
    assert words_in(write_rows(tmp_path / 'old.jsonl', [old])) == within

    monkeypatch.chdir(tmp_path)     # Lhotse's paths start here
    assert words_in(to_shar(tmp_path / 'shar', parsed)) == FRAMES
    assert words_in(to_shar(tmp_path / 'lost', window)) == []
    assert 'note: in 1 recordings words are outside of their supervision' in capsys.readouterr().out


def test_a_kind_that_is_not_read(tmp_path):
    with pytest.raises(ValueError, match='a.srt is no file of word times: .json, .textgrid, .ctm are read'):
        words.parse('a.srt', b'')
    with pytest.raises(ValueError, match='a.ctm is neither UTF-8 nor UTF-16'):
        words.parse('a.ctm', b'\xff\xff\xff')
    with pytest.raises(ValueError, match="a.json has the word 'a' from nan s"):
        words.parse('a.json', b'{"alignments": [["a", [NaN, 1], "x"]]}')
