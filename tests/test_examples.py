"""The examples begin as their first lines say: their data are written, what a run checks before it starts is right, and
their environments lead a conversation."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.data.chat import DataError
from pipeline.engine.sampling import Sampling
from pipeline.environments.loading import open_environments
from pipeline.loop.inputs import check_inputs, check_prompts
from pipeline.rewards.kinds.function import import_from
from tests.support.scripted import Scripted

ROOT = Path(__file__).parents[1]
COMMAND = "#   .venv/bin/python "
EXAMPLES = sorted(file.stem for file in ROOT.glob("examples/*/*.yaml") if file.with_suffix(".py").exists())
"""Those whose environment stands beside them; of the others, end_to_end/test_connectors.py takes the environments."""


def written_by(config: Path) -> list[str]:
    """Script and folder of the command that writes an example's data, which stands in its first lines."""
    (line,) = (line for line in config.read_text().splitlines() if line.startswith(COMMAND))
    return shlex.split(line.removeprefix(COMMAND))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder that looks like a clone to a person who starts an example there; the data of all of them are in it."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("examples", "configs"):
        (folder / name).symlink_to(ROOT / name)
    commands = {tuple(written_by(ROOT / f"examples/{name}/{name}.yaml")) for name in EXAMPLES}
    for script, data in commands:
        import_from(Path(script).stem, (ROOT / script).parent).write(folder / data)
    return folder


@pytest.fixture(scope="module")
def prompts(clone, tmp_path_factory):
    """Of a configuration, as a run reads them; once for those that have the same."""
    read = {}

    def of(config):
        key = config.data.model_dump_json()
        if key not in read:
            read[key] = check_prompts(config, tmp_path_factory.mktemp("scratch"))[0]
        return read[key]

    return of


def right_turns(name: str, question: str, metadata: dict) -> list[str]:
    """What a policy that knows the game says."""
    if name == "guess":
        return ["9" if metadata["secret"] != 9 else "0", str(metadata["secret"])]
    call = f"print({question})" if name == "python_tool" else f"({question})"
    return [call, metadata["answer"]]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_passes_what_a_run_checks_and_its_environment_leads_a_conversation(
    example, clone, prompts, monkeypatch
):
    monkeypatch.chdir(clone)
    config = load_config(f"examples/{example}/{example}.yaml")
    check_inputs(config)
    source = prompts(config)
    (prompt,) = source.take(1)
    question = prompt.opening.messages[-1]["content"]
    said = [f"{text}{source.tokenizer.eos_token}" for text in right_turns(example, question, prompt.metadata)]
    engine = Scripted(source.tokenizer, said)
    sampling = Sampling(config.rollout.max_new_tokens, 1.0, stop_token_ids=source.stop_token_ids)

    async def led(attempts):
        return await attempts.begin(engine, prompt, sampling, None).play()

    with open_environments(config.environment, source.tokenizer, source.stop_token_ids) as attempts:
        episode = asyncio.run(led(attempts))
    assert episode.verdict.kind is None, episode.verdict
    assert episode.verdict.reward == 1.0
    (rollout,) = episode.rollouts
    assert rollout.turns == 2
    assert rollout.response_ids[rollout.trained].tolist() == [token for text in said for token in engine.ids(text)]


def test_a_demonstration_that_does_not_fit_is_found_before_a_run_starts(clone, monkeypatch, tmp_path):
    """As it was once: the Python tool's are longer than those of the calculator, whose configuration it begins with."""
    monkeypatch.chdir(clone)
    with pytest.raises(DataError, match="max_prompt_tokens"):
        check_prompts(load_config("examples/python_tool/python_tool.yaml", ["data.max_prompt_tokens=24"]), tmp_path)
