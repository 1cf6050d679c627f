"""What the pictures share: colours, a figure that shows itself, and where it is saved."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from revify._errors import RevifyError

BLUE, ORANGE, GREEN, PURPLE, GREY, RED = "#4477aa", "#dd8844", "#228833", "#aa3377", "#777777", "#cc3344"
_DPI = 144


class Picture(Figure):
    """A figure that a notebook shows. It is none of pyplot's, which would hold it, and may be set up for windows."""

    def _repr_png_(self) -> bytes:
        written = io.BytesIO()
        self.savefig(written, format="png", dpi=_DPI)
        return written.getvalue()


def picture(width: float, height: float) -> Picture:
    """Inches; at 5 of them text of 9 points can be read where the picture is 400 pixels wide."""
    return Picture(figsize=(width, height), layout="constrained", facecolor="white")


def checked_path(path: str | Path | None) -> Path | None:
    """Raises, before anything is measured, where nothing could be written."""
    if path is None:
        return None
    if not isinstance(path, (str, Path)):
        raise RevifyError(f"path must be the name of a file to write to, or None, got {type(path).__name__}.")
    path = Path(path)
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise RevifyError(f"path must end in one of .{', .'.join(sorted(kinds))}, got {str(path)!r}.")
    if not path.parent.is_dir():
        raise RevifyError(f"path must be in a folder that exists, got {str(path)!r}.")
    return path


def finished(figure: Figure, path: Path | None) -> Figure:
    """The figure, saved where a path is given."""
    if path is not None:
        figure.savefig(path, dpi=_DPI)
    return figure


def unit_for(largest: float) -> tuple[float, str]:
    """The bytes of the unit in which such a number of bytes can be read, and its name."""
    return (1e6, "MB") if largest >= 1e6 else (1e3, "kB")


def shortened(text: str, length: int) -> str:
    """The end of a path, which says more than its beginning."""
    return text if len(text) <= length else f"…{text[1 - length :]}"
