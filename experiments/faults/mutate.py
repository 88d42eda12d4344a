"""Random changes of JSON values, of bytes, and of overrides."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, -(10**9), 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "a", "../../outside", "/etc/passwd", "~/x", "${oc.env:HOME}", "\0", "é" * 50,
    "x" * 5000, "<script>", "__import__('os').system('touch outside')", [], {}, [[]], [None],
    {"a": 1}, ["a"] * 50, [0] * 50, {"_target_": "os.system", "command": "touch outside"},
)  # fmt: skip

KEYS = (
    "merge.m", "merge.target_layers", "merge.refit", "merge.retention", "merge.groups", "eval",
    "calibration", "merge.sparsity", "model.dtype", "distill", "merge.save_at", "calibration.mix",
    "merge.shard_size", "tracking", "plugins", "from_run",
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else []
    items = list(enumerate(value[:8])) if isinstance(value, list) else items
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def json_value(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to three changes."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = places(value)
        if not found:
            return rng.choice(STRANGE)
        *way, key = rng.choice(found)
        owner = value
        for step in way:
            owner = owner[step]
        change = rng.randrange(6)
        if change == 0:
            del owner[key]
        elif change == 1 and isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        elif change == 1:
            owner[rng.choice(["", "x", "_target_", f"{key} ", "__class__"])] = owner[key]
        elif change == 2 and isinstance(owner[key], int | float):
            owner[key] = rng.choice([owner[key] + 1, -owner[key], owner[key] * 10**6, 0])
        else:
            owner[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


def text(value: Any, rng: random.Random) -> str:
    """A changed JSON value as text; in one case of ten the text is changed instead."""
    if rng.random() < 0.9:
        return json.dumps(json_value(value, rng))
    if rng.random() < 0.1:
        return "[" * 200_000
    return data(json.dumps(value).encode(), rng).decode("utf-8", errors="replace")


def data(whole: bytes, rng: random.Random) -> bytes:
    """Bytes of which some are cut, replaced, repeated or flipped."""
    found = bytearray(whole)
    at = rng.randrange(len(found) + 1)
    change = rng.randrange(5)
    if change == 0:
        del found[at:]
    elif change == 1:
        del found[at : at + rng.randint(1, 64)]
    elif change == 2:
        found[at:at] = rng.randbytes(rng.randint(1, 64))
    elif change == 3:
        for _ in range(rng.randint(1, 8)):
            found[rng.randrange(len(found))] = rng.randrange(256)
    else:
        return rng.randbytes(rng.randint(0, 200))
    return bytes(found)


def safetensors(whole: bytes, rng: random.Random) -> bytes:
    """A file of tensors with a changed length of its header, header, or content."""
    size = int.from_bytes(whole[:8], "little")
    header, content = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    change = rng.randrange(3)
    if change == 0:
        length = rng.choice([0, 1, size - 1, size + 1, 2**31, 2**63 - 1, 2**64 - 1])
        return length.to_bytes(8, "little") + whole[8:]
    if change == 1:
        return data(whole, rng)
    written = text(header, rng).encode()
    return len(written).to_bytes(8, "little") + written + content


def override(words: list[str], rng: random.Random) -> list[str]:
    """Overrides of which one has another key, value or form."""
    found = list(words)
    at = rng.randrange(len(found))
    key, _, value = found[at].partition("=")
    strange = rng.choice(STRANGE)
    shown = strange if isinstance(strange, str) else json.dumps(strange)
    forms = [shown, value, f"[{value}", f"{value},", f"{{{value}:", f"{value} {value}"]
    forms += ["${merge.m}", "???", "${job_hash:}", "'", "\\", "nan", "-1", "1e400", ""]
    shown = rng.choice(forms)
    key = rng.choice([key, key, key, key, f"+{key}", f"++{key}", f"~{key}", key[:-1], f"{key}.x",
                      key.upper(), "", "hydra.run", "hydra/launcher", "_target_"])  # fmt: skip
    found[at] = rng.choice([f"{key}={shown}", f"{key}={shown}", key, f"{key}={shown}={shown}",
                            f"--{key}", f"{key}@{shown}"])  # fmt: skip
    if rng.random() < 0.5:
        found.append(f"{rng.choice(KEYS)}={shown}")
    return found
