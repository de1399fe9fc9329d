"""The report as one HTML page that needs no network and no other file: spectra, and a slider over the rank.

Not made of the explorers' pictures: two hundred matrices at eighty ranks would be sixteen thousand of them, and
ipywidgets' script alone is a megabyte. The page holds each spectrum once, and a script of its own draws it.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_edu.delta.compare import Comparison, by_kind, kind
from lora_edu.delta.measure import rank_grid
from lora_edu.text import printable

HERE = Path(__file__).parent / "static"
START = 8  # the rank at which the slider stands first


class Entry(NamedTuple):
    """One matrix of the page. sides: (rows, columns), of one expert where `copies` is their number.

    spectrum: (k, σ_k, share of ‖ΔW‖² in the first k), as in Figures. floor: a singular value to be drawn as a line,
    or None; above: how many are larger, or None. rank_90: the rank that holds 90 % of ‖ΔW‖². note: a word at the end
    of the row.
    """

    name: str
    kind: str
    sides: tuple[int, int]
    copies: int
    norm: float
    spectrum: Sequence[tuple[int, float, float]]
    floor: float | None
    above: int | None
    rank_90: int
    note: str


def of_comparison(found: Comparison) -> bytes:
    """The page of a `delta`: with the largest singular value that rounding could have made as a line."""
    states = {"floor": "at the rounding floor", "unmerged": "unmerged"}
    entries = []
    for name, each in found.figures.items():
        if len(each.shape) < 2 or not each.spectrum:
            continue
        sides = each.shape[-2:] if each.experts else each.sides
        note = f"the widest of {each.experts} experts" if each.experts else states.get(each.status, "")
        norm = each.delta_norm or 0.0
        short = name.removesuffix(".weight")
        where = (short, kind(name), sides, each.experts or 1, norm, each.spectrum)
        entries.append(Entry(*where, each.edge, each.above, each.rank_90, note))
    what = f"{found.before} → {found.after}" if found.before else found.after
    left_out = len([each for of in by_kind(found.figures).values() for each in of]) - len(entries)
    lead = [
        "The spectrum of ΔW = AFTER − BEFORE, matrix by matrix."
        if found.before
        else "The spectrum of s · BA, layer by layer."
    ]
    if left_out:
        lead.append(f"{left_out} matrices have no spectrum here: they are equal in both, or not finite.")
    return page(
        f"ΔW of {what}",
        lead,
        entries,
        "largest that rounding could have made",
        "are larger than any that rounding could have made",
    )


def page(title: str, lead: Iterable[str], entries: Sequence[Entry], line: str, above: str) -> bytes:
    """The page as UTF-8. line: what the floor is, in words; above: what the singular values over it are or do.

    Every name is escaped; the page's own policy lets nothing run but its script, and nothing be fetched.
    Raises ValueError where there is no matrix to show.
    """
    if not entries:
        raise ValueError("there is no spectrum to show: no matrix was measured")
    script = (HERE / "report.js").read_text(encoding="utf-8")
    style = (HERE / "report.css").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    kinds = "".join(
        f'<option value="{_text(each)}">{_text(each)}</option>'
        for each in dict.fromkeys(e.kind for e in entries)
    )
    paragraphs = "".join(f'<p class="lead">{_text(each, 2000)}</p>' for each in lead)
    rows = "\n".join(map(_row, entries))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title, 200)}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{_text(title, 400)}</h1>
{paragraphs}
<noscript><p>Scripts are off: the slider does not move, and the table shows what does not depend on it.</p></noscript>
<div class="controls">
<div><label for="rank">rank r</label><input id="rank" type="range" min="0" max="1" value="0" step="1">
<output id="rank-value" for="rank"></output>
<label for="kind">matrices</label><select id="kind"><option value="">all</option>{kinds}</select></div>
<p id="summary" role="status" aria-live="polite"></p>
</div>
<h2 id="chosen"></h2>
<svg id="plot" role="img" viewBox="0 0 720 330"></svg>
<p id="sentence"></p>
<div class="wide" tabindex="0" role="region" aria-label="All matrices">
<table>
<caption>A name shows its spectrum above. Kept: the share of ‖ΔW‖² that the chosen rank keeps.</caption>
<thead><tr><th scope="col">matrix</th><th scope="col">shape</th><th scope="col">‖ΔW‖</th>
<th scope="col">spectrum</th><th scope="col">kept</th><th scope="col">90 % at rank</th><th scope="col">above</th>
<th scope="col">note</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
</main>
<script type="application/json" id="data">{_data(entries, line, above)}</script>
<script>{script}</script>
</body>
</html>
""".encode("utf-8", "replace")


def _row(entry: Entry) -> str:
    shape = " × ".join(map(str, entry.sides))
    name = _text(entry.name).replace(".", ".<wbr>")
    return (
        f'<tr><th scope="row"><button type="button" aria-pressed="false">{name}</button></th>'
        f"<td>{f'{entry.copies} of ' if entry.copies > 1 else ''}{shape}</td><td>{entry.norm:.3g}</td>"
        '<td class="spectrum"></td>'
        '<td><span class="bar" aria-hidden="true"><i></i></span><span class="share"></span></td>'
        f"<td>{entry.rank_90}</td><td>{'' if entry.above is None else entry.above}</td>"
        f"<td>{_text(entry.note)}</td></tr>"
    )


def _data(entries: Sequence[Entry], line: str, above: str) -> str:
    """What the script draws from, as JSON that can't end its own element."""

    def digits(value: float, count: int = 4) -> float:
        return float(f"{value:.{count}g}") if math.isfinite(value) else 0.0

    matrices = [
        {
            "name": printable(entry.name),
            "kind": printable(entry.kind),
            "rows": entry.sides[0],
            "columns": entry.sides[1],
            "copies": entry.copies,
            "norm": digits(entry.norm),
            "last": entry.spectrum[-1][0],
            "floor": None if entry.floor is None else digits(entry.floor),
            "above": entry.above,
            "sigma": [digits(sigma) for _, sigma, _ in entry.spectrum],
            "energy": [digits(share, 5) for _, _, share in entry.spectrum],
        }
        for entry in entries
    ]
    longest = max(each["last"] for each in matrices)
    told = {
        "ranks": rank_grid(longest),
        "start": min(START, longest),
        "line": line,
        "above": above,
        "matrices": matrices,
    }
    return (
        json.dumps(told, ensure_ascii=True, separators=(",", ":"))
        .replace("<", "\\u003c")
        .replace("&", "\\u0026")
    )


def _text(value: str, most: int = 120) -> str:
    return html.escape(printable(value, most), quote=True)
