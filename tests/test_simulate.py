"""Text dialogues become conversations: what is read, what is dropped, who speaks when; with a humming TTS."""
import gzip
import json
import pathlib
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import simulate, tokenise
from data.simulate import SAMPLE_RATE, make_plan, place_words, with_noise
from data.texts import collect, n_words, pairs, read_row, rows, speakable
from flatten import check
from measures import foreign

TEXTS = pathlib.Path(__file__).parent.parent.parent / 'shared/data/text'
CHARACTER = SAMPLE_RATE // 20       # samples that Hum takes for a character


class Hum:
    """50 ms of a tone for each character; knows when each word starts, unless told not to."""
    voices = ['low', 'high', 'robot']

    def __init__(self, tells=True):
        self.tells = tells

    def style(self, rng):
        return {}

    def say(self, text, voice):
        pitch = 0.1 * (1 + self.voices.index(voice))
        wave = np.sin(np.arange(len(text) * CHARACTER) * pitch).astype(np.float32)
        return wave, [(word, at * CHARACTER) for word, at in split(text)] if self.tells else None


def split(text):
    """[(word, where it starts)], as espeak-ng tells it: by spaces, or each Chinese character."""
    return [(match.group(), match.start())
            for match in simulate.re.finditer(rf'[{simulate.HAN}]|[^\s{simulate.HAN}]+', text)]


def get_args(**changes):
    args = simulate.arguments().parse_args(['--out=', '--codec=', 'x'])
    default = dict(p_interrupt=0, p_backchannel=0, p_hesitate=0, assistant_voice='robot', assistant_style={})
    vars(args).update(default | changes)
    return args


DIALOGUE = ['what is the capital of Peru?', 'The capital of Peru is Lima, a city of ten million people.',
            'and of France?', 'Paris, of course.']


def converse(texts=DIALOGUE, id='d', tts=None, **changes):
    """-> user, assistant, turns, plan, args"""
    args = get_args(**changes)
    plan = make_plan(id, len(texts) // 2, tts or Hum(), ['low', 'high'], args)
    return *simulate.simulate(texts, plan, tts or Hum(), args), plan, args


def sound(wave):
    """first and end sample that is not silent"""
    at = np.flatnonzero(wave)
    return at[0], at[-1] + 1


# ------------------------------------------------------------------------------------------------------------
# what can be spoken

KEPT = {
    'What is the capital of Peru?': None,
    "It's **really** good, *isn't* it? Use `print`.": "It's really good, isn't it? Use print.",
    'Well-known in the U.S.: 50% off, $30 and/or €5 at 3:30 p.m. (24/7)': None,
    'First line\nSecond line.\nthird line': 'First line. Second line. third line',
    'I love it 😊 so much, thank you': 'I love it so much, thank you',
    'Tom &amp; Jerry': 'Tom & Jerry',
    '你好，今天天气怎么样？': None,
    '以下是常识：\n生活环境\n大熊猫生活在中国。': '以下是常识：生活环境。大熊猫生活在中国。',
    '我有１２个ｉPhone，你呢～': '我有12个iPhone，你呢～',
    '【读书】《红楼梦》是“谁”写的\\n曹雪芹': '【读书】《红楼梦》是“谁”写的。曹雪芹',
    '3.5%的增长，10：30到11点': None,
    'a' + ' a' * 199: None,
    '好' * 200: None,
}
DROPPED = {
    'code': ['```python\nx\n```', 'use os.path.join(a, b) here', 'int x;\n', 'def add(a, b)',
             'call main() now', 'my_list is long', 'a => b', '写一个函数 foo_bar'],
    'table': ['| a | b |', 'name\tage\nTom\t3'],
    'url': ['see https://a.bc', 'go to www.example.com', 'ask me@here.org', '请访问pcmag.com'],
    'markup': ['# Title', '- one\n- two', '• 一个', '<b>bold</b>', 'see [1]', 'dear [name]',
               '他喜欢去___看电影', '[心]你好'],
    'list': ['1. Eat\n2. Sleep', '1.准备\n2.开始', '答：1、吃饭；2、睡觉', '（1）一个', 'A. red  B. blue',
             'Choose one: A) HTML B) CSS'],
    'formula': ['x = 3', '5 + 3', '3*4', '24 ÷ 6', 'a^2', r'\frac', 'f(x) is', '面积是πr²', '1 < 2'],
    'script': ['привет', 'α is small', 'これは'],
    'symbols': ['哈哈😂😂', '★☆★ hi', '发电机 → 风车', '😊'],
    'long': ['a' + ' a' * 200, '好' * 201, '好' * 150 + ' word' * 51],
    'empty': ['', ' \n', '。。。', '?!'],
}


@pytest.mark.parametrize('text, said', KEPT.items())
def test_can_be_spoken(text, said):
    assert speakable(text) == (said or text, None)
    assert speakable(said or text) == (said or text, None)      # cleaning it twice changes nothing


@pytest.mark.parametrize('reason, text', [
    (reason, text) for reason, texts in DROPPED.items() for text in texts])
def test_cannot_be_spoken(reason, text):
    assert speakable(text)[1] == reason


def test_one_count_for_both_languages():
    assert n_words("It's a well-known word, isn't it?") == 6
    assert n_words('我有2个 iPhone，GPT。') == 6


# ------------------------------------------------------------------------------------------------------------
# forms

U, A = 'hi there', 'hello'
FORMS = {
    'alpaca': dict(instruction='hi', input='there', output=A),
    'belle': dict(instruction='Human: hi there\nAssistant: hello\nHuman: hi there\nAssistant:', input='',
                  output=A),
    'belle_eval': dict(question=U, std_answer=A, **{'class': 'qa'}),
    'moss': dict(conversation_id=1, chat=dict(
        turn_2={'Human': '<|Human|>: hi there<eoh>\n', 'MOSS': '<|MOSS|>: hello<eom>\n'},
        turn_1={'Human': '<|Human|>: hi there<eoh>\n', 'Inner Thoughts': '<|Inner Thoughts|>: None<eot>\n',
                'MOSS': '<|MOSS|>: hello<eom>\n'})),
    'moss2': dict(plain_text='MOSS is an assistant. [Human]: hi there <eoh> [MOSS]: hello <eoa>'),
    'ultrachat': dict(id='0', data=[U, A, U, A]),
    'sharegpt': dict(id='0', conversations=[
        {'from': who, 'value': text} for who, text in (
            ('system', 's'), ('gpt', 'x'), ('human', 'hi'), ('human', 'there'), ('gpt', A))]),
    'messages': dict(messages=[
        dict(role='user', content=U), dict(role='assistant', content=A),
        dict(role='user', content='left open')]),
    'parts': dict(messages=[
        dict(role='developer', content=[dict(type='text', text='s')]),
        dict(role='user', content=[dict(type='text', text='hi'), dict(type='input_text', text='there')]),
        dict(role='assistant', content=[dict(text=A)], tool_calls=None)]),
    'oasst': dict(prompt=dict(role='prompter', text=U, lang='en', replies=[
        dict(role='assistant', text='worse', lang='en', rank=1, replies=[]),
        dict(role='assistant', text='gone', lang='en', rank=0, deleted=True, replies=[]),
        dict(role='assistant', text=A, lang='en', rank=0, replies=[
            dict(role='prompter', text=U, lang='en', rank=None, replies=[
                dict(role='assistant', text='¿qué?', lang='es', rank=0, replies=[])])])])),
    'lccc': ['hi there', 'hello', 'hi there'],
}


@pytest.mark.parametrize('form', FORMS)
def test_each_form_is_told_by_its_content(form):
    said = [(speakable(user)[0].replace('. ', ' '), speakable(assistant)[0])
            for user, assistant in pairs(read_row(FORMS[form]))]
    assert said == [(U, A)] * (2 if form in ('belle', 'moss', 'ultrachat') else 1)


def messages(*said):
    return dict(messages=[dict(role='user', content=U), dict(role='assistant', content=A), *said])


def moss(commands, results):
    turns = dict(turn_1=('None', 'None'), turn_2=(commands, results), turn_3=('None', 'None'))
    return dict(chat={name: {
        'Human': f'<|Human|>: {U}<eoh>\n', 'Inner Thoughts': '<|Inner Thoughts|>: I need a tool.<eot>\n',
        'Commands': f'<|Commands|>: {asked}<eoc>\n', 'Tool Responses': f'<|Results|>: {told}<eor>\n',
        'MOSS': f'<|MOSS|>: {A}<eom>\n'} for name, (asked, told) in turns.items()})


ASKS, ANSWERS = dict(role='user', content=U), dict(role='assistant', content=A)
PICTURE = dict(type='image_url', image_url=dict(url='data:…'))
TOLD = [dict(type='text', text=U), PICTURE]
CALL = [dict(id='1', type='function', function=dict(name='look_up', arguments='{}'))]


@pytest.mark.parametrize('reason, row', [
    ('no text', messages(dict(role='user', content=TOLD), ANSWERS)),
    ('no text', messages(ASKS, dict(role='assistant', content=[PICTURE]))),
    ('no text', messages(dict(role='user', content=[dict(type='input_audio', input_audio={})]))),
    ('no text', messages(dict(role='user', content='<image>What is this?'), ANSWERS)),
    ('tool', messages(ASKS, dict(role='assistant', content=None, tool_calls=CALL),
                      dict(role='tool', content='3'), ANSWERS)),
    ('tool', messages(ASKS, ANSWERS, dict(role='tool', content='3'), ANSWERS)),
    ('tool', messages(ASKS, dict(role='function_call', content='{}'), dict(role='observation', content='3'))),
    ('tool', messages(ASKS, dict(role='assistant', content=[dict(text=A), dict(type='tool_use')]))),
    ('tool', moss('Text2Image("a cat")', 'None')),
    ('tool', moss('None', '\nSearch("Lima") =>\n<|1|>: "Lima"')),
    ('speaker', messages(dict(role='narrator', content='Then:'), ASKS, ANSWERS)),
    ('whole', moss('None', 'None')),
    ('empty', messages(ASKS, dict(role='assistant', content=None))),
    ('empty', messages(ASKS, dict(role='assistant', content=[]))),
])
def test_a_dialogue_ends_before_a_tool_and_before_what_is_no_text(tmp_path, reason, row):
    """Of a good pair and one that uses a tool, the good pair is kept; of the bad one alone, nothing."""
    (tmp_path / 'x.jsonl').write_text(json.dumps(row))
    items, table, notes = collect([str(tmp_path / 'x.jsonl')], get_args())
    if reason == 'whole':
        assert items == {'x-000000': [U, A] * 3}
        return
    assert items == {'x-000000': [U, A]} and table['x']['part'] == 1 and notes[0][1] == reason
    if 'chat' not in row and reason != 'speaker':
        (tmp_path / 'x.jsonl').write_text(json.dumps(dict(messages=row['messages'][2:])))
        assert collect([str(tmp_path / 'x.jsonl')], get_args())[1]['x'] == {
            'dialogues': 1, 'turns': 0, reason: 1}


@pytest.mark.parametrize('row, why', [
    (dict(prompt='x', answer='y'), 'it has the fields prompt, answer'),
    ({f'f{i}': 0 for i in range(108)}, 'f8, f9 and 98 more$'),
    (dict(data=[messages()]), "somebody says {'messages': "),
    (dict(messages=[dict(role='user', text=U)]), 'a message has the fields role, text, neither value nor'),
    (dict(messages=[dict(role='user', content=7)]), 'somebody says 7, which is no text'),
    (dict(conversations='Human: hi'), 'AttributeError'),
    ([dict(role='user', content=U)], 'it has the fields role, content'),
    (dict(chat=dict(turn_1=dict(Human='a'))), 'KeyError'),
    (dict(messages=[dict(role='Al', content=U), dict(role='Bo', content=A)]),
     'nor is any other: the speakers are Al, those that are known human, user'),
])
def test_a_form_that_nobody_reads(tmp_path, row, why):
    (tmp_path / 'x.jsonl').write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r'x\.jsonl, row 1 is in no form that is known \(Alpaca, .* LCCC\)'
                       f'.*{why}'):
        collect([str(tmp_path / 'x.jsonl')], get_args())


def test_chinese_taken_apart_is_put_together():
    said = read_row(['我 用 S E E D ， 2 1 万', '我 用 iPhone 手 机 ， OK 吗'])
    assert said[0] == ('user', '我用SEED，21万')
    assert read_row(['a', '我 用 iPhone plus 手 机'])[1] == ('assistant', '我用iPhone plus手机')


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    content = [FORMS['alpaca'], FORMS['ultrachat']]
    (tmp_path / 'a.json').write_text(json.dumps(content))
    (tmp_path / 'b.json').write_text(json.dumps(content, indent=1))
    (tmp_path / 'c.json').write_text('\n'.join(map(json.dumps, content)) + '\n\n')
    with gzip.open(tmp_path / 'd.jsonl.gz', 'wt') as file:
        file.write('\n'.join(map(json.dumps, content)))
    (tmp_path / 'marked.json').write_text(json.dumps(content, indent=1), encoding='utf-8-sig')
    for name in ('a.json', 'b.json', 'c.json', 'd.jsonl.gz', 'marked.json'):
        assert list(rows(str(tmp_path / name))) == content
    splits = dict(valid=[['a', 'b']], train=[['c', 'd'], ['e', 'f']])
    for indent in (None, 1):
        (tmp_path / 'e.json').write_text(json.dumps(splits, indent=indent))
        assert list(rows(str(tmp_path / 'e.json'))) == [['a', 'b'], ['c', 'd'], ['e', 'f']]
    (tmp_path / 'f.jsonl').write_text('["a", "b"]\n["c", "d"]\n')
    assert list(rows(str(tmp_path / 'f.jsonl'))) == [['a', 'b'], ['c', 'd']]
    for indent in (None, 1):        # one row, which holds a list
        (tmp_path / 'g.jsonl').write_text(json.dumps(FORMS['ultrachat'], indent=indent))
        assert list(rows(str(tmp_path / 'g.jsonl'))) == [FORMS['ultrachat']]


def test_a_mistake_is_named(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"data": ["a", "b"]}\n{"data": [\n')
    with pytest.raises(ValueError, match=r'a\.jsonl, line 2: neither JSON, .*, nor JSON lines'):
        list(rows(str(tmp_path / 'a.jsonl')))
    (tmp_path / 'b.json').write_text('[{"data": ["a", "b"]}, {"prompt": "x", "answer": "y"}]')
    with pytest.raises(ValueError, match='b.json, row 2 is in no form'):
        collect([str(tmp_path / 'b.json')], get_args())
    with pytest.raises(ValueError, match='^no file .*d.json$'):
        list(rows(str(tmp_path / 'd.json')))
    (tmp_path / 'e.json').write_text('[\n{"data": ["a", "b"]},\n{"data": ["a" "b"]}\n]')
    with pytest.raises(ValueError, match="e.json, line 3: neither JSON, .*Expecting ',' delimiter"):
        list(rows(str(tmp_path / 'e.json')))


@pytest.mark.parametrize('name, content, message', [
    ('a.json', bytes(range(256)) * 10, 'a.json is no text; JSON or JSON lines in UTF-8 are expected'),
    ('a.wav', b'RIFF\0\0\0\0\n\0', 'a.wav is no text'),
    ('a.json', '[["a"]]'.encode('utf-16'), 'a.json is no text'),
    ('a.json.gz', gzip.compress(b'[["a", "b"]]' * 99, mtime=0)[:20], 'a.json.gz is no whole gzip file'),
    ('a.json.gz', b'[]', 'a.json.gz: Not a gzipped file'),
])
def test_a_binary_file_ends_in_a_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(rows(str(tmp_path / name)))


def test_a_dialogue_is_kept_up_to_what_cannot_be_spoken(tmp_path):
    """Of three pairs: all; the first, as the second answer is code; none, as the first question is a sum."""
    talk = ['a', 'b', 'c', 'd', 'e', 'f']
    talks = [talk, talk[:3] + ['{}'] + talk[4:], ['1 = 2'] + talk[1:], ['a'], ['a', None]]
    (tmp_path / 'x.json').write_text(json.dumps([dict(data=texts) for texts in talks]))
    items, table, notes = collect([str(tmp_path / 'x.json')], get_args())
    assert items == {'x-000000': talk, 'x-000001': ['a', 'b']}
    assert table['x'] == dict(dialogues=5, turns=8, whole=1, part=1, formula=1, empty=1, **{'no pair': 1})
    assert [reason for _, reason, *_ in notes] == [None, 'code', 'formula', 'no pair', 'empty']


@pytest.mark.skipif(not TEXTS.exists(), reason='no ../shared/data')
def test_real_texts(capsys):
    """Every dialogue is counted once; nothing that is kept has anything unspeakable left."""
    simulate.main(['--check', '--examples=1', *map(str, sorted(TEXTS.glob('*.json*')))])
    names, *table = [line.split() for line in capsys.readouterr().out.split('\n\n')[0].splitlines()]
    counts = {name: list(map(int, numbers)) for name, *numbers in table}
    assert {name: n[0] for name, n in counts.items()} == dict(
        belle_eval_set=1000, fastchat_dummy=500, lccc_toy=1400, oasst_en_100_tree=100, all=3000)
    for numbers in counts.values():
        assert sum(numbers[1:-1]) == numbers[0]
    assert counts['fastchat_dummy'][1] == 500 and counts['lccc_toy'][1] > 1300
    assert counts['belle_eval_set'][3] > 30     # its code
    items, *_ = collect([str(TEXTS / 'lccc_toy.json')], get_args())
    assert not any(set('{}[]<>|\\=#*_`') & set(text) for texts in items.values() for text in texts)


# ------------------------------------------------------------------------------------------------------------
# who speaks when

def test_words_in_time():
    """Six characters in six seconds; the second word is known to start at second 5."""
    assert place_words('ab, cd', [('ab', 0), ('cd', 5)], 6) == [('ab,', 3, 0), ('cd', 6, 5)]
    assert place_words('ab, cd', None, 6) == [('ab,', 3, 0), ('cd', 6, 4)]
    assert place_words('“你好，a b。', None, 8) == [('“你', 2, 0), ('好，', 4, 2), ('a', 5, 4), ('b。', 8, 6)]
    told = [('in', 0), ('1,', 3), ('', 4), ('234', 5), ('cases', 9)]
    assert place_words('in 1,234 cases', told, 14) == [('in', 2, 0), ('1,234', 8, 3), ('cases', 14, 9)]


@pytest.mark.parametrize('response_sec', [0, 0.25])
def test_the_answer_comes_at_once(response_sec):
    user, assistant, turns, plan, _ = converse(response_sec=response_sec)
    assert [turn['role'] for turn in turns] == ['user', 'assistant'] * 2
    assert [turn['text'] for turn in turns] == DIALOGUE
    for question, answer in zip(turns[::2], turns[1::2]):
        assert answer['start_sec'] == pytest.approx(question['end_sec'] + response_sec, abs=1e-9)
        assert question['end_sec'] - question['start_sec'] == pytest.approx(len(question['text']) / 20)
    gap_sec, answer_sec = plan['steps'][1]['gap_sec'], len(DIALOGUE[1]) / 20
    assert turns[2]['start_sec'] - turns[1]['end_sec'] == pytest.approx(gap_sec + 0.15 * answer_sec, abs=1e-4)
    end_sec = turns[-1]['end_sec'] + plan['tail_sec'] + 0.15 * len(DIALOGUE[-1]) / 20
    assert len(user) / SAMPLE_RATE == pytest.approx(end_sec, abs=1e-4)
    assert abs(sound(user)[0] - turns[0]['start_sec'] * SAMPLE_RATE) <= 1
    assert abs(sound(assistant)[1] - turns[-1]['end_sec'] * SAMPLE_RATE) <= 1
    words = turns[1]['words']
    assert ' '.join(word['text'] for word in words) == DIALOGUE[1]
    assert words[-1]['end_sec'] == turns[1]['end_sec']
    assert words[1]['start_sec'] - words[0]['start_sec'] == pytest.approx(4 / 20, abs=1e-4)


@pytest.mark.parametrize('n_word', [30, 60, 180])
def test_as_silent_as_people_are(n_word):
    """After answers of 4.5 to 27 s, neither side speaks as much of the time as in ten dialogues of
    Switchboard."""
    sec = silent_sec = 0
    for id in range(40):
        user, _, turns, *_ = converse(['what do you say to that?', 'so it is ' * (n_word // 3)], str(id))
        sec += len(user) / SAMPLE_RATE
        silent_sec += len(user) / SAMPLE_RATE - sum(turn['end_sec'] - turn['start_sec'] for turn in turns)
    assert 0.1 <= silent_sec / sec <= 0.29


@pytest.mark.parametrize('rate_hz', [25, 12.5, 75, 24000 / 2048])      # 2048: SNAC's; 1365.33 samples here
def test_the_answer_starts_with_a_frame(rate_hz):
    """The one after that in which the user ends: on the codec's clock nobody overlaps."""
    args, hop = get_args(), SAMPLE_RATE / rate_hz
    for id in 'abcdefgh':
        plan = make_plan(id, 6, Hum(), ['low'], args)
        turns = simulate.simulate(DIALOGUE * 3, plan, Hum(), args, hop=hop)[2]
        framed, _ = tokenise.on_frames(turns, 10000, rate_hz)
        gaps = [answer['start'] - question['end'] for question, answer in zip(framed[::2], framed[1::2])]
        assert set(gaps) == {0}
        for answer, on_clock in zip(turns[1::2], framed[1::2]):
            assert abs(answer['start_sec'] * rate_hz - on_clock['start']) * hop < 1     # of a sample


@pytest.mark.parametrize('tells', [True, False])
@pytest.mark.parametrize('texts', [
    DIALOGUE,
    ['你好吗？', '我很好，谢谢你，今天的天气也很好。我们出去走走吧！', '好的，我们现在就一起走吧', '走吧'],
])
def test_an_interrupted_assistant_stops(texts, tells):
    n_cut = 0
    for id in 'abcdefgh':
        user, assistant, turns, plan, _ = converse(texts, id, Hum(tells), p_interrupt=1)
        _, said, barge_in, answer = turns
        stop = plan['steps'][1]['reaction_sec'] + barge_in['start_sec']
        last = turns[0]['end_sec'] + len(texts[1]) / 20
        assert 0.2 <= plan['steps'][1]['reaction_sec'] <= 0.4
        assert said['end_sec'] == pytest.approx(min(stop, last), abs=1e-4)
        assert said['start_sec'] < barge_in['start_sec'] < said['end_sec'] < answer['start_sec']
        silent = assistant[round(said['end_sec'] * SAMPLE_RATE):round(answer['start_sec'] * SAMPLE_RATE)]
        assert len(silent) and not silent.any()
        # of the text, the words that were begun: 20 characters a second
        n = (said['end_sec'] - said['start_sec']) * 20
        assert said['text'] == texts[1][:len(said['text'])] and n - 1e-3 <= len(said['text']) + 1
        begun = max(at for _, at in split(texts[1]) if at < n - 1e-3)
        assert begun < len(said['text']) <= begun + 8
        n_cut += len(said['text']) < len(texts[1])
        assert bool(said['words']) == tells
        assert all(word['start_sec'] < said['end_sec'] for word in said['words'])
        # no backchannel to what is interrupted anyway
        talked = converse(texts, id, Hum(tells), p_interrupt=1, p_backchannel=1)[2]
        assert talked[2] == barge_in and talked[3] == answer
    assert n_cut >= 6


def test_too_short_to_interrupt():
    """
    'ok' is over after 100 ms, before anybody could react; 'Paris.' after 300 ms, before anybody could
    interrupt it.
    """
    turns = converse([*DIALOGUE[:2], 'ok', 'Paris.', *DIALOGUE[2:]], p_interrupt=1)[2]
    assert [turn['text'] for turn in turns][1:4:2] == [DIALOGUE[1], 'Paris.']


def test_a_backchannel_stops_nobody():
    quiet, talked = converse(), converse(p_backchannel=1)
    assert np.array_equal(quiet[1], talked[1])      # what the assistant says is the same, sample for sample
    extra = [turn for turn in talked[2] if turn not in quiet[2]]
    assert len(extra) == 1 and len(talked[2]) == 5      # 'Paris, of course.' is too short to be talked into
    said, = (turn for turn in talked[2] if turn['text'] == DIALOGUE[1])
    start, end = extra[0]['start_sec'], extra[0]['end_sec']
    assert extra[0]['role'] == 'user' and extra[0]['text'] in simulate.BACKCHANNELS['en']
    assert said['start_sec'] + 0.3 <= start < end <= said['end_sec'] - 0.3 + 1e-4
    assert converse(['你好', '我' * 60], p_backchannel=1)[2][-1]['text'] in simulate.BACKCHANNELS['zh']


@pytest.mark.parametrize('text', [DIALOGUE[0], '秘鲁的首都是哪一个城市？'])
def test_nobody_answers_into_a_hesitation(text):
    fillers = '|'.join(f'{each}( (?=[a-zA-Z]))?' for each in simulate.FILLERS['en'] + simulate.FILLERS['zh'])
    n_filler = 0
    for id in 'abcdefghijkl':
        user, assistant, (question, answer), plan, _ = converse([text, 'Lima.'], id, p_hesitate=1)
        pause = plan['steps'][0]['hesitate_sec']
        assert 0.3 <= pause <= 1.2 and answer['start_sec'] == question['end_sec']
        assert not assistant[:round(question['end_sec'] * SAMPLE_RATE)].any()
        start, end = (round(question[key] * SAMPLE_RATE) for key in ('start_sec', 'end_sec'))
        loud = np.flatnonzero(np.abs(user[start:end]) > 1e-3)
        # one pause, inside the turn
        assert np.diff(loud).max() == pytest.approx(pause * SAMPLE_RATE, abs=30)
        without = simulate.re.sub(fillers, ' ' * (text == DIALOGUE[0]), question['text'])
        n_filler += question['text'] != text
        assert without == text
    assert 2 <= n_filler <= 10


def test_noise_is_in_the_users_channel_at_the_level_asked_for(tmp_path):
    from common.audio import write_audio
    rng = np.random.default_rng(0)
    (tmp_path / 'noise/free').mkdir(parents=True)
    short, long = 0.1 * rng.standard_normal(9000), 0.01 * rng.standard_normal((400000, 2))
    write_audio(str(tmp_path / 'noise/free/a.wav'), short, 22050)       # has to be looped
    write_audio(str(tmp_path / 'noise/b.WAV'), long, SAMPLE_RATE)       # has to be cut
    files = simulate.find(str(tmp_path / 'noise'), ('.wav', '.flac'))
    assert len(files) == 2
    for bank in (simulate.noises(), files):
        for id in 'abcd':
            user, assistant, turns, plan, _ = converse(id=id)
            noisy = with_noise(user, plan, bank)
            speech = np.concatenate([
                user[round(t['start_sec'] * SAMPLE_RATE):round(t['end_sec'] * SAMPLE_RATE)]
                for t in turns if t['role'] == 'user'])
            measured = 10 * np.log10(np.mean(speech ** 2) / np.mean((noisy - user) ** 2))
            assert 15 <= plan['snr_db'] <= 30 and abs(measured - plan['snr_db']) < 0.5
            assert noisy.dtype == np.float32
            assert not assistant[:round(turns[1]['start_sec'] * SAMPLE_RATE)].any()
    with pytest.raises(ValueError, match='noise is silent'):
        with_noise(user, plan, [np.zeros(100, np.float32)])
    with pytest.raises(ValueError, match='holds no .wav'):
        simulate.find(str(tmp_path / 'nothing'), ('.wav',))


def test_long_dialogues_end_after_a_pair():
    turns = converse(DIALOGUE * 5, max_sec=20)[2]
    assert 4 <= len(turns) < 20 and len(turns) % 2 == 0 and turns[-1]['end_sec'] < 20
    # the pair that did not fit has interrupted nobody
    assert converse(DIALOGUE * 5, max_sec=20, p_interrupt=1)[2][-1]['text'] in DIALOGUE
    with pytest.raises(ValueError, match='the first question and answer are longer than --max_sec=3'):
        converse(max_sec=3)


def test_chance_depends_on_seed_and_id_only():
    """Not on what was planned before, nor on the words, nor on another process's hash of them."""
    args = get_args(p_interrupt=0.5, p_backchannel=0.5, p_hesitate=0.5)
    plans = {id: make_plan(id, 3, Hum(), ['low', 'high'], args) for id in 'abc'}
    again = {id: make_plan(id, 3, Hum(), ['low', 'high'], args) for id in 'cab'}
    assert repr(plans) == repr({id: again[id] for id in 'abc'}) and repr(plans['a']) != repr(plans['b'])
    assert repr(make_plan('a', 3, Hum(), ['low', 'high'], get_args(seed=1))) != repr(plans['a'])
    one, two = (simulate.simulate(DIALOGUE, plans['a'], Hum(), args) for _ in range(2))
    assert np.array_equal(one[0], two[0]) and np.array_equal(one[1], two[1]) and one[2] == two[2]
    assert repr(make_plan('a', 2, Hum(), ['low', 'high'], args)['steps']) == repr(plans['a']['steps'][:2])


WORDS = st.lists(st.sampled_from(['a', 'abc,', 'abcdef. ', '你', '好。']), min_size=1, max_size=20)
TURN = WORDS.map(lambda words: ' '.join(words).strip())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TURN, TURN), min_size=1, max_size=5),
       st.tuples(*[st.sampled_from([0, 0.5, 1])] * 3), st.integers(0, 99), st.sampled_from([12.5, 25, 50]),
       st.booleans(), st.sampled_from([0, 0.01, 0.3]))
def test_whatever_is_said_makes_a_record(said, chances, seed, rate_hz, tells, response_sec):
    """Turns of a role never overlap, texts are beginnings of what was to be said, and the record is one."""
    texts = [text for pair in said for text in pair]
    names = ('p_interrupt', 'p_backchannel', 'p_hesitate')
    user, assistant, turns, *_ = converse(texts, tts=Hum(tells), seed=seed, response_sec=response_sec,
                                          max_sec=1000, **dict(zip(names, chances)))
    assert len(user) == len(assistant)
    for role in ('user', 'assistant'):
        mine = [turn for turn in turns if turn['role'] == role]
        assert all(one['end_sec'] <= other['start_sec'] for one, other in zip(mine, mine[1:]))
    answers = [turn['text'] for turn in turns if turn['role'] == 'assistant']
    assert len(answers) == len(said)
    assert all(whole.startswith(text) and text for text, (_, whole) in zip(answers, said))
    n_frame = -(-len(user) * int(rate_hz * 2) // (SAMPLE_RATE * 2))
    framed, n_lost = tokenise.on_frames(turns, n_frame, rate_hz)
    assert n_lost == 0
    silence = np.zeros(n_frame, np.uint16)
    check(dict(id='x', user=silence, assistant=silence, turns=framed), 1)


# ------------------------------------------------------------------------------------------------------------
# voices, and all of it together

def test_espeak_speaks_both_languages():
    pytest.importorskip('espeakng_loader')
    from data.tts import Espeak
    tts = Espeak()
    assert 60 < len(tts.voices) < 110 and 'whisper' not in tts.voices
    wave, words, _ = tts.say('你好，我有2个iPhone。', 'f1')
    assert ''.join(word for word, _ in words) == '你好，我有2个iPhone。' and 1 < len(wave) / SAMPLE_RATE < 4
    text = ' '.join(['one two three.'] * 60)        # 60 sentences, 180 words: all are told of
    wave, words, _ = tts.say(text, 'f1')
    assert len(words) == 180 and [start for _, start in words] == sorted(start for _, start in words)
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: tts.say('one ' * n, 'm3')[1]}))
        for n in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(words) == n for n, words in found.items()) and len(found) == 6
    with pytest.raises(ValueError, match=r"no voice 'nobody'; there are (\w+, ){9}\w+ and \d+ more$"):
        tts.say('hi', 'nobody')


WORKER = '''
import json, sys, wave
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    ask = json.loads(line)
    if ask["voice"] == "nobody":
        print(json.dumps({"error": "no such voice"}), flush=True)
        continue
    if ask["voice"] == "death":
        sys.exit("out of memory")
    with wave.open(ask["out"], "wb") as file:
        file.setparams((1, 2, 24000, 0, "NONE", ""))
        file.writeframes(bytes(4800) + b"\\x00\\x20\\x00\\xe0" * (600 * len(ask["text"])) + bytes(4800))
    print(json.dumps({"ok": True}), flush=True)
'''


def test_cosyvoice_is_asked_through_its_worker(tmp_path):
    """A stand-in worker: 50 ms a character at 24 kHz, with 0.1 s of silence around, which is taken off."""
    from data.tts import CosyVoice
    (tmp_path / 'worker.py').write_text(WORKER)
    tts = CosyVoice(f'{sys.executable} {tmp_path}/worker.py', ['a.wav', 'b.wav'])
    wave, words = tts.say('ten of us!', 'a.wav')
    assert words is None and len(wave) / SAMPLE_RATE == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match='no such voice'):
        tts.say('hi', 'nobody')
    # not one dialogue after the other that cannot be read
    with pytest.raises(SystemExit, match='out of memory'):
        tts.say('hi', 'death')


class Loud:
    """A codec that tells sound from silence."""
    name, rate_hz, sample_rate, n_codes, fingerprint = 'loud', 25.0, 16000, 2, '0' * 16
    silence_codes = np.zeros(1, np.uint16)

    def describe(self):
        return dict(name=self.name, rate_hz=self.rate_hz, sample_rate=self.sample_rate, n_codes=self.n_codes,
                    fingerprint=self.fingerprint)

    def encode_many(self, waves):
        return [(np.abs(np.pad(w, (0, -len(w) % 640)).reshape(-1, 640)).max(1) > 0.06).astype(np.uint16)
                for w in waves]

    def save(self, folder):
        pass


def test_from_text_to_a_data_folder(tmp_path, monkeypatch, capsys):
    """
    Both channels of each record are loud where its turns are; statistics are printed; a second run finds it
    done.
    """
    from data.dialogues import Dialogues
    monkeypatch.setattr(tokenise, 'load_codec', lambda folder: Loud())
    monkeypatch.setattr(simulate, 'Espeak', lambda forgets: Hum())
    (tmp_path / 'talk.json').write_text(json.dumps([dict(data=DIALOGUE + ['{}', 'no'])] * 6))
    command = [
        f'--out={tmp_path}/out', '--codec=x', '--device=cpu', '--assistant_voice=robot',
        '--user_voices=low,high', '--p_interrupt=0.5', str(tmp_path / 'talk.json')]
    monkeypatch.setattr(Hum, 'say', lambda self, text, voice, rate=None, say=Hum.say: say(self, text, voice))
    simulate.main(command)
    assert 'both_speak' in capsys.readouterr().out
    n = 0
    for split_name in ('train', 'val', 'test'):
        for record in Dialogues(str(tmp_path / 'out'), split_name):
            n += 1
            for role in ('user', 'assistant'):
                loud, told = np.asarray(record[role]) > 0, np.zeros(len(record[role]), bool)
                for turn in record['turns']:
                    told[turn['start']:turn['end']] |= turn['role'] == role
                assert (loud != told).mean() < 0.08 and not (loud & ~told).any()
    assert n == 6
    simulate.main(command)
    assert 'is prepared already' in capsys.readouterr().out
    simulate.main(['--wav=2', f'--out={tmp_path}/wav', *command[3:]])
    simulated = list(foreign.read_conversations(tmp_path / 'wav', vad='energy'))
    assert len(simulated) == 2 and len(list((tmp_path / 'wav').glob('*.wav'))) == 2
    for talk in simulated:      # talk['speaks']: heard inside the turns that the transcript has
        assert talk['turns'][0]['text'] == DIALOGUE[0] and talk['wave'] is not None
        for turn in talk['turns']:
            assert talk['speaks'][turn['role']][turn['start']:turn['end']].mean() > 0.8


def test_nothing_to_say(tmp_path):
    (tmp_path / 'a.json').write_text(json.dumps([dict(data=[said, 'a']) for said in ('{}', '', '?')]))
    (tmp_path / 'b.json').write_text(json.dumps([dict(data=['| a | b |', 'a'])]))
    for first in (['--wav=1'], [f'--out={tmp_path}/out', '--codec=x']):
        with pytest.raises(ValueError, match=r'none of the 4 dialogues can be spoken '
                           r'\(1 code, 1 table, 2 empty\); --check --examples=5 shows some'):
            simulate.main([*first, str(tmp_path / 'a.json'), str(tmp_path / 'b.json')])


@pytest.mark.parametrize('setting, words', [
    ('--p_interrupt=2', 'a probability is from 0 to 1'),
    ('--snr_db=30,15', 'the first number is above the second'),
    ('--gap_sd_sec=-1', 'not below 0'),
    ('--gap_share=-1', 'not below 0'),
    ('--tts=cosyvoice', 'needs --tts_command'),
    ('--user_voices=/dev', 'holds no .wav'),
])
def test_wrong_settings(setting, words, tmp_path):
    (tmp_path / 'talk.json').write_text(json.dumps([dict(data=['a', 'b'])]))
    with pytest.raises(ValueError, match=words):
        simulate.main(['--wav=1', f'--out={tmp_path}/wav', setting, str(tmp_path / 'talk.json')])
