"""Training of merged layers one by one: the spans of more than two layers, and several workers."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from accelerate import Accelerator

from come.distill import layerwise
from come.distill.config import TrainConfig
from come.distill.objectives.base import DISTILL
from tests.methods import same_weights
from tests.test_distill import pair


def trained(windows, folder, workers, log=lambda layer, losses: None):
    """The student whose merged layers replace three layers and two, after two steps."""
    given = pair(groups=((0, 1, 2), (4, 5)))
    layerwise.train_layerwise(
        DISTILL.create_from("come_mp"),
        given,
        windows[:4],
        windows[4:],
        TrainConfig(steps=2, batch_size=2, micro_batch=2, learning_rate=1e-3),
        accelerator=Accelerator(cpu=True),
        folder=folder,
        job="job",
        store="memory",
        workers=workers,
        log=log,
    )
    return given.student.model


def test_workers_share_the_cores_and_train_every_layer_once(windows, tmp_path, monkeypatch):
    """The workers are threads of this process; a slow test starts processes."""
    begun, cores, made, steps = [], [], [], []
    train, make = layerwise.train, layerwise.make_accelerator

    def watched(*arguments, **others):
        begun.append(threading.current_thread() is threading.main_thread())
        return train(*arguments, **others)

    monkeypatch.setattr(layerwise, "train", watched)
    expected = trained(windows, tmp_path / "one", 1)
    assert begun == [True, True]
    monkeypatch.setattr(
        layerwise, "ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(1)
    )
    monkeypatch.setattr(layerwise, "_end_with_parent", lambda: None)
    monkeypatch.setattr(
        layerwise, "make_accelerator", lambda *given: made.append(given) or make(*given)
    )
    monkeypatch.setattr(torch, "set_num_threads", cores.append)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    found = trained(windows, tmp_path / "two", 2, lambda layer, losses: steps.append(layer))
    assert same_weights(found, expected)
    assert cores == [3, 3]
    assert made == [("cpu", "float32")] * 2
    assert steps == [0, 0, 2, 2]
    assert begun[2:] == [False, False, True, True]  # trained by the workers, then read
