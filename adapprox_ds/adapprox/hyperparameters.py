# SPDX-License-Identifier: Apache-2.0
"""Every setting of Adapprox: its default, what it may be, what it follows from, its source."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adapprox_ds.adapprox.rank import RANK_POLICIES, RankPolicy
from adapprox_ds.core.layout import RIGHT_FACTORS, SCOPES
from adapprox_ds.core.refusals import CLIPPING, Refusals
from adapprox_ds.core.rounding import weight_salt
from adapprox_ds.core.rules import (
    FLAG,
    FRACTION,
    NONFINITE,
    WEIGHT_ROUNDINGS,
    GroupSettings,
    at_least,
    is_int,
    is_number,
    one_of,
    or_none,
    setting,
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
class Hyperparameters(GroupSettings):
    """The validated settings of one parameter group; :class:`Adapprox` says what each does.

    Sources that are sections or algorithms are the paper's; "measured" are choices of this package,
    by the scripts of examples/paper (update_error.py and losses.py above all).

    Attributes:
        betas_seen: the least and the largest beta_1 and beta_2 that steps of the group have had;
            kept by the optimizer, never given.
    """

    owner = "Adapprox"

    rank_policy: str = setting("reflect", one_of(RANK_POLICIES), "Algorithm 2")
    rank_interval: int = setting(10, at_least(1), "measured")
    rank_init: int = setting(
        None,
        or_none(("an integer >= 1", is_int), 'rank_max (rank_min with rank_policy="expand")'),
        "section 4",
        lambda h: h.rank_min if h.rank_policy == "expand" else h.rank_max,
    )
    rank_min: int = setting(1, at_least(1), "section 4")
    rank_max: int = setting(8, at_least(1), "measured")
    rank_step: int = setting(
        None,
        or_none(at_least(1), "ceil(0.02 rank_max)"),
        "section 3.3",
        lambda h: math.ceil(0.02 * h.rank_max),
    )
    rank_beta: float = setting(0.9, FRACTION, "section 4")
    error_threshold: float = setting(
        1e-3, ("a number > 0", lambda v: is_number(v) and v > 0.0), "section 4"
    )
    factor_dtype: str = setting("fp32", one_of(FACTOR_DTYPES), "section 4")
    warm_start: bool = setting(True, FLAG, "measured")
    momentum: str = setting(
        None,
        or_none(one_of(MOMENTA), '"gradient" with warm_start, else "update"'),
        "AdamW",
        lambda h: "gradient" if h.warm_start else "update",
    )
    nesterov: bool = setting(None, or_none(FLAG, "warm_start"), "measured", lambda h: h.warm_start)
    floor: float = setting(
        None,
        or_none(
            ("a number in [0, 1]", lambda v: is_number(v) and 0.0 <= v <= 1.0),
            "0.1 with a momentum of gradients, else 0",
        ),
        "measured",
        lambda h: 0.1 if h.momentum == "gradient" else 0.0,
    )
    first_moment: str = setting("fp32", one_of(FIRST_MOMENTS), "AdamW")
    weight_rounding: str = setting("stochastic", WEIGHT_ROUNDINGS, "measured")
    guidance: str = setting("none", one_of(GUIDANCE), "Algorithm 3")
    bias_correction: bool = setting(
        None, or_none(FLAG, "warm_start"), "AdamW", lambda h: h.warm_start
    )
    power_iterations: int = setting(
        None,
        or_none(at_least(1), "1 with warm_start and 5 without"),
        "section 4",
        lambda h: 1 if h.warm_start else 5,
    )
    oversampling: int = setting(2, at_least(0), "measured")
    scope: str = setting("partition", one_of(SCOPES), "measured")
    right_factor: str = setting(
        None,
        (f"one of {RIGHT_FACTORS}", lambda v: v is None or v in RIGHT_FACTORS),
        "measured",
        lambda h: "sharded" if h.scope == "matrix" else "replicated",
    )
    clip_threshold: float = setting(
        None,
        (
            "a number > 0, inf for no clipping; or None for inf with a momentum of gradients, "
            "else 1",
            lambda v: v is None or (is_number(v) and v > 0.0),
        ),
        "section 4",
        lambda h: math.inf if h.momentum == "gradient" else 1.0,
    )
    seed: int = setting(0, at_least(0), "this package")
    maximize: bool = setting(False, FLAG, "AdamW")
    nonfinite: str | None = setting(None, NONFINITE, "DeepSpeed")
    betas_seen: tuple[float, float, float, float] | None = None

    def _joint_rules(self) -> tuple[tuple[str, str, bool], ...]:
        """(name, what is allowed, whether it holds) of the values that depend on others."""
        low, high = self.rank_min, self.rank_max
        warm, b1 = self.warm_start, self.betas[0]
        # Without a warm start the step is the paper's Algorithm 3, and nothing else.
        literal = (
            ("momentum", '"update"', self.momentum == "update"),
            ("nesterov", "false", not self.nesterov),
            ("bias_correction", "false", not self.bias_correction),
            ("guidance", '"none"', not self.guided),
            ("floor", "0", not self.floor),
            ("scope", '"partition"', self.scope == "partition"),
        )
        return (
            ("rank_min", f"at most rank_max, here {high}", low <= high),
            (
                "rank_init",
                f"rank_min <= rank_init <= rank_max, here {low} <= rank_init <= {high}; a group "
                "whose rank_max is lowered in a run needs a lower rank_init as well",
                low <= self.rank_init <= high,
            ),
            *((name, f"{only} without warm_start", warm or holds) for name, only, holds in literal),
            ("rank_policy", '"reflect" with warm_start', not (warm and self.expands)),
            ("power_iterations", "1 with warm_start", not warm or self.power_iterations == 1),
            ("first_moment", '"none" with betas[0] = 0', self.first_moment != "none" or not b1),
            ("guidance", '"none" with betas[0] = 0', not self.guided or b1 > 0),
            (
                "guidance",
                '"none" with momentum="update"',
                not self.guided or self.momentum == "gradient",
            ),
            (
                "guidance",
                '"none" with scope="matrix"',
                not self.guided or self.scope == "partition",
            ),
            (
                "right_factor",
                '"replicated" without scope="matrix"',
                self.right_factor == "replicated" or self.scope == "matrix",
            ),
        )

    @property
    def domain(self) -> str:
        """What is factored: one of ``factors.DOMAINS``."""
        return "std" if self.warm_start else "variance"

    @property
    def shards_u(self) -> bool:
        """Whether ranks keep rows of U."""
        return self.right_factor == "sharded"

    @property
    def test_oversampling(self) -> int:
        """Fresh columns of the test sketch: more than the sketch's, so least squares are stable."""
        return 4 * self.oversampling

    @property
    def guided(self) -> bool:
        """Whether updates go as far as the first moment agrees."""
        return self.guidance == "cosine"

    @property
    def expands(self) -> bool:
        """Whether ranks grow until the error ratio is small, which takes those of all ranks."""
        return self.rank_policy == "expand"

    @property
    def clips(self) -> bool:
        """Whether updates are clipped at all."""
        return self.clip_threshold < math.inf

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
    def rank_control(self) -> RankPolicy:
        """The settings of the ranks alone."""
        return RankPolicy(
            minimum=self.rank_min,
            maximum=self.rank_max,
            step=self.rank_step,
            momentum=self.rank_beta,
            threshold=self.error_threshold,
            kind=self.rank_policy,
            start=self.rank_init,
            interval=self.rank_interval,
        )

    def seeing(self) -> tuple[float, float, float, float]:
        """``betas_seen`` with the betas that are now in force."""
        beta1, beta2 = self.betas
        least1, most1, least2, most2 = self.betas_seen or (beta1, beta1, beta2, beta2)
        return min(least1, beta1), max(most1, beta1), min(least2, beta2), max(most2, beta2)


FIELD_NAMES = Hyperparameters.names()

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
        "factor": "what is factored follows from warm_start; leave it out",
    },
    (*FIELD_NAMES, "preset"),
)
