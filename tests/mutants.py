"""Does a test fail if the package is wrong? Runs the tests on mutants of src/fastlars, drawn from a seed.

    python tests/mutants.py record FOLDER -- [pytest's options]   which test executes which line, and for how long
    python tests/mutants.py run FOLDER RESULTS                    adds one line per mutant to RESULTS; resumes if stopped
    python tests/mutants.py compare BEFORE AFTER                  lists mutants that BEFORE killed and AFTER does not

A mutant is one small change: another operator, comparison or constant, a condition negated or forced, an argument dropped
or two swapped, a statement dropped. Docstrings, annotations and types, imports, assertions, f-strings and the text of
messages are not mutated. The sample depends only on the source, the seed and the number. Each file has its share of it.

The tests that execute a mutant's statement run on it, fastest first, until one fails (killed), all have passed (survived),
or the CPU limit is reached (undecided). Code that runs at import (statements of a module or class, decorators, defaults)
counts as executed by the tests that execute a line of its function, else of its file, else by all tests. Of these, the
tests of the file named after the module run first. Triton's kernels count where the interpreter runs them. TorchScript and
torch.compile read code in their own way, which is not recorded. So a line that nothing executes runs the tests of both, and
is uncovered if they do not kill it.
"""

# ruff: noqa: T201  this program prints
from __future__ import annotations

import argparse
import ast
import bisect
import builtins
import collections
import contextlib
import copy
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
INTERPRETED = "triton_interpreted.py"  # runs in Triton's interpreter
TRACED = """import os
if os.environ.get("EXECUTED_LINES_OF", "main") != "main":
    import executed_lines
    executed_lines.trace_what_a_test_started()
"""
IMPORTED = ("numpy", "pytest", "hypothesis", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor")
READ_BY_COMPILERS = ("test_script.py", "test_compile.py")
FIRST = 15  # run these tests first: they kill most mutants, and collecting all tests takes longer

SWAPS: dict[type[ast.AST], type[ast.AST]] = {}
for pair in (
    (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn), (ast.And, ast.Or), (ast.BitAnd, ast.BitOr),
):  # fmt: skip
    SWAPS |= dict([pair, pair[::-1]])
SWAPS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult}
DROPPED = (ast.Assign, ast.AugAssign, ast.Return, ast.Raise, ast.Delete, ast.Continue, ast.Break)
DATA_TYPES = {name for name, value in vars(builtins).items() if isinstance(value, type)}


@dataclass(frozen=True)
class Mutant:
    file: str  # in the package
    line: int
    start: int  # byte range in the file that is replaced
    end: int
    new: str
    lines: frozenset[int]  # a test that executes one of these lines may kill it; empty: any test
    imported: bool  # these lines run at import

    def source(self, path: Path) -> bytes:
        old = path.read_bytes()
        return old[: self.start] + self.new.encode() + old[self.end :]

    def name(self, path: Path) -> str:
        old = path.read_bytes()[self.start : self.end].decode()
        return f"{self.file}:{self.line} {self.start}: " + re.sub(r"\s+", " ", f"{old} -> {self.new}")


# ---------------------------------------------------------------- what can be changed
def mutants_of(package: Path, file: str) -> list[Mutant]:
    """All candidates, in the order of the file. A few do not compile."""
    source = (package / file).read_bytes()
    starts = [0, *(match.end() for match in re.finditer(b"\n", source))]
    module = ast.parse(source)
    of_functions = frozenset(
        line for node in ast.walk(module) if isinstance(node, ast.FunctionDef) for line in _body_lines(node)
    )
    found: dict[tuple[int, int, str], Mutant] = {}

    def visit(node: ast.AST, lines: frozenset[int], inside: bool) -> None:
        if _is_left_alone(node):
            return
        if isinstance(node, ast.stmt):
            last = max((child.end_lineno or 0 for child in _header(node)), default=node.end_lineno or 0)
            lines = frozenset(range(node.lineno, last + 1)) if inside else of_functions
        for new in changes(node, inside):
            start = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
            end = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
            mutant = Mutant(file, node.lineno, start, end, new, lines, not inside)  # type: ignore[attr-defined]
            found.setdefault((start, end, new), mutant)
        for field, child in _children(node):
            if isinstance(node, ast.FunctionDef):
                is_body = field == "body"
                visit(child, lines if is_body else frozenset(_body_lines(node)), is_body)
            elif not (isinstance(node, ast.Raise) and isinstance(child, ast.Call)):  # its text
                visit(child, lines, inside and not isinstance(node, ast.ClassDef))

    visit(module, frozenset(), False)
    return [mutant for _, mutant in sorted(found.items())]


def changes(node: ast.AST, inside: bool) -> Iterator[str]:
    """Possible replacements of a node."""
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        yield _changed(node, op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.AugAssign) and type(node.op) in SWAPS:
        yield _changed(node, op=SWAPS[type(node.op)]())[1:-1]
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield _changed(node, ops=[*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1 :]])
    elif isinstance(node, ast.UnaryOp):
        yield f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield str(not node.value)
        elif isinstance(node.value, (int, float)):
            yield repr(node.value + 1 if isinstance(node.value, int) else node.value * 2 or 1.0)
        elif isinstance(node.value, str) and node.value.isidentifier():
            yield repr(f"{node.value}_")
    elif isinstance(node, ast.Call):
        if node.args:  # the last one: a replacement of the wrong type, which any test sees
            yield _changed(node, args=node.args[:-1])
        for i in range(len(node.keywords)):
            yield _changed(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])
        if len(node.args) > 1 and not any(isinstance(arg, ast.Starred) for arg in node.args[:2]):
            yield _changed(node, args=[node.args[1], node.args[0], *node.args[2:]])
    if inside and (isinstance(node, DROPPED) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))):
        yield "pass"
    # a condition is visited as a child of the node it decides
    for test in [getattr(node, "test", None), *getattr(node, "ifs", [])]:
        if isinstance(test, ast.expr):
            test.forced = True  # type: ignore[attr-defined]
    if getattr(node, "forced", False):
        yield from (f"(not ({ast.unparse(node)}))", "(True)", "(False)")


def _changed(node: ast.AST, **fields: Any) -> str:
    new = copy.copy(node)
    vars(new).update(fields)
    return f"({ast.unparse(new)})"


def _is_left_alone(node: ast.AST) -> bool:
    """Docstrings, f-strings, assertions, annotations, names like __all__, and imports."""
    if isinstance(node, (ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom, ast.Global)):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]).startswith("__")
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        # Optional[...], dict[...], but not TABLE[...]
        return node.value.id in DATA_TYPES or (node.value.id.istitle() and len(node.value.id) > 1)
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "cast"


def _children(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "keywords" if isinstance(node, ast.ClassDef) else ""):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield field, child


def _header(node: ast.stmt) -> list[Any]:
    """The expressions that a statement evaluates itself, without the statements inside it."""
    children = [
        child.context_expr if isinstance(child, ast.withitem) else child for child in ast.iter_child_nodes(node)
    ]
    return [child for child in children if isinstance(child, ast.expr)]


def _body_lines(function: ast.FunctionDef) -> set[int]:
    return {node.lineno for statement in function.body for node in ast.walk(statement) if isinstance(node, ast.stmt)}


def _is_mutant(mutant: Mutant, path: Path) -> bool:
    """Whether it compiles, to different code."""
    source = mutant.source(path)
    try:
        compile(source, path, "exec")
    except (SyntaxError, ValueError):
        return False
    return ast.dump(ast.parse(source)) != ast.dump(ast.parse(path.read_bytes()))


def sample(package: Path, number: int, seed: int) -> list[Mutant]:
    """`number` mutants, in proportion to each file's candidates (largest remainders)."""
    files = sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py"))
    candidates = {file: mutants_of(package, file) for file in files}
    total = sum(map(len, candidates.values()))
    shares = {name: number * len(found) / total for name, found in candidates.items()}
    counts = {name: int(share) for name, share in shares.items()}
    for name in sorted(shares, key=lambda name: counts[name] - shares[name])[: number - sum(counts.values())]:
        counts[name] += 1
    rng = random.Random(seed)
    drawn: list[Mutant] = []
    for name, found in candidates.items():
        shuffled = (mutant for mutant in rng.sample(found, len(found)) if _is_mutant(mutant, package / name))
        drawn += itertools.islice(shuffled, counts[name])
    return drawn


# ---------------------------------------------------------------- which tests execute it
@dataclass(frozen=True, eq=False)
class Case:
    """A test with its parameters."""

    name: str
    seconds: float
    lines: dict[str, set[int]]


def record(arguments: argparse.Namespace) -> None:
    """Run pytest with these options on a checkout, and record what each test executes."""
    root, folder = arguments.root.resolve(), arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as custom:
        Path(custom, "sitecustomize.py").write_text(TRACED)
        path = os.pathsep.join([custom, str(root / "src"), str(HERE)])
        environment = {"PYTHONPATH": path, "EXECUTED_LINES": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-p", "executed_lines", "-p", "no:cacheprovider"]
        subprocess.run([*command, *arguments.options], cwd=root, env={**os.environ, **environment}, check=False)


def recorded(folder: Path) -> list[Case]:
    """The tests that passed, and the lines that they and the processes they started executed."""
    found = []
    for path in folder.glob("tests-*.jsonl"):
        rows = sorted(map(json.loads, path.open()), key=lambda row: row["begin"])
        begins = [row["begin"] for row in rows]
        lines = [{file: set(numbers) for file, numbers in row["lines"].items()} for row in rows]
        started = folder / path.name.replace("tests-", "started-by-")
        for answer in map(json.loads, started.open() if started.exists() else []):
            for file, numbers in answer["lines"].items():
                lines[bisect.bisect(begins, answer["at"]) - 1].setdefault(file, set()).update(numbers)
        timed = zip(rows, lines, strict=True)
        found += [Case(row["test"], row["seconds"], known) for row, known in timed if row["outcome"] == "passed"]
    return found


def killers(mutant: Mutant, tests: list[Case]) -> list[Case]:
    """The tests that execute a mutant, in the order to run them."""
    able = [test for test in tests if not mutant.lines or mutant.lines & test.lines.get(mutant.file, set())]
    own = f"test_{Path(mutant.file).name}::"
    able.sort(key=lambda test: test.seconds)
    seen: dict[str, int] = {}
    keys = {}
    for test in able:
        # the n-th case of a test counts n-fold, so that each test runs early
        function = test.name.partition("[")[0]
        seen[function] = seen.get(function, 0) + 1
        keys[test] = (mutant.imported and own not in test.name, max(test.seconds, 0.02) * seen[function])
    return sorted(able, key=keys.__getitem__)


# ---------------------------------------------------------------- running them
class Runner:
    """Runs tests on a copy of the package, in forks of a process that has imported what is slow but not the package."""

    def __init__(self, root: Path, interpreted: bool) -> None:
        self._root, self._interpreted = root, interpreted
        self._pipe: Any = None

    def run(self, source: str, tests: list[str], seconds: float) -> dict[str, Any]:
        if self._pipe is None:
            self._start()
        self._pipe.send((source, tests, seconds))
        return self._pipe.recv()  # type: ignore[no-any-return]

    def _start(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        if os.fork() == 0:  # not multiprocessing.Process, because some of its processes may not have children
            self._pipe.close()
            with contextlib.suppress(EOFError):
                _serve(self._root, self._interpreted, theirs)
            os._exit(0)
        theirs.close()


def _serve(root: Path, interpreted: bool, pipe: Any) -> None:
    os.chdir(root)
    # threads do not survive a fork, and plugins only cost time
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.environ["TRITON_INTERPRET"] = str(int(interpreted))
    for name in IMPORTED:
        import_module(name)
    while True:
        pipe.send(_fork(*pipe.recv()))


def _fork(source: str, tests: list[str], seconds: float) -> dict[str, Any]:
    """Exit status (None at the limit), the test that failed, and the CPU seconds of all processes but killed ones."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(silence, stream)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))
        os.environ["PYTHONPATH"] = source
        sys.path.insert(0, source)
        os._exit(int(import_module("pytest").main(["-x", "-p", "no:cacheprovider", *tests], [_Report(writing)])))
    os.close(writing)
    deadline = time.monotonic() + 60 + 8 * seconds  # waiting takes no CPU time
    while not (ended := os.wait4(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended[0]:
        ended = os.wait4(child, 0)
    with open(reading) as file:  # noqa: PTH123  a descriptor
        failed = file.read()
    status = os.waitstatus_to_exitcode(ended[1])
    out_of_time = status in (-signal.SIGXCPU, -signal.SIGKILL)
    return {"status": None if out_of_time else status, "killer": failed, "cpu": ended[2].ru_utime + ended[2].ru_stime}


class _Report:
    """A pytest plugin that writes which test failed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            os.write(self._descriptor, report.nodeid.encode())

    pytest_collectreport = pytest_runtest_logreport


def judge(mutant: Mutant, cases: list[Case], root: Path, seconds: float, runners: list[Runner]) -> dict[str, Any]:
    """The verdict on a mutant: killed, survived, undecided or uncovered."""
    package = root / "src" / "fastlars"
    executed = killers(mutant, cases)
    order = executed or sorted(
        (case for case in cases if any(file in case.name for file in READ_BY_COMPILERS)), key=lambda case: case.seconds
    )
    batches = [
        (interpreted, [case for case in batch if (INTERPRETED in case.name) == interpreted])
        for batch in (order[:FIRST], order[FIRST:]) for interpreted in (False, True)
    ]  # fmt: skip
    state, killer, cpu = "survived", "", 0.0
    with tempfile.TemporaryDirectory() as source:
        copied = shutil.copytree(package, Path(source, "fastlars"), ignore=shutil.ignore_patterns("__pycache__"))
        (copied / mutant.file).write_bytes(mutant.source(package / mutant.file))
        for interpreted, batch in batches:
            if not batch or state != "survived":
                continue
            # more are not reached, and finding them takes time
            within = bisect.bisect(list(itertools.accumulate(case.seconds for case in batch)), 2 * (seconds - cpu)) + 1
            names = [case.name for case in batch[:within]]
            answer = runners[interpreted].run(source, names, seconds - cpu)
            if answer["status"] in (4, 5):  # the mutant has changed the names of test cases
                functions = dict.fromkeys(name.partition("[")[0] for name in names)
                answer = runners[interpreted].run(source, list(functions), seconds - cpu)
            cpu += answer["cpu"]
            killer = answer["killer"]
            # a process that a test starts has the same limit; its test fails at the limit
            if answer["status"] and cpu < seconds:
                state = "killed"
            elif answer["status"] != 0 or within < len(batch):
                state = "undecided"
    state = state if executed or state == "killed" else "uncovered"
    row = {"mutant": mutant.name(package / mutant.file), "state": state, "cpu": round(cpu, 1), "limit": seconds}
    return {**row, "killer": killer} if state == "killed" else row


def run(arguments: argparse.Namespace) -> None:
    """Judge the sample, and check that the killing tests pass on the unchanged package."""
    root = arguments.root.resolve()
    package = root / "src" / "fastlars"
    cases = recorded(arguments.folder)
    done = {
        name for name, row in read(arguments.results).items()
        if row["state"] != "undecided" or row["limit"] >= arguments.seconds
    }  # fmt: skip
    drawn = sample(package, arguments.number, arguments.seed)
    chosen = {mutant.name(package / mutant.file): mutant for mutant in drawn}
    todo = [mutant for name, mutant in chosen.items() if name not in done]
    runners = [Runner(root, interpreted) for interpreted in (False, True)]
    with arguments.results.open("a") as file:
        for i, mutant in enumerate(todo):
            result = judge(mutant, cases, root, arguments.seconds, runners)
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(f"{i + 1}/{len(todo)} {result['state']} in {result['cpu']} s: {result['mutant'][:100]}", flush=True)
    results = read(arguments.results)
    for interpreted in (False, True):
        names = {result.get("killer", "") for result in results.values()} & {case.name for case in cases}
        for name in sorted(name for name in names if (INTERPRETED in name) == interpreted):
            if runners[interpreted].run(str(root / "src"), [name], 10 * arguments.seconds)["status"] != 0:
                print(f"fails on the package as it is: {name}")
    print(collections.Counter(result["state"] for result in results.values()))


def read(path: Path) -> dict[str, dict[str, Any]]:
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return {row["mutant"]: row for row in rows}


def compare(arguments: argparse.Namespace) -> None:
    """Fail if a mutant that was killed before survives now."""
    before, after = read(arguments.before), read(arguments.after)
    for name, results in (("before", before), ("after", after)):
        print(name, dict(collections.Counter(result["state"] for result in results.values())))
    lost = [name for name, row in before.items() if row["state"] == "killed" and after[name]["state"] != "killed"]
    for name in lost:
        print(f"killed by {before[name]['killer']}, now {after[name]['state']}: {name}")
    sys.exit(bool(lost))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    recording, running, comparing = (commands.add_parser(command.__name__) for command in (record, run, compare))
    for each, command, paths in (
        (recording, record, ["folder"]), (running, run, ["folder", "results"]), (comparing, compare, ["before", "after"])
    ):  # fmt: skip
        each.set_defaults(command=command)
        for name in paths:
            each.add_argument(name, type=Path)
        each.add_argument("--root", type=Path, default=HERE.parent, help="a checkout")
    running.add_argument("--number", type=int, default=200)
    running.add_argument("--seed", type=int, default=18)
    running.add_argument("--seconds", type=float, default=60, help="of CPU, a mutant")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given = parser.parse_args(sys.argv[1:split])
    given.options = sys.argv[split + 1 :]  # pytest's
    given.command(given)


if __name__ == "__main__":
    main()
