"""The tables in docs/results.md are those that the files in results/ give."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_tables_agree_with_the_results() -> None:
    done = subprocess.run([sys.executable, REPOSITORY / "studies/tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "run studies/tables.py"
