"""
Words: error rates worked out by hand, decoding equal to the model read whole and to transformers, Whisper
from a folder.
"""
import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import CODEC, make_dialogues

from data.made_up import hum
from flatten import flatten, get_layout
from measures import words
from measures.words import (
    alignment,
    complete,
    cut_at_quiet,
    error_rate,
    finished_turns,
    said_as_written,
    speak,
    transcribe,
    whisper_transcribe,
)
from model import ModelConfig, Qwen2
from vocabulary import Vocabulary

STOP, ALLOWED = 49, (5, 40)     # ids of the random model: what lies between and around is never said


@pytest.fixture(scope='module')
def model():
    """Random weights, with an embedding large enough that no choice hangs on the last bit."""
    torch.manual_seed(0)
    model = Qwen2(ModelConfig(64, 256, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=64)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5)
    return model


@pytest.fixture(scope='module')
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 64, n).tolist() for n in (3, 40, 4, 4, 17, 1, 9, 26)]


@pytest.fixture(scope='module')
def vocab(small_tokenizer):
    return Vocabulary.load(small_tokenizer, CODEC['n_codes'])


# ------------------------------------------------------------------------------------------------------------

def test_error_rate_by_hand():
    """
    the CAT sat on the mat. | the cat sat on mat: one deletion of 6
    Mr. Smith isn't here    | mister smith was not here too: isn't is "is not", so a substitution and an
                              insertion in 5 words
    3 errors in 11 words: the words weigh alike, not the texts.
    """
    pytest.importorskip('jiwer')
    found = error_rate(['the CAT sat on the mat.', "Mr. Smith isn't here"],
                       ['the cat sat on mat', 'mister smith was not here too'])
    assert found == dict(wer=3 / 11, n_word=11, cer=None, n_char=0, substitutions=1, deletions=1,
                         insertions=1)
    assert error_rate(["it's twenty-one colours"], ['it is 21 colors'])['wer'] == 0


def test_error_rate_without_spaces():
    """
    今天天气很好 against 今天天汽好: 6 characters, 气 became 汽, 很 is gone. They are counted apart from the
    English beside them.
    """
    pytest.importorskip('jiwer')
    found = error_rate(['hi there', '今天天气很好。'], ['hi', '今天天汽好'])
    assert found == dict(wer=0.5, n_word=2, cer=2 / 6, n_char=6, substitutions=1, deletions=2, insertions=0)
    # grapheme clusters: a vowel sign is no letter of its own, nor lost
    assert error_rate(['สวัสดี'], ['สวัสดี'])['n_char'] == 4


def test_error_rate_of_nothing():
    """
    Words where none are expected are insertions; without a reference word there is no rate. "mhm" is no word
    to Whisper.
    """
    pytest.importorskip('jiwer')
    assert error_rate(['', 'mhm', 'a b'], ['x y', '', ''])['wer'] == 4 / 2
    assert error_rate(['mhm'], ['no'])['wer'] is None and error_rate(['mhm'], ['no'])['insertions'] == 1
    assert error_rate([], []) == dict(wer=None, n_word=0, cer=None, n_char=0, substitutions=0, deletions=0,
                                      insertions=0)
    assert error_rate(['um drei'], ['drei'], 'de')['wer'] == 0.5        # "at three", in German
    assert error_rate(['um three'], ['three'])['wer'] == 0


@pytest.mark.parametrize('package', ['jiwer', 'whisper_normalizer', 'transformers'])
def test_what_is_not_installed_is_named(package, monkeypatch):
    for name in [package] + [name for name in sys.modules if name.startswith(package + '.')]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match='need.*pip install'):
        words.load_whisper('x', 'cpu') if package == 'transformers' else error_rate(['a'], ['a'])


# ------------------------------------------------------------------------------------------------------------

def read_whole(model, prompt, n_most):
    """As complete should: no cache, no batch, every id scored, the allowed compared."""
    ids, said = list(prompt), []
    while len(said) < n_most:
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        best = max([*range(*ALLOWED), STOP], key=lambda i: logits[i])
        if best == STOP:
            break
        ids, said = ids + [best], said + [best]
    return said


def test_side_by_side_equals_one_by_one(model, prompts):
    n_most = [30, 10, 30, 0, 30, 30, 2, 30]
    expected = [read_whole(model, *each) for each in zip(prompts, n_most)]
    lengths = [len(each) for each in expected]
    assert lengths == [0, 10, 23, 0, 30, 30, 2, 30]          # some stop, some are cut
    for batch_size in (1, 3, 8):
        assert complete(model, prompts, ALLOWED, STOP, n_most, batch_size) == expected
    assert complete(model, [], ALLOWED, STOP, []) == []


@pytest.mark.slow
def test_equals_transformers(model, prompts, tmp_path):
    transformers = pytest.importorskip('transformers')
    model.save_pretrained(tmp_path)
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    allowed = [*range(*ALLOWED), STOP]
    for prompt, said in zip(prompts, complete(model, prompts, ALLOWED, STOP, [20] * len(prompts))):
        ids = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=STOP, pad_token_id=0,
            attention_mask=torch.ones(1, len(prompt)), prefix_allowed_tokens_fn=lambda *_: allowed)
        assert [i for i in ids[0, len(prompt):].tolist() if i != STOP] == said


def test_drawing_and_bias(model, prompts):
    n_most = [20] * len(prompts)
    likeliest = complete(model, prompts, ALLOWED, STOP, n_most)
    assert complete(model, prompts, ALLOWED, STOP, n_most, temperature=1e-4) == likeliest
    drawn = [complete(model, prompts, ALLOWED, STOP, n_most, temperature=5.0, seed=seed)
             for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(ALLOWED[0] <= i < ALLOWED[1] for said in drawn for row in said for i in row)
    assert complete(model, prompts, ALLOWED, STOP, n_most, stop_bias=1e4) == [[]] * len(prompts)
    assert [len(each) for each in complete(model, prompts, ALLOWED, STOP, n_most, stop_bias=-1e4)] == n_most


def test_prompts_are_what_training_had(vocab, monkeypatch):
    """Prompt, what is said and its end are the document of flatten, token by token."""
    dialogue = next(make_dialogues(1))
    dialogue['turns'][0]['text'] = 'hi? yes'
    documents = [(name, each.ids.tolist()) for name in ('asr', 'tts')
                 for each in flatten(dialogue, get_layout(name), vocab)]

    def recite(model, prompts, allowed, stop, n_most, batch_size, stop_bias=0.0, *_):
        n = len(prompts[0])
        name, ids = next((name, ids) for name, ids in documents if ids[:n] == prompts[0].tolist())
        said = ids[n:-1]
        assert ids[-1] == stop and len(said) < n_most[0]
        assert all(allowed[0] <= i < allowed[1] for i in said)
        assert stop_bias == (-math.log(5) if name == 'tts' else 0)
        return [said]

    monkeypatch.setattr(words, 'complete', recite)
    for turn in dialogue['turns']:
        codes = dialogue[turn['role']][turn['start']:turn['end']]
        assert transcribe(None, vocab, [codes]) == [turn['text']]
        assert speak(None, vocab, [turn['text']], text_weight=5.0) == [codes]


TURNS = [dict(role=role, start=start, end=end, text=text) for role, start, end, text in [
    ('user', 0, 4, 'who'), ('assistant', 5, 9, 'broken off'), ('user', 8, 12, 'ok'),
    ('assistant', 14, 18, 'all said'), ('user', 15, 16, 'mhm'), ('user', 19, 20, '')]]


def test_alignment_asks_for_each_role_what_it_should(monkeypatch):
    pytest.importorskip('jiwer')
    assert [turn['text'] for turn in finished_turns(TURNS, 'assistant')] == ['all said']
    assert [turn['text'] for turn in finished_turns(TURNS, 'user')] == ['who', 'ok', 'mhm']

    class Codec:
        sample_rate = 16000
        def decode(self, codes):
            return np.repeat(codes, 640) / 1e3

    dialogue = dict(id='x', user=list(range(20)), assistant=list(range(20)), turns=TURNS)
    model = torch.nn.ModuleDict(dict(model=torch.nn.ModuleDict(dict(norm=torch.nn.RMSNorm(1)))))
    monkeypatch.setattr(words, 'transcribe',
                        lambda model, vocab, codes, batch_size: [' '.join(map(str, each)) for each in codes])
    monkeypatch.setattr(words, 'speak', lambda model, vocab, texts, *_: [[7, 7]] * (len(texts) - 1) + [[]])
    monkeypatch.setattr(words, 'whisper_transcribe',
                        lambda waves, *_, device: [f'{len(wave)}' for wave in waves])
    vocab = type('Vocab', (), dict(n_codes=32))
    found = alignment(model, vocab, Codec(), [dialogue], asr=['user'], tts=[])
    assert list(found) == ['asr_user']
    assert found['asr_user']['pairs'] == [('who', '0 1 2 3'), ('ok', '8 9 10 11'), ('mhm', '15')]
    found = alignment(model, vocab, Codec(), [dialogue], asr=[], tts=['assistant'], whisper='folder')
    assert list(found) == ['asr_assistant', 'asr_assistant_whisper', 'tts_assistant', 'tts_assistant_whisper']
    assert [each['pairs'] for each in found.values()] == [
        [('all said', heard)] for heard in ('14 15 16 17', '2560', '', '0')]
    assert found['tts_assistant']['wer'] == 1 and found['tts_assistant']['deletions'] == 2


@pytest.mark.slow
def test_an_alignment_checkpoint_learns_its_data_by_heart(tmp_path, small_codec, small_tokenizer):
    """6 texts, each always by the same code: 150 steps later it writes what it hears, says what it reads."""
    pytest.importorskip('jiwer')
    import shutil

    import train
    from checkpoint import load_checkpoint
    from data.dialogues import save_dialogues
    shutil.copytree(small_tokenizer, tmp_path / 'tokenizer')
    small_codec.save(tmp_path / 'codec')
    for split, n in (('train', 40), ('val', 5), ('test', 5)):
        save_dialogues(str(tmp_path / f'{split}.arrow'), make_dialogues(n, seed=len(split)),
                       small_codec.describe())
    train.main(train.Config(
        data=str(tmp_path), out_dir=str(tmp_path / 'run'), stages='asr+tts.assistant:150', n_layer=2,
        n_head=2, n_kv_head=1, n_embd=64, n_inner=128, block_size=256, batch_size=4, batch_tokens=1024,
        eval_interval=150, learning_rate=3e-3, warmup_steps=10, text_weight=5.0, device='cpu',
        dtype='float32', tensorboard=False))
    model, vocab, codec, info = load_checkpoint(str(tmp_path / 'run'))
    found = alignment(model, vocab, codec, list(make_dialogues(20, seed=9)), tts=['assistant'],
                      text_weight=info.text_weight)
    assert list(found) == ['asr_user', 'asr_assistant', 'tts_assistant']
    wrong = {name: [pair for pair in each['pairs'] if pair[0] != pair[1]] for name, each in found.items()}
    assert [each['wer'] for each in found.values()] == [0, 0, 0], wrong


# ------------------------------------------------------------------------------------------------------------

def test_long_waves_are_cut_where_it_is_quiet():
    """1,000 samples of noise with silence from 880 to 910, cut into at most 900: cut where it is silent."""
    wave = np.random.default_rng(0).uniform(0.5, 1, 1000).astype(np.float32)
    wave[880:910] = 0
    cuts = cut_at_quiet(wave, 900)
    assert len(cuts[0]) in range(880, 900) and np.array_equal(np.concatenate(cuts), wave)
    cuts = cut_at_quiet(wave, 100)
    assert all(len(cut) <= 100 for cut in cuts) and np.array_equal(np.concatenate(cuts), wave)
    assert len(cut_at_quiet(wave[:900], 900)) == 1 and len(cut_at_quiet(wave[:0], 900)) == 1


@pytest.fixture(scope='module')
def whisper(tmp_path_factory):
    """A folder as Whisper's are, of random weights and a tokenizer of bytes: what it hears is nonsense."""
    transformers = pytest.importorskip('transformers')
    from tokenizers.pre_tokenizers import ByteLevel
    folder = tmp_path_factory.mktemp('whisper')
    special = [
        '<|endoftext|>', '<|startoftranscript|>', '<|en|>', '<|zh|>', '<|transcribe|>', '<|translate|>',
        '<|notimestamps|>']
    vocab = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    (folder / 'vocab.json').write_text(json.dumps(vocab))
    (folder / 'merges.txt').write_text('#version: 0.2\n')
    tokenizer = transformers.WhisperTokenizer(str(folder / 'vocab.json'), str(folder / 'merges.txt'))
    tokenizer.add_special_tokens(dict(additional_special_tokens=special[1:]))
    transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)
    end, start = vocab['<|endoftext|>'], vocab['<|startoftranscript|>']
    torch.manual_seed(0)
    ids = dict(pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start)
    config = transformers.WhisperConfig(
        vocab_size=len(vocab), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_target_positions=32,
        suppress_tokens=None, begin_suppress_tokens=None, init_std=1.0, **ids)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    generation = dict(
        is_multilingual=True, max_length=16, no_timestamps_token_id=vocab['<|notimestamps|>'],
        lang_to_id={name: vocab[name] for name in special[2:4]},
        task_to_id={name[2:-2]: vocab[name] for name in special[4:6]}, **ids)
    (folder / 'generation_config.json').write_text(json.dumps(generation))
    return folder


@pytest.mark.slow        # seconds of imports
def test_whisper(whisper, monkeypatch):
    """
    As many texts as waves, in their order, each what it is alone; nothing from silence; over 30 s two pieces'
    texts.
    """
    def hear(waves, language, **options):
        return whisper_transcribe(waves, 16000, str(whisper), language, **options)

    rng = np.random.default_rng(0)
    loud, other = hum(150, 1.0), rng.uniform(-1, 1, 8000).astype(np.float32)
    long = rng.uniform(-1, 1, 31 * 16000).astype(np.float32)
    nothing, silence = np.zeros(0, np.float32), np.zeros(16000, np.float32)
    texts = hear([loud, nothing, other, silence, long], 'en', batch_size=3)
    assert len(texts) == 5 and texts[1] == texts[3] == '' and texts[0] and texts[2] and texts[0] != texts[2]
    assert texts[0] == hear([loud], 'en')[0] and texts[2] == hear([other], 'en')[0]
    assert texts[4] == ' '.join(hear(cut_at_quiet(long, 30 * 16000), 'en'))
    assert texts[0] != hear([loud], 'zh')[0]        # it is told the language
    # at another rate, its language guessed
    assert len(whisper_transcribe([loud, other], 24000, str(whisper))) == 2
    model = words.load_whisper(str(whisper), torch.device('cpu'))[0]
    monkeypatch.setattr(model.generation_config, 'is_multilingual', False)
    assert hear([loud], 'en')[0] is not None
    with pytest.raises(ValueError, match='knows English only'):
        hear([loud], 'zh')


@pytest.mark.slow
def test_folders_that_hold_no_whisper(tmp_path, whisper, model):
    with pytest.raises(ValueError, match='no Whisper in .*config.json'):
        whisper_transcribe([], 16000, str(tmp_path))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='is of a qwen2 model'):
        whisper_transcribe([], 16000, str(tmp_path))
    (tmp_path / 'config.json').write_bytes((whisper / 'config.json').read_bytes())
    with pytest.raises(ValueError, match='no complete Whisper in'):
        whisper_transcribe([], 16000, str(tmp_path))


def test_said_as_written(monkeypatch):
    """
    One frame is 2 samples; the assistant's channel holds its sample number: what is heard in a turn is where
    it lies.
    """
    def where(waves, *_, device):
        return [f'{wave[0]:.0f} to {wave[-1]:.0f}' for wave in waves]

    pytest.importorskip('jiwer')
    wave = np.stack([np.zeros(40), np.arange(40)], 1)
    monkeypatch.setattr(words, 'whisper_transcribe', where)
    found = said_as_written([dict(turns=TURNS, rate_hz=25.0, sample_rate=50, wave=wave)], 'folder')
    assert found['pairs'] == [('all said', '28 to 35')] and found['n_word'] == 2
