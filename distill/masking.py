"""Masked language modelling (Devlin et al. 2019): windows of text, what is hidden in them, and what is predicted.

Through transformers' own forward pass: the windows are all of one length, so that there is nothing to pack.
Knows no architecture, no file and no loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.batching import Batch, micro_batches
from distill.encoding import Encoded, Tokenizer, special_tokens
from distill.errors import DataError, RecipeError
from distill.losses import Objective
from distill.schema import Loss, Model
from distill.tasks import Kind


def pack(
    tokenizer: Tokenizer, rows: Iterable[Sequence[tuple[str, str | None]]], max_length: int, name: str
) -> Encoded:
    """Join documents, a separator between two, and cut them into full windows; the rest is left out.

    Args:
        tokenizer: the model's.
        rows: batches of (text, None).
        max_length: tokens of a window, special ones included.
        name: of the text, for messages.

    Returns:
        The windows, each a document of its own.

    Raises:
        DataError: there is not one window's text.
    """
    special = special_tokens(tokenizer, pair=False)
    room = max_length - len(special.prefix) - len(special.suffix)
    between = special.suffix[-1:]
    stream: list[np.ndarray[Any, Any]] = []
    for batch in rows:
        found = tokenizer([text for text, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
        stream.append(np.array([token for ids in found if ids for token in (*ids, *between)], dtype=np.int32))
    tokens = np.concatenate(stream) if stream else np.zeros(0, np.int32)
    count = len(tokens) // room
    if count == 0:
        raise DataError(
            f"{name}: {len(tokens):,} tokens of text, and one window takes {room:,}; "
            "give more text, or set student.max_length lower"
        )
    body = tokens[: count * room].reshape(count, room)
    ends = [np.tile(np.array(part, np.int32), (count, 1)) for part in (special.prefix, special.suffix)]
    windows = np.concatenate([ends[0], body, ends[1]], axis=1)
    return Encoded(
        token_ids=windows.ravel(),
        segments=np.zeros(windows.size, np.uint8),
        windows=np.arange(count + 1, dtype=np.int64) * max_length,
        documents=np.arange(count + 1, dtype=np.int64),
        full_length=np.full(count, max_length, np.int32),
        row_id=np.arange(count, dtype=np.int64),
        labels=np.zeros(count, np.int64),
        labelled=np.ones(count, bool),
    )


@dataclass(frozen=True)
class Masked:
    """Windows in which some tokens are hidden."""

    token_ids: Tensor
    """``(windows, length)``."""
    positions: Tensor
    """``(windows, predicted)``: where the tokens stand that are to be predicted."""
    targets: Tensor
    """``(windows, predicted)``: what stood there."""


class Masking:
    """What is hidden in a window: 80 % of the chosen tokens behind the mask, 10 % behind another, 10 % not at all.

    Every window has as many chosen tokens, so that the mean over windows is the mean over tokens.

    Raises:
        RecipeError: the tokenizer has no mask token.
    """

    def __init__(self, tokenizer: Tokenizer, share: float) -> None:
        if tokenizer.mask_token_id is None:
            raise RecipeError("student.tokenizer: it has no mask token, so nothing can be masked")
        self.share = share
        self.mask = int(tokenizer.mask_token_id)
        special = set(tokenizer.all_special_ids)
        self.special = torch.zeros(len(tokenizer), dtype=torch.bool)
        self.special[sorted(special)] = True
        self.ordinary = (~self.special).nonzero().squeeze(1)

    def __call__(self, token_ids: Tensor, generator: torch.Generator | None = None) -> Masked:
        """Choose and hide.

        Args:
            token_ids: ``(windows, length)`` on the CPU; special tokens are never chosen.
            generator: of the draws; PyTorch's global one where absent.
        """
        count = max(1, round(self.share * token_ids.shape[1]))
        draws = torch.rand(token_ids.shape, generator=generator).masked_fill(self.special[token_ids], -1.0)
        positions = draws.topk(count, dim=1).indices
        targets = token_ids.gather(1, positions)
        fate = torch.rand(targets.shape, generator=generator)
        other = self.ordinary[torch.randint(len(self.ordinary), targets.shape, generator=generator)]
        shown = torch.where(fate < 0.8, self.mask, torch.where(fate < 0.9, other, targets))
        return Masked(token_ids.scatter(1, positions, shown), positions, targets)


class MaskedModel(nn.Module):
    """A transformers model with a masked-language-model head, and its text's way in."""

    padding = None

    def __init__(self, model: Any, config: Model, tokenizer: Tokenizer, masking: Masking) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        self.masking = masking
        pooler = getattr(model.base_model, "pooler", None)
        if pooler is not None:  # no gradient comes there, which a job of several processes would wait for
            pooler.requires_grad_(False)

    @property
    def parameters_count(self) -> int:
        """Count of weights, shared ones once."""
        return sum(p.numel() for p in self.model.parameters())

    def forward(self, batch: Batch) -> Tensor:
        """Hide tokens anew; return the mean loss of each window's predicted ones, ``(windows,)``, in nats.

        The draws come from PyTorch's global generator, which the loop seeds from (seed, step, rank).
        """
        masked = self.hide(batch)
        return hard(self.predict(masked), masked).mean(1)

    def hide(self, batch: Batch) -> Masked:
        """Hide tokens of a batch's windows anew."""
        return self.masking(batch.token_ids.cpu().view(batch.size, -1))

    def predict(self, masked: Masked) -> Tensor:
        """Compute logits ``(windows, predicted, vocabulary)``; the head sees no other token's state."""
        return self.predict_and_show(masked)[0]

    def predict_and_show(self, masked: Masked) -> tuple[Tensor, Tensor]:
        """Compute the logits, and show the last layer's states of all tokens, ``(windows, length, width)``."""
        device = next(self.model.parameters()).device
        positions = masked.positions.to(device).unsqueeze(2)
        shown: list[Tensor] = []

        def choose(encoder: nn.Module, arguments: Any, output: Any) -> Any:
            states = output.last_hidden_state
            shown.append(states)
            output.last_hidden_state = states.gather(1, positions.expand(-1, -1, states.shape[2]))
            return output

        # The vocabulary is wide: a head over every token would be the most work of all, and most of it in vain.
        hook = self.model.base_model.register_forward_hook(choose)
        try:
            logits: Tensor = self.model(input_ids=masked.token_ids.to(device)).logits.float()
        finally:
            hook.remove()
        return logits, shown[0]


def hard(logits: Tensor, masked: Masked) -> Tensor:
    """Cross-entropy of each predicted token, ``(windows, predicted)``."""
    targets = masked.targets.to(logits.device)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


@dataclass(frozen=True)
class MaskedLanguage(Objective):
    """The objective: the hard term alone, or with a teacher's beside it (see masked_live.py)."""

    kind: Kind = "single_label"
    terms: Sequence[Loss] = (Loss(kind="hard"),)

    @property
    def names(self) -> list[str]:
        """The name under which each term is logged; the hard one is ``mlm``."""
        return [name.replace("hard", "mlm") for name in super().names]

    def per_document(self, term: Loss, logits: Tensor, batch: Batch) -> Tensor:
        """Return the hard term, which the model has computed where others give logits, ``(windows,)``."""
        return logits


class HeldOut:
    """Windows of held-out text, masked once and for all, so that each evaluation asks the same."""

    def __init__(self, windows: Encoded, masking: Masking) -> None:
        token_ids = torch.from_numpy(windows.token_ids.astype(np.int64)).view(len(windows), -1)
        self.masked = masking(token_ids, torch.Generator().manual_seed(0))
        self.windows = windows

    def measure(self, model: MaskedModel, tokens_per_batch: int, accelerator: Any) -> dict[str, float]:
        """Measure a model, on all processes together.

        Returns:
            nll: of a predicted token, in nats. perplexity: its exponential. accuracy: how many are right.
        """
        training = model.training
        model.eval()
        # By window, and of micro-batches that are the same on any number of processes, so that the sums are, too.
        found = torch.zeros(len(self.windows), 2)
        parts = micro_batches(self.windows, np.arange(len(self.windows)), tokens_per_batch)
        for part in parts[accelerator.process_index :: accelerator.num_processes]:
            masked = Masked(*(getattr(self.masked, name)[part] for name in vars(self.masked)))
            with torch.inference_mode(), accelerator.autocast():
                logits = model.predict(masked)
            right = logits.argmax(2).cpu() == masked.targets
            found[part] = torch.stack([hard(logits, masked).sum(1).cpu(), right.sum(1)], 1)
        model.train(training)
        if accelerator.num_processes > 1:
            found = accelerator.reduce(found.to(accelerator.device), "sum").cpu()
        nll, accuracy = (found.double().sum(0) / self.masked.targets.numel()).tolist()
        # A perplexity beyond the largest float would be no figure that JSON can hold.
        return {"nll": nll, "perplexity": math.exp(min(nll, 700.0)), "accuracy": accuracy}
