"""A Python that has imported torch, and forks for each script that it is told to run.

Importing torch and, with the first optimizer, its compiler takes 3 s of a CPU, more
than most of these scripts train for. A line in: {"command": [script, words ...],
"folder", "environment", "output": [file, file]}. A line out: the exit code.
"""

import importlib
import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any


def become(job: dict[str, Any]) -> None:
    """Let this process be what `python script words ...` would be."""
    signal.alarm(600)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, path in enumerate([os.devnull, *job["output"]]):
        flags = os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY
        os.dup2(os.open(path, flags), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)
    sys.argv = job["command"]
    script = sys.argv[0]
    sys.path[0] = str(Path(script).parent)
    module = types.ModuleType("__main__")
    module.__file__ = script
    sys.modules["__main__"] = module
    source = Path(script).read_text(encoding="utf-8")
    exec(compile(source, script, "exec"), vars(module))


if __name__ == "__main__":
    importlib.import_module("torch._dynamo")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(json.loads(line))
            break
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
