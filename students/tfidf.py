"""TF-IDF and logistic regression: the baseline that every table shows (scikit-learn).

It reads whole documents, trains in seconds, and is hard to beat with few labels. Saved as JSON and
safetensors, since scikit-learn's own pickles run code when they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distill.schema import Student

if TYPE_CHECKING:
    from pathlib import Path

    from distill.tasks import Array, Floats, TaskSpec


class Config(Student):
    """The baseline's fields."""

    architecture: Literal["tfidf"]
    ngrams: int = Field(default=2, ge=1, le=5)
    """Words and runs of up to this many words."""
    min_documents: int = Field(default=2, ge=1)
    """A term must stand in this many training documents."""
    max_terms: int = Field(default=200_000, ge=1)
    strength: float = Field(default=10.0, gt=0)
    """Inverse of the L2 penalty (scikit-learn's C)."""


class TfIdf:
    """A fitted baseline: ``logits = tfidf(text) @ weight + bias``."""

    def __init__(self, vectorizer: Any, weight: Floats, bias: Floats, task: TaskSpec, config: Config) -> None:
        self.vectorizer = vectorizer
        self.weight = weight  # (terms, classes)
        self.bias = bias  # (classes,)
        self.task = task
        self.config = config
        self.labels = list(task.labels)

    @property
    def parameters(self) -> int:
        """Count of fitted numbers: weights, biases and inverse document frequencies."""
        return self.weight.size + self.bias.size + len(self.vectorizer.idf_)

    def logits(self, rows: Sequence[tuple[str, str | None]], tokens_per_batch: int = 16384) -> Floats:
        """Return ``(documents, classes)``."""
        import numpy as np

        return np.asarray(self.vectorizer.transform(_texts(rows)) @ self.weight + self.bias, dtype=np.float32)

    def save(self, folder: Path) -> None:
        """Write the baseline, complete or not at all."""
        import numpy as np
        from safetensors.numpy import save_file

        from distill.files import replacing_folder, write_json

        with replacing_folder(folder) as aside:
            terms = sorted(self.vectorizer.vocabulary_, key=self.vectorizer.vocabulary_.__getitem__)
            write_json(aside / "vocabulary.json", terms)
            arrays = {
                "idf": self.vectorizer.idf_.astype(np.float32),
                "weight": self.weight,
                "bias": self.bias,
            }
            save_file(
                {name: np.ascontiguousarray(a) for name, a in arrays.items()}, aside / "model.safetensors"
            )
            task = {"kind": self.task.kind, "labels": list(self.task.labels), "metric": self.task.metric}
            about = {"section": "student", "model": self.config.model_dump(mode="json"), "task": task}
            write_json(aside / "distill.json", about)


def _texts(rows: Sequence[tuple[str, str | None]]) -> list[str]:
    return [text if pair is None else f"{text} {pair}" for text, pair in rows]


def _vectorizer(config: Config, **more: Any) -> Any:
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        ngram_range=(1, config.ngrams), min_df=config.min_documents, max_features=config.max_terms,
        sublinear_tf=True, dtype=np.float32, **more,
    )  # fmt: skip


def fit(
    config: Config,
    task: TaskSpec,
    rows: Sequence[tuple[str, str | None]],
    labels: Array,
    weights: Sequence[float] | None = None,
) -> TfIdf:
    """Fit the baseline on labelled documents.

    Args:
        config: the recipe's student.
        task: single_label, multi_label (one regression a label) or regression (ridge).
        rows: (text, text_pair or None).
        labels: as in tasks.py.
        weights: of the classes, as in class_weights.py; a row counts as much in the fit as it does in the hard loss.

    Raises:
        DataError: no term stands in enough documents.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression, Ridge

    from distill.errors import DataError

    vectorizer = _vectorizer(config)
    try:
        features = vectorizer.fit_transform(_texts(rows))
    except ValueError:
        raise DataError(
            "tfidf: no term stands in min_documents documents; set student.min_documents=1"
        ) from None
    terms = features.shape[1]
    weight, bias = np.zeros((terms, task.classes), np.float32), np.zeros(task.classes, np.float32)

    def logistic(target: Array, weights: dict[int, float] | None) -> Any:
        model = LogisticRegression(C=config.strength, max_iter=1000, class_weight=weights)
        return model.fit(features, target)

    if task.kind == "regression":
        model = Ridge(alpha=1 / config.strength).fit(features, labels)
        weight[:, 0], bias[0] = model.coef_, model.intercept_
    elif task.kind == "multi_label":
        for label in range(task.classes):
            target = labels[:, label].astype(int)
            if target.min() == target.max():  # a label that never, or always, occurs: nothing to fit
                bias[label] = 10.0 if target.max() else -10.0
                continue
            model = logistic(target, None if weights is None else {1: weights[label]})
            weight[:, label], bias[label] = model.coef_[0], model.intercept_[0]
    else:
        model = logistic(labels, None if weights is None else dict(enumerate(weights)))
        if len(model.classes_) == 2:
            low, high = model.classes_
            weight[:, high], bias[high] = model.coef_[0], model.intercept_[0]
            bias[[c for c in range(task.classes) if c not in (low, high)]] = -10.0
        else:
            bias[:] = -10.0  # a class without a training row
            weight[:, model.classes_], bias[model.classes_] = model.coef_.T, model.intercept_
    return TfIdf(vectorizer, weight, bias, task, config)


def load_predictor(folder: Path) -> TfIdf:
    """Read what :meth:`TfIdf.save` wrote.

    Raises:
        DataError: it is damaged.
    """
    from safetensors.numpy import load_file

    from distill import models, pretrained, records
    from distill.errors import DataError
    from distill.tasks import TaskSpec

    about = models.read_settings(folder)
    assert about is not None, "models.load_predictor has read it"
    config = Config.model_validate(about["model"])
    task = TaskSpec(about["task"]["kind"], tuple(about["task"]["labels"]), about["task"]["metric"])
    terms = records.read(folder / "vocabulary.json", list[str])
    with pretrained.reading(f"{folder}: cannot be loaded"):
        arrays = load_file(folder / "model.safetensors")
        shapes = [arrays[name].shape for name in ("idf", "weight", "bias")]
        if shapes != [(len(terms),), (len(terms), task.classes), (task.classes,)]:
            raise DataError(f"{folder}: damaged: vocabulary, labels and weights are of different sizes")
        vectorizer = _vectorizer(config, vocabulary=terms)
        vectorizer.idf_ = arrays["idf"]
    return TfIdf(vectorizer, arrays["weight"], arrays["bias"], task, config)
