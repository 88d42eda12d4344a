"""The dual form, against the normal equations and plain float64."""

import gc
import weakref

import pytest
import torch

from come.linalg.cholesky import cholesky, cholesky_solve
from come.linalg.dual import Dual
from come.linalg.equations import Map, eliminate, unit_columns
from come.linalg.gram import Gram, inverse_of
from come.merge import joint_selection
from come.merge.joint_selection import Features, Residual, SourceLayer, stacked_equations
from come.merge.loop import compress
from come.merge.output_map import equations
from come.merge.reconstruction import ReconstructionTargets
from come.models.adapter import ModelAdapter
from come.stream.boundaries import mapped_zeros
from come.stream.stream import LayerStream
from tests.conftest import LAYERS, SEQ, WINDOWS, pico
from tests.methods import paper, recipe, span_of, sublayer_of
from tests.test_refit import plain_ridge

TOKENS, WIDTH, OUT = 40, 240, 6


def both_forms(bias, seed=0, tokens=TOKENS, width=WIDTH):
    """One problem in primal and dual form, its data, and an initial map."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, width, generator=generator) + 0.3
    start, targets = (
        torch.randn(OUT, width, generator=generator).double() / 9,
        torch.randn(tokens, OUT, generator=generator),
    )
    weights = 0.5 + torch.rand(tokens, generator=generator)
    initial = Map(start, torch.ones(OUT, dtype=torch.float64) if bias else None)
    forms = Gram(width, OUT, bias=bias), Dual(width, OUT, tokens, bias=bias)
    for form in forms:
        for rows in torch.arange(tokens).split(7):
            form.add(features[rows], targets[rows], weights[rows])
    return *forms, (features.double(), targets.double(), weights.double()), initial


@pytest.mark.parametrize("bias", [False, True])
def test_solve(bias):
    dense, dual, data, initial = both_forms(bias)
    assert dual.mean_diagonal() == pytest.approx(dense.mean_diagonal(), rel=1e-6)
    penalty = 0.1 * dense.mean_diagonal()
    weight, constant = plain_ridge(*data, initial.weight, initial.bias, penalty)
    found = dual.solve(initial, penalty)
    torch.testing.assert_close(found.weight.double(), weight, rtol=1e-4, atol=1e-5)
    assert (found.bias is None) == (not bias)
    if bias:
        torch.testing.assert_close(found.bias.double(), constant, rtol=1e-4, atol=1e-4)
    again = dual.solve(initial, penalty)
    assert torch.equal(again.weight, found.weight)


@pytest.mark.parametrize("bias", [False, True])
def test_solve_for_a_subset_of_columns(bias):
    dense, dual, _, initial = both_forms(bias)
    penalty = 0.1 * dense.mean_diagonal()
    chosen = torch.arange(5, WIDTH, 3)
    own = Map(initial.weight[:, chosen], initial.bias)
    for solved_before in (False, True):
        found = dual.columns(chosen).solve(own, penalty)
        expected = dense.columns(chosen).solve(own, penalty)
        torch.testing.assert_close(found.weight.double(), expected.weight, rtol=1e-4, atol=1e-5)
        if not solved_before:
            dual.solve(initial, penalty)  # centres the whole problem first


@pytest.mark.parametrize("bias", [False, True])
def test_leverage(bias):
    dense, dual, (features, _, weights), _ = both_forms(bias)
    penalty = 0.1 * dense.mean_diagonal()
    gram = (features * weights[:, None]).T @ features
    inverse = torch.linalg.inv(gram + penalty * torch.eye(WIDTH, dtype=torch.float64))
    expected = (gram @ inverse).diagonal()
    torch.testing.assert_close(dense.leverage(penalty), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dual.leverage(penalty), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("size", "rate"), [(1, 0.3), (1, 0.01), (8, 0.0)])
def test_elimination(bias, size, rate, monkeypatch):
    """Against the dense form, with updates and with recomputation between rounds."""
    monkeypatch.setattr("come.linalg.gram.BLOCK", 16)
    dense, dual, _, initial = both_forms(bias)
    penalty = 0.1 * dense.mean_diagonal()
    keep = 60 // size
    expected, dense_left = eliminate(dense, initial, penalty, keep, size, rate)
    columns = unit_columns(expected, size)
    own = Map(initial.weight[:, columns], initial.bias)
    solution = dense.columns(columns).solve(own, penalty)
    for form, consume in ((dual, False), (dual, True)):
        found, left = eliminate(form, initial, penalty, keep, size, rate, consume=consume)
        assert found == expected
        for end in (left, dense_left):
            solved = end.solution(own)
            torch.testing.assert_close(
                solved.weight.double(), solution.weight, rtol=1e-3, atol=1e-5
            )
            assert (solved.bias is None) == (not bias)
            if bias:
                torch.testing.assert_close(
                    solved.bias.double(), solution.bias, rtol=1e-3, atol=1e-4
                )


class CountedElimination:
    """Columns that all grow the error alike; records how many leave."""

    def __init__(self, count):
        self.left = [count]

    def growth(self, size):
        return torch.ones(self.left[-1], dtype=torch.float64)

    def remove(self, stay, gone):
        assert len(stay) + len(gone) == self.left[-1]
        self.left.append(len(stay))

    def solution(self, initial):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("keep", "rate", "expected"),
    [
        (1, 0.0, [4, 3, 2, 1]),
        (300, 0.5, [320, 310, 305, 302, 300]),  # at least three leave, or all that are left
        (300, 0.0, [308, 305, 302, 300]),
        (60, 0.5, [64, 62, 61, 60]),
        (5, 1.0, [9, 5]),
    ],
)
def test_number_of_units_that_leave_in_a_round(keep, rate, expected, monkeypatch):
    """A share of the surplus, at least 1% of the units to keep and one."""
    state = CountedElimination(expected[0])
    monkeypatch.setattr(Gram, "elimination", lambda *_, **__: state)
    initial = Map(torch.zeros(1, expected[0], dtype=torch.float64))
    kept, _ = eliminate(Gram(expected[0], 1, bias=False), initial, 1.0, keep, 1, rate)
    assert state.left == expected
    assert len(kept) == keep


@pytest.mark.parametrize(
    "leaving", [(1,) * 3, (5,) * 3, (9,) * 3, (10,) * 3, (30,) * 3, (5, 5, 14)]
)
def test_growth_after_removing_columns(leaving, monkeypatch):
    """Also with leverages computed by blocks of 16 tokens and tiles of 25 columns.

    From 10 columns on, everything is computed anew, from what updates left.
    """
    monkeypatch.setattr("come.linalg.dual.BLOCK", 16)
    monkeypatch.setattr("come.linalg.dual.COLUMNS", 25)
    dense, dual, _, initial = both_forms(True)
    penalty = 0.1 * dense.mean_diagonal()
    states = [form.elimination(initial, penalty) for form in (dense, dual)]
    for count in leaving:
        growths = [state.growth(1) for state in states]
        torch.testing.assert_close(growths[1], growths[0], rtol=2e-3, atol=1e-6)
        removed = torch.arange(0, 2 * count, 2)
        remaining = torch.tensor(
            [i for i in range(len(growths[0])) if i not in set(removed.tolist())]
        )
        for state in states:
            state.remove(remaining, removed)
    torch.testing.assert_close(states[1].growth(3), states[0].growth(3), rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_sketch_of_many_outputs(bias):
    """1100 outputs are sketched by 512 columns; the growths have a standard deviation of 6%."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(60, 300, generator=generator) + 0.3
    shape = torch.randn(20, 1100, generator=generator)  # of low rank, as targets are
    targets = torch.randn(60, 20, generator=generator) @ shape
    start = (torch.randn(300, 20, generator=generator) @ shape).T.double() / 40
    weights = 0.5 + torch.rand(60, generator=generator)
    initial = Map(start, torch.ones(1100, dtype=torch.float64) if bias else None)
    dense, dual = Gram(300, 1100, bias=bias), Dual(300, 1100, 60, bias=bias)
    for form in (dense, dual):
        form.add(features, targets, weights)
    penalty = 0.1 * dense.mean_diagonal()
    states = [form.elimination(initial, penalty) for form in (dense, dual)]
    ratios = states[1].growth(1) / states[0].growth(1)
    assert ratios.std() == pytest.approx(0.06, abs=0.03)
    assert not torch.equal(ratios, torch.ones_like(ratios))
    assert ratios.mean() == pytest.approx(1, abs=0.05)

    errors = []
    for form in (dense, dual):
        kept, left = eliminate(form, initial, penalty, 150, 1, 0.3)
        columns = unit_columns(kept, 1)
        own = Map(initial.weight[:, columns], initial.bias)
        found = dense.columns(columns).solve(own, penalty)
        torch.testing.assert_close(
            left.solution(own).weight.double(), found.weight, rtol=1e-3, atol=1e-4
        )
        whole = torch.zeros_like(start)
        whole[:, columns] = found.weight
        residual = dense.error(Map(whole, found.bias))
        errors.append(residual + penalty * float((whole - start).square().sum()))
    assert errors[1] < 1.02 * errors[0]


@pytest.mark.parametrize("tokens", [32, 80])
def test_form_is_chosen_by_size(tokens, windows):
    """Two layers have 128 columns; the dual form is used from 2 columns per token on."""
    adapter = ModelAdapter(pico("llama_gqa", intermediate_size=64))
    with LayerStream(adapter, windows[: tokens // 16], progress=False) as stream:
        stream.embed()
        stream.advance(0, LAYERS - 1)
        stream.snapshot_dense()
        targets = ReconstructionTargets(stream, 2, 3, original=3)
        layers = [SourceLayer(adapter.layer_state(index)) for index in (2, 3)]
        attention, ffn = (sublayer_of(adapter, unit) for unit in ("kv_group", "channel"))
        residual = Residual(span_of(stream, paper()))
        residual.after["attention"] = torch.cat(
            [batch.states + batch.missing(attention, batch.states) for batch in targets]
        )
        sums = stacked_equations(Features(targets, ffn, layers, residual))
        assert isinstance(sums, Dual if tokens == 32 else Gram)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [7, 64])
def test_inputs_in_a_file_are_read_in_tiles(bias, columns, monkeypatch, tmp_path):
    """Same results from an unlinked file, also if the tiles do not divide the columns."""
    monkeypatch.setattr("come.linalg.dual.COLUMNS", columns)
    dense, stored, (features, targets, weights), initial = both_forms(bias)
    tiled = Dual(
        WIDTH, OUT, TOKENS, bias=bias, rows=mapped_zeros((WIDTH, TOKENS), tmp_path / "new")
    )
    assert not list((tmp_path / "new").iterdir())
    tiled.add(features.float(), targets.float(), weights.float())
    penalty = 0.1 * dense.mean_diagonal()
    assert tiled.mean_diagonal() == pytest.approx(dense.mean_diagonal(), rel=1e-6)
    torch.testing.assert_close(
        tiled.leverage(penalty), dense.leverage(penalty), rtol=1e-4, atol=1e-5
    )
    found, expected = (form.solve(initial, penalty) for form in (tiled, dense))
    torch.testing.assert_close(found.weight.double(), expected.weight, rtol=1e-4, atol=1e-5)
    chosen = [eliminate(form, initial, penalty, 60, 1, 0.3)[0] for form in (tiled, stored, dense)]
    assert chosen[0] == chosen[1] == chosen[2]


@pytest.mark.parametrize(("free", "store", "mapped"), [
    (0, "memory", False), (1e5, "memory", False), (1e9, "memory", False), (1e9, "disk", True),
])  # fmt: skip
def test_placement_of_the_inputs(free, store, mapped, windows, monkeypatch, tmp_path):
    """On the solving device, or in main memory or a file if only the rest fits on the device."""
    requested = []
    monkeypatch.setattr("come.merge.output_map.COLUMNS", 8)
    monkeypatch.setattr(
        "come.merge.output_map.fits",
        lambda device, needed: requested.append(needed) or needed <= free,
    )
    adapter = ModelAdapter(pico("llama_gqa"))
    with LayerStream(adapter, windows, store=store, folder=tmp_path, progress=False) as stream:
        allocated = []
        scratch = stream.scratch
        monkeypatch.setattr(
            stream, "scratch", lambda *shape: allocated.append(shape) or scratch(*shape)
        )
        tokens, hidden = stream.tokens, adapter.config.hidden_size
        sums = equations(8 * tokens, stream, bias=False, eliminates=True)
        rest = 4 * (tokens * hidden + 8 * tokens + 8 * tokens * hidden) + 24 * tokens**2
        assert requested == ([] if mapped else [rest + 4 * tokens * 8 * tokens])
        assert isinstance(sums, Dual)
        assert allocated == ([] if free == 1e9 and not mapped else [(8 * tokens, tokens)])


@pytest.mark.parametrize("family", ["llama_gqa", "opt"])
@pytest.mark.parametrize("retention", ["adaptive", "leverage"])
def test_both_forms_give_the_same_plan(family, retention, windows, monkeypatch):
    plans, forms, whole = [], [], joint_selection.equations

    def recorded(*args, **kwargs):
        forms.append(type(whole(*args, **kwargs)))
        return whole(*args, **kwargs)

    monkeypatch.setattr(joint_selection, "equations", recorded)
    for columns in (0, 10**9):
        monkeypatch.setattr("come.merge.output_map.DUAL", columns)
        method = recipe("come_plus", retention=retention)
        model = pico(family)
        plans.append(
            (compress(model, windows, method, target_layers=LAYERS - 2, progress=False), model)
        )
    half = len(forms) // 2
    assert (set(forms[:half]), set(forms[half:])) == ({Dual}, {Gram})
    (dual, first), (dense, second) = plans
    assert [(s.first, s.last, s.kept) for s in dual.steps] == [
        (s.first, s.last, s.kept) for s in dense.steps
    ]
    for name, tensor in second.state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_retention_tokens(windows):
    def plan(tokens=None, **changes):
        method = recipe("come_plus", **changes)
        method.retention.tokens = tokens
        return compress(
            pico("llama_gqa"), windows, method, target_layers=LAYERS - 2, progress=False
        )

    assert plan(tokens=10**6).steps == plan().steps
    fewer = plan(groups=((2, 3), (0, 1)), tokens=33)
    assert fewer.steps[0].kept != plan(groups=((2, 3), (0, 1))).steps[0].kept


def test_gram_is_freed_by_reference_counting():
    """Its token buffer has a callback, which must not form a reference cycle."""
    gc.disable()
    try:
        sums = Gram(4, 2, bias=False)
        sums.add(torch.ones(3, 4), torch.ones(3, 2), torch.ones(3))
        reference = weakref.ref(sums)
        del sums
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("size", [7, 700])
def test_cholesky_and_inverse_are_in_place(size):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(size, 2 * size, dtype=torch.float64, generator=generator)
    matrix, right = root @ root.T, torch.randn(size, 3, dtype=torch.float64, generator=generator)
    expected = torch.linalg.solve(matrix, right)
    whole = torch.linalg.inv(matrix)
    buffer = matrix.clone()
    factor = cholesky(buffer)
    assert factor.data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(factor, torch.linalg.cholesky(matrix))
    torch.testing.assert_close(cholesky_solve(factor, right), expected)
    inverse = inverse_of(factor)
    assert inverse.data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(inverse, whole)
    assert torch.equal(inverse, inverse.T)


def test_problems_that_do_not_fit_on_the_gpu_are_solved_on_the_cpu(monkeypatch, caplog):
    """Memory that torch reserved but does not use counts as free; the fallback is logged once."""
    from come.linalg.placement import _say_once, solving_device

    _say_once.cache_clear()
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 50)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 20)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert solving_device(cuda, 130) == cuda
    assert [solving_device(cuda, needed) for needed in (131, 200)] == [cpu, cpu]
    assert solving_device(cpu, 1e12) == cpu
    assert len(caplog.messages) == 1
    assert "merge.retention.tokens" in caplog.text


def test_memory_of_the_normal_equations(windows, monkeypatch):
    needs = []
    monkeypatch.setattr(
        "come.merge.output_map.solving_device",
        lambda device, needed: needs.append(needed) or device,
    )
    with LayerStream(ModelAdapter(pico("llama_gqa")), windows, progress=False) as stream:
        equations(24, stream, bias=False)
        equations(24, stream, bias=False, eliminates=True, dtype=torch.float32)
    assert needs == [8 * 24 * (24 + 3 * 32), 4 * 24 * (2 * 24 + 3 * 32)]


@pytest.mark.parametrize(("width", "eliminates", "form"), [
    (WINDOWS * SEQ - 1, False, Gram), (WINDOWS * SEQ, False, Dual),
    (2 * WINDOWS * SEQ - 1, True, Gram), (2 * WINDOWS * SEQ, True, Dual),
])  # fmt: skip
def test_form_by_columns_per_token(width, eliminates, form, windows):
    with LayerStream(ModelAdapter(pico("llama_gqa")), windows, progress=False) as stream:
        assert isinstance(equations(width, stream, bias=False, eliminates=eliminates), form)
