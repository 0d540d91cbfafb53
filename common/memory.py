"""What fits into the memory of a device."""
import os
import re
import resource
import sys
from bisect import bisect_left

import torch
import torch.distributed as dist

STATE_BYTES = 16        # a parameter: weight, gradient and AdamW's two moments, in fp32


def memory_bytes(device):
    """Of a GPU; of the whole machine for a CPU."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def peak_bytes(device):
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    # ru_maxrss is in KiB on Linux, in bytes on a Mac
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def check_memory(n_param, place, is_sharded):
    """-> bytes of weights, gradients and moments that each process will hold. Raises ValueError, with the
    setting that would help, where these alone are more than its device has."""
    whole, part = STATE_BYTES * n_param, STATE_BYTES * n_param // place.world_size
    needed, there = part if is_sharded else whole, memory_bytes(place.device)
    if needed <= there:
        return needed
    if not is_sharded and place.world_size > 1 and part <= there:
        advice = f'--shard=true makes it {part / 1e9:.0f} GB for each of {place.world_size} processes'
    else:
        advice = f'--shard=true splits them, over more than {whole / there:.0f} processes'
    raise ValueError(f'{n_param / 1e9:.1f} B parameters take {needed / 1e9:.0f} GB of weights, gradients and '
                     f'moments in each process, {place.device} has {there / 1e9:.0f} GB: {advice}')


def find_batch_size(model, cfg, place):
    """The most rows a micro-step that fit into memory, among the numbers that divide the step. Tried on the
    most expensive rows there are: one document each, all of it learned. A twentieth of the memory stays free,
    as memory that is given back in other pieces than it is wanted in cannot all be used."""
    device = place.device
    n_most = cfg.batch_tokens // (cfg.block_size * place.world_size)
    moments = torch.empty(2 * model.n_param(), device=device)       # AdamW will want them
    spare = 0 if device.type == 'cpu' else torch.cuda.mem_get_info(device)[1] // 20     # bytes
    spare = torch.empty(spare, dtype=torch.uint8, device=device)

    def fits(n_row):
        torch._dynamo.reset()   # flex_attention is compiled for eight shapes; the ninth would run unfused
        idx = torch.zeros(n_row, cfg.block_size, dtype=torch.int64, device=device)
        pos = torch.arange(cfg.block_size, device=device).expand_as(idx)
        learn = torch.arange(idx.numel(), device=device)
        weights = torch.ones(len(learn), device=device)
        try:
            with place.autocast():
                total, _ = model(idx, pos, idx, learn, idx.flatten(), weights)
            total.backward()
            return True
        except RuntimeError as error:   # cuBLAS, for one, has a way of its own to say torch.OutOfMemoryError
            if not re.search('out of memory|ALLOC_FAILED', str(error)):
                raise
            return False

    divisors = [n for n in range(1, n_most + 1) if n_most % n == 0]
    n_fit = bisect_left(divisors, True, key=lambda n_row: not fits(n_row))
    del moments, spare
    torch._dynamo.reset()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
    if place.world_size > 1:
        least = torch.tensor(n_fit, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        n_fit = int(least)
    if not n_fit:
        raise ValueError(f'not even one row of block_size={cfg.block_size} fits into the memory of {device}')
    return divisors[n_fit - 1]
