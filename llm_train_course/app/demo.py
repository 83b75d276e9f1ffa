"""`llm-train demo`, which is `make run`: the main job on real input, in minutes on two cores.

(a) The small world: pretraining, supervised fine-tuning, then from there a reward model and PPO against it, and DPO on the
same comparisons, measured after each. (b) SmolLM2-135M-Instruct, fine-tuned on the course's interview questions, with LoRA
and then with QLoRA on the same rows for as many steps; and DPO on the course's claims, the accurate statement over the
article's. Each is an ordinary run folder inside the demo's folder, made by the same code as `llm-train pretrain`, `sft`,
`rm` and so on; recipes/ holds the same recipes as files.
"""
import time
from dataclasses import fields, replace
from pathlib import Path

from llm_train_course.app import report, runs
from llm_train_course.app.adapters import LoraSpec
from llm_train_course.app.preferences import (
    DpoRecipe,
    PpoRecipe,
    RewardRecipe,
    SamplingSpec,
    prepare_dpo,
    prepare_ppo,
    prepare_rm,
)
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
_AFTER = {"weight_decay": 0.0, "cpu": True}  # of all that follows fine-tuning
WORLD_RM = RewardRecipe(
    model="", data="world", micro_batch_size=16, train=TrainConfig(learning_rate=1e-3, schedule="linear", warmup_steps=5, **_AFTER))
WORLD_PPO = PpoRecipe(
    model="", data="world", reward_model="", micro_batch_size=16, kl_coef=0.2, sample_tokens=48,
    sampling=SamplingSpec(prompts_per_iteration=64, max_new_tokens=64, passes=2),
    train=TrainConfig(learning_rate=3e-4, schedule="constant", epochs=12, **_AFTER))
WORLD_DPO = DpoRecipe(
    model="", data="world", micro_batch_size=16, beta=0.1, sample_tokens=48,
    train=TrainConfig(learning_rate=1e-4, schedule="linear", warmup_steps=5, **_AFTER))
SMOLLM2_DPO = DpoRecipe(
    model="smollm2", data="claims", eval_data="claims:heldout", micro_batch_size=4, beta=0.1, lora=LoraSpec(r=8, alpha=16.0), samples=0,
    train=TrainConfig(learning_rate=1e-4, schedule="linear", warmup_steps=2, max_steps=8, log_every=2, **_AFTER))
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


def _world_rows(results, seen=False):
    "Measures after each stage, on the people whom fine-tuning did not ask about, or on the others."
    first = results.get("world-pretrain", {})
    stages = [first.get("before", {}), *(results.get(name, {}).get("after", {}) for name in WORLD_STAGES)]
    rows = []
    for key in stages[1]:
        name = key.removeprefix("world.")
        if name != key and name != "chance" and name.endswith("_seen") == seen:
            name = name.removesuffix("_seen")
            rows.append([MEASURES.get(name, name), *(stage.get(key, "–") for stage in stages)])
    kept = [0, 1, *(n + 2 for n, stage in enumerate(stages[1:], 0) if stage)]  # no column for what was not run
    return [[r[n] for n in kept] for r in rows]


def _world_head(results):
    return ["the small world", "untrained", *(title for name, title in WORLD_STAGES.items() if results.get(name, {}).get("after"))]


def _terminal(head, rows):
    cells = [head, *[[report.number(v) for v in row] for row in rows]]
    widths = [max(len(r[c]) for r in cells) for c in range(len(head))]
    return "\n".join("  ".join(v.ljust(w) if c == 0 else v.rjust(w) for c, (v, w) in enumerate(zip(r, widths))) for r in cells)


WORLD_STAGES = {"world-pretrain": "pretrained", "world-sft": "fine-tuned", "world-ppo": "PPO", "world-dpo": "DPO"}
PAIRS_HEAD = ["SmolLM2-135M-Instruct, held-out claims", "before", "DPO"]
PAIR_MEASURES = {"loss": "loss, nats a pair", "accuracy": "accurate statement ahead of the article's", "margin": "by, nats",
                 "logps_chosen": "log p of the accurate statement", "logps_rejected": "log p of the article's"}
SMOL_HEAD = ["SmolLM2-135M-Instruct, held-out questions", "before", "LoRA", "4-bit base", "QLoRA"]


def _smol_rows(lora, qlora, folder):
    "Measures and bytes: the model as it is, after LoRA, the model in 4 bits, after LoRA on that; – where a stage is missing."
    stages = [lora.get("before", {}), lora.get("after", {}), qlora.get("before", {}), qlora.get("after", {})]
    rows = [[name, *(stage.get(name, "–") for stage in stages)] for name in stages[1]]
    held = []
    for name in ("smollm2-lora", "smollm2-qlora"):
        held += 2 * [runs.read_config(folder / name)["run"]["base_bytes"]["trained_on"] if (folder / name / runs.CONFIG).is_file() else "–"]
    return [*rows, ["bytes of the base's weights in memory", *held]]


def _pair_rows(results):
    "The real model on held-out pairs; before training neither answer is ahead."
    return [[title, results["before"].get(key, "–"), results["after"][key]] for key, title in PAIR_MEASURES.items()]


def _rm_words(results):
    "What the reward model makes of held-out comparisons."
    after = results["after"]
    return (f"it orders {100 * after['world.agrees_with_truth']:.1f} % of held-out pairs as the true reward does, where the labels it learned from are "
            f"right {100 * after['world.labels_agree_with_truth']:.1f} % of the time")


def _aligned_sections(results, metrics):
    "The small world after fine-tuning: reward model, PPO, DPO."
    tuned, rm = results["world-sft"], results["world-rm"]
    if not rm.get("after"):
        return []
    stages = {title: results[name]["after"] for name, title in WORLD_STAGES.items() if name != "world-pretrain" and results.get(name, {}).get("after")}
    bars = {words: {title: after[f"world.{key}"] for title, after in stages.items()}
            for key, words in (("courtesy", "courtesy"), ("brevity", "brevity"), ("answer", "question answered"))}
    text = (f"<p>Comparisons of answers, labelled by a judge who errs, are all that either method sees. The reward model: {report.esc(_rm_words(rm))}. "
            "PPO raises its score and pays for the distance from the fine-tuned model; DPO learns from the same pairs without it. Neither is told "
            "what is true, so what they do to the facts is in the table above.</p>")
    body = text + report.bar_chart(bars, "people whom fine-tuning did not ask about", "What preferences change.")
    curves = {name: [(r["step"], r[key]) for r in metrics["world-ppo"] if key in r] for name, key in (("score of the reward model", "reward"), ("KL", "kl"))}
    if curves["KL"]:
        body += report.line_chart(curves, "optimizer steps of PPO", "nats an answer", "The score that PPO raises, and the KL it pays.")
    for name, title in (("world-ppo", "PPO"), ("world-dpo", "DPO")):
        part = results.get(name, {})
        if part.get("answers_after"):
            body += f"<details><summary>Answers before {title} and after</summary>" + report.sample_answers(
                part["prompts"], part["answers_before"], part["answers_after"], part["references"]) + "</details>"
    return [("Preferences: a reward model with PPO, and DPO", body)] if tuned else []


def _pair_sections(results, folder):
    "The real model on the course's claims."
    run = runs.read_config(folder / "smollm2-dpo")["run"]
    rows = run["data"]
    after = results["after"]
    text = (f"<p>DPO with LoRA, {results['steps']} steps on {rows['data']['rows']} questions, each with the accurate statement (chosen) and the "
            f"article's (rejected); measured on {rows['eval_data']['rows']} questions about other claims. {100 * after['accuracy']:.0f} % of the "
            "accurate statements gained on the article's. They are all longer than the statements they correct, so a part of that may be length; and "
            "a model of this size does not learn from this which statement is true.</p>")
    return [("SmolLM2-135M-Instruct prefers the accurate statement", text + report.table(PAIRS_HEAD, _pair_rows(results)))]


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
    parts = {name: folder / name for name in ("world-pretrain", "world-sft", "world-rm", "world-ppo", "world-dpo", "smollm2-lora", "smollm2-qlora",
                                              "smollm2-dpo")}
    results = {name: runs.read_results(path) for name, path in parts.items()}
    metrics = {name: runs.read_metrics(path) for name, path in parts.items()}
    rows, head = _world_rows(results), _world_head(results)
    sections = []
    if rows:
        chance = results["world-pretrain"]["after"].get("world.chance")
        shares = {label: values for label, values in (("known", rows[0]), *((r[0], r) for r in rows[1:]))
                  if label in ("known", "question answered", "answer in the format")}
        bars = {label: {k: v for k, v in zip(head[1:4], r[1:4]) if v != "–"} for label, r in shares.items()}
        seen = _world_rows(results, seen=True)
        sections.append(("The small world through its stages",
                         "<p>People and facts that exist nowhere else, so the truth is known. Measured before training, after "
                         "pretraining on texts about all of them, after fine-tuning on questions about half of them, and after PPO or DPO "
                         "from there on comparisons of answers; the table is about the other half."
                         + (f" Guessing among the candidates is right {100 * chance:.1f} % of the time." if chance else "") + "</p>"
                         + report.table(head, rows)
                         + report.bar_chart(bars, "share of facts, people whom fine-tuning did not ask about", "What each stage adds.")
                         + (f"<details><summary>The people whom fine-tuning did ask about</summary>{report.table(head, seen)}</details>"
                            if seen else "")))
        steps = max((r["step"] for r in metrics["world-pretrain"]), default=0)
        loss = {"pretraining": [(r["step"], r["loss"]) for r in metrics["world-pretrain"] if "loss" in r],
                "fine-tuning": [(r["step"] + steps, r["loss"]) for r in metrics["world-sft"] if "loss" in r]}
        sections.append(("Its training loss", report.line_chart(loss, "optimizer steps, one stage after the other", "nats per target token",
                                                                "Training loss of the small model; the second stage starts where the first ends.")))
        tuned = results["world-sft"]
        sections.append(("What the small model says", report.sample_answers(
            tuned.get("prompts", []), tuned.get("answers_before", []), tuned.get("answers_after", []), tuned.get("references", []))))
    sections += _aligned_sections(results, metrics)
    if why_not:
        sections.append(("SmolLM2-135M-Instruct: not run", f"<p>{report.esc(why_not)}</p>"))
    if results["smollm2-lora"].get("after"):
        sections += _smol_sections(folder, results["smollm2-lora"], results["smollm2-qlora"], metrics)
    if results["smollm2-dpo"].get("after"):
        sections += _pair_sections(results["smollm2-dpo"], folder)
    folders = "".join(f"<li><code>{report.esc(p)}</code>: <code>llm-train chat {report.esc(p)}</code></li>"
                      for p in parts.values() if runs.trained_folder(p))
    versions = ", ".join(f"{k} {v}" for k, v in runs.versions().items())
    sections.append(("Use and repeat it", f"<ul>{folders}</ul><p class=dim>Each is a run folder with its own report.html. {report.esc(versions)}. "
                                          f"{seconds:.0f} s in all.</p>"))
    path = folder / runs.REPORT
    runs.write_text(path, report.page(
        "llm_train_course: the demo", "A small model whose truth is known, through pretraining, fine-tuning and preferences; then LoRA, QLoRA and DPO on a real one.",
        sections))
    return path


def _small_world(recipes, folder):
    "Part (a): its results by folder, and the exit code that stopped it."
    commands = (("pretrain", "pretraining on texts", prepare_pretrain), ("sft", "supervised fine-tuning", prepare_sft),
                ("rm", "a reward model from comparisons", prepare_rm), ("ppo", "PPO against the reward model", prepare_ppo),
                ("dpo", "DPO on the comparisons", prepare_dpo))
    results = {}
    for n, (recipe, (command, title, prepare)) in enumerate(zip(recipes, commands), 1):
        if command != "pretrain":
            recipe = replace(recipe, model=str(folder / ("world-pretrain" if command == "sft" else "world-sft")))
        if command == "ppo":
            recipe = replace(recipe, reward_model=str(folder / "world-rm"))
        code, results[f"world-{command}"] = _stage(f"the small world, {n}: {title}", command, prepare, recipe, folder / f"world-{command}")
        if code:
            return results, code
    return results, 0


def _real_model(recipes, folder):
    "Part (b), likewise."
    commands = (("lora", "LoRA on the interview questions", prepare_sft), ("qlora", "the same on a base in 4 bits", prepare_sft),
                ("dpo", "DPO on the claims", prepare_dpo))
    results = {}
    for recipe, (command, title, prepare) in zip(recipes, commands):
        code, results[f"smollm2-{command}"] = _stage(f"SmolLM2-135M-Instruct: {title}", command, prepare, recipe, folder / f"smollm2-{command}")
        if code:
            return results, code
    return results, 0


def demo(
    out: str | None = None,  # folder; None: the next free runs/demo-<n>
    seed: int = 0,
    part_a: tuple = (WORLD_PRETRAIN, WORLD_SFT, WORLD_RM, WORLD_PPO, WORLD_DPO),  # fewer: it stops there
    part_b: tuple = (SMOLLM2_LORA, SMOLLM2_QLORA, SMOLLM2_DPO),
) -> int:                    # 0; 1 when the real model could not be had; 130 when stopped
    "Both parts, a table, a report."
    start, why_not = time.perf_counter(), None
    runs.check_new(out)
    folder = runs.new_run_dir(out, "demo")
    seeded = lambda recipe: replace(recipe, train=replace(recipe.train, seed=seed), world=replace(recipe.world, seed=seed))
    results, code = _small_world([seeded(r) for r in part_a], folder)
    if code:
        return code
    smol = {}
    try:
        smol, code = _real_model([seeded(r) for r in part_b], folder)
        if code:
            return code
    except (runs.UserError, OSError) as e:  # no package and no hub, say: what part (a) gave is kept
        why_not = " ".join(str(e).split())
    except KeyboardInterrupt:
        say(f"\nstopped; what is done is in {folder}")
        return 130
    path = write_demo_report(folder, why_not, time.perf_counter() - start)
    say("\n" + _terminal(_world_head(results), _world_rows(results)))
    if results.get("world-rm", {}).get("after"):
        say(f"the reward model: {_rm_words(results['world-rm'])}")
    if smol.get("smollm2-lora", {}).get("after"):
        say("\n" + _terminal(SMOL_HEAD, _smol_rows(smol["smollm2-lora"], smol.get("smollm2-qlora", {}), folder)))
    if smol.get("smollm2-dpo", {}).get("after"):
        say("\n" + _terminal(PAIRS_HEAD, _pair_rows(smol["smollm2-dpo"])))
    if why_not:
        say(f"\nSmolLM2-135M-Instruct was not run: {why_not}")
    say(f"\n{time.perf_counter() - start:.0f} s. Answers and figures: {path}")
    return 1 if why_not else 0
