"""Problems whose answers can be checked: a reasoning-gym task by name, or a file of prompts and answers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiv import accept
from fastdiv.training.config import DataConfig, UserError
from fastdiv.training.files import SUFFIXES, FileTask
from fastdiv.training.problems import Problem, Task


class ReasoningGymTask:
    """A task of reasoning-gym, scored by the task's own ``score_answer`` on the stripped completion."""

    def __init__(self, name: str, *, seed: int, size: int, options: Mapping[str, Any]) -> None:
        registry = _registry()
        if name not in registry:
            close = accept.suggestion(name, registry)
            raise UserError(f"data.task: unknown task {name!r}{close}; fastdiv info --tasks lists all {len(registry)}")
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
    if Path(config.task).suffix.lower() in SUFFIXES:
        if config.options:
            raise UserError(f"data.options belong to reasoning-gym tasks, not to the file {config.task}")
        return FileTask(Path(config.task))
    if Path(config.task).is_file():
        raise UserError(f"data.task: a file of problems ends in {', '.join(SUFFIXES)}, got {config.task!r}")
    return ReasoningGymTask(config.task, seed=seed, size=config.size, options=config.options)


def task_names() -> list[str]:
    """Names of the reasoning-gym tasks that are installed, sorted."""
    return sorted(_registry())


def encode_prompt(config: DataConfig, problem: Problem, tokenizer: Any) -> list[int]:
    """The tokens put to the model.

    A text goes into ``config.template``, and where ``config.chat`` as the user's message into the tokenizer's chat
    template. A prompt that is chat messages goes into the chat template as it is.

    Arguments:
        config: the data section of a run.
        problem: whose question is asked.
        tokenizer: the policy's.

    Returns:
        At least one token.

    Raises:
        UserError: no chat template, one that refuses the messages, or a prompt without a token.
    """
    text = render_prompt(config, problem, tokenizer)
    chat = config.chat or not isinstance(problem.question, str)  # the chat template brings its own special tokens
    ids = list(tokenizer(text, add_special_tokens=not chat)["input_ids"])
    if not ids:
        raise UserError(f"data: {problem.where or 'a prompt'}: the prompt has no token")
    return ids


def render_prompt(config: DataConfig, problem: Problem, tokenizer: Any) -> str:
    """The text of :func:`encode_prompt`."""
    question = problem.question
    if isinstance(question, str):
        text = config.template.replace("{question}", question)
        if not config.chat:
            return text
        messages = [{"role": "user", "content": text}]
    else:
        if config.template != "{question}":
            raise UserError(f"data.template is for prompts that are texts; {problem.where} has chat messages")
        messages = list(question)
    if not getattr(tokenizer, "chat_template", None):
        hint = "set data.chat to false" if config.chat else f"{problem.where} has chat messages"
        raise UserError(f"data: this model's tokenizer has no chat template; {hint}")
    if config.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.system})
    # As in TRL: an answer that has been begun is gone on with.
    turn = "continue_final_message" if messages[-1]["role"] == "assistant" else "add_generation_prompt"
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **{turn: True}))
    except Exception as error:  # a template raises what it likes: jinja2's errors, TypeError, ValueError
        where = problem.where or "a prompt"
        raise UserError(f"data: {where}: the chat template refuses the messages: {_one_line(error)}") from error


def _registry() -> Mapping[str, Any]:
    try:
        import reasoning_gym  # noqa: F401  (registers its tasks)
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(f"data.task needs reasoning-gym ({error}): pip install reasoning-gym") from error
    return DATASETS  # type: ignore[no-any-return]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
