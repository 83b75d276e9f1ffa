"""Run folders: config.yaml, metrics.jsonl, checkpoints/, model/ or adapter/ (and base/), results.json, report.html.

Everything is written under another name first and renamed, so that a file is whole or absent. Nothing here imports
torch at import time.
"""
import contextlib
import json
import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

CONFIG, METRICS, RESULTS, REPORT = "config.yaml", "metrics.jsonl", "results.json", "report.html"
BASE = "base"  # folder beside adapter/, where the adapter's base exists nowhere else
PACKAGES = ("llm_train_course", "torch", "transformers", "peft", "accelerate", "tokenizers", "datasets", "bitsandbytes")


class UserError(ValueError):
    "What the user gave cannot be used; the message names it. The command prints it and leaves with 2."


def write_text(
    path: Path,
    text: str,
) -> None:
    "Write a file so that it is never seen half written."
    draft = path.with_name(f".draft-{path.name}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def versions(
    packages: tuple[str, ...] = PACKAGES,
) -> dict:
    "Versions of what a run depends on."
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def slug(
    name: str,  # of a model: a hub name or a folder
) -> str:
    "A short name that is safe in a folder's name."
    parts = [p for p in re.split(r"[/\\]", name.rstrip("/\\")) if p not in ("", ".", "..")]
    last = parts[-1] if parts else "model"
    if last in ("model", "adapter") and len(parts) > 1:
        last, name = parts[-2], str(Path(name).parent)
    if (Path(name).expanduser() / CONFIG).is_file():
        last = re.sub(r"-\d+$", "", last)  # a run's own number
    return re.sub(r"[^A-Za-z0-9._]+", "-", last).strip("-.").lower()[:40] or "model"


def check_new(
    out: str | None,
) -> None:
    "Refuse a folder that a new run must not be written into. Before any work, so that nothing is lost."
    if out is None:
        return
    path = Path(out).expanduser()
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"out: {out} is a file, not a folder")
    if (path / CONFIG).exists():
        raise UserError(f"out: {out} holds a run already: continue it with --resume {out}, or name another folder")
    if any(path.iterdir()):
        raise UserError(f"out: {out} is not empty: name another folder")


def new_run_dir(
    out: str | None,  # the folder; None: the next free runs/<stem>-<n>
    stem: str,        # such as sft-smollm2
) -> Path:
    "Make the folder. Two runs started at once get two folders."
    if out is not None:
        check_new(out)
        path = Path(out).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        return path
    root = Path("runs")
    root.mkdir(exist_ok=True)
    taken = [int(m[1]) for p in root.glob(f"{stem}-*") if (m := re.fullmatch(re.escape(stem) + r"-(\d+)", p.name))]
    n = max(taken, default=0) + 1
    while True:
        try:
            (root / f"{stem}-{n}").mkdir()
            return root / f"{stem}-{n}"
        except FileExistsError:
            n += 1


def write_config(
    run_dir: Path,
    recipe: dict,  # the fields of the recipe
    run: dict,     # what is known besides: command, versions, data
) -> None:
    "config.yaml: usable as --config again, as it stands."
    text = ("# Repeat this run:  llm-train {command} --config {folder}/config.yaml\n"
            "# Continue it:      llm-train {command} --resume {folder}\n").format(command=run["command"], folder=run_dir)
    body = yaml.safe_dump({**recipe, "out": None, "run": run}, sort_keys=False, allow_unicode=True, width=110)
    write_text(run_dir / CONFIG, text + body)


def read_config(
    run_dir: str | Path,
) -> dict:
    "config.yaml of a run folder."
    path = Path(run_dir).expanduser() / CONFIG
    if not Path(run_dir).expanduser().is_dir():
        raise UserError(f"{run_dir}: no such run folder")
    if not path.is_file():
        raise UserError(f"{run_dir}: not a run folder (it has no {CONFIG})")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({str(e).splitlines()[0]})") from e
    if not isinstance(config, dict) or not isinstance(config.get("run"), dict):
        raise UserError(f"{path}: not the {CONFIG} of a run (it has no field `run`)")
    return config


def read_metrics(
    run_dir: str | Path,
) -> list[dict]:
    "The rows of metrics.jsonl; a last line that was cut off is left out."
    path, rows = Path(run_dir) / METRICS, []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def read_results(
    run_dir: str | Path,
) -> dict:
    "results.json: measures before and after, sample answers."
    path = Path(run_dir) / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def update_results(
    run_dir: str | Path,
    **parts,
) -> dict:
    "Add to results.json."
    results = {**read_results(run_dir), **parts}
    write_text(Path(run_dir) / RESULTS, json.dumps(results, indent=1, ensure_ascii=False))
    return results


def base_folder(
    adapter: str | Path,  # an adapter's folder
) -> Path | None:
    "The base that a run saved for its adapter, beside it, wherever the run folder is now; None: the adapter names another."
    base = Path(adapter).absolute().parent / BASE
    return base if Path(_named_base(adapter)).name == BASE and (base / "config.json").is_file() else None


def save_base(
    run_dir: str | Path,
    model,         # for its configuration
    state: dict,   # the weights: the sum of an earlier base and its adapter, which exists nowhere else
    tokenizer,
) -> Path:
    "`base/`: what is frozen under the adapter, before it was quantized if it was."
    target = Path(run_dir) / BASE
    draft = target.with_name(f".draft-{target.name}")
    shutil.rmtree(draft, ignore_errors=True)
    noted = model.config.__dict__.pop("quantization_config", None)  # the state is that of before
    model.save_pretrained(draft, state_dict=state)
    if noted is not None:
        model.config.quantization_config = noted
    tokenizer.save_pretrained(draft)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(draft, target)
    return target


def trained_folder(
    run_dir: str | Path,
) -> Path | None:
    "Where the trained weights of a run are; None: they are not saved yet."
    return next((p for name in ("model", "adapter") if (p := Path(run_dir).expanduser() / name).is_dir()), None)


def is_reward_model(
    source: str | Path,  # of `model_source`
) -> bool:
    "Whether a folder holds a model that scores sequences."
    path = Path(source).expanduser() / "config.json"
    if not path.is_file():
        return False
    try:
        names = json.loads(path.read_text(encoding="utf-8")).get("architectures") or []
    except (ValueError, AttributeError, UnicodeDecodeError):
        return False
    return any(str(n).endswith("ForSequenceClassification") for n in names)


def save_trained(
    run_dir: str | Path,
    model,
    tokenizer,
    quant: tuple | None = None,  # how the base was stored, and the dtype that was quantized
    save=None,                   # (model, folder) -> None, for a model that does not save itself
) -> Path:
    "`adapter/` in PEFT's own format for a model with LoRA, else `model/`; safetensors and the tokenizer."
    from llm_train_course.app.adapters import write_quant
    from llm_train_course.lora import lora_layers, save_adapter

    adapted = bool(lora_layers(model))
    target = Path(run_dir) / ("adapter" if adapted else "model")
    draft = target.with_name(f".draft-{target.name}")
    shutil.rmtree(draft, ignore_errors=True)
    if adapted:
        base = Path(run_dir) / BASE
        save_adapter(model, draft, str(base.absolute()) if base.is_dir() else model.name_or_path)
        if quant:
            write_quant(draft, *quant)
    elif save:
        save(model, draft)
    else:
        model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(draft, target)
    return target


def model_source(
    name: str,  # what the user wrote: a run folder, a model folder, a hub name
) -> str:
    "What `load_model` can load, for a run folder too; a clear refusal for a folder that holds no model."
    path = Path(name).expanduser()
    if not path.is_dir():
        if path.exists():
            raise UserError(f"model: {name} is a file; a folder, a run folder or a hub name is needed")
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"model: {name}: no such folder")
        if path.parts[0] == "runs":
            raise UserError(f"model: {name}: no such run folder")
        return name
    if (path / CONFIG).is_file():
        found = trained_folder(path)
        if found is None:
            raise UserError(f"model: {name} is a run that has not finished: continue it with --resume {name}")
        return str(found)
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise UserError(f"model: {name}: the folder holds no model (no config.json, no adapter_config.json)")
    return str(path)


def load_any(
    name: str,                  # a run folder, a model or adapter folder, a hub name
    dtype: str | None = None,   # of the weights; None: fp32, or what the adapter's 4-bit base was made from
    merge: bool = False,        # an adapter: add it to the base's weights, which are dequantized where they are in 4 bits
    device="cpu",               # where a 4-bit base goes while it is made; the rest of a model stays on the CPU
):                              # model, tokenizer
    "A model and its tokenizer. An adapter is loaded onto its base: the one that the run saved beside it, else the one it names."
    from llm_train_course.app.adapters import load_base

    source = model_source(name)
    if is_reward_model(source):
        raise UserError(f"model: {name} is a reward model: it scores answers and writes none")
    if (Path(source) / "adapter_config.json").is_file():
        return _load_adapted(source, dtype, merge, device)
    model, tokenizer = load_base(source, dtype or "fp32")
    if merge and getattr(model, "_hf_peft_config_loaded", False):  # transformers follows an adapter's name to its base
        raise UserError(f"model: {name} is an adapter; to train on, download it and give the folder: hf download {name} --local-dir adapter")
    return model, tokenizer


def _load_adapted(source, dtype, merge, device):
    "An adapter on its base."
    from transformers import AutoTokenizer

    from llm_train_course.app import adapters

    quant, made_from = adapters.saved_quant(source)
    if quant and dtype and dtype != made_from and not merge:
        raise UserError(f"dtype: {source} was trained on a 4-bit base made from {made_from} weights: leave dtype out, got {dtype}")
    base = str(base_folder(source) or _named_base(source))
    model, tokenizer = adapters.load_base(base, made_from or dtype or "fp32", quant, device,
                                          f"the adapter {source} belongs to {base}, which cannot be loaded: ")
    model = adapters.put_on(model, Path(source))
    if (Path(source) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(source)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    if merge:
        model = adapters.merged(model, source, adapters.DTYPES[dtype] if dtype else None)
    return model, tokenizer


def _named_base(adapter):
    "The base that an adapter's configuration names."
    path = Path(adapter) / "adapter_config.json"
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as e:
        raise UserError(f"model: {path} names no base model (base_model_name_or_path)") from e
    if not named:
        raise UserError(f"model: {path}: base_model_name_or_path is {named!r}: write the base's name or folder there")
    return named
