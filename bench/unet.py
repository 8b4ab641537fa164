"""One guided denoising step of SD v1.4's UNet with random weights: minisd beside diffusers.

    python -m bench.unet [--device cuda] [--rounds 3] [--batch 1] [--no-compiled] [--quick]

A step is the UNet on the unconditional and the conditional rows of `batch` latents, guidance and
the update of DDIM. Contenders have processes of their own, take turns, and compute with the same
weights. Batches 1, 2 and 8, what is compiled at batch 1 only (that takes minutes each;
--no-compiled: not at all). CPU: float32 and bfloat16, in groups that fit into memory together, and
at batch 1 OpenVINO and ONNX Runtime with diffusers' UNet (pip install "minisd[bench]"); CUDA:
float16, also as a CUDA graph. error: of the step's result against diffusers in float32, relative,
the root of the mean square. Writes bench/results/<device>/unet.json (unet_batch2.json,
unet_batch8.json), and prints what misses its target.
`python -m bench.against PATH` compares with another checkout.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from bench import harness, models


def inputs(device: str, dtype: torch.dtype, batch: int, small: bool):
    """x (batch, 4, h, w), uncond (1, 77, D), cond (batch, 77, D)."""
    numbers = models.SMALL if small else models.FULL
    side, width = numbers["sample_size"], numbers["cross_attention_dim"]
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, 4, side, side), (1, 77, width), (batch, 77, width)
    return (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def ours(name: str, device: str, dtype: torch.dtype, batch: int, small: bool, **options):
    """minisd's step as `minisd.load` would have it computed; options: compile, graph."""
    from minisd import DDIM, cfg

    sd = models.unet_alone(device, dtype, small, **options)
    x, uncond, cond = inputs(device, dtype, batch, small)
    step = next(iter(DDIM(sd.schedule, 50)))
    return {name: models.one_step(cfg(sd.network, uncond, cond, 7.5), step, x)}


def theirs(
    name: str,
    device: str,
    dtype: torch.dtype,
    batch: int,
    small: bool,
    channels_last=False,
    compile=None,
):
    """diffusers' step, as its pipeline writes it; compile: a mode of torch.compile."""
    unet = models.diffusers_unet(device, dtype, small)
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    if compile:
        unet.fuse_qkv_projections()
        unet = torch.compile(unet, mode=compile, fullgraph=True)
    return {name: models.diffusers_step(unet, *inputs(device, dtype, batch, small))}


class Noise(torch.nn.Module):
    """diffusers' UNet without its options, for a converter to trace."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x, t, context):
        return self.unet(x, t, encoder_hidden_states=context, return_dict=False)[0]


def example(device: str, batch: int, small: bool) -> tuple[torch.Tensor, ...]:
    """What Noise is called with in a step, float32."""
    x, uncond, cond = inputs(device, torch.float32, batch, small)
    return torch.cat([x, x]), torch.tensor(981), torch.cat([uncond.expand_as(cond), cond])


def openvino(name: str, device: str, dtype: torch.dtype, batch: int, small: bool):
    """The same step, diffusers' UNet converted by OpenVINO: no file in between, the same weights.

    The precision is OpenVINO's hint, the threads are as many as torch's.
    """
    import openvino as ov

    unet = models.diffusers_unet(device, torch.float32, small)
    tensors = example(device, batch, small)
    with torch.no_grad():
        shapes = [tuple(tensor.shape) for tensor in tensors]
        model = ov.convert_model(Noise(unet).eval(), example_input=tensors, input=shapes)
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    options = {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1}
    options["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
    request = ov.compile_model(model, "CPU", options).create_infer_request()

    def network(both, t, encoder_hidden_states, return_dict):
        answer = request.infer([both.numpy(), t.numpy(), encoder_hidden_states.numpy()])
        return [torch.from_numpy(answer[0])]

    return {name: models.diffusers_step(network, *inputs(device, torch.float32, batch, small))}


def onnx_runtime(name: str, device: str, dtype: torch.dtype, batch: int, small: bool):
    """The same step, diffusers' UNet exported to ONNX, by way of files that are gone afterwards.

    float32 alone: on a CPU ONNX Runtime has no products in bfloat16.
    """
    import onnxruntime as ort

    noise = Noise(models.diffusers_unet(device, torch.float32, small)).eval()
    names = "x", "t", "context"
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unet.onnx"
        with torch.no_grad():
            torch.onnx.export(
                noise,
                example(device, batch, small),
                path,
                input_names=names,
                dynamo=True,
                verbose=False,
            )
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def network(both, t, encoder_hidden_states, return_dict):
        values = both.numpy(), t.numpy(), encoder_hidden_states.numpy()
        return [torch.from_numpy(session.run(None, dict(zip(names, values)))[0])]

    return {name: models.diffusers_step(network, *inputs(device, torch.float32, batch, small))}


def groups(device: str, compiled: bool) -> list[dict[str, tuple]]:
    """Contenders that are in memory together: name -> (function, dtype)."""
    channels_last = partial(theirs, channels_last=True)
    if device != "cpu":
        half = torch.float16
        together = {
            "minisd": (ours, half),
            "minisd graph": (partial(ours, graph=True), half),
            "diffusers": (theirs, half),
            "diffusers channels_last": (channels_last, half),
        }
        also = {
            "minisd compiled": (partial(ours, compile=True), half),
            "diffusers compiled": (partial(channels_last, compile="max-autotune"), half),
            "diffusers reduce-overhead": (partial(channels_last, compile="reduce-overhead"), half),
        }
        return [together | also if compiled else together]
    fp32, bf16 = torch.float32, torch.bfloat16
    mine, my_half = {"minisd fp32": (ours, fp32)}, {"minisd bf16": (ours, bf16)}
    plain, last = {"diffusers fp32": (theirs, fp32)}, "channels_last"
    together = [
        mine | plain,
        my_half | {f"diffusers bf16 {last}": (channels_last, bf16)} | plain,
        mine | {f"diffusers fp32 {last}": (channels_last, fp32)},
    ]
    if compiled:  # the others are of batch 1
        together.append(mine | {"OpenVINO fp32": (openvino, fp32)})
        together.append(my_half | {"OpenVINO bf16": (openvino, bf16)})
        together.append(mine | {"ONNX Runtime fp32": (onnx_runtime, fp32)})
    compiled_theirs = partial(channels_last, compile="default")  # tuning takes longer than all else
    also = [
        mine | {"diffusers fp32 compiled": (compiled_theirs, fp32)},
        my_half | {"diffusers bf16 compiled": (compiled_theirs, bf16)},
    ]
    return together + also if compiled else together


def table(record: dict) -> str:
    """The Markdown tables of a result file, one for each group."""
    parts = [harness.origin(record)]
    compared = [row for row in record["rows"] if len(row["times"]) > 1]
    for row in compared or record["rows"]:  # but for those whose rival was not there
        times = row["times"]
        rivals = [name for name in times if not name.startswith("minisd")]
        heads = [f"batch {row['batch']}", "ms a step", "quartiles", "peak memory", "above weights"]
        errors = any("error" in t for t in times.values())
        heads += ["error"] * errors
        lines = []
        for name, t in times.items():
            ratios = [f"{times[rival]['ms'] / t['ms']:.2f}" for rival in rivals]
            memory = [harness.gigabytes(t["bytes"]), harness.gigabytes(t.get("above"))]
            error = [f"{t['error']:.1e}" if "error" in t else "-"] * errors
            lines.append([name, *harness.spread(t), *memory, *error, *ratios])
        parts.append(harness.markdown([*heads, *(f"x {name}" for name in rivals)], lines))
    return "\n\n".join(parts)


MUST = {  # (ours, theirs): how many times as fast, at least
    ("minisd fp32", "diffusers fp32"): 1.03,
    ("minisd fp32", "diffusers fp32 channels_last"): 1.03,
    ("minisd bf16", "diffusers fp32"): 1.7,
    ("minisd bf16", "diffusers bf16 channels_last"): 1.1,
    ("minisd fp32", "OpenVINO fp32"): 1.0,
    ("minisd bf16", "OpenVINO bf16"): 1.0,
}


def misses(rows: list[dict]) -> list[str]:
    """What misses its target at batch 1 on a CPU (on CUDA images have targets: bench.txt2img)."""
    bars = []
    for times in (row["times"] for row in rows if row["batch"] == 1):
        for (ours, theirs), bar in MUST.items():
            if ours in times and theirs in times:
                mine, other = times[ours], times[theirs]
                memory = mine["bytes"] / other["bytes"]
                bars.append((f"{theirs} / {ours}", other["ms"] / mine["ms"], ">=", bar))
                bars.append((f"memory of {ours} / {theirs}", memory, "<=", 1.0))
    return harness.slow(bars)


def main() -> int:
    args = harness.options(__doc__, "bench.unet", batch=int, compiled=True)
    device = torch.device(args.device).type
    for batch in [args.batch] if args.batch else [1] if args.quick else [1, 2, 8]:
        rows, file = [], "unet" if batch == 1 else f"unet_batch{batch}"
        together = groups(device, args.compiled and batch == 1 and not args.quick)
        if args.quick:  # small ones fit into memory all at once
            together = [{name: each for group in together for name, each in group.items()}]
        results: dict[str, torch.Tensor] = {}
        for group in together:
            builders = {
                name: (function, name, args.device, dtype, batch, args.quick)
                for name, (function, dtype) in group.items()
            }
            times = harness.contest(builders, args.device, args.rounds, results)
            exact = results.get("diffusers fp32")  # of the first group, of the same inputs
            for name, t in times.items() if exact is not None else ():
                t["error"] = ((results[name] - exact).norm() / exact.norm()).item()
            rows.append({"batch": batch, "times": times})
            harness.finish(file, rows, args, table, misses)
    return 0


if __name__ == "__main__":
    sys.exit(main())
