"Chapter 4: four-bit storage bit-equal to bitsandbytes, the layer, whole models, files, training."
import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState, has_avx512bf16
from helpers import CONFIG, ROWS, TOKENIZER
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llm_train_course.core import PaddedBatches, count_parameters, evaluate, lm_loss, tiny_llama
from llm_train_course.lora import add_lora, lora_layers, merge_lora, unmerge_lora
from llm_train_course.qlora import (
    BLOCKSIZES,
    QLORA,
    Linear4bit,
    Quantized4bit,
    code_entropy,
    dequantize_model,
    dynamic_levels,
    fp4_levels,
    levels,
    lloyd_levels,
    load_quantized,
    nearest_codes,
    nf4_levels,
    quantize_4bit,
    quantize_model,
    quantized_from_bitsandbytes,
    quantized_from_state,
    quantized_layers,
    quantized_to_bitsandbytes,
    quantized_to_state,
    relative_error,
    save_quantized,
    train_qlora,
)
from llm_train_course.shapes import quantized_bytes

torch._dynamo.config.disable = True  # bitsandbytes compiles a fallback of its own; slow, and no bit changes
many = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
few = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["nf4", "fp4"]


def numbers(n, kind, dtype, seed):
    "n numbers of one of the kinds that have broken quantizers."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    if kind == "zeros":
        x = x * 0
    elif kind == "constant":
        x = torch.full((n,), -0.3)
    elif kind == "sparse":
        x = x * (torch.rand(n, generator=g) < 0.02)
    elif kind == "subnormal":
        x = x * (1e-41 if dtype != torch.float16 else 2e-7)
    elif kind == "barely normal":
        x = x * (1e-38 if dtype != torch.float16 else 6e-5)
    elif kind == "huge":
        x = x.clamp(-3, 3) * (1e38 if dtype != torch.float16 else 2e4)
    elif kind == "outliers":
        x = torch.where(torch.rand(n, generator=g) < 0.01, x * 1e4, x)
    elif kind == "ties":  # midpoints of both codes, with 1 in each block so that they are not scaled
        middle = torch.cat([(levels(k).sort().values[1:] + levels(k).sort().values[:-1]) / 2 for k in KINDS])
        x = middle[torch.randint(len(middle), (n,), generator=g)]
        x[::16] = 1.0
    return x.to(dtype)


SPECIAL = ["normal", "zeros", "constant", "sparse", "subnormal", "barely normal", "huge", "outliers", "ties"]


def theirs_of(x, blocksize, quant_type, double_quant):
    return bnb.functional.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type, compress_statistics=double_quant)


def by_definition(codes, scales, q):
    "Level times constant, rounded once, written out."
    n = math.prod(q.shape)
    index = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], 1).view(-1)[:n].long()
    return (levels(q.quant_type)[index] * scales.repeat_interleave(q.blocksize)[:n]).to(q.dtype).view(q.shape)


def check_equal(x, blocksize, quant_type, double_quant, dense=True):
    q = quantize_4bit(x, blocksize, quant_type, double_quant)
    codes, state = theirs_of(x, blocksize, quant_type, double_quant)
    assert torch.equal(q.codes, codes) and torch.equal(q.absmax, state.absmax) and q.absmax.dtype == state.absmax.dtype
    if double_quant:
        assert torch.equal(q.nested_absmax, state.state2.absmax) and torch.equal(q.offset, state.offset)
    assert torch.equal(q.dequantize(), by_definition(codes, q.scales(), q))
    if dense:
        assert torch.equal(q.dequantize(), bnb.functional.dequantize_4bit(codes, state).view(x.shape))
    assert q.nbytes == quantized_bytes(x.numel(), blocksize, double_quant)
    return q


# ------------------------------------------------------------------------------------------------ the codes

def test_nf4_costs_no_more_than_torch():
    "Neither transformers nor bitsandbytes nor scipy is imported for the sixteen levels."
    code = ("import sys; from llm_train_course.qlora import nf4_levels; print(nf4_levels()); "
            "print([m for m in ('transformers', 'bitsandbytes', 'peft', 'accelerate', 'datasets', 'scipy', 'matplotlib') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "-0.6962" in out and out.strip().endswith("[]")


def test_levels_are_bit_equal_and_not_shared():
    for kind, function in (("nf4", nf4_levels), ("fp4", fp4_levels)):
        assert torch.equal(function(), bnb.functional.get_4bit_type(kind, device="cpu")) and torch.equal(levels(kind), function())
    assert torch.equal(dynamic_levels(), bnb.functional.create_dynamic_map())
    nf4_levels().zero_()
    dynamic_levels().zero_()
    assert nf4_levels()[0] == -1 and dynamic_levels()[-1] == 1


@given(st.integers(1, 700), st.sampled_from([4, 32, 64, None]), st.integers(0, 99), st.sampled_from(["nf4", "fp4", "int4"]))
@many
def test_error_and_entropy(n, blocksize, seed, kind):
    "Bounds, the order of the levels does not matter, and the helpers agree with what is stored."
    x = numbers(n, "normal", torch.float32, seed)
    codes, scales = nearest_codes(x, levels(kind), blocksize)
    assert 0 <= code_entropy(codes) <= math.log2(16) + 1e-12
    if blocksize:
        assert torch.equal(scales[:, 0], torch.stack([b.abs().max() for b in x.split(blocksize)]))
    permuted = levels(kind)[torch.randperm(len(levels(kind)), generator=torch.Generator().manual_seed(seed))]
    assert relative_error(x, permuted, blocksize) == pytest.approx(relative_error(x, levels(kind), blocksize), rel=1e-9)
    if kind != "int4" and blocksize in BLOCKSIZES:
        lost = (quantize_4bit(x, blocksize, kind).dequantize() - x).double().pow(2).sum() / x.double().pow(2).sum()
        assert relative_error(x, levels(kind), blocksize) == pytest.approx(float(lost), rel=1e-4)


def test_lloyd_beats_nf4_in_its_own_measure_at_every_blocksize():
    x = numbers(1 << 17, "normal", torch.float32, 0)
    for blocksize in (32, 256, 4096):
        for p in (1, 2):
            q = lloyd_levels(p, blocksize)
            assert torch.equal(q, q.sort().values) and q[0] == -1 and q[-1] == 1 and 0.0 in q
            assert relative_error(x, q, blocksize, p) < relative_error(x, nf4_levels(), blocksize, p) * 1.0005
    free = lloyd_levels(2, 64, pinned=())
    assert_close(free, -free.flip(0), atol=1e-5, rtol=0)  # symmetric data, symmetric code
    for k in (0, 15):  # where one number of each block lies at an end, the end levels know of it
        for step in (-0.01, 0.01):
            moved = free.clone()
            moved[k] += step
            assert relative_error(x, moved, 64) > relative_error(x, free, 64)


# ------------------------------------------------------------------------------------------------ bit equality

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("quant_type", KINDS)
def test_bit_equal_to_bitsandbytes(dtype, kind, quant_type):
    flushed = dtype == torch.bfloat16 and kind in ("subnormal", "barely normal")  # see the test of that deviation
    for blocksize in (32, 64, 256, 4096):
        for n in (1, 2, 63, 64, 65, 1000, 4097, 131_072 + 33):
            check_equal(numbers(n, kind, dtype, n), blocksize, quant_type, False, dense=not flushed)
            if kind != "huge":
                check_equal(numbers(n, kind, dtype, n), blocksize, quant_type, True, dense=not flushed)


@given(st.integers(1, 5000), st.sampled_from(DTYPES), st.sampled_from(BLOCKSIZES), st.sampled_from(KINDS), st.booleans(),
       st.sampled_from(["normal", "constant", "sparse", "outliers", "ties"]), st.integers(0, 10**6))
@example(n=131_073, dtype=torch.bfloat16, blocksize=4096, quant_type="fp4", double_quant=True, kind="normal", seed=1)
@many
def test_bit_equal_at_any_length(n, dtype, blocksize, quant_type, double_quant, kind, seed):
    check_equal(numbers(n, kind, dtype, seed), blocksize, quant_type, double_quant)


@given(st.integers(1, 40), st.integers(1, 60), st.booleans(), st.sampled_from(DTYPES))
@few
def test_rows_of_any_length(rows, columns, transposed, dtype):
    "Blocks run through rows; a transposed view is quantized as what it shows."
    x = numbers(rows * columns, "normal", dtype, rows).view(rows, columns)
    x = x.t() if transposed else x
    q = check_equal(x, 32, "nf4", True, dense=x.shape[-1] % 16 != 0)
    assert torch.equal(q.dequantize(), quantize_4bit(x.contiguous(), 32, "nf4", True).dequantize()) and q.shape == x.shape


@given(st.lists(st.floats(1e-20, 1e20), min_size=1, max_size=600), st.booleans())
@few
def test_double_quantized_constants_of_any_size(values, equal):
    "Constants over forty decades, or all the same: a mean that dwarfs most of them, and blocks of nothing but zeros."
    values = [values[0]] * len(values) if equal else values
    x = torch.tensor(values, dtype=torch.float32).repeat_interleave(32)
    check_equal(x, 32, "nf4", True, dense=False)


@given(st.integers(1, 600), st.sampled_from(KINDS), st.sampled_from([32, 64, 128]), st.integers(0, 99))
@many
def test_round_trip_bound_and_idempotence(n, quant_type, blocksize, seed):
    x = numbers(n, "outliers", torch.float32, seed)
    q = quantize_4bit(x, blocksize, quant_type)
    gap = levels(quant_type).sort().values.diff().max()
    bound = q.absmax.repeat_interleave(blocksize)[:n] * gap / 2
    assert ((q.dequantize() - x).abs() <= bound * (1 + 1e-6)).all()
    again = quantize_4bit(q.dequantize(), blocksize, quant_type)  # what lies on its levels stays there
    assert torch.equal(again.dequantize(), q.dequantize()) and torch.equal(again.absmax, q.absmax)  # FP4's -0 becomes +0


# ------------------------------------------------------------------------------------------------ refusals

@given(st.integers(0, 199), st.sampled_from([math.nan, math.inf, -math.inf]), st.sampled_from(DTYPES), st.sampled_from([32, 64, 4096]))
@few
def test_nonfinite_is_refused_naming_the_first(at, value, dtype, blocksize):
    x = torch.ones(10, 20, dtype=dtype)
    x.view(-1)[at:] = math.nan
    x.view(-1)[at] = value
    with pytest.raises(ValueError) as e:
        quantize_4bit(x, blocksize)
    assert f"{float(x.view(-1)[at])} at position ({at // 20}, {at % 20}) of a tensor of shape (10, 20)" in str(e.value)


@pytest.mark.parametrize("x, options, named", [
    (torch.ones(4).double(), {}, "float64"), (torch.ones(4, dtype=torch.int32), {}, "int32"), (torch.ones(0, 3), {}, r"\(0, 3\)"),
    (torch.ones(4).to(torch.float8_e4m3fn), {}, "float8"), (torch.ones(4), {"blocksize": 48}, "48"), (torch.ones(4), {"blocksize": 0}, "0"),
    (torch.ones(4), {"quant_type": "int4"}, "'int4'"), (torch.full((64,), 3e38), {"blocksize": 32, "double_quant": True}, "3e[+]38 overflows")])
def test_what_cannot_be_quantized_is_named(x, options, named):
    with pytest.raises(ValueError, match=named):
        quantize_4bit(x, **options)


def test_a_mean_that_overflows_is_nan_in_bitsandbytes():
    "Why double quantization refuses constants whose mean is infinite: bitsandbytes returns NaN for every number."
    codes, state = theirs_of(torch.full((64,), 3e38), 32, "nf4", True)
    assert bnb.functional.dequantize_4bit(codes, state).isnan().all()


# ------------------------------------------------------------------------------------------------ where bitsandbytes is not itself

def test_rows_that_are_no_multiple_of_the_block_are_decoded_by_definition():
    "bitsandbytes' AVX-512 kernel takes the constants of other blocks when rows are a multiple of 16 long but not of the block."
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)[:, None]
    q = check_equal(x, 64, "nf4", False, dense=False)  # codes, constants, and ours by the definition
    if torch.equal(bnb.functional.dequantize_4bit(*theirs_of(x, 64, "nf4", False)), q.dequantize()):
        pytest.skip("bitsandbytes' kernel for this CPU follows the definition")
    assert not has_avx512bf16() or "AVX512" in torch.backends.cpu.get_cpu_capability()


def test_bf16_results_below_the_normal_range_are_kept():
    "bitsandbytes' AVX512-BF16 conversion makes them zero; ours rounds them like any other number."
    x = numbers(128, "barely normal", torch.bfloat16, 3)
    q = check_equal(x, 64, "nf4", False, dense=False)
    theirs = bnb.functional.dequantize_4bit(*theirs_of(x, 64, "nf4", False)).view(-1)
    differs = theirs != q.dequantize()
    assert (theirs[differs] == 0).all() and (q.dequantize()[differs].abs() < torch.finfo(torch.bfloat16).tiny).all()


def bnb_layer(linear, quant_type="nf4", double_quant=True, compute_dtype=None, blocksize=64):
    "bitsandbytes' layer of the same weight, in training mode, which it does not repack."
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype,
                              compress_statistics=double_quant, quant_type=quant_type)
    layer.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, compress_statistics=double_quant,
                                     quant_type=quant_type, blocksize=blocksize, module=layer)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data.clone())
    return layer.to("cpu").train()


def test_bitsandbytes_evaluates_once_and_cannot_train_any_more():
    "Why quantize_model(backend='bitsandbytes') switches its repacking off: layers made by it keep their gradient and constants."
    if not has_avx512bf16():
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 only")
    linear = nn.Linear(128, 96, bias=False)
    theirs, x = bnb_layer(linear, double_quant=False), torch.randn(5, 128)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.eval()(x)
    saved = theirs.state_dict()["weight.absmax"]
    assert saved.dtype == torch.bfloat16 and saved.shape == (2, 96)  # rounded and transposed: another layer when read back
    with pytest.raises(ValueError, match="repacked"):
        quantized_from_bitsandbytes(theirs.weight.data, bnb_repacked(linear, x).weight.quant_state)
    model = nn.Sequential(linear)
    dense = quantize_4bit(linear.weight).dequantize()
    quantize_model(model, ["0"], double_quant=False, backend="bitsandbytes")
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), x @ dense.T)
    x.requires_grad_()
    model.train()(x).sum().backward()
    assert_close(x.grad[0], dense.sum(0))


def bnb_repacked(linear, x):
    layer = bnb_layer(linear, double_quant=False).eval()
    with torch.no_grad():
        layer(x)
    return layer


# ------------------------------------------------------------------------------------------------ entries of a file

@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(DTYPES), st.sampled_from(KINDS), st.booleans(), st.sampled_from([32, 64, 2048]))
@many
def test_entries_of_both_sides_are_the_same(rows, columns, dtype, quant_type, double_quant, blocksize):
    x = numbers(rows * columns, "normal", dtype, columns).view(rows, columns)
    q = quantize_4bit(x, blocksize, quant_type, double_quant)
    codes, state = theirs_of(x, blocksize, quant_type, double_quant)
    mine, theirs = quantized_to_state(q, "w"), {"w": codes, **{f"w.{k}": v for k, v in state.as_dict(packed=True).items()}}
    blob = f"w.quant_state.bitsandbytes__{quant_type}"
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine if k != blob)
    assert json.loads(bytes(mine[blob].tolist())) == json.loads(bytes(theirs[blob].tolist()))
    for back in (quantized_from_state(theirs, "w"), quantized_from_bitsandbytes(codes, state)):
        assert torch.equal(back.dequantize(), q.dequantize()) and (back.shape, back.nbytes) == (q.shape, q.nbytes)
    packed, rebuilt = quantized_to_bitsandbytes(q)
    assert isinstance(rebuilt, QuantState) and rebuilt == state and packed is q.codes


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_codes_stored_in_another_dtype_are_read(storage):
    "`bnb_4bit_quant_storage`, which FSDP needs."
    x = torch.randn(16, 16)
    codes, state = bnb.functional.quantize_4bit(x, quant_type="nf4", quant_storage=storage)
    assert torch.equal(quantized_from_bitsandbytes(codes, state).dequantize(), quantize_4bit(x).dequantize())


def edited(state, **fields):
    "The entries with some fields of the JSON replaced; None: taken out."
    name = next(k for k in state if "bitsandbytes__" in k)
    inside = {**json.loads(bytes(state[name].tolist())), **fields}
    text = json.dumps({k: v for k, v in inside.items() if v is not None}).encode()
    return {**state, name: torch.tensor(list(text), dtype=torch.uint8)}


BLOB = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize("spoil, named", [
    (lambda s: {k: v for k, v in s.items() if k != BLOB}, "exactly one of"), (lambda s: {**s, BLOB: s[BLOB][:-3]}, f"{BLOB} is damaged"),
    (lambda s: edited(s, blocksize=48), "blocksize 48"), (lambda s: edited(s, dtype="float8"), "dtype 'float8'"),
    (lambda s: edited(s, shape=None), "damaged: KeyError 'shape'"), (lambda s: edited(s, shape=[8, -70]), "shape is"), (lambda s: edited(s, shape=[9, 70]), "needs 315"),
    (lambda s: edited(s, quant_type="fp4"), "'fp4' inside"), (lambda s: edited(s, nested_blocksize=128), "nested_blocksize 128"),
    (lambda s: {k: v for k, v in s.items() if k != "weight.absmax"}, "weight.absmax missing"),
    (lambda s: {**s, "weight.absmax": s["weight.absmax"][:-1]}, "weight.absmax: has 8 entries"),
    (lambda s: {**s, "weight.absmax": s["weight.absmax"].float()}, "weight.absmax: is torch.float32"),
    (lambda s: {**s, "weight.quant_map": fp4_levels()}, "not the levels of nf4"),
    (lambda s: {**s, "weight.nested_quant_map": torch.zeros(256)}, "nested_quant_map"),
    (lambda s: {**s, "weight.nested_absmax": torch.ones(3)}, "nested_absmax: has 3 entries")])
def test_entries_that_do_not_fit_are_refused_by_name(spoil, named):
    state = quantized_to_state(quantize_4bit(torch.randn(8, 70), 64, "nf4", True))
    assert isinstance(quantized_from_state(state), Quantized4bit)
    with pytest.raises(ValueError, match=named):
        quantized_from_state(spoil(state))


# ------------------------------------------------------------------------------------------------ the layer

def layers(n_out, n_in, dtype=torch.float32, bias=True, compute_dtype=None, **options):
    torch.manual_seed(n_in)
    linear = nn.Linear(n_in, n_out, bias=bias).to(dtype)
    return Linear4bit.from_linear(copy.deepcopy(linear), compute_dtype=compute_dtype, **options), bnb_layer(linear, compute_dtype=compute_dtype, **options)


def run(layer, x, grad):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad.to(y.dtype))
    return y.detach(), x.grad


@pytest.mark.parametrize("n_out, n_in", [(96, 128), (33, 70), (7, 64), (1, 33), (20, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4", "double_quant": False}, {"blocksize": 32}])
def test_layer_equals_bitsandbytes_layer(n_out, n_in, dtype, bias, options):
    ours, theirs = layers(n_out, n_in, dtype, bias, **options)
    for lead in ((5,), (2, 3)) if bias else ((5,), (2, 3), ()):  # with a bias, bitsandbytes cannot differentiate for one vector
        x, grad = torch.randn(*lead, n_in).to(dtype), torch.randn(*lead, n_out)
        (y, dx), (their_y, their_dx) = run(ours, x, grad), run(theirs, x, grad)
        assert torch.equal(y, their_y) and torch.equal(dx, their_dx) and y.dtype == dtype
    assert ours.weight.grad is None and ours.weight.dtype == torch.uint8
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_layer_under_autocast_and_with_a_compute_dtype():
    "Autocast decides, as in bitsandbytes' layer; a compute_dtype that was asked for wins over it (in bitsandbytes autocast does)."
    ours, theirs = layers(33, 70)
    x, grad = torch.randn(4, 70), torch.randn(4, 33)
    with torch.autocast("cpu", torch.bfloat16):
        (y, dx), (their_y, their_dx) = run(ours, x, grad), run(theirs, x, grad)
    assert torch.equal(y, their_y) and torch.equal(dx, their_dx) and y.dtype == torch.float32
    low, their_low = layers(33, 70, compute_dtype=torch.bfloat16)
    assert torch.equal(run(low, x, grad)[0], run(their_low, x, grad)[0]) and torch.equal(run(low, x, grad)[0], y)
    full, _ = layers(33, 70, compute_dtype=torch.float32)
    exact = run(full, x, grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(full, x, grad), exact))


def test_gradient_is_that_of_the_weight_used_forward():
    "A bf16 weight in a float32 product: bitsandbytes' backward pass rounds the dense weight to bf16, its forward pass does not."
    ours, theirs = layers(96, 128, torch.bfloat16, bias=False)
    x, grad = torch.randn(5, 128), torch.randn(5, 96)
    (y, dx), (their_y, their_dx) = run(ours, x, grad), run(theirs, x, grad)
    dense = ours.dequantize(torch.float32)
    assert torch.equal(y, their_y) and torch.equal(y, x @ dense.T)
    assert torch.equal(dx, grad @ dense) and torch.equal(their_dx, grad @ dense.bfloat16().float())


@given(st.integers(1, 12), st.integers(1, 40), st.booleans(), st.sampled_from(KINDS), st.booleans())
@few
def test_layer_equals_a_dense_one(n_out, n_in, bias, quant_type, double_quant):
    "Output and gradients, the bias's too, against autograd through nn.Linear with the dequantized weight."
    linear = nn.Linear(n_in, n_out, bias=bias)
    ours = Linear4bit.from_linear(copy.deepcopy(linear), 32, quant_type, double_quant)
    linear.weight.data = ours.dequantize()
    x, grad = torch.randn(2, 3, n_in), torch.randn(2, 3, n_out)
    for a, b in zip(run(ours, x, grad), run(linear, x, grad)):
        assert_close(a, b)
    if bias:
        assert_close(ours.bias.grad, linear.bias.grad)


def test_layer_under_checkpointing_copies_and_casts():
    ours, theirs = layers(33, 70)
    dense, x = ours.dequantize(), torch.randn(4, 70, requires_grad=True)
    checkpoint(ours, x, use_reentrant=False).sum().backward()
    assert_close(x.grad[0], dense.sum(0))
    for move in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.type(torch.float64), lambda m: m.share_memory(),
                 lambda m: m.to("cpu", non_blocking=True)):
        changed = move(copy.deepcopy(ours))
        assert torch.equal(changed.dequantize(torch.float32), dense) and changed.weight.dtype == torch.uint8
        assert changed.weight.data_ptr() != ours.weight.data_ptr()
    assert not list(ours.buffers()) and [n for n, p in ours.named_parameters() if p.requires_grad] == ["bias"]
    away = copy.deepcopy(ours).to("meta")  # constants go where the codes go
    assert away.weight.is_meta and away.quantized.absmax.is_meta and away.quantized.nested_absmax.is_meta and away.quantized.offset.is_meta
    kept = ours.weight
    other = copy.deepcopy(ours)
    other.requantize(dense * 2)
    assert_close(other.dequantize(), 2 * dense, rtol=0.02, atol=0)  # constants are rounded to 8 bits anew
    assert torch.equal(ours.dequantize(), dense) and ours.weight is kept
    with pytest.raises(ValueError, match=r"\(33, 70\), got \(70, 33\)"):
        other.requantize(dense.T)
    with pytest.raises(ValueError, match=r"\(out, in\)"):
        Linear4bit(quantize_4bit(torch.randn(5)))


def test_layer_state_dict():
    ours, theirs = layers(33, 70)
    for source, target in ((theirs, layers(33, 70)[0]), (ours, Linear4bit.from_linear(nn.Linear(70, 33), 64, "fp4", False))):
        parameter = target.weight
        assert not any(target.load_state_dict(source.state_dict()))
        assert torch.equal(target.dequantize(), ours.dequantize()) and torch.equal(target.bias, ours.bias)
        assert target.weight is parameter and list(target.state_dict()) == list(ours.state_dict())
    wrapped = nn.Sequential(layers(33, 70)[0])
    assert not any(wrapped.load_state_dict({f"0.{k}": v for k, v in ours.state_dict().items()}))
    state = ours.state_dict()
    for spoiled, named in (({**state, "extra": torch.ones(1)}, "extra"), ({k: v for k, v in state.items() if k != "bias"}, "bias"),
                           ({"bias": state["bias"]}, "weight"), ({**state, "weight": state["weight"][:-1]}, "weight: has 1154 entries"),
                           (layers(33, 72)[0].state_dict(), "does not fit")):
        before = ours.dequantize()
        with pytest.raises(RuntimeError, match=named):
            layers(33, 70)[0].load_state_dict(spoiled)
        assert torch.equal(ours.dequantize(), before)


# ------------------------------------------------------------------------------------------------ whole models

def llama(seed=0, **options):
    "Grouped queries, biases, odd sizes: rows of 36 and 53 numbers, so that blocks run through rows."
    return tiny_llama(len(TOKENIZER), seed=seed, **{"hidden_size": 36, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2,
                                                    "intermediate_size": 53, "attention_bias": True, **options})


IDS = torch.arange(33).view(3, 11) % 37 + 5
BLOCK = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("targets, n", [("all-linear", 14), (BLOCK[:2], 4), (r".*layers\.1\..*_proj", 7), (["model.layers.0.mlp.up_proj"], 1)])
@pytest.mark.parametrize("backend", ["own", "bitsandbytes"])
def test_quantize_model_in_place(targets, n, backend):
    model, dense = llama().to(torch.bfloat16).eval(), llama().to(torch.bfloat16)
    total = count_parameters(model)[1]
    names = quantize_model(model, targets, blocksize=32, quant_type="fp4", backend=backend)
    assert len(names) == n and list(quantized_layers(model)) == names and count_parameters(model)[1] == total
    for name, p in dense.named_parameters():
        base, _, kind = name.rpartition(".")
        if base in names and kind == "weight":
            layer = model.get_submodule(base)
            q = layer.quantized if backend == "own" else quantized_from_bitsandbytes(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(q.dequantize(), quantize_4bit(p, 32, "fp4", True).dequantize()) and q.dtype == torch.bfloat16
            assert not layer.training and not layer.weight.requires_grad
        else:
            assert torch.equal(model.get_parameter(name), p)  # biases, norms, embedding, what was not asked for
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()


def test_both_backends_compute_the_same():
    models = [llama().eval() for _ in range(2)]
    for model, backend in zip(models, ("own", "bitsandbytes")):
        quantize_model(model, backend=backend)
    with torch.no_grad():
        assert torch.equal(models[0](IDS).logits, models[1](IDS).logits)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight


@pytest.mark.parametrize("make, targets, named", [
    (llama, ["lm_head"], "lm_head has a tied weight .*embed_tokens"), (llama, ["q_proj", "nope"], "'nope' matches no module; .*down_proj"),
    (llama, ".*nope", "nope.* matches no module"), (llama, ["embed_tokens"], "Embedding"), (llama, ["mlp"], "MLP"), (llama, [], "matches no module"),
    (Twice, "all-linear", r"a has a tied weight \(a.weight is b.weight\)"), (lambda: nn.Linear(4, 4), "all-linear", "the model itself"),
    (lambda: nn.Sequential(nn.Bilinear(2, 2, 2)), ["0"], "Bilinear")])
def test_quantize_model_refuses_by_name_and_touches_nothing(make, targets, named):
    model = make()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=named):
        quantize_model(model, targets)
    assert not quantized_layers(model) and all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_quantize_model_refuses_a_second_time_and_lora_before():
    model = llama()
    quantize_model(model, ["q_proj"])
    with pytest.raises(ValueError, match="q_proj is quantized already"):
        quantize_model(model)
    add_lora(model, 2, 4)
    with pytest.raises(ValueError, match="LoRA layers"):
        quantize_model(model, ["k_proj"])
    with pytest.raises(ValueError, match="'cuda-ish'"):
        quantize_model(llama(), backend="cuda-ish")
    bad = llama()
    bad.model.layers[1].mlp.up_proj.weight.data[3, 4] = math.nan
    with pytest.raises(ValueError, match=r"up_proj: cannot quantize nan at position \(3, 4\)"):
        quantize_model(bad)
    with pytest.raises(ValueError, match="blocksize must be .* got 48"):
        quantize_model(llama(), blocksize=48)
    with pytest.raises(ValueError, match="q_proj: only float32.* got torch.float64"):
        quantize_model(llama().double())
    assert not quantized_layers(bad)  # everything is checked before anything is changed


def test_untied_head_can_be_quantized_when_asked_for():
    model = llama(tie_embeddings=False)
    assert quantize_model(model, ["lm_head", "down_proj"]) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]


# ------------------------------------------------------------------------------------------------ files

def no_repacking(model):
    for layer in quantized_layers(model).values():
        layer.support_avx512bf16_for_cpu = False
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False, "hidden_size": 64, "intermediate_size": 128, "n_heads": 4, "mlp_bias": True}])
@pytest.mark.parametrize("quant_type, double_quant, dtype", [("nf4", True, torch.float32), ("fp4", False, torch.bfloat16)])
def test_checkpoints_go_both_ways(tmp_path, options, quant_type, double_quant, dtype):
    llama(**options).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)  # .to(bfloat16) would round the rotary table
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant,
                                bnb_4bit_compute_dtype=dtype)
    theirs = no_repacking(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=dtype, device_map={"": "cpu"}))
    theirs.save_pretrained(tmp_path / "theirs")
    quantize_model(model, quant_type=quant_type, double_quant=double_quant)
    save_quantized(model, tmp_path / "ours")
    ours, wanted = load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "theirs/model.safetensors")
    blob = lambda k: "bitsandbytes__" in k
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[k], wanted[k]) and ours[k].dtype == wanted[k].dtype for k in ours if not blob(k))
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs")]
    differ = {k for k in configs[0]["quantization_config"].keys() | configs[1]["quantization_config"].keys()
              if configs[0]["quantization_config"].get(k) != configs[1]["quantization_config"].get(k)}
    assert differ == {"llm_int8_skip_modules"}  # ours says lm_head, theirs finds it out
    read = lambda side: no_repacking(AutoModelForCausalLM.from_pretrained(tmp_path / side, dtype=dtype, device_map={"": "cpu"}))
    expected = logits(model)
    for other in (theirs, read("ours"), read("theirs"), load_quantized(tmp_path / "ours"), load_quantized(tmp_path / "theirs", "own"),
                  load_quantized(tmp_path / "ours", "bitsandbytes")):
        assert torch.equal(logits(other), expected) and other.dtype == dtype


def test_a_part_of_the_layers_and_several_files(tmp_path):
    "Layers that stay dense are named in the config; a model in shards is read as one."
    model = llama()
    quantize_model(model, ["gate_proj", "up_proj"], blocksize=32)
    save_quantized(model, tmp_path / "part")
    theirs = no_repacking(AutoModelForCausalLM.from_pretrained(tmp_path / "part", device_map={"": "cpu"}))
    assert list(quantized_layers(theirs)) == list(quantized_layers(model)) and torch.equal(logits(theirs), logits(model))
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = load_quantized(tmp_path / "shards")
    assert torch.equal(logits(again), logits(model)) and again.lm_head.weight is again.model.embed_tokens.weight
    save_quantized(again, tmp_path / "part")  # over what is there
    assert torch.equal(logits(load_quantized(tmp_path / "part")), logits(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part", "shards"]


def test_faults_in_files_are_named(tmp_path):
    model = llama()
    with pytest.raises(ValueError, match="needs a quantized model"):
        save_quantized(model, tmp_path / "x")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="not a 4-bit checkpoint"):
        load_quantized(tmp_path / "dense")
    quantize_model(model)
    folder = save_quantized(model, tmp_path / "good")
    file = "model.safetensors"
    for name, change, named in (
            ("missing", lambda p: (p / file).unlink(), "model.safetensors is missing"),
            ("cut", lambda p: (p / file).write_bytes((p / file).read_bytes()[:-100]), "model.safetensors is damaged"),
            ("norm", lambda p: edit(p / file, lambda s: s.pop("model.norm.weight")), r"missing \['model.norm.weight'\]"),
            ("absmax", lambda p: edit(p / file, lambda s: s.pop("model.layers.0.mlp.up_proj.weight.absmax")), "up_proj.weight.absmax missing"),
            ("all of it", lambda p: edit(p / file, lambda s: [s.pop(k) for k in list(s) if "1.mlp.up_proj" in k]), "1.mlp.up_proj.weight"),
            ("extra", lambda p: edit(p / file, lambda s: s.update(more=torch.ones(2))), r"not of this model \['more'\]"),
            ("shape", lambda p: reconfigure(p, intermediate_size=60), "config needs")):
        shutil.copytree(folder, tmp_path / name)
        change(tmp_path / name)
        with pytest.raises(ValueError, match=named):
            load_quantized(tmp_path / name)


def edit(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def reconfigure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# ------------------------------------------------------------------------------------------------ training

QUICK = replace(CONFIG, learning_rate=1e-2, max_steps=6)
LAYOUT = dict(micro_batch_size=2, seed=0)


def adapters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("options", [{}, {"backend": "bitsandbytes"}, {"gradient_checkpointing": True}, {"targets": ["q_proj", "down_proj"]},
                                     {"dropout": 0.1, "use_rslora": True}, {"quant_type": "fp4", "double_quant": False, "blocksize": 128}])
def test_train_qlora_learns_and_moves_adapters_only(options):
    model = llama()
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    result = train_qlora(model, PaddedBatches(ROWS, **LAYOUT), QUICK, r=5, alpha=12, eval_batches=PaddedBatches(ROWS, 2, shuffle=False), **options)
    assert result.step == 6 and len(quantized_layers(model)) == 14
    assert result.history[-1]["eval_loss"] < evaluate(llama(), PaddedBatches(ROWS, 2, shuffle=False))["loss"] - 0.02
    assert len(lora_layers(model)) == (4 if "targets" in options else 14)
    trained, total = count_parameters(model)
    assert trained == sum(5 * (m.in_features + m.out_features) for m in lora_layers(model).values())
    assert total == sum(p.numel() for p in frozen.values()) + trained
    q = dict(quant_type=options.get("quant_type", "nf4"), double_quant=options.get("double_quant", True), blocksize=options.get("blocksize", 64))
    for name, layer in quantized_layers(model).items():
        codes = quantize_4bit(frozen[f"{name.replace('.base_layer', '')}.weight"], **q).codes
        assert torch.equal(layer.weight.data, codes) and layer.weight.grad is None


def test_backends_train_alike_to_the_bit_and_evaluation_does_not_break_it():
    "Evaluations in between would make bitsandbytes repack its layers; the recipe keeps it from that."
    config, models = replace(QUICK, eval_every=2), [llama(hidden_size=64, intermediate_size=128, n_heads=4) for _ in range(2)]
    for model, backend in zip(models, ("own", "bitsandbytes")):
        train_qlora(model, PaddedBatches(ROWS, **LAYOUT), config, r=5, alpha=12, backend=backend, eval_batches=PaddedBatches(ROWS, 4, shuffle=False))
    assert torch.equal(adapters(models[0]), adapters(models[1]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["own", "bitsandbytes"])
def test_stopped_and_resumed_equals_never_stopped(tmp_path, backend, precision):
    "Dropout on; the second process quantizes and draws the adapters again. The checkpoint holds adapters only."
    config, options = replace(QUICK, precision=precision), dict(r=3, alpha=8, dropout=0.2, backend=backend)
    layout, whole, first, second = PaddedBatches(ROWS, **LAYOUT), llama(), llama(), llama()
    train_qlora(whole, layout, config, **options)
    calls = []

    def stop(m, batch):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return lm_loss(m, batch)

    assert train_qlora(first, layout, config, loss=stop, run_dir=tmp_path, **options).interrupted
    saved = load_file(next((tmp_path / "checkpoints").glob("step_*/weights.safetensors")))
    assert saved and all(".lora_" in name for name in saved)
    result = train_qlora(second, layout, config, run_dir=tmp_path, resume=True, **options)
    assert result.step == 6 and 0 < len(result.history) < 6
    assert torch.equal(adapters(second), adapters(whole))
    other = llama(seed=1)
    with pytest.raises(RuntimeError, match="other frozen weights"):
        train_qlora(other, layout, replace(config, max_steps=6), run_dir=tmp_path, resume=True, **options)


def test_a_quantized_checkpoint_can_be_trained_further(tmp_path):
    model = llama()
    quantize_model(model, blocksize=32)
    save_quantized(model, tmp_path / "q")
    again = load_quantized(tmp_path / "q")
    train_qlora(again, PaddedBatches(ROWS, **LAYOUT), QUICK, r=4, alpha=8, blocksize=64)  # what is quantized stays as it is
    assert {m.quantized.blocksize for m in quantized_layers(again).values()} == {32}
    direct = llama()
    train_qlora(direct, PaddedBatches(ROWS, **LAYOUT), QUICK, r=4, alpha=8, blocksize=32)
    assert torch.equal(adapters(again), adapters(direct))


@pytest.mark.parametrize("quant_type, double_quant, dtype", [("nf4", True, torch.float32), ("fp4", False, torch.float32), ("nf4", True, torch.bfloat16)])
def test_ten_steps_equal_peft_on_bitsandbytes(quant_type, double_quant, dtype):
    """Same codes, same initial adapters, rows of unequal lengths. In float32 the two round differently (one addmm against a product,
    a scaling and a sum), so gradients agree to about 1e-6; in bfloat16 an activation may fall on the other neighbour, 2^-8 away."""
    ours, theirs = (llama(hidden_size=64, intermediate_size=128, n_heads=4).to(dtype) for _ in range(2))
    quantize_model(ours, quant_type=quant_type, double_quant=double_quant, backend="own")
    quantize_model(theirs, quant_type=quant_type, double_quant=double_quant, backend="bitsandbytes")
    torch.manual_seed(0)
    add_lora(ours, 5, 12)
    torch.manual_seed(0)
    theirs = get_peft_model(theirs, LoraConfig(r=5, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM"))
    pairs = [(getattr(m, f"lora_{s}"), theirs.get_parameter(f"base_model.model.{n}.lora_{s}.default.weight"))
             for n, m in lora_layers(ours).items() for s in "AB"]
    assert len(pairs) == 28 and all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(m.weight.data, theirs.get_submodule(f"base_model.model.{n}").weight.data) for n, m in quantized_layers(ours).items())
    layout = PaddedBatches(ROWS, 4, shuffle=False)
    batch = layout.collate(layout.plan(0)[0])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    assert (inputs["attention_mask"] == 0).any()
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=3e-3) for m in (ours, theirs)]
    tight = dtype == torch.float32
    for step in range(10):
        losses = [m.train()(**inputs).loss for m in (ours, theirs)]
        assert_close(losses[0], losses[1], rtol=1e-5 if tight else 1e-2, atol=0)
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
        if step == 0:
            for a, b in pairs:
                assert_close(a.grad, b.grad, rtol=1e-4 if tight else 0.05, atol=1e-6 * float(b.grad.abs().max()) if tight else 1e-2 * float(b.grad.abs().max()))
        for optimizer in optimizers:
            optimizer.step()
    for a, b in pairs:
        assert_close(a, b, rtol=0, atol=1e-4 if tight else 3e-2)  # ten steps of 3e-3
    assert losses[0] < 6


def test_defaults_are_the_papers():
    assert (QLORA.learning_rate, QLORA.schedule, QLORA.betas[1], QLORA.max_grad_norm) == (2e-4, "constant", 0.999, 0.3)


# ------------------------------------------------------------------------------------------------ merging

def trained(std=0.05):
    model = llama(hidden_size=64, intermediate_size=128, n_heads=4)
    quantize_model(model)
    add_lora(model, 5, 12)
    g = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        layer.lora_B.data.copy_(std * torch.randn(layer.lora_B.shape, generator=g))
    return model


def test_merge_into_four_bits_keeps_its_bound_and_unmerges_exactly():
    model = trained()
    dense = {n: m.base_layer.dequantize() for n, m in lora_layers(model).items()}
    codes = {n: m.base_layer.weight.clone() for n, m in lora_layers(model).items()}
    before = logits(model)
    merge_lora(model)
    gap = nf4_levels().diff().max() / 2
    for name, m in lora_layers(model).items():
        target, q = dense[name] + m.delta_weight(), m.base_layer.quantized
        true = torch.stack([b.abs().max() for b in target.flatten().split(64)])  # constants before they are quantized
        bound = (true * gap + (q.scales() - true).abs()).repeat_interleave(64).view(target.shape)
        assert ((q.dequantize() - target).abs() <= bound + 1e-6).all()
        assert q.double_quant and (q.codes != codes[name]).any()
    unmerge_lora(model)
    assert all(torch.equal(m.base_layer.weight, codes[n]) for n, m in lora_layers(model).items())
    assert torch.equal(logits(model), before)


def test_an_update_below_half_a_gap_is_lost_in_four_bits_and_not_in_sixteen():
    tiny = trained(std=1e-5)
    lost, kept = copy.deepcopy(tiny), copy.deepcopy(tiny)
    merge_lora(lost, unload=True)
    dequantize_model(kept, torch.bfloat16)
    merge_lora(kept, unload=True)
    plain = trained(std=0)
    for name, m in lora_layers(plain).items():
        assert torch.equal(lost.get_submodule(name).weight, m.base_layer.weight)  # not one code has changed
        assert type(kept.get_submodule(name)) is nn.Linear and kept.get_submodule(name).weight.dtype == torch.bfloat16
    big = trained(std=0.2)
    merged = copy.deepcopy(big)
    dequantize_model(merged, torch.bfloat16)
    merge_lora(merged, unload=True)
    for name, m in lora_layers(big).items():
        wanted = m.base_layer.dequantize() + m.delta_weight()
        # the base is rounded to bfloat16 and so is the sum: half an ulp each
        assert_close(merged.get_submodule(name).weight.float(), wanted, rtol=2**-8, atol=2**-8 * float(m.base_layer.dequantize().abs().max()))


@pytest.mark.parametrize("backend", ["own", "bitsandbytes"])
def test_dequantize_model_is_the_model_it_was(tmp_path, backend):
    model = llama()
    names = quantize_model(model, backend=backend)
    expected = logits(model)
    assert dequantize_model(model) == names and not quantized_layers(model)
    assert torch.equal(logits(model), expected) and not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("source", ["loaded", "transformers"])
def test_a_model_that_came_from_a_file_is_dense_in_every_respect_afterwards(tmp_path, source):
    model = llama()
    quantize_model(model)
    save_quantized(model, tmp_path / "four")
    loaded = (load_quantized(tmp_path / "four", "bitsandbytes") if source == "loaded" else
              no_repacking(AutoModelForCausalLM.from_pretrained(tmp_path / "four", device_map={"": "cpu"})))
    expected = logits(loaded)
    dequantize_model(loaded)
    assert torch.equal(logits(loaded), expected) and not getattr(loaded, "is_quantized", False)
    loaded.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)
    assert loaded.half().dtype == torch.float16


@pytest.mark.parametrize("backend", ["own", "bitsandbytes"])
def test_a_loaded_checkpoint_can_be_saved_again_but_not_under_ones_feet(tmp_path, monkeypatch, backend):
    model = llama(hidden_size=64, intermediate_size=128, n_heads=4)
    quantize_model(model)
    expected = logits(model)
    save_quantized(model, tmp_path / "first")
    save_quantized(load_quantized(tmp_path / "first", backend), tmp_path / "second")
    assert torch.equal(logits(load_quantized(tmp_path / "second", "own")), expected)
    monkeypatch.chdir(tmp_path / "second")
    for folder in (".", tmp_path):
        with pytest.raises(ValueError, match="is or holds the current folder"):
            save_quantized(model, folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "second"]


@pytest.mark.parametrize("backend", ["own", "bitsandbytes"])
def test_generation_settings_come_back(tmp_path, backend):
    model = llama()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [5, 7], 3
    quantize_model(model)
    save_quantized(model, tmp_path)
    found = load_quantized(tmp_path, backend).generation_config
    assert (found.eos_token_id, found.pad_token_id) == ([5, 7], 3)


def test_a_layer_on_meta_takes_a_state():
    dense = torch.nn.Linear(9, 7)
    layer = Linear4bit.from_linear(dense)
    empty = Linear4bit.from_linear(copy.deepcopy(dense)).to("meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert empty.weight.device.type == "cpu" and torch.equal(empty.dequantize(), layer.dequantize())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_has_no_say(dtype):
    "In a process of its own: the tables are made once."
    code = f"""
import torch
torch.set_default_dtype({dtype})
from llm_train_course import qlora
x = torch.randn(1000, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
for kind in ("nf4", "fp4"):
    q = qlora.quantize_4bit(x, 64, kind, True)
    assert ((q.dequantize() - x).norm() / x.norm()).item() < 0.2
    state = qlora.quantized_to_state(q)
    assert torch.equal(qlora.quantized_from_state(state).dequantize(), q.dequantize())
assert {{qlora.levels(k).dtype for k in ("nf4", "fp4", "int4")}} == {{torch.float32}}
torch.set_default_dtype(torch.float32)
print(qlora.quantize_4bit(x, 64, "nf4", True).codes.sum().item(), q.dequantize().sum().item())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    want = quantize_4bit(x, 64, "nf4", True).codes.sum().item(), quantize_4bit(x, 64, "fp4", True).dequantize().sum().item()
    assert out.stdout.split() == [str(want[0]), str(want[1])]


# ------------------------------------------------------------------------------------------------ CUDA

@pytest.mark.cuda
def test_ours_on_cuda_equals_ours_on_cpu():
    for dtype in DTYPES:
        x = numbers(131_073, "outliers", dtype, 0)
        for quant_type in KINDS:
            here, there = quantize_4bit(x, 64, quant_type, False), quantize_4bit(x.cuda(), 64, quant_type, False)
            assert torch.equal(here.codes, there.codes.cpu()) and torch.equal(here.absmax, there.absmax.cpu())
            assert torch.equal(here.dequantize(), there.dequantize().cpu()) and torch.equal(here.to("cuda").dequantize().cpu(), here.dequantize())


@pytest.mark.cuda
def test_backends_on_cuda_agree(tmp_path):
    "Auto takes bitsandbytes there. Its kernels may put a number on the other side of a midpoint; read from one file, nothing differs."
    model = llama(hidden_size=64, intermediate_size=128, n_heads=4)
    quantize_model(model, device="cuda")
    assert all(isinstance(m, bnb.nn.Linear4bit) for m in quantized_layers(model).values())
    save_quantized(model, tmp_path / "q")
    own = load_quantized(tmp_path / "q", backend="own", device="cuda")
    with torch.no_grad():
        assert_close(own(IDS.cuda()).logits, model.eval()(IDS.cuda()).logits, rtol=1e-4, atol=1e-4)
    result = train_qlora(model, PaddedBatches(ROWS, **LAYOUT), replace(QUICK, cpu=False, precision="bf16"), r=5, alpha=12)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
