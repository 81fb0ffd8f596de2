"""MR signal equations, tissue constants and the protocols of simulated sites.

In: a protocol and the tissue table. Out: one signed signal per tissue, in units of a fully relaxed
water signal. Gives up: flow, magnetisation transfer, multi-echo trains (a turbo spin echo is its
effective echo), stimulated echoes, readout saturation of MPRAGE.

Units: seconds, degrees, s/mm^2, tesla; diffusivities in 1e-6 mm^2/s (= um^2/s, CSF about 3000),
susceptibility in ppm relative to water.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.sources.phantom_config import PHANTOM_CONTRASTS, Stream, stream_rng


@dataclass(frozen=True)
class Tissue:
    """Constants of one tissue class; pairs are `(1.5 T, 3 T)`."""

    pd: float
    t1_s: tuple[float, float]
    t2_s: tuple[float, float]
    t2star_s: tuple[float, float]
    adc_um2_s: float
    susceptibility_ppm: float
    uptake_mmol: float = 0.0
    """Concentration of the contrast agent minutes after injection, mmol/l."""


# Source: typical in-vivo values as textbooks and review articles give them, rounded.
TISSUES: dict[str, Tissue] = {
    "gm": Tissue(0.82, (1.10, 1.40), (0.095, 0.085), (0.080, 0.053), 850, 0.02),
    "wm": Tissue(0.70, (0.65, 0.85), (0.075, 0.068), (0.066, 0.046), 700, -0.03),
    "csf": Tissue(1.00, (4.20, 4.20), (2.00, 1.80), (0.50, 0.30), 3000, 0.0),
    "vein": Tissue(0.85, (1.45, 1.80), (0.10, 0.045), (0.045, 0.018), 2000, 0.4, 0.5),
    "infarct": Tissue(0.88, (1.30, 1.60), (0.130, 0.120), (0.090, 0.065), 400, 0.0),
    "oedema": Tissue(0.88, (1.30, 1.60), (0.150, 0.140), (0.110, 0.085), 1400, 0.0),
    "core": Tissue(0.92, (1.80, 2.20), (0.200, 0.180), (0.120, 0.085), 1800, 0.0),
    "enhancing": Tissue(0.88, (1.30, 1.60), (0.110, 0.100), (0.075, 0.055), 1000, 0.0, 0.2),
    "bone": Tissue(0.10, (0.40, 0.45), (0.003, 0.003), (0.001, 0.001), 200, 0.0),
    "scalp": Tissue(0.90, (0.27, 0.37), (0.080, 0.070), (0.050, 0.035), 50, 0.0),
}
TISSUE_NAMES = tuple(TISSUES)
BRAIN_TISSUES = ("gm", "wm", "csf", "vein", "infarct", "oedema", "core", "enhancing")
LESION_VALUES = {"infarct": 1, "oedema": 2, "core": 3, "enhancing": 4}
"""Label value per lesion class; 0 is everything else."""

# T1 shortening by a gadolinium agent, l/(mmol s); typical for gadobutrol in blood.
_RELAXIVITY = (4.6, 4.5)

Sequence = Literal[
    "spin_echo", "inversion_spin_echo", "inversion_gradient_echo", "gradient_echo", "diffusion"
]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One sequence as one site runs it, and the grid it is acquired on."""

    contrast: str
    sequence: Sequence
    field_t: float
    te_s: float
    tr_s: float
    ti_s: float | None = None
    flip_deg: float = 90.0
    b_value_s_mm2: float | None = None
    has_agent: bool = False
    spacing_factor: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Multiples of the configured spacing along R, A, S; the last is the slice axis, kept below
    8 mm where the spacing allows."""
    orientation: str = "RAS"
    """Directions in which the stored array's axes run."""
    is_scanner_aligned: bool = True
    """True: 3D slab along the scanner axes. False: 2D slices planned along the head."""

    def sidecar(self) -> dict[str, object]:
        """BIDS fields of the protocol; seconds, degrees, tesla."""
        fields: dict[str, object] = {
            "EchoTime": round(self.te_s, 5),
            "RepetitionTime": round(self.tr_s, 4),
            "FlipAngle": round(self.flip_deg, 1),
            "MagneticFieldStrength": self.field_t,
            "MRAcquisitionType": "3D" if self.is_scanner_aligned else "2D",
        }
        if self.ti_s is not None:
            fields["InversionTime"] = round(self.ti_s, 4)
        if self.has_agent:
            fields["ContrastBolusIngredient"] = "GADOLINIUM"
        if self.b_value_s_mm2 is not None:
            fields["DiffusionBValue"] = self.b_value_s_mm2
        if self.contrast == "ADC":
            fields["Units"] = "1e-6 mm2/s"
        return fields


def signals(
    protocol: Protocol, tissues: dict[str, Tissue] | None = None
) -> npt.NDArray[np.float64]:
    """Return the signed signal of every tissue class in the order of `TISSUE_NAMES`.

    Args:
        protocol: sequence and its times; `diffusion` is the trace-weighted image at the b-value.
        tissues: constants per class; None takes `TISSUES`.

    Source: the steady-state solutions of the Bloch equations; gradient echo by Ernst (1966),
    inversion-recovery gradient echo by Deichmann (1999) without readout saturation.
    """
    table = TISSUES if tissues is None else tissues
    at_3t = int(protocol.field_t > 2.0)
    pd = np.array([table[name].pd for name in TISSUE_NAMES])
    t1 = np.array([table[name].t1_s[at_3t] for name in TISSUE_NAMES])
    t2 = np.array([table[name].t2_s[at_3t] for name in TISSUE_NAMES])
    t2star = np.array([table[name].t2star_s[at_3t] for name in TISSUE_NAMES])
    if protocol.has_agent:
        uptake = np.array([table[name].uptake_mmol for name in TISSUE_NAMES])
        t1 = 1.0 / (1.0 / t1 + _RELAXIVITY[at_3t] * uptake)
    e1 = np.exp(-protocol.tr_s / t1)
    flip = math.radians(protocol.flip_deg)
    if protocol.sequence == "gradient_echo":
        steady = math.sin(flip) * (1 - e1) / (1 - math.cos(flip) * e1)
        return np.asarray(pd * steady * np.exp(-protocol.te_s / t2star))
    if protocol.sequence == "inversion_gradient_echo":
        recovery = 1 - 2 * np.exp(-_inversion_time(protocol) / t1) / (1 + e1)
        return np.asarray(pd * math.sin(flip) * recovery * np.exp(-protocol.te_s / t2star))
    echo = pd * np.exp(-protocol.te_s / t2)
    if protocol.sequence == "inversion_spin_echo":
        return np.asarray(echo * (1 - 2 * np.exp(-_inversion_time(protocol) / t1) + e1))
    if protocol.sequence == "diffusion":
        adc = np.array([table[name].adc_um2_s for name in TISSUE_NAMES]) * 1e-6
        return np.asarray(echo * (1 - e1) * np.exp(-(protocol.b_value_s_mm2 or 0.0) * adc))
    return np.asarray(echo * (1 - e1))


def _inversion_time(protocol: Protocol) -> float:
    assert protocol.ti_s is not None, f"{protocol.sequence} needs ti_s"
    return protocol.ti_s


def nulling_time_s(t1_s: float, tr_s: float) -> float:
    """Inversion time at which a tissue of this T1 gives no signal in an inversion spin echo."""
    return t1_s * (math.log(2.0) - math.log1p(math.exp(-tr_s / t1_s)))


def site_protocols(seed: int, site: int) -> dict[str, Protocol]:
    """Draw how one site acquires each contrast: field strength, times, resolution, orientation."""
    rng = stream_rng(seed, Stream.SITE, site)
    # Neighbouring sites differ in field strength, so that two sites show both.
    is_high = (site + int(stream_rng(seed, Stream.SITE).integers(2))) % 2 == 1
    field_t = 3.0 if is_high else 1.5
    t1w = _draw_t1w(rng, field_t)
    dwi = Protocol(
        contrast="DWI",
        sequence="diffusion",
        field_t=field_t,
        te_s=rng.uniform(0.075, 0.100),
        tr_s=rng.uniform(4.0, 6.0),
        b_value_s_mm2=1000.0,
        spacing_factor=_draw_slices(rng, 1.0, in_plane=float(rng.choice([1.0, 1.25]))),
        orientation="LAS",
        is_scanner_aligned=False,
    )
    drawn = (
        t1w,
        replace(t1w, contrast="T1wCE", has_agent=True),
        _draw_t2w(rng, field_t),
        _draw_flair(rng, field_t),
        dwi,
        replace(dwi, contrast="ADC"),
        _draw_gre(rng, field_t),
        _swi(field_t),
    )
    assert tuple(protocol.contrast for protocol in drawn) == PHANTOM_CONTRASTS
    return {protocol.contrast: protocol for protocol in drawn}


def _draw_slices(
    rng: np.random.Generator, thinnest: float, *, in_plane: float = 1.0
) -> tuple[float, float, float]:
    return (in_plane, in_plane, float(rng.choice([thinnest, 2.0])))


def _draw_t1w(rng: np.random.Generator, field_t: float) -> Protocol:
    """Draw an MPRAGE-like 3D sequence at most sites, 2D spin echo at the others."""
    if rng.random() < 0.6:
        return Protocol(
            contrast="T1w",
            sequence="inversion_gradient_echo",
            field_t=field_t,
            te_s=rng.uniform(0.002, 0.004),
            tr_s=rng.uniform(1.9, 2.4),
            ti_s=rng.uniform(0.85, 1.0),
            flip_deg=rng.uniform(8.0, 10.0),
            orientation=str(rng.choice(["RAS", "PSR", "LAS"])),
        )
    return Protocol(
        contrast="T1w",
        sequence="spin_echo",
        field_t=field_t,
        te_s=rng.uniform(0.009, 0.014),
        tr_s=rng.uniform(0.45, 0.62),
        spacing_factor=_draw_slices(rng, 1.5),
        orientation="LPS",
        is_scanner_aligned=False,
    )


def _draw_t2w(rng: np.random.Generator, field_t: float) -> Protocol:
    return Protocol(
        contrast="T2w",
        sequence="spin_echo",
        field_t=field_t,
        te_s=rng.uniform(0.095, 0.120),
        tr_s=rng.uniform(5.0, 8.0),
        spacing_factor=_draw_slices(rng, 1.0),
        orientation="LPS",
        is_scanner_aligned=False,
    )


def _draw_flair(rng: np.random.Generator, field_t: float) -> Protocol:
    """Draw an inversion spin echo whose inversion time nulls CSF, nearly."""
    tr_s = rng.uniform(8.0, 10.0)
    nulling = nulling_time_s(TISSUES["csf"].t1_s[int(field_t > 2.0)], tr_s)
    return Protocol(
        contrast="FLAIR",
        sequence="inversion_spin_echo",
        field_t=field_t,
        te_s=rng.uniform(0.090, 0.120),
        tr_s=tr_s,
        ti_s=nulling * rng.uniform(0.985, 1.015),
        spacing_factor=_draw_slices(rng, 1.5),
        orientation=str(rng.choice(["LAS", "LPS"])),
        is_scanner_aligned=False,
    )


def _draw_gre(rng: np.random.Generator, field_t: float) -> Protocol:
    return Protocol(
        contrast="GRE",
        sequence="gradient_echo",
        field_t=field_t,
        te_s=rng.uniform(0.018, 0.022) * (1.0 if field_t > 2.0 else 1.25),
        tr_s=rng.uniform(0.5, 0.8),
        flip_deg=rng.uniform(18.0, 22.0),
        spacing_factor=_draw_slices(rng, 1.5),
        orientation="LAS",
        is_scanner_aligned=False,
    )


def _swi(field_t: float) -> Protocol:
    """Return the usual 3D sequence: the echo time for about the same phase at both fields."""
    is_high = field_t > 2.0
    return Protocol(
        contrast="SWI",
        sequence="gradient_echo",
        field_t=field_t,
        te_s=0.020 if is_high else 0.040,
        tr_s=0.028 if is_high else 0.049,
        flip_deg=15.0,
    )


def susceptibility_phase(
    susceptibility_ppm: npt.NDArray[np.float32],
    spacing_mm: tuple[float, float, float],
    *,
    field_t: float,
    te_s: float,
) -> npt.NDArray[np.float64]:
    """Phase at the echo time of the field that a susceptibility map makes, radians.

    Args:
        susceptibility_ppm: [X, Y, Z], relative to water; the main field runs along the last axis.
        spacing_mm: of the map.
        field_t: main field.
        te_s: echo time.

    Source: Fourier form of the dipole field, `1/3 - kz^2 / |k|^2`, with the sphere of Lorentz.
    """
    shape = susceptibility_ppm.shape
    kx, ky = (np.fft.fftfreq(n, d) for n, d in zip(shape[:2], spacing_mm[:2], strict=True))
    kz = np.fft.rfftfreq(shape[2], spacing_mm[2])
    k_squared = kx[:, None, None] ** 2 + ky[None, :, None] ** 2 + kz[None, None, :] ** 2
    k_squared[0, 0, 0] = np.inf
    dipole = 1.0 / 3.0 - kz[None, None, :] ** 2 / k_squared
    dipole[0, 0, 0] = 0.0
    shift_ppm = np.fft.irfftn(np.fft.rfftn(susceptibility_ppm) * dipole, s=shape, axes=(0, 1, 2))
    hertz_per_ppm = 42.577 * field_t
    return np.asarray(2.0 * math.pi * hertz_per_ppm * te_s * shift_ppm)


def phase_weight(phase: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Darkening by susceptibility weighting: `(1 - phase / pi)^4` for positive phase, else 1.

    Source: Haacke et al. (2004), positive phase mask, four multiplications.
    """
    return np.asarray((1.0 - np.clip(phase / math.pi, 0.0, 1.0)) ** 4)
