"""Check that the protos break no client of the version that is on main.

Compares with the merge base of main, or, on main itself, with the commit before; does nothing
where there is none, as in a shallow clone.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def main() -> int:
    """Run ``buf breaking`` against the version before."""
    if shutil.which("git") is None:
        return 0
    head = _git("rev-parse", "HEAD")
    base = _git("merge-base", "HEAD", "main") or _git("merge-base", "HEAD", "origin/main")
    base = base if base and base != head else _git("rev-parse", "HEAD~1")
    if not base or not _git("ls-tree", base, "protos"):
        print("breaking: no earlier version to compare with")
        return 0
    buf = Path(sys.executable).parent / "buf"
    against = f".git#ref={base},subdir=."
    return subprocess.run([buf, "breaking", "--against", against], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
