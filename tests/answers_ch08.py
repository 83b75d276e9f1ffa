"Chapter 8 for test_checker: plausible wrong answers (what is wrong, source, words of the property that must catch it), and the package's own functions."
B = "import math; b, eps = 2 ** (exponent_bits - 1) - 1, 2.0 ** -mantissa_bits; top = 2 ** exponent_bits - 1 - (specials == 'ieee'); M = 2 - eps * (1 + (specials == 'fn'))\n    "
R = "import math; b, m = 2 ** (exponent_bits - 1) - 1, mantissa_bits; big = (2 - 2.0 ** -m) * 2.0 ** b; ex = lambda x: math.frexp(x)[1] - 1; q = 2.0 ** (max(ex(x), 1 - b) - m)\n    inf = math.copysign(math.inf, x); near = lambda x, q: round(x / q) * q\n    "
S = "out, good, n = [], 0, 0\n    for o in overflows:\n        n += not o\n        "
K = "import torch; r = lambda x: torch.tensor(x).bfloat16().item()\n    w, c = weight, 0.0\n    for u in updates:\n        "
Q = "import math\n    r = lambda x, e=-6, m=3: round(x / 2.0 ** (max(math.frexp(x)[1] - 1, e) - m)) * 2.0 ** (max(math.frexp(x)[1] - 1, e) - m)\n    parts = [row[i : i + block] for i in range(0, len(row), block)]; amax = lambda p: max(map(abs, p)) or 448.0\n    "

WRONG = {
    "08.1": [
        ("top exponent in use for all", B + "return [(2 - eps) * 2.0 ** (2 ** exponent_bits - 1 - b), 2.0 ** (1 - b), 2.0 ** (1 - b) * eps, eps]", "ieee: the top exponent"),
        ("top exponent reserved for all", B + "return [(2 - eps) * 2.0 ** b, 2.0 ** (1 - b), 2.0 ** (1 - b) * eps, eps]", "fn: the top exponent"),
        ("NaN's code taken for a number", B + "return [(2 - eps) * 2.0 ** (top - b), 2.0 ** (1 - b), 2.0 ** (1 - b) * eps, eps]", "fn: the top exponent"),
        ("a NaN where there is none", B + "M = 2 - eps * (1 + (specials != 'ieee'))\n    return [M * 2.0 ** (top - b), 2.0 ** (1 - b), 2.0 ** (1 - b) * eps, eps]", "none: the last code"),
        ("mantissa of two", B + "return [2 * 2.0 ** (top - b), 2.0 ** (1 - b), 2.0 ** (1 - b) * eps, eps]", "ieee: the top exponent"),
        ("the field 0 is normal", B + "return [M * 2.0 ** (top - b), 2.0 ** -b, 2.0 ** -b * eps, eps]", "smallest normal number"),
        ("no subnormals", B + "return [M * 2.0 ** (top - b), 2.0 ** (1 - b), 2.0 ** (1 - b), eps]", "subnormals reach"),
        ("half a step", B + "return [M * 2.0 ** (top - b), 2.0 ** (1 - b), 2.0 ** (1 - b) * eps, eps / 2]", "eps is the distance"),
    ],
    "08.2": [
        ("truncated", R + "y = math.trunc(x / q) * q\n    return inf if abs(y) > big else y", "nearer one"),
        ("ties away from zero", R + "y = math.copysign(math.floor(abs(x) / q + 0.5) * q, x)\n    return inf if abs(y) > big else y", "tie goes to the even"),
        ("flushed to zero", R + "if abs(x) < 2.0 ** (1 - b): return 0.0\n    y = near(x, q)\n    return inf if abs(y) > big else y", "below the smallest normal"),
        ("no lower end", R + "y = near(x, 2.0 ** (ex(x) - m)) if x else 0.0\n    return inf if abs(y) > big else y", "below the smallest normal"),
        ("infinite before rounding", R + "return inf if abs(x) > big else near(x, q)", "overflow is decided after"),
        ("saturating", R + "return max(-big, min(big, near(x, q)))", "overflow is decided after"),
        ("a logarithm of zero", R + "e = math.floor(math.log2(abs(x)))\n    y = near(x, 2.0 ** (max(e, 1 - b) - m))\n    return inf if abs(y) > big else y", "below the smallest normal"),
        ("sign lost", R + "y = abs(near(x, q))\n    return math.inf if y > big else y", "nearer one"),
    ],
    "08.3": [
        ("skipped steps counted", S + "good = 0 if o else good + 1\n        if o: scale /= 2\n        elif good == interval: scale, good = scale * 2, 0\n        out.append(scale)\n    return [len(overflows), out]", "takes no step"),
        ("never shrinks", S + "good = 0 if o else good + 1\n        if good == interval: scale, good = scale * 2, 0\n        out.append(scale)\n    return [n, out]", "halves the scale"),
        ("count kept over an overflow", S + "good += not o\n        if o: scale /= 2\n        elif good == interval: scale, good = scale * 2, 0\n        out.append(scale)\n    return [n, out]", "count anew"),
        ("count kept after growing", S + "good = 0 if o else good + 1\n        if o: scale /= 2\n        elif good >= interval: scale *= 2\n        out.append(scale)\n    return [n, out]", "again and again"),
        ("one step late", S + "good = 0 if o else good + 1\n        if o: scale /= 2\n        elif good > interval: scale, good = scale * 2, 0\n        out.append(scale)\n    return [n, out]", "again and again"),
        ("grows every step", S + "scale = scale / 2 if o else scale * 2\n        out.append(scale)\n    return [n, out]", "halves the scale"),
    ],
    "08.4": [
        ("no compensation", K + "w = r(w + u)\n    return [w, 0.0]", "kept in c"),
        ("the sign of c", K + "y = u + c; n = r(w + y); w, c = n, r((n - w) - y)\n    return [w, c]", "kept in c"),
        ("c never used", K + "n = r(w + u); w, c = n, r(u - (n - w))\n    return [w, c]", "exact sum"),
        ("c overwrites the rest", K + "n = r(w + u + c); w, c = n, r(u - (n - w))\n    return [w, c]", "exact sum"),
        ("c piles up", K + "y = u + c; n = r(w + y); w, c = n, c + r(y - (n - w))\n    return [w, c]", "exact sum"),
        ("an FP32 weight", K + "w = w + u\n    return [w, 0.0]", "kept in c"),
        ("truncated", "import math; r = lambda x: math.copysign(math.floor(abs(x) / 2.0 ** (math.frexp(x)[1] - 8)) * 2.0 ** (math.frexp(x)[1] - 8), x) if x else 0.0\n    w, c = weight, 0.0\n    for u in updates:\n        y = u + c; n = r(w + y); w, c = n, r(y - (n - w))\n    return [w, c]", "kept in c"),
    ],
    "08.5": [
        ("one scale for all", Q + "s = amax(row) / 448\n    return [r(x / s) * s for x in row]", "its own scale"),
        ("the largest at 240", Q + "return [r(x / (amax(p) / 240)) * (amax(p) / 240) for p in parts for x in p]", "nearest of E4M3"),
        ("E5M2", Q + "return [r(x / (amax(p) / 448), -14, 2) * (amax(p) / 448) for p in parts for x in p]", "nearest of E4M3"),
        ("no subnormals", Q + "return [(0.0 if abs(x) / (amax(p) / 448) < 2.0 ** -6 else r(x / (amax(p) / 448)) * (amax(p) / 448)) for p in parts for x in p]", "less than half"),
        ("no lower end", Q + "return [r(x / (amax(p) / 448), -99) * (amax(p) / 448) for p in parts for x in p]", "less than half"),
        ("the rest dropped", Q + "return [r(x / (amax(p) / 448)) * (amax(p) / 448) for p in parts if len(p) == block for x in p]", "may be shorter"),
        ("divided by zero", Q + "return [r(x / (max(map(abs, p)) / 448)) * (max(map(abs, p)) / 448) for p in parts for x in p]", "block of zeros"),
        ("never multiplied back", Q + "return [r(x / (amax(p) / 448)) for p in parts for x in p]", "nearest of E4M3"),
    ],
}  # fmt: skip

RIGHT = {
    "08.1": "from llm_train_course.precision import FloatFormat\n    f = FloatFormat(exponent_bits, mantissa_bits, specials)\n    return [f.max, f.min_normal, f.min_subnormal, f.eps]",
    "08.2": "from llm_train_course.precision import FloatFormat\n    return FloatFormat(exponent_bits, mantissa_bits).round(torch.tensor(x, dtype=torch.float64))",
    "08.3": "from llm_train_course.precision import LossScaler\n    w = torch.nn.Parameter(torch.zeros(1)); sgd = torch.optim.SGD([w], lr=1.0); scaler = LossScaler(scale, growth_interval=interval); scales = []\n    for o in overflows:\n        w.grad = torch.tensor([float('inf') if o else -scaler.get_scale()]); scaler.step(sgd); scaler.update(); scales.append(scaler.get_scale())\n    return [w.item(), scales]",
    "08.5": "from llm_train_course.precision import quantize\n    return quantize(torch.tensor([row]), block=(1, block)).dequantize()[0]",
}
