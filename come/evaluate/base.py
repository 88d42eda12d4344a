"""The interface of an evaluation, and the metrics that it measures."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from come.data.sources.base import TextSource
from come.evaluate.paired import Relative, exp_interval, paired_difference
from come.registry import Registry
from come.setting import HasSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Metric:
    """One measured number of a model.

    Attributes:
        value: the number.
        low: lower end of its 95% confidence interval; None if there is none.
        high: upper end of that interval; None if there is none.
        unit: unit of the value, such as "tokens/s" or "bytes"; "" for none.
        comparison: how models are compared: "ratio", "difference", or "" if they are not.
        relative: comparison with the dense model; None for the dense model itself.
        samples: values that are paired between models. For a ratio, logarithms whose mean is that
            of the value (the loss of every window); for a difference, scores whose mean is the
            value (one for every document).
        data: the data that it was measured on, such as "16384 tokens in 8 windows of FILE".
        headline: whether the summary table has a column for it.
        details: further results, for the evaluation's own use.
    """

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    comparison: str = ""
    relative: Relative | None = None
    samples: Sequence[float] = field(default_factory=list)
    data: str = ""
    headline: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def significant(self) -> bool:
        """Whether the model differs from the dense model.

        That is, the interval of `relative` excludes equality, and McNemar's test, if any, has
        p < 0.05.
        """
        found = self.relative
        if found is None or found.low is None or found.high is None:
            return False
        equal = 1 if self.comparison == "ratio" else 0
        return not found.low <= equal <= found.high and (found.p is None or found.p < 0.05)

    def record(self) -> dict[str, Any]:
        """The metric as plain data, for a JSON file."""
        return asdict(self)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Metric:
        """The metric of a `record`.

        Raises:
            ValueError: a field has another type; the message names it.
        """
        relative = record.get("relative")
        found = cls(**{**record, "relative": Relative(**relative) if relative else None})
        numbers: dict[Any, Any] = {"value": found.value}
        numbers.update(enumerate(_listed(found.samples)))
        if found.relative is not None:
            numbers["relative"] = found.relative.value
        for name, owner in (("", found), ("relative ", found.relative)):
            kept = {f"{name}{key}": getattr(owner, key, None) for key in ("low", "high", "p")}
            numbers |= {key: value for key, value in kept.items() if value is not None}
        for key, value in numbers.items():
            huge = isinstance(value, int) and abs(value) > sys.float_info.max
            if not isinstance(value, int | float) or huge:
                raise ValueError(f"{key} of a metric is {value!r:.60}, which is no number")
        texts = (found.unit, found.comparison, found.data)
        if not all(isinstance(text, str) for text in texts) or not isinstance(found.details, dict):
            raise ValueError("unit, comparison, data or details of a metric have another type")
        return found

    def against(self, other: Metric) -> Relative | None:
        """Compares the metric with another model's; None if it is not compared.

        A ratio has Student's t interval over the paired samples, a difference the paired bootstrap
        interval and McNemar's test. Without samples there is no interval.

        Raises:
            ValueError: the models have different numbers of samples.
        """
        paired = bool(self.samples and other.samples)
        if paired and len(self.samples) != len(other.samples):
            raise ValueError(f"{len(self.samples)} and {len(other.samples)} samples")
        if self.comparison == "ratio":
            if not paired:
                return Relative(self.value / other.value) if other.value else None
            return exp_interval([a - b for a, b in zip(self.samples, other.samples, strict=True)])
        if self.comparison == "difference":
            gap = self.value - other.value
            if not paired:
                return Relative(gap)
            return replace(paired_difference(self.samples, other.samples), value=gap)
        return None

    def __str__(self) -> str:
        return str(Relative(self.value, self.low, self.high))


def _listed(samples: Any) -> Sequence[float]:
    if not isinstance(samples, list | tuple):
        raise ValueError(f"the samples of a metric are {samples!r:.60}")  # noqa: TRY004
    return samples


Metrics = dict[str, Metric]
"""Metrics by name. Names begin with the evaluation's, such as "perplexity/c4"."""


def read_metrics(records: Mapping[str, Mapping[str, Any]]) -> Metrics:
    """The metrics of a model in `result.json`."""
    return {name: Metric.read(record) for name, record in records.items()}


@dataclass(frozen=True)
class Subject:
    """What evaluations know about the model before its weights are loaded.

    Attributes:
        tokenizer: its tokenizer.
        vocabulary: number of rows of its embedding.
        longest: maximum sequence length in tokens; None without a limit.
        others: texts that the model is calibrated or trained on; held-out text excludes them.
        begin: token that every window of text begins with; None for none.
        drawn_from: texts that it was calibrated or trained on before, see `TokenWindows`.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    longest: int | None
    others: Sequence[TextSource] = ()
    begin: int | None = None
    drawn_from: Mapping[str, float] = field(default_factory=dict)


class Evaluation(HasSettings):
    """Base of evaluations: dataclasses with the settings of `eval.NAME`.

    A job calls `check` on the settings alone, `prepare` before any weights are loaded, `measure`
    for the dense model, and `measure_compressed` and `compare` for every saved model.
    """

    name: ClassVar[str]
    together: ClassVar[bool] = False
    """Whether the dense and the compressed model are measured alternately (`measure_together`),
    because the values depend on the load of the machine. Such values of the dense model are not
    cached, and only the job's last model is measured."""

    def __init_subclass__(cls) -> None:
        cls.config_key = f"eval.{cls.name}"

    def check(self) -> None:
        """Raises ValueError for settings that contradict each other."""

    def texts(self) -> dict[str, TextSource]:
        """The held-out texts by name, which calibration and training exclude; not read yet."""
        return {}

    def identity(self) -> Any:
        """Identifies the content of the files that the settings name, for the job hash."""
        return None

    def prepare(self, subject: Subject) -> Any:
        """Reads and checks the data that `measure` needs; the default needs none.

        Raises:
            ValueError: the data cannot be read, or do not fit the model.
        """

    def key(self, data: Any) -> Any:
        """Identifies the data in the cache of dense evaluations, as JSON; the default has none."""

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Any
    ) -> Metrics:
        """Measures one model.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            data: what `prepare` returned.
        """
        raise NotImplementedError

    def measure_compressed(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: Any,
        dense: Metrics,
    ) -> Metrics:
        """Measures a compressed model; by default `measure`, which is not given `dense`.

        Args:
            model: the compressed model.
            tokenizer: its tokenizer.
            data: what `prepare` returned.
            dense: what `measure` returned for the dense model.
        """
        return self.measure(model, tokenizer, data)

    def measure_together(
        self,
        models: Mapping[str, PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        data: Any,
    ) -> dict[str, Metrics]:
        """Measures several models, by label."""
        return {label: self.measure(model, tokenizer, data) for label, model in models.items()}

    @classmethod
    def compare(cls, own: Metrics, dense: Metrics, removed: float = 0.0) -> Metrics:
        """Adds the comparison with the dense model to the metrics of a model.

        Args:
            own: metrics of the model.
            dense: metrics of the dense model.
            removed: share of the layers' parameters that the model lacks.
        """
        return {
            name: replace(metric, relative=metric.against(dense[name]))
            for name, metric in own.items()
        }


EVALUATIONS: Registry[Evaluation] = Registry("evaluation", "come.evaluate", "eval")
