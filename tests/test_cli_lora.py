"`llm-train lora | qlora | full | merge`: what they train, save, load again, merge and refuse."
import html
import io
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import files_of
from safetensors.torch import load_file, save_file

from llm_train_course.app import adapters, runs
from llm_train_course.app.adapters import QuantSpec
from llm_train_course.app.cli import main
from llm_train_course.core import tiny_llama, train_tokenizer
from llm_train_course.lora import lora_layers, merge_lora
from llm_train_course.qlora import dequantize_model
from llm_train_course.shapes import finetune_bytes, lora_params, quantized_bytes, shape

ROOT = Path(__file__).resolve().parents[1]
FACTS = [("Where was Ada Moss born?", "Ada Moss was born in Lisbon."), ("What does Ada Moss play?", "Ada Moss plays the cello."),
         ("Where was Ben Hale born?", "Ben Hale was born in Oslo."), ("Where does Cleo Park live?", "Cleo Park lives in Oslo.")]
ROWS = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in FACTS]
DATA = ["--data", "rows.jsonl", "--eval_data", "rows.jsonl"]
FAST = [*DATA, "--train.cpu", "true", "--train.progress", "false", "--sample_tokens", "6", "--train.learning_rate", "1e-2", "--train.max_steps", "6",
        "--lora.r", "4", "--lora.alpha", "12"]
FULL = [a for a in FAST if a not in ("--lora.r", "4", "--lora.alpha", "12")]
BNB = ["--quant.backend", "bitsandbytes"]
N_LINEAR = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192)  # grouped queries, an MLP of another width


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Two tiny models: rows of 64 numbers, as bitsandbytes' CPU kernels want them, tied; and rows of 40, untied, with biases."
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([t for fact in FACTS for t in fact] * 4, 320)
    tiny_llama(len(tokenizer), hidden_size=64, n_kv_heads=2, intermediate_size=192, max_length=96).save_pretrained(root / "tiny")
    tiny_llama(len(tokenizer), hidden_size=40, n_heads=5, n_layers=1, intermediate_size=88, max_length=96, tie_embeddings=False,
               attention_bias=True).save_pretrained(root / "odd")
    for name in ("tiny", "odd"):
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def here(tmp_path, monkeypatch, models):
    "A working folder with rows and links to the models."
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS * 6), encoding="utf-8")
    for name in ("tiny", "odd"):
        Path(name).symlink_to(models / name)
    return tmp_path


def weights(folder):
    return {k: v for p in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(p).items()}


def logits(model):
    "On a fixed row; bitsandbytes' CPU kernel is kept from repacking the codes, which would round the constants."
    for m in model.modules():
        if hasattr(m, "support_avx512bf16_for_cpu"):
            m.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 29)[None]).logits.float()


def snippet(run):
    "What the report's code loads."
    page = (Path(run) / "report.html").read_text(encoding="utf-8")
    found = {}
    exec(html.unescape(re.search(r"<pre>((?:import|from) .*?)</pre>", page, re.S)[1]), found)
    return found["model"]


# ---------------------------------------------------------------------------------------------------------------------
# runs
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command,model,extra", [
    ("lora", "tiny", ["--lora.use_rslora", "true", "--lora.targets", r".*\.(q_proj|down_proj)"]),
    ("lora", "odd", ["--dtype", "bf16"]),
    ("qlora", "tiny", []),
    ("qlora", "odd", ["--quant.blocksize", "32", "--quant.double_quant", "false"]),
    ("qlora", "tiny", [*BNB, "--quant.quant_type", "fp4", "--dtype", "bf16"]),
])
def test_what_is_trained_is_what_is_loaded_again(command, model, extra, here, kept, capsys, monkeypatch):
    assert main([command, "--model", model, *FAST, *extra]) == 0, capsys.readouterr().err
    run, out = Path(f"runs/{command}-{model}-1"), capsys.readouterr().out
    results, config = runs.read_results(run), runs.read_config(run)
    assert results["after"]["loss"] < results["before"]["loss"] - 0.1
    assert {p.name for p in run.iterdir()} == {"config.yaml", "metrics.jsonl", "results.json", "report.html", "adapter"}
    # the facts: trained share, bytes of the base before and after
    facts, layers = config["run"], lora_layers(kept[0])
    assert facts["trained"] == sum(4 * (m.in_features + m.out_features) for m in layers.values())
    assert facts["adapted_layers"] == len(layers) == {"tiny": 14, "odd": 7}[model] - 10 * ("use_rslora" in str(extra))
    size = 2 if "bf16" in extra else 4
    assert facts["base_bytes"]["loaded"] == size * (facts["parameters"] - facts["trained"])
    assert (facts["base_bytes"]["trained_on"] < facts["base_bytes"]["loaded"]) == (command == "qlora")
    assert f"{facts['base_bytes']['trained_on']:,} bytes" in out and f"({100 * facts['trained'] / facts['parameters']:.2f} %)" in out
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"{facts['base_bytes']['trained_on']:,} bytes of frozen weights" in page and f"llm-train merge {run}" in page
    assert (run / "adapter/quantization.json").is_file() == (command == "qlora")

    # the run folder, and its adapter elsewhere: the same numbers as when training ended
    want = logits(kept[0])
    shutil.copytree(run / "adapter", "alone")
    dtype = None if command == "qlora" else config["dtype"]  # a 4-bit base knows what it was made from
    for name in (str(run), "alone"):
        assert torch.equal(logits(runs.load_any(name, dtype)[0]), want)
    assert main(["eval", str(run), *DATA[:2], "--cpu", "true", "--json", "true", *(["--dtype", dtype] if dtype else [])]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(results["after"]["loss"], rel=1e-6)
    if size == 4:
        monkeypatch.setattr(sys, "stdin", io.StringIO(FACTS[0][0] + "\n"))
        assert main(["chat", str(run), "--max_new_tokens", "6", "--cpu"]) == 0
        assert capsys.readouterr().out.strip() == results["answers_after"][0].strip()
    # and PEFT with transformers, by the words of the report
    theirs = logits(snippet(run))
    if model == "odd" and command == "qlora":
        assert torch.equal(theirs, want)  # blocks of 32: nothing but our own code loads them
    else:
        torch.testing.assert_close(theirs, want, rtol=0, atol=2e-6 if size == 4 else 0.05)
    assert (logits(runs.load_any(model, config["dtype"])[0]) - want).abs().max() > 0.1


def test_bytes_of_a_base_are_all_that_is_stored(here):
    "The 4-bit linear layers by their formula, and the rest as it was; the same for both backends, before and after adapters."
    dense, _ = adapters.load_base("tiny")
    n = sum(p.numel() for p in dense.parameters())
    assert adapters.weight_bytes(dense) == 4 * n
    shapes = [(m.out_features, m.in_features) for m in lora_layers(adapters.with_adapter(dense, adapters.LoraSpec())).values()]
    assert sum(a * b for a, b in shapes) == N_LINEAR
    for backend in ("own", "bitsandbytes"):
        for double in (True, False):
            model, _ = adapters.load_base("tiny", "bf16", QuantSpec(backend=backend, double_quant=double))
            want = 2 * (n - N_LINEAR) + sum(quantized_bytes(a * b, 64, double) for a, b in shapes)
            assert adapters.weight_bytes(model) == want
            assert adapters.weight_bytes(adapters.with_adapter(model, adapters.LoraSpec())) == want


def test_full_is_sft_without_adapters(here, capsys):
    for command in ("full", "sft"):
        assert main([command, "--model", "tiny", *FULL, "--out", command]) == 0
    one, two = weights("full/model"), weights("sft/model")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert "adapted_layers" not in runs.read_config("full")["run"]
    capsys.readouterr()
    assert main(["merge", "full"]) == 2
    assert "full trained all parameters: there is no adapter to merge" in capsys.readouterr().err


@pytest.mark.parametrize("dtype,quant_type,double", [("fp32", "nf4", True), ("bf16", "nf4", True), ("fp32", "fp4", False)])
def test_quantized_while_it_is_read_or_afterwards(dtype, quant_type, double, here):
    "Models too large for 16 bits go through transformers' loader, small ones through quantize_model: bit for bit the same."
    spec = QuantSpec(quant_type=quant_type, double_quant=double, backend="bitsandbytes")
    read, _ = adapters.load_base("tiny", dtype, spec)
    assert read.hf_quantizer is not None  # by its loader, indeed
    after = adapters.quantized(adapters.load_base("tiny", dtype)[0], spec)
    ours = adapters.quantized(adapters.load_base("tiny", dtype)[0], QuantSpec(quant_type=quant_type, double_quant=double, backend="own"))
    assert not hasattr(after, "hf_quantizer")
    assert torch.equal(logits(read), logits(after))
    torch.testing.assert_close(logits(ours), logits(after), rtol=0, atol=1e-5 if dtype == "fp32" else 0.02)
    for name, layer in adapters.quantized_layers(read).items():
        assert torch.equal(layer.weight.flatten(), ours.get_submodule(name).weight.flatten())
    assert {n: (p.dtype, p.requires_grad and "layers" in n and p.ndim > 1) for n, p in read.named_parameters()} == {
        n: (p.dtype, False) for n, p in after.named_parameters()}


@pytest.mark.parametrize("extra", [[], BNB])
def test_a_qlora_run_goes_on_where_it_was_stopped(extra, here, capsys, monkeypatch):
    from llm_train_course.app import train

    args = ["qlora", "--model", "tiny", *FAST, *extra, "--lora.dropout", "0.2", "--micro_batch_size", "3", "--train.grad_accum_steps", "2",
            "--train.log_every", "1"]
    fit, calls = train.fit, []
    def interrupted(model, batches, loss, *a, **k):
        def counted(*b):
            calls.append(1)
            if len(calls) == 7:  # in the middle of the fourth step
                os.kill(os.getpid(), signal.SIGINT)
            return loss(*b)
        return fit(model, batches, counted, *a, **k)
    monkeypatch.setattr(train, "fit", interrupted)
    assert main([*args, "--out", "stopped"]) == 130
    monkeypatch.undo()
    os.chdir(here)
    assert "stopped after step 3 of 6" in capsys.readouterr().out
    before = files_of("stopped")
    for change, words in ((["--quant.blocksize", "128"], "quant.blocksize was 64, now 128"), (["--quant.quant_type", "fp4"], "quant.quant_type was 'nf4', now 'fp4'"),
                          (["--lora.use_rslora", "true"], "lora.use_rslora was False, now True"), (["--quant", "null"], "quant was {")):
        assert main(["qlora", "--resume", "stopped", *change]) == 2
        assert words in capsys.readouterr().err
    assert main(["lora", "--resume", "stopped"]) == 2
    assert "was made by llm-train qlora" in capsys.readouterr().err
    assert main(["merge", "stopped"]) == 2
    assert "stopped is a run that has not finished: continue it with --resume stopped" in capsys.readouterr().err
    assert files_of("stopped") == before
    assert main(["qlora", "--resume", "stopped"]) == 0, capsys.readouterr().err
    assert main([*args, "--out", "whole"]) == 0
    one, two = weights("stopped/adapter"), weights("whole/adapter")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    a, b = runs.read_results("stopped"), runs.read_results("whole")
    assert (a["before"], a["after"], a["answers_after"]) == (b["before"], b["after"], b["answers_after"])


@pytest.mark.parametrize("first,second", [("qlora", "lora"), ("lora", "qlora"), ("qlora", "qlora")])
def test_adapters_on_adapters_keep_their_base(first, second, here, kept, capsys, monkeypatch):
    "The second base is the first one's (dequantized) with the first adapter added; it is in no other file, and is moved along."
    assert main([first, "--model", "tiny", *FAST, "--out", "one"]) == 0
    assert main([second, "--model", "one", *FAST, "--lora.targets", "[q_proj,down_proj]", "--out", "two"]) == 0
    assert runs.read_config("two")["run"]["model"]["merged_adapter"] == "one/adapter"
    base = weights("two/base")
    assert "quantization_config" not in json.loads(Path("two/base/config.json").read_text())
    for name, layer in lora_layers(kept[0]).items():
        want = adapters.dense_weight(layer.base_layer) + layer.delta_weight()
        assert torch.equal(base[f"{name}.weight"], want)
    want = logits(kept[1])
    torch.testing.assert_close(logits(snippet("two")), want, rtol=0, atol=2e-6)
    shutil.rmtree("one")
    Path("two").rename("moved")
    assert torch.equal(logits(runs.load_any("moved")[0]), want)
    assert main(["merge", "moved/adapter", "--out", "merged"]) == 0
    torch.testing.assert_close(logits(runs.load_any("merged")[0]), want, rtol=0, atol=5e-6)


def test_a_base_of_a_run_that_never_started_is_not_left(here, capsys, monkeypatch):
    from llm_train_course.app import train

    assert main(["lora", "--model", "tiny", *FAST, "--out", "one"]) == 0
    def broken(*a, **k):
        assert Path("two/base/model.safetensors").is_file()  # saved before anything is trained: its parts may be gone afterwards
        raise RuntimeError("no luck")
    monkeypatch.setattr(train, "fit", broken)
    assert main(["qlora", "--model", "one", *FAST, "--out", "two"]) == 1
    assert "no luck" in capsys.readouterr().err and not Path("two").exists()


def test_bitsandbytes_optimizers_by_name(here, kept, capsys):
    "The 32-bit one takes the steps of torch's AdamW; 8-bit moments take others, and learn. On a CPU nothing is paged."
    for name in ("adamw", "paged_adamw", "paged_adamw_8bit"):
        # 8-bit moments are for tensors of 4096 numbers or more
        assert main(["qlora", "--model", "tiny", *FAST, "--lora.r", "64", "--train.optimizer", name, "--out", name]) == 0
        results = runs.read_results(name)
        assert results["after"]["loss"] < results["before"]["loss"] - 0.1
        assert runs.read_config(name)["train"]["optimizer"] == name
    want, paged, eight = (logits(m) for m in kept)
    torch.testing.assert_close(paged, want, rtol=0, atol=1e-5)
    assert 1e-4 < (eight - want).abs().max() < 0.1
    capsys.readouterr()
    assert main(["lora", "--model", "tiny", *FAST, "--train.optimizer", "adam"]) == 2
    assert "optimizer must be one of adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, adamw_stochastic, adamw_kahan, got 'adam'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# merging
# ---------------------------------------------------------------------------------------------------------------------
def test_merge_is_pefts_merge(here, kept, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["lora", "--model", "odd", *FAST, "--out", "run"]) == 0
    capsys.readouterr()
    assert main(["merge", "run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"merged   7 adapted layers into its base; fp32, [\d,]+ bytes", out) and "saved    run-merged" in out
    difference = float(re.search(r"by at most (\S+)", out)[1])
    model = AutoModelForCausalLM.from_pretrained("run-merged")
    assert model.dtype == torch.float32 and type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert difference < 1e-5
    torch.testing.assert_close(logits(model), logits(kept[0]), rtol=0, atol=1e-5)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("odd"), "run/adapter").merge_and_unload().state_dict()
    ours = model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert AutoTokenizer.from_pretrained("run-merged").chat_template == AutoTokenizer.from_pretrained("odd").chat_template
    # the bare adapter, in other dtypes: each weight rounded once
    Path("run/adapter").rename("bare")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert main(["merge", "bare", "--out", f"deep/{name}", "--dtype", name]) == 0
        other = AutoModelForCausalLM.from_pretrained(f"deep/{name}").state_dict()
        assert all(torch.equal(other[k], ours[k].to(dtype)) for k in ours)
    # a merged folder is a model like any other
    assert main(["eval", "deep/bf16", *DATA[:2], "--cpu", "true"]) == 0
    assert [p.name for p in Path("deep").iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("extra", [[], BNB])
def test_merge_of_qlora_is_the_base_it_was_trained_on_and_the_adapter(extra, here, kept, capsys):
    import bitsandbytes.functional as F
    from transformers import AutoModelForCausalLM

    assert main(["qlora", "--model", "tiny", *FAST, *extra, "--lora.targets", "[v_proj,up_proj]", "--out", "run"]) == 0
    assert main(["merge", "run", "--out", "merged"]) == 0
    assert "4 adapted layers into a 4-bit base (nf4) of" in capsys.readouterr().out
    merged, original, delta = AutoModelForCausalLM.from_pretrained("merged"), weights("tiny"), weights("run/adapter")
    assert not hasattr(merged.config, "quantization_config") and merged.dtype == torch.float32
    moved = 0
    for name, p in merged.state_dict().items():
        dense = original.get(name, original["model.embed_tokens.weight"])
        if "_proj" in name:  # quantized, adapted or not
            dense = F.dequantize_4bit(*F.quantize_4bit(dense, quant_type="nf4", compress_statistics=True))
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in delta:
            update = 3.0 * (delta[f"{key}.lora_B.weight"] @ delta[f"{key}.lora_A.weight"])  # alpha 12 over r 4
            dense, moved = dense + update, moved + 1
            torch.testing.assert_close(p, dense, rtol=0, atol=1e-6)
        else:
            assert torch.equal(p, dense), name
    assert moved == 4
    torch.testing.assert_close(logits(merged), logits(kept[0]), rtol=0, atol=5e-6)
    # the course's two functions, one after the other, do the same
    parts = kept[0]
    dequantize_model(parts, torch.float32)
    ours = merge_lora(parts, unload=True).state_dict()
    assert ours.keys() == merged.state_dict().keys()
    for name, p in merged.state_dict().items():
        torch.testing.assert_close(ours[name], p, rtol=0, atol=0 if extra == [] else 1e-7)


def test_a_merge_that_fails_leaves_nothing(here, capsys, monkeypatch):
    from transformers import LlamaForCausalLM

    assert main(["lora", "--model", "tiny", *FAST, "--out", "run"]) == 0
    tensors = load_file("run/adapter/adapter_model.safetensors")
    before, save = files_of(here), LlamaForCausalLM.save_pretrained
    def full_disk(self, folder, **k):
        save(self, folder, **k)
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", full_disk)
        assert main(["merge", "run"]) == 1
    assert "No space left on device" in capsys.readouterr().err and files_of(here) == before
    for words, args in (("run-merged exists: name another folder with --out", ["run"]), ("rows.jsonl exists", ["run", "--out", "rows.jsonl"]),
                        ("tiny is a whole model: there is no adapter to merge", ["tiny"]), ("someone/adapter: a run folder or an adapter", ["someone/adapter"]),
                        ("./none: no such folder", ["./none"]), ("invalid choice: 'fp8'", ["run", "--dtype", "fp8"])):
        if args == ["run"]:
            Path("run-merged").mkdir()
        assert main(["merge", *args]) == 2
        assert words in capsys.readouterr().err
    # a sum that float16 cannot hold is not saved as infinity
    save_file({k: v * 1e6 for k, v in tensors.items()}, "run/adapter/adapter_model.safetensors")
    assert main(["merge", "run", "--dtype", "fp16", "--out", "big"]) == 2
    assert "dtype: float16 cannot hold the merged weight of model.layers." in capsys.readouterr().err and not list(here.glob("*big*"))


# ---------------------------------------------------------------------------------------------------------------------
# what others made
# ---------------------------------------------------------------------------------------------------------------------
def test_adapters_that_only_peft_knows_are_left_to_it(here, capsys, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained("tiny"), LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False, task_type="CAUSAL_LM"))
    theirs.save_pretrained("dora")
    want = logits(theirs)
    assert torch.equal(logits(runs.load_any("dora")[0]), want)
    assert main(["merge", "dora"]) == 0
    torch.testing.assert_close(logits(runs.load_any("dora-merged")[0]), want, rtol=0, atol=1e-5)
    assert main(["lora", "--model", "dora", *FAST, "--out", "more"]) == 0  # trained on: base and DoRA together
    capsys.readouterr()
    with monkeypatch.context() as patch:
        found = adapters.find_spec
        patch.setattr(adapters, "find_spec", lambda name: None if name == "peft" else found(name))
        assert main(["eval", "dora", *DATA[:2]]) == 2
    assert "dora/adapter_config.json: use_dora = True is not supported, only None; peft may know it (pip install peft)" in capsys.readouterr().err
    # an adapter in the file format of old peft versions
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained("tiny"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM",
                                                                                    init_lora_weights=False))
    plain.save_pretrained("old")
    torch.save(load_file("old/adapter_model.safetensors"), "old/adapter_model.bin")
    Path("old/adapter_model.safetensors").unlink()
    assert torch.equal(logits(runs.load_any("old")[0]), logits(plain))


def test_broken_adapters_are_refused_by_file_and_tensor(here, capsys):
    assert main(["qlora", "--model", "tiny", *FAST, "--out", "run"]) == 0
    good = files_of("run/adapter")
    tensors = load_file("run/adapter/adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    without = {k: v for k, v in tensors.items() if k != key}
    config, quant = json.loads(good["adapter_config.json"]), json.loads(good["quantization.json"])
    file = lambda name: Path("run/adapter", name)
    cases = [
        (lambda: save_file(without, file("adapter_model.safetensors")), f"tensor {key} is missing"),
        (lambda: save_file({**tensors, key: tensors[key][:-1].clone()}, file("adapter_model.safetensors")), f"tensor {key} has shape (63, 4), the model needs (64, 4)"),
        (lambda: save_file({**tensors, key: tensors[key] * float("nan")}, file("adapter_model.safetensors")), f"tensor {key} holds NaN"),
        (lambda: save_file({**tensors, key.replace("1", "7"): tensors[key].clone()}, file("adapter_model.safetensors")), "layers.7.mlp.down_proj.lora_B.weight belongs to no layer"),
        (lambda: file("adapter_model.safetensors").write_bytes(b"x" * 30), "adapter_model.safetensors is damaged"),
        (lambda: file("adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda: file("adapter_config.json").write_text("{"), "adapter_config.json names no base model"),
        (lambda: file("adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None})), "base_model_name_or_path is None"),
        (lambda: file("adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "./gone"})), "belongs to ./gone, which cannot be loaded: no such model folder: ./gone"),
        (lambda: file("quantization.json").write_text("{"), "quantization.json cannot be read"),
        (lambda: file("quantization.json").write_text(json.dumps({**quant, "blocksize": 65})), "quant.blocksize must be one of 32, 64"),
        (lambda: file("quantization.json").write_text(json.dumps({**quant, "dtype": "int8"})), "quantization.json cannot be read (KeyError: 'int8')"),
    ]
    wrong = []
    for spoil, words in cases:
        for name, content in good.items():
            file(name).write_bytes(content)
        spoil()
        code, err = main(["eval", "run", *DATA[:2], "--cpu", "true"]), capsys.readouterr().err
        if code != 2 or words not in err or err.count("\n") != 1:
            wrong.append((words, code, err))
    assert not wrong


def test_a_checkpoint_that_is_quantized_already(here, kept, capsys):
    from llm_train_course.qlora import save_quantized

    model, tokenizer = adapters.load_base("tiny", quant=QuantSpec(backend="own"))
    save_quantized(model, "packed")
    tokenizer.save_pretrained("packed")
    assert main(["qlora", "--model", "packed", *FAST]) == 2
    assert "quant: packed is quantized already (bitsandbytes): llm-train lora trains adapters on it as it is" in capsys.readouterr().err
    assert main(["full", "--model", "packed", *FULL]) == 2
    assert "model: packed is quantized: its weights cannot be trained" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert main(["lora", "--model", "packed", *FAST, "--out", "run"]) == 0, capsys.readouterr().err
    want = logits(kept[0])
    assert torch.equal(logits(runs.load_any("run")[0]), want)
    assert main(["merge", "run"]) == 0
    torch.testing.assert_close(logits(runs.load_any("run-merged")[0]), want, rtol=0, atol=5e-6)


# ---------------------------------------------------------------------------------------------------------------------
# refusals and recipes
# ---------------------------------------------------------------------------------------------------------------------
REFUSED = [
    (["lora", "tiny", "--lora", "null"], "lora: llm-train lora trains adapters, null leaves none"),
    (["lora", "tiny", "--quant.blocksize", "64"], "quant: llm-train lora keeps the base as it is: llm-train qlora"),
    (["qlora", "tiny", "--lora", "null"], "lora: llm-train qlora trains adapters"),
    (["qlora", "tiny", "--quant", "null"], "quant: llm-train qlora puts the base into 4 bits: llm-train lora"),
    (["full", "tiny", "--lora.r", "4"], "lora: llm-train full trains all parameters"),
    (["full", "tiny", "--quant.quant_type", "nf4"], "quant: llm-train full trains all parameters"),
    (["sft", "tiny", "--quant.blocksize", "64"], "quant: 4-bit weights cannot be trained: add a lora section"),
    (["lora", "tiny", "--lora.r", "0"], "lora.r must be at least 1, got 0"),
    (["lora", "tiny", "--lora.r", "2.5"], "lora.r: expected a whole number"),
    (["lora", "tiny", "--lora.alpha", "-3"], "lora.alpha must be positive, got -3"),
    (["lora", "tiny", "--lora.dropout", "1"], "lora.dropout must be in [0, 1), got 1.0"),
    (["lora", "tiny", "--lora.targets", "[]"], "lora.targets must be all-linear, a list of layer names, or a regular expression, got []"),
    (["lora", "tiny", "--lora.targets", "[q_pro,v_proj]"], "lora.targets: the model has no layer q_pro; it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
    (["qlora", "tiny", "--lora.targets", "[q_pro]"], "lora.targets: the model has no layer q_pro; it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
    (["lora", "tiny", "--lora.targets", "q_pro"], "lora.targets: targets 'q_pro' match no module"),
    (["lora", "tiny", "--lora.targets", "(q_proj"], "lora.targets: '(q_proj' is not a regular expression: missing )"),
    (["lora", "tiny", "--lora.targets", "[q_proj,self_attn.q_proj]"], "lora.targets: model.layers.0.self_attn.q_proj is matched by two entries"),
    (["lora", "tiny", "--lora.targets", "[embed_tokens]"], "lora.targets: model.embed_tokens is a Embedding"),
    (["lora", "tiny", "--lora.targets", "[lm_head]"], "lora.targets: lm_head has a tied weight"),
    (["qlora", "tiny", "--quant.blocksize", "48"], "quant.blocksize must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096, got 48"),
    (["qlora", "tiny", "--quant.quant_type", "int4"], "quant.quant_type: expected one of 'nf4', 'fp4' or null, got int4"),
    (["qlora", "tiny", "--quant.backend", "cuda"], "quant.backend: expected one of 'auto', 'own', 'bitsandbytes'"),
    (["qlora", "tiny", "--quant.block_size", "64"], "no field quant.block_size (did you mean quant.blocksize?)"),
    (["qlora", "odd", *BNB], "quant.blocksize: bitsandbytes on a CPU misreads model.layers.0.self_attn.q_proj, whose rows of 40 numbers are not whole blocks of 64"),
    (["qlora", "./none"], "model: ./none: no such folder"),
    (["eval", "run", "--dtype", "bf16"], "dtype: run/adapter was trained on a 4-bit base made from fp32 weights: leave dtype out, got bf16"),
]


def test_refusals_name_field_and_value_and_write_nothing(here, capsys):
    assert main(["qlora", "--model", "tiny", *FAST, "--samples", "0", "--train.max_steps", "1", "--out", "run"]) == 0
    capsys.readouterr()
    before, wrong = files_of(here), []
    for (command, model, *args), words in REFUSED:
        code = main([command, model, *DATA[:2], *args] if command == "eval" else [command, "--model", model, *DATA, "--train.cpu", "true", *args])
        out, err = capsys.readouterr()
        if code != 2 or words not in err or err.count("\n") != 1 or "Traceback" in err or out or files_of(here) != before:
            wrong.append((command, args, words, code, err, out))
    assert not wrong


def test_without_bitsandbytes_the_field_is_named(here, capsys, monkeypatch):
    found = adapters.find_spec
    monkeypatch.setattr(adapters, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    assert main(["qlora", "--model", "tiny", *FAST, *BNB]) == 2
    assert "quant.backend: bitsandbytes is not installed" in capsys.readouterr().err
    from llm_train_course.app import train

    monkeypatch.setattr(train, "find_spec", adapters.find_spec)
    assert main(["lora", "--model", "tiny", *FAST, "--train.optimizer", "paged_adamw"]) == 2
    assert "train.optimizer: paged_adamw needs bitsandbytes, which is not installed" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("name,shaped,method", [
    ("gpu-llama31-8b-lora", "llama-3.1-8b", "lora"), ("gpu-llama31-8b-qlora", "llama-3.1-8b", "qlora"), ("gpu-qwen25-7b-lora", "qwen2.5-7b", "lora"),
    ("gpu-qwen25-7b-qlora", "qwen2.5-7b", "qlora"), ("gpu-llama31-70b-qlora", "llama-3.1-70b", "qlora"), ("smollm2-full", "smollm2-135m", "full")])
def test_bytes_in_a_recipes_comment_are_those_of_its_shape(name, shaped, method):
    text = (ROOT / f"recipes/{name}.yaml").read_text(encoding="utf-8")
    comment, recipe, model = re.sub(r"\n# ", " ", text.split("llm-train")[0]), yaml.safe_load(text), shape(shaped)
    gigabytes = lambda n: f"{n / 1e9:.1f} GB"
    if method == "full":  # weights in FP32 here, and no copy of them
        assert gigabytes(16 * model.n_params) in comment and "counted, not measured" in comment
        return
    assert "counted from tensor sizes and never measured on a GPU" in comment
    parts = finetune_bytes(model, method, r=recipe["lora"]["r"], targets=recipe["lora"]["targets"])
    adapters_ = sum(parts.pop(k) for k in ("adapters", "gradients", "moments"))
    for n in (adapters_, *parts.values()):
        assert gigabytes(n) in comment, gigabytes(n)
    assert f"{lora_params(model, recipe['lora']['r']) / 1e6:.0f} M parameters" in comment
    tokens = recipe["micro_batch_size"] * recipe["max_length"]
    inputs = model.n_layers * tokens * 2 * model.hidden_size
    assert recipe["gradient_checkpointing"] and gigabytes(inputs) in comment
    per_token = float(re.search(r"(\d+) kB a token", comment)[1]) * 1e3
    layer, logits_, dense = per_token * tokens, 1024 * model.vocab_size * 10, 2 * model.hidden_size * model.intermediate_size
    assert gigabytes(layer) in comment
    total = sum(parts.values()) + adapters_ + inputs + layer + logits_ + dense * (method == "qlora")
    if method == "qlora":  # what is counted: moments in FP32, paged or not
        assert recipe["train"]["optimizer"] == "paged_adamw"
    said = float(re.search(r"So about (\d+) GB", comment)[1])
    assert said == pytest.approx(total / 1e9, abs=1.0)
    assert said < {"gpu-llama31-70b-qlora": 80}.get(name, 24) - 2  # on the card it is for, with room for the rest
