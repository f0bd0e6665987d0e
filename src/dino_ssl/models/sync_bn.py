"""Batch norm over the batch of all ranks: without it, two ranks with half a batch each are another network than one."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_ssl import distributed


def has_batch_norm(module: nn.Module) -> bool:
    """Whether what it makes of a picture depends on the others of its batch."""
    return any(isinstance(part, _BatchNorm) for part in module.modules())


class CPUSyncBatchNorm(_BatchNorm):
    """Batch norm [B, C, ...] with the mean and the variance of all ranks' batches together, each picture counted alike.

    The plain twin of `nn.SyncBatchNorm`, which runs on GPUs alone: same parameters, same statistics, any device.
    """

    def forward(self, input: Tensor) -> Tensor:
        x = self._of_all_ranks(input) if self.training and distributed.world_size() > 1 else super().forward(input)
        for then in ("drop", "act"):  # some of timm's norms bring them along
            x = getattr(self, then)(x) if hasattr(self, then) else x
        return x

    def _of_all_ranks(self, x: Tensor) -> Tensor:
        dims, shape = [0, *range(2, x.ndim)], (-1, *[1] * (x.ndim - 2))
        wide = x.float()
        count = wide.new_full((1,), x.numel() / x.shape[1])
        *sums, count = distributed.all_reduce_sum(torch.cat([wide.sum(dims), count])).split([x.shape[1], 1])
        mean = sums[0] / count
        centered = wide - mean.view(shape)
        variance = distributed.all_reduce_sum(centered.square().sum(dims)) / count
        self._remember(mean, variance * count / (count - 1))
        normal = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """The statistics that are used when nothing is trained."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        part = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, part)
        self.running_var.lerp_(variance, part)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of places, as nn.SyncBatchNorm."""


def convert_sync_batchnorm(module: nn.Module, *, fused: bool) -> nn.Module:
    """`module` with every batch norm in it, in place, looking at the batches of all ranks; parameters and statistics
    stay the tensors that they are, so that an optimizer that holds them still does.

    fused: by `nn.SyncBatchNorm`, which needs a GPU. timm swaps it in; torch would lose the activations in timm's norms.
    """
    if fused:
        from timm.layers import convert_sync_batchnorm  # pyright: ignore[reportPrivateImportUsage]

        return convert_sync_batchnorm(module)
    for part in module.modules():
        if isinstance(part, _BatchNorm) and not isinstance(part, nn.SyncBatchNorm):
            part.__class__ = CPUSyncBatchNorm
    return module
