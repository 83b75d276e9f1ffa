"""Engines: one process, DDP, FSDP2 and DeepSpeed ZeRO 0 to 3 give the same run, resume to the same bits, and give the model back.

Two processes on gloo train all cases one after the other (`_worker`); the tests look at what they saved."""
import math
import os
import signal
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CONFIG, ROWS, flat, model, on_two_ranks
from safetensors.torch import load_file

from llm_train_course.core import NonFiniteLoss, PaddedBatches, evaluate, fit, latest_checkpoint, lm_loss, named_engine
from llm_train_course.lora import add_lora, save_adapter

ENGINES = {"ddp": {}, "fsdp": {"engine": "fsdp"}, **{f"zero{z}": {"engine": "deepspeed", "zero": z} for z in range(4)}}
SHARDED = {k: v for k, v in ENGINES.items() if k in ("fsdp", "zero1", "zero2", "zero3")}
# nine rows of unequal lengths, one a micro-batch: the last global batch has one row for four places, and leaves a rank idle
LAYOUT, HELD = PaddedBatches(ROWS, 1), PaddedBatches(ROWS, 4, shuffle=False)
RUN = replace(CONFIG, grad_accum_steps=2, max_grad_norm=0.5, max_steps=6)
ONE = replace(RUN, grad_accum_steps=4)  # one process does the work of two
DROPOUT = {"attention_dropout": 0.2}
# Of weights after six float32 steps of up to 3e-3. The order of the sums is all that differs, but Adam's first steps divide each gradient
# by its own size: one that is nearly nought carries its rounding error into the weight. All but a few weights agree to 1e-6.
BOUND, FEW = 2e-5, 1e-3


def adapted():
    torch.manual_seed(0)
    m = model()
    add_lora(m, 4, 12.0, "all-linear")
    return m


class Limit:
    "Refuses the third update."
    calls = 0

    def update(self, loss, grad_norm):
        self.calls += 1
        return "the third" if self.calls == 3 else None

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def rows_of(result):
    return [{k: v for k, v in row.items() if k != "targets_per_second"} for row in result.history]


class Overflow(torch.autograd.Function):
    "The loss is as it was, its gradient infinite."

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * math.inf


def spoiled(what):
    "A loss that is not finite, or whose gradient is not, on the row that stands first in the plan."
    first = LAYOUT.collate(LAYOUT.plan(0)[0])["input_ids"]

    def loss(m, batch):
        here = torch.equal(batch["input_ids"], first)
        total = lm_loss(m, batch)
        return total if not here else total * math.inf if what == "loss" else Overflow.apply(total)
    return loss


def losses(engine, folder):
    m = model()
    result = fit(m, LAYOUT, config=replace(RUN, **engine), eval_batches=HELD)
    again = evaluate(m, HELD)["loss"]  # an ordinary model again
    if os.environ["RANK"] == "0":
        m.save_pretrained(folder / "model")
    return {"weights": flat(m), "rows": rows_of(result), "again": again, "tied": m.lm_head.weight is m.model.embed_tokens.weight}


def untied(engine, folder):
    m = model(tie_embeddings=False, n_kv_heads=2)
    fit(m, LAYOUT, config=replace(RUN, max_grad_norm=None, **engine))
    return {"weights": flat(m)}


def resumed(engine, folder):
    "Stopped at step 3 by a signal that one rank gets, and gone on with."
    config = replace(RUN, save_every=2, **engine)
    whole = model(**DROPOUT)
    want = fit(whole, LAYOUT, config=config, run_dir=folder / "whole")

    def stop(m, batch):
        if os.environ["RANK"] == "1" and stop.calls == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        stop.calls += 1
        return lm_loss(m, batch)

    stop.calls = 0
    first = fit(model(**DROPOUT), LAYOUT, stop, config, run_dir=folder / "run")
    m = model(**DROPOUT)
    second = fit(m, LAYOUT, config=config, run_dir=folder / "run", resume=True)
    saved = load_file(latest_checkpoint(folder / "whole" / "checkpoints") / "weights.safetensors")
    return {"weights": flat(m), "whole": flat(whole), "first": (first.interrupted, first.step), "rows": rows_of(first) + rows_of(second),
            "want": rows_of(want), "saved": all(torch.equal(saved[n], p) for n, p in whole.named_parameters())}


def refused(engine, folder):
    m = model(**DROPOUT)
    result = fit(m, LAYOUT, config=replace(RUN, **engine), guard=Limit())
    return {"weights": flat(m), "rows": rows_of(result)}


def not_finite(engine, folder):
    out = {}
    for what in ("loss", "gradient"):
        m, start = model(), flat(model())
        try:
            fit(m, LAYOUT, spoiled(what), replace(RUN, **engine), run_dir=folder / what)
        except NonFiniteLoss as e:
            out[what] = str(e), torch.equal(flat(m), start)
    return out


def offloaded(engine, folder):
    m = model()
    fit(m, LAYOUT, config=replace(RUN, engine_offload="cpu", **engine))
    return {"weights": flat(m)}


def adapter(engine, folder):
    m = adapted()
    fit(m, LAYOUT, config=replace(RUN, save_every=3, **engine), run_dir=folder / "adapter")
    if os.environ["RANK"] == "0":
        save_adapter(m, folder / "peft", "base")
    return {"weights": flat(m)}


def low(engine, folder):
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        m = model().to(dtype)
        out[str(dtype)] = [row["loss"] for row in fit(m, LAYOUT, config=replace(RUN, precision="bf16", **engine)).history], m.dtype
        out[f"{dtype} weights"] = flat(m)
    return out


def lean(engine, folder):
    out = {}
    for mode in ("full", "2", "selective"):
        m = model(**DROPOUT)
        fit(m, LAYOUT, config=replace(RUN, max_steps=2, checkpointing=mode, **engine))
        out[mode] = flat(m)
    m = model(**DROPOUT)
    fit(m, LAYOUT, config=replace(RUN, max_steps=2, **engine))
    return {**out, "none": flat(m)}


def in_turn(engine, folder):
    "One model through three engines."
    m = model()
    for name in ("fsdp", "zero3", "ddp"):
        fit(m, LAYOUT, config=replace(RUN, max_steps=2, **ENGINES[name]))
    return {"weights": flat(m)}


def kept_whole(engine, folder):
    "Which rank holds how many whole tensors when a checkpoint is written."
    from llm_train_course import core

    held, keep = [], core._kept
    core._kept = lambda *given: held.append(keep(*given)) or held[-1]
    try:
        fit(model(), LAYOUT, config=replace(RUN, max_steps=1, save_every=1, **engine), run_dir=folder / "run")
    finally:
        core._kept = keep
    return {"held": [len(kept) for kept in held], "on": sorted({str(t.device) for kept in held for t in kept.values()})}


def not_opened(engine, folder):
    "The engine fails while it takes the model over."
    import deepspeed
    from torch.distributed import fsdp

    m, was = model(), os.environ.pop("LOCAL_RANK", None)
    before, kinds, start = dict(os.environ), [type(x) for x in m.modules()], flat(m)

    def fails(*args, **kwargs):
        raise AssertionError("not today")

    kept = deepspeed.initialize, fsdp.fully_shard
    deepspeed.initialize = fsdp.fully_shard = fails
    try:
        fit(m, LAYOUT, config=replace(RUN, **engine))
        said = None
    except AssertionError as e:
        said = str(e)
    finally:
        deepspeed.initialize, fsdp.fully_shard = kept
        changed = {k for k in ("LOCAL_RANK", *before) if os.environ.get(k) != before.get(k)}
        os.environ.update({} if was is None else {"LOCAL_RANK": was})
    return {"said": said, "changed": changed, "same": kinds == [type(x) for x in m.modules()] and torch.equal(flat(m), start)}


CASES = [(losses, ENGINES), (untied, {"fsdp": 0, "zero3": 0}), (resumed, SHARDED), (refused, ENGINES), (not_finite, ENGINES),
         (offloaded, {"fsdp": 0, "zero1": 0, "zero2": 0, "zero3": 0}), (adapter, {"ddp": 0, "fsdp": 0, "zero2": 0, "zero3": 0}),
         (low, {"ddp": 0, "fsdp": 0, "zero2": 0, "zero3": 0}), (lean, {"fsdp": 0, "zero3": 0}), (in_turn, {"ddp": 0}),
         (kept_whole, {"fsdp": 0, "zero2": 0, "zero3": 0}), (not_opened, {"fsdp": 0, "zero2": 0})]


def _worker(rank, folder):
    for case, engines in CASES:
        for name in engines:
            place = Path(folder) / f"{case.__name__}-{name}"
            place.mkdir(exist_ok=True)
            try:
                found = case(ENGINES[name], place)
            except BaseException:
                found = {"error": traceback.format_exc()}
            torch.save(found, place / f"rank-{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "(case, engine, rank) -> what it saved."
    folder = tmp_path_factory.mktemp("engines")
    on_two_ranks(_worker, folder, "fork")  # no second import of everything

    def get(case, name, rank=0):
        got = torch.load(folder / f"{case.__name__}-{name}" / f"rank-{rank}.pt", weights_only=False)
        assert "error" not in got, got["error"]
        return got

    get.folder = folder
    return get


def one(case, **change):
    "The same by one process, without an engine."
    m = {untied: lambda: model(tie_embeddings=False, n_kv_heads=2), adapter: adapted}.get(case, model)()
    return m, fit(m, LAYOUT, config=replace(ONE, **change), eval_batches=HELD)


def near(got, want, bound=BOUND):
    torch.testing.assert_close(got, want, rtol=0, atol=bound)
    assert ((got - want).abs() > 1e-6).float().mean() <= FEW


def test_losses_norms_and_weights_are_those_of_one_process(found):
    m, result = one(losses)
    assert (flat(m) - flat(model())).abs().max() > 1e-2  # six steps that moved the weights far more than the bound
    norms = [row["grad_norm"] for row in result.history if "grad_norm" in row]
    assert min(norms) > RUN.max_grad_norm  # clipping is at work in every step
    for name in ENGINES:
        for rank in (0, 1):
            got = found(losses, name, rank)
            near(got["weights"], flat(m))
            for a, b in zip(got["rows"], rows_of(result), strict=True):
                assert a == pytest.approx(b, rel=2e-6, abs=1e-9), name
            assert got["again"] == pytest.approx(got["rows"][-1]["eval_loss"], rel=1e-6) and got["tied"]


@pytest.mark.parametrize("name", ENGINES)
def test_any_engine_reads_the_model_folder_of_another(found, name):
    from transformers import AutoModelForCausalLM
    read = AutoModelForCausalLM.from_pretrained(found.folder / f"losses-{name}" / "model", dtype=torch.float32)
    assert torch.equal(flat(read), found(losses, name)["weights"])


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_an_output_matrix_of_its_own(found, name):
    m, _ = one(untied, max_grad_norm=None)
    near(found(untied, name)["weights"], flat(m))


@pytest.mark.parametrize("name", SHARDED)
def test_resume_gives_the_same_bits(found, name):
    for rank in (0, 1):
        got = found(resumed, name, rank)
        assert got["first"] == (True, 4)  # rank 1 had the signal, both stopped
        assert torch.equal(got["weights"], got["whole"]) and got["rows"] == got["want"] and got["saved"]
    assert torch.equal(found(resumed, name, 0)["weights"], found(resumed, name, 1)["weights"])


def test_a_checkpoint_of_another_engine_is_refused_by_name(found):
    from llm_train_course.core import ResumeError
    run = found.folder / "resumed-zero2" / "run"
    found(resumed, "zero2")
    with pytest.raises(ResumeError, match="was made with world_size = 2, this run has 1|was made with engine = 'deepspeed zero 2'"):
        fit(model(**DROPOUT), LAYOUT, config=replace(RUN, save_every=2), run_dir=run, resume=True)


@pytest.mark.parametrize("name", ENGINES)
def test_a_refused_update_leaves_no_trace(found, name):
    want = found(refused, "ddp")
    got = found(refused, name)
    near(got["weights"], want["weights"])
    assert [row["refused"] for row in got["rows"] if "refused" in row] == [[0, 2]]
    assert [row["step"] for row in got["rows"]] == [row["step"] for row in want["rows"]]


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_not_finite_stops_every_rank_before_the_weights(found, name):
    for rank in (0, 1):
        got = found(not_finite, name, rank)
        for what in ("loss", "gradient"):
            said, same = got[what]
            assert said.startswith(f"{what} is not finite at step 0") and same
    assert (found.folder / f"not_finite-{name}" / "loss").exists()


@pytest.mark.parametrize("name", ["fsdp", "zero1", "zero2", "zero3"])
def test_shards_in_the_memory_of_the_host(found, name):
    m, _ = one(losses)
    near(found(offloaded, name)["weights"], flat(m))


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
def test_adapters_and_their_file(found, name):
    from peft import LoraConfig

    m, _ = one(adapter)
    got = found(adapter, name)
    near(got["weights"], flat(m))
    save_adapter(m, folder := found.folder / f"adapter-{name}" / "one", "base")
    mine, theirs = (load_file(place / "adapter_model.safetensors") for place in (folder, found.folder / f"adapter-{name}" / "peft"))
    assert mine.keys() == theirs.keys() and LoraConfig.from_pretrained(folder).r == 4
    near(*(torch.cat([part[key].flatten() for key in sorted(part)]) for part in (theirs, mine)))
    saved = load_file(latest_checkpoint(found.folder / f"adapter-{name}" / "adapter" / "checkpoints") / "weights.safetensors")
    assert {k for k in saved if "lora" in k} == set(saved)  # the base is not written again


@pytest.mark.parametrize("name", ["fsdp", "zero2", "zero3"])
def test_bf16_arithmetic(found, name):
    for dtype in ("torch.float32", "torch.bfloat16"):
        (want, _), (got, kept) = found(low, "ddp")[dtype], found(low, name)[dtype]
        assert got == pytest.approx(want, rel=2e-2) and str(kept) == dtype


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_recomputing_activations_changes_nothing(found, name):
    got = found(lean, name)
    for mode in ("full", "2", "selective"):
        near(got[mode], got["none"], 0 if mode != "selective" else BOUND)


def test_one_model_through_three_engines(found):
    m = model()
    for _ in range(3):
        fit(m, LAYOUT, config=replace(ONE, max_steps=2))
    near(found(in_turn, "ddp")["weights"], flat(m))


@pytest.mark.parametrize("name", ["fsdp", "zero2", "zero3"])
def test_the_first_rank_alone_keeps_whole_tensors_for_a_checkpoint(found, name):
    whole = len(list(model().parameters()))
    assert found(kept_whole, name, 0) == {"held": [whole], "on": ["cpu"]}
    assert found(kept_whole, name, 1) == {"held": [0], "on": []}


@pytest.mark.parametrize("name", ["fsdp", "zero2"])
def test_an_engine_that_fails_at_the_start_gives_the_model_back(found, name):
    assert found(not_opened, name) == {"said": "not today", "changed": set(), "same": True}


@pytest.mark.parametrize("wrong,said", [({"precision": "fp8"}, "its linear layers run under ddp"), ({"optimizer": "adamw_kahan"}, "rounds whole weights, not shards")])
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_low_precision_is_for_ddp(engine, wrong, said):
    with pytest.raises(ValueError, match=said):
        named_engine(replace(CONFIG, engine=engine, **wrong))
