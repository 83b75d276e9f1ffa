"""Commands after fine-tuning: rm, ppo, grpo, dpo and distill. Recipes, checks, and the jobs they make.

Each job brings its chapter's own training function (`train_ppo`, say) in the place of `core.fit`; folders, checkpoints,
resuming and the report are those of every other run.
"""
import math
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from llm_train_course import distill, dpo, rlhf
from llm_train_course.app import adapters, rewards, runs
from llm_train_course.app.adapters import LoraSpec, QuantSpec
from llm_train_course.app.chat import room
from llm_train_course.app.data import (
    PREFERENCES,
    PROMPTS,
    SFT,
    DataError,
    Row,
    Rows,
    check_pairs,
    check_prompts,
    encode_rows,
    is_world,
    read_rows,
)
from llm_train_course.app.runs import UserError
from llm_train_course.app.train import (
    GuardSpec,
    Job,
    WorldSpec,
    as_prompt,
    checkpointed,
    context_length,
    device_of,
    encode_all,
    layout,
    load_for,
    load_rows,
    make_world,
    origin,
    sample_prompts,
    training,
    uses_world,
)
from llm_train_course.core import PaddedBatches, TrainConfig, _to, evaluate, lm_loss, seed_everything


# ---------------------------------------------------------------------------------------------------------------------
# recipes
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Recipe:
    model: str                          # hub name, model folder, run folder, or smollm2: what training starts from
    data: str                           # JSONL, Parquet, a hub name[:split], claims, or world
    eval_data: str | None = None        # the same, held out; null: nothing (world: its other half; ppo, grpo: the prompts of the training)
    max_length: int | None = None       # tokens of prompt and answer together; null: the model's context, at most 1024
    micro_batch_size: int = 4           # pairs or answers a forward pass
    gradient_checkpointing: bool = False  # keep each block's input alone and compute the block again in the backward pass
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the weights; train.precision is that of the arithmetic
    lora: LoraSpec | None = None        # null: all parameters are trained
    world: WorldSpec = field(default_factory=WorldSpec)
    samples: int = 3                    # answers before and after, in the report
    sample_tokens: int = 96             # their greatest length
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=1e-5, schedule="linear", weight_decay=0.0))
    out: str | None = None              # run folder; null: runs/<command>-<model>-<n>
    run: dict | None = None             # written into config.yaml by a run; not read

    def check(self) -> None:
        "What can be refused before anything is read."
        quant = getattr(self, "quant", None)
        if quant and not self.lora:
            raise UserError("quant: 4-bit weights cannot be trained: add a lora section")
        adapters.check_specs(self.lora, quant)


@dataclass(frozen=True)
class RewardRecipe(_Recipe):
    "Fit a reward model to preferences, chapter 5: a scalar for each answer. It is saved as a whole model, with or without lora."
    center: float = 0.0                 # weight of (chosen + rejected)^2, which keeps the scores around zero
    guard: GuardSpec | None = None      # refuses updates that are out of line; null: none is refused
    monitor: bool = False               # log update ratios, attention and dead units beside the loss

    def check(self) -> None:
        super().check()
        _positive(self, "center", zero=True)


@dataclass(frozen=True)
class DpoRecipe(_Recipe):
    "Direct preference optimisation and its relatives, chapter 6: from pairs, without reward model and without sampling."
    quant: QuantSpec | None = None      # the frozen weights in 4 bits, under lora; null: as dtype says
    beta: float = 0.1                   # price of a nat of divergence from the reference
    loss_type: Literal["sigmoid", "robust", "ipo", "dpop", "kto", "orpo", "simpo"] = "sigmoid"  # sigmoid is DPO
    label_smoothing: float = 0.0        # sigmoid, robust: share of labels that are wrong
    penalty: float = 5.0                # dpop: weight of a chosen answer that became less likely
    gamma: float = 0.5                  # simpo: margin, nats
    desirable_weight: float = 1.0       # kto
    undesirable_weight: float = 1.0     # kto
    sft_weight: float = 0.0             # weight of the chosen answer's mean loss, added to any loss
    reference: Literal["auto", "cache", "adapter", "copy"] = "auto"  # auto: the switched-off adapter with lora, else cached log-probabilities
    share_prompt: bool = True           # both answers behind one pass over their prompt; false: a row for each
    guard: GuardSpec | None = None      # refuses updates that are out of line; null: none is refused
    monitor: bool = False               # log update ratios, attention and dead units beside the loss

    def settings(self) -> dpo.Preference:
        return dpo.Preference(**{name: getattr(self, name) for name in dpo.Preference.__dataclass_fields__})

    def check(self) -> None:
        super().check()
        if self.reference == "adapter" and not self.lora:
            raise UserError("reference: adapter is the policy with its adapter switched off: add a lora section, or take cache or copy")
        ref = ("adapter" if self.lora else "cache") if self.reference == "auto" else self.reference
        if self.train.precision == "fp8" and ref != "adapter" and self.loss_type not in dpo.REFERENCE_FREE:
            raise UserError(f"train.precision: fp8 needs a reference in the same arithmetic, reference {ref} is not: add a lora section, or use bf16")
        try:
            self.settings()
        except ValueError as e:
            raise UserError(str(e)) from e


@dataclass(frozen=True)
class SamplingSpec:
    "How the answers of an iteration are made, and how training goes through them."
    prompts_per_iteration: int = 64     # prompts of an iteration; train.epochs counts iterations
    group_size: int = 1                 # answers to each prompt
    max_new_tokens: int = 64            # longest answer, tokens
    passes: int = 1                     # how often each answer is trained on
    generation_batch_size: int = 64     # answers generated, scored or compared with the reference at once
    missing_eos_penalty: float = 0.0    # taken off the reward of an answer that was cut off, nats


@dataclass(frozen=True)
class _OnPolicy(_Recipe):
    quant: QuantSpec | None = None      # the frozen weights in 4 bits, under lora; null: as dtype says
    clip_eps: float = 0.2               # the ratio of probabilities earns nothing beyond 1 +- this
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    eval_prompts: int = 64              # held-out prompts answered before and after, for their mean reward

    def check(self) -> None:
        super().check()
        if self.train.precision == "fp8":
            raise UserError("train.precision: fp8 is not for answers that are sampled: sampling and training would round differently, use bf16")
        _positive(self, "clip_eps")
        for name, value in asdict(self.sampling).items():
            if name == "missing_eos_penalty":
                if not (value >= 0 and math.isfinite(value)):
                    raise UserError(f"sampling.{name} must be finite and not negative, got {value!r}")
            elif value < 1:
                raise UserError(f"sampling.{name} must be at least 1, got {value!r}")
        if self.eval_prompts < 1:
            raise UserError(f"eval_prompts must be at least 1, got {self.eval_prompts!r}")
        if self.lora and self.lora.dropout:
            raise UserError(f"lora.dropout must be 0 here, got {self.lora.dropout!r}: with it, the policy that is trained is not the one "
                            "that was sampled")

    def sample(self) -> rlhf.Sampling:
        return rlhf.Sampling(**asdict(self.sampling), micro_batch_size=self.micro_batch_size, seed=self.train.seed)


@dataclass(frozen=True, kw_only=True)
class PpoRecipe(_OnPolicy):
    "Proximal policy optimisation against a reward, chapter 5."
    reward_model: str                   # a run of rm, a folder or hub name of a reward model, file.py:function, exact, or world
    sampling: SamplingSpec = field(default_factory=lambda: SamplingSpec(passes=2))
    value: Literal["shared", "separate", "reward"] = "shared"  # of a state: a head on the policy, a model of its own, or one that starts from the reward model
    kl_coef: float = 0.05               # price of a nat of KL to the reference
    kl_target: float | None = None      # nats an answer: kl_coef then follows it; null: kl_coef is fixed
    gamma: float = 1.0                  # discount
    lam: float = 1.0                    # of generalised advantage estimation; below 1 the critic must be trusted
    value_clip: float | None = None     # null: none
    value_coef: float = 0.1             # weight of the value loss
    whiten_advantages: bool = True

    def check(self) -> None:
        super().check()
        for name in ("kl_coef", "value_coef"):
            _positive(self, name, zero=True)
        for name in ("kl_target", "value_clip"):
            if getattr(self, name) is not None:
                _positive(self, name)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class GrpoRecipe(_OnPolicy):
    "Group-relative policy optimisation and its variants, chapter 5: several answers to a prompt, compared with each other."
    reward: str | list[str]             # file.py:function in TRL's signature, exact, world, or a reward model; or a list of them
    reward_weights: list[float] | None = None  # of their sum; null: all 1
    sampling: SamplingSpec = field(default_factory=lambda: SamplingSpec(prompts_per_iteration=16, group_size=8))
    beta: float = 0.04                  # weight of the KL to the reference
    loss_type: Literal["grpo", "dapo", "dr_grpo", "rloo"] = "grpo"  # how tokens and answers are averaged
    scale: bool | None = None           # divide by the group's standard deviation; null: grpo and dapo do
    clip_eps_high: float | None = None  # null: as clip_eps
    correct_kl: bool = True             # the KL's own gradient, as in TRL; false: as in the paper

    def check(self) -> None:
        super().check()
        _positive(self, "beta", zero=True)
        if self.clip_eps_high is not None:
            _positive(self, "clip_eps_high")
        if self.sampling.group_size < 2:
            raise UserError(f"sampling.group_size must be at least 2, got {self.sampling.group_size!r}: answers are compared with each other")
        names = self.rewards()
        if not names:
            raise UserError("reward must name at least one reward, got []")
        if self.reward_weights is not None and (len(self.reward_weights) != len(names) or not all(map(math.isfinite, self.reward_weights))):
            raise UserError(f"reward_weights must be {len(names)} finite number{'s' * (len(names) > 1)}, one for each reward, got {self.reward_weights!r}")

    def rewards(self) -> list[str]:
        return [self.reward] if isinstance(self.reward, str) else list(self.reward)


@dataclass(frozen=True)
class DistillRecipe:
    "Distil a teacher into a student, chapter 7."
    teacher: str                        # hub name, model folder, run folder, or smollm2
    data: str                           # logit: as for sft; sequence, on_policy: prompts (conversations up to the last user turn)
    student: str | None = None          # the same as teacher; null: made of the teacher's layers
    student_layers: list[int] | None = None  # which of the teacher's layers; null: every second one, from the first
    teacher_4bit: bool = False          # the teacher's linear layers in 4 bits
    mode: Literal["logit", "sequence", "on_policy"] = "logit"  # on the rows given, on the teacher's text, or on the student's
    eval_data: str | None = None        # as for sft, held out; null: no held-out loss
    max_length: int | None = None       # tokens a row; null: the student's context, at most 1024
    on_long: Literal["error", "truncate", "drop"] = "error"  # rows longer than that (texts are cut into pieces instead)
    packing: bool = False               # logit: several rows in one, kept apart by block-diagonal attention
    micro_batch_size: int = 4           # rows a forward pass
    gradient_checkpointing: bool = False  # keep each block's input alone and compute the block again in the backward pass
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the weights of both
    alpha: float | None = None          # weight of the hard labels; null: 0, for sequence 1
    beta: float = 0.0                   # divergence: 0 forward KL, 1 reverse KL, between: Jensen-Shannon
    temperature: float = 1.0            # of the loss
    max_new_tokens: int = 64            # of the text that is written
    sample_temperature: float = 1.0     # of its sampling; 0: the most likely token
    prompts_per_epoch: int | None = None  # on_policy: null: all; fewer make the text fresher
    student_share: float = 1.0          # on_policy: of the micro-batches; below 1 the others hold the answers of the data (GKD's lambda)
    world: WorldSpec = field(default_factory=WorldSpec)
    samples: int = 3                    # answers before and after, in the report
    sample_tokens: int = 96             # their greatest length
    train: TrainConfig = field(default_factory=TrainConfig)
    out: str | None = None              # run folder; null: runs/distill-<teacher>-<n>
    run: dict | None = None             # written into config.yaml by a run; not read

    def check(self) -> None:
        "What can be refused before anything is read."
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} must be in [0, 1], got {value!r}")
        _positive(self, "temperature")
        _positive(self, "sample_temperature", zero=True)
        for name in ("max_new_tokens", "prompts_per_epoch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.mode == "on_policy" and self.alpha:
            raise UserError(f"alpha must be 0 for on_policy, got {self.alpha!r}: the hard labels would be the student's own words")
        if self.student and self.student_layers is not None:
            raise UserError("student_layers: the student is given, there is nothing to make")
        if self.packing and self.mode != "logit":
            raise UserError(f"packing: is for mode logit, got {self.mode}")
        if not 0 < self.student_share <= 1:
            raise UserError(f"student_share must be above 0 and at most 1, got {self.student_share!r}"
                            + (" (without the student's text: mode logit)" if self.student_share == 0 else ""))
        if self.student_share < 1 and self.mode != "on_policy":
            raise UserError(f"student_share: is for mode on_policy, got {self.mode}")


def _positive(recipe, name, zero=False):
    value = getattr(recipe, name)
    if not (math.isfinite(value) and (value > 0 or zero and value == 0)):
        raise UserError(f"{name} must be {'finite and not negative' if zero else 'positive and finite'}, got {value!r}")


# ---------------------------------------------------------------------------------------------------------------------
# what the commands share
# ---------------------------------------------------------------------------------------------------------------------
def _open(recipe):
    "World, source of the model, with every refusal that needs no rows."
    world = make_world(recipe.world) if uses_world(recipe) else None
    return world, runs.model_source(recipe.model)


def _rows(recipe, accept, world):
    "Training and held-out rows; the world's other half where none are named."
    from dataclasses import replace
    if is_world(recipe.data) and recipe.eval_data is None:
        recipe = replace(recipe, eval_data="world:heldout")
    return load_rows(recipe, accept, world)


def _policy(recipe, source, world):
    "Model with adapters, tokenizer, and what a Job keeps about them."
    model, tokenizer, state, base_bytes = load_for(recipe, source)
    came_from = origin(model, recipe.model)
    if (Path(source) / "adapter_config.json").is_file():
        came_from["merged_adapter"] = source
    _same_world(world, tokenizer, recipe.model)
    seed_everything(recipe.train.seed)  # of the adapter's initial weights
    if recipe.lora:
        model = adapters.with_adapter(model, recipe.lora)
    if recipe.gradient_checkpointing:
        model = checkpointed(model)
    return model, tokenizer, {"base_state": state, "base_bytes": base_bytes, "source": came_from}


def _same_world(world, tokenizer, name):
    if world and tokenizer.get_vocab() != world.tokenizer.get_vocab():
        raise UserError(f"world: the model {name} has another vocabulary than this world; give the `world` it was trained on")


def _needs_end(tokenizer, source):
    if tokenizer.eos_token_id is None:
        raise DataError([f"{source}: the tokenizer has no end token, so a model could not learn to stop"])


def _both(first, second):
    "What two checks give, every problem of both at once."
    out, problems, hints = [], [], []
    for check in (first, second):
        try:
            out.append(check())
        except DataError as e:
            problems, hints = problems + e.problems, hints + ([e.hint] if e.hint else [])
    if problems:
        raise DataError(problems, hints[-1] if hints else "")
    return out


def _steps(plan_length: int, config: TrainConfig) -> int:
    "Optimizer steps, as `core.total_steps` counts them, from the micro-batches of an epoch."
    import os
    if config.max_steps:
        return config.max_steps
    return config.epochs * math.ceil(plan_length / (config.grad_accum_steps * int(os.environ.get("WORLD_SIZE", "1"))))


def _eval_rows(recipe, rows):
    "Held-out rows for the loop: only if it is to look at them on the way."
    return rows.values if rows and recipe.train.eval_every else None


def _text(value) -> str:
    return value if isinstance(value, str) else "\n".join(m["content"] for m in value)


# ---------------------------------------------------------------------------------------------------------------------
# rm
# ---------------------------------------------------------------------------------------------------------------------
@training("rm", RewardRecipe)
def prepare_rm(recipe: RewardRecipe) -> Job:
    world, source = _open(recipe)
    rows, eval_rows, info = _rows(recipe, PREFERENCES, world)
    policy, tokenizer = runs.load_any(source, recipe.dtype, merge=True)
    if getattr(policy.config, "quantization_config", None):
        raise UserError(f"model: {recipe.model} is quantized: a reward model's trunk cannot be made of it")
    came_from = origin(policy, recipe.model)
    _same_world(world, tokenizer, recipe.model)
    _needs_end(tokenizer, rows.source)
    limit = context_length(policy, recipe.max_length)
    whole = lambda part: lambda: part and check_pairs(part, tokenizer, limit, whole=True)
    _both(whole(rows), whole(eval_rows))
    pairs = lambda part, shuffle: rlhf.PairBatches(rlhf.encode_pairs(tokenizer, part.values, limit), recipe.micro_batch_size,
                                                   tokenizer.pad_token_id, shuffle, recipe.train.seed, center=recipe.center)
    batches, held = pairs(rows, True), eval_rows and pairs(eval_rows, False)
    seed_everything(recipe.train.seed)
    try:
        model = rlhf.reward_model_from(policy, tokenizer.pad_token_id, recipe.train.seed)
    except (ValueError, AttributeError) as e:
        raise UserError(f"model: no reward model can be made of {recipe.model} ({' '.join(str(e).split())})") from e
    del policy
    if recipe.lora:
        adapters.with_adapter(model.model.base_model, recipe.lora)  # the head, which is new, is trained whole
        model.model.score.requires_grad_(True)
    if recipe.gradient_checkpointing:
        model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if recipe.lora:
            model.model.enable_input_require_grads()
    shown = (eval_rows or rows).values[:recipe.samples]

    def scores(job):
        with torch.no_grad():
            batch = pairs_of(rlhf.encode_pairs(tokenizer, shown, limit), tokenizer, next(job.model.parameters()).device)
            a, b = job.model.eval()(batch).chunk(2)
        job.model.train()
        return [f"chosen {x:.3f}, rejected {y:.3f}" for x, y in zip(a.tolist(), b.tolist())]

    def measures(job, _):
        if not held:
            return {}
        found = evaluate(job.model, held, rlhf.reward_loss)
        return {**{k: v for k, v in found.items() if k != "n_targets"}, **(_truth(job.model, held, eval_rows, world) if world else {})}

    def save(model, folder):
        rlhf.save_reward_model(model, folder)

    return Job(recipe, model, tokenizer, batches, measures=measures, answers=scores if shown else None, save=save, merge=True,
               prompts=[v["prompt"] for v in shown], data=info, source=came_from, stem=runs.slug(recipe.model), unit="a pair",
               references=[f"chosen: {_text(v['chosen'])}\nrejected: {_text(v['rejected'])}" for v in shown],
               train=lambda run_dir, resume, **watch: rlhf.train_reward_model(
                   model, tokenizer, rows.values, recipe.train, eval_pairs=_eval_rows(recipe, eval_rows),
                   micro_batch_size=recipe.micro_batch_size, max_length=limit, center=recipe.center, run_dir=run_dir, resume=resume, **watch)[1])


def pairs_of(examples, tokenizer, device):
    "All pairs in one batch, the chosen ones first."
    batch = rlhf.PairBatches(examples, len(examples), tokenizer.pad_token_id, shuffle=False).collate(list(range(len(examples))))
    return _to(batch, device)


@torch.no_grad()
def _truth(model, batches, rows, world):
    "Of the world's pairs: how often the score puts the answer of the higher true reward first, and how often the labels do."
    true = [world.true_reward(_text(v["chosen"])) - world.true_reward(_text(v["rejected"])) for v in rows.values]
    device, gaps, training = next(model.parameters()).device, [], model.training
    model.eval()
    for item in batches.plan(0):
        a, b = model(_to(batches.collate(item), device)).chunk(2)
        gaps += (a - b).tolist()
    model.train(training)
    told = [(t, g) for t, g in zip(true, gaps) if t != 0]
    if not told:
        return {}
    return {"world.agrees_with_truth": sum((t > 0) == (g > 0) for t, g in told) / len(told),
            "world.labels_agree_with_truth": sum(t > 0 for t, _ in told) / len(told)}


# ---------------------------------------------------------------------------------------------------------------------
# dpo
# ---------------------------------------------------------------------------------------------------------------------
@training("dpo", DpoRecipe)
def prepare_dpo(recipe: DpoRecipe) -> Job:
    world, source = _open(recipe)
    rows, eval_rows, info = _rows(recipe, PREFERENCES, world)
    model, tokenizer, kept = _policy(recipe, source, world)
    _needs_end(tokenizer, rows.source)
    limit, settings = context_length(model, recipe.max_length), recipe.settings()
    cut = lambda part: lambda: check_pairs(part, tokenizer, limit) if part else (None, [])
    (pairs, warned), (held, held_warned) = _both(cut(rows), cut(eval_rows))
    if recipe.loss_type == "kto" and any(part and len({str(v["prompt"]) for v in part.values}) < 2 for part in (rows, eval_rows)):
        raise DataError([f"{rows.source}: loss_type kto compares with answers to other prompts: there is one prompt only"])
    batches = dpo.PreferenceBatches(pairs, recipe.micro_batch_size, tokenizer.pad_token_id, seed=recipe.train.seed)
    held = held and dpo.PreferenceBatches(held, recipe.micro_batch_size, tokenizer.pad_token_id, shuffle=False, shared=False)
    ref = {"auto": "adapter" if recipe.lora else "cache"}.get(recipe.reference, recipe.reference)
    shown = eval_rows or rows
    prompts, references = sample_prompts(((v["prompt"], _text(v["chosen"])) for v in shown.values), recipe.samples, model, tokenizer)
    return Job(recipe, model, tokenizer, batches, prompts=prompts, references=references, world=world, data=info, **kept,
               stem=runs.slug(recipe.model), warnings=[*warned, *held_warned], unit="a pair",
               measures=lambda job, results: pair_measures(job, held, settings, results) if held else {},
               train=lambda run_dir, resume, **watch: dpo.train_dpo(
                   model, tokenizer, rows.values, recipe.train, ref=ref, micro_batch_size=recipe.micro_batch_size, max_length=limit,
                   share_prompt=recipe.share_prompt, eval_pairs=_eval_rows(recipe, eval_rows), run_dir=run_dir, resume=resume,
                   **watch, **asdict(settings)))


@torch.no_grad()
def answer_nats(model, batches) -> tuple[torch.Tensor, torch.Tensor]:  # (pairs, 2) each
    "Log-probabilities and lengths of both answers of every pair, in their order."
    device, training, found = next(model.parameters()).device, model.training, []
    model.eval()
    for item in batches.plan(0):
        found.append([t.cpu() for t in dpo.answer_logps(model, _to(batches.collate(item), device))])
    model.train(training)
    return tuple(torch.cat(parts) for parts in zip(*found))


def pair_measures(job, batches, settings, results) -> dict:
    "What the policy makes of held-out pairs: log-probabilities, and the loss and margins against what it was before."
    logps, lengths = answer_nats(job.model, batches)
    if "pairs_before" not in results:
        job.kept["pairs_before"] = logps.tolist()
    ref = torch.tensor(results.get("pairs_before") or logps.tolist())
    means = logps / lengths
    out = {}
    if settings.loss_type != "kto":  # whose loss needs answers to other prompts
        out["loss"] = float(dpo.pair_losses(settings, logps, ref, lengths).mean())
    out |= {"logps_chosen": float(logps[:, 0].mean()), "logps_rejected": float(logps[:, 1].mean()),
            "prefers_chosen": float((logps[:, 0] > logps[:, 1]).float().mean()),
            "prefers_chosen_per_token": float((means[:, 0] > means[:, 1]).float().mean())}
    if "pairs_before" in results:  # before training every margin is zero
        gain = logps - ref
        out |= {"margin": float(settings.beta * (gain[:, 0] - gain[:, 1]).mean()),
                "accuracy": float((gain[:, 0] > gain[:, 1]).float().mean())}
    return out


# ---------------------------------------------------------------------------------------------------------------------
# ppo and grpo
# ---------------------------------------------------------------------------------------------------------------------
@contextmanager
def _named(rows):
    "A reward that fails on an answer: say to which row's prompt."
    try:
        yield
    except rlhf.RewardError as e:
        raise rlhf.RewardError(re.sub(r"to prompt (\d+)", lambda m: f"to the prompt {rows.rows[int(m[1])].where}", str(e))) from e


def _on_policy(recipe: _OnPolicy, names: list[str], field_name: str, weights, train) -> Job:
    "A job of ppo or grpo; `train(model, tokenizer, rewards, rows)` makes its training function."
    world, source = _open(recipe)
    rows, eval_rows, info = _rows(recipe, PROMPTS, world)
    found = [rewards.find(name, field_name, world or (lambda: make_world(recipe.world))) for name in names]  # refused before a model is read
    rewards.check_columns(found, field_name, rows, eval_rows)
    model, tokenizer, kept = _policy(recipe, source, world)
    _needs_end(tokenizer, rows.source)
    context, new = context_length(model, recipe.max_length), recipe.sampling.max_new_tokens
    fits = lambda part: lambda: part and check_prompts(part, tokenizer, context - new, f" beside an answer of sampling.max_new_tokens {new} in "
                                                                                     f"a context of {context}")
    _both(fits(rows), fits(eval_rows))
    scorers = [f.load(model, tokenizer, recipe.model) for f in found]
    shown = eval_rows or rows
    few = Rows(shown.rows[::max(1, len(shown) // recipe.eval_prompts)][:recipe.eval_prompts], shown.kind, shown.source)  # spread over the file
    asked = check_prompts(few, tokenizer, None)
    prompts, references = sample_prompts(_questions(few), recipe.samples, model, tokenizer)
    sampling, labels = recipe.sample(), rewards.labels(found)

    def measures(job, _):
        device = next(job.model.parameters()).device
        for scorer in scorers:
            if isinstance(scorer, torch.nn.Module):
                scorer.to(device)
        answers = rlhf.sample(job.model, tokenizer, asked, new, recipe.train.seed, sampling.generation_batch_size)
        with _named(few):
            scores = rlhf.score_rollouts(answers, scorers, tokenizer, few.values, sampling.generation_batch_size)
        total = (scores * torch.tensor(weights or [1.0] * len(scorers))).nansum(1)
        mean = lambda t: float(t[~t.isnan()].mean()) if bool((~t.isnan()).any()) else math.nan
        each = {f"reward.{name}": mean(scores[:, n]) for n, name in enumerate(labels)} if len(labels) > 1 else {}
        return {"reward": float(total.mean()), **each, "answer_tokens": sum(len(r.answer) for r in answers) / len(answers),
                "answers_ended": sum(r.finished for r in answers) / len(answers)}

    def run(run_dir, resume):
        with _named(rows), dpo._without_dropout(model):
            return train(model, tokenizer, scorers, rows.values, sampling, run_dir, resume)

    length = sampling.passes * math.ceil(sampling.prompts_per_iteration * sampling.group_size / sampling.micro_batch_size)
    return Job(recipe, model, tokenizer, None, prompts=prompts, references=references, world=world, data=info, **kept,
               stem=runs.slug(recipe.model), measures=measures, train=run, n_steps=_steps(length, recipe.train), unit="a token of the answers",
               more={"rewards": {label: f.about() for label, f in zip(labels, found)}})


@training("ppo", PpoRecipe)
def prepare_ppo(recipe: PpoRecipe) -> Job:
    if recipe.value == "reward" and not rewards.is_model(recipe.reward_model):
        raise UserError(f"value: reward starts from the reward model, and reward_model {recipe.reward_model} is a function: take shared or separate")

    def train(model, tokenizer, scorers, prompts, sampling, run_dir, resume):
        return rlhf.train_ppo(
            model, tokenizer, prompts, scorers, recipe.train, sampling=sampling, value=scorers[0] if recipe.value == "reward" else recipe.value,
            kl_coef=recipe.kl_coef, kl_target=recipe.kl_target, gamma=recipe.gamma, lam=recipe.lam, clip_eps=recipe.clip_eps,
            value_clip=recipe.value_clip, value_coef=recipe.value_coef, whiten_advantages=recipe.whiten_advantages,
            run_dir=run_dir, resume=resume)[1]

    return _on_policy(recipe, [recipe.reward_model], "reward_model", None, train)


@training("grpo", GrpoRecipe)
def prepare_grpo(recipe: GrpoRecipe) -> Job:
    def train(model, tokenizer, scorers, prompts, sampling, run_dir, resume):
        return rlhf.train_grpo(
            model, tokenizer, prompts, scorers, recipe.train, sampling=sampling, reward_weights=recipe.reward_weights, beta=recipe.beta,
            correct_kl=recipe.correct_kl, loss_type=recipe.loss_type, scale=recipe.scale, clip_eps=recipe.clip_eps,
            clip_eps_high=recipe.clip_eps_high, run_dir=run_dir, resume=resume)[1]

    return _on_policy(recipe, recipe.rewards(), "reward", recipe.reward_weights, train)


# ---------------------------------------------------------------------------------------------------------------------
# distill
# ---------------------------------------------------------------------------------------------------------------------
@contextmanager
def _of(field_name):
    "Refusals about a model, under the name of its field."
    try:
        yield
    except UserError as e:
        raise UserError(re.sub("^model: ", f"{field_name}: ", str(e))) from e


def _teacher_and_student(recipe):
    "Both models with their tokenizers; the student is made before the teacher goes into 4 bits."
    for field_name in ("teacher", "student"):  # both names, before either is read
        with _of(field_name):
            getattr(recipe, field_name) and runs.model_source(getattr(recipe, field_name))
    with _of("teacher"):
        teacher, teacher_tokenizer = runs.load_any(recipe.teacher, recipe.dtype, merge=True)
    came_from = origin(teacher, recipe.teacher)
    device = device_of(recipe.train)
    if recipe.student:
        with _of("student"):
            student, tokenizer = runs.load_any(recipe.student, recipe.dtype, merge=True)
        if getattr(student.config, "quantization_config", None):
            raise UserError(f"student: {recipe.student} is quantized: its weights cannot be trained")
    else:
        try:
            student, tokenizer = distill.student_from_layers(teacher, recipe.student_layers), teacher_tokenizer
        except ValueError as e:
            raise UserError(f"{'student_layers' if recipe.student_layers is not None else 'student'}: {' '.join(str(e).split())}") from e
    if recipe.teacher_4bit and not getattr(teacher.config, "quantization_config", None):
        teacher = adapters.quantized(teacher, QuantSpec(), device)
    teacher.requires_grad_(False).eval().to(device)
    alone = recipe.mode == "sequence" and recipe.alpha in (None, 1.0)  # text alone needs no common vocabulary
    if not alone:
        try:
            distill.check_vocabulary(student, teacher, tokenizer, teacher_tokenizer)
        except ValueError as e:
            raise UserError(f"student: {e}") from e
    return teacher, teacher_tokenizer, student, tokenizer, came_from


@training("distill", DistillRecipe)
def prepare_distill(recipe: DistillRecipe) -> Job:
    world = make_world(recipe.world) if uses_world(recipe) else None
    problems, found, mixed = [], {}, recipe.student_share < 1
    with_answers = ("messages", "prompt_completion")  # from which prompts can be taken
    for name, accept in (("data", SFT if recipe.mode == "logit" else with_answers if mixed else PROMPTS), ("eval_data", SFT)):
        if getattr(recipe, name):
            try:
                found[name] = read_rows(getattr(recipe, name), accept, world=world)
            except DataError as e:
                problems += e.problems
    if problems:
        raise DataError(problems)
    rows, eval_rows = found["data"], found.get("eval_data")
    info = {name: {"source": part.source, "kind": part.kind, "rows": len(part), "blank_lines": part.n_blank, "sha256": part.fingerprint}
            for name, part in found.items()}
    teacher, teacher_tokenizer, student, tokenizer, came_from = _teacher_and_student(recipe)
    _same_world(world, tokenizer, recipe.student or recipe.teacher)
    _needs_end(tokenizer, rows.source)
    limit, alpha = context_length(student, recipe.max_length), float(recipe.mode == "sequence") if recipe.alpha is None else recipe.alpha
    warnings, held, fixed = [], None, None
    if mixed:  # the same rows twice: with the answers of the data, and up to them
        given = encode_rows(rows, tokenizer, limit, recipe.on_long)
        warnings, fixed = given.warnings, PaddedBatches(given.examples, recipe.micro_batch_size, tokenizer.pad_token_id, seed=recipe.train.seed)
        asked = [Row(dict(zip(("prompt", "answer"), as_prompt(rows, row.value))), row.source, row.line) for row in rows.rows]
        rows = Rows(asked, "prompt", rows.source, rows.n_blank)
    if recipe.mode == "logit":
        train, held = encode_all(rows, eval_rows, tokenizer, limit, recipe.on_long)
        batches, warnings = layout(train.examples, recipe, tokenizer, limit, True), [*train.warnings, *(held.warnings if held else [])]
        length = len(batches.plan(0))
    else:
        writer, words = (student, tokenizer) if recipe.mode == "on_policy" else (teacher, teacher_tokenizer)
        fit_in = min(limit, context_length(writer, None, limit)) - recipe.max_new_tokens
        check = lambda: check_prompts(rows, words, fit_in, f" beside max_new_tokens {recipe.max_new_tokens}")
        _, held = _both(check, lambda: eval_rows and encode_all(eval_rows, None, tokenizer, limit, recipe.on_long)[0])
        batches, warnings = [v["prompt"] for v in rows.values], [*warnings, *(held.warnings if held else [])]
        asked = len(batches) if recipe.mode == "sequence" else min(recipe.prompts_per_epoch or len(batches), len(batches))
        length = math.ceil(asked / recipe.micro_batch_size)
    held = held and PaddedBatches(held.examples, recipe.micro_batch_size, tokenizer.pad_token_id, shuffle=False)
    if recipe.gradient_checkpointing:
        student = checkpointed(student)
    pairs = _questions(eval_rows or rows)
    prompts, references = sample_prompts(pairs, recipe.samples, student, tokenizer)
    common = teacher.get_output_embeddings().weight.shape[0] == student.get_output_embeddings().weight.shape[0]

    def measures(job, results):
        if "before" not in results:
            job.kept["teacher"] = _alone(teacher, held if common else None, world)
        if not held:
            return {}
        out = {"loss": evaluate(job.model, held, lm_loss)["loss"]}
        out["perplexity"] = math.exp(min(out["loss"], 700))
        if common:
            loss = distill.distill_objective(teacher, 0.0, recipe.beta, 1.0)
            out["divergence"] = evaluate(job.model, held, loss)["divergence"]
        return out

    rollouts = {} if recipe.mode == "logit" else {"max_new_tokens": recipe.max_new_tokens, "sample_temperature": recipe.sample_temperature}
    if recipe.mode == "on_policy":
        rollouts |= {"prompts_per_epoch": recipe.prompts_per_epoch, "fixed": fixed, "student_share": recipe.student_share}
    return Job(recipe, student, tokenizer, None, prompts=prompts, references=references, world=world, data=info, source=came_from,
               stem=runs.slug(recipe.teacher), warnings=warnings, measures=measures, n_steps=_steps(length, recipe.train), more={
                   "teacher": {"name": recipe.teacher, "parameters": _count(teacher), "bytes": adapters.weight_bytes(teacher),
                               "layers": teacher.config.num_hidden_layers}, "student_layers": student.config.num_hidden_layers},
               train=lambda run_dir, resume: distill.train_distill(
                   student, teacher, batches, recipe.train, mode=recipe.mode, tokenizer=tokenizer,
                   teacher_tokenizer=None if teacher_tokenizer is tokenizer else teacher_tokenizer,
                   alpha=alpha, beta=recipe.beta, temperature=recipe.temperature, micro_batch_size=recipe.micro_batch_size,
                   run_dir=run_dir, resume=resume, **rollouts))


def _count(model):
    from llm_train_course.core import count_parameters
    return count_parameters(model)[1]


def _questions(rows):
    "Prompts of either kind of rows, with what the data answer."
    if rows.kind == "prompt":
        return ((v["prompt"], str(v.get("answer") or "")) for v in rows.values)
    return (as_prompt(rows, v) for v in rows.values)


def _alone(teacher, held, world):
    "The teacher's own measures."
    out = {}
    if held:
        out["loss"] = evaluate(teacher, held, lm_loss)["loss"]
        out |= {"perplexity": math.exp(min(out["loss"], 700)), "divergence": 0.0}
    if world:
        out |= {f"world.{k}": float(v) for k, v in world.evaluate(teacher).items()}
    return out


# ---------------------------------------------------------------------------------------------------------------------
# evaluation and chat
# ---------------------------------------------------------------------------------------------------------------------
def evaluate_reward(name: str, source: str, rows, recipe, world) -> dict:
    "`llm-train eval` of a reward model: on preference pairs."
    model, tokenizer = rewards.load_model(source, f"model: {name}", recipe.dtype or "fp32")
    model.to(device_of(TrainConfig(cpu=recipe.cpu)))
    _same_world(world, tokenizer, name)
    limit = context_length(model.model, recipe.max_length)
    check_pairs(rows, tokenizer, limit, whole=True)
    batches = rlhf.PairBatches(rlhf.encode_pairs(tokenizer, rows.values, limit), recipe.micro_batch_size, tokenizer.pad_token_id, shuffle=False)
    found = evaluate(model, batches, rlhf.reward_loss)
    return {"pairs": found.pop("n_targets"), **found, **(_truth(model, batches, rows, world) if world else {})}


def evaluate_pairs(model, tokenizer, rows, recipe) -> dict:
    "`llm-train eval` of a language model on preference pairs: which answer it finds more likely."
    limit = context_length(model, recipe.max_length)
    examples, _ = check_pairs(rows, tokenizer, limit)
    logps, lengths = answer_nats(model, dpo.PreferenceBatches(examples, recipe.micro_batch_size, tokenizer.pad_token_id, shuffle=False, shared=False))
    means = logps / lengths
    return {"pairs": len(rows), "logps_chosen": float(logps[:, 0].mean()), "logps_rejected": float(logps[:, 1].mean()),
            "prefers_chosen": float((logps[:, 0] > logps[:, 1]).float().mean()),
            "prefers_chosen_per_token": float((means[:, 0] > means[:, 1]).float().mean())}


def score(model, tokenizer, prompt, answer: str) -> float:
    "A reward model's score of one answer."
    from llm_train_course.core import encode_prompt_completion

    said = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
    ids = encode_prompt_completion(tokenizer, prompt, said)["input_ids"]
    if room(model.model, len(ids), 1) < 0:
        raise UserError(f"prompt and answer have {len(ids)} tokens, the model's context {model.config.max_position_embeddings}")
    device = next(model.parameters()).device
    with torch.no_grad():
        return float(model({"input_ids": torch.tensor([ids], device=device), "attention_mask": torch.ones(1, len(ids), dtype=torch.long, device=device)}))

