from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from fastdiv.training.config import DataConfig, UserError
from fastdiv.training.data import Sampler, load_task, render_prompt, task_names
from fastdiv.training.problems import Problem

SUMS = DataConfig(task="chain_sum", options={"min_terms": 2, "max_terms": 2, "max_digits": 1}, size=20)


def test_a_reasoning_gym_task_is_scored_by_its_own_rule():
    task = load_task(SUMS, seed=3)
    problem = task.problem(4)
    assert len(task) == 20
    assert problem == load_task(SUMS, seed=3).problem(4)
    assert task.reward(f" {problem.answer}\n", problem) == 1.0
    assert task.reward("no number", problem) == 0.0
    inside = f"it is {problem.answer}"
    assert task.reward(inside, problem) == pytest.approx(len(problem.answer) / len(inside))


def test_the_seed_decides_the_problems():
    first, second = load_task(SUMS, seed=1), load_task(SUMS, seed=2)
    assert [first.problem(i) for i in range(9)] != [second.problem(i) for i in range(9)]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DataConfig(task="chain_sums"), "unknown task 'chain_sums', did you mean 'chain_sum'.*fastdiv info --tasks"),
        (DataConfig(task="zzzzzz"), "unknown task 'zzzzzz'; fastdiv info --tasks lists all 1"),
        (DataConfig(task="chain_sum", options={"digits": 3}), "data.options of task 'chain_sum': .*digits"),
        (
            DataConfig(task="chain_sum", options={"min_terms": 0}),
            "data.options of task 'chain_sum': min_terms",
        ),
        (DataConfig(task="absent.jsonl"), "cannot read absent.jsonl: No such file"),
        (DataConfig(task="absent.jsonl", options={"a": 1}), "data.options belong to reasoning-gym"),
    ],
)
def test_a_bad_request_is_one_line(config, words):
    with pytest.raises(UserError, match=words) as caught:
        load_task(config, seed=0)
    assert "\n" not in str(caught.value)


def test_reasoning_gym_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="pip install reasoning-gym"):
        load_task(SUMS, seed=0)


def test_task_names_are_those_of_reasoning_gym():
    assert {"chain_sum", "basic_arithmetic", "gcd"} <= set(task_names())


def test_jsonl(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": 2}\n\n{"prompt": "capital of France", "answer": "Paris"}\n')
    task = load_task(DataConfig(task=str(path)), seed=0)
    number, name = task.problem(0), task.problem(1)
    assert (len(task), number.question, name.answer) == (2, "1+1=", "Paris")
    rewards = [task.reward(text, number) for text in ("2", " 2.0\n", "3", "two", "22", "")]
    assert rewards == [1, 1, 0, 0, 0, 0]
    assert [task.reward(text, name) for text in (" Paris", "paris", "Paris!")] == [1, 0, 0]


@pytest.mark.parametrize("line", ['{"prompt": "x"}', "not json", "[1, 2]", ""])
def test_jsonl_with_a_bad_line(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=r"expected an object with 'prompt' and 'answer'|not JSON|holds no problem"):
        load_task(DataConfig(task=str(path)), seed=0)


def test_every_epoch_is_another_permutation_and_a_function_of_the_position():
    sampler = Sampler(7, seed=5)
    drawn = [sampler[i] for i in range(21)]
    epochs = [drawn[0:7], drawn[7:14], drawn[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Sampler(7, seed=5)[i] for i in (20, 3, 11)] == [drawn[20], drawn[3], drawn[11]]
    assert [Sampler(7, seed=6)[i] for i in range(21)] != drawn


def test_prompts():
    plain = DataConfig(template="Q: {question}\nA:")
    assert render_prompt(plain, Problem("1 {+} 1", "2", {}), None) == "Q: 1 {+} 1\nA:"
    seen = []

    def apply_chat_template(messages, tokenize, add_generation_prompt):
        seen.append((messages, tokenize, add_generation_prompt))
        return "rendered"

    tokenizer = SimpleNamespace(chat_template="x", apply_chat_template=apply_chat_template)
    assert render_prompt(DataConfig(chat=True, system="s"), Problem("q", "", {}), tokenizer) == "rendered"
    roles = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert seen == [(roles, False, True)]
    with pytest.raises(UserError, match="no chat template"):
        render_prompt(DataConfig(chat=True), Problem("q", "", {}), SimpleNamespace(chat_template=None))
