"Formats against torch's casts and torch's own 4- and 6-bit code, rounding, scales, the loss scaler, weights of 16 bits, FP8 layers."
import ast
import copy
import importlib.util
import itertools
import math
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from helpers import CONFIG, ROWS, flat, model, on_two_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from llm_train_course.core import PackedBatches, PaddedBatches, fit, lm_loss
from llm_train_course.lora import add_lora
from llm_train_course.precision import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FORMATS,
    FP16,
    FP32,
    ROUNDINGS,
    TF32,
    FloatFormat,
    FP8Linear,
    FP8Recipe,
    LossScaler,
    RoundedAdamW,
    autocast_dtypes,
    block_amax,
    block_scales,
    from_fp8,
    mx_quantize,
    nvfp4_quantize,
    quantize,
    scaled_product,
    stochastic_round,
    to_fp8,
)

LISTED = [f for f in FORMATS if f.bits <= 19]
STORED = [FP16, BF16, E5M2, E4M3]
numbers = st.floats(allow_nan=False, allow_infinity=False, width=64)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def torch_functions(*names):
    "Functions of torch's own reference for short formats. The module cannot be imported whole without test-only packages."
    source = Path(importlib.util.find_spec("torch.testing").submodule_search_locations[0]) / "_internal" / "common_quantized.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names
                 or isinstance(n, ast.Assign) and all(isinstance(t, ast.Name) and t.id.isupper() or isinstance(t, ast.Tuple) for t in n.targets)]
    namespace = {"torch": torch, "Tensor": torch.Tensor}
    exec(compile(tree, str(source), "exec"), namespace)
    return [namespace[name] for name in names]


# Formats


@pytest.mark.parametrize("fmt", LISTED, ids=str)
def test_encode_undoes_decode_on_every_code(fmt):
    codes = torch.arange(2**fmt.bits)
    values = fmt.decode(codes)
    keep = ~values.isnan()
    assert torch.equal(fmt.encode(values[keep]), codes[keep])
    assert torch.equal(fmt.round(values[keep]), values[keep])
    if fmt.specials != "none":
        assert fmt.decode(fmt.encode(values[~keep])).isnan().all() and (~keep).any()


@pytest.mark.parametrize("fmt", LISTED, ids=str)
def test_limits_are_those_of_the_enumerated_values(fmt):
    v = fmt.values()
    assert torch.equal(v, -v.flip(0)) and (v.diff() > 0).all()
    gaps = v[v >= 0].diff()
    assert fmt.max == v[-1] and fmt.min_subnormal == gaps.min() and fmt.eps == gaps[v[v >= 0][:-1] == 1][0]
    assert (gaps[v[v >= 0][:-1] < fmt.min_normal] == fmt.min_subnormal).all() and gaps[v[v >= 0][:-1] == 2 * fmt.min_normal][0] == 2 * fmt.min_subnormal


def test_six_and_four_bits_agree_with_torch_on_every_step_of_the_staircase():
    encode, decode = torch_functions("_f32_to_floatx_unpacked", "_floatx_unpacked_to_f32", "_n_ones")[:2]
    for fmt in (E2M1, E3M2, E2M3):
        v = fmt.values().float()
        v = torch.cat([v, (v[1:] + v[:-1]) / 2, torch.tensor([fmt.max * 4, 1e30, 1e-30, -1e-45])])
        x = torch.cat([v, v.nextafter(torch.tensor(math.inf)), v.nextafter(torch.tensor(-math.inf))])
        codes = encode(x, fmt.exponent_bits, fmt.mantissa_bits)
        assert torch.equal(fmt.encode(x), codes.long())
        assert torch.equal(fmt.round(x), decode(codes, fmt.exponent_bits, fmt.mantissa_bits))


@pytest.mark.parametrize("fmt", STORED, ids=str)
def test_the_staircase_is_that_of_torchs_cast_up_to_the_edge_of_overflow(fmt):
    v = fmt.values()[fmt.values() >= 0]
    edge = fmt.max + float(v[-1] - v[-2]) / 2  # rounds to more than the largest value, being a tie, where that is odd
    v = torch.cat([v, (v[1:] + v[:-1]) / 2, torch.tensor([edge], dtype=torch.float64)]).float()
    x = torch.cat([v, v.nextafter(torch.tensor(math.inf)), v.nextafter(torch.tensor(0.0))])
    x = x[x < edge] if fmt is E4M3 else x  # builds of torch differ beyond
    x = torch.cat([x, -x])
    assert torch.equal(fmt.round(x), x.to(fmt.dtype).float())
    width = {8: torch.uint8, 16: torch.uint16}[fmt.bits]
    assert torch.equal(fmt.encode(x), x.to(fmt.dtype).view(width).long())


def test_tf32_is_fp32_with_thirteen_bits_cut():
    x = torch.randn(10_000, generator=rng())
    bits = x.view(torch.int32)
    cut = (bits & ~0x1FFF).view(torch.float32)
    assert torch.equal(TF32.round(x, "toward_zero"), cut)
    nearest = ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)  # in integers, ties to even
    assert torch.equal(TF32.round(x), nearest)


@given(numbers, st.sampled_from(FORMATS), st.sampled_from(["nearest", "stochastic", "toward_zero"]))
@settings(max_examples=300, deadline=None)
def test_rounding_stays_within_its_quantum_and_rounds_once(value, fmt, mode):
    x = torch.tensor(value, dtype=torch.float64)
    y = float(fmt.round(x, mode, saturate=True))
    assert fmt.round(torch.tensor(y, dtype=torch.float64), mode) == y  # it is a value of the format
    assert math.copysign(1, y) == math.copysign(1, value)
    assert float(fmt.round(-x, mode if mode != "stochastic" else "nearest", saturate=True)) == -y or mode == "stochastic"
    if abs(value) >= fmt.max:
        assert abs(y) == fmt.max
        return
    exact, got = Fraction(abs(value)), Fraction(abs(y))
    exponent = max(math.frexp(value)[1] - 1, fmt.min_exponent) if value else fmt.min_exponent
    quantum = Fraction(2) ** (exponent - fmt.mantissa_bits)
    assert abs(got - exact) <= (quantum / 2 if mode == "nearest" else quantum * (1 - Fraction(1, 10**12)) if exact % quantum else 0)
    assert mode != "toward_zero" or got <= exact


@given(numbers, numbers, st.sampled_from(FORMATS), st.sampled_from(["nearest", "toward_zero"]))
@settings(max_examples=200, deadline=None)
def test_rounding_is_monotone(a, b, fmt, mode):
    low, high = fmt.round(torch.tensor(sorted([a, b]), dtype=torch.float64), mode, saturate=True).tolist()
    assert low <= high


@pytest.mark.parametrize("fmt, mode, saturate, large, infinite", [
    (FP16, "nearest", False, math.inf, math.inf), (FP16, "nearest", True, 65_504, 65_504), (FP16, "toward_zero", False, 65_504, math.inf),
    (E4M3, "nearest", False, math.nan, math.nan), (E4M3, "nearest", True, 448, 448), (E4M3, "toward_zero", False, 448, math.nan),
    (E5M2, "stochastic", False, math.inf, math.inf), (E2M1, "nearest", False, 6, 6), (E3M2, "stochastic", True, 28, 28)], ids=str)
def test_overflow(fmt, mode, saturate, large, infinite):
    for sign in (1, -1):
        got = fmt.round(torch.tensor([sign * 1e30, sign * math.inf, math.nan]), mode, saturate)
        want = torch.tensor([sign * large, sign * infinite, math.nan])
        assert torch.equal(got.nan_to_num(nan=-7), want.float().nan_to_num(nan=-7))


def test_results_and_types():
    assert FP16.round(torch.tensor([0.1], dtype=torch.float64)).dtype == torch.float64
    assert FP16.round(torch.tensor([0.1]).bfloat16()).dtype == torch.float32  # bfloat16 could not hold it
    assert E4M3.cast(torch.ones(2)).dtype == torch.float8_e4m3fn and E2M1.cast(torch.ones(2)).dtype == torch.float32
    assert FP16.round(torch.zeros(0, 3)).shape == (0, 3)
    large = torch.tensor([1e6, -7e4, math.inf])
    for fmt in FORMATS:  # the limit of the format need not exist in the type of x
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            x = large.to(dtype)
            want = x.double().clamp(-fmt.max, fmt.max)
            got = fmt.cast(x).double()
            assert got.isnan().tolist() == x.isinf().tolist() and torch.equal(got[x.isfinite()], fmt.round(want[x.isfinite()]).double())
    assert FP32.max == torch.finfo(torch.float32).max and str(FloatFormat(6, 9)) == "E6M9"


@pytest.mark.parametrize("wrong, message", [
    (lambda: FloatFormat(1, 3), "exponent_bits must be from 2 to 8, got 1"),
    (lambda: FloatFormat(5, 0), "mantissa_bits must be from 1 to 23, got 0"),
    (lambda: FloatFormat(5, 2, "ieee754"), "specials must be one of ieee, fn, none, got 'ieee754'"),
    (lambda: FloatFormat(8, 7, "none"), "8 exponent bits need specials='ieee', got 'none'"),
    (lambda: FP16.round(torch.ones(1), "floor"), "mode must be one of nearest, stochastic, toward_zero, got 'floor'"),
    (lambda: FP16.round(torch.ones(1, dtype=torch.int64)), "x must have a floating-point type, got torch.int64"),
    (lambda: E5M2.decode(torch.tensor([256])), "E5M2 has codes from 0 to 255, got 256 to 256"),
    (lambda: E5M2.decode(torch.tensor([-1])), "E5M2 has codes from 0 to 255, got -1 to -1"),
    (lambda: E5M2.decode(torch.tensor([1.0])), "codes must be integers, got torch.float32"),
    (lambda: FP32.values(), "FP32 has 2\\*\\*32 codes"),
    (lambda: E3M2.encode(torch.tensor([math.nan])), "E3M2 has no code for NaN"),
    (lambda: stochastic_round(torch.ones(1).double(), torch.bfloat16), "x must be float32, got torch.float64"),
    (lambda: stochastic_round(torch.ones(1), torch.float32), "dtype must be one of torch.float16, torch.bfloat16"),
    (lambda: quantize(torch.ones(3)), r"x must be a matrix, got shape \(3,\)"),
    (lambda: block_scales(torch.ones(1), E4M3, "log2"), "kind must be one of fp32, pow2, e8m0, e8m0_floor, e4m3, got 'log2'"),
    (lambda: FP8Recipe("column"), "scaling must be none, tensor, row, block or mx, got 'column'"),
    (lambda: FP8Recipe("row", delayed=True), "delayed scaling keeps one history a tensor: scaling must be tensor, got 'row'"),
    (lambda: FP8Recipe(history=0), "history must be at least 1, got 0"),
    (lambda: FP8Recipe(backend="cutlass"), "backend must be simulated or scaled_mm, got 'cutlass'"),
    (lambda: FP8Recipe("block", backend="scaled_mm"), "scaled_mm multiplies E4M3 and E5M2 scaled by tensor or row, got E4M3, E5M2 by block"),
    (lambda: to_fp8(nn.Sequential(nn.ReLU())), "no nn.Linear to replace in Sequential"),
    (lambda: RoundedAdamW([nn.Parameter(torch.ones(1))], rounding="up"), "rounding must be one of nearest, stochastic, kahan, master, got 'up'"),
    (lambda: RoundedAdamW([nn.Parameter(torch.ones(1))], lr=-1.0), "must not be negative"),
    (lambda: LossScaler().update(math.inf), "new_scale must be positive and finite, got inf"),
    (lambda: LossScaler().update(0.0), "new_scale must be positive and finite, got 0.0"),
    (lambda: LossScaler(growth_factor=1.0), "growth_factor must be above 1 and backoff_factor in"),
    (lambda: LossScaler(0.0), "init_scale must be positive and growth_interval at least 1, got 0.0"),
])
def test_what_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


# Stochastic rounding


@pytest.mark.parametrize("fmt", [*STORED, E3M2, E2M1], ids=str)
def test_stochastic_rounding_has_no_bias_also_below_the_normal_numbers(fmt):
    "False alarm in at most one of 10**9 runs, by Hoeffding's inequality over all points; the seed is fixed besides."
    n, g = 20_000, rng(11)
    points = torch.cat([fmt.min_subnormal * torch.tensor([0.1, 0.5, 1.7, 3.25]), fmt.min_normal * torch.tensor([1.03, 1.9]), 0.37 * fmt.max * torch.tensor([1.0, -1.4])]).float()
    points = points[(points.abs() >= 2**-126) | (fmt.bits > 8)]
    exponent = (torch.frexp(points.double()).exponent - 1).clamp(min=fmt.min_exponent)
    quantum = torch.exp2((exponent - fmt.mantissa_bits).double())
    wide = points.unsqueeze(1).expand(-1, n).contiguous()
    draws = (stochastic_round(wide, fmt.dtype, g) if fmt.dtype else fmt.round(wide, "stochastic", generator=g)).double()
    limit = math.sqrt(math.log(2 * len(points) * 6 / 1e-9) / (2 * n))
    assert (((draws.mean(1) - points.double()) / quantum).abs() < limit).all()
    assert all(len(row.unique()) <= 2 for row in draws)
    f = (points.double().abs() / quantum) % 1
    assert_close(draws.var(1) / quantum**2, f * (1 - f), rtol=0.1, atol=0.005)


def test_stochastic_rounding_is_repeatable_and_leaves_the_global_generator_alone():
    x, state = torch.randn(1000, generator=rng()), torch.get_rng_state()
    assert torch.equal(stochastic_round(x, torch.bfloat16, rng(3)), stochastic_round(x, torch.bfloat16, rng(3)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(stochastic_round(x, torch.bfloat16), stochastic_round(x, torch.bfloat16))
    assert torch.equal(stochastic_round(x.t(), torch.float16, rng(1)), stochastic_round(x, torch.float16, rng(1)))
    special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0])
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e5m2):
        got = stochastic_round(special, dtype, rng()).float()
        assert got[:2].isnan().all() and got[2:].tolist() == [math.inf, -math.inf, 0.0, 0.0] and got[5].signbit()


# Scales


@given(st.integers(1, 70), st.integers(1, 300), st.sampled_from([(None, None), (1, None), (1, 128), (128, 128), (1, 32), (1, 16), (3, 5), (None, 7)]),
       st.sampled_from(["fp32", "pow2", "e8m0", "e8m0_floor"]), st.sampled_from([E4M3, E5M2, E2M1, E3M2]), st.integers(-30, 30))
@settings(max_examples=80, deadline=None)
def test_error_is_under_its_bound_element_by_element(rows, columns, block, kind, fmt, power):
    x = torch.randn(rows, columns, generator=rng(rows)) * torch.logspace(-4, 4, columns) * 2.0**power
    q = quantize(x, fmt, block, kind)
    for r, c in itertools.product({0, rows - 1}, {0, columns - 1, columns // 2}):
        s = float(q.scale[r // block[0] if block[0] else 0, c // block[1] if block[1] else 0])
        value, error = abs(float(x[r, c])), abs(float(q.dequantize()[r, c]) - float(x[r, c]))
        if value > s * fmt.max:  # only the scale rounded down clips; by less than half
            assert kind == "e8m0_floor" or value <= s * fmt.max * (1 + 1e-6)
            assert value < 2 * s * fmt.max
        else:
            assert error <= max(fmt.eps / 2 * value, s * fmt.min_subnormal / 2) * (1 + 1e-6)


def test_microscaling_agrees_with_torchs_reference():
    to_mxfp, decode = torch_functions("to_mxfp", "_floatx_unpacked_to_f32", "_n_ones", "_f32_to_floatx_unpacked", "_bfloat16_to_float4_e2m1fn_x2", "pack_uint4", "down_size")[:2]
    x = (torch.randn(7, 96, generator=rng()) * torch.logspace(-30, 30, 96)).bfloat16().float()  # its FP4 passes through bfloat16
    x[2, 32:64] = 0
    x[3, 0] = 448 * 2.0**5  # exactly the largest value times a power of two
    scale, codes = to_mxfp(x, format="mxfp8")
    q = mx_quantize(x)
    nonzero = block_amax(x, (1, 32)) > 0
    assert torch.equal(q.scale[nonzero], scale.float()[nonzero]) and torch.equal(q.codes.float(), codes.float())
    scale, packed = to_mxfp(x, format="mxfp4")
    nibbles = torch.stack([packed.view(torch.uint8) & 15, packed.view(torch.uint8) >> 4], -1).reshape(7, 96)
    assert torch.equal(mx_quantize(x, E2M1).codes, decode(nibbles, 2, 1))


def test_nvfp4_by_search():
    x = torch.randn(3, 40, generator=rng()) * torch.logspace(0, 4, 40)
    q, tensor_scale = nvfp4_quantize(x), float(x.abs().max()) / (6 * 448)
    for r, b in itertools.product(range(3), range(3)):
        part = x[r, 16 * b:16 * (b + 1)]
        values = E4M3.values()[E4M3.values() > 0]
        scale = float(values[(values - float(part.abs().max()) / 6 / tensor_scale).abs().argmin()]) * tensor_scale
        assert math.isclose(float(q.scale[r, b]), scale, rel_tol=1e-6)
        grid = E2M1.values().float() * scale
        nearest = (grid.unsqueeze(0) - part.unsqueeze(1)).abs().min(1).values
        assert_close((q.dequantize()[r, 16 * b:16 * (b + 1)] - part).abs(), nearest, rtol=1e-4, atol=1e-6 * scale)
    assert abs(8 * nvfp4_quantize(torch.randn(64, 64)).nbytes / 64**2 - 4.5) < 0.01
    x = torch.randn(2, 64)  # 64 bytes of codes, 8 of scales; NVFP4 has four more for the tensor
    assert quantize(x, E2M1, (1, 16), "e8m0").nbytes == 64 + 8 and nvfp4_quantize(x).nbytes == 64 + 8 + 4
    assert nvfp4_quantize(torch.zeros(0, 16)).dequantize().shape == (0, 16)
    tiny = torch.tensor([[1e-7] * 16 + [1e3] * 16])
    assert nvfp4_quantize(tiny).dequantize().isfinite().all()


def test_stochastic_elements_are_unbiased_where_the_scale_clips_nothing():
    x = torch.randn(4, 64, generator=rng())
    g, draws = rng(1), torch.zeros(4, 64)
    for _ in range(2000):
        draws += quantize(x, E2M1, (1, 32), "e8m0", mode="stochastic", generator=g).dequantize() / 2000
    top = block_amax(x, (1, 32)).max()
    assert (draws - x).abs().max() < 2 * float(top) * math.sqrt(math.log(2 * 256 / 1e-9) / 4000)  # the widest quantum is 2 of 6


def test_faults_stay_visible_and_zeros_and_empty_blocks_work():
    for bad, kind in itertools.product((math.nan, math.inf, -math.inf), ("fp32", "pow2", "e8m0", "e8m0_floor")):
        x = torch.ones(4, 64)
        x[1, 40] = bad
        y = quantize(x, E4M3, (1, 32), kind).dequantize()
        assert y[1, 32:].isnan().all() and torch.equal(y[1, :32], torch.ones(32)) and torch.equal(y[2], torch.ones(64))
        assert quantize(x, E4M3, scale=torch.ones(1, 1)).dequantize()[1, 40].isnan()  # a scale from the past hides nothing either
    assert not quantize(torch.zeros(5, 3), E5M2, (2, 2)).dequantize().any()
    assert quantize(torch.zeros(0, 8), E4M3, (1, 128)).dequantize().shape == (0, 8)
    tiny = torch.full((2, 2), 1e-44)
    assert quantize(tiny).dequantize().isfinite().all()
    huge = torch.full((1, 32), 3e38)
    assert_close(mx_quantize(huge).dequantize(), huge, rtol=2**-4, atol=0)


# The loss scaler


def _steps(scaler, script, dtype=torch.float32):
    w = nn.Parameter(torch.arange(1.0, 5.0).to(dtype))
    optimizer, trace = torch.optim.SGD([w], lr=2.0**-4, momentum=0.5), []
    for fault in script:
        optimizer.zero_grad()
        scaler.scale((w.float() * torch.arange(4.0)).sum()).backward()
        if fault:
            w.grad[1] = fault
        scaler.step(optimizer)
        scaler.update()
        trace.append((scaler.get_scale(), scaler.state_dict()["_growth_tracker"], w.detach().clone().tolist()))
    return trace


@given(st.lists(st.sampled_from([0.0] * 6 + [math.inf, -math.inf, math.nan]), min_size=1, max_size=40),
       st.sampled_from([1.0, 2.0**16, 3.0, 2.0**127]), st.sampled_from([2.0, 1.5, 1.1]), st.sampled_from([0.5, 0.3]), st.integers(1, 6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_scaler_equals_torchs_on_any_sequence(script, start, growth, backoff, interval, bf16):
    options = dict(init_scale=start, growth_factor=growth, backoff_factor=backoff, growth_interval=interval)
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert _steps(LossScaler(**options), script, dtype) == _steps(torch.amp.GradScaler("cpu", **options), script, dtype)


def test_lasting_nan_shrinks_the_scale_to_zero_as_torchs():
    options = dict(init_scale=2.0**-140, growth_interval=5)
    script = [math.nan] * 14 + [0.0]
    ours, theirs = (_steps(s, script) for s in (LossScaler(**options), torch.amp.GradScaler("cpu", **options)))
    assert [row[:2] for row in ours] == [row[:2] for row in theirs] and ours[-1][0] == 0
    assert ours[-2][2] == theirs[-2][2] == [1.0, 2.0, 3.0, 4.0]  # nothing was stepped


def test_scaler_with_an_embedding_of_sparse_gradients_and_the_fused_optimizer():
    def run(scaler):
        torch.manual_seed(0)
        table, layer = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3)
        optimizers = torch.optim.SparseAdam(table.parameters(), lr=0.1), torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        for step in range(6):
            scaler.scale(layer(table(torch.tensor([1, 1, 4]))).square().sum()).backward()
            if step == 2:
                layer.weight.grad[0, 0] = math.inf
            if step == 3:
                table.weight.grad._values()[0, 0] = math.nan
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
        return scaler.get_scale(), torch.cat([table.weight.detach().flatten(), flat(layer)])
    ours, theirs = run(LossScaler(2.0**10, growth_interval=2)), run(torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2))
    assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])


def test_scaler_scales_what_it_is_given_and_says_what_is_wrong():
    scaler, w = LossScaler(4.0), nn.Parameter(torch.ones(2))
    assert [t.tolist() for t in scaler.scale([torch.ones(1), torch.zeros(1)])] == [[4.0], [0.0]] and isinstance(scaler.scale((w,)), tuple)
    optimizer = torch.optim.SGD([w], lr=1.0)
    with pytest.raises(RuntimeError, match="update without unscale_ or step"):
        scaler.update()
    with pytest.raises(ValueError, match="no parameter of this optimizer has a gradient"):
        scaler.step(optimizer)
    w.grad = torch.ones(2)
    with pytest.raises(ValueError, match="a closure would run the backward pass again"):
        scaler.step(optimizer, lambda: 0)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="step has already been called"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="unscale_ or step has already been called"):
        scaler.unscale_(optimizer)
    scaler.update(8)
    assert scaler.get_scale() == 8
    half = nn.Parameter(torch.ones(2, dtype=torch.float16))
    half.grad = torch.ones_like(half)
    with pytest.raises(ValueError, match="gradients are float16"):
        scaler.unscale_(torch.optim.SGD([half], lr=1.0))
    with pytest.raises(ValueError, match="state_dict lacks _growth_tracker, scale"):
        scaler.load_state_dict({k: v for k, v in scaler.state_dict().items() if k not in ("scale", "_growth_tracker")})


def _shards_skip_together(rank, folder):
    torch.distributed.init_process_group("gloo")
    w = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([w], lr=1.0)
    shared = LossScaler(8.0, growth_interval=2, process_group=torch.distributed.group.WORLD)
    alone, seen = LossScaler(8.0, growth_interval=2), []
    for step in range(4):
        for scaler in (shared, alone):
            w.grad = torch.full((3,), 8.0)
            if step == 1 and rank == 1:
                w.grad[2] = math.inf
            if step == 3 and rank == 0:
                w.grad = None if scaler is shared else w.grad  # a rank whose shard has no gradient this time
            if scaler is shared:
                scaler.step(optimizer)
            else:
                scaler.unscale_(optimizer)
            scaler.update()
        seen.append((shared.get_scale(), alone.get_scale()))
    torch.save((seen, w.detach()), Path(folder) / f"rank_{rank}.pt")


def test_ranks_with_different_shards_skip_together(tmp_path):
    on_two_ranks(_shards_skip_together, tmp_path)
    (seen0, w0), (seen1, w1) = (torch.load(tmp_path / f"rank_{r}.pt") for r in (0, 1))
    assert [a for a, _ in seen0] == [a for a, _ in seen1] == [8.0, 4.0, 4.0, 8.0]
    assert [b for _, b in seen0] != [b for _, b in seen1]  # without the exchange they drift apart
    assert w0.tolist() == [1 - 1 - 2.0] * 3 and w1[0] < w0[0]  # step 1 was skipped by both; of step 3 rank 0 has no gradient


# Weights of 16 bits


def _wander(rounding, dtype, steps, optimizer=None, w=None, start=0, lr=1e-2):
    w = nn.Parameter(torch.randn(6, 5, generator=rng()).to(dtype)) if w is None else w
    frozen = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = optimizer or RoundedAdamW([{"params": [w]}, {"params": [frozen], "weight_decay": 0.0}], lr=lr, rounding=rounding, generator=rng(9))
    for step in range(start, start + steps):
        w.grad = torch.randn(6, 5, generator=rng(100 + step)).to(dtype)
        optimizer.step()
    assert torch.equal(frozen, torch.ones(2, dtype=dtype)) and not optimizer.state[frozen]
    return w, optimizer


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_saved_optimizer_goes_on_as_if_never_stopped(rounding, tmp_path):
    whole, _ = _wander(rounding, torch.bfloat16, 12)
    half, optimizer = _wander(rounding, torch.bfloat16, 7)
    torch.save((half, optimizer.state_dict()), tmp_path / "state.pt")
    w, state = torch.load(tmp_path / "state.pt", weights_only=False)
    w = nn.Parameter(w.detach())
    again = RoundedAdamW([{"params": [w]}, {"params": [nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], "weight_decay": 0.0}], rounding=rounding, generator=optimizer.generator)
    again.load_state_dict(state)
    kinds = {k: v.dtype for k, v in again.state[w].items()}
    assert kinds["exp_avg"] == kinds["exp_avg_sq"] == torch.float32 == kinds.get("master", torch.float32)
    for step in range(7, 12):
        w.grad = torch.randn(6, 5, generator=rng(100 + step)).to(torch.bfloat16)
        again.step()
    assert torch.equal(w, whole)
    plain = torch.optim.AdamW([nn.Parameter(torch.zeros(6, 5, dtype=torch.bfloat16))])
    plain.load_state_dict({"state": {0: state["state"][0]}, "param_groups": plain.state_dict()["param_groups"]})
    assert next(iter(plain.state.values()))["exp_avg"].dtype == torch.bfloat16  # why load_state_dict is not torch's


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_is_torchs_adamw_and_kahan_stays_beside_it(dtype):
    master, optimizer = _wander("master", dtype, 60, lr=1e-3)
    reference = nn.Parameter(torch.randn(6, 5, generator=rng()).to(dtype).float())
    torch_adamw = torch.optim.AdamW([reference], lr=1e-3, foreach=False)
    for step in range(60):
        reference.grad = torch.randn(6, 5, generator=rng(100 + step)).to(dtype).float()
        torch_adamw.step()
    assert torch.equal(master, reference.to(dtype)) and torch.equal(optimizer.state[master]["master"], reference.detach())
    kahan, optimizer = _wander("kahan", dtype, 60, lr=1e-3)
    eps = torch.finfo(dtype).eps
    error = (kahan.float() + optimizer.state[kahan]["compensation"].float() - reference).abs().max()
    assert error < 60 * eps**2 * 4 and (kahan.float() - reference).abs().max() <= eps * 2.1
    nearest = _wander("nearest", dtype, 60, lr=1e-3)[0]
    assert (nearest.float() - reference).abs().mean() > 2 * (kahan.float() - reference).abs().mean()


def test_replicas_need_the_same_noise():
    def replica(seed):
        w = nn.Parameter(torch.ones(500, dtype=torch.bfloat16))
        optimizer = RoundedAdamW([w], lr=1e-4, rounding="stochastic", generator=rng(seed))
        for _ in range(5):
            w.grad = torch.ones_like(w)
            optimizer.step()
        return w.detach()
    assert torch.equal(replica(0), replica(0)) and not torch.equal(replica(0), replica(1))


def test_closures_and_missing_gradients():
    w = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = RoundedAdamW([w], lr=0.5, weight_decay=0.0, rounding="nearest")
    optimizer.step()
    assert torch.equal(w, torch.ones(3, dtype=torch.bfloat16))

    def closure():
        optimizer.zero_grad()
        loss = w.float().square().sum()
        loss.backward()
        return loss.detach()
    assert float(optimizer.step(closure)) == 3 and w.tolist() == [0.5] * 3
    wide = nn.Parameter(torch.ones(3, dtype=torch.float64))
    wide.grad = torch.ones_like(wide)
    with pytest.raises(ValueError, match="weights must be bfloat16, float16 or float32, got torch.float64"):
        RoundedAdamW([wide]).step()


# A linear layer in eight bits


def _gradients(layer, x, dy):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def _snapped(x, fmt, rows, columns):
    "Quantized with a scale for each block of rows x columns, block by block, through the enumerated values of the format."
    grid, out = fmt.values().float(), torch.empty_like(x)
    for r, c in itertools.product(range(0, x.shape[0], rows), range(0, x.shape[1], columns)):
        part = x[r:r + rows, c:c + columns]
        s = part.abs().max() / fmt.max
        out[r:r + rows, c:c + columns] = grid[((part / s).flatten().unsqueeze(1) - grid).abs().argmin(1)].reshape(part.shape) * s
    return out


@pytest.mark.parametrize("scaling, x_block, w_block, g_block", [
    ("tensor", (999, 999), (999, 999), (999, 999)), ("row", (1, 999), (1, 999), (1, 999)), ("block", (1, 128), (128, 128), (1, 128))])
def test_three_products_against_a_search_over_all_codes(scaling, x_block, w_block, g_block):
    "Blocks run along the dimension that is summed: rows of X forward, columns of X for the weight's gradient."
    x, dy = torch.randn(2, 9, 150, generator=rng()) * torch.logspace(-2, 2, 150), torch.randn(2, 9, 37, generator=rng(1)) * torch.logspace(-2, 2, 9).unsqueeze(1)
    layer = FP8Linear(150, 37, recipe=FP8Recipe(scaling))
    w, flat_x, flat_dy = layer.weight.detach(), x.flatten(0, 1), dy.flatten(0, 1)
    y = _snapped(flat_x, E4M3, *x_block) @ _snapped(w, E4M3, *w_block).T + layer.bias.detach()
    dx = _snapped(flat_dy, E5M2, *g_block) @ _snapped(w.T.contiguous(), E4M3, *w_block).T
    dw = _snapped(flat_dy.T.contiguous(), E5M2, *g_block) @ _snapped(flat_x.T.contiguous(), E4M3, *x_block).T
    for got, want in zip(_gradients(layer, x, dy), (y.reshape(2, 9, 37), dx.reshape(2, 9, 150), dw, flat_dy.sum(0)), strict=True):
        assert (got - want).abs().max() < 2e-2 * want.abs().max()  # a tie or two may fall the other way
        assert ((got - want).abs() > 1e-5 * want.abs().max()).float().mean() < 0.02


@pytest.mark.parametrize("scaling", ["none", "tensor", "row", "block", "mx"])
def test_frozen_parts_padding_rows_no_rows_and_types(scaling):
    recipe = FP8Recipe(scaling, backward=E5M2)
    layer = FP8Linear(40, 24, recipe=recipe)
    x = torch.randn(3, 5, 40, generator=rng())
    x[1] = 0  # rows of padding only
    y = layer(x)
    assert torch.equal(y[1], layer.bias.expand(5, 24)) and y.dtype == torch.float32
    layer.weight.requires_grad_(False)
    y.sum().backward()
    layer.weight.requires_grad_(True)
    layer.bias.requires_grad_(False)
    layer.zero_grad()
    layer(x).sum().backward()  # x needs no gradient
    assert layer.weight.grad.shape == (24, 40) and layer.bias.grad is None
    assert layer(torch.zeros(0, 40)).shape == (0, 24)
    layer(torch.zeros(0, 40)).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    x[2, 1, 3] = math.nan
    assert layer.float()(x)[2, 1].isnan().all()


def test_fp16_products_overflow_and_underflow_as_fp16_does():
    layer = FP8Linear(4, 4, bias=False, recipe=FP8Recipe("none", FP16, FP16, result=FP16))
    nn.init.constant_(layer.weight, 1.0)
    assert layer(torch.full((1, 4), 3e4)).isinf().all() and layer(torch.full((1, 4), 1e4)).isfinite().all()
    x = torch.ones(1, 4, requires_grad=True)
    layer(x).backward(torch.full((1, 4), 2.0**-26))
    assert not x.grad.any() and not layer.weight.grad.any()
    assert FP8Recipe("none").operand(torch.full((1, 1), 1e4), E4M3).dequantize().isnan()  # not torch's saturating cast


@pytest.mark.parametrize("scaling, backward", [("tensor", E5M2), ("tensor", E4M3), ("row", E4M3), ("row", E5M2)], ids=str)
def test_torchs_kernel_gives_the_simulated_products(scaling, backward):
    simulated, kernel = (FP8Linear(33, 50, recipe=FP8Recipe(scaling, backward=backward, backend=b)) for b in ("simulated", "scaled_mm"))
    kernel.load_state_dict(simulated.state_dict())
    x, dy = torch.randn(19, 33, generator=rng()), torch.randn(19, 50, generator=rng(1))
    tolerance = 1e-5 if scaling == "tensor" else 2**-8
    for a, b in zip(_gradients(simulated, x, dy), _gradients(kernel, x, dy), strict=True):
        assert_close(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()))
    block = (None, None) if scaling == "tensor" else (1, None)
    a, b = quantize(torch.zeros(0, 32), block=block), quantize(torch.ones(16, 32), block=block)
    for backend in ("simulated", "scaled_mm"):
        assert scaled_product(a, b, backend).shape == (0, 16) and scaled_product(b, a, backend).shape == (16, 0)
    kernel.zero_grad()
    kernel(torch.zeros(0, 33)).sum().backward()
    assert not kernel.weight.grad.any()


def test_delayed_scales_follow_the_history_are_saved_and_are_not_moved_by_evaluation():
    layer = FP8Linear(8, 8, bias=False, recipe=FP8Recipe(delayed=True, history=2, margin=1))
    for size in (1.0, 4.0, 2.0):
        layer(torch.full((2, 8), size)).sum().backward()
    assert layer.amax_x.tolist() == [2.0, 4.0] and layer.amax_grad.tolist() == [1.0, 1.0]
    scale = layer.known_scale("x", torch.ones(1, 8))
    assert math.isclose(float(scale), 2 * 4 / 448, rel_tol=1e-6)
    layer.eval()(torch.full((2, 8), 1e3))
    assert layer.amax_x.tolist() == [1.0, 2.0]
    again = FP8Linear(8, 8, bias=False, recipe=layer.recipe)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.amax_x, layer.amax_x)
    layer.train()(torch.zeros(0, 8)).sum().backward()
    assert layer.amax_x.tolist() == [1.0, 2.0] and layer.amax_grad.tolist() == [1.0, 1.0]  # nothing seen, nothing remembered


def test_conversion_keeps_parameters_ties_and_adapters():
    m = model()
    head, before = m.lm_head.weight, {n: id(p) for n, p in m.named_parameters()}
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    names = to_fp8(m, FP8Recipe(delayed=True))
    assert len(names) == 14 and all(isinstance(m.get_submodule(n), FP8Linear) for n in names) and type(m.lm_head) is nn.Linear
    assert {n: id(p) for n, p in m.named_parameters()} == before and m.lm_head.weight is head is m.get_input_embeddings().weight
    assert "E4M3/E5M2 by tensor, delayed" in repr(m)
    start, layout = flat(m), PaddedBatches(ROWS, 4)
    lm_loss(m, layout.collate(layout.plan(0)[0])).backward()
    optimizer.step()
    assert not torch.equal(flat(m), start)
    from_fp8(m)
    assert m.state_dict().keys() == model().state_dict().keys() and not any(isinstance(x, FP8Linear) for x in m.modules())
    with pytest.raises(ValueError, match="no nn.Linear to replace in Linear, except for q_proj, "):
        to_fp8(nn.Linear(2, 2), skip=("q_proj", ""))
    adapted = model()
    add_lora(adapted, r=2, alpha=4)
    bases = [n for n in to_fp8(adapted)]
    assert bases and all(n.endswith("base") or "lora" not in n for n in bases)


@pytest.mark.parametrize("recipe", [FP8Recipe(), FP8Recipe("block", backward=E4M3), FP8Recipe(delayed=True, history=4)], ids=["tensor", "block", "delayed"])
def test_recomputation_gives_the_same_gradients_and_histories(recipe):
    start = nn.Sequential(FP8Linear(20, 30, recipe=recipe), nn.GELU(), FP8Linear(30, 10, recipe=recipe))
    for autocast, reentrant in itertools.product((False, True), (False, True)):
        found = []
        for recompute in (False, True):
            layers, seen = copy.deepcopy(start), []
            for step in range(3):  # inputs that grow: a scale from the wrong call would show
                x = (4.0**step * torch.randn(6, 20, generator=rng(step))).requires_grad_()
                layers.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    y = checkpoint(layers, x, use_reentrant=reentrant) if recompute else layers(x)
                    y.float().square().sum().backward()
                seen += [x.grad, *(p.grad for p in layers.parameters()), *(b.clone() for b in layers.buffers())]
            found.append(seen)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_stopped_run_with_delayed_scales_goes_on_as_if_never_stopped(tmp_path):
    config, layout = replace(CONFIG, max_steps=8, precision="bf16", save_every=4, keep_checkpoints=2), PackedBatches(ROWS, 2, 32)
    def run(resume):
        m = model()
        to_fp8(m, FP8Recipe(delayed=True, history=4))
        fit(m, layout, config=config, run_dir=tmp_path, resume=resume)
        return m
    whole = run(False)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000008")
    again = run(True)
    assert torch.equal(flat(whole), flat(again))
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), again.buffers(), strict=True))


def _train_on_rank(rank, folder):
    m = model()
    to_fp8(m, FP8Recipe(delayed=True, history=3))
    fit(m, PaddedBatches(ROWS, 2), config=replace(CONFIG, max_steps=4, precision="bf16"))
    history = torch.stack([x.amax_x for x in m.modules() if isinstance(x, FP8Linear)])
    torch.save((flat(m), history), Path(folder) / f"rank_{rank}.pt")


def test_two_ranks_stay_equal_with_rank_0s_scales(tmp_path):
    on_two_ranks(_train_on_rank, tmp_path)
    (a, a_seen), (b, b_seen) = (torch.load(tmp_path / f"rank_{r}.pt") for r in (0, 1))
    assert torch.equal(a, b) and not torch.equal(a, flat(model()))
    assert torch.equal(a_seen[:, 1:], b_seen[:, 1:])         # DDP has overwritten what came before the last call
    assert not torch.equal(a_seen[:, 0], b_seen[:, 0])       # the last call's own maximum


@pytest.mark.parametrize("recipe", [FP8Recipe(), FP8Recipe("mx", backward=E4M3), FP8Recipe("none", FP16, FP16, result=FP16)], ids=["tensor", "mx", "fp16"])
def test_a_model_learns_in_short_products(recipe):
    losses = []
    for change in (lambda m: None, lambda m: to_fp8(m, recipe)):
        m = copy.deepcopy(model())
        change(m)
        losses.append(fit(m, PaddedBatches(ROWS, 3), config=replace(CONFIG, max_steps=20, log_every=20)).history[-1]["loss"])
    assert abs(losses[1] - losses[0]) < 0.03 * losses[0]


# Autocast


def test_autocast_lists_on_cpu():
    for dtype in (torch.bfloat16, torch.float16):
        found = autocast_dtypes("cpu", dtype)
        assert all(found[k] == dtype for k in ("linear", "matmul", "einsum", "attention", "softmax", "layer_norm", "sum", "h + h"))
        assert all(found[k] == torch.float32 for k in ("cross_entropy", "mse_loss", "h + FP32", "cat with FP32", "embedding"))


@pytest.mark.cuda
def test_autocast_lists_on_cuda():
    found = autocast_dtypes("cuda", torch.bfloat16)
    assert all(found[k] == torch.bfloat16 for k in ("linear", "matmul", "attention"))
    assert all(found[k] == torch.float32 for k in ("softmax", "layer_norm", "sum", "exp", "pow", "cross_entropy"))


@pytest.mark.cuda
def test_fp8_kernel_on_cuda():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    simulated, kernel = (FP8Linear(96, 160, bias=False, recipe=FP8Recipe(backend=b)).cuda() for b in ("simulated", "scaled_mm"))
    kernel.load_state_dict(simulated.state_dict())
    x, dy = torch.randn(70, 96, device="cuda"), torch.randn(70, 160, device="cuda")
    for a, b in zip(_gradients(simulated, x, dy), _gradients(kernel, x, dy), strict=True):
        assert_close(a, b, rtol=1e-2, atol=1e-2 * float(a.abs().max()))  # Hopper's accumulator is shorter than FP32
