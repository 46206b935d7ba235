"""A file wins over its bases, key by key; what cannot be inherited from is named."""

import json

import pytest

from pipeline.config import ConfigError, load_config, load_config_and_model
from pipeline.config.file import merge, read_tree


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_file_wins_over_its_bases_and_a_later_base_over_an_earlier_one(tmp_path):
    write(
        tmp_path,
        a="x: {one: 1, two: 1, three: 1}\nlist: [1, 2]",
        b="x: {two: 2, three: 2}\nlist: [3]",
        c="base: [a.yaml, b.yaml]\nx: {three: 3}",
    )
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", d="base: ../c.yaml\nx: {four: 4}")
    tree, files = read_tree(tmp_path / "deep" / "d.yaml")
    assert tree == {"x": {"one": 1, "two": 2, "three": 3, "four": 4}, "list": [3]}
    assert [file.stem for file in files] == ["d", "c", "b", "a"]


def test_merging_leaves_both_sides_as_they_were():
    under, over = {"a": {"b": 1}}, {"a": {"c": 2}, "d": None}
    assert merge(under, over) == {"a": {"b": 1, "c": 2}, "d": None}
    assert (under, over) == ({"a": {"b": 1}}, {"a": {"c": 2}, "d": None})
    assert merge({"a": {"b": 1}}, {"a": None}) == {"a": None}


def test_a_base_may_be_reached_twice_but_not_from_itself(tmp_path):
    write(tmp_path, a="x: 1", b="base: a.yaml", c="base: a.yaml", d="base: [b.yaml, c.yaml]")
    assert read_tree(tmp_path / "d.yaml")[0] == {"x": 1}
    write(tmp_path, a="base: d.yaml")
    with pytest.raises(ConfigError, match=r"inherits from itself: .*d\.yaml -> .*b\.yaml -> .*a\.yaml -> .*d\.yaml;"):
        read_tree(tmp_path / "d.yaml")
    write(tmp_path, e="base: e.yaml")
    with pytest.raises(ConfigError, match="inherits from itself"):
        read_tree(tmp_path / "e.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: none.yaml", r"there is no config file .*none\.yaml, the base of .*a\.yaml"),
        ("base: {x: 1}", "base is the path of a file, or a list of paths"),
        ("base: [1]", "base is the path of a file, or a list of paths"),
        ("base: list.yaml", r"list\.yaml must hold a mapping"),
    ],
)
def test_a_base_that_cannot_be_read_is_named(tmp_path, text, message):
    write(tmp_path, a=text, list="- 1")
    with pytest.raises(ConfigError, match=message):
        read_tree(tmp_path / "a.yaml")


def test_the_command_line_wins_over_the_file_and_the_file_over_its_base(tmp_path):
    write(
        tmp_path,
        base="model: {tiny: {}}\ndata: {task: {name: digit_sort}}\ntrain: {lr: 1.0e-3, steps: 7, beta1: 0.5}",
        run="base: base.yaml\ntrain: {lr: 2.0e-3, steps: 8}",
    )
    config = load_config(tmp_path / "run.yaml", ["train.steps=9"])
    assert (config.train.lr, config.train.steps, config.train.beta1) == (2e-3, 9, 0.5)


def test_a_plan_reads_the_config_json_beside_the_yaml_where_the_model_is_elsewhere(tmp_path):
    _, model = load_config_and_model("configs/quickstart.yaml")
    write(
        tmp_path,
        base=f"model: {{path: {tmp_path}/elsewhere}}\ndata: {{task: {{name: digit_sort}}}}",
    )
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine", run="base: ../base.yaml")
    with pytest.raises(ConfigError, match="no Hugging Face model directory"):
        load_config_and_model(tmp_path / "mine" / "run.yaml")
    (tmp_path / "config.json").write_text(json.dumps(model.hf))
    assert load_config_and_model(tmp_path / "mine" / "run.yaml")[1] == model
    with pytest.raises(ConfigError, match="no Hugging Face model directory"):
        load_config(tmp_path / "mine" / "run.yaml")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(model.hf | {"num_hidden_layers": 8}))
    assert load_config_and_model(tmp_path / "mine" / "run.yaml")[1].num_layers == 8


def test_more_gpus_than_the_cluster_has_are_refused():
    with pytest.raises(ConfigError, match=r"1 x 8 GPUs less parallel\.ranks=8 leave 0 for a server"):
        load_config("configs/quickstart.yaml", ["cluster.gpu=h100", "parallel={ranks: 8, expert: 8}"])
    config = load_config("configs/quickstart.yaml", ["cluster={gpu: h100, nodes: 2}", "parallel={ranks: 8, expert: 8}"])
    assert config.rollout_gpus == 8


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            "nodes: 3",
            r"3 x 8 GPUs less .*=12 leave 12 for a server of .*=16, which spans 2 machines; set cluster\.nodes",
        ),
        ("nodes: 9", r"=20 does not divide among the 3 machines of 8 that it takes; set 16 or 24"),
        ("nodes: 4", r"shared_memory reaches one machine, and .*=16 spans 2; set weights\.transport=distributed"),
    ],
)
def test_a_server_over_machines_that_cannot_be_is_refused(settings, words):
    size = "20" if "9" in settings else "16"
    transport = "shared_memory" if "4" in settings else "auto"
    with pytest.raises(ConfigError, match=words):
        load_config(
            "configs/quickstart.yaml",
            [f"cluster={{gpu: h100, {settings}}}", "parallel={ranks: 12}", f"server.tensor_parallel={size}",
             f"weights.transport={transport}"],
        )  # fmt: skip


@pytest.mark.parametrize("base", ["3", "null", "true", "[]", "[[a.yaml]]", "''", "[' ']", "[a.yaml, null]", "1.5"])
def test_a_base_of_another_type_is_refused(tmp_path, base):
    write(tmp_path, a="x: 1", b=f"base: {base}")
    with pytest.raises(ConfigError, match=r"b\.yaml: base is the path of a file, or a list of paths, not .*; leave it"):
        read_tree(tmp_path / "b.yaml")


def test_bases_of_bases_are_not_read_without_end(tmp_path):
    write(tmp_path, a0="x: 1", **{f"a{i}": f"base: {[f'a{i - 1}.yaml'] * 10}" for i in range(1, 9)})
    with pytest.raises(ConfigError, match=r"a8\.yaml inherits from more than 100 files"):
        read_tree(tmp_path / "a8.yaml")


def test_a_base_on_the_command_line_is_refused_with_what_to_write():
    with pytest.raises(ConfigError, match="base stands in a file"):
        load_config("configs/quickstart.yaml", ["base=other.yaml"])
