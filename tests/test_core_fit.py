"The loop: resuming after a kill at a random moment, damaged checkpoints, several processes, precisions, adapters."
import json
import os
import random
import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CONFIG, ROWS, TOKENIZER, flat, killed_until_done, model, on_two_ranks
from peft import LoraConfig, get_peft_model

from llm_train_course import core
from llm_train_course.core import (
    CheckpointWarning,
    NonFiniteLoss,
    PackedBatches,
    PaddedBatches,
    ResumeError,
    TrainConfig,
    evaluate,
    fit,
    latest_checkpoint,
    lm_loss,
)

DROPOUT = {"attention_dropout": 0.2}


def reference(layout, config, **kw):
    m = model(**kw)
    fit(m, layout, config=config)
    return m


@pytest.mark.parametrize("layout", [PaddedBatches(ROWS, 2), PackedBatches(ROWS, 1, 48)], ids=["padded", "packed"])
def test_kill_9_at_random_moments_then_resume_is_bit_equal(tmp_path, layout):
    config = replace(CONFIG, max_steps=14, save_every=1, grad_accum_steps=2)
    want = reference(layout, config, **DROPOUT)
    killed_until_done(lambda counted: fit(model(**DROPOUT), layout, counted(lm_loss), config, run_dir=tmp_path, resume=True), (1, 35), least=5)
    got = model(**DROPOUT)
    result = fit(got, layout, config=config, run_dir=tmp_path, resume=True)  # nothing left to do but to load
    assert result.step == 14
    assert torch.equal(flat(got), flat(want))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 15))


def test_damaged_checkpoint_is_passed_over_and_the_result_is_the_same(tmp_path):
    config, layout = replace(CONFIG, save_every=2), PaddedBatches(ROWS, 2)
    want = reference(layout, config)
    fit(model(), layout, config=replace(config, max_steps=9), run_dir=tmp_path)
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest.name == "step_00000009"
    path = newest / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    path.write_bytes(data)
    got = model()
    with pytest.warns(CheckpointWarning, match="step_00000009 is damaged .optimizer.safetensors: checksum differs"):
        fit(got, layout, config=config, run_dir=tmp_path, resume=True)
    assert torch.equal(flat(got), flat(want))


def test_half_written_draft_is_ignored(tmp_path):
    config, layout = replace(CONFIG, save_every=3), PaddedBatches(ROWS, 2)
    want = reference(layout, config)
    fit(model(), layout, config=config, run_dir=tmp_path)
    (tmp_path / "checkpoints" / ".draft-step_00000010").mkdir()
    got = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        fit(got, layout, config=config, run_dir=tmp_path, resume=True)
    assert torch.equal(flat(got), flat(want))


def test_bf16_run_resumes_bit_equal_and_keeps_the_dtype_of_the_weights(tmp_path):
    config, layout = replace(CONFIG, precision="bf16", save_every=4), PaddedBatches(ROWS, 2)
    for dtype in (torch.float32, torch.bfloat16):
        run = tmp_path / str(dtype)
        want = model(**DROPOUT).to(dtype)
        fit(want, layout, config=config)
        def bomb(m, batch):
            if bomb.calls == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            bomb.calls += 1
            return lm_loss(m, batch)
        bomb.calls = 0
        assert fit(model(**DROPOUT).to(dtype), layout, bomb, config, run_dir=run).interrupted
        got = model(**DROPOUT).to(dtype)
        fit(got, layout, config=config, run_dir=run, resume=True)
        assert next(got.parameters()).dtype == dtype
        assert torch.equal(flat(got), flat(want))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_optimizers_of_bitsandbytes_train_and_resume_bit_equal(tmp_path, optimizer):
    config, layout = replace(CONFIG, optimizer=optimizer, save_every=3), PaddedBatches(ROWS, 2)
    want = model(**DROPOUT)
    fit(want, layout, config=config)
    if optimizer == "paged_adamw":  # in 32 bits it is the very same rule as torch's, to rounding
        same = model(**DROPOUT)
        fit(same, layout, config=replace(config, optimizer="adamw"))
        assert (flat(same) - flat(want)).abs().max() < 2e-4 < (flat(model()) - flat(want)).abs().max()

    def stop(m, batch):
        stop.calls += 1
        if stop.calls == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return lm_loss(m, batch)
    stop.calls = 0
    assert fit(model(**DROPOUT), layout, stop, config, run_dir=tmp_path).interrupted
    with pytest.raises(ResumeError, match="optimizer"):
        fit(model(**DROPOUT), layout, config=replace(config, optimizer="adamw"), run_dir=tmp_path, resume=True)
    got = model(**DROPOUT)
    fit(got, layout, config=config, run_dir=tmp_path, resume=True)
    assert torch.equal(flat(got), flat(want))


def test_bf16_reaches_the_arithmetic_of_training_and_evaluation():
    seen = []

    def loss(m, batch):
        hidden = m.get_decoder()(batch["input_ids"], use_cache=False).last_hidden_state
        seen.append((torch.is_autocast_enabled("cpu"), m.lm_head(hidden).dtype))
        return lm_loss(m, batch)

    layout = PaddedBatches(ROWS, 9)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        seen.clear()
        fit(model(), layout, loss, replace(CONFIG, precision=precision, max_steps=1), eval_batches=layout)
        assert seen == [(precision == "bf16", dtype)] * 2


def test_every_random_state_is_restored(tmp_path):
    "A loss that draws from Python's, NumPy's and torch's generators."
    config, layout = replace(CONFIG, save_every=4), PaddedBatches(ROWS, 2)

    def noisy(m, batch):
        return lm_loss(m, batch) * (1 + random.random() + np.random.rand() + float(torch.rand(())))

    whole = model()
    fit(whole, layout, noisy, config)
    fit(model(), layout, noisy, config, run_dir=tmp_path)
    shutil.rmtree(latest_checkpoint(tmp_path / "checkpoints"))  # back to step 8
    got = model()
    assert fit(got, layout, noisy, config, run_dir=tmp_path, resume=True).history[0]["step"] == 9
    assert torch.equal(flat(got), flat(whole))


def test_the_last_checkpoints_are_kept(tmp_path):
    fit(model(), PaddedBatches(ROWS, 2), config=replace(CONFIG, save_every=2, keep_checkpoints=3), run_dir=tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step_{s:08d}" for s in (6, 8, 9)]


def test_an_engine_that_fit_does_not_have_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(ValueError, match="configured for MEGATRON_LM"):
        fit(model(), PaddedBatches(ROWS, 2), config=CONFIG)


def test_speed_counts_training_only(tmp_path, monkeypatch):
    "A slow evaluation and a slow disk do not make training look slow; the clock is one that the test moves."
    now = [0.0]
    monkeypatch.setattr(core.time, "perf_counter", lambda: now[0])

    def tick(seconds, result=None):
        now[0] += seconds
        return result

    real_save, real_evaluate = core._save, core.evaluate
    monkeypatch.setattr(core, "_save", lambda *a: tick(100, real_save(*a)))
    monkeypatch.setattr(core, "evaluate", lambda *a: tick(100, real_evaluate(*a)))
    config = replace(CONFIG, save_every=1, eval_every=1, max_steps=4)
    layout = PaddedBatches(ROWS, 3)
    training = lambda m, b: tick(2 if m.training else 0, lm_loss(m, b))
    rows = fit(model(), layout, training, config, eval_batches=layout, run_dir=tmp_path).history
    trained = [r for r in rows if "loss" in r]
    assert [r["targets_per_second"] for r in trained] == [round(r["n_targets"] / 2) for r in trained]


def test_fp16_on_a_cpu_is_refused_by_name():
    with pytest.raises(ValueError, match="precision fp16 needs a GPU"):
        fit(model(), PaddedBatches(ROWS, 2), config=replace(CONFIG, precision="fp16"))


@pytest.mark.cuda
def test_fp16_with_a_scaler_trains_on_cuda():
    m = model()
    history = fit(m, PaddedBatches(ROWS, 2), config=replace(CONFIG, precision="fp16", cpu=False, max_steps=60)).history
    assert history[-1]["loss"] < history[0]["loss"] / 2


def adapted(seed=0):
    torch.manual_seed(0)
    return get_peft_model(model(seed), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM"))


def test_adapter_checkpoint_holds_the_adapter_only_and_names_a_foreign_base(tmp_path):
    config, layout = replace(CONFIG, save_every=4), PaddedBatches(ROWS, 2)
    want = adapted()
    batch = layout.collate([0, 1, 2])
    plain = want(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(lm_loss(want, batch) / batch["n_targets"], plain)
    fit(want, layout, config=config)
    fit(adapted(), layout, config=config, run_dir=tmp_path)
    folder = latest_checkpoint(tmp_path / "checkpoints")
    size = (folder / "weights.safetensors").stat().st_size
    trained = sum(p.numel() * 4 for p in want.parameters() if p.requires_grad)
    assert trained < size < 1.5 * trained + 10_000
    with pytest.raises(ResumeError, match="other frozen weights"):
        fit(adapted(seed=1), layout, config=config, run_dir=tmp_path, resume=True)
    turned = adapted()
    with torch.no_grad():  # the same numbers in another order
        weight = turned.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
        weight.copy_(weight.flip(0))
    with pytest.raises(ResumeError, match="other frozen weights"):
        fit(turned, layout, config=config, run_dir=tmp_path, resume=True)
    with pytest.raises(ResumeError, match="trains other tensors"):
        fit(model(), layout, config=config, run_dir=tmp_path, resume=True)
    got = adapted()
    fit(got, layout, config=config, run_dir=tmp_path, resume=True)
    assert torch.equal(flat(got), flat(want))


def test_nan_in_the_gradient_stops_before_the_weights(tmp_path):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("inf")

    m, start = model(), flat(model())
    with pytest.raises(NonFiniteLoss, match="gradient is not finite at step 0") as error:
        fit(m, PaddedBatches(ROWS, 2), lambda m, b: Bad.apply(lm_loss(m, b)), CONFIG, run_dir=tmp_path)
    assert Path(error.value.saved).exists()
    assert torch.equal(flat(m), start)


def test_rows_of_padding_only_change_nothing():
    layout = PaddedBatches(ROWS, 3)
    clean = layout.collate([0, 1, 2])
    padded = {k: torch.cat([v, torch.zeros_like(v[:2]) + (-100 if k == "labels" else 0)]) if torch.is_tensor(v) else v
              for k, v in clean.items()}
    m = model()
    results = []
    for batch in (clean, padded):
        m.zero_grad()
        loss = lm_loss(m, batch)
        loss.backward()
        results.append((loss.detach(), *[p.grad.clone() for p in m.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert all(t.isfinite().all() for t in results[1])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no examples"):
        PaddedBatches([], 2)
    with pytest.raises(ValueError, match="example 0 has .* tokens, a row has 4"):
        PackedBatches(ROWS, 2, 4)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(model().requires_grad_(False), PaddedBatches(ROWS, 2), config=CONFIG)
    with pytest.raises(ValueError, match="resume needs run_dir"):
        fit(model(), PaddedBatches(ROWS, 2), config=CONFIG, resume=True)
    with pytest.raises(ValueError, match="no target tokens"):
        evaluate(model(), PaddedBatches([{"input_ids": [5, 6], "labels": [-100, -100]}], 1))


def test_training_mode_hooks_and_signal_handlers_are_put_back(tmp_path):
    m = model().eval()
    forward, mine = m.forward, lambda number, frame: None
    inside, before = [], {number: signal.signal(number, mine) for number in (signal.SIGINT, signal.SIGTERM)}

    def watched(model, batch):
        inside.append([signal.getsignal(number) is mine for number in before])
        return lm_loss(model, batch)

    try:
        fit(m, PaddedBatches(ROWS, 2), watched, replace(CONFIG, precision="bf16", max_steps=1), run_dir=tmp_path)
        after = [signal.getsignal(number) is mine for number in before]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert inside[0] == [False, False] and after == [True, True]
    assert not m.training and m.forward == forward
    assert m(torch.tensor([[5, 6]])).logits.dtype == torch.float32  # no autocast stays behind


def test_tracker_gets_what_metrics_jsonl_gets(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    history = fit(model(), PaddedBatches(ROWS, 2), config=replace(CONFIG, trackers=("tensorboard",)), run_dir=tmp_path).history
    boards = [EventAccumulator(str(f)) for f in tmp_path.rglob("events.out.tfevents*")]
    for board in boards:
        board.Reload()
    (board,) = [b for b in boards if "loss" in b.Tags()["scalars"]]
    logged = [e.value for e in board.Scalars("loss")]
    assert logged == pytest.approx([r["loss"] for r in history], rel=1e-6)


class Live(PaddedBatches):
    "Rows cut to a length that the weights decide, by tensors that a resume must find again; fails when told to."

    def __init__(self, m, fail_at=None):
        super().__init__(ROWS, 3, shuffle=False)
        self.model, self.fail_at, self.made, self._now = m, [fail_at], [], {"epoch": -1}

    def plan_length(self, epoch):
        return 3

    def plan(self, epoch=0):
        if epoch in self.fail_at:
            raise ValueError(f"epoch {epoch}: the reward of row 3 is nan")
        if self._now["epoch"] != epoch:
            self.made.append(epoch)
            cut = 3 + int(flat(self.model).abs().sum() * 1000) % 4
            self._now = {"epoch": epoch, "ids": torch.tensor([row["input_ids"][:cut] for row in ROWS])}
        self.examples = [{"input_ids": ids, "labels": ids} for ids in self._now["ids"].tolist()]
        return super().plan(epoch)

    def state_dict(self):
        return self._now

    def load_state_dict(self, state):
        self._now = state

    def report(self):
        return {"length": self._now["ids"].shape[1]}


def test_live_data_that_cannot_be_made_costs_no_step_and_resumes_bit_equal(tmp_path):
    config = replace(CONFIG, max_steps=None, epochs=5, save_every=None, log_every=1, grad_accum_steps=1)
    want = model(**DROPOUT)
    rows = fit(want, (layout := Live(want)), config=config).history
    assert layout.made == [0, 1, 2, 3, 4] and rows[-1]["step"] == 15
    assert len({row["length"] for row in rows}) > 1  # the data did follow the weights
    first = model(**DROPOUT)
    with pytest.raises(ValueError, match="epoch 2: the reward of row 3 is nan"):
        fit(first, Live(first, fail_at=2), config=config, run_dir=tmp_path)
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step_00000006"
    got = model(**DROPOUT)
    result = fit(got, (layout := Live(got)), config=config, run_dir=tmp_path, resume=True)
    assert layout.made == [2, 3, 4] and result.step == 15
    assert torch.equal(flat(got), flat(want))
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["length"] for row in logged] == [row["length"] for row in rows]


def test_live_data_of_an_epoch_come_back_with_the_checkpoint_in_its_middle(tmp_path):
    config = replace(CONFIG, max_steps=None, epochs=3, save_every=1, keep_checkpoints=20, grad_accum_steps=1)
    want = model(**DROPOUT)
    fit(want, Live(want), config=config, run_dir=tmp_path)
    for step in (8, 6, 5):  # in the last epoch, at a border, in the one before
        for newer in (tmp_path / "checkpoints").glob("step_*"):
            if newer.name > f"step_{step:08d}":
                shutil.rmtree(newer)
        got = model(**DROPOUT)
        fit(got, (layout := Live(got)), config=config, run_dir=tmp_path, resume=True)
        assert layout.made == {8: [], 6: [2], 5: [2]}[step]
        assert torch.equal(flat(got), flat(want))


def _worker(rank, folder):
    layout = PaddedBatches(ROWS, 1)  # nine micro-batches over two ranks: the last global batch leaves a rank idle
    m = model()
    result = fit(m, layout, config=replace(CONFIG, grad_accum_steps=2))
    torch.save({"weights": flat(m), "loss": [r["loss"] for r in result.history]}, f"{folder}/plain-{rank}.pt")

    dropped = replace(CONFIG, save_every=4, seed=3)
    whole = model(**DROPOUT)
    fit(whole, layout, config=dropped)

    def stop(m, batch):  # only rank 1 gets the signal: both must stop at the same step
        if rank == 1 and stop.calls == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        stop.calls += 1
        return lm_loss(m, batch)
    stop.calls = 0
    first = fit(model(**DROPOUT), layout, stop, dropped, run_dir=f"{folder}/run")
    again = model(**DROPOUT)
    second = fit(again, layout, config=dropped, run_dir=f"{folder}/run", resume=True)
    torch.save({"equal": torch.equal(flat(whole), flat(again)), "first": (first.interrupted, first.step), "second": second.step},
               f"{folder}/resumed-{rank}.pt")


def test_two_processes_equal_one(tmp_path):
    "DDP on gloo: 2 ranks x 2 micro-batches equal 1 rank x 4, an idle rank included; stop and resume are exact there too."
    on_two_ranks(_worker, tmp_path)
    want = model()
    history = fit(want, PaddedBatches(ROWS, 1), config=replace(CONFIG, grad_accum_steps=4)).history
    for rank in (0, 1):
        got = torch.load(tmp_path / f"plain-{rank}.pt", weights_only=True)
        torch.testing.assert_close(got["weights"], flat(want), rtol=0, atol=2e-6)
        assert got["loss"] == pytest.approx([r["loss"] for r in history], rel=1e-5)
        resumed = torch.load(tmp_path / f"resumed-{rank}.pt", weights_only=True)
        assert resumed == {"equal": True, "first": (True, 6), "second": 9}
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_config_is_frozen_and_hashable_fields_survive_json():
    config = TrainConfig(betas=(0.8, 0.9), trackers=("tensorboard",))
    with pytest.raises(Exception, match="cannot assign"):
        config.seed = 1
    assert TOKENIZER.pad_token_id == 0
