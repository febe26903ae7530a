"""Record the versions with which a framework's page has run: `python tests/frameworks/record.py lightning`."""

import csv
import datetime
import importlib.metadata
import platform
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = ROOT / "docs" / "frameworks" / "versions.csv"
HEADER = ["page", "ran on", "Python", "with"]


def main(framework: str) -> None:
    """Write or replace the framework's row, with the versions of its dependency group, of torch and of fastlars."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    required = {re.match(r"[\w-]+", requirement)[0] for requirement in groups[f"frameworks-{framework}"]} - {"pytest"}
    packages = ["fastlars", "torch", framework, *sorted(required - {framework})]
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)

    rows = {}
    if VERSIONS.exists():
        with VERSIONS.open(encoding="utf-8", newline="") as file:
            rows = {row[0]: row for row in list(csv.reader(file))[1:]}
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    rows[framework] = [framework, today, platform.python_version(), versions]
    with VERSIONS.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *(rows[name] for name in sorted(rows))])


if __name__ == "__main__":
    main(*sys.argv[1:])
