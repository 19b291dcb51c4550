r"""Math reward: does a completion state an answer that equals the reference answer?

    >>> grade(r"14-1=13;13+8=21#### 21", "21"), grade(r"so it is \boxed{\frac{2}{4}}", r"\frac12")
    ((1.0, 'correct'), (1.0, 'correct'))

The file stands alone: copy it. Numbers and words need the standard library only, all other mathematics math-verify. In
the order in which data flows:

1. Extraction: cut the text, then the last \boxed{}, `#### x`, "answer is x" or, for a plain number, the last number.
2. Comparison: words; plain numbers as exact fractions, no tolerance; a guard against what would blow up; math-verify.
3. math-verify runs in one worker process with a time and a memory limit. Its own timeout is SIGALRM, which fails off
   the main thread and cannot interrupt a huge integer power; a process can always be killed.

A policy is trained against this, so doubt counts as wrong: two different answers, or half of one, earn nothing.
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

JOB_SECONDS = 3.0  # wall clock of one comparison, from the moment the idle worker gets it
START_SECONDS = 60.0  # for the worker to import math-verify from a cold disk
MEMORY_BYTES = 1 << 30  # address space of the worker
MAX_DISTINCT = 3  # more different boxes (or markers, or phrases) than this are guesses
MAX_CHARS = 600  # a longer answer is not compared

log = logging.getLogger(__name__)


def math_reward(completion: str, answer: str) -> float:
    """1.0 if `completion` states an answer equal to `answer`, else 0.0. Raises nothing; see `grade`."""
    return grade(completion, answer)[0]


def grade(completion: str, answer: str) -> tuple[float, str]:
    """Reward, 1.0 or 0.0, and why: "correct", "wrong", "parse_failed" (no answer stated, or it or the gold means
    nothing) or "timeout" (the worker broke its time or memory limit and was killed).

    `answer` is a data set's field, see `gold_answer`. Raises nothing, whatever the arguments. Plain numbers take
    microseconds, other mathematics milliseconds, hostile text at most JOB_SECONDS and a restart of the worker.
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
    r"""The gold in a data set's field: GSM8K's text after the last `####`, else the last complete \boxed{} of a MATH
    solution, else the field itself; stripped."""
    if "####" in answer:
        return answer.rpartition("####")[2].strip()
    boxes, _ = _boxes(answer)
    return _last_box(answer, boxes) if boxes else answer.strip()


def verifiable(answer: str) -> bool:
    """Whether the gold equals itself. Rows that fail can never be rewarded: drop them, loudly, when data loads.

    Verifiable are numbers, what math-verify can read, and up to three plain words ("Tuesday", "C", "no solution"). Not
    verifiable are empty text, signs without meaning and sentences: they are not rewarded even against the same text.
    """
    return isinstance(answer, str) and grade(f"\\boxed{{{gold_answer(answer)}}}", answer)[1] == "correct"


# ---- 1. Extraction. Every pattern takes linear time: a policy writes long and strange text.

_END = re.compile(r"<\|(?:endoftext|im_end|eot_id|end_of_text|end)\|>|<｜end▁of▁sentence｜>|</s>|<eos>|<end_of_turn>")
_NEXT_QUESTION = re.compile(r"^[ \t*#]*Question[ \t*]*\d{0,3}[ \t*]*:", re.MULTILINE | re.IGNORECASE)
_BRACE = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{|\\.|[{}]", re.DOTALL)
_JOIN = re.compile(r"[\s$.,;]*(?:and|or|\\text\{ ?(?:and|or) ?\})?[\s$]*(?:[A-Za-z]\s*=)?[\s$]*")
_MARKER = re.compile(r"(?<!#)####(?!#|\s*(?:Step|Part|Case)\b)[ \t]*\n?([^\n#]*)")  # `#### Step 1` is a heading
_PHRASE = re.compile(
    r"\banswer(?: (?:to|for) [^.:\n]{1,80}?)?[ *]{0,4}(?:\bis\b|\bare\b|:|=)(?:[\s*:$]|\\\[|equal to|therefore){0,8}",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\n|[.?](?=[\s*\"')]|$)|[,;]?\s(?:because|since|which|where|as)\s")
_ANY_NUMBER = re.compile(
    r"(?:(?<![\w)\]}.,^])[-−–])?\$?(?<![\w.^])"  # in 48-24 the minus is no sign
    r"(?:\d* ?\\[dt]?frac\{\d+\}\{\d+\}|\d+ \d+/\d+|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?: ?/ ?\d+)?|\.\d+)"
    r"(?:[eE]-?\d{1,3}\b)?(?: ?\\?%)?(?!(?:st|nd|rd|th)\b)",
    re.ASCII,
)
_SEPARATORS = re.compile(r"(?:[\s,;:.|()\[\]{}$*-]|\b(?:and|or)\b)*", re.IGNORECASE)


def extract_answer(text: str, number: bool = False) -> str | None:
    r"""The answer that a completion states, as written; None if it states none, or too many.

    The first that applies: last complete \boxed{}; last `#### x`; last "answer is x" or "answer: x" up to the end of
    its sentence; and, only if `number` (the gold is a plain number), the last number in the text.
    """
    text = _generated(text)
    boxes, unclosed = _boxes(text)
    markers = [_PHRASE.sub("", m[1]).strip() for m in _MARKER.finditer(text)]
    phrases = [_SENTENCE_END.split(text[m.end() : m.end() + MAX_CHARS], 1)[0] for m in _PHRASE.finditer(text)]
    if not boxes and ((unclosed and not markers) or (markers or phrases)[-1:] == [""]):
        return None  # cut off in the middle of the answer: the numbers before it are only working
    for found in ([content for content, _, _ in boxes], markers, phrases):
        found = [x for x in found if re.search(r"[0-9]" if number and not boxes else r"\S", x)]
        if found:
            if len({re.sub(r"\s", "", x) for x in found}) > MAX_DISTINCT or re.match(r"(?i)not\b", found[-1]):
                return None
            return _last_box(text, boxes) if boxes else found[-1].strip()
    numbers = [m[0] for m in _ANY_NUMBER.finditer(text)] if number else []
    listed = len(set(numbers)) > 1 and _SEPARATORS.fullmatch(_ANY_NUMBER.sub("", text))  # nothing but guesses
    return numbers[-1] if numbers and not listed else None


def _generated(text: str) -> str:
    """What counts as the reply: up to the end token, after the thinking, before a new question that it made up."""
    text = _END.split(text, maxsplit=1)[0].rpartition("</think>")[2]
    questions = [m.start() for m in _NEXT_QUESTION.finditer(text)]
    if questions:  # only one that follows an answer: a reply may well open by restating its own question
        stated = [end for _, _, end in _boxes(text)[0][:1]]
        stated += [m.end() for pattern in (_MARKER, _PHRASE) if (m := pattern.search(text))]
        text = text[: next((q for q in questions if stated and q >= min(stated)), None)]
    return text


def _boxes(text: str) -> tuple[list[tuple[str, int, int]], bool]:
    r"""Complete, innermost, non-empty \boxed{} as (content, start, end), and whether a box is left open. A scan, for
    braces nest deeper than a regular expression can follow."""
    boxes, stack = [], []  # stack of open braces: the match for a box, None for any other
    for m in _BRACE.finditer(text) if "box" in text else ():
        if m[0].endswith("{") and m[0] != "\\{":
            stack.append(m if len(m[0]) > 1 else None)
        elif m[0] == "}" and stack and (box := stack.pop()) and (content := text[box.end() : m.start()].strip()):
            boxes += [(content, box.start(), m.end())] if not boxes or boxes[-1][1] < box.start() else []
    return boxes, any(stack)


def _last_box(text: str, boxes: list[tuple[str, int, int]]) -> str:
    r"""The last box; of `\boxed{1} and \boxed{2}` both, as "1, 2": who offers two answers has not chosen one."""
    parts = [boxes[-1][0]]
    for (content, _, end), (_, start, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        if start - end > 40 or not _JOIN.fullmatch(text[end:start]):
            break
        parts.insert(0, content)
    values = [_number(_tidy(part)) or part for part in parts]  # one number written in two ways is one answer
    return ", ".join(part for i, part in enumerate(parts) if values[i] not in values[i + 1 :])


# ---- 2. Comparison

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup "}
    | {"≤": r"\le ", "≥": r"\ge ", "∈": r"\in ", "°": r"^\circ", "²": "^2", "³": "^3", "\u00a0": " ", "€": "", "£": ""}
)
_REWRITES = [
    (r"√\s*(?:\(([^()]*)\)|(\w+))", r"\\sqrt{\1\2}"),
    (r"(?<!\\)\$|(?<!\\)\\[()\[\]]|\\displaystyle", ""),  # but `\\[2pt]` opens no formula
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
    (r"\{,\}|,\s*\\!\s*", ","),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|~|\s+", " "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))", r"\\frac{\1\2}{\3\4}"),
    (r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|mathit|rm|bf)\s*\{", r"\\text{"),
    (r"\\text\{\s*(i|-?\d[^{}]*)\}", r"\1"),  # \text{5 cents}
    (r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)$|\\!", ""),
]
# After and before a number these words make it another number, or none.
_AFTER = (
    r"\b(?i:or|and|than|half|squared|cubed|factorial|choose|mod|modulo|base|pi|sin|cos|tan|cot|sec|log|ln|exp|sqrt|dozen|"
    r"hundred|thousand|million|billion)\b"
)
_BEFORE = rf"(?:{_AFTER}|\b(?i:no|not|least|most|less|more|minus|negative|times|over|under|about|nearly)\b)"
# What is left to work out: who copies the problem 14-1+8 has not answered it.
_OPEN = re.compile(r"[\d)}]\s*(?:[-+*]|\\times|\\cdot)\s*[\d({\\]|\\(?:sum|prod|int|lim|binom)|!")
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:\ \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_TO_PLAIN = [
    (rf"^(?:(?!{_BEFORE})[A-Za-z][A-Za-z',]+:?\s+)+(?=[-+.\d])", ""),  # Total: 5
    (rf"\s*\\frac\{{\s*(-?{_DIGITS})\s*\}}\{{\s*(-?{_DIGITS})\s*\}}", r" \1/\2"),
    (r"\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?\s*(-?\d{1,3})\s*\}?(?!\d)", r"e\1"),
    (r"(?<=\d)(\s*\\text\{)?\s*thousand\b", r"e3\1"),
    (r"(?<=\d)(\s*\\text\{)?\s*million\b", r"e6\1"),
    (r"\s*\\text\{\s*\}", ""),
]
_NUMBER = re.compile(
    rf"""\s*([-+]?)\s*(?:(\d+)\ (?=\d+\ ?/))?({_DIGITS})(?:\ ?/\ ?(-?{_DIGITS}))?(?:[eE]([-+]?\d{{1,3}}))?  # 1 2/3, 4e5
    (?:_\{{?(\d+)\}}?)?  # base
    (?!.*{_AFTER})(?:
        \s*(\\?%|percent\b)[A-Za-z ,]*
    |   # or a unit in words: `5cm` and `5 apples`, but `5ab` and `5 x` are products
        (?:\s*\\text\{{\s*|\s+(?=[A-Za-z]{{3}})|(?=[A-Za-z]{{4}})|\s*(?=(?:[ckm]m|kg|ft|in|lb|oz|ml|hr|am|pm)\b))
        (?:(?:square|cubic|sq)\s)?([A-Za-z])[A-Za-z\s.,/'(){{}}-]*(?:\^\s*\{{?[23]\}}?)?)?\s*""",
    re.VERBOSE | re.ASCII,
)


@functools.lru_cache(maxsize=8192)
def _tidy(text: str) -> str:
    """One spelling for what is only spelled differently; no sign, digit or comma between digits is ever dropped. Too
    long a text becomes empty as a whole, for a part of it could be another answer."""
    text = text.translate(_UNICODE).strip(" \n\t*`") if len(text) <= MAX_CHARS else ""
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return text.rstrip(" .,;:*").lstrip()


@functools.lru_cache(maxsize=8192)
def _number(text: str) -> tuple[Fraction, str] | None:
    """A tidied plain number as (exact value, unit), or None for anything else. The unit is "%", a base such as "_8",
    the first letter of its words, or ""."""
    plain = text.replace("\\$", "")
    for pattern, replacement in _TO_PLAIN:
        plain = re.sub(pattern, replacement, plain, flags=re.ASCII)
    m = _NUMBER.fullmatch(plain) if len(plain) < 300 else None  # Python reads no integer of more than 4,300 digits
    if not m:
        return None
    sign, whole, top, bottom, power, base, percent, unit = m.groups(default="")
    top, bottom = (Fraction(re.sub("[, ]", "", part)) for part in (top, bottom or "1"))
    if not bottom:
        return None
    value = (Fraction(whole or 0) + top / bottom) * Fraction(10) ** int(power or 0) * (-1 if sign == "-" else 1)
    return value, "%" if percent else "_" + base if base else "d" if "\\$" in text else unit.lower()


def _equal_numbers(gold: tuple, pred: tuple) -> bool:
    """A unit that one side leaves out is taken from the question; a base is not, it would change the gold's value."""
    (g, g_unit), (p, p_unit) = gold, pred
    if (g_unit and p_unit and g_unit != p_unit) or (p_unit.startswith("_") and not g_unit):
        return False
    percents = (g_unit == "%") - (p_unit == "%")  # 15% may be meant by 15 and by 0.15
    return g == p or (percents == 1 and g / 100 == p) or (percents == -1 and g == p / 100)


def _word(text: str) -> str | None:
    r"""A tidied answer of up to three words ("Tuesday", "\text{(C)}", "no solution"), lower case unless one letter."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip(" .")
    m = re.fullmatch(r"\(?([A-Za-z]+(?: [A-Za-z']+){0,2})\)?", text) or re.match(r"\(?([A-J])(?:\)|[.:] )", text)
    return m and (m[1].lower() if len(m[1]) > 1 else m[1])


def _compare(gold: str, pred: str) -> str:
    """Status of two tidied answers."""
    # Words first: as mathematics, "east" and "seat" are the same product of four letters.
    word = _word(gold)
    if word and ("\\text" in gold or re.search(r"\w{4}", word) or re.fullmatch("[A-J]", word)):
        return "correct" if _word(pred) == word else "wrong"
    value, other = _number(gold), _number(pred)
    if value and not other and "=" in pred:
        # `x = 48/2 = 24` says 24; but `x = 5, y = 6` and `x >= 6` do not say 6, and `4 = 5` is a lie.
        first, *middle, last = pred.split("=")
        if not re.search(r"[,;<>!]", first) and not re.search(r"(?<!\\)\b[A-Za-z]", " ".join(middle)):
            other = _number(last.strip())
            if len({n[0] for side in (first, *middle, last) if (n := _number(side.strip()))}) > 1:
                return "wrong"
    if value and other:
        return "correct" if _equal_numbers(value, other) else "wrong"
    if value and ("," in pred or _OPEN.search(pred)):
        return "wrong"  # as a set, `5, 5` would be 5
    # A unit at the end would be read as a product of letters.
    unit = rf"(?<=[\w}})])\s*\\text\{{(?!.*{_AFTER})\s*[A-Za-z][A-Za-z .]*\}}(?:\^\{{?[23]\}}?)?$"
    gold, pred = re.sub(unit, "", gold), re.sub(unit, "", pred)
    if _refuse(gold) or _refuse(pred):
        return "parse_failed"
    same = len({re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", side) for side in (gold, pred)}) == 1
    return _judge(gold, gold if same else pred)  # even if same: a gold that cannot be read is not rewarded


def _refuse(text: str) -> bool:
    """Whether to keep text from the parser: no content, prose, or few signs that stand for something huge."""
    prose = len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", text)) > 4
    beside = re.search(r"(?<![_^\d])\d+\s+\d", text)  # `2 3` would be read as a product
    flat = re.sub(r"[\s{}()\[\]]", "", text)
    huge = re.search(r"\d\^-?\d+\^|\^-?\d{5,}|\d{200}|\d{4}!|!!|\^-?\d+!", flat)  # towers, exponents, factorials
    deep = len(re.findall(r"[({\[]", text)) > 60
    return bool(not re.search(r"\w", text) or deep or prose or beside or huge)


# ---- 3. The worker

_worker: subprocess.Popen | None = None
_usable = True  # False once math-verify turned out to be missing
_lock = threading.Lock()


@functools.lru_cache(maxsize=8192)  # the completions of a group often state the same answer
def _judge(gold: str, pred: str) -> str:
    """Status by math-verify. Raises TimeoutError, which is not remembered, if the worker had to be killed."""
    global _worker, _usable
    with _lock:
        if _usable and (_worker is None or _worker.poll() is not None):
            command = [sys.executable, os.path.abspath(__file__), "--worker"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "bufsize": 0}
            # Sets are walked in one order: the same verdict in every run.
            _worker = subprocess.Popen(command, env={**os.environ, "PYTHONHASHSEED": "0"}, **pipes)
            _usable = _reply(START_SECONDS) == "ready"
            if not _usable:
                log.warning("math-verify could not be loaded: only numbers, words and equal text will be rewarded")
        if not _usable:
            return "correct" if gold == pred else "parse_failed"
        status = _reply(JOB_SECONDS, json.dumps([gold, pred]) + "\n")  # ASCII, whatever the text holds
        if not status:
            raise TimeoutError
        return status


def _reply(seconds: float, job: str = "") -> str:
    """The worker's next line, or "" if it died or took longer and was killed."""
    line = b""
    timer = threading.Timer(seconds, _worker.kill)  # ends the read below on any system, and from any thread
    timer.start()
    try:
        _worker.stdin.write(job.encode())
        line = _worker.stdout.readline()
    except BrokenPipeError:
        pass
    finally:
        timer.cancel()
        if not line:  # also when interrupted: the reply to this job must not meet the next one
            _stop()
    return line.decode().strip()


@atexit.register
def _stop():
    global _worker
    if _worker:
        _worker.kill()
        _worker.communicate()  # reaps it and closes the pipes
    _worker = None


def _forget():
    """In a forked child: the worker is the parent's, and the lock may be held by a thread that does not exist here."""
    global _worker, _lock
    _worker, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _serve():
    """The worker: a JSON line [gold, pred] in, a status out, until stdin ends, which it does when the parent dies."""
    import signal

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not pass for an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops this process
    alarm = getattr(signal, "alarm", lambda seconds: None)  # unhandled it ends the process: for a parent that is gone
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # Windows has no such limit and macOS may refuse it; the time limit stands
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.parser import NormalizationConfig

    # The extracted text as a whole: no search for something readable inside it, no guess at units (`2t` is not 2), and
    # no rounding (float_rounding is in decimals) that would make 3.14 of pi.
    cleaning = NormalizationConfig(units=False, malformed_operators=True, nits=True)
    config = LatexExtractionConfig(False, boxed_match_priority=0, normalization_config=cleaning)
    how = {"fallback_mode": "no_fallback", "extraction_mode": "first_match", "parsing_timeout": None}

    def status(gold: str, pred: str) -> str:
        gold, pred = (parse(f"\\boxed{{{side}}}", [config], **how) for side in (gold, pred))
        if not gold or not pred:
            return "parse_failed"
        equal = verify(gold, pred, float_rounding=12, allow_set_relation_comp=True, timeout_seconds=None)
        return "correct" if equal else "wrong"

    status("x^2", "x^2")  # loads the grammar before the clock of a job runs
    print("ready", file=answers)
    for line in sys.stdin:
        alarm(int(JOB_SECONDS) + 2)
        print(status(*json.loads(line)), file=answers)  # a MemoryError ends the process, which the parent sees
        alarm(0)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    _serve()
