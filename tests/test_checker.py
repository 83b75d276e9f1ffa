"The exercise checker: stubs fail, solutions pass, plausible wrong answers are caught, and messages say what is wrong."
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
}  # fmt: skip


def wrong_answer(id, body):
    head = EXERCISES[id].stub.split("\n")[0]
    return compile_function(f"{head}\n    {body}\n", EXERCISES[id].function)


def test_every_written_chapter_has_four_exercises_and_every_exercise_has_wrong_answers():
    assert all(sum(id.startswith(chapter) for id in EXERCISES) >= 4 for chapter in ("01.", "03.", "04."))
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
