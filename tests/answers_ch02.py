"Chapter 2 for test_checker: plausible wrong answers (what is wrong, source, words of the property that must catch it), and the package's own functions."
W = "warmup = min(stages - rank - 1, micro_batches)\n    "
LOOP = "order = [['F', i] for i in range(w)]\n    for i in range(micro_batches - w):\n        order += [['F', w + i], ['B', i]]\n    return order + [['B', i] for i in range(micro_batches - w, micro_batches)]"
G = "targets = [t for _, _, t in parts if t is not None]\n    if not targets: return 0.0\n    import math\n    "

WRONG = {
    "02.1": [
        ("its own chunk each time", "return rank", "complete sum of every chunk"),
        ("the usual ring, one chunk off", "return (rank - step) % world_size", "rank r has"),
        ("the other way round", "return (rank + step + 1) % world_size", "complete sum of every chunk"),
        ("not modulo the ranks", "return rank - step - 1", "number of a chunk"),
        ("all send one chunk", "return step % world_size", "no two ranks"),
    ],
    "02.2": [
        ("no optimizer state", "return 4 * n_params", "16 bytes"),
        ("no master copy", "s = -(-n_params // world_size)\n    k = [s if stage >= i else n_params for i in (3, 2, 1)]\n    return 2*k[0] + 2*k[1] + 8*k[2]", "16 bytes"),
        ("divides exactly", "k = [n_params / world_size if stage >= i else n_params for i in (3, 2, 1)]\n    return 2*k[0] + 2*k[1] + 12*k[2]", "padded"),
        ("rounded down", "k = [n_params // world_size if stage >= i else n_params for i in (3, 2, 1)]\n    return 2*k[0] + 2*k[1] + 12*k[2]", "padded"),
        ("stage 1 shards gradients", "s = -(-n_params // world_size)\n    k = [s if stage >= i else n_params for i in (3, 1, 1)]\n    return 2*k[0] + 2*k[1] + 12*k[2]", "shards that divide"),
        ("everything padded", "s = -(-n_params // world_size)\n    k = [s if stage >= i else s * world_size for i in (3, 2, 1)]\n    return 2*k[0] + 2*k[1] + 12*k[2]", "16 bytes"),
    ],
    "02.3": [
        ("more with every stage", "return (stage + 1) * n_params * (world_size - 1) // world_size", "stages 0, 1 and 2 send the same"),
        ("stage 3 gathers once a step", "return (micro_batches + 2 if stage == 3 else micro_batches + 1 if stage == 2 else 2) * n_params * (world_size - 1) // world_size", "stage 3"),
        ("every stage reduces every micro-batch", "return (3 * micro_batches if stage == 3 else micro_batches + 1) * n_params * (world_size - 1) // world_size", "accumulation is free"),
        ("stage 2 like stage 1", "return (3 * micro_batches if stage == 3 else 2) * n_params * (world_size - 1) // world_size", "stage 2 reduces"),
        ("the limit of many ranks", "return (3 * micro_batches if stage == 3 else micro_batches + 1 if stage == 2 else 2) * n_params", "stages 0, 1 and 2 send the same"),
    ],
    "02.4": [
        ("GPipe", "return [['F', i] for i in range(micro_batches)] + [['B', i] for i in range(micro_batches)]", "in flight"),
        ("one forward pass too many at first", "w = min(stages - rank, micro_batches)\n    " + LOOP, "in flight"),
        ("no forward passes first", "w = 0\n    " + LOOP, "as long as GPipe"),
        ("counted from the wrong end", "w = min(rank, micro_batches)\n    " + LOOP, "wait for each other"),
        ("backward passes from the last", "return [['F', i] for i in range(micro_batches)] + [['B', i] for i in reversed(range(micro_batches))]", "keep their order"),
        ("more warm-up than micro-batches", "w = stages - rank - 1\n    " + LOOP, "pass once"),
    ],
    "02.5": [
        ("sums added as they are", G + "return max(m for m, _, _ in parts) + math.log(sum(s for _, s, _ in parts)) - targets[0]", "different maxima"),
        ("losses averaged", G + "return sum(m + math.log(s) for m, s, _ in parts) / len(parts) - targets[0]", "different maxima"),
        ("exp of the logits", G + "return math.log(sum(s * math.exp(m) for m, s, _ in parts)) - targets[0]", "overflow"),
        ("zero taken for none", "import math\n    t = sum(t or 0.0 for _, _, t in parts)\n    if not t: return 0.0\n    k = max(m for m, _, _ in parts)\n    return k + math.log(sum(s * math.exp(m - k) for m, s, _ in parts)) - t", "is a logit"),
        ("ignored tokens count", "import math\n    k = max(m for m, _, _ in parts)\n    return k + math.log(sum(s * math.exp(m - k) for m, s, _ in parts)) - sum(t or 0.0 for _, _, t in parts)", "is a logit"),
    ],
}  # fmt: skip

RIGHT = {}
