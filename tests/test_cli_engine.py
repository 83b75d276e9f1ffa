"""`llm-train` under engines: the same results from each, what is written, what is refused, and a process that dies.

Two processes on gloo run the commands of `RUNS` one after the other, without a launcher; torchrun, `accelerate launch` and
`deepspeed` each launch one run."""
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from helpers import ROWS, SENTENCES, TOKENIZER, files_of, model, on_two_ranks
from safetensors.torch import load_file

from llm_train_course.app import runs
from llm_train_course.app.cli import main
from llm_train_course.core import TrainConfig, _check_deepspeed, deepspeed_config

ROOT = Path(__file__).parents[1]
FAST = shlex.split("--train.cpu true --train.progress false --train.log_every 1 --train.max_steps 3 --train.learning_rate 3e-3 "
                   "--micro_batch_size 1 --samples 1 --sample_tokens 4")
DATA = shlex.split("--model base --data rows.jsonl --eval_data rows.jsonl")
PAIRS = shlex.split("--model base --data pairs.jsonl --eval_data pairs.jsonl")
TWO = ["--train.grad_accum_steps", "2"]  # each of two processes; one process: 4
RUNS = {
    "ddp": ["sft", *DATA],
    "fsdp": ["sft", *DATA, "--engine", "fsdp", "--train.eval_every", "2"],
    "fsdp-cpu": ["full", *DATA, "--engine=fsdp", "--offload=cpu"],
    "zero0": ["sft", *DATA, "--engine", "deepspeed", "--zero", "0"],
    "zero1": ["full", *DATA, "--zero", "1"],
    "zero2": ["sft", *DATA, "--zero", "2", "--offload", "cpu"],
    "zero3": ["sft", *DATA, "--engine", "deepspeed", "--zero=3", "--offload", "cpu", "--train.checkpointing", "full"],
    "file": ["sft", *DATA, "--ds_config", "mine.json"],
    "lora-ddp": ["lora", *DATA],
    "lora-fsdp": ["lora", *DATA, "--engine", "fsdp"],
    "lora-zero3": ["lora", *DATA, "--zero", "3"],
    "qlora-ddp": ["qlora", *DATA, "--quant.blocksize", "32"],
    "qlora-zero2": ["qlora", *DATA, "--quant.blocksize", "32", "--zero", "2"],
    "pretrain-ddp": ["pretrain", "--data", "texts.jsonl", "--model.hidden_size", "32", "--model.vocab_size", "300", "--packing", "false"],
    "pretrain-zero3": ["pretrain", "--data", "texts.jsonl", "--model.hidden_size", "32", "--model.vocab_size", "300", "--packing", "false", "--zero", "3"],
    "dpo-ddp": ["dpo", *PAIRS],
    "dpo-zero3": ["dpo", *PAIRS, "--zero", "3"],
    "dpo-fsdp": ["dpo", *PAIRS, "--engine", "fsdp"],
    "rm-ddp": ["rm", *PAIRS],
    "rm-zero2": ["rm", *PAIRS, "--zero", "2"],
}
MINE = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 2, "train_batch_size": "auto", "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000}}


def _worker(rank, folder):
    os.chdir(folder)
    for name, argv in RUNS.items():
        try:
            code = main([argv[0], "--debug", *argv[1:], *FAST, *TWO, "--out", name])
        except BaseException:
            code = traceback.format_exc()
        Path(f"{name}-{rank}.txt").write_text(str(code))


def _alone(folder):
    os.chdir(folder)
    os.environ.pop("RANK", None)
    code = main(["sft", "--debug", *DATA, *FAST, "--train.grad_accum_steps", "4", "--zero", "3", "--out", "alone-zero3"])
    code = code or main(["sft", "--debug", *DATA, *FAST, "--train.grad_accum_steps", "4", "--engine", "fsdp", "--out", "alone-fsdp"])
    os._exit(code)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    model().save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    lines = {"rows": [{"prompt": s[:9], "completion": s[9:]} for s in SENTENCES], "texts": [{"text": s} for s in SENTENCES],
             "pairs": [{"prompt": s[:9], "chosen": s[9:], "rejected": s[9:14]} for s in SENTENCES]}
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.json").write_text(json.dumps(MINE))
    return folder


@pytest.fixture(scope="module")
def ran(place):
    "Runs of two processes."
    on_two_ranks(_worker, place, "fork")
    return place


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    return place


def weights(run):
    folder = runs.trained_folder(run)
    return load_file(next(p for p in folder.glob("*.safetensors")))


def same(one, two, bound=2e-5):
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=0, atol=bound)


@pytest.mark.parametrize("name", RUNS)
def test_each_engine_gives_what_ddp_gives(ran, name):
    for rank in (0, 1):
        assert (text := (ran / f"{name}-{rank}.txt").read_text()) == "0", text
    twin = {"lora": "lora-ddp", "qlora": "qlora-ddp", "pretrain": "pretrain-ddp", "dpo": "dpo-ddp", "rm": "rm-ddp"}.get(name.split("-")[0], "ddp")
    same(ran / name, ran / twin)
    for when in ("before", "after"):
        one, two = (runs.read_results(ran / n)[when] for n in (name, twin))
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
    assert runs.read_results(ran / name)["answers_after"] == runs.read_results(ran / twin)["answers_after"]
    rows = [[(r["step"], r["n_targets"]) for r in runs.read_metrics(ran / n) if "loss" in r] for n in (name, twin)]
    assert rows[0] == rows[1] and len(rows[0]) == 3


def test_two_processes_are_one(ran, here):
    assert main(["sft", *DATA, *FAST, "--train.grad_accum_steps", "4", "--out", "one"]) == 0
    same("one", "ddp")
    one = multiprocessing.get_context("fork").Process(target=_alone, args=(str(here),))  # engines want a process group, which would stay
    one.start()
    one.join(200)
    assert one.exitcode == 0
    same("one", "alone-zero3")
    same("one", "alone-fsdp")


def test_what_the_engine_gets_is_written_down(ran):
    made = json.loads((ran / "zero3" / "ds_config.json").read_text())
    assert made == {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0, "train_batch_size": 4,
                    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
                    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    mine = json.loads((ran / "file" / "ds_config.json").read_text())
    assert mine["zero_optimization"] == MINE["zero_optimization"] and mine["train_batch_size"] == 4 and mine["bf16"] == {"enabled": False}
    config = runs.read_config(ran / "zero1")
    assert (config["train"]["engine"], config["train"]["zero"]) == ("deepspeed", 1)
    assert not (ran / "fsdp" / "ds_config.json").exists()


def test_a_model_folder_of_any_engine_loads_elsewhere(ran):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for name in ("fsdp", "zero3"):
        found = AutoModelForCausalLM.from_pretrained(ran / name / "model", dtype=torch.float32)
        assert torch.equal(found.model.norm.weight, weights(ran / name)["model.norm.weight"])
    base = AutoModelForCausalLM.from_pretrained(ran / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, ran / "lora-zero3" / "adapter")
    assert sum("lora" in n for n, _ in adapted.named_parameters()) == len(weights(ran / "lora-zero3"))


REFUSED = {
    "--engine megatron": "train.engine must be one of auto, ddp, fsdp, deepspeed, got 'megatron'",
    "--zero 4": "train.zero must be 0, 1, 2 or 3, got 4",
    "--engine fsdp --zero 2": "zero is for engine deepspeed, engine is fsdp",
    "--engine ddp --offload cpu": "engine_offload: ddp keeps no shards",
    "--zero 0 --offload cpu": "zero 0 has no shards",
    "--zero 2 --offload nvme": "train.engine_offload must be none or cpu, got 'nvme'",
    "--zero 2 --train.precision fp16": "fp16",
    "--engine fsdp --train.optimizer adamw_8bit": "the states of bitsandbytes cannot be cut into shards",
    "--engine fsdp --monitor true": "monitor: engine fsdp holds weights",
    "--zero 3 --train.offload true": "offload: activations",
    "--zero 1 --dtype bf16": "dtype: bf16 weights are multiplied in bf16 under deepspeed",
    "--zero 0 --dtype bf16 --train.precision bf16": "dtype: bf16 weights need a float32 copy",
    "--engine fsdp --dtype bf16 --train.precision bf16": "dtype: bf16 weights need a float32 copy to be trained, which fsdp does not keep",
    "--ds_config none.json": "ds_config: none.json cannot be read (No such file or directory)",
    "--ds_config rows.jsonl": "ds_config: rows.jsonl is not JSON",
    "--ds_config clip.json": "ds_config: clip.json: gradient_clipping is 0.5, but the recipe says train.max_grad_norm = 1.0",
    "--ds_config mine.json --zero 2": "ds_config: mine.json: zero_optimization.stage is 3, but the recipe says train.zero = 2",
    "--ds_config mine.json": "ds_config: mine.json: gradient_accumulation_steps is 2, but the recipe says train.grad_accum_steps = 1",
    "--ds_config adam.json": "ds_config: adam.json: optimizer is the loop's AdamW",
    "--ds_config batch.json": "ds_config: batch.json: train_batch_size is 64, but micro_batch_size 1 * train.grad_accum_steps 1 * 1 ranks = 1",
    "--ds_config disk.json": "ds_config: disk.json: zero_optimization.offload_param.device must be none or cpu, got 'nvme'",
}


def test_what_an_engine_cannot_do_is_refused_by_name_and_nothing_is_written(here, capsys):
    files = {"clip": {"gradient_clipping": 0.5}, "adam": {"optimizer": {"type": "AdamW"}}, "batch": {"train_batch_size": 64},
             "disk": {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}}
    for name, content in files.items():
        Path(f"{name}.json").write_text(json.dumps(content))
    before, wrong = files_of(here), []
    for flags, words in REFUSED.items():
        code = main(["sft", *DATA, *FAST, "--out", "never", *flags.split()])
        err = capsys.readouterr().err
        if code != 2 or words not in err or err.count("\n") != 1:
            wrong.append((flags, code, err))
    for command, flags in (("ppo", "--zero 2"), ("grpo", "--engine fsdp")):
        extra = ["--reward_model", "base"] if command == "ppo" else ["--reward", "length"]
        code, err = main([command, "--model", "base", "--data", "rows.jsonl", *extra, "--out", "never", *flags.split()]), capsys.readouterr().err
        if code != 2 or "runs under ddp" not in err:
            wrong.append((command, code, err))
    code, err = main(["qlora", *DATA, *FAST, "--zero", "3", "--out", "never"]), capsys.readouterr().err
    if code != 2 or "4-bit weights are not cut into shards" not in err:
        wrong.append(("qlora", code, err))
    assert not wrong and files_of(here) == before


LOW = "--train.precision bf16"
FILES = {
    "half": ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, LOW, "torch_autocast.dtype is 'float16', but train.precision bf16 is bfloat16"),
    "sums": ({"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}, f"{LOW} --dtype bf16", "data_types.grad_accum_dtype is 'fp32'"),
    "tensor": ({"tensor_parallel": {"autotp_size": 2}}, "", "tensor_parallel: every rank of the loop has"),
    "sequence": ({"sequence_parallel_size": 2}, "", "sequence_parallel_size: every rank of the loop has"),
    "pipeline": ({"pipeline": {"stages": 2}}, "", "pipeline: every rank of the loop has"),
    "elastic": ({"elasticity": {"enabled": True}}, "", "elasticity: every rank of the loop has"),
    "three": ({"zero_optimization": 3}, "", "zero_optimization must be an object, got 3"),
    "true": ({"bf16": True}, "", "bf16 must be an object, got true"),
    "cast": ({"torch_autocast": "bfloat16"}, LOW, 'torch_autocast must be an object, got "bfloat16"'),
    "place": ({"zero_optimization": {"offload_optimizer": "cpu"}}, "", 'zero_optimization.offload_optimizer must be an object, got "cpu"'),
    "nought": ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "", "zero_optimization.offload_optimizer.device is 'cpu', but zero 0 has no shards"),
    "nought-param": ({"zero_optimization": {"stage": 0, "offload_param": {"device": "cpu"}}}, "", "zero_optimization.offload_param.device is 'cpu', but zero 0 has no shards"),
    "nought-flag": ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "--zero 0", "zero_optimization.offload_optimizer.device is 'cpu', but zero 0 has no shards"),
    "two": ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "", "zero_optimization.offload_param.device is 'cpu', but zero 2 does not cut the weights; use zero 3"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_contradicts_the_run_is_refused_by_name(here, capsys, name):
    content, flags, words = FILES[name]
    Path(f"{name}.json").write_text(json.dumps(content))
    code, err = main(["sft", *DATA, *FAST, "--ds_config", f"{name}.json", *flags.split(), "--out", "never"]), capsys.readouterr().err
    assert code == 2 and f"ds_config: {name}.json: {words}" in err and err.count("\n") == 1
    assert not Path("never").exists()


@pytest.mark.parametrize("content,change,key,value", [
    ({"sequence_parallel_size": 1, "elasticity": {"enabled": False}, "tensor_parallel": {"autotp_size": 1}}, {}, "zero_optimization.stage", 2),
    ({"zero_optimization": {"stage": 3, "offload_param": None}}, {"zero": 3, "engine_offload": "cpu"}, "zero_optimization.offload_param.device", "cpu"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, {}, "zero_optimization.offload_param.device", "cpu"),
    ({"torch_autocast": {"enabled": "auto", "dtype": "auto"}}, {"precision": "bf16"}, "torch_autocast.dtype", "bfloat16")])
def test_a_file_that_asks_for_nothing_else_is_taken(tmp_path, content, change, key, value):
    (tmp_path / "file.json").write_text(json.dumps(content))
    made = deepspeed_config(TrainConfig(engine="deepspeed", ds_config=str(tmp_path / "file.json"), **change))
    for part in key.split("."):
        made = made[part]
    assert made == value


def test_an_older_deepspeed_is_refused_by_name(here, capsys, monkeypatch):
    import importlib.metadata
    for found, code in (("0.18.0", 2), ("0.19.0", 2), ("0.19.8+abc", None), ("0.20.1", None)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, found=found: found)
        if code is None:
            _check_deepspeed()
            continue
        assert main(["sft", *DATA, *FAST, "--zero", "3", "--out", "never"]) == code
        assert f"train.engine deepspeed: deepspeed {found} is too old, 0.19.8 or newer is needed" in capsys.readouterr().err
    assert not Path("never").exists()


@pytest.mark.parametrize("names,words", [
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero: the recipe says 2, the launcher 3"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "engine: the recipe says 'deepspeed', the launcher 'fsdp'"),
    ({"ACCELERATE_USE_FSDP": "true"}, "accelerate is configured for FSDP1"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "accelerate is configured for MEGATRON_LM")])
def test_recipe_and_launcher_must_agree(here, capsys, monkeypatch, names, words):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert main(["sft", *DATA, *FAST, "--engine", "deepspeed", "--zero", "2", "--out", "never"]) == 2
    assert words in capsys.readouterr().err and not Path("never").exists()


def launch(here, *words):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, env=env, cwd=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


CLI = ["-m", "llm_train_course.app.cli", "sft", *DATA, *FAST, *TWO, "--samples", "0"]


def test_accelerate_launch(ran, here):
    said = launch(here, sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                  "--dynamo_backend", "no", "--use_deepspeed", "--zero_stage", "3", *CLI, "--out", "accelerated")
    assert "engine   DeepSpeed ZeRO-3, 2 processes\n" in said and said.count("saved    accelerated/model") == 1
    same("accelerated", "ddp")


def test_the_launcher_of_deepspeed(ran, here):
    said = launch(here, "deepspeed", "--num_gpus", "2", "--master_port", "29631", "--module", *CLI[1:], "--zero", "1", "--out", "launched")
    assert "engine   DeepSpeed ZeRO-1, 2 processes\n" in said
    same("launched", "ddp")


DRIVER = """
import os, signal, sys
from llm_train_course import core
from llm_train_course.app.cli import main
from llm_train_course.core import TrainConfig, _check_deepspeed, deepspeed_config
advance = core._advance
def dies(p, *rest):
    advance(p, *rest)
    if p.step == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
core._advance = dies
sys.exit(main())
"""


def test_a_process_that_dies_is_started_again_and_the_run_goes_on(ran, here):
    Path("driver.py").write_text(DRIVER)
    launch(here, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1", "driver.py",
           *CLI[2:], "--zero", "3", "--offload", "cpu", "--train.checkpointing", "full", "--train.save_every", "1", "--out", "killed")
    a, b = weights("killed"), weights("zero3")
    assert all(torch.equal(a[k], b[k]) for k in b)  # the same bits as the run that nobody killed
    assert [row["step"] for row in runs.read_metrics("killed") if "loss" in row] == [1, 2, 3]
    assert len(ROWS) == 9


def test_the_slurm_script_launches_a_command_that_parses(tmp_path, monkeypatch):
    "With stand-ins for Slurm's programs: what it would run on each node, for every recipe made for several processes."
    from llm_train_course.app.cli import parse
    from llm_train_course.app.engine import long_flags, restarted
    from llm_train_course.app.train import TRAINING

    tools = tmp_path / "bin"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    tools.mkdir()
    for name, body in {"scontrol": 'printf "node7\\nnode8\\n"', "srun": 'printf "%s\\n" "again=${SLURM_RESTART_COUNT:-}" "$@"',
                       "torchrun": 'echo "[--shutdown-timeout SHUTDOWN_TIMEOUT]"'}.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NAME": "llm-train", "SLURM_JOB_ID": "42",
           "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "64"}
    recipes = sorted((ROOT / "recipes").glob("multi-*.yaml"))
    assert len(recipes) == 2
    for recipe in recipes:
        done = subprocess.run(["bash", str(ROOT / "recipes" / "multinode.slurm"), str(recipe), "--zero", "3"], env=env, cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        words = done.stdout.split("\n")[:-1]
        assert words[:2] == ["again=", "--cpus-per-task=64"]
        at = lambda name, words=words: words[words.index(name) + 1]
        assert (at("--nnodes"), at("--nproc_per_node"), at("--rdzv_endpoint"), at("--rdzv_id")) == ("2", "4", "node7:29500", "42")
        assert at("--shutdown-timeout") == "540"
        command, *argv = words[words.index("llm_train_course.app.cli") + 1:]
        made = parse(command, TRAINING[command][0], long_flags(argv))
        assert (made.out, made.train.engine, made.train.zero) == ("runs/llm-train-42", "deepspeed", 3)
    assert subprocess.run(["bash", str(ROOT / "recipes" / "multinode.slurm")], env=env, cwd=tmp_path, capture_output=True).returncode == 1
    (tmp_path / "runs" / "older").mkdir(parents=True)
    (tmp_path / "runs" / "older" / "config.yaml").write_text("")  # a new job goes on with this run
    (tools / "torchrun").write_text("#!/bin/bash\necho '[--max-restarts MAX_RESTARTS]'\n")  # of an older torch
    done = subprocess.run(["bash", str(ROOT / "recipes" / "multinode.slurm"), str(recipes[0])], env={**env, "OUT": "runs/older"}, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("\n")[:-1]
    assert words[0] == "again=1" and words[words.index("--out") + 1] == "runs/older" and "--shutdown-timeout" not in words
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        Path(made.out).mkdir(parents=True, exist_ok=True)
        Path(made.out, "config.yaml").write_text("")
        assert not restarted(made.out) and not restarted(None)
        monkeypatch.setenv(name, "1")
        assert restarted(made.out) and not restarted("other") and not restarted(None)
        monkeypatch.delenv(name)
