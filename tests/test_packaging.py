"""What is installed, what imports what, and what an import loads."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import minisd

ROOT = Path(__file__).parent.parent
PACKAGES = [path.parent.name for path in ROOT.glob("minisd/*/__init__.py")]
SOURCES = sorted([*ROOT.glob("minisd/**/*.py"), *ROOT.glob("kernels/*.py")])

# DESIGN 3: what each layer may import of minisd, imports for type checkers alone left out. A name is
# a package's, or a module's where it stands lower or higher than its package.
LEAVES = {"expect", "files"}
SAMPLING = {"expect", "sampling", "sampling.schedule"}
CHECKPOINTS = LEAVES | {"models", "sampling.schedule", "checkpoints"}
DRAWING = SAMPLING | {"drawing"}
PIPELINE = CHECKPOINTS | DRAWING | {"engine", "engine.bands", "viewing.images", "pipeline"}
EDITING = PIPELINE | {"editing"}
ALLOWED = {
    "__init__": set(),  # names that resolve on first use
    "expect": set(),
    "files": set(),
    "engine.bands": set(),
    "models": {"expect", "models", "engine.bands", "minisd_kernels"},
    "sampling": SAMPLING,  # and no model: guidance is given the network as a callable
    "sampling.schedule": {"expect"},
    "engine": {"models", "engine"},  # and no method: it takes a function of tensors
    "checkpoints": CHECKPOINTS,
    "checkpoints.check": CHECKPOINTS | SAMPLING,
    "drawing": DRAWING,
    "viewing.images": LEAVES,
    "pipeline": PIPELINE,
    "editing": EDITING,
    "viewing": EDITING | {"viewing"},  # the maps that editing collects
    "training": CHECKPOINTS | {"training"},
    "cli": EDITING
    | {"viewing", "checkpoints.check", "cli", ""},  # "": minisd itself, for __version__
    "__main__": {"cli"},
}


def imports(path):
    """Every module that a file imports, anywhere in it, by absolute name; for types alone: none."""
    package = ["minisd_kernels"]
    if path.parent.name != "kernels":
        package = list(path.relative_to(ROOT).parent.parts)
    found, nodes = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    for node in nodes:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names if is_package(module) else {module}
    return found


def is_package(name):
    parts = name.split(".")
    return parts[0] == "minisd" and ROOT.joinpath(*parts).is_dir()


def layer(name):
    """minisd.models.unet -> models, minisd.sampling.schedule -> itself; minisd.__version__ -> "";
    others: the top name."""
    top, *rest = name.split(".")
    if top != "minisd":
        return top
    for parts in (rest[:2], rest[:1]):
        if ".".join(parts) in ALLOWED:
            return ".".join(parts)
    return ""


def test_the_import_reader_reads():
    assert "minisd_kernels" in imports(ROOT / "minisd/models/attention.py")
    assert {"minisd.models.attention", "minisd.models.blocks", "minisd.expect"} <= imports(
        ROOT / "minisd/models/unet.py"
    )
    assert "torch" in imports(ROOT / "minisd/models/unet.py")
    assert "minisd.pipeline" not in imports(ROOT / "minisd/drawing.py")  # for types alone
    assert "minisd.checkpoints.export" in imports(ROOT / "minisd/cli/models.py")  # in a function
    assert layer("minisd.sampling.schedule") == "sampling.schedule"
    assert layer("minisd.sampling.loop") == "sampling" and layer("torch.nn") == "torch"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    names = {layer(name) for name in imports(path)}
    kernels = path.parent.name == "kernels"
    local = {name for name in names if name in ALLOWED or name == "" or name.startswith("minisd")}
    if kernels:
        assert local <= {"minisd_kernels"}
    else:
        own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
        assert local <= ALLOWED[own if path.parent.name != "minisd" else path.stem]
    assert not names & {"diffusers", "transformers", "tests", "bench"}
    assert "triton" not in names or kernels
    only_here = kernels or path == ROOT / "minisd/models/attention.py"
    assert "minisd_kernels" not in names or only_here


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
        "from minisd.cli.main import main\ntry: main(['txt2img', '--help'])\nexcept SystemExit: pass",
        "from minisd.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
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
        minisd.Unet


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("minisd", "kernels", "weights"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
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
            if path.is_file() and "__pycache__" not in path.parts:
                expected[f"{package}/{path.relative_to(ROOT / folder).as_posix()}"] = (
                    path.stat().st_size
                )
    assert packed == expected
    assert {
        "minisd/py.typed",
        "minisd/cli/main.py",
        *(f"minisd/{package}/__init__.py" for package in PACKAGES),
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
    assert len(sizes) == 3 and sum(sizes.values()) <= 40e6 and max(sizes.values()) <= 15 * 2**20
    assert {
        "minisd_weights/shapes/tokenizer/vocab.json",
        "minisd_weights/shapes/tokenizer/merges.txt",
    } <= names
    assert "minisd_weights/shapes/scheduler/scheduler_config.json" in names


def test_the_wheel_names_the_command_and_its_requirements(wheel):
    [info] = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert info == f"minisd-{minisd.__version__}.dist-info"
    assert "minisd = minisd.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()
    metadata = wheel.read(f"{info}/METADATA").decode()
    if (ROOT / "LICENSE").exists():
        assert any(name.startswith(info) and name.endswith("/LICENSE") for name in wheel.namelist())
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.M)
    assert set(required) == {
        "torch", "triton", "safetensors", "huggingface_hub", "tokenizers", "numpy", "pillow", "tqdm"
    }  # fmt: skip


def test_ci_runs_the_test_line_of_the_readme():
    [line] = re.findall(
        r"^ +(pip install .* && pytest)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert line in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_nothing_needs_the_folder_beside_the_repository():
    for path in [*SOURCES, *ROOT.glob("tests/*.py"), ROOT / "setup.py", ROOT / "pyproject.toml"]:
        if path != Path(__file__):
            assert "/shared" not in path.read_text(encoding="utf-8"), path
