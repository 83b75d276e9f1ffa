"""report.html: what a run was, what came of it, and how to use it. One file, no remote resources, readable on a phone.

Figures are SVG drawn here, in colours of the page's own scheme (light or dark). All text from data, models and
recipes is escaped.
"""
import html
import math
import re
from pathlib import Path

import yaml

from llm_train_course.app import runs

CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2024;--dim:#5b6470;--line:#d9dee4;--card:#f5f7f9;--a:#0b62c4;--b:#b4490a;--c:#2a7d3f}
@media (prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e6e9ec;--dim:#a0a9b4;--line:#363d45;--card:#1d2228;--a:#6cb0ff;--b:#ffa066;--c:#7ed495}}
*{box-sizing:border-box}body{margin:0 auto;max-width:60rem;padding:1.2rem;background:var(--bg);color:var(--fg);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:.2rem 0 .6rem}h2{font-size:1.2rem;margin:2rem 0 .6rem;border-bottom:1px solid var(--line);padding-bottom:.2rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}p.dim,figcaption,.dim{color:var(--dim)}figcaption{font-size:.9rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;min-width:min(100%,24rem);font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line);vertical-align:top}td.n,th.n{text-align:right}td:first-child{white-space:nowrap}
figure{margin:1rem 0}.figs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:.6rem 1.4rem}
svg{width:100%;max-width:36rem;height:auto;display:block}svg text{fill:var(--dim);font-size:12px}.grid{stroke:var(--line)}
.s0{stroke:var(--a);fill:none}.s1{stroke:var(--b);fill:none}.s2{stroke:var(--c);fill:none}.d0{fill:var(--a)}.d1{fill:var(--b)}.d2{fill:var(--c)}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.7rem;overflow-x:auto;font-size:.85rem;line-height:1.45}
.said{white-space:pre-wrap;background:var(--card);border-left:3px solid var(--line);padding:.4rem .7rem;margin:.3rem 0}.said b{display:block;font-size:.8rem;color:var(--dim);font-weight:600}
.said.after{border-color:var(--a)}.said.ref{border-color:var(--c)}summary{cursor:pointer}
"""


def esc(value) -> str:
    "Text as HTML text."
    return html.escape(str(value), quote=True)


def number(value) -> str:
    "A number for a table."
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3g}" if value and (abs(value) >= 1e5 or abs(value) < 1e-3) else f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def table(
    head: list[str],
    rows: list[list],
) -> str:
    "An HTML table; numbers stand right."
    numeric = [all(isinstance(r[c], (int, float)) or r[c] in ("", "–") for r in rows) and bool(rows) for c in range(len(head))]
    cell = lambda tag, c, v: f"<{tag}{' class=n' if numeric[c] else ''}>{esc(number(v))}</{tag}>"
    body = "".join("<tr>" + "".join(cell("td", c, v) for c, v in enumerate(r)) + "</tr>" for r in rows)
    return ("<div class=scroll><table><thead><tr>" + "".join(cell("th", c, h) for c, h in enumerate(head))
            + f"</tr></thead><tbody>{body}</tbody></table></div>")


def _ticks(low, high, n=4):
    step = (high - low) / n
    mag = 10 ** math.floor(math.log10(step))
    step = next(m * mag for m in (1, 2, 2.5, 5, 10) if m * mag >= step * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, int(math.floor(high / step + 1e-9)) + 1)]


def _tick_text(value, step):
    if value == 0:
        return "0"
    if abs(value) >= 1e4 or abs(value) < 1e-3 or step < 1e-3 and abs(value) < 1e-2:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9) + (step / 10 ** math.floor(math.log10(step)) % 1 > 0.01))}f}"


def line_chart(
    series: dict[str, list[tuple[float, float]]],  # name -> (x, y) points; points that are not finite are left out
    x_label: str,
    y_label: str,
    caption: str,
    y_zero: bool = False,                          # the axis starts at 0
) -> str:
    "A figure as inline SVG, with a text alternative that holds first and last values."
    series = {name: pts for name, points in series.items()
              if (pts := [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])}
    if not series:
        return f"<figure><figcaption>{esc(caption)} (no points)</figcaption></figure>"
    xs, ys = ([p[i] for pts in series.values() for p in pts] for i in (0, 1))
    x0, x1, y0, y1 = min(xs), max(xs), 0.0 if y_zero else min(ys), max(ys)
    x1 = x1 if x1 > x0 else x0 + 1
    pad = (y1 - y0) * 0.05 or abs(y1) * 0.1 or 1.0
    y0, y1 = (y0 if y_zero else y0 - pad), y1 + pad
    width, height, left, right, top, bottom = 460, 280, 62, 14, 26 if len(series) > 1 else 12, 42
    sx = lambda x: left + (x - x0) / (x1 - x0) * (width - left - right)
    sy = lambda y: height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)
    parts, yt, xt = [], _ticks(y0, y1), [t for t in _ticks(x0, x1) if t == int(t) or x1 - x0 < 4]
    for t in yt:
        parts.append(f'<line class=grid x1={left} x2={width - right} y1={sy(t):.1f} y2={sy(t):.1f} />'
                     f'<text x={left - 6} y={sy(t) + 4:.1f} text-anchor=end>{_tick_text(t, yt[1] - yt[0] if len(yt) > 1 else 1)}</text>')
    for t in xt:
        parts.append(f'<text x={sx(t):.1f} y={height - bottom + 17} text-anchor=middle>{_tick_text(t, xt[1] - xt[0] if len(xt) > 1 else 1)}</text>')
    parts.append(f'<line class=grid x1={left} x2={width - right} y1={height - bottom} y2={height - bottom} />')
    for n, (name, pts) in enumerate(series.items()):
        c = n % 3
        if len(pts) > 1:
            path = "L".join(f"{sx(x):.1f} {sy(y):.1f}" for x, y in pts)
            parts.append(f'<path class=s{c} stroke-width=2 stroke-linejoin=round d="M{path}" />')
        if len(pts) <= 12:
            parts += [f'<circle class=d{c} r=3.5 cx={sx(x):.1f} cy={sy(y):.1f} />' for x, y in pts]
        if len(series) > 1:
            at = left + n * (width - left - right) / len(series)
            parts.append(f'<line class=s{c} stroke-width=3 x1={at:.0f} x2={at + 18:.0f} y1=12 y2=12 /><text x={at + 24:.0f} y=16>{esc(name)}</text>')
    parts.append(f'<text x={(left + width - right) / 2:.0f} y={height - 6} text-anchor=middle>{esc(x_label)}</text>')
    parts.append(f'<text transform="translate(13 {(top + height - bottom) / 2:.0f}) rotate(-90)" text-anchor=middle>{esc(y_label)}</text>')
    alt = f"{caption} " + "; ".join(
        f"{name}: from {number(float(pts[0][1]))} at {number(pts[0][0])} to {number(float(pts[-1][1]))} at {number(pts[-1][0])}"
        for name, pts in series.items())
    return (f'<figure><svg viewBox="0 0 {width} {height}" role=img aria-label="{esc(alt)}"><title>{esc(alt)}</title>{"".join(parts)}</svg>'
            f"<figcaption>{esc(caption)}</figcaption></figure>")


def bar_chart(
    groups: dict[str, dict[str, float]],  # label -> {series: value}
    y_label: str,
    caption: str,
) -> str:
    "Horizontal bars, one group a measure."
    names = list(dict.fromkeys(n for g in groups.values() for n in g))
    finite = [v for g in groups.values() for v in g.values() if math.isfinite(v)]
    low, top = min([0.0, *finite]), max([0.0, *finite])
    top = top if top > low else low + 1.0
    width, left, right, bar, gap = 460, 150, 56, 14, 12
    height = 26 + sum(len(g) * bar + gap for g in groups.values()) + 22
    scale = lambda v: left + (v - low) / (top - low) * (width - left - right)
    parts, y = [], 26
    for n, name in enumerate(names):
        parts.append(f'<rect class=d{n % 3} x={10 + n * 145} y=6 width=12 height=12 /><text x={28 + n * 145} y=16>{esc(name)}</text>')
    for label, values in groups.items():
        middle = y + len(values) * bar / 2 + 4
        parts.append(f'<text x={left - 8} y={middle:.0f} text-anchor=end>{esc(label)}</text>')
        for name, value in values.items():
            a, b = sorted((scale(0.0), scale(value)))
            parts.append(f'<rect class=d{names.index(name) % 3} x={a:.1f} y={y + 1} width={max(b - a, 0.5):.1f} height={bar - 2} />'
                         f'<text x={scale(max(value, 0)) + 5:.1f} y={y + bar - 3}>{number(float(value))}</text>')
            y += bar
        y += gap
    parts.append(f'<text x={(left + width - right) / 2:.0f} y={height - 4} text-anchor=middle>{esc(y_label)}</text>')
    alt = f"{caption} " + "; ".join(f"{g}: " + ", ".join(f"{n} {number(float(v))}" for n, v in vs.items()) for g, vs in groups.items())
    return (f'<figure><svg viewBox="0 0 {width} {height}" role=img aria-label="{esc(alt)}"><title>{esc(alt)}</title>{"".join(parts)}</svg>'
            f"<figcaption>{esc(caption)}</figcaption></figure>")


# what commands other than fine-tuning log: names in metrics.jsonl, the axis, the caption
_FIGURES = (
    ({"reward": "reward"}, "nats an answer", "Reward of the answers of an iteration, sampled before it trained on them."),
    ({"kl": "KL", "kl_k3": "KL, estimated by k3"}, "nats an answer", "KL divergence of the policy from the reference."),
    ({"margin": "margin"}, "nats", "Margin of the chosen answers over the rejected."),
    ({"accuracy": "accuracy"}, "share of the pairs", "Pairs in which the chosen answer is ahead."),
    ({"logps_chosen": "chosen", "logps_rejected": "rejected"}, "nats an answer", "Log-probability of the answers."),
    ({"length": "length"}, "tokens", "Mean length of the sampled answers."),
    ({"entropy": "entropy"}, "nats a token", "Entropy of the policy, estimated on its samples."),
    ({"explained_variance": "explained"}, "share", "Share of the returns' variance that the value explains."),
    ({"flat_groups": "flat"}, "share of the groups", "Groups whose answers all got one reward, and teach nothing."),
    ({"divergence": "divergence"}, "nats a token", "Divergence of student and teacher."),
    ({"rollout_tokens": "tokens"}, "tokens", "Mean length of what was written."),
    ({"update_ratio": "update"}, "share of the weights", "Length of a step over that of the weights."),
    ({"max_logit": "largest"}, "attention logit", "Largest attention logit."),
    ({"attn_entropy": "mean of layers", "attn_entropy_min": "least"}, "share of the largest possible", "Entropy of attention."),
    ({"dead_units": "dead"}, "share of the units", "Units of the MLPs that stay silent."),
)


def refusals(
    rows: list[dict],  # of metrics.jsonl
) -> str:
    "The updates that a guard refused, and how far each group of weights moved in the last step that was watched."
    refused = [[r["step"], *r["refused"], r.get("undone", 0), r["why"]] for r in rows if "refused" in r]
    moved = next((r for r in reversed(rows) if "update_ratio" in r), {})
    by_number = lambda row: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", row[0])]  # layers.2 before layers.10
    groups = sorted(([key.removeprefix("update_ratio."), value] for key, value in moved.items() if key.startswith("update_ratio.")), key=by_number)
    return ((f"<h3>Refused</h3>{table(['step', 'epoch', 'global batch', 'steps undone', 'why'], refused)}" if refused else "")
            + (f"<h3>Update over weights, by group, at step {moved['step']}</h3>{table(['group', 'ratio'], groups)}" if groups else ""))


def training_figures(
    rows: list[dict],           # of metrics.jsonl
    eval_points: list = (),     # (step, loss) measured outside of the loop
    unit: str = "a target token",  # what the loss is a mean over
) -> str:
    "Loss, learning rate and gradient norm over the steps, and what else was logged."
    points = lambda key: [(r["step"], r[key]) for r in rows if key in r]
    held = sorted(dict([*eval_points, *points("eval_loss")]).items())
    loss = {"training": points("loss"), **({"held-out": held} if held else {})}
    figures = [line_chart(loss, "optimizer steps", f"nats {unit}", "Loss: mean since the last point, and on held-out rows."
                          if held else "Training loss: mean since the last point."),
               line_chart({"lr": points("lr")}, "optimizer steps", "learning rate", "Learning rate.", y_zero=True),
               line_chart({"norm": points("grad_norm")}, "optimizer steps", "gradient norm", "Gradient norm before clipping.", y_zero=True)]
    for names, axis, caption in _FIGURES:
        series = {name: pts for key, name in names.items() if (pts := points(key))}
        if series:
            figures.append(line_chart(series, "optimizer steps", axis, caption))
    return f"<div class=figs>{''.join(figures)}</div>"


def prompt_text(prompt) -> str:
    "A prompt as it is shown: the text, or the turns with their roles."
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def sample_answers(prompts: list, before: list, after: list, references: list = ()) -> str:
    "What the model says to the same prompts before and after."
    said = lambda kind, label, text: f'<div class="said {kind}"><b>{label}</b>{esc(text) or "<i>(nothing)</i>"}</div>'
    out = []
    for n, prompt in enumerate(prompts):
        out.append(f"<h3>{esc(prompt_text(prompt))}</h3>"
                   + (said("before", "before", before[n]) if n < len(before) else "")
                   + (said("after", "after", after[n]) if n < len(after) else "")
                   + (said("ref", "in the data", references[n]) if n < len(references) and references[n] else ""))
    return "".join(out)


def page(
    title: str,
    lead: str,                         # one paragraph, plain text
    sections: list[tuple[str, str]],   # heading (plain text), body (HTML)
) -> str:
    "The whole file."
    body = "".join(f"<section><h2>{esc(head)}</h2>{content}</section>" for head, content in sections if content)
    return (f'<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">'
            f"<title>{esc(title)}</title><style>{CSS}</style></head><body><header><h1>{esc(title)}</h1><p class=dim>{esc(lead)}</p></header>"
            f"<main>{body}</main></body></html>\n")


def before_after(before: dict, after: dict, teacher: dict | None = None) -> str:
    "Table of measures; what there is after training alone has no before."
    rows = [[name, before[name], after[name], after[name] - before[name]] if name in before else [name, "–", after[name], "–"] for name in after]
    if not teacher:
        return table(["measure", "before", "after", "change"], rows) if rows else ""
    return table(["measure", "before", "after", "change", "teacher"], [[*r, teacher.get(r[0], "–")] for r in rows]) if rows else ""


def _how_to_load(run_dir, folder, config):
    if folder is None:
        return ""
    if runs.is_reward_model(folder):
        code = ("from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
                f"model = AutoModelForSequenceClassification.from_pretrained({f'{run_dir}/{folder.name}'!r})  # logits[:, 0] is the score\n"
                f"tokenizer = AutoTokenizer.from_pretrained({f'{run_dir}/{folder.name}'!r})")
        return f"<pre>{esc(code)}</pre><pre>{esc(f'llm-train ppo --reward_model {run_dir} --model ... --data ...')}</pre>"
    shown, base, quant = f"{run_dir}/{folder.name}", run_dir / runs.BASE, config.get("quant")
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({shown!r})"
    if folder.name == "adapter" and quant and quant["blocksize"] != 64:  # transformers knows blocks of 64 only
        code = f"from llm_train_course.app.runs import load_any\n\nmodel, tokenizer = load_any({shown!r})"
    elif folder.name == "adapter" and (quant or base.is_dir()):
        name = f"{run_dir}/{runs.BASE}" if base.is_dir() else (config.get("run_model") or {}).get("name") or config.get("model")
        more, what = "", "  # an earlier adapter is merged into it" if base.is_dir() else ""
        head = "import torch\n" if quant else ""
        names = "AutoModelForCausalLM, AutoTokenizer"
        if quant:
            dtype = {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[config.get("dtype", "fp32")]
            names += ", BitsAndBytesConfig"
            more = (f", dtype={dtype}, quantization_config=BitsAndBytesConfig(\n    load_in_4bit=True, bnb_4bit_quant_type={quant['quant_type']!r}, "
                    f"bnb_4bit_use_double_quant={quant['double_quant']}, bnb_4bit_compute_dtype={dtype})")
        code = (f"{head}from peft import PeftModel\nfrom transformers import {names}\n\n"
                f"base = AutoModelForCausalLM.from_pretrained({name!r}{more}){what}\n"
                f"model = PeftModel.from_pretrained(base, {shown!r})\n{tokenizer}")
    elif folder.name == "adapter":
        code = ("from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
                f"model = AutoPeftModelForCausalLM.from_pretrained({shown!r})  # the base model is named in adapter_config.json\n"
                f"{tokenizer}")
    else:
        code = ("from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                f"model = AutoModelForCausalLM.from_pretrained({shown!r})\n{tokenizer}")
    words = f"llm-train chat {run_dir}"
    if folder.name == "adapter":
        words += f"\nllm-train merge {run_dir}  # a model folder that transformers loads alone"
    return f"<pre>{esc(code)}</pre><pre>{esc(words)}</pre>"


def write_report(
    run_dir: str | Path,
) -> Path:  # of report.html
    "report.html of a run folder, from what lies in it; it can be written again at any time."
    run_dir = Path(run_dir)
    config, metrics, results = runs.read_config(run_dir), runs.read_metrics(run_dir), runs.read_results(run_dir)
    run = config.pop("run")
    before, after = results.get("before", {}), results.get("after", {})
    last = max((r["step"] for r in metrics), default=0)
    held = [(step, part["loss"]) for step, part in ((0, before), (results.get("steps", last), after)) if "loss" in part]
    facts = [["command", f"llm-train {run.get('command', '?')}"], ["steps", f"{results.get('steps', last):,} of {run.get('steps', 0):,}"],
             ["parameters", f"{run.get('parameters', 0):,}, trained {run.get('trained', 0):,}"], ["device", run.get("device", "?")],
             ["time", f"{results.get('seconds', 0):.0f} s"]]
    if run.get("adapted_layers"):
        lora, size, quant = config["lora"], run["base_bytes"], config.get("quant")
        scale = "alpha / sqrt(r)" if lora.get("use_rslora") else "alpha / r"
        facts[2][1] += f" ({100 * run['trained'] / run['parameters']:.2f} %)"
        facts.append(["adapters", f"r {lora['r']}, alpha {lora['alpha']:g}, scaled by {scale}, on {run['adapted_layers']} layers"])
        facts.append(["base", f"{size['trained_on']:,} bytes of frozen weights" + (
            f" in 4 bits ({quant['quant_type']}, blocks of {quant['blocksize']}{', constants quantized too' * quant['double_quant']}), "
            f"{size['loaded']:,} before" if quant else "")])
    if run.get("teacher"):
        t = run["teacher"]
        facts.append(["teacher", f"{t['name']}: {t['parameters']:,} parameters in {t['bytes']:,} bytes, {t['layers']} layers; "
                                 f"the student has {run.get('student_layers')}"])
    for name, info in (run.get("rewards") or {}).items():
        facts.append([f"reward {name}", info["name"] + (f", sha256 {info['sha256'][:12]}…" if info.get("sha256") else "")])
    if run.get("model"):
        facts.append(["weights", ", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in run["model"].items())])
    for name, info in (run.get("data") or {}).items():
        facts.append([name, f"{info['source']}: {info['rows']:,} rows of {info['kind'].replace('_', '/')}, sha256 {info['sha256'][:12]}…"])
    facts.append(["versions", ", ".join(f"{k} {v}" for k, v in run.get("versions", {}).items())])
    model = config.get("model", f"{config.get('teacher')} into {config.get('student') or 'a student made of its layers'}")
    name = model if isinstance(model, str) else "a small Llama from scratch"
    lead = f"{name} on {config.get('data')}" + (f", held out: {config['eval_data']}" if config.get("eval_data") else "") + "."
    sections = [
        ("Result", before_after(before, after, results.get("teacher")) or ("" if after else "<p>Not finished.</p>")),
        ("Training", training_figures(metrics, held, run.get("unit", "a target token")) + refusals(metrics) if metrics else ""),
        ("Answers", sample_answers(results.get("prompts", []), results.get("answers_before", []), results.get("answers_after", []),
                                   results.get("references", []))),
        ("What was run", table(["", ""], facts)),
        ("Use it", _how_to_load(run_dir, runs.trained_folder(run_dir), {**config, "run_model": run.get("model")})),
        ("Recipe", f"<details><summary>config.yaml</summary><pre>{esc(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))}</pre></details>"),
    ]
    path = run_dir / runs.REPORT
    runs.write_text(path, page(f"{run.get('command', 'run')}: {run_dir.name}", lead, sections))
    return path
