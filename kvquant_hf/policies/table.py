"""Policies: which codec stores the keys and which the values, in all layers or in each of them."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import UnknownPolicyError, WrongModelError
from ..triton_kernels.codecs import CODECS
from .auto import AUTO, AutoPolicy, parse_auto
from .file import SUFFIX, read_layers


@dataclass(frozen=True)
class KVPolicy:
    """A codec for keys and a codec for values.

    Args:
        keys: name of a codec in ``CODECS``.
        values: name of a codec in ``CODECS``.
        summary: what it stands for, one clause; policies compare equal without it.

    Raises:
        UnknownPolicyError: a codec name is not in the table.
    """

    keys: str
    values: str
    summary: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for codec in (self.keys, self.values):
            if codec not in CODECS:
                raise UnknownPolicyError(f"unknown codec {codec!r}; use one of {', '.join(CODECS)}.")

    @property
    def calibrated(self) -> bool:
        """Whether a codec needs parameters from a calibration (``qparams``)."""
        return CODECS[self.keys].calibrated or CODECS[self.values].calibrated

    @property
    def uses_queries(self) -> bool:
        """Whether keys are rounded by queries, of which a calibration (``qparams``) may know beforehand."""
        return CODECS[self.keys].uses_queries

    @property
    def name(self) -> str:
        """The name in ``POLICIES``, or ``"<keys codec>/<values codec>"``."""
        for name, policy in POLICIES.items():
            if (policy.keys, policy.values) == (self.keys, self.values):
                return name
        return f"{self.keys}/{self.values}"

    @property
    def sinks(self) -> int:
        """First tokens of each sequence that are kept exact where nobody says how many: 1, or 0 where nothing is
        rounded and where a codec reproduces what others do."""
        codecs = CODECS[self.keys], CODECS[self.values]
        rounds = any(codec.bits < 16 for codec in codecs)
        return int(rounds and not any(codec.reproduces for codec in codecs))

    def by_layer(self) -> Iterator["KVPolicy"]:
        """The policy of each layer, without end."""
        return itertools.repeat(self)

    def check_layers(self, count: int) -> None:
        """Any number of layers will do."""

    def check_model(self, fingerprint: tuple[Any, ...]) -> None:
        """Every model will do."""

    def as_dict(self) -> dict[str, Any]:
        """The codecs, ready for JSON; ``policy_from_dict`` is the inverse."""
        return {"keys": self.keys, "values": self.values}


@dataclass(frozen=True)
class LayerwisePolicy:
    """A policy of its own for each layer.

    Args:
        layers: for each layer that keeps keys and values in pages, first layer first, anything that ``parse_policy``
            takes for one layer.
        model: fingerprint of the model that it was made for; None: any that has so many layers.

    Raises:
        UnknownPolicyError: no layers, or a policy that does not exist.

    Example:
        >>> LayerwisePolicy(["int8", *["int4"] * 28, "int8"])
    """

    layers: tuple[KVPolicy, ...]
    model: tuple[Any, ...] | None = field(default=None, compare=False)
    name = "mixed"

    def __init__(self, layers: Sequence["OnePolicyLike"], model: Sequence[Any] | None = None) -> None:
        if isinstance(layers, str) or not layers:
            raise UnknownPolicyError("a LayerwisePolicy needs a list with one policy per layer; give at least one.")
        parsed = []
        for layer in layers:
            policy = parse_policy(layer)
            if not isinstance(policy, KVPolicy):
                raise UnknownPolicyError("a layer of a LayerwisePolicy has one policy; give a name or a KVPolicy.")
            parsed.append(policy)
        object.__setattr__(self, "layers", tuple(parsed))
        object.__setattr__(self, "model", None if model is None else tuple(model))

    @property
    def calibrated(self) -> bool:
        """Whether a layer needs parameters from a calibration (``qparams``)."""
        return any(policy.calibrated for policy in self.layers)

    @property
    def uses_queries(self) -> bool:
        """Whether a layer's keys are rounded by queries."""
        return any(policy.uses_queries for policy in self.layers)

    def by_layer(self) -> Iterator[KVPolicy]:
        """The policy of each layer, first layer first, and then that of the last without end."""
        return itertools.chain(self.layers, itertools.repeat(self.layers[-1]))

    def check_layers(self, count: int) -> None:
        """Refuse a cache that has not as many layers as the policy.

        Raises:
            WrongModelError: it has ``count``.
        """
        if count != len(self.layers):
            raise WrongModelError(
                f"this policy is for {len(self.layers)} layers and the cache has {count} in pages; make one with "
                "`kvquant tune` for this model."
            )

    def check_model(self, fingerprint: tuple[Any, ...]) -> None:
        """Refuse a model that the policy was not made for.

        Raises:
            WrongModelError: the fingerprints differ.
        """
        if self.model is not None and self.model != fingerprint:
            raise WrongModelError(
                f"this policy was tuned for the model {list(self.model)} and the cache is for {list(fingerprint)}; "
                "make one with `kvquant tune` for this model."
            )

    def as_dict(self) -> dict[str, Any]:
        """The codecs of each layer, ready for JSON; ``policy_from_dict`` is the inverse."""
        return {"layers": [policy.as_dict() for policy in self.layers]}


def named_codecs(described: dict[str, Any]) -> list[str]:
    """The codecs that an ``as_dict`` names, known here or not."""
    return [codec for layer in described.get("layers", [described]) for codec in (layer["keys"], layer["values"])]


def policy_from_dict(described: dict[str, Any]) -> "KVPolicy | LayerwisePolicy":
    """The policy of an ``as_dict``.

    Raises:
        UnknownPolicyError: a codec that does not exist here.
        KeyError, TypeError: not such a dict.
    """
    if "layers" in described:
        return LayerwisePolicy([KVPolicy(layer["keys"], layer["values"]) for layer in described["layers"]])
    return KVPolicy(described["keys"], described["values"])


# The table.  The first are ours; from int8-token on they are the formulae of others, for comparison to the bit:
# LMDeploy's, and what engines store in floating point.
POLICIES: MappingProxyType[str, KVPolicy] = MappingProxyType(
    {
        "exact": KVPolicy("exact", "exact", "the baseline: same pages, same attention, nothing rounded"),
        "int8": KVPolicy("int8-channel", "int8-affine", "our best recipe at 8 bits"),
        "int4": KVPolicy("int4-ranked", "int4-hadamard", "4 bits for every key and value"),
        "kv3": KVPolicy("int3-ranked", "octet3", "3 bits on average, more for channels that count"),
        "kv2.9": KVPolicy("int3-ranked", "octet2", "the same keys, values in 2 bits"),
        "kv2.4": KVPolicy("int2-ranked", "octet2", "2 bits on average"),
        "turboquant": KVPolicy("int4-ranked", "octet2", "keys as in int4, values in 2 bits"),
        "int8-token": KVPolicy("int8-token", "int8-token", "LMDeploy quant_policy 8"),
        "int4-token": KVPolicy("int4-token", "int4-token", "LMDeploy quant_policy 4"),
        "turboquant-qjl": KVPolicy("lloyd3-sign", "lloyd2-plain", "LMDeploy quant_policy 42, as intended"),
        "int8-static": KVPolicy("int8-static", "int8-static", "LMDeploy's offline int8, calibrated beforehand"),
        "fp8": KVPolicy("fp8", "fp8", "what vLLM's kv_cache_dtype fp8 stores"),
        "nvfp4": KVPolicy("nvfp4", "nvfp4", "NVIDIA's 4-bit floating point, vLLM's kv_cache_dtype nvfp4"),
    }
)

# LMDeploy's integers.
QUANT_POLICY = MappingProxyType({0: "exact", 8: "int8-token", 4: "int4-token", 42: "turboquant-qjl"})

AnyPolicy = KVPolicy | LayerwisePolicy  # for one model
OnePolicyLike = str | int | KVPolicy
PolicyLike = OnePolicyLike | LayerwisePolicy | AutoPolicy | Path


def parse_policy(policy: PolicyLike, bits: float | None = None) -> AnyPolicy | AutoPolicy:
    """Turn what a user writes into a policy.

    Args:
        policy: a name of ``POLICIES``; ``"<keys>/<values>"`` where each side is a policy name (its keys, its values) or
            a codec name; one of LMDeploy's integers 0, 4, 8, 42 (also as text); a ``KVPolicy``; a ``LayerwisePolicy``;
            a file that ends with ``.json``, as ``kvquant tune`` writes it; or ``"auto:3.5"``, whose policy is chosen
            when the model is known.
        bits: the number behind ``"auto"``, where it stands beside it.

    Raises:
        UnknownPolicyError: nothing of that name; the message lists what there is.  ``"auto"`` without a budget.
        PolicyFileError: a file that is no such file.
    """
    auto = parse_auto(policy, bits)
    if auto is not None:
        return auto
    if isinstance(policy, AnyPolicy | AutoPolicy):
        return policy
    if isinstance(policy, Path) or (isinstance(policy, str) and policy.endswith(SUFFIX)):
        pairs, model = read_layers(policy)
        return LayerwisePolicy([KVPolicy(*pair) for pair in pairs], model)
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
        f"LMDeploy's {', '.join(map(str, QUANT_POLICY))}, {AUTO}:<bits>, or a {SUFFIX} file of `kvquant tune`."
    )


def _side(name: str, side: str) -> str:
    if name in POLICIES:
        return str(getattr(POLICIES[name], side))
    if name in CODECS:
        return name
    raise UnknownPolicyError(
        f"unknown {side} {name!r}; use a policy ({', '.join(POLICIES)}) or a codec ({', '.join(CODECS)})."
    )
