# /// script
# requires-python = ">=3.11"
# dependencies = ["nox[uv]>=2025.5.1"]
# ///
"""Everything a maintainer runs. CONTRIBUTING.md shows what each session prints."""

import ctypes.util
import functools
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import nox

nox.options.default_venv_backend = "uv"
nox.options.sessions = ["quick", "lint", "types"]

NEWEST = "torch>=2.4"  # the newest that the resolver finds for this Python and machine
ON_CPU = "not cuda and not mps"
EVERYWHERE = ("cpu", "cuda", "mps")

# The oldest torch, the newest and one in between run on every device.
VERSIONS = [
    ("3.11", "2.4.1", EVERYWHERE),
    ("3.12", "2.6.0", ("cpu",)),
    ("3.12", "2.8.0", ("cpu",)),
    ("3.12", "2.10.0", ("cpu",)),
    ("3.11", "2.13.0", EVERYWHERE),
    ("3.13", "2.15.0", EVERYWHERE),
    ("3.14", "2.15.0", ("cpu",)),
]
# The oldest torch and one in between. With these, .ci/run runs the tests that another torch may break. With the newest torch
# it runs all tests.
GATE = [nox.param(python, torch, id=f"torch{torch}") for python, torch, _ in VERSIONS if torch in ("2.4.1", "2.13.0")]
# test files that depend on no torch version, or that another session runs
NOT_OF_A_VERSION = ("benchmarks", "demo", "figures", "study", "typing")
CELLS = [
    nox.param(
        *(python, torch, device),
        id=f"py{python.replace('.', '')}-torch{torch}-{device}",
        tags=[device],
    )
    for python, torch, devices in VERSIONS
    for device in devices
]

FRAMEWORKS = ("accelerate", "lightly", "lightning", "timm", "transformers")


@nox.session
def quick(session: nox.Session) -> None:
    """The README's test command, which runs the tests that are not slow on this Python and the newest torch."""
    install(session, NEWEST, "--group", "test", "--group", "demo", "--group", "pages")
    suite(session, f"not slow and {ON_CPU}")


@nox.session
def full(session: nox.Session) -> None:
    """The whole suite, including slow tests, on this Python and the newest torch."""
    install(session, NEWEST, "--group", "test", "--group", "demo", "--group", "pages")
    suite(session, ON_CPU)


@nox.session
@nox.parametrize("python,torch,device", CELLS)
def tests(session: nox.Session, torch: str, device: str) -> None:
    """The whole suite on one Python, torch and device."""
    if not present(device):
        session.skip(f"this machine has no {device} device")
    install_torch(session, torch)
    if device == "cpu":
        suite(session, ON_CPU)
    else:
        pytest(session, device)


@nox.session
@nox.parametrize("python,torch", GATE)
def gate(session: nox.Session, torch: str) -> None:
    """Tests that another torch may break. These are the tests that are not slow, and slow ones marked `version`."""
    install_torch(session, torch)
    others = [f"--ignore=tests/test_{name}.py" for name in NOT_OF_A_VERSION]
    suite(session, f"(not slow or version) and {ON_CPU}", *others)


@nox.session(python="3.11")
def vulkan(session: nox.Session) -> None:
    """The device tests on Vulkan, on any GPU or with Debian's mesa-vulkan-drivers, which need no GPU."""
    if not present("vulkan"):
        session.skip("no Vulkan driver; `apt-get install mesa-vulkan-drivers libvulkan1` brings one that needs no GPU")
    # torchvulkan is compiled against this torch
    install(session, "torch==2.13.0", "torchvulkan==0.2.1", "--group", "test")
    on_device(session, "vulkan")


@nox.session(python="3.11")
def xla(session: nox.Session) -> None:
    """The device tests on XLA's CPU device. It needs no system package, but 7 GB of disk and three minutes of CPU time."""
    if not present("xla"):
        session.skip("torch_xla has wheels for Linux on x86-64 only")
    install(session, "torch==2.9.1", "torch_xla==2.9.0", "--group", "test")
    on_device(session, "xla", PJRT_DEVICE="CPU")


@nox.session
def nightly(session: nox.Session) -> None:
    """The suite on torch's nightly build, from the index in the environment variable TORCH_NIGHTLY_INDEX."""
    index = os.environ.get("TORCH_NIGHTLY_INDEX")
    if not index:
        session.error(
            "no index to take torch from: set TORCH_NIGHTLY_INDEX to the address that torch's page on installing gives "
            "for its preview (nightly) builds"
        )
    session.install("--prerelease", "allow", "--index", index, "torch")
    install(session, NEWEST, "--group", "test")  # the installed nightly satisfies NEWEST
    session.run("python", "-c", "import torch; print('torch', torch.__version__)")
    pytest(session, ON_CPU, "tests/test_private_names.py")  # first, because a missing name breaks many tests
    suite(session, ON_CPU)


@nox.session
def torch_suite(session: nox.Session) -> None:
    """Run torch's own optimizer tests on LARS. `-- PATH` is test/test_optim.py in a checkout of torch."""
    if not session.posargs:
        session.error("which tests? `-- PATH`, of test/test_optim.py in a checkout of the newest released torch")
    install(session, NEWEST, "--group", "torch-suite")
    # without our settings, because these are another project's tests
    options = ["-c", os.devnull, "-p", "optimizer_info", "-k", "TestOptimRenewed"]
    session.run("python", "-m", "pytest", *options, *session.posargs, env={"PYTHONPATH": "tests"})


@nox.session
def properties(session: nox.Session) -> None:
    """Test each property on new random examples for a minute, or for ten minutes with `-- 600`."""
    install(session, NEWEST, "--group", "test")
    env = {"FASTLARS_EXPECT_WHEEL": "1", "FASTLARS_PROPERTIES_SECONDS": (session.posargs or ["60"])[0]}
    session.run("python", "-m", "pytest", "tests/test_properties.py", "tests/test_fuzz_steps.py", env=env)


@nox.session
def mutants(session: nox.Session) -> None:
    """Count how many seeded faults the tests find. `-- --number 400 --seed 5` draws others. A stopped run resumes."""
    install(session, NEWEST, "--group", "test", "--group", "pages", "--group", "mutants")
    folder = Path("results", "mutants")
    program, lines = ("python", "tests/mutants.py"), str(folder / "lines")
    if not (folder / "lines").exists():
        cases = {"EXECUTED_LINES_CASES": "10"}
        # this test runs all tests of the kernels in one process, and they are recorded one by one below
        whole = ("--deselect", "tests/test_triton.py::test_kernels_under_the_interpreter")
        session.run(*program, "record", lines, "--", "-m", ON_CPU, "-n", "auto", *whole, env=cases)
        kernels = ("tests/triton_interpreted.py", "-W", "ignore:Conversion of an array:DeprecationWarning")
        session.run(*program, "record", lines, "--", *kernels, env={**cases, "TRITON_INTERPRET": "1"})
    session.run(*program, "run", lines, str(folder / "mutants.jsonl"), *session.posargs)


@nox.session
def parity(session: nox.Session) -> None:
    """Compare the dialects with the current releases of the packages they are named after, and print the releases."""
    install(session, NEWEST, "--group", "parity")
    pytest(session, ON_CPU, "tests/parity")


@nox.session
def lint(session: nox.Session) -> None:
    """Check lint, format and the security of workflows. `-- --fix` fixes what ruff can fix."""
    session.install("--group", "lint")
    session.run("zizmor", "--offline", "--quiet", ".github")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", *([] if "--fix" in session.posargs else ["--check"]))


@nox.session
def types(session: nox.Session) -> None:
    """Run strict mypy on src, and mypy and pyright on a user's program."""
    install(session, NEWEST, "--group", "types")
    session.run("mypy", *session.posargs)
    session.run("python", "-m", "pytest", "tests/test_typing.py", env={"FASTLARS_EXPECT_WHEEL": "1"})


@nox.session
def demo(session: nox.Session) -> None:
    """Run the demo, which trains for less than a minute. `-- --search` searches the learning rates again."""
    install(session, NEWEST, "--group", "demo")
    session.run("python", "-m", "benchmarks.demo", *session.posargs)


@nox.session
def study(session: nox.Session) -> None:
    """Run the large-batch study. `-- --data FOLDER --out FILE.csv` trains it again in 20 minutes on two cores."""
    install(session, NEWEST, "--group", "demo")
    session.run("python", "-m", "benchmarks.study", *session.posargs)


@nox.session
@nox.parametrize("framework", [nox.param(framework, id=framework) for framework in FRAMEWORKS])
def frameworks(session: nox.Session, framework: str) -> None:
    """Run and test a page of docs/frameworks with the real package, then record the versions."""
    install(session, NEWEST, "--group", f"frameworks-{framework}")
    folder = Path("tests", "frameworks")
    pytest(session, ON_CPU, str(folder / f"test_{framework}.py"))
    session.run("python", str(folder / "record.py"), framework)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure step times with pytest-benchmark. Its arguments follow `--` (-k resnet50, --benchmark-compare)."""
    install(session, NEWEST, "--group", "bench")
    session.run("python", "-m", "pytest", "benchmarks", *session.posargs)


@nox.session
def performance(session: nox.Session) -> None:
    """Time all optimizers interleaved, and update docs/performance.md. Options follow `--` (--device cuda, --seconds S)."""
    install(session, NEWEST, "--group", "bench")
    session.run("python", "-m", "benchmarks.performance", *session.posargs)
    session.run("python", "-m", "benchmarks.render")


@nox.session
def compiled(session: nox.Session) -> None:
    """Count what compiled steps launch on a GPU, without one, and update docs/performance.md. It needs g++ and an hour."""
    install(session, "torch==2.13.0", "triton", "--group", "bench")
    session.run("python", "-m", "benchmarks.compiled_launches", *session.posargs)
    session.run("python", "-m", "benchmarks.render")


@nox.session
def long_run(session: nox.Session) -> None:
    """Measure memory and drift in 100,000 steps of each implementation. Options follow `--` (--steps N, --out FILE)."""
    install(session, NEWEST, "--group", "bench")
    session.run("python", "-m", "benchmarks.long_run", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into docs/_build; warnings are errors."""
    install(session, NEWEST, "--group", "docs")
    session.run("sphinx-build", "-n", "-W", "--keep-going", "-q", "docs", "docs/_build", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build sdist and wheel into dist/, check their contents, and import the wheel with only torch installed."""
    shutil.rmtree("dist", ignore_errors=True)
    session.run("uv", "build", "--quiet")
    (sdist,), (wheel,) = Path("dist").glob("*.tar.gz"), Path("dist").glob("*.whl")
    with TemporaryDirectory() as again:
        session.run("uv", "build", "--quiet", "--out-dir", again)
        if different := [
            path.name for path in (sdist, wheel) if path.read_bytes() != Path(again, path.name).read_bytes()
        ]:
            session.error(f"another build of the same files gave other bytes: {different}")
    tag = os.environ.get("RELEASE_TAG", "")
    if tag and f"fastlars-{tag.removeprefix('v')}.tar.gz" != sdist.name:
        session.error(f"the tag {tag} is not the version of {sdist.name}; change __version__ in src or the tag")
    session.run("uvx", "twine", "check", "--strict", str(sdist), str(wheel))

    with tarfile.open(sdist) as archive:
        held = {name.split("/")[1] for name in archive.getnames()}
    include = nox.project.load_toml()["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    expected = {".gitignore", "PKG-INFO", "pyproject.toml", *(name.strip("/") for name in include)}
    if held != expected:
        session.error(f"{sdist}: unexpected {sorted(held - expected)}, missing {sorted(expected - held)}")
    session.run("uvx", "check-wheel-contents", "--src-dir", "src", str(wheel))

    session.install(str(wheel))
    session.run("python", "-I", "-c", "import fastlars; print(fastlars.__version__, fastlars.__file__)")


def install_torch(session: nox.Session, torch: str) -> None:
    """Install the wheel of this checkout with one version of torch, and the tests' dependencies."""
    # with NumPy 2, the Triton interpreters of these versions fail or read wrong values
    numpy = ["numpy<2"] if torch in ("2.4.1", "2.6.0", "2.8.0", "2.10.0") else []
    install(session, f"torch=={torch}", *numpy, "--group", "test")


def install(session: nox.Session, *requirements: str) -> None:
    """Install `requirements` and the wheel of this checkout, which is built once per run."""
    folder = Path(wheel_folder().name)
    if not list(folder.glob("*.whl")):
        session.run("uv", "build", "--wheel", "--quiet", "--out-dir", str(folder))
    (wheel,) = folder.glob("*.whl")
    session.install(str(wheel), *requirements)


@functools.cache
def wheel_folder() -> "TemporaryDirectory[str]":
    """The one folder of this run, removed when it ends."""
    return TemporaryDirectory(prefix="fastlars-wheel-")


def suite(session: nox.Session, marked: str, *options: str) -> None:
    """Run the tests that the mark expression selects, in one single-threaded process per core."""
    pytest(session, marked, "-n", "auto", "--dist", "worksteal", *options, OMP_NUM_THREADS="1")


def pytest(session: nox.Session, marked: str, *options: str, **environment: str) -> None:
    """Run the tests that the mark expression `marked` selects, against the wheel."""
    environment["FASTLARS_EXPECT_WHEEL"] = "1"
    session.run("python", "-m", "pytest", "-m", marked, *options, *session.posargs, env=environment)


def on_device(session: nox.Session, device: str, **environment: str) -> None:
    """Run the tests marked `device`, which fail if torch does not find it."""
    files = [f"tests/test_{name}.py" for name in ("devices", "xla")]
    environment |= {"FASTLARS_EXPECT_WHEEL": "1", "FASTLARS_EXPECT_DEVICE": device, "OMP_NUM_THREADS": "1"}
    session.run("python", "-m", "pytest", "-m", device, *files, *session.posargs, env=environment)


def present(device: str) -> bool:
    """Whether this machine has `device`. The answer does not need torch, because nothing is installed yet."""
    if device == "cuda":
        command = shutil.which("nvidia-smi")
        return command is not None and subprocess.run([command, "-L"], capture_output=True, check=False).returncode == 0
    if device == "mps":
        return sys.platform == "darwin" and platform.machine() == "arm64"
    if device == "vulkan":
        drivers = [Path(folder, "vulkan", "icd.d") for folder in ("/usr/share", "/etc", "/usr/local/share")]
        named = os.environ.get("VK_DRIVER_FILES") or any(file for folder in drivers for file in folder.glob("*.json"))
        # macOS wheels include a driver, and on Windows drivers are in the registry, where torchvulkan looks
        return sys.platform != "linux" or bool(named and ctypes.util.find_library("vulkan"))
    if device == "xla":
        return sys.platform == "linux" and platform.machine() == "x86_64"
    return True


if __name__ == "__main__":
    nox.main()
