"""
Training on several processes, each with a copy of the model or, by --shard=true, with a part of it.

    copies    each process: gradient of its own rows ─► sum over all processes ─► the same AdamW step in each
    shards    each process holds 1 / n of every weight, its gradient and moments. Before a block computes, its
              weights are gathered from all processes; afterwards they are freed. The gradient is summed, and
              each process keeps its part

A parameter takes 16 bytes: weight, gradient and AdamW's two moments in fp32. For Qwen2-0.5B that is 8 GB on
each GPU; for the 7.6 B parameters of Qwen2-7B it is 122 GB, more than a GPU has, or 15 GB on each of eight.
The sharding is torch's own: FSDP2 (torch.distributed.fsdp.fully_shard).

train.py uses Copies or Shards as `gradients`:

    for each micro-step: gradients.backward(loss, is_last)
    norm = gradients.finish(total_weight, grad_clip)        # now they are those of the mean over all tokens
    optimizer.step()
    gradients.zero()
"""
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass
class Bucket:
    """Gradients that are summed over all processes at once."""
    flat: torch.Tensor      # a slice of all gradients
    n_param: int
    n_complete: int = 0     # parameters whose gradient is complete in this step
    sent: torch.Tensor | None = None
    work: object = None     # to wait for


class Copies:
    """
    The gradients of a model that each process has a copy of. They are views of one flat fp32 tensor, to which
    the micro-steps of a step add, so nothing is copied before it is sent. (DDP copies into its buckets, and
    splits compiled graphs.)

    In the last micro-step a bucket is sent as soon as backward has completed its gradients, and travels while
    backward goes on with earlier blocks. Buckets are sent in the same order on all processes.
    reduce_dtype: of what is sent; bfloat16 halves the traffic and rounds the gradients to 8 bits.
    n_bucket: least number of gradients in a bucket; 2 ** 25 in fp32 are 134 MB
    """

    def __init__(self, model, place, reduce_dtype=torch.float32, n_bucket=2 ** 25):
        self.place, self.reduce_dtype, self.is_last = place, reduce_dtype, False
        self.flat = torch.zeros(model.n_param(), device=place.device)
        self.buckets = []       # in the order in which backward completes them: from the last parameter on
        start = end = len(self.flat)
        n_param = 0
        for p in reversed(list(model.parameters())):
            start, n_param = start - p.numel(), n_param + 1
            p.grad = self.flat[start:start + p.numel()].view_as(p)
            if place.world_size > 1:
                dist.broadcast(p.data, 0)       # all start alike, though random numbers or files may differ
                number = len(self.buckets)
                p.register_post_accumulate_grad_hook(lambda _, number=number: self.complete(number))
            if end - start >= n_bucket or start == 0:
                self.buckets.append(Bucket(self.flat[start:end], n_param))
                end, n_param = start, 0
        self.n_sent = 0

    def complete(self, number):
        """Called by backward when a gradient in this bucket is complete for the micro-step."""
        if self.is_last:
            self.buckets[number].n_complete += 1
            following = self.buckets[self.n_sent:]
            for _ in takewhile(lambda bucket: bucket.n_complete == bucket.n_param, following):
                self.send()

    def send(self):
        bucket = self.buckets[self.n_sent]
        bucket.sent = bucket.flat.to(self.reduce_dtype)     # the slice itself, if that is fp32
        bucket.work = dist.all_reduce(bucket.sent, async_op=True)
        self.n_sent += 1

    def backward(self, total, is_last):
        self.is_last = is_last and self.place.world_size > 1
        total.backward()

    def finish(self, total_weight, grad_clip):
        """total_weight: of this process's tokens in the loss -> the norm of the mean gradient, before it is
        clipped"""
        self.place.all_reduce(total_weight)
        while self.is_last and self.n_sent < len(self.buckets):
            self.send()         # parameters that had no part in the last micro-step
        for bucket in self.buckets if self.is_last else ():
            bucket.work.wait()
            if bucket.sent is not bucket.flat:
                bucket.flat.copy_(bucket.sent)
            bucket.n_complete, bucket.sent, bucket.work = 0, None, None
        self.n_sent = 0
        # The sum is divided once, by the weight of all tokens of all processes: rows hold unequal numbers of
        # learned tokens, which a mean of means would weigh unequally.
        self.flat.div_(total_weight)
        norm = self.flat.norm()
        if grad_clip:
            self.flat.mul_((grad_clip / norm).clamp(max=1.0))
        return norm

    def zero(self):
        self.flat.zero_()


class Shards:
    """The same for a model that is split over all processes, here, in place."""

    def __init__(self, model, place):
        self.model, self.place = model, place
        mesh = init_device_mesh(place.device.type, (place.world_size,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)       # embedding, last norm and head, gathered for the whole step
        for module in model.modules():
            if isinstance(module, FSDPModule):      # sums, not means: finish divides by tokens
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def backward(self, total, is_last):
        total.backward()

    def finish(self, total_weight, grad_clip):
        self.place.all_reduce(total_weight)
        gradients = [p.grad for p in self.model.parameters()]
        for gradient in gradients:
            gradient.to_local().div_(total_weight)
        norm = torch.nn.utils.get_total_norm(gradients).full_tensor()
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), grad_clip, norm)
        return norm

    def zero(self):
        for p in self.model.parameters():
            p.grad = None


def gather(tensor, place):
    """A copy of a tensor, or of all parts of one that is split, on the first process's CPU; None on others.
    All processes call it for the same tensor."""
    tensor = tensor.detach()
    is_split = isinstance(tensor, DTensor)
    if is_split:
        tensor = tensor.full_tensor()
    if not place.is_main:
        return None
    return tensor.clone() if not is_split and tensor.device.type == 'cpu' else tensor.cpu()


def scatter(tensor, like):
    """A whole tensor, the same on all processes -> placed, and split, as the tensor like is."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
