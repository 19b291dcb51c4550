r"""Math reward: does a completion state an answer that equals the reference answer?

    >>> grade(r"14-1=13;13+8=21#### 21", "21"), grade(r"so it is \boxed{\frac{2}{4}}", r"\frac12")
    ((1.0, 'correct'), (1.0, 'correct'))

This file stands alone, so you can copy it. Copy the whole file, because its worker runs it. Numbers and words need only
the standard library, all other mathematics needs math-verify. The file is in the order in which data flows:

1. Extraction finds the stated answer: the last \boxed{}, `#### x`, <answer> or "answer is x", or the last number.
2. Reading splits it into tokens. Every command, unit and word that an answer can have is in a list: an answer with
   anything else earns nothing, because the rest could change its value. Plain numbers are exact fractions.
3. Comparison decides about words, numbers and lists. The rest must have the same variables, and goes to math-verify.
4. math-verify runs in one worker process. The size of its input is bounded, so the limits on its CPU time and memory
   are only a last resort.

A policy is trained on this reward, so a doubtful answer counts as wrong. Two different answers, half an answer and a
calculation that is left to the grader earn nothing.
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

MAX_CHARS = 600  # a longer answer is not read
MAX_DEPTH = 8  # of brackets
MAX_ITEMS = 12  # of a list
MAX_COMMANDS = 12  # powers, roots and functions in one expression
MAX_DISTINCT = 3  # a text with more different boxes (or markers, or phrases) is guessing
CPU_SECONDS = 10.0  # of one job in the worker, without the time in the queue or of other programs
WALL_SECONDS = 120.0  # the same in real time, for the start and for systems that cannot limit CPU time
MEMORY_BYTES = 1 << 30  # address space of the worker

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
    - "timeout": the worker broke its limit on time or memory.

    Raises nothing, whatever the arguments are. Plain numbers take microseconds and other mathematics milliseconds.
    """
    try:
        gold = gold_answer(answer)
        stated = extract_answer(completion, number=_number(gold) is not None)
        status = "parse_failed" if stated is None else "correct" if _equal(gold, stated) else "wrong"
    except TimeoutError:
        status = "timeout"
    except Exception:  # mostly Unreadable. One bad sample must not end a training run
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
_REPLY = re.compile(r"^[ \t*]*A[ \t*]*:", re.MULTILINE)  # "A: 5", after "Q:"
# Opening and closing braces. The part `\\.` skips "\{" and "\}".
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s{0,3}\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_GAP = r"(?:[\s$*.,;|/]|\\[()\[\],; ]|\\q?quad\b)*"  # spaces, the signs round a formula, a comma
_AND = r"(?:and|or|\\text\{,? ?(?:and|or) ?\})?"
_ITS_NAME = r"(?:[A-Za-z](?:_?\{?\w\}?)?\s*=)?"  # "y = ", "x_2 ="
_JOIN = re.compile(_GAP + _AND + _GAP + _ITS_NAME + _GAP)  # between two boxes that form one answer
# "#### 42", but "#### Step 1" is a heading. Or "<answer>42</answer>".
_MARKER = re.compile(
    r"(?<!#)####(?!#|\s*(?:Step|Part|Case)\b)[ \t:]*\n?(?P<line>[^\n#]*)|<answer>(?P<tag>.{0,600}?)</answer>", re.DOTALL
)
# "answer is", "Answer: ", "answer to the second question is therefore $"
_PHRASE = re.compile(
    r"\banswer(?: (?:to|for) [^.:\n]{1,80}?)?[ *]{0,4}(?:\bis\b|\bare\b|:|=)"
    r"(?:[\s*:$]|\\\[|equal to|therefore){0,8}",
    re.IGNORECASE,
)
# The point of "5. Then", but not of "5.25". The ", because " of "5, because it".
_SENTENCE_END = re.compile(r"\n|[.?](?=[\s*\"')]|$)|[,;]?\s(?:because|since|which|where)\s")
_ANY_NUMBER = re.compile(  # "-5", but the minus of "48-24" is no sign; "2\frac{1}{2}", "2½", "2 1/2", "3/4"; not "5th"
    r"(?:(?<![\w)\]}.,^])[-−–])?\$?(?<![\w.^,])(?:\d*\ ?(?:\\[dt]?frac\{\d+\}\{\d+\}|[½⅓⅔¼¾])|\d+ \d+/\d+"
    rf"|{DIGITS}(?: ?/ ?\d+)?)(?:[eE]-?\d{{1,3}}\b)?(?: ?\\?%)?(?!(?:st|nd|rd|th)\b|[\w^_!])",
    re.ASCII,
)
_LEAD_AT_END = re.compile(rf"(?:^|[,:]|\b(?:{LEADS}))\Z", re.IGNORECASE)
_CALCULATION_AT_END = re.compile(r"(?:^|(?<=[a-z,=] ))[\d(][-+*/×÷()=.,\d −–]*=[ *]*\Z")  # "16 - 3 = "
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
    if boxes:
        statements = _from_boxes(text, boxes)
        return None if _undecided(statements) else statements[-1]

    contents = [m["line"] if m["tag"] is None else m["tag"] for m in _MARKER.finditer(text)]
    markers = [_PHRASE.sub("", content).strip() for content in contents]  # "7" for "#### Answer: 7"
    sentences = [text[m.end() : m.end() + MAX_CHARS + 1] for m in _PHRASE.finditer(text)]
    phrases = [_SENTENCE_END.split(sentence, maxsplit=1)[0] for sentence in sentences]
    # If the text stops in the middle of its answer, the numbers before that place are only intermediate results.
    if (has_open_box and not markers) or (markers or phrases)[-1:] == [""]:
        return None
    for statements in (markers, phrases):
        readable = [statement for statement in statements if re.search(r"[0-9]" if number else r"\S", statement)]
        if readable:
            return None if _undecided(readable) else readable[-1].strip()
    return _from_last_number(text) if number and "\\boxed" not in text else None


def _generated(text: str) -> str:
    """Remove the thinking, everything after the end token, and further questions that the model made up."""
    text = _END.split(text, maxsplit=1)[0]
    tags = list(_THINKING.finditer(text))
    if tags:
        text = text[tags[-1].end() :] if tags[-1]["end"] else ""  # cut off while it was thinking
    ends = [box.end for box in _boxes(text)[0][:1]]
    ends += [m.end() for m in (_MARKER.search(text), _PHRASE.search(text), _REPLY.search(text)) if m]
    # Only a question after an answer is a new one, because a reply can begin with its own question.
    question = _NEXT_QUESTION.search(text, min(ends)) if ends else None
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
            content = text[opening.end() : brace.start()].strip()
            contains_a_box = boxes and boxes[-1].start > opening.start()
            if opening.lastgroup == "box" and content and not contains_a_box:
                boxes.append(Box(content, opening.start(), brace.end()))
    return boxes, any(brace.lastgroup == "box" for brace in open_braces)


def _from_boxes(text: str, boxes: list[Box]) -> list[str]:
    r"""Return the text in each box, or in joined boxes together: ["3", "1, 2"] for `\boxed{3}? \boxed{1} or \boxed{2}`.

    Joined boxes can be the parts of one answer. If they are different answers, the text has not chosen one of them.
    """
    statements: list[dict[object, str]] = []
    end = 0
    for box in boxes:
        between = text[end : box.start]
        if not statements or len(between) > 60 or not _JOIN.fullmatch(between):
            statements.append({})
        value: object = _number(box.content) or re.sub(r"\s", "", box.content)
        statements[-1].pop(value, None)  # an answer written in two ways is one: `\boxed{1/2} or \boxed{0.5}` is "0.5"
        statements[-1][value] = box.content
        end = box.end
    return [", ".join(statement.values()) for statement in statements]


def _from_last_number(text: str) -> str | None:
    """Return the number that ends the last sentence: "13" for "16 - 3 = 13 eggs". Return None for "12 or 13".

    It comes after "=", or after ",", ":" or a listed word with only a unit behind it. A calculation must be right.
    """
    sentences = [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip(" *$\t")]
    sentence = sentences[-1][-MAX_CHARS:].replace(" x ", " * ").replace("$", "") if sentences else ""
    numbers = list(_ANY_NUMBER.finditer(sentence))
    is_list = len(re.findall(r"\d+", text)) > 1 and not re.search(r"[A-Za-z=]", re.sub(r"\b(?:and|or)\b", "", text))
    if not numbers or (is_list and not _ANY_NUMBER.fullmatch(text.strip(" .$*"))):
        return None
    before = sentence[: numbers[-1].start()].rstrip(" *({")
    after = sentence[numbers[-1].end() :].split()
    if not before.endswith("=") and not _CHANGES.search(sentence) and _LEAD_AT_END.search(before):
        return " ".join([numbers[-1][0], *after]).strip(" *)")
    results = [number for number in numbers if sentence[: number.start()].rstrip(" *({").endswith("=")]
    if not results or _CHANGES.search(" ".join(sentence[results[-1].end() :].split()[:2])):
        return None
    calculation = _CALCULATION_AT_END.search(sentence[: results[-1].start()])
    return f"{calculation[0]}{results[-1][0]}" if calculation else results[-1][0]


def _undecided(statements: list[str]) -> bool:
    """Return whether the text states too many different answers."""
    return len({re.sub(r"\s", "", statement) for statement in statements}) > MAX_DISTINCT


# ---- 2. Reading

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∈": r"\in "}
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "°": " degree ", "θ": r"\theta ", "∅": r"\emptyset "}
    | {"½": r"\frac12 ", "⅓": r"\frac13 ", "⅔": r"\frac23 ", "¼": r"\frac14 ", "¾": r"\frac34 ", "²": "^2", "³": "^3"}
    | {"\u00a0": " "}
)
_REWRITES = [
    (r"(?:√|(?<![\\A-Za-z])sqrt) ?(?:\(([^()]*)\)|(\w+))", r"\\sqrt{\1\2}"),  # "√(x+1)", "√2", "sqrt(2)"
    (r"(?<!\\)\$|(?<!\\)\\[()\[\]]|\\displaystyle", ""),  # "$5$", "\(5\)"; but `\\[2pt]` does not open a formula
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),  # "\left(", "\right."
    (r"\{,\}|,\s*\\!\s*", ","),  # "1{,}000", "1,\!000"
    (r"(?<!\\)(\\\\)*\\[,;:! ]|\\q?quad(?![a-z])|~|\s+", r"\1 "),  # "5\,000", "5~cm"
    (r"(?<![\d.,^_])(\d{1,3}) (\d{3})(?: (\d{3}))?(?! ?\d)", r"\1\2\3"),  # "1 234 567"
    (r" ?(?:\^ ?\{? ?\\circ ?\}?|\\degree)", " degree "),  # "90^\circ", "90 \degree"
    (r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|mathit|rm|bf) ?\{([^{}]*)\}", r" \1 "),  # "\text{ cm}"
    (r"\\(?:mathbb|operatorname) ?\{?([A-Za-z]+)\}?", r"\\\1 "),  # "\mathbb{R}"
    (r"(?<![\\A-Za-z])(pi|sin|cos|tan|log|ln)(?![A-Za-z])", r"\\\1"),  # "2*pi"
    (r"\\[dtc]?frac ?(\d) ?(\d)(?!\d)", r"\\frac{\1}{\2}"),  # "\dfrac12"
    (r"(\d) *thousand\b", r"\1e3"),
    (r"(\d) *million\b", r"\1e6"),
    (r"(\d) *billion\b", r"\1e9"),
    (r"^ *(- ?)?\\\$(.*)", r"\1\2 dollar"),  # "\$5"
    (r"^ *(- ?)?€(.*)", r"\1\2 euro"),
]
_ALIASES = dict(
    re.findall(
        r"(\S+)=>(\S+)",
        r"\%=>% \cdot=>* \times=>* \div=>/ \lt=>< \gt=>> \leq=>\le \leqslant=>\le \geq=>\ge \geqslant=>\ge \neq=>\ne"
        r" ;=>, and=>, or=>, per=>/ \lvert=>| \rvert=>| \vert=>| \varnothing=>\emptyset \varphi=>\phi \lbrace=>\{"
        r" \rbrace=>\} \dbinom=>\binom \dfrac=>\frac \tfrac=>\frac \cfrac=>\frac",
    )
)
_GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi|chi|psi"
    "|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega|ell"
)
_SYMBOL = re.compile(rf"(?:[A-Za-z]|\\(?:{_GREEK})(?![a-z]))'*(?:_\w|_\{{\w+\}})?")  # "x", "\theta", "f'", "x_{12}"
# "52_8", "0.1\overline{6}", "1,234.5e6", "km", "x_1", "\begin{pmatrix}", "\\", "\log_2", "\pi", "\{", "+"
_TOKEN = re.compile(
    rf"\d+_(?:\d|\{{\d\d?\}})|\d*\.\d*\\overline ?\{{\d+\}}|{DIGITS}(?:[eE]-?\d{{1,3}}(?!\w))?|[A-Za-z]{{2,}}"
    rf"|{_SYMBOL.pattern}|\\(?:begin|end)\{{[pb]matrix\}}|\\\\(?:\[\d+pt\])?|\\log_(?:\d|\{{\d+\}})"
    r"|\\(?:[dtc]?frac|sqrt|d?binom|pi|infty|[RZNQC]|in|lt|gt|[lgn]eq?|[lg]eqslant|cup|pm|cdot|times|div|[lr]?vert|[lr]brace"
    r"|emptyset|varnothing|varphi|angle|overline|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|sinh|cosh|tanh|ln|log|exp)(?![A-Za-z])"
    r"|\\[{}%]|[-+*/^!=<>()\[\]{}|,;:%&]",
    re.ASCII,
)
# A unit has one name for all its spellings. A plural with "s" is not listed. A counted thing names itself.
UNITS = {
    spelling: spellings.split()[0]
    for spellings in re.split(
        ",",
        """
    mm millimeter millimetre, cm centimeter centimetre, m meter metre, km kilometer kilometre, inch in inche, foot
    ft feet, yard yd, mile mi, mg milligram, g gram, kg kilogram, lb pound, oz ounce, ton tonne, ml mL milliliter
    millilitre, l L liter litre, gallon, quart, pint, second s sec, minute min, hour h hr, day, week, month, year,
    cent, dollar, euro, degree, radian rad, mph, % percent, unit, time, point, piece, slice, cup, box boxe, bag,
    bottle, apple, orange, egg, cookie, person people, child children, boy, girl, student, friend, book, page,
    pencil, card, ticket, clip, coin, marble, flower, tree, dog, cat, car, toy""",
    )
    for spelling in spellings.split()
}
_FILLERS = re.compile(r"\b(?:in (?:total|all)|altogether|total|each|left|more(?= [a-z])|of (?:the |all )?(?=[a-z]))\b")
_WORD = r"(?:[A-Za-z]{2,}|[A-Za-z](?= /)|(?<=/ )[A-Za-z]|m(?= \^ |$)|[%/])"
# "15 cm ^ 2", "15 square cm", "5 km / h"
_UNIT_AT_END = re.compile(
    rf"(.*?[^/ ]) (?:(square|sq)|(cubic))? ?({_WORD}(?: {_WORD})*)(?: \^ (?:\{{ )?([23])(?: \}})?)?"
)
_NUMBER = re.compile(
    rf"(?P<signs>[-+] |- - |)(?:(?P<whole>\d+) (?=\d+ /))?(?P<top>{DIGITS}(?:[eE]-?\d+)?|\d*\.(?=\\|\d*\\))"
    rf"(?:\\overline ?\{{(?P<repeating>\d+)\}})?(?: / (?P<minus>- )?(?P<bottom>{DIGITS}))?"
    r"(?: \* 10 \^ (?:\{ )?(?P<power>(?:- )?\d{1,3})(?: \})?)?"
)
_TIME = re.compile(r"(\d{1,2}):([0-5]\d)(?: ?([ap])\.? ?m\.?)?", re.IGNORECASE | re.ASCII)
_LEAD = re.compile(rf"(?:(?:{LEADS})\b[: ]*)+", re.IGNORECASE)


class Unreadable(Exception):
    """The text is no answer of the kinds that this file reads, or it is too large to compute."""


@functools.lru_cache(maxsize=8192)
def _tidy(text: str) -> str:
    r"""Return one spelling for many: "\frac{1}{2} cm" for "$\dfrac12$ \text{cm}.". Raises Unreadable if too long."""
    if len(text) > MAX_CHARS or text.rstrip().endswith(".."):  # "0.3..." has more digits
        raise Unreadable(text)
    text = text.translate(_UNICODE).strip(" \n\t*`")
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text, flags=re.ASCII)
    return " ".join(text.split()).rstrip(" .,;:*")


@functools.lru_cache(maxsize=8192)
def _tokens(text: str) -> str:
    r"""Put a space between the tokens: "2 \pi ( x )" for "$2\pi(x)$". Raises Unreadable for a sign in no token."""
    text = _tidy(text)
    lead = _LEAD.match(text)  # "Total: 5", "She has 5"
    text = (lead and text[lead.end() :]) or text
    if _TOKEN.sub("", text).strip(" "):
        raise Unreadable(text)
    tokens: list[str] = []
    depth = 0
    for m in _TOKEN.finditer(text):
        token = _ALIASES.get(m[0], m[0])
        if token == "," and tokens[-1:] == [","]:  # "3, 4, and 5"
            continue
        depth += (token in ("(", "[", r"\{")) - (token in (")", "]", r"\}"))
        # In "(100,200)" the comma separates.
        tokens += re.findall(r"[\d.]+|,", token) if depth and re.match(r"\d+,", token) else [token]
    text = re.sub(r"_\{(\w)\}", r"_\1", " ".join(tokens).replace(r"[2pt]", ""))
    for _ in range(2):  # braces for both arguments of "\frac \pi 3"
        argument = rf"(\\(?:frac|sqrt|binom)(?: \{{[^{{}}]*\}}| \[ \w \])?) (\d|\\pi|{_SYMBOL.pattern})(?= |$)"
        text = re.sub(argument, r"\1 { \2 }", text)
    return text


def _split(text: str, separator: str) -> list[str]:
    """Split tokens at a separator that is in no bracket: ["( 1 , 2 )", "3"] for "( 1 , 2 ) , 3"."""
    parts = [""]
    depth = 0
    for token in text.split():
        depth += token in ("(", "[", "{", r"\{") or token.startswith(r"\begin")
        depth -= token in (")", "]", "}", r"\}") or token.startswith(r"\end")
        if not 0 <= depth <= MAX_DEPTH:
            raise Unreadable("brackets")
        if depth == 0 and token == separator:
            parts.append("")
        else:
            parts[-1] = f"{parts[-1]} {token}".lstrip()
    return parts


def _word(text: str) -> str | None:
    r"""Read an answer of up to three words: "no solution" for `\text{No solution}`, "C" for "(C)" and "(C) 12"."""
    tidied = _tidy(text)
    choice = re.fullmatch(r"\(?([A-J])(?:\)|[.:] |$)[\d. /\\${}]*", tidied)  # not "(A) or (B)"
    if choice:
        return choice[1]
    is_word = re.fullmatch(r"[A-Za-z]+(?: [A-Za-z']+){0,2}", tidied)
    return tidied.lower() if is_word and ("\\text" in text or re.search(r"[A-Za-z]{4}", tidied)) else None


def _minutes(text: str) -> list[int]:
    """Return the minutes of the day that a time can mean: 8:34 is in the morning or in the evening."""
    m = _TIME.fullmatch(_tidy(text))
    if not m or int(m[1]) > 23:
        return []
    morning = int(m[1]) % 12 * 60 + int(m[2])
    if m[3] or not 1 <= int(m[1]) <= 12:
        return [morning + 720 * (int(m[1]) > 12 or (m[3] or "").lower() == "p")]
    return [morning, morning + 720]


def _without_unit(text: str) -> tuple[str, str]:
    r"""Return tokens without their unit, and the unit: "15" and "cm^2" for "15 square cm", "52" and "_8" for "52_8"."""
    base = re.fullmatch(r"(\d+)(_)\{?(\d+)\}?", text)
    if base:
        return base[1], base[2] + base[3]
    m = _UNIT_AT_END.fullmatch(text)
    if not m:
        return text, ""
    words = [word.lower() if len(word) > 2 else word for word in _FILLERS.sub("", m[4]).split()]
    names = [word if word == "/" else UNITS.get(word) or UNITS.get(word.removesuffix("s")) for word in words]
    power = m[5] or ("2" if m[2] else "3" if m[3] else "")
    if None in names or names[-1:] == ["/"] or "%" in names[1:] or (power and not names):
        return text, ""
    return m[1], " ".join(map(str, names)) + (f"^{power}" if power else "")


def _fraction(tokens: str) -> Fraction | None:
    r"""Return the value of a plain number: 5/3 for "1 \frac { 2 } { 3 }". Return None for any other tokens."""
    fraction = rf"\\frac \{{ ((?:- )?{DIGITS}) \}} \{{ ((?:- )?{DIGITS}) \}}"
    m = _NUMBER.fullmatch(re.sub(fraction, r"\1 / \2", tokens))
    if not m or "- -" in tokens or (m["whole"] and not 0 < Fraction(m["top"]) < Fraction(m["bottom"])):
        return None
    value = Fraction("0" + m["top"].replace(",", ""))
    if m["repeating"]:
        decimals = len(m["top"].partition(".")[2])
        value += Fraction(int(m["repeating"]), 10**decimals * (10 ** len(m["repeating"]) - 1))
    bottom = Fraction("0" + (m["bottom"] or "1").replace(",", ""))
    if bottom == 0:
        return None
    value = int(m["whole"] or 0) + value / bottom
    sign = (-1) ** (m["signs"].count("-") + bool(m["minus"]))
    return sign * value * Fraction(10) ** int((m["power"] or "0").replace(" ", ""))


@functools.lru_cache(maxsize=8192)
def _number(text: str) -> tuple[Fraction, str] | None:
    """Read a stated plain number and its unit: (12, "cm") for "12 cm". Return None for any other text."""
    try:
        tokens, unit = _without_unit(_tokens(text))
    except Unreadable:
        return None
    value = _fraction(tokens)
    return None if value is None else (value, unit)


def _letters(tokens: str) -> set[str]:
    """Return the variables, each letter of "ab" alone: {"a", "b", "f'"} for "ab + f'". Raises Unreadable for a word."""
    letters: set[str] = set()
    for token in tokens.split():
        if token.isalpha() and len(token) > 3:
            raise Unreadable(token)
        letters |= set(token) if token.isalpha() else {token} if _SYMBOL.fullmatch(token) else set()
    return letters - {"e", "i"}


# ---- 3. Comparison

# What is left of "= 5": "x", "AB", "\angle ABC", "f(3)", "(x,y)". But "e", "i" and "\pi" are numbers.
_NAME = re.compile(
    rf"(?:\\(?:angle|overline))?\{{?(?![ei](?![\w'])){_SYMBOL.pattern}[A-Z]{{0,2}}\}}?(?:\([\w,.\\/-]*\))?"
    r"|[A-Z]{2,3}|\([a-z](?:,[a-z])+\)"
)
# A sum, a product, a factorial, two divisions: nothing of this is in "5", "174 / 2", "- \sqrt { 16 }", "\log_2 8".
_OPERATOR = re.compile(r"(?<![\\\w])[\w.,]+ (?:[-+*\w(\\])|[)}!] (?:[-+*\w(\\])|!|binom|/.*/")
_PRIME_POWER = r"(?:2|3|5|7|11|13)(?: \^ (?:\{ \d+ \}|\d+))?"
_PRIME_POWERS = re.compile(rf"(?=.*\^){_PRIME_POWER}(?: (?:\* )?{_PRIME_POWER})*")  # "2 ^ 3 * 3 ^ 2"
# "1 + 2" or "2 * 3", but not "1 + 2 \sqrt"
_RATIONAL = rf"(?:{DIGITS}|\\frac \{{ {DIGITS} \}} \{{ {DIGITS} \}})"
_UNFINISHED = re.compile(
    rf"(?:^|[({{+-] )(?:- )?{_RATIONAL} [-+] {_RATIONAL}(?= [-+)}}]|$)"
    rf"|(?:^|[({{+-] |\w \* ){_RATIONAL} \* {_RATIONAL}(?! \^)|!|binom"
)
# Two signs, numbers side by side, "1 / 2 x", a bracket that belongs to nothing, a power of a power, "!!"
_UNCLEAR = re.compile(
    rf"[-+] [-+]|(?:^|[^^] )(?:{DIGITS}|\)|!) {DIGITS}|/ (?:[\w.]+|\([^()]*\)) (?:\w|\(|\\(?!end)[a-z])|! !|^\[ [^,]*$"
    r"|(?:^|[^^}\]tcm]) \{|(?:^|[^t]) \[ \w \] \{|\\(?:frac|binom) [^{]|\\sqrt [^{[]|\^ (?:\S+|\{[^{}]*\}) [\^!]"
)
# "9^99999", "9^{9^9}", 100 digits, "3000!", many roots or powers: math-verify would compute for a long time
_LARGE = re.compile(
    r"\^ (?:\{ )?(?:- )?\d{5}|\^ \{ [^{}a-z\\]*\^ \{? ?\d|\d{100}|[3-9]\d{3} !|\d{5} !|\( [^()a-z]* \) !"
)
_INEQUALITY = re.compile(r"[<>]|\\[lg]e\b")
_SPECIAL = [r"\infty", r"- \infty", r"\emptyset", r"\R", r"\Z", r"\N", r"\Q", r"\C"]


def _equal(gold: str, pred: str) -> bool:
    """Return whether two stated answers are equal."""
    if _word(gold) is not None:
        return _word(gold) == _word(pred)
    gold_time = _minutes(gold)
    pred_time = _minutes(pred)
    if gold_time and pred_time:
        return set(pred_time) <= set(gold_time) or gold_time[0] == pred_time[0]
    return _same(_tokens(gold), _tokens(pred))


def _items(tokens: str) -> list[str]:
    r"""Return the items of a list or set: ["1", "2 + 3", "2 - 3"] for "\{ 1 , 2 \pm 3 \}"."""
    tokens = re.sub(r"^[A-Za-z] = (?=\\\{)", "", tokens)
    if re.fullmatch(r"\\\{ (?:[^\\]|\\[a-z])* \\\}", tokens):
        tokens = tokens[3:-3]
    items: list[str] = []
    for part in _split(tokens, ","):
        items += [part.replace(r"\pm", sign).removeprefix("+ ") for sign in "+-"] if r"\pm" in part else [part]
    if len(items) > MAX_ITEMS:
        raise Unreadable("too many items")
    return items


def _same(gold: str, pred: str) -> bool:
    """Return whether the tokens of two answers are equal. The items of a list can have any order."""
    gold_items = _items(gold)
    rest = _items(pred)
    if len(gold_items) != len(rest):
        return False
    if len(rest) == 1:
        return (r"\{" in gold) == (r"\{" in pred) and _same_item(gold_items[0], rest[0])
    names = {_named(item)[0].partition("_")[0] for item in rest}
    if len(names - {""}) > 1 and not any(_named(item)[0] for item in gold_items):
        return False  # "x = 1, x = 2" can be "1, 2", but "x = 1, y = 2" cannot
    for item in gold_items:
        equal = [other for other in rest if _same_item(item, other)]
        if not equal:
            return False
        rest.remove(equal[0])
    return True


def _named(tokens: str) -> tuple[str, str]:
    """Split "x = 48 / 2 = 24" into "x" and "24". An equation has no name: ("", "x + y = 2"). Raises Unreadable."""
    sides = _split(tokens.replace(r"\in ", "= ", 1), "=")
    names = ["".join(side.split()) if _NAME.fullmatch("".join(side.split())) else "" for side in sides]
    if len(sides) == 1:
        return "", tokens
    if len(sides) == 2 and names[1] and not names[0]:  # "5 = x"
        sides, names = sides[::-1], names[::-1]
    values = sides[1:] if names[0] else sides
    says_something = names[0] or values[-1] not in values[:-1]  # not "5 = 5"
    letters = set(re.sub(r"\\angle|\\overline", "", names[0]).partition("(")[:1])
    is_new = not letters & _letters(_without_unit(values[-1])[0])
    if says_something and is_new and all(_same_item(values[-1], value, strict=False) for value in values[:-1]):
        return names[0], values[-1]
    if len(sides) > 2 or not _letters(tokens):
        raise Unreadable(tokens)  # its sides are different
    return "", tokens


def _same_item(gold: str, pred: str, strict: bool = True) -> bool:
    """Compare two answers that are no lists. If `strict`, a number must be a value and not a calculation."""
    gold_name, gold_value = _named(gold)
    pred_name, pred_value = _named(pred)
    if "=" in gold_value or "=" in pred_value:
        if gold.count("=") != 1 or pred.count("=") != 1:
            return False
        gold, pred = (f"( {text.replace('=', ') - (')} )" for text in (gold, pred))
        return _judge(gold, pred, equation=True)
    if gold_name and pred_name and gold_name != pred_name:
        return False
    gold_value, gold_unit = _without_unit(gold_value)
    pred_value, pred_unit = _without_unit(pred_value)
    if pred_unit != gold_unit and ((gold_unit and pred_unit) or pred_unit.startswith("_")):
        return False  # if one side has no unit, the question gives it. But a base changes the value
    a = _fraction(gold_value)
    b = _fraction(pred_value)
    if a is not None and b is not None:  # 15% can be written as 15 or as 0.15
        as_percent = (gold_unit == "%" and not pred_unit and a == 100 * b) or (
            pred_unit == "%" and not gold_unit and b == 100 * a
        )
        return a == b or as_percent
    # An answer is a value. A number for a number is no sum and no product, and nothing else joins two rational numbers.
    unfinished = _UNFINISHED if a is None else _OPERATOR
    bases = re.findall(r"(?<!\^ )(?<!\{ )\b\d+", pred_value)
    is_factorization = _PRIME_POWERS.fullmatch(pred_value) and len(set(bases)) == len(bases)
    if (
        strict
        and not is_factorization
        and not _letters(pred_value)
        and unfinished.search(pred_value)
        and not _UNFINISHED.search(gold_value)
    ):
        return False
    return _judge(gold_value, pred_value)


def _judge(gold: str, pred: str, equation: bool = False) -> bool:
    """Let math-verify compare two texts of tokens, if they have the same variables and are small and clear."""
    for text in (gold, pred):
        has_infinity = "infty" in re.sub(
            r"[(\[] - \\infty ,|, (\+ )?\\infty [)\]]", "", text
        )  # not only in an interval
        n_commands = len(re.findall(r"\\(?!frac|pi)[a-z]", text)) + len(re.findall(r"[|^]", text))
        if (
            _UNCLEAR.search(text)
            or _LARGE.search(text)
            or n_commands > MAX_COMMANDS
            or (has_infinity and text not in _SPECIAL)
            or not re.search(r"\w", text)
        ):
            raise Unreadable(text)
    if gold in _SPECIAL or pred in _SPECIAL:
        return gold == pred
    letters = sorted(_letters(gold) | _letters(pred))
    if bool(_INEQUALITY.search(gold)) != bool(_INEQUALITY.search(pred)):  # "x > 2" can be "(2, \infty)"
        interval = pred if _INEQUALITY.search(gold) else gold
        if len(letters) > 1 or not (interval[0] in "([" and "," in interval):
            return False
    else:  # math-verify would mix up "(1, 2)" and "[1, 2]", and "x < 2" and "x \le 2"
        shapes = []
        for text in (gold, pred):
            brackets = text[0] + text[-1] if " , " in text or "matrix" in text else ""
            shapes.append([brackets, *re.findall(r"[<>=:]|\\(?:le|ge|ne|cup|infty [\])]|begin)", text)])
        if shapes[0] != shapes[1] or _letters(gold) != _letters(pred):
            return False
    # Other names, because math-verify knows no case and no primes.
    names = dict(zip(letters, "abcjkmnopqrstuvwxyz", strict=False))
    if len(names) < len(letters):
        raise Unreadable("too many variables")
    return worker.judge(_latex(gold, names), _latex(pred, names), equation)


def _latex(tokens: str, names: dict[str, str]) -> str:
    r"""Write tokens for math-verify: "\frac{1}{2} a \cdot ( b - 1 )" for "0.5 x ( y - 1 )"."""
    written: list[str] = []
    for token in re.sub(r"(?<![\\{A-Za-z])[A-Za-z]{2,}", lambda m: " ".join(m[0]), tokens).split():
        if token == "(" and written and re.fullmatch(r"[\w)]|\d.*|\\pi", written[-1]):
            written.append(r"\cdot")  # math-verify would read "f (x)" as a function and "3 (2)" as a sum
        if re.fullmatch(DIGITS, token):
            value = Fraction(token.replace(",", ""))
            token = str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        written.append(names.get(token, token))
    return " ".join(written)


# ---- 4. The worker


class Worker:
    """A process that runs math-verify. It starts with the first job and does one job at a time, for all threads."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew, also in a forked child, where the process and the lock are the parent's."""
        self._process: subprocess.Popen[bytes] | None = None
        self._ready: bool | None = None  # None while the process imports math-verify, False if it could not
        self._lock = threading.Lock()
        self.judge = functools.lru_cache(maxsize=8192)(self._judge)  # completions often state the same answer

    @property
    def pid(self) -> int | None:
        """Id of the process, or None if there is none."""
        return self._process.pid if self._process else None

    def reset(self) -> None:
        """Stop the process and forget all verdicts."""
        self.stop()
        self.forget()

    def _judge(self, gold: str, pred: str, equation: bool) -> bool:
        """Return whether two formulas are equal. Raises Unreadable, and TimeoutError if the process died."""
        with self._lock:
            if self._ready is not False and (self._process is None or self._process.poll() is not None):
                self._start()
            if self._ready is None:
                self._ready = self._reply("") == "ready"
                if not self._ready:
                    log.warning("math-verify could not be loaded: only numbers, words and equal text will be rewarded")
            if not self._ready and gold != pred:
                raise Unreadable(gold, pred)
            status = self._reply(json.dumps([gold, pred, equation])) if self._ready else "True"
            if not status:
                self._start()  # it imports in the background
                raise TimeoutError
        if status == "unreadable":
            raise Unreadable(gold, pred)
        return status == "True"

    def _start(self) -> None:
        self._ready = None
        self._process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # fixes the order of sets, so verdicts are the same in every run
        )

    def _reply(self, job: str) -> str:
        """Send a job, if it is not empty. Return the next line, or "" if the process died or took too long."""
        process = self._process
        assert process and process.stdin and process.stdout  # for mypy
        line = b""
        timer = threading.Timer(WALL_SECONDS, process.kill)  # ends `readline` on every system and in every thread
        timer.start()
        try:
            process.stdin.write(f"{job}\n".encode() if job else b"")
            line = process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
            if not line:  # also after KeyboardInterrupt: the next job must not get the reply to this one
                self.stop()
        return line.decode().strip()

    def stop(self) -> None:
        """Stop the process. This takes no lock, because another thread can still hold it when Python exits."""
        if self._process:
            self._process.kill()
            self._process.communicate()  # waits for the end and closes the pipes
        self._process = None


worker = Worker()
atexit.register(worker.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=worker.forget)


def _serve() -> None:
    """Run the worker: read lines [gold, pred, equation] as JSON and write a line for each, until the parent ends."""
    import signal

    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not be taken for a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and stops this process
    # SIGPROF ends this process. It counts CPU time, so a reply does not depend on other programs. Windows has none.
    set_timer = getattr(signal, "setitimer", lambda which, seconds: None)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # Windows has no such limit and macOS may refuse it; the time limit still holds
    from latex2sympy2_extended.latex2sympy2 import latex2sympy  # math-verify's parser
    from math_verify import grader, verify
    from sympy import E, I, Symbol, simplify

    # math-verify takes a difference below 1e-15 for zero. Here sympy decides about the difference if it can.
    rounded_equal = grader.sympy_numeric_eq

    def exactly_equal(a, b, *digits):  # type: ignore[no-untyped-def]
        is_matrix = a.is_Matrix or b.is_Matrix  # then it calls this function for each entry
        may_be_zero = is_matrix or ((a - b).is_zero is not False and (a - b).is_finite is not False)
        return may_be_zero and rounded_equal(a, b, *digits)

    grader.sympy_numeric_eq = exactly_equal

    @functools.lru_cache(maxsize=1024)
    def parse(text):  # type: ignore[no-untyped-def]
        is_real = not re.search(r"(?<![\\a-z])i(?![a-z])", text)
        tree = latex2sympy(text, is_real=is_real, convert_degrees=False, normalization_config=None)
        return tree if is_real else tree.subs({Symbol("i", real=False): I, Symbol("e", real=False): E})

    def compare(gold: str, pred: str, equation: bool) -> str:
        try:
            trees = [parse(text) for text in (gold, pred)]
        except MemoryError:
            raise
        except Exception:
            return "unreadable"
        if equation:  # both are left minus right, and must be a constant times the other
            factor = simplify(trees[0] / trees[1])
            return str(bool(factor.is_number and factor.is_finite and factor.is_nonzero))
        # float_rounding counts decimals. It matters where sympy cannot decide: with few of them, 3.14 would equal pi.
        options = {"float_rounding": 12, "allow_set_relation_comp": True, "timeout_seconds": None}
        return str(verify([trees[0]], [trees[1]], **options))

    compare("x ^ { 2 }", "x ^ { 2 }", False)  # loads the grammar now
    print("ready", file=replies)
    for line in sys.stdin:
        set_timer(getattr(signal, "ITIMER_PROF", 0), CPU_SECONDS)
        print(compare(*json.loads(line)), file=replies)  # a MemoryError ends this process, and the parent notices
        set_timer(getattr(signal, "ITIMER_PROF", 0), 0)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    _serve()
