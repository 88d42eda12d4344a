"""experiments/answers.py against direct computations."""

import pytest
import torch

from tests.commands import load_script
from tests.conftest import pico


@pytest.fixture(scope="module")
def answers():
    return load_script("answers")


class CharTokenizer:
    """A tokenizer of single characters."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(letter) % 64 for letter in text]


def test_prompts_have_the_format_of_the_local_tasks(answers):
    arc = {"question": "Why?", "choices": ["so", "no"], "answer": 1}
    assert answers.parse_question(arc) == ("Question: Why?\nAnswer:", [" so", " no"], 1)
    piqa = {"goal": "sit", "sol1": "a chair", "sol2": "a pin", "label": 0}
    assert answers.parse_question(piqa) == ("Question: sit\nAnswer:", [" a chair", " a pin"], 0)


def test_batched_scores_equal_separate_forward_passes(answers):
    model, tokenizer = pico("llama_mha").eval(), CharTokenizer()
    task = [("Why is it?", [" so", " because it is"], 1), ("What?", [" a", " b", " see"], 0)]
    losses, hits = answers.scores(model, tokenizer, task)
    for (prompt, choices, right), loss, hit in zip(task, losses, hits, strict=True):
        found = []
        for choice in choices:
            ids = torch.tensor([tokenizer.encode(prompt + choice, add_special_tokens=False)])
            logs = model(input_ids=ids).logits[0].detach().log_softmax(-1)
            places = range(len(prompt) - 1, ids.shape[1] - 1)
            found.append(sum(logs[i, ids[0, i + 1]].item() for i in places))
        expected = -torch.tensor(found).log_softmax(0)[right]
        assert float(loss) == pytest.approx(float(expected), abs=1e-3)
        assert bool(hit) == (max(found) == found[right])


def test_paired_difference_weights_tasks_equally(answers):
    found, base = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 1.0])
    assert answers.paired([found, base], [base, base]) == "+0.667 (0.167)"
