"""Run every benchmark, one process each, so that none inherits another's memory: `python -m benchmarks`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

if __name__ == "__main__":
    benches = sorted(HERE.glob("bench_*.py"))
    codes = [subprocess.run([sys.executable, str(path), *sys.argv[1:]]).returncode for path in benches]
    sys.exit(max(codes))
