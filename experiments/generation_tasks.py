r"""Local tasks for eval=generation, in the format of lm-eval's own tasks, without the hub.

    python experiments/generation_tasks.py TASKS --data DATA
    python run.py eval=generation eval.generation.include_path=TASKS

Writes three tasks, which a regular expression or an exact match scores:

- word_problems: arithmetic word problems of one and two steps from a seeded generator. The answer
  is the number after "The answer is", as in the prompt's examples, one of each kind of problem.
- arc_easy_open: ARC-easy's questions without their choices, where the right choice is one or two
  words; exact match without case, punctuation and article. It needs DATA/arc_easy.jsonl (question,
  choices, answer), and is left out without --data.
- formats: a group of tasks that ask for a format, such as exactly two words or a list of four
  lines. Only the format is checked, not the content. The examples of the prompt have other formats
  or other counts, so the instruction decides.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]

NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack"]
THINGS = ["apples", "pencils", "marbles", "stamps", "pens", "books", "shells", "cards"]
SHOTS = 4  # answered questions in a prompt

# Word problems


def _gain(draw: random.Random, who: str, what: str) -> tuple[str, list[str]]:
    a, b = draw.randint(3, 40), draw.randint(3, 40)
    text = f"{who} has {a} {what} and finds {b} more. How many {what} does {who} have now?"
    return text, [f"{a} + {b} = {a + b}"]


def _loss(draw: random.Random, who: str, what: str) -> tuple[str, list[str]]:
    b, left = draw.randint(3, 30), draw.randint(3, 30)
    text = f"{who} has {b + left} {what} and gives {b} away. How many {what} are left?"
    return text, [f"{b + left} - {b} = {left}"]


def _boxes(draw: random.Random, who: str, what: str) -> tuple[str, list[str]]:
    a, b = draw.randint(2, 9), draw.randint(3, 12)
    text = f"{who} has {a} boxes with {b} {what} in each. How many {what} does {who} have?"
    return text, [f"{a} * {b} = {a * b}"]


def _share(draw: random.Random, who: str, what: str) -> tuple[str, list[str]]:
    a, b = draw.randint(2, 9), draw.randint(2, 12)
    text = (
        f"{who} shares {a * b} {what} equally among {a} friends. "
        f"How many {what} does each friend get?"
    )
    return text, [f"{a * b} / {a} = {b}"]


def _gain_and_loss(draw: random.Random, who: str, what: str) -> tuple[str, list[str]]:
    a, b = draw.randint(5, 30), draw.randint(5, 30)
    c = draw.randint(2, a + b - 1)
    text = (
        f"{who} has {a} {what}, buys {b} more and then loses {c}. "
        f"How many {what} does {who} have in the end?"
    )
    return text, [f"{a} + {b} = {a + b}", f"{a + b} - {c} = {a + b - c}"]


def _price(draw: random.Random, who: str, what: str) -> tuple[str, list[str]]:
    a, b = draw.randint(2, 9), draw.randint(2, 9)
    rest = draw.randint(1, 20)
    text = (
        f"{who} has {a * b + rest} dollars and buys {a} {what} for {b} dollars each. "
        f"How many dollars does {who} have left?"
    )
    return text, [f"{a} * {b} = {a * b}", f"{a * b + rest} - {a * b} = {rest}"]


KINDS: list[Callable[[random.Random, str, str], tuple[str, list[str]]]] = [
    _gain, _loss, _boxes, _share, _gain_and_loss, _price,
]  # fmt: skip


def word_problems(count: int, seed: int) -> list[Row]:
    """Different problems, of all kinds in turn: question, solution, and answer as a number."""
    draw, rows = random.Random(seed), {}
    while len(rows) < count:
        kind = KINDS[len(rows) % len(KINDS)]
        question, steps = kind(draw, draw.choice(NAMES), draw.choice(THINGS))
        answer = int(steps[-1].split(" = ")[1])
        solution = f"{'. '.join(steps)}. The answer is {answer}."
        rows[question] = {"question": question, "solution": solution, "answer": answer}
    return list(rows.values())


# Open questions

_NEEDS_CHOICES = re.compile(r"\b(following|these|statement|sentence|best|most likely)\b", re.I)


def open_questions(path: Path) -> list[Row]:
    """Questions that can be asked without their choices, and have a short answer."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question, answer = row["question"], row["choices"][row["answer"]]
        short = len(answer.split()) <= 2
        if short and question.endswith("?") and not _NEEDS_CHOICES.search(question):
            rows.append({"question": question, "solution": answer, "answer": answer})
    return rows


# Formats

TOPICS = [
    "the sea", "a forest", "winter", "a cat", "bread", "the moon", "a bicycle", "music", "a garden",
    "the desert", "rain", "a library", "coffee", "a horse", "a river", "summer", "a clock",
    "a market", "snow", "an island", "a train", "cheese", "a kitchen", "a bridge", "the sun",
    "a school", "a tree", "honey", "a boat", "a city",
]  # fmt: skip

_LINE, _ITEM, _SENTENCE = r"- *\S[^\n]*", r"[^,\s][^,\n]*", r"[^.?!\s][^.?!\n]*"

FORMATS = {
    "two_words": ("Describe {} in exactly two words.", r"\S+\s+\S+"),
    "four_words": ("Describe {} in exactly four words.", r"\S+(?:\s+\S+){3}"),
    "list_of_two": ("List two facts about {}. Begin each line with -.", rf"{_LINE}\n{_LINE}"),
    "list_of_four": (
        "List four facts about {}. Begin each line with -.",
        rf"{_LINE}(?:\n{_LINE}){{3}}",
    ),
    "commas": ("Name four things about {}, separated by commas.", rf"{_ITEM}(?:, *{_ITEM}){{3}}"),
    "capitals": ("Write a sentence about {} in capital letters.", r"[^a-z]*[A-Z][^a-z]*"),
    "lower_case": ("Write a sentence about {} in lower case.", r"[^A-Z]*[a-z][^A-Z]*"),
    "question": ("Ask one question about {}.", rf"{_SENTENCE}\?"),
    "full_stop": ("Write one sentence about {}. End it with a full stop.", rf"{_SENTENCE}\."),
    "quotes": ("Write a sentence about {} in double quotes.", r'"[^"\n]+"'),
}
"""Instruction and regular expression of every format; the expression matches a whole answer."""

FORMAT_SHOTS = [
    ("Describe the wind in exactly three words.", "cold and loud"),
    (
        "List three facts about a dog. Begin each line with -.",
        "- It barks.\n- It likes to run.\n- It guards the house.",
    ),
    ("Write a sentence about tea in capital letters.", "TEA IS BEST WHEN IT IS HOT."),
    ("Ask one question about a farm.", "Who feeds the animals?"),
    ("Write a sentence about the sky in lower case.", "the sky is blue today."),
    ("Name three things about a lake, separated by commas.", "water, fish, boats"),
    ("Write one sentence about a hat. End it with a full stop.", "The hat hangs near the door."),
    ("Write a sentence about a ship in double quotes.", '"The ship leaves at noon."'),
]


def format_rows(instruction: str) -> list[Row]:
    """The instruction about every topic."""
    return [{"question": instruction.format(topic), "solution": "valid"} for topic in TOPICS]


# Task files


def task(
    name: str, prompt: str, pattern: str, *, tokens: int, until: Sequence[str],
    fallback: str = "[invalid]", ignored: Sequence[str] = (), description: str = "",
) -> dict[str, Any]:  # fmt: skip
    """A task of lm-eval: greedy generation, a regular expression, and exact match."""
    return {
        "task": name,
        "description": description,
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": prompt,
        "doc_to_target": "{{solution}}",
        "generation_kwargs": {"until": list(until), "do_sample": False, "max_gen_toks": tokens},
        "filter_list": [
            {
                "name": "answer",
                "filter": [
                    {"function": "regex", "regex_pattern": pattern, "fallback": fallback},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": True,
                **({"regexes_to_ignore": list(ignored)} if ignored else {}),
            }
        ],
    }


QUESTION = "Question: {{question}}\nAnswer:"


def write(
    folder: Path, about: dict[str, Any], rows: Sequence[Row], shots: Sequence[Row] = ()
) -> None:
    """Writes a task's YAML file, its documents, and its examples if it has any."""
    about, splits = dict(about), {"test": rows, **({"shots": shots} if shots else {})}
    files = {split: folder / f"{about['task']}_{split}.jsonl" for split in splits}
    for split, own in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in own)
        files[split].write_text(lines, encoding="utf-8")
    about["dataset_kwargs"] = {"data_files": {split: str(path) for split, path in files.items()}}
    if shots:
        about |= {"fewshot_split": "shots", "fewshot_config": {"sampler": "first_n"}}
        about["num_fewshot"] = len(shots)
    text = yaml.safe_dump(about, sort_keys=False)
    (folder / f"{about['task']}.yaml").write_text(text, encoding="utf-8")


def write_word_problems(folder: Path, count: int, seed: int) -> None:
    """Writes the word problems; their examples are problems of their own."""
    shots = len(KINDS)  # one of each
    rows = word_problems(count + shots, seed)
    about = task(
        "word_problems", QUESTION, r"The answer is \$?(-?[0-9][0-9,]*)", tokens=64,
        until=["\n", "Question:"], ignored=[r"(?s).*The answer is "],
    )  # fmt: skip
    write(folder, about, rows[shots:], rows[:shots])


def write_open_questions(folder: Path, path: Path, count: int) -> None:
    """Writes the first open questions; the examples are the last ones of the file."""
    rows = open_questions(path)
    about = task(
        "arc_easy_open", QUESTION, r"[^\n]+", tokens=16, until=["\n", "Question:"],
        ignored=[r"^\s+|\s+$", r"^(?i:an?|the)\s+"],
    )  # fmt: skip
    write(folder, about, rows[:-SHOTS][:count], rows[-SHOTS:])


def write_formats(folder: Path) -> None:
    """Writes a task for every format, and their group.

    The regular expression of a task finds answers without the format, so the fallback for all
    others is "valid", the target of every document. The examples cannot have this target, so they
    are the description, which precedes every prompt.
    """
    shots = [f"Instruction: {asked}\nResponse: {answer}\n\n" for asked, answer in FORMAT_SHOTS]
    names = []
    for name, (instruction, pattern) in FORMATS.items():
        about = task(
            f"format_{name}", "Instruction: {{question}}\nResponse:", invalid(pattern), tokens=48,
            until=["\n\n", "Instruction:"], fallback="valid", description="".join(shots),
        )  # fmt: skip
        names.append(about["task"])
        write(folder, about, format_rows(instruction))
    group = {"group": "formats", "task": names}
    (folder / "formats.yaml").write_text(yaml.safe_dump(group, sort_keys=False), encoding="utf-8")


def invalid(pattern: str) -> str:
    """A regular expression that finds an empty text in answers that `pattern` does not match."""
    return rf"(?s)\A(?!\s*(?:{pattern})\s*\Z)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the tasks' files go")
    parser.add_argument("--data", type=Path, help="folder with arc_easy.jsonl")
    parser.add_argument("--documents", type=int, default=240, help="documents of a task")
    parser.add_argument("--seed", type=int, default=0, help="seed of the word problems")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_word_problems(folder, arguments.documents, arguments.seed)
    if arguments.data:
        path = arguments.data / "arc_easy.jsonl"
        if not path.is_file():
            parser.error(f"{path} is not there")
        write_open_questions(folder, path, arguments.documents)
    write_formats(folder)
    for path in sorted(folder.glob("*.yaml")):
        print(path)


if __name__ == "__main__":
    main()
