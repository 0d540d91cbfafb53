"""The vocabulary on a small BPE trained here, and on the real Qwen2 tokenizer where ../shared/data has it."""
import json
import random
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from vocabulary import CONTROL, QWEN2_PATTERN, Vocabulary

ROOT = Path(__file__).resolve().parent.parent
QWEN2 = ROOT.parent / 'shared' / 'data' / 'qwen2_tokenizer'
needs_qwen2 = pytest.mark.skipif(not QWEN2.is_dir(), reason='no ../shared/data/qwen2_tokenizer')

TEXTS = ['What is the capital of France?', "It's Paris, isn't it?", 'ça va, déjà vu 1234', '首都是巴黎。',
         ' two  spaces\n\n\tx\r\n', '']


def train(folder, pattern=QWEN2_PATTERN, specials=('<|endoftext|>', '<|im_end|>'), in_front=(), nfc=True):
    """A small byte-level BPE in Qwen2's form; returns the tokenizers object as the reference."""
    bpe = Tokenizer(models.BPE())
    if nfc:
        bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), 'isolated')
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=byte_level.alphabet(),
                                  special_tokens=list(in_front), show_progress=False)
    bpe.train_from_iterator(TEXTS * 5 + [QWEN2_PATTERN], trainer)
    bpe.add_special_tokens(list(specials))
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / 'tokenizer.json'))
    return bpe

def unicode_strings(n, seed=0):
    """Letters, digits and spaces, accents decomposed and not, Chinese, Hangul, emoji, anything."""
    rng = random.Random(seed)
    ranges = [(32, 127), (32, 127), (9, 14), (48, 58), (0xa0, 0x370), (0x300, 0x370), (0x4e00, 0x9fff),
              (0xac00, 0xd7a4), (0x1f300, 0x1f700), (0xe000, 0x110000)]
    for _ in range(n):
        yield ''.join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))

def same(a, b):
    names = ('tokens', 'merges', 'pattern', 'control', 'code_start', 'n_codes', 'n_text', 'size')
    return all(getattr(a, name) == getattr(b, name) for name in names)


def test_one_id_space(tmp_path):
    """n BPE tokens, 2 specials, 8 control tokens, 100 codes, and padding up to a multiple of 128."""
    n = train(tmp_path).get_vocab_size(with_added_tokens=False)
    vocab = Vocabulary.load(tmp_path, n_codes=100)
    assert vocab.n_text == n
    assert vocab.control == {name: n + 2 + i for i, name in enumerate(CONTROL)}
    assert (vocab.code_start, vocab.n_codes) == (n + 10, 100)
    assert vocab.size % 128 == 0 and 0 <= vocab.size - (n + 110) < 128


def test_codes_start_where_the_model_ends(tmp_path):
    """A model of 512 rows has spare ones for the control tokens; in one of n rows codes follow after them."""
    n = train(tmp_path).get_vocab_size(with_added_tokens=False)
    (tmp_path / 'config.json').write_text('{"vocab_size": 512}')
    vocab = Vocabulary.load(tmp_path, n_codes=128)
    assert (vocab.code_start, vocab.size) == (512, 640)
    (tmp_path / 'config.json').write_text(json.dumps({'vocab_size': n}))
    assert Vocabulary.load(tmp_path, n_codes=128).code_start == n + 10
    ours = {'vocab_size': 1024, 'nanoduplex': {'code_start': 600, 'n_codes': 50}}
    (tmp_path / 'config.json').write_text(json.dumps(ours))
    vocab = Vocabulary.load(tmp_path, n_codes=128)
    assert (vocab.code_start, vocab.n_codes, vocab.size) == (600, 50, 768)


def test_control_tokens_that_a_folder_names_keep_their_ids(tmp_path):
    n = train(tmp_path, specials=['<|eos|>', '<|x|>', '<|asr|>']).get_vocab_size(with_added_tokens=False)
    ids = list(Vocabulary.load(tmp_path).control.values()) # asr tts sos eos sot eot silent_text silent_speech
    assert ids == [n + 2, n + 3, n + 4, n, n + 5, n + 6, n + 7, n + 8]


def test_equals_tokenizers(tmp_path):
    bpe = train(tmp_path)
    vocab = Vocabulary.load(tmp_path)
    for text in [*TEXTS, *unicode_strings(500)]:
        ids = vocab.encode(text)
        assert ids == bpe.encode(text).ids
        assert vocab.decode(ids) == unicodedata.normalize('NFC', text)


def test_both_file_formats_give_the_same_vocabulary(tmp_path):
    bpe = train(tmp_path / 'json')
    vocab = Vocabulary.load(tmp_path / 'json', n_codes=64)
    (tmp_path / 'two').mkdir()
    bpe.model.save(str(tmp_path / 'two')) # vocab.json, merges.txt
    added = {str(i): {'content': token.content} for i, token in bpe.get_added_tokens_decoder().items()}
    settings = {'added_tokens_decoder': added}
    (tmp_path / 'two' / 'tokenizer_config.json').write_text(json.dumps(settings))
    assert same(vocab, Vocabulary.load(tmp_path / 'two', n_codes=64))

    old = json.loads((tmp_path / 'json' / 'tokenizer.json').read_text())
    old['model']['merges'] = [' '.join(pair) for pair in old['model']['merges']] # as they were before 2024
    (tmp_path / 'json' / 'tokenizer.json').write_text(json.dumps(old))
    assert same(vocab, Vocabulary.load(tmp_path / 'json', n_codes=64))


def test_special_strings_in_text_stay_text(tmp_path):
    train(tmp_path)
    vocab = Vocabulary.load(tmp_path, n_codes=100)
    vocab.save(tmp_path / 'saved')
    for v in (vocab, Vocabulary.load(tmp_path / 'saved')):
        for text in ('<|s_5|>', '<|eot|>', 'say <|endoftext|> now', '<|reserved_500|>'):
            ids = v.encode(text)
            assert max(ids) < v.n_text and v.decode(ids) == text


def test_decode(tmp_path):
    train(tmp_path)
    vocab = Vocabulary.load(tmp_path, n_codes=100)
    assert vocab.decode(vocab.encode('🤗')[:2]) == '�' # half a character
    for i in (vocab.control['<|sot|>'], vocab.code_start, -1, vocab.size):
        with pytest.raises(ValueError, match=f'id {i} is no text'):
            vocab.decode([0, i])


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    train(tmp_path)
    vocab = Vocabulary.load(tmp_path)
    assert vocab.encode('a\ud800b') == vocab.encode('a\ufffdb')


@pytest.mark.parametrize('pattern', [QWEN2_PATTERN, r'\p{L}+|\p{N}+|[^\p{L}\p{N}]+'])
@pytest.mark.parametrize('more', [{}, dict(nfc=False), dict(specials=[])])
def test_saved_folder_opens_in_transformers_and_here(tmp_path, pattern, more):
    train(tmp_path / 'a', pattern, **more)
    vocab = Vocabulary.load(tmp_path / 'a', n_codes=100)
    vocab.save(tmp_path / 'b')
    check_saved(vocab, tmp_path)

def check_saved(vocab, tmp_path):
    hf = AutoTokenizer.from_pretrained(tmp_path / 'b')
    assert len(hf) == vocab.size
    for text in [*TEXTS, *(unicodedata.normalize('NFD', text) for text in TEXTS), *unicode_strings(100)]:
        assert hf(text)['input_ids'] == vocab.encode(text)
    for name, i in vocab.control.items():
        assert hf.decode([i]) == name and hf.convert_tokens_to_ids(name) == i
    assert hf.decode([vocab.code_start + 7]) == '<|s_7|>'
    assert hf.decode([0, vocab.code_start], skip_special_tokens=True) == '!'
    assert hf.convert_ids_to_tokens(vocab.size - 1) is not None

    again = Vocabulary.load(tmp_path / 'b') # no config.json there, n_codes not given: the names tell
    assert same(vocab, again)
    again.save(tmp_path / 'c')
    for name in ('tokenizer.json', 'tokenizer_config.json', 'vocab.json', 'merges.txt'):
        assert (tmp_path / 'b' / name).read_bytes() == (tmp_path / 'c' / name).read_bytes()


@needs_qwen2
def test_qwen2(tmp_path):
    for name in ('config.json', 'vocab.json', 'merges.txt', 'tokenizer_config.json'):
        shutil.copyfile(QWEN2 / name, tmp_path / name)
    vectors = json.loads((QWEN2 / 'hf_transformers_vectors.json').read_text(encoding='utf-8'))
    vocab = Vocabulary.load(QWEN2, n_codes=4096)
    assert same(vocab, Vocabulary.load(tmp_path, n_codes=4096))
    assert vocab.n_text == 151_643 and list(vocab.control.values()) == list(range(151_646, 151_654))
    assert vocab.code_start == 151_936 and vocab.size == 156_032
    for case in vectors['integration']:
        assert vocab.encode(case['text']) == case['ids'] and vocab.decode(case['ids']) == case['text']
    assert vocab.encode('The capital of France') == [785, 6722, 315, 9625]
    vocab.save(tmp_path / 'b')
    check_saved(vocab, tmp_path)

# ------------------------------------------------------------------------------------------------------------
# mistakes end in one sentence

@pytest.mark.parametrize('change, message', [
    (lambda t: t.pop('model'), 'model of type None'),
    (lambda t: t['model'].update(type='WordPiece'), 'model of type WordPiece'),
    (lambda t: t.update(normalizer={'type': 'Lowercase'}), 'only NFC is known'),
    (lambda t: t.update(pre_tokenizer={'type': 'Whitespace'}), "pre-tokenizer {'type': 'Whitespace'}"),
    (lambda t: t['model']['merges'].reverse(), 'ids have to follow these'),
    (lambda t: t['model']['merges'].pop(), 'ids have to follow these'),
    (lambda t: t['model']['vocab'].update(extra=10_000), 'text ids are not 0, 1, 2'),
    (lambda t: t['model']['vocab'].update({'中': t['model']['vocab'].pop('!')}), 'not the 256 bytes'),
])
def test_an_unfit_tokenizer_is_refused(tmp_path, change, message):
    train(tmp_path)
    tokenizer = json.loads((tmp_path / 'tokenizer.json').read_text())
    change(tokenizer)
    (tmp_path / 'tokenizer.json').write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=message) as error:
        Vocabulary.load(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and '\n' not in str(error.value)


def test_special_tokens_in_front_are_refused(tmp_path):
    train(tmp_path, in_front=['<|endoftext|>'])
    with pytest.raises(ValueError, match='train the BPE without special tokens'):
        Vocabulary.load(tmp_path)


def test_a_folder_without_tokenizer_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / 'nowhere'):
        message = f'{folder}: no tokenizer here: .* vocab.json and merges.txt found'
        with pytest.raises(ValueError, match=message):
            Vocabulary.load(folder)
    (tmp_path / 'vocab.json').write_text('{}')
    with pytest.raises(ValueError, match='neither tokenizer.json nor merges.txt'):
        Vocabulary.load(tmp_path)
    (tmp_path / 'merges.txt').write_text('')
    (tmp_path / 'vocab.json').write_text('version https://git-lfs')
    with pytest.raises(ValueError, match='vocab.json is no JSON'):
        Vocabulary.load(tmp_path)


def test_command_line(tmp_path):
    train(tmp_path)
    vocab = Vocabulary.load(tmp_path)

    def run(folder, lines):
        command = [sys.executable, '-m', 'codec', 'text', folder]
        return subprocess.run(command, input=lines.encode(), capture_output=True)

    done = run(tmp_path, '"Paris"\n"\\ud800 d\\u00e9j\\u00e0 vu"\n""\n"首都"')
    assert done.returncode == 0 and done.stderr == b''
    ids = [json.loads(line) for line in done.stdout.splitlines()]
    assert ids == [vocab.encode(text) for text in ('Paris', '\ufffd déjà vu', '', '首都')]
    for bad in ('Paris', '', '[' * 100_000):
        done = run(tmp_path, f'"ok"\n{bad}\n"never"\n')
        assert done.returncode == 1 and len(done.stdout.splitlines()) == 1
        assert done.stderr == b'line 2 of standard input is no JSON string such as "hello"\n'
    done = run(tmp_path / 'nowhere', '')
    assert done.returncode == 1 and b'no tokenizer here' in done.stderr and done.stderr.count(b'\n') == 1
