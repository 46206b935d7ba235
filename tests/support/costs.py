"""What files of tests cost, so that the dear ones begin first."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parents[1]
SECONDS = {
    "megatron_ext/batch/test_replay_layouts.py": 110,
    "end_to_end/test_presets.py": 70,
    "end_to_end/test_command.py": 100,
    "end_to_end/test_resume.py": 90,
    "end_to_end/test_endings.py": 49,
    "end_to_end/test_diagnose.py": 60,
    "pipeline/loop/test_objective_layouts.py": 52,
    "end_to_end/test_asynchronous.py": 45,
    "end_to_end/test_evaluation.py": 38,
    "end_to_end/test_precision.py": 36,
    "pipeline/observe/report/test_page.py": 48,
    "megatron_ext/hf/test_families.py": 44,
    "megatron_ext/batch/test_replay.py": 42,
    "pipeline/engine/test_server_faults.py": 60,
    "pipeline/engine/test_interruptions.py": 70,
    "pipeline/engine/test_client.py": 37,
    "end_to_end/test_run.py": 35,
    "megatron_ext/test_trainer.py": 32,
    "megatron_ext/convert/test_conversion.py": 30,
    "pipeline/engine/test_server.py": 29,
    "megatron_ext/checkpoint/test_training.py": 26,
    "pipeline/weights/test_stream.py": 24,
    "end_to_end/test_replay.py": 20,
    "megatron_ext/hf/test_hf.py": 20,
    "pipeline/commands/test_diagnose.py": 18,
    "pipeline/engine/inside/test_sglang_cpu.py": 16,
    "pipeline/plan/test_against_models.py": 16,
    "megatron_ext/checkpoint/test_shards.py": 16,
    "pipeline/checkpoints/test_checkpoints.py": 16,
    "pipeline/rewards/sandbox/test_hostile.py": 14,
    "pipeline/diagnose/test_page.py": 10,
    "pipeline/weights/test_packed_experts.py": 14,
    "pipeline/rewards/kinds/test_servers.py": 9,
    "megatron_ext/hf/test_mbridge.py": 9,
    "megatron_ext/batch/test_replay_mutations.py": 9,
    "pipeline/objectives/test_properties.py": 8,
    "pipeline/data/test_recipes.py": 7,
    "pipeline/data/test_sources.py": 7,
    "pipeline/data/test_procedural.py": 7,
    "megatron_ext/convert/test_failures.py": 7,
    "pipeline/rollout/test_admission.py": 6,
    "pipeline/evaluation/test_answering.py": 6,
    "pipeline/rewards/kinds/test_math_verify.py": 7,
    "pipeline/rewards/sandbox/test_choice.py": 6,
    "megatron_ext/test_precision.py": 5,
}
"""Of a processor, children included, on an EPYC of 2.4 GHz; files of less than five are left out."""


def of(path: Path) -> int:
    """Seconds of the file at `path`; 0 for one that is not in the table."""
    return SECONDS.get(str(path.relative_to(TESTS)), 0)
