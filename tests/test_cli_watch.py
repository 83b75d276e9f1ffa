"A guard and a monitor through the command: what is refused is told, what is watched is drawn."
import json
import re
from pathlib import Path

import pytest
from test_cli import FAST, here, main, model_folder, weights  # noqa: F401  (fixtures)

from llm_train_course.app import report, runs, train

STRANGE = {"prompt": "zq?", "completion": " " + " ".join(a + b for a in "xqzj" for b in "wfyh")}
CAUTIOUS = ["--guard.warmup", "8", "--guard.window", "24", "--micro_batch_size", "1", "--train.log_every", "1", "--samples", "0"]


def with_a_strange_row():
    rows = [json.loads(line) for line in Path("prompt.jsonl").read_text().splitlines()]
    Path("strange.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, STRANGE]))


def test_a_strange_row_is_refused_and_told(here, model_folder, capsys):  # noqa: F811
    with_a_strange_row()
    args = ["sft", "--model", model_folder, "--data", "strange.jsonl", "--train.epochs", "4", *CAUTIOUS, *FAST]
    assert main([*args, "--out", "run"]) == 0
    rows = runs.read_metrics("run")
    refused = [row for row in rows if "refused" in row]
    assert refused and {row["refused"][0] for row in refused} <= {0, 1, 2, 3} and max(row["refused"][0] for row in refused) >= 2
    assert sum("loss" in row for row in rows) == 4 * 25 - len(refused)
    page = Path("run/report.html").read_text()
    assert "<h3>Refused</h3>" in page and refused[0]["why"].split()[0] in page and "steps undone" in page
    assert f"refused  {len(refused)} updates by the guard; the report says which" in capsys.readouterr().out
    # the same recipe from the run's own file refuses the same and ends at the same weights
    assert main(["sft", "--config", "run/config.yaml", "--out", "again"]) == 0
    one, two = weights("run"), weights("again")
    assert one.keys() == two.keys() and all((one[k] == two[k]).all() for k in one)


def test_what_a_monitor_sees_is_logged_and_drawn_and_changes_nothing(here, model_folder, capsys):  # noqa: F811
    args = ["sft", "--model", model_folder, "--data", "prompt.jsonl", "--train.epochs", "2", "--samples", "0", "--lora.r", "4", *FAST]
    assert main([*args, "--out", "plain"]) == 0 and main([*args, "--monitor", "true", "--train.checkpointing", "full", "--out", "watched"]) == 0
    one, two = weights("plain"), weights("watched")
    assert all((one[k] == two[k]).all() for k in one)
    rows = [row for row in runs.read_metrics("watched") if "loss" in row]
    assert all({"update_ratio", "max_logit", "attn_entropy", "dead_units"} <= row.keys() for row in rows) and len(rows) > 1
    page = Path("watched/report.html").read_text()
    for words in ("Largest attention logit.", "Entropy of attention.", "Units of the MLPs that stay silent.", "Update over weights, by group"):
        assert words in page
    assert "Largest attention logit." not in Path("plain/report.html").read_text()


@pytest.mark.parametrize("extra,words", [
    (["--guard.z", "0"], "guard.z must be positive and finite, got 0.0"),
    (["--guard.warmup", "1"], "guard.warmup must be at least 2, got 1"),
    (["--guard.window", "8"], "guard.window must be at least 32, got 8"),
    (["--guard.rollback", "5"], "guard.rollback: 5 steps need a checkpoint that old: set train.save_every"),
    (["--guard.rollback", "5", "--train.save_every", "4"], "guard.rollback: 5 steps need a checkpoint that old"),
    (["--train.checkpointing", "half"], "train.checkpointing"),
    (["--train.checkpointing", "true"], "checkpointing must be none, full, selective or a number of blocks"),
    (["--train.checkpointing", "full", "--gradient_checkpointing", "true"], "gradient_checkpointing and train.checkpointing: full are two ways to do one thing"),
])
def test_refusals_name_field_and_value_and_write_nothing(extra, words, here, model_folder, capsys):  # noqa: F811
    assert main(["sft", "--model", model_folder, "--data", "prompt.jsonl", *extra, *FAST]) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and not Path("runs").exists()


def test_a_model_that_cannot_be_watched_is_refused_before_anything_is_written(here, model_folder, capsys):  # noqa: F811
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)).save_pretrained("gpt2")
    tokenizer.save_pretrained("gpt2")
    assert main(["sft", "--model", "gpt2", "--data", "prompt.jsonl", "--monitor", "true", *FAST]) == 2
    said = capsys.readouterr()
    assert "monitor: GPT2LMHeadModel has no attention layers" in said.err and not said.out and not Path("runs").exists()


def test_a_guard_beside_a_loss_scaler_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(train.torch.cuda, "is_available", lambda: True)
    recipe = train.SftRecipe("m", "d", guard=train.GuardSpec(), train=train.TrainConfig(precision="fp16"))
    with pytest.raises(runs.UserError, match="guard: with train.precision fp16 the loss scaler refuses updates already"):
        train.check_recipe(recipe)


def test_the_monitor_measures_the_steps_that_are_logged(here, model_folder, monkeypatch):  # noqa: F811
    from llm_train_course import stability
    made = []

    class Counting(stability.Monitor):
        def before_step(self, *args):
            made.append(self.watch.due)
            super().before_step(*args)

    monkeypatch.setattr(stability, "Monitor", Counting)
    args = ["sft", "--model", model_folder, "--data", "prompt.jsonl", "--train.max_steps", "11", "--train.log_every", "4", "--samples", "0", "--monitor", "true"]
    assert main([*args, *FAST, "--out", "run"]) == 0
    rows = [row for row in runs.read_metrics("run") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 4, 8, 11] == [step + 1 for step, due in enumerate(made) if due]
    assert all({"update_ratio", "max_logit"} <= row.keys() for row in rows)


def test_groups_stand_in_the_order_of_their_numbers():
    row = {"step": 3, "update_ratio": 0.1, **{f"update_ratio.layers.{n}.mlp": 0.1 for n in (10, 2, 0)}, "update_ratio.embed": 0.2}
    page = report.refusals([row])
    places = [page.index(name) for name in ("embed", "layers.0.mlp", "layers.2.mlp", "layers.10.mlp")]
    assert places == sorted(places)


@pytest.mark.parametrize("value", ["2", "'2'", "full"])
def test_a_number_of_blocks_in_a_recipe(value, here, model_folder):  # noqa: F811
    Path("recipe.yaml").write_text(f"train: {{checkpointing: {value}}}\n")
    args = ["sft", "--config", "recipe.yaml", "--model", model_folder, "--data", "prompt.jsonl", "--samples", "0", "--train.max_steps", "2", *FAST]
    assert main([*args, "--out", "run"]) == 0 and main(["sft", "--config", "run/config.yaml", "--out", "again"]) == 0
    assert str(runs.read_config("again")["train"]["checkpointing"]) == value.strip("'")


def test_with_a_rollback_a_resumed_run_keeps_the_places_of_its_checkpoints():
    plain = lambda rollback, every: train.plain(train.SftRecipe("m", "d", guard=train.GuardSpec(rollback=rollback), train=train.TrainConfig(save_every=every)))
    assert train.differences(plain(0, 4), plain(0, 2)) == []
    assert train.differences(plain(2, 4), plain(2, 2)) == [("train.save_every", 4, 2)]


def test_a_rollback_goes_back_and_the_run_ends(here, model_folder, capsys):  # noqa: F811
    with_a_strange_row()
    assert main(["sft", "--model", model_folder, "--data", "strange.jsonl", "--train.epochs", "4", *CAUTIOUS, *FAST, "--guard.rollback", "2",
                 "--train.save_every", "2", "--train.keep_checkpoints", "3", "--out", "run"]) == 0
    rows = runs.read_metrics("run")
    assert any("refused" in row for row in rows) and re.search(r"saved +run/model", capsys.readouterr().out)
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("command,extra", [("rm", []), ("dpo", ["--lora.r", "4"]), ("dpo", ["--reference", "cache"])], ids=["rm", "dpo-adapter", "dpo-cache"])
def test_rm_and_dpo_are_watched_too(command, extra, here, model_folder, capsys):  # noqa: F811
    pairs = [{"prompt": f"Where is {n}?", "chosen": f" In the {c} house.", "rejected": f" {c}"} for n in ("Ada", "Ben", "Cleo", "Dan") for c in ("red", "old", "big")]
    Path("pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    args = [command, "--model", model_folder, "--data", "pairs.jsonl", "--train.epochs", "2", "--train.log_every", "1", "--samples", "0", *extra, *FAST]
    assert main([*args, "--out", "plain"]) == 0 and main([*args, "--monitor", "true", "--guard.warmup", "2", "--guard.window", "8", "--out", "watched"]) == 0
    one, two = weights("plain"), weights("watched")
    rows = runs.read_metrics("watched")
    refused = sum("refused" in row for row in rows)
    assert refused or all((one[k] == two[k]).all() for k in one)
    seen = [row for row in rows if "loss" in row]
    assert all({"update_ratio", "max_logit", "attn_entropy", "dead_units"} <= row.keys() for row in seen)
    assert runs.read_config("watched")["guard"]["window"] == 8
    assert "Largest attention logit." in Path("watched/report.html").read_text()


def test_the_guard_of_dpo_refuses(here, model_folder, capsys):  # noqa: F811
    assert main(["dpo", "--model", model_folder, "--data", "claims", "--guard.rollback", "3", *FAST]) == 2
    assert "guard.rollback: 3 steps need a checkpoint that old" in capsys.readouterr().err
