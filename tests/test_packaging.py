"""What is installed, what imports what, and what an import loads."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minisd

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("minisd/**/*.py"), *ROOT.glob("kernels/*.py")])

# DESIGN 3: who may import whom, by folder or file of minisd. Not listed: stands on nothing.
FILES = {"expect", "files"}
PIPELINE = FILES | {"models", "sampling", "engine", "checkpoints", "viewing", "drawing", "pipeline"}
ALLOWED = {
    "models": {"expect", "engine"},  # of engine only bands, see below
    "engine": {"models"},
    "sampling": {"expect"},  # and no model: the network comes as a callable
    "drawing": {"expect", "sampling"},
    "checkpoints": FILES | {"models", "sampling"},
    "viewing": FILES | {"models", "sampling", "drawing", "recipes", "editing"},  # editing's maps
    "latents": PIPELINE - {"pipeline"},
    "recipes": FILES | {"drawing", ""},  # "": minisd itself, for __version__
    "pipeline": PIPELINE | {"latents", "recipes"},
    "labels": PIPELINE | {"latents"},
    "editing": PIPELINE | {"recipes"},
    "again": PIPELINE | {"recipes", "editing"},
    "batch": PIPELINE | {"recipes", "editing", ""},
    "training": PIPELINE,
    "toy": {"expect", "sampling"},
    "cli": PIPELINE | {"labels", "recipes", "editing", "toy", "batch", ""},
    "__main__": {"cli"},
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.glob("minisd/**/*.py")
}


def imports(path):
    """Every module that a file imports, anywhere in it but for type checkers, by absolute name."""
    package = "minisd_kernels"
    if path.parent.name != "kernels":
        package = ".".join(path.relative_to(ROOT).parent.parts)
    found = set()

    class Reader(ast.NodeVisitor):
        def visit_If(self, node):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                self.generic_visit(node)

        def visit_Import(self, node):
            found.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node):
            base = package.split(".")
            base = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            for alias in node.names:
                name = f"{module}.{alias.name}"
                found.add(name if name in MODULES else module)

    Reader().visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def part(name):
    """minisd.models.unet -> models; minisd -> ""; others: the top name."""
    top, *rest = name.split(".")
    return top if top != "minisd" else rest[0] if rest else ""


def test_the_import_reader_reads():
    assert "minisd_kernels" in imports(ROOT / "minisd/models/attention.py")
    found = imports(ROOT / "minisd/models/unet.py")
    assert {"minisd.models.attention", "minisd.models.blocks", "torch"} <= found
    assert "minisd.pipeline" not in imports(ROOT / "minisd/drawing.py")  # for type checkers only
    assert "minisd.cli.main" in imports(ROOT / "minisd/__main__.py")
    assert {part(name) for name in MODULES} >= ALLOWED.keys() | FILES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    found = imports(path)
    names = {part(name) for name in found}
    ours = {name for name in names if name in ("", "minisd_kernels") or f"minisd.{name}" in MODULES}
    if path.parent.name == "kernels":
        assert ours <= {"minisd_kernels"}
    else:
        name = part(next(name for name, file in MODULES.items() if file == path))
        calls = path.stem in ("attention", "ops")
        kernels = {"minisd_kernels"} if name == "models" and calls else set()
        assert ours <= ALLOWED.get(name, set()) | {name} | kernels
        if name == "models":
            assert {each for each in found if part(each) == "engine"} <= {"minisd.engine.bands"}
        assert "triton" not in names
    assert not names & {"diffusers", "transformers", "tests", "bench"}


def test_imports_have_no_circle():
    graph = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle
    assert "minisd.models.unet" in graph["minisd.pipeline"] | graph["minisd.checkpoints.load"]


MAIN = "from minisd.cli.main import main"


def loaded_by(code):
    """Modules of a fresh interpreter after running `code`."""
    code = f"import sys\n{code}\nprint('\\n' + '\\n'.join(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return set(out.splitlines())


@pytest.mark.parametrize(
    "code",
    [
        "import minisd; minisd.__version__; dir(minisd)",
        f"{MAIN}\ntry: main(['txt2img', '--help'])\nexcept SystemExit: pass",
        f"{MAIN}\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_importing_minisd_and_asking_for_help_load_no_library(code):
    modules = loaded_by(code)
    assert "minisd" in modules
    assert not modules & {
        "torch",
        "triton",
        "numpy",
        "PIL",
        "tokenizers",
        "huggingface_hub",
        "tqdm",
    }


def test_loading_and_drawing_on_a_cpu_load_neither_triton_nor_the_oracles():
    modules = loaded_by("import minisd; [getattr(minisd, name) for name in minisd.__all__]")
    assert {"torch", "minisd.pipeline", "minisd.sampling.guidance"} <= modules
    assert not {name.split(".")[0] for name in modules} & {"triton", "diffusers", "transformers"}


def test_public_names_resolve_and_unknown_ones_are_errors():
    assert all(getattr(minisd, name) is not None for name in minisd.__all__)
    assert dir(minisd) == sorted(minisd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Unet'; public names: .*UNet"):
        minisd.Unet  # noqa: B018


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("minisd", "kernels", "weights"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")  # built where it is installed
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = "from setuptools import build_meta; print('wheel:' + build_meta.build_wheel('.'))"
    out = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return zipfile.ZipFile(folder / re.search(r"^wheel:(.+)$", out.stdout, re.M)[1])


def test_the_wheel_holds_every_source_and_the_bundled_weights(wheel):
    packed = {
        info.filename: info.file_size
        for info in wheel.infolist()
        if ".dist-info/" not in info.filename
    }
    expected = {}
    for folder, package in (
        ("minisd", "minisd"),
        ("kernels", "minisd_kernels"),
        ("weights", "minisd_weights"),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
                expected[f"{package}/{path.relative_to(ROOT / folder).as_posix()}"] = (
                    path.stat().st_size
                )
    built = {name for name in packed if name.endswith(".so")}
    has_compiler = shutil.which("cc") or shutil.which("gcc")
    assert len(built) == 1 if has_compiler else len(built) <= 1  # without one it is left out
    assert {name: size for name, size in packed.items() if name not in built} == expected
    assert {
        "minisd/py.typed",
        "minisd/cli/main.py",
        "minisd/editing/__init__.py",
        "minisd_kernels/ops.py",
    } <= packed.keys()
    assert "kernels/__init__.py" not in packed and not any(
        name.startswith(("kernels/", "weights/")) for name in packed
    )


@pytest.mark.skipif(
    not (ROOT / "weights/shapes").is_dir(), reason="the bundled model is not trained yet"
)
def test_the_wheel_holds_a_whole_bundled_model(wheel):
    names = set(wheel.namelist())
    for part in ("unet", "vae", "text_encoder"):
        assert f"minisd_weights/shapes/{part}/config.json" in names
    sizes = {
        info.filename: info.file_size
        for info in wheel.infolist()
        if info.filename.endswith(".safetensors")
    }
    assert len(sizes) == 5 and sum(sizes.values()) <= 40e6 and max(sizes.values()) <= 15 * 2**20
    assert {
        "minisd_weights/shapes/tokenizer/vocab.json",
        "minisd_weights/shapes/tokenizer/merges.txt",
    } <= names
    assert "minisd_weights/shapes/scheduler/scheduler_config.json" in names
    for part in ("transformer", "vae"):
        assert f"minisd_weights/shapes-dit/{part}/diffusion_pytorch_model.safetensors" in names
        assert f"minisd_weights/shapes-dit/{part}/config.json" in names
    assert "minisd_weights/shapes-dit/model_index.json" in names
    assert "minisd_weights/shapes-dit/scheduler/scheduler_config.json" in names
    own = [size for name, size in sizes.items() if "/shapes-dit/" in name]
    assert sum(own) <= 15e6


def test_the_wheel_names_the_command_and_its_requirements(wheel):
    [info] = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert info == f"minisd-{minisd.__version__}.dist-info"
    assert "minisd = minisd.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()
    metadata = wheel.read(f"{info}/METADATA").decode()
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.M)
    assert set(required) == {
        "torch",
        "triton",
        "safetensors",
        "huggingface_hub",
        "tokenizers",
        "numpy",
        "pillow",
        "tqdm",
    }


def test_the_wheel_says_and_holds_the_licence(wheel):
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    [info] = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert "License-Expression: Apache-2.0\n" in wheel.read(f"{info}/METADATA").decode()
    assert wheel.read(f"{info}/licenses/LICENSE").decode() == text


def test_the_changelog_begins_with_this_version():
    [first, *_] = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert first == minisd.__version__


def test_ci_runs_the_test_line_of_the_readme():
    [line] = re.findall(
        r"^ +(pip install .* && pytest .*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert f"({line})" in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_nothing_needs_the_folder_beside_the_repository():
    for path in [*SOURCES, *ROOT.glob("tests/*.py"), ROOT / "setup.py", ROOT / "pyproject.toml"]:
        if path != Path(__file__):
            assert "/shared" not in path.read_text(encoding="utf-8"), path
