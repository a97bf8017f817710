"""The compressors on device tensors: against float64, against the host's ops, and against themselves in chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.compress import Feed
from support.kernels import U32, same_bits
from weft.kernels.compress import FoldPlan, fold_c128, pool_c4
from weft.kernels.gpu.compress import compress_c4, compress_c128, least_bytes_c4, least_bytes_c128
from weft.kernels.gpu.interpreter import traffic
from weft.kernels.kv_rows import PagedRows
from weft.kernels.layouts import RowLayout, keys_fp4, keys_fp8, kv_fp4_v41, kv_fp8, kv_fp8_v41
from weft.kernels.norm import rms_norm
from weft.kernels.reference.compress import example_c4, example_c128, folded_c128
from weft.kernels.reference.rows import error_bound, gather
from weft.kernels.rope import Rotation, inverse_frequencies, rotate_

KV = kv_fp8(16, 48, 16)
# Most channels in bfloat16: what is wrong in the third digit shows.
PLAIN = RowLayout(16, 16, 48, group=16)
each_implementation = pytest.mark.parametrize("implementation", ["reference", "triton"])


def c4(lengths: list[int], device: str, layout: RowLayout = KV, keys: RowLayout | None = None, **how: Any) -> Feed:
    return Feed(4, lengths, device, layout, keys or keys_fp8(16, 32), **how)


@each_implementation
@pytest.mark.parametrize("keys", [keys_fp8(16, 32), keys_fp4(16, 32)], ids=["fp8", "fp4"])
def test_c4_in_chunks(implementation: str, keys: RowLayout, device: str) -> None:
    """Chunks that begin and end at every place of a group, beside sequences that wait."""
    feed = c4([29, 14, 9], device, PLAIN, keys)
    for counts in ([5, 0, 1], [1, 3, 2], [2, 9, 0], [13, 1, 6], [8, 1, 0]):
        feed.step(counts, implementation=implementation)
        feed.check()


@pytest.mark.parametrize(
    ("layout", "keys", "hadamard"),
    [
        (KV, keys_fp8(16, 32), False),
        (kv_fp8_v41(8, 96), keys_fp8(8, 40), False),
        (kv_fp4_v41(8, 80), keys_fp4(8, 16), True),
    ],
)
def test_c4_in_other_layouts(layout: RowLayout, keys: RowLayout, hadamard: bool, device: str) -> None:
    feed = c4([23, 6], device, layout, keys, hadamard=hadamard)
    feed.step([11, 6])
    feed.step([12, 0])
    feed.check()


@each_implementation
def test_c4_extremes(implementation: str, device: str) -> None:
    """Scores far apart, equal scores, and entries of tiny and huge values."""
    feed = c4([13, 13, 13, 13], device, PLAIN, spread=60.0)
    half = feed.ape.shape[1]
    feed.tokens[1][:, half:] = 0.0
    feed.tokens[2][:, :half] *= 1e-18
    feed.tokens[3][:, :half] *= 1e15
    feed.step([7, 7, 7, 7], implementation=implementation)
    feed.step([6, 6, 6, 6], implementation=implementation)
    feed.check()


@each_implementation
def test_c4_padding_and_entries_left_out(implementation: str, device: str) -> None:
    feed = c4([30, 17], device)
    feed.step([13, 5], padding=3, chain=[9, 0], implementation=implementation)
    feed.step([17, 12], padding=5, implementation=implementation)
    feed.check(skip=((0, 0), (0, 1)))


def equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(same_bits(a.float(), b.float()) for a, b in zip(got, want, strict=True))


def everything(feed: Feed) -> tuple[Tensor, ...]:
    """What a feed leaves behind, state of open groups alone for c128a: of others it is stale."""
    opened = [2 * s + 1 for s, done in enumerate(feed.done) if feed.ratio == 4 or done % 128]
    keys = () if feed.key_pool is None else (feed.key_pool.bytes,)
    return (feed.pool.bytes, *keys, feed.state[opened])


def fed(make: Any, seed: int, steps: list[list[int]], **how: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    feed = make()
    for counts in steps:
        feed.step(counts, **how)
    return everything(feed)


def test_c4_bits_do_not_depend_on_chunks_or_neighbours(device: str) -> None:
    """A prefill, token by token, in chunks, and each sequence in a call of its own."""

    def make() -> Feed:
        return c4([14, 5], device, kv_fp8(16, 48, 16), keys_fp4(16, 32))

    whole = fed(make, 1, [[14, 5]])
    for steps in ([[1, 0]] * 9 + [[1, 1]] * 5, [[5, 2], [6, 3], [3, 0]], [[14, 0], [0, 5]]):
        assert equal(fed(make, 1, steps), whole)


def test_c4_at_the_models_sizes(device: str) -> None:
    """The same bits in one chunk and in two, at full width, where entries share programs otherwise."""

    def make() -> Feed:
        return Feed(4, [26], device, kv_fp8(64, 448, 64), keys_fp8(64, 128))

    torch.manual_seed(1)
    feed = make()
    feed.step([26])
    feed.check()
    for steps in ([[15], [11]], [[7], [1], [18]]):
        assert equal(fed(make, 1, steps), everything(feed))


def c128(lengths: list[int], device: str, layout: RowLayout = PLAIN, **how: Any) -> Feed:
    return Feed(128, lengths, device, layout, **how)


@each_implementation
def test_c128_in_chunks(implementation: str, device: str) -> None:
    feed = c128([265, 13, 128], device)
    for counts in ([127, 1, 127], [1, 0, 1], [128, 9, 0], [7, 3, 0], [2, 0, 0]):
        feed.step(counts, implementation=implementation)
    feed.check()


@pytest.mark.parametrize("layout", [KV, kv_fp8_v41(8, 96), kv_fp4_v41(8, 80)])
def test_c128_in_other_layouts(layout: RowLayout, device: str) -> None:
    feed = c128([10, 130], device, layout)
    feed.step([10, 130])
    feed.check()


@each_implementation
def test_c128_extremes_padding_and_entries_left_out(implementation: str, device: str) -> None:
    feed = c128([140, 129, 129], device, spread=60.0)
    feed.tokens[1][:, 64:] = 0.0
    feed.tokens[2][:, :64] *= 1e-18
    feed.step([120, 120, 120], padding=2, implementation=implementation)
    feed.step([20, 9, 9], padding=3, chain=[130, 0, 0], implementation=implementation)
    feed.check(skip=((0, 0),))


def test_c128_bits_do_not_depend_on_chunks_or_neighbours(device: str) -> None:
    def make() -> Feed:
        return c128([259, 6], device, KV)

    whole = fed(make, 1, [[259, 6]])
    for steps in ([[126, 0], [1, 1], [1, 1], [1, 4], [130, 0]], [[259, 0], [0, 6]]):
        assert equal(fed(make, 1, steps), whole)


@each_implementation
def test_c128_state_behind_each_row(implementation: str, device: str) -> None:
    """What drafts fall back to: the state that the rows up to there would have left."""
    feed = c128([133, 60], device)
    feed.step([125, 56], implementation=implementation)
    state = feed.state.clone()
    behind = torch.full((12, 3, 64), torch.nan, device=device)
    feed.step([8, 4], behind=behind, implementation=implementation)
    assert behind.isfinite().all()
    # Behind the third row of sequence 0 its group is complete: the next token opens another, and no state is left.
    for row, sequence, count in ((0, 0, 1), (1, 0, 2), (3, 0, 4), (7, 0, 8), (8, 1, 1), (11, 1, 4)):
        feed.state, feed.done = state.clone(), [125, 56]
        feed.step([count, 0] if sequence == 0 else [0, count], implementation=implementation)
        torch.testing.assert_close(behind[row], feed.state[2 * sequence + 1], rtol=1e-5, atol=1e-5)
        if implementation == "triton":
            assert same_bits(behind[row], feed.state[2 * sequence + 1])


def test_c128_folds_as_the_host(device: str) -> None:
    """One formula: under the interpreter the same bits, on a GPU within what its exp differs by."""
    given = example_c128([(0, 70), (40, 30), (120, 20)], device)
    rows, ape, plan = given["rows"].cpu().numpy(), given["ape"].cpu().numpy(), given["plan"]
    state, start = given["fold"].cpu().numpy().copy(), [0, 40, 120]
    exact = given["fold"].clone()
    for sequence, (first, count) in enumerate(((0, 70), (70, 30), (100, 20))):
        position = start[sequence] + np.arange(count)
        for group in np.unique(position // 128):
            taken = np.flatnonzero(position // 128 == group)
            part = first + taken
            fresh = np.array([position[taken[0]] % 128 == 0])
            one, closed = np.array([0]), int(position[taken[-1]] % 128 == 127)
            feeds = tuple(np.array([row]) for row in part)
            steps = FoldPlan(feeds, np.array([sequence]), fresh, one[:closed], one[closed:])
            values, scores = rows[:, :512].copy(), rows[:, 512:].copy()
            scores[part] += ape[position[taken] % 128]
            fold_c128(values, scores, state, steps)
    compress_c128(**given, implementation="triton")
    got = given["fold"].cpu()
    if device == "cpu":
        assert same_bits(got, torch.from_numpy(state))
    folded_c128(given["rows"], given["ape"], exact, plan)
    assert torch.equal(got[:, 0], exact[:, 0].cpu())
    spread = 30.0  # of scores, which are sums of two normal numbers, and of random state
    torch.testing.assert_close(got, exact.cpu(), rtol=2 * (9 * 128 + 4 * spread) * U32, atol=1e-2)


def test_c4_makes_what_the_host_makes(device: str) -> None:
    """The norm's sums are in another order, so that a code in a hundred may be the next."""
    given = example_c4([(0, 32)], device)
    given["hadamard"] = False
    compress_c4(**given, implementation="triton")
    rows, ape = given["rows"].cpu().numpy().copy(), given["ape"].cpu().numpy()
    rows[:, 1280:] += np.tile(ape, (8, 1))
    windows = np.stack([np.take(rows, range(4 * j - 4, 4 * j + 4), 0, mode="clip") for j in range(8)])
    first, number = np.arange(8) == 0, torch.arange(8)
    rotation = Rotation.at(4 * number, inverse_frequencies(64, 1e4))
    for channels, norm, pool in (((0, 1024), "norm", "pool"), ((1024, 1280), "key_norm", "keys")):
        values, scores = windows[:, :, channels[0] : channels[1]], windows[:, :, 1280:][:, :, slice(*channels)]
        entries = rms_norm(pool_c4(values.copy(), scores.copy(), first), given[norm].cpu().numpy(), 1e-6)
        host = PagedRows(2, given[pool].layout)
        host.store(64 + number, torch.from_numpy(rotate_(entries, rotation)))
        got, want = gather(given[pool], given["plan"].target).float().cpu(), host.gather(64 + number)
        assert ((got - want).abs() <= 2 * error_bound(want, given[pool].layout)).all()
        apart = (got - want).abs() > 4 * U32 * want.abs()  # a float32 scale may differ in its last bits
        assert apart.double().mean() < 0.01


def test_nothing_to_do(device: str) -> None:
    for spans in ([], [(4, 0)]):
        given = example_c4(spans, device) if spans else example_c4([(4, 1)], device)
        if not spans:
            given["rows"] = given["rows"][:0]
            given["plan"] = example_c4([(4, 0)], device)["plan"]
        before = given["tail"].clone()
        compress_c4(**given)
        assert same_bits(before, given["tail"]) and not given["pool"].bytes.any()
    given = example_c128([(4, 0)], device)
    before = given["fold"].clone()
    compress_c128(**given)
    assert same_bits(before, given["fold"]) and not given["pool"].bytes.any()


DECODE = [(position, 1) for position in (3, 4, 6, 7, 129, 255, 90, 1001)]


C4_SPANS = {"decode": DECODE, "drafts": [(100 + i, 4) for i in range(4)], "prefill": [(0, 96)]}


@pytest.mark.parametrize("spans", [*C4_SPANS.values(), [(130, 64), (0, 33)]], ids=[*C4_SPANS, "chunks"])
def test_c4_bytes_moved(spans: list[tuple[int, int]], device: str) -> None:
    if device == "cuda":
        pytest.skip("counted by the interpreter")
    given = example_c4(spans, device)
    with traffic() as moved:
        compress_c4(**given, implementation="triton")
    assert moved.total <= 1.3 * least_bytes_c4(given["plan"], 2560, 64, given["pool"], given["keys"])


@pytest.mark.parametrize("spans", [DECODE, [(0, 512)], [(64, 128)]], ids=["decode", "prefill", "chunk"])
def test_c128_bytes_moved(spans: list[tuple[int, int]], device: str) -> None:
    if device == "cuda":
        pytest.skip("counted by the interpreter")
    given = example_c128(spans, device)
    with traffic() as moved:
        compress_c128(**given, implementation="triton")
    assert moved.total <= 1.3 * least_bytes_c128(given["plan"], 512, 64, given["pool"])
