# SPDX-License-Identifier: Apache-2.0
"""Every knob of Adapprox: its range, its default, its source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from adapprox_ds.adapprox.factors import DOMAINS
from adapprox_ds.adapprox.rank import RANK_POLICIES, RankPolicy
from adapprox_ds.core.layout import RIGHT_FACTORS, SCOPES
from adapprox_ds.core.refusals import CLIPPING, Refusals
from adapprox_ds.core.rounding import weight_salt
from adapprox_ds.core.rules import (
    BETAS,
    NON_NEGATIVE,
    NONFINITE_RULE,
    RATE,
    WEIGHT_ROUNDINGS,
    Rule,
    is_int,
    is_number,
    require,
)

#: What the first moment is the mean of.
MOMENTA = ("gradient", "update")
#: How it is kept.
FIRST_MOMENTS = ("fp32", "bf16", "int8", "int4", "none")
#: Bits of an element's code, where a first moment is kept in codes.
CODE_BITS = {"int8": 8, "int4": 4}
#: What factors are kept in.
FACTOR_DTYPES = ("fp32", "bf16")
#: Whether the first moment says how far an update goes.
GUIDANCE = ("none", "cosine")
#: What a smaller epsilon counts as. An element whose gradients are 0 so has a quotient, 0; and one
#: whose gradients have no square in fp32 none that is large. Below it roots are of subnormals.
LEAST_EPS = 2.0**-63


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """The validated settings of one parameter group.

    Defaults of ``lr`` and ``weight_decay`` are those of ``torch.optim.AdamW``; those of beta_3, p,
    d and xi_thresh are the paper's (sections 3 and 4); the others were chosen by measurement
    (examples/paper/update_error.py, examples/paper/losses.py).

    Attributes:
        lr: alpha, the learning rate; a float, or a one-element tensor read at every step.
        betas: (beta_1, beta_2), decay of the first and the second moment; beta_1 = 0 keeps no
            first moment.
        eps: epsilon, added to the root of the second moment; below ``LEAST_EPS`` it counts as that.
        weight_decay: lambda, decoupled.
        rank_policy: "reflect" moves the rank by delta k up or down at each step, as in
            Algorithm 2; "expand" starts small, raises it while xi is not met, and tries smaller
            ones again every ``rank_interval`` steps, as in the paper's first version.
        rank_interval: steps between such tries.
        rank_init: k_0; by default ``rank_max``, ``rank_min`` with "expand".
        rank_min: k_min.
        rank_max: k_max. A matrix (m, n) is further held to k < m n / (m + n), below which factors
            are smaller than the dense matrix.
        rank_step: delta k; by default max(ceil(0.02 rank_max), 1) (section 3.3).
        rank_beta: beta_3, decay of the rank moment.
        error_threshold: xi_thresh, the error ratio above which a rank rises.
        factor: what the factors approximate: "std", the root of the second moment, or "variance",
            the second moment itself, as in the paper.
        factor_dtype: what they are kept in: "fp32" (fp64 for fp64 parameters), or "bf16", rounded
            at random.
        warm_start: start S-RSI from the last factors and choose the best columns by
            Rayleigh-Ritz, in one tiled pass; otherwise from Gaussian columns, as in Algorithm 1.
        balanced: weight rows and columns by one over their root mean square; by default with
            ``warm_start``, and only with it.
        floor: least second moment at use, as a part of r c^T / mean, r and c being the row and
            column means; 0 for none; only with ``warm_start``, and then by default 0.1 for a
            momentum of gradients.
        momentum: what the first moment is the mean of: "gradient", as in Adam, or "update", the
            clipped G / sqrt(V), as in the paper.
        nesterov: apply beta_1 M + (1 - beta_1) G (or the update, with ``momentum="update"``)
            instead of M: the newest gradient counts nearly twice, so that steps lag behind less.
        first_moment: how it is kept: "fp32", in full (fp64 for fp64 parameters); "bf16", rounded
            at random; "int8" or "int4", in codes of so many bits; or "none", with beta_1 = 0
            alone.
        weight_rounding: how weights in bf16 or fp16 are written, where the optimizer's own are:
            "stochastic", up or down at random, so that small updates count on average;
            "compensated", with eight more bits of them in the state; or "nearest", where updates
            below half of a last place, 1/512 to 1/256 of a weight in bf16, are lost. Wider weights
            are not rounded.
        guidance: "cosine" multiplies an update by 1 / max(1 - c, 1/2), c being the cosine between
            it and the first moment's before it: half for opposite ones, 1 for orthogonal ones and
            at the first step, at most 2. With ``warm_start`` for a momentum of gradients alone. It
            is our reading of the paper's first version, of which no formula is public.
        bias_correction: divide the moments by 1 - beta_1^t and 1 - beta_2^t at use, as Adam does.
        power_iterations: l of Algorithm 1; by default and always 1 with ``warm_start``, else 5.
        oversampling: p of Algorithm 1; with ``warm_start`` the fresh columns of a sketch, of which
            the test sketch has four times as many.
        scope: what one factorisation spans: "partition", the rows that a rank holds, without
            communication; or "matrix", the whole matrix, by sums over the ranks that ZeRO cut it
            for. Results then do not depend on the number of ranks. As configured: no checkpoint
            changes it.
        right_factor: with the scope "matrix", where the right factor U of a cut matrix is kept:
            "sharded", rows of it on each rank that holds some of the matrix, gathered in a step,
            the default there; or "replicated", all of it, so that DeepSpeed's functions can read
            ``exp_avg_sq``. As configured, too.
        clip_threshold: d, the largest root mean square of G / sqrt(V), beyond which an update is
            scaled down; ``inf`` for no clipping. By default 1 for a momentum of updates, as in the
            paper, and ``inf`` for one of gradients: AdamW's learning rates then stay right.
        seed: of the random sketches, which leave the model's own random stream untouched.
        maximize: ascend instead of descend.
        nonfinite: what NaN, infinite and too large (beyond 1.8e19) gradients do: "raise" an error
            that names them, "skip" the step, both with all of it left as it was; or "propagate".
            None for "propagate" where the DeepSpeed config says ``"bf16": {"check_grad_overflow":
            false}``, which asks not to be stopped by them, else "raise".
        betas_seen: the least and the largest beta_1 and beta_2 that steps of the group have had;
            kept by the optimizer, never given.
    """

    lr: float | Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    rank_policy: str = "reflect"
    rank_interval: int = 10
    rank_init: int | None = None
    rank_min: int = 1
    rank_max: int = 8
    rank_step: int | None = None
    rank_beta: float = 0.9
    error_threshold: float = 1e-3
    factor: str = "std"
    factor_dtype: str = "fp32"
    warm_start: bool = True
    balanced: bool | None = None
    floor: float | None = None
    momentum: str = "gradient"
    nesterov: bool = True
    first_moment: str = "fp32"
    weight_rounding: str = "stochastic"
    guidance: str = "none"
    bias_correction: bool = True
    power_iterations: int | None = None
    oversampling: int = 2
    scope: str = "partition"
    right_factor: str | None = None
    clip_threshold: float | None = None
    seed: int = 0
    maximize: bool = False
    nonfinite: str | None = None
    betas_seen: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        require("Adapprox", self, _RULES)
        for name, value in self.derived().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, allowed, holds in self._joint_rules():
            if not holds:
                raise ValueError(
                    f"Adapprox: {name}={getattr(self, name)!r} is not allowed; allowed: {allowed}"
                )

    def derived(self) -> dict[str, Any]:
        """What follows from other settings where it is not given."""
        return {
            "rank_init": self.rank_min if self.rank_policy == "expand" else self.rank_max,
            "rank_step": max(math.ceil(0.02 * self.rank_max), 1),
            "balanced": self.warm_start,
            "floor": 0.1 if self.warm_start and self.momentum == "gradient" else 0.0,
            "power_iterations": 1 if self.warm_start else 5,
            "right_factor": "sharded" if self.scope == "matrix" else "replicated",
            "clip_threshold": math.inf if self.momentum == "gradient" else 1.0,
        }

    def _joint_rules(self) -> tuple[tuple[str, str, bool], ...]:
        """(name, what is allowed, whether it holds) of the values that depend on others."""
        low, high = self.rank_min, self.rank_max
        warm, cold, b1 = self.warm_start, not self.warm_start, self.betas[0]
        return (
            ("rank_min", f"at most rank_max, here {high}", low <= high),
            (
                "rank_init",
                f"rank_min <= rank_init <= rank_max, here {low} <= rank_init <= {high}; a group "
                "whose rank_max is lowered in a run needs a lower rank_init as well",
                low <= self.k0 <= high,
            ),
            ("first_moment", '"none" with betas[0] = 0', self.first_moment != "none" or not b1),
            ("guidance", '"none" with betas[0] = 0', not self.guided or b1 > 0),
            (
                "guidance",
                '"none" with warm_start and momentum="update"',
                not self.guided or cold or self.momentum == "gradient",
            ),
            ("scope", '"partition" without warm_start', warm or self.scope == "partition"),
            (
                "right_factor",
                '"replicated" without scope="matrix"',
                self.right_factor == "replicated" or self.scope == "matrix",
            ),
            (
                "guidance",
                '"none" with scope="matrix"',
                not self.guided or self.scope == "partition",
            ),
            ("factor", '"std" with warm_start', cold or self.factor == "std"),
            ("power_iterations", "1 with warm_start", cold or self.power_iterations == 1),
            ("balanced", "false without warm_start", warm or not self.balanced),
            ("floor", "0 without warm_start", warm or not self.floor),
        )

    @property
    def k0(self) -> int:
        """The initial rank."""
        assert self.rank_init is not None
        return self.rank_init

    @property
    def shards_u(self) -> bool:
        """Whether ranks keep rows of U."""
        return self.right_factor == "sharded"

    @property
    def iterations(self) -> int:
        """The number of power iterations."""
        assert self.power_iterations is not None
        return self.power_iterations

    @property
    def test_oversampling(self) -> int:
        """Fresh columns of the test sketch: more than the sketch's, so least squares are stable."""
        return 4 * self.oversampling

    @property
    def guided(self) -> bool:
        """Whether updates go as far as the first moment agrees."""
        return self.guidance == "cosine"

    @property
    def clips(self) -> bool:
        """Whether updates are clipped at all."""
        return self.clip_limit < math.inf

    @property
    def clip_limit(self) -> float:
        """d."""
        assert self.clip_threshold is not None
        return self.clip_threshold

    def corrections(self, t: int) -> tuple[float, float]:
        """What the first moment and the root of the second are multiplied by at step ``t``.

        One over the sum of the weights that either mean gives to all gradients so far.
        """
        if not self.bias_correction:
            return 1.0, 1.0
        beta1, beta2 = self.betas
        weights = 1.0 - beta1 ** (t + 1 if self.nesterov else t)
        return 1.0 / weights, (1.0 - beta2**t) ** -0.5

    def largest_quotient(self, t: int) -> float:
        """The most that |N / D| can be at step ``t``, N being what a mean of gradients applies.

        By Cauchy and Schwarz, of all sequences of gradients; N is without its correction of bias,
        D with its own: 8.4 after many steps, 7.3 without ``nesterov``. Where a scheduler changes
        the betas, of all that have been in force.
        """
        beta1, beta2 = self.betas
        least1, most1, least2, most2 = self.betas_seen or (beta1, beta1, beta2, beta2)
        ratio = most1**2 / least2 if least2 else math.inf
        if ratio >= 1.0:  # grows without end
            return math.inf
        # Exact of constant betas, and a bound on what any within these can have made of the past.
        constant = (least1, least2) == (most1, most2)
        total = (1.0 - ratio**t if constant else 1.0) / (1.0 - ratio)
        if self.nesterov:
            total = (1.0 + most1) ** 2 + most1**2 * (total - 1.0)
        return (1.0 - least1) * math.sqrt(total / (1.0 - most2)) / self.corrections(t)[1]

    def weight_salt(self, t: int) -> int | None:
        """Of the rounding of weights at step ``t``; None for nearest."""
        return None if self.weight_rounding == "nearest" else weight_salt(t)

    @property
    def least_denominator(self) -> float:
        """What is added to the root of the second moment."""
        return max(self.eps, LEAST_EPS)

    @property
    def learning_rate(self) -> float:
        """``lr`` as a number; a tensor on a device is waited for."""
        return float(self.lr)

    @property
    def rank_control(self) -> RankPolicy:
        """The settings of the ranks alone."""
        assert self.rank_step is not None
        return RankPolicy(
            minimum=self.rank_min,
            maximum=self.rank_max,
            step=self.rank_step,
            momentum=self.rank_beta,
            threshold=self.error_threshold,
            kind=self.rank_policy,
            start=self.k0,
            interval=self.rank_interval,
        )

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> Hyperparameters:
        """The settings held in a parameter group, validated: schedulers may have changed them."""
        return cls(
            **{name: group[name] for name in FIELD_NAMES}, betas_seen=group.get("betas_seen")
        )

    def seeing(self) -> tuple[float, float, float, float]:
        """``betas_seen`` with the betas that are now in force."""
        beta1, beta2 = self.betas
        least1, most1, least2, most2 = self.betas_seen or (beta1, beta1, beta2, beta2)
        return min(least1, beta1), max(most1, beta1), min(least2, beta2), max(most2, beta2)

    def as_group(self) -> dict[str, Any]:
        """The settings as a parameter group holds them: one key a knob."""
        return {name: getattr(self, name) for name in FIELD_NAMES}


FIELD_NAMES: tuple[str, ...] = tuple(
    f.name for f in fields(Hyperparameters) if f.name != "betas_seen"
)

_RULES: Mapping[str, Rule] = {
    "lr": RATE,
    "betas": BETAS,
    "eps": NON_NEGATIVE,
    "weight_decay": NON_NEGATIVE,
    "rank_min": ("an integer >= 1", lambda v: is_int(v) and v >= 1),
    "rank_max": ("an integer >= 1", lambda v: is_int(v) and v >= 1),
    "rank_policy": (f"one of {RANK_POLICIES}", lambda v: v in RANK_POLICIES),
    "rank_interval": ("an integer >= 1", lambda v: is_int(v) and v >= 1),
    "rank_init": (
        'an integer >= 1, or None for rank_max (rank_min with rank_policy="expand")',
        lambda v: v is None or is_int(v),
    ),
    "rank_step": (
        "an integer >= 1, or None for ceil(0.02 rank_max)",
        lambda v: v is None or (is_int(v) and v >= 1),
    ),
    "rank_beta": ("a number in [0, 1)", lambda v: is_number(v) and 0.0 <= v < 1.0),
    "error_threshold": ("a number > 0", lambda v: is_number(v) and v > 0.0),
    "factor": (f"one of {DOMAINS}", lambda v: v in DOMAINS),
    "factor_dtype": (f"one of {FACTOR_DTYPES}", lambda v: v in FACTOR_DTYPES),
    "warm_start": ("true or false", lambda v: isinstance(v, bool)),
    "balanced": (
        "true or false, or None for warm_start",
        lambda v: v is None or isinstance(v, bool),
    ),
    "floor": (
        "a number in [0, 1], or None for 0.1 with warm_start and a momentum of gradients, else 0",
        lambda v: v is None or (is_number(v) and 0.0 <= v <= 1.0),
    ),
    "momentum": (f"one of {MOMENTA}", lambda v: v in MOMENTA),
    "nesterov": ("true or false", lambda v: isinstance(v, bool)),
    "first_moment": (f"one of {FIRST_MOMENTS}", lambda v: v in FIRST_MOMENTS),
    "weight_rounding": (f"one of {WEIGHT_ROUNDINGS}", lambda v: v in WEIGHT_ROUNDINGS),
    "guidance": (f"one of {GUIDANCE}", lambda v: v in GUIDANCE),
    "bias_correction": ("true or false", lambda v: isinstance(v, bool)),
    "power_iterations": (
        "an integer >= 1, or None for 1 with warm_start and 5 without",
        lambda v: v is None or (is_int(v) and v >= 1),
    ),
    "oversampling": ("an integer >= 0", lambda v: is_int(v) and v >= 0),
    "scope": (f"one of {SCOPES}", lambda v: v in SCOPES),
    "right_factor": (f"one of {RIGHT_FACTORS}", lambda v: v is None or v in RIGHT_FACTORS),
    "clip_threshold": (
        "a number > 0, inf for no clipping; or None for inf with a momentum of gradients, else 1",
        lambda v: v is None or (is_number(v) and v > 0.0),
    ),
    "seed": ("an integer >= 0", lambda v: is_int(v) and v >= 0),
    "maximize": ("true or false", lambda v: isinstance(v, bool)),
    "nonfinite": NONFINITE_RULE,
}

_KERNELS = "the step has kernels of its own; leave it out"

#: The arguments that the constructor refuses.
REFUSALS = Refusals(
    "Adapprox",
    {
        "fused": _KERNELS,
        "foreach": _KERNELS,
        "capturable": (
            "a step's ranks are decided on the host, so it cannot be captured in a CUDA graph; "
            "leave it out, and capture forward and backward alone"
        ),
        "differentiable": (
            "factors are not differentiable; use torch.optim.AdamW(differentiable=True)"
        ),
        "amsgrad": "a running maximum has no low-rank form; use torch.optim.AdamW(amsgrad=True)",
        "max_grad_norm": CLIPPING,
        "rank": "use rank_init, rank_min and rank_max",
    },
    (*FIELD_NAMES, "preset"),
)
