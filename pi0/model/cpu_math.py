"""Keep PyTorch's elementwise functions on the CPU at full precision from their first call.

PyTorch passes contiguous cos, sin, exp, sqrt and the like to MKL, which picks a kernel at each function's first
call. When two threads of one operation make that call together, one of them may run the low-accuracy kernel
(errors of 1e-4 instead of 1e-7) for its share of the tensor, once (pytorch/pytorch#188792). It happened here: the
first actions of a process differed by 1e-5 in the half of the batch that its second thread computed. The same
bits came out when MKL's low-accuracy cosine replaced that half of the first rotary embedding.
"""

import torch

_FUNCTIONS = (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt, torch.tanh, torch.erf)


def choose_kernels() -> None:
    """Make the first call of each function here, on so few numbers that one thread computes it."""
    for dtype in (torch.float32, torch.float64):
        for function in _FUNCTIONS:
            function(torch.ones(16, dtype=dtype))
