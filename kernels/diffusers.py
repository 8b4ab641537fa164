"""The kernels as the attention of a diffusers model, in one import.

    from minisd_kernels.diffusers import KernelAttention

    unet.set_attn_processor(KernelAttention())

For UNets whose attention is diffusers' `Attention`, Stable Diffusion 1.x, 2.x and XL among them.
Nothing of diffusers is imported: a processor is any callable with these arguments.
"""

from torch import Tensor

from . import ops


class KernelAttention:
    """A diffusers attention processor: softmax(q k^T * attn.scale + attention_mask) v by the
    kernels.

    Follows diffusers' AttnProcessor2_0, step by step: spatial_norm, group_norm, norm_q and
    norm_k, norm_cross, the residual connection and rescale_output_factor. attention_mask: what
    diffusers passes, added to the scores (diffusers makes one of a boolean mask before the
    processor is called). Fewer key heads than query heads are taken (kv_heads). ValueError for
    attention the kernels do not have: added_kv projections, heads of other widths for keys;
    whatever ops.attention refuses; and for arguments that this processor does not know, so that
    none is ignored.
    """

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **unknown,
    ) -> Tensor:
        if any(value is not None for value in unknown.values()):
            raise ValueError(f"KernelAttention: unknown arguments {', '.join(unknown)}")
        if getattr(attn, "added_kv_proj_dim", None) is not None:
            raise ValueError("KernelAttention: expected no added_kv projections, got some")
        x, context = hidden_states, encoder_hidden_states
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        image_size = x.shape[2:] if x.ndim == 4 else None
        if image_size is not None:
            x = x.flatten(2).transpose(1, 2)  # (batch, channels, h, w) -> (batch, h * w, channels)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        if context is None:
            context = x
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        q = attn.to_q(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        k, v = (  # may have fewer heads of the same width
            y.unflatten(-1, (-1, q.shape[-1])).transpose(1, 2)
            for y in (attn.to_k(context), attn.to_v(context))
        )
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        bias = self.bias(attn, attention_mask, q, k)
        op = ops.cross_attention if k.shape[2] <= ops.MAX_KEYS else ops.attention
        out = op(q, k, v, bias=bias, scale=attn.scale)

        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(-2)))
        if image_size is not None:
            out = out.transpose(1, 2).unflatten(-1, image_size)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor

    def bias(self, attn, mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """The mask, (batch, 1 or queries, keys) or (batch * heads, ...), as (batch, 1 or heads, 1
        or queries, keys)."""
        if mask is None:
            return None
        mask = attn.prepare_attention_mask(mask, k.shape[2], q.shape[0])
        return mask.view(q.shape[0], attn.heads, -1, mask.shape[-1]).to(q.dtype)
