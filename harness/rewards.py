"""The reward of a completion: the math verifier's, or that of a function of your own (--reward FILE.py:FUNCTION).

    def reward(completion: str, row: dict) -> float: ...

completion is the decoded text. row is the row of the data set that the question comes from, with all its columns.
"""

import functools
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import verifier
from harness.options import fail

MAX_SHOWN = 300  # characters of a completion in an error message
MAX_REWARD = 3e38  # the largest float32 is 3.4e38


class RewardError(Exception):
    """A --reward function raised, or did not return a finite number. Arguments: the message, and the traceback."""


@functools.cache
def load(reward: str | None) -> Callable[[dict], tuple[float, str]]:
    """The function that grades a completion, {"completion", "answer", "row"} -> (reward, verdict), for this --reward.

    None gives the math verifier, with its verdicts. A function of the user's has the verdict "scored". Fails if there
    is no such function.
    """
    if reward is None:
        return lambda text: verifier.grade(text["completion"], text["answer"])
    function = load_function(reward)
    return lambda text: (call(reward, function, text["completion"], text["row"]), "scored")


def load_function(reward: str) -> Callable[[str, dict], float]:
    """The function that FILE.py:FUNCTION names. Fails if there is none."""
    file, _, name = reward.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not name.isidentifier():
        fail(f"--reward {reward}: write it as FILE.py:FUNCTION")
    if not path.is_file():
        fail(f"--reward {reward}: there is no file {file}")
    spec = importlib.util.spec_from_file_location("user_reward", path)
    assert spec is not None and spec.loader is not None  # because the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules["user_reward"] = module  # as import does it: dataclasses, for example, look there
    sys.path.append(str(path.resolve().parent))  # the file may import others of its folder
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        fail(f"--reward {reward}: importing {file} raised {describe(error)}", details=traceback.format_exc())
    function = getattr(module, name, None)
    if not callable(function):
        fail(f"--reward {reward}: {file} has no function {name}")
    return function


def call(reward: str, function: Callable[[str, dict], float], completion: str, row: dict) -> float:
    """The function's reward as a float. RewardError if it raises, or returns something else than a finite number."""
    given = f"It was given the completion {completion[:MAX_SHOWN]!r}" + ("..." if len(completion) > MAX_SHOWN else "")
    try:
        value = function(completion, dict(row))  # a copy: what the function changes in it is gone at the next call
    except (Exception, SystemExit) as error:
        message = f"--reward {reward}: the function raised {describe(error)}. {given}"
        raise RewardError(message, traceback.format_exc()) from None
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= MAX_REWARD:  # also if it is NaN
        raise RewardError(f"--reward {reward}: the function returned {value!r}, which is no finite number. {given}", "")
    return number


def describe(error: BaseException) -> str:
    """Class and message of an error, such as "KeyError: 'target'"."""
    return "".join(traceback.format_exception_only(error)).strip()
