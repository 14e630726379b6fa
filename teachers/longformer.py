"""Longformer (Beltagy et al. 2020): a sliding window of keys, and global tokens that see everything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from distill.errors import RecipeError
from distill.schema import Teacher

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from distill.batching import Batch
    from distill.packed import Taps
    from distill.tasks import TaskSpec

MODEL_TYPE = "longformer"


class Config(Teacher):
    """Longformer's fields."""

    architecture: Literal["longformer"]
    window: int | list[int] = 512
    """Tokens that one token sees, half of them on each side; one number, or one for each layer."""
    global_tokens: int = Field(default=1, ge=1)
    """How many tokens at the beginning see all and are seen by all; the first one is classified. For spans give it
    what a question takes: transformers' own forward pass makes all of that global, and finds its end by RoBERTa's three
    separators."""

    @model_validator(mode="after")
    def _even(self) -> Config:
        windows = self.window if isinstance(self.window, list) else [self.window]
        if not windows or any(w < 4 or w % 2 for w in windows):
            raise ValueError("window must be even and at least 4: half of it lies on each side")
        if any(max(windows) % w for w in windows):
            raise ValueError("window: the widest must be a multiple of each other one")
        return self


def positions(config: Any) -> int:
    """Return how many tokens a checkpoint reads."""
    return int(config.max_position_embeddings) - int(config.pad_token_id) - 1


def keys(model: Any, config: Config, length: int) -> int:
    """Return how many keys a token of a window sees, on an average of the layers."""
    widths: list[int] = model.config.attention_window
    return min(length, sum(widths) // len(widths) + 1 + config.global_tokens)


def build(config: Config, task: TaskSpec, tokenizer: Any, teacher: Path | None = None) -> Any:
    """Build from a Longformer checkpoint, from a BERT or RoBERTa one made long, or from ``config``."""
    model = _build(config, task, tokenizer)
    freeze_unread(model)
    return model


def freeze_unread(model: Any) -> None:
    """Leave the last layer's local projections out of training: only the global tokens' own are read there.

    Several processes would wait for gradients of the others. A head that finds spans reads every token.
    """
    if hasattr(model, "qa_outputs"):
        return
    last = model.longformer.encoder.layer[-1].attention.self
    for part in (last.query, last.key, last.value):
        part.requires_grad_(False)


def _build(config: Config, task: TaskSpec, tokenizer: Any) -> Any:
    import torch
    from transformers import LongformerConfig

    from distill import pretrained
    from distill.teachers import _lengthen

    key = "teacher.checkpoint"

    def windows(depth: int) -> list[int]:
        result = config.window if isinstance(config.window, list) else [config.window] * depth
        if len(result) != depth:
            raise RecipeError(f"teacher.window has {len(result)} numbers, and the model has {depth} layers")
        return result

    if config.checkpoint is None:
        base = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "sep_token_id": tokenizer.sep_token_id,
        }
        made = LongformerConfig(**{**base, **config.config}, num_labels=task.classes)
        made.attention_window = windows(made.num_hidden_layers)
        if "max_position_embeddings" not in config.config:
            made.max_position_embeddings = config.max_length + made.pad_token_id + 1
        pretrained.check_length(config.max_length, positions(made), "teacher")
        return pretrained.head(task).from_config(made)
    found = pretrained.read_config(config.checkpoint, key, (MODEL_TYPE, *_lengthen.SHORT_TYPES))
    if found.model_type == MODEL_TYPE and (not config.lengthen or config.max_length <= positions(found)):
        pretrained.check_length(config.max_length, positions(found), "teacher", may_lengthen=True)
        fields = {"attention_window": windows(found.num_hidden_layers), **config.config}
        return pretrained.from_checkpoint(pretrained.head(task), config.checkpoint, key, task, **fields)
    encoder = _lengthen.encoder(config, found)
    pad = int(encoder.fields["pad_token_id"])
    # Longformer numbers its tokens from pad + 1 on, and has no pooler.
    positions_table = torch.cat(
        [encoder.positions.new_zeros(pad + 1, encoder.positions.shape[1]), encoder.positions]
    )
    made = LongformerConfig(
        **{
            **encoder.fields,
            "attention_window": windows(encoder.fields["num_hidden_layers"]),
            "max_position_embeddings": len(positions_table),
            "sep_token_id": tokenizer.sep_token_id,
            **config.config,
        },
        num_labels=task.classes,
    )
    weights = {n: w for n, w in encoder.weights.items() if not n.startswith("pooler.")}
    for name in [n for n in weights if ".attention.self." in n]:
        for kind in ("query", "key", "value"):
            if f".{kind}." in name:
                weights.setdefault(name.replace(f".{kind}.", f".{kind}_global."), weights[name].clone())
    weights["embeddings.position_embeddings.weight"] = positions_table
    model = pretrained.head(task).from_config(made)
    pretrained.fill(model, {f"longformer.{n}": w for n, w in weights.items()}, config.checkpoint, key)
    return model


def forward(model: Any, config: Config, batch: Batch, taps: Taps | None = None) -> Tensor:
    """Run the classifier with the first tokens global; logits ``(windows, classes)``."""
    from distill import packed, rules

    halves = [width // 2 for width in model.config.attention_window]
    return packed.bert_forward(
        model,
        batch,
        lambda layer: rules.Window(halves[layer], config.global_tokens),
        config.global_tokens,
        taps,
    )


def stock(model: Any, config: Config, batch: Batch) -> Tensor:
    """Run transformers' own forward, for comparison; logits ``(windows, classes)``."""
    import torch

    from distill import padded

    arguments = padded.inputs(model, batch)
    mask = torch.zeros_like(arguments["attention_mask"])
    mask[:, : config.global_tokens] = 1
    mask = mask * arguments["attention_mask"]
    logits: Tensor = model(**arguments, global_attention_mask=mask).logits
    return logits
