"""One job, stage by stage: prepare, merge, evaluate, report; each can be resumed."""

from come.pipeline.run import run

__all__ = ["run"]
