"""Every rule that finds an answer, on the texts that models write."""

from __future__ import annotations

import pytest

from kv_trainer.answers import RULES
from kv_trainer.metrics import extract_answer, reference_answer

# text: what gsm8k, boxed, last_number and auto find in it.
CASES = [
    ("so 3 #### 4 .", "4", None, "4", "4"),
    ("#### 1\nno, #### 2\nDone in 3 steps", "2", None, "3", "2"),
    ("3+4 #### 7 #### 8", "8", None, "8", "8"),
    ("####\n1,280.", "1280", None, "1280", "1280"),
    ("#### $1,234,567.50 per year", "1234567.5", None, "1234567.5", "1234567.5"),
    ("#### -$18", "-18", None, "-18", "-18"),
    ("#### $-18.00", "-18", None, "-18", "-18"),
    ("#### \u22125", "-5", None, "-5", "-5"),
    ("#### 50%.", "50", None, "50", "50"),
    ("#### 5 kg", "5", None, "5", "5"),
    ("#### 5kg", "5", None, "5", "5"),
    ("#### 60 km/h", "60", None, "60", "60"),
    ("#### 18 €", "18", None, "18", "18"),
    ("#### **18**", "18", None, "18", "18"),
    ("#### .50", "0.5", None, "0.5", "0.5"),
    ("#### 1/2", "1/2", None, "1/2", "1/2"),
    ("#### 2 million", "2 million", None, "2", "2 million"),
    ("#### 12 pieces", "12", None, "12", "12"),
    ("#### 3 pints", "3", None, "3", "3"),
    ("#### 5 square metres", "5", None, "5", "5"),
    ("#### 1 and a half", "1 and a half", None, "1", "1 and a half"),
    ("#### 20 minus x", "20 minus x", None, "20", "20 minus x"),
    ("#### 6 squared", "6 squared", None, "6", "6 squared"),
    ("#### 7 or eight", "7 or eight", None, "7", "7 or eight"),
    ("#### 2 PM", "2 PM", None, "2", "2 PM"),
    ("#### 3 + 4 = 7", "3 + 4 = 7", None, "7", "3 + 4 = 7"),
    ("#### ['3', '-1']", "['3', '-1']", None, "-1", "['3', '-1']"),
    ("#### 00:34:28", "00:34:28", None, "28", "00:34:28"),
    ("#### Yes.", "Yes", None, None, "Yes"),
    ("#### mother-in-law", "mother-in-law", None, None, "mother-in-law"),
    (r"#### $\boxed{7}$", "7", "7", "7", "7"),
    (r"#### .", None, None, None, None),
    ("####", None, None, None, None),
    (r"First \boxed{1}, then \boxed{2}. All 3 done.", None, "2", "3", "2"),
    (r"#### 4, or \boxed{5}", "5", "5", "5", "5"),
    ("\\boxed{5}\n#### 4", "4", "5", "4", "4"),
    (r"\boxed{\frac{1}{2}}.", None, r"\frac{1}{2}", r"\frac{1}{2}", r"\frac{1}{2}"),
    (r"\boxed{-\dfrac{12}{\sqrt{3}}}", None, r"-\frac{12}{\sqrt{3}}", "3", r"-\frac{12}{\sqrt{3}}"),
    (r"it is -\frac{1}{2}", None, None, r"-\frac{1}{2}", r"-\frac{1}{2}"),
    (r"\boxed{1{,}280\text{ cm}}", None, "1280", "280", "1280"),
    (r"\boxed{\$5,\!000}", None, "5000", "000", "5000"),
    (r"\boxed{50\%} and \fbox{90^\circ}", None, "90", "90", "90"),
    (r"\boxed {\text{Tuesday}}", None, "Tuesday", None, "Tuesday"),
    (r"\boxed{\{1, 2\}}", None, r"\{1, 2\}", "2", r"\{1, 2\}"),
    (r"\boxed{2x}", None, "2x", "2", "2x"),
    (r"\boxed{x = 5}", None, "x = 5", "5", "x = 5"),
    (r"\boxed{\boxed{6}}", None, "6", "6", "6"),
    (r"\boxed{7} but \boxed{8", None, "7", "8", "7"),
    (r"\boxed{" * 500 + "8}", None, "8", "8", "8"),
    (r"\boxed{} 9", None, None, "9", "9"),
    ("It costs $1,280.50.", None, None, "1280.5", "1280.5"),
    ("She has 3 apples left, not 2.", None, None, "2", "2"),
    ("10 - 3 is 7, and 5-3", None, None, "3", "3"),
    ("x=-5", None, None, "-5", "-5"),
    ("-5, +6", None, None, "6", "6"),
    ("it is...5", None, None, "5", "5"),
    ("it is .5", None, None, "0.5", "0.5"),
    ("1,28 or 1,2345", None, None, "2345", "2345"),
    ("version 1.2.3", None, None, "1.2", "1.2"),
    ("12 molecules of H2O", None, None, "12", "12"),
    ("the ratio is 3/4.", None, None, "3/4", "3/4"),
    ("USD 20", None, None, "20", "20"),
    ("about 1e5 of them", None, None, "100000", "100000"),
    ("#### 2.5e-3", "0.0025", None, "0.0025", "0.0025"),
    ("#### 1.5E+2 kg", "150", None, "150", "150"),
    ("2e of 3ex and 7e4x", None, None, "7", "7"),
    ("<think>3 or #### 4?</think>It is \\boxed{5}.", None, "5", "5", "5"),
    ("<think>\\boxed{5}</think>", None, None, None, None),
    ("<think>3 and #### 4", "4", None, "4", "4"),
    ("nothing at all", None, None, None, None),
    ("", None, None, None, None),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0][:30])
def test_rules_on_what_models_write(case: tuple) -> None:
    text, *expected = case
    found = {rule: extract_answer(text, rule) for rule in RULES}
    # Equal numbers are spelt alike on both sides: what is left of '5,\!000' is no answer of its own.
    assert found == dict(zip(RULES, (None if e is None else extract_answer(e, "(.+)") for e in expected), strict=True))


@pytest.mark.parametrize(
    ("reference", "rule", "expected"),
    [
        ("Natalia sold 48/2 = 24.\n#### 1,280", "gsm8k", "1280"),
        ("1,280 dollars", "gsm8k", "1280"),
        ("KQWZTB", "gsm8k", "KQWZTB"),
        ("x = 5", "auto", "x = 5"),
        (r"$\frac{3}{4}$", "auto", r"\frac{3}{4}"),
        ("day 3 of May", "auto", "day 3 of May"),
        ("day 3 of May", "last_number", "3"),
        ("Tuesday", "last_number", "Tuesday"),
        (r"so \boxed{4}", "auto", "4"),
        ("5\\text{ cm}", "boxed", "5"),
        ("<think>#### 4</think>5 cm", "auto", "5"),
        ("so 3 #### 4.0", r"####\s*(.+)", "4"),
        (" 4.0 ", r"####\s*(.+)", "4"),
    ],
)
def test_references_without_a_mark_are_taken_whole(reference: str, rule: str, expected: str) -> None:
    assert reference_answer(reference, rule) == expected


def test_what_a_rule_finds_in_a_marked_reference_is_itself() -> None:
    for text, *expected in CASES:
        for rule, answer in zip(RULES, expected, strict=True):
            if answer is not None:
                assert reference_answer(answer, rule) == extract_answer(answer, "(.+)"), (text, rule)
