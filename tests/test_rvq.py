"""SNAC, Mimi and DAC of random weights: the libraries' codes and sound, any length, files, ready codes."""
import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch

from codec import load_codec, rvq
from codec.rvq import Dac, Mimi, Snac
from common.levels import interleave, is_silent
from data import tokenise
from data.codes import prepare as codes
from data.dialogues import Dialogues
from data.made_up import hum

KINDS = dict(snac=Snac, mimi=Mimi, dac=Dac)
# as published; SNAC's from its config.json, the others are transformers' defaults but for what stands here
SNAC = dict(sampling_rate=24000, encoder_dim=48, encoder_rates=[2, 4, 8, 8], decoder_dim=1024,
            decoder_rates=[8, 8, 4, 2], attn_window_size=None, codebook_size=4096, codebook_dim=8,
            vq_strides=[4, 2, 1], noise=True, depthwise=True)
DAC = dict(sampling_rate=24000, downsampling_ratios=[2, 4, 5, 8], n_codebooks=32)
# strides and codebooks stay, layers become narrow
SMALL = dict(
    snac=dict(encoder_dim=8, decoder_dim=64),
    mimi=dict(num_filters=4, hidden_size=64, vector_quantization_hidden_dimension=32, codebook_dim=32,
              num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64,
              upsample_groups=64, layer_scale_initial_scale=1.0),
    dac=dict(encoder_hidden_size=8, decoder_hidden_size=64))


def write_checkpoint(kind, folder, changes, seed=0):
    """Random weights, as files that the libraries read. Fresh from their classes most sounds have the same
    codes, and far sounds do not matter: so SNAC's weights and Mimi's attention become larger, and Mimi's
    codebooks, which start as zeros, are drawn."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    if kind == 'snac':
        snac = pytest.importorskip('snac')
        settings = SNAC | changes
        model = snac.SNAC(**settings)
        with torch.no_grad():
            for name, weight in model.encoder.named_parameters():
                weight *= 3 if name.endswith('original0') else 1        # of weight norm: the length
        (folder / 'config.json').write_text(json.dumps(settings))
        torch.save(model.state_dict(), folder / 'pytorch_model.bin')
        return
    import transformers
    if kind == 'dac':
        transformers.DacModel(transformers.DacConfig(**DAC | changes)).save_pretrained(folder)
        return
    model = transformers.MimiModel(transformers.MimiConfig(**changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight *= 3 if 'self_attn' in name else 1
    for name, weight in model.named_buffers():
        if name.endswith('embed_sum'):
            weight.normal_()
        elif name.endswith('cluster_usage'):
            weight.fill_(1)
    model.save_pretrained(folder)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """kind -> a checkpoint's folder"""
    folder = tmp_path_factory.mktemp('checkpoints')
    for kind in KINDS:
        write_checkpoint(kind, folder / kind, SMALL[kind])
    return folder


@pytest.fixture(scope='module')
def codecs(folders):
    return {kind: KINDS[kind].create(str(folders / kind)) for kind in KINDS}


@pytest.fixture(params=KINDS)
def codec(request, codecs):
    return codecs[request.param]


def sound(n_sec, seed=0):
    rng, parts = np.random.default_rng(seed), []
    for i in range(int(n_sec * 4) + 1):
        parts += [hum(rng.uniform(80, 300), 0.2, 24000, seed=i), 0.03 * rng.standard_normal(1200)]
    return np.concatenate(parts)[:round(n_sec * 24000)].astype(np.float32)


@torch.inference_mode()
def theirs(codec, wave):
    """-> the codebooks and the sound that come of a wave in the library itself"""
    x = torch.as_tensor(wave)[None, None]
    if codec.name == 'snac':
        snac = pytest.importorskip('snac')
        model = snac.SNAC(**json.loads(open(f'{codec.checkpoint}/config.json').read())).eval()
        model.load_state_dict(torch.load(f'{codec.checkpoint}/pytorch_model.bin', weights_only=True))
        books = model.encode(x)
        with pytest.MonkeyPatch.context() as patch:     # its noise is ours: a fixed one, lest windows differ
            patch.setattr(torch, 'randn', lambda shape, **options: rvq.PlacedNoise.noise[:shape[-1]])
            return [book[0].numpy() for book in books], model.decode(books).numpy().reshape(-1)
    if codec.name == 'mimi':
        books = codec.model.encode(x, num_quantizers=8).audio_codes
        return books[0].numpy(), codec.model.decode(books).audio_values.numpy().reshape(-1)
    books = codec.model.encode(x, n_quantizers=2).audio_codes
    return books[0].numpy(), codec.model.decode(audio_codes=books).audio_values.numpy().reshape(-1)


SHAPES = dict(snac=((1, 2, 4), 4096, 2048), mimi=((1,) * 8, 2048, 1920), dac=((1, 1), 1024, 320))


def test_as_in_the_library(codec):
    """The same codes in our order, and of these the same sound."""
    levels, size, hop = SHAPES[codec.name]
    assert (codec.levels, codec.codebook_size, codec.hop) == (levels, size, hop)
    wave = sound(12 * hop / 24000)
    books, back = theirs(codec, wave)
    frames = codec.encode(wave)
    assert frames.tolist() == interleave(books, levels, size).tolist()
    assert len(np.unique(frames)) > 2 * sum(levels)                 # it was no constant
    ours = codec.decode(frames)
    assert np.array_equal(ours[:len(back)], back) and not ours[len(back):].any()
    assert len(ours) - len(back) in (0, 8)                          # which DAC leaves out


def test_a_frame_for_each_hop_begun(codec):
    n, size, hop = codec.codes_per_frame, codec.codebook_size, codec.hop
    for n_sample in (0, 1, hop - 1, hop, hop + 1, 5 * hop + 7):
        for wave in (sound(1)[:n_sample], np.zeros(n_sample)):
            frames = codec.encode(wave)
            assert frames.dtype == np.uint16 and frames.shape == (-(-n_sample // hop), n)
            assert (frames // size == np.arange(n)).all() and codec.n_codes == n * size
            back = codec.decode(frames)
            assert back.dtype == np.float32 and back.shape == (len(frames) * hop,) and np.isfinite(back).all()
    both = codec.encode_many([sound(0.5), sound(0.3, 1)])
    assert [frames.tolist() for frames in both] == [
        codec.encode(wave).tolist() for wave in (sound(0.5), sound(0.3, 1))]


def test_description(codec, codecs):
    levels, size, hop = SHAPES[codec.name]
    assert codec.describe() == dict(name=codec.name, rate_hz=24000 / hop, n_codes=sum(levels) * size,
                                    sample_rate=24000, fingerprint=codec.sha256[:16], levels=list(levels))
    assert json.loads(json.dumps(codec.describe())) == codec.describe()


@pytest.mark.slow
def test_long_audio_in_windows(codec, monkeypatch):
    """What a window reads before and after is enough: the codes are those of the whole. (Of Mimi this holds
    for one layer of its transformer, as here.)"""
    n_frame = 220 if codec.name == 'mimi' else 80
    wave = sound(n_frame * codec.hop / 24000)
    whole, back = codec.encode(wave), codec.decode(codec.encode(wave))
    monkeypatch.setattr(rvq, 'WINDOW_FRAMES', 33)
    # float noise decides where two codes are equally near
    assert (codec.encode(wave) == whole).mean() > 0.995
    assert np.abs(codec.decode(whole) - back).max() < 1e-3 * np.abs(back).max()
    monkeypatch.setattr(codec, 'before', 0)
    monkeypatch.setattr(codec, 'after', 0)
    assert (codec.encode(wave) == whole).mean() < 0.99


def test_saved_and_loaded(codec, folders, tmp_path):
    codec.save(tmp_path / 'codec')
    again = load_codec(str(tmp_path))
    assert type(again) is type(codec) and again.describe() == codec.describe() and again.model is None
    assert np.array_equal(again.silence_codes, codec.silence_codes) and again.silence_codes.dtype == np.uint16
    frames = codec.encode(sound(0.5))
    assert np.array_equal(again.encode(sound(0.5)), frames)
    # decoding draws no random number that anybody else would miss
    state = torch.get_rng_state()
    assert np.array_equal(again.decode(frames), codec.decode(frames))
    assert torch.equal(torch.get_rng_state(), state)

    # another checkpoint in the place of this one, and none
    shutil.copytree(folders / codec.name, tmp_path / 'moved')
    settings = json.loads((tmp_path / 'codec/codec.json').read_text())
    settings['checkpoint'] = str(tmp_path / 'moved')
    (tmp_path / 'codec/codec.json').write_text(json.dumps(settings))
    assert np.array_equal(load_codec(str(tmp_path)).encode(sound(0.5)), frames)
    path = rvq.weights_in(str(tmp_path / 'moved'))
    with open(path, 'ab') as file:
        file.write(b' ')
    with pytest.raises(ValueError, match='moved does not hold the weights that codec.json was written with'):
        load_codec(str(tmp_path)).encode(sound(0.5))
    shutil.rmtree(tmp_path / 'moved')
    with pytest.raises(ValueError, match='no weights in .*moved: it has neither model.safetensors nor'):
        load_codec(str(tmp_path)).decode(frames)


def test_silence(codec):
    """Digital silence is known wherever it stands, and nothing else is."""
    known = codec.silence_codes
    assert known.shape[1:] == (codec.codes_per_frame,) and len(np.unique(known, axis=0)) == len(known)
    zeros = codec.encode(np.zeros(24000))
    assert is_silent(zeros, known).all() and np.array_equal(zeros[len(zeros) // 2], known[0])
    assert is_silent(codec.encode(sound(1)), known).mean() < 0.2


def test_fewer_codebooks(folders, codecs, tmp_path):
    """One codebook is one code a frame, as of any other codec; the first codes are the same."""
    mimi = Mimi.create(str(folders / 'mimi'), 1)
    assert mimi.levels == (1,) and 'levels' not in mimi.describe() and mimi.n_codes == 2048
    wave, eight = sound(0.5), codecs['mimi']
    assert mimi.encode(wave).tolist() == eight.encode(wave)[:, 0].tolist() and mimi.silence_codes.ndim == 1
    assert mimi.decode(mimi.encode(wave)).shape == (7 * 1920,) and len(mimi.encode(wave[:0])) == 0
    assert Mimi.create(str(folders / 'mimi'), 32).n_codes == 2 ** 16
    for kind, n, message in (('mimi', 33, '--codebooks=33: mimi works with 1 to 32 of its codebooks'),
                             ('mimi', -1, '--codebooks=-1: mimi works with 1 to 32'),
                             ('snac', 2, '--codebooks=2: snac works with all 3 codebooks')):
        with pytest.raises(ValueError, match=message):
            KINDS[kind].create(str(folders / kind), n)
    write_checkpoint('dac', tmp_path / 'dac', SMALL['dac'] | dict(codebook_size=4096))
    with pytest.raises(ValueError, match='--codebooks=17 of 4096 codes are more than uint16 can number'):
        Dac.create(str(tmp_path / 'dac'), 17)


class Trap:

    def __reduce__(self):
        return print, ('the file was run',)


def test_what_is_no_checkpoint(folders, tmp_path, capsys, monkeypatch):
    def message(kind, folder):
        with pytest.raises(ValueError) as error:
            KINDS[kind].create(str(folder))
        assert '\n' not in str(error.value)
        return str(error.value)
    copy = tmp_path / 'copy'
    for kind in KINDS:
        assert 'no weights in' in message(kind, tmp_path)
        shutil.copytree(folders / kind, copy)
        path = rvq.weights_in(str(copy))
        content = open(path, 'rb').read()
        for part in (content[:len(content) // 2], b'', b'version https://git-lfs.github.com/spec/v1\n'):
            open(path, 'wb').write(part)
            assert f'{copy} is no ' in message(kind, copy) and 'that can be read' in message(kind, copy)
        (copy / 'config.json').unlink()
        assert 'config.json' in message(kind, copy)
        shutil.rmtree(copy)
    with monkeypatch.context() as patch:
        patch.setattr('transformers.__version__', '4.57.6')
        assert 'transformers 4.57.6 lets Mimi' in message('mimi', folders / 'mimi')
    assert 'is of a dac model, not of mimi' in message('mimi', folders / 'dac')
    assert 'is no SNAC that can be read' in message('snac', folders / 'dac')

    shutil.copytree(folders / 'snac', copy)
    (copy / 'pytorch_model.bin').write_bytes(pickle.dumps(Trap(), 2))
    assert 'is no SNAC that can be read' in message('snac', copy) and not capsys.readouterr().out
    write_checkpoint('snac', tmp_path / 'music', SMALL['snac'] | dict(attn_window_size=32))
    assert 'it has attention: take snac_24khz' in message('snac', tmp_path / 'music')
    # transformers would draw at random what is missing
    from safetensors.torch import load_file, save_file
    shutil.copytree(folders / 'mimi', tmp_path / 'part')
    path = str(tmp_path / 'part/model.safetensors')
    weights = load_file(path)
    some = {key: weight for key, weight in weights.items() if 'layers.0.self_attn.k_proj' not in key}
    save_file(some, path, {'format': 'pt'})
    assert 'is no mimi that can be read (it lacks ' in message('mimi', tmp_path / 'part')
    save_file(weights, path, {'format': 'pt'})
    Mimi.create(str(tmp_path / 'part'))


def test_command_line(codec, folders, tmp_path, monkeypatch, capsys):
    from codec.__main__ import main
    monkeypatch.setattr('signal.signal', lambda *_: None)     # a broken pipe would end later tests, too

    def call(*arguments):
        monkeypatch.setattr(sys, 'argv', ['codec', *map(str, arguments)])
        main()
        return capsys.readouterr().out
    made = call(codec.name, f'--checkpoint={folders / codec.name}', f'--out={tmp_path}/codec')
    assert f'{codec.rate_hz:g} frames a second of {codec.codes_per_frame} codes' in made
    soundfile.write(tmp_path / 'a.wav', sound(0.5), 24000, subtype='FLOAT')
    frames = json.loads(call('encode', tmp_path / 'a.wav', f'--codec={tmp_path}'))
    assert frames == codec.encode(sound(0.5)).tolist()
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(frames))
    call('decode', path, f'--codec={tmp_path}', f'--out={tmp_path}/b.wav')
    assert soundfile.info(tmp_path / 'b.wav').frames == len(frames) * codec.hop
    n, n_codes = codec.codes_per_frame, codec.n_codes
    for bad, message in (
        ([frames[0][:-1]], f'is no JSON list of frames of {n} codes'),
        (frames[0], f'is no JSON list of frames of {n} codes'),
        ([[0] * (n - 1) + [n_codes]], f'code {n_codes} at frame 0 is out of range, the codec has 0 to'),
        ([[0] * n], f'code 0 at frame 0, place 1: codes there are {codec.codebook_size} to'),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message):
            call('decode', path, f'--codec={tmp_path}', f'--out={tmp_path}/c.wav')


# ------------------------------------------------------------------------------------------------------------
# data folders

@pytest.fixture
def described(tmp_path):
    """Writes a codec folder that describes SNAC or Mimi, without weights; ready codes need none."""
    def described(kind):
        levels, size, hop = SHAPES[kind]
        silence = [[place * size + 7 for place in range(sum(levels))]]
        codec = KINDS[kind](str(tmp_path / 'none'), '0' * 64, 24000, 24000 / hop, levels, size, silence)
        codec.save(tmp_path / 'described')
        return codec
    return described


def records_of(folder):
    found = {}
    for split in ('train', 'val', 'test'):
        found |= {record['id']: record for record in Dialogues(str(folder), split)}
    return found


@pytest.mark.slow
def test_recordings_become_a_data_folder(codec, tmp_path, capsys):
    """Channels of frames, the shorter one filled up with silence; hours and gaps count frames, not codes."""
    codec.save(tmp_path / 'codec')
    args = tokenise.arguments('').parse_args([
        f'--out={tmp_path}/out', f'--codec={tmp_path}/codec', '--part=2', '--max_mismatch_sec=0.3'])
    ready = codec.encode(sound(0.5, 2))     # of whatever length, codes may come instead of audio

    def read(k, codec):
        turns = [dict(role='user', start_sec=0, end_sec=0.2, text='a'),
                 dict(role='assistant', start_sec=0.25, end_sec=0.4, text='b')]
        return tokenise.Recording(sound(0.7, k), ready, turns)
    tokenise.run({f'r{k}': k for k in range(3)}, read, args, {})
    records, n_frame = records_of(tmp_path / 'out'), -(-round(0.7 * 24000) // codec.hop)
    for k in range(3):
        record = records[f'r{k}']
        assert np.array_equal(record['user'], codec.encode(sound(0.7, k)))
        assert np.array_equal(record['assistant'][:len(ready)], ready)
        assert record['assistant'].shape == (n_frame, codec.codes_per_frame)
        assert is_silent(record['assistant'][len(ready):], codec.silence_codes[:1]).all()
    hours = 3 * n_frame / codec.rate_hz / 3600
    assert f'hours                          {round(hours, 4)}' in capsys.readouterr().out
    train = Dialogues(str(tmp_path / 'out'), 'train')
    assert train.codec == codec.describe() and train.codes_per_frame == codec.codes_per_frame
    assert [n.tolist() for n in train.n_frame] == [[n_frame]] * 2

    # the same command adds what could not be read before; the file of the rest is laid out and read again
    args.out, waves = str(tmp_path / 'again'), {}
    items = {'a': 0, 'b': 1, 'c': 2}

    def read_some(k, codec):
        if k not in waves:
            raise ValueError('not yet')
        return tokenise.Recording(None, waves[k], [])
    waves |= {0: sound(0.4), 1: sound(0.6)}
    tokenise.run(items, read_some, args, {})
    waves[2] = sound(0.3)
    tokenise.run(items, read_some, args, {})
    records = records_of(tmp_path / 'again')
    for k, id in enumerate(items):
        assert np.array_equal(records[id]['assistant'], codec.encode(waves[k]))
        assert len(records[id]['user']) == 0


def test_channels_of_another_shape(described):
    codec = described('snac')
    for channel, message in ((np.zeros(14, np.uint16), r'has shape \(14,\), no frames of 7 codes'),
                             (np.zeros((2, 6), np.uint16), r'has shape \(2, 6\), no frames of 7 codes'),
                             (np.zeros((2, 7), np.float32), r'has shape \(2, 7\), no samples in a row'),
                             (np.full((2, 7), 28672), 'has codes 28672 to 28672, codec snac has 0 to 28671')):
        with pytest.raises(ValueError, match=message):
            tokenise.fit(tokenise.Recording(None, channel, []), codec, 0.1)


def prepare_codes(monkeypatch, tmp_path, tokens, name='rows'):
    """-> (the assistant's codes of each row, or why it was skipped)"""
    path = tmp_path / f'{name}.jsonl'
    rows = [dict(target_token=each, target_text='Yes.') for each in tokens]
    path.write_text('\n'.join(map(json.dumps, rows)))
    monkeypatch.setattr(sys, 'argv', ['prepare.py', str(path), f'--out={tmp_path / name}', '--one_sided',
                                      f'--codec={tmp_path}/described'])
    codes.main()
    found = {id: record['assistant'] for id, record in records_of(tmp_path / name).items()}
    found |= tokenise.read_skipped(str(tmp_path / name / 'skipped.jsonl'))
    return [found[f'{name}.jsonl, row {n}'] for n in range(1, len(tokens) + 1)]


def test_ready_codes_in_any_form(described, monkeypatch, tmp_path):
    """By codebook, by frame and as a string of frames: the same two frames."""
    codec = described('snac')
    books = [[7, 9], [1, 2, 3, 4], [5, 6, 10, 11, 12, 13, 14, 15]]
    frames = [[7, 1, 5, 6, 2, 10, 11], [9, 3, 12, 13, 4, 14, 15]]
    text = ' '.join('# ' + ' '.join(map(str, frame)) for frame in frames)
    good = [books, [books], [[book] for book in books], frames, [frames], text]
    single = frames[:1]
    bad = [books[:2], [*books[:2], [5, 6, 10]], [*books[:2], [5, 6, 10, 11, 12, 13, 14, 4096]], frames[0],
           '7 1 5 6', '# 7 one', [frames[0], frames[1][:6]], [], {'a': 1}, [[1.5] * 7]]
    reasons = ['2 lists, neither 3 codebooks nor frames of 7 codes',
               'levels of unequal length: codebook 3 has 3 codes, 2 frames of 4 need 8',
               'codebook 3 has a code 4096, its codes are 0 to 4095',
               'is no list of codebooks, nor of frames', '1 lists, neither', 'invalid literal',
               '2 lists, neither', *['is no list of codebooks, nor of frames'] * 3]
    *found, one = prepare_codes(monkeypatch, tmp_path, [*good, *bad, single])
    want = interleave(books, codec.levels, 4096)
    for frames in found[:len(good)]:
        assert np.array_equal(frames, want)
    assert np.array_equal(one, want[:1])
    for n, (said, reason) in enumerate(zip(found[len(good):], reasons, strict=True), len(good) + 1):
        assert said.startswith(f'rows.jsonl, row {n}, has in target_token no codes of snac: ')
        assert reason in said

    # eight frames of Mimi could be its eight codebooks
    codec = described('mimi')
    square = np.arange(64).reshape(8, 8)
    text = ' '.join('# ' + ' '.join(map(str, frame)) for frame in square.tolist())
    said, frames = prepare_codes(monkeypatch, tmp_path, [square.tolist(), text], 'mimi')
    assert '8 lists of 8 can be codebooks and can be frames' in said
    assert np.array_equal(frames, square + np.arange(8) * 2048)


# ------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_full_size(kind, tmp_path):
    """Random weights of the real shape: 20, 79 and 75 million parameters; three seconds there and back."""
    write_checkpoint(kind, tmp_path / kind, {})
    codec = KINDS[kind].create(str(tmp_path / kind))
    assert sum(p.numel() for p in codec.model.parameters()) / 1e6 == pytest.approx(
        dict(snac=19.8, mimi=79.3, dac=74.7)[kind], abs=0.1)
    test_as_in_the_library(codec)
    frames = codec.encode(sound(3))
    assert len(frames) == -(-72000 // codec.hop) and codec.decode(frames).shape == (len(frames) * codec.hop,)
