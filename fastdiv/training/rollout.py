"""Sampling groups of answers: a function of weights, prompts and a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiv.training.models import Policy


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
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Rollout:
    """Samples ``group_size`` answers to each prompt from the untruncated distribution at ``temperature``.

    ``model.generate`` does it, without the truncation and the penalties that the model's own generation configuration
    may ask for: the distribution sampled is the one that is trained.

    Arguments:
        policy: the model that answers.
        prompts: tokens of each; answers to prompt i are rows ``i * group_size`` and following.
        group_size: answers per prompt.
        max_new_tokens: longest answer.
        temperature: divides the logits.
        seed: the only source of randomness; torch's own generators are left as they were.

    Returns:
        A :class:`Rollout`, as wide as its longest answer.
    """
    encoded = policy.tokenizer.pad({"input_ids": [list(p) for p in prompts]}, padding=True, return_tensors="pt")
    ids, mask = encoded["input_ids"].to(policy.device), encoded["attention_mask"].to(policy.device)
    stops, pad = policy.stop_ids, policy.tokenizer.pad_token_id
    with _seeded(policy.device, seed):
        ids = policy.generate(
            ids,
            mask,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=group_size,
            max_new_tokens=max_new_tokens,
        )
    answers = ids[:, mask.shape[1] :]
    ended = torch.isin(answers, stops).int()
    response = ended.cumsum(1) - ended == 0
    width = int(response.sum(1).max())
    answers, response = answers[:, :width].where(response[:, :width], torch.tensor(pad)), response[:, :width]
    mask = torch.cat([mask.repeat_interleave(group_size, 0), response.to(mask.dtype)], 1)
    texts = [
        policy.tokenizer.decode(row[kept], skip_special_tokens=True)
        for row, kept in zip(answers, response, strict=True)
    ]
    return Rollout(torch.cat([ids[:, : mask.shape[1] - width], answers], 1), mask, response, texts)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's generators of the CPU and of ``device``, seeded, and put back at the end."""
    elsewhere = device.type != "cpu"
    kind = device.type if elsewhere else "cuda"
    with torch.random.fork_rng(devices=[device] if elsewhere else [], device_type=kind):
        torch.default_generator.manual_seed(seed)
        if elsewhere:
            module = torch.get_device_module(device)
            with module.device(device):
                module.manual_seed(seed)
        yield
