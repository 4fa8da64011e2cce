"""The SGLang server on a machine without GPU, from ordinary PyPI wheels: takes SGLang's own flags.

Three things are missing on such a machine that SGLang 0.5.21 asks for by name and, with a dense
model and no speculative decoding, never calls. Stand-ins for them are put in place here: at the top
level, because the server's child processes are spawned and import this file again.
"""

import os
import sys
from types import ModuleType

import torch

KERNELS = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)
"""Of speculative decoding; the package that has them for CPUs is not on PyPI."""

QWEN35_OPERATORS = (
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_mul_cpu",
)
"""Of the file of Qwen3.5, which the image processor of Qwen2.5-VL imports."""


class MissingKernels(ModuleType):
    """A module `sgl_kernel` whose functions say that they are not there."""

    def __getattr__(self, name: str):
        if name not in KERNELS:
            raise AttributeError(name)

        def missing(*_, **__):
            raise NotImplementedError(f"sgl_kernel.{name} has no implementation for CPUs here")

        return missing


sys.modules["sgl_kernel"] = MissingKernels("sgl_kernel")
for operator in QWEN35_OPERATORS:
    torch.library.define(f"sgl_kernel::{operator}", "(Tensor x) -> Tensor")
if torch.version.cuda is None:
    # PyPI's torchvision is built for CUDA: beside a torch for CPUs its operators do not load, but
    # its Python files want to describe two of them.
    for operator in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{operator}",
            "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        )


def main() -> None:
    """Serves until it is ended; its children end with it."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
