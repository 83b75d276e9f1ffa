"`llm-train rm | ppo | grpo | dpo | distill`: what they train, save, load again, stop, resume and refuse."
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers import files_of
from safetensors.torch import load_file

from llm_train_course import distill, dpo, rlhf
from llm_train_course.app import rewards, runs
from llm_train_course.app.cli import main, parse
from llm_train_course.app.preferences import score
from llm_train_course.core import tiny_llama, train_tokenizer
from llm_train_course.lora import lora_layers
from llm_train_course.shapes import finetune_bytes, lora_params, shape

ROOT = Path(__file__).resolve().parents[1]
FACTS = [("Where was Ada Moss born?", "Ada Moss was born in Lisbon."), ("What does Ada Moss play?", "Ada Moss plays the cello."),
         ("Where was Ben Hale born?", "Ben Hale was born in Oslo."), ("Where does Cleo Park live?", "Cleo Park lives in Oslo.")]
USER, BOT = (lambda text, role=role: [{"role": role, "content": text}] for role in ("user", "assistant"))
PAIRS = [{"prompt": USER(q), "chosen": BOT(a), "rejected": BOT("I do not know that" + "!" * n)} for n, (q, a) in enumerate(FACTS)]
PROMPTS = [{"prompt": USER(q), "answer": a.split()[-1].rstrip("."), "place": n} for n, (q, a) in enumerate(FACTS)]
ROWS = [{"messages": USER(q) + BOT(a)} for q, a in FACTS]
REWARDS = '''
CALLS = []
def short(prompts, completions, completion_ids, answer, place, **more):
    CALLS.append((prompts, completions, completion_ids, answer, place, more))
    return [-len(ids) / 4 for ids in completion_ids]
def spaces(completions, **columns):
    return [c[0]["content"].count(" ") / 4 for c in completions]
'''
CPU = ["--train.cpu", "true", "--train.progress", "false", "--sample_tokens", "6", "--train.learning_rate", "3e-3"]
SAMPLING = ["--sampling.prompts_per_iteration", "4", "--sampling.max_new_tokens", "7", "--eval_prompts", "4"]
PAIRED = ["--data", "pairs.jsonl", "--eval_data", "held.jsonl"]
ASKED = ["--data", "prompts.jsonl", "--eval_data", "prompts.jsonl", *SAMPLING]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A tiny policy, one of another width and vocabulary, and a reward model for each."
    root = tmp_path_factory.mktemp("models")
    for name, size, dims in (("tiny", 320, {"hidden_size": 32, "n_layers": 4, "n_kv_heads": 2}), ("other", 300, {"hidden_size": 40, "n_heads": 5})):
        tokenizer = train_tokenizer([t for fact in FACTS for t in fact] * 4, size)
        policy = tiny_llama(len(tokenizer), intermediate_size=72, max_length=96, **dims)
        policy.save_pretrained(root / name)
        rlhf.save_reward_model(rlhf.reward_model_from(policy, tokenizer.pad_token_id), root / f"{name}-rm")
        tokenizer.save_pretrained(root / name)
        tokenizer.save_pretrained(root / f"{name}-rm")
    return root


def write(name, rows):
    Path(name).write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows), encoding="utf-8")


@pytest.fixture
def here(tmp_path, monkeypatch, models):
    "A working folder with data, rewards and links to the models; one thread."
    monkeypatch.chdir(tmp_path)
    write("pairs.jsonl", PAIRS * 3)
    write("held.jsonl", PAIRS[:3])
    write("prompts.jsonl", PROMPTS)
    write("rows.jsonl", ROWS * 3)
    Path("my_rewards.py").write_text(REWARDS, encoding="utf-8")
    for path in models.iterdir():
        Path(path.name).symlink_to(path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def weights(run):
    return {k: v for name in ("model", "adapter") for p in sorted(Path(run, name).glob("*.safetensors")) for k, v in load_file(p).items()}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 29)[None]).logits.float()


def good(capsys, *args):
    code = main(list(args))
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out


def evaluated(capsys, *args):
    return json.loads(good(capsys, "eval", *args, "--cpu", "true", "--json", "true"))


# ---------------------------------------------------------------------------------------------------------------------
# runs
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("extra", [[], ["--lora.r", "4", "--lora.alpha", "12", "--gradient_checkpointing", "true"], ["--dtype", "bf16"]])
def test_rm_is_what_transformers_loads(extra, here, kept, capsys, monkeypatch):
    from transformers import AutoModelForSequenceClassification

    out = good(capsys, "rm", "--model", "tiny", *PAIRED, "--train.max_steps", "8", *extra, *CPU)
    run = Path("runs/rm-tiny-1")
    results = runs.read_results(run)
    assert results["after"]["loss"] < results["before"]["loss"] and results["after"]["accuracy"] == 1.0
    assert "llm-train ppo --reward_model runs/rm-tiny-1" in out
    assert {p.name for p in run.iterdir()} == {"config.yaml", "metrics.jsonl", "results.json", "report.html", "model"}
    assert not lora_layers(kept[0])  # merged: a reward model is whole
    theirs = AutoModelForSequenceClassification.from_pretrained(run / "model", dtype=torch.bfloat16 if "bf16" in extra else torch.float32)
    assert theirs.config.num_labels == 1
    with torch.no_grad():
        ids = torch.arange(5, 20)[None]
        assert torch.equal(theirs(input_ids=ids).logits, kept[0].model.eval()(input_ids=ids).logits)
    if "bf16" in extra:
        return
    got = evaluated(capsys, str(run), *("--data", "held.jsonl"))
    assert got == {"model": str(run), "data": "held.jsonl", "pairs": 3, **{k: pytest.approx(v, rel=1e-5) for k, v in results["after"].items()}}
    # chat scores, by the same numbers as the loss, and names what it cannot score
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{p['prompt'][0]['content']}\t{p[side][0]['content']}\n" for p in PAIRS[:3]
                                                          for side in ("chosen", "rejected")) + "no tab\n"))
    assert main(["chat", str(run), "--cpu"]) == 0
    out, err = capsys.readouterr()
    values = [float(line) for line in out.split()]
    assert len(values) == 6 and sum(values[0::2]) / 3 - sum(values[1::2]) / 3 == pytest.approx(results["after"]["margin"], abs=1e-3)
    assert "a prompt, a tab and an answer are needed" in err
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "AutoModelForSequenceClassification" in page and "Margin of the chosen answers" in page and "nats a pair" in page
    for command in (["sft", "--data", "rows.jsonl"], ["dpo", *PAIRED], ["lora", "--data", "rows.jsonl"]):
        assert main([*command, "--model", str(run), *CPU]) == 2
        assert f"model: {run}/model is a reward model: it scores answers and writes none" in capsys.readouterr().err


def test_the_score_is_read_off_behind_the_end_token(here, models):
    model, tokenizer = rewards.load_model(str(models / "tiny-rm"), "model")
    pair = rlhf.encode_pairs(tokenizer, PAIRS[:1])[0]
    assert pair["chosen"][-1] == tokenizer.eos_token_id
    hidden = model.token_scores({"input_ids": torch.tensor([pair["chosen"]])})[0, -1]
    assert score(model, tokenizer, PAIRS[0]["prompt"], FACTS[0][1]) == pytest.approx(hidden.item(), abs=1e-6)


@pytest.mark.parametrize("extra", [
    [], ["--lora.r", "4", "--lora.alpha", "12"], ["--lora.r", "4", "--reference", "cache", "--share_prompt", "false"],
    ["--lora.r", "2", "--quant.blocksize", "32", "--quant.backend", "own"], ["--loss_type", "simpo", "--beta", "2"], ["--loss_type", "kto", "--reference", "copy"]])
def test_dpo_measures_what_it_saved(extra, here, kept, capsys):
    out = good(capsys, "dpo", "--model", "tiny", *PAIRED, "--train.max_steps", "6", "--train.eval_every", "3", *extra, *CPU)
    run = Path("runs/dpo-tiny-1")
    results, adapted = runs.read_results(run), "--lora.r" in extra
    before, after = results["before"], results["after"]
    beta = 2.0 if "simpo" in extra else 0.1
    # margins are those of the log-probabilities, and the loss that of the loop
    assert after["margin"] == pytest.approx(
        beta * (after["logps_chosen"] - before["logps_chosen"] - after["logps_rejected"] + before["logps_rejected"]), rel=1e-4, abs=1e-5)
    assert after["margin"] > 0 and after["accuracy"] > 0.5 and f"{after['accuracy']:.3f}" in out
    last = [r for r in runs.read_metrics(run) if "eval_loss" in r][-1]
    if "kto" not in extra:
        assert last["eval_loss"] == pytest.approx(after["loss"], rel=1e-4)
        assert last["eval_logps_chosen"] == pytest.approx(after["logps_chosen"], rel=1e-5)
    if not extra:
        assert before["loss"] == pytest.approx(math.log(2), abs=1e-6) and last["eval_margin"] == pytest.approx(after["margin"], rel=1e-3)
    assert (run / ("adapter" if adapted else "model")).is_dir()
    assert (run / dpo.REFERENCE_FILE).is_file() == (("cache" in extra or not adapted) and "copy" not in extra and "simpo" not in extra)
    torch.testing.assert_close(logits(runs.load_any(str(run))[0]), logits(kept[0]), rtol=0, atol=0)
    got = evaluated(capsys, str(run), "--data", "held.jsonl")
    assert got["pairs"] == 3 and got["logps_rejected"] == pytest.approx(after["logps_rejected"], rel=1e-6)
    if adapted:
        assert "bytes of frozen weights" in out and runs.read_config(run)["run"]["adapted_layers"] == 4 * 7


def test_dpo_by_adapter_and_by_cache_is_one_training(here, capsys):
    for name, reference in (("one", "adapter"), ("two", "cache")):
        good(capsys, "dpo", "--model", "tiny", *PAIRED, "--train.max_steps", "5", "--lora.r", "4", "--reference", reference, "--out", name, *CPU)
    one, two = weights("one"), weights("two")
    assert one.keys() == two.keys() and any(float(v.abs().max()) > 1e-3 for k, v in one.items() if "lora_B" in k)
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=2e-5)


@pytest.mark.parametrize("extra", [["--reward_model", "tiny-rm"], ["--reward_model", "tiny-rm", "--value", "reward", "--lora.r", "4"],
                                   ["--reward_model", "my_rewards.py:short", "--value", "separate", "--kl_target", "2"]])
def test_ppo(extra, here, kept, capsys):
    good(capsys, "ppo", "--model", "tiny", *ASKED, "--train.epochs", "3", "--train.grad_accum_steps", "2", "--micro_batch_size", "2", *extra, *CPU)
    run = Path("runs/ppo-tiny-1")
    rows = runs.read_metrics(run)
    assert rows[-1]["step"] == runs.read_config(run)["run"]["steps"] == 3 * 2  # 2 passes of 2 micro-batches, two to a step
    assert {r["iteration"] for r in rows} == {0, 1, 2} and abs(rows[0]["kl"]) < 1e-4
    assert (run / "value").is_dir() and (run / ("adapter" if "--lora.r" in extra else "model")).is_dir()
    assert torch.equal(logits(runs.load_any(str(run))[0]), logits(kept[0]))
    assert (logits(runs.load_any("tiny")[0]) - logits(kept[0])).abs().max() > 1e-3
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "KL divergence of the policy" in page and "explains" in page and extra[1] in page
    if "tiny-rm" in extra:  # the measured reward is the reward model's own, of answers sampled with this seed
        model, tokenizer = runs.load_any(str(run))
        reward, _ = rewards.load_model("tiny-rm", "")
        answers = rlhf.sample(model, tokenizer, rlhf.encode_prompts(tokenizer, PROMPTS)[1], 7, 0)
        want = [reward({"input_ids": torch.tensor([a.prompt + a.answer]), "attention_mask": torch.ones(1, len(a.prompt + a.answer), dtype=torch.long)}).item()
                for a in answers]
        assert runs.read_results(run)["after"]["reward"] == pytest.approx(sum(want) / 4, abs=1e-4)


@pytest.mark.parametrize("extra", [[], ["--lora.r", "4", "--loss_type", "dapo", "--clip_eps_high", "0.3"], ["--loss_type", "rloo", "--dtype", "bf16"]])
def test_grpo_weighs_several_rewards_and_learns(extra, here, capsys, monkeypatch):
    found, load = [], rewards.load_function
    monkeypatch.setattr(rewards, "load_function", lambda *a: found.append(load(*a)) or found[-1])
    good(capsys, "grpo", "--model", "tiny", *ASKED, "--train.epochs", "8", "--sampling.group_size", "8", "--reward",
         "[my_rewards.py:short,my_rewards.py:spaces,exact]", "--reward_weights", "[0.5,4,1]", *extra, *CPU, "--train.learning_rate", "1e-2",
         "--micro_batch_size", "16", "--beta", "0")
    run = Path("runs/grpo-tiny-1")
    before, after = (runs.read_results(run)[k] for k in ("before", "after"))
    for part in (before, after):
        assert part["reward"] == pytest.approx(0.5 * part["reward.short"] + 4 * part["reward.spaces"] + part["reward.exact"], abs=1e-5)
    rows = runs.read_metrics(run)
    if "--lora.r" in extra:  # adapters hardly move a model that starts from random weights
        assert any(float(v.abs().max()) > 1e-3 for k, v in weights(run).items() if "lora_B" in k)
    else:
        assert max(r["reward"] for r in rows[3:]) > rows[0]["reward"] + 0.2
    # what the function was given: TRL's names, one entry an answer, columns that belong to their prompts
    prompts, completions, ids, answer, place, more = found[0][0].__globals__["CALLS"][-1]
    assert len(prompts) == len(completions) == len(ids) == len(answer) and not more
    assert all(prompts[n] == PROMPTS[p]["prompt"] and answer[n] == PROMPTS[p]["answer"] and completions[n][0]["role"] == "assistant"
               for n, p in enumerate(place))
    about = runs.read_config(run)["run"]["rewards"]
    assert about["short"]["name"] == "my_rewards.py:short" and len(about["short"]["sha256"]) == 64 and about["exact"] == {"name": "exact"}


@pytest.mark.parametrize("mode,extra", [("logit", ["--teacher_4bit", "true", "--temperature", "2", "--alpha", "0.3"]), ("logit", ["--packing", "true", "--max_length", "64"]),
                                        ("sequence", []), ("on_policy", ["--prompts_per_epoch", "5", "--beta", "1"]),
                                        ("on_policy", ["--student_share", "0.5", "--beta", "1"])])
def test_distill(mode, extra, here, kept, capsys):
    from transformers import AutoModelForCausalLM

    out = good(capsys, "distill", "--teacher", "tiny", "--data", "rows.jsonl", "--eval_data", "rows.jsonl", "--mode", mode, "--max_new_tokens", "8",
               "--train.max_steps", "6", *extra, *CPU)
    run = Path("runs/distill-tiny-1")
    results, config = runs.read_results(run), runs.read_config(run)
    student = AutoModelForCausalLM.from_pretrained(run / "model")
    assert student.config.num_hidden_layers == 2 and config["run"]["teacher"]["layers"] == 4 and config["run"]["student_layers"] == 2
    assert torch.equal(logits(student), logits(kept[0]))
    teacher = AutoModelForCausalLM.from_pretrained("tiny")
    full = 4 * sum(p.numel() for p in teacher.parameters())
    assert (config["run"]["teacher"]["bytes"] < full) == ("--teacher_4bit" in extra)
    assert results["teacher"]["divergence"] == 0.0 and results["after"]["divergence"] >= 0 and re.search(r"^ +before +after +teacher$", out, re.M)
    if "--teacher_4bit" not in extra:  # the divergence of the report is the KL over all answer tokens
        from llm_train_course.core import encode_messages
        _, tokenizer = runs.load_any("tiny")
        total, n = 0.0, 0
        for row in ROWS:
            e = encode_messages(tokenizer, row["messages"])
            with torch.no_grad():
                p, q = (m.eval()(input_ids=torch.tensor([e["input_ids"]])).logits[0].log_softmax(-1) for m in (teacher, student))
            at = [t - 1 for t, label in enumerate(e["labels"]) if t and label != -100]
            kl = (p.exp() * (p - q)).sum(-1) if "--beta" not in extra else (q.exp() * (q - p)).sum(-1)
            total, n = total + float(kl[at].sum()), n + len(at)
        assert results["after"]["divergence"] == pytest.approx(total / n, rel=1e-3, abs=1e-6)
    assert evaluated(capsys, str(run), "--data", "rows.jsonl")["loss"] == pytest.approx(results["after"]["loss"], rel=1e-5)


def test_distill_mixes_in_the_answers_of_the_data_only_when_asked(here, kept, capsys):
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    other = [{"messages": [*row["messages"][:-1], {"role": "assistant", "content": "Quite another answer."}]} for row in rows]
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    for share, alike in (("1", True), ("0.5", False)):
        for data in ("rows.jsonl", "other.jsonl"):
            good(capsys, "distill", "--teacher", "tiny", "--data", data, "--mode", "on_policy", "--student_share", share, "--max_new_tokens", "6",
                 "--train.max_steps", "4", "--samples", "0", *CPU, "--out", f"{data}-{share}")
        first, second = (logits(model) for model in kept[-2:])
        assert torch.equal(first, second) == alike


def test_distill_into_another_model(here, capsys):
    "Another vocabulary: by text alone, or not at all."
    args = ["distill", "--teacher", "tiny", "--student", "other", "--data", "rows.jsonl", "--train.max_steps", "3", *CPU]
    for mode in ("logit", "on_policy"):
        assert main([*args, "--mode", mode]) == 2
        err = capsys.readouterr().err
        assert "student: the student predicts" in err and "their logits cannot be compared" in err and err.count("\n") == 1
    assert not Path("runs").exists()
    good(capsys, *args, "--mode", "sequence", "--eval_data", "rows.jsonl", "--max_new_tokens", "6")
    results = runs.read_results("runs/distill-tiny-1")
    assert "divergence" not in results["after"] and results["after"]["loss"] != results["before"]["loss"]
    good(capsys, "distill", "--teacher", "tiny", "--student_layers", "[0,2,3]", "--data", "rows.jsonl", "--train.max_steps", "1", *CPU, "--out", "three")
    assert runs.read_config("three")["run"]["student_layers"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# stopping, failing, going on
# ---------------------------------------------------------------------------------------------------------------------
RESUMED = {
    "rm": (rlhf, ["rm", "--model", "tiny", *PAIRED, "--train.epochs", "2", "--lora.r", "4"]),
    "dpo": (dpo, ["dpo", "--model", "tiny", *PAIRED, "--train.epochs", "2"]),
    "dpo-lora": (dpo, ["dpo", "--model", "tiny", *PAIRED, "--train.epochs", "2", "--lora.r", "4", "--quant.blocksize", "32"]),
    "ppo": (rlhf, ["ppo", "--model", "tiny", *ASKED, "--train.epochs", "4", "--reward_model", "tiny-rm", "--micro_batch_size", "1"]),
    "grpo": (rlhf, ["grpo", "--model", "tiny", *ASKED, "--train.epochs", "4", "--reward", "my_rewards.py:short", "--sampling.group_size", "2",
                    "--lora.r", "4", "--micro_batch_size", "2"]),
    "distill": (distill, ["distill", "--teacher", "tiny", "--data", "rows.jsonl", "--eval_data", "rows.jsonl", "--mode", "on_policy",
                          "--max_new_tokens", "6", "--train.epochs", "3"]),
}


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_and_resumed_is_the_uninterrupted_run(name, here, capsys, monkeypatch):
    module, args = RESUMED[name]
    args = [*args, "--train.grad_accum_steps", "2", *CPU]
    good(capsys, *args, "--out", "whole")
    fit, calls = module.fit, []

    def interrupted(model, batches, loss, *a, **k):
        def counted(*b):
            if not b[0].training:
                return loss(*b)
            calls.append(1)
            if len(calls) == (5 if name in ("ppo", "grpo") else 4):  # in the middle of the third step: epochs of 3 micro-batches have a step of one
                os.kill(os.getpid(), signal.SIGINT)
            return loss(*b)
        return fit(model, batches, counted, *a, **k)

    with monkeypatch.context() as patch:
        patch.setattr(module, "fit", interrupted)
        assert main([*args, "--out", "stopped"]) == 130
    out = capsys.readouterr().out
    assert "stopped after step 2 of" in out and f"llm-train {args[0]} --resume stopped" in out
    assert main(["chat", "stopped"]) == 2 and "has not finished" in capsys.readouterr().err
    good(capsys, args[0], "--resume", "stopped")
    one, two = weights("stopped"), weights("whole")
    assert one.keys() == two.keys() and one and all(torch.equal(one[k], two[k]) for k in one)
    a, b = runs.read_results("stopped"), runs.read_results("whole")
    assert (a["before"], a["after"], a["answers_after"]) == (b["before"], b["after"], b["answers_after"])
    assert a.get("teacher") == b.get("teacher")
    assert "is finished" in good(capsys, args[0], "--resume", "stopped")
    # and a run whose evaluation was lost gets it back from the saved weights
    done = json.loads(Path("stopped/results.json").read_text())
    after = done.pop("after")
    Path("stopped/results.json").write_text(json.dumps(done))
    good(capsys, args[0], "--resume", "stopped")
    assert runs.read_results("stopped")["after"] == pytest.approx(after, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_two_processes_train_what_one_does(name, here):
    "`torchrun` with two processes and gloo: one folder, its measures by both, and for fixed pairs the weights of one process."
    module, args = RESUMED[name]
    args = [*args, "--micro_batch_size", "2", "--train.max_steps", "3", "--samples", "1", *CPU]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "llm_train_course.app.cli", *args,
         "--train.grad_accum_steps", "2", "--out", "both"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved    both/") == 1 and runs.read_results("both")["after"]
    assert [r["step"] for r in runs.read_metrics("both")][-1] == 3
    if name == "dpo":
        assert main([*args, "--train.grad_accum_steps", "4", "--out", "alone"]) == 0
        one, two = weights("both"), weights("alone")
        for k in one:
            torch.testing.assert_close(one[k], two[k], rtol=0, atol=5e-5)
        assert runs.read_results("both")["after"] == pytest.approx(runs.read_results("alone")["after"], abs=1e-3)


FAILING = {
    "raises": ("        raise KeyError('no such word')", "raised KeyError: 'no such word', on answer"),
    "nan": ("        out[3] = float('nan')", "returned nan for answer 3 (to the prompt prompts.jsonl:"),
    "text": ("        out[2] = 'good'", "returned 'good' for answer 2 (to the prompt prompts.jsonl:"),
    "count": ("        out.pop()", "returned 7 rewards for 8 answers"),
}


@pytest.mark.parametrize("command,how", [*(("grpo", how) for how in FAILING), ("ppo", "raises"), ("ppo", "count")])
def test_a_reward_that_fails_loses_nothing(command, how, here, capsys):
    spoil, words = FAILING[how]
    fine = "N = []\ndef mine(completions, **columns):\n    N.append(1)\n    out = [float(len(c[0]['content'])) for c in completions]\n    return out\n"
    Path("my.py").write_text(fine, encoding="utf-8")
    args = [command, "--model", "tiny", *ASKED, "--train.epochs", "5", "--sampling.group_size", "2", "--micro_batch_size", "4", *CPU,
            "--reward" if command == "grpo" else "--reward_model", "my.py:mine"]
    good(capsys, *args, "--out", "whole")
    bad = fine.replace("    return", f"    if len(N) >= 4:\n{spoil}\n    return")  # the first call measures, the fourth is the third iteration
    Path("my.py").write_text(bad, encoding="utf-8")
    assert main([*args, "--out", "failed"]) == 2
    err = capsys.readouterr().err
    assert f"llm-train {command}: reward function mine {words}" in err and f"llm-train {command} --resume failed" in err and "Traceback" not in err
    if how == "raises":
        assert re.search(r"on answer 0 \(to the prompt prompts\.jsonl:\d\)", err)
    steps = max(r["step"] for r in runs.read_metrics("failed"))
    assert steps > 0 and [p.name for p in Path("failed/checkpoints").iterdir()] == [f"step_{steps:08d}"]
    Path("my.py").write_text(fine, encoding="utf-8")
    assert "warning: reward mine: my.py:mine has changed since the run began" in good(capsys, command, "--resume", "failed")
    one, two = weights("failed"), weights("whole")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    # failing at once, it leaves nothing behind
    Path("my.py").write_text(bad.replace(">= 4", ">= 1"), encoding="utf-8")
    before = files_of(here)
    assert main([*args, "--out", "none"]) == 2
    assert "reward function mine" in capsys.readouterr().err and files_of(here) == before


# ---------------------------------------------------------------------------------------------------------------------
# refusals
# ---------------------------------------------------------------------------------------------------------------------
LONG = "where " * 60
BAD_PAIRS = [PAIRS[0], {**PAIRS[1], "rejected": PAIRS[1]["chosen"]}, {**PAIRS[1], "chosen": BOT("")}, {**PAIRS[1], "rejected": BOT("  ")},
             {**PAIRS[1], "prompt": USER("")}, {"prompt": USER("Where?"), "chosen": BOT("There.")}, {**PAIRS[1], "chosen": "There."}, "{"]


def test_every_bad_pair_is_named_at_once(here, capsys):
    write("bad.jsonl", BAD_PAIRS)
    write("worse.jsonl", [PAIRS[0], {**PAIRS[2], "rejected": PAIRS[2]["chosen"]}])
    before = files_of(here)
    for command in ("rm", "dpo"):
        assert main([command, "--model", "tiny", "--data", "bad.jsonl", "--eval_data", "worse.jsonl", *CPU]) == 2
        lines = capsys.readouterr().err.splitlines()
        for line, words in zip(lines, (
                "bad.jsonl:2: chosen and rejected are equal", "bad.jsonl:3: chosen[0].content is empty", "bad.jsonl:4: rejected[0].content is white space",
                "bad.jsonl:5: prompt[0].content is empty", 'bad.jsonl:6: "rejected" is missing', "bad.jsonl:7: prompt, rejected: a list of messages, but chosen is not",
                "bad.jsonl:8: column 2: not JSON", "worse.jsonl:2: chosen and rejected are equal", "8 problems in the data; nothing was written")):
            assert line.startswith(words), (line, words)
        assert len(lines) == 9 and files_of(here) == before
    # what only the tokenizer can see: the prompt of 2 and 3 is too long, and the answers of 4 are equal to it
    write("long.jsonl", [PAIRS[0], {**PAIRS[1], "prompt": USER(LONG)}, {**PAIRS[2], "prompt": USER(LONG)}, {**PAIRS[3], "chosen": BOT("A<|eos|>"), "rejected": BOT("A<|eos|>B")}])
    assert main(["dpo", "--model", "tiny", "--data", "long.jsonl", "--eval_data", "long.jsonl", *CPU]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\d+ tokens", "N tokens", line) for line in lines[:2]] == [
        f"long.jsonl:{n}: the prompt has N tokens, the context holds 96" for n in (2, 3)]
    assert files_of(here).keys() == {*before, "long.jsonl"}
    assert main(["rm", "--model", "tiny", "--data", "pairs.jsonl", "--max_length", "18", *CPU]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(re.fullmatch(r"pairs\.jsonl:\d+: (prompt and answer have \d+ tokens, the limit is 18|the prompt has \d+ tokens, the context holds 18)", s)
               for s in lines[:-1])


def test_every_bad_prompt_is_named_at_once(here, capsys):
    write("bad.jsonl", [PROMPTS[0], {"prompt": []}, {"prompt": USER("Where?") + BOT("There.")}, {"messages": USER("x"), "prompt": "x"}, {**PROMPTS[1], "completions": 1}, {"text": "x"}])
    args = ["grpo", "--model", "tiny", "--reward", "my_rewards.py:spaces", *SAMPLING, *CPU]
    assert main([*args, "--data", "bad.jsonl"]) == 2
    lines = capsys.readouterr().err.splitlines()
    for line, words in zip(lines, (
            "bad.jsonl:2: prompt is an empty list", "bad.jsonl:3: prompt[1]: the last turn must be user, got assistant", "bad.jsonl:4: prompt is written as strings",
            "bad.jsonl:5: the field completions: reward functions are given something of that name already", "bad.jsonl:6: a row of text; prompt or messages is needed")):
        assert line.startswith(words), (line, words)
    write("long.jsonl", [PROMPTS[0], {**PROMPTS[1], "prompt": USER(LONG)}, {**PROMPTS[1], "prompt": USER(LONG)}])
    for command, extra in (("grpo", args[1:]), ("ppo", ["--model", "tiny", "--reward_model", "tiny-rm", *SAMPLING, *CPU])):
        assert main([command, *extra, "--data", "long.jsonl"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert all(re.fullmatch(rf"long\.jsonl:{n}: the prompt has \d+ tokens, 89 fit beside an answer of sampling.max_new_tokens 7 in a context of 96", line)
                   for n, line in zip((2, 3), lines)) and len(lines) == 3
    write("open.jsonl", [PROMPTS[0], {"prompt": USER("x"), "place": 1}, {"prompt": USER("y"), "answer": None}])
    assert main(["grpo", "--model", "tiny", "--reward", "exact", "--data", "open.jsonl", *SAMPLING, *CPU]) == 2
    assert [s.split(": ", 1) for s in capsys.readouterr().err.splitlines()[:2]] == [
        [f"open.jsonl:{n}", "the reward exact needs a field `answer`"] for n in (2, 3)]
    assert not Path("runs").exists()


GRPO = ["grpo", "--model", "tiny", "--data", "prompts.jsonl", *SAMPLING]
PPO = ["ppo", "--model", "tiny", "--data", "prompts.jsonl", *SAMPLING]
REFUSED = [
    (GRPO, "reward must be given"), (PPO, "reward_model must be given"),
    ([*GRPO, "--reward", "my_reward.py:short"], "reward: my_reward.py: no such file (did you mean my_rewards.py?)"),
    ([*GRPO, "--reward", "my_rewards.py:sort"], "reward: my_rewards.py has no function sort (did you mean short?)"),
    ([*GRPO, "--reward", "my_rewards.py:CALLS"], "reward: my_rewards.py:CALLS: CALLS is no function; it has short, spaces"),
    ([*GRPO, "--reward", "my_rewards.py"], "reward: my_rewards.py: name the function, as in my_rewards.py:short; it has short, spaces"),
    ([*GRPO, "--reward", "syntax.py:f"], "reward: syntax.py:2: not Python"),
    ([*GRPO, "--reward", "broken.py:f"], "reward: broken.py:2: ZeroDivisionError: division by zero"),
    ([*GRPO, "--reward", "narrow.py:f"], "reward: narrow.py:f cannot be called with prompts, completions, completion_ids, answer, place: got an unexpected"),
    ([*GRPO, "--reward", "exct"], "reward: exct: no such run, folder or built-in reward (did you mean exact?)"),
    ([*GRPO, "--reward", "short"], "a function of yours is written file.py:short"),
    ([*GRPO, "--reward", "tiny"], "reward: tiny is no reward model: llm-train rm makes one"),
    ([*GRPO, "--reward", "[]"], "reward must name at least one reward"),
    ([*GRPO, "--reward", "exact", "--reward_weights", "[1,2]"], "reward_weights must be 1 finite number, one for each reward, got [1.0, 2.0]"),
    ([*GRPO, "--reward", "exact", "--sampling.group_size", "1"], "sampling.group_size must be at least 2, got 1"),
    ([*GRPO, "--reward", "exact", "--sampling.passes", "0"], "sampling.passes must be at least 1, got 0"),
    ([*GRPO, "--reward", "exact", "--beta", "-1"], "beta must be finite and not negative, got -1.0"),
    ([*GRPO, "--reward", "exact", "--loss_type", "gppo"], "loss_type: expected one of 'grpo', 'dapo', 'dr_grpo', 'rloo'"),
    ([*GRPO, "--reward", "exact", "--lora.r", "2", "--lora.dropout", "0.1"], "lora.dropout must be 0 here, got 0.1"),
    ([*PPO, "--reward_model", "other-rm"], "reward_model: other-rm has another vocabulary (300 tokens, 320 here) than the policy tiny"),
    ([*PPO, "--reward_model", "runs/none"], "reward_model: runs/none: no such run folder"),
    ([*PPO, "--reward_model", "my_rewards.py:short", "--value", "reward"], "value: reward starts from the reward model"),
    ([*PPO, "--reward_model", "world", "--world.n_entities", "0"], "world.n_entities must be at least 1"),
    ([*PPO, "--reward_model", "tiny-rm", "--lam", "1.5"], "lam must be in [0, 1], got 1.5"),
    (["ppo", "--model", "tiny", "--data", "world", "--reward_model", "world", *SAMPLING], "world: the model tiny has another vocabulary than this world"),
    (["dpo", "--model", "tiny", *PAIRED, "--beta", "0"], "beta must be positive and finite, got 0.0"),
    (["dpo", "--model", "tiny", *PAIRED, "--reference", "adapter"], "reference: adapter is the policy with its adapter switched off: add a lora section"),
    (["dpo", "--model", "tiny", *PAIRED, "--loss_type", "ipo", "--label_smoothing", "0.1"], "label_smoothing must be 0 with loss_type ipo"),
    (["dpo", "--model", "tiny", *PAIRED, "--quant.blocksize", "32"], "quant: 4-bit weights cannot be trained: add a lora section"),
    (["dpo", "--model", "tiny", "--data", "rows.jsonl"], "rows.jsonl:1: a row of messages; prompt + chosen + rejected or chosen + rejected is needed here"),
    (["dpo", "--model", "tiny", "--data", "claims:mid"], "claims:mid: claims has the parts train and heldout"),
    (["distill", "--teacher", "tiny", "--student", "./none", "--data", "rows.jsonl"], "student: ./none: no such folder"),
    (["rm", "--model", "tiny", *PAIRED, "--center", "-1"], "center must be finite and not negative, got -1.0"),
    (["rm", "--model", "tiny", *PAIRED, "--max_length", "97"], "max_length: 97 is more than the model's context of 96 tokens"),
    (["distill", "--teacher", "tiny", "--data", "rows.jsonl", "--student_layers", "[3,1]"], "student_layers: layers must be ascending numbers from 0 to 3, got [3, 1]"),
    (["distill", "--teacher", "tiny", "--data", "rows.jsonl", "--student", "tiny", "--student_layers", "[1]"], "student_layers: the student is given"),
    (["distill", "--teacher", "tiny", "--data", "rows.jsonl", "--mode", "on_policy", "--alpha", "0.5"], "alpha must be 0 for on_policy, got 0.5"),
    (["distill", "--teacher", "tiny", "--data", "rows.jsonl", "--student_share", "0.5"], "student_share: is for mode on_policy, got logit"),
    (["distill", "--teacher", "tiny", "--data", "rows.jsonl", "--mode", "on_policy", "--student_share", "0"],
     "student_share must be above 0 and at most 1, got 0.0 (without the student's text: mode logit)"),
    (["distill", "--teacher", "tiny", "--data", "prompts.jsonl", "--mode", "on_policy", "--student_share", "0.5"], "prompts.jsonl:1: "),
    (["distill", "--teacher", "tiny", "--data", "rows.jsonl", "--temperature", "0"], "temperature must be positive and finite, got 0.0"),
    (["distill", "--teacher", "tiny-rm", "--data", "rows.jsonl"], "teacher: tiny-rm is a reward model"),
]


@pytest.mark.parametrize("part", range(4))
def test_refusals_name_field_and_value_and_write_nothing(part, here, capsys):
    Path("syntax.py").write_text("def f(x):\nreturn 1\n")
    Path("broken.py").write_text("x = 0\ny = 1 / x\ndef f(**k):\n    pass\n")
    Path("narrow.py").write_text("def f(prompts, completions):\n    return [0.0 for _ in completions]\n")
    before, wrong = files_of(here), []
    for args, words in REFUSED[part::4]:
        code = main([*args, *CPU])
        out, err = capsys.readouterr()
        if code != 2 or words not in err or "Traceback" in err or out or files_of(here) != before:
            wrong.append((args, words, code, err, out))
    assert not wrong


@pytest.mark.parametrize("said,wanted,value", [
    ("Answer: Lisbon. Have a nice day.", "Lisbon", 1), ("answer:  lisbon", "Lisbon.", 1), ("Answer: Porto. Answer: Lisbon.", "Lisbon", 1),
    ("Answer: Lisbon. Answer: Porto.", "Lisbon", 0), ("It is Lisbon.", "Lisbon", 0), ("Lisbon.", "Lisbon", 1), ("so #### 1,200", "1200", 1),
    ("so \\boxed{0.50}", ".5", 1), ("Answer: 3.5", "3.5", 1), ("Answer: 3.5 km", "3.5", 0), ("", "Lisbon", 0), ("答案:里斯本。", "里斯本", 1)])
def test_the_exact_reward(said, wanted, value):
    assert rewards.exact([said, BOT(said)], [wanted, wanted], other=[1, 2]) == [value, value]


# ---------------------------------------------------------------------------------------------------------------------
# the small world
# ---------------------------------------------------------------------------------------------------------------------
def test_the_small_world_through_its_commands(here, capsys):
    small = ["--world.n_entities", "6", "--world.n_attributes", "2", "--train.cpu", "true", "--train.progress", "false", "--samples", "1", "--sample_tokens", "4"]
    good(capsys, "pretrain", "--data", "world", *small, "--model.hidden_size", "32", "--max_length", "128", "--train.epochs", "1", "--out", "base")
    step = ["--train.max_steps", "2", *small]
    out = good(capsys, "rm", "--model", "base", "--data", "world", *step, "--micro_batch_size", "8", "--out", "rm")
    assert "world:heldout: 200 rows of preference" in out and "world.agrees_with_truth" in out
    labels = runs.read_results("rm")["after"]["world.labels_agree_with_truth"]
    assert 0.6 < labels < 0.95  # a judge of one nat errs
    got = evaluated(capsys, "rm", "--data", "world")
    assert got["pairs"] == 200 and got["world.labels_agree_with_truth"] == labels
    few = ["--sampling.prompts_per_iteration", "4", "--sampling.max_new_tokens", "8", "--eval_prompts", "3"]
    good(capsys, "ppo", "--model", "base", "--data", "world", "--reward_model", "rm", *step, *few, "--out", "ppo")
    good(capsys, "grpo", "--model", "base", "--data", "world", "--reward", "[world,exact]", *step, *few, "--sampling.group_size", "2", "--out", "grpo")
    good(capsys, "dpo", "--model", "base", "--data", "world", *step, "--out", "dpo")
    good(capsys, "distill", "--teacher", "base", "--data", "world", *step, "--mode", "on_policy", "--max_new_tokens", "8", "--out", "student")
    for run in ("ppo", "grpo", "dpo", "student"):
        assert evaluated(capsys, run, "--data", "world")["world.true_reward"] == runs.read_results(run)["after"]["world.true_reward"]
    assert "world.knowledge" in runs.read_results("student")["teacher"]
    assert main(["ppo", "--model", "base", "--data", "world", "--reward_model", "rm", *step, *few, "--world.seed", "1"]) == 2
    assert "another vocabulary than this world" in capsys.readouterr().err


def test_the_demo_goes_on_through_preferences(here, models, capsys):
    "Five stages of a tiny world, three runs of a tiny model: a column for each stage, a table for the pairs."
    from llm_train_course.app import demo
    from llm_train_course.app.train import WorldSpec

    world = WorldSpec(n_entities=4, n_attributes=2, n_paraphrases=2)
    short = lambda recipe, **more: replace(recipe, train=replace(recipe.train, epochs=1, max_steps=2, progress=False), **more)
    few = replace(demo.WORLD_PPO.sampling, prompts_per_iteration=4, max_new_tokens=8)
    part_a = (short(demo.WORLD_PRETRAIN, world=world), short(demo.WORLD_SFT, world=world), short(demo.WORLD_RM, world=world),
              short(demo.WORLD_PPO, world=world, sampling=few), short(demo.WORLD_DPO, world=world))
    rows = {"model": "tiny", "data": "rows.jsonl", "eval_data": "rows.jsonl", "sample_tokens": 4}
    part_b = (short(demo.SMOLLM2_LORA, **rows), short(demo.SMOLLM2_QLORA, **rows),
              short(demo.SMOLLM2_DPO, model="tiny", data="pairs.jsonl", eval_data="held.jsonl"))
    assert demo.demo("demo", 1, part_a, part_b) == 0
    out, page = capsys.readouterr().out, Path("demo/report.html").read_text(encoding="utf-8")
    table = out.split("the small world  ")[-1]
    assert re.match(r" +untrained  +pretrained  +fine-tuned  +PPO  +DPO\n", table)
    # the columns are what the runs say, and PPO and DPO both begin where fine-tuning ended
    results = {name: runs.read_results(f"demo/world-{name}") for name in ("pretrain", "sft", "rm", "ppo", "dpo")}
    said = re.search(r"its true reward, nats((?: +-?\d+\.\d+){5})\n", out)[1].split()
    assert said == [f"{part['world.true_reward']:.3f}" for part in (results["pretrain"]["before"], *(results[n]["after"] for n in ("pretrain", "sft", "ppo", "dpo")))]
    for name in ("ppo", "dpo"):
        assert {k: v for k, v in results[name]["before"].items() if k.startswith("world.")} == pytest.approx(results["sft"]["after"], nan_ok=True)
        assert runs.read_config(f"demo/world-{name}")["model"] == "demo/world-sft"
    assert f"{100 * results['rm']['after']['world.agrees_with_truth']:.1f} % of held-out pairs" in out
    pairs = runs.read_results("demo/smollm2-dpo")
    assert re.search(rf"held-out claims +before +DPO\nloss, nats a pair +0\.693 +{pairs['after']['loss']:.3f}\n", out)
    for words in ("Preferences: a reward model with PPO, and DPO", "The score that PPO raises", "prefers the accurate statement", "Answers before DPO and after"):
        assert words in page


def test_recipes_are_those_of_the_demo():
    from llm_train_course.app import demo, train

    at = lambda command, name: parse(command, train.TRAINING[command][0], ["--config", str(ROOT / "recipes" / f"{name}.yaml")])
    assert replace(at("rm", "world-rm"), model="") == demo.WORLD_RM
    assert replace(at("ppo", "world-ppo"), model="", reward_model="") == demo.WORLD_PPO
    assert replace(at("dpo", "world-dpo"), model="") == demo.WORLD_DPO
    assert at("dpo", "smollm2-dpo") == demo.SMOLLM2_DPO
    # beyond the types, every recipe passes the checks that come before anything is read
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        command = re.search(r"llm-train (\w+) --config recipes/" + re.escape(path.name), path.read_text(encoding="utf-8"))[1]
        if command in ("rm", "ppo", "grpo", "dpo", "distill"):
            parse(command, train.TRAINING[command][0], ["--config", str(path)]).check()


@pytest.mark.parametrize("name", ["rm", "dpo", "grpo", "distill"])
def test_bytes_in_a_recipes_comment_are_those_of_its_shape(name):
    "Every size in the comment, from the published shape; the sum is what it says and fits the card."
    text = (ROOT / f"recipes/gpu-qwen25-7b-{name}.yaml").read_text(encoding="utf-8")
    comment, recipe, model = re.sub(r"\n# ", " ", text.split("llm-train")[0]), yaml.safe_load(text), shape("qwen2.5-7b")
    gigabytes = lambda n: f"{n / 1e9:.1f} GB"
    assert "counted from tensor sizes and never measured on a GPU" in comment and recipe["gradient_checkpointing"]
    head, layers = model.vocab_size * model.hidden_size, model.n_layers
    logits_copies, sampled = 1024 * model.vocab_size * 10, 0  # ten bytes a logit: two FP32 copies and one in 16 bits
    assert gigabytes(1024 * model.vocab_size * 4) in comment or name == "rm"
    # two answers a pair; a shared row has both
    tokens = {"rm": 4 * 1024, "dpo": 2 * 2048, "grpo": 4 * 768, "distill": 2 * 2048}[name]
    assert tokens == recipe["micro_batch_size"] * recipe["max_length"] * {"rm": 2, "dpo": 2}.get(name, 1) and f"{tokens:,} tokens" in comment
    if name == "distill":
        layers //= 2
        student = 2 * head + model.n_linear // 2 + model.hidden_size * (layers * 2 + 1) + layers * (model.n_heads + 2 * model.n_kv_heads) * model.head_dim
        quantized = finetune_bytes(model, "qlora")
        parts = [10 * student, quantized["4-bit weights"], 2 * quantized["16-bit weights"]]
        assert f"{student / 1e9:.1f} B parameters" in comment and f"{4 * (student + model.n_params) / 1e9:.0f} GB" in comment
        logits_copies *= 2
    else:
        made = finetune_bytes(model, "lora", r=recipe["lora"]["r"])
        parts = [made.pop("weights") - 2 * head * (name == "rm"), sum(made.values())]
        assert f"{lora_params(model, recipe['lora']['r']) / 1e6:.0f} M parameters" in comment
    per_token = float(re.search(r"(\d+) kB a token", comment)[1]) * 1e3
    inputs, layer = layers * tokens * 2 * model.hidden_size, per_token * tokens
    for n in (*parts, inputs, layer):
        assert gigabytes(n) in comment, gigabytes(n)
    work = inputs + layer + logits_copies * (name != "rm")
    if name == "grpo":
        s = recipe["sampling"]
        cache = s["generation_batch_size"] * recipe["max_length"] * 2 * model.n_layers * model.n_kv_heads * model.head_dim * 2
        sampled = 4 * s["generation_batch_size"] * s["max_new_tokens"] * model.vocab_size
        assert gigabytes(cache) in comment and gigabytes(sampled) in comment
        work = max(work, cache + sampled)
        assert recipe["train"]["grad_accum_steps"] * recipe["micro_batch_size"] == s["prompts_per_iteration"] * s["group_size"]
    said = float(re.search(r"So about (\d+) GB", comment)[1])
    assert said == pytest.approx((sum(parts) + work) / 1e9, abs=1.0)
    assert said < (80 if name == "distill" else 24) - 2
