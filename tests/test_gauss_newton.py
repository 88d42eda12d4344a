"""Gauss-Newton steps on the input maps of the FFN, against plain float64."""

import copy
import math

import pytest
import torch
from torch import nn

from come.linalg import conjugate_gradients as module
from come.linalg.conjugate_gradients import conjugate_gradients
from come.merge.apply import apply
from come.merge.input_map import FLOOR, InputMap
from come.merge.loop import compress
from come.merge.refit.gauss_newton import GaussNewton
from come.merge.refit.ridge import Ridge
from come.models.sublayers import activation_derivative, states_after
from tests.conftest import LAYERS, pico
from tests.methods import paper, same_weights, sublayer_of
from tests.reference import Reference

FAMILIES = ["llama_gqa", "llama_bias", "qwen3_gqa", "opt"]


def activations(layer, name, weight, read):
    """FFN activations of a LLaMA or OPT layer with another weight for one input map."""
    if hasattr(layer, "fc1"):
        return torch.relu(nn.functional.linear(read, weight, layer.fc1.bias))
    maps = {"gate": layer.mlp.gate_proj, "up": layer.mlp.up_proj}
    gate, up = (
        nn.functional.linear(read, weight if kind in name else linear.weight, linear.bias)
        for kind, linear in maps.items()
    )
    return nn.functional.silu(gate) * up


class PlainProblem:
    """The layer and its reconstruction targets in float64, with all tokens in one batch."""

    def __init__(self, targets, layer):
        stream, layout = targets.stream, targets.layout
        attention, ffn = layout.sublayer("attention"), layout.sublayer("ffn")
        states, target, weights = (
            torch.cat(parts)
            for parts in zip(*((b.states, b.output, b.weights) for b in targets), strict=True)
        )
        self.post_attention = torch.cat(
            [
                states_after(
                    layer,
                    layout,
                    attention,
                    states[rows],
                    stream.keywords(len(states[rows]), targets.first),
                )
                for rows in stream.batches
            ]
        )
        self.layer = layer.double()
        post_attention = self.post_attention.flatten(0, 1).double()
        self.read = layer.get_submodule(ffn.norm.module)(post_attention).detach()
        self.output = layer.get_submodule(ffn.output)
        self.residual_target = target.flatten(0, 1).double() - post_attention
        self.root = weights.double().sqrt()[:, None]

    @torch.no_grad()
    def error(self, name, weight):
        output = self.output(activations(self.layer, name, weight, self.read))
        return float(((self.residual_target - output) * self.root).square().sum())

    def step(self, name, ratio):
        """The penalised least-squares step by a dense solve of all rows of W at once."""
        weight = self.layer.get_parameter(f"{name}.weight").detach()

        def weighted(rows):
            return self.output(activations(self.layer, name, rows, self.read)) * self.root

        jacobian = torch.autograd.functional.jacobian(weighted, weight).flatten(0, 1).flatten(1)
        residual = (self.residual_target * self.root - weighted(weight)).flatten().detach()
        gram = self.read.T @ self.read / len(self.read)
        gram += FLOOR * gram.diagonal().mean() * torch.eye(len(gram))
        leaf = self.layer.get_submodule(name)(self.read).detach().requires_grad_(True)
        derivatives = torch.autograd.grad(
            features_of(self.layer, name, leaf, self.read).sum(), leaf
        )[0]
        curvature = (derivatives * self.root).square().sum(dim=0)
        curvature = (curvature * self.output.weight.square().sum(dim=0)).mean().detach()
        penalty = ratio * curvature * torch.kron(torch.eye(len(weight)), gram)
        return torch.linalg.solve(jacobian.T @ jacobian + penalty, jacobian.T @ residual).view_as(
            weight
        )


def features_of(layer, name, given, read):
    """FFN activations if the input map `name` has the output `given`."""
    if hasattr(layer, "fc1"):
        return torch.relu(given)
    if "gate" in name:
        return nn.functional.silu(given) * layer.mlp.up_proj(read)
    return nn.functional.silu(layer.mlp.gate_proj(read)) * given


@pytest.fixture(params=FAMILIES)
def problem(request, targets):
    """Targets, a copy of the layer, the problem in float64, and its input maps by name."""
    found, sources = targets(request.param)
    adapter = found.stream.adapter
    plain = PlainProblem(found, adapter.copy_layer(2, sources.state))
    layer = adapter.copy_layer(2, sources.state)
    return found, layer, plain, {gate.name: gate for gate in sublayer_of(adapter, "channel").gates}


def input_map(targets, layer, post_attention, gate):
    """The least-squares problem of one input projection of the FFN."""
    return InputMap(targets, layer, targets.layout.sublayer("ffn"), (post_attention,) * 2, gate)


def up_projection(targets):
    ffn = targets.layout.sublayer("ffn")
    return next(gate for gate in ffn.gates if gate.name == "mlp.up_proj")


def test_activation_derivative(problem):
    targets, layer, plain, gates = problem
    layout = targets.layout
    for name, gate in gates.items():
        rows, keywords = plain.post_attention[:2], targets.stream.keywords(2, 2)
        read, derivatives, _ = activation_derivative(
            layer, layout, layout.sublayer("ffn"), rows, keywords, gate
        )
        linear = plain.layer.get_submodule(name)
        given = linear(read.double()).detach().requires_grad_(True)
        features = features_of(plain.layer, name, given, read.double())
        (expected,) = torch.autograd.grad(features.sum(), given)
        torch.testing.assert_close(derivatives.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.3, 30.0])
def test_step_is_the_least_squares_solution(problem, ratio, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 7)
    targets, layer, plain, gates = problem
    for name, gate in gates.items():
        found = input_map(targets, layer, plain.post_attention, gate).step(ratio, 200)
        expected = plain.step(name, ratio)
        assert (found - expected).norm() < 3e-3 * expected.norm()


def test_step_lowers_the_error_for_any_penalty(problem):
    targets, layer, plain, gates = problem
    for name, gate in gates.items():
        weight = plain.layer.get_parameter(f"{name}.weight").detach()
        for ratio in (1e-6, 1.0):
            least_squares = input_map(targets, layer, plain.post_attention, gate)
            change = least_squares.step(ratio, 30)
            before, after = (plain.error(name, weight + z) for z in (0, change))
            assert after < before
            assert least_squares.error(change) == pytest.approx(after, rel=1e-3)
        assert torch.equal(layer.get_parameter(f"{name}.weight").double(), weight)


def test_step_does_not_depend_on_cached_derivatives(problem, monkeypatch):
    targets, layer, plain, gates = problem
    for gate in gates.values():
        found = [input_map(targets, layer, plain.post_attention, gate).step(1.0, 5)]
        with monkeypatch.context() as patch:
            patch.setattr("come.merge.input_map.HELD_BYTES", 0)
            found.append(input_map(targets, layer, plain.post_attention, gate).step(1.0, 5))
        assert torch.equal(*found)


def test_preconditioner_handles_rows_of_different_curvature(problem):
    targets, layer, plain, gates = problem
    output = layer.get_submodule(targets.layout.sublayer("ffn").output).weight
    with torch.no_grad():
        output *= torch.logspace(-2, 1, output.shape[1])
        plain.output.weight.copy_(output)
    for name, gate in gates.items():
        found = input_map(targets, layer, plain.post_attention, gate).step(0.01, 12)
        expected = plain.step(name, 0.01)
        assert (found - expected).norm() < 0.4 * expected.norm()  # 0.9 without preconditioning


def test_trials_use_the_same_ridge_regression():
    refit = GaussNewton(lambda_=1.0, align=0.5, sublayers=["ffn"], weights="equal")
    for name in ("lambda_", "align", "sublayers", "weights", "target"):
        assert getattr(refit.surrogate, name) == getattr(refit, name)
    assert type(refit.surrogate) is Ridge


def test_step_is_zero_if_the_target_is_the_output(targets):
    targets, _ = targets("llama_gqa")
    targets.last = 2  # the target is the output of layer 2
    targets.target = "current"
    layer = targets.stream.adapter.copy_layer(2, targets.stream.adapter.layer_state(2))
    post_attention = PlainProblem(
        targets, targets.stream.adapter.copy_layer(2, layer.state_dict())
    ).post_attention
    change = input_map(targets, layer, post_attention, up_projection(targets)).step(1.0, 5)
    assert change.norm() < 1e-4


def test_conjugate_gradients_converge():
    generator = torch.Generator().manual_seed(0)
    root, rhs = (torch.randn(6, 6, generator=generator).double() for _ in range(2))
    matrix = root @ root.T + torch.eye(6)
    found = conjugate_gradients(lambda x: matrix @ x, rhs.clone(), 200)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, rhs))
    assert torch.equal(conjugate_gradients(lambda x: x, torch.zeros(2, 2), 3), torch.zeros(2, 2))


@pytest.mark.parametrize("operator", ["concat", "average", "drop"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gauss_newton_is_better_than_ridge(family, operator, windows):
    dense = Reference(pico(family), windows).h

    def error(refit):
        model = pico(family)
        method = paper(groups=((2, 3),), operator=operator, refit=refit, align=None)
        plan = compress(model, windows, method, target_layers=LAYERS - 1, progress=False)
        assert same_weights(apply(plan, pico(family)), model)
        error_per_token = (Reference(model, windows).h[3] - dense[4]).square().mean(dim=-1)
        return float((error_per_token / dense[4].square().mean(dim=-1)).mean()), plan

    ridge, _ = error("ridge")
    both, plan = error("gauss_newton")
    assert both < ridge
    inputs = {"fc1.weight"} if family == "opt" else {"mlp.gate_proj.weight", "mlp.up_proj.weight"}
    assert inputs <= set(plan.steps[0].solved.hashes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refit__sublayers": ["attention"]}, "leaves the FFN out: choose merge.refit=ridge"),
        (
            {"options": {"input_lambda": 0.0}},
            "merge.refit.input_lambda=0.0: must be a number above 0",
        ),
        ({"options": {"steps": 0}}, "merge.refit.steps=0: must be a whole number of at least 1"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        paper(refit="gauss_newton", norms="fold", **settings)


def test_input_maps_are_solved_sequentially(targets):
    """Gate before up: the step of a map uses the updated maps before it."""
    found, sources = targets("llama_gqa")
    adapter = found.stream.adapter
    solved = GaussNewton(align=None, input_lambda=1.0, steps=8).solve(found, sources)
    by_hand = Ridge().solve(found, sources)
    layer = adapter.copy_layer(2, {**sources.state, **by_hand})
    gates = found.layout.sublayer("ffn").gates
    assert [gate.name for gate in gates] == ["mlp.gate_proj", "mlp.up_proj"]
    for gate in gates:
        plain = PlainProblem(found, copy.deepcopy(layer))
        problem = input_map(found, layer, plain.post_attention, gate)
        by_hand[f"{gate.name}.weight"] = problem.changed(problem.step(1.0, 8))
        layer.load_state_dict({**sources.state, **by_hand})
    assert solved.keys() == by_hand.keys()
    for name, tensor in by_hand.items():
        torch.testing.assert_close(solved[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lower", [1, 3, 9])
def test_step_is_halved_at_most_four_times(lower, targets, monkeypatch):
    found, sources = targets("llama_gqa")
    copied = found.stream.adapter.copy_layer
    post_attention = PlainProblem(found, copied(2, sources.state)).post_attention
    layer, tried = copied(2, sources.state), []
    problem = input_map(found, layer, post_attention, up_projection(found))

    def error(change):
        tried.append(change)
        return -1.0 if len(tried) == lower else math.inf

    monkeypatch.setattr(problem, "error", error)
    step = problem.step(1.0, 2)
    assert len(tried) == min(lower, 5)
    torch.testing.assert_close(step, tried[0] / 2 ** (lower - 1) if lower < 9 else 0 * step)
