"""Which documents make a step, how a step is cut, and that neither changes what is learnt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from distill.batching import collate, deal, micro_batches, share, steps, steps_per_epoch
from distill.encoding import Encoded, concatenate


def packed(windows: Sequence[Sequence[int]]) -> Encoded:
    """Make documents of windows of these lengths; every token id is unique, so that none can be mixed up."""
    lengths = [n for document in windows for n in document]
    count = len(windows)
    return Encoded(
        np.arange(sum(lengths), dtype=np.int32),
        (np.arange(sum(lengths)) % 2).astype(np.uint8),
        np.cumsum([0, *lengths]),
        np.cumsum([0, *map(len, windows)]),
        np.array([sum(document) for document in windows], np.int32),
        100 + np.arange(count),
        np.arange(count) % 2,
        np.ones(count, bool),
    )


def random_data(count: int = 40, seed: int = 0) -> Encoded:
    rng = np.random.default_rng(seed)
    return packed([rng.integers(3, 60, rng.integers(1, 4)).tolist() for _ in range(count)])


@pytest.mark.parametrize(("documents", "batch_size"), [(10, 3), (12, 4), (5, 8), (1, 1)])
def test_an_epoch_holds_every_document_once_and_no_two_are_alike(documents: int, batch_size: int) -> None:
    each = steps_per_epoch(documents, batch_size)
    found = list(itertools.islice(steps(documents, batch_size, seed=0), 3 * each))
    epochs = [np.concatenate(found[e * each : (e + 1) * each]) for e in range(3)]
    assert all(sorted(epoch) == list(range(documents)) for epoch in epochs)
    assert all(len(step) <= batch_size for step in found)
    if documents > 4:
        assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_a_resumed_order_is_the_rest_of_the_uninterrupted_one(start: int) -> None:
    whole = list(itertools.islice(steps(10, 3, seed=5), 12))
    rest = list(itertools.islice(steps(10, 3, seed=5, start=start), 12 - start))
    assert [a.tolist() for a in whole[start:]] == [a.tolist() for a in rest]


def test_a_document_is_drawn_as_often_as_its_weight_says() -> None:
    weights = np.array([1.0] * 20 + [3.0] * 5 + [0.3] * 15)
    each = steps_per_epoch(40, 8)  # 20 + 15 + 4.5 are 39.5 draws, and 40 to the nearest even number
    found = list(itertools.islice(steps(40, 8, 0, weights=weights), 300 * each))
    epochs = np.array([np.concatenate(found[at : at + each]) for at in range(0, len(found), each)])
    assert epochs.shape == (300, 40)
    counts = np.array([np.bincount(epoch, minlength=40) for epoch in epochs])
    assert ((counts >= np.floor(weights)) & (counts <= np.ceil(weights * 40 / 39.5))).all()
    np.testing.assert_allclose(counts.mean(0), weights * 40 / 39.5, atol=0.1)
    rest = list(itertools.islice(steps(40, 8, 0, 7, weights), 5))
    assert [a.tolist() for a in rest] == [a.tolist() for a in found[7:12]], "a resumed run draws the same"
    assert epochs[0].tolist() != epochs[1].tolist()


def test_weights_go_with_their_documents_when_splits_are_joined() -> None:
    plain, weighed = random_data(4), random_data(3, seed=1)
    weighed = Encoded(**{**vars(weighed), "weights": np.array([2.0, 0.5, 1.0])})
    both = concatenate([plain, weighed])
    assert both.weights is not None
    assert both.weights.tolist() == [1, 1, 1, 1, 2, 0.5, 1]
    assert (plain.draws, weighed.draws, both.draws) == (4, 4, 8)
    assert concatenate([plain, plain]).weights is None


def test_another_seed_is_another_order() -> None:
    first, second = (
        np.concatenate(list(itertools.islice(steps(50, 10, seed), 5))).tolist() for seed in (0, 1)
    )
    assert first != second


@pytest.mark.parametrize("budget", [64, 100, 500, 10**6])
@pytest.mark.parametrize("block", [0, 16])
def test_micro_batches_hold_every_document_once_within_the_budget(budget: int, block: int) -> None:
    data = random_data()

    def bucket(length: int) -> int:
        """As BigBird's: wide documents lie on grids of blocks."""
        return 0 if not block or length <= 20 else -(-length // block) * block

    indices = np.arange(len(data))[::-2]
    parts = micro_batches(data, indices, budget, bucket)
    assert sorted(np.concatenate(parts)) == sorted(indices)
    for part in parts:
        grids = {bucket(int(n)) for n in data.longest_window[part]}
        assert len(grids) == 1
        width = max(*grids, int(data.longest_window[part].max()))
        cells = width * data.window_counts[part].sum()
        assert cells <= budget or len(part) == 1
    if not block and budget == 10**6:
        assert len(parts) == 1


@pytest.mark.parametrize("budget", [64, 100, 500, 10**6])
def test_micro_batches_of_a_model_that_does_not_pad_are_filled_with_its_tokens(budget: int) -> None:
    data = random_data()
    parts = micro_batches(data, np.arange(len(data)), budget)
    assert sorted(np.concatenate(parts)) == list(range(len(data)))
    totals = [int(data.tokens[part].sum()) for part in parts]
    assert all(total <= budget or len(part) == 1 for total, part in zip(totals, parts, strict=True))
    following = [int(data.tokens[part[0]]) for part in parts[1:]]
    assert all(total + more > budget for total, more in zip(totals, following, strict=False))


def test_micro_batches_begin_with_the_longest_so_that_a_lack_of_memory_shows_at_once() -> None:
    data = random_data()
    parts = micro_batches(data, np.arange(len(data)), 200)
    assert len(parts) > 3
    longest = [int(data.longest_window[part].max()) for part in parts]
    assert longest == sorted(longest, reverse=True)


def test_nothing_to_cut_is_no_batch() -> None:
    assert micro_batches(random_data(), np.zeros(0, int), 100) == []


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_processes_share_a_step_without_overlap_or_rest(world: int, count: int) -> None:
    rng = np.random.default_rng(0)
    lengths, step = rng.integers(1, 1000, 100), rng.permutation(100)[:count]
    parts = [share(step, lengths, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(parts)) == sorted(step)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_processes_get_about_as_many_tokens_each() -> None:
    lengths = np.arange(1, 17)
    for world in (2, 4):
        loads = [lengths[share(np.arange(16), lengths, rank, world)].sum() for rank in range(world)]
        assert loads == [lengths.sum() / world] * world


def test_a_batch_holds_the_documents_in_the_order_asked_for() -> None:
    data = packed([[3, 2], [4], [5, 1]])
    logits = np.array([[1.0], [2.0]], np.float32)
    batch = collate(data, [2, 0], logits)
    assert batch.token_ids.tolist() == [9, 10, 11, 12, 13, 14, 0, 1, 2, 3, 4]
    assert batch.segments.tolist() == [1, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0]
    assert batch.windows.tolist() == [0, 5, 6, 9, 11]
    assert batch.documents.tolist() == [0, 0, 1, 1]
    assert batch.size == 2
    assert batch.labels.tolist() == [0, 0]
    assert batch.teacher_logits is not None
    assert batch.teacher_logits.tolist() == [[1.0], [2.0]]


def test_splits_put_together_keep_their_documents_and_mark_those_without_labels() -> None:
    first, second = packed([[3], [2, 2]]), packed([[4], [1, 5]])
    second = Encoded(**{**vars(second), "labelled": np.zeros(2, bool), "labels": np.array([7, 7])})
    both = concatenate([first, second])
    assert both.labelled.tolist() == [True, True, False, False]
    assert both.labels.tolist() == [0, 1, 0, 0]
    assert both.windows.tolist() == [0, 3, 5, 7, 11, 12, 17]
    assert collate(both, [3]).token_ids.tolist() == second.token_ids[4:].tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_processes_are_dealt_equal_tokens_in_bounded_pieces(world: int) -> None:
    rng = np.random.default_rng(world)
    tokens = np.sort(np.concatenate([rng.integers(3, 8, 900), rng.integers(200, 400, 20), [5000]]))[::-1]
    shares = deal(tokens, 4000, 150, world)
    pieces = [piece for share in shares for piece in share]
    found = np.concatenate([np.arange(len(tokens))[piece] for piece in pieces])
    assert sorted(found.tolist()) == list(range(len(tokens)))
    for piece in pieces:
        assert len(tokens[piece]) == 1 or tokens[piece].sum() <= 4000
        assert len(tokens[piece]) <= 150
    load = [sum(int(tokens[piece].sum()) for piece in share) for share in shares]
    assert max(load) <= max(5000, 4 / 3 * tokens.sum() / world), (
        "cut by rows, the long ones would be one process's"
    )


def test_few_documents_are_shared_out_too() -> None:
    assert [len(share) for share in deal(np.full(12, 10, np.int32), 1 << 20, 4096, 3)] == [1, 1, 1]
