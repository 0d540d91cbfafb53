"""Which device a process takes. There is no GPU here: torch's own answers are put in its place."""
import pytest
import torch

from common import device


@pytest.fixture
def four_gpus(monkeypatch):
    """-> the devices that were set"""
    taken = []
    monkeypatch.setattr(device, 'pick_device', lambda name: torch.device(name.replace('auto', 'cuda:0')))
    monkeypatch.setattr(torch.cuda, 'set_device', taken.append)
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda _: None)
    monkeypatch.setattr(device.dist, 'is_initialized', lambda: True)
    return taken


@pytest.mark.parametrize('name, n_process, expected', [
    ('cuda:1', 1, 'cuda:1'), ('auto', 1, 'cuda:0'), ('cuda', 4, 'cuda:3'), ('auto', 4, 'cuda:3')])
def test_a_process_takes_the_gpu_that_it_is_told(four_gpus, monkeypatch, name, n_process, expected):
    for key, value in dict(RANK=n_process - 1, LOCAL_RANK=n_process - 1, WORLD_SIZE=n_process).items():
        monkeypatch.setenv(key, str(value))
    assert device.join(name, 'float32').device == torch.device(expected)
    assert four_gpus == [torch.device(expected)]


def test_several_processes_do_not_take_one_gpu(four_gpus, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    with pytest.raises(ValueError, match="device 'cuda:1': 4 processes cannot share a GPU"):
        device.join('cuda:1', 'float32')
