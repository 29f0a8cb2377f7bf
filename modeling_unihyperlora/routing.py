"""Routing, and reading and writing of atoms: the part of the update that is computed for every token.

Letters in shapes: N tokens of a batch, w width of a vector, M atoms, k active atoms of a token, S layers of a block,
Q tasks.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

AT_ONCE = 2**18  # numbers per step of ``add_atoms``, so that temporary arrays stay small


class Routing(NamedTuple):
    """The atoms that each token uses in one block.

    Attributes:
        atoms: (N, k) indices of atoms; None with the static router.
        gates: (N, k) in [0, 1), 0 if the null choice won. Static router: (M,) for all tokens, or (Q, M) for Q tasks.
        probabilities: (N, k) probabilities of beating the null choice.
        bags: arguments of torch's ``embedding_bag``: start (N,) of each token's atoms, and token (N·k,) of each atom.
        rows: (N,) task index of each token, with Q tasks.
    """

    atoms: torch.Tensor | None
    gates: torch.Tensor
    probabilities: torch.Tensor | None = None
    bags: tuple[torch.Tensor, torch.Tensor] | None = None
    rows: torch.Tensor | None = None

    def weights(self, coefficients: torch.Tensor) -> torch.Tensor:
        """gate_j · c_j of the routed atoms at S places: coefficients (S, M) → (S, N, k), or (S, M) if static.

        With several tasks: (S, Q, M) → (S, N, k), or (S, N, M) if static.
        """
        if self.atoms is None:
            return self.gates * coefficients if self.rows is None else (self.gates * coefficients)[:, self.rows]
        if self.rows is not None:
            return self.gates * coefficients[:, self.rows[:, None], self.atoms]
        chosen = coefficients.gather(1, self.atoms.reshape(1, -1).expand(len(coefficients), -1))
        return self.gates * chosen.view(-1, *self.atoms.shape)


def make_bags(tokens: int, top_k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``Routing.bags`` for a number of tokens with ``top_k`` atoms each."""
    each = torch.arange(tokens * top_k, device=device)
    return each[::top_k].contiguous(), each // top_k


def route(
    state: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    bags: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Routing:
    """Choose up to ``top_k`` atoms for each token.

    The score of atom j is s_j = r_jᵀ P_in x / rms(x) + bias_j; the score of the null choice is 0. With logistic noise
    on the difference, atom j beats the null choice with probability σ(s_j). The sum of this over the ``top_k`` best
    atoms is E[k]. The gate of an atom is its probability if s_j > 0, else 0. The gradient of a closed gate is still
    that of the probability, so the atom can open again.

    Args:
        state: (N, w) states at the input of a block.
        rows: (M, w) router rows in host coordinates.
        bias: (M,) bias with task term, or (N, M) if tokens belong to different tasks.
        bags: result of ``make_bags`` for the same number of tokens, if known.
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
    """Root mean square: (…, w) → (…, 1) float32, at least 1e-6."""
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
    """Dot products of each token with its k rows: (N, w), (M, w), (N, k) → (N, k), without copying the rows.

    torch computes them as the gradient of the weights in ``embedding_bag``, with the tokens as bags.
    """
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), rows, atoms.reshape(-1), starts, bags, 0
    )
    return dots.view(atoms.shape)


def _sum_atoms(weights: torch.Tensor, rows: torch.Tensor, atoms: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Weighted sum of each token's rows: weights (N, k), rows (M, w), atoms (N, k) → (N, w)."""
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
        rows: (M, w) rows P_out u_j in host coordinates.
        weights: (N, k) weights of one place from ``Routing.weights``; (M,) or (N, M) with the static router.

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
    """``out += write_atoms(dots, rows, routing, weights)`` in place, without gradients.

    The sum is computed a few tokens at a time: allocating a second array of the size of ``out`` (N, w) would take
    longer than the sum itself.
    """
    rows, weighted = rows.to(dots.dtype), dots * weights.to(dots.dtype)
    if routing.atoms is None:
        out.addmm_(weighted, rows)
        return
    step, starts = max(1, AT_ONCE // out.shape[-1]), routing.bags[0]
    if len(out) <= step:
        out.add_(_sum_atoms(weighted, rows, routing.atoms, starts))
        return
    for some, own, chosen in zip(*(every.split(step) for every in (out, weighted, routing.atoms)), strict=True):
        some.add_(_sum_atoms(own, rows, chosen, starts[: len(chosen)]))
