"""The tutorial's blocks, run in their order in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LEAVES = ("out/chelsea.png", "out_first/chelsea.png", "runs/mine/model/config.json", "arena/index.html", "picture.png")


def test_every_block_of_the_tutorial_runs(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # has dc-ssdae and python
    source = str(REPOSITORY / "src")
    environment = {**os.environ, "PATH": path, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    blocks = BLOCK.findall((REPOSITORY / "docs/tutorial.md").read_text())
    assert {language for language, _, _ in blocks} == {"bash", "python", "yaml"}
    for language, title, text in blocks:
        if title:
            (tmp_path / title).write_text(text)
            continue
        words = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    assert [name for name in LEAVES if not (tmp_path / name).is_file()] == []
