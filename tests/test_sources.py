"""Where models come from, against a Hub on loopback (hub_server.py) with huggingface_hub itself as
the client.

The repo that is served is the bundled model, so nothing here needs diffusers.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_server import COMMIT

import minisd
from minisd.checkpoints import export, load as checkpoint, sources
from minisd.checkpoints.header import Entry, read_header
from minisd.checkpoints.tensor_file import FLOATS, read_tensors, write_tensors
from minisd.cli import main as cli
from minisd.sampling.schedule import NoiseSchedule

SHAPES = sources.bundled()["shapes"]
UNET, VAE, TEXT = (sources.weights_file(part, None) for part in ("unet", "vae", "text_encoder"))
NEEDED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    UNET,
    VAE,
    TEXT,
}


def load(source="owner/shapes", **arguments):
    return minisd.load(source, device="cpu", **arguments)


def refusal(source="owner/shapes", **arguments):
    with pytest.raises(checkpoint.CheckpointError) as caught:
        load(source, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_is_shapes(sd):
    shapes = load("shapes")
    for part in checkpoint.MODELS:
        state, expected = getattr(sd, part).state_dict(), getattr(shapes, part).state_dict()
        assert state.keys() == expected.keys() and all(
            torch.equal(state[name], expected[name]) for name in state
        )
    assert (
        sd.tokenizer.vocab == shapes.tokenizer.vocab
        and sd.tokenizer.merges == shapes.tokenizer.merges
    )


class Default:
    """Stands for a config class whose defaults are those of the bundled model."""

    def __init__(self, config):
        self.config, self.from_dict = config, type(config).from_dict

    def __call__(self):
        return self.config


def shapes_are_the_default(monkeypatch):
    """For the test the world's single files and its CLIP have the bundled model's numbers, not
    v1's."""
    shapes = load("shapes")
    models = {
        part: (model, Default(getattr(shapes, part).config))
        for part, (model, _) in checkpoint.MODELS.items()
    }
    for module in (checkpoint, export):
        monkeypatch.setattr(module, "MODELS", models)


# downloads


def test_a_download_takes_the_needed_files_of_one_commit(hub):
    assert_is_shapes(load())
    asked = hub.asked()
    assert set(asked) == NEEDED
    weights = [name for name in asked if name.endswith(".safetensors")]
    assert len(weights) == 3 and asked[-3:] == weights  # the large ones last
    assert hub.revisions[:3] == ["main"] * 3  # two HEAD and GET of the first file
    assert set(hub.revisions[3:]) == {COMMIT}
    assert not any(token for *_, token in hub.log)


def test_the_cache_serves_without_the_network(hub, tmp_path, monkeypatch):
    load()
    first = len(hub.log)
    load()
    assert [(method, name) for method, _, name, *_ in hub.log[first:]] == [
        ("HEAD", "scheduler/scheduler_config.json")
    ]
    first = len(hub.log)
    for arguments in (
        dict(local_files_only=True),
        dict(revision=COMMIT),
        dict(revision="main", local_files_only=True),
    ):
        assert_is_shapes(load(**arguments))
    assert len(hub.log) == first
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert_is_shapes(load())
        assert "is not in the local Hub cache, and the Hub was not reached" in refusal(
            "owner/other"
        )
    for server in hub.servers:  # nobody answers any more
        server.shutdown()
        server.socket.close()
    huggingface_hub.close_session()  # a connection that was kept alive would still be answered
    assert_is_shapes(load())
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    told = refusal("owner/other")
    missing = "scheduler/scheduler_config.json is not in the local Hub cache"
    assert f"{missing}, and the Hub was not reached: [Errno" in told
    assert not waits  # where huggingface_hub would have waited 23 seconds in all
    (tmp_path / f"cache/models--owner--shapes/snapshots/{COMMIT}" / VAE).unlink()
    assert (
        refusal(local_files_only=True)
        == f"Hub repo owner/shapes: {VAE} is not in the local Hub cache"
    )


def test_a_cut_connection_is_resumed(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 2**20)
    hub.faults[UNET] = ["cut", "cut"]
    assert_is_shapes(load())
    ranges = [
        wanted
        for method, host, name, wanted, _ in hub.log
        if (host, method, name) == ("cdn", "GET", UNET)
    ]
    assert ranges == [
        None,
        f"bytes={6 * 2**20}-",
        f"bytes={6 * 2**20}-",
    ]  # it went on with the chunk that was cut


def test_the_hub_that_is_busy_is_asked_again(hub):
    hub.faults |= {"scheduler/scheduler_config.json": [500, 429], VAE: [429]}
    assert_is_shapes(load())


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (
            {"unet/config.json": [429] * 9},
            "not reached (it answered 429: too many requests, wait a few minutes)",
        ),
        (
            {"unet/config.json": [500] * 9},
            "(it answered 500: an error of the Hub's own, try again later)",
        ),
        (
            {VAE: [503] * 99},
            f"{VAE} is not in the local Hub cache, and the Hub was not reached (it answered 503",
        ),
        (
            {UNET: ["short"]},
            f"{UNET} did not come: Consistency check failed: file should be of size",
        ),
        ({UNET: ["damaged"]}, "the damaged file was removed, try again"),
    ],
)
def test_what_the_hub_may_answer(hub, tmp_path, faults, message):
    hub.faults |= faults
    told = refusal()
    assert "owner/shapes" in told and message in told
    if faults.get(UNET) is not None:
        hub.faults.clear()
        assert not any(
            (tmp_path / f"cache/models--owner--shapes/snapshots/{COMMIT}/unet").glob(
                "*.safetensors"
            )
        )
        assert_is_shapes(load())  # nothing of the damage was kept


def test_repos_that_are_not_there_private_or_gated(hub, monkeypatch):
    hub.repos |= {"owner/private": SHAPES, "owner/gated": SHAPES}
    hub.private.add("owner/private")
    hub.gated.add("owner/gated")
    for name in ("owner/nothing", "owner/private"):
        assert "there is no such repo, or it is private and HF_TOKEN does not open it" in refusal(
            name
        )
    assert "the repo is gated; accept its terms on the Hub and set HF_TOKEN" in refusal(
        "owner/gated"
    )
    assert "the repo has no revision 'v9'" in refusal(revision="v9")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "it answered 401: the token in HF_TOKEN is not accepted" in refusal()
    monkeypatch.setenv("HF_TOKEN", "right")
    assert_is_shapes(load("owner/private"))
    sent = {(host, token) for _, host, _, _, token in hub.log if token != "Bearer wrong"}
    assert sent == {
        ("hub", None),
        ("hub", "Bearer right"),
        ("cdn", None),
    }  # the token stays with the Hub


def test_variants(hub, repo, tmp_path):
    told = refusal(variant="fp16")
    fp16 = {name: name.replace(".safetensors", ".fp16.safetensors") for name in (UNET, VAE, TEXT)}
    assert f"{fp16[UNET]} does not exist at revision {COMMIT}" in told
    assert "reads .safetensors, not .bin pickles" in told
    shutil.copy(repo / UNET, repo / fp16[UNET])
    hub.log.clear()
    shutil.rmtree(tmp_path / "cache")  # which remembers what the repo did not have
    with pytest.warns(UserWarning, match="there is no variant fp16 of .*: that itself is taken"):
        assert_is_shapes(load(variant="fp16"))
    weights = [name for name in hub.asked() if name.endswith(".safetensors")]
    assert weights == [fp16[UNET], VAE, TEXT]  # part by part
    assert [model.source for model in sources.cached()] == ["owner/shapes --variant fp16"]
    folder = sources.download("owner/shapes", variant="fp16", to=tmp_path / "to")
    assert sorted(path.name for path in folder.rglob("*.safetensors")) == [
        Path(name).name for name in (fp16[UNET], VAE, TEXT)
    ]
    for name in (UNET, VAE, TEXT):
        shutil.move(repo / name, repo / fp16[name])
    shutil.rmtree(tmp_path / "cache")
    hub.log.clear()
    assert_is_shapes(load(variant="fp16"))
    assert all("fp16" in name for name in hub.asked() if name.endswith(".safetensors"))
    for bad in ("../fp16", "fp16/x", "", "a b"):
        with pytest.raises(ValueError, match="variant is .* expected a name such as fp16"):
            load(variant=bad)
    for bad in ("../../outside", "/etc", "a/../b", ".", ""):
        with pytest.raises(ValueError, match="revision is .* expected a name such as main"):
            load(revision=bad)


def test_models_of_other_kinds_are_refused_before_their_weights_come(hub, repo):
    index = {"_class_name": "StableDiffusionXLPipeline"}
    (repo / "model_index.json").write_text(json.dumps(index))
    told = "Hub repo owner/shapes is a Stable Diffusion XL model, which minisd does not draw with"
    assert refusal() == told
    assert not [name for name in hub.asked() if name.endswith(".safetensors")]


# names


def test_short_names_and_moved_repos(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    v1_4, v1_5 = "CompVis/stable-diffusion-v1-4", "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert sources.hub_repo("sd-v1-4") == v1_4 == sources.hub_repo(v1_4)
    assert sources.hub_repo("sd-v1-5") == v1_5 == sources.hub_repo("runwayml/stable-diffusion-v1-5")
    for other in (
        "shapes",
        "sd-v1-6",
        "a/b/c",
        "owner/file.safetensors",
        "../owner",
        "/owner/name",
        None,
        Path("a/b"),
    ):
        assert sources.hub_repo(other) is None
    (tmp_path / "sd-v1-4").mkdir()
    assert sources.hub_repo("sd-v1-4") is None  # a folder of that name goes first


def test_a_path_is_no_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, kind in (
        ("shapes", "bundled model"),
        ("sd-v1-4", "Hub repo"),
        ("owner/name", "Hub repo"),
    ):
        told = refusal(path := Path(name))
        assert (
            told
            == f"{path!r} is a path, and nothing is there; the {kind} is the string {str(path)!r}"
        )
    assert refusal(Path("nothing")).startswith(
        "there is no model 'nothing': it is neither bundled (shapes, shapes-dit)"
    )
    shutil.copytree(SHAPES, tmp_path / "shapes")
    assert_is_shapes(load(Path("shapes")))


def test_the_default_model_that_cannot_be_had_names_the_ways_out(hub, capsys):
    assert cli.main(["txt2img", "a cat"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("minisd: error: sd-v1-4: Hub repo CompVis/stable-diffusion-v1-4: ")
    assert "`minisd fetch sd-v1-4` downloads it (4.3 GB, with --variant fp16 2.1 GB)" in told
    assert "--model shapes" in told
    hub.repos["CompVis/stable-diffusion-v1-4"] = hub.repos["owner/shapes"]
    assert_is_shapes(load("sd-v1-4"))


# what CLIP lends


def whole_clip(folder):
    """A repo with the bundled text encoder inside a whole CLIP, and its vocabulary."""
    entries = read_header(SHAPES / TEXT)
    own = read_tensors(SHAPES / TEXT, entries)
    tensors = {
        name if "text_model." in name else f"text_model.{name}": tensor for name, tensor in own
    }
    others = ("logit_scale", "vision_model.post_layernorm.bias", "text_projection.weight")
    tensors |= {name: torch.ones(2) for name in others}
    folder.mkdir()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_tensors(folder / "model.safetensors", shapes, "F16", tensors.values())
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(SHAPES / "tokenizer" / name, folder)
    return folder


def test_text_encoder_and_vocabulary_of_clip_where_a_model_has_none(
    hub, repo, tmp_path, monkeypatch
):
    shutil.rmtree(repo / "text_encoder")
    shutil.rmtree(repo / "tokenizer")
    assert (
        f"{COMMIT} has no text_encoder/, and its UNet does not go with openai/clip-vit" in refusal()
    )
    shapes_are_the_default(monkeypatch)
    assert f"{repo} has no text_encoder/ (Hub repo openai/clip-vit-large-patch14: " in refusal(repo)
    hub.repos["openai/clip-vit-large-patch14"] = whole_clip(tmp_path / "clip")
    for source in ("owner/shapes", repo):
        sd = load(source)
        assert ["owner/shapes"] == [model.source for model in sources.cached()]
        assert torch.equal(
            sd.encode_prompt(["a red circle"]), load("shapes").encode_prompt(["a red circle"])
        )
    assert load(repo, tokenizer=SHAPES / "tokenizer").tokenizer.vocab == sd.tokenizer.vocab


def test_a_vocabulary_that_transformers_5_saved(hub, repo):
    tokenizer = checkpoint.locate("shapes").tokenizer
    for name in ("vocab.json", "merges.txt"):
        (repo / "tokenizer" / name).unlink()
    special = ("<|startoftext|>", "<|endoftext|>")
    added = [{"content": each, "id": tokenizer.vocab[each], "normalized": True} for each in special]
    saved = {"model": {"vocab": tokenizer.vocab, "merges": tokenizer.merges}, "added_tokens": added}
    (repo / "tokenizer/tokenizer.json").write_text(json.dumps(saved))
    found = checkpoint.locate("owner/shapes").tokenizer
    assert torch.equal(found(["a Red circle"]), tokenizer(["a Red circle"]))
    assert "tokenizer/tokenizer.json" in hub.asked()


# the commands


def run(*argv, **env):
    environment = os.environ | {key: str(value) for key, value in env.items()}
    done = subprocess.run(
        [sys.executable, "-m", "minisd", *argv], capture_output=True, text=True, env=environment
    )
    return done.returncode, done.stdout, done.stderr


def test_the_environment_reaches_the_library(hub, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_TOKEN of a process of its own; neither fetch nor models needs
    torch."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not needed')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    env = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": tmp_path / "home",
        "HF_TOKEN": "right",
        "PYTHONPATH": path,
    }
    code, out, err = run("fetch", "owner/shapes", **env)
    folder = tmp_path / "home/hub/models--owner--shapes/snapshots" / COMMIT
    assert code == 0 and out == f"{folder}\n", err
    assert {token for _, host, _, _, token in hub.log if host == "hub"} == {"Bearer right"}
    code, out, err = run("models", **env)
    assert code == 0 and any(
        line.startswith("owner/shapes\tHub cache\t") for line in out.splitlines()
    )


def test_fetch_to_a_folder(hub, tmp_path, capsys):
    assert cli.main(["fetch", "owner/shapes", "--to", str(tmp_path / "to")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'to'}\n"
    got = {
        path.relative_to(tmp_path / "to").as_posix()
        for path in (tmp_path / "to").rglob("*")
        if path.is_file()
    }
    assert {name for name in got if not name.startswith(".cache")} == NEEDED
    assert_is_shapes(load(tmp_path / "to"))
    hub.log.clear()
    assert cli.main(["fetch", "owner/shapes", "--to", str(tmp_path / "to")]) == 0
    assert not [name for name in hub.asked() if name.endswith(".safetensors")]  # all there
    hub.log.clear()
    sources.download("owner/shapes", local_files_only=True, to=tmp_path / "to")
    assert not hub.log
    hub.faults[UNET] = ["damaged"]
    assert cli.main(["fetch", "owner/shapes", "--to", str(tmp_path / "again")]) == 2
    assert "the damaged file was removed, try again" in capsys.readouterr().err
    assert not (tmp_path / "again" / UNET).exists()
    assert cli.main(["fetch", "shapes"]) == 2
    assert (
        "'shapes' is no Hub repo: expected owner/name, or sd-v1-4, sd-v1-5"
        in capsys.readouterr().err
    )


def damages(path):
    """Files as a disk, a crash or a proxy may leave them."""
    data = path.read_bytes()
    yield "a bit flipped", data[:-1] + bytes([data[-1] ^ 1])
    yield "cut", data[: len(data) // 2]
    yield "empty", b""
    yield "a web page", b"<!doctype html>"


@pytest.mark.parametrize("to", [None, pytest.param("to", marks=pytest.mark.full)])
def test_fetch_repairs_what_is_damaged_and_says_so(hub, tmp_path, capsys, to):
    argv = ["fetch", "owner/shapes", *(["--to", str(tmp_path / to)] if to else [])]
    assert cli.main(argv) == 0
    folder = Path(capsys.readouterr().out.rstrip("\n"))
    tried = 0
    for name in [VAE, "tokenizer/vocab.json"] if to is None else [VAE]:
        whole = (folder / name).read_bytes()
        for what, data in damages(folder / name):
            (folder / name).resolve().write_bytes(data)
            assert cli.main(argv) == 0, what
            out, err = capsys.readouterr()
            told = f"minisd: warning: Hub repo owner/shapes: {name} was damaged here, with "
            assert out == f"{folder}\n" and told in err and "it is fetched again" in err
            assert (folder / name).read_bytes() == whole
            tried += 1
    assert tried == (8 if to is None else 4)
    hub.log.clear()
    assert cli.main(argv) == 0 and not [name for name in hub.asked() if name.startswith("unet")]
    assert "damaged" not in capsys.readouterr().err


def test_what_came_is_read(hub, repo, capsys):
    """The Hub may have what its sums confirm, and it is neither weights nor a config."""
    for name, data, message in [
        (VAE, b"<!doctype html><html>", "cannot be read as safetensors: it is a web page"),
        (VAE, (repo / UNET).read_bytes()[:-9], "the file is cut off"),
        ("vae/config.json", b"<html>", "config.json came, and is no JSON object"),
        ("vae/config.json", b"[]", "config.json came, and is no JSON object"),
        ("tokenizer/vocab.json", b"<html>", "vocab.json came, and is no JSON object"),
        ("tokenizer/merges.txt", b"<!DOCTYPE html>", "merges.txt came, and it is a web page"),
    ]:
        whole = (repo / name).read_bytes()
        (repo / name).write_bytes(data)
        folder = Path(repo.parent / "to")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(repo.parent / "cache", ignore_errors=True)
        assert cli.main(["fetch", "owner/shapes", "--to", str(folder)]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        (repo / name).write_bytes(whole)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer")
def test_a_deadline_for_all_of_it(hub, capsys):
    """A Hub that sends a byte now and then never lets a single request time out."""
    hub.faults[UNET] = ["drip"]
    start = time.monotonic()
    assert cli.main(["fetch", "owner/shapes", "--deadline", "2"]) == 2
    assert time.monotonic() - start < 10
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("minisd: error: not all of it came in 2 seconds; what came is kept")
    assert cli.main(["fetch", "owner/shapes", "--deadline", "100"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["fetch", "owner/shapes", "--deadline", "0"])


def test_models_lists_what_is_here_where_and_how_large(hub, repo, tmp_path, capsys):
    for name in (UNET, VAE, TEXT):
        shutil.copy(repo / name, repo / name.replace(".safetensors", ".fp16.safetensors"))
    hub.repos["CompVis/stable-diffusion-v1-4"] = repo
    load()
    load("sd-v1-4", variant="fp16", revision=COMMIT)
    capsys.readouterr()
    assert cli.main(["models"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    size = sum((repo / name).stat().st_size for name in NEEDED)
    cache = tmp_path / "cache"
    v1_4 = f"CompVis/stable-diffusion-v1-4 --revision {COMMIT} --variant fp16"
    assert [line[:2] for line in lines] == [
        ["shapes", "bundled"],
        ["shapes-dit", "bundled"],
        [v1_4, "Hub cache"],
        ["owner/shapes", "Hub cache"],
        ["sd-v1-5", "not here"],
    ]
    assert lines[3][2:] == [
        f"{size / 1e6:.1f} MB",
        str(cache / "models--owner--shapes/snapshots" / COMMIT),
    ]
    assert lines[4][2:] == ["4.3 GB", "minisd fetch sd-v1-5"]
    # What the first column says is what the commands take.
    assert (
        cli.main(["info", v1_4.split()[0], "--variant", "fp16"]) == 2
    )  # its main branch was not fetched
    assert cli.main(["info", *v1_4.split()]) == 0
    assert_is_shapes(
        load(
            "CompVis/stable-diffusion-v1-4", revision=COMMIT, variant="fp16", local_files_only=True
        )
    )
    # What is no model, or half of one, is not in the list.
    shutil.copytree(
        cache / "models--owner--shapes", cache / "datasets--owner--shapes", symlinks=True
    )
    capsys.readouterr()
    assert cli.main(["models"]) == 0 and capsys.readouterr().out.count("owner/shapes\t") == 1
    (cache / "models--owner--shapes/snapshots" / COMMIT / VAE).unlink()
    assert cli.main(["models"]) == 0 and "owner/shapes\t" not in capsys.readouterr().out


# export and check


def test_export_reads_back(tmp_path, capsys):
    assert cli.main(["export", "--model", "shapes", "--to", str(tmp_path / "new/out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new/out'}\n"
    assert_is_shapes(load(tmp_path / "new/out"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert {entry.dtype for entry in read_header(tmp_path / "new/out" / UNET).values()} == {"F16"}
    head = (tmp_path / "new/out" / UNET).read_bytes()
    length = int.from_bytes(head[:8], "little")
    assert length % 8 == 0 and json.loads(head[8 : 8 + length])["__metadata__"] == {"format": "pt"}
    index = json.loads((tmp_path / "new/out/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["scheduler"] == [
        "diffusers",
        "DDIMScheduler",
    ]
    text = json.loads((tmp_path / "new/out/text_encoder/config.json").read_text())
    vocabulary = json.loads((tmp_path / "new/out/tokenizer/vocab.json").read_text())
    ids = [vocabulary[f"<|{name}|>"] for name in ("startoftext", "endoftext", "endoftext")]
    assert [text[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == ids
    assert cli.main(["export", "--model", "shapes", "--to", str(tmp_path / "new/out")]) == 2
    assert "is there already, expected a new or an empty folder" in capsys.readouterr().err
    assert (
        cli.main(
            ["export", "--model", "shapes", "--to", str(tmp_path / "wide"), "--dtype", "float32"]
        )
        == 0
    )
    assert {entry.dtype for entry in read_header(tmp_path / "wide" / VAE).values()} == {"F32"}
    assert_is_shapes(load(tmp_path / "wide"))


def test_export_keeps_the_scheduler_and_the_widest_dtype(tmp_path):
    found = checkpoint.locate("shapes")
    pndm = found.scheduler | {"_class_name": "PNDMScheduler"}
    export.export(dataclasses.replace(found, scheduler=pndm), tmp_path / "out")
    scheduler = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert scheduler["_class_name"] == "PNDMScheduler" and index["scheduler"] == [
        "diffusers",
        "PNDMScheduler",
    ]
    entries = {name: Entry(name, (), 0, 0) for name in ("F16", "F32", "BF16")}
    assert export._dtype(None, entries) == "F32" and export._dtype("float16", entries) == "F16"


def test_export_is_whole_or_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "minisd.models.tokenizer.CLIPTokenizer.save",
        lambda *_: (_ for _ in ()).throw(OSError("disk full")),
    )
    assert cli.main(["export", "--model", "shapes", "--to", str(tmp_path / "new/out")]) == 2
    assert "disk full" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_export_to_a_single_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "one.safetensors"
    argv = ["export", "--model", "shapes", "--single-file", "--to", str(path)]
    assert cli.main(argv) == 2
    assert (
        "a single file holds Stable Diffusion v1's unet; got UNetConfig(sample_size=16"
        in capsys.readouterr().err
    )
    shapes_are_the_default(monkeypatch)
    found = checkpoint.locate("shapes")
    for change in ({"beta_end": 0.02}, {"num_train_timesteps": 999}):
        schedule = NoiseSchedule.from_dict(found.scheduler | change)
        with pytest.raises(
            checkpoint.CheckpointError,
            match="Stable Diffusion v1's schedule, and this model another",
        ):
            export.export_single_file(dataclasses.replace(found, schedule=schedule), path)
    assert cli.main(argv) == 0
    entries = read_header(path)
    assert entries["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert "first_stage_model.decoder.up.2.block.0.conv1.weight" in entries
    assert_is_shapes(load(path, tokenizer=SHAPES / "tokenizer"))
    assert cli.main(argv) == 2 and "is there already" in capsys.readouterr().err
    again = [
        "export",
        "--model",
        str(path),
        "--tokenizer",
        str(SHAPES / "tokenizer"),
        "--to",
        str(tmp_path / "back"),
    ]
    assert cli.main(again) == 0
    assert_is_shapes(load(tmp_path / "back"))


def test_tensors_of_another_size_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"b has shape \(3,\), expected \(2,\)"):
        write_tensors(
            tmp_path / "a.safetensors",
            {"a": (1, 2), "b": (2,)},
            "F32",
            [torch.ones(2), torch.ones(3)],
        )


def test_check(tmp_path, capsys):
    assert cli.main(["check", "shapes", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert (
        out.count("ok    ") == 12 and "WRONG" not in out and "- " in out
    )  # the vocabulary is not CLIP's
    assert (
        "unet/diffusion_pytorch_model.safetensors of weights/README.md" in out
        and "an image in 3 steps" in out
    )

    broken = Path(shutil.copytree(SHAPES, tmp_path / "broken"))
    entries = read_header(broken / VAE)
    tensors = {
        name: tensor.clone() for name, tensor in read_tensors(broken / VAE, entries)
    }  # the file is overwritten
    tensors["decoder.conv_in.bias"][3] = float("nan")
    ordered = {name: entry.shape for name, entry in entries.items()}
    write_tensors(broken / VAE, ordered, "F16", [tensors[name] for name in ordered])
    assert cli.main(["check", str(broken)]) == 2
    out, err = capsys.readouterr()
    assert (
        "WRONG vae: NaN or infinite values in 1: decoder.conv_in.bias\n" in out
        and "a picture" not in out
    )
    assert err == f"minisd: error: {broken}: 1 of these are wrong\n"
    told = refusal(broken)
    assert (
        "decoder.conv_in.bias has NaN or infinite values (float16 in the file, float32 wanted)"
        in told
    )


def test_check_of_a_source_whose_sums_are_not_known(hub, repo, tmp_path, capsys):
    """Such as v1.5's folder: the sums are those that the Hub gave; of a folder there are none, and
    check says so."""
    for name in (UNET, VAE, TEXT):  # the same values in files of other sums
        tensors = [
            (key, tensor.clone())
            for key, tensor in read_tensors(repo / name, read_header(repo / name))
        ][::-1]
        write_tensors(
            repo / name, {key: t.shape for key, t in tensors}, "F16", [t for _, t in tensors]
        )
    hub.repos[sources.SHORT_NAMES["sd-v1-5"]] = repo
    assert cli.main(["check", "sd-v1-5"]) == 0
    out = capsys.readouterr().out
    assert (
        out.count(", stable-diffusion-v1-5/stable-diffusion-v1-5 has ") == out.count("ok    /") == 3
    )
    assert cli.main(["check", str(repo)]) == 0
    out = capsys.readouterr().out
    assert (
        out.count("-     /")
        == out.count(": minisd knows no sha256 of this source to compare it with; it is ")
        == 3
    )
    hub.repos[sources.SHORT_NAMES["sd-v1-4"]] = repo  # of which all sums are known, and are others
    assert cli.main(["check", "sd-v1-4"]) == 2
    assert (
        capsys.readouterr().out.count(
            " is not a file of CompVis/stable-diffusion-v1-4 that is known: sha256 "
        )
        == 3
    )
    vae = next(
        (tmp_path / "cache").glob(f"*v1-5/snapshots/*/{VAE}")
    ).resolve()  # a bit of it flips on the disk
    vae.write_bytes(vae.read_bytes()[:-1] + bytes([vae.read_bytes()[-1] ^ 1]))
    assert cli.main(["check", "sd-v1-5", "--local-files-only"]) == 2
    out = capsys.readouterr().out
    assert re.search(
        f"WRONG /.*{VAE}: sha256 .*, stable-diffusion-v1-5/.* has {vae.name} there", out
    )


def test_weights_that_do_not_fit_the_dtype(tmp_path):
    big = Path(shutil.copytree(SHAPES, tmp_path / "big"))
    tensors = {
        name: tensor.float() for name, tensor in read_tensors(big / VAE, read_header(big / VAE))
    }
    tensors["decoder.conv_in.bias"][3] = 1e5
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_tensors(big / VAE, shapes, "F32", tensors.values())
    assert load(big).vae.decoder.conv_in.bias[3] == 1e5
    assert "has NaN or infinite values (float32 in the file, float16 wanted)" in refusal(
        big, dtype="float16"
    )


def test_the_published_list_is_well_formed():
    from minisd.checkpoints.check import PUBLISHED, listed, published

    assert all(re.fullmatch(r"[0-9a-f]{12}([0-9a-f]{52})?", sha) for sha in PUBLISHED)
    assert (
        published("6ce0161689b3" + "0" * 52)[0] == "v1-5-pruned-emaonly.safetensors"
        and published("0" * 64) is None
    )
    named = listed()
    assert {f"shapes/{name}" for name in (UNET, VAE, TEXT)} <= named.keys()
    assert all(sources.sha256(SHAPES.parent / name) == sha for name, sha in named.items())
    assert set(FLOATS) == {"F64", "F32", "F16", "BF16"}
