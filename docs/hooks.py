"""Sections of other files in a page: `{{ README.md: Train }}` is what stands below that heading, `{{ README.md }}` what
stands before the second one. So nothing is written twice."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def section(text: str, heading: str) -> str:
    """What stands between a heading and the next of its level or above; headings within blocks of code are none."""
    prose = re.sub(r"(?ms)^```.*?^```", lambda block: re.sub(r"(?m)^#", "\0", block[0]), text)
    begin = re.search(rf"(?m)^(#+) {re.escape(heading)}$" if heading else r"(?m)\A(#) .*$", prose)
    if begin is None:
        raise ValueError(f"no heading {heading!r}")
    rest = prose[begin.end() :]
    end = re.search(rf"(?m)^#{{1,{max(2, len(begin[1]))}}} ", rest)
    return rest[: end.start() if end else None].replace("\0", "#").strip("\n")  # indentation is a block of code


def included(markdown: str) -> str:
    """A page with its sections; their links are turned to where the page lies."""

    def include(match: re.Match) -> str:
        text = section((ROOT / match[1]).read_text(), (match[2] or "").strip())
        return text.replace("](docs/", "](")

    return re.sub(r"(?m)^\{\{ *([\w/.-]+)(?::([^}]*))? *\}\}$", include, markdown)


def on_page_markdown(markdown: str, **_: object) -> str:
    return included(markdown)
