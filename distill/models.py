"""Classifiers: an architecture, its weights, its tokenizer and its window, as one thing that reads text.

Knows that architectures are files with ``Config``, ``build`` and, where they are more than BERT's full
attention, ``forward``; knows none by name. A saved folder is what ``from_pretrained`` and ``pipeline``
read, with ``distill.json`` beside for the view.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from typing_extensions import NotRequired, TypedDict

from distill import catalog, hub, packed, padded, pooling, pretrained, records
from distill.batching import Batch, Padding, collate
from distill.encoding import Tokenizer, encode_texts
from distill.errors import DataError, DistillError, RecipeError, nearest
from distill.files import replacing_folder, write_json
from distill.memory import by_parts
from distill.schema import Model
from distill.tasks import Array, Floats, Kind, TaskSpec

if TYPE_CHECKING:
    from types import SimpleNamespace

ABOUT = "distill.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""A tokenizer's folder holds at least one of them."""
RUN_CODE = frozenset(
    "attn_implementation _attn_implementation experts_implementation _experts_implementation use_kernels kernel_config "
    "trust_remote_code auto_map code_revision".split()
)
"""What no recipe hands on to transformers."""


class _Task(TypedDict):
    kind: Kind
    labels: list[str]
    metric: str
    thresholds: NotRequired[dict[str, float]]


class About(TypedDict):
    """What :meth:`Classifier.save` writes of the window and the task."""

    section: Literal["teacher", "student"]
    model: dict[str, Any]
    task: _Task


class Predictor(Protocol):
    """Whatever turns documents into logits."""

    labels: list[str]

    @property
    def parameters(self) -> int:
        """Count of fitted numbers."""

    def logits(self, rows: Sequence[tuple[str, str | None]], tokens_per_batch: int = 16384) -> Floats:
        """Return ``(documents, classes)`` for (text, text_pair or None)."""


class Classifier(nn.Module):
    """A transformers classifier that reads packed batches of documents."""

    def __init__(
        self,
        model: Any,
        config: Model,
        tokenizer: Tokenizer,
        task: TaskSpec,
        module: ModuleType | SimpleNamespace,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        self.task = task
        stock = config.engine == "stock"
        self._forward = (
            getattr(module, "stock", padded.forward) if stock else getattr(module, "forward", packed.forward)
        )
        self.padding: Padding | None = (lambda _: 0) if stock else None
        """How the forward pass pads, where it does."""
        if hasattr(module, "padding"):
            self.padding = module.padding(model, config)
        own = getattr(module, "keys", None)
        self.keys: Callable[[int], int] = partial(own, model, config) if own else lambda length: length
        """From a window's length to how many keys each of its tokens sees (see planning.py)."""

    @property
    def labels(self) -> list[str]:
        """Class names in the order of the logits."""
        return list(self.task.labels)

    @property
    def parameters_count(self) -> int:
        """Count of weights, shared ones once."""
        return sum(p.numel() for p in self.model.parameters())

    def forward(self, batch: Batch, taps: packed.Taps | None = None) -> Tensor:
        """Compute logits ``(documents, classes)``, or as in tasks.py, in fp32; those of several windows are pooled.

        ``taps`` are filled on the way, which transformers' own forward pass cannot do.
        """
        more = () if taps is None else (taps,)
        logits: Tensor = self._forward(self.model, self.config, batch, *more).float()
        return pooling.mean(logits, batch) if batch.unit_of is None else pooling.by_unit(logits, batch)

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write the folder that ``from_pretrained`` reads, complete or not at all; ``weights`` where its own are cut up."""
        with replacing_folder(folder) as aside:
            self.model.save_pretrained(aside, state_dict=weights)
            self.tokenizer.model_max_length = self.config.max_length
            self.tokenizer.save_pretrained(aside)
            section = "teacher" if self.config.architecture in catalog.names("teacher") else "student"
            write_json(
                aside / ABOUT,
                {
                    "section": section,
                    "model": self.config.model_dump(mode="json"),
                    "task": {
                        "kind": self.task.kind,
                        "labels": list(self.task.labels),
                        "metric": self.task.metric,
                    },
                },
            )


class TextReader:
    """A classifier with the text's way in: tokenise, view, batch, forward."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier.eval()
        self.labels = classifier.labels

    @property
    def parameters(self) -> int:
        """Count of weights."""
        return self.classifier.parameters_count

    def logits(self, rows: Sequence[tuple[str, str | None]], tokens_per_batch: int = 16384) -> Floats:
        """Return ``(documents, classes)``, or as in tasks.py."""
        task = self.classifier.task
        data = encode_texts(
            self.classifier.tokenizer, [rows], self.classifier.config, span=task.kind == "span"
        )
        result = data.blank(np.arange(len(rows)), task.classes)

        def work(indices: Array) -> None:
            with torch.inference_mode():
                found = self.classifier(collate(data, indices)).numpy()
            result[indices, : found.shape[1]] = found

        by_parts(self.classifier, data, np.arange(len(rows)), tokens_per_batch, work)
        return result


def quiet() -> None:
    """Silence what transformers prints beside errors: our own checks say what a user must know."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def layers(model: Any) -> nn.ModuleList:
    """Return the stack of encoder layers of any transformers encoder."""
    return next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList))


def freeze(model: Any, embeddings: bool, lowest: int) -> None:
    """Keep the embeddings, and the lowest layers, as they are.

    Raises:
        RecipeError: the model has fewer layers.
    """
    check_freeze(model, lowest)
    for part in [*([model.base_model.embeddings] if embeddings else []), *layers(model)[:lowest]]:
        part.requires_grad_(False)


def check_freeze(model: Any, lowest: int) -> None:
    """Raise RecipeError when a model has fewer layers than are to be frozen."""
    has = len(layers(model))
    if lowest > has:
        raise RecipeError(f"train.freeze_layers: {lowest} layers to freeze, and the model has {has}")


def checkpoint_activations(model: Any) -> None:
    """Compute each layer again in the backward pass, in place of keeping what it computed."""
    wish = {"use_reentrant": False}
    if hasattr(
        model, "activation_checkpointing_enable"
    ):  # newer releases of transformers warn of the old name
        model.activation_checkpointing_enable(wish)
    else:
        model.gradient_checkpointing_enable(wish)


def weights_hash(model: nn.Module) -> str:
    """Hash all weights by name and value, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_tokenizer(config: Model, section: str, teacher: Path | None = None) -> Tokenizer:
    """Load the tokenizer that a recipe's section names: its own, its checkpoint's or its teacher's."""
    quiet()
    name = config.tokenizer or config.checkpoint
    if name is None:
        if teacher is None:
            raise RecipeError(
                f"{section}.tokenizer is missing; without a checkpoint it says where the tokenizer is"
            )
        with pretrained.reading(f"{section}.tokenizer: {teacher}"):
            return pretrained.tokenizer_of(teacher)
    key = f"{section}.tokenizer" if config.tokenizer else f"{section}.checkpoint"
    where = hub.checkpoint(name, key) if not Path(name).is_dir() else name
    if Path(where).is_dir() and not any((Path(where) / file).is_file() for file in TOKENIZER_FILES):
        raise DataError(
            f"{key}: {name} holds no tokenizer; there must be one of {', '.join(TOKENIZER_FILES)}"
        )
    with pretrained.reading(f"{key}: no tokenizer in {name}"):
        return pretrained.tokenizer_of(where)


def build(config: Model, section: str, task: TaskSpec, seed: int, teacher: Path | None = None) -> Classifier:
    """Make a classifier that is to be trained.

    Args:
        config: the recipe's section.
        section: ``"teacher"`` or ``"student"``.
        task: gives the head its width and its names.
        seed: of the weights that no checkpoint gives.
        teacher: the teacher's model folder, for students that take something from it.

    Raises:
        RecipeError: the checkpoint is of another architecture or reads fewer tokens than max_length, or ``config``
            has a field that the architecture does not have, or a value that it does not take.
        HubError: the checkpoint is neither here nor reachable.
    """
    tokenizer = load_tokenizer(config, section, teacher)
    torch.manual_seed(seed)
    model = construct(config, section, task, tokenizer, teacher)
    model.config.id2label = dict(enumerate(task.labels))
    model.config.label2id = {name: number for number, name in enumerate(task.labels)}
    model.config.problem_type = task.problem_type
    return Classifier(model, config, tokenizer, task, catalog.load(section, config.architecture))


def construct(
    config: Model, section: str, task: TaskSpec, tokenizer: Tokenizer, teacher: Path | None = None
) -> Any:
    """Make transformers' model of an architecture, and refuse a configuration that it cannot have.

    Args and Raises: as in :func:`build`.
    """
    from huggingface_hub.errors import StrictDataclassError

    module = catalog.load(section, config.architecture)
    for field in sorted(RUN_CODE & set(config.config)):
        raise RecipeError(
            f"{section}.config: {field} can have transformers fetch code and run it; leave it out"
        )
    try:
        model = module.build(config, task, tokenizer, teacher)
    except (TypeError, ValueError, StrictDataclassError) as error:
        if not config.config:
            raise
        raise RecipeError(f"{section}.config: {' '.join(str(error).split())[:200]}") from None
    fields = {*type(model.config)().to_dict(), *model.config.attribute_map} if config.config else set()
    for field in config.config:
        if field not in fields:
            raise RecipeError(
                f"{section}.config: a {model.config.model_type} has no {field!r}{nearest(field, fields)}"
            )
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if table is not None:
        reserved = getattr(embeddings, "padding_idx", -1) + 1
        pretrained.check_length(config.max_length, table.num_embeddings - reserved, section)
    return model


def read_settings(folder: Path | str) -> About | None:
    """Read what :meth:`Classifier.save` wrote of the window and the task; None for models from elsewhere.

    Raises:
        DataError: it is damaged.
    """
    path = Path(folder) / ABOUT
    if not path.is_file():
        return None
    about = records.read(path, About)
    known, given = set(about["task"]["labels"]), about["task"].get("thresholds")
    if given is not None and set(given) != known:
        name = min(known ^ set(given))
        raise DataError(f"{folder}/{ABOUT}: damaged: thresholds and labels differ ({name:.60})")
    return about


def own_config(about: About, folder: Path | str) -> Model:
    """Read how a model of ours reads.

    Raises:
        DataError: its ``distill.json`` does not fit its architecture.
    """
    try:
        module = catalog.load(about["section"], str(about["model"].get("architecture")))
        config: Model = module.Config.model_validate(about["model"])
    except ValidationError as error:
        raise DataError(f"{folder}/{ABOUT}: damaged: model: {records.explain(error)}") from None
    except RecipeError as error:
        raise DataError(f"{folder}/{ABOUT}: {error}") from None
    return config


def _foreign(folder: Path | str, config: Any, kind: Kind) -> tuple[Model, ModuleType | None]:
    """Describe a classifier that was not trained here, by its transformers configuration."""
    view: Literal["chunks", "head"] = "chunks" if kind == "span" else "head"
    known = catalog.reader(config.model_type)
    if known is not None:
        module = catalog.load(*known)
        length = min(module.positions(config), 1 << 20)
        return module.Config(
            architecture=known[1], checkpoint=str(folder), max_length=length, view=view
        ), module
    length = int(getattr(config, "max_position_embeddings", 512))
    return Model(
        architecture=config.model_type, checkpoint=str(folder), max_length=length, view=view, engine="stock"
    ), None


def load(folder: Path | str, config: Model | None = None) -> Classifier:
    """Load a fine-tuned classifier: a run's ``model/``, or any folder or hub id that transformers reads.

    Args:
        folder: the folder or hub id.
        config: how it reads; what the folder says where absent.

    Raises:
        DataError: no classifier is there, or some of its weights are not.
    """
    from types import SimpleNamespace

    quiet()
    about = read_settings(folder)
    module: ModuleType | SimpleNamespace | None = None
    if about:
        own = own_config(about, folder)
        module = catalog.load(about["section"], own.architecture)
        if hasattr(module, "register"):  # a type of our own
            module.register()
    with pretrained.reading(f"{folder}: cannot be loaded"):
        hf_config = pretrained.config_of(folder)
        finds = any("QuestionAnswering" in a for a in hf_config.architectures or [])
        if not (about or finds or any("SequenceClassification" in a for a in hf_config.architectures or [])):
            raise DataError(
                f"{folder}: not a fine-tuned classifier ({', '.join(hf_config.architectures or ['?'])})"
            )
        if about:
            task = TaskSpec(about["task"]["kind"], tuple(about["task"]["labels"]), about["task"]["metric"])
        elif finds:
            own, module = _foreign(folder, hf_config, "span")
            task = TaskSpec("span", ("start", "end"), "f1")
        else:
            own, module = _foreign(folder, hf_config, "single_label")
            names = tuple(hf_config.id2label[i] for i in range(hf_config.num_labels))
            kinds: dict[str, Kind] = {"multi_label_classification": "multi_label", "regression": "regression"}
            task = TaskSpec(kinds.get(str(hf_config.problem_type), "single_label"), names, "nll")
        model, info = pretrained.load(pretrained.head(task), folder)
        tokenizer = pretrained.tokenizer_of(folder)
    if model.config.num_labels != task.classes:
        raise DataError(
            f"{folder}: its head has {model.config.num_labels} labels, and {ABOUT} {task.classes}"
        )
    if info["missing_keys"]:
        # transformers fills them with random numbers: such a classifier answers, and answers nonsense.
        lost = sorted(info["missing_keys"])
        raise DataError(f"{folder}: lacks {len(lost)} of the model's weights, {lost[0]} among them")
    return Classifier(
        model, config or own, tokenizer, task, module or SimpleNamespace(forward=padded.forward)
    ).eval()


def load_predictor(folder: Path) -> Predictor:
    """Load any finished run's ``model/`` folder, transformers or not, for reading texts.

    Raises:
        DistillError: there is no model in the folder.
    """
    about = read_settings(folder)
    if about is not None:
        module = catalog.load(about["section"], own_config(about, folder).architecture)
        if hasattr(module, "load_predictor"):
            predictor: Predictor = module.load_predictor(folder)
            return predictor
    if not folder.is_dir():
        raise DistillError(f"{folder.parent.name} has no model yet; has it finished?")
    return TextReader(load(folder))
