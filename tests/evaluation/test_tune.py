"""Policies by layer: the measured numbers are the harness's, and the choice is as good as it can be for its bits."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import prompt, tiny_llama

from kvquant_hf import LayerwisePolicy
from kvquant_hf.errors import EvaluationInputError
from kvquant_hf.evaluation import evaluate, paged
from kvquant_hf.evaluation.tune import (
    KEYS,
    UNIFORM,
    VALUES,
    Part,
    Sensitivity,
    Vectors,
    bits_of,
    choose,
    find_parts,
    ladders,
    mean_bits,
    measure,
    passes,
    probe_of,
    uniform,
)
from kvquant_hf.policies.table import POLICIES
from kvquant_hf.triton_kernels.codecs import CODECS

PAGE = 16
LAYERS = 2
PARTS = {Part(side, i): Vectors(2, 64) for side in ("keys", "values") for i in range(LAYERS)}
RUNGS = {
    "keys": dict(zip(KEYS, (0.9, 0.09, 0.03, 1e-4), strict=True)),
    "values": dict(zip(VALUES, (0.5, 0.14, 0.04, 1e-4), strict=True)),
}
PROBES = {"keys": KEYS[1], "values": VALUES[1]}


def outcome(sensitivity: Sensitivity, policy: LayerwisePolicy) -> float:
    """KLD of a policy by the model of ``tune.py``."""
    return sum(sensitivity.predicted(part, getattr(policy.layers[part.layer], part.side)) for part in PARTS)


def policies_for(key_dim: int, value_dim: int) -> set[str]:
    """Policies whose codecs take vectors of these widths."""
    multiples = {name: [CODECS[c].head_dim_multiple for c in (p.keys, p.values)] for name, p in POLICIES.items()}
    return {name for name, (keys, values) in multiples.items() if key_dim % keys == value_dim % values == 0}


def every_policy() -> list[LayerwisePolicy]:
    pairs = [f"{keys}/{values}" for keys, values in itertools.product(KEYS, VALUES)]
    return [LayerwisePolicy(list(layers)) for layers in itertools.product(pairs, repeat=LAYERS)]


EVERY = every_policy()


@settings(max_examples=40, deadline=None)
@given(klds=st.lists(st.floats(1e-6, 1.0), min_size=len(PARTS), max_size=len(PARTS)), budget=st.floats(2.4, 9.0))
def test_the_choice_is_as_good_as_its_bits_allow(klds: list[float], budget: float) -> None:
    """Greedy steps are optimal up to the first that does not fit: nothing with one step less to spend is better."""
    sensitivity = Sensitivity(dict(zip(PARTS, klds, strict=True)), RUNGS, PROBES)
    policy = choose(sensitivity, PARTS, budget)
    assert mean_bits(policy, PARTS, 64) <= budget + 1e-9
    dearest = (bits_of(KEYS[-1], 64, 64) - bits_of(VALUES[0], 64, 64)) / len(PARTS)
    affordable = [other for other in EVERY if mean_bits(other, PARTS, 64) <= budget - dearest]
    assert all(outcome(sensitivity, policy) <= outcome(sensitivity, other) * (1 + 1e-9) for other in affordable)


def test_bits_go_to_the_layer_that_needs_them() -> None:
    klds = dict.fromkeys(PARTS, 1e-5) | {Part("keys", 1): 1.0}
    policy = choose(Sensitivity(klds, RUNGS, PROBES), PARTS, 4.2)
    assert policy.layers[1].keys == KEYS[-1] and policy.layers[0].keys in KEYS[:2]
    assert mean_bits(policy, PARTS, 64) <= 4.2


def test_layers_are_weighed_by_what_they_hold() -> None:
    """The same KLD is cheaper to save in the layer with fewer heads."""
    parts = {part: Vectors(1 if part.layer else 8, 64) for part in PARTS}
    policy = choose(Sensitivity(dict.fromkeys(parts, 0.1), RUNGS, PROBES), parts, 2.7)
    bits = [bits_of(layer.values, 64, 64) for layer in policy.layers]
    assert bits[1] > bits[0] and mean_bits(policy, parts, 64) <= 2.7


def test_a_budget_below_the_coarsest() -> None:
    with pytest.raises(EvaluationInputError, match=r"take 2\.36 bits per element and the budget is 2\.3; use a larger"):
        choose(Sensitivity(dict.fromkeys(PARTS, 0.1), RUNGS, PROBES), PARTS, 2.3)


def test_bits_are_those_of_the_pages() -> None:
    model = tiny_llama()
    parts = find_parts(model)
    assert list(parts.values()) == [Vectors(2, 32)] * 6
    policy = LayerwisePolicy(["int2-ranked/octet3", "int4-ranked/octet2", "int8"])
    result = evaluate(model, prompt(length=40), [paged(model, policy, page_size=PAGE)], step=PAGE, page_size=PAGE)
    assert result["mixed"].storage.page_bits_per_element == pytest.approx(mean_bits(policy, parts, PAGE), rel=1e-12)


def test_rungs_that_cannot_store_the_vectors_are_replaced_or_left_out() -> None:
    for dims, keys, values in (
        ((20, 64), ["int4-channel", "int8-channel"], list(VALUES)),
        ((64, 20), list(KEYS), ["lloyd2", "int4-hadamard", "int8-affine"]),
        ((64, 80), list(KEYS), list(VALUES)),
        ((1, 1), ["int8-channel"], ["int8-affine"]),
    ):
        parts = {Part(side, 0): Vectors(1, dim) for side, dim in zip(("keys", "values"), dims, strict=True)}
        assert ladders(parts) == {"keys": keys, "values": values}
        assert uniform(parts) == [name for name in UNIFORM if name in policies_for(*dims)]
        assert probe_of(keys) == keys[len(keys) > 2] and probe_of(values) == values[len(values) > 2]


def test_what_is_measured() -> None:
    """Against the harness with policies written out; a layer whose attention goes nowhere is not sensitive at all."""
    model, windows = tiny_llama(), prompt(batch=2, length=40)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    parts = find_parts(model)
    calls: list[str] = []
    found = measure(model, windows, parts, page_size=PAGE, batch=2, advance=calls.append)
    assert len(calls) == passes(parts, windows, PAGE, 2)
    written = {
        Part("keys", 0): ["int3-ranked/exact", "exact", "exact"],
        Part("values", 2): ["exact", "exact", "exact/octet3"],
    }
    for part, layers in written.items():
        contender = paged(model, LayerwisePolicy(layers), page_size=PAGE)
        result = evaluate(model, windows, [contender], step=PAGE, page_size=PAGE, batch=2)["mixed"]
        assert found.parts[part] == pytest.approx(result.accuracy.kld_mean, rel=1e-6) and found.parts[part] > 1e-6
    assert abs(found.parts[Part("keys", 1)]) < 1e-10 and abs(found.parts[Part("values", 1)]) < 1e-10
    for side, rungs in found.rungs.items():
        assert list(rungs.values()) == sorted(rungs.values(), reverse=True), side
    policy = choose(found, parts, 4.5, PAGE)
    assert (policy.layers[1].keys, policy.layers[1].values) == (KEYS[0], VALUES[0])
    with pytest.raises(EvaluationInputError, match="seal no page"):
        measure(model, windows[:, :PAGE], parts, page_size=PAGE)
