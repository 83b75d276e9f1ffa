"Data files: every way in which a row can be wrong is named with its line, all at once; everything else goes through unchanged."
import json
import os
import re
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_train_course.app.coursedata import load_claims
from llm_train_course.app.data import (
    PREFERENCES,
    PROMPTS,
    SHOWN,
    DataError,
    _explicit,
    check_pairs,
    check_prompts,
    encode_rows,
    parse_line,
    read_rows,
    show,
)
from llm_train_course.core import train_tokenizer
from llm_train_course.stages import World

USER, BOT = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Oslo."}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def to(name, *lines, end="\n"):
        with open(name, "wb") as f:
            for line in lines:
                line = line if isinstance(line, (bytes, str)) else json.dumps(line, ensure_ascii=False)
                f.write((line if isinstance(line, bytes) else line.encode()) + end.encode())
        return name
    return to


def problems(source, kind=None):
    with pytest.raises(DataError) as e:
        read_rows(source, kind)
    return e.value.problems


def only(source, line, *words, kind=None):
    "The file has one problem, in this line, and the message says these words."
    found = problems(source, kind)
    assert len(found) == 1 and found[0].startswith(f"{source}:{line}: "), found
    for word in words:
        assert word in found[0], (word, found[0])


# ---------------------------------------------------------------------------------------------------------------------
# good files
# ---------------------------------------------------------------------------------------------------------------------
def test_the_four_formats(write):
    rows = {
        "text": {"text": "Ada Moss was born in Lisbon."},
        "messages": {"messages": [{"role": "system", "content": "Be brief."}, USER, BOT, USER, BOT]},
        "prompt_completion": {"prompt": "Where?", "completion": " In Oslo."},
        "preference": {"prompt": "Where?", "chosen": " In Oslo.", "rejected": " There."},
    }
    for kind, row in rows.items():
        got = read_rows(write(f"{kind}.jsonl", row, {**row, "id": 7}))
        assert (got.kind, got.values) == (kind, [row, row])  # other fields are left out
        assert [r.where for r in got.rows] == [f"{kind}.jsonl:1", f"{kind}.jsonl:2"]
    talk = {"prompt": [USER], "completion": [BOT]}
    assert read_rows(write("talk.jsonl", talk)).values == [talk]
    both = {"prompt": [USER], "chosen": [BOT], "rejected": [{**BOT, "content": "No idea."}]}
    assert read_rows(write("pairs.jsonl", both)).kind == "preference"


def test_an_ugly_file_that_is_right(write):
    big = "x" * 2**20
    lines = [b"\xef\xbb\xbf" + json.dumps({"text": "first, after a byte order mark"}).encode(), "", "  \t", "\u3000",
             {"text": "emoji 🦙👩‍👩‍👧, 中文, \u2028 a line separator, \x85 and \x0c"}, {"text": big}, b'\xef\xbb\xbf{"text": "joined file"}',
             '   {"text": "indented"}   ', '{"text": "escaped \\ud83e\\udd99 and \\u0000"}']
    for end in ("\n", "\r\n"):
        got = read_rows(write("ugly.jsonl", *lines, end=end))
        assert got.n_blank == 3
        assert [r.line for r in got.rows] == [1, 5, 6, 7, 8, 9]
        assert got.values[1]["text"] == lines[4]["text"] and got.values[2]["text"] == big
        assert got.values[5]["text"] == "escaped 🦙 and \x00"
    lf, crlf = (read_rows(write(f"{n}.jsonl", *lines, end=end)) for n, end in enumerate(("\n", "\r\n")))
    assert lf.fingerprint == crlf.fingerprint
    with open("noend.jsonl", "wb") as f:
        f.write(b'{"text": "no line end at the end of the file"}')
    assert len(read_rows("noend.jsonl")) == 1


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1, max_size=5),
       end=st.sampled_from(["\n", "\r\n"]), ascii=st.booleans(), bom=st.booleans())
def test_any_text_comes_back(texts, end, ascii, bom, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "x.jsonl"
    text = "".join(json.dumps({"text": t}, ensure_ascii=ascii) + end for t in texts)
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    assert [v["text"] for v in read_rows(path).values] == texts


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_no_line_breaks_the_reader(raw):
    value, wrong = parse_line(raw)
    assert wrong is None or (isinstance(wrong, str) and "\n" not in wrong)
    if wrong is None:
        json.dumps(value)


def test_parquet_and_text_files(write):
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = [{"messages": [USER, BOT]}, {"messages": [USER, {**BOT, "content": "🦙"}]}]
    pq.write_table(pa.Table.from_pylist(values), "a.parquet")
    got = read_rows("a.parquet")
    assert got.values == values and got.rows[1].where == "a.parquet:2"
    assert got.fingerprint == read_rows(write("a.jsonl", *values)).fingerprint
    pq.write_table(pa.table({"text": ["good", "", None]}), "b.parquet")
    assert [p.split(": ", 1)[0] for p in problems("b.parquet")] == ["b.parquet:2", "b.parquet:3"]
    with open("c.parquet", "wb") as f:
        f.write(b"PAR1 and then nothing of the kind")
    assert "not a Parquet file" in problems("c.parquet")[0]
    with open("book.txt", "wb") as f:
        f.write("one\r\n\r\ntwo 🦙\r\n".encode("utf-8-sig"))
    assert read_rows("book.txt").values == [{"text": "one\n\ntwo 🦙\n"}]
    with open("bad.txt", "wb") as f:
        f.write(b"one\ntwo\n\xff\n")
    only("bad.txt", 3, "not UTF-8", "0xff")


# ---------------------------------------------------------------------------------------------------------------------
# bad lines
# ---------------------------------------------------------------------------------------------------------------------
GOOD = {"text": "a good row"}
LINES = [
    (b'{"text": "caf\xe9"}', ["not UTF-8", "0xe9", "byte 14"]),
    (b'{"text": "a\x00b"}', ["NUL byte at byte 12"]),
    ('{"text": "x"', ["column 13", "not JSON"]),
    ("{'text': 'x'}", ["column 2", "not JSON"]),
    ('{"text": "x"} {"text": "y"}', ["column 15", "more than one JSON value"]),
    ('["text"]', ["a JSON object is needed, got a list ['text']"]),
    ('"text"', ["a JSON object is needed, got a string 'text'"]),
    ("12", ["a JSON object is needed, got a number 12"]),
    ("null", ["a JSON object is needed, got null"]),
    ('{"text": "x", "text": "y"}', ["'text' is there twice"]),
    ('{"text": "x", "score": NaN}', ["NaN is not JSON"]),
    ('{"text": "x", "score": -Infinity}', ["-Infinity is not JSON"]),
    ('{"text": "a\tb"}', ["column 12", "not JSON", "control character"]),
    ('{"text": "x", "n": ' + "9" * 5000 + "}", ["not JSON that can be read", "digits"]),
    ('{"text": ' + "[" * 200_000 + "}", ["nested too deeply"]),
    ('{"text": "\\ud800 alone"}', ["text: unpaired surrogate \\ud800 at character 1"]),
    ('{"text": 7}', ["text must be a string, got a number 7"]),
    ('{"text": ["x"]}', ["text must be a string, got a list ['x']"]),
    ('{"text": ""}', ["text is empty"]),
    ('{"text": " \\n "}', ["text is white space only"]),
    ('{"text": null}', ["text is null"]),
    ("{}", ["found no fields"]),
    ('{"Text": "x"}', ["found 'Text'", 'did you mean "text" instead of \'Text\'']),
    ('{"conversations": []}', ["found 'conversations'", "ShareGPT"]),
    ('{"instruction": "x", "output": "y"}', ["found 'instruction', 'output'", "Alpaca"]),
    ('{"prompt": "x"}', ['"completion" is missing', "found 'prompt'"]),
    ('{"prompt": "x", "completion": "y"}', ["prompt + completion, but", ":1 is text: one format a file"]),
]


@pytest.mark.parametrize("line,words", LINES, ids=[w[0][:30] for _, w in LINES])
def test_a_bad_line_is_named(write, line, words):
    for end in ("\n", "\r\n"):
        only(write("bad.jsonl", GOOD, "", line, GOOD, end=end), 3, *words)


def test_all_problems_at_once_in_order(write):
    lines = [x for line, _ in LINES for x in (GOOD, line)]
    found = problems(write("all.jsonl", *lines))
    assert [int(p.split(":")[1]) for p in found] == [2 * (n + 1) for n in range(len(LINES))]
    for text, (_, words) in zip(found, LINES):
        assert all(word in text for word in words)
        assert "\n" not in text and len(text) < 300


def test_only_so_many_are_printed(write):
    name = write("many.jsonl", GOOD, *['{"text": 1}'] * (SHOWN + 23))
    with pytest.raises(DataError) as e:
        read_rows(name)
    printed = str(e.value).splitlines()
    assert len(e.value.problems) == SHOWN + 23
    assert printed[SHOWN - 1].startswith(f"many.jsonl:{SHOWN + 1}: ")
    assert printed[SHOWN:] == ["... and 23 more", f"{SHOWN + 23} problems in the data; nothing was written"]


def talk(*turns):
    return {"messages": list(turns)}


SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    (talk(), ["messages is an empty list"]),
    ({"messages": "Where?"}, ["messages must be a list of {role, content}, got a string 'Where?'"]),
    ({"messages": {"role": "user"}}, ["messages must be a list", "got an object"]),
    (talk("Where?", BOT), ["messages[0] must be an object with role and content"]),
    (talk({"role": "user"}, BOT), ["messages[0] has no content (it has 'role')"]),
    (talk({"from": "human", "value": "Where?"}, BOT), ["messages[0] has no role and no content", "ShareGPT"]),
    (talk({**USER, "role": "User"}, BOT), ["messages[0].role must be system, user or assistant, got 'User' (did you mean user?)"]),
    (talk({**USER, "role": None}, BOT), ["messages[0].role must be", "got None"]),
    (talk(USER, {**BOT, "role": "tool"}), ["messages[1].role: 'tool'", "not supported"]),
    (talk(USER, {**BOT, "tool_calls": [{"id": 1}]}), ["messages[1].tool_calls", "not supported"]),
    (talk({**USER, "content": [{"type": "image"}]}, BOT), ["messages[0].content is a list", "not supported"]),
    (talk(USER, {**BOT, "content": ""}), ["messages[1].content is empty"]),
    (talk(USER, {**BOT, "content": None}), ["messages[1].content is null"]),
    (talk(USER, {**BOT, "content": 3.5}), ["messages[1].content must be a string, got a number 3.5"]),
    (talk({**USER, "content": "\ud83e"}, BOT), ["messages[0].content: unpaired surrogate \\ud83e"]),
    (talk(USER), ["no assistant turn"]),
    (talk(SYSTEM), ["only a system turn"]),
    (talk(USER, BOT, USER), ["messages[2]: the last turn must be assistant, got user"]),
    (talk(BOT), ["messages[0]: the first turn must be user"]),
    (talk(SYSTEM, BOT), ["messages[1]: the turn after the system turn must be user"]),
    (talk(USER, SYSTEM, BOT), ["messages[1]: a system turn must be first"]),
    (talk(USER, USER, BOT), ["messages[1]: two user turns in a row"]),
    (talk(USER, BOT, BOT), ["messages[2]: two assistant turns in a row"]),
]


@pytest.mark.parametrize("row,words", TURNS, ids=[w[0][:40] for _, w in TURNS])
def test_bad_conversations(write, row, words):
    only(write("t.jsonl", talk(USER, BOT), json.dumps(row)), 2, *words)


PAIRS = [
    ({"prompt": [USER], "completion": " y"}, ["prompt: a list of messages, but completion is not"]),
    ({"prompt": [USER, BOT], "completion": [BOT]}, ["prompt[1]: the last turn must be user, got assistant"]),
    ({"prompt": [USER], "completion": [USER, BOT]}, ["completion[0]: the first turn must be assistant"]),
    ({"prompt": [USER], "completion": [SYSTEM, BOT]}, ["completion[0]: a system turn must be the first turn of the prompt"]),
    ({"prompt": "", "completion": "y"}, ["prompt is empty"]),
    ({"prompt": "x", "completion": 3}, ["completion must be a string, got a number 3"]),
    ({"prompt": "x", "completion": "y"}, ["prompt is written as strings", ":1 as messages: one way a file"]),
]


@pytest.mark.parametrize("row,words", PAIRS, ids=[w[0][:40] for _, w in PAIRS])
def test_bad_prompts_and_completions(write, row, words):
    only(write("p.jsonl", {"prompt": [USER], "completion": [BOT]}, row), 2, *words)


def test_one_row_may_have_several_problems(write):
    name = write("s.jsonl", talk({**USER, "content": ""}, {"role": "bot", "content": 3}))
    assert [p.split(": ", 1)[1][:19] for p in problems(name)] == ["messages[0].content", "messages[1].role mu", "messages[1].content"]


def test_preference_rows(write):
    row = {"prompt": "x", "chosen": "y", "rejected": "z"}
    only(write("d.jsonl", row, {**row, "rejected": "y"}), 2, "chosen and rejected are equal")
    only(write("e.jsonl", row), 1, "a row of prompt + chosen + rejected; messages or prompt + completion is needed here",
         kind=("messages", "prompt_completion"))


def test_the_format_is_that_of_the_first_good_row(write):
    found = problems(write("m.jsonl", {"text": ""}, talk(USER, BOT), GOOD))
    assert found[0] == "m.jsonl:1: text is empty" and "m.jsonl:2 is messages" in found[1]
    both = {"text": "x", "messages": [USER, BOT]}
    only(write("b.jsonl", both), 1, "fields of several formats (text and messages): keep one")
    assert read_rows("b.jsonl", "messages").kind == "messages"  # no doubt where only one of them is accepted
    assert len(read_rows(write("c.jsonl", talk(USER, BOT), both))) == 2


def test_whole_files_that_are_refused(write, tmp_path):
    only(write("u.jsonl", b"\xff\xfe" + '{"text": "x"}\n'.encode("utf-16-le")), 1, "UTF-16")
    only(write("g.jsonl", b"\x1f\x8b\x08\x00"), 1, "gzip")
    only(write("a.json", "[", '{"text": "x"}', "]"), 1, "a JSON array", "jq")
    assert "NUL" in problems(write("w.jsonl", '{"text": "x"}'.encode("utf-16-le")))[0]
    assert problems(write("empty.jsonl")) == ["empty.jsonl: no rows"]
    assert problems(write("blank.jsonl", "", " ")) == ["blank.jsonl: no rows (2 blank lines)"]
    assert "is a folder" in problems(str(tmp_path))[0]
    write("train.jsonl", GOOD)
    assert problems("trian.jsonl") == ["trian.jsonl: no such file (did you mean train.jsonl?)"]
    assert problems("./deep/x") == ["./deep/x: no such file"]
    assert "CSV" in problems(write("t.csv", "text", "x"))[0].upper()
    assert problems("not a name!") == ["not a name!: no such file, and not the name of a hub dataset"]
    assert problems("interview:test") == ["interview:test: interview has the splits train and heldout"]


def test_a_hub_name_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached" in problems("someone/nothing-of-this-name:train")[0]


def test_hub_rows_with_null_columns(monkeypatch):
    import datasets

    made = datasets.Dataset.from_list([{**talk(USER, BOT), "prompt": None}, {**talk(USER, BOT), "prompt": "x"}])
    seen = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split=None: seen.append((name, split)) or made)
    monkeypatch.setattr("llm_train_course.app.data.hub_reachable", lambda: True)
    assert read_rows("someone/chats:train[:2]".replace("[:2]", ""), "messages").values == [talk(USER, BOT)] * 2
    assert seen == [("someone/chats", "train")]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split=None: datasets.DatasetDict({"a": made, "b": made}))
    assert problems("someone/chats") == ["someone/chats: has the splits a, b; name one, as in someone/chats:a"]


def test_values_are_shown_short_and_harmless():
    assert show("x" * 10**6) == "'" + "x" * 38 + "…"
    assert show("\x1b[31mred\n") == "'\\x1b[31mred\\n'"


def test_course_data_are_valid():
    train, heldout = read_rows("interview"), read_rows("interview:heldout")
    assert train.kind == heldout.kind == "messages" and len(train) > len(heldout) > 5
    questions = lambda rows: {v["messages"][0]["content"] for v in rows.values}
    assert not questions(train) & questions(heldout)


def test_training_answers_hold_no_part_of_a_held_out_one():
    "No run of six words, or of four with a number in it, no formula, no long number, but for the three that are named here."
    said = lambda name: [v["messages"][1]["content"] for v in read_rows(name).values]
    def parts(text):
        words = [w.strip(".,:;()").lower() for w in text.split()]
        run = lambda size: {" ".join(words[n:n + size]) for n in range(len(words) - size + 1)}
        runs = run(6) | {r for r in run(4) if re.search(r"\d", r)}
        formulas = {w for w in words if re.search("[α-ω√·]", w) and len(w) > 2}
        return runs | formulas | set(re.findall(r"\d+\.\d+|\d{1,3}(?:,\d{3})+|\d{4,}", text))
    train = set().union(*map(parts, said("interview")))
    shared = set().union(*map(parts, said("interview:heldout"))) & train
    # E5M2's largest value in a table, DPO's number in a list of papers, and what each memory question counts with
    assert shared == {"57,344", "2305.18290", "16 bytes a parameter"}


def test_reading_imports_no_torch(write):
    import subprocess

    code = "import sys, llm_train_course.app.data as d; d.read_rows(sys.argv[1]); print({'torch', 'transformers'} & set(sys.modules))"
    path = os.path.abspath(write("t.jsonl", GOOD))
    env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}
    assert subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=env).stdout == "set()\n"


# ---------------------------------------------------------------------------------------------------------------------
# tokens
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizer():
    from llm_train_course.core import train_tokenizer
    return train_tokenizer(["Ada Moss was born in Lisbon. Where? In Oslo."] * 4, 300)


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(["Ada ", "Moss ", "🦙", "中", "x"]), min_size=1, max_size=60), max_length=st.integers(2, 40))
def test_long_texts_are_cut_and_nothing_is_lost(words, max_length, tokenizer):
    from llm_train_course.app.data import Row, Rows
    from llm_train_course.core import encode_text

    text = "".join(words)
    whole = encode_text(tokenizer, text)["input_ids"]
    got = encode_rows(Rows([Row({"text": text}, "x", 1)], "text", "x"), tokenizer, max_length).examples
    assert all(2 <= len(e["input_ids"]) <= max_length for e in got)
    # the first token of a row is no target, so neighbours share a token: every other token is a target exactly once
    assert [t for e in got for t in e["labels"][1:]] == whole[1:]
    assert all(a["input_ids"][-1] == b["input_ids"][0] for a, b in pairwise(got))


def test_long_conversations(write, tokenizer):
    long = {**BOT, "content": "In Oslo. " * 40}
    rows = read_rows(write("l.jsonl", talk(USER, BOT), "", talk(USER, long), talk({**USER, "content": "Where? " * 60}, BOT)))
    sizes = [len(encode_rows(rows, tokenizer, 1000).examples[n]["input_ids"]) for n in range(3)]
    with pytest.raises(DataError) as e:
        encode_rows(rows, tokenizer, 32)
    assert e.value.problems == [f"l.jsonl:3: {sizes[1]} tokens, the limit is 32", f"l.jsonl:4: {sizes[2]} tokens, the limit is 32"]
    assert str(max(sizes)) in e.value.hint and "--on_long truncate" in e.value.hint
    cut = encode_rows(rows, tokenizer, 32, "truncate")  # the last row has no answer left: dropped, and counted so
    assert ([len(x["input_ids"]) for x in cut.examples], cut.n_truncated, cut.n_dropped) == ([sizes[0], 32], 1, 1)
    assert len(cut.warnings) == 2
    dropped = encode_rows(rows, tokenizer, 32, "drop")
    assert (len(dropped.examples), dropped.n_dropped) == (1, 2)
    with pytest.raises(DataError, match="no row is left: all 3"):
        encode_rows(rows, tokenizer, 4, "drop")
    with pytest.raises(ValueError, match="on_long"):
        encode_rows(rows, tokenizer, 32, "cut")


def test_templates_and_special_tokens(write, tokenizer):
    import copy

    rows = read_rows(write("s.jsonl", talk(USER, {**BOT, "content": "a<|eos|>b"}), talk(SYSTEM, USER, BOT)))
    assert "1 rows hold the text of a special token" in encode_rows(rows, tokenizer, 64).warnings[0]
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
                            + tokenizer.chat_template)
    with pytest.raises(DataError) as e:
        encode_rows(rows, strict, 64)
    assert e.value.problems == ["s.jsonl:2: the chat template refuses this row (System role not supported)"]
    strict.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode_rows(rows, strict, 64)
    with pytest.raises(DataError, match="preference data cannot be trained on"):
        encode_rows(read_rows(write("d.jsonl", {"prompt": "x", "chosen": "y", "rejected": "z"})), tokenizer, 64)


# ---------------------------------------------------------------------------------------------------------------------
# preferences and prompts
# ---------------------------------------------------------------------------------------------------------------------
YES, NO = {"role": "assistant", "content": "In Oslo."}, {"role": "assistant", "content": "No idea."}


def test_a_pair_may_hold_its_prompt_in_both_answers(write):
    talk = [{"role": "system", "content": "Be brief."}, USER, BOT, USER]
    rows = read_rows(write("talk.jsonl", {"chosen": [*talk, YES], "rejected": [*talk, NO]}, {"chosen": [USER, YES], "rejected": [USER, NO]}), PREFERENCES)
    assert rows.kind == "preference" and rows.values == [{"prompt": talk, "chosen": [YES], "rejected": [NO]},
                                                         {"prompt": [USER], "chosen": [YES], "rejected": [NO]}]
    # strings are cut where a word begins: Lisbon and Lima begin alike, and Chinese has no spaces
    cases = [("Human: Where?\n\nAssistant: In Lisbon.", "Human: Where?\n\nAssistant: In Lima.", "Human: Where?\n\nAssistant: In"),
             ("Q: where? A:there", "Q: where? A:no", "Q: where? A:"), ("问：在哪里？答：里斯本。", "问：在哪里？答：里马。", "问：在哪里？答：里"),
             ("Q: hi there", "Q: hi there, you", "Q: hi"), ("Q: 1 + 1 = 2", "Q: 1 + 1 = 21", "Q: 1 + 1 =")]
    rows = read_rows(write("plain.jsonl", *({"chosen": a, "rejected": b} for a, b, _ in cases)), PREFERENCES)
    for value, (a, b, prompt) in zip(rows.values, cases):
        assert value == {"prompt": prompt, "chosen": a[len(prompt):], "rejected": b[len(prompt):]}
    # a prompt of its own wins, and the fingerprint is that of the pair however it was written
    explicit = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
    assert read_rows(write("own.jsonl", explicit), PREFERENCES).values == [explicit]
    assert read_rows(write("a.jsonl", {"chosen": [USER, YES], "rejected": [USER, NO]}), PREFERENCES).fingerprint == read_rows("own.jsonl", PREFERENCES).fingerprint


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1), st.text(), st.text())
def test_an_implicit_prompt_and_its_answers_are_the_texts_again(start, a, b):
    pair = _explicit({"chosen": start + a, "rejected": start + b})
    assert (pair["prompt"] + pair["chosen"], pair["prompt"] + pair["rejected"]) == (start + a, start + b)


def test_pairs_that_teach_nothing_are_refused(write):
    for row, words in (
            ({"prompt": "Where?", "chosen": "There.", "rejected": "There."}, "chosen and rejected are equal: there is no preference to learn"),
            ({"chosen": [USER, YES], "rejected": [USER, YES]}, "chosen and rejected are equal"),
            ({"prompt": "Where?", "chosen": "", "rejected": "There."}, "chosen is empty"),
            ({"prompt": [USER], "chosen": [YES], "rejected": [{**NO, "content": " \n"}]}, "rejected[0].content is white space only"),
            ({"chosen": "yes", "rejected": "no"}, "there is no prompt, and chosen and rejected do not begin alike"),
            ({"chosen": [YES], "rejected": [NO]}, "chosen[0]: the first turn must be user"),
            ({"chosen": [USER, YES, {**USER, "content": "a"}, YES], "rejected": [USER, YES, {**USER, "content": "b"}, NO]},
             "chosen and rejected differ at the user's turn chosen[2]"),
            ({"chosen": "Q: hi ", "rejected": "Q: hi there"}, "chosen is empty behind the common beginning"),
            ({"chosen": "Q: hi", "rejected": [USER, NO]}, "one is a list of messages, the other is not"),
            ({"prompt": "Where?", "chosen": "There."}, '"rejected" is missing')):
        good = {**row, "chosen": "Q: a", "rejected": "Q: b"} if isinstance(row["chosen"], str) else {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
        if "prompt" in row and isinstance(row["prompt"], str):
            good["prompt"] = "Where?"
        found = problems(write("bad.jsonl", good, row), PREFERENCES)
        assert found[0].startswith("bad.jsonl:2: ") and words in found[0], (row, found)


def test_prompts_keep_their_columns_and_conversations_end_with_the_user(write):
    rows = read_rows(write("p.jsonl", {"prompt": "1 + 1 =", "answer": "2", "level": {"of": 1}}, {"prompt": "2 + 2 =", "answer": 4}), PROMPTS)
    assert rows.kind == "prompt" and rows.values == [{"prompt": "1 + 1 =", "answer": "2", "level": {"of": 1}}, {"prompt": "2 + 2 =", "answer": 4}]
    rows = read_rows(write("m.jsonl", {"messages": [USER, BOT, USER, YES], "id": 3}, {"messages": [USER]}, {"messages": [USER, BOT], "answer": "Oslo"}), PROMPTS)
    assert rows.values == [{"prompt": [USER, BOT, USER], "answer": "In Oslo.", "id": 3}, {"prompt": [USER]}, {"prompt": [USER], "answer": "Oslo"}]
    for row, words in (({"messages": [BOT, USER]}, "messages[0]: the first turn must be user"), ({"messages": []}, "messages is an empty list"),
                       ({"messages": [{"role": "system", "content": "x"}]}, "messages has only a system turn"), ({"prompt": " "}, "prompt is white space only"),
                       ({"messages": [USER, BOT, BOT]}, "two assistant turns in a row"), ({"prompt": [USER, BOT]}, "the last turn must be user"),
                       ({"prompt": "x", "completions": []}, "the field completions: reward functions are given something of that name"),
                       ({"question": "x"}, "found 'question'; needed prompt or messages")):
        first = {"messages": [USER]} if "messages" in row else {"prompt": [USER]} if isinstance(row.get("prompt"), list) else {"prompt": "ok"}
        found = problems(write("bad.jsonl", first, row), PROMPTS)
        assert len(found) == 1 and found[0].startswith("bad.jsonl:2: ") and words in found[0], (row, found)


def test_the_courses_pairs():
    train, held = read_rows("claims", PREFERENCES), read_rows("claims:heldout", PREFERENCES)
    assert train.kind == held.kind == "preference" and len(train) > len(held) > 5
    right = {r["chosen"][0]["content"] for r in train.values}
    assert right.isdisjoint(r["chosen"][0]["content"] for r in held.values)  # no claim is in both parts
    claims = {c["truth_en"]: c for c in load_claims()}
    for row in [*train.values, *held.values]:
        claim = claims[row["chosen"][0]["content"]]
        assert claim["verdict"] in ("corrected", "qualified") and row["rejected"][0]["content"] == claim["statement_en"]
        assert row["prompt"][0]["content"].endswith(("?", "."))
    chinese = read_rows("claims:zh:heldout", PREFERENCES)
    assert len(chinese) == len(held) and chinese.values == read_rows("claims:heldout:zh", PREFERENCES).values
    assert all(re.search("[\u4e00-\u9fff]", r[k][0]["content"]) for r in chinese.values for k in r)
    assert read_rows("claims", PROMPTS).values == [{"prompt": r["prompt"], "answer": r["chosen"][0]["content"]} for r in train.values]
    assert "holds preferences" in problems("claims", ("messages", "text"))[0]


def test_the_worlds_pairs_and_prompts():
    world = World(n_entities=6, n_attributes=2)
    names = lambda rows: {next(f.name for f in world.facts if f.name in r["prompt"][0]["content"]) for r in rows.values}
    pairs, held = (read_rows(s, PREFERENCES, world=world) for s in ("world", "world:heldout"))
    assert pairs.values == world.preference_pairs() and len(held) == 200 and names(pairs).isdisjoint(names(held))
    prompts = read_rows("world:heldout", PROMPTS, world=world)
    assert [(r["prompt"], r["answer"]) for r in prompts.values] == list(zip(world.prompts(False), [f.value for f in world.facts if not f.seen]))
    assert "world:heldout: the held-out people have preferences and prompts only" in problems("world:heldout", ("messages",))[0]
    assert "world:all: the world has world" in problems("world:all", PREFERENCES)[0]


def test_pairs_and_prompts_that_do_not_fit_are_all_named(write):
    tokenizer = train_tokenizer(["Where? In Oslo. No idea."] * 4, 300)
    long = [{**USER, "content": "Where? " * 40}]
    rows = read_rows(write("p.jsonl", {"prompt": [USER], "chosen": [YES], "rejected": [NO]}, *[{"prompt": long, "chosen": [YES], "rejected": [NO]}] * 2), PREFERENCES)
    for whole in (False, True):
        with pytest.raises(DataError) as e:
            check_pairs(rows, tokenizer, 32, whole)
        assert [re.sub(r"\d+ tokens", "N tokens", p) for p in e.value.problems] == [f"p.jsonl:{n}: the prompt has N tokens, the context holds 32" for n in (2, 3)]
    good = read_rows(write("g.jsonl", {"prompt": [USER], "chosen": [{**YES, "content": "In Oslo. " * 30}], "rejected": [NO]}), PREFERENCES)
    pairs, warned = check_pairs(good, tokenizer, 32)
    assert len(pairs[0]["prompt_ids"] + pairs[0]["chosen_ids"]) == 32 and warned == ["g.jsonl: 1 answers are cut off at 32 tokens"]
    with pytest.raises(DataError, match=r"g\.jsonl:1: prompt and answer have \d+ tokens, the limit is 32"):
        check_pairs(good, tokenizer, 32, whole=True)
    with pytest.raises(DataError, match=r"(?s)q\.jsonl:2: the prompt has \d+ tokens, 20 fit beside an answer.*q\.jsonl:3.*2 problems"):
        check_prompts(read_rows(write("q.jsonl", {"prompt": [USER]}, {"prompt": long}, {"prompt": long}), PROMPTS), tokenizer, 20, " beside an answer")
    tokenizer.chat_template = None
    for rows, check in ((good, lambda r: check_pairs(r, tokenizer, 99)), (read_rows("q.jsonl", PROMPTS), lambda r: check_prompts(r, tokenizer, 99))):
        with pytest.raises(DataError, match="holds messages, and the model's tokenizer has no chat template"):
            check(rows)
