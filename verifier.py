r"""Math reward: does a completion state an answer that equals the reference answer?

    >>> grade(r"14-1=13;13+8=21#### 21", "21"), grade(r"so it is \boxed{\frac{2}{4}}", r"\frac12")
    ((1.0, 'correct'), (1.0, 'correct'))

This file stands alone, so you can copy it. Copy the whole file, because its worker runs it: pasted into another file it
does not work. Numbers and words need only the standard library. All other mathematics needs math-verify. The file is in
the order in which data flows:

1. Extraction finds the stated answer: the last \boxed{}, `#### x` or "answer is x", or the last number in the text.
2. Comparison decides about words and about plain numbers. Numbers are exact fractions, and there is no tolerance. Text
   that could take too much time or memory is refused. The rest goes to math-verify.
3. math-verify runs in one worker process with a time limit and a memory limit. Its own timeout works only in the main
   thread and cannot interrupt a huge integer power. A process can always be killed.

A policy is trained on this reward, so a doubtful answer counts as wrong. Two different answers or half an answer earn
nothing.
"""

import atexit
import functools
import json
import logging
import os
import re
import subprocess
import sys
import threading
from fractions import Fraction
from typing import NamedTuple

JOB_SECONDS = 3.0  # time limit of one comparison, without the time in the queue
START_SECONDS = 60.0  # time limit for the worker to import math-verify, which is slow from a cold disk
MEMORY_BYTES = 1 << 30  # address space of the worker
MAX_DISTINCT = 3  # a text with more different boxes (or markers, or phrases) is guessing
MAX_CHARS = 600  # a longer answer is not compared

log = logging.getLogger(__name__)


def math_reward(completion: str, answer: str) -> float:
    """Return 1.0 if `completion` states an answer equal to `answer`, else 0.0. Raises nothing. See `grade`."""
    return grade(completion, answer)[0]


def grade(completion: str, answer: str) -> tuple[float, str]:
    """Return (reward, status). The reward is 1.0 if the status is "correct", else 0.0.

    `completion` is the generated text, `answer` is the answer field of a data set (see `gold_answer`). Status:

    - "correct" or "wrong": the stated answer equals the gold answer, or it does not.
    - "parse_failed": no answer was found, or the answer or the gold cannot be parsed.
    - "timeout": the worker broke its time limit or its memory limit and was killed.

    Raises nothing, whatever the arguments are. Plain numbers take microseconds and other mathematics milliseconds.
    Hostile text takes at most JOB_SECONDS and a restart of the worker.
    """
    try:
        gold = _tidy(gold_answer(answer))
        stated = extract_answer(completion, number=_number(gold) is not None)
        status = "parse_failed" if stated is None else _compare(gold, _tidy(stated))
    except TimeoutError:
        status = "timeout"
    except Exception:  # one bad sample must not end a training run
        log.debug("could not grade", exc_info=True)
        status = "parse_failed"
    return float(status == "correct"), status


def gold_answer(answer: str) -> str:
    r"""Return the gold answer in the answer field of a data set, stripped.

    It is the text after the last `####` (GSM8K), else the last complete \boxed{} (MATH), else the whole field.
    """
    if "####" in answer:
        return answer.rpartition("####")[2].strip()
    boxes, _ = _boxes(answer)
    if boxes:
        return _from_boxes(answer, boxes)[-1]
    return answer.strip()


def verifiable(answer: str) -> bool:
    """Return whether the gold answer equals itself. If it does not, no completion can earn the reward.

    Drop such rows when data loads, and tell the user. Numbers, mathematics that math-verify can parse and up to three
    plain words ("Tuesday", "C", "no solution") are verifiable. Empty text, sentences and meaningless signs are not.
    Raises nothing.
    """
    if not isinstance(answer, str):
        return False
    return math_reward(f"\\boxed{{{gold_answer(answer)}}}", answer) == 1.0


# ---- 1. Extraction. Every pattern takes linear time, because a policy writes long and strange text.

_END = re.compile(r"<\|(?:endoftext|im_end|eot_id|end_of_text|end)\|>|<｜end▁of▁sentence｜>|</s>|<eos>|<end_of_turn>")
# "Question 2:", "Q:"
_NEXT_QUESTION = re.compile(r"^[ \t*#]*Q(?:uestion)?[ \t*]*\d{0,3}[ \t*]*:", re.MULTILINE | re.IGNORECASE)
_REPLY = re.compile(r"^[ \t*]*A[ \t*]*:", re.MULTILINE)  # "A: 5", after "Q:"
# Opening and closing braces. The part `\\.` skips "\{" and "\}".
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s{0,3}\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
# Between two boxes that form one answer: ", ", "\) and \(", " \quad \text{or} \quad y = "
_GAP = r"(?:[\s$*.,;]|\\[()\[\],; ]|\\q?quad\b)*"
_JOIN = re.compile(rf"{_GAP}(?:and|or|\\text\{{,? ?(?:and|or) ?\}})?{_GAP}(?:[A-Za-z](?:_?\{{?\w\}}?)?\s*=)?{_GAP}")
# "#### 42". But "#### Step 1" is a heading.
_MARKER = re.compile(r"(?<!#)####(?!#|\s*(?:Step|Part|Case)\b)[ \t]*\n?(?P<answer>[^\n#]*)")
# "answer is", "Answer: ", "answer to the second question is therefore $"
_PHRASE = re.compile(
    r"\banswer(?: (?:to|for) [^.:\n]{1,80}?)?[ *]{0,4}(?:\bis\b|\bare\b|:|=)"
    r"(?:[\s*:$]|\\\[|equal to|therefore){0,8}",
    re.IGNORECASE,
)
# The point of "5. Then", but not of "5.25". The ", because " of "5, because it".
_SENTENCE_END = re.compile(r"\n|[.?](?=[\s*\"')]|$)|[,;]?\s(?:because|since|which|where|as)\s")
_ANY_NUMBER = re.compile(
    r"""
    (?:(?<![\w)\]}.,^])[-−–])?\$?(?<![\w.^])            # "-5", "-$5", but the minus of "48-24" is not a sign
    (?:
        \d*\ ?(?:\\[dt]?frac\{\d+\}\{\d+\}|[½⅓⅔¼¾])     # "2\frac{1}{2}", "2½"
        | \d+\ \d+/\d+                                  # "2 1/2"
        | (?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?    # "1,234.5"
          (?:\ ?/\ ?\d+)?                               # "3/4"
        | \.\d+                                         # ".5"
    )
    (?:[eE]-?\d{1,3}\b)?(?:\ ?\\?%)?                    # "4e5", "5%", "5 \%"
    (?!(?:st|nd|rd|th)\b)                               # not "5th"
    """,
    re.VERBOSE | re.ASCII,
)
# What is left of a list of guesses without its numbers: "(", ", ", " or "
_SEPARATORS = re.compile(r"(?:[\s,;:.|()\[\]{}$*-]|\b(?:and|or)\b)*", re.IGNORECASE)


def extract_answer(text: str, number: bool = False) -> str | None:
    r"""Return the answer that a completion states, as written, or None if it states no answer or too many.

    The answer is the last complete \boxed{}, else the last `#### x`, else the last "answer is x" or "answer: x" up to
    the end of its sentence. If `number` is true (the gold is a plain number), it can also be the last number in the
    text. Raises TypeError if `text` is not a string.
    """
    text = _generated(text)
    boxes, has_open_box = _boxes(text)
    if boxes:
        statements = _from_boxes(text, boxes)
        return None if _undecided(statements) else statements[-1]

    markers = _from_markers(text)
    phrases = _from_phrases(text)
    # If the text stops in the middle of its answer, the numbers before that place are only intermediate results.
    if has_open_box and not markers:
        return None
    statements = markers or phrases
    if statements and statements[-1] == "":
        return None

    content = r"[0-9]" if number else r"\S"
    for statements in (markers, phrases):
        readable = [statement for statement in statements if re.search(content, statement)]
        if readable:
            return None if _undecided(readable) else readable[-1].strip()
    return _from_last_number(text) if number else None


def _generated(text: str) -> str:
    """Remove the thinking, everything after the end token, and further questions that the model made up."""
    text = _END.split(text, maxsplit=1)[0]
    text = text.rpartition("</think>")[2]
    if not _NEXT_QUESTION.search(text):
        return text
    boxes, _ = _boxes(text)
    ends = [box.end for box in boxes[:1]]
    ends += [m.end() for m in (_MARKER.search(text), _PHRASE.search(text), _REPLY.search(text)) if m]
    if not ends:
        return text  # only a question after an answer is a new one, because a reply can begin with its own question
    question = _NEXT_QUESTION.search(text, min(ends))
    return text[: question.start()] if question else text


class Box(NamedTuple):
    content: str  # stripped
    start: int  # text[start:end] is the whole box
    end: int


def _boxes(text: str) -> tuple[list[Box], bool]:
    r"""Return the complete, innermost, non-empty boxes, and whether a box is left open at the end of the text.

    For `\boxed{x^{2}} and \boxed{3` this is [Box("x^{2}", 0, 13)], True. Braces can be nested to any depth, so this is
    a scan and not a regular expression.
    """
    if "box" not in text:
        return [], False
    boxes: list[Box] = []
    open_braces: list[re.Match[str]] = []
    for brace in _BRACE.finditer(text):
        if brace.lastgroup in ("box", "open"):
            open_braces.append(brace)
        elif brace.lastgroup == "close" and open_braces:
            opening = open_braces.pop()
            if opening.lastgroup == "open":
                continue
            content = text[opening.end() : brace.start()].strip()
            contains_a_box = boxes and boxes[-1].start > opening.start()
            if content and not contains_a_box:
                boxes.append(Box(content, opening.start(), brace.end()))
    return boxes, any(brace.lastgroup == "box" for brace in open_braces)


def _from_boxes(text: str, boxes: list[Box]) -> list[str]:
    r"""Return the text in each box, or in joined boxes together: ["3", "1, 2"] for `\boxed{3}? \boxed{1} or \boxed{2}`.

    Joined boxes can be the parts of one answer. If they are different answers, the text has not chosen one of them.
    """
    statements: list[dict[Number | str, str]] = []
    end = 0
    for box in boxes:
        between = text[end : box.start]
        if not statements or len(between) > 60 or not _JOIN.fullmatch(between):
            statements.append({})
        tidied = _tidy(box.content)
        value = _number(tidied) or tidied
        statements[-1].pop(value, None)  # an answer written in two ways is one: `\boxed{1/2} or \boxed{0.5}` is "0.5"
        statements[-1][value] = box.content
        end = box.end
    return [", ".join(statement.values()) for statement in statements]


def _from_markers(text: str) -> list[str]:
    """Return the text after each `####`: ["7"] for "#### Step 1: 3+4 #### Answer: 7"."""
    return [_PHRASE.sub("", m["answer"]).strip() for m in _MARKER.finditer(text)]


def _from_phrases(text: str) -> list[str]:
    """Return the rest of the sentence after each "answer is": ["3.5"] for "The answer is 3.5, because 7/2 is 3.5."."""
    starts = [m.end() for m in _PHRASE.finditer(text)]
    return [_SENTENCE_END.split(text[start : start + MAX_CHARS], maxsplit=1)[0] for start in starts]


def _from_last_number(text: str) -> str | None:
    """Return the last number: "13" for "16 - 3 = 13 eggs". Return None for "12, 13 or 14", a list of guesses."""
    numbers = [m[0] for m in _ANY_NUMBER.finditer(text)]
    if not numbers:
        return None
    if len(set(numbers)) > 1 and _SEPARATORS.fullmatch(_ANY_NUMBER.sub("", text)):
        return None
    return numbers[-1]


def _undecided(statements: list[str]) -> bool:
    """Return whether the text states too many different answers, or denies the last one ("not 5")."""
    distinct = {re.sub(r"\s", "", statement) for statement in statements}
    return len(distinct) > MAX_DISTINCT or bool(re.match(r"(?i)not\b", statements[-1]))


# ---- 2. Comparison

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup "}
    | {"≤": r"\le ", "≥": r"\ge ", "∈": r"\in ", "°": r"^\circ", "²": "^2", "³": "^3", "\u00a0": " ", "€": "", "£": ""}
    | {"½": r"\frac12", "⅓": r"\frac13", "⅔": r"\frac23", "¼": r"\frac14", "¾": r"\frac34"}
)
_REWRITES = [
    (r"√\s*(?:\(([^()]*)\)|(\w+))", r"\\sqrt{\1\2}"),  # "√(x+1)", "√2"
    (r"(?<!\\)\$|(?<!\\)\\[()\[\]]|\\displaystyle", ""),  # "$5$", "\(5\)"; but `\\[2pt]` does not open a formula
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),  # "\left(", "\right."
    (r"\{,\}|,\s*\\!\s*", ","),  # "1{,}000", "1,\!000"
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|~|\s+", " "),  # "5\,000", "5~cm"
    (r"\\[dtc]frac", r"\\frac"),  # "\dfrac"
    (r"\\frac\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))", r"\\frac{\1\2}{\3\4}"),  # "\frac12", "\frac{1} {2}"
    (r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|mathit|rm|bf)\s*\{", r"\\text{"),  # "\textbf{", "\mbox {"
    (r"\\text\{\s*(-?\d[^{}]*)\}", r"\1"),  # "\text{5 cents}"
    (r"\\text\{\s*([ie])\s*\}|(?<=\d)(i)\b", r" \1\2 "),  # "\text{i}", "\mathrm{e}", "2.0i"
    (r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)$|\\!", ""),  # "90^\circ", "90 \degree"
]
# These words change the number before them: "5 or 6", "5 million"
_AFTER = (
    r"\b(?i:or|and|than|half|squared|cubed|factorial|choose|mod|modulo|base|pi|sin|cos|tan|cot|sec|log|ln|exp|sqrt|dozen|"
    r"hundred|thousand|million|billion)\b"
)
# These words change the number after them: "at least 5", "not 5"
_BEFORE = rf"(?:{_AFTER}|\b(?i:no|not|least|most|less|more|minus|negative|times|over|under|about|nearly)\b)"
# Something is left to calculate: "14-1+8", "2\cdot3", "5!". A text that copies the problem has not solved it.
_UNFINISHED = re.compile(r"[\d)}]\s*(?:[-+*]|\\times|\\cdot)\s*[\d({\\]|\\(?:sum|prod|int|lim|binom)|!")
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:\ \d{3})+|\d+)(?:\.\d*)?|\.\d+)"  # "1,234", "1 234.5", "12", ".5"
_TO_PLAIN = [
    (rf"^(?:(?!{_BEFORE})[A-Za-z][A-Za-z',]+:?\s+)+(?=[-+.\d])", ""),  # "Total: 5", "She has 5"
    (rf"\s*\\frac\{{\s*(-?{_DIGITS})\s*\}}\{{\s*(-?{_DIGITS})\s*\}}", r" \1/\2"),  # "2\frac{1}{2}" -> "2 1/2"
    (r"\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?\s*(-?\d{1,3})\s*\}?(?!\d)", r"e\1"),  # "4\times 10^{5}" -> "4e5"
    (r"(?<=\d)(\s*\\text\{)?\s*thousand\b", r"e3\1"),  # "5 thousand" -> "5e3"
    (r"(?<=\d)(\s*\\text\{)?\s*million\b", r"e6\1"),  # "5 million" -> "5e6"
    (r"\s*\\text\{\s*\}", ""),  # "5\text{ }" -> "5"
]
_NUMBER = re.compile(
    rf"""
    \s*(?P<sign>[-+]?)\s*
    (?:(?P<whole>\d+)\ (?=\d+\ ?/))?                    # the 1 of "1 2/3"
    (?P<top>{_DIGITS})                                  # the 2 of "1 2/3", all of "1,234.5"
    (?:\ ?/\ ?(?P<bottom>-?{_DIGITS}))?                 # the 3 of "1 2/3"
    (?:[eE](?P<power>[-+]?\d{{1,3}}))?                  # the 5 of "4e5"
    (?:_\{{?(?P<base>\d+)\}}?)?                         # the 8 of "52_8"
    (?!.*{_AFTER})                                      # not "5 or 6"
    (?:
        \s*(?P<percent>\\?%|percent\b)[A-Za-z ,]*       # "5\%", "5 percent of all apples"
        |
        (?:\s*\\text\{{\s*                              # a unit: "5 \text{{ cm}}"
        |\s+(?=[A-Za-z]{{3}})|(?=[A-Za-z]{{4}})         # "5 apples", "5miles"; but "5ab" and "5 x" are products
        |\s*(?=(?:[ckm]m|kg|ft|in|lb|oz|ml|hr|am|pm)\b) # "5cm", "5 cm"
        )
        (?:(?:square|cubic|sq)\s)?                      # "5 square miles"
        (?P<unit>[A-Za-z])[A-Za-z\s.,/'(){{}}-]*        # the m of "miles per hour"
        (?:\^\s*\{{?[23]\}}?)?                          # "5 cm^2"
    )?
    \s*""",
    re.VERBOSE | re.ASCII,
)
_TIME = re.compile(
    r"(?P<hour>\d{1,2}):(?P<minute>[0-5]\d)"  # "12:30"
    r"(?: ?(?:\\text\{ ?)?(?P<half>[ap])\.? ?m\.?\}?)?",  # the p of "\text{ p.m.}"
    re.IGNORECASE | re.ASCII,
)
# "x < 3", "2 \le x"; and "2, 3" or "\{2, 3\}", but not "(2, 3)", which can be an interval
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|lt|gt)")
_LIST = re.compile(r"[^()\[\]]*(?:,|\band\b)[^()\[\]]*")
_CLOSED_AT_INFINITY = re.compile(r"\[[-+]?\\infty|\\infty ?\]")  # "[2,\infty]"
# " \text{ cm}^2" at the end of "5x \text{ cm}^2". math-verify would read it as a product.
_UNIT_AT_END = re.compile(rf"(?<=[\w}})])\s*\\text\{{(?!.*{_AFTER})\s*[A-Za-z][A-Za-z .]*\}}(?:\^\{{?[23]\}}?)?$")


class Number(NamedTuple):
    value: Fraction
    unit: str  # "%", a base such as "_8", "d" for dollars, the first letter of the unit, or ""


@functools.lru_cache(maxsize=8192)
def _tidy(text: str) -> str:
    r"""Return one spelling for all spellings of an answer: `\frac{1}{2}` for `$\dfrac12$.`

    This never drops a sign, a digit or a comma between digits. It drops all of a text that is too long, because a part
    of the text could be another answer.
    """
    if len(text) > MAX_CHARS:
        return ""
    text = text.translate(_UNICODE).strip(" \n\t*`")
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return text.rstrip(" .,;:*").lstrip()


@functools.lru_cache(maxsize=8192)
def _number(text: str) -> Number | None:
    """Read a tidied plain number: (5/3, "") for "1 2/3", (12, "c") for "12 cm". Return None for any other text."""
    plain = text.replace("\\$", "")
    for pattern, replacement in _TO_PLAIN:
        plain = re.sub(pattern, replacement, plain, flags=re.ASCII)
    if len(plain) >= 300:  # Python refuses to read an integer of more than 4,300 digits
        return None
    m = _NUMBER.fullmatch(plain)
    if not m:
        return None
    top = Fraction(re.sub("[, ]", "", m["top"]))
    bottom = Fraction(re.sub("[, ]", "", m["bottom"] or "1"))
    if bottom == 0:
        return None
    value = Fraction(m["whole"] or 0) + top / bottom
    value *= Fraction(10) ** int(m["power"] or 0)
    if m["sign"] == "-":
        value = -value
    if m["percent"]:
        return Number(value, "%")
    if m["base"]:
        return Number(value, "_" + m["base"])
    if "\\$" in text:
        return Number(value, "d")
    return Number(value, (m["unit"] or "").lower())


def _word(text: str) -> str | None:
    r"""Read a tidied answer of up to three words: "no solution" for `\text{No solution}`, "C" for "(C)" and "C: 12"."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip(" .")
    words = re.fullmatch(r"\(?([A-Za-z]+(?: [A-Za-z']+){0,2})\)?", text)
    choice = re.match(r"\(?([A-J])(?:\)|[.:] )(?!.*\b[A-J](?:\)|[.:] |$))", text)  # not "(A), (B)"
    m = words or choice
    if not m:
        return None
    return m[1] if len(m[1]) == 1 else m[1].lower()


def _equal_times(gold: str, pred: str) -> bool | None:
    """Compare two times of day: "12:30" equals "12:30 p.m.", but not "6:15". Return None if one of them is no time."""
    gold_time = _TIME.fullmatch(gold)
    pred_time = _TIME.fullmatch(pred)
    if not gold_time or not pred_time:
        return None
    if gold_time["half"] and pred_time["half"] and gold_time["half"].lower() != pred_time["half"].lower():
        return False
    return int(gold_time["hour"]) == int(pred_time["hour"]) and gold_time["minute"] == pred_time["minute"]


def _compare(gold: str, pred: str) -> str:
    """Return the status of two tidied answers."""
    # Words come first, because as mathematics "east" and "seat" are the same product of four letters.
    gold_word = _word(gold)
    if gold_word and ("\\text" in gold or re.search(r"\w{4}", gold_word) or re.fullmatch("[A-J]", gold_word)):
        return "correct" if _word(pred) == gold_word else "wrong"

    gold_number = _number(gold)
    if gold_number is not None:
        status = _compare_with_number(gold_number, pred)
        if status is not None:
            return status

    equal_times = _equal_times(gold, pred)
    if equal_times is not None:  # math-verify would read 12:30 as a fraction
        return "correct" if equal_times else "wrong"

    gold = _UNIT_AT_END.sub("", gold)
    pred = _UNIT_AT_END.sub("", pred)
    if _refuse(gold) or _refuse(pred):
        return "parse_failed"
    if _other_kind(gold, pred):
        return "wrong"
    space = r"\s+(?!\d)|(?<!\d)\s+"  # but not between two digits
    if re.sub(space, "", gold) == re.sub(space, "", pred):
        pred = gold  # the worker still has to parse it, because a meaningless gold must not be rewarded
    return worker.judge(gold, pred)


def _compare_with_number(gold: Number, pred: str) -> str | None:
    """Return the status of a tidied answer when the gold is a number, or None if only mathematics can decide."""
    number = _number(pred)
    if number is None and "=" in pred:
        # `x = 48/2 = 24` says 24. But `x = 5, y = 6` and `x >= 6` do not say 6, and `4 = 5` is false.
        first, *middle, _ = pred.split("=")
        if not re.search(r"[,;<>!]", first) and not re.search(r"(?<!\\)\b[A-Za-z]", " ".join(middle)):
            sides = [_number(side.strip()) for side in pred.split("=")]
            if len({side.value for side in sides if side is not None}) > 1:
                return "wrong"
            number = sides[-1]
    if number is not None:
        return "correct" if _equal_numbers(gold, number) else "wrong"
    if "," in pred or _UNFINISHED.search(pred):
        return "wrong"  # math-verify would read `5, 5` as a set and say that it equals 5
    return None


def _equal_numbers(gold: Number, pred: Number) -> bool:
    """Return whether two numbers are equal. If one side has no unit, the question gives it."""
    if pred.unit.startswith("_") and not gold.unit:
        return False  # a base is not a unit, because it changes the value
    if gold.unit and pred.unit and gold.unit != pred.unit:
        return False
    if gold.unit == "%" and not pred.unit:
        return pred.value in (gold.value, gold.value / 100)  # 15% can be written as 15 or as 0.15
    if pred.unit == "%" and not gold.unit:
        return gold.value in (pred.value, pred.value / 100)
    return gold.value == pred.value


def _other_kind(gold: str, pred: str) -> bool:
    r"""Return whether math-verify would mix up two kinds: `2 < x < 3` and `2, 3`, `[2, \infty]` and `[2, \infty)`."""
    one_list = bool(_LIST.fullmatch(gold)) != bool(_LIST.fullmatch(pred))
    one_inequality = bool(_INEQUALITY.search(gold)) != bool(_INEQUALITY.search(pred))
    one_closed = bool(_CLOSED_AT_INFINITY.search(gold)) != bool(_CLOSED_AT_INFINITY.search(pred))
    return one_closed or (one_list and one_inequality)


def _refuse(text: str) -> bool:
    """Return whether to keep a text from math-verify: it is empty, is prose, or can stand for something huge."""
    empty = not re.search(r"\w", text)
    deep = len(re.findall(r"[({\[]", text)) > 60
    prose = len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)) > 2  # "\sqrt" is not a word
    side_by_side = re.search(r"(?<![_^\d])\d+\s+\d", text)  # math-verify would read "2 3" as a product
    flat = re.sub(r"[\s{}()\[\]]", "", text.replace("}{", "/"))
    huge = re.search(r"\d\^-?\d+\^|\^-?\d{5,}|\d{200}|\d{4}!|!!|\^-?\d+!", flat)  # "9^9^9", "9^99999", "1000!", "9!!"
    return bool(empty or deep or prose or side_by_side or huge)


# ---- 3. The worker


class Worker:
    """A process that runs math-verify. It starts with the first job and does one job at a time, for all threads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._usable = True  # False after math-verify could not be imported
        self._lock = threading.Lock()
        self._remembered = functools.lru_cache(maxsize=8192)(self._ask)  # completions often state the same answer

    @property
    def pid(self) -> int | None:
        """Id of the process, or None if there is none."""
        return self._process.pid if self._process else None

    def judge(self, gold: str, pred: str) -> str:
        """Return the status of two tidied answers. Without math-verify, only equal text is correct.

        Raises TimeoutError if the process took too long or died. Statuses are remembered, errors are not.
        """
        return self._remembered(gold, pred)

    def reset(self) -> None:
        """Stop the process and forget all statuses. The next job starts a new process."""
        with self._lock:
            self.stop()
            self._usable = True
            self._remembered.cache_clear()

    def stop(self) -> None:
        """Stop the process. This takes no lock, because another thread can still hold it when Python exits."""
        if self._process:
            self._process.kill()
            self._process.communicate()  # waits for the end and closes the pipes
        self._process = None

    def after_fork(self) -> None:
        """Forget the process, because it is the parent's. Replace the lock, because its thread may not exist here."""
        self._process = None
        self._lock = threading.Lock()

    def _ask(self, gold: str, pred: str) -> str:
        with self._lock:
            if self._usable and (self._process is None or self._process.poll() is not None):
                self._start()
            if not self._usable:
                return "correct" if gold == pred else "parse_failed"
            status = self._reply(JOB_SECONDS, json.dumps([gold, pred]) + "\n")  # json writes any text as ASCII
        if not status:
            raise TimeoutError
        return status

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # fixes the order of sets, so verdicts are the same in every run
        )
        self._usable = self._reply(START_SECONDS) == "ready"
        if not self._usable:
            log.warning("math-verify could not be loaded: only numbers, words and equal text will be rewarded")

    def _reply(self, seconds: float, job: str = "") -> str:
        """Send a job and return the next line of the process, or "" if the process died or took too long."""
        process = self._process
        assert process and process.stdin and process.stdout  # for mypy
        line = b""
        timer = threading.Timer(seconds, process.kill)  # ends `readline` on every system and in every thread
        timer.start()
        try:
            process.stdin.write(job.encode())
            line = process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
            if not line:  # also after KeyboardInterrupt: the next job must not get the reply to this one
                self.stop()
        return line.decode().strip()


worker = Worker()
atexit.register(worker.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=worker.after_fork)


def _serve() -> None:
    """Run the worker: read lines [gold, pred] as JSON and write a status for each. It ends when the parent ends."""
    import signal

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not be taken for a status
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and stops this process
    # The alarm ends a process that hangs when the parent is gone. Windows has no alarm.
    set_alarm = getattr(signal, "alarm", lambda seconds: None)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # Windows has no such limit and macOS may refuse it; the time limit still holds
    from math_verify import LatexExtractionConfig, grader, parse, verify
    from math_verify.parser import NormalizationConfig
    from sympy import Float, Rational

    # math-verify compares decimals rounded and takes a difference below 1e-15 for zero, so all tiny numbers are equal.
    # Here a decimal is a fraction, and sympy decides about the difference if it can.
    rounded_equal = grader.sympy_numeric_eq

    def with_fractions(value):  # type: ignore[no-untyped-def]
        return value.xreplace({decimal: Rational(str(decimal)) for decimal in value.atoms(Float)})

    def exactly_equal(a, b, *digits):  # type: ignore[no-untyped-def]
        if a.is_Matrix or b.is_Matrix:
            return rounded_equal(a, b, *digits)  # it calls this function for each entry
        a = with_fractions(a)
        b = with_fractions(b)
        return (a - b).is_zero is not False and rounded_equal(a, b, *digits)

    grader.sympy_numeric_eq = exactly_equal

    # Parse the whole text: do not search for something readable in it, and do not remove units (`2t` is not 2).
    rules = NormalizationConfig(units=False, malformed_operators=True, nits=True)
    config = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=rules)
    options = {"fallback_mode": "no_fallback", "extraction_mode": "first_match", "parsing_timeout": None}

    def compare(gold: str, pred: str) -> str:
        parsed_gold = parse(f"\\boxed{{{gold}}}", [config], **options)
        parsed_pred = parse(f"\\boxed{{{pred}}}", [config], **options)
        if not parsed_gold or not parsed_pred:
            return "parse_failed"
        # float_rounding counts decimals. It matters where sympy cannot decide: with few of them, 3.14 would equal pi.
        equal = verify(parsed_gold, parsed_pred, float_rounding=12, allow_set_relation_comp=True, timeout_seconds=None)
        return "correct" if equal else "wrong"

    compare("x^2", "x^2")  # loads the grammar now, because a job has a time limit
    print("ready", file=answers)
    for line in sys.stdin:
        set_alarm(int(JOB_SECONDS) + 2)
        gold, pred = json.loads(line)
        print(compare(gold, pred), file=answers)  # a MemoryError ends this process, and the parent notices
        set_alarm(0)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    _serve()
