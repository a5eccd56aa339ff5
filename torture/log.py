"""What a harness has done: a line of JSON for each piece of work, by its name and seed, so that it goes on where it was
stopped."""

import json
from pathlib import Path
from typing import Any


class Log:
    """`name` is the key that says what was tried: each line has it, `seed`, and `problem`, which is empty if all is
    well."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        path.parent.mkdir(parents=True, exist_ok=True)

    def newest(self) -> dict[tuple[str, int], dict[str, Any]]:
        """The last line of each piece of work."""
        text = self.path.read_text() if self.path.is_file() else ""
        return {(line[self.name], line["seed"]): line for line in map(json.loads, text.splitlines())}

    def done(self) -> set[tuple[str, int]]:
        """The pieces that need not be done again."""
        return {piece for piece, line in self.newest().items() if not line["problem"]}

    def add(self, line: dict[str, Any]) -> None:
        with open(self.path, "a") as stream:
            stream.write(json.dumps(line) + "\n")

    def of(self, name: str) -> list[dict[str, Any]]:
        """The last lines of this name."""
        return [line for (what, _), line in self.newest().items() if what == name]

    def exit_code(self) -> int:
        """1 where something was found, in this call or an earlier one."""
        return int(any(line["problem"] for line in self.newest().values()))
