"""Generation tasks from local files: the generator, the checks of formats, and lm-eval's scores."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from come.evaluate.generation import Generation
from come.evaluate.paired import mean_difference, paired_difference
from come.evaluate.tasks import load_tasks
from come.evaluate.zero_shot import zero_shot
from come.models.loading import load_model
from tests.commands import ROOT, load_script
from tests.jobs import run_job
from tests.test_zero_shot import PACKAGES

QUESTIONS = [("What is {} made of?", "a stone"), ("Where does {} sleep?", "in water")]


@pytest.fixture(scope="module")
def script():
    return load_script("generation_tasks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tasks, written by the command, with twelve open questions."""
    data, tasks = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": text.format(f"thing {i}"), "choices": ["no", answer], "answer": 1}
        for i in range(8)
        for text, answer in QUESTIONS
    ]
    rows += [{"question": "Which of the following sinks?", "choices": ["a", "b"], "answer": 0}]
    rows += [{"question": "Why?", "choices": ["It is a long answer.", "b"], "answer": 0}]
    (data / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [sys.executable, str(ROOT / "experiments" / "generation_tasks.py"), str(tasks)]
    words += ["--data", str(data), "--documents", "30"]
    subprocess.run(words, check=True, capture_output=True)
    return tasks


@pytest.fixture
def answered(folder, pico_folder, monkeypatch, tmp_path):
    """Runs tasks on a model that gives the answers of a function of the prompt."""
    monkeypatch.setattr(PACKAGES, str)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    from lm_eval.models.huggingface import HFLM

    def run(names, answer, limit=None):
        prompts = []

        def generate(self, requests, disable_tqdm=False):
            prompts.extend(request.args[0] for request in requests)
            return [answer(request.args[0]) for request in requests]

        monkeypatch.setattr(HFLM, "generate_until", generate)
        tasks = load_tasks(
            names, include_path=str(folder), limit=limit, batch_size=4, evaluation="generation"
        )
        return zero_shot(*load_model(pico_folder), tasks), prompts

    return run


def solve(question):
    """The answer of a word problem, from the numbers and words of its text."""
    a, b, *rest = map(int, re.findall(r"\d+", question))
    if "dollars" in question:
        return a - b * rest[0]
    if "loses" in question:
        return a + b - rest[0]
    signs = {"finds": a + b, "gives": a - b, "boxes": a * b, "equally": a / b}
    (answer,) = (value for word, value in signs.items() if word in question)
    return answer


def test_word_problems_are_right_and_reproducible(script):
    rows = script.word_problems(200, seed=3)
    assert rows == script.word_problems(200, seed=3)
    assert rows[:50] == script.word_problems(50, seed=3)
    assert rows != script.word_problems(200, seed=4)
    assert len({row["question"] for row in rows}) == 200
    for row in rows:
        assert row["answer"] == solve(row["question"]) >= 0
        *steps, last = row["solution"].split(". ")
        assert last == f"The answer is {row['answer']}."
        for step in steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right), step
        assert int(steps[-1].split(" = ")[1]) == row["answer"]


def test_examples_are_not_among_the_documents(folder):
    for name in ("word_problems", "arc_easy_open"):
        documents, shots = (
            [json.loads(line)["question"] for line in path.read_text().splitlines()]
            for path in (folder / f"{name}_test.jsonl", folder / f"{name}_shots.jsonl")
        )
        assert not set(documents) & set(shots)
        assert (len(documents), len(shots)) == {
            "word_problems": (30, 6), "arc_easy_open": (12, 4),
        }[name]  # fmt: skip


def test_tasks_run_no_code(folder):
    """The files are plain YAML, without functions."""
    for path in folder.glob("*.yaml"):
        yaml.safe_load(path.read_text())
        assert "!function" not in path.read_text()


def test_word_problems_are_scored_by_their_last_answer(answered, script):
    answers = ["{0}", "The answer is {0}.", "1 + 1 = 2. The answer is {0}", "The answer is ${0}."]
    answers += ["The answer is {1}.", "", "The answer is not {0}.", "The answer is {0}5."]

    def answer(prompt):
        *_, last = prompt.split("Question: ")
        question = last.removesuffix("\nAnswer:")
        value = int(solve(question))
        asked.append(question)
        return " " + answers[(len(asked) - 1) % 8].format(value, value + 1)

    asked = []
    found, prompts = answered(["word_problems"], answer)
    assert asked == [row["question"] for row in script.word_problems(36, 0)[6:]]
    assert all(prompt.count("The answer is") == 6 for prompt in prompts)
    metric = found["generation/word_problems"]
    assert metric.samples == [float(i % 8 in (1, 2, 3)) for i in range(30)]
    assert metric.data == "30 documents"
    assert metric.details["metric"] == "exact_match"
    assert metric.value == pytest.approx(sum(metric.samples) / 30)
    assert metric.low < metric.value < metric.high
    assert found["generation"].headline


def test_open_answers_are_normalised(answered):
    answers = [" a stone", " Stone.", "  the STONE \n", " stones", "", " an in water", " In water!"]

    def answer(prompt):
        asked.append(prompt.rpartition("Question: ")[2])
        return answers[(len(asked) - 1) // 2 % 7]

    asked = []
    found, _ = answered(["arc_easy_open"], answer)
    stone = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    water = [0.0] * 5 + [1.0]
    expected = [score for pair in zip(stone, water, strict=True) for score in pair]
    assert found["generation/arc_easy_open"].samples == expected
    assert "Which of the following" not in "".join(asked)


def words(count):
    return lambda text: len(text.split()) == count


def listed(count):
    return lambda text: (
        len(text.split("\n")) == count
        and all(line.startswith("-") and line[1:].strip() for line in text.split("\n"))
    )


def ends_once(sign):
    """Whether `sign` is the last character, and the only one that ends a sentence."""
    return lambda text: (
        text.endswith(sign) and len(text) > 1 and sum(text.count(s) for s in ".!?\n") == 1
    )


CHECKS = {
    "two_words": words(2),
    "four_words": words(4),
    "list_of_two": listed(2),
    "list_of_four": listed(4),
    "commas": lambda text: (
        len(text.split(",")) == 4 and "\n" not in text and all(p.strip() for p in text.split(","))
    ),
    "capitals": str.isupper,
    "lower_case": str.islower,
    "question": ends_once("?"),
    "full_stop": ends_once("."),
    "quotes": lambda text: (
        len(text) > 2 and text[0] == text[-1] == '"' and text.count('"') == 2 and "\n" not in text
    ),
}
ANSWERS = [
    "", "blue", "deep blue", "deep blue sea", "deep, blue, wide, cold", "so deep and blue",
    "Deep and very blue.", "It is deep. It is blue.", "IT IS DEEP.", "it is deep.", "Is it deep?",
    "Is it? Is it deep?", "- It is deep.", "- It is deep.\n- It is blue.", "- It\n- is\n- deep",
    "- a\n- b\n- c\n- d", "- a\n- b\n- c\n- d\n- e", "* a\n* b", "-a\n-b", '"It is deep."',
    '"It is deep.', '"It" is "deep"', "a,b,c,d", "a, b, c", "a, b, c, d, e", "a, b\nc, d", "5", ".",
    "?", ", a, b, c", "- -\n- -", "- \n- ", "-  \n-a", "It is deep",
    "What? It is deep.", "deep\nblue", "a, b, c, d\n", '""',
    "Straße",
]  # fmt: skip


@pytest.mark.parametrize("name", list(CHECKS))
def test_formats_are_checked_like_an_independent_program(name, folder):
    """White space around an answer does not count."""
    from lm_eval.filters.extraction import RegexFilter

    about = yaml.safe_load((folder / f"format_{name}.yaml").read_text())
    (regex, _) = about["filter_list"][0]["filter"]
    check = RegexFilter(regex["regex_pattern"], fallback=regex["fallback"])
    found = check.apply([[f" {answer}\n"] for answer in ANSWERS], [{}] * len(ANSWERS))
    accepted = [answer for answer, (text,) in zip(ANSWERS, found, strict=True) if text == "valid"]
    assert accepted == [answer for answer in ANSWERS if CHECKS[name](answer.strip())]
    assert 0 < len(accepted) < len(ANSWERS) / 2


def test_group_of_formats(answered, script):
    assert CHECKS.keys() == script.FORMATS.keys()
    found, prompts = answered(
        ["formats"], lambda prompt: " the sea?" if "the sea" in prompt else " A forest.", limit=2
    )
    right = {name for name in CHECKS if found[f"generation/format_{name}"].samples[0]}
    assert right == {"two_words", "lower_case", "question"}
    right = {name for name in CHECKS if found[f"generation/format_{name}"].samples[1]}
    assert right == {"two_words", "full_stop"}
    assert found["generation/formats"].value == found["generation"].value == 5 / 20
    shots = [f"Instruction: {asked}\nResponse: {own}\n\n" for asked, own in script.FORMAT_SHOTS]
    assert prompts[0] == (
        "".join(shots) + "Instruction: Describe the sea in exactly two words.\nResponse:"
    )


def test_examples_have_the_format_that_they_are_asked_for(script):
    """With their own counts, so that copying an example does not solve another task."""
    checks = [words(3), listed(3), str.isupper, ends_once("?"), str.islower]
    checks += [lambda text: len(text.split(",")) == 3, ends_once("."), CHECKS["quotes"]]
    for check, (_, answer) in zip(checks, script.FORMAT_SHOTS, strict=True):
        assert check(answer), answer


@pytest.mark.usefixtures("private_caches")
def test_complete_job_generates_and_pairs(folder, base, tmp_path):
    """With lm-eval's own generation, on a random model."""
    group = {"group": "two", "task": ["format_two_words", "format_capitals"]}
    (folder / "two.yaml").write_text(yaml.safe_dump(group))
    words = (
        "eval=generation", f"eval.generation.include_path={folder}", "eval.generation.limit=2",
        "eval.generation.tasks=[word_problems,two]",
    )  # fmt: skip
    result = run_job(base, tmp_path / "out", *words)
    dense, merged = (depth["metrics"] for depth in result["depths"])
    names = {"generation", "generation/word_problems", "generation/two"}
    assert dense.keys() - {name for name in dense if "format_" in name} == names
    for name in dense.keys() - {"generation", "generation/two"}:
        own, its = merged[name]["samples"], dense[name]["samples"]
        assert len(own) == len(its) == 2
        expected = paired_difference(own, its)
        relative = merged[name]["relative"]
        assert (relative["low"], relative["high"]) == (expected.low, expected.high)
    members = dense["generation"]["details"]["groups"]
    pairs = [
        [(merged[f"generation/{t}"]["samples"], dense[f"generation/{t}"]["samples"]) for t in own]
        for own in members.values()
    ]
    relative = merged["generation"]["relative"]
    assert (relative["low"], relative["high"]) == mean_difference(pairs)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| 5 | word_problems, exact_match |" in report


def test_default_tasks_need_their_folder(folder):
    with pytest.raises(ValueError, match=r"write them with python experiments/generation_tasks.py"):
        Generation().check()
    Generation(include_path=str(folder)).check()
    Generation(tasks=["gsm8k"]).check()
    with pytest.raises(ValueError, match=r"eval.generation.tasks=\[\] names no task"):
        Generation(tasks=[], include_path=str(folder)).check()
    with pytest.raises(ValueError, match=r"eval.generation.include_path=/no/folder: no such"):
        Generation(include_path="/no/folder").prepare(None)
