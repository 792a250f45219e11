"""Losses of papers on post-training language models, as pure functions of per-token tensors.

`fastdiv.objectives.list()` names each with its paper, its inputs and whether it needs a pass over the full
vocabulary.

    advantages    grpo, dr_grpo, rloo: rewards of a group -> advantages
    aggregate     token losses -> one number, exact under gradient accumulation and over ranks
    kl            sampled_kl: divergence to a reference from sampled tokens
    policy        ppo_clip, clip_cov, kl_cov, and the selections clip_cov_select, kl_cov_select
    preference    dpo, tdpo1, tdpo2, sparse_po, mapo: pairs of a chosen and a rejected response
    token_weights SparseMask, mapo_masks: per-token weights for sparse_po and mapo
"""

from fastdiv.objectives import advantages, aggregate, kl, policy, preference
from fastdiv.objectives._registry import Objective
from fastdiv.objectives._registry import list_objectives as list
from fastdiv.objectives.kl import sampled_kl
from fastdiv.objectives.policy import clip_cov, clip_cov_select, kl_cov, kl_cov_select, ppo_clip
from fastdiv.objectives.preference import Responses, dpo, mapo, sparse_po, tdpo1, tdpo2
from fastdiv.objectives.token_weights import SparseMask, TokenWeights, mapo_masks

__all__ = [
    "Objective",
    "Responses",
    "SparseMask",
    "TokenWeights",
    "advantages",
    "aggregate",
    "clip_cov",
    "clip_cov_select",
    "dpo",
    "kl",
    "kl_cov",
    "kl_cov_select",
    "list",
    "mapo",
    "mapo_masks",
    "policy",
    "ppo_clip",
    "preference",
    "sampled_kl",
    "sparse_po",
    "tdpo1",
    "tdpo2",
]
