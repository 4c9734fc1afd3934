"""Run a script with faults injected: driver.py SCRIPT STATEMENTS [options]."""

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
    exit_code = script.main()
    if hasattr(script, "cleanup_distributed"):  # as its own last lines do
        script.cleanup_distributed()
    sys.exit(exit_code)
