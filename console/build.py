"""Builds the console with npm, and records from which sources it was built.

python3 console/build.py            builds into src/headrace/console
python3 console/build.py --check    builds, and fails if the result is not what is there
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILT = HERE / "dist"
SHIPPED = HERE.parent / "src" / "headrace" / "console"
RECORD = "build.json"
_CONFIGURATION = ("index.html", "package-lock.json", "package.json", "tsconfig.json")


def sources() -> str:
    """Return a digest of all that the build reads."""
    paths = [HERE / name for name in (*_CONFIGURATION, "vite.config.ts")]
    paths += [path for folder in ("src", "public") for path in (HERE / folder).rglob("*")]
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        digest.update(f"{path.relative_to(HERE).as_posix()} {_digest(path)}\n".encode())
    return digest.hexdigest()


def files(folder: Path) -> dict[str, str]:
    """Return the digests of the built files in a folder, by their names."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != RECORD]
    return {path.name: _digest(path) for path in paths}


def record(folder: Path) -> dict[str, object]:
    """Return the record of a build: its sources and its files."""
    return {"sources": sources(), "files": files(folder)}


def build() -> None:
    """Build into `console/dist`, with the packages of the lock.

    Without npm, or without the packages, the exit status is 75, for which it may be tried again.
    """
    npm = shutil.which("npm")
    if npm is None:
        print("npm is needed to build the console; users of Headrace do not need it.")
        raise SystemExit(os.EX_TEMPFAIL)
    if subprocess.run([npm, "ci"], cwd=HERE, check=False, timeout=120).returncode:
        print("npm could not install the packages that build the console.")
        raise SystemExit(os.EX_TEMPFAIL)
    subprocess.run([npm, "run", "build"], cwd=HERE, check=True)


def main(arguments: list[str]) -> None:
    """Build, and compare with or replace what is shipped."""
    build()
    if arguments == ["--check"]:
        shipped = json.loads((SHIPPED / RECORD).read_text())
        if shipped != record(BUILT):
            raise SystemExit("src/headrace/console is not what scripts/console builds.")
        print("src/headrace/console is what its sources build.")
        return
    shutil.rmtree(SHIPPED, ignore_errors=True)
    shutil.copytree(BUILT, SHIPPED)
    text = json.dumps(record(SHIPPED), indent=2) + "\n"
    (SHIPPED / RECORD).write_text(text, encoding="utf-8")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
