"""Functions inside Megatron-Core 0.19.2 that do not run, or crawl, without a GPU. Each names its symptom."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist


def install() -> None:
    """Import Megatron-Core without compiling anything, then patch it."""
    # megatron.core.jit wraps its fused helpers in torch.compile at import: minutes of inductor for a few adds.
    compile_ = torch.compile
    torch.compile = lambda f=None, **kw: f if f is not None else (lambda g: g)
    try:
        import megatron.core
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer  # noqa: F401
    finally:
        torch.compile = compile_
    _random_state()
    _uneven_collectives()
    _split_sizes_as_lists()
    _buffers_of_one_rank()
    _scaled_in_place()
    _not_scaled_by_one()
    _weights_that_are_their_own()
    install_layers()
    from megatron_ext.cpu import row_functions

    row_functions.install()


def install_layers() -> None:
    """What plain torch layers need on any device."""
    _duplicated_linears()
    from megatron_ext.cpu import adam, rope

    adam.install()
    rope.install()


def _random_state() -> None:
    """`tensor_parallel.random` reads CUDA generators through private functions; the CPU has one generator."""
    import megatron.core.tensor_parallel.random as mcore_random

    generator = torch.random.default_generator
    mcore_random._get_cuda_rng_state = lambda *a, **k: generator.get_state()
    mcore_random._set_cuda_rng_state = lambda state, *a, **k: generator.set_state(state)
    # It warns on every fork that the CPU's state changed, which is the point here.
    logging.getLogger(mcore_random.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )


def _uneven_collectives() -> None:
    """gloo has no all-gather or reduce-scatter of uneven sizes (RuntimeError); all-to-all does the same."""
    import megatron.core.tensor_parallel.mappings as mappings

    even_gather, even_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(x, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return even_gather(x, group, None, use_global_buffer)
        world, sizes = group.size(), [int(n) for n in output_split_sizes]
        out = x.new_empty((sum(sizes), *x.shape[1:]))
        dist.all_to_all_single(out, torch.cat([x.contiguous()] * world), sizes, [x.shape[0]] * world, group=group)
        return out

    def reduce_scatter(x, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return even_scatter(x, group, None, use_global_buffer)
        world, sizes = group.size(), [int(n) for n in input_split_sizes]
        mine = sizes[group.rank()]
        out = x.new_empty((world * mine, *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), [mine] * world, sizes, group=group)
        return out.view(world, mine, *x.shape[1:]).sum(0)

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, reduce_scatter


def _buffers_of_one_rank() -> None:
    """The distributed optimizer reduces its gradients and gathers its weights in place; gloo copies each of these
    buffers twice where there is one rank, which was a sixth of an update of 400 million parameters."""
    import megatron.core.distributed.param_and_grad_buffer as buffers

    gather, scatter = buffers.dist_all_gather_func, buffers.dist_reduce_scatter_func

    def all_gather(out, part, group=None, async_op=False):
        if group is None or group.size() > 1 or out.data_ptr() != part.data_ptr():
            return gather(out, part, group=group, async_op=async_op)
        return None

    def reduce_scatter(part, whole, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if group is None or group.size() > 1 or part.data_ptr() != whole.data_ptr():
            return scatter(part, whole, op=op, group=group, async_op=async_op)
        return None

    buffers.dist_all_gather_func, buffers.dist_reduce_scatter_func = all_gather, reduce_scatter


def _scaled_in_place() -> None:
    """Clipping makes a scaled copy of every gradient, new memory each time, and copies it back: a fifth of an update of
    400 million parameters."""
    import megatron.core.optimizer.clip_grads as clip_grads

    def scale(chunk_size, noop_flag, tensor_lists, factor):
        for source, target in zip(*tensor_lists, strict=True):
            torch.mul(source, factor, out=target)

    clip_grads.multi_tensor_scale_impl = scale


def _not_scaled_by_one() -> None:
    """Gradients are divided by the number of a loss's tokens, which is 1 here: the loss brings its own denominator."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

    scale = _ParamAndGradBuffer.scale_gradients

    def scale_others(self, scaling_factor):
        if float(scaling_factor) != 1.0:
            scale(self, scaling_factor)

    _ParamAndGradBuffer.scale_gradients = scale_others


def _weights_that_are_their_own() -> None:
    """The distributed optimizer copies its float32 weights to the model's after a step, which are the same memory."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    copy = DistributedOptimizer._copy_main_params_to_model_params

    def is_models(optimizer, main, model) -> bool:
        index, _, bucket = optimizer.model_param_gbuf_map[model]
        buffer = optimizer.buffers[index].buckets[bucket].param_data
        return main.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()

    def copy_others(self):
        mains, models = self.shard_fp32_groups, self.model_fp32_groups
        pairs = [zip(*pair, strict=True) for pair in zip(mains, models, strict=True)]
        others = [[pair for pair in group if not is_models(self, *pair)] for group in pairs]
        self.shard_fp32_groups = [[main for main, _ in group] for group in others]
        self.model_fp32_groups = [[model for _, model in group] for group in others]
        try:
            copy(self)
        finally:
            self.shard_fp32_groups, self.model_fp32_groups = mains, models

    DistributedOptimizer._copy_main_params_to_model_params = copy_others


def _split_sizes_as_lists() -> None:
    """all_to_all_single takes its split sizes as lists; without a GPU the dispatcher leaves them CPU tensors."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_host(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _duplicated_linears() -> None:
    """Multi-latent attention asks whether its down-projections are Transformer Engine's, which holds them whole on
    every rank, by identity; otherwise it raises ValueError, or cuts them."""
    import megatron.core.transformer.multi_latent_attention as mla

    from megatron_ext.cpu.layers import DuplicatedLinear

    mla.TELinear = DuplicatedLinear
