"""How `ztna lab matrix` shows pairs of NATs: a table, JSON, and a picture in SVG.

All three keep apart what was measured (path, time until it was in use) and what is expected of the
two NATs at best (`core.reachability`).
"""

from collections.abc import Sequence
from html import escape
from typing import Any

import attrs
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ztna.core.reachability import How
from ztna.nat.spec import NAMES, NatSpec
from ztna.roles.lab_matrix import PairOutcome

# Never to be read as measured, also without colours.
_SHORT = {
    How.SIMULTANEOUS_OPEN: "~open",
    How.PREDICTION: "~guess",
    How.BIRTHDAY: "~luck",
    How.RELAY: "~relay",
    How.RELAY_OVER_TCP: "~tcp",
}
_COLOURS = {
    How.SIMULTANEOUS_OPEN: ("green", "#c7e9c0"),
    How.PREDICTION: ("green", "#e5f5e0"),
    How.BIRTHDAY: ("yellow", "#fff3c4"),
    How.RELAY: ("magenta", "#fddbc7"),
    How.RELAY_OVER_TCP: ("red", "#f4a582"),
}
_NO_PATH = "none"

# Pixels.
_LEFT, _TOP, _CELL, _ROW, _LINE = 170, 150, 104, 44, 18
_STYLE = (
    "text{font:13px sans-serif;fill:#222}.small{font-size:11px;fill:#555}"
    ".title{font-size:16px;font-weight:bold}.direct{font-weight:bold}"
)


@attrs.frozen
class Matrix:
    """What was measured, and where. laboratory: "memory" or "kernel". conditions: in words, for
    whoever reads the figures. command: what makes it again."""

    laboratory: str
    conditions: str
    command: str
    pairs: Sequence[PairOutcome]

    @property
    def agents(self) -> list[NatSpec]:
        """What agents were behind, in order."""
        return list(dict.fromkeys(pair.agent for pair in self.pairs))

    @property
    def connectors(self) -> list[NatSpec]:
        """What connectors were behind, in order."""
        return list(dict.fromkeys(pair.connector for pair in self.pairs))

    def pair(self, agent: NatSpec, connector: NatSpec) -> PairOutcome | None:
        """One cell."""
        wanted = (agent, connector)
        return next((one for one in self.pairs if (one.agent, one.connector) == wanted), None)


def as_json(matrix: Matrix) -> dict[str, Any]:
    """For programs. Times in seconds, medians of the runs; a path of null: no packet was answered.
    Of punching: of the time to the direct path, what passed since the session was on the relay."""
    return {
        "laboratory": matrix.laboratory,
        "conditions": matrix.conditions,
        "command": matrix.command,
        "pairs": [
            {
                "agent_nat": pair.agent.words,
                "connector_nat": pair.connector.words,
                "measured": {
                    "path": pair.path,
                    "seconds_to_first_answer": (
                        None if pair.seconds is None else round(pair.seconds, 4)
                    ),
                    "seconds_to_direct_path": (
                        None if pair.direct is None else round(pair.direct, 4)
                    ),
                    "seconds_of_punching": (
                        None if pair.punched is None else round(pair.punched, 4)
                    ),
                    "runs": len(pair.runs),
                    "runs_with_direct_path": pair.direct_runs,
                    "all_seconds_to_direct_path": [
                        None if run.direct is None else round(run.direct, 4) for run in pair.runs
                    ],
                },
                "expected_not_measured": {
                    "technique": pair.expected.name.lower(),
                    "words": pair.expected.words,
                },
            }
            for pair in matrix.pairs
        ],
    }


def render(matrix: Matrix) -> RenderableType:
    """For a terminal: a grid where every pair was measured, else a line a pair."""
    square = matrix.agents == matrix.connectors
    grid = square and len(matrix.pairs) == len(matrix.agents) ** 2
    table = _grid(matrix) if grid else _lines(matrix)
    legend = Text("~ what can be expected at best, not measured:", style="bold")
    for how in How:
        if any(pair.expected is how for pair in matrix.pairs):
            legend.append(f"\n  {_SHORT[how]:<8}", style=f"not bold {_COLOURS[how][0]}")
            legend.append(how.words, style="not bold")
    conditions = f"Measured: {_measured_words(matrix)}."
    return Group(table, Text(conditions), legend)


def _grid(matrix: Matrix) -> Table:
    """Nine kinds of NAT fit into 80 columns."""
    table = Table(
        title=_title(matrix), box=SIMPLE_HEAD, padding=0, show_edge=False, show_lines=True
    )
    table.add_column("agent \\\n connector", no_wrap=True)
    for number in range(1, len(matrix.connectors) + 1):
        table.add_column(f"\n{number}", no_wrap=True)
    for number, agent in enumerate(matrix.agents, 1):
        # Where both sides have the same NATs, a column is known by its row's number.
        name = _name(agent).replace("-", "-\n  ", 1)
        cells = [Text(f"{number} {name}")]
        for connector in matrix.connectors:
            pair = matrix.pair(agent, connector)
            assert pair is not None
            cell = Text("\n".join(_measured(pair)) + _share(pair), style="bold")
            short = f"\n{_SHORT[pair.expected]}"
            cells.append(cell.append(short, style=f"not bold {_COLOURS[pair.expected][0]}"))
        table.add_row(*cells)
    return table


def _lines(matrix: Matrix) -> Table:
    table = Table("agent", "connector", "measured", "~ expected", title=_title(matrix))
    for pair in matrix.pairs:
        expected = Text(_SHORT[pair.expected], style=_COLOURS[pair.expected][0])
        measured = " ".join(_measured(pair)) + _share(pair)
        table.add_row(_name(pair.agent), _name(pair.connector), measured, expected)
    return table


def as_svg(matrix: Matrix) -> str:
    """A picture: a cell a pair, coloured by what is expected, with what was measured in it."""
    agents, connectors = matrix.agents, matrix.connectors
    shown = [how for how in How if any(pair.expected is how for pair in matrix.pairs)]
    below = _TOP + _ROW * len(agents)
    width = max(_LEFT + _CELL * len(connectors) + 60, 960)
    height = below + _LINE * (len(shown) + 5)
    size = f'width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{escape(_title(matrix))}</title>",
        f"<desc>{escape(matrix.command)}</desc>",
        f"<style>{_STYLE}</style>",
        f'<rect {size} fill="#fff"/>',
        _text(12, 26, _title(matrix), "title"),
        _text(12, 46, f"In each cell, measured: {_measured_words(matrix)}.", "small"),
        _text(12, _TOP - 8, "agent \\ connector", "small"),
    ]
    for column, nat in enumerate(connectors):
        x, y = _LEFT + _CELL * column + _CELL // 3, _TOP - 8
        name = escape(_name(nat))
        parts.append(f'<text x="{x}" y="{y}" transform="rotate(-30 {x} {y})">{name}</text>')
    for row, agent in enumerate(agents):
        y = _TOP + _ROW * row
        parts.append(_text(12, y + 26, _name(agent)))
        for column, connector in enumerate(connectors):
            pair = matrix.pair(agent, connector)
            if pair is not None:
                parts.append(_cell(_LEFT + _CELL * column, y, pair))
    words = "Colour and ~: what can be expected at best, not measured. Bold: found a direct path."
    parts.append(_text(12, below + 28, words))
    for line, how in enumerate(shown):
        y = below + 28 + _LINE * (line + 1)
        colour = _COLOURS[how][1]
        parts.append(f'<rect x="12" y="{y - 11}" width="14" height="13" fill="{colour}"/>')
        parts.append(_text(32, y, f"{_SHORT[how]}: {how.words}"))
    parts.append(_text(12, height - 14, f"Made by: {matrix.command}", "small"))
    return "\n".join([*parts, "</svg>\n"])


def _cell(x: int, y: int, pair: PairOutcome) -> str:
    colour = _COLOURS[pair.expected][1]
    return (
        f'<g><rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_ROW - 2}" fill="{colour}"/>'
        + _text(x + 6, y + 18, " ".join(_measured(pair)), "direct" if pair.path == "direct" else "")
        + _text(x + 6, y + 34, f"{_SHORT[pair.expected]}{_share(pair)}", "small")
        + "</g>"
    )


def _text(x: int, y: int, words: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x}" y="{y}"{kind}>{escape(words)}</text>'


def _title(matrix: Matrix) -> str:
    where = "in memory" if matrix.laboratory == "memory" else "in the kernel"
    return f"Agent and connector behind NATs, {where}"


def _measured_words(matrix: Matrix) -> str:
    return (
        f"the path, and the time from the agent's start until it was in use ({matrix.conditions}); "
        f"{_NO_PATH}: nothing was answered"
        + "; n/m: n of m runs had a direct path"
        * any(len(pair.runs) > 1 for pair in matrix.pairs)
    )


def _measured(pair: PairOutcome) -> tuple[str, ...]:
    """Path and time."""
    if pair.seconds is None or pair.path is None:
        return (_NO_PATH,)
    seconds = pair.seconds if pair.direct is None else pair.direct
    words = f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    return pair.path, words


def _share(pair: PairOutcome) -> str:
    """How many of the runs, where there are several."""
    return f" {pair.direct_runs}/{len(pair.runs)}" if len(pair.runs) > 1 else ""


def _name(nat: NatSpec) -> str:
    """The name that people use, where there is one."""
    return next((name for name, known in NAMES.items() if known == nat), nat.words)
