"""Models of SD v1.4's size with random weights, and one step of a run, for the benchmarks.

SMALL is a quarter of the width, for a trial run (--quick).
"""

import torch

SMALL = dict(block_out_channels=(64, 128, 256, 256), sample_size=32, cross_attention_dim=192)
FULL = dict(sample_size=64, cross_attention_dim=768)
SMALL_TEXT = dict(
    hidden_size=192, intermediate_size=768, num_hidden_layers=2, num_attention_heads=3
)
SMALL_VAE = dict(block_out_channels=(32, 64, 64, 64), sample_size=256)


def random_weights(like: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> dict:
    """Weights of variance 1 / inputs, cut from one pool of random numbers; norms 1, biases 0."""
    pool = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    out = {}
    for name, tensor in like.items():
        weight = torch.empty(tensor.shape, device=device, dtype=dtype)
        if tensor.ndim == 1:
            weight.fill_(name.endswith("weight"))
        else:
            flat, scale = weight.view(-1), tensor[0].numel() ** -0.5
            for start in range(0, flat.numel(), pool.numel()):
                part = flat[start : start + pool.numel()]
                torch.mul(pool[: part.numel()], scale, out=part)
        out[name] = weight
    return out


def random_model(make, device: str, dtype: torch.dtype):
    """What `make()` builds, with random weights, ready for inference; ours or diffusers'."""
    with torch.device("meta"):
        model = make()
    model.load_state_dict(random_weights(model.state_dict(), device, dtype), assign=True)
    return model.eval().requires_grad_(False)


def unet(device: str, dtype: torch.dtype, small: bool = False):
    from minisd import UNet, UNetConfig

    return random_model(lambda: UNet(UNetConfig(**(SMALL if small else FULL))), device, dtype)


def diffusers_unet(device: str, dtype: torch.dtype, small: bool = False):
    """The same of diffusers: the state dict has the same names, so the weights are the same."""
    from diffusers import UNet2DConditionModel

    numbers = SMALL if small else FULL
    return random_model(
        lambda: UNet2DConditionModel(attention_head_dim=8, **numbers), device, dtype
    )


def full_size(device: str, dtype: torch.dtype, small: bool = False, **options):
    """A StableDiffusion with random weights, computed as `minisd.load` would have it.

    options: compile, graph.
    """
    from minisd import AutoencoderKL, CLIPTextConfig, CLIPTextModel, VAEConfig
    from minisd.checkpoints.load import locate

    text = CLIPTextConfig(**(SMALL_TEXT if small else {}))
    vae = VAEConfig(**(SMALL_VAE if small else {}))
    parts = (
        random_model(lambda: CLIPTextModel(text), device, dtype),
        unet(device, dtype, small),
        random_model(lambda: AutoencoderKL(vae), device, dtype),
    )
    return joined(locate("shapes").tokenizer, *parts, **options)


def unet_alone(device: str, dtype: torch.dtype, small: bool, **options):
    """A StableDiffusion that has a UNet and nothing to encode or decode with."""
    nothing = torch.nn.Linear(1, 1)
    return joined(None, nothing, unet(device, dtype, small), nothing, **options)


def joined(tokenizer, text_encoder, unet, vae, **options):
    from minisd import NoiseSchedule, StableDiffusion
    from minisd.checkpoints.load import SD_V1_SCHEDULE

    schedule = NoiseSchedule.from_dict(SD_V1_SCHEDULE)
    sd = StableDiffusion(tokenizer, text_encoder, unet, vae, schedule, **options)
    sd.unet.attention = "sdpa" if sd.device.type == "cpu" else "triton"
    for model in (sd.unet, sd.vae):
        model.to(memory_format=torch.channels_last)
    return sd


def one_step(predict, step, x):
    """A function that takes a step of a run that is under way: what is prepared once is there."""
    state = None

    @torch.no_grad()
    def run():
        nonlocal state
        eps, state = predict(x, step, state)
        return step(x, eps)[0]

    return run


def diffusers_step(unet, x, uncond, cond, scale: float = 7.5):
    """The guided step of DDIM as diffusers' pipeline writes it."""
    from diffusers import DDIMScheduler

    from minisd.checkpoints.load import SD_V1_SCHEDULE

    scheduler = DDIMScheduler(clip_sample=False, **SD_V1_SCHEDULE)
    scheduler.set_timesteps(50)
    t, context = scheduler.timesteps[0], torch.cat([uncond.expand_as(cond), cond])

    @torch.no_grad()
    def step():
        both = unet(torch.cat([x, x]), t, encoder_hidden_states=context, return_dict=False)[0]
        u, c = both.chunk(2)
        return scheduler.step(u + scale * (c - u), t, x).prev_sample

    return step
