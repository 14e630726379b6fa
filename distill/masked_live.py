"""A masked language model and the teacher that runs beside it, as DistilBERT was made (Sanh et al. 2019).

The teacher reads the student's masked windows, without gradients and in evaluation mode; a term is a mean over a
window's predicted tokens or, of states, over all its tokens. Knows no architecture and no loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from distill import live, losses, pretrained
from distill.batching import Batch
from distill.errors import RecipeError
from distill.losses import Objective
from distill.masking import MaskedModel, hard
from distill.schema import Loss

KEY = "pretraining.teacher"


def load_teacher(folder: Path | str, student: MaskedModel) -> MaskedModel:
    """Load a teacher that reads the student's windows.

    Args:
        folder: a model folder or hub id.
        student: see above.

    Raises:
        RecipeError: it has no masked-language-model head, another vocabulary, or no room for the windows.
        DataError: it cannot be read.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM

    config = pretrained.read_config(str(folder), KEY)
    headless = f"{KEY}: {folder} has no masked-language-model head"
    fix = "take a checkpoint that has, or a run of distill pretrain"
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or config.is_encoder_decoder:
        raise RecipeError(f"{headless}: it is a {config.model_type}; {fix}")
    with pretrained.reading(f"{KEY}: {folder}"):
        model, info = pretrained.load(AutoModelForMaskedLM, folder)
        tokenizer = pretrained.tokenizer_of(folder)
    lost = sorted(name for name in info["missing_keys"] if "pooler" not in name.split("."))
    if lost:
        raise RecipeError(f"{headless}: {lost[0]} is missing; {fix}")
    differs = live.difference(student.tokenizer, tokenizer)
    if not differs and config.vocab_size < len(tokenizer):
        differs = f" ({config.vocab_size:,} rows for {len(tokenizer):,} tokens)"
    if differs:
        raise RecipeError(
            f"{KEY}: student and teacher must have one vocabulary, and theirs differ{differs}; "
            "set student.tokenizer to the teacher's"
        )
    if hasattr(config, "max_position_embeddings"):
        room = int(config.max_position_embeddings) - pretrained.reserved(config)
        live.check_room(student.config.max_length, room)
    return MaskedModel(model, student.config, student.tokenizer, student.masking)


class MaskedPair(nn.Module):
    """A student and its teacher as one module; its weights are the student's and the bridging matrices.

    Args:
        student: its masks are what both read.
        teacher: it is set to evaluation mode, and its weights take no gradients.
        terms: of the objective.
        seed: of the matrices.

    Raises:
        RecipeError: the widths differ, and a term is not to bridge them.
    """

    padding = None

    def __init__(self, student: MaskedModel, teacher: MaskedModel, terms: Sequence[Loss], seed: int) -> None:
        super().__init__()
        self.student = student
        self._beside = (teacher.eval().requires_grad_(False),)  # a tuple: its weights are not this module's
        widths = [int(model.model.config.hidden_size) for model in (student, teacher)]
        bridged = [at for at, term in enumerate(terms) if term.kind == "cosine" and widths[0] != widths[1]]
        for at in bridged:
            live.check_project(terms[at], f"pretraining.losses.{at}", *widths)
        torch.manual_seed(seed)
        self.bridges = nn.ModuleDict({str(at): nn.Linear(widths[0], widths[1], bias=False) for at in bridged})

    @property
    def teacher(self) -> MaskedModel:
        """The teacher, no part of this module's weights."""
        return self._beside[0]

    def forward(self, batch: Batch, objective: Objective) -> tuple[Tensor, dict[int, Tensor]]:
        """Compute the hard term, and by its number each of the teacher's, unweighted, ``(windows,)`` each.

        ``objective`` says how the temperatures stand.
        """
        masked = self.student.hide(batch)
        logits, states = self.student.predict_and_show(masked)
        with torch.no_grad():
            wanted, heard = self.teacher.predict_and_show(masked)
        with torch.autocast(logits.device.type, enabled=False):
            found = compare(objective, (logits, states.float()), (wanted, heard.float()), self.bridges)
        return hard(logits, masked).mean(1), found


def compare(
    objective: Objective,
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    bridges: nn.ModuleDict,
) -> dict[int, Tensor]:
    """Compute by its number each term that learns from the teacher, unweighted, ``(windows,)``.

    Args:
        objective: of terms soft, hard and cosine.
        student: its logits ``(windows, predicted, vocabulary)`` and states ``(windows, length, width)``.
        teacher: its own of the same masked windows; either model may have rows beyond the vocabulary.
        bridges: by a cosine term's number what brings the student's states to the teacher's width.
    """
    (logits, states), (wanted, heard) = student, teacher
    known = min(logits.shape[2], wanted.shape[2])
    found: dict[int, Tensor] = {}
    for number, term in enumerate(objective.terms):
        if term.kind == "soft":
            temperature = objective.temperature(term)
            each = losses.soft("single_label", logits[..., :known], wanted[..., :known], temperature)
            found[number] = each.mean(1)
        elif term.kind == "cosine":
            mine = bridges[str(number)](states) if str(number) in bridges else states
            found[number] = losses.cosine(mine, heard).mean(1)
    return found
