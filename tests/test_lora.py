"Chapter 3: the LoRA layer, merging, files, and equality with PEFT."
import copy
import json
import os
import shutil
import signal
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from helpers import CONFIG, ROWS, TOKENIZER, flat
from helpers import model as tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from llm_train_course.core import PaddedBatches, count_parameters, fit, lm_loss, tiny_llama
from llm_train_course.lora import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    LoRALinear,
    adapter_config,
    add_lora,
    dense_weight,
    dora_weight,
    load_adapter,
    lora_layers,
    lora_plus_groups,
    match_targets,
    merge_lora,
    pissa_init,
    save_adapter,
    unmerge_lora,
)
from llm_train_course.qlora import Linear4bit

few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))  # in, out, r
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
BATCH = torch.arange(40).view(4, 10) % 37 + 5
GQA = dict(n_kv_heads=2, intermediate_size=48)


def gqa(**kw):
    return tiny(**{**GQA, **kw})


def randomize(model, std=0.2, seed=0):
    "B is no longer zero."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(std * torch.randn(layer.lora_B.shape, generator=g))
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=BATCH).logits


def four_bit(kind, n=128, m=48, bias=True, double_quant=True, seed=0):
    torch.manual_seed(seed)
    plain = nn.Linear(n, m, bias=bias)
    if kind == "own":
        return Linear4bit.from_linear(plain, double_quant=double_quant, compute_dtype=torch.float32)
    if kind == "8-bit":
        layer = bnb.nn.Linear8bitLt(n, m, bias=bias, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(n, m, bias=bias, quant_type="nf4", compress_statistics=double_quant, compute_dtype=torch.float32)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


# the layer


@few
@given(shapes, st.integers(1, 40), dtypes, st.booleans(), st.booleans())
def test_merge_then_unmerge_is_the_identity(shape, alpha, dtype, bias, use_rslora):
    n, m, r = shape
    layer = LoRALinear(nn.Linear(n, m, bias=bias).to(dtype), r, alpha, use_rslora=use_rslora)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, n).to(dtype)
    y, weight, parameter = layer(x), layer.weight.clone(), layer.weight
    exact = x.double() @ (weight.double() + layer.delta_weight().double()).T + (layer.bias.double() if bias else 0)
    for _ in range(2):
        layer.merge()
        assert layer.merged and layer.weight.dtype == dtype
        eps = torch.finfo(dtype).eps
        scale = x.double().abs() @ (weight.double().abs() + layer.delta_weight().double().abs()).T + 1
        assert ((layer(x).double() - exact).abs() <= 4 * (eps + 1e-7 * (dtype != torch.float64)) * scale).all()
    for _ in range(2):
        layer.unmerge()
        assert layer.weight is parameter and torch.equal(layer.weight, weight) and torch.equal(layer(x), y)


@few
@given(shapes, st.integers(1, 40))
def test_the_update_has_at_most_rank_r(shape, alpha):
    n, m, r = shape
    layer = LoRALinear(nn.Linear(n, m).double(), r, alpha)
    nn.init.normal_(layer.lora_B)
    rank = int(torch.linalg.matrix_rank(layer.delta_weight()))
    assert rank <= r and rank == min(n, m, r)  # random factors have full rank, so the bound is met
    x = torch.randn(5, n, dtype=torch.float64)
    assert_close(layer(x) - layer.base_layer(x), x @ layer.delta_weight().T)


@pytest.mark.parametrize("kind", ["bitsandbytes", "own", "8-bit"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantized_base_trains_and_comes_back_from_merging_to_the_bit(kind, bias):
    base = four_bit(kind, bias=bias)
    layer = LoRALinear(base, r=3, alpha=10)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(2, 5, 128, requires_grad=True)
    dense = dense_weight(base)
    y = layer(x)
    if kind != "8-bit":  # there the activations are quantized too
        assert_close(y, x @ (dense + layer.delta_weight()).T + (base.bias if bias else 0), atol=1e-5, rtol=1e-5)
    y.sum().backward()
    g, h = torch.ones(10, 48), x.detach().flatten(0, 1) @ layer.lora_A.T
    assert_close(layer.lora_B.grad, layer.scaling * g.T @ h)
    assert_close(layer.lora_A.grad, layer.scaling * (g @ layer.lora_B).T @ x.detach().flatten(0, 1))
    if kind != "8-bit":
        assert_close(x.grad.flatten(0, 1), g @ (dense + layer.delta_weight()), atol=1e-4, rtol=1e-5)
    assert not any(p.requires_grad for p in base.parameters())
    stored = {k: v.clone() if torch.is_tensor(v) else v for k, v in layer.state_dict().items()}
    with torch.no_grad():
        before = layer.eval()(x)
        layer.merge()
        layer.merge()
        merged = dense_weight(base)
        error = ((merged - dense - layer.delta_weight()).norm() / (dense + layer.delta_weight()).norm()).item()
        assert 0 < error < (0.02 if kind == "8-bit" else 0.12)  # quantized once more
        assert_close(layer(x), x @ merged.T + (base.bias if bias else 0), atol=0.05 if kind == "8-bit" else 1e-5, rtol=1e-2)
        layer.unmerge()
        layer.unmerge()
        assert torch.equal(layer(x), before)
    for k, v in layer.state_dict().items():
        assert torch.equal(v, stored[k]) if torch.is_tensor(v) else v == stored[k], k


def test_merging_into_four_bits_stays_within_the_bound():
    for kind in ("bitsandbytes", "own"):
        layer = LoRALinear(four_bit(kind, double_quant=False), r=3, alpha=10)
        nn.init.normal_(layer.lora_B, std=0.1)
        exact = dense_weight(layer.base_layer).double() + layer.delta_weight().double()
        layer.merge()
        error = (dense_weight(layer.base_layer).double() - exact).abs().view(-1, 64)
        assert (error <= (1 - 0.6961928) / 2 * exact.view(-1, 64).abs().amax(1, keepdim=True) * (1 + 1e-6) + 1e-7).all()


def test_bitsandbytes_repacking_and_misread_rows_cannot_slip_through():
    base = four_bit("bitsandbytes", n=128, m=48)  # 32 does not divide 48: bitsandbytes' own evaluation may fail there
    x = torch.randn(3, 128)
    layer = LoRALinear(base, 3, 10)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), y)
    layer.train()(x.requires_grad_()).sum().backward()  # training goes on after an evaluation
    assert layer.lora_B.grad.norm() > 0
    evaluated = four_bit("bitsandbytes", n=128, m=64)
    with torch.no_grad():
        evaluated.eval()(x)
    if getattr(evaluated.weight.quant_state, "packing_format_for_cpu", False):  # only with AVX-512 bf16
        with pytest.raises(ValueError, match="re-packed"):
            LoRALinear(evaluated, 3, 10)
    odd = four_bit("bitsandbytes", n=96, m=64)  # blocks of 64 run over the end of a row
    state = odd.weight.quant_state
    codes = torch.stack([odd.weight.data.flatten() >> 4, odd.weight.data.flatten() & 15], 1).flatten().long()
    absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    true = (state.code[codes] * absmax.repeat_interleave(64)).view(64, 96)
    if torch.equal(bnb.functional.dequantize_4bit(odd.weight.data, state), true):
        assert_close(dense_weight(LoRALinear(odd, 3, 10).base_layer), true)
    else:
        with pytest.raises(ValueError, match="misreads"):
            LoRALinear(odd, 3, 10)
    LoRALinear(four_bit("own", n=96, m=64), 3, 10)


def test_merging_refuses_what_is_not_finite_and_keep_false_frees():
    layer = LoRALinear(nn.Linear(5, 7), 2, 3)
    weight = layer.weight.clone()
    layer.lora_B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.weight, weight)
    layer.lora_B.data[0, 0] = 1
    layer.merge()
    layer.merge(keep=False)  # merged already: only frees
    with pytest.raises(ValueError, match="keep=False"):
        layer.unmerge()


def test_the_kept_weight_follows_a_change_of_dtype_and_survives_a_copy():
    layer = LoRALinear(nn.Linear(5, 7), 2, 3)
    nn.init.normal_(layer.lora_B)
    weight = layer.weight.detach().clone()
    layer.merge()
    twin = copy.deepcopy(layer)
    assert [n for n, _ in layer.named_modules()] == ["", "dropout", "base_layer"]  # the original is no submodule
    layer.bfloat16()
    layer.unmerge()
    assert torch.equal(layer.weight, weight.bfloat16())
    twin.unmerge()
    assert torch.equal(twin.weight, weight) and twin.weight is not layer.weight
    layer.train()
    layer.merge()
    layer.eval()
    layer.unmerge()
    assert not layer.base_layer.training


def test_dropout_falls_on_the_update_only():
    layer = LoRALinear(nn.Linear(6, 4), 2, 5, dropout=0.5)
    x = torch.randn(1000, 6)
    assert torch.equal(layer(x), layer.base_layer(x))  # B is zero: nothing random is left
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    want = x @ layer.delta_weight().T
    assert ((layer(x) - layer.base_layer(x)).mean(0) - want.mean(0)).abs().max() < 0.2  # right on average
    assert torch.equal(layer.eval()(x), layer(x))


def gradients(model, precision=None):
    with torch.autocast("cpu", precision, enabled=precision is not None):
        loss = model.train()(input_ids=BATCH, labels=BATCH).loss
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def lora_model(r=3, alpha=10, targets="all-linear", base=gqa, seed=0, **kw):
    torch.manual_seed(seed)
    m = base()
    add_lora(m, r, alpha, targets, **kw)
    return randomize(m)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_change_no_bit_of_a_gradient(reentrant):
    plain = gradients(lora_model())
    model = lora_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:  # nothing before the first layer is trained: the old kind of checkpoint needs to be told
        model.enable_input_require_grads()
    again = gradients(model)
    assert all(torch.equal(plain[n], again[n]) for n in plain)


def test_autocast_is_no_less_exact_than_pefts():
    ours, theirs, mine, peers = pair()
    randomize(ours)
    for name, p in mine.items():
        peers[name].data.copy_(p)
    exact = flat_of(gradients(copy.deepcopy(ours)))
    off = []
    for model in (ours, theirs):
        got = gradients(model, torch.bfloat16)
        assert all(g.dtype == torch.float32 for g in got.values())
        off.append(float((flat_of(got) - exact).norm() / exact.norm()))
    assert 0 < off[0] < 1.2 * off[1]


# equality with PEFT


def pair(dtype=torch.float32, targets="all-linear", r=3, alpha=10, dropout=0.0, use_rslora=False, base=gqa):
    ours, theirs = base().to(dtype), base().to(dtype)
    torch.manual_seed(7)
    add_lora(ours, r, alpha, targets, dropout, use_rslora)
    torch.manual_seed(7)
    theirs = get_peft_model(theirs, LoraConfig(
        r=r, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout, use_rslora=use_rslora, task_type="CAUSAL_LM"))
    peers = {n.removeprefix("base_model.model.").replace(".default.weight", ""): p for n, p in theirs.named_parameters()
             if p.requires_grad}
    return ours, theirs, {n: p for n, p in ours.named_parameters() if p.requires_grad}, peers


CASES = {
    "fp32": {}, "fp64": dict(dtype=torch.float64), "bf16": dict(dtype=torch.bfloat16), "fp16": dict(dtype=torch.float16),
    "rslora": dict(use_rslora=True, r=5), "r over the width": dict(r=40, alpha=7), "dropout": dict(dropout=0.3),
    "regex": dict(targets=r"model\.layers\.1\..*_proj"), "list": dict(targets=["v_proj", "down_proj"]),
    "untied, with biases": dict(base=lambda: gqa(tie_embeddings=False, attention_bias=True, mlp_bias=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_same_start_same_outputs_same_gradients_same_ten_steps(case):
    ours, theirs, mine, peers = pair(**CASES[case])
    dtype = CASES[case].get("dtype", torch.float32)
    assert list(mine) == list(peers)
    for name, p in mine.items():
        assert p.dtype == peers[name].dtype and torch.equal(p, peers[name]), name  # to the bit
    assert count_parameters(ours) == count_parameters(theirs)
    randomize(ours, 0.1)
    for name, p in mine.items():
        peers[name].data.copy_(p)
    start = flat_of(mine)
    optimizers = [torch.optim.AdamW(p.values(), lr=1e-3) for p in (mine, peers)]
    rough = {torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 4e-3}.get(dtype, 2e-6)
    for step in range(1 if dtype == torch.float16 else 10):  # float16 is slow on a CPU
        outs = []
        for model, optimizer in zip((ours, theirs), optimizers):
            torch.manual_seed(step)
            optimizer.zero_grad()
            outs.append(model.train()(input_ids=(BATCH + step) % 300, labels=BATCH))
            outs[-1].loss.backward()
        if step == 0:
            assert_close(outs[0].logits, outs[1].logits, atol=rough, rtol=rough)
            for name, p in mine.items():
                assert_close(p.grad, peers[name].grad, atol=rough, rtol=100 * rough)
        for optimizer in optimizers:
            optimizer.step()
    apart, way = (flat_of(mine) - flat_of(peers)).norm(), (flat_of(mine) - start).norm()
    assert apart / way < {torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 2e-2}.get(dtype, 1e-4)


def flat_of(params):
    return torch.cat([p.detach().double().flatten() for p in params.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_equal_those_of_peft(dtype):
    ours, theirs, mine, peers = pair(dtype)
    randomize(ours, 0.1)
    for name, p in mine.items():
        peers[name].data.copy_(p)
    merged = theirs.merge_and_unload().state_dict()
    for name, p in merge_lora(ours, unload=True).state_dict().items():
        assert_close(p, merged[name], atol=1e-6 if dtype == torch.float32 else 2e-3, rtol=0)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["model.layers.1.mlp.up_proj", "k_proj"], r".*\.[01]\..*(o|gate)_proj",
                                     "all-linear"], ids=["suffixes", "mixed", "regex", "all-linear"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_adapters_go_from_ours_to_peft_and_back(tmp_path, targets, tied):
    build = lambda: gqa(tie_embeddings=tied)
    ours = build()
    add_lora(ours, 3, 10, targets, dropout=0.1, use_rslora=tied)
    randomize(ours)
    theirs = PeftModel.from_pretrained(build(), save_adapter(ours, tmp_path / "ours", "some/base"))
    assert_close(logits(theirs), logits(ours), atol=2e-6, rtol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == "some/base"
    theirs.save_pretrained(tmp_path / "theirs")
    back = build()
    load_adapter(back, tmp_path / "theirs")
    assert torch.equal(logits(back), logits(ours))
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
    a, b = (load_file(tmp_path / side / WEIGHTS_NAME) for side in ("ours", "theirs"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    # training goes on in PEFT
    theirs = PeftModel.from_pretrained(build(), tmp_path / "ours", is_trainable=True)
    theirs(input_ids=BATCH, labels=BATCH).loss.backward()
    assert sum(p.grad is not None for p in theirs.parameters()) == 2 * len(lora_layers(ours))


def test_a_quantized_base_equals_peft_on_it(tmp_path):
    "bitsandbytes' 4-bit layers in a model: first weights, outputs and gradients, and files both ways."
    def build():
        m = tiny_llama(len(TOKENIZER), hidden_size=64, intermediate_size=128)
        for name in match_targets(m, "all-linear"):
            parent, _, child = name.rpartition(".")
            old = m.get_submodule(name)
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32)
            new.load_state_dict(old.state_dict())
            setattr(m.get_submodule(parent), child, new.to("cpu"))
        m.is_loaded_in_4bit = True
        return m

    ours, theirs, mine, peers = pair(base=build)
    assert all(torch.equal(p, peers[n]) for n, p in mine.items()) and list(mine) == list(peers)
    assert count_parameters(ours)[1] - count_parameters(ours)[0] == count_parameters(tiny_llama(len(TOKENIZER), hidden_size=64, intermediate_size=128))[1]
    randomize(ours, 0.1)
    for name, p in mine.items():
        peers[name].data.copy_(p)
    outs = [m.train()(input_ids=BATCH, labels=BATCH) for m in (ours, theirs)]
    assert_close(outs[0].logits, outs[1].logits, atol=2e-6, rtol=1e-5)
    for out in outs:
        out.loss.backward()
    for name, p in mine.items():
        assert_close(p.grad, peers[name].grad, atol=1e-6, rtol=1e-4)
    save_adapter(ours, tmp_path / "a")
    back = build()
    load_adapter(back, tmp_path / "a")
    assert torch.equal(logits(back), logits(ours))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lora_plus_has_the_groups_of_peft(weight_decay):
    ours, theirs, mine, peers = pair()
    groups = lora_plus_groups(ours, lr=1e-3, ratio=16, weight_decay=weight_decay)
    other = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=weight_decay).param_groups
    a, b = ({id(p): (g["lr"], g["weight_decay"]) for g in gs for p in g["params"]} for gs in (groups, other))
    assert [a[id(p)] for p in mine.values()] == [b[id(peers[n])] for n in mine]
    for bad in (dict(lr=0, ratio=2), dict(lr=1e-3, ratio=-1)):
        with pytest.raises(ValueError, match="must be positive"):
            lora_plus_groups(ours, **bad)
    with pytest.raises(ValueError, match="no trainable LoRA"):
        lora_plus_groups(gqa(), 1e-3, 16)


class One(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.linear = nn.Linear(n, m)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("size", [(6, 10), (10, 6)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_dora_and_pissa_equal_peft(size, use_rslora):
    torch.manual_seed(0)
    net = One(*size)
    W, b, x = net.linear.weight.detach().clone(), net.linear.bias.detach().clone(), torch.randn(7, size[0])
    theirs = get_peft_model(copy.deepcopy(net), LoraConfig(
        r=3, lora_alpha=10, target_modules=["linear"], use_dora=True, use_rslora=use_rslora)).base_model.model.linear
    peers = [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, theirs.lora_magnitude_vector["default"].weight]
    with torch.no_grad():
        peers[1].normal_(std=0.3)
        peers[2].mul_(1.5)
    mine = [p.detach().clone().requires_grad_() for p in peers]
    scaling = 10 / (3**0.5 if use_rslora else 3)
    y = nn.functional.linear(x, dora_weight(W, mine[0], mine[1], scaling, mine[2]), b)
    assert_close(y, theirs(x))
    for out in (y, theirs(x)):
        (out**2).sum().backward()
    for p, q in zip(mine, peers):
        assert_close(p.grad, q.grad)

    layer = LoRALinear(copy.deepcopy(net.linear), 3, 10, use_rslora=use_rslora)
    pissa_init(layer)
    theirs = get_peft_model(copy.deepcopy(net), LoraConfig(
        r=3, lora_alpha=10, target_modules=["linear"], init_lora_weights="pissa", use_rslora=use_rslora)).base_model.model.linear
    assert_close(layer.delta_weight(), scaling * theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight)
    assert_close(layer.weight, theirs.base_layer.weight)
    assert_close(layer(x), nn.functional.linear(x, W, b))
    for bad, message in ((LoRALinear(nn.Linear(3, 9), 4, 1), "singular values"), (LoRALinear(four_bit("own"), 4, 1), "uint8")):
        with pytest.raises(ValueError, match=message):
            pissa_init(bad)


# which layers


def test_targets_mean_what_they_mean_to_peft():
    for targets in ("all-linear", ["q_proj"], ["1.self_attn.q_proj", "model.layers.0.mlp.gate_proj"], r".*q_proj", r"model.*\.mlp\.(up|down)_proj",
                    r"^(?!.*layers\.0).*_proj$"):
        theirs = get_peft_model(gqa(), LoraConfig(r=2, target_modules=targets))
        want = [n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
        assert match_targets(gqa(), targets) == want, targets


def test_the_summary_counts_every_matrix_of_a_mixed_model():
    m = gqa()
    total = count_parameters(m)[0]
    summary = add_lora(m, 3, 10, ["k_proj", "up_proj"])
    assert summary.names == tuple(lora_layers(m)) and len(summary.names) == 4
    assert summary.trained == 2 * 3 * ((32 + 16) + (32 + 48)) and summary.total == total + summary.trained
    assert summary.share == summary.trained / summary.total and f"{summary.trained:,} of {summary.total:,}" in str(summary)
    assert {n for n, p in m.named_parameters() if p.requires_grad} == {f"{n}.lora_{s}" for n in summary.names for s in "AB"}


def two_names():
    m = nn.ModuleDict({"a": nn.Linear(3, 4), "c": nn.Linear(4, 3)})
    m["b"] = m["a"]
    return m


def tied_pair():
    m = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
    m["b"].weight = m["a"].weight
    return m


@pytest.mark.parametrize("build, targets, message", [
    (gqa, ["query", "value"], r"match no module; linear layers here end in down_proj, gate_proj, k_proj"),
    (gqa, "q_proj", "match no module"),
    (gqa, ["q_proj", "qproj"], "'qproj' of targets matches no module"),
    (gqa, [], "match no module"),
    (gqa, r".*self_attn", "model.layers.0.self_attn is a LlamaAttention"),
    (gqa, ".*", "the whole model is a LlamaForCausalLM"),
    (gqa, "(q_proj", r"targets '\(q_proj' is no regular expression: missing \)"),
    (gqa, r".*embed_tokens", "model.embed_tokens is a Embedding"),
    (gqa, ["lm_head"], "lm_head has a tied weight, model.embed_tokens.weight and lm_head.weight"),
    (gqa, ["q_proj", "0.self_attn.q_proj"], "model.layers.0.self_attn.q_proj is matched by two entries"),
    (two_names, "all-linear", "a is one module under two names, a and b"),
    (two_names, ["b"], "match no module"),  # named_modules knows it by its first name
    (tied_pair, ["b"], "b has a tied weight, a.weight and b.weight"),
    (lambda: nn.Linear(3, 4), "all-linear", "the model itself"),
    (lambda: nn.MultiheadAttention(8, 2), "all-linear", "out_proj belongs to nn.MultiheadAttention"),
    (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2)), "all-linear", "Conv1D"),
    (lora_model, ["q_proj"], "LoRA layers already"),
    (lambda: get_peft_model(gqa(), LoraConfig(r=2, target_modules=["q_proj"])), ["v_proj"], "LoRA layers already"),
])
def test_refused_by_name_and_left_as_it_was(build, targets, message):
    m = build()
    before = {n: p.requires_grad for n, p in m.named_parameters()}
    with pytest.raises(ValueError, match=message):
        add_lora(m, 3, 10, targets)
    assert {n: p.requires_grad for n, p in m.named_parameters()} == before


def test_a_base_that_cannot_be_wrapped_is_found_before_anything_is_changed(monkeypatch):
    monkeypatch.setattr("llm_train_course.lora._is_misread", lambda weight: True)
    m = nn.Sequential(nn.Linear(8, 96), four_bit("bitsandbytes", n=96, m=64))
    with pytest.raises(ValueError, match="misreads"):
        add_lora(m, 3, 10)
    assert not lora_layers(m) and m[0].weight.requires_grad


@pytest.mark.parametrize("bad", [dict(r=0), dict(r=-1), dict(r=2.0), dict(r=True), dict(alpha=0), dict(alpha=float("nan")),
                                 dict(alpha="16"), dict(dropout=1), dict(dropout=-0.1), dict(dropout=True)])
def test_settings_are_refused(bad):
    with pytest.raises(ValueError, match=f"{list(bad)[0]} must be .*got"):
        add_lora(gqa(), **{"r": 3, "alpha": 10, **bad})


def test_an_untied_head_can_be_adapted_and_the_loss_sees_it():
    m = gqa(tie_embeddings=False)
    add_lora(m, 3, 10, ["lm_head"])
    batch = PaddedBatches(ROWS, 3).collate([0, 1, 2])
    before = lm_loss(m, batch)
    randomize(m)
    after = lm_loss(m, batch)
    assert before != after
    after.backward()
    assert lora_layers(m)["lm_head"].lora_A.grad.norm() > 0


def test_unload_leaves_a_plain_model():
    m = lora_model()
    want, names = logits(m), set(gqa().state_dict())
    assert merge_lora(m, unload=True) is m
    assert_close(logits(m), want, atol=1e-5, rtol=1e-5)
    assert not lora_layers(m) and set(m.state_dict()) == names and all(p.requires_grad for p in m.parameters())
    add_lora(m, 2, 4)  # and can be adapted again
    assert_close(logits(m), want, atol=1e-5, rtol=1e-5)
    assert merge_lora(gqa(), unload=True) and unmerge_lora(gqa())  # nothing to do


# files


@few
@given(st.integers(1, 6), st.integers(1, 40), dtypes, st.booleans(), st.integers(0, 2**13 - 1).map(lambda k: k | 1))
def test_an_adapter_comes_back_from_disk_to_the_bit(tmp_path, r, alpha, dtype, use_rslora, chosen):
    names = [n for k, n in enumerate(match_targets(gqa(), "all-linear")) if chosen >> k & 1]  # any set of layers
    m = gqa().to(dtype)
    add_lora(m, r, alpha, names, use_rslora=use_rslora)
    randomize(m)
    folder = save_adapter(m, tmp_path / "a" / "b")  # into a new place, or over the one before
    back = gqa().to(dtype)
    state = torch.random.get_rng_state()
    assert load_adapter(back, folder).names == tuple(names)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {k: v.dtype for k, v in back.state_dict().items()} == {k: v.dtype for k, v in m.state_dict().items()}
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in m.state_dict().items())
    assert not any(p.requires_grad for p in back.parameters())
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_layers_of_different_rank_and_alpha_go_through_pefts_patterns(tmp_path):
    m = gqa()
    theirs = get_peft_model(gqa(), LoraConfig(r=3, lora_alpha=10, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
                                              rank_pattern={"down_proj": 5, r"layers\.1\.self_attn\.q_proj": 2}, alpha_pattern={"down_proj": 7}))
    for n, p in theirs.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(m, tmp_path / "theirs")
    assert [(x.r, x.alpha) for x in lora_layers(m).values()] == [(3, 10), (5, 7), (2, 10), (5, 7)]
    assert_close(logits(m), logits(theirs), atol=2e-6, rtol=1e-5)
    back = PeftModel.from_pretrained(gqa(), save_adapter(m, tmp_path / "ours"))
    assert_close(logits(back), logits(m), atol=2e-6, rtol=1e-5)


def edit_config(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, fn):
    tensors = load_file(folder / WEIGHTS_NAME)
    fn(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
FAULTS = {
    "no folder": (lambda f: shutil.rmtree(f), "holds no adapter: adapter_config.json is missing"),
    "no weights": (lambda f: (f / WEIGHTS_NAME).unlink(), "adapter_model.safetensors is missing"),
    "not json": (lambda f: (f / CONFIG_NAME).write_text('{"r": 3,'), "adapter_config.json is not JSON"),
    "not text": (lambda f: (f / CONFIG_NAME).write_bytes(b"\xff\xfe\x00"), "adapter_config.json is not JSON"),
    "a list": (lambda f: (f / CONFIG_NAME).write_text("[]"), "holds a list"),
    "no r": (lambda f: edit_config(f, r=None), "r is missing"),
    "bad r": (lambda f: edit_config(f, r="3"), r"r must be a positive integer, got '3'"),
    "other r": (lambda f: edit_config(f, r=4), r"has shape \(3, 32\), the model needs \(4, 32\)"),
    "bad alpha": (lambda f: edit_config(f, lora_alpha=-1), "alpha must be a positive number, got -1"),
    "bad dropout": (lambda f: edit_config(f, lora_dropout="x"), "dropout must be"),
    "dora": (lambda f: edit_config(f, use_dora=True), "use_dora = True is not supported"),
    "pissa": (lambda f: edit_config(f, init_lora_weights="pissa"), "init_lora_weights = 'pissa' is not supported"),
    "bias": (lambda f: edit_config(f, bias="all"), "bias = 'all' is not supported"),
    "ia3": (lambda f: edit_config(f, peft_type="IA3"), "peft_type = 'IA3' is not supported"),
    "head": (lambda f: edit_config(f, modules_to_save=["lm_head"]), r"modules_to_save = \['lm_head'\] is not supported"),
    "layers": (lambda f: edit_config(f, layers_to_transform=[0]), r"layers_to_transform = \[0\] is not supported"),
    "targets": (lambda f: edit_config(f, target_modules=["query"]), "match no module"),
    "fewer targets": (lambda f: edit_config(f, target_modules=["q_proj"]), "v_proj.lora_A.weight belongs to no layer that the config names"),
    "regex": (lambda f: edit_config(f, target_modules="(q_proj"), "adapter_config.json: "),
    "truncated": (lambda f: (f / WEIGHTS_NAME).write_bytes((f / WEIGHTS_NAME).read_bytes()[:-9]), "adapter_model.safetensors is damaged"),
    "garbage": (lambda f: (f / WEIGHTS_NAME).write_bytes(b"torch"), "adapter_model.safetensors is damaged"),
    "missing": (lambda f: edit_tensors(f, lambda t: t.pop(KEY)), f"tensor {KEY} is missing"),
    "extra": (lambda f: edit_tensors(f, lambda t: t.update(x=torch.ones(1))), "tensor x belongs to no layer"),
    "shape": (lambda f: edit_tensors(f, lambda t: t.update({KEY: t[KEY].T.contiguous()})), rf"{KEY} has shape \(32, 3\)"),
    "nan": (lambda f: edit_tensors(f, lambda t: t[KEY][0].fill_(float("nan"))), f"{KEY} holds NaN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_adapter_is_refused_and_the_model_stays_as_it_was(tmp_path, fault):
    save_adapter(lora_model(targets=["q_proj", "v_proj"]), tmp_path / "a")
    damage, message = FAULTS[fault]
    damage(tmp_path / "a")
    m = gqa()
    with pytest.raises(ValueError, match=message):
        load_adapter(m, tmp_path / "a")
    assert not lora_layers(m) and torch.equal(flat(m), flat(gqa()))
    filled = lora_model(targets=["q_proj", "v_proj"], seed=1)
    weights = flat(filled).clone()
    if fault not in ("targets", "regex", "fewer targets"):  # names are not looked up again where the layers are there
        with pytest.raises(ValueError):
            load_adapter(filled, tmp_path / "a")
        assert torch.equal(flat(filled), weights)


def test_loading_into_lora_layers_needs_the_very_same(tmp_path):
    folder = save_adapter(lora_model(targets=["q_proj", "v_proj"]), tmp_path / "a")
    same = lora_model(targets=["q_proj", "v_proj"], seed=5)
    assert load_adapter(same, folder, trainable=True).trained > 0
    assert torch.equal(logits(same), logits(lora_model(targets=["q_proj", "v_proj"])))
    for other, message in ((dict(alpha=11), "alpha"), (dict(use_rslora=True), "use_rslora"), (dict(targets=["q_proj"]), "belongs to no"),
                           (dict(targets="all-linear"), "is missing")):
        with pytest.raises(ValueError, match=message):
            load_adapter(lora_model(**{"targets": ["q_proj", "v_proj"], **other}), folder)
    with pytest.raises(ValueError, match="is merged"):
        load_adapter(merge_lora(same), folder)
    with pytest.raises(ValueError, match="no LoRA layers"):
        save_adapter(gqa(), tmp_path / "b")
    with pytest.raises(ValueError, match="adapter of PEFT"):
        load_adapter(get_peft_model(gqa(), LoraConfig(r=2, target_modules=["q_proj"])), folder)


def test_a_merged_model_saves_the_same_adapter(tmp_path):
    m = lora_model()
    save_adapter(m, tmp_path / "a")
    save_adapter(merge_lora(m), tmp_path / "b")
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_kill_while_saving_never_pairs_old_and_new(tmp_path, monkeypatch):
    "At every rename: afterwards there is the old adapter, the new one, or none that loads."
    old, new = lora_model(alpha=10, targets=["q_proj"]), lora_model(alpha=20, targets=["q_proj"], seed=1)
    want = [logits(old), logits(new)]
    for moment in range(2):
        folder = save_adapter(old, tmp_path / f"at {moment}")
        left = [moment]

        def killed(source, target, left=left, real=os.replace):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                save_adapter(new, folder)
        m = gqa()
        try:
            load_adapter(m, folder)
        except ValueError as e:
            assert "adapter_config.json is missing" in str(e)
        else:
            assert any(torch.equal(logits(m), w) for w in want)
        save_adapter(new, folder)  # and the next attempt succeeds
        load_adapter(m := gqa(), folder)
        assert torch.equal(logits(m), want[1])


def test_the_config_names_endings_only_where_they_mean_the_same_layers():
    assert adapter_config(lora_model(targets=["q_proj", "v_proj"]))["target_modules"] == ["q_proj", "v_proj"]
    assert len(adapter_config(lora_model())["target_modules"]) == 7
    one = adapter_config(lora_model(targets=["model.layers.1.mlp.up_proj"]))
    assert one["target_modules"] == ["model.layers.1.mlp.up_proj"]
    assert LoraConfig(**one).r == 3


class Nested(nn.Module):
    "A name that is an ending of another's, and one with a character that means something in a pattern."

    def __init__(self):
        super().__init__()
        self.linear, self.xylinear = nn.Linear(5, 7), nn.Linear(7, 7)
        self.a = One(7, 5)
        self.add_module("x-y", nn.ModuleDict({"linear": nn.Linear(5, 3)}))

    def forward(self, x):
        return self.get_submodule("x-y").linear(self.a(self.xylinear(self.linear(x))))


@pytest.mark.parametrize("targets", ["all-linear", "linear", r"a\.linear", ["x-y.linear"], "linear|x-y.linear"])
def test_names_inside_names_go_to_peft_and_back(tmp_path, targets):
    m, x = Nested(), torch.randn(4, 5)
    state = copy.deepcopy(m.state_dict())
    if targets == "all-linear":
        targets = r"(a\.|x-y\.|xy)?linear"
    add_lora(m, 2, 4, targets)
    layers = list(lora_layers(m).values())
    layers[0].alpha, layers[0].scaling = 40, 20.0  # an alpha of its own: no shape would tell
    randomize(m)
    save_adapter(m, tmp_path)
    other, theirs = Nested(), Nested()
    for base in (other, theirs):
        base.load_state_dict(state)
    load_adapter(other, tmp_path)
    assert {n: (v.r, v.alpha) for n, v in lora_layers(other).items()} == {n: (v.r, v.alpha) for n, v in lora_layers(m).items()}
    assert torch.equal(other(x), m(x))
    assert_close(PeftModel.from_pretrained(theirs, tmp_path)(x), m(x))


def test_a_residual_base_is_not_saved_as_an_adapter(tmp_path):
    m, x = One(6, 10), torch.randn(3, 6)
    before = m(x)
    add_lora(m, 2, 5)
    pissa_init(m.linear)
    with pytest.raises(ValueError, match="linear stands on the residual weight that pissa_init left"):
        save_adapter(m, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert_close(merge_lora(m, unload=True)(x), before)


def test_the_current_folder_can_be_saved_into(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_adapter(lora_model(), ".")
    assert (tmp_path / "here" / WEIGHTS_NAME).is_file() and [p.name for p in tmp_path.iterdir()] == ["here"]


def test_merging_is_all_or_nothing_and_names_the_layer():
    m = randomize(lora_model())
    name = list(lora_layers(m))[5]
    with torch.no_grad():
        lora_layers(m)[name].lora_B[0, 0] = float("nan")
    for unload in (False, True):
        with pytest.raises(ValueError, match=f"{name}: the merged weight is not finite"):
            merge_lora(m, unload=unload)
        assert len(lora_layers(m)) == 14 and not any(v.merged for v in lora_layers(m).values())


def test_a_merged_state_is_not_written_under_the_names_of_an_unmerged_one():
    m = randomize(lora_model())
    merge_lora(m)
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj is merged"):
        m.state_dict()
    unmerge_lora(m)
    assert len(m.state_dict()) > 28


def test_packed_codes_in_a_float_dtype_do_not_train_after_unload():
    layer = bnb.nn.Linear4bit(64, 32, bias=True, quant_type="nf4", quant_storage=torch.bfloat16)
    m = nn.Sequential(layer).to("cpu")
    add_lora(m, 2, 4, ["0"])
    merge_lora(m, unload=True)
    assert [p.requires_grad for p in m.parameters()] == [False, True] and m[0].weight.dtype == torch.bfloat16


# training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_through_fit_equals_peft_and_moves_nothing_else(dtype):
    layout, config = PaddedBatches(ROWS, 2), replace(CONFIG, learning_rate=1e-3)
    ours, theirs, mine, peers = pair(dtype)
    frozen = {n: p.clone() for n, p in ours.named_parameters() if not p.requires_grad}
    losses = [[row["loss"] for row in fit(m, layout, config=config).history] for m in (ours, theirs)]
    assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=0)
    assert losses[0][-1] < losses[0][0]
    assert all(torch.equal(p, frozen[n]) for n, p in ours.named_parameters() if n in frozen)
    assert all(p.dtype == torch.float32 for p in mine.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, dtype):
    layout, config = PaddedBatches(ROWS, 2), replace(CONFIG, save_every=4)
    build = lambda seed=0: lora_model(base=lambda: gqa().to(dtype), dropout=0.2, seed=seed)
    want = build()
    fit(want, layout, config=config)

    def bomb(m, batch, calls=[]):  # noqa: B006  (counts over calls)
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return lm_loss(m, batch)

    assert fit(build(), layout, bomb, config, run_dir=tmp_path).interrupted
    got = build(seed=3)  # other first adapters: all that is trained comes from the checkpoint
    fit(got, layout, config=config, run_dir=tmp_path, resume=True)
    assert torch.equal(flat(got), flat(want))
    weights = load_file(sorted((tmp_path / "checkpoints").glob("step_*"))[-1] / "weights.safetensors")
    assert set(weights) == {n for n, p in got.named_parameters() if p.requires_grad}  # the base is not in it


@pytest.mark.parametrize("kind", ["own", "bitsandbytes"])
def test_a_quantized_model_trains_through_fit(kind):
    def build():
        m = tiny_llama(len(TOKENIZER), hidden_size=64, intermediate_size=128)
        for name in match_targets(m, "all-linear"):
            parent, _, child = name.rpartition(".")
            old = m.get_submodule(name)
            if kind == "own":
                new = Linear4bit.from_linear(old, compute_dtype=torch.float32)
            else:
                new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32)
                new.load_state_dict(old.state_dict())
                new = new.to("cpu")
            setattr(m.get_submodule(parent), child, new)
        torch.manual_seed(0)
        add_lora(m, 3, 10)
        return m

    m = build()
    codes = {n: layer.weight.clone() for n, layer in lora_layers(m).items()}
    history = fit(m, PaddedBatches(ROWS, 2), config=CONFIG).history
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(torch.equal(layer.weight, codes[n]) for n, layer in lora_layers(m).items())
    trained = logits(m)
    merge_lora(m)
    assert 0 < (logits(m) - trained).norm() / trained.norm() < 0.2  # quantized once more
    unmerge_lora(m)
    assert torch.equal(logits(m), trained)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_equals_peft_and_merging_is_exactly_undone(tmp_path, dtype):
    ours, theirs, mine, peers = pair(dtype)
    randomize(ours, 0.1)
    for name, p in mine.items():
        peers[name].data.copy_(p)
    ours, theirs, ids = ours.cuda(), theirs.cuda(), BATCH.cuda()
    outs = [m.train()(input_ids=ids, labels=ids) for m in (ours, theirs)]
    rough = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close(outs[0].logits, outs[1].logits, atol=rough, rtol=rough)
    for out in outs:
        out.loss.backward()
    peers = {n.removeprefix("base_model.model.").replace(".default.weight", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    for name, p in ours.named_parameters():
        if p.requires_grad:
            assert_close(p.grad, peers[name].grad, atol=rough, rtol=100 * rough)
    with torch.no_grad():
        before = ours.eval()(input_ids=ids).logits
        merge_lora(ours)
        ours.cpu().cuda()  # the kept weights go along
        assert_close(ours(input_ids=ids).logits, before, atol=10 * rough, rtol=rough)
        unmerge_lora(ours)
        assert torch.equal(ours(input_ids=ids).logits, before)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["bitsandbytes", "8-bit", "own"])
def test_on_a_gpu_quantized_bases_come_back_to_the_bit(kind):
    layer = LoRALinear(four_bit(kind).cuda(), 3, 10)
    assert layer.lora_A.device.type == "cuda"
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(4, 128, device="cuda", dtype=torch.float16 if kind == "8-bit" else torch.float32)
    with torch.no_grad():
        before = layer(x)
        layer.merge()
        assert not torch.equal(layer(x), before)
        layer.unmerge()
        assert torch.equal(layer(x), before)
