"Exercises of chapter 6, DPO: implicit reward, loss and gradient, IPO's target, SimPO's margin, which pairs displace."

from __future__ import annotations

import math
import random

from ..checker import Mismatch, call, exercise, prop
from .ch05 import described, is_near, near, quarters


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    "-log sigmoid(-x)"
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# 06.1

IMPLICIT = exercise(
    "06.1",
    title="The implicit reward of an answer",
    title_zh="回答的隐式奖励",
    statement="""Write `implicit_reward(logps, ref_logps, mask, beta)`: the reward that a DPO-trained policy gives to one answer, up to a
term of the prompt alone. `logps` and `ref_logps` are the log-probabilities of the tokens of prompt and answer under the
policy and under the reference; `mask` is 1 at the answer's tokens, and 0 at the prompt's and at padding, where anything may
stand. The probability of an answer is the product of its tokens'.""",
    statement_zh="""写出 `implicit_reward(logps, ref_logps, mask, beta)`：DPO 训练的策略给一个回答的奖励（只差一个仅与提示有关的项）。`logps` 与 `ref_logps`
是提示和回答的各 token 在策略和参考模型下的对数概率；`mask` 在回答的 token 处为 1，在提示和填充处为 0，那里可能是任何值。回答的概率是其各
token 概率之积。""",
    stub='''def implicit_reward(logps, ref_logps, mask, beta):
    "beta times the log-ratio of the answer."
    ...
''',
    solution='''def implicit_reward(logps, ref_logps, mask, beta):
    "beta times the log-ratio of the answer."
    return beta * sum(p - q for p, q, m in zip(logps, ref_logps, mask) if m)  # a sum, not a mean
''',
)


def answer_case(rng: random.Random, junk: float = -2.0) -> dict:
    before, n, after = rng.randint(1, 3), rng.randint(2, 4), rng.randint(0, 2)
    row = lambda: [junk + rng.randint(0, 3) for _ in range(before)] + [-rng.randint(1, 16) / 4 for _ in range(n)] + [junk] * after
    return {"logps": row(), "ref_logps": row(), "mask": [0] * before + [1] * n + [0] * after, "beta": rng.choice([0.125, 0.25, 0.5])}


def right_reward(logps: list, ref_logps: list, mask: list, beta: float) -> float:
    return beta * (math.fsum(p for p, m in zip(logps, mask) if m) - math.fsum(q for q, m in zip(ref_logps, mask) if m))


@prop(IMPLICIT, "before the first step it is 0: the policy is the reference")
def _(fn, rng: random.Random):
    case = answer_case(rng)
    case["ref_logps"] = list(case["logps"])
    near(fn, 0.0, **case)


@prop(IMPLICIT, "for an answer of one token it is beta times (log π − log π_ref)")
def _(fn, rng: random.Random):
    case = answer_case(rng)
    case = {k: v if k == "beta" else v[:1] for k, v in case.items()} | {"mask": [1]}
    near(fn, right_reward(**case), "positive where the policy likes the answer more than the reference does", **case)


@prop(IMPLICIT, "the tokens of the answer count, those of the prompt and of padding do not")
def _(fn, rng: random.Random):
    case = answer_case(rng, junk=rng.choice([-2.0, -1e6, -math.inf, math.nan]))
    near(fn, right_reward(**case), "the prompt is given: nothing is learned about it", **case)


@prop(IMPLICIT, "the log-ratios of the tokens add up: an answer twice as long, twice the reward")
def _(fn, rng: random.Random):
    case = answer_case(rng)
    expected = 2 * right_reward(**case)
    double = {k: v if k == "beta" else v + v for k, v in case.items()}
    near(fn, expected, "the probability of an answer is a product over its tokens; a mean is another method", **double)


# 06.2

LOSS = exercise(
    "06.2",
    title="The DPO loss and its gradient",
    title_zh="DPO 损失及其梯度",
    statement="""Write `dpo_loss_and_grad(policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp, beta)`: the list
[loss, derivative by policy_chosen_logp, derivative by policy_rejected_logp] of one pair, from the four log-probabilities of
whole answers. The loss is the negative log-likelihood of the preference when each answer has the reward beta·log(π/π_ref).
Log-probabilities of long answers are large numbers: differences of hundreds must neither overflow nor lose the loss.""",
    statement_zh="""写出 `dpo_loss_and_grad(policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp, beta)`：由整个回答的四个对数概率，返回
一对回答的列表 [损失, 对 policy_chosen_logp 的导数, 对 policy_rejected_logp 的导数]。损失是偏好的负对数似然，每个回答的奖励为
beta·log(π/π_ref)。长回答的对数概率绝对值很大：差到几百时，既不能溢出，也不能丢失损失值。""",
    stub='''def dpo_loss_and_grad(policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp, beta):
    "[loss, derivative by policy_chosen_logp, derivative by policy_rejected_logp]"
    ...
''',
    solution='''def dpo_loss_and_grad(policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp, beta):
    "[loss, derivative by policy_chosen_logp, derivative by policy_rejected_logp]"
    import math
    margin = beta * ((policy_chosen_logp - ref_chosen_logp) - (policy_rejected_logp - ref_rejected_logp))
    small = math.exp(-abs(margin))  # never overflows
    loss = max(-margin, 0.0) + math.log1p(small)
    weight = (1.0 if margin < 0 else small) / (1 + small)  # sigmoid(-margin): how wrong the policy is
    return [loss, -beta * weight, beta * weight]
''',
)


def four(rng: random.Random) -> dict:
    names = ("policy_chosen_logp", "policy_rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
    return {**{name: -rng.randint(8, 80) / 4 for name in names}, "beta": rng.choice([0.125, 0.25, 0.5])}


def margin_of(policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp, beta) -> float:
    return beta * (policy_chosen_logp - ref_chosen_logp - policy_rejected_logp + ref_rejected_logp)


def right_dpo(case: dict) -> list[float]:
    margin = margin_of(**case)
    return [softplus(-margin), -case["beta"] * sigmoid(-margin), case["beta"] * sigmoid(-margin)]


@prop(LOSS, "before the first step the loss is log 2 and the derivatives are ∓beta/2")
def _(fn, rng: random.Random):
    case = four(rng)
    case["ref_chosen_logp"], case["ref_rejected_logp"] = case["policy_chosen_logp"], case["policy_rejected_logp"]
    near(fn, [math.log(2), -case["beta"] / 2, case["beta"] / 2], "policy and reference agree, so both rewards are 0, whatever the answers' probabilities", **case)


@prop(LOSS, "the loss is −log σ of the margin of the two implicit rewards")
def _(fn, rng: random.Random):
    case = four(rng)
    returned = call(fn, **case)
    margin = margin_of(**case)
    if not isinstance(returned, list) or len(returned) != 3 or not is_near(returned[0], softplus(-margin), 2e-5, 2e-6):
        raise Mismatch(described(fn, case), repr(returned), f"loss {softplus(-margin)}", f"the margin, chosen minus rejected, each minus its reference and times beta, is {margin}")


@prop(LOSS, "the derivatives are −beta·σ(−margin) and +beta·σ(−margin)")
def _(fn, rng: random.Random):
    case = four(rng)
    why = "the weight is large where the order is wrong; the loss falls as the chosen answer's log-probability rises, and the two move by the same amount"
    near(fn, right_dpo(case), why, **case)


@prop(LOSS, "exchanging the two answers turns the margin round")
def _(fn, rng: random.Random):
    case = four(rng)
    swapped = {k.replace("chosen", "?").replace("rejected", "chosen").replace("?", "rejected"): v for k, v in case.items()}
    swapped = {k: swapped[k] for k in case}
    near(fn, right_dpo(swapped), f"the two losses differ by the margin, {margin_of(**swapped)}", **swapped)


@prop(LOSS, "a margin of hundreds neither overflows nor loses the loss")
def _(fn, rng: random.Random):
    case = four(rng)
    case["policy_chosen_logp"] = -rng.choice([4000.0, 8000.0])
    near(fn, right_dpo(case), "log(sigmoid(x)) is log(0) for x below −745, −104 in float32: use logsigmoid, or log1p", **case)


# 06.3

IPO = exercise(
    "06.3",
    title="IPO's loss has a target",
    title_zh="IPO 的损失有目标值",
    statement="""Write `ipo_loss_and_grad(chosen_logratio, rejected_logratio, beta)`: the list [loss, derivative by chosen_logratio,
derivative by rejected_logratio] of one pair. A log-ratio is log(π/π_ref) of an answer. IPO's loss is the square of the
distance of their difference from 1/(2·beta) (Eq. 17 of arXiv:2310.12036, where beta is called τ).""",
    statement_zh="""写出 `ipo_loss_and_grad(chosen_logratio, rejected_logratio, beta)`：返回一对回答的列表 [损失, 对 chosen_logratio 的导数,
对 rejected_logratio 的导数]。对数比是一个回答的 log(π/π_ref)。IPO 的损失是两个对数比之差与 1/(2·beta) 的距离的平方（arXiv:2310.12036
式 17，文中 beta 记作 τ）。""",
    stub='''def ipo_loss_and_grad(chosen_logratio, rejected_logratio, beta):
    "[loss, derivative by chosen_logratio, derivative by rejected_logratio]"
    ...
''',
    solution='''def ipo_loss_and_grad(chosen_logratio, rejected_logratio, beta):
    "[loss, derivative by chosen_logratio, derivative by rejected_logratio]"
    distance = chosen_logratio - rejected_logratio - 1 / (2 * beta)
    return [distance**2, 2 * distance, -2 * distance]
''',
)


def right_ipo(chosen: float, rejected: float, beta: float) -> list[float]:
    d = (chosen - rejected) - 0.5 / beta
    return [d * d, 2 * d, -2 * d]


@prop(IPO, "at a difference of 1/(2·beta) the loss is 0, and nothing moves")
def _(fn, rng: random.Random):
    beta, rejected = rng.choice([0.125, 0.25, 0.5, 2.0]), rng.randint(-8, 8) / 4
    near(fn, [0.0, 0.0, 0.0], f"the target is {0.5 / beta}", chosen_logratio=rejected + 0.5 / beta, rejected_logratio=rejected, beta=beta)


@prop(IPO, "short of the target it pushes the answers apart")
def _(fn, rng: random.Random):
    beta, (rejected, below) = rng.choice([0.125, 0.25, 0.5]), quarters(rng, 2)
    chosen = rejected + 0.5 / beta - abs(below)
    near(fn, right_ipo(chosen, rejected, beta), "a negative derivative raises the chosen answer", chosen_logratio=chosen, rejected_logratio=rejected, beta=beta)


@prop(IPO, "beyond the target it pulls them together again, where DPO would go on for ever")
def _(fn, rng: random.Random):
    beta, (rejected, above) = rng.choice([0.125, 0.25, 0.5]), quarters(rng, 2)
    chosen = rejected + 0.5 / beta + abs(above)
    near(fn, right_ipo(chosen, rejected, beta), "a square has two sides", chosen_logratio=chosen, rejected_logratio=rejected, beta=beta)


@prop(IPO, "only the difference of the log-ratios counts")
def _(fn, rng: random.Random):
    beta, (chosen, rejected, shift) = rng.choice([0.25, 0.5, 2.0]), quarters(rng, 3)
    near(fn, right_ipo(chosen, rejected, beta), "moving both by the same amount changes nothing: the chosen answer may fall", chosen_logratio=chosen + shift, rejected_logratio=rejected + shift, beta=beta)


# 06.4

SIMPO = exercise(
    "06.4",
    title="SimPO's length-normalised margin",
    title_zh="SimPO 的长度归一化间隔",
    statement="""Write `simpo_loss(chosen_logps, rejected_logps, beta, gamma)`: SimPO's loss of one pair. The two lists hold the
log-probabilities of the tokens of each answer under the policy; the answers have different lengths. An answer's reward is
beta times the *mean* log-probability of its tokens. There is no reference. The chosen reward should exceed the rejected
one by `gamma`: the loss is −log σ(difference of the rewards − gamma), Eq. 6 of arXiv:2405.14734.""",
    statement_zh="""写出 `simpo_loss(chosen_logps, rejected_logps, beta, gamma)`：一对回答的 SimPO 损失。两个列表是两个回答的各 token 在策略下的对数概率，
长度不同。一个回答的奖励是 beta 乘以其各 token 对数概率的**平均值**，没有参考模型。优选回答的奖励应比拒绝回答高出 `gamma`：损失为
−log σ(奖励之差 − gamma)，见 arXiv:2405.14734 式 6。""",
    stub='''def simpo_loss(chosen_logps, rejected_logps, beta, gamma):
    "Loss of one pair, nats."
    ...
''',
    solution='''def simpo_loss(chosen_logps, rejected_logps, beta, gamma):
    "Loss of one pair, nats."
    import math
    mean = lambda logps: sum(logps) / len(logps)
    margin = beta * (mean(chosen_logps) - mean(rejected_logps)) - gamma
    return math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)
''',
)


def simpo_case(rng: random.Random) -> dict:
    short, long = rng.randint(1, 3), rng.randint(5, 8)
    lengths = [short, long] if rng.random() < 0.5 else [long, short]
    rows = [[-rng.randint(1, 12) / 4 for _ in range(n)] for n in lengths]
    return {"chosen_logps": rows[0], "rejected_logps": rows[1], "beta": rng.choice([2.0, 2.5]), "gamma": rng.choice([0.5, 1.0, 1.5])}


def right_simpo(chosen_logps: list, rejected_logps: list, beta: float, gamma: float) -> float:
    gap = math.fsum(chosen_logps) / len(chosen_logps) - math.fsum(rejected_logps) / len(rejected_logps)
    return softplus(gamma - beta * gap)


@prop(SIMPO, "at a reward difference of gamma the loss is log 2")
def _(fn, rng: random.Random):
    beta, gamma, base = rng.choice([2.0, 4.0]), rng.choice([0.5, 1.0]), -rng.randint(8, 16) / 4
    case = {"chosen_logps": [base + gamma / beta], "rejected_logps": [base], "beta": beta, "gamma": gamma}
    near(fn, math.log(2), "gamma is taken off the margin, and beta scales the rewards, not gamma", **case)


@prop(SIMPO, "where both answers are equally likely a token the loss is −log σ(−gamma)")
def _(fn, rng: random.Random):
    base, gamma = -rng.randint(1, 16) / 4, rng.choice([0.5, 1.0, 1.5])
    case = {"chosen_logps": [base] * rng.randint(1, 3), "rejected_logps": [base] * rng.randint(4, 6), "beta": 2.0, "gamma": gamma}
    near(fn, softplus(gamma), "means, not sums: a longer answer is not less likely a token", **case)


@prop(SIMPO, "the reward is a mean over the answer's own tokens")
def _(fn, rng: random.Random):
    case = simpo_case(rng)
    near(fn, right_simpo(**case), f"the answers have {len(case['chosen_logps'])} and {len(case['rejected_logps'])} tokens", **case)


@prop(SIMPO, "writing an answer twice changes nothing")
def _(fn, rng: random.Random):
    case = simpo_case(rng)
    expected = right_simpo(**case)
    key = rng.choice(["chosen_logps", "rejected_logps"])
    near(fn, expected, f"{key} twice: the same mean", **{**case, key: case[key] * 2})


# 06.5

DISPLACED = exercise(
    "06.5",
    title="Which pairs displace",
    title_zh="哪些偏好对会造成位移",
    statement="""Write `chosen_rate(embeddings, hidden, chosen, rejected)`: how fast the chosen answer's own log-probability changes in a DPO
step. The answers are single tokens. The model is the softmax of the scalar products of `hidden` with the rows of
`embeddings`, one row a token. A step of DPO moves `hidden` along the gradient of log π(chosen) − log π(rejected); asked is
the derivative of log π(chosen) in that direction (per unit of step, without beta and the loss's weight). Where it is
negative, the step that prefers the chosen answer makes it *less* likely.""",
    statement_zh="""写出 `chosen_rate(embeddings, hidden, chosen, rejected)`：在一步 DPO 中，优选回答自身的对数概率变化多快。回答都是单个 token。模型是
`hidden` 与 `embeddings` 各行（每行一个 token）的内积再取 softmax。一步 DPO 使 `hidden` 沿 log π(chosen) − log π(rejected) 的梯度移动；要求的是
log π(chosen) 沿该方向的导数（按单位步长，不含 beta 和损失的权重）。导数为负时，偏好优选回答的这一步反而使它**更不**可能。""",
    stub='''def chosen_rate(embeddings, hidden, chosen, rejected):
    "Derivative of log π(chosen) along the step of hidden."
    ...
''',
    solution='''def chosen_rate(embeddings, hidden, chosen, rejected):
    "Derivative of log π(chosen) along the step of hidden."
    import torch
    E, h = torch.tensor(embeddings), torch.tensor(hidden)
    mean = (E @ h).softmax(0) @ E  # the embedding that the model expects
    step = E[chosen] - E[rejected]  # the normaliser is the same for both
    return float((E[chosen] - mean) @ step)
''',
)


def small_model(rng: random.Random) -> dict:
    width, n = rng.randint(2, 4), rng.randint(3, 5)
    chosen, rejected = rng.sample(range(n), 2)
    return {"embeddings": [quarters(rng, width, -6, 6) for _ in range(n)], "hidden": quarters(rng, width, -4, 4), "chosen": chosen, "rejected": rejected}


def logp(E: list, h: list, k: int) -> float:
    z = [math.fsum(a * b for a, b in zip(row, h)) for row in E]
    top = max(z)
    return z[k] - top - math.log(math.fsum(math.exp(x - top) for x in z))


def rate(embeddings: list, hidden: list, chosen: int, rejected: int, of: int | None = None) -> float:
    "Central difference along the step."
    step = [a - b for a, b in zip(embeddings[chosen], embeddings[rejected])]
    k, size = chosen if of is None else of, 1e-4
    moved = [[h + s * size * d for h, d in zip(hidden, step)] for s in (1, -1)]
    return (logp(embeddings, moved[0], k) - logp(embeddings, moved[1], k)) / (2 * size)


@prop(DISPLACED, "with unrelated embeddings the chosen answer gains: 1 − π(chosen) + π(rejected)")
def _(fn, rng: random.Random):
    case = small_model(rng)
    n = len(case["embeddings"])
    case |= {"embeddings": [[float(i == j) for j in range(n)] for i in range(n)], "hidden": quarters(rng, n, -4, 4)}
    p = [math.exp(logp(case["embeddings"], case["hidden"], k)) for k in range(n)]
    near(fn, 1 - p[case["chosen"]] + p[case["rejected"]], "one-hot embeddings: every token has a logit of its own", **case)


@prop(DISPLACED, "two answers that look alike, beside a third that lies further along the step: both fall")
def _(fn, rng: random.Random):
    small, far = rng.choice([0.25, 0.5]), rng.choice([3.0, 4.0])
    case = {"embeddings": [[1.0, small], [1.0, 0.0], [0.0, far]], "hidden": [rng.choice([1.0, 1.5]), 0.25], "chosen": 0, "rejected": 1}
    near(fn, rate(**case), "negative: the freed probability goes to token 2", rtol=1e-4, atol=1e-4, **case)


@prop(DISPLACED, "it agrees with a difference of log π(chosen) along the step")
def _(fn, rng: random.Random):
    case = small_model(rng)
    near(fn, rate(**case), "the step is E[chosen] − E[rejected]; log π(chosen) has the gradient E[chosen] − Σ π E", rtol=1e-4, atol=1e-4, **case)


@prop(DISPLACED, "with chosen and rejected exchanged the two rates add up to |E[chosen] − E[rejected]|²")
def _(fn, rng: random.Random):
    case = small_model(rng)
    square = math.fsum((a - b) ** 2 for a, b in zip(case["embeddings"][case["chosen"]], case["embeddings"][case["rejected"]]))
    other = call(fn, **{**case, "chosen": case["rejected"], "rejected": case["chosen"]})
    if not isinstance(other, int | float):
        raise Mismatch(described(fn, case), repr(other), "a number")
    near(fn, square - other, "the margin itself always grows, and it grows by this square", rtol=1e-4, atol=1e-4, **case)
