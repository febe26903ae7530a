"""A pytest plugin that records which lines of the package each test executes, also in processes that it starts.

`mutants.py` loads it (-p executed_lines) with the folder EXECUTED_LINES in the environment, where every process writes a
file. A process that a test starts loads this module through `sitecustomize` and records when it ran its lines, which
assigns them to the test that ran at that time. Lines of a process that is killed between two answers are lost.
"""

import atexit
import json
import multiprocessing.connection
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

STARTED = "EXECUTED_LINES_OF"  # the process of the tests, in the environment of the processes that it starts


class Lines:
    """The lines that this process executes, by label."""

    def __init__(self) -> None:
        self._coverage = coverage.Coverage(data_file=None, config_file=False, include=["*/src/fastlars/**"])
        self._coverage.set_option("run:disable_warnings", ["no-data-collected"])  # warnings are errors here
        self._coverage.start()

    def label(self, label: str) -> None:
        self._coverage.switch_context(label)

    def by_label(self) -> dict[str, dict[str, list[int]]]:
        found: dict[str, Any] = defaultdict(lambda: defaultdict(list))
        data = self._coverage.get_data()
        for path in data.measured_files():
            for line, labels in data.contexts_by_lineno(path).items():
                for label in labels:
                    found[label][Path(path).as_posix().rpartition("/src/fastlars/")[2]].append(line)
        return found


class Plugin:
    """In the process of the tests, one row per test."""

    def __init__(self) -> None:
        self._lines = Lines()
        self._rows: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep EXECUTED_LINES_CASES of each test's cases, evenly spread, because a few show the lines of a sweep."""
        most = int(os.environ.get("EXECUTED_LINES_CASES", "0"))
        if most:
            of = defaultdict(list)
            for item in items:
                of[item.nodeid.partition("[")[0]].append(item)
            kept = {case for cases in of.values() for case in cases[:: -(-len(cases) // most)]}
            config.hook.pytest_deselected(items=[item for item in items if item not in kept])
            items[:] = [item for item in items if item in kept]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._lines.label(item.nodeid)
        row = self._rows[item.nodeid] = {"begin": time.time(), "outcome": "passed"}
        before = sum(os.times()[:4])  # CPU time, including processes that have ended
        result = yield
        row["seconds"] = sum(os.times()[:4]) - before
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self._rows and report.outcome != "passed":
            self._rows[report.nodeid]["outcome"] = report.outcome

    def pytest_sessionfinish(self) -> None:
        lines = self._lines.by_label()
        with Path(os.environ["EXECUTED_LINES"], f"tests-{os.getpid()}.jsonl").open("w") as file:
            rows = ({"test": test, **row, "lines": lines.get(test, {})} for test, row in self._rows.items())
            file.writelines(json.dumps(row) + "\n" for row in rows)


def pytest_configure(config: pytest.Config) -> None:
    """In the only process of the tests, or in each of xdist's."""
    if os.environ.get(STARTED, "main") == "main" and not config.getoption("numprocesses", None):
        os.environ[STARTED] = str(os.getpid())
        config.pluginmanager.register(Plugin())


def trace_what_a_test_started() -> None:
    """Write the lines when the process ends, and before every answer of a rank, because ranks are killed."""
    lines = Lines()
    written: set[str] = set()

    def write() -> None:
        with Path(os.environ["EXECUTED_LINES"], f"started-by-{os.environ[STARTED]}.jsonl").open("a") as file:
            for label, executed in lines.by_label().items():
                if label not in written:
                    file.write(json.dumps({"at": time.time(), "lines": executed}) + "\n")
                    written.add(label)
        lines.label(f"after {time.time()}")

    send = multiprocessing.connection.Connection.send

    def send_after_writing(connection: Any, value: Any) -> None:
        write()
        send(connection, value)

    multiprocessing.connection.Connection.send = send_after_writing
    atexit.register(write)
