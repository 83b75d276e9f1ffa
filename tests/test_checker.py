"The exercise checker: stubs fail, solutions pass, plausible wrong answers are caught, and messages say what is wrong."
import pytest

from llm_train_course.app.checker import CheckFailed, check, compile_function, load_exercises

EXERCISES = load_exercises()
SEEDS = range(20)

# Plausible wrong answers: (what is wrong, source, words of the property that must catch it).
WRONG = {
    "01.1": [
        ("the forward pass only", "return (2*n_params + 4*n_layers*hidden_size*seq_len) * n_tokens", "6·N·D"),
        ("attention forgotten", "return 6 * n_params * n_tokens", "counting every product"),
        ("attention once, not per token", "return 6*n_params*n_tokens + 12*n_layers*hidden_size*seq_len", "counting every product"),
        ("attention per token with seq_len squared", "return (6*n_params + 12*n_layers*hidden_size*seq_len**2) * n_tokens", "counting every product"),
        ("scores without values", "return (6*n_params + 6*n_layers*hidden_size*seq_len) * n_tokens", "counting every product"),
    ],
    "01.2": [
        ("shifted by one", "y = [t if m else -100 for t, m in zip(input_ids, roles_mask)]\n    return y[1:] + [-100]", "own position"),
        ("shifted and shortened", "return [t if m else -100 for t, m in zip(input_ids, roles_mask)][1:]", "one label for each token"),
        ("end token masked", "return [t if m and t != 2 else -100 for t, m in zip(input_ids, roles_mask)]", "own position"),
        ("mask inverted", "return [-100 if m else t for t, m in zip(input_ids, roles_mask)]", "own position"),
        ("no mask", "return list(input_ids)", "own position"),
        ("id 0 taken for padding", "return [t if m and t else -100 for t, m in zip(input_ids, roles_mask)]", "token id 0"),
        ("input overwritten", "for k, m in enumerate(roles_mask):\n        if not m: input_ids[k] = -100\n    return input_ids", "one label"),
    ],
    "01.3": [
        ("mean of means", "import statistics\n    means = [sum(x for x, m in zip(r, k) if m) / sum(k) for r, k in zip(token_losses, masks) if sum(k)]\n    return sum(means) / len(means) if means else 0.0", "weighs the same"),
        ("divided by the padded count", "t = sum(x for r, k in zip(token_losses, masks) for x, m in zip(r, k) if m)\n    n = sum(map(len, token_losses))\n    return t / n if n else 0.0", "weighs the same"),
        ("mean of means that trips over padding", "means = [sum(x for x, m in zip(r, k) if m) / sum(k) for r, k in zip(token_losses, masks)]\n    return sum(means) / len(means)", "weighs the same"),
        ("division by zero without targets", "t = sum(x for r, k in zip(token_losses, masks) for x, m in zip(r, k) if m)\n    return t / sum(map(sum, masks))", "without any target"),
        ("padding multiplied by zero", "t = sum(x*m for r, k in zip(token_losses, masks) for x, m in zip(r, k))\n    n = sum(map(sum, masks))\n    return t / n if n else 0.0", "padded position"),
    ],
    "01.4": [
        ("mean a token", "s = [sum(x for x, m in zip(r, k) if m) / sum(k) for r, k in zip(token_logps, masks)]\n    return s.index(max(s))", "total log-probability"),
        ("mask ignored", "s = [sum(r) for r in token_logps]\n    return s.index(max(s))", "padding does not count"),
        ("first tokens assumed", "s = [sum(r[:sum(k)]) for r, k in zip(token_logps, masks)]\n    return s.index(max(s))", "total log-probability"),
        ("the least probable", "s = [sum(x for x, m in zip(r, k) if m) for r, k in zip(token_logps, masks)]\n    return s.index(min(s))", "total log-probability"),
        ("the first token decides", "s = [next(x for x, m in zip(r, k) if m) for r, k in zip(token_logps, masks)]\n    return s.index(max(s))", "total log-probability"),
        ("the last of a tie", "s = [sum(x for x, m in zip(r, k) if m) for r, k in zip(token_logps, masks)]\n    return max(range(len(s)), key=lambda j: (s[j], j))", "tie"),
    ],
}  # fmt: skip


def wrong_answer(id, body):
    head = EXERCISES[id].stub.split("\n")[0]
    return compile_function(f"{head}\n    {body}\n", EXERCISES[id].function)


def test_chapter_1_has_its_four_exercises_and_every_exercise_has_wrong_answers():
    assert {"01.1", "01.2", "01.3", "01.4"} <= EXERCISES.keys()
    assert all(len(WRONG[id]) >= 3 for id in EXERCISES)


@pytest.mark.parametrize("id", EXERCISES)
def test_exercise_is_complete(id):
    e = EXERCISES[id]
    assert all(len(t) > 5 for t in (e.title, e.title_zh, e.statement, e.statement_zh))
    assert len(e.properties) >= 3
    assert e.solution.startswith(e.stub.split("\n")[0]), "stub and solution have one signature"


@pytest.mark.parametrize("id", EXERCISES)
@pytest.mark.parametrize("seed", SEEDS)
def test_solution_passes(id, seed, capsys):
    e = EXERCISES[id]
    check(id, compile_function(e.solution, e.function), seed=seed)
    n = len(e.properties)
    assert capsys.readouterr().out == f"{id} passed: {n} properties on {25 * n} inputs\n"


@pytest.mark.parametrize("id", EXERCISES)
def test_stub_fails(id):
    e = EXERCISES[id]
    with pytest.raises(CheckFailed, match=rf"{id} failed: "):
        check(id, compile_function(e.stub, e.function), seed=0)


@pytest.mark.parametrize("id, what, body, caught_by", [(id, *w) for id, ws in WRONG.items() for w in ws])
def test_wrong_answer_is_caught(id, what, body, caught_by):
    for seed in SEEDS:
        with pytest.raises(CheckFailed) as e:
            check(id, wrong_answer(id, body), seed=seed)
        lines = str(e.value).split("\n")
        assert lines[0].startswith(f"{id} failed: ") and caught_by in lines[0], lines[0]
        assert lines[1].startswith(f"  input     {EXERCISES[id].function}(")
        assert lines[2].startswith("  returned  ") and lines[3].startswith("  expected  ")
        assert lines[-1] == f"  again     check('{id}', {EXERCISES[id].function}, seed={seed})"


def test_a_fresh_seed_is_drawn_and_a_failure_can_be_repeated():
    fn = wrong_answer("01.2", WRONG["01.2"][0][1])
    seeds = set()
    for _ in range(6):
        with pytest.raises(CheckFailed) as e:
            check("01.2", fn)
        seed = int(str(e.value).rsplit("seed=", 1)[1].rstrip(")"))
        seeds.add(seed)
        with pytest.raises(CheckFailed) as again:
            check("01.2", fn, seed=seed)
        assert str(again.value) == str(e.value)
    assert len(seeds) > 1


def test_an_exception_is_reported_with_its_input():
    with pytest.raises(CheckFailed, match=r"it raised ZeroDivisionError") as e:
        check("01.3", wrong_answer("01.3", WRONG["01.3"][3][1]), seed=1)
    assert "token_losses=" in str(e.value) and isinstance(e.value.__cause__, ZeroDivisionError)


def test_a_changed_argument_is_reported():
    with pytest.raises(CheckFailed, match="an unchanged argument input_ids"):
        check("01.2", wrong_answer("01.2", WRONG["01.2"][6][1]), seed=1)


def test_tensors_are_accepted():
    import torch

    def completion_labels(input_ids, roles_mask):
        ids, mask = torch.tensor(input_ids), torch.tensor(roles_mask)
        return torch.where(mask.bool(), ids, -100)

    check("01.2", completion_labels, seed=0)


@pytest.mark.parametrize("answer", [None, "nan", "inf", "[]", "True"])
def test_values_that_are_no_answer_fail(answer):
    fn = wrong_answer("01.3", f"return float({answer!r})" if answer in ("nan", "inf") else f"return {answer}")
    with pytest.raises(CheckFailed):
        check("01.3", fn, seed=0)


def test_unknown_ids_list_what_exists():
    with pytest.raises(KeyError, match="01.1, 01.2, 01.3, 01.4"):
        check("99.9", len)
    with pytest.raises(TypeError, match="not a function"):
        check("01.1", 5)
