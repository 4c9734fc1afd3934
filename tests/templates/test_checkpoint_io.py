"""Section 7: files that survive crashes, checks that see damage, resume to the bit."""

import collections
import enum
import errno
import io
import os
import pickle
import random
import resource
import signal
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from templates.checkpoint_io import (
    CheckpointError,
    DamagedCheckpointError,
    LogPosition,
    RunState,
    append_jsonl,
    capture_rng_state,
    find_damage,
    list_training_states,
    load_checkpoint,
    read_checkpoint_file,
    restore_rng_state,
    resume_training_state,
    save_checkpoint,
    save_training_state,
    to_loadable,
    write_atomically,
    write_checkpoint_file,
)


def fork(action: Callable[[], None]) -> int:
    """Run `action` in a forked child that exits with 0, 3 for CheckpointError, else 4.

    Forked, because a fresh process would import torch for seconds.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads, from Python 3.12
        child = os.fork()
    if child == 0:
        code = 4
        try:
            action()
            code = 0
        except CheckpointError:
            code = 3
        finally:
            os._exit(code)
    return child


def run_child(action: Callable[[], None]) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(fork(action), 0)[1])


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def equal(first, second) -> bool:
    """Whether two nests of values are the same to the bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(
            equal(first[key], second[key]) for key in first
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()


# --- Writing -------------------------------------------------------------------------


def write_and_fail(file: io.BufferedWriter) -> None:
    file.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"good")
    with pytest.raises(CheckpointError, match=r"a\.pt: could not be .* No space left"):
        write_atomically(path, write_and_fail)
    assert path.read_bytes() == b"good"
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_write_removes_what_killed_ones_have_left_of_the_same_file(tmp_path):
    for name in (".a[1].pt.7.tmp", ".b.pt.7.tmp", "a[1].pt"):
        (tmp_path / name).write_bytes(b"half")
    write_checkpoint_file({"a": 1}, tmp_path / "a[1].pt")
    assert sorted(os.listdir(tmp_path)) == [".b.pt.7.tmp", "a[1].pt"]


def test_what_is_no_fault_of_the_disk_keeps_its_error_and_leaves_no_file(tmp_path):
    def write(file):
        raise RuntimeError("device-side assert")

    with pytest.raises(RuntimeError, match="device-side assert") as caught:
        write_atomically(tmp_path / "a.pt", write)
    assert caught.type is RuntimeError
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="could not be written"):
        write_checkpoint_file({}, tmp_path / "file/a.pt")


def test_a_file_system_without_fsync_of_folders_is_no_failure(tmp_path, monkeypatch):
    real_open = os.open

    def refuse(path, flags, *rest, **options):
        if Path(path).is_dir():
            raise PermissionError("as on Windows")
        return real_open(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    write_checkpoint_file({"a": 1}, tmp_path / "a.pt")
    assert read_checkpoint_file(tmp_path / "a.pt") == {"a": 1}


def test_file_and_folder_reach_the_disk_in_the_right_order(tmp_path, monkeypatch):
    done = []
    real_replace = os.replace

    def fsync(descriptor):
        done.append("folder" if os.fstat(descriptor).st_mode & 0o040000 else "file")

    def replace(*paths):
        done.append("rename")
        real_replace(*paths)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_checkpoint_file({}, tmp_path / "a.pt")
    assert done == ["file", "rename", "folder"]


def test_a_full_disk_costs_the_seeds_file_and_not_ours(tmp_path):
    model = nn.Linear(256, 256)  # 260 kB

    def fill_disk():
        # A file may grow to 100 kB; then writing fails as on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    def seeds_pattern():
        fill_disk()
        torch.save({"model_state_dict": model.state_dict()}, tmp_path / "seed.pt")

    def ours():
        fill_disk()
        save_checkpoint(model, None, 2, str(tmp_path / "ours.pt"))

    for name in ("seed.pt", "ours.pt"):
        save_checkpoint(model, None, 1, str(tmp_path / name))
    assert run_child(seeds_pattern) != 0
    assert find_damage(tmp_path / "seed.pt")
    assert run_child(ours) == 3  # CheckpointError
    assert load_checkpoint(tmp_path / "ours.pt", model)["epoch"] == 1
    assert sorted(os.listdir(tmp_path)) == ["ours.pt", "seed.pt"]


def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    path = tmp_path / "a.pt"
    states = [torch.full((200_000,), float(number)) for number in range(2)]
    moments = random.Random(0)
    for _ in range(10):
        reader, writer = os.pipe()

        def write_for_ever(writer=writer):
            while True:
                for state in states:
                    write_checkpoint_file(state, path)
                    os.write(writer, b".")

        child = fork(write_for_ever)
        os.read(reader, 1)  # the first is written
        signal.sigtimedwait([], moments.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
        loaded = read_checkpoint_file(path)
        assert any(torch.equal(loaded, state) for state in states)


# --- Damage --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mask"), [("ours", 0x01), ("ours", 0xFF), ("plain", 0xFF)]
)
def test_every_changed_byte_is_noticed_or_changes_nothing(kind, mask, tmp_path):
    state = {"weights": torch.randn(5), "epoch": 3}
    path = tmp_path / "a.pt"
    if kind == "ours":
        write_checkpoint_file(state, path)
    else:
        torch.save(state, path)
    good = path.read_bytes()
    assert equal(read_checkpoint_file(path), state)
    noticed = 0
    warnings.simplefilter("ignore")  # torch's, about a damaged pickle
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= mask
        path.write_bytes(bad)
        try:
            assert equal(read_checkpoint_file(path), state), position
        except DamagedCheckpointError:
            noticed += 1
        except CheckpointError:  # only a file without our checksum gets that far
            assert kind == "plain", position
    if kind == "ours":
        assert noticed >= len(good) - len("crc32:")  # a broken label is not missed


def test_every_truncation_is_noticed_or_changes_nothing(tmp_path):
    state = {"weights": torch.randn(5), "epoch": 3}
    path = tmp_path / "a.pt"
    write_checkpoint_file(state, path)
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        try:
            assert equal(read_checkpoint_file(path), state), length
            assert length >= len(good) - len("crc32:01234567")  # all but the comment
        except DamagedCheckpointError:
            pass


def test_a_flipped_bit_in_the_seeds_pattern_loads_silently(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"weights": torch.ones(1000)}, path)
    bad = bytearray(path.read_bytes())
    bad[bad.index(torch.ones(10).numpy().tobytes()) + 3] ^= 1
    path.write_bytes(bad)
    assert not torch.equal(torch.load(path)["weights"], torch.ones(1000))
    with pytest.raises(DamagedCheckpointError, match="does not match its checksum"):
        read_checkpoint_file(path)


def test_files_of_torch_save_load_and_ours_load_with_torch(tmp_path):
    state = small_model().state_dict()
    torch.save(state, tmp_path / "plain.pt")
    write_checkpoint_file(state, tmp_path / "ours.pt")
    assert equal(read_checkpoint_file(tmp_path / "plain.pt"), state)
    for mmap in (False, True):
        assert equal(torch.load(tmp_path / "ours.pt", mmap=mmap), state)
    assert zipfile.ZipFile(tmp_path / "ours.pt").testzip() is None


def test_files_that_are_none(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_bytes(b"text")
    torch.save([1], tmp_path / "list.pt")
    for name, reason in (
        ("other.zip", "cannot be loaded"),
        ("empty.pt", "not a complete checkpoint"),
        ("text.pt", "not a complete checkpoint"),
        ("none.pt", "cannot be read"),
        ("list.pt", "has no 'model_state_dict'"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: .*{reason}"):
            load_checkpoint(str(tmp_path / name), nn.Linear(1, 1))


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    path, trap = tmp_path / "a.pt", tmp_path / "trap"
    torch.save({"model_state_dict": Trap(trap)}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        load_checkpoint(str(path), nn.Linear(1, 1))
    assert not trap.exists()
    torch.load(path, weights_only=False)  # the seed's way
    assert trap.exists()


# --- What can be saved ---------------------------------------------------------------


class Mode(enum.Enum):
    FAST = "fast"


class Level(enum.IntEnum):
    LOW = 1


Point = collections.namedtuple("Point", "x y")


@dataclass
class Note:
    path: Path
    weights: torch.Tensor


@pytest.mark.parametrize(
    ("value", "result"),
    [
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.array(2.5), 2.5),
        (np.arange(3), torch.arange(3)),
        (np.arange(3)[::-1], torch.tensor([2, 1, 0])),
        (np.arange(3, dtype=np.uint32), torch.tensor([0, 1, 2], dtype=torch.uint32)),
        (Path("a") / "b", os.path.join("a", "b")),
        (Mode.FAST, "fast"),
        (Level.LOW, 1),
        (collections.deque([1, np.int8(2)], maxlen=2), [1, 2]),
        (Point(1, Path("a")), (1, "a")),
        ({Mode.FAST: {np.int64(1)}}, {"fast": {1}}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        ([None, True, 1j, b"x", torch.float16], [None, True, 1j, b"x", torch.float16]),
        (torch.Size([2]), torch.Size([2])),
        (torch.device("cpu"), torch.device("cpu")),
        (
            Note(Path("a"), torch.ones(2, requires_grad=True) * 2),
            {"path": "a", "weights": torch.full((2,), 2.0)},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_become_plain_and_come_back(value, result, tmp_path):
    write_checkpoint_file(value, tmp_path / "a.pt")
    loaded = read_checkpoint_file(tmp_path / "a.pt")
    assert equal(loaded, result)
    assert type(loaded) is type(result)


def test_the_seeds_pattern_refuses_numpy_scalars_on_a_safe_load(tmp_path):
    torch.save({"loss": np.float64(0.5)}, tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=True)


@pytest.mark.parametrize("value", [object(), print, np.array(["a"]), np.dtype("f4")])
def test_other_objects_are_refused_before_anything_is_written(value, tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(nn.Linear(1, 1), None, 1, tmp_path / "a.pt", extra=[value])
    assert os.listdir(tmp_path) == []


def test_a_slice_is_saved_without_the_rest_of_its_storage(tmp_path):
    whole = torch.arange(1_000_000)
    torch.save({"part": whole[:10]}, tmp_path / "seed.pt")
    write_checkpoint_file({"part": whole[:10]}, tmp_path / "ours.pt")
    assert (tmp_path / "seed.pt").stat().st_size > 8_000_000
    assert (tmp_path / "ours.pt").stat().st_size < 5_000
    loaded = read_checkpoint_file(tmp_path / "ours.pt")
    assert torch.equal(loaded["part"], whole[:10])


def test_tied_weights_stay_tied_and_are_written_once(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(50, 9), "head": nn.Linear(9, 50)})
    model["head"].weight = model["embed"].weight
    save_checkpoint(model, None, 1, str(tmp_path / "a.pt"))
    weights = load_checkpoint(tmp_path / "a.pt", model)["model_state_dict"]
    pointers = {weights[f"{name}.weight"].data_ptr() for name in ("embed", "head")}
    assert len(pointers) == 1
    assert model["head"].weight is model["embed"].weight


def test_the_versions_of_modules_come_back(tmp_path):
    state = small_model().state_dict()
    assert state._metadata["1"] == {"version": 2}
    write_checkpoint_file(state, tmp_path / "a.pt")
    assert read_checkpoint_file(tmp_path / "a.pt")._metadata == state._metadata


# --- save_checkpoint and load_checkpoint ---------------------------------------------


def test_all_that_was_saved_comes_back(tmp_path):
    path = str(tmp_path / "new folder/a.pt")
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    take_step(model, optimizer)
    save_checkpoint(model, optimizer, 7, path, loss=np.float64(0.5), classes=["a"])
    other = small_model()
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1)
    checkpoint = load_checkpoint(path, other, other_optimizer)
    assert equal(other.state_dict(), model.state_dict())
    assert equal(other_optimizer.state_dict(), optimizer.state_dict())
    assert (checkpoint["epoch"], checkpoint["loss"]) == (7, 0.5)
    assert checkpoint["classes"] == ["a"]
    assert equal(load_checkpoint(path, other), checkpoint)


def test_what_a_gpu_saved_loads_on_a_machine_without_one(tmp_path, monkeypatch):
    model, path = small_model(), tmp_path / "a.pt"
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        save_checkpoint(model, None, 1, path)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="on a CUDA device"):
            torch.load(path)  # the seed's way, without device=
    weights = load_checkpoint(path, small_model())["model_state_dict"]
    assert equal(weights, model.state_dict())
    assert not weights["0.weight"].is_cuda


def test_names_of_the_checkpoints_own_parts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model_state_dict is saved already"):
        save_checkpoint(nn.Linear(1, 1), None, 1, tmp_path / "a", model_state_dict={})


WRAPPERS = {
    "bare": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "compiled parallel": lambda model: torch.compile(
        nn.DataParallel(model), backend="eager"
    ),
    "parallel compiled": lambda model: nn.DataParallel(
        torch.compile(model, backend="eager")
    ),
}


@pytest.mark.parametrize("writer", ["ours", "seed"])
@pytest.mark.parametrize("saved", WRAPPERS)
def test_wrapped_models_load_into_any_other_wrapper(saved, writer, tmp_path):
    path = tmp_path / "a.pt"
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters())
    take_step(model, optimizer)
    wrapped = WRAPPERS[saved](model)
    if writer == "ours":
        save_checkpoint(wrapped, optimizer, 1, path)
    else:
        state = {
            "epoch": 1,
            "model_state_dict": wrapped.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
        }
        torch.save(state, path)
    for wrap in WRAPPERS.values():
        fresh = small_model()
        fresh_optimizer = torch.optim.Adam(fresh.parameters())
        checkpoint = load_checkpoint(path, wrap(fresh), fresh_optimizer)
        assert equal(fresh.state_dict(), model.state_dict())
        assert equal(fresh_optimizer.state_dict(), optimizer.state_dict())
        metadata = checkpoint["model_state_dict"]._metadata
        assert metadata["1"] == {"version": 2}


def test_a_part_that_is_really_called_module_keeps_its_name(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(small_model())
    save_checkpoint(averaged, None, 1, tmp_path / "a.pt")
    other = torch.optim.swa_utils.AveragedModel(small_model())
    load_checkpoint(tmp_path / "a.pt", other)
    assert equal(other.state_dict(), averaged.state_dict())


def refused(path, model, optimizer=None) -> str:
    """The message of the refusal, after which nothing may have changed."""
    before = to_loadable(model.state_dict())
    before = {name: tensor.clone() for name, tensor in before.items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, model, optimizer)
    assert equal(dict(model.state_dict()), before)
    if optimizer is not None:
        assert not optimizer.state
    message = str(caught.value)
    assert message.startswith(f"{path}: does not fit")
    return message


def test_weights_that_do_not_fit_are_named_and_nothing_changes(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), None, 1, path)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 1, bias=False))
    message = refused(path, other)
    assert "the file lacks 2.weight" in message
    assert "1.weight (2, 4) in the file, (3, 4) here" in message
    assert "1.bias (2,) in the file, (3,) here" in message
    assert "the model lacks 0.bias" in refused(
        path, nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    )
    deep = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
    assert "and 9 more" in refused(path, deep)
    assert "0.weight" in refused(path, nn.DataParallel(nn.Linear(3, 4)).module)


def test_the_seeds_pattern_leaves_a_model_half_loaded():
    saved = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    with pytest.raises(RuntimeError):
        other.load_state_dict(saved)
    assert torch.equal(other[0].weight, saved["0.weight"])


def test_an_optimizer_over_other_parameters_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.Adam(model.parameters())
    take_step(model, optimizer)
    save_checkpoint(model, optimizer, 1, path)
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    backwards = torch.optim.Adam(reversed(list(other.parameters())))
    assert "other parameters" in refused(path, other, backwards)
    groups = torch.optim.Adam([{"params": m.parameters()} for m in other])
    assert "other parameters" in refused(path, other, groups)
    # A file of the seed does not have the names: torch's own check is all there is.
    plain = {"model_state_dict": model.state_dict()}
    plain["optimizer_state_dict"] = optimizer.state_dict()
    torch.save(plain, path)
    assert "parameter groups" in refused(path, other, groups)
    load_checkpoint(path, other, backwards)  # accepted, which is why names are saved


# --- Random number generators --------------------------------------------------------


def draw() -> list:
    return [random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()]


def test_every_generator_goes_on_with_the_same_draws(tmp_path):
    assert np.random.get_state()[0] == "MT19937"
    np.random.randn(1)  # leaves a second normal number in the state
    write_checkpoint_file(capture_rng_state(), tmp_path / "a.pt")
    expected = [np.random.randn(3).tolist(), *draw()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    restore_rng_state(read_checkpoint_file(tmp_path / "a.pt"))
    assert [np.random.randn(3).tolist(), *draw()] == expected


def test_without_numpy_the_rest_is_restored(monkeypatch):
    state = capture_rng_state()
    expected = draw()
    monkeypatch.setitem(__import__("sys").modules, "numpy", None)
    assert "numpy" not in capture_rng_state()
    restore_rng_state(state)
    assert [random.random(), torch.rand(3).tolist()] == [expected[0], expected[2]]


@pytest.mark.gpu
def test_the_generators_of_the_gpus(tmp_path):
    torch.rand(3, device="cuda")
    write_checkpoint_file(capture_rng_state(), tmp_path / "a.pt")
    expected = torch.rand(3, device="cuda")
    restore_rng_state(read_checkpoint_file(tmp_path / "a.pt", torch.device("cuda")))
    assert torch.equal(torch.rand(3, device="cuda"), expected)


@pytest.mark.gpu
def test_what_a_gpu_saved_loads_without_naming_a_device(tmp_path):
    model = small_model().cuda()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3, device="cuda")).sum().backward()
    optimizer.step()
    save_checkpoint(model, optimizer, 1, tmp_path / "a.pt")
    for device in ("cpu", "cuda"):
        other = small_model().to(device)
        other_optimizer = torch.optim.Adam(other.parameters())
        checkpoint = load_checkpoint(tmp_path / "a.pt", other, other_optimizer)
        weight = checkpoint["model_state_dict"]["0.weight"]
        assert weight.device.type == "cpu"
        assert torch.equal(other[0].weight.cpu(), weight)
        assert next(iter(other_optimizer.state.values()))["exp_avg"].is_cuda == (
            device == "cuda"
        )


# --- The state of a training run -----------------------------------------------------


class Training:
    """A small run with everything that holds state."""

    def __init__(self, folder: Path, width: int = 8) -> None:
        self.model = nn.Sequential(
            nn.Linear(3, width),
            nn.BatchNorm1d(width),
            nn.Dropout(),
            nn.Linear(width, 1),
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1 / (1 + step)
        )
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.run = RunState(step=0, loss_sum=torch.zeros(()), best={"loss": None})
        self.folder, self.log = folder / "checkpoints", folder / "log.jsonl"
        self.parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "run": self.run,
            "log": LogPosition(self.log),
        }

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            noise = np.random.rand() + random.random()
            inputs = torch.randn(16, 3) + noise
            loss = F.mse_loss(self.model(inputs)[:, 0], inputs.sum(1))
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.run.step += 1
            self.run.loss_sum += loss.detach()
            append_jsonl(self.log, self.run.step, {"loss": loss.item()})

    def save(self, **options) -> Path:
        return save_training_state(self.folder, self.run.step, self.parts, **options)

    def resume(self, **options) -> Path | None:
        return resume_training_state(self.folder, self.parts, **options)

    def state(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}


def seed_everything(seed: int) -> None:
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path):
    seed_everything(0)
    whole = Training(tmp_path / "whole")
    assert whole.resume() is None
    whole.folder.mkdir(parents=True)
    whole.train(10)

    seed_everything(0)
    first = Training(tmp_path / "parts")
    first.folder.mkdir(parents=True)
    first.train(5)
    saved = first.save()
    first.train(2)  # lost, and cut from the log

    seed_everything(99)
    second = Training(tmp_path / "parts")
    assert second.resume() == saved == first.folder / "step-00000005.pt"
    second.train(5)
    assert equal(second.state(), whole.state())
    assert second.log.read_bytes() == whole.log.read_bytes()
    assert second.run.loss_sum.item() == whole.run.loss_sum.item()


def make_states(tmp_path: Path, count: int = 3) -> Training:
    training = Training(tmp_path)
    training.folder.mkdir()
    for _ in range(count):
        training.train(1)
        training.save()
    return training


def test_the_newest_files_are_kept(tmp_path):
    training = make_states(tmp_path)
    names = ["step-00000002.pt", "step-00000003.pt"]
    assert [path.name for path in list_training_states(training.folder)] == names
    training.train(1)
    training.save(keep=1)
    assert [p.name for p in training.folder.iterdir()] == ["step-00000004.pt"]


def test_a_damaged_newest_file_is_named_and_the_one_before_is_taken(tmp_path):
    training = make_states(tmp_path)
    newest = training.folder / "step-00000003.pt"
    damage(newest)
    (training.folder / ".step-00000004.pt.123.tmp").write_bytes(b"half")
    lines = []
    other = Training(tmp_path)
    assert other.resume(report=lines.append).name == "step-00000002.pt"
    assert other.run.step == 2
    assert f"{newest}: its checksum does not match" in lines[0]
    names = sorted(path.name for path in training.folder.iterdir())
    assert names == ["step-00000002.pt", "step-00000003.pt.damaged"]


def test_all_files_damaged_is_an_error(tmp_path):
    training = make_states(tmp_path)
    for path in list_training_states(training.folder):
        damage(path)
    with pytest.raises(CheckpointError, match="every checkpoint in it is damaged"):
        training.resume(report=lambda _: None)


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
    training = make_states(tmp_path)
    (training.folder / "step-00000009.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"step-00000009\.pt: cannot be read"):
        training.resume()
    assert (training.folder / "step-00000009.pt").exists()


def swap_layers(training: Training) -> None:
    """The same names and shapes as before, but in another order."""
    layers = training.model._modules
    layers["0"] = layers.pop("0")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.parts.pop("scaler"), "only one of them has scaler"),
        (lambda t: t.parts.update(ema=t.model), "only one of them has ema"),
        (lambda t: t.parts.update(model=nn.Linear(1, 1)), "0.weight"),
        (lambda t: t.model.append(nn.Linear(1, 1)), "4.weight"),
        (swap_layers, "another order"),
        (
            lambda t: t.parts.update(scaler=torch.amp.GradScaler("cpu")),
            "source state dict is empty",
        ),
        (lambda t: t.optimizer.add_param_group({"params": torch.ones(1)}), "groups"),
    ],
)
def test_parts_that_differ_from_the_saved_ones_are_named(change, reason, tmp_path):
    training = make_states(tmp_path)
    before = {path: path.read_bytes() for path in training.folder.iterdir()}
    other = Training(tmp_path)
    change(other)
    with pytest.raises(CheckpointError) as caught:
        other.resume()
    message = str(caught.value)
    assert message.startswith(f"{training.folder / 'step-00000003.pt'}: does not fit")
    assert reason in message
    assert "\n" not in message
    assert {path: path.read_bytes() for path in training.folder.iterdir()} == before


def test_another_shape_is_named(tmp_path):
    make_states(tmp_path)
    with pytest.raises(CheckpointError, match=r"size mismatch for 0\.weight"):
        Training(tmp_path, width=9).resume()


def test_the_log_is_cut_back_and_never_filled(tmp_path):
    log = tmp_path / "log.jsonl"
    position = LogPosition(log)
    assert position.state_dict() == {"bytes": 0}
    append_jsonl(log, 1, {})
    saved = position.state_dict()
    append_jsonl(log, 2, {})
    position.load_state_dict(saved)
    assert log.read_text() == '{"step": 1}\n'
    position.load_state_dict({"bytes": 1000})
    assert log.read_text() == '{"step": 1}\n'
    position.load_state_dict({"bytes": 0})
    assert log.read_text() == ""
    log.unlink()
    position.load_state_dict(saved)
    assert not log.exists()
