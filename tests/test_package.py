"""The house's own rules: light import, one import arrow, no pickle."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import featxfer
import featxfer_integrations

HEAVY = (
    *("timm", "torchvision", "faiss", "sklearn", "scipy", "joblib", "threadpoolctl", "matplotlib"),
    *("PIL", "huggingface_hub", "torch._dynamo", "click", "defusedxml"),
)
CORE = Path(featxfer.__file__).parent
INTEGRATIONS = Path(featxfer_integrations.__file__).parent


def heavy_modules_after(statement: str) -> list[str]:
    code = f"{statement}\nimport sys\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    paths = f"import sys; sys.path[:0] = [{str(CORE.parent)!r}]\n"
    run = subprocess.run(
        [sys.executable, "-c", paths + code], capture_output=True, text=True, check=True
    )
    return run.stdout.split()


def test_no_public_name_of_the_core_loads_anything_heavy() -> None:
    """Name by name in one process, so that the first that loads something is named."""
    code = f"""
        import sys, featxfer
        for name in featxfer.__all__:
            getattr(featxfer, name)
            loaded = [m for m in {HEAVY!r} if m in sys.modules]
            assert not loaded, (name, loaded)"""
    assert heavy_modules_after(textwrap.dedent(code)) == []
    assert heavy_modules_after("from featxfer import *") == []


def test_help_is_told_without_torch() -> None:
    """Under 0.3 s of the processor's time, the best of three; every command is listed."""
    code = (
        "import sys, time\n"
        f"sys.path[:0] = [{str(CORE.parent)!r}, {str(INTEGRATIONS.parent)!r}]\n"
        "from featxfer.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
        "print('seconds', time.process_time())\n"
    )
    seconds = []
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        for command in ("cache", "env", "extract", "fit", "show"):
            assert f"\n  {command} " in run.stdout
        seconds.append(float(run.stdout.split("seconds")[1]))
    assert min(seconds) < 0.3


@pytest.mark.parametrize("package", [featxfer, featxfer_integrations])
def test_public_names_are_there_and_others_are_not(package: ModuleType) -> None:
    names: list[str] = getattr(package, "__all__")  # noqa: B009
    assert set(names) <= set(dir(package))
    assert all(getattr(package, name) is not None for name in names)
    modules = {path.stem for path in Path(str(package.__file__)).parent.glob("*.py")}
    assert not modules & set(names)  # importing the module would hide the name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("module", ["sklearn", "torchvision", "PIL"])
def test_the_light_import_test_can_fail(module: str) -> None:
    assert module in heavy_modules_after(f"from featxfer import *; import {module}")


def test_the_core_imports_no_host_and_no_user_of_it() -> None:
    banned = re.compile(
        r"^\s*(?:from|import) "
        r"(timm|torchvision|open_clip|featxfer_integrations|benchmarks|tests|examples)\b",
        re.MULTILINE,
    )
    found = {path.name: banned.findall(path.read_text()) for path in CORE.rglob("*.py")}
    assert {name: hits for name, hits in found.items() if hits} == {}
    assert banned.findall("    from timm.data import x") == ["timm"]


def test_the_integrations_import_no_user_of_them() -> None:
    banned = re.compile(r"^\s*(?:from|import) (benchmarks|tests|examples)\b", re.MULTILINE)
    paths = list(INTEGRATIONS.rglob("*.py"))
    assert len(paths) > 4
    assert [path.name for path in paths if banned.search(path.read_text())] == []


@pytest.mark.parametrize("package", [CORE, INTEGRATIONS])
def test_files_and_functions_are_short(package: Path) -> None:
    """No file over 350 lines, no function over 60."""
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, (path, node.name, lines)


def private_imports(path: Path) -> list[str]:
    """Names with an underscore that a file imports from one of the packages, but for its own."""
    others = {package.name for package in (CORE, INTEGRATIONS) if package not in path.parents}
    return [
        f"{path.name}: {node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if node.module.split(".")[0] in others
        and re.search(r"(^|\.)_(?!_)", f"{node.module}.{alias.name}")
    ]


def test_no_private_names_across_packages(tmp_path: Path) -> None:
    folders = [INTEGRATIONS, *(CORE.parent / name for name in ("benchmarks", "examples"))]
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    assert len(paths) > 20
    assert [name for path in paths for name in private_imports(path)] == []
    (tmp_path / "a.py").write_text("from featxfer.checks import _x, y\nfrom featxfer._b import c")
    assert private_imports(tmp_path / "a.py") == [
        "a.py: featxfer.checks._x",
        "a.py: featxfer._b.c",
    ]


def test_no_pickle_in_the_packages() -> None:
    pickled = re.compile(r"(?<!safetensors\.)torch\.(load|save)\(|import pickle|allow_pickle")
    texts = [p for root in (CORE, INTEGRATIONS) for p in root.rglob("*.py")]
    assert len(texts) > 10
    assert [p.name for p in texts if pickled.search(p.read_text())] == []
    assert pickled.search("x = torch.load(path)")


def test_public_names_exist_and_are_documented() -> None:
    for name in getattr(featxfer, "__all__"):  # noqa: B009
        value = getattr(featxfer, name)
        assert value.__doc__ or not callable(value), name


def test_both_packages_are_typed() -> None:
    assert (CORE / "py.typed").is_file()
    assert (INTEGRATIONS / "py.typed").is_file()


def test_one_version_everywhere() -> None:
    root = CORE.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["version"] == featxfer.__version__
    assert f"version: {featxfer.__version__}" in (root / "CITATION.cff").read_text()
    assert f"## {featxfer.__version__}" in (root / "CHANGELOG.md").read_text()


def test_ci_runs_the_readmes_test_command() -> None:
    """`.ci/run` takes the first line with bin/pytest: it must be the second of the two commands."""
    lines = (CORE.parent / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("python3 -m venv"))
    assert lines[start].endswith("-m benchmarks.voc2007")
    assert next(line for line in lines if "bin/pytest" in line) == lines[start + 1]
    assert lines[start + 1].startswith("python3 -m venv .venv && .venv/bin/pip install -e '.[all]'")


def test_the_table_of_kinds_names_tests_that_are_there() -> None:
    folder = Path(__file__).parent
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?", (folder / "README.md").read_text())
    assert len(named) > 40
    for file, test in named:
        if "/test_" in file:
            assert not test or f"def {test}(" in (folder / file).read_text(), (file, test)
