"""A BERT checkpoint with Fourier mixing in the place of its self-attention (Lee-Thorp et al. 2021).

Embeddings, feed-forward halves, norms and pooler are the checkpoint's; the projections of the attention are left
out. What comes of it is transformers' FNet to the letter, and is saved as one: the projection that FNet has behind
its embeddings is the identity. The feed-forward halves never saw what the transform gives them: it must be trained
for longer than a BERT is. The hybrid of that paper, attention in the last layers, has no class in transformers
that could read it, and is not here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from distill.schema import Student
from distill.students import fnet

if TYPE_CHECKING:
    from pathlib import Path

    from distill.tasks import TaskSpec

padding, forward, stock = fnet.padding, fnet.forward, fnet.stock


class Config(Student):
    """The fields of an FNet that begins as a BERT."""

    architecture: Literal["fnet_from_bert"]
    checkpoint: str = "google/bert_uncased_L-4_H-256_A-4"
    lengthen: bool = False
    """Make the positions reach max_length by tiling them (Beltagy et al. 2020, section 5)."""
    transform: Literal["document", "max_length"] = "document"
    """The length that tokens are mixed at: each document's own, or max_length with padding tokens behind it."""

    @property
    def is_filled(self) -> bool:
        """Whether each window is filled up to max_length with padding tokens."""
        return self.transform == "max_length"


def build(config: Config, task: TaskSpec, tokenizer: Any, teacher: Path | None = None) -> Any:
    """Build an FNet, and carry the checkpoint's weights over to it."""
    import torch
    from transformers import FNetConfig

    from distill import pretrained

    key = "student.checkpoint"
    found = pretrained.read_config(config.checkpoint, key, ("bert",))
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
