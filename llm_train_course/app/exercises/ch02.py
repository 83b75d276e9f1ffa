"Exercises of chapter 2, parallel training: the ring, ZeRO's bytes and traffic, 1F1B, a cross-entropy over shards."

from __future__ import annotations

import math
import random

from ..checker import Mismatch, call, compare, exercise, prop
from .ch05 import described, near

def name_of(fn) -> str:
    return getattr(fn, "__name__", "fn")


# 02.1

RING = exercise(
    "02.1",
    title="Which chunk to send",
    title_zh="环上该发哪一块",
    statement="""Write `chunk_to_send(rank, step, world_size)`: a ring reduce-scatter of `world_size` chunks on as many ranks. In step 0, 1, …,
world_size - 2 every rank sends one chunk to rank + 1 and adds the chunk it receives from rank - 1 to its own. Return the number of the chunk
that `rank` sends in `step`, such that at the end rank r has the complete sum of chunk r.""",
    statement_zh="""写出 `chunk_to_send(rank, step, world_size)`：`world_size` 个进程对同样多的块做环形 reduce-scatter。在第 0、1、…、world_size - 2 步，
每个进程把一块发给 rank + 1，并把从 rank - 1 收到的块加到自己的块上。返回 `rank` 在第 `step` 步发送的块号，使得最后进程 r 拥有第 r 块的完整的和。""",
    stub='''def chunk_to_send(rank, step, world_size):
    "A chunk's number, 0 to world_size - 1."
    ...
''',
    solution='''def chunk_to_send(rank, step, world_size):
    "A chunk's number, 0 to world_size - 1."
    return (rank - step - 1) % world_size
''',
)


def ring(fn, n: int) -> tuple[list[list[set]], list[list[int]]]:
    "Who has added whose numbers to each chunk after all steps of a ring, and what was sent."
    has = [[{r} for _ in range(n)] for r in range(n)]
    sent = [[call(fn, rank=r, step=s, world_size=n) for r in range(n)] for s in range(n - 1)]
    for s, row in enumerate(sent):
        for r, c in enumerate(row):
            if isinstance(c, bool) or not isinstance(c, int | float) or c != int(c) or not 0 <= c < n:
                raise Mismatch(described(fn, {"rank": r, "step": s, "world_size": n}), repr(c), f"a chunk's number from 0 to {n - 1}")
        moving = [set(has[r][int(c)]) for r, c in enumerate(row)]
        for r, c in enumerate(row):
            has[(r + 1) % n][int(c)] |= moving[r]
    return has, sent


@prop(RING, "it is the number of a chunk")
def _(fn, rng: random.Random):
    ring(fn, rng.randint(2, 7))


@prop(RING, "in one step no two ranks send the same chunk")
def _(fn, rng: random.Random):
    n = rng.randint(2, 7)
    for step, row in enumerate(ring(fn, n)[1]):
        if len(set(row)) < n:
            raise Mismatch(f"{name_of(fn)}(rank=0…{n - 1}, step={step}, world_size={n})", f"chunks {row}", "every chunk once", "two ranks would add to one chunk at once")


@prop(RING, "at the end some rank has the complete sum of every chunk")
def _(fn, rng: random.Random):
    n = rng.randint(2, 7)
    has, _ = ring(fn, n)
    for c in range(n):
        best = max(len(has[r][c]) for r in range(n))
        if best < n:
            raise Mismatch(f"{name_of(fn)}(rank=0…{n - 1}, step=0…{n - 2}, world_size={n})", f"chunk {c} holds the numbers of at most {best} ranks", f"of all {n}",
                           "a rank passes on what it has just received")


@prop(RING, "at the end rank r has the complete sum of chunk r")
def _(fn, rng: random.Random):
    n = rng.randint(2, 7)
    has, _ = ring(fn, n)
    for r in range(n):
        if len(has[r][r]) < n:
            where = [q for q in range(n) if len(has[q][r]) == n]
            raise Mismatch(f"{name_of(fn)}(rank=0…{n - 1}, step=0…{n - 2}, world_size={n})", f"the sum of chunk {r} is on rank {where}", f"on rank {r}", "start one chunk earlier or later")


# 02.2

BYTES = exercise(
    "02.2",
    title="Bytes of a rank under ZeRO",
    title_zh="ZeRO 下每个进程的字节数",
    statement="""Write `state_bytes(n_params, world_size, stage)`: the bytes of weights, gradients and optimizer state on one rank, for BF16
weights and gradients and an Adam whose state has a master copy and two moments in FP32. Stage 0 is plain data parallelism, stage 1 shards
the optimizer state, 2 the gradients too, 3 the weights too. Where `n_params` does not divide, the flat vector is padded with
zeros, so that all shards are equally long; what is not sharded has no padding.""",
    statement_zh="""写出 `state_bytes(n_params, world_size, stage)`：一个进程上权重、梯度和优化器状态的字节数。权重和梯度为 BF16，Adam 的状态为 FP32 的主副本和两个动量。
阶段 0 是普通数据并行；1 切分优化器状态；2 再切分梯度；3 再切分权重。除不尽时，把展平的向量补零，使各分片一样长；不切分的部分不补。""",
    stub='''def state_bytes(n_params, world_size, stage):
    "Bytes, an integer."
    ...
''',
    solution='''def state_bytes(n_params, world_size, stage):
    "Bytes, an integer."
    shard = -(-n_params // world_size)
    kept = [shard if stage >= s else n_params for s in (3, 2, 1)]  # weights, gradients, optimizer state
    return 2 * kept[0] + 2 * kept[1] + 12 * kept[2]
''',
)


def right_bytes(n: int, world: int, stage: int) -> int:
    shard = (n + world - 1) // world
    return sum(b * (shard if stage >= s else n) for b, s in ((2, 3), (2, 2), (12, 1)))


@prop(BYTES, "plain data parallelism keeps 16 bytes a parameter, whatever the number of ranks")
def _(fn, rng: random.Random):
    n = rng.randint(1, 10**9)
    compare(fn, 16 * n, "2 for the weight, 2 for its gradient, 12 for Adam", n_params=n, world_size=rng.randint(1, 64), stage=0)


@prop(BYTES, "on one rank no stage saves anything")
def _(fn, rng: random.Random):
    n = rng.randint(1, 10**9)
    compare(fn, 16 * n, n_params=n, world_size=1, stage=rng.randint(1, 3))


@prop(BYTES, "shards that divide: 4Ψ + 12Ψ/N, 2Ψ + 14Ψ/N, 16Ψ/N")
def _(fn, rng: random.Random):
    world, stage = rng.randint(2, 64), rng.randint(1, 3)
    n = world * rng.randint(1, 10**7)
    compare(fn, right_bytes(n, world, stage), n_params=n, world_size=world, stage=stage)


@prop(BYTES, "shards that do not divide are padded")
def _(fn, rng: random.Random):
    world, stage = rng.randint(2, 64), rng.randint(1, 3)
    n = world * rng.randint(0, 10**4) + rng.randint(1, world - 1)
    compare(fn, right_bytes(n, world, stage), "a shard is the next integer up, and only sharded parts are padded", n_params=n, world_size=world, stage=stage)


# 02.3

TRAFFIC = exercise(
    "02.3",
    title="What ZeRO sends",
    title_zh="ZeRO 的通信量",
    statement="""Write `elements_sent(n_params, world_size, stage, micro_batches)`: the elements that one rank sends in one optimizer step, with
ring collectives and `n_params` divisible by `world_size`. Stage 0 and 1 exchange gradients once a step, after the last micro-batch. Stage 2 keeps
only its shard of the gradients, so it reduces those of every micro-batch. Stages 1 and 2 gather the new weights once, after the step; stage 0 needs the
whole sums, an all-reduce, which is a reduce-scatter and an all-gather. Stage 3 reduces as stage 2 does and gathers nothing after the step, but the weights
twice in each micro-batch, for the forward and for the backward pass. The reduce-scatter or the all-gather of a vector of n elements sends n·(N-1)/N.""",
    statement_zh="""写出 `elements_sent(n_params, world_size, stage, micro_batches)`：使用环形集合通信、`n_params` 可被 `world_size` 整除时，一个进程在一次优化器更新中发送的元素数。
阶段 0 和 1 每步只在最后一个微批之后交换一次梯度。阶段 2 只保留自己那份梯度，所以每个微批都要归约。阶段 1 和 2 在更新之后收集一次新权重；阶段 0 用 all-reduce 得到完整的和，相当于一次 reduce-scatter 加一次 all-gather。
阶段 3 的归约与阶段 2 相同，更新之后不再收集，但每个微批要收集两次权重（前向和反向各一次）。
n 个元素的 reduce-scatter 或 all-gather 发送 n·(N-1)/N 个元素。""",
    stub='''def elements_sent(n_params, world_size, stage, micro_batches):
    "Elements that one rank sends in a step."
    ...
''',
    solution='''def elements_sent(n_params, world_size, stage, micro_batches):
    "Elements that one rank sends in a step."
    reductions = micro_batches if stage >= 2 else 1
    gathers = 2 * micro_batches if stage == 3 else 1  # the others gather the new weights, or the sums, once
    return (reductions + gathers) * n_params * (world_size - 1) // world_size
''',
)


def right_traffic(n: int, world: int, stage: int, k: int) -> int:
    passes = {0: 2, 1: 2, 2: k + 1, 3: 3 * k}[stage]
    return passes * (n // world) * (world - 1)


@prop(TRAFFIC, "with one micro-batch, stages 0, 1 and 2 send the same, 2Ψ(N-1)/N")
def _(fn, rng: random.Random):
    world, stage = rng.randint(2, 64), rng.randint(0, 2)
    n = world * rng.randint(1, 10**6)
    compare(fn, right_traffic(n, world, stage, 1), "a reduce-scatter and an all-gather", n_params=n, world_size=world, stage=stage, micro_batches=1)


@prop(TRAFFIC, "stage 3 sends 3Ψ(N-1)/N for every micro-batch")
def _(fn, rng: random.Random):
    world, k = rng.randint(2, 64), rng.randint(1, 16)
    n = world * rng.randint(1, 10**6)
    compare(fn, right_traffic(n, world, 3, k), "two gathers of the weights and one reduction", n_params=n, world_size=world, stage=3, micro_batches=k)


@prop(TRAFFIC, "accumulation is free for stages 0 and 1")
def _(fn, rng: random.Random):
    world, stage = rng.randint(2, 64), rng.randint(0, 1)
    n = world * rng.randint(1, 10**6)
    compare(fn, right_traffic(n, world, stage, 1), "gradients are summed on the rank first", n_params=n, world_size=world, stage=stage, micro_batches=rng.randint(2, 16))


@prop(TRAFFIC, "stage 2 reduces every micro-batch and gathers once")
def _(fn, rng: random.Random):
    world, k = rng.randint(2, 64), rng.randint(2, 16)
    n = world * rng.randint(1, 10**6)
    compare(fn, right_traffic(n, world, 2, k), "(k + 1)Ψ, times (N-1)/N", n_params=n, world_size=world, stage=2, micro_batches=k)


@prop(TRAFFIC, "one rank sends nothing")
def _(fn, rng: random.Random):
    compare(fn, 0, n_params=rng.randint(1, 10**6), world_size=1, stage=rng.randint(0, 3), micro_batches=rng.randint(1, 9))


# 02.4

SCHEDULE = exercise(
    "02.4",
    title="One forward, one backward",
    title_zh="一次前向，一次反向",
    statement="""Write `one_f_one_b(rank, stages, micro_batches)`: the order of work of stage `rank` (0 is the first) in the 1F1B schedule, as a list of
["F", i] and ["B", i] for micro-batches i = 0, 1, … Each stage first runs as many forward passes as there are stages after it (not more than there are
micro-batches), then alternates one forward and one backward pass, then runs the backward passes that are left. Micro-batches keep their order.""",
    statement_zh="""写出 `one_f_one_b(rank, stages, micro_batches)`：1F1B 调度中第 `rank` 个阶段（0 为第一个）的工作顺序，返回 ["F", i] 和 ["B", i] 的列表，微批 i = 0, 1, …
每个阶段先做若干次前向，次数等于排在它后面的阶段数（不超过微批数），然后一次前向、一次反向交替，最后做完剩下的反向。微批保持先后顺序。""",
    stub='''def one_f_one_b(rank, stages, micro_batches):
    'A list such as [["F", 0], ["B", 0]].'
    ...
''',
    solution='''def one_f_one_b(rank, stages, micro_batches):
    'A list such as [["F", 0], ["B", 0]].'
    warmup = min(stages - rank - 1, micro_batches)
    order = [["F", i] for i in range(warmup)]
    for i in range(micro_batches - warmup):
        order += [["F", warmup + i], ["B", i]]
    return order + [["B", i] for i in range(micro_batches - warmup, micro_batches)]
''',
)


def order_of(fn, p: int, m: int) -> list[list]:
    "Every rank's order, each operation once and in its form."
    orders = []
    for r in range(p):
        order = call(fn, rank=r, stages=p, micro_batches=m)
        wanted = sorted([kind, i] for kind in "FB" for i in range(m))
        if not isinstance(order, list) or sorted(map(repr, order)) != sorted(map(repr, wanted)):
            raise Mismatch(described(fn, {"rank": r, "stages": p, "micro_batches": m}), repr(order)[:400], "F and B of every micro-batch, each once")
        orders.append(order)
    return orders


def run(orders: list[list]) -> tuple[int | None, list[int]]:
    "Time until all is done if F and B take one unit each (None: they wait for each other), and the most micro-batches in flight by rank."
    p, done, at, clock, flight = len(orders), {}, [0] * len(orders), [0] * len(orders), [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for r, order in enumerate(orders):
            while at[r] < len(order):
                kind, i = order[at[r]]
                needs = [(kind, i, r - 1)] if kind == "F" and r else [("F", i, r)] * (kind == "B") + [("B", i, r + 1)] * (kind == "B" and r < p - 1)
                if any(n not in done for n in needs):
                    break
                clock[r] = max([clock[r], *(done[n] for n in needs)]) + 1
                done[kind, i, r] = clock[r]
                at[r], moved = at[r] + 1, True
    for r, order in enumerate(orders):
        for k in range(len(order)):
            flight[r] = max(flight[r], sum(1 if kind == "F" else -1 for kind, _ in order[: k + 1]))
    return (max(clock) if all(a == len(o) for a, o in zip(at, orders)) else None), flight


@prop(SCHEDULE, "each forward and each backward pass once")
def _(fn, rng: random.Random):
    order_of(fn, rng.randint(1, 5), rng.randint(1, 8))


@prop(SCHEDULE, "micro-batches keep their order, and a backward pass comes after its forward pass")
def _(fn, rng: random.Random):
    p, m = rng.randint(1, 5), rng.randint(1, 8)
    for r, order in enumerate(order_of(fn, p, m)):
        for kind in "FB":
            if [i for k, i in order if k == kind] != list(range(m)):
                raise Mismatch(described(fn, {"rank": r, "stages": p, "micro_batches": m}), repr(order)[:400], f"{kind} of 0, 1, … in turn")
        if any(order.index(["F", i]) > order.index(["B", i]) for i in range(m)):
            raise Mismatch(described(fn, {"rank": r, "stages": p, "micro_batches": m}), repr(order)[:400], "F before B")


@prop(SCHEDULE, "no two stages wait for each other")
def _(fn, rng: random.Random):
    p, m = rng.randint(2, 5), rng.randint(1, 8)
    if run(order_of(fn, p, m))[0] is None:
        raise Mismatch(f"{name_of(fn)}(rank=0…{p - 1}, stages={p}, micro_batches={m})", "a deadlock", "an order in which all can finish", "a stage asks for a gradient that needs its own next output")


@prop(SCHEDULE, "stage r of p keeps at most p - r micro-batches in flight")
def _(fn, rng: random.Random):
    p = rng.randint(2, 5)
    m = rng.randint(p + 1, 9)
    for r, most in enumerate(run(order_of(fn, p, m))[1]):
        if most > p - r:
            raise Mismatch(described(fn, {"rank": r, "stages": p, "micro_batches": m}), f"{most} in flight", f"at most {p - r}", "GPipe keeps all of them")


@prop(SCHEDULE, "it takes as long as GPipe: m + p - 1 forward and as many backward passes")
def _(fn, rng: random.Random):
    p, m = rng.randint(1, 5), rng.randint(1, 8)
    t = run(order_of(fn, p, m))[0]
    if t != 2 * (m + p - 1):
        raise Mismatch(f"{name_of(fn)}(rank=0…{p - 1}, stages={p}, micro_batches={m})", f"{t} units", f"{2 * (m + p - 1)} units", "too few forward passes first, and the stage runs dry")


# 02.5

SHARDED = exercise(
    "02.5",
    title="A cross-entropy over shards of the vocabulary",
    title_zh="按词表切分的交叉熵",
    statement="""Write `merge(parts)`: the cross-entropy of one token from what each rank knows about its slice of the logits. `parts` holds for each rank
[m, s, t]: the largest logit m of its slice, the sum s of exp(logit - m) over its slice, and the target's logit t, or None on a rank whose slice does not
hold the target. Logits may be as large as 1e4. If no rank holds the target (it is ignored), return 0.""",
    statement_zh="""写出 `merge(parts)`：由各进程对自己那段 logits 的了解，求一个 token 的交叉熵。`parts` 中每个进程为 [m, s, t]：该段最大的 logit m、该段 exp(logit - m) 之和 s、
目标的 logit t（目标不在该段时为 None）。logits 可以大到 1e4。若没有进程持有目标（被忽略），返回 0。""",
    stub='''def merge(parts):
    "Nats."
    ...
''',
    solution='''def merge(parts):
    "Nats."
    import math
    targets = [t for _, _, t in parts if t is not None]
    if not targets:
        return 0.0
    top = max(m for m, _, _ in parts)
    return top + math.log(sum(s * math.exp(m - top) for m, s, _ in parts)) - targets[0]
''',
)


def shards(rng: random.Random, world: int, shift: float = 0.0) -> tuple[list, float]:
    "Parts of all ranks, their slices of unequal lengths, and the loss computed from all logits at once."
    slices = [[rng.uniform(-4, 4) + shift for _ in range(rng.randint(1, 6))] for _ in range(world)]
    home = rng.randrange(world)
    target = rng.choice(slices[home])
    every = [x for s in slices for x in s]
    top = max(every)
    loss = top + math.log(sum(math.exp(x - top) for x in every)) - target
    return [[max(s), sum(math.exp(x - max(s)) for x in s), target if r == home else None] for r, s in enumerate(slices)], loss


@prop(SHARDED, "one rank: the usual cross-entropy")
def _(fn, rng: random.Random):
    parts, loss = shards(rng, 1)
    near(fn, loss, parts=parts)


@prop(SHARDED, "several ranks: the sums refer to different maxima")
def _(fn, rng: random.Random):
    parts, loss = shards(rng, rng.randint(2, 5))
    near(fn, loss, "bring all sums to the largest maximum first", parts=parts)


@prop(SHARDED, "large logits do not overflow")
def _(fn, rng: random.Random):
    parts, loss = shards(rng, rng.randint(2, 5), rng.choice([-1e4, 1e4]))
    near(fn, loss, "subtract the maximum of all ranks, never take exp of a logit", atol=1e-5, parts=parts)


@prop(SHARDED, "a target logit of 0 is a logit, and None is none")
def _(fn, rng: random.Random):
    near(fn, math.log(2.0), parts=[[0.0, 1.0, 0.0], [0.0, 1.0, None]])
    near(fn, 0.0, "an ignored token costs nothing", parts=[[rng.uniform(-2, 2), 1.0, None], [0.0, 1.0, None]])
