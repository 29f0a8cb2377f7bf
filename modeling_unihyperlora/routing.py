"""Which atoms a token uses, and what they read and write: the part of the update that is computed for every token.

Letters in shapes: N tokens of a batch, w width of a vector, M atoms, k active atoms of a token, S layers of a block,
Q tasks.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

AT_ONCE = 2**18  # numbers that are copied or made at a time where fresh memory costs more than the work


class Routing(NamedTuple):
    """The atoms that each token uses in one block.

    ``atoms`` (N, k) indices, ``gates`` (N, k) in [0, 1), 0 where the null choice won, and ``probabilities`` (N, k) of
    beating it; with the static router ``atoms`` is None and ``gates`` (M,) serves every token. ``bags`` is for torch's
    ``embedding_bag``: where each token's atoms begin (N,), and whose an atom is (N·k,). With Q tasks,
    ``rows`` (N,) says which one a token is of, and static gates are (Q, M).
    """

    atoms: torch.Tensor | None
    gates: torch.Tensor
    probabilities: torch.Tensor | None = None
    bags: tuple[torch.Tensor, torch.Tensor] | None = None
    rows: torch.Tensor | None = None

    def weights(self, coefficients: torch.Tensor) -> torch.Tensor:
        """gate_j · c_j of the routed atoms for each of some places: (S, M) → (S, N, k), or (S, M) if static.

        Of several tasks: (S, Q, M) → (S, N, k), or (S, N, M) if static.
        """
        if self.atoms is None:
            return self.gates * coefficients if self.rows is None else (self.gates * coefficients)[:, self.rows]
        if self.rows is not None:
            return self.gates * coefficients[:, self.rows[:, None], self.atoms]
        chosen = coefficients.gather(1, self.atoms.reshape(1, -1).expand(len(coefficients), -1))
        return self.gates * chosen.view(-1, *self.atoms.shape)


def make_bags(tokens: int, top_k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``Routing.bags`` for so many tokens."""
    each = torch.arange(tokens * top_k, device=device)
    return each[::top_k].contiguous(), each // top_k


def route(
    state: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    bags: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Routing:
    """Choose at most ``top_k`` atoms a token.

    Score s_j of an atom is r_jᵀ P_in x / rms(x) + bias_j; that of the null choice is 0. Under logistic noise on their
    difference atom j beats the null choice with probability σ(s_j); these sum to E[k] over the ``top_k`` best. The
    probability is the atom's gate, 0 below the null choice, where its gradient still is that of the probability, so
    that an atom can come back.

    Args:
        state: (N, w) states at the input of a block.
        rows: (M, w) router rows in host coordinates.
        bias: (M,) bias and task term, or (N, M) where tokens are of different tasks.
        bags: ``make_bags`` of as many tokens, if it is there already.
    """
    scale = rms(state)
    if state.shape[-1] < len(rows) and bias.dim() == 1:
        scores = F.linear(state / scale, rows.to(state.dtype), bias).float()
    else:
        scores = torch.addcdiv(bias, F.linear(state, rows.to(state.dtype)).float(), scale)
    best, atoms = scores.topk(top_k, dim=-1)
    probability = torch.sigmoid(best)
    gates = probability - (probability * (best <= 0)).detach()
    return Routing(atoms, gates, probability, bags or make_bags(len(state), top_k, state.device))


def rms(state: torch.Tensor) -> torch.Tensor:
    """Root of the mean square: (…, w) → (…, 1) float32, at least 1e-6."""
    norm = torch.linalg.vector_norm(state, dim=-1, keepdim=True, dtype=torch.float32)
    return (norm / math.sqrt(state.shape[-1])).clamp_min(1e-6)


def read_atoms(x: torch.Tensor, rows: torch.Tensor, routing: Routing) -> torch.Tensor:
    """v_jᵀ P_in x for the routed atoms: (N, w), (M, w) → (N, k), or (N, M) with the static router."""
    rows = rows.to(x.dtype)
    if routing.atoms is None:
        return F.linear(x, rows)
    if x.device.type != "cpu":
        return (F.embedding(routing.atoms, rows) * x.unsqueeze(1)).sum(dim=-1)
    if torch.is_grad_enabled() and (x.requires_grad or rows.requires_grad):
        return _RoutedDots.apply(x, rows, routing.atoms, *routing.bags)
    return _routed_dots(x, rows, routing.atoms, *routing.bags)


def _routed_dots(
    x: torch.Tensor, rows: torch.Tensor, atoms: torch.Tensor, starts: torch.Tensor, bags: torch.Tensor
) -> torch.Tensor:
    """(N, w), (M, w), (N, k) → (N, k): the product of each token with its k rows, of which no copy is made.

    It is what torch computes as the gradient of the weights in ``embedding_bag``, whose bags are the tokens.
    """
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), rows, atoms.reshape(-1), starts, bags, 0
    )
    return dots.view(atoms.shape)


def _sum_atoms(weights: torch.Tensor, rows: torch.Tensor, atoms: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """(N, k), (M, w), (N, k) → (N, w): the sum of each token's rows by their weights."""
    flat = weights.reshape(-1)
    return torch.embedding_bag(rows, atoms.reshape(-1), starts, False, 0, False, flat, False)[0]


class _RoutedDots(torch.autograd.Function):
    """``_routed_dots`` with its gradients."""

    @staticmethod
    def forward(ctx, x, rows, atoms, starts, bags) -> torch.Tensor:
        ctx.save_for_backward(x, rows, atoms, starts)
        return _routed_dots(x, rows, atoms, starts, bags)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rows, atoms, starts = ctx.saved_tensors
        of_x = of_rows = None
        if ctx.needs_input_grad[0]:
            of_x = _sum_atoms(gradient, rows, atoms, starts)
        if ctx.needs_input_grad[1]:
            of_rows = gradient.new_zeros(len(x), len(rows)).scatter_add_(1, atoms, gradient).T @ x
        return of_x, of_rows, None, None, None


def write_atoms(dots: torch.Tensor, rows: torch.Tensor, routing: Routing, weights: torch.Tensor) -> torch.Tensor:
    """Σ_j gate_j c_j P_out u_j dot_j.

    Args:
        dots: (N, k) from ``read_atoms``; (N, M) with the static router.
        rows: (M, w) written atoms in host coordinates.
        weights: (N, k) of one place from ``Routing.weights``; (M,) or (N, M) with the static router.

    Returns:
        (N, w) in the dtype of ``dots``.
    """
    rows, weighted = rows.to(dots.dtype), dots * weights.to(dots.dtype)
    if routing.atoms is None:
        return F.linear(weighted, rows.T)
    return _sum_atoms(weighted, rows, routing.atoms, routing.bags[0])


def add_atoms(
    out: torch.Tensor, dots: torch.Tensor, rows: torch.Tensor, routing: Routing, weights: torch.Tensor
) -> None:
    """``out += write_atoms(dots, rows, routing, weights)``, where no gradient is needed.

    It goes a few tokens at a time: a second array as large as ``out`` (N, w) costs more in fresh memory than the sum.
    """
    rows, weighted = rows.to(dots.dtype), dots * weights.to(dots.dtype)
    if routing.atoms is None:
        out += F.linear(weighted, rows.T)
        return
    step = max(1, AT_ONCE // out.shape[-1])
    starts = routing.bags[0]
    for first in range(0, len(out), step):
        chosen = routing.atoms[first : first + step]
        out[first : first + step] += _sum_atoms(weighted[first : first + step], rows, chosen, starts[: len(chosen)])
