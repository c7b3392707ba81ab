"""What any data parallel training, sharded AdamW, shards, checksums and ring all-reduce must do."""

from __future__ import annotations

import copy
import io
import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import backward
from torch.nn import functional as F

from lab.projects.decoder.component import Decoder
from lab.ranks import together
from lab.spec import Built, equal, floats, holds, near, normal, prop, seeds

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

WAIT = 15.0  # seconds until ranks that wait for each other are given up
ROWS, V, LENGTH = 12, 11, 8


def _on(world: int, work: Callable[[int], T]) -> list[T]:
    return together(world, work, timeout=WAIT)


def _mlp(seed: int = 0) -> nn.Module:
    """Bytes of its parameters in reverse: 24, 192, 64, 512, 64, 256."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        return nn.Sequential(*layers).double()


def _decoder(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(V, context=LENGTH, layers=1, width=8, heads=2, tied=True).double()


def _texts() -> Tensor:
    return torch.randint(V, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


def _loss(model: nn.Module, rows: slice | list[int] = slice(None)) -> Tensor:
    """The mean loss of some of the `ROWS` examples."""
    if isinstance(model, Decoder):
        text = _texts()[rows]
        return F.cross_entropy(model(text[:, :-1]).reshape(-1, V), text[:, 1:].reshape(-1))
    return F.mse_loss(model(normal(1, ROWS, 4)[rows]), normal(2, ROWS, 3)[rows])


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _of_one_process(model: nn.Module) -> list[Tensor]:
    backward(_loss(model))
    return _gradients(model)


def _refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except NotImplementedError:
        raise
    except Exception:  # noqa: BLE001 - which error it is, is the learner's choice
        return True
    return False


@prop("With one process, and no process group, nothing may be sent, and every number stays what it is.")
def one_process_needs_no_group(built: Built) -> None:
    holds(built.ranks() == (0, 1), f"ranks() is {built.ranks()} without a group, expected (0, 1)")
    model, x = _mlp(), normal(0, 2, 3)
    made = built.DataParallel(model)
    with made.no_sync():
        backward(_loss(model, slice(0, 6)))
    backward(_loss(model, slice(6, ROWS)))
    made.finish()
    made.detach()
    whole = _of_one_process(_mlp())
    for got, expected in zip(_gradients(model), whole, strict=True):
        equal(got, 2 * expected, "a gradient")
    other = copy.deepcopy(model)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    built.ShardedAdamW(model.parameters(), lr=0.1).step()
    torch.optim.AdamW(other.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.1).step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        equal(p.detach(), q.detach(), "a parameter after a step")
    equal(built.ring_all_reduce(x), x, "the sum over one rank")
    equal(built.mean_over_ranks(x), x, "the mean over one rank")
    holds(built.ranks_agree([x]), "one rank does not agree with itself")
    holds(not dist.is_initialized(), "a process group was made")


@prop(
    "A bucket takes tensors of one dtype in order until the next would not fit; one larger than a bucket stands alone.",
    sizes=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([torch.float32, torch.float64])), max_size=9),
    limit=st.integers(1, 64),
)
def buckets_are_filled_in_order(built: Built, sizes: list[tuple[int, torch.dtype]], limit: int) -> None:
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in sizes]
    buckets = built.in_buckets(tensors, limit)
    for dtype in (torch.float32, torch.float64):
        own = [bucket for bucket in buckets if bucket[0].dtype == dtype]
        expected: list[list[int]] = []
        for tensor in (t for t in tensors if t.dtype == dtype):
            if not expected or sum(expected[-1]) + tensor.nbytes > limit:
                expected.append([])
            expected[-1].append(tensor.nbytes)
        got = [[tensor.nbytes for tensor in bucket] for bucket in own]
        holds(got == expected, f"the bytes of {dtype} are in buckets {got}, expected {expected}")
    found = [id(tensor) for bucket in buckets for tensor in bucket]
    holds(sorted(found) == sorted(map(id, tensors)), "a tensor is in no bucket, or in two")


@prop(
    "The mean over the ranks is not the gradient of the whole batch: it is a sum, or a bucket is cut or filled wrongly."
)
def gradients_equal_those_of_one_process(built: Built) -> None:
    def work(rank: int, world: int) -> list[list[Tensor]]:
        found = []
        for make, limit in ((_mlp, 1), (_mlp, 300), (_mlp, 1 << 20), (_decoder, 1 << 20)):
            model = make()
            made = built.DataParallel(model, bucket_bytes=limit)
            for _ in range(2):  # a buffer must serve again
                model.zero_grad()
                backward(_loss(model, slice(rank, ROWS, world)))
                made.finish()
            found.append(_gradients(model))
        return found

    mlp, decoder = _of_one_process(_mlp()), _of_one_process(_decoder())
    for world in (2, 3):
        for rank, found in enumerate(_on(world, lambda rank, n=world: work(rank, n))):  # type: ignore[misc]
            for got, expected in zip(found, (mlp, mlp, mlp, decoder), strict=True):
                holds(len(got) == len(expected), f"{len(got)} gradients on rank {rank}, expected {len(expected)}")
                for a, b in zip(got, expected, strict=True):
                    equal(a, b, f"a gradient on rank {rank} of {world}")


class _WithBuffers(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = _decoder(seed)
        self.frozen = nn.Parameter(normal(seed, 3), requires_grad=False)
        self.turned = nn.Parameter(normal(seed, 2, 3).half().t())
        self.register_buffer("count", torch.tensor(seed + 5))
        self.register_buffer("mask", normal(seed, 4) > 0)


@prop("Ranks that were initialised differently must hold rank 0's numbers: parameters, frozen ones too, and buffers.")
def all_begin_as_rank_0(built: Built) -> None:
    def work(rank: int) -> dict[str, Tensor]:
        model = _WithBuffers(7 * rank)
        built.DataParallel(model)
        inner: Any = model.inner
        holds(inner.head.weight is inner.tokens.weight, "the tied parameter was replaced: write into it instead")
        return {name: value.detach() for name, value in model.state_dict().items()}

    expected = _WithBuffers(0).state_dict()
    for rank, found in enumerate(_on(2, work)):
        for name, value in expected.items():
            equal(found[name], value, f"{name} on rank {rank}", rtol=0, atol=0)


@prop("One all_reduce a bucket, begun in backward as soon as its last gradient is there: else nothing overlaps.")
def each_bucket_is_sent_once_and_during_backward(built: Built) -> None:
    def step(rank: int, limit: int) -> tuple[list[int], int, list[Any]]:
        """How many messages had begun at each gradient and at the end of backward, and all of them."""
        model, seen = _mlp(), []
        made = built.DataParallel(model, bucket_bytes=limit)
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(lambda _: seen.append(sent.call_count))  # type: ignore[no-untyped-call]
            backward(_loss(model, slice(rank, ROWS, 2)))
            during = sent.call_count
            made.finish()
        return seen, during, sent.call_args_list

    def work(rank: int) -> None:
        for limit, expected in ((1, 6), (300, 4), (1 << 20, 1)):
            seen, during, calls = step(rank, limit)
            holds(len(calls) == expected, f"{len(calls)} messages for {expected} buckets")
            holds(during >= expected - 1, f"{during} of {expected} messages had begun when backward ended")
            goes_on = all(call.kwargs.get("async_op") for call in calls[:during])
            holds(goes_on, "backward waits for a message: all_reduce takes async_op=True")
            if expected > 1:  # the gradients of the last layer are there at the second of six
                holds(seen[3] > 0, "nothing is sent until backward is past its middle: reverse the order")

    _on(2, work)


@prop("In no_sync nothing may be sent; then all that was accumulated goes, and equals the gradient of the big batch.")
def accumulation_sends_once(built: Built) -> None:
    def work(rank: int) -> list[Tensor]:
        model = _mlp()
        extra = nn.Parameter(torch.zeros(2, dtype=torch.float64))  # of the first micro-batch alone
        model.register_parameter("extra", extra)
        made = built.DataParallel(model, bucket_bytes=300)
        rows = list(range(rank, ROWS, 2))
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
            with suppress(KeyError), made.no_sync():
                raise KeyError  # what ends it must not matter
            with made.no_sync():
                backward(_loss(model, rows[:2]) / 3 + extra.sum())
                backward(_loss(model, rows[2:4]) / 3)
            before = sent.call_count
            backward(_loss(model, rows[4:]) / 3)
            during = sent.call_count - before
            made.finish()
        holds(before == 0, f"{before} messages were sent inside no_sync")
        holds(during > 0, "after no_sync backward sends nothing")
        return [p.grad for p in (extra, *model.parameters()) if p.grad is not None]

    expected = _of_one_process(_mlp())
    for rank, (extra, _, *found) in enumerate(_on(2, work)):
        equal(extra, torch.ones_like(extra), f"the gradient of the first micro-batch alone, on rank {rank}")
        for got, one in zip(found, expected, strict=True):
            equal(got, one, f"an accumulated gradient on rank {rank}")


@prop("A parameter unused on a rank counts there as zeros; unused on all it keeps None. Nothing may wait, or be stale.")
def unused_parameters_count_as_zeros(built: Built) -> None:
    def work(rank: int) -> list[list[Tensor | None]]:
        found: list[list[Tensor | None]] = []
        for limit in (1, 1 << 20):
            model = nn.ParameterList([torch.ones(n, dtype=torch.float64) for n in (2, 3, 4, 5)])
            first, second, both, _ = model
            made = built.DataParallel(model, bucket_bytes=limit)
            # In another order on each rank, and at last on one rank not at all.
            for scale, used in ((2.0, (both, second) if rank else (first, both)), (8.0, () if rank else (both,))):
                model.zero_grad()
                if used:
                    backward(torch.stack([scale * p.sum() for p in used]).sum())
                made.finish()
                found.append([p.grad for p in model])
        return found

    for rank, (one, two, three, four) in enumerate(_on(2, work)):
        # None stands for a gradient that must not be there.
        for got, values in zip((one, two, three, four), ((1, 1, 2, None), (None, None, 4, None)) * 2, strict=True):
            for i, (grad, value) in enumerate(zip(got, values, strict=True)):
                if value is None or grad is None:
                    holds(value is None and grad is None, f"gradient {i} on rank {rank} is {grad}, expected {value}")
                else:
                    equal(grad, torch.full_like(grad, value), f"gradient {i} on rank {rank}")


@prop("Gradients of each dtype travel in it, and near its largest number the mean must not overflow: divide first.")
def each_dtype_keeps_its_own_and_does_not_overflow(built: Built) -> None:
    kinds = (torch.float16, torch.float64, torch.bfloat16, torch.float16, torch.float32)

    def work(rank: int) -> list[Tensor]:
        model = nn.ParameterList([torch.ones(2, dtype=dtype) for dtype in kinds])
        made = built.DataParallel(model)
        for p in model:
            p.grad = torch.full_like(p, 60_000.0 if p.dtype == torch.float16 else 2.0 + 2 * rank)
        made.finish()
        return _gradients(model)

    for found in _on(2, work):
        for got, dtype in zip(found, kinds, strict=True):
            expected = 60_000.0 if dtype == torch.float16 else 3.0
            equal(got, torch.full((2,), expected, dtype=dtype), f"a gradient of {dtype}")


@prop("A second backward before finish must be refused, as half of it would be lost; after detach nothing is sent.")
def a_second_backward_is_refused_and_detach_ends_it(built: Built) -> None:
    def work(rank: int) -> None:
        model = _mlp()
        made = built.DataParallel(model)
        backward(_loss(model, slice(rank, ROWS, 2)))
        refused = _refused(lambda: backward(_loss(model, slice(rank, ROWS, 2))))
        holds(refused, "a second backward before finish() is taken")
        made.finish()
        made.detach()
        model.zero_grad()
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
            backward(_loss(model, slice(rank, ROWS, 2)))
            backward(_loss(model, slice(rank, ROWS, 2)))
        holds(sent.call_count == 0, f"after detach backward sent {sent.call_count} messages")

    _on(2, work)
    holds(_refused(lambda: built.DataParallel(_mlp(), bucket_bytes=0)), "buckets of 0 bytes are taken")


def _parameters(sizes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(normal(i, size)) for i, size in enumerate(sizes)]


def _steps(optimiser: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> list[Tensor]:
    """Step on gradients that follow from the step; one parameter has none in each third."""
    for step in steps:
        for group in optimiser.param_groups:
            group["lr"] *= 0.9
        for i, p in enumerate(params):
            p.grad = None if (step + i) % 3 == 0 else normal(100 * step + i, *p.shape)
        optimiser.step()
    return [p.detach().clone() for p in params]


def _groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "weight_decay": 0.3}, {"params": params[2:], "betas": (0.8, 0.9)}]


@prop("Sharded or not, a step must give AdamW's parameters on every rank: each share is updated once, and sent to all.")
def sharded_steps_equal_those_of_adamw(built: Built) -> None:
    def work(_: int) -> tuple[list[Tensor], list[Tensor]]:
        params, single = _parameters((5, 3, 8, 1, 4, 2)), _parameters((3,))
        several = _steps(built.ShardedAdamW(_groups(params), lr=0.1, eps=1e-6), params, range(5))
        return several, _steps(built.ShardedAdamW(single), single, range(1, 5))  # some ranks own nothing

    params, single = _parameters((5, 3, 8, 1, 4, 2)), _parameters((3,))
    theirs = torch.optim.AdamW(_groups(params), lr=0.1, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    expected = _steps(theirs, params, range(5))
    expected += _steps(torch.optim.AdamW(single, betas=(0.9, 0.95), weight_decay=0.1), single, range(1, 5))
    for world in (2, 3):
        for rank, (several, one) in enumerate(_on(world, work)):
            for i, (got, wanted) in enumerate(zip([*several, *one], expected, strict=True)):
                equal(got, wanted, f"parameter {i} on rank {rank} of {world}")


def _held(optimiser: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[int]:
    """How many numbers of state there are for each parameter."""
    states = [optimiser.state.get(p, {}) for p in params]
    return [sum(v.numel() for v in s.values() if isinstance(v, Tensor) and v.dim()) for s in states]


@prop("A parameter's state belongs to just one rank, in even shares; saved and loaded, training goes on unchanged.")
def state_is_held_once_and_can_be_saved(built: Built) -> None:
    sizes = (100, 1, 100, 1, 100, 1)

    def work(rank: int) -> list[int]:
        params = _parameters(sizes)
        optimiser = built.ShardedAdamW(params, lr=0.1)
        _steps(optimiser, params, range(3))
        held = _held(optimiser, params)
        file = io.BytesIO()
        torch.save(optimiser.state_dict(), file)
        file.seek(0)
        others = [nn.Parameter(p.detach().clone()) for p in params]
        loaded = built.ShardedAdamW(others, lr=0.7)
        loaded.load_state_dict(torch.load(file))
        holds(_held(loaded, others) == held, f"loaded on rank {rank}, the state is not what was saved")
        after = zip(_steps(loaded, others, range(3, 6)), _steps(optimiser, params, range(3, 6)), strict=True)
        for got, expected in after:
            equal(got, expected, f"a parameter on rank {rank} after the state was loaded")
        states = [optimiser.state_dict()]
        dist.broadcast_object_list(states, 1)
        refused = rank == 1 or _refused(lambda: loaded.load_state_dict(states[0]))
        holds(refused, "rank 0 takes the state of rank 1, and with it means of other parameters")
        return held

    found = _on(2, work)
    for i, (held, size) in enumerate(zip(zip(*found, strict=True), sizes, strict=True)):
        holds(sorted(held) == [0, 2 * size], f"of parameter {i}, of {size} numbers, the ranks hold {held} of state")
    most = max(map(sum, found))
    holds(most == 400, f"a rank holds {most} of the 606 numbers; whole tensors can be shared as 400 and 206")


@prop(
    "In an epoch ranks see equally many examples, together all, none twice but to fill up; each epoch in a new order.",
    count=st.integers(0, 40),
    world=st.integers(1, 6),
    epoch=st.integers(0, 5),
    seed=seeds,
)
def shards_are_disjoint_and_cover(built: Built, count: int, world: int, epoch: int, seed: int) -> None:
    shares = [list(map(int, built.shard(count, r, world, epoch=epoch, seed=seed))) for r in range(world)]
    each = -(-count // world)
    lengths = [len(share) for share in shares]
    holds(lengths == [each] * world, f"ranks see {lengths} examples, expected {each} each")
    seen = sorted(i for share in shares for i in share)
    holds(set(seen) == set(range(count)), f"not all of {count} examples are seen: {seen}")
    if count >= world:  # else there is no other way than to see one more often
        holds(max(map(seen.count, seen), default=1) <= 2, f"an example is seen more than twice: {seen}")
        holds(len(seen) - len(set(seen)) == each * world - count, f"more are seen twice than must be: {seen}")
    again = list(map(int, built.shard(count, 0, world, epoch=epoch, seed=seed)))
    holds(again == shares[0], "the same epoch gave another share")
    orders = {
        tuple(map(int, built.shard(60, 0, 2, epoch=e, seed=s)))
        for s, e in ((seed, epoch), (seed, epoch + 1), (seed + 1, epoch), (seed + 2, epoch + 2))
    }
    holds(len(orders) == 4, "another epoch or another seed gives the same order")
    holds(
        _refused(lambda: built.shard(count, world, world, epoch=epoch, seed=seed)), f"rank {world} of {world} is taken"
    )


@prop(
    "A checksum must change with a single bit, the sign of a zero, a shape or the order: hash the bits, sum no floats.",
    seed=seeds,
    size=st.integers(2, 9),
    dtype=floats,
    data=st.data(),
)
def a_checksum_sees_every_bit_and_the_order(
    built: Built, seed: int, size: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    x, y = normal(seed, 2, size, dtype=dtype), normal(seed + 1, size, dtype=dtype)
    x[0, 0], x[0, 1] = 1.0, 0.0
    sum_of = built.checksum([x, y])
    holds(sum_of.shape == () and sum_of.dtype in (torch.int64, torch.float64), f"the checksum is {sum_of!r}")
    holds(sum_of == built.checksum(iter([x.t().clone().t(), y.clone()])), "equal numbers have different checksums")
    place, bit = data.draw(st.integers(0, 2 * size - 1), "place"), data.draw(st.integers(0, 7), "bit")
    flipped, negative, moved = x.clone(), x.clone(), x.roll(1, 0)
    bits = flipped.view(-1).view(torch.uint8)
    bits[place * dtype.itemsize] ^= 1 << bit
    negative[0, 1] = -0.0
    changes = {
        f"bit {bit} of entry {place} flipped": [flipped, y],
        "the sign of a zero": [negative, y],
        "rows exchanged": [moved, y],
        "tensors exchanged": [y, x],
        "another shape": [x.view(-1), y],
        "entries moved to the next tensor": [x[:1], torch.cat([x[1], y])],
        "a tensor less": [x],
    }
    for what, tensors in changes.items():
        holds(sum_of != built.checksum(tensors), f"the checksum is the same after {what}")


@prop("All ranks must learn the same: whether bits agree, which rank differs from most, and the mean of a number.")
def ranks_compare_and_average(built: Built) -> None:
    def work(rank: int) -> list[object]:
        found: list[object] = []
        for odd in (None, 0, 1, 2):
            x = torch.zeros(3)
            if rank == odd:
                x[1] = -0.0
            found += [built.ranks_agree([x]), built.rank_that_differs(iter([x]))]
        x = normal(rank, 2, 3).requires_grad_()
        mean = built.mean_over_ranks(x)
        holds(not mean.requires_grad, "the mean carries a graph")
        equal(x.detach(), normal(rank, 2, 3), "the tensor that was averaged")
        equal(mean, torch.stack([normal(r, 2, 3) for r in range(3)]).mean(0), "the mean over 3 ranks")
        near(float(built.mean_over_ranks(torch.tensor(rank + rank % 2))), 4 / 3, 1e-6, "the mean of integers 0, 2, 2")
        return [*found, built.ranks()]

    for rank, found in enumerate(_on(3, work)):
        expected = [True, None, False, 0, False, 1, False, 2, (rank, 3)]
        holds(found == expected, f"rank {rank} learns {found}, expected {expected}")


@prop("The ring must give the sum, for any size and dtype, the same bits everywhere, and send 2 (N - 1) / N of it.")
def the_ring_sums_and_sends_the_closed_form(built: Built) -> None:
    cases: list[tuple[torch.dtype, tuple[int, ...]]] = [
        (dtype, (n,)) for dtype in (torch.float64, torch.bfloat16, torch.int64) for n in (0, 1, 2, 5, 12)
    ]
    cases += [(torch.float32, ()), (torch.float32, (3, 7))]

    def inputs(rank: int) -> list[Tensor]:
        made = [normal(rank + 5, 21, scale=8)[: math.prod(shape)].reshape(shape).to(dtype) for dtype, shape in cases]
        return [*made[:-1], made[-1].t()]  # the last is not contiguous

    def work(rank: int) -> tuple[list[Tensor], list[int]]:
        bytes_sent: list[int] = []

        def counted(send: Callable[..., T]) -> Callable[..., T]:
            def call(tensor: Tensor, *args: Any, **kwargs: Any) -> T:
                bytes_sent[-1] += tensor.nbytes
                return send(tensor, *args, **kwargs)

            return call

        found = []
        with (
            patch.object(dist, "isend", counted(dist.isend)),
            patch.object(dist, "send", counted(dist.send)),
            patch.object(dist, "all_reduce", side_effect=AssertionError("the ring calls all_reduce")),
        ):
            for x, before in zip(inputs(rank), inputs(rank), strict=True):
                bytes_sent.append(0)
                found.append(built.ring_all_reduce(x))
                equal(x, before, "the tensor that was summed")
        return found, bytes_sent

    for world in (2, 3):
        results = _on(world, work)
        for i, parts in enumerate(zip(*(inputs(rank) for rank in range(world)), strict=True)):
            expected = torch.stack(parts).sum(0)
            for rank, (found, _) in enumerate(results):
                equal(
                    found[i], expected, f"the sum of {list(expected.shape)} {expected.dtype} on rank {rank} of {world}"
                )
                holds(torch.equal(found[i], results[0][0][i]), f"rank {rank} has other bits than rank 0")
            sent = [counts[i] for _, counts in results]
            near(sum(sent) / world, built.ring_bytes(world, expected.nbytes), 1e-9, f"bytes a rank sends of {world}")
            near(
                built.ring_bytes(world, expected.nbytes), 2 * (world - 1) / world * expected.nbytes, 1e-9, "ring_bytes"
            )
            even = expected.numel() % world > 0 or max(sent) == min(sent)
            holds(even, f"ranks send {sent} bytes, although {world} divides the size")
    holds(_refused(lambda: built.ring_bytes(0, 8)), "a ring of 0 ranks is taken")


@prop("Five steps on two ranks, each on its half of the batch, must end where one process ends on the whole batch.")
def training_equals_that_of_one_process(built: Built) -> None:
    def work(rank: int) -> tuple[list[Tensor], list[float], bool]:
        model = _decoder(rank)
        made = built.DataParallel(model, bucket_bytes=1000)
        optimiser = built.ShardedAdamW(model.parameters(), lr=0.01)
        losses = []
        for step in range(5):
            optimiser.zero_grad()
            loss = _loss(model, list(built.shard(ROWS, rank, 2, epoch=step, seed=0)))
            backward(loss)
            made.finish()
            optimiser.step()
            losses.append(float(built.mean_over_ranks(loss)))
        return [p.detach() for p in model.parameters()], losses, built.ranks_agree(model.parameters())

    model = _decoder(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    expected = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = _loss(model)
        backward(loss)
        optimiser.step()
        expected.append(float(loss.detach()))
    for rank, (params, losses, agree) in enumerate(_on(2, work)):
        holds(agree, "after five steps the ranks hold different bits")
        for got, wanted in zip(losses, expected, strict=True):
            near(got, wanted, 1e-7, f"the mean loss on rank {rank}")
        for got_p, p in zip(params, model.parameters(), strict=True):
            equal(got_p, p.detach(), f"a parameter on rank {rank}", rtol=1e-6, atol=1e-6)
