"""The data that ships in the package: schema, splits, sources, and the arithmetic behind its numbers.

Every number that can be computed is computed here from first principles, and its printed form is looked up in the rows.
"""
import json
import re
import statistics
from math import comb, log2
from pathlib import Path

import numpy as np
import pytest

from llm_train_course.app.coursedata import (
    VERDICTS,
    citation_key,
    claim_pairs,
    interview_examples,
    load_claims,
    load_interview,
)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "llm_train_course" / "data"
CLAIMS = load_claims()
QUESTIONS = load_interview()
NOTEBOOKS = ["01_stages", "02_parallel", "03_lora", "04_qlora", "05_rlhf", "06_dpo", "07_distill", "08_precision", "09_memory", "10_stability"]  # fmt: skip
TOPICS = dict(zip("intro stages parallel lora qlora rlhf dpo distill precision memory stability".split(), range(11)))
CLAIM_FIELDS = ["id", "chapter", "judged_in", "verdict", "shown_by", "statement_en", "statement_zh", "truth_en", "truth_zh", "sources"]
QUESTION_FIELDS = ["id", "claim", "split", "chapter", "question", "answer", "question_zh", "answer_zh"]
OTHER_SOURCES = {"deepspeed-docs", "tuning-playbook"}
HAN = re.compile(r"[\u4e00-\u9fff]")


# Schema


@pytest.mark.parametrize("name, fields", [("claims.jsonl", CLAIM_FIELDS), ("interview.jsonl", QUESTION_FIELDS)])
def test_files_are_strict_jsonl(name, fields):
    raw = (DATA / name).read_bytes()
    assert raw.endswith(b"}\n") and b"\r" not in raw and not raw.startswith(b"\xef\xbb\xbf")
    for line in raw.decode("utf-8").splitlines():
        row = json.loads(line)
        assert list(row) == fields, row["id"]
        assert all(v == v.strip() and "  " not in v and "\n" not in v for v in row.values() if isinstance(v, str)), row["id"]


@pytest.mark.parametrize("row", CLAIMS, ids=lambda r: r["id"])
def test_claim(row):
    assert re.fullmatch(r"[a-z]+\.[a-z0-9.-]+", row["id"])
    assert row["verdict"] in VERDICTS and row["shown_by"] in ("code", "source", "code and source")
    assert row["judged_in"] in NOTEBOOKS
    topic = row["id"].split(".")[0]
    number = NOTEBOOKS.index(row["judged_in"]) + 1
    if topic == "intro":
        assert row["chapter"] == 0
    else:
        assert row["chapter"] == number, "a claim is judged in the chapter it belongs to"
    if topic in TOPICS and topic != "intro":
        assert row["chapter"] == TOPICS[topic]
    for field in ("statement_en", "truth_en"):
        assert len(row[field]) >= 25 and row[field].endswith(".") and not HAN.search(row[field])
        assert not re.match(r"(Show|Measure|Expect)\b", row[field]), "a statement, not a task"
    for field in ("statement_zh", "truth_zh"):
        assert len(HAN.findall(row[field])) >= 2 and row[field].endswith("。")
        assert not re.search(r"[\u4e00-\u9fff][,;:?()]|[,;:?()][\u4e00-\u9fff]", re.sub(r"\S*[)(]\S*", "", row[field]))
    assert row["statement_en"] != row["truth_en"]
    assert len(set(row["sources"])) == len(row["sources"])
    assert all(re.fullmatch(r"\d{4}\.\d{5}", s) or s in OTHER_SOURCES for s in row["sources"])
    if row["verdict"] == "cited" or row["shown_by"] != "code":
        assert row["sources"]
    if row["verdict"] == "cited":
        assert "source" in row["shown_by"]


def test_all_claims_are_there_once():
    ids = [row["id"] for row in CLAIMS]
    assert len(set(ids)) == len(ids) == 72
    counts = {t: sum(i.startswith(t + ".") for i in ids) for t in [*TOPICS, "refs"]}
    assert counts == {"intro": 3, "stages": 5, "parallel": 9, "lora": 8, "qlora": 9, "rlhf": 7, "dpo": 7, "distill": 4, "precision": 5, "memory": 5, "stability": 7, "refs": 3}  # fmt: skip
    assert [row["chapter"] for row in CLAIMS[:-3]] == sorted(row["chapter"] for row in CLAIMS[:-3])


@pytest.mark.parametrize("row", QUESTIONS, ids=lambda r: r["id"])
def test_question(row):
    claims = {c["id"]: c for c in CLAIMS}
    assert row["claim"] in claims and re.fullmatch(re.escape(row["claim"]) + r"/[1-9]", row["id"])
    assert row["chapter"] == claims[row["claim"]]["chapter"]
    assert row["question"][-1] in "?." and 15 <= len(row["question"]) <= 250
    assert 60 <= len(row["answer"]) <= 900 and row["answer"].endswith(".")
    assert len(HAN.findall(row["question_zh"])) >= 3 and row["question_zh"][-1] in "？。"
    assert 20 <= len(row["answer_zh"]) <= 900 and row["answer_zh"].endswith("。")
    assert not HAN.search(row["question"] + row["answer"])
    for text in (row["answer"], row["answer_zh"]):
        assert not re.search(r"\*\*|`|^#|\$|\]\(|^[-*] ", text), "plain text, no Markdown"


def test_questions_and_their_split():
    assert len(QUESTIONS) >= 80
    assert len({q["id"] for q in QUESTIONS}) == len({q["question"] for q in QUESTIONS}) == len({q["answer"] for q in QUESTIONS}) == len(QUESTIONS)
    assert {q["claim"] for q in QUESTIONS} == {c["id"] for c in CLAIMS}, "one question or more for each claim"
    splits = {}
    for q in QUESTIONS:
        splits.setdefault(q["claim"], set()).add(q["split"])
    assert all(len(s) == 1 for s in splits.values()), "a claim's questions are all in one split"
    heldout = {c for c, s in splits.items() if s == {"heldout"}}
    assert 0.15 <= len(heldout) / len(splits) <= 0.25
    assert {TOPICS[c.split(".")[0]] for c in heldout} == set(range(11)), "one held-out claim or more in every chapter"
    words = lambda text: set(re.findall(r"\w+", text.lower()))
    train = [words(q["question"]) for q in load_interview("train")]
    for q in load_interview("heldout"):
        near = max(len(words(q["question"]) & w) / len(words(q["question"]) | w) for w in train)
        assert near < 0.7, f"{q['id']} is nearly a training question"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_examples_are_conversations(language):
    for split in ("train", "heldout"):
        rows = load_interview(split)
        examples = interview_examples(split, language)
        assert len(examples) == len(rows) >= 10
        for example, row in zip(examples, rows):
            assert list(example) == ["messages"] and [m["role"] for m in example["messages"]] == ["user", "assistant"]
            end = "" if language == "en" else "_zh"
            assert [m["content"] for m in example["messages"]] == [row["question" + end], row["answer" + end]]
    with pytest.raises(ValueError, match="'test'"):
        interview_examples("test")
    with pytest.raises(ValueError, match="'fr'"):
        interview_examples("train", "fr")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_preference_pairs(language):
    wrong = [c for c in CLAIMS if c["verdict"] in ("corrected", "qualified")]
    pairs = claim_pairs(language)
    assert len(pairs) == len(wrong) > 30
    for pair, row in zip(pairs, wrong):
        assert list(pair) == ["prompt", "chosen", "rejected"]
        assert pair["chosen"] == [{"role": "assistant", "content": row[f"truth_{language}"]}]
        assert pair["rejected"] == [{"role": "assistant", "content": row[f"statement_{language}"]}]
        assert row[f"statement_{language}"] in pair["prompt"][0]["content"]


def test_loaded_rows_can_be_changed_without_harm():
    load_claims()[0]["id"] = "changed"
    assert load_claims()[0]["id"] == "intro.full-7b"


# Bibliography


BIB = (ROOT / "nbs" / "references.bib").read_text(encoding="utf-8")
ENTRIES = {m[1]: m[2] for m in re.finditer(r"^@\w+\{([^,\s]+),\n(.*?)^\}", BIB, re.M | re.S)}


def test_every_source_is_in_the_bibliography_once():
    keys = re.findall(r"^@\w+\{([^,\s]+),", BIB, re.M)
    assert len(keys) == len(set(keys)) == len(ENTRIES)
    used = {citation_key(s) for row in CLAIMS for s in row["sources"]}
    assert used <= ENTRIES.keys(), used - ENTRIES.keys()
    texts = " ".join(row[k] for row in CLAIMS for k in ("statement_en", "truth_en")) + " ".join(q["answer"] for q in QUESTIONS)
    quoted = {citation_key(n) for n in re.findall(r"\b\d{4}\.\d{5}\b", texts)}
    assert quoted <= ENTRIES.keys(), quoted - ENTRIES.keys()


def test_bibliography_has_no_entry_that_nothing_cites():
    pages = "".join(p.read_text(encoding="utf-8") for g in ("*.ipynb", "*.qmd") for p in (ROOT / "nbs").glob(g))
    used = {citation_key(s) for row in CLAIMS for s in row["sources"]} | set(re.findall(r"@([\w-]+\w)", pages))
    assert set(ENTRIES) <= used, set(ENTRIES) - used


def test_notebooks_cite_what_the_bibliography_has():
    for path in (ROOT / "nbs").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                cited = set(re.findall(r"@(arxiv-[\d-]+\d)", "".join(cell["source"])))
                assert cited <= ENTRIES.keys(), f"{path.name}: {cited - ENTRIES.keys()}"


@pytest.mark.parametrize("key", ENTRIES)
def test_bibliography_entry(key):
    fields = dict(re.findall(r"^  (\w+) = \{(.*)\},$", ENTRIES[key], re.M))
    assert {"title", "author", "url"} <= fields.keys()
    assert ENTRIES[key].count("{") == ENTRIES[key].count("}")
    if key.startswith("arxiv-"):
        number = key.removeprefix("arxiv-").replace("-", ".")
        assert fields["eprint"] == number and fields["archivePrefix"] == "arXiv"
        assert fields["url"] == f"https://arxiv.org/abs/{number}" and fields["year"] == f"20{number[:2]}"


TITLES = {  # words of the title, for the numbers that the article itself lists and those most easily mistaken
    "2203.02155": "follow instructions", "1910.02054": "ZeRO", "2106.09685": "LoRA", "2305.14314": "QLoRA", "2305.18290": "Direct Preference",
    "1503.02531": "Distilling the Knowledge", "1710.03740": "Mixed Precision", "2312.16903": "Spike No More", "2309.14322": "Small-scale Proxies",
    "2306.06965": "Isn't Information Theoretically Optimal", "2405.09673": "Learns Less", "2401.02385": "TinyLlama", "2209.05433": "FP8",
    "1604.06174": "Sublinear", "2205.05198": "Activation Recomputation", "2104.04473": "GPU", "2002.04745": "Layer Normalization",
}  # fmt: skip


@pytest.mark.parametrize("number, words", TITLES.items())
def test_number_matches_title(number, words):
    assert words in re.search(r"title = \{(.*)\}", ENTRIES[citation_key(number)])[1].replace("{", "").replace("}", "")


# Arithmetic. Each line: what is computed, how it is printed, the rows that must print it.

GB, B, T = 1e9, 1e9, 1e12
WIDTH, LAYERS, FFN, VOCABULARY = 4096, 32, 11008, 32000  # LLaMA-7B
LLAMA_7B = 2 * VOCABULARY * WIDTH + LAYERS * (4 * WIDTH**2 + 3 * WIDTH * FFN + 2 * WIDTH) + WIDTH
LLAMA_65B = 2 * VOCABULARY * 8192 + 80 * (4 * 8192**2 + 3 * 8192 * 22016 + 2 * 8192) + 8192
ADAM = 2 + 2 + 4 + 4 + 4  # bytes a parameter: weight, gradient, FP32 weight, two FP32 moments


def lora(r, width=WIDTH, ffn=FFN, layers=LAYERS, everywhere=False):
    "Trainable parameters: query and value, or the four attention matrices and the three of the MLP."
    shapes = [(width, width)] * 4 + [(width, ffn)] * 3 if everywhere else [(width, width)] * 2
    return layers * sum(r * (a + b) for a, b in shapes)


def a100_hours(n_params, n_tokens, peak=312e12, utilisation=0.5):
    return 6 * n_params * n_tokens / (peak * utilisation) / 3600


def bubble(p, m, v=1):
    return (p - 1) / (v * m + p - 1)


def zero(stage, n, psi=1.0):
    return psi * {1: 4 + 12 / n, 2: 2 + 14 / n, 3: 16 / n}[stage]


def largest(exponent_bits, mantissa_bits):
    bias = 2 ** (exponent_bits - 1) - 1
    return (2 - 2.0**-mantissa_bits) * 2.0**bias


ARITHMETIC = [
    (2 * 7 * B / GB, "14 GB", ["intro.full-7b"]),
    (2 * 65 * B / GB, "130 GB", ["intro.full-7b", "qlora.table"]),
    (ADAM * 7 * B / GB, "112 GB", ["intro.full-7b", "dpo.single-gpu", "parallel.dp-fit"]),
    (ADAM * 65 * B / GB, "1,040 GB", ["intro.full-7b", "qlora.table"]),
    (12 * 65 * B / GB, "780 GB", ["intro.full-7b"]),
    (LLAMA_7B / B, "6.738 billion", ["intro.lora-0.1"]),
    (100 * lora(8) / LLAMA_7B, "0.06 %", ["intro.lora-0.1", "qlora.trainable"]),
    (100 * lora(16) / LLAMA_7B, "0.12 %", ["intro.lora-0.1"]),
    (100 * lora(16, everywhere=True) / LLAMA_7B, "0.59 %", ["intro.lora-0.1"]),
    (100 * lora(64, everywhere=True) / LLAMA_7B, "2.4 %", ["intro.lora-0.1", "qlora.trainable"]),
    (LLAMA_65B * 4 / 8 / GB, "32.6 GB", ["intro.65b-24gb"]),
    (LLAMA_65B / B, "65.3 billion", ["intro.65b-24gb"]),
    (a100_hours(65 * B, 1.4 * T) / 1e6, "0.97 million A100-hours", ["stages.cost"]),
    (6 * 65 * B * 1.4 * T / 1e23, "5.46e23", ["stages.cost"]),
    (6 * 7 * B * 2 * T / 1e22, "8.4e22", ["stages.cost"]),
    (a100_hours(7 * B, 2 * T) * 1.5 / 1e6, "0.2 million dollars", ["stages.cost"]),
    (a100_hours(7 * B, 2 * T) * 1.5 / 1e6, "0.22 million dollars", ["stages.cost"]),
    (a100_hours(7 * B, 2 * T) / 1e3, "150 thousand A100-hours", ["stages.cost"]),
    (2.788 * 2, "5.576 million dollars", ["stages.cost"]),
    (comb(4, 2), "6 to 36 pairs", ["stages.instructgpt"]),
    (comb(9, 2), "36 for K=9", ["rlhf.table"]),
    (2 * 2 * 7 * B / GB, "28 GB", ["parallel.dp"]),
    (100 * bubble(8, 32), "17.9 %", ["parallel.pp"]),
    (100 * bubble(8, 32, v=2), "9.9 %", ["parallel.pp"]),
    (16 / zero(1, 8), "2.9×", ["parallel.zero"]),
    (16 / zero(2, 8), "4.3×", ["parallel.zero"]),
    (16 / zero(1, 64), "3.8×", ["parallel.zero"]),
    (16 / zero(2, 64), "7.2×", ["parallel.zero"]),
    (16 * 7.5, "120 GB", ["parallel.zero"]),
    (zero(1, 64, 7.5), "31.4", ["parallel.zero"]),
    (zero(2, 64, 7.5), "16.6", ["parallel.zero"]),
    (zero(3, 64, 7.5), "1.9 GB", ["parallel.zero"]),
    (4096 * 4096, "16,777,216", ["lora.count"]),
    (16 * (4096 + 4096), "131,072", ["lora.count"]),
    (100 * (1 - 16 * 8192 / 4096**2), "99.22 %", ["lora.count"]),
    (100 * 16 * 8192 / 4096**2, "0.78 %", ["lora.count"]),
    (4096 * 4096 / (4096 + 4096), "2,048", ["lora.count"]),
    ((2 * LLAMA_7B + ADAM * lora(16, everywhere=True)) / GB, "14.1", ["qlora.table"]),
    (2 * LLAMA_7B / GB, "13.5 GB", ["qlora.table"]),
    (ADAM * lora(16, everywhere=True) / GB, "0.6 GB", ["qlora.table"]),
    ((2 * LLAMA_65B + ADAM * lora(16, 8192, 22016, 80, everywhere=True)) / GB, "134 GB", ["qlora.table"]),
    (LLAMA_65B * (4 + 8 / 64 + 32 / (64 * 256)) / 8 / GB, "about 34", ["qlora.table"]),
    (12 * lora(64, 8192, 22016, 80, everywhere=True) / GB, "about 10 GB", ["qlora.table"]),  # 16-bit weights and gradients, FP32 moments
    (0.5 * (29 / 30 + 31 / 32), "0.9677083", ["qlora.nf4-table"]),
    (32 / 64, "0.5 bits", ["qlora.double-quant"]),
    (8 / 64 + 32 / (64 * 256), "0.12695", ["qlora.double-quant"]),
    (32 / 64 - 8 / 64 - 32 / (64 * 256), "0.37305", ["qlora.double-quant"]),
    ((32 / 64 - 8 / 64 - 32 / (64 * 256)) / 8 * 65, "3.0 GB", ["qlora.double-quant"]),
    (2 * ADAM * 7 + 2 * 2 * 7, "252 GB", ["rlhf.memory"]),
    (ADAM * 7 + 2 * 7, "126 GB", ["dpo.single-gpu"]),
    (2 * 7, "14 GB", ["dpo.single-gpu"]),
    (0.6931471805599453, "0.693", ["dpo.loss"]),
    (largest(5, 10), "65,504", ["precision.table"]),
    (largest(8, 7) / 1e38, "3.39e38", ["precision.table"]),
    (largest(8, 23) / 1e38, "3.40e38", ["precision.table"]),
    (largest(5, 2), "57,344", ["precision.table", "precision.fp8"]),
    (1.75 * 2.0**8, "448", ["precision.fp8"]),  # E4M3: exponent 15 is in use, only its mantissa 111 is NaN
    (256 / (32 * 1), "8 accumulation steps", ["memory.batch"]),
    ((10 * 2.0 + 30 * 1.0) / 40, "1.25 a token", ["memory.equal"]),
    ((2.0 + 1.0) / 2, "1.5, because", ["memory.equal"]),
    (100 / 3, "33 %", ["memory.checkpoint"]),
    (100 * 8000 / 1.2e6, "0.67 %", ["stability.warmup"]),
    (100 * 2000 / (1.4 * T / 4e6), "0.6 %", ["stability.warmup"]),  # 4 million tokens a step
]  # fmt: skip


@pytest.mark.parametrize("value, printed, ids", ARITHMETIC, ids=[a[1] for a in ARITHMETIC])
def test_number(value, printed, ids):
    number = re.search(r"\d[\d,]*\.?\d*(?:e\d+)?", printed)[0]
    mantissa = number.replace(",", "").split("e")[0]
    decimals = len(mantissa.partition(".")[2])
    assert float(mantissa) == pytest.approx(value, abs=0.5 * 10.0**-decimals + 1e-9)
    for id in ids:
        text = " ".join([r["truth_en"] + " " + r["statement_en"] for r in CLAIMS if r["id"] == id] + [q["answer"] for q in QUESTIONS if q["claim"] == id])
        stem = re.sub(r"\s*%|×", "", printed)
        assert stem in text, f"{id} does not print {printed!r}"


def test_there_are_enough_of_them():
    assert len(ARITHMETIC) >= 25 and len(ARITHMETIC) == len({(a[1], *a[2]) for a in ARITHMETIC})


def nf4():
    "The 16 levels from normal quantiles, in float64."
    offset, normal = 0.5 * (29 / 30 + 31 / 32), statistics.NormalDist()
    grid = lambda n: [offset + (0.5 - offset) * k / n for k in range(n)]
    levels = [normal.inv_cdf(p) for p in grid(8)] + [0.0] + [-normal.inv_cdf(p) for p in grid(7)]
    return sorted(x / max(levels) for x in levels)


def test_numbers_of_the_nf4_row():
    levels = nf4()
    assert len(levels) == 16 and sum(x > 0 for x in levels) == 8 and sum(x < 0 for x in levels) == 7 and levels[0] == -1 and levels[-1] == 1
    steps = [b - a for a, b in zip(levels, levels[1:])]
    assert {round(s, 2) for s in steps[6:9]} == {0.08, 0.09} and {round(steps[0], 2), round(steps[-1], 2)} == {0.28, 0.30}, steps
    normal = statistics.NormalDist(sigma=1 / statistics.NormalDist().inv_cdf(0.5 * (29 / 30 + 31 / 32)))
    cuts = [normal.cdf((a + b) / 2) for a, b in zip(levels, levels[1:])]
    shares = [b - a for a, b in zip([0, *cuts], [*cuts, 1])]
    assert round(-sum(p * log2(p) for p in shares), 3) == 3.996


def blockwise(levels, blocksize, n=1 << 20, seed=0):
    "Relative mean squared error and entropy in bits of a code on normal data scaled by each block's largest magnitude."
    levels = np.asarray(levels)
    x = np.random.default_rng(seed).standard_normal((n // blocksize, blocksize))
    scale = np.abs(x).max(axis=1, keepdims=True)
    index = np.searchsorted((levels[1:] + levels[:-1]) / 2, x / scale)
    shares = np.bincount(index.ravel(), minlength=len(levels)) / x.size
    shares = shares[shares > 0]
    return float(((levels[index] * scale - x) ** 2).mean() / (x**2).mean()), float(-(shares * np.log2(shares)).sum())


def test_errors_and_entropies_of_the_codes():
    int4 = [k / 7 for k in range(-7, 8)]
    magnitudes = [0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1]  # FP4 of bitsandbytes
    fp4 = sorted({s * m for m in magnitudes for s in (1, -1)})
    error, entropy = blockwise(nf4(), 64)
    text = " ".join(q["answer"] for q in QUESTIONS if q["claim"] == "qlora.why-not-int4")
    for value, printed in [(error, "0.0085"), (blockwise(int4, 64)[0], "0.0116"), (blockwise(fp4, 64)[0], "0.0149")]:
        assert value == pytest.approx(float(printed), abs=6e-5) and printed in text
    assert entropy == pytest.approx(3.88, abs=5e-3) and "3.88" in text
    assert blockwise(nf4(), 4096)[1] == pytest.approx(3.52, abs=1e-2) and "3.52" in text


@pytest.mark.parametrize("keeps_ends_and_zero, printed", [(True, "0.0080"), (False, "0.0076")])
def test_error_of_the_l2_optimal_code(keeps_ends_and_zero, printed):
    "Lloyd's iteration on blocks of normal data; an error counts in the block's own scale."
    x = np.random.default_rng(1).standard_normal((1 << 12, 64))
    scale = np.abs(x).max(axis=1, keepdims=True)
    y, weight = (x / scale).ravel(), np.repeat(scale.ravel() ** 2, 64)
    levels = np.array(nf4())
    for _ in range(120):
        index = np.searchsorted((levels[1:] + levels[:-1]) / 2, y)
        levels = np.bincount(index, weight * y, 16) / np.bincount(index, weight, 16)
        if keeps_ends_and_zero:
            levels[[0, 7, 15]] = -1, 0, 1
    assert blockwise(levels, 64)[0] == pytest.approx(float(printed), abs=6e-5)
    for text in (next(r["truth_en"] for r in CLAIMS if r["id"] == "qlora.why-not-int4"), " ".join(q["answer"] for q in QUESTIONS if q["claim"] == "qlora.why-not-int4")):
        assert printed in text


def test_all_numbers_of_the_chinese_are_in_the_english():
    "The two languages state the same figures: every decimal and every number with separators of one is in the other."
    find = lambda text: set(re.findall(r"\d+\.\d+|\d{1,3}(?:,\d{3})+", text))
    exceptions = {  # units of ten thousand and a hundred million shift the point
        "67.38", "278.8", "557.6", "1.3", "3.3", "3.1", "5.2", "1.4",
    }  # fmt: skip
    for row, pairs in [(r, [("statement_en", "statement_zh"), ("truth_en", "truth_zh")]) for r in CLAIMS] + [(q, [("answer", "answer_zh")]) for q in QUESTIONS]:
        for en, zh in pairs:
            assert find(row[zh]) - exceptions <= find(row[en]), (row["id"], find(row[zh]) - find(row[en]))
