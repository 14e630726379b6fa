"""What a recipe can say: its sections, their keys, types and defaults. Knows no file, no data and no torch.

The fields of an architecture's own (a window, a block size) are declared in its file in ``teachers/`` or
``students/``, as a class that adds to ``Teacher`` or ``Student``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    field_validator,
    model_validator,
)

from distill import yaml_strict
from distill.errors import nearest

Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """Unknown keys and wrong types are errors; a recipe does not change once it is read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _twice(names: Sequence[str]) -> str | None:
    """Return a name that stands in the list more than once."""
    return next((name for at, name in enumerate(names) if name in names[:at]), None)


class Task(Strict):
    """What is predicted."""

    kind: Literal["single_label", "multi_label", "regression", "span"] = "single_label"
    """span: the answer to the question in data.text is a stretch of data.text_pair, or none (see spans.py)."""
    labels: Annotated[list[str], Field(min_length=1)] | None = None
    """Class names in the order of their numbers; found in the data where absent."""
    metric: str | None = None
    """What selects the best checkpoint; the task's usual one where absent (see tasks.py)."""
    class_weights: str | dict[str, Annotated[float, Field(gt=0)]] = "none"
    """Of the hard loss and TF-IDF: none, balanced, or numbers by label, 1 where absent (see class_weights.py)."""
    thresholds: Literal["half", "fitted"] = "half"
    """From which probability on a label of a multi-label task is given (see thresholds.py)."""

    @field_validator("class_weights", mode="before")
    @classmethod
    def _form(cls, value: Any) -> Any:
        if not isinstance(value, dict) and value not in ("none", "balanced"):
            raise ValueError("must be none, balanced or numbers by label")
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> Task:
        twice = _twice(self.labels or [])
        if twice is not None:
            raise ValueError(f"labels holds {twice!r} twice")
        if self.thresholds != "half" and self.kind != "multi_label":
            raise ValueError(f"thresholds: {self.thresholds} needs kind: multi_label, not {self.kind}")
        if self.class_weights != "none" and self.kind in ("regression", "span"):
            raise ValueError(f"class_weights has no meaning for kind: {self.kind}")
        if self.labels is not None and self.kind == "span":
            raise ValueError(
                "labels has no meaning for kind: span; data.label names the column of the answers"
            )
        if self.labels is not None and self.kind == "regression":
            raise ValueError("labels: a number to predict has no classes; leave labels out")
        if isinstance(self.class_weights, dict) and self.labels is not None:
            for name in self.class_weights:
                if name not in self.labels:
                    raise ValueError(f"class_weights: no label {name!r}{nearest(name, self.labels)}")
        return self


class Split(Strict):
    """One split: a split of the source, or a part of one."""

    source: str = Field(alias="from", default="train")
    rows: Count | None = None
    """Take this many rows, stratified by label; all that others leave where absent."""
    fraction: Fraction | None = None
    """Take this share of the rows instead."""

    @model_validator(mode="after")
    def _one_size(self) -> Split:
        if self.rows is not None and self.fraction is not None:
            raise ValueError("give rows or fraction, not both")
        return self


class Splits(Strict):
    """The uses of rows. ``transfer`` is text for the student alone: its labels are never read."""

    train: Split = Split()
    validation: Split = Split.model_validate({"from": "train", "fraction": 0.1})
    test: Split = Split.model_validate({"from": "test"})
    test_other: Split | None = None
    """A second test split, reported beside the first: rows of another kind (MNLI's other genres)."""
    transfer: Split | None = None


class Unlabelled(Strict):
    """A source of unlabelled text that joins the transfer set."""

    source: str
    """As data.source, or a .txt file with one document a line; of a hub data set, its split train. A csv is read
    with data.columns and data.quotes. Several .parquet files: their folder, or ``folder/train-*.parquet``."""
    text: str | None = None
    """The text's column; that of data.text where absent."""
    rows: Count | None = None
    """Draw this many of its documents; all of them where absent."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often a document is drawn in an epoch of a student's training; rows of data.source are drawn once."""
    streaming: bool = False
    """Hold neither its text nor its token ids in memory, and make no copy of it on disk (see streams.py). It is read
    anew for each model that reads it; what is learned stays the same to the bit."""


class Augment(Strict):
    """Copies of documents with words left out or replaced, that join the transfer set (see augmentation.py)."""

    source: list[Literal["train", "transfer"]] = Field(alias="from", default=["train"], min_length=1)
    """Whose documents are copied; transfer: those of splits.transfer and of data.transfer."""
    copies: Count = 4
    """Of each document; those that turn out blank, as they were, or alike are left out."""
    delete: Share = 0.1
    """The share of words that is left out, in the place of Tang et al.'s masks."""
    replace: Share = 0.1
    """The share of words that is replaced by a near one; a word that is none of the vocabulary's stays."""
    neighbours: Count = 10
    """Among how many of the nearest words the one is drawn."""
    ngram: Share = 0.25
    """The share of copies of which a few words in a row are kept and no more."""
    longest_ngram: Count = 5
    """How many words these are at most; more may suit long documents."""
    checkpoint: str | None = None
    """Whose table of embeddings says which words are near; the teacher's checkpoint where absent, and the
    student's where that has none. The teacher's is one for all its students: only runs of the same rows compare."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often a copy is drawn in an epoch of a student's training; rows of data.source are drawn once."""
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _something_changes(self) -> Augment:
        twice = _twice(self.source)
        if twice is not None:
            raise ValueError(f"from holds {twice!r} twice")
        if self.delete + self.replace > 1:
            raise ValueError(
                "delete and replace are shares of the same words, and must not exceed 1 together"
            )
        if self.delete == self.replace == self.ngram == 0:
            raise ValueError("delete, replace and ngram are all 0, so that no copy would differ")
        return self


class Data(Strict):
    """Where rows come from and which of their columns matter."""

    source: str | dict[str, str]
    """A file, a folder of class folders or of .parquet files, ``folder/train-*.parquet``, ``package://name/path``, or a
    hub id; or one for each split."""
    config: str | None = None
    """The configuration of a hub data set."""
    format: Literal["auto", "csv", "tsv", "jsonl", "parquet", "folder", "hub"] = "auto"
    columns: list[str] | None = None
    """Column names of a csv or tsv without a header line."""
    quotes: bool = True
    """Whether quotes in a csv or tsv have a meaning (in GLUE's tsv files they are literal)."""
    text: str = "text"
    text_pair: str | None = None
    label: str | Annotated[list[str], Field(min_length=1)] = "label"
    """The label's column; several columns of 0 and 1 for a multi-label task. For spans one of mappings as in SQuAD,
    ``{"text": ["Paris"], "answer_start": [12]}`` in characters, with empty lists where there is no answer."""
    label_separator: str | None = None
    """What stands between the labels in one column of a multi-label task."""
    where: dict[str, str | int | float | bool | list[str | int | float | bool]] = {}
    """Keep only rows whose column has this value, or one of these."""
    min_words: Count | None = None
    max_words: Count | None = None
    blank: Literal["drop", "refuse"] = "drop"
    """What to do with documents of white space only."""
    deduplicate: bool = True
    """Drop from the less held-out split what stands in test, validation or train as well."""
    splits: Splits = Splits()
    transfer: list[Unlabelled] = []
    """Unlabelled text from elsewhere, beside ``splits.transfer``; ``where`` is not for it."""
    augment: Augment | None = None
    """More unlabelled text, made of the rows themselves; not for the control, which learns from labels alone."""
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _columns_differ(self) -> Data:
        for key, names in (("label", self.label), ("columns", self.columns)):
            twice = _twice(names) if isinstance(names, list) else None
            if twice is not None:
                raise ValueError(f"{key} holds {twice!r} twice")
        if self.text_pair == self.text:
            raise ValueError(f"text and text_pair are both {self.text!r}; a pair is of two columns")
        return self


class Train(Strict):
    """How a model is trained. Sizes are of the whole job, over all processes, but for tokens_per_batch."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: Count | None = None
    batch_size: Count = 32
    """Documents an optimizer step; micro-batches and accumulation follow from tokens_per_batch."""
    tokens_per_batch: Annotated[int, Field(ge=64)] = 8192
    """Tokens of one forward pass of one process, padding included: what fits the memory. Halved where it does not."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware multiplies it, else fp16 on a GPU, else fp32."""
    gradient_checkpointing: bool = False
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    freeze_embeddings: bool = False
    freeze_layers: Annotated[int, Field(ge=0)] = 0
    """How many of the lowest layers stay as they are."""
    evaluate_every: Count | None = None
    """Optimizer steps between two evaluations (and checkpoints); an epoch where absent."""
    patience: Count | None = None
    """Stop after this many evaluations without a better one."""
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    """Leave out this many steps at most whose loss or gradient is not finite; the next one ends the run."""
    log_gradient_norms: bool = False
    """Write ``train/gradient_norm_<term>`` beside each ``train/loss_<term>``: the norm of the unweighted term's
    gradient by all trained weights, before clipping. Costs one more backward pass and one copy of the
    gradients for each term at the steps that are logged, every tenth and those evaluated, and nothing at the
    others: about 7 % of a run's time a term. What is trained stays the same to the bit."""
    seed: Annotated[int, Field(ge=0)] = 0


class Model(Strict):
    """What every architecture has."""

    architecture: str
    checkpoint: str | None = None
    """A hub id, a folder or ``package://name/path``; absent: random weights, sized by ``config``."""
    tokenizer: str | None = None
    """Where the tokenizer is, when not beside the checkpoint."""
    config: dict[str, Any] = {}
    """Fields of the transformers configuration to set."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of one window, special ones included."""
    view: Literal["head", "tail", "head_tail", "chunks"] = "head"
    """How a document longer than max_length is read (see views.py)."""
    max_windows: Count = 8
    """With ``chunks``: at most this many windows, the first ones."""
    overlap: Annotated[int, Field(ge=0)] = 0
    """With ``chunks``: tokens that neighbouring windows share."""
    engine: Literal["packed", "stock"] = "packed"
    """packed: without padding (see packed.py); stock: transformers' own forward pass, for comparison."""
    train: Train = Train()

    @model_validator(mode="after")
    def _overlap_fits(self) -> Model:
        if self.overlap >= self.max_length // 2:
            raise ValueError("overlap must be less than half of max_length")
        return self


class Teacher(Model):
    """A teacher; each file in ``teachers/`` adds its own fields."""

    lengthen: bool = False
    """Make the checkpoint's positions reach max_length by tiling them (Beltagy et al. 2020, section 5)."""


class Schedule(Strict):
    """A number that moves with the run's steps: ``{start: 1.0, end: 0.2, shape: linear, until: 0.5}``.

    It is ``start`` at the first step, ``end`` at the last step of the share ``until``, and stays there.
    """

    start: Annotated[float, Field(ge=0)]
    end: Annotated[float, Field(ge=0)]
    shape: Literal["linear", "cosine"] = "linear"
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of the run's steps in which it moves."""


def _which(value: Any) -> str:
    return "[schedule]" if isinstance(value, dict | Schedule) else "[number]"


# The tags keep an error to the one form that was written; _explain leaves parts with brackets out.
Scheduled = Annotated[
    Annotated[float, Field(ge=0), Tag("[number]")] | Annotated[Schedule, Tag("[schedule]")],
    Discriminator(_which),
]


def _form(value: Any) -> str:
    return "[pairs]" if isinstance(value, list) else "[name]"


_Pair = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]
LayerMap = Annotated[
    Annotated[Literal["uniform", "last"], Tag("[name]")]
    | Annotated[list[_Pair], Field(min_length=1), Tag("[pairs]")],
    Discriminator(_form),
]


class Loss(Strict):
    """One term of a student's objective (see losses.py).

    hard: the labels; rows without one have no such term.
    soft: the teacher's softened probabilities, by the task's own softmax or sigmoid.
    mse_logits: the teacher's logits.
    dkd: the teacher's probability of the label, and how it shares out the rest among the other classes, weighed
    apart; for single_label alone, and absent on rows without a label, as the hard term is.
    cosine: the direction of the last layer's states.
    hidden_mse: the states of several layers.
    relation: how alike the queries of a window's tokens are among themselves, the keys, and the values, in the
    student's last layer.
    attention: where the heads of several layers look; for documents that both models read with full attention.

    The last four compare the two models from inside, so that the teacher runs beside the student (see live.py):
    it reads the student's windows, and must have its tokenizer and room for its max_length. That makes a step
    several times as long. Such a term is a mean over a document's tokens and over its layers.
    """

    kind: Literal["hard", "soft", "mse_logits", "dkd", "cosine", "hidden_mse", "relation", "attention"]
    weight: Scheduled = 1.0
    """A number, or a schedule of it."""
    temperature: Scheduled = 1.0
    """Of soft and dkd: a number above 0, or a schedule of it."""
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Of dkd: the weight of the label's class against all others together."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Of dkd: the weight of the other classes among themselves; published settings have 0.5 to 8. With two
    classes there is one other, and nothing to share out."""
    layer_map: LayerMap = "uniform"
    """Of hidden_mse and attention: which layer of the student learns from which of the teacher. uniform: layer m
    of M from layer m·N/M of N, rounded, embeddings (layer 0) included; last: the last from the last; or pairs,
    ``[[student, teacher], …]``. Layers are counted from 1."""
    project: bool = True
    """Of cosine and hidden_mse: bridge unequal widths by a learned matrix, one for all layers of the term, that
    is thrown away after training; without it they are refused."""
    teacher_layer: Count | None = None
    """Of relation: the teacher's layer, counted from 1; its last where absent. (Of a Longformer the one before
    may be better: its classifier does not read the last layer's projections of local tokens.)"""
    relation_heads: Count = 16
    """Of relation: into how many parts queries, keys and values are split; must divide both models' widths, and
    need not be the attention heads. More parts are finer relations."""
    distance: Literal["kl", "mse"] = "kl"
    """Of attention: kl, of the softmaxed maps; mse, of the scores before the softmax."""

    @property
    def needs_label(self) -> bool:
        """Whether rows without a label lack this term."""
        return self.kind in ("hard", "dkd")

    @property
    def needs_teacher(self) -> bool:
        """Whether this term learns from a teacher, by its logits or live."""
        return self.kind != "hard"

    @property
    def needs_live(self) -> bool:
        """Whether this term needs the teacher itself, running beside the student."""
        return self.kind in ("cosine", "hidden_mse", "relation", "attention")

    @property
    def needs_logits(self) -> bool:
        """Whether this term reads the teacher's logits."""
        return self.needs_teacher and not self.needs_live

    @model_validator(mode="after")
    def _numbers_mean_something(self) -> Loss:
        if self.kind not in ("soft", "dkd") and self.temperature != 1.0:
            raise ValueError(f"only soft and dkd have a temperature, not {self.kind}")
        if self.kind != "dkd" and (self.alpha, self.beta) != (1.0, 1.0):
            raise ValueError(f"only dkd has alpha and beta, not {self.kind}")
        own = {
            "layer_map": ("hidden_mse", "attention"),
            "project": ("cosine", "hidden_mse"),
            "teacher_layer": ("relation",),
            "relation_heads": ("relation",),
            "distance": ("attention",),
        }
        for name, kinds in own.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is of {' and '.join(kinds)}, not of {self.kind}")
        pairs = self.layer_map if isinstance(self.layer_map, list) else []
        if self.kind == "attention" and any(0 in pair for pair in pairs):
            raise ValueError("layer_map: the embeddings (0) have no attention")
        moved = self.temperature
        if not (moved if isinstance(moved, float) else min(moved.start, moved.end)):
            raise ValueError("temperature must be greater than 0")
        return self


class Student(Model):
    """A student; each file in ``students/`` adds its own fields."""

    losses: Annotated[list[Loss], Field(min_length=1)] = [
        Loss(kind="soft", temperature=2.0),
        Loss(kind="hard", weight=0.5),
    ]
    ensemble: Literal["mean_logits", "mean_log_probs"] = "mean_logits"
    """How several teachers' logits become one target."""
    calibrate: bool = False
    """Divide the target's logits by the temperature that gives the validation labels the least NLL, before any
    term reads them (Guo et al. 2017); a term's own temperature comes on top. Not for regression
    and spans."""

    @model_validator(mode="after")
    def _something_weighs(self) -> Student:
        if not any(w if isinstance(w, float) else w.start or w.end for w in (t.weight for t in self.losses)):
            raise ValueError("losses: every weight is 0, so that nothing would be learned")
        return self

    @property
    def reads_unlabelled(self) -> bool:
        """Whether a term of its objective goes without labels."""
        return not all(term.needs_label for term in self.losses)


class Cache(Strict):
    """How logits are written down."""

    tokens_per_shard: Count = 1048576
    """What a pass that is killed loses of each process at most; fewer where the processes would not have one each."""
    rows_per_shard: Count = 4096
    """A shard of short documents ends here."""
    tokens_per_batch: Annotated[int, Field(ge=64)] = 16384
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    dtype: Literal["float32", "float16"] = "float32"
    splits: list[Literal["train", "validation", "transfer"]] = ["train", "validation", "transfer"]


class Evaluation(Strict):
    """How a finished model is measured."""

    length_buckets: list[Count] = [100, 200, 400, 800]
    """Edges, in words, of the groups of documents that are reported apart."""
    tokens_per_batch: Annotated[int, Field(ge=64)] = 16384


def _masked_terms(settings: dict[str, Any]) -> list[Loss]:
    """Take the published weights where there is a teacher (Sanh et al. 2019)."""
    if settings.get("teacher") is None:
        return [Loss(kind="hard")]
    return [
        Loss(kind="soft", weight=5.0, temperature=2.0),
        Loss(kind="hard", weight=2.0),
        Loss(kind="cosine"),
    ]


class Pretraining(Strict):
    """Masked-language-model pre-training of the student (see pretraining.py), before it learns the task."""

    teacher: str | None = None
    """A masked language model that runs beside the student on the same masked windows: a run of distill pretrain,
    a folder, ``package://name/path`` or a hub id. It must have the student's vocabulary, and room for its
    max_length."""
    losses: Annotated[list[Loss], Field(min_length=1)] = Field(default_factory=_masked_terms)
    """hard: what was masked. soft: the teacher's softened probabilities of the vocabulary, at the predicted tokens.
    cosine: the direction of the last layer's states, of all tokens. With a teacher: soft (weight 5, temperature 2),
    hard (2) and cosine (1), as DistilBERT was made; without one hard alone."""
    corpus: list[str] = []
    """Sources of text beside the recipe's train and transfer rows: as data.source, or a .txt file with one
    document a line; their text's column is data.text."""
    masked: Annotated[float, Field(gt=0, le=0.4)] = 0.15
    """The share of a window's tokens that is predicted (Devlin et al. 2019)."""
    train: Train = Train(
        epochs=10.0, batch_size=128, tokens_per_batch=16384, learning_rate=5e-4, warmup_steps=500
    )
    """Documents here are windows of student.max_length tokens."""

    @model_validator(mode="after")
    def _without_labels(self) -> Pretraining:
        if self.train.label_smoothing:
            raise ValueError("train.label_smoothing has no meaning for pretraining")
        return self

    @model_validator(mode="after")
    def _terms_fit(self) -> Pretraining:
        for number, term in enumerate(self.losses):
            if term.kind not in ("soft", "hard", "cosine"):
                raise ValueError(
                    f"losses.{number}: {term.kind} has no meaning for pretraining; take soft, hard or cosine"
                )
            if term.needs_teacher and self.teacher is None:
                raise ValueError(f"losses.{number}: {term.kind} needs a teacher; set pretraining.teacher")
        if self.teacher is not None and not any(term.needs_teacher for term in self.losses):
            raise ValueError("no term of losses learns from the teacher; add soft or cosine")
        return self


class Recipe(Strict):
    """A whole run, resolved: every default written out."""

    description: str
    experiment: str = "distill"
    """The MLflow experiment."""
    task: Task = Task()
    data: Data
    teacher: SerializeAsAny[Teacher]
    cache: Cache = Cache()
    student: SerializeAsAny[Student]
    pretraining: Pretraining = Pretraining()
    evaluation: Evaluation = Evaluation()

    def dump(self) -> str:
        """Write the recipe as YAML, all defaults included; reading it gives the same recipe."""
        return yaml_strict.dump(self.model_dump(mode="json", by_alias=True))

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        views = {self.teacher.view, self.student.view}
        if self.data.text_pair and self.task.kind != "span" and views != {"head"}:
            raise ValueError("text pairs are read with view: head")
        if isinstance(self.data.label, list) and self.task.kind != "multi_label":
            raise ValueError(f"several label columns need task.kind: multi_label, not {self.task.kind}")
        if self.data.label_separator is not None and self.task.kind != "multi_label":
            raise ValueError(f"data.label_separator needs task.kind: multi_label, not {self.task.kind}")
        for section, model in (("teacher", self.teacher), ("student", self.student)):
            if self.task.kind in ("regression", "span") and model.train.label_smoothing:
                raise ValueError(
                    f"{section}.train.label_smoothing has no meaning for task.kind: {self.task.kind}"
                )
        return self

    @model_validator(mode="after")
    def _spans_can_be_read(self) -> Recipe:
        if self.task.kind != "span":
            return self
        if self.data.text_pair is None:
            raise ValueError(
                "task.kind: span looks for an answer in a second text; set data.text=question and data.text_pair=context"
            )
        if self.data.augment is not None:
            raise ValueError(
                "data.augment leaves words out, the question's and the answer's too: not for task.kind: span"
            )
        for section, model in (("teacher", self.teacher), ("student", self.student)):
            if model.architecture == "tfidf":
                raise ValueError(
                    "student.architecture: tfidf finds no spans; take a student that reads tokens"
                )
            if model.view != "chunks":
                raise ValueError(
                    f"{section}.view: {model.view} would not read all of a context; task.kind: span needs view: chunks"
                )
            if model.max_length < 16 or 3 * model.overlap >= model.max_length:
                raise ValueError(
                    f"{section}.overlap: must be less than a third of max_length, and that 16 or more, for task.kind: "
                    "span: a question may take another third"
                )
            if model.engine == "stock":
                raise ValueError(f"{section}.engine: stock finds no spans; take engine: packed")
        for number, term in enumerate(self.student.losses):
            if term.kind not in ("hard", "soft"):
                raise ValueError(
                    f"student.losses.{number}: {term.kind} is not for task.kind: span; take kind: soft"
                )
        return self

    @model_validator(mode="after")
    def _augmentation_fits(self) -> Recipe:
        augment = self.data.augment
        if augment is None:
            return self
        if not self.student.reads_unlabelled:
            raise ValueError(
                "data.augment: its copies have no labels, and every term of student.losses needs one; "
                "add a term such as kind: soft, or leave data.augment out"
            )
        tables = (augment.checkpoint, self.teacher.checkpoint, self.student.checkpoint)
        if augment.replace and not any(tables):
            raise ValueError(
                "data.augment.replace: a checkpoint's embeddings say which words are near, and neither teacher nor "
                "student has one; set data.augment.replace=0, or data.augment.checkpoint"
            )
        return self

    @model_validator(mode="after")
    def _targets_fit_the_task(self) -> Recipe:
        for number, term in enumerate(self.student.losses):
            if term.kind == "dkd" and self.task.kind != "single_label":
                raise ValueError(
                    f"student.losses.{number}: dkd needs one right class for each row, which task.kind: "
                    f"{self.task.kind} does not have; take kind: soft"
                )
            missing = {"tfidf": "tfidf has no layers", "stock": "engine: stock shows no layers"}
            for found in (self.student.architecture, self.student.engine):
                if term.needs_live and found in missing:
                    raise ValueError(
                        f"student.losses.{number}: {term.kind} compares layers, and {missing[found]}; "
                        "take kind: soft" + (", or engine: packed" if found == "stock" else "")
                    )
        if self.student.calibrate and self.task.kind in ("regression", "span"):
            raise ValueError(f"student.calibrate has no meaning for task.kind: {self.task.kind}")
        if self.student.calibrate and "validation" not in self.cache.splits:
            raise ValueError(
                "student.calibrate needs the teacher's logits of validation; add it to cache.splits"
            )
        transfer = bool(self.data.splits.transfer or self.data.transfer) and self.student.reads_unlabelled
        for name in ("train", *(["transfer"] if transfer else [])):
            if name not in self.cache.splits and any(term.needs_logits for term in self.student.losses):
                raise ValueError(
                    f"student.losses need the teacher's logits of {name}; add it to cache.splits"
                )
        return self
