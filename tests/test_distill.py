"Chapter 7: the losses, the chunked kernel, top-k tables, live text, and equality with TRL."
import copy
import itertools
import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONFIG, ROWS, SENTENCES, TOKENIZER, flat, killed_until_done, on_two_ranks
from helpers import model as tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from llm_train_course import core, distill
from llm_train_course.core import IGNORE, PackedBatches, PaddedBatches, ResumeError, adamw, fit
from llm_train_course.distill import (
    Rollouts,
    TopKBatches,
    VocabularyMismatch,
    acceptance_rate,
    check_vocabulary,
    distill_loss,
    distill_objective,
    encode_prompts,
    generalized_jsd,
    linear_distill,
    linear_top_k,
    speculative_tokens,
    student_from_layers,
    teacher_top_k,
    top_k_divergence,
    top_k_examples,
    train_distill,
    write_completions,
)
from llm_train_course.lora import add_lora, lora_layers
from llm_train_course.qlora import quantize_model

few = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
betas = st.sampled_from([0.0, 0.05, 0.5, 0.8, 1.0])
temperatures = st.sampled_from([0.5, 1.0, 3.0])
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
STARTS = [s[:9] for s in SENTENCES]


@pytest.fixture(scope="module")
def teacher():
    "Wider, deeper, with grouped queries, and it knows the sentences somewhat."
    m = core.tiny_llama(len(TOKENIZER), hidden_size=64, n_layers=4, n_kv_heads=2, seed=7)
    fit(m, PaddedBatches(ROWS, 9), config=replace(CONFIG, max_steps=25))
    return m.eval()


def draw(n, dtype=torch.float32, seed=0, H=20, H_t=33, V=57):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g).to(dtype)
    return r(n, H), r(V, H) / 2, r(n, H_t), r(V, H_t) / 3, torch.randint(0, V, (n,), generator=g), r(n)


def grads(fn, up, *leaves):
    mine = [x.detach().clone().requires_grad_() for x in leaves]
    y = fn(*mine)
    y.backward(torch.as_tensor(up, dtype=y.dtype) if not torch.is_tensor(up) else up.to(y.dtype))
    return [y.detach(), *[x.grad for x in mine]]


# --- losses ----------------------------------------------------------------------------------------------------------


@few
@given(st.integers(2, 40), betas, temperatures, st.integers(0, 99), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_jsd_is_a_divergence(V, beta, T, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    z, t = torch.randn(5, V, generator=g).to(dtype), (3 * torch.randn(5, V, generator=g)).to(dtype)
    value = generalized_jsd(z, t, beta, T)
    tol = 1e-6 if dtype != torch.float64 else 1e-12
    assert (value >= -tol).all()
    assert_close(generalized_jsd(t + 3, t, beta, T), torch.zeros_like(value), rtol=0, atol=1e-5 if dtype != torch.bfloat16 else 0.1)
    order = torch.randperm(V, generator=g)  # names of classes do not matter
    assert_close(generalized_jsd(z[:, order], t[:, order], beta, T), value, rtol=1e-5, atol=1e-6)
    if 0 < beta < 1:  # bounded by the entropy of the choice between the two
        assert (value <= -beta * math.log(beta) - (1 - beta) * math.log1p(-beta) + tol).all()
        assert_close(generalized_jsd(t, z, 1 - beta, T), value, rtol=1e-4, atol=1e-6)
    else:
        p, q = (x.double() / T for x in ((t, z) if beta == 0 else (z, t)))
        want = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q))
        assert_close(value.double(), want, rtol=1e-4, atol=1e-5)


def test_gradients_agree_with_finite_differences():
    g = torch.Generator().manual_seed(1)
    z, t = torch.randn(3, 6, generator=g, dtype=torch.float64, requires_grad=True), torch.randn(3, 6, generator=g, dtype=torch.float64)
    for beta, T in itertools.product((0.0, 0.3, 1.0), (1.0, 2.0)):
        assert torch.autograd.gradcheck(lambda a, beta=beta, T=T: generalized_jsd(a, t, beta, T), z)
        value, grad = distill._jsd_and_grad((z.detach() / T).log_softmax(-1), (t / T).log_softmax(-1), beta)
        numeric = torch.autograd.functional.jacobian(lambda a, beta=beta, T=T: generalized_jsd(a, t, beta, T).sum(), z.detach())
        assert_close(grad / T, numeric)


def test_confident_models_do_not_make_nan():
    "One-hot to the last bit on both sides, and on different tokens."
    z, t = torch.full((2, 9), -200.0), torch.full((2, 9), -200.0)
    z[:, 0], t[:, 1] = 200.0, 200.0
    for beta in (0.0, 0.5, 1.0):
        value, grad = grads(lambda a, beta=beta: generalized_jsd(a, t, beta).sum(), 1.0, z)
        assert value.isfinite() and grad.isfinite().all()
        _, by_hand = distill._jsd_and_grad(z.log_softmax(-1), t.log_softmax(-1), beta)
        assert by_hand.isfinite().all()
    assert_close(generalized_jsd(z, t, 0.5), torch.full((2,), math.log(2)))
    for k in (1, 4):
        logs, ids = teacher_top_k(t, k)  # a rest of no mass at all
        for rest in ("bucket", "renormalise"):
            value, grad = grads(lambda a, logs=logs, ids=ids, rest=rest: top_k_divergence(a, logs, ids, rest).sum(), 1.0, z)
            assert value.isfinite() and grad.isfinite().all(), (k, rest)


def test_top_k_gradient_by_hand_survives_a_student_without_a_rest():
    "A confident student and a flat teacher: the student's own rest underflows."
    z, t = torch.full((3, 9), -150.0), torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    z[:, 0] = 0.0
    z[2] = -z[2]
    for k, rest in itertools.product((1, 4), ("bucket", "renormalise")):
        logs, ids = teacher_top_k(t, k)
        value, grad = distill._top_k_and_grad(z.log_softmax(-1), logs, ids, rest)
        expected = grads(lambda a, logs=logs, ids=ids, rest=rest: top_k_divergence(a, logs, ids, rest).sum(), 1.0, z)
        assert grad.isfinite().all()
        assert_close((value.sum(), grad), tuple(expected), rtol=1e-5, atol=1e-5)


def test_distill_loss_against_a_literal_formula():
    g = torch.Generator().manual_seed(2)
    z, t, y = torch.randn(4, 3, 8, generator=g), torch.randn(4, 3, 8, generator=g), torch.randint(0, 8, (4, 3), generator=g)
    y[0], y[2, 1] = IGNORE, IGNORE
    total, n = 0.0, 0
    for b, s in itertools.product(range(4), range(3)):
        if y[b, s] == IGNORE:
            continue
        q1 = [math.exp(v) for v in z[b, s].tolist()]
        qT, pT = ([math.exp(v / 3) for v in x[b, s].tolist()] for x in (z, t))
        p = [v / sum(pT) for v in pT]
        kl = sum(a * math.log(a / (c / sum(qT))) for a, c in zip(p, qT))
        total += 0.2 * -math.log(q1[y[b, s]] / sum(q1)) + 0.8 * 9 * kl
        n += 1
    assert float(distill_loss(z, t, y, 0.2, 3.0)) == pytest.approx(total / n, rel=1e-5)
    leaf = t.requires_grad_()
    distill_loss(z.requires_grad_(), leaf, y, 0.2, 3.0).backward()
    assert leaf.grad is None and (z.grad[0] == 0).all()


def test_bad_settings_are_named():
    z = torch.zeros(2, 5)
    for fn, message in ((lambda: generalized_jsd(z, z, 1.5), "beta must be in .0, 1., got 1.5"),
                        (lambda: generalized_jsd(z, z, 0.5, math.inf), "temperature must be positive and finite, got inf"),
                        (lambda: distill_loss(z, z, torch.zeros(2), math.nan, 1.0), "alpha must be in .0, 1., got nan"),
                        (lambda: distill_loss(z, z, torch.zeros(3), 0.5, 1.0), r"labels must be \(2,\)"),
                        (lambda: generalized_jsd(z, z[:1]), "logits of one shape, got"),
                        (lambda: acceptance_rate(z, z[:, :4]), "their vocabularies differ"),
                        (lambda: linear_distill(z, torch.zeros(7, 5), z, torch.zeros(8, 5), torch.zeros(2)), "student has 7 tokens, the teacher 8"),
                        (lambda: linear_top_k(z, torch.zeros(7, 5), z, z, torch.zeros(2), rest="x"), "rest must be"),
                        (lambda: speculative_tokens(1.1, 3), "acceptance must be in"),
                        (lambda: teacher_top_k(z, 0), "k must be from 1 to 4")):
        with pytest.raises(ValueError, match=message):
            fn()


# --- chunked ---------------------------------------------------------------------------------------------------------


@few
@given(st.integers(0, 30), st.integers(1, 40), st.sampled_from([0.0, 0.3]), betas, temperatures, st.booleans())
def test_chunked_equals_naive(n, chunk, alpha, beta, T, uniform):
    h, w, t_h, t_w, y, up = draw(n, seed=n)
    up = torch.full_like(up, 0.7) if uniform else up
    plain = lambda a, b: (alpha * F.cross_entropy(a @ b.T, y, reduction="none")
                          + (1 - alpha) * T**2 * generalized_jsd(a @ b.T, t_h @ t_w.T, beta, T))
    assert_close(grads(lambda a, b: linear_distill(a, b, t_h, t_w, y, alpha, beta, T, chunk, uniform)[0], up, h, w),
                 grads(plain, up, h, w), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_chunked_with_one_side_frozen(frozen):
    h, w, t_h, t_w, y, up = draw(13)
    both = grads(lambda a, b: linear_distill(a, b, t_h, t_w, y, 0.2, 0.5, 2.0, 5)[0], up, h, w)
    a, b = h.clone().requires_grad_(frozen != "hidden"), w.clone().requires_grad_(frozen != "weight")
    linear_distill(a, b, t_h, t_w, y, 0.2, 0.5, 2.0, 5)[0].backward(up)
    free, want, none = (b, both[2], a) if frozen == "hidden" else (a, both[1], b)
    assert_close(free.grad, want)
    assert none.grad is None


def test_only_the_loss_has_a_gradient_and_the_parts_add_up():
    h, w, t_h, t_w, y, _ = draw(13)
    t_h, t_w = t_h.requires_grad_(), t_w.requires_grad_()
    loss, ce, value = linear_distill(h.requires_grad_(), w, t_h, t_w, y, 0.25, 0.5, 3.0, 4)
    assert loss.requires_grad and not ce.requires_grad and not value.requires_grad
    assert_close(loss, 0.25 * ce + 0.75 * 9 * value)
    loss.sum().backward()
    assert t_h.grad is None and t_w.grad is None
    with torch.no_grad():
        assert_close(linear_distill(h, w, t_h, t_w, y, 0.25, 0.5, 3.0, 4)[0], loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("uniform", [False, True])
def test_half_precision_rounds_no_more_than_naive(dtype, uniform):
    h, w, t_h, t_w, y, up = draw(48, dtype, V=301)
    up = torch.ones(48)
    exact = grads(lambda a, b: generalized_jsd(a @ b.T, t_h.float() @ t_w.float().T, 0.5), up, h.float(), w.float())
    plain = grads(lambda a, b: generalized_jsd(a @ b.T, t_h @ t_w.T, 0.5), up, h, w)
    ours = grads(lambda a, b: linear_distill(a, b, t_h, t_w, y, 0.0, 0.5, 1.0, 7, uniform)[0], up, h, w)
    assert ours[1].dtype == ours[2].dtype == dtype and ours[0].dtype == torch.float32
    for a, b, c in zip(ours, plain, exact):
        off, allowed = ((x.float() - c).norm() / c.norm() for x in (a, b))
        assert off <= max(1.3 * allowed, 2e-3)


def test_autocast_computes_in_bfloat16():
    h, w, t_h, t_w, y, _ = draw(17)
    with torch.autocast("cpu", torch.bfloat16):
        got = grads(lambda a, b: linear_distill(a, b, t_h, t_w, y, 0.1, 0.0, 2.0, 5, True)[0].sum(), 1.0, h, w)
    want = grads(lambda a, b: linear_distill(a, b, t_h, t_w, y, 0.1, 0.0, 2.0, 5, True)[0].sum(), 1.0, h, w)
    assert got[1].dtype == torch.float32 and not torch.equal(got[1], want[1])
    assert_close(got, want, rtol=0.1, atol=0.1)


# --- top-k -----------------------------------------------------------------------------------------------------------


@few
@given(st.integers(2, 30), st.data(), temperatures, st.integers(0, 99))
def test_top_k_bounds(V, data, T, seed):
    k = data.draw(st.integers(1, V - 1))
    g = torch.Generator().manual_seed(seed)
    z, t = torch.randn(4, V, generator=g), 3 * torch.randn(4, V, generator=g)
    logs, ids = teacher_top_k(t, k, T)
    p, q = (t / T).softmax(-1), (z / T).softmax(-1)
    rho = 1 - p.gather(-1, ids).sum(-1)
    assert_close(logs.exp().sum(-1), torch.ones(4))
    assert_close(logs[:, -1].exp(), rho, rtol=1e-3, atol=1e-5)
    full = generalized_jsd(z, t, 0.0, T)
    bucket, g_bucket = grads(lambda a: top_k_divergence(a, logs, ids, "bucket", T).sum(), 1.0, z)
    renorm, g_renorm = grads(lambda a: top_k_divergence(a, logs, ids, "renormalise", T).sum(), 1.0, z)
    g_full = (q - p) / T
    assert bucket <= full.sum() + 1e-4  # merging outcomes never raises a divergence
    off = [(x - g_full).abs().sum(-1) * T for x in (g_bucket, g_renorm)]
    assert (off[0] <= 2 * rho + 1e-5).all()
    assert_close(off[1], 2 * rho, rtol=1e-3, atol=1e-4)
    assert (g_bucket - g_full).gather(-1, ids).abs().max() < 1e-5  # nothing is wrong on the stored tokens


@pytest.mark.parametrize("rest", ["bucket", "renormalise"])
@pytest.mark.parametrize("uniform", [False, True])
def test_chunked_top_k_equals_naive(rest, uniform):
    h, w, t_h, t_w, y, up = draw(29)
    up = torch.full_like(up, -0.4) if uniform else up
    logs, ids = teacher_top_k(t_h @ t_w.T, 6, 2.0)
    plain = lambda a, b: 0.3 * F.cross_entropy(a @ b.T, y, reduction="none") + 0.7 * 4 * top_k_divergence(a @ b.T, logs, ids, rest, 2.0)
    assert_close(grads(lambda a, b: linear_top_k(a, b, logs, ids.int(), y, 0.3, rest, 2.0, 8, uniform)[0], up, h, w),
                 grads(plain, up, h, w), rtol=2e-4, atol=2e-5)


def test_a_table_of_all_but_one_trains_like_the_teacher(teacher):
    "The bucket of a single token is that token: ten steps from the table equal ten steps from the teacher."
    config = replace(CONFIG, max_steps=10)
    live, stored = tiny(), tiny()
    train_distill(live, teacher, PaddedBatches(ROWS, 4, PAD, seed=3), config, temperature=2.0, alpha=0.2)
    table = top_k_examples(teacher, ROWS, len(TOKENIZER) - 1, 2.0, micro_batch_size=2, chunk=5)
    train_distill(stored, None, TopKBatches(table, 4, 2.0, pad_id=PAD, seed=3), config, temperature=2.0, alpha=0.2)
    assert_close(flat(stored), flat(live), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_table_rows_follow_their_targets(teacher, side):
    holes = copy.deepcopy(ROWS)
    for n, row in enumerate(holes):  # holes in the middle, and an example without targets
        row["labels"] = [IGNORE if (n + t) % 3 == 0 or n == 4 else label for t, label in enumerate(row["labels"])]
    layout = TopKBatches(top_k_examples(teacher, holes, 3, micro_batch_size=4), 4, pad_id=PAD, side=side)
    for item in layout.plan(1):
        batch = layout.collate(item)
        mask = batch["labels"][:, 1:] != IGNORE
        with torch.no_grad():
            logits = teacher(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}).logits[:, :-1][mask]
        assert_close(batch["top_logps"], teacher_top_k(logits, 3)[0], rtol=1e-4, atol=1e-4)
        assert_close(batch["top_ids"].long(), teacher_top_k(logits, 3)[1])


def test_tables_are_checked(teacher):
    table = top_k_examples(teacher, ROWS, 3, 2.0)
    with pytest.raises(ValueError, match=r"example 1: \d+ targets need \d+ rows of top_ids and top_logps, got none; see top_k_examples"):
        TopKBatches([table[0], ROWS[1]], 2)
    with pytest.raises(ValueError, match=f"got {len(table[1]['top_ids'])}"):
        TopKBatches([{**table[0], "top_ids": table[1]["top_ids"]}], 2)
    layout = TopKBatches(table, 2, 2.0)
    with pytest.raises(ValueError, match="temperature=2.0 and beta=0, got temperature=1.0 and beta=0.0"):
        train_distill(tiny(), None, layout, CONFIG)
    with pytest.raises(ValueError, match="got temperature=2.0 and beta=1.0"):
        train_distill(tiny(), None, layout, CONFIG, temperature=2.0, beta=1.0)
    with pytest.raises(ValueError, match="only TopKBatches carry one"):
        train_distill(tiny(), None, ROWS, CONFIG)


# --- the objective ---------------------------------------------------------------------------------------------------


def naive(student, teacher, batch, alpha, beta, T):
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
    z, t = student(**inputs, use_cache=False).logits[:, :-1], teacher(**inputs, use_cache=False).logits[:, :-1].detach()
    y = batch["labels"][:, 1:]
    keep = y != IGNORE
    return alpha * F.cross_entropy(z[keep].float(), y[keep], reduction="sum") + (1 - alpha) * T**2 * generalized_jsd(z, t, beta, T)[keep].sum()


def parameter_grads(loss, model):
    model.zero_grad()
    loss.backward()
    return [loss.detach().float(), *[p.grad.clone() for p in model.parameters() if p.requires_grad]]


@pytest.mark.parametrize("layout", [PaddedBatches(ROWS, 4, side="left"), PaddedBatches(ROWS, 4), PackedBatches(ROWS, 2, 48)],
                         ids=["left", "right", "packed"])
def test_objective_equals_naive_on_every_layout(teacher, layout):
    student = tiny()
    for item in layout.plan(0):
        batch = layout.collate(item)
        batch["labels"][-1] = IGNORE
        assert_close(parameter_grads(distill_objective(teacher, 0.3, 0.5, 2.0, chunk=7)(student, batch)[0], student),
                     parameter_grads(naive(student, teacher, batch, 0.3, 0.5, 2.0), student), rtol=1e-4, atol=1e-4)


def test_heads_that_are_no_plain_product(teacher):
    "A cap on the logits (Gemma), a bias: on either side, the naive way is taken and is right."
    from transformers import Gemma2Config, Gemma2ForCausalLM
    gemma = Gemma2ForCausalLM(Gemma2Config(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
                                           num_key_value_heads=1, intermediate_size=48, final_logit_softcapping=5.0, max_position_embeddings=64)).eval()
    batch = PaddedBatches(ROWS, 4).collate([0, 1, 2, 3])
    for student, master in ((gemma, teacher), (tiny(), gemma), (gemma, copy.deepcopy(gemma))):
        assert_close(parameter_grads(distill_objective(master, 0.3, 1.0, 2.0)(student, batch)[0], student),
                     parameter_grads(naive(student, master, batch, 0.3, 1.0, 2.0), student), rtol=1e-4, atol=1e-4)
    table = TopKBatches(top_k_examples(teacher, ROWS, 5), 4).collate([0, 1, 2, 3])
    mask = table["labels"][:, 1:] != IGNORE
    inputs = {k: table[k] for k in ("input_ids", "attention_mask", "position_ids")}
    want = top_k_divergence(gemma(**inputs).logits[:, :-1][mask], table["top_logps"], table["top_ids"].long()).sum()
    assert_close(distill_objective(None)(gemma, table)[0], want)


def test_batches_without_targets_have_a_loss_of_zero_with_a_graph(teacher):
    batch = PaddedBatches(ROWS, 3).collate([0, 1, 2])
    batch["labels"][:] = IGNORE
    values = parameter_grads(distill_objective(teacher, 0.3)(student := tiny(), batch)[0], student)
    assert all((v == 0).all() for v in values)


# --- TRL -------------------------------------------------------------------------------------------------------------


def for_trl(rows):
    batch = PaddedBatches(rows, len(rows), PAD, shuffle=False).collate(range(len(rows)))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask, "labels": batch["labels"], "prompts": ids, "prompt_attention_mask": mask}


TRL = dict(bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accum", [1, 2])
def test_ten_steps_equal_trl_gkd(teacher, tmp_path, accum):
    "Accumulation too: rows have different numbers of targets, and both divide by those of the whole global batch."
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # imported here: spawned ranks import this file, and need no TRL
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class InOrder(GKDTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    data = [ROWS[(4 * n) % len(ROWS)] for n in range(3 * accum * 10)]
    config = replace(CONFIG, max_steps=10, schedule="constant", grad_accum_steps=accum)
    ours, theirs = tiny(), tiny()
    history = train_distill(ours, teacher, PaddedBatches(data, 3, PAD, shuffle=False), config, beta=0.3).history
    optimizer = adamw(theirs, config)
    trainer = InOrder(
        theirs, copy.deepcopy(teacher), GKDConfig(str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=accum, max_steps=10,
                                                  lmbda=0.0, beta=0.3, max_grad_norm=config.max_grad_norm, **TRL),
        data_collator=for_trl, train_dataset=Dataset.from_list(data), processing_class=TOKENIZER,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)))
    trainer.train()
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    assert [r["loss"] for r in history] == pytest.approx(losses, rel=1e-3)
    assert (flat(ours) - flat(theirs)).norm() < 1e-3 * (flat(ours) - flat(tiny())).norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_ten_steps_equal_trl_distillation_trainer(teacher, tmp_path, beta):
    "The same answers of a student go through TRL's `_compute_loss` and through our objective. T = 2: TRL leaves T² out."
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer
    trainer = DistillationTrainer(
        model=tiny(), teacher_model=copy.deepcopy(teacher), args=DistillationConfig(str(tmp_path), beta=beta, temperature=2.0, per_device_train_batch_size=3, **TRL),
        train_dataset=Dataset.from_list([{"prompt": s} for s in STARTS]), processing_class=TOKENIZER)
    answers = write_completions(teacher, encode_prompts(TOKENIZER, STARTS), EOS, PAD, 8, seed=5)
    ours, theirs = tiny(), tiny()
    config = replace(CONFIG, max_steps=10, schedule="constant", max_grad_norm=None)
    layout = PaddedBatches([answers[(4 * n) % 9] for n in range(30)], 3, PAD, shuffle=False)
    history = train_distill(ours, teacher, layout, config, beta=beta, temperature=2.0).history
    optimizer, losses = adamw(theirs, config), []
    for item in layout.plan(0):
        rows = [layout.examples[n] for n in item]
        split = [sum(label == IGNORE for label in r["labels"]) for r in rows]
        width = [max(split), max(len(r["labels"]) - s for r, s in zip(rows, split))]
        parts = {f"{part}_{k}": torch.zeros(len(rows), width[part == "completion"], dtype=torch.long)
                 for part in ("prompt", "completion") for k in ("ids", "mask")}
        for n, (r, s) in enumerate(zip(rows, split)):  # prompts padded on the left, completions on the right, as TRL has them
            parts["prompt_ids"][n, width[0] - s:], parts["prompt_mask"][n, width[0] - s:] = torch.tensor(r["input_ids"][:s]), 1
            parts["completion_ids"][n, :len(r["input_ids"]) - s], parts["completion_mask"][n, :len(r["input_ids"]) - s] = torch.tensor(r["input_ids"][s:]), 1
        loss, _, n_valid = trainer._compute_loss(theirs, parts, None)
        optimizer.zero_grad()
        (4 * loss).backward()
        optimizer.step()
        losses.append(4 * float(loss.detach()))
    assert [r["loss"] for r in history] == pytest.approx(losses, rel=1e-3)
    assert (flat(ours) - flat(theirs)).norm() < 2e-3 * (flat(ours) - flat(tiny())).norm()


# --- live text -------------------------------------------------------------------------------------------------------


def test_sampling_follows_the_model(teacher):
    "First tokens of 4,000 samples against the model's own distribution, with the traps of a generation config set."
    wary = copy.deepcopy(teacher)
    wary.generation_config.update(top_k=1, top_p=0.1, repetition_penalty=5.0, do_sample=True)
    ids = encode_prompts(TOKENIZER, ["Ada"])[0]
    with torch.no_grad():
        p = teacher(torch.tensor([ids])).logits[0, -1].softmax(-1)
    rows = write_completions(wary, [ids] * 4000, EOS, PAD, 1, seed=1, batch_size=4000)
    counts = torch.bincount(torch.tensor([r["input_ids"][len(ids)] for r in rows]), minlength=len(p))
    common = p * 4000 > 20
    chi2 = float(((counts - 4000 * p) ** 2 / (4000 * p))[common].sum())
    assert common.sum() > 5 and chi2 < common.sum() + 5 * math.sqrt(2 * common.sum())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_models_own_generation_settings_change_nothing_and_stay(teacher, temperature):
    prompts = encode_prompts(TOKENIZER, STARTS)
    wary = copy.deepcopy(teacher)
    traps = dict(repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=4, num_beams=3, suppress_tokens=list(range(20, 90)), min_p=0.9, typical_p=0.1)
    wary.generation_config.update(**traps)
    write = lambda m: write_completions(m, prompts, EOS, PAD, 8, temperature=temperature, seed=2)
    assert write(wary) == write(teacher)
    assert all(getattr(wary.generation_config, name) == value for name, value in traps.items())


def test_bad_settings_of_a_run_are_named_before_it_starts(teacher):
    run = lambda data=STARTS, mode="on_policy", **kw: train_distill(tiny(), teacher, data, CONFIG, mode=mode, tokenizer=TOKENIZER, **kw)
    table = top_k_examples(core.tiny_llama(len(TOKENIZER) + 9, hidden_size=32), ROWS, len(TOKENIZER) + 5)
    for call, message in ((lambda: run(mode="logit"), "mode 'logit' needs a layout, or rows with input_ids and labels"),
                          (lambda: run(ROWS), "mode 'on_policy' needs prompts"), (lambda: run(prompts_per_epoch=-3), "prompts_per_epoch must be at least 1, got -3"),
                          (lambda: run(ROWS, "logit", student_share=0.5), "student_share are for on_policy"),
                          (lambda: train_distill(tiny(), None, TopKBatches(table, 3), CONFIG), "the table names token"),
                          (lambda: train_distill(tiny(), None, TopKBatches(top_k_examples(teacher, ROWS, 4), 3), CONFIG, eval_batches=PaddedBatches(ROWS, 3)),
                           "eval_batches must be TopKBatches too")):
        with pytest.raises(ValueError, match=message):
            call()


def test_writing_leaves_the_generators_and_the_mode_alone(teacher):
    m = tiny(attention_dropout=0.5).train()
    state = torch.random.get_rng_state()
    ids = encode_prompts(TOKENIZER, STARTS)
    a = write_completions(m, ids, EOS, PAD, 5, seed="x", batch_size=2)
    assert torch.equal(state, torch.random.get_rng_state()) and m.training
    assert a == write_completions(m, ids, EOS, PAD, 5, seed="x", batch_size=2)  # dropout was off


def test_end_token_is_kept_once_and_may_be_missing():
    m = tiny()
    ids = encode_prompts(TOKENIZER, STARTS)
    for row, prompt in zip(write_completions(m, ids, EOS, EOS, 300 - 256 + 8, seed=2), ids):  # pad == eos must not matter
        new = row["input_ids"][len(prompt):]
        assert EOS not in new[:-1] and row["labels"] == [IGNORE] * len(prompt) + new
        assert len(new) == 52 or new[-1] == EOS


def test_rollouts_are_used_by_every_prompt_in_turn(teacher):
    live = Rollouts(teacher, TOKENIZER, STARTS, 2, prompts_per_epoch=5, max_new_tokens=3)
    seen = [n for epoch in range(9) for n in live._chosen(epoch)]
    assert sorted(seen) == sorted([*range(9)] * 5)
    for epoch in range(3):
        plan = live.plan(epoch)
        assert len(plan) == live.plan_length(epoch) == 3
        assert sorted(n for _, rows in plan for n in rows) == [0, 1, 2, 3, 4]
        starts = {tuple(r["input_ids"][:len(p)]) for r, p in zip(live._now["rows"], [live._prompts[n] for n in live._chosen(epoch)])}
        assert starts <= {tuple(p) for p in live._prompts}
        assert set(live.report()) == {"rollout_tokens", "rollout_ended"} and 1 <= live.report()["rollout_tokens"] <= 3


def test_rollout_state_survives_a_file(teacher, tmp_path):
    from safetensors.torch import load_file, save_file
    live = Rollouts(teacher, TOKENIZER, STARTS, 2, prompts_per_epoch=4, max_new_tokens=5, fixed=PaddedBatches(ROWS, 2), student_share=0.6)
    plan = live.plan(3)
    state = live.state_dict()
    tensors = {k: v for k, v in state.items() if torch.is_tensor(v)}
    save_file(tensors, tmp_path / "t.safetensors")
    plain = json.loads(json.dumps({k: v for k, v in state.items() if k not in tensors}))
    again = Rollouts(tiny(), TOKENIZER, STARTS, 2, prompts_per_epoch=4, max_new_tokens=5, fixed=PaddedBatches(ROWS, 2), student_share=0.6)
    again.load_state_dict({**plain, **load_file(tmp_path / "t.safetensors")})
    assert again.plan(3) == plan
    for item in plan:
        assert_close(again.collate(item), live.collate(item))
    fresh = Rollouts(teacher, TOKENIZER, STARTS, 2)
    fresh.load_state_dict(Rollouts(teacher, TOKENIZER, STARTS, 2).state_dict())  # saved before anything was written
    assert fresh.plan(0)


def test_bad_rollouts_are_named(teacher):
    for kw, message in ((dict(prompts=[]), "no prompts"), (dict(prompts=["Ada", ""]), "prompt 1 is empty"),
                        (dict(max_new_tokens=255), r"prompt \d has \d+ tokens: with max_new_tokens=255 more than the context of 256"),
                        (dict(student_share=1.5), "student_share must be in"), (dict(student_share=0.5), "needs fixed rows"),
                        (dict(fixed=PaddedBatches(ROWS, 2)), "leaves nothing to do for fixed rows")):
        with pytest.raises(ValueError, match=message):
            Rollouts(teacher, TOKENIZER, **{"prompts": STARTS, "micro_batch_size": 2, **kw})


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", distill.MODES)
@pytest.mark.parametrize("four_bit", [False, True])
def test_every_mode_brings_the_student_nearer_and_leaves_the_teacher(teacher, mode, four_bit):
    master = copy.deepcopy(teacher).train()
    if four_bit:
        quantize_model(master)
    frozen, student = {n: p.clone() for n, p in master.state_dict().items() if torch.is_tensor(p)}, tiny()
    flags = [p.requires_grad for p in master.parameters()]
    config = replace(CONFIG, max_steps=40, epochs=50)
    gap = lambda: float(distill_objective(teacher)(student, PaddedBatches(ROWS, 9).collate(range(9)))[1]["divergence"])
    before = gap()
    data = ROWS if mode == "logit" else STARTS
    history = train_distill(student, master, data, config, mode=mode, tokenizer=TOKENIZER, micro_batch_size=9, max_new_tokens=12).history
    assert gap() < 0.8 * before
    assert all(torch.equal(p, frozen[n]) for n, p in master.state_dict().items() if n in frozen)
    assert master.training and [p.requires_grad for p in master.parameters()] == flags
    assert {"ce", "divergence"} <= set(history[0]) or mode == "sequence"


def test_teacher_has_no_dropout_while_it_teaches(teacher):
    noisy = tiny(n_layers=3, attention_dropout=0.9).train()
    want = [r["loss"] for r in train_distill(tiny(), copy.deepcopy(noisy).eval(), ROWS, CONFIG).history]
    assert [r["loss"] for r in train_distill(tiny(), noisy, ROWS, CONFIG).history] == want


def test_student_with_adapters(teacher):
    student = student_from_layers(teacher)
    add_lora(student, r=3, alpha=10)
    before = [p.clone() for p in student.parameters() if not p.requires_grad]
    gap = lambda: float(distill_objective(teacher)(student, PaddedBatches(ROWS, 9).collate(range(9)))[1]["divergence"])
    start = gap()
    train_distill(student, teacher, ROWS, replace(CONFIG, max_steps=20))
    assert gap() < start and len(lora_layers(student)) == 14
    assert all(torch.equal(a, b) for a, b in zip(before, [p for p in student.parameters() if not p.requires_grad]))


def test_text_crosses_vocabularies(teacher):
    "Sequence mode with a teacher of another vocabulary: its words are encoded anew, in prompts of both kinds."
    other = core.train_tokenizer(SENTENCES * 2, 290)
    master = core.tiny_llama(len(other), hidden_size=48, seed=3)
    fit(master, PaddedBatches([core.encode_prompt_completion(other, s[:9], s[9:]) for s in SENTENCES], 9), config=replace(CONFIG, max_steps=40))
    chat = [[{"role": "user", "content": s}] for s in STARTS]
    for prompts in (STARTS, chat):
        live = Rollouts(master, TOKENIZER, prompts, 3, renew=False, max_new_tokens=30, writer_tokenizer=other)
        live.plan(0)
        written = write_completions(master, [encode_prompts(other, prompts)[n] for n in live._chosen(0)], other.eos_token_id, other.pad_token_id, 30, seed="0 0 0")
        for n, row, theirs in zip(live._chosen(0), live._now["rows"], written):
            new = [i for i in row["labels"] if i != IGNORE]
            said = [i for i in theirs["labels"] if i != IGNORE]
            assert TOKENIZER.decode(new, skip_special_tokens=True) == other.decode(said, skip_special_tokens=True)
            assert (EOS in new) == (other.eos_token_id in said) and row["input_ids"][:3] == encode_prompts(TOKENIZER, prompts)[n][:3]
    student = tiny()
    history = train_distill(student, master, STARTS, replace(CONFIG, max_steps=30), mode="sequence", tokenizer=TOKENIZER, teacher_tokenizer=other).history
    assert history[-1]["loss"] < 0.75 * history[0]["loss"]
    with pytest.raises(VocabularyMismatch):  # with soft labels it does
        train_distill(student, master, STARTS, CONFIG, mode="sequence", alpha=0.5, tokenizer=TOKENIZER, teacher_tokenizer=other)


def test_pairs_that_cannot_work_are_refused(teacher):
    with pytest.raises(VocabularyMismatch, match=f"student predicts {len(TOKENIZER) + 9} tokens and the teacher {len(TOKENIZER)}"):
        train_distill(core.tiny_llama(len(TOKENIZER) + 9, hidden_size=32), teacher, ROWS, CONFIG)
    other = core.train_tokenizer(["quite other words, so other merges: zzz zzz zzz"] * 3, 320)
    with pytest.raises(VocabularyMismatch, match="tokens differ between the two tokenizers, such as "):
        check_vocabulary(tiny(), teacher, TOKENIZER, other)
    check_vocabulary(tiny(), teacher, TOKENIZER, copy.deepcopy(TOKENIZER))
    trainable = copy.deepcopy(teacher)
    with pytest.raises(ValueError, match=r"share \d+ trained parameters, such as model.embed_tokens.weight: the teacher would move too"):
        train_distill(trainable, trainable, ROWS, CONFIG)
    for kw, message in ((dict(mode="soft"), "mode must be one of logit, sequence, on_policy, got 'soft'"),
                        (dict(mode="sequence"), "mode 'sequence' needs the tokenizer"),
                        (dict(mode="on_policy", tokenizer=TOKENIZER, alpha=0.5), "alpha must be 0 for on_policy"),
                        (dict(temperature=-1.0), "temperature must be positive"), (dict(beta=2), "beta must be in")):
        with pytest.raises(ValueError, match=message):
            train_distill(tiny(), teacher, ROWS, CONFIG, **kw)


def test_a_run_is_not_resumed_with_another_teacher_or_loss(teacher, tmp_path):
    config = replace(CONFIG, max_steps=3, save_every=3)
    train_distill(tiny(), teacher, PaddedBatches(ROWS, 3), config, run_dir=tmp_path, beta=0.5)
    moved = copy.deepcopy(teacher)
    with torch.no_grad():
        moved.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ResumeError, match="batches.teacher"):
        train_distill(tiny(), moved, PaddedBatches(ROWS, 3), config, run_dir=tmp_path, beta=0.5, resume=True)
    with pytest.raises(ResumeError, match="batches.beta = 0.5, this run has 0.4"):
        train_distill(tiny(), teacher, PaddedBatches(ROWS, 3), config, run_dir=tmp_path, beta=0.4, resume=True)
    assert train_distill(tiny(), teacher, PaddedBatches(ROWS, 3), config, run_dir=tmp_path, beta=0.5, resume=True).step == 3


def live_run(student, teacher, config, **kw):
    return train_distill(student, teacher, STARTS, config, mode="on_policy", tokenizer=TOKENIZER, beta=1.0, micro_batch_size=2, max_new_tokens=6,
                         prompts_per_epoch=6, fixed=PaddedBatches(ROWS, 2, PAD), student_share=0.7, **kw)


def test_on_policy_run_killed_at_random_moments_is_bit_equal(teacher, tmp_path):
    config = replace(CONFIG, max_steps=10, save_every=1, epochs=20, grad_accum_steps=2)
    want = tiny(attention_dropout=0.2)
    live_run(want, teacher, config)
    killed_until_done(lambda counted: live_run(tiny(attention_dropout=0.2), teacher, config, run_dir=tmp_path, resume=True), (5, 60), least=2)
    got = tiny(attention_dropout=0.2)
    assert live_run(got, teacher, config, run_dir=tmp_path, resume=True).step == 10
    assert torch.equal(flat(got), flat(want))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 11)) and any("rollout_tokens" in r for r in rows)


def _worker(rank, folder):
    teacher, student = tiny(seed=5, n_layers=3), tiny()
    written = []
    original = distill.write_completions
    distill.write_completions = lambda m, prompts, *a, **k: written.append(len(prompts)) or original(m, prompts, *a, **k)
    rows = []
    plan = Rollouts.plan
    Rollouts.plan = lambda self, epoch=0: (plan(self, epoch), rows.append(copy.deepcopy(self._now["rows"])))[0]
    train_distill(student, teacher, STARTS, replace(CONFIG, max_steps=3, epochs=5), mode="on_policy", tokenizer=TOKENIZER, micro_batch_size=2, max_new_tokens=5)
    logit = tiny()
    train_distill(logit, teacher, PaddedBatches(ROWS, 1), CONFIG, temperature=2.0)
    torch.save({"weights": flat(student), "written": written, "rows": rows, "logit": flat(logit)}, f"{folder}/{rank}.pt")


def test_two_ranks_write_their_share_and_hold_the_same_rows(tmp_path):
    on_two_ranks(_worker, tmp_path)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert torch.equal(a["weights"], b["weights"]) and a["rows"] == b["rows"]
    assert (a["written"][0], b["written"][0]) == (5, 4)  # nine prompts
    prompts = encode_prompts(TOKENIZER, STARTS)
    assert sorted(tuple(r["input_ids"][:len(p)]) for r, p in zip(a["rows"][0], [prompts[n] for n in np.random.default_rng([0, 0, 2]).permutation(9)])) == sorted(map(tuple, prompts))
    one = tiny()  # logit mode: two ranks are one rank that accumulates twice
    train_distill(one, tiny(seed=5, n_layers=3), PaddedBatches(ROWS, 1), replace(CONFIG, grad_accum_steps=2), temperature=2.0)
    assert_close(a["logit"], flat(one), rtol=0, atol=3e-6)


# --- layers and drafts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
def test_student_from_layers_is_an_ordinary_model(family, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM
    kw = dict(vocab_size=61, hidden_size=32, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, head_dim=8,
              max_position_embeddings=64, pad_token_id=0)
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **kw)).eval()
    student = student_from_layers(teacher, [1, 2, 4])
    assert type(student) is type(teacher) and student.config.num_hidden_layers == 3 and teacher.config.num_hidden_layers == 5
    ids = torch.arange(14).view(2, 7) + 3
    with torch.no_grad():
        assert_close(student_from_layers(teacher, range(5))(ids).logits, teacher(ids).logits)
        student.save_pretrained(tmp_path)
        assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, student(ids).logits)
    assert student.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 10)
    if hasattr(teacher.config, "layer_types") and teacher.config.layer_types:
        assert student.config.layer_types == [teacher.config.layer_types[i] for i in (1, 2, 4)]
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.zero_()
    assert teacher.model.layers[1].mlp.up_proj.weight.abs().sum() > 0


def test_student_from_layers_names_what_is_wrong(teacher):
    for layers in ([], [3, 1], [0, 0], [4], [-1], [0.5]):
        with pytest.raises(ValueError, match="layers must be ascending numbers from 0 to 3, got"):
            student_from_layers(teacher, layers)
    for change in (quantize_model, lambda m: add_lora(m, 2, 4)):
        changed = copy.deepcopy(teacher)
        change(changed)
        with pytest.raises(ValueError, match="merge its adapters and put its weights back into full precision first"):
            student_from_layers(changed)
    from transformers import GPT2Config, GPT2LMHeadModel
    with pytest.raises(ValueError, match="GPT2LMHeadModel does not keep its 2 blocks in `.layers`"):
        student_from_layers(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=11)))
    assert student_from_layers(copy.deepcopy(teacher).bfloat16()).dtype == torch.bfloat16


@few
@given(st.integers(2, 20), temperatures, st.integers(0, 99))
def test_acceptance_by_enumeration(V, T, seed):
    g = torch.Generator().manual_seed(seed)
    z, t = torch.randn(V, generator=g), 2 * torch.randn(V, generator=g)
    q, p = (z / T).softmax(-1).tolist(), (t / T).softmax(-1).tolist()
    a = sum(b * min(1, c / b) for b, c in zip(q, p))
    assert float(acceptance_rate(z, t, T)) == pytest.approx(a, abs=1e-5)
    assert float(acceptance_rate(t, z, T)) == pytest.approx(a, abs=1e-5)
    rest = [max(c - b, 0) for b, c in zip(q, p)]
    out = [min(b, c) + (1 - a) * r / max(sum(rest), 1e-12) for b, c, r in zip(q, p, rest)]
    assert out == pytest.approx(p, abs=1e-5)
    assert float(acceptance_rate(z, z)) == pytest.approx(1)


@pytest.mark.cuda
def test_chunked_on_cuda_equals_cpu():
    h, w, t_h, t_w, y, up = draw(300, V=999)
    cpu = grads(lambda a, b: linear_distill(a, b, t_h, t_w, y, 0.2, 0.5, 2.0, 64)[0], up, h, w)
    t_h, t_w, y = (x.cuda() for x in (t_h, t_w, y))
    gpu = grads(lambda a, b: linear_distill(a, b, t_h, t_w, y, 0.2, 0.5, 2.0, 64)[0], up.cuda(), h.cuda(), w.cuda())
    assert_close([x.cpu() for x in gpu], cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
def test_on_policy_distillation_on_cuda():
    teacher, student = tiny(seed=5, n_layers=3), tiny()
    config = replace(CONFIG, cpu=False, precision="bf16", max_steps=20, epochs=20)
    history = train_distill(student, teacher, STARTS, config, mode="on_policy", tokenizer=TOKENIZER, micro_batch_size=9, max_new_tokens=8).history
    assert history[-1]["loss"] < history[0]["loss"]
