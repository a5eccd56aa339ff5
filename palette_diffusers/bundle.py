"""The code that a published repository carries, for those who lack this package: rooms => one file each.

A loader copies one file of a component, and only what that file itself imports, into a folder that all repositories
share: so each file stands alone, and its name is this package's.
"""

import ast
from importlib import resources

PIPELINE = (
    "color", "masks", "canvas", "coefficients", "machine", "sizes", "hints", "tasks", "scheduler", "texture", "unet",
    "checkpoint", "speed", "winograd", "optimize", "norms", "pipeline",
)  # fmt: skip
FILES = {
    "palette_pipeline.py": PIPELINE,
    "unet/palette_unet.py": ("scheduler", "unet"),
    "scheduler/palette_scheduler.py": ("scheduler",),
}
COMPONENTS = {
    "PaletteUNet2DModel": "palette_unet",
    "PaletteScheduler": "palette_scheduler",
    "PalettePipeline": "palette_pipeline",
}


def bundle(rooms: tuple[str, ...], version: str) -> str:
    """The rooms' code, in this order, as one module: what they import of each other is already there.

    Raises:
        ValueError: two rooms define the same name, or one imports a room that isn't among them.
    """
    head = f'"""Palette, from palette-diffusers {version} (Apache License 2.0): {", ".join(rooms)}.\n\nGenerated.\n"""'
    parts = [head, "import sys"]
    owners: dict[str, str] = {}
    for room in rooms:
        source = resources.files(__package__).joinpath(f"{room}.py").read_text(encoding="utf-8")
        lines, tree = source.splitlines(), ast.parse(source)
        for name in _defined(tree):
            if owners.setdefault(name, room) != room:
                raise ValueError(f"{owners[name]}.py and {room}.py both define {name}: one file can't hold both")
        for node in reversed(tree.body):
            if isinstance(node, ast.ImportFrom) and node.level:
                lines[node.lineno - 1 : node.end_lineno] = _local(node, rooms, room)
        parts.append(f"# {room}\n\n" + "\n".join(lines).strip())
    text = "\n\n\n".join(parts) + "\n"
    for inner in ast.walk(ast.parse(text)):
        if isinstance(inner, ast.ImportFrom) and inner.level:
            raise ValueError(f"`{ast.unparse(inner)}` is inside a function: one file can't hold it")
    return text


def _defined(tree: ast.Module) -> list[str]:
    names = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def _local(node: ast.ImportFrom, rooms: tuple[str, ...], room: str) -> list[str]:
    """`from . import canvas` => this module under that name; `from .canvas import read` => nothing."""
    wanted = [node.module] if node.module else [alias.name for alias in node.names]
    missing = [name for name in wanted if name not in rooms]
    renamed = [alias.name for alias in node.names if alias.asname]
    if missing or renamed:
        raise ValueError(f"{room}.py imports {', '.join(missing or renamed)}, which the published file can't hold")
    return [] if node.module else [f"{name} = sys.modules[__name__]" for name in wanted]
