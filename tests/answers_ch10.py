"Chapter 10 for test_checker: plausible wrong answers (what is wrong, source, words of the property that must catch it), and the package's own functions."
NORM = "norm = sum(x * x for g in grads for x in g) ** 0.5\n    "
COS = "import math\n    d = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))\n    "
Z = "import math\n    z = [x for x, s in zip(logits, visible) if s]\n    "
H = "-sum(x * math.log(x) for x in p if x > 0)"

WRONG = {
    "10.1": [
        ("each tensor by its own norm", "norm = lambda g: sum(x * x for x in g) ** 0.5\n    return [[min(1.0, max_norm / (norm(g) + 1e-6)) * x for x in g] for g in grads]", "one factor for all"),
        ("small ones scaled up", NORM + "return [[max_norm / (norm + 1e-6) * x for x in g] for g in grads]", "not changed"),
        ("clipped by value", "return [[max(-max_norm, min(max_norm, x)) for x in g] for g in grads]", "one factor for all"),
        ("the square for the norm", NORM + "return [[min(1.0, max_norm / (norm**2 + 1e-6)) * x for x in g] for g in grads]", "one factor for all"),
        ("the sum of norms", "norm = sum(sum(x * x for x in g) ** 0.5 for g in grads)\n    return [[min(1.0, max_norm / (norm + 1e-6)) * x for x in g] for g in grads]", "one factor for all"),
        ("without the 1e-6", NORM + "f = min(1.0, max_norm / norm) if norm else 1.0\n    return [[f * x for x in g] for g in grads]", "1e-6"),
        ("empty ones dropped", NORM + "f = min(1.0, max_norm / (norm + 1e-6))\n    return [[f * x for x in g] for g in grads if g]", "empty ones"),
    ],
    "10.2": [
        ("the first step counts", COS + "return (step + 1) / warmup_steps if step < warmup_steps else min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * d)) / 2", "0 at step 0"),
        ("the cosine over all steps", "import math\n    d = min(1.0, step / total_steps)\n    return step / warmup_steps if step < warmup_steps else min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * d)) / 2", "peak is at step"),
        ("a straight line down", COS + "return step / warmup_steps if step < warmup_steps else min_ratio + (1 - min_ratio) * (1 - d)", "not a line"),
        ("a floor by max", COS + "return step / warmup_steps if step < warmup_steps else max(min_ratio, (1 + math.cos(math.pi * d)) / 2)", "peak is at step"),
        ("up again after the end", "import math\n    d = (step - warmup_steps) / max(1, total_steps - warmup_steps)\n    return step / warmup_steps if step < warmup_steps else min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * d)) / 2", "stays there"),
        ("division by zero", "import math\n    d = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))\n    return step / warmup_steps if step < warmup_steps else min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * d)) / 2", "nothing but warm-up"),
    ],
    "10.3": [
        ("SGD's view", "return K if j == 0 else 1.0", "own step"),
        ("momentum forgotten", "return (K if j == 0 else 1.0) / (1 + (1 - beta2) * (K * K - 1) * beta2**j) ** 0.5", "own step"),
        ("v not squared", "return (1 + (1 - beta1) * (K - 1) * beta1**j) / (1 + (1 - beta2) * (abs(K) - 1) * beta2**j) ** 0.5", "own step"),
        ("no root", "return (1 + (1 - beta1) * (K - 1) * beta1**j) / (1 + (1 - beta2) * (K * K - 1) * beta2**j)", "own step"),
        ("one rate of forgetting", "return (1 + (1 - beta1) * (K - 1) * beta1**j) / (1 + (1 - beta2) * (K * K - 1) * beta1**j) ** 0.5", "own rates"),
        ("moments start at 0", "return (1 - beta1) * K * beta1**j / ((1 - beta2) * K * K * beta2**j) ** 0.5", "without a spike"),
        ("the size of K", "K = abs(K)\n    return (1 + (1 - beta1) * (K - 1) * beta1**j) / (1 + (1 - beta2) * (K * K - 1) * beta2**j) ** 0.5", "other sign"),
    ],
    "10.4": [
        ("in nats", Z + "if len(z) < 2: return float(len(z))\n    w = [math.exp(x - max(z)) for x in z]; p = [x / sum(w) for x in w]\n    return " + H, "equal logits"),
        ("all keys in the maximum", Z + "if len(z) < 2: return float(len(z))\n    w = [math.exp(x - max(z)) for x in z]; p = [x / sum(w) for x in w]\n    return " + H + " / math.log(len(logits))", "not visible"),
        ("all keys in the softmax", "import math\n    z, n = logits, sum(visible)\n    if n < 2: return float(n)\n    w = [math.exp(x - max(z)) for x in z]; p = [x / sum(w) for x, s in zip(w, visible) if s]\n    return " + H + " / math.log(n)", "not visible"),
        ("overflow", Z + "if len(z) < 2: return float(len(z))\n    w = [math.exp(x) for x in z]; p = [x / sum(w) for x in w]\n    return " + H + " / math.log(len(z))", "thousands"),
        ("log of zero", Z + "if len(z) < 2: return float(len(z))\n    w = [math.exp(x - max(z)) for x in z]; p = [x / sum(w) for x in w]\n    return -sum(x * math.log(x) for x in p) / math.log(len(z))", "thousands"),
        ("one key divides by ln 1", Z + "w = [math.exp(x - max(z)) for x in z]; p = [x / sum(w) for x in w]\n    return " + H + " / math.log(len(z))", "one visible key"),
        ("one key taken for collapse", Z + "if len(z) < 2: return 0.0\n    w = [math.exp(x - max(z)) for x in z]; p = [x / sum(w) for x in w]\n    return " + H + " / math.log(len(z))", "one visible key"),
    ],
    "10.5": [
        ("the stream does not grow", "return (1 + c * C / sigma0) ** n", "variances add"),
        ("standard deviations add", "import math\n    return math.prod(1 + c * C / (sigma0 + l * c * a**0.5) for l in range(n))", "variances add"),
        ("its own branch counted", "import math\n    return math.prod(1 + c * C / (sigma0**2 + (l + 1) * c * c * a) ** 0.5 for l in range(n))", "reads the embedding"),
        ("c not in the stream", "import math\n    return math.prod(1 + c * C / (sigma0**2 + l * a) ** 0.5 for l in range(n))", "squared"),
        ("c once in the stream", "import math\n    return math.prod(1 + c * C / (sigma0**2 + l * c * a) ** 0.5 for l in range(n))", "squared"),
        ("a sum of the factors", "return 1 + sum(c * C / (sigma0**2 + l * c * c * a) ** 0.5 for l in range(n))", "variances add"),
        ("the article: c enlarges the shortcut", "import math\n    return math.prod(1 + C / (c * (sigma0**2 + l * a) ** 0.5) if c else 1.0 for l in range(n))", "reads the embedding"),
        ("divided by the variance", "import math\n    return math.prod(1 + c * C / (sigma0**2 + l * c * c * a) for l in range(n))", "reads the embedding"),
    ],
}  # fmt: skip

RIGHT = {
    "10.1": "import torch\n    from llm_train_course.stability import clip_grad_norm\n    ps = [torch.nn.Parameter(torch.zeros(len(g))) for g in grads]\n    for p, g in zip(ps, grads): p.grad = torch.tensor(g)\n    clip_grad_norm(ps, max_norm)\n    return [p.grad for p in ps]",
    "10.2": "from llm_train_course.stability import warmup_cosine\n    return warmup_cosine(min(step, total_steps), warmup_steps, total_steps, min_ratio)",
    "10.4": "import torch\n    from llm_train_course.stability import attention_entropy\n    seen = torch.tensor(visible).bool()\n    p = torch.tensor(logits).masked_fill(~seen, -torch.inf).softmax(0).nan_to_num(0)\n    return attention_entropy(p[None], True, seen[None])[0] if seen.any() else 0.0",
}  # fmt: skip
