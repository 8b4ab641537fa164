"""The noise schedule: how much of the latent is signal, how much noise, at each training timestep.

    x_t = alpha_t x0 + sigma_t eps
    alpha_t^2 = alphas_cumprod[t] = prod_{s <= t} (1 - beta_s) = 1 - sigma_t^2

Source: Ho et al. 2020 (arXiv 2006.11239); the scaled_linear betas are latent diffusion's (arXiv
2112.10752). The keys are those of diffusers' scheduler_config.json.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor


class Level(NamedTuple):
    """A noise level, variance preserving: x = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1."""

    alpha: float
    sigma: float

    @classmethod
    def from_ratio(cls, ratio: float) -> "Level":
        """The level with sigma / alpha = ratio (the sigma of Karras et al. 2022, where x = x0 +
        ratio eps)."""
        alpha = 1 / math.sqrt(ratio**2 + 1)
        return cls(alpha, ratio * alpha)

    @property
    def ratio(self) -> float:
        """sigma / alpha, infinite at alpha = 0."""
        return self.sigma / self.alpha if self.alpha else math.inf


Prediction = Literal["epsilon", "v_prediction"]  # what the network says of x
PREDICTIONS = get_args(Prediction)
LEAST = 2**-24  # of alphas_cumprod where a sampler counts in ratios: diffusers' choice
SPACINGS = ("leading", "linspace", "trailing")

# Keys that would change the maths, with the one value that is implemented. An absent key means that
# value, too.
ONLY = {
    "clip_sample": False,
    "thresholding": False,
    "use_flow_sigmas": False,
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
}
KEYS = {"beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "trained_betas"}
WHOLE_NUMBERS = {
    "num_train_timesteps": (1, 100_000),
    "steps_offset": (0, 100_000),
}  # and what each may be


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The schedule a model was trained with: alphas_cumprod (N,) fp32, one entry per training
    timestep 0..N-1.

    steps_offset is added to "leading" timesteps. set_alpha_to_one: DDIM ends at alpha = 1, not at
    timestep 0's level. timestep_spacing: "leading" | "linspace" | "trailing"; None lets each
    sampler take its own (see samplers.py). prediction: what the network predicts, "epsilon" or
    "v_prediction" (v = alpha eps - sigma x0), which also knows x0 where alpha is 0 (zero terminal
    SNR).
    """

    alphas_cumprod: Tensor
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    timestep_spacing: str | None = None
    prediction: Prediction = "epsilon"

    @classmethod
    def from_dict(cls, config: dict) -> "NoiseSchedule":
        """From the contents of scheduler_config.json; an absent key takes the default of diffusers'
        DDIMScheduler.

        Except clip_sample: latents are never clipped, and only a file that asks for it is refused.
        Raises ValueError for a key that changes the maths in a way that is not implemented, for
        values that do not fit, and for the file of a scheduler that has no betas (flow matching).
        Which solver the file names and that solver's own options are ignored: the sampler is the
        caller's choice.
        """
        wrong = "scheduler config: "
        if config and not (KEYS | {"_class_name"}) & config.keys():
            raise ValueError(f"{wrong}got {list(config)!r:.80}, expected some of {sorted(KEYS)}")
        if "_class_name" in config and not {"beta_start", "trained_betas"} & config.keys():
            got = f"{config['_class_name']} without beta_start"
            raise ValueError(f"{wrong}{got} is no schedule of betas")
        for key, only in ONLY.items():
            if config.get(key, only) != only:
                raise ValueError(f"{wrong}{key} is {config[key]!r}, only {only!r} is supported")
        prediction = config.get("prediction_type", "epsilon")
        spacing, rescale = (
            config.get("timestep_spacing"),
            config.get("rescale_betas_zero_snr", False),
        )
        for key, value, known in (
            ("timestep_spacing", spacing, (None, *SPACINGS)),
            ("prediction_type", prediction, PREDICTIONS),
        ):
            if value not in known:
                expected = ", ".join(map(str, known))
                raise ValueError(f"{wrong}{key} is {value!r:.80}, expected {expected}")
        for key, (least, most) in WHOLE_NUMBERS.items():
            if type(value := config.get(key, least)) is not int or not least <= value <= most:
                expected = f"a whole number, {least} to {most}"
                raise ValueError(f"{wrong}{key} is {value!r:.80}, expected {expected}")
        to_one = config.get("set_alpha_to_one", True)
        for key, flag in (("set_alpha_to_one", to_one), ("rescale_betas_zero_snr", rescale)):
            if type(flag) is not bool:
                raise ValueError(f"{wrong}{key} is {flag!r:.80}, expected true or false")
        each = betas(config)
        alphas_cumprod = torch.cumprod(1 - (zero_terminal_snr(each) if rescale else each), dim=0)
        first, last = alphas_cumprod[0].item(), alphas_cumprod[-1].item()
        lowest = -1.0 if rescale and prediction == "v_prediction" else 1e-30
        if not (first < 1 and last > lowest):  # sigma / alpha has to be above 0 and finite
            got = f"alphas_cumprod run from {first} to {last}, the network predicts {prediction}"
            raise ValueError(f"{wrong}{got}, expected below 1 and above 0")
        return cls(alphas_cumprod, config.get("steps_offset", 0), to_one, spacing, prediction)

    def __len__(self) -> int:
        """N, the number of training timesteps."""
        return len(self.alphas_cumprod)

    def level(self, t: int) -> Level:
        """The noise level of training timestep t, 0 <= t < N."""
        if not 0 <= t < len(self):
            raise ValueError(f"timestep {t} is outside the schedule, expected 0 to {len(self) - 1}")
        a = self.alphas_cumprod[t].item()
        return Level(math.sqrt(a), math.sqrt(1 - a))

    @property
    def clean(self) -> Level:
        """Where DDIM ends: alpha = 1 or, in Stable Diffusion (set_alpha_to_one false), the level of
        timestep 0."""
        return Level(1.0, 0.0) if self.set_alpha_to_one else self.level(0)

    def ratios(self) -> np.ndarray:
        """sigma / alpha of every training timestep, (N,) fp32, ascending; 4096 where alpha is 0."""
        a = (
            self.alphas_cumprod.clamp(min=LEAST)
            if not self.alphas_cumprod[-1]
            else self.alphas_cumprod
        )
        return (((1 - a) / a) ** 0.5).numpy()

    def timesteps(self, n: int, spacing: str) -> list[int]:
        """n of the N training timesteps, descending: table 2 of Lin et al. 2023 (arXiv 2305.08891).

            leading   i * (N // n) + steps_offset           linspace  round(linspace(0, N - 1, n))
            trailing  round(N, N - N/n, N - 2N/n, ...) - 1
        Raises ValueError where they do not fit: leading has no room for n > N, nor for n = N with
        an offset.
        """
        if spacing == "leading":
            t = np.arange(n, dtype=float)[::-1] * (len(self) // n) + self.steps_offset
        elif spacing == "linspace":
            t = np.linspace(0, len(self) - 1, n).round()[::-1]
        else:
            t = np.arange(len(self), 0, -len(self) / n).round()[:n] - 1
        if t[0] >= len(self) or (spacing == "leading" and n > len(self)):
            got = f"{n} timesteps, {spacing} with steps_offset {self.steps_offset}"
            room = f"the schedule's 0 to {len(self) - 1}"
            raise ValueError(f"{got}, do not fit into {room}: take fewer steps")
        return [int(i) for i in t]


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas with which the last level is all noise, alpha = 0 (Lin et al. 2023, algorithm 1).

    alpha_t <- (alpha_t - alpha_N) alpha_1 / (alpha_1 - alpha_N):  alpha_1 stays, the last becomes 0
    """
    alphas = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = alphas[0].clone(), alphas[-1].clone()
    a = ((alphas - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([a[:1], a[1:] / a[:-1]])


def betas(config: dict) -> Tensor:
    """beta_t, the variance added at each training timestep, (N,) fp32.

    linear: linspace(beta_start, beta_end, N);  scaled_linear: linspace(sqrt(beta_start),
    sqrt(beta_end), N)^2. ValueError unless 0 < beta_t < 1 everywhere.
    """
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    n, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    ends = config.get("trained_betas")
    ends = [start, end] if ends is None else ends
    is_list = (
        isinstance(ends, (list, tuple)) and 0 < len(ends) <= WHOLE_NUMBERS["num_train_timesteps"][1]
    )
    if not is_list or not all(type(beta) in (int, float) and 0 < beta < 1 for beta in ends):
        raise ValueError(
            f"scheduler config: betas are {ends!r:.80}, expected numbers between 0 and 1"
        )
    if config.get("trained_betas") is not None:
        if len(ends) != n:
            got = f"{len(ends)} trained_betas for num_train_timesteps {n}"
            raise ValueError(f"scheduler config: got {got}, expected as many")
        return torch.tensor(config["trained_betas"], dtype=torch.float32, device="cpu")
    if kind == "linear":
        return torch.linspace(start, end, n, dtype=torch.float32, device="cpu")
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32, device="cpu") ** 2
    raise ValueError(
        f"scheduler config: beta_schedule is {kind!r}, expected linear or scaled_linear"
    )
