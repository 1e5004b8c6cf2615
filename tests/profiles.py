"""What the tests of `vqkernels profile` share: the command run quickly, a tiny training config, the page read."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from vqkernels.cli.main import main

SECTIONS = {"advice", "stages", "roofline", "kernels", "exactness", "memory", "trace", "machine", "words"}
N, K, D = 700, 300, 24
QUICK = ["--seconds", "0.1", "--threads", "1", "--device", "cpu"]
TRAINING = {
    "image_size": 16,
    "batch_size": 2,
    "steps": 3,
    "warmup_steps": 0,
    "gradient_accumulation": 2,
    "threads": 1,
    "model": {
        "channels": 8,
        "channel_multipliers": [1, 2],
        "blocks": 1,
        "latent_channels": 6,
        "quantizer": {"codebook_size": 16, "codebook_dim": 4, "dead_code_threshold": 0.0},
    },
}


def profile(folder: Path, *words: str) -> dict:
    """Runs the command; the document."""
    assert main(["profile", *words, *QUICK, "--out", str(folder)]) == 0
    return json.loads((folder / "report.json").read_text())


class Page(HTMLParser):
    """Checks that tags close in order; collects ids and addresses."""

    EMPTY = ("meta", "br", "line", "rect", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.add(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        assert not {name for name, _ in attributes} & {"src", "href", "onclick", "style"}, (tag, attributes)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse_page(markup: str) -> Page:
    """The page, whose tags must close in order."""
    page = Page()
    page.feed(markup)
    page.close()
    assert page.open == []
    return page
