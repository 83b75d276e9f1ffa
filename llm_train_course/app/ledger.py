"""The ledger: what the notebooks' executed cells say about each claim of the course.

A notebook judges a claim with one call, `claim("lora.count").reproduced(measured, expected, tol=0)`. The call raises
`VerdictError` if the verdict does not hold. If it holds, the verdict is shown, and its record travels in the cell's
output under the type `MIME`, which page renderers do not know and pass over. `collect` reads the records back from the
committed notebooks, so nbs/ledger.json is a function of the notebooks alone.
"""

from __future__ import annotations

import difflib
import html
import json
import math
import numbers
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from .coursedata import VERDICTS, load_claims

MIME = "application/x-llm-course-verdict+json"
SIGNIFICANT = 6  # digits kept of a recorded value, so that outputs are the same on every machine
COLOURS = {"reproduced": "#1a7f37", "qualified": "#9a6700", "corrected": "#cf222e", "cited": "#0969da", "measured": "#57606a"}


class VerdictError(AssertionError):
    "A verdict that the measurement does not support, or one that is asked for in the wrong way."


# What a value may be: a number, a bool, or a list or dict of them.


@dataclass(frozen=True)
class Between:
    "An expected range, ends included; None leaves a side open."

    low: float | None = None
    high: float | None = None

    def __contains__(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.low is None:
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if self.high is None else f"{self.low:g} to {self.high:g}"


def at_least(low: float) -> Between:
    "An expected value with a lower bound only."
    return Between(low, None)


def at_most(high: float) -> Between:
    "An expected value with an upper bound only."
    return Between(None, high)


def plain(value: Any) -> Any:
    "Numbers of any library as Python numbers: tensors, arrays, fractions, and lists, tuples and dicts of them."
    if value is None or isinstance(value, bool | int | float | str | Between):
        return value
    if isinstance(value, Fraction):
        return value.numerator if value.denominator == 1 else float(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):  # torch tensors and NumPy arrays and scalars
        return plain(value.tolist())
    if isinstance(value, numbers.Number):
        return float(value)
    if isinstance(value, Iterable):
        return [plain(v) for v in value]
    raise VerdictError(f"a verdict takes numbers, bools, and lists or dicts of them, not {type(value).__name__}: {value!r}")


def rounded(value: Any) -> Any:
    "The value as it is recorded: floats at six significant digits, integers as they are."
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, Between):
        return str(value)
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT}g}") if math.isfinite(value) else str(value)
    return value


def disagreements(measured: Any, expected: Any, tol: float = 0.0, rtol: float = 0.0, at: str = "") -> list[str]:
    "Where measured and expected differ by more than the tolerance, each as readable text; empty when they agree."
    where = f"{at}: " if at else ""
    if isinstance(expected, dict) or isinstance(measured, dict):
        if not (isinstance(expected, dict) and isinstance(measured, dict)) or expected.keys() != measured.keys():
            return [f"{where}measured {measured!r} and expected {expected!r} do not have the same names"]
        return [d for k in expected for d in disagreements(measured[k], expected[k], tol, rtol, f"{at}[{k!r}]")]
    if isinstance(expected, list) or isinstance(measured, list):
        if not (isinstance(expected, list) and isinstance(measured, list)) or len(expected) != len(measured):
            return [f"{where}measured {measured!r} and expected {expected!r} do not have the same length"]
        return [d for k, (m, e) in enumerate(zip(measured, expected)) for d in disagreements(m, e, tol, rtol, f"{at}[{k}]")]
    if isinstance(measured, bool) != isinstance(expected, bool) or isinstance(measured, str) or isinstance(expected, str):
        return [f"{where}measured {measured!r} cannot be compared with expected {expected!r}"]
    if measured is None or expected is None:
        return [f"{where}measured {measured!r}, expected {expected!r}: both are needed"]
    if isinstance(expected, Between):
        return [] if measured in expected else [f"{where}measured {measured:g}, expected {expected}"]
    allowed = max(tol, rtol * abs(expected))
    difference = abs(measured - expected)
    if difference <= allowed:  # False for NaN
        return []
    return [f"{where}measured {measured!r}, expected {expected!r}, difference {difference:.6g} over the tolerance {allowed:.6g}"]


def agreements(measured: Any, article: Any, tol: float, rtol: float, at: str = "") -> list[str]:
    "Where the measurement does NOT contradict the article's figure: a number, a (low, high) range, or lists or dicts of them."
    if isinstance(article, dict):
        if not isinstance(measured, dict) or not article.keys() <= measured.keys():
            return [f"article {article!r} has names that measured {measured!r} has not"]
        return [a for k in article for a in agreements(measured[k], article[k], tol, rtol, f"[{k!r}] ")]
    if isinstance(article, list):
        if not isinstance(measured, list) or len(article) != len(measured):
            return [f"article {article!r} and measured {measured!r} do not have the same length"]
        return [a for k, (m, x) in enumerate(zip(measured, article)) for a in agreements(m, x, tol, rtol, f"[{k}] ")]
    low, high = article if isinstance(article, tuple) else (article, article)
    if isinstance(measured, dict | list | str | None) or isinstance(measured, bool) != isinstance(low, bool):
        return [f"{at}measured {measured!r} cannot be compared with the article's {article!r}"]
    distance = max(low - measured, measured - high)  # above 0 outside the range
    if distance > max(tol, rtol * max(abs(low), abs(high))):
        return []
    return [f"{at}measured {measured!r} is within the tolerance of the article's {article!r}: nothing is corrected"]


# Showing


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}" if 1e-4 <= abs(value) < 1e12 or value == 0 else f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_text(v) for v in value) + "]"
    return str(value)


@dataclass(frozen=True)
class Verdict:
    "A verdict that held, with what it rests on; or named numbers that prose quotes (`claim` is None)."

    claim: str | None
    verdict: str
    measured: Any = None
    expected: Any = None
    tol: float | None = None
    rtol: float | None = None
    article: Any = None
    condition: str | None = None
    holds: Any = None
    fails: Any = None
    cites: Any = None  # arXiv numbers
    says: str | None = None
    seed: Any = None
    unit: Any = None
    note: str | None = None
    _cell: int | None = field(default=None, repr=False, compare=False)  # the cell that has shown it already

    def record(self) -> dict:
        "All fields that are set, rounded: what the ledger keeps."
        values = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("_")}
        return {k: rounded(v) for k, v in values.items() if k in ("claim", "verdict") or v not in (None, "")}

    def summary(self) -> str:
        "One line: measured against expected, and the rest that belongs to it."
        r, parts = self.record(), []
        unit = r.get("unit", "")
        units = f" {unit}" if isinstance(unit, str) and unit else ""
        if "measured" in r:
            text = f"{_text(r['measured'])}{units}"
            if "expected" in r:
                text = f"measured {text}, expected {_text(r['expected'])}"
                text += f" ± {_text(r['tol'])}" if r.get("tol") else f" ± {100 * r['rtol']:.6g} %" if r.get("rtol") else ""
            parts.append(text)
        if "article" in r:
            parts.append(f"the article: {_text(r['article'])}{units if not isinstance(r['article'], str) else ''}")
        if "condition" in r:
            parts.append(f"holds if {r['condition']}")
        if "says" in r:
            parts.append(f"{_text(r['cites'])}: {r['says']}")
        if "note" in r:
            parts.append(r["note"])
        if "seed" in r:
            parts.append(f"seed {_text(r['seed'])}")
        return "; ".join(parts)

    def _bundle(self, with_record: bool = True) -> dict:
        badge = (
            f'<span class="verdict verdict-{self.verdict}" style="background:{COLOURS[self.verdict]};color:#fff;'
            f'border-radius:0.6em;padding:0.1em 0.6em;font-size:0.85em">{self.verdict}</span>'
        )
        name = f" <code>{html.escape(self.claim)}</code>" if self.claim else ""
        line = f"{self.verdict}{f' {self.claim}' if self.claim else ''}: {self.summary()}"
        bundle = {"text/html": f"<div>{badge}{name} {html.escape(self.summary())}</div>", "text/plain": line}
        return {**bundle, MIME: self.record()} if with_record else bundle

    def _ipython_display_(self) -> None:
        "As the last expression of a cell: shown once in the cell that made it, again (without its record) in a later one."
        shell = _shell()
        if shell is not None and shell.execution_count != self._cell:
            _publish(self._bundle(with_record=False))

    def __str__(self) -> str:
        return self._bundle(with_record=False)["text/plain"]


def _shell():
    module = sys.modules.get("IPython")
    return module.get_ipython() if module else None


def _publish(bundle: dict) -> None:
    from IPython.display import display

    display(bundle, raw=True)


def _show(**values: Any) -> Verdict:
    shell = _shell()
    verdict = Verdict(**values, _cell=shell.execution_count if shell is not None else None)
    if shell is not None:
        _publish(verdict._bundle())
    return verdict


# Judging


def _truths(name: str, value: Any, wanted: bool, who: str) -> Any:
    "Checks a bool, or each of a dict or list of bools, that code has computed."
    value = plain(value)
    each = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [("", value)]
    each = list(each)
    if not each:
        raise VerdictError(f"{who}: {name} is empty, so nothing is shown")
    for key, truth in each:
        if not isinstance(truth, bool):
            raise VerdictError(f"{who}: {name}{f'[{key!r}]' if key != '' else ''} is {truth!r}, expected a bool computed by code")
        if truth != wanted:
            raise VerdictError(f"{who}: {name}{f'[{key!r}]' if key != '' else ''} is {truth}, expected {wanted}")
    return value


@dataclass(frozen=True)
class Claim:
    "A row of claims.jsonl that is about to be judged. Each method raises VerdictError if its verdict does not hold."

    row: dict

    @property
    def id(self) -> str:
        return self.row["id"]

    def _who(self, word: str) -> str:
        if word != self.row["verdict"]:
            raise VerdictError(
                f"claim {self.id}: the notebook says {word}, claims.jsonl says {self.row['verdict']}. "
                "If the measurement is right, change the row, its true statement included."
            )
        return f"claim {self.id}, {word}"

    def _agree(self, who: str, measured: Any, expected: Any, tol: float | None, rtol: float | None) -> tuple[Any, Any]:
        measured, expected = plain(measured), plain(expected)
        for name, value in (("tol", tol), ("rtol", rtol)):
            if value is not None and not value >= 0:
                raise VerdictError(f"{who}: {name} is {value!r}, expected a number not below 0")
        wrong = disagreements(measured, expected, tol or 0.0, rtol or 0.0)
        if not wrong and measured in ([], {}):
            wrong = ["nothing was measured"]
        if wrong:
            raise VerdictError(f"{who}: " + "; ".join(wrong))
        return measured, expected

    def reproduced(
        self,
        measured: Any,  # number, bool, or a list or dict of them, computed by this notebook
        expected: Any,  # the same shape; `at_least`, `at_most`, `Between` state a range
        tol: float | None = None,  # absolute tolerance; none at all means exact
        *,
        rtol: float | None = None,  # relative tolerance; the wider of the two counts
        seed: Any = None,
        unit: str = "",
        note: str = "",
    ) -> Verdict:
        "The article is right: code derives or measures its figure."
        who = self._who("reproduced")
        measured, expected = self._agree(who, measured, expected, tol, rtol)
        return _show(claim=self.id, verdict="reproduced", measured=measured, expected=expected, tol=tol, rtol=rtol, seed=seed, unit=unit, note=note)

    def corrected(
        self,
        *,
        article: Any = None,  # its figure: number, (low, high), list or dict of them; or its words
        measured: Any = None,
        expected: Any = None,
        tol: float | None = None,
        rtol: float | None = None,
        holds: Any = None,  # where the article gives no number: does its statement hold? must come out False
        seed: Any = None,
        unit: str = "",
        note: str = "",
    ) -> Verdict:
        "The article is wrong: the measurement agrees with the right figure and contradicts the article's."
        who = self._who("corrected")
        worded = article is None or isinstance(article, str)
        if worded and holds is None:
            raise VerdictError(f"{who}: the article's statement is {article!r}, no number, so holds=<bool computed by code> is needed")
        if not worded and (measured is None or expected is None):
            raise VerdictError(f"{who}: measured is {measured!r}, expected is {expected!r}: a figure is corrected by both")
        if holds is not None:
            holds = _truths("holds", holds, False, who)
        if measured is not None or expected is not None:
            measured, expected = self._agree(who, measured, expected, tol, rtol)
        if not worded:
            article = article if isinstance(article, tuple) else {k: v if isinstance(v, tuple) else plain(v) for k, v in article.items()} if isinstance(article, dict) else plain(article)
            same = agreements(measured, article, tol or 0.0, rtol or 0.0)
            if same:
                raise VerdictError(f"{who}: " + "; ".join(same))
        return _show(claim=self.id, verdict="corrected", measured=measured, expected=expected, tol=tol, rtol=rtol, article=article, holds=holds, seed=seed, unit=unit, note=note)

    def qualified(
        self,
        condition: str,  # what the article leaves out, in words
        *,
        holds: Any,  # bool(s) computed by code: under the condition the statement is true
        fails: Any,  # bool(s) computed by code: without it the statement is false
        measured: Any = None,
        expected: Any = None,
        tol: float | None = None,
        rtol: float | None = None,
        seed: Any = None,
        unit: str = "",
        note: str = "",
    ) -> Verdict:
        "The article is right under a condition it leaves out: both sides must be shown, and both bools must come out True."
        who = self._who("qualified")
        if not condition.strip():
            raise VerdictError(f"{who}: condition is empty")
        holds, fails = _truths("holds", holds, True, who), _truths("fails", fails, True, who)
        if expected is not None:
            measured, expected = self._agree(who, measured, expected, tol, rtol)
        elif measured is not None:
            measured = _finite(plain(measured), who)
        return _show(claim=self.id, verdict="qualified", condition=condition, holds=holds, fails=fails, measured=measured, expected=expected, tol=tol, rtol=rtol, seed=seed, unit=unit, note=note)

    def cited(self, source: str | Sequence[str], says: str, measured: Any = None, *, seed: Any = None, unit: str = "", note: str = "") -> Verdict:
        "A historical fact: what a primary source says. `source` is an arXiv number of the claim's row, or several."
        who = self._who("cited")
        named = [source] if isinstance(source, str) else list(source)
        unknown = [s for s in named if s not in self.row["sources"]]
        if unknown or not named:
            raise VerdictError(f"{who}: source {', '.join(unknown) or 'missing'}; the row has {', '.join(self.row['sources']) or 'none'}")
        if not says.strip():
            raise VerdictError(f"{who}: says is empty")
        measured = None if measured is None else _finite(plain(measured), who)
        return _show(claim=self.id, verdict="cited", cites=", ".join(named), says=says, measured=measured, seed=seed, unit=unit, note=note)


def claim(id: str) -> Claim:
    "The claim with this id, to be judged. An unknown id is refused, with ids that look like it."
    rows = {row["id"]: row for row in load_claims()}
    if id not in rows:
        tail = [k for k in rows if k.split(".")[-1] == id.split(".")[-1]]
        near = list(dict.fromkeys(difflib.get_close_matches(id, rows, n=3, cutoff=0.5) + tail))
        raise VerdictError(f"no claim {id!r} in claims.jsonl; " + (f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(rows)}"))
    return Claim(rows[id])


def _finite(value: Any, who: str) -> Any:
    "Refuses NaN and infinity, which no recorded number may be."
    for v in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
        if isinstance(v, dict | list):
            _finite(v, who)
        elif not isinstance(v, bool | int | float) or not math.isfinite(v):
            raise VerdictError(f"{who}: {v!r} is not a finite number")
    return value


def measured(*, unit: str | dict[str, str] = "", seed: Any = None, note: str = "", **values: Any) -> Verdict:
    "Shows and records named numbers of this notebook that its prose quotes."
    if not values:
        raise VerdictError("measured: no numbers given; call measured(name=value, ...)")
    return _show(claim=None, verdict="measured", measured=_finite(plain(values), "measured"), unit=unit, seed=seed, note=note)


# Collecting


def _notebook(path: str | Path) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def records(path: str | Path) -> list[dict]:
    "The records in a notebook's committed outputs, in order."
    found = []
    for cell in _notebook(path)["cells"]:
        for output in cell.get("outputs", []):
            record = output.get("data", {}).get(MIME)
            if record is not None:
                found.append(json.loads("".join(record)) if isinstance(record, str | list) else record)
    return found


def collect(notebooks: Iterable[str | Path]) -> dict:
    """All records of these notebooks: {"claims": {id: [record, ...]}, "measured": {notebook: [record, ...]}}.

    Each record of a claim names its notebook.
    """
    claims: dict[str, list] = {}
    numbers_: dict[str, list] = {}
    for path in sorted(map(Path, notebooks)):
        for record in records(path):
            if record.get("claim") is None:
                numbers_.setdefault(path.stem, []).append({k: v for k, v in record.items() if k not in ("claim", "verdict")})
            else:
                rest = {k: v for k, v in record.items() if k != "claim"}
                claims.setdefault(record["claim"], []).append({"notebook": path.stem, **rest})
    order = {row["id"]: k for k, row in enumerate(load_claims())}
    stray = sorted(set(claims) - set(order))
    if stray:
        raise VerdictError(f"the notebooks' outputs judge claims that claims.jsonl has not: {', '.join(stray)}")
    return {"claims": {k: claims[k] for k in sorted(claims, key=order.__getitem__)}, "measured": numbers_}


def course_notebooks(nbs_dir: str | Path) -> list[Path]:
    "The notebooks of a folder, those of the editor's checkpoints left out."
    return sorted(p for p in Path(nbs_dir).glob("*.ipynb") if not p.name.startswith((".", "_")))


def ledger_text(nbs_dir: str | Path) -> str:
    "What nbs/ledger.json must hold."
    return json.dumps(collect(course_notebooks(nbs_dir)), ensure_ascii=False, indent=1) + "\n"


def write_ledger(nbs_dir: str | Path) -> Path:
    "Writes nbs/ledger.json from the outputs of the notebooks beside it."
    path = Path(nbs_dir) / "ledger.json"
    path.write_text(ledger_text(nbs_dir), encoding="utf-8")
    return path


# Prose


@dataclass(frozen=True)
class Problem:
    "A number in prose that nothing executed stands behind."

    notebook: str
    cell: int
    number: str
    context: str

    def __str__(self) -> str:
        return f"{self.notebook}, cell {self.cell}: {self.number} in “{self.context}” is in no verdict, claim, code cell or its output"


_BLANK = [  # parts of Markdown whose numbers are not statements, in this order
    re.compile(r"^(```+|~~~+).*?^\1\s*$", re.M | re.S),
    re.compile(r"<!--.*?-->", re.S),
    re.compile(r"(`+)(?!`).+?\1"),
    re.compile(r"\$\$.*?\$\$", re.S),
    re.compile(r"(?<!\\)\$(?!\s)[^$\n]*?(?<!\s)\$(?!\d)"),
    re.compile(r"\[?@[\w-]+(?:[;,] ?@[\w-]+)*\]?"),  # citations and references
    re.compile(r"\]\([^)\s]*(?:\s+\"[^\"]*\")?\)"),  # a link's address; its text stays
    re.compile(r"\{[#.][^}]*\}"),  # attributes
    re.compile(r"</?[a-zA-Z][^>]*>"),
    re.compile(r"https?://\S+"),
    re.compile(r"^#+ *(?:\d+(?:\.\d+)*\.?)?", re.M),  # a heading's number
    re.compile(r"(?:arXiv[: ]*)?\b\d{4}\.\d{4,5}(?:v\d+)?\b", re.I),
    re.compile(r"\b\d+\.\d+\.\d+[\w.]*"),  # versions
    re.compile(r"\b(?:Python|version|torch|transformers|peft|TRL|DeepSpeed|nbdev|accelerate|datasets|matplotlib)\s+\d+(?:\.\d+)+", re.I),
    re.compile(r"\b(?:sections?|sec\.|tables?|figures?|fig\.|eqs?\.|equations?|chapters?|appendix|exercises?|app\.|[§第表图式])\s*\(?\d+(?:\.\d+)*", re.I),
    re.compile(r"\b0\d\.\d+\b"),  # an exercise's number
]
_NUMBER = re.compile(r"(?<![\w.])(\d{1,3}(?:[,\u202f]\d{3})+|\d+)(\.\d+)?(?:[eE]([-+]?\d+))?(\s?%)?")
_POOL = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d[\d_]*)?(?:\.\d+|(?<=\d)\.?)(?:[eE][-+]?\d+)?")
_SCALES = [
    (re.compile(r"\s*(?:GiB)\b"), 2.0**30), (re.compile(r"\s*(?:MiB)\b"), 2.0**20), (re.compile(r"\s*(?:KiB)\b"), 2.0**10),
    (re.compile(r"\s*(?:trillion|T\b|TB\b|TFLOP)"), 1e12), (re.compile(r"\s*(?:万亿)"), 1e12),
    (re.compile(r"\s*(?:billion|B\b|GB\b|GFLOP|G\b)"), 1e9), (re.compile(r"\s*亿"), 1e8),
    (re.compile(r"\s*(?:million|M\b|MB\b|MFLOP)"), 1e6), (re.compile(r"\s*(?:thousand|[kK]\b|[kK]B\b|ms\b)"), 1e3),
    (re.compile(r"\s*万(?!亿)"), 1e4),
]  # fmt: skip


def _numbers_in(text: str) -> set[float]:
    found = set()
    for match in _POOL.finditer(text):
        try:
            found.add(float(match[0].replace(",", "").replace("_", "")))
        except ValueError:
            continue
    return found


def _leaves(value: Any) -> Iterable[float]:
    if isinstance(value, dict):
        for v in value.values():
            yield from _leaves(v)
    elif isinstance(value, list):
        for v in value:
            yield from _leaves(v)
    elif isinstance(value, str):
        yield from _numbers_in(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def _known_numbers(notebook: dict, name: str | Path, extra: Iterable[Any]) -> set[float]:
    pool = set(_leaves(list(extra)))
    for row in load_claims():
        pool |= _numbers_in(" ".join(row[k] for k in ("statement_en", "statement_zh", "truth_en", "truth_zh")))
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        pool |= _numbers_in("".join(cell["source"]))
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            texts = [output.get("text", ""), *(data.get(k, "") for k in ("text/plain", "text/markdown", "text/latex"))]
            texts.append(re.sub(r"<[^>]*>", " ", html.unescape("".join(data.get("text/html", "")))))
            pool |= _numbers_in("\n".join("".join(t) for t in texts))
            pool |= set(_leaves(data.get(MIME, [])))
    return pool


def _blanked(markdown: str) -> str:
    for pattern in _BLANK:
        markdown = pattern.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), markdown)
    return markdown


def prose_numbers(path: str | Path, ledger: dict | None = None) -> list[Problem]:
    """Numbers that a notebook's Markdown states and nothing stands behind.

    Looked at are decimals, percentages and integers of four digits or more; not looked at are code, maths, addresses,
    arXiv numbers, versions, years from 1950 to 2030, and the numbers of headings, sections, tables and equations. A
    number passes if, at the precision it is printed with, it is in a record of the ledger (those of earlier notebooks
    too, if `ledger` is given), in the text of a claim, in the source of a code cell of the notebook, or in what such a
    cell printed. `12.5 %` matches 0.125, and `1.4 trillion`, `16.1 GB` and `1.2 万` match the full number.
    """
    notebook = _notebook(path)
    pool = sorted(_known_numbers(notebook, path, [ledger] if ledger else []))
    problems = []
    for index, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "markdown":
            continue
        text = "".join(cell["source"])
        blank = _blanked(text)
        for match in _NUMBER.finditer(blank):
            whole, decimals, exponent, percent = match.groups()
            digits = re.sub(r"\D", "", whole)
            if not decimals and not percent and not exponent:
                if len(digits) < 4 or (len(whole) == 4 and 1950 <= int(digits) <= 2030):
                    continue
            power = 10.0 ** int(exponent or 0)
            value = float(digits + (decimals or "")) * power
            half = 0.5 * 10.0 ** -(len(decimals) - 1 if decimals else 0) * power
            scales = [1.0, *([0.01] if percent else []), *(s for p, s in _SCALES if p.match(blank, match.end()))]
            scales += [1e-3] if re.match(r"\s*ms\b", blank[match.end() :]) else []
            if not any(_has(pool, value * s, half * s) for s in scales):
                context = " ".join(text[max(0, match.start() - 30) : match.end() + 30].split())
                problems.append(Problem(Path(path).name, index, match[0].strip(), context))
    return problems


def _has(pool: Sequence[float], value: float, half: float) -> bool:
    "Is there a number that prints as this one?"
    slack = half * (1 + 1e-9) + abs(value) * 1e-12
    return any(abs(abs(q) - value) <= slack for q in pool)


__all__ = [
    "MIME", "VERDICTS", "Between", "Claim", "Problem", "Verdict", "VerdictError", "at_least", "at_most", "claim", "collect",
    "course_notebooks", "ledger_text", "measured", "prose_numbers", "records", "write_ledger",
]  # fmt: skip
