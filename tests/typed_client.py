"""A program that uses minisd, for type checkers: test_types.py runs `mypy --strict` on it.

`reveal_type` says what mypy takes a value for, which test_types.py compares with its list, and a
line with WRONG has to be an error. It is never run.
"""

from collections.abc import Mapping

from PIL import Image
from torch import Tensor

import minisd
from minisd import AttentionEdit, Drawing, PromptToPrompt, Step
from minisd.drawing import Options


def last_channel(x: Tensor, step: Step) -> Tensor:
    return x[:, -1:] if step.first else x


def options_for(steps: int) -> Options:
    return {"steps": steps, "sampler": "ddim", "on_step": last_channel, "progress": False}


sd = minisd.load("shapes", device="cpu", dtype="float32", attention="sdpa")
reveal_type(sd)
reveal_type(sd.unet)
drawn = sd.txt2img("a red circle", steps=4, seed=[1, 2], num_images=2, height=64, width=64)
reveal_type(drawn)
image: Image.Image = drawn[0]
reveal_type(sd.img2img(image, ["a blue circle"], 0.5, **options_for(4)))
reveal_type(sd.decode(sd.noise(0)))
reveal_type(sd.decode(sd.noise(0), as_tensor=True))
reveal_type(sd.encode_prompt(["a"]))

edited = minisd.edit_prompt(sd, "a red circle", "a blue circle", cross_steps=0.8, self_steps=0.4)
reveal_type(edited)
reveal_type(minisd.seed_baseline(sd, "a red circle", "a blue circle", **options_for(4)))
p2p = PromptToPrompt(sd, "a cat", "a dog", steps=4, reweight={"dog": 2.0}, collect_maps=True)
reveal_type(p2p.maps.word("dog", row=1))
inversion = minisd.invert(sd, image, "a red circle", steps=4, trajectory=True)
reveal_type(inversion)
reveal_type(minisd.redraw(sd, minisd.null_text(sd, inversion, 3.0), guidance=3.0))
recording = minisd.record(sd, "a cat", steps=4)
reveal_type(recording.z)
reveal_type(minisd.replay(sd, recording, "a dog"))
reveal_type(minisd.heatmap(sd, "a cat", until=0.5))

uncond, cond = sd.encode_prompt(""), sd.encode_prompt("a cat")
predict = minisd.cfg(sd.network, uncond, cond, 7.5, lambda step: p2p(step))
for step in minisd.DDIM(sd.schedule, 4):
    eps, state = predict(sd.noise(0), step)
    reveal_type(eps)
    reveal_type(step(sd.noise(0), eps))
reveal_type(minisd.denoise(sd.noise(0), minisd.DPMpp2M(sd.schedule, 4), predict))
edits: Mapping[str, AttentionEdit] = {sd.unet.sites("cross")[0]: AttentionEdit()}
reveal_type(sd.unet.forward(sd.noise(0), sd.noise(0), cond, edits))
reveal_type(Drawing(steps=4).sampler)

sd.merge("a.safetensors", ("b.safetensors", 0.5))
reveal_type(sd.add_embedding("word.safetensors"))
try:
    reveal_type(minisd.inpaint(sd, "in.png", b"mask", ["a", "b"], seed=[1, 2], progress=False))
except (minisd.Cancelled, minisd.CheckpointError) as stop:
    reveal_type(stop)
minisd.save(image, "a.png")
reveal_type(minisd.recipe("a.png"))
reveal_type(minisd.from_recipe(image, sd, progress=False))

sd.txt2img("a", sampler="euler")  # WRONG
sd.txt2img("a", stepz=4)  # WRONG
sd.txt2img("a", 7)  # WRONG
sd.img2img(3, "a")  # WRONG
minisd.invert(sd, 3, "a")  # WRONG
minisd.edit_prompt(sd, "a", "b", steps="4")  # WRONG
minisd.edit_prompt(sd, "a", "b", compat="gogle")  # WRONG
minisd.load("shapes", attention="flash")  # WRONG
Drawing(sampler="dpm")  # WRONG
sd.merge(3)  # WRONG
minisd.save("a.png", image)  # WRONG
minisd.blend(sd, "a.png", 3, "a")  # WRONG
minisd.regional(sd, "a", {"b": 3})  # WRONG
minisd.attribute(sd, "a", "mask.png", by=["tokn"])  # WRONG
PromptToPrompt(sd, "a cat", "a dog", steps=4, edit="replce")  # WRONG
PromptToPrompt(sd, "a cat", "a dog", steps=4, reweight=["x"])  # WRONG
