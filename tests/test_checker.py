"The exercise checker: stubs fail, solutions pass, plausible wrong answers are caught, and messages say what is wrong."

import answers_ch02
import answers_ch08
import answers_ch09
import answers_ch10
import pytest

from llm_train_course.app.checker import CheckFailed, check, compile_function, load_exercises

EXERCISES = load_exercises()
SEEDS = range(20)

# How wrong answers of chapters 3 and 4 begin: arguments as tensors under the names used below.
T = "import torch\n    x, W, A, B = (torch.tensor(m) for m in (x, W, A, B)); bias = 0 if bias is None else torch.tensor(bias)\n    "
G = "import torch\n    x, g, A, B = (torch.tensor(m) for m in (x, grad_out, A, B)); s = alpha / len(A)\n    "
N = "hit = lambda p: p.split('.')[-1] != 'lm_head' if targets == 'all-linear' else p.split('.')[-1] in targets\n    "
M = "import torch\n    W, A, B = (torch.tensor(m) for m in (W, A, B)); r = len(A); s = alpha / (r**0.5 if use_rslora else r)\n    "
S = "import torch\n    s = torch.linalg.svdvals(torch.tensor(M, dtype=torch.float64))\n    "
Q = "from statistics import NormalDist; Q = NormalDist().inv_cdf; h = 2 ** (bits - 1)\n    side = lambda n: [Q(offset + (0.5 - offset) * k / n) for k in range(n)]\n    "
P = "c = list(codes) + [pad] * (len(codes) % 2)\n    "
U = "up = lambda a, b: -(-a // b); b = up(n, blocksize)\n    "
C = "c = [v for b in packed for v in (b >> 4, b & 15)]\n    "
Y = "size = [n_linear * 4.126953125 / 8, 2 * n_other, 4 * n_adapter, 4 * n_adapter, 8 * n_adapter]\n    "

# How wrong answers of chapters 5, 6 and 7 begin.
TOKENS = "R = list(zip(range(len(mask)), logps, ref_logps, mask)); last = max(t for t, m in enumerate(mask) if m)\n    "
BACKWARDS = "out, a, nxt = [0.0] * len(rewards), 0.0, None\n    for t in reversed(range(len(rewards))):\n        if not mask[t]: continue\n        "
RATIO = "import math\n    r, a = math.exp(logp - old_logp), advantage; c = min(max(r, 1 - clip_eps), 1 + clip_eps)\n    "
GROUPS = "import statistics as s\n    G = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]\n    "
TILT = "import math\n    norm = lambda w: [x / sum(w) for x in w]\n    "
PAIR = "import math\n    c, r, cr, rr = policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp\n    F = lambda x: max(x, 0) + math.log1p(math.exp(-abs(x))); S = lambda x: math.exp(-F(-x))\n    "
IPO = "h = chosen_logratio - rejected_logratio\n    "
SIMPO = "import math\n    m = lambda x: sum(x) / len(x); F = lambda x: max(x, 0) + math.log1p(math.exp(-abs(x)))\n    "
STEP = "import torch\n    E, h, c, r = torch.tensor(embeddings), torch.tensor(hidden), chosen, rejected; p = (E @ h).softmax(0); s = E[c] - E[r]\n    "
SOFT = "import torch; import torch.nn.functional as F\n    y = torch.tensor(labels); keep = y != -100; y = y[keep]; T, n = temperature, max(len(y), 1)\n    z, t = torch.tensor(student_logits)[keep], torch.tensor(teacher_logits)[keep]; logq, p = (z / T).log_softmax(-1), (t / T).softmax(-1)\n    hard, soft = F.cross_entropy(z, y, reduction='sum'), F.kl_div(logq, p, reduction='sum')\n    "
KLS = "import math\n    kl = lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q) if a)\n    "
TOP = "import math\n    kl = lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)\n    rank = lambda x: sorted(range(len(x)), key=lambda i: -x[i]); kept = lambda x, top: [x[i] for i in top]\n    "
DRAFT = "a = sum(min(p, q) for p, q in zip(teacher, student)); tokens = lambda a: sum(a**k for k in range(n_draft + 1))\n    "

# Plausible wrong answers: (what is wrong, source, words of the property that must catch it).
WRONG = {
    "01.1": [
        ("the forward pass only", "return (2*n_params + 4*n_layers*hidden_size*seq_len) * n_tokens", "6·N·D"),
        ("attention forgotten", "return 6 * n_params * n_tokens", "counting every product"),
        ("attention once, not per token", "return 6*n_params*n_tokens + 12*n_layers*hidden_size*seq_len", "counting every product"),
        ("attention per token with seq_len squared", "return (6*n_params + 12*n_layers*hidden_size*seq_len**2) * n_tokens", "counting every product"),
        ("scores without values", "return (6*n_params + 6*n_layers*hidden_size*seq_len) * n_tokens", "counting every product"),
    ],
    "01.2": [
        ("shifted by one", "y = [t if m else -100 for t, m in zip(input_ids, roles_mask)]\n    return y[1:] + [-100]", "own position"),
        ("shifted and shortened", "return [t if m else -100 for t, m in zip(input_ids, roles_mask)][1:]", "one label for each token"),
        ("end token masked", "return [t if m and t != 2 else -100 for t, m in zip(input_ids, roles_mask)]", "own position"),
        ("mask inverted", "return [-100 if m else t for t, m in zip(input_ids, roles_mask)]", "own position"),
        ("no mask", "return list(input_ids)", "own position"),
        ("id 0 taken for padding", "return [t if m and t else -100 for t, m in zip(input_ids, roles_mask)]", "token id 0"),
        ("input overwritten", "for k, m in enumerate(roles_mask):\n        if not m: input_ids[k] = -100\n    return input_ids", "one label"),
    ],
    "01.3": [
        ("mean of means", "import statistics\n    means = [sum(x for x, m in zip(r, k) if m) / sum(k) for r, k in zip(token_losses, masks) if sum(k)]\n    return sum(means) / len(means) if means else 0.0", "weighs the same"),
        ("divided by the padded count", "t = sum(x for r, k in zip(token_losses, masks) for x, m in zip(r, k) if m)\n    n = sum(map(len, token_losses))\n    return t / n if n else 0.0", "weighs the same"),
        ("mean of means that trips over padding", "means = [sum(x for x, m in zip(r, k) if m) / sum(k) for r, k in zip(token_losses, masks)]\n    return sum(means) / len(means)", "weighs the same"),
        ("division by zero without targets", "t = sum(x for r, k in zip(token_losses, masks) for x, m in zip(r, k) if m)\n    return t / sum(map(sum, masks))", "without any target"),
        ("padding multiplied by zero", "t = sum(x*m for r, k in zip(token_losses, masks) for x, m in zip(r, k))\n    n = sum(map(sum, masks))\n    return t / n if n else 0.0", "padded position"),
    ],
    "01.4": [
        ("mean a token", "s = [sum(x for x, m in zip(r, k) if m) / sum(k) for r, k in zip(token_logps, masks)]\n    return s.index(max(s))", "total log-probability"),
        ("mask ignored", "s = [sum(r) for r in token_logps]\n    return s.index(max(s))", "padding does not count"),
        ("first tokens assumed", "s = [sum(r[:sum(k)]) for r, k in zip(token_logps, masks)]\n    return s.index(max(s))", "total log-probability"),
        ("the least probable", "s = [sum(x for x, m in zip(r, k) if m) for r, k in zip(token_logps, masks)]\n    return s.index(min(s))", "total log-probability"),
        ("the first token decides", "s = [next(x for x, m in zip(r, k) if m) for r, k in zip(token_logps, masks)]\n    return s.index(max(s))", "total log-probability"),
        ("the last of a tie", "s = [sum(x for x, m in zip(r, k) if m) for r, k in zip(token_logps, masks)]\n    return max(range(len(s)), key=lambda j: (s[j], j))", "tie"),
    ],
    "03.1": [
        ("alpha instead of alpha/r", T + "return x @ W.T + bias + alpha * (x @ A.T @ B.T)", "alpha/r"),
        ("r/alpha", T + "return x @ W.T + bias + len(A) / alpha * (x @ A.T @ B.T)", "alpha/r"),
        ("no scale", T + "return x @ W.T + bias + x @ A.T @ B.T", "alpha/r"),
        ("the square root of r", T + "return x @ W.T + bias + alpha / len(A) ** 0.5 * (x @ A.T @ B.T)", "alpha/r"),
        ("r read from B's rows", T + "return x @ W.T + bias + alpha / len(B) * (x @ A.T @ B.T)", "alpha/r"),
        ("the layer scaled too", T + "return alpha / len(A) * (x @ (W + B @ A).T + bias)", "the layer alone"),
        ("bias scaled too", T + "return x @ W.T + alpha / len(A) * (x @ A.T @ B.T + bias)", "the layer alone"),
        ("bias forgotten", T + "return x @ W.T + alpha / len(A) * (x @ A.T @ B.T)", "the layer alone"),
        ("square layers only", T + "return x @ W + bias + alpha / len(A) * (x @ A.T @ B.T)", "the layer alone"),
        ("A and B exchanged", T + "return x @ W.T + bias + alpha / len(A) * (x @ B @ A)", "the layer alone"),
        ("the adapter for the layer", T + "return bias + alpha / len(A) * (x @ A.T @ B.T)", "the layer alone"),
    ],
    "03.2": [
        ("scale forgotten", G + "return (g @ B).T @ x, g.T @ (x @ A.T)", "of A is zero, that of B is not"),
        ("scale in A's only", G + "return s * (g @ B).T @ x, g.T @ (x @ A.T)", "of A is zero, that of B is not"),
        ("scale in B's only", G + "return (g @ B).T @ x, s * g.T @ (x @ A.T)", "differences of the loss"),
        ("alpha instead of alpha/r", G + "s = alpha\n    return s * (g @ B).T @ x, s * g.T @ (x @ A.T)", "of A is zero, that of B is not"),
        ("mean over the batch", G + "s = s / len(x)\n    return s * (g @ B).T @ x, s * g.T @ (x @ A.T)", "of A is zero, that of B is not"),
        ("exchanged", G + "return s * g.T @ (x @ A.T), s * (g @ B).T @ x", "shape of its matrix"),
        ("transposed", G + "return s * x.T @ (g @ B), s * (x @ A.T).T @ g", "shape of its matrix"),
        ("the gradient of W for both", G + "return g.T @ x, g.T @ x", "shape of its matrix"),
    ],
    "03.3": [
        ("square layers only", N + "return sum(2 * r * n for p, (m, n) in linears.items() if hit(p))", "square or not"),
        ("the layer's own parameters", N + "return sum(m * n for p, (m, n) in linears.items() if hit(p))", "square or not"),
        ("A only", N + "return sum(r * n for p, (m, n) in linears.items() if hit(p))", "square or not"),
        ("B·A's entries", N + "return sum(r * m * n for p, (m, n) in linears.items() if hit(p))", "square or not"),
        ("an r × r matrix between", N + "return sum(r * (m + n) + r * r for p, (m, n) in linears.items() if hit(p))", "square or not"),
        ("targets ignored", "return sum(r * (m + n) for m, n in linears.values())", "for no other"),
        ("one block only", N + "return sum({p.split('.')[-1]: r * (m + n) for p, (m, n) in linears.items() if hit(p)}.values())", "in every block"),
        ("any end of the path", "ends = ('_proj',) if targets == 'all-linear' else tuple(targets)\n    return sum(r * (m + n) for p, (m, n) in linears.items() if p.endswith(ends))", "qkv_proj"),
        ("the output head too", "hit = lambda p: targets == 'all-linear' or p.split('.')[-1] in targets\n    return sum(r * (m + n) for p, (m, n) in linears.items() if hit(p))", "output head"),
    ],
    "03.4": [
        ("alpha instead of alpha/r", M + "d = (alpha / r**0.5 if use_rslora else alpha) * (B @ A)\n    return W + (d.T if fan_in_fan_out else d)", "layer and its adapter"),
        ("the adapter without the layer", M + "d = s * (B @ A)\n    return d.T if fan_in_fan_out else d", "layer and its adapter"),
        ("A B instead of B A", M + "d = s * (A.T @ B.T)\n    return W + d", "layer and its adapter"),
        ("each factor scaled", M + "d = (s * B) @ (s * A)\n    return W + (d.T if fan_in_fan_out else d)", "layer and its adapter"),
        ("the mean of layer and adapter", M + "d = s * (B @ A)\n    return (W + (d.T if fan_in_fan_out else d)) / 2", "layer and its adapter"),
        ("rsLoRA ignored", M + "d = alpha / r * (B @ A)\n    return W + (d.T if fan_in_fan_out else d)", "square root"),
        ("the root of alpha/r", M + "d = ((alpha / r) ** 0.5 if use_rslora else s) * (B @ A)\n    return W + (d.T if fan_in_fan_out else d)", "square root"),
        ("the root of alpha", M + "d = (alpha**0.5 / r if use_rslora else s) * (B @ A)\n    return W + (d.T if fan_in_fan_out else d)", "square root"),
        ("(in, out) ignored", M + "return W + s * (B @ A)", "transposed update"),
        ("(in, out) answered as (out, in)", M + "return (W.T if fan_in_fan_out else W) + s * (B @ A)", "transposed update"),
    ],
    "03.5": [
        ("singular values not squared", S + "e = s\n    return int((e.cumsum(0) < share * e.sum()).sum()) + 1 if e.sum() else 0", "squares reach the share"),
        ("values over a share of the largest", S + "return int((s >= share * s[0]).sum()) if s[0] else 0", "squares reach the share"),
        ("the algebraic rank", S + "return int((s > 1e-12 * s[0]).sum()) if s[0] else 0", "squares reach the share"),
        ("one too few", S + "return int(((s * s).cumsum(0) < share * (s * s).sum()).sum())", "squares reach the share"),
        ("smallest first", S + "e = (s * s).flip(0)\n    return int((e.cumsum(0) < share * e.sum()).sum()) + 1 if e.sum() else 0", "squares reach the share"),
        ("rows for singular values", "import torch\n    e = (torch.tensor(M, dtype=torch.float64) ** 2).sum(1).sort(descending=True).values\n    return int((e.cumsum(0) < share * e.sum()).sum()) + 1 if e.sum() else 0", "rotating rows"),
        ("an absolute threshold", S + "e = s * s\n    return int((e.cumsum(0) < share * e.sum()).sum()) + 1 if e.sum() > 1e-6 else 0", "scaling the matrix"),
        ("the zero matrix has rank 1", S + "return int(((s * s).cumsum(0) < share * (s * s).sum()).sum()) + 1", "zero matrix"),
    ],
    "04.1": [
        ("quantiles at 0 and 1", Q + "return [Q(k / (2**bits - 1)) for k in range(2**bits)]", "finite levels"),
        ("the paper's Eq. 4", Q + "n = 2**bits\n    return [(Q(k / (n + 1)) + Q((k + 1) / (n + 1))) / 2 for k in range(n)]", "finite levels"),
        ("0.5 not left out", Q + "s = [Q(offset + (0.5 - offset) * k / (h - 1)) for k in range(h)] if h > 1 else [1.0]\n    return sorted([-q for q in s] + s[:-1])", "finite levels"),
        ("descending", Q + "return [q / Q(offset) for q in (side(h) + [0.0] + [-q for q in reversed(side(h - 1))])]", "ascending"),
        ("symmetric, without zero", Q + "return sorted(v / Q(offset) for q in side(h) for v in (q, -q))", "-1, 0 and 1"),
        ("the longer side negative", Q + "return sorted([-q / Q(offset) for q in side(h)] + [0.0] + [q / Q(offset) for q in side(h - 1)])", "-1, 0 and 1"),
        ("not scaled to 1", Q + "return sorted([-q for q in side(h - 1)] + [0.0] + side(h))", "-1, 0 and 1"),
        ("even steps, as in INT4", Q + "return [-k / (h - 1) for k in range(h - 1, 0, -1)] + [k / h for k in range(h + 1)]", "give NF4"),
        ("another offset on each side", Q + "a, b = 1 - 1 / 4 / h, 1 - 1 / (4 * h - 2)\n    p = lambda o, n: [Q(o + (0.5 - o) * k / n) / Q(o) for k in range(n)]\n    return sorted([-q for q in p(b, h - 1)] + [0.0] + p(a, h))", "give NF4"),
        ("a uniform distribution's quantiles", Q + "p = lambda n: [(offset + (0.5 - offset) * k / n - 0.5) / (offset - 0.5) for k in range(n)]\n    return sorted([-q for q in p(h - 1)] + [0.0] + p(h))", "give NF4"),
        ("NF4's offset for every code", Q + "p = lambda n: [Q(0.9677083 + (0.5 - 0.9677083) * k / n) / Q(0.9677083) for k in range(n)]\n    return sorted([-q for q in p(h - 1)] + [0.0] + p(h))", "evenly spaced"),
    ],
    "04.2": [
        ("the largest, not the largest magnitude", "m = max(block) or 1.0\n    return [min(range(len(levels)), key=lambda k: abs(levels[k] - w / m)) for w in block], max(block)", "largest magnitude"),
        ("the sign kept", "m = max(block, key=abs)\n    return [min(range(len(levels)), key=lambda k: abs(levels[k] - w / (m or 1))) for w in block], m", "largest magnitude"),
        ("the range", "m = max(block) - min(block)\n    return [min(range(len(levels)), key=lambda k: abs(levels[k] - w / (m or 1))) for w in block], m", "largest magnitude"),
        ("the standard deviation", "m = (sum(w * w for w in block) / len(block)) ** 0.5\n    return [min(range(len(levels)), key=lambda k: abs(levels[k] - w / (m or 1))) for w in block], m", "largest magnitude"),
        ("codes alone", "m = max(map(abs, block)) or 1.0\n    return [min(range(len(levels)), key=lambda k: abs(levels[k] - w / m)) for w in block]", "largest magnitude"),
        ("the level below", "m = max(map(abs, block))\n    return [max(k for k in range(len(levels)) if k == 0 or levels[k] <= w / (m or 1)) for w in block], m", "nearest level"),
        ("levels instead of codes", "m = max(map(abs, block))\n    return [min(levels, key=lambda v: abs(v - w / (m or 1))) for w in block], m", "nearest level"),
        ("even steps, as in INT4", "m = max(map(abs, block))\n    return [round((w / (m or 1) + 1) / 2 * (len(levels) - 1)) for w in block], m", "nearest level"),
        ("not scaled", "m = max(map(abs, block))\n    return [min(range(len(levels)), key=lambda k: abs(levels[k] - w)) for w in block], m", "nearest level"),
        ("sixteen levels assumed", "m = max(map(abs, block))\n    return [min(range(16), key=lambda k: abs(levels[k] - w / (m or 1))) for w in block], m", "with other levels"),
        ("a small constant added", "m = max(map(abs, block)) + 1e-8\n    return [min(range(len(levels)), key=lambda k: abs(levels[k] - w / m)) for w in block], m", "nearest level"),
        ("zeros divided by zero", "m = max(map(abs, block))\n    return [min(range(len(levels)), key=lambda k: abs(levels[k] - w / m)) for w in block], m", "block of zeros"),
        ("code 0 for zeros", "m = max(map(abs, block))\n    return [min(range(len(levels)), key=lambda k: abs(levels[k] - w / m)) if m else 0 for w in block], m", "block of zeros"),
    ],
    "04.3": [
        ("the low half first", P + "return [a | b << 4 for a, b in zip(c[::2], c[1::2])]", "first in its high half"),
        ("shifted by eight", P + "return [a << 8 | b for a, b in zip(c[::2], c[1::2])]", "first in its high half"),
        ("decimal digits", P + "return [10 * a + b for a, b in zip(c[::2], c[1::2])]", "first in its high half"),
        ("a byte for each code", "return list(codes)", "first in its high half"),
        ("first half and second half", P + "n = len(c) // 2\n    return [a << 4 | b for a, b in zip(c[:n], c[n:])]", "in hexadecimal"),
        ("the last of an odd number dropped", "return [a << 4 | b for a, b in zip(codes[::2], codes[1::2])]", "odd number"),
        ("padded with zero bits", "c = list(codes) + [0] * (len(codes) % 2)\n    return [a << 4 | b for a, b in zip(c[::2], c[1::2])]", "odd number"),
        ("padding in the high half", "c = list(codes)\n    c[-1:] = [pad, c[-1]] if len(c) % 2 else c[-1:]\n    return [a << 4 | b for a, b in zip(c[::2], c[1::2])]", "odd number"),
        ("the list changed", "if len(codes) % 2: codes.append(pad)\n    return [a << 4 | b for a, b in zip(codes[::2], codes[1::2])]", "odd number"),
    ],
    "04.4": [
        ("bits for bytes", U + "return 4 * n + 32 * b", "one block"),
        ("codes only", U + "return up(n, 2)", "one block"),
        ("16-bit constants", U + "return up(n, 2) + 2 * b", "one block"),
        ("a byte for each code", U + "return n + 4 * b", "one block"),
        ("a zero point as well", U + "return up(n, 2) + 8 * b", "one block"),
        ("the block size taken for 64", "return -(-n // 2) + 4 * -(-n // 64)", "one block"),
        ("the second constants forgotten", U + "return up(n, 2) + (4 * b if nested_blocksize is None else b)", "double quantization"),
        ("a second constant for 256 weights", U + "return up(n, 2) + (4 * b if nested_blocksize is None else b + 4 * up(n, nested_blocksize))", "double quantization"),
        ("8-bit constants at both levels", U + "return up(n, 2) + (4 * b if nested_blocksize is None else b + up(b, nested_blocksize))", "double quantization"),
        ("double quantization ignored", U + "return up(n, 2) + 4 * b", "double quantization"),
        ("both kinds of constants kept", U + "return up(n, 2) + 4 * b + (0 if nested_blocksize is None else b + 4 * up(b, nested_blocksize))", "double quantization"),
        ("only whole blocks", "b = n // blocksize\n    return -(-n // 2) + (4 * b if nested_blocksize is None else b + 4 * -(-b // nested_blocksize))", "part of a block"),
        ("averages", "c = 32 / blocksize if nested_blocksize is None else 8 / blocksize + 32 / blocksize / nested_blocksize\n    return n * (4 + c) / 8", "part of a block"),
    ],
    "04.5": [
        ("the low half first", "c = [v for b in packed for v in (b & 15, b >> 4)]\n    return [levels[v] * absmax[i // blocksize] for i, v in enumerate(c[:n])]", "in one block"),
        ("divided by absmax", C + "return [levels[v] / absmax[i // blocksize] if absmax[i // blocksize] else 0.0 for i, v in enumerate(c[:n])]", "in one block"),
        ("codes as even steps", C + "return [(v / 7.5 - 1) * absmax[i // blocksize] for i, v in enumerate(c[:n])]", "in one block"),
        ("NF4 assumed", C + "from llm_train_course.app.exercises.ch04 import NF4\n    return [NF4[v] * absmax[i // blocksize] for i, v in enumerate(c[:n])]", "in one block"),
        ("levels only", C + "return [levels[v] for v in c[:n]]", "in one block"),
        ("all high halves first", "c = [b >> 4 for b in packed] + [b & 15 for b in packed]\n    return [levels[v] * absmax[i // blocksize] for i, v in enumerate(c[:n])]", "in one block"),
        ("the first constant for all", C + "return [levels[v] * absmax[0] for v in c[:n]]", "own constant"),
        ("blocks counted in bytes", "return [levels[v] * absmax[i // blocksize] for i, b in enumerate(packed) for v in (b >> 4, b & 15)][:n]", "own constant"),
        ("the padding returned", C + "return [levels[v] * absmax[min(i // blocksize, len(absmax) - 1)] for i, v in enumerate(c)]", "short last block"),
        ("the last block dropped", C + "return [levels[v] * absmax[i // blocksize] for i, v in enumerate(c[: n - n % blocksize or n])]", "short last block"),
    ],
    "04.6": [
        ("GiB", Y + "return [b / 2**30 for b in size]", "gigabyte"),
        ("bytes", Y + "return size", "gigabyte"),
        ("the rest in four bits as well", Y + "size[1] = n_other / 2\n    return [b / 1e9 for b in size]", "gigabyte"),
        ("the rest in FP32", Y + "size[1] = 4 * n_other\n    return [b / 1e9 for b in size]", "gigabyte"),
        ("gradients of all", Y + "size[3] = 4 * (n_linear + n_other + n_adapter)\n    return [b / 1e9 for b in size]", "gigabyte"),
        ("bare four bits", Y + "size[0] = n_linear / 2\n    return [b / 1e9 for b in size]", "share of the constants"),
        ("single quantization", Y + "size[0] = n_linear * 4.5 / 8\n    return [b / 1e9 for b in size]", "share of the constants"),
        ("the second constants forgotten", Y + "size[0] = n_linear * 4.125 / 8\n    return [b / 1e9 for b in size]", "share of the constants"),
        ("dequantized as a whole", Y + "size[0] = 2 * n_linear\n    return [b / 1e9 for b in size]", "share of the constants"),
        ("gradients of the base's matrices", Y + "size[3] = 4 * (n_linear + n_adapter)\n    return [b / 1e9 for b in size]", "share of the constants"),
        ("one moment", Y + "size[4] = 4 * n_adapter\n    return [b / 1e9 for b in size]", "its moments 8"),
        ("a master copy as well", Y + "size[4] = 12 * n_adapter\n    return [b / 1e9 for b in size]", "its moments 8"),
        ("16-bit adapters", Y + "size[2] = 2 * n_adapter\n    return [b / 1e9 for b in size]", "its moments 8"),
    ],
    "05.1": [
        ("the KL as a bonus", TOKENS + "return [(beta * (p - q) + (score if t == last else 0.0)) if m else 0.0 for t, p, q, m in R]", "pays for it"),
        ("the KL without beta", TOKENS + "return [(q - p + (score if t == last else 0.0)) if m else 0.0 for t, p, q, m in R]", "pays for it"),
        ("the KL at the last token only", TOKENS + "k = sum(p - q for _, p, q, m in R if m)\n    return [(score - beta * k) if t == last else 0.0 for t, *_ in R]", "pays for it"),
        ("no KL at the last token", TOKENS + "return [(score if t == last else beta * (q - p)) if m else 0.0 for t, p, q, m in R]", "pays for it"),
        ("an absolute difference", TOKENS + "return [(score * (t == last) - beta * abs(p - q)) if m else 0.0 for t, p, q, m in R]", "pays for it"),
        ("the score at every token", TOKENS + "return [(score - beta * (p - q)) if m else 0.0 for t, p, q, m in R]", "at the last token"),
        ("the score spread over the answer", TOKENS + "return [(score / sum(mask) - beta * (p - q)) if m else 0.0 for t, p, q, m in R]", "at the last token"),
        ("the score in the last column", TOKENS + "return [(beta * (q - p) if m else 0.0) + (score if t == len(mask) - 1 else 0.0) for t, p, q, m in R]", "by the mask"),
        ("the number of tokens for the last one", TOKENS + "return [(beta * (q - p) if m else 0.0) + (score if t == sum(mask) - 1 else 0.0) for t, p, q, m in R]", "by the mask"),
        ("padding multiplied by zero", TOKENS + "return [-beta * (p - q) * m + score * (t == last) for t, p, q, m in R]", "padded position"),
        ("padding not masked", TOKENS + "return [-beta * (p - q) + score * (t == last) for t, p, q, m in R]", "padded position"),
    ],
    "05.2": [
        ("a value after the end", BACKWARDS + "nxt = values[t] if nxt is None else nxt\n        a = rewards[t] + gamma * nxt - values[t] + gamma * lam * a\n        out[t], nxt = a, values[t]\n    return out", "the value is 0"),
        ("the sign of the value", BACKWARDS + "a = rewards[t] + gamma * (nxt or 0) + values[t] + gamma * lam * a\n        out[t], nxt = a, values[t]\n    return out", "the value is 0"),
        ("value minus reward", BACKWARDS + "a = values[t] - rewards[t] - gamma * (nxt or 0) + gamma * lam * a\n        out[t], nxt = a, values[t]\n    return out", "the value is 0"),
        ("returns for advantages", BACKWARDS + "a = rewards[t] + gamma * (nxt or 0) - values[t] + gamma * lam * a\n        out[t], nxt = a + values[t], values[t]\n    return out", "the value is 0"),
        ("no baseline", BACKWARDS + "a = rewards[t] + gamma * lam * a\n        out[t] = a\n    return out", "the value is 0"),
        ("the next value not discounted", BACKWARDS + "a = rewards[t] + (nxt or 0) - values[t] + gamma * lam * a\n        out[t], nxt = a, values[t]\n    return out", "one-step error"),
        ("the next value weighted with lam", BACKWARDS + "a = rewards[t] + gamma * lam * (nxt or 0) - values[t] + gamma * lam * a\n        out[t], nxt = a, values[t]\n    return out", "one-step error"),
        ("one step only", BACKWARDS + "out[t], nxt = rewards[t] + gamma * (nxt or 0) - values[t], values[t]\n    return out", "rewards to come"),
        ("errors weighted with lam only", BACKWARDS + "a = rewards[t] + gamma * (nxt or 0) - values[t] + lam * a\n        out[t], nxt = a, values[t]\n    return out", "lam = 1"),
        ("errors weighted with gamma only", BACKWARDS + "a = rewards[t] + gamma * (nxt or 0) - values[t] + gamma * a\n        out[t], nxt = a, values[t]\n    return out", "lam = 0"),
        ("from the front", "out, a = [], 0.0\n    for t in range(len(rewards)):\n        v = values[t + 1] if t + 1 < len(values) else 0.0\n        a = mask[t] * (rewards[t] + gamma * v - values[t]) + gamma * lam * a\n        out.append(a)\n    return out", "lam = 1"),
        ("mask ignored", "out, a, nxt = [0.0] * len(rewards), 0.0, 0.0\n    for t in reversed(range(len(rewards))):\n        a = rewards[t] + gamma * nxt - values[t] + gamma * lam * a\n        out[t], nxt = a, values[t]\n    return out", "padding on either side"),
        ("only the result masked", "out, a, nxt = [0.0] * len(rewards), 0.0, 0.0\n    for t in reversed(range(len(rewards))):\n        a = rewards[t] + gamma * nxt - values[t] + gamma * lam * a\n        out[t], nxt = (a if mask[t] else 0.0), values[t]\n    return out", "padding on either side"),
        ("the errors masked by a product", "out, a, nxt = [0.0] * len(rewards), 0.0, 0.0\n    for t in reversed(range(len(rewards))):\n        a = mask[t] * (rewards[t] + gamma * nxt - values[t]) + gamma * lam * a\n        out[t], nxt = a, values[t]\n    return out", "padding on either side"),
    ],
    "05.3": [
        ("a loss", RATIO + "v, g = (r * a, r * a) if r * a <= c * a else (c * a, 0.0)\n    return -v, -g", "before the first step"),
        ("a difference for the ratio", "r, a = logp - old_logp, advantage; c = min(max(r, 1 - clip_eps), 1 + clip_eps)\n    return (r * a, r * a) if r * a <= c * a else (c * a, 0.0)", "before the first step"),
        ("the ratio upside down", "import math\n    r, a = math.exp(old_logp - logp), advantage; c = min(max(r, 1 - clip_eps), 1 + clip_eps)\n    return (r * a, r * a) if r * a <= c * a else (c * a, 0.0)", "inside the interval"),
        ("the gradient without the ratio", RATIO + "return (r * a, a) if r * a <= c * a else (c * a, 0.0)", "inside the interval"),
        ("no clipping", RATIO + "return r * a, r * a", "gains nothing more"),
        ("the larger of the two", RATIO + "return (r * a, r * a) if r * a >= c * a else (c * a, 0.0)", "gains nothing more"),
        ("the gradient passes through the clip", RATIO + "return min(r * a, c * a), r * a", "gains nothing more"),
        ("the advantage clipped", RATIO + "e = max(-clip_eps, min(clip_eps, a))\n    return (r * a, r * a) if abs(r - 1) < clip_eps else (r * e, 0.0)", "gains nothing more"),
        ("only the upper end clips", RATIO + "c = min(r, 1 + clip_eps)\n    return (r * a, r * a) if r * a <= c * a else (c * a, 0.0)", "a bad token below"),
        ("only the lower end clips", RATIO + "c = max(r, 1 - clip_eps)\n    return (r * a, r * a) if r * a <= c * a else (c * a, 0.0)", "a good token above"),
        ("the log-ratio clipped", "import math\n    d, a = logp - old_logp, advantage; r, c = math.exp(d), math.exp(min(max(d, -clip_eps), clip_eps))\n    return (r * a, r * a) if r * a <= c * a else (c * a, 0.0)", "gains nothing more"),
        ("clipped on both sides, without the minimum", RATIO + "return (r * a, r * a) if c == r else (c * a, 0.0)", "is not clipped"),
        ("the advantage's size, not its sign", RATIO + "return (r * a, r * a) if r * abs(a) <= c * abs(a) else (c * a, 0.0)", "a bad token below"),
    ],
    "05.4": [
        ("the mean of the batch", "import statistics as s\n    m = s.fmean(rewards)\n    return [(r - m) / (s.stdev(rewards) + 1e-4 if scale else 1) for r in rewards]", "its own group"),
        ("leave one out", GROUPS + "return [x for g in G for x in ((len(g) * (r - s.fmean(g)) / (len(g) - 1)) / (s.stdev(g) + 1e-4 if scale else 1) for r in g)]", "its own group"),
        ("the group every n-th answer", "import statistics as s\n    k = len(rewards) // group_size\n    G = [rewards[i::k] for i in range(k)]\n    return [(r - s.fmean(G[i % k])) / (s.stdev(G[i % k]) + 1e-4 if scale else 1) for i, r in enumerate(rewards)]", "its own group"),
        ("the best of the group", GROUPS + "return [x for g in G for x in ((r - max(g)) / (s.stdev(g) + 1e-4 if scale else 1) for r in g)]", "its own group"),
        ("mean minus reward", GROUPS + "return [x for g in G for x in ((s.fmean(g) - r) / (s.stdev(g) + 1e-4 if scale else 1) for r in g)]", "its own group"),
        ("scaled always", GROUPS + "return [x for g in G for x in ((r - s.fmean(g)) / (s.stdev(g) + 1e-4) for r in g)]", "its own group"),
        ("never scaled", GROUPS + "return [r - s.fmean(g) for g in G for r in g]", "deviation"),
        ("the biased deviation", GROUPS + "return [x for g in G for x in ((r - s.fmean(g)) / (s.pstdev(g) + 1e-4 if scale else 1) for r in g)]", "n − 1"),
        ("the variance", GROUPS + "return [x for g in G for x in ((r - s.fmean(g)) / (s.variance(g) + 1e-4 if scale else 1) for r in g)]", "n − 1"),
        ("the deviation of the batch", GROUPS + "return [x for g in G for x in ((r - s.fmean(g)) / (s.stdev(rewards) + 1e-4 if scale else 1) for r in g)]", "its own deviation"),
        ("divided by zero", GROUPS + "return [x for g in G for x in ((r - s.fmean(g)) / (s.stdev(g) if scale else 1) for r in g)]", "n − 1"),
        ("another constant", GROUPS + "return [x for g in G for x in ((r - s.fmean(g)) / (s.stdev(g) + 1e-2 if scale else 1) for r in g)]", "n − 1"),
        ("a flat group gets its reward", GROUPS + "return [x for g in G for x in (g if len(set(g)) == 1 and g[0] else [(r - s.fmean(g)) / (s.stdev(g) + 1e-4 if scale else 1) for r in g])]", "teaches nothing"),
    ],
    "05.5": [
        ("reference minus policy", "import math\n    k = ref_logp - logp\n    return [k, k * k / 2, math.exp(-k) - 1 + k]", "log-ratio of policy to reference"),
        ("k1 without its sign", "import math\n    k = logp - ref_logp\n    return [abs(k), k * k / 2, math.exp(-k) - 1 + k]", "log-ratio of policy to reference"),
        ("k2 without the half", "import math\n    k = logp - ref_logp\n    return [k, k * k, math.exp(-k) - 1 + k]", "half its square"),
        ("k3 without the log-ratio", "import math\n    k = logp - ref_logp\n    return [k, k * k / 2, math.exp(-k) - 1]", "never negative"),
        ("k3 with the log-ratio's sign turned", "import math\n    k = logp - ref_logp\n    return [k, k * k / 2, math.exp(-k) - 1 - k]", "never negative"),
        ("k3 without the minus 1", "import math\n    k = logp - ref_logp\n    return [k, k * k / 2, math.exp(-k) + k]", "all three are zero"),
        ("k3 for the other direction", "import math\n    k = logp - ref_logp\n    return [k, k * k / 2, math.exp(k) - 1 - k]", "averaged over"),
        ("k3 times the ratio", "import math\n    k = logp - ref_logp\n    return [k, k * k / 2, k * math.exp(k) - math.exp(k) + 1]", "averaged over"),
        ("k2 for k3", "k = logp - ref_logp\n    return [k, k * k / 2, k * k / 2]", "averaged over"),
        ("k1 clipped at zero for k3", "k = logp - ref_logp\n    return [k, k * k / 2, max(k, 0.0)]", "averaged over"),
        ("a difference of probabilities", "import math\n    k = math.exp(logp) - math.exp(ref_logp)\n    return [k, k * k / 2, math.exp(-k) - 1 + k]", "log-ratio of policy to reference"),
    ],
    "05.6": [
        ("not normalised", TILT + "return [p * math.exp(r / beta) for p, r in zip(ref_probs, rewards)]", "sum 1"),
        ("logits for probabilities", TILT + "return [math.log(p) + r / beta if p else 0.0 for p, r in zip(ref_probs, rewards)]", "sum 1"),
        ("the reference forgotten", TILT + "return norm([math.exp(r / beta) for r in rewards])", "higher objective"),
        ("times beta", TILT + "return norm([p * math.exp(r * beta) for p, r in zip(ref_probs, rewards)])", "higher objective"),
        ("the reward's sign", TILT + "return norm([p * math.exp(-r / beta) for p, r in zip(ref_probs, rewards)])", "higher objective"),
        ("the best answer", TILT + "k = max(range(len(rewards)), key=lambda i: rewards[i])\n    return [1 - 1e-9 if i == k else 1e-9 for i in range(len(rewards))]", "higher objective"),
        ("the divergence the other way round", TILT + "m = max(rewards)\n    return norm([p / (1 + (m - r) / beta) for p, r in zip(ref_probs, rewards)])", "higher objective"),
        ("beta on the reference", TILT + "return norm([p**beta * math.exp(r) for p, r in zip(ref_probs, rewards)])", "higher objective"),
        ("a mixture", TILT + "e = norm([math.exp(r / beta) for r in rewards])\n    return [(p + q) / 2 for p, q in zip(ref_probs, e)]", "higher objective"),
        ("a probability of zero raised", TILT + "m = max(rewards)\n    return norm([max(p, 1e-3) * math.exp((r - m) / beta) for p, r in zip(ref_probs, rewards)])", "never gives"),
        ("the logarithm of zero", TILT + "return norm([math.exp(math.log(p) + r / beta) for p, r in zip(ref_probs, rewards)])", "never gives"),
        ("overflow", TILT + "return norm([p * math.exp(r / beta) for p, r in zip(ref_probs, rewards)])", "overflow"),
        ("rewards clipped", TILT + "return norm([p * math.exp(max(-50, min(50, r / beta))) for p, r in zip(ref_probs, rewards)])", "overflow"),
    ],
    "06.1": [
        ("reference minus policy", "return beta * sum(q - p for p, q, m in zip(logps, ref_logps, mask) if m)", "log π_ref"),
        ("without the reference", "return beta * sum(p for p, m in zip(logps, mask) if m)", "the policy is the reference"),
        ("divided by beta", "return sum(p - q for p, q, m in zip(logps, ref_logps, mask) if m) / beta", "log π_ref"),
        ("without beta", "return float(sum(p - q for p, q, m in zip(logps, ref_logps, mask) if m))", "log π_ref"),
        ("a ratio of log-probabilities", "return beta * (sum(p for p, m in zip(logps, mask) if m) / sum(q for q, m in zip(ref_logps, mask) if m) - 1)", "log π_ref"),
        ("a difference of probabilities", "import math\n    t = lambda x: math.exp(sum(p for p, m in zip(x, mask) if m))\n    return beta * (t(logps) - t(ref_logps))", "log π_ref"),
        ("the mean a token", "return beta * sum(p - q for p, q, m in zip(logps, ref_logps, mask) if m) / sum(mask)", "the tokens of the answer count"),
        ("the prompt too", "return beta * sum(p - q for p, q in zip(logps, ref_logps))", "the tokens of the answer count"),
        ("masked by a product", "return beta * sum((p - q) * m for p, q, m in zip(logps, ref_logps, mask))", "the tokens of the answer count"),
        ("only the policy masked", "return beta * (sum(p for p, m in zip(logps, mask) if m) - sum(ref_logps))", "the policy is the reference"),
        ("the last token only", "t = max(i for i, m in enumerate(mask) if m)\n    return beta * (logps[t] - ref_logps[t])", "the tokens of the answer count"),
    ],
    "06.2": [
        ("without the reference", PAIR + "m = beta * (c - r)\n    return [F(-m), -beta * S(-m), beta * S(-m)]", "before the first step"),
        ("the reference added", PAIR + "m = beta * (c + cr - r - rr)\n    return [F(-m), -beta * S(-m), beta * S(-m)]", "before the first step"),
        ("beta outside the logarithm", PAIR + "m = (c - cr) - (r - rr)\n    return [beta * F(-m), -beta * S(-m), beta * S(-m)]", "before the first step"),
        ("the likelihood, not its negative", PAIR + "m = beta * ((c - cr) - (r - rr))\n    return [-F(-m), beta * S(-m), -beta * S(-m)]", "before the first step"),
        ("derivatives without beta", PAIR + "m = beta * ((c - cr) - (r - rr))\n    return [F(-m), -S(-m), S(-m)]", "before the first step"),
        ("the derivatives exchanged", PAIR + "m = beta * ((c - cr) - (r - rr))\n    return [F(-m), beta * S(-m), -beta * S(-m)]", "before the first step"),
        ("the rejected answer left alone", PAIR + "m = beta * ((c - cr) - (r - rr))\n    return [F(-m), -beta * S(-m), 0.0]", "before the first step"),
        ("chosen and rejected exchanged", PAIR + "m = beta * ((r - rr) - (c - cr))\n    return [F(-m), -beta * S(-m), beta * S(-m)]", "implicit rewards"),
        ("without beta", PAIR + "m = (c - cr) - (r - rr)\n    return [F(-m), -beta * S(-m), beta * S(-m)]", "implicit rewards"),
        ("divided by beta", PAIR + "m = ((c - cr) - (r - rr)) / beta\n    return [F(-m), -beta * S(-m), beta * S(-m)]", "implicit rewards"),
        ("the references exchanged", PAIR + "m = beta * ((c - rr) - (r - cr))\n    return [F(-m), -beta * S(-m), beta * S(-m)]", "before the first step"),
        ("the weight of a right order", PAIR + "m = beta * ((c - cr) - (r - rr))\n    return [F(-m), -beta * S(m), beta * S(m)]", "the derivatives are"),
        ("no weight", PAIR + "m = beta * ((c - cr) - (r - rr))\n    return [F(-m), -beta / 2, beta / 2]", "the derivatives are"),
        ("the hinge", PAIR + "m = beta * ((c - cr) - (r - rr))\n    return [max(0.0, math.log(2) - m), -beta / 2, beta / 2]", "implicit rewards"),
        ("overflow", "import math\n    m = beta * ((policy_chosen_logp - ref_chosen_logp) - (policy_rejected_logp - ref_rejected_logp)); s = 1 / (1 + math.exp(-m))\n    return [-math.log(s), beta * (s - 1), beta * (1 - s)]", "hundreds"),
        ("a small constant in the logarithm", "import math\n    m = beta * ((policy_chosen_logp - ref_chosen_logp) - (policy_rejected_logp - ref_rejected_logp)); s = 1 / (1 + math.exp(-m)) if m > -700 else 0.0\n    return [-math.log(s + 1e-10), beta * (s - 1), beta * (1 - s)]", "hundreds"),
    ],
    "06.3": [
        ("a target of 1/beta", IPO + "d = h - 1 / beta\n    return [d * d, 2 * d, -2 * d]", "the loss is 0"),
        ("a target of beta/2", IPO + "d = h - beta / 2\n    return [d * d, 2 * d, -2 * d]", "the loss is 0"),
        ("a target of 1/2 for beta times the difference", IPO + "d = beta * h - 0.5\n    return [d * d, 2 * d, -2 * d]", "short of the target"),
        ("no target", IPO + "return [h * h, 2 * h, -2 * h]", "the loss is 0"),
        ("a target of minus 1/(2 beta)", IPO + "d = h + 1 / (2 * beta)\n    return [d * d, 2 * d, -2 * d]", "the loss is 0"),
        ("rejected minus chosen", IPO + "d = -h - 1 / (2 * beta)\n    return [d * d, -2 * d, 2 * d]", "the loss is 0"),
        ("half the square", IPO + "d = h - 1 / (2 * beta)\n    return [d * d / 2, d, -d]", "short of the target"),
        ("the absolute distance", IPO + "d = h - 1 / (2 * beta); s = (d > 0) - (d < 0)\n    return [abs(d), s, -s]", "short of the target"),
        ("derivatives of one sign", IPO + "d = h - 1 / (2 * beta)\n    return [d * d, 2 * d, 2 * d]", "short of the target"),
        ("the derivative without the 2", IPO + "d = h - 1 / (2 * beta)\n    return [d * d, d, -d]", "short of the target"),
        ("nothing beyond the target", IPO + "d = min(h - 1 / (2 * beta), 0.0)\n    return [d * d, 2 * d, -2 * d]", "beyond the target"),
        ("DPO's loss", IPO + "import math\n    s = 1 / (1 + math.exp(beta * h))\n    return [math.log1p(math.exp(-beta * h)), -beta * s, beta * s]", "the loss is 0"),
        ("the chosen answer held", IPO + "d = h - 1 / (2 * beta); x = max(0.0, -chosen_logratio)\n    return [d * d + x * x, 2 * d - 2 * x, -2 * d]", "the loss is 0"),
    ],
    "06.4": [
        ("sums", SIMPO + "return F(gamma - beta * (sum(chosen_logps) - sum(rejected_logps)))", "likely a token"),
        ("gamma added", SIMPO + "return F(-gamma - beta * (m(chosen_logps) - m(rejected_logps)))", "difference of gamma"),
        ("gamma times beta", SIMPO + "return F(beta * gamma - beta * (m(chosen_logps) - m(rejected_logps)))", "difference of gamma"),
        ("gamma over beta", SIMPO + "return F(gamma / beta - beta * (m(chosen_logps) - m(rejected_logps)))", "difference of gamma"),
        ("no gamma", SIMPO + "return F(-beta * (m(chosen_logps) - m(rejected_logps)))", "difference of gamma"),
        ("no beta", SIMPO + "return F(gamma - (m(chosen_logps) - m(rejected_logps)))", "difference of gamma"),
        ("the sign of the margin", SIMPO + "return F(gamma + beta * (m(chosen_logps) - m(rejected_logps)))", "difference of gamma"),
        ("one common length", SIMPO + "n = max(len(chosen_logps), len(rejected_logps))\n    return F(gamma - beta * (sum(chosen_logps) - sum(rejected_logps)) / n)", "likely a token"),
        ("both over the length of the chosen", SIMPO + "n = len(chosen_logps)\n    return F(gamma - beta * (sum(chosen_logps) - sum(rejected_logps)) / n)", "likely a token"),
        ("the common part only", SIMPO + "n = min(len(chosen_logps), len(rejected_logps))\n    return F(gamma - beta * (sum(chosen_logps[:n]) - sum(rejected_logps[:n])) / n)", "own tokens"),
        ("a mean of probabilities", SIMPO + "p = lambda x: m([math.exp(v) for v in x])\n    return F(gamma - beta * (math.log(p(chosen_logps)) - math.log(p(rejected_logps))))", "own tokens"),
        ("divided by the square root of the length", SIMPO + "q = lambda x: sum(x) / len(x) ** 0.5\n    return F(gamma - beta * (q(chosen_logps) - q(rejected_logps)))", "likely a token"),
        ("a hinge", SIMPO + "return max(0.0, gamma + math.log(2) - beta * (m(chosen_logps) - m(rejected_logps)))", "likely a token"),
    ],
    "06.5": [
        ("the rate of the margin", STEP + "return float(s @ s)", "unrelated embeddings"),
        ("the normaliser forgotten", STEP + "return float(E[c] @ s)", "unrelated embeddings"),
        ("the rejected answer's rate", STEP + "return float((E[r] - p @ E) @ s)", "unrelated embeddings"),
        ("all tokens alike", STEP + "return float((E[c] - E.mean(0)) @ s)", "unrelated embeddings"),
        ("the sign", STEP + "return float((p @ E - E[c]) @ s)", "unrelated embeddings"),
        ("the probability, not its logarithm", STEP + "return float(p[c] * ((E[c] - p @ E) @ s))", "unrelated embeddings"),
        ("a step towards the chosen only", STEP + "return float((E[c] - p @ E) @ (E[c] - p @ E))", "unrelated embeddings"),
        ("a step away from the rejected", STEP + "return float((E[c] - p @ E) @ (p @ E - E[r]))", "unrelated embeddings"),
        ("only the pair in the normaliser", STEP + "q = (E @ h)[[c, r]].softmax(0)\n    return float((E[c] - q @ E[[c, r]]) @ s)", "unrelated embeddings"),
        ("one-hot embeddings assumed", STEP + "return float(1 - p[c] + p[r])", "look alike"),
        ("never negative", STEP + "return max(0.0, float((E[c] - p @ E) @ s))", "look alike"),
        ("the embeddings normalised", STEP + "U = E / E.norm(dim=1, keepdim=True).clamp(min=1e-9)\n    return float((U[c] - p @ U) @ (U[c] - U[r]))", "look alike"),
    ],
    "07.1": [
        ("alpha exchanged", SOFT + "return ((1 - alpha) * hard + alpha * T * T * soft) / n", "alpha = 1"),
        ("the cross-entropy at temperature T", SOFT + "hard = F.cross_entropy(z / T, y, reduction='sum')\n    return (alpha * hard + (1 - alpha) * T * T * soft) / n", "alpha = 1"),
        ("T² on both terms", SOFT + "return T * T * (alpha * hard + (1 - alpha) * soft) / n", "alpha = 1"),
        ("cross-entropy for the divergence", SOFT + "soft = -(p * logq).sum()\n    return (alpha * hard + (1 - alpha) * T * T * soft) / n", "equal to the teacher"),
        ("the divergence the other way round", SOFT + "soft = (logq.exp() * (logq - p.log())).sum()\n    return (alpha * hard + (1 - alpha) * T * T * soft) / n", "KL(teacher ‖ student)"),
        ("kl_div with student and teacher exchanged", SOFT + "soft = F.kl_div((t / T).log_softmax(-1), (z / T).softmax(-1), reduction='sum')\n    return (alpha * hard + (1 - alpha) * T * T * soft) / n", "KL(teacher ‖ student)"),
        ("kl_div's default mean, over the vocabulary too", SOFT + "soft = soft / z.shape[1]\n    return (alpha * hard + (1 - alpha) * T * T * soft) / n", "summed over the vocabulary"),
        ("no T²", SOFT + "return (alpha * hard + (1 - alpha) * soft) / n", "multiplied by T²"),
        ("T once", SOFT + "return (alpha * hard + (1 - alpha) * T * soft) / n", "multiplied by T²"),
        ("divided by T²", SOFT + "return (alpha * hard + (1 - alpha) * soft / T**2) / n", "multiplied by T²"),
        ("only the teacher softened", SOFT + "soft = F.kl_div(z.log_softmax(-1), p, reduction='sum')\n    return (alpha * hard + (1 - alpha) * T * T * soft) / n", "equal to the teacher"),
        ("only the student softened", SOFT + "soft = F.kl_div(logq, t.softmax(-1), reduction='sum')\n    return (alpha * hard + (1 - alpha) * T * T * soft) / n", "equal to the teacher"),
        ("the logits multiplied by T", SOFT + "soft = F.kl_div((z * T).log_softmax(-1), (t * T).softmax(-1), reduction='sum')\n    return (alpha * hard + (1 - alpha) * T * T * soft) / n", "softened"),
        ("squared error of the logits", SOFT + "soft = ((z - t) ** 2).sum() / z.shape[1] / 2 / T**2\n    return (alpha * hard + (1 - alpha) * T * T * soft) / n", "equal to the teacher"),
        ("the mean over all positions", SOFT + "return (alpha * hard + (1 - alpha) * T * T * soft) / len(labels)", "positions with the label -100"),
        ("the soft term on all positions", SOFT + "z, t = torch.tensor(student_logits), torch.tensor(teacher_logits)\n    soft = F.kl_div((z / T).log_softmax(-1), (t / T).softmax(-1), reduction='sum')\n    return alpha * hard / n + (1 - alpha) * T * T * soft / len(labels)", "positions with the label -100"),
        ("nan without a label", SOFT + "return (alpha * hard + (1 - alpha) * T * T * soft) / (y >= 0).sum()", "without any label"),
    ],
    "07.2": [
        ("beta for the student", KLS + "if beta in (0, 1): return kl(teacher, student) if beta else kl(student, teacher)\n    m = [beta * q + (1 - beta) * p for p, q in zip(teacher, student)]\n    return beta * kl(student, m) + (1 - beta) * kl(teacher, m)", "beta = 0"),
        ("the formula at the ends", KLS + "m = [beta * p + (1 - beta) * q for p, q in zip(teacher, student)]\n    return beta * kl(teacher, m) + (1 - beta) * kl(student, m)", "beta = 0"),
        ("forward at both ends", KLS + "if beta in (0, 1): return kl(teacher, student)\n    m = [beta * p + (1 - beta) * q for p, q in zip(teacher, student)]\n    return beta * kl(teacher, m) + (1 - beta) * kl(student, m)", "beta = 1"),
        ("reverse at both ends", KLS + "if beta in (0, 1): return kl(student, teacher)\n    m = [beta * p + (1 - beta) * q for p, q in zip(teacher, student)]\n    return beta * kl(teacher, m) + (1 - beta) * kl(student, m)", "beta = 0"),
        ("a mean of both divergences", KLS + "return (1 - beta) * kl(teacher, student) + beta * kl(student, teacher)", "one half"),
        ("the divergences from the mixture", KLS + "if beta in (0, 1): return kl(student, teacher) if beta else kl(teacher, student)\n    m = [beta * p + (1 - beta) * q for p, q in zip(teacher, student)]\n    return beta * kl(m, teacher) + (1 - beta) * kl(m, student)", "one half"),
        ("the sum, not the mean", KLS + "if beta in (0, 1): return kl(student, teacher) if beta else kl(teacher, student)\n    m = [beta * p + (1 - beta) * q for p, q in zip(teacher, student)]\n    return kl(teacher, m) + kl(student, m)", "one half"),
        ("in bits", KLS + "if beta in (0, 1): return kl(student, teacher) if beta else kl(teacher, student)\n    m = [beta * p + (1 - beta) * q for p, q in zip(teacher, student)]\n    return (beta * kl(teacher, m) + (1 - beta) * kl(student, m)) / math.log(2)", "one half"),
        ("the square root", KLS + "if beta in (0, 1): return kl(student, teacher) if beta else kl(teacher, student)\n    m = [beta * p + (1 - beta) * q for p, q in zip(teacher, student)]\n    return (beta * kl(teacher, m) + (1 - beta) * kl(student, m)) ** 0.5", "one half"),
        ("logarithms mixed", KLS + "if beta in (0, 1): return kl(student, teacher) if beta else kl(teacher, student)\n    m = [p**beta * q ** (1 - beta) for p, q in zip(teacher, student)]\n    m = [x / sum(m) for x in m]\n    return beta * kl(teacher, m) + (1 - beta) * kl(student, m)", "one half"),
        ("an even mixture", KLS + "if beta in (0, 1): return kl(student, teacher) if beta else kl(teacher, student)\n    m = [(p + q) / 2 for p, q in zip(teacher, student)]\n    return beta * kl(teacher, m) + (1 - beta) * kl(student, m)", "in between"),
        ("the mixture's weights exchanged", KLS + "if beta in (0, 1): return kl(student, teacher) if beta else kl(teacher, student)\n    m = [beta * q + (1 - beta) * p for p, q in zip(teacher, student)]\n    return beta * kl(teacher, m) + (1 - beta) * kl(student, m)", "in between"),
        ("the outer weights exchanged", KLS + "if beta in (0, 1): return kl(student, teacher) if beta else kl(teacher, student)\n    m = [beta * p + (1 - beta) * q for p, q in zip(teacher, student)]\n    return (1 - beta) * kl(teacher, m) + beta * kl(student, m)", "in between"),
    ],
    "07.3": [
        ("q's prefixes", KLS + "return kl(p_first, q_first) + sum(w * kl(a, b) for w, a, b in zip(q_first, p_next, q_next))", "prefixes that p writes"),
        ("all prefixes alike", KLS + "return kl(p_first, q_first) + sum(kl(a, b) for a, b in zip(p_next, q_next)) / len(p_next)", "prefixes that p writes"),
        ("all prefixes added", KLS + "return kl(p_first, q_first) + sum(kl(a, b) for a, b in zip(p_next, q_next))", "prefixes that p writes"),
        ("the likeliest prefix", KLS + "k = max(range(len(p_first)), key=lambda i: p_first[i])\n    return kl(p_first, q_first) + kl(p_next[k], q_next[k])", "prefixes that p writes"),
        ("the first token only", KLS + "return kl(p_first, q_first)", "prefixes that p writes"),
        ("the second token only", KLS + "return sum(w * kl(a, b) for w, a, b in zip(p_first, p_next, q_next))", "it is the divergence of the first"),
        ("the mean a token", KLS + "return (kl(p_first, q_first) + sum(w * kl(a, b) for w, a, b in zip(p_first, p_next, q_next))) / 2", "it is the divergence of the first"),
        ("the reverse", KLS + "return kl(q_first, p_first) + sum(w * kl(b, a) for w, a, b in zip(q_first, p_next, q_next))", "it is the divergence of the first"),
        ("the second divergence reversed", KLS + "return kl(p_first, q_first) + sum(w * kl(b, a) for w, a, b in zip(p_first, p_next, q_next))", "prefixes that p writes"),
        ("second tokens as if independent of the first", KLS + "n = len(p_next[0])\n    a = [sum(w * r[k] for w, r in zip(p_first, p_next)) for k in range(n)]\n    b = [sum(w * r[k] for w, r in zip(q_first, q_next)) for k in range(n)]\n    return kl(p_first, q_first) + kl(a, b)", "the divergence of the first"),
        ("a logarithm of zero", "import math\n    kl = lambda p, q: sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))\n    return kl(p_first, q_first) + sum(w * kl(a, b) for w, a, b in zip(p_first, p_next, q_next))", "never writes"),
    ],
    "07.4": [
        ("the student's top k", TOP + "top = rank(student)[:k]\n    return kl(*(kept(x, top) + [1 - sum(kept(x, top))] for x in (teacher, student)))", "one by one"),
        ("the first k tokens", TOP + "top = range(k)\n    return kl(*(kept(x, top) + [1 - sum(kept(x, top))] for x in (teacher, student)))", "one by one"),
        ("the k least probable", TOP + "top = rank(teacher)[-k:]\n    return kl(*(kept(x, top) + [1 - sum(kept(x, top))] for x in (teacher, student)))", "one by one"),
        ("each with its own top k", TOP + "return kl(*(kept(x, rank(x)[:k]) + [1 - sum(kept(x, rank(x)[:k]))] for x in (teacher, student)))", "whole divergence"),
        ("renormalised", TOP + "top = rank(teacher)[:k]\n    return kl(*([v / sum(kept(x, top)) for v in kept(x, top)] for x in (teacher, student)))", "whole divergence"),
        ("only the teacher renormalised", TOP + "top = rank(teacher)[:k]; p = kept(teacher, top)\n    return kl([v / sum(p) for v in p], kept(student, top))", "equal to the teacher"),
        ("the rest dropped", TOP + "top = rank(teacher)[:k]\n    return kl(kept(teacher, top), kept(student, top))", "whole divergence"),
        ("the rest split evenly", TOP + "top = rank(teacher)[:k]; n = len(teacher) - k\n    fill = lambda x: [x[i] if i in top else (1 - sum(kept(x, top))) / n for i in range(len(x))]\n    return kl(fill(teacher), student)", "equal to the teacher"),
        ("the student's rest as one token's", TOP + "top = rank(teacher)[:k]; p = kept(teacher, top); rest = [i for i in range(len(teacher)) if i not in top]\n    return kl(p + [1 - sum(p)], kept(student, top) + [student[rest[0]]])", "equal to the teacher"),
        ("the divergence the other way round", TOP + "top = rank(teacher)[:k]\n    return kl(*(kept(x, top) + [1 - sum(kept(x, top))] for x in (student, teacher)))", "whole divergence"),
        ("cross-entropy", TOP + "top = rank(teacher)[:k]; p, q = (kept(x, top) + [1 - sum(kept(x, top))] for x in (teacher, student))\n    return -sum(a * math.log(b) for a, b in zip(p, q))", "equal to the teacher"),
        ("k minus 1 tokens kept", TOP + "top = rank(teacher)[: k - 1]\n    return kl(*(kept(x, top) + [1 - sum(kept(x, top))] for x in (teacher, student)))", "whole divergence"),
        ("the whole divergence", TOP + "return kl(teacher, student)", "one by one"),
    ],
    "07.5": [
        ("the mean of min(1, p/q) over tokens", DRAFT + "a = sum(min(1, p / q) for p, q in zip(teacher, student)) / len(teacher)\n    return [a, tokens(a)]", "sum of min"),
        ("averaged over the teacher", DRAFT + "a = sum(p * min(1, p / q) for p, q in zip(teacher, student) if q)\n    return [a, tokens(a)]", "sum of min"),
        ("the ratio upside down", DRAFT + "a = sum(q * min(1, q / p) for p, q in zip(teacher, student) if p)\n    return [a, tokens(a)]", "sum of min"),
        ("the chance of two equal draws", DRAFT + "a = sum(p * q for p, q in zip(teacher, student))\n    return [a, tokens(a)]", "sum of min"),
        ("agreement of the favourites", DRAFT + "f = lambda x: max(range(len(x)), key=lambda i: x[i])\n    a = float(f(teacher) == f(student))\n    return [a, tokens(a)]", "sum of min"),
        ("the distance, not one minus it", DRAFT + "a = sum(abs(p - q) for p, q in zip(teacher, student)) / 2\n    return [a, tokens(a)]", "sum of min"),
        ("the distance not halved", DRAFT + "a = 1 - sum(abs(p - q) for p, q in zip(teacher, student))\n    return [a, tokens(a)]", "sum of min"),
        ("the larger of the two", DRAFT + "a = sum(max(p, q) for p, q in zip(teacher, student))\n    return [a, tokens(a)]", "sum of min"),
        ("the overlap squared-root", DRAFT + "a = sum((p * q) ** 0.5 for p, q in zip(teacher, student))\n    return [a, tokens(a)]", "sum of min"),
        ("without the teacher's own token", DRAFT + "return [a, sum(a**k for k in range(1, n_draft + 1))]", "without a draft"),
        ("rejections do not stop the rest", DRAFT + "return [a, 1 + n_draft * a]", "1 + a"),
        ("all or nothing", DRAFT + "return [a, 1 + n_draft * a**n_draft]", "1 + a"),
        ("one term too few", DRAFT + "return [a, sum(a**k for k in range(max(n_draft, 1)))]", "n_draft + 1 tokens"),
        ("one term too many", DRAFT + "return [a, sum(a**k for k in range(n_draft + 2))]", "without a draft"),
        ("an endless draft", DRAFT + "return [a, min(1 / (1 - a) if a < 1 else 1e9, n_draft + 1)]", "1 + a"),
        ("divided by zero", DRAFT + "return [a, (1 - a ** (n_draft + 1)) / (1 - a)]", "always accepted"),
    ],
}  # fmt: skip


WRONG |= answers_ch02.WRONG | answers_ch08.WRONG | answers_ch09.WRONG | answers_ch10.WRONG


def wrong_answer(id, body):
    head = EXERCISES[id].stub.split("\n")[0]
    return compile_function(f"{head}\n    {body}\n", EXERCISES[id].function)


def test_every_written_chapter_has_four_exercises_and_every_exercise_has_wrong_answers():
    assert all(sum(id.startswith(chapter) for id in EXERCISES) >= 4 for chapter in ("01.", "02.", "03.", "04.", "05.", "06.", "07.", "08.", "09.", "10."))
    assert all(len(WRONG[id]) >= 3 for id in EXERCISES)


@pytest.mark.parametrize("id", EXERCISES)
def test_exercise_is_complete(id):
    e = EXERCISES[id]
    assert all(len(t) > 5 for t in (e.title, e.title_zh, e.statement, e.statement_zh))
    assert len(e.properties) >= 3
    assert e.solution.startswith(e.stub.split("\n")[0]), "stub and solution have one signature"


@pytest.mark.parametrize("id", EXERCISES)
@pytest.mark.parametrize("seed", SEEDS)
def test_solution_passes(id, seed, capsys):
    e = EXERCISES[id]
    check(id, compile_function(e.solution, e.function), seed=seed)
    n = len(e.properties)
    assert capsys.readouterr().out == f"{id} passed: {n} properties on {25 * n} inputs\n"


@pytest.mark.parametrize("id", EXERCISES)
def test_stub_fails(id):
    e = EXERCISES[id]
    with pytest.raises(CheckFailed, match=rf"{id} failed: "):
        check(id, compile_function(e.stub, e.function), seed=0)


@pytest.mark.parametrize("id, what, body, caught_by", [(id, *w) for id, ws in WRONG.items() for w in ws])
def test_wrong_answer_is_caught(id, what, body, caught_by):
    for seed in SEEDS:
        with pytest.raises(CheckFailed) as e:
            check(id, wrong_answer(id, body), seed=seed)
        lines = str(e.value).split("\n")
        assert lines[0].startswith(f"{id} failed: ") and caught_by in lines[0], lines[0]
        assert lines[1].startswith(f"  input     {EXERCISES[id].function}(")
        assert lines[2].startswith("  returned  ") and lines[3].startswith("  expected  ")
        assert lines[-1] == f"  again     check('{id}', {EXERCISES[id].function}, seed={seed})"

# Right answers in float32, as torch gives them: with the package's own functions where it has them.
RIGHT = {
    "05.2": "from llm_train_course.rlhf import gae\n    row = lambda x: torch.tensor([[v if m else 9.0 for v, m in zip(x, mask)]])\n    return gae(row(rewards), row(values), torch.tensor([mask]), gamma, lam)[0][0]",
    "05.3": "from llm_train_course.rlhf import clipped_surrogate\n    x = torch.tensor(logp, requires_grad=True)\n    y = clipped_surrogate(x, torch.tensor(old_logp), torch.tensor(advantage), clip_eps)\n    y.backward()\n    return y.item(), x.grad",
    "05.4": "from llm_train_course.rlhf import grpo_advantages\n    return grpo_advantages(torch.tensor(rewards), group_size, scale)",
    "05.5": "from llm_train_course.rlhf import kl_estimate\n    return [kl_estimate(torch.tensor(logp), torch.tensor(ref_logp), k).item() for k in ('k1', 'k2', 'k3')]",
    "05.6": "from llm_train_course.rlhf import optimal_policy\n    return optimal_policy(torch.tensor(ref_probs), torch.tensor(rewards), beta)",
    "06.2": "c, r = (torch.tensor(x, requires_grad=True) for x in (policy_chosen_logp, policy_rejected_logp))\n    y = -torch.nn.functional.logsigmoid(beta * ((c - ref_chosen_logp) - (r - ref_rejected_logp)))\n    y.backward()\n    return y.item(), c.grad, r.grad",
    "06.4": "m = torch.tensor(chosen_logps).mean() - torch.tensor(rejected_logps).mean()\n    return -torch.nn.functional.logsigmoid(beta * m - gamma)",
    "06.5": "h = torch.tensor(hidden, requires_grad=True)\n    logps = (torch.tensor(embeddings) @ h).log_softmax(0)\n    step = torch.autograd.grad(logps[chosen] - logps[rejected], h, retain_graph=True)[0]\n    return torch.autograd.grad(logps[chosen], h)[0] @ step",
    "07.1": "from llm_train_course.distill import distill_loss\n    return distill_loss(torch.tensor(student_logits), torch.tensor(teacher_logits), torch.tensor(labels), alpha, temperature)",
    "07.2": "from llm_train_course.distill import generalized_jsd\n    return generalized_jsd(torch.tensor(student).log(), torch.tensor(teacher).log(), beta)",
    "07.4": "from llm_train_course.distill import teacher_top_k, top_k_divergence\n    return top_k_divergence(torch.tensor(student).log(), *teacher_top_k(torch.tensor(teacher).log(), k))",
    "07.5": "from llm_train_course.distill import acceptance_rate, speculative_tokens\n    a = acceptance_rate(torch.tensor(student).log(), torch.tensor(teacher).log()).clamp(max=1).item()\n    return a, speculative_tokens(a, n_draft)",
}  # fmt: skip


RIGHT |= answers_ch02.RIGHT | answers_ch08.RIGHT | answers_ch09.RIGHT | answers_ch10.RIGHT


@pytest.mark.parametrize("id", RIGHT)
def test_the_packages_own_functions_in_float32_pass(id):
    answer = wrong_answer(id, "import torch\n    " + RIGHT[id])
    for seed in SEEDS:
        check(id, answer, seed=seed)


def test_a_fresh_seed_is_drawn_and_a_failure_can_be_repeated():
    fn = wrong_answer("01.2", WRONG["01.2"][0][1])
    seeds = set()
    for _ in range(6):
        with pytest.raises(CheckFailed) as e:
            check("01.2", fn)
        seed = int(str(e.value).rsplit("seed=", 1)[1].rstrip(")"))
        seeds.add(seed)
        with pytest.raises(CheckFailed) as again:
            check("01.2", fn, seed=seed)
        assert str(again.value) == str(e.value)
    assert len(seeds) > 1


def test_an_exception_is_reported_with_its_input():
    with pytest.raises(CheckFailed, match=r"it raised ZeroDivisionError") as e:
        check("01.3", wrong_answer("01.3", WRONG["01.3"][3][1]), seed=1)
    assert "token_losses=" in str(e.value) and isinstance(e.value.__cause__, ZeroDivisionError)


def test_a_changed_argument_is_reported():
    with pytest.raises(CheckFailed, match="an unchanged argument input_ids"):
        check("01.2", wrong_answer("01.2", WRONG["01.2"][6][1]), seed=1)


def test_tensors_are_accepted():
    import torch

    def completion_labels(input_ids, roles_mask):
        ids, mask = torch.tensor(input_ids), torch.tensor(roles_mask)
        return torch.where(mask.bool(), ids, -100)

    check("01.2", completion_labels, seed=0)


@pytest.mark.parametrize("answer", [None, "nan", "inf", "[]", "True"])
def test_values_that_are_no_answer_fail(answer):
    fn = wrong_answer("01.3", f"return float({answer!r})" if answer in ("nan", "inf") else f"return {answer}")
    with pytest.raises(CheckFailed):
        check("01.3", fn, seed=0)


def test_unknown_ids_list_what_exists():
    with pytest.raises(KeyError, match="01.1, 01.2, 01.3, 01.4"):
        check("99.9", len)
    with pytest.raises(TypeError, match="not a function"):
        check("01.1", 5)
