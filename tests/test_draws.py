"""Holds random numbers to the example they belong to: keyed by key, purpose and index, never by batch or order."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fatbench.data import augmented
from fatbench.draws import Draws, hashed, shuffled

INDICES = np.array([7, 0, 3, 2**20, 12, 5])
LIKE = torch.empty(6, 2, 3, 3)
KINDS: dict[str, Callable[[Draws, Tensor, str], Tensor]] = {"uniform": Draws.uniform, "normal": Draws.normal}
kinds = pytest.mark.parametrize("draw", KINDS.values(), ids=KINDS)
few = settings(max_examples=20, deadline=None, derandomize=True)


def splitmix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


# ------------------------------------------------------------------------------------------------ words


@few
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=9), st.tuples(st.integers(), st.text()))
def test_a_word_is_splitmix64_of_the_index_from_the_key_s_hash(indices: list[int], key: tuple[object, ...]) -> None:
    base = int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big")
    expected = [splitmix64((i * 0x9E3779B97F4A7C15 + base) % 2**64) for i in indices]
    assert hashed(np.array(indices), *key).tolist() == expected


def test_words_are_distinct_over_indices_and_keys() -> None:
    words = np.concatenate([hashed(np.arange(20_000), *key) for key in ((0,), (1,), ("0",), (0, 1), ((0, 1),), ())])
    assert len(np.unique(words)) == len(words)
    assert words.dtype == np.uint64
    bits = (words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.01


@few
@given(st.integers(0, 300), st.integers(0, 9))
def test_an_order_is_a_permutation_that_its_key_decides(n: int, epoch: int) -> None:
    order = shuffled(n, 3, epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == shuffled(n, 3, epoch).tolist()
    assert n < 20 or order.tolist() != shuffled(n, 3, epoch + 1).tolist()


def test_an_order_is_the_same_on_every_machine() -> None:
    assert shuffled(8, 0, 0).tolist() == [4, 1, 3, 7, 2, 6, 0, 5]


# ------------------------------------------------------------------------------------------------ draws


@kinds
@few
@given(order=st.permutations(range(6)), cut=st.integers(0, 6))
def test_order_and_split_change_no_example_s_numbers(
    draw: Callable[[Draws, Tensor, str], Tensor], order: list[int], cut: int
) -> None:
    whole = draw(Draws((1, 2), INDICES), LIKE, "start")
    for rows in (order, order[:cut], order[cut:]):
        assert torch.equal(draw(Draws((1, 2), INDICES[rows]), LIKE[rows], "start"), whole[rows])
        assert torch.equal(draw(Draws((1, 2), INDICES).rows(rows), LIKE[rows], "start"), whole[rows])
    part = slice(cut, None)
    assert torch.equal(draw(Draws((1, 2), INDICES).rows(part), LIKE[part], "start"), whole[part])


@kinds
def test_seed_epoch_purpose_restart_and_index_each_give_other_numbers(
    draw: Callable[[Draws, Tensor, str], Tensor],
) -> None:
    one = Draws((1, 2), INDICES)
    drawn = [draw(one, LIKE, "start"), draw(one, LIKE, "step 0"), draw(one, LIKE, "step 1")]
    drawn += [draw(Draws(key, INDICES), LIKE, "start") for key in ((2, 2), (1, 3), (2, 1))]
    drawn += [draw(one.restart(r), LIKE, "start") for r in (0, 1)]
    rows = torch.cat(drawn).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows) == 8 * len(INDICES)
    assert torch.equal(draw(one.restart(1), LIKE, "start"), drawn[-1])
    assert torch.equal(draw(one, LIKE, "start"), drawn[0])


def test_uniform_fills_its_range_evenly_and_normal_is_standard() -> None:
    draws, like = Draws((0,), np.arange(400)), torch.empty(400, 1, 10, 10)
    u, n = draws.uniform(like, "a"), draws.normal(like, "a")
    assert -1 <= u.min() < -0.999
    assert 0.999 < u.max() <= 1
    assert abs(u.mean()) < 0.015
    assert abs(u.std() - 3**-0.5) < 0.01
    assert abs(n.mean()) < 0.025
    assert abs(n.std() - 1) < 0.02
    for rows in (u.flatten(1), n.flatten(1)):
        assert (rows[1:] * rows[:-1]).mean().abs() < 0.03  # neighbours have nothing in common


@kinds
def test_float64_images_get_the_same_numbers(draw: Callable[[Draws, Tensor, str], Tensor]) -> None:
    single, double = (draw(Draws((1,), INDICES), LIKE.to(dtype), "start") for dtype in (torch.float32, torch.float64))
    assert double.dtype == torch.float64
    assert torch.equal(single.double(), double)


def test_drawing_leaves_torch_s_stream_where_it_was() -> None:
    before = torch.get_rng_state()
    Draws((1,), INDICES).normal(LIKE, "start")
    Draws((1,), INDICES).uniform(LIKE, "start")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_of_none_draws_nothing() -> None:
    assert Draws((1,), []).uniform(torch.empty(0, 1, 2, 2), "start").shape == (0, 1, 2, 2)


def test_a_scalar_lies_in_the_unit_interval_and_belongs_to_the_first_example() -> None:
    drawn = [Draws((seed,), [i, 9]).scalar("jitter") for seed in range(20) for i in range(50)]
    assert 0 <= min(drawn) < 0.01
    assert 0.99 < max(drawn) < 1
    assert abs(np.mean(drawn) - 0.5) < 0.04
    assert len(set(drawn)) == 1000
    one = Draws((0,), [3, 9])
    assert one.scalar("jitter") == Draws((0,), [3, 4, 5]).scalar("jitter") != one.scalar("other")
    assert all(type(value) is float for value in drawn)


# ------------------------------------------------------------------------------------------------ crops and flips


def cropped(image: Tensor, down: int, right: int, flip: bool) -> Tensor:
    """One image (C, H, W): a window of its own size in it, padded by 4, then mirrored or not."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 8, width + 8)
    padded[:, 4 : 4 + height, 4 : 4 + width] = image
    window = padded[:, down : down + height, right : right + width]
    return window.flip(2) if flip else window


def choices(x: Tensor, out: Tensor) -> list[tuple[int, int, bool]]:
    """(down, right, flip) of each example, the only one that makes `out` of it."""
    found = []
    for image, made in zip(x, out, strict=True):
        fits = [how for how in product(range(9), range(9), (False, True)) if torch.equal(cropped(image, *how), made)]
        assert len(fits) == 1, "no crop, or more than one, makes this of the image"
        found += fits
    return found


def test_each_example_is_one_of_the_crops_and_flips_and_all_of_them_occur() -> None:
    x = torch.rand(200, 2, 10, 11)
    downs, rights, flips = np.array(choices(x, augmented(x, np.arange(200), "crop-flip", 0, 0))).T
    assert set(downs) == set(rights) == set(range(9))
    assert abs(flips.mean() - 0.5) < 0.1
    assert np.abs(np.corrcoef([downs, rights, flips]) - np.eye(3)).max() < 0.2


def test_a_crop_alone_never_flips() -> None:
    x = torch.rand(60, 1, 10, 10)
    assert not any(flip for *_, flip in choices(x, augmented(x, np.arange(60), "crop", 0, 0)))


def test_without_augmentation_images_are_as_they_were() -> None:
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(augmented(x, np.arange(5), "none", 0), x)


@few
@given(st.permutations(range(6)), st.integers(1, 6))
def test_an_example_s_crop_depends_on_key_and_index_alone(order: list[int], cut: int) -> None:
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = augmented(x, INDICES, "crop-flip", 1, 2)
    rows = order[:cut]
    assert torch.equal(augmented(x[rows], INDICES[rows], "crop-flip", 1, 2), whole[rows])


def test_epochs_and_indices_crop_differently() -> None:
    x = torch.rand(1, 1, 10, 10).expand(40, -1, -1, -1)
    first, second = (choices(x, augmented(x, np.arange(40), "crop-flip", 0, epoch)) for epoch in (0, 1))
    assert len(set(first)) > 20
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 5
