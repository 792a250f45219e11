"""Problems whose answers can be checked: a reasoning-gym task by name, or a file of prompts and answers."""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Protocol

from .config import DataConfig, UserError


@dataclass(frozen=True)
class Problem:
    """One question, its answer, and the entry that the task's own score function wants."""

    question: str
    answer: str
    entry: Mapping[str, Any]


class Task(Protocol):
    """What the trainer asks of its data; pass your own to ``Trainer(config, task=...)``."""

    def __len__(self) -> int:
        """Number of different problems."""
        ...

    def problem(self, index: int) -> Problem:
        """Problem ``index``, the same at every call."""
        ...

    def reward(self, completion: str, problem: Problem) -> float:
        """Reward of an answer's text, in [0, 1]."""
        ...


class ReasoningGymTask:
    """A task of reasoning-gym, scored by the task's own ``score_answer`` on the stripped completion."""

    def __init__(self, name: str, *, seed: int, size: int, options: Mapping[str, Any]) -> None:
        registry = _registry()
        if name not in registry:
            close = difflib.get_close_matches(name, registry, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise UserError(f"data.task: no task {name!r}; {hint}list all {len(registry)} with: fastdiv info --tasks")
        from reasoning_gym.factory import create_dataset

        try:
            self._dataset = create_dataset(name, seed=seed, size=size, **options)
        except (TypeError, AssertionError, ValueError) as error:
            raise UserError(f"data.options of task {name!r}: {_one_line(error)}") from error

    def __len__(self) -> int:
        return len(self._dataset)

    def problem(self, index: int) -> Problem:
        entry = self._dataset[index]
        return Problem(entry["question"], str(entry["answer"]), entry)

    def reward(self, completion: str, problem: Problem) -> float:
        return float(self._dataset.score_answer(completion.strip(), entry=dict(problem.entry)))


class JsonlTask:
    """Lines of ``{"prompt": ..., "answer": ...}``; reward 1 for the same text or decimal number, else 0."""

    def __init__(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"data.task: cannot read {path}: {error.strerror}") from error
        self._problems = [_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not self._problems:
            raise UserError(f"data.task: {path} holds no problem")

    def __len__(self) -> int:
        return len(self._problems)

    def problem(self, index: int) -> Problem:
        return self._problems[index]

    def reward(self, completion: str, problem: Problem) -> float:
        given, wanted = completion.strip(), problem.answer.strip()
        if given == wanted:
            return 1.0
        try:
            return float(Decimal(given) == Decimal(wanted))
        except InvalidOperation:
            return 0.0


class Sampler:
    """Which problems a step sees: a fresh seeded permutation per epoch, a pure function of the position.

    Nothing has to be saved for an exact resume, since the position is the step.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        self._size, self._seed = size, seed
        self._epoch, self._order = -1, list[int]()

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self._size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(self._size))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
        return self._order[offset]


def load_task(config: DataConfig, *, seed: int) -> Task:
    """The task that ``config.task`` names.

    Arguments:
        config: the data section of a run.
        seed: decides the problems a procedural task makes.

    Returns:
        A :class:`Task`.

    Raises:
        UserError: unknown task (with the closest names), bad options, unreadable file, or reasoning-gym is
            missing.
    """
    if config.task.endswith(".jsonl"):
        if config.options:
            raise UserError(f"data.options belong to reasoning-gym tasks, not to the file {config.task}")
        return JsonlTask(Path(config.task))
    return ReasoningGymTask(config.task, seed=seed, size=config.size, options=config.options)


def task_names() -> list[str]:
    """Names of the reasoning-gym tasks that are installed, sorted."""
    return sorted(_registry())


def render_prompt(config: DataConfig, question: str, tokenizer: Any) -> str:
    """The text put to the model: the template, inside the tokenizer's chat template where ``config.chat``."""
    text = config.template.replace("{question}", question)
    if not config.chat:
        return text
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("data.chat: this model's tokenizer has no chat template; set data.chat to false")
    messages = [{"role": "user", "content": text}]
    if config.system is not None:
        messages.insert(0, {"role": "system", "content": config.system})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _registry() -> Mapping[str, Any]:
    try:
        import reasoning_gym  # noqa: F401  (registers its tasks)
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(f"data.task needs reasoning-gym ({error}): pip install reasoning-gym") from error
    return DATASETS  # type: ignore[no-any-return]


def _parse(path: Path, number: int, line: str) -> Problem:
    try:
        entry = json.loads(line)
        return Problem(str(entry["prompt"]), str(entry["answer"]), entry)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"data.task: {path}:{number}: expected an object with 'prompt' and 'answer' ({error})"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
