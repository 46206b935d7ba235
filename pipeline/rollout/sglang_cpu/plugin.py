"""PLACEHOLDER v1"""
def activate():
    import os
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return
    import torch
    if torch.cuda.is_available():
        return
    from sglang.srt.mem_cache.pool_host import common
    def alloc_plain(dims, *, dtype, device, pin_memory, allocator, **kw):
        return torch.empty(dims, dtype=dtype, device="cpu")
    common.ALLOC_MEMORY_FUNCS["cpu"] = alloc_plain
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    def fork(result, *a, **k):
        import multiprocessing
        multiprocessing.set_start_method("fork", force=True)
    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", fork, HookType.AFTER)
    from sglang.srt.server_args import add_attention_backend_choices
    add_attention_backend_choices(["sameroute_cpu"])
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    @register_attention_backend("sameroute_cpu")
    def create(runner):
        from pipeline.rollout.sglang_cpu.batched_attention import BatchedAttentionBackend
        return BatchedAttentionBackend(runner)
