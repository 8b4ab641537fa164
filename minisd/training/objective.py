"""What training minimises, and how its times and its noise are drawn.

The objective is that of Rombach et al. 2022, https://arxiv.org/abs/2112.10752 (eq. 2, with the text
encoder trained along as in its section 4.3), after Ho et al. 2020,
https://arxiv.org/abs/2006.11239. `layout_loss` and `summary_loss` help small models to learn where
things go and what the caption says; their heads are not exported.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..models.vae import AutoencoderKL
from ..models.vq import VQModel, straight_through
from ..sampling.schedule import NoiseSchedule


def autoencoder_loss(vae: AutoencoderKL, x: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """mean |x - decode(mean + std * noise)| + kl_weight * mean KL(N(mean, std^2) || N(0, 1)).

    x: (B, 3, H, W) in [-1, 1]; noise: normal, of the latent's shape (B, latent_channels, h, w).
    """
    mean, logvar = vae.encode(x)
    z = mean + torch.exp(0.5 * logvar) * noise
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    return F.l1_loss(vae.decode(z).float(), x) + kl_weight * kl.float().mean()


def vq_loss(vq: VQModel, x: Tensor, beta: float = 0.25) -> tuple[Tensor, Tensor]:
    """mean |x - decode(z_q)| + mean |sg(z) - z_q|^2 + beta mean |z - sg(z_q)|^2, and the rows used.

    sg: no gradient. The second term draws the codebook to the latents, the third keeps the latents
    near it; the reconstruction reaches the encoder straight through the rounding. (diffusers'
    VectorQuantizer has beta on the second term.) van den Oord et al. 2017,
    https://arxiv.org/abs/1711.00937, eq. 3. x: (B, 3, H, W) in [-1, 1] -> the loss, ids (B, h, w),
    of which `perplexity` tells how many rows are in use.
    """
    z = vq.encode(x)
    z_q, ids = vq.quantize(z)
    codebook, commitment = F.mse_loss(z_q, z.detach()), F.mse_loss(z, z_q.detach())
    image = vq.decode(straight_through(z, z_q), quantise=False)
    return F.l1_loss(image.float(), x) + codebook + beta * commitment, ids


def diffusion_loss(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    z: Tensor,
    noise: Tensor,
    t: Tensor,
    context: Tensor,
    max_weight: float = 1.0,
) -> Tensor:
    """mean w_t |noise - unet(alpha_t z + sigma_t noise, t, context)|^2.

    w_t = min(1 / alpha_t^2, max_weight). With max_weight 1 this is the simplified objective of Ho
    et al. 2020, eq. 14. An error in the noise is an error in the image times alpha / sigma, so that
    objective hardly sees the noisiest times, where nothing but the text tells what to draw;
    1 / alpha^2 is the weight that predicting v gives them (Salimans and Ho 2022,
    https://arxiv.org/abs/2202.00512).

    z, noise: (B, C, h, w); t: (B,) integers from 0; context: (B, L, D).
    """
    alphas_cumprod = schedule.alphas_cumprod.to(z.device)[t][:, None, None, None]
    x = alphas_cumprod.sqrt() * z + (1 - alphas_cumprod).sqrt() * noise
    weight = (1 / alphas_cumprod).clamp(max=max_weight)
    return (weight * (unet(x, t, context).float() - noise) ** 2).mean()


def hybrid_loss(
    dit: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    z: Tensor,
    noise: Tensor,
    t: Tensor,
    context: Tensor,
    max_weight: float = 1.0,
) -> Tensor:
    """diffusion_loss of the first half of the channels plus variance_loss of the second.

    What DiT was trained with, and Nichol and Dhariwal's L_simple + 0.001 L_vlb (eq. 16), where
    L_vlb sums over 1000 times: here each sample has one. dit gives (B, 2 C, h, w).
    """
    said: list[Tensor] = []

    def network(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        said.extend(dit(x, t, context).float().chunk(2, dim=1))
        return said[0]

    value = diffusion_loss(network, schedule, z, noise, t, context, max_weight)
    eps, v = said
    return value + variance_loss(schedule, noise, t, eps, v)


def variance_loss(
    schedule: NoiseSchedule, noise: Tensor, t: Tensor, eps: Tensor, v: Tensor
) -> Tensor:
    """mean L_t in bits, the variational bound's part at t, of which v gets a gradient and eps none.

        L_t = KL(N(mu, beta~) || N(mu_theta, s^2)),       t > 0
            = log(s^2 / beta~) / 2 + (beta~ + (mu_theta - mu)^2) / (2 s^2) - 1 / 2    nats
        L_0 = -log P(|z - y| < 1 / 255),                  y ~ N(mu_theta, s^2)

        log s^2 = f log beta + (1 - f) log beta~,         f = (v + 1) / 2
        mu_theta - mu = beta (noise - eps) / sqrt((1 - beta) (1 - abar))

    beta~ of t = 0 is 0; its logarithm is that of t = 1. L_0 counts values in steps of 2 / 255, as
    for images of 8 bits (the published code, which does it to latents as well, leaves the bins
    beyond +- 0.999 open). noise: what is in x_t; eps, v: what the network says; all (B, C, h, w); t
    (B,). Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 4 to 7, 15.
    """
    abar = schedule.alphas_cumprod.double()
    before = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
    most = 1 - abar / before  # beta
    least = most * (1 - before) / (1 - abar)  # beta~
    least[0] = least[1]
    scale = most / ((1 - most) * (1 - abar)).sqrt()
    numbers = torch.stack([most.log(), least.log(), scale]).to(noise.device)[:, t].float()
    log_most, log_least, scale = numbers[..., None, None, None]
    f = (v.float() + 1) / 2
    log_s2 = f * log_most + (1 - f) * log_least
    off = scale * (noise - eps.detach().float())
    kl = 0.5 * (log_s2 - log_least + (log_least - log_s2).exp() + off**2 / log_s2.exp() - 1)
    high, low = (torch.special.ndtr((side / 255 - off) / (0.5 * log_s2).exp()) for side in (1, -1))
    inside = -(high - low).clamp(min=1e-12).log()
    return torch.where((t == 0)[:, None, None, None], inside, kl).mean() / math.log(2)


def layout_loss(features: Tensor, head: Callable[[Tensor], Tensor], boxes: Tensor) -> Tensor:
    """Binary cross-entropy of head(features) with the boxes: which cells does each thing cover?

    Where things go is decided at times so noisy that the diffusion loss hardly sees it, and
    convolutions see absolute positions only through the zero padding at the border, so place words
    stay unused for long. features: (B, C, h, w); head: C -> 2 channels, one for each thing; boxes:
    (B, 2, 3) centre x, y and side as shares of the image, side 0 for no thing.
    """
    h, w = features.shape[2:]
    y, x = (
        (torch.arange(n, dtype=torch.float32, device=features.device) + 0.5) / n for n in (h, w)
    )
    cx, cy, side = boxes[..., None, None].unbind(2)  # each (B, 2, 1, 1)
    covered = ((x - cx).abs() < side / 2) & ((y[:, None] - cy).abs() < side / 2)  # (B, 2, h, w)
    return F.binary_cross_entropy_with_logits(head(features).float(), covered.float())


def summary_loss(
    context: Tensor, ids: Tensor, end: int, head: Callable[[Tensor], Tensor]
) -> Tensor:
    """Binary cross-entropy, summed over the vocabulary: which tokens does the caption have?

    Told from each end token and pad. It stands in for CLIP's pretraining, which gathers the caption
    at its end: of the 77 tokens the UNet looks at, most are ends and pads, and what they do not
    hold is found late. context: (B, L, D); ids: (B, L); end: the id of the end token, which also
    pads; head: D -> size of the vocabulary.
    """
    rows, positions = (ids == end).nonzero(as_tuple=True)
    logits = head(context[rows, positions]).float()  # (ends and pads of all captions, vocabulary)
    present = torch.zeros(len(ids), logits.shape[1], dtype=torch.float32, device=ids.device)
    present.scatter_(1, ids, 1.0)
    return F.binary_cross_entropy_with_logits(logits, present[rows], reduction="sum") / len(rows)


def silence(context: Tensor, empty: Tensor, ids: Tensor, end: int, rows: Tensor) -> Tensor:
    """The context with the end tokens and pads of some rows replaced by the empty caption's.

    What the pads tell of a caption, a UNet can draw without ever looking at the words, and then an
    edit of a word's attention (reweighting it, say) changes nothing. Rows whose words alone tell
    keep both ways alive. context: (B, L, D); empty: (1, L, D); ids: (B, L); end: the id of the end
    token, which also pads; rows: (B,) bool.
    """
    return torch.where((rows[:, None] & (ids == end))[..., None], empty, context)


def draw_times(batch: int, steps: int, noisy_share: float, generator: Generator) -> Tensor:
    """t (batch,) from 0 to steps - 1, with probability noisy_share from the last quarter alone.

    By the inverse of the distribution function at evenly spaced points with one random offset, so
    that every batch covers the times evenly (Kingma et al. 2021, https://arxiv.org/abs/2107.00630,
    appendix I.1).
    """
    offset = torch.rand(1, generator=generator, dtype=torch.float32, device="cpu")
    u = (torch.arange(batch, dtype=torch.float32, device="cpu") + offset) / batch
    plain = 1 - noisy_share
    late = 0.75 + (u - 0.75 * plain) / (plain + 4 * noisy_share)
    t = torch.where(u < 0.75 * plain, u / max(plain, 1e-9), late)
    return (t * steps).long().clamp(max=steps - 1)


def draw_amplitudes(batch: int, faint_share: float, generator: Generator) -> Tensor:
    """Factors of the noise (batch, 1, 1, 1): with probability faint_share from 0.6 to 1, else 1.

    A rendered image holds no noise at all, so DDIM inversion, which runs the sampler backwards from
    it, comes to latents whose noise is fainter than their time says: alpha_t z + sigma_t k eps,
    k < 1. A UNet that has never seen such latents amplifies the errors of inversion there. What it
    is to answer is k eps, the noise that is in them.
    """
    uniform, amplitude = (
        torch.rand(batch, generator=generator, dtype=torch.float32, device="cpu") for _ in range(2)
    )
    amplitude = torch.where(uniform < faint_share, 0.6 + 0.4 * amplitude, 1.0)
    return amplitude[:, None, None, None]
