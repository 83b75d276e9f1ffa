"""LoRA adapters and 4-bit bases: how a run puts them on a model, how they come back from disk, and how they are merged.

An adapter's folder is PEFT's own. Beside it a run on a 4-bit base writes quantization.json: what is under the adapter is
part of what was trained, and PEFT's files do not say it.
"""
import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from llm_train_course.app import runs
from llm_train_course.app.runs import UserError
from llm_train_course.lora import add_lora, dense_weight, load_adapter, lora_layers
from llm_train_course.qlora import BLOCKSIZES, quantize_model, quantized_layers

QUANTIZATION = "quantization.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LoraSpec:
    "Low-rank adapters, chapter 3."
    r: int = 8                               # rank
    alpha: float = 16.0                      # the update is scaled by alpha / r
    targets: str | list[str] = "all-linear"  # all-linear, a list of layer names such as [q_proj, v_proj], or a regular expression
    dropout: float = 0.0                     # on the adapter's input
    use_rslora: bool = False                 # scale by alpha / sqrt(r) instead


@dataclass(frozen=True)
class QuantSpec:
    "The frozen base in 4 bits, chapter 4; every linear layer but the output head."
    quant_type: Literal["nf4", "fp4"] = "nf4"  # the sixteen levels
    blocksize: int = 64                        # numbers that share a constant: 32, 64, ... or 4096
    double_quant: bool = True                  # the constants are quantized too
    backend: Literal["auto", "own", "bitsandbytes"] = "auto"  # of the arithmetic; auto: bitsandbytes on CUDA, own on a CPU


def check_specs(
    lora: LoraSpec | None,
    quant: QuantSpec | None,
) -> None:
    "What can be refused before a model is read."
    def need(ok, name, value, what):
        if not ok:
            raise UserError(f"{name} must be {what}, got {value!r}")
    if lora:
        need(lora.r >= 1, "lora.r", lora.r, "at least 1")
        need(lora.alpha > 0 and math.isfinite(lora.alpha), "lora.alpha", lora.alpha, "positive")
        need(0 <= lora.dropout < 1, "lora.dropout", lora.dropout, "in [0, 1)")
        need(bool(lora.targets), "lora.targets", lora.targets, "all-linear, a list of layer names, or a regular expression")
        if isinstance(lora.targets, str):
            try:
                re.compile(lora.targets)
            except re.error as e:
                raise UserError(f"lora.targets: {lora.targets!r} is not a regular expression: {e}") from e
    if quant:
        need(quant.blocksize in BLOCKSIZES, "quant.blocksize", quant.blocksize, f"one of {', '.join(map(str, BLOCKSIZES))}")
        if quant.backend == "bitsandbytes" and find_spec("bitsandbytes") is None:
            raise UserError("quant.backend: bitsandbytes is not installed (pip install bitsandbytes), own needs nothing")


# ---------------------------------------------------------------------------------------------------------------------
# 4-bit bases
# ---------------------------------------------------------------------------------------------------------------------
def is_quantized(
    source: str,  # a folder or a hub name
) -> str | None:  # its method; None: it is not
    "Whether a checkpoint holds quantized weights already."
    config = Path(source).expanduser() / "config.json"
    if config.is_file():
        found = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    elif source == "smollm2" or (Path(source).expanduser() / "adapter_config.json").is_file():
        return None
    else:
        from transformers import AutoConfig
        try:
            found = getattr(AutoConfig.from_pretrained(source), "quantization_config", None)
        except (OSError, ValueError, KeyError):  # what is wrong with the name is said where the model is loaded
            return None
    return found and str(found.get("quant_method", "?"))


def backend_of(
    quant: QuantSpec,
    device,
) -> str:  # own or bitsandbytes
    "What `auto` means on a device."
    if quant.backend != "auto":
        return quant.backend
    return "bitsandbytes" if torch.device(device).type == "cuda" else "own"


def load_base(
    source: str,                # a model folder, a hub name, or smollm2
    dtype: str = "fp32",        # of the weights
    quant: QuantSpec | None = None,
    device="cpu",               # where a 4-bit base is put, layer by layer; others stay on the CPU
    what: str = "",             # said before what went wrong
):                              # model, tokenizer
    "A base and its tokenizer, in 4 bits if `quant` says so. bitsandbytes' layers are quantized while the file is read."
    from llm_train_course.app.data import hub_reachable

    if runs.is_reward_model(source):
        raise UserError(f"model: {what}{source} is a reward model: it scores answers and writes none")
    reachable = Path(source).expanduser().is_dir() or hub_reachable()
    try:
        return _load_base(source, dtype, quant, device)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"model: {what}{' '.join(str(e).split())}" + ("" if reachable else " (the hub cannot be reached)")) from e


def _load_base(source, dtype, quant, device):
    from llm_train_course.core import load_model

    if quant is None:
        model, tokenizer = load_model(source, dtype=DTYPES[dtype])
        return _steady(model), tokenizer
    method = is_quantized(source)
    if method:
        raise UserError(f"quant: {source} is quantized already ({method}): llm-train lora trains adapters on it as it is")
    # transformers quantizes tensor by tensor as they are read, so that a 70B model never stands in memory in 16 bits; it
    # knows one block size
    if backend_of(quant, device) == "bitsandbytes" and quant.blocksize == 64 and source != "smollm2":
        return _load_with_bitsandbytes(source, dtype, quant, device)
    model, tokenizer = load_model(source, dtype=DTYPES[dtype])
    return quantized(model, quant, device), tokenizer


def _load_with_bitsandbytes(source, dtype, quant, device):
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant.quant_type, bnb_4bit_compute_dtype=DTYPES[dtype],
                                bnb_4bit_use_double_quant=quant.double_quant)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype], quantization_config=config, device_map={"": str(device)})
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return _steady(model), tokenizer


def quantized(
    model,  # changed in place, layer by layer
    quant: QuantSpec,
    device="cpu",
):
    "The model with a 4-bit base."
    backend = backend_of(quant, device)
    try:  # bitsandbytes' layers keep the dtype they are told or see first; ours follow autocast
        quantize_model(model, blocksize=quant.blocksize, quant_type=quant.quant_type, double_quant=quant.double_quant,
                       compute_dtype=model.dtype if backend == "bitsandbytes" else None, backend=backend, device=device)
    except ValueError as e:
        raise UserError(f"quant: {' '.join(str(e).split())}") from e
    return _steady(model)


def _steady(model):
    """bitsandbytes' CPU kernels, kept to what they get right.

    One repacks codes in place at the first evaluation: a checkpoint's fingerprint of the base would change. One decodes
    rows that do not end with a block by the constants of other blocks (seen in 0.50.2)."""
    for name, layer in quantized_layers(model).items():
        if layer.weight.device.type != "cpu" or not hasattr(layer.weight, "quant_state"):
            continue
        layer.support_avx512bf16_for_cpu = False
        if layer.in_features % layer.weight.blocksize:
            raise UserError(f"quant.blocksize: bitsandbytes on a CPU misreads {name}, whose rows of {layer.in_features} numbers are not whole "
                            f"blocks of {layer.weight.blocksize}: take quant.backend own")
    return model


def weight_bytes(
    model,
) -> int:
    "Bytes of the base's weights in memory, constants and tables of 4-bit layers counted; adapters are not."
    found = quantized_layers(model)
    codes = {id(m.weight) for m in found.values()}
    total = sum(p.numel() * p.element_size() for n, p in model.named_parameters()
                if id(p) not in codes and not n.endswith((".lora_A", ".lora_B")))
    return total + sum(_quantized_bytes(m) for m in found.values())


def _quantized_bytes(layer):
    "Codes, constants and tables of a 4-bit weight."
    if hasattr(layer, "quantized_bytes"):
        return layer.quantized_bytes
    state = layer.weight.quant_state  # bitsandbytes'; the mean of the constants is a number there
    tensors = [layer.weight, *(v for v in state.as_dict().values() if isinstance(v, torch.Tensor))]
    return sum(t.numel() * t.element_size() for t in tensors) + 4 * state.nested


# ---------------------------------------------------------------------------------------------------------------------
# adapters
# ---------------------------------------------------------------------------------------------------------------------
def with_adapter(
    model,  # changed in place
    spec: LoraSpec,
):
    "The model with our LoRA on it; a target that fits no layer is refused by name."
    if isinstance(spec.targets, list):
        names = [n for n, _ in model.named_modules()]
        missing = [t for t in spec.targets if not any(n == t or n.endswith(f".{t}") for n in names)]
        if missing:
            raise UserError(f"lora.targets: the model has no layer {', '.join(missing)}; it has {_linear_names(model)}")
    try:
        add_lora(model, spec.r, spec.alpha, spec.targets, spec.dropout, spec.use_rslora)
    except ValueError as e:
        raise UserError(f"lora.targets: {' '.join(str(e).split())}") from e
    return model


def _linear_names(model):
    head = model.get_output_embeddings()
    return ", ".join(sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules()
                             if (isinstance(m, nn.Linear) or n in quantized_layers(model)) and m is not head}))


def put_on(
    model,           # the base; changed in place
    folder: Path,    # of the adapter
):                   # the model, or PEFT's around it
    "A saved adapter on its base: by our own code, or by peft where the adapter has what ours does not."
    try:
        load_adapter(model, folder)
        return model
    except ValueError as e:
        words = " ".join(str(e).split())
        if not _for_peft(folder, words):
            raise UserError(f"model: {words}") from e
        if find_spec("peft") is None:
            raise UserError(f"model: {words}; peft may know it (pip install peft)") from e
    from peft import PeftModel
    try:
        return PeftModel.from_pretrained(model, folder)
    except (ValueError, TypeError, KeyError, RuntimeError) as e:
        raise UserError(f"model: the adapter {folder} cannot be put on its base: {' '.join(str(e).split())[:400]}") from e


def _for_peft(folder, words):
    "Whether a refusal is about a kind of adapter (peft may know it) and not about a broken file (peft would only warn)."
    if "is not JSON" in words or "not the fields of an adapter" in words or "adapter_config.json is missing" in words:
        return False
    if "adapter_model.safetensors" not in words:
        return True
    if "is missing" in words and (folder / "adapter_model.bin").is_file():  # the format of old adapters
        return True
    return "belongs to no layer" in words and ".lora_" not in words  # an embedding saved along


def saved_quant(
    folder: str | Path,  # of an adapter
) -> tuple[QuantSpec | None, str | None]:  # of its base; the dtype that was quantized
    "What quantization.json says: the base of the adapter as it was trained on."
    path = Path(folder) / QUANTIZATION
    if not path.is_file():
        return None, None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        dtype = found.pop("dtype")
        quant = QuantSpec(**{f.name: found[f.name] for f in fields(QuantSpec)})
        DTYPES[dtype]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"model: {path} cannot be read ({type(e).__name__}: {e})") from e
    check_specs(None, quant)
    return quant, dtype


def write_quant(
    folder: Path,  # of an adapter
    quant: QuantSpec,
    dtype: str,
) -> None:
    "quantization.json."
    runs.write_text(folder / QUANTIZATION, json.dumps({**asdict(quant), "dtype": dtype}, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# merging
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def make_dense(
    model,                           # with our LoRA, with a 4-bit base, or both; changed in place
    dtype: torch.dtype | None = None,  # of all weights; None: each layer's own
):
    """Plain layers: the base (dequantized where it is in 4 bits) plus the update, added in float32 and rounded once.

    A merged 4-bit layer is not quantized again: rounded to sixteen levels once more, it would be another model."""
    adapted = lora_layers(model)
    codes = quantized_layers(model)
    inside = {f"{name}.base_layer" for name in adapted}
    found = {**adapted, **{n: m for n, m in codes.items() if n not in inside}}
    for name, layer in found.items():
        base = layer.base_layer if name in adapted else layer
        weight = dense_weight(base)
        if name in adapted:
            kind = torch.promote_types(weight.dtype, torch.float32)
            weight = (weight.to(kind) + layer.delta_weight().to(kind)).to(dtype or weight.dtype)
        plain = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.to("cpu", dtype or weight.dtype))  # a GPU that held 4 bits may not hold 16
        if base.bias is not None:
            plain.bias = nn.Parameter(base.bias.detach().to(plain.weight.device, dtype or base.bias.dtype))
        if not plain.weight.isfinite().all():
            raise UserError(f"dtype: {str(plain.weight.dtype).removeprefix('torch.')} cannot hold the merged weight of {name}: "
                            "take fp32 or bf16")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain.train(layer.training))
    if codes:
        if getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = False
        model.config.__dict__.pop("quantization_config", None)
    model = model.to("cpu")
    model = model.to(dtype) if dtype else model
    return model.requires_grad_(True)


def merged(
    model,                             # with our LoRA or PEFT's; changed in place
    source: str,                       # the adapter's folder, for messages
    dtype: torch.dtype | None = None,  # of all weights; None: each layer's own
):
    "The model with its adapter in its weights, all of them trainable."
    if not hasattr(model, "peft_config"):
        return make_dense(model, dtype)
    base = model.get_base_model()
    if base.config.tie_word_embeddings and any(hasattr(m, "base_layer") for m in (base.get_input_embeddings(), base.get_output_embeddings())):
        raise UserError(f"model: the adapter {source} changes an embedding that is also the output matrix: merged, it would be "
                        "another model; fine-tune its base with other lora.targets")
    if quantized_layers(base):
        raise UserError(f"model: the adapter {source} needs peft, which would merge it into 4 bits again")
    model = model.merge_and_unload().requires_grad_(True)  # peft leaves the base frozen
    return model.to(dtype) if dtype else model


def merge_run(
    name: str,                 # a run folder or an adapter folder
    out: str | None = None,    # folder of the model; None: beside it, with -merged behind its name
    dtype: str | None = None,  # of its weights; None: that of the run's
    cpu: bool = False,
) -> int:                      # exit code
    "`llm-train merge`."
    source = Path(runs.model_source(name))
    if not source.is_dir():
        raise UserError(f"{name}: a run folder or an adapter's folder is needed (hf download {name} --local-dir adapter)")
    if not (source / "adapter_config.json").is_file():
        what = "trained all parameters" if (Path(name).expanduser() / runs.CONFIG).is_file() else "is a whole model"
        raise UserError(f"{name} {what}: there is no adapter to merge")
    given = Path(name).expanduser()
    target = Path(out).expanduser() if out else Path(os.path.normpath(given) + "-merged")
    if target.exists():
        raise UserError(f"out: {target} exists: name another folder with --out")
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    quant, kept = saved_quant(source)
    model, tokenizer = runs.load_any(str(source), kept or _run_dtype(given), device=device)
    dtype = dtype or kept or _run_dtype(given)
    ids = _prompt(given, source, tokenizer, model)
    layers = len(lora_layers(model)) or sum(hasattr(m, "base_layer") for m in model.modules())
    base_bytes = weight_bytes(model)
    want = _logits(model.eval(), ids)
    model = merged(model, str(source), DTYPES[dtype])
    model.config.dtype = DTYPES[dtype]
    size = weight_bytes(model)
    draft = target.with_name(f".draft-{target.name}-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        del model
        got = _saved_logits(draft, ids, dtype)
        os.rename(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    base = f"a 4-bit base ({quant.quant_type}) of {base_bytes:,} bytes, dequantized" if quant else "its base"
    arithmetic = "bf16" if dtype == "bf16" else "fp32"
    print(f"merged   {layers} adapted layers into {base}; {dtype}, {size:,} bytes of weights")
    print(f"logits   differ from the unmerged ones by at most {(got - want).abs().max().item():.3g} in {arithmetic} arithmetic "
          f"(largest logit {want.abs().max().item():.3g}); the most likely token is the same at {int((got.argmax(-1) == want.argmax(-1)).sum())} of "
          f"{ids.shape[1]} positions of a prompt")
    print(f"saved    {target}\ntry it   llm-train chat {target}")
    return 0


def _run_dtype(folder):
    "Of a run's weights."
    path = folder if (folder / runs.CONFIG).is_file() else folder.absolute().parent
    if (path / runs.CONFIG).is_file():
        return runs.read_config(path).get("dtype") or "fp32"
    return "fp32"


def _prompt(given, source, tokenizer, model):
    "Tokens to compare logits on: a prompt of the run's data with its answer, else a sentence."
    from llm_train_course.app.chat import prompt_ids

    run = given if (given / runs.CONFIG).is_file() else source.absolute().parent
    results = runs.read_results(run)
    prompt = next(iter(results.get("prompts", [])), "A low-rank update is added to the weights of")
    ids = prompt_ids(tokenizer, prompt)
    reference = next(iter(results.get("references", [])), "")
    ids = [*ids, *tokenizer(reference, add_special_tokens=False).input_ids][:getattr(model.config, "max_position_embeddings", None) or 512]
    return torch.tensor([ids[:512]])


def _logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids.to(next(model.parameters()).device)).logits.float().cpu()


def _saved_logits(folder, ids, dtype):
    "Logits of what was saved, by transformers alone."
    from transformers import AutoModelForCausalLM

    kind = torch.float32 if dtype == "fp16" else DTYPES[dtype]  # a CPU multiplies float16 a hundred times slower; the values are the same
    return _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval(), ids)
