"""The house itself: what may import what, how large a module may grow, and that nothing heavy loads for --help."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "library"
MODULES = sorted(file for file in LIBRARY.rglob("*.py") if file.name != "__init__.py")

# Each package imports only itself and those before it.
PACKAGES = [
    "support",  # errors, files, signals: nothing of diffusion
    "options",  # what can be asked for
    "model",  # the frozen networks
    "embedding",  # what is trained, and its files
    "data",  # images and captions
    "training",  # the mathematics of a step
    "output",  # results, sample images, reports
]
# Above them, each importing only those below it.
ABOVE = ["rescue", "setup", "start_choice", "rehearsal", "trainer", "run", "command_line"]
ORDER = {name: number for number, name in enumerate(PACKAGES + ABOVE)}


def dotted(module: Path) -> str:
    """The module's name below ``library``."""
    return ".".join(module.relative_to(LIBRARY).with_suffix("").parts)


def imports_of(module: Path) -> set[str]:
    """The modules below ``library`` that a module imports, wherever in its code."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "library":
            source = node.module.removeprefix("library").removeprefix(".")
            names = {f"{source}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= {source} if source in NAMES else names
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("library.") for a in node.names if a.name.startswith("library.")}
    return found


NAMES = {dotted(module) for module in MODULES}


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_imports_go_downwards(module):
    imported = imports_of(module)
    assert imported <= NAMES
    place = ORDER[dotted(module).split(".")[0]]
    assert {name for name in imported if ORDER[name.split(".")[0]] > place} == set()


def test_no_module_imports_itself_through_others():
    graphlib.TopologicalSorter({dotted(module): imports_of(module) for module in MODULES}).prepare()


def test_every_package_is_in_order_and_empty_at_its_door():
    folders = {file.parent.relative_to(LIBRARY).as_posix() for file in LIBRARY.rglob("__init__.py")}
    assert folders == {".", *PACKAGES}
    assert {file.stem for file in LIBRARY.glob("*.py")} == {"__init__", *ABOVE}
    assert all(not (LIBRARY / name / "__init__.py").read_text(encoding="utf-8") for name in PACKAGES)


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_private_names_stay_at_home(module):
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]


def test_the_tests_mirror_the_packages():
    for name in PACKAGES:
        for file in (ROOT / "tests" / name).glob("test_*.py"):
            assert f"{name}.{file.stem.removeprefix('test_')}" in NAMES, file


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_size(module):
    source = module.read_text(encoding="utf-8")
    assert source.count("\n") <= 450
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


def words_in_code(module: Path) -> set[str]:
    """Names and strings of a module, docstrings and comments left out."""
    nodes = list(ast.walk(ast.parse(module.read_text(encoding="utf-8"))))
    free_standing = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    words = {node.id for node in nodes if isinstance(node, ast.Name)}
    words |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    words |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    strings = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return words | {node.value for node in strings if id(node) not in free_standing}


def test_the_word_sdxl_has_its_place():
    """The difference between the families is the business of few modules; all others loop over lists."""
    knowing = {dotted(m) for m in MODULES if any("sdxl" in word.lower() for word in words_in_code(m))}
    models = {f"model.{name}" for name in ("architectures", "family", "identity", "base_model", "weight_files")}
    elsewhere = {name for name in knowing - models if not name.startswith("options.")}
    assert elsewhere <= {"data.config"}  # an error there names both bucket steps


def test_help_imports_nothing_heavy():
    for script in ("train_textual_inversion", "sdxl_train_textual_inversion"):
        code = (
            f"import sys, {script} as s\ntry: s.main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
            "assert not {'torch', 'transformers', 'diffusers', 'numpy', 'PIL', 'ftfy'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "--token_string" in done.stdout
