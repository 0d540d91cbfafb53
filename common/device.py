"""Where a process computes: on which device, in which numbers, and beside which other processes."""
import os
import socket
from contextlib import nullcontext
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

# dense bf16 FLOP/s from the datasheets, for MFU; other devices print none
PEAK_FLOPS = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12, 'L40S': 362e12, 'RTX 4090': 165e12}


def pick_device(name):
    """'auto' is a GPU if there is one. Raises ValueError for what this machine does not have."""
    kind = name if name != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.empty(0, device=kind).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'device {name!r} cannot be used here: ' + str(error).split('\n')[0])
    if device.type == 'cuda':
        torch.cuda.set_device(device)       # CUDA graphs are captured on the current one
        # for decoding's few queries with a mask cuDNN makes a plan for each shape, even while capturing
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def peak_flops(device):
    """-> the name of the GPU in PEAK_FLOPS and its FLOP/s; None, None for another device"""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    return next(((gpu, flops) for gpu, flops in PEAK_FLOPS.items() if gpu in name), (None, None))


def pick_dtype(name, device):
    """'auto' is bfloat16 where the hardware multiplies it, else float32; other names are torch's own."""
    if name != 'auto':
        return getattr(torch, name)
    if device.type == 'cuda':
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:   # a CPU without avx512_bf16 emulates bf16, more slowly than fp32
        has_bf16 = device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


class Place(NamedTuple):
    """The first process (rank 0) is the one that prints and writes."""
    device: torch.device
    dtype: torch.dtype = torch.float32      # of the matmuls
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0                     # among the processes of its node

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        is_plain = self.dtype == torch.float32
        return nullcontext() if is_plain else torch.autocast(self.device.type, self.dtype)

    def all_reduce(self, *tensors):
        """Sums each tensor over all processes, in place."""
        for tensor in tensors if self.world_size > 1 else ():
            dist.all_reduce(tensor)

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value):
        """-> [the value of each process]"""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensor, source):
        """-> the tensor of the process source, where it is on this process"""
        sent = tensor.to(self.device)
        dist.broadcast(sent, source)
        return sent.to(tensor.device)

    def check_equal(self, facts):
        """facts: {name: value}. Raises ValueError, on all processes, for the first that is not the same on
        all."""
        (first, first_host), *others = self.gather((facts, socket.gethostname()))
        for rank, (other, host) in enumerate(others, 1):
            for name in first:
                if other[name] != first[name]:
                    raise ValueError(f'{name}: {first[name]} on process 0 ({first_host}), {other[name]} on '
                                     f'process {rank} ({host}); all nodes need the same settings and files')


def join(device_name, dtype_name, timeout_sec=1800):
    """Joins the other processes, if torchrun started several -> Place. Of several on a machine each takes the
    GPU of its number. timeout_sec: how long one waits for the others before it ends. Raises ValueError for a
    GPU that all of them would take."""
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in (
        ('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    device = pick_device(device_name)
    if device.type == 'cuda':
        if world_size > 1:
            if ':' in device_name:
                raise ValueError(f'device {device_name!r}: {world_size} processes cannot share a GPU; with '
                                 "'cuda' each takes its own (CUDA_VISIBLE_DEVICES chooses among them)")
            device = torch.device('cuda', local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    if world_size > 1 and not dist.is_initialized():
        init_process_group('nccl' if device.type == 'cuda' else 'gloo', rank, world_size,
                           timedelta(seconds=timeout_sec))
    return Place(device, pick_dtype(dtype_name, device), rank, world_size, local_rank)


def init_process_group(backend, rank, world_size, timeout):
    """torch's own, but for a start after a fault: torchrun keeps its store, in which processes find the
    addresses that they had before the fault, and some would connect to these. So each start has keys of its
    own. (The agents of several nodes may count their starts differently; there all is as torch has it.)"""
    store, *_ = next(rendezvous('env://', rank, world_size, timeout=timeout))
    if os.environ.get('LOCAL_WORLD_SIZE') == str(world_size):
        store = dist.PrefixStore(f'start {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
