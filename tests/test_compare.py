"""The experiments: which runs they take, what these give, and what the tables say about them."""

import json
import shutil
import sys

import pytest
import torch
from helpers import ROOT, call

sys.path.insert(0, str(ROOT / "experiments"))

import compare
import data_files
import plan
import tables
import training_runs

from tasks import arithmetic


@pytest.fixture()
def work(toy, tmp_path, monkeypatch):
    """A work folder in which a run takes a second: the toy base, chains of two terms, two short steps."""
    recipe = json.loads((toy / "manifest.json").read_text())["recipe"]
    recipe = {key: value for key, value in recipe.items() if value != arithmetic.RECIPE[key]}
    small = dict(max_new_tokens=12, eval_k=2, n_prompts=8)
    monkeypatch.setitem(training_runs.SETTINGS, "easy", dict(recipe=recipe, terms=(2, 2), options=small))
    monkeypatch.setattr(training_runs, "TOKENS", 600)
    monkeypatch.setattr(training_runs, "TRAIN_ROWS", 60)  # there are not many more chains of two terms
    monkeypatch.setattr(training_runs, "EVAL_ROWS", 8)
    rows = plan.product(["easy"], ["grpo", "gtpo"], [{}])
    monkeypatch.setitem(plan.QUESTIONS, "methods", plan.Question(1, rows))
    monkeypatch.setattr(training_runs, "start", lambda *arguments: ThisProcess(training_runs.execute, arguments))
    shutil.copytree(toy, tmp_path / "work" / "-".join(["base", *(f"{k}={v}" for k, v in recipe.items())]))
    return tmp_path / "work"


class ThisProcess:
    """Runs a run in this process, so that it sees what a test has changed."""

    def __init__(self, function, arguments):
        self.exitcode = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", sys.argv)  # the run changes it
            try:
                function(*arguments)
            except SystemExit as stop:
                self.exitcode = stop.code

    def is_alive(self):
        return False


def run_folder(path, rewards, entropies):
    """A run folder with steps of 100 tokens each, one for each reward."""
    path.mkdir(parents=True)
    with open(path / "metrics.jsonl", "w") as metrics, open(path / "timing.jsonl", "w") as timing:
        for step, (reward, entropy) in enumerate(zip(rewards, entropies, strict=True), 1):
            row = dict(step=step, reward=reward, entropy=entropy, skipped_updates=0)
            metrics.write(json.dumps({**row, "completions/mean_length": 10.0 * step}) + "\n")
            timing.write(json.dumps(dict(step=step, tokens=100)) + "\n")
    evaluations = [
        {"step": 0, "mean@2": 0.25, "mean@2_ci": [0.2, 0.3], "pass@1": 0.25, "pass@2": 0.5, "length": 9.0},
        {"step": len(rewards), "mean@2": 0.75, "mean@2_ci": [0.7, 0.8], "pass@1": 0.75, "pass@2": 1.0, "length": 12.0},
    ]
    (path / "eval.json").write_text(json.dumps(evaluations))
    return path


def test_the_summary_has_the_numbers_of_the_run(tmp_path):
    entropies = [0.5] * 10 + [0.1] * 9 + [0.3]
    s = training_runs.summarise(run_folder(tmp_path / "run", [0.5] * 10 + [1.0] * 10, entropies))
    assert (s["steps"], s["tokens"]) == (20, 2000)
    # The mean of 5 steps is 0.8 with 3 of them at 1 and 2 at 0.5: three steps after the tenth.
    assert (s["steps to 0.8"], s["tokens to 0.8"]) == (13, 1300)
    entropies = [s[f"entropy {when}"] for when in ("first", "lowest", "last")]
    assert [*entropies, s["rebound"]] == pytest.approx([0.5, 0.1, 0.2, 2.0])
    assert s["mean reward"] == pytest.approx(0.75)
    assert (s["before mean@2"], s["after mean@2"], s["after pass@2"]) == (0.25, 0.75, 1.0)
    below = training_runs.summarise(run_folder(tmp_path / "below", [0.5, 0.9] * 6, [0.1] * 12))
    assert below["steps to 0.8"] is None and below["tokens to 0.8"] is None


def test_the_curve_has_points_at_equal_numbers_of_tokens(tmp_path):
    points = training_runs.curve(run_folder(tmp_path / "run", [i / 30 for i in range(30)], [0.1] * 30), 3000)
    assert [p["tokens"] for p in points] == [100 * i for i in range(1, 31)]
    assert points[0]["reward"] == 0 and points[-1]["length"] == pytest.approx(295)


def test_intervals_are_those_of_students_t_and_p_is_two_sided():
    assert tables.interval([0.5]) == "0.500"  # left out for one seed
    assert tables.interval([-0.0001, 0.0], sign="+") == "+0.000 ± 0.001"
    # 5 values with standard deviation 0.158: 2.776 * 0.158 / sqrt(5)
    assert tables.interval([0.1, 0.2, 0.3, 0.4, 0.5]) == "0.300 ± 0.196"
    assert tables.p_value([0.1, 0.2, 0.3]) == pytest.approx(0.0742, abs=1e-4)
    assert tables.p_value([-0.1, -0.2, -0.3]) == tables.p_value([0.1, 0.2, 0.3])
    assert tables.p_value([0.0, 0.0]) == 1.0 and tables.p_value([0.1, 0.1]) == 0.0 and tables.p_value([0.1]) == 1.0


def test_holm_stops_at_the_first_test_that_fails():
    assert tables.holm([0.01, 0.04, 0.03]) == [True, False, False]  # 0.05/3, then 0.05/2
    assert tables.holm([0.01, 0.02, 0.05]) == [True, True, True]
    assert tables.holm([0.02, 0.001]) == [True, True] and tables.holm([]) == []


@pytest.mark.parametrize("document, section", [("README.md", "Results"), ("experiments/RESULTS.md", None)])
def test_every_table_of_results_is_quoted_from_the_data(document, section):
    """So a change of what the tables say about the rows is noticed here."""
    text = (ROOT / document).read_text()
    if section:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    quoted = [line for line in text.splitlines() if line.startswith("|")]
    results, evaluations, costs = (data_files.read_rows(data_files.DATA / f"{name}.csv.gz") for name in
                                   ("results", "frontier", "cost"))  # fmt: skip
    assert quoted and not set(quoted) - set(tables.report(results, evaluations, costs).splitlines())


def test_rows_survive_the_file_and_the_same_rows_give_the_same_bytes(tmp_path):
    path = tmp_path / "rows.csv.gz"
    rows = [dict(question="egsw", variant="", options="--alpha 0.1", seed=0, steps=None, x=0.25),
            dict(question="egsw", variant="a, b", options="", seed=1, steps=3, x=1 / 3)]  # fmt: skip
    data_files.write_rows(path, rows)
    first = path.read_bytes()
    assert data_files.read_rows(path) == [rows[0], {**rows[1], "x": 0.333333}]
    data_files.write_rows(path.with_name("again.csv.gz"), data_files.read_rows(path))
    assert path.with_name("again.csv.gz").read_bytes() == first
    assert data_files.read_rows(tmp_path / "none.csv.gz") == [] and len(list(tmp_path.iterdir())) == 2


def test_rows_about_the_same_are_replaced_and_are_in_the_order_of_the_plan(tmp_path):
    def row(method, seed, x):
        return dict(question="methods", setting="easy", method=method, variant="", seed=seed, x=x)

    path = tmp_path / "rows.csv.gz"
    compare.update(path, [row("gtpo", 0, 1), row("grpo", 1, 2), {**row("grpo", 0, 9), "method": "no such method"}])
    rows = compare.update(path, [row("grpo", 0, 3), row("gtpo", 0, 4), row("gtpo", 0, 5)])
    assert [(r["method"], r["seed"], r["x"]) for r in rows] == [
        ("grpo", 0, 3), ("grpo", 1, 2), ("gtpo", 0, 4), ("gtpo", 0, 5)]  # fmt: skip


def test_questions_share_runs_and_every_option_exists():
    default = training_runs.planned_run("easy", "egsw", {}, 0)
    assert training_runs.planned_run("easy", "egsw", dict(alpha=0.5, weight_temperature=2.0), 0) == default
    on_countdown = training_runs.planned_run("countdown", "egsw", {}, 0)
    assert training_runs.planned_run("countdown", "egsw", dict(lr=6e-4), 0) == on_countdown
    for name, question in plan.QUESTIONS.items():
        planned = [training_runs.planned_run(*row, 0) for row in question.rows]
        assert planned and len(set(planned)) == len(planned), name


def test_a_result_stays_valid_when_a_script_gets_a_new_option_or_loses_one(tmp_path):
    run = training_runs.planned_run("easy", "grpo", {}, 0)
    stored = training_runs.identity(run)
    del stored["config"]["token_budget"]
    stored["config"]["an option that is gone"] = 1
    summary = tmp_path / training_runs.name_of(run) / "summary.json"
    summary.parent.mkdir()
    for clip_low, expected in ((0.2, {"steps": 1}), (0.3, None)):
        stored["config"]["clip_low"] = clip_low
        summary.write_text(json.dumps({"identity": stored, "summary": {"steps": 1}}))
        assert training_runs.finished(run, tmp_path) == expected


@pytest.mark.slow
def test_runs_are_made_once_until_their_options_change(work, tmp_path, monkeypatch, capfd):
    arguments = ["--only", "methods", "--settings", "easy", "--work", str(work)]
    out = tmp_path / "out"
    out.mkdir()
    assert compare.main(arguments, out) == 0
    first = {path.name: path.read_bytes() for path in (out / "data").iterdir()}
    assert set(first) == {"results.csv.gz", "curves.csv.gz"}
    rows = data_files.read_rows(out / "data" / "results.csv.gz")
    assert [(r["method"], r["seed"]) for r in rows] == [("grpo", 0), ("gtpo", 0)]
    assert all(r["tokens"] >= 600 and 0 <= r["after mean@2"] <= 1 for r in rows)
    assert not list(work.glob("easy-*/model")) and len(list(work.glob("easy-*/summary.json"))) == 2

    capfd.readouterr()
    assert compare.main(arguments, out) == 0
    assert "2 runs, 2 of them finished before" in capfd.readouterr().out
    assert {path.name: path.read_bytes() for path in (out / "data").iterdir()} == first
    assert compare.main(["--quick", "--seeds", "0", "1", "--work", str(work)], out) == 0
    assert "| grpo | 1 |" in (work / "quick.md").read_text()

    planned = [training_runs.planned_run("easy", method, {}, 0) for method in ("grpo", "gtpo")]
    monkeypatch.setattr(training_runs, "TOKENS", 601)
    assert all(training_runs.finished(run, work) is None for run in planned)
    monkeypatch.setattr(training_runs, "TOKENS", 600)
    # An interrupted run starts again and gives the same numbers. A run that fails does not stop the other.
    (work / training_runs.name_of(planned[0]) / "summary.json").unlink()
    bad = training_runs.planned_run("easy", "gtpo", dict(alpha2=-1.0), 0)
    summaries = training_runs.execute_all([planned[0], bad], work, 2)
    assert list(summaries) == [planned[0]] and summaries[planned[0]]["steps"] == rows[0]["steps"]
    assert "gtpo-alpha2=-1.0-seed=0: FAILED (exit status 2)" in capfd.readouterr().err


@pytest.mark.slow
def test_a_forked_run_gives_what_the_script_gives_by_itself(toy, tmp_path, monkeypatch):
    """Through the real server of processes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = dict(eval_k=2, eval_rows=4, max_new_tokens=9, stop_tokens=300)
    run = training_runs.PlannedRun("easy", "grpo", tuple(small.items()), 0)
    process = training_runs.start(run, tmp_path, ["--model", str(toy)])
    process.join()
    assert process.exitcode == 0
    folder = tmp_path / training_runs.name_of(run)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    call(monkeypatch, "grpo", "--model", str(toy), "--out", str(tmp_path), "--steps", "1000", "--name", "alone",
         *training_runs.command_line(small.items()))  # fmt: skip
    torch.set_num_threads(threads)
    for name in ("metrics.jsonl", "eval.json"):
        assert (folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
