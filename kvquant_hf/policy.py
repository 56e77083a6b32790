"""Policies: which codec stores the keys and which the values."""

from dataclasses import dataclass
from types import MappingProxyType

from .errors import UnknownPolicyError
from .triton_kernels.codecs import CODECS


@dataclass(frozen=True)
class KVPolicy:
    """A codec for keys and a codec for values.

    Args:
        keys: name of a codec in ``CODECS``.
        values: name of a codec in ``CODECS``.
        summary: what it stands for, one clause.

    Raises:
        UnknownPolicyError: a codec name is not in the table.
    """

    keys: str
    values: str
    summary: str = ""

    def __post_init__(self) -> None:
        for codec in (self.keys, self.values):
            if codec not in CODECS:
                raise UnknownPolicyError(f"unknown codec {codec!r}; use one of {', '.join(CODECS)}.")

    @property
    def calibrated(self) -> bool:
        """Whether a codec needs parameters from a calibration (``qparams``)."""
        return CODECS[self.keys].calibrated or CODECS[self.values].calibrated

    @property
    def name(self) -> str:
        """The name in ``POLICIES``, or ``"<keys codec>/<values codec>"``."""
        for name, policy in POLICIES.items():
            if (policy.keys, policy.values) == (self.keys, self.values):
                return name
        return f"{self.keys}/{self.values}"


# The table.  The first four are ours; the others are LMDeploy's formulae, for comparison to the bit.
POLICIES: MappingProxyType[str, KVPolicy] = MappingProxyType(
    {
        "exact": KVPolicy("exact", "exact", "the baseline: same pages, same attention, nothing rounded"),
        "int8": KVPolicy("int8-channel", "int8-affine", "our best recipe at 8 bits"),
        "int4": KVPolicy("int4-channel", "int4-hadamard", "our best recipe at 4 bits"),
        "turboquant": KVPolicy("lloyd4-centred", "lloyd2", "TurboQuant K4V2 without QJL, keys centred per page"),
        "int8-token": KVPolicy("int8-token", "int8-token", "LMDeploy quant_policy 8"),
        "int4-token": KVPolicy("int4-token", "int4-token", "LMDeploy quant_policy 4"),
        "turboquant-qjl": KVPolicy("lloyd3-sign", "lloyd2-plain", "LMDeploy quant_policy 42, as intended"),
        "int8-static": KVPolicy("int8-static", "int8-static", "LMDeploy's offline int8, calibrated beforehand"),
    }
)

# LMDeploy's integers.
QUANT_POLICY = MappingProxyType({0: "exact", 8: "int8-token", 4: "int4-token", 42: "turboquant-qjl"})

PolicyLike = str | int | KVPolicy


def parse_policy(policy: PolicyLike) -> KVPolicy:
    """Turn what a user writes into a ``KVPolicy``.

    Args:
        policy: a name of ``POLICIES``; ``"<keys>/<values>"`` where each side is a policy name (its keys, its values) or
            a codec name; one of LMDeploy's integers 0, 4, 8, 42 (also as text); or a ``KVPolicy``.

    Raises:
        UnknownPolicyError: nothing of that name; the message lists what there is.
    """
    if isinstance(policy, KVPolicy):
        return policy
    if isinstance(policy, str) and policy.isdecimal():
        policy = int(policy)
    if isinstance(policy, int) and not isinstance(policy, bool) and policy in QUANT_POLICY:
        return POLICIES[QUANT_POLICY[policy]]
    if isinstance(policy, str):
        if policy in POLICIES:
            return POLICIES[policy]
        keys, slash, values = policy.partition("/")
        if slash:
            return KVPolicy(_side(keys, "keys"), _side(values, "values"))
    raise UnknownPolicyError(
        f"unknown policy {policy!r}; use one of {', '.join(POLICIES)}, '<keys>/<values>' of two of them, "
        f"or LMDeploy's {', '.join(map(str, QUANT_POLICY))}."
    )


def _side(name: str, side: str) -> str:
    if name in POLICIES:
        return str(getattr(POLICIES[name], side))
    if name in CODECS:
        return name
    raise UnknownPolicyError(
        f"unknown {side} {name!r}; use a policy ({', '.join(POLICIES)}) or a codec ({', '.join(CODECS)})."
    )
