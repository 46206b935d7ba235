"""Every error that is a message to a user has an exit code, and the codes stay what they are."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import pipeline
from pipeline import errors
from pipeline.commands import main as command
from pipeline.errors import SamerouteError

CODES = {
    "pipeline.checkpoints.best_model.ExportError": 2,
    "pipeline.checkpoints.resume.ResumeError": 2,
    "pipeline.checkpoints.store.CheckpointError": 1,
    "pipeline.environments.connectors.peer.ConnectorError": 2,
    "pipeline.environments.loading.LoadingError": 2,
    "pipeline.environments.templates.HistoryError": 2,
    "pipeline.environments.turn_parser.ParserError": 2,
    "pipeline.checkpoints.weights_of.NoModelError": 2,
    "pipeline.cluster.address.NoClusterError": 2,
    "pipeline.cluster.one_machine.TooFewGPUs": 2,
    "pipeline.cluster.placement.PlacementError": 1,
    "pipeline.cluster.ray_session.RayError": 1,
    "pipeline.cluster.slurm.LaunchError": 2,
    "pipeline.cluster.slurm.SubmissionError": 1,
    "pipeline.commands.convert.CannotConvertError": 2,
    "pipeline.commands.convert.ConvertError": 1,
    "pipeline.commands.upcycle.CannotUpcycleError": 2,
    "pipeline.commands.upcycle.UpcycleError": 1,
    "pipeline.commands.objectives.NoSuchObjectiveError": 2,
    "pipeline.config.file.ConfigError": 2,
    "pipeline.data.chat.DataError": 2,
    "pipeline.data.chat.TooLongError": 2,
    "pipeline.disk.disk_errors.DiskError": 1,
    "pipeline.dumps.dump.DumpError": 2,
    "pipeline.engine.client.AbortedError": 1,
    "pipeline.engine.decoder.AnswerError": 1,
    "pipeline.engine.joining.join.MembershipError": 1,
    "pipeline.engine.joining.server_requests.ServerRequestError": 2,
    "pipeline.engine.client.UnreachableError": 1,
    "pipeline.engine.server.NodeGoneError": 1,
    "pipeline.engine.server.PortError": 2,
    "pipeline.engine.server.ServerError": 1,
    "pipeline.evaluation.answering.EvaluationError": 1,
    "pipeline.cluster.limits.LimitError": 2,
    "pipeline.loop.loop.DisagreementError": 1,
    "pipeline.loop.loop.NothingToLearnError": 1,
    "pipeline.loop.update.NotFiniteError": 1,
    "pipeline.loop.restarts.RestartLimitError": 1,
    "pipeline.loop.teaching.teacher_model.TeacherError": 2,
    "pipeline.loop.stop.Stopped": 75,
    "pipeline.observe.graded_again.RegradeError": 2,
    "pipeline.observe.report.run_files.ReportError": 2,
    "pipeline.observe.run_dir.RunDirectoryError": 2,
    "pipeline.observe.sinks.alerts.AlertStop": 1,
    "pipeline.observe.sinks.sinks.ObserveError": 2,
    "pipeline.rewards.registry.RewardError": 1,
    "pipeline.rewards.registry.VerifierError": 2,
    "pipeline.stored.StoredRoutesLostError": 1,
    "pipeline.trainer.waits.RankDiedError": 1,
    "pipeline.trainer.group.ServersFailedError": 1,
    "pipeline.trainer.waits.TrainerError": 1,
    "pipeline.trainer.spikes.SpikesError": 1,
    "pipeline.weights.all_finite.NotFiniteWeightsError": 1,
    "pipeline.weights.servers.WeightCheckError": 1,
    "pipeline.weights.servers.WeightTransferError": 1,
}


def subclasses(kind):
    for one in kind.__subclasses__():
        yield one
        yield from subclasses(one)


def test_every_error_has_the_exit_code_that_the_docs_say():
    for module in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
        if not module.name.startswith("pipeline.engine.inside"):  # runs in SGLang's processes
            importlib.import_module(module.name)
    # by the name of the class: where a class stands may change. Ray makes classes of its own of errors that it brings.
    found = {
        kind.__name__: kind.exit_code for kind in subclasses(SamerouteError) if kind.__module__.startswith("pipeline.")
    }
    assert found == {name.rpartition(".")[2]: code for name, code in CODES.items()}
    valid = {errors.FAILED, errors.NOT_STARTED, errors.DISAGREEMENT, errors.TO_BE_RESUMED}
    assert set(found.values()) <= valid


@pytest.mark.parametrize("code", [errors.FAILED, errors.NOT_STARTED, errors.TO_BE_RESUMED])
def test_the_command_ends_with_the_errors_code_and_its_message_alone(monkeypatch, capsys, code):
    class ExampleError(SamerouteError):
        exit_code = code

    def run(options):
        raise ExampleError("what to write instead")

    monkeypatch.setattr("pipeline.commands.report.run", run)
    assert command.main(["report", "somewhere"]) == code
    assert capsys.readouterr().err == "sameroute: what to write instead\n"


def test_a_mistake_of_the_code_keeps_its_traceback(monkeypatch):
    def run(options):
        raise FileNotFoundError("nobody expected this")

    monkeypatch.setattr("pipeline.commands.report.run", run)
    with pytest.raises(FileNotFoundError):
        command.main(["report", "somewhere"])
