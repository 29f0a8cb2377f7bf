"""Training on several processes: ZeRO-3 and FSDP shard all weights, those of the adapter and those of the host.

The functions here gather the adapter's weights, so that a checkpoint holds the adapter and nothing else.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import nn

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # a torch that was built without torch.distributed
    DTensor = ()


def processes() -> int:
    """Number of processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Gather the module's weights: inside the context every process holds all of them.

    All processes must enter together, and any change must be the same in all of them. Without sharded weights the
    context does nothing.
    """
    parameters = list(module.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            yield
        return
    sharded = [  # FSDP
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    for owner, name, parameter in sharded:
        owner.register_parameter(name, nn.Parameter(parameter.full_tensor(), parameter.requires_grad))
    yield
    for owner, name, parameter in sharded:
        value = owner.get_parameter(name).detach()
        with torch.no_grad():
            parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
        owner.register_parameter(name, parameter)


def fill_in_frozen(module: nn.Module, state_dict: dict[str, torch.Tensor], *_) -> None:
    """Pre-hook for loading a state without the frozen weights: add them from the module, so that they stay."""
    for name, value in module.state_dict().items():
        state_dict.setdefault(name, value)
