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
    adapter = Path(adapter)
    named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    base = adapter.absolute().parent / BASE
    return base if named and Path(named).name == BASE and (base / "config.json").is_file() else None


def save_base(
    run_dir: str | Path,
    model,      # a peft model whose base exists nowhere else: the sum of an earlier base and its adapter
    tokenizer,
) -> Path:
    "`base/`: the frozen weights under the adapter, and the adapter's configuration told of them."
    target, base = Path(run_dir) / BASE, model.get_base_model()
    state = {k.replace(".base_layer.", "."): v for k, v in base.state_dict().items() if ".lora_" not in k}
    draft = target.with_name(f".draft-{target.name}")
    shutil.rmtree(draft, ignore_errors=True)
    base.save_pretrained(draft, state_dict=state)
    tokenizer.save_pretrained(draft)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(draft, target)
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(target.absolute())
    return target


def trained_folder(
    run_dir: str | Path,
) -> Path | None:
    "Where the trained weights of a run are; None: they are not saved yet."
    return next((p for name in ("model", "adapter") if (p := Path(run_dir).expanduser() / name).is_dir()), None)


def save_trained(
    run_dir: str | Path,
    model,
    tokenizer,
) -> Path:
    "`adapter/` in PEFT's own format for a peft model, else `model/`; safetensors and the tokenizer."
    target = Path(run_dir) / ("adapter" if hasattr(model, "peft_config") else "model")
    draft = target.with_name(f".draft-{target.name}")
    shutil.rmtree(draft, ignore_errors=True)
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
    name: str,             # a run folder, a model or adapter folder, a hub name
    dtype: str = "fp32",   # of the weights
    merge: bool = False,   # an adapter: add it to the base's weights
):                         # model, tokenizer
    "A model and its tokenizer. An adapter is loaded onto its base: the one that the run saved beside it, else the one it names."
    import torch

    from llm_train_course.app.data import hub_reachable
    from llm_train_course.core import load_model

    reachable = Path(name).expanduser().is_dir() or hub_reachable()
    source, kind = model_source(name), {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    adapter = Path(source) / "adapter_config.json"
    if not adapter.is_file():
        try:
            model, tokenizer = load_model(source, dtype=kind)
        except (OSError, ValueError, KeyError) as e:
            raise UserError(f"model: {' '.join(str(e).split())}" + ("" if reachable else " (the hub cannot be reached)")) from e
        if merge and getattr(model, "_hf_peft_config_loaded", False):  # transformers follows an adapter's name to its base
            raise UserError(f"model: {name} is an adapter; to train on, download it and give the folder: hf download {name} --local-dir adapter")
        return model, tokenizer
    from peft import PeftModel
    from transformers import AutoTokenizer

    base = str(base_folder(source) or json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
    try:
        model, tokenizer = load_model(base, dtype=kind)
    except (OSError, ValueError) as e:
        raise UserError(f"model: the adapter {source} belongs to {base}, which cannot be loaded ({' '.join(str(e).split())})") from e
    model = PeftModel.from_pretrained(model, source)
    if (Path(source) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(source)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    if merge and model.config.tie_word_embeddings and any(hasattr(m, "base_layer") for m in (
            model.get_base_model().get_input_embeddings(), model.get_base_model().get_output_embeddings())):
        raise UserError(f"model: the adapter {source} changes an embedding that is also the output matrix: merged, it would be "
                        "another model; fine-tune its base with other lora.targets")
    if merge:  # peft leaves the base frozen
        model = model.merge_and_unload().requires_grad_(True)
    return model, tokenizer
