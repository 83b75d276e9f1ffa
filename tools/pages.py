"""Write the pages that are made from data: nbs/claims.qmd, nbs/interview.qmd, and nbs/ledger.json behind them.

    python tools/pages.py            # write what differs
    python tools/pages.py --check    # write nothing; exit 1 if a file differs

The ledger is read from the notebooks' committed outputs, so no notebook is run here.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llm_train_course.app.coursedata import citation_key, load_claims, load_interview  # noqa: E402
from llm_train_course.app.ledger import Verdict, ledger_text  # noqa: E402

NBS = ROOT / "nbs"
CHAPTERS = [
    ("Opening", "开篇"), ("Stages of training", "训练阶段"), ("Parallelism", "并行策略"), ("LoRA", "LoRA"), ("QLoRA", "QLoRA"),
    ("RLHF", "RLHF"), ("DPO and PPO", "DPO 与 PPO"), ("Distillation", "知识蒸馏"), ("Precision", "数值精度"),
    ("Batch and activation memory", "批量与激活显存"), ("Stability", "训练稳定性"),
]  # fmt: skip
WORDS_ZH = {"reproduced": "成立", "qualified": "有条件成立", "corrected": "需要更正", "cited": "引用文献"}


def escape(text: str) -> str:
    "Plain text as Markdown that shows it unchanged, also inside a table."
    return re.sub(r"([\\`*_{}\[\]<>#$~^@|])", r"\\\1", text)


def anchor(id: str) -> str:
    "An id as part of a page address."
    return re.sub(r"[^\w-]+", "-", id)


def chinese(text: str) -> str:
    "A run of Chinese, marked as such for fonts and screen readers."
    return f'[{escape(text)}]{{lang="zh-Hans"}}'


def heading(chapter: int) -> str:
    "The heading of a chapter's part of a page; its anchor does not look like a cross-reference."
    en, zh = CHAPTERS[chapter]
    number = f"{chapter}. " if chapter else ""
    return f"## {number}{en}{'' if en == zh else f' · {zh}'} {{#chapter-{chapter}}}"


def notebook_link(stem: str, nbs: Path) -> str:
    "The notebook that judges a claim, as a link once it exists."
    return f"[{escape(stem)}]({stem}.ipynb)" if (nbs / f"{stem}.ipynb").exists() else escape(stem)


def measured_cell(records: Iterable[dict], nbs: Path) -> str:
    "What the notebooks measured for a claim: one line for each record."
    lines = []
    for record in records:
        fields = {k: v for k, v in record.items() if k != "notebook"}
        summary = Verdict(claim=None, **fields).summary()
        lines.append(f"{escape(summary)} ({notebook_link(record['notebook'], nbs)})")
    return " <br> ".join(lines)


def claims_page(ledger: dict, nbs: Path) -> str:
    "The claims, chapter by chapter: what the article says, the verdict, what is true, and what was measured."
    claims, judged = load_claims(), ledger["claims"]
    done = sum(row["id"] in judged for row in claims)
    words = {w: sum(row["verdict"] == w for row in claims) for w in WORDS_ZH}
    out = [
        "---",
        "title: The claims and their verdicts",
        "description: Every statement of fact of the article this course grew out of, and what executed code or a primary source says about it",
        "page-layout: full",
        "toc-depth: 2",
        "---",
        "",
        "<!-- Written by tools/pages.py from data/claims.jsonl and the notebooks' outputs. Do not edit. -->",
        "",
        "The course grew out of a Chinese article on ten frequent interview questions about training large models. Each of its",
        f"{len(claims)} statements of fact is judged here, by an executed cell where code can reach it and by a primary source where it",
        f"cannot. {done} have an executed verdict so far; the others wait for their chapter, and are counted below under the verdict",
        "that is expected.",
        "",
        f"- [reproduced]{{.verdict .verdict-reproduced}}: code derives or measures what the article says ({words['reproduced']} claims).",
        f"- [qualified]{{.verdict .verdict-qualified}}: right under a condition that the article leaves out ({words['qualified']}).",
        f"- [corrected]{{.verdict .verdict-corrected}}: wrong, with the right figure beside it ({words['corrected']}).",
        f"- [cited]{{.verdict .verdict-cited}}: a historical fact, left to its source ({words['cited']}).",
        "",
        "Ψ is the number of parameters, N the number of ranks, k the number of accumulated micro-batches. GB is 10⁹ bytes.",
        "",
        '::: {lang="zh-Hans"}',
        f"本页逐条判断原文的 {len(claims)} 个事实陈述：{'、'.join(f'{zh} {words[w]} 条' for w, zh in WORDS_ZH.items())}。能用代码验证的由已执行的单元格给出，",
        "不能的引用原始文献。尚未写到的章节标为“not judged yet”。",
        ":::",
        "",
    ]
    for chapter in range(len(CHAPTERS)):
        rows = [row for row in claims if row["chapter"] == chapter]
        if not rows:
            continue
        out += [heading(chapter), "", "| Claim | The article says | What is true | Measured |", f"|{'-' * 14}|{'-' * 28}|{'-' * 38}|{'-' * 24}|"]
        for row in rows:
            found = judged.get(row["id"], [])
            badge = f"[{row['verdict']}]{{.verdict .verdict-{row['verdict']}}}" if found else "[not judged yet]{.verdict .verdict-open}"
            name = f'[`{row["id"]}`]{{#claim-{anchor(row["id"])}}} <br> {badge}'
            cites = "; ".join(f"@{citation_key(s)}" for s in row["sources"])
            truth = f"{escape(row['truth_en'])}{f' [{cites}]' if cites else ''} <br> {chinese(row['truth_zh'])}"
            values = measured_cell(found, nbs) or f"in {notebook_link(row['judged_in'], nbs)}"
            out.append(f"| {name} | {escape(row['statement_en'])} <br> {chinese(row['statement_zh'])} | {truth} | {values} |")
        out.append("")
    out += ["## Sources {#sources}", "", "::: {#refs}", ":::", ""]
    return "\n".join(out)


def interview_page() -> str:
    "The interview questions by chapter, each answer folded away, in English and Chinese."
    questions = load_interview()
    out = [
        "---",
        "title: Interview questions",
        "description: Questions on training large models with answers that hold, in English and Chinese",
        "toc-depth: 2",
        "---",
        "",
        "<!-- Written by tools/pages.py from data/interview.jsonl. Do not edit. -->",
        "",
        f"{len(questions)} questions. Answer first, then open the box. What each answer rests on is on the page of [claims](claims.qmd).",
        "The same questions are training data: `llm-train` fine-tunes on those of the train split and is measured on the held-out",
        "ones, which belong to other claims.",
        "",
        f'[{len(questions)} 道面试题，先自己回答，再展开答案。每个答案的依据见 [claims](claims.qmd) 页。]{{lang="zh-Hans"}}',
        "",
    ]
    for chapter in range(len(CHAPTERS)):
        rows = [q for q in questions if q["chapter"] == chapter]
        if not rows:
            continue
        out += [heading(chapter), ""]
        for q in rows:
            out += [
                f'::: {{#q-{anchor(q["id"])} .callout-note collapse="true" icon="false"}}',
                f"### {escape(q['question'])}",
                "",
                escape(q["answer"]),
                "",
                '::: {lang="zh-Hans"}',
                f"**{escape(q['question_zh'])}**",
                "",
                escape(q["answer_zh"]),
                ":::",
                "",
                f"Rests on [`{q['claim']}`](claims.qmd#claim-{anchor(q['claim'])}).",
                ":::",
                "",
            ]
    return "\n".join(out)


# the pictures that the READMEs show, taken from the committed output of a notebook's cell
PICTURES = {"images/stages.png": ("01_stages.ipynb", "fig-stages-roles")}


def pictures(nbs: Path) -> dict[str, bytes]:
    "File name and bytes of each picture whose notebook and cell exist."
    found = {}
    for name, (notebook, label) in PICTURES.items():
        path = nbs / notebook
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else ():
            if cell["cell_type"] == "code" and f"#| label: {label}\n" in cell["source"]:
                drawn = [o["data"]["image/png"] for o in cell["outputs"] if "image/png" in o.get("data", {})]
                if drawn:
                    found[name] = base64.b64decode(drawn[0])
    return found


def pages(nbs: Path = NBS) -> dict[str, bytes]:
    "File name and bytes of everything this script writes into the folder of the notebooks."
    text = ledger_text(nbs)
    written = {"ledger.json": text, "claims.qmd": claims_page(json.loads(text), nbs), "interview.qmd": interview_page()}
    return {name: t.encode() for name, t in written.items()} | pictures(nbs)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs")
    parser.add_argument("--nbs", type=Path, default=NBS, help="folder of the notebooks")
    args = parser.parse_args(argv)
    different = []
    for name, content in pages(args.nbs).items():
        path = args.nbs / name
        if not path.exists() or path.read_bytes() != content:
            different.append(name)
            if not args.check:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
    for name in different:
        print(f"nbs/{name}: {'differs from the data and the notebooks' if args.check else 'written'}")
    if different and args.check:
        print("Run `python tools/pages.py` and commit the result.")
    return int(bool(different) and args.check)


if __name__ == "__main__":
    sys.exit(main())
