"""Exercises of chapter 3, LoRA: forward, gradients, parameter counts, merging, rank by energy.

Matrices are lists of rows. Their entries are quarters and the scales are sums of powers of two, so that an answer is
exact in float32 too: a reader may use torch with its default dtype, or plain Python.
"""

from __future__ import annotations

import math
import random

from ..checker import Mismatch, call, compare, exercise, prop

Matrix = list[list[float]]


def quarters(rng: random.Random, rows: int, columns: int, never_zero: bool = False) -> Matrix:
    "A matrix of quarters between -2 and 2."
    values = [k / 4 for k in range(-8, 9) if k or not never_zero]
    return [[rng.choice(values) for _ in range(columns)] for _ in range(rows)]


def product(a: Matrix, b: Matrix) -> Matrix:
    return [[math.fsum(x * y for x, y in zip(row, column)) for column in zip(*b)] for row in a]


def transposed(a: Matrix) -> Matrix:
    return [list(column) for column in zip(*a)]


def added(a: Matrix, b: Matrix, scale: float = 1.0) -> Matrix:
    return [[x + scale * y for x, y in zip(p, q)] for p, q in zip(a, b)]


def adapter(rng: random.Random, r: int | None = None) -> dict:
    "W (out, in) that is not square, A (r, in), B (out, r), and an alpha that is neither r nor 1."
    r = rng.choice([2, 4]) if r is None else r
    out, in_ = rng.sample(range(2, 6), 2)
    alpha = float(rng.choice([a for a in (2, 3, 5, 6, 8, 12, 16) if a != r]))
    return {"W": quarters(rng, out, in_), "A": quarters(rng, r, in_, True), "B": quarters(rng, out, r, True), "alpha": alpha}


# 03.1

FORWARD = exercise(
    "03.1",
    title="LoRA's forward pass",
    title_zh="LoRA 的前向计算",
    statement="""Write `lora_forward(x, W, bias, A, B, alpha)`: the output of a linear layer with an adapter. Rows of `x` (N, in)
are inputs. `W` is (out, in) as in `nn.Linear`, `bias` has `out` numbers or is None, `A` is (r, in), `B` is (out, r). The
layer need not be square, and r is read from the shape of `A`. Matrices are lists of rows; so is the answer, or a tensor.""",
    statement_zh="""写出 `lora_forward(x, W, bias, A, B, alpha)`：带适配器的线性层的输出。`x`(N, in)的每一行是一个输入；`W` 按 `nn.Linear`
的约定为 (out, in)；`bias` 有 out 个数，或为 None；`A` 为 (r, in)，`B` 为 (out, r)。层不一定是方阵，r 由 `A` 的形状得到。矩阵以行的列表给出；
答案也是行的列表，或张量。""",
    stub='''def lora_forward(x, W, bias, A, B, alpha):
    "Output (N, out) of a linear layer with a LoRA adapter."
    ...
''',
    solution='''def lora_forward(x, W, bias, A, B, alpha):
    "Output (N, out) of a linear layer with a LoRA adapter."
    import torch
    x, W, A, B = (torch.tensor(m) for m in (x, W, A, B))
    base = x @ W.T + (0 if bias is None else torch.tensor(bias))
    return base + alpha / len(A) * (x @ A.T @ B.T)  # two thin products, never B @ A
''',
)


def inputs_of(rng: random.Random, W: Matrix) -> dict:
    bias = None if rng.random() < 0.3 else quarters(rng, 1, len(W))[0]
    return {"x": quarters(rng, rng.randint(1, 3), len(W[0])), "bias": bias}


def plain_layer(x: Matrix, W: Matrix, bias: list[float] | None) -> Matrix:
    return [[v + b for v, b in zip(row, bias or [0.0] * len(W))] for row in product(x, transposed(W))]


def in_order(x, W, bias, A, B, alpha) -> dict:
    return {"x": x, "W": W, "bias": bias, "A": A, "B": B, "alpha": alpha}


@prop(FORWARD, "with B = 0 it is the layer alone, bias included")
def _(fn, rng: random.Random):
    made = adapter(rng)
    made.update(inputs_of(rng, made["W"]), B=[[0.0] * len(made["A"]) for _ in made["W"]])
    expected = plain_layer(made["x"], made["W"], made["bias"])
    compare(fn, expected, "nn.Linear computes x Wᵀ + bias: W has one row for each output", **in_order(**made))


@prop(FORWARD, "it equals one layer with the weight W + (alpha/r)·BA")
def _(fn, rng: random.Random):
    made = adapter(rng)
    made.update(inputs_of(rng, made["W"]))
    r = len(made["A"])
    dense = added(made["W"], product(made["B"], made["A"]), made["alpha"] / r)
    why = f"alpha is {made['alpha']:g} and r is {r}: the update is scaled by alpha/r, the bias is not"
    compare(fn, plain_layer(made["x"], dense, made["bias"]), why, **in_order(**made))


@prop(FORWARD, "twice the alpha is twice the update, and leaves the layer alone")
def _(fn, rng: random.Random):
    made = adapter(rng)
    made.update(inputs_of(rng, made["W"]))
    once, base = call(fn, **in_order(**made)), plain_layer(made["x"], made["W"], made["bias"])
    expected = added(added(once, once), base, -1.0)
    compare(fn, expected, "2·(output at alpha) − (output of the layer)", **in_order(**{**made, "alpha": 2 * made["alpha"]}))


@prop(FORWARD, "writing every row of A and column of B twice changes nothing at the same alpha")
def _(fn, rng: random.Random):
    made = adapter(rng, r=2)
    made.update(inputs_of(rng, made["W"]))
    dense = added(made["W"], product(made["B"], made["A"]), made["alpha"] / 2)
    made.update(A=made["A"] * 2, B=[row * 2 for row in made["B"]])
    compare(fn, plain_layer(made["x"], dense, made["bias"]), "BA doubles, and 1/r halves it", **in_order(**made))


# 03.2

GRADIENTS = exercise(
    "03.2",
    title="The gradients of A and B",
    title_zh="A 与 B 的梯度",
    statement="""Write `lora_gradients(x, grad_out, A, B, alpha)`: the pair (gradient of `A`, gradient of `B`), by hand. `x` (N, in)
are the inputs of the layer, `grad_out` (N, out) is the loss's gradient at its outputs. `A` is (r, in), `B` is (out, r).
The loss is whatever it is: a mean over the batch, if there was one, is in `grad_out` already.""",
    statement_zh="""写出 `lora_gradients(x, grad_out, A, B, alpha)`：手工推出的 (`A` 的梯度, `B` 的梯度)。`x`(N, in)是层的输入，`grad_out`(N, out)是
损失对层输出的梯度；`A` 为 (r, in)，`B` 为 (out, r)。损失本身是什么无关紧要：如果对批量取过平均，已经包含在 `grad_out` 里。""",
    stub='''def lora_gradients(x, grad_out, A, B, alpha):
    "(gradient of A (r, in), gradient of B (out, r))"
    ...
''',
    solution='''def lora_gradients(x, grad_out, A, B, alpha):
    "(gradient of A (r, in), gradient of B (out, r))"
    import torch
    x, grad_out, A, B = (torch.tensor(m) for m in (x, grad_out, A, B))
    scaling = alpha / len(A)
    return scaling * (grad_out @ B).T @ x, scaling * grad_out.T @ (x @ A.T)
''',
)


def backward_case(rng: random.Random) -> dict:
    made = adapter(rng)
    n = rng.randint(2, 3)
    W = made.pop("W")
    return {"x": quarters(rng, n, len(W[0]), True), "grad_out": quarters(rng, n, len(W), True), **made}


def loss(x: Matrix, grad_out: Matrix, A: Matrix, B: Matrix, alpha: float) -> float:
    "sum(grad_out * update): it has this gradient at the outputs, and is linear in A, and in B."
    update = product(product(x, transposed(A)), transposed(B))
    return alpha / len(A) * math.fsum(g * u for p, q in zip(grad_out, update) for g, u in zip(p, q))


def raised(m: Matrix, i: int, j: int) -> Matrix:
    return [[v + (p == i and q == j) for q, v in enumerate(row)] for p, row in enumerate(m)]


def differences(case: dict, name: str) -> Matrix:
    "The gradient of one of the matrices: the loss is linear in it, so a difference at step 1 is exact."
    m, at = case[name], loss(**case)
    return [[loss(**{**case, name: raised(m, i, j)}) - at for j in range(len(m[0]))] for i in range(len(m))]


@prop(GRADIENTS, "a gradient has the shape of its matrix")
def _(fn, rng: random.Random):
    case = backward_case(rng)
    returned = call(fn, **case)
    shapes = lambda ms: [[len(m), len(m[0])] for m in ms]
    try:
        found = shapes(returned) if len(returned) == 2 else None
    except (TypeError, IndexError):
        found = None
    if found != shapes([case["A"], case["B"]]):
        text = f"lora_gradients({', '.join(f'{k}={v}' for k, v in case.items())})"
        raise Mismatch(text, f"shapes {found}" if found else repr(returned)[:200], f"(gradient of A, gradient of B), shapes {shapes([case['A'], case['B']])}")


@prop(GRADIENTS, "with B = 0 the gradient of A is zero, that of B is not")
def _(fn, rng: random.Random):
    case = backward_case(rng)
    case["B"] = [[0.0] * len(row) for row in case["B"]]
    zero = [[0.0] * len(row) for row in case["A"]]
    why = "this is where training starts: the first step moves B only, and its step is scaled by alpha/r"
    compare(fn, [zero, differences(case, "B")], why, **case)


@prop(GRADIENTS, "both agree with differences of the loss")
def _(fn, rng: random.Random):
    case = backward_case(rng)
    compare(fn, [differences(case, "A"), differences(case, "B")], "the scale alpha/r stands in front of both", **case)


@prop(GRADIENTS, "the gradient of a batch is the sum over its rows")
def _(fn, rng: random.Random):
    case = backward_case(rng)
    parts = [call(fn, **{**case, "x": [x], "grad_out": [g]}) for x, g in zip(case["x"], case["grad_out"])]
    expected = [added(parts[0][k], parts[1][k]) if len(parts) == 2 else added(added(parts[0][k], parts[1][k]), parts[2][k]) for k in (0, 1)]
    compare(fn, expected, "a mean over the batch is part of the loss, so of grad_out", **case)


# 03.3

COUNT = exercise(
    "03.3",
    title="How many parameters LoRA trains",
    title_zh="LoRA 训练多少参数",
    statement="""Write `lora_parameters(linears, r, targets)`: the number of trained parameters. `linears` maps the path of each linear
layer, such as `model.layers.0.self_attn.q_proj`, to its (out, in). `targets` is a list of names, each of which stands for
every layer whose path ends with it as a whole component, or `"all-linear"`: every linear layer except the output head,
`lm_head`.""",
    statement_zh="""写出 `lora_parameters(linears, r, targets)`：可训练的参数量。`linears` 把每个线性层的路径（如 `model.layers.0.self_attn.q_proj`）
映射到 (out, in)。`targets` 是名字的列表，每个名字代表路径末尾的完整一段与它相同的所有层；或者是 `"all-linear"`：除输出头 `lm_head` 外的全部
线性层。""",
    stub='''def lora_parameters(linears, r, targets):
    "Trained parameters of LoRA with rank r on these layers."
    ...
''',
    solution='''def lora_parameters(linears, r, targets):
    "Trained parameters of LoRA with rank r on these layers."
    total = 0
    for path, (out, in_) in linears.items():
        name = path.split(".")[-1]
        if name != "lm_head" if targets == "all-linear" else name in targets:
            total += r * (out + in_)  # A is (r, in), B is (out, r)
    return total
''',
)


def small_decoder(rng: random.Random) -> dict[str, list[int]]:
    "The linear layers of a decoder with grouped queries, an MLP that is not square, and an output head."
    d, m, layers = 8 * rng.randint(2, 6), 8 * rng.randint(7, 20), rng.randint(2, 3)
    kv = d // rng.choice([2, 4])
    block = {"self_attn.q_proj": [d, d], "self_attn.k_proj": [kv, d], "self_attn.v_proj": [kv, d], "mlp.up_proj": [m, d], "mlp.down_proj": [d, m]}
    linears = {f"model.layers.{k}.{name}": list(size) for k in range(layers) for name, size in block.items()}
    return {**linears, "lm_head": [rng.randint(100, 999), d]}


def by_hand(linears: dict[str, list[int]], r: int, names: set[str]) -> int:
    return sum(r * in_ + out * r for path, (out, in_) in linears.items() if path.rpartition(".")[2] in names)


@prop(COUNT, "a matrix (out, in) gets r·in numbers in A and out·r in B, square or not")
def _(fn, rng: random.Random):
    out, in_, r = rng.randint(4, 4096), rng.randint(4, 4096), rng.choice([1, 4, 8, 16])
    compare(fn, r * in_ + out * r, linears={"layers.0.q_proj": [out, in_]}, r=r, targets=["q_proj"])


@prop(COUNT, "a target stands for its layer in every block, and for no other")
def _(fn, rng: random.Random):
    linears, r = small_decoder(rng), rng.choice([2, 8, 16])
    names = rng.sample(["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], rng.randint(1, 3))
    compare(fn, by_hand(linears, r, set(names)), linears=linears, r=r, targets=names)


@prop(COUNT, "v_proj is not qkv_proj: a target is a whole component of the path")
def _(fn, rng: random.Random):
    d, r = 8 * rng.randint(2, 20), rng.choice([2, 8, 16])
    linears = {"encoder.0.qkv_proj": [3 * d, d], "decoder.0.v_proj": [d // 2, d]}
    compare(fn, r * (d + d // 2), "peft compares 'path == target or path ends with .target'", linears=linears, r=r, targets=["v_proj"])


@prop(COUNT, "all-linear is every layer but the output head")
def _(fn, rng: random.Random):
    linears, r = small_decoder(rng), rng.choice([2, 8, 16])
    names = {path.rpartition(".")[2] for path in linears} - {"lm_head"}
    compare(fn, by_hand(linears, r, names), linears=linears, r=r, targets="all-linear")


# 03.4

MERGE = exercise(
    "03.4",
    title="Merging an adapter into the weight",
    title_zh="把适配器合并进权重",
    statement="""Write `merged_weight(W, A, B, alpha, use_rslora=False, fan_in_fan_out=False)`: the weight of the plain layer that
computes the same as layer and adapter together. `W` is (out, in), `A` is (r, in), `B` is (out, r). With `use_rslora` the
scale divides by the square root of r instead of r. With `fan_in_fan_out` the weight is stored as (in, out), as in GPT-2's
`Conv1D`, and so is the answer.""",
    statement_zh="""写出 `merged_weight(W, A, B, alpha, use_rslora=False, fan_in_fan_out=False)`：与“层加适配器”计算结果相同的普通层的权重。
`W` 为 (out, in)，`A` 为 (r, in)，`B` 为 (out, r)。`use_rslora` 为真时，缩放除以 r 的平方根而不是 r。`fan_in_fan_out` 为真时，权重按 (in, out)
存放（如 GPT-2 的 `Conv1D`），答案也按这种方式存放。""",
    stub='''def merged_weight(W, A, B, alpha, use_rslora=False, fan_in_fan_out=False):
    "Weight of the plain layer that equals W with its adapter."
    ...
''',
    solution='''def merged_weight(W, A, B, alpha, use_rslora=False, fan_in_fan_out=False):
    "Weight of the plain layer that equals W with its adapter."
    import torch
    W, A, B = (torch.tensor(m) for m in (W, A, B))
    r = len(A)
    delta = alpha / (r ** 0.5 if use_rslora else r) * (B @ A)
    return W + (delta.T if fan_in_fan_out else delta)
''',
)


@prop(MERGE, "inputs see the same as through the layer and its adapter")
def _(fn, rng: random.Random):
    made = adapter(rng)
    merged = call(fn, **made)
    x = quarters(rng, 2, len(made["W"][0]))
    thin = product(product(x, transposed(made["A"])), transposed(made["B"]))
    expected = added(product(x, transposed(made["W"])), thin, made["alpha"] / len(made["A"]))
    try:
        returned = product(x, transposed(merged))
        fits = len(merged[0]) == len(x[0]) and all(math.isclose(a, b, abs_tol=1e-9) for p, q in zip(returned, expected, strict=True) for a, b in zip(p, q, strict=True))
    except (TypeError, IndexError, ValueError):
        returned, fits = None, False
    if not fits:
        text = f"merged_weight({', '.join(f'{k}={v}' for k, v in made.items())})"
        raise Mismatch(text, repr(merged)[:300], f"a weight that maps the rows of {x} to {expected}")


@prop(MERGE, "subtracting what was added gives W back")
def _(fn, rng: random.Random):
    made = adapter(rng)
    merged = call(fn, **made)
    compare(fn, made["W"], "unmerging is merging with −alpha; exact here, where sums do not round", **{**made, "W": merged, "alpha": -made["alpha"]})


@prop(MERGE, "two adapters can be merged one after the other, in any order")
def _(fn, rng: random.Random):
    made = adapter(rng)
    second = {"A": quarters(rng, 4, len(made["W"][0]), True), "B": quarters(rng, len(made["W"]), 4, True), "alpha": 3.0}
    swapped = call(fn, W=call(fn, W=made["W"], **second), A=made["A"], B=made["B"], alpha=made["alpha"])
    compare(fn, swapped, "the value for the other order", W=call(fn, **made), **second)


@prop(MERGE, "rsLoRA divides alpha by the square root of r")
def _(fn, rng: random.Random):
    made = adapter(rng, r=4)
    expected = added(made["W"], product(made["B"], made["A"]), made["alpha"] / 2)
    compare(fn, expected, "r is 4, so the scale is alpha/2", **made, use_rslora=True)


@prop(MERGE, "a weight stored as (in, out) gets the transposed update")
def _(fn, rng: random.Random):
    made = adapter(rng)
    expected = transposed(added(made["W"], product(made["B"], made["A"]), made["alpha"] / len(made["A"])))
    made["W"] = transposed(made["W"])
    compare(fn, expected, **made, fan_in_fan_out=True)


# 03.5

RANK = exercise(
    "03.5",
    title="The rank that holds an update's energy",
    title_zh="装得下更新能量的秩",
    statement="""Write `energy_rank(M, share)`: the smallest k such that the best approximation of `M` by a matrix of rank k
keeps at least `share` of its energy, the sum of its squared entries. By Eckart and Young that approximation keeps the k
largest singular values, and the energy is the sum of their squares. For the zero matrix it is 0. `M` is a list
of rows; compute in float64.""",
    statement_zh="""写出 `energy_rank(M, share)`：最小的 k，使 `M` 的最佳秩 k 近似至少保留 `share` 比例的能量（所有元素的平方和）。按
Eckart–Young 定理，最佳近似保留最大的 k 个奇异值，能量就是它们的平方和。零矩阵的结果为 0。`M` 是行的列表；请用 float64 计算。""",
    stub='''def energy_rank(M, share):
    "Smallest rank that keeps this share of the energy of M."
    ...
''',
    solution='''def energy_rank(M, share):
    "Smallest rank that keeps this share of the energy of M."
    import torch
    energy = torch.linalg.svdvals(torch.tensor(M, dtype=torch.float64)) ** 2
    if not energy.sum():
        return 0
    return int((energy.cumsum(0) < share * energy.sum()).sum()) + 1
''',
)


def spectrum(rng: random.Random, most: int = 5) -> tuple[list[float], float, int]:
    "Singular values, a share no cumulated one is near, and the rank at which that share is reached."
    while True:
        values = sorted((rng.randint(1, 40) / 4 for _ in range(rng.randint(2, most))), reverse=True)
        share = rng.choice([0.5, 0.8, 0.9, 0.99])
        kept = [math.fsum(v * v for v in values[:k]) / math.fsum(v * v for v in values) for k in range(len(values) + 1)]
        if min(abs(k - share) for k in kept) > 1e-3:
            return values, share, next(k for k, v in enumerate(kept) if v > share)


def rotated(values: list[float], rng: random.Random, rows: int, columns: int) -> Matrix:
    "A matrix with these singular values: a diagonal between two reflections."
    m = [[values[i] if i == j and i < len(values) else 0.0 for j in range(columns)] for i in range(rows)]

    def reflected(m: Matrix) -> Matrix:  # (1 - 2 v vᵀ / v·v) m
        v = [float(rng.choice([-2, -1, 1, 2])) for _ in m]
        dots = [2 * math.fsum(a * row[j] for a, row in zip(v, m)) / math.fsum(a * a for a in v) for j in range(len(m[0]))]
        return [[x - a * d for x, d in zip(row, dots)] for a, row in zip(v, m)]

    return transposed(reflected(transposed(reflected(m))))


@prop(RANK, "on a diagonal matrix it counts the largest entries whose squares reach the share")
def _(fn, rng: random.Random):
    values, share, k = spectrum(rng)
    shuffled = rng.sample(values, len(values))
    M = [[v * rng.choice([-1, 1]) if i == j else 0.0 for j in range(len(values))] for i, v in enumerate(shuffled)]
    compare(fn, k, f"squared and sorted, the singular values are {[v * v for v in values]}", M=M, share=share)


@prop(RANK, "rotating rows and columns changes nothing, and neither does transposing")
def _(fn, rng: random.Random):
    values, share, k = spectrum(rng, most=3)
    M = rotated(values, rng, len(values) + rng.randint(0, 1), len(values) + rng.randint(1, 2))
    for m in (M, transposed(M)):
        compare(fn, k, f"its singular values are {values}", M=m, share=share)


@prop(RANK, "scaling the matrix changes nothing")
def _(fn, rng: random.Random):
    values, share, k = spectrum(rng, most=3)
    scale = rng.choice([1e-6, 1e-3, 1e4])
    M = [[scale * x for x in row] for row in rotated(values, rng, len(values), len(values) + 1)]
    compare(fn, k, "a threshold must be relative to this matrix's own energy", M=M, share=share)


@prop(RANK, "the product BA never exceeds r, whatever the share")
def _(fn, rng: random.Random):
    made = adapter(rng, r=1)
    M = product(made["B"], made["A"])
    compare(fn, 1, "one column times one row has rank 1", M=M, share=rng.choice([0.5, 0.9, 0.99]))


@prop(RANK, "for the zero matrix it is 0")
def _(fn, rng: random.Random):
    compare(fn, 0, "before the first step the update is zero", M=[[0.0] * rng.randint(1, 4)] * rng.randint(1, 3), share=0.9)
