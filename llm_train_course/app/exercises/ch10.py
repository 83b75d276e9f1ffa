"Exercises of chapter 10, stability: clipping, a schedule, Adam after a spike, attention entropy, the Jacobian bound over depth."

from __future__ import annotations

import math
import random

from ..checker import exercise, prop
from .ch05 import near, quarters

# 10.1

CLIP = exercise(
    "10.1",
    title="Clipping by the joint norm",
    title_zh="按总范数裁剪",
    statement="""Write `clip(grads, max_norm)`. `grads` is a list of gradients, each a list of floats. Return the clipped gradients in the same
shape: all are multiplied by max_norm / (norm + 1e-6), where norm is the 2-norm of all numbers together, but by no more than 1.
An empty gradient stays empty.""",
    statement_zh="""写出 `clip(grads, max_norm)`。`grads` 是梯度的列表，每个梯度是浮点数列表。返回同样形状的裁剪后梯度：全部乘以
max_norm / (norm + 1e-6)，其中 norm 是所有数一起的 2-范数；但因子不超过 1。空梯度仍为空。""",
    stub='''def clip(grads, max_norm):
    "Gradients with joint 2-norm at most max_norm."
    ...
''',
    solution='''def clip(grads, max_norm):
    "Gradients with joint 2-norm at most max_norm."
    norm = sum(x * x for g in grads for x in g) ** 0.5
    factor = min(1.0, max_norm / (norm + 1e-6))  # never up: a small gradient is left alone
    return [[factor * x for x in g] for g in grads]
''',
)


def right_clip(grads: list, max_norm: float) -> list:
    factor = min(1.0, max_norm / (math.sqrt(math.fsum(x * x for g in grads for x in g)) + 1e-6))
    return [[factor * x for x in g] for g in grads]


def some_grads(rng: random.Random, scale: int = 1) -> list[list[float]]:
    return [[scale * x for x in quarters(rng, rng.randint(2, 4))] for _ in range(rng.randint(2, 4))]


@prop(CLIP, "the joint norm of a large gradient becomes max_norm, by one factor for all")
def _(fn, rng: random.Random):
    grads = some_grads(rng, 16)
    max_norm = rng.choice([0.5, 1.0, 2.0])
    near(fn, right_clip(grads, max_norm), "one norm over all tensors: the direction stays", grads=grads, max_norm=max_norm)


@prop(CLIP, "a gradient below max_norm is not changed")
def _(fn, rng: random.Random):
    grads = some_grads(rng)
    near(fn, grads, "clipping never makes a gradient longer", grads=grads, max_norm=64.0)


@prop(CLIP, "gradients of zeros and empty ones pass")
def _(fn, rng: random.Random):
    zeros = [[0.0] * rng.randint(1, 3), [], [0.0]]
    near(fn, zeros, grads=zeros, max_norm=rng.choice([0.5, 1.0]))
    grads = [*some_grads(rng, 16), []]
    near(fn, right_clip(grads, 1.0), grads=grads, max_norm=1.0)


@prop(CLIP, "the 1e-6 of torch is in the denominator")
def _(fn, rng: random.Random):
    grads = [[1e-6 * x for x in g] for g in some_grads(rng)]
    norm = math.sqrt(math.fsum(x * x for g in grads for x in g))
    near(fn, right_clip(grads, norm), f"the norm is {norm:.3g}, so the factor is not 1 but {norm / (norm + 1e-6):.3f}", rtol=1e-4, atol=1e-12, grads=grads, max_norm=norm)


# 10.2

SCHEDULE = exercise(
    "10.2",
    title="Warm-up and cosine",
    title_zh="先预热再余弦衰减",
    statement="""Write `factor(step, warmup_steps, total_steps, min_ratio)`: the learning rate over its peak at the optimizer step with
this number, counted from 0. During warm-up it rises in a straight line and is 0 at step 0; at step `warmup_steps` it is 1. From there
half a cosine leads to `min_ratio` at `total_steps`, and it stays there (if the two are the same step, it is 1 at that step).""",
    statement_zh="""写出 `factor(step, warmup_steps, total_steps, min_ratio)`：第 `step` 个优化器步（从 0 数起）的学习率与峰值之比。预热时从步 0 的 0
直线上升，到步 `warmup_steps` 时为 1；之后走半个余弦，到 `total_steps` 时为 `min_ratio`，此后不变（两者为同一步时，该步取 1）。""",
    stub='''def factor(step, warmup_steps, total_steps, min_ratio):
    "Learning rate over its peak."
    ...
''',
    solution='''def factor(step, warmup_steps, total_steps, min_ratio):
    "Learning rate over its peak."
    import math
    if step < warmup_steps:
        return step / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * done)) / 2
''',
)


def right_factor(step: int, warmup_steps: int, total_steps: int, min_ratio: float) -> float:
    if step < warmup_steps:
        return step / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * done)) / 2


def plan(rng: random.Random) -> dict:
    warmup = rng.randint(2, 20)
    return {"warmup_steps": warmup, "total_steps": warmup + rng.randint(5, 60), "min_ratio": rng.choice([0.0, 0.125, 0.25])}


@prop(SCHEDULE, "it is 0 at step 0 and rises in a straight line")
def _(fn, rng: random.Random):
    case = plan(rng)
    near(fn, 0.0, "the schedule of transformers wastes its first step", step=0, **case)
    step = rng.randint(1, case["warmup_steps"] - 1)
    near(fn, step / case["warmup_steps"], "min_ratio is no floor of the warm-up", step=step, **case)


@prop(SCHEDULE, "the peak is at step warmup_steps, and half-way down it is the mean of peak and end")
def _(fn, rng: random.Random):
    case = plan(rng)
    near(fn, 1.0, step=case["warmup_steps"], **case)
    case["total_steps"] = case["warmup_steps"] + 2 * rng.randint(2, 20)
    half = (case["warmup_steps"] + case["total_steps"]) // 2
    near(fn, (1 + case["min_ratio"]) / 2, "the cosine starts after the warm-up", step=half, **case)


@prop(SCHEDULE, "a quarter of the way it follows the cosine, not a line")
def _(fn, rng: random.Random):
    case = plan(rng)
    case["total_steps"] = case["warmup_steps"] + 4 * rng.randint(2, 12)
    step = case["warmup_steps"] + (case["total_steps"] - case["warmup_steps"]) // 4
    near(fn, right_factor(step, **case), step=step, **case)


@prop(SCHEDULE, "it ends at min_ratio and stays there")
def _(fn, rng: random.Random):
    case = plan(rng)
    for step in (case["total_steps"], case["total_steps"] + rng.randint(1, 50)):
        near(fn, case["min_ratio"], step=step, **case)


@prop(SCHEDULE, "no warm-up, and nothing but warm-up, work too")
def _(fn, rng: random.Random):
    n, ratio = rng.randint(3, 30), rng.choice([0.0, 0.25])
    near(fn, 1.0, step=0, warmup_steps=0, total_steps=n, min_ratio=ratio)
    near(fn, right_factor(n, n, n, ratio), step=n, warmup_steps=n, total_steps=n, min_ratio=ratio)


# 10.3

AFTER = exercise(
    "10.3",
    title="Adam after a spike",
    title_zh="尖峰之后的 Adam",
    statement="""A weight's gradient has been 1 for so long that Adam's moments are both 1 and their bias corrections too. Now one gradient is K;
afterwards all are 1 again. Write `step_length(K, j, beta1, beta2)`: the length of Adam's step over the learning rate, j steps after the spike
(j = 0 is the spike's own step). Epsilon is 0.""",
    statement_zh="""某个权重的梯度一直是 1，时间长到 Adam 的两个矩都为 1，偏差修正也为 1。现在有一个梯度是 K，之后又都是 1。写出
`step_length(K, j, beta1, beta2)`：尖峰之后第 j 步（j = 0 为尖峰当步）Adam 的步长与学习率之比。epsilon 为 0。""",
    stub='''def step_length(K, j, beta1, beta2):
    "Step over learning rate."
    ...
''',
    solution='''def step_length(K, j, beta1, beta2):
    "Step over learning rate."
    m = 1 + (1 - beta1) * (K - 1) * beta1**j        # what is left of the spike fades by beta1 a step,
    v = 1 + (1 - beta2) * (K * K - 1) * beta2**j    # and in the second moment by beta2
    return m / v**0.5
''',
)


def right_length(K: float, j: int, beta1: float, beta2: float) -> float:
    m, v = beta1 + (1 - beta1) * K, beta2 + (1 - beta2) * K * K
    for _ in range(j):
        m, v = beta1 * m + 1 - beta1, beta2 * v + 1 - beta2
    return m / math.sqrt(v)


def betas(rng: random.Random) -> dict:
    return {"beta1": rng.choice([0.5, 0.8, 0.9]), "beta2": rng.choice([0.95, 0.98, 0.99])}


@prop(AFTER, "without a spike (K = 1) every step is one learning rate")
def _(fn, rng: random.Random):
    near(fn, 1.0, K=1.0, j=rng.randint(0, 50), **betas(rng))


@prop(AFTER, "the spike's own step is (beta1 + (1 - beta1) K) / sqrt(beta2 + (1 - beta2) K²)")
def _(fn, rng: random.Random):
    case = {"K": float(rng.choice([4, 30, 1000])), "j": 0, **betas(rng)}
    near(fn, right_length(**case), "both moments are 1 before, and both take in K", **case)


@prop(AFTER, "afterwards the two moments forget at their own rates")
def _(fn, rng: random.Random):
    case = {"K": float(rng.choice([10, 100, 1000])), "j": rng.randint(1, 60), **betas(rng)}
    near(fn, right_length(**case), "run the recursions: m by beta1, v by beta2", **case)


@prop(AFTER, "a spike of the other sign turns the first steps round")
def _(fn, rng: random.Random):
    case = {"K": -float(rng.choice([100, 1000])), "j": rng.randint(0, 3), **betas(rng)}
    near(fn, right_length(**case), "K enters m with its sign and v squared", **case)


# 10.4

ENTROPY = exercise(
    "10.4",
    title="Attention entropy",
    title_zh="一个查询的注意力熵",
    statement="""Write `entropy_share(logits, visible)`: the entropy of one query's attention over the largest it could be. `logits` are the scores of all
keys, `visible` is 1 at the keys that the query may see and 0 elsewhere; whatever stands at the others does not count. The softmax is over the visible keys, the largest
possible entropy is the logarithm of their number. A query that sees one key has the share 1, one that sees none has 0. Logits may be in the thousands.""",
    statement_zh="""写出 `entropy_share(logits, visible)`：一个查询的注意力熵与其最大可能值之比。`logits` 是所有键的分数；`visible` 在查询可见的键处为 1，其余为 0，
不可见处无论是什么值都不算。softmax 只对可见的键取，最大可能的熵是可见键数的对数。只看得见一个键时为 1，一个都看不见时为 0。logits 可能上千。""",
    stub='''def entropy_share(logits, visible):
    "Entropy over its maximum, in [0, 1]."
    ...
''',
    solution='''def entropy_share(logits, visible):
    "Entropy over its maximum, in [0, 1]."
    import math
    z = [x for x, seen in zip(logits, visible) if seen]
    if len(z) < 2:
        return float(len(z))
    top = max(z)
    w = [math.exp(x - top) for x in z]  # the largest is 1: nothing overflows
    p = [x / sum(w) for x in w]
    return -sum(x * math.log(x) for x in p if x > 0) / math.log(len(z))
''',
)


def right_share(logits: list[float], visible: list[int]) -> float:
    z = [x for x, seen in zip(logits, visible) if seen]
    if len(z) < 2:
        return float(len(z))
    top = max(z)
    weights = [math.exp(x - top) for x in z]
    total = math.fsum(weights)
    return -math.fsum(w / total * math.log(w / total) for w in weights if w > 0) / math.log(len(z))


@prop(ENTROPY, "equal logits of the visible keys give 1")
def _(fn, rng: random.Random):
    n, level = rng.randint(2, 6), rng.randint(-8, 8) / 4
    near(fn, 1.0, "over the number of visible keys", logits=[level] * n, visible=[1] * n)


@prop(ENTROPY, "it is the softmax's entropy over ln n")
def _(fn, rng: random.Random):
    n = rng.randint(2, 6)
    logits = quarters(rng, n)
    near(fn, right_share(logits, [1] * n), rtol=1e-4, logits=logits, visible=[1] * n)


@prop(ENTROPY, "keys that are not visible do not count, on either side")
def _(fn, rng: random.Random):
    n = rng.randint(2, 4)
    seen, left, right = quarters(rng, n), rng.randint(1, 2), rng.randint(1, 2)
    junk = rng.choice([0.0, 7.5])
    logits, visible = [junk] * left + seen + [junk] * right, [0] * left + [1] * n + [0] * right
    near(fn, right_share(seen, [1] * n), "neither in the softmax nor in the number of keys", rtol=1e-4, logits=logits, visible=visible)


@prop(ENTROPY, "one visible key gives 1, none gives 0")
def _(fn, rng: random.Random):
    n = rng.randint(2, 4)
    at = rng.randrange(n)
    near(fn, 1.0, "no choice: ln 1 would be in the denominator", logits=quarters(rng, n), visible=[int(k == at) for k in range(n)])
    near(fn, 0.0, logits=quarters(rng, n), visible=[0] * n)


@prop(ENTROPY, "logits in the thousands neither overflow nor end in log(0)")
def _(fn, rng: random.Random):
    n = rng.randint(2, 5)
    logits = [1000.0 * x for x in rng.sample(range(-4, 5), n)]
    near(fn, right_share(logits, [1] * n), "subtract the largest first; 0 ln 0 is 0", atol=1e-6, logits=logits, visible=[1] * n)


# 10.5

BOUND = exercise(
    "10.5",
    title="The Jacobian bound over depth",
    title_zh="随深度累积的雅可比上界",
    statement="""A Pre-LN stack of n sub-layers, x + c f(N(x)). The embedding has standard deviation sigma0. Each branch f has spectral norm at most C, and adds variance a (before the
factor c) to the stream. Write `bound(n, sigma0, C, a, c)`: the product over the sub-layers of 1 + c C / sigma, where sigma is the standard deviation of the stream that this sub-layer reads;
variances add up.""",
    statement_zh="""n 个子层的 Pre-LN 堆叠，x + c f(N(x))。嵌入的标准差为 sigma0。每个分支 f 的谱范数不超过 C，给残差流增加方差 a（未乘因子 c 时）。写出
`bound(n, sigma0, C, a, c)`：各子层的 1 + c C / sigma 之积，sigma 是该子层读到的残差流的标准差；方差相加。""",
    stub='''def bound(n, sigma0, C, a, c):
    "Upper bound of the stack's Jacobian."
    ...
''',
    solution='''def bound(n, sigma0, C, a, c):
    "Upper bound of the stack's Jacobian."
    product = 1.0
    for l in range(n):
        sigma = (sigma0**2 + l * c**2 * a) ** 0.5  # what the l sub-layers below have added
        product *= 1 + c * C / sigma
    return product
''',
)


def right_bound(n: int, sigma0: float, C: float, a: float, c: float) -> float:
    return math.prod(1 + c * C / math.sqrt(sigma0 * sigma0 + k * c * c * a) for k in range(n))


def stack(rng: random.Random) -> dict:
    return {"sigma0": rng.choice([0.0625, 0.25, 1.0]), "C": rng.choice([0.125, 0.5, 1.5]), "a": rng.choice([0.25, 0.5, 1.0])}


@prop(BOUND, "one sub-layer reads the embedding: 1 + c C / sigma0")
def _(fn, rng: random.Random):
    case = stack(rng)
    c = rng.choice([0.5, 2.0, 4.0])
    near(fn, 1 + c * case["C"] / case["sigma0"], "nothing has been added yet; the branch's factor is in the numerator", n=1, c=c, **case)


@prop(BOUND, "no sub-layers, or branches of zero, give 1")
def _(fn, rng: random.Random):
    case = stack(rng)
    near(fn, 1.0, n=0, c=rng.choice([1.0, 4.0]), **case)
    near(fn, 1.0, n=rng.randint(2, 6), c=0.0, **case)


@prop(BOUND, "variances add, not standard deviations, so later factors are smaller")
def _(fn, rng: random.Random):
    case = {"n": rng.randint(2, 8), "c": 1.0, **stack(rng)}
    near(fn, right_bound(**case), rtol=1e-4, **case)


@prop(BOUND, "the factor c enlarges the branch and, squared, what it adds to the stream")
def _(fn, rng: random.Random):
    case = {"n": rng.randint(2, 8), "c": rng.choice([0.25, 2.0, 4.0]), **stack(rng)}
    near(fn, right_bound(**case), rtol=1e-4, **case)
