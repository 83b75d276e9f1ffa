"""Data files: read, check every row before anything is done, turn into token examples.

Formats are TRL's: {"text"}, {"messages"}, {"prompt", "completion"}, {"prompt", "chosen", "rejected"}, {"chosen",
"rejected"} that share their beginning, {"prompt"} with columns for reward functions, as JSONL, Parquet, plain text (one
document), or a hub dataset. Line numbers are physical lines of the file; for Parquet and the hub, row
numbers from 1. Nothing here imports torch.
"""
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

KINDS = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
}
_IMPLICIT = {"implicit_preference": ("chosen", "rejected")}                # read as preference
_PROMPTS = {"prompt": ("prompt",), "prompt_messages": ("messages",)}      # read as prompt
_FIELDS = {**KINDS, **_IMPLICIT, **_PROMPTS}
SFT, PREFERENCES, PROMPTS = ("messages", "prompt_completion", "text"), ("preference", *_IMPLICIT), tuple(_PROMPTS)  # what a command accepts
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")  # what a reward function is given besides
ROLES = ("system", "user", "assistant")
ON_LONG = ("error", "truncate", "drop")
SHOWN = 50  # problems printed; the rest are counted

# what other tools call these things, and what to do about it
_FOREIGN = {
    "conversations": 'ShareGPT: rename "conversations" to "messages", "from" to "role" (human is user, gpt is assistant), "value" to "content"',
    "instruction": 'Alpaca: write "instruction" and "input" as "prompt", "output" as "completion"',
    "question": 'rename "question" to "prompt" and "answer" to "completion"',
    "response": 'rename "response" to "completion"',
    "input": 'rename "input" to "prompt" and "output" to "completion"',
}
_MAGIC = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "a gzip file", b"PK\x03\x04": "a zip file",
          b"\x28\xb5\x2f\xfd": "a zstd file"}


class DataError(ValueError):
    "Everything that is wrong with the data, one `file:line: what` a problem."

    def __init__(
        self,
        problems: list[str],
        hint: str = "",  # what the user could do, on a line of its own
    ):
        super().__init__(problems)
        self.problems, self.hint = list(problems), hint

    def __str__(self):
        lines = self.problems[:SHOWN]
        if len(self.problems) > SHOWN:
            lines = [*lines, f"... and {len(self.problems) - SHOWN} more"]
        if len(self.problems) > 1:
            lines = [*lines, f"{len(self.problems)} problems in the data; nothing was written"]
        return "\n".join([*lines, *([self.hint] if self.hint else [])])


@dataclass(frozen=True)
class Row:
    "One good row: the fields of its format, and where it came from."
    value: dict
    source: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Rows:
    "All rows of a source."
    rows: list[Row]
    kind: str              # text, messages, prompt_completion, preference or prompt
    source: str            # as the user named it
    n_blank: int = 0       # empty and white-space lines, which are skipped

    def __len__(self):
        return len(self.rows)

    @property
    def values(self) -> list[dict]:
        return [row.value for row in self.rows]

    @property
    def fingerprint(self) -> str:
        "sha256 over the rows as canonical JSON: the same for LF and CRLF, JSONL and Parquet."
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row.value, sort_keys=True, ensure_ascii=True, default=str).encode() + b"\n")
        return digest.hexdigest()


@dataclass
class Encoded:
    "Token examples and what was done to get them."
    examples: list[dict]
    n_rows: int
    n_tokens: int = 0
    n_split: int = 0       # texts longer than the context, cut into pieces
    n_truncated: int = 0
    n_dropped: int = 0
    warnings: list[str] = field(default_factory=list)


def show(
    value,
    width: int = 40,  # characters
) -> str:
    "A value as it is shown in a message: on one line, without control characters, shortened."
    text = repr(value if not isinstance(value, str) or len(value) <= 4 * width else value[:4 * width])
    return text if len(text) <= width else text[:width - 1] + "…"


# ---------------------------------------------------------------------------------------------------------------------
# one line of JSON
# ---------------------------------------------------------------------------------------------------------------------
class _Duplicate(ValueError):
    pass


def _pairs(pairs):
    seen = dict(pairs)
    if len(seen) < len(pairs):
        names = [k for k, _ in pairs]
        raise _Duplicate(f"the field {show(next(k for k in names if names.count(k) > 1))} is there twice")
    return seen


def _constant(name):
    raise _Duplicate(f"{name} is not JSON (a number or null is needed)")


def parse_line(
    raw: bytes,                 # without its line end
) -> tuple[object, str | None]:  # the value, or what is wrong
    "One line of JSONL."
    if b"\x00" in raw:
        return None, f"NUL byte at byte {raw.index(0) + 1} (a UTF-16 file, or one cut off while it was written)"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        return None, f"not UTF-8: byte 0x{raw[e.start]:02x} at byte {e.start + 1}"
    text = text.strip().removeprefix("\ufeff")  # a byte order mark starts a file, or a line where two files were joined
    try:
        return json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant), None
    except json.JSONDecodeError as e:
        if e.msg == "Extra data":
            return None, f"column {e.colno}: more than one JSON value on the line"
        return None, f"column {e.colno}: not JSON ({e.msg[0].lower()}{e.msg[1:]})"
    except _Duplicate as e:
        return None, str(e)
    except RecursionError:
        return None, "not JSON that can be read: nested too deeply"
    except ValueError as e:  # an integer of more digits than Python reads
        return None, f"not JSON that can be read ({str(e).split(';')[0]})"


def _jsonl(path: Path, problems: list[str], source: str) -> Iterator[tuple[int, object]]:
    "(line, value) of each good line, (line, None) of each blank one; problems are appended."
    with path.open("rb") as f:
        for n, raw in enumerate(f, 1):  # bytes split at \n only: U+2028 and friends belong to the text
            raw = raw.removesuffix(b"\n").removesuffix(b"\r")
            if n == 1:
                magic = next((what for m, what in _MAGIC.items() if raw.startswith(m)), None)
                if magic:
                    problems.append(f"{source}:1: this is {magic}; a UTF-8 text file is needed")
                    return
                raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.lstrip().startswith(b"["):
                    problems.append(f"{source}:1: a JSON array; one object a line is needed (jq -c '.[]' makes it so)")
                    return
            if not raw.strip() or not raw.decode("utf-8", "replace").strip("\ufeff \t\r\n\f\v\u00a0\u3000"):
                yield n, None
                continue
            value, wrong = parse_line(raw)
            if wrong:
                problems.append(f"{source}:{n}: {wrong}")
            elif not isinstance(value, dict):
                problems.append(f"{source}:{n}: a JSON object is needed, got {_type(value)} {show(value)}")
            else:
                yield n, value


def _type(value):
    return {str: "a string", int: "a number", float: "a number", bool: "a boolean", list: "a list", dict: "an object",
            type(None): "null"}.get(type(value), type(value).__name__)


# ---------------------------------------------------------------------------------------------------------------------
# what a row must look like
# ---------------------------------------------------------------------------------------------------------------------
def _string(value, path, *, empty_ok=False) -> list[str]:
    if value is None:
        return [f"{path} is null, a string is needed"]
    if not isinstance(value, str):
        return [f"{path} must be a string, got {_type(value)} {show(value)}"]
    if not value.strip() and not empty_ok:
        return [f"{path} is empty" if not value else f"{path} is white space only: {show(value)}"]
    lone = re.search("[\ud800-\udfff]", value)
    if lone:
        return [f"{path}: unpaired surrogate \\u{ord(lone[0]):04x} at character {lone.start() + 1}, not a character"]
    return []


def _turn(turn, path) -> list[str]:
    if not isinstance(turn, dict):
        return [f"{path} must be an object with role and content, got {_type(turn)} {show(turn)}"]
    missing = [name for name in ("role", "content") if name not in turn]
    for name in ("tool_calls", "function_call"):
        if turn.get(name):
            return [f"{path}.{name}: tool calls are not supported"]
    if missing:
        hint = '; "from" and "value" are ShareGPT\'s names for role and content' if {"from", "value"} & turn.keys() else ""
        return [f"{path} has no {' and no '.join(missing)} (it has {_names(turn)}){hint}"]
    if turn.get("weight") is not None:
        return [f"{path}.weight: weights of turns are not supported"]
    problems, role, content = [], turn["role"], turn["content"]
    if role in ("tool", "function", "ipython"):
        problems.append(f"{path}.role: {show(role)} turns (tool calls) are not supported")
    elif role not in ROLES:
        close = difflib.get_close_matches(str(role).lower(), ROLES, 1, 0.6)
        problems.append(f"{path}.role must be system, user or assistant, got {show(role)}"
                        + (f" (did you mean {close[0]}?)" if close else ""))
    if isinstance(content, list):
        return [*problems, f"{path}.content is a list: content in parts (images, audio) is not supported, a string is needed"]
    return problems + _string(content, f"{path}.content")


def _messages(value, path, first="user", last="assistant") -> list[str]:
    "A conversation whose first turn after an optional system turn is `first`, and whose last is `last`."
    if not isinstance(value, list):
        return [f"{path} must be a list of {{role, content}}, got {_type(value)} {show(value)}"]
    if not value:
        return [f"{path} is an empty list"]
    problems = [p for n, turn in enumerate(value) for p in _turn(turn, f"{path}[{n}]")]
    if problems:  # the order of the roles means nothing while the roles are wrong
        return problems
    roles = [turn["role"] for turn in value]
    late = [n for n, role in enumerate(roles) if role == "system" and (n or first == "assistant")]
    if late:
        where = "the first turn of the prompt" if first == "assistant" else "first"
        return [f"{path}[{n}]: a system turn must be {where}" for n in late]
    body = [(n, role) for n, role in enumerate(roles) if role != "system"]
    if not body:
        return [f"{path} has only a system turn"]
    if last == "assistant" and "assistant" not in roles:
        return [f"{path} has no assistant turn: there is nothing to learn"]
    if body[0][1] != first:
        problems.append(f"{path}[{body[0][0]}]: the {'first turn' if len(body) == len(roles) else 'turn after the system turn'} "
                        f"must be {first}, got {body[0][1]}")
    for (_, before), (n, role) in zip(body, body[1:]):
        if role == before:
            problems.append(f"{path}[{n}]: two {role} turns in a row; user and assistant must take turns")
    if roles[-1] != last:
        why = "nothing is learned from a trailing user turn: remove it" if last == "assistant" else "the answer belongs into the other field"
        problems.append(f"{path}[{len(roles) - 1}]: the last turn must be {last}, got {roles[-1]} ({why})")
    return problems


def _check(row, kind) -> list[str]:
    "What is wrong with a row of this kind."
    if kind == "text":
        return _string(row["text"], "text")
    if kind == "messages":
        return _messages(row["messages"], "messages")
    if kind in _PROMPTS:
        return _check_prompt(row, kind)
    if kind in _IMPLICIT:
        return _check_implicit(row)
    answers = KINDS[kind][1:]
    talk = [name for name in KINDS[kind] if isinstance(row[name], list)]
    if talk and len(talk) < len(KINDS[kind]):
        plain = [name for name in KINDS[kind] if name not in talk]
        return [f"{', '.join(talk)}: a list of messages, but {', '.join(plain)} {'is' if len(plain) == 1 else 'are'} not; "
                "use strings or messages for all of them"]
    if talk:
        problems = _messages(row["prompt"], "prompt", last="user")
        problems += [p for name in answers for p in _messages(row[name], name, first="assistant")]
    else:
        problems = [p for name in KINDS[kind] for p in _string(row[name], name)]
    if not problems and kind == "preference" and row["chosen"] == row["rejected"]:
        problems.append("chosen and rejected are equal: there is no preference to learn")
    return problems


def _asked(messages):
    "A conversation up to its last user turn, and what the assistant says to that, if it does."
    users = [n for n, turn in enumerate(messages) if isinstance(turn, dict) and turn.get("role") == "user"]
    if not users:
        return messages, None
    rest = messages[users[-1] + 1:]
    return messages[:users[-1] + 1], rest[0].get("content") if rest and isinstance(rest[0], dict) else None


def _check_prompt(row, kind):
    "What is wrong with a prompt, or with a conversation whose last user turn is one."
    taken = [name for name in row if name in RESERVED]
    if taken:
        return [f"the field {taken[0]}: reward functions are given something of that name already, rename it"]
    if kind == "prompt":
        return _messages(row["prompt"], "prompt", last="user") if isinstance(row["prompt"], list) else _string(row["prompt"], "prompt")
    value = row["messages"]
    problems = _messages(_asked(value)[0] if isinstance(value, list) else value, "messages", last="user")
    if not problems and len(value) > len(_asked(value)[0]):  # what follows may be an answer, and must be one then
        problems = _messages(value, "messages")
    return problems


def _check_implicit(row):
    "What is wrong with a pair whose prompt is the common beginning of its answers."
    sides = [row[name] for name in ("chosen", "rejected")]
    if isinstance(sides[0], list) != isinstance(sides[1], list):
        return ["chosen and rejected: one is a list of messages, the other is not"]
    check = _messages if isinstance(sides[0], list) else _string
    problems = [p for name, value in zip(("chosen", "rejected"), sides) for p in check(value, name)]
    if problems:
        return problems
    if sides[0] == sides[1]:
        return ["chosen and rejected are equal: there is no preference to learn"]
    pair = _explicit(row)
    if not pair["prompt"]:
        return ["there is no prompt, and chosen and rejected do not begin alike: write the prompt into a field of its own"]
    if isinstance(sides[0], list):
        if pair["prompt"][-1]["role"] != "user":
            return [f"chosen and rejected differ at the user's turn chosen[{len(pair['prompt'])}]: only what the assistant says may differ"]
        return []
    return [f"{name} is empty behind the common beginning: the other answer goes on where it ends"
            for name in ("chosen", "rejected") if not pair[name].strip()]


def _explicit(row):
    """{prompt, chosen, rejected} from answers that hold their prompt: it is what they share. Strings are cut where a word
    begins, so that none is torn in two; the space before it belongs to the answers."""
    a, b = row["chosen"], row["rejected"]
    n = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    if isinstance(a, str):
        while n and a[n - 1].isalnum() and a[n - 1] < "\u2e80":  # scripts that write words apart
            n -= 1
        while n and a[n - 1] == " ":
            n -= 1
    return {"prompt": a[:n], "chosen": a[n:], "rejected": b[n:]}


def _normal(row, kind):
    "The fields of a good row, as every command sees them."
    if kind in _IMPLICIT:
        return _explicit(row)
    if kind == "prompt":
        return dict(row)
    if kind == "prompt_messages":
        prompt, answer = _asked(row["messages"])
        more = {k: v for k, v in row.items() if k != "messages"}
        return {"prompt": prompt, **({"answer": answer} if answer is not None and "answer" not in more else {}), **more}
    return {f: row[f] for f in KINDS[kind]}


def _names(row):
    return ", ".join(show(k, 30) for k in list(row)[:8]) + (", ..." if len(row) > 8 else "") if row else "no fields"


def _wanted(accept):
    return " or ".join(dict.fromkeys(" + ".join(_FIELDS[kind]) for kind in accept))


def _no_kind(row, accept) -> str:
    "Why a row is of no format, and what would be right."
    present = {k for k, v in row.items() if v is not None}
    others = [kind for kind in KINDS if kind not in accept and present >= set(KINDS[kind])]
    if others:
        return f"a row of {' + '.join(KINDS[others[0]])}; {_wanted(accept)} is needed here"
    nulls = [k for k, v in row.items() if v is None and any(k in _FIELDS[kind] for kind in accept)]
    part = [(kind, [f for f in _FIELDS[kind] if f not in present]) for kind in accept if present & set(_FIELDS[kind])]
    part.sort(key=lambda item: len(item[1]))
    if nulls:
        return f"{', '.join(nulls)} is null; {_wanted(accept)} is needed"
    if part:
        fields = " and ".join(f'"{f}"' for f in part[0][1])
        return f"{fields} is missing (found {_names(row)}; needed {_wanted(accept)})"
    hint = next((text for name, text in _FOREIGN.items() if name in row), "")
    if not hint:
        known = sorted({f for kind in accept for f in _FIELDS[kind]})
        near = [(k, c[0]) for k in row if (c := difflib.get_close_matches(k.strip().lower(), known, 1, 0.75))]
        hint = f'did you mean "{near[0][1]}" instead of {show(near[0][0])}?' if near else ""
    return f"found {_names(row)}; needed {_wanted(accept)}" + (f". {hint}" if hint else "")


def _kinds(row, accept):
    "The formats whose fields a row has. A pair with a prompt is no pair without one, a prompt with messages beside it is a prompt."
    kinds = [k for k in accept if all(row.get(f) is not None for f in _FIELDS[k])]
    fuller = {"implicit_preference": "preference", "prompt_messages": "prompt"}
    return [k for k in kinds if fuller.get(k) not in kinds]


def _validate(
    items: Iterable[tuple[int, dict | None]],  # (line, row); None is a blank line
    source: str,
    accept: tuple[str, ...],
    problems: list[str],                       # what reading has found; more is added
) -> Rows:
    "Check all rows; the format is that of the first good one."
    parsed, n_blank = [], 0
    for line, row in items:
        if row is None:
            n_blank += 1
        else:
            parsed.append((line, row, _kinds(row, accept)))
    style = lambda row, kind: "messages" if isinstance(row[_FIELDS[kind][0]], list) else "strings"
    first = next(((line, kinds[0], style(row, kinds[0])) for line, row, kinds in parsed
                  if len(kinds) == 1 and not _check(row, kinds[0])), None)
    found, rows = [], []
    for line, row, kinds in parsed:
        kind = first[1] if first and first[1] in kinds else kinds[0] if kinds else None
        if not kinds:
            wrong = [_no_kind(row, accept)]
        elif len(kinds) > 1 and not first:
            wrong = [f"fields of several formats ({' and '.join(' + '.join(_FIELDS[k]) for k in kinds)}): keep one"]
        else:
            wrong = _check(row, kind)
            if not wrong and kind != first[1]:
                wrong = [f"{' + '.join(_FIELDS[kind])}, but {source}:{first[0]} is {' + '.join(_FIELDS[first[1]])}: one format a file"]
            elif not wrong and kind != "messages" and style(row, kind) != first[2]:
                wrong = [f"{_FIELDS[kind][0]} is written as {style(row, kind)}, in {source}:{first[0]} as {first[2]}: one way a file"]
        if wrong:
            found += [(line, f"{source}:{line}: {w}") for w in wrong]
        else:
            rows.append(Row(_normal(row, kind), source, line))
    # problems of reading and of checking, in the order of the lines
    number = lambda text: int(text[len(source) + 1:].split(":", 1)[0])
    problems = [text for _, text in sorted([*((number(p), p) for p in problems), *found], key=lambda item: item[0])]
    if problems:
        raise DataError(problems)
    if not rows:
        raise DataError([f"{source}: no rows" + (f" ({n_blank} blank lines)" if n_blank else "")])
    kind = "preference" if first[1] in _IMPLICIT else "prompt" if first[1] in _PROMPTS else first[1]
    return Rows(rows, kind, source, n_blank)


# ---------------------------------------------------------------------------------------------------------------------
# where rows come from
# ---------------------------------------------------------------------------------------------------------------------
_FILE_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".txt", ".md", ".csv", ".tsv", ".gz", ".zst", ".yaml")


def _looks_like_file(source):
    return source.lower().endswith(_FILE_SUFFIXES) or source.startswith((".", "/", "~", "\\")) or source.count("/") > 1


def _file(path, source, accept):
    if path.is_dir():
        raise DataError([f"{source}: is a folder, a file is needed"])
    problems = []
    try:
        with path.open("rb") as f:
            head = f.read(4)
        if head == b"PAR1":
            items = _parquet(path, source)
        elif path.suffix.lower() in (".csv", ".tsv"):
            raise DataError([f"{source}: {path.suffix} files are not read; JSONL, Parquet or plain text is needed"])
        elif path.suffix.lower() in (".txt", ".md"):
            items = _plain(path, source)
        elif path.suffix.lower() == ".parquet":
            raise DataError([f"{source}: not a Parquet file"])
        else:
            items = _jsonl(path, problems, source)
        return _validate(items, source, accept, problems)
    except OSError as e:
        raise DataError([f"{source}: cannot be read ({e.strerror or e})"]) from e


def _parquet(path, source):
    import pyarrow
    import pyarrow.parquet as pq

    try:
        return enumerate(pq.read_table(path).to_pylist(), 1)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as e:
        raise DataError([f"{source}: not a Parquet file that can be read ({str(e).splitlines()[0]})"]) from e


def _plain(path, source):
    "A text file is one document."
    raw = path.read_bytes()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError([f"{source}:1: this is UTF-16; a UTF-8 text file is needed"])
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        raise DataError([f"{source}:{raw.count(10, 0, e.start) + 1}: not UTF-8: byte 0x{raw[e.start]:02x}"]) from e
    return [(1, {"text": text} if text.strip() else None)]


def hub_reachable() -> bool:
    """Whether the hub's name can be resolved. Where it cannot, the hub's client is told to use its cache alone, so that a
    mistyped name is refused at once and not after half a minute of retries."""
    import socket
    from urllib.parse import urlparse

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy resolves names
    try:
        socket.getaddrinfo(urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname, 443)
        return True
    except OSError:
        import huggingface_hub
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        return False


def _hub(source):
    name, _, split = source.partition(":")
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name):
        raise DataError([f"{source}: no such file, and not the name of a hub dataset"])
    online = hub_reachable()
    try:
        import datasets

        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE or not online  # what is in its cache can be used
        data = datasets.load_dataset(name, split=split or None)
    except Exception as e:  # the client raises a dozen kinds; its first line says which
        why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}" if online else "the hub cannot be reached"
        raise DataError([f"{source}: no such file, and no dataset of this name on the hub ({why})"]) from e
    if isinstance(data, dict):
        if list(data) != ["train"]:
            raise DataError([f"{source}: has the splits {', '.join(data)}; name one, as in {name}:{next(iter(data))}"])
        data = data["train"]
    return enumerate((dict(row) for row in data), 1)


def _course(source):
    from llm_train_course.app.coursedata import interview_examples

    split = source.partition(":")[2] or "train"
    if split not in ("train", "heldout"):
        raise DataError([f"{source}: interview has the splits train and heldout"])
    return enumerate(interview_examples(split), 1)


def claim_questions(
    split: str = "train",   # train or heldout: that of the claim's interview questions
    language: str = "en",   # en or zh
) -> list[dict]:
    """Preference pairs about the claims that are not right as they stand: each interview question about one, the accurate
    statement chosen and the article's rejected. No claim is in both parts."""
    from llm_train_course.app.coursedata import LANGUAGES, load_claims, load_interview

    end = LANGUAGES[language]
    turn = lambda role, text: [{"role": role, "content": text}]
    claims = {row["id"]: row for row in load_claims() if row["verdict"] in ("corrected", "qualified")}
    return [{"prompt": turn("user", row[f"question{end}"]), "chosen": turn("assistant", claims[row["claim"]][f"truth_{language}"]),
             "rejected": turn("assistant", claims[row["claim"]][f"statement_{language}"])}
            for row in load_interview(split) if row["claim"] in claims]


def _claims(source, accept):
    "`claims[:heldout][:zh]`, in either order; as pairs, or as prompts with the accurate statement as `answer`."
    split, language = "train", "en"
    for part in source.split(":")[1:]:
        if part in ("train", "heldout"):
            split = part
        elif part in ("en", "zh"):
            language = part
        else:
            raise DataError([f"{source}: claims has the parts train and heldout, and the languages en and zh, as in claims:heldout:zh"])
    if "preference" in accept:
        return enumerate(claim_questions(split, language), 1)
    if "prompt" in accept:
        return enumerate(({"prompt": p["prompt"], "answer": p["chosen"][0]["content"]} for p in claim_questions(split, language)), 1)
    raise DataError([f"{source}: holds preferences; {_wanted(accept)} is needed here (interview has conversations)"])


def is_world(source: str | None) -> bool:
    "`world`, or a part of it."
    return source is not None and source.partition(":")[0] == "world" and not Path(source).exists()


def _world(source, accept, world):
    import random

    from llm_train_course.stages import World, make_preferences

    world = world or World()
    part = source.partition(":")[2] or "seen"
    if part not in ("seen", "heldout"):
        raise DataError([f"{source}: the world has world, about the people that fine-tuning asks about, and world:heldout, about the others"])
    seen = part == "seen"
    if "prompt" in accept:
        facts = [f for f in world.facts if f.seen == seen]
        return enumerate(({"prompt": p, "answer": f.value} for p, f in zip(world.prompts(seen), facts)), 1)
    if "messages" in accept or "text" in accept:
        if not seen:
            raise DataError([f"{source}: the held-out people have preferences and prompts only"])
        return enumerate(world.sft_examples() if "messages" in accept else ({"text": text} for text in world.corpus()), 1)
    if seen:
        return enumerate(world.preference_pairs(), 1)
    others = [f for f in world.facts if not f.seen]
    return enumerate(make_preferences(others, world.true_reward, 200, 1.0, random.Random(f"held-out preferences {world.seed}")), 1)


def read_rows(
    source: str,                             # a file, `interview`, `claims`, `world` (or a part of them), or a hub name[:split]
    kind: str | Iterable[str] | None = None,  # the format or formats that are accepted; None: any
    *,
    world=None,                              # a `stages.World` for the source `world`
) -> Rows:
    "All rows of a source, checked. `DataError` lists every problem there is."
    accept = tuple(KINDS) if kind is None else (kind,) if isinstance(kind, str) else tuple(kind)
    unknown = [k for k in accept if k not in _FIELDS]
    if unknown:
        raise ValueError(f"kind must be among {', '.join(_FIELDS)}, got {unknown[0]!r}")
    if not source or not str(source).strip():
        raise DataError(["data: is empty; a file or a name is needed"])
    source = str(source)
    path = Path(source).expanduser()
    if path.exists():
        return _file(path, source, accept)
    name = source.partition(":")[0]
    if name == "interview":
        return _validate(_course(source), source, accept, [])
    if name == "claims":
        return _validate(_claims(source, accept), source, accept, [])
    if name == "world":
        return _validate(_world(source, accept, world), source, accept, [])
    if _looks_like_file(source):
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1) if path.parent.is_dir() else []
        raise DataError([f"{source}: no such file" + (f" (did you mean {near[0]}?)" if near else "")])
    return _validate(_hub(source), source, accept, [])


# ---------------------------------------------------------------------------------------------------------------------
# tokens
# ---------------------------------------------------------------------------------------------------------------------
def _pieces(example, max_length):
    """A long text in pieces of at most `max_length` tokens. Neighbours share one token: the first token of a row is not
    a target, so with the shared one each token of the text is a target exactly once."""
    ids, labels = example["input_ids"], example["labels"]
    step = max(1, max_length - 1)
    starts = range(0, max(1, len(ids) - 1), step)
    return [{"input_ids": ids[s:s + max_length], "labels": labels[s:s + max_length]} for s in starts]


def _texts(value):
    "All strings of a row that the user wrote."
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for v in ([value["content"]] if "content" in value else value.values()):
            yield from _texts(v)
    elif isinstance(value, list):
        for v in value:
            yield from _texts(v)


def encode_rows(
    rows: Rows,
    tokenizer,
    max_length: int,           # tokens a row
    on_long: str = "error",    # longer rows: refuse them all at once, truncate, or drop; texts are cut into pieces instead
) -> Encoded:
    """Token examples, in the order of the rows. A text longer than `max_length` is cut into pieces and nothing is lost.
    A conversation cannot be cut so, and what its end holds is what is trained on: it is refused unless `on_long` says
    otherwise."""
    from llm_train_course.core import IGNORE, encode_messages, encode_prompt_completion, encode_text

    if on_long not in ON_LONG:
        raise ValueError(f"on_long must be {', '.join(ON_LONG)}, got {on_long!r}")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    if tokenizer.eos_token_id is None:
        raise DataError([f"{rows.source}: the tokenizer has no end token, so a model could not learn to stop"])
    conversational = rows.kind != "text" and isinstance(rows.rows[0].value[KINDS[rows.kind][0]], list)
    if conversational and not tokenizer.chat_template:
        raise DataError([f"{rows.source}: holds messages, and the model's tokenizer has no chat template"],
                        "Use an instruction-tuned model, or write the rows as prompt and completion strings.")
    encode = {
        "text": lambda v: encode_text(tokenizer, v["text"]),
        "messages": lambda v: encode_messages(tokenizer, v["messages"]),
        "prompt_completion": lambda v: encode_prompt_completion(tokenizer, v["prompt"], v["completion"]),
    }.get(rows.kind)
    if encode is None:
        raise DataError([f"{rows.source}: {rows.kind} data cannot be trained on by this command"])
    out, problems, longest, special = Encoded([], len(rows)), [], 0, []
    marks = [t for t in tokenizer.all_special_tokens if t]
    for row in rows.rows:
        try:
            example = encode(row.value)
        except Exception as e:  # jinja's and core's: a template may refuse a role, or rewrite earlier turns
            problems.append(f"{row.where}: the chat template refuses this row ({str(e).splitlines()[0]})")
            continue
        if any(mark in text for text in _texts(row.value) for mark in marks):
            special.append(row.where)
        size = len(example["input_ids"])
        pieces = [example]
        if size > max_length:
            if rows.kind == "text":
                pieces, out.n_split = _pieces(example, max_length), out.n_split + 1
            elif on_long == "error":
                problems.append(f"{row.where}: {size} tokens, the limit is {max_length}")
                longest = max(longest, size)
                continue
            elif on_long == "drop":
                out.n_dropped += 1
                continue
            else:
                pieces = [{k: v[:max_length] for k, v in example.items()}]
                out.n_truncated += 1
        for piece in pieces:
            if all(label == IGNORE for label in piece["labels"][1:]):
                if size <= max_length:
                    problems.append(f"{row.where}: no token to learn")
                else:  # truncated before the answer began
                    out.n_dropped, out.n_truncated = out.n_dropped + 1, out.n_truncated - 1
                continue
            out.examples.append(piece)
            out.n_tokens += len(piece["input_ids"])
    if problems:
        raise DataError(problems, f"Raise --max_length (the longest row has {longest}), or say what to do with longer rows: "
                                  "--on_long truncate or --on_long drop." if longest else "")
    if not out.examples:
        raise DataError([f"{rows.source}: no row is left: all {len(rows)} are longer than max_length {max_length}"])
    if special:
        out.warnings.append(f"{len(special)} rows hold the text of a special token, which the tokenizer reads as that token "
                            f"(first: {special[0]})")
    if out.n_split:
        out.warnings.append(f"{rows.source}: {out.n_split} texts are longer than max_length {max_length} and were cut into pieces")
    if out.n_truncated:
        out.warnings.append(f"{rows.source}: {out.n_truncated} rows are longer than max_length {max_length} and were truncated")
    if out.n_dropped:
        out.warnings.append(f"{rows.source}: {out.n_dropped} rows were dropped (longer than max_length {max_length})")
    return out


def _faults(rows, encode):
    "What `encode` makes of each row, or every problem at once."
    out, problems = [], []
    for row in rows.rows:
        try:
            out.append(encode(row.value))
        except Exception as e:  # the encoder's own words, jinja's and core's
            text = str(e).splitlines()[0] if str(e) else type(e).__name__
            known = isinstance(e, ValueError)
            problems.append(f"{row.where}: {text if known else f'the chat template refuses this row ({text})'}")
    if problems:
        raise DataError(problems)
    return out


def _needs_template(rows, tokenizer):
    if isinstance(rows.rows[0].value["prompt"], list) and not tokenizer.chat_template:
        raise DataError([f"{rows.source}: holds messages, and the model's tokenizer has no chat template"],
                        "Use an instruction-tuned model, or write the rows as strings.")


def check_pairs(
    rows: Rows,           # of kind preference
    tokenizer,
    max_length: int,      # tokens of prompt and answer together
    whole: bool = False,  # an answer that does not fit is a problem; False: it is cut off there
) -> tuple[list[dict], list[str]]:  # tokens of each pair, as `dpo.encode_pair` gives them; warnings
    "Pairs as tokens; every bad one is named."
    from llm_train_course.dpo import encode_pair

    _needs_template(rows, tokenizer)

    def encode(value):
        pair = encode_pair(tokenizer, value, None if whole else max_length)
        size = len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        if whole and len(pair["prompt_ids"]) >= max_length:
            raise ValueError(f"the prompt has {len(pair['prompt_ids'])} tokens, the context holds {max_length}")
        if whole and size > max_length:
            raise ValueError(f"prompt and answer have {size} tokens, the limit is {max_length}")
        return pair

    pairs = _faults(rows, encode)
    eos = tokenizer.eos_token_id
    cut = sum(len(p["prompt_ids"] + p[f"{k}_ids"]) == max_length and p[f"{k}_ids"][-1] != eos for p in pairs for k in ("chosen", "rejected"))
    return pairs, [f"{rows.source}: {cut} answers are cut off at {max_length} tokens"] if cut and not whole else []


def check_prompts(
    rows: Rows,           # of kind prompt
    tokenizer,
    limit: int | None,    # tokens that fit beside an answer; None: any number
    context: str = "",    # how the limit comes about, for messages
) -> list[list[int]]:     # tokens of each
    "Prompts as tokens; every one that leaves no room for an answer is named."
    _needs_template(rows, tokenizer)

    def encode(value):
        prompt = value["prompt"]
        ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        if limit is not None and len(ids) > limit:
            raise ValueError(f"the prompt has {len(ids)} tokens, {limit} fit{context}")
        return list(ids)

    return _faults(rows, encode)
