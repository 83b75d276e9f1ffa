"Exercises of chapter 1, the stages of training: cost, what is a target, the mean over a global batch, cloze scoring."

from __future__ import annotations

import math
import random

from ..checker import Mismatch, call, compare, exercise, prop

IGNORE = -100

# 01.1

FLOPS = exercise(
    "01.1",
    title="The FLOPs of a training run",
    title_zh="一次训练的浮点运算量",
    statement="""Write `training_flops(n_params, n_tokens, n_layers=0, hidden_size=0, seq_len=0)`: the floating-point
operations of training on `n_tokens`. A weight costs one multiplication and one addition a token forward, and twice that
backward. Attention adds, in each layer, the product of queries and keys and the product of scores and values, both over
all `seq_len` positions (the convention of PaLM's appendix B: causality is not discounted).""",
    statement_zh="""写出 `training_flops(n_params, n_tokens, n_layers=0, hidden_size=0, seq_len=0)`：在 `n_tokens` 个 token 上训练的浮点
运算次数。前向时每个权重对每个 token 做一次乘法和一次加法，反向是它的两倍。每层注意力另有 Q·K 与分数·V 两个乘积，都按全部
`seq_len` 个位置计算（PaLM 附录 B 的约定：不因因果掩码减半）。""",
    stub='''def training_flops(n_params, n_tokens, n_layers=0, hidden_size=0, seq_len=0):
    "Floating-point operations of training on n_tokens tokens."
    ...
''',
    solution='''def training_flops(n_params, n_tokens, n_layers=0, hidden_size=0, seq_len=0):
    "Floating-point operations of training on n_tokens tokens."
    weights = 6 * n_params  # a token: 2 forward, 4 backward
    attention = 12 * n_layers * hidden_size * seq_len  # a token: (2 + 2) forward, twice that backward
    return (weights + attention) * n_tokens
''',
)


@prop(FLOPS, "without attention it is 6·N·D")
def _(fn, rng: random.Random):
    n, d = rng.randint(10**6, 10**11), rng.randint(10**6, 10**13)
    compare(fn, 6 * n * d, n_params=n, n_tokens=d)


@prop(FLOPS, "attention agrees with counting every product of every sequence")
def _(fn, rng: random.Random):
    layers, heads, head_size, seq_len, sequences = rng.randint(1, 6), rng.randint(1, 4), rng.randint(2, 16), rng.randint(2, 32), rng.randint(1, 9)
    forward = 0
    for _ in range(layers * heads):
        forward += 2 * seq_len * seq_len * head_size  # (T, d) times (d, T): one score is d multiplications, d additions
        forward += 2 * seq_len * head_size * seq_len  # (T, T) times (T, d)
    n = rng.randint(100, 10**5)
    tokens = sequences * seq_len
    expected = 6 * n * tokens + 3 * sequences * forward
    note = "attention's share grows with seq_len, once per token"
    compare(fn, expected, note, n_params=n, n_tokens=tokens, n_layers=layers, hidden_size=heads * head_size, seq_len=seq_len)


@prop(FLOPS, "twice the tokens cost twice as much")
def _(fn, rng: random.Random):
    rest = dict(n_params=rng.randint(10**6, 10**9), n_layers=rng.randint(1, 80), hidden_size=64 * rng.randint(1, 128), seq_len=rng.randint(1, 8192))
    d = rng.randint(1, 10**9)
    compare(fn, 2 * call(fn, n_tokens=d, **rest), "twice the value at half the tokens", n_tokens=2 * d, **rest)


# 01.2

LABELS = exercise(
    "01.2",
    title="Which tokens SFT trains on",
    title_zh="SFT 训练哪些 token",
    statement="""Write `completion_labels(input_ids, roles_mask)`: the labels of one conversation. `roles_mask` is 1 where the
token was written by the assistant, the end token of its turn included, and 0 for everything else (system, user,
template, padding). A label is the token's id where the model is trained to produce it and -100 elsewhere. Labels stand
at their token's own position: the loss does the shift by one.""",
    statement_zh="""写出 `completion_labels(input_ids, roles_mask)`：一段对话的标签。`roles_mask` 在助手写出的 token 处为 1（包括该轮的结束
token），其余（system、user、模板、填充）为 0。需要模型学会产生的位置，标签为该 token 的 id，其余为 -100。标签与 token 位置对齐：
移一位由损失函数完成。""",
    stub='''def completion_labels(input_ids, roles_mask):
    "Labels of one conversation: -100 where the model is not trained."
    ...
''',
    solution='''def completion_labels(input_ids, roles_mask):
    "Labels of one conversation: -100 where the model is not trained."
    return [token if mask else -100 for token, mask in zip(input_ids, roles_mask)]
''',
)
EOS, PAD = 2, 0


def conversation(rng: random.Random, pad: int = PAD) -> tuple[list[int], list[int]]:
    "One to three turns; every turn ends with EOS, the assistant's end token is a target, padding stands on one side."
    ids, mask = [], []
    for _ in range(rng.randint(1, 3)):
        for role in (0, 1):
            n = rng.randint(1, 6)
            ids += [rng.randint(3, 99) for _ in range(n)] + [EOS]
            mask += [role] * (n + 1)
    n = rng.randint(0, 4)
    left = rng.random() < 0.5
    return ([pad] * n + ids, [0] * n + mask) if left else (ids + [pad] * n, mask + [0] * n)


def right_labels(ids: list[int], mask: list[int]) -> list[int]:
    return [ids[k] if mask[k] == 1 else IGNORE for k in range(len(ids))]


@prop(LABELS, "one label for each token")
def _(fn, rng: random.Random):
    ids, mask = conversation(rng)
    labels = call(fn, input_ids=ids, roles_mask=mask)
    if not isinstance(labels, list) or len(labels) != len(ids):
        raise Mismatch(f"completion_labels(input_ids={ids}, roles_mask={mask})", repr(labels), f"a list of {len(ids)} labels")


@prop(LABELS, "the assistant's tokens are targets at their own position, all others are -100")
def _(fn, rng: random.Random):
    ids, mask = conversation(rng)
    compare(fn, right_labels(ids, mask), "no shift here: the loss compares position t with label t+1", input_ids=ids, roles_mask=mask)


@prop(LABELS, "the end token of the assistant's turn is a target, also where padding has the same id")
def _(fn, rng: random.Random):
    ids, mask = conversation(rng, pad=EOS)
    compare(fn, right_labels(ids, mask), "a model that never sees the end token as a target never stops", input_ids=ids, roles_mask=mask)


@prop(LABELS, "a conversation without an assistant has no target")
def _(fn, rng: random.Random):
    ids = [rng.randint(0, 99) for _ in range(rng.randint(1, 12))]
    compare(fn, [IGNORE] * len(ids), input_ids=ids, roles_mask=[0] * len(ids))


@prop(LABELS, "token id 0 is a target like any other")
def _(fn, rng: random.Random):
    ids = [rng.choice([0, 0, 5]) for _ in range(rng.randint(2, 8))]
    compare(fn, list(ids), "the mask decides, not the id", input_ids=ids, roles_mask=[1] * len(ids))


# 01.3

MEAN = exercise(
    "01.3",
    title="The loss of a global batch",
    title_zh="全局批量的损失",
    statement="""Write `global_mean_loss(token_losses, masks)`: the mean loss a target token over a global batch that comes as
micro-batches. `token_losses[i]` is the list of losses of micro-batch i, padding included, and `masks[i]` is 1 at its
targets and 0 elsewhere. Micro-batches have different lengths, some hold padding only, and what stands at a padded
position means nothing, not even that it is finite. Without any target the loss is 0.""",
    statement_zh="""写出 `global_mean_loss(token_losses, masks)`：全局批量按目标 token 平均的损失，批量以若干微批给出。`token_losses[i]`
是第 i 个微批的逐 token 损失（含填充），`masks[i]` 在目标处为 1，其余为 0。微批长短不一，有的全是填充；填充位置上的值没有意义，甚至可能
不是有限数。没有任何目标时损失为 0。""",
    stub='''def global_mean_loss(token_losses, masks):
    "Mean loss per target token over all micro-batches."
    ...
''',
    solution='''def global_mean_loss(token_losses, masks):
    "Mean loss per target token over all micro-batches."
    total, count = 0.0, 0
    for losses, mask in zip(token_losses, masks):
        for loss, is_target in zip(losses, mask):
            if is_target:  # not loss * mask: inf * 0 is nan
                total += loss
                count += 1
    return total / count if count else 0.0
''',
)


def micro_batches(rng: random.Random) -> tuple[list[list[float]], list[list[int]]]:
    "Two to five micro-batches of unequal length with at least one target each."
    losses, masks = [], []
    for _ in range(rng.randint(2, 5)):
        length = rng.randint(1, 9)
        mask = [int(rng.random() < 0.6) for _ in range(length)]
        mask[rng.randrange(length)] = 1
        masks.append(mask)
        losses.append([round(rng.uniform(0.1, 9), 3) for _ in range(length)])
    return losses, masks


def right_mean(losses: list[list[float]], masks: list[list[int]]) -> float:
    targets = [x for row, mask in zip(losses, masks) for x, m in zip(row, mask) if m]
    return math.fsum(targets) / len(targets) if targets else 0.0


@prop(MEAN, "every target token weighs the same, in whichever micro-batch it is")
def _(fn, rng: random.Random):
    losses, masks = micro_batches(rng)
    compare(fn, right_mean(losses, masks), "sum over all targets, then one division", token_losses=losses, masks=masks)


@prop(MEAN, "cutting the batch differently changes nothing")
def _(fn, rng: random.Random):
    losses, masks = micro_batches(rng)
    flat, flat_mask = sum(losses, []), sum(masks, [])
    cut = rng.randint(1, max(1, len(flat) - 1))
    whole = call(fn, token_losses=[flat], masks=[flat_mask])
    if not isinstance(whole, int | float):
        raise Mismatch(f"global_mean_loss(token_losses={[flat]}, masks={[flat_mask]})", repr(whole), "a number")
    parts = dict(token_losses=[flat[:cut], flat[cut:]], masks=[flat_mask[:cut], flat_mask[cut:]])
    compare(fn, whole, "the value for the same tokens in one micro-batch", **parts)


@prop(MEAN, "a micro-batch of padding only changes nothing")
def _(fn, rng: random.Random):
    losses, masks = micro_batches(rng)
    expected = right_mean(losses, masks)
    at, n = rng.randint(0, len(losses)), rng.randint(0, 4)
    losses.insert(at, [0.0] * n)
    masks.insert(at, [0] * n)
    compare(fn, expected, token_losses=losses, masks=masks)


@prop(MEAN, "what stands at a padded position does not count")
def _(fn, rng: random.Random):
    losses, masks = micro_batches(rng)
    expected = right_mean(losses, masks)
    junk = rng.choice([1e6, math.inf, math.nan])
    losses = [[x if m else junk for x, m in zip(row, mask)] + [junk] for row, mask in zip(losses, masks)]
    compare(fn, expected, token_losses=losses, masks=[mask + [0] for mask in masks])


@prop(MEAN, "without any target the loss is 0")
def _(fn, rng: random.Random):
    rows = [[round(rng.uniform(0.1, 9), 3) for _ in range(rng.randint(0, 4))] for _ in range(rng.randint(0, 3))]
    compare(fn, 0.0, token_losses=rows, masks=[[0] * len(r) for r in rows])


# 01.4

CLOZE = exercise(
    "01.4",
    title="Which candidate a model holds true",
    title_zh="模型认为哪个候选正确",
    statement="""Write `cloze_choice(token_logps, masks)`: the index of the candidate to which the model gives the highest
probability as a continuation. `token_logps[i]` are the log-probabilities of candidate i's tokens, padded on either side
to a common length; `masks[i]` is 1 at the candidate's own tokens. Candidates have different numbers of tokens. A tie goes
to the first. The probability of a candidate is the product of its tokens' probabilities. (The mean a token answers
another question: it favours long candidates whose later tokens follow from the first, and it changes when a word is cut
into more tokens.)""",
    statement_zh="""写出 `cloze_choice(token_logps, masks)`：返回模型认为概率最高的候选续写的下标。`token_logps[i]` 是第 i 个候选各 token 的对数概率，
左侧或右侧填充到同一长度；`masks[i]` 在候选自身的 token 处为 1。各候选的 token 数不同；并列时取第一个。候选的概率是其各 token 概率之积。
（按 token 求平均回答的是另一个问题：它偏向后续 token 可由开头推出的长候选，而且同一个词切成更多 token 时结果会变。）""",
    stub='''def cloze_choice(token_logps, masks):
    "Index of the candidate that is most probable as a whole."
    ...
''',
    solution='''def cloze_choice(token_logps, masks):
    "Index of the candidate that is most probable as a whole."
    totals = [sum(x for x, m in zip(logps, mask) if m) for logps, mask in zip(token_logps, masks)]
    return totals.index(max(totals))
''',
)


def padded(candidates: list[list[float]], rng: random.Random, filler: float, left: bool | None = None) -> dict[str, list]:
    "Candidates filled up to a common length, each on a side drawn for all of them."
    left = rng.random() < 0.5 if left is None else left
    length = max(map(len, candidates)) + rng.randint(0, 2)
    rows, masks = [], []
    for c in candidates:
        n = length - len(c)
        rows.append([filler] * n + c if left else c + [filler] * n)
        masks.append([0] * n + [1] * len(c) if left else [1] * len(c) + [0] * n)
    return {"token_logps": rows, "masks": masks}


def candidates(rng: random.Random) -> list[list[float]]:
    "Two to five candidates of one to six tokens whose totals differ by more than rounding."
    while True:
        rows = [[round(-rng.expovariate(1), 3) - 0.001 for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(2, 5))]
        totals = sorted(map(math.fsum, rows))
        if min(b - a for a, b in zip(totals, totals[1:])) > 1e-6:
            return rows


def right_choice(rows: list[list[float]]) -> int:
    return max(range(len(rows)), key=lambda k: math.fsum(rows[k]))


@prop(CLOZE, "the candidate with the highest total log-probability is chosen")
def _(fn, rng: random.Random):
    rows = candidates(rng)
    compare(fn, right_choice(rows), "log-probabilities of a candidate's tokens add up", **padded(rows, rng, 0.0))


@prop(CLOZE, "a short candidate wins over a long one with a better mean but a lower total")
def _(fn, rng: random.Random):
    short = [-round(rng.uniform(1.0, 1.5), 3)]
    long = [-round(rng.uniform(0.5, 0.8), 3) for _ in range(rng.randint(4, 6))]
    rows = [short, long] if rng.random() < 0.5 else [long, short]
    compare(fn, rows.index(short), "a mean a token would choose the long one", **padded(rows, rng, 0.0))


@prop(CLOZE, "padding does not count, on whichever side it stands and whatever value it has")
def _(fn, rng: random.Random):
    rows, filler = candidates(rng), rng.choice([0.0, -50.0, 3.0, math.nan])
    for left in (False, True):
        compare(fn, right_choice(rows), f"padding on the {'left' if left else 'right'}", **padded(rows, rng, filler, left))


@prop(CLOZE, "cutting a token in two, at the same probability, changes nothing")
def _(fn, rng: random.Random):
    rows = candidates(rng)
    best = right_choice(rows)
    k = rng.randrange(len(rows))
    x = rows[k].pop()
    rows[k] += [x / 2, x / 2]
    compare(fn, best, "the tokenizer's cuts are no evidence", **padded(rows, rng, 0.0))


@prop(CLOZE, "a tie goes to the first")
def _(fn, rng: random.Random):
    row = [-0.5 * rng.randint(1, 6) for _ in range(rng.randint(1, 4))]  # halves add up exactly
    worse = [[*row, -0.5] for _ in range(rng.randint(0, 2))]
    rows = worse + [list(row), list(row)] + worse
    compare(fn, len(worse), **padded(rows, rng, 0.0))
