"report.html: one file that stands alone, says what was run, and shows text as text."
import re
from html.parser import HTMLParser

import pytest
import yaml

from llm_train_course.app import report, runs
from llm_train_course.app.demo import write_demo_report

EVIL = '<script>alert("x")</script> & </pre> \' " 🦙 中文'
VOID = {"meta", "br", "img", "hr", "input", "link"}


class Page(HTMLParser):
    "Tags are balanced; attributes, text and figures are collected."

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attrs, self.text, self.figures = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += attrs
        if tag == "svg":
            self.figures.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "sft-tiny-1"
    (path / "adapter").mkdir(parents=True)
    recipe = {"model": EVIL, "data": EVIL, "eval_data": "held.jsonl", "lora": {"r": 8, "alpha": 16.0}, "train": {"learning_rate": 1e-3}}
    info = {"source": EVIL, "kind": "messages", "rows": 71, "sha256": "ab" * 32}
    runs.write_config(path, recipe, {"command": "sft", "steps": 40, "parameters": 1_000_000, "trained": 5000, "device": "cpu",
                                     "model": {"name": "org/tiny", "revision": "0123abcd"}, "versions": {"torch": "2.13.0"}, "data": {"data": info, "eval_data": info}})
    rows = [f'{{"step": {s}, "epoch": 0, "loss": {3 - s / 20}, "lr": {1e-3 * (1 - s / 40)}, "grad_norm": 1.5, "n_targets": 9}}' for s in range(1, 41)]
    (path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 41, "lo')  # cut off while it was written
    runs.update_results(path, before={"loss": 3.0, "perplexity": 20.1}, after={"loss": 1.0, "perplexity": 2.7}, steps=40, seconds=12.3,
                        prompts=[EVIL, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": EVIL}]],
                        references=[EVIL, ""], answers_before=[EVIL, ""], answers_after=["an answer", EVIL])
    return path


def test_the_page_is_whole_and_stands_alone(run_dir):
    path = report.write_report(run_dir)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    said = " ".join(page.text)
    assert "script" not in page.tags and "<script" not in text.lower()
    assert said.count(EVIL) >= 7  # shown as it is, wherever it came from
    assert not re.search(r"https?://|@import|url\(|<link|<iframe", text)
    assert not {"src", "href"} & {k for k, _ in page.attrs}
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text
    assert text.startswith("<!doctype html>") and "<html lang=en>" in text
    for words in ("3.000", "1.000", "-2.000", "40 of 40", "71 rows of messages", "name: org/tiny, revision: 0123abcd", "torch 2.13.0", "AutoPeftModelForCausalLM", "learning_rate: 0.001"):
        assert words in said, words
    assert len(page.figures) == 3
    for figure in page.figures:
        assert figure["role"] == "img" and "from" in figure["aria-label"]
    assert "held-out: from 3.000 at 0 to 1.000 at 40" in page.figures[0]["aria-label"]


def test_a_run_that_has_not_finished_has_a_page_too(run_dir):
    (run_dir / "results.json").unlink()
    (run_dir / "metrics.jsonl").unlink()
    assert "Not finished." in report.write_report(run_dir).read_text(encoding="utf-8")


def test_only_a_run_has_a_report(tmp_path):
    with pytest.raises(runs.UserError, match="not a run folder"):
        report.write_report(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"a": 1}))
    with pytest.raises(runs.UserError, match="no field `run`"):
        report.write_report(tmp_path)


def _coordinates(svg):
    return [[tuple(map(float, p.split())) for p in d.split("L")] for d in re.findall(r'd="M([^"]+)"', svg)]


def test_a_chart_shows_its_points_where_they_are():
    svg = report.line_chart({"a": [(0, 0.0), (10, 1.0), (20, float("nan")), (30, 0.5)]}, "steps", "nats", "A caption.")
    (points,) = _coordinates(svg)
    assert len(points) == 3  # the one that is not a number is left out
    (xa, ya), (xb, yb), (xc, yc) = points
    assert xb - xa == pytest.approx((xc - xa) / 3, abs=0.2) and ya > yc > yb  # SVG's y points down
    assert yc - yb == pytest.approx((ya - yb) / 2, abs=0.2)
    assert "no points" in report.line_chart({"a": [(1, float("inf"))]}, "x", "y", "Empty.")
    Page(report.line_chart({"one": [(5, 2.0)]}, "x", "y", "One point."))
    Page(report.line_chart({"flat": [(0, 0.0), (1, 0.0)], EVIL: [(0, 0.0)]}, EVIL, EVIL, EVIL, y_zero=True))


@pytest.mark.parametrize("low,high", [(0, 1), (0, 3.7), (1.98, 2.11), (0, 5e-4), (-3, 4), (0, 123456), (2.0, 2.0001)])
def test_ticks_are_round_and_inside(low, high):
    ticks = report._ticks(low, high)
    assert 2 <= len(ticks) <= 8 and low - 1e-9 <= ticks[0] and ticks[-1] <= high + 1e-9 * max(1, abs(high))
    labels = [report._tick_text(t, ticks[1] - ticks[0]) for t in ticks]
    assert len(set(labels)) == len(labels)
    for t, label in zip(ticks, labels):
        assert float(label) == pytest.approx(t, abs=0.02 * (ticks[1] - ticks[0]))


def test_bars():
    page = Page(report.bar_chart({"knowledge": {"before": 0.1, "after": 1.0}, "<b>": {"before": -0.5}}, "share", "Measures."))
    assert "knowledge: before 0.100, after 1.000" in page.figures[0]["aria-label"]
    widths = [float(v) for (k, v) in page.attrs if k == "width"][2:]  # the first two are the legend's
    assert widths[1] == pytest.approx(10 * widths[0], rel=0.01)


def test_the_demo_says_why_its_second_part_did_not_run(tmp_path):
    for name, after in (("world-pretrain", {"world.knowledge": 0.97, "world.chance": 0.1}), ("world-sft", {"world.knowledge": 0.95, "world.chance": 0.1})):
        (tmp_path / name).mkdir()
        runs.update_results(tmp_path / name, before={"world.knowledge": 0.1, "world.chance": 0.1}, after=after, prompts=[EVIL],
                            answers_before=["x"], answers_after=["y"], references=["z"])
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 9, "loss": 1.0}\n')
    page = Page(write_demo_report(tmp_path, "no package & no hub", 61.0).read_text(encoding="utf-8"))
    said = " ".join(page.text)
    assert "not run" in said and "no package & no hub" in said and "0.970" in said and "0.950" in said
    assert "10.0 % of the time" in said and "known: untrained 0.100, pretrained 0.970, fine-tuned 0.950" in page.figures[0]["aria-label"] and "script" not in page.tags
