"""Sampling groups of answers with a key-value cache: a function of weights, prompts and a generator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .models import Policy


@dataclass(frozen=True)
class Rollout:
    """Sampled sequences: prompts padded on the left, answers padded on the right.

    Arguments:
        ids: int64 [batch, prompt + response].
        attention_mask: int64 [batch, prompt + response], 0 at padding.
        response_mask: bool [batch, response], True up to and including the token that ends the answer.
        texts: the answers, decoded without special tokens.
    """

    ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    texts: list[str]

    @property
    def labels(self) -> Tensor:
        """int64 [batch, response]: the sampled tokens."""
        return self.ids[:, -self.response_mask.shape[1] :]

    def hidden(self, policy: Policy, rows: slice) -> Tensor:
        """[rows, response, hidden]: the states that predict :attr:`labels`, one position to their left."""
        width = self.response_mask.shape[1]
        mask = self.attention_mask[rows]
        # Columns that are padding for all of these rows cost nothing. The last token predicts nothing and is
        # not fed.
        start = int(mask.any(0).int().argmax())
        out = policy.hidden(self.ids[rows, start:-1], mask[:, start:-1], last=width)
        return out


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: list[str],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    special_tokens: bool = True,
) -> Rollout:
    """Samples ``group_size`` answers to each prompt from the untruncated distribution at ``temperature``.

    Arguments:
        policy: the model that answers.
        prompts: texts; answers to prompt i are rows ``i * group_size`` and following.
        group_size: answers per prompt.
        max_new_tokens: longest answer.
        temperature: divides the logits.
        generator: on the policy's device; the only source of randomness.
        special_tokens: let the tokenizer add its own beginning-of-text token.

    Returns:
        A :class:`Rollout`, as wide as its longest answer.
    """
    from transformers import DynamicCache

    encoded = policy.tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=special_tokens)
    ids, mask = encoded["input_ids"].to(policy.device), encoded["attention_mask"].to(policy.device)
    # A prompt is read once; its cache is then repeated for the answers of its group.
    cache = DynamicCache(config=policy.model.config)
    hidden = policy.hidden(ids, mask, cache=cache, last=1).repeat_interleave(group_size, 0)
    cache.batch_repeat_interleave(group_size)
    ids, mask = ids.repeat_interleave(group_size, 0), mask.repeat_interleave(group_size, 0)

    stops, pad = policy.stop_ids, policy.tokenizer.pad_token_id
    alive = torch.ones(len(ids), dtype=torch.bool, device=policy.device)
    valid: list[Tensor] = []
    while True:
        logits = policy.head(hidden[:, -1]).materialize().float() / temperature
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].where(alive, torch.tensor(pad))
        valid.append(alive)
        ids = torch.cat([ids, token[:, None]], 1)
        mask = torch.cat([mask, alive[:, None].to(mask.dtype)], 1)
        alive = alive & ~torch.isin(token, stops)
        if len(valid) == max_new_tokens or not bool(alive.any()):
            break
        hidden = policy.hidden(token[:, None], mask, cache=cache, last=1)
    response = torch.stack(valid, 1)
    answers = ids[:, -response.shape[1] :]
    texts = [
        policy.tokenizer.decode(row[kept], skip_special_tokens=True)
        for row, kept in zip(answers, response, strict=True)
    ]
    return Rollout(ids, mask, response, texts)
