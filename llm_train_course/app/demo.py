"""`llm-train demo`, which is `make run`: the main job on real input, in minutes on two cores.

(a) The small world: pretraining, then supervised fine-tuning, measured after each. (b) SmolLM2-135M-Instruct, fine-tuned
with LoRA on the course's interview questions. Each is an ordinary run folder inside the demo's folder, made by the same
code as `llm-train pretrain` and `llm-train sft`; recipes/ holds the same recipes as files.
"""
import time
from dataclasses import replace
from pathlib import Path

from llm_train_course.app import report, runs
from llm_train_course.app.train import LoraSpec, PretrainRecipe, SftRecipe, Shape, WorldSpec, prepare_pretrain, prepare_sft, run_job, say
from llm_train_course.core import TrainConfig
from llm_train_course.stages import PRETRAIN, SFT

WORLD_PRETRAIN = PretrainRecipe(
    data="world", model=Shape(), world=WorldSpec(), max_length=256, row_length=128, packing=True, micro_batch_size=16,
    samples=3, sample_tokens=16, train=replace(PRETRAIN, cpu=True))
WORLD_SFT = SftRecipe(
    model="", data="world", world=WorldSpec(), max_length=256, packing=False, micro_batch_size=16, samples=3, sample_tokens=48,
    train=replace(SFT, cpu=True))
SMOLLM2_SFT = SftRecipe(
    model="smollm2", data="interview", eval_data="interview:heldout", micro_batch_size=4, lora=LoraSpec(r=8, alpha=16.0),
    samples=3, sample_tokens=80,
    train=TrainConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=4, max_steps=40, weight_decay=0.0, log_every=5, cpu=True))

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
SMOL_HEAD = ["SmolLM2-135M-Instruct, held-out questions", "before", "after"]


def write_demo_report(
    folder: Path,            # of the demo
    why_not: str | None,     # why part (b) did not run
    seconds: float,
) -> Path:                   # report.html
    "The page of the demo, from the run folders inside it."
    parts = {name: folder / name for name in ("world-pretrain", "world-sft", "smollm2-sft")}
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
    smol = results["smollm2-sft"]
    if why_not:
        sections.append(("SmolLM2-135M-Instruct: not run", f"<p>{report.esc(why_not)}</p>"))
    elif smol.get("after"):
        before, after = smol["before"], smol["after"]
        held = [(0, before["loss"]), (smol["steps"], after["loss"])]
        config = runs.read_config(parts["smollm2-sft"])
        run, lora = config["run"], config["lora"]
        word = "fell" if after["loss"] < before["loss"] else "did not fall"
        sections += [
            ("SmolLM2-135M-Instruct learns the interview",
             f"<p>LoRA with r = {lora['r']} on all linear layers: {run['trained']:,} of {run['parameters']:,} parameters are trained, "
             f"for {smol['steps']} steps, on {run['data']['data']['rows']} questions with their answers. Loss on the "
             f"{run['data']['eval_data']['rows']} held-out questions, about claims that no training question asks about (a number "
             f"or two of theirs still occurs in a training answer), {word}: {before['loss']:.3f} before, {after['loss']:.3f} after, "
             "in nats per answer token. (Learning rate and steps of this recipe were chosen with a look at held-out questions, "
             "so the fall is a little flattered.)</p>"
             + report.before_after(before, after) + report.training_figures(metrics["smollm2-sft"], held)),
            ("Three held-out questions, before and after",
             "<p>A model of this size learns the manner of the answers far sooner than the facts: read these as a sample of "
             "the manner, and check every number in them.</p>"
             + report.sample_answers(smol["prompts"], smol["answers_before"], smol["answers_after"], smol["references"])),
        ]
    folders = "".join(f"<li><code>{report.esc(p)}</code>: <code>llm-train chat {report.esc(p)}</code></li>"
                      for p in parts.values() if runs.trained_folder(p))
    versions = ", ".join(f"{k} {v}" for k, v in runs.versions().items())
    sections.append(("Use and repeat it", f"<ul>{folders}</ul><p class=dim>Each is a run folder with its own report.html. {report.esc(versions)}. "
                                          f"{seconds:.0f} s in all.</p>"))
    path = folder / runs.REPORT
    runs.write_text(path, report.page(
        "llm_train_course: the demo", "Pretraining and fine-tuning of a small model whose truth is known, then LoRA on a real one.", sections))
    return path


def demo(
    out: str | None = None,  # folder; None: the next free runs/demo-<n>
    seed: int = 0,
    part_a: tuple = (WORLD_PRETRAIN, WORLD_SFT),
    part_b: SftRecipe = SMOLLM2_SFT,
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
    smol = {}
    try:
        code, smol = _stage("SmolLM2-135M-Instruct: LoRA on the interview questions", "sft", prepare_sft, seeded(part_b), folder / "smollm2-sft")
        if code:
            return code
    except (runs.UserError, OSError) as e:  # no package and no hub, say: what part (a) gave is kept
        why_not = " ".join(str(e).split())
    except KeyboardInterrupt:
        say(f"\nstopped; the small world is in {folder}")
        return 130
    path = write_demo_report(folder, why_not, time.perf_counter() - start)
    say("\n" + _terminal(WORLD_HEAD, _world_rows(pretrained, tuned)))
    if why_not:
        say(f"\nSmolLM2-135M-Instruct was not run: {why_not}")
    else:
        say("\n" + _terminal(SMOL_HEAD, [[n, v, smol["after"][n]] for n, v in smol["before"].items()]))
    say(f"\n{time.perf_counter() - start:.0f} s. Answers and figures: {path}")
    return 1 if why_not else 0
