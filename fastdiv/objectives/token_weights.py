"""Per-token weights for `sparse_po` and `mapo`: learned from, or read off, a frozen reference model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiv import accept
from fastdiv.ops.covariance import check_tokens


class TokenWeights(NamedTuple):
    """Per-token weights of one side, [pairs, T] each; the same tensor twice is the paper's common mask."""

    reward: Tensor
    kl: Tensor


@torch.no_grad()
def mapo_masks(activations: Mapping[str, Sequence[Tensor]], mask: Tensor) -> Tensor:
    """Token weights in [0, 1] from a reference model's activations, for `mapo`.

    For each activation tensor: mean over features, then rescaled per response so that its lowest token is 0
    and its highest 1; then the mean over the tensors of a group, then over groups. (The z-score the paper
    takes in between cancels in the rescaling.) A tensor that is constant over a response, as it always is
    over a single token, expresses no preference and counts as 1.

    Arguments:
        activations: group name ("mlp", "attention", "residual", "logits", ...) to tensors [pairs, T,
            features], or [pairs, T] if the mean over features has been taken already. Aligning positions
            with tokens is the caller's task.
        mask: [pairs, T], bool, response tokens.

    Returns:
        float32 [pairs, T] (float64 if an activation is), 0 where the mask is False.

    Raises:
        TypeError, ValueError: wrong dtype or shape, or nothing given.

    Source: arXiv 2410.05102.
    """
    if not activations or not all(len(tensors) > 0 for tensors in activations.values()):
        raise ValueError("mapo_masks: activations must hold at least one group, and each group at least one tensor")
    mask = accept.mask("mapo_masks", "mask", mask)
    groups = []
    for name, tensors in activations.items():
        scaled = []
        for tensor in tensors:
            if tensor.dim() not in (2, 3) or tensor.shape[:2] != mask.shape:
                raise ValueError(
                    f"mapo_masks: activations[{name!r}] must be {list(mask.shape)}, "
                    f"with or without features behind, got {list(tensor.shape)}"
                )
            values = tensor if tensor.dtype == torch.float64 else tensor.float()
            values = values.mean(-1) if values.dim() == 3 else values
            valid = check_tokens("mapo_masks", mask, {"values": values})
            low = values.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
            span = values.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True) - low
            scaled.append(torch.where(valid, torch.where(span == 0, 1, (values - low) / span), 0))
        groups.append(torch.stack(scaled).mean(0))
    return torch.stack(groups).mean(0)


class SparseMask(torch.nn.Module):
    """The learned token weights of SparsePO, from the hidden states of the frozen reference.

    s_l = dropout(relu(w_l . norm(h_l) + b_l)) for each layer l, with one LayerNorm for all layers;
    m = dropout(relu(sum_l a_l s_l)), the mixer a without bias. ReLU makes exact zeros: a sparse mask.

    The mixer starts as the average over layers: with random signs the mask could start at 0 everywhere, and
    there nothing learns. Hidden states are constants; only the parameters of this module learn.

    Arguments:
        hidden_size: features of a hidden state.
        layers: number of hidden states taken, without the embedding output.
        mode: "common", one mask for reward and KL; "independent", two with their own parameters.
        dropout: in [0, 1).

    Source: arXiv 2410.05102.
    """

    def __init__(self, hidden_size: int, layers: int, *, mode: str = "common", dropout: float = 0.0) -> None:
        super().__init__()
        accept.name("SparseMask", "mode", mode, ("common", "independent"))
        for name, size in (("hidden_size", hidden_size), ("layers", layers)):
            if size < 1:
                raise ValueError(f"SparseMask: {name} must be at least 1, got {size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"SparseMask: dropout must be in [0, 1), got {dropout}")
        self.mode = mode
        self.masks = torch.nn.ModuleList(
            _LayerMask(hidden_size, layers, dropout) for _ in range(1 if mode == "common" else 2)
        )

    def forward(self, hidden_states: Sequence[Tensor], mask: Tensor) -> TokenWeights:
        """Weights of every response token.

        Arguments:
            hidden_states: one [pairs, T, hidden_size] per layer, any floating dtype. The entry for token t
                must be the state that predicts it, at position t - 1: that shift is the caller's.
            mask: [pairs, T], bool; hidden states of other tokens are not read.

        Returns:
            TokenWeights in the dtype of the parameters, >= 0, 0 where the mask is False.
        """
        mask = accept.mask("SparseMask", "mask", mask)
        weights = [head(hidden_states, mask) for head in self.masks]
        return TokenWeights(weights[0], weights[-1])


class _LayerMask(torch.nn.Module):
    def __init__(self, hidden_size: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(hidden_size)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(hidden_size, 1) for _ in range(layers))
        self.mixer = torch.nn.Parameter(torch.full((layers,), 1 / layers))
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, hidden_states: Sequence[Tensor], mask: Tensor) -> Tensor:
        if len(hidden_states) != len(self.heads):
            raise ValueError(f"SparseMask: hidden_states must be {len(self.heads)} layers, got {len(hidden_states)}")
        expected = [*mask.shape, self.norm.normalized_shape[0]]
        mixed = torch.zeros_like(mask, dtype=self.mixer.dtype)
        for share, head, hidden in zip(self.mixer, self.heads, hidden_states, strict=True):
            if list(hidden.shape) != expected:
                raise ValueError(f"SparseMask: each hidden state must be {expected}, got {list(hidden.shape)}")
            # emptied before the norm: NaN in padding would reach the parameters' gradients through 0 * NaN
            state = torch.where(mask.unsqueeze(-1), hidden.detach(), 0).to(self.mixer.dtype)
            mixed = mixed + share * self.dropout(head(self.norm(state)).relu().squeeze(-1))
        return torch.where(mask, self.dropout(mixed.relu()), 0)
