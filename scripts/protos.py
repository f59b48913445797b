"""Generate the Python stubs of ``protos/``, or check that the ones checked in are current.

Usage: ``python scripts/protos.py [--check]``
"""

import argparse
import filecmp
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUBS = ROOT / "uellm" / "v1"


def generate(out: Path) -> None:
    """Write ``uellm/v1/*_pb2*.py`` and their type stubs below ``out``."""
    protos = sorted((ROOT / "protos").rglob("*.proto"))
    bin_dir = Path(sys.executable).parent
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"--proto_path={ROOT / 'protos'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
        *map(str, protos),
    ]
    subprocess.run(command, check=True)
    package = out / "uellm" / "v1"
    (package / "__init__.py").write_text('"""Generated from ``protos/uellm/v1``: do not edit."""\n')
    # The order of typing aliases in mypy-protobuf's output varies with nothing; only trailing
    # blanks do, and git dislikes them.
    for path in package.glob("*.py*"):
        path.write_text(re.sub(r"[ \t]+\n", "\n", path.read_text()))


def main() -> int:
    """Generate, or with ``--check`` compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a stub is stale")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        generate(out)
        fresh = {path.name: path for path in (out / "uellm" / "v1").iterdir()}
        present = {path.name for path in STUBS.iterdir() if path.is_file()}
        stale = sorted(
            name
            for name in fresh.keys() | present
            if name not in present
            or name not in fresh
            or not filecmp.cmp(fresh[name], STUBS / name, shallow=False)
        )
        if arguments.check:
            for name in stale:
                print(f"stale: uellm/v1/{name}: run `make protos`")
            return 1 if stale else 0
        for name in stale:
            if name in fresh:
                (STUBS / name).write_bytes(fresh[name].read_bytes())
            else:
                (STUBS / name).unlink()
        print(f"{len(stale)} of {len(fresh)} stubs changed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
