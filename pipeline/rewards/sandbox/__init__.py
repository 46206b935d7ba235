"""Where programs run that a model wrote: without network, files or secrets of the run, and within limits."""

from pipeline.rewards.sandbox.choice import open_sandbox
from pipeline.rewards.sandbox.program import Outcome, Program, Sandbox, SandboxError, SandboxLimits

__all__ = ["Outcome", "Program", "Sandbox", "SandboxError", "SandboxLimits", "open_sandbox"]
