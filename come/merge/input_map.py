"""The least-squares problem of one input projection of a sublayer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from come.linalg.conjugate_gradients import conjugate_gradients, right_divided
from come.merge.normed_output import OutputNorm
from come.merge.output_map import output_map
from come.merge.reconstruction import ReconstructionTargets
from come.models.layout import Gate, Sublayer
from come.models.sublayers import Features, States, activation_derivative, hidden_features
from come.progress import ProgressBar
from come.stream.processes import Processes
from come.stream.token_blocks import TokenBlocks

Matrix = Float[Tensor, "channels hidden"]

FLOOR = 1e-4  # damping for whitening, relative to the mean square of the projection's input
HALVINGS = 4
HELD_BYTES = 1 << 29  # largest size of n and D that is cached between curvature products


class InputMap:
    """Effect of a change Z of an input projection W on a layer's output error, to first order.

        E(Z) = sum_t w_t | r_t - W_d (D_t * Z n_t) |^2

    r: target minus the layer's output; W_d: the sublayer's output projection; n and D as in
    `activation_derivative`. With a norm after the projection, W_d is diag(g) W_d, and D is divided
    by the norm's root mean square, whose own change is left out. Exact where the hidden activations
    are linear in W n, as for an up projection without such a norm. n and D are cached if they are
    small; otherwise each curvature product recomputes them from the sublayer's input.

    Args:
        targets: reconstruction targets of the layer.
        layer: a copy of the layer outside the model; `error` changes its W and restores it.
        sublayer: the last sublayer of the layer.
        streams: the residual stream that the sublayer reads, and the one that its output is added
            to, [windows, seq, hidden] each.
        gate: W, one of the sublayer's `gates`.
    """

    def __init__(
        self,
        targets: ReconstructionTargets,
        layer: nn.Module,
        sublayer: Sublayer,
        streams: tuple[States, States],
        gate: Gate,
    ) -> None:
        self.targets = targets
        self.adapter = targets.stream.adapter
        self.layer = layer
        self.sublayer = sublayer
        self.streams = streams
        self.gate = gate
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []  # n, D and w of every block
        output = output_map(layer.state_dict(), sublayer).weight
        if sublayer.factor != 1:  # a copy of the weight costs memory
            output = output * sublayer.factor
        self._norm = OutputNorm(layer, sublayer) if sublayer.post_norm else None
        if self._norm is not None:
            output = output * self._norm.scale[:, None].to(output)
        self._module_weight = layer.get_parameter(f"{gate.name}.weight").detach()
        self.weight = gate.rows(self._module_weight, sublayer.count)
        self.output = output.to(torch.promote_types(output.dtype, torch.float32))

    def step(self, ratio: float, steps: int) -> Matrix:
        """The truncated Gauss-Newton step; zero if it does not reduce the error.

            min_Z E(Z) + mu (mean_t |Z n_t|^2 + floor |Z|^2)
            mu = ratio mean_j sum_t w_t D_tj^2 |column j of W_d|^2

        Conjugate gradients run in coordinates in which n is white and all rows of Z have about the
        same curvature: row j is scaled by (c_j + mu)^-1/2, c_j = sum_t w_t D_tj^2 |column j of
        W_d|^2. The step is halved, at most four times, until the true error is lower than before.

        Args:
            ratio: penalty relative to the mean curvature, > 0.
            steps: number of conjugate gradient iterations.

        Returns:
            Z, float32 or wider.
        """
        gram, rhs, curvatures, before = self._start()
        gram.diagonal().add_(FLOOR * gram.diagonal().mean())
        root = torch.linalg.cholesky(gram).to(rhs)
        del gram
        penalty = ratio * curvatures.mean().item()
        scale = (curvatures + penalty).rsqrt().to(rhs)[:, None]

        def colour(white: Matrix) -> Matrix:
            return right_divided(white, root, upper=False)

        def whiten(gradient: Matrix) -> Matrix:
            return right_divided(gradient, root.T, upper=True)

        def product(white: Matrix) -> Matrix:
            bar.update()
            curved = whiten(self.curved(colour(scale * white)))
            return curved.add_(scale * white, alpha=penalty).mul_(scale)

        shown = self.targets.stream.progress
        with ProgressBar(total=steps, desc=self.gate.name, shown=shown) as bar:
            target = whiten(rhs).mul_(scale)
            del rhs
            found = conjugate_gradients(product, target, steps)
            del target
            change = colour(scale * found)
        self._held.clear()
        for _ in range(HALVINGS + 1):
            if self.error(change) < before:
                return change
            change = change / 2
        return torch.zeros_like(change)

    def curved(self, change: Matrix) -> Matrix:
        """Half the Hessian of E, applied to a change."""
        total = torch.zeros_like(change)

        def accumulate(read: Tensor, slopes: Tensor, weights: Tensor) -> None:
            moved = (slopes * (read @ change.T)) @ self.output.T
            self._add_back(total, moved * weights[:, None], read, slopes)

        for block in self._held:
            accumulate(*block)
        if not self._held:
            blocks = TokenBlocks(accumulate)
            for read, _, weights, keywords in self._batches():
                blocks.add(*self._slopes(read, keywords)[:2], weights)
            blocks.finish()
        self._processes.all_reduce(total)
        return total

    def changed(self, change: Matrix) -> Tensor:
        """The weight of W's module with W + change, in its dtype."""
        rows = (self.weight.to(change.dtype) + change).to(self.weight.dtype)
        return self.gate.with_rows(self._module_weight, rows)

    def error(self, change: Matrix) -> float:
        """sum_t w_t |target - output|^2 of the layer with W + change."""
        self._put(self.changed(change))
        total = 0.0

        def accumulate(gap: Tensor, weights: Tensor) -> None:
            nonlocal total
            total += (gap.square().sum(dim=1) * weights).sum().item()

        blocks = TokenBlocks(accumulate)
        for read, missing, weights, keywords in self._batches():
            layout = self.targets.layout
            features = hidden_features(self.layer, layout, self.sublayer, read, keywords)
            blocks.add(self._gap(missing, features), weights)
        blocks.finish()
        self._put(self._module_weight)
        return self._processes.reduced(total)

    @property
    def _processes(self) -> Processes:
        return self.targets.stream.processes

    def _put(self, weight: Tensor) -> None:
        self.adapter.assign(self.layer, {f"{self.gate.name}.weight": weight})

    def _start(self) -> tuple[Tensor, Matrix, Tensor, float]:
        """mean_t n n^T, float64; minus half the gradient of E at 0; each row's curvature; E(0)."""
        channels, hidden = self.output.shape[1], self.output.shape[0]
        gram = self.output.new_zeros(hidden, hidden, dtype=torch.float64)
        rhs = self.output.new_zeros(channels, hidden)
        squares = self.output.new_zeros(channels, dtype=torch.float64)
        error = 0.0
        size = self.output.element_size() * (channels + hidden)
        stream = self.targets.stream
        hold = stream.tokens / self._processes.count * size <= HELD_BYTES

        def accumulate(read: Tensor, slopes: Tensor, gap: Tensor, weights: Tensor) -> None:
            nonlocal error
            error += (gap.square().sum(dim=1) * weights).sum().item()
            self._add_back(rhs, gap * weights[:, None], read, slopes)
            gram.add_(read.T @ read)
            squares.add_(weights @ slopes.square())
            if hold:
                self._held.append((read.clone(), slopes.clone(), weights))

        blocks = TokenBlocks(accumulate)
        for states, missing, weights, keywords in self._batches():
            read, slopes, features = self._slopes(states, keywords)
            blocks.add(read, slopes, self._gap(missing, features), weights)
        blocks.finish()
        self._processes.all_reduce(gram, rhs, squares)
        sizes = self.output.double().square().sum(dim=0)
        return gram / stream.tokens, rhs, squares * sizes, self._processes.reduced(error)

    def _gap(self, missing: tuple[States, States], features: Features) -> Tensor:
        """Target minus the layer's output, [tokens, hidden]; `features`: hidden activations."""
        target, before = missing
        added = self.layer.get_submodule(self.sublayer.output)(features)
        if self.sublayer.post_norm:
            added = self.layer.get_submodule(self.sublayer.post_norm.module)(added)
        return (target - (before + added * self.sublayer.factor)).flatten(0, 1).to(self.output)

    def _slopes(self, states: States, keywords: dict[str, Any]) -> tuple[Tensor, Tensor, Features]:
        """The input n of W, [tokens, hidden], the derivatives D, [tokens, channels], and f."""
        read, slopes, features = activation_derivative(
            self.layer, self.targets.layout, self.sublayer, states, keywords, self.gate
        )
        if self._norm is not None:
            outputs = self.layer.get_submodule(self.sublayer.output)(features)
            slopes = slopes * self._norm.inverse_rms(outputs).to(slopes)
        flat = [tensor.flatten(0, 1).to(self.output) for tensor in (read, slopes)]
        return flat[0], flat[1], features

    def _add_back(self, total: Matrix, gap: Tensor, read: Tensor, slopes: Tensor) -> None:
        total.addmm_(((gap @ self.output) * slopes).T, read)

    def _batches(self) -> Iterator[tuple[States, tuple[States, States], Tensor, dict[str, Any]]]:
        """What the sublayer reads; the target and the stream before it; weights; keywords."""
        device = self.adapter.device
        for batch in self.targets:
            read, before = (states[batch.rows].to(device) for states in self.streams)
            keywords = self.targets.keywords(len(read))
            yield read, (batch.unscaled, before), batch.weights.to(self.output), keywords
