"""What all drawings need."""

from pathlib import Path


def check_plot(path: Path) -> None:
    """Whether a figure can be drawn there.

    Raises:
        ConfigurationError: if nothing is installed to draw with.
        InvalidArgumentError: if the file cannot be one of a figure.
    """
    from importlib.util import find_spec

    from uellm.core.errors import ConfigurationError, InvalidArgumentError

    if find_spec("matplotlib") is None:
        raise ConfigurationError("drawing needs matplotlib: pip install 'uellm[simulate]'")
    if path.suffix not in {".png", ".svg", ".pdf"} or not path.parent.is_dir():
        raise InvalidArgumentError(
            f"plot: {path}: a .png, .svg or .pdf file in a directory that exists", field="plot"
        )
