"Exercises of chapter 9, batch and activation memory: the normaliser on several ranks, kept storages, a layer's bytes, segments, recomputed FLOPs."

from __future__ import annotations

import random

from ..checker import compare, exercise, prop
from .ch05 import near

# 09.1

FACTOR = exercise(
    "09.1",
    title="The factor of a micro-batch",
    title_zh="每个微批的系数",
    statement="""Write `factors(counts)`. `counts[r][k]` is the number of target tokens in micro-batch k of rank r; ranks may have different
numbers of micro-batches. The model returns the *mean* loss over the targets of a micro-batch (0 if it has none), and gradients are
averaged over the ranks at the end, as DDP does. Return, in the same shape, what to multiply each mean by before its backward pass,
so that the result is the gradient of the mean loss over all targets of all ranks. Without any target all factors are 0.""",
    statement_zh="""写出 `factors(counts)`。`counts[r][k]` 是第 r 个进程第 k 个微批的目标 token 数；各进程的微批数可以不同。模型返回微批内目标的**平均**损失
（没有目标时为 0），最后像 DDP 那样对各进程的梯度取平均。返回同样形状的系数：每个微批的平均损失在反向之前应乘以多少，才能得到所有进程全部目标的平均
损失的梯度。一个目标都没有时，系数全为 0。""",
    stub='''def factors(counts):
    "What the mean loss of each micro-batch is multiplied by: the shape of counts."
    ...
''',
    solution='''def factors(counts):
    "What the mean loss of each micro-batch is multiplied by: the shape of counts."
    total = sum(map(sum, counts))
    world = len(counts)  # DDP divides by it
    return [[c * world / total if total else 0.0 for c in row] for row in counts]
''',
)


def right_factors(counts: list) -> list:
    total = sum(sum(row) for row in counts)
    return [[len(counts) * c / total if total else 0.0 for c in row] for row in counts]


@prop(FACTOR, "on one rank with equal counts each of K micro-batches gets 1/K")
def _(fn, rng: random.Random):
    K, c = rng.randint(2, 6), rng.randint(1, 50)
    near(fn, [[1 / K] * K], "the usual division by the number of accumulation steps", counts=[[c] * K])


@prop(FACTOR, "a micro-batch weighs as much as it has targets")
def _(fn, rng: random.Random):
    counts = [[rng.randint(1, 9), rng.randint(20, 60), *[rng.randint(1, 60) for _ in range(rng.randint(0, 3))]]]
    near(fn, right_factors(counts), "mean times count is the sum; sums are divided by the count of all", counts=counts)


@prop(FACTOR, "the mean that DDP takes over the ranks is undone")
def _(fn, rng: random.Random):
    world = rng.randint(2, 4)
    counts = [[rng.randint(1, 60) for _ in range(rng.randint(1, 4))] for _ in range(world)]
    near(fn, right_factors(counts), f"gradients are divided by {world} afterwards, however many micro-batches a rank has", counts=counts)


@prop(FACTOR, "without targets a factor is 0, also if there are none at all")
def _(fn, rng: random.Random):
    counts = [[rng.randint(1, 60), 0], [0, rng.randint(1, 60)]]
    near(fn, right_factors(counts), "a micro-batch of padding only", counts=counts)
    near(fn, [[0.0, 0.0], [0.0]], "0, not 0/0", counts=[[0, 0], [0]])


# 09.2

KEPT = exercise(
    "09.2",
    title="Bytes that a graph keeps",
    title_zh="计算图保留的字节数",
    statement="""Write `kept_bytes(saved, weights)`. `saved` lists what saved-tensor hooks have seen: each entry is [storage, storage_bytes,
tensor_bytes, alive], where `storage` is the number of the storage that the tensor is a view of, `storage_bytes` its size,
`tensor_bytes` the size of the view, and `alive` says whether the node that saved it is still in the graph. `weights` lists the
storages of parameters. Return the bytes of activations that the graph keeps.""",
    statement_zh="""写出 `kept_bytes(saved, weights)`。`saved` 列出保存张量的钩子所看到的一切：每项为 [storage, storage_bytes, tensor_bytes, alive]，
其中 `storage` 是张量所属存储的编号，`storage_bytes` 是该存储的大小，`tensor_bytes` 是视图的大小，`alive` 表示保存它的节点是否还在图中。
`weights` 列出参数所在的存储。返回计算图为激活值保留的字节数。""",
    stub='''def kept_bytes(saved, weights):
    "Bytes of activations."
    ...
''',
    solution='''def kept_bytes(saved, weights):
    "Bytes of activations."
    sizes = {storage: size for storage, size, _, alive in saved if alive and storage not in weights}
    return sum(sizes.values())
''',
)


def storages(rng: random.Random, n: int) -> list[list]:
    "n different storages, each seen once through a tensor that covers it."
    return [[k, size, size, True] for k, size in zip(rng.sample(range(100), n), [4 * k for k in rng.sample(range(1, 500), n)])]


@prop(KEPT, "different storages add up")
def _(fn, rng: random.Random):
    saved = storages(rng, rng.randint(0, 5))
    compare(fn, sum(s[1] for s in saved), saved=saved, weights=[])


@prop(KEPT, "a storage that was saved by several operations counts once")
def _(fn, rng: random.Random):
    saved = storages(rng, 3)
    twice = saved + [list(rng.choice(saved)) for _ in range(rng.randint(1, 4))]
    rng.shuffle(twice)
    compare(fn, sum(s[1] for s in saved), "the input of queries, keys and values is one tensor", saved=twice, weights=[])


@prop(KEPT, "two storages of the same size are two")
def _(fn, rng: random.Random):
    size = 4 * rng.randint(1, 500)
    compare(fn, 2 * size, "sizes say nothing about which memory it is", saved=[[3, size, size, True], [8, size, size, True]], weights=[])


@prop(KEPT, "a view keeps the whole storage alive")
def _(fn, rng: random.Random):
    saved = [[k, size, rng.randint(1, size // 4) * 2, True] for k, size, _, _ in storages(rng, 3)]
    compare(fn, sum(s[1] for s in saved), "not only the part that is looked at", saved=saved, weights=[])


@prop(KEPT, "weights are there anyway")
def _(fn, rng: random.Random):
    saved = storages(rng, 5)
    weights = sorted(s[0] for s in rng.sample(saved, 2)) + [1000]
    compare(fn, sum(s[1] for s in saved if s[0] not in weights), "a linear layer saves its weight as well as its input", saved=saved, weights=weights)


@prop(KEPT, "what no node of the graph holds is not kept, unless another one does")
def _(fn, rng: random.Random):
    saved = storages(rng, 4)
    for s in saved[:2]:
        s[3] = False
    again = [*saved[0][:3], True]
    compare(fn, sum(s[1] for s in saved[2:]) + again[1], "the first storage was saved again by a node that lives", saved=[*saved, again] if rng.random() < 0.5 else [again, *saved], weights=[])


# 09.3

LAYER = exercise(
    "09.3",
    title="s·b·h·(34 + 5·a·s/h)",
    title_zh="s·b·h·(34 + 5·a·s/h)",
    statement="""Write `layer_bytes(s, b, h, a, recompute)`: the bytes of activations that a GPT layer in 16 bits keeps for s tokens, b rows, width
h and a heads, by the formula of arXiv:2205.05198, as an integer. `recompute` is "none", "selective" (the core of attention, between Q, K, V and its
output, is run again) or "full" (only the layer's input is kept).""",
    statement_zh="""写出 `layer_bytes(s, b, h, a, recompute)`：按 arXiv:2205.05198 的公式，16 位的 GPT 层在 s 个 token、b 行、宽度 h、a 个头时保留的激活字节数
（整数）。`recompute` 为 "none"、"selective"（重算注意力核心，即从 Q、K、V 到其输出）或 "full"（只保留层的输入）。""",
    stub='''def layer_bytes(s, b, h, a, recompute):
    "Bytes of activations, an integer."
    ...
''',
    solution='''def layer_bytes(s, b, h, a, recompute):
    "Bytes of activations, an integer."
    if recompute == "full":
        return 2 * s * b * h
    return 34 * s * b * h + (5 * a * s * s * b if recompute == "none" else 0)
''',
)


def layer_case(rng: random.Random) -> dict:
    a = rng.choice([2, 3, 4, 8])
    return {"s": rng.randint(8, 300), "b": rng.randint(1, 5), "h": a * rng.randint(4, 40), "a": a}


@prop(LAYER, "nothing recomputed: 34·s·b·h and 5·a·s²·b")
def _(fn, rng: random.Random):
    c = layer_case(rng)
    compare(fn, 34 * c["s"] * c["b"] * c["h"] + 5 * c["a"] * c["s"] ** 2 * c["b"], "the second term is quadratic in s and does not depend on h", **c, recompute="none")


@prop(LAYER, "twice the rows keep twice the bytes, twice the tokens more than that")
def _(fn, rng: random.Random):
    c = layer_case(rng)
    base = 34 * c["s"] * c["b"] * c["h"] + 5 * c["a"] * c["s"] ** 2 * c["b"]
    compare(fn, 2 * base, "linear in b", **{**c, "b": 2 * c["b"]}, recompute="none")
    compare(fn, 2 * base + 10 * c["a"] * c["s"] ** 2 * c["b"], "the attention matrices grow fourfold", **{**c, "s": 2 * c["s"]}, recompute="none")


@prop(LAYER, "selective recomputation leaves 34·s·b·h")
def _(fn, rng: random.Random):
    c = layer_case(rng)
    compare(fn, 34 * c["s"] * c["b"] * c["h"], "Q, K and V stay: the core is run again from them", **c, recompute="selective")


@prop(LAYER, "full recomputation leaves the input, two bytes a number")
def _(fn, rng: random.Random):
    c = layer_case(rng)
    compare(fn, 2 * c["s"] * c["b"] * c["h"], "16 bits are two bytes", **c, recompute="full")


# 09.4

PEAK = exercise(
    "09.4",
    title="The peak with segments",
    title_zh="分段重算的峰值",
    statement="""Write `peak(n, size, block, inp)`: the most bytes of activations alive at one moment of the backward pass, for n equal blocks in
segments of `size` (the last segment may be shorter). A block keeps `block` bytes when it is run with a graph, its input included; an
input is `inp` bytes. After the forward pass only the inputs of segments are kept. The backward pass takes segments from the last
to the first: each is run again, and then all that its blocks keep is alive, beside the inputs of the segments before it.""",
    statement_zh="""写出 `peak(n, size, block, inp)`：n 个相同的块按 `size` 个一段（最后一段可以更短），求反向过程中同一时刻存活的激活的最大字节数。
一个块带图运行时保留 `block` 字节，已含它的输入；一个输入为 `inp` 字节。前向之后只保留各段的输入。反向从最后一段走到第一段：
每段重新运行一遍，此时该段各块保留的全部内容，加上它之前各段的输入，同时存活。""",
    stub='''def peak(n, size, block, inp):
    "Bytes at the worst moment."
    ...
''',
    solution='''def peak(n, size, block, inp):
    "Bytes at the worst moment."
    lengths = [min(size, n - start) for start in range(0, n, size)]
    return max(k * inp + length * block for k, length in enumerate(lengths))
''',
)


def right_peak(n: int, size: int, block: int, inp: int) -> int:
    worst, k = 0, 0
    for start in range(0, n, size):
        worst = max(worst, k * inp + (min(start + size, n) - start) * block)
        k += 1
    return worst


def peak_case(rng: random.Random) -> dict:
    inp = rng.randint(1, 9)
    return {"block": inp * rng.randint(2, 20), "inp": inp}


@prop(PEAK, "one segment is no checkpointing: all blocks at once")
def _(fn, rng: random.Random):
    c, n = peak_case(rng), rng.randint(1, 30)
    compare(fn, n * c["block"], "its input is among what the first block keeps", n=n, size=n + rng.randint(0, 3), **c)


@prop(PEAK, "block by block: the inputs before, and one block")
def _(fn, rng: random.Random):
    c, n = peak_case(rng), rng.randint(2, 30)
    compare(fn, (n - 1) * c["inp"] + c["block"], "the block's own input is not counted twice", n=n, size=1, **c)


@prop(PEAK, "segments of equal length")
def _(fn, rng: random.Random):
    c, k, size = peak_case(rng), rng.randint(2, 8), rng.randint(2, 8)
    compare(fn, (k - 1) * c["inp"] + size * c["block"], "worst at the last segment, where all inputs are still kept", n=k * size, size=size, **c)


@prop(PEAK, "a short last segment: the worst moment may be the one before it")
def _(fn, rng: random.Random):
    c, k, size = peak_case(rng), rng.randint(2, 6), rng.randint(3, 8)
    n = k * size + rng.randint(1, size - 2)
    compare(fn, right_peak(n, size, **c), f"the last of {k + 1} segments has {n - k * size} of {size} blocks", n=n, size=size, **c)


# 09.5

RATIO = exercise(
    "09.5",
    title="What recomputation costs",
    title_zh="重算要付的代价",
    statement="""Write `recompute_ratio(n, size, block, last, head)`: the FLOPs of a training step with checkpointing over those without. A model has n
blocks of `block` FLOPs in a forward pass and an output layer of `head` FLOPs; a backward pass costs twice a forward pass. Segments
of `size` blocks are run again once (the last one may be shorter), the output layer is not. The last product of a *segment*, `last`
FLOPs, is not computed again: nothing in the segment needs it. With size = 0 nothing is recomputed.""",
    statement_zh="""写出 `recompute_ratio(n, size, block, last, head)`：使用检查点时一步训练的 FLOPs 与不使用时之比。模型有 n 个块，每块前向 `block` FLOPs，
输出层前向 `head` FLOPs；反向是前向的两倍。每 `size` 个块一段（最后一段可以更短），各重算一次，输出层不重算。每**段**的最后一个矩阵乘
（`last` FLOPs）不必重算：段内没有谁需要它。size = 0 表示不重算。""",
    stub='''def recompute_ratio(n, size, block, last, head):
    "FLOPs with checkpointing over FLOPs without."
    ...
''',
    solution='''def recompute_ratio(n, size, block, last, head):
    "FLOPs with checkpointing over FLOPs without."
    plain = 3 * (n * block + head)
    n_segments = -(-n // size) if size else 0
    again = n * block - n_segments * last if size else 0
    return (plain + again) / plain
''',
)


def ratio_case(rng: random.Random) -> dict:
    block = rng.randint(40, 400)
    return {"n": rng.randint(2, 40), "block": block, "last": rng.randint(5, block // 4), "head": rng.randint(50, 900)}


def right_ratio(n: int, size: int, block: int, last: int, head: int) -> float:
    again = sum(min(size, n - s) * block - last for s in range(0, n, size)) if size else 0
    return 1 + again / (3 * (n * block + head))


@prop(RATIO, "nothing recomputed costs nothing")
def _(fn, rng: random.Random):
    near(fn, 1.0, "size = 0", **ratio_case(rng), size=0)


@prop(RATIO, "without a head and an early stop it is 4/3")
def _(fn, rng: random.Random):
    near(fn, 4 / 3, "one forward pass more, on top of three", **{**ratio_case(rng), "head": 0, "last": 0}, size=1)


@prop(RATIO, "the output layer is not run again")
def _(fn, rng: random.Random):
    c = {**ratio_case(rng), "last": 0}
    near(fn, right_ratio(**c, size=1), "it counts below the line only", **c, size=1)


@prop(RATIO, "each segment spares its last product, not each block")
def _(fn, rng: random.Random):
    c, size = ratio_case(rng), rng.randint(1, 5)
    near(fn, right_ratio(**c, size=size), f"{-(-c['n'] // size)} segments", **c, size=size)
