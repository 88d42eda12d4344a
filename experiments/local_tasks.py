r"""ARC-easy and PIQA from local files, in the format of lm-eval's own tasks, without the hub.

    python experiments/local_tasks.py DATA FOLDER
    python run.py eval=zero_shot eval.zero_shot.include_path=FOLDER \
        eval.zero_shot.tasks=[arc_easy_local,piqa_local]

DATA holds arc_easy.jsonl (question, choices, answer) and piqa.jsonl (goal, sol1, sol2, label).
"""

import argparse
from pathlib import Path

TASK = """task: {name}_local
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{{question}}}}}\\nAnswer:"
doc_to_target: "{{{{{answer}}}}}"
doc_to_choice: "{{{{{choices}}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
FIELDS = {
    "arc_easy": {"question": "question", "answer": "answer", "choices": "choices"},
    "piqa": {"question": "goal", "answer": "label", "choices": "[sol1, sol2]"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with arc_easy.jsonl and piqa.jsonl")
    parser.add_argument("folder", type=Path, help="where the tasks' YAML files go")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, fields in FIELDS.items():
        data = (arguments.data / f"{name}.jsonl").resolve()
        if not data.is_file():
            parser.error(f"{data} is not there")
        path = arguments.folder / f"{name}_local.yaml"
        path.write_text(TASK.format(name=name, data=data, **fields))
        print(path)


if __name__ == "__main__":
    main()
