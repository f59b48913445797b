"""Installed packages that offer something by an entry point."""

from pathlib import Path


def package(directory: Path, name: str, code: str, entry_points: str) -> None:
    """Write a package of one module, as it is when installed, into a directory of the path."""
    (directory / f"{name}.py").write_text(code)
    about = directory / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(entry_points)
