r"""Math reward: does a completion state an answer that equals the reference answer?

    >>> grade(r"14-1=13;13+8=21#### 21", "21"), grade(r"so it is \boxed{\frac{2}{4}}", r"\frac12")
    ((1.0, 'correct'), (1.0, 'correct'))

This file stands alone, so you can copy it. It needs only mpmath, which torch installs. It is in the order in which data
flows:

1. Extraction finds the stated answer: the last \boxed{}, `#### x`, <answer> or "answer is x", or the last number.
2. Reading splits it into tokens, and tokens into items. Every command, unit and word that an answer can have is in a
   list: an answer with anything else earns nothing, because the rest could change its value.
3. Computation: rational numbers are exact, others have 400 digits. Variables get random values.
4. Comparison decides.

A policy is trained on this reward, so a doubtful answer counts as wrong. Two different answers, half an answer and a
calculation that is left to the grader earn nothing. The size of an answer limits the work, and there is no clock: a
verdict is the same on every machine and under every load.
"""

import functools
import logging
import math
import operator
import random
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from mpmath import MPContext

MAX_CHARS = 600  # a longer answer is not read
MAX_DEPTH = 8  # of brackets
MAX_ITEMS = 12  # of a list
MAX_WORK = 2_000_000  # bits of all intermediate results of one expression
MAX_DISTINCT = 3  # a text with more different boxes (or markers, or phrases) is guessing

log = logging.getLogger(__name__)


def math_reward(completion: str, answer: str) -> float:
    """Return 1.0 if `completion` states an answer equal to `answer`, else 0.0. Raises nothing. See `grade`."""
    return grade(completion, answer)[0]


def grade(completion: str, answer: str) -> tuple[float, str]:
    """Return (reward, status). The reward is 1.0 if the status is "correct", else 0.0.

    `completion` is the generated text, `answer` is the answer field of a data set (see `gold_answer`). If the prompt
    ends with `<think>`, put `<think>` before the completion: what is said before `</think>` is no answer. Status:

    - "correct" or "wrong": the stated answer equals the gold answer, or it does not.
    - "parse_failed": no answer was found, or the answer or the gold cannot be read.

    Raises nothing, whatever the arguments are.
    """
    try:
        gold = gold_answer(answer)
        stated = extract_answer(completion, number=_number(gold) is not None)
        if stated is None:
            return 0.0, "parse_failed"
        return (1.0, "correct") if _equal(gold, stated) else (0.0, "wrong")
    except Exception:  # mostly Unreadable. One bad sample must not end a training run
        log.debug("could not grade", exc_info=True)
        return 0.0, "parse_failed"


def gold_answer(answer: str) -> str:
    r"""Return the gold answer in the answer field of a data set, stripped.

    It is the text after the last `####` (GSM8K), else the last complete \boxed{} (MATH), else the whole field.
    """
    if "####" in answer:
        return answer.rpartition("####")[2].strip()
    boxes, _ = _boxes(answer)
    return _from_boxes(answer, boxes)[-1] if boxes else answer.strip()


def verifiable(answer: str) -> bool:
    """Return whether the gold answer equals itself. If it does not, no completion can earn the reward.

    Drop such rows when data loads, and tell the user. Numbers, listed mathematics and up to three plain words
    ("Tuesday", "C", "no solution") are verifiable. Sums, integrals and sentences are not. Raises nothing.
    """
    return isinstance(answer, str) and math_reward(f"\\boxed{{{gold_answer(answer)}}}", answer) == 1.0


# ---- 1. Extraction. Every pattern takes linear time, because a policy writes long and strange text.

DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+)"  # "1,234", "12.5", ".5"
# Words that may come before a number and leave it as it is: "Total: 5", "She has 5". Not "double", "not", "about".
LEADS = (
    "the|final|answer|result|total|sum|value|number|amount|count|price|profit|age|is|are|was|equals|equal|be|becomes|there"
    "|he|she|it|they|we|you|have|has|had|get|gets|got|sold|sells|needs?|spends?|spent|pays?|paid|earns?|earned|makes?|made"
    "|takes?|took|costs?|saves?|saved|eats?|ate|so|thus|therefore|hence|then|now|finally|only|gives?|leaves|left"
)
_END = re.compile(r"<\|(?:endoftext|im_end|eot_id|end_of_text|end)\|>|<｜end▁of▁sentence｜>|</s>|<eos>|<end_of_turn>")
_THINKING = re.compile(r"(?i)[<\[](?P<end>/?)(?:think|thinking|thought|reasoning)[>\]]")
# "Question 2:", "Q:"
_NEXT_QUESTION = re.compile(r"^[ \t*#]*Q(?:uestion)?[ \t*]*\d{0,3}[ \t*]*:", re.MULTILINE | re.IGNORECASE)
# Opening and closing braces. The part `\\.` skips "\{" and "\}".
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s{0,3}\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
# Between two boxes that form one answer: ", ", "$ or $x_2 = "
_JOIN = re.compile(r"(?:[\s$*.,;|/]|\\[()\[\],; ]|\\q?quad\b|\\text\{,? ?(?:and|or) ?\}|and|or|[A-Za-z]_?\d?\s*=)*")
# "#### 42", but "#### Step 1" is a heading. Or "<answer>42</answer>".
_MARKER = re.compile(
    r"####(?!#|\s*(?:Step|Part|Case)\b)[ \t:]*\n?(?P<line>[^\n#]*)|<answer>(?P<tag>.{0,600}?)</answer>", re.DOTALL
)
# "answer is", "Answer: ", "answer to the second question is therefore $"
_PHRASE = re.compile(
    r"\banswer(?: (?:to|for) [^.:\n]{1,80}?)?[ *]{0,4}(?:\bis\b|\bare\b|:|=)"
    r"(?:[\s*:$]|\\\[|equal to|therefore){0,8}",
    re.IGNORECASE,
)
_REPLY = re.compile(r"^[ \t*]*A[ \t*]*:", re.MULTILINE)  # "A: 5", after "Q:"
# The point of "5. Then", but not of "5.25". The ", because " of "5, because it".
_SENTENCE_END = re.compile(r"\n|[.?](?=[\s*\"')]|$)|[,;]?\s(?:because|since|which|where)\s")
# "16 - 3 = $13" and "x = 3/4", with the words after it; but not "= 5x", "= 5th" or "= 5 * 3"
_RESULT = re.compile(
    r"(?P<calculation>(?:^|(?<=[a-z,=:] ))[\d(][-+*/×÷()=.,\d −–]*=)?(?(calculation)|=)[ *]*"
    rf"(?P<number>[-−–]?(?:\d*\\[dt]?frac\{{\d+\}}\{{\d+\}}|\d+ \d+/\d+|{DIGITS}(?:[eE]\d+| ?/ ?\d+)?)(?: ?\\?%)?)"
    r"(?!\w|\.\d| ?[-+*/×÷^_!(])(?P<after>[^=]*)\Z"
)
# "She has 5 eggs": a listed word, a comma or a colon, and all that follows
_STATED = re.compile(
    rf"(?:.*(?:[,:]|\b(?:{LEADS}))|^)[ *]*(?P<stated>[^\s,:A-Za-z*](?:[^:=,]|,(?=\d{{3}}))*)\Z", re.IGNORECASE
)
# Words that make the number at the end of a text another number.
_CHANGES = re.compile(
    r"n['’]t\b|\b(?:no|not|never|nor|neither|wrong|incorrect|false|without|except|cannot|instead|plus|minus|less|fewer"
    r"|over|or|times(?= \w)|divided|multiplied|mod\w*|squared|cubed|half|halves|dozens?|hundreds?|thousands?"
    r"|\w*illions?|than)\b",
    re.IGNORECASE,
)


def extract_answer(text: str, number: bool = False) -> str | None:
    r"""Return the answer that a completion states, as written, or None if it states no answer or too many.

    The answer is the last complete \boxed{}, else the last `#### x` or <answer>x</answer>, else the last "answer is x"
    or "answer: x" up to the end of its sentence. If `number` is true (the gold is a plain number), it can also be the
    number in the last sentence. Raises TypeError if `text` is not a string.
    """
    text = _generated(text)
    boxes, has_open_box = _boxes(text)
    statements = _from_boxes(text, boxes)
    if not boxes:
        contents = [m["line"] if m["tag"] is None else m["tag"] for m in _MARKER.finditer(text)]
        markers = [_PHRASE.sub("", content).strip() for content in contents]  # "7" for "#### Answer: 7"
        sentences = [text[m.end() : m.end() + MAX_CHARS + 1] for m in _PHRASE.finditer(text)]
        phrases = [_SENTENCE_END.split(sentence, maxsplit=1)[0].strip() for sentence in sentences]
        # If the text stops in the middle of its answer, the numbers before that place are only intermediate results.
        if (has_open_box and not markers) or (markers or phrases)[-1:] == [""]:
            return None
        content = r"[0-9]" if number else r"\S"
        for found in (phrases, markers):
            statements = [statement for statement in found if re.search(content, statement)] or statements
    if not statements:
        return _from_last_number(text) if number and "\\boxed" not in text else None
    n_distinct = len({re.sub(r"\s", "", statement) for statement in statements})
    return statements[-1] if n_distinct <= MAX_DISTINCT else None


def _generated(text: str) -> str:
    """Remove the thinking, everything after the end token, and further questions that the model made up."""
    text = _END.split(text, maxsplit=1)[0]
    tags = list(_THINKING.finditer(text))
    if tags:
        text = text[tags[-1].end() :] if tags[-1]["end"] else ""  # cut off while it was thinking
    ends = [end for _, _, end in _boxes(text)[0][:1]]
    ends += [m.end() for m in (_MARKER.search(text), _PHRASE.search(text), _REPLY.search(text)) if m]
    # Only a question after an answer is a new one, because a reply can begin with its own question.
    question = _NEXT_QUESTION.search(text, min(ends)) if ends else None
    return text[: question.start()] if question else text


def _boxes(text: str) -> tuple[list[tuple[str, int, int]], bool]:
    r"""Return the complete, innermost, non-empty boxes, and whether a box is left open at the end of the text.

    For `\boxed{x^{2}} and \boxed{3` this is [("x^{2}", 0, 13)], True: the content, and where the box begins and ends.
    Braces can be nested to any depth, so this is a scan and not a regular expression.
    """
    if "box" not in text:
        return [], False
    boxes: list[tuple[str, int, int]] = []
    open_braces: list[re.Match[str]] = []
    for brace in _BRACE.finditer(text):
        if brace.lastgroup in ("box", "open"):
            open_braces.append(brace)
        elif brace.lastgroup == "close" and open_braces:
            opening = open_braces.pop()
            content = text[opening.end() : brace.start()].strip()
            contains_a_box = boxes and boxes[-1][1] > opening.start()
            if opening.lastgroup == "box" and content and not contains_a_box:
                boxes.append((content, opening.start(), brace.end()))
    return boxes, any(brace.lastgroup == "box" for brace in open_braces)


def _from_boxes(text: str, boxes: list[tuple[str, int, int]]) -> list[str]:
    r"""Return the text in each box, or in joined boxes together: ["3", "1, 2"] for `\boxed{3}? \boxed{1} or \boxed{2}`.

    Joined boxes can be the parts of one answer. If they are different answers, the text has not chosen one of them.
    """
    statements: list[dict[object, str]] = []
    last_end = 0
    for content, start, end in boxes:
        between = text[last_end:start]
        if not statements or len(between) > 60 or not _JOIN.fullmatch(between):
            statements.append({})
        value: object = _number(content) or re.sub(r"\s", "", content)
        statements[-1].pop(value, None)  # an answer written in two ways is one: `\boxed{1/2} or \boxed{0.5}` is "0.5"
        statements[-1][value] = content
        last_end = end
    return [", ".join(statement.values()) for statement in statements]


def _from_last_number(text: str) -> str | None:
    """Return what ends the last sentence: "16 - 3 = 13" for "16 - 3 = 13 eggs are left", "5 eggs" for "It is 5 eggs".

    The calculation is a part of it, because it must be right.
    """
    sentences = [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip(" *$\t")]
    sentence = sentences[-1][-MAX_CHARS:].replace(" x ", " * ").replace("$", "").rstrip(" ,") if sentences else ""
    is_list = len(re.findall(r"\d+", text)) > 1 and not re.search(r"[A-Za-z=]", re.sub(r"\b(?:and|or)\b", "", text))
    if is_list and not re.fullmatch(rf"[-$]*{DIGITS}[%]?", text.strip(" .*")):
        return None
    result = _RESULT.search(sentence)
    if result:
        is_changed = _CHANGES.search(" ".join(result["after"].split()[:2]))
        return None if is_changed else (result["calculation"] or "") + result["number"]
    stated = _STATED.search(sentence)
    return stated["stated"].strip(" *)") if stated and not _CHANGES.search(sentence) else None


# ---- 2. Reading

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∈": r"\in "}
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "°": " degree ", "θ": r"\theta ", "∅": r"\emptyset "}
    | {"½": r"\frac12 ", "⅓": r"\frac13 ", "⅔": r"\frac23 ", "¼": r"\frac14 ", "¾": r"\frac34 ", "²": "^2", "³": "^3"}
    | {"\u00a0": " ", "€": r"\euro", "√": r"\sqrt ", ";": ","}
)
_COMMANDS = (
    {"cdot": "*", "times": "*", "div": "/", "lt": "<", "gt": ">", "leq": r"\le", "leqslant": r"\le", "geq": r"\ge"}
    | {"geqslant": r"\ge", "neq": r"\ne", "lvert": "|", "rvert": "|", "vert": "|", "lbrace": r"\{", "rbrace": r"\}"}
    | {"dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "dbinom": r"\binom", "varnothing": r"\emptyset"}
    | {"varphi": r"\phi", "arcsin": r"\asin", "arccos": r"\acos", "arctan": r"\atan", "degree": " degree "}
    | dict.fromkeys(("left", "right", "big", "Big", "bigl", "bigr", "Bigl", "Bigr", "displaystyle"), "")
    | dict.fromkeys(("quad", "qquad"), " ")
)
_REPLACEMENTS = [
    (r"(?<!\\)\$|(?<!\\)\\[()\[\]]|\\(?=%)", ""),  # "$5$", "\(5\)"; but `\\[2pt]` does not open a formula
    (r"\{,\}|,\s*\\!\s*", ","),  # "1{,}000", "1,\!000"
    (r"(?<!\\)(\\\\)*\\[,;:! ]|~|\s+", r"\1 "),  # "5\,000", "5~cm"
    (r"(?<![\d.,^_])(\d{1,3}) (\d{3})(?: (\d{3}))?(?! ?\d)", r"\1\2\3"),  # "1 234 567"
    (r" ?\^ ?\{? ?\\circ ?\}?", " degree "),  # "90^\circ"
    (r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|mathit|rm|bf) ?\{([^{}]*)\}", r" \1 "),  # "\text{ cm}"
    (r"\\(?:mathbb|operatorname) ?\{?([A-Za-z]+)\}?", r"\\\1"),  # "\mathbb{R}"
    (r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|log|ln)(?![A-Za-z])", r"\\\1"),  # "2*pi"
    (r"\\sqrt ?(?:\(([^()]*)\)|(\w))(?!\d)", r"\\sqrt{\1\2}"),  # "\sqrt(x+1)", "\sqrt2"
    (r"\\frac ?(\d) ?(\d)(?!\d)", r"\\frac{\1}{\2}"),  # "\frac12"
    (r"(\d) *thousand\b", r"\1e3"),
    (r"(\d) *million\b", r"\1e6"),
    (r"(\d) *billion\b", r"\1e9"),
    (r"^ *(- ?)?\\\$(.*)", r"\1\2 dollar"),  # "\$5"
    (r"^ *(- ?)?\\euro(.*)", r"\1\2 euro"),
    (r"\b(?:square|sq\.?) ([a-z]+)", r"\1^2"),  # "5 square cm"
    (r"\bcubic ([a-z]+)", r"\1^3"),
    (r"\b([APap])\. ?([Mm])\b", r"\1\2"),  # "5:30 p.m."
]
_REWRITES = [(re.compile(pattern, re.ASCII), replacement) for pattern, replacement in _REPLACEMENTS]
_GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi|chi|psi"
    "|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega|ell"
)
_VARIABLE = re.compile(rf"(?:[A-Za-z]|\\(?:{_GREEK})(?![a-z]))'*(?:_\w|_\{{\w+\}})?")  # "x", "\theta", "f'", "x_{12}"
# "2\frac{1}{2}" and "2 1/2", but not in "x^2\frac{1}{2}"
_MIXED = r"(?<![\^_.,\da-z])(?<![\^a-z] )(\d+) ?(?:\\frac ?\{(\d+)\} ?\{(\d+)\}|(?<= )(\d+) ?/ ?(\d+))"
_REPEATING = r"(\d*)\.(\d*)\\overline ?\{(\d+)\}"  # "0.1\overline{6}"
# "52_8", "1,234.5e6", "km", "x_1", "\begin{pmatrix}", "\\", "\log_2", "\pi", "\{", "+"
_TOKEN = re.compile(
    rf"{_MIXED}|{_REPEATING}|\d+_(?:\d|\{{\d\d?\}})|{DIGITS}(?:[eE]-?\d{{1,3}}(?!\w))?|[A-Za-z]{{2,}}"
    rf"|{_VARIABLE.pattern}|\\(?:begin|end)\{{[pb]matrix\}}|\\\\(?:\[\d+pt\])?|\\log_(?:\d|\{{\d+\}})"
    r"|\\(?:frac|sqrt|binom|pi|infty|[RZNQC]|in|[lgn]e|cup|pm|emptyset|angle|overline|a?(?:sin|cos|tan)|cot|sec|csc"
    r"|sinh|cosh|tanh|ln|log|exp)(?![A-Za-z])|\\[{}%]|[-+*/^!=<>()\[\]{}|,:%&]",
    re.ASCII,
)
# A unit has one name for all its spellings. A plural with "s" is not listed. A counted thing names itself.
_UNITS = """
    mm millimeter millimetre, cm centimeter centimetre, m meter metre, km kilometer kilometre, inch in inche, foot
    ft feet, yard yd, mile mi, mg milligram, g gram, kg kilogram, lb pound, oz ounce, ton tonne, ml mL milliliter
    millilitre, l L liter litre, gallon, quart, pint, second s sec, minute min, hour h hr, day, week, month, year,
    cent, dollar, euro, degree, radian rad, mph, % percent, unit, time, point, piece, slice, cup, box boxe, bag,
    bottle, apple, orange, egg, cookie, person people, child children, boy, girl, student, friend, book, page,
    pencil, card, ticket, clip, coin, marble, flower, tree, dog, cat, car, toy, am AM, pm PM"""
UNITS = {spelling: names.split()[0] for names in _UNITS.split(",") for spelling in names.split()}
_FILLERS = re.compile(r"\b(?:in (?:total|all)|altogether|total|each|left|more(?= [a-z])|of (?:the |all )?(?=[a-z]))\b")
_WORD = r"(?:[A-Za-z]{2,}|[A-Za-z](?= /)|(?<=/ )[A-Za-z]|m(?= \^ |$)|[%/])"
# "15 cm ^ 2", "5 km / h"
_UNIT_AT_END = re.compile(rf"(.*?[^/ ]) ({_WORD}(?: {_WORD})*)(?: \^ (?:\{{ )?([23])(?: \}})?)?")
_LEAD = re.compile(rf"(?:(?:{LEADS})\b[: ]*)+", re.IGNORECASE)
# What is left of "= 5": "x", "AB", "\angle ABC", "f(3)", "(x,y)". But "e", "i" and "\pi" are numbers.
_NAME = re.compile(
    rf"(?:\\(?:angle|overline))?\{{?(?![ei](?![\w'])){_VARIABLE.pattern}[A-Z]{{0,2}}\}}?(?:\([\w,.\\/-]*\))?"
    r"|[A-Z]{2,3}|\([a-z](?:,[a-z])+\)"
)
_TURNED = {">": "<", r"\ge": r"\le"}
_RELATIONS = ("=", "<", r"\le", ">", r"\ge", r"\ne", r"\in")
_SPECIAL = (r"\infty", r"- \infty", r"\emptyset", r"\R", r"\Z", r"\N", r"\Q", r"\C")


class Unreadable(Exception):
    """The text is no answer of the kinds that this file reads, or it is too large to compute."""


@functools.lru_cache(maxsize=8192)
def _tidy(text: str) -> str:
    r"""Return one spelling for many: "\frac{1}{2} cm" for "$\dfrac12$ \text{cm}.". Raises Unreadable if too long."""
    if len(text) > MAX_CHARS or text.rstrip().endswith(".."):  # "0.3..." has more digits
        raise Unreadable(text)
    if text.isascii() and text.isdigit():  # most answers: there is nothing to rewrite
        return text
    text = text.strip(" \n\t*`").translate(_UNICODE)
    text = re.sub(r"\\right\.|\\([A-Za-z]+)", lambda m: _COMMANDS.get(m[1], m[0]), text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split()).rstrip(" .,:")


def _word(text: str) -> str | None:
    r"""Read an answer of up to three words: "no solution" for `\text{No solution}`, "C" for "(C)" and "(C) 12"."""
    tidied = _tidy(text)
    choice = re.fullmatch(r"\(?([A-J])(?:\)|[.:] |$)[\d. /\\${}]*", tidied)  # not "(A) or (B)"
    if choice:
        return choice[1]
    is_word = re.fullmatch(r"[A-Za-z]+(?: [A-Za-z']+){0,2}", tidied)
    return tidied.lower() if is_word and ("\\text" in text or re.search(r"[A-Za-z]{4}", tidied)) else None


@functools.lru_cache(maxsize=8192)
def _tokens(text: str) -> str:
    r"""Put a space between the tokens: "1/2 \pi ( x )" for "$0.5\pi(x)$". Raises Unreadable for a sign in no token."""
    text = _tidy(text)
    lead = _LEAD.match(text)  # "Total: 5", "She has 5"
    text = (lead and text[lead.end() :]) or text
    text = re.sub(r",? ?\b(?:and|or)\b", ",", text).replace(" per ", " / ")  # "3, 4, and 5"
    text = re.sub(r"[(\[{][^()\[\]{}]*[)\]}]", lambda m: m[0].replace(",", ", "), text)  # two numbers in "(100,200)"
    if _TOKEN.sub("", text).strip(" "):
        raise Unreadable(text)
    tokens = [_exact(m) if re.match(r"\.?\d", m[0]) and "_" not in m[0] else m[0] for m in _TOKEN.finditer(text)]
    text = re.sub(r"_\{(\w)\}", r"_\1", " ".join(tokens).replace(r"[2pt]", ""))
    return re.sub(r"(\^ (?:\w+|\{ \w+ \})) (?=\d)", r"\1 * ", text)  # "2^6 3^5"


def _exact(token: re.Match[str]) -> str:
    r"""Write a number as an integer or fraction: "5/2" for "2.5" and "2\frac{1}{2}", "1/6" for "0.1\overline{6}"."""
    whole, *parts, before, after, repeated = token.groups()
    if whole:
        top, bottom = (Fraction(part) for part in parts if part)
        if not 0 < top < bottom:
            raise Unreadable("no mixed number")
        return str(Fraction(whole) + top / bottom)
    if repeated:
        decimals = Fraction(int(repeated), 10 ** len(repeated) - 1)
        return str(int(before or 0) + (int(after or 0) + decimals) / 10 ** len(after))
    return str(Fraction(token[0].replace(",", "")))


def _split(tokens: str, *separators: str) -> tuple[list[str], list[str]]:
    """Split at the separators that are in no bracket: ["( 1 , 2 )", "3"] and [","] for "( 1 , 2 ) , 3"."""
    parts = [""]
    found: list[str] = []
    depth = 0
    for token in tokens.split():
        depth += token in ("(", "[", "{", r"\{") or token.startswith(r"\begin")
        depth -= token in (")", "]", "}", r"\}") or token.startswith(r"\end")
        if not 0 <= depth <= MAX_DEPTH:
            raise Unreadable("brackets")
        if depth == 0 and token in separators:
            found.append(token)
            parts.append("")
        else:
            parts[-1] = f"{parts[-1]} {token}".lstrip()
    return parts, found


class Item(NamedTuple):
    r"""One item of an answer, in tokens.

    shape              parts
    ""                 a value
    "()", "[)", "[]"   the entries of a point, or the ends of an interval
    "\cup", ":"        what these signs join
    "matrix [2, 2]"    the entries of a matrix with two entries in each row
    "=", "<", "\ne"    the left side minus the right side of a relation
    """

    shape: str
    parts: list[str]
    unit: str = ""  # "cm^2", "%", or the base: "_8"
    name: str = ""  # "x" for "x = 5" and "x \in [1, 2]"


@functools.lru_cache(maxsize=8192)
def _read(tokens: str) -> Item:
    """Read one item. Raises Unreadable."""
    sides, relations = _split(tokens, *_RELATIONS)
    if relations:
        return _read_relation(sides, relations)
    tokens, unit = _without_unit(tokens)
    for sign in (r"\cup", ":"):
        parts, found = _split(tokens, sign)
        if found:
            return Item(sign, parts, unit)
    matrix = re.fullmatch(r"\\begin\{[pb]matrix\} (.*) \\end\{[pb]matrix\}", tokens)
    if matrix:
        rows = [row.split(" & ") for row in matrix[1].removesuffix(r" \\").split(r" \\ ")]
        return Item(f"matrix {[len(row) for row in rows]}", [entry for row in rows for entry in row], unit)
    if "," in tokens.split():
        return Item(tokens[0] + tokens[-1], _split(tokens[2:-2], ",")[0], unit)
    return Item("", [tokens], unit)


def _without_unit(tokens: str) -> tuple[str, str]:
    r"""Return tokens without their unit, and the unit: "15" and "cm^2" for "15 cm ^ 2", "52" and "_8" for "52_8"."""
    base = re.fullmatch(r"(\d+)(_\d+|_\{\d+\})", tokens)
    if base:
        return base[1], base[2]
    m = _UNIT_AT_END.fullmatch(tokens)
    if not m:
        return tokens, ""
    words = [word.lower() if len(word) > 2 else word for word in _FILLERS.sub("", m[2]).split()]
    names = [word if word == "/" else UNITS.get(word) or UNITS.get(word.removesuffix("s"), "") for word in words]
    if "" in names or names[-1:] == ["/"] or "%" in names[1:] or (m[3] and not names):
        return tokens, ""
    return m[1], " ".join(names) + (f"^{m[3]}" if m[3] else "")


def _read_relation(sides: list[str], relations: list[str]) -> Item:
    r"""Read "x = 48 / 2 = 24" as 24 with the name x, and "1 < x \le 2" as the interval (1, 2] with the name x."""
    if relations[0] in _TURNED:  # "3 > x" is "x < 3"
        sides = sides[::-1]
        relations = [_TURNED.get(relation, "") for relation in reversed(relations)]
    names = ["".join(side.split()) for side in sides]
    names = [name if _NAME.fullmatch(name) else "" for name in names]
    first = relations[0]
    if first == "=":
        return _read_equation(sides, names, relations)
    if relations == [r"\in"] and names[0]:
        return _read(sides[1])._replace(name=names[0])
    opening = "[" if first == r"\le" else "("
    closing = "]" if relations[-1] == r"\le" else ")"
    if len(sides) == 3 and set(relations) <= {"<", r"\le"} and names[1]:
        return Item(opening + closing, sides[::2], name=names[1])
    if len(sides) != 2 or first not in ("<", r"\le", r"\ne"):
        raise Unreadable("relations")
    if first != r"\ne" and names[0] and not _variables(sides[1]):
        return Item("(" + closing, [r"- \infty", sides[1]], name=names[0])
    if first != r"\ne" and names[1] and not _variables(sides[0]):
        return Item(opening + ")", [sides[0], r"\infty"], name=names[1])
    return Item(first, [f"{sides[0]} - ( {sides[1]} )"])


def _read_equation(sides: list[str], names: list[str], relations: list[str]) -> Item:
    """Read a value with a name, or an equation. Its sides are equal in a value: "x = 48 / 2 = 24", "48 / 2 = 24"."""
    if len(sides) == 2 and names[1] and not names[0]:  # "5 = x"
        sides = sides[::-1]
        names = names[::-1]
    values = sides[1:] if names[0] else sides
    says_something = names[0] or values[-1] not in values[:-1]  # not "5 = 5"
    is_new = not _variables(re.sub(r"\\angle|\\overline|\(.*", "", names[0])) & _variables(values[-1])  # not "x = x^2"
    if set(relations) != {"="} or (len(sides) > 2 and not is_new):
        raise Unreadable("relations")
    if says_something and is_new and all(_same_item(values[-1], value, strict=False) for value in values[:-1]):
        return _read(values[-1])._replace(name=names[0])
    if len(sides) > 2 or not _variables(" ".join(sides)):
        raise Unreadable("different sides")
    return Item("=", [f"{sides[0]} - ( {sides[1]} )"])


def _letters_apart(tokens: str) -> list[str]:
    """Return the tokens, each letter of a product such as "ab" alone."""
    return re.sub(r"(?<![\\{A-Za-z])[A-Za-z]{2,3}(?![A-Za-z])", lambda m: " ".join(m[0]), tokens).split()


def _variables(tokens: str) -> set[str]:
    """Return the variables: {"a", "b", "f'"} for "ab + f'"."""
    return {token for token in _letters_apart(tokens) if _VARIABLE.fullmatch(token)} - {"e", "i"}


def _number(text: str) -> tuple[Fraction, str] | None:
    """Read a plain number and its unit: (12, "cm") for "12 cm". Return None for any other text."""
    try:
        item = _read(_tokens(text))
        found = _compute(item.parts[0])
    except Unreadable:
        return None
    is_plain = not item.shape and isinstance(found.result[0], Fraction) and not found.variables and not found.n_joined
    return (found.result[0], item.unit) if is_plain else None


# ---- 3. Computation

CONTEXT = MPContext()
CONTEXT.dps = 1000
# mpmath remembers the digits of these. Without that, two threads could compute them at the same time.
_REMEMBERED = [+constant for constant in (CONTEXT.pi, CONTEXT.e, CONTEXT.ln2, CONTEXT.ln10)]
CONTEXT.dps = 400
# The sizes of numbers that are not rational. As brackets are not nested deeper than MAX_DEPTH, two such numbers that
# differ by less than TOLERANCE are equal.
LARGEST = CONTEXT.mpf(10) ** 40
SMALLEST = 1 / LARGEST
TOLERANCE = CONTEXT.mpf(10) ** -370
# Two expressions with variables are compared at ten points. These are the sizes of the variables: positive at the first
# points, so that logarithms are real, and huge at the last ones, so that |x - 1000| and 1000 - x differ.
SIZES = [1, 5, 50, 1, 5, 50, 50, 50, 10**15, -(10**15)]
_CONSTANTS = {"e": +CONTEXT.e, "i": CONTEXT.mpc(0, 1), r"\pi": +CONTEXT.pi}
_NAMES = "sin cos tan cot sec csc asin acos atan sinh cosh tanh ln log exp"
_FUNCTIONS = {rf"\{name}": getattr(CONTEXT, name) for name in _NAMES.split()}
_FACTORS = {"(", r"\frac", r"\sqrt", r"\binom", *_CONSTANTS, *_FUNCTIONS}
_BRACKETS = {"(": ")", "{": "}", "|": "|"}
Vector = list[Any]


class Calculator:
    r"""Computes tokens by recursive descent.

    sum:      product + product - product
    product:  power * power / power, where "*" can be left out: "2 \pi x"
    power:    atom, atom!, atom ^ atom
    atom:     number, variable, (sum), |sum|, \frac, \sqrt, \binom, function

    The result is a vector: one number, or with variables one for each of SIZES. A number is a Fraction as long as it is
    rational, then one of mpmath. It is None where it is not defined, or too large or small to compute.
    """

    def __init__(self, tokens: str, whole: bool = False) -> None:
        self.rest = iter(_letters_apart(tokens))
        self.next = next(self.rest, "")  # "" is the end
        self.whole = whole or "!" in tokens or "binom" in tokens  # variables are natural numbers
        self.variables: set[str] = set()
        self.work = 0
        self.n_joined = 0  # sums and products
        self.n_unfinished = 0  # those of two rational numbers, and factorials
        self.result = self.sum()
        self.take("")

    def take(self, *expected: str) -> str:
        token = self.next
        if expected and token not in expected:
            raise Unreadable(token)
        self.next = next(self.rest, "")
        return token

    def sum(self) -> Vector:
        value = self.signed(self.product)
        while self.next in ("+", "-"):
            value = self.join(value, "+", self.signed(self.product))
        return value

    def signed(self, part: Callable[[], Vector]) -> Vector:
        """Read a sign, or none, and a part."""
        sign = self.take() if self.next in ("+", "-") else "+"
        return self.apply(operator.neg, part()) if sign == "-" else part()

    def product(self) -> Vector:
        value = self.power()
        divided = False
        while self.next in ("*", "/") or (self.starts_factor() and not divided):  # "1/2x" has two meanings
            sign = self.take() if self.next in ("*", "/") else "*"
            self.n_unfinished += divided
            divided = divided or sign == "/"
            value = self.join(value, sign, self.signed(self.power))
        return value

    def starts_factor(self) -> bool:
        return bool(_VARIABLE.fullmatch(self.next)) or self.next in _FACTORS

    def power(self) -> Vector:
        value = self.atom()
        while self.next == "!":
            self.take()
            value = self.count(math.factorial, value)
        if self.next == "^":
            self.take()
            value = self.apply(_power, value, self.signed(self.atom))
            if self.next in ("^", "!"):
                raise Unreadable("power of a power")
        return value

    def atom(self) -> Vector:
        token = self.take()
        if token in _BRACKETS:
            value = self.sum()
            self.take(_BRACKETS[token])
            return self.apply(abs, value) if token == "|" else value
        if token[:1].isdigit():
            return [Fraction(token)]
        if token in _CONSTANTS:
            return [_CONSTANTS[token]]
        if _VARIABLE.fullmatch(token):
            self.variables.add(token)
            return _random_numbers(token, self.whole)
        if token == r"\frac":
            return self.join(self.atom(), "/", self.atom())
        if token == r"\binom":
            return self.count(math.comb, self.atom(), self.atom())
        if token == r"\sqrt":
            degree = [Fraction(2)]
            if self.next == "[":
                self.take()
                degree = self.sum()
                self.take("]")
            return self.apply(_power, self.atom(), self.join([Fraction(1)], "/", degree))
        return self.function(token)

    def function(self, token: str) -> Vector:
        r"""Compute "\sin x", "\sin^2 2x", "\sin^{-1}(x)", "\log_2 8"."""
        name, _, base = token.partition("_")
        if name not in _FUNCTIONS:
            raise Unreadable(token)
        exponent = [Fraction(1)]
        if self.next == "^":
            self.take()
            exponent = self.signed(self.atom)
        if exponent == [-1] and name in (r"\sin", r"\cos", r"\tan"):
            name = name.replace("\\", r"\a")
            exponent = [Fraction(1)]
        in_brackets = self.next in _BRACKETS
        value = self.atom() if in_brackets else self.power()
        while not in_brackets and self.starts_factor() and self.next not in ("(", *_FUNCTIONS):
            value = self.join(value, "*", self.power())
        bases = [[CONTEXT.mpf(base.strip("{}") or 10)]] if name == r"\log" else []
        value = self.apply(_FUNCTIONS[name], self.apply(_rounded, value), *bases)
        return self.apply(_power, value, exponent)

    def join(self, a: Vector, sign: str, b: Vector) -> Vector:
        """Return a + b, a * b or a / b."""
        if sign != "/":
            self.n_joined += 1
            self.n_unfinished += all(isinstance(number, Fraction) for number in a + b)
        return self.apply({"+": operator.add, "*": operator.mul, "/": operator.truediv}[sign], a, b)

    def count(self, function: Callable[..., int], *vectors: Vector) -> Vector:
        """Return a factorial or a binomial coefficient."""
        self.n_unfinished += 1
        for vector in vectors:
            if not all(isinstance(n, Fraction) and n.denominator == 1 and 0 <= n <= 2500 for n in vector):
                raise Unreadable("no natural number")
        return self.apply(lambda *numbers: Fraction(function(*map(int, numbers))), *vectors)

    def apply(self, function: Callable[..., Any], *vectors: Vector) -> Vector:
        """Return the values of a function at all points. Raises Unreadable if the work becomes too much."""
        length = max(map(len, vectors))
        rows = zip(*(vector * (length // len(vector)) for vector in vectors), strict=True)
        return [self.apply_once(function, *row) for row in rows]

    def apply_once(self, function: Callable[..., Any], *numbers: Any) -> Any:
        if None in numbers:
            return None
        try:
            if not all(isinstance(number, Fraction) for number in numbers):
                numbers = tuple(map(_rounded, numbers))
            value = function(*numbers)
            value = value if isinstance(value, Fraction) else _rounded(value)
        except (ValueError, ArithmeticError):
            value = None
        self.work += _bits(value)
        if self.work > MAX_WORK:
            raise Unreadable("too much work")
        return value


@functools.lru_cache(maxsize=8192)
def _random_numbers(name: str, whole: bool) -> Vector:
    rng = random.Random(name)
    if whole:
        return [Fraction(rng.randint(2, 30)) for _ in SIZES]
    numbers = [Fraction(rng.randint(1, 1000) * size, 1000) for size in SIZES]
    return numbers[:3] + [number * rng.choice([-1, 1]) for number in numbers[3:-2]] + numbers[-2:]


def _bits(number: Any) -> int:
    """Return the size of a number."""
    is_exact = isinstance(number, Fraction)
    return number.numerator.bit_length() + number.denominator.bit_length() if is_exact else 2000


def _power(a: Any, b: Any) -> Any:
    """Return a to the power of b, exactly if that is rational. Raises OverflowError instead of a huge number."""
    if a == 0 and not b.real > 0:
        raise ValueError("0 to the power of 0")
    if not isinstance(a, Fraction) or b.denominator > 1:
        return _rounded(a) ** _rounded(b)
    if abs(b) * _bits(a) > MAX_WORK / 20:
        raise OverflowError
    return a ** int(b)


def _rounded(number: Any) -> Any:
    """Return a number of mpmath. Zero stands for a number that is only not zero because it was rounded."""
    rounded = CONTEXT.convert(number)
    if rounded == 0 or SMALLEST < abs(rounded) < LARGEST:
        return rounded
    if isinstance(number, Fraction) or abs(rounded) > TOLERANCE:
        raise OverflowError
    return CONTEXT.zero


_compute = functools.lru_cache(maxsize=8192)(Calculator)


# ---- 4. Comparison


def _equal(gold: str, pred: str) -> bool:
    """Return whether two stated answers are equal."""
    if _word(gold) is not None:
        return _word(gold) == _word(pred)
    gold = _tokens(gold)
    pred = _tokens(pred)
    gold_items = _items(gold)
    pred_items = _items(pred)
    if len(gold_items) == len(pred_items) == 1:
        return (r"\{" in gold) == (r"\{" in pred) and _same_item(gold_items[0], pred_items[0])
    return _same_items(gold_items, pred_items)


def _items(tokens: str) -> list[str]:
    r"""Return the items of a list or set: ["1", "2 + 3", "2 - 3"] for "\{ 1 , 2 \pm 3 \}"."""
    tokens = re.sub(r"^[A-Za-z] = (?=\\\{)", "", tokens)
    if re.fullmatch(r"\\\{ (?:[^\\]|\\[a-z])* \\\}", tokens):
        tokens = tokens[3:-3]
    items: list[str] = []
    for part in _split(tokens, ",")[0]:
        items += [part.replace(r"\pm", sign).removeprefix("+ ") for sign in "+-"] if r"\pm" in part else [part]
    if len(items) > MAX_ITEMS:
        raise Unreadable("too many items")
    return items


def _same_items(gold: list[str], pred: list[str], strict: bool = True) -> bool:
    """Return whether the items are equal in any order. "x = 1, x = 2" can be "1, 2", but "x = 1, y = 2" cannot."""
    names = {_read(item).name.partition("_")[0] for item in pred}
    if len(names - {""}) > 1 and not any(_read(item).name for item in gold):
        return False
    rest = list(pred)
    for item in gold:
        equal = [other for other in rest if _same_item(item, other, strict)]
        if not equal:
            return False
        rest.remove(equal[0])
    return not rest


def _same_item(gold: str, pred: str, strict: bool = True) -> bool:
    """Compare two items. If `strict`, a number must be a value and not a calculation."""
    a = _read(gold)
    b = _read(pred)
    if a.name and b.name and a.name != b.name:
        return False
    if {a.shape, b.shape} == {"", "="}:
        a = _as_equation(a)
        b = _as_equation(b)
    if a.shape != b.shape or len(a.parts) != len(b.parts):
        return False
    if a.unit != b.unit and ((a.unit and b.unit) or b.unit.startswith("_")):
        return False  # if one side has no unit, the question gives it. But a base changes the value
    if a.shape in _RELATIONS:
        return _proportional(a.parts[0], b.parts[0], any_sign=a.shape in ("=", r"\ne"))
    if a.shape == r"\cup":
        return _same_items(a.parts, b.parts, strict)
    for percent, number in ((a, b), (b, a)):  # 15% can be written as 15 or as 0.15
        if percent.unit == "%" and not number.unit:
            return any(_same_value(percent.parts[0], f"{x} * ( {number.parts[0]} )", False) for x in (1, 100))
    return all(_same_value(*values, strict) for values in zip(a.parts, b.parts, strict=True))


def _as_equation(item: Item) -> Item:
    """Return "y = 2 x + 3" as an equation, but leave "y = 3" as it is."""
    is_line = not item.shape and _VARIABLE.fullmatch(item.name) and _variables(item.parts[0])
    return Item("=", [f"{item.name} - ( {item.parts[0]} )"]) if is_line else item


def _same_value(gold: str, pred: str, strict: bool) -> bool:
    """Compare two expressions, or sets with a name. If `strict`, a number must be a value and not a calculation."""
    if gold in _SPECIAL or pred in _SPECIAL:
        return gold == pred
    if strict and _is_calculation(gold, pred):
        return False
    pairs = _pairs(gold, pred)
    return bool(pairs) and all(_close(u, v) for u, v in pairs)


def _pairs(f: str, g: str) -> list[tuple[Any, Any]]:
    """Return the values of two expressions at the points where both can be computed."""
    whole = _compute(f).whole or _compute(g).whole
    a = _compute(f, whole)
    b = _compute(g, whole)
    pairs = [(u, v) for u, v in zip(a.result, b.result, strict=False) if u is not None and v is not None]
    return pairs if a.variables == b.variables and len(pairs) > len(a.result) / 2 else []


def _proportional(f: str, g: str, any_sign: bool) -> bool:
    """Return whether f is a constant times g, and neither is constant: then "f = 0" says the same as "g = 0"."""
    pairs = _pairs(f, g)
    if len(pairs) < 2:
        return False
    (u0, v0), *others = pairs
    is_constant = all(_close(u0, u) for u, _ in others)
    if is_constant or v0 == 0 or not (any_sign or u0 * v0 > 0):
        return False
    return all(_close(u * v0, u0 * v) for u, v in others)


def _close(a: Any, b: Any) -> bool:
    """Return whether two values are equal: exactly if both are rational."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a = CONTEXT.convert(a)
    return abs(a - CONTEXT.convert(b)) <= TOLERANCE * max(1, abs(a))


def _is_calculation(gold: str, pred: str) -> bool:
    r"""Return whether a number is stated as a calculation, which is left to the grader.

    An answer is a value: a number, a fraction, root, power or logarithm, or a sum or product of different kinds of
    these, such as 1 + 2\sqrt3, but not of two rational numbers. If the gold is rational, the answer is no sum and no
    product, except 1.5 * 10^4 and powers of primes, 2^6 3^5. If the gold is a calculation, the answer can be one.
    """
    a = _compute(gold)
    b = _compute(pred)
    if b.variables or a.n_unfinished:
        return False
    text = pred.replace("{ ", "").replace(" }", "")
    if re.fullmatch(r"(?:- )?[\d/]+ \* 10 \^ (?:- )?\d+", text):
        return False
    if re.fullmatch(r"(?=.*\^)\d+(?: \^ \d+)?(?: (?:\* )?\d+(?: \^ \d+)?)*", text):
        bases = re.findall(r"(?<!\^ )\b\d+", text)
        are_primes = set(bases) <= {"2", "3", "5", "7", "11", "13"}
        return len(bases) > 1 and not (are_primes and len(set(bases)) == len(bases))
    return b.n_unfinished > 0 or (isinstance(a.result[0], Fraction) and b.n_joined > 0)
