"""SGLang takes gpt-oss's packed experts as they are streamed, on two ranks that map one buffer."""

import pytest
from safetensors.torch import load_file

from pipeline.config.server import ServerConfig
from pipeline.config.weights import WeightsConfig
from pipeline.engine.control import ServerAddress
from pipeline.engine.server import SGLangServer
from pipeline.weights.sender import WeightSender
from tests.support.tiny_families import save_family


@pytest.mark.slow
@pytest.mark.usefixtures("preloaded")
def test_a_server_holds_every_tensor_that_it_was_sent_bit_for_bit(tmp_path):
    model = save_family("gpt_oss", tmp_path / "gpt_oss")
    weights = {name: 2 * t for name, t in load_file(model / "model.safetensors").items()}
    config = ServerConfig(tensor_parallel=2, startup_timeout_s=240)
    server = SGLangServer(config, model, tmp_path / "log", device="cpu", seed=0, return_routed_experts=True)
    sender = None
    try:
        server.start()
        server.wait_ready()
        sender = WeightSender([ServerAddress(server.url, keys=server.keys)], WeightsConfig(), device="cpu")
        sender.connect()
        before = {d.name for d in sender.differences([list(weights.items())])}
        assert before == weights.keys()
        sender.send([[item] for item in weights.items()], 1)
        assert sender.differences([list(weights.items())]) == []
        # Both ranks map what is sent, and the second's loader zeroes biases in place: before or after the first reads.
        for version in range(2, 6):
            sender.send([list(weights.items())], version)
            assert sender.differences([list(weights.items())]) == []
    finally:
        if sender is not None:
            sender.close()
        server.stop()
