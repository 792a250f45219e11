from __future__ import annotations

import copy

import pytest
import torch
from letters import Letters, tiny

from fastdiv.training.config import LossConfig, UserError
from fastdiv.training.loop import Trainer
from fastdiv.training.meter import Meter


class Recording(Trainer):
    """Keeps what was sampled and its rewards, so that another implementation can be trained on the same."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def update(self, rollout, rewards, meter):
        self.seen.append((rollout, rewards))
        return super().update(rollout, rewards, meter)


class Plain:
    """The same training in plain torch: full logits, log_softmax, whole windows, formulas written out."""

    def __init__(self, trainer):
        self.config = trainer.config
        self.model = copy.deepcopy(trainer.policy.model)
        self.reference = copy.deepcopy(trainer.policy.model).requires_grad_(False)
        settings = self.config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=0.0
        )
        self.updates = 0

    def log_probs(self, model, rollout, rows):
        ids, mask = rollout.ids[rows], rollout.attention_mask[rows]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        logits = logits[:, -rollout.response_mask.shape[1] - 1 : -1] / self.config.rollout.temperature
        return logits.log_softmax(-1)

    def advantages(self, rewards):
        group = rewards.view(-1, self.config.rollout.group_size)
        return ((group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-6)).flatten()

    def token_loss(self, log_prob, old, advantage):
        """[valid tokens]"""
        ratio, options = (log_prob - old).exp(), self.config.loss.options
        if self.config.loss.objective == "ppo_clip":
            low, high = options["clip_low"], options["clip_high"]
            return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
        covariance = (advantage - advantage.mean()) * (log_prob - log_prob.mean()).detach()
        top = covariance.topk(max(1, int(options["ratio"] * len(covariance)))).indices
        penalty = torch.zeros_like(log_prob).index_put((top,), (log_prob - old)[top].abs())
        return -advantage * ratio + penalty

    def step(self, rollout, rewards):
        with torch.no_grad():
            everything = self.log_probs(self.model, rollout, slice(None))
        losses, norms, size = [], [], len(rewards) // self.config.optimizer.updates
        for start in range(0, len(rewards), size):
            rows = slice(start, start + size)
            valid, labels = rollout.response_mask[rows], rollout.labels[rows][..., None]
            full = self.log_probs(self.model, rollout, rows)[valid]
            other = self.log_probs(self.reference, rollout, rows)[valid]
            chosen, old = (
                full.gather(-1, labels[valid])[:, 0],
                everything[rows].gather(-1, labels)[valid][:, 0],
            )
            advantage = self.advantages(rewards)[rows, None].expand_as(valid)[valid].to(full)
            kl, entropy = (full.exp() * (full - other)).sum(-1), -(full.exp() * full).sum(-1)
            per_token = self.token_loss(chosen, old, advantage)
            per_token = per_token + self.config.loss.kl_coef * kl - self.config.loss.entropy_coef * entropy
            loss = per_token.mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.updates += 1
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.optimizer.lr * min(1.0, self.updates / self.config.optimizer.warmup)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm)
            self.optimizer.step()
            losses.append(loss.item())
            norms.append(norm.item())
        return sum(losses) / len(losses), sum(norms) / len(norms)


KL_COV = LossConfig(options={"ratio": 0.05, "beta": 1.0}, kl_coef=0.1, entropy_coef=0.02)
PPO = LossConfig("ppo_clip", options={"clip_low": 0.02, "clip_high": 0.03})
# In float32 rounding can change which token is the k-th: only a loss without selection or clip is compared there.
SMOOTH = LossConfig("ppo_clip", options={"clip_low": 1.0, "clip_high": 9.0}, kl_coef=0.1, entropy_coef=0.02)


@pytest.mark.parametrize(
    ("loss", "dtype", "steps"),
    [(KL_COV, "float64", 30), (PPO, "float64", 12), (SMOOTH, "float32", 12)],
    ids=["kl_cov-float64", "ppo_clip-float64", "smooth-float32"],
)
def test_every_step_is_that_of_plain_torch(tmp_path, loss, dtype, steps):
    config = tiny(tmp_path / "run", steps=steps, dtype=dtype, checkpoint_every=0, loss=loss)
    trainer = Recording(config, task=Letters())
    plain = Plain(trainer)
    records = trainer.run()
    tolerance = {"float64": 1e-12, "float32": 1e-5}[dtype]
    for record, (rollout, rewards) in zip(records, trainer.seen, strict=True):
        loss, norm = plain.step(rollout, rewards)
        assert record["loss"] == pytest.approx(loss, rel=tolerance, abs=tolerance / 10), record["step"]
        assert record["grad_norm"] == pytest.approx(norm, rel=tolerance), record["step"]
    # It learned: the losses are not those of a standstill.
    assert records[-1]["reward"] > 1.2 * records[0]["reward"] > 0
    for ours, theirs in zip(trainer.policy.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)


def test_the_micro_batch_changes_nothing_but_rounding(tmp_path):
    def run(micro_batch):
        config = tiny(tmp_path / str(micro_batch), steps=3, dtype="float64", checkpoint_every=0)
        object.__setattr__(config.optimizer, "micro_batch", micro_batch)
        return Trainer(config, task=Letters()).run()

    whole, cut = run(64), run(1)
    for one, other in zip(whole, cut, strict=True):
        for key in ("reward", "loss", "grad_norm", "entropy", "kl_ref", "kl_old", "selected"):
            assert one[key] == pytest.approx(other[key], rel=1e-9, abs=1e-12), (key, one["step"])


def test_metrics_of_a_step(tmp_path):
    records = Trainer(tiny(tmp_path / "run", steps=2), task=Letters()).run()
    first, second = records
    assert first["kl_ref"] == pytest.approx(0, abs=1e-6) and second["kl_ref"] > 1e-5
    assert first["kl_old"] > 0  # the second update of a step no longer sees the policy that sampled
    assert 0 < first["selected"] <= 0.05 + 2 / first["tokens"]
    assert first["entropy"] > 4  # near uniform over 257 bytes: log 257 = 5.55
    assert first["response_length"] * 16 == first["tokens"]
    assert first["loss_seconds"] > 0 and first["step_seconds"] > first["loss_seconds"] + first["rollout_seconds"]


def test_a_step_samples_anew_and_reproducibly(tmp_path):
    class One(Letters):
        def __len__(self):
            return 1

    trainer = Trainer(tiny(tmp_path / "run"), task=One())
    first, again, next_step = (trainer.collect(step)[1].texts for step in (0, 0, 1))
    assert first == again and not set(first) & set(next_step)


def test_without_a_reference_nothing_is_invented(tmp_path):
    config = tiny(tmp_path / "run", steps=1, loss=LossConfig("ppo_clip", reference=False))
    record = Trainer(config, task=Letters()).run()[0]
    assert record["kl_ref"] is None and record["selected"] is None


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run"), task=Letters())
    rollout = trainer.collect(0)[1]
    before = [weight.clone() for weight in trainer.policy.model.parameters()]
    rewards = torch.rand(16, dtype=torch.float64)
    rewards[0] = float("inf")
    with pytest.raises(UserError, match="step 1: the norm of the gradient is nan, so the update was not made"):
        trainer.update(rollout, rewards, Meter(torch.device("cpu")))
    for weight, old in zip(trainer.policy.model.parameters(), before, strict=True):
        assert torch.equal(weight, old)


def test_weights_that_became_nan_are_named(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run"), task=Letters())
    rollout = trainer.collect(0)[1]
    with torch.no_grad():
        trainer.policy.model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(UserError, match="NaN in its weights"):
        trainer.collect(1)
    with pytest.raises(UserError, match="NaN in its weights"):
        trainer.update(rollout, torch.rand(16, dtype=torch.float64), Meter(torch.device("cpu")))
