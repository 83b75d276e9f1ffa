"Exercises of chapter 5, RLHF: token rewards, advantages by recursion and by group, clipping, KL estimators, the optimum."

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from ..checker import Mismatch, call, exercise, prop


def described(fn: Callable, arguments: dict) -> str:
    return f"{getattr(fn, '__name__', 'fn')}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


def is_near(returned: Any, expected: Any, rtol: float, atol: float) -> bool:
    "Equal within float32's rounding, lists element by element. NaN equals nothing."
    if isinstance(expected, list):
        return isinstance(returned, list) and len(returned) == len(expected) and all(is_near(a, b, rtol, atol) for a, b in zip(returned, expected))
    if isinstance(returned, bool) or not isinstance(returned, int | float):
        return False
    return math.isclose(returned, expected, rel_tol=rtol, abs_tol=atol)


def near(fn: Callable, expected: Any, why: str = "", rtol: float = 2e-5, atol: float = 2e-6, **arguments: Any) -> Any:
    "`compare` for answers with exponentials and logarithms: a reader may compute in float32."
    returned = call(fn, **arguments)
    if not is_near(returned, expected, rtol, atol):
        raise Mismatch(described(fn, arguments), repr(returned)[:600], repr(expected)[:600], why)
    return returned


def quarters(rng: random.Random, n: int, low: int = -8, high: int = 8) -> list[float]:
    "Numbers that float32 holds exactly, none of them zero."
    return [rng.choice([k for k in range(low, high + 1) if k]) / 4 for _ in range(n)]


def distribution(rng: random.Random, n: int) -> list[float]:
    "Probabilities that are neither tiny nor equal."
    weights = [rng.uniform(0.2, 1.0) ** 2 for _ in range(n)]
    return [w / sum(weights) for w in weights]


# 05.1

REWARDS = exercise(
    "05.1",
    title="The reward of every token",
    title_zh="每个 token 的奖励",
    statement="""Write `token_rewards(score, logps, ref_logps, mask, beta)`: the rewards that PPO gives to the tokens of one answer.
`score` is the reward model's verdict on the whole answer. `logps` and `ref_logps` are the log-probabilities of its tokens
under the policy and under the reference, `mask` is 1 at its tokens and 0 at padding, which may stand on either side.
Every token pays `beta` times the difference of the two log-probabilities; the last token of the answer gets the score on
top. Padding gets 0, whatever stands there.""",
    statement_zh="""写出 `token_rewards(score, logps, ref_logps, mask, beta)`：PPO 给一个回答的各个 token 的奖励。`score` 是奖励模型对整个回答的打分；
`logps` 与 `ref_logps` 是各 token 在策略和参考模型下的对数概率；`mask` 在回答的 token 处为 1，填充处为 0，填充可能在任意一侧。每个 token
付出 `beta` 乘以两个对数概率之差；回答的最后一个 token 再加上打分。填充处无论是什么值，奖励都为 0。""",
    stub='''def token_rewards(score, logps, ref_logps, mask, beta):
    "Reward of each token of one answer, nats."
    ...
''',
    solution='''def token_rewards(score, logps, ref_logps, mask, beta):
    "Reward of each token of one answer, nats."
    rewards = [-beta * (p - q) if m else 0.0 for p, q, m in zip(logps, ref_logps, mask)]
    last = max(t for t, m in enumerate(mask) if m)  # by the mask: the end token may have the padding token's id
    rewards[last] += score
    return rewards
''',
)


def answer_case(rng: random.Random, pad: tuple[int, int] | None = None, junk: float = 0.0) -> dict:
    left, right = (rng.randint(0, 2), rng.randint(0, 2)) if pad is None else pad
    n = rng.randint(2, 4)
    row = lambda: [junk] * left + [-rng.randint(1, 16) / 4 for _ in range(n)] + [junk] * right
    return {
        "score": rng.choice([-3.0, -1.5, 0.5, 2.0, 4.25]), "logps": row(), "ref_logps": row(),
        "mask": [0] * left + [1] * n + [0] * right, "beta": rng.choice([0.25, 0.5, 2.0]),
    }  # fmt: skip


def right_rewards(score: float, logps: list, ref_logps: list, mask: list, beta: float) -> list[float]:
    last = len(mask) - 1 - mask[::-1].index(1)
    return [(beta * (ref_logps[t] - logps[t]) if mask[t] else 0.0) + (score if t == last else 0.0) for t in range(len(mask))]


@prop(REWARDS, "where policy and reference agree there is only the score, at the last token")
def _(fn, rng: random.Random):
    case = answer_case(rng, pad=(0, 0))
    case["ref_logps"] = list(case["logps"])
    near(fn, right_rewards(**case), "the reward model speaks once, about the whole answer", **case)


@prop(REWARDS, "a token that the policy likes more than the reference does pays for it")
def _(fn, rng: random.Random):
    case = answer_case(rng, pad=(0, 0))
    near(fn, right_rewards(**case), "log π above log π_ref is a cost: −beta·(logp − ref_logp) at every token, the last included", **case)


@prop(REWARDS, "the last token of the answer is found by the mask, on either side of the padding")
def _(fn, rng: random.Random):
    case = answer_case(rng, pad=rng.choice([(2, 0), (0, 2), (1, 2)]))
    near(fn, right_rewards(**case), "the last column may be padding, and so may the first", **case)


@prop(REWARDS, "what stands at a padded position does not count")
def _(fn, rng: random.Random):
    case = answer_case(rng, pad=rng.choice([(2, 1), (1, 2)]), junk=rng.choice([1e6, -math.inf, math.nan]))
    near(fn, right_rewards(**case), "choose, do not multiply: 0 times nan is nan", **case)


@prop(REWARDS, "over the answer they add up to the objective: score minus beta times the log-ratio")
def _(fn, rng: random.Random):
    case = answer_case(rng)
    returned = call(fn, **case)
    ratio = math.fsum(p - q for p, q, m in zip(case["logps"], case["ref_logps"], case["mask"]) if m)
    expected = case["score"] - case["beta"] * ratio
    if not is_near(math.fsum(returned), expected, 2e-5, 2e-6):
        raise Mismatch(described(fn, case), f"{returned}, together {math.fsum(returned)}", f"rewards that add up to {expected}")


# 05.2

GAE = exercise(
    "05.2",
    title="Generalised advantage estimation",
    title_zh="广义优势估计（GAE）",
    statement="""Write `gae(rewards, values, mask, gamma, lam)`: the advantages of the tokens of one answer, as a list. `values[t]` is the
estimated value of the state in which token t is written. `mask` is 1 at the answer's tokens, which stand together, and 0 at
padding on either side: padding does not exist, whatever stands there, and its advantage is 0. The advantage at t is the sum
over l of (gamma·lam)^l times the error r + gamma·V(next) − V at t + l. After the last token nothing follows: its V(next)
is 0. One backward recursion is enough.""",
    statement_zh="""写出 `gae(rewards, values, mask, gamma, lam)`：一个回答各 token 的优势，返回列表。`values[t]` 是写出第 t 个 token 时所处状态的估计价值。
`mask` 在回答的 token 处为 1（它们连在一起），两侧填充处为 0：填充视为不存在，无论那里是什么值，其优势为 0。t 处的优势是对 l 求和：
(gamma·lam)^l 乘以 t + l 处的误差 r + gamma·V(下一个) − V。最后一个 token 之后什么都没有，它的 V(下一个) 为 0。从后往前递推一遍即可。""",
    stub='''def gae(rewards, values, mask, gamma, lam):
    "Advantage of each token of one answer."
    ...
''',
    solution='''def gae(rewards, values, mask, gamma, lam):
    "Advantage of each token of one answer."
    advantages = [0.0] * len(rewards)
    advantage = value = 0.0  # of the token after: nothing follows the last one
    for t in reversed(range(len(rewards))):
        if mask[t]:
            advantage = rewards[t] + gamma * value - values[t] + gamma * lam * advantage
            advantages[t], value = advantage, values[t]
    return advantages
''',
)


def gae_case(rng: random.Random, pad: tuple[int, int] = (0, 0), junk: float = 7.0, **fixed: float) -> dict:
    left, right = pad
    n = rng.randint(2, 4)
    row = lambda: [junk] * left + quarters(rng, n) + [junk] * right
    case = {"rewards": row(), "values": row(), "mask": [0] * left + [1] * n + [0] * right}
    return {**case, "gamma": rng.choice([1.0, 0.5]), "lam": rng.choice([0.5, 0.75]), **fixed}


def gae_as_sum(rewards: list, values: list, mask: list, gamma: float, lam: float) -> list[float]:
    there = [t for t, m in enumerate(mask) if m]
    r, v = [rewards[t] for t in there], [values[t] for t in there] + [0.0]
    errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
    sums = [math.fsum((gamma * lam) ** l * e for l, e in enumerate(errors[t:])) for t in range(len(r))]
    return [sums[t - there[0]] if m else 0.0 for t, m in enumerate(mask)]


@prop(GAE, "after the last token the value is 0: its advantage is its reward minus its value")
def _(fn, rng: random.Random):
    case = gae_case(rng)
    case = {**case, "rewards": case["rewards"][:1], "values": case["values"][:1], "mask": [1]}
    near(fn, [case["rewards"][0] - case["values"][0]], "the answer is over: there is no next state to take a value from", **case)


@prop(GAE, "with lam = 0 it is the one-step error, discounted by gamma")
def _(fn, rng: random.Random):
    case = gae_case(rng, lam=0.0)
    near(fn, gae_as_sum(**case), "r + gamma·V(next) − V", **case)


@prop(GAE, "with lam = 1 it is the discounted sum of the rewards to come, minus the value")
def _(fn, rng: random.Random):
    case = gae_case(rng, lam=1.0)
    r, gamma = case["rewards"], case["gamma"]
    expected = [math.fsum(gamma**l * x for l, x in enumerate(r[t:])) - case["values"][t] for t in range(len(r))]
    near(fn, expected, "the values of later states cancel: sum from the end of the answer backwards", **case)


@prop(GAE, "in between, errors further away weigh (gamma·lam)^l")
def _(fn, rng: random.Random):
    case = gae_case(rng)
    near(fn, gae_as_sum(**case), "both gamma and lam shrink a later error, and no value is added to the advantage", **case)


@prop(GAE, "padding on either side does not exist, whatever stands there")
def _(fn, rng: random.Random):
    case = gae_case(rng, pad=rng.choice([(2, 0), (0, 2), (1, 1)]), junk=rng.choice([7.0, 1e6, math.nan]))
    near(fn, gae_as_sum(**case), "the recursion starts at the last token with mask 1", **case)


# 05.3

CLIP = exercise(
    "05.3",
    title="PPO's clipped objective for one token",
    title_zh="一个 token 的 PPO 裁剪目标",
    statement="""Write `clipped_objective(logp, old_logp, advantage, clip_eps)`: the pair (objective, gradient) of one token. The objective,
which is *maximised*, is the smaller of ratio·advantage and clipped ratio·advantage, where the ratio is that of the token's
probability now to its probability when it was sampled, and is clipped to [1 − clip_eps, 1 + clip_eps]. The gradient is
the objective's derivative with respect to `logp`. No ratio is exactly at an end of the interval.""",
    statement_zh="""写出 `clipped_objective(logp, old_logp, advantage, clip_eps)`：一个 token 的 (目标, 梯度)。目标是要**最大化**的量：“比率·优势”与“裁剪后的
比率·优势”中较小的一个。比率是该 token 现在的概率与采样时的概率之比，裁剪到 [1 − clip_eps, 1 + clip_eps]。梯度是目标对 `logp` 的导数。
比率不会恰好落在区间端点上。""",
    stub='''def clipped_objective(logp, old_logp, advantage, clip_eps):
    "(objective to be maximised, its derivative by logp)"
    ...
''',
    solution='''def clipped_objective(logp, old_logp, advantage, clip_eps):
    "(objective to be maximised, its derivative by logp)"
    import math
    ratio = math.exp(logp - old_logp)
    clipped = min(max(ratio, 1 - clip_eps), 1 + clip_eps) * advantage
    if ratio * advantage <= clipped:  # d ratio / d logp is the ratio
        return ratio * advantage, ratio * advantage
    return clipped, 0.0
''',
)


def token_case(rng: random.Random, sign: int, where: str) -> tuple[dict, float]:
    "Arguments whose ratio lies inside, above or below the interval, and the ratio."
    eps = rng.choice([0.1, 0.2, 0.3])
    ratio = {"inside": rng.uniform(1 - 0.8 * eps, 1 + 0.8 * eps), "above": 1 + eps * rng.uniform(1.3, 4), "below": (1 - eps) * rng.uniform(0.3, 0.9)}[where]
    old = -rng.uniform(0.5, 5)
    return {"logp": old + math.log(ratio), "old_logp": old, "advantage": sign * rng.uniform(0.3, 3), "clip_eps": eps}, ratio


@prop(CLIP, "before the first step the objective is the advantage, and so is the gradient")
def _(fn, rng: random.Random):
    case, _ = token_case(rng, rng.choice([-1, 1]), "inside")
    case["logp"] = case["old_logp"]
    near(fn, [case["advantage"]] * 2, "the ratio is 1; it is an objective, not a loss: no minus sign", **case)


@prop(CLIP, "inside the interval objective and gradient are ratio times advantage")
def _(fn, rng: random.Random):
    case, ratio = token_case(rng, rng.choice([-1, 1]), "inside")
    near(fn, [ratio * case["advantage"]] * 2, f"the ratio exp(logp − old_logp) is {ratio:.4f}, and its derivative by logp is itself", **case)


@prop(CLIP, "a good token above the interval gains nothing more: the clipped value, gradient 0")
def _(fn, rng: random.Random):
    case, ratio = token_case(rng, 1, "above")
    near(fn, [(1 + case["clip_eps"]) * case["advantage"], 0.0], f"the ratio is {ratio:.4f}, the advantage positive", **case)


@prop(CLIP, "a bad token below the interval gains nothing more: the clipped value, gradient 0")
def _(fn, rng: random.Random):
    case, ratio = token_case(rng, -1, "below")
    near(fn, [(1 - case["clip_eps"]) * case["advantage"], 0.0], f"the ratio is {ratio:.4f}, the advantage negative: the lower end clips", **case)


@prop(CLIP, "a token that went the wrong way is not clipped: it can come back")
def _(fn, rng: random.Random):
    case, ratio = token_case(rng, *rng.choice([(1, "below"), (-1, "above")]))
    why = f"the ratio is {ratio:.4f} and the unclipped product is the smaller one: clipping alone, without the minimum, would take its gradient away"
    near(fn, [ratio * case["advantage"]] * 2, why, **case)


# 05.4

GROUP = exercise(
    "05.4",
    title="Group-relative advantages",
    title_zh="组内相对优势",
    statement="""Write `group_advantages(rewards, group_size, scale=True)`: GRPO's advantages. `rewards` is a flat list in which the
`group_size` answers to one prompt stand together. An answer's advantage is its reward minus the mean of its group; with
`scale` it is divided by the group's sample standard deviation (with n − 1, as in TRL) plus 0.0001. A group whose rewards
are all equal has advantages of 0.""",
    statement_zh="""写出 `group_advantages(rewards, group_size, scale=True)`：GRPO 的优势。`rewards` 是一个平铺的列表，同一提示的 `group_size` 个回答排在
一起。一个回答的优势是其奖励减去所在组的平均值；`scale` 为真时，再除以“组内样本标准差（除以 n − 1，与 TRL 相同）加 0.0001”。组内奖励
全部相同时，优势为 0。""",
    stub='''def group_advantages(rewards, group_size, scale=True):
    "Advantage of each answer, compared with its group."
    ...
''',
    solution='''def group_advantages(rewards, group_size, scale=True):
    "Advantage of each answer, compared with its group."
    import statistics
    advantages = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        spread = statistics.stdev(group) + 1e-4 if scale else 1.0
        advantages += [(r - statistics.fmean(group)) / spread for r in group]
    return advantages
''',
)


def groups(rng: random.Random, scale: bool, n_groups: int | None = None) -> dict:
    "Groups whose means differ much, each with different rewards."
    size = rng.randint(2, 5)
    rewards = []
    for k in range(n_groups or rng.randint(2, 3)):
        rewards += [k * 16 + r for r in rng.sample([q / 4 for q in range(-8, 9)], size)]
    return {"rewards": rewards, "group_size": size, "scale": scale}


def right_groups(rewards: list, group_size: int, scale: bool) -> list[float]:
    out = []
    for k in range(0, len(rewards), group_size):
        g = rewards[k : k + group_size]
        mean = math.fsum(g) / len(g)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in g) / (len(g) - 1))
        out += [(r - mean) / (std + 1e-4 if scale else 1.0) for r in g]
    return out


@prop(GROUP, "unscaled, it is the reward minus the mean of its own group")
def _(fn, rng: random.Random):
    case = groups(rng, False)
    near(fn, right_groups(**case), "all answers of the group, this one included; the neighbours in the list are the group", atol=1e-5, **case)


@prop(GROUP, "scaled, it is divided by the group's standard deviation with n − 1, plus 0.0001")
def _(fn, rng: random.Random):
    case = groups(rng, True, n_groups=1)
    near(fn, right_groups(**case), "a division by n makes the deviation too small, most of all for small groups", atol=1e-5, **case)


@prop(GROUP, "scaled, every group is divided by its own deviation")
def _(fn, rng: random.Random):
    case = groups(rng, True)
    near(fn, right_groups(**case), "easy and hard prompts are made equal: this is what Dr. GRPO objects to", atol=1e-5, **case)


@prop(GROUP, "a constant added to all rewards of a prompt changes nothing")
def _(fn, rng: random.Random):
    case = groups(rng, rng.random() < 0.5)
    moved = list(case["rewards"])
    for i in range(case["group_size"]):
        moved[i] += 8.0
    near(fn, right_groups(**case), "only the comparison within a group counts", atol=1e-5, **{**case, "rewards": moved})


@prop(GROUP, "a group whose rewards are all equal teaches nothing: advantages 0, no division by zero")
def _(fn, rng: random.Random):
    size = rng.randint(2, 5)
    near(fn, [0.0] * size, **{"rewards": [rng.choice([0.0, 1.0])] * size, "group_size": size, "scale": rng.random() < 0.7})


# 05.5

KL = exercise(
    "05.5",
    title="Three estimators of the KL",
    title_zh="KL 的三种估计",
    statement="""Write `kl_estimates(logp, ref_logp)`: the list [k1, k2, k3] for one sampled token: Schulman's three estimates of
KL(policy ‖ reference), from the token's log-probability under the policy that sampled it and under the reference. k1 is the
plain log-ratio, k2 is half its square, and k3 is k1 with a term of expectation zero added that keeps it from being negative:
the ratio reference to policy, minus 1.""",
    statement_zh="""写出 `kl_estimates(logp, ref_logp)`：对一个采样到的 token 返回列表 [k1, k2, k3]，即 Schulman 对 KL(策略 ‖ 参考) 的三种估计；输入是该 token
在采样它的策略下和在参考模型下的对数概率。k1 就是对数比；k2 是其平方的一半；k3 是 k1 加上一个期望为零、使其不为负的项：参考与策略的
概率比减 1。""",
    stub='''def kl_estimates(logp, ref_logp):
    "[k1, k2, k3], nats"
    ...
''',
    solution='''def kl_estimates(logp, ref_logp):
    "[k1, k2, k3], nats"
    import math
    k1 = logp - ref_logp
    return [k1, k1**2 / 2, k1 + math.exp(-k1) - 1]
''',
)


def both_policies(rng: random.Random) -> tuple[list[float], list[float], float]:
    "Two distributions that differ, and KL(first ‖ second)."
    while True:
        n = rng.randint(2, 5)
        p, q = distribution(rng, n), distribution(rng, n)
        kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q))
        if kl > 0.05:
            return p, q, kl


def expected_estimates(fn, p: list[float], q: list[float]) -> list[list[float]]:
    "What the function returns for each token of the vocabulary."
    out = []
    for a, b in zip(p, q):
        case = {"logp": math.log(a), "ref_logp": math.log(b)}
        found = call(fn, **case)
        if not isinstance(found, list) or len(found) != 3 or not all(isinstance(x, int | float) and math.isfinite(x) for x in found):
            raise Mismatch(described(fn, case), repr(found), "[k1, k2, k3]")
        out.append(found)
    return out


@prop(KL, "where policy and reference agree all three are zero")
def _(fn, rng: random.Random):
    logp = -rng.uniform(0.1, 6)
    near(fn, [0.0, 0.0, 0.0], logp=logp, ref_logp=logp)


@prop(KL, "k1 is the log-ratio of policy to reference, k2 half its square")
def _(fn, rng: random.Random):
    case = {"logp": -rng.uniform(0.1, 4), "ref_logp": -rng.uniform(0.1, 4)}
    returned, k1 = call(fn, **case), case["logp"] - case["ref_logp"]
    if not isinstance(returned, list) or not is_near(returned[:2], [k1, k1 * k1 / 2], 2e-5, 2e-6):
        raise Mismatch(described(fn, case), repr(returned), f"[{k1}, {k1 * k1 / 2}, k3]", "the policy that sampled stands in the numerator")


@prop(KL, "k3 is never negative")
def _(fn, rng: random.Random):
    p, q, _ = both_policies(rng)
    for a, b, found in zip(p, q, expected_estimates(fn, p, q)):
        if found[2] < -1e-6:
            raise Mismatch(described(fn, {"logp": math.log(a), "ref_logp": math.log(b)}), repr(found), "a k3 of at least 0")


@prop(KL, "averaged over the policy's tokens, k1 and k3 are the KL of the policy from the reference")
def _(fn, rng: random.Random):
    p, q, kl = both_policies(rng)
    rows = expected_estimates(fn, p, q)
    found = [math.fsum(a * row[k] for a, row in zip(p, rows)) for k in (0, 2)]
    if not is_near(found, [kl, kl], 2e-5, 2e-6):
        text = f"{getattr(fn, '__name__', 'fn')}(logp, ref_logp) for each token of policy {p} and reference {q}"
        why = "in k3 the ratio is reference to policy, exp(ref_logp − logp): only that has expectation 1 under the policy"
        raise Mismatch(text, f"means k1 {found[0]}, k3 {found[1]}", f"{kl} for both", why)


# 05.6

OPTIMUM = exercise(
    "05.6",
    title="The best policy for a reward and a price",
    title_zh="给定奖励与代价时的最优策略",
    statement="""Write `optimal_policy(ref_probs, rewards, beta)`: the probabilities that maximise the expected reward minus `beta` times
KL(policy ‖ reference), over a finite set of answers. `ref_probs` and `rewards` are lists, one number an answer. An answer
that the reference never gives is never given. Rewards over `beta` may be in the thousands.""",
    statement_zh="""写出 `optimal_policy(ref_probs, rewards, beta)`：在有限个回答上，使“期望奖励减去 `beta` 乘以 KL(策略 ‖ 参考)”最大的概率。`ref_probs` 与
`rewards` 是列表，每个回答一个数。参考模型从不给出的回答，最优策略也从不给出。奖励除以 `beta` 可能上千。""",
    stub='''def optimal_policy(ref_probs, rewards, beta):
    "Probabilities of the optimal policy."
    ...
''',
    solution='''def optimal_policy(ref_probs, rewards, beta):
    "Probabilities of the optimal policy."
    import math
    best = max(r for p, r in zip(ref_probs, rewards) if p)  # exp of large numbers overflows: Z cancels any constant
    weights = [p * math.exp((r - best) / beta) if p else 0.0 for p, r in zip(ref_probs, rewards)]
    return [w / sum(weights) for w in weights]
''',
)


def tilted(ref_probs: list, rewards: list, beta: float) -> list[float]:
    logs = [math.log(p) + r / beta if p else -math.inf for p, r in zip(ref_probs, rewards)]
    top = max(logs)
    weights = [math.exp(x - top) for x in logs]
    return [w / math.fsum(weights) for w in weights]


def bandit(rng: random.Random) -> dict:
    n = rng.randint(2, 5)
    return {"ref_probs": distribution(rng, n), "rewards": quarters(rng, n), "beta": rng.choice([0.5, 1.5, 3.0])}


@prop(OPTIMUM, "they are probabilities: positive, with sum 1")
def _(fn, rng: random.Random):
    case = bandit(rng)
    returned = call(fn, **case)
    good = isinstance(returned, list) and len(returned) == len(case["rewards"]) and all(isinstance(x, int | float) and x > 0 for x in returned)
    if not good or abs(math.fsum(returned) - 1) > 1e-5:
        raise Mismatch(described(fn, case), repr(returned), "probabilities with sum 1", "the normaliser Z sums the reference's probability times exp(r/beta)")


@prop(OPTIMUM, "no other policy has a higher objective")
def _(fn, rng: random.Random):
    case = bandit(rng)
    returned = call(fn, **case)
    objective = lambda pi: math.fsum(a * (r - case["beta"] * math.log(a / b)) for a, b, r in zip(pi, case["ref_probs"], case["rewards"]) if a > 0)
    best = tilted(**case)
    if objective(returned) < objective(best) - 1e-5:
        text = f"{returned}, with objective {objective(returned):.6f}"
        why = "the reference tilted by exp(reward/beta): a smaller beta tilts more, and equal rewards leave the reference"
        raise Mismatch(described(fn, case), text, f"{best}, with {objective(best):.6f}", why)


@prop(OPTIMUM, "equal rewards leave the reference as it is")
def _(fn, rng: random.Random):
    case = bandit(rng)
    case["rewards"] = [case["rewards"][0]] * len(case["rewards"])
    near(fn, case["ref_probs"], **case)


@prop(OPTIMUM, "an answer that the reference never gives is never given, however good")
def _(fn, rng: random.Random):
    case = bandit(rng)
    case["ref_probs"], case["rewards"] = [0.0, *case["ref_probs"]], [9.0, *case["rewards"]]
    near(fn, tilted(**case), "its KL would be infinite", **case)


@prop(OPTIMUM, "large rewards do not overflow")
def _(fn, rng: random.Random):
    case = bandit(rng)
    case["rewards"] = [r + rng.choice([2000.0, -2000.0]) * case["beta"] for r in case["rewards"]]
    case["rewards"][0] = max(case["rewards"]) - 0.25
    near(fn, tilted(**case), "a constant taken off all rewards changes nothing: take off the largest", rtol=1e-3, atol=1e-6, **case)
