"""Rewards by name: a function in a file of the user's, the built-in ones, or a reward model.

A function has TRL's signature: it is called with `prompts`, `completions`, `completion_ids` and every column of the data,
each a list, and returns a number (or None: no reward) for each completion.
"""
import difflib
import hashlib
import inspect
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm_train_course.app import runs
from llm_train_course.app.data import DataError
from llm_train_course.app.runs import UserError

BUILT_IN = ("world", "exact")


def is_model(name: str) -> bool:
    "Whether a reward is a model, by its name."
    return name not in BUILT_IN and not re.search(r"\.py(:|$)", name)


# ---------------------------------------------------------------------------------------------------------------------
# the verifiable one
# ---------------------------------------------------------------------------------------------------------------------
def _final(text: str) -> list[str]:
    "Readings of what a text gives as its answer: behind the last `Answer:`, `####` or in `\\boxed{}`, else all of it."
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    if boxed:
        return [boxed[-1]]
    marked = re.split(r"####|\banswer\s*[:：]|答案\s*[:：]", text, flags=re.IGNORECASE)
    line = (marked[-1].strip().splitlines() or [""])[0] if len(marked) > 1 else text.strip()
    sentence = re.split(r"(?<=[.。])(?:\s|$)|(?<=。)", line)[0] if len(marked) > 1 else line
    return [line, sentence]


def _same(given: str, wanted: str) -> bool:
    tidy = lambda t: re.sub(r"\s+", " ", t).strip().rstrip(".。").strip().casefold()
    a, b = tidy(given), tidy(wanted)
    if a == b:
        return True
    try:
        return float(a.replace(",", "").lstrip("$")) == float(b.replace(",", "").lstrip("$"))
    except ValueError:
        return False


def exact(completions, answer, **columns) -> list[float]:
    "1 where the completion's final answer is the column `answer`: case, spaces and a last full stop do not count, numbers are compared as numbers."
    text = lambda c: c if isinstance(c, str) else "".join(m["content"] for m in c)
    return [float(any(_same(reading, str(wanted)) for reading in _final(text(said)))) for said, wanted in zip(completions, answer)]


# ---------------------------------------------------------------------------------------------------------------------
# by name
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Found:
    "A reward that was named: a function, or where its model is."
    name: str
    field: str                      # of the recipe, for messages
    function: Callable | None = None
    source: str | None = None       # of a reward model
    sha256: str | None = None       # of the file

    def about(self) -> dict:
        "For config.yaml."
        return {"name": self.name, **({"sha256": self.sha256} if self.sha256 else {})}

    def load(self, policy, tokenizer, policy_name: str):
        "What `rlhf` takes: the function, or the model, whose vocabulary must be the policy's."
        if self.function:
            return self.function
        model, theirs = load_model(self.source, f"{self.field}: {self.name}")
        mine, size = tokenizer.get_vocab(), model.config.get_text_config().vocab_size
        if (theirs is not None and theirs.get_vocab() != mine) or size != policy.config.get_text_config().vocab_size:
            what = "" if theirs is None else f" ({len(theirs.get_vocab()):,} tokens, {len(mine):,} here)"
            raise UserError(f"{self.field}: {self.name} has another vocabulary{what} than the policy {policy_name}: it would read other words "
                            "than the policy writes")
        return model


def labels(found: list[Found]) -> list[str]:
    "Short names, no two of them equal."
    short = [f.name.rsplit(":", 1)[-1] if f.function else runs.slug(f.name) for f in found]
    return [s if short.count(s) == 1 else f"{s}.{n}" for n, s in enumerate(short, 1)]


def find(
    name: str,
    field: str,          # of the recipe
    world,               # a World, or a function that makes one
) -> Found:
    "The reward of that name, or a refusal that says what is wrong with it."
    if name == "world":
        from llm_train_course.rlhf import text_reward
        made = world() if callable(world) else world
        return Found(name, field, text_reward(made.true_reward))
    if name == "exact":
        return Found(name, field, exact)
    if not is_model(name):
        function, digest = load_function(name, field)
        return Found(name, field, function, sha256=digest)
    try:
        source = runs.model_source(name)
    except UserError as e:
        raise UserError(f"{field}: {str(e).removeprefix('model: ')}") from e
    if Path(source).is_dir() and not runs.is_reward_model(source):
        raise UserError(f"{field}: {name} is no reward model: llm-train rm makes one (or name a function, file.py:function)")
    if not Path(source).is_dir() and "/" not in name:
        near = difflib.get_close_matches(name, BUILT_IN, 1)
        raise UserError(f"{field}: {name}: no such run, folder or built-in reward" + (f" (did you mean {near[0]}?)" if near else
                        f"; a function of yours is written file.py:{name}"))
    return Found(name, field, source=source)


def load_function(
    name: str,      # file.py:function
    field: str = "reward",
) -> tuple[Callable, str]:  # and the file's sha256
    "A function out of a file."
    file, _, wanted = name.rpartition(":") if re.search(r"\.py:[^/\\]*$", name) else (name, "", "")
    path = Path(file).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], 1) if path.parent.is_dir() else []
        raise UserError(f"{field}: {file}: no such file" + (f" (did you mean {near[0]}?)" if near else ""))
    module = types.ModuleType(f"_reward_{path.stem}")
    module.__file__ = str(path.absolute())
    sys.path.insert(0, str(path.absolute().parent))  # what lies beside it can be imported
    try:  # not by the import system: no compiled copy beside the file, which may be old
        exec(compile(path.read_bytes(), module.__file__, "exec"), vars(module))
    except SyntaxError as e:
        raise UserError(f"{field}: {file}:{e.lineno}: not Python ({e.msg})") from e
    except SystemExit as e:
        raise UserError(f"{field}: {file}: leaves with sys.exit when it is read") from e
    except Exception as e:
        line = e.__traceback__
        while line.tb_next:
            line = line.tb_next
        where = f"{file}:{line.tb_lineno}" if line.tb_frame.f_code.co_filename == str(path.absolute()) else file
        raise UserError(f"{field}: {where}: {type(e).__name__}: {' '.join(str(e).split())}") from e
    finally:
        sys.path.remove(str(path.absolute().parent))
    own = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_") and v.__module__ == module.__name__]
    function = getattr(module, wanted, None) if wanted else None
    if not callable(function):
        has = f"it has {', '.join(own)}" if own else "it has no function"
        if function is not None:
            raise UserError(f"{field}: {name}: {wanted} is no function; {has}")
        near = difflib.get_close_matches(wanted, own, 1) if wanted else []
        raise UserError(f"{field}: {file} has no function {wanted}" + (f" (did you mean {near[0]}?)" if near else f"; {has}") if wanted
                        else f"{field}: {name}: name the function, as in {file}:{own[0] if own else 'function'}; {has}")
    return function, hashlib.sha256(path.read_bytes()).hexdigest()


def check_columns(
    found: list[Found],
    field: str,
    rows,           # prompts
    eval_rows=None,
) -> None:
    "Whether every function can be called with what the data hold."
    for f in (f for f in found if f.function):
        problems = []
        for part in (p for p in (rows, eval_rows) if p):
            names = {k for v in part.values for k in v} - {"prompt"}
            if f.function is exact:
                problems += [f"{row.where}: the reward exact needs a field `answer`" for row in part.rows if row.value.get("answer") in (None, "")]
                continue
            given = {name: [] for name in ("prompts", "completions", "completion_ids", *sorted(names))}
            try:
                inspect.signature(f.function).bind(**given)
            except TypeError as e:
                raise UserError(f"{field}: {f.name} cannot be called with {', '.join(given)}: {e}. TRL's signature is "
                                "fn(prompts, completions, **columns)") from e
            except ValueError:  # a callable without a signature
                pass
        if problems:
            raise DataError(problems)


def load_model(
    source: str,       # a folder or a hub name
    what: str,         # for messages
    dtype: str = "fp32",
):                     # RewardModel, tokenizer or None
    "A reward model and its tokenizer."
    from transformers import AutoTokenizer

    from llm_train_course.app.adapters import DTYPES
    from llm_train_course.app.data import hub_reachable
    from llm_train_course.rlhf import load_reward_model

    if not Path(source).is_dir():
        hub_reachable()
    try:
        model = load_reward_model(source, DTYPES[dtype])
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{what}: {' '.join(str(e).split())[:300]}") from e
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        return model, None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
