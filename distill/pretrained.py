"""Loading a checkpoint's weights into an architecture, and refusing what does not fit. Knows no recipe.

A checkpoint may be anybody's: no code of its is run, none is fetched for it, and no pickle is read that holds more
than tensors. transformers fills missing weights with random numbers and says so in a log line; here that is an error,
unless they are the new classification head's.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill import hub
from distill.errors import DataError, DistillError, RecipeError
from distill.tasks import Floats, TaskSpec

POSITIONS = "embeddings.position_embeddings.weight"
"""Name of the table of positions inside an encoder that has one."""


def head(task: TaskSpec) -> Any:
    """Return transformers' auto class of encoders with the head that the task needs."""
    from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

    return AutoModelForQuestionAnswering if task.kind == "span" else AutoModelForSequenceClassification


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what the libraries raise over somebody's files into one line that begins with ``where``.

    Raises:
        DataError: whatever was raised; damaged and hostile files fail in as many ways as there are lines that read them.
    """
    try:
        yield
    except (DistillError, MemoryError):
        raise
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:160]
        if isinstance(error, pickle.UnpicklingError):
            reason = (
                "its weights are a pickle that holds more than tensors, and could run code; take safetensors"
            )
        elif "trust_remote_code" in str(error) or "custom code" in str(error):
            reason = (
                "it wants to run Python code of its own, and none is run; take a model that transformers has"
            )
        raise DataError(f"{where}: {reason}") from error


def config_of(where: Path | str) -> Any:
    """Read a folder's or hub id's transformers configuration; see :func:`reading`."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    attention = str(getattr(config, "_attn_implementation", ""))
    if "/" in attention:  # transformers would fetch it, and run it
        raise DataError(
            f"{where}: config.json wants attention from the hub ({attention:.80}); leave that key out"
        )
    return config


def tokenizer_of(where: Path | str) -> Any:
    """Load a folder's or hub id's tokenizer; see :func:`reading`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(where, trust_remote_code=False)


def load(auto: Any, where: Path | str, **changes: Any) -> tuple[Any, Any]:
    """Load a folder's or hub id's weights; see :func:`reading`.

    Args:
        auto: a transformers class with ``from_pretrained``.
        where: a folder or hub id.
        changes: fields of the configuration to set.

    Returns:
        The model, and transformers' account of missing weights.
    """
    config_of(where)
    model, info = auto.from_pretrained(
        where, trust_remote_code=False, weights_only=True, output_loading_info=True, **changes
    )
    return model, info


def read_config(checkpoint: str, key: str, model_types: tuple[str, ...] = ()) -> Any:
    """Read a checkpoint's transformers configuration; of any model type where none is given.

    Raises:
        RecipeError: it is of none of these model types.
        HubError: it is neither here nor reachable.
        DataError: it cannot be read.
    """
    where = hub.checkpoint(checkpoint, key)
    with reading(f"{key}: {checkpoint}"):
        config = config_of(where)
    if model_types and config.model_type not in model_types:
        raise RecipeError(
            f"{key}: {checkpoint} is a {config.model_type} model, and {' or '.join(model_types)} is needed"
        )
    return config


def check_length(max_length: int, positions: int, section: str, *, may_lengthen: bool = False) -> None:
    """Refuse a window that is longer than the model's positions.

    Raises:
        RecipeError: with the two numbers and what to change.
    """
    if max_length > positions:
        fix = f"set {section}.max_length={positions}" + (
            f" or {section}.lengthen=true" if may_lengthen else ""
        )
        raise RecipeError(
            f"{section}.max_length is {max_length:,}, and the checkpoint has {positions:,} positions; {fix}"
        )


def from_checkpoint(auto: Any, checkpoint: str, key: str, task: TaskSpec, **changes: Any) -> Any:
    """Load a classifier with a checkpoint's weights and a head of the task's width.

    Args:
        auto: a transformers class with ``from_pretrained``.
        checkpoint: a folder, hub id or package address.
        key: the recipe key that named it.
        task: gives the head its width.
        changes: fields of the configuration to set.

    Raises:
        RecipeError: the configuration has no such field.
        DataError: weights beside the head's are missing.
    """
    where = hub.checkpoint(checkpoint, key)
    with reading(f"{key}: {checkpoint}"):
        try:
            model, info = load(auto, where, num_labels=task.classes, ignore_mismatched_sizes=True, **changes)
        except TypeError as error:
            if not changes:
                raise
            # Fields that the configuration does not have are handed on to the class, which takes none.
            raise RecipeError(f"{key.partition('.')[0]}.config: {str(error).splitlines()[0][:200]}") from None
    # A weight of another shape is as good as missing; that of a head was for other classes.
    lost = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    refuse_missing(_of_encoder(model, lost), checkpoint, key)
    return model


def classifier(
    checkpoint: str,
    key: str,
    task: TaskSpec,
    found: Any,
    max_length: int,
    *,
    first: int,
    lengthen: bool,
    **changes: Any,
) -> Any:
    """Load a checkpoint as a classifier of windows of ``max_length`` tokens.

    Args:
        checkpoint: a folder, hub id or package address.
        key: the recipe key that named it.
        task: gives the head its width.
        found: the checkpoint's configuration.
        max_length: in tokens.
        first: rows of the position table before the first token's.
        lengthen: tile the positions where they are fewer; the result must be trained before it reads there.
        changes: fields of the configuration to set.

    Raises:
        RecipeError: there are fewer positions, and ``lengthen`` is off or there is no table of them.
        DataError: weights beside the head's are missing.
    """
    section = key.partition(".")[0]
    known = getattr(found, "max_position_embeddings", None)
    positions = max_length if known is None else int(known) - first
    if max_length <= positions or not lengthen:
        check_length(max_length, positions, section, may_lengthen=True)
        return from_checkpoint(head(task), checkpoint, key, task, **changes)
    weights = backbone_weights(checkpoint, key)
    if POSITIONS not in weights:
        raise RecipeError(
            f"{section}.lengthen: a {found.model_type} has no table of positions to tile; "
            f"set {section}.max_length={positions}"
        )
    weights[POSITIONS] = torch.cat([weights[POSITIONS][:first], tile(weights[POSITIONS][first:], max_length)])
    for field, value in {**changes, "max_position_embeddings": len(weights[POSITIONS])}.items():
        setattr(found, field, value)
    found.num_labels = task.classes
    model = head(task).from_config(found)
    own = set(model.base_model.state_dict())
    fill(
        model, {f"{model.base_model_prefix}.{n}": w for n, w in weights.items() if n in own}, checkpoint, key
    )
    return model


def reserved(config: Any) -> int:
    """Count the rows of a model's position table before the first token's.

    RoBERTa and its like keep those up to and with the padding's for padding.
    """
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return int(getattr(getattr(model, "embeddings", None), "padding_idx", -1)) + 1


def _of_encoder(model: Any, names: Any) -> list[str]:
    """Leave out the head's: it is trained from scratch with the task."""
    return [name for name in names if name.startswith(f"{model.base_model_prefix}.")]


def refuse_missing(missing: Any, checkpoint: str, key: str) -> None:
    """Raise DataError when weights of an encoder beside its pooler's are missing."""
    lost = sorted(name for name in missing if "pooler" not in name.split("."))
    if lost:
        raise DataError(f"{key}: {checkpoint} lacks {len(lost)} of the model's weights, {lost[0]} among them")


def fill(model: Any, weights: Mapping[str, Tensor], checkpoint: str, key: str) -> None:
    """Copy weights into a model that was built from a configuration.

    Raises:
        DataError: weights beside the head's are missing, or are not the model's.
    """
    missing, unexpected = model.load_state_dict(weights, strict=False)
    refuse_missing(_of_encoder(model, missing), checkpoint, key)
    assert not unexpected, f"weights without a place: {unexpected[:3]}"


def backbone_weights(checkpoint: str, key: str) -> dict[str, Tensor]:
    """Read an encoder's weights, by their names inside the encoder (no ``bert.`` before them).

    Raises:
        DataError: they cannot be read, or some beside the pooler's are missing.
    """
    return dict(backbone(checkpoint, key).state_dict())


def word_embeddings(checkpoint: str, key: str) -> Floats:
    """Read an encoder's embeddings of its vocabulary, ``(entries, width)`` float32.

    Raises:
        RecipeError: it has no such table.
        DataError: its weights cannot be read, or some beside the pooler's are missing.
    """
    try:
        table = backbone(checkpoint, key).get_input_embeddings()
    except NotImplementedError:
        raise RecipeError(f"{key}: {checkpoint} has no embeddings of a vocabulary") from None
    return np.asarray(table.weight.detach().float().numpy())


def backbone(checkpoint: str, key: str) -> Any:
    """Load an encoder without a head.

    Raises:
        DataError: it cannot be read, or weights beside the pooler's are missing.
    """
    from transformers import AutoModel

    where = hub.checkpoint(checkpoint, key)
    with reading(f"{key}: {checkpoint}"):
        model, info = load(AutoModel, where)
    refuse_missing(info["missing_keys"], checkpoint, key)
    return model


def tile(positions: Tensor, length: int) -> Tensor:
    """Repeat learnt positions ``(old, width)`` to ``(length, width)`` (Beltagy et al. 2020, section 5)."""
    repeats = -(-length // len(positions))
    return positions.repeat(repeats, 1)[:length].clone()


def reduce(tables: Sequence[Tensor], width: int) -> list[Tensor]:
    """Bring tables of embeddings ``(rows, old)`` to ``(rows, width)``, as near to what they were as can be.

    The rows of all tables together are projected on their ``width`` foremost singular directions, which
    loses least of them in squares (Eckart and Young 1936). All share these directions, for a token's embedding is
    the sum of a row of each. Of each direction the largest entry is positive, so that the result is settled.
    """
    whole = torch.cat(list(tables)).double()
    directions = torch.linalg.eigh(whole.T @ whole).eigenvectors.flip(1)[:, :width]
    signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    return [(table.double() @ (directions * signs)).to(table.dtype) for table in tables]
