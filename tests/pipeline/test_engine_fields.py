"""What is passed on to the engines is checked against their sources, in a tenth of a second, without importing them."""

import argparse
import dataclasses
import subprocess
import sys

import pytest

from pipeline.config import ConfigError, load_config
from pipeline.engine_fields import _alternatives, _megatron, _sglang, _wrong
from tests.support.ranks import run_alone

QUICKSTART = "configs/quickstart.yaml"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.extra={moe_aux_los_coeff: 0.1}", "no field moe_aux_los_coeff; did you mean moe_aux_loss_coeff"),
        ("trainer.extra={nonsense: 1}", "TransformerConfig has no field nonsense; leave it out"),
        ("trainer.extra={q_lora_rank: 8}", "no field q_lora_rank; it is for models with latent attention"),
        ("trainer.extra={moe_aux_loss_coeff: much}", "moe_aux_loss_coeff is a number.*, not 'much'"),
        ("trainer.extra={attention_dropout: true}", "attention_dropout is a number, not True"),
        ("trainer.extra={hidden_dropout: null}", "hidden_dropout is a number, not None"),
        ("trainer.extra={apply_rope_fusion: 1}", "apply_rope_fusion is true or false, not 1"),
        ("trainer.extra={moe_router_num_groups: 1.5}", "moe_router_num_groups is a whole number or null, not 1.5"),
        ("trainer.extra={moe_router_score_function: softmux}", "is 'softmax' or 'sigmoid'.*, not 'softmux'"),
        (
            "server.extra_args=[--watchdog-timout, '9']",
            "no argument --watchdog-timout; did you mean --watchdog",
        ),
        ("server.extra_args=[--zzzzzzzzzzz]", "SGLang has no argument --zzzzzzzzzzz; leave it out"),
        ("server.extra_args=['--watchdog-timeout 9']", r"as two items: \[--watchdog-timeout, 9\]"),
        ("server.extra_args=[watchdog-timeout, '9']", "'watchdog-timeout' belongs to no argument"),
        ("server.extra_args=[--watchdog-timeout, soon]", "--watchdog-timeout takes a number, not 'soon'"),
        ("server.extra_args=[--watchdog-timeout=]", "--watchdog-timeout takes a number, not ''"),
        ("server.extra_args=[--max-queued-requests, '1.5']", "--max-queued-requests takes a whole number, not '1.5'"),
        ("server.extra_args=[--max-queued-requests]", "--max-queued-requests takes a whole number, not nothing"),
    ],
)
def test_a_field_or_argument_that_an_engine_does_not_have_is_refused_with_the_nearest(override, words):
    with pytest.raises(ConfigError, match=words):
        load_config(QUICKSTART, [override])


def test_what_the_engines_take_is_taken():
    load_config(
        QUICKSTART,
        [
            "trainer.extra={moe_aux_loss_coeff: 0, hidden_dropout: 0.1, moe_router_num_groups: null, "
            "recompute_modules: [moe], moe_z_loss_coeff: 1e-3, moe_router_enable_expert_bias: true}",
            "server.extra_args=[--watchdog-timeout=9, --enable-metrics, --max-total-tok, 64k]",
        ],
    )
    load_config(
        QUICKSTART,
        [
            "server.extra_args=[--log-requests-level, '2', --json-model-override-args, '{}', "
            "--no-enable-dsa-fused-indexer]",
        ],
    )


def test_every_field_and_default_of_megatron_core_passes_its_own_check():
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    known = _megatron()
    fields = {field.name: field for field in dataclasses.fields(MLATransformerConfig)}
    assert fields.keys() == known[""].keys() | known["MLATransformerConfig"].keys()
    assert {field.name for field in dataclasses.fields(TransformerConfig)} == known[""].keys()
    everything = known["MLATransformerConfig"] | known[""]
    assert sum(None not in _alternatives(annotation) for annotation in everything.values()) > 200
    plain = {n: f.default for n, f in fields.items() if isinstance(f.default, int | float | str | bool)}
    assert [name for name, value in plain.items() if _wrong(value, everything[name])] == []


def _options() -> list[str]:
    """Runs in a process of its own: SGLang's import changes torch and transformers."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return [option for action in parser._actions for option in action.option_strings]


def test_every_option_of_sglang_is_known():
    (options,) = run_alone(_options)
    assert len(options) > 400
    assert set(options) - _sglang().keys() <= {"-h", "--help"}


def test_no_engine_is_imported_for_it():
    script = (
        "import sys; from pipeline.config import load_config; "
        "load_config('configs/quickstart.yaml', ['trainer.extra={moe_z_loss_coeff: 1}', "
        "'server.extra_args=[--enable-metrics]']); "
        "print({'sglang', 'megatron', 'torch'} & sys.modules.keys())"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
