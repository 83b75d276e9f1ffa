"""The exercise checker: `check("01.2", fn)` tries a reader's function on fresh random inputs.

An exercise is a list of properties, each a small function `(fn, rng)` that draws an input with `rng`, calls the
reader's function through `compare` and says what was expected. A chapter's exercises are in `app/exercises/chNN.py`.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import math
import pkgutil
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class CheckFailed(AssertionError):
    "A property that the function does not have: which, on what input, what it returned and what was expected."


class Mismatch(Exception):
    "Raised inside a property; `check` turns it into a CheckFailed that names the property."

    def __init__(self, call: str, returned: str, expected: str, why: str = ""):
        super().__init__(call, returned, expected, why)
        self.call, self.returned, self.expected, self.why = call, returned, expected, why


@dataclass
class Exercise:
    "What a reader is asked, where to start, one right answer, and the properties of every right answer."

    id: str
    title: str
    title_zh: str
    statement: str
    statement_zh: str
    stub: str
    solution: str
    properties: dict[str, Callable] = field(default_factory=dict)

    @property
    def function(self) -> str:
        "The name of the function to write."
        return re.search(r"^def (\w+)", self.stub, re.M)[1]


EXERCISES: dict[str, Exercise] = {}


def exercise(id: str, **texts: str) -> Exercise:
    "Registers an exercise. Its properties follow, each decorated with `prop`."
    if id in EXERCISES:
        raise ValueError(f"exercise {id} is registered twice")
    EXERCISES[id] = Exercise(id=id, **texts)
    return EXERCISES[id]


def prop(of: Exercise, name: str) -> Callable:
    "Adds a property `(fn, rng)` to an exercise, under the words a failure will use."

    def register(test: Callable) -> Callable:
        of.properties[name] = test
        return test

    return register


def compile_function(source: str, name: str) -> Callable:
    "The function of this name that the source defines, in a namespace of its own."
    namespace: dict[str, Any] = {}
    exec(compile(source, f"<{name}>", "exec"), namespace)
    return namespace[name]


def same(returned: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-12) -> bool:
    "Equal within rounding; lists element by element. NaN equals nothing."
    if isinstance(expected, list):
        return isinstance(returned, list) and len(returned) == len(expected) and all(map(same, returned, expected))
    if isinstance(returned, bool) or not isinstance(returned, int | float):
        return False
    return math.isclose(returned, expected, rel_tol=rtol, abs_tol=atol)


def _plain(value: Any) -> Any:
    "Tensors and arrays as Python lists and numbers, tuples as lists."
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _short(value: Any, limit: int = 600) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def call(fn: Callable, **arguments: Any) -> Any:
    "What the function returns on these arguments. An exception, or a changed argument, is a mismatch."
    text = f"{getattr(fn, '__name__', 'fn')}({', '.join(f'{k}={_short(v)}' for k, v in arguments.items())})"
    given = copy.deepcopy(arguments)
    try:
        returned = _plain(fn(**given))
    except Exception as e:
        raise Mismatch(text, f"nothing: it raised {type(e).__name__}: {e}", "a value") from e
    for name, before in arguments.items():
        if repr(given[name]) != repr(before):
            raise Mismatch(text, _short(returned), f"an unchanged argument {name}", f"it is now {_short(given[name])}")
    return returned


def compare(fn: Callable, expected: Any, why: str = "", rtol: float = 1e-9, **arguments: Any) -> Any:
    "Calls the function and raises a mismatch unless it returns what is expected, which is also returned."
    returned = call(fn, **arguments)
    if not (same(returned, expected, rtol) if not isinstance(expected, list) else same(returned, expected)):
        text = f"{getattr(fn, '__name__', 'fn')}({', '.join(f'{k}={_short(v)}' for k, v in arguments.items())})"
        raise Mismatch(text, _short(returned), _short(expected), why)
    return returned


def load_exercises() -> dict[str, Exercise]:
    "All exercises of all chapters, by id."
    from . import exercises

    for module in pkgutil.iter_modules(exercises.__path__):
        importlib.import_module(f"{exercises.__name__}.{module.name}")
    return dict(sorted(EXERCISES.items()))


def check(
    id: str,  # the exercise, e.g. "01.2"
    fn: Callable,  # your answer
    seed: int | None = None,  # which random inputs; None draws fresh ones, a failure says how to get them again
    n_inputs: int = 25,  # random inputs for each property
) -> None:
    "Tries every property of the exercise on fresh random inputs; prints one line, or raises CheckFailed."
    known = load_exercises()
    if id not in known:
        near = difflib.get_close_matches(str(id), known, n=1)
        raise KeyError(f"no exercise {id!r}{f'; did you mean {near[0]}?' if near else ''} There are {', '.join(known)}.")
    if not callable(fn):
        raise TypeError(f"check({id!r}, fn): fn is {fn!r}, which is not a function")
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    task = known[id]
    for name, test in task.properties.items():
        for k in range(n_inputs):
            try:
                test(fn, random.Random(f"{seed}/{name}/{k}"))
            except Mismatch as m:
                lines = [f"{id} failed: {name}", f"  input     {m.call}", f"  returned  {m.returned}", f"  expected  {m.expected}"]
                lines += [f"  note      {m.why}"] if m.why else []
                lines += [f"  again     check({id!r}, {getattr(fn, '__name__', 'fn')}, seed={seed})"]
                raise CheckFailed("\n".join(lines)) from m.__cause__
    count = len(task.properties)
    print(f"{id} passed: {count} properties on {count * n_inputs} inputs")
