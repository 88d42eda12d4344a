"""The Weights & Biases workspace and report of a grid, as code.

    pip install -e .[dashboard]
    python experiments/dashboard.py PROJECT [--entity NAME] [--group GRID]         # prints them
    python experiments/dashboard.py PROJECT --entity NAME [--group GRID] --save    # creates them

Only --save uses the network; it prints two links. The keys are those of metrics.jsonl. Upload the
offline runs of a grid first: wandb sync runs/*/wandb/offline-run-*
"""

import argparse
import json
from dataclasses import asdict, is_dataclass

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces


def sections() -> dict[str, list]:
    """Panels by section; every call creates new objects."""
    line, scatter, bar = reports.LinePlot, reports.ScatterPlot, reports.BarPlot
    size = "eval/parameters"
    return {
        "Quality": [
            scatter(
                title="perplexity against size",
                x=size,
                y="eval/perplexity_dense_ratio_value",
                log_y=True,
            ),
            bar(title="perplexity, x dense", metrics=["eval/perplexity_dense_ratio_value"]),
            scatter(
                title="accuracy minus dense", x=size, y="eval/zero_shot_dense_difference_value"
            ),
            bar(title="prompt speed, x dense", metrics=["eval/speed/prompt_dense_ratio_value"]),
        ],
        "Merge, step by step": [
            line(title="score of the span", x="merge/step", y=["merge/score"]),
            line(title="layers", x="merge/step", y=["merge/layers"]),
            line(title="share of the first layer", x="merge/step", y=["merge/share_first"]),
            line(title="block influence", x="layer_idx", y=["layer/bi"]),
        ],
        "Distillation": [
            line(title="training loss", x="distill/step", y=["distill/loss"], log_y=True),
            line(title="validation", x="distill/step", y=["distill/validation_loss"], log_y=True),
        ],
        "Pictures": [reports.MediaBrowser(title="puzzle", media_keys=["figures/puzzle"])],
    }


def workspace(entity: str, project: str, group: str | None) -> workspaces.Workspace:
    runs = workspaces.RunsetSettings(query=group or "")
    parts = [workspaces.Section(name=n, panels=p, is_open=True) for n, p in sections().items()]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=group or "all runs",
        sections=parts,
        runset_settings=runs,
    )


def report(entity: str, project: str, group: str | None) -> reports.Report:
    blocks: list = [reports.TableOfContents()]
    for name, panels in sections().items():
        runs = reports.Runset(entity=entity, project=project, query=group or "")
        blocks += [reports.H2(name), reports.PanelGrid(runsets=[runs], panels=panels)]
    return reports.Report(
        project=project,
        entity=entity,
        title=f"Layer merging: {group or project}",
        description="Perplexity and accuracy against size, step by step, with the puzzles.",
        blocks=blocks,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("project")
    parser.add_argument("--entity", default="")
    parser.add_argument("--group", help="a grid: only runs with its name")
    parser.add_argument("--save", action="store_true", help="create them over the network")
    arguments = parser.parse_args()
    scope = (arguments.entity, arguments.project, arguments.group)
    for item in (workspace(*scope), report(*scope)):
        if arguments.save:
            item.save()
            print(item.url)
        else:
            print(json.dumps(_plain(item), indent=1))


def _plain(value: object) -> object:
    """Converts dataclasses to dictionaries and leaves out empty values."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {"": type(value).__name__} | asdict(value)
    if isinstance(value, dict):
        kept = {str(k): _plain(v) for k, v in value.items()}
        return {k: v for k, v in kept.items() if v not in (None, "", [], {})}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, bool | int | float | None) else str(value)


if __name__ == "__main__":
    main()
