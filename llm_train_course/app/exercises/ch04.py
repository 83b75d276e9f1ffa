"Exercises of chapter 4, QLoRA: NF4's levels, a block, packing, bytes of a tensor, dequantizing, bytes of a fine-tune."

from __future__ import annotations

import math
import random
from statistics import NormalDist

from ..checker import Mismatch, call, compare, exercise, prop

NF4 = [
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip


def described(fn, arguments: dict) -> str:
    return f"{getattr(fn, '__name__', 'fn')}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


# 04.1

LEVELS = exercise(
    "04.1",
    title="The levels of a NormalFloat",
    title_zh="NormalFloat 的取值",
    statement="""Write `normal_float_levels(bits, offset)`: the `2**bits` levels of the NormalFloat code, ascending, scaled to [-1, 1].
One side has one level more than the other, so that zero is a level: `2**(bits-1)` positive ones, at the normal quantiles of
evenly spaced probabilities from `offset` down towards 0.5 (0.5 itself left out), and one negative level less, at minus
the quantiles of probabilities spaced in the same way. Then all are divided by the largest. For NF4, bits is 4 and offset
is 0.9677083. `statistics.NormalDist().inv_cdf` is the quantile function; float32 is exact enough.""",
    statement_zh="""写出 `normal_float_levels(bits, offset)`：NormalFloat 编码的 `2**bits` 个取值，升序，缩放到 [-1, 1]。为使零成为一个取值，两侧个数
不同：正值 `2**(bits-1)` 个，取正态分布在等距概率处的分位数，概率从 `offset` 向 0.5 递减（不含 0.5）；负值少一个，用同样方式等距取概率后取负。
最后全部除以最大值。NF4 对应 bits=4、offset=0.9677083。分位数函数可用 `statistics.NormalDist().inv_cdf`；float32 的精度已足够。""",
    stub='''def normal_float_levels(bits, offset):
    "The 2^bits levels of NormalFloat, ascending."
    ...
''',
    solution='''def normal_float_levels(bits, offset):
    "The 2^bits levels of NormalFloat, ascending."
    from statistics import NormalDist
    def side(n):  # n probabilities from offset down to the last before 0.5
        return [NormalDist().inv_cdf(offset + (0.5 - offset) * k / n) for k in range(n)]
    half = 2 ** (bits - 1)
    levels = sorted([-q for q in side(half - 1)] + [0.0] + side(half))
    return [q / levels[-1] for q in levels]
''',
)


def levels_of(fn, bits: int, offset: float) -> list[float]:
    "What the function returns, if that is 2^bits finite numbers in ascending order."
    arguments = {"bits": bits, "offset": offset}
    returned = call(fn, **arguments)
    numbers = isinstance(returned, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in returned)
    if not numbers or len(returned) != 2**bits or returned != sorted(returned):
        why = "a quantile at probability 0 or 1 is infinite: this is what the paper's Eq. 4 asks for at its ends"
        raise Mismatch(described(fn, arguments), repr(returned)[:600], f"{2**bits} finite levels in ascending order", why)
    return returned


def random_code(rng: random.Random) -> tuple[int, float]:
    return rng.randint(2, 6), round(rng.uniform(0.9, 0.99), 4)


@prop(LEVELS, "there are 2^bits finite levels in ascending order")
def _(fn, rng: random.Random):
    levels_of(fn, *random_code(rng))


@prop(LEVELS, "-1, 0 and 1 are levels, and one more is positive than negative")
def _(fn, rng: random.Random):
    bits, offset = random_code(rng)
    levels = levels_of(fn, bits, offset)
    found = [levels[0], levels[2 ** (bits - 1) - 1], levels[-1]]
    if any(abs(a - b) > 1e-6 for a, b in zip(found, [-1.0, 0.0, 1.0])):
        text = described(fn, {"bits": bits, "offset": offset})
        raise Mismatch(text, f"{found} as first, number {2 ** (bits - 1)} and last of {levels}"[:600], "[-1, 0, 1]", "zero must be exact: padding and pruned weights are zero")


@prop(LEVELS, "four bits and the offset 0.9677083 give NF4")
def _(fn, rng: random.Random):
    levels = levels_of(fn, 4, 0.9677083)
    worst = max(range(16), key=lambda k: abs(levels[k] - NF4[k]))
    if abs(levels[worst] - NF4[worst]) > 1e-5:
        text = described(fn, {"bits": 4, "offset": 0.9677083})
        raise Mismatch(text, repr([round(v, 4) for v in levels]), repr([round(v, 4) for v in NF4]), f"level {worst} is the furthest off")


@prop(LEVELS, "on each side the levels are evenly spaced in probability")
def _(fn, rng: random.Random):
    bits, offset = random_code(rng)
    levels, normal, half = levels_of(fn, bits, offset), NormalDist(), 2 ** (bits - 1)
    scale = normal.inv_cdf(offset)
    for side, n in (([v for v in levels if v > 1e-9], half), ([-v for v in reversed(levels) if v < -1e-9], half - 1)):
        found = [normal.cdf(v * scale) for v in side]
        expected = [0.5 + (offset - 0.5) * k / n for k in range(1, n + 1)]
        if len(found) != n or any(abs(a - b) > 1e-5 for a, b in zip(found, expected)):
            text = described(fn, {"bits": bits, "offset": offset})
            raise Mismatch(text, f"probabilities {[round(p, 4) for p in found]}", f"{[round(p, 4) for p in expected]}", "normal probabilities of one side's levels")


# 04.2

BLOCK = exercise(
    "04.2",
    title="Quantizing one block",
    title_zh="量化一个权重块",
    statement="""Write `quantize_block(block, levels)`: the pair (codes, absmax) of one block of weights. `absmax` is the constant that
the block is divided by, its largest magnitude. A code is the index of the level nearest to the scaled weight; `levels`
ascend from -1 to 1 and hold 0. A block of zeros has absmax 0, and all its codes are that of the level 0.""",
    statement_zh="""写出 `quantize_block(block, levels)`：一个权重块的 (codes, absmax)。`absmax` 是块内最大的绝对值，块要除以它。编码是与缩放后
权重最近的取值的下标；`levels` 从 -1 升到 1，且包含 0。全零块的 absmax 为 0，编码都是取值 0 的下标。""",
    stub='''def quantize_block(block, levels):
    "(codes, absmax) of one block"
    ...
''',
    solution='''def quantize_block(block, levels):
    "(codes, absmax) of one block"
    absmax = max(abs(w) for w in block)
    scale = absmax or 1.0  # a block of zeros: 0 / 1 is nearest to the level 0
    nearest = lambda w: min(range(len(levels)), key=lambda k: abs(levels[k] - w / scale))
    return [nearest(w) for w in block], absmax
''',
)


def block_near(rng: random.Random, levels: list[float], absmax: float, n: int) -> tuple[list[float], list[int]]:
    "Weights at most four tenths of a gap away from the levels of known codes; one of them has the largest magnitude."
    codes = [rng.randrange(len(levels)) for _ in range(n)]
    extreme = rng.randrange(n)
    codes[extreme] = rng.choice([0, len(levels) - 1])
    block = []
    for k, c in enumerate(codes):
        down = levels[c] - levels[c - 1] if c else 0.0
        up = levels[c + 1] - levels[c] if c + 1 < len(levels) else 0.0
        step = 0.0 if k == extreme else rng.choice([-0.4 * down, 0.4 * up, 0.0])
        block.append(absmax * (levels[c] + step))
    return block, codes


@prop(BLOCK, "absmax is the largest magnitude, whatever its sign")
def _(fn, rng: random.Random):
    absmax = rng.choice([0.25, 0.5, 1.0, 4.0])
    block, _ = block_near(rng, NF4, absmax, rng.randint(2, 6))
    returned = call(fn, block=block, levels=NF4)
    good = isinstance(returned, list) and len(returned) == 2 and isinstance(returned[1], int | float)
    if not good or abs(returned[1] - absmax) > 1e-6 * absmax:
        raise Mismatch(described(fn, {"block": block, "levels": NF4}), repr(returned), f"(codes, {absmax})")


@prop(BLOCK, "a code is the index of the nearest level")
def _(fn, rng: random.Random):
    absmax = rng.choice([0.25, 0.5, 2.0])
    block, codes = block_near(rng, NF4, absmax, rng.randint(3, 8))
    compare(fn, [codes, absmax], f"scaled, the block is {[round(w / absmax, 4) for w in block]}", block=block, levels=NF4)


@prop(BLOCK, "with other levels, more or fewer of them, the codes count those")
def _(fn, rng: random.Random):
    levels = [-1.0, *(k / 8 for k in range(-6, 7, 2)), 1.0]
    block, codes = block_near(rng, levels, 2.0, rng.randint(3, 8))
    compare(fn, [codes, 2.0], block=block, levels=levels)


@prop(BLOCK, "scaling a block scales absmax and leaves the codes")
def _(fn, rng: random.Random):
    scale = 2.0 ** rng.randint(-20, 20)
    block, codes = block_near(rng, NF4, 1.0, rng.randint(3, 8))
    compare(fn, [codes, scale], "the constant carries the scale, the codes carry the shape", block=[scale * w for w in block], levels=NF4)


@prop(BLOCK, "a block of zeros has absmax 0, and codes that dequantize to zero")
def _(fn, rng: random.Random):
    n = rng.randint(1, 5)
    compare(fn, [[7] * n, 0.0], "7 is NF4's code of zero", block=[0.0] * n, levels=NF4)


# 04.3

PACK = exercise(
    "04.3",
    title="Two codes in a byte",
    title_zh="一个字节存两个编码",
    statement="""Write `pack_codes(codes, pad=7)`: the bytes that hold these 4-bit codes, as a list of integers, in bitsandbytes' order:
the first code of a pair is in the high four bits. When the number of codes is odd, the low half of the last byte holds
`pad`; 7 is NF4's code of zero.""",
    statement_zh="""写出 `pack_codes(codes, pad=7)`：存放这些 4 比特编码的字节（整数列表），采用 bitsandbytes 的顺序：每对中第一个编码在高四位。
编码个数为奇数时，最后一个字节的低四位放 `pad`；7 是 NF4 中零的编码。""",
    stub='''def pack_codes(codes, pad=7):
    "Bytes that hold 4-bit codes, two in each."
    ...
''',
    solution='''def pack_codes(codes, pad=7):
    "Bytes that hold 4-bit codes, two in each."
    if len(codes) % 2:
        codes = [*codes, pad]
    return [high << 4 | low for high, low in zip(codes[::2], codes[1::2])]
''',
)


def random_codes(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(16) for _ in range(n)]


@prop(PACK, "two codes make one byte, the first in its high half")
def _(fn, rng: random.Random):
    high, low = rng.sample(range(16), 2)
    compare(fn, [16 * high + low], codes=[high, low])


@prop(PACK, "in hexadecimal the bytes read as the codes do")
def _(fn, rng: random.Random):
    codes = random_codes(rng, 2 * rng.randint(2, 8))
    text = "".join(f"{c:x}" for c in codes)
    compare(fn, list(bytes.fromhex(text)), f"the codes are 0x{text}", codes=codes)


@prop(PACK, "an odd number of codes fills the last byte with pad")
def _(fn, rng: random.Random):
    codes, pad = random_codes(rng, 2 * rng.randint(0, 4) + 1), rng.randrange(16)
    expected = list(bytes.fromhex("".join(f"{c:x}" for c in [*codes, pad])))
    compare(fn, expected, f"{len(codes)} codes take {len(codes) // 2 + 1} bytes", codes=codes, pad=pad)


@prop(PACK, "without codes there are no bytes, and the default pad is the code of zero")
def _(fn, rng: random.Random):
    code = rng.randrange(16)
    compare(fn, [], codes=[])
    compare(fn, [16 * code + 7], codes=[code])


# 04.4

SIZE = exercise(
    "04.4",
    title="The bytes of a quantized tensor",
    title_zh="量化张量的字节数",
    statement="""Write `stored_bytes(n, blocksize, nested_blocksize=None)`: the bytes that `n` weights take in four bits, codes and
constants together, tables not counted. Each block of `blocksize` weights has a constant, the last block also when it is
shorter. A constant is an FP32 number. With `nested_blocksize` (double quantization) a constant takes 8 bits, and each
`nested_blocksize` of them share one FP32 number; the last group may be shorter, too.""",
    statement_zh="""写出 `stored_bytes(n, blocksize, nested_blocksize=None)`：`n` 个权重按 4 比特存放所占的字节数，含编码与量化常数，不计查找表。
每 `blocksize` 个权重为一块，每块一个常数，最后一块不满也要一个。常数是一个 FP32 数。给出 `nested_blocksize`（双重量化）时，常数占 8 比特，
每 `nested_blocksize` 个常数再共用一个 FP32 数；最后一组同样可以不满。""",
    stub='''def stored_bytes(n, blocksize, nested_blocksize=None):
    "Bytes of n weights in four bits, with their constants."
    ...
''',
    solution='''def stored_bytes(n, blocksize, nested_blocksize=None):
    "Bytes of n weights in four bits, with their constants."
    up = lambda a, b: -(-a // b)
    blocks = up(n, blocksize)
    constants = 4 * blocks if nested_blocksize is None else blocks + 4 * up(blocks, nested_blocksize)
    return up(n, 2) + constants
''',
)


@prop(SIZE, "one block: half a byte a weight, and four bytes for the constant")
def _(fn, rng: random.Random):
    blocksize = 2 ** rng.randint(5, 12)
    compare(fn, blocksize // 2 + 4, n=blocksize, blocksize=blocksize)


@prop(SIZE, "at block 64 the constants add half a bit a weight")
def _(fn, rng: random.Random):
    n = 64 * rng.randint(2, 10**6)
    compare(fn, n * 4.5 / 8, "4 + 32/64 bits a weight", n=n, blocksize=64)


@prop(SIZE, "double quantization: 8/64 + 32/(64·256) bits a weight")
def _(fn, rng: random.Random):
    n = 64 * 256 * rng.randint(1, 10**4)
    compare(fn, n * (4 + 8 / 64 + 32 / (64 * 256)) / 8, "the second FP32 constant is shared by 256 blocks of 64", n=n, blocksize=64, nested_blocksize=256)


@prop(SIZE, "a part of a block has a whole constant, and a last odd code a whole byte")
def _(fn, rng: random.Random):
    blocksize, blocks, nested = 2 ** rng.randint(5, 8), rng.randint(2, 2000), rng.choice([None, 256])
    n = blocksize * blocks + rng.randint(1, blocksize - 1)
    groups = len(range(0, blocks + 1, nested or 1))
    constants = 4 * (blocks + 1) if nested is None else (blocks + 1) + 4 * groups
    compare(fn, len(range(0, n, 2)) + constants, f"{blocks + 1} blocks", n=n, blocksize=blocksize, nested_blocksize=nested)


# 04.5

DEQUANTIZE = exercise(
    "04.5",
    title="From bytes back to weights",
    title_zh="从字节还原权重",
    statement="""Write `dequantize(packed, absmax, levels, n, blocksize)`: the `n` weights that these bytes stand for. `packed` holds two
codes a byte, the first in the high half. `levels[code]` is a level in [-1, 1]. Each block of `blocksize`
weights shares one constant of the list `absmax`. The last block may be shorter, and the last byte may hold a code too many.""",
    statement_zh="""写出 `dequantize(packed, absmax, levels, n, blocksize)`：这些字节代表的 `n` 个权重。`packed` 每字节两个编码，第一个在高四位；
`levels[code]` 是 [-1, 1] 中的取值；每 `blocksize` 个权重为一块，共用列表 `absmax` 中的一个常数。最后一块可以不满，最后一个字节可能多出一个编码。""",
    stub='''def dequantize(packed, absmax, levels, n, blocksize):
    "The n weights behind the bytes."
    ...
''',
    solution='''def dequantize(packed, absmax, levels, n, blocksize):
    "The n weights behind the bytes."
    codes = [code for byte in packed for code in (byte >> 4, byte & 15)]
    return [levels[code] * absmax[i // blocksize] for i, code in enumerate(codes[:n])]
''',
)


def stored(rng: random.Random, n: int, blocksize: int) -> tuple[dict, list[float]]:
    "A quantized tensor whose numbers are exact in float32, and the weights it stands for."
    levels = [-1.0, *sorted(rng.sample([k / 64 for k in range(-63, 64)], 14)), 1.0]
    codes = random_codes(rng, n)
    absmax = [rng.randint(1, 32) / 8 for _ in range(0, n, blocksize)]
    packed = list(bytes.fromhex("".join(f"{c:x}" for c in codes) + "7" * (n % 2)))
    weights = [levels[codes[i]] * absmax[i // blocksize] for i in range(n)]
    return {"packed": packed, "absmax": absmax, "levels": levels, "n": n, "blocksize": blocksize}, weights


@prop(DEQUANTIZE, "in one block a weight is its level times absmax")
def _(fn, rng: random.Random):
    n = 2 * rng.randint(1, 4)
    case, weights = stored(rng, n, 8)
    compare(fn, weights, f"the bytes are 0x{bytes(case['packed']).hex()}: one hexadecimal digit a code", **case)


@prop(DEQUANTIZE, "every block has its own constant")
def _(fn, rng: random.Random):
    blocksize = rng.choice([2, 4])
    case, weights = stored(rng, blocksize * rng.randint(2, 5), blocksize)
    compare(fn, weights, "block i // blocksize counts weights, not bytes", **case)


@prop(DEQUANTIZE, "an odd number of weights and a short last block give n weights")
def _(fn, rng: random.Random):
    case, weights = stored(rng, 4 * rng.randint(1, 3) + rng.choice([1, 3]), 4)
    compare(fn, weights, "the low half of the last byte is padding", **case)


@prop(DEQUANTIZE, "a block whose constant is 0 is zero")
def _(fn, rng: random.Random):
    case, weights = stored(rng, 8, 4)
    case["absmax"] = [0.0, case["absmax"][1]]
    compare(fn, [0.0] * 4 + weights[4:], **case)


# 04.6

MEMORY = exercise(
    "04.6",
    title="The gigabytes of a QLoRA run",
    title_zh="一次 QLoRA 训练占多少 GB",
    statement="""Write `qlora_gb(n_linear, n_other, n_adapter)`: the list [4-bit weights, 16-bit weights, adapters, gradients, moments]
in gigabytes of a billion bytes. `n_linear` weights are stored in four bits at block size 64 with double quantization over 256
constants (whole blocks; tables not counted), the `n_other` embeddings, norms and the head in 16 bits. The `n_adapter`
numbers of LoRA and their gradients are FP32, and Adam has two FP32 moments.""",
    statement_zh="""写出 `qlora_gb(n_linear, n_other, n_adapter)`：列表 [4 比特权重, 16 位权重, 适配器, 梯度, 动量]，单位为 GB（十亿字节）。
`n_linear` 个权重按 4 比特存放，块长 64，每 256 个常数做双重量化（块都是满的，不计查找表）；`n_other` 个嵌入、归一化和输出头参数用 16 位。
LoRA 的 `n_adapter` 个数及其梯度用 FP32，Adam 有两个 FP32 动量。""",
    stub='''def qlora_gb(n_linear, n_other, n_adapter):
    "[4-bit weights, 16-bit weights, adapters, gradients, moments] in GB"
    ...
''',
    solution='''def qlora_gb(n_linear, n_other, n_adapter):
    "[4-bit weights, 16-bit weights, adapters, gradients, moments] in GB"
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    size = [n_linear * bits / 8, 2 * n_other, 4 * n_adapter, 4 * n_adapter, 8 * n_adapter]
    return [b / 1e9 for b in size]
''',
)


@prop(MEMORY, "a gigabyte is 10^9 bytes, and two of them hold a billion numbers in 16 bits")
def _(fn, rng: random.Random):
    billions = rng.randint(1, 70)
    compare(fn, [0.0, 2.0 * billions, 0.0, 0.0, 0.0], "GiB, of 2^30 bytes, are 7 % larger", n_linear=0, n_other=billions * 10**9, n_adapter=0)


@prop(MEMORY, "a weight of the base takes four bits and its share of the constants")
def _(fn, rng: random.Random):
    groups = rng.randint(10**4, 4 * 10**6)
    expected = groups * (64 * 256 // 2 + 256 + 4) / 1e9  # codes, 8-bit constants, one FP32 number
    compare(fn, [expected, 0.0, 0.0, 0.0, 0.0], "64·256 weights: 8,192 bytes of codes, 256 constants, 4 bytes", n_linear=groups * 64 * 256, n_other=0, n_adapter=0)


@prop(MEMORY, "a trained number takes 4 bytes, its gradient 4, its moments 8")
def _(fn, rng: random.Random):
    millions = rng.randint(1, 1000)
    expected = [0.0, 0.0, 0.004 * millions, 0.004 * millions, 0.008 * millions]
    compare(fn, expected, n_linear=0, n_other=0, n_adapter=millions * 10**6)


@prop(MEMORY, "the frozen base has neither gradients nor moments")
def _(fn, rng: random.Random):
    n = dict(n_linear=64 * 256 * rng.randint(10**4, 4 * 10**6), n_other=rng.randint(10**6, 10**9), n_adapter=rng.randint(10**6, 10**9))
    expected = [n["n_linear"] * 4.126953125 / 8e9, n["n_other"] / 5e8, n["n_adapter"] / 2.5e8, n["n_adapter"] / 2.5e8, n["n_adapter"] / 1.25e8]
    compare(fn, expected, **n)
