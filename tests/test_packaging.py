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
SOURCES = sorted([*ROOT.glob("minisd/**/*.py"), *ROOT.glob("kernels/*.py")])

# DESIGN 3: who may import whom. A module that is not listed is a leaf that stands on nothing of
# minisd's.
CONFIGS = {"config", "expect"}
MODELS = CONFIGS | {"attention", "bands", "blocks", "unet", "vae", "clip"}
SOURCES_AND_FILES = {"sources", "tensor_file"}
CHECKPOINT = MODELS | SOURCES_AND_FILES | {"names", "tokenizer", "schedule", "checkpoint"}
SAMPLING = {"schedule", "samplers", "guidance"}
PIPELINE = CHECKPOINT | SAMPLING | {"images", "onednn", "cuda_graph", "pipeline"}
ALLOWED = {
    "attention": {"minisd_kernels"},
    "blocks": {"bands"},
    "unet": CONFIGS | {"attention", "blocks"},
    "vae": CONFIGS | {"attention", "blocks"},
    "clip": CONFIGS,
    "samplers": {"expect", "schedule"},
    "guidance": {"expect", "schedule", "samplers"},  # and no model: the UNet comes as a callable
    "tensor_file": {"sources"},
    "checkpoint": CHECKPOINT,
    "pipeline": PIPELINE,
    "trace": PIPELINE,
    "visualize": PIPELINE | {"editing"},  # the maps that editing collects
    "training": PIPELINE | {"scenes", "export"},
    "editing": PIPELINE | {"editing"},
    "export": CHECKPOINT | {"images"},
    "check": PIPELINE,
    # "": minisd itself, for __version__
    "cli": PIPELINE
    | {"visualize", "editing", "trace", "cli_blend", "cli_edit", "cli_invert", "cli_models", ""},
    "cli_blend": PIPELINE | {"editing", "cli"},
    "cli_edit": PIPELINE
    | {"visualize", "editing", "cli", "cli_invert"},  # the same layer, in a file of its own
    "cli_invert": PIPELINE | {"editing", "cli"},
    "cli_models": PIPELINE | {"export", "check", "cli"},
    "__main__": {"cli"},
    "__init__": set(),
}


def imports(path):
    """Every module that a file imports, anywhere in it, by absolute name."""
    package = (
        "minisd_kernels"
        if path.parent.name == "kernels"
        else ".".join(path.relative_to(ROOT).parent.parts)
    )
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            module = ".".join([*base, node.module] if node.module else base)
            found |= (
                {f"{module}.{alias.name}" for alias in node.names}
                if module == "minisd"
                else {module}
            )
    return found


def layer(name):
    """minisd.models.unet.UNet -> unet; minisd.editing.inversion -> editing; minisd.__version__ ->
    ""; others: the top name."""
    top, _, rest = name.partition(".")
    if top != "minisd":
        return top
    part = rest.split(".")[0]
    return (
        part
        if (ROOT / "minisd" / f"{part}.py").exists() or (ROOT / "minisd" / part).is_dir()
        else ""
    )


def test_the_import_reader_reads():
    assert "minisd_kernels" in imports(ROOT / "minisd/models/attention.py")
    assert {"minisd.models.attention", "minisd.models.blocks"} <= imports(
        ROOT / "minisd/models/unet.py"
    )
    assert "minisd.pipeline" in imports(ROOT / "minisd/cli/main.py")  # inside a function
    assert "torch" in imports(ROOT / "minisd/models/unet.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    names = {layer(name) for name in imports(path)}
    local = {
        name
        for name in names
        if name == "" or name.startswith("minisd") or (ROOT / f"minisd/{name}.py").exists()
    }
    local |= names & {"editing"}
    if path.parent.name == "kernels":
        assert local <= {"minisd_kernels"}
    else:
        own = path.parent.name if path.parent.name == "editing" else path.stem
        assert local <= ALLOWED.get(own, set())
    assert not names & {"diffusers", "transformers", "tests", "bench"}
    assert "triton" not in names or path.parent.name == "kernels"
    assert (
        "minisd_kernels" not in names
        or path.parent.name == "kernels"
        or path.name == "attention.py"
    )


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
    for name in ("setup.py", "pyproject.toml", "README.md"):
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
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.M)
    assert set(required) == {
        "torch", "triton", "safetensors", "huggingface_hub", "tokenizers", "numpy", "pillow", "tqdm"
    }  # fmt: skip


def test_ci_runs_the_test_line_of_the_readme():
    [line] = re.findall(
        r"^ +(pip install .* && pytest)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_nothing_needs_the_folder_beside_the_repository():
    for path in [*SOURCES, *ROOT.glob("tests/*.py"), ROOT / "setup.py", ROOT / "pyproject.toml"]:
        if path != Path(__file__):
            assert "/shared" not in path.read_text(encoding="utf-8"), path
