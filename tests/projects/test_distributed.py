"""Data parallel under torchrun, as a user starts it: two processes end where one ends on both their batches."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import backward
from torch.nn import functional as F

from lab.projects.decoder.component import Decoder

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.nn import functional as F
from lab.projects.decoder.component import Decoder
from lab.projects.distributed.component import DataParallel, ShardedAdamW, checksum, mean_over_ranks, ranks, shard

dist.init_process_group("gloo")
rank, world = ranks()
torch.manual_seed(rank)  # broadcasting must undo it
model = Decoder(11, context=8, layers=2, width=16, heads=2, tied=True).double()
texts = torch.randint(11, (8, 9), generator=torch.Generator().manual_seed(0))
parallel, optimiser = DataParallel(model, bucket_bytes=4096), ShardedAdamW(model.parameters(), lr=0.01)
losses, gradients, seen = [], [], []
for step in range(3):
    rows = shard(len(texts), rank, world, epoch=step, seed=0)
    seen.append(rows)
    optimiser.zero_grad()
    with parallel.no_sync():
        first = F.cross_entropy(model(texts[rows[:2], :-1]).reshape(-1, 11), texts[rows[:2], 1:].reshape(-1)) / 2
        first.backward()
    second = F.cross_entropy(model(texts[rows[2:], :-1]).reshape(-1, 11), texts[rows[2:], 1:].reshape(-1)) / 2
    second.backward()
    parallel.finish()
    gradients.append([p.grad.clone() for p in model.parameters()])
    losses.append(float(mean_over_ranks(first + second)))
    optimiser.step()
state = sum(v.numel() for s in optimiser.state.values() for v in s.values() if isinstance(v, torch.Tensor))
sums = [int(checksum(model.parameters())), int(checksum(g for step in gradients for g in step))]
values = [p.detach() for p in model.parameters()]
told = {"losses": losses, "gradients": gradients, "seen": seen, "state": state, "sums": sums, "values": values}
torch.save(told, f"{sys.argv[1]}/{rank}.pt")
dist.destroy_process_group()
"""


def one_process() -> tuple[list[float], list[list[Tensor]], list[Tensor]]:
    """Losses, gradients and parameters of three steps on the whole batch, by torch's own optimiser."""
    torch.manual_seed(0)
    model = Decoder(11, context=8, layers=2, width=16, heads=2, tied=True).double()
    texts = torch.randint(11, (8, 9), generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    losses, gradients = [], []
    for _ in range(3):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(texts[:, :-1]).reshape(-1, 11), texts[:, 1:].reshape(-1))
        backward(loss)
        losses.append(float(loss.detach()))
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimiser.step()
    return losses, gradients, [p.detach() for p in model.parameters()]


def test_two_processes_of_torchrun_train_as_one_does_on_both_their_batches(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told: list[dict[str, Any]] = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for mine, other in zip(told[0]["seen"], told[1]["seen"], strict=True):
        assert len(mine) == len(other) == 4
        assert sorted([*mine, *other]) == list(range(8))  # disjoint, and all
    assert told[0]["seen"][0] != told[0]["seen"][1]
    assert told[0]["sums"] == told[1]["sums"]  # of parameters and of every step's gradients
    losses, gradients, values = one_process()
    for rank in range(2):
        torch.testing.assert_close(told[rank]["losses"], losses)
        for got, expected in zip(told[rank]["gradients"], gradients, strict=True):
            torch.testing.assert_close(got, expected)
        torch.testing.assert_close(told[rank]["values"], values)
    numbers = sum(value.numel() for value in values)
    assert told[0]["state"] + told[1]["state"] == 2 * numbers
    assert abs(told[0]["state"] - told[1]["state"]) < 0.2 * numbers
