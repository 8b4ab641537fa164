"""KernelAttention in tiny diffusers models, in Triton's interpreter, against diffusers' own
attention.

The interpreter's session is that of test_kernels_interpreter.py.
"""

import os
from pathlib import Path

import pytest
import torch
from minisd_kernels import ops
from minisd_kernels.diffusers import KernelAttention

diffusers = pytest.importorskip("diffusers")


def processors(model):
    return {type(each).__name__ for each in model.attn_processors.values()}


if os.environ.get("TRITON_INTERPRET") != "1":
    from diffusers.models.attention_processor import Attention

    @pytest.fixture
    def spy(monkeypatch):
        """The ops by their formula, so that all of the processor but the kernels runs; what they
        were asked for."""
        from minisd_kernels import reference

        asked = []

        def op(q, k, v, *, bias, scale):
            asked.append((tuple(q.shape), k.shape[2], None if bias is None else tuple(bias.shape)))
            return reference.attention(q, k, v, bias=bias, scale=scale)

        monkeypatch.setattr(ops, "attention", op)
        monkeypatch.setattr(ops, "cross_attention", op)
        return asked

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"bias": True},
            {"cross_attention_dim": 24},
            {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm"},
            {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0},
            {"scale_qk": False},
            {"qk_norm": "layer_norm"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("masked", [False, True])
    def test_every_part_of_a_processor(options, masked, spy):
        torch.manual_seed(0)
        attn = Attention(32, heads=2, dim_head=16, **options)
        for parameter in attn.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        image = "norm_num_groups" in options
        x = torch.randn(2, 32, 3, 5) if image else torch.randn(2, 15, 32)
        context = torch.randn(2, 7, 24) if "cross_attention_dim" in options else None
        mask = torch.randn(2, 1, 15 if context is None else 7) if masked else None
        with torch.no_grad():
            want = attn(x, context, attention_mask=mask)
            attn.set_processor(KernelAttention())
            got = attn(x, context, attention_mask=mask)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
        assert spy == [
            (
                (2, 2, 15, 16),
                15 if context is None else 7,
                (2, 2, 1, 15 if context is None else 7) if masked else None,
            )
        ]

    def test_fewer_key_heads(spy):
        """Each of them beside itself, in diffusers' own attention, is the same."""
        torch.manual_seed(0)
        few = Attention(32, heads=4, kv_heads=2, dim_head=8, processor=KernelAttention())
        full, x = Attention(32, heads=4, dim_head=8), torch.randn(2, 5, 32)
        state = few.state_dict()
        for name in ("to_k.weight", "to_v.weight"):
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1)
        full.load_state_dict(state)
        with torch.no_grad():
            torch.testing.assert_close(few(x), full(x), atol=1e-6, rtol=1e-5)

    def test_what_it_does_not_know_is_refused(spy):
        attn, x = Attention(32, heads=2, dim_head=16), torch.randn(1, 4, 32)
        with pytest.raises(ValueError, match="KernelAttention: unknown arguments ip_adapter_masks"):
            KernelAttention()(attn, x, ip_adapter_masks=[1])
        with pytest.raises(ValueError, match="expected no added_kv projections"):
            KernelAttention()(Attention(32, heads=2, dim_head=16, added_kv_proj_dim=8), x)

else:
    from test_kernels_interpreter import quick_interpreter  # noqa: F401, a fixture

    @pytest.fixture
    def unet():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=24,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=8,
        )

    @torch.no_grad()
    def test_a_unet(unet):
        """The code in kernels/README.md, word for word: equal to diffusers' own attention, a mask
        of the text too."""
        x, context = (
            torch.randn(2, 4, 12, 12),
            torch.randn(2, 77, 24),
        )  # 144 positions: both ops run
        mask = torch.arange(77) < torch.tensor([[77], [9]])
        want = unet(x, 10, context).sample
        masked = unet(x, 10, context, encoder_attention_mask=mask).sample
        assert (want - masked).abs().max() > 1e-3
        readme = (Path(__file__).parents[1] / "kernels/README.md").read_text()
        exec(readme.split("```python\n")[1].split("```")[0], {"unet": unet})
        assert processors(unet) == {"KernelAttention"}
        torch.testing.assert_close(unet(x, 10, context).sample, want, atol=1e-4, rtol=0)
        got = unet(x, 10, context, encoder_attention_mask=mask).sample
        torch.testing.assert_close(got, masked, atol=1e-4, rtol=0)

    def test_a_unet_is_trained(unet):
        """The gradients of a weight on the way to q, k and v."""
        x, context = torch.randn(1, 4, 4, 4), torch.randn(1, 7, 24)
        grads = []
        for processor in (None, KernelAttention()):
            if processor is not None:
                unet.set_attn_processor(processor)
            unet.zero_grad()
            unet(x, 10, context).sample.square().sum().backward()
            block = unet.mid_block.attentions[0].transformer_blocks[0]
            grads.append(
                [p.grad.clone() for site in (block.attn1, block.attn2) for p in site.parameters()]
            )
        for got, want in zip(*reversed(grads)):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
