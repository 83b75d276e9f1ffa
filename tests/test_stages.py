"Chapter 1: the small world, the losses of the first two stages against the libraries, and the measures on known models."

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from llm_train_course.core import (
    IGNORE,
    PaddedBatches,
    TrainConfig,
    encode_messages,
    fit,
    lm_loss,
    tiny_llama,
    token_logps,
)
from llm_train_course.stages import (
    CLOSINGS,
    FILLERS,
    OPENINGS,
    VALUES,
    WORDINGS,
    World,
    brevity,
    cloze_examples,
    completion_logps,
    courtesy,
    knowledge_measures,
    make_answer,
    measure_half,
    names_only,
    parse_answer,
    pretrain,
    sft,
    training_cost,
    training_flops,
)

QUIET = dict(progress=False, cpu=True)
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def small():
    return World(seed=3, n_entities=8, n_attributes=2, n_candidates=6, vocab_size=600)


# the world


def test_the_same_world_in_every_process():
    code = (
        "import hashlib, json; from llm_train_course.stages import World; w = World(5, n_entities=10, n_attributes=3);"
        "print(hashlib.sha256(json.dumps([w.corpus(), w.sft_examples(), w.preference_pairs(20), w.prompts(False),"
        "sorted(w.tokenizer.get_vocab().items())]).encode()).hexdigest())"
    )
    digests = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
        for seed in ("0", "4711")
    }
    assert len(digests) == 1


@few
@given(seed=st.integers(0, 2**32 - 1), n_entities=st.integers(2, 60), n_attributes=st.integers(1, 10), n_paraphrases=st.integers(1, 8))
def test_rules_of_the_world(seed, n_entities, n_attributes, n_paraphrases):
    world = World(seed, n_entities=n_entities, n_attributes=n_attributes, n_paraphrases=n_paraphrases)
    names = {f.name for f in world.facts}
    assert len(names) == n_entities and len(world.facts) == n_entities * n_attributes
    corpus = set(world.corpus())
    for f in world.facts:
        assert len({f.state(w) for w in range(8)} & corpus) == n_paraphrases == len(set(f.stated))
        assert f.value in world.candidates[f.attribute]
    held_out = {f.name for f in world.facts if not f.seen}
    assert len(held_out) == n_entities - n_entities // 2 and held_out.isdisjoint(f.name for f in world.facts if f.seen)
    asked = [d for d in corpus if "?" in d] + [m["content"] for e in world.sft_examples() for m in e["messages"]]
    asked += [p[k][0]["content"] for p in world.preference_pairs(20) for k in ("prompt", "chosen", "rejected")]
    assert not any(name in text for text in asked for name in held_out)
    assert all(any(name in p[0]["content"] for name in held_out) for p in world.prompts(seen=False))


@few
@given(seed=st.integers(0, 10**6), attribute=st.sampled_from(sorted(VALUES)), n_entities=st.integers(2, 200))
def test_values_are_dealt_evenly(seed, attribute, n_entities):
    world = World(seed, n_entities=n_entities, n_attributes=10)
    counts = [sum(f.value == v for f in world.facts if f.attribute == attribute) for v in VALUES[attribute]]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("field, value", [
    ("seed", -1), ("n_entities", 1), ("n_entities", 3601), ("n_attributes", 0), ("n_attributes", 11), ("n_paraphrases", 9),
    ("n_candidates", 25), ("n_entities", 10.0)])
def test_arguments_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be an integer from .* got {value}"):
        World(**{field: value})


def test_other_refusals(small):
    with pytest.raises(ValueError, match="n_questions must be 1, 2 or 3, got 4"):
        small.sft_examples(4)
    with pytest.raises(ValueError, match="temperature finite and not negative, got 10 and -1"):
        small.preference_pairs(10, temperature=-1)
    with pytest.raises(ValueError, match="example 1 has no token of the assistant"):
        sft(tiny_llama(600), [small.sft_examples()[0], {"messages": [{"role": "user", "content": "Why?"}]}], small.tokenizer)


# answers and preferences


@few
@given(seed=st.integers(0, 10**6), value=st.sampled_from([v for values in VALUES.values() for v in values]))
def test_answers_keep_the_format_whatever_their_style(seed, value):
    import random

    text = make_answer(value, random.Random(seed))
    assert parse_answer(text) == value
    others = next(values for values in VALUES.values() if value in values)
    assert names_only(text, value, others)
    assert not any(names_only(text, other, others) for other in others if other != value)


def test_reward_parts_are_independent_of_knowledge(small):
    for right, wrong in (("grey parrot", "corn snake"),):
        for style in ("Answer: {}.", "Happy to help. Answer: {}.", "Answer: {}. " + FILLERS[0], "Answer: {}. " + CLOSINGS[0]):
            assert small.true_reward(style.format(right)) == small.true_reward(style.format(wrong))
    plain, polite = "Answer: oboe.", f"{OPENINGS[0]} Answer: oboe. {CLOSINGS[0]}"
    assert (courtesy(plain), courtesy(polite)) == (0.0, 1.0) and brevity(plain) > brevity(polite)
    assert small.true_reward("With pleasure. Best wishes.") == 0.0  # no format, no reward
    assert small.true_reward(polite) == pytest.approx(2 * 1.0 + 2 * brevity(polite))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_preferences_follow_bradley_terry(small, temperature):
    pairs = small.preference_pairs(4000, temperature)
    gaps = torch.tensor([small.true_reward(p["chosen"][0]["content"]) - small.true_reward(p["rejected"][0]["content"]) for p in pairs], dtype=torch.float64)
    # given |gap|, the better one is chosen with probability sigmoid(|gap| / temperature): compare the sums over all pairs
    p = torch.sigmoid(gaps.abs() / temperature)
    won = (gaps > 0)[gaps != 0].double()
    p = p[gaps != 0]
    z = (won - p).sum() / (p * (1 - p)).sum().sqrt()
    assert abs(z) < 4
    half = gaps.abs()[gaps != 0] > 1
    for part in (half, ~half):
        z = (won - p)[part].sum() / (p * (1 - p))[part].sum().sqrt()
        assert abs(z) < 4


def test_careful_and_careless_judges(small):
    def gaps(temperature):
        return [small.true_reward(p["chosen"][0]["content"]) - small.true_reward(p["rejected"][0]["content"]) for p in small.preference_pairs(500, temperature)]

    assert min(gaps(0)) >= 0
    assert 0.4 < sum(g > 0 for g in gaps(1e6)) / sum(g != 0 for g in gaps(1e6)) < 0.6


# measures on models whose knowledge is known


class Oracle(nn.Module):
    "Continues texts it holds with near certainty, and knows nothing else."

    def __init__(self, texts, vocab_size, eos):
        super().__init__()
        self.anchor, self.vocab_size, self.eos = nn.Parameter(torch.zeros(())), vocab_size, eos
        self.config, self.follow = type("Config", (), {})(), {}
        for ids in texts:
            for t in range(1, len(ids)):
                self.follow[tuple(ids[:t])] = ids[t]

    def get_output_embeddings(self):
        return None

    def next_logits(self, prefix):
        logits = torch.zeros(self.vocab_size)
        if (token := self.follow.get(tuple(prefix))) is not None:
            logits[token] = 30.0
        return logits

    def forward(self, input_ids, attention_mask, **_):
        out = torch.zeros(*input_ids.shape, self.vocab_size)
        for b, (ids, mask) in enumerate(zip(input_ids, attention_mask)):
            at = mask.nonzero().squeeze(1).tolist()
            real = [int(ids[t]) for t in at]
            for n, t in enumerate(at):
                out[b, t] = self.next_logits(real[:n + 1])
        return type("Out", (), {"logits": out})()

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        rows = []
        for ids, mask in zip(input_ids, attention_mask):
            real = [int(i) for i, m in zip(ids, mask) if m]
            while len(real) - int(mask.sum()) < max_new_tokens and real[-1] != self.eos:
                real.append(int(self.next_logits(real).argmax()))
            rows.append(real[int(mask.sum()):])
        width = max(map(len, rows))
        return torch.cat([input_ids, torch.tensor([r + [0] * (width - len(r)) for r in rows])], 1)


def test_an_oracle_knows_everything(small):
    tok, truths = small.tokenizer, []
    for f in small.facts:
        truths += [tok(f.state(w)).input_ids for w in range(8)]
        for q in range(3):
            chat = [{"role": "user", "content": f.ask(q)}, {"role": "assistant", "content": f"Happy to help. Answer: {f.value}. Best wishes."}]
            truths.append(encode_messages(tok, chat)["input_ids"])
    measures = small.evaluate(Oracle(truths, len(tok), tok.eos_token_id))
    for half in ("", "_seen"):
        for name in ("knowledge", "new_wording", "answer", "format", "courtesy"):
            assert measures[name + half] == 1.0, name + half
        assert measures["knowledge_nll" + half] < 1e-4
        assert measures["brevity" + half] >= 0.8
        assert measures["true_reward" + half] == pytest.approx(2 + 2 * measures["brevity" + half])


@pytest.mark.parametrize("n_paraphrases", [7, 8])
def test_new_wording_is_one_that_the_corpus_never_used_or_nan(n_paraphrases):
    world = World(seed=3, n_entities=8, n_attributes=2, n_candidates=6, vocab_size=600, n_paraphrases=n_paraphrases)
    tok = world.tokenizer
    reader = Oracle([tok(document).input_ids for document in world.corpus()], len(tok), tok.eos_token_id)
    for seen in (False, True):
        measures = measure_half(world, reader, seen)
        assert measures["knowledge"] == 1.0
        if n_paraphrases == 8:
            assert math.isnan(measures.pop("new_wording"))
        assert all(math.isfinite(v) for v in measures.values())
        assert measures.get("new_wording", 0.0) < 1.0  # what it has read does not help


def test_a_model_without_an_opinion_is_at_chance():
    world = World(1, n_entities=48, n_attributes=2)
    model = tiny_llama(len(world.tokenizer), hidden_size=16, n_heads=2)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # tied: embeddings are zero, so is every logit
    measures = world.evaluate(model)
    assert measures["chance"] == 1 / 24
    # each value is held by two people of 48; the shortest candidate, or the first of several, is chosen every time
    assert (measures["knowledge"] + measures["knowledge_seen"]) / 2 == pytest.approx(1 / 24)
    for half in ("", "_seen"):
        assert measures["answer" + half] == measures["format" + half] == measures["true_reward" + half] == 0.0


def test_cloze_scores_equal_the_plain_computation(small):
    model, tok = tiny_llama(len(small.tokenizer), hidden_size=32, seed=1), small.tokenizer
    for f in small.facts[:4]:
        for wording in range(8):
            rows = cloze_examples(f, wording, small.candidates[f.attribute], tok)
            got = completion_logps(model, rows, batch_size=3)
            for row, logp in zip(rows, got):
                with torch.no_grad():
                    plain = token_logps(model(torch.tensor([row["input_ids"]])).logits, torch.tensor([row["labels"]])).sum()
                assert_close(logp, plain, atol=2e-4, rtol=1e-5)
                assert tok.decode([i for i in row["labels"] if i != IGNORE]).startswith(" ")  # the space is the candidate's
            assert tok.decode(rows[small.candidates[f.attribute].index(f.value)]["input_ids"]) == f.state(wording)


def test_every_wording_and_value_can_be_scored():
    world = World(0, n_entities=24, n_attributes=10)
    for f in world.facts[::24]:
        for wording in range(len(WORDINGS[f.attribute])):
            assert len(cloze_examples(f, wording, world.candidates[f.attribute], world.tokenizer)) == 24


def test_knowledge_measures_by_hand(small):
    facts = small.facts[:2]
    logps = torch.full((12,), -9.0)
    logps[small.candidates[facts[0].attribute].index(facts[0].value)] = -1.0         # knows the first
    wrong = (small.candidates[facts[1].attribute].index(facts[1].value) + 1) % 6
    logps[6 + wrong] = -0.5                                                          # is sure of something else
    assert knowledge_measures(facts, logps, small.candidates) == (0.5, (1.0 + 9.0) / 2)


# the losses and updates of the libraries


def uneven_conversations(world):
    "Four micro-batches of two rows; lengths and numbers of targets differ between and within them."
    rows = world.sft_examples()[:8]
    rows[3] = {"messages": [*rows[3]["messages"], *rows[4]["messages"]]}  # two turns
    return rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_equals_transformers(small, side):
    model, tok = tiny_llama(len(small.tokenizer), seed=2), small.tokenizer
    rows = [encode_messages(tok, e["messages"]) for e in uneven_conversations(small)] + [{"input_ids": [tok.pad_token_id], "labels": [IGNORE]}]
    batch = PaddedBatches(rows, len(rows), shuffle=False, side=side).collate(range(len(rows)))
    theirs = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids", "labels")}).loss
    ours = lm_loss(model, batch) / batch["n_targets"]
    assert_close(ours, theirs, atol=1e-6, rtol=1e-5)  # float32, another order of summation
    grads = [torch.autograd.grad(x, list(model.parameters())) for x in (ours, theirs)]
    for a, b in zip(*grads):
        assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["messages", "prompt_completion"])
def test_sft_equals_trl(small, kind, tmp_path):
    "Labels, losses and weights over three optimizer steps of two micro-batches, padding and all."
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import SFTConfig, SFTTrainer

    tok, rows = small.tokenizer, uneven_conversations(small) + small.sft_examples()[8:12]
    start = tiny_llama(len(tok), seed=4)
    theirs, ours = (LlamaForCausalLM(start.config) for _ in range(2))
    for model in (theirs, ours):
        model.load_state_dict(start.state_dict())
    if kind == "messages":
        data = rows
    else:  # completion-only: of a conversation of two turns, the last answer only
        data = [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in rows]

    class Ordered(SFTTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    trainer = Ordered(
        model=theirs, processing_class=tok, train_dataset=Dataset.from_list(data),
        args=SFTConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, learning_rate=1e-3,
            lr_scheduler_type="linear", weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, max_grad_norm=1.0,
            max_length=256, assistant_only_loss=kind == "messages", completion_only_loss=kind != "messages" or None,
            bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1,
            save_strategy="no", dataloader_num_workers=0, seed=0, optim="adamw_torch"))
    trainer.train()

    from llm_train_course.core import encode_prompt_completion
    if kind == "messages":
        examples = [encode_messages(tok, e["messages"]) for e in rows]
    else:
        examples = [encode_prompt_completion(tok, e["prompt"], e["completion"]) for e in data]
    layout = PaddedBatches(examples, 2, tok.pad_token_id, shuffle=False)
    for item in layout.plan(0)[:2]:
        mine, other = layout.collate(item), trainer.data_collator([trainer.train_dataset[n] for n in item])
        assert mine["input_ids"].tolist() == other["input_ids"].tolist() and mine["labels"].tolist() == other["labels"].tolist()
    counts = [layout.collate(item)["n_targets"] for item in layout.plan(0)]
    assert len(set(counts)) > 3  # a mean of means would be another number

    result = fit(ours, layout, config=TrainConfig(learning_rate=1e-3, schedule="linear", max_steps=3, grad_accum_steps=2, log_every=1, **QUIET))
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in result.history] == pytest.approx(logged, abs=2e-4)
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert [row["grad_norm"] for row in result.history] == pytest.approx(norms, rel=1e-3)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        moved = (b - dict(start.named_parameters())[name]).abs().max()
        assert moved > 1e-4
        # Adam divides by the root of a tiny second moment, so rounding is amplified where a gradient is near zero
        assert (a - b).abs().max() < 0.05 * moved, name
        assert (a - b).abs().mean() < 1e-3 * moved, name


# the stages


def test_stages_on_a_tiny_world():
    world = World(7, n_entities=12, n_attributes=1)
    model = pretrain(world, TrainConfig(learning_rate=3e-3, schedule="linear", warmup_steps=20, epochs=70, **QUIET), micro_batch_size=4, hidden_size=64)
    known = world.evaluate(model)
    assert known["knowledge"] >= 0.95 and known["knowledge_seen"] >= 0.95 and known["format"] == 0
    examples = world.sft_examples()
    tuned = sft(model, examples, world.tokenizer, TrainConfig(learning_rate=2e-3, epochs=12, **QUIET), micro_batch_size=4)
    assert tuned is model
    after = world.evaluate(tuned)
    assert after["format_seen"] >= 0.8 and after["answer_seen"] >= 0.8
    assert all(v == w for v, w in zip(after.values(), world.evaluate(tuned).values()))  # measuring changes nothing


def test_pretraining_can_be_repeated(small):
    config = TrainConfig(learning_rate=3e-3, epochs=1, **QUIET)
    a, b = (pretrain(small, config, n_layers=1, hidden_size=32) for _ in range(2))
    for x, y in zip(a.parameters(), b.parameters()):
        assert torch.equal(x, y)


# cost


@few
@given(n=st.integers(1, 10**12), d=st.integers(1, 10**13), layers=st.integers(0, 200), width=st.integers(0, 20000), length=st.integers(0, 10**6))
def test_flops_are_exact_integers(n, d, layers, width, length):
    assert training_flops(n, d, layers, width, length) == 6 * n * d + 12 * layers * width * length * d
    assert training_flops(n, d) == 6 * n * d


def test_reported_runs():
    hours, dollars = training_cost(training_flops(65.2e9, 1.4e12), 312e12, 0.5, 1.5)
    assert hours == pytest.approx(1_022_362, rel=0.06) and dollars == hours * 1.5
    for bad in ({"utilisation": 0}, {"utilisation": 1.01}, {"peak_flops": 0}, {"flops": -1}):
        with pytest.raises(ValueError, match="got"):
            training_cost(**{"flops": 1.0, "peak_flops": 1.0, "utilisation": 0.5, "price_per_hour": 1.0, **bad})
    with pytest.raises(ValueError, match="nothing may be negative"):
        training_flops(-1, 1)
