"""Distillation: losses and gradients against plain float64, trained parameters, checkpoints."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from come.distill.config import TrainConfig
from come.distill.hidden_states import states_by_layer
from come.distill.layerwise import teacher_boundaries, train_layerwise
from come.distill.losses import hidden_loss, kl, logit_kl, mse, task_loss
from come.distill.objectives.base import DISTILL, Pair
from come.distill.trainer import train
from come.merge.loop import compress
from come.models.adapter import ModelAdapter
from come.stream.boundaries import make_store
from tests.commands import ROOT
from tests.conftest import LAYERS, pico
from tests.methods import SELECTED_FAMILIES, decoder_layers, loss, paper, same_weights
from tests.reference import Reference

WHOLE = ["come_sp", "logits", "lora"]
GROUPS = ((1, 2), (3, 4))  # the merged layers are 1 and 2 of four


def pair(family="llama_gqa", groups=GROUPS):
    student, teacher = pico(family), pico(family)
    windows = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(1))
    method = paper(groups=groups)
    depth = LAYERS + len(groups) - sum(map(len, groups))
    plan = compress(student, windows, method, target_layers=depth, progress=False)
    return Pair(ModelAdapter(student), ModelAdapter(teacher.requires_grad_(False)), plan.history)


def run(objective, windows, held_out, folder, job="job", **train_config):
    settings = {"steps": 6, "batch_size": 2, "micro_batch": 1, "validate_every": 3} | train_config
    return train(
        objective,
        lambda rows: (windows[rows],),
        len(windows),
        lambda rows: (held_out[rows],),
        len(held_out),
        TrainConfig(**settings),
        accelerator=Accelerator(cpu=True),
        folder=folder,
        job=job,
        progress_bar=False,
    )


def plain_kl(teacher, student, temperature):
    p, q = ((x.double() / temperature).exp() for x in (teacher, student))
    p, q = p / p.sum(dim=-1, keepdim=True), q / q.sum(dim=-1, keepdim=True)
    return float((p * (p / q).log()).sum(dim=-1).mean())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_losses_equal_their_formulas(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 8, generator=generator)
    assert float(kl(student, teacher, temperature)) == pytest.approx(
        plain_kl(teacher, student, temperature), rel=1e-5
    )
    gaps = [
        float((s - t).square().sum() / t.square().sum())
        for s, t in zip(student.reshape(-1, 8), teacher.reshape(-1, 8))
    ]
    assert float(mse(student, teacher)) == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)
    angles = [
        1 - float(s @ t / s.norm() / t.norm())
        for s, t in zip(student.reshape(-1, 8), teacher.reshape(-1, 8))
    ]
    weights = {"kl": 0.5, "mse": 2.0, "cosine": 1.0}
    mixed = hidden_loss("mix", weights, temperature)(student, teacher)
    expected = 0.5 * plain_kl(teacher, student, temperature) + 2 * sum(gaps) / len(gaps)
    assert float(mixed) == pytest.approx(expected + sum(angles) / len(angles), rel=1e-5)


def test_logit_kl_and_task_loss_equal_plain_logits(windows, monkeypatch):
    """Also when they are computed in blocks."""
    monkeypatch.setattr("come.distill.losses._block", lambda head, device: 7)
    student, teacher = pico("llama_gqa"), pico("llama_gqa")
    decoder_layers(student)[2].mlp.down_proj.weight.data.mul_(2)
    own, other = ModelAdapter(student), ModelAdapter(teacher)
    ends = [
        a.final_norm(states_by_layer(a, windows, LAYERS - 1, {LAYERS - 1})[LAYERS - 1])
        for a in (own, other)
    ]
    logits = [m.double()(windows, use_cache=False).logits for m in (student, teacher)]
    student.float(), teacher.float()
    found = logit_kl(own.head, ends[0], other.head, ends[1], 2.0)
    assert float(found) == pytest.approx(plain_kl(logits[1], logits[0], 2.0), rel=1e-3)
    expected = float(loss(copy.deepcopy(student).double(), windows))
    assert float(task_loss(own.head, ends[0], windows)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", SELECTED_FAMILIES)
def test_come_sp_gradient_is_that_of_the_summed_layer_losses(family, recompute, windows):
    """Against float64 autograd over complete models."""
    given = pair(family)
    method = DISTILL.create_from(
        "come_sp", {"loss": "kl", "temperature": 2.0, "gradient_checkpointing": recompute}
    )
    objective = method.objective(given)
    found = objective(windows)
    found["loss"].backward()

    student = copy.deepcopy(given.student.model).double().requires_grad_(True)
    student.zero_grad()
    kept = {}
    for index, layer in enumerate(decoder_layers(student)):
        layer.register_forward_hook(lambda m, a, out, i=index: kept.__setitem__(i, out))
    student(windows, use_cache=False)
    teacher = Reference(pico(family), windows)
    total = sum(
        kl(kept[k].double(), teacher.h[given.history[k][-1] + 1], 2.0) for k in given.merged
    )
    total.backward()
    assert float(found["loss"]) == pytest.approx(float(total), rel=1e-3)
    assert {k for k in found if k.startswith("layer")} == {"layer_1", "layer_2"}
    for k in given.merged:
        ours, plain = (
            dict(decoder_layers(m)[k].named_parameters()) for m in (given.student.model, student)
        )
        for name, parameter in ours.items():
            expected = plain[name].grad.float()
            scale = float(expected.abs().max())
            torch.testing.assert_close(
                parameter.grad, expected, rtol=2e-2, atol=1e-3 * scale + 1e-9
            )


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_teacher_boundaries_equal_its_hidden_states(store, windows, tmp_path):
    given = pair()
    shape = (*windows.shape, 32)
    keep = make_store(store, shape, torch.float32, tmp_path)
    slots = teacher_boundaries(given, windows, keep, batch=2)
    reference = Reference(pico("llama_gqa"), windows)
    assert sorted(slots) == [1, 3, 5]
    for boundary, number in slots.items():
        torch.testing.assert_close(
            keep[number].double(), reference.h[boundary], rtol=1e-4, atol=1e-5
        )
    keep.close()


@pytest.mark.parametrize("family", SELECTED_FAMILIES)
@pytest.mark.parametrize("name", WHOLE)
def test_training_lowers_the_loss_and_gives_an_ordinary_model(name, family, windows, tmp_path):
    given = pair(family)
    before = copy.deepcopy(given.student.model)
    method = DISTILL.create_from(name)
    objective = method.objective(given)
    same_text = windows[:4], windows[:4]  # random tokens do not generalise
    progress = run(objective, *same_text, tmp_path, steps=8, learning_rate=3e-3)
    first, last = progress.validation[0], progress.validation[-1]
    assert progress.best_loss < first["loss"]
    assert progress.curve[-1]["loss"] < progress.curve[0]["loss"]
    assert math.isfinite(last["nll"])
    trained = objective(windows)
    method.write_back(given)
    model = given.student.model
    assert model.state_dict().keys() == before.state_dict().keys()
    assert not same_weights(model, before)
    assert float(objective(windows)["loss"]) == pytest.approx(float(trained["loss"]), rel=1e-4)
    if name != "lora":  # only merged layers change
        for i in set(range(len(given.history))) - set(given.merged):
            assert same_weights(decoder_layers(model)[i], decoder_layers(before)[i])
    model.save_pretrained(tmp_path / "model")
    type(model).from_pretrained(tmp_path / "model")


def test_come_mp_trains_each_layer_separately(windows, tmp_path):
    given = pair()
    before = copy.deepcopy(given.student.model)
    method = DISTILL.create_from("come_mp", {"loss": "mse"})
    logged = []
    found, memory = train_layerwise(
        method,
        given,
        windows[:4],
        windows[:4],
        TrainConfig(steps=5, batch_size=2, micro_batch=2, learning_rate=3e-3),
        accelerator=Accelerator(cpu=True),
        folder=tmp_path,
        job="job",
        store="memory",
        workers=1,
        log=lambda layer, losses: logged.append(layer),
    )
    assert sorted(found) == given.merged == sorted(set(logged))
    model = given.student.model
    for index, layer in enumerate(decoder_layers(model)):
        assert same_weights(layer, decoder_layers(before)[index]) == (index not in given.merged)
    for progress in found.values():
        assert progress.validation[-1]["loss"] < progress.validation[0]["loss"]
    layer_size = sum(p.numel() for p in decoder_layers(model)[0].parameters())
    assert memory.parameters == layer_size
    assert memory.optimizer == 2 * 4 * layer_size


@pytest.mark.slow
def test_number_of_workers_does_not_change_come_mp(windows, tmp_path):
    models = []
    for workers in (1, 2):
        given = pair()
        train_layerwise(
            DISTILL.create_from("come_mp"),
            given,
            windows[:4],
            windows[4:],
            TrainConfig(steps=3, batch_size=2, micro_batch=2, learning_rate=1e-3),
            accelerator=Accelerator(cpu=True),
            folder=tmp_path / str(workers),
            job="job",
            store="disk",
            workers=workers,
            log=lambda layer, losses: None,
        )
        models.append(given.student.model)
    assert same_weights(*models)


def test_validation_loss_is_the_mean_over_windows(windows, tmp_path):
    objective = DISTILL.create_from("come_sp").objective(pair())
    with torch.no_grad():
        each = [float(objective.validate(window[None])["loss"]) for window in windows[:3]]
    progress = run(objective, windows[3:], windows[:3], tmp_path, steps=1, micro_batch=2)
    assert progress.validation[0]["loss"] == pytest.approx(sum(each) / 3, rel=1e-4)


def test_resumed_training_equals_an_uninterrupted_one(windows, tmp_path):
    whole = DISTILL.create_from("come_sp").objective(pair())
    expected = run(whole, windows[:4], windows[4:], tmp_path / "whole", checkpoint_every=2)

    class InterruptError(Exception):
        pass

    def stop(rows, seen=[]):  # noqa: B006
        seen.append(rows)
        if len(seen) == 10:  # in the fifth step; a step has two micro-batches
            raise InterruptError
        return (windows[:4][rows],)

    train_config = TrainConfig(
        steps=6, batch_size=2, micro_batch=1, validate_every=3, checkpoint_every=2
    )
    arguments = (4, lambda rows: (windows[4:][rows],), 1, train_config)
    shared = {
        "accelerator": Accelerator(cpu=True),
        "folder": tmp_path / "cut",
        "job": "job",
        "progress_bar": False,
    }
    with pytest.raises(InterruptError):
        train(DISTILL.create_from("come_sp").objective(pair()), stop, *arguments, **shared)
    resumed, read = DISTILL.create_from("come_sp").objective(pair()), []

    def rest(rows):
        read.append(rows)
        return (windows[:4][rows],)

    found = train(resumed, rest, *arguments, **shared)
    assert len(read) == 4  # the fifth and the sixth step
    assert [p.name for p in (tmp_path / "whole").glob("step-*")] == ["step-0000006-end.safetensors"]
    assert found.curve == expected.curve
    assert found.validation == expected.validation
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_training_state_of_another_job_is_ignored(windows, tmp_path):
    curves = []
    for job, rate in (("one", 1e-4), ("two", 1e-3), ("two", 1e-2)):
        objective = DISTILL.create_from("come_sp").objective(pair())
        progress = run(objective, windows[:4], windows[4:], tmp_path, job, learning_rate=rate)
        curves.append(progress.curve)
    assert curves[0] != curves[1]
    assert curves[1] == curves[2]  # already finished


def test_non_finite_loss_stops_the_training(windows, tmp_path):
    given = pair()
    decoder_layers(given.student.model)[1].mlp.down_proj.weight.data.mul_(1e38)
    objective = DISTILL.create_from("come_sp").objective(given)
    with pytest.raises(ValueError, match="the validation loss is not finite after step 0; try"):
        run(objective, windows[:4], windows[4:], tmp_path)
    objective.validate = lambda ids: {"loss": torch.tensor(1.0)}
    with pytest.raises(ValueError, match="the loss is not finite at step 1; lower distill.learn"):
        run(objective, windows[:4], windows[4:], tmp_path)


def test_adapter_initialisation_is_seeded():
    weights = []
    for draws, seed in ((1, 0), (7, 0), (7, 1)):
        given = pair()
        torch.rand(draws)
        objective = DISTILL.create_from("lora", {"seed": seed}).objective(given)
        weights.append([p.clone() for p in objective.parameters()])
    assert all(map(torch.equal, weights[0], weights[1]))
    assert not all(map(torch.equal, weights[1], weights[2]))


def test_student_with_changed_early_layers_uses_its_own_hidden_states(windows):
    given = pair()
    decoder_layers(given.student.model)[0].mlp.down_proj.weight.data.mul_(1.5)
    found = DISTILL.create_from("logits").objective(given).validate(windows)
    expected = float(loss(given.student.model, windows))
    assert float(found["nll"]) == pytest.approx(expected, rel=1e-5)


def test_early_stopping_restores_the_best_weights(windows, tmp_path):
    """With a learning rate that is far too high, no step improves on the start."""
    given = pair()
    before = copy.deepcopy(given.student.model)
    objective = DISTILL.create_from("come_sp").objective(given)
    train_config = {"steps": 40, "learning_rate": 1.0, "validate_every": 2, "patience": 3}
    progress = run(objective, windows[:4], windows[4:], tmp_path, **train_config)
    assert progress.best_step == 0
    assert progress.step == 6
    assert same_weights(given.student.model, before)


def test_micro_batch_size_does_not_change_the_losses(windows, tmp_path):
    curves = []
    for size in (1, 2, 4):
        objective = DISTILL.create_from("come_sp").objective(pair())
        progress = run(
            objective, windows[:4], windows[4:], tmp_path / str(size), batch_size=4,
            micro_batch=size,
        )  # fmt: skip
        curves.append([row["loss"] for row in progress.curve])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-4)


def test_every_window_is_used_once_per_epoch():
    train_config = TrainConfig(steps=10, batch_size=3, seed=5)
    rows = torch.cat([train_config.rows(step, 6) for step in range(10)]).tolist()
    for epoch in range(5):
        assert sorted(rows[6 * epoch : 6 * epoch + 6]) == list(range(6))
    assert rows[:6] != rows[6:12]


def test_learning_rate_warmup_and_decay():
    train_config = TrainConfig(steps=100, learning_rate=2.0, warmup=0.1)
    rates = [train_config.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0, abs=0.02)
    assert rates[99] < 0.01


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("come_sp", {"loss": "kul"}, "distill.loss='kul': allowed are kl, mse, cosine, mix"),
        ("come_sp", {"loss": "mix"}, r"distill.loss_weights=\{\}: weights >= 0"),
        ("come_sp", {"temperature": 0.0}, "distill.temperature=0.0: must be above 0"),
        ("come_sp", {"logit_weight": -1.0}, "distill.logit_weight=-1.0: must be at least 0"),
        ("come_sp", {"train": "bias"}, "distill.train='bias': allowed are layers, norms, outputs"),
        ("come_mp", {"train": "lora"}, "distill=come_mp trains layers, norms, outputs or norms_o"),
        ("lora", {"lora_rank": 0}, "distill.lora_rank=0: must be a whole number above 0, or auto"),
        ("come_sp", {"lora_rank": "all"}, "distill.lora_rank=all: must be a whole number"),
        ("come_ps", {}, "unknown distillation; did you mean 'come_sp'"),
    ],
)
def test_invalid_settings(name, settings, message):
    with pytest.raises(ValueError, match=message):
        DISTILL.create_from(name, settings)


def test_fsdp_config_shards_the_model():
    config = load_config_from_file(str(ROOT / "experiments" / "distill" / "fsdp.yaml"))
    assert config.distributed_type is DistributedType.FSDP
    assert not config.use_cpu


def test_logit_loss_and_its_weight(windows):
    given = pair()
    found = DISTILL.create_from("logits", {"temperature": 2.0}).objective(given)(windows)
    both = DISTILL.create_from("come_sp", {"logit_weight": 3.0}).objective(given)(windows)
    layers = sum(float(value) for key, value in both.items() if key.startswith("layer_"))
    assert float(both["loss"]) == pytest.approx(layers + 3 * float(both["logits"]), rel=1e-5)
    teacher, student = (
        adapter.model.double()(windows, use_cache=False).logits
        for adapter in (given.teacher, given.student)
    )
    assert float(found["loss"]) == pytest.approx(plain_kl(teacher, student, 2.0), rel=1e-3)


def test_mse_does_not_depend_on_the_scale():
    student, teacher = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    small = float(mse(student / 1e3, teacher / 1e3))
    assert small == pytest.approx(float(mse(student, teacher)))
