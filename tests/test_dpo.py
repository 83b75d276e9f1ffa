"Chapter 6: the losses and ten training steps against TRL, one pass against two, the cached reference, resuming, faults."

import copy
import math
import os
import signal
import warnings
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import CITIES, CONFIG, NAMES, TOKENIZER, flat, model, on_two_ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import llm_train_course.core as core
import llm_train_course.dpo as dpo
from llm_train_course.core import IGNORE, NonFiniteLoss, ResumeError, TrainConfig, tiny_llama
from llm_train_course.dpo import (
    LOSSES,
    REFERENCE_FILE,
    REFERENCE_FREE,
    Preference,
    PreferenceBatches,
    answer_logps,
    answer_mask,
    cdpo_loss,
    dpo_loss,
    dpop_loss,
    encode_pair,
    encode_pairs,
    ipo_loss,
    kto_loss,
    orpo_loss,
    pair_losses,
    policy_kl,
    preference_objective,
    reference_logps,
    robust_loss,
    sequence_logps,
    sharing_fault,
    simpo_loss,
    train_dpo,
    weights_hash,
)
from llm_train_course.lora import add_lora, lora_layers

PAIRS = [{"prompt": f"Where is {n}?" * (1 + k % 3), "chosen": f" In {c}." + " Yes." * (k % 4), "rejected": f" {n} is in {c[::-1]}" * (1 + k % 2)}
         for k, (n, c) in enumerate((n, c) for n in NAMES for c in CITIES[:3])]
CHATS = [{"prompt": [{"role": "user", "content": p["prompt"]}], **{k: [{"role": "assistant", "content": p[k]}] for k in ("chosen", "rejected")}}
         for p in PAIRS]
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def random_pairs(sizes, vocab=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(6, vocab, (n,), generator=g).tolist()
    out = []
    for p, c, r in sizes:
        e = {"prompt_ids": draw(p), "chosen_ids": draw(c), "rejected_ids": draw(r)}
        out.append({**e, "chosen_labels": e["chosen_ids"], "rejected_labels": e["rejected_ids"]})
    return out


def logps_and_grads(m, batch):
    m.zero_grad()
    logps, lengths = answer_logps(m, batch)
    (logps * torch.linspace(0.5, 2, logps.numel()).view_as(logps)).sum().backward()
    return logps.detach(), lengths, torch.cat([p.grad.float().flatten() for p in m.parameters() if p.grad is not None])


def four(seed=0, n=6, scale=20.0):
    g = torch.Generator().manual_seed(seed)
    return [(-scale * torch.rand(n, generator=g)).requires_grad_(k < 2) for k in range(4)]


# the losses against TRL: its own code, fed with log-probabilities


def trl_dpo(loss_type, pc, pr, rc, rr, lengths_c, lengths_r, beta, label_smoothing=0.0):
    "DPOTrainer._compute_loss on a model that returns given log-probabilities, spread evenly over the tokens of each answer."
    from trl import DPOTrainer
    width, lengths, sums = int(max(lengths_c.max(), lengths_r.max())), torch.cat([lengths_c, lengths_r]), torch.cat([pc, pr])
    mask = (torch.arange(width)[None] < lengths[:, None]).long()
    per_token = sums[:, None] / lengths[:, None] * mask

    def forward(**kw):
        zeros = torch.zeros_like(per_token)
        return SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    full = F.pad(mask, (1, 0))
    me = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0],
        beta=beta, label_smoothing=label_smoothing, use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1)
    inputs = {"input_ids": torch.zeros_like(full), "attention_mask": torch.ones_like(full), "completion_mask": full,
              "ref_chosen_logps": rc, "ref_rejected_logps": rr}
    return DPOTrainer._compute_loss(me, forward, inputs, False)


@pytest.mark.parametrize("loss_type, smoothing", [("sigmoid", 0.0), ("robust", 0.0), ("robust", 0.2), ("ipo", 0.0)])
def test_losses_equal_trl(loss_type, smoothing):
    x, beta = four(), 0.3
    lengths = torch.tensor([3, 9, 1, 4, 7, 2]), torch.tensor([5, 2, 8, 4, 1, 3])
    theirs = trl_dpo(loss_type, *x, *lengths, beta, smoothing)
    want = torch.autograd.grad(theirs, x[:2])
    if loss_type == "ipo":  # TRL divides by lengths
        mine = dpo_loss(x[0] / lengths[0], x[1] / lengths[1], x[2] / lengths[0], x[3] / lengths[1], beta, "ipo")
    else:
        mine = dpo_loss(*x, beta, loss_type, smoothing)
    assert_close(mine, theirs)
    assert_close(torch.autograd.grad(mine, x[:2]), want)
    logps, ref = torch.stack(x[:2], 1), torch.stack(x[2:], 1)  # and what train_dpo uses
    assert_close(pair_losses(Preference(loss_type, beta, smoothing), logps, ref, torch.stack(lengths, 1)).mean(), theirs)


def test_cdpo_equals_trl():
    "TRL 1.16 has the formula in `aot`, which sorts a batch (one pair stays as it is), and in its CPO trainer, without a reference."
    from trl.experimental.cpo import CPOTrainer
    for n in range(6):
        x = [t[n:n + 1] for t in four(3)]
        assert_close(dpo_loss(*x, 0.4, label_smoothing=0.15), trl_dpo("aot", *x, torch.tensor([3]), torch.tensor([2]), 0.4, 0.15))
    x, zero = four(4)[:2], torch.zeros(6)
    me = SimpleNamespace(alpha=0.0, beta=0.4, label_smoothing=0.15, loss_type="sigmoid", accelerator=SimpleNamespace(device="cpu"))
    theirs, mine = CPOTrainer.cpo_loss(me, *x)[0], cdpo_loss(*x, zero, zero, 0.4, 0.15)
    assert_close(mine, theirs)
    assert_close(torch.autograd.grad(mine.sum(), x, retain_graph=True), torch.autograd.grad(theirs.sum(), x))


def test_simpo_and_orpo_equal_trl():
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    x = [(t.detach() / 10).requires_grad_() for t in four(1)[:2]]  # means over tokens
    device = SimpleNamespace(device="cpu")
    simpo = SimpleNamespace(alpha=0.0, beta=2.5, label_smoothing=0.0, loss_type="simpo", simpo_gamma=0.7, accelerator=device)
    orpo = SimpleNamespace(beta=0.1, accelerator=device)
    theirs = {"simpo": CPOTrainer.cpo_loss(simpo, *x)[0], "orpo": -x[0] - ORPOTrainer.odds_ratio_loss(orpo, *x)[0]}
    mine = {"simpo": simpo_loss(*x, 2.5, 0.7), "orpo": orpo_loss(*x, 0.1)}
    for name in mine:
        assert_close(mine[name], theirs[name])
        assert_close(torch.autograd.grad(mine[name].sum(), x, retain_graph=True), torch.autograd.grad(theirs[name].sum(), x, retain_graph=True))


@pytest.mark.parametrize("shift", [2.0, -30.0])  # a positive reference point, and one that is clamped
def test_kto_equals_trl(shift):
    from trl import KTOTrainer
    g = torch.Generator().manual_seed(0)
    logps, ref, other_ref = ((-9 * torch.rand(5, generator=g)) for _ in range(3))
    logps.requires_grad_()
    other, label = other_ref + shift + torch.rand(5, generator=g), torch.tensor([True, False, False, True, False])
    mask = torch.ones(5, 2).long()
    device = SimpleNamespace(device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t)
    me = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=device, aux_loss_enabled=False, precompute_ref_logps=True, calculate_KL=True,
        loss_type="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _tp_size=1, _compute_kl_logps=lambda m, b: other)
    zeros = torch.zeros(5, 1)
    forward = lambda **kw: SimpleNamespace(log_probs=logps[:, None], entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": torch.tensor([[0, 1]] * 5), "label": label,
             "ref_logps": ref, "ref_KL_logps": other_ref}
    theirs = KTOTrainer._compute_loss(me, forward, batch, False)
    z = (other - other_ref).mean().clamp(min=0)
    assert (float(z) > 0) == (shift > 0)
    mine = kto_loss(logps, ref, label, z, 0.3, 1.5, 0.5).mean()
    assert_close(mine, theirs)
    assert_close(torch.autograd.grad(mine, logps), torch.autograd.grad(theirs, logps))


@few
@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(0.01, 5), st.floats(0, 0.45), st.floats(-30, 30))
def test_loss_properties(w, l, beta, eps, shift):
    t = lambda *v: [torch.tensor([x], dtype=torch.float64) for x in v]
    z = torch.zeros(1, dtype=torch.float64)
    (w,), (l,), (s,) = t(w), t(l), t(shift)
    for fn in (lambda a, b, c, d: cdpo_loss(a, b, c, d, beta, eps), lambda a, b, c, d: ipo_loss(a, b, c, d, beta),
               lambda a, b, c, d: robust_loss(a, b, c, d, beta, eps)):
        assert_close(fn(w, l, z, z), fn(w + s, l + s, z, z))        # a constant of the prompt is not seen
        assert_close(fn(w, l, z, z), fn(w + s, l, z + s, z))        # only log-ratios count
    clean = cdpo_loss(w, l, z, z, beta) - cdpo_loss(l, w, z, z, beta)
    assert_close(clean, -beta * (w - l))                            # -log s(m) + log s(-m) = -m
    flipped = (1 - eps) * robust_loss(w, l, z, z, beta, eps) + eps * robust_loss(l, w, z, z, beta, eps)
    assert_close(flipped, cdpo_loss(w, l, z, z, beta))
    assert float(dpop_loss(w, l, z, z, beta, 3.0)) >= float(cdpo_loss(w, l, z, z, beta)) - 1e-12
    kto = kto_loss(w, z, torch.tensor([True]), 0.0, beta) + kto_loss(w, z, torch.tensor([False]), 0.0, beta)
    assert_close(kto, torch.ones_like(kto))


def test_extreme_log_probabilities_stay_finite():
    x = torch.tensor([-1e4, -3.0, 0.0, -1e-7]).requires_grad_()
    y = x.detach().flip(0)
    for loss in (cdpo_loss(x, y, y, x.detach(), 5.0, 0.1), dpop_loss(x, y, y, x.detach(), 5.0), orpo_loss(x, y, 1.0),
                 simpo_loss(x, y, 10.0), kto_loss(x, y, torch.tensor([True, False, True, False]), 3.0, 5.0)):
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


# one pass over the prompt


@few
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5), st.sampled_from(["left", "right"]),
       st.sampled_from(["sdpa", "eager"]), st.integers(0, 99))
def test_shared_equals_separate(sizes, side, attention, seed):
    m = tiny_llama(64, hidden_size=24, n_heads=4, n_kv_heads=2, seed=seed, attn_implementation=attention)
    examples = random_pairs(sizes, seed=seed)
    one, two = (PreferenceBatches(examples, 5, side=side, shared=s).collate(range(len(examples))) for s in (True, False))
    (a, la, ga), (b, lb, gb) = logps_and_grads(m, one), logps_and_grads(m, two)
    assert torch.equal(la, lb) and la.tolist() == [[c, r] for _, c, r in sizes]
    assert_close(a, b, atol=2e-5, rtol=1e-5)
    assert_close(ga, gb, atol=5e-5, rtol=1e-3)
    p = sum(p for p, _, _ in sizes)
    assert int((one["segments"] >= 0).sum()) == p + sum(c + r + 1 for _, c, r in sizes)
    assert int(two["attention_mask"].sum()) == 2 * p + sum(c + r for _, c, r in sizes)


def families():
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )
    shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
    kv = dict(num_key_value_heads=2, head_dim=8)
    return {"gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
            "neox": GPTNeoXForCausalLM(GPTNeoXConfig(**shape)), "qwen3": Qwen3ForCausalLM(Qwen3Config(**shape, **kv)),
            "mistral": MistralForCausalLM(MistralConfig(**shape, **kv, sliding_window=None)),
            "gemma2": Gemma2ForCausalLM(Gemma2Config(**shape, **kv, sliding_window=64, attn_implementation="eager"))}


def test_shared_equals_separate_in_other_architectures():
    "Learned and rotary positions, a soft cap on the logits, tied and untied heads; adapters of PEFT around one of them."
    from peft import LoraConfig, get_peft_model
    examples = random_pairs([(7, 3, 6), (1, 4, 2), (12, 5, 5)])
    models = families()
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(models["qwen3"]), LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "down_proj"]))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    for name, m in {**models, "peft": adapted}.items():
        m.eval()
        assert sharing_fault(m, PreferenceBatches(examples, 3)) is None, name
        both = [PreferenceBatches(examples, 3, side="left", shared=s).collate([0, 1, 2]) for s in (True, False)]
        (a, _, ga), (b, _, gb) = (logps_and_grads(m, batch) for batch in both)
        assert_close(a, b, atol=3e-5, rtol=1e-5, msg=name)
        assert_close(ga, gb, atol=1e-4, rtol=1e-3, msg=name)


@torch.no_grad()
def test_bfloat16_shared_is_as_near_as_separate():
    examples = random_pairs([(9, 3, 8), (1, 5, 2), (4, 1, 1)])
    exact = tiny_llama(64, hidden_size=24, n_heads=4, seed=1)
    truth = answer_logps(exact, PreferenceBatches(examples, 3).collate([0, 1, 2]))[0].detach()
    for attention in ("sdpa", "eager"):
        half = tiny_llama(64, hidden_size=24, n_heads=4, seed=1, attn_implementation=attention).to(torch.bfloat16)
        for shared in (True, False):
            assert float((answer_logps(half, PreferenceBatches(examples, 3, shared=shared).collate([0, 1, 2]))[0] - truth).abs().max()) < 0.1
        with torch.autocast("cpu", torch.bfloat16):  # weights in float32, arithmetic in bfloat16
            mixed = tiny_llama(64, hidden_size=24, n_heads=4, seed=1, attn_implementation=attention)
            assert float((answer_logps(mixed, PreferenceBatches(examples, 3).collate([0, 1, 2]))[0] - truth).abs().max()) < 0.1
        assert sharing_fault(half, PreferenceBatches(examples, 3)) is None


def test_no_logits_for_the_prompt(monkeypatch):
    rows, plain = [], core.linear_logps
    monkeypatch.setattr(core, "linear_logps", lambda h, *a: rows.append(len(h)) or plain(h, *a))
    examples = random_pairs([(20, 3, 5), (30, 1, 2)])
    for shared in (True, False):
        answer_logps(tiny_llama(64, hidden_size=24, n_heads=4), PreferenceBatches(examples, 2, shared=shared).collate([0, 1]))
    assert rows == [11, 11]


def test_mask_by_definition():
    g = torch.Generator().manual_seed(0)
    segments = torch.randint(-1, 4, (3, 9), generator=g)
    mask = answer_mask(segments)
    assert mask.shape == (3, 1, 9, 9)
    for b in range(3):
        for i in range(9):
            for j in range(9):
                s, t = int(segments[b, i]), int(segments[b, j])
                assert bool(mask[b, 0, i, j]) == (i == j or (j < i and t >= 0 and (t == 0 or t == s)))


def test_interior_text_of_others_is_no_target():
    "An answer of two assistant turns with a user's between them: the user's tokens are read, not learned."
    turns = lambda a, b: [{"role": "assistant", "content": a}, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": b}]
    row = {"prompt": [{"role": "user", "content": "Where?"}], "chosen": turns("Oslo.", "Yes."), "rejected": turns("Lima.", "No.")}
    e = encode_pair(TOKENIZER, row)
    assert IGNORE in e["chosen_labels"] and e["chosen_labels"][-1] == TOKENIZER.eos_token_id
    m = model()
    one, two = (answer_logps(m, PreferenceBatches([e], 1, shared=s).collate([0])) for s in (True, False))
    assert_close(one, two, atol=1e-5, rtol=1e-5)
    ids = torch.tensor([e["prompt_ids"] + e["chosen_ids"]])
    kept = torch.tensor([[False] * len(e["prompt_ids"]) + [label != IGNORE for label in e["chosen_labels"]]])
    assert_close(one[0][0, 0], sequence_logps(m(ids).logits, ids, kept)[0], atol=1e-5, rtol=1e-5)
    assert int(one[1][0, 0]) == int(kept.sum()) < len(e["chosen_ids"])


def test_attention_without_such_masks_falls_back():
    "An implementation under a name of its own stands for flash attention: rows are separate, with a message, and nothing else changes."
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
    AttentionInterface.register("plain", sdpa_attention_forward)
    AttentionMaskInterface.register("plain", sdpa_mask)
    config, want, got = replace(CONFIG, max_steps=3), model(seed=1), model(seed=1, attn_implementation="plain")
    expected = train_dpo(want, TOKENIZER, PAIRS, config)
    with pytest.warns(UserWarning, match="computed twice, in separate rows: attention implementation 'plain' takes no mask"):
        result = train_dpo(got, TOKENIZER, PAIRS, config)
    assert [r["loss"] for r in result.history] == pytest.approx([r["loss"] for r in expected.history], abs=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_dpo(model(seed=1, attn_implementation="plain"), TOKENIZER, PAIRS, config, share_prompt=False)  # asked for: no message


def test_a_model_that_ignores_the_mask_is_found_out():
    class Deaf(nn.Module):
        "Takes a mask and uses none."
        def __init__(self, m):
            super().__init__()
            self.m = m

        def forward(self, input_ids, attention_mask=None, position_ids=None, **kw):
            return self.m(input_ids=input_ids, position_ids=position_ids, attention_mask=None, **kw)
    m = model()
    m.model = Deaf(m.model)
    assert "differ by" in sharing_fault(m, PreferenceBatches(encode_pairs(TOKENIZER, PAIRS), 4))


# pairs


def trl_tokens(rows):
    from datasets import Dataset
    from trl import DPOTrainer
    me = SimpleNamespace(_tokenizer=TOKENIZER)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    return DPOTrainer._prepare_dataset(me, Dataset.from_list(rows), TOKENIZER, args, "train")


@pytest.mark.parametrize("rows", [PAIRS, CHATS], ids=["strings", "messages"])
def test_tokens_equal_trl(rows):
    for mine, theirs in zip(encode_pairs(TOKENIZER, rows), trl_tokens(rows), strict=True):
        for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert mine[key] == theirs[key]
        assert mine["chosen_labels"] == mine["chosen_ids"] and mine["rejected_labels"] == mine["rejected_ids"]


def test_bad_rows_are_named_together_before_any_work(tmp_path, monkeypatch):
    good, chat = PAIRS[0], CHATS[0]
    bad = {1: ({**good, "rejected": good["chosen"]}, "the two answers are equal"), 2: ({**good, "chosen": "  \n"}, "the chosen answer is empty"),
           4: ({**good, "prompt": "Where is Ada? " * 40}, "the prompt has 400 tokens, the context holds 128"), 5: ({**chat, "rejected": []}, "the rejected answer is empty"),
           6: ({**good, "prompt": ""}, "the prompt has no token"), 7: ({"chosen": "a", "rejected": "b"}, "there is no 'prompt'"),
           8: ({**chat, "chosen": "text"}, "are of two kinds"), 9: ({**good, "chosen": 7}, "neither a string nor a list"),
           10: ({**chat, "chosen": [{"role": "user", "content": "x"}]}, "the chosen answer is empty"), 11: (None, "it is a NoneType"),
           12: ({**good, "rejected": good["chosen"] + "<|eos|>"}, "the two answers are equal"),
           13: ({**good, "prompt": "Why?", "chosen": " a" * 200 + " b", "rejected": " a" * 200 + " c"}, "equal in the 128 tokens of the context")}
    rows = [bad[n][0] if n in bad else good for n in range(14)]
    monkeypatch.setattr(dpo, "answer_logps", lambda *a: pytest.fail("the model was run"))
    m, before = model(max_length=128), flat(model(max_length=128))
    with pytest.raises(ValueError) as e:
        train_dpo(m, TOKENIZER, rows, CONFIG, run_dir=tmp_path / "run")
    lines = str(e.value).splitlines()
    assert lines[0] == "12 of 14 pairs cannot be used:" and len(lines) == 13
    for line, (n, (_, reason)) in zip(lines[1:], bad.items()):
        assert line.startswith(f"row {n}: ") and reason in line
    assert torch.equal(flat(m), before) and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="no pairs"):
        train_dpo(m, TOKENIZER, [], CONFIG)


def test_long_answers_are_cut_with_a_message():
    row = {"prompt": "Why?", "chosen": " so" * 50, "rejected": " no" * 3}
    with pytest.warns(UserWarning, match="1 answers in pairs are cut off at max_length = 20"):
        (e,) = encode_pairs(TOKENIZER, [row], 20)
    assert len(e["prompt_ids"] + e["chosen_ids"]) == 20 and TOKENIZER.eos_token_id not in e["chosen_ids"]
    assert e["rejected_ids"][-1] == TOKENIZER.eos_token_id


def test_every_pair_once_an_epoch():
    layout = PreferenceBatches(random_pairs([(k % 7 + 1, k % 5 + 1, k % 3 + 1) for k in range(23)]), 4, bucket=2, seed=3)
    for epoch in (0, 1):
        assert sorted(n for item in layout.plan(epoch) for n in item) == list(range(23))
        assert layout.plan(epoch) == layout.plan(epoch) != layout.plan(epoch + 1)
    with pytest.raises(ValueError, match="side must be 'left' or 'right', got 'middle'"):
        PreferenceBatches(layout.examples, 4, side="middle")
    with pytest.raises(ValueError, match="micro_batch_size and the number of pairs must be at least 1, got 0 and 23"):
        PreferenceBatches(layout.examples, 0)


# training against TRL


@pytest.mark.parametrize("loss_type, rows, accumulate", [("sigmoid", CHATS, 1), ("ipo", PAIRS, 1), ("robust", PAIRS, 2)])
def test_ten_steps_equal_trl(loss_type, rows, accumulate, tmp_path):
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    class Ordered(DPOTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    smoothing = 0.1 if loss_type == "robust" else 0.0
    start = model(seed=4, n_kv_heads=2, n_heads=4)
    ref = model(seed=5, n_kv_heads=2, n_heads=4)  # another model: the first margins are not zero
    theirs, ours = copy.deepcopy(start), copy.deepcopy(start)
    trainer = Ordered(
        model=theirs, ref_model=copy.deepcopy(ref), processing_class=TOKENIZER, train_dataset=Dataset.from_list(rows),
        args=DPOConfig(
            output_dir=str(tmp_path), loss_type=[loss_type], label_smoothing=smoothing, beta=0.2, per_device_train_batch_size=3,
            gradient_accumulation_steps=accumulate, max_steps=10, learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.01,
            adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, max_grad_norm=1.0, max_length=256, bf16=False, gradient_checkpointing=False,
            use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, save_strategy="no", dataloader_num_workers=0, seed=0, optim="adamw_torch"))
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    config = TrainConfig(learning_rate=1e-3, schedule="linear", max_steps=10, grad_accum_steps=accumulate, log_every=1, weight_decay=0.01, progress=False, cpu=True)
    history = train_dpo(ours, TOKENIZER, rows, config, beta=0.2, loss_type=loss_type, label_smoothing=smoothing, ref=ref, micro_batch_size=3,
                        shuffle=False).history
    assert len(logged) == len(history) == 10
    for mine, other in (("loss", "loss"), ("margin", "rewards/margins"), ("reward_chosen", "rewards/chosen"), ("reward_rejected", "rewards/rejected"),
                        ("logps_chosen", "logps/chosen"), ("logps_rejected", "logps/rejected"), ("accuracy", "rewards/accuracies")):
        assert [r[mine] for r in history] == pytest.approx([r[other] for r in logged], rel=1e-3, abs=2e-3), mine
    assert [r["grad_norm"] for r in history] == pytest.approx([r["grad_norm"] for r in logged], rel=1e-3)
    for (name, a), b, c in zip(ours.named_parameters(), theirs.parameters(), start.parameters()):
        moved = (b - c).abs().max()
        assert moved > 1e-4
        # Adam divides by the root of a tiny second moment, so rounding is amplified where a gradient is near zero
        assert (a - b).abs().max() < 0.05 * moved, name
        assert (a - b).abs().mean() < 2e-3 * moved, name


# the reference


def test_all_references_agree():
    config, losses = replace(CONFIG, max_steps=5), {}

    def adapted():
        m = model(seed=1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            add_lora(m, 3, 12.0)
        return m
    frozen = adapted()
    before = weights_hash(frozen)
    for ref in ("cache", "adapter", "copy", frozen):
        result = train_dpo(adapted(), TOKENIZER, PAIRS, config, ref=ref, loss_type="sigmoid")
        losses[str(type(ref)) + str(ref)[:9]] = [r["loss"] for r in result.history]
    first, *others = losses.values()
    assert first[0] == pytest.approx(math.log(2), abs=1e-5) and first[-1] < first[0]
    for other in others:
        assert other == pytest.approx(first, abs=2e-5)
    assert weights_hash(frozen) == before and not any(p.requires_grad for p in frozen.parameters())


def test_peft_adapter_is_switched_off():
    from peft import LoraConfig, get_peft_model
    losses = []
    for ref in ("adapter", "cache"):
        torch.manual_seed(0)
        m = get_peft_model(model(seed=1), LoraConfig(r=3, lora_alpha=12, target_modules="all-linear"))
        losses.append([r["loss"] for r in train_dpo(m, TOKENIZER, PAIRS, replace(CONFIG, max_steps=4), ref=ref).history])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5) and losses[0][-1] < losses[0][0]


def test_adapter_trained_before_is_another_reference():
    "Switched off, the base is the reference; cached, the model as it starts."
    def trained():
        m = model(seed=1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            add_lora(m, 3, 12.0)
            for layer in lora_layers(m).values():
                nn.init.normal_(layer.lora_B, std=0.1)
        return m
    first = {ref: train_dpo(trained(), TOKENIZER, PAIRS, replace(CONFIG, max_steps=1), ref=ref).history[0] for ref in ("cache", "adapter")}
    assert first["cache"]["margin"] == pytest.approx(0, abs=1e-5) and abs(first["adapter"]["margin"]) > 1e-3


def test_reference_has_no_gradient_and_no_dropout():
    m = model(seed=1, attention_dropout=0.3)
    add_lora(m, 3, 12.0, dropout=0.3)
    batch = PreferenceBatches(encode_pairs(TOKENIZER, PAIRS[:4]), 4).collate([0, 1, 2, 3])
    m.train()
    asked = dpo._ask_adapter_off(m, batch)
    assert not asked.requires_grad and m.training
    assert torch.equal(asked, dpo._ask_adapter_off(m, batch))
    _, watched = preference_objective(Preference(), dpo._ask_adapter_off)(m, batch)
    assert abs(float(watched["margin"])) > 1e-4   # dropout of the policy makes a margin of its own
    with dpo._without_dropout(m):
        _, watched = preference_objective(Preference(), dpo._ask_adapter_off)(m, batch)
        assert abs(float(watched["margin"])) < 1e-5
    assert {d.p for d in m.modules() if isinstance(d, nn.Dropout)} == {0.3}
    assert m.model.layers[0].self_attn.attention_dropout == 0.3


def run(tmp_path, m=None, pairs=PAIRS, **kw):
    config = kw.pop("config", replace(CONFIG, save_every=3))
    m = model(seed=1) if m is None else m
    return m, train_dpo(m, TOKENIZER, pairs, config, run_dir=tmp_path, **kw)


def computed(monkeypatch):
    "Counts how often reference log-probabilities are computed."
    calls, real = [], reference_logps
    monkeypatch.setattr(dpo, "reference_logps", lambda *a: calls.append(1) or real(*a))
    return calls


def test_reference_is_cached_by_model_and_data(tmp_path, monkeypatch):
    from safetensors.torch import load_file
    calls, config = computed(monkeypatch), replace(CONFIG, max_steps=1)
    go = lambda seed=1, pairs=PAIRS, **kw: train_dpo(model(seed=seed), TOKENIZER, pairs, replace(config, **kw), run_dir=tmp_path)
    go()
    stored = load_file(tmp_path / REFERENCE_FILE)["pairs"]
    examples = encode_pairs(TOKENIZER, PAIRS)
    m = model(seed=1)
    for e, row in zip(examples, stored):
        for k, value in zip(("chosen_ids", "rejected_ids"), row):
            ids = torch.tensor([e["prompt_ids"] + e[k]])
            want = sequence_logps(m(ids).logits, ids, torch.arange(ids.shape[1])[None] >= len(e["prompt_ids"])).detach()
            assert float(value) == pytest.approx(float(want), abs=1e-4)
    assert len(calls) == 1
    go()
    assert len(calls) == 1                                        # found
    for n, kw in enumerate((dict(seed=2), dict(pairs=PAIRS[:-1]), dict(pairs=PAIRS[::-1]), dict(precision="bf16")), 2):
        go(**kw)
        assert len(calls) == n                                    # another model, other data, another order, other arithmetic
    (tmp_path / REFERENCE_FILE).write_bytes(b"damaged")
    go()
    assert len(calls) == 6 and torch.equal(load_file(tmp_path / REFERENCE_FILE)["pairs"], stored)


def test_one_bit_of_a_weight_changes_the_hash():
    a, b = model(seed=1), model(seed=1)
    assert weights_hash(a) == weights_hash(b) == weights_hash(a.train())
    with torch.no_grad():
        next(b.parameters()).view(torch.int32)[5, 5] ^= 1
    assert weights_hash(a) != weights_hash(b) != weights_hash(copy.deepcopy(a).to(torch.bfloat16))


@pytest.mark.parametrize("kw", [{}, dict(ref="copy"), dict(loss_type="kto"), dict(loss_type="orpo")], ids=str)
def test_resume_is_bit_equal(tmp_path, kw):
    whole, result = run(tmp_path / "whole", eval_pairs=PAIRS[:5], **kw)
    calls = []

    def stop(m, batch, real=answer_logps):
        calls.extend([1] * m.training)
        if len(calls) == 6 and m.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(m, batch)
    dpo.answer_logps, real = stop, answer_logps
    try:
        interrupted, first = run(tmp_path / "half", eval_pairs=PAIRS[:5], **kw)
    finally:
        dpo.answer_logps = real
    assert first.interrupted and first.step == 6
    again, second = run(tmp_path / "half", eval_pairs=PAIRS[:5], resume=True, **kw)
    assert second.step == 9 and torch.equal(flat(again), flat(whole))
    rows = lambda folder: [line.split('"targets_per_second"')[0] for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
    assert rows("half") == rows("whole")


def test_resume_in_the_same_process(tmp_path):
    "The interrupted model itself goes on: its weights are those of the checkpoint, so the stored reference is its own."
    whole, _ = run(tmp_path / "whole", config=replace(CONFIG, max_steps=6, save_every=3))
    m, _ = run(tmp_path / "half", config=replace(CONFIG, max_steps=6, save_every=3))
    for folder in (tmp_path / "half" / "checkpoints").glob("step_*6"):
        os.rename(folder, tmp_path / "gone")
    from safetensors.torch import load_file
    saved = load_file(tmp_path / "half" / "checkpoints" / "step_00000003" / "weights.safetensors")
    m.load_state_dict({**m.state_dict(), **saved})
    run(tmp_path / "half", m, config=replace(CONFIG, max_steps=6, save_every=3), resume=True)
    assert torch.equal(flat(m), flat(whole))


def test_resume_refuses_what_does_not_fit(tmp_path):
    run(tmp_path, config=replace(CONFIG, max_steps=4, save_every=2))
    go = lambda m=None, **kw: run(tmp_path, m, config=replace(CONFIG, max_steps=4, save_every=2), resume=True, **kw)
    with pytest.raises(ResumeError, match="computed with other weights .* resume with the model that the run began with"):
        go(model(seed=2))
    with pytest.raises(ResumeError, match="was computed for other pairs"):
        go(pairs=PAIRS[:-1])
    with pytest.raises(ResumeError, match="beta = 0.1, this run has 0.2"):
        go(beta=0.2)
    with pytest.raises(ResumeError, match="loss_type = 'sigmoid', this run has 'ipo'"):
        go(loss_type="ipo")
    with pytest.raises(ResumeError, match="batches.reference = '"):
        go(ref=model(seed=2))
    stored = (tmp_path / REFERENCE_FILE).read_bytes()
    with pytest.raises(FileExistsError, match="holds a run already"):   # nothing of the old run is overwritten
        run(tmp_path, model(seed=2))
    assert (tmp_path / REFERENCE_FILE).read_bytes() == stored
    (tmp_path / REFERENCE_FILE).unlink()
    with pytest.raises(ResumeError, match="is missing or damaged"):
        go()


def test_resume_without_a_run_begins_one(tmp_path):
    m, result = run(tmp_path, resume=True, config=replace(CONFIG, max_steps=2))
    assert result.step == 2 and (tmp_path / REFERENCE_FILE).is_file()


# train_dpo


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_learns_and_reports(loss_type):
    m = model(seed=1)
    history = train_dpo(m, TOKENIZER, PAIRS, replace(CONFIG, max_steps=12), loss_type=loss_type, beta=2.0 if loss_type == "simpo" else 0.2,
                        eval_pairs=PAIRS[:6], micro_batch_size=6).history
    rows, scores = [r for r in history if "loss" in r], history[-1]
    assert rows[-1]["loss"] < rows[0]["loss"] and scores["eval_accuracy"] > 0.8 and scores["eval_n_targets"] == 6
    assert ("kl" in rows[0]) == (loss_type not in REFERENCE_FREE)
    for r in rows:
        assert r["margin"] == pytest.approx(r["reward_chosen"] - r["reward_rejected"], abs=1e-4)
        assert r["n_targets"] in (6, 3)


def test_metrics_by_hand():
    "Means over pairs, from log-probabilities that are computed in another way."
    m, ref, pairs = model(seed=1), model(seed=2), PAIRS[:5]
    examples = encode_pairs(TOKENIZER, pairs)
    row = train_dpo(copy.deepcopy(m), TOKENIZER, pairs, replace(CONFIG, max_steps=1, learning_rate=0.0), beta=0.5, ref=ref, micro_batch_size=5).history[0]
    with torch.no_grad():
        p, r = (reference_logps(x, PreferenceBatches(examples, 1, shared=False)) for x in (m, ref))
    gain = p - r
    assert row["reward_chosen"] == pytest.approx(float(0.5 * gain[:, 0].mean()), abs=1e-4)
    assert row["accuracy"] == pytest.approx(float((gain[:, 0] > gain[:, 1]).float().mean()))
    assert row["kl"] == pytest.approx(float(-gain.mean()), abs=1e-4)
    assert row["logps_rejected"] == pytest.approx(float(p[:, 1].mean()), abs=1e-4)
    assert row["loss"] == pytest.approx(float(dpo_loss(p[:, 0], p[:, 1], r[:, 0], r[:, 1], 0.5)), abs=1e-5)


def test_sft_weight_adds_the_loss_of_the_chosen_answer():
    logps, ref, lengths = torch.tensor([[-6.0, -4.0]]), torch.tensor([[-5.0, -5.0]]), torch.tensor([[3, 2]])
    for loss_type in LOSSES:
        if loss_type == "kto":
            continue
        plain, more = (pair_losses(Preference(loss_type, sft_weight=w), logps, ref, lengths) for w in (0.0, 0.7))
        assert_close(more - plain, torch.tensor([0.7 * 2.0]))


def test_kto_compares_with_other_prompts():
    rows = dpo._with_other_answers(encode_pairs(TOKENIZER, [PAIRS[0], {**PAIRS[0], "chosen": " Elsewhere."}, PAIRS[5]]))
    assert [e["other_ids"] for e in rows] == [rows[2]["chosen_ids"], rows[2]["rejected_ids"], rows[1]["chosen_ids"]]
    one = [{**PAIRS[0], "chosen": f" In {c}."} for c in CITIES]
    with pytest.raises(ValueError, match="the pairs have one prompt only"):
        train_dpo(model(), TOKENIZER, one, CONFIG, loss_type="kto")
    batch = PreferenceBatches(rows, 3).collate([0, 1, 2])
    m = model()
    three, separate = (answer_logps(m, PreferenceBatches(rows, 3, shared=s).collate([0, 1, 2])) for s in (True, False))
    assert batch["n_answers"] == 3 and three[0].shape == (3, 3)
    assert_close(three, separate, atol=1e-5, rtol=1e-5)
    logps = three[0].detach().requires_grad_()
    pair_losses(Preference("kto"), logps, logps.detach() - 1, three[1]).sum().backward()
    assert logps.grad[:, 2].abs().max() == 0 and logps.grad[:, :2].abs().min() > 0  # no gradient through the reference point


@pytest.mark.parametrize("kw, message", [
    (dict(beta=0.0), "beta must be positive and finite, got 0.0"), (dict(beta=math.nan), "beta must be positive and finite, got nan"),
    (dict(loss_type="dpo"), "loss_type must be one of sigmoid, robust, ipo, dpop, kto, orpo, simpo, got 'dpo'"),
    (dict(label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\), got 0.5"), (dict(sft_weight=-1.0), "sft_weight must be finite and not negative, got -1.0"),
    (dict(loss_type="kto", label_smoothing=0.1), "label_smoothing must be 0 with loss_type kto, got 0.1"),
    (dict(ref="adapter"), "ref='adapter' needs a model with LoRA layers"), (dict(ref="base"), "ref must be 'cache', 'adapter', 'copy' or a model, got 'base'")])
def test_settings_are_named(kw, message):
    with pytest.raises(ValueError, match=message):
        train_dpo(model(), TOKENIZER, PAIRS, CONFIG, **kw)


def test_reference_cannot_be_the_policy():
    m = model()
    with pytest.raises(ValueError, match="ref is the model that is trained"):
        train_dpo(m, TOKENIZER, PAIRS, CONFIG, ref=m)
    add_lora(m, 2, 4.0)
    m.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="model.norm.weight is trained beside the adapters"):
        train_dpo(m, TOKENIZER, PAIRS, CONFIG, ref="adapter")


def test_nan_is_refused_with_its_pairs(tmp_path):
    m = model(seed=1)
    with torch.no_grad():
        m.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteLoss, match="loss is not finite at step 0"):
        train_dpo(m, TOKENIZER, PAIRS, CONFIG, run_dir=tmp_path, share_prompt=False)


def test_bf16_arithmetic_starts_at_log_two():
    "The cached reference is computed in the arithmetic of the policy."
    history = train_dpo(model(seed=1), TOKENIZER, PAIRS, replace(CONFIG, precision="bf16", max_steps=3)).history
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=5e-3) and abs(history[0]["margin"]) < 5e-3


def test_policy_kl_by_enumeration():
    a, b = (tiny_llama(len(TOKENIZER), hidden_size=32, seed=s, initializer_range=0.15) for s in (0, 1))
    ids = torch.tensor([TOKENIZER("Why?").input_ids])
    with torch.no_grad():
        p, q = (m(ids).logits[0, -1].log_softmax(-1) for m in (a, b))
    value, error = policy_kl(a, b, TOKENIZER, ["Why?"] * 1500, max_new_tokens=1, batch_size=500)
    assert abs(value - float((p.exp() * (p - q)).sum())) < 4 * error and error < 0.05
    m = model()
    add_lora(m, 2, 4.0)
    assert policy_kl(m, None, TOKENIZER, ["Why?", "Where is Ada Moss?"], max_new_tokens=6)[0] == 0.0


# two processes


def _worker(rank, folder):
    config = replace(CONFIG, grad_accum_steps=2, save_every=4, keep_checkpoints=3)
    m = model(seed=1)
    result = train_dpo(m, TOKENIZER, PAIRS, config, micro_batch_size=2, run_dir=f"{folder}/run")
    if rank == 0:
        for step in (8, 9):
            os.rename(f"{folder}/run/checkpoints/step_{step:08d}", f"{folder}/gone-{step}")
    torch.distributed.barrier()
    again = model(seed=1)
    second = train_dpo(again, TOKENIZER, PAIRS, config, micro_batch_size=2, run_dir=f"{folder}/run", resume=True)
    torch.save({"weights": flat(m), "loss": [r["loss"] for r in result.history], "equal": torch.equal(flat(m), flat(again)),
                "steps": len(second.history)}, f"{folder}/{rank}.pt")


def test_two_processes_equal_one(tmp_path):
    "DDP on gloo: reference computed by both, one file, the same losses and weights; resumed to the bit."
    from safetensors.torch import load_file

    on_two_ranks(_worker, tmp_path)
    want = model(seed=1)
    history = train_dpo(want, TOKENIZER, PAIRS, replace(CONFIG, grad_accum_steps=4), micro_batch_size=2, run_dir=tmp_path / "one").history
    stored = [load_file(tmp_path / name / REFERENCE_FILE)["pairs"] for name in ("run", "one")]
    assert_close(*stored, atol=1e-5, rtol=0)
    for rank in (0, 1):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_close(got["weights"], flat(want), rtol=0, atol=1e-4)
        assert got["loss"] == pytest.approx([r["loss"] for r in history], rel=1e-4)
        assert got["equal"] and got["steps"] == 5


@pytest.mark.cuda
def test_on_a_gpu():
    config = TrainConfig(learning_rate=1e-3, max_steps=4, log_every=1, precision="bf16", progress=False)
    m = model(seed=1).cuda()
    history = train_dpo(m, TOKENIZER, PAIRS, config).history
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=2e-2) and history[-1]["loss"] < history[0]["loss"]
