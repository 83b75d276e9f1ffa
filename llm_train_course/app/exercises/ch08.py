"Exercises of chapter 8, precision: limits of a format, rounding, the loss scale, Kahan's sum, FP8 in blocks."

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

from ..checker import Mismatch, call, exercise, prop
from .ch05 import described, is_near, near

# 08.1

LIMITS = exercise(
    "08.1",
    title="The limits of a format",
    title_zh="一种格式的界限",
    statement="""Write `format_limits(exponent_bits, mantissa_bits, specials)`: the list [max, min_normal, min_subnormal, eps] of a
floating-point format with bias 2^(exponent_bits − 1) − 1. `specials` says which codes are no numbers: "ieee": the whole top
exponent (infinity and NaN); "fn": only the code whose exponent and mantissa are all ones; "none": every code is a number.
`eps` is the distance from 1 to the next number above.""",
    statement_zh="""写出 `format_limits(exponent_bits, mantissa_bits, specials)`：返回一种浮点格式的列表 [max, min_normal, min_subnormal, eps]，偏置为
2^(exponent_bits − 1) − 1。`specials` 说明哪些编码不是数："ieee"：整个最高指数（无穷与 NaN）；"fn"：只有指数和尾数全为 1 的那个编码；
"none"：所有编码都是数。`eps` 是 1 到上方下一个数的距离。""",
    stub='''def format_limits(exponent_bits, mantissa_bits, specials):
    "[largest value, smallest normal, smallest subnormal, spacing above 1]"
    ...
''',
    solution='''def format_limits(exponent_bits, mantissa_bits, specials):
    "[largest value, smallest normal, smallest subnormal, spacing above 1]"
    bias = 2 ** (exponent_bits - 1) - 1
    eps = 2.0**-mantissa_bits
    top = 2**exponent_bits - 1 - (specials == "ieee")     # the largest exponent field that numbers have
    mantissa = 2 - eps - (eps if specials == "fn" else 0)  # fn: the last mantissa at the top is NaN
    return [mantissa * 2.0 ** (top - bias), 2.0 ** (1 - bias), 2.0 ** (1 - bias) * eps, eps]
''',
)


@cache
def positive_values(e: int, m: int, specials: str) -> list[Fraction]:
    "Every number above zero, from the codes, ascending."
    bias, found = 2 ** (e - 1) - 1, []
    for code in range(1, 2 ** (e + m)):
        field, mantissa = code >> m, code & (2**m - 1)
        if specials == "ieee" and field == 2**e - 1 or specials == "fn" and code == 2 ** (e + m) - 1:
            continue
        found.append(Fraction(mantissa + (2**m if field else 0)) * Fraction(2) ** (max(field, 1) - bias - m))
    return found


def limits(e: int, m: int, specials: str) -> list[float]:
    v, bias = positive_values(e, m, specials), 2 ** (e - 1) - 1
    return [float(x) for x in (v[-1], Fraction(2) ** (1 - bias), v[0], next(x for x in v if x > 1) - 1)]


def shape_case(rng: random.Random, specials: str | None = None) -> dict:
    return {"exponent_bits": rng.randint(3, 6), "mantissa_bits": rng.randint(2, 5), "specials": specials or rng.choice(["ieee", "fn", "none"])}


def part(fn: Callable, k: int, why: str, **case: Any) -> None:
    "Compares one entry of the answer."
    returned, expected = call(fn, **case), limits(case["exponent_bits"], case["mantissa_bits"], case["specials"])
    if not isinstance(returned, list) or len(returned) != 4 or not is_near(returned[k], expected[k], 1e-9, 0.0):
        raise Mismatch(described(fn, case), repr(returned)[:600], repr(expected), why)


@prop(LIMITS, "ieee: the top exponent is no number, the one below holds the largest")
def _(fn, rng: random.Random):
    part(fn, 0, "FP16 (5, 10): the field 31 is infinity and NaN, so the largest is (2 − 2⁻¹⁰)·2¹⁵ = 65,504", **shape_case(rng, "ieee"))


@prop(LIMITS, "fn: the top exponent has numbers, but its last mantissa is NaN")
def _(fn, rng: random.Random):
    part(fn, 0, "E4M3: S.1111.111 is NaN, so the largest is S.1111.110 = 448", **shape_case(rng, "fn"))


@prop(LIMITS, "none: the last code is the largest number")
def _(fn, rng: random.Random):
    part(fn, 0, "E2M1: 11.1 is 6", **shape_case(rng, "none"))


@prop(LIMITS, "the smallest normal number is 2^(1 − bias): the field 0 belongs to the subnormals")
def _(fn, rng: random.Random):
    part(fn, 1, "the second entry", **shape_case(rng))


@prop(LIMITS, "subnormals reach mantissa_bits powers of two further down")
def _(fn, rng: random.Random):
    part(fn, 2, "the third entry: one step of the lowest spacing", **shape_case(rng))


@prop(LIMITS, "eps is the distance from 1 to the next number")
def _(fn, rng: random.Random):
    part(fn, 3, "the fourth entry; the largest rounding error is half of it", **shape_case(rng))


# 08.2

ROUND = exercise(
    "08.2",
    title="Round to nearest, ties to even",
    title_zh="就近舍入，平局取偶",
    statement="""Write `round_to(x, exponent_bits, mantissa_bits)`: the number that x is rounded to in an IEEE format (bias
2^(exponent_bits − 1) − 1, the top exponent reserved), to the nearest, ties to the number with the even mantissa. Below
the smallest normal number the spacing stays what it is there (subnormals). What rounds to more than the largest number
becomes infinity (`math.inf`). x is a float and may be negative or 0.""",
    statement_zh="""写出 `round_to(x, exponent_bits, mantissa_bits)`：x 在一种 IEEE 格式（偏置 2^(exponent_bits − 1) − 1，最高指数保留）中舍入成的数，就近舍入，
平局取尾数为偶的数。小于最小正规数时间距不再变小（次正规数）。舍入后超过最大数的变成无穷（`math.inf`）。x 是浮点数，可以为负或为 0。""",
    stub='''def round_to(x, exponent_bits, mantissa_bits):
    "x in the format, as a float."
    ...
''',
    solution='''def round_to(x, exponent_bits, mantissa_bits):
    "x in the format, as a float."
    import math
    bias = 2 ** (exponent_bits - 1) - 1
    exponent = max(math.frexp(x)[1] - 1, 1 - bias)       # floor(log2 |x|), exactly; not below that of the normal numbers
    quantum = 2.0 ** (exponent - mantissa_bits)
    rounded = round(x / quantum) * quantum               # Python rounds ties to even
    largest = (2 - 2.0**-mantissa_bits) * 2.0**bias
    return math.copysign(math.inf, x) if abs(rounded) > largest else rounded
''',
)


def rounded(x: float, e: int, m: int) -> float:
    "By search over all values, exactly."
    values = [Fraction(0), *positive_values(e, m, "ieee")]
    spacing = values[-1] - values[-2]
    exact = Fraction(abs(x))
    if exact >= values[-1] + spacing / 2:
        return math.copysign(math.inf, x)
    best = min(range(len(values)), key=lambda k: (abs(values[k] - exact), k % 2))  # codes in order: an even code is an even mantissa
    return math.copysign(float(values[best]), x)


def format_case(rng: random.Random) -> dict:
    return {"exponent_bits": rng.randint(3, 4), "mantissa_bits": rng.randint(2, 4)}


def rounds(fn: Callable, x: float, case: dict, why: str = "") -> None:
    near(fn, rounded(x, case["exponent_bits"], case["mantissa_bits"]), why, rtol=1e-9, atol=0.0, x=x, **case)


@prop(ROUND, "numbers between two values go to the nearer one, negative ones too")
def _(fn, rng: random.Random):
    case = format_case(rng)
    values = [v for v in positive_values(case["exponent_bits"], case["mantissa_bits"], "ieee") if v >= 1]
    k = rng.randrange(len(values) - 1)
    share = Fraction(rng.choice([0, 1, 3, 5, 7]), 8)
    rounds(fn, rng.choice([-1, 1]) * float(values[k] + share * (values[k + 1] - values[k])), case, f"the neighbours are {float(values[k])} and {float(values[k + 1])}")


@prop(ROUND, "a tie goes to the even mantissa")
def _(fn, rng: random.Random):
    case = format_case(rng)
    values = [v for v in positive_values(case["exponent_bits"], case["mantissa_bits"], "ieee") if v >= 1]
    for k in rng.sample(range(len(values) - 1), 4):
        rounds(fn, rng.choice([-1, 1]) * float((values[k] + values[k + 1]) / 2), case, f"halfway between {float(values[k])} and {float(values[k + 1])}")


@prop(ROUND, "below the smallest normal number the spacing stays the same, down to zero")
def _(fn, rng: random.Random):
    case = format_case(rng)
    smallest = float(positive_values(case["exponent_bits"], case["mantissa_bits"], "ieee")[0])
    for steps in (0, 0.5, 0.75, 1.5, rng.randrange(8, 8 * 2 ** case["mantissa_bits"]) / 8):
        rounds(fn, rng.choice([-1, 1]) * steps * smallest, case, f"the smallest subnormal number is {smallest}")


@prop(ROUND, "overflow is decided after rounding")
def _(fn, rng: random.Random):
    case = format_case(rng)
    values = positive_values(case["exponent_bits"], case["mantissa_bits"], "ieee")
    step = values[-1] - values[-2]
    for share in (Fraction(1, 4), Fraction(1, 2), Fraction(3)):
        why = f"the largest number is {float(values[-1])}; half a step above it is where infinity begins"
        rounds(fn, rng.choice([-1, 1]) * float(values[-1] + share * step), case, why)


# 08.3

SCALER = exercise(
    "08.3",
    title="A dynamic loss scale",
    title_zh="动态损失缩放",
    statement="""Write `loss_scales(overflows, scale, interval)`: the list [steps, scales] for dynamic loss scaling. `overflows[k]` says
whether the gradients of step k overflowed. An overflow skips the optimizer step and halves the scale; after `interval`
steps in a row without one the scale doubles, and the count starts anew. `steps` is how many optimizer steps were taken,
`scales` the scale after each step.""",
    statement_zh="""写出 `loss_scales(overflows, scale, interval)`：动态损失缩放的列表 [steps, scales]。`overflows[k]` 表示第 k 步的梯度是否溢出。溢出则跳过这一步
优化器更新，缩放减半；连续 `interval` 步没有溢出则缩放加倍，计数重新开始。`steps` 是优化器实际更新的次数，`scales` 是每一步之后的缩放。""",
    stub='''def loss_scales(overflows, scale, interval):
    "[optimizer steps taken, scale after each step]"
    ...
''',
    solution='''def loss_scales(overflows, scale, interval):
    "[optimizer steps taken, scale after each step]"
    scales, good = [], 0
    for overflow in overflows:
        good = 0 if overflow else good + 1
        if overflow:
            scale = scale / 2
        elif good == interval:
            scale, good = scale * 2, 0
        scales.append(scale)
    return [overflows.count(False), scales]
''',
)


def right_scales(overflows: list[bool], scale: float, interval: int) -> list:
    scales, since = [], 0
    for k, overflow in enumerate(overflows):
        run = 0
        while k - run >= since and not overflows[k - run]:
            run += 1
        if overflow:
            scale /= 2
        elif run and run % interval == 0:
            scale, since = scale * 2, k + 1
        scales.append(scale)
    return [sum(not o for o in overflows), scales]


@prop(SCALER, "an overflow halves the scale and takes no step")
def _(fn, rng: random.Random):
    overflows = [True] * rng.randint(1, 3) + [False]
    case = {"overflows": overflows, "scale": 2.0 ** rng.randint(4, 16), "interval": 5}
    near(fn, right_scales(**case), "the batch is lost: its gradients are not finite", **case)


@prop(SCALER, "after interval good steps in a row the scale doubles, again and again")
def _(fn, rng: random.Random):
    interval = rng.randint(2, 4)
    case = {"overflows": [False] * (2 * interval + 1), "scale": 2.0 ** rng.randint(0, 10), "interval": interval}
    near(fn, right_scales(**case), f"it grows after steps {interval} and {2 * interval}", **case)


@prop(SCALER, "an overflow starts the count anew")
def _(fn, rng: random.Random):
    interval = rng.randint(3, 5)
    overflows = [False] * (interval - 1) + [True] + [False] * (interval - 1) + [True] + [False] * interval
    case = {"overflows": overflows, "scale": 2.0 ** rng.randint(4, 10), "interval": interval}
    near(fn, right_scales(**case), "good steps before an overflow do not count after it", **case)


@prop(SCALER, "any sequence, an interval of one included")
def _(fn, rng: random.Random):
    case = {"overflows": [rng.random() < 0.25 for _ in range(rng.randint(0, 15))], "scale": 2.0 ** rng.randint(4, 10), "interval": rng.randint(1, 4)}
    near(fn, right_scales(**case), **case)


# 08.4

KAHAN = exercise(
    "08.4",
    title="A BF16 weight that does not stall",
    title_zh="不会停滞的 BF16 权重",
    statement="""Write `kahan(weight, updates)`: the list [w, c] after adding the updates one by one to a weight that is stored in BF16
(8 significant bits, round to nearest even), with Kahan's compensation c, also stored in BF16 and 0 at first: each step adds
update + c to w, rounds, and keeps in c what rounding has cut off. Everything between two roundings is exact enough in
Python's floats or in float32.""",
    statement_zh="""写出 `kahan(weight, updates)`：把各个更新逐个加到以 BF16（8 位有效数字，就近取偶）存放的权重上，返回 [w, c]。Kahan 补偿 c 也以 BF16 存放，初值为 0：
每一步把 update + c 加到 w 上并舍入，舍入切掉的部分留在 c 里。两次舍入之间用 Python 浮点数或 float32 计算即可。""",
    stub='''def kahan(weight, updates):
    "[weight, compensation], both BF16 values, as floats."
    ...
''',
    solution='''def kahan(weight, updates):
    "[weight, compensation], both BF16 values, as floats."
    import torch
    bf16 = lambda x: torch.tensor(x).bfloat16().item()
    w, c = weight, 0.0
    for update in updates:
        y = update + c
        new = bf16(w + y)
        w, c = new, bf16(y - (new - w))
    return [w, c]
''',
)


def to_bf16(x: float) -> float:
    if x == 0:
        return 0.0
    quantum = 2.0 ** (math.frexp(x)[1] - 8)
    return round(x / quantum) * quantum


def right_kahan(weight: float, updates: list[float]) -> list[float]:
    w, c = weight, 0.0
    for update in updates:
        new = to_bf16(w + (update + c))
        w, c = new, to_bf16(update + c - (new - w))
    return [w, c]


def weight_case(rng: random.Random, n: int, low: int, high: int, sign: int | None = None) -> dict:
    "Weights from 1 to 2 and updates in units of 2^-14: every sum is exact, so w + c is the exact sum."
    sign = sign or rng.choice([-1, 1])
    return {"weight": rng.randint(160, 220) / 128, "updates": [sign * rng.randint(low, high) * 2.0**-14 for _ in range(n)]}


@prop(KAHAN, "an update below half a step of the weight is kept in c")
def _(fn, rng: random.Random):
    case = weight_case(rng, 1, 3, 60)
    near(fn, right_kahan(**case), "w stays, c is the update: next time it counts", rtol=0, atol=1e-9, **case)


@prop(KAHAN, "small updates move the weight in the end: w + c is the exact sum")
def _(fn, rng: random.Random):
    case = weight_case(rng, rng.randint(8, 16), 10, 40)
    exact = case["weight"] + math.fsum(case["updates"])
    near(fn, right_kahan(**case), f"the exact sum is {exact}; rounded to nearest at every step, the weight would still be {case['weight']}", rtol=0, atol=1e-9, **case)


@prop(KAHAN, "both numbers are BF16")
def _(fn, rng: random.Random):
    case = weight_case(rng, rng.randint(4, 8), 30, 200)
    near(fn, right_kahan(**case), "8 significant bits each", rtol=0, atol=1e-9, **case)


@prop(KAHAN, "no updates change nothing, and large ones leave what is cut off")
def _(fn, rng: random.Random):
    near(fn, [1.5, 0.0], weight=1.5, updates=[])
    case = weight_case(rng, 3, 65, 500)
    near(fn, right_kahan(**case), rtol=0, atol=1e-9, **case)


# 08.5

BLOCKS = exercise(
    "08.5",
    title="E4M3 with a scale for each block",
    title_zh="每块一个缩放因子的 E4M3",
    statement="""Write `fp8_blocks(row, block)`: what is left of a list of numbers that is stored in E4M3 with one scale for every `block`
consecutive numbers (the last block may be shorter). The scale of a block is its largest magnitude divided by 448, the
largest number of E4M3; a number is divided by the scale, rounded to the nearest E4M3 number (ties to even; 3 mantissa bits,
smallest normal number 2⁻⁶, subnormal ones in steps of 2⁻⁹) and multiplied by the scale. A block of zeros stays zeros.""",
    statement_zh="""写出 `fp8_blocks(row, block)`：一列数以 E4M3 存放，每 `block` 个连续的数共用一个缩放因子（最后一块可以较短），返回存放之后剩下的数。一块的缩放因子是其最大绝对值
除以 448（E4M3 的最大数）；每个数除以缩放因子，舍入到最近的 E4M3 数（平局取偶；3 位尾数，最小正规数 2⁻⁶，次正规数步长 2⁻⁹），再乘回缩放因子。全零的块仍为零。""",
    stub='''def fp8_blocks(row, block):
    "The dequantized numbers."
    ...
''',
    solution='''def fp8_blocks(row, block):
    "The dequantized numbers."
    import torch
    out = []
    for start in range(0, len(row), block):
        part = torch.tensor(row[start:start + block])
        scale = part.abs().max() / 448
        scale = scale if scale > 0 else torch.tensor(1.0)
        out += ((part / scale).to(torch.float8_e4m3fn).float() * scale).tolist()
    return out
''',
)


def e4m3(x: float) -> float:
    quantum = 2.0 ** (max(math.frexp(x)[1] - 1, -6) - 3)
    return round(x / quantum) * quantum


def right_blocks(row: list[float], block: int) -> list[float]:
    out: list[float] = []
    for start in range(0, len(row), block):
        part = row[start : start + block]
        scale = max(map(abs, part)) / 448 or 1.0
        out += [e4m3(x / scale) * scale for x in part]
    return out


def one_block(rng: random.Random, n: int, power: int) -> list[float]:
    "Its largest element is 448 times a power of two, so that the scale is exact."
    scale = 2.0**power
    part = [rng.choice([-1, 1]) * rng.choice([rng.randint(1, 440) * 1.0, rng.randint(8, 64) / 64, 50.0, 27.0]) * scale for _ in range(n)]
    part[rng.randrange(n)] = rng.choice([-448.0, 448.0]) * scale
    return part


@prop(BLOCKS, "in one block, numbers go to the nearest of E4M3, ties to even")
def _(fn, rng: random.Random):
    row = one_block(rng, 6, rng.randint(-6, 3))
    row[(row.index(max(row, key=abs)) + 1) % 6] = 50.0 * max(map(abs, row)) / 448
    near(fn, right_blocks(row, 6), "448 is kept; 50 is a tie between 48 and 52, and 48 is even", row=row, block=6)


@prop(BLOCKS, "what is less than half of 2⁻⁹ scales becomes zero, what is more becomes subnormal")
def _(fn, rng: random.Random):
    scale = 2.0 ** rng.randint(-4, 4)
    row = [448 * scale, rng.choice([0.2, 0.4]) * 2.0**-9 * scale, rng.choice([0.6, 1.4]) * 2.0**-9 * scale, -2.6 * 2.0**-9 * scale]
    near(fn, right_blocks(row, 4), "steps of 2⁻⁹ below 2⁻⁶", atol=1e-12, row=row, block=4)


@prop(BLOCKS, "a small block beside a large one has its own scale")
def _(fn, rng: random.Random):
    row = one_block(rng, 4, 10) + one_block(rng, 4, -10)
    near(fn, right_blocks(row, 4), "with one scale for all, the second block would be zeros", atol=1e-12, row=row, block=4)


@prop(BLOCKS, "the last block may be shorter")
def _(fn, rng: random.Random):
    row = one_block(rng, 4, 2) + one_block(rng, rng.randint(1, 3), -5)
    near(fn, right_blocks(row, 4), f"{len(row)} numbers in, {len(row)} out", atol=1e-12, row=row, block=4)


@prop(BLOCKS, "a block of zeros stays zeros")
def _(fn, rng: random.Random):
    row = one_block(rng, 3, 0) + [0.0] * 3
    near(fn, right_blocks(row, 3), "its scale would be zero", row=row, block=3)
