"""benchmarks/gpu.py at tiny size: every row is measured or says why not, on the pretended GPU."""

import json
import sys

import pytest
from pretend_gpu import pretended_gpu

from benchmarks import gpu

pytestmark = pytest.mark.slow


def measured(monkeypatch, out):
    """What the program writes: the rows by name, and the Markdown table."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(out)])
    gpu.main()
    rows = json.loads((out / "results_gpu.json").read_text())["rows"]
    return {row["row"]: row for row in rows}, (out / "results_gpu.md").read_text()


def test_every_row_but_those_of_triton_is_measured_on_the_pretended_gpu(monkeypatch, tmp_path, tmp_path_factory):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "pretended")
    for kernels_of_triton in ("head_liger", "head_trl"):
        monkeypatch.setattr(gpu, kernels_of_triton, gpu.head_naive)
    monkeypatch.setattr(gpu, "what_liger_runs", lambda device: "pretended")
    measure_script = gpu.measure_script

    def of_egsw(size, device, name, *options):  # test_gpu.py runs the other scripts
        return measure_script(size, device, name, *options) if name == "egsw" else []

    monkeypatch.setattr(gpu, "measure_script", of_egsw)
    with pretended_gpu(tmp_path_factory.getbasetemp()):
        rows, table = measured(monkeypatch, tmp_path)
    for row in rows.values():
        assert row["row"] in table
        assert not row["note"].startswith("failed"), row["note"]
        assert row["value"] is None or row["value"] >= 0
    for script in ("egsw.py", "egsw.py --cuda-graphs"):
        for part in ("sampling", "update", "peak memory"):
            assert rows[f"{script}: {part}"]["value"] > 0
    for sampler in ("eager", "CUDA graphs", "generate, bf16 weights"):
        assert rows[f"decoding, 8 rows, 6 tokens: {sampler}"]["value"] > 0
    assert rows["profile of a token, eager: operations"]["value"] > 10
    assert rows["log-probs and entropy, 64 x 64: ours"]["value"] > 0


def test_a_row_that_fails_says_why_and_the_next_ones_go_on(monkeypatch, tmp_path):
    def fails(*_):
        raise ValueError("broken\non purpose")

    monkeypatch.setattr(gpu, "installed", lambda package: None)
    for name in ("measure_script", "measure_decoding", "measure_profile"):
        monkeypatch.setattr(gpu, name, fails)
    rows, table = measured(monkeypatch, tmp_path)
    assert rows["decoding"]["note"] == "failed: ValueError: broken\non purpose"
    assert "| decoding |  | failed: ValueError: broken on purpose |" in table
    assert rows["egsw"]["value"] is None and rows["log-probs and entropy, 64 x 64: naive"]["value"] > 0
