"""What of a model is trained, an injected update on top of a stream, and folding an update into the host."""

import logging
from functools import partial
from typing import Self

from torch.utils.checkpoint import checkpoint

from .errors import ConfigError, MergeError
from .hosts import identify_host, unlike
from .injection import Injection

logger = logging.getLogger(__name__)


class Tuning:
    """The part of ``UniHyperLoraPreTrainedModel`` that says what may change, in the adapter and in the host."""

    def train(self, mode: bool = True) -> Self:
        """Training mode for the adapter; the host is frozen and stays without dropout."""
        super().train(mode)
        self.host.eval()
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Let the host's blocks be computed again on the way back, in place of keeping what they need for it.

        It spares memory where an injected update is trained, whose gradients go through the host. A stream's do not,
        so that its host keeps nothing in any case.

        Args:
            gradient_checkpointing_kwargs: for ``torch.utils.checkpoint.checkpoint``.
            every_n_layers: only every so many blocks.
            offload: not supported.

        Raises:
            ConfigError: reentrant checkpointing, which finds no gradient behind a frozen host's inputs, or offloading.
        """
        given = gradient_checkpointing_kwargs or {}
        if given.get("use_reentrant") or offload:
            raise ConfigError(
                "Gradient checkpointing of a frozen host is done without use_reentrant and without offload; leave "
                "both out of --gradient_checkpointing_kwargs."
            )
        if self.injection is not None:
            self.injection.checkpoint = partial(checkpoint, **{"use_reentrant": False} | given)
            self.injection.every = every_n_layers

    def gradient_checkpointing_disable(self) -> None:
        """Let the host's blocks keep what they need."""
        if self.injection is not None:
            self.injection.checkpoint = None

    def set_train_scope(self, scope: str) -> None:
        """Choose what a trainer may change.

        "source": dictionary, projector, mixer, router, and the active task's embedding and head.
        "delta": the active task's δθ alone, with pathway "both" that of the stream and that of the injected update;
        its head too as long as it is new, i.e. was never trained.

        Raises:
            ConfigError: another scope was given, or one that this adapter is not trained in.
            MergeError: the update is merged into the host.
        """
        if scope not in ("source", "delta"):
            raise ConfigError(f"train_scope={scope!r} is not allowed; choose 'source' or 'delta'.")
        if scope == "delta" and self.config.projector == "host":
            raise ConfigError(
                "train_scope='delta' tunes a universal adapter to a host. This one is bound to its host and trained "
                "for it whole; choose train_scope='source'."
            )
        if self.config.pathway == "both":
            self._check_tunable(scope)
        if self.merged:
            raise MergeError("The update is merged into the host, where it cannot be trained; call unmerge() first.")
        own = self.adapter.tasks[self._task(None)]
        head_is_new = not self.config.tasks[self.config.active_task].get("trained", False)
        for parameter in self.adapter.parameters():
            parameter.requires_grad_(scope == "source")
        if self.config.pathway != "inject":
            self.adapter.anchors.requires_grad_(False)
        for name, task in self.adapter.tasks.items():
            task.requires_grad_(scope == "source" and name == self.config.active_task)
        for delta in own.deltas():
            delta.requires_grad_(scope == "delta")
        if scope == "delta" and head_is_new:
            own.head_weight.requires_grad_(True)
            own.head_bias.requires_grad_(True)

    # ---- an injected update on top of a stream ----

    def add_injection(self) -> None:
        """Put an injected update on top of a stream adapter: its pathway becomes "both".

        The update is zero until δθ is tuned (``set_train_scope("delta")``), and is for this host alone. One that was
        for another host is dropped, for all tasks.

        Raises:
            ConfigError: the adapter is no stream.
            HostError: the host's family is unknown; host and adapter are then as they were.
        """
        if self.config.pathway == "inject":
            raise ConfigError(
                "add_injection() puts an injected update on top of a stream; this adapter has pathway 'inject', which "
                "is such an update and nothing else. Load an adapter with pathway 'stream'."
            )
        if self.injection is not None:
            return
        injection = Injection(self.adapter, self.host)
        self.config.pathway, self.config.injected_host = "both", identify_host(self.host)
        for own in self.adapter.tasks.values():
            own.begin_injection(self.config)
        self.injection = injection
        self.injection.attach()
        if self.stream is not None:
            self.stream.injection = self.injection

    def _is_injected_host(self) -> bool:
        """Whether the injected update on top of the stream is for this host; says so where it is not."""
        if not (differences := unlike(self.config.injected_host, identify_host(self.host))):
            return True
        recorded = self.config.injected_host
        logger.warning(
            "The injected update was tuned on another host (%s, %d blocks x %d, weights %s; other: %s) and is noise "
            "on this one, so it is left out and the stream goes on alone. add_injection() begins one for this host.",
            *(recorded[name] for name in ("family", "num_layers", "hidden_size", "fingerprint")),
            ", ".join(differences),
        )
        return False

    def _check_tunable(self, scope: str) -> None:
        """Raise ``ConfigError`` unless an adapter of pathway "both" may be trained in this scope, on this host."""
        if scope != "delta":
            raise ConfigError(
                "train_scope='source' would change the stream under an injected update that is tuned to one host; "
                "with pathway='both' choose train_scope='delta', or train the stream adapter that it came from."
            )
        if self.injection is None:
            raise ConfigError(
                "The injected update of this adapter was tuned on another host. To tune one for this host, from "
                "zero, call add_injection() first (--pathway both), or load the stream adapter that it came from."
            )

    # ---- merging ----

    def merge(self) -> None:
        """Fold the active task's update into the host's weights; exact, and free at inference.

        On top of a stream, the stream then reads the states of the merged host.

        Raises:
            MergeError: the router chooses atoms for each token, so no fixed weight computes the same; or there is no
                injected update.
        """
        if self.injection is None:
            raise MergeError("The stream computes beside the host, so it has no update to merge.")
        if not self.injection.static:
            raise MergeError(
                "The update depends on each token (router='token'), so it cannot be merged exactly. Load the adapter "
                "with router='static', which uses one fixed mask, the mean gate."
            )
        if not self.merged:
            self.injection.merge(self._task(None))

    @property
    def merged(self) -> bool:
        """Whether an update is folded into the host's weights now."""
        return self.injection is not None and self.injection.merged

    def unmerge(self) -> None:
        """Give the host its own weights back, bit for bit; the update is then computed beside them again."""
        if self.injection is not None:
            self.injection.unmerge()
