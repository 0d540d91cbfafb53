"""Listening and talking at once: what streams equals what is computed whole, and only what a slot allows is
said."""
import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import CODEC, make_dialogues
from safetensors.torch import load_file, save_file

import config
import sample
from checkpoint import load_checkpoint
from common.audio import write_audio
from common.linear import Int8, Packed
from data.dialogues import Dialogues, save_dialogues
from data.made_up import hum
from decode import Duplex, Sampling, converse, for_decoding
from flatten import get_layout, lay_prompt, unflatten
from model import KVCache, Qwen2


@pytest.fixture(scope='module')
def loaded(small_run):
    data, checkpoint = small_run
    checkpoint = load_checkpoint(str(checkpoint))
    return checkpoint.model, checkpoint.vocab, checkpoint.layout, checkpoint.codec, Dialogues(
        str(data), 'test')


def talk(loaded, users, n_chunk=4, layout=None, **settings):
    """[text], [codes] of each chunk, and all ids, for users int [n_row, n_chunk * 10]."""
    model, vocab, trained, _, _ = loaded
    sampling = Sampling(**{key: settings.pop(key) for key in list(settings) if hasattr(Sampling, key)})
    duplex = Duplex(model, vocab, layout or trained, len(users), sampling, **settings)
    steps = [duplex.step(users[:, c * 10:c * 10 + 10]) for c in range(n_chunk)]
    return steps, torch.cat(duplex.ids, 1)


@pytest.fixture
def users():
    return np.random.default_rng(0).integers(0, 32, (3, 60))


def test_streaming_equals_whole(loaded, users):
    """12 cached passes a chunk say what one forward over the whole conversation says at the same places."""
    model, vocab, layout, _, _ = loaded
    steps, ids = talk(loaded, users)
    with torch.no_grad():
        logits = model(ids)     # (3, 88, V)
    at, kinds = 0, [slot.kind if slot.learned else None for slot in layout.chunk for _ in range(slot.n)] * 4
    allowed = dict(
        text=[*range(vocab.n_text), vocab.control['<|silent_text|>']], speech=[
            vocab.control['<|silent_speech|>'], *range(vocab.code_start, vocab.code_start + vocab.n_codes)])
    for at, kind in enumerate(kinds):
        if kind:
            rows = torch.tensor(allowed[kind])
            assert torch.equal(rows[logits[:, at - 1, rows].argmax(-1)], ids[:, at])


def test_the_past_does_not_know_the_future(loaded, users):
    changed = users.copy()
    changed[:, 20:] = (users[:, 20:] + 7) % 32
    before, after = talk(loaded, users)[1], talk(loaded, changed)[1]
    assert torch.equal(before[:, :44], after[:, :44]) and not torch.equal(before, after)


def test_a_prompt_comes_before_all(loaded, users):
    """What streams behind a prompt is what one forward over prompt and conversation says; users with other
    prompts are as if alone; the prompt is what is forgotten first."""
    trained, vocab, layout, *rest = loaded
    torch.manual_seed(0)
    model = Qwen2(trained.config).eval()        # one that the prompt makes say something else
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5)
    duplex = Duplex(model, vocab, layout, 3, prompt='be kind')
    for c in range(4):
        duplex.step(users[:, c * 10:c * 10 + 10])
    ids = torch.cat(duplex.ids, 1)
    head = lay_prompt('be kind', vocab)
    assert ids[:, :len(head)].tolist() == [head] * 3 and ids.shape[1] == len(head) + 88
    with torch.no_grad():
        logits = model(ids)
    codes = slice(vocab.code_start, vocab.code_start + vocab.n_codes)
    silent = vocab.control['<|silent_speech|>']
    for at in range(len(head) + 12, ids.shape[1], 22):      # the first code of each chunk
        scores = torch.cat([logits[:, at - 1, codes], logits[:, at - 1, silent:silent + 1]], 1)
        choice = scores.argmax(1)
        said = torch.where(choice == vocab.n_codes, silent, choice + vocab.code_start)
        assert torch.equal(said, ids[:, at])
    assert not torch.equal(ids[:, len(head):], talk([model, vocab, layout, *rest], users)[1])

    prompts = ['be kind', '', 'be kind']
    together, _ = converse(model, vocab, layout, list(users), 0, prompts=prompts)
    alone = [converse(model, vocab, layout, [user], 0, prompts=[prompt])[0][0]
             for user, prompt in zip(users, prompts)]
    assert together == alone and [dialogue.get('prompt', '') for dialogue in together] == prompts

    short = Duplex(model, vocab, layout, 3, max_context=44 + len(head), prompt='be kind')
    for c in range(6):
        short.step(users[:, c * 10:c * 10 + 10])
    assert short.n_prompt == 0 and short.cache.len + short.unfed.shape[1] <= 44 + len(head)
    with pytest.raises(ValueError, match='holds no two chunks of 22 tokens behind a prompt of'):
        Duplex(model, vocab, layout, 3, max_context=44, prompt='be kind')


def test_users_side_by_side_do_not_hear_each_other(loaded, users):
    together = talk(loaded, users)[1]
    for row in range(3):
        assert torch.equal(talk(loaded, users[row:row + 1])[1][0], together[row])


@pytest.mark.parametrize('settings', [
    dict(),
    dict(text_temperature=2.0, speech_temperature=2.0),
    dict(speech_temperature=5.0, speech_top_k=2)])
def test_only_allowed_ids_are_said(loaded, users, settings):
    model, vocab, layout, _, _ = loaded
    steps, ids = talk(loaded, users, 6, **settings)
    for row in ids.numpy():
        unflatten(row, layout, vocab)       # raises for an id in the wrong slot
    for text, codes in steps:
        assert text.shape == (3,
                              2) and codes.shape == (3,
                                                     10) and codes.min() >= -1 and codes.max() < vocab.n_codes


def test_sampling(loaded, users):
    warm = dict(text_temperature=1.0, speech_temperature=1.0)
    assert torch.equal(talk(loaded, users, seed=1, **warm)[1], talk(loaded, users, seed=1, **warm)[1])
    assert not torch.equal(talk(loaded, users, seed=1, **warm)[1], talk(loaded, users, seed=2, **warm)[1])
    # the likeliest
    assert torch.equal(talk(loaded, users, speech_top_k=1, text_top_k=1, **warm)[1], talk(loaded, users)[1])
    assert all((codes == -1).all() for _, codes in talk(loaded, users, silence_bias=1e6)[0])
    assert all((codes >= 0).all() for _, codes in talk(loaded, users, silence_bias=-1e6)[0])
    silent = loaded[1].control['<|silent_text|>']
    # the weight is taken back
    assert all((text == silent).all() for text, _ in talk(loaded, users, text_weight=1e300)[0])


def test_past_the_context_the_oldest_chunks_leave(loaded, users):
    """60 frames are 132 tokens; with room for 3 chunks the first 3 are as ever, and what left is forgotten
    for good."""
    whole, short = talk(loaded, users, 6)[1], talk(loaded, users, 6, max_context=66)[1]
    assert short.shape == whole.shape and torch.equal(short[:, :66], whole[:, :66])
    duplex = Duplex(loaded[0], loaded[1], loaded[2], 3, max_context=66)
    for c in range(6):
        duplex.step(users[:, c * 10:c * 10 + 10])
        assert duplex.cache.len <= 66
    assert duplex.cache.next_pos == 131     # all but the last token, which rides with the next chunk


def test_the_ring_holds_the_latest_positions(loaded):
    """One layer's keys know only their own token, so a cache that has gone around its ring of 24 slots and
    forgotten all but the last says what a model says that is fed those alone; pieces of 1 to 11 tokens fall
    across the ring's end and the borders of buckets."""
    torch.manual_seed(0)
    model = Qwen2(replace(loaded[0].config, n_layer=1)).eval()
    idx = torch.randint(0, 300, (2, 150))
    for bucket in (5, 24, 256):
        cache, at, sizes = KVCache(model, 2, max_len=24, bucket=bucket), 0, [11, 1, 7, 1, 3, 10] * 4
        with torch.inference_mode():
            for T in sizes:
                cache.drop(max(0, cache.len + T - 20))
                logits = model(idx[:, at:at + T], kv_cache=cache)
                at += T
                # positions from 0: a score depends on distances only
                expected = model(idx[:, at - cache.len:at])[:, -1]
                torch.testing.assert_close(logits[:, -1], expected, atol=1e-5, rtol=1e-4)
        assert at == 132 and cache.len == 20 and cache.n_slot == 24


def test_buckets_change_nothing(loaded, users):
    whole = talk(loaded, users, 6)[1]
    duplex = Duplex(loaded[0], loaded[1], loaded[2], 3)
    duplex.cache = KVCache(duplex.model, 3, duplex.cache.max_len, bucket=16)
    slots = []
    for c in range(6):
        duplex.step(users[:, c * 10:c * 10 + 10])
        slots.append(duplex.cache.n_slot)
    assert torch.equal(torch.cat(duplex.ids, 1), whole) and slots == [32, 48, 80, 96, 112, 144]


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason='this CPU multiplies no '
                                                                             'bfloat16')
def test_packed_layers_equal_plain_ones(loaded, users):
    """In bfloat16 (8 bits, 0.4 %) the layers are stored otherwise and say the same; what is said by both is
    much the same."""
    model, idx = Qwen2(loaded[0].config), torch.randint(0, 300, (2, 11))
    for block in model.model.layers:
        torch.nn.init.normal_(block.self_attn.qkv_proj.bias)
    packed, plain = (for_decoding(model, torch.bfloat16, linear) for linear in (Packed, None))
    with torch.inference_mode():
        for T in (1, 3, 11):
            torch.testing.assert_close(packed(idx[:, :T]), plain(idx[:, :T]), atol=2e-2, rtol=2e-2)
    duplex = Duplex(*loaded[:3], 3, dtype=torch.bfloat16)
    assert isinstance(duplex.model.model.layers[0].mlp.down_proj, Packed) and isinstance(
        duplex.heads['text'].linear, Packed)
    codes = talk(loaded, users, dtype=torch.bfloat16)[1] == talk(loaded, users)[1]
    assert codes.float().mean() > 0.5


needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason='this CPU has no AVX-512 VNNI')


@needs_vnni
def test_int8_rounds_each_row_by_itself():
    """127 ths of the largest in a row: (127, 1) @ (254, 2) is exact, 0.4 of a 127th is gone. A row of zeros
    stays one, and the error of a row neither depends on the others nor exceeds what 8 bits twice explain: 1 /
    sqrt(12) of a step, about 1 %."""
    layer = Int8(torch.tensor([[254.0, 2.0], [0.0, 0.0]]), torch.tensor([0.5, 1.0]))
    x = torch.tensor([[127.0, 1.0], [127.0, 0.4], [0.0, 0.0]])
    assert layer(x).tolist() == [[127 * 254 + 2 + 0.5, 1.0], [127 * 254 + 0.5, 1.0], [0.5, 1.0]]
    torch.manual_seed(0)
    weight, x = torch.randn(60,
                            200), torch.randn(2, 5, 200) * torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0])[:, None]
    layer, exact = Int8(weight), x @ weight.T
    assert ((layer(x) - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 0.02
    assert torch.equal(layer(x)[:, 3:4], layer(x[:, 3:4]))


@needs_vnni
def test_int8_says_much_the_same(loaded, users):
    together = talk(loaded, users, dtype=torch.int8)[1]
    assert (together == talk(loaded, users)[1]).float().mean() > 0.5
    for row in range(3):
        assert torch.equal(talk(loaded, users[row:row + 1], dtype=torch.int8)[1][0], together[row])
    duplex = Duplex(*loaded[:3], 3, dtype=torch.int8)
    assert isinstance(duplex.model.model.layers[0].mlp.down_proj, Int8) and isinstance(
        duplex.heads['text'].linear, Int8)
    assert duplex.cache.keys[0].dtype == torch.bfloat16


def test_int8_needs_its_instructions(loaded, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_vnni_supported', lambda: False)
    with pytest.raises(ValueError, match='dtype int8 is for CPUs with AVX-512 VNNI'):
        Duplex(*loaded[:3], dtype=torch.int8)


@pytest.mark.slow
def test_compiled_equals_eager(loaded, users):
    """One graph, of a pass with one token, also does for the next bucket and after the ring's end."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    users = np.concatenate([users] * 3, 1)
    for temperature in (0.0, 1.0):
        settings = dict(max_context=300, speech_temperature=temperature, text_temperature=temperature)
        compiled = talk(loaded, users, 18, compile=True, **settings)[1]
        assert torch.equal(compiled, talk(loaded, users, 18, **settings)[1])
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


@pytest.mark.parametrize('name', ['duplex3', 'duplex2'])
def test_warm_up_knows_all_passes(loaded, name):
    """On a GPU each is captured before the conversation: here it is recorded what a conversation does. It
    goes past the ring's end, 9 chunks of 22 tokens in 100 slots."""
    model, vocab, *_ = loaded
    duplex = Duplex(model, vocab, get_layout(name), max_context=100)
    done = []

    def next_token(kind, ids, noise, real=duplex.next_token):
        done.append((kind, ids.shape[1], duplex.cache.n_slot))
        return real(kind, ids, noise)
    duplex.next_token = next_token
    for _ in range(9):
        duplex.step(np.zeros((1, 10)))
    planned = list(duplex.passes(9))
    assert planned == done and len(set(planned)) >= 7


def test_graphs_that_are_captured_after_users_left_have_a_pool_of_their_own(loaded, monkeypatch):
    """On a GPU a pool of graphs ends with the last graph in it. A capture into it is then an error."""
    monkeypatch.setattr(torch.cuda, 'graph_pool_handle', iter(range(9)).__next__)
    duplex = Duplex(*loaded[:3], 3)
    duplex.uses_graphs = True
    duplex.forget_graphs()
    pool, duplex.graphs['a shape'] = duplex.pool, 'a graph'
    duplex.keep(2)
    assert not duplex.graphs and duplex.pool != pool


@pytest.mark.slow
def test_compiled_users_leave(loaded):
    """40 users of 1 to 40 chunks leave at ten moments. Two graphs serve all: one for several, one for the
    last."""
    model, vocab, layout, _, _ = loaded
    users = [np.random.default_rng(n).integers(0, 32, 10 * n) for n in range(1, 41)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, _ = converse(model, vocab, layout, users, 0, max_context=110, compile=True)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2
    assert compiled == converse(model, vocab, layout, users, 0, max_context=110)[0]


@pytest.mark.slow
@pytest.mark.alone
def test_compiled_copies_no_cache(loaded, users):
    """A chunk does not take longer for a cache that could be longer: nothing copies what it does not read."""
    chunk_sec = []
    for max_context in (512, 65536):
        torch._dynamo.reset()
        duplex = Duplex(*loaded[:3], 3, max_context=max_context, compile=True)
        passed = []
        for c in range(6):
            start = time.perf_counter()
            duplex.step(users[:, c * 10:c * 10 + 10])
            passed.append(time.perf_counter() - start)
        chunk_sec.append(min(passed))
    assert chunk_sec[1] < 4 * chunk_sec[0], chunk_sec


def test_duplex2_speaks_without_text(loaded, users):
    steps, ids = talk(loaded, users, layout=get_layout('duplex2'))
    assert ids.shape == (3, 80) and all(text.shape == (3, 0) for text, _ in steps)


def test_refused(loaded, users):
    model, vocab, layout, _, _ = loaded
    duplex = Duplex(model, vocab, layout, 3)
    for chunk in (users[:, :9], users[:, :10] + 32, users[:, :10] - 40):
        with pytest.raises(ValueError, match='a chunk is 10 codes from 0 to 31 for each of 3 users'):
            duplex.step(chunk)
    with pytest.raises(ValueError, match='layout asr has no chunks'):
        Duplex(model, vocab, get_layout('asr'))
    with pytest.raises(ValueError, match='max_context 30'):
        Duplex(model, vocab, layout, max_context=30)


def test_conversations_of_unequal_length(loaded):
    model, vocab, layout, codec, dialogues = loaded
    users = [dialogues[i]['user'] for i in range(3)]
    together, chunk_sec = converse(model, vocab, layout, users, 0)
    for codes, dialogue in zip(users, together):
        assert dialogue == converse(model, vocab, layout, [codes], 0)[0][0]
        assert dialogue['user'] == codes.tolist()       # up to the last frame, and no further
    assert len(chunk_sec) == max(-(-len(codes) // 10) for codes in users)


def test_who_has_ended_leaves(loaded, monkeypatch):
    """Six users of 1 to 9 chunks, in no order: each hears what they would hear alone, and rows are decoded
    about as long as needed."""
    model, vocab, layout, codec, _ = loaded
    lengths, n_row = [15, 90, 4, 52, 88, 30], []
    users = [np.random.default_rng(n).integers(0, 32, n) for n in lengths]
    # never silent, so that nothing is cut off unseen
    talkative = dict(sampling=Sampling(silence_bias=-1e6, text_weight=1e-30))
    alone = [converse(model, vocab, layout, [codes], 0, **talkative)[0][0] for codes in users]
    step = Duplex.step
    monkeypatch.setattr(Duplex, 'step', lambda self, codes: (n_row.append(self.n_row), step(self, codes))[1])
    assert converse(model, vocab, layout, users, 0, **talkative)[0] == alone
    assert n_row == [6, 6, 4, 3, 3, 3, 2, 2, 2]     # wanted: 6, 5, 4, 3, 3, 3, 2, 2, 2


# ------------------------------------------------------------------------------------------------------------
# the command

def test_a_file_gets_its_answer(small_run, tmp_path, run):
    """Stereo 44.1 kHz in, user on channel 1; out come a stereo wav, the user left as they were, and a
    transcript."""
    wave = np.stack([np.zeros(66150, np.float32), hum(200, 1.5, 44100)], 1)
    write_audio(str(tmp_path / 'question.wav'), wave, 44100)
    out = run('sample.py', f'--checkpoint={small_run[1]}', f'--user={tmp_path}/question.wav',
              '--user_channel=1', f'--out={tmp_path}/out', '--silence_bias=-1e6', '--reply_sec=1').stdout
    decoded, rate = soundfile.read(tmp_path / 'out' / 'question.wav')
    assert rate == 16000 and decoded.shape == (63 * 640, 2)     # 2.5 s are 62.5 frames
    assert np.corrcoef(decoded[:24000, 0], hum(200, 1.5))[0, 1] > 0.98 and np.abs(decoded[:, 1]).max() > 0
    turns = [json.loads(line) for line in open(tmp_path / 'out' / 'question.jsonl')]
    assert {turn['role'] for turn in turns} == {'user', 'assistant'} and all(
        0 <= t['start_sec'] < t['end_sec'] <= 2.52 for t in turns)
    assert 'real-time factor' in out and 'chunk 400 ms' in out


def test_a_split_is_listened_to(small_run, tmp_path, run):
    data, checkpoint = small_run
    run('sample.py', f'--checkpoint={checkpoint}', f'--data={data}', '--n_dialogue=3', f'--out={tmp_path}')
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f'd{i}.{kind}' for i in range(3) for kind in ('jsonl', 'wav')] + ['report.html']


@pytest.fixture
def broken(small_run, tmp_path):
    """Copies of the run in which something is wrong, and what is said of it."""
    data, checkpoint = small_run
    folders = {name: tmp_path / name for name in ('other_vocabulary', 'other_codec', 'empty', 'foreign')}
    for name in ('other_vocabulary', 'foreign'):
        shutil.copytree(checkpoint, folders[name])
        (folders[name] / 'manifest.json').unlink()
    weights = load_file(folders['other_vocabulary'] / 'model.safetensors')
    weights['model.embed_tokens.weight'] = weights['model.embed_tokens.weight'][:256].clone()
    save_file(weights, folders['other_vocabulary'] / 'model.safetensors', {'format': 'pt'})
    for name, change in (('other_vocabulary', dict(vocab_size=256)), ('foreign', dict(nanoduplex=None))):
        path = folders[name] / 'config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    folders['empty'].mkdir()
    shutil.copytree(data, folders['other_codec'])
    save_dialogues(str(folders['other_codec'] / 'test.arrow'), make_dialogues(2), CODEC)
    write_audio(str(tmp_path / 'a.wav'), hum(200, 1), 16000)
    soundfile.write(tmp_path / 'six.wav', np.zeros((800, 6)), 16000)
    return folders


@pytest.mark.parametrize('arguments, message', [
    ('--checkpoint={empty} --user={a}', 'is no checkpoint: it has no config.json'),
    ('--checkpoint={foreign} --user={a}', 'has no entry "nanoduplex"'),
    ('--checkpoint={other_vocabulary} --user={a}', 'the checkpoint is of another vocabulary'),
    ('--checkpoint={good} --data={other_codec}', 'was made with codec toy 0123456789abcdef'),
    ('--checkpoint={good} --data={empty}', 'holds no test.arrow'),
    ('--checkpoint={good} --data={data} --split=tset', 'holds no tset.arrow'),
    ('--checkpoint={good} --user={six}', 'has 6 channels'),
    ('--checkpoint={good} --user={a} --device=cpu --compile=true', 'compile is for a GPU'),
    ('--checkpoint={good}', 'give --user=FILE.wav or --data=FOLDER'),
    ('--checkpoint={good} --user={a} --temprature=1', "no setting 'temprature'"),
])
def test_bad_input(broken, small_run, tmp_path, arguments, message):
    names = dict(broken, good=small_run[1], data=small_run[0], a=tmp_path / 'a.wav', six=tmp_path / 'six.wav')
    with pytest.raises((ValueError, SystemExit)) as error:
        sample.main(config.load(sample.Config, [*arguments.format(**names).split(), f'--out={tmp_path}/out']))
    assert message in str(error.value) and '\n' not in str(error.value) and not (tmp_path / 'out').exists()


def test_bad_input_in_the_shell(broken, run):
    result = run('sample.py', f'--checkpoint={broken["empty"]}', '--user=a.wav', fails=True)
    assert result.stderr.count('\n') == 1 and 'is no checkpoint' in result.stderr
