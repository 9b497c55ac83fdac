"""Every form of a row as one example, and what is told of rows that are none."""

from __future__ import annotations

import pytest

from kv_trainer.arguments import DataConfig
from kv_trainer.examples import Example, example_of


def test_every_row_form_gives_its_turns_and_its_answer():
    config = DataConfig()
    assert example_of({"prompt": "a", "completion": "b", "task": "t"}, config) == Example(
        [{"role": "user", "content": "a"}], "b"
    )
    turns = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "x"))]
    assert example_of({"messages": turns}, config) == Example(turns[:2], "x")
    assert example_of({"messages": turns}, config).prompt == "s\nu"
    assert example_of({"text": "abc"}, config) == Example([], "abc")
    for form in ({"prompt": turns[:2], "completion": turns[2:]}, {"prompt": turns[:1], "completion": turns[1:]}):
        assert example_of(form, config) == Example(turns[:2], "x"), "as TRL has conversations"
    assert example_of({"prompt": turns[:2], "completion": "x"}, config) == Example(turns[:2], "x")
    assert example_of({"prompt": "u", "completion": turns[2:]}, config) == Example(turns[1:2], "x")
    parts = {"prompt": turns[:2], "reasoning": "r ", "answer": 6}
    assert example_of(parts, config) == Example(turns[:2], "r 6", 2)
    row = {"question": "two?", "solution": "2", "n": 7}
    templates = DataConfig(prompt="Q{n}: {question}", response="A: {solution}")
    assert example_of(row, templates) == Example([{"role": "user", "content": "Q7: two?"}], "A: 2")
    assert example_of(row, DataConfig(response="{solution}")) == Example([], "2")
    assert example_of({"prompt": "p", "completion": "c"}, templates_over()).completion == "c!", "templates come first"


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("2 x 3 = 6\n#### 6", "#### 6"),
        ("<think>six? #### no</think> 6", " 6"),
        ("a #### 5 b #### 6", "#### 6"),
        ("six", "six"),
        ("hm</think>", ""),
    ],
)
def test_the_answer_begins_at_its_marker(completion, answer):
    """The first marker of the list that is there at all, where it is last; a closing tag belongs to the reasoning."""
    rows = [
        {"prompt": "q", "completion": completion},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": completion}]},
        {"text": completion},
    ]
    for row in rows:
        found = example_of(row, DataConfig())
        assert (found.answer, found.reasoning + found.answer) == (answer, completion)
    none = example_of(rows[0], DataConfig(answer_markers=[]))
    assert (none.reasoning, none.answer) == ("", completion)


def test_reasoning_and_answer_as_columns_make_the_completion():
    row = {"prompt": "q", "reasoning": "2 x 3 #### = 6. ", "answer": 6}
    found = example_of(row, DataConfig())
    assert (found.completion, found.reasoning, found.answer) == ("2 x 3 #### = 6. 6", "2 x 3 #### = 6. ", "6")
    assert example_of({**row, "reasoning": None}, DataConfig()).completion == "6"
    assert example_of({**row, "completion": "six"}, DataConfig()).completion == "six"


def templates_over() -> DataConfig:
    return DataConfig(prompt="{prompt}", response="{completion}!")


ANSWERED = [{"role": "assistant", "content": "a"}]
IMAGE = [{"role": "user", "content": [{"type": "image"}]}]
CALLED = "The assistant's content in the column messages is None, no text; .* without tool calls and images"


@pytest.mark.parametrize(
    ("row", "config", "says"),
    [
        ({"question": "q", "answer": "a"}, DataConfig(), "columns question, answer; give prompt"),
        ({"completion": "a"}, DataConfig(), "columns completion; give prompt"),
        ({"question": "q"}, DataConfig(prompt="{qestion}", response="x"), "column 'qestion', but .* have question"),
        ({"question": "q"}, DataConfig(prompt="{question}"), "data.response is not given"),
        ({"messages": [{"role": "user", "content": "q"}]}, DataConfig(), "messages is by 'user'"),
        (
            {"prompt": "q", "completion": [{"role": "user", "content": "q"}]},
            DataConfig(),
            "The last of a row's completion is by 'user'; it must be the assistant's answer",
        ),
        ({"messages": []}, DataConfig(), "The column messages is an empty list; give .* or filter such rows out"),
        ({"messages": None}, DataConfig(), "The column messages is None; give a list of messages"),
        ({"messages": "q"}, DataConfig(), "The column messages is 'q'; give a list of messages"),
        ({"messages": ["q"]}, DataConfig(), "The column messages has 'q', which has no role; give a list"),
        ({"messages": [{"from": "human", "value": "q"}]}, DataConfig(), "has {'from': 'human', .* has no role"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, DataConfig(), CALLED),
        ({"messages": [{"role": "user", "content": None}, *ANSWERED]}, DataConfig(), "The user's content in the col"),
        ({"messages": [*IMAGE, *ANSWERED]}, DataConfig(), r"content in the column messages is \[\{'type': 'image'\}\]"),
        ({"prompt": IMAGE, "completion": "a"}, DataConfig(), "The user's content in the column prompt is .*image"),
        ({"prompt": None, "completion": "a"}, DataConfig(), "The column prompt is None, no text; filter such rows out"),
        ({"prompt": "q", "completion": 6}, DataConfig(), "The column completion is 6, .* data.prompt and data.resp"),
        ({"prompt": "q", "completion": []}, DataConfig(), "The column completion is an empty list"),
        ({"text": None}, DataConfig(), "The column text is None, no text"),
    ],
)
def test_a_row_that_cannot_be_read_names_what_it_has(row, config, says):
    with pytest.raises(ValueError, match=says):
        example_of(row, config)
