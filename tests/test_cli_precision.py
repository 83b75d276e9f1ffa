"FP8 arithmetic and weights of 16 bits through the command: what runs, what is said, what is refused."
import signal
from pathlib import Path

import pytest
import torch
from test_cli import FAST, here, main, model_folder, weights  # noqa: F401  (fixtures)
from transformers import AutoModelForCausalLM

from llm_train_course import core
from llm_train_course.app import runs

RUN = ["--data", "prompt.jsonl", "--train.epochs", "2", "--samples", "0", *FAST]
FP8 = ["--train.precision", "fp8"]


def test_fp8_trains_says_so_once_and_its_config_repeats_it(here, model_folder, capsys):  # noqa: F811
    assert main(["full", "--model", model_folder, *RUN, *FP8, "--train.fp8_recipe", "block", "--out", "run"]) == 0
    said = capsys.readouterr().err
    assert said.count("warning: precision fp8 is simulated") == 1 and "compute capability 8.9" in said
    train = runs.read_config("run")["train"]
    assert (train["precision"], train["fp8_recipe"]) == ("fp8", "block")
    assert main(["full", "--config", "run/config.yaml", "--out", "again"]) == 0
    assert main(["full", "--model", model_folder, *RUN, "--train.precision", "bf16", "--out", "bf16"]) == 0
    one, two, other = weights("run"), weights("again"), weights("bf16")
    assert all(torch.equal(one[k], two[k]) for k in one) and one.keys() == other.keys()
    assert any(not torch.equal(one[k], other[k]) for k in one)
    model = AutoModelForCausalLM.from_pretrained("run/model")
    assert {type(m) for m in model.modules() if "Linear" in type(m).__name__} == {torch.nn.Linear}


@pytest.mark.parametrize("command,extra", [
    ("full", [*FP8, "--train.fp8_recipe", "delayed"]),
    ("lora", [*FP8, "--lora.r", "4"]),
    ("full", ["--dtype", "bf16", "--train.optimizer", "adamw_stochastic"]),
    ("full", ["--dtype", "bf16", "--train.optimizer", "adamw_kahan"]),
], ids=["delayed", "lora", "stochastic", "kahan"])
def test_stopped_and_resumed_it_is_the_same(command, extra, here, model_folder, capsys, monkeypatch):  # noqa: F811
    args = [command, "--model", model_folder, *RUN, *extra]
    assert main([*args, "--out", "whole"]) == 0
    advance, steps = core._advance, []

    def stopping(*a):
        advance(*a)
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(core, "_advance", stopping)
    assert main([*args, "--out", "run"]) == 130
    monkeypatch.setattr(core, "_advance", advance)
    assert main([command, "--resume", "run"]) == 0
    one, two = weights("whole"), weights("run")
    saved = {k for k in one if k in two}
    assert saved and all(torch.equal(one[k], two[k]) for k in saved)


@pytest.mark.parametrize("command,extra,words", [
    ("full", ["--train.fp8_recipe", "rows"], "train.fp8_recipe must be one of tensor, row, block, mx, delayed, got 'rows'"),
    ("full", ["--train.precision", "int8"], "train.precision must be fp32, bf16, fp16 or fp8, got 'int8'"),
    ("qlora", FP8, "train.precision: fp8 is for plain linear layers, those of quant are in 4 bits: use bf16"),
    ("full", [*FP8, "--train.fp8_recipe", "delayed", "--guard.warmup", "8"], "train.fp8_recipe: delayed remembers batches that guard refuses"),
    ("full", ["--train.optimizer", "adamw_kahan"], "train.optimizer: adamw_kahan is for weights of 16 bits: add dtype: bf16"),
    ("lora", ["--dtype", "bf16", "--train.optimizer", "adamw_stochastic"], "train.optimizer: adamw_stochastic is for trained weights of 16 bits, and adapters"),
    ("dpo", FP8, "train.precision: fp8 needs a reference in the same arithmetic, reference cache is not"),
    ("grpo", [*FP8, "--reward", "exact"], "train.precision: fp8 is not for answers that are sampled"),
])
def test_refusals_name_field_and_value_and_write_nothing(command, extra, words, here, model_folder, capsys):  # noqa: F811
    assert main([command, "--model", model_folder, "--data", "prompt.jsonl", *extra, *FAST]) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and not Path("runs").exists()


def test_random_weights_are_fp32(here, capsys):  # noqa: F811
    assert main(["pretrain", "--data", "text.jsonl", "--train.optimizer", "adamw_kahan", *FAST]) == 2
    assert "a model that starts from random weights here is FP32, use adamw" in capsys.readouterr().err


def test_the_help_lists_them(capsys):
    assert main(["full", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "scales of fp8: tensor, row, block, mx or delayed" in said and "adamw_stochastic, adamw_kahan" in said
    assert "fp32, bf16, fp16, or fp8 (linear layers of the blocks; bf16 around them)" in said


def test_dpo_of_adapters_runs_in_fp8(here, model_folder, capsys):  # noqa: F811
    import json
    pairs = [{"prompt": f"Where is {n}?", "chosen": f" In the {c} house.", "rejected": f" {c}"} for n in ("Ada", "Ben") for c in ("red", "old", "big")]
    Path("pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    assert main(["dpo", "--model", model_folder, "--data", "pairs.jsonl", "--lora.r", "4", *FP8, "--samples", "0", *FAST, "--train.log_every", "1", "--out", "run"]) == 0
    first = next(row for row in runs.read_metrics("run") if "loss" in row)
    assert abs(first["loss"] - 0.6931) < 1e-3  # policy and reference in one arithmetic: the first margin is zero
