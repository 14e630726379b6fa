"""FNet-Hybrid (Lee-Thorp et al. 2021): a BERT whose lower layers mix tokens by a Fourier transform.

transformers has no such class. Its type is ``fnet_hybrid``, which plain transformers refuses to read, where it would
fill a BERT's missing weights with random numbers; here it is read once :func:`register` has been called.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

from distill.students.fnet import Fourier

MODEL_TYPE = "fnet_hybrid"


class HybridConfig(BertConfig):  # type: ignore[misc]
    """A BERT's, and how many layers mix by a transform."""

    model_type = MODEL_TYPE
    fourier_layers: int = 0
    """The lowest ones."""


class Mixer(Fourier, nn.Module):  # type: ignore[misc]
    """The transform in the place of ``attention.self``; without weights. It is run packed alone (packed.py)."""


def _replace_attention(encoder: Any) -> None:
    """Put the transform into the lowest layers; as in FNet there is no projection and no dropout behind it."""
    for layer in encoder.encoder.layer[: encoder.config.fourier_layers]:
        layer.attention.self = Mixer()
        layer.attention.output.dense = nn.Identity()
        layer.attention.output.dropout = nn.Dropout(0.0)


class HybridModel(BertModel):  # type: ignore[misc]
    """The encoder."""

    config_class = HybridConfig

    def __init__(self, config: HybridConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer)
        _replace_attention(self)


class HybridForSequenceClassification(BertForSequenceClassification):  # type: ignore[misc]
    """The classifier; its weights are those of a BERT's that are left."""

    config_class = HybridConfig

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        _replace_attention(self.bert)


def register() -> None:
    """Let this process's transformers read the type."""
    AutoConfig.register(MODEL_TYPE, HybridConfig, exist_ok=True)
    AutoModel.register(HybridConfig, HybridModel, exist_ok=True)
    AutoModelForSequenceClassification.register(HybridConfig, HybridForSequenceClassification, exist_ok=True)


def of_bert(bert: Any, attention_layers: int) -> Any:
    """Leave out the attention of a BERT classifier's lower layers."""
    fields = bert.config.to_dict()
    fields["fourier_layers"] = bert.config.num_hidden_layers - attention_layers
    model = HybridForSequenceClassification(HybridConfig.from_dict(fields))
    own = set(model.state_dict())
    model.load_state_dict({name: weight for name, weight in bert.state_dict().items() if name in own})
    return model
