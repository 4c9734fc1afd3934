"""The Slurm job, run by stand-ins for Slurm's commands that really run the script.

The stand-ins do what Slurm's manual says: `sbatch` runs the job's script with the job's
variables, again as long as it is requeued; `srun` runs its command on each "machine"
(all of them this one) and passes SIGTERM on to every process; `scontrol requeue` asks
for another start; `squeue` knows the job's state.
"""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from generator.cli import main

from .scripts import best_weights, data_words, newest_state, run, same, write_script

FAKES = {
    "srun": """
        import os, signal, subprocess, sys
        words = sys.argv[1:]
        while words[0].startswith("--"):
            words.pop(0)
        nodes = int(os.environ["SLURM_NNODES"])
        tasks = [
            subprocess.Popen(
                words,
                env={**os.environ, "SLURM_NODEID": str(node)},
                start_new_session=True,
            )
            for node in range(nodes)
        ]
        def forward(number, frame):
            for task in tasks:
                try:
                    os.killpg(task.pid, number)
                except ProcessLookupError:
                    pass
        signal.signal(signal.SIGTERM, forward)
        codes = [task.wait() for task in tasks]
        sys.exit(max(128 - code if code < 0 else code for code in codes))
    """,
    "scontrol": """
        import os, pathlib, sys
        if sys.argv[1:3] == ["show", "hostnames"]:
            print("localhost\\n" * int(os.environ["SLURM_NNODES"]), end="")
        elif sys.argv[1:] == ["requeue", os.environ["SLURM_JOB_ID"]]:
            pathlib.Path("requeued").touch()
        else:
            sys.exit(f"scontrol {sys.argv[1:]}")
    """,
    "squeue": """
        import os, sys
        assert f"--jobs={os.environ['SLURM_JOB_ID']}" in sys.argv
        print(os.environ.get("FAKE_STATE", "RUNNING"))
    """,
    "sbatch": """
        import os, pathlib, subprocess, sys
        again = pathlib.Path("requeued")
        for start in range(9):
            again.unlink(missing_ok=True)
            job = subprocess.Popen(
                ["bash", *sys.argv[1:]],
                env={**os.environ, "SLURM_RESTART_COUNT": str(start)},
            )
            pathlib.Path("shell.pid").write_text(str(job.pid))
            pathlib.Path(f"started-{start}").touch()
            code = job.wait()
            if not again.exists():
                sys.exit(code)
        sys.exit("requeued without end")
    """,
}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> dict[str, str]:
    """The variables of a job on a machine where the stand-ins are Slurm."""
    folder = tmp_path_factory.mktemp("slurm")
    for name, source in FAKES.items():
        path = folder / name
        path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(source))
        path.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "1",
    }


def submit(folder: Path, environment: dict[str, str], *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["sbatch", "train.sbatch", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def signal_after_lines(folder: Path, log: Path, count: int) -> None:
    """SIGTERM to the job's shell alone, as `--signal=B:TERM@120` has it."""
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, "the job wrote no log"
        time.sleep(0.01)
    os.kill(int((folder / "shell.pid").read_text()), signal.SIGTERM)


def finish(job: subprocess.Popen, expect: int) -> str:
    output = job.communicate(timeout=300)[0]
    assert job.returncode == expect, output
    return output


def test_signalled_twice_it_is_requeued_and_ends_as_if_nothing_had_happened(
    slurm, tmp_path
):
    script = write_script(tmp_path, "--slurm", "--resume", "--ema=0.9")
    words = [*data_words("text", tmp_path), "--save-every=1000", "--epochs=8"]
    job = submit(tmp_path, slurm, *words, "--out-dir=job")
    log = tmp_path / "job/metrics.jsonl"
    signal_after_lines(tmp_path, log, 2)
    while not (tmp_path / "started-1").exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.01)
    signal_after_lines(tmp_path, log, 5)
    output = finish(job, expect=0)
    assert output.count("going on from") == 2
    assert f"job {os.getpid()}, start 3, on node[1-2]" in output
    run(script, *words, "--out-dir=twin")
    assert log.read_text() == (tmp_path / "twin/metrics.jsonl").read_text()
    assert same(newest_state(tmp_path / "job"), newest_state(tmp_path / "twin"))


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_after_scancel_it_saves_and_is_not_requeued(state, slurm, tmp_path):
    write_script(tmp_path, "--slurm", "--resume")
    words = [*data_words("text", tmp_path), "--save-every=1000", "--epochs=8"]
    words += ["--out-dir=job"]
    job = submit(tmp_path, {**slurm, "FAKE_STATE": state}, *words)
    signal_after_lines(tmp_path, tmp_path / "job/metrics.jsonl", 2)
    output = finish(job, expect=143)
    assert "cancelled: not put back into the queue" in output
    assert int(newest_state(tmp_path / "job")["parts"]["run"]["step"]) > 0


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--batchsize=3"], 2, "did you mean --batch-size?"),
        (["--help"], 0, "--save-every"),
    ],
)
def test_an_end_of_its_own_is_not_requeued_and_keeps_its_code(
    words, code, part, slurm, tmp_path
):
    write_script(tmp_path, "--slurm", "--resume")
    assert part in finish(submit(tmp_path, slurm, *words), expect=code)
    assert not (tmp_path / "requeued").exists()


def test_a_script_that_fails_after_the_signal_is_tried_once_more(slurm, tmp_path):
    write_script(tmp_path, "--slurm", "--resume")
    (tmp_path / "train.py").write_text(
        "import pathlib, time\n"
        "again = pathlib.Path('once').exists()\n"
        "pathlib.Path('once').touch()\n"
        "pathlib.Path('log').write_text('started\\n')\n"
        "if again:\n    raise SystemExit(3)\n"
        "time.sleep(60)\n"
    )
    job = submit(tmp_path, slurm)
    signal_after_lines(tmp_path, tmp_path / "log", 1)
    assert "start 2" in finish(job, expect=3)


def test_submitted_from_another_folder_it_says_so(slurm, tmp_path):
    script = write_script(tmp_path, "--slurm", "--resume")
    script.unlink()
    output = finish(submit(tmp_path, slurm), expect=2)
    assert "error: no train.py in" in output


def test_bash_reads_it_and_its_settings_come_before_the_first_command(tmp_path):
    write_script(tmp_path, "--slurm", "--resume", name="my_run.py")
    job = tmp_path / "my_run.sbatch"
    subprocess.run(["bash", "-n", str(job)], check=True)
    before, _, after = job.read_text().partition("\nset -u\n")
    assert "#SBATCH" not in after
    options = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", before, re.M)
    assert (
        dict(options).items()
        >= {
            "requeue": "",
            "signal": "B:TERM@120",
            "open-mode": "append",
            "job-name": "my_run",
        }.items()
    )


def test_without_resume_it_is_refused(tmp_path, capsys):
    assert main(["--slurm", "-o", str(tmp_path / "train.py")]) == 2
    assert "--slurm needs --resume" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_machines_by_torchrun_are_requeued_and_end_the_same(slurm, tmp_path):
    script = write_script(tmp_path, "--slurm", "--resume", "--distributed=ddp")
    words = [*data_words("text", tmp_path), "--save-every=1000", "--cpu"]
    job = submit(tmp_path, {**slurm, "SLURM_NNODES": "2"}, *words, "--out-dir=job")
    log = tmp_path / "job/metrics.jsonl"
    signal_after_lines(tmp_path, log, 2)
    output = finish(job, expect=0)
    assert "start 2" in output
    assert "going on from" in output
    run(script, *words, "--out-dir=twin", ranks=2)
    assert log.read_text() == (tmp_path / "twin/metrics.jsonl").read_text()
    assert same(*(best_weights(tmp_path / name) for name in ("job", "twin")))
