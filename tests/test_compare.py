"""experiments/compare.py: which cells run, and what its files say about them."""

import json
import shutil
import sys

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "experiments"))

import compare
import tables

from harness import tiny


@pytest.fixture()
def work(toy, tmp_path, monkeypatch):
    """A work folder in which a cell takes a few seconds: the toy base, chains of two terms, two short steps."""
    recipe = json.loads((toy / "manifest.json").read_text())["recipe"]
    recipe = {key: value for key, value in recipe.items() if value != tiny.RECIPE[key]}
    monkeypatch.setattr(compare, "SETTINGS", {"easy": dict(recipe=recipe, terms=(2, 2), max_new_tokens=12)})
    monkeypatch.setattr(compare, "TOKENS", 1500)
    monkeypatch.setattr(compare, "TRAIN_ROWS", 60)  # there are not many more chains of two terms
    monkeypatch.setattr(compare, "EVALUATION", dict(eval_rows=8, eval_k=2))
    monkeypatch.setattr(compare, "METHODS", ("grpo", "gtpo"))
    shutil.copytree(toy, tmp_path / "work" / "-".join(["base", *(f"{k}={v}" for k, v in recipe.items())]))
    return tmp_path / "work"


def run_folder(path, rewards, entropies):
    """A run folder with steps of 100 tokens each, one for each reward."""
    path.mkdir(parents=True)
    steps = list(enumerate(zip(rewards, entropies, strict=True), 1))
    lines = [dict(step=i, reward=r, entropy=h, skipped_updates=0) for i, (r, h) in steps]
    lines = [{**line, "completions/mean_length": 10.0 * line["step"]} for line in lines]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "timing.jsonl").write_text("".join(json.dumps(dict(step=i, tokens=100)) + "\n" for i, _ in steps))
    evaluations = [{"step": 0, "mean@2": 0.25, "mean@2_ci": [0.2, 0.3], "pass@1": 0.25, "pass@2": 0.5, "length": 9.0},
                   {"step": len(steps), "mean@2": 0.75, "mean@2_ci": [0.7, 0.8], "pass@1": 0.75, "pass@2": 1.0,
                    "length": 12.0}]  # fmt: skip
    (path / "eval.json").write_text(json.dumps(evaluations))
    return path


def test_the_summary_has_the_numbers_of_the_run(tmp_path):
    entropies = [0.5] * 10 + [0.1] * 9 + [0.3]
    s = compare.summarise(run_folder(tmp_path / "run", [0.5] * 10 + [1.0] * 10, entropies))
    assert (s["steps"], s["tokens"]) == (20, 2000)
    # The mean of 5 steps is 0.8 with 3 of them at 1 and 2 at 0.5: three steps after the tenth.
    assert (s["steps to 0.8"], s["tokens to 0.8"]) == (13, 1300)
    assert s["entropy first"] == pytest.approx(0.5)
    assert s["entropy lowest"] == pytest.approx(0.1)
    assert s["entropy last"] == pytest.approx(0.2)
    assert s["rebound"] == pytest.approx(2.0)
    assert (s["before mean@2"], s["after mean@2"], s["after pass@2"]) == (0.25, 0.75, 1.0)


def test_a_run_that_stays_below_reaches_0_8_never(tmp_path):
    s = compare.summarise(run_folder(tmp_path / "run", [0.5, 0.9] * 6, [0.1] * 12))
    assert s["steps to 0.8"] is None and s["tokens to 0.8"] is None
    assert tables.first_time([None, None]) == "never"
    assert tables.first_time([20.0, None, 20.0]) == "20 [20, 20] (2 of 3 runs)"


def test_a_falling_entropy_has_not_rebounded(tmp_path):
    s = compare.summarise(run_folder(tmp_path / "run", [0.5] * 20, [1 / i for i in range(1, 21)]))
    assert s["rebound"] < 1


def test_the_curve_stands_at_equal_numbers_of_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "TOKENS", 3000)
    points = compare.curve(run_folder(tmp_path / "run", [i / 30 for i in range(30)], [0.1] * 30))
    assert [p["tokens"] for p in points] == [100 * i for i in range(1, 31)]
    assert points[0]["reward"] == 0 and points[-1]["length"] == pytest.approx(295)


def test_an_interval_spans_the_mean_and_is_left_out_for_one_seed():
    assert tables.interval([0.5]) == "0.500"
    assert tables.interval([-0.0001, 0.0], sign="+") == "+0.000 [+0.000, +0.000]"
    assert tables.interval([0.5, 0.5, 0.5]) == "0.500 [0.500, 0.500]"
    mean, low, high = (float(x.strip("[],")) for x in tables.interval([0.1, 0.2, 0.3, 0.4, 0.5]).split())
    assert 0.1 < low < mean == 0.3 < high < 0.5


def test_a_table_compares_seed_by_seed(tmp_path):
    summary = compare.summarise(run_folder(tmp_path / "run", [0.5] * 20, [0.1] * 20))
    rows = []
    for method, gain in (("grpo", 0.0), ("gtpo", 0.125)):
        for seed in (0, 1):
            about = dict(question="methods", setting="easy", method=method, variant="", options="", seed=seed)
            rows.append(about | summary | {"after mean@2": 0.25 + 0.5 * seed + gain})
    text = tables.tables(rows, "methods")
    assert "| grpo | 2 | 0.500 [0.250, 0.750] |  | never |" in text
    assert "| gtpo | 2 | 0.625 [0.375, 0.875] | +0.125 [+0.125, +0.125] | never |" in text
    assert "| before | 0.250 | 0.500 |" in text
    text = tables.tables([*rows, {**rows[0], "setting": "trap"}], "methods")
    assert text.startswith("### methods: mean@2\n\n| run | easy | trap |\n")
    assert "| grpo | 0.500 [0.250, 0.750] | 0.250 |\n| gtpo | 0.625 [0.375, 0.875] |  |\n" in text


@pytest.mark.parametrize("name, markdown", [("results", "tables"), ("quick", "quick")])
def test_the_committed_tables_say_what_the_committed_csv_says(name, markdown):
    folder = ROOT / "experiments"
    costs = compare.read_csv(folder / "cost.csv") if name == "results" else []
    expected = tables.report(compare.read_csv(folder / f"{name}.csv"), costs, compare.TOKENS)
    assert (folder / f"{markdown}.md").read_text() == expected


@pytest.mark.parametrize("document, section", [("README.md", "Results"), ("experiments/RESULTS.md", None)])
def test_every_table_of_results_is_quoted_word_for_word(document, section):
    text = (ROOT / document).read_text()
    if section:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    sources = [(ROOT / "experiments" / name).read_text().splitlines() for name in ("tables.md", "quick.md")]
    assert lines and not set(lines) - set(sources[0]) - set(sources[1])


def test_rows_survive_the_csv(tmp_path):
    rows = [dict(question="egsw", variant="", options="--alpha 0.1", seed=0, steps=None, x=0.25),
            dict(question="egsw", variant="a, b", options="", seed=1, steps=3, x=1 / 3)]  # fmt: skip
    compare.write_csv(tmp_path / "rows.csv", rows)
    back = compare.read_csv(tmp_path / "rows.csv")
    assert [{**r, "variant": r["variant"] or "", "options": r["options"] or ""} for r in back] == [
        rows[0], {**rows[1], "x": 0.333333}]  # fmt: skip


def test_questions_share_cells_and_every_option_exists():
    default = compare.new_cell("easy", "egsw", {}, 0)
    assert compare.new_cell("easy", "egsw", dict(alpha=0.5, weight_temperature=2.0), 0) == default
    for question in compare.SEEDS:
        cells = [compare.new_cell(*line, 0) for line in compare.plan(question)]
        assert len(set(cells)) == len(cells)


@pytest.mark.slow
def test_cells_run_once_until_their_options_change(work, tmp_path, monkeypatch, capfd):
    arguments = ["--quick", "--seeds", "1", "--jobs", "2", "--work", str(work)]
    out = tmp_path / "out"
    out.mkdir()
    assert compare.main(arguments, out) == 0
    first = {name: (out / name).read_bytes() for name in ("quick.csv", "quick.md")}
    rows = compare.read_csv(out / "quick.csv")
    assert [(r["method"], r["seed"]) for r in rows] == [("grpo", 0), ("gtpo", 0)]
    assert all(r["tokens"] >= 1500 and 0 <= r["after mean@2"] <= 1 for r in rows)
    assert not list(work.glob("easy-*/model")) and len(list(work.glob("easy-*/summary.json"))) == 2

    capfd.readouterr()
    assert compare.main(arguments, out) == 0
    assert "2 cells, 2 of them finished before" in capfd.readouterr().out
    assert {name: (out / name).read_bytes() for name in first} == first

    cells = [compare.new_cell("easy", "grpo", {}, 0), compare.new_cell("easy", "gtpo", {}, 0)]
    monkeypatch.setattr(compare, "TOKENS", 1501)
    assert all(compare.finished(cell, work) is None for cell in cells)
    monkeypatch.setattr(compare, "TOKENS", 1500)
    # An interrupted cell starts again and gives the same numbers. A cell that fails does not stop the other.
    (work / compare.name_of(cells[0]) / "summary.json").unlink()
    bad = compare.new_cell("easy", "gtpo", dict(alpha2=-1.0), 0)
    summaries = compare.run_cells([cells[0], bad], work, 2)
    assert list(summaries) == [cells[0]] and summaries[cells[0]]["steps"] == rows[0]["steps"]
    assert "gtpo-alpha2=-1.0-seed=0: FAILED (exit status 2)" in capfd.readouterr().err


@pytest.mark.parametrize("wrong", [["--jobs", "0"], ["--only", "nothing"], ["--quick", "--only", "gtpo"]])
def test_wrong_options_are_one_line_and_status_2(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main([*wrong, "--work", str(tmp_path)])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
