"""Linear layers that are fast on a CPU for a few tokens at a time, as decoding has them."""
import warnings

import torch
import torch.nn as nn


class Packed(nn.Module):
    """
    A bf16 layer whose weight is stored in the blocks that oneDNN multiplies. F.linear makes these blocks anew
    in every call, which for one token takes as long as all the rest. torch.compile's freezing does the same
    as this class, but takes a minute to compile.
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1), bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')


class Int8(nn.Module):
    """
    A layer whose weight and inputs are rounded to 8 bits: each row of the weight, and each token of the
    input, in 127ths of its largest entry. With few tokens a CPU waits for weights, and these are half as
    large as bf16's.
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        weight = weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(1e-30) / 127
        rows = (weight / scale[:, None]).round().to(torch.int8)
        zeros = torch.zeros(len(rows), dtype=torch.int64)
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = 'fbgemm'      # 'x86' may pack for oneDNN: 1.5 times as slow
        with warnings.catch_warnings():
            # torch will drop these tensors (pytorch #184982); onednn.qlinear_prepack will stay, but is slower
            warnings.simplefilter('ignore', UserWarning)
            rows = torch._make_per_channel_quantized_tensor(rows, scale.double(), zeros, 0)
            self.weight = torch.ops.quantized.linear_prepack(rows)
        torch.backends.quantized.engine = engine
        self.bias = bias

    def forward(self, x):
        # linear_dynamic would save 10 us of 80 to 700, but has one scale for all rows: what one user says
        # would change what another one is answered
        scale = x.abs().amax(-1, keepdim=True).clamp_min_(1e-30)
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        y = multiply(x / scale, 1 / 127, 128, self.weight).mul_(scale)
        return y if self.bias is None else y.add_(self.bias)


def pick_linear(dtype, device, compile):
    """-> the class that multiplies fastest in dtype, None for nn.Linear; and the dtype of everything else."""
    is_cpu = device.type == 'cpu' and not compile   # packed weights gain more there than compiling
    if dtype == torch.int8:
        # without VNNI two products are added in 16 bits, which may overflow
        has_vnni = torch.cpu._is_vnni_supported() and 'fbgemm' in torch.backends.quantized.supported_engines
        if not is_cpu or not has_vnni:
            raise ValueError('dtype int8 is for CPUs with AVX-512 VNNI, and nothing is compiled: '
                             'take bfloat16 or float32')
        return Int8, torch.float32
    is_packed = is_cpu and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Packed if is_packed else None, dtype
