"""DistilBERT (Sanh et al. 2019): six layers, no segments, no pooler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from distill.schema import Student

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from distill.batching import Batch
    from distill.packed import Taps
    from distill.tasks import TaskSpec

MODEL_TYPE = "distilbert"


class Config(Student):
    """DistilBERT's fields."""

    architecture: Literal["distilbert"]
    checkpoint: str | None = "distilbert/distilbert-base-uncased"
    """null: random weights, sized by ``config``, with the teacher's vocabulary."""
    lengthen: bool = False
    """Make the positions reach max_length by tiling them (Beltagy et al. 2020, section 5)."""
    init: Literal["checkpoint", "teacher_embeddings"] = "checkpoint"
    """teacher_embeddings: random weights but for the teacher's embeddings, reduced to this width."""

    @model_validator(mode="after")
    def _one_beginning(self) -> Config:
        if self.init == "teacher_embeddings" and (self.checkpoint or self.tokenizer):
            raise ValueError(
                "init: teacher_embeddings takes the embeddings and the tokenizer from the teacher; "
                "set student.checkpoint=null, and no tokenizer"
            )
        return self


def positions(config: Any) -> int:
    """Return how many tokens a checkpoint reads."""
    return int(config.max_position_embeddings)


def build(config: Config, task: TaskSpec, tokenizer: Any, teacher: Path | None = None) -> Any:
    """Build from the checkpoint, or from scratch."""
    from transformers import DistilBertConfig

    from distill import pretrained
    from distill.students import _embeddings

    if config.checkpoint is not None:
        key = "student.checkpoint"
        found = pretrained.read_config(config.checkpoint, key, (MODEL_TYPE,))
        return pretrained.classifier(
            config.checkpoint, key, task, found, config.max_length, first=0, lengthen=config.lengthen, **config.config
        )  # fmt: skip
    fields = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": max(512, config.max_length),
        **config.config,
    }
    made = DistilBertConfig(**fields, num_labels=task.classes)
    if config.init == "teacher_embeddings":
        return _embeddings.build(
            pretrained.head(task).from_config, made, teacher, config.max_length, config.lengthen
        )
    return pretrained.head(task).from_config(made)


def forward(model: Any, config: Config, batch: Batch, taps: Taps | None = None) -> Tensor:
    """Run the classifier; logits ``(windows, classes)``, or of a head that finds spans ``(tokens, 2)``."""
    from distill import packed
    from distill.attention import Layout

    layout = Layout(batch.windows.tolist())
    layers = [_layer(block, model) for block in model.distilbert.transformer.layer]
    states = packed.embed(model, batch, layout)
    logits: Tensor
    if hasattr(model, "qa_outputs"):
        logits = model.qa_outputs(model.dropout(packed.encode(layers, states, layout, taps, whole=True)))
        return logits
    first = packed.encode(layers, states, layout, taps)
    logits = model.classifier(model.dropout(model.pre_classifier(first).relu()))
    return logits


def _layer(block: Any, model: Any) -> Any:
    """Name a layer's parts."""
    from distill.packed import Attention, Layer
    from distill.rules import Full

    own, settings = block.attention, model.config
    dropout = settings.attention_dropout if model.training else 0.0
    return Layer(
        Attention((own.q_lin, own.k_lin, own.v_lin), settings.n_heads, Full(), dropout),
        lambda context, states: block.sa_layer_norm(own.out_lin(context) + states),
        lambda states: block.output_layer_norm(block.ffn(states) + states),
        block.gradient_checkpointing,
    )
