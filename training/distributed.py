"""
One training in several processes, as torchrun starts them.

Every process makes the same global batch, order and augmentation included; the network alone is shared out. Each passes
its rows through it and then has the outputs of all rows, so a loss is computed as if there were one process, whatever
it normalises by, and the gradients that DistributedDataParallel averages are those of the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.errors import TrainingError

TIMEOUT = timedelta(hours=1)  # how long the others wait while the first checks the data or evaluates
T = TypeVar("T")


class LostProcessError(TrainingError):
    """Another process of the same training ended."""


def rank() -> int:
    """This process's number; 0 where it is the only one. The first writes checkpoints and logs."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def best_device() -> torch.device:
    """A GPU where there is one. Its convolutions in fp32 are fp32 then, which by default they are not (TF32)."""
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def joined() -> Iterator[torch.device]:
    """
    Meet the other processes that torchrun started, over NCCL on GPUs and gloo on CPUs; alone without torchrun.

    Yields:
        The device of this process.

    Raises:
        LostProcessError: from whatever ran inside, where a connection to another process broke.
    """
    device = best_device()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield device
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise LostProcessError(
                f"process {rank()} of {world_size()} lost the others ({str(error).splitlines()[0]}); one of them was "
                "killed or failed. Start all again with --resume: they go on from the newest checkpoint"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def from_first(make: Callable[[], T]) -> T:
    """
    What the first process makes, in every process; the others wait for it.

    Raises:
        Exception: what `make` raised there, in every process.
    """
    if world_size() == 1:
        return make()
    made: list[Any] = [None, None]
    if rank() == 0:
        try:
            made[0] = make()
        except Exception as error:  # every process is to fail alike
            made[1] = error
    dist.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    return cast(T, made[0])


def own_rows(count: int) -> slice:
    """Which of `count` rows of a batch are this process's: consecutive, at most one more than another's."""
    low, high = (count * r // world_size() for r in (rank(), rank() + 1))
    return slice(low, high)


def gather_rows(own: Tensor, count: int, dim: int = 0) -> Tensor:
    """
    All `count` rows along `dim`, of which each process has its own; not differentiable.

    Returns:
        The same in every process.
    """
    if world_size() == 1:
        return own
    sizes = [count * (r + 1) // world_size() - count * r // world_size() for r in range(world_size())]
    rows = own.detach().movedim(dim, 0).contiguous()
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).movedim(0, dim)


class _Gathered(torch.autograd.Function):
    """`gather_rows` whose gradient is that of the own rows, times the number of processes that DDP divides by."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, count: int, dim: int) -> Tensor:
        ctx.count, ctx.dim = count, dim
        return gather_rows(own, count, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        rows = own_rows(ctx.count)
        return gradients[0].narrow(ctx.dim, rows.start, rows.stop - rows.start) * world_size(), None, None


def gather_outputs(own: Any, count: int) -> Any:
    """
    A network's outputs for the whole batch, differentiable with respect to this process's own.

    Args:
        own: a named tuple, of the own rows, of tensors (E, B, ...) or (B, C), or None.
        count: rows of the whole batch.
    """
    if world_size() == 1:
        return own
    return type(own)(*(None if part is None else _Gathered.apply(part, count, batch_axis(part)) for part in own))


def batch_axis(output: Tensor) -> int:
    """Which axis of a network's output (E, B, ...) or (B, C) counts the images."""
    return 1 if output.dim() > 2 else 0


def share_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """
    Average the gradients of parameters that a loss uses beside the network, as soon as each is there.

    Every process computes them on the same outputs of the whole batch, so they differ by rounding at most; averaged,
    the parameters stay the same to the last bit.
    """

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size()

    if world_size() > 1:
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(average)


def with_shared_norms(network: nn.Module) -> nn.Module:
    """
    `network` with batch norms that normalise by the statistics of the whole batch. Weights keep names and places.

    torch's own on GPUs, which it is made for; the same in plain operations on CPUs.
    """
    if world_size() == 1:
        return network
    if next(network.parameters()).device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SharedBatchNorm):
                setattr(module, name, SharedBatchNorm.taking_over(child))
    return network


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the rows of all processes."""

    @classmethod
    def taking_over(cls, norm: nn.modules.batchnorm._BatchNorm) -> SharedBatchNorm:
        """With the very parameters and buffers of `norm`."""
        shared = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        shared._parameters, shared._buffers, shared.training = norm._parameters, norm._buffers, norm.training
        return shared

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        if not self.training:
            return super().forward(input)
        others = [axis for axis in range(input.dim()) if axis != 1]
        values = input.to(torch.promote_types(input.dtype, torch.float32))

        def spread(per_channel: Tensor) -> Tensor:
            return per_channel.view(1, -1, *[1] * (input.dim() - 2))

        own_count = values.new_tensor([values.numel() // values.shape[1]])
        sums = cast(Tensor, _SumOfAll.apply(torch.cat([values.sum(others), own_count])))
        count = sums[-1].detach()
        mean = sums[:-1] / count  # (C,)
        centred = values - spread(mean)
        variance = cast(Tensor, _SumOfAll.apply(centred.square().sum(others))) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), momentum)
        normal = centred * spread((variance + self.eps).rsqrt())
        if self.affine:
            normal = normal * spread(self.weight) + spread(self.bias)
        return normal.to(input.dtype)


class _SumOfAll(torch.autograd.Function):
    """Sum over processes; each one's gradient is the sum of all their gradients."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total
