"""Batch normalisation whose statistics are those of the whole batch, on however many processes it is trained.

PyTorch's own for several processes runs on GPUs only, and in a single process it is an error.
"""

import torch
from torch import Tensor, nn

from vision_lowrank.processes import current_place, sum_over_processes


class SharedBatchNorm3d(nn.BatchNorm3d):
    """`nn.BatchNorm3d`, with the mean and variance of all processes' samples while several train together."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, channels, depth, height, width) to the same shape."""
        if not self.training or current_place()[1] == 1:
            return super().forward(x)
        axes, shape = (0, 2, 3, 4), (1, -1, 1, 1, 1)
        values = x.float()
        number = x.new_tensor(float(x.numel() // x.shape[1]), dtype=torch.float32)
        count = sum_over_processes(number)
        mean = sum_over_processes(values.sum(axes)) / count
        centred = values - mean.view(shape)
        variance = sum_over_processes(centred.square().sum(axes)) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        y = centred * (variance + self.eps).rsqrt().view(shape)
        return (y * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)
