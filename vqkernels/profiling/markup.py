"""Pieces of HTML that the pages of `vqkernels profile` and `vqkernels evaluate` are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are markup already; it scrolls by itself where it is too wide."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and what they stand for; the latter are markup already."""
    body = "".join(f'<tr><th scope="row">{name}</th><td>{fact}</td></tr>' for name, fact in rows)
    return f'<table class="words"><tbody>{body}</tbody></table>'


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page with a heading; the parts are markup already."""
    opening = f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>'
    return f"{opening}{''.join(parts)}</section>"


def paragraph(content: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(content)}</p>' if kind else f"<p>{escape(content)}</p>"


def whole_page(title: str, body: str, footer: str, style: str) -> str:
    """A page that needs nothing from outside; `body` is markup already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{body}<footer>{escape(footer)}</footer></main></body></html>\n"
    )
