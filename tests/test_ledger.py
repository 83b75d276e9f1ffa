"The ledger: verdicts that do not hold raise; those that hold are shown, recorded, and read back from the notebooks."
import json
import math
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_train_course.app.coursedata import load_claims
from llm_train_course.app.ledger import (
    MIME,
    Between,
    Verdict,
    VerdictError,
    at_least,
    at_most,
    claim,
    collect,
    course_notebooks,
    ledger_text,
    measured,
    prose_numbers,
    records,
    write_ledger,
)

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
CLAIMS = {row["id"]: row for row in load_claims()}
sys.path.insert(0, str(ROOT / "tools"))


def title(path):
    "Does the notebook begin with an H1?"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return any(c["cell_type"] == "markdown" and "".join(c["source"]).lstrip().startswith("# ") for c in cells[:2])


NOTEBOOKS = [p for p in course_notebooks(NBS) if title(p)]


# Which verdict, which claim


def test_unknown_claims_are_refused_with_near_ids():
    with pytest.raises(VerdictError, match=r"no claim 'stages.flw'.*did you mean stages\.flow"):
        claim("stages.flw")
    with pytest.raises(VerdictError, match=r"lora\.count"):
        claim("count")


@pytest.mark.parametrize("word", ["qualified", "corrected", "cited"])
def test_another_verdict_than_the_row_says_is_refused(word):
    call = {
        "qualified": lambda c: c.qualified("r is small", holds=True, fails=True),
        "corrected": lambda c: c.corrected(article=1, measured=2, expected=2),
        "cited": lambda c: c.cited("2106.09685", "says so"),
    }
    with pytest.raises(VerdictError, match=rf"claim lora\.count: the notebook says {word}, claims\.jsonl says reproduced"):
        call[word](claim("lora.count"))
    with pytest.raises(VerdictError, match="says reproduced, claims.jsonl says corrected"):
        claim("intro.full-7b").reproduced(1, 1)


# reproduced


@pytest.mark.parametrize(
    "value, expected, tol",
    [
        (131072, 131072, None),
        (0.1795, 7 / 39, 1e-3),
        ([1, 2.0], [1, 2], 0),
        ({"a": 1.0, "b": [2, 3]}, {"a": 1.1, "b": [2, 3.05]}, 0.11),
        (torch.tensor([1.0, 2.0]), [1, 2], 0),
        (np.float32(0.5), Fraction(1, 2), 0),
        (torch.tensor(3), 3, None),
        (0.97, at_least(0.95), None),
        ({"x": 0.2, "y": 5}, {"x": at_most(0.25), "y": Between(4, 6)}, None),
        (True, True, None),
    ],
)
def test_reproduced_holds(value, expected, tol):
    v = claim("lora.count").reproduced(value, expected, tol)
    assert isinstance(v, Verdict) and v.claim == "lora.count" and v.verdict == "reproduced"
    json.dumps(v.record(), allow_nan=False)
    with pytest.raises(FrozenInstanceError):
        v.measured = 0


@pytest.mark.parametrize(
    "value, expected, tol, words",
    [
        (131073, 131072, None, "measured 131073, expected 131072, difference 1 over the tolerance 0"),
        (1.0, 1.2, 0.1, "difference 0.2 over the tolerance 0.1"),
        (math.nan, 1.0, 1e9, "measured nan"),
        (math.nan, math.nan, 1e9, "measured nan"),
        (1.0, math.nan, 1e9, "expected nan"),
        (math.inf, math.inf, 1, "difference nan"),
        (math.nan, at_least(0), None, "expected at least 0"),
        ([1, math.nan], [1, 2], 1e9, r"\[1\]: measured nan"),
        ([1, 2], [1, 2, 3], 1, "do not have the same length"),
        ([], [], 1, "nothing was measured"),
        ({}, {}, 1, "nothing was measured"),
        ({"a": 1}, {"b": 1}, 1, "do not have the same names"),
        ({"a": {"b": 2.0}}, {"a": {"b": 1.0}}, 0.5, r"\['a'\]\['b'\]: measured 2.0"),
        (0.9, at_least(0.95), None, "measured 0.9, expected at least 0.95"),
        (7, Between(1, 6), None, "expected 1 to 6"),
        (True, 1, None, "cannot be compared"),
        ("1", 1, None, "cannot be compared"),
        (None, 1, None, "both are needed"),
        (1, 1, -1, "tol is -1"),
        (1, 1, math.nan, "tol is nan"),
        (object(), 1, 1, "not object"),
    ],
)
def test_reproduced_fails(value, expected, tol, words):
    with pytest.raises(VerdictError, match=words):
        claim("lora.count").reproduced(value, expected, tol)


def test_the_message_names_claim_measured_expected_and_tolerance():
    with pytest.raises(VerdictError) as e:
        claim("lora.count").reproduced(5, 4, 0.5)
    assert str(e.value) == "claim lora.count, reproduced: measured 5, expected 4, difference 1 over the tolerance 0.5"
    assert issubclass(VerdictError, AssertionError)


def test_relative_tolerance():
    claim("lora.count").reproduced(101, 100, rtol=0.01)
    with pytest.raises(VerdictError):
        claim("lora.count").reproduced(102, 100, rtol=0.01)
    claim("lora.count").reproduced([1001, 0.5], [1000, 0.9], tol=0.4, rtol=0.001)


# corrected


def test_corrected_holds():
    c = claim("intro.full-7b")
    c.corrected(article=14, measured=112.0, expected=112, tol=0.5)
    c.corrected(article=(8, 14), measured=112.0, expected=112, tol=0.5)
    c.corrected(article={"7B": 14, "65B": (120, 140)}, measured={"7B": 112.0, "65B": 1040.0}, expected={"7B": 112, "65B": 1040}, tol=0.5)
    c.corrected(article={"7B": 14}, measured={"7B": 112.0, "65B": 1040.0}, expected={"7B": 112, "65B": 1040}, tol=0.5)
    c.corrected(article="full-rank", holds=False)
    c.corrected(holds={"square": False, "thin": False}, measured=3, expected=3)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(article=14, measured=112.0, expected=111, tol=0.5), "difference 1 over the tolerance 0.5"),
        (dict(article=14, measured=14.2, expected=14.2, tol=0.5), "nothing is corrected"),
        (dict(article=(10, 20), measured=20.4, expected=20.4, tol=0.5), "nothing is corrected"),
        (dict(article=14, measured=math.nan, expected=112, tol=1e9), "measured nan"),
        (dict(article=math.nan, measured=112.0, expected=112, tol=0.5), "nothing is corrected"),
        (dict(article={"7B": 14, "65B": 1040}, measured={"7B": 112.0, "65B": 1040.0}, expected={"7B": 112, "65B": 1040}, tol=0.5), r"\['65B'\]"),
        (dict(article={"9B": 14}, measured={"7B": 112.0}, expected={"7B": 112}, tol=0.5), "has names that measured"),
        (dict(article=14, holds=False), "a figure is corrected by both"),
        (dict(article="low-rank", measured=1, expected=1), "holds=<bool computed by code> is needed"),
        (dict(measured=1, expected=1), "holds=<bool computed by code> is needed"),
        (dict(article="low-rank", holds=True), "holds is True, expected False"),
        (dict(article="low-rank", holds={"a": False, "b": True}), r"holds\['b'\] is True"),
        (dict(article="low-rank", holds=0), "holds is 0, expected a bool"),
        (dict(article="low-rank", holds={}), "holds is empty"),
    ],
)
def test_corrected_fails(arguments, words):
    with pytest.raises(VerdictError, match=words):
        claim("intro.full-7b").corrected(**arguments)


# qualified


def test_qualified_shows_both_sides():
    c = claim("parallel.zero")
    v = c.qualified("N is large", holds={"N=4096": np.bool_(True)}, fails=torch.tensor(True), measured={"N=8": 4.267}, expected={"N=8": 4.3}, tol=0.05)
    assert v.record()["holds"] == {"N=4096": True} and v.record()["fails"] is True
    assert c.qualified("N is large", holds=True, fails=[True, True], measured=4.3).record()["measured"] == 4.3


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(holds=False, fails=True), "holds is False, expected True"),
        (dict(holds=True, fails=False), "fails is False, expected True"),
        (dict(holds=True, fails={"N=8": True, "N=64": False}), r"fails\['N=64'\] is False"),
        (dict(holds=1, fails=True), "holds is 1, expected a bool"),
        (dict(holds=None, fails=True), "holds is None, expected a bool"),
        (dict(holds=[], fails=True), "holds is empty"),
        (dict(holds=True, fails=True, measured=math.nan), "nan is not a finite number"),
        (dict(holds=True, fails=True, measured=1, expected=2, tol=0.5), "difference 1"),
        (dict(holds=True, fails=True, expected=2, tol=0.5), "both are needed"),
        (dict(condition=" ", holds=True, fails=True), "condition is empty"),
    ],
)
def test_qualified_fails(arguments, words):
    with pytest.raises(VerdictError, match=words):
        claim("parallel.zero").qualified(**{"condition": "N is large", **arguments})


def test_qualified_needs_both_sides():
    with pytest.raises(TypeError, match="fails"):
        claim("parallel.zero").qualified("N is large", holds=True)


# cited, measured


def test_cited():
    v = claim("lora.hypothesis").cited("2106.09685", says="a hypothesis")
    assert v.cites == "2106.09685" and "2106.09685: a hypothesis" in str(v)
    claim("lora.hypothesis").cited(["2106.09685", "2012.13255"], "a hypothesis", measured=2)
    with pytest.raises(VerdictError, match="source 2305.14314; the row has 2106.09685, 2012.13255"):
        claim("lora.hypothesis").cited("2305.14314", "a hypothesis")
    with pytest.raises(VerdictError, match="source missing"):
        claim("lora.hypothesis").cited([], "a hypothesis")
    with pytest.raises(VerdictError, match="says is empty"):
        claim("lora.hypothesis").cited("2106.09685", "")


def test_measured():
    v = measured(loss=torch.tensor(1.23456789), steps=200, unit="nats", seed=3)
    assert v.record() == {"claim": None, "verdict": "measured", "measured": {"loss": 1.23457, "steps": 200}, "unit": "nats", "seed": 3}
    with pytest.raises(VerdictError, match="no numbers given"):
        measured()
    for bad in (math.nan, math.inf, "12", None, [1.0, math.nan]):
        with pytest.raises(VerdictError):
            measured(x=bad)


# Records are stable


def test_values_are_rounded_to_six_digits_and_compared_unrounded():
    v = claim("lora.count").reproduced(0.123456789, 0.12345, tol=1e-5, seed=0)
    assert v.record() == {"claim": "lora.count", "verdict": "reproduced", "measured": 0.123457, "expected": 0.12345, "tol": 1e-5, "seed": 0}
    assert claim("lora.count").reproduced(16777217, 16777217).record()["measured"] == 16777217
    with pytest.raises(VerdictError):
        claim("lora.count").reproduced(1.00000001, 1.0)


def test_nothing_is_printed_outside_a_notebook(capsys):
    claim("lora.count").reproduced(1, 1)
    assert capsys.readouterr().out == ""


# From a notebook to the ledger


CELLS = [
    "from llm_train_course.app.ledger import claim, measured",
    "claim('lora.count').reproduced(16 * 8192, 131072, tol=0, seed=7)\nv = claim('intro.full-7b').corrected(article=14, measured=112.0, expected=112, tol=.5, unit='GB')\nv",
    "v  # a second look: shown, not recorded again",
    "measured(share=0.123456789, seed=1);",
]


def execute(path, cells, text="# A notebook\n> A question."):
    import nbformat
    from execute import kernel_environment
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    nb = new_notebook(cells=[new_markdown_cell(text), *map(new_code_cell, cells)])
    for k, cell in enumerate(nb.cells):
        cell.id = f"cell-{k}"
    scratch = path.parent / "kernel"
    scratch.mkdir(exist_ok=True)
    client = NotebookClient(nb, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}, record_timing=False)
    with client.setup_kernel(env=kernel_environment(1, scratch)):
        for k, cell in enumerate(nb.cells):
            client.execute_cell(cell, k)
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nb, path)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    "A notebook run in a kernel, then cleaned by nbdev_clean."
    folder = tmp_path_factory.mktemp("ledger")
    (folder / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", folder)
    path = folder / "nbs" / "03_lora.ipynb"
    execute(path, CELLS)
    subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", path], cwd=folder, check=True, capture_output=True)
    return path


def test_records_survive_execution_and_cleaning(executed):
    assert records(executed) == [
        {"claim": "lora.count", "verdict": "reproduced", "measured": 131072, "expected": 131072, "tol": 0, "seed": 7},
        {"claim": "intro.full-7b", "verdict": "corrected", "measured": 112.0, "expected": 112, "tol": 0.5, "article": 14, "unit": "GB"},
        {"claim": None, "verdict": "measured", "measured": {"share": 0.123457}, "seed": 1},
    ]
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    assert [len(c.get("outputs", [])) for c in cells] == [0, 0, 2, 1, 1], "shown once where it is made, and again when asked for"
    for output in cells[2]["outputs"]:
        assert set(output["data"]) == {"text/html", "text/plain", MIME}
    line = "".join(cells[2]["outputs"][1]["data"]["text/html"])
    assert "corrected" in line and "<code>intro.full-7b</code>" in line and "measured 112 GB, expected 112 ± 0.5" in line


def test_pandoc_passes_over_the_record(executed):
    import pypandoc

    page = pypandoc.convert_file(str(executed), "html", format="ipynb")
    assert "<code>lora.count</code>" in page and MIME not in page and "&quot;verdict&quot;" not in page


def test_a_second_execution_gives_the_same_bytes(executed, tmp_path):
    again = tmp_path / "nbs" / executed.name
    again.parent.mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    execute(again, CELLS)
    subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", again], cwd=tmp_path, check=True, capture_output=True)
    assert again.read_bytes() == executed.read_bytes()


def test_a_verdict_that_does_not_hold_stops_the_notebook(tmp_path):
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="VerdictError"):
        execute(tmp_path / "x.ipynb", [CELLS[0], "claim('lora.count').reproduced(1, 2)"])


def test_ledger_is_a_function_of_the_notebooks(executed):
    ledger = collect([executed])
    assert list(ledger["claims"]) == ["intro.full-7b", "lora.count"], "in the order of the claims"
    assert ledger["claims"]["lora.count"][0]["notebook"] == "03_lora"
    assert ledger["measured"] == {"03_lora": [{"measured": {"share": 0.123457}, "seed": 1}]}
    path = write_ledger(executed.parent)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == ledger and text == ledger_text(executed.parent)
    write_ledger(executed.parent)
    assert path.read_text(encoding="utf-8") == text
    path.unlink()


def test_records_of_unknown_claims_are_refused(executed, tmp_path):
    path = tmp_path / "x.ipynb"
    path.write_text(executed.read_text(encoding="utf-8").replace('"lora.count"', '"lora.kount"'), encoding="utf-8")
    with pytest.raises(VerdictError, match="lora.kount"):
        collect([path])


# Prose


def prose(tmp_path, markdown, code="", output=""):
    path = tmp_path / "p.ipynb"
    outputs = [{"output_type": "stream", "name": "stdout", "text": output}] if output else []
    cells = [{"cell_type": "markdown", "source": markdown, "metadata": {}}]
    cells.append({"cell_type": "code", "source": code, "outputs": outputs, "metadata": {}, "execution_count": None})
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return [p.number for p in prose_numbers(path)]


@pytest.mark.parametrize(
    "text, found",
    [
        ("The loss is 77.31 nats.", ["77.31"]),
        ("It takes 98765 steps, 98,765 of them.", ["98765", "98,765"]),
        ("A share of 83 % or 83.7% is left.", ["83 %", "83.7%"]),
        ("Rate 7.7e-13 is too small.", ["7.7e-13"]),
        ("准确率为 83.7%，损失 77.31。", ["83.7%", "77.31"]),
        ("Small integers like 12 or 640 are free.", []),
        ("`77.31` and ```83.7```", []),
        ("```python\nx = 77.31\n```", []),
        ("$x = 77.31$ and $$y = 83.7\n+ 98765$$", []),
        ("[link](https://example.org/98765/77.31) and https://example.org/98765", []),
        ("[77.31](https://example.org)", ["77.31"]),
        ("arXiv:2106.99999, 2106.99999, [@arxiv-2106-99999]", []),
        ("In 1998, 2023 and 2030.", []),
        ("In 1949.", ["1949"]),
        ("## 77.31 A heading\n\n### 9.4. Another", []),
        ("Table 7.31, section 83.7, Eq. 4.12, see @fig-98765, 第 7.31 节", []),
        ("Python 3.97 and torch 2.97.1", []),
        ("exercise 01.2 and 01.4", []),
        ("<img width=98765> <!-- 77.31 -->", []),
        ("x77.31y v98765", []),
    ],
)
def test_which_numbers_of_prose_are_looked_at(tmp_path, text, found):
    assert prose(tmp_path, text) == found


@pytest.mark.parametrize(
    "text, code, output, found",
    [
        ("77.31", "x = 77.31", "", []),
        ("77.3", "", "value 77.312", []),
        ("77.4", "", "value 77.312", ["77.4"]),
        ("77.310", "", "value 77.312", ["77.310"]),
        ("83.7 %", "", "0.8371", []),
        ("83.7 %", "", "0.8363", ["83.7 %"]),
        ("98,765", "n = 98_765", "", []),
        ("98,765", "", "98,765 tokens", []),
        ("98,765", "", "98764", ["98,765"]),
        ("77.3 billion", "n = 77_312_000_000", "", []),
        ("77.3 GB", "", "77312000000 bytes", []),
        ("77.4 GB", "", "77312000000 bytes", ["77.4"]),
        ("9.88 万", "n = 98765", "", []),
        ("7.7e-13", "x = 7.7e-13", "", []),
    ],
)
def test_what_a_number_of_prose_may_rest_on(tmp_path, text, code, output, found):
    assert prose(tmp_path, text, code, output) == found


def test_numbers_may_rest_on_claims_and_on_records(tmp_path, executed):
    assert prose(tmp_path, "InstructGPT: 33,207. LLaMA: 1.4 trillion. DeepSeek-V3: 2.788 million.") == []
    assert prose(tmp_path, "A share of 12.3457 %.") == ["12.3457 %"]
    cells = json.loads(executed.read_text(encoding="utf-8"))
    cells["cells"][0]["source"] = "A share of 12.3457 %, not 12.3467 %."
    path = tmp_path / "q.ipynb"
    path.write_text(json.dumps(cells), encoding="utf-8")
    problems = prose_numbers(path)
    assert [p.number for p in problems] == ["12.3467 %"]
    assert str(problems[0]).startswith("q.ipynb, cell 0: 12.3467 % in “A share of 12.3457 %, not 12.3467 %.”")


# The course's own notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_prose_of_the_course_quotes_only_numbers_that_something_stands_behind(path):
    ledger = collect([p for p in NOTEBOOKS if p.name < path.name])
    assert not (problems := prose_numbers(path, ledger)), "\n".join(map(str, problems))


@pytest.mark.parametrize("id", [id for id, row in CLAIMS.items() if NBS / f"{row['judged_in']}.ipynb" in NOTEBOOKS])
def test_every_claim_of_a_written_chapter_has_an_executed_verdict(id):
    row = CLAIMS[id]
    path = NBS / f"{row['judged_in']}.ipynb"
    found = [r for r in records(path) if r["claim"] == id]
    assert found, f"{path.name} does not judge {id}"
    assert {r["verdict"] for r in found} == {row["verdict"]}


def test_committed_ledger_is_up_to_date():
    path = NBS / "ledger.json"
    assert path.exists() and path.read_text(encoding="utf-8") == ledger_text(NBS), "run `python tools/pages.py`"


def test_committed_pages_are_up_to_date():
    import pages

    for name, content in pages.pages(NBS).items():
        assert (NBS / name).read_bytes() == content, f"nbs/{name}: run `python tools/pages.py`"


def test_pages_follow_the_notebooks(executed, tmp_path, capsys):
    import pages

    nbs = tmp_path / "nbs"
    nbs.mkdir()
    shutil.copy(executed, nbs)
    assert pages.main(["--nbs", str(nbs), "--check"]) == 1 and "claims.qmd" in capsys.readouterr().out
    assert not (nbs / "claims.qmd").exists()
    assert pages.main(["--nbs", str(nbs)]) == 0 and pages.main(["--nbs", str(nbs), "--check"]) == 0
    text = (nbs / "claims.qmd").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| [`lora.count`]"))
    assert "[reproduced]{.verdict .verdict-reproduced}" in row and "[03\\_lora](03_lora.ipynb)" in row and "131,072" in row
    assert sum(line.startswith("| [`") for line in text.splitlines()) == len(CLAIMS)
    assert sum("[not judged yet]" in line for line in text.splitlines()) == len(CLAIMS) - 2
    (nbs / "claims.qmd").write_text(text.replace("131,072", "131,073"), encoding="utf-8")
    assert pages.main(["--nbs", str(nbs), "--check"]) == 1
