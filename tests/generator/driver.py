"""Run a script with faults injected: driver.py SCRIPT STATEMENTS [options]."""

import ast
import importlib
import sys
from pathlib import Path

path = Path(sys.argv[1])
statements = sys.argv[2]
sys.argv = [str(path), *sys.argv[3:]]
sys.path.insert(0, str(path.parent))

if __name__ == "__main__":
    script = importlib.import_module(path.stem)
    exec(statements, {"script": script})
    # What the script does below its own `if __name__ == "__main__":`.
    guard = ast.parse(path.read_text(encoding="utf-8")).body[-1]
    assert isinstance(guard, ast.If)
    exec(compile(ast.Module(guard.body, []), path, "exec"), vars(script))
