"""The loop: it learns, it can be killed and go on, and ranks and micro-steps give the gradient of one big
batch."""
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CODEC, make_dialogues
from safetensors.torch import load_file, save_file

import checkpoint
import config
import train
from checkpoint import last_state
from codec import load_codec
from common.device import Place
from data.dialogues import Dialogues, save_dialogues
from decode import Duplex, converse
from flatten import LAYOUTS, get_layout
from measures.listen import cut, read_curves
from model import Qwen2
from vocabulary import Vocabulary

TORCHRUN = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


@pytest.fixture
def toy(small_data, tmp_path):
    return train.Config(data=str(small_data), out_dir=str(tmp_path / 'run'), stages='duplex3:10', n_layer=2,
                        n_head=2, n_kv_head=1, n_embd=32, n_inner=64, block_size=128, batch_size=2,
                        batch_tokens=512, eval_interval=5, log_interval=5, warmup_steps=2, learning_rate=3e-3,
                        device='cpu', dtype='float32', tensorboard=False, n_listen=0)


def arguments(cfg):
    return [f'--{name}={getattr(cfg, name)}' for name in cfg.__dataclass_fields__]


def weights(cfg):
    return load_file(Path(last_state(cfg.out_dir)) / 'model.safetensors')


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns(toy):
    """60 dialogues whose answer follows from the question's codes: far below the 5.8 nats of guessing among
    ~330 ids."""
    metrics = train.main(replace(toy, stages='duplex3:200', eval_interval=200))
    assert metrics['step'] == 200 and metrics['val_loss'] < 0.5
    assert set(metrics) >= {
        'val_text', 'val_speech', 'val_silence', 'val_bits_per_sec', 'train_sec', 'best_val_loss'}


def test_text_alone_is_learned(toy):
    """Nothing of it has a duration: bits a second are unknown, all else is as ever."""
    metrics = train.main(replace(toy, stages='text:20, duplex3+text:5', log_interval=5))
    rows = [json.loads(line) for line in (Path(toy.out_dir) / 'log.jsonl').read_text().splitlines()]
    losses = [row['loss'] for row in rows if row['kind'] == 'train' and row['stage'] == 'text']
    assert losses[-1] < losses[0] and rows[0]['bits_per_sec'] is None and metrics['val_bits_per_sec'] > 0


def test_a_layout_of_ones_own_is_trained_and_decoded(toy, monkeypatch):
    """One line in the table, as docs/format.md has it: what streams equals what is computed whole."""
    monkeypatch.setitem(LAYOUTS, 'speech_first',
                        ('chunks', '~user.speech 10, assistant.speech 10, assistant.text 2'))
    train.main(replace(toy, stages='speech_first:5'))
    model, vocab = Qwen2.from_pretrained(toy.out_dir).eval(), Vocabulary.load(toy.out_dir, 32)
    layout = checkpoint.read_info(toy.out_dir).layouts[-1]
    assert layout.name == 'speech_first'
    duplex = Duplex(model, vocab, layout)
    text, codes = duplex.step(np.arange(10))
    assert text.shape == (1, 2) and codes.shape == (1, 10)
    ids = torch.cat(duplex.ids, 1)
    with torch.no_grad():
        logits = model(ids)[0]
    silent = vocab.control['<|silent_speech|>']
    codes = [silent, *range(vocab.code_start, vocab.code_start + 32)]
    assert codes[int(logits[9, codes].argmax())] == ids[0, 10]      # the first to be chosen is a code


@pytest.mark.slow
def test_a_prompt_decides_what_the_assistant_does(toy, small_tokenizer, tmp_path):
    """The same users, told to speak or to hush: the model does what it is told, with users of test that it
    never heard."""
    data = tmp_path / 'told'
    shutil.copytree(small_tokenizer, data / 'tokenizer')
    for split, n in (('train', 100), ('val', 10), ('test', 10)):
        told = []
        for dialogue in make_dialogues(n, seed=len(split)):
            user_only = [turn for turn in dialogue['turns'] if turn['role'] == 'user']
            told += [dict(dialogue, prompt='speak'),
                     dict(dialogue, id=dialogue['id'] + '-', prompt='hush', turns=user_only)]
        save_dialogues(str(data / f'{split}.arrow'), told, CODEC)
    train.main(replace(toy, data=str(data), stages='duplex3:1000', eval_interval=500,
                       block_size=512, batch_tokens=2048))
    model, vocab = Qwen2.from_pretrained(toy.out_dir).eval(), Vocabulary.load(toy.out_dir, 32)
    test = [dialogue for dialogue in Dialogues(str(data), 'test') if dialogue['prompt'] == 'speak']
    users = [dialogue['user'] for dialogue in test]
    spoken, hushed = (
        converse(model, vocab, get_layout('duplex3'), users, 0, prompts=[prompt] * len(users))[0]
        for prompt in ('speak', 'hush'))
    n_spoken, n_hushed = (sum(bool(dialogue['turns']) for dialogue in said) for said in (spoken, hushed))
    assert n_spoken >= 9 and n_hushed <= 1, (n_spoken, n_hushed)


def save_and_wait(self, *arguments, real=checkpoint.Saver.save):
    real(self, *arguments)
    self.wait()


@pytest.mark.parametrize('stages, optimizer', [
    ('duplex3:10', 'adamw'), ('duplex3:10', 'muon'), ('asr+tts:4, duplex3:6', 'adamw')])
def test_killed_and_resumed_equals_uninterrupted(toy, stages, optimizer, tmp_path, monkeypatch):
    """The run dies right before step 8, after the state of step 5 was saved; what goes on from there ends bit
    for bit alike."""
    whole = replace(toy, stages=stages, optimizer=optimizer, out_dir=str(tmp_path / 'whole'))
    train.main(whole)
    killed = replace(whole, out_dir=str(tmp_path / 'killed'))
    get_lr = train.get_lr

    def die(step, *rest):
        if step == 7:
            raise KeyboardInterrupt
        return get_lr(step, *rest)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, 'get_lr', die)
        patch.setattr(checkpoint.Saver, 'save', save_and_wait)      # else two steps may be over sooner
        train.main(killed)
    assert Path(last_state(killed.out_dir)).name == 'step-000005'
    metrics = train.main(replace(killed, resume=True))
    assert equal(weights(whole), weights(killed)) and metrics['step'] == 10
    logs = [[{k: v
              for k, v in json.loads(line).items()
              if k not in ('tokens_per_sec', 'loader_wait', 'train_sec')}
             for line in open(Path(cfg.out_dir) / 'log.jsonl')]
            for cfg in (whole, killed)]
    assert logs[0] == logs[1]
    assert train.main(replace(killed, resume=True))['step'] == 10       # finished: nothing is done again


def test_saving_in_the_background_saves_the_same(toy, tmp_path, monkeypatch):
    """The weights that are written are those of their step, though training goes on, and each state is whole
    before the run ends. What cannot be written ends the run."""
    fore, back = (replace(toy, out_dir=str(tmp_path / name)) for name in ('fore', 'back'))
    with monkeypatch.context() as patch:    # it waits for each
        patch.setattr(checkpoint.Saver, 'save', save_and_wait)
        train.main(fore)
    published = []

    def publish(folder, out_dir, real=checkpoint.publish):
        time.sleep(0.2)     # some steps
        published.append(load_file(Path(folder) / 'model.safetensors'))
        real(folder, out_dir)
    monkeypatch.setattr(checkpoint, 'publish', publish)
    train.main(back)
    assert len(published) == 2 and not equal(*published) and equal(published[1], weights(back))
    for name in ('model.safetensors', 'optimizer.safetensors'):
        assert equal(*(load_file(Path(last_state(cfg.out_dir)) / name) for cfg in (fore, back)))

    def fail(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(checkpoint, 'save_state', fail)
    with pytest.raises(ValueError, match='full: step 5 could not be saved .*No space left.* from the start'):
        train.main(replace(back, out_dir=str(tmp_path / 'full')))


@pytest.mark.slow
def test_a_process_that_died_goes_on_when_torchrun_starts_it_again(toy, tmp_path, run):
    """It dies before step 8, though no command says --resume=true. The second one starts from step 5
    and ends bit for bit alike."""
    whole = replace(toy, out_dir=str(tmp_path / 'whole'))
    train.main(whole)
    script = tmp_path / 'dies_once.py'
    script.write_text('''
import os, sys, checkpoint, config, train
def save(self, *arguments, real=checkpoint.Saver.save):
    real(self, *arguments)
    self.wait()
checkpoint.Saver.save = save
def get_lr(step, *rest, real=train.get_lr):
    if step == 7 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
        os._exit(1)
    return real(step, *rest)
train.get_lr = get_lr
train.main(config.load(train.Config, sys.argv[1:]))
''')
    launcher = (*TORCHRUN[:-1], '--nproc_per_node=1', '--max_restarts=1')
    printed = run(script, *arguments(toy), launcher=launcher).stdout
    assert equal(weights(whole), weights(toy)) and 'moved to' not in printed
    assert printed.count('step      5/10') == 1


def test_ranks_and_micro_steps_give_the_gradient_of_one_big_batch(toy, tmp_path, run):
    """One step of SGD-like AdamW on 4 rows: in one piece, in 2 micro-steps, and on 2 ranks x 2 micro-steps of
    1 row. Rows hold unequal numbers of learned tokens, so a mean of means would differ in the third digit."""
    one = replace(toy, stages='duplex3:1', batch_size=4, out_dir=str(tmp_path / 'one'), grad_clip=0.0,
                  text_weight=3.0, user_noise=0.1)
    two = replace(one, batch_size=2, out_dir=str(tmp_path / 'two'))
    four = replace(one, batch_size=1, out_dir=str(tmp_path / 'four'))
    train.main(one)
    train.main(two)
    run('train.py', *arguments(four), n_process=2)
    moments = [
        load_file(Path(last_state(cfg.out_dir)) / 'optimizer.safetensors') for cfg in (one, two, four)]
    for other in moments[1:]:
        for name in moments[0]:
            if name.endswith('exp_avg'):        # after one step (1 - beta1) x gradient
                torch.testing.assert_close(other[name], moments[0][name], rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_torchrun_equals_one_process(toy, tmp_path, run):
    """10 steps on two ranks end where one process ends, up to the order of additions; and its log is the
    same."""
    alone, ranks = replace(toy,
                           out_dir=str(tmp_path / 'alone')), replace(toy, out_dir=str(tmp_path / 'ranks'),
                                                                     batch_size=1)
    expected = train.main(alone)
    run('train.py', *arguments(ranks), launcher=TORCHRUN)
    got = [json.loads(line) for line in open(Path(ranks.out_dir) / 'log.jsonl')][-1]
    assert got['loss'] == pytest.approx(expected['val_loss'],
                                        rel=1e-3) and got['bits_per_sec'] == pytest.approx(
                                            expected['val_bits_per_sec'], rel=1e-3)


def test_best_weights_are_those_of_the_lowest_val_loss(toy, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.2])
    monkeypatch.setattr(train, 'by_stream', lambda sums, sec, real=train.by_stream: dict(real(sums, sec)))
    saved = []
    monkeypatch.setattr(
        checkpoint, 'publish', lambda folder, out_dir, real=checkpoint.publish:
        (saved.append(Path(folder).name), real(folder, out_dir)))
    real = train.by_stream

    def fake(sums, sec):
        values = real(sums, sec)
        return dict(values, loss=next(losses)) if sys._getframe(1).f_code.co_name == 'evaluate' else values
    monkeypatch.setattr(train, 'by_stream', fake)
    metrics = train.main(replace(toy, stages='duplex3:20'))
    assert saved == ['step-000005', 'step-000010']
    assert (metrics['best_val_loss'], metrics['best_step']) == (2.0, 10)
    assert not equal(load_file(Path(toy.out_dir) / 'model.safetensors'), weights(toy))


def test_a_run_folder_is_complete(toy):
    train.main(toy)
    names = {str(path.relative_to(toy.out_dir)) for path in Path(toy.out_dir).rglob('*') if path.is_file()}
    assert {
        'config.py', 'log.jsonl', 'config.json', 'model.safetensors', 'tokenizer.json',
        'tokenizer_config.json', 'vocab.json', 'merges.txt', 'generation_config.json',
        'step-000010/optimizer.safetensors', 'step-000010/state.json'} <= names
    assert not [name for name in names if name.endswith('.part')]
    assert config.load(train.Config, [str(Path(toy.out_dir) / 'config.py')]) == toy
    # another run in the same folder: the first is kept
    again = train.main(replace(toy, stages='duplex3:5'))
    assert again['step'] == 5 and (Path(toy.out_dir + '.1') / 'model.safetensors').exists()


def test_opens_in_transformers(toy):
    """The trained folder is a Hugging Face model: same logits, same ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model import Qwen2
    from vocabulary import Vocabulary
    train.main(toy)
    theirs, ours = AutoModelForCausalLM.from_pretrained(toy.out_dir).eval(), Qwen2.from_pretrained(toy.out_dir
                                                                                                   ).eval()
    tokenizer, vocab = AutoTokenizer.from_pretrained(toy.out_dir), Vocabulary.load(toy.out_dir)
    text = 'the capital of france is <|eot|> paris é'
    assert tokenizer(
        text, split_special_tokens=True)['input_ids'] == vocab.encode(text) and len(tokenizer) == vocab.size
    assert tokenizer.convert_tokens_to_ids('<|s_3|>') == vocab.code_start + 3
    assert tokenizer.convert_tokens_to_ids('<|silent_speech|>') == vocab.control['<|silent_speech|>']
    idx = torch.randint(vocab.size, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize('tie, sharded', [(True, False), (False, True)])
def test_starts_from_a_hugging_face_folder(toy, small_tokenizer, tmp_path, capsys, tie, sharded):
    """A Qwen2 that knows text only, as transformers writes it: its vocabulary grows, what it knew stays, and
    it learns."""
    import shutil

    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from vocabulary import Vocabulary
    base = tmp_path / 'base'
    n_text = Vocabulary.load(small_tokenizer).n_text
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=n_text + 10, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
                    tie_word_embeddings=tie, bos_token_id=None, eos_token_id=None)).bfloat16()
    theirs.save_pretrained(base, **(dict(max_shard_size='20KB') if sharded else {}))
    shutil.copy(small_tokenizer / 'tokenizer.json', base)
    train.main(replace(toy, init_from=str(base), stages='duplex3:1', learning_rate=0.0))
    out = capsys.readouterr().out
    vocab = Vocabulary.load(toy.out_dir)
    assert vocab.code_start == n_text + 10      # 8 control tokens lie in spare rows
    assert f'{8 + vocab.size - n_text - 10} ids are new of {vocab.size}' in out
    assert 'has seen contexts of at most 64' in out
    grown, tokenizer = AutoModelForCausalLM.from_pretrained(toy.out_dir
                                                            ), AutoTokenizer.from_pretrained(toy.out_dir)
    assert grown.config.tie_word_embeddings == tie and len(tokenizer) == vocab.size == grown.config.vocab_size
    idx = torch.tensor([vocab.encode('the capital of france')])
    with torch.no_grad():
        torch.testing.assert_close(
            grown(idx).logits[..., :n_text],
            theirs.float()(idx).logits[..., :n_text], atol=1e-5, rtol=0)
    metrics = train.main(replace(toy, init_from=str(base), stages='duplex3:60', eval_interval=60))
    assert metrics['val_loss'] < 2


def test_auto_batch_takes_the_most_rows_that_fit(toy, monkeypatch):
    """With a memory of 6 rows: of the divisors of 12 rows a step (1 2 3 4 6 12) it is 6; with a memory of
    none, a sentence. Each number of rows is compiled anew, as torch compiles at most eight shapes of a
    function and runs the ninth as it is: 360 rows a step have 24 divisors."""
    class Memory(torch.nn.Linear):
        def n_param(self):
            return 1

        def forward(self, idx, pos, doc, learn, targets, weights):
            assert idx.shape == pos.shape == doc.shape and learn.shape == targets.shape == weights.shape
            assert not n_compiled       # since dynamo was last reset
            n_compiled.append(len(idx))
            if len(idx) > self.n_row:
                raise self.error
            return self.weight.sum() * 0, None

    n_compiled, model = [], Memory(1, 1)
    monkeypatch.setattr(torch._dynamo, 'reset', n_compiled.clear)
    place, model.error = train.Place(torch.device('cpu')), torch.OutOfMemoryError('CUDA out of memory')
    for n_most, model.n_row, best in ((12, 6, 6), (12, 5, 4), (12, 100, 12), (360, 125, 120), (360, 1, 1)):
        cfg = replace(toy, batch_tokens=n_most * 128)
        assert train.find_batch_size(model, cfg, place) == best
    model.n_row, model.error = 0, RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED')
    with pytest.raises(ValueError, match='not even one row of block_size=128 fits'):
        train.find_batch_size(model, cfg, place)
    model.error = RuntimeError('another fault')
    with pytest.raises(RuntimeError, match='another fault'):
        train.find_batch_size(model, cfg, place)
    with pytest.raises(ValueError, match='auto_batch tries how much the memory of a GPU takes, and there is '
                                         'none'):
        train.main(replace(toy, auto_batch=True))


def test_a_state_of_another_version_is_named(toy):
    train.main(replace(toy, stages='duplex3:1'))
    path = Path(last_state(toy.out_dir)) / 'optimizer.safetensors'
    save_file({name.replace('qkv_proj', 'q_proj'): x for name, x in load_file(path).items()}, path)
    (path.parent / 'manifest.json').unlink()
    with pytest.raises(ValueError, match='was saved by another version of this code .it has no state of '
                                         '.*qkv_proj'):
        train.main(replace(toy, resume=True))


def test_several_data_sets(toy, small_data, tmp_path):
    import shutil
    other = tmp_path / 'other'
    shutil.copytree(small_data, other)
    metrics = train.main(replace(toy, data=f'{small_data}:0.7,{other}:0.3'))
    assert metrics['step'] == 10
    resumed = train.main(replace(toy, data=f'{small_data}:0.7,{other}:0.3', stages='duplex3:12', resume=True))
    assert resumed['step'] == 12


def test_a_stage_of_epochs(toy, capsys):
    """60 dialogues of some 180 tokens are about 95 rows of 128, 24 steps of 4 rows."""
    metrics = train.main(replace(toy, stages='duplex3:0.5epochs', eval_interval=100))
    out = capsys.readouterr().out
    steps_an_epoch = float(out.split('it takes ')[1].split(' steps')[0])
    assert metrics['step'] == round(0.5 * steps_an_epoch) and 'the stage 0.5' in out


def test_a_batch_as_large_as_the_data_is_pointed_out(toy, capsys):
    """Otherwise the paper's 100 M tokens over 2,000 h of dialogue, 4 steps an epoch, would just not train."""
    train.main(replace(toy, batch_tokens=128 * 100, stages='duplex3:2epochs', warmup_steps=0))
    assert 'note: 2 steps in all, as a step takes 12800 tokens and an epoch has 1' in capsys.readouterr().out


@pytest.mark.parametrize('change, message', [
    (dict(data='nowhere'), 'no data folder nowhere'),
    (dict(batch_tokens=500), 'batch_tokens 500 is no multiple of batch_size 2 x block_size 128 x 1 processes '
                             '= 256'),
    (dict(init_from='nowhere'), 'init_from: no folder nowhere'),
    (dict(device='foo'), "device 'foo' cannot be used here"),
    (dict(block_size=16, batch_tokens=64), 'a chunk of duplex3 has 22 tokens'),
    (dict(stages='duplex3:5, half_duplex:5', block_size=30, batch_tokens=60), 'nothing in train fits layout '
                                                                              'half_duplex'),
])
def test_refused(toy, change, message):
    """One sentence, and the run that was there before stays where it was."""
    train.main(replace(toy, stages='duplex3:1'))
    before = sorted(os.listdir(toy.out_dir))
    with pytest.raises(ValueError) as error:
        train.main(replace(toy, **change))
    assert message in str(error.value) and '\n' not in str(error.value)
    assert sorted(os.listdir(toy.out_dir)) == before and not os.path.exists(toy.out_dir + '.1')


def test_only_runs_are_moved_aside(toy):
    os.makedirs(toy.out_dir)
    (Path(toy.out_dir) / 'notes.txt').write_text('precious')
    with pytest.raises(ValueError, match='holds files that are no run of train.py'):
        train.main(toy)
    assert (Path(toy.out_dir) / 'notes.txt').exists()


@pytest.mark.parametrize('setting, message', [('--speech_chunk=0', 'speech_chunk is 0'),
                                              ('--stages=duplex4:10', "did you mean 'duplex3'"),
                                              ('--stages=duplex3', 'LAYOUT:STEPS'),
                                              ('--lerning_rate=1', "did you mean 'learning_rate'"),
                                              ('--batch_size=0', 'batch_size is 0'),
                                              ('--data=a:b', "'a:b' is not FOLDER:WEIGHT"),
                                              ('--data=a:1,', 'is not FOLDER'),
                                              ('--stages=asr:0epochs', 'LAYOUT:STEPS'),
                                              ('--stages=asr:1.5', 'LAYOUT:STEPS'),
                                              ('--dtype=int8', 'dtype is'), ])
def test_settings_refused(setting, message):
    with pytest.raises(SystemExit) as error:
        config.load(train.Config, [setting])
    assert message in str(error.value)


def test_data_of_another_codec_is_refused(toy, small_data, tmp_path):
    """A checkpoint trained with one codec does not go on with the codes of another: both are named."""
    import shutil

    from conftest import CODEC, make_dialogues

    from data.dialogues import save_dialogues
    train.main(toy)
    other = tmp_path / 'other'
    shutil.copytree(small_data, other)
    for split in ('train', 'val'):
        save_dialogues(str(other / f'{split}.arrow'), make_dialogues(20),
                       dict(CODEC, fingerprint='fedcba9876543210'))
    with pytest.raises(ValueError, match='codec toy fedcba9876543210.*codec toy 0123456789abcdef'):
        train.main(replace(toy, data=str(other), init_from=toy.out_dir, out_dir=str(tmp_path / 'next')))


@pytest.fixture
def spoken(toy, small_run):
    """A run whose codec can be heard: it listens to two of the five dialogues of val, of under 5 s."""
    return replace(toy, data=str(small_run[0]), n_listen=2)


def heard(cfg):
    return sorted(path.name for path in (Path(cfg.out_dir) / 'listen').glob('*'))


def test_it_is_heard_and_learns_the_same(spoken, tmp_path, capsys):
    """Steps 5 and 10 are heard; weights, optimiser and random numbers end as those of a run that nobody
    listened to."""
    soundfile = pytest.importorskip('soundfile')
    deaf = replace(spoken, n_listen=0, out_dir=str(tmp_path / 'deaf'))
    train.main(deaf)
    train.main(spoken)
    assert 'note: ' not in capsys.readouterr().out
    states = [
        load_file(Path(last_state(cfg.out_dir)) / 'optimizer.safetensors') for cfg in (spoken, deaf)]
    assert equal(*states) and 'rng' in states[0] and equal(weights(spoken), weights(deaf))
    assert heard(deaf) == [] and heard(spoken) == [
        f'step-0000{step}-d{i}.{end}' for step in ('05', '10') for i in (0, 1) for end in ('jsonl', 'wav')]
    from data.dialogues import Dialogues
    reference = Dialogues(spoken.data, 'val')[1]
    wave, rate = soundfile.read(Path(spoken.out_dir) / 'listen/step-000010-d1.wav')
    assert wave.shape == (len(reference['user']) * 640, 2) and rate == 16000 and wave[:, 0].any()
    said = [json.loads(line) for line in open(Path(spoken.out_dir) / 'listen/step-000010-d1.jsonl')]
    assert [turn['text'] for turn in said if turn['role'] == 'user'
            ] == [turn['text'] for turn in reference['turns'] if turn['role'] == 'user']
    page = (Path(spoken.out_dir) / 'report.html').read_text()
    assert 'step 10' in page and re.findall('<a href="([^"]*)', page) == [
        'listen/step-000005-d0.wav', 'listen/step-000005-d1.wav']
    assert 'listen/' not in (Path(deaf.out_dir) / 'report.html').read_text()     # curves only


def test_it_is_heard_at_each_kth_evaluation_and_at_the_last(spoken):
    train.main(replace(spoken, eval_interval=2, listen_interval=2, n_listen=1))
    steps = [name.split('-')[1] for name in heard(spoken) if name.endswith('wav')]
    assert steps == ['000004', '000008', '000010']


def test_random_weights_start_from_the_codec(spoken, toy):
    """Rows of codes are as like one another as the codec's own vectors: of the 32 directions here, distances
    come back to 1 / sqrt(2 * 32) = 13 %."""
    cfg = replace(spoken, new_rows='codec', new_rows_scale=3.0)
    place = Place(torch.device('cpu'), torch.float32)
    _, model, vocab = train.build_model(cfg, place, Dialogues(cfg.data, 'train'), None)
    codes = model.model.embed_tokens.weight[vocab.code_start:vocab.code_start + vocab.n_codes].detach()
    near, far = (torch.pdist(x) for x in (codes, load_codec(cfg.data).vectors()))
    assert torch.corrcoef(torch.stack([near, far]))[0, 1] > 0.8
    others = model.model.embed_tokens.weight[:vocab.n_text].detach()
    assert codes.std().item() == pytest.approx(3 * others.std().item(), rel=0.3)
    with pytest.raises(ValueError, match='no codec in'):
        train.main(replace(toy, new_rows='codec'))


@pytest.mark.parametrize('why', ['no vocoder', 'no soundfile'])
def test_what_cannot_be_heard_does_not_stop_the_run(spoken, monkeypatch, capsys, why):
    """A note, once; what was said is written all the same."""
    from codec.mel import MelCodec

    def decode(self, codes):
        raise ValueError('no vocoder here')
    if why == 'no vocoder':
        monkeypatch.setattr(MelCodec, 'decode', decode)
    else:
        monkeypatch.setitem(sys.modules, 'soundfile', None)
    assert train.main(spoken)['step'] == 10
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith('note: ')]
    if why == 'no vocoder' and not importlib.util.find_spec('soundfile'):
        why = 'no soundfile'
    assert notes == [
        'note: what the model says is written, but not heard: ' +
        ('no vocoder here' if why == 'no vocoder' else 'pip install soundfile soxr')]
    assert heard(spoken) == [f'step-0000{step}-d{i}.jsonl' for step in ('05', '10') for i in (0, 1)]
    assert '<a href="listen/step-000005-d0.jsonl">step 5, d0</a>' in (Path(spoken.out_dir)
                                                                      / 'report.html').read_text()


@pytest.mark.parametrize('error', [torch.OutOfMemoryError('CUDA out of memory.\nTried'),
                                   OSError(28, 'No space left on device')])
def test_a_listening_that_fails_does_not_stop_the_run(spoken, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr('measures.listen.converse', fail)
    assert train.main(spoken)['step'] == 10
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith('note: ')]
    assert notes == ['note: nothing is heard: ' + str(error).split('\n')[0]] and heard(spoken) == []


def test_stages_without_a_clock_and_data_without_a_codec(toy, capsys):
    train.main(replace(toy, stages='asr+tts:10, duplex3:5', n_listen=2))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith('note: ')]
    assert len(notes) == 2 and 'asr+tts goes by turns, without a clock' in notes[
        0] and f'nothing is heard: no codec in {toy.data}' in notes[1]
    assert heard(toy) == [] and (Path(toy.out_dir) / 'report.html').exists()


def test_only_the_first_half_minute_is_listened_to():
    turns = [
        dict(role='user', start=0, end=5, text='a'),
        dict(role='assistant', start=5, end=12, text='b'),
        dict(role='user', start=10, end=12, text='c')]
    short = cut(dict(id='x', user=list(range(12)), assistant=list(range(12)), turns=turns), 10)
    assert short['user'] == short['assistant'] == list(range(10)) and short['turns'] == [
        turns[0], dict(turns[1], end=10)]


def test_curves_are_the_whole_run_thinned(tmp_path):
    """1,001 train lines: every third, counted from the last; val, of two lines, stays."""
    rows = [
        dict(kind='train', step=step, stage='x', lr=1.0, loss=step / 10, text=1.0) for step in range(1001)
    ] + [dict(kind='val', step=step, loss=2.0, silence=3.0) for step in (500, 1000)]
    (tmp_path / 'log.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
    curves = read_curves(tmp_path / 'log.jsonl')
    assert set(curves) == {'train loss', 'train text', 'val loss', 'val silence'} and curves['val loss'] == [
        (500, 2.0), (1000, 2.0)]
    assert [step for step, _ in curves['train loss']] == list(range(
        1, 1001, 3)) and curves['train loss'][-1] == (1000, 100.0)


WANDB = '''
import json
class Error(Exception): pass
def put(**values):
    with open(FILE, 'a') as file: print(json.dumps(values), file=file)
class Audio:
    def __init__(self, wave, sample_rate, caption): self.about = dict(audio=wave.shape,
    sample_rate=sample_rate, caption=caption)
class Run:
    def __init__(self, id): self.id = id
    def define_metric(self, name, step_metric): put(define_metric=[name, step_metric])
    def log(self, values): put(log={key: getattr(value, 'about', value) for key, value in values.items()})
def init(project, name, id, resume, dir, config, reinit):
    if project == 'offline': raise Error('no network')
    put(init=[project, name, id, resume, dir, config['seed']])
    return Run(id or 'made-by-wandb')
'''


def test_wandb(spoken, tmp_path, monkeypatch):
    """Against a stub of its interface: scalars and audio arrive with their steps, a resumed run continues the
    same one."""
    pytest.importorskip('soundfile')
    (tmp_path / 'stub').mkdir()
    (tmp_path / 'stub/wandb.py').write_text(f'FILE = {str(tmp_path / "put")!r}\n' + WANDB)
    monkeypatch.syspath_prepend(tmp_path / 'stub')
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    train.main(replace(spoken, stages='duplex3:5', wandb='voices'))
    train.main(replace(spoken, stages='duplex3:6', wandb='voices', resume=True))
    put = [json.loads(line) for line in open(tmp_path / 'put')]
    inits, logs = [row['init'] for row in put if 'init' in row], [row['log'] for row in put if 'log' in row]
    assert inits == [['voices', 'run', id, 'allow', spoken.out_dir, 1337] for id in (None, 'made-by-wandb')
                     ] and ['*', 'step'] in [row.get('define_metric') for row in put]
    assert [(row['step'], next(iter(row)).split('/')[0]) for row in logs] == [
        (step, kind) for step in (5, 6) for kind in ('train', 'val', 'heard', 'heard')]
    assert [step for step, _ in read_curves(Path(spoken.out_dir) / 'log.jsonl')['val loss']] == [
        5, 6] and len(heard(spoken)) == 8
    assert logs[2]['heard/d0']['audio'][1] == 2 and logs[2]['heard/d0'][
        'sample_rate'] == 16000 and 's user: ' in logs[2]['heard/d0']['caption']
    with pytest.raises(ValueError, match='wandb=offline cannot start: no network'):
        train.main(replace(spoken, wandb='offline'))
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(ValueError, match='pip install wandb'):
        train.main(replace(spoken, wandb='voices'))


def test_tensorboard_is_given_audio(spoken):
    pytest.importorskip('tensorboard')
    pytest.importorskip('soundfile')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train.main(replace(spoken, tensorboard=True, stages='duplex3:5'))
    events = EventAccumulator(spoken.out_dir).Reload()
    assert events.Tags()['audio'] == ['heard/d0', 'heard/d1'] and [
        event.step for event in events.Audio('heard/d0')] == [5]
    assert b'user: ' in events.Tensors(
        'heard/d0/text_summary')[0].tensor_proto.string_val[0] and 'val/loss' in events.Tags()['scalars']


def test_show_prints_the_rows_and_stops(toy, capsys, monkeypatch):
    """Two rows of each stage; nothing is written. What user_noise replaced carries a ~, and without a
    terminal there are no colours."""
    monkeypatch.delenv('FORCE_COLOR', raising=False)
    assert train.main(replace(toy, show=2, stages='asr+tts:5, duplex3:5', user_noise=0.3,
                              text_weight=5.0)) == {}
    out = capsys.readouterr().out
    assert out.count('\nrow ') == 4 and out.count(
        'stage ') == 2 and ' text x5, ' in out and ' speech x1' in out
    assert '~' in out.split('row 0')[1] and '!' not in re.sub('fed: .*', '', out).replace(
        '!t', '') and '\033' not in out
    assert not os.path.exists(toy.out_dir)
    monkeypatch.setenv('FORCE_COLOR', '1')
    train.main(replace(toy, show=1))
    assert '\033[32m' in capsys.readouterr().out
    monkeypatch.setenv('NO_COLOR', '1')
    train.main(replace(toy, show=1))
    assert '\033' not in capsys.readouterr().out
