"""What torchrun starts for test_distributed_ranks.py: checks in a real process group.

    torchrun --nproc-per-node=N distributed_checks.py CHECK FOLDER

Rank 0 writes what it measured to FOLDER/figures.json; a failed check ends the process.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from templates.checkpoint_io import (
    CheckpointError,
    LogPosition,
    RankStateSaver,
    RunState,
    ShardedStateSaver,
    full_state_dict,
    list_sharded_states,
    load_checkpoint,
    save_checkpoint,
    save_training_state,
)
from templates.distributed import (
    any_rank,
    average_gradients,
    broadcast_model,
    cleanup_distributed,
    clip_gradients,
    distributed_rank,
    distributed_world_size,
    gather_rows,
    is_main_process,
    seed_rank,
    set_gradient_sync,
    setup_distributed,
    shard_model,
    sum_over_ranks,
    wrap_ddp,
)
from templates.error_handlers import SafeTrainingContext, train_with_oom_recovery
from templates.training_utils import (
    enable_gradient_checkpointing,
    split_batch,
    step_optimizer,
)

CPU = torch.device("cpu")
ROWS = 12
STEPS = 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(torch.tanh(self.linear(self.norm(x))))


class TinyModel(nn.Module):
    """Tied embedding and head around blocks; 7 wide, so that no shard is even."""

    def __init__(self, tied_blocks: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 7)
        self.blocks = nn.ModuleList(Block(7) for _ in range(3))
        if tied_blocks:
            self.blocks[2].linear.weight = self.blocks[0].linear.weight
        self.head = nn.Linear(7, 11)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens).mean(1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make_model(dtype: torch.dtype = torch.float64, **options) -> TinyModel:
    torch.manual_seed(0)
    return TinyModel(**options).to(dtype)


def make_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randint(11, (ROWS, 5), generator=generator),
        torch.randint(11, (ROWS,), generator=generator),
    )


def share(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """This rank's rows: very uneven shares."""
    sizes = {1: [12], 2: [9, 3], 3: [7, 3, 2]}[distributed_world_size()]
    return tuple(part.split(sizes)[distributed_rank()] for part in batch)


def backward(model: nn.Module, pieces) -> None:
    """The gradients of this rank's part of the mean over all rows."""
    for number, (tokens, targets) in enumerate(pieces):
        set_gradient_sync(model, number == len(pieces) - 1)
        loss = nn.functional.cross_entropy(model(tokens), targets)
        (loss * len(targets) / ROWS * distributed_world_size()).backward()


def train(model: nn.Module, compute_gradients, steps: int = STEPS):
    """Weights and gradient norms after some steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    norms = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        compute_gradients(model, make_batch(step))
        norms.append(clip_gradients(model, 0.5))
        optimizer.step()
    return whole_weights(model), torch.stack(norms)


def whole_weights(model: nn.Module) -> list[torch.Tensor]:
    values = [parameter.detach() for parameter in model.parameters()]
    return [v.full_tensor() if hasattr(v, "full_tensor") else v for v in values]


def one_process(**options):
    """The same training on all rows, without a group's help."""

    def compute_gradients(model, batch):
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()

    return train(make_model(**options), compute_gradients)


def largest_difference(found, expected) -> float:
    weights, norms = found
    pairs = [*zip(weights, expected[0], strict=True), (norms, expected[1])]
    return max((a - b).abs().max().item() for a, b in pairs)


def on_share(count: int = 1):
    """This rank's rows in `count` pieces: FSDP2 needs as many on every rank."""

    def compute_gradients(model, batch):
        tokens, targets = share(batch)
        pieces = zip(
            tokens.tensor_split(count), targets.tensor_split(count), strict=True
        )
        backward(model, list(pieces))

    return compute_gradients


def after_backward(model: nn.Module, batch) -> None:
    backward(model, list(split_batch(share(batch), 2)))  # 5 pieces here, 2 there
    average_gradients(model)


def check_equivalence() -> dict[str, float]:
    """Every way to train equals one process on the same rows."""
    expected, tied_expected = one_process(), one_process(tied_blocks=True)
    found = {}

    def compare(name, model, compute_gradients, reference=expected):
        difference = largest_difference(train(model, compute_gradients), reference)
        assert difference < 1e-13, (name, difference)
        found[name] = difference

    def sharded(replicas=1, **options):
        model = make_model(**options)
        return shard_model(model, model.blocks, CPU, torch.float32, replicas)

    compare("ddp", wrap_ddp(make_model(), CPU), on_share())
    compare("ddp accumulated", wrap_ddp(make_model(), CPU), on_share(2))
    checkpointed = enable_gradient_checkpointing(make_model())
    compare("ddp checkpointed", wrap_ddp(checkpointed, CPU), on_share())
    started_apart = make_model()
    with torch.no_grad():
        started_apart.head.bias += distributed_rank()
    broadcast_model(started_apart)
    compare("average_gradients", started_apart, after_backward)
    compare("fsdp", sharded(), on_share())
    compare("fsdp accumulated", sharded(), on_share(2))
    checkpointed = enable_gradient_checkpointing(make_model())
    shard_model(checkpointed, checkpointed.blocks, CPU)
    compare("fsdp checkpointed", checkpointed, on_share())
    compare("fsdp tied blocks", sharded(tied_blocks=True), on_share(), tied_expected)
    compare("hsdp", sharded(replicas=distributed_world_size()), on_share())
    return found


def check_exchanges() -> dict[str, float]:
    """The small functions, against what they promise."""
    rank, ranks = distributed_rank(), distributed_world_size()
    assert any_rank(rank == ranks - 1)
    assert not any_rank(False)
    value = torch.full((2, 3), float(rank)).t()
    assert sum_over_ranks(value).tolist() == [[ranks * (ranks - 1) / 2] * 2] * 3
    assert value[0, 0] == rank

    # rows: a contrastive loss over all of them, one rank without any
    generator = torch.Generator().manual_seed(1)
    x_BD = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    sizes = {2: [4, 2], 3: [4, 0, 2]}[ranks]
    start = sum(sizes[:rank])
    whole = x_BD.clone().requires_grad_()
    mine = x_BD[start : start + sizes[rank]].clone().requires_grad_()

    def loss_of(rows_BD, all_BD, first):
        labels = torch.arange(len(rows_BD)) + first
        logits = rows_BD @ all_BD.T
        return nn.functional.cross_entropy(logits, labels, reduction="sum") / 6

    expected = loss_of(whole, whole, 0)
    expected.backward()
    rows = gather_rows(mine)
    assert torch.equal(rows, x_BD)
    loss = loss_of(mine, rows, start)
    loss.backward()
    difference = (mine.grad - whole.grad[start : start + sizes[rank]]).abs()
    assert difference.sum() < 1e-14
    assert abs(sum_over_ranks(loss) - expected) < 1e-14

    # a gradient that only rank 0 has, one that nobody has, statistics of BatchNorm
    model = nn.ModuleDict(
        {n: nn.Linear(2, 2) for n in "abc"} | {"n": nn.BatchNorm1d(2)}
    )
    average_of_b = (ranks - 1) / 2
    model["n"].running_mean += rank + 5
    model["n"].register_buffer("mine", torch.tensor(rank), persistent=False)
    if rank == 0:
        model["a"].weight.grad = torch.ones(2, 2)
    model["b"].weight.grad = torch.full((2, 2), float(rank))
    average_gradients(model)
    assert (model["a"].weight.grad - 1 / ranks).abs().max() < 1e-7
    assert (model["b"].weight.grad - average_of_b).abs().max() < 1e-6
    assert all(p.grad is None for p in model["c"].parameters())
    assert model["n"].running_mean.tolist() == [5, 5]
    assert model["n"].mine == rank

    # DDP's own exchange of statistics, after the stand-in of its first step
    wrapped = wrap_ddp(nn.BatchNorm1d(2), CPU)
    for _ in range(2):
        wrapped(torch.full((4, 2), float(rank))).sum().backward()
    found = wrapped.module.running_mean  # rank 0's 0, then a tenth of the way to rank
    assert (found - 0.1 * rank).abs().max() < 1e-6

    # the same first weights, other dropout
    seed_rank(3)
    draws = [torch.zeros(4) for _ in range(ranks)]
    dist.all_gather(draws, torch.rand(4))
    assert len({tuple(draw.tolist()) for draw in draws}) == ranks
    with pytest.raises(ValueError, match=f"replicas={ranks + 1} does not divide"):
        shard_model(make_model(), [], CPU, replicas=ranks + 1)
    return {}


def check_unsynchronised() -> dict[str, float]:
    """Without synchronisation backward exchanges nothing: gradients are this rank's."""
    batch = share(make_batch(0))
    own = make_model()
    backward(own, [batch])
    expected = [p.grad for p in own.parameters()]

    wrapped = wrap_ddp(make_model(), CPU)
    sharded = make_model()
    shard_model(sharded, sharded.blocks, CPU)
    for model in (wrapped, sharded):
        set_gradient_sync(model, False)
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        (loss * len(batch[1]) / ROWS * distributed_world_size()).backward()
    assert_equal([p.grad for p in wrapped.parameters()], expected)
    assert all(p.grad is None for p in sharded.parameters())  # kept whole, inside
    return {}


def check_evaluation_first() -> dict[str, float]:
    """A resumed run may begin with an evaluation; then it still trains."""

    def evaluate_and_train(model, batch):
        with torch.inference_mode():
            model(batch[0])
        on_share()(model, batch)

    model = make_model()
    shard_model(model, model.blocks, CPU)
    found = train(model, evaluate_and_train)
    assert largest_difference(found, one_process()) < 1e-13
    return {}


def check_precisions() -> dict[str, float]:
    """bf16 and fp16 stay near fp32; an overflow on one rank skips the step on all."""

    def train_in(dtype, overflow_at=None):
        model = make_model(torch.float32)
        shard_model(model, model.blocks, CPU, dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        enabled = dtype is torch.float16
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024)
        taken = []
        for step in range(3):
            optimizer.zero_grad(set_to_none=True)
            tokens, targets = share(make_batch(step))
            logits = model(tokens)
            assert logits.dtype is torch.float32
            loss = nn.functional.cross_entropy(logits, targets) * len(targets) / ROWS
            scaler.scale(loss * distributed_world_size()).backward()
            gradient = model.blocks[0].linear.weight.grad
            assert gradient.dtype is torch.float32
            if step == overflow_at and is_main_process():
                gradient.to_local()[0] = torch.inf
            scaler.unscale_(optimizer)
            norm = clip_gradients(model, 0.5)
            taken.append(step_optimizer(optimizer, scaler))
            assert norm.isfinite() == (step != overflow_at)
        return whole_weights(model), [bool(step) for step in taken], scaler.get_scale()

    expected, taken, _ = train_in(torch.float32)
    figures = {}
    for dtype in (torch.bfloat16, torch.float16):
        found, taken, _ = train_in(dtype)
        assert all(taken)
        pairs = zip(found, expected, strict=True)
        figures[str(dtype)] = max((a - b).abs().max().item() for a, b in pairs)
        assert 0 < figures[str(dtype)] < 0.05
    found, taken, scale = train_in(torch.float16, overflow_at=1)
    assert taken == [True, False, True]
    assert scale == 512
    assert all(weight.isfinite().all() for weight in found)
    return figures


def check_out_of_memory() -> dict[str, float]:
    """One rank fails at a random micro-batch; all halve, the result is the same."""
    expected = one_process()
    rank, ranks = distributed_rank(), distributed_world_size()
    chance = random.Random(5)  # the same on all ranks
    model = make_model()
    state = {"micro_batch": 8, "tries": 0}
    seen = []

    def compute_gradients(model, batch):
        rows = share(batch)
        failing, failing_call = chance.randrange(ranks), chance.randrange(6)
        fails_forward = chance.random() < 0.5

        def attempt(micro_batch):
            state["tries"] += 1
            model.zero_grad(set_to_none=True)
            for call, (tokens, targets) in enumerate(split_batch(rows, micro_batch)):
                doomed = rank == failing and call >= failing_call and micro_batch > 1
                if doomed and fails_forward:
                    raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
                loss = nn.functional.cross_entropy(model(tokens), targets)
                (loss * len(targets) / ROWS * ranks).backward()
                if doomed:
                    raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
            return micro_batch

        state["micro_batch"] = train_with_oom_recovery(
            attempt,
            state["micro_batch"],
            max_retries=8,
            report=seen.append,
            agree=any_rank,
        )
        average_gradients(model)

    found = train(model, compute_gradients)
    difference = largest_difference(found, expected)
    assert difference < 1e-13
    tries = torch.tensor(float(state["tries"]))
    assert sum_over_ranks(tries) == ranks * tries  # all ranks tried as often
    assert state["tries"] > STEPS  # it did fail somewhere
    assert len(seen) == state["tries"] - STEPS
    return {"difference": difference, "tries": state["tries"]}


class Run:
    """A run with dropout, a log and a sum that each rank keeps for itself."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.model = make_model()
        for block in self.model.blocks:
            block.dropout.p = 0.5
        folder.mkdir(exist_ok=True)
        self.folder, self.log = folder / "states", folder / "log"
        self.reports: list[str] = []
        self.wrap()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.run = RunState(step=0)
        self.own = RunState(loss_sum=0.0)
        self.parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "run": self.run,
            "own": self.own,
            "log": LogPosition(self.log),
        }
        self.saver = self.make_saver()
        seed_rank(seed)

    def wrap(self) -> None:
        self.trained = wrap_ddp(self.model, CPU)

    def make_saver(self):
        return RankStateSaver(
            self.folder, self.parts, report=self.reports.append, rank_parts=["own"]
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            tokens, targets = share(make_batch(self.run.step))
            self.optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(self.trained(tokens), targets)
            loss.backward()
            self.optimizer.step()
            self.run.step += 1
            self.own.loss_sum += loss.item()
            if is_main_process():
                with open(self.log, "a") as file:
                    file.write(f"{self.run.step}\n")

    def values(self) -> list[torch.Tensor]:
        own = torch.tensor(self.own.loss_sum, dtype=torch.float64)
        return [*whole_weights(self.model), own]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def flip_bit(path: Path) -> None:
    if is_main_process():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    dist.barrier()


def check_rank_saver(folder: Path) -> dict[str, float]:
    """RankStateSaver: exact on every rank, one choice of file, errors for all."""
    first = Run(folder, seed=1)
    assert first.saver.resume(CPU) is None
    with first.saver as saver:
        for _ in range(2):
            first.train(2)
            saver.save(first.run.step)
        first.train(2)
    expected = first.values()

    second = Run(folder, seed=2)
    newest = first.folder / "step-00000004.pt"
    assert second.saver.resume(CPU) == newest
    assert second.run.step == 4
    if is_main_process():
        assert second.log.read_text() == "1\n2\n3\n4\n"
    second.train(2)
    assert_equal(second.values(), expected)

    if not is_main_process():  # one rank cuts the log, from another's view it may grow
        LogPosition(second.log).load_state_dict({"bytes": 0})
    dist.barrier()
    assert second.log.stat().st_size > 0

    flip_bit(newest)
    third = Run(folder, seed=3)
    assert third.saver.resume(CPU) == first.folder / "step-00000002.pt"
    assert bool(third.reports) == is_main_process()
    third.train(4)
    assert_equal(third.values(), expected)

    # of one process: all but the random numbers
    if is_main_process():
        save_training_state(first.folder, 9, first.parts)
    dist.barrier()
    fourth = Run(folder, seed=4)
    assert fourth.saver.resume(CPU).name == "step-00000009.pt"
    assert_equal(fourth.values()[:-1], expected[:-1])
    if is_main_process():
        assert "saved by 1 rank(s), now" in fourth.reports[0]

    for path in sorted(first.folder.glob("*.pt")):
        flip_bit(path)
    with pytest.raises(CheckpointError, match="every checkpoint in it is damaged"):
        fourth.saver.resume(CPU)
    fourth.saver.folder = folder / "log"  # a file
    fourth.saver.save(1)
    with pytest.raises(CheckpointError, match="could not be written"):
        fourth.saver.save(2)
    return {}


class ShardedRun(Run):
    """The same with FSDP2 in the model itself."""

    replicas = 1

    def wrap(self) -> None:
        blocks = self.model.blocks
        self.trained = shard_model(self.model, blocks, CPU, replicas=self.replicas)

    def make_saver(self):
        return ShardedStateSaver(self.folder, self.parts, report=self.reports.append)


class ReplicatedRun(ShardedRun):
    @property
    def replicas(self) -> int:
        return distributed_world_size()


def check_sharded_saver(folder: Path) -> dict[str, float]:
    """ShardedStateSaver: exact, whole folders only, one choice for all ranks."""
    first = ShardedRun(folder, seed=1)
    assert first.saver.resume(CPU) is None
    with first.saver as saver:
        first.train(2)
        saver.save(2)
        saver.save(2)  # again at the same step: not over the good one
        first.train(2)
        saver.save(4)
        first.train(2)  # goes on while it is written
    expected = first.values()
    names = ["step-00000002-02", "step-00000004"]
    assert [path.name for path in list_sharded_states(first.folder)] == names
    assert not list(first.folder.glob(".*"))

    second = ShardedRun(folder, seed=2)
    assert second.saver.resume(CPU) == first.folder / "step-00000004"
    if is_main_process():
        assert second.log.read_text() == "1\n2\n3\n4\n"
    dist.barrier()
    second.train(2)
    assert_equal(second.values(), expected)

    # other replicas: each rank holds all now, and the other way round
    third = ReplicatedRun(folder / "hsdp", seed=1)
    third.folder = third.saver.folder = first.folder
    third.saver.resume(CPU)
    after_resume = ShardedRun(folder, seed=5)
    after_resume.saver.resume(CPU)
    assert_equal(third.values(), after_resume.values())
    momenta = [
        [s["exp_avg"].full_tensor() for s in run.optimizer.state.values()]
        for run in (third, after_resume)
    ]
    assert_equal(*momenta)

    # what is damaged is found whichever rank has to look for it
    broken = max((first.folder / "step-00000004").glob("*.pt"))
    flip_bit(broken)
    fourth = ShardedRun(folder, seed=3)
    assert fourth.saver.resume(CPU) == first.folder / "step-00000002-02"
    assert bool(fourth.reports) == is_main_process()
    if is_main_process():
        assert broken.name in fourth.reports[0]
    fourth.train(4)
    assert_equal(fourth.values(), expected)

    # the whole weights for best.pt
    weights = full_state_dict(fourth.model)
    assert (weights is not None) == is_main_process()
    if is_main_process():
        save_checkpoint(weights, None, 1, folder / "best.pt")
        plain = make_model()
        load_checkpoint(folder / "best.pt", plain)
        assert_equal(whole_weights(plain), expected[:-1])
    dist.barrier()
    if is_main_process():
        max((first.folder / "step-00000002-02").glob("*.pt")).unlink()
    dist.barrier()
    with pytest.raises(CheckpointError, match="every checkpoint in it is damaged"):
        fourth.saver.resume(CPU)
    fourth.saver.folder = folder / "log"  # a file
    fourth.saver.save(1)
    with pytest.raises(CheckpointError, match="could not be written"):
        fourth.saver.save(2)
    return {}


def check_other_number(folder: Path) -> dict[str, float]:
    """Another number of ranks goes on with equal weights and optimizer state."""
    run = ShardedRun(folder, seed=1)
    if saved := run.saver.resume(CPU):
        if is_main_process():
            assert "rank(s), now" in run.reports[0], saved
    else:
        run.train(2)
        with run.saver as saver:
            saver.save(2)
    state = [*whole_weights(run.model)]
    for values in run.optimizer.state.values():
        state += [values["step"], values["exp_avg"].full_tensor()]
    assert run.run.step == 2
    if not saved and is_main_process():
        torch.save(state, folder / "whole.pt")
    assert_equal(state, torch.load(folder / "whole.pt") if saved else state)
    return {}


def check_sigterm(folder: Path) -> dict[str, float]:
    """Signals that come at different times: all ranks stop after the same step."""
    with SafeTrainingContext(CPU) as context:
        (folder / f"ready-{distributed_rank()}").touch()
        step = 0
        while step < 100_000:
            step += 1
            time.sleep(0.002 * distributed_rank())
            if any_rank(context.should_stop):
                break
        # torchrun signals one rank after the other; outside of the context, where all
        # stop at the first one's, the own signal would still kill.
        deadline = time.monotonic() + 60
        while not context.should_stop:
            assert time.monotonic() < deadline, "this rank got no signal"
            time.sleep(0.01)
    steps = torch.tensor(float(step))
    assert sum_over_ranks(steps) == distributed_world_size() * steps
    assert step < 100_000
    (folder / f"stopped-{distributed_rank()}").write_text(str(step))
    return {}


def check_death(folder: Path) -> dict[str, float]:
    """The last rank dies; the others must not wait for it."""
    if distributed_rank() == distributed_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        any_rank(True)
    except RuntimeError:
        seconds = time.monotonic() - started
        (folder / f"noticed-{distributed_rank()}").write_text(f"{seconds:.1f}")
        raise
    return {}


def main() -> None:
    check, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    setup_distributed(CPU, timeout_s=60)
    figures = {}
    if check in ("all", "one"):
        figures["check_equivalence"] = check_equivalence()
        check_other_number(folder / "across")
    if check == "all":
        check_exchanges()
        check_unsynchronised()
        check_evaluation_first()
        figures["check_precisions"] = check_precisions()
        figures["check_out_of_memory"] = check_out_of_memory()
        check_rank_saver(folder / f"{distributed_world_size()}-ranks")
        check_sharded_saver(folder / f"{distributed_world_size()}-shards")
    elif check != "one":
        figures = globals()[f"check_{check}"](folder)
    if is_main_process():
        (folder / "figures.json").write_text(json.dumps(figures))
    cleanup_distributed()


if __name__ == "__main__":
    main()
