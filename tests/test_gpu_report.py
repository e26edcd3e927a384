"""``python -m bench.gpu`` runs to its end without a GPU, so that it works the day there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_tiny_report(tmp_path):
    """Protects the one command for GPUs: every check and benchmark of it runs, at a small size and without a GPU."""
    pytest.importorskip("transformers")
    output = tmp_path / "report.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.gpu", "--tiny", "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    found = json.loads(output.read_text())
    assert found["checks"]["checked"] >= 10
    assert found["checks"]["failures"] == {}
    assert found["graph_replay"] == {"graph": False, "replays": 5, "same_bits": True, "moved": True}
    assert "DBA split8, int8 state, int4 ĝ" in found["many small"]["against_torch_fused_fp32"]
    assert not any("error" in row for row in found["few large"]["against_torch_fused_fp32"].values())
    assert found["fine_tuning"]["DBA split16, int8 state, int8 ĝ"]["tokens_per_second"] > 0
