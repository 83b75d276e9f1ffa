"Chapter 10: the spike detector, monitors that change nothing, the diagnosis of a log, and going back as if a batch had never been."
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONFIG, ROWS, TOKENIZER, flat, killed_until_done, model, on_two_ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llm_train_course.core import (
    IGNORE,
    PackedBatches,
    PaddedBatches,
    TrainConfig,
    adamw,
    evaluate,
    fit,
    learning_rate_at,
    lm_loss,
    seed_everything,
)
from llm_train_course.lora import add_lora
from llm_train_course.stability import Monitor, RollbackError, SpikeDetector, diagnose, layer_group, train_with_rollback

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def steps(n=120, seed=0, loss=2.0, norm=1.0):
    g = np.random.default_rng(seed)
    return [(loss + 0.05 * float(g.normal()), norm * math.exp(0.2 * float(g.normal()))) for _ in range(n)]


def told(detector, series):
    return [detector.update(*x) for x in series]


# --- detector --------------------------------------------------------------------------------------------------------


@few
@given(st.integers(0, 99), st.integers(-40, 30))
def test_the_scale_of_the_norm_does_not_matter_and_that_of_the_loss_neither(seed, exponent):
    series = steps(seed=seed)
    series[80] = (2.0, 30.0)
    want = [v.spike for v in told(SpikeDetector(), series)]
    assert want[80]
    assert [v.spike for v in told(SpikeDetector(), [(a, b * 2.0**exponent) for a, b in series])] == want
    assert [v.spike for v in told(SpikeDetector(), [(a * 2.0**exponent, b) for a, b in series])] == want


@few
@given(st.integers(0, 99), st.integers(1, 119), st.sampled_from([("loss", "grad_norm"), ("loss",), ("grad_norm",)]))
def test_saved_anywhere_and_loaded_it_goes_on_the_same(seed, cut, statistics):
    series = steps(seed=seed)
    series[50], series[70:85], series[100] = (9.0, 1.0), [(2.0, 20.0)] * 15, (math.nan, 1.0)
    whole, first, second = (SpikeDetector(window=40, warmup=20, statistics=statistics) for _ in range(3))
    want = told(whole, series)
    told(first, series[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [str(v) for v in told(second, series[cut:])] == [str(v) for v in want[cut:]]
    assert second.state_dict() == whole.state_dict()


@few
@given(st.integers(0, 99), st.floats(1.0, 1e6))
def test_what_alarms_at_a_value_alarms_at_any_larger_one(seed, times):
    series = steps(80, seed)
    for value in (1.5, 3.0, 10.0):
        low, high = SpikeDetector(), SpikeDetector()
        told(low, series), told(high, series)
        assert low.update(2.0, value).spike <= high.update(2.0, value * times).spike


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_always_alarms_and_leaves_no_trace(bad):
    detector = SpikeDetector()
    assert detector.update(bad, 1.0).reason == "not finite"  # in the warm-up too
    told(detector, steps(60))
    before = detector.state_dict()["windows"]
    for _ in range(20):  # more than patience: nothing to get used to
        v = detector.update(2.0, bad)
        assert v and (v.statistic, v.reason) == ("grad_norm", "not finite")
    assert detector.state_dict()["windows"] == before and not detector.update(2.0, 1.0)
    assert "grad_norm is" in str(v)


def test_negative_losses_zero_norms_and_extremes_are_ordinary_numbers():
    detector = SpikeDetector(warmup=16)
    assert not any(told(detector, [(-1.5 + 0.01 * (n % 5), 0.0) for n in range(60)]))  # a policy's loss; nothing to train
    assert detector.update(-1.0, 0.0) and not detector.update(-1.45, 0.0)
    huge = SpikeDetector(warmup=16)
    assert not any(told(huge, [(2.0, 1e38 * (1 + 0.1 * (n % 3))) for n in range(60)])) and huge.update(2.0, 1e300)
    tiny = SpikeDetector(warmup=16)
    assert not any(told(tiny, [(2.0, 1e-42 * (1 + n % 3)) for n in range(60)])) and tiny.update(2.0, 1e-38)


def test_norms_of_zero_between_others_are_no_overflow():
    detector = SpikeDetector()
    verdicts = told(detector, [(2.0, float(n % 2)) for n in range(60)])  # logs of 1e-300 and of 1: a spread beyond what exp can hold
    assert not any(verdicts) and all(math.isfinite(v.threshold) for v in verdicts[32:])
    assert detector.update(2.0, math.inf)


def test_a_verdict_says_which_value_and_which_threshold():
    detector = SpikeDetector()
    told(detector, steps(60))
    v = detector.update(2.0, 50.0)
    assert v.spike and v.statistic == "grad_norm" and v.value == 50.0 and 1.5 < v.threshold < 10 and v.score > 6 and v.step == 60
    assert str(v).startswith("step 60: grad_norm 50 over its threshold ")
    assert not SpikeDetector(statistics=["loss"]).update(2.0, math.nan)  # what it does not judge it does not look at
    assert str(SpikeDetector().update(2.0, 1.0)) == "step 0: warm-up, nothing is judged"


def test_a_falling_loss_raises_no_alarm_and_a_large_spike_is_seen():
    g = np.random.default_rng(3)
    falling = [(8 * math.exp(-n / 40) + 0.02 * float(g.normal()), 1.0 + 0.1 * float(g.normal())) for n in range(150)]
    assert not any(told(SpikeDetector(), falling))
    falling[60] = (falling[60][0] + 2.5, 1.0)  # within what the loss was twenty steps before
    assert [v.step for v in told(SpikeDetector(), falling) if v] == [60]
    falling[60] = (falling[55][0] + 0.1, 1.0)  # the price of a median: up to where the loss was a few steps before
    assert not any(told(SpikeDetector(), falling))


def test_false_alarms_on_noise_are_as_rare_as_stated():
    # normal losses, log-normal norms: none expected in 5,000 steps at z = 6; ten would have a probability below 1e-6 even at one in 2,000
    g = np.random.default_rng(11)
    detector = SpikeDetector(min_ratio=1.0, min_rise=0.0)
    assert sum(detector.update(2 + 0.1 * g.normal(), math.exp(0.3 * g.normal())).spike for _ in range(5000)) < 10


@pytest.mark.parametrize("kw,message", [
    (dict(warmup=1), "warmup must be between 2 and window"), (dict(warmup=65), r"window \(64\), got 65"), (dict(z=0), "z must be positive"),
    (dict(min_ratio=0.5), "min_ratio"), (dict(patience=0), "patience at least 1"), (dict(rollback=-1), "rollback at least 0"),
    (dict(statistics=()), "statistics must be some of"), (dict(statistics=("lr",)), r"got \('lr',\)")])
def test_bad_settings_are_named(kw, message):
    with pytest.raises(ValueError, match=message):
        SpikeDetector(**kw)


def test_a_state_of_other_settings_is_refused():
    with pytest.raises(ValueError, match="the saved detector has rollback = 0, this one 3"):
        SpikeDetector(rollback=3).load_state_dict(SpikeDetector().state_dict())


# --- monitor ---------------------------------------------------------------------------------------------------------


def qwen(**kw):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                        head_dim=12, intermediate_size=40, pad_token_id=0, eos_token_id=1, initializer_range=0.5, **kw))


def gemma(**kw):
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                          head_dim=8, intermediate_size=40, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, sliding_window=5,
                                          pad_token_id=0, eos_token_id=1, initializer_range=0.5, **kw))


def gemma3(**kw):  # its norms on queries and keys come after the transpose
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                              head_dim=8, intermediate_size=40, query_pre_attn_scalar=8, sliding_window=5,
                                              layer_types=["sliding_attention", "full_attention"], pad_token_id=0, eos_token_id=1, initializer_range=0.5, **kw))


def olmo2(**kw):  # its norms go over all heads at once
    torch.manual_seed(0)
    net = Olmo2ForCausalLM(Olmo2Config(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                                       intermediate_size=40, pad_token_id=0, eos_token_id=1, initializer_range=0.5, **kw))
    with torch.no_grad():
        for layer in net.model.layers:  # gains that tell the heads apart
            layer.self_attn.q_norm.weight.copy_(torch.linspace(0.5, 3, 32))
    return net


def llama(**kw):
    return model(n_kv_heads=2, initializer_range=0.5, **kw)


@pytest.mark.parametrize("make", [llama, qwen, gemma, gemma3, olmo2], ids=["llama", "qwen3", "gemma2", "gemma3", "olmo2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_entropy_is_that_of_the_weights_the_model_returns(make, side):
    net = make(attn_implementation="eager").train()
    batch = PaddedBatches(ROWS, 9, side=side).collate([0, 3, 7, 8])
    batch = {k: torch.cat([v, v[:1] * 0 + (IGNORE if k == "labels" else 0)]) if torch.is_tensor(v) else v for k, v in batch.items()}  # padding only
    with Monitor(net, rows=9) as monitor:
        lm_loss(net, batch)
        row = monitor.row()
    with torch.no_grad():
        out = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"], output_attentions=True, use_cache=False)
    shares = []
    for w in out.attentions:
        T = w.shape[-1]
        window = getattr(net.config, "sliding_window", None) if "sliding_attention" == getattr(net.config, "layer_types", ["full"] * 9)[len(shares)] else None
        keys = batch["attention_mask"].cumsum(-1) * batch["attention_mask"]
        keys = keys.clamp(max=window) if window and window < T else keys
        share = torch.special.entr(w).sum(-1) / keys.clamp(min=2).log()[:, None]
        shares.append(share.transpose(0, 1)[:, keys > 1].mean(-1))
    shares = torch.stack(shares)
    assert row["attn_entropy"] == pytest.approx(float(shares.mean()), abs=1e-5) and row["attn_entropy_min"] == pytest.approx(float(shares.min()), abs=1e-5)
    assert row["attn_entropy_min"] < 0.97  # not a flat softmax, on which any mistake agrees
    if make is not gemma:  # sdpa knows no soft cap
        sdpa = make(attn_implementation="sdpa").train()
        sdpa.load_state_dict(net.state_dict())
        with Monitor(sdpa, rows=9) as monitor:
            lm_loss(sdpa, batch)
            assert monitor.row() == pytest.approx(row, rel=1e-4, abs=1e-5)


def test_packed_documents_are_judged_as_if_alone():
    net = llama().train()
    pieces, whole = PaddedBatches(ROWS, 1), PackedBatches(ROWS, 1, 64, shuffle=False)
    with Monitor(net, rows=9) as monitor:
        for n in range(3):
            lm_loss(net, pieces.collate([n]))
        alone = monitor.row()
        lm_loss(net, whole.collate([[0, 1, 2]]))
        packed = monitor.row()
    assert packed == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_max_logit_is_found_where_it_was_put():
    net = llama().train()
    attention = net.model.layers[1].self_attn
    with torch.no_grad():
        attention.q_proj.weight.mul_(100)
    batch = PaddedBatches(ROWS, 9, side="left").collate([0, 3, 7])
    seen = {}
    handle = attention.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True)
    with Monitor(net, rows=3) as monitor:
        lm_loss(net, batch)
        row = monitor.row()
    handle.remove()
    B, T = batch["input_ids"].shape
    shape = lambda t: t.view(B, T, -1, attention.head_dim).transpose(1, 2)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    with torch.no_grad():
        q, k = apply_rotary_pos_emb(shape(attention.q_proj(seen["hidden_states"])), shape(attention.k_proj(seen["hidden_states"])), *seen["position_embeddings"])
    logits, real = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * attention.scaling, batch["attention_mask"].bool()
    best = max(float(logits[b, h, t, s]) for b in range(B) for h in range(4) for t in range(T) for s in range(t + 1) if real[b, t] and real[b, s])
    assert row["max_logit"] == pytest.approx(best, rel=1e-5) and best > 20


def test_dead_units_are_counted_over_all_micro_batches_and_padding_wakes_none():
    net = model().train()
    mlp = net.model.layers[0].mlp
    with torch.no_grad():
        mlp.up_proj.weight[:7] = 0  # 7 of the 2 x 64 units
    layout = PaddedBatches(ROWS, 9)
    with Monitor(net) as monitor:
        lm_loss(net, layout.collate([0, 3]))
        lm_loss(net, layout.collate([5]))
        assert monitor.row()["dead_units"] == pytest.approx(7 / 128)


def test_nan_at_padding_changes_no_count_of_units():
    net, batch = model().train(), PaddedBatches(ROWS, 9, side="left").collate([0, 3, 7])
    seen, padding = [], ~batch["attention_mask"].bool()
    assert padding.any()
    for spoil in (False, True):
        handles = [layer.mlp.act_fn.register_forward_hook(lambda m, args, out: out.masked_fill(padding.unsqueeze(-1), math.nan)) for layer in net.model.layers[-1:] if spoil]
        with Monitor(net) as monitor:
            lm_loss(net, batch)
            seen.append(monitor.row()["dead_units"])
            with torch.no_grad():  # a reference's pass, as DPO has it, is not looked at
                lm_loss(net, batch)
            assert "dead_units" not in monitor.row() and "max_logit" not in monitor.row()
        [h.remove() for h in handles]
    assert seen[0] == seen[1]


def watched_run(make, watched, config, kind="padded", every=1):
    net = make()
    layout = PaddedBatches(ROWS, 2) if kind == "padded" else PackedBatches(ROWS, 2, 40)
    with Monitor(net, every=every) as monitor:
        history = fit(net, layout, config=config, monitor=monitor if watched else None).history
    return net, torch.get_rng_state(), history


def checkpointed():
    net = model(attention_dropout=0.2)
    getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)()
    return net


def adapted():
    torch.manual_seed(0)
    net = model()
    add_lora(net, 3, 7, "all-linear")
    return net


def by_peft():
    torch.manual_seed(0)
    return get_peft_model(model(), LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", lora_dropout=0.1))


@pytest.mark.parametrize("make", [lambda: model(attention_dropout=0.2), lambda: model(attn_implementation="eager", tie_embeddings=False), checkpointed, adapted, by_peft, qwen],
                         ids=["dropout", "eager untied", "checkpointed", "lora", "peft", "qwen3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_watched_run_is_bit_equal(make, precision):
    config = replace(CONFIG, precision=precision, max_steps=4, grad_accum_steps=2, max_grad_norm=0.3)
    plain, rng, _ = watched_run(make, False, config)
    seen, rng_seen, rows = watched_run(make, True, config)
    assert torch.equal(flat(plain), flat(seen)) and torch.equal(rng, rng_seen)
    for row in rows:
        assert {"max_logit", "attn_entropy", "dead_units", "update_ratio", "update_over_lr", "grad_norm_clipped"} <= row.keys()
        assert all(math.isfinite(v) for k, v in row.items() if not k.startswith("update_ratio."))
        assert row["grad_norm_clipped"] == pytest.approx(min(row["grad_norm"], 0.3), rel=1e-4)
    json.dumps(rows)


def test_a_watched_packed_run_is_bit_equal_and_measures_what_is_logged():
    config = replace(CONFIG, max_steps=7, log_every=3)
    plain, _, _ = watched_run(model, False, config, "packed")
    seen, _, rows = watched_run(model, True, config, "packed", every=3)
    assert torch.equal(flat(plain), flat(seen))
    assert [(row["step"], "max_logit" in row) for row in rows] == [(1, True), (3, True), (6, True), (7, True)]  # the last one, too


def test_ratios_by_hand():
    net = model()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    with Monitor(net) as monitor:
        (row,) = fit(net, PaddedBatches(ROWS, 9), config=replace(CONFIG, max_steps=1, weight_decay=0.0, eps=1e-30), monitor=monitor).history
    moved = {n: p.detach() - before[n] for n, p in net.named_parameters()}
    norm = lambda tensors: math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
    assert row["update_ratio"] == pytest.approx(norm(moved.values()) / norm(before.values()), rel=1e-4)
    mlp = [n for n in before if "layers.1.mlp" in n]
    assert row["update_ratio.layers.1.mlp"] == pytest.approx(norm(moved[n] for n in mlp) / norm(before[n] for n in mlp), rel=1e-4)
    trained = sum(int((m != 0).sum()) for m in moved.values()) / sum(m.numel() for m in moved.values())  # rows of tokens unseen have no gradient
    assert row["update_over_lr"] == pytest.approx(math.sqrt(trained), rel=1e-3)  # Adam's first step is one learning rate for each weight
    assert "grad_to_rms" not in row  # no second moment before the first step


def test_grad_to_rms_is_the_gradient_over_what_adam_expects():
    net = model()
    optimizer, batch = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.99)), PaddedBatches(ROWS, 9).collate(range(9))
    with Monitor(net).attach(optimizer) as monitor:
        for factor in (1.0, 1.0, 5.0):
            (lm_loss(net, batch) * factor / batch["n_targets"]).backward()
            expected = [(optimizer.state[p]["exp_avg_sq"] / (1 - 0.99 ** optimizer.state[p]["step"])).sum() for p in net.parameters() if p in optimizer.state]
            norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
            optimizer.step()
            optimizer.zero_grad()
            row = monitor.row()
    assert row["grad_to_rms"] == pytest.approx(float(norm / torch.stack(expected).sum().sqrt()), rel=1e-4) and row["grad_to_rms"] > 4


def test_the_extra_operations_are_those_of_the_formula():
    net = model(attn_implementation="eager", n_kv_heads=2).train()
    batch = PaddedBatches(ROWS, 9).collate([0, 3, 7, 8, 1])

    def count(rows):
        with FlopCounterMode(display=False) as counter:
            monitor = Monitor(net, rows=rows) if rows else None
            lm_loss(net, batch).backward()
            if monitor:
                monitor.close()
        return counter.get_total_flops()

    T = batch["input_ids"].shape[1]
    for rows in (1, 3, 99):
        assert count(rows) - count(0) == 2 * min(rows, 5) * 4 * T**2 * 8 * 2


def test_evaluation_is_not_watched_and_close_leaves_nothing_behind():
    net = model()
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    with Monitor(net).attach() as monitor:
        assert hooks() > 0
        evaluate(net, PaddedBatches(ROWS, 3))
        assert monitor.row() == {}
        other = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
        other.step()  # somebody else's optimizer
        assert monitor.step == 0
    assert hooks() == 0


def test_frozen_groups_and_groups_of_zeros_are_left_out_or_said():
    net = adapted()
    with Monitor(net) as monitor:
        rows = fit(net, PaddedBatches(ROWS, 9), config=replace(CONFIG, max_steps=1), monitor=monitor).history
    assert {k for k in rows[0] if k.startswith("update_ratio.")} == {f"update_ratio.layers.{n}.{part}" for n in (0, 1) for part in ("attn", "mlp")}
    assert layer_group("model.layers.11.mlp.up_proj.lora_A", 2) == "layers.11.mlp" and layer_group("model.layers.0.self_attn.q_norm.weight", 1) == "norms"
    assert (layer_group("lm_head.weight", 2), layer_group("model.embed_tokens.weight", 2), layer_group("v_head.weight", 2)) == ("head", "embed", "other")


def test_what_cannot_be_watched_is_said():
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no attention layers with q_proj and k_proj"):
        Monitor(GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)))
    with pytest.raises(ValueError, match="every and rows must be at least 1, got 0 and 2"):
        Monitor(model(), every=0)


def test_weights_that_are_not_finite_are_reported_not_hidden():
    net = model().train()
    with torch.no_grad():
        net.model.layers[0].self_attn.q_proj.weight[0, 0] = math.inf
    with Monitor(net) as monitor:
        lm_loss(net, PaddedBatches(ROWS, 9).collate([0, 1]))
        row = monitor.row()
    assert not math.isfinite(row["max_logit"])


def _watched_worker(rank, folder):
    for watched in (False, True):
        net = model()
        with Monitor(net) as monitor:
            rows = fit(net, PaddedBatches(ROWS, 1), config=replace(CONFIG, max_steps=4, grad_accum_steps=2), monitor=monitor if watched else None).history
        torch.save({"weights": flat(net), "ratios": [row.get("update_ratio") for row in rows]}, f"{folder}/{watched}-{rank}.pt")


def test_two_processes_watched_are_bit_equal_and_agree(tmp_path):
    on_two_ranks(_watched_worker, tmp_path, "fork")
    got = {(w, r): torch.load(tmp_path / f"{w}-{r}.pt", weights_only=True) for w in (False, True) for r in (0, 1)}
    assert torch.equal(got[False, 0]["weights"], got[True, 0]["weights"]) and torch.equal(got[True, 0]["weights"], got[True, 1]["weights"])
    assert got[True, 0]["ratios"] == got[True, 1]["ratios"] and all(got[True, 0]["ratios"])


# --- diagnosis -------------------------------------------------------------------------------------------------------


def log(n=100, **columns):
    g = np.random.default_rng(0)
    rows = [{"step": s + 1, "loss": 2 + 0.03 * float(g.normal()), "grad_norm": math.exp(0.15 * float(g.normal())), "update_ratio": 5e-3, "grad_to_rms": 1.0,
             "max_logit": 4.0, "attn_entropy": 0.8} for s in range(n)]
    for key, change in columns.items():
        for where, value in change.items():
            for s in range(*where) if isinstance(where, tuple) else [where]:
                rows[s][key] = value
    return rows


CASES = {
    "healthy": log(),
    "bad batch": log(loss={60: 6.0}, grad_norm={60: 9.0}),
    "epsilon too small": log(grad_norm={(30, 70): 1e-5, (70, 90): 3.0}, update_ratio={(30, 70): 1e-3}, loss={(30, 70): 1e-3, (70, 90): 0.5}),
    "beta2 too large": log(grad_norm={(60, 80): 9.0}, grad_to_rms={(60, 75): 4.0}, loss={(62, 75): 4.0}),
    "fp16 overflow": log(grad_norm={60: math.inf, (61, 100): math.nan}, loss={(61, 100): math.nan}, loss_scale={(0, 100): 65536.0}),
    "logit growth": log(max_logit={(40, 100): 150.0}, attn_entropy={(40, 100): 0.05}, grad_norm={(60, 64): 12.0}),
    "unknown": log(grad_norm={60: math.nan}),
}


@pytest.mark.parametrize("cause", CASES)
def test_each_rule_finds_its_cause_and_says_why(cause):
    found = diagnose(CASES[cause])
    assert found.cause == cause
    if cause != "healthy":
        assert found.step in (31, 61, 71) and found.evidence and (found.cure or cause == "unknown")


def test_the_diagnosis_does_without_a_monitor_and_knows_a_scaler_at_work():
    bare = [{k: row[k] for k in ("step", "loss", "grad_norm")} for row in CASES["bad batch"]]
    assert diagnose(bare).cause == "bad batch" and diagnose([]).cause == "healthy"
    for at in (60, 0):  # in the first step it is what a scaler that starts at 65536 usually does
        scaled = log(grad_norm={at: math.inf}, loss_scale={(0, at + 1): 65536.0, (at + 1, 100): 32768.0})
        assert diagnose(scaled).cause == "healthy"  # the step was skipped, the scale halved
    last = diagnose(log(grad_norm={99: math.inf}, loss_scale={(0, 100): 65536.0}))
    assert last.cause == "unknown"  # nobody knows whether the scale fell
    overflow = diagnose(CASES["fp16 overflow"])
    assert overflow.evidence[1].startswith("the loss of the same step is finite (") and overflow.evidence[2] == "the loss scale is 65536 and did not fall"
    moved = diagnose(log(grad_norm={(60, 100): 6.0}))
    assert moved.cause == "healthy" and moved.evidence[-1] == "the norm moved, the loss did not"


# --- going back ------------------------------------------------------------------------------------------------------


def plan(bad=(), n=20, factor=None):
    "Windows of two micro-batches of unequal sizes; in those of `bad` every label is another token, or NaN reaches the loss."
    rows = [{"input_ids": [2 + (3 * s + 5 * t) % 50 for t in range(5 + s % 6)]} for s in range(3 * n)]
    layout = PaddedBatches([{**r, "labels": r["input_ids"]} for r in rows], 2, shuffle=False)
    windows = [[layout.collate([3 * w]), layout.collate([3 * w + 1, 3 * w + 2])] for w in range(n)]
    for w in bad:
        for batch in windows[w]:
            batch["labels"] = torch.where(batch["labels"] == IGNORE, IGNORE, (batch["labels"] * 7 + 11) % 60)
            batch["factor"] = factor
    return windows


def loss_with_factor(m, batch):
    return lm_loss(m, {k: v for k, v in batch.items() if k != "factor"}) * (batch.get("factor") or 1.0)


def go(windows, detector=None, scaler=None, make=lambda: model(attention_dropout=0.2), **kw):
    torch.manual_seed(7)
    net = make().train()
    optimizer = adamw(net, TrainConfig(learning_rate=1e-2))
    cosine = lambda step: 5e-3 * (1 + math.cos(math.pi * step / len(windows)))
    result = train_with_rollback(net, windows, optimizer, cosine, detector=detector, scaler=scaler, loss=loss_with_factor, **kw)
    moments = [state[k] for state in optimizer.state.values() for k in ("step", "exp_avg", "exp_avg_sq")]
    return result, [*net.state_dict().values(), *moments, torch.get_rng_state()], detector and detector.state_dict()


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True)) and a[2] == b[2]


eager_eye = lambda: SpikeDetector(window=12, warmup=6, z=8.0, min_rise=0.25)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sets(st.integers(9, 19), min_size=1, max_size=2), st.integers(0, 5), st.one_of(st.none(), st.integers(0, 4)), st.integers(1, 3))
def test_whatever_is_skipped_the_end_is_that_of_the_plan_without_it(bad, rewind, skip_before, snapshot_every):
    windows = plan(bad, factor=30.0)
    how = {"rewind": rewind, "skip_before": skip_before, "snapshot_every": snapshot_every, "keep": 12, "max_rollbacks": 9}
    undone = go(windows, eager_eye(), **how)
    assert min(bad) in undone[0].skipped  # the other one may fall into the warm-up, where going back has led
    known = go(windows, eager_eye(), skip=undone[0].skipped, **how)
    assert equal(undone, known) and undone[0].rows == known[0].rows and known[0].events == []
    assert [row["step"] for row in undone[0].rows] == list(range(1, 21 - len(undone[0].skipped)))
    shorter = [window for w, window in enumerate(windows) if w not in undone[0].skipped]
    torch.manual_seed(7)
    net = model(attention_dropout=0.2).train()
    optimizer, horizon = adamw(net, TrainConfig(learning_rate=1e-2)), len(windows)  # the horizon of the whole plan, not of the shorter one
    train_with_rollback(net, shorter, optimizer, lambda step: 5e-3 * (1 + math.cos(math.pi * step / horizon)), loss=loss_with_factor)
    assert all(torch.equal(x, y) for x, y in zip(net.state_dict().values(), undone[1]))


@pytest.mark.parametrize("bad,factor", [((10,), math.nan), ((10,), math.inf), ((0, 1), math.nan), ((19,), 40.0)], ids=["nan", "inf", "from the start", "last window"])
def test_nan_inf_the_first_and_the_last_window(bad, factor):
    undone = go(plan(bad, factor=factor), eager_eye())
    assert undone[0].skipped == list(bad) and equal(undone, go(plan(bad, factor=factor), eager_eye(), skip=bad))
    assert all(t.isfinite().all() for t in undone[1] if t.is_floating_point())


def test_buffers_and_tied_weights_go_back_too():
    class Normed(nn.Module):
        "A model with running statistics, which a forward pass changes."
        def __init__(self):
            super().__init__()
            self.inner, self.norm = model(), nn.BatchNorm1d(3)
            self.config, self.get_output_embeddings, self.get_decoder = self.inner.config, self.inner.get_output_embeddings, self.inner.get_decoder

        def forward(self, **kw):
            return self.inner(**kw)

    def loss(m, batch):
        m.norm(torch.randn(4, 3))
        return loss_with_factor(m.inner, batch)

    ends = []
    for kw in ({"detector": eager_eye()}, {"skip": (10,)}):
        torch.manual_seed(1)
        net = Normed().train()
        train_with_rollback(net, plan((10,), factor=30.0), adamw(net, TrainConfig(learning_rate=1e-2)), lambda step: 1e-2, loss=loss, **kw)
        ends.append(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values())) and int(ends[0]["norm.num_batches_tracked"]) == 38


def test_under_a_loss_scale_an_overflow_is_the_scalers_and_a_spike_the_detectors():
    windows = plan((12,), factor=30.0)
    scaler = lambda: torch.amp.GradScaler("cpu", init_scale=2.0**10)
    undone, known, plain = go(windows, eager_eye(), scaler()), go(windows, eager_eye(), scaler(), skip=(12,)), go(windows, eager_eye())
    assert undone[0].skipped == plain[0].skipped == [12] and equal(undone, known)
    assert_close([row["grad_norm"] for row in undone[0].rows], [row["grad_norm"] for row in plain[0].rows], rtol=1e-3, atol=1e-5)  # unscaled


def test_the_event_is_written_down_before_the_run_goes_on():
    written = []

    def note(event):
        written.append((event["step"], event["window"], event["back_to"], event["skip"]))
        raise KeyboardInterrupt  # the machine goes down right here

    with pytest.raises(KeyboardInterrupt):
        go(plan((10,), factor=30.0), eager_eye(), rewind=2, skip_before=1, snapshot_every=1, keep=4, on_rollback=note)
    assert written == [(10, 10, 8, [9, 10])]
    assert equal(go(plan((10,), factor=30.0), eager_eye(), skip=written[0][3]), go(plan((10,), factor=30.0), eager_eye(), rewind=2, skip_before=1, keep=4))


def test_spikes_that_stay_and_snapshots_that_are_missing_are_errors():
    with pytest.raises(RollbackError, match="max_rollbacks is 2. It is not the batches"):
        go(plan(range(10, 20), factor=30.0), eager_eye(), max_rollbacks=2)
    with pytest.raises(RollbackError, match="no snapshot at or before step 5; keep more of them, or rewind less"):
        go(plan((10,), factor=30.0), eager_eye(), rewind=5, keep=2)
    with pytest.raises(ValueError, match="rewind and skip_before must not be negative"):
        go(plan(), rewind=-1)


class Given:
    "A layout of given micro-batches."

    def __init__(self, micro_batches):
        self.micro_batches = micro_batches

    def plan(self, epoch=0):
        return list(range(len(self.micro_batches)))

    def collate(self, item):
        return self.micro_batches[item]


@pytest.mark.parametrize("rollback", [0, 3])
def test_fit_with_the_detector_as_guard_is_the_reference_also_after_kills(tmp_path, rollback):
    windows = plan((12,), factor=30.0)
    layout = Given([batch for window in windows for batch in window])
    config = TrainConfig(learning_rate=5e-3, grad_accum_steps=2, save_every=2, keep_checkpoints=4, progress=False, cpu=True, log_every=1)
    guard = lambda: SpikeDetector(window=12, warmup=6, z=8.0, min_rise=0.25, rollback=rollback)
    seed_everything(0)
    want = model(attention_dropout=0.2).train()
    how = {"rewind": rollback, "skip_before": None, "snapshot_every": 2, "keep": 4} if rollback else {}
    result = train_with_rollback(want, windows, adamw(want, config), lambda step: learning_rate_at(step, len(windows), config),
                                 detector=guard(), loss=loss_with_factor, **how)
    assert 12 in result.skipped and len(result.skipped) == (1 if not rollback else 5)
    got = model(attention_dropout=0.2)
    history = fit(got, layout, loss_with_factor, config, guard=guard(), run_dir=tmp_path / "whole").history
    assert torch.equal(flat(got), flat(want))
    assert [row["refused"] for row in history if "refused" in row] == [[0, 12]] and "over its threshold" in next(row["why"] for row in history if "why" in row)
    killed = lambda counted: fit(model(attention_dropout=0.2), layout, counted(loss_with_factor), config, run_dir=tmp_path / "killed", resume=True, guard=guard())
    killed_until_done(killed, (5, 60), least=2)
    again = model(attention_dropout=0.2)
    fit(again, layout, loss_with_factor, config, run_dir=tmp_path / "killed", resume=True, guard=guard())
    assert torch.equal(flat(again), flat(want))


def test_a_real_spike_is_refused_in_a_real_run():
    "Random tokens in one batch: refused at once, and nothing else is."
    g = torch.Generator().manual_seed(0)
    follow = torch.randperm(58, generator=g) + 2
    ids = [torch.randint(2, 60, (6, 1), generator=g) for _ in range(70)]
    for n in range(70):
        for _ in range(11):
            ids[n] = torch.cat([ids[n], follow[ids[n][:, -1:] - 2]], 1)
    ids[60] = torch.randint(2, 60, (6, 12), generator=g)
    rows = [{"input_ids": r.tolist(), "labels": r.tolist()} for block in ids for r in block]
    layout = PaddedBatches(rows, 6, shuffle=False)
    net = model()
    history = fit(net, layout, config=replace(CONFIG, max_steps=None, learning_rate=1e-2), guard=SpikeDetector()).history
    assert [row["refused"] for row in history if "refused" in row] == [[0, 60]]
    losses = [row["loss"] for row in history if "loss" in row]
    assert F.relu(torch.tensor(losses[59:]) - losses[58] - 0.3).sum() == 0
