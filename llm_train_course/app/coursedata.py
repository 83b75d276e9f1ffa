"The course's own data: the claims with their verdicts, and the interview questions. Read from the files in the package."

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files

VERDICTS = ("reproduced", "qualified", "corrected", "cited")
SPLITS = ("train", "heldout")
LANGUAGES = {"en": "", "zh": "_zh"}
ASK = {
    "en": "Is this statement about training large models right? Answer with the accurate statement.\n\n{}",
    "zh": "下面这句关于大模型训练的话是否准确?请给出准确的说法。\n\n{}",
}


@lru_cache(maxsize=None)
def _rows(name: str) -> tuple[dict, ...]:
    text = files("llm_train_course").joinpath("data", name).read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines() if line.strip())


def load_claims() -> list[dict]:
    "The rows of data/claims.jsonl, in the order of the course."
    return [dict(row) for row in _rows("claims.jsonl")]


def load_interview(split: str | None = None) -> list[dict]:
    "The rows of data/interview.jsonl; `split` is train, heldout or None for both. All questions of a claim share a split."
    if split not in (None, *SPLITS):
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}, or None for both")
    return [dict(row) for row in _rows("interview.jsonl") if split in (None, row["split"])]


def _suffix(language: str) -> str:
    if language not in LANGUAGES:
        raise ValueError(f"language is {language!r}, expected one of {', '.join(LANGUAGES)}")
    return LANGUAGES[language]


def interview_examples(split: str, language: str = "en") -> list[dict]:
    "Questions and answers as conversations, {'messages': [user, assistant]}, the form that SFT reads."
    end = _suffix(language)
    return [
        {
            "messages": [
                {"role": "user", "content": row["question" + end]},
                {"role": "assistant", "content": row["answer" + end]},
            ]
        }
        for row in load_interview(split)
    ]


def claim_pairs(language: str = "en") -> list[dict]:
    "Preference pairs from the claims that are not right as they stand: the accurate statement is chosen, the article's rejected."
    _suffix(language)
    return [
        {
            "prompt": [{"role": "user", "content": ASK[language].format(row[f"statement_{language}"])}],
            "chosen": [{"role": "assistant", "content": row[f"truth_{language}"]}],
            "rejected": [{"role": "assistant", "content": row[f"statement_{language}"]}],
        }
        for row in load_claims()
        if row["verdict"] in ("corrected", "qualified")
    ]


def citation_key(source: str) -> str:
    "The key in references.bib of a claim's source: an arXiv number, or the name of a document that has none."
    return f"arxiv-{source.replace('.', '-')}" if source[:4].isdigit() else source
