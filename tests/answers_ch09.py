"Chapter 9 for test_checker: plausible wrong answers (what is wrong, source, words of the property that must catch it), and the package's own functions."
C = "total, world = sum(map(sum, counts)), len(counts)\n    "
L = "lengths = [min(size, n - s) for s in range(0, n, size)]\n    "
R = "plain, k = 3 * (n * block + head), -(-n // size) if size else 0\n    "

WRONG = {
    "09.1": [
        ("one over the steps", "return [[1 / len(r) for c in r] for r in counts]", "as it has targets"),
        ("without the ranks", C + "return [[c / total if total else 0.0 for c in r] for r in counts]", "DDP takes over the ranks"),
        ("normalised on each rank", "return [[c / sum(r) if sum(r) else 0.0 for c in r] for r in counts]", "DDP takes over the ranks"),
        ("divided by zero", C + "return [[c * world / total for c in r] for r in counts]", "without targets"),
        ("targets over the micro-batches", C + "m = sum(map(len, counts))\n    return [[world / m for c in r] for r in counts]", "as it has targets"),
        ("inverse weights", C + "return [[world * total / c / sum(map(len, counts)) ** 2 if c else 0.0 for c in r] for r in counts]", "as it has targets"),
    ],
    "09.2": [
        ("every saving counted", "return sum(size for s, size, _, alive in saved if alive and s not in weights)", "counts once"),
        ("the view only", "return sum({s: t for s, _, t, alive in saved if alive and s not in weights}.values())", "whole storage"),
        ("weights counted", "return sum({s: size for s, size, _, alive in saved if alive}.values())", "weights are there anyway"),
        ("the dead counted", "return sum({s: size for s, size, _, alive in saved if s not in weights}.values())", "no node"),
        ("told apart by size", "return sum({size for s, size, _, alive in saved if alive and s not in weights})", "same size"),
        ("one dead node kills all", "dead = {s for s, _, _, alive in saved if not alive}\n    return sum({s: n for s, n, _, a in saved if s not in dead and s not in weights}.values())", "no node"),
    ],
    "09.3": [
        ("h in the attention term", "return 2*s*b*h if recompute == 'full' else 34*s*b*h + (5*a*s*b*h if recompute == 'none' else 0)", "nothing recomputed"),
        ("linear in s", "return 2*s*b*h if recompute == 'full' else 34*s*b*h + (5*a*s*b if recompute == 'none' else 0)", "nothing recomputed"),
        ("numbers, not bytes", "return s*b*h if recompute == 'full' else 34*s*b*h + (5*a*s*s*b if recompute == 'none' else 0)", "two bytes"),
        ("selective drops all of attention", "return 2*s*b*h if recompute == 'full' else (23 if recompute == 'selective' else 34)*s*b*h + (5*a*s*s*b if recompute == 'none' else 0)", "selective"),
        ("without dropout's masks", "return 2*s*b*h if recompute == 'full' else 32*s*b*h + (4*a*s*s*b if recompute == 'none' else 0)", "nothing recomputed"),
        ("selective keeps the scores", "return 2*s*b*h if recompute == 'full' else 34*s*b*h + (5 if recompute == 'none' else 2)*a*s*s*b", "selective"),
    ],
    "09.4": [
        ("own input counted twice", L + "return len(lengths) * inp + max(lengths) * block", "all blocks at once"),
        ("worst at the last segment only", L + "return (len(lengths) - 1) * inp + lengths[-1] * block", "short last segment"),
        ("full segments only", "return (n // size - 1) * inp + size * block", "all blocks at once"),
        ("inputs forgotten", L + "return max(lengths) * block", "block by block"),
        ("the square root", "return 2 * (n * inp * block) ** 0.5", "all blocks at once"),
        ("all inputs beside a full segment", L + "return (len(lengths) - 1) * inp + min(size, n) * block", "short last segment"),
    ],
    "09.5": [
        ("always 4/3", "return 4 / 3", "nothing recomputed"),
        ("head run again", R + "return 1 + (n * block + head - k * last) / plain if size else 1.0", "output layer"),
        ("no early stop", R + "return 1 + n * block / plain if size else 1.0", "spares its last product"),
        ("each block spares one", R + "return 1 + n * (block - last) / plain if size else 1.0", "spares its last product"),
        ("a backward pass as dear as a forward pass", R + "return 1 + (n * block - k * last) / (2 * (n * block + head)) if size else 1.0", "4/3"),
        ("whole segments only", R + "return 1 + (n * block - (n // size) * last) / plain if size else 1.0", "spares its last product"),
    ],
}  # fmt: skip

RIGHT = {
    "09.3": "from llm_train_course.memory import gpt_layer_bytes\n    return gpt_layer_bytes(s, b, h, a, recompute)",
    "09.4": "from llm_train_course.memory import segment_peak\n    return segment_peak(n, size, block, inp)",
    "09.1": "import torch\n    c = [torch.tensor(r, dtype=torch.float64) for r in counts]\n    n = max(sum(float(r.sum()) for r in c), 1)\n    return [r * len(c) / n for r in c]",
}  # fmt: skip
