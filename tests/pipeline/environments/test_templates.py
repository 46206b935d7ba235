import pytest

from pipeline.environments.templates import HistoryError, TemplateWriter, check_growth
from pipeline.types import Opening
from tests.support.templates import FAMILIES, tokenizer_of

TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}
ASKED = ({"role": "user", "content": "question"},)
TOOLED = {"qwen3", "kimi-k2"}  # templates that list tools in front


def writer(name, tmp_path, **variables):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, tmp_path)
    stops = [tokenizer.convert_tokens_to_ids(stop) for stop in family.stops]
    tools = (TOOL,) if name in (*TOOLED, "tools-last") else ()
    return TemplateWriter(tokenizer, Opening(ASKED, tools, variables), stops)


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("smollm2", ("user", "tool")),
        ("deepseek-v3", ("user", "tool")),
        ("kimi-k2", ("user", "tool")),
        ("qwen3", ("tool",)),
        ("glm-4.5", ("tool",)),
        ("gpt-oss", ("tool",)),
    ],
)
def test_what_a_template_only_adds_to_is_let_through(name, roles, tmp_path):
    check_growth(writer(name, tmp_path), roles)


@pytest.mark.parametrize(
    ("name", "variables", "role", "shows"),
    [
        ("qwen3", {}, "user", "<think>"),
        ("qwen3", {"enable_thinking": False}, "user", "<think>"),
        ("qwen3", {"enable_thinking": False}, "tool", "<think>"),
        ("glm-4.5", {}, "user", "<think>"),
        ("gpt-oss", {}, "user", "<|return|>"),
        ("tools-last", {}, "user", "[TOOLS]"),
    ],
)
def test_what_a_template_changes_is_refused_and_shown(name, variables, role, shows, tmp_path):
    with pytest.raises(HistoryError) as caught:
        check_growth(writer(name, tmp_path, **variables), (role,))
    assert shows in str(caught.value)
    assert f"the role {role}" in str(caught.value)
    assert "environment.history=split" in str(caught.value)


@pytest.mark.parametrize("name", ["smollm2", "deepseek-v3", "kimi-k2", "qwen3"])
def test_a_conversation_that_grows_by_suffixes_is_the_one_that_the_template_writes(name, tmp_path):
    one = writer(name, tmp_path)
    messages, before = list(ASKED), one.render(ASKED)
    text, stop = before, one.stops[0]
    for i in range(4):
        text += f"answer {i}" + stop
        history = [*messages, {"role": "assistant", "content": f"answer {i}"}]
        rest, before = one.suffix(before, f"answer {i}", stop, history, [{"role": "user", "content": f"more {i}"}])
        text += rest
        messages = [*history, {"role": "user", "content": f"more {i}"}]
        assert text == before == one.render(messages)


def test_of_an_answer_that_was_cut_the_suffix_has_the_end_too(tmp_path):
    one = writer("smollm2", tmp_path)
    history, more = [*ASKED, {"role": "assistant", "content": "an"}], [{"role": "user", "content": "more"}]
    cut, _ = one.suffix(one.render(ASKED), "an", None, history, more)
    whole, _ = one.suffix(one.render(ASKED), "an", "<|im_end|>", history, more)
    assert cut == "<|im_end|>" + whole
    assert whole == "\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"


def test_the_role_token_that_a_policy_stopped_at_does_not_come_twice(tmp_path):
    one = writer("glm-4.5", tmp_path)
    said = "\n<think>hm</think>\nanswer"
    history = [*ASKED, {"role": "assistant", "content": said.strip(), "tool_calls": []}]
    rest, _ = one.suffix(one.render(ASKED), said, "<|observation|>", history, [{"role": "tool", "content": "12"}])
    assert rest == "\n<tool_response>\n12\n</tool_response><|assistant|>"


def test_results_of_tools_that_follow_one_another_share_a_turn_where_the_template_has_it_so(tmp_path):
    one = writer("qwen3", tmp_path)
    history = [*ASKED, {"role": "assistant", "content": "call"}]
    new = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    rest, _ = one.suffix(one.render(ASKED), "call", "<|im_end|>", history, new)
    assert rest.count("<|im_start|>user") == 1
    assert rest.count("<tool_response>") == 2


def test_an_answer_that_the_template_writes_in_its_own_way_is_no_change_of_history(tmp_path):
    """Spaces that are stripped, a call that is written from its parts: what was sampled stays, the suffix is right."""
    one = writer("kimi-k2", tmp_path)
    call = {"id": "f:0", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    history = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]
    reply = {"role": "tool", "content": "12", "tool_call_id": "f:0"}
    rest, _ = one.suffix(one.render(ASKED), '<|call|>f:0{"x":1}', "<|im_end|>", history, [reply])
    assert rest.startswith("<|im_system|>tool<|im_middle|>## Return of f:0\n12<|im_end|>")


def test_a_template_that_refuses_a_role_says_so(tmp_path):
    from pipeline.data.tokenizer import load_tokenizer, write_character_tokenizer

    tokenizer = load_tokenizer(write_character_tokenizer(tmp_path))
    one = TemplateWriter(tokenizer, Opening(ASKED), [tokenizer.eos_token_id])
    check_growth(one, ("user", "tool"))
    with pytest.raises(HistoryError, match="system, user, assistant or tool, not robot"):
        one.render([*ASKED, {"role": "robot", "content": "1"}])
