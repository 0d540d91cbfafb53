"""CosyVoice's tokens by real ONNX files of random weights, and a program that stands in for CosyVoice."""
import functools
import hashlib
import json
import math
import os
import shlex
import shutil
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, make_dialogues

import sample
import train
from codec import load_codec
from codec.s3 import VARIANTS, S3Codec, import_s3tokenizer
from codec.worker import Worker
from data.dialogues import save_dialogues
from data.made_up import hum

CLASSES = {'v1': 'S3Tokenizer', 'v2': 'S3TokenizerV2', 'v3': 'S3TokenizerV3'}
# what the published files call weight and bias of the two convolutions
CONVS = {
    'v1_50hz': ('onnx::Conv_1519', 'onnx::Conv_1520', 'onnx::Conv_1521', 'onnx::Conv_1522'),
    'v1_25hz': ('encoders.conv1.weight', 'encoders.conv1.bias',
                'encoders.conv2.weight', 'encoders.conv2.bias'),
    'v2_25hz': ('onnx::Conv_2216', 'onnx::Conv_2217', 'onnx::Conv_2218', 'onnx::Conv_2219'),
    'v3_25hz': ('conv1.weight', 'conv1.bias', 'conv2.weight', 'conv2.bias'),
}


@pytest.fixture(scope='module')
def s3tokenizer():
    try:
        return import_s3tokenizer()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope='module')
def small(s3tokenizer):
    """Makes s3tokenizer's encoders tiny; all else stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        for name in CLASSES.values():
            config = getattr(s3tokenizer, name).__init__.__defaults__[0]
            for key, value in dict(n_audio_state=64, n_audio_head=1, n_audio_layer=1).items():
                patch.setattr(config, key, value)
        yield s3tokenizer


@pytest.fixture(scope='module')
def codecs(small, tmp_path_factory):
    """variant: a codec of random weights; its folder and name would mislead s3tokenizer.load_model"""
    folder = tmp_path_factory.mktemp('v2')
    return {variant: make(small, folder / variant, variant) for variant in VARIANTS}


def write_onnx(s3tokenizer, variant, path, seed=0, leave_out=''):
    """
    Random weights of one of the four encoders, in nodes and initialisers named as in the published files.
    -> their SHA-256
    """
    import onnx
    from onnx import helper, numpy_helper
    torch.manual_seed(seed)
    model = getattr(s3tokenizer, CLASSES[variant[:2]])(VARIANTS[variant].model)
    state = model.state_dict()
    # the codes lie around what the encoder makes of noise: else one of them is always nearest
    if 'quantizer._codebook.embed' in state:
        with torch.no_grad():
            hidden, _ = model.encoder(torch.randn(1, 128, 2 * 1024), torch.tensor([2 * 1024]))
        hidden = torch.nn.functional.normalize(hidden[0], dim=-1)
        rows = hidden[torch.randint(len(hidden), (4096,))]
        state['quantizer._codebook.embed'] = rows + 0.3 * hidden.std(0) * torch.randn_like(rows)
    names, nodes, arrays = CONVS[variant], [], {}

    def add(op, name, *inputs, **attributes):
        nodes.append(helper.make_node(op, ['x', *(key for key, _ in inputs)], ['y'], name=name, **attributes))
        for key, value in inputs:
            is_matrix = value.ndim == 2 and key != 'encoders.positional_embedding'
            arrays[key] = (value.T.contiguous() if is_matrix else value).numpy()

    for i, conv in enumerate((model.encoder.conv1, model.encoder.conv2)):
        weight, bias = (state.pop(f'encoder.conv{i + 1}.{kind}') for kind in ('weight', 'bias'))
        add('Conv', f'/conv{i + 1}/Conv', (names[2 * i], weight), (names[2 * i + 1], bias),
            strides=list(conv.stride))
    for key, value in state.items():
        if leave_out and leave_out in key:
            continue
        module, kind = key.rsplit('.', 1)
        path_of = '/' + module.removeprefix('encoder.').replace('.', '/')
        path_of = path_of.replace('blocks/', 'blocks.').replace('/mlp/', '/mlp/mlp.')
        matmul = 'MatMul' if kind == 'weight' else 'Add'
        if key == 'encoder.positional_embedding':
            add('Add', '/Add', ('encoders.positional_embedding', value))
        elif key == 'quantizer._codebook.embed':
            add('Pow', '/quantizer/rq/model/layers.0/_codebook/Pow_1', ('embed', value))
        elif 'project_down' in key:
            add(matmul, '/quantizer/project_in/' + kind.replace('weight', 'MatMul'),
                ('onnx::MatMul_2536' if kind == 'weight' else 'quantizer.project_in.bias', value))
        elif 'fsmn' in key:
            add('Conv', path_of + '/Conv', (key.removeprefix('encoder.'), value), strides=[1])
        elif '_ln' in key and variant[:2] == 'v2':
            if kind == 'weight':
                add('LayerNormalization', path_of + '/LayerNormalization', (key, value),
                    (key[:-6] + 'bias', state[key[:-6] + 'bias']))
        elif '_ln' in key:
            add('Mul' if kind == 'weight' else 'Add', path_of + ('/Mul' if kind == 'weight' else '/Add_1'),
                (key, value))
        else:
            add(matmul, f'{path_of}/{matmul}', (key, value))
    weights = [numpy_helper.from_array(array, key) for key, array in arrays.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, 'g', [], [], weights)), str(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def sounds():
    """12 s of hums of changing pitch, and noise between them."""
    rng = np.random.default_rng(0)
    parts = []
    for i in range(12):
        parts += [hum(rng.uniform(80, 300), 0.7, seed=i), 0.02 * rng.standard_normal(4800)]
    return np.concatenate(parts)


def speech(n_sec, seed=0):
    return np.resize(np.roll(sounds(), 12345 * seed), round(n_sec * 16000)).astype(np.float32)


def make(s3tokenizer, folder, variant='v1_25hz', **options):
    folder.mkdir(exist_ok=True)
    path = folder / 'speech_tokenizer_v1.onnx'
    return S3Codec.create(str(path), variant, write_onnx(s3tokenizer, variant, path, **options))


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant(small, codecs, variant):
    """The weights of the file arrive, whatever its path; codes are as many as the duration says."""
    codec = codecs[variant]
    torch.manual_seed(0)
    fresh = getattr(small, CLASSES[variant[:2]])(VARIANTS[variant].model)
    for key, value in fresh.state_dict().items():
        assert key == 'quantizer._codebook.embed' or torch.equal(codec.model.state_dict()[key], value), key
    n_samples = (0, 1, 200, 319, 320, 321, 640, 641, 16000, 16001)
    encoded = codec.encode_many([speech(2)[:n_sample] for n_sample in n_samples])
    for n_sample, codes in zip(n_samples, encoded):
        assert codes.dtype == np.uint16 and (codes < codec.n_codes).all()
        assert len(codes) == math.ceil(n_sample * codec.rate_hz / 16000)
    assert len(set(codec.encode(speech(10)).tolist())) > 20


@pytest.mark.parametrize('variant, rate_hz, n_sec', [
    ('v1_25hz', 25, 65), ('v1_50hz', 50, 34), ('v3_25hz', 25, 34)])
def test_long_audio(codecs, variant, rate_hz, n_sec):
    """
    65 s are 1,625 codes at 25 Hz, those that s3tokenizer's own windows give; which lose some of 54 s, where
    ours do not.
    """
    codec, waves = codecs[variant], [speech(n_sec), speech(54)]
    ours = codec.encode_many(waves)
    assert [len(codes) for codes in ours] == [n_sec * rate_hz, 54 * rate_hz]
    theirs = []
    for wave in waves:
        mel = import_s3tokenizer().log_mel_spectrogram(torch.as_tensor(wave))
        theirs.append(codec.model.quantize(mel[None], torch.tensor([mel.shape[1]]))[0][0].numpy())
    assert len(theirs[0]) == len(ours[0]) and (ours[0] == theirs[0]).mean() > 0.999
    assert len(theirs[1]) < len(ours[1])


def check_batch(codec, waves):
    """Codes may differ where float noise decides; no more than 1 in 500."""
    for wave, together in zip(waves, codec.encode_many(waves)):
        alone = codec.encode(wave)
        n_code = math.ceil(len(wave) * codec.rate_hz / 16000)
        assert len(alone) == len(together) == n_code, codec.variant
        assert (alone != together).sum() <= 0.002 * len(alone), codec.variant


def test_the_batch_changes_nothing(codecs):
    for codec in codecs.values():
        check_batch(codec, [speech(n_sec, i) for i, n_sec in enumerate((1.0, 0.2, 5.77, 0, 2.99))])
    assert codec.encode_many([]) == []


@pytest.mark.slow
def test_longer_audio(codecs):
    lengths = 30, 30.01, 51.99, 52, 52.01, 55.97, 56, 56.01, 78.02, 82, 300
    for codec in codecs.values():
        check_batch(codec, [speech(n_sec, i) for i, n_sec in enumerate(lengths)])


def test_25_hz_weights_by_path(small, codecs):
    """
    The trap is there (s3tokenizer.load_model takes any path for that of the 50 Hz encoder), and is not
    fallen into.
    """
    codec, wave = codecs['v1_25hz'], speech(4.2)
    mel = small.log_mel_spectrogram(torch.as_tensor(wave))
    trap = small.S3Tokenizer(codec.checkpoint)
    trap.init_from_onnx(codec.checkpoint)
    assert trap.quantize(mel[None], torch.tensor([mel.shape[1]]))[1] == 210 and len(codec.encode(wave)) == 105
    # and in a folder called v2 it looks for another architecture
    with pytest.raises(Exception):      # noqa: B017
        small.load_model(codec.checkpoint)


def test_wrong_rate(small, tmp_path, monkeypatch):
    """
    Weights of 25 Hz fit the encoder of 50 Hz: the strides in the file tell; and what is encoded is counted
    all the same.
    """
    path = tmp_path / 'a.onnx'
    digest = write_onnx(small, 'v1_25hz', path)
    with pytest.raises(ValueError, match=r'a.onnx makes 25 codes a second, v1_50hz 50$'):
        S3Codec.create(str(path), 'v1_50hz', digest)
    monkeypatch.setitem(VARIANTS, 'v1_25hz', VARIANTS['v1_25hz']._replace(model='speech_tokenizer_v1'))
    with pytest.raises(ValueError, match=r'a.onnx made 50 codes of 1.00 s, v1_25hz makes 25$'):
        S3Codec('v1_25hz', digest, [0], str(path), '').encode(speech(1))


def test_only_the_very_file(small, tmp_path, monkeypatch):
    path = tmp_path / 'speech_tokenizer_v1.onnx'
    digest = write_onnx(small, 'v1_25hz', path)
    for variant, sha256 in ((None, None), ('v1_25hz', None), (None, digest), ('v1_25hz', '0' * 64)):
        with pytest.raises(ValueError, match=f'is none of v1_25hz, .* as published: .*--sha256={digest}$'):
            S3Codec.create(str(path), variant, sha256)
    codec = S3Codec.create(str(path), 'v1_25hz', digest)
    codec.save(tmp_path / 'codec')
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    message = 'speech_tokenizer_v1.onnx is not the file that codec.json was written with'
    for attempt in (load_codec(str(tmp_path)).encode, codec.__class__.load(tmp_path / 'codec').encode):
        with pytest.raises(ValueError, match=message):
            attempt(speech(1))
    cut = hashlib.sha256(whole[:-1000]).hexdigest()
    with pytest.raises(ValueError, match='speech_tokenizer_v1.onnx is no v1_25hz'):
        S3Codec.create(str(path), 'v1_25hz', cut)
    path.unlink()
    with pytest.raises(ValueError, match='^no file .*speech_tokenizer_v1.onnx'):
        load_codec(str(tmp_path)).encode(speech(1))
    path.write_bytes(whole)                     # and a published file needs no more than its name
    monkeypatch.setitem(VARIANTS, 'v1_25hz', VARIANTS['v1_25hz']._replace(sha256=digest))
    assert S3Codec.create(str(path)).variant == 'v1_25hz'
    with pytest.raises(ValueError, match='is v1_25hz, not v1_50hz'):
        S3Codec.create(str(path), 'v1_50hz')


@pytest.mark.parametrize('variant, other', [
    ('v1_25hz', 'v2_25hz'), ('v2_25hz', 'v1_25hz'), ('v3_25hz', 'v1_25hz'), ('v3_25hz', 'v2_25hz')])
def test_another_architecture(small, tmp_path, variant, other):
    """v3 is loaded by s3tokenizer with strict=False: it would run with what it was initialised with."""
    path = tmp_path / 'a.onnx'
    digest = write_onnx(small, other, path)
    with pytest.raises(ValueError, match=f'a.onnx is no {variant} ') as error:
        S3Codec.create(str(path), variant, digest)
    assert '\n' not in str(error.value)


def test_missing_weights(small, tmp_path):
    for variant, part in (
        ('v1_25hz', 'blocks.0.attn.query.weight'),
        ('v3_25hz', 'blocks.0.attn.query.weight'),
        ('v3_25hz', 'blocks.0.mlp.2.bias'),
    ):
        with pytest.raises(ValueError, match=f'is no {variant}'):
            make(small, tmp_path, variant, leave_out=part)
    make(small, tmp_path, 'v3_25hz', leave_out='attn_ln.bias')         # which is 0, then


def test_digests(s3tokenizer):
    for variant in VARIANTS.values():
        assert s3tokenizer._SHA256S[variant.model] == variant.sha256


def test_silence(codecs):
    """What digital silence mostly is comes first, then what quiet rooms are; what others found is added."""
    # v2's positions are relative: random weights of v1 never say the same thing twice
    codec = codecs['v2_25hz']
    silence = np.zeros(64000, np.float32)
    room = (10**(-65 / 20) * np.random.default_rng(5).standard_normal(64000)).astype(np.float32)
    known = codec.silence_codes.tolist()
    assert len(set(known)) == len(known) and known[-1] == 4218 and codec.encode(silence)[50] in known
    assert np.isin(codec.encode(room), known).mean() > 0.8
    assert np.isin(codec.encode(speech(8)), known).mean() < 0.3
    buzz = np.where(np.arange(64000) < 8000, np.arange(64000) * 150 / 16000 % 1 - 0.5, 0)
    assert known[0] in np.concatenate([codec.encode(silence + gain * buzz)[30:80] for gain in (0, 0.04, 0.4)])
    assert 2323 in codecs['v3_25hz'].silence_codes


def test_description_only(tmp_path):
    """Codes that were made elsewhere need no weights, nor s3tokenizer."""
    codec = S3Codec.create(variant='v1_50hz', silence_codes=[230, 440])
    codec.save(tmp_path)
    again = load_codec(str(tmp_path))
    assert again.describe() == codec.describe() == dict(
        name='s3', rate_hz=50.0, n_codes=4096, sample_rate=16000, fingerprint='23b5a723ed9143ae')
    assert again.silence_codes.tolist() == [230, 440] and again.silence_codes.dtype == np.uint16
    with pytest.raises(ValueError, match='only describes v1_50hz; to encode, it needs the weights'):
        again.encode(speech(1))
    with pytest.raises(ValueError, match='without --checkpoint'):
        S3Codec.create(variant='v1_50hz')
    with pytest.raises(ValueError, match='there is no code 4096'):
        S3Codec.create(variant='v1_50hz', silence_codes=[4096])
    with pytest.raises(ValueError, match='there is no variant v9'):
        S3Codec.create(variant='v9', silence_codes=[1])
    settings = json.loads((tmp_path / 'codec.json').read_text())
    (tmp_path / 'codec.json').write_text(json.dumps(settings | {'variant': 'v9'}))
    with pytest.raises(ValueError, match='there is no variant v9'):
        load_codec(str(tmp_path))


def test_torchaudio_is_left_alone(s3tokenizer, tmp_path, monkeypatch):
    """A broken one is stood in for while s3tokenizer is imported and no longer; a working one is used."""
    for text, there in (("raise OSError('libc10_cuda.so: cannot open shared object file')", False),
                        ('real = True', True)):
        for name in [name for name in sys.modules if name.split('.')[0] in ('s3tokenizer', 'torchaudio')]:
            monkeypatch.delitem(sys.modules, name)
        (tmp_path / 'torchaudio.py').write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(sys, 'dont_write_bytecode', True)       # both texts may have one time stamp
        module = import_s3tokenizer()
        assert ('torchaudio' in sys.modules) == there and hasattr(module.utils.torchaudio, 'real') == there
    sys.modules.pop('torchaudio')


STAND_IN = '''
import json, sys, wave
import struct, math
say = lambda answer: print(json.dumps(answer), flush=True)
say({'ready': True})
sessions = {}       # name: codes, samples that were said
for line in sys.stdin:
    request = json.loads(line)
    print('noise on stderr' * 1000, file=sys.stderr)
    if request.get('text') == 'die':
        sys.exit('out of memory')
    if request.get('voice') == 'nobody':
        say({'error': 'no voice nobody'})
        continue
    n_code, first = sessions.get(request.get('session'), (0, 0))
    n_code += len(request.get('codes', ()))
    # the last 20 codes of a stream are held back, as CosyVoice 1 does
    n_sec = max(0, n_code - 20 * (not request.get('last', True))) / RATE
    n = int((n_sec if 'codes' in request else 0.1 * len(request['text'])) * 22050)
    n = max(first, n - 200 * request.get('last', True))
    samples = [int(9000 * math.sin(2 * math.pi * 220 * i / 22050)) for i in range(first, n)]
    sessions[request.get('session')] = (n_code, n) if 'session' in request else (0, 0)
    n = len(samples)
    with wave.open(request['out'], 'wb') as f:
        f.setparams((1, 2, 22050, n, 'NONE', ''))
        f.writeframes(struct.pack(f'<{n}h', *samples))
    say({'ok': True})
'''


@pytest.fixture
def stand_in(tmp_path):
    """A command that keeps CosyVoice's part of the contract, with sine waves."""
    def command(rate_hz=25):
        (tmp_path / 'a worker.py').write_text(STAND_IN.replace('RATE', str(rate_hz)))
        return f'{shlex.quote(sys.executable)} -S "{tmp_path}/a worker.py"'
    return command


def test_decode(tmp_path, stand_in, monkeypatch):
    """As long as the codes say, to the sample; a vocoder of another rate is found out."""
    monkeypatch.delenv('NANODUPLEX_VOCODER', raising=False)
    codec = S3Codec.create(variant='v1_25hz', silence_codes=[7], vocoder=stand_in())
    codec.save(tmp_path)
    codec = load_codec(str(tmp_path))
    for n in (50, 1, 0, 101):
        wave = codec.decode(np.arange(n, dtype=np.uint16))
        assert wave.dtype == np.float32 and wave.shape == (n * 640,)
    spectrum = np.abs(np.fft.rfft(codec.decode(np.arange(100))))
    assert spectrum.argmax() / 4 == pytest.approx(220, abs=1)
    codec.worker.close()
    monkeypatch.setenv('NANODUPLEX_VOCODER', stand_in(50))
    with pytest.raises(ValueError, match='made 0.99 s of 2.00 s of codes: is its model for v1_25hz'):
        load_codec(str(tmp_path)).decode(np.arange(50))
    monkeypatch.setenv('NANODUPLEX_VOCODER', '')
    with pytest.raises(ValueError, match="--vocoder='COMMAND', or NANODUPLEX_VOCODER"):
        S3Codec.create(variant='v1_25hz', silence_codes=[7]).decode([1])


def test_speak(stand_in, monkeypatch):
    """Two turns at once by a worker's sessions, in pieces: the samples of decode, resampled without seams,
    and the first ones early."""
    monkeypatch.delenv('NANODUPLEX_VOCODER', raising=False)
    codec = S3Codec.create(variant='v1_25hz', silence_codes=[7], vocoder=stand_in())
    codes, sizes = np.arange(75, dtype=np.uint16), (30, 0, 1, 10, 34)
    speakers, parts = [codec.speak(), codec.speak()], [[], []]
    for at, size in zip(np.cumsum((0, *sizes)), sizes):
        for speaker, part in zip(speakers, parts):
            part.append(speaker.push(codes[at:at + size]))
    assert 0.3 < len(parts[0][0]) / 16000 <= 0.4        # of 30 codes, 20 of which are held back
    for speaker, part in zip(speakers, parts):
        wave = np.concatenate([*part, speaker.finish()])
        assert wave.shape == (75 * 640,) and wave.dtype == np.float32
        # but for the filter's own end, of which a stream knows as little as the whole
        assert np.abs(wave - codec.decode(codes))[:-300].max() < 1e-3
    empty = codec.speak()
    assert len(empty.push(codes[:0])) == len(empty.finish()) == 0
    codec.worker.close()
    codec = S3Codec.create(variant='v1_25hz', silence_codes=[7], vocoder=stand_in(50))
    speaker = codec.speak()
    speaker.push(codes)
    with pytest.raises(ValueError, match='made 1.49 s of 3.00 s of codes: is its model for v1_25hz'):
        speaker.finish()


def test_from_codes_to_a_conversation(tmp_path, small_tokenizer, stand_in, monkeypatch):
    """
    SLAM-Omni's case: codes of 50 Hz and no encoder. They are trained on, chunks of 20 frames are 400 ms, and
    what the model says to a dialogue's user becomes audio by a vocoder that is given later.
    """
    monkeypatch.delenv('NANODUPLEX_VOCODER', raising=False)
    codec = S3Codec.create(variant='v1_50hz', silence_codes=[230, 440])
    for split in ('train', 'val', 'test'):
        save_dialogues(str(tmp_path / f'{split}.arrow'), make_dialogues(8), codec.describe())
    codec.save(tmp_path / 'codec')
    shutil.copytree(small_tokenizer, tmp_path / 'tokenizer')
    train.main(train.Config(
        data=str(tmp_path), out_dir=str(tmp_path / 'run'), stages='duplex3:2', speech_chunk=20, n_layer=1,
        n_head=2, n_kv_head=1, n_embd=32, n_inner=64, block_size=256, batch_size=1, batch_tokens=256,
        device='cpu', dtype='float32', tensorboard=False))
    cfg = sample.Config(checkpoint=str(tmp_path / 'run'), data=str(tmp_path), n_dialogue=2, device='cpu')
    with pytest.raises(ValueError, match='nothing is known that turns these codes into audio'):
        sample.main(cfg)
    monkeypatch.setenv('NANODUPLEX_VOCODER', stand_in(50))
    for dialogue in sample.main(cfg):
        wave, rate = soundfile.read(tmp_path / 'run' / 'samples' / f'{dialogue["id"]}.wav')
        assert rate == 16000 and wave.shape == (len(dialogue['user']) * 320, 2)
        assert np.abs(wave[:, 0]).max() > 0.1


def test_worker(tmp_path, stand_in):
    worker = Worker(stand_in(100000))
    out = str(tmp_path / 'a.wav')
    assert worker.ask(text='Hello.', voice='anna', out=out) == {'ok': True}
    assert soundfile.info(out).duration == pytest.approx(0.6, abs=0.02)
    with pytest.raises(ValueError, match='a worker.py": no voice nobody$'):
        worker.ask(text='Hello.', voice='nobody', out=out)
    # more than a pipe holds; and the error was not the end
    assert worker.ask(codes=list(range(100000)), out=out) == {'ok': True}
    message = 'a worker.py" has ended with code 1; its last lines: .*out of memory$'
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            worker.ask(text='die', out=out)


def test_a_worker_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(Worker, 'answer_sec', 0.2)
    with pytest.raises(ValueError, match="sleep 60 has not answered for 0.2 s, and was ended"):
        Worker('sleep 60')


@pytest.mark.parametrize('command, message', [
    ('/no/such/python worker.py', "cannot start '/no/such/python worker.py': .*No such file"),
    ('python "worker.py', 'No closing quotation'),
    ('echo loading model', "said b'loading model.*; nothing but JSON objects may go to its standard output"),
    ('sh -c "echo no GPU >&2; exit 3"', 'has ended with code 3; its last lines: no GPU$'),
])
def test_no_worker(command, message):
    with pytest.raises(ValueError, match=message):
        Worker(command)


COSYVOICE = '''
import os, threading, time, torch
print('CosyVoice likes to talk')
os.system('echo and so do the programs it calls')

class Frontend:
    device = 'cpu'
    def __init__(self):
        self.spk2info = {'anna': {'embedding': torch.ones(1, 192)}}
    def feat_extractor(self, speech):
        return torch.zeros(1, 80, speech.shape[1] // 256)
    def _extract_speech_feat(self, wav):
        assert False, 'reads at 24 kHz'

class Model:
    token_min_hop_len, token_overlap_len = 50, 20
    def __init__(self):
        self.tts_speech_token_dict, self.llm_end_dict = {}, {}
    def vc_job(self, source_speech_token, uuid):
        self.tts_speech_token_dict[uuid] = source_speech_token.flatten().tolist()
        self.llm_end_dict[uuid] = True
    def tts(self, text=torch.zeros(1, 0), flow_embedding=torch.zeros(0, 192), llm_embedding=None,
            prompt_text=None, llm_prompt_speech_token=None,
            flow_prompt_speech_token=torch.zeros(1, 0, dtype=torch.int32),
            prompt_speech_feat=torch.zeros(1, 0, 80),
            source_speech_token=torch.zeros(1, 0, dtype=torch.int32), stream=False, speed=1.0, **kwargs):
        print('rtf 0.1')
        assert source_speech_token.dtype == torch.int32 and flow_embedding.shape == (1, 192)
        assert prompt_speech_feat.shape[1] in (0, 22050 // 256), prompt_speech_feat.shape
        uuid, at = object(), 0
        self.tts_speech_token_dict[uuid], self.llm_end_dict[uuid] = [], False
        thread = threading.Thread(target=self.vc_job, args=(source_speech_token, uuid))
        thread.start()
        hop, hear = self.token_min_hop_len, self.token_min_hop_len + self.token_overlap_len
        while stream:
            time.sleep(0.01)
            codes = self.tts_speech_token_dict[uuid]
            if len(codes) - at >= hear:
                yield {'tts_speech': say(codes[at:at + hop])}
                at += hop
            if self.llm_end_dict[uuid] and len(codes) - at < hear:
                break
        thread.join()
        yield {'tts_speech': say(self.tts_speech_token_dict[uuid][at:])}

def say(codes):
    return torch.tensor(codes)[None].repeat_interleave(882, 1) / 100 + 1e-3 * torch.rand(1, 882 * len(codes))

class CosyVoice:
    sample_rate = 22050
    def __init__(self, model_dir):
        self.frontend, self.model = Frontend(), Model()
    def list_available_spks(self):
        return list(self.frontend.spk2info)
    def add_zero_shot_spk(self, prompt_text, prompt_wav, zero_shot_spk_id):
        feat, n = self.frontend._extract_speech_feat(prompt_wav)
        self.frontend.spk2info[zero_shot_spk_id] = dict(
            prompt_text=prompt_text, flow_prompt_speech_token=torch.zeros(1, 25, dtype=torch.int32),
            prompt_speech_feat=feat, flow_embedding=torch.ones(1, 192), llm_embedding=torch.ones(1, 192))
        return True
    def inference_sft(self, tts_text, spk_id, stream=False, speed=1.0, text_frontend=True):
        for part in tts_text.split('.'):
            yield {'tts_speech': torch.zeros(1, 2205 * len(part))}
    def inference_zero_shot(self, tts_text, prompt_text, prompt_wav, zero_shot_spk_id='', stream=False,
                            speed=1.0, text_frontend=True):
        assert self.frontend.spk2info[zero_shot_spk_id]['prompt_text'] == 'what was said'
        yield {'tts_speech': torch.zeros(1, 2205 * len(tts_text))}

def AutoModel(**kwargs):
    return CosyVoice(**kwargs)
'''
FILE_UTILS = '''
import soundfile, torch
def load_wav(wav, target_sr, min_sr=16000):
    return torch.zeros(1, int(soundfile.info(wav).duration * target_sr))
'''


@pytest.mark.slow
def test_cosyvoice_worker(tmp_path, monkeypatch):
    """
    codec/cosyvoice_worker.py with a package that has CosyVoice's methods and prints as much: both requests,
    each kind of voice, errors.
    """
    for path, text in (('cli/cosyvoice.py', COSYVOICE), ('utils/file_utils.py', FILE_UTILS)):
        path = tmp_path / 'cosyvoice' / path
        path.parent.mkdir(parents=True)
        path.write_text(text)
    soundfile.write(tmp_path / 'prompt.wav', hum(200, 1), 16000)
    (tmp_path / 'prompt.txt').write_text('what was said\n')
    command = (f'{sys.executable} {ROOT}/codec/cosyvoice_worker.py --model=x --checkout={tmp_path} '
               f'--voice={tmp_path}/prompt.wav')
    worker, out = Worker(command), str(tmp_path / 'out.wav')
    assert worker.ask(codes=list(range(25)), out=out) == {'ok': True, 'sample_rate': 22050, 'n_sample': 22050}
    first = soundfile.read(out)[0]
    worker.ask(codes=list(range(25)), out=out)
    assert (soundfile.read(out)[0] == first).all() and len(first) == 22050
    assert worker.ask(codes=[1, 2], voice='anna', out=out)['n_sample'] == 2 * 882
    assert worker.ask(text='abc.de', voice='anna', out=out)['n_sample'] == 5 * 2205
    assert worker.ask(text='abcde', out=out)['n_sample'] == 5 * 2205
    for request, message in (
        (dict(codes=[1], voice='nobody', out=out), "no voice 'nobody': it is neither a wav nor one of anna"),
        (dict(out=out), 'KeyError'),
        (dict(codes=[1], out=str(tmp_path / 'no' / 'a.wav')), 'a.wav'),
    ):
        with pytest.raises(ValueError, match=message):
            worker.ask(**request)
    worker.close()
    check_sessions(Worker(command + ' --hop=5'), tmp_path)
    monkeypatch.setenv('NANODUPLEX_VOCODER', command)
    assert S3Codec.create(variant='v1_25hz', silence_codes=[7]).decode([1] * 10).shape == (6400,)


def check_sessions(worker, tmp_path):
    """Two turns side by side: what CosyVoice's own streaming makes of codes that come bit by bit."""
    out, heard = str(tmp_path / 'part.wav'), {'a': [], 'b': []}

    def ask(name, codes, is_last=False, **request):
        worker.ask(session=name, codes=codes, last=is_last, out=out, **request)
        heard[name].append(soundfile.read(out)[0])
    for at in range(0, 40, 4):
        ask('a', list(range(at, at + 4)))
        ask('b', list(range(39 - at, 35 - at, -1)), voice='anna')
    while sum(map(len, heard['a'])) < 20 * 882:         # 40 codes less the 20 that are held back
        time.sleep(0.01)
        ask('a', [])
    for name, codes in ('a', range(40)), ('b', range(39, -1, -1)):
        ask(name, [], True)
        found = np.concatenate(heard[name]).reshape(-1, 882)
        assert (found.mean(1) * 100).round().tolist() == list(codes)
    for name in 'ab':                                   # a name may be used again; an error is said
        heard[name].clear()
        with pytest.raises(ValueError, match="no voice 'nobody'"):
            ask(name, [1], True, voice='nobody')
    ask('a', [7], True)
    assert len(heard['a'][0]) == 882
    worker.close()


def test_command_line(small, tmp_path, monkeypatch, capsys):
    from codec.__main__ import main
    path = tmp_path / 'speech_tokenizer_v1.onnx'
    digest = write_onnx(small, 'v1_25hz', path)

    def call(*arguments):
        monkeypatch.setattr(sys, 'argv', ['codec', 's3', *arguments])
        main()

    call(f'--checkpoint={path}', '--variant=v1_25hz', f'--sha256={digest}', f'--out={tmp_path}/s3',
         '--vocoder=x y')
    assert f'v1_25hz {digest[:16]}, ' in capsys.readouterr().out
    assert os.listdir(tmp_path / 's3') == ['codec.json']
    assert load_codec(str(tmp_path / 's3')).vocoder == 'x y'
    call('--variant=v1_50hz', '--silence_codes=230,440', f'--out={tmp_path}/slam')
    assert load_codec(str(tmp_path / 'slam')).silence_codes.tolist() == [230, 440]
    with pytest.raises(ValueError, match='no list such as'):
        call('--variant=v1_50hz', '--silence_codes=230, 440', f'--out={tmp_path}/x')


@pytest.mark.slow
@pytest.mark.parametrize('variant, n_secs', [('v1_25hz', (31, 4.2, 0.5)), ('v1_50hz', (31, 2.2, 0.5))])
def test_real_shape(s3tokenizer, tmp_path, monkeypatch, variant, n_secs):
    """Random weights of the real shape, 522 MB: digest, load, windows, batches."""
    for key, value in dict(n_audio_state=1280, n_audio_head=20, n_audio_layer=6).items():
        monkeypatch.setattr(s3tokenizer.S3Tokenizer.__init__.__defaults__[0], key, value)
    path = tmp_path / 'speech_tokenizer_v1.onnx'
    digest = write_onnx(s3tokenizer, variant, path)
    assert 490e6 < path.stat().st_size < 550e6
    codec = S3Codec(variant, digest, [0], str(path), '')
    waves = [speech(n_sec, i) for i, n_sec in enumerate(n_secs)]
    together = codec.encode_many(waves)
    n_codes = [math.ceil(len(wave) * codec.rate_hz / 16000) for wave in waves]
    assert [len(codes) for codes in together] == n_codes
    check_batch(codec, waves[1:])
    assert len(set(together[0].tolist())) > 100
