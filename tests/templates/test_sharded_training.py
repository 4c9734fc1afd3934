"""Optimizers, averages and finiteness with FSDP2's parameters, on two gloo ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

RANK_SCRIPT = """
import copy, json, math, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from templates.optimizers import *
from templates.training_utils import *

dist.init_process_group("gloo")
rank = dist.get_rank()
found = {}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x):
        return x + self.mlp(x)


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(11, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 11)
    )


def shard(model):
    for block in model[1]:
        fully_shard(block)
    return fully_shard(model)


TOKENS = torch.arange(12).view(3, 4) % 11


def train(model, optimizer, steps, ema=None):
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(TOKENS).flatten(0, 1)
        nn.functional.cross_entropy(logits, TOKENS.flatten()).backward()
        optimizer.step()
        if ema:
            ema.update(model)


def difference(sharded, plain):
    pairs = zip(sharded.parameters(), plain.parameters(), strict=True)
    return max((p.full_tensor() - q).abs().max().item() for p, q in pairs)


builders = [build_adamw, build_sgd]
if hasattr(torch.optim, "Muon"):
    builders.append(build_muon)
for build in builders:
    plain, model = make(), shard(make())
    train(plain, build(plain, 1e-2, 0.1), 3)
    train(model, build(model, 1e-2, 0.1), 3)
    found[build.__name__] = difference(model, plain)
    found[build.__name__ + " moved"] = difference(model, make())
try:
    build_adafactor(shard(make()), 1e-2, 0.1)
except ValueError as error:
    found["adafactor"] = str(error)

plain, model = make(), shard(make())
plain_ema = ModelEMA(plain, 0.9)
ema = ModelEMA(model, 0.9, ema_model=shard(make(seed=1)))
optimizers = build_sgd(plain, 0.1, 0.0), build_sgd(model, 0.1, 0.0)
for _ in range(2):
    train(plain, optimizers[0], 2, plain_ema)
    train(model, optimizers[1], 2, ema)
    with torch.no_grad():
        found.setdefault("ema output", []).append(
            (ema(TOKENS) - plain_ema(TOKENS)).abs().max().item()
        )
        with ema.swapped_in(model), plain_ema.swapped_in(plain):
            found.setdefault("swapped output", []).append(
                (model(TOKENS) - plain(TOKENS)).abs().max().item()
            )
        found.setdefault("own output", []).append(
            (model(TOKENS) - plain(TOKENS)).abs().max().item()
        )
found["ema"] = difference(ema.ema_model, plain_ema.ema_model)
found["ema moved"] = difference(ema.ema_model, make())
other = ModelEMA(model, 0.9, ema_model=shard(make(seed=2)))
other.load_state_dict(copy.deepcopy(ema.state_dict()))
found["ema loaded"] = difference(other.ema_model, plain_ema.ema_model)

found["finite"] = [gradients_are_finite(model)]
if rank == 1:  # in a shard that only this rank holds
    model[1][0].mlp[0].weight.grad.to_local()[-1, 0] = math.nan
found["finite"].append(gradients_are_finite(model))
check_finite(1.0, model, 5)
if rank == 0:
    model[2].weight.to_local().data[0, 0] = math.inf
try:
    check_finite(1.0, model, 6)
except NonFiniteError as error:
    found["error"] = str(error)
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(found, file)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "rank.py"
    script.write_text(RANK_SCRIPT)
    store = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [sys.executable, *words, str(script), str(folder)],
        env={**os.environ, **store},
        check=True,
        timeout=300,
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_optimizers_step_sharded_parameters_as_in_one_process(found):
    for rank in found:
        assert rank["build_adamw"] < 1e-5
        assert rank["build_sgd"] < 1e-6
        assert rank["build_adamw moved"] > 1e-2
        assert "cannot step parameters that FSDP2 has sharded" in rank["adafactor"]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="in torch 2.9")
def test_muon_steps_sharded_parameters_up_to_rounding_in_bf16(found):
    for rank in found:
        assert rank["build_muon"] < 0.02 * rank["build_muon moved"]


def test_averages_of_sharded_models_are_those_of_one_process(found):
    for rank in found:
        for name in ("ema output", "swapped output", "own output"):
            assert max(rank[name]) < 1e-6, name
        assert rank["ema"] < 1e-6
        assert rank["ema moved"] > 1e-3
        assert rank["ema loaded"] < 1e-6


def test_ranks_agree_on_what_is_not_finite(found):
    assert [rank["finite"] for rank in found] == [[True, False]] * 2
    first, second = (rank["error"] for rank in found)
    assert "not finite: 2.weight (1 of 48 values)" in first
    assert "not finite: none on this rank" in second
    assert "Gradients: 1.0.mlp.0.weight (1 of 64 values)" in second
