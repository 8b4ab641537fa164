"""UNet, VAE and CLIP text encoder equal diffusers' and transformers' on tiny random models.

The bar is max |difference| <= 1e-5 max |reference| in fp32. Every parameter is random, norms and
biases too. Mistakes that a looser test would not see (epsilon of a GroupNorm, tanh GELU, swapped
norms ...) are made on purpose below, and have to fail.
"""

import inspect
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    CROSS_DOWN,
    CROSS_UP,
    ReferenceTextConfig,
    ReferenceVAE,
    UNet2DConditionModel,
    difference,
    text_pair,
    unet_pair,
    vae_pair,
)

import minisd.models.attention
import minisd.models.clip
import minisd.models.ops
import minisd.models.unet
import minisd.models.vae
from minisd import AttentionEdit, CLIPTextConfig, UNet, UNetConfig, VAEConfig
from minisd.models.unet import timestep_embedding

BAR = 1e-5

UNETS = {  # name: config, latent size
    "one head of 8": (
        dict(block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=1),
        (8, 8),
    ),
    "head dim 40 and 80": (
        dict(block_out_channels=(80, 160), layers_per_block=1, attention_head_dim=2),
        (6, 10),
    ),
    "head dim 160": (
        dict(block_out_channels=(160, 160), layers_per_block=1, attention_head_dim=1),
        (5, 4),
    ),
    "three levels, ragged latent": (
        dict(block_out_channels=(16, 24, 32), layers_per_block=2, attention_head_dim=2),
        (9, 13),
    ),
    "four levels, heads per block": (
        dict(
            block_out_channels=(16, 24, 32, 48), layers_per_block=1, attention_head_dim=[2, 3, 4, 6]
        ),
        (16, 8),
    ),
    "four levels, latent of 3x5": (
        dict(block_out_channels=(8, 8, 16, 16), layers_per_block=2, attention_head_dim=1),
        (3, 5),
    ),
    "cross attention in every block": (
        dict(
            block_out_channels=(16, 32),
            layers_per_block=3,
            attention_head_dim=2,
            down_block_types=(CROSS_DOWN,) * 2,
            up_block_types=(CROSS_UP,) * 2,
        ),
        (7, 7),
    ),
    "no flip, shift 1, eps": (
        dict(
            block_out_channels=(16, 32),
            layers_per_block=1,
            attention_head_dim=4,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-3,
            norm_num_groups=4,
        ),
        (8, 8),
    ),
    "other numbers of channels in and out": (
        dict(
            block_out_channels=(16, 16),
            layers_per_block=1,
            attention_head_dim=2,
            in_channels=9,
            out_channels=8,
        ),
        (4, 8),
    ),
    "one level": (
        dict(
            block_out_channels=(16,),
            layers_per_block=1,
            attention_head_dim=2,
            down_block_types=(CROSS_DOWN,),
            up_block_types=(CROSS_UP,),
        ),
        (4, 3),
    ),
}
VAES = {
    "depth 1": dict(block_out_channels=(16,), layers_per_block=1, norm_num_groups=4),
    "depth 3": dict(block_out_channels=(8, 16, 24), layers_per_block=2, norm_num_groups=8),
    "depth 4, other channels": dict(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=3,
        in_channels=1,
        out_channels=1,
    ),
}
TEXTS = {
    "quick_gelu": dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    ),
    "gelu, eps, 20 positions": dict(
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_act="gelu",
        layer_norm_eps=1e-3,
        max_position_embeddings=20,
    ),
}


# What makes the activations that the norms read: layers after a norm, and the biases of those that
# pass activations on.
SIZE = re.compile(
    r"(conv_in|conv1|conv2|time_emb_proj|proj_in|to_out\.0|net\.2|\w+_embedding|out_proj|fc2)"
    r"\.(weight|bias)$"
    r"|(conv_shortcut|samplers\.0\.conv|proj_out)\.bias$"
)


def shrink(scale, reference, ours):
    """Make the activations `scale` times as large at every norm."""
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if SIZE.search(name):
                parameter.mul_(scale)
    ours.load_state_dict(reference.state_dict())


def unet_case(config, size, scale=1.0):
    """-> our UNet, and a function that runs it on 3 latents at 3 times and tells its difference
    from the reference."""
    reference, ours = unet_pair(**config)
    shrink(scale, reference, ours)
    torch.manual_seed(1)
    x, context = torch.randn(3, ours.config.in_channels, *size), torch.randn(3, 11, 24)
    t = torch.tensor([0, 499, 999])
    with torch.no_grad():
        expected = reference(x, t, context).sample
    return ours, torch.no_grad()(lambda: difference(ours(x, t, context), expected))


def vae_case(config, size=(24, 40), scale=1.0):
    reference, ours = vae_pair(**config)
    shrink(scale, reference, ours)
    torch.manual_seed(1)
    x, z = (
        torch.randn(2, ours.config.in_channels, *size),
        torch.randn(2, ours.config.latent_channels, 5, 3),
    )
    with torch.no_grad():
        posterior = reference.encode(x).latent_dist
        expected = posterior.mean, posterior.logvar, reference.decode(z).sample
    return ours, torch.no_grad()(
        lambda: max(map(difference, (*ours.encode(x), ours.decode(z)), expected))
    )


def text_case(config, scale=1.0):
    reference, ours = text_pair(**config)
    shrink(scale, reference, ours)
    length = config.get("max_position_embeddings", 77)
    ids = torch.randint(0, 99, (4, length), generator=torch.Generator().manual_seed(1))
    lengths = (1, 7, ids.shape[1])
    with torch.no_grad():
        expected = [reference(ids[:, :n]).last_hidden_state for n in lengths]
    return ours, torch.no_grad()(
        lambda: max(difference(ours(ids[:, :n]), e) for n, e in zip(lengths, expected))
    )


@pytest.mark.parametrize("name", UNETS)
def test_unet(name, record_property):
    _, run = unet_case(*UNETS[name])
    error = run()
    record_property("UNet, tiny", error)
    assert error <= BAR


@pytest.mark.parametrize("name", VAES)
def test_vae(name, record_property):
    _, run = vae_case(VAES[name])
    error = run()
    record_property("VAE, tiny", error)
    assert error <= BAR


@pytest.mark.parametrize("name", TEXTS)
def test_text(name, record_property):
    _, run = text_case(TEXTS[name])
    error = run()
    record_property("CLIP, tiny", error)
    assert error <= BAR


SMALL = 1e-3  # activations of this size make the epsilon of a norm visible


# ---- mistakes that have to be seen
# ---------------------------------------------------------------------------------


def functional(**changed):
    """torch.nn.functional with some functions exchanged, for one module of ours: the reference
    keeps the real one."""
    return SimpleNamespace(**(vars(F) | changed))


def swapped_norms(self, x, c, forward=minisd.models.unet.TransformerBlock.forward):
    self.norm1, self.norm2 = self.norm2, self.norm1
    out = forward(self, x, c)
    self.norm1, self.norm2 = self.norm2, self.norm1
    return out


def sinusoids(**change):
    return lambda t, dim, flip, shift: timestep_embedding(
        t, dim, **({"flip_sin_to_cos": flip, "freq_shift": shift} | change)
    )


def reads(cls, **change):
    return lambda values, read=cls.from_dict: read(values | change)


MISTAKES = {  # name: comparison, what is broken, how
    "swapped norms": ("unet", minisd.models.unet.TransformerBlock, "forward", swapped_norms),
    "tanh GELU": ("unet", minisd.models.ops, "GELU", "tanh"),
    "eps of the transformer's norm": ("unet", minisd.models.unet, "TRANSFORMER_NORM_EPS", 1e-5),
    "eps of the UNet's resnets": (
        "unet",
        UNetConfig,
        "from_dict",
        reads(UNetConfig, norm_eps=1e-6),
    ),
    "sin before cos": (
        "unet",
        minisd.models.unet,
        "timestep_embedding",
        sinusoids(flip_sin_to_cos=False),
    ),
    "shifted frequencies": (
        "unet",
        minisd.models.unet,
        "timestep_embedding",
        sinusoids(freq_shift=1),
    ),
    "upsampling that always doubles": (
        "unet",
        minisd.models.unet.Upsample,
        "forward",
        lambda self, x, size=None: F.interpolate(
            self.conv(F.interpolate(x, scale_factor=2.0)), size=size
        ),
    ),
    "eps of the VAE's norms": ("vae", minisd.models.vae, "NORM_EPS", 1e-5),
    "symmetric padding in the encoder": (
        "vae",
        minisd.models.vae.Downsample,
        "forward",
        lambda self, x: F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1),
    ),
    "the true GELU in CLIP": ("text", minisd.models.clip, "ACTIVATIONS", {"quick_gelu": F.gelu}),
    "no causal mask": (
        "text",
        minisd.models.clip,
        "F",
        functional(
            scaled_dot_product_attention=lambda q, k, v, is_causal: F.scaled_dot_product_attention(
                q, k, v
            )
        ),
    ),
    "eps of CLIP's norms": (
        "text",
        CLIPTextConfig,
        "from_dict",
        reads(CLIPTextConfig, layer_norm_eps=1e-6),
    ),
}


def case(kind, scale):
    if kind == "unet":
        return unet_case(*UNETS["three levels, ragged latent"], scale=scale)
    if kind == "vae":
        return vae_case(VAES["depth 3"], scale=scale)
    return text_case(TEXTS["quick_gelu"], scale=scale)


@pytest.mark.parametrize("kind", ("unet", "vae", "text"))
def test_small_activations_show_the_eps_of_every_norm(kind):
    ours, run = case(kind, SMALL)
    assert run() <= BAR
    norms = {name: module for name, module in ours.named_modules() if hasattr(module, "eps")}
    assert len(norms) > 5
    for name, norm in norms.items():
        norm.eps *= 10
        assert run() > 2 * BAR, name
        norm.eps /= 10


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, monkeypatch):
    kind, *broken = MISTAKES[name]
    monkeypatch.setattr(*broken)
    assert max(case(kind, scale)[1]() for scale in (1, SMALL)) > 2 * BAR


# ---- reduced precision
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_reduced_precision(dtype):
    """Ours in bf16 or fp16 errs at most twice as much against the fp32 reference as the reference
    itself does."""
    ids, t = torch.arange(20).reshape(2, 10), torch.tensor([0, 900])
    torch.manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 11, 24)
    picture, z = torch.randn(2, 3, 24, 16), torch.randn(2, 4, 6, 4)

    def cast(*tensors):
        return [tensor.to(dtype) for tensor in tensors]

    config = dict(block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=2)
    with torch.no_grad():
        reference, ours = unet_pair(**config)
        exact = reference(x, t, context).sample
        (x16, context16), _ = cast(x, context), (reference.to(dtype), ours.to(dtype))
        check(ours(x16, t, context16), reference(x16, t, context16).sample, exact)

        reference, ours = vae_pair(**VAES["depth 3"])
        exact_mean, exact_picture = (
            reference.encode(picture).latent_dist.mean,
            reference.decode(z).sample,
        )
        (picture16, z16), _ = cast(picture, z), (reference.to(dtype), ours.to(dtype))
        check(ours.encode(picture16)[0], reference.encode(picture16).latent_dist.mean, exact_mean)
        check(ours.decode(z16), reference.decode(z16).sample, exact_picture)

        reference, ours = text_pair(**TEXTS["quick_gelu"])
        exact = reference(ids).last_hidden_state
        check(ours.to(dtype)(ids), reference.to(dtype)(ids).last_hidden_state, exact)


def check(ours, theirs, exact):
    assert ours.dtype == theirs.dtype and ours.isfinite().all()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_the_log_variance_is_clamped():
    reference, ours = vae_pair(**VAES["depth 3"])
    with torch.no_grad():
        reference.quant_conv.weight.mul_(100)
        ours.load_state_dict(reference.state_dict())
        x = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(1))
        _, logvar = ours.encode(x)
        assert difference(logvar, reference.encode(x).latent_dist.logvar) <= BAR
    assert (logvar.min(), logvar.max()) == (-30, 20)


# ---- what is ours alone
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    return unet_pair(block_out_channels=(16, 24, 32), layers_per_block=1, attention_head_dim=2)


def test_guidance_groups_share_their_prefix(pair):
    """3 groups of 2 latents are what the reference gives for the 6 rows; a prepared context gives
    the same bits."""
    reference, ours = pair
    torch.manual_seed(0)
    x, context, t = torch.randn(2, 4, 9, 6), torch.randn(6, 5, 24), torch.tensor([3, 700])
    with torch.no_grad():
        expected = reference(x.repeat(3, 1, 1, 1), t.repeat(3), context).sample
        got = ours(x, t, context)
        assert difference(got, expected) <= BAR
        assert torch.equal(got, ours(x, t, ours.prepare(context)))
        assert torch.equal(ours(x, torch.tensor(5), context), ours(x, torch.tensor([5]), context))
        rows = []
        ours.down_blocks[0].attentions[0].transformer_blocks[0].norm1.register_forward_hook(
            lambda module, args, out: rows.append(len(out))
        )
        first_self = ours.sites("self")[0]
        ours(x, t, context)
        ours(x, t, context, {first_self: AttentionEdit(source_row=torch.arange(6))})
        assert rows == [2, 6]  # an edit at the first site separates the groups before it


def test_times_of_all_steps_at_once(pair):
    """Rows of what `prepare_times` makes of many times stand for each of them."""
    reference, ours = pair
    torch.manual_seed(1)
    x, context, times = (
        torch.randn(2, 4, 9, 6),
        torch.randn(4, 5, 24),
        torch.tensor([981, 700, 3, 0]),
    )
    with torch.no_grad():
        rows = ours.prepare_times(times)
        assert rows.shape == (
            4,
            sum(m.conv1.out_channels for m in ours.modules() if hasattr(m, "time_emb_proj")),
        )
        for i in range(4):
            assert difference(ours(x, rows[i : i + 1], context), ours(x, times[i], context)) <= BAR
        expected = reference(x.repeat(2, 1, 1, 1), times[1:3].repeat(2), context).sample
        assert difference(ours(x, rows[1:3], context), expected) <= BAR
        assert difference(ours(x, rows[2:3], context), ours(x, times[1], context)) > 1e-2
        for wrong in (rows, rows[:1, 1:], rows[None, :1]):
            with pytest.raises(ValueError, match="one value for each latent"):
                ours(x, wrong, context)


def test_sites(pair):
    _, ours = pair
    modules = dict(ours.named_modules())
    assert ours.sites() == [name for name in modules if name.endswith(("attn1", "attn2"))]
    assert len(ours.sites()) == 2 * len(ours.sites("self")) == 2 * len(ours.sites("cross"))
    seen = {}
    for name in ours.sites("self"):
        modules[name].to_q.register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out.shape[1]})
        )
    with torch.no_grad():
        ours(torch.randn(1, 4, 9, 6), torch.tensor(1), torch.randn(1, 5, 24))
    assert list(seen) == ours.sites("self")  # forward order
    assert {name: math.prod(ours.grid(name, (9, 6))) for name in seen} == seen
    assert ours.sites("self", max_tokens=15, size=(9, 6)) == [
        name for name in seen if seen[name] <= 15
    ]
    assert ours.sites(max_tokens=15, size=(9, 6)) != ours.sites(max_tokens=15)
    # by which names a block looks its edits and its time up
    blocks = {name: modules[name.rsplit(".", 1)[0]].name for name in ours.sites()}
    assert all(name.startswith(f"{block}.attn") for name, block in blocks.items())
    resnets = {name: m for name, m in modules.items() if hasattr(m, "time_emb_proj")}
    assert resnets and all(module.name == name for name, module in resnets.items())


def test_attention_is_set_everywhere(pair, monkeypatch):
    """At all sites, for the model or for one call."""
    _, ours = pair
    seen, attention = [], minisd.models.attention.attention
    monkeypatch.setattr(
        minisd.models.attention,
        "attention",
        lambda q, k, v, edit, impl: seen.append(impl) or attention(q, k, v, edit, impl),
    )

    def used(**how):
        seen.clear()
        with torch.no_grad():
            ours(torch.randn(1, 4, 8, 8), torch.tensor(1), torch.randn(1, 5, 24), **how)
        return seen

    sites = len(ours.sites())
    assert ours.attention == "sdpa" and used() == ["sdpa"] * sites
    ours.attention = "reference"
    assert used() == ["reference"] * sites and used(attention="sdpa") == ["sdpa"] * sites
    assert ours.attention == "reference"
    ours.attention = "sdpa"
    with pytest.raises(ValueError, match="triton, sdpa, reference"):
        used(attention="flash")
    with pytest.raises(
        ValueError, match="attention is 'flash', expected one of triton, sdpa, reference"
    ):
        ours.attention = "flash"


def test_unet_errors(pair):
    _, ours = pair
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor(1), torch.randn(2, 5, 24)
    with pytest.raises(ValueError, match="no site is called 'attn7'"):
        ours(x, t, context, {"attn7": AttentionEdit()})
    with pytest.raises(ValueError, match="multiple of the latents' rows"):
        ours(x, t, context[:1])
    for t_given, got in (
        (torch.tensor([1, 2, 3]), r"\(3,\)"),
        (5, "5"),
        (torch.ones(2, 1), r"\(2, 1\)"),
    ):
        with pytest.raises(
            ValueError,
            match=f"t: got {got}, expected a tensor, 0-d or with one value for each latent",
        ):
            ours(x, t_given, context)
    for wrong in (x[:, :3], x[0], x[:0], None):
        with pytest.raises(ValueError, match=r"x: got .*, expected a tensor \(B, 4, h, w\)"):
            ours(wrong, t, context)
    for wrong in (context[..., :5], context[0], context[:, :0], "a cat"):
        with pytest.raises(ValueError, match=r"context: got .*, expected a tensor \(R, L, 24\)"):
            ours(x, t, wrong)
    with pytest.raises(ValueError, match="kind is 'both', expected one of None"):
        ours.sites("both")


def test_vae_and_text_encoder_errors():
    vae = minisd.models.vae.AutoencoderKL(VAEConfig(block_out_channels=(4, 4), norm_num_groups=2))
    for wrong in (torch.zeros(1, 4, 8, 8), torch.zeros(3, 8, 8), None):
        with pytest.raises(ValueError, match=r"image: got .*, expected a tensor \(B, 3, H, W\)"):
            vae.encode(wrong)
    for wrong in (torch.zeros(1, 3, 8, 8), torch.zeros(4, 8, 8), torch.zeros(1, 4, 0, 8)):
        with pytest.raises(ValueError, match=r"latents: got .*, expected a tensor \(B, 4, h, w\)"):
            vae.decode(wrong)
    text = minisd.models.clip.CLIPTextModel(
        CLIPTextConfig(hidden_size=8, num_attention_heads=1, vocab_size=9)
    )
    with pytest.raises(ValueError, match="token ids: got 78 in a row, expected at most 77"):
        text(torch.zeros(1, 78).long())
    for wrong in (torch.zeros(77).long(), [[1, 2]]):
        with pytest.raises(ValueError, match=r"token ids: got .*, expected a tensor \(B, L\)"):
            text(wrong)


def test_the_time_embedding_is_the_formula():
    """cos, sin of t 10000^(-i / half) in float64, at an odd t and a large one."""
    t = torch.tensor([1, 999])
    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(16).double() / 16)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert (
        timestep_embedding(t, 32) - expected
    ).abs().max() < 1e-4  # fp32 holds t * freq to 6e-5 at t = 999


@pytest.mark.parametrize(
    "config, change, words",
    (
        (
            UNetConfig,
            {"use_linear_projection": True},
            "use_linear_projection: got True, but this key is unknown",
        ),
        (UNetConfig, {"act_fn": "gelu"}, "act_fn: got 'gelu', supported is 'silu'"),
        (UNetConfig, {"class_embed_type": "timestep"}, "class_embed_type"),
        (UNetConfig, {"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types: expected 4"),
        (UNetConfig, {"attention_head_dim": [8, 8]}, "expected a number or 4 of them"),
        (
            UNetConfig,
            {"attention_head_dim": None},
            r"attention_head_dim: got None, expected int \| tuple",
        ),
        (UNetConfig, {"norm_eps": "1e-5"}, "norm_eps: got '1e-5', expected float"),
        (UNetConfig, {"flip_sin_to_cos": None}, "flip_sin_to_cos: got None, expected bool"),
        (UNetConfig, {"sample_size": [64]}, r"sample_size: got \(64,\), expected int \| tuple"),
        (UNetConfig, {"block_out_channels": [320, "640"]}, "block_out_channels: got"),
        (VAEConfig, {"scaling_factor": None}, "scaling_factor: got None, expected float"),
        (VAEConfig, {"latents_mean": [0.0]}, "latents_mean"),
        (
            VAEConfig,
            {"mid_block_add_attention": False},
            "mid_block_add_attention: got False, supported is True",
        ),
        (
            CLIPTextConfig,
            {"hidden_act": "relu"},
            "hidden_act: got 'relu', supported are quick_gelu, gelu",
        ),
    ),
)
def test_configs_refuse_other_maths(config, change, words):
    config.from_dict({"_class_name": "x", "class_embed_type": None, "use_linear_projection": False})
    with pytest.raises(ValueError, match=words):
        config.from_dict(change)


def other_value(value):
    """A value of the same kind, or 1 for None, that is not `value`."""
    if isinstance(value, bool) or value is None:
        return not value if value is not None else 1
    return value + (
        type(value)("x") if isinstance(value, str) else value if isinstance(value, tuple) else 1
    )


@pytest.mark.parametrize(
    ("config", "reference", "harmless"),
    [
        (UNetConfig, UNet2DConditionModel, {"addition_embed_type_num_heads"}),
        (VAEConfig, ReferenceVAE, {"force_upcast"}),
    ],
)
def test_every_option_of_diffusers_is_either_read_or_refused(config, reference, harmless):
    parameters = inspect.signature(reference.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    config.from_dict(defaults)
    unread = defaults.keys() - config.__dataclass_fields__.keys() - harmless
    assert len(unread) > 5
    for key in unread:
        with pytest.raises(ValueError, match=f"{key}: got"):
            config.from_dict(defaults | {key: other_value(defaults[key])})


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (UNetConfig, UNet2DConditionModel),
        (VAEConfig, ReferenceVAE),
        (CLIPTextConfig, ReferenceTextConfig),
    ],
)
def test_an_absent_key_is_the_reference_s_default(config, reference):
    parameters = inspect.signature(reference.__init__).parameters
    defaults = {name: parameters[name].default for name in config.__dataclass_fields__}
    assert vars(config.from_dict({})) == defaults
    assert vars(config()) != defaults  # of Stable Diffusion v1


def test_models_build_without_memory():
    with torch.device("meta"):
        model = UNet()
    assert sum(parameter.numel() for parameter in model.parameters()) == 859_520_964
    assert all(tensor.is_meta for tensor in model.state_dict().values())
