"""Rules that find the answer in a text, by name; `evaluation.answer_pattern` takes one of them or an expression.

They find text; metrics.normalize_answer then gives equal numbers one spelling.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .chat import CLOSE

MONEY = r"(?:\\?[$€£¥]|(?<!\w)(?:USD|EUR|GBP)\b)"
# Thousands are parted by commas throughout, or not at all.
DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!,*\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][-+]?\d+(?!\w))?"
FRACTION = r"\\frac\s*\{[^{}]*\}\s*\{[^{}]*\}"
# No sign behind a word, a digit or a bracket, nor before a blank: '5-3' and '5 - 3' hold no -3. Nor is the end of a
# word or of a version a number of its own: not the 2 of 'H2O', not the 3 of '1.2.3'.
SIGN = r"(?<![\w)\]}%])[-+](?!\s)"
NUMBER = re.compile(
    rf"(?P<sign>{SIGN})?(?:{MONEY}\s*)?(?P<inner>{SIGN})?"
    rf"(?P<number>{FRACTION}|(?<!\w)(?<!\d\.)(?:{DIGITS})(?:/\d+(?![\d/]))?)"
)
# A number and its unit, of at most two words ('5 square metres'). No unit: what makes another number of it ('2
# million', '2 pi', '1 and a half', '20 minus x') or a time of day ('2 PM').
NOT_A_UNIT = (
    r"(?:(?:hundred|thousand|million|billion|trillion|dozen|half|halve|pi|sqrt|mod|over|and|or|minus|plus|time|less|"
    r"divided|squared|cubed|to)s?|[ap]\.?m\.?)\b"
)
WORD = rf"\s+(?!{NOT_A_UNIT})[a-z]{{2,}}(?:/[a-z]+)?"
UNIT = rf"\s*(?:[%$€£¥]|°\s*[CF]?|(?:k[gm]|[cm]m|m[gl]|mph)\b)|{WORD}(?:{WORD})?"
QUANTITY = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:{MONEY}\s*)?(?P<inner>[-+]?)(?P<number>{DIGITS})(?:{UNIT})?", re.IGNORECASE
)
MARK = re.compile(r"####\s*((?:(?!####).)+)")
BOX = re.compile(r"\\f?box(?:ed)?\s*(?=\{)")
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
# What LaTeX wraps an answer in, and what remains of it.
UNWRAPPED = (
    (re.compile(r"\\(?:text(?:bf|rm)?|mathrm)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\{,\}|,\\!"), ","),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree"), "°"),
    (re.compile(r"\\[!,; ]"), " "),
    (re.compile(r"\\%"), "%"),
)


def concluded(text: str) -> str:
    """What stands behind the reasoning that the text marks as such: an answer is not what was thought on the way."""
    return text.rpartition(CLOSE)[2]


def gsm8k(text: str) -> str | None:
    """What stands behind the last '####', there or in the line after, to its end; of a quantity the number alone."""
    found = MARK.findall(text)
    return (boxed(found[-1]) or plain(found[-1])) if found else None


def boxed(text: str) -> str | None:
    r"""What the last whole \boxed{...} holds, inner braces and all; of a quantity the number alone."""
    whole = _boxes(text)
    return plain(whole[max(whole)]) if whole else None


def last_number(text: str) -> str | None:
    r"""The last number, in digits; 1/2 and \frac{1}{2} are numbers too, and stay as they are written."""
    found = list(NUMBER.finditer(_straight(text)))
    return _signed(found[-1]) if found else None


def marked(text: str) -> str | None:
    """gsm8k, else boxed: an answer that the text itself calls one."""
    return gsm8k(text) or boxed(text)


def auto(text: str) -> str | None:
    """gsm8k, else boxed, else last_number."""
    return marked(text) or last_number(text)


def plain(text: str) -> str:
    """An answer without what LaTeX wraps it in, and a quantity ('$1,280.50', '5 kg', '50%') without its unit."""
    text = _straight(text)
    for wrapping, inner in UNWRAPPED:
        text = wrapping.sub(inner, text)
    text = text.strip().strip("*").strip()
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    text = text.rstrip(".").rstrip()
    quantity = QUANTITY.fullmatch(text)
    return _signed(quantity) if quantity else text


def _signed(found: re.Match[str]) -> str:
    sign = found["sign"] or found["inner"] or ""
    return sign.replace("+", "") + found["number"]


def _straight(text: str) -> str:
    """One minus, one blank and one fraction for the several that there are."""
    return re.sub(r"\\[dt]frac\b", r"\\frac", text.replace("\u2212", "-").replace("\u00a0", " "))


def _boxes(text: str) -> dict[int, str]:
    """What each whole box holds, by where its brace opens. One pass: a model may open boxes without end."""
    starts, opened, whole = {box.end() for box in BOX.finditer(text)}, [], {}
    for brace in BRACES.finditer(text) if starts else ():
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened and (start := opened.pop()) in starts:
            whole[start] = text[start + 1 : brace.start()]
    return whole


RULES: dict[str, Callable[[str], str | None]] = {
    "gsm8k": gsm8k, "boxed": boxed, "last_number": last_number, "auto": auto,
}  # fmt: skip
# How a rule reads a reference: one without a mark is an answer as a whole, whatever number it ends in.
IN_REFERENCES = {**RULES, "auto": marked}


def wrong_with(pattern: str) -> str | None:
    """Why a pattern finds no answers: it is neither a rule's name nor an expression with a group. None if it does."""
    if pattern in RULES:
        return None
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return f"is no regular expression: {error}."
    known = f"put the answer in one, '#### (.+)', or name a rule: {', '.join(RULES)}"
    return None if groups else f"has no group; {known}."
