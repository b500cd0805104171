"""The win rate that AlpacaEval's judge would give if both outputs were equally long (Dubois et al. 2024).

A logistic regression of the judge's preference on the tanh of the standardized length difference, on the instruction's
difficulty and on a constant for the model; the first term is then set to zero. arXiv:2404.04475, as `alpaca_eval`
computes it (``length_controlled_v1``): verdicts are probabilities, the L1 penalty is chosen by 5-fold cross-validation,
and verdicts on long and short versions of the reference's own outputs ("gamed") tie the length term down.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import LoraInitError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_FOLDS = 5
_PENALTIES = np.logspace(-4, 4, 10)  # scikit-learn's default grid, which alpaca_eval uses
_GAMED_WEIGHT = 0.2 / 2  # of a verdict on a gamed output; there are two gamed models
_SEED = 123


@dataclasses.dataclass(frozen=True)
class Weights:
    """What decides the odds of winning against the reference.

    Attributes:
        length: of tanh((length of the reference − length of the model) / standard deviation).
        difficulty: of the instruction's difficulty.
        model: the constant.
    """

    length: float
    difficulty: float
    model: float


@dataclasses.dataclass(frozen=True)
class Gamed:
    """Verdicts on the reference's outputs made long and short on purpose, against the reference itself.

    Attributes:
        preference: probability that the gamed output wins.
        length: the standardized length difference.
        difficulty: of the instruction.
    """

    preference: NDArray[np.float64]
    length: NDArray[np.float64]
    difficulty: NDArray[np.float64]


def standardized(reference: ArrayLike, model: ArrayLike) -> NDArray[np.float64]:
    """Return the reference's lengths minus the model's, over the standard deviation of that.

    Raises:
        LoraInitError: the difference is the same everywhere, so that no effect of it can be seen.
    """
    difference = np.asarray(reference, float) - np.asarray(model, float)
    spread = difference.std(ddof=1) if difference.size > 1 else 0.0
    if not spread > 0:
        raise LoraInitError("length control: all outputs differ from the reference's by the same number of characters")
    return difference / spread


def fit(preference: ArrayLike, length: ArrayLike, difficulty: ArrayLike, gamed: Gamed | None = None) -> Weights:
    """Fit the regression.

    Args:
        preference: probability that the model wins, for each instruction; NaN where there is no verdict.
        length: the standardized length difference.
        difficulty: of the instruction.
        gamed: verdicts on gamed outputs; without them the length term is fitted to this model alone.

    Raises:
        LoraInitError: fewer verdicts than folds.
    """
    target = np.asarray(preference, float)
    features = np.column_stack(
        [np.tanh(np.asarray(length, float)), np.asarray(difficulty, float), np.ones(target.size)]
    )
    weight = np.ones(target.size)
    if gamed is not None:
        # the gamed outputs come first, as the folds depend on the order; the constant is the model's alone
        rows = np.column_stack([np.tanh(gamed.length), gamed.difficulty, np.zeros(gamed.length.size)])
        features, target = np.vstack([rows, features]), np.concatenate([gamed.preference, target])
        weight = np.concatenate([np.full(gamed.length.size, _GAMED_WEIGHT), weight])
    there = ~np.isnan(target)
    if there.sum() < _FOLDS or there[-np.asarray(preference).size :].sum() == 0:
        raise LoraInitError(f"length control: it takes at least {_FOLDS} verdicts")
    features, target, weight = features[there], target[there], weight[there]
    coefficients = _regression(features, target, weight, _penalty(features, target, weight))
    return Weights(*map(float, coefficients))


def win_probability(weights: Weights, difficulty: ArrayLike) -> NDArray[np.float64]:
    """Return the probability of winning each instruction at equal lengths."""
    from scipy.special import expit

    return expit(weights.difficulty * np.asarray(difficulty, float) + weights.model)


def _penalty(features: NDArray[Any], target: NDArray[Any], weight: NDArray[Any]) -> float:
    """Return the inverse penalty with the smallest weighted log-loss on held-out verdicts, averaged over the folds."""
    from sklearn.model_selection import GroupKFold

    verdict = np.tile(np.arange(target.size), 2)  # each verdict as often as in the fit, so that the folds are the same
    losses = np.zeros(_PENALTIES.size)
    for _, held in GroupKFold(_FOLDS).split(verdict, groups=verdict):
        out = np.unique(verdict[held])
        kept = np.setdiff1d(np.arange(target.size), out)
        state = np.random.RandomState(_SEED)  # each fold's fits draw from one, as in LogisticRegressionCV
        for i, penalty in enumerate(_PENALTIES):
            coefficients = _regression(features[kept], target[kept], weight[kept], penalty, state)
            logits = features[out] @ coefficients
            loss = np.logaddexp(0, logits) - target[out] * logits
            losses[i] += np.mean(weight[out] * loss)
    return float(_PENALTIES[losses.argmin()])


def _regression(
    features: NDArray[Any], target: NDArray[Any], weight: NDArray[Any], penalty: float, state: Any = _SEED
) -> NDArray[Any]:
    """Fit verdicts that are probabilities: each counts as a win and as a loss, with complementary weights."""
    from sklearn.linear_model import LogisticRegression

    # the L1 penalty is l1_ratio=1 from scikit-learn 1.8 on, and was penalty="l1" before
    lasso: Any = {"penalty": "l1"}
    if inspect.signature(LogisticRegression).parameters["l1_ratio"].default is not None:
        lasso = {"l1_ratio": 1.0}
    model = LogisticRegression(C=penalty, solver="liblinear", fit_intercept=False, random_state=state, **lasso)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged to its tolerance: alpaca_eval takes it so too
        model.fit(
            np.vstack([features, features]),
            np.repeat([1, 0], target.size),
            sample_weight=np.concatenate([target * weight, (1 - target) * weight]),
        )
    return model.coef_[0]
