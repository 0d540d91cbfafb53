"""Google's speech embedding, which the demo's codec hears through: the published network's numbers."""
import numpy as np
import pytest
import torch

from codec.embedding import N_HOP, SpeechEmbedding
from codec.mel import TO_BANDS, TYPICAL, mel_filters


@pytest.fixture(scope='module')
def published():
    try:
        return SpeechEmbedding.pretrained()
    except ValueError as error:
        pytest.skip(str(error))


def test_the_published_network(published):
    """Numbers that onnxruntime 1.32 has behind the published network's fourth pooling: of the first row and
    the sixth, the two bands of a channel each."""
    wave = 2 + 2 * torch.sin(torch.arange(76 * 32) * 0.37).reshape(1, 76, 32)
    rows = published(wave)
    assert rows.shape == (1, 10, 192)
    assert rows[0, 0, :4].tolist() == pytest.approx([0.9022, -0.0526, 0.6473, -0.0109], abs=1e-3)
    assert rows[0, 5, :4].tolist() == pytest.approx([0.7945, -0.0460, -0.0429, 0.2574], abs=1e-3)


def test_it_hears_04_s_and_nothing_else():
    torch.manual_seed(0)
    drawn = SpeechEmbedding().fast()
    x = torch.randn(1, N_HOP + 40, 32)
    before = drawn(x)
    for hop in 0, 41, 79:
        other = x.clone()
        other[:, hop] += 1
        changed = (drawn(other) != before).any(2)[0]
        # row i is of hops 4 i to 4 i + 39
        assert changed.tolist() == [4 * i <= hop < 4 * i + N_HOP for i in range(11)]


def test_our_bands_in_place_of_its():
    """log10 of what its own filters make of a spectrum, from ours: to a decibel, where it is smooth."""
    hz = np.arange(257) * 31.25
    edge = np.linspace(0.9, 15 + 27 * np.log(3.8) / np.log(6.4), 34)      # Slaney's mel of 60 and 3,800 Hz
    edge = np.where(edge < 15, edge * 200 / 3, 1000 * np.exp((edge - 15) * np.log(6.4) / 27))
    low, center, high = edge[:-2], edge[1:-1], edge[2:]
    rise, fall = (hz[:, None] - low) / (center - low), (high - hz[:, None]) / (high - center)
    triangles = np.minimum(rise, fall).clip(0)
    for tilt in 0, -1, -2:
        power = 1e-3 * (hz + 100) ** tilt
        want = np.log10(power * 2 ** 30 * TYPICAL @ (triangles * 2 / (high - low))) + 2
        matrix, scale = TO_BANDS
        log_mel = (torch.from_numpy(power).float() @ mel_filters(16000)).log()
        assert np.abs((log_mel @ matrix + scale).numpy() - want).max() < 0.1


def test_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ValueError, match='pip install --no-deps openwakeword==0.4.0'):
        SpeechEmbedding.pretrained()
