"""One training on several processes: how the model is spread over them (processes.py has who they are).

Torch's own DDP, where every process holds all that is trained and gradients are averaged, and FSDP2 (``sharding:
full``), where latent weights, gradients and moments are cut over the processes and a block's are put together only
while it runs. What is frozen, and the teacher, is whole in each process either way.

FSDP2 sums a block's gradients in one go, those that there are: with experts, which see other tokens in each process,
these are not the same everywhere. So there every trained parameter of a block that runs has a gradient, if need be
zeros (:class:`_Touch`), and one that is zeros in all processes is taken for none (:func:`drop_unused`), as it is in a
single one.

Accelerate's Accelerator and transformers' Trainer are not used. The loss needs hidden states of two models and a head
applied in pieces, snapshots must be exact and free of pickle, and at the end weights are packed, not saved; of a
Trainer there would be left the loop, which is a page, and its global state, which outlives a call of a library.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signbit.errors import SignbitError
from signbit.processes import Processes
from signbit.training.states import StatesOf


def spread_model(model: StatesOf, processes: Processes, sharding: str) -> nn.Module:
    """``model`` as it is to be called: its trained parameters averaged or sharded over the processes.

    With sharding the parameters of ``model`` are replaced: take them from it afterwards.
    """
    if processes.count == 1:
        return model
    if sharding == "full":
        _shard(model, model.blocks, processes)
        return model
    on_gpu = processes.device.type == "cuda"
    return DistributedDataParallel(
        model,
        device_ids=[processes.device] if on_gpu else None,
        broadcast_buffers=False,
        # Experts that no token of a batch chose have no gradient, nor has the last block if no loss is behind it.
        find_unused_parameters=not model.learning or any(_has_experts(block) for block in model.blocks),
    )


def _shard(model: nn.Module, blocks: list[nn.Module], processes: Processes) -> None:
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard
    except ImportError as error:
        raise SignbitError(f"sharding: full needs torch 2.7 or newer, this is {torch.__version__}") from error
    count = processes.count

    def place(parameter: nn.Parameter) -> Shard:
        """Latent weights have a dimension of planes, often of one: cut where all processes get a part."""
        even = [dim for dim, size in enumerate(parameter.shape) if size % count == 0]
        return Shard(even[0] if even else 0)

    for block in blocks:
        if _has_experts(block):
            _touch_all(block)
    mesh = init_device_mesh(processes.device.type, (count,))
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for part in [*blocks, model]:
        fully_shard(part, mesh=mesh, shard_placement_fn=place, ignored_params=frozen)


class _Touch(torch.autograd.Function):
    """``x`` as it is; in the backward pass, zeros for ``parameters`` beside whatever else they get."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(parameter.new_empty(0), parameter.shape) for parameter in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        return upstream[0], *(like.new_zeros(shape) for like, shape in ctx.like)


def _touch_all(block: nn.Module) -> None:
    """Make all trained parameters of ``block`` part of what it returns, as they are while it runs: put together."""
    inside = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = inside(*args, **kwargs)
        trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
        if isinstance(found, tuple):
            return _Touch.apply(found[0], *trained), *found[1:]
        return _Touch.apply(found, *trained)

    block.forward = forward


def drop_unused(parameters: list[nn.Parameter], model: StatesOf, processes: Processes, sharding: str) -> None:
    """Take gradients that are zeros in all processes for none: AdamW would go on by its moments."""
    if processes.count == 1 or sharding != "full" or not any(_has_experts(block) for block in model.blocks):
        return
    there = [parameter for parameter in parameters if parameter.grad is not None]
    used = [local(parameter.grad).count_nonzero() > 0 for parameter in there if parameter.grad is not None]
    for parameter, anywhere in zip(there, processes.mean(torch.stack(used).float()).tolist(), strict=True):
        if not anywhere:
            parameter.grad = None


def _has_experts(block: nn.Module) -> bool:
    return any(isinstance(module, nn.ModuleList) for module in block.modules())


def accumulating(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around one of several backward passes of a step: DDP need not average before the ``last``."""
    if isinstance(model, DistributedDataParallel) and not last:
        return _without_sync(model)
    return nullcontext()


@contextmanager
def _without_sync(model: DistributedDataParallel) -> Iterator[None]:
    with model.no_sync():
        yield


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, as a whole; all processes must ask for it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may be sharded."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def cut_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole ``tensor``, as ``parameter`` is cut."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
