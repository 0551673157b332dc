"""How the frequencies of the rotary embedding are stretched for long contexts."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of the rotary embedding are stretched for long contexts.

    Attributes:
        kind: a name in `ROPE_SCALINGS`: "linear", "dynamic", "yarn", "llama3" or
            "factors".
        factor: by how much the lowest frequencies are divided. "dynamic": by how many
            times the context may grow for the stretch to grow as much.
        low_freq_factor: "llama3": wavelengths above `original_max_position` divided by
            this are divided by `factor`.
        high_freq_factor: "llama3": wavelengths below `original_max_position` divided by
            this stay.
        original_max_position: the context the model was pretrained with.
        factors: "factors": what each frequency is divided by, `head_dim / 2` numbers.
        beta_fast: "yarn": frequencies that turn more often than this within
            `original_max_position` stay.
        beta_slow: "yarn": those that turn less often than this are divided by `factor`.
        truncate: "yarn": the bounds between them are rounded outwards to whole pairs.
        attention_factor: "yarn": what cosine and sine are multiplied by.

    Raises:
        NotImplementedError: if the kind is not known.
        ValueError: if a number has no meaning.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self):
        if self.kind not in ROPE_SCALINGS:
            raise NotImplementedError(
                f"Rotary scaling {self.kind!r} is not known; known are "
                f"{', '.join(sorted(ROPE_SCALINGS))}."
            )
        for name in ("factor", "original_max_position", "attention_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive.")
        for low, high in (
            ("low_freq_factor", "high_freq_factor"),
            ("beta_slow", "beta_fast"),
        ):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"{low}={getattr(self, low)!r} must be positive and below "
                    f"{high}={getattr(self, high)!r}."
                )
        if any(not factor > 0 for factor in self.factors):
            raise ValueError("Rotary factors must be positive.")


def _linear(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    return frequencies / scaling.factor


def _dynamic(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    # Up to the original context nothing is stretched; see `rope_exponents`.
    return frequencies


def _yarn(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    # https://arxiv.org/abs/2309.00071, section 3.2, with the ramp over pairs of
    # dimensions between those that turn beta_fast and beta_slow times.
    pairs = len(frequencies)
    # Frequency i is theta ** (-i / pairs), so i is -pairs log(frequency) / log(theta).
    log_theta = -pairs * np.log(frequencies[1]) if pairs > 1 else 0.0
    if not log_theta > 0:
        raise ValueError("yarn takes rope_theta above 1 and head_dim above 2.")

    def pair_that_turns(times: float) -> float:
        frequency = 2 * np.pi * times / scaling.original_max_position
        return -pairs * np.log(frequency) / log_theta

    low = pair_that_turns(scaling.beta_fast)
    high = pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    width = high - low or 0.001
    ramp = np.clip((np.arange(pairs) - low) / width, 0, 1)
    return frequencies * (1 - ramp + ramp / scaling.factor)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    # Llama 3.1: between the two wavelengths the divisor goes smoothly from 1 to factor.
    wavelengths = 2 * np.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_max_position / wavelengths - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    return frequencies * ((1 - smooth) / scaling.factor + smooth)


def _factors(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    if len(scaling.factors) != len(frequencies):
        raise ValueError(
            f"{len(scaling.factors)} rotary factors for {len(frequencies)} "
            "frequencies; there is one for each pair of head dimensions."
        )
    return frequencies / np.asarray(scaling.factors)


ROPE_SCALINGS: dict[str, Callable[[np.ndarray, RopeScaling], np.ndarray]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "factors": _factors,
}
