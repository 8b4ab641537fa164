"""The shape of the code: short functions, short lines, one way from layer to layer, few frames
between a call and the formula."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import p2p_model
import pytest

import minisd
from minisd.drawing import Drawing, Options
from minisd.models import attention as attention_module

ROOT = Path(__file__).parents[1]
PACKAGE = sorted(ROOT.glob("minisd/**/*.py"))
BESIDE = sorted([*ROOT.glob("tests/*.py"), *ROOT.glob("bench/*.py")])
FOLDERS = "minisd", "kernels", "weights", "tests", "bench"


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


@pytest.mark.parametrize("path", PACKAGE + BESIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path):
    for name, function in functions(path):
        length = function.end_lineno - function.lineno + 1
        assert length < 60, f"{name}: {length} lines"


BRANCHING = "def f(x):\n" + "    if x:\n        x -= 1\n" * 14 + "    return x\n"


def complex_functions(*arguments, **options):
    """What ruff says of functions whose cyclomatic complexity is 15 or more."""
    rule = ["--isolated", "--no-cache", "--select", "C901"]
    rule += ["--config", "lint.mccabe.max-complexity = 14", "--output-format", "concise"]
    command = [sys.executable, "-m", "ruff", "check", *rule, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


def test_functions_are_simple():
    found = complex_functions("-", input=BRANCHING)
    assert found.returncode == 1 and "`f` is too complex (15 > 14)" in found.stdout
    found = complex_functions("minisd")
    assert found.returncode == 0, found.stdout + found.stderr


def test_lines_have_at_most_100_columns():
    sources = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py")]
    assert len(sources) > 100
    long = [
        f"{path.relative_to(ROOT)}:{i}"
        for path in [*sources, ROOT / "setup.py"]
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 100
    ]
    assert long == []


# ---- frames


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return p2p_model.load(tmp_path_factory.mktemp("structure"))[1]


def frames(monkeypatch, draw):
    """The most frames of minisd's own that `attention` is called below, itself counted."""
    deepest, attention = [], attention_module.attention

    def counted(*arguments):
        frame, stack = sys._getframe(1), ["attention"]
        while frame is not None:
            if "/minisd/" in frame.f_code.co_filename and frame.f_code.co_name[0] != "<":
                stack.append(frame.f_code.co_qualname)
            frame = frame.f_back
        deepest.append(stack)
        return attention(*arguments)

    monkeypatch.setattr(attention_module, "attention", counted)
    draw()
    monkeypatch.undo()
    return max(deepest, key=len)[::-1]


def test_few_frames_lie_between_a_call_and_attention(sd, monkeypatch):
    """torch's own frames left out."""
    how = {"steps": 2, "progress": False}
    stack = frames(monkeypatch, lambda: sd.txt2img("a", **how))
    assert stack[0] == "StableDiffusion.txt2img" and stack[-1] == "attention"
    assert {"denoise", "Guidance.__call__", "UNet.forward"} <= set(stack)
    assert len(stack) <= 11, stack
    stack = frames(monkeypatch, lambda: minisd.edit_prompt(sd, "a cat", "a dog", **how))
    assert stack[0] == "edit_prompt" and len(stack) <= 12, stack


# ---- options


def test_options_are_the_fields_of_drawing():
    options, drawing = get_annotations(Options), get_annotations(Drawing)
    assert options == drawing and set(options) == set(Drawing.__dataclass_fields__)


def get_annotations(owner):
    """{field: its type}, resolved."""
    return get_type_hints(owner, vars(sys.modules[owner.__module__]))


# ---- imports


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE}


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def imported(path, everywhere=True):
    """minisd's modules that a module imports; those for type checkers alone left out.

    everywhere: inside functions, too, which are imported later.
    """
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found, nodes = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    for node in nodes:
        if is_for_types(node):
            continue
        if everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found |= {home, *(f"{home}.{alias.name}" for alias in node.names)}
    packages = {name for name in found if MODULES.get(name, path).name == "__init__.py"}
    return {name for name in found & set(MODULES) if name not in packages}


def test_the_import_reader_reads():
    names = imported(MODULES["minisd.editing.prompt_to_prompt"])
    assert {"minisd.expect", "minisd.editing.maps", "minisd.sampling.samplers"} <= names
    assert "minisd.pipeline" not in names  # for types alone
    assert "minisd.drawing" in imported(MODULES["minisd.pipeline"])


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: imported(path) for name, path in MODULES.items()}
    while leaves := [name for name, others in graph.items() if not others & set(graph)]:
        for name in leaves:
            del graph[name]
    assert graph == {}, f"a circle among {sorted(graph)}"
