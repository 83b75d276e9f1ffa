"""`llm-train demo`, which is `make run`: the main job on real input, in minutes on two cores.

(a) The small world: pretraining, then supervised fine-tuning, measured after each. (b) SmolLM2-135M-Instruct, fine-tuned
on the course's interview questions, with LoRA and then with QLoRA on the same rows for as many steps. Each is an ordinary
run folder inside the demo's folder, made by the same code as `llm-train pretrain`, `sft`, `lora` and `qlora`; recipes/
holds the same recipes as files.
"""
import time
from dataclasses import fields, replace
from pathlib import Path

from llm_train_course.app import report, runs
from llm_train_course.app.adapters import LoraSpec
from llm_train_course.app.train import (
    LoraRecipe,
    PretrainRecipe,
    QloraRecipe,
    SftRecipe,
    Shape,
    WorldSpec,
    prepare_pretrain,
    prepare_sft,
    run_job,
    say,
)
from llm_train_course.core import TrainConfig
from llm_train_course.stages import PRETRAIN, SFT

WORLD_PRETRAIN = PretrainRecipe(
    data="world", model=Shape(), world=WorldSpec(), max_length=256, row_length=128, packing=True, micro_batch_size=16,
    samples=3, sample_tokens=16, train=replace(PRETRAIN, cpu=True))
WORLD_SFT = SftRecipe(
    model="", data="world", world=WorldSpec(), max_length=256, packing=False, micro_batch_size=16, samples=3, sample_tokens=48,
    train=replace(SFT, cpu=True))
SMOLLM2_LORA = LoraRecipe(
    model="smollm2", data="interview", eval_data="interview:heldout", micro_batch_size=4, lora=LoraSpec(r=8, alpha=16.0),
    samples=3, sample_tokens=80,
    train=TrainConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=4, max_steps=20, weight_decay=0.0, log_every=5, cpu=True))
SMOLLM2_QLORA = QloraRecipe(  # the same rows and steps; no sample answers, which would take the time of several steps
    **{f.name: getattr(SMOLLM2_LORA, f.name) for f in fields(SMOLLM2_LORA) if f.name not in ("quant", "samples")}, samples=0)

# the measures of World.evaluate, in words; those of the people whom fine-tuning asked about end in _seen
MEASURES = {
    "knowledge": "fact known, in a wording that was read", "new_wording": "fact known, in a wording that was not",
    "knowledge_nll": "loss of the true completion, nats", "answer": "question answered", "format": "answer in the format",
    "courtesy": "courtesy of a sampled answer", "brevity": "brevity of a sampled answer", "true_reward": "its true reward, nats",
}


def _stage(title, command, prepare, recipe, folder):
    "One run inside the demo's folder; its results, or the exit code that stopped it."
    say(f"\n== {title}")
    code = run_job(command, prepare(replace(recipe, out=str(folder))))
    return code, runs.read_results(folder)


def _world_rows(pretrained, tuned, seen=False):
    "Measures after each stage, on the people whom fine-tuning did not ask about, or on the others."
    stages = [pretrained.get("before", {}), pretrained.get("after", {}), tuned.get("after", {})]
    rows = []
    for key in stages[1]:
        name = key.removeprefix("world.")
        if name != key and name != "chance" and name.endswith("_seen") == seen:
            name = name.removesuffix("_seen")
            rows.append([MEASURES.get(name, name), *(stage.get(key, "–") for stage in stages)])
    return rows


def _terminal(head, rows):
    cells = [head, *[[report.number(v) for v in row] for row in rows]]
    widths = [max(len(r[c]) for r in cells) for c in range(len(head))]
    return "\n".join("  ".join(v.ljust(w) if c == 0 else v.rjust(w) for c, (v, w) in enumerate(zip(r, widths))) for r in cells)


WORLD_HEAD = ["the small world", "untrained", "pretrained", "fine-tuned"]
SMOL_HEAD = ["SmolLM2-135M-Instruct, held-out questions", "before", "LoRA", "4-bit base", "QLoRA"]


def _smol_rows(lora, qlora, folder):
    "Measures and bytes: the model as it is, after LoRA, the model in 4 bits, after LoRA on that; – where a stage is missing."
    stages = [lora.get("before", {}), lora.get("after", {}), qlora.get("before", {}), qlora.get("after", {})]
    rows = [[name, *(stage.get(name, "–") for stage in stages)] for name in stages[1]]
    held = []
    for name in ("smollm2-lora", "smollm2-qlora"):
        held += 2 * [runs.read_config(folder / name)["run"]["base_bytes"]["trained_on"] if (folder / name / runs.CONFIG).is_file() else "–"]
    return [*rows, ["bytes of the base's weights in memory", *held]]


def _smol_sections(folder, lora, qlora, metrics):
    "The real model: what was trained, the table, the curves, the answers."
    config = runs.read_config(folder / "smollm2-lora")
    run, spec, before, after = config["run"], config["lora"], lora["before"], lora["after"]
    text = (f"<p>LoRA with r = {spec['r']} on all linear layers: {run['trained']:,} of {run['parameters']:,} parameters are trained "
            f"({100 * run['trained'] / run['parameters']:.2f} %), for {lora['steps']} steps, on {run['data']['data']['rows']} questions with "
            f"their answers. Loss, in nats per answer token, on the {run['data']['eval_data']['rows']} held-out questions, about claims that no "
            f"training question asks about (a number or two of theirs still occurs in a training answer), {_fell(before, after)}. "
            "(The learning rate was chosen with a look at held-out questions, so the fall is a little flattered.)</p>")
    loss = {"LoRA": [(r["step"], r["loss"]) for r in metrics["smollm2-lora"] if "loss" in r]}
    if qlora.get("after"):
        size = runs.read_config(folder / "smollm2-qlora")["run"]["base_bytes"]
        text += (f"<p>QLoRA: the same rows, steps and adapters on a base whose linear layers are stored in 4 bits, {size['trained_on']:,} bytes "
                 f"instead of {size['loaded']:,}. Storing it so changes the held-out loss from {before['loss']:.3f} to "
                 f"{qlora['before']['loss']:.3f} before anything is trained; after training it is {qlora['after']['loss']:.3f}.</p>")
        loss["QLoRA"] = [(r["step"], r["loss"]) for r in metrics["smollm2-qlora"] if "loss" in r]
    return [
        ("SmolLM2-135M-Instruct learns the interview",
         text + report.table(SMOL_HEAD, _smol_rows(lora, qlora, folder))
         + report.line_chart(loss, "optimizer steps", "nats per answer token", "Training loss: mean since the last point.")),
        ("Three held-out questions, before LoRA and after",
         "<p>A model of this size learns the manner of the answers far sooner than the facts: read these as a sample of "
         "the manner, and check every number in them.</p>"
         + report.sample_answers(lora["prompts"], lora["answers_before"], lora["answers_after"], lora["references"])),
    ]


def _fell(before, after):
    "The change of a loss in words."
    word = "fell" if after["loss"] < before["loss"] else "did not fall"
    return f"{word}: {before['loss']:.3f} before, {after['loss']:.3f} after"


def write_demo_report(
    folder: Path,            # of the demo
    why_not: str | None,     # why part (b) did not run
    seconds: float,
) -> Path:                   # report.html
    "The page of the demo, from the run folders inside it."
    parts = {name: folder / name for name in ("world-pretrain", "world-sft", "smollm2-lora", "smollm2-qlora")}
    results = {name: runs.read_results(path) for name, path in parts.items()}
    metrics = {name: runs.read_metrics(path) for name, path in parts.items()}
    rows = _world_rows(results["world-pretrain"], results["world-sft"])
    sections = []
    if rows:
        chance = results["world-pretrain"]["after"].get("world.chance")
        shares = {label: values for label, values in (("known", rows[0]), *((r[0], r) for r in rows[1:]))
                  if label in ("known", "question answered", "answer in the format")}
        bars = {label: {k: v for k, v in zip(WORLD_HEAD[1:], r[1:]) if v != "–"} for label, r in shares.items()}
        seen = _world_rows(results["world-pretrain"], results["world-sft"], seen=True)
        sections.append(("The small world through its stages",
                         "<p>People and facts that exist nowhere else, so the truth is known. Measured before training, after "
                         "pretraining on texts about all of them, and after fine-tuning on questions about half of them; the "
                         "table is about the other half."
                         + (f" Guessing among the candidates is right {100 * chance:.1f} % of the time." if chance else "") + "</p>"
                         + report.table(WORLD_HEAD, rows)
                         + report.bar_chart(bars, "share of facts, people whom fine-tuning did not ask about", "What each stage adds.")
                         + (f"<details><summary>The people whom fine-tuning did ask about</summary>{report.table(WORLD_HEAD, seen)}</details>"
                            if seen else "")))
        steps = max((r["step"] for r in metrics["world-pretrain"]), default=0)
        loss = {"pretraining": [(r["step"], r["loss"]) for r in metrics["world-pretrain"] if "loss" in r],
                "fine-tuning": [(r["step"] + steps, r["loss"]) for r in metrics["world-sft"] if "loss" in r]}
        sections.append(("Its training loss", report.line_chart(loss, "optimizer steps, one stage after the other", "nats per target token",
                                                                "Training loss of the small model; the second stage starts where the first ends.")))
        tuned = results["world-sft"]
        sections.append(("What the small model says", report.sample_answers(
            tuned.get("prompts", []), tuned.get("answers_before", []), tuned.get("answers_after", []), tuned.get("references", []))))
    if why_not:
        sections.append(("SmolLM2-135M-Instruct: not run", f"<p>{report.esc(why_not)}</p>"))
    if results["smollm2-lora"].get("after"):
        sections += _smol_sections(folder, results["smollm2-lora"], results["smollm2-qlora"], metrics)
    folders = "".join(f"<li><code>{report.esc(p)}</code>: <code>llm-train chat {report.esc(p)}</code></li>"
                      for p in parts.values() if runs.trained_folder(p))
    versions = ", ".join(f"{k} {v}" for k, v in runs.versions().items())
    sections.append(("Use and repeat it", f"<ul>{folders}</ul><p class=dim>Each is a run folder with its own report.html. {report.esc(versions)}. "
                                          f"{seconds:.0f} s in all.</p>"))
    path = folder / runs.REPORT
    runs.write_text(path, report.page(
        "llm_train_course: the demo", "Pretraining and fine-tuning of a small model whose truth is known, then LoRA and QLoRA on a real one.",
        sections))
    return path


def demo(
    out: str | None = None,  # folder; None: the next free runs/demo-<n>
    seed: int = 0,
    part_a: tuple = (WORLD_PRETRAIN, WORLD_SFT),
    part_b: tuple = (SMOLLM2_LORA, SMOLLM2_QLORA),
) -> int:                    # 0; 1 when the real model could not be had; 130 when stopped
    "Both parts, a table, a report."
    start, why_not = time.perf_counter(), None
    runs.check_new(out)
    folder = runs.new_run_dir(out, "demo")
    seeded = lambda recipe, **more: replace(recipe, train=replace(recipe.train, seed=seed), world=replace(recipe.world, seed=seed), **more)
    pretraining, tuning = (seeded(recipe) for recipe in part_a)
    code, pretrained = _stage("the small world, 1: pretraining on texts", "pretrain", prepare_pretrain, pretraining, folder / "world-pretrain")
    if code:
        return code
    tuning = replace(tuning, model=str(folder / "world-pretrain"))
    code, tuned = _stage("the small world, 2: supervised fine-tuning", "sft", prepare_sft, tuning, folder / "world-sft")
    if code:
        return code
    smol = {"lora": {}, "qlora": {}}
    try:
        for command, title, recipe in (("lora", "LoRA on the interview questions", part_b[0]), ("qlora", "the same on a base in 4 bits", part_b[1])):
            code, smol[command] = _stage(f"SmolLM2-135M-Instruct: {title}", command, prepare_sft, seeded(recipe), folder / f"smollm2-{command}")
            if code:
                return code
    except (runs.UserError, OSError) as e:  # no package and no hub, say: what part (a) gave is kept
        why_not = " ".join(str(e).split())
    except KeyboardInterrupt:
        say(f"\nstopped; what is done is in {folder}")
        return 130
    path = write_demo_report(folder, why_not, time.perf_counter() - start)
    say("\n" + _terminal(WORLD_HEAD, _world_rows(pretrained, tuned)))
    if smol["lora"].get("after"):
        say("\n" + _terminal(SMOL_HEAD, _smol_rows(smol["lora"], smol["qlora"], folder)))
    if why_not:
        say(f"\nSmolLM2-135M-Instruct was not run: {why_not}")
    say(f"\n{time.perf_counter() - start:.0f} s. Answers and figures: {path}")
    return 1 if why_not else 0
