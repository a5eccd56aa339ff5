"""What a run shows of itself: a Markdown table, grids of pictures, and a page to sort and look through."""

import html
from pathlib import Path
from typing import Any

from ..files import write_text
from ..report import draw_grid
from .restorers import folder_name, read_pictures
from .store import Store

FIGURES = (
    "frechet", "kernel", "score", "accuracy", "distance", "psnr", "ssim", "lpips", "ms_ssim", "spread", "lpips_spread",
)  # fmt: skip
SHOWN = 500  # photographs on the page
GRID = 8


def text(figure: str, value: float) -> str:
    """A figure as people read it.

    >>> text("accuracy", 0.361), text("frechet", 6.0719), text("kernel", 0.00123)
    ('36.1%', '6.072', '0.0012')
    """
    if figure == "accuracy":
        return f"{value:.1%}"
    digits = {"kernel": 4, "frechet": 3, "ssim": 3, "lpips": 3, "ms_ssim": 3, "lpips_spread": 3}.get(figure, 2)
    return f"{value:.{digits}f}"


def _columns(results: dict[str, Any]) -> list[str]:
    return [name for name in FIGURES if any(name in row for row in results["rows"])]


def markdown(results: dict[str, Any], intervals: bool = False) -> str:
    """The table; with the 95% intervals in brackets where asked for."""
    columns = _columns(results)
    head = ["task", "images", *(results["figures"][name] for name in columns)]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in results["rows"]:
        cells = []
        for name in columns:
            figure = row.get(name)
            cell = "" if figure is None else text(name, figure["value"])
            if figure and intervals:
                cell += f" [{text(name, figure['low'])}, {text(name, figure['high'])}]"
            cells.append(cell)
        lines.append(f"| {' | '.join([row['task'], row['images'], *cells])} |")
    notes = "".join(f"\n{note}\n" for note in results["notes"])
    return "\n".join(lines) + "\n" + notes


def write_pages(output: Path, results: dict[str, Any]) -> None:
    """`results.md`, `TASK.png` and `index.html` of a run's folder."""
    settings = results["settings"]
    about = f"{settings['count']} photographs of {settings['data']}, {settings['size']} pixels, seed {settings['seed']}"
    write_text(output / "results.md", f"{about}; 95% intervals in brackets.\n\n{markdown(results, intervals=True)}")
    variants = list(dict.fromkeys(row["task"] for row in results["rows"] if row["task"] != "originals"))
    rows = {v: [row["images"] for row in results["rows"] if row["task"] == v] for v in variants}
    # those of an earlier call may have been removed
    variants = [v for v in variants if _whole(output / folder_name(v) / "inputs", settings)]
    for variant in variants:
        pictures = {row: output / folder_name(variant) / row / "pictures" for row in rows[variant]}
        rows[variant] = [r for r, folder in pictures.items() if r == "degraded" or _whole(folder, settings)]
        _write_grid(output, variant, rows[variant], settings)
    shown = "".join(_pictures(output, variant, rows[variant], settings) for variant in variants)
    page = _PAGE.format(about=html.escape(about), table=_table(results), pictures=shown)
    write_text(output / "index.html", page)


def _whole(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the pictures of a grid are there."""
    return all((folder / f"{i:05d}.png").is_file() for i in range(min(GRID, settings["count"])))


def _folders(variant: str, rows: list[str]) -> list[tuple[str, str]]:
    """(title, folder of pictures relative to the run's) of what stands side by side."""
    folder = folder_name(variant)
    shown = [(row, f"{folder}/{row}/pictures") for row in rows if row != "degraded"]
    return [("input", f"{folder}/inputs"), *shown, ("original", "originals/pictures")]


def _write_grid(output: Path, variant: str, rows: list[str], settings: dict[str, Any]) -> None:
    names = [f"{i:05d}" for i in range(min(GRID, settings["count"]))]
    size = (settings["size"], settings["size"])
    shown = [(title, read_pictures(output / folder, names, size)) for title, folder in _folders(variant, rows)]
    draw_grid(shown, output / f"{folder_name(variant)}.png")


def _table(results: dict[str, Any]) -> str:
    columns = _columns(results)
    head = "".join(f"<th>{html.escape(n)}</th>" for n in ["task", "images", *(results["figures"][c] for c in columns)])
    body = []
    for row in results["rows"]:
        cells = [f"<td>{html.escape(row['task'])}</td><td>{html.escape(row['images'])}</td>"]
        for name in columns:
            figure = row.get(name)
            if figure is None:
                cells.append("<td></td>")
                continue
            low, high = text(name, figure["low"]), text(name, figure["high"])
            cells.append(
                f'<td data-value="{figure["value"]}">{text(name, figure["value"])}<small>{low} to {high}</small></td>'
            )
        body.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in results["notes"])
    return f"<table class=sortable><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>{notes}"


def _pictures(output: Path, variant: str, rows: list[str], settings: dict[str, Any]) -> str:
    """A row for each photograph, sortable by what each restorer's picture is like."""
    number = -(-settings["count"] // settings["batch"])
    shown = [row for row in rows if row != "degraded"]
    stores = [Store(output / folder_name(variant) / row, number) for row in shown]
    values = [(store.column("psnr"), store.column("distance")) for store in stores]
    folders = _folders(variant, rows)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in ["photograph", *(title for title, _ in folders)])
    head += "".join(f"<th>PSNR, {html.escape(row)}</th><th>distance, {html.escape(row)}</th>" for row in shown)
    body = []
    for i in range(min(SHOWN, settings["count"])):
        cells = [f"<td>{i:05d}</td>"]
        for title, folder in folders:
            source = html.escape(f"{folder}/{i:05d}.png")
            cells.append(f'<td><img loading=lazy src="{source}" alt="{html.escape(title)} of {i:05d}"></td>')
        for psnr, distance in values:
            cells += [f"<td>{psnr[i]:.2f}</td>", f"<td>{distance[i]:.2f}</td>"]
        body.append(f"<tr>{''.join(cells)}</tr>")
    title = html.escape(variant)
    return (
        f"<h2>{title}</h2><div class=wide><table class=sortable><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Evaluation</title>
<style>
body{{font:15px system-ui;max-width:1200px;margin:2em auto;padding:0 1em}}
table{{border-collapse:collapse}}
th,td{{padding:4px 12px 4px 0;text-align:left;vertical-align:middle;border-bottom:1px solid #ddd}}
th button{{font:inherit;font-weight:600;border:0;background:none;padding:0;cursor:pointer;text-align:left}}
th[aria-sort=ascending] button::after{{content:" \\25B2"}}
th[aria-sort=descending] button::after{{content:" \\25BC"}}
small{{display:block;color:#666}}
.wide{{overflow:auto;max-height:80vh}}
.wide thead{{position:sticky;top:0;background:#fff}}
.wide img{{width:128px;height:128px;object-fit:contain;display:block}}
</style>
<h1>Evaluation</h1><p>{about}. Small print: 95% intervals. A click on a heading sorts.</p>
{table}
{pictures}
<script>
for (const table of document.querySelectorAll("table.sortable"))
  table.querySelectorAll("th").forEach((head, column) => {{
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.onclick = () => {{
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (a, b) => value(a).localeCompare(value(b), "en", {{numeric: true}}) || 0;
      const number = (a, b) => parseFloat(value(a)) - parseFloat(value(b));
      const body = table.tBodies[0], rows = [...body.rows];
      const blank = row => value(row) === "";
      const numeric = rows.every(row => !isNaN(value(row)));
      rows.sort((a, b) => blank(a) - blank(b) || (down ? -1 : 1) * (numeric ? number(a, b) : order(a, b)) || 0);
      body.append(...rows);
    }};
  }});
</script></html>
"""
