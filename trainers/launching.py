"""What a launcher of several processes does to an adapter, and how its checkpoints stay the adapter alone.

ZeRO-3 and FSDP share all weights out over the processes, those of the adapter with those of its host.
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
    """How many processes a launcher has started for this run."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Within it every process has all of the module's weights, to read or to set alike in all of them.

    All processes have to come here together. It is nothing where the weights are not shared out.
    """
    parameters = list(module.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            yield
        return
    shared = [  # FSDP
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    for owner, name, parameter in shared:
        owner.register_parameter(name, nn.Parameter(parameter.full_tensor(), parameter.requires_grad))
    yield
    for owner, name, parameter in shared:
        value = owner.get_parameter(name).detach()
        with torch.no_grad():
            parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
        owner.register_parameter(name, parameter)


def fill_in_frozen(module: nn.Module, state_dict: dict[str, torch.Tensor], *_) -> None:
    """Of a model that loads a state without its frozen weights: they stay what they are."""
    for name, value in module.state_dict().items():
        state_dict.setdefault(name, value)
