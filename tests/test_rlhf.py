"Chapter 5: estimators against enumeration, torchrl and TRL; rollouts, faults, resuming, two processes, adapters."
import copy
import json
import math
import os
import shutil
import signal
import warnings
from dataclasses import replace

import datasets
import pytest
import torch
from helpers import CONFIG, TOKENIZER, flat, killed_until_done, on_two_ranks
from helpers import model as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.utils import _clip_value_loss
from torchrl.objectives.value.functional import generalized_advantage_estimate
from transformers import AutoModelForSequenceClassification
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

from llm_train_course.core import ResumeError, TrainConfig, fit, latest_checkpoint, target_logps
from llm_train_course.lora import add_lora, load_adapter, save_adapter
from llm_train_course.rlhf import (
    ActorCritic,
    GroupRollouts,
    PairBatches,
    PPORollouts,
    RewardError,
    RewardModel,
    RolloutError,
    Sampler,
    Sampling,
    adapter_off,
    bradley_terry_loss,
    clipped_surrogate,
    encode_pairs,
    gae,
    grpo_advantages,
    grpo_loss,
    kl_estimate,
    load_reward_model,
    optimal_policy,
    ppo_clip_loss,
    reward_loss,
    reward_model_from,
    rloo_advantages,
    sample,
    save_reward_model,
    text_reward,
    train_grpo,
    train_ppo,
    train_reward_model,
    value_loss,
)

PAD, EOS = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
PROMPTS = [{"prompt": p, "want": w} for p, w in (("Ada", "Lisbon"), ("Ben Hale lives", "Oslo"), ("Cleo Park", "a"), ("Dan Ruiz lives in", "b"))]
PAIRS = [{"prompt": f"{name} lives", "chosen": f" in {city} and likes it" + " and likes it" * (n % 3), "rejected": f" in {city}."}
         for n, (name, city) in enumerate(zip(["Ada", "Ben Hale", "Cleo", "Dan", "Eva Lund", "Finn"], ["Lisbon", "Oslo", "Quito"] * 2))]
few = settings(max_examples=25, deadline=None)
GQA = dict(n_kv_heads=2, intermediate_size=48)


def lengths_of_letters(completions, **columns):
    return [len(c) / 10 for c in completions]


def distinct(completions, want, **columns):
    return [len(set(c)) / 10 + (w in c) for c, w in zip(completions, want)]


def seeded(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the mathematics -------------------------------------------------------------------------------------------------

@few
@given(st.integers(0, 10**6), st.floats(0.05, 20), st.integers(2, 9))
def test_objective_is_its_maximum_less_beta_times_the_divergence_from_the_optimum(seed, beta, n):
    ref, rewards, other = (seeded(n, seed=seed + k, dtype=torch.float64) for k in range(3))
    ref, p = ref.softmax(0), other.softmax(0)
    best = optimal_policy(ref, rewards, beta)
    value = lambda q: float((q * rewards).sum() - beta * (q * (q / ref).log()).sum())
    top = beta * float((ref.log() + rewards / beta).logsumexp(0))
    assert value(best) == pytest.approx(top, abs=1e-9)
    assert value(p) == pytest.approx(top - beta * float((p * (p / best).log()).sum()), abs=1e-9)


def test_bradley_terry_recovers_rewards_from_noisy_labels():
    truth = torch.tensor([0.0, 1.0, 2.5, -1.0])
    first, second = torch.randint(4, (2, 20_000), generator=torch.Generator().manual_seed(0))
    keep = first != second
    first, second = first[keep], second[keep]
    won = torch.rand(len(first), generator=torch.Generator().manual_seed(1)) < torch.sigmoid(truth[first] - truth[second])
    r = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.LBFGS([r], max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = bradley_terry_loss(torch.where(won, r[first], r[second]), torch.where(won, r[second], r[first]))
        loss.backward()
        return loss
    optimizer.step(closure)
    assert_close(r.detach() - r.detach().mean(), truth - truth.mean(), rtol=0, atol=0.08)


@few
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1))
def test_gae_skips_what_is_masked_wherever_it_stands(seed, rows, width, gamma, lam):
    r, v, u = (seeded(rows, width, seed=seed + k, dtype=torch.float64) for k in range(3))
    mask = (u > 0).long()
    advantages, returns = gae(r, v, mask, gamma, lam)
    for n in range(rows):
        here = mask[n].bool()
        rn, vn = r[n, here], v[n, here]
        delta = rn + gamma * F.pad(vn[1:], (0, 1)) - vn if here.any() else rn
        expected = [sum((gamma * lam) ** (k - t) * float(delta[k]) for k in range(t, len(rn))) for t in range(len(rn))]
        assert_close(advantages[n, here], torch.tensor(expected, dtype=torch.float64))
        assert_close(returns[n, here], advantages[n, here] + vn)
    assert not advantages[mask == 0].any() and not returns[mask == 0].any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 2)])
def test_gae_equals_torchrl(shape):
    r, v = seeded(*shape), seeded(*shape, seed=1)
    ends = torch.zeros(*shape, 1, dtype=torch.bool)
    ends[:, -1] = True
    theirs = generalized_advantage_estimate(0.97, 0.9, v[..., None], F.pad(v[:, 1:], (0, 1))[..., None], r[..., None], ends, ends)
    for a, b in zip(gae(r, v, torch.ones(shape), 0.97, 0.9), theirs):
        assert_close(a, b.squeeze(-1), rtol=1e-5, atol=1e-6)


def _torchrl_loss(actor, **kw):
    loss = ClipPPOLoss(actor, entropy_bonus=False, **kw)
    loss.set_keys(sample_log_prob="old_logps")
    return loss


def _actor(net):
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, in_keys=["observation"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(in_keys=["logits"], out_keys=["action"], distribution_class=torch.distributions.Categorical,
                                      return_log_prob=True))


def test_ten_steps_on_the_clipped_loss_equal_torchrls():
    ours = nn.Linear(5, 7)
    theirs = copy.deepcopy(ours)
    x, actions, advantages = seeded(60, 5), torch.arange(60) % 7, seeded(60, seed=2)
    old = ours(x).detach().log_softmax(-1).gather(1, actions[:, None]).squeeze(1) + 0.3 * seeded(60, seed=3)
    reference = _torchrl_loss(_actor(theirs), clip_epsilon=0.2)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (ours, theirs)]
    data = TensorDict({"observation": x, "action": actions, "old_logps": old, "advantage": advantages[:, None]}, [60])
    clipped = []
    for _ in range(10):
        logps = ours(x).log_softmax(-1).gather(1, actions[:, None]).squeeze(1)
        losses = [ppo_clip_loss(logps, old, advantages, torch.ones(60), 0.2), reference(data)["loss_objective"]]
        assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
        clipped.append(float(((logps - old).exp() - 1).abs().gt(0.2).float().mean()))
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert 0.1 < min(clipped) and max(clipped) < 1
    assert_close(ours.weight, theirs.weight, rtol=1e-4, atol=1e-5)


@few
@given(st.floats(-2, 2), st.floats(-3, 3).filter(lambda a: abs(a) > 1e-3), st.floats(0.05, 0.5), st.floats(0.05, 0.9))
def test_surrogate_is_a_lower_bound_and_its_slope_is_that_of_the_ratio_or_zero(gap, advantage, low, high):
    logp = torch.tensor(gap, dtype=torch.float64, requires_grad=True)
    value = clipped_surrogate(logp, torch.zeros((), dtype=torch.float64), torch.tensor(advantage, dtype=torch.float64), low, high)
    (slope,) = torch.autograd.grad(value, logp)
    ratio = math.exp(gap)
    assert float(value.detach()) <= ratio * advantage + 1e-12
    done = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)  # it has gone as far as it may
    assert float(slope) == pytest.approx(0.0 if done else ratio * advantage)


def test_clipped_value_loss_equals_torchrls():
    old, new, target = seeded(50), seeded(50, seed=1).requires_grad_(), seeded(50, seed=2)
    plain = (new - target) ** 2
    theirs, _ = _clip_value_loss(old, new, torch.tensor(0.3), target, plain, "l2")
    ours = value_loss(new, old, target, torch.ones(50), 0.3)
    assert_close(ours * 2, theirs.mean())
    assert_close(torch.autograd.grad(ours * 2, new, retain_graph=True)[0], torch.autograd.grad(theirs.mean(), new)[0])


def test_kl_estimates_are_unbiased_or_not_over_every_action():
    logp, logq = seeded(30, dtype=torch.float64).log_softmax(0), seeded(30, seed=1, dtype=torch.float64).log_softmax(0)
    p, true = logp.exp(), float((logp.exp() * (logp - logq)).sum())
    mean = {k: float(p @ kl_estimate(logp, logq, k)) for k in ("k1", "k2", "k3")}
    assert mean["k1"] == pytest.approx(true) and mean["k3"] == pytest.approx(true) and abs(mean["k2"] / true - 1) > 0.02
    assert (kl_estimate(logp, logq, "k3") >= 0).all() and (kl_estimate(logp, logq, "k1") < 0).any()


@few
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 4))
def test_group_advantages_sum_to_zero_and_do_not_see_a_shift(seed, size, groups):
    r = seeded(size * groups, seed=seed)
    shift = seeded(groups, seed=seed + 1).repeat_interleave(size)
    for fn in (grpo_advantages, rloo_advantages):
        a = fn(r, size)
        assert_close(a.view(groups, size).sum(1), torch.zeros(groups), rtol=0, atol=1e-4)
        assert_close(fn(r + shift, size), a, rtol=1e-2, atol=1e-3)
    assert_close(grpo_advantages(5 * r, size), grpo_advantages(r, size), rtol=5e-2, atol=5e-3)
    assert not grpo_advantages(torch.full((size,), 3.0), size).any()


# --- TRL on the same rollouts ------------------------------------------------------------------------------------------

def _trainer(kind, model, folder, functions, beta=0.0, ref=None, **settings):
    config, trainer = {"GRPO": (GRPOConfig, GRPOTrainer), "RLOO": (RLOOConfig, RLOOTrainer)}[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = config(output_dir=str(folder), per_device_train_batch_size=8, num_generations=4, max_completion_length=10, use_cpu=True,
                      bf16=False, gradient_checkpointing=False, report_to="none", beta=0.0, epsilon=0.2, epsilon_high=0.3, **settings)
        trainer = trainer(model, reward_funcs=functions, args=args, processing_class=TOKENIZER,
                          train_dataset=datasets.Dataset.from_list(PROMPTS))
    trainer.beta, trainer.ref_model = beta, copy.deepcopy(ref)  # made before, it would look for the reference on the hub
    add_fused_lm_head(trainer.ref_model, temperature=1.0)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _their_batch(trainer, kind, rollouts):
    "TRL's own preparation (rewards, advantages, masks, reference) of answers that we sampled."
    prompts, answers = [r.prompt for r in rollouts], [r.answer for r in rollouts]
    texts = TOKENIZER.batch_decode(answers, skip_special_tokens=True)
    made = (prompts, answers, None, texts, None, {}, None, []) if kind == "GRPO" else (prompts, answers, texts)
    trainer._generate = lambda *args: made
    batch = trainer._generate_and_score_completions([PROMPTS[r.source] for r in rollouts])
    old = nn.utils.rnn.pad_sequence([r.fields["old_logps"] for r in rollouts], batch_first=True)
    return {**batch, **({"old_per_token_logps": old} if kind == "GRPO" else {})}


CASES = [("grpo", True, True), ("grpo", False, False), ("dapo", True, True), ("dr_grpo", True, False), ("rloo", True, None)]


@pytest.mark.parametrize("loss_type, correct_kl, scale", CASES)
def test_ten_steps_equal_trls_on_the_same_answers(tmp_path, loss_type, correct_kl, scale):
    "Advantages from the reward functions on, losses, and the weights after ten steps away from the sampling policy."
    start, ref = tiny(**GQA, initializer_range=0.05), tiny(5, **GQA)
    sampler = Sampler(start, TOKENIZER, PROMPTS, [distinct, lengths_of_letters], Sampling(3, 4, 10, micro_batch_size=12), [1.0, 0.5], ref)
    layout = GroupRollouts(sampler, lambda b: (target_logps(start, b),), beta=0.2, correct_kl=correct_kl, loss_type=loss_type, scale=scale,
                           clip_eps=0.2, clip_eps_high=0.3)
    batch = layout.collate(sorted(layout.plan(0)[0]))
    kind = "RLOO" if loss_type == "rloo" else "GRPO"
    extra = {} if kind == "RLOO" else {"loss_type": loss_type, "use_bias_correction_kl": correct_kl,
                                       "scale_rewards": "group" if scale else "none"}
    ours, theirs = copy.deepcopy(start).train(), copy.deepcopy(start).train()
    trainer = _trainer(kind, theirs, tmp_path, [distinct, lengths_of_letters], 0.2, ref, reward_weights=[1.0, 0.5], **extra)
    same = _their_batch(trainer, kind, layout._rollouts)
    assert_close(same["advantages"], torch.stack([r.fields["advantages"][0] for r in layout._rollouts]), rtol=1e-4, atol=1e-5)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=3e-3) for m in (ours, theirs)]
    for _ in range(10):
        loss, extras = grpo_loss(ours, batch)
        losses = [loss / batch["n_targets"], trainer._compute_loss(theirs, same)]
        assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
        for value, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert extras["clip_fraction"] > 0  # the ratio had left the interval
    assert (flat(ours) - flat(theirs)).abs().max() < 5e-4 < (flat(ours) - flat(start)).abs().max()


def test_trls_reward_trainer_trains_the_same_reward_model_for_ten_steps(tmp_path):
    mine = reward_model_from(tiny(**GQA), PAD)
    save_reward_model(mine, tmp_path / "start")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start")
    config = TrainConfig(learning_rate=1e-3, schedule="constant", max_steps=10, weight_decay=0.0, betas=(0.9, 0.999), progress=False,
                         cpu=True, log_every=1)
    batches = PairBatches(encode_pairs(TOKENIZER, PAIRS), 6, PAD, shuffle=False, center=0.05)
    history = fit(mine, batches, reward_loss, config).history
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = RewardTrainer(theirs, args=RewardConfig(
            str(tmp_path / "trl"), learning_rate=1e-3, lr_scheduler_type="constant", max_steps=10, per_device_train_batch_size=6,
            weight_decay=0.0, center_rewards_coefficient=0.05, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            logging_steps=1, save_strategy="no", disable_tqdm=True), train_dataset=datasets.Dataset.from_list(PAIRS), processing_class=TOKENIZER)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in history] == pytest.approx(losses, abs=2e-4)
    assert (flat(mine.model) - flat(theirs)).abs().max() < 2e-4
    save_reward_model(mine, tmp_path / "end")
    assert torch.equal(flat(load_reward_model(tmp_path / "end")), flat(mine))


# --- reward model ---------------------------------------------------------------------------------------------------------

def test_reward_is_read_at_the_last_real_token_whatever_the_padding_is():
    model = reward_model_from(tiny(**GQA)).eval()
    rows = [e[side] for e in encode_pairs(TOKENIZER, PAIRS[:3]) for side in ("chosen", "rejected")]
    rows[1] = rows[1][:-1]  # cut off: it ends without an end token
    rows[2] = [*rows[2][:4], EOS, PAD, *rows[2][4:]]  # both tokens inside, as real ones
    width = max(map(len, rows)) + 2
    with torch.no_grad():
        alone = torch.cat([model({"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)})
                           for row in rows])
        for left in (True, False):
            for pad in (PAD, EOS, 77):
                fill = lambda row, x, left=left: [x] * (width - len(row)) + row if left else row + [x] * (width - len(row))
                batch = {"input_ids": torch.tensor([fill(r, pad) for r in rows]),
                         "attention_mask": torch.tensor([fill([1] * len(r), 0) for r in rows])}
                assert_close(model(batch), alone, rtol=0, atol=1e-5)
    assert len({round(float(x), 4) for x in alone}) == 6


def test_reward_model_of_16_bit_and_of_adapters(tmp_path):
    half = reward_model_from(tiny(**GQA).bfloat16())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    batch = PairBatches(encode_pairs(TOKENIZER, PAIRS), 6, PAD).collate([0, 1])
    assert half(batch).dtype == torch.float32
    wrapped = get_peft_model(tiny(**GQA), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    merged = reward_model_from(wrapped)
    with torch.no_grad():
        a = merged.model.model(batch["input_ids"]).last_hidden_state
        b = wrapped.get_base_model().get_decoder()(batch["input_ids"]).last_hidden_state
    assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert all(p.requires_grad for p in merged.parameters()) and hasattr(wrapped, "disable_adapter")


def test_train_reward_model_resumes_bit_equal_and_refuses_other_pairs(tmp_path):
    config = replace(CONFIG, max_steps=8, save_every=3)
    train = lambda pairs=PAIRS, **kw: train_reward_model(tiny(**GQA), TOKENIZER, pairs, config, micro_batch_size=2, **kw)
    want, _ = train()

    def stop(model, batch):
        stop.calls += 1
        if stop.calls == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return reward_loss(model, batch)
    stop.calls = 0
    first = reward_model_from(tiny(**GQA), PAD)
    layout = PairBatches(encode_pairs(TOKENIZER, PAIRS), 2, PAD, seed=config.seed)
    assert fit(first, layout, stop, config, run_dir=tmp_path).interrupted
    got, result = train(run_dir=tmp_path, resume=True)
    assert result.step == 8 and torch.equal(flat(got), flat(want))
    with pytest.raises(ResumeError, match="was made with data"):
        train(PAIRS[:-1] + [{**PAIRS[-1], "chosen": " in Rome."}], run_dir=tmp_path, resume=True)


@pytest.mark.parametrize("change, message", [
    ({"rejected": PAIRS[2]["chosen"]}, "pair 2: both answers are the same"),
    ({"rejected": ""}, "pair 2: the rejected answer is empty"),
    ({"prompt": "Cleo " * 300}, r"pair 2: prompt and chosen answer have \d+ tokens, max_length is 256"),
])
def test_bad_pairs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        train_reward_model(tiny(), TOKENIZER, [*PAIRS[:2], {**PAIRS[2], **change}], CONFIG)


# --- rollouts --------------------------------------------------------------------------------------------------------------

def test_sampling_ignores_the_models_own_generation_config_and_leaves_it_and_the_generators_alone():
    model = tiny(**GQA)
    prompts = [TOKENIZER(p["prompt"]).input_ids for p in PROMPTS]
    want = sample(model, TOKENIZER, prompts, 8, seed=3)
    model.generation_config.update(do_sample=False, top_k=1, temperature=0.1, repetition_penalty=9.0, max_new_tokens=2)
    before, state, mode = model.generation_config.to_dict(), torch.random.get_rng_state(), model.train().training
    assert [r.answer for r in sample(model, TOKENIZER, prompts, 8, seed=3)] == [r.answer for r in want]
    assert model.generation_config.to_dict() == before and torch.equal(torch.random.get_rng_state(), state) and model.training == mode


def test_dropout_is_refused_in_words_before_anything_is_trained():
    model = tiny(attention_dropout=0.3)
    before = flat(model)
    with pytest.raises(RolloutError, match="usual causes are dropout"):
        train_grpo(model, TOKENIZER, PROMPTS, distinct, replace(CONFIG, epochs=1, max_steps=None), sampling=Sampling(2, 2, 6))
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.float32), ("fp32", torch.bfloat16)])
def test_sixteen_bit_runs_agree_with_their_rollouts(precision, dtype):
    model = tiny(**GQA).to(dtype)
    config = replace(CONFIG, precision=precision, epochs=2, max_steps=None)
    _, result = train_ppo(model, TOKENIZER, PROMPTS, distinct, config, sampling=Sampling(4, 2, 8, micro_batch_size=3))
    assert next(model.parameters()).dtype == dtype
    assert result.history[0]["approx_kl"] < 1e-3 and all(math.isfinite(row["loss"]) for row in result.history)


def _nan(completions, **c):
    return [math.nan if n == 5 else 1.0 for n in range(len(completions))]


def _raises(completions, **c):
    if any("x" not in text and n == 3 for n, text in enumerate(completions)):
        raise KeyError("no such city")
    return [0.0] * len(completions)


def _short(completions, **c):
    return [0.0] * (len(completions) - 1)


@pytest.mark.parametrize("train", [train_ppo, train_grpo])
@pytest.mark.parametrize("reward, message", [
    (_nan, r"reward function _nan returned nan for answer 5 \(to prompt \d\)"),
    (_raises, r"reward function _raises raised KeyError: 'no such city', on 6 answers together"),
    (_short, "reward function _short returned 5 rewards for 6 answers")])
def test_failing_rewards_are_named(train, reward, message):
    with pytest.raises(RewardError, match=message):
        train(tiny(), TOKENIZER, PROMPTS, reward, replace(CONFIG, epochs=1, max_steps=None), sampling=Sampling(3, 2, 6))


def test_a_reward_that_fails_later_costs_no_step_and_the_run_goes_on_bit_equal(tmp_path):
    config, plan = replace(CONFIG, epochs=4, max_steps=None), Sampling(4, 2, 8, passes=2, micro_batch_size=3)
    run = lambda model, reward, **kw: train_grpo(model, TOKENIZER, PROMPTS, reward, config, sampling=plan, **kw)
    want = tiny(**GQA)
    run(want, distinct)
    calls = []

    def fails_third_time(completions, want, **columns):
        calls.append(1)
        return [None if n else "?" for n in range(len(completions))] if len(calls) == 3 else distinct(completions, want)
    fails_third_time.__name__ = "distinct"
    with pytest.raises(RewardError, match=r"returned '\?' for answer 0"):
        run(tiny(**GQA), fails_third_time, run_dir=tmp_path)
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step_00000012"
    got = tiny(**GQA)
    _, result = run(got, distinct, run_dir=tmp_path, resume=True)
    assert result.step == 24 and torch.equal(flat(got), flat(want))


def test_answers_without_a_reward_teach_grpo_nothing_and_stop_ppo():
    partly = lambda completions, **c: [None if n % 2 else float(n) for n in range(len(completions))]
    config = replace(CONFIG, epochs=1, max_steps=None)
    model = tiny()
    sampler = Sampler(model, TOKENIZER, PROMPTS, [partly], Sampling(2, 4, 6))
    layout = GroupRollouts(sampler, lambda b: (target_logps(model, b),), beta=0.0, correct_kl=True, loss_type="grpo", scale=False,
                           clip_eps=0.2, clip_eps_high=None)
    layout.plan(0)
    assert [float(r.fields["advantages"][0]) for r in layout._rollouts] == [-1, 0, 1, 0, -1, 0, 1, 0]
    with pytest.raises(RewardError, match=r"answer 1 \(to prompt \d\) has no reward"):
        train_ppo(tiny(), TOKENIZER, PROMPTS, partly, config, sampling=Sampling(4, 2, 6))


@pytest.mark.parametrize("train, settings, message", [
    (train_ppo, {"ref": "copy"}, "ref must be a model or None, got 'copy'"),
    (train_ppo, {"kl_coef": -1.0}, "kl_coef must be finite and not negative, got -1.0"),
    (train_ppo, {"value": "head"}, "value must be 'shared', 'separate' or a RewardModel, got 'head'"),
    (train_grpo, {"loss_type": "ppo"}, "loss_type must be one of grpo, dapo, dr_grpo, rloo, got 'ppo'"),
    (train_grpo, {"sampling": Sampling(group_size=1)}, "a group needs two answers or more, got group_size=1"),
    (train_grpo, {"reward_weights": [1.0, 2.0]}, "1 rewards and 2 reward_weights")])
def test_bad_settings_are_named(train, settings, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(), TOKENIZER, PROMPTS, distinct, CONFIG, **settings)


def test_bad_prompts_and_bad_reward_models_are_named():
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        train_ppo(tiny(), TOKENIZER, ["Ada", ""], distinct, CONFIG)
    with pytest.raises(ValueError, match=r"prompt 0 has \d+ tokens, and only 192 fit beside the answer"):
        train_ppo(tiny(), TOKENIZER, ["Ada lives " * 200], distinct, CONFIG)
    from llm_train_course.core import tiny_llama
    other = reward_model_from(tiny_llama(77, hidden_size=32))
    with pytest.raises(ValueError, match="the reward model has a vocabulary of 77 tokens, the policy one of 320"):
        train_ppo(tiny(), TOKENIZER, PROMPTS, other, CONFIG)
    with pytest.raises(ValueError, match="LlamaForCausalLM is no reward model"):
        RewardModel(tiny())


# --- training --------------------------------------------------------------------------------------------------------------

PLAN = Sampling(prompts_per_iteration=3, group_size=2, max_new_tokens=8, passes=2, micro_batch_size=4)
PPO_RUN = replace(CONFIG, epochs=3, max_steps=None, save_every=1, keep_checkpoints=40, grad_accum_steps=2)


def _ppo(model, value="shared", **kw):
    kl = {"kl_coef": 0.1, "kl_target": 0.01}
    return train_ppo(model, TOKENIZER, PROMPTS, distinct, PPO_RUN, sampling=PLAN, value=value, value_clip=0.2, lam=0.9, **kl, **kw)


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_ppo_resumes_bit_equal_from_every_checkpoint(tmp_path, value):
    "In the middle of an iteration the answers come back with it, and so does the coefficient that follows the KL."
    want, result = _ppo(tiny(**GQA), value, run_dir=tmp_path)
    assert result.step == 6 and len({row["kl_coef"] for row in result.history}) == 3
    for step in (5, 4, 1):
        for newer in (tmp_path / "checkpoints").glob("step_*"):
            if newer.name > f"step_{step:08d}":
                shutil.rmtree(newer)
        got, again = _ppo(tiny(**GQA), value, run_dir=tmp_path, resume=True)
        assert torch.equal(flat(got), flat(want))
        assert again.history[-1]["kl_coef"] == result.history[-1]["kl_coef"]
    assert (tmp_path / "value" / ("value_head.safetensors" if value == "shared" else "model.safetensors")).is_file()
    with pytest.raises(ResumeError, match="batches.gamma"):
        _ppo(tiny(**GQA), value, run_dir=tmp_path, resume=True, gamma=0.5)
    with pytest.raises(ResumeError, match="batches.reference"):  # another policy to begin with
        _ppo(tiny(3, **GQA), value, run_dir=tmp_path, resume=True)


def test_a_run_killed_at_random_moments_resumes_bit_equal(tmp_path, monkeypatch):
    from llm_train_course import rlhf
    want, _ = _ppo(tiny(**GQA))

    def run(counted):
        rlhf.ppo_loss = counted(rlhf.ppo_loss)
        _ppo(tiny(**GQA), run_dir=tmp_path, resume=True)

    killed_until_done(run, (2, 40), least=2)
    got, _ = _ppo(tiny(**GQA), run_dir=tmp_path, resume=True)
    assert torch.equal(flat(got), flat(want))


def _logged(result):
    return {row["iteration"]: row for row in result.history}


@pytest.mark.parametrize("kind", ["own", "peft"])
def test_with_adapters_the_base_is_the_reference_and_stays_as_it_was(tmp_path, kind):
    base = tiny(**GQA)
    torch.manual_seed(0)
    if kind == "own":
        policy = copy.deepcopy(base)
        add_lora(policy, r=3, alpha=12.0, targets=["q_proj", "down_proj"])
    else:
        policy = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"], lora_dropout=0.0))
    config = replace(CONFIG, learning_rate=2e-2, epochs=3, max_steps=None)
    _, result = train_grpo(policy, TOKENIZER, PROMPTS, distinct, config, sampling=PLAN, beta=0.01)
    rows = _logged(result)
    assert abs(rows[0]["kl"]) < 1e-4 and abs(rows[2]["kl"]) > 1e-3
    ids = torch.arange(20).view(2, 10) + 5
    with torch.no_grad(), adapter_off(policy) as ref:
        assert torch.equal(ref(ids).logits, base(ids).logits)
    with torch.no_grad():
        trained = policy.eval()(ids).logits
    assert not torch.equal(trained, base(ids).logits)
    # what comes out is an adapter: loaded again, the same policy
    if kind == "own":
        save_adapter(policy, tmp_path / "adapter")
        again = copy.deepcopy(base)
        load_adapter(again, tmp_path / "adapter")
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
        assert_close(theirs(ids).logits, trained, rtol=1e-4, atol=1e-5)
    else:
        policy.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert_close(again(ids).logits, trained, rtol=1e-4, atol=1e-5)


def test_ppo_with_adapters_trains_them_and_the_value_head_only():
    policy = tiny(**GQA)
    add_lora(policy, r=2, alpha=6.0)
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    model, _ = train_ppo(policy, TOKENIZER, PROMPTS, distinct, replace(PPO_RUN, save_every=None), sampling=PLAN)
    changed = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in n for n in changed) and model.value.weight.abs().sum() > 0


def test_a_reward_model_rewards_and_starts_the_critic_and_is_not_trained():
    trained = reward_model_from(tiny(4, **GQA), PAD)
    before = flat(trained)
    model, result = train_ppo(tiny(**GQA), TOKENIZER, PROMPTS, trained, replace(PPO_RUN, save_every=None), sampling=PLAN, value=trained)
    assert torch.equal(flat(trained), before) and not torch.equal(flat(model.value), before)
    assert math.isfinite(result.history[-1]["reward"])


def test_ppo_learns_a_preference_and_reports_every_iteration():
    config = TrainConfig(learning_rate=3e-3, schedule="constant", epochs=12, progress=False, cpu=True)
    share = text_reward(lambda text: text.count("a") / (1 + len(text)))
    _, result = train_ppo(tiny(initializer_range=0.05), TOKENIZER, PROMPTS, share, config, kl_coef=0.0,
                          sampling=Sampling(64, 1, 8, passes=2, micro_batch_size=32))
    rows = _logged(result)
    assert sorted(rows) == list(range(12)) and rows[11]["reward"] > 2 * rows[0]["reward"]
    for name in ("reward", "kl", "kl_k3", "entropy", "length", "finished", "clip_fraction", "explained_variance", "kl_coef", "approx_kl"):
        assert math.isfinite(rows[5][name])
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4) and rows[11]["kl"] > 0.05 and rows[0]["entropy"] > rows[11]["entropy"]


def test_value_of_an_action_is_read_before_it():
    policy = tiny(**GQA)
    model = ActorCritic(policy)
    nn.init.normal_(model.value.weight)
    sampler = Sampler(policy, TOKENIZER, PROMPTS, [distinct], PLAN)
    layout = PPORollouts(sampler, model, kl_coef=0.0, kl_target=None, gamma=1.0, lam=1.0, clip_eps=0.2, value_clip=None, value_coef=1.0,
                         whiten=False)
    layout.plan(0)
    for r in layout._rollouts:
        ids = r.prompt + r.answer
        for t in range(len(r.answer)):  # the critic must not see what the action is
            before = torch.tensor([ids[:len(r.prompt) + t]])
            with torch.no_grad():
                state = policy.get_decoder()(before).last_hidden_state[0, -1]
                assert float(model.value(state)) == pytest.approx(float(r.fields["old_values"][t]), abs=1e-4)
        assert_close(r.fields["advantages"] + r.fields["old_values"], torch.full((len(r.answer),), r.reward))  # lam = 1, no KL


# --- two processes ----------------------------------------------------------------------------------------------------------

def _fails_the_second_time(fails):
    calls = []

    def reward(completions, want, **columns):
        calls.append(1)
        return [math.nan] * len(completions) if fails and len(calls) == 2 else distinct(completions, want)
    reward.__name__ = "distinct"  # a resumed run asks for the same name
    return reward


def _worker(rank, folder):
    config, out = replace(CONFIG, epochs=3, max_steps=None), {}
    for name, train in (("grpo", train_grpo), ("ppo", train_ppo)):
        run = lambda m, r, train=train, **kw: train(m, TOKENIZER, PROMPTS, r, config, sampling=PLAN, **kw)[1]
        whole, again, error = tiny(**GQA), tiny(**GQA), ""
        result = run(whole, distinct)
        try:
            run(tiny(**GQA), _fails_the_second_time(rank == 1), run_dir=f"{folder}/{name}")
        except (RewardError, RolloutError) as e:
            error = f"{type(e).__name__}: {e}"
        run(again, distinct, run_dir=f"{folder}/{name}", resume=True)
        out[name] = {"weights": flat(whole), "equal": torch.equal(flat(whole), flat(again)), "error": error, "steps": result.step,
                     "reward": [row["reward"] for row in result.history]}
    torch.save(out, f"{folder}/{rank}.pt")


def test_two_processes_share_the_answers_fail_together_and_resume(tmp_path):
    on_two_ranks(_worker, tmp_path, start_method="fork")  # no second import of torchrl and TRL
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in ("grpo", "ppo"):
        assert torch.equal(a[name]["weights"], b[name]["weights"]) and a[name]["reward"] == b[name]["reward"]
        assert a[name]["equal"] and b[name]["equal"] and a[name]["steps"] == 6
        assert b[name]["error"].startswith("RewardError: reward function distinct returned nan for answer")
        assert a[name]["error"].startswith("RolloutError: rank 1 failed: RewardError: reward function distinct returned nan")
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert {row["iteration"] for row in rows} == {0, 1, 2}


@pytest.mark.cuda
def test_ppo_on_a_gpu_agrees_with_its_rollouts_and_resumes(tmp_path):
    config = replace(PPO_RUN, cpu=False, precision="bf16")
    _, result = train_ppo(tiny(**GQA), TOKENIZER, PROMPTS, distinct, config, sampling=PLAN, run_dir=tmp_path)
    assert torch.cuda.is_available() and result.history[0]["approx_kl"] < 1e-2
