from __future__ import annotations

import dataclasses

import pytest
import yaml

from fastdiv.cli import parse_train
from fastdiv.training import report
from fastdiv.training.config import (
    FREE_ON_RESUME,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainConfig,
    UserError,
    check_same_run,
    flatten,
)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TrainConfig(steps=0), "steps must be positive, got 0"),
        (lambda: TrainConfig(dtype="float16"), "dtype: unknown dtype 'float16', did you mean 'bfloat16'"),
        (lambda: TrainConfig(seed=-1), "seed must be in"),
        (lambda: TrainConfig(keep=0), "keep must be positive"),
        (
            lambda: TrainConfig(rollout=RolloutConfig(prompts=3)),
            r"multiple of optimizer.updates \(2\), got 3",
        ),
        (lambda: DataConfig(template="no place"), "data.template must be .*{question}"),
        (lambda: DataConfig(system="be brief"), "data.system must be null unless data.chat"),
        (lambda: RolloutConfig(group_size=1), "rollout.group_size must be at least 2"),
        (lambda: RolloutConfig(temperature=0.0), "rollout.temperature must be finite and positive"),
        (lambda: RolloutConfig(temperature=float("nan")), "rollout.temperature"),
        (lambda: LossConfig(advantage="gae"), "loss.advantage: unknown advantage 'gae'; known are grpo, dr_grpo"),
        (lambda: LossConfig(kl_coef=0.1, reference=False), "loss.reference must be true"),
        (lambda: OptimizerConfig(lr=0.0), "optimizer.lr must be finite and positive"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), "optimizer.betas"),
    ],
)
def test_a_bad_value_is_named(build, words):
    with pytest.raises(UserError, match=words) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_yaml_brings_back_the_same_config(tmp_path):
    config = TrainConfig(
        model="tiny",
        data=DataConfig(task="gcd", options={"max_value": 9}, chat=True, system=""),
        loss=LossConfig(options={"ratio": 0.02}),
        optimizer=OptimizerConfig(betas=(0.8, 0.9)),
    )
    report.write_config(config, tmp_path / "config.yaml")
    assert parse_train(["--config", str(tmp_path / "config.yaml")]) == config


def test_flags_override_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"steps": 3, "optimizer": {"lr": 1e-3}}))
    config = parse_train(["--config", str(tmp_path / "c.yaml"), "--steps", "5", "--optimizer.updates=4", "--resume"])
    assert (config.steps, config.optimizer.lr, config.optimizer.updates, config.resume) == (5, 1e-3, 4, True)


def test_the_packaged_demo_config_is_valid():
    config = parse_train(["--config", "demo", "--steps", "2"])
    assert (config.model, config.loss.objective, config.steps) == ("smollm2", "kl_cov", 2)


def test_same_run_compares_all_that_moves_numbers():
    config = TrainConfig()
    saved = flatten(config)
    check_same_run(saved, dataclasses.replace(config, steps=99, output="elsewhere", keep=3, resume=True))
    assert set(FREE_ON_RESUME) < set(saved)
    changed = dataclasses.replace(config, optimizer=OptimizerConfig(lr=2e-5))
    with pytest.raises(UserError, match=r"optimizer\.lr was 1e-05 in the checkpoint and is 2e-05 now"):
        check_same_run(saved, changed)
