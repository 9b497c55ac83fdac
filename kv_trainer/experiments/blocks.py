"""A report as a list of blocks, written as Markdown and as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; color: #555; } img { max-width: 100%; height: auto; }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: .8rem; }
.loud { color: #a40000; font-weight: bold; border-left: 4px solid #a40000; padding-left: .7rem; }
"""


@dataclass
class Heading:
    text: str
    level: int = 2


@dataclass
class Text:
    """loud: nobody must miss it."""

    text: str
    loud: bool = False


@dataclass
class Items:
    items: list[str]


@dataclass
class Grid:
    """A table: the first row is its head, the first column names."""

    rows: list[list[str]]


@dataclass
class Picture:
    """path: beside the report; name: its path from there."""

    path: Path
    name: str
    caption: str


@dataclass
class Code:
    text: str


Block = Heading | Text | Items | Grid | Picture | Code


def as_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(map(markdown, blocks)) + "\n"


def markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Text):
        return f"**{block.text}**" if block.loud else block.text
    if isinstance(block, Items):
        return "\n".join(f"- {item}" for item in block.items)
    if isinstance(block, Grid):
        head, *body = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in block.rows]
        return "\n".join([head, "|---" + "|---:" * (len(block.rows[0]) - 1) + "|", *body])
    if isinstance(block, Picture):
        return f"![{block.caption}]({block.name})\n\n{block.caption}"
    return f"```bash\n{block.text}\n```"


def as_html(title: str, blocks: Sequence[Block]) -> str:
    body = "\n".join(map(markup, blocks))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def markup(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{inline(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p{' class=loud' if block.loud else ''}>{inline(block.text)}</p>"
    if isinstance(block, Items):
        return "<ul>\n" + "\n".join(f"<li>{inline(item)}</li>" for item in block.items) + "\n</ul>"
    if isinstance(block, Grid):
        head, *body = block.rows
        rows = ["<tr>" + "".join(f"<th>{inline(cell)}</th>" for cell in head) + "</tr>"]
        rows += ["<tr>" + "".join(f"<td>{inline(cell)}</td>" for cell in row) + "</tr>" for row in body]
        return '<div class="wide"><table>\n' + "\n".join(rows) + "\n</table></div>"
    if isinstance(block, Picture):
        data = base64.b64encode(block.path.read_bytes()).decode("ascii")
        caption = html.escape(block.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    return f"<pre>{html.escape(block.text)}</pre>"


def inline(text: str) -> str:
    """Escaped text, with `code` as such."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
