"""Audio to codes and back, and files that are no audio."""
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from codec import load_codec
from codec.mel import MelCodec, evenly
from common.audio import read_audio, write_audio
from data.made_up import hum


def energy_db(wave):
    frames = np.pad(wave, (0, -len(wave) % 640)).reshape(-1, 640)
    return 10 * np.log10((frames ** 2).mean(1) + 1e-7)


def test_round_trip(small_codec):
    """A sound comes back as long as it was, as loud where it was loud, and mostly as the same codes."""
    wave = np.concatenate([hum(180, 1.0), np.zeros(8000, np.float32), hum(260, 0.8)])
    codes = small_codec.encode(wave)
    back = small_codec.decode(codes)
    assert len(codes) == -(-len(wave) // 640) and len(back) == len(codes) * 640
    assert np.corrcoef(energy_db(wave), energy_db(back))[0, 1] > 0.8
    assert (small_codec.encode(back) == codes).mean() > 0.5


def test_distances_tell_what_is_said():
    """Two things are said by many, who differ far more in one direction than in the other. As it comes, the
    nearest row often says something else; made even, it says the same."""
    rng = torch.Generator().manual_seed(0)
    label = torch.arange(400)[:, None] % 2
    z = torch.randn(400, 2, generator=rng) * torch.tensor([50.0, 0.1])      # who
    z[:, 1:] += label                                                       # what
    z = z @ torch.tensor([[0.8, 0.6], [-0.6, 0.8]])

    def right(z):
        far = torch.cdist(z, z) + 1e9 * torch.eye(400)
        return (label[far.argmin(1)] == label).float().mean()
    assert right(z) < 0.9 and right(z @ evenly(z, label)) > 0.98
    z = torch.randn(400, 3, generator=rng) @ torch.randn(3, 3, generator=rng) + 5 * label
    change = evenly(z, label)
    means = torch.stack([z[label[:, 0] == i].mean(0) for i in (0, 1)])
    within = torch.cov(((z - means[label[:, 0]]) @ change).T)
    assert torch.allclose(within, within[0, 0] * torch.eye(3), atol=1e-3 * float(within[0, 0]))
    assert (z @ change).std(0).norm() == pytest.approx(float(z.std(0).norm()), rel=1e-4)


@pytest.mark.parametrize('n_sample', [0, 1, 639, 640, 641, 16000])
def test_a_code_for_each_40_ms_begun(small_codec, n_sample):
    for wave in (np.zeros(n_sample, np.float32), hum(200, 2)[:n_sample]):
        codes = small_codec.encode(wave)
        assert codes.dtype == np.uint16 and len(codes) == -(-n_sample // 640)
        assert (codes < small_codec.n_codes).all()
        back = small_codec.decode(codes)
        assert len(back) == len(codes) * 640 and np.isfinite(back).all()


def test_codes_do_not_depend_on_gain(small_codec):
    """Of those who are louder than what the level begins with."""
    wave = 3 * np.concatenate([np.zeros(8000, np.float32), hum(180, 1.0)])
    assert (small_codec.encode(wave) == small_codec.encode(10 * wave)).mean() > 0.9


def test_silence_is_known(small_codec):
    noise = 1e-3 * np.random.default_rng(9).standard_normal(16000)
    codes = small_codec.encode(np.concatenate([noise, hum(220, 1.0)]).astype(np.float32))
    silent = np.isin(codes, small_codec.silence_codes)
    assert silent[:22].mean() > 0.9 and silent[30:45].mean() < 0.1
    assert np.isin(small_codec.encode(np.zeros(16000, np.float32)), small_codec.silence_codes).all()


def test_saved_and_loaded(small_codec, tmp_path):
    small_codec.save(tmp_path / 'codec')
    for folder in (tmp_path, tmp_path / 'codec'):       # a data folder or checkpoint, or the codec's own
        again = load_codec(str(folder))
        assert again.describe() == small_codec.describe()
        assert (again.encode(hum(180, 1)) == small_codec.encode(hum(180, 1))).all()
    settings = json.loads((tmp_path / 'codec' / 'codec.json').read_text())
    fewer = {name: x for name, x in small_codec.arrays.items() if name != 'network.first.bias'}
    shutil.copytree(tmp_path / 'codec', tmp_path / 'old')
    save_file(fewer, tmp_path / 'old' / 'codec.safetensors')
    with pytest.raises(ValueError, match='not the codec that this version makes .*first.bias'):
        MelCodec.load(tmp_path / 'old')
    (tmp_path / 'codec' / 'codec.json').write_text(json.dumps(dict(settings, fingerprint='0' * 16)))
    with pytest.raises(ValueError, match='codec.safetensors'):
        MelCodec.load(tmp_path / 'codec')
    with pytest.raises(ValueError, match='no codec in'):
        load_codec(str(tmp_path / 'nowhere'))


@pytest.mark.parametrize('rate', [8000, 16000, 44100, 48000])
def test_any_rate_and_channel(tmp_path, rate):
    wave = np.stack([hum(200, 0.5, rate), np.zeros(rate // 2, np.float32)], 1)
    path = str(tmp_path / 'a.wav')
    write_audio(path, wave, rate)
    assert len(read_audio(path, 16000, 0)) == pytest.approx(8000, abs=2)
    assert not read_audio(path, 16000, 1).any()
    assert not (tmp_path / 'a.wav.part').exists()


def bad_audio(folder):
    """name: (samples or bytes, what is said of it)"""
    nan = hum(200, 0.5)
    nan[4000] = np.nan
    return {
        'no.wav': (b'this is no wav', 'is not audio that can be read'),
        'empty.wav': (b'', 'is not audio that can be read'),
        'nan.wav': (nan, 'sample 4000, at 0.250 s, is nan'),
        'six.wav': (np.zeros((800, 6), np.float32),
                    "has 6 channels: say which is the user's, 0 to 5, with --user_channel"),
        'zero.wav': (np.zeros(0, np.float32), 'has no samples'),
        'missing.wav': (None, 'no file'),
    }


@pytest.mark.parametrize('name', bad_audio(None))
def test_bad_audio(tmp_path, name):
    content, message = bad_audio(tmp_path)[name]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, 16000, subtype='FLOAT')
    with pytest.raises(ValueError) as error:
        read_audio(str(path), 16000)
    said = str(error.value)
    assert said.startswith((str(path), 'no file')) and message in said and '\n' not in said


def test_channel_out_of_range(tmp_path):
    write_audio(str(tmp_path / 'a.wav'), np.zeros((800, 2), np.float32), 16000)
    with pytest.raises(ValueError, match='there is no channel 2'):
        read_audio(str(tmp_path / 'a.wav'), 16000, 2)


@pytest.mark.slow
def test_command_line(tmp_path, small_codec, run):
    small_codec.save(tmp_path / 'codec')
    write_audio(str(tmp_path / 'a.wav'), hum(200, 1.0), 16000)
    out = run('codec', 'encode', tmp_path / 'a.wav', f'--codec={tmp_path}').stdout
    assert len(json.loads(out)) == 25
    run('codec', 'decode', '-', f'--codec={tmp_path}', f'--out={tmp_path}/b.wav', input=out)
    assert soundfile.info(tmp_path / 'b.wav').frames == 16000
    bad = run('codec', 'decode', '-', f'--codec={tmp_path}', f'--out={tmp_path}/c.wav', input='[1, 99]',
              fails=True)
    assert bad.stderr == '-: code 99 at frame 1 is out of range, the codec has 0 to 31\n'
    assert not (tmp_path / 'c.wav').exists()
