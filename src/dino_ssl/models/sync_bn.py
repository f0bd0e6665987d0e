"""Batch norm over the batches of all ranks: the result does not depend on the number of ranks."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_ssl import distributed


def has_batch_norm(module: nn.Module) -> bool:
    """Return True if any submodule is a batch norm, so that outputs depend on the other images of the batch."""
    return any(isinstance(submodule, _BatchNorm) for submodule in module.modules())


class CPUSyncBatchNorm(_BatchNorm):
    """Batch norm [B, C, ...] with mean and variance over the batches of all ranks, which may differ in size.

    A substitute for `nn.SyncBatchNorm`, which needs a GPU, with the same parameters and statistics.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized input, and timm's `drop` and `act` of it if this was one of timm's fused norms."""
        synced = self.training and distributed.world_size() > 1
        x = self._normalize_over_ranks(input) if synced else super().forward(input)
        for name in ("drop", "act"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x

    def _normalize_over_ranks(self, x: Tensor) -> Tensor:
        dims, shape = [0, *range(2, x.ndim)], (-1, *[1] * (x.ndim - 2))
        x32 = x.float()
        count = x32.new_full((1,), x.numel() / x.shape[1])
        sums, count = distributed.all_reduce_sum(torch.cat([x32.sum(dims), count])).split([x.shape[1], 1])
        mean = sums / count
        centered = x32 - mean.view(shape)
        variance = distributed.all_reduce_sum(centered.square().sum(dims)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            weight = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), weight)
            self.running_var.lerp_((variance * count / (count - 1)).detach(), weight)
        normalized = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return normalized.to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of spatial dimensions, as nn.SyncBatchNorm."""


def convert_sync_batchnorm(module: nn.Module, *, fused: bool) -> nn.Module:
    """Convert every batch norm in `module` in place to use the batches of all ranks.

    Parameters and statistics stay the same tensors. fused: use `nn.SyncBatchNorm`, which needs a GPU, by timm's
    conversion; torch's would drop the activations in timm's norms.
    """
    if fused:
        from timm.layers import convert_sync_batchnorm  # pyright: ignore[reportPrivateImportUsage]

        return convert_sync_batchnorm(module)
    for submodule in module.modules():
        if isinstance(submodule, _BatchNorm) and not isinstance(submodule, nn.SyncBatchNorm):
            submodule.__class__ = CPUSyncBatchNorm
    return module
