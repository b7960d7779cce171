"""Scorers that training never saw: a lexicon, a classifier fitted on labelled texts, or any function."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_api.errors import UserError
from rlhf_api.run import Scorer
from rlhf_pipeline.agreement import wilson_interval
from rlhf_pipeline.reward_models import FunctionReward, call_scorer


def vader(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:  # noqa: ARG001 judges the response alone
    """VADER's compound sentiment of each response, -1 to 1: rules and a lexicon, nothing trained.

    Source: Hutto and Gilbert 2014.
    """
    analyzer = _vader_analyzer()
    return [float(analyzer.polarity_scores(response)["compound"]) for response in responses]


@functools.cache
def _vader_analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@dataclass(frozen=True)
class FittedClassifier:
    """Logistic regression on TF-IDF of words and pairs of words, with its accuracy on texts it was not fitted on."""

    pipeline: Any
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    fitted_on: int
    held_out: int

    @classmethod
    def fit(cls, folder: Path) -> "FittedClassifier":
        """Fit on train.parquet of an evaluation-data artifact, measure on heldout.parquet.

        Raises UserError where one label is missing from the texts.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        texts, labels = _labelled(folder / "train.parquet")
        if len(set(labels)) < 2:
            raise UserError(
                f"data.evaluation: all {len(labels)} texts have the label {'good' if all(labels) else 'bad'}; "
                "a classifier needs both: see data.evaluation.chosenLabel and where"
            )
        pipeline = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), min_df=2 if len(texts) >= 1000 else 1, sublinear_tf=True),
            LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced"),
        )
        pipeline.fit(texts, labels)
        held_out, truth = _labelled(folder / "heldout.parquet")
        if not held_out:
            raise UserError("data.evaluation.heldOut: no text is left to measure the fitted scorer on; raise it")
        accuracy = float(pipeline.score(held_out, truth))
        low, high = wilson_interval(accuracy, len(truth))
        return cls(pipeline, accuracy, low, high, len(texts), len(held_out))

    @property
    def quality(self) -> dict[str, float]:
        """How well it tells good from bad on texts it was not fitted on."""
        return {
            "accuracy": self.accuracy,
            "accuracy_low": self.accuracy_low,
            "accuracy_high": self.accuracy_high,
            "fitted_on": self.fitted_on,
            "held_out": self.held_out,
        }

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:  # noqa: ARG002 as vader's
        """The probability that each response is good, 0 to 1."""
        probabilities: list[float] = self.pipeline.predict_proba(list(responses))[:, 1].tolist()
        return probabilities


@dataclass(frozen=True)
class IndependentScorer:
    """A scorer of the run by its name, and what a reader should know about it."""

    name: str
    function: Callable[[list[str], list[str]], Any]
    about: dict[str, Any] = field(default_factory=dict)

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """One finite number for each response. Raises UserError where the function misbehaves."""
        return call_scorer(self.function, prompts, responses, f"evaluate.scorers.{self.name}")


def load_scorers(scorers: Sequence[Scorer], data: Path | None) -> list[IndependentScorer]:
    """The scorers that the run names. data: folder of the evaluation-data artifact, if the run has one.

    Raises UserError for a scorer that cannot be loaded or fitted.
    """
    return [_load(scorer, data) for scorer in scorers]


def _load(scorer: Scorer, data: Path | None) -> IndependentScorer:
    where = f"evaluate.scorers.{scorer.name}"
    if scorer.function:
        function = FunctionReward(scorer.function, f"{where}.function").function()
        return IndependentScorer(scorer.name, function, {"type": "function", "function": scorer.function})
    if not scorer.fitted:
        raise UserError(f"{where}: give it a function, or fitted: true")
    if data is None:
        raise UserError(
            f"{where}: there are no labelled texts to fit it on; add data.evaluation, or give it a function"
        )
    fitted = FittedClassifier.fit(data)
    return IndependentScorer(scorer.name, fitted, {"type": "fitted", **fitted.quality})


def _labelled(path: Path) -> tuple[list[str], list[bool]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["text", "label"])
    return table.column("text").to_pylist(), [bool(label) for label in table.column("label").to_pylist()]
