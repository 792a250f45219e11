"""What is looked at before a run writes its first file, so that a start that fails leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fastdiv
from fastdiv.training.config import TrainConfig, UserError

if TYPE_CHECKING:
    from fastdiv.training.models import Policy


def check_output(output: Path) -> None:
    """Raises :class:`UserError` unless ``output`` is a directory that can be written, or can become one."""
    there = next(path for path in (output, *output.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise UserError(f"output: {output} cannot be a directory: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output: {output} cannot be written: no permission in {there}")


@torch.no_grad()
def check_head(policy: Policy) -> None:
    """Raises :class:`UserError` unless the model's own logits are those of ``policy.head``, with padding and without.

    Some architectures do more after the last hidden state than a product, a scale and a soft cap, and some read
    padding as text. Training through the wrong logits would be silent, so four tokens are compared once.
    """
    kind = type(policy.model).__name__
    if policy.model.get_output_embeddings() is None:
        raise UserError(f"{kind} has no output embeddings; a causal language model is needed")
    check_weights(policy)
    ids = torch.arange(4, device=policy.device)[None]
    own = policy.model(input_ids=ids).logits.double()
    if own.isnan().any():
        raise UserError(f"{kind} gives NaN logits, though none of its weights is NaN; dtype float32 may help")
    eps = torch.finfo(policy.model.dtype).eps
    ours = policy.head(policy.hidden(ids, torch.ones_like(ids))).materialize().double()
    if not _same(own, ours, eps):
        raise UserError(f"{kind} transforms its logits as fastdiv.LinearLogits cannot")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]], device=policy.device)
    ids = torch.nn.functional.pad(ids, (2, 0))
    padded = policy.head(policy.hidden(ids, mask, last=4)).materialize().double()
    sampled = policy.generate(ids, mask, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    eps_sampled = max(eps, torch.finfo(torch.float32).eps)  # generate hands out float32
    if not (_same(own, padded, eps) and _same(own[:, -1], sampled.logits[0].double(), eps_sampled)):
        raise UserError(f"{kind} reads padding as text, so that prompts of different length cannot be batched")


def check_weights(policy: Policy) -> None:
    """Raises :class:`UserError` naming the first parameter that holds a NaN."""
    for name, weight in policy.model.named_parameters():
        if weight.isnan().any():
            raise UserError(f"{type(policy.model).__name__} has NaN in its weights: {name}")


def check_backend(policy: Policy, config: TrainConfig, outputs: tuple[str, ...]) -> None:
    """Raises :class:`UserError` unless ``config.backend`` takes this device and dtype: one token goes through it."""
    width = policy.model.get_output_embeddings().weight.shape[1]
    hidden = torch.zeros(1, width, device=policy.device, dtype=policy.model.dtype)
    head = policy.head(hidden)
    teacher = head if "reverse_kl" in outputs else None
    label = torch.zeros(1, dtype=torch.long, device=policy.device)
    try:
        fastdiv.token_stats(head, label, teacher=teacher, outputs=outputs, backend=config.backend)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        named = f"backend {config.backend!r}" if config.backend else "backend"
        raise UserError(f"{named} cannot be used here: {error}") from error


def check_length(policy: Policy, prompts: Iterable[tuple[str, Any]], max_new_tokens: int) -> None:
    """Raises :class:`UserError` if a prompt and its answer are longer than the model's positions.

    Arguments:
        policy: the model.
        prompts: where each stands, and its tokens.
        max_new_tokens: longest answer.
    """
    if policy.positions is None:
        return
    for where, ids in prompts:
        if len(ids) + max_new_tokens > policy.positions:
            raise UserError(
                f"rollout.max_new_tokens: {where or 'a prompt'} has {len(ids)} tokens and its answer up to "
                f"{max_new_tokens}, together {len(ids) + max_new_tokens}; the model has {policy.positions} positions"
            )


def _same(own: Tensor, ours: Tensor, eps: float) -> bool:
    """Equal up to rounding; a padded vocabulary may have -inf."""
    if own.shape != ours.shape:
        return False
    bound = 64 * eps * own[own.isfinite()].abs().max()
    return bool(((own == ours) | ((own - ours).abs() <= bound)).all())
