"""
What people say, whoever says it, as numbers: the larger part of Google's speech embedding, a network of
convolutions that learned from the speech of many people to tell words (arXiv:2002.01322; Apache-2.0). Its
weights come with a version of openwakeword, a package on PyPI. They stay as they are here: the demo's codec
(mel.py) hears through them, and keeps a copy.

The last five of its 20 convolutions are left out. With them the numbers are of 0.76 s, which tell whole
words, and the codec misheard who pronounces them otherwise (docs/log.md, 2026-11-27).

pip install onnx; pip install --no-deps openwakeword==0.4.0
"""
import importlib.util
import os

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

N_BAND, LOW_HZ, HIGH_HZ = 32, 60.0, 3800.0
N_HOP = 40          # of 10 ms: what it hears at once


def slaney(hz):
    """Slaney's mel scale, of its bands: straight up to 1,000 Hz, then logarithmic"""
    hz = np.asarray(hz, dtype=np.float64)
    return np.where(hz < 1000, 3 * hz / 200, 15 + 27 * np.log(hz.clip(1000) / 1000) / np.log(6.4))


class Bend(nn.Module):
    def forward(self, x):
        return F.leaky_relu_(x, 0.2).clamp_(min=-0.4)


def across(n_in, n_out, *pool):
    """A convolution across the bands, then one along time"""
    # what is largest before it is bent is largest after it, and pooled there is less to bend
    return [nn.Conv2d(n_in, n_out, (1, 3), padding=(0, 1)), Bend(),
            nn.Conv2d(n_out, n_out, (3, 1)), *map(nn.MaxPool2d, pool), Bend()]


class SpeechEmbedding(nn.Module):
    """
    (n_clip, n_hop, 32), of each 10 ms and band log10 of the power, samples taken as 16-bit integers, and 2
    added -> (n_clip, (n_hop - 40) // 4 + 1, 192), a row each 40 ms
    """
    n_out = 2 * 96      # bands, channels

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(1, 24, 3, padding=(0, 1), bias=False), nn.ReLU(inplace=True),
                  nn.BatchNorm2d(24, eps=1e-3), Bend(), *across(24, 24, (2, 2))]
        for n_in, n_out, pool in (24, 48, (1, 2)), (48, 72, (2, 2)), (72, 96, (1, 2)):
            layers += [*across(n_in, n_out), *across(n_out, n_out, pool)]
        self.layers = nn.Sequential(*layers).eval()

    def forward(self, x):
        x = self.layers(x[:, None].contiguous(memory_format=torch.channels_last))
        return x.transpose(1, 2).flatten(2)     # before it (n_clip, channel, row, band)

    @classmethod
    def pretrained(cls):
        import onnx  # only who fits a codec needs it
        graph, self = onnx.load(find_weights()).graph, cls()
        arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
        learned = [torch.tensor(arrays[name]) for node in graph.node
                   if node.op_type in ('Conv', 'BatchNormalization') for name in node.input[1:]]
        names = [name for name in self.state_dict() if not name.endswith('num_batches_tracked')]
        assert len(names) < len(learned), (len(names), len(learned))     # of the last layers, too
        self.load_state_dict(dict(zip(names, learned)), strict=False)
        return self.fast()

    def fast(self):
        """To hear with: nothing is learned, and channels lie side by side in memory, as a CPU prefers"""
        return self.requires_grad_(False).to(memory_format=torch.channels_last)


def find_weights():
    """The file of the published weights"""
    package = importlib.util.find_spec('openwakeword')
    folder = package.submodule_search_locations[0] if package else ''
    path = os.path.join(folder, 'resources', 'models', 'embedding_model.onnx')
    if not os.path.exists(path):
        raise ValueError('the speech embedding is not installed; of its package only this version has the '
                         'weights: pip install --no-deps openwakeword==0.4.0')
    return path
