"""Linear layers and convolutions on a CPU by oneDNN, with the weights of convolutions in the order
that it computes in.

torch.nn gives a float32 linear layer to MKL, which leaves AVX-512 unused on AMD processors, and
brings the weights of a convolution into oneDNN's order at every call, which for small pictures
takes as long as the convolution itself. Here a linear layer goes to oneDNN, and the weights of a
convolution change their order at the first call and stay so: the plain ones are dropped, nothing is
held twice. The result is the same up to the order of the sums.

The operators are those that torch.compile uses for frozen models. `bench/NOTES.md` has what it
gains.
"""

import functools
import platform

import torch
from torch import nn


@functools.cache
def available(dtype: torch.dtype) -> bool:
    """Whether this processor's oneDNN computes in that dtype."""
    if not (
        torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")
    ):
        return False
    return (
        dtype == torch.float32
        or dtype == torch.bfloat16
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def use_onednn(model: nn.Module) -> nn.Module:
    """Let the model's linear layers and 2-D convolutions be computed by oneDNN where that can be:
    on a CPU, in a dtype that is `available`, without gradients. For models that are done with
    training; state dicts stay what they are.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) is nn.Conv2d and module.groups == 1:
            module.__class__ = Conv2d
    return model


def usable(x, layer: nn.Module) -> bool:
    if x.device.type != "cpu" or layer.weight.device.type != "cpu" or x.dtype != layer.weight.dtype:
        return False
    wants_gradient = layer.weight.requires_grad or x.requires_grad and torch.is_grad_enabled()
    return available(x.dtype) and not wants_gradient


class Linear(nn.Linear):
    """y = x W^T + b. x: (..., in_features) -> (..., out_features)."""

    def forward(self, x):
        if torch.compiler.is_compiling() or not usable(x, self):
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Conv2d(nn.Conv2d):
    """nn.Conv2d whose weight is in oneDNN's order from the first call without gradients on.

    It is plain again after a change of dtype or device and before a state dict is loaded, and for
    good after a call that needs gradients.
    """

    stays_plain = False

    def forward(self, x):
        if torch.compiler.is_compiling():
            return self._conv_forward(
                x, self.weight.to_dense() if self.weight.is_mkldnn else self.weight, self.bias
            )
        if self.stays_plain or not usable(x, self):
            self.unpack()
            self.stays_plain = True
            return super().forward(x)
        numbers = [list(self.padding), list(self.stride), list(self.dilation), self.groups]
        if not self.weight.is_mkldnn:
            sizes = [
                2,
                self.in_channels,
                64,
                64,
            ]  # a hint: other sizes are computed with the same order
            packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *numbers, sizes)
            self.weight = nn.Parameter(packed, requires_grad=False)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *numbers, "none", [], ""
        )

    def unpack(self):
        if self.weight.is_mkldnn:
            self.weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)

    def _apply(self, *args, **kwargs):  # .to, .half and the like
        self.unpack()
        self.stays_plain = False
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args):
        self.unpack()
        super()._load_from_state_dict(*args)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_mkldnn:
            destination[prefix + "weight"] = self.weight.to_dense()
