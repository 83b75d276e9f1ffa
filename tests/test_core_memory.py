"Checkpointing and offload through `fit`: less is kept, and the run is the same to the last bit."
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers import CONFIG, ROWS, flat, model, on_two_ranks

from llm_train_course import memory
from llm_train_course.core import PaddedBatches, TrainConfig, fit, lm_loss
from llm_train_course.lora import add_lora
from llm_train_course.memory import checkpoint_blocks, offload_activations, recomputes, saved_bytes

DROPOUT = {"attention_dropout": 0.2, "n_layers": 3}
LEAN = [{"checkpointing": "full"}, {"checkpointing": "selective"}, {"checkpointing": "2"}, {"offload": True}, {"checkpointing": "full", "offload": True}]


@pytest.mark.parametrize("how", LEAN, ids=lambda h: "-".join(map(str, h.values())))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("adapters", [False, True])
def test_the_run_is_the_same(how, attention, adapters, monkeypatch):
    moved, runs = [], []

    @contextmanager
    def small_ones_too(**kw):  # all activations of this model are under the usual limit
        with offload_activations(min_bytes=1, **kw) as counted:
            yield counted
        moved.append(counted.n_tensors)

    monkeypatch.setattr(memory, "offload_activations", small_ones_too)
    for extra in ({}, how):
        moved.clear()
        m = model(**DROPOUT, attn_implementation=attention)
        if adapters:
            torch.manual_seed(0)
            add_lora(m, r=3, alpha=7, dropout=0.1)
        result = fit(m, PaddedBatches(ROWS, 2), config=replace(CONFIG, max_steps=4, grad_accum_steps=2, precision="bf16", **extra))
        runs.append((flat(m), [row["grad_norm"] for row in result.history]))
        assert bool(sum(moved)) == bool(extra.get("offload"))
        assert not any("forward" in vars(part) for part in m.modules())  # the model is as it was
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]


def test_less_is_kept_while_it_trains():
    def kept(how):
        m, found = model(**DROPOUT, attn_implementation="eager"), []

        def measured(m, batch):
            found.append(saved_bytes(lm_loss, m, batch, exclude=[m]))
            return lm_loss(m, batch)

        fit(m, PaddedBatches(ROWS, 4), measured, replace(CONFIG, max_steps=1, checkpointing=how))
        return found[0]

    assert kept("none") > kept("selective") > kept("full")


def test_a_run_may_go_on_with_other_memory_settings(tmp_path):
    layout, config = PaddedBatches(ROWS, 2), replace(CONFIG, save_every=4)
    want, got = model(**DROPOUT), model(**DROPOUT)
    fit(want, layout, config=config)
    fit(model(**DROPOUT), layout, config=replace(config, max_steps=9, checkpointing="full"), run_dir=tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000009", ignore_errors=True)  # as if it had stopped at step 8
    result = fit(got, layout, config=replace(config, offload=True), run_dir=tmp_path, resume=True)
    assert result.step == 9 and result.history[0]["step"] == 9 and torch.equal(flat(got), flat(want))


@pytest.mark.parametrize("value", ["half", "0", "-1", "2.5", "", "²"])
def test_bad_settings_are_named(value):
    with pytest.raises(ValueError, match=f"checkpointing must be none, full, selective or a number of blocks, got '{value}'"):
        TrainConfig(checkpointing=value)


def test_a_number_of_blocks_may_be_a_number():
    ends = []
    for how in ("2", 2):
        m = model(**DROPOUT)
        fit(m, PaddedBatches(ROWS, 2), config=replace(CONFIG, max_steps=2, checkpointing=how))
        ends.append(flat(m))
    assert torch.equal(*ends)
    for wrong in (True, 0, 2.5):
        with pytest.raises(ValueError, match="a number of blocks"):
            TrainConfig(checkpointing=wrong)


@pytest.mark.parametrize("mode", ["full", "selective", 2])
def test_what_a_model_recomputes_already_is_not_taken_away(mode):
    m = checkpoint_blocks(model(**DROPOUT, attn_implementation="eager"), mode)
    with pytest.raises(ValueError, match="the model recomputes already"):
        fit(m, PaddedBatches(ROWS, 2), config=replace(CONFIG, max_steps=1, checkpointing="full"))
    assert recomputes(m)
    fit(m, PaddedBatches(ROWS, 2), config=replace(CONFIG, max_steps=1))
    assert recomputes(m) and not recomputes(checkpoint_blocks(m, "none"))


def _worker(rank, folder):
    m = model(n_layers=3)
    fit(m, PaddedBatches(ROWS, 1), config=replace(CONFIG, max_steps=4, grad_accum_steps=2, checkpointing="full"))
    torch.save(flat(m), f"{folder}/{rank}.pt")


def test_two_processes_equal_one(tmp_path):
    on_two_ranks(_worker, tmp_path)
    want = model(n_layers=3)
    plain = model(n_layers=3)
    config = replace(CONFIG, max_steps=4, grad_accum_steps=4)
    fit(want, PaddedBatches(ROWS, 1), config=replace(config, checkpointing="full"))
    fit(plain, PaddedBatches(ROWS, 1), config=config)
    assert torch.equal(flat(want), flat(plain))
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(one, two)
    torch.testing.assert_close(one, flat(want), rtol=0, atol=2e-6)
