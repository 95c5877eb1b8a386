r"""Captions: text with mathematics between dollars, as Markdown, LaTeX and matplotlib read it.

They stand beside the figure in a file of their own; inside the picture only where that is asked for.
"""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.figure import Figure

WHERE = ("md", "tex", "inside", "none")
"""A file for Markdown, a file for LaTeX, in the picture, nowhere."""
DEFAULT = "md"
_MATHS = re.compile(r"(?<!\\)(\$(?:\\\$|[^$])+\$)")
_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
}


def plain(text: str) -> str:
    """Text from elsewhere, such as a path, to stand in a caption: its dollars open no mathematics."""
    return text.replace("$", r"\$")


def latex(text: str) -> str:
    """A caption, or any text, for LaTeX: what is special there is escaped, mathematics between dollars is kept."""
    return "".join(
        part if number % 2 else "".join(_ESCAPES.get(char, char) for char in part.replace(r"\$", "$"))
        for number, part in enumerate(_MATHS.split(text))
    )


def write_inside(figure: Figure, text: str) -> None:
    """Into the picture, below its panels."""
    figure.supxlabel(text, fontsize="small", x=0.01, ha="left", wrap=True)


def file_of(name: str, out: Path, where: str) -> Path | None:
    """The file that a figure's caption has; None where it has none. ValueError for another place than there is."""
    if where not in WHERE:
        raise ValueError(f"no captions {where}; there are {', '.join(WHERE)}")
    return out / f"{name}.caption.{where}" if where in ("md", "tex") else None


def written(text: str, where: str) -> str:
    """As the caption's file has it."""
    return (latex(text) if where == "tex" else text) + "\n"
