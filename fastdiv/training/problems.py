"""What the trainer asks of its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

#: A text, or chat messages with ``role`` and ``content``.
Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Problem:
    """One question, its answer, the entry that the task's own score function wants, and where it stands."""

    question: Prompt
    answer: str
    entry: Mapping[str, Any]
    where: str = ""


class Task(Protocol):
    """What the trainer asks of its data; pass your own to ``Trainer(config, task=...)``.

    A task may have ``fingerprint``, a text that differs where its problems do: a resumed run then has to see the same.
    """

    def __len__(self) -> int:
        """Number of different problems."""
        ...

    def problem(self, index: int) -> Problem:
        """Problem ``index``, the same at every call."""
        ...

    def reward(self, completion: str, problem: Problem) -> float:
        """Reward of an answer's text, in [0, 1]."""
        ...
