"""Leaving a host as it was: what it was like before its first adapter, kept on it until the last one is taken off."""

import copy
import weakref

from torch import nn

from .errors import HostError, MergeError


class Hold:
    """Which models have their adapters on a host, and what of it they changed.

    Attributes:
        models: those whose adapters are on the host.
        merged: whether the update of one of them is in the host's weights.
    """

    def __init__(self, host: nn.Module):
        self.models: weakref.WeakSet = weakref.WeakSet()
        self.merged = False
        self.trainable = [parameter for parameter in host.parameters() if parameter.requires_grad]
        self.training = [module for module in host.modules() if module.training]

    def __deepcopy__(self, memo: dict) -> "Hold":
        """A copied model holds its copied host; on the copy of a host alone nobody has an adapter."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.models = weakref.WeakSet(memo[id(model)] for model in self.models if id(model) in memo)
        twin.trainable = copy.deepcopy(self.trainable, memo)
        twin.training = copy.deepcopy(self.training, memo)
        return twin

    def __getstate__(self) -> dict:
        return vars(self) | {"models": None}  # weak references cannot be pickled

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state | {"models": weakref.WeakSet()})

    @classmethod
    def on(cls, host: nn.Module) -> "Hold | None":
        return vars(host).get("_unihyperlora_hold")

    @classmethod
    def check(cls, host: nn.Module) -> None:
        """Raise ``HostError`` if the host's weights have another adapter's update in them."""
        if (hold := cls.on(host)) is not None and hold.merged:
            raise HostError(
                "Another adapter's update is merged into this host, so its weights are not its own. Call unmerge() "
                "or detach() of that model first, or load the host afresh."
            )

    @classmethod
    def take(cls, host: nn.Module, model: nn.Module) -> None:
        """Freeze the host for a model's adapter."""
        hold = cls.on(host)
        if hold is None:
            hold = host._unihyperlora_hold = cls(host)
        hold.models.add(model)
        for parameter in host.parameters():
            parameter.requires_grad_(False)

    @classmethod
    def release(cls, host: nn.Module, model: nn.Module) -> None:
        """The host as it was given, once no other adapter is on it."""
        hold = cls.on(host)
        if hold is None or model not in hold.models:
            return
        hold.models.discard(model)
        if not hold.models:
            for parameter in hold.trainable:
                parameter.requires_grad_(True)
            for module in hold.training:
                module.training = True
            del host._unihyperlora_hold

    @classmethod
    def check_alone(cls, host: nn.Module) -> None:
        """Raise ``MergeError`` if other adapters are on the host, whose outputs a merged update would change."""
        if (hold := cls.on(host)) is not None and len(hold.models) > 1:
            raise MergeError(
                f"{len(hold.models)} adapters are on this host, and a merged update would change what the others "
                "compute. Call detach() of the others first, or merge into a host of its own."
            )
