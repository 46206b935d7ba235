"""What files of tests cost, so that the dear ones begin first."""

from __future__ import annotations

import functools
from pathlib import Path

TESTS = Path(__file__).parents[1]
SECONDS = {
    "end_to_end/test_resume.py": 45,
    "end_to_end/test_command.py": 35,
    "end_to_end/test_evaluation.py": 32,
    "end_to_end/test_precision.py": 31,
    "end_to_end/test_presets.py": 31,
    "end_to_end/test_diagnose.py": 26,
    "pipeline/rewards/test_grader.py": 22,
    "end_to_end/test_run.py": 20,
    "end_to_end/test_turns.py": 20,
    "pipeline/observe/report/test_page.py": 20,
    "pipeline/engine/test_server_faults.py": 19,
    "pipeline/engine/test_client.py": 18,
    "pipeline/rollout/test_remote_grading.py": 18,
    "pipeline/weights/test_stream.py": 18,
    "pipeline/rewards/sandbox/test_hostile.py": 17,
    "megatron_ext/model/test_transformer_engine.py": 17,
    "pipeline/engine/test_interruptions.py": 15,
    "megatron_ext/hf/test_families.py": 14,
    "pipeline/cluster/test_ray_session.py": 14,
    "pipeline/engine/samplers/test_stored_client.py": 14,
    "pipeline/engine/test_on_gpus.py": 13,
    "pipeline/engine/test_server.py": 13,
    "pipeline/environments/endpoint/test_served_tokens.py": 13,
    "megatron_ext/checkpoint/test_training.py": 12,
    "pipeline/environments/endpoint/test_clients.py": 12,
    "pipeline/environments/endpoint/test_subprogram.py": 12,
    "megatron_ext/batch/test_replay_layouts.py": 11,
    "megatron_ext/convert/test_conversion.py": 11,
    "end_to_end/test_dense.py": 10,
    "end_to_end/test_surroundings.py": 10,
    "pipeline/commands/test_diagnose.py": 10,
    "pipeline/rewards/kinds/test_math_verify.py": 10,
    "megatron_ext/hf/test_hf.py": 9,
    "pipeline/loop/test_objective_layouts.py": 9,
    "pipeline/objectives/test_properties.py": 9,
    "pipeline/plan/test_against_models.py": 9,
    "pipeline/rewards/kinds/test_servers.py": 9,
    "pipeline/weights/test_many_senders.py": 9,
    "pipeline/weights/test_packed_experts.py": 9,
    "end_to_end/test_convert.py": 7,
    "megatron_ext/test_trainer.py": 7,
    "pipeline/data/test_procedural.py": 7,
    "pipeline/data/test_recipes.py": 7,
    "pipeline/data/test_sources.py": 7,
    "pipeline/environments/connectors/test_mcp.py": 7,
    "megatron_ext/batch/test_replay.py": 6,
    "megatron_ext/checkpoint/test_shards.py": 6,
    "megatron_ext/hf/test_one_expert.py": 6,
    "pipeline/commands/test_main.py": 6,
    "pipeline/diagnose/test_page.py": 6,
    "pipeline/engine/test_room.py": 6,
    "pipeline/environments/connectors/test_openenv.py": 6,
    "pipeline/environments/connectors/test_tool_use.py": 6,
    "pipeline/evaluation/test_answering.py": 6,
    "pipeline/objectives/test_equations.py": 6,
    "pipeline/observe/report/test_conversations.py": 6,
    "pipeline/rewards/sandbox/test_choice.py": 6,
    "pipeline/rewards/test_loading.py": 6,
    "pipeline/rollout/test_admission_schedules.py": 6,
    "test_docs.py": 6,
    "test_examples.py": 6,
    "megatron_ext/batch/test_replay_mutations.py": 5,
    "megatron_ext/convert/test_failures.py": 5,
    "megatron_ext/hf/test_joined.py": 5,
    "megatron_ext/logprobs/test_triton_kernels.py": 5,
    "pipeline/checkpoints/test_checkpoints.py": 5,
    "pipeline/environments/endpoint/test_forms.py": 5,
    "pipeline/environments/endpoint/test_streams.py": 5,
}
"""Of a processor, children included, on an EPYC of 2.4 GHz; files of less than five are left out."""


@functools.cache
def of(path: Path) -> int:
    """Seconds of the file at `path`; 0 for one that is not in the table."""
    return SECONDS.get(str(path.relative_to(TESTS)), 0)
