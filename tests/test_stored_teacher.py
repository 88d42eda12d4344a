"""Training from the teacher's stored hidden states, and which parameters train at which rate."""

import copy

import pytest
import torch

from come.distill.config import TrainConfig
from come.distill.hidden_states import states_by_layer
from come.distill.memory import training_memory
from come.distill.objectives.base import DISTILL
from come.distill.optimizers import OPTIMIZERS, make_optimizer
from come.distill.stored_states import StoredStates
from tests.conftest import LAYERS, pico
from tests.methods import decoder_layers
from tests.reference import Reference
from tests.test_distill import pair, plain_kl, run

HIDDEN = 32


def store(given, objective, ids, folder, dtype=torch.float32, **options):
    found = StoredStates(folder, ids, objective.after, HIDDEN, dtype, **options)
    found.write(given.teacher, batch=2)
    return found


def gradients(objective, *batch):
    objective.zero_grad()
    losses = objective(*batch)
    losses["loss"].backward()
    found = {name: p.grad.clone() for name, p in objective.trained.items()}
    return {key: value.item() for key, value in losses.items()}, found


@pytest.mark.parametrize("scale", [1.0, 2.0])  # of the student's own head
@pytest.mark.parametrize(("dtype", "layers"), [
    (torch.float32, "merged"), (torch.float32, "neighbours"), (torch.float32, "model"),
    (torch.bfloat16, "merged"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["logits", "come_sp"])
def test_stored_teacher_gives_loss_and_gradient_of_the_live_one(
    name, dtype, layers, scale, windows, tmp_path
):
    """To the last digit, also in half precision, in which the states are stored."""
    given = pair()
    given.student.model.to(dtype), given.teacher.model.to(dtype)
    given.student.model.get_output_embeddings().weight.data.mul_(scale)
    settings = {"layers": layers, "temperature": 2.0}
    objective = DISTILL.create_from(name, settings).objective(given)
    live, expected = gradients(objective, windows)
    states = store(given, objective, windows, tmp_path, dtype, shard_tokens=48)
    assert len(list(tmp_path.glob("states-*.bin"))) == 2  # three windows of 16 tokens, and one
    objective.release_teacher()
    assert given.teacher.device.type == "meta"
    rows = torch.arange(len(windows))
    stored, found = gradients(objective, windows, *states.read(rows))
    assert stored == live
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert any(gradient.abs().max() > 0 for gradient in found.values())


def test_stored_states_are_those_of_a_plain_float64_model(windows, tmp_path):
    given = pair()
    objective = DISTILL.create_from("come_sp", {"logit_weight": 1.0}).objective(given)
    states = store(given, objective, windows, tmp_path, shard_tokens=16)
    reference = Reference(pico("llama_gqa"), windows)
    assert objective.after == [0, 2, 4, 5]
    rows = torch.tensor([2, 0])
    for after, found in zip(objective.after, states.read(rows), strict=True):
        expected = reference.h[after + 1][rows]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert states.size == windows.numel() * 4 * HIDDEN * 4
    assert states.size == sum(p.stat().st_size for p in tmp_path.glob("states-*.bin"))


def test_gradient_of_the_logit_kl_equals_float64_autograd(windows):
    given = pair()
    objective = DISTILL.create_from("logits", {"layers": "model", "temperature": 3.0}).objective(
        given
    )
    _, found = gradients(objective, windows)
    student, teacher = (
        copy.deepcopy(each.model).double().requires_grad_(True)
        for each in (given.student, given.teacher)
    )
    own, other = (m(windows, use_cache=False).logits / 3 for m in (student, teacher))
    shares = other.detach().softmax(-1)
    (shares * (shares.log() - own.log_softmax(-1))).sum(-1).mean().backward()
    for name, parameter in student.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            found[f"student.{name}"].double(), parameter.grad, rtol=1e-3, atol=1e-4 * scale
        )
    with torch.no_grad():
        assert float(objective(windows)["loss"]) == pytest.approx(
            plain_kl(other.detach(), own.detach(), 1.0), rel=1e-4
        )


def test_interrupted_pass_continues_with_the_missing_shards(windows, tmp_path, monkeypatch):
    given = pair()
    objective = DISTILL.create_from("logits").objective(given)
    whole = store(given, objective, windows, tmp_path / "whole", shard_tokens=16)
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return states_by_layer(*args, **kwargs)

    monkeypatch.setattr("come.distill.stored_states.states_by_layer", counted)
    with pytest.raises(KeyboardInterrupt):
        store(given, objective, windows, tmp_path / "cut", shard_tokens=16)
    cut = StoredStates(tmp_path / "cut", windows, objective.after, HIDDEN, torch.float32, 16)
    assert cut.missing == list(range(2, len(windows)))
    assert not list((tmp_path / "cut").glob("*.partial"))
    cut.write(given.teacher, batch=2, rank=1, processes=2)
    assert [number % 2 for number in cut.missing] == [0] * len(cut.missing)
    cut.write(given.teacher, batch=2)
    assert not cut.missing
    assert len(calls) == 3 + len(windows) - 2
    rows = torch.arange(len(windows))
    assert all(map(torch.equal, whole.read(rows), cut.read(rows)))


def test_full_disk_is_refused_before_the_pass(windows, tmp_path, monkeypatch):
    given = pair()
    objective = DISTILL.create_from("logits").objective(given)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Disk", (), {"free": 100})())
    with pytest.raises(ValueError, match=r"distill.teacher=stored: the teacher's hidden states"):
        store(given, objective, windows, tmp_path)


@pytest.mark.parametrize(
    ("layers", "train", "expected"),
    [
        ("merged", "layers", {1: 12, 2: 12}),
        ("neighbours", "norms", {0: 2, 1: 2, 2: 2, 3: 2}),
        ("all", "norms_outputs", {0: 4, 1: 4, 2: 4, 3: 4}),
        ("all", "lora", {0: 14, 1: 14, 2: 14, 3: 14}),
    ],
)
def test_layers_and_their_parameters_that_train(layers, train, expected):
    method = DISTILL.create_from("logits", {"layers": layers, "train": train})
    objective = method.objective(pair())
    found = {}
    for name in objective.trained:
        index = int(name.split("layers.")[1].split(".")[0])
        found[index] = found.get(index, 0) + 1
    every = len(dict(decoder_layers(pico("llama_gqa"))[0].named_parameters()))
    assert found == {k: every if train == "layers" else v for k, v in expected.items()}


def test_whole_model_trains():
    objective = DISTILL.create_from("logits", {"layers": "model"}).objective(pair())
    assert objective.trained.keys() == dict(objective.named_parameters()).keys()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_states_of_optimisers_and_rates_of_layers(optimizer, windows, tmp_path):
    """Against the states that torch makes, without the counters of steps."""
    method = DISTILL.create_from("logits", {"layers": "model", "layer_decay": 0.5})
    objective = method.objective(pair(groups=((0, 1),)))
    config = TrainConfig(steps=1, optimizer=optimizer, learning_rate=1e-3)
    made = make_optimizer(objective.trained, objective.rates, config)
    objective(windows)["loss"].backward()
    made.step()
    states = [
        tensor.numel() * tensor.element_size()
        for state in made.state.values()
        for key, tensor in state.items()
        if key != "step"
    ]
    assert training_memory(objective, optimizer=optimizer).optimizer == sum(states)
    rates = {
        name.removeprefix("student."): group["rate"]
        for group in made.param_groups
        for parameter in group["params"]
        for name, own in objective.trained.items()
        if own is parameter
    }
    assert rates["model.layers.0.mlp.down_proj.weight"] == 1.0
    assert rates["model.layers.3.mlp.down_proj.weight"] == 0.5**3
    assert rates["model.embed_tokens.weight"] == 0.5
    assert rates["model.norm.weight"] == rates["lm_head.weight"] == 0.5 ** (LAYERS - 1)


@pytest.mark.parametrize("optimizer", ["adafactor", "sgd"])
def test_optimisers_lower_the_loss_and_resume(optimizer, windows, tmp_path):
    curves = []
    for folder, stops in (("whole", [6]), ("cut", [3, 6])):
        for steps in stops:
            objective = DISTILL.create_from("come_sp", {"layer_decay": 0.5}).objective(pair())
            rate = 0.1 if optimizer == "sgd" else 1e-2
            try:
                progress = run(
                    objective, Stop(windows[:4], 2 * steps), windows[:4], tmp_path / folder,
                    optimizer=optimizer, learning_rate=rate, checkpoint_every=3,
                )  # fmt: skip
            except InterruptedError:
                continue
        curves.append(progress.curve)
    assert curves[0] == curves[1]
    assert progress.best_loss < progress.validation[0]["loss"]


class Stop:
    """Windows that can be read a limited number of times."""

    def __init__(self, windows, reads):
        self.windows, self.left = windows, reads

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, rows):
        if not self.left:
            raise InterruptedError
        self.left -= 1
        return self.windows[rows]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "near"}, "distill.layers='near': allowed are merged, neighbours, all, model"),
        ({"layers": "model", "train": "norms"}, "distill.layers=model trains all weights, and dis"),
    ],
)
def test_invalid_layers(settings, message):
    with pytest.raises(ValueError, match=message):
        DISTILL.create_from("logits", settings)
