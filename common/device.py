"""Which device the tensors live on, and in which numbers it multiplies."""
import torch

# dense bf16 FLOP/s from the datasheets, for MFU; other devices print none
PEAK_FLOPS = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12, 'L40S': 362e12, 'RTX 4090': 165e12}


def pick_device(name):
    """'auto' is a GPU if there is one. Raises ValueError for what this machine does not have."""
    kind = name if name != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        return torch.empty(0, device=kind).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'device {name!r} cannot be used here: ' + str(error).split('\n')[0])


def pick_dtype(name, device):
    """'auto' is bfloat16 where the device multiplies it in hardware, else float32; other names are torch's
    own."""
    if name != 'auto':
        return getattr(torch, name)
    if device.type == 'cuda':
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # a CPU without avx512_bf16 emulates bf16, more slowly than fp32
    return torch.bfloat16 if device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported() else torch.float32
