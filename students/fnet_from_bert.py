"""A BERT checkpoint with Fourier mixing in the place of its self-attention (Lee-Thorp et al. 2021).

Embeddings, feed-forward halves, norms and pooler are the checkpoint's; the projections of the attention are left
out. What comes of it is transformers' FNet to the letter, and is saved as one: the projection that FNet has behind
its embeddings is the identity. The feed-forward halves never saw what the transform gives them: it must be trained
for longer than a BERT is.

With ``attention_layers`` it is that paper's hybrid, whose last layers keep the checkpoint's attention. transformers
has no class for that: such a folder is read by distill alone (see _fnet_hybrid.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from distill.schema import Student
from distill.students import fnet

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from distill.batching import Batch
    from distill.packed import Taps
    from distill.tasks import TaskSpec

padding, stock = fnet.padding, fnet.stock


class Config(Student):
    """The fields of an FNet that begins as a BERT."""

    architecture: Literal["fnet_from_bert"]
    checkpoint: str = "google/bert_uncased_L-4_H-256_A-4"
    lengthen: bool = False
    """Make the positions reach max_length by tiling them (Beltagy et al. 2020, section 5)."""
    transform: Literal["document", "max_length"] = "document"
    """The length that tokens are mixed at: each document's own, or max_length with padding tokens behind it."""
    attention_layers: Annotated[int, Field(ge=0)] = 0
    """How many of the last layers keep the checkpoint's attention; the paper's hybrid has two."""

    @model_validator(mode="after")
    def _hybrid_is_packed(self) -> Config:
        if self.attention_layers and self.engine == "stock":
            raise ValueError("attention_layers: transformers has no FNet with attention; take engine: packed")
        if self.attention_layers and self.is_filled:
            raise ValueError("attention_layers: attention reads no padding as text; take transform: document")
        return self

    @property
    def is_filled(self) -> bool:
        """Whether each window is filled up to max_length with padding tokens."""
        return self.transform == "max_length"


def keys(model: Any, config: Config, length: int) -> int:
    """Return 0: tokens are mixed without attention."""
    return 0


def build(config: Config, task: TaskSpec, tokenizer: Any, teacher: Path | None = None) -> Any:
    """Build an FNet, and carry the checkpoint's weights over to it."""
    import torch
    from transformers import FNetConfig

    from distill import pretrained

    key = "student.checkpoint"
    found = pretrained.read_config(config.checkpoint, key, ("bert",))
    if config.attention_layers:
        return _hybrid(config, task, found)
    weights = pretrained.backbone_weights(config.checkpoint, key)
    positions = weights[pretrained.POSITIONS]
    if not config.lengthen:
        pretrained.check_length(config.max_length, len(positions), "student", may_lengthen=True)
    weights[pretrained.POSITIONS] = pretrained.tile(positions, max(config.max_length, len(positions)))
    weights["embeddings.projection.weight"] = torch.eye(found.hidden_size)
    weights["embeddings.projection.bias"] = torch.zeros(found.hidden_size)
    names = (
        "vocab_size hidden_size num_hidden_layers intermediate_size hidden_act hidden_dropout_prob "
        "type_vocab_size initializer_range layer_norm_eps pad_token_id bos_token_id eos_token_id"
    ).split()
    fields = {name: getattr(found, name) for name in names} | {
        "max_position_embeddings": len(weights[pretrained.POSITIONS]),
        **config.config,
    }
    model = pretrained.head(task).from_config(FNetConfig(**fields, num_labels=task.classes))
    own = set(model.state_dict())
    named = {f"fnet.{n.replace('attention.output.', 'fourier.output.')}": w for n, w in weights.items()}
    pretrained.fill(model, {n: w for n, w in named.items() if n in own}, config.checkpoint, key)
    return model


def _hybrid(config: Config, task: TaskSpec, found: Any) -> Any:
    """Build a BERT, and keep the attention of its last layers alone."""
    from distill import pretrained
    from distill.errors import RecipeError
    from distill.students import _fnet_hybrid

    if task.kind == "span":
        raise RecipeError(
            "student.attention_layers: the hybrid has no head that finds spans; leave the key out"
        )
    bert = pretrained.classifier(
        config.checkpoint, "student.checkpoint", task, found, config.max_length, first=0, lengthen=config.lengthen,
        **config.config,
    )  # fmt: skip
    if config.attention_layers > bert.config.num_hidden_layers:
        raise RecipeError(
            f"student.attention_layers is {config.attention_layers}, and {config.checkpoint} has "
            f"{bert.config.num_hidden_layers} layers"
        )
    return _fnet_hybrid.of_bert(bert, config.attention_layers)


def register() -> None:
    """Let this process's transformers read a saved hybrid."""
    from distill.students import _fnet_hybrid

    _fnet_hybrid.register()


def forward(model: Any, config: Config, batch: Batch, taps: Taps | None = None) -> Tensor:
    """Run the classifier; logits ``(windows, classes)``."""
    from distill import packed

    run = packed.forward if config.attention_layers else fnet.forward
    return run(model, config, batch, taps)
