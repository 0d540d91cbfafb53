"""What users say gets continuations: the LLM's own, the same in whatever batches, processes and attempts."""
import importlib
import json
import multiprocessing
import os
import shutil
import sys

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from data.dialogues import Dialogues, save_dialogues
from flatten import check
from vocabulary import Vocabulary

prepare = importlib.import_module('data.continue.prepare')      # "continue" is a word of Python's own
SPLITS, LONG = ('train', 'val', 'test'), 'the capital of france is paris. ' * 20
MUTE = 'mhm what a capital is paris'        # the LLM has nothing to say to that
TEXTS = ['what is the capital of france?', 'paris is what?', 'yes', 'ok the capital', 'stop', MUTE, LONG,
         'is it france? hi? france? hi?']
FILES = ('train.arrow', 'val.arrow', 'test.arrow', 'prepared.json', 'skipped.jsonl')


def turn(role, start, end, text, **more):
    return dict(role=role, start=start, end=end, text=text, **more)


def ask(text):
    return f'###[Human]:{prepare.INSTRUCTION} {text}\n\n\n###[Assistant]:'


@pytest.fixture(scope='module')
def llm(tmp_path_factory, small_tokenizer):
    """The folder of a Qwen2 of random weights. It ends with what it would first say to MUTE, and has settings
    that are not to count."""
    folder = tmp_path_factory.mktemp('llm')
    Vocabulary.load(small_tokenizer).save(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(5)        # 0.3: weights so large that it says various things
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=None, eos_token_id=None)).eval()
    with torch.no_grad():
        first = model(**tokenizer(ask(MUTE), return_tensors='pt')).logits[0, -1].argmax().item()
    model.generation_config.update(eos_token_id=[first], do_sample=True, temperature=0.7,
                                   repetition_penalty=1.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def source(tmp_path_factory, small_codec, small_tokenizer):
    """Of 8 utterances that of u6 is too long, and u5 is MUTE; in val a dialogue, in two files; no test."""
    folder = tmp_path_factory.mktemp('source')
    small_codec.save(folder / 'codec')
    shutil.copytree(small_tokenizer, folder / 'tokenizer')
    train = [dict(id=f'u{i}', user=[i] * (5 + i), assistant=[], turns=[turn('user', 0, 5 + i, text)])
             for i, text in enumerate(TEXTS)]
    train[2]['turns'][0]['words'] = [dict(text='yes', start=0, end=3)]
    words = [dict(text='what', start=22, end=24)]
    talk = dict(id='talk', user=range(30), assistant=range(30), prompt='Be kind.', turns=[
        turn('user', 20, 29, 'what is paris?', words=words), turn('assistant', 8, 15, 'ok'),
        turn('user', 2, 7, 'hi?')])
    alone = dict(id='alone', user=[], assistant=[1, 2], turns=[turn('assistant', 0, 2, 'a')])
    for name, rows in (('train', train), ('val-00000-of-00002', [alone]), ('val-00001-of-00002', [talk])):
        save_dialogues(str(folder / f'{name}.arrow'), rows, small_codec.describe())
    return folder


@pytest.fixture
def go_on(monkeypatch, tmp_path, source, llm):
    """go_on('--part=2') -> the folder that was written"""
    def go_on(*settings, data=source, llm=llm, out='out'):
        monkeypatch.setattr(sys, 'argv', [
            'prepare.py', str(data), f'--llm={llm}', f'--out={tmp_path / out}', '--device=cpu',
            '--dtype=float32', '--max_new_tokens=12', *settings])
        prepare.main()
        return tmp_path / out
    return go_on


def records(folder):
    tables = {split: pa.ipc.open_file(str(folder / f'{split}.arrow')).read_all() for split in SPLITS}
    return {split: table.to_pylist() for split, table in tables.items()}


def same(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


def test_each_turn_of_a_user_becomes_a_record(go_on, source, small_codec, capsys):
    out = go_on('--part=3')
    found = records(out)
    ids = {split: [row['id'] for row in rows] for split, rows in found.items()}
    assert ids == dict(train=['u0', 'u1', 'u2', 'u3', 'u4', 'u7'], val=['talk-1', 'talk-2'], test=[])
    before = {row['id']: row for row in Dialogues(str(source), 'train')}
    for row in found['train'] + found['val']:
        assert row['prompt'].startswith('Continue the following text')
        check(row, small_codec.n_codes)
        said, answer = row['turns']
        n_frame = len(row['user'])
        assert row['assistant'] == [] and said['end'] == n_frame
        assert (answer['role'], answer['start'], answer['end']) == ('assistant', n_frame, n_frame)
        assert answer['text'] == ' '.join(answer['text'].split()) != ''
        if row['id'] in before:
            assert row['user'] == before[row['id']]['user'].tolist()
            assert dict(said, words=0) == dict(before[row['id']]['turns'][0], words=0)
    first, second = found['val']
    assert (first['user'], first['turns'][0]['text']) == ([2, 3, 4, 5, 6], 'hi?')
    assert second['user'] == list(range(20, 29)) and second['turns'][0]['words'] == [
        dict(text='what', start=2, end=4)]
    assert found['train'][2]['turns'][0]['words'] == [dict(text='yes', start=0, end=3)]
    assert Dialogues(str(out), 'train').codec == small_codec.describe()
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, 'codec', 'tokenizer'])
    copied, of = (folder / 'tokenizer/tokenizer.json' for folder in (out, source))
    assert copied.read_bytes() == of.read_bytes()
    skipped = {row['id']: row['reason'] for row in map(json.loads, open(out / 'skipped.jsonl'))}
    assert skipped.keys() == {'u5', 'u6'} and skipped['u5'] == 'its continuation is empty'
    printed = capsys.readouterr().out
    assert 'part      4/4' in printed and '2 recordings were skipped' in printed
    assert '1 such as u6: its prompt of' in printed and 'cut off at --max_new_tokens' in printed
    go_on('--part=3')
    assert 'is prepared already' in capsys.readouterr().out


def test_it_is_what_transformers_writes(go_on, llm):
    """Greedily, for a single prompt without padding, until an end or a special token."""
    tokenizer, model = AutoTokenizer.from_pretrained(llm), AutoModelForCausalLM.from_pretrained(llm)
    ends = tokenizer.all_special_ids + model.generation_config.eos_token_id
    for row in records(go_on())['train']:
        prompt = tokenizer(ask(row['turns'][0]['text']), return_tensors='pt')
        written = model.generate(**prompt, max_new_tokens=12, do_sample=False, repetition_penalty=1.0,
                                 eos_token_id=ends)
        text = tokenizer.decode(written[0, prompt['input_ids'].shape[1]:], skip_special_tokens=True)
        assert row['turns'][1]['text'] == ' '.join(text.split())


def test_a_folder_without_a_tokenizer(go_on, source, tmp_path):
    data = shutil.copytree(source, tmp_path / 'bare', ignore=shutil.ignore_patterns('tokenizer'))
    assert not (go_on(data=data) / 'tokenizer').exists()


def test_how_long_a_prompt_may_be(go_on, llm):
    n = len(AutoTokenizer.from_pretrained(llm)(ask(LONG.strip()))['input_ids'])
    for limit, there in ((n, False), (n + 1, True)):
        found = records(go_on(f'--max_prompt_tokens={limit}', out=str(limit)))['train']
        assert ('u6' in [row['id'] for row in found]) == there


def test_batched_equals_one_by_one(go_on):
    assert same(go_on('--batch_size=1', out='single'), go_on('--batch_size=5'))


def test_killed_and_continued_equals_uninterrupted(go_on, monkeypatch):
    whole, made, make_part = go_on('--part=2', out='whole'), [], prepare.make_part

    def die(path, *rest):
        if path.endswith('000003.arrow'):
            raise KeyboardInterrupt
        return make_part(path, *rest)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, 'make_part', die)
        go_on('--part=2')
    monkeypatch.setattr(prepare, 'make_part', lambda path, *rest: made.append(path) or make_part(path, *rest))
    assert same(go_on('--part=2'), whole) and len(made) == 2        # of five


def test_two_processes_equal_one(go_on, monkeypatch):
    """Forked, as locks are a process's own. Neither starts its first part before the other does."""
    whole, make_part = go_on('--part=1', out='whole'), prepare.make_part
    fork = multiprocessing.get_context('fork')
    both, n_made = fork.Barrier(2), fork.Value('i', 0)

    def work(rank):
        torch.set_num_threads(1)
        is_first = [True]

        def make(path, *rest):
            if is_first:
                is_first.clear()
                both.wait(30)
            with n_made.get_lock():
                n_made.value += 1
            return make_part(path, *rest)
        os.environ.update(RANK=str(rank), WORLD_SIZE='2')
        prepare.make_part = make
        go_on('--part=1')
    workers = [fork.Process(target=work, args=(rank,)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert same(whole.parent / 'out', whole) and n_made.value == 10


def test_it_is_asked_in_its_chat_template(llm, tmp_path):
    folder = shutil.copytree(llm, tmp_path / 'chat')
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = ('{% for m in messages %}<|sot|>{{ m.role }}:{{ m.content }}<|eot|>{% endfor %}'
                               '{% if add_generation_prompt %}<|sot|>assistant:{% endif %}')
    tokenizer.save_pretrained(folder)
    model = prepare.LLM(str(folder), 'cpu', torch.float32)
    asked = model.prompt('Go on.', 'hi')
    assert tokenizer.decode(asked) == '<|sot|>user:Go on. hi<|eot|><|sot|>assistant:'
    assert asked[0] == tokenizer.convert_tokens_to_ids('<|sot|>')


def test_the_next_question_is_not_part_of_it(llm, monkeypatch):
    model = prepare.LLM(str(llm), 'cpu', torch.float32)
    said = model.tokenizer(' yes,\nparis. \n\n###[Human]:stop')['input_ids']
    monkeypatch.setattr(model.model, 'generate', lambda **_: torch.tensor([[1, 2, *said]]))
    assert model.go_on([[1, 2]], 64) == [('yes, paris.', False)]


@pytest.mark.parametrize('settings, folders, message', [
    ([], dict(data='nowhere'), 'no data folder nowhere; prepare it first'),
    ([], dict(llm='nowhere'), 'no language model in nowhere: it has no config.json'),
    (['--max_prompt_tokens=9'], {},
     'none of the 10 recordings could be prepared: 10 such as u0: its prompt of .* tokens reaches'),
    (['--batch_size=0'], {}, 'have to be above 0'),
])
def test_mistakes(settings, folders, message, go_on):
    with pytest.raises(ValueError, match=message):
        go_on(*settings, **folders)


def test_the_source_is_not_written_over(go_on, source):
    with pytest.raises(ValueError, match='is the folder that is read; choose another'):
        go_on(out=source)


def test_other_settings_are_not_mixed_in(go_on):
    go_on()
    with pytest.raises(ValueError, match=r'was made from other material or settings \(instruction\)'):
        go_on('--instruction=Go on.')


@pytest.mark.parametrize('missing', ['tokenizer', 'layer', 'weights'])
def test_half_a_model(missing, llm, tmp_path):
    """transformers would go on with random weights, or without tokens."""
    folder = shutil.copytree(llm, tmp_path / 'half')
    if missing == 'layer':
        settings = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps(dict(settings, num_hidden_layers=3, layer_types=None)))
    names = dict(tokenizer=['tokenizer.json', 'vocab.json', 'merges.txt', 'tokenizer_config.json'],
                 weights=['model.safetensors'], layer=[])
    for name in names[missing]:
        os.remove(folder / name)
    with pytest.raises(ValueError, match='no complete causal language model in .*half: '):
        prepare.LLM(str(folder), 'cpu', torch.float32)
