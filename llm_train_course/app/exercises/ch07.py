"Exercises of chapter 7, distillation: loss with T², divergences, text of whom, top-k with a bucket, speculative decoding."

from __future__ import annotations

import math
import random

from ..checker import Mismatch, call, exercise, prop
from .ch05 import described, distribution, is_near, near, quarters

IGNORE = -100


def softmax(z: list[float], T: float = 1.0) -> list[float]:
    top = max(z)
    weights = [math.exp((x - top) / T) for x in z]
    return [w / math.fsum(weights) for w in weights]


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


# 07.1

LOSS = exercise(
    "07.1",
    title="Hinton's loss",
    title_zh="Hinton 的蒸馏损失",
    statement="""Write `distill_loss(student_logits, teacher_logits, labels, alpha, temperature)`: alpha times the cross-entropy with the
labels, plus (1 − alpha) times T² times KL(teacher ‖ student), where both distributions of the KL are at temperature T and the
cross-entropy is at temperature 1. Rows are positions; the answer is the mean over the positions whose label is not -100,
for both terms, and 0 if there is none.""",
    statement_zh="""写出 `distill_loss(student_logits, teacher_logits, labels, alpha, temperature)`：alpha 乘以与标签的交叉熵，加上 (1 − alpha) 乘以 T² 乘以
KL(教师 ‖ 学生)；KL 的两个分布都在温度 T 下，交叉熵在温度 1 下。每行是一个位置；两项都只对标签不为 -100 的位置取平均，一个都没有时
为 0。""",
    stub='''def distill_loss(student_logits, teacher_logits, labels, alpha, temperature):
    "Mean loss over the positions with a label, nats."
    ...
''',
    solution='''def distill_loss(student_logits, teacher_logits, labels, alpha, temperature):
    "Mean loss over the positions with a label, nats."
    import torch
    import torch.nn.functional as F
    labels = torch.tensor(labels)
    keep = labels != -100
    if not keep.any():
        return 0.0
    z, t = torch.tensor(student_logits)[keep], torch.tensor(teacher_logits)[keep]
    hard = F.cross_entropy(z, labels[keep], reduction="sum")
    soft = F.kl_div((z / temperature).log_softmax(-1), (t / temperature).softmax(-1), reduction="sum")
    return (alpha * hard + (1 - alpha) * temperature**2 * soft) / keep.sum()
''',
)


def logit_rows(rng: random.Random, n: int, V: int) -> list[list[float]]:
    return [quarters(rng, V, -12, 12) for _ in range(n)]


def loss_case(rng: random.Random, n: int | None = None) -> dict:
    n, V = n or rng.randint(2, 4), rng.randint(3, 5)
    return {
        "student_logits": logit_rows(rng, n, V), "teacher_logits": logit_rows(rng, n, V), "labels": [rng.randrange(V) for _ in range(n)],
        "alpha": rng.choice([0.125, 0.25]), "temperature": rng.choice([2.0, 4.0]),
    }  # fmt: skip


def right_loss(student_logits: list, teacher_logits: list, labels: list, alpha: float, temperature: float) -> float:
    total, n = 0.0, 0
    for z, t, y in zip(student_logits, teacher_logits, labels):
        if y != IGNORE:
            soft = kl(softmax(t, temperature), softmax(z, temperature))
            total += alpha * -math.log(softmax(z)[y]) + (1 - alpha) * temperature**2 * soft
            n += 1
    return total / n if n else 0.0


@prop(LOSS, "with alpha = 1 it is the cross-entropy at temperature 1, whatever the teacher and T")
def _(fn, rng: random.Random):
    case = {**loss_case(rng, n=1), "alpha": 1.0}
    near(fn, right_loss(**case), "alpha weighs the hard labels", **case)


@prop(LOSS, "with alpha = 0 a student equal to the teacher has no loss")
def _(fn, rng: random.Random):
    case = {**loss_case(rng), "alpha": 0.0}
    case["student_logits"] = [[x + 1.0 for x in row] for row in case["teacher_logits"]]
    near(fn, 0.0, "a divergence, not a cross-entropy; a constant added to all logits changes nothing", atol=2e-5, **case)


@prop(LOSS, "at T = 1 the soft term is KL(teacher ‖ student), summed over the vocabulary")
def _(fn, rng: random.Random):
    case = {**loss_case(rng, n=1), "alpha": 0.0, "temperature": 1.0}
    back = kl(softmax(case["student_logits"][0]), softmax(case["teacher_logits"][0]))
    near(fn, right_loss(**case), f"forward: the teacher stands first and averages; the reverse is {back}", rtol=1e-4, **case)


@prop(LOSS, "at other temperatures both distributions are softened, and the term is multiplied by T²")
def _(fn, rng: random.Random):
    case = {**loss_case(rng, n=1), "alpha": 0.0}
    plain = right_loss(**case) / case["temperature"] ** 2
    near(fn, right_loss(**case), f"the KL at T = {case['temperature']:g} is {plain}; its gradient falls like 1/T², and T² makes up for it", rtol=1e-4, **case)


@prop(LOSS, "positions with the label -100 do not count, in either term")
def _(fn, rng: random.Random):
    case = loss_case(rng)
    expected = right_loss(**case)
    at = rng.randint(0, len(case["labels"]))
    V = len(case["student_logits"][0])
    for key, new in (("student_logits", quarters(rng, V)), ("teacher_logits", quarters(rng, V)), ("labels", IGNORE)):
        case[key] = case[key][:at] + [new] + case[key][at:]
    near(fn, expected, "a mean over the positions with a label", rtol=1e-4, **case)


@prop(LOSS, "without any label the loss is 0")
def _(fn, rng: random.Random):
    case = loss_case(rng)
    near(fn, 0.0, **{**case, "labels": [IGNORE] * len(case["labels"])})


# 07.2

JSD = exercise(
    "07.2",
    title="The generalised Jensen–Shannon divergence",
    title_zh="广义 Jensen–Shannon 散度",
    statement="""Write `generalized_jsd(teacher, student, beta)`: with the mixture m = beta·teacher + (1 − beta)·student it is
beta·KL(teacher ‖ m) + (1 − beta)·KL(student ‖ m), Eq. 1 of arXiv:2306.13649. `teacher` and `student` are lists of positive
probabilities. By convention (GKD's and TRL's) `beta=0` means KL(teacher ‖ student) and `beta=1` means KL(student ‖ teacher).""",
    statement_zh="""写出 `generalized_jsd(teacher, student, beta)`：令混合分布 m = beta·teacher + (1 − beta)·student，结果为 beta·KL(teacher ‖ m) +
(1 − beta)·KL(student ‖ m)，即 arXiv:2306.13649 式 1。`teacher` 与 `student` 是正的概率的列表。按 GKD 和 TRL 的约定，`beta=0` 表示
KL(teacher ‖ student)，`beta=1` 表示 KL(student ‖ teacher)。""",
    stub='''def generalized_jsd(teacher, student, beta):
    "Divergence in nats."
    ...
''',
    solution='''def generalized_jsd(teacher, student, beta):
    "Divergence in nats."
    import math
    kl = lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q))
    if beta in (0, 1):  # the formula is 0 there, for any two distributions
        return kl(student, teacher) if beta else kl(teacher, student)
    mixture = [beta * p + (1 - beta) * q for p, q in zip(teacher, student)]
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
''',
)


def two(rng: random.Random) -> dict:
    while True:
        n = rng.randint(2, 5)
        p, q = distribution(rng, n), distribution(rng, n)
        if abs(kl(p, q) - kl(q, p)) > 1e-3:
            return {"teacher": p, "student": q}


def right_jsd(teacher: list, student: list, beta: float) -> float:
    m = [beta * a + (1 - beta) * b for a, b in zip(teacher, student)]
    return beta * kl(teacher, m) + (1 - beta) * kl(student, m)


@prop(JSD, "at beta = 0 it is the forward divergence, KL(teacher ‖ student)")
def _(fn, rng: random.Random):
    case = two(rng)
    near(fn, kl(case["teacher"], case["student"]), f"the reverse would be {kl(case['student'], case['teacher'])}; the formula itself gives 0 there", **case, beta=0.0)


@prop(JSD, "at beta = 1 it is the reverse divergence, KL(student ‖ teacher)")
def _(fn, rng: random.Random):
    case = two(rng)
    near(fn, kl(case["student"], case["teacher"]), f"the forward would be {kl(case['teacher'], case['student'])}", **case, beta=1.0)


@prop(JSD, "at one half it is symmetric, and never above log 2")
def _(fn, rng: random.Random):
    case = two(rng)
    expected = right_jsd(**case, beta=0.5)
    near(fn, expected, "half of each KL, to the mixture", teacher=case["student"], student=case["teacher"], beta=0.5)
    sure = {"teacher": [1 - 1e-6, 1e-6], "student": [1e-6, 1 - 1e-6]}
    near(fn, right_jsd(**sure, beta=0.5), "close to log 2 for distributions that share nothing", **sure, beta=0.5)


@prop(JSD, "in between, beta weighs the teacher, in the mixture as well as outside")
def _(fn, rng: random.Random):
    case = {**two(rng), "beta": rng.choice([0.125, 0.25, 0.75])}
    near(fn, right_jsd(**case), "the mixture is of probabilities, not of logits or logarithms", **case)


# 07.3

CHAIN = exercise(
    "07.3",
    title="The divergence of two texts",
    title_zh="整段文本的散度",
    statement="""Write `sequence_kl(p_first, p_next, q_first, q_next)`: KL(p ‖ q) between two models' distributions over texts of two
tokens, by the chain rule. `p_first` are p's probabilities of the first token, `p_next[a]` those of the second token after
the first token a, and likewise for q. (With the student as p it is what on-policy distillation looks at: the prefixes are the
ones that the student writes.)""",
    statement_zh="""写出 `sequence_kl(p_first, p_next, q_first, q_next)`：用链式法则求两个模型在“两个 token 的文本”上的分布之间的 KL(p ‖ q)。`p_first` 是 p 给
第一个 token 的概率，`p_next[a]` 是第一个 token 为 a 时 p 给第二个 token 的概率，q 同理。（以学生为 p，就是同策略蒸馏所看的量：前缀由学生
写出。）""",
    stub='''def sequence_kl(p_first, p_next, q_first, q_next):
    "KL(p || q) over texts of two tokens, nats."
    ...
''',
    solution='''def sequence_kl(p_first, p_next, q_first, q_next):
    "KL(p || q) over texts of two tokens, nats."
    import math
    kl = lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q) if a)
    return kl(p_first, q_first) + sum(w * kl(p, q) for w, p, q in zip(p_first, p_next, q_next))  # p writes the prefix
''',
)


def two_models(rng: random.Random) -> dict:
    n = rng.randint(2, 3)
    table = lambda: [distribution(rng, n) for _ in range(n)]
    return {"p_first": distribution(rng, n), "p_next": table(), "q_first": distribution(rng, n), "q_next": table()}


def by_enumeration(p_first: list, p_next: list, q_first: list, q_next: list) -> float:
    texts = [(a, b) for a in range(len(p_first)) for b in range(len(p_next[a]))]
    p, q = ([first[a] * table[a][b] for a, b in texts] for first, table in ((p_first, p_next), (q_first, q_next)))
    return kl(p, q)


@prop(CHAIN, "equal models have no divergence")
def _(fn, rng: random.Random):
    case = two_models(rng)
    near(fn, 0.0, **{**case, "q_first": case["p_first"], "q_next": case["p_next"]})


@prop(CHAIN, "where the second tokens agree, it is the divergence of the first")
def _(fn, rng: random.Random):
    case = two_models(rng)
    case["q_next"] = [list(row) for row in case["p_next"]]
    near(fn, kl(case["p_first"], case["q_first"]), f"forward: p stands first; the reverse is {kl(case['q_first'], case['p_first'])}", **case)


@prop(CHAIN, "the second tokens' divergences are averaged over the prefixes that p writes")
def _(fn, rng: random.Random):
    case = two_models(rng)
    parts = [kl(p, q) for p, q in zip(case["p_next"], case["q_next"])]
    why = f"after each first token they are {parts}; q's prefixes, or all prefixes alike, are other averages"
    near(fn, by_enumeration(**case), why, **case)


@prop(CHAIN, "a prefix that p never writes does not count, however the models differ after it")
def _(fn, rng: random.Random):
    case = two_models(rng)
    n = len(case["p_first"])
    case["p_first"] = [0.0] + distribution(rng, n - 1)
    near(fn, by_enumeration(**case), "only what p writes is looked at: a student trained on the teacher's texts is never asked about its own mistakes", **case)


# 07.4

TOPK = exercise(
    "07.4",
    title="Top-k teacher probabilities with a bucket",
    title_zh="教师 top-k 概率与“其余”桶",
    statement="""Write `bucket_kl(student, teacher, k)`: KL(teacher ‖ student) over k + 1 outcomes: the k tokens that the *teacher* holds
most probable, and one bucket for all others together. `student` and `teacher` are lists of positive probabilities over the
whole vocabulary, and k is less than its size. Nothing is renormalised.""",
    statement_zh="""写出 `bucket_kl(student, teacher, k)`：在 k + 1 个结果上的 KL(教师 ‖ 学生)：**教师**认为最可能的 k 个 token，以及把其余 token 合在一起的
一个桶。`student` 与 `teacher` 是整个词表上的正概率列表，k 小于词表大小。不做任何重新归一化。""",
    stub='''def bucket_kl(student, teacher, k):
    "Divergence in nats that needs k teacher probabilities only."
    ...
''',
    solution='''def bucket_kl(student, teacher, k):
    "Divergence in nats that needs k teacher probabilities only."
    import math
    top = sorted(range(len(teacher)), key=lambda i: -teacher[i])[:k]
    both = []
    for probs in (teacher, student):
        kept = [probs[i] for i in top]
        both.append(kept + [1 - sum(kept)])  # the rest of each has the same meaning: any other token
    return sum(p * math.log(p / q) for p, q in zip(*both))
''',
)


def vocabulary(rng: random.Random) -> dict:
    "A teacher without ties, a student with other favourites."
    while True:
        n = rng.randint(4, 7)
        teacher, student = distribution(rng, n), distribution(rng, n)
        k = rng.randint(1, n - 2)
        ranked = sorted(teacher, reverse=True)
        favourites = [sorted(range(n), key=lambda i: -x[i])[:k] for x in (teacher, student)]
        if min(a - b for a, b in zip(ranked, ranked[1:])) > 1e-3 and set(favourites[0]) != set(favourites[1]):
            return {"student": student, "teacher": teacher, "k": k}


def right_bucket(student: list, teacher: list, k: int) -> float:
    top = set(sorted(range(len(teacher)), key=lambda i: teacher[i], reverse=True)[:k])
    pairs = [(teacher[i], student[i]) for i in top]
    rest = [math.fsum(x for i, x in enumerate(probs) if i not in top) for probs in (teacher, student)]
    return kl([p for p, _ in pairs] + rest[:1], [q for _, q in pairs] + rest[1:])


@prop(TOPK, "a student equal to the teacher has no loss")
def _(fn, rng: random.Random):
    case = vocabulary(rng)
    near(fn, 0.0, **{**case, "student": list(case["teacher"])})


@prop(TOPK, "with all but one token kept it is the whole divergence")
def _(fn, rng: random.Random):
    case = vocabulary(rng)
    case["k"] = len(case["teacher"]) - 1
    near(fn, kl(case["teacher"], case["student"]), "the bucket then holds one token", **case)


@prop(TOPK, "the teacher's k tokens count one by one, all others as one outcome")
def _(fn, rng: random.Random):
    case = vocabulary(rng)
    top = sorted(range(len(case["teacher"])), key=lambda i: -case["teacher"][i])[: case["k"]]
    near(fn, right_bucket(**case), f"the teacher's top {case['k']}: tokens {top}; the rest of both models is a probability too", **case)


@prop(TOPK, "it is never more than the whole divergence, and leaves out rest · KL within the rest")
def _(fn, rng: random.Random):
    case = vocabulary(rng)
    top = set(sorted(range(len(case["teacher"])), key=lambda i: -case["teacher"][i])[: case["k"]])
    rest = [[x for i, x in enumerate(case[name]) if i not in top] for name in ("teacher", "student")]
    inside = [[x / math.fsum(r) for x in r] for r in rest]
    missing = math.fsum(rest[0]) * kl(*inside)
    near(fn, kl(case["teacher"], case["student"]) - missing, f"the whole is {kl(case['teacher'], case['student'])}, the part inside the bucket {missing}", **case)


# 07.5

DRAFT = exercise(
    "07.5",
    title="What a student is worth as a draft",
    title_zh="学生当草稿模型值多少",
    statement="""Write `speculative(teacher, student, n_draft)`: the list [a, tokens] for speculative decoding. The student draws a token
from its probabilities `student`; the teacher accepts it with probability min(1, teacher/student). `a` is the probability
that a drafted token is accepted. The student drafts `n_draft` tokens for each pass of the teacher; those before the first
rejection are kept, and the pass itself always yields one more token. `tokens` is the expected number of tokens a pass, if
every position accepts with probability a, independently.""",
    statement_zh="""写出 `speculative(teacher, student, n_draft)`：投机解码的列表 [a, tokens]。学生按概率 `student` 采样一个 token，教师以概率
min(1, teacher/student) 接受它。`a` 是草稿 token 被接受的概率。教师每前向一次，学生先起草 `n_draft` 个 token；第一次拒绝之前的都保留，这次
前向本身总会再产生一个 token。`tokens` 是每次前向产生的 token 的期望数，假设每个位置都以概率 a 独立接受。""",
    stub='''def speculative(teacher, student, n_draft):
    "[probability of acceptance, expected tokens a pass of the teacher]"
    ...
''',
    solution='''def speculative(teacher, student, n_draft):
    "[probability of acceptance, expected tokens a pass of the teacher]"
    a = sum(min(p, q) for p, q in zip(teacher, student))  # q · min(1, p/q)
    return [a, sum(a**k for k in range(n_draft + 1))]  # the k-th draft is kept if it and all before it are
''',
)


def right_speculative(teacher: list, student: list, n_draft: int) -> list[float]:
    a = 1 - math.fsum(abs(p - q) for p, q in zip(teacher, student)) / 2
    return [a, (1 - a ** (n_draft + 1)) / (1 - a) if a < 1 - 1e-12 else n_draft + 1.0]


def draft_case(rng: random.Random) -> dict:
    case = two(rng)
    return {**case, "n_draft": rng.randint(2, 6)}


@prop(DRAFT, "a is the sum of min(teacher, student), one minus their total variation distance")
def _(fn, rng: random.Random):
    case = draft_case(rng)
    returned, a = call(fn, **case), right_speculative(**case)[0]
    if not isinstance(returned, list) or len(returned) != 2 or not is_near(returned[0], a, 2e-5, 2e-6):
        raise Mismatch(described(fn, case), repr(returned), f"[{a}, tokens]", "averaged over the student's own drafts: Σ student · min(1, teacher/student)")


@prop(DRAFT, "without a draft every pass yields one token")
def _(fn, rng: random.Random):
    case = {**draft_case(rng), "n_draft": 0}
    near(fn, right_speculative(**case), "the pass of the teacher itself", **case)


@prop(DRAFT, "a student equal to the teacher is always accepted: n_draft + 1 tokens")
def _(fn, rng: random.Random):
    case = draft_case(rng)
    case["student"] = list(case["teacher"])
    near(fn, [1.0, case["n_draft"] + 1.0], "also where neither is sure of the token", **case)


@prop(DRAFT, "a student that drafts what the teacher never says: no draft accepted, one token")
def _(fn, rng: random.Random):
    p, q, n_draft = distribution(rng, 2), distribution(rng, 2), rng.randint(1, 5)
    near(fn, [0.0, 1.0], teacher=p + [0.0, 0.0], student=[0.0, 0.0] + q, n_draft=n_draft)


@prop(DRAFT, "the expected tokens are 1 + a + … + a^n_draft")
def _(fn, rng: random.Random):
    case = draft_case(rng)
    near(fn, right_speculative(**case), "a token counts only if all drafted before it were accepted; plus the teacher's own", **case)
