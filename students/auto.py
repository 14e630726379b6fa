"""Any checkpoint that transformers has a sequence classifier for.

One of a type that another file here reads (BERT, RoBERTa, BigBird, Longformer, DistilBERT, FNet) is read as that
file does, packed; any other runs transformers' own forward pass over padded documents, if its attention mask
hides the padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from distill import catalog
from distill.schema import Student

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from distill.batching import Batch, Padding
    from distill.packed import Taps
    from distill.tasks import TaskSpec

MINILM = "nreimers/MiniLM-L6-H384-uncased"
PRESETS = {"minilm": {"checkpoint": MINILM}}


class Config(Student):
    """The fields of a student that its checkpoint describes."""

    architecture: Literal["auto"]
    checkpoint: str = MINILM
    lengthen: bool = False
    """Make the positions reach max_length by tiling them (Beltagy et al. 2020, section 5)."""


def _reader(model: Any, config: Config) -> tuple[Any, Any] | None:
    """Find the file that reads this type of model, and what it is to be told."""
    known = catalog.reader(model.config.model_type)
    if known is None:
        return None
    module = catalog.load(*known)
    fields = {name: getattr(config, name) for name in ("checkpoint", "max_length", "engine")}
    return module, module.Config(architecture=known[1], **fields)


def padding(model: Any, config: Config) -> Padding | None:
    """Say how windows are padded: as the type's own file says, else to the longest of a batch."""
    found = _reader(model, config)
    if found is not None and hasattr(found[0], "padding"):
        own: Padding | None = found[0].padding(model, found[1])
        return own
    return None if found is not None and config.engine == "packed" else lambda _: 0


def build(config: Config, task: TaskSpec, tokenizer: Any, teacher: Path | None = None) -> Any:
    """Build from the checkpoint; the head is new where it has none of the task's width."""
    from transformers.models.auto import modeling_auto

    from distill import pretrained
    from distill.errors import RecipeError

    key = "student.checkpoint"
    found = pretrained.read_config(config.checkpoint, key)
    heads, name = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "sequence classifier"
    if task.kind == "span":
        heads, name = modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, "finder of answers"
    if found.model_type not in heads:
        raise RecipeError(
            f"{key}: {config.checkpoint} is a {found.model_type} model, which transformers has no {name} for; "
            "take an encoder such as a BERT"
        )
    model = pretrained.classifier(
        config.checkpoint, key, task, found, config.max_length, first=pretrained.reserved(found), lengthen=config.lengthen,
        **config.config,
    )  # fmt: skip
    known = _reader(model, config)
    if known is None:
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        _refuse_company(model, config, tokenizer)
    elif hasattr(known[0], "freeze_unread"):
        known[0].freeze_unread(model)
    return model


def _refuse_company(model: Any, config: Config, tokenizer: Any) -> None:
    """Refuse a model in which the padding behind a document changes its logits.

    Raises:
        RecipeError: it does, or the model cannot be run over padded documents.
    """
    import torch

    from distill import padded
    from distill.batching import collate
    from distill.encoding import encode_texts
    from distill.errors import RecipeError

    texts = ["a film", "a film about the war in which nobody says what it was about"]
    data = encode_texts(tokenizer, [[(text, None) for text in texts]], config)
    reason = "its logits depend on the padding behind a document"
    model.eval()
    try:
        with torch.no_grad():
            alone, beside = (padded.forward(model, config, collate(data, which)) for which in ([0], [0, 1]))
        hidden = torch.allclose(alone[0], beside[0], atol=1e-4)
    except (ValueError, RuntimeError) as error:
        hidden, reason = False, f"it cannot read padded documents: {str(error).splitlines()[0][:160]}"
    if not hidden:
        raise RecipeError(
            f"student.checkpoint: {config.checkpoint} is a {model.config.model_type} model, and {reason}; "
            "take another checkpoint"
        )


def forward(model: Any, config: Config, batch: Batch, taps: Taps | None = None) -> Tensor:
    """Run the classifier; logits ``(windows, classes)``. Only a type that is read packed can be tapped."""
    from distill import packed, padded

    found = _reader(model, config)
    if found is None:
        return padded.forward(model, config, batch)
    module, own = found
    return getattr(module, "forward", packed.forward)(model, own, batch, taps)


def stock(model: Any, config: Config, batch: Batch) -> Tensor:
    """Run transformers' own forward; logits ``(windows, classes)``."""
    from distill import padded

    found = _reader(model, config)
    module, own = found or (padded, config)
    return getattr(module, "stock", padded.forward)(model, own, batch)
