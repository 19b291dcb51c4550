"""Makes the changes of mutations.txt one at a time in a copy of the repository, runs the tests of the changed file, and
reports which changes no test notices. Not part of the suite: it takes some minutes on two cores.

    python tests/mutate.py                  all of them
    python tests/mutate.py egsw.py          those of one file

Exit status: 0 if the survivors are those that mutations.txt gives a reason for, 1 otherwise.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

TESTS_FOLDER = Path(__file__).resolve().parent
ROOT = TESTS_FOLDER.parent
JOBS = 2
FORKSERVER = multiprocessing.get_context("forkserver")  # its processes start with torch and transformers loaded
FORKSERVER.set_forkserver_preload(["torch", "transformers", "pytest"])
TESTS = {  # what is run after a change in this file
    "common.py": ["test_common.py", "test_gpu.py", "test_trainer.py", "test_families.py", "-k", "not samples_scores"],
    "harness/cuda_graphs.py": ["test_common.py", "test_gpu.py"],
    "harness/trainer.py": ["test_trainer.py", "test_main.py", "-k", "not gtpo and not grpo_s"],
    "harness/evaluation.py": ["test_evaluation.py"],
}
for name in ("grpo", "dapo", "egsw", "gtpo", "grpo_s"):
    TESTS[f"{name}.py"] = ["test_methods.py", "test_main.py", "-k", f"{name} or test_methods"]
for name in ("forking", "cov", "entropy_advantage", "quantile", "cispo"):
    files = ["test_more.py", "test_methods.py", "test_main.py"]
    TESTS[f"more/{name}.py"] = [*files, "-m", "not slow", "-k", f"{name} or test_more"]


@dataclass
class Change:
    file: str
    was: str
    became: str
    reason: str  # why it changes nothing that a test could see; "" if a test must notice it


def read_changes() -> list[Change]:
    changes = []
    for block in (TESTS_FOLDER / "mutations.txt").read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        if not lines:
            continue
        parts = {sign: "\n".join(line[2:] for line in lines[1:] if line[0] == sign) for sign in "-+="}
        changes.append(Change(lines[0], parts["-"], parts["+"], parts["="]))
    return changes


def run_pytest(folder: Path, arguments: list[str]) -> None:
    """Runs pytest in the copy `folder` and ends this process with pytest's exit status."""
    import pytest

    os.chdir(folder)
    sys.path.remove(str(TESTS_FOLDER))  # or else the helpers of the original would be imported
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))


def survives(folder: Path, change: Change) -> bool:
    """Whether all tests of the file pass in the copy `folder` with this change."""
    path = folder / change.file
    source = path.read_text()
    if source.count(change.was) != 1:
        raise SystemExit(f"{change.file}: this stands {source.count(change.was)} times in it, not once: {change.was}")
    path.write_text(source.replace(change.was, change.became))
    tests = [f"tests/{argument}" if argument.endswith(".py") else argument for argument in TESTS[change.file]]
    process = FORKSERVER.Process(target=run_pytest, args=(folder, tests))
    process.start()
    process.join()
    path.write_text(source)
    return process.exitcode == 0


def main() -> int:
    files = sys.argv[1:] or list(TESTS)
    changes = [change for change in read_changes() if change.file in files]
    copies: Queue[Path] = Queue()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOY_BASE": f"{temporary}/toy"}
        for job in range(JOBS):
            copy = Path(temporary) / str(job)
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "*.png", "__pycache__"))
            copies.put(copy)

        def run(change: Change) -> bool:
            copy = copies.get()
            survived = survives(copy, change)
            copies.put(copy)
            print("survived" if survived else "noticed ", change.file, change.was[:80], flush=True)
            return survived

        results = [run(change) for change in changes[:1]]  # alone, because it builds the toy base
        with ThreadPoolExecutor(JOBS) as pool:
            results += pool.map(run, changes[1:])
    unexpected = 0
    print()
    for change, survived in zip(changes, results, strict=True):
        if survived:
            print(f"{change.file}\n- {change.was}\n+ {change.became}\n= {change.reason or 'NO TEST NOTICED THIS'}\n")
        if survived != bool(change.reason):
            unexpected += 1
    print(f"{len(changes)} changes, {sum(results)} survived, {unexpected} not as expected")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
