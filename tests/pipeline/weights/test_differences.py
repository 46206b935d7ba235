"""One stale tensor is named, whatever the server made of it; so is a tensor that it ignored."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from pipeline.weights import WeightDifference, weight_differences


@pytest.fixture
def weights(tiny_model_dir):
    return load_file(tiny_model_dir / "model.safetensors")


def buckets(weights, tensors_per_bucket=40):
    items = list(weights.items())
    return [items[i : i + tensors_per_bucket] for i in range(0, len(items), tensors_per_bucket)]


def named(found):
    return [(d.name, d.kind) for d in found]


def test_a_server_that_holds_the_weights_differs_in_none(client, weights):
    assert weight_differences(buckets(weights), [client]) == []
    assert weight_differences(buckets(weights, 7), [client]) == []


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.experts.5.up_proj.weight",
        "model.layers.0.mlp.experts.7.down_proj.weight",
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ],
)
def test_one_changed_element_is_found_by_the_name_of_its_tensor(client, weights, name):
    changed = weights[name].clone()
    changed.view(-1)[17] += 1e-3
    found = weight_differences(buckets(weights | {name: changed}), [client])
    assert found == [WeightDifference(name, client.url, "differs")]


def test_two_experts_that_changed_places_are_found(client, weights):
    one, other = (f"model.layers.1.mlp.experts.{e}.gate_proj.weight" for e in (2, 3))
    swapped = weights | {one: weights[other], other: weights[one]}
    assert named(weight_differences(buckets(swapped), [client])) == [(one, "differs"), (other, "differs")]


def test_a_name_that_the_server_does_not_know_is_found(client, weights):
    stray = {"model.layers.0.mlp.experts.8.up_proj.weight": torch.zeros(64, 64), "model.layer.0.stray": torch.zeros(3)}
    assert named(weight_differences(buckets(weights | stray), [client])) == [(name, "ignored") for name in stray]


def test_a_parameter_of_the_server_that_no_tensor_reaches_is_found(client, weights):
    del weights["model.layers.2.mlp.gate.weight"]
    assert named(weight_differences(buckets(weights), [client])) == [("model.layers.2.mlp.gate.weight", "unreached")]
    other, own = "model.layers.1.mlp.gate.", "model.layers.2.mlp.gate."  # of its own: no transfer brings it
    assert named(weight_differences(buckets(weights), [client], [other])) != []
    assert weight_differences(buckets(weights), [client], [own]) == []


def test_asking_changes_nothing(client, weights):
    before = client.checksums()
    weight_differences(buckets(weights), [client])
    assert client.checksums() == before
