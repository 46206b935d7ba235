"""Environments of other houses, a file each: `verifiers`, OpenEnv, tools of MCP servers."""
